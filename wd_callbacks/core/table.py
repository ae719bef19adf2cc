"""The tables of ``describe()``: a row per rule, or a row per parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from wd_callbacks.core.config import schedule_name
from wd_callbacks.core.decay import Decay
from wd_callbacks.core.deferred import Deferred
from wd_callbacks.core.groups import Group
from wd_callbacks.core.layout import Layout, key_of, make_layout
from wd_callbacks.core.rules import Rule
from wd_callbacks.core.selection import entry_name


class Count(NamedTuple):
    """A number of tensors, and of the parameters in them."""

    tensors: int
    parameters: int

    def __str__(self) -> str:
        """Show both, or a dash for none."""
        return f"{self.tensors:,} ({self.parameters:,})" if self.tensors else "-"


@dataclass(frozen=True)
class Row:
    """The decay of one param group, or of those of its parameters that a key of ``wd`` matches.

    Attributes:
        group: Index of the group, after that of the optimizer if there are several.
        key: The key of ``wd``; None if ``wd`` is not a mapping of parameters.
        coefficient: The ``wd`` in force: of the last step, or at progress 0 before the first.
        schedule: The schedule that it comes from; empty for a number.
        scale: The ``scale_by``.
        max_lr: The peak learning rate; None if it is not known.
        is_guess: Whether ``max_lr`` was read from the group, and not given.
        highest_lr: The largest learning rate of a step so far.
        decaying: Tensors and parameters that decay when they have a gradient.
        not_decaying: Those that are excluded, in a no-decay group, or have a coefficient of 0.
        frozen: Those that would decay, but do not require a gradient.
        shrink: What a step at ``max_lr`` subtracts; None if it is not known.
        steps_per_epoch: Steps of an epoch; None if it is not known.
        due: The shrink due so far, for parameters with a gradient at every step.
        applied: What of it has been applied, mean over the tensors; None if only the device knows.
    """

    group: str
    key: str | None
    coefficient: float
    schedule: str
    scale: str
    max_lr: float | None
    is_guess: bool
    highest_lr: float
    decaying: Count
    not_decaying: Count
    frozen: Count
    shrink: float | None
    steps_per_epoch: float | None
    due: float
    applied: float | None

    @property
    def timescale(self) -> float | None:
        """``1 / shrink``: over how many steps at ``max_lr`` weights forget their past."""
        return 1 / self.shrink if self.shrink and self.decaying.tensors else None

    def cells(self) -> dict[str, str]:
        """Return the row as it is printed, by column."""
        epochs = None
        if self.timescale is not None and self.steps_per_epoch is not None:
            epochs = self.timescale / self.steps_per_epoch
        wd = f"{self.coefficient:.4g}"
        max_lr = _number(self.max_lr)
        if self.is_guess and self.max_lr is not None:
            seen = f", lr so far at most {self.highest_lr:.4g}" if self.highest_lr else ""
            max_lr += f" (guess{seen})"
        applied = "on the device" if self.applied is None else _percent(self.applied)
        progress = f"{applied} of {_percent(self.due)}" if self.decaying.tensors else "-"
        return {
            "group": self.group,
            **({"key": self.key} if self.key is not None else {}),
            "wd": f"{wd} now, {self.schedule}" if self.schedule else wd,
            "scale_by": self.scale,
            "max_lr": max_lr,
            "decays": str(self.decaying),
            "does not": str(self.not_decaying),
            "frozen": str(self.frozen),
            "timescale at max_lr, steps": _number(self.timescale),
            "epochs": _number(epochs),
            "applied of due": progress,
        }


@dataclass(frozen=True)
class ParameterRow:
    """What the decay does to one parameter.

    Attributes:
        name: Its name in the model; a dash if it is not known.
        shape: Its shape.
        group: Index of its param group, after that of the optimizer if there are several.
        coefficient: The ``wd`` in force.
        anchor: What it decays towards: ``"zero"``, ``"initial"`` or ``"given"``.
        decays: Whether it decays when it has a gradient.
        reason: Why it does not decay; ``"decays"`` if it does.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    coefficient: float
    anchor: str
    decays: bool
    reason: str

    def cells(self) -> dict[str, str]:
        """Return the row as it is printed, by column."""
        return {
            "name": self.name,
            "shape": str(self.shape),
            "group": self.group,
            "wd": f"{self.coefficient:.4g}" if self.decays else "-",
            "anchor": self.anchor if self.decays else "-",
            "decays": "decays" if self.decays else f"no: {self.reason}",
        }


class Description(tuple[Any, ...]):
    """The rows of a table; ``print`` shows it.

    ``decays``, ``does not`` and ``frozen`` count tensors and, in parentheses, parameters.

    Examples:
        >>> import torch
        >>> from wd_callbacks.torch import DecoupledWD
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> decay = DecoupledWD(optimizer, 0.01, exclude="bias", model=model)
        >>> print(decay.describe(parameters=True))
        name    shape   group  wd    anchor  decays
        weight  (2, 4)  0      0.01  zero    decays
        bias    (2,)    0      -     -       no: excluded by 'bias'
    """

    def __str__(self) -> str:
        """Show the table."""
        rows = [row.cells() for row in self]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        lines = [
            columns or ["no rows"],
            *([row.get(name, "-") for name in columns] for row in rows),
        ]
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def describe(decay: Decay, groups: Sequence[Group], label: str = "") -> Description:
    """Return a row per rule: what the decay does to each param group.

    Args:
        decay: The decay.
        groups: The optimizer's param groups.
        label: What stands before the index of each group.
    """
    layout = _layout(decay, groups)
    coefficients = _coefficients(decay, layout, groups)
    members: list[list[Tensor]] = [[] for _ in layout.rules]
    for _, index, p in _listed(decay, layout, groups):
        if index is not None:
            members[index].append(p)
    return Description(
        _row(decay, layout, groups[rule.group], rule, wd, params, label)
        for rule, wd, params in zip(layout.rules, coefficients, members)
    )


