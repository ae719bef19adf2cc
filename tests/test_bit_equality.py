"""With the decay, Adam is AdamW to the bit, and every optimizer its hand-written loop (P4)."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from fastai import optimizer as fastai_optim
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import SGD, Adam, Optimizer, sgd_step
from fastai_helpers import ADAMW as FASTAI_ADAMW
from fastai_helpers import (
    BS,
    FITS,
    L2,
    CpuMixedPrecision,
    DecayByHand,
    different,
    fitted,
    halves,
    learner,
    state,
    thirds,
    wrapped,
)
from helpers import (
    ADAM,
    ADAMW,
    INNER_WD,
    Climber,
    batch_of,
    every_optimizer,
    network,
    same,
    zero_gradients,
)
from lightning_helpers import (
    LR,
    WD,
    Endless,
    adam,
    adamw,
    each_package,
    each_way,
    fit,
    half_precision,
    one_cycle,
)
from reference.loops import decays_by_hand
from torch import nn
from torch.nn.functional import mse_loss

from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.lightning import DecoupledWD as LightningWD
from wd_callbacks.torch import DecoupledWD

# A plain loop


def attach(quantum=None, wd=WD):
    return lambda optimizer: DecoupledWD(optimizer, wd, quantum=quantum)


@every_optimizer
@pytest.mark.filterwarnings("ignore:ASGD ", "ignore:.*sparse gradient")
def test_every_torch_optimizer_equals_the_hand_written_loop(case):  # P1, P3, P4, P5
    for closure, quantum in ((False, None), (True, 0)):
        expected, _ = case.train(0.0, by_hand=WD, closure=closure)
        ours, optimizer = case.train(decay=attach(quantum), closure=closure)
        assert torch.equal(ours, expected)
        assert set(optimizer.param_groups[0]) == {"params", *optimizer.defaults}  # no new key


OPTIONS = [
    {"foreach": False},
    {"foreach": True},
    {"fused": True},
    {"lr": torch.tensor(0.05)},
    {"lr": torch.tensor(0.0123), "fused": True},  # torch computes in double precision
    {"lr": torch.tensor(1e-3), "fused": True, "dtype": torch.float64},
    {"foreach": False, "dtype": torch.float64},
    {"foreach": False, "eps": 1e-3, "dtype": torch.bfloat16},
    {"foreach": False, "eps": 1e-3, "dtype": torch.float16},  # it has no 1e-8
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_adam_is_adamw(options):  # P4
    wd = 5 * WD if "dtype" in options else WD
    expected, _ = ADAMW.train(wd, **options)
    for quantum in (None, 0):
        ours, _ = ADAM.train(decay=attach(quantum, wd), **options)
        assert torch.equal(ours, expected)
    assert not torch.equal(expected, ADAMW.train(0.0, **options)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 12])  # of that many, each has a factor in one call
def test_adam_is_adamw_in_many_groups(count, dtype):  # P4
    def train(cls, own, decays=False):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(1 + i % 2, 4).to(dtype)) for i in range(count)]
        groups = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(weights)]
        optimizer = cls(groups, weight_decay=own, eps=1e-3, foreach=False)
        if decays:
            DecoupledWD(optimizer, 5 * WD, quantum=0)
        for _ in range(4):
            for p in weights:
                p.grad = torch.randn(p.shape).to(dtype)
            optimizer.step()
        return torch.cat(weights)

    expected = train(torch.optim.AdamW, 5 * WD)
    assert torch.equal(train(torch.optim.Adam, 0.0, decays=True), expected)
    assert not torch.equal(train(torch.optim.Adam, 0.0), expected)


DEFAULTS = [(torch.bfloat16, "cpu"), (torch.float16, "cpu"), (torch.float32, "meta")]


@pytest.mark.parametrize(("default", "device"), DEFAULTS, ids=str)
def test_the_default_dtype_and_device_do_not_matter(default, device):  # P4
    dtypes = torch.float32, torch.float16, torch.bfloat16
    params = [nn.Parameter(torch.linspace(1, 2, 50).to(dtype)) for dtype in dtypes]
    expected = [p.detach().clone().mul_(1 - 0.1 * 0.3) for p in params]
    zero_gradients(params)
    optimizer = torch.optim.SGD(params, lr=0.1, foreach=False)
    DecoupledWD(optimizer, 0.3, quantum=0)
    torch.set_default_dtype(default)
    try:
        with torch.device(device):
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, params, expected))


# fastai


OWN = {  # arguments beside wd
    "Adam": {"lr": 0.05},
    "SGD": {"lr": 0.05, "mom": 0.9},
    "RMSProp": {"lr": 0.01},
    "RAdam": {"lr": 0.05},
    "QHAdam": {"lr": 0.05},
    "Lamb": {"lr": 0.05},
}
# Larc's trust ratio contains wd, ranger's Lookahead copies its slow weights.
BY_HAND = {"Larc": {"lr": 0.5}, "ranger": {"lr": 0.05}}


@pytest.mark.filterwarnings("ignore:.*`wd`", "ignore:.*uses `wd` in its update")
@pytest.mark.parametrize("name", [*OWN, *BY_HAND])
def test_fastais_optimizers_equal_their_own_decoupled_ones(name):
    # P4, P5, P2 (do_wd), P3 (the own wd is not used)
    opt_func = partial(getattr(fastai_optim, name), **(OWN | BY_HAND)[name])
    for flag in (False, True):
        kwargs = {"wd_bn_bias": flag}
        if name in OWN:
            expected = fitted(partial(opt_func, wd=WD, decouple_wd=True), **kwargs)
        else:
            expected = fitted(partial(opt_func, wd=0.0), DecayByHand(), **kwargs)
        ours = fitted(partial(opt_func, wd=INNER_WD, decouple_wd=flag), FastaiWD(WD), **kwargs)
        assert different(expected, ours) == []
    assert different(expected, fitted(partial(opt_func, wd=0.0), wd_bn_bias=True))
    assert not any(value.isnan().any() for value in expected.values())


def test_a_fastai_optimizer_without_wd():
    # P5, P3 (no key is added)
    def bare(params, lr):
        return Optimizer(params, [sgd_step], lr=lr)

    learn = learner(bare)
    learn.fit(2, cbs=FastaiWD(WD))
    assert different(state(learn), fitted(partial(SGD, wd=WD))) == []
    assert [set(h) for h in learn.opt.hypers] == [{"lr"}]
    with pytest.raises(ValueError, match="wd=None"):
        learn.fit(1, cbs=FastaiWD())


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_every_fit_equals_fastais_own(fit):  # P4, P2 (freeze)
    decay = FastaiWD(WD, quantum=0)
    for splitter, own, of_fit in ((halves, [], [decay]), (thirds, [decay], [])):
        kwargs = {"fit": fit, "splitter": splitter}
        expected = fitted(partial(Adam, decouple_wd=True, wd=WD), **kwargs)
        assert different(expected, fitted(L2, *of_fit, cbs=own, **kwargs)) == []
    assert different(expected, fitted(partial(Adam, wd=0.0), **kwargs))


def test_the_wd_of_a_fit():
    # P4, argument wd: None takes the fit's, a number or a sequence does not
    def fit(wd):
        return lambda learn, cbs: learn.fit(2, wd=wd, cbs=cbs)

    for wds in ([0.2, WD], [0.0, 0.6]):
        own = fitted(Adam, fit=fit(wds), splitter=halves)
        schedules = [lambda _, wd=wd: wd for wd in wds]
        for ours in (
            fitted(L2, FastaiWD(), fit=fit(wds), splitter=halves),
            fitted(L2, FastaiWD(wds), fit=fit(INNER_WD), splitter=halves),
            fitted(L2, FastaiWD(schedules), fit=fit(INNER_WD), splitter=halves),
        ):
            assert different(own, ours) == []
        assert different(own, fitted(Adam, fit=fit(WD), splitter=halves))


def test_a_scheduled_own_wd():
    # P3, P4: None reads it at every step, a number does not
    schedule = SchedLin(0.05, 0.8)
    own = fitted(FASTAI_ADAMW, ParamScheduler({"wd": schedule}))
    assert different(own, fitted(L2, ParamScheduler({"wd": schedule}), FastaiWD())) == []
    assert different(own, fitted(FASTAI_ADAMW))
    used = ParamScheduler({"wd": schedule})
    assert different(fitted(FASTAI_ADAMW), fitted(L2, used, FastaiWD(WD))) == []
    assert used.hps["wd"] == pytest.approx([schedule(i / 16) for i in range(16)])


WRAPPED = {
    "adam": partial(torch.optim.Adam, weight_decay=INNER_WD),
    "adam, fused": partial(torch.optim.Adam, weight_decay=INNER_WD, fused=True),
    "sgd": partial(torch.optim.SGD, weight_decay=INNER_WD, momentum=0.9),
    "rprop": torch.optim.Rprop,  # it has no weight decay of its own
}


@pytest.mark.parametrize("opt", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("wd_bn_bias", [False, True])
def test_wrapped_optimizers_equal_the_hand_written_loop(opt, wd_bn_bias):
    # P2: fastai itself forgets do_wd here; P4; P5
    own = {"weight_decay": 0} if opt is not torch.optim.Rprop else {}
    kwargs = {"fit": FITS["fit_slice"], "splitter": halves, "wd_bn_bias": wd_bn_bias}
    by_hand = fitted(wrapped(opt, **own), DecayByHand(), **kwargs)
    assert different(by_hand, fitted(wrapped(opt), FastaiWD(WD), **kwargs)) == []
    assert different(by_hand, fitted(wrapped(opt, **own), **kwargs))


def test_the_plain_decay_serves_an_optim_wrapper():  # P5
    learn = learner(wrapped(torch.optim.Adam, weight_decay=INNER_WD))
    learn.create_opt()
    with DecoupledWD(learn.opt.opt, WD):
        learn.fit(2)
    assert different(state(learn), fitted(wrapped(torch.optim.AdamW, weight_decay=WD))) == []


class WithClosure(Callback):
    """Has the optimizer evaluate the batch itself."""

    order, run_valid = 200, False

    def before_step(self):
        @torch.enable_grad()
        def closure():
            self.opt.zero_grad()
            loss = self.loss_func(self.model(*self.xb), *self.yb)
            loss.backward()
            return loss

        self.opt.step(closure)
        raise CancelStepException


CLOSING = {
    "climber": (Climber, {"weight_decay": INNER_WD}),
    "lbfgs": (partial(torch.optim.LBFGS, max_iter=4), {}),
}


@pytest.mark.filterwarnings("ignore:Climber's own weight decay")
@pytest.mark.parametrize(("opt", "own"), CLOSING.values(), ids=CLOSING)
def test_a_closure_of_a_wrapped_optimizer_decays_once(opt, own):  # P1, P5
    def run(*cbs, by_hand=0.0, **options):
        learn = learner(wrapped(opt, **options), wd_bn_bias=True)
        learn.create_opt()
        decays_by_hand(learn.opt.opt, by_hand)
        learn.fit(2, cbs=[WithClosure(), *cbs])
        return state(learn)

    ours = run(FastaiWD(WD), **own)
    assert different(ours, run(by_hand=WD)) == []
    assert different(ours, run())


ACCUMULATING = {
    "accumulate": lambda: [GradientAccumulation(3 * BS)],
    "clip": lambda: [GradientClip(0.1)],
    "overflow": lambda: [CpuMixedPrecision()],
    "all": lambda: [CpuMixedPrecision(), GradientAccumulation(2 * BS), GradientClip(0.1)],
}


@pytest.mark.parametrize("cbs", ACCUMULATING.values(), ids=ACCUMULATING)
def test_accumulation_clipping_and_overflow_equal_fastais_own(cbs):  # P1
    own = fitted(FASTAI_ADAMW, *cbs(), fit=FITS["one_cycle"])
    ours = fitted(L2, *cbs(), FastaiWD(WD, quantum=0), fit=FITS["one_cycle"])
    assert different(own, ours) == []


def test_lr_find_leaves_weights_and_state_as_adamw_does(tmp_path):  # P3, P4
    def found(opt_func, **kwargs):
        learn = learner(opt_func, path=tmp_path, **kwargs)
        learn.fit(1)
        before, hypers = state(learn), [dict(h) for h in learn.opt.hypers]
        learn.lr_find(num_it=20, show_plot=False)
        assert different(before, state(learn)) == []
        assert [dict(h) for h in learn.opt.hypers] == hypers
        losses = list(learn.recorder.losses)
        learn.fit(1)  # equal only if the optimizer's state came back as well
        return losses, state(learn)

    own = found(FASTAI_ADAMW)
    ours = found(L2, cbs=FastaiWD(WD, quantum=0))
    assert own[0] == ours[0]
    assert different(own[1], ours[1]) == []
    assert found(L2, cbs=FastaiWD(SchedCos(WD, 0.0)))[0] != own[0]


# Lightning

MANUAL = {"manual": True}
LIGHTNING = {  # arguments of the optimizer, and of the Trainer and the model
    "fused": ({"fused": True}, {"model": MANUAL}),
    "fused, skipped batches": ({"fused": True}, {"model": {"skipped": (0, 3)}}),
    "tensor lr": ({"lr": torch.tensor(LR), "foreach": False}, {}),
    "steps=3": ({}, {"model": {**MANUAL, "steps": 3}}),
    "every=2": ({}, {"model": {**MANUAL, "every": 2}}),
    "by closure": ({}, {"model": {**MANUAL, "by": "closure"}}),
    "by the raw optimizer": ({}, {"model": {**MANUAL, "by": "raw"}}),
    "accumulation": ({}, {"batches": 10, "accumulate_grad_batches": 4}),  # a shorter last window
    "skipped": ({}, {"model": {"skipped": (0, 2, 5)}, "accumulate_grad_batches": 2}),
    "clipped norm": ({}, {"gradient_clip_val": 0.05}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
    # As a loop: torch's multi-tensor call would round ``1 - lr * wd`` to bf16 on the CPU.
    "bf16-true": ({"foreach": False}, {"precision": "bf16-true"}),
    "64-true": ({}, {"precision": "64-true"}),
    "a length that is not known": ({}, {"batches": Endless(3)}),  # P6
}


@pytest.mark.parametrize(("options", "settings"), LIGHTNING.values(), ids=LIGHTNING)
def test_lightning_equals_adamw(package, options, settings):  # P1, P3, P4, P5
    def run(make, *callbacks, **own):
        return fit(package, partial(make, **options, **own), *callbacks, **settings)

    wd = 1.0  # by less, AdamW decays nothing in bf16
    ours = run(adam, LightningWD(wd, quantum=0))
    assert same(ours, run(adamw, weight_decay=wd))
    assert not same(ours, run(adamw, weight_decay=0))


@each_package
@pytest.mark.parametrize("quantum", [0, None])
def test_lightning_equals_adamw_under_one_cycle(package, quantum):  # P4
    ours = fit(package, partial(one_cycle, adam), LightningWD(WD, quantum=quantum))
    assert same(ours, fit(package, partial(one_cycle, adamw)))
    assert not same(ours, fit(package, partial(one_cycle, partial(adamw, weight_decay=0))))


@pytest.mark.parametrize("fused", [False, True], ids=["for-loop", "fused"])
@each_way
def test_lightning_decays_nothing_in_an_overflow(package, manual, fused):  # P1, P4
    def run(make, *callbacks):
        settings = {"plugins": half_precision(package), "model": {"manual": manual}}
        return fit(package, partial(make, fused=fused), *callbacks, **settings)

    ours = run(adam, LightningWD(WD, quantum=0))
    assert same(ours, run(adamw))
    assert 0 < ours.trainer.optimizers[0].state[ours.head.weight]["step"] < 12


@each_way
def test_lbfgs_in_lightning(package, manual):  # P1, P4, P5
    def make(module):
        return torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=4)

    model = {"manual": manual, "by": "closure"}
    ours = fit(package, make, LightningWD(WD, quantum=0), model=model)
    net = network()
    optimizer = make(net)
    decays_by_hand(optimizer, WD)
    for position in itertools.product(range(2), range(6)):

        def closure(position=position):
            optimizer.zero_grad()
            x, y = batch_of(*position)
            loss = mse_loss(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert same(ours, net)


@each_way
def test_without_wd_the_own_weight_decay_is_read_at_every_step(package, manual):  # P3, P4
    class Changes(package.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.05 * (batch_idx + 1)

    ours = fit(package, adam, Changes(), LightningWD(quantum=0), model={"manual": manual})
    assert same(ours, fit(package, adamw, Changes(), model={"manual": manual}))
    assert ours.trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.05 * 6
