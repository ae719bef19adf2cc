"""Shrinks too small to apply: they are deferred and added up until they can be represented.

The largest float32 below 1 is ``1 - 2**-24``: multiplied by ``1 - 1e-8``, a weight stays as it is.
A shrink below the quantum is therefore deferred, per parameter, until enough has added up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from wd_callbacks.core.rules import Shrink

Key: TypeAlias = tuple[torch.device, torch.dtype, type, Any]

HALF = (torch.float16, torch.bfloat16)
DOUBLE = (torch.float64, torch.complex128)
QUANTA = {torch.float16: 2.0**-8, torch.bfloat16: 2.0**-6}
QUANTUM = 2.0**-20
ANCHORED_QUANTA = {torch.float16: 2.0**-5, torch.bfloat16: 2.0**-3}
ANCHORED_QUANTUM = 2.0**-10  # what is subtracted is small beside the weight: distances, not weights
FEW_PARAMS = 8  # up to which it is cheaper to look at each than at all together
MAX_DEFERRED = 37  # exp(-37) is nothing beside 1, so that no quantum below 1 defers as much


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights of ``dtype`` are multiplied."""
    return torch.float64 if dtype in DOUBLE else torch.float32


class Deferred(NamedTuple):
    """What a parameter has deferred, and how often it was applied."""

    log: float = 0.0  # -log of the factor that is not applied yet, so that shrinks add up
    applied: int = 0

    @property
    def amount(self) -> float:
        """The deferred shrink."""
        return -math.expm1(-self.log)


class Precision(NamedTuple):
    """How finely weights of some dtype can shrink.

    Attributes:
        quantum: Smallest shrink that is applied at once.
        grain: Distance between the factors below 1 that can be represented.
        parts: What is applied of a deferred shrink, in turn. Shrinks of one size would move a
            half-precision weight by the same few units in the last place each time and be rounded
            the same way: in bfloat16 that is 2 % too little. These sizes average out.
    """

    quantum: float
    grain: float
    parts: tuple[float, ...] = (1.0,)


def precision_of(dtype: torch.dtype, is_anchored: bool, quantum: float | None) -> Precision:
    """Return the precision of a dtype; ``quantum`` is the user's, None: by dtype."""
    if quantum is None and is_anchored:
        quantum = ANCHORED_QUANTA.get(dtype, ANCHORED_QUANTUM)
    elif quantum is None:
        quantum = QUANTA.get(dtype, QUANTUM)
    # Half precision multiplies in float32.
    grain = 2.0**-53 if dtype in DOUBLE else 2.0**-24
    return Precision(quantum, grain, (1.0, 5 / 6, 2 / 3) if dtype in HALF else (1.0,))


def defer(deferred: Deferred, amount: float, precision: Precision) -> tuple[Deferred, float | None]:
    """Return what is deferred after a shrink by ``amount``, and what to apply now.

    Returns:
        The new ``Deferred`` and the shrink to apply: None if nothing is, ``amount`` itself if the
        step is applied as it is.

    Examples:
        >>> fine = Precision(quantum=0.25, grain=2.0**-24)
        >>> after, shrink = defer(Deferred(), 0.2, fine)
        >>> round(after.amount, 6), shrink
        (0.2, None)
        >>> after, shrink = defer(after, 0.2, fine)  # 1 - 0.8 * 0.8
        >>> round(after.amount, 6), round(shrink, 6)
        (0.0, 0.36)
    """
    quantum, grain, parts = precision
    # More than the quantum is deferred if the quantum was larger when the state was saved.
    if amount >= quantum and deferred.amount < max(quantum, 2 * grain):
        return deferred, amount
    log = deferred.log - math.log1p(-amount)
    total = -math.expm1(-log)
    if total < quantum:
        return Deferred(log, deferred.applied), None
    part = parts[deferred.applied % len(parts)]
    shrink = total * part if total * (1 - part) < quantum else total
    shrink = min(math.floor(shrink / grain), 1 / grain - 1) * grain
    log = max(0.0, log + math.log1p(-shrink))
    if amount >= quantum and -math.expm1(-log) * (1 - shrink) < grain:
        log = 0.0  # the last of it: from the next step on each is applied as it is
    return Deferred(log, deferred.applied + 1), shrink


@dataclass(eq=False)
class Bucket:
    """Parameters of one rule that shrink in one call, and what each of them has deferred.

    Attributes:
        rule: Index of their rule.
        key: Device, dtype, tensor type and device mesh.
        params: The parameters.
        anchors: What they decay towards, one each; None: zero.
        precision: That of their dtype.
        deferred: What each of them has deferred.
    """

    rule: int
    key: Key
    params: list[Tensor]
    anchors: list[Tensor] | None
    precision: Precision
    deferred: Deferred
    _factor: Any = None  # the last one, whose operand is kept
    _operand: Any = None

    def take(self, shrink: Shrink) -> Shrink | None:
        """Return the shrink to apply at this step; None if it is deferred."""
        if shrink.amount == 0:
            return None
        if shrink.amount >= self.precision.quantum and self.deferred.log == 0:
            return shrink
        self.deferred, amount = defer(self.deferred, float(shrink.amount), self.precision)
        if amount is None:
            return None
        return (
            shrink if amount == shrink.amount else shrink._replace(amount=amount, factor=1 - amount)
        )

    def operand(self, factor: Any) -> Any:
        """Return ``factor`` in a form that is not rounded to half precision before it is used.

        A multi-tensor call rounds numbers to the dtype of the weights on the CPU, and tensors
        elsewhere.
        """
        if factor != self._factor:
            self._factor, self._operand = factor, factor
            if self.key[0].type == "cpu":
                self._operand = torch.scalar_tensor(
                    factor, dtype=operand_dtype(self.key[1]), device="cpu"
                )
        return self._operand


@dataclass(eq=False)
class Call:
    """Buckets of the same kind, which share one multi-tensor call.

    Attributes:
        buckets: The buckets.
        params: All their parameters.
    """

    buckets: list[Bucket]
    params: list[Tensor]

    def is_current(self) -> bool:
        """Return True if the parameters are of the same kind as before: they may be moved."""
        device, dtype, cls, _ = self.buckets[0].key
        params = self.params
        if len(params) > FEW_PARAMS:
            found = torch._C._group_tensors_by_device_and_dtype([[*params]], False)
            same_class = list(map(type, params)).count(cls) == len(params)
            return same_class and found.keys() == {(device, dtype)}
        for p in params:
            if p.dtype is not dtype or type(p) is not cls or p.device != device:
                return False
        return True
