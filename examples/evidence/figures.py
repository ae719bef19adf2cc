"""A figure for each claim, from the rows of its CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from claims import GRIDS, KNOBS, LRS, decaying, share
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stats import BySeed, Interval, Rows, figure_of, pick, wds

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#888888")  # of Okabe and Ito
LOSS = "test loss"


def curve(
    ax: Axes,
    rows: Rows,
    label: str,
    color: str,
    x: Callable[[float], float] = lambda wd: wd,
    **settings: Any,
) -> None:
    """Test loss over the coefficient: the mean, its interval, and the lowest point."""
    tried = [wd for wd in wds(rows, **settings) if wd > 0]
    found = [Interval.of(figure_of(rows, "test", **settings, wd=wd).values()) for wd in tried]
    if not found:
        return
    places, means = [x(wd) for wd in tried], [each.mean for each in found]
    ax.plot(places, means, color=color, label=label, marker=".", ms=4, lw=1.2)
    lows, highs = [each.low for each in found], [each.high for each in found]
    if found[0].seeds > 1:
        ax.fill_between(places, lows, highs, color=color, alpha=0.15, lw=0)
    lowest = int(np.argmin(means))
    ax.plot(places[lowest], means[lowest], "o", ms=8, mfc="none", color=color)
    ax.set_xscale("log")


def level(ax: Axes, losses: BySeed, label: str) -> None:
    """A line for the runs without decay, and its interval."""
    if losses:
        found = Interval.of(losses.values())
        ax.axhline(found.mean, color="black", ls="--", lw=1, label=label)
        if found.seeds > 1:
            ax.axhspan(found.low, found.high, color="black", alpha=0.08, lw=0)


def points(ax: Axes, names: Sequence[str], figures: Sequence[BySeed]) -> None:
    """A mean with its interval for each name, and a dot for each seed."""
    for place, values in enumerate(figures):
        if values:
            found = Interval.of(values.values())
            half = found.high - found.mean if found.seeds > 1 else 0.0
            color = COLORS[place % len(COLORS)]
            ax.plot([place + 0.2] * len(values), [*values.values()], ".", ms=3, color=color)
            ax.errorbar(place, found.mean, half, fmt="o", ms=5, capsize=3, color=color)
    ax.set_xticks(range(len(names)), names, fontsize="small")
    ax.set_xlim(-0.5, len(names) - 0.5)


def panels(rows: int, columns: int, height: float = 3.0) -> tuple[Figure, Any]:
    """A figure with an array of axes."""
    size = (max(3.3 * columns, 6.6), height * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def crop(ax: Axes, rows: Rows) -> None:
    """Leaves out the losses of networks that have learned nothing, or learned all by heart."""
    losses = [outcome.test for _, outcome in rows]
    lowest = min(losses)
    ax.set_ylim(lowest - 0.05, min(max(losses), lowest + 1) + 0.05)


def faithful(rows: Rows) -> Figure:
    """What is left of the decay in bfloat16, and the losses."""
    figure, axes = panels(2, 2)
    optimizers = {
        "AdamW": "AdamW",
        "DecoupledWD": "Adam +\nDecoupledWD",
        "AdamW fused": "AdamW\nfused",
    }
    for (top, bottom), task in zip(axes.T, ("digits", "text")):
        points(top, [*optimizers.values()], [share(task, o)(rows) for o in optimizers])
        top.axhline(100, color="black", ls="--", lw=1)
        top.axhline(0, color="black", lw=0.5)
        top.set(title=f"{task}, bf16", ylabel="decay, % of that in fp32")
        arms = [
            figure_of(rows, "test", task=task, dtype=dtype, optimizer="DecoupledWD", wd=0.0)
            for dtype in ("float32", "bfloat16")
        ]
        for dtype, optimizer in (
            ("float32", "DecoupledWD"),
            *(("bfloat16", o) for o in optimizers),
        ):
            arms.append(figure_of(decaying(rows, task, dtype, optimizer), "test"))
        names = [
            "fp32\nnone",
            "bf16\nnone",
            "fp32\ndecay",
            "bf16\nAdamW",
            "bf16\nours",
            "bf16\nfused",
        ]
        points(bottom, names, arms)
        bottom.set_ylabel(LOSS)
    return figure


def coupling(rows: Rows) -> Figure:
    """Loss over the coefficient for three learning rates."""
    figure, axes = panels(2, 3)
    for ax, (norm, scale_by) in zip(axes[[0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2]], GRIDS):
        own = pick(rows, normalized=norm, scale_by=scale_by)
        for lr, color in zip(LRS, COLORS):
            curve(ax, own, f"lr {lr:g}", color, lr=lr)
        with_norm = "with" if norm else "without"
        ax.set_title(f'scale_by="{scale_by}"\n{with_norm} normalization', fontsize="medium")
        ax.set(xlabel="wd", ylabel=LOSS)
        crop(ax, own)
    axes[0, 0].legend(fontsize="small")
    return figure


def timescale(rows: Rows) -> Figure:
    """Loss over the coefficient, and over the timescale that it means."""
    figure, axes = panels(2, 3)
    for (top, bottom), (knob, runs) in zip(axes.T, KNOBS.items()):
        values = {"batch size": [r.batch for r in runs], "images": [r.examples for r in runs]}
        names = values.get(knob) or [round(r.steps / r.epoch()) for r in runs]
        for run, name, color in zip(runs, names, COLORS):
            own = pick(rows, steps=run.steps, batch=run.batch, examples=run.examples)
            curve(top, own, f"{name} {knob}", color)
            each = run.lr * run.epoch()
            curve(bottom, own, f"{name} {knob}", color, lambda wd, each=each: 1 / (wd * each))
        top.set(xlabel="wd", ylabel=LOSS, title=knob)
        bottom.set(xlabel="timescale, epochs", ylabel=LOSS)
        for ax in (top, bottom):
            crop(ax, rows)
        top.legend(fontsize="small")
    return figure


def versus(rows: Rows, field: str, names: dict[bool, str]) -> Figure:
    """Loss over the coefficient for two kinds of decay."""
    figure, axes = panels(1, 2, 3.4)
    for ax, task in zip(axes[0], ("digits", "text")):
        own = pick(rows, task=task)
        level(ax, figure_of(own, "test", wd=0.0), "no decay")
        for (value, name), color in zip(names.items(), COLORS):
            curve(ax, own, name, color, **{field: value})
        ax.set(xlabel="wd", ylabel=LOSS, title=task)
    axes[0, 0].legend(fontsize="small")
    return figure


def anchor(rows: Rows) -> Figure:
    """Towards zero, and towards the pretrained weights."""
    return versus(rows, "anchored", {False: "towards zero", True: "towards the anchor"})


def cautious(rows: Rows) -> Figure:
    """Ordinary, and cautious."""
    return versus(rows, "cautious", {False: "ordinary", True: "cautious=True"})


def ending(rows: Rows) -> Figure:
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


def schedule(rows: Rows) -> Figure:
    """DINO's schedule as it is, and scaled."""
    figure, axes = panels(1, 3, 3.4)
    arms = (("rising", 0.22), ("constant", 0.22), ("constant", 0.4))
    for ax, task in zip(axes[0], ("digits", "text")):
        own = pick(rows, task=task)
        losses = [figure_of(own, "test", shape=shape, wd=wd) for shape, wd in arms]
        points(ax, ["Cosine(\n0.04, 0.4)", "0.22", "0.4"], losses)
        ax.set(title=task, ylabel=LOSS)
    own = [row for row in pick(rows, task="digits") if row[0].wd > 0.5]
    for shape, color in zip(("rising", "constant", "falling"), COLORS):
        curve(axes[0, 2], own, shape, color, shape=shape)
    axes[0, 2].set(title="digits, scaled", xlabel="mean of wd", ylabel=LOSS)
    axes[0, 2].legend(fontsize="small")
    return figure


def exactness(rows: Rows) -> Figure:
    """The largest difference for each run."""
    figure, axes = panels(1, 1, 2.4)
    kinds = list(dict.fromkeys((run.task, run.normalized, run.dtype) for run, _ in rows))
    names = [
        f"{task}\n{dtype}\n{'' if norm else 'no '}normalization" for task, norm, dtype in kinds
    ]
    found = [figure_of(rows, "difference", task=t, normalized=n, dtype=d) for t, n, d in kinds]
    points(axes[0, 0], names, found)
    axes[0, 0].set_ylabel("largest difference\nto AdamW's weights")
    return figure


DRAW: dict[str, Callable[[Rows], Figure]] = {
    each.__name__: each
    for each in (faithful, coupling, timescale, anchor, cautious, ending, schedule, exactness)
}


def draw(name: str, rows: Rows, path: Path) -> None:
    """Draws a claim's figure; the same rows give the same file."""
    with plt.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
        figure = DRAW[name](rows)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
