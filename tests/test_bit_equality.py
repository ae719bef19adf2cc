"""With the decay, Adam is AdamW to the bit, and every optimizer its hand-written loop (P4)."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin
from fastai.callback.training import GradientAccumulation, GradientClip
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
from fastai_helpers import ADAMW as FASTAI_ADAMW
from fastai_helpers import (
    BS,
    FITS,
    L2,
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
    HandDecay,
    batch_of,
    every_optimizer,
    network,
    same,
)
from lightning_helpers import (
    LR,
    WD,
    Endless,
    adam,
    adamw,
    fit,
    half_precision,
    one_cycle,
)
from torch import nn
from torch.nn.functional import mse_loss

from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.lightning import DecoupledWD as LightningWD
from wd_callbacks.torch import DecoupledWD


def attach(quantum=None, wd=WD):
    return lambda optimizer: DecoupledWD(optimizer, wd, quantum=quantum)


# A plain loop


@every_optimizer
@pytest.mark.filterwarnings("ignore:ASGD ", "ignore:.*sparse gradient")
@pytest.mark.parametrize("closure", [False, True], ids=["step()", "step(closure)"])
def test_every_torch_optimizer_equals_the_hand_written_loop(case, closure):  # P1, P3, P4, P5
    expected, _ = case.train(0.0, by_hand=WD, closure=closure)
    for quantum in (None, 0):
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
    {"foreach": False, "eps": 1e-3, "dtype": torch.bfloat16},
    {"foreach": False, "eps": 1e-3, "dtype": torch.float16},  # it has no 1e-8
    {"foreach": False, "dtype": torch.float64},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
def test_adam_is_adamw(options, amsgrad):  # P4
    wd = 5 * WD if "dtype" in options else WD
    expected, _ = ADAMW.train(wd, amsgrad=amsgrad, **options)
    for quantum in (None, 0):
        ours, _ = ADAM.train(decay=attach(quantum, wd), amsgrad=amsgrad, **options)
        assert torch.equal(ours, expected)
    assert not torch.equal(expected, ADAMW.train(0.0, amsgrad=amsgrad, **options)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("default", "device"),
    [(torch.bfloat16, None), (torch.float16, None), (None, "meta")],
    ids=["bfloat16", "float16", "meta"],
)
def test_the_default_dtype_and_device_do_not_matter(default, device, dtype):  # P4
    p = nn.Parameter(torch.linspace(1, 2, 50).to(dtype))
    p.grad = torch.zeros_like(p)
    expected = p.detach().clone()
    optimizer = torch.optim.SGD([p], lr=0.1, foreach=False)
    DecoupledWD(optimizer, 0.3, quantum=0)
    old = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default or old)
        with torch.device(device) if device else contextlib.nullcontext():
            optimizer.step()
    finally:
        torch.set_default_dtype(old)
    assert torch.equal(p.data, expected.mul_(1 - 0.1 * 0.3))


# fastai

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
def test_fastais_optimizers_equal_their_own_decoupled_ones(name, decouple_wd, wd_bn_bias):
    # P4, P2 (do_wd), P3 (the own wd is not used)
    opt_func, kwargs = OWN[name], {"wd_bn_bias": wd_bn_bias}
    own = fitted(partial(opt_func, wd=WD, decouple_wd=True), **kwargs)
    ours = fitted(partial(opt_func, wd=INNER_WD, decouple_wd=decouple_wd), FastaiWD(WD), **kwargs)
    assert different(own, ours) == []
    assert different(own, fitted(partial(opt_func, wd=0.0), **kwargs))
    assert not any(value.isnan().any() for value in own.values())


def lookahead(params, lr, **kwargs):
    return Lookahead(Adam(params, lr, **kwargs), k=3)


@pytest.mark.filterwarnings("ignore:.*`wd`")
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
def test_larc_and_lookahead_equal_the_hand_written_loop(opt_func, wd_bn_bias):
    # P4, P5: Larc's trust ratio contains wd, Lookahead copies its slow weights
    by_hand = fitted(partial(opt_func, wd=0.0), DecayByHand(), wd_bn_bias=wd_bn_bias)
    for decouple_wd in (False, True):
        ours = fitted(
            partial(opt_func, wd=INNER_WD, decouple_wd=decouple_wd),
            FastaiWD(WD),
            wd_bn_bias=wd_bn_bias,
        )
        assert different(by_hand, ours) == []
    assert different(by_hand, fitted(partial(opt_func, wd=0.0), wd_bn_bias=wd_bn_bias))


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


@pytest.mark.parametrize("splitter", [halves, thirds])
@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_every_fit_equals_fastais_own(fit, splitter):  # P4, P2 (freeze)
    own, kwargs = partial(Adam, decouple_wd=True), {"fit": fit, "splitter": splitter}
    expected = fitted(partial(own, wd=WD), **kwargs)
    decay = FastaiWD(WD, quantum=0)
    assert different(expected, fitted(L2, decay, **kwargs)) == []
    assert different(expected, fitted(L2, cbs=decay, **kwargs)) == []
    assert different(expected, fitted(partial(own, wd=0.0), **kwargs))


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

    def scheduler():
        return ParamScheduler({"wd": schedule})

    own = fitted(FASTAI_ADAMW, scheduler())
    assert different(own, fitted(L2, scheduler(), FastaiWD())) == []
    assert different(own, fitted(L2, scheduler(), cbs=FastaiWD(None))) == []
    used = scheduler()
    assert different(fitted(FASTAI_ADAMW), fitted(L2, used, FastaiWD(WD))) == []
    assert different(own, fitted(FASTAI_ADAMW))
    assert used.hps["wd"] == pytest.approx([schedule(i / 16) for i in range(16)])


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
    own = {} if opt is torch.optim.Rprop else {"weight_decay": INNER_WD}
    kwargs = {"fit": FITS["fit_slice"], "splitter": halves, "wd_bn_bias": wd_bn_bias}
    by_hand = fitted(wrapped(opt, **options), DecayByHand(), **kwargs)
    assert different(by_hand, fitted(wrapped(opt, **own, **options), FastaiWD(WD), **kwargs)) == []
    assert different(by_hand, fitted(wrapped(opt, **options), **kwargs))


def test_a_built_optimizer():
    # P4, P3
    def learn_with(opt, **options):
        model = learner().model
        return learner(OptimWrapper(opt=opt(model.parameters(), **options)), model=model)

    ours, own = learn_with(torch.optim.Adam, weight_decay=INNER_WD), learn_with(torch.optim.Adam)
    ours.fit(2, cbs=FastaiWD(WD))
    own.fit(2, cbs=DecayByHand())
    assert different(state(ours), state(own)) == []
    assert ours.opt.opt.param_groups[0]["weight_decay"] == INNER_WD


def test_the_plain_decay_serves_an_optim_wrapper():  # P5
    learn = learner(wrapped(torch.optim.Adam, weight_decay=INNER_WD))
    learn.create_opt()
    with DecoupledWD(learn.opt.opt, WD):
        learn.fit(2)
    assert different(state(learn), fitted(wrapped(torch.optim.AdamW, weight_decay=WD))) == []


class EvaluatesTwice(torch.optim.SGD):
    """Evaluates its closure twice a step, as LBFGS may many times."""

    def step(self, closure):
        with torch.enable_grad():
            closure()
        super().step()
        with torch.enable_grad():
            closure()


class WithClosure(Callback):
    """Has the optimizer evaluate the batch itself, and decays by hand.

    In every evaluation the group is to hold the optimizer's own wd, if it has one.
    """

    order, run_valid = 200, False

    def __init__(self, wd, own):
        self.by_hand, self.own = wd, own

    def before_step(self):
        evaluations = []
        hand_decay = HandDecay(self.opt.opt, self.by_hand)

        def closure():
            [hypers] = self.opt.hypers
            assert hypers.get("wd", self.own) == self.own
            self.opt.zero_grad()
            loss = self.loss_func(self.model(*self.xb), *self.yb)
            loss.backward()
            hand_decay.after_backward()
            evaluations.append(loss)
            return loss

        hand_decay.before_closure()
        self.opt.step(closure)
        assert len(evaluations) > 1
        raise CancelStepException


@pytest.mark.parametrize(
    ("opt", "own"),
    [(EvaluatesTwice, {"weight_decay": INNER_WD}), (torch.optim.LBFGS, {})],
    ids=["sgd", "lbfgs"],
)
def test_a_closure_of_a_wrapped_optimizer_decays_once(opt, own):
    # P1, P3, P5
    def run(*cbs, **options):
        return fitted(wrapped(opt, lr=0.05, **options), *cbs, wd_bn_bias=True)

    ours = run(FastaiWD(WD), WithClosure(0.0, INNER_WD), **own)
    assert different(ours, run(WithClosure(WD, 0.0))) == []
    assert different(ours, run(WithClosure(0.0, 0.0)))


class CpuMixedPrecision(MixedPrecision):
    """fastai's, on the CPU: its own before_fit asks for CUDA."""

    def before_fit(self):
        self.autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler("cpu", **self.kwargs)
        self.scales = []


