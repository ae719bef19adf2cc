"""The arguments that every ``DecoupledWD`` takes, checked once and immutable."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Real
from typing import Any

from torch import Tensor, nn

from wd_callbacks.core.checks import (
    TEXT,
    check_each,
    check_number,
    is_sequence,
    of_group,
    scalar,
    shown,
)
from wd_callbacks.core.groups import Group, wd_key
from wd_callbacks.core.selection import check_entry, entry_name
from wd_callbacks.schedules import Schedule, Timescale, needs_max_lr

SCALES = ("lr", "lr_ratio", "lr_squared", "none")
RATIOS = ("lr_ratio", "lr_squared")  # those that divide by max_lr


@dataclass(frozen=True)
class Config:
    """What the user asked for, checked when built.

    Attributes:
        wd: A number, a schedule, a sequence of these (one per param group), None (each group's own
            weight decay), a mapping from parameters to numbers or schedules, or a mapping from
            optimizer index to any of these but a mapping.
        scale_by: ``"lr"``, ``"lr_ratio"``, ``"lr_squared"``, ``"none"``, a callable from the param
            group to a number, or a sequence of these.
        max_lr: The peak learning rate that the ratios divide by, a number or one per group.
        exclude: Parameters that do not decay, see ``selection``.
        anchor: What weights decay towards: None (zero), ``"initial"``, or a mapping from parameter
            name to tensor, which is copied.
        cautious: Whether only elements decay that the update moves towards the anchor as well.
        quantum: Smallest shrink that is applied at once, in [0, 1); None: by dtype.
        verbose: Whether ``describe()`` is printed when training starts.

    Raises:
        TypeError, ValueError: An argument is invalid; the message names it.
    """

    wd: Any = None
    scale_by: Any = "lr"
    max_lr: Any = None
    exclude: Any = ()
    anchor: Any = None
    cautious: bool = False
    quantum: float | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked before an optimizer is known."""
        exclude = tuple(self.exclude) if _is_listed(self.exclude) else (self.exclude,)
        if isinstance(self.exclude, Set):  # in an order that is the same in every process
            exclude = tuple(sorted(exclude, key=repr))
        plain = {
            "wd": _plain(self.wd),
            "max_lr": _plain(self.max_lr),
            "exclude": exclude,
            "quantum": scalar(self.quantum),
            "anchor": _copied(self.anchor),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        _check_wd("wd", self.wd)
        check_each("scale_by", self.scale_by, _check_scale)
        if self.max_lr is not None:
            check_each("max_lr", self.max_lr, functools.partial(check_number, above=0))
        for entry in self.exclude:
            check_entry("exclude", entry)
        self._check_quantum()
        for name in ("cautious", "verbose"):
            if getattr(self, name) not in (True, False, None):
                raise TypeError(f"{name} must be True or False, got {shown(getattr(self, name))}")

    def _check_quantum(self) -> None:
        if self.quantum is None:
            return
        check_number("quantum", self.quantum)
        if self.quantum >= 1:
            raise ValueError(f"quantum must be below 1, got {self.quantum!r}")
        if self.cautious and self.quantum > 0:
            raise ValueError(
                f"cautious=True applies every step and defers nothing, so quantum="
                f"{self.quantum!r} has no meaning: leave quantum out"
            )

    def __repr__(self) -> str:
        """Show the arguments that are not the defaults, ``wd`` first and without its name."""
        given = [
            f"{field.name}={_quoted(getattr(self, field.name))}"
            for field in fields(self)[1:]
            if getattr(self, field.name) is not field.default
            and getattr(self, field.name) != field.default
        ]
        return ", ".join([_quoted(self.wd), *given])

    def of_optimizer(self, index: int, indices: Sequence[int]) -> Config:
        """Return the config of optimizer ``index``: its entry if ``wd`` maps optimizers.

        Raises:
            ValueError: The keys of ``wd`` are not the ``indices`` of the optimizers that decay.
        """
        if not self.maps_optimizers:
            return self
        if sorted(self.wd) != sorted(indices):
            remedy = f": pass optimizers={sorted(self.wd)}" if set(self.wd) < set(indices) else ""
            raise ValueError(
                f"wd has entries for the optimizers {sorted(self.wd)}, expected one for each of "
                f"{sorted(indices)}{remedy}"
            )
        return replace(self, wd=self.wd[index])

    @property
    def maps_optimizers(self) -> bool:
        """Whether ``wd`` is a mapping from optimizer index."""
        return isinstance(self.wd, Mapping) and all(isinstance(key, int) for key in self.wd)

    @property
    def keys(self) -> tuple[Any, ...]:
        """The keys of a ``wd`` that maps parameters, in order; else empty."""
        is_mapping = isinstance(self.wd, Mapping) and not self.maps_optimizers
        return tuple(self.wd) if is_mapping else ()

    @functools.cached_property
    def key_names(self) -> list[str]:
        """The keys of a ``wd`` that maps parameters, as text: each another one."""
        names = [entry_name(key) or schedule_name(key) for key in self.keys]
        seen = [names[:index].count(name) for index, name in enumerate(names)]
        return [f"{name} ({n + 1})" if n else name for name, n in zip(names, seen)]

    @property
    def is_scheduled(self) -> bool:
        """Whether a coefficient depends on training progress or on the length of the run."""
        return any(callable(wd) and not isinstance(wd, Timescale) for wd in _coefficients(self.wd))

    @property
    def follows_lr(self) -> bool:
        """Whether a group's decay is in proportion to its learning rate or its square."""
        scales = self.scale_by if is_sequence(self.scale_by) else [self.scale_by]
        return any(str(scale).startswith("lr") for scale in scales)

    @property
    def keeps_no_decay_groups(self) -> bool:
        """Whether groups with a weight decay of 0 beside others do not decay."""
        return self.wd is not None and not is_sequence(self.wd)

    def uses_max_lr(self, index: int) -> bool:
        """Whether the decay of param group ``index`` depends on its ``max_lr``."""
        scale_by = of_group(self.scale_by, index)
        coefficients = _coefficients(of_group(self.wd, index))
        return any(depends_on_max_lr(scale_by, wd) for wd in coefficients)

    def check_groups(self, groups: Sequence[Group]) -> None:
        """Check the arguments against the param groups of an optimizer.

        Raises:
            ValueError: A sequence has another length than ``groups``, a learning rate that is
                needed is missing, or ``wd`` is None and no group has a weight decay.
        """
        for name in ("wd", "scale_by", "max_lr"):
            value = getattr(self, name)
            if is_sequence(value) and len(value) != len(groups):
                raise ValueError(
                    f"{name} has {len(value)} values, but the optimizer has {len(groups)} param "
                    f"group{'s' * (len(groups) != 1)}: pass one value per group, or a single one "
                    f"for all"
                )
        if self.wd is None and all(wd_key(group) is None for group in groups):
            raise ValueError(
                "wd=None takes each param group's own weight decay, but this optimizer has none: "
                "pass a number or a schedule as wd"
            )
        for index, group in enumerate(groups):
            scale = of_group(self.scale_by, index)
            if isinstance(scale, str) and scale != "none" and group.get("lr") is None:
                found = "lr=None" if "lr" in group else "no 'lr'"
                raise ValueError(
                    f"scale_by={scale!r} needs a learning rate, but param group {index} has "
                    f"{found}: pass scale_by='none', or a callable from the param group to its "
                    f"real learning rate"
                )

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The arguments as plain values, to tell whether a resumed run changed them."""
        anchor = self.anchor if self.anchor is None or self.anchor == "initial" else "mapping"
        wd = dict(zip(self.key_names, self.wd.values())) if self.keys else self.wd
        compared = ("wd", "scale_by", "max_lr", "exclude", "quantum")
        return {
            "wd": _sampled(wd, _at_progress),
            "keys": self.key_names,  # files may sort a mapping
            "scale_by": _sampled(self.scale_by, _at_half),
            "max_lr": _sampled(self.max_lr, _at_half),
            "exclude": [entry_name(entry) for entry in self.exclude],
            "quantum": _sampled(self.quantum, _at_half),
            "anchor": anchor,
            "cautious": int(bool(self.cautious)),
            "shown": {name: _shown(getattr(self, name)) for name in compared},
        }


def depends_on_max_lr(scale_by: Any, wd: Any) -> bool:
    """Return True if a decay by ``scale_by`` and one coefficient depends on ``max_lr``."""
    return scale_by in RATIOS or (scale_by == "lr" and needs_max_lr(wd))


def _plain(value: Any) -> Any:
    """Return plain containers of plain numbers, also for those of OmegaConf, numpy and torch."""
    if isinstance(value, Mapping):
        return {key: _plain(element) for key, element in value.items()}
    if is_sequence(value):
        return tuple(map(scalar, value))
    return scalar(value)


def _copied(anchor: Any) -> Any:
    if anchor is None or (isinstance(anchor, str) and anchor == "initial"):
        return anchor
    if not isinstance(anchor, Mapping):
        raise TypeError(
            f"anchor must be None, 'initial' or a mapping from parameter name to tensor, such as a "
            f"state_dict(), got {shown(anchor)}"
        )
    tensors = {k: v for k, v in anchor.items() if not str(k).endswith("_extra_state")}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"anchor[{name!r}] is {shown(value)}, expected a tensor")
    if not tensors:
        raise ValueError("anchor names no parameter: it has no tensors. Leave anchor out")
    # A state_dict() shares memory with the weights that are about to be trained.
    return {name: value.detach().clone() for name, value in tensors.items()}


def _is_listed(exclude: Any) -> bool:
    # A tensor or an array of no dimension is a Collection that cannot be iterated over.
    is_text = isinstance(exclude, (*TEXT, Mapping))
    is_array = getattr(exclude, "ndim", 1) == 0 or isinstance(exclude, Tensor)
    return isinstance(exclude, Collection) and not (is_text or is_array or _is_module(exclude))


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)  # Sequential and ModuleList are collections


def _coefficients(wd: Any) -> list[Any]:
    """Return every number and schedule in ``wd``."""
    if isinstance(wd, Mapping):
        return [each for value in wd.values() for each in _coefficients(value)]
    return list(wd) if is_sequence(wd) else [wd]


def _check_wd(name: str, wd: Any) -> None:
    if not isinstance(wd, Mapping):
        if wd is not None:
            check_each(name, wd, _check_coefficient)
        return
    if not wd:
        raise ValueError(f"{name} is an empty mapping, expected at least one entry")
    indices = [key for key in wd if isinstance(key, int)]
    if indices and len(indices) < len(wd):
        raise TypeError(
            f"{name} mixes optimizer indices with keys of parameters, got {list(wd)}: use one kind"
        )
    for key, value in wd.items():
        if not indices:
            check_entry(f"the keys of {name}", key)
            _check_coefficient(f"{name}[{entry_name(key) or key!r}]", value)
            continue
        if isinstance(key, bool) or key < 0:
            raise TypeError(f"{name} has the key {key!r}, expected the index of an optimizer")
        if isinstance(value, Mapping):
            raise TypeError(
                f"{name}[{key}] is a mapping inside a mapping: use one DecoupledWD per optimizer, "
                f"each with optimizers= and a mapping of its own"
            )
        _check_wd(f"{name}[{key}]", value)


def _check_coefficient(name: str, value: Any) -> None:
    # A class of ours instead of an instance would be called, and fail, only when training starts.
    if not callable(value) or (isinstance(value, type) and is_dataclass(value)):
        check_number(name, value, "a number or a schedule (a callable from progress)")


def _check_scale(name: str, value: Any) -> None:
    if callable(value):
        return
    choices = ", ".join(map(repr, SCALES))
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be one of {choices} or a callable from the param group to a number, got "
            f"{shown(value)} ({type(value).__name__})"
        )
    if value not in SCALES:
        raise ValueError(f"{name} must be one of {choices} or a callable, got {value!r}")


def _shown(value: Any) -> str:
    """Return the text of an argument in messages: schedules by name, tensors left out."""
    if isinstance(value, Mapping):
        if any(isinstance(element, Tensor) for element in value.values()):
            return f"<{len(value)} tensors>"
        names = [k if isinstance(k, int) else entry_name(k) or schedule_name(k) for k in value]
        pairs = [f"{name}: {_shown(v)}" for name, v in zip(names, value.values())]
        return "{" + ", ".join(pairs) + "}"
    if is_sequence(value):
        return "[" + ", ".join(map(_quoted, value)) + "]"
    if callable(value):
        return schedule_name(value)
    return value if isinstance(value, str) else repr(value)


def _quoted(value: Any) -> str:
    return repr(value) if isinstance(value, str) else _shown(value)


def schedule_name(value: Any) -> str:
    """Return the name of a schedule or of a callable ``scale_by``, as short as it can be."""
    if is_dataclass(value):
        return repr(value)
    inner = getattr(value, "func", getattr(value, "f", value))  # of a partial, of fastai's SchedCos
    return getattr(inner, "__name__", None) or type(value).__name__


def _sampled(value: Any, sample: Callable[[Callable[[Any], Any]], Any]) -> Any:
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, int) else entry_name(key) or repr(key): _sampled(element, sample)
            for key, element in value.items()
        }
    if is_sequence(value):
        return [_sampled(element, sample) for element in value]
    if callable(value):
        return sample(value)
    return float(value) if isinstance(value, Real) else value


def _at_progress(schedule: Schedule) -> Any:
    return _or_none(lambda: [float(schedule(step / 4)) for step in range(5)])


def _at_half(scale: Callable[[Any], Any]) -> Any:
    """Return what ``scale`` gives for a group in which every value is 0.5."""
    return _or_none(lambda: float(scale(defaultdict(lambda: 0.5))))


def _or_none(sample: Callable[[], Any]) -> Any:
    """Return the sample, or None if the user's callable raises: then it is not compared."""
    try:
        return sample()
    except Exception:
        return None
