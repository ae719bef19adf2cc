"""Compatibility checks: optimizers on which decay from outside is lost, or is not what it seems.

Optimizers of ``torch.optim`` are known to be fine. Any other one is simulated: a toy copy with tiny
weights makes at most 40 steps. The result is cached per class and settings.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from wd_callbacks.core.groups import WD_KEYS, wd_key
from wd_callbacks.core.toys import (
    HALF,
    Simulation,
    Toy,
    Weights,
    attributes,
    isolated,
    kind_of,
    params_of,
    trait,
)

STEPS = 11  # of the check whether decay is lost: LookSAM restores weights in every tenth step only
SETUP = 6  # steps before the other checks: RAdam warms up over the first five
KEPT = 0.4  # of a decay; Lookahead keeps half of it, and is fine
SMALL_LR = 1e-4  # of the check whether decay is lost: larger updates would hide the decay
LR, WD = 7e-3, 0.1  # of the other checks; no usual lr, as some optimizers compare it to their first


NO_OPTIMIZER = (
    ". DecoupledWD of wd_callbacks.torch takes the optimizer first; for a callback, import "
    "DecoupledWD from wd_callbacks.fastai, wd_callbacks.lightning or wd_callbacks.transformers"
)


def check_hooks(optimizer: Any) -> None:
    """Check that torch's step hooks run when ``optimizer`` steps.

    Raises:
        TypeError: If it is not a ``torch.optim.Optimizer``.
        ValueError: If its ``step`` never runs hooks.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        instead = _instead(optimizer) if hasattr(optimizer, "param_groups") else NO_OPTIMIZER
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {name}{instead}")
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            f"{name} with overlap_with_ddp=True updates the weights inside backward, where no step "
            f"hooks run: pass overlap_with_ddp=False"
        )
    if not getattr(type(optimizer).step, "hooked", False) or not all(
        hasattr(optimizer, f"_optimizer_{hooks}_hooks")
        for hooks in ("step_pre", "step_post", "state_dict_pre")
    ):
        inner = _inner_name(optimizer)
        raise ValueError(
            f"{name} never runs step hooks, so nothing would decay (it does not call "
            f"torch.optim.Optimizer.__init__): "
            + (f"attach to its {inner!r}" if inner else "call super().__init__ in its __init__")
        )


def check_compatible(optimizer: Optimizer, follows_lr: bool) -> list[str]:
    """Check what becomes of decay from outside; return compatibility warnings.

    The optimizer, its weights and the random states stay as they are. If toy copies cannot be
    built or cannot step, there is neither an error nor a warning.

    Args:
        optimizer: An optimizer that passed ``check_hooks``.
        follows_lr: True if the decay is proportional to the learning rate of the param groups.

    Raises:
        ValueError: If the optimizer restores earlier weights (SAM), averages them with others
            (schedule-free), or updates float32 copies of half-precision weights.
    """
    if f"{type(optimizer).__module__}.".startswith("torch.optim."):
        return _torch_warnings(optimizer)
    verdict = _verdict(optimizer, follows_lr)
    if verdict.is_lost:
        raise ValueError(_refusal(optimizer))
    return list(verdict.warnings)


def _torch_warnings(optimizer: Optimizer) -> list[str]:
    """Return the warnings for a class of ``torch.optim``: only ASGD decays by itself (lambd)."""
    lambd = next((g["lambd"] for g in optimizer.param_groups if g.get("lambd")), None)
    if not isinstance(optimizer, torch.optim.ASGD) or lambd is None:
        return []
    return [
        f"ASGD decays its weights by itself (lambd={lambd}), so they decay twice: pass "
        f"lambd=0 to ASGD"
    ]


def _refusal(optimizer: Optimizer) -> str:
    name, inner = type(optimizer).__name__, _inner_name(optimizer)
    if inner:
        instead = f"attach to its {inner!r}"
    elif any(wd_key(group) is not None for group in optimizer.param_groups):
        instead = f"use the weight decay of {name} itself"
    else:
        instead = "use another optimizer"
    return (
        f"{name} would lose decay from outside: it restores earlier weights in its step (as SAM "
        f"does), averages them with others (as schedule-free optimizers do), or updates float32 "
        f"copies of half-precision weights. Instead, {instead}"
    )


