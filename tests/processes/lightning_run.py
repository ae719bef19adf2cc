"""Lightning's strategies on two processes: DDP, DDP that starts its own, FSDP2 and FSDP1."""

from __future__ import annotations

import contextlib
import io
from functools import partial

import lightning.pytorch
import pytorch_lightning
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning_helpers import fit, model_class, notes_logger, one_cycle
from processes.common import INNER_WD, LR, SCENARIOS, WD, batch_of, scenario, three_runs, values
from processes.fsdp2 import fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.functional import mse_loss
from torch.optim import Adam, AdamW

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
            self.ends = values(self.parameters())

    return Model


Model, Older = per_process(lightning.pytorch), per_process(pytorch_lightning)


class Sharded(Model):
    """With each of its layers sharded by FSDP2."""

    def configure_model(self):
        for module in (self.backbone, self.head, self):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


def trained(
    cls, make, *callbacks, model=None, strategy=lambda: "ddp", package=lightning.pytorch, **settings
):
    """The model after training."""
    settings = {"devices": 2, "strategy": strategy(), "epochs": EPOCHS, **settings}
    module = cls(make, **model or {})
    return fit(package, make, *callbacks, model=module, batches=2 * BATCHES, **settings)


def optimizer_of(cls, wd):
    return lambda module: cls(module.parameters(), lr=LR, weight_decay=wd)


def start_processes(folder):
    """A Trainer that starts its processes itself; saves the weights that come back to this one."""
    decay = DecoupledWD(WD, quantum=0)
    model = trained(Model, optimizer_of(Adam, INNER_WD), decay, strategy=lambda: "ddp_fork")
    ends = {"ours": values(model.parameters()), "attached": decay.coefficients}
    torch.save(ends, folder / "ddp_fork.pt")


def against_adamw(cls=Model, wrap=lambda make: make, **settings):
    """The three runs in a Trainer with ``settings``; ``wrap`` adds a scheduler."""

    def train(optimizer, wd, decays):
        callbacks = [DecoupledWD(WD, quantum=0)] if decays else []
        return trained(cls, wrap(optimizer_of(optimizer, wd)), *callbacks, **settings).ends

    return three_runs(train)


class FSDP1(FSDPStrategy):
    """The Trainer refuses FSDPStrategy itself on the CPU, and that would ask for a GPU."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


sharding = partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)
AGAINST_ADAMW = {
    "ddp": {},
    "ddp_manual": {"model": {"manual": True}},
    "ddp_in_the_other_package": {"cls": Older, "package": pytorch_lightning},
    "ddp_accumulation_and_one_cycle": {
        "wrap": lambda make: partial(one_cycle, make, steps=EPOCHS * BATCHES // 4),
        "accumulate_grad_batches": 4,
        "gradient_clip_val": 0.1,
    },
    "lightning_fsdp2": {"cls": Sharded, "strategy": sharding},
    "lightning_fsdp1": {"strategy": FSDP1},
}
for name, settings in AGAINST_ADAMW.items():
    SCENARIOS[name] = lambda folder, settings=settings: against_adamw(**settings)


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
    """With accumulation, logs and the description."""
    schedule, every = Cosine(0.4, 0.0), 2
    logger, printed, by_hand = notes_logger(lightning.pytorch), io.StringIO(), Sets(schedule, every)
    settings = {"accumulate_grad_batches": every, "log_every_n_steps": 1}
    with contextlib.redirect_stdout(printed):
        decay = DecoupledWD(schedule, quantum=0, verbose=True)
        ours = trained(Model, optimizer_of(Adam, INNER_WD), decay, logger=logger, **settings).ends
    return {
        "ours": ours,
        "adamw": trained(Model, optimizer_of(AdamW, 0.0), by_hand, **settings).ends,
        "undecayed": trained(Model, optimizer_of(AdamW, 0.0), **settings).ends,
        "notes": [it for it in logger.notes if "wd-Adam" in it[0]],
        "used": by_hand.used,
        "printed": printed.getvalue(),
    }


def resumed(folder, cls, **settings):
    """A run with deferred decay when it is saved, and one that forgets that."""
    folder = folder / cls.__name__
    train = partial(trained, cls, optimizer_of(Adam, INNER_WD), **settings)

    def decay(optimizers=None):  # against shrinks of about 1e-3
        return DecoupledWD(Cosine(0.1, 0.08), quantum=2.5e-3, optimizers=optimizers)

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


SCENARIOS["ddp_resumed"] = lambda folder: resumed(folder, Model)
SCENARIOS["lightning_fsdp2_resumed"] = lambda folder: resumed(folder, Sharded, strategy=sharding)
