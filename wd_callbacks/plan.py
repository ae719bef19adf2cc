"""A picture and the numbers of a planned run, without training it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from wd_callbacks.core.checks import check_count, is_sequence, number
from wd_callbacks.core.config import Config
from wd_callbacks.core.rules import GroupState, make_rule
from wd_callbacks.schedules import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Plan(NamedTuple):
    """A planned run, one value per step; ``print`` shows its first, middle and last step.

    Attributes:
        coefficients: The ``wd`` in force.
        lrs: The learning rate.
        shrinks: The fraction of the weights that the step takes away.
        left: The fraction of the first weights that is left after the step.
    """

    coefficients: list[float]
    lrs: list[float]
    shrinks: list[float]
    left: list[float]

    def __repr__(self) -> str:
        """Show a few steps."""
        last = len(self.lrs) - 1
        lines = [f"{'step':>8}  {'wd':>10}  {'lr':>10}  {'shrink':>10}  {'left':>8}"]
        for i in sorted({0, last // 2, last}):
            wd, lr, shrink, left = (values[i] for values in self)
            lines.append(f"{i:>8}  {wd:>10.4g}  {lr:>10.4g}  {shrink:>10.4g}  {left:>8.2%}")
        return "\n".join(lines)


def plan(
    wd: Any,
    lr: float | Callable[[float], float],
    steps: int,
    *,
    scale_by: Any = "lr",
    max_lr: float | None = None,
    steps_per_epoch: float | None = None,
) -> Plan:
    """Return what ``DecoupledWD(wd, scale_by=scale_by, max_lr=max_lr)`` will do to a param group.

    Args:
        wd: A coefficient of at least 0, or a schedule.
        lr: The learning rate, or a callable from training progress in [0, 1] to it, such as
            fastai's ``combined_cos(0.25, 4e-4, 1e-2, 1e-7)``.
        steps: Optimizer steps of the run, at least 1.
        scale_by: As for ``DecoupledWD``; a callable gets the group ``{"lr": ...}``.
        max_lr: As for ``DecoupledWD``; None for the maximum of ``lr``.
        steps_per_epoch: Optimizer steps of an epoch, for ``Timescale(epochs=...)``.

    Returns:
        The values of every step.

    Raises:
        TypeError, ValueError: An argument is invalid, or a coefficient or a shrink at a step.

    Examples:
        >>> planned = plan(0.5, lr=0.1, steps=2)
        >>> planned.shrinks, [round(left, 4) for left in planned.left]
        ([0.05, 0.05], [0.95, 0.9025])
    """
    check_count("steps", steps)
    if wd is None or is_sequence(wd) or isinstance(wd, Mapping):
        raise TypeError(f"wd must be a number or a schedule, got {wd!r}: plan one at a time")
    lrs = [number(lr(i / steps) if callable(lr) else lr, "lr") for i in range(steps)]
    config = Config(wd, scale_by, max_lr=max(lrs) if max_lr is None else max_lr)
    state = GroupState(float(config.max_lr), is_guess=False, no_decay=False)
    rule = make_rule(config, Run(steps, steps_per_epoch), 0, state, key=None)
    rows = [rule.shrink({"params": [], "lr": lr}, i / steps) for i, lr in enumerate(lrs)]
    shrinks = [float(shrink.amount) for shrink in rows]
    left = [math.exp(log) for log in accumulate(math.log1p(-shrink) for shrink in shrinks)]
    return Plan([shrink.coefficient for shrink in rows], lrs, shrinks, left)


def plot_plan(*args: Any, **kwargs: Any) -> Figure:
    """Draw ``plan(*args, **kwargs)``: coefficient, lr, shrink, timescale and weights left.

    Returns:
        The figure, which is also the current one of ``matplotlib.pyplot``.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: As ``plan``.

    Examples:
        >>> from wd_callbacks.schedules import Cosine
        >>> figure = plot_plan(Cosine(0.1, 0), lr=lambda progress: 1e-2 * (1 - progress), steps=100)
        >>> [ax.get_ylabel() for ax in figure.axes]
        ['wd', 'lr', 'shrink per step', 'timescale, steps', 'weights left']
    """
    from matplotlib import pyplot

    planned = plan(*args, **kwargs)
    figure = pyplot.figure(figsize=(7, 9), layout="constrained")
    panels: Sequence[tuple[str, Sequence[float]]] = [
        ("wd", planned.coefficients),
        ("lr", planned.lrs),
        ("shrink per step", planned.shrinks),
        ("timescale, steps", [1 / shrink if shrink else math.nan for shrink in planned.shrinks]),
        ("weights left", planned.left),
    ]
    for ax, (label, values) in zip(figure.subplots(len(panels), 1, sharex=True), panels):
        ax.plot(values)
        ax.set_ylabel(label)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[3].set_yscale("log")
    figure.axes[4].set_ylim(0, 1)
    figure.axes[4].set_xlabel("step")
    figure.suptitle(f"{planned.left[-1]:.1%} of the first weights are left at the end")
    return figure
