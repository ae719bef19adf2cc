"""Optimizers on which decay from outside is lost, or is not what it seems."""

from __future__ import annotations

import functools
import gc
import random
import re
import warnings
import weakref

import numpy as np
import pytest
import timm.optim
import torch
from fastai_helpers import learner, wrapped
from helpers import CASES, WithoutHooks, caught, flat, parameter, params_of
from schedulefree import AdamWScheduleFree, ScheduleFreeWrapper, SGDScheduleFree
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ConstantLR, LambdaLR
from torch.optim.swa_utils import AveragedModel

from wd_callbacks.core.compat import check_compatible
from wd_callbacks.core.toys import MAX_STEPS
from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.torch import DecoupledWD

OUTSIDE = {}  # what a step may reach besides its optimizer


def weights(*dtypes):
    torch.manual_seed(0)
    shapes = (3, 3), (3,)
    return [nn.Parameter(torch.randn(shape).to(d)) for d in dtypes or [None] for shape in shapes]


class Plain(Optimizer):
    """SGD with L2; subclasses change the update, or do something besides. Counts its steps."""

    steps = 0

    def __init__(self, params, lr=0.1, **defaults):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, **defaults})

    @torch.no_grad()
    def step(self, closure=None):
        type(self).steps += 1
        if closure is not None:
            torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(self.update(p, group, group.get("weight_decay")), alpha=-group["lr"])
        self.besides()

    def update(self, p, group, wd):
        return p.grad + wd * p if wd else p.grad

    def besides(self):
        pass


class IgnoresClosure(Plain):
    def step(self, closure=None):
        super().step()


# Optimizers that lose decay


class SAM(Optimizer):
    """Foret et al. (arXiv 2010.01412): climbs by the gradients that are there, evaluates there,
    and steps from where it was.
    """

    def __init__(self, params, base=SGD, **options):
        super().__init__(params, options)
        self.base = base(self.param_groups, **options)

    @torch.no_grad()
    def step(self, closure):
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        before = [p.clone() for p in params]
        norm = torch.stack([p.grad.norm() for p in params]).norm()  # of none is an error
        for p in params:
            p.add_(p.grad / (norm + 1e-12), alpha=0.05)
        torch.enable_grad()(closure)()
        for p, q in zip(params, before):
            p.copy_(q)
        self.base.step()


class LookSAM(SAM):
    """Liu et al. (arXiv 2203.02714): climbs in every tenth step only."""

    calls = 0

    def step(self, closure):
        self.calls += 1
        if self.calls % 10 == 0:
            super().step(closure)
        else:
            closure()
            self.base.step()


class SeparateSAM(SAM):
    """The base has param groups of its own."""

    def __init__(self, params, **options):
        params = list(params)
        super().__init__(params, **options)
        self.base = SGD(params, **options)


class WSAM(SAM):
    """Yue et al. (arXiv 2305.15817): evaluates before it climbs, and takes back just the climb."""

    @torch.no_grad()
    def step(self, closure):
        params = params_of(self)
        torch.enable_grad()(closure)()
        climbs = [0.05 * p.grad for p in params]
        torch._foreach_add_(params, climbs)
        torch.enable_grad()(closure)()
        torch._foreach_sub_(params, climbs)
        self.base.step()


class Lookahead(Plain):
    """Zhang et al. (arXiv 1907.08610): every few steps towards slow weights."""

    def __init__(self, params, every=5, alpha=0.5):
        super().__init__(params)
        self.every, self.alpha, self.count = every, alpha, 0

    def besides(self):
        self.count += 1
        for p in params_of(self):
            slow = self.state[p].setdefault("slow", p.clone())
            if self.count % self.every == 0:
                p.copy_(slow.lerp_(p, self.alpha))


class LookaheadOfVectors(Plain):
    """Keeps all of the decay of matrices, and loses a part of that of vectors in each step."""

    def besides(self):
        for p in params_of(self):
            if p.ndim == 1:
                p.lerp_(self.state[p].setdefault("first", p.clone()), 0.2)


class Copies(IgnoresClosure):
    """Updates float32 copies of half-precision weights, and ignores its closure."""

    def besides(self):
        for p in params_of(self):
            if p.grad is not None and p.dtype != torch.float32:
                copy = self.state[p].setdefault("copy", p.detach().float())
                p.copy_(copy.sub_(p.grad, alpha=0.1))


