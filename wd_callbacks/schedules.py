"""Schedules: pure functions from training progress to a weight decay coefficient.

Progress is 0.0 at the first step and goes towards 1.0. Outside of [0, 1] a schedule keeps the value
of the nearer end. Each class is a frozen dataclass: it is callable, compares, pickles, can be
rebuilt from its ``repr``, and can be written in YAML. Any other callable from progress to a
coefficient is a schedule too, such as fastai's ``SchedCos(0.04, 0.4)`` or a lambda.

Examples:
    >>> warmed_up = Join([(0.25, Linear(0, 0.2)), (0.75, Cosine(0.2, 0))])
    >>> [round(warmed_up(progress), 3) for progress in (0, 0.125, 0.25, 0.625, 1)]
    [0.0, 0.1, 0.2, 0.1, 0.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from wd_callbacks.core.checks import as_float, check_count, check_number

__all__ = [
    "Cosine",
    "Exponential",
    "Join",
    "Linear",
    "Normalized",
    "Polynomial",
    "Restarts",
    "Schedule",
    "Steps",
    "Timescale",
]

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Linear:
    """``start + (end - start) * progress``.

    Args:
        start: Coefficient at progress 0, finite and at least 0.
        end: Coefficient at progress 1, finite and at least 0.

    Raises:
        TypeError, ValueError: An argument is invalid; the message names it.

    Examples:
        >>> schedule = Linear(0.04, 0.4)
        >>> schedule(0), schedule(0.5), schedule(1), schedule(2)
        (0.04, 0.22, 0.4, 0.4)
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        _check(self, "start", "end")

    def __call__(self, progress: float) -> float:
        """Return the coefficient at ``progress``."""
        return _between(self.start, self.end, _clamped(progress))


@dataclass(frozen=True)
class Cosine:
    """``end + (start - end) * (1 + cos(pi * progress)) / 2`` (arXiv 1608.03983, eq. 5).

    Args:
        start: Coefficient at progress 0, finite and at least 0.
        end: Coefficient at progress 1, finite and at least 0.

    Raises:
        TypeError, ValueError: An argument is invalid; the message names it.

    Examples:
        >>> schedule = Cosine(0.25, 0)
        >>> schedule(0), schedule(0.5), schedule(1)
        (0.25, 0.125, 0.0)
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        _check(self, "start", "end")

    def __call__(self, progress: float) -> float:
        """Return the coefficient at ``progress``."""
        return _between(self.start, self.end, (1 - math.cos(math.pi * _clamped(progress))) / 2)


@dataclass(frozen=True)
class Exponential:
    """``start * (end / start) ** progress``.

    Args:
        start: Coefficient at progress 0, finite and above 0.
        end: Coefficient at progress 1, finite and above 0.

    Raises:
        TypeError, ValueError: An argument is invalid; the message names it.

    Examples:
        >>> schedule = Exponential(0.25, 0.0625)
        >>> schedule(0), schedule(0.5), schedule(1)
        (0.25, 0.125, 0.0625)
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        _check(self, "start", "end", above=0)

    def __call__(self, progress: float) -> float:
        """Return the coefficient at ``progress``."""
        progress = _clamped(progress)
        value = self.start ** (1 - progress) * self.end**progress
        return _limited(value, self.start, self.end)


@dataclass(frozen=True)
class Polynomial:
    """``start + (end - start) * progress ** power``.

    Args:
        start: Coefficient at progress 0, finite and at least 0.
        end: Coefficient at progress 1, finite and at least 0.
        power: Exponent, finite and above 0.

    Raises:
        TypeError, ValueError: An argument is invalid; the message names it.

    Examples:
        >>> schedule = Polynomial(1, 0, 2)
        >>> schedule(0), schedule(0.5), schedule(1)
        (1.0, 0.75, 0.0)
    """

    start: float
    end: float
    power: float

    def __post_init__(self) -> None:
        _check(self, "start", "end")
        _check(self, "power", above=0)

    def __call__(self, progress: float) -> float:
        """Return the coefficient at ``progress``."""
        return _between(self.start, self.end, _clamped(progress) ** self.power)


