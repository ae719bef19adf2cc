"""Validators of numbers and lists, whoever gives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

TEXT = (str, bytes, bytearray, memoryview)  # sequences, but never a list of values


def is_sequence(value: Any) -> bool:
    """Return True for a sequence that is not text."""
    return isinstance(value, Sequence) and not isinstance(value, TEXT)


def as_float(value: Any) -> float:
    """Return ``float(value)``; infinity if it is too large for a float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def number(value: Any, source: str) -> float:
    """Return ``value``, which came from the user's code, as a float; it may be infinite.

    Raises:
        TypeError: It is not a number; the message begins with ``source``.
    """
    if type(value) is float:
        return value
    try:
        plain = value.item() if hasattr(value, "item") else value  # of a tensor or an array
        if isinstance(plain, bool) or not hasattr(plain, "__float__"):  # float() parses text too
            raise TypeError
        return as_float(plain)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{source} is {value!r}, expected a number") from None


def scalar(value: Any) -> Any:
    """Return the number in a tensor or array of no dimension, else ``value`` itself."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def check_number(name: str, value: Any, kind: str = "a number", above: float | None = None) -> None:
    """Raise unless ``value`` is a finite number of at least 0, or ``above`` another one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {kind}, got {shown(value)} ({type(value).__name__})")
    if not 0 <= as_float(value) < math.inf or (above is not None and as_float(value) <= above):
        limit = "at least 0" if above is None else f"above {above}"
        raise ValueError(f"{name} must be finite and {limit}, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raise unless ``value`` is a whole number of at least 1."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not (is_whole and 1 <= as_float(value) < math.inf):
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_each(name: str, value: Any, check: Callable[[str, Any], None]) -> None:
    """Check ``value``, or each of its elements if it is a sequence (one per param group)."""
    if not is_sequence(value):
        return check(name, value)
    if len(value) == 0:
        raise ValueError(f"{name} is an empty sequence, expected one value per param group")
    for index, element in enumerate(value):
        check(f"{name}[{index}]", element)
    return None


def of_group(value: Any, index: int) -> Any:
    """Return the value for param group ``index``: that element of a sequence, or ``value``."""
    return value[index] if is_sequence(value) else value


def shown(value: Any) -> str:
    """Return ``repr(value)``, or the type and shape of a tensor, array or module."""
    if hasattr(value, "shape") and value.shape != ():
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    return repr(value)