def overflowing():
    # Gradients that are multiplied by 2^127 overflow float32: at the first batch and every third.
    return CpuMixedPrecision(
        init_scale=2.0**127, growth_factor=2.0**8, backoff_factor=2.0**-8, growth_interval=2
    )


ACCUMULATING = {
    "accumulate_2": lambda: [GradientAccumulation(2 * BS)],
    "accumulate_3": lambda: [GradientAccumulation(3 * BS)],
    "clip": lambda: [GradientClip(0.1)],
    "overflow": lambda: [overflowing()],
    "all": lambda: [overflowing(), GradientAccumulation(2 * BS), GradientClip(0.1)],
}


@pytest.mark.parametrize("cbs", ACCUMULATING.values(), ids=ACCUMULATING)
def test_accumulation_clipping_and_overflow_equal_fastais_own(cbs):  # P1
    for name in ("fit", "one_cycle"):
        own = fitted(FASTAI_ADAMW, *cbs(), fit=FITS[name])
        assert different(own, fitted(L2, *cbs(), FastaiWD(WD, quantum=0), fit=FITS[name])) == []
        assert different(own, fitted(partial(Adam, wd=0.0), *cbs(), fit=FITS[name]))


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

SETTINGS = {
    "automatic": {},
    "manual": {"model": {"manual": True}},
    "manual, steps=3": {"model": {"manual": True, "steps": 3}},
    "manual, every=2": {"model": {"manual": True, "every": 2}},
    "manual, by closure": {"model": {"manual": True, "by": "closure"}},
    "manual, by the raw optimizer": {"model": {"manual": True, "by": "raw"}},
    "accumulation": {"batches": 8, "accumulate_grad_batches": 4},
    "accumulation, shorter last window": {"batches": 10, "accumulate_grad_batches": 4},
    "clipped norm": {"gradient_clip_val": 0.05},
    "clipped values": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-mixed, manual": {"precision": "bf16-mixed", "model": {"manual": True}},
    "64-true": {"precision": "64-true"},
    "skipped batches": {"model": {"skipped": (0, 3)}},
    "skipped batches, accumulation": {
        "model": {"skipped": (0, 2, 7)},
        "batches": 8,
        "accumulate_grad_batches": 2,
    },
}


