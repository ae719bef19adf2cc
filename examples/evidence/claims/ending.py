"""The gradient at the end of a cosine schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import mean

import numpy as np
from drawing import COLORS, panels
from matplotlib.figure import Figure
from stats import BySeed, Check, Interval, Rows, difference, figure_of, pick
from training import Run

from claims.base import DIGITS, NIL, SEEDS, TEXT, Claim

ENDING = [
    replace(base, scale_by=scale_by, trace=True)
    for base in (
        replace(DIGITS, wd=3.2, steps=3200, examples=1280),
        replace(TEXT, wd=3.0),
    )
    for scale_by in ("lr", "lr_squared")
]


def growth(run: Run, gradient: str) -> float:
    """The gradient's norm over the last tenth of the run, over that of the middle fifth."""
    norms = [float(norm) for norm in gradient.split()]
    tenth = len(norms) // 10 or 1
    middle = norms[4 * tenth : 6 * tenth] or norms
    return math.log2(mean(norms[-tenth:]) / mean(middle))


def growths(task: str, scale_by: str) -> Callable[[Rows], BySeed]:
    """The log2 of this growth, by seed."""
    return lambda rows: {
        run.seed: growth(run, outcome.gradient)
        for run, outcome in pick(rows, task=task, scale_by=scale_by)
    }


def loss_between(task: str, field: str, a: object, b: object) -> Callable[[Rows], BySeed]:
    """Test loss of the runs with ``field`` a less that of the runs with b."""
    return lambda rows: difference(
        figure_of(rows, "test", task=task, **{field: a}),
        figure_of(rows, "test", task=task, **{field: b}),
    )


def draw(rows: Rows) -> Figure:
    """The gradient's norm over the run."""
    figure, axes = panels(1, 2, 3.4)
    for ax, task in zip(axes[0], ("digits", "text")):
        for scale_by, color in zip(("lr", "lr_squared"), COLORS):
            own = pick(rows, task=task, scale_by=scale_by)
            if not own:
                continue
            lines = np.array([[float(x) for x in o.gradient.split()] for _, o in own])
            progress = (np.arange(lines.shape[1]) + 0.5) / lines.shape[1]
            found = [Interval.of(column) for column in lines.T]
            ax.plot(progress, [each.mean for each in found], color=color, label=scale_by)
            lows, highs = [each.low for each in found], [each.high for each in found]
            if len(lines) > 1:
                ax.fill_between(progress, lows, highs, color=color, alpha=0.15, lw=0)
        ax.set(xlabel="progress", ylabel="norm of the gradient", title=task, ylim=(0, None))
    axes[0, 0].legend(fontsize="small", title="scale_by")
    return figure


CLAIM = Claim(
    "ending",
    "lr_squared keeps the gradient from growing at the end of a cosine schedule",
    "With `lr` the gradient of normalized layers grows while lr falls to 0, and with `lr_squared` "
    "(AdamC, arXiv 2506.02285) it does not. Measured: the norm of the hidden layers' gradient over "
    "the last tenth of the run, divided by that over the middle fifth. Expected: above 1.1 with "
    "`lr`, below 1.1 with `lr_squared`, less growth with `lr_squared` than with `lr`, and a lower "
    "test loss.",
    ENDING,
    [
        check
        for task in SEEDS
        for check in (
            Check(f"{task}: growth with `lr`", growths(task, "lr"), math.log2(1.1), unit="x"),
            Check(
                f"{task}: growth with `lr_squared`",
                growths(task, "lr_squared"),
                high=math.log2(1.1),
                unit="x",
            ),
            Check(
                f"{task}: growth with `lr_squared` over that with `lr`",
                lambda rows, task=task: difference(
                    growths(task, "lr_squared")(rows), growths(task, "lr")(rows)
                ),
                high=0,
                unit="x",
            ),
            Check(
                f"{task}: test loss, `lr_squared` less `lr`",
                loss_between(task, "scale_by", "lr_squared", "lr"),
                high=0,
                nil=NIL,
            ),
        )
    ],
    draw,
)
