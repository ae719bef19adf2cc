"""Cautious decay (arXiv 2510.12402): only of elements that the update moves the same way.

With ``u = p_before - p_after`` the step that the optimizer made, elements with
``u * (p_before - anchor) >= 0`` lose ``shrink * (p_before - anchor)`` in addition.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wd_callbacks.core.deferred import HALF, Bucket
from wd_callbacks.core.inplace import device_value
from wd_callbacks.core.rules import Shrink


class _Copy(NamedTuple):
    bucket: Bucket
    amount: float | Tensor
    before: list[Tensor]


class CautiousStep:
    """Copies of the weights from before an update, and the decay that follows it.

    Args:
        buckets: The parameters.
        shrinks: What to subtract, one per rule.
        found_inf: 0-dim tensor, above 0 if the step is skipped on the device.
    """

    def __init__(
        self, buckets: Iterable[Bucket], shrinks: Sequence[Shrink], found_inf: Tensor | None
    ) -> None:
        self._copies: list[_Copy] = []
        for bucket in buckets:
            amount = shrinks[bucket.rule].amount
            if not isinstance(amount, Tensor) and amount == 0:
                continue
            if found_inf is not None:
                value = device_value(bucket.key, amount)
                is_skipped = device_value(bucket.key, found_inf.reshape(())) > 0
                amount = torch.where(is_skipped, 0.0, value)
            before = [p.detach().clone() for p in bucket.params]
            self._copies.append(_Copy(bucket, amount, before))

    def decay_(self) -> None:
        """Decay the elements whose update went towards the anchor, or nowhere."""
        for bucket, amount, before in self._copies:
            params = _real(bucket.params)
            distance = _real(before)
            moved = torch._foreach_sub(distance, params)
            if bucket.anchors is not None:
                torch._foreach_sub_(distance, _real(bucket.anchors))
            torch._foreach_sign_(moved)  # of signs, as products of small numbers may underflow
            torch._foreach_mul_(moved, torch._foreach_sign(distance))
            torch._foreach_add_(moved, 1)  # 0 if they disagree, 1 or 2 if not
            torch._foreach_clamp_max_(moved, 1)
            torch._foreach_mul_(moved, distance)
            if isinstance(amount, Tensor):
                torch._foreach_mul_(moved, device_value(bucket.key, amount))
            else:
                torch._foreach_mul_(moved, amount)
            torch._foreach_sub_(params, moved)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for half precision."""
    if dtype in HALF:
        raise ValueError(
            f"cautious=True needs weights in float32 or float64, got {dtype}: half precision "
            f"rounds most updates away. Keep the weights in float32 (autocast does), or leave "
            f"cautious out"
        )


def _real(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return complex tensors as real ones, of which real and imaginary parts decay apart."""
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
