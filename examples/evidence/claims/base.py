"""What a claim is, and what the claims share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure
from stats import BySeed, Check, Rows, at_best, figure_of
from training import Run

SEEDS = {"digits": range(6), "text": range(4)}
NIL = 0.01  # differences of the loss within it count as no effect

DIGITS = Run("digits", 0, lr=4e-3, wd=0.0, steps=800, batch=32, examples=320)
TEXT = Run("text", 0, lr=3e-3, wd=0.0, steps=300, batch=8, examples=2400)


@dataclass(frozen=True)
class Claim:
    """A claim about an argument of the package."""

    name: str
    title: str
    says: str  # what is claimed, and by whom
    runs: list[Run]  # with seed 0, to be made with every seed
    checks: list[Check]
    draw: Callable[[Rows], Figure]

    def seeded(self, seeds: Sequence[int] = ()) -> list[Run]:
        """The runs with all seeds, all runs of a seed together, digits first."""
        found = [
            (task != "digits", seed, run)
            for task, own in SEEDS.items()
            for seed in (seeds or own)
            for run in self.runs
            if run.task == task
        ]
        return [replace(run, seed=seed) for _, seed, run in found]


def doubling(low: float, count: int) -> list[float]:
    """Coefficients from ``low`` on, each twice the one before."""
    return [low * 2**k for k in range(count)]


def tuned(rows: Rows, **settings: object) -> BySeed:
    """Test losses at the best coefficient above 0."""
    return at_best([row for row in rows if row[0].wd > 0], **settings)[1]


def none(rows: Rows, **settings: object) -> BySeed:
    """Test losses without decay."""
    return figure_of(rows, "test", **settings, wd=0.0)