@dataclass(frozen=True)
class Steps:
    """The value of the last key at or before ``progress``.

    Args:
        values: Maps the progress at which a coefficient begins to that coefficient. Keys are in
            [0, 1), and 0 is one of them. Values are finite and at least 0.

    Raises:
        TypeError, ValueError: A key or a value is invalid; the message names it.

    Examples:
        >>> schedule = Steps({0.0: 0.1, 0.5: 0.01})
        >>> schedule(0), schedule(0.49), schedule(0.5), schedule(1)
        (0.1, 0.1, 0.01, 0.01)
    """

    values: Mapping[float, float]

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise TypeError(f"Steps: values must be a dict, got {self.values!r}")
        for begin, value in self.values.items():
            check_number("Steps: a key of values", begin)
            check_number(f"Steps: values[{begin!r}]", value)
            if begin >= 1:
                raise ValueError(f"Steps: a key of values must be below 1, got {begin!r}")
        if 0 not in self.values:
            raise ValueError(f"Steps: values must have the key 0, got {sorted(self.values)}")
        object.__setattr__(self, "values", dict(sorted(self.values.items())))

    def __call__(self, progress: float) -> float:
        """Return the coefficient at ``progress``."""
        begun = max(begin for begin in self.values if begin <= _clamped(progress) + TOLERANCE)
        return float(self.values[begun])

    def __hash__(self) -> int:
        return hash(tuple(self.values.items()))


@dataclass(frozen=True)
class Join:
    """One schedule after the other, each over its fraction of the run.

    Args:
        pieces: Pairs of a fraction above 0 and a schedule. The fractions add up to 1. Progress
            within each piece goes from 0 to 1.

    Raises:
        TypeError, ValueError: A piece is not such a pair, or the fractions do not add up to 1.

    Examples:
        >>> schedule = Join([(0.25, Linear(0, 0.1)), (0.75, Linear(0.1, 0.4))])
        >>> schedule(0), schedule(0.125), schedule(0.25), schedule(1)
        (0.0, 0.05, 0.1, 0.4)
    """

    pieces: Sequence[tuple[float, Schedule]]

    def __post_init__(self) -> None:
        pieces = []
        if not isinstance(self.pieces, Iterable):
            raise TypeError(f"Join: pieces must be a sequence of pairs, got {self.pieces!r}")
        for piece in self.pieces:
            if not (isinstance(piece, Sequence) and len(piece) == 2 and callable(piece[1])):
                raise TypeError(
                    f"Join: pieces must be pairs of a fraction and a schedule, got {piece!r}"
                )
            check_number("Join: a fraction of pieces", piece[0], above=0)
            pieces.append((piece[0], piece[1]))
        total = sum(float(fraction) for fraction, _ in pieces)
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"Join: the fractions of pieces must add up to 1, got {total:g}")
        object.__setattr__(self, "pieces", tuple(pieces))

    def __call__(self, progress: float) -> float:
        """Return the coefficient at ``progress``."""
        progress = _clamped(progress)
        ends = list(accumulate(fraction for fraction, _ in self.pieces[:-1]))
        index = sum(progress >= end - TOLERANCE for end in ends)
        fraction, schedule = self.pieces[index]
        return schedule(_clamped((progress - [0.0, *ends][index]) / fraction))

    def resolved(self, run: Run) -> Join:
        """Return it with its pieces resolved, which see the steps of the whole run."""
        parts = [replace(run, part=run.part * fraction) for fraction, _ in self.pieces]
        return Join([(f, resolved(s, part)) for (f, s), part in zip(self.pieces, parts)])


