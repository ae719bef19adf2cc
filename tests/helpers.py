"""Small models, optimizers and loops that the tests share. It needs torch alone.

Lightning modules and Trainers are in ``lightning_helpers.py``, Learners in ``fastai_helpers.py``.
"""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from reference.loops import decays_by_hand
from reference.steps import make_steps
from torch import nn

INNER_WD = 0.37
"""The optimizer's own weight decay: any use or loss of it changes the weights."""

HALF = (torch.float16, torch.bfloat16)
QUANTA = {
    torch.float64: 2.0**-20,
    torch.float32: 2.0**-20,
    torch.float16: 2.0**-8,
    torch.bfloat16: 2.0**-6,
}

FOREIGN_WARNINGS = (
    ".*does not have many workers",
    ".*but have no `val_dataloader`",
    r".*isinstance\(treespec, LeafSpec\)",
    ".*`training_step` returned `None`",
    ".*that ended before the epoch ended and your dataloader is not resumable",
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
    "Using ModelCheckpoint with manual optimization and every_n_train_steps",
    "Checkpoint directory .* exists and is not empty",
    r".*call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`",
    "You are using `torch.load` with `weights_only=False`",  # before torch 2.6
)
"""Warnings of Lightning and torch, by their text. ``conftest.py`` ignores them."""


def caught(action):
    """Returns the result of ``action`` and the messages of its warnings, but the foreign ones."""
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        result = action()
    messages = [str(record.message) for record in records]
    return result, [m for m in messages if not any(re.match(it, m) for it in FOREIGN_WARNINGS)]


def pickled(it):
    return pickle.loads(pickle.dumps(it))


def comparable(value):
    """Nested states for ``==``, equal if they are so to the bit and to the type, NaN included."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), comparable(value.tolist())
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(comparable, value))
    return repr(value)


DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
fuzz = settings(
    max_examples=5000 if DEEP else 60,
    derandomize=not DEEP,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    phases=list(Phase) if DEEP else [Phase.explicit, Phase.generate],
)
"""A short run that is always the same, or with ``HYPOTHESIS_PROFILE=deep`` a long random one."""


# Models, parameters and gradients


def network(norm=False):
    """A small network, with the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        middle = nn.BatchNorm1d(5) if norm else nn.Tanh()
        return nn.Sequential(nn.Linear(6, 5), middle, nn.Linear(5, 1))


def batch_of(epoch, index):
    """Inputs and targets that depend on the position alone, so that a resumed run sees the same."""
    generator = torch.Generator().manual_seed(1000 * epoch + index)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 1, generator=generator)


def params_of(it):
    """The parameters of a module, an optimizer or a list."""
    if isinstance(it, nn.Module):
        return list(it.parameters())
    if isinstance(it, torch.optim.Optimizer):
        return [p for group in it.param_groups for p in group["params"]]
    return list(it)


def weights(it):
    """Copies of the parameters."""
    return [p.detach().clone() for p in params_of(it)]


def flat(it):
    """All weights in one vector."""
    return torch.cat([p.detach().flatten() for p in params_of(it)])


def same(ours, theirs):
    """Returns whether two models have the same weights, to the bit."""
    return all(map(torch.equal, weights(ours), weights(theirs)))


def zero_gradients(it):
    """Gradients of zero: of SGD, nothing but the decay is left."""
    for p in params_of(it):
        p.grad = torch.zeros_like(p)


def random_gradients(it, step):
    """Gradients that depend on ``step`` alone and are the same on every device."""
    generator = torch.Generator().manual_seed(step)
    for p in params_of(it):
        gradient = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        if p.grad is None:
            p.grad = gradient
        else:
            p.grad.copy_(gradient)


def parameter(*shape, dtype=torch.float32, value=1.0, **options):
    """A parameter of ones with a gradient of zero."""
    p = nn.Parameter(torch.full(shape or (2,), value, dtype=dtype, **options))
    p.grad = torch.zeros_like(p)
    return p


def one_weight(dtype=torch.float32, lr=0.1, cls=torch.optim.SGD, **options):
    """A parameter of ones with a gradient of zero, and its optimizer."""
    p = parameter(dtype=dtype)
    return p, cls([p], **{"lr": lr, "weight_decay": INNER_WD, **options})


def two_groups(**options):
    """A model of two layers with gradients of zero; SGD has a param group for each."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    zero_gradients(model)
    groups = [{"params": list(layer.parameters())} for layer in model]
    return model, torch.optim.SGD(groups, **{"lr": 0.1, **options})


def spread(dtype=torch.float32, count=4096):
    """A parameter with weights spread over two binades and a gradient of zero."""
    p = nn.Parameter((torch.rand(count) * 1.5 + 0.5).to(dtype))
    p.grad = torch.zeros_like(p)
    return p


class Marked(torch.Tensor):
    """A tensor type of its own, with nothing else new."""


class NoUpdate(torch.optim.Optimizer):
    """Its ``step`` does nothing: all that is seen in a step is the decay's."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def step(self, closure=None):
        pass


class CallsSuper(torch.optim.Adam):
    """Its ``step`` calls ``super().step``, so that torch runs the step hooks twice."""

    def step(self, closure=None):
        return super().step(closure)