def with_attribute(optimizer, name, value):
    setattr(optimizer, name, value)
    return optimizer


def scheduled(optimizer):
    LambdaLR(optimizer, lambda step: 1.0)
    return optimizer


def of_a_base_with_state(params):
    optimizer = SAM(params, torch.optim.Adam, lr=0.2)  # not that of another case: no cached verdict
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.base.step()
    return optimizer


def without_weight_decay(optimizer):
    del optimizer.param_groups[0]["weight_decay"]
    return optimizer


def among_others(*dtypes):
    return [{"params": [p]} for p in weights(*dtypes)]


def sgd(params):
    return SGD(params, lr=0.1)


ATTACH = "attach to its 'base'"
ITSELF = "use the weight decay of {} itself"
COPIES = "copies of half-precision"
LOST = {  # from the parameters to an optimizer, and what the error advises
    "SAM": (lambda ps: SAM(ps, lr=0.1), ATTACH),
    "SeparateSAM": (lambda ps: SeparateSAM(ps, lr=0.1), ATTACH),
    "LookSAM": (lambda ps: LookSAM(ps, lr=0.1), ATTACH),
    "base with state": (lambda _: of_a_base_with_state(weights()), ATTACH),
    "AdamWScheduleFree": (AdamWScheduleFree, ITSELF),
    "scheduled": (lambda ps: scheduled(SGDScheduleFree(ps, lr=0.1)), ITSELF),
    "lr 0": (lambda ps: SGDScheduleFree(ps, lr=0.0), ITSELF),
    "empty group": (lambda ps: SGDScheduleFree([{"params": []}, {"params": ps}], lr=0.1), ITSELF),
    "Lookahead, a fifth": (lambda ps: Lookahead(ps, alpha=0.2), ITSELF),
    "Lookahead, vectors": (LookaheadOfVectors, ITSELF),
    "no wd": (lambda ps: without_weight_decay(Lookahead(ps, alpha=0.2)), "use another optimizer"),
    "bf16": (lambda ps: Copies(weights(torch.bfloat16)), COPIES),
    "fp16": (lambda ps: Copies(weights(torch.float16)), COPIES),
    "among others": (lambda ps: Copies(among_others(None, torch.bfloat16, None)), COPIES),
}
KEPT = {
    "SGD": sgd,
    "WSAM": lambda ps: WSAM(ps, lr=0.1),
    "ignored closure": IgnoresClosure,
    "no half precision": Copies,
    **{
        f"Lookahead({every})": functools.partial(Lookahead, every=every, alpha=alpha)
        for every, alpha in ((2, 0.5), (3, 0.97), (6, 0.5))
    },
}


@pytest.mark.parametrize("case", LOST)
def test_lost_decay_is_an_error_and_leaves_no_trace(case):  # P5
    build, instead = LOST[case]
    params = weights()
    before = flat(params)
    optimizer = build(params)
    random_state = torch.get_rng_state()
    name = type(optimizer).__name__
    for _ in range(2):  # the second one from the cache
        with pytest.raises(ValueError, match=f"{name} would lose decay.*{instead.format(name)}"):
            check_compatible(optimizer, follows_lr=True)
    assert torch.equal(flat(params), before)
    assert all(p.grad is None for p in params)
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("case", KEPT)
def test_decay_that_is_kept_is_no_error(case):  # P5
    check_compatible(KEPT[case](weights()), follows_lr=True)


# Optimizers whose hooks do not run


class Holder:
    """Looks like an optimizer and holds one, as mmengine's OptimWrapper and DeepSpeed's do."""

    param_groups = property(lambda self: self.optimizer.param_groups)

    def __init__(self, optimizer):
        self.optimizer = optimizer


class DeepSpeedOptimizer(Holder):
    __module__ = "deepspeed.runtime.zero"


class Slotted:
    __slots__ = ("optimizer",)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def __init__(self, optimizer):
        self.optimizer = optimizer


class LightningOptimizer(Holder):
    """Named as Lightning's wrapper."""


class NeverHooked(WithoutHooks):
    def __init__(self, params):
        self.param_groups = [{"params": list(params)}]


def in_lightning_s(params):
    return LightningOptimizer(WithoutHooks(sgd(params)))


def overlapping(params):
    return with_attribute(Plain(params), "_overlap_with_ddp", True)


def lookahead_of_timm(params):
    optimizer = timm.optim.Lookahead(sgd(params))
    optimizer.zero_grad()  # which marks its step as one that runs hooks
    return optimizer