def _inner_name(thing: Any) -> str | None:
    """Return the attribute in which a wrapper holds an optimizer; None if there is none."""
    held = {**getattr(thing, "__dict__", {}), "optimizer": getattr(thing, "optimizer", None)}
    for name, value in held.items():
        if isinstance(value, Optimizer):
            return str(name)
        if hasattr(value, "param_groups") and value is not thing:  # a wrapper of a wrapper
            inner = _inner_name(value)
            if inner is not None:
                return f"{name}.{inner}"
    return None


def _instead(thing: Any) -> str:
    """Return the advice for a wrapper that is not an Optimizer itself; empty if there is none."""
    inner = _inner_name(thing)
    if inner is None or not hasattr(thing, "param_groups"):
        return ""
    if "deepspeed" in f"{type(thing).__module__}.{type(thing).__name__}".lower():
        return (
            ". DeepSpeed may update other copies of the weights than its 'optimizer' holds: "
            "use AdamW's own weight decay, or shard with torch's fully_shard (Lightning's "
            "ModelParallelStrategy)"
        )
    return f": attach to its {inner!r}"


# The cache: nothing in it refers to an optimizer or a weight


@dataclass(frozen=True)
class _Verdict:
    is_lost: bool
    warnings: tuple[str, ...] = ()


_verdicts: WeakKeyDictionary[type, dict[Hashable, _Verdict]] = WeakKeyDictionary()


def _verdict(optimizer: Optimizer, follows_lr: bool) -> _Verdict:
    """Return the verdict on optimizers of this class with these settings, simulated once."""
    known = _verdicts.setdefault(type(optimizer), {})
    try:
        key = follows_lr, _settings(optimizer, {id(p) for p in params_of(optimizer)})
    except (TypeError, RecursionError):  # settings that cannot be compared
        return _simulate(optimizer, follows_lr) or _Verdict(False)
    if key not in known:
        verdict = _simulate(optimizer, follows_lr)
        if verdict is None:
            return _Verdict(False)
        known[key] = verdict
    return known[key]


def _settings(value: Any, weights: Set[int]) -> Hashable:
    """Return the part of ``value`` that may change the verdict: comparable, without references.

    Args:
        value: The optimizer, or something in it.
        weights: The ids of the optimizer's weights.

    Raises:
        TypeError: If nothing comparable stands for ``value``.
    """
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return type(value).__name__, value
    if isinstance(value, type):
        return weakref.ref(value)
    if isinstance(value, Tensor) and id(value) in weights:
        return kind_of(value, half=True)
    if isinstance(value, (list, tuple)):
        entries = [_settings(each, weights) for each in value]
        all_weights = all(id(each) in weights for each in value)
        return tuple(dict.fromkeys(entries)) if all_weights else tuple(entries)
    if isinstance(value, Mapping):
        is_group = "params" in value
        overwritten = ("lr", *WD_KEYS) if is_group else ()  # by those of toy copies
        return tuple(
            (key, trait(each) if key in overwritten else _settings(each, weights))
            for key, each in value.items()
            if not (is_group and "name" in key)
        )
    if isinstance(value, Optimizer):
        inner = {key: each for key, each in attributes(value) if key != "state"}
        return weakref.ref(type(value)), _settings(inner, weights)
    raise TypeError


# The checks


def _simulate(optimizer: Optimizer, follows_lr: bool) -> _Verdict | None:
    """Let toy copies step; return None if they cannot."""
    try:
        with isolated():
            simulation = Simulation(optimizer)
            if _loses_decay(simulation):
                return _Verdict(True)
            found: list[str] = []
            with suppress(Exception):
                found.extend(_warnings(simulation.toy(LR), follows_lr))
            return _Verdict(False, tuple(found))
    except Exception:
        return None


