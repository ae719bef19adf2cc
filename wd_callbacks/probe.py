"""What an optimizer makes of a decay from outside: found out by a look and steps of copies."""

from __future__ import annotations

import copy
import inspect
import io
import math
import random
import sys
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from types import FunctionType, MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from wd_callbacks.arguments import WD_KEYS, Group, wd_key

Weights: TypeAlias = list[Tensor]

SETUP = 8  # steps: RAdam, for one, warms up over the first ones
STEPS, SMALL_LR, KEPT = 30, 1e-4, 0.4  # of the trials whether a decay lasts
LR, WD = 1e-2, 0.1  # of the trials what else the optimizer does
HALF = (torch.float16, torch.bfloat16)


def check_hooks(optimizer: Optimizer) -> None:
    """Refuses what torch's step hooks do not reach.

    Raises:
        TypeError: It is no ``torch.optim.Optimizer``.
        ValueError: Its ``step`` never runs hooks.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {name}{_instead(optimizer)}"
        )
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            f"{name} with overlap_with_ddp=True makes its updates inside backward, where step "
            f"hooks do not run: use overlap_with_ddp=False"
        )
    if not getattr(type(optimizer).step, "hooked", False) or not all(
        hasattr(optimizer, f"_optimizer_{hooks}_hooks")
        for hooks in ("step_pre", "step_post", "state_dict_pre")
    ):
        raise ValueError(
            f"{name} never runs torch's step hooks, as it does not call "
            f"torch.optim.Optimizer.__init__: attach the decay to {_base(optimizer)}"
        )


def check_weights(optimizer: Optimizer) -> None:
    """Refuses an optimizer on which decay from outside would be lost or wrong.

    Raises:
        ValueError: It puts back decayed weights, averages them with others, or updates others.
    """
    # Of these there may be copies in float32.
    has_half = any(p.dtype in HALF for p in _params(optimizer))
    if _undoes_decay(optimizer) or (has_half and _undoes_decay(optimizer, half=True)):
        raise ValueError(
            f"{type(optimizer).__name__} undoes a decay right before its update: it puts back "
            f"earlier weights (as SAM does), or holds a second copy that the decay does not reach "
            f"(as schedule-free optimizers do, and some for weights in half precision). Use its "
            f"own weight decay, or attach the decay to {_base(optimizer)}"
        )


def remarks(optimizer: Optimizer, by_lr: bool) -> list[str]:
    """What a user should know of this optimizer when its own weight decay is replaced by ours.

    Where its miniatures cannot be built or cannot step, nothing is said.

    Args:
        optimizer: Any that ``check_weights`` does not refuse.
        by_lr: Whether the decay is in proportion to the param groups' learning rate.
    """
    try:
        with _quietly():
            return list(_remarks(optimizer, type(optimizer).__name__, by_lr))
    except Exception:
        return []


def _remarks(optimizer: Optimizer, name: str, by_lr: bool) -> Iterator[str]:
    if any("d" in group and "betas" in group for group in optimizer.param_groups):
        if by_lr:
            yield (
                f"{name} learns a factor 'd' of its learning rate, and the decay leaves it out: "
                f"give scale_by=lambda group: group['lr'] * group['d']"
            )
        return  # with a 'd' that starts tiny, its steps tell nothing more
    *_, start, first, _, end = _walk(optimizer)
    if _distance(end, start) == 0:
        return
    if by_lr and _are_alike(_walk(optimizer, lr=2 * LR)[-1], end, start, 0.01):
        yield (
            f"{name} makes the same update at any learning rate of its param groups, in proportion "
            f"to which its weights will decay: give scale_by a callable from the param group to "
            f"the real one, or 'none'"
        )
    still = _walk(optimizer, noise=0.0)
    if any(_shrink([after], [p]) > 3e-6 for after, p in zip(still[-1], still[0])):
        yield (
            f"{name} decays its weights also where the weight decay of its param groups is 0, and "
            f"the decay that is attached comes on top of that"
        )
    if any(wd_key(group) is not None for group in optimizer.param_groups):
        yield from _of_its_own(optimizer, name, by_lr, start, first, end)


def _of_its_own(
    optimizer: Optimizer, name: str, by_lr: bool, start: Weights, first: Weights, end: Weights
) -> Iterator[str]:
    """What is to be said of an optimizer's own weight decay, seeing where it goes without one."""
    if not _are_alike(_walk(optimizer, wd=1e-30)[-1], end, start, 1e-3):
        yield (
            f"{name} leaves a part of its update out where its own weight decay is 0, as it is "
            f"while this one is attached (LARS and LAMB do so with their trust ratio, unless told "
            f"otherwise)"
        )
        return
    *_, own_first, _, own = _walk(optimizer, wd=WD)
    factors = dict.fromkeys(range(SETUP, SETUP + 3), 1 - LR * WD)
    decoupled, l2 = _walk(optimizer, factors=factors)[-1], _walk(optimizer, l2=WD)[-1]
    if any(_are_alike(own, known, end, 0.1) for known in (decoupled, l2)):
        return
    if _are_alike(own, end, start, 1e-4):
        return  # it makes nothing of it
    rate, rate_first = _shrink(own, end) / 3, _shrink(own_first, first)
    if not (rate and math.isclose(rate, rate_first, rel_tol=0.1)):
        yield (
            f"{name}'s own weight decay is neither L2 nor decoupled on all weights (it may be part "
            f"of a trust ratio, or spare vectors): while this one is attached, that is left out"
        )
    elif by_lr:
        yield (
            f"{name}'s own weight decay takes {rate / (LR * WD):.3g} times lr * wd in a step: if "
            f"this one is to do so too, give scale_by a callable from the param group to a number"
        )


