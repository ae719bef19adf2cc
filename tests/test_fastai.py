"""The fastai adapter in real Learners, against fastai's own decoupled optimizers and by hand."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

pytest.importorskip("fastai")

from fastai.callback.core import (
    Callback,
    CancelBatchException,
    CancelFitException,
    CancelStepException,
)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin, SchedPoly, combined_cos
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.optimizer import (
    SGD,
    Adam,
    Lamb,
    Larc,
    Lookahead,
    Optimizer,
    OptimWrapper,
    QHAdam,
    RAdam,
    RMSProp,
    ranger,
    sgd_step,
)
from fastcore.basics import noop
from reference.loops import decay_by_hand

from wd_callbacks.fastai import DecoupledWD
from wd_callbacks.torch import DecoupledWD as TorchDecoupledWD

WD = 0.1
IGNORED = 0.37  # the optimizer's own wd, which must not show in the weights
BS, BATCHES = 5, 8

L2 = partial(Adam, wd=IGNORED, decouple_wd=False)
ADAMW = partial(Adam, wd=WD, decouple_wd=True)


# Learners


class Items(list):
    """A dataset that can be exported."""

    def new_empty(self):
        return Items()


def items(n=BS * BATCHES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(n, 4, generator=generator, dtype=dtype)
    ys = xs[:, :1] - xs[:, 1:2] * xs[:, 2:3] + 0.5
    return Items(zip(xs, ys))


def quiet(learn):
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn


def learner(opt_func=SGD, *, model=None, batches=BATCHES, dtype=torch.float32, **kwargs):
    """A Learner of a model with norms and biases, the same at every call."""
    if model is None:
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()),
            *(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()),
            nn.Linear(6, 1),
        )
    data = items(BS * batches, dtype)
    dls = DataLoaders.from_dsets(
        data, Items(data[: 2 * BS]), bs=BS, shuffle=False, device="cpu", num_workers=0
    )
    kwargs = {"loss_func": mse_loss, "lr": 0.05, **kwargs}
    return quiet(Learner(dls, model, opt_func=opt_func, **kwargs))


def still_learner(groups=1, **kwargs):
    """A Learner whose float64 weights, all ones, only decay: their gradients are zero.

    Each of the ``groups`` weights is a param group of its own.
    """
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(groups))).double()
    for p in model.parameters():
        nn.init.ones_(p)
    kwargs = {"opt_func": partial(SGD, decouple_wd=False), "splitter": layers, **kwargs}
    return learner(model=model, dtype=torch.float64, loss_func=nothing, **kwargs)


def nothing(pred, _):
    return (0 * pred.sum()).float()  # fastai averages losses in float32


def layers(model):
    return [list(layer.parameters()) for layer in model]


def halves(model):
    return [list(model[:3].parameters()), list(model[3:].parameters())]


def thirds(model):
    return [list(part.parameters()) for part in (model[:3], model[3:6], model[6:])]


def weights(learn):
    return {name: value.clone() for name, value in learn.model.state_dict().items()}


def different(a, b):
    """The names of the tensors that are not the same to the bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def fitted(opt_func, *cbs, fit=None, **kwargs):
    """The weights after a fit with ``cbs``."""
    learn = learner(opt_func, **kwargs)
    (fit or two_epochs)(learn, list(cbs))
    return weights(learn)


def two_epochs(learn, cbs):
    learn.fit(2, cbs=cbs)


class DecayByHand(Callback):
    """The oracle: multiplies before the step, for an optimizer whose own wd is 0."""

    order, run_valid = DecoupledWD.order, False

    def __init__(self, wds=WD):
        self.wds = wds

    def before_step(self):
        groups = [
            {"lr": h["lr"], "params": [p for p in ps if self.opt.state[p].get("do_wd", True)]}
            for h, ps in zip(self.opt.hypers, self.opt.param_lists)
        ]
        decay_by_hand(groups, self.wds)


class Trace(Callback):
    """What every step left: the hypers, the coefficients, the first weight of each group."""

    order, run_valid = 1000, False

    def __init__(self, decay=None):
        self.decay = decay
        self.hypers, self.coefficients, self.weights = [], [], []

    def after_step(self):
        self.hypers.append([dict(h) for h in self.opt.hypers])
        self.weights.append([ps[0].detach().flatten()[0].item() for ps in self.opt.param_lists])
        if self.decay is not None:
            self.coefficients.append(list(self.decay.coefficients))

    def lrs(self, group=0):
        return [float(h[group]["lr"]) for h in self.hypers]


class Positions:
    """A schedule that notes the progress it is asked for."""

    def __init__(self, coefficient=0.01):
        self.coefficient, self.seen = coefficient, []

    def __call__(self, position):
        self.seen.append(position)
        return self.coefficient


class When(Callback):
    """Does something at one event of some batches, counted over all epochs of a fit."""

    run_valid = False

    def __init__(self, event, action, batches=None, order=0):
        self.event, self.action, self.batches, self.order = event, action, batches, order
        self.hits = 0

    def __call__(self, event):
        if event != self.event or (event != "before_fit" and not self.learn.training):
            return
        if self.batches is None or self.learn.train_iter in self.batches:
            self.hits += 1
            self.action(self.learn)


def throw(exception):
    def action(_):
        raise exception

    return action


# P4: fastai's own optimizers

OWN = {
    "adam": partial(Adam, lr=0.05),
    "sgd": partial(SGD, lr=0.05),
    "sgd_mom": partial(SGD, lr=0.05, mom=0.9),
    "rmsprop": partial(RMSProp, lr=0.01),
    "rmsprop_mom": partial(RMSProp, lr=0.01, mom=0.9),
    "radam": partial(RAdam, lr=0.05),
    "qhadam": partial(QHAdam, lr=0.05),
    "lamb": partial(Lamb, lr=0.05),
}