def _loses_decay(simulation: Simulation) -> bool:
    """Return True if decay from outside is lost.

    There may be float32 copies of half-precision weights: if there are any, they count.
    """
    if any(p.dtype in HALF for p in params_of(simulation.optimizer)):
        with suppress(Exception):
            return _restores(simulation, half=True)
    return _restores(simulation)


def _restores(simulation: Simulation, half: bool = False) -> bool:
    """Return True if steps restore weights from before a decay, or average it away.

    Of two toy copies, one decays by a half once. Of the difference, Lookahead keeps half, averages
    less. Later both shrink and grow in turns: a step that restores weights lets neither the weights
    nor the difference do so.
    """
    toy, decayed = simulation.toy(SMALL_LR, half), simulation.toy(SMALL_LR, half)
    toy.step()
    decayed.step()
    whole, halved = toy.step(), decayed.step(factor=0.5)
    for index in range(2, STEPS):
        factor = 9 / 8 if index % 2 else 8 / 9
        before, whole = whole, toy.step(factor)
        half_before, halved = halved, decayed.step(factor)
        kept = _kept(before, whole, factor)
        kept_of_difference = _kept(_minus(before, half_before), _minus(whole, halved), factor)
        if any(max(pair) < KEPT for pair in zip(kept, kept_of_difference)):
            return True
    return min(_kept(whole, halved, 0.5)) < KEPT


def _kept(before: Weights, after: Weights, factor: float) -> list[float]:
    """Return by how much each weight changed, as a share of a multiplication by ``factor``."""
    return [
        _dot(a - b, b) / ((factor - 1) * _dot(b, b)) if b.any() else 1.0
        for b, a in zip(before, after)
    ]


def _warnings(toy: Toy, follows_lr: bool) -> Iterator[str]:
    name, groups = type(toy.optimizer).__name__, toy.optimizer.param_groups
    if any("d" in group and "betas" in group for group in groups):
        if follows_lr:
            yield (
                f"{name} multiplies its learning rate by a factor 'd' that it learns, but the "
                f"decay follows the learning rate alone: pass "
                f"scale_by=lambda group: group['lr'] * group['d']"
            )
        return  # a small 'd' hides the rest
    for _ in range(SETUP):
        toy.step()
    plain, doubled = toy.fork(), toy.fork(2 * LR)
    path = [toy.weights(), plain.step(), plain.step()]
    doubled_first, doubled_end = doubled.step(), doubled.step()
    if _distance(path[-1], path[0]) == 0:
        return
    if follows_lr and _are_alike(doubled_end, path[-1], path[0], 0.01):
        yield (
            f"{name} makes the same update at any learning rate of its param groups, but the decay "
            f"would follow that learning rate: pass scale_by='none', or a callable from the param "
            f"group to the real learning rate"
        )
        follows_lr = False
    if _decays_by_itself(toy.simulation.toy(LR)):
        yield (
            f"{name} decays its weights even at weight_decay=0, which DecoupledWD sets during "
            f"step, so they decay twice: turn that decay off in the arguments of {name}, or "
            f"pass a smaller wd"
        )
    if any(wd_key(group) is not None for group in groups):
        yield from _own_decay_warnings(toy, path, doubled_first if follows_lr else None)


def _decays_by_itself(toy: Toy) -> bool:
    """Return True if weights shrink without gradients."""
    start = toy.weights()
    end = toy.step(noise=0.0)
    return any(_shrink([after], [w], of=[w]) > 6e-7 for after, w in zip(end, start))