class WithoutHooks(torch.optim.Optimizer):
    """A wrapper that skips super().__init__, as several third-party ones do."""

    def __init__(self, base):
        self.base, self.param_groups, self.state = base, base.param_groups, base.state
        self.defaults = base.defaults

    def step(self, closure=None):
        return self.base.step(closure)


class Climber(torch.optim.Optimizer):
    """Evaluates its closure three times and moves in between, as LBFGS does."""

    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure):
        for _ in range(3):
            loss = closure()
            for group in self.param_groups:
                self._init_group(group)
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad + group["weight_decay"] * p, alpha=0.1 * group["lr"])
        return loss

    def _init_group(self, group):
        """As in torch's own: called for every group before it is updated."""


# What can be seen of a decay


def applied(p, before):
    """The mean over elements of ``-log(p / before)``."""
    return -torch.log(p.detach().double() / before.double()).mean().item()


def deferred(decay):
    """The deferred decay of every parameter, as ``-log`` of its factor."""
    return [it for group in decay.state_dict()["owed"] for it in group]


def hooks_of(optimizer):
    return [
        hook
        for name, hooks in vars(optimizer).items()
        if name.endswith("_hooks")
        for hook in hooks.values()
    ]


class Positions:
    """A schedule that notes the progress it is asked for."""

    def __init__(self, coefficient=0.0):
        self.coefficient, self.seen = coefficient, []

    def __call__(self, progress):
        self.seen.append(progress)
        return self.coefficient

    def last(self, count):
        """Those of the last steps: on loading, arguments may be compared by samples."""
        return self.seen[-count:]


def evenly(steps, of=None):
    return [step / (of or steps) for step in range(steps)]


# Every optimizer of torch.optim, in each implementation that it has


@dataclass(frozen=True)
class Case:
    cls: type[torch.optim.Optimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)
    needs_closure: bool = False
    sparse: bool = False
    matrices_only: bool = False

    @property
    def has_wd(self) -> bool:
        return "weight_decay" in inspect.signature(self.cls).parameters

    @property
    def id(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.kwargs.items() if k != "lr")
        return f"{self.cls.__name__}({options})"

    def build(self, params, **overrides) -> torch.optim.Optimizer:
        wd = {"weight_decay": INNER_WD} if self.has_wd else {}
        return self.cls(params, **{**self.kwargs, **wd, **overrides})

    def model(self, dtype=torch.float32) -> nn.Module:
        torch.manual_seed(0)
        if self.sparse:
            return nn.Embedding(6, 3, sparse=True).to(dtype)
        bias = not self.matrices_only
        layers = nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 2, bias=bias)
        return nn.Sequential(*layers).to(dtype)

    def loss(self, model, step):
        """A loss that depends on the step, so that gradients differ from step to step."""
        generator = torch.Generator().manual_seed(step)
        if self.sparse:
            return model(torch.randint(6, (4,), generator=generator)).square().sum()
        dtype = next(model.parameters()).dtype
        return model(torch.randn(9, 5, generator=generator).to(dtype)).square().mean()

    def train(self, wd=None, *, decay=None, by_hand=None, closure=False, steps=12, **options):
        """Trains a small model; returns its weights in one vector, and the optimizer.

        ``wd`` is the optimizer's own, None for ``INNER_WD``. ``decay`` attaches to the optimizer
        that it is given, ``by_hand`` is the coefficient of the hand-written loop, and ``options``
        are ``dtype`` and arguments of the optimizer.
        """
        model = self.model(options.pop("dtype", torch.float32))
        own = {} if wd is None or not self.has_wd else {"weight_decay": wd}
        optimizer = self.build(model.parameters(), **own, **options)
        groups = copy.deepcopy([{**it, "params": []} for it in optimizer.param_groups])
        if by_hand is not None:
            decays_by_hand(optimizer, by_hand)
        if decay:
            decay(optimizer)

        def check(step):
            assert [{**it, "params": []} for it in optimizer.param_groups] == groups  # P3

        make_steps(self, model, optimizer, range(steps), after=check, closure=closure)
        return flat(model), optimizer


def _cases() -> list[Case]:
    special = {
        "LBFGS": {"needs_closure": True},
        "SparseAdam": {"sparse": True},
        "Muon": {"matrices_only": True},
    }
    classes = [
        cls
        for cls in vars(torch.optim).values()
        if inspect.isclass(cls)
        and issubclass(cls, torch.optim.Optimizer)
        and cls is not torch.optim.Optimizer
    ]
    cases = []
    for cls in classes:
        accepted = inspect.signature(cls).parameters
        options = [{o: True} for o in ("foreach", "fused") if o in accepted]
        if "foreach" in accepted:
            options.insert(0, {"foreach": False})
        for option in options or [{}]:
            cases.append(Case(cls, {"lr": 0.05, **option}, **special.get(cls.__name__, {})))
    momentum = {"lr": 0.05, "momentum": 0.9, "foreach": False}
    return [*cases, Case(torch.optim.SGD, momentum), Case(torch.optim.RMSprop, momentum)]


CASES = _cases()
ADAM, ADAMW = (Case(cls, {"lr": 0.05}) for cls in (torch.optim.Adam, torch.optim.AdamW))
every_optimizer = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
