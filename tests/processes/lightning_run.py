"""Lightning's strategies on two processes: DDP, DDP that starts its own, FSDP2 and FSDP1."""

from __future__ import annotations

import contextlib
import io
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from processes.common import (
    IMPORTANT,
    LR,
    WD,
    batch_of,
    main,
    network,
    scenario,
    three_runs,
    values,
)
from processes.fsdp2 import fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.functional import mse_loss
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from wd_callbacks.lightning import DecoupledWD
from wd_callbacks.schedules import Cosine

BATCHES, EPOCHS = 8, 2  # in each process


class Recipe:
    """The network in a module of Lightning, on data that differ from process to process."""

    def __init__(self, cls: Any, wd: float, one_cycle: int = 0, manual: bool = False) -> None:
        super().__init__()
        self.net = network()
        self.cls, self.wd, self.one_cycle = cls, wd, one_cycle
        self.automatic_optimization = not manual

    def configure_optimizers(self) -> Any:
        optimizer = self.cls(self.net.parameters(), lr=LR, weight_decay=self.wd)
        if not self.one_cycle:
            return optimizer
        scheduler = OneCycleLR(optimizer, 0.05, total_steps=self.one_cycle)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch_of(BATCHES * self.current_epoch + batch_idx)
        loss = mse_loss(self.net(x), y)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def on_train_end(self) -> None:
        self.ends = values(self.net.parameters())


class Model(Recipe, lightning.pytorch.LightningModule):
    """For ``lightning.pytorch``."""


class Older(Recipe, pytorch_lightning.LightningModule):
    """For ``pytorch_lightning``."""


class Sharded(Model):
    """With each of its parts sharded by FSDP2."""

    def configure_model(self) -> None:
        for module in (self.net.trunk, self.net.branch, self.net):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


def trained(
    model: Any, *callbacks: Any, strategy: Any = lambda: "ddp", resume: Any = None, **settings: Any
) -> Any:
    """The model after training; its ``trainer`` is still there."""
    package = pytorch_lightning if isinstance(model, Older) else lightning.pytorch
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = package.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy(),
        max_epochs=EPOCHS,
        callbacks=list(callbacks),
        **quiet | settings,
    )
    trainer.fit(model, DataLoader(torch.arange(2 * BATCHES), batch_size=1), ckpt_path=resume)
    return model


def against_adamw(
    make: Any = Model, quantum: float | None = 0, model: Any = None, **settings: Any
) -> dict[str, Any]:
    """The three runs in a Trainer with ``settings``."""

    def train(cls: Any, wd: float, decays: bool) -> Any:
        callbacks = [DecoupledWD(WD, quantum=quantum)] if decays else []
        return trained(make(cls, wd, **model or {}), *callbacks, **settings).ends

    return three_runs(train)


@scenario
def ddp() -> Any:
    return against_adamw()


@scenario
def ddp_by_default() -> Any:
    return against_adamw(quantum=None)


@scenario
def ddp_manual() -> Any:
    return against_adamw(model={"manual": True})


@scenario
def ddp_in_the_other_package() -> Any:
    return against_adamw(Older)


@scenario
def ddp_accumulation_and_one_cycle() -> Any:
    steps = EPOCHS * BATCHES // 4
    return against_adamw(
        model={"one_cycle": steps}, accumulate_grad_batches=4, gradient_clip_val=0.1
    )


@scenario
def ddp_bf16() -> Any:
    return against_adamw(precision="bf16-mixed")


class Sets(lightning.pytorch.Callback):
    """AdamW's weight decay by hand, in place of a schedule."""

    def __init__(self, schedule: Any, every: int) -> None:
        self.schedule, self.every, self.used = schedule, every, []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        done = self.every * len(self.used)
        self.used.append(self.schedule(done / (EPOCHS * BATCHES)))
        optimizer.param_groups[0]["weight_decay"] = self.used[-1]


class Remembers(DummyLogger):
    """A logger that keeps what it is given, in every process."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.told.append((metrics, step))


@scenario
def ddp_schedule() -> Any:
    """With accumulation, logs and the description."""
    schedule, every = Cosine(0.4, 0.0), 2
    logger, printed, by_hand = Remembers(), io.StringIO(), Sets(schedule, every)
    settings = {"accumulate_grad_batches": every, "log_every_n_steps": 1}
    with contextlib.redirect_stdout(printed):
        decay = DecoupledWD(schedule, quantum=0, verbose=True)
        ours = trained(Model(Adam, IMPORTANT), decay, logger=logger, **settings).ends
    return {
        "ours": ours,
        "adamw": trained(Model(AdamW, 0.0), by_hand, **settings).ends,
        "undecayed": trained(Model(AdamW, 0.0), **settings).ends,
        "told": [it for it in logger.told if "wd-Adam" in it[0]],
        "used": by_hand.used,
        "printed": printed.getvalue(),
    }


def resumed(make: Any, name: str, **settings: Any) -> dict[str, Any]:
    """Of a run that owes something when it is saved, and one that forgets that."""
    folder = Path(sys.argv[1]) / name

    def decay(optimizers: Any = None) -> Any:  # against shrinks of about 1e-3
        return DecoupledWD(Cosine(0.1, 0.08), quantum=2.5e-3, optimizers=optimizers)

    def train(*callbacks: Any, **more: Any) -> Any:
        return trained(make(Adam, IMPORTANT), *callbacks, **settings, **more)

    save = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=5, save_top_k=-1
    )
    whole, again = decay(), decay()
    ends = train(whole, save, enable_checkpointing=True).ends
    resume = folder / "step=5.ckpt"
    return {
        "whole": ends,
        "resumed": train(again, resume=resume).ends,
        "states": [whole.state_dict(), again.state_dict()],
        # By its other name it has no state there.
        "forgetful": train(decay(0), resume=resume).ends,
    }


@scenario
def ddp_resumed() -> Any:
    return resumed(Model, "ddp")


sharding = partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)


@scenario
def fsdp2() -> Any:
    return against_adamw(Sharded, strategy=sharding)


@scenario
def fsdp2_resumed() -> Any:
    return resumed(Sharded, "fsdp2", strategy=sharding)


class FSDP1(FSDPStrategy):
    """The Trainer refuses FSDPStrategy itself on the CPU, and that would ask for a GPU."""

    def _setup_model(self, model: Any) -> Any:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


@scenario
def fsdp1() -> Any:
    return against_adamw(strategy=FSDP1)


if __name__ == "__main__":
    main()