@pytest.mark.parametrize("wd_bn_bias", [False, True])
@pytest.mark.parametrize("decouple_wd", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_equals_fastais_own_decoupled_optimizer(name, decouple_wd, wd_bn_bias):
    # P4, P2 (do_wd), P3 (the own wd is not used)
    opt_func, kwargs = OWN[name], {"wd_bn_bias": wd_bn_bias}
    own = fitted(partial(opt_func, wd=WD, decouple_wd=True), **kwargs)
    ours = fitted(partial(opt_func, wd=IGNORED, decouple_wd=decouple_wd), DecoupledWD(WD), **kwargs)
    assert different(own, ours) == []
    undecayed = fitted(partial(opt_func, wd=0.0), **kwargs)
    assert different(own, undecayed)  # else there was nothing to compare
    assert not any(value.isnan().any() for value in own.values())


def lookahead(params, lr, **kwargs):
    return Lookahead(Adam(params, lr, **kwargs), k=3)


@pytest.mark.filterwarnings("ignore:.*takes `wd` into its update")
@pytest.mark.parametrize("wd_bn_bias", [False, True])
@pytest.mark.parametrize(
    "opt_func",
    [
        partial(Larc, lr=0.5),
        partial(Larc, lr=0.5, mom=0.0, clip=False),
        partial(ranger, lr=0.05),
        partial(lookahead, lr=0.05),
    ],
    ids=["larc", "lars", "ranger", "lookahead"],
)
def test_equals_the_hand_written_loop(opt_func, wd_bn_bias):
    # P4, P5: Larc's trust ratio contains wd, Lookahead copies its slow weights
    by_hand = fitted(partial(opt_func, wd=0.0), DecayByHand(), wd_bn_bias=wd_bn_bias)
    for decouple_wd in (False, True):
        ours = fitted(
            partial(opt_func, wd=IGNORED, decouple_wd=decouple_wd),
            DecoupledWD(WD),
            wd_bn_bias=wd_bn_bias,
        )
        assert different(by_hand, ours) == []
    assert different(by_hand, fitted(partial(opt_func, wd=0.0), wd_bn_bias=wd_bn_bias))


def test_an_optimizer_without_wd():
    # P5, P3 (no key is added)
    def bare(params, lr):
        return Optimizer(params, [sgd_step], lr=lr)

    learn = learner(bare)
    learn.fit(2, cbs=DecoupledWD(WD))
    assert different(weights(learn), fitted(partial(SGD, wd=WD))) == []
    assert [set(h) for h in learn.opt.hypers] == [{"lr"}]
    with pytest.raises(ValueError, match="wd=None"):
        learn.fit(1, cbs=DecoupledWD())


# P4: every fit

FITS = {
    "fit": lambda learn, cbs: learn.fit(2, 0.05, cbs=cbs),
    "fit_slice": lambda learn, cbs: learn.fit(2, slice(1e-3, 0.05), cbs=cbs),
    "fit_slice_stop": lambda learn, cbs: learn.fit(2, slice(0.05), cbs=cbs),
    "one_cycle": lambda learn, cbs: learn.fit_one_cycle(2, slice(1e-3, 0.05), cbs=cbs),
    "flat_cos": lambda learn, cbs: learn.fit_flat_cos(2, slice(1e-3, 0.05), cbs=cbs),
    "sgdr": lambda learn, cbs: learn.fit_sgdr(2, 1, slice(1e-3, 0.05), cbs=cbs),
    "fine_tune": lambda learn, cbs: learn.fine_tune(2, 0.05, cbs=cbs),
    "twice": lambda learn, cbs: (learn.fit(1, cbs=cbs), learn.fit_one_cycle(1, cbs=cbs)),
    "reset_opt": lambda learn, cbs: [learn.fit(1, cbs=cbs, reset_opt=True) for _ in range(2)],
    "start_epoch": lambda learn, cbs: learn.fit_one_cycle(3, 0.05, cbs=cbs, start_epoch=1),
}


@pytest.mark.parametrize("splitter", [halves, thirds])
@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_every_fit_equals_fastais_own(fit, splitter):
    # P4, P2 (freeze)
    own, kwargs = partial(Adam, decouple_wd=True), {"fit": fit, "splitter": splitter}
    expected = fitted(partial(own, wd=WD), **kwargs)
    decay = DecoupledWD(WD, quantum=0)
    assert different(expected, fitted(L2, decay, **kwargs)) == []
    assert different(expected, fitted(L2, cbs=decay, **kwargs)) == []
    assert different(expected, fitted(partial(own, wd=0.0), **kwargs))


def test_the_wd_of_a_fit():
    # P4, argument wd: None takes what fit sets, a number does not
    def fit(wd):
        return lambda learn, cbs: learn.fit(2, wd=wd, cbs=cbs)

    own = fitted(Adam, fit=fit([0.2, WD]), splitter=halves)
    taken = fitted(L2, DecoupledWD(), fit=fit([0.2, WD]), splitter=halves)
    given = fitted(L2, DecoupledWD([0.2, WD]), fit=fit(IGNORED), splitter=halves)
    assert different(own, taken) == []
    assert different(own, given) == []
    assert different(own, fitted(Adam, fit=fit(WD), splitter=halves))


# P4, P2: torch's optimizers


def wrapped(opt, **kwargs):
    return partial(OptimWrapper, opt=partial(opt, **kwargs))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("fit", [FITS["fit_slice"], FITS["one_cycle"]], ids=["fit", "one_cycle"])
def test_wrapped_adam_equals_adamw(fit, fused):
    # P4, P5
    kwargs = {"fit": fit, "splitter": thirds, "wd_bn_bias": True}
    adamw = fitted(wrapped(torch.optim.AdamW, weight_decay=WD, fused=fused), **kwargs)
    adam = wrapped(torch.optim.Adam, weight_decay=IGNORED, fused=fused)
    assert different(adamw, fitted(adam, DecoupledWD(WD, quantum=0), **kwargs)) == []
    assert different(adamw, fitted(wrapped(torch.optim.Adam, fused=fused), **kwargs))


WRAPPED = {
    "adam": (torch.optim.Adam, {}),
    "adam_foreach": (torch.optim.Adam, {"foreach": True}),
    "adam_fused": (torch.optim.Adam, {"fused": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rprop": (torch.optim.Rprop, {}),
}


@pytest.mark.parametrize("wd_bn_bias", [False, True])
@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_optimizers_equal_the_hand_written_loop(name, wd_bn_bias):
    # P2: fastai itself forgets do_wd here; P4; P5: Rprop has no weight decay of its own
    opt, options = WRAPPED[name]
    own = {} if opt is torch.optim.Rprop else {"weight_decay": IGNORED}
    kwargs = {"fit": FITS["fit_slice"], "splitter": halves, "wd_bn_bias": wd_bn_bias}
    by_hand = fitted(wrapped(opt, **options), DecayByHand(), **kwargs)
    assert (
        different(by_hand, fitted(wrapped(opt, **own, **options), DecoupledWD(WD), **kwargs)) == []
    )
    assert different(by_hand, fitted(wrapped(opt, **options), **kwargs))


def test_a_built_optimizer():
    # P4, P3
    def learn_with(opt, **options):
        model = learner().model
        return learner(OptimWrapper(opt=opt(model.parameters(), **options)), model=model)

    ours, own = learn_with(torch.optim.Adam, weight_decay=IGNORED), learn_with(torch.optim.Adam)
    ours.fit(2, cbs=DecoupledWD(WD))
    own.fit(2, cbs=DecayByHand())
    assert different(weights(ours), weights(own)) == []
    assert ours.opt.opt.param_groups[0]["weight_decay"] == IGNORED


class EvaluatesTwice(torch.optim.SGD):
    """Evaluates its closure twice a step, as LBFGS may many times."""

    def step(self, closure):
        with torch.enable_grad():
            closure()
        super().step()
        with torch.enable_grad():
            closure()


class WithClosure(Callback):
    """Has the optimizer evaluate the batch itself, and decays by hand after the first evaluation.

    In every evaluation the group is to hold the optimizer's own wd, if it has one.
    """

    order, run_valid = 200, False

    def __init__(self, wd, own):
        self.by_hand, self.own = wd, own

    def before_step(self):
        evaluations = []

        def closure():
            [hypers] = self.opt.hypers
            assert hypers.get("wd", self.own) == self.own
            self.opt.zero_grad()
            loss = self.loss_func(self.model(*self.xb), *self.yb)
            loss.backward()
            if not evaluations:
                decay_by_hand(self.opt.opt.param_groups, self.by_hand)
            evaluations.append(loss)
            return loss

        self.opt.step(closure)
        assert len(evaluations) > 1
        raise CancelStepException


@pytest.mark.parametrize(
    ("opt", "own"),
    [(EvaluatesTwice, {"weight_decay": IGNORED}), (torch.optim.LBFGS, {})],
    ids=["sgd", "lbfgs"],
)
def test_a_closure_decays_once_after_its_first_evaluation(opt, own):
    # P1, P3, P5
    def run(*cbs, **options):
        return fitted(wrapped(opt, lr=0.05, **options), *cbs, wd_bn_bias=True)

    ours = run(DecoupledWD(WD), WithClosure(0.0, IGNORED), **own)
    assert different(ours, run(WithClosure(WD, 0.0))) == []
    assert different(ours, run(WithClosure(0.0, 0.0)))


# P1: steps that do not happen


class CpuMixedPrecision(MixedPrecision):
    """fastai's, on the CPU: its own before_fit asks for CUDA."""

    def before_fit(self):
        self.autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler("cpu", **self.kwargs)
        self.scales, self.steps = [], []

    def after_step(self):
        if not self.skipped:
            self.steps.append(self.learn.train_iter)
        super().after_step()


def overflowing():
    # Gradients that are multiplied by 2^127 overflow float32: at the first batch and every third.
    return CpuMixedPrecision(
        init_scale=2.0**127, growth_factor=2.0**8, backoff_factor=2.0**-8, growth_interval=2
    )


@pytest.mark.parametrize(
    "cbs",
    [
        lambda: [GradientAccumulation(2 * BS)],
        lambda: [GradientAccumulation(3 * BS)],
        lambda: [GradientClip(0.1)],
        lambda: [overflowing()],
        lambda: [overflowing(), GradientAccumulation(2 * BS), GradientClip(0.1)],
    ],
    ids=["accumulate_2", "accumulate_3", "clip", "overflow", "all"],
)
def test_accumulation_clipping_and_overflow_equal_fastais_own(cbs):
    # P1
    for fit in (FITS["fit"], FITS["one_cycle"]):
        own = fitted(ADAMW, *cbs(), fit=fit)
        assert different(own, fitted(L2, *cbs(), DecoupledWD(WD, quantum=0), fit=fit)) == []
        assert different(own, fitted(partial(Adam, wd=0.0), *cbs(), fit=fit))


def test_an_overflow_decays_nothing():
    # P1, P6 (the attempt counts)
    schedule, amp = Positions(), overflowing()
    learn, trace = learner(partial(Adam, wd=IGNORED)), Trace()
    learn.fit(2, cbs=[amp, DecoupledWD(schedule, scale_by="none"), trace])
    skipped = set(range(2 * BATCHES)) - set(amp.steps)
    assert skipped
    assert skipped != set(range(len(skipped)))  # also in the middle
    assert schedule.seen == [i / (2 * BATCHES) for i in amp.steps]
    for i in skipped:
        assert i == 0 or trace.weights[i] == trace.weights[i - 1]


CANCELLED = {0, 3, 9}


@pytest.mark.parametrize("order", [-100, DecoupledWD.order - 1, DecoupledWD.order + 1, 2000])
@pytest.mark.parametrize(
    ("event", "exception"),
    [
        ("after_loss", CancelBatchException),
        ("before_backward", CancelBatchException),
        ("before_step", CancelBatchException),
        ("before_step", CancelStepException),
    ],
)
def test_a_cancelled_batch_decays_nothing(event, exception, order):
    # P1
    def canceller():
        return When(event, throw(exception), CANCELLED, order)

    own = fitted(ADAMW, canceller())
    cancel = canceller()
    assert different(own, fitted(L2, cancel, DecoupledWD(WD))) == []
    assert cancel.hits == len(CANCELLED)
    assert different(own, fitted(ADAMW))


def test_a_cancelled_batch_by_weights():
    # P1: the weight itself, where decay is all that happens
    for order in (DecoupledWD.order - 1, DecoupledWD.order + 1):
        for exception in (CancelBatchException, CancelStepException):
            learn = still_learner()
            cancel = When("before_step", throw(exception), CANCELLED, order)
            learn.fit(2, cbs=[DecoupledWD(0.5, scale_by="none"), cancel])
            assert learn.model[0].weight[0, 0] == 0.5 ** (2 * BATCHES - len(CANCELLED))


# lr_find, schedulers of wd, validation in between


def test_lr_find_restores_everything(tmp_path):
    # P3, P4
    def found(opt_func, **kwargs):
        learn = learner(opt_func, path=tmp_path, **kwargs)
        learn.fit(1)
        before, hypers = weights(learn), [dict(h) for h in learn.opt.hypers]
        state = copy.deepcopy(learn.opt.state_dict()["state"])
        learn.lr_find(num_it=20, show_plot=False)
        assert different(before, weights(learn)) == []
        assert [dict(h) for h in learn.opt.hypers] == hypers
        for old, new in zip(state, learn.opt.state_dict()["state"], strict=True):
            assert old.keys() == new.keys()
            assert all(torch.equal(torch.as_tensor(old[k]), torch.as_tensor(new[k])) for k in old)
        losses = list(learn.recorder.losses)
        learn.fit(1)
        return losses, weights(learn)

    own = found(ADAMW)
    ours = found(L2, cbs=DecoupledWD(WD, quantum=0))
    assert own[0] == ours[0]
    assert different(own[1], ours[1]) == []
    scheduled = found(L2, cbs=DecoupledWD(SchedCos(WD, 0.0)))
    assert scheduled[0] != own[0]


WD_SCHEDULE = SchedLin(0.05, 0.8)


def test_a_scheduled_own_wd_is_used_with_none():
    # P4, P3 (read afresh at every step)
    def scheduler():
        return ParamScheduler({"wd": WD_SCHEDULE})

    own = fitted(ADAMW, scheduler())
    assert different(own, fitted(L2, scheduler(), DecoupledWD())) == []
    assert different(own, fitted(L2, scheduler(), cbs=DecoupledWD(None))) == []
    assert different(own, fitted(ADAMW))


def test_a_scheduled_own_wd_is_ignored_with_a_number():
    # P3, P4
    trace, scheduler = Trace(), ParamScheduler({"wd": WD_SCHEDULE})
    learn = learner(L2)
    learn.fit(2, cbs=[scheduler, DecoupledWD(WD), trace])
    assert different(fitted(ADAMW), weights(learn)) == []
    expected = [WD_SCHEDULE(i / (2 * BATCHES)) for i in range(2 * BATCHES)]
    assert [h[0]["wd"] for h in trace.hypers] == pytest.approx(expected)
    assert scheduler.hps["wd"] == pytest.approx(expected)


class Interlude(Callback):
    """Validates and predicts between the epochs of a fit."""

    order = 500

    def __init__(self, event):
        self.event, self.inside, self.count = event, False, 0

    def __call__(self, event):
        if event == self.event and not self.inside:
            self.inside = True
            self.learn.validate()
            self.learn.get_preds(ds_idx=0)
            self.inside, self.count = False, self.count + 1


@pytest.mark.parametrize("event", ["after_epoch", "after_train", "after_validate"])
@pytest.mark.parametrize("as_cbs", [False, True])
def test_validation_in_the_middle_of_a_fit(event, as_cbs):
    # P4, P6: validate fires before_fit and after_fit too
    def fit(decay, opt_func, fit):
        own, cbs = ([], [decay]) if as_cbs else ([decay], [])
        learn, interlude = learner(opt_func, cbs=own), Interlude(event)
        fit(learn, [*cbs, interlude])
        assert interlude.count >= 3
        return weights(learn)

    run = lambda learn, cbs: learn.fit_one_cycle(3, 0.05, cbs=cbs)  # noqa: E731
    expected = fitted(ADAMW, Interlude(event), fit=run)
    assert different(expected, fit(DecoupledWD(WD, quantum=0), L2, run)) == []
    schedule = Positions()
    fit(DecoupledWD(schedule), L2, run)
    assert schedule.seen == [i / (3 * BATCHES) for i in range(3 * BATCHES)]


def test_what_is_owed_outlives_a_validation():
    # P8: 32 shrinks of 4e-8 come to more than the quantum, those of one epoch do not
    learn = still_learner()
    learn.fit(4, 1e-4, cbs=[DecoupledWD(4e-4), Interlude("after_epoch")])
    assert learn.model[0].weight[0, 0].item() == pytest.approx(1 - 2.0**-20, abs=4e-8)
    assert learn.model[0].weight[0, 0] < 1


def test_validation_alone():
    # P3
    learn = learner(partial(Adam, wd=IGNORED), cbs=DecoupledWD(WD))
    learn.create_opt()
    before = weights(learn)
    learn.validate()
    learn.get_preds()
    assert different(before, weights(learn)) == []
    learn.fit(2)
    learn.validate()
    assert different(fitted(ADAMW), weights(learn)) == []
    assert learn.opt.hypers[0]["wd"] == IGNORED


# P3: nothing is to be seen outside of a step


class Watch(Callback):
    """Checks at every event what can be seen of the optimizer."""

    def __init__(self, order, opt):
        self.order, self.seen = order, Counter()
        self.wds = [h["wd"] for h in opt.hypers]
        self.keys = [set(h) for h in opt.hypers]

    def __call__(self, event):
        self.seen[event] += 1
        opt = self.learn.opt
        self.check(opt.hypers)
        self.check([{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups])
        copied = copy.deepcopy(opt)
        self.check(copied.hypers)
        self.check(pickle.loads(pickle.dumps(opt)).hypers)
        if isinstance(opt, OptimWrapper):
            groups = opt.state_dict()["param_groups"]
            assert [g["weight_decay"] for g in groups] == self.wds, event
            assert [g["weight_decay"] for g in copied.opt.param_groups] == self.wds, event
        else:
            self.check(opt.state_dict()["hypers"])

    def check(self, hypers):
        assert [h["wd"] for h in hypers] == self.wds
        assert [set(h) for h in hypers] == self.keys


EVERY_EVENT = {
    *("before_fit", "before_epoch", "before_train", "before_batch", "after_pred", "after_loss"),
    *("before_backward", "after_backward", "before_step", "after_cancel_step", "after_step"),
    *("after_cancel_batch", "after_batch", "after_train", "before_validate", "after_validate"),
    *("after_epoch", "after_fit"),
}


@pytest.mark.parametrize("order", [-1000, DecoupledWD.order - 1, DecoupledWD.order + 1, 1000])
@pytest.mark.parametrize(
    "opt_func",
    [
        L2,
        partial(ranger, wd=IGNORED, decouple_wd=False),
        wrapped(torch.optim.Adam, weight_decay=IGNORED),
    ],
    ids=["adam", "ranger", "wrapped"],
)
def test_the_own_wd_is_there_at_every_event(opt_func, order):
    # P3
    learn = learner(opt_func, batches=4, splitter=halves)
    learn.create_opt()
    watch = Watch(order, learn.opt)
    cbs = [
        watch,
        When("before_step", throw(CancelStepException), {1, 7}, 900),  # 7 is the last
        When("before_step", throw(CancelBatchException), {2}, 900),
    ]
    learn.fit(2, cbs=[DecoupledWD(WD), *cbs])
    assert watch.seen.keys() >= EVERY_EVENT
    assert watch.wds == [IGNORED] * 2
    assert "step" not in vars(learn.opt)


def test_a_copied_optimizer_steps_by_itself():
    # P3: a copy made right before the step is an optimizer as any other
    copies = []
    note = When("before_step", lambda learn: copies.append(copy.deepcopy(learn.opt)), {0}, 900)
    learn = learner(partial(SGD, wd=0.0))
    learn.fit(1, cbs=[DecoupledWD(WD), note])
    [copied] = copies
    params = [p for ps in copied.param_lists for p in ps]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    copied.step()
    assert all(map(torch.equal, before, params))


def test_a_step_by_hand_after_a_fit():
    # P3: also where the last step of the fit was cancelled at the last moment
    for exception in (CancelBatchException, CancelStepException, CancelFitException):
        learn = still_learner(cbs=DecoupledWD(0.5, scale_by="none"))
        last = When("before_step", throw(exception), {BATCHES - 1}, order=900)
        learn.fit(1, cbs=last)
        assert last.hits == 1
        learn.opt.step()
        assert learn.model[0].weight[0, 0] == 0.5 ** (BATCHES - 1)
        assert "step" not in vars(learn.opt)


def test_a_step_that_someone_else_replaced():
    # P3: nothing else about the optimizer changes
    learn = learner(L2)
    learn.create_opt()
    count, step = [], learn.opt.step

    def counted(*args, **kwargs):
        count.append(learn.opt.hypers[0]["wd"])
        return step(*args, **kwargs)

    learn.opt.step = counted
    learn.fit(2, cbs=DecoupledWD(WD))
    assert count == [0.0] * 2 * BATCHES
    assert learn.opt.step is counted
    assert different(weights(learn), fitted(ADAMW)) == []


def fail_in_forward(learn, exception):
    def hook(*_):
        if learn.train_iter == 3:
            raise exception

    handle = learn.model[3].register_forward_pre_hook(hook)
    return [], handle.remove


def fail_in_step(learn, exception):
    """In the middle of the params, so that the wd is lent at that moment."""
    seen = []

    def stepper(p, wd, **_):
        seen.append(wd)
        if len(seen) == 30:
            raise exception

    stepper.defaults = {}
    learn.opt.cbs.append(stepper)

    def mended():
        assert set(seen) == {0.0}
        learn.opt.cbs.remove(stepper)

    return [], mended


def fail_at(event, order=0):
    def fail(_, exception):
        return [When(event, throw(exception), {3}, order)], lambda: None

    return fail


FAILURES = {
    "forward": fail_in_forward,
    "step": fail_in_step,
    "before_batch": fail_at("before_batch"),
    "after_backward": fail_at("after_backward"),
    "before_our_before_step": fail_at("before_step", DecoupledWD.order - 1),
    "after_our_before_step": fail_at("before_step", DecoupledWD.order + 1),
    "before_our_after_step": fail_at("after_step", DecoupledWD.order - 1),
    "after_batch": fail_at("after_batch"),
}


@pytest.mark.filterwarnings("ignore:.*takes `wd` into its update")
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt], ids=["error", "interrupt"])
@pytest.mark.parametrize("as_cbs", [False, True])
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_fit_that_was_interrupted(failure, as_cbs, kind):
    # P3: however training ends; P6: the next fit starts afresh; P1
    schedule = Positions(WD)
    decay = DecoupledWD(schedule)
    learn = learner(L2, cbs=[] if as_cbs else decay)
    learn.create_opt()
    cbs, mend = failure(learn, kind("stop"))
    with pytest.raises(kind, match="stop"):
        learn.fit(2, cbs=[decay, *cbs] if as_cbs else cbs)
    assert learn.opt.hypers[0]["wd"] == IGNORED
    assert set(learn.opt.hypers[0]) == {"lr", "mom", "sqr_mom", "eps", "wd"}
    mend()

    def twin(opt_func=L2, **kwargs):
        """Goes on from here, having never known the callback."""
        new = learner(opt_func, model=copy.deepcopy(learn.model), **kwargs)
        new.create_opt()
        new.opt.load_state_dict(copy.deepcopy(learn.opt.state_dict()))
        new.opt.zero_grad()
        return new

    # zero_grad: gradients of the batch that was not stepped would be added to the next one's
    learn.opt.zero_grad()
    assert schedule.seen
    schedule.seen.clear()
    plain = twin()
    plain.fit(1)
    with learn.removed_cbs([] if as_cbs else decay):
        learn.fit(1)
    assert schedule.seen == []
    assert different(weights(learn), weights(plain)) == []

    own = twin(partial(Adam, decouple_wd=True))
    own.fit(2, wd=WD)
    learn.fit(2, cbs=decay if as_cbs else None)
    assert different(weights(learn), weights(own)) == []
    assert schedule.seen == [i / (2 * BATCHES) for i in range(2 * BATCHES)]
    assert "step" not in vars(learn.opt)


def test_a_fit_that_was_cancelled():
    # P3, P6
    schedule = Positions()
    learn = learner(cbs=DecoupledWD(schedule))
    for event in ("before_fit", "before_batch", "after_batch"):
        cancel = When(event, throw(CancelFitException), None if event == "before_fit" else {3}, -50)
        learn.fit(1, cbs=cancel)
        assert cancel.hits == 1
        schedule.seen.clear()
        learn.fit(1)
        assert schedule.seen == [i / BATCHES for i in range(BATCHES)]


# P6: progress


def positions(fit):
    """The progress of every step of ``fit(learn, cbs)``."""
    schedule = Positions()
    fit(learner(), [DecoupledWD(schedule)])
    return schedule.seen


def with_cbs(*others):
    return lambda learn, cbs: learn.fit(2, cbs=[*cbs, *others])


PROGRESS = {
    # fit, and the batches done at the previous step, of 16
    "fit": (FITS["fit"], range(16)),
    "one_cycle": (FITS["one_cycle"], range(16)),
    "accumulate_2": (with_cbs(GradientAccumulation(2 * BS)), range(0, 16, 2)),
    "accumulate_4": (with_cbs(GradientAccumulation(4 * BS)), range(0, 16, 4)),
    "cancelled_step": (
        with_cbs(When("before_step", throw(CancelStepException), {3, 4})),
        [0, 1, 2, 5, *range(6, 16)],
    ),
    "cancelled_batch": (
        with_cbs(When("after_loss", throw(CancelBatchException), {3, 4})),
        [0, 1, 2, 3, *range(6, 16)],
    ),
    "start_epoch": (lambda learn, cbs: learn.fit(2, cbs=cbs, start_epoch=1), range(8, 16)),
    "start_epoch_one_cycle": (
        lambda learn, cbs: learn.fit_one_cycle(2, cbs=cbs, start_epoch=1),
        range(8, 16),
    ),
    "two_fits": (
        lambda learn, cbs: (learn.fit(2, cbs=cbs), learn.fit_one_cycle(2, cbs=cbs)),
        [*range(16), *range(16)],
    ),
}


@pytest.mark.parametrize(("fit", "done"), PROGRESS.values(), ids=PROGRESS)
def test_progress(fit, done):
    # P6
    assert positions(fit) == [i / 16 for i in done]


def test_progress_when_accumulation_does_not_divide_the_epoch():
    # P6: steps after batch 3, 6, 9, 12 and 15 of 16
    seen = positions(with_cbs(GradientAccumulation(3 * BS)))
    assert seen == [i / 16 for i in (0, 3, 6, 9, 12)]


@pytest.mark.parametrize(
    "schedule",
    [SchedCos(0.04, 0.4), combined_cos(0.3, 0.1, 0.5, 0.02), SchedPoly(0.5, 0.1, 2)],
    ids=["cos", "combined_cos", "poly"],
)
@pytest.mark.parametrize("as_cbs", [False, True])
def test_fastais_schedules_in_closed_form(schedule, as_cbs):
    # P6, P13 (coefficients)
    decay = DecoupledWD(schedule, quantum=0)
    trace = Trace(decay)
    learn = still_learner(cbs=None if as_cbs else decay)
    learn.fit(2, 0.1, cbs=[decay, trace] if as_cbs else trace)
    n = 2 * BATCHES
    assert trace.coefficients == [[schedule(i / n)] for i in range(n)]
    expected = math.prod(1 - 0.1 * schedule(i / n) for i in range(n))
    assert trace.weights[-1][0] == pytest.approx(expected, rel=1e-12)


def test_a_cosine_by_its_formula():
    # P6, closed form without fastai's code
    learn, n = still_learner(), 2 * BATCHES
    learn.fit(2, 0.1, cbs=DecoupledWD(SchedCos(0.04, 0.4), quantum=0))
    coefficients = [0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * i / n)) / 2 for i in range(n)]
    expected = math.prod(1 - 0.1 * c for c in coefficients)
    assert learn.model[0].weight[0, 0].item() == pytest.approx(expected, rel=1e-12)


