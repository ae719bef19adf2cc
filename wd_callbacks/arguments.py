"""The arguments that every ``DecoupledWD`` shares, checked once, and their values at a step."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from numbers import Real
from typing import Any, TypeAlias

from torch import Tensor

from wd_callbacks.checks import TEXT, check_number, is_sequence, number
from wd_callbacks.schedules import Run, Schedule, Timescale, resolved
from wd_callbacks.selection import check_entry

Group: TypeAlias = MutableMapping[str, Any]
"""A param group: ``params``, usually ``lr``, and often a weight decay of its own."""

SCALES = ("lr", "lr_ratio", "lr_squared", "none")
WD_KEYS = ("weight_decay", "wd")  # torch's name and fastai's


def wd_key(group: Group) -> str | None:
    """The key under which ``group`` holds the optimizer's own weight decay, None if it has none."""
    for key in WD_KEYS:
        if key in group:
            return key
    return None


def own_wd(group: Group, index: int) -> float:
    """The optimizer's own weight decay of param group ``index``; 0.0 where it has none."""
    key = wd_key(group)
    return 0.0 if key is None else number(group[key], f"param group {index}: {key}")


def index_dict_entry(wd: Any, index: int, indices: Sequence[int]) -> Any:
    """The entry of ``wd`` for optimizer ``index`` where ``wd`` is a dict, else ``wd`` itself.

    Raises:
        ValueError: The keys of ``wd`` are not the ``indices`` of the optimizers that decay.
    """
    if not isinstance(wd, Mapping):
        return wd
    if sorted(wd) != sorted(indices):
        raise ValueError(
            f"wd has entries for the optimizers {sorted(wd)}, expected one for each of "
            f"{sorted(indices)}"
        )
    return wd[index]


