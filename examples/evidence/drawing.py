"""What the figures of the claims share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stats import BySeed, Interval, Rows, difference, figure_of, pick, wds

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#888888")  # of Okabe and Ito
LOSS, GAIN = "test loss", "test loss, less that\nwithout decay"


def curve(
    ax: Axes,
    rows: Rows,
    label: str,
    color: str,
    x: Callable[[float], float] = lambda wd: wd,
    than: BySeed | None = None,
    **settings: Any,
) -> None:
    """Test loss, or how much it is more ``than`` another, over the coefficient.

    The mean, its interval, and a circle where it is lowest.
    """
    tried = [wd for wd in wds(rows, **settings) if wd > 0]
    losses = [figure_of(rows, "test", **settings, wd=wd) for wd in tried]
    if than is not None:
        losses = [difference(own, than) for own in losses]
    found = [Interval.of(own.values()) for own in losses if own]
    if not found or len(found) < len(tried):
        return
    places, means = [x(wd) for wd in tried], [each.mean for each in found]
    ax.plot(places, means, color=color, label=label, marker=".", ms=4, lw=1.2)
    lows, highs = [each.low for each in found], [each.high for each in found]
    if found[0].seeds > 1:
        ax.fill_between(places, lows, highs, color=color, alpha=0.15, lw=0)
    lowest = int(np.argmin(means))
    ax.plot(places[lowest], means[lowest], "o", ms=8, mfc="none", color=color)
    ax.set_xscale("log")


def points(ax: Axes, figures: dict[str, BySeed]) -> None:
    """A mean with its interval for each name, and a dot for each seed."""
    for place, values in enumerate(figures.values()):
        found = Interval.of(values.values())
        half = found.high - found.mean if found.seeds > 1 else 0.0
        color = COLORS[place % len(COLORS)]
        ax.plot([place + 0.2] * len(values), [*values.values()], ".", ms=3, color=color)
        ax.errorbar(place, found.mean, half, fmt="o", ms=5, capsize=3, color=color)
    ax.set_xticks(range(len(figures)), figures, fontsize="small")
    ax.set_xlim(-0.5, len(figures) - 0.5)


def panels(rows: int, columns: int, height: float = 3.0) -> tuple[Figure, Any]:
    """A figure with an array of axes."""
    size = (max(3.3 * columns, 6.6), height * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def crop(ax: Axes, rows: Rows) -> None:
    """Leaves out the losses of networks that have learned nothing, or learned all by heart."""
    losses = [outcome.test for _, outcome in rows]
    lowest = min(losses)
    ax.set_ylim(lowest - 0.05, min(max(losses), lowest + 1) + 0.05)


def versus(rows: Rows, field: str, names: dict[bool, str]) -> Figure:
    """What two kinds of decay do to the loss, over the coefficient."""
    figure, axes = panels(1, 2, 3.4)
    for ax, task in zip(axes[0], ("digits", "text")):
        own = pick(rows, task=task)
        for (value, name), color in zip(names.items(), COLORS):
            than = figure_of(own, "test", wd=0.0)
            curve(ax, own, name, color, than=than, **{field: value})
        ax.axhline(0, color="black", lw=0.5)
        ax.set(xlabel="wd", ylabel=GAIN, title=task)
    axes[0, 0].legend(fontsize="small")
    return figure


def save(draw: Callable[[Rows], Figure], rows: Rows, path: Path) -> None:
    """Draws a figure and writes it; the same rows give the same file."""
    with plt.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.size": 9}):
        figure = draw(rows)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
