"""From finished runs to numbers with intervals over seeds, and to a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from scipy.stats import t
from training import Outcome, Run

Rows = list[tuple[Run, Outcome]]
BySeed = dict[int, float]


def pick(rows: Rows, **settings: Any) -> Rows:
    """The runs with these settings."""
    wanted = settings.items()
    return [row for row in rows if all(getattr(row[0], key) == value for key, value in wanted)]


def figure_of(rows: Rows, name: str, **settings: Any) -> BySeed:
    """One figure of the outcome, by seed."""
    return {run.seed: getattr(outcome, name) for run, outcome in pick(rows, **settings)}


def combine(how: Callable[..., float], *figures: Mapping[int, float]) -> BySeed:
    """A function of several figures, seed by seed: the runs of a seed are paired."""
    seeds = set.intersection(*(set(each) for each in figures))
    return {seed: how(*(each[seed] for each in figures)) for seed in sorted(seeds)}


def difference(a: BySeed, b: BySeed) -> BySeed:
    """``a - b``, paired."""
    return combine(lambda x, y: x - y, a, b)


def wds(rows: Rows, **settings: Any) -> list[float]:
    """The coefficients that were tried with these settings."""
    return sorted({run.wd for run, _ in pick(rows, **settings)})


def best_wd(rows: Rows, **settings: Any) -> BySeed:
    """The log2 of the best coefficient of each seed.

    It is where the parabola through the lowest loss and its two neighbours is lowest, or the end of
    the sweep if the loss is lowest there. All held-out data counts.
    """
    tried = wds(rows, **settings)
    best = {}
    for seed in {run.seed for run, _ in pick(rows, **settings)}:
        losses = [
            mean(
                outcome.valid + outcome.test
                for _, outcome in pick(rows, seed=seed, **settings, wd=wd)
            )
            for wd in tried
        ]
        low = min(range(len(tried)), key=losses.__getitem__)
        shift = 0.0
        if 0 < low < len(tried) - 1:
            left, middle, right = losses[low - 1 : low + 2]
            curvature = left - 2 * middle + right
            shift = (left - right) / curvature / 2 if curvature > 0 else 0.0
        place = math.log2(tried[low])
        step = math.log2(tried[1] / tried[0]) if len(tried) > 1 else 0.0
        best[seed] = place + shift * step
    return best


def at_best(rows: Rows, **settings: Any) -> tuple[float, BySeed]:
    """The coefficient with the lowest mean loss on the data to choose with, and the test losses."""
    tried = wds(rows, **settings)
    if not tried:
        return math.nan, {}
    chosen = min(
        tried,
        key=lambda wd: mean(figure_of(rows, "valid", **settings, wd=wd).values()),
    )
    return chosen, figure_of(rows, "test", **settings, wd=chosen)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % t interval."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Interval:
        """The interval of one value per seed; of a single value, no bounds are known."""
        found = list(values)
        middle, count = mean(found), len(found)
        half = math.inf
        if count > 1:
            half = float(t.ppf(0.975, count - 1)) * stdev(found) / math.sqrt(count)
        return cls(middle, middle - half, middle + half, count)


@dataclass(frozen=True)
class Check:
    """What is measured, and the range in which the claim puts it.

    The claim holds if the whole interval is in the range, fails if it is outside, and is not
    decided if it is both. An interval within ``nil`` of 0 is called no effect, whatever its sign.
    """

    text: str
    measure: Callable[[Rows], BySeed]
    low: float = -math.inf
    high: float = math.inf
    nil: float = 0.0
    unit: str = ""  # "x": the measure is a log2, shown as a factor

    def expected(self) -> str:
        """The range in words."""
        low, high = self.shown(self.low), self.shown(self.high)
        if self.low == self.high:
            return f"exactly {low}"
        if math.isinf(self.low) and math.isinf(self.high):
            return "-"
        if math.isinf(self.low):
            return f"below {high}"
        return f"above {low}" if math.isinf(self.high) else f"{low} to {high}"

    def shown(self, value: float) -> str:
        """A value with its unit."""
        if self.unit == "x":
            return f"{2**value:.3g}x"
        return f"{value:.3g}{self.unit}"

    def verdict(self, found: Interval) -> str:
        """In a word or two."""
        if math.isinf(self.low) and math.isinf(self.high):
            return "reported only"
        if self.nil and -self.nil <= found.low and found.high <= self.nil:
            return "no effect"
        if self.low <= found.low and found.high <= self.high:
            return "holds"
        if found.high < self.low or self.high < found.low:
            return "fails"
        return "not decided"

    def row(self, rows: Rows) -> str:
        """A line of a Markdown table."""
        values = self.measure(rows)
        if not values:
            return f"| {self.text} | {self.expected()} | not run | | |"
        found = Interval.of(values.values())
        between = f"{self.shown(found.low)} to {self.shown(found.high)}"
        return (
            f"| {self.text} | {self.expected()} | {self.shown(found.mean)} ({between}) "
            f"| {found.seeds} | {self.verdict(found)} |"
        )
