"""Decay only of elements that the update moves towards zero as well."""

from __future__ import annotations

from dataclasses import replace

from drawing import versus
from matplotlib.figure import Figure
from stats import Check, Rows, difference

from claims.base import DIGITS, NIL, SEEDS, TEXT, Claim, doubling, none, tuned

CAREFUL = [
    run
    for base, grid in ((DIGITS, doubling(0.4, 8)), (TEXT, (0.1, 0.3, 1.0)))
    for run in (
        base,
        *(replace(base, wd=wd, cautious=cautious) for cautious in (False, True) for wd in grid),
    )
]


def draw(rows: Rows) -> Figure:
    """Ordinary, and cautious."""
    return versus(rows, "cautious", {False: "ordinary", True: "cautious=True"})


CLAIM = Claim(
    "cautious",
    "Cautious decay gives a lower loss than ordinary decay",
    "At its best wd, `cautious=True` gives a lower test loss than ordinary decay at its own best "
    "wd (arXiv 2510.12402).",
    CAREFUL,
    [
        check
        for task in SEEDS
        for check in (
            Check(
                f"{task}: test loss, cautious less ordinary",
                lambda rows, task=task: difference(
                    tuned(rows, task=task, cautious=True), tuned(rows, task=task, cautious=False)
                ),
                high=0,
                nil=NIL,
            ),
            Check(
                f"{task}: test loss, ordinary less none",
                lambda rows, task=task: difference(
                    tuned(rows, task=task, cautious=False), none(rows, task=task)
                ),
            ),
        )
    ],
    draw,
)
