"""Lightning's strategies on two processes: DDP, DDP that starts its own, FSDP2 and FSDP1."""

from __future__ import annotations

import contextlib
import io
from functools import partial

import lightning.pytorch
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning_helpers import WD, adam, adamw, fit, model_class, notes_logger
from processes.common import SCENARIOS, batch_of, fully_shard, scenario, whole
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.functional import mse_loss

from wd_callbacks.lightning import DecoupledWD
from wd_callbacks.schedules import Cosine

BATCHES, EPOCHS = 8, 2  # in each process


def per_process(package):
    """The model of the other tests, on data that differ from process to process."""

    class Model(model_class(package)):
        def loss(self, index):
            x, y = batch_of(BATCHES * self.current_epoch + index)
            return mse_loss(self(x), y)

        def on_train_end(self):
            self.ends = whole(self)

    return Model


Model, Older = per_process(lightning.pytorch), per_process(pytorch_lightning)


class Sharded(Model):
    """With each of its layers sharded by FSDP2."""

    def configure_model(self):
        for module in (self.backbone, self.head, self):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


class FSDP1(FSDPStrategy):
    """The Trainer refuses FSDPStrategy itself on the CPU, and that would ask for a GPU."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


undecayed = partial(adamw, weight_decay=0.0)


def trained(
    make, *callbacks, cls=Model, strategy="ddp", manual=False, package=lightning.pytorch, **settings
):
    """The model after training; a ``strategy`` may be a function that makes one."""
    strategy = strategy() if callable(strategy) else strategy
    settings |= {"devices": 2, "strategy": strategy, "batches": 2 * BATCHES, "epochs": EPOCHS}
    return fit(package, make, *callbacks, model=cls(make, manual=manual), **settings)


def start_processes(folder):
    """A Trainer that starts its processes itself; saves the weights that come back to this one."""
    model = trained(adam, DecoupledWD(WD, quantum=0), strategy="ddp_fork")
    torch.save({"ours": whole(model)}, folder / "ddp_fork.pt")


def against_adamw(**settings):
    return {
        "ours": trained(adam, DecoupledWD(WD, quantum=0), **settings).ends,
        "expected": trained(adamw, **settings).ends,
        "undecayed": trained(undecayed, **settings).ends,
    }


sharding = partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)
OLDER = {"cls": Older, "package": pytorch_lightning}
FSDP2 = {"cls": Sharded, "strategy": sharding}
SCENARIOS |= {
    "ddp": against_adamw,
    "ddp_fork": lambda: torch.load("ddp_fork.pt"),
    "ddp_manual": partial(against_adamw, **OLDER, manual=True),
    "lightning_fsdp2": partial(against_adamw, **FSDP2),
    "lightning_fsdp1": partial(against_adamw, strategy=FSDP1),
}


class Sets(lightning.pytorch.Callback):
    """AdamW's weight decay by hand, in place of a schedule."""

    def __init__(self, schedule, every):
        self.schedule, self.every, self.used = schedule, every, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        done = self.every * len(self.used)
        self.used.append(self.schedule(done / (EPOCHS * BATCHES)))
        optimizer.param_groups[0]["weight_decay"] = self.used[-1]


@scenario
def ddp_schedule():
    """With accumulation and clipping, logs and the description."""
    schedule, every = Cosine(0.4, 0.0), 2
    logger, printed, by_hand = notes_logger(lightning.pytorch), io.StringIO(), Sets(schedule, every)
    settings = {"accumulate_grad_batches": every, "gradient_clip_val": 0.1, "log_every_n_steps": 1}
    with contextlib.redirect_stdout(printed):
        decay = DecoupledWD(schedule, quantum=0, verbose=True)
        ours = trained(adam, decay, logger=logger, **settings).ends
    return {
        "ours": ours,
        "expected": trained(undecayed, by_hand, **settings).ends,
        "undecayed": trained(undecayed, **settings).ends,
        "notes": [it for it in logger.notes if "wd-Adam" in it[0]],
        "used": by_hand.used,
        "printed": printed.getvalue(),
    }


def resumed(folder, **settings):
    """A run with deferred decay when it is saved, and one that forgets that."""

    def decay(optimizers=None):  # against shrinks of about 1e-3
        return DecoupledWD(Cosine(0.1, 0.08), quantum=2.5e-3, optimizers=optimizers)

    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    first, second = decay(), decay()
    ends = trained(adam, first, save, enable_checkpointing=True, **settings).ends
    settings["resume"] = f"{folder}/step=5.ckpt"
    return {
        "whole": ends,
        "resumed": trained(adam, second, **settings).ends,
        "states": [first.state_dict(), second.state_dict()],
        # By its other name it has no state there.
        "forgetful": trained(adam, decay(0), **settings).ends,
    }


SCENARIOS["ddp_resumed"] = partial(resumed, "ddp checkpoints")
SCENARIOS["lightning_fsdp2_resumed"] = partial(resumed, "fsdp2 checkpoints", **FSDP2)
