"""What is left of the decay in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from drawing import panels, points
from matplotlib.figure import Figure
from stats import BySeed, Check, Rows, combine, difference, figure_of, pick

from claims.base import DIGITS, NIL, SEEDS, TEXT, Claim

LONG = replace(DIGITS, lr=1e-3, wd=0.1, steps=6000, examples=1280)
STRONG = replace(TEXT, wd=0.5)
BY_HAND = "stochastic rounding"
ARMS = (
    ("float32", "DecoupledWD", False),
    ("float32", "DecoupledWD", True),
    ("bfloat16", "DecoupledWD", False),
    ("bfloat16", "DecoupledWD", True),
    ("bfloat16", "AdamW", True),
    ("bfloat16", "AdamW fused", False),
    ("bfloat16", "AdamW fused", True),
    ("bfloat16", BY_HAND, True),
)
PRECISE = [
    replace(base, wd=base.wd if decays else 0.0, dtype=dtype, optimizer=optimizer)
    for base, arms in ((LONG, ARMS), (STRONG, ARMS[:5]))
    for dtype, optimizer, decays in arms
]


def decaying(rows: Rows, task: str, dtype: str, optimizer: str) -> Rows:
    """The runs of an arm with a coefficient above 0."""
    return [row for row in pick(rows, task=task, dtype=dtype, optimizer=optimizer) if row[0].wd > 0]


def undecayed(rows: Rows, task: str, dtype: str, optimizer: str) -> Rows:
    """The runs to compare them with.

    Without decay, Adam and AdamW are the same, but the fused one rounds in other places.
    """
    plain = optimizer if "fused" in optimizer else "DecoupledWD"
    return pick(rows, task=task, dtype=dtype, optimizer=plain, wd=0.0)


def shrunk(rows: Rows, task: str, dtype: str, optimizer: str) -> BySeed:
    """By how much decay lowered the norm of the weights: the log of the ratio."""
    without = figure_of(undecayed(rows, task, dtype, optimizer), "norm")
    decayed = figure_of(decaying(rows, task, dtype, optimizer), "norm")
    return combine(lambda a, b: math.log(a / b), without, decayed)


def share(task: str, optimizer: str) -> Callable[[Rows], BySeed]:
    """How much of float32's lowering of the norm happens in bfloat16, in %."""
    return lambda rows: combine(
        lambda part, whole: 100 * part / whole if whole else math.nan,
        shrunk(rows, task, "bfloat16", optimizer),
        shrunk(rows, task, "float32", "DecoupledWD"),
    )


def loss(rows: Rows, task: str, dtype: str, optimizer: str) -> BySeed:
    """Test loss with decay less that without."""
    decayed = figure_of(decaying(rows, task, dtype, optimizer), "test")
    return difference(decayed, figure_of(undecayed(rows, task, dtype, optimizer), "test"))


def loss_in_bf16(rows: Rows, task: str) -> BySeed:
    """Test loss with DecoupledWD less that with AdamW."""
    ours, theirs = (
        figure_of(decaying(rows, task, "bfloat16", optimizer), "test")
        for optimizer in ("DecoupledWD", "AdamW")
    )
    return difference(ours, theirs)


def faithful_checks(task: str) -> list[Check]:
    """The checks of a task."""
    return [
        Check(f"{task}: decay left in bf16, AdamW", share(task, "AdamW"), -2, 2, unit=" %"),
        Check(
            f"{task}: decay left in bf16, Adam + `DecoupledWD`",
            share(task, "DecoupledWD"),
            *(80, 125),
            unit=" %",
        ),
        Check(
            f"{task}: test loss in bf16, `DecoupledWD` less AdamW",
            lambda rows: loss_in_bf16(rows, task),
            high=0,
            nil=NIL,
        ),
    ]


OTHERS = [
    Check("digits: decay left in bf16, fused AdamW", share("digits", "AdamW fused"), unit=" %"),
    Check(
        "digits: decay left in bf16, by hand with stochastic rounding (added after the run)",
        share("digits", BY_HAND),
        unit=" %",
    ),
    *(
        Check(
            f"{task}: test loss in {name}, with decay less without (added after the run)",
            partial(loss, task=task, dtype=dtype, optimizer="DecoupledWD"),
        )
        for task in SEEDS
        for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
    ),
]


def draw(rows: Rows) -> Figure:
    """What is left of the decay in bfloat16."""
    figure, axes = panels(1, 2)
    names = {
        "AdamW": "AdamW",
        "DecoupledWD": "Adam +\nDecoupledWD",
        "AdamW fused": "AdamW,\nfused",
        BY_HAND: "by hand,\nstochastic\nrounding",
    }
    for ax, task in zip(axes[0], SEEDS):
        shares = {name: share(task, optimizer)(rows) for optimizer, name in names.items()}
        points(ax, {name: values for name, values in shares.items() if values})
        ax.axhline(100, color="black", ls="--", lw=1)
        ax.axhline(0, color="black", lw=0.5)
        ax.set(title=f"{task}: weights in bf16", ylabel="decay, % of that in fp32")
        ax.set_ylim(-8, 150)
    return figure


CLAIM = Claim(
    "faithful",
    "In bf16, AdamW's decay vanishes and DecoupledWD's does not",
    "Trained in pure bf16 with lr * wd below 2^-9, AdamW does not decay at all, because the factor "
    "rounds to 1. Adam + `DecoupledWD` decays as in fp32. Measured: by how much decay lowers the "
    "log of the norm of the weights, as a share of what it does in fp32. Expected: within 2 % of 0 "
    "for AdamW, 80 to 125 % for `DecoupledWD`, and a lower test loss with `DecoupledWD`.",
    PRECISE,
    [*(check for task in SEEDS for check in faithful_checks(task)), *OTHERS],
    draw,
)
