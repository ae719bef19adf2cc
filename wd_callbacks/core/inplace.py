"""The in-place calls that change weights: one multi-tensor call for all parameters of a key."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from wd_callbacks.core.deferred import HALF, Bucket, Call, Key, operand_dtype
from wd_callbacks.core.rules import Shrink

Part = tuple[Bucket, Shrink]

FEW_FACTORS = 8  # up to which it is cheaper to make each tensor than all at once

# Weights change unseen by autograd, whose kept graphs stay valid, and without a version bump.
# `p.data` would do that too, but creating an alias of each parameter would take longest of all.
_AUTOGRAD = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradOther)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
)
below_autograd = functools.partial(torch._C._ExcludeDispatchKeyGuard, _AUTOGRAD)


def multiply_(call: Call, parts: Sequence[Part]) -> None:
    """``p <- p * (1 - shrink)``: decoupled weight decay (arXiv 1711.05101, Algorithm 2)."""
    if len(parts) == 1:
        [(bucket, shrink)] = parts
        params, factor = bucket.params, bucket.operand(shrink.factor)
    else:
        params, factor = _spread(call, parts, _factors(parts))
    torch._foreach_mul_(params, factor)


def lerp_(call: Call, parts: Sequence[Part]) -> None:
    """``p <- p + shrink * (anchor - p)``: decay towards an anchor (L2-SP, arXiv 1802.01483)."""
    (bucket, shrink), *others = parts
    params, weight = bucket.params, cast(Any, shrink.amount)
    if others:  # not every version of torch takes a list of numbers
        device, dtype, *_ = bucket.key
        amounts = torch.tensor([shrink.amount for _, shrink in parts], dtype=dtype, device=device)
        params, weight = _spread(call, parts, amounts.unbind())
    anchors = [anchor for bucket, _ in parts for anchor in bucket.anchors or ()]
    torch._foreach_lerp_(params, anchors, weight)


def on_device_(bucket: Bucket, shrink: Shrink, found_inf: Tensor | None) -> None:
    """Shrink the weights if only the device knows by how much, or whether the step will happen."""
    device, dtype, *_ = bucket.key
    # A half-precision tensor rounds a factor to eight or eleven bits: the amount suffers less.
    by_amount = bucket.anchors is not None or dtype in HALF
    value = device_value(bucket.key, shrink.amount if by_amount else shrink.factor)
    if found_inf is not None:
        is_skipped = _moved(found_inf.reshape(()), device) > 0
        value = torch.where(is_skipped, 0.0 if by_amount else 1.0, value)
    if not by_amount:
        torch._foreach_mul_(bucket.params, value)
        return
    amounts = [value.to(dtype)] * len(bucket.params)
    if bucket.anchors is None:
        torch._foreach_addcmul_(bucket.params, bucket.params, amounts, value=-1)
    else:
        torch._foreach_lerp_(bucket.params, bucket.anchors, amounts)


def device_value(key: Key, value: float | Tensor) -> Tensor:
    """Return ``value`` as a 0-dim tensor on the device of the key."""
    device, dtype, *_ = key
    if isinstance(value, Tensor):
        return _moved(value, device)
    return torch.full((), value, device=device, dtype=dtype.to_real())


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """Return ``value`` on ``device``, without waiting for it unless that is the host."""
    return value.to(device, non_blocking=device.type != "cpu")


def _spread(call: Call, parts: Sequence[Part], values: Sequence[Any]) -> tuple[list[Tensor], Any]:
    """Return the parameters of ``parts``, and a value for each."""
    params = call.params
    if len(parts) < len(call.buckets):
        params = [p for bucket, _ in parts for p in bucket.params]
    if len(params) > len(parts):
        values = [value for (bucket, _), value in zip(parts, values) for _ in bucket.params]
    return params, values


def _factors(parts: Sequence[Part]) -> Sequence[Any]:
    """Return the factor of each bucket, as ``Bucket.operand`` does."""
    device, dtype, *_ = parts[0][0].key
    if len(parts) <= FEW_FACTORS or device.type != "cpu":
        return [bucket.operand(shrink.factor) for bucket, shrink in parts]
    factors = [shrink.factor for _, shrink in parts]
    return torch.tensor(factors, dtype=operand_dtype(dtype), device="cpu").unbind()
