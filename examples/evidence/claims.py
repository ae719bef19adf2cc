"""The claims: what is claimed, the rule that decides it, and the runs that it takes.

All of it was written down before the first full run. docs/evidence.md has the same words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from stats import BySeed, Check, Rows, at_best, best_wd, combine, difference, figure_of, pick
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


# Faithful

LONG = replace(DIGITS, lr=1e-3, wd=0.1, steps=6000, examples=1280)
STRONG = replace(TEXT, wd=0.5)
ARMS = (
    ("float32", "DecoupledWD", False),
    ("float32", "DecoupledWD", True),
    ("bfloat16", "DecoupledWD", False),
    ("bfloat16", "DecoupledWD", True),
    ("bfloat16", "AdamW", True),
    ("bfloat16", "AdamW fused", False),
    ("bfloat16", "AdamW fused", True),
)
PRECISE = [
    replace(base, wd=base.wd if decays else 0.0, dtype=dtype, optimizer=optimizer)
    for base, arms in ((LONG, ARMS), (STRONG, ARMS[:5]))
    for dtype, optimizer, decays in arms
]


def decaying(rows: Rows, task: str, dtype: str, optimizer: str) -> Rows:
    """The runs of an arm with a coefficient above 0."""
    return [row for row in pick(rows, task=task, dtype=dtype, optimizer=optimizer) if row[0].wd > 0]


def shrunk(rows: Rows, task: str, dtype: str, optimizer: str) -> BySeed:
    """By how much decay lowered the norm of the weights: the log of the ratio.

    Without decay, Adam and AdamW are the same, but the fused one rounds in other places.
    """
    plain = optimizer if "fused" in optimizer else "DecoupledWD"
    without = figure_of(rows, "norm", task=task, dtype=dtype, optimizer=plain, wd=0.0)
    decayed = figure_of(decaying(rows, task, dtype, optimizer), "norm")
    return combine(lambda a, b: math.log(a / b), without, decayed)


def share(task: str, optimizer: str) -> Callable[[Rows], BySeed]:
    """How much of float32's lowering of the norm happens in bfloat16, in %."""
    return lambda rows: combine(
        lambda part, whole: 100 * part / whole if whole else math.nan,
        shrunk(rows, task, "bfloat16", optimizer),
        shrunk(rows, task, "float32", "DecoupledWD"),
    )


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


FUSED = Check("digits: decay left in bf16, fused AdamW", share("digits", "AdamW fused"), unit=" %")
FAITHFUL = Claim(
    "faithful",
    "In bf16, AdamW's decay vanishes and DecoupledWD's does not",
    "Trained in pure bf16 with lr * wd below 2^-9, AdamW does not decay at all, because the factor "
    "rounds to 1. Adam + `DecoupledWD` decays as in fp32. Measured: by how much decay lowers the "
    "log of the norm of the weights, as a share of what it does in fp32. Expected: within 2 % of 0 "
    "for AdamW, 80 to 125 % for `DecoupledWD`, and a lower test loss with `DecoupledWD`.",
    PRECISE,
    [*(check for task in SEEDS for check in faithful_checks(task)), FUSED],
)

# Coupling

LRS = (1e-3, 4e-3, 16e-3)
GRIDS = {  # around what a pilot with other seeds found, wide enough to hold a shift by 16
    (True, "lr"): doubling(0.8, 7),
    (False, "lr"): doubling(0.1, 7),
    (True, "lr_ratio"): doubling(0.001, 10),
    (False, "lr_ratio"): doubling(0.0001, 10),
    (True, "none"): doubling(0.00025, 8),
    (False, "none"): doubling(0.00005, 9),
}
GRID = [
    replace(DIGITS, lr=lr, wd=wd, scale_by=scale_by, normalized=norm)
    for (norm, scale_by), grid in GRIDS.items()
    for lr in LRS
    for wd in grid
]


def moved(norm: bool, scale_by: str) -> Callable[[Rows], BySeed]:
    """The log2 of how much the best coefficient grows from the lowest lr to the highest."""
    low, high = min(LRS), max(LRS)
    return lambda rows: difference(
        best_wd(rows, normalized=norm, scale_by=scale_by, lr=high),
        best_wd(rows, normalized=norm, scale_by=scale_by, lr=low),
    )


