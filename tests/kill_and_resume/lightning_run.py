"""A Lightning run that may be killed at any time and goes on from the newest checkpoint that loads.

Lightning writes to a temporary file and renames it, so a checkpoint is whole, unless TMPDIR is
another file system: then the file is copied, and a kill can leave half of it.
"""

from __future__ import annotations

import logging
import warnings

import pytorch_lightning as pl
import torch
from kill_and_resume.kills import newest, safely
from lightning_helpers import loader, quiet_trainer
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from wd_callbacks.lightning import DecoupledWD
from wd_callbacks.schedules import Cosine, Linear

EPOCHS, PER_EPOCH = 4, 11
# Steps of both: never after the last batch of an epoch, where Lightning 2.6.6 repeats batches.
EVERY = 5

OWN = {"weight_decay": 0.37}  # any use or loss of it changes the weights


class Model(pl.LightningModule):
    """Steps two optimizers, the second in every second batch; data depend on the position alone."""

    automatic_optimization = False

    def __init__(self, kill):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh())
            self.branch, self.head = nn.Linear(8, 8), nn.Linear(8, 1)
        self.kill = kill

    def training_step(self, batch, batch_idx):
        self.kill.batch = self.current_epoch * PER_EPOCH + batch_idx
        generator = torch.Generator().manual_seed(self.kill.batch)
        x, y = torch.randn(4, 6, generator=generator), torch.randn(4, 1, generator=generator)
        hidden = self.body(x)
        if self.kill.batch % 4 < 2:  # the branch has a gradient now and then
            hidden = hidden + self.branch(hidden)
        self.manual_backward(mse_loss(self.head(hidden), y))
        pairs = zip(self.optimizers(), self.lr_schedulers())
        for every, (optimizer, lr) in enumerate(pairs, start=1):
            if (self.kill.batch + 1) % every == 0:
                optimizer.step()
                lr.step()
            self.kill.middle()
        self.zero_grad()

    def configure_optimizers(self):
        body = [*self.body.parameters(), *self.branch.parameters()]
        head = [{"params": [p]} for p in self.head.parameters()]
        sgd = torch.optim.SGD(body, lr=0.05, momentum=0.9, **OWN)
        adam = torch.optim.Adam(head, lr=0.02, **OWN)
        return [sgd, adam], [LinearLR(sgd, 0.1, total_iters=20), CosineAnnealingLR(adam, 30)]


class Files(TorchCheckpointIO):
    """Lightning's own, with a kill while it writes."""

    def __init__(self, kill):
        super().__init__()
        self.kill = kill

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.kill.save(checkpoint, path)
        super().save_checkpoint(checkpoint, path, storage_options)


def train(folder, kill):
    """Trains from the newest checkpoint to the end and returns the final state."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    wds = {0: Cosine(0.04, 0.01), 1: [Linear(0.1, 0), 0.05]}
    decay = DecoupledWD(wds, quantum=4e-3, exclude=["bias", "norm"])
    save = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=EVERY, save_top_k=-1)
    settings = {"max_epochs": EPOCHS, "enable_checkpointing": True, "plugins": [Files(kill)]}
    trainer = quiet_trainer(pl, decay, save, **settings)
    trainer.fit(Model(kill), loader(PER_EPOCH), ckpt_path=newest(folder)[0], **safely(trainer))
    return {
        "model": trainer.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "lrs": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "decay": decay.state_dict(),
        "steps": trainer.global_step,
    }