# scale_by and max_lr

LRS = (0.1, 0.4)  # of two groups: what slice(0.1, 0.4) makes of them

SCALES = {
    "lr": lambda lr, peak: lr,
    "lr_ratio": lambda lr, peak: lr / peak,
    "lr_squared": lambda lr, peak: lr**2 / peak,
    "none": lambda lr, peak: 1,
}

SCALED_FITS = {
    "fit": lambda learn, cbs: learn.fit(2, slice(*LRS), cbs=cbs),
    "one_cycle": lambda learn, cbs: learn.fit_one_cycle(2, slice(*LRS), cbs=cbs),
    "flat_cos": lambda learn, cbs: learn.fit_flat_cos(2, slice(*LRS), cbs=cbs),
    "sgdr": lambda learn, cbs: learn.fit_sgdr(2, 1, slice(*LRS), cbs=cbs),
    "scheduler": lambda learn, cbs: learn.fit(
        2, 7.0, cbs=[ParamScheduler({"lr": SchedCos(np.array(LRS), np.array(LRS) / 50)}), *cbs]
    ),
}


def decayed(fit, *args, **kwargs):
    """The trace of the two weights of a Learner that only decays."""
    decay = DecoupledWD(*args, quantum=0, **kwargs)
    learn, trace = still_learner(groups=2), Trace(decay)
    fit(learn, [decay, trace])
    return trace