COUPLING = Claim(
    "coupling",
    "Which scale_by keeps the best wd in place when lr changes",
    "If the peak lr is raised 16-fold, the best wd stays within a factor of 2 with this "
    "`scale_by`. arXiv 1711.05101 says so of `lr_ratio`, arXiv 2510.19093 of a decay that is "
    "independent of lr, and users of AdamW assume it of `lr`. Measured: the best wd at lr 0.016 "
    "over that at lr 0.001, with and without normalization of the hidden layer.",
    GRID,
    [
        Check(
            f"digits, {'with' if norm else 'without'} normalization: `{scale_by}`",
            moved(norm, scale_by),
            *(-1, 1),
            unit="x",
        )
        for norm, scale_by in GRIDS
    ],
)

# Gradients at the end

ENDING = [
    replace(base, scale_by=scale_by, trace=True)
    for base in (
        replace(DIGITS, wd=3.2, steps=3200, examples=1280),
        replace(TEXT, wd=3.0),
    )
    for scale_by in ("lr", "lr_squared")
]


def growth(run: Run, gradient: str) -> float:
    """The gradient's norm over the last tenth of the run, over that of the middle fifth."""
    norms = [float(norm) for norm in gradient.split()]
    tenth = len(norms) // 10 or 1
    middle = norms[4 * tenth : 6 * tenth] or norms
    return math.log2(mean(norms[-tenth:]) / mean(middle))


def growths(task: str, scale_by: str) -> Callable[[Rows], BySeed]:
    """The log2 of this growth, by seed."""
    return lambda rows: {
        run.seed: growth(run, outcome.gradient)
        for run, outcome in pick(rows, task=task, scale_by=scale_by)
    }


def loss_between(task: str, field: str, a: object, b: object) -> Callable[[Rows], BySeed]:
    """Test loss of the runs with ``field`` a less that of the runs with b."""
    return lambda rows: difference(
        figure_of(rows, "test", task=task, **{field: a}),
        figure_of(rows, "test", task=task, **{field: b}),
    )


ENDINGS = Claim(
    "ending",
    "lr_squared keeps the gradient from growing at the end of a cosine schedule",
    "With `lr` the gradient of normalized layers grows while lr falls to 0, and with `lr_squared` "
    "(AdamC, arXiv 2506.02285) it does not. Measured: the norm of the hidden layers' gradient over "
    "the last tenth of the run, divided by that over the middle fifth. Expected: above 1.1 with "
    "`lr`, below 1.1 with `lr_squared`, less growth with `lr_squared` than with `lr`, and a lower "
    "test loss.",
    ENDING,
    [
        check
        for task in SEEDS
        for check in (
            Check(f"{task}: growth with `lr`", growths(task, "lr"), math.log2(1.1), unit="x"),
            Check(
                f"{task}: growth with `lr_squared`",
                growths(task, "lr_squared"),
                high=math.log2(1.1),
                unit="x",
            ),
            Check(
                f"{task}: growth with `lr_squared` over that with `lr`",
                lambda rows, task=task: difference(
                    growths(task, "lr_squared")(rows), growths(task, "lr")(rows)
                ),
                high=0,
                unit="x",
            ),
            Check(
                f"{task}: test loss, `lr_squared` less `lr`",
                loss_between(task, "scale_by", "lr_squared", "lr"),
                high=0,
                nil=NIL,
            ),
        )
    ],
)

# Timescale

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


TIMESCALE = Claim(
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
)

# Anchor

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


def tuned(rows: Rows, **settings: object) -> BySeed:
    """Test losses at the best coefficient above 0."""
    return at_best([row for row in rows if row[0].wd > 0], **settings)[1]


def none(rows: Rows, **settings: object) -> BySeed:
    """Test losses without decay."""
    return figure_of(rows, "test", **settings, wd=0.0)


def anchor_less(other: str, task: str) -> Callable[[Rows], BySeed]:
    """Test loss with an anchor less that with another decay, each at its best coefficient."""
    return lambda rows: difference(
        tuned(rows, task=task, anchored=True),
        none(rows, task=task) if other == "none" else tuned(rows, task=task, anchored=False),
    )


ANCHOR = Claim(
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
)

# Cautious

CAREFUL = [
    run
    for base, grid in ((DIGITS, doubling(0.4, 8)), (TEXT, (0.1, 0.3, 1.0)))
    for run in (
        base,
        *(replace(base, wd=wd, cautious=cautious) for cautious in (False, True) for wd in grid),
    )
]
CAUTIOUS = Claim(
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
)

# Schedule

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


SCHEDULE = Claim(
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
)

# Exactness

EXACT = Claim(
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
)

CLAIMS = {
    claim.name: claim
    for claim in (FAITHFUL, COUPLING, TIMESCALE, ANCHOR, CAUTIOUS, ENDINGS, SCHEDULE, EXACT)
}