@dataclass(frozen=True)
class Restarts:
    """A schedule that starts again in each cycle (warm restarts, arXiv 1608.03983, 1711.05101).

    Args:
        schedule: The schedule of each cycle.
        cycles: Number of cycles, at least 1.
        mult: Length of a cycle relative to the one before, finite and above 0.

    Raises:
        TypeError, ValueError: An argument is invalid; the message names it.

    Examples:
        >>> schedule = Restarts(Linear(0.1, 0.3), cycles=2, mult=3)
        >>> [round(schedule(progress), 3) for progress in (0, 0.125, 0.25, 0.625, 1)]
        [0.1, 0.2, 0.1, 0.2, 0.3]
    """

    schedule: Schedule
    cycles: int
    mult: float = 1

    def __post_init__(self) -> None:
        if not callable(self.schedule):
            raise TypeError(
                f"Restarts: schedule must be a callable from progress, got {self.schedule!r}"
            )
        check_count("Restarts: cycles", self.cycles)
        _check(self, "mult", above=0)
        if self.cycles > 10**6 or self.cycles * abs(math.log(self.mult)) > 500:
            raise ValueError(
                f"Restarts: {self.cycles} cycles are too many for mult {self.mult!r}, because the "
                f"shortest would hardly last: use fewer cycles"
            )
        object.__setattr__(self, "cycles", int(self.cycles))

    def __call__(self, progress: float) -> float:
        """Return the coefficient at ``progress``."""
        return Join([(fraction, self.schedule) for fraction in self._fractions()])(progress)

    def resolved(self, run: Run) -> Join:
        """Return it with its cycles resolved, each of which sees its own steps."""
        parts = [run.part * fraction for fraction in self._fractions()]
        runs = [
            replace(run, part=part, cycle_steps=None if run.steps is None else run.steps * part)
            for part in parts
        ]
        return Join([(f, resolved(self.schedule, r)) for f, r in zip(self._fractions(), runs)])

    def _fractions(self) -> list[float]:
        lengths = [self.mult**cycle for cycle in range(self.cycles)]
        return [length / math.fsum(lengths) for length in lengths]


@dataclass(frozen=True)
class Run:
    """The run, as ``Normalized`` and ``Timescale`` need it when training starts.

    Attributes:
        steps: Optimizer steps of the run; None if it is not known.
        steps_per_epoch: Optimizer steps of an epoch; None if it is not known.
        peak_scale: The scale (see ``scale_by``) at the param group's peak learning rate; None if
            it is not known.
        part: The fraction of the run that the schedule covers.
        cycle_steps: Optimizer steps of the cycle, inside ``Restarts``.
    """

    steps: float | None = None
    steps_per_epoch: float | None = None
    peak_scale: float | None = None
    part: float = 1.0
    cycle_steps: float | None = None


class _Resolvable:
    """A coefficient that is known once training starts."""

    def __call__(self, progress: float) -> float:
        """Raise TypeError: there is no value before training starts."""
        raise TypeError(f"{self!r} depends on the run and has no value before training starts")

    def resolved(self, run: Run) -> Linear:
        """Return the coefficient in ``run``, as a constant schedule."""
        raise NotImplementedError


@dataclass(frozen=True)
class Normalized(_Resolvable):
    """``wd_norm / sqrt(steps)``, so that one value suits runs of any length.

    This is the paper's ``wd_norm * sqrt(b / (B * T))`` for ``B * T / b`` steps (arXiv 1711.05101,
    appendix B.1). The steps are those of the run, or of each cycle inside ``Restarts``.

    Args:
        wd_norm: Normalized coefficient, finite and at least 0.

    Raises:
        TypeError, ValueError: ``wd_norm`` is invalid.

    Examples:
        >>> Normalized(0.5).resolved(Run(steps=100))(0)
        0.05
    """

    wd_norm: float

    def __post_init__(self) -> None:
        _check(self, "wd_norm")

    def resolved(self, run: Run) -> Linear:
        """Return the coefficient in ``run``, as a constant schedule."""
        steps = run.steps if run.cycle_steps is None else run.cycle_steps
        if steps is None:
            raise ValueError(
                f"{self!r} needs the number of steps of the run, which is not known: pass "
                f"total_steps in a plain loop, max_steps in Lightning"
            )
        return _constant(self.wd_norm / math.sqrt(steps))