def cumulative(trace, group, shrink):
    """The closed form of the weight after every step, from the recorded learning rates."""
    return np.cumprod([1 - shrink(lr) for lr in trace.lrs(group)]).tolist()


@pytest.mark.parametrize("scale_by", SCALES)
@pytest.mark.parametrize("fit", SCALED_FITS.values(), ids=SCALED_FITS)
def test_scales(fit, scale_by):
    # P4 in closed form, arguments scale_by and max_lr: the peak of the schedule, per group
    trace = decayed(fit, 0.3, scale_by=scale_by)
    for group, peak in enumerate(LRS):
        expected = cumulative(trace, group, lambda lr: SCALES[scale_by](lr, peak) * 0.3)  # noqa: B023
        assert [w[group] for w in trace.weights] == pytest.approx(expected, rel=1e-12)


def test_the_ratio_is_one_at_the_peak():
    # argument max_lr: step 4 of 16 is at the peak, which is neither learn.lr nor a 25th of it
    trace = decayed(SCALED_FITS["one_cycle"], 0.5, scale_by="lr_ratio")
    assert trace.lrs(1)[4] == 0.4
    for group in range(2):
        assert trace.weights[4][group] / trace.weights[3][group] == pytest.approx(0.5)
        assert trace.weights[0][group] == pytest.approx(1 - 0.5 / 25)