def _own_decay_warnings(toy: Toy, path: list[Weights], doubled: Weights | None) -> Iterator[str]:
    """Warn if the optimizer's own weight decay is neither decoupled nor L2.

    Args:
        toy: The toy copy after its set-up.
        path: Its weights then, and after one and two steps without weight decay.
        doubled: Its weights after one step at ``2 * LR``; None if the scale does not matter.
    """
    name, (start, first, end) = type(toy.optimizer).__name__, path
    if not _are_alike(toy.fork(wd=1e-30).step(), first, start, 1e-3):
        yield _left_out(toy.optimizer)
        return
    own = toy.fork(wd=WD)
    own_first, own_end = own.step(), own.step()
    rate, end_rate = _shrink(own_first, first, of=start), _shrink(own_end, end, of=first) / 2
    if _are_alike(own_end, end, start, 1e-4):
        return  # it ignores its weight decay
    if not (rate > 0 and math.isclose(end_rate, rate, rel_tol=0.1)):  # not decoupled
        yield from _other_kind(toy, own_end, end)
    elif doubled is not None and not math.isclose(rate, LR * WD, rel_tol=0.1):
        own_doubled = toy.fork(2 * LR, WD).step()
        yield _other_scale(name, rate, _shrink(own_doubled, doubled, of=start))


def _other_kind(toy: Toy, own: Weights, end: Weights) -> Iterator[str]:
    """Warn if ``own`` is not what two steps with L2 give, seeing that without any give ``end``."""
    name = type(toy.optimizer).__name__
    for options in ({"l2": WD}, {"factor": 1 - LR * WD}):
        known = toy.fork()
        known.step(**options)
        weights = known.step(**options)
        if _are_alike(own, weights, end, 0.1):
            return
        matrices_only = [w if w.ndim > 1 else e for w, e in zip(weights, end)]
        if _are_alike(own, matrices_only, end, 0.1):
            yield (
                f"{name}'s own weight decay leaves out vectors (biases and norms), but DecoupledWD "
                f"decays them as well: pass exclude='vector' to leave them out"
            )
            return
    yield (
        f"{name}'s own weight decay is neither L2 nor decoupled (it may decay a part of the "
        f"weights, or be part of a trust ratio), and DecoupledWD replaces it by decoupled decay: "
        f"use the weight decay of {name} itself if you want to keep it"
    )


def _left_out(optimizer: Optimizer) -> str:
    name = type(optimizer).__name__
    has_switch = any("always_adapt" in group for group in optimizer.param_groups)
    instead = "pass always_adapt=True" if has_switch else f"use the weight decay of {name} itself"
    return (
        f"{name} turns a part of its update off at weight_decay=0 (LAMB and LARS: their trust "
        f"ratio), which DecoupledWD sets during step: {instead} to keep that part"
    )


def _other_scale(name: str, rate: float, doubled_rate: float) -> str:
    """Return the warning that the own decay shrinks weights by ``rate`` in a step."""
    if math.isclose(doubled_rate, 4 * rate, rel_tol=0.05):
        max_lr = LR * LR * WD / rate
        scale = f"lr**2 / {max_lr:.3g} * wd"
        instead = f"scale_by='lr_squared' and max_lr={max_lr:.3g}"
    else:
        scale = f"{rate / (LR * WD):.3g} * lr * wd"
        instead = "a callable from the param group to a number as scale_by"
    return (
        f"{name}'s own weight decay shrinks weights by {scale} in a step, but DecoupledWD by "
        f"lr * wd: pass {instead} to keep that scale"
    )


def _are_alike(a: Weights, b: Weights, start: Weights, within: float) -> bool:
    """Return True if ``a`` is nearer to ``b`` than ``within`` of the way from ``start``."""
    return _distance(a, b) < within * _distance(b, start)


def _shrink(shrunk: Weights, whole: Weights, of: Weights) -> float:
    """Return the share of ``of`` that ``shrunk`` lacks; 0.0 if something else differs."""
    parts = zip(_minus(whole, shrunk), of)
    share = sum(_dot(difference, w) for difference, w in parts) / sum(_dot(w, w) for w in of)
    expected = [w - share * o for w, o in zip(whole, of)]
    return share if _are_alike(expected, shrunk, whole, 0.03) else 0.0


def _distance(a: Weights, b: Weights) -> float:
    return math.sqrt(sum(_dot(difference, difference) for difference in _minus(a, b)))


def _minus(a: Weights, b: Weights) -> Weights:
    return [x - y for x, y in zip(a, b)]


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())
