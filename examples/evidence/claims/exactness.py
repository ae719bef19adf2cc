"""The same weights as AdamW's."""

from __future__ import annotations

from dataclasses import replace

from drawing import panels, points
from matplotlib.figure import Figure
from stats import Check, Rows, figure_of, pick

from claims.base import DIGITS, SEEDS, TEXT, Claim


def draw(rows: Rows) -> Figure:
    """The largest difference for each kind of run."""
    figure, axes = panels(1, 1, 2.4)
    kinds = list(dict.fromkeys((run.task, run.normalized, run.dtype) for run, _ in rows))
    found = {
        f"{task}\n{dtype}\n{'' if norm else 'no '}normalization": figure_of(
            rows, "difference", task=task, normalized=norm, dtype=dtype
        )
        for task, norm, dtype in kinds
    }
    points(axes[0, 0], found)
    axes[0, 0].set_ylabel("largest difference\nto AdamW's weights")
    return figure


CLAIM = Claim(
    "exactness",
    "Adam + DecoupledWD(quantum=0) ends with AdamW's weights",
    "The largest difference of any final weight to AdamW's is 0, in runs like those above.",
    [
        replace(base, exact=True, **kwargs)
        for base, kwargs in (
            (replace(DIGITS, wd=3.2), {}),
            (replace(DIGITS, wd=0.4), {"normalized": False}),
            (replace(DIGITS, wd=0.1, lr=1e-3), {"dtype": "bfloat16"}),
            (replace(TEXT, wd=1.0, steps=100), {}),
        )
    ],
    [
        Check(
            f"{task}: largest difference",
            lambda rows, task=task: {
                seed: max(o.difference for r, o in pick(rows, task=task, seed=seed))
                for seed in {run.seed for run, _ in pick(rows, task=task)}
            },
            0,
            0,
        )
        for task in SEEDS
    ],
    draw,
)