def test_given_max_lr_wins():
    # argument max_lr
    for max_lr, peaks in ((0.8, (0.8, 0.8)), ([0.5, 0.9], (0.5, 0.9))):
        trace = decayed(SCALED_FITS["one_cycle"], 0.3, scale_by="lr_ratio", max_lr=max_lr)
        for group, peak in enumerate(peaks):
            expected = cumulative(trace, group, lambda lr: lr / peak * 0.3)  # noqa: B023
            assert [w[group] for w in trace.weights] == pytest.approx(expected, rel=1e-12)


def test_a_ratio_above_one_warns_once():
    # argument max_lr
    with pytest.warns(UserWarning, match="exceeds 1") as caught:
        still_learner().fit(2, 0.1, cbs=DecoupledWD(0.1, scale_by="lr_ratio", max_lr=0.05))
    assert len(caught) == 1


def test_scale_by_callable_and_sequence():
    # argument scale_by
    trace = decayed(
        SCALED_FITS["one_cycle"], 0.3, scale_by=[lambda g: 2 * g["lr"] * g["mom"], "none"]
    )
    moms = [float(h[0]["mom"]) for h in trace.hypers]
    expected = np.cumprod([1 - 0.6 * lr * mom for lr, mom in zip(trace.lrs(), moms)]).tolist()
    assert [w[0] for w in trace.weights] == pytest.approx(expected, rel=1e-12)
    assert [w[1] for w in trace.weights] == pytest.approx(np.cumprod([0.7] * 16).tolist())


