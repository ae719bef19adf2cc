"""Fine-tuning with decay towards the pretrained weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from drawing import versus
from matplotlib.figure import Figure
from stats import BySeed, Check, Rows, difference

from claims.base import DIGITS, NIL, SEEDS, TEXT, Claim, none, tuned

FEW = replace(DIGITS, lr=3e-3, steps=200, batch=25, examples=25, data="new")
STYLE = replace(TEXT, lr=1e-3, steps=100, examples=64, data="new")
FINETUNED = [
    run
    for base, grid in ((FEW, (0.25, 1.0, 4.0, 16.0, 64.0)), (STYLE, (2.0, 8.0, 32.0, 128.0)))
    for run in (
        base,
        *(replace(base, wd=wd, anchored=anchored) for anchored in (False, True) for wd in grid),
    )
]


def anchor_less(other: str, task: str) -> Callable[[Rows], BySeed]:
    """Test loss with an anchor less that with another decay, each at its best coefficient."""
    return lambda rows: difference(
        tuned(rows, task=task, anchored=True),
        none(rows, task=task) if other == "none" else tuned(rows, task=task, anchored=False),
    )


def draw(rows: Rows) -> Figure:
    """Towards zero, and towards the pretrained weights."""
    return versus(rows, "anchored", {False: "towards zero", True: "towards the anchor"})


CLAIM = Claim(
    "anchor",
    "Decay towards the pretrained weights helps to fine-tune on few examples",
    "Fine-tuned on few examples, decay towards the pretrained weights gives a lower test loss than "
    "decay towards zero and than none (arXiv 1802.01483), each at its best wd. Digits: pretrained "
    "on 0 to 4, fine-tuned on 5 images each of 5 to 9, with a new head that does not decay. Text: "
    "pretrained on the standard library, fine-tuned on 64 pieces of 64 characters of "
    "scikit-learn's source.",
    FINETUNED,
    [
        Check(f"{task}: test loss, anchor less {other}", anchor_less(other, task), high=0, nil=NIL)
        for task in SEEDS
        for other in ("none", "zero")
    ],
    draw,
)