IMPLEMENTATIONS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "tensor lr": {"lr": torch.tensor(LR), "foreach": False},
}


def assert_equals_adamw(package, run, options, *, make=lambda optimizer: optimizer, quantum=0):
    """Trains with AdamW, with the decay, and without any: the first two end with the same bits."""
    decay = LightningWD(WD, quantum=quantum)
    ours = fit(package, make(partial(adam, **options)), decay, **run())
    oracle = fit(package, make(partial(adamw, **options)), **run())
    undecayed = fit(package, make(partial(adamw, **options, weight_decay=0)), **run())
    assert same(ours, oracle)
    assert not same(ours, undecayed)
    return ours


@pytest.mark.parametrize("name", SETTINGS)
def test_lightning_equals_adamw(package, name):  # P1, P3, P4
    assert_equals_adamw(package, lambda: SETTINGS[name], {})


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["automatic", "manual", "skipped batches"])
def test_lightning_equals_adamw_in_every_implementation(package, name, kind):  # P4, P5
    assert_equals_adamw(package, lambda: SETTINGS[name], IMPLEMENTATIONS[kind])


@pytest.mark.parametrize("kind", ["for-loop", "foreach", "fused"])
def test_lightning_equals_adamw_by_default_and_under_one_cycle(package, kind):  # P4
    options = IMPLEMENTATIONS[kind]
    assert_equals_adamw(package, dict, options, quantum=None)
    assert_equals_adamw(package, dict, options, make=lambda make: partial(one_cycle, make))