def test_scale_by_sees_the_whole_group():
    # argument scale_by: a callable gets the hypers and the params
    seen = []
    fit = SCALED_FITS["fit"]
    decayed(fit, 0.3, scale_by=lambda g: seen.append((sorted(g), len(g["params"]))) or 0.1)
    assert set(map(str, seen)) == {str((["lr", "mom", "params", "wd"], 1))}


@pytest.mark.parametrize("pct_start", [0.25, 0.3, 1 / 3, 0.35, 2 / 3, 1 / 7, 0.99])
def test_the_peak_is_the_maximum_of_the_schedule(pct_start):
    # argument max_lr: wherever it lies, and so no warning says that a ratio exceeds 1
    learn, trace = still_learner(), Trace()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn.fit_one_cycle(
            21,
            0.4,
            pct_start=pct_start,
            cbs=[DecoupledWD(0.01, scale_by="lr_ratio", quantum=0), trace],
        )
    expected = cumulative(trace, 0, lambda lr: lr / 0.4 * 0.01)
    assert [w[0] for w in trace.weights] == pytest.approx(expected, rel=1e-12)


def test_the_peak_is_taken_afresh_by_every_fit():
    # argument max_lr: the maximum of the run
    decay = DecoupledWD(0.5, scale_by="lr_ratio", quantum=0)
    learn = still_learner(cbs=decay)
    for lr in (0.1, 0.4, 0.02):
        before = learn.model[0].weight[0, 0].item()
        learn.fit(1, lr)
        assert learn.model[0].weight[0, 0].item() == pytest.approx(before * 0.5**BATCHES)


