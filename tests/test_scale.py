"""What a coefficient is multiplied by: ``scale_by``, ``max_lr``, and one value per param group."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from adapters import N, each_adapter, no_loss, run
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.optimizer import SGD
from fastai_helpers import BATCHES, Trace, When, still_learner, wrapped
from helpers import caught, one_weight, parameter
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.torch import DecoupledWD

SCALES = {
    "lr": lambda lr, peak: lr,
    "lr_ratio": lambda lr, peak: lr / peak,
    "lr_squared": lambda lr, peak: lr**2 / peak,
    "none": lambda lr, peak: 1,
}


@pytest.mark.parametrize("scale_by", SCALES)
def test_scales_under_a_onecycle_schedule(scale_by):
    p = parameter(dtype=torch.float64)
    optimizer = torch.optim.SGD([p], lr=0.1)
    cycle = OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    DecoupledWD(optimizer, 0.1, scale_by=scale_by)
    expected = 1.0
    for _ in range(8):
        expected *= 1 - 0.1 * SCALES[scale_by](optimizer.param_groups[0]["lr"], 0.5)
        optimizer.step()
        assert p[0].item() == pytest.approx(expected, rel=1e-9)
        cycle.step()


def test_a_guessed_max_lr_that_a_tensor_lr_exceeds_warns_once():  # P7
    _, optimizer = one_weight()
    DecoupledWD(optimizer, 0.1, scale_by="lr_ratio")

    def train():
        for lr in (0.1, 0.2, 0.3, 0.4):
            optimizer.param_groups[0]["lr"] = torch.tensor(lr)
            optimizer.step()

    _, [message] = caught(train)
    assert "group 0" in message
    assert "0.2" in message


def test_a_learning_rate_of_0_fits_a_scale_without_a_peak():
    p, optimizer = one_weight(lr=0.0)
    DecoupledWD(optimizer, 0.5, scale_by="none")
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((2,), 0.5))


# No-decay groups: their own weight decay is 0 while another's is not

NO_DECAY = [
    # the own weight decay of two groups, wd, and what a step multiplies each group by
    ([0.0, 0.2], 0.5, (1, 0.95)),
    ([0.0, 0.2], lambda _: 0.5, (1, 0.95)),
    ([0.0, 0.2], [0.5, 0.5], (0.95, 0.95)),
    ([0.0, 0.2], None, (1, 0.98)),
    ([0.0, 0.0], 0.5, (0.95, 0.95)),
]


@each_adapter
def test_a_no_decay_group_stays_one_unless_a_sequence_says_otherwise(adapter):
    for own, wd, expected in NO_DECAY:
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        for p in model.parameters():
            p.data.fill_(1)
        run(adapter, {"wd": wd}, model, own=own, loss=no_loss)  # a warning is an error
        for layer, factor in zip(model, expected):
            assert layer.weight[0, 0].item() == pytest.approx(factor**N, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight decay of 0")
@pytest.mark.parametrize("event", ["before_fit", "before_train"])
def test_fastai_sees_a_no_decay_group_that_a_callback_makes(event):
    learn = still_learner(groups=2, opt_func=wrapped(torch.optim.SGD))
    sets_wd = When(event, lambda learn: learn.opt.set_hyper("wd", [0.0, 0.2]))
    learn.fit(2, 0.1, cbs=[sets_wd, FastaiWD(0.5)])
    assert learn.model[0].weight[0, 0] == 1
    assert learn.model[1].weight[0, 0].item() == pytest.approx(0.95**16)
    assert [h["wd"] for h in learn.opt.hypers] == [0.0, 0.2]


# fastai: the peak is the maximum of the fit's own schedule

LRS = (0.1, 0.4)  # of two groups: what slice(0.1, 0.4) makes of them


def fit(learn, cbs):
    learn.fit(2, slice(*LRS), cbs=cbs)


def one_cycle(learn, cbs, epochs=2, **options):
    learn.fit_one_cycle(epochs, slice(*LRS), cbs=cbs, **options)


def own_scheduler(learn, cbs):
    lrs = SchedCos(np.array(LRS), np.array(LRS) / 50)
    learn.fit(2, 7.0, cbs=[ParamScheduler({"lr": lrs}), *cbs])


def decayed(fit, opt_func=SGD, **arguments):
    """The trace of the weights, one in each group, of a Learner that only decays."""
    trace = Trace()
    fit(still_learner(groups=2, opt_func=opt_func), [FastaiWD(0.3, quantum=0, **arguments), trace])
    return trace


def check(trace, group, shrinks):
    weights = np.cumprod(1 - np.array(shrinks))
    assert [w[group] for w in trace.weights] == pytest.approx(weights.tolist(), rel=1e-12)


PEAKS = {
    "fit": (fit, {}, LRS),
    "one_cycle": (one_cycle, {}, LRS),
    "between two samples": (partial(one_cycle, epochs=7, pct_start=1 / 3), {}, LRS),
    "at the end": (partial(one_cycle, epochs=7, pct_start=0.99), {}, LRS),
    "own scheduler": (own_scheduler, {}, LRS),
    "torch's SGD": (one_cycle, {"opt_func": wrapped(torch.optim.SGD)}, LRS),
    "given": (one_cycle, {"max_lr": [0.5, 0.9]}, (0.5, 0.9)),
}


@pytest.mark.parametrize(("fit", "arguments", "peaks"), PEAKS.values(), ids=PEAKS)
def test_the_peak_of_a_fit(fit, arguments, peaks):  # P4, P5
    trace = decayed(fit, scale_by="lr_ratio", **arguments)
    for group, peak in enumerate(peaks):
        check(trace, group, [0.3 * lr / peak for lr in trace.lrs(group)])


def test_the_peak_is_taken_anew_by_every_fit():
    learn = still_learner(cbs=FastaiWD(0.5, scale_by="lr_ratio", quantum=0))
    for fits, lr in enumerate((0.1, 0.4, 0.02), start=1):
        learn.fit(1, lr)
        assert learn.model[0].weight[0, 0].item() == pytest.approx(0.5 ** (fits * BATCHES))


def test_a_callable_scale_sees_hypers_and_params():
    seen = set()

    def scale(group):
        seen.add((*sorted(group), len(group["params"])))
        return 2 * group["lr"] * group["mom"]

    trace = decayed(one_cycle, scale_by=[scale, "none"])
    assert seen == {("lr", "mom", "params", "wd", 1)}
    check(trace, 0, [0.3 * 2 * float(first["lr"] * first["mom"]) for first, _ in trace.hypers])
    check(trace, 1, [0.3] * 2 * BATCHES)