def describe_parameters(decay: Decay, groups: Sequence[Group], label: str = "") -> Description:
    """Return a row per parameter: whether it decays, and if not, why.

    Args:
        decay: The decay.
        groups: The optimizer's param groups.
        label: What stands before the index of each group.
    """
    layout = _layout(decay, groups)
    coefficients = _coefficients(decay, layout, groups)
    rows = []
    for group, index, p in _listed(decay, layout, groups):
        rule = None if index is None else layout.rules[index]
        coefficient = 0.0 if index is None else coefficients[index]
        reason = _reason(decay, layout, group, rule, coefficient, p)
        rows.append(
            ParameterRow(
                name=", ".join(layout.selected[p].names) or "-",
                shape=() if is_lazy(p) else tuple(p.shape),
                group=f"{label}{group}",
                coefficient=coefficient,
                anchor=_anchor(decay, layout, p),
                decays=not reason,
                reason=reason or "decays",
            )
        )
    return Description(rows)


def _layout(decay: Decay, groups: Sequence[Group]) -> Layout:
    """Return the layout in force, or what it will be if groups are new."""
    sizes = [len(group["params"]) for group in groups]
    is_known = all(p in decay.layout.selected for group in groups for p in group["params"])
    if decay.layout.states and decay.layout.sizes == sizes and is_known:
        return decay.layout
    quiet = replace(decay.setup, warn=lambda message: None)  # it is said when training starts
    return make_layout(quiet, groups, (), decay.layout)


def _coefficients(decay: Decay, layout: Layout, groups: Sequence[Group]) -> list[float]:
    if layout is decay.layout and len(decay.coefficients) == len(layout.rules):
        return decay.coefficients
    return [rule.coefficient(groups[rule.group], decay.progress) for rule in layout.rules]


def _listed(
    decay: Decay, layout: Layout, groups: Sequence[Group]
) -> list[tuple[int, int | None, Tensor]]:
    """Return each parameter once, with the index of its group and of its rule."""
    index = {(rule.group, rule.key): i for i, rule in enumerate(layout.rules)}
    first = {
        p: number for number, group in reversed(list(enumerate(groups))) for p in group["params"]
    }
    listed = dict.fromkeys(p for group in groups for p in group["params"])
    return [
        (first[p], index.get((first[p], key_of(decay.setup.config, layout.selected[p]))), p)
        for p in listed
    ]


def _row(
    decay: Decay,
    layout: Layout,
    group: Group,
    rule: Rule,
    coefficient: float,
    params: Sequence[Tensor],
    label: str,
) -> Row:
    reasons = {p: _reason(decay, layout, rule.group, rule, coefficient, p) for p in params}
    frozen = [p for p in params if reasons[p] == FROZEN]
    decaying = [p for p in params if reasons[p] in ("", NO_GRADIENT)]
    others = [p for p in params if reasons[p] not in ("", NO_GRADIENT, FROZEN)]
    deferred = layout.all_deferred()
    log = sum(deferred.get(p, Deferred()).log for p in decaying) / max(len(decaying), 1)
    scale = rule.scale_by
    return Row(
        group=f"{label}{rule.group}",
        key=rule.key,
        coefficient=coefficient,
        schedule=rule.schedule,
        scale=scale if isinstance(scale, str) else schedule_name(scale),
        max_lr=rule.max_lr,
        is_guess=rule.is_guess,
        highest_lr=rule.highest_lr,
        decaying=_count(decaying),
        not_decaying=_count(others),
        frozen=_count(frozen),
        shrink=rule.peak_amount(coefficient, group),
        steps_per_epoch=decay.setup.run.steps_per_epoch,
        due=-math.expm1(-rule.due),
        applied=max(0.0, -math.expm1(log - rule.due)) if rule.is_known else None,
    )


FROZEN, NO_GRADIENT = "frozen", "no gradient so far"


def _reason(
    decay: Decay, layout: Layout, group: int, rule: Rule | None, coefficient: float, p: Tensor
) -> str:
    """Return why ``p`` does not decay; empty if it does."""
    selected = layout.selected[p]
    if selected.exclude is not None:
        return f"excluded by {entry_name(selected.exclude) or selected.exclude!r}"
    if layout.states[group].no_decay and decay.setup.config.keeps_no_decay_groups:
        return "no-decay group"
    if rule is None:
        return "no key matches"
    if not decay.setup.may_decay(p):
        return "do_wd=False"
    if coefficient == 0 and not callable(rule.wd):
        return "coefficient 0"
    if not p.requires_grad and p.grad is None:
        return FROZEN
    return "" if p in layout.with_gradient or not decay.steps else NO_GRADIENT


def _anchor(decay: Decay, layout: Layout, p: Tensor) -> str:
    anchor = decay.setup.config.anchor
    if anchor is None:
        return "zero"
    if anchor == "initial":
        return "initial"
    return "zero" if decay.setup.anchors.key(layout.selected[p].names) is None else "given"


def _count(params: Sequence[Tensor]) -> Count:
    return Count(len(params), sum(0 if is_lazy(p) else p.numel() for p in params))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"
