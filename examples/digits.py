"""Decoupled weight decay and L2 on real digits, with fastai and with Lightning.

Trains a small convolutional network on scikit-learn's digits (1,797 images of 8x8 pixels, no
download) with 1cycle, with several seeds for each way to decay, and reports a table and a picture.
All arms share one coefficient: they show what the same number does, not how good each can get::

    python examples/digits.py            # under three minutes on two cores; out/digits.png
    python examples/digits.py --quick    # seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

TRAIN_IMAGES, BATCH_SIZE = 300, 50  # few, or every arm comes to 99 %
PEAK_LR = {"Adam": 1e-2, "SGD": 5e-2}


@dataclass(frozen=True)
class Arm:
    """One way to decay, and how its line is drawn."""

    name: str
    optimizer: str  # "Adam", or "SGD" (with momentum)
    own: str | None = None  # what its own weight decay does: "l2", "decoupled", None if it is 0
    callback: bool = False  # whether a DecoupledWD decays
    color: str = "black"  # from the palette of Okabe and Ito
    dashes: str = "-"
    width: float = 1.5


NO_DECAY = Arm("Adam, no decay", "Adam", color="#888888", dashes=":")
ADAM_L2 = Arm("Adam + L2", "Adam", own="l2", color="#E69F00")
ADAMW = Arm("AdamW", "Adam", own="decoupled", color="#56B4E9", width=5)
ADAM_WD = Arm("Adam + DecoupledWD", "Adam", callback=True, dashes="--")
SGD_L2 = Arm("SGD + L2", "SGD", own="l2", color="#CC79A7")
SGD_WD = Arm("SGD + DecoupledWD", "SGD", callback=True, color="#009E73", dashes="-.")
ARMS = (NO_DECAY, ADAM_L2, ADAMW, ADAM_WD, SGD_L2, SGD_WD)


@dataclass
class Run:
    """One training run: what to do, and what came of it at the end of every epoch."""

    arm: Arm
    seed: int
    wd: float
    epochs: int
    norms: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    weights: Tensor = field(default_factory=lambda: torch.empty(0))

    def own_wd(self) -> float:
        """The optimizer's own weight decay."""
        return self.wd if self.arm.own else 0.0

    def note(self, model: nn.Module, accuracy: float) -> None:
        """Takes down the end of an epoch."""
        self.weights = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        self.norms.append(self.weights.norm().item())
        self.accuracies.append(100 * accuracy)


Results = dict[tuple[str, Arm], list[Run]]


def digits(seed: int) -> tuple[DataLoader, DataLoader]:
    """Batches of the images that ``seed`` draws for training, and all others as one batch."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(seed)
    train, valid = (
        TensorDataset(images[part].float().view(-1, 1, 8, 8) / 16, labels[part])
        for part in torch.randperm(len(labels), generator=generator).tensor_split([TRAIN_IMAGES])
    )
    batches = BatchSampler(RandomSampler(train, generator=generator), BATCH_SIZE, drop_last=True)
    return (
        DataLoader(train, sampler=batches, batch_size=None),
        DataLoader(valid, batch_size=len(valid)),
    )


def network(seed: int) -> nn.Module:
    """A network that starts from the weights that ``seed`` draws."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


def train_fastai(run: Run) -> None:
    """Trains with fastai's ``fit_one_cycle``."""
    import fastai.callback.schedule  # noqa: F401 adds fit_one_cycle
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.optimizer import SGD, Adam
    from fastai.torch_core import default_device

    from wd_callbacks.fastai import DecoupledWD

    class Note(Callback):
        order = 90  # after the Recorder

        def after_epoch(self) -> None:
            run.note(self.model, self.recorder.values[-1][-1])

    default_device(use=False)
    optimizer = {"Adam": Adam, "SGD": partial(SGD, mom=0.9)}[run.arm.optimizer]
    learn = Learner(
        DataLoaders(*digits(run.seed)),
        network(run.seed),
        nn.CrossEntropyLoss(),
        opt_func=partial(optimizer, wd=run.own_wd(), decouple_wd=run.arm.own == "decoupled"),
        metrics=accuracy,
        cbs=Note(),
        wd_bn_bias=True,  # all parameters decay, as they do in torch's optimizers
    )
    if run.arm.callback:
        # quantum=0: every shrink at once, however small, as AdamW does
        learn.add_cb(DecoupledWD(run.wd, quantum=0))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(run.epochs, PEAK_LR[run.arm.optimizer])


