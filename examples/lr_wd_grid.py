"""Test error over a grid of learning rates and weight decays, for four ways to couple the two.

The figure of Loshchilov & Hutter (https://arxiv.org/abs/1711.05101, Figures 1 and 2) on
scikit-learn's digits (no download): few images to train on, a fifth of them with a wrong label, so
that regularization matters. A small network without normalization layers is trained by Adam with
a cosine schedule in every cell of the grid. How far does the best wd move when the lr moves::

    python examples/lr_wd_grid.py            # under five minutes on two cores
    python examples/lr_wd_grid.py --quick    # seconds, to see that it runs

All cells of a grid train at once: each is a param group with an lr and a wd of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from wd_callbacks.torch import DecoupledWD

TRAIN_IMAGES, WRONG_LABELS, BATCH_SIZE, HIDDEN = 200, 0.2, 50, 64
SHAPES = ((64, HIDDEN), (1, HIDDEN), (HIDDEN, 10), (1, 10))  # weights and biases of two layers
FAILED = 50.0  # an lr at which no wd comes below this error, in %, has no best wd

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Coupling:
    """One way to make lr and wd a decay, and where its best wds are to be looked for."""

    name: str
    scale_by: str | None  # None: L2, by Adam's own weight decay
    formula: str
    low: float  # log10 of the smallest wd
    decades: float = 11 / 3

    def wds(self, count: int) -> list[float]:
        """That many coefficients, evenly spaced on a log scale."""
        return np.logspace(self.low, self.low + self.decades, count).tolist()

    def cells(self, lrs: list[float], wds: list[float]) -> list[tuple[float, float]]:
        """The pairs of lr and wd that can be trained: no step may take all of a weight."""
        scaled = self.scale_by == "lr"
        return [(lr, wd) for lr, wd in product(lrs, wds) if not scaled or lr * wd < 1]


COUPLINGS = (
    Coupling("Adam + L2", None, "gradient + wd · w", -11 / 3),
    Coupling('DecoupledWD "lr"', "lr", "w · (1 - lr · wd)", -2),
    Coupling('DecoupledWD "lr_ratio"', "lr_ratio", "w · (1 - lr / peak lr · wd)", -4),
    Coupling('DecoupledWD "none"', "none", "w · (1 - wd)", -14 / 3),
)


@dataclass(frozen=True)
class Settings:
    """What is trained."""

    seeds: int
    epochs: int
    lrs: list[float]
    wds: list[list[float]]  # of each coupling

    def header(self) -> str:
        """Everything that the errors depend on, in a line."""
        task = [TRAIN_IMAGES, WRONG_LABELS, BATCH_SIZE, HIDDEN]
        return "# " + json.dumps({"task": task, **vars(self)})

    def cells(self, coupling: int) -> list[tuple[float, float]]:
        """The pairs of lr and wd of that coupling."""
        return COUPLINGS[coupling].cells(self.lrs, self.wds[coupling])


@dataclass
class Ridge:
    """The best wd of every lr, in one grid of errors."""

    wds: Array  # log10 of the best wd of each lr
    inside: NDArray[np.bool_]  # whether it is one: off the grid's edge, and the training worked
    slope: float = math.nan  # decades that the best wd moves per decade of lr
    offset: float = math.nan


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels that ``seed`` draws for training, some wrong, and the others to test on."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(seed)
    train, test = torch.randperm(len(labels), generator=generator).tensor_split([TRAIN_IMAGES])
    images, noisy = images.float() / 16, labels[train]
    wrong = round(WRONG_LABELS * TRAIN_IMAGES)
    noisy[:wrong] = (noisy[:wrong] + torch.randint(1, 10, (wrong,), generator=generator)) % 10
    return images[train], noisy, images[test], labels[test]


def forward(networks: Tensor, images: Tensor) -> Tensor:
    """The logits [network, image, class] of networks that are a row of parameters each."""
    parts = networks.split([math.prod(shape) for shape in SHAPES], dim=1)
    w1, b1, w2, b2 = (part.unflatten(1, shape) for part, shape in zip(parts, SHAPES))
    return torch.relu(images @ w1 + b1) @ w2 + b2


def train(settings: Settings, coupling: int, seed: int) -> list[float]:
    """Trains every cell of a coupling from the same weights on the same batches.

    Returns:
        The test error of every cell in %, NaN where the weights are not finite any more.
    """
    images, labels, test_images, test_labels = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(n, m, generator=generator) * math.sqrt(2 / n) for n, m in SHAPES]
    start[1], start[3] = torch.zeros(SHAPES[1]), torch.zeros(SHAPES[3])
    network = torch.cat([part.flatten() for part in start])

    cells = settings.cells(coupling)
    lrs, wds = map(list, zip(*cells))
    networks = [nn.Parameter(network.clone()) for _ in cells]
    groups = [{"params": [network], "lr": lr} for network, lr in zip(networks, lrs)]
    scale_by = COUPLINGS[coupling].scale_by
    if scale_by is None:
        groups = [{**group, "weight_decay": wd} for group, wd in zip(groups, wds)]
    optimizer = torch.optim.Adam(groups, fused=True)
    if scale_by is not None:
        DecoupledWD(optimizer, wds, scale_by=scale_by, max_lr=lrs)
    steps = settings.epochs * (TRAIN_IMAGES // BATCH_SIZE)
    scheduler = LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)

    for _ in range(settings.epochs):
        for batch in torch.randperm(TRAIN_IMAGES, generator=generator).split(BATCH_SIZE):
            logits = forward(torch.stack(networks), images[batch]).flatten(0, 1)
            targets = labels[batch].repeat(len(cells))
            optimizer.zero_grad()
            # the sum over the cells: none changes the gradient of another
            (nn.functional.cross_entropy(logits, targets) * len(cells)).backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        logits = forward(torch.stack(networks), test_images)
    errors = 100 * (logits.argmax(-1) != test_labels).double().mean(1)
    return errors.where(logits.isfinite().all(-1).all(-1), math.nan).tolist()


def train_all(settings: Settings, console: Console) -> list[Array]:
    """Trains every coupling with every seed, in two processes."""
    errors = [np.full((settings.seeds, len(settings.lrs), len(w)), np.nan) for w in settings.wds]
    jobs = list(product(range(settings.seeds), range(len(COUPLINGS))))
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress,
        ProcessPoolExecutor(
            2, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
        ) as pool,
    ):
        total = sum(len(settings.cells(coupling)) for _, coupling in jobs)
        task = progress.add_task("networks trained", total=total)
        futures = {pool.submit(train, settings, c, seed): (seed, c) for seed, c in jobs}
        for future in as_completed(futures):
            seed, c = futures[future]
            fill(errors[c][seed], settings, c, zip(settings.cells(c), future.result()))
            progress.advance(task, len(settings.cells(c)))
    return errors


def fill(
    grid: Array, settings: Settings, coupling: int, found: Iterable[tuple[Any, float]]
) -> None:
    """Writes the error of every (lr, wd) to its place in ``grid``."""
    for (lr, wd), error in found:
        grid[settings.lrs.index(lr), settings.wds[coupling].index(wd)] = error


def save(errors: list[Array], settings: Settings, path: Path) -> None:
    """Writes a line for every network that was trained, below the settings."""
    with path.open("w", newline="") as file:
        file.write(settings.header() + "\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("coupling", "seed", "lr", "wd", "error"))
        for c, coupling in enumerate(COUPLINGS):
            for seed, (lr, wd) in product(range(settings.seeds), settings.cells(c)):
                error = errors[c][seed, settings.lrs.index(lr), settings.wds[c].index(wd)]
                writer.writerow((coupling.name, seed, lr, wd, f"{error:.4f}"))


def load(settings: Settings, path: Path) -> list[Array] | None:
    """What ``save`` has written, or None if it was with other settings."""
    errors = [np.full((settings.seeds, len(settings.lrs), len(w)), np.nan) for w in settings.wds]
    with path.open(newline="") as file:
        if file.readline().rstrip("\n") != settings.header():
            return None
        names = [coupling.name for coupling in COUPLINGS]
        for row in csv.DictReader(file):
            c, cell = names.index(row["coupling"]), (float(row["lr"]), float(row["wd"]))
            fill(errors[c][int(row["seed"])], settings, c, [(cell, float(row["error"]))])
    return errors


def find_ridge(errors: Array, lrs: list[float], wds: list[float]) -> Ridge:
    """The best wds of a grid of errors [lr, wd], and a least-squares line through them.

    A best wd is where the parabola through the lowest error and its two neighbours is lowest.
    """
    x, y = np.log10(lrs), np.log10(wds)
    ridge = Ridge(np.full(len(lrs), np.nan), np.zeros(len(lrs), bool))
    for row, of_lr in enumerate(np.nan_to_num(errors, nan=np.inf)):
        best = int(of_lr.argmin())
        ridge.wds[row] = y[best]
        left, middle, right = (
            of_lr[i] if 0 <= i < len(y) else np.inf for i in range(best - 1, best + 2)
        )
        if np.isfinite(left + right) and middle <= FAILED:
            ridge.inside[row] = True
            curvature = left - 2 * middle + right
            shift = (left - right) / curvature / 2 if curvature > 0 else 0.0
            ridge.wds[row] += shift * (y[1] - y[0])
    if ridge.inside.sum() >= 3:
        fit = np.polyfit(x[ridge.inside], ridge.wds[ridge.inside], 1)
        ridge.slope, ridge.offset = map(float, fit)
    return ridge


@dataclass
class Outcome:
    """The figures of a coupling."""

    coupling: Coupling
    errors: Array  # mean over the seeds, [lr, wd]
    ridge: Ridge  # of that mean
    seeds: list[Ridge]  # of each seed
    best: tuple[int, int]  # the cell with the lowest mean error
    best_errors: Array  # of each seed in it
    slope: tuple[float, float]  # mean and sd over the seeds


def spread(values: Any) -> tuple[float, float]:
    """Mean and sample standard deviation of those that are numbers; the sd of one is NaN."""
    numbers = np.asarray(values)[np.isfinite(values)]
    sd = float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan
    return (float(numbers.mean()) if len(numbers) else math.nan), sd


def plus_minus(values: tuple[float, float], form: str) -> str:
    """The mean and the sd, those of them that there are."""
    shown = [f"{value:{form}}" for value in values if math.isfinite(value)]
    return " ± ".join([*shown[:1], *(text.lstrip("+") for text in shown[1:])]) or "none"


def evaluate(errors: list[Array], settings: Settings) -> list[Outcome]:
    """The figures of every coupling."""
    outcomes = []
    for coupling, grids, wds in zip(COUPLINGS, errors, settings.wds):
        middle = grids.mean(0)
        ridges = [find_ridge(grid, settings.lrs, wds) for grid in grids]
        best = np.unravel_index(np.nanargmin(middle), middle.shape)
        lr, wd = (int(i) for i in best)
        outcomes.append(
            Outcome(
                coupling, middle, find_ridge(middle, settings.lrs, wds), ridges, (lr, wd),
                grids[:, lr, wd], spread([ridge.slope for ridge in ridges]),
            )
        )  # fmt: skip
    return outcomes


def table(outcomes: list[Outcome], settings: Settings) -> Table:
    """The figures of every coupling."""
    shown = Table()
    shown.add_column("coupling", no_wrap=True)
    heads = ("decades of best wd\nper decade of lr", "lrs that\ncount", "lowest\ntest error, %")
    for name in (*heads, "at lr", "and wd"):
        shown.add_column(name, justify="right", no_wrap=True)
    for c, outcome in enumerate(outcomes):
        lr, wd = outcome.best
        counts = [int(ridge.inside.sum()) for ridge in outcome.seeds]
        few = f"{min(counts)} to " if min(counts) < max(counts) else ""
        shown.add_row(
            outcome.coupling.name,
            plus_minus(outcome.slope, "+.2f"),
            f"{few}{max(counts)} of {len(settings.lrs)}",
            plus_minus(spread(outcome.best_errors), ".2f"),
            f"{settings.lrs[lr]:.2g}",
            f"{settings.wds[c][wd]:.2g}",
        )
    return shown


def sentences(outcomes: list[Outcome]) -> str:
    """What the figures say, and no more."""
    ranked = sorted(
        (o for o in outcomes if math.isfinite(o.slope[0])), key=lambda o: abs(o.slope[0])
    )
    said = "The best wd is inside the grid at too few lrs to tell how it moves."
    if len(ranked) > 1:
        moves = [f"{plus_minus(o.slope, '+.2f')} with {o.coupling.name}" for o in ranked]
        said = (
            f"Per decade of lr the best wd moves by {', '.join(moves[:-1])} and {moves[-1]} "
            f"decades: here lr and wd can be tuned apart most nearly with "
            f"{ranked[0].coupling.name}, and least with {ranked[-1].coupling.name}."
        )
    l2, best = outcomes[0], min(outcomes[1:], key=lambda o: o.best_errors.mean())
    gain, sd = spread(l2.best_errors - best.best_errors)
    verdict = "from a single seed"
    if math.isfinite(sd):
        verdict = f"{'more' if abs(gain) > sd else 'no more'} than the sd of that, {sd:.2f}"
    return (
        f"{said} In its best cell, {best.coupling.name} made {abs(gain):.2f} percentage points "
        f"{'fewer' if gain > 0 else 'more'} errors than L2 in its own ({verdict})."
    )


def edges(values: list[float]) -> Array:
    """The borders of cells on a log scale."""
    logs = np.log10(values)
    half = (logs[1] - logs[0]) / 2
    return 10 ** np.append(logs - half, logs[-1] + half)


def draw(outcomes: list[Outcome], settings: Settings, title: str, path: Path) -> None:
    """Draws a heat map for every coupling."""
    figure, axes = plt.subplots(1, len(outcomes), figsize=(13, 6.2), layout="constrained")
    low = min(np.nanmin(outcome.errors) for outcome in outcomes)
    norm, lrs = LogNorm(low, max(FAILED, low + 1), clip=True), settings.lrs
    for c, (ax, outcome) in enumerate(zip(axes, outcomes)):
        wds, ridge, inside = settings.wds[c], outcome.ridge, outcome.ridge.inside
        ax.set(xscale="log", yscale="log", xlabel="peak lr", facecolor="#dddddd")
        mesh = ax.pcolormesh(
            edges(lrs), edges(wds), outcome.errors.T, norm=norm, cmap="viridis_r", lw=0
        )
        ax.set_aspect("equal")
        spreads = np.array(
            [spread([s.wds[i] for s in outcome.seeds if s.inside[i]])[1] for i in range(len(lrs))]
        )
        sds = np.nan_to_num(spreads)
        best_wds = 10**ridge.wds
        bars = np.array([best_wds * (1 - 10**-sds), best_wds * (10**sds - 1)])
        ax.errorbar(
            np.array(lrs)[inside], best_wds[inside], bars[:, inside], fmt="o", ms=5, color="white",
            mec="black", ecolor="black", capsize=2.5, label="best wd of an lr ± sd over seeds",
        )  # fmt: skip
        ax.plot(
            np.array(lrs)[~inside], best_wds[~inside], "x", color="black",
            label="on the grid's edge: does not count",
        )  # fmt: skip
        ax.plot(
            lrs, 10 ** (ridge.offset + ridge.slope * np.log10(lrs)), "--", color="black",
            label="least-squares line",
        )  # fmt: skip
        ax.plot(
            lrs[outcome.best[0]], wds[outcome.best[1]], "*", ms=14, color="#FF5544", mec="white",
            label="lowest error",
        )  # fmt: skip
        ax.set_title(
            f"{outcome.coupling.name}\n{outcome.coupling.formula}\n"
            f"slope {plus_minus(outcome.slope, '+.2f')}",
            fontsize="medium",
        )
    axes[0].set_ylabel("wd")
    bar = figure.colorbar(mesh, ax=axes, label="test error, %", extend="max", pad=0.01)
    ticks = [tick for tick in (5, 7, 10, 15, 20, 30, 40, 50) if low <= tick]
    bar.set_ticks(ticks, labels=map(str, ticks))
    bar.minorticks_off()
    figure.suptitle(title, fontsize="medium")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Trains, or reads what was trained, and reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs per coupling and cell")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--csv", type=Path, help="the errors, read instead of trained if there")
    parser.add_argument("--out", type=Path, help="the picture")
    parser.add_argument("--fresh", action="store_true", help="train even if the csv is there")
    parser.add_argument("--quick", action="store_true", help="4 x 4 cells, 1 seed, 60 epochs")
    args = parser.parse_args()
    if min(args.seeds, args.epochs) < 1:
        parser.error("--seeds and --epochs must be at least 1")
    sizes, name = (10, 12), "lr_wd_grid"
    if args.quick:
        args.seeds, args.epochs, sizes, name = 1, 60, (4, 4), "lr_wd_grid_quick"
    path, picture = args.csv or Path(f"{name}.csv"), args.out or Path(f"{name}.png")
    lrs: list[float] = np.logspace(-3.25, -1, sizes[0]).tolist()
    settings = Settings(args.seeds, args.epochs, lrs, [c.wds(sizes[1]) for c in COUPLINGS])
    console = Console()
    if path.exists() and not args.fresh:
        errors = load(settings, path)
        if errors is None:
            parser.error(f"{path} has other settings: add --fresh to replace it, or --csv another")
        console.print(f"Errors read from {path}; --fresh trains again")
    else:
        errors = train_all(settings, console)
        save(errors, settings, path)
    title = (
        f"{TRAIN_IMAGES} digits to train on, {WRONG_LABELS:.0%} of their labels wrong, the others to "
        f"test; Adam, cosine, {args.epochs} epochs; "
        f"mean of {args.seeds} seed{'s' * (args.seeds > 1)}"
    )
    outcomes = evaluate(errors, settings)
    console.print(title, table(outcomes, settings), sentences(outcomes), sep="\n")
    draw(outcomes, settings, title, picture)
    console.print(f"Picture: {picture}, errors: {path}")


if __name__ == "__main__":
    main()
