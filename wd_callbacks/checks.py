"""What numbers, lists and saved states must be, whoever gives them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

TEXT = (str, bytes, bytearray, memoryview)  # sequences, but of nothing that a user means


def is_sequence(value: Any) -> bool:
    """Whether ``value`` is a sequence, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, TEXT)


def as_float(value: Any) -> float:
    """``float(value)``, infinite where no float is large enough."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def number(value: Any, source: str) -> float:
    """The float that ``value``, which came from the user's code, stands for.

    Raises:
        TypeError: It is none; the message names the ``source``.
    """
    if type(value) is float:
        return value
    try:
        plain = value.item() if hasattr(value, "item") else value  # of a tensor or an array
        if isinstance(plain, bool) or not hasattr(plain, "__float__"):  # float() reads text too
            raise TypeError
        return as_float(plain)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{source} is {value!r}, expected a number") from None


def check_number(
    name: str, value: Any, expected: str = "a number", above: float | None = None
) -> None:
    """Checks that an argument is a finite number of at least 0, or ``above`` a number.

    Raises:
        TypeError, ValueError: It is not; the message names it.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}, got {value!r} ({type(value).__name__})")
    size = as_float(value)
    if not 0 <= size < math.inf or (above is not None and size <= above):
        limit = "at least 0" if above is None else f"above {above}"
        raise ValueError(f"{name} must be finite and {limit}, got {value!r}")


def check_count(name: str, value: Any, most: float = math.inf) -> None:
    """Raises ValueError unless ``value`` is a whole number of at least 1, and at most ``most``."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not (whole and 1 <= as_float(value) <= most and math.isfinite(as_float(value))):
        limit = "" if most == math.inf else f" and at most {most}"
        raise ValueError(f"{name} must be a whole number of at least 1{limit}, got {value!r}")


class Kind(NamedTuple):
    """What an entry of a saved state must be, in words and as a check."""

    words: str
    fits: Callable[[Any], bool]


def each(kind: Kind) -> Kind:
    """A list of entries of a kind."""
    return Kind(
        f"a list, each {kind.words}",
        lambda value: is_sequence(value) and all(map(kind.fits, value)),
    )


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= as_float(value) < math.inf


ANYTHING = Kind("anything", lambda value: True)
DICT = Kind("a dict", lambda value: isinstance(value, Mapping))
AMOUNT = Kind("a finite number of at least 0", _is_amount)
COUNT = Kind("a whole number of at least 0", lambda value: type(value) is int and _is_amount(value))


def check_state(state: Any, **kinds: Kind) -> None:
    """Raises ValueError where ``state`` lacks one of the keys, or holds something else there."""
    missing = [key for key in kinds if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise ValueError(f"this is no state of a DecoupledWD: it lacks {', '.join(missing)}")
    for key, (words, fits) in kinds.items():
        if not fits(state[key]):
            raise ValueError(
                f"this is no state of a DecoupledWD: {key} is {reprlib.repr(state[key])}, "
                f"expected {words}"
            )
