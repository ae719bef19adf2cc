"""What a coefficient is multiplied by: ``scale_by``, ``max_lr``, and one value per param group."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from adapters import N, each_adapter, no_loss, run
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai_helpers import BATCHES, Trace, When, still_learner, wrapped
from helpers import caught, parameter
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
    p = parameter(2, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD([p], lr=0.1)
    cycle = OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    DecoupledWD(optimizer, 0.1, scale_by=scale_by)
    expected, lrs = 1.0, []
    for _ in range(8):
        lrs.append(optimizer.param_groups[0]["lr"])
        expected *= 1 - 0.1 * SCALES[scale_by](lrs[-1], 0.5)
        optimizer.step()
        assert p[0, 0].item() == pytest.approx(expected, rel=1e-9)
        cycle.step()
    assert max(lrs) == pytest.approx(0.5, rel=0.1)


@each_adapter
def test_a_scale_in_every_adapter(adapter):  # the others are in test_formulas.py
    model = nn.Linear(3, 1)
    model.weight.data.fill_(1)
    arguments = {"wd": 0.3, "scale_by": "lr_squared", "quantum": 0}
    run(adapter, arguments, model, lr=0.4, lr_at=lambda p: 1 - p, loss=no_loss)
    lrs = [0.4 * (1 - step / N) for step in range(N)]
    expected = np.prod([1 - 0.3 * lr**2 / 0.4 for lr in lrs])
    assert model.weight[0, 0].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
def test_a_guessed_max_lr_that_lr_exceeds_warns_once(on_device):  # P7
    optimizer = torch.optim.SGD([parameter(2)], lr=0.1)
    decay = DecoupledWD(optimizer, 0.1, scale_by="lr_ratio")

    def train():
        for lr in (0.1, 0.2, 0.3, 0.4):
            optimizer.param_groups[0]["lr"] = torch.tensor(lr) if on_device else lr
            optimizer.step()

    _, (message,) = caught(train)
    assert "group 0" in message
    assert "0.2" in message
    assert decay.coefficients == [0.1]


def test_a_learning_rate_of_0_fits_a_scale_without_a_peak():
    p = parameter(2)
    optimizer = torch.optim.SGD([p], lr=0.0)
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


def set_first_to_0(event):
    return When(event, lambda learn: learn.opt.set_hyper("wd", [0.0, 0.2]))


@pytest.mark.filterwarnings("ignore:.*weight decay of 0")
@pytest.mark.parametrize("event", ["before_fit", "before_train"])
def test_fastai_sees_a_no_decay_group_that_a_callback_makes(event):
    learn = still_learner(groups=2, opt_func=wrapped(torch.optim.SGD))
    learn.fit(2, 0.1, cbs=[set_first_to_0(event), FastaiWD(0.5)])
    assert learn.model[0].weight[0, 0] == 1
    assert learn.model[1].weight[0, 0].item() == pytest.approx(0.95**16)
    assert [h["wd"] for h in learn.opt.hypers] == [0.0, 0.2]


# fastai: the peak is the maximum of the fit's own schedule

LRS = (0.1, 0.4)  # of two groups: what slice(0.1, 0.4) makes of them

SCALED_FITS = {
    "fit": lambda learn, cbs: learn.fit(2, slice(*LRS), cbs=cbs),
    "one_cycle": lambda learn, cbs: learn.fit_one_cycle(2, slice(*LRS), cbs=cbs),
    "flat_cos": lambda learn, cbs: learn.fit_flat_cos(2, slice(*LRS), cbs=cbs),
    "sgdr": lambda learn, cbs: learn.fit_sgdr(2, 1, slice(*LRS), cbs=cbs),
    "scheduler": lambda learn, cbs: learn.fit(
        2, 7.0, cbs=[ParamScheduler({"lr": SchedCos(np.array(LRS), np.array(LRS) / 50)}), *cbs]
    ),
}


def decayed(fit, *args, opt_func=None, **kwargs):
    """The trace of the two weights of a Learner that only decays."""
    decay = FastaiWD(*args, quantum=0, **kwargs)
    learn = still_learner(groups=2, **({"opt_func": opt_func} if opt_func else {}))
    trace = Trace(decay)
    fit(learn, [decay, trace])
    return trace


def check(trace, shrink, peaks=LRS):
    """The weights are those of the closed form, from the recorded learning rates."""
    for group, peak in enumerate(peaks):
        expected = np.cumprod([1 - shrink(lr, peak) for lr in trace.lrs(group)])
        assert [w[group] for w in trace.weights] == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize("fit", SCALED_FITS.values(), ids=SCALED_FITS)
def test_a_scale_in_fastais_fits(fit):  # P4
    check(decayed(fit, 0.3, scale_by="lr_squared"), lambda lr, peak: 0.3 * lr**2 / peak)


def test_the_ratio_is_one_at_the_peak():
    # step 4 of 16 is at the peak, which is neither learn.lr nor a 25th of it
    trace = decayed(SCALED_FITS["one_cycle"], 0.5, scale_by="lr_ratio")
    assert trace.lrs(1)[4] == 0.4
    for group in range(2):
        assert trace.weights[4][group] / trace.weights[3][group] == pytest.approx(0.5)
        assert trace.weights[0][group] == pytest.approx(1 - 0.5 / 25)


@pytest.mark.parametrize(("max_lr", "peaks"), [(0.8, (0.8, 0.8)), ([0.5, 0.9], (0.5, 0.9))])
def test_a_given_max_lr_wins(max_lr, peaks):
    trace = decayed(SCALED_FITS["one_cycle"], 0.3, scale_by="lr_ratio", max_lr=max_lr)
    check(trace, lambda lr, peak: lr / peak * 0.3, peaks)


def test_a_wrapped_optimizer_has_the_schedule_s_peak():  # P5
    def fit(learn, cbs):
        learn.fit_one_cycle(2, slice(*LRS), moms=(0, 0, 0), cbs=cbs)

    trace = decayed(fit, 0.3, scale_by="lr_squared", opt_func=wrapped(torch.optim.SGD))
    check(trace, lambda lr, peak: lr**2 / peak * 0.3)


def test_a_callable_scale_sees_hypers_and_params():
    groups = []

    def scale(group):
        groups.append((sorted(group), len(group["params"])))
        return 2 * group["lr"] * group["mom"]

    trace = decayed(SCALED_FITS["one_cycle"], 0.3, scale_by=[scale, "none"])
    assert set(map(str, groups)) == {str((["lr", "mom", "params", "wd"], 1))}
    moms = [float(h[0]["mom"]) for h in trace.hypers]
    expected = np.cumprod([1 - 0.6 * lr * mom for lr, mom in zip(trace.lrs(), moms)])
    assert [w[0] for w in trace.weights] == pytest.approx(expected.tolist(), rel=1e-12)
    assert [w[1] for w in trace.weights] == pytest.approx(np.cumprod([0.7] * 16).tolist())


@pytest.mark.parametrize("pct_start", [0.25, 1 / 3, 0.99])
def test_the_peak_is_the_maximum_wherever_it_lies(pct_start):
    learn, trace = still_learner(), Trace()
    decay = FastaiWD(0.01, scale_by="lr_ratio", quantum=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the ratio does not exceed 1
        learn.fit_one_cycle(7, 0.4, pct_start=pct_start, cbs=[decay, trace])
    check(trace, lambda lr, peak: lr / peak * 0.01, (0.4,))


def test_the_peak_is_taken_anew_by_every_fit():
    learn = still_learner(cbs=FastaiWD(0.5, scale_by="lr_ratio", quantum=0))
    for lr in (0.1, 0.4, 0.02):
        before = learn.model[0].weight[0, 0].item()
        learn.fit(1, lr)
        assert learn.model[0].weight[0, 0].item() == pytest.approx(before * 0.5**BATCHES)
