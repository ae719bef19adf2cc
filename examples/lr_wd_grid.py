"""Test error over a grid of learning rates and weight decays, for four ways to couple the two.

The figure of Loshchilov & Hutter (https://arxiv.org/abs/1711.05101, Figures 1 and 2) on
scikit-learn's digits (no download): few images to train on, a fifth of them with a wrong label, so
that regularization matters. Adam trains a small network without normalization layers, with a
cosine schedule. How far does the best wd move when the lr moves? ::

    python examples/lr_wd_grid.py            # under five minutes on two cores
    python examples/lr_wd_grid.py --quick    # seconds, to see that it runs

All cells of a grid train at once: each is a param group with an lr and a wd of its own. The lowest
errors are picked on the test images, so they show the landscape, not what tuning would give.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
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
MATTERS = 1.0  # by how many percentage points the best wd of an lr must beat the smallest, to count
FAILED = 50.0  # an lr whose lowest error, in %, is above this does not count either

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Coupling:
    """One way to couple lr and wd."""

    name: str
    scale_by: str | None  # None: L2, by Adam's own weight decay
    formula: str
    low: float  # log10 of the smallest wd of the grid

    def wds(self, count: int) -> Array:
        """The coefficients of the grid."""
        return np.logspace(self.low, self.low + 11 / 3, count)


COUPLINGS = (
    Coupling("Adam + L2", None, "gradient + wd · w", -11 / 3),
    Coupling('scale_by="lr"', "lr", "w · (1 - lr · wd)", -2),
    Coupling('scale_by="lr_ratio"', "lr_ratio", "w · (1 - lr / peak lr · wd)", -4),
    Coupling('scale_by="none"', "none", "w · (1 - wd)", -14 / 3),
)


@dataclass(frozen=True)
class Settings:
    """What is trained; the errors are an array [coupling, seed, lr, wd]."""

    seeds: int
    epochs: int
    lrs: Array
    wds: Array  # [coupling, wd]

    def header(self) -> str:
        """Everything that the errors depend on, in a line."""
        task = [TRAIN_IMAGES, WRONG_LABELS, BATCH_SIZE, HIDDEN, self.seeds, self.epochs]
        return "# " + json.dumps({"task": task, "lrs": [*self.lrs], "wds": self.wds.tolist()})


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


def train(settings: Settings, c: int, seed: int) -> Array:
    """Trains every cell of a coupling's grid from the same weights on the same batches.

    Returns:
        The test errors [lr, wd] in %, NaN where a step would have taken all of a weight.
    """
    images, labels, test_images, test_labels = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(n, m, generator=generator) * math.sqrt(2 / n) for n, m in SHAPES]
    start[1], start[3] = torch.zeros(SHAPES[1]), torch.zeros(SHAPES[3])
    network = torch.cat([part.flatten() for part in start])

    scale_by = COUPLINGS[c].scale_by
    grid = np.stack(np.meshgrid(settings.lrs, settings.wds[c], indexing="ij"))
    possible = grid.prod(0) < (1 if scale_by == "lr" else math.inf)
    lrs, wds = grid[:, possible].tolist()
    networks = [nn.Parameter(network.clone()) for _ in lrs]
    groups: list[dict[str, Any]] = [{"params": [n], "lr": lr} for n, lr in zip(networks, lrs)]
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
            loss = nn.functional.cross_entropy(logits, labels[batch].repeat(len(networks)))
            optimizer.zero_grad()
            (loss * len(networks)).backward()  # the sum of the networks' losses
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        wrong = forward(torch.stack(networks), test_images).argmax(-1) != test_labels
    errors = np.full(possible.shape, np.nan)
    errors[possible] = 100 * wrong.double().mean(1).numpy()
    return errors


def train_all(settings: Settings, console: Console) -> Array:
    """Trains every coupling with every seed, in two processes."""
    errors = np.empty((len(COUPLINGS), settings.seeds, len(settings.lrs), settings.wds.shape[1]))
    cells = errors[0, 0].size
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn())
    spawn = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress,
        ProcessPoolExecutor(2, spawn, torch.set_num_threads, (1,)) as pool,
    ):
        task = progress.add_task("cells trained", total=errors.size)
        jobs = product(range(settings.seeds), range(len(COUPLINGS)))
        futures = {pool.submit(train, settings, c, seed): (c, seed) for seed, c in jobs}
        for future in as_completed(futures):
            errors[futures[future]] = future.result()
            progress.advance(task, cells)
    return errors


def save(errors: Array, settings: Settings, path: Path) -> None:
    """Writes a line for every cell and seed below the settings."""
    with path.open("w", newline="") as file:
        file.write(settings.header() + "\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("coupling", "seed", "lr", "wd", "test error"))
        for (c, seed, lr, wd), error in np.ndenumerate(errors):
            place = (f"{settings.lrs[lr]:.6g}", f"{settings.wds[c, wd]:.6g}")
            writer.writerow((COUPLINGS[c].name, seed, *place, f"{error:.4f}"))


def load(settings: Settings, path: Path) -> Array | None:
    """What ``save`` has written, or None if it was with other settings."""
    with path.open(newline="") as file:
        if file.readline().rstrip("\n") != settings.header():
            return None
        errors = [float(row["test error"]) for row in csv.DictReader(file)]
    return np.reshape(errors, (len(COUPLINGS), settings.seeds, len(settings.lrs), -1))


def best_wds(errors: Array, wds: Array) -> Array:
    """The log10 of the best wd of every lr of a grid [lr, wd], NaN at the lrs that do not count.

    It is where the parabola through the lowest error and its two neighbours is lowest. An lr does
    not count if that error is on the grid's edge, or if the wd hardly matters or nothing trains.
    """
    best, logs = np.full(len(errors), np.nan), np.log10(wds)
    for row, found in enumerate(errors):
        low = int(np.nanargmin(found))
        left, middle, right = (np.append(found, np.nan)[i] for i in (low - 1, low, low + 1))
        if np.isfinite(left + right) and middle <= min(found[0] - MATTERS, FAILED):
            curvature = left - 2 * middle + right
            shift = (left - right) / curvature / 2 if curvature > 0 else 0.0
            best[row] = logs[low] + shift * (logs[1] - logs[0])
    return best


def line(lrs: Array, best: Array) -> Array:
    """Slope and offset of the least-squares line through the best wds, NaN from fewer than 3."""
    counts = np.isfinite(best)
    if counts.sum() < 3:
        return np.full(2, np.nan)
    return np.polyfit(np.log10(lrs[counts]), best[counts], 1)


def spread(values: Any) -> tuple[float, float]:
    """Mean and sample standard deviation of the values that are finite, NaN where there is none."""
    finite = np.asarray(values)[np.isfinite(values)]
    middle = float(finite.mean()) if len(finite) else math.nan
    return middle, float(finite.std(ddof=1)) if len(finite) > 1 else math.nan


class Outcome:
    """The figures of a coupling, from its errors [seed, lr, wd]."""

    def __init__(self, coupling: Coupling, errors: Array, lrs: Array, wds: Array) -> None:
        self.coupling, self.lrs, self.wds = coupling, lrs, wds
        self.errors = errors.mean(0)
        self.best = np.unravel_index(np.nanargmin(self.errors), self.errors.shape)
        self.best_errors = errors[(slice(None), *self.best)]
        self.ridge = best_wds(self.errors, wds)
        self.ridges = np.array([best_wds(grid, wds) for grid in errors])
        self.slope, self.slope_sd = spread([line(lrs, ridge)[0] for ridge in self.ridges])

    def shown_slope(self) -> str:
        """The slope's mean and sd over the seeds."""
        sd = f" ± {self.slope_sd:.2f}" if math.isfinite(self.slope_sd) else ""
        return f"{self.slope:+.2f}{sd}" if math.isfinite(self.slope) else "too few lrs"


