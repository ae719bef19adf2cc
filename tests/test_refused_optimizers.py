"""Optimizers on which decay from outside would be lost are refused, and left as they were."""

from __future__ import annotations

import warnings

import pytest
import schedulefree
import torch
from helpers import WithoutHooks, comparable, params_of, zero_gradients
from torch import nn

from wd_callbacks.torch import DecoupledWD

LR, WD = 0.05, 0.1


class MarkedAsHooked(WithoutHooks):
    """As timm's Lookahead, whose ``zero_grad`` marks its ``step`` as one that runs hooks."""

    def __init__(self, base):
        super().__init__(base)
        self._optimizer_step_pre_hooks = {}


class LightningOptimizer:
    """Named as Lightning's wrapper."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


class SAM(torch.optim.Optimizer):
    """Foret et al. (arXiv 2010.01412): climbs, evaluates there, and steps from where it was."""

    def __init__(self, params, base=torch.optim.SGD, **options):
        super().__init__(params, options)
        self.base = base(self.param_groups, **options)

    @torch.no_grad()
    def step(self, closure):
        params = [p for p in params_of(self) if p.grad is not None]
        before = [p.clone() for p in params]
        for p in params:
            p.add_(p.grad, alpha=0.05)
        torch.enable_grad()(closure)()
        for p, q in zip(params, before):
            p.copy_(q)
        self.base.step()


class FirstStepSAM(SAM):
    """Climbs by the gradients that are there, as the most used implementation does."""

    def step(self, closure):
        torch.stack([p.grad.norm() for p in params_of(self) if p.grad is not None])
        super().step(closure)


class LookSAM(SAM):
    """Liu et al. (arXiv 2203.02714): climbs at every tenth step only."""

    calls = 0

    def step(self, closure):
        self.calls += 1
        if self.calls % 10:
            closure()
            self.base.step()
        else:
            super().step(closure)


class WSAM(SAM):
    """Yue et al. (arXiv 2305.15817): evaluates before it climbs, and takes back just the climb."""

    @torch.no_grad()
    def step(self, closure):
        torch.enable_grad()(closure)()
        params = [p for p in params_of(self) if p.grad is not None]
        climbs = [0.05 * p.grad for p in params]
        for p, climb in zip(params, climbs):
            p.add_(climb)
        torch.enable_grad()(closure)()
        for p, climb in zip(params, climbs):
            p.sub_(climb)
        self.base.step()


class Lookahead(torch.optim.SGD):
    """Zhang et al. (arXiv 1907.08610): every few steps half the way back to slow weights."""

    def step(self, closure=None):
        super().step(closure)
        for p in params_of(self):
            slow = self.state[p].setdefault("slow", p.detach().clone())
            count = self.state[p]["count"] = self.state[p].get("count", 0) + 1
            if count % 5 == 0:
                p.data.copy_(slow.add_(p.data - slow, alpha=0.5))


class Copies(torch.optim.SGD):
    """Updates copies of half-precision weights in single precision."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in params_of(self):
            if p.grad is not None:
                master = self.state[p].setdefault("master", p.detach().float().clone())
                master = master if self.copies(p) else p
                master.sub_(p.grad, alpha=LR)
                p.copy_(master)

    def copies(self, p):
        return p.dtype != torch.float32


class CopiesOfMatrices(Copies):
    def copies(self, p):
        return p.ndim == 2


def sgd(params):
    return torch.optim.SGD(params, lr=LR)


def with_scheduler(optimizer):
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return optimizer


def zeroed(optimizer):
    optimizer.zero_grad()
    return optimizer


def empty_group_first(params):
    return [{"params": []}, {"params": list(params)}]


