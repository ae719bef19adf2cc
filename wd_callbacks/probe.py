"""Whether decay from outside reaches the weights of an optimizer: by a look and a trial step."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict, defaultdict
from types import FunctionType
from typing import Any

import torch
from torch.optim import Optimizer

from wd_callbacks.arguments import WD_KEYS


def check_hooks(optimizer: Optimizer) -> None:
    """Refuses what torch's step hooks do not reach.

    Raises:
        TypeError: It is no ``torch.optim.Optimizer``.
        ValueError: Its ``step`` never runs hooks.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if not getattr(type(optimizer).step, "hooked", False) or not all(
        hasattr(optimizer, f"_optimizer_{hooks}_hooks")
        for hooks in ("step_pre", "step_post", "state_dict_pre")
    ):
        raise ValueError(
            f"{type(optimizer).__name__} never runs torch's step hooks, as it does not call "
            f"torch.optim.Optimizer.__init__: attach the decay to {_inner(optimizer)}"
        )


def check_weights(optimizer: Optimizer) -> None:
    """Refuses an optimizer on which decay from outside would be lost or wrong.

    Raises:
        ValueError: It puts back decayed weights, or averages them with others.
    """
    if _undoes_decay(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} undoes a decay right before its update: it puts back "
            f"earlier weights (as SAM does) or averages with a second copy that the decay does not "
            f"reach (as schedule-free optimizers do). Use its own weight decay, or attach the "
            f"decay to {_inner(optimizer)}"
        )


def _inner(optimizer: Optimizer) -> str:
    """What to attach the decay to instead of a wrapper, for a message."""
    for attribute, value in vars(optimizer).items():
        if isinstance(value, Optimizer):
            return f"its {attribute!r}"
    return "the optimizer that it wraps, if it wraps one"


LR, STEPS, KEPT = 1e-4, 30, 0.4


def _undoes_decay(optimizer: Optimizer) -> bool:
    """Whether a decay right before an update is lost in the updates that follow.

    Tried on two miniatures of the optimizer that see the same gradients, one of which is halved
    once: of the difference, Lookahead keeps half, and what puts back or averages keeps less. Where
    they cannot be built or cannot step, nothing is held against the optimizer.
    """
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            ends = []
            for factor in (1.0, 0.5):
                torch.manual_seed(0)
                twin = _miniature(optimizer, {})
                for step in range(STEPS):
                    if step == 3:  # the first ones set up its state
                        before = [p.detach().clone() for p in _weights(twin)]
                    _step(twin, factor if step == 3 else 1.0, step)
                ends.append([p.detach() for p in _weights(twin)])
            return any(
                bool(((whole - halved) * p).sum() / (0.5 * (p * p).sum()) < KEPT)
                for whole, halved, p in zip(*ends, before)
            )
    except Exception:
        return False


def _miniature(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """A copy without state and hooks that has one tiny weight per param group."""
    twin: Optimizer = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    memo[id(optimizer.state)] = defaultdict(dict)
    for group in optimizer.param_groups:
        if id(group["params"]) not in memo:
            tiny = [_tiny(p.ndim) for p in group["params"][:1]]
            memo |= {id(p): tiny[0] for p in group["params"]} | {id(group["params"]): tiny}
    # Learning rate schedulers put a function of the real optimizer in the place of `step`.
    attributes = {name: value for name, value in vars(optimizer).items() if name != "step"}
    for value in attributes.values():
        if isinstance(value, Optimizer) and id(value) not in memo:
            _miniature(value, memo)
        if isinstance(value, FunctionType) and value.__closure__:
            raise TypeError("a closure may hold the real weights")
    for name, value in attributes.items():
        hooks = name.endswith("_hooks")
        vars(twin)[name] = OrderedDict() if hooks else copy.deepcopy(value, memo)
    for group in twin.param_groups:
        group.update({key: 0.0 for key in WD_KEYS if key in group})
        if "lr" in group:  # a warmup may start from 0, and a large one drowns the difference
            lr = group["lr"]
            group["lr"] = torch.full_like(lr, LR) if isinstance(lr, torch.Tensor) else LR
    if hasattr(twin, "train"):
        twin.train()
    return twin


def _tiny(ndim: int) -> torch.nn.Parameter:
    """Weights that differ, as some optimizers normalize them."""
    weights = torch.linspace(0.5, 1.5, 2**ndim, device="cpu")
    weights[1::3] *= -1
    return torch.nn.Parameter(weights.reshape((2,) * ndim))


def _weights(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _step(twin: Optimizer, factor: float, seed: int) -> None:
    """A step of which the first evaluation of the closure ends with a decay by ``factor``."""
    factors = [factor]

    def closure() -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        for p in _weights(twin):
            p.grad = torch.randn(p.shape, generator=generator, device="cpu")
            p.data.mul_(factors[0] if factors else 1.0)
        factors.clear()
        return torch.zeros(())

    step = type(twin).step.__wrapped__  # type: ignore[attr-defined]  # without hooks for all optimizers
    if "closure" in inspect.signature(step).parameters:
        step(twin, closure=closure)
    if factors:  # it takes no closure, or makes nothing of it
        closure()
        step(twin)
