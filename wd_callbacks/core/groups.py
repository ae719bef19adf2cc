"""Param groups, and the weight decay of the optimizer's own in them."""

from __future__ import annotations

from collections.abc import MutableMapping
from numbers import Real
from typing import Any, TypeAlias

from torch import Tensor

from wd_callbacks.core.checks import number

Group: TypeAlias = MutableMapping[str, Any]
"""A param group: ``params``, usually ``lr``, and often a weight decay of its own."""

WD_KEYS = ("weight_decay", "wd")  # torch's name and fastai's


def wd_key(group: Group) -> str | None:
    """Return the key of the optimizer's own weight decay in ``group``; None if it has none."""
    for key in WD_KEYS:
        if key in group:
            return key
    return None


def host_lr(group: Group) -> float:
    """Return the learning rate of a group; 0.0 if it has none, or one on a device."""
    lr: Any = group.get("lr")
    is_known = isinstance(lr, Real) or (isinstance(lr, Tensor) and lr.is_cpu)
    return float(lr) if is_known else 0.0


def own_wd(group: Group, index: int) -> float:
    """Return the optimizer's own weight decay of param group ``index``; 0.0 if it has none."""
    key = wd_key(group)
    return 0.0 if key is None else number(group[key], f"param group {index}: {key}")
