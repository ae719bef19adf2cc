"""A rising schedule against constants."""

from __future__ import annotations

from dataclasses import replace

from drawing import COLORS, LOSS, curve, panels, points
from matplotlib.figure import Figure
from stats import BySeed, Check, Rows, difference, figure_of, pick

from claims.base import DIGITS, NIL, SEEDS, TEXT, Claim, doubling, tuned

DINO = [
    replace(base, wd=wd, shape=shape)
    for base in (DIGITS, TEXT)
    for shape, wd in (("rising", 0.22), ("constant", 0.22), ("constant", 0.4))
]
SCALED = [
    replace(DIGITS, wd=wd, shape=shape)
    for wd in doubling(0.88, 7)
    for shape in ("rising", "constant", "falling")
]


def shaped(rows: Rows, task: str, shape: str, wd: float) -> BySeed:
    """Test losses of a shape."""
    return figure_of(rows, "test", task=task, shape=shape, wd=wd)


def draw(rows: Rows) -> Figure:
    """DINO's schedule as it is, and scaled."""
    figure, axes = panels(1, 3, 3.4)
    for ax, task in zip(axes[0], ("digits", "text")):
        rising = figure_of(rows, "test", task=task, shape="rising", wd=0.22)
        others = {
            f"{wd}": figure_of(rows, "test", task=task, shape="constant", wd=wd)
            for wd in (0.22, 0.4)
        }
        less = {f"less {name}": difference(rising, own) for name, own in others.items() if own}
        points(ax, less)
        ax.axhline(0, color="black", lw=0.5)
        ax.set(title=f"{task}: Cosine(0.04, 0.4)", ylabel="difference of the test loss")
    own = [row for row in pick(rows, task="digits") if row[0].wd > 0.5]
    for shape, color in zip(("rising", "constant", "falling"), COLORS):
        curve(axes[0, 2], own, shape, color, shape=shape)
    axes[0, 2].set(title="digits, scaled", xlabel="mean of wd", ylabel=LOSS)
    axes[0, 2].legend(fontsize="small")
    return figure


CLAIM = Claim(
    "schedule",
    "A rising schedule is better than a constant",
    "`Cosine(0.04, 0.4)` (DINO's) gives a lower test loss than a constant of the same mean, 0.22, "
    "and than one of the same end, 0.4. The same holds on digits if all are scaled by the factor "
    "that is best for each.",
    DINO + SCALED,
    [
        Check(
            f"{task}: test loss, `Cosine(0.04, 0.4)` less {wd}",
            lambda rows, task=task, wd=wd: difference(
                shaped(rows, task, "rising", 0.22), shaped(rows, task, "constant", wd)
            ),
            high=0,
            nil=NIL,
        )
        for task in SEEDS
        for wd in (0.22, 0.4)
    ]
    + [
        Check(
            f"digits, each at its best scale: test loss, rising less {other}",
            lambda rows, other=other: difference(
                tuned(rows, task="digits", shape="rising"), tuned(rows, task="digits", shape=other)
            ),
            high=0,
            nil=NIL,
        )
        for other in ("constant", "falling")
    ],
    draw,
)