def _inner(optimizer: Any) -> str | None:
    """The attribute in which a wrapper holds the optimizer that it wraps."""
    held = (name for name, value in vars(optimizer).items() if isinstance(value, Optimizer))
    return next(held, None)


def _base(optimizer: Optimizer) -> str:
    """What to attach the decay to instead of a wrapper, for a message."""
    name = _inner(optimizer)
    return f"its {name!r}" if name else "the optimizer that it wraps, if it wraps one"


def _instead(thing: Any) -> str:
    """What to use instead of something that is no optimizer but may hold one, for a message."""
    name = _inner(thing) if hasattr(thing, "__dict__") and hasattr(thing, "param_groups") else None
    if name is None:
        return ""
    if name != "optimizer":
        return f": attach the decay to its {name!r}"
    return (
        ", which may update other copies of the weights, as DeepSpeed's does: use AdamW's own "
        "weight decay, or shard with torch's fully_shard (Lightning's ModelParallelStrategy)"
    )


def _undoes_decay(optimizer: Optimizer, half: bool = False) -> bool:
    """Whether a decay right before an update is lost in it, or in the updates that follow.

    Tried on miniatures of the optimizer that see the same gradients, one of which is halved once:
    of the difference, Lookahead keeps half, and what puts back or averages keeps less. A wrapper
    may put back at some steps only, as LookSAM does, so there each one is tried. Where they cannot
    be built or cannot step, nothing is held against the optimizer.

    Args:
        optimizer: The optimizer, which is left alone.
        half: Whether weights in half precision stay so.
    """

    def is_lost(at: int, steps: int) -> bool:
        halved = _walk(optimizer, steps, lr=SMALL_LR, factors={at: 0.5}, half=half)
        return any(
            bool(((a - b) * p).sum() / (0.5 * (p * p).sum()) < KEPT)
            for p, a, b in zip(whole[at], whole[steps], halved[-1])
        )

    try:
        with _quietly():
            # A large learning rate would drown the difference.
            whole = _walk(optimizer, STEPS, lr=SMALL_LR, half=half)
            return is_lost(3, STEPS) or (
                _inner(optimizer) is not None and any(is_lost(at, at + 1) for at in range(3, STEPS))
            )
    except Exception:
        return False


