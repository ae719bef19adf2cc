"""The best coefficient, and the best timescale, when the run changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from drawing import COLORS, LOSS, crop, curve, panels
from matplotlib.figure import Figure
from stats import BySeed, Check, Rows, best_wd, difference, pick
from training import Run

from claims.base import DIGITS, Claim, doubling

KNOBS = {
    "batch size": [replace(DIGITS, batch=b, steps=800 * 32 // b) for b in (8, 32, 128)],
    "epochs": [replace(DIGITS, steps=steps) for steps in (200, 800, 3200)],
    "images": [replace(DIGITS, examples=n, steps=800 * n // 320) for n in (80, 320, 1280)],
}
SWEEP = doubling(0.4, 9)
LENGTHS = list(
    dict.fromkeys(replace(run, wd=wd) for runs in KNOBS.values() for run in runs for wd in SWEEP)
)


def best_of(rows: Rows, run: Run, timescale: bool) -> BySeed:
    """The log2 of the best coefficient, or of the best timescale in epochs."""
    own = best_wd(rows, steps=run.steps, batch=run.batch, examples=run.examples)
    epochs = -math.log2(run.lr * run.epoch())  # the log2 of the timescale of a wd of 1
    return {seed: epochs - wd if timescale else wd for seed, wd in own.items()}


def changed(knob: str, timescale: bool, to: int = 2) -> Callable[[Rows], BySeed]:
    """The log2 of how much the best one grows over the first ``to`` steps of a knob."""
    first, last = KNOBS[knob][0], KNOBS[knob][to]
    return lambda rows: difference(best_of(rows, last, timescale), best_of(rows, first, timescale))


def draw(rows: Rows) -> Figure:
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


CLAIM = Claim(
    "timescale",
    "The best timescale in epochs stays when the run changes",
    "If the batch size, the number of epochs or the number of images grows 16-fold at the same lr, "
    "the best timescale in epochs, 1 / (lr * wd * steps per epoch), stays within a factor of 2 "
    "(arXiv 2405.13698), while the best coefficient grows at least 4-fold with the batch size and "
    "falls at least 4-fold with the number of images. (With the number of epochs the coefficient "
    "and the timescale are the same thing.)",
    LENGTHS,
    [
        Check(
            f"best timescale in epochs, 16 times the {knob}", changed(knob, True), -1, 1, unit="x"
        )
        for knob in KNOBS
    ]
    + [
        Check("best wd, 16 times the batch size", changed("batch size", False), 2, unit="x"),
        Check("best wd, 16 times the images", changed("images", False), high=-2, unit="x"),
    ]
    + [
        Check(
            f"best timescale in epochs, 4 times the {knob}", changed(knob, True, 1), -1, 1, unit="x"
        )
        for knob in KNOBS
    ],
    draw,
)