def in_bfloat16(params, groups=False):
    params = [*params, nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    return [{"params": [p]} for p in params] if groups else params


NO_OPTIMIZER = r"torch\.optim\.Optimizer, got "
HOOKS, UNDOES = r"hooks.*'base'", "undoes a decay"
COPY = "second copy.*half"
FREE = schedulefree
OPTIMIZERS = [  # from a list of parameters to what is given as optimizer
    (lambda ps: None, TypeError, NO_OPTIMIZER + "NoneType"),
    (lambda ps: torch.optim.SGD, TypeError, NO_OPTIMIZER + "type"),
    (lambda ps: [sgd(ps)], TypeError, NO_OPTIMIZER + "list"),
    (lambda ps: nn.Linear(1, 1), TypeError, NO_OPTIMIZER + "Linear"),
    (lambda ps: 1e-4, TypeError, NO_OPTIMIZER + "float"),
    (lambda ps: torch.optim.lr_scheduler.ConstantLR(sgd(ps)), TypeError, "ConstantLR"),
    (lambda ps: LightningOptimizer(None), TypeError, NO_OPTIMIZER + "NoneType"),
    (lambda ps: FREE.ScheduleFreeWrapper(sgd(ps)), TypeError, "got ScheduleFreeWrapper.*'base'"),
    (lambda ps: WithoutHooks(sgd(ps)), ValueError, f"WithoutHooks.*{HOOKS}"),
    (lambda ps: LightningOptimizer(WithoutHooks(sgd(ps))), ValueError, f"WithoutHooks.*{HOOKS}"),
    (lambda ps: zeroed(MarkedAsHooked(sgd(ps))), ValueError, f"MarkedAsHooked.*{HOOKS}"),
    (lambda ps: SAM(ps, lr=LR), ValueError, f"SAM {UNDOES}.*'base'"),
    (lambda ps: FirstStepSAM(ps, lr=LR), ValueError, f"FirstStepSAM {UNDOES}.*'base'"),
    (lambda ps: LookSAM(ps, lr=LR), ValueError, f"LookSAM {UNDOES}.*'base'"),
    (lambda ps: FREE.AdamWScheduleFree(ps), ValueError, f"AdamWScheduleFree {UNDOES}"),
    (lambda ps: FREE.RAdamScheduleFree(ps), ValueError, f"RAdamScheduleFree {UNDOES}"),
    (lambda ps: FREE.SGDScheduleFree(ps, lr=0.0), ValueError, f"SGDScheduleFree {UNDOES}"),
    (lambda ps: with_scheduler(FREE.SGDScheduleFree(ps, lr=LR)), ValueError, UNDOES),
    (lambda ps: FREE.SGDScheduleFree(empty_group_first(ps), lr=LR), ValueError, UNDOES),
    (lambda ps: Copies(in_bfloat16(ps), lr=LR), ValueError, COPY),
    (lambda ps: Copies(in_bfloat16(ps, groups=True), lr=LR), ValueError, COPY),
    (lambda ps: CopiesOfMatrices(ps, lr=LR), ValueError, COPY),
    (lambda ps: CopiesOfMatrices(ps[::-1], lr=LR), ValueError, COPY),
]


@pytest.mark.parametrize(("build", "error", "pattern"), OPTIMIZERS)
def test_optimizers_that_are_refused(build, error, pattern):  # P5, P10
    model = nn.Linear(3, 3)
    thing, before = build(list(model.parameters())), comparable(model.state_dict())
    rng = torch.get_rng_state()
    with pytest.raises(error, match=pattern):
        DecoupledWD(thing, WD)
    assert comparable(model.state_dict()) == before
    assert all(p.grad is None for p in model.parameters())
    assert not getattr(thing, "state", None)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize(
    "build",
    [
        lambda ps: Lookahead(ps, lr=LR),
        lambda ps: WSAM(ps, lr=LR),
        lambda ps: WithoutHooks(sgd(ps)).base,
        lambda ps: LightningOptimizer(sgd(ps)).optimizer,
        lambda ps: Copies(ps, lr=LR),
        lambda ps: CopiesOfMatrices(ps[1:], lr=LR),
    ],
)
def test_optimizers_that_are_not_refused(build):  # P1, P5
    params = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    optimizer = build(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        DecoupledWD(optimizer, 0.5)
    zero_gradients(params)
    optimizer.step(*[lambda: zero_gradients(params)] if isinstance(optimizer, SAM) else [])
    for p in params_of(optimizer):
        assert torch.equal(p.data, torch.full_like(p, 0.975))