def _are_alike(a: Weights, b: Weights, start: Weights, within: float) -> bool:
    """Whether ``a`` is nearer to ``b`` than ``within`` of what ``b`` is from ``start``."""
    return _distance(a, b) < within * _distance(b, start)


def _shrink(shrunk: Weights, whole: Weights) -> float:
    """By which part of themselves the weights shrank; 0.0 where that is not all that they did."""
    part = sum(_dot(w - s, w) for s, w in zip(shrunk, whole)) / sum(_dot(w, w) for w in whole)
    due = [w * (1 - part) for w in whole]
    return part if _are_alike(due, shrunk, whole, 0.1) else 0.0


def _distance(a: Weights, b: Weights) -> float:
    return math.sqrt(sum(_dot(x - y, x - y) for x, y in zip(a, b)))


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())


@contextmanager
def _quietly() -> Iterator[None]:
    """No output and no change of the random states reach the user, and nothing is compiled."""
    numpy, state = sys.modules.get("numpy"), random.getstate()
    numpy_state = numpy and numpy.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(random.setstate, state)
        if numpy:
            stack.callback(numpy.random.set_state, numpy_state)
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):  # torch 2.6
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _seed() -> None:
    """Makes what is random in a step the same in each walk, with no word to other devices."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


class _Apart(TorchFunctionMode):
    """Refuses to touch the real weights, which a step may reach through a global or a closure."""

    def __init__(self, real: Mapping[int, Any]) -> None:
        super().__init__()
        self._real = real.keys()  # their ids

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for each in (args, *[arg for arg in args if isinstance(arg, list)]):
            if not self._real.isdisjoint(map(id, each)):
                raise TypeError("a step of the copy reaches the real weights")
        return func(*args, **(kwargs or {}))


def _walk(
    optimizer: Optimizer,
    steps: int = SETUP + 3,
    *,
    lr: float = LR,
    wd: float = 0.0,
    factors: Mapping[int, float] = MappingProxyType({}),
    l2: float = 0.0,
    noise: float = 1.0,
    half: bool = False,
) -> list[Weights]:
    """Where some steps take a miniature of the optimizer; the first ones only set up its state.

    Args:
        optimizer: The optimizer, which is left alone.
        steps: Their number.
        lr: The learning rate of the param groups.
        wd: After setup, the weight decay of those that have one.
        factors: From the index of a step to what the weights are multiplied by before its update.
        l2: After setup, the coefficient of an L2 term of the gradients.
        noise: What the gradients, the same in each walk, are multiplied by.
        half: Whether weights in half precision stay so; else all are in single precision.

    Returns:
        The weights before the first step and after each.

    Raises:
        ArithmeticError: They do not stay finite.
    """
    _seed()
    memo: dict[int, Any] = {}
    twin = _miniature(optimizer, memo, half)
    for group in twin.param_groups:
        if "lr" in group:  # a warmup may start from 0
            old = group["lr"]
            group["lr"] = torch.full_like(old, lr) if isinstance(old, Tensor) else lr
    trail = [_weights(twin)]
    closes = "closure" in inspect.signature(type(twin).step).parameters
    for step in range(steps):
        in_force = float(step >= SETUP)
        for group in twin.param_groups:
            group.update({key: in_force * wd for key in WD_KEYS if key in group})
        with _Apart(memo):
            closes = _step(twin, closes, step, factors.get(step, 1.0), in_force * l2, noise)
        trail.append(_weights(twin))
    if not all(p.isfinite().all() for p in trail[-1]):
        raise ArithmeticError
    return trail


def _miniature(optimizer: Optimizer, memo: dict[int, Any], half: bool) -> Optimizer:
    """A copy without state and hooks that has a tiny weight for each kind in a param group."""
    twin: Optimizer = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    memo[id(optimizer.state)] = defaultdict(dict)
    for group in optimizer.param_groups:
        tiny: dict[Any, Tensor] = {}
        for p in group["params"]:
            kind = _kind(p, half)
            if kind not in tiny:
                tiny[kind] = memo[id(p)] if id(p) in memo else _tiny(*kind)
            memo.setdefault(id(p), tiny[kind])
        memo[id(group["params"])] = list(tiny.values())
    groups = optimizer.param_groups
    memo[id(groups)] = [copy.deepcopy(group, memo) for group in _of_each_kind(groups, half)]
    # Learning rate schedulers put a function of the real optimizer in the place of `step`.
    attributes = {name: value for name, value in vars(optimizer).items() if name != "step"}
    for value in attributes.values():
        if isinstance(value, Optimizer) and id(value) not in memo:
            _miniature(value, memo, half)
        if isinstance(value, FunctionType) and value.__closure__:
            raise TypeError("a closure may hold the real weights")
    for name, value in attributes.items():
        hooks = name.endswith("_hooks")
        vars(twin)[name] = OrderedDict() if hooks else copy.deepcopy(value, memo)
    if hasattr(twin, "train"):
        twin.train()
    return twin


def _of_each_kind(groups: Sequence[Group], half: bool) -> list[Group]:
    """One of the param groups that differ in no more than numbers, names and weights."""

    def kind(group: Group) -> Any:
        settings = [
            (key, _trait(value))
            for key, value in group.items()
            if key != "params" and "name" not in key
        ]
        return tuple(settings), frozenset(_kind(p, half) for p in group["params"])

    return list({kind(group): group for group in groups}.values())


def _trait(value: Any) -> Any:
    """What may make an optimizer take another path."""
    if isinstance(value, Tensor):
        return Tensor
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return bool(value) if is_number else repr(value)


def _kind(p: Tensor, half: bool) -> tuple[int, torch.dtype]:
    """The dimensions and the dtype that the tiny weight for ``p`` has."""
    return p.ndim, p.dtype if half and p.dtype in HALF else torch.float32


def _tiny(ndim: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """Weights that differ, as some optimizers normalize them."""
    weights = torch.linspace(0.5, 1.5, 2**ndim, device="cpu", dtype=dtype)
    weights[1::3] *= -1
    return torch.nn.Parameter(weights.reshape((2,) * ndim))


def _weights(optimizer: Optimizer) -> Weights:
    return [p.detach().clone() for p in _params(optimizer)]


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _step(twin: Optimizer, closes: bool, seed: int, factor: float, l2: float, noise: float) -> bool:
    """A step of which the first evaluation of the closure ends with a decay by ``factor``.

    Returns:
        Whether it was given a closure, as ``closes`` wants it, and made something of it.
    """
    factors = [factor]

    def backward() -> None:
        generator = torch.Generator().manual_seed(seed)
        for group in twin.param_groups:
            sign = -1 if group.get("maximize") else 1
            for p in group["params"]:
                gradient = torch.randn(p.shape, generator=generator, device="cpu").to(p.dtype)
                p.grad = noise * gradient + sign * l2 * p.detach()

    def closure() -> Tensor:
        with torch._C.DisableTorchFunction():  # this is no call of the optimizer's
            backward()
            if factors:
                for p in _params(twin):
                    p.data.mul_(factors[0])
                factors.clear()
            return torch.zeros(())

    if any(p.grad is None for p in _params(twin)):
        backward()  # SAM, for one, wants gradients before it evaluates its closure
    step = type(twin).step.__wrapped__  # type: ignore[attr-defined]  # without hooks for all optimizers
    if closes:
        step(twin, closure=closure)
    if factors:
        closure()
        step(twin)
        return False
    return closes