def test_wrapped_optimizers_have_the_schedules_peak():
    # P5, argument max_lr
    trace = Trace()
    learn = still_learner(groups=2, opt_func=wrapped(torch.optim.SGD))
    decay = DecoupledWD(0.3, scale_by="lr_squared", quantum=0)
    learn.fit_one_cycle(2, slice(*LRS), moms=(0, 0, 0), cbs=[decay, trace])
    for group, peak in enumerate(LRS):
        expected = cumulative(trace, group, lambda lr: lr**2 / peak * 0.3)  # noqa: B023
        assert [w[group] for w in trace.weights] == pytest.approx(expected, rel=1e-12)


def test_small_shrinks_are_saved_up():
    # P8 through the adapter: the due is 1e-8 a step, each fit starts with nothing owed
    learn = still_learner(cbs=DecoupledWD(1e-4, scale_by="lr"))
    learn.fit(20, 1e-4)  # 160 steps
    due, quantum = 160 * 1e-8, 2.0**-20
    assert due - quantum < 1 - learn.model[0].weight[0, 0].item() <= due * (1 + 1e-6)
    applied = learn.model[0].weight[0, 0].item()
    learn.fit(10, 1e-4)  # 80 steps owe less than the quantum
    assert learn.model[0].weight[0, 0].item() == applied
    assert applied < 1


# wd per group


def test_wd_per_group():
    # P4
    wds = [0.0, 0.2, 0.6]
    own = learner(partial(Adam, decouple_wd=True), splitter=thirds)
    own.fit(2, wd=wds)
    assert different(weights(own), fitted(L2, DecoupledWD(wds), splitter=thirds)) == []
    schedules = [SchedCos(0.0, 0.0), 0.2, lambda _: 0.6]
    assert different(weights(own), fitted(L2, DecoupledWD(schedules), splitter=thirds)) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"wd": [0.1, 0.2]},
        {"wd": [0.1] * 4},
        {"wd": 0.1, "scale_by": ["lr", "none"]},
        {"wd": 0.1, "max_lr": [0.1], "scale_by": "lr_ratio"},
    ],
    ids=str,
)
def test_wrong_lengths_are_refused_before_a_weight_changes(arguments):
    # P10
    learn = learner(splitter=thirds)
    before = weights(learn)
    with pytest.raises(ValueError, match="3 param groups"):
        learn.fit(1, cbs=DecoupledWD(**arguments))
    assert different(before, weights(learn)) == []
    learn.fit(2)
    assert different(weights(learn), fitted(SGD, splitter=thirds)) == []


@pytest.mark.parametrize(
    ("wd", "scale_by", "message"),
    [
        (lambda _: -1.0, "lr", "progress 0"),
        (lambda _: math.nan, "lr", "progress 0"),
        ([0.1, 1.0], "none", "group 1"),
        ([0.1, 30.0], "lr", "group 1.*lr 0.05.*wd 30"),
    ],
)
def test_nonsense_is_refused_before_a_weight_changes(wd, scale_by, message):
    # P10, P3
    learn = learner(partial(SGD, wd=IGNORED), splitter=halves)
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=message):
        learn.fit(1, cbs=DecoupledWD(wd, scale_by=scale_by))
    assert all(map(torch.equal, before, learn.model.parameters()))
    assert [h["wd"] for h in learn.opt.hypers] == [IGNORED] * 2


SPARED = {
    # how the first group's wd becomes 0
    "fit": lambda learn, cbs: learn.fit(2, 0.1, wd=[0.0, 0.2], cbs=cbs),
    "before_fit": lambda learn, cbs: learn.fit(2, 0.1, cbs=[spare_first("before_fit"), *cbs]),
    "before_train": lambda learn, cbs: learn.fit(2, 0.1, cbs=[spare_first("before_train"), *cbs]),
}


def spare_first(event):
    return When(event, lambda learn: learn.opt.set_hyper("wd", [0.0, 0.2]))


@pytest.mark.parametrize("opt_func", [partial(SGD, decouple_wd=False), wrapped(torch.optim.SGD)])
@pytest.mark.parametrize("fit", SPARED.values(), ids=SPARED)
def test_a_no_decay_group_stays_one(fit, opt_func):
    # argument wd: a group whose own wd is 0 while another's is not
    for wd in (0.5, lambda _: 0.5):
        learn = still_learner(groups=2, opt_func=opt_func)
        with pytest.warns(UserWarning, match="no-decay group") as caught:
            fit(learn, [DecoupledWD(wd)])
        assert len(caught) == 1
        assert "param group 0" in str(caught[0].message)
        assert learn.model[0].weight[0, 0] == 1
        assert learn.model[1].weight[0, 0].item() == pytest.approx(0.95**16)
        assert [h["wd"] for h in learn.opt.hypers] == [0.0, 0.2]
    learn = still_learner(groups=2, opt_func=opt_func)
    fit(learn, [DecoupledWD([0.5, 0.5])])  # silent: warnings of the package are errors here
    assert learn.model[0].weight[0, 0].item() == pytest.approx(0.95**16)
    learn = still_learner(groups=2, opt_func=opt_func)
    fit(learn, [DecoupledWD()])
    assert learn.model[0].weight[0, 0] == 1
    assert learn.model[1].weight[0, 0].item() == pytest.approx(0.98**16)


def test_groups_that_all_have_a_wd_of_zero_decay():
    # argument wd: taken for an optimizer without weight decay
    learn = still_learner(groups=2)
    learn.fit(2, 0.1, wd=0.0, cbs=DecoupledWD(0.5))
    for layer in learn.model:
        assert layer.weight[0, 0].item() == pytest.approx(0.95**16)


# P2: tied and frozen parameters


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight
        nn.init.ones_(self.a.weight)

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize(
    "splitter",
    [
        lambda m: list(m.parameters()),
        lambda m: [m.a.weight, m.b.weight],
        lambda m: [[m.a.weight], [m.b.weight]],
    ],
    ids=["parameters", "one_group", "two_groups"],
)
def test_tied_parameters_decay_once(splitter):
    # P2
    for wd_bn_bias in (False, True):
        learn = learner(
            partial(SGD, decouple_wd=False),
            model=Tied(),
            splitter=splitter,
            loss_func=nothing,
            wd_bn_bias=wd_bn_bias,
        )
        learn.fit(2, 0.5, cbs=DecoupledWD(1.0))
        assert learn.model.a.weight[0, 0].item() == 0.5**16


