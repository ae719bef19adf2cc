"""Decay only of elements that the update moves towards zero as well."""

from __future__ import annotations

from dataclasses import replace

from drawing import versus
from matplotlib.figure import Figure
from stats import BySeed, Check, Rows, difference

from claims.base import DIGITS, NIL, SEEDS, TEXT, Claim, doubling, none, tuned

SWEEPS = {"digits": doubling(0.4, 8), "text": [0.1, 0.3, 1.0]}
WIDER = {"digits": [102.4, 204.8], "text": [0.03]}  # added: some best wd was the last of its sweep
CAREFUL = [
    run
    for base in (DIGITS, TEXT)
    for run in (
        base,
        *(
            replace(base, wd=wd, cautious=cautious)
            for sweep in (SWEEPS, WIDER)
            for cautious in (False, True)
            for wd in sweep[base.task]
        ),
    )
]


def planned(rows: Rows) -> Rows:
    """The runs of the first sweep."""
    return [row for row in rows if row[0].wd not in WIDER[row[0].task]]


def less_ordinary(rows: Rows, task: str) -> BySeed:
    """Test loss of cautious decay less that of ordinary decay, each at its best coefficient."""
    return difference(tuned(rows, task=task, cautious=True), tuned(rows, task=task, cautious=False))


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
                lambda rows, task=task: less_ordinary(planned(rows), task),
                high=0,
                nil=NIL,
            ),
            Check(
                f"{task}: test loss, ordinary less none",
                lambda rows, task=task: difference(
                    tuned(planned(rows), task=task, cautious=False), none(rows, task=task)
                ),
            ),
            Check(
                f"{task}: test loss, cautious less ordinary, wider sweep (added after the run)",
                lambda rows, task=task: less_ordinary(rows, task),
                high=0,
                nil=NIL,
            ),
        )
    ],
    draw,
)