@dataclass(frozen=True)
class Arguments:
    """What the user asked for, checked when built.

    Attributes:
        wd: A coefficient, a schedule, a sequence of either (one per param group), None (each
            group's own weight decay) or a dict from optimizer index to any of these.
        scale_by: How much of ``wd`` one step takes: ``"lr"``, ``"lr_ratio"``, ``"lr_squared"``,
            ``"none"``, a callable from the param group to a number, or a sequence of these.
        max_lr: The peak learning rate that the ratios refer to, a number or one per group.
        exclude: Which parameters do not decay: an entry or several, see ``Selection``.
        quantum: Smallest shrink that is applied at once, in [0, 1); None for one that suits the
            dtype.
        verbose: Whether the description is printed when training starts.

    Raises:
        TypeError, ValueError: An argument makes no sense; the message names it.
    """

    wd: Any = None
    scale_by: Any = "lr"
    max_lr: Any = None
    exclude: Any = ()
    quantum: float | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        """Checks what can be checked before an optimizer is known."""
        _check_wd("wd", self.wd)
        _each("scale_by", self.scale_by, _check_scale)
        if self.max_lr is not None:
            _each("max_lr", self.max_lr, functools.partial(check_number, above=0))
        entries = tuple(self.exclude) if _is_listed(self.exclude) else (self.exclude,)
        for entry in entries:
            check_entry(entry)
        object.__setattr__(self, "exclude", entries)
        if not isinstance(self.verbose, int | None):
            raise TypeError(f"verbose must be True or False, got {self.verbose!r}")
        if self.quantum is not None:
            check_number("quantum", self.quantum)
            if self.quantum >= 1:
                raise ValueError(f"quantum must be below 1, got {self.quantum!r}")

    def of_optimizer(self, index: int, indices: Sequence[int]) -> Arguments:
        """The same arguments with the entry for optimizer ``index`` where ``wd`` is a dict."""
        return replace(self, wd=index_dict_entry(self.wd, index, indices))

    @property
    def scheduled(self) -> bool:
        """Whether any coefficient depends on training progress, or on the length of the run."""
        wds = self.wd.values() if isinstance(self.wd, Mapping) else [self.wd]
        values = [value for wd in wds for value in _as_sequence(wd)]
        return any(callable(value) and not isinstance(value, Timescale) for value in values)

    @property
    def follows_lr(self) -> bool:
        """Whether any group's decay is in proportion to its learning rate, or to the square."""
        return any(str(scale).startswith("lr") for scale in _as_sequence(self.scale_by))

    def resolved(self, run: Run, peaks: Sequence[float | None]) -> Arguments:
        """With everything in the schedules known that depends on the run and the groups' peaks."""
        wds = self.wd if is_sequence(self.wd) else [self.wd] * len(peaks)
        known = [
            resolved(wd, replace(run, peak=self._scale_at(index, peak))) if callable(wd) else wd
            for index, (wd, peak) in enumerate(zip(wds, peaks))
        ]
        unchanged = all(new is old for new, old in zip(known, wds))
        return self if unchanged else replace(self, wd=known)

    def _scale_at(self, index: int, peak: float | None) -> float | None:
        """What ``scale_by`` makes of the peak learning rate; None where that is not known."""
        scale = self.scale(index)
        if callable(scale):
            return None
        return 1.0 if scale in ("lr_ratio", "none") else peak

    @property
    def spares_no_decay_groups(self) -> bool:
        """Whether groups with a weight decay of 0 keep it: ``wd`` has one value for all groups."""
        return self.wd is not None and not is_sequence(self.wd)

    def check_groups(self, groups: Sequence[Group]) -> None:
        """Checks the arguments against the groups of an optimizer.

        Raises:
            ValueError: A sequence has another length than ``groups``, a learning rate that is
                needed is missing, or ``wd`` is None and no group has a weight decay.
        """
        for name in ("wd", "scale_by", "max_lr"):
            value = getattr(self, name)
            if is_sequence(value) and len(value) != len(groups):
                raise ValueError(
                    f"{name} has {len(value)} values, but the optimizer has {len(groups)} param "
                    f"groups: give one value per group, or a single one for all"
                )
        if self.wd is None and all(wd_key(group) is None for group in groups):
            raise ValueError(
                "wd=None takes each param group's own weight decay, but this optimizer has none: "
                "give wd a number or a schedule"
            )
        for index, group in enumerate(groups):
            scale = self.scale(index)
            if isinstance(scale, str) and scale != "none" and "lr" not in group:
                raise ValueError(
                    f"scale_by={scale!r} needs a learning rate, but param group {index} has no "
                    f"'lr': use scale_by='none' or a callable"
                )

    def tells_apart(self, groups: Sequence[Group]) -> bool:
        """Whether one group may decay in another way than the next, or at another time."""
        indices = range(len(groups))
        own = list(map(own_wd, groups, indices))
        spares = self.spares_no_decay_groups and any(own) and not all(own)
        return self.scheduled or spares or any(map(self._needs_peak, indices))

    def scale(self, index: int) -> Any:
        """The ``scale_by`` of param group ``index``."""
        return self.scale_by[index] if is_sequence(self.scale_by) else self.scale_by

    def coefficients(self, groups: Sequence[Group], progress: float) -> list[float]:
        """The coefficient of each param group at ``progress`` in [0, 1].

        Raises:
            ValueError: One is negative, NaN or infinite.
        """
        if self.wd is None:
            own = list(map(own_wd, groups, itertools.count()))
            return [_checked(wd, f"the weight decay of group {i}") for i, wd in enumerate(own)]
        if not is_sequence(self.wd):
            return [_at(self.wd, progress, "wd")] * len(groups)
        return [_at(wd, progress, f"wd[{index}]") for index, wd in enumerate(self.wd)]

    def peak(self, index: int, group: Group, known: float | None) -> float | None:
        """The ``lr_max`` of param group ``index``; None where nothing tells and nothing needs it.

        Args:
            index: Which group it is.
            group: The param group, which may tell.
            known: A better source than the group, but not than the user.

        Raises:
            ValueError: It is not above 0, and ``scale_by`` divides by it.
        """
        if self.max_lr is not None:
            return float(self.max_lr[index] if is_sequence(self.max_lr) else self.max_lr)
        if known is None:
            keys = [k for k in ("max_lr", "initial_lr", "lr") if group.get(k) is not None]
            value = group[keys[0]] if keys else math.nan
            if isinstance(value, Tensor) and not value.is_cpu and not self._needs_peak(index):
                return None  # asking would synchronize
            known = number(value, f"param group {index}: {keys[0] if keys else 'lr'}")
        if not (math.isfinite(known) and known > 0):
            if self.scale(index) not in ("lr_ratio", "lr_squared"):
                return None
            raise ValueError(
                f"param group {index}: scale_by={self.scale(index)!r} divides by the peak learning "
                f"rate, which seems to be {known}: give max_lr"
            )
        return known

    def _needs_peak(self, index: int) -> bool:
        wd = self.wd[index] if is_sequence(self.wd) else self.wd
        return self.scale(index) in ("lr_ratio", "lr_squared") or hasattr(wd, "resolved")

    def record(self) -> dict[str, Any]:
        """The arguments as plain numbers, to tell by value whether a resumed run changed them."""
        return {
            "wd": _sampled(self.wd, _at_progress),
            "scale_by": _sampled(self.scale_by, _at_probe),
            "max_lr": _sampled(self.max_lr, _at_probe),
            "exclude": [
                entry if isinstance(entry, str) else _name(entry) for entry in self.exclude
            ],
            "quantum": _sampled(self.quantum, _at_probe),
        }


