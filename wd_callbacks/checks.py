"""What numbers, lists and saved states must be, whoever gives them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

NO_STATE = "this is no state of a DecoupledWD"
MOST_OWED = 37  # exp(-37) is nothing beside 1, so that no quantum below 1 is as much
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
    """The float that ``value``, which came from the user's code, stands for; it may be infinite."""
    if type(value) is float:
        return value
    try:
        plain = value.item() if hasattr(value, "item") else value  # of a tensor or an array
        if isinstance(plain, bool) or not hasattr(plain, "__float__"):  # float() reads text too
            raise TypeError
        return as_float(plain)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{source} is {value!r}, expected a number") from None


def check_number(name: str, value: Any, kind: str = "a number", above: float | None = None) -> None:
    """Refuses an argument that is no finite number of at least 0, or not ``above`` another."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {kind}, got {value!r} ({type(value).__name__})")
    if not 0 <= as_float(value) < math.inf or (above is not None and as_float(value) <= above):
        limit = "at least 0" if above is None else f"above {above}"
        raise ValueError(f"{name} must be finite and {limit}, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Refuses an argument that is no whole number of at least 1."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not (is_whole and 1 <= as_float(value) < math.inf):
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_state(state: Any, **fits: Callable[[Any], bool]) -> None:
    """Refuses a saved state that lacks one of the keys, or holds there what does not fit."""
    missing = [key for key in fits if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise ValueError(f"{NO_STATE}: it lacks {', '.join(missing)}")
    for key, is_fit in fits.items():
        if not is_fit(state[key]):
            raise ValueError(f"{NO_STATE}: {key} cannot be {reprlib.repr(state[key])}")


def check_debts(state: Any, sizes: list[int]) -> None:
    """Refuses what is no state of a decay of param groups of these sizes."""
    check_state(
        state,
        arguments=lambda value: isinstance(value, Mapping),
        owed=_all(_all(lambda value: is_amount(value) and value < MOST_OWED)),
        payments=_all(_all(is_count)),
        due=_all(is_amount),
        lr_max=_all(lambda value: value is None or (is_amount(value) and value > 0)),
        no_decay=_all(lambda value: value in (0, 1)),
    )
    check_state({"progress": 0.0, **state}, progress=is_fraction)  # which version 0.1.0 left out
    for name in ("owed", "payments"):
        saved = list(map(len, state[name]))
        if saved not in ([], sizes):
            raise ValueError(
                f"the state is of param groups with {saved} parameters, the optimizer's have "
                f"{sizes}"
            )
    lists = ("owed", "payments", "due", "lr_max", "no_decay")
    owed, payments, due, lr_max, no_decay = (len(state[name]) for name in lists)
    if not (owed == payments == due and lr_max == no_decay <= due):  # < where groups were added
        raise ValueError(f"{NO_STATE}: {', '.join(lists)} do not agree in length")


def is_count(value: Any) -> bool:
    """Whether an entry of a state is a whole number of at least 0."""
    return type(value) is int and is_amount(value)


def is_amount(value: Any) -> bool:
    """Whether an entry of a state is a finite number of at least 0."""
    return type(value) in (int, float) and 0 <= as_float(value) < math.inf


def is_fraction(value: Any) -> bool:
    """Whether an entry of a state is a number in [0, 1]."""
    return is_amount(value) and value <= 1


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: is_sequence(values) and all(map(fits, values))