NO_HOOKS = "never runs step hooks"
NO_OPTIMIZER = r"must be a torch\.optim\.Optimizer, got "
FIRST = ".* takes the optimizer first.* import DecoupledWD from wd_callbacks.fastai, .*transformers"
REFUSED = {  # from parameters to what is no optimizer, or none with hooks, and the error
    "SAM": (lambda ps: SAM(ps, lr=0.1), ValueError, ATTACH),
    "no hooks": (lambda ps: WithoutHooks(sgd(ps)), ValueError, f"{NO_HOOKS}.*{ATTACH}"),
    "timm": (lookahead_of_timm, ValueError, f"{NO_HOOKS}.*attach to its '_base_optimizer'"),
    "no base": (NeverHooked, ValueError, rf"{NO_HOOKS}.*: call super\(\).__init__ in its"),
    "in Lightning's": (in_lightning_s, ValueError, "WithoutHooks.*'base'"),
    "overlap": (overlapping, ValueError, "inside backward.*: pass overlap_with_ddp=False"),
    "schedule-free": (lambda ps: ScheduleFreeWrapper(sgd(ps)), TypeError, f"Wrapper: {ATTACH}$"),
    "of a holder": (lambda ps: Holder(Holder(sgd(ps))), TypeError, "its 'optimizer.optimizer'$"),
    "slots": (lambda ps: Slotted(sgd(ps)), TypeError, "attach to its 'optimizer'$"),
    "DeepSpeed": (lambda ps: DeepSpeedOptimizer(sgd(ps)), TypeError, "may update .* fully_shard"),
    "a scheduler": (lambda ps: ConstantLR(sgd(ps)), TypeError, f"{NO_OPTIMIZER}ConstantLR{FIRST}"),
    "None": (lambda ps: LightningOptimizer(None), TypeError, f"{NO_OPTIMIZER}NoneType{FIRST}"),
    "a number": (lambda ps: 1e-4, TypeError, f"{NO_OPTIMIZER}float{FIRST}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_decayed_names_what_can(case):  # P5, P10
    build, error, message = REFUSED[case]
    thing = build(weights())
    with pytest.raises(error, match=message):
        DecoupledWD(thing, 0.5)
    for optimizer in (thing, getattr(thing, "optimizer", thing)):
        assert not getattr(optimizer, "_optimizer_step_pre_hooks", None)


# Compatibility warnings


def updating(name, update, defaults):
    """Plain with another update: a function of parameter, param group and weight decay."""

    def init(self, params, lr=0.1, **options):
        Plain.__init__(self, params, lr, **defaults, **options)

    methods = {"__init__": init, "update": lambda self, *args: update(*args)}
    return type(name, (Plain,), methods)


def trust(p, group, wd):
    """LARS as timm has it: no trust ratio if there is no weight decay."""
    ratio = p.norm() / (p.grad.norm() + wd * p.norm()) if wd else 1.0
    return ratio * (p.grad + wd * p)


TURNED_OFF = "turns a part of its update off at weight_decay=0 .* which DecoupledWD sets .*: "
OTHER_SCALE = "own weight decay shrinks weights by {} in a step, but DecoupledWD by lr . wd: pass "
TWICE = "even at weight_decay=0, which DecoupledWD sets during step, so they decay twice: turn"
NEITHER = "neither L2 nor decoupled .* use the weight decay of Cautious.* itself"
VECTORS = "own weight decay leaves out vectors .* exclude='vector'"
ALIKE = "same update at any learning rate .*: pass scale_by='none', or a callable"
THRICE = OTHER_SCALE.format(r"3 \* lr \* wd") + "a callable from the param group"
SQUARED = OTHER_SCALE.format(r"lr\*\*2 / 0.1 \* wd") + "scale_by='lr_squared' and max_lr=0.1 to"
LEARNS = r"a factor 'd' that it learns.*: pass scale_by=lambda group: group\['lr'\] \* "
UPDATES = {  # the update of p in group g with weight decay w, the group's defaults, warnings
    "Switched": (trust, {}, [f"{TURNED_OFF}use the weight decay of Switched itself"]),
    "Switch": (trust, {"always_adapt": False}, [f"{TURNED_OFF}pass always_adapt=True"]),
    # Decays only the weights that the update makes smaller.
    "Cautious": (lambda p, g, w: p.grad + w * p * (p * p.grad > 0), {}, [NEITHER]),
    "SparesVectors": (lambda p, g, w: p.grad.sign() + w * p * (p.ndim > 1), {}, [VECTORS]),
    "Thrice": (lambda p, g, w: p.grad.sign() + 3 * w * p, {}, [THRICE]),
    # AdamC's decay (arXiv 2506.02285) as timm has it: by lr**2 / max_lr.
    "Corrected": (lambda p, g, w: p.grad.sign() + g["lr"] / 0.1 * w * p, {}, [SQUARED]),
    "Always": (lambda p, g, w: p.grad + 0.05 * p, {}, [TWICE]),
    # Vectors by a key of their own, as pytorch_optimizer's MARS.
    "Vectors": (lambda p, g, w: p.grad + (w if p.ndim > 1 else 0.05) * p, {}, [TWICE, VECTORS]),
    # Adafactor with relative steps: whatever the group holds.
    "Relative": (lambda p, g, w: p.grad * 0.01 / g["lr"], {}, [ALIKE]),
    "RelativeDecay": (lambda p, g, w: (p.grad.sign() + w * p) / 100 / g["lr"], {}, [ALIKE]),
    # A learned factor of the learning rate, as in Prodigy and D-Adaptation.
    "Learned": (lambda p, g, w: g["d"] * (p.grad + w * p), {"d": 1e-6, "betas": (0, 0)}, [LEARNS]),
    "IgnoresWD": (lambda p, g, w: p.grad, {}, []),
    "Maximizes": (lambda p, g, w: w * p - p.grad, {"maximize": True}, []),
}
OF_UPDATE = {name: updating(name, *row[:2]) for name, row in UPDATES.items()}
Cautious, Thrice, Relative = (OF_UPDATE[name] for name in ("Cautious", "Thrice", "Relative"))


class CautiousIgnoringClosure(IgnoresClosure, Cautious):
    pass


class MySGD(SGD):
    pass


SETTINGS = {  # from param groups to an optimizer, and the warnings
    "a closure is ignored": (IgnoresClosure, []),
    "the steps run out": (CautiousIgnoringClosure, []),
    "half precision": (lambda _: Cautious(weights(None, torch.bfloat16)), [NEITHER]),
    "momentum, maximize": (lambda gs: MySGD(gs, lr=0.1, momentum=0.9, maximize=True), []),
    "scheduled": (lambda gs: scheduled(MySGD(gs, lr=0.1, momentum=0.9)), []),
    "tensor lr": (lambda gs: Plain(gs, lr=torch.tensor(0.1)), []),
    "lr 0": (lambda gs: Plain(gs, lr=0.0), []),
}
WARNED = {name: (OF_UPDATE[name], messages) for name, (*_, messages) in UPDATES.items()}
WARNED |= SETTINGS


@pytest.mark.parametrize("case", WARNED)
def test_compatibility_warnings(case):  # P5, P11
    build, messages = WARNED[case]
    optimizer = build(among_others(None))
    before = flat(optimizer)
    random_state, cls = torch.get_rng_state(), type(optimizer)
    cls.steps = 0
    found, warned = caught(lambda: check_compatible(optimizer, follows_lr=True))
    assert warned == []
    assert cls.steps <= MAX_STEPS == 40
    assert len(found) == len(messages)
    for warning, message in zip(found, messages):
        assert warning.startswith(cls.__name__)
        assert re.search(message, warning), warning
    assert torch.equal(flat(optimizer), before)
    assert not optimizer.state
    assert torch.equal(random_state, torch.get_rng_state())
    assert check_compatible(optimizer, follows_lr=True) == found


@pytest.mark.parametrize("name", ["Thrice", "Corrected", "Relative", "Learned"])
def test_the_rate_does_not_matter_if_the_decay_does_not_follow_it(name):  # P5
    assert check_compatible(OF_UPDATE[name](weights()), follows_lr=False) == []


each_class = pytest.mark.parametrize(
    "case", {case.cls: case for case in CASES}.values(), ids=lambda case: case.cls.__name__
)


@each_class
def test_of_torch_s_optimizers_only_asgd_decays_by_itself(case, monkeypatch):  # P5, P11
    steps = []
    optimizer = case.build(case.model().parameters())
    counting = Optimizer.profile_hook_step(lambda self, closure=None: steps.append(self))
    monkeypatch.setattr(case.cls, "step", counting)
    found = check_compatible(optimizer, follows_lr=True)
    assert steps == []
    if case.cls is torch.optim.ASGD:
        (warning,) = found
        assert "decays its weights by itself (lambd=0.0001)" in warning
        assert "pass lambd=0" in warning
        optimizer.param_groups[0]["lambd"] = 0.0
        found = check_compatible(optimizer, follows_lr=True)
    assert found == []


@each_class
def test_a_subclass_is_simulated_with_the_same_result(case):  # P5
    cls = type(f"My{case.cls.__name__}", (case.cls,), {})
    found = check_compatible(cls(case.model().parameters(), **case.kwargs), follows_lr=True)
    expected = {
        torch.optim.ASGD: ["MyASGD decays its weights even at weight_decay=0"],
        torch.optim.Rprop: ["MyRprop makes the same update at any learning rate"],  # but the first
    }.get(case.cls, [])
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected))