def _at(wd: Any, progress: float, name: str) -> float:
    """The coefficient that ``wd``, a number or a schedule, gives at ``progress``."""
    if not callable(wd):
        return float(wd)
    value = wd(progress)
    if type(value) is float and 0 <= value < math.inf:
        return value  # without the cost of a message
    return _checked(value, f"the schedule {name} = {wd!r} at progress {progress:g}")


def _checked(value: Any, source: str) -> float:
    coefficient = number(value, source)
    if not (math.isfinite(coefficient) and coefficient >= 0):
        raise ValueError(f"{source} is {coefficient}, expected a finite coefficient of at least 0")
    return coefficient


def _is_listed(exclude: Any) -> bool:
    # A tensor or an array of no dimension is a Collection that cannot be iterated over.
    is_text = isinstance(exclude, (*TEXT, Mapping))
    return isinstance(exclude, Collection) and not is_text and getattr(exclude, "ndim", 1) > 0


def _name(entry: Any) -> str | None:
    """The name of a module type; None for a predicate, which cannot be compared."""
    return f"{entry.__module__}.{entry.__qualname__}" if isinstance(entry, type) else None


def _as_sequence(value: Any) -> Sequence[Any]:
    return value if is_sequence(value) else [value]


def _each(name: str, value: Any, check: Callable[[str, Any], None]) -> None:
    """Checks ``value``, or each of its elements where it is a sequence."""
    if not is_sequence(value):
        return check(name, value)
    if len(value) == 0:
        raise ValueError(f"{name} is an empty sequence, expected one value per param group")
    for index, element in enumerate(value):
        check(f"{name}[{index}]", element)
    return None


def _check_wd(name: str, wd: Any) -> None:
    if isinstance(wd, Mapping):
        if not wd:
            raise ValueError(f"{name} is an empty dict, expected an entry per optimizer")
        for key, value in wd.items():
            if not isinstance(key, int) or isinstance(key, bool) or key < 0:
                raise TypeError(f"{name} has the key {key!r}, expected the index of an optimizer")
            if isinstance(value, Mapping):
                raise TypeError(f"{name}[{key}] is a dict inside a dict")
            _check_wd(f"{name}[{key}]", value)
    elif wd is not None:
        _each(name, wd, _check_coefficient)


def _check_coefficient(name: str, value: Any) -> None:
    # One of our schedules' classes would be called, and fail, only when training starts.
    if not callable(value) or (isinstance(value, type) and is_dataclass(value)):
        check_number(name, value, "a number or a schedule (a callable from progress)")


def _check_scale(name: str, value: Any) -> None:
    if callable(value):
        return
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be one of {', '.join(map(repr, SCALES))} or a callable from the param "
            f"group to a number, got {value!r} ({type(value).__name__})"
        )
    if value not in SCALES:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, SCALES))}, got {value!r}")


def _sampled(value: Any, sample: Callable[[Callable[[Any], Any]], Any]) -> Any:
    if is_sequence(value):
        return [_sampled(element, sample) for element in value]
    if callable(value):
        return sample(value)
    return float(value) if isinstance(value, Real) else value


def _at_progress(schedule: Schedule) -> Any:
    return _or_none(lambda: [float(schedule(step / 4)) for step in range(5)])


def _at_probe(scale: Callable[[Any], Any]) -> Any:
    """What ``scale`` makes of a group in which every value is 0.5."""
    return _or_none(lambda: float(scale(defaultdict(lambda: 0.5))))


def _or_none(sample: Callable[[], Any]) -> Any:
    """The sample, or None where the user's callable has none to give: then it is not compared."""
    try:
        return sample()
    except Exception:
        return None