def train_lightning(run: Run) -> None:
    """Trains with Lightning, with OneCycleLR stepped after every batch."""
    import pytorch_lightning as pl

    from wd_callbacks.lightning import DecoupledWD

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(run.seed)

        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
            self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

        def on_validation_epoch_end(self) -> None:
            run.note(self.net, self.trainer.callback_metrics["accuracy"].item())

        def configure_optimizers(self) -> Any:
            adam = torch.optim.AdamW if run.arm.own == "decoupled" else torch.optim.Adam
            sgd = partial(torch.optim.SGD, momentum=0.9)
            make: Callable[..., Any] = {"Adam": adam, "SGD": sgd}[run.arm.optimizer]
            lr = PEAK_LR[run.arm.optimizer]
            optimizer = make(self.parameters(), lr=lr, weight_decay=run.own_wd())
            steps = int(self.trainer.estimated_stepping_batches)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.25)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # of pytorch_lightning too
    trainer = pl.Trainer(
        max_epochs=run.epochs,
        accelerator="cpu",
        # quantum=0: every shrink at once, however small, as AdamW does
        callbacks=[DecoupledWD(run.wd, quantum=0)] if run.arm.callback else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Classifier(), *digits(run.seed))


TRAIN: dict[str, Callable[[Run], None]] = {"fastai": train_fastai, "lightning": train_lightning}


def train_all(
    frameworks: Sequence[str], seeds: int, wd: float, epochs: int, console: Console
) -> Results:
    """Trains every arm with every seed; the arms of a seed see the same weights and batches."""
    results: Results = {
        (framework, arm): [Run(arm, seed, wd, epochs) for seed in range(seeds)]
        for framework, arm in product(frameworks, ARMS)
    }
    columns = (TextColumn("{task.description:<37}"), BarColumn(24), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(results) * seeds)
        for (framework, arm), runs in results.items():
            for run in runs:
                progress.update(task, description=f"{framework}: {arm.name}, seed {run.seed}")
                TRAIN[framework](run)
                progress.advance(task)
    return results


def difference(runs: Sequence[Run], others: Sequence[Run]) -> float:
    """Largest absolute difference between the final weights of runs with the same seed."""
    return max((a.weights - b.weights).abs().max().item() for a, b in zip(runs, others))


def table(results: Results) -> Table:
    """The figures of every arm."""
    shown = Table("framework")
    shown.add_column("arm", no_wrap=True)
    for name in ("accuracy, %", "norm of\nthe weights", "largest\ndifference\nto AdamW"):
        shown.add_column(name, justify="right", no_wrap=True)
    for (framework, arm), runs in results.items():
        accuracies = [run.accuracies[-1] for run in runs]
        shown.add_row(
            framework,
            arm.name,
            f"{mean(accuracies):.2f}" + (f" ± {stdev(accuracies):.2f}" if len(runs) > 1 else ""),
            f"{mean(run.norms[-1] for run in runs):.2f}",
            f"{difference(runs, results[framework, ADAMW]):.2g}",
            end_section=arm is ARMS[-1],
        )
    return shown


def compare(decoupled: Sequence[Run], l2: Sequence[Run]) -> str:
    """How decoupled decay did against L2 with the same optimizer, in words."""
    gains = [a.accuracies[-1] - b.accuracies[-1] for a, b in zip(decoupled, l2)]
    gain = mean(gains)
    verdict = "from a single seed"
    if len(gains) > 1:
        sd = stdev(gains)
        verdict = (
            f"{'more' if abs(gain) > sd else 'no more'} than the sd of that difference, {sd:.2f}"
        )
    return (
        f"with {decoupled[0].arm.optimizer}, decoupled decay was {abs(gain):.2f} percentage points "
        f"{'more' if gain > 0 else 'less'} accurate than L2 ({verdict})"
    )