def table(outcomes: list[Outcome]) -> Table:
    """The figures of every coupling."""
    shown = Table("coupling", pad_edge=False)
    count = f"lrs that\ncount,\nof {len(outcomes[0].lrs)}"
    heads = ("decades of\nbest wd per\ndecade of lr", count, "lowest\nerror, %", "at lr", "and wd")
    for name in heads:
        shown.add_column(name, justify="right", no_wrap=True)
    for o in outcomes:
        counts = np.isfinite(o.ridges).sum(1)
        error, sd = spread(o.best_errors)
        shown.add_row(
            o.coupling.name,
            o.shown_slope(),
            "-".join(map(str, sorted({counts.min(), counts.max()}))),
            f"{error:.1f}" + (f" ± {sd:.1f}" if math.isfinite(sd) else ""),
            f"{o.lrs[o.best[0]]:.2g}",
            f"{o.wds[o.best[1]]:.2g}",
        )
    return shown


def sentences(outcomes: list[Outcome]) -> str:
    """What the figures say, and no more."""
    ranked = sorted((o for o in outcomes if math.isfinite(o.slope)), key=lambda o: abs(o.slope))
    said = "Too few lrs count to tell how the best wd moves."
    if len(ranked) > 1:
        moves = ", ".join(f"{o.shown_slope()} with {o.coupling.name}" for o in ranked)
        said = f"Decades that the best wd moves per decade of lr, the least first: {moves}."
    gap_sds = (spread(o.best_errors - outcomes[0].best_errors) for o in outcomes[1:])
    gaps = ", ".join(
        f"{gap:+.2f}" + (f" ± {sd:.2f}" if math.isfinite(sd) else "") + f" with {o.coupling.name}"
        for o, (gap, sd) in zip(outcomes[1:], gap_sds)
    )
    return f"{said} Percentage points of error more than L2, each in its best cell: {gaps}."