# What toy copies cost, and what they leave alone


@pytest.mark.parametrize("kinds", [1, 2])
def test_a_group_of_each_kind_is_simulated(kinds):  # P11
    class Counts(Plain):
        most = 0

        def besides(self):
            Counts.most = max(Counts.most, len(self.param_groups))

    groups = [
        {"params": [nn.Parameter(torch.ones(2, 2))], "lr": torch.tensor(0.1 + i), "depth": 1 + i}
        | {"name": f"layer {i}", "nesterov": i % kinds == 1}
        for i in range(40)
    ]
    check_compatible(Counts(groups), follows_lr=False)
    assert Counts.most == kinds


def test_optimizers_of_a_kind_are_simulated_once():  # P11
    class Counts(Cautious):
        steps = 0

    def build(i):
        return Counts([{"params": weights()[i % 2 :], "lr": 0.1 * (1 + i), "name": f"layer {i}"}])

    found = [check_compatible(build(i), follows_lr=True) for i in range(2)]
    once = Counts.steps
    assert [check_compatible(build(i), follows_lr=True) for i in range(2, 40)] == found * 19
    assert Counts.steps == once


OTHERS = {
    "argument": lambda cls: cls(weights(), always_adapt=True),
    "attribute": lambda cls: with_attribute(cls(weights()), "every", 3),
    "wrapped": lambda cls: with_attribute(it := cls(weights()), "base", sgd(it.param_groups)),
    "dimensions": lambda cls: cls(weights()[:1]),
    "dtype": lambda cls: cls(weights(torch.bfloat16)),
    "first lr": lambda cls: cls(weights(), lr=0.2),
    "tensor lr": lambda cls: cls([{"params": weights(), "lr": torch.tensor(0.1)}]),
    "group": lambda cls: cls([{"params": weights()}, {"params": weights(), "nesterov": True}]),
}