def sentences(framework: str, results: Results) -> str:
    """What the figures of ``framework`` say, and no more."""
    arms = {arm: results[framework, arm] for arm in ARMS}
    return (
        f"{framework}: {compare(arms[ADAM_WD], arms[ADAM_L2])}, and "
        f"{compare(arms[SGD_WD], arms[SGD_L2])}. The final weights of Adam + DecoupledWD and of "
        f"AdamW differ by at most {difference(arms[ADAM_WD], arms[ADAMW]):.2g}."
    )


def draw(results: Results, frameworks: Sequence[str], title: str, path: Path) -> None:
    """Draws the weights' norm and the accuracy over the epochs, with the sd over the seeds."""
    figure, axes = plt.subplots(
        2, len(frameworks), figsize=(1.4 + 4.6 * len(frameworks), 7.4), sharex=True, sharey="row",
        squeeze=False, layout="constrained",
    )  # fmt: skip
    lows = []
    for (framework, arm), runs in results.items():
        column = frameworks.index(framework)
        for row, name in enumerate(("norms", "accuracies")):
            values = torch.tensor([getattr(run, name) for run in runs])
            middle, sd = values.mean(0), values.std(0, correction=int(len(runs) > 1))
            epochs, ax = range(1, len(middle) + 1), axes[row][column]
            look = {"color": arm.color, "zorder": 3 - arm.width / 10}  # the widest below the others
            ax.fill_between(epochs, middle - sd, middle + sd, color=arm.color, alpha=0.12, lw=0)
            ax.plot(epochs, middle, arm.dashes, lw=arm.width, label=arm.name, **look)
        lows.append(middle[-1].item())
    for column, framework in enumerate(frameworks):
        axes[0][column].set_title(framework)
        axes[1][column].set_xlabel("epoch")
        axes[1][column].xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("norm of the weights")
    axes[1][0].set_ylabel("validation accuracy, %")
    axes[0][0].set_ylim(bottom=0)
    axes[1][0].set_ylim(max(0.0, min(lows) - 10), 100)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 + len(frameworks))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Trains every arm and reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs per arm")
    parser.add_argument("--wd", type=float, default=0.1, help="for every arm")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--framework", choices=[*TRAIN, "both"], default="both")
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"), help="the picture")
    parser.add_argument("--quick", action="store_true", help="1 seed, 2 epochs")
    args = parser.parse_args()
    if min(args.seeds, args.epochs) < 1:
        parser.error("--seeds and --epochs must be at least 1")
    if args.quick:
        args.seeds, args.epochs = 1, 2
    warnings.filterwarnings("ignore", module="fastai|fasttransform|pytorch_lightning|torch")
    torch.set_num_threads(1)  # the network is too small for more
    frameworks = [*TRAIN] if args.framework == "both" else [args.framework]
    console = Console()
    minutes = "seconds" if args.quick else "under three minutes with the default settings"
    console.print(f"{len(frameworks) * len(ARMS) * args.seeds} runs; this takes {minutes}.")
    results = train_all(frameworks, args.seeds, args.wd, args.epochs, console)
    title = (
        f"{TRAIN_IMAGES} digits to train on, the others to validate; 1cycle, {args.epochs} epochs\n"
        f"wd {args.wd:g} for all arms; peak lr {PEAK_LR['Adam']:g} with Adam, "
        f"{PEAK_LR['SGD']:g} with SGD; mean ± sd of {args.seeds} seed{'s' * (args.seeds > 1)}"
    )
    console.print(title, table(results), *(sentences(f, results) for f in frameworks), sep="\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(results, frameworks, title, args.out)
    console.print(f"Picture: {args.out}")


if __name__ == "__main__":
    main()