@dataclass(frozen=True)
class Timescale(_Resolvable):
    """The coefficient with which a step at the peak learning rate shrinks by ``1 / steps``.

    Weights are then a moving average of the updates over about that many steps (arXiv 2405.13698).
    Pass either ``epochs`` or ``steps``.

    Args:
        epochs: Length of the average in epochs, finite and above 0.
        steps: Length of the average in optimizer steps, finite and above 1.

    Raises:
        TypeError, ValueError: Both or neither is given, or the value is invalid. When training
            starts: ``scale_by`` is a callable, or the number of steps per epoch is not known.

    Examples:
        >>> Timescale(epochs=4).resolved(Run(steps=100, steps_per_epoch=25, peak_scale=0.1))(0)
        0.1
    """

    epochs: float | None = None
    steps: float | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("Timescale: pass either epochs or steps")
        name, least = ("steps", 1) if self.epochs is None else ("epochs", 0)
        _check(self, name, above=least)

    def __repr__(self) -> str:
        """Show the argument that was given."""
        if self.epochs is None:
            return f"Timescale(steps={self.steps!r})"
        return f"Timescale(epochs={self.epochs!r})"

    def resolved(self, run: Run) -> Linear:
        """Return the coefficient in ``run``, as a constant schedule."""
        if run.peak_scale is None:
            raise ValueError(
                f"{self!r} needs the peak learning rate, which is not known: pass max_lr or, if "
                f"scale_by is a callable, a number as wd"
            )
        steps = self.steps
        if self.epochs is not None:
            if run.steps_per_epoch is None:
                raise ValueError(
                    f"{self!r} needs the number of steps of an epoch, which is not known: pass "
                    f"steps instead of epochs, or steps_per_epoch in a plain loop"
                )
            steps = self.epochs * run.steps_per_epoch
            check_number(f"Timescale: the steps of {self.epochs!r} epochs", steps, above=1)
        assert steps is not None
        return _constant(1 / (steps * run.peak_scale))


def needs_max_lr(schedule: Any) -> bool:
    """Return True if ``schedule`` is, or holds, one that depends on the peak learning rate."""
    if isinstance(schedule, Join):
        return any(needs_max_lr(piece) for _, piece in schedule.pieces)
    if isinstance(schedule, Restarts):
        return needs_max_lr(schedule.schedule)
    return isinstance(schedule, Timescale)


def resolved(schedule: Schedule, run: Run) -> Schedule:
    """Return ``schedule`` with everything resolved that depends on the run."""
    resolve = getattr(schedule, "resolved", None)
    return schedule if resolve is None else resolve(run)


TOLERANCE = 1e-9  # ten tenths do not add up to 1 in floating point


def _constant(value: float) -> Linear:
    return Linear(value, value)


def _clamped(progress: float) -> float:
    progress = as_float(progress)
    if math.isnan(progress):
        raise ValueError("progress is nan, expected a number in [0, 1]")
    return min(max(progress, 0.0), 1.0)


def _between(start: float, end: float, weight: float) -> float:
    """Return a value from ``start`` to ``end``; both ends are exact."""
    return _limited(start * (1 - weight) + end * weight, start, end)


def _limited(value: float, *ends: float) -> float:
    """Return ``value`` within ``ends``, past which rounding may have carried it."""
    return float(min(max(value, min(ends)), max(ends)))


def _check(schedule: Any, *names: str, above: float | None = None) -> None:
    for name in names:
        check_number(f"{type(schedule).__name__}: {name}", getattr(schedule, name), above=above)