@pytest.mark.parametrize("other", OTHERS)
def test_optimizers_of_another_kind_are_simulated_again(other):  # P5
    class Counts(Plain):
        steps = 0

    def steps_of(optimizer, follows_lr=True):
        before = Counts.steps
        check_compatible(optimizer, follows_lr)
        return Counts.steps - before

    assert steps_of(Counts(weights())) > 0
    assert steps_of(OTHERS[other](Counts)) > 0
    assert steps_of(OTHERS[other](Counts)) == 0
    assert steps_of(OTHERS[other](Counts), follows_lr=False) > 0


def test_settings_that_cannot_be_compared_are_not_cached():  # P5
    class Decides(Plain):
        def update(self, p, group, wd):
            return p.grad + (0 if group["decide"](p) else wd * p * (p * p.grad > 0))

    assert check_compatible(Decides(weights(), decide=lambda p: True), follows_lr=True) == []
    assert len(check_compatible(Decides(weights(), decide=lambda p: False), follows_lr=True)) == 1


def test_the_cache_keeps_neither_weights_nor_optimizer_nor_class():  # P11
    def check():
        class Local(Plain):
            def besides(self):
                len(params)

        params = weights()
        optimizer = Local(params)
        optimizer.base = Local(params)
        optimizer.kind = Local
        check_compatible(optimizer, follows_lr=True)
        return [weakref.ref(it) for it in (params[0], optimizer, Local)]

    refs = check()
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def late(optimizer):
    optimizer.count = getattr(optimizer, "count", 0) + 1
    if optimizer.count == 9:  # of a fork
        torch._foreach_mul_([OUTSIDE["model"].weight], 0.9)


def fails(optimizer):
    raise RuntimeError("only real weights, please")