@pytest.mark.parametrize("kind", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_lightning_decays_nothing_in_an_overflow(package, manual, kind):  # P1, P4
    def run():
        return {"plugins": half_precision(package), "model": {"manual": manual}}

    ours = assert_equals_adamw(package, run, IMPLEMENTATIONS[kind])
    assert 0 < ours.trainer.optimizers[0].state[ours.head.weight]["step"] < 12


def test_lightning_equals_adamw_in_bf16(package):  # P4
    """As a loop: torch's multi-tensor call would round ``1 - lr * wd`` to bf16 on the CPU."""
    wd = 1.0  # by less, AdamW decays nothing there

    def run(make, *callbacks):
        return fit(package, partial(make, foreach=False), *callbacks, precision="bf16-true")

    ours = run(adam, LightningWD(wd, quantum=0))
    assert ours.head.weight.dtype == torch.bfloat16
    assert same(ours, run(partial(adamw, weight_decay=wd)))
    assert not same(ours, run(partial(adamw, weight_decay=0)))


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (torch.optim.SGD, {"lr": LR, "momentum": 0.9}),
        (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 4}),
    ],
)
def test_sgd_and_lbfgs_in_lightning(package, cls, settings, manual):  # P1, P4, P5
    def make(module):
        optimizer = cls(module.parameters(), **settings)
        if cls is torch.optim.SGD:
            optimizer.param_groups[0]["weight_decay"] = INNER_WD
        return optimizer

    model = {"manual": manual, "by": "step" if cls is torch.optim.SGD else "closure"}
    ours = fit(package, make, LightningWD(WD, quantum=0), model=model)
    net, evaluations = network(), []
    optimizer = cls(net.parameters(), **settings)
    for epoch, index in ((e, i) for e in range(2) for i in range(6)):
        hand_decay = HandDecay(optimizer, WD)

        def closure(epoch=epoch, index=index, hand_decay=hand_decay):
            optimizer.zero_grad()
            x, y = batch_of(epoch, index)
            loss = mse_loss(net(x), y)
            loss.backward()
            hand_decay.after_backward()
            evaluations.append(loss)
            return loss

        hand_decay.before_closure()
        optimizer.step(closure)
    assert same(ours, net)
    assert (len(evaluations) > 12) == (cls is torch.optim.LBFGS)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_without_wd_the_own_weight_decay_is_read_at_every_step(package, manual):  # P3, P4
    class Changes(package.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.05 * (batch_idx + 1)

    ours = fit(package, adam, Changes(), LightningWD(quantum=0), model={"manual": manual})
    assert same(ours, fit(package, adamw, Changes(), model={"manual": manual}))
    assert ours.trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.05 * 6


def test_a_number_needs_no_length_of_the_run(package):  # P4, P6
    ours = fit(package, adam, LightningWD(WD, quantum=0), batches=Endless(3))
    assert same(ours, fit(package, adamw, batches=Endless(3)))