def test_frozen_layers_stay_untouched():
    # P2: what has no gradient; fastai trains frozen norm layers all the same
    kwargs = {"splitter": halves, "wd_bn_bias": True}

    def frozen(opt_func, *cbs, train_bn=True):
        learn = learner(opt_func, train_bn=train_bn, **kwargs)
        before = weights(learn)
        learn.freeze()
        learn.fit(2, cbs=list(cbs))
        return before, weights(learn), learn

    for train_bn in (True, False):
        before, after, learn = frozen(L2, DecoupledWD(WD), train_bn=train_bn)
        _, own, _ = frozen(ADAMW, train_bn=train_bn)
        assert different(own, after) == []
        names = {"0.weight", "0.bias"} | (set() if train_bn else {"1.weight", "1.bias"})
        trained = {name for name, _ in learn.model.named_parameters()} - names
        assert set(different(before, after)) & (names | trained) == trained


def test_freezing_and_unfreezing_between_fits():
    # P2, P4: also where zeros are left in the gradients of what was trained once
    def fit(learn, cbs):
        learn.fit(1, cbs=cbs)
        learn.freeze()
        learn.fit(1, cbs=cbs)
        learn.unfreeze()
        learn.fit(1, cbs=cbs)

    own = fitted(ADAMW, fit=fit, splitter=halves)
    assert different(own, fitted(L2, DecoupledWD(WD), fit=fit, splitter=halves)) == []


def test_a_gradient_that_comes_and_goes():
    # P2
    def halve(learn):
        rest = learn.train_iter % 3
        for p in list(learn.model.parameters())[rest::3]:
            p.grad = None

    drop = partial(When, "after_backward", halve)
    own = fitted(ADAMW, drop())
    assert different(own, fitted(L2, drop(), DecoupledWD(WD))) == []


# P10: two decays


def test_two_decays_are_refused():
    # P10
    for own, of_fit in ((0, 2), (2, 0), (1, 1)):
        learn = learner(cbs=[DecoupledWD(WD) for _ in range(own)])
        cbs = [DecoupledWD(WD) for _ in range(of_fit)]
        before = weights(learn)
        with pytest.raises(ValueError, match="two DecoupledWD"):
            learn.fit(1, cbs=cbs)
        assert different(before, weights(learn)) == []


def test_a_decay_of_the_inner_optimizer_is_refused():
    # P10
    learn = learner(wrapped(torch.optim.Adam))
    learn.create_opt()
    inner = TorchDecoupledWD(learn.opt.opt, WD)
    before = weights(learn)
    with pytest.raises(ValueError, match="attached already"):
        learn.fit(1, cbs=DecoupledWD(WD))
    assert different(before, weights(learn)) == []
    inner.detach()
    learn.fit(2, cbs=DecoupledWD(WD))
    expected = fitted(wrapped(torch.optim.Adam), DecayByHand())
    assert different(weights(learn), expected) == []


def test_the_plain_decay_serves_an_optim_wrapper():
    # P5: what one may do instead
    learn = learner(wrapped(torch.optim.Adam, weight_decay=IGNORED))
    learn.create_opt()
    with TorchDecoupledWD(learn.opt.opt, WD):
        learn.fit(2)
    adamw = fitted(wrapped(torch.optim.AdamW, weight_decay=WD))
    assert different(weights(learn), adamw) == []


@pytest.mark.parametrize("wd", [-0.1, math.nan, math.inf, "0.1", True, {}, {1: 0.1}, []])
def test_arguments_are_checked_when_built(wd):
    # P10
    with pytest.raises((TypeError, ValueError), match="wd"):
        DecoupledWD(wd)


# P9: copies, exports, resuming


def reloaded(callback):
    return pickle.loads(pickle.dumps(callback))


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, reloaded])
def test_copies_of_the_callback_train_the_same(make):
    # P9
    fit = FITS["one_cycle"]
    arguments = {"wd": SchedCos(0.05, 0.5), "scale_by": "lr_ratio", "quantum": 0}
    expected = fitted(L2, DecoupledWD(**arguments), fit=fit)
    assert different(expected, fitted(L2, make(DecoupledWD(**arguments)), fit=fit)) == []
    used = DecoupledWD(**arguments)
    fitted(L2, used, fit=fit)
    assert different(expected, fitted(L2, make(used), fit=fit)) == []
    assert different(expected, fitted(L2, DecoupledWD(0.05), fit=fit))

    interrupted = DecoupledWD(**arguments)
    with pytest.raises(KeyboardInterrupt):
        fitted(L2, interrupted, When("after_batch", throw(KeyboardInterrupt()), {3}))
    assert interrupted.coefficients
    copied = make(interrupted)
    assert copied.coefficients == []  # the fit stays behind
    assert different(expected, fitted(L2, copied, fit=fit)) == []


def test_a_copied_learner_trains_the_same():
    # P9
    learn = learner(L2, cbs=DecoupledWD(WD))
    twin = copy.deepcopy(learn)
    for one in (learn, twin):
        one.fit(2)
        assert different(weights(one), fitted(ADAMW)) == []
        assert one.decoupled_wd.learn is one


def test_export_and_load(tmp_path):
    # P9, P3
    learn = learner(L2, cbs=DecoupledWD(SchedCos(0.05, 0.5)), path=tmp_path)
    learn.fit(2)
    trained = weights(learn)
    assert learn.opt.hypers[0]["wd"] == IGNORED
    learn.export()
    assert learn.opt.hypers[0]["wd"] == IGNORED
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pickle")
        loaded = load_learner(tmp_path / "export.pkl")
    assert loaded.opt is None
    assert different(trained, weights(loaded)) == []
    for one in (learn, loaded):
        preds, _ = one.get_preds(dl=learn.dls.valid)
        assert preds.shape == (2 * BS, 1)
        one.validate(dl=learn.dls.valid)
        assert different(trained, weights(one)) == []

    # It goes on to decay, as its own callback and after a fresh start of the optimizer
    fresh = learner(L2, model=copy.deepcopy(loaded.model))
    fresh.fit(1, cbs=DecoupledWD(SchedCos(0.05, 0.5)))
    loaded.dls = learn.dls
    loaded.fit(1)
    assert different(weights(fresh), weights(loaded)) == []


def test_a_run_that_is_resumed_with_start_epoch(tmp_path):
    # P9, P6: the schedule's position is that of the epoch

    def decay():
        return DecoupledWD(SchedCos(0.05, 0.5))

    whole = learner(L2)
    whole.fit(3, cbs=decay())
    stopped = learner(L2, path=tmp_path)
    stop = When("before_batch", throw(CancelFitException), {BATCHES})
    stopped.fit(3, cbs=[decay(), stop])
    stopped.save("half")
    assert different(weights(whole), weights(stopped))

    resumed = learner(L2, path=tmp_path)
    resumed.load("half")
    resumed.fit(3, cbs=decay(), start_epoch=1)
    assert different(weights(whole), weights(resumed)) == []

    forgot = learner(L2, path=tmp_path)  # where it started
    forgot.load("half")
    forgot.fit(2, cbs=decay())
    assert different(weights(whole), weights(forgot))