UNREACHABLE = {
    "world": lambda optimizer: [p.mul_(0.9) for p in OUTSIDE["model"].parameters()],
    "partial": lambda optimizer: optimizer.clip(),
    "closure": lambda optimizer: optimizer.clip(),
    "average": lambda optimizer: OUTSIDE["average"].update_parameters(OUTSIDE["model"]),
    "late": late,
    "fails": fails,
    "NaN": lambda optimizer: params_of(optimizer)[0].fill_(torch.nan),
}


@pytest.mark.parametrize("kind", UNREACHABLE)
def test_the_real_weights_are_out_of_reach(kind):  # P3, P10
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = type("Besides", (Plain,), {"besides": UNREACHABLE[kind]})(model.parameters())
    OUTSIDE.update(model=model, average=AveragedModel(model))

    def clip():
        model.weight.data.mul_(0.9)

    held = {"partial": {"clip": functools.partial(clip)}, "closure": {"clip": clip}}
    vars(optimizer).update(held.get(kind, {}))
    assert caught(lambda: check_compatible(optimizer, follows_lr=True)) == ([], [])
    torch.manual_seed(0)
    assert all(map(torch.equal, model.parameters(), nn.Linear(3, 3).parameters()))
    assert OUTSIDE["average"].n_averaged == 0


class Noisy(Plain):
    """Prints, warns, and draws random numbers."""

    def besides(self):
        print("a step")
        warnings.warn("a step", stacklevel=1)
        for p in self.param_groups[0]["params"]:
            p.add_(1e-3 * (np.random.rand() + random.random() + torch.rand(()).item()))


def test_noise_is_isolated_and_no_reason_to_warn(monkeypatch, capsys):  # P3, P5
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    states = torch.get_rng_state, random.getstate, lambda: np.random.get_state()[1].tolist()
    optimizer = Noisy(weights())
    seeded.clear()
    before = [str(state()) for state in states]
    assert caught(lambda: check_compatible(optimizer, follows_lr=True)) == ([], [])
    assert [str(state()) for state in states] == before
    assert seeded == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch cannot before 2.6")
def test_nothing_is_compiled():  # P11
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def update(p):
        return p.mul_(1.0)

    class Compiled(Plain):
        def besides(self):
            update(self.param_groups[0]["params"][0])

    check_compatible(Compiled(weights()), follows_lr=True)
    assert compiled == []
    update(torch.ones(3))
    assert len(compiled) == 1


# Through DecoupledWD


SCALES = [
    (Relative, "lr", True),
    (Relative, "lr_squared", True),
    (Relative, ["none", "lr"], True),
    (Relative, "none", False),
    (Thrice, len, False),
]


@pytest.mark.parametrize(("cls", "scale_by", "warns"), SCALES)
def test_decoupled_wd_warns_once_if_any_group_follows_the_lr(cls, scale_by, warns):  # P5
    optimizer = cls([{"params": weights()[:1]} for _ in range(2)])
    _, found = caught(lambda: DecoupledWD(optimizer, 0.5, scale_by=scale_by))
    assert len(found) == warns
    assert all("at any learning rate" in warning for warning in found)


IN_WRAPPERS = {  # the wrapper, and what in it to attach to
    "WSAM": (lambda ps: WSAM(ps, lr=0.1), lambda wrapper: wrapper),
    "Lookahead": (Lookahead, lambda wrapper: wrapper),
    "SAM": (lambda ps: SAM(ps, lr=0.1), lambda wrapper: wrapper.base),
}


@pytest.mark.parametrize("case", IN_WRAPPERS)
def test_it_decays_in_a_wrapper_that_keeps_it(case):  # P1, P5
    p = parameter()
    build, optimizer_of = IN_WRAPPERS[case]
    wrapper = build([p])
    _, found = caught(lambda: DecoupledWD(optimizer_of(wrapper), 0.5))
    wrapper.step(lambda: p.grad.zero_())
    assert found == []
    assert torch.equal(p.data, torch.full((2,), 0.95))


@pytest.mark.parametrize(("cls", "warns"), [(Relative, True), (torch.optim.Adam, False)])
def test_fastai_warns_of_a_wrapped_optimizer_too(cls, warns):  # P5
    _, found = caught(lambda: learner(wrapped(cls)).fit(1, cbs=FastaiWD(0.1)))
    assert sum("makes the same update" in warning for warning in found) == warns
