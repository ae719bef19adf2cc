"""Toy copies of an optimizer: tiny weights that make a few steps, apart from the real ones."""

from __future__ import annotations

import copy
import inspect
import io
import random
import sys
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from wd_callbacks.core.groups import WD_KEYS, Group

Weights: TypeAlias = list[Tensor]

MAX_STEPS = 40  # of all toy copies of an optimizer together
SEED = 2  # of the gradients; 246 optimizers get the same verdicts with 1 to 4
HALF = (torch.float16, torch.bfloat16)


class Simulation:
    """Toy copies of one optimizer, which make at most ``MAX_STEPS`` steps together."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.takes_closure = "closure" in inspect.signature(type(optimizer).step).parameters
        self.steps_left = MAX_STEPS
        self._real: set[int] = set()  # ids of what a step of a toy copy must not touch

    def toy(self, lr: float, half: bool = False) -> Toy:
        """Return a toy copy without state; half-precision weights stay so if ``half``."""
        memo: dict[int, Any] = {}
        _replace_weights(self.optimizer, memo, half)
        copied = _copy(self.optimizer, memo)
        self._real.update(memo)
        if hasattr(copied, "train"):
            copied.train()
        _set_groups(copied, lr, wd=0.0)
        return Toy(self, copied)

    def call_step(self, optimizer: Optimizer, **arguments: Any) -> None:
        """Call ``step`` of a toy copy, without the hooks that are common to all optimizers."""
        if self.steps_left == 0:
            raise RuntimeError("the toy copies made all their steps")
        self.steps_left -= 1
        with _NotTouching(self._real):
            type(optimizer).step.__wrapped__(optimizer, **arguments)  # type: ignore[attr-defined]


@dataclass
class Toy:
    """A toy copy of an optimizer, with a tiny weight for each kind of weight in a param group."""

    simulation: Simulation
    optimizer: Optimizer
    index: int = 0  # of the next step

    def fork(self, lr: float | None = None, wd: float = 0.0) -> Toy:
        """Return a copy that goes on from here, with another learning rate and weight decay."""
        copied = _copy(self.optimizer, {})
        for p, q in zip(params_of(self.optimizer), params_of(copied)):
            q.grad = None if p.grad is None else p.grad.detach().clone()
        _set_groups(copied, lr, wd)
        return Toy(self.simulation, copied, self.index)

    def weights(self) -> Weights:
        """Return copies of the weights, in single precision."""
        return [p.detach().to(torch.float32, copy=True) for p in params_of(self.optimizer)]

    def step(self, factor: float = 1.0, l2: float = 0.0, noise: float = 1.0) -> Weights:
        """Make a step with random gradients that depend on its index alone; return the weights.

        Args:
            factor: What the weights are multiplied by at the end of the first evaluation.
            l2: The coefficient of an L2 term in the gradients.
            noise: The scale of the gradients.

        Raises:
            ArithmeticError: If a weight is not finite.
            RuntimeError: If there is no step left.
        """
        _seed(self.index)
        factors = [factor]

        def closure() -> Tensor:
            with torch._C.DisableTorchFunction():  # the optimizer itself touches nothing here
                self._backward(l2, noise)
                for each in factors:
                    torch._foreach_mul_([p.data for p in params_of(self.optimizer)], each)
                factors.clear()
                return torch.zeros(())

        if any(p.grad is None for p in params_of(self.optimizer)):
            self._backward(l2, noise)  # SAM wants gradients before it evaluates its closure
        if self.simulation.takes_closure:
            self.simulation.call_step(self.optimizer, closure=closure)
        if factors:
            self.simulation.takes_closure = False
            closure()
            self.simulation.call_step(self.optimizer)
        self.index += 1
        weights = self.weights()
        if not all(w.isfinite().all() for w in weights):
            raise ArithmeticError
        return weights

    def _backward(self, l2: float, noise: float) -> None:
        generator = torch.Generator().manual_seed(SEED + self.index)
        for group in self.optimizer.param_groups:
            sign = -1 if group.get("maximize") else 1
            for p in group["params"]:
                gradient = torch.randn(p.shape, generator=generator, device="cpu").to(p.dtype)
                p.grad = noise * gradient + sign * l2 * p.detach()


def _set_groups(optimizer: Optimizer, lr: float | None, wd: float) -> None:
    for group in optimizer.param_groups:
        if lr is not None and "lr" in group:  # at a warmup's start it may be 0
            old = group["lr"]
            group["lr"] = torch.full_like(old, lr) if isinstance(old, Tensor) else lr
        group.update({key: wd for key in WD_KEYS if key in group})


def _replace_weights(optimizer: Optimizer, memo: dict[int, Any], half: bool) -> None:
    """Enter tiny weights, an empty state and one param group of each kind into a deepcopy memo."""
    memo[id(optimizer.state)] = defaultdict(dict)
    groups = optimizer.param_groups
    for group in groups:
        tiny: dict[Any, Tensor] = {}
        for p in group["params"]:
            kind = kind_of(p, half)
            if kind not in tiny:
                tiny[kind] = memo[id(p)] if id(p) in memo else _tiny(*kind)
            memo.setdefault(id(p), tiny[kind])
        memo[id(group["params"])] = list(tiny.values())
    memo[id(groups)] = [copy.deepcopy(group, memo) for group in _of_each_kind(groups, half)]
    for _, value in attributes(optimizer):
        if isinstance(value, Optimizer) and id(value.state) not in memo:
            _replace_weights(value, memo, half)


def _copy(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """Return a deep copy without hooks; ``copy.deepcopy`` leaves attributes out.

    Raises:
        TypeError: If an attribute is a closure, which may refer to the real weights.
    """
    copied: Optimizer = object.__new__(type(optimizer))
    memo[id(optimizer)] = copied
    held = attributes(optimizer)
    for _, value in held:
        if isinstance(value, Optimizer) and id(value) not in memo:
            _copy(value, memo)
        if isinstance(value, FunctionType) and value.__closure__:
            raise TypeError("a closure may refer to the real weights")
    vars(copied).update((name, copy.deepcopy(value, memo)) for name, value in held)
    hooks = (name for name in vars(optimizer) if name.endswith("_hooks"))
    vars(copied).update((name, OrderedDict()) for name in hooks)
    return copied


def attributes(optimizer: Optimizer) -> list[tuple[str, Any]]:
    """Return the attributes without hooks and the ``step`` that learning rate schedulers add."""
    attributes = vars(optimizer).items()
    return [(k, value) for k, value in attributes if k != "step" and not k.endswith("_hooks")]


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all param groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _of_each_kind(groups: Sequence[Group], half: bool) -> list[Group]:
    """Return one of the param groups that differ in numbers, names and weights only."""
    kinds = {}
    for group in groups:
        keys = [key for key in group if key != "params" and "name" not in key]
        settings = tuple((key, trait(group[key])) for key in keys)
        kinds[settings, frozenset(kind_of(p, half) for p in group["params"])] = group
    return list(kinds.values())


def trait(value: Any) -> Hashable:
    """Return what of a setting may make an optimizer take another path."""
    if isinstance(value, Tensor):
        return "tensor"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return bool(value) if is_number else repr(value)


def kind_of(p: Tensor, half: bool) -> tuple[int, torch.dtype]:
    """Return the dimensions and the dtype of the tiny weight for ``p``."""
    return p.ndim, p.dtype if half and p.dtype in HALF else torch.float32


def _tiny(ndim: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """Return a weight of shape (2, ..., 2), with values that normalization does not make equal."""
    weights = torch.linspace(0.5, 1.5, 2**ndim, device="cpu", dtype=dtype)
    weights[1::3] *= -1
    return torch.nn.Parameter(weights.reshape((2,) * ndim))


# Isolation


@contextmanager
def isolated() -> Iterator[None]:
    """Hide output and warnings, restore the random states, and compile nothing."""
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


def _seed(seed: int) -> None:
    """Make the randomness of a step depend on its index alone; other devices are left alone."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


class _NotTouching(TorchFunctionMode):
    """Raises if a step touches real tensors, which it may reach through a global."""

    def __init__(self, real: Set[int]) -> None:
        super().__init__()
        self._real = real  # ids

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for each in (args, *[arg for arg in args if isinstance(arg, list)]):
            if not self._real.isdisjoint(map(id, each)):
                raise TypeError("a step of a toy copy reaches the real weights")
        return func(*args, **(kwargs or {}))