def edges(values: Array) -> Array:
    """The borders of cells whose centres are evenly spaced on a log scale."""
    half = math.sqrt(values[1] / values[0])
    return np.append(values / half, values[-1] * half)


def draw(outcomes: list[Outcome], title: str, path: Path) -> None:
    """Draws a heat map for every coupling."""
    figure, axes = plt.subplots(1, len(outcomes), figsize=(13, 5.3), layout="constrained")
    low = math.floor(min(np.nanmin(o.errors) for o in outcomes))
    look = {"norm": LogNorm(low, FAILED, clip=True), "cmap": "viridis_r"}
    for ax, o in zip(axes, outcomes):
        ax.set(xscale="log", yscale="log", xlabel="peak lr", facecolor="#dddddd")
        mesh = ax.pcolormesh(edges(o.lrs), edges(o.wds), o.errors.T, **look)
        ax.set_aspect("equal")  # a slope of 1 goes up at 45 degrees
        sds = np.nan_to_num([spread(ridge)[1] for ridge in o.ridges.T])
        bars = 10**o.ridge * np.array([1 - 10**-sds, 10**sds - 1])
        points = {"fmt": "o", "ms": 5, "color": "white", "mec": "black", "ecolor": "black"}
        label = "best wd of an lr ± sd over the seeds"
        ax.errorbar(o.lrs, 10**o.ridge, bars, capsize=2.5, label=label, zorder=4, **points)
        slope, offset = line(o.lrs, o.ridge)
        fit = np.where(np.isfinite(o.ridge), 10**offset * o.lrs**slope, np.nan)
        ax.plot(o.lrs, fit, "--", color="black", label="least-squares line")
        best = (o.lrs[o.best[0]], o.wds[o.best[1]])
        ax.plot(*best, "*", ms=15, color="#FF4433", mec="white", label="lowest error", zorder=3)
        heading = f"{o.coupling.name}\n{o.coupling.formula}\nslope {o.shown_slope()}"
        ax.set_title(heading, fontsize="medium")
    axes[0].set_ylabel("wd")
    bar = figure.colorbar(mesh, ax=axes, label="test error, %", extend="max", pad=0.01)
    ticks = [low, *(tick for tick in (10, 15, 20, 30, 40, 50) if tick > low)]
    bar.set_ticks(ticks, labels=map(str, ticks), minor=False)
    bar.minorticks_off()
    figure.suptitle(title, fontsize="medium")
    handles, labels = axes[0].get_legend_handles_labels()
    if np.isnan(outcomes[1].errors).any():
        handles.append(plt.Rectangle((0, 0), 1, 1, color="#dddddd"))
        labels.append("not possible: lr · wd is 1 or more")
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Trains, or reads what was trained before, and reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs per coupling and cell")
    parser.add_argument("--csv", type=Path, help="the errors: read if the file is there")
    parser.add_argument("--out", type=Path, help="the picture")
    parser.add_argument("--fresh", action="store_true", help="train even if the csv is there")
    parser.add_argument("--quick", action="store_true", help="5 x 8 cells, 1 seed, 100 epochs")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    seeds, epochs, lrs, wds = (1, 100, 5, 8) if args.quick else (args.seeds, 300, 11, 12)
    name = "lr_wd_grid_quick" if args.quick else "lr_wd_grid"
    path, picture = args.csv or Path(f"{name}.csv"), args.out or Path(f"{name}.png")
    grids = np.array([coupling.wds(wds) for coupling in COUPLINGS])
    settings = Settings(seeds, epochs, np.logspace(-3.5, -1, lrs), grids)
    console = Console()
    if path.exists() and not args.fresh:
        cached = load(settings, path)
        if cached is None:
            parser.error(f"{path} has other settings: name another --csv, or replace it by --fresh")
        errors = cached
    else:
        errors = train_all(settings, console)
        save(errors, settings, path)
    title = (
        f"{TRAIN_IMAGES} digits to train on, {WRONG_LABELS:.0%} of their labels wrong, the others "
        f"to test; Adam, cosine, {epochs} epochs; mean of {seeds} seed{'s' * (seeds > 1)}"
    )
    outcomes = [Outcome(*row, settings.lrs, own) for *row, own in zip(COUPLINGS, errors, grids)]
    console.print(title, table(outcomes), sentences(outcomes), sep="\n")
    draw(outcomes, title, picture)
    console.print(f"Picture: {picture}, errors: {path}")


if __name__ == "__main__":
    main()
