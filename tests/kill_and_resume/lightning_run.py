"""A Lightning run that may be killed at any time and goes on from the newest checkpoint that loads.

Lightning writes to a temporary file and renames it, so a checkpoint is whole, unless TMPDIR is
another file system: then the file is copied, and a kill can leave half of it.
"""

from __future__ import annotations

import logging
import warnings

import pytorch_lightning as pl
import torch
from kill_and_resume.kills import main, newest, safely
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR
from torch.utils.data import DataLoader

from wd_callbacks.lightning import DecoupledWD
from wd_callbacks.schedules import Cosine, Linear

EPOCHS, PER_EPOCH = 4, 11
BATCHES = EPOCHS * PER_EPOCH

OWN = {"weight_decay": 0.37}  # any use or loss of it changes the weights
BODY = {"quantum": 4e-3, "exclude": ["bias", "norm"]}

# The callback's arguments, and the Trainer's.
VARIANTS = {
    "manual, two optimizers": (
        {"wd": {0: Cosine(0.04, 0.01), 1: [Linear(0.1, 0), 0.05]}} | BODY,
        {},
    ),
    "manual, every third batch": ({"wd": Cosine(0.04, 0.01)} | BODY, {}),
    "accumulation": (
        {"wd": Cosine(0.001, 4e-4), "scale_by": "lr_ratio", "quantum": 2e-3},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5},
    ),
    "bf16-mixed": (
        {"wd": [Cosine(0.06, 0.02), 0.03]} | BODY,
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
    ),
    "bf16-true": ({"wd": Cosine(0.2, 0.1), "exclude": "bias"}, {"precision": "bf16-true"}),
}


class Model(pl.LightningModule):
    """Steps as its variant says; its data depend on the position alone."""

    def __init__(self, variant, kill):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh())
            self.branch, self.head = nn.Linear(8, 8), nn.Linear(8, 1)
        self.variant, self.kill = variant, kill
        self.automatic_optimization = not variant.startswith("manual")

    def loss(self):
        generator = torch.Generator().manual_seed(self.kill.batch)
        x, y = torch.randn(4, 6, generator=generator), torch.randn(4, 1, generator=generator)
        hidden = self.body(x.to(self.dtype))
        if self.kill.batch % 4 < 2:  # the branch has a gradient now and then
            hidden = hidden + self.branch(hidden)
        return mse_loss(self.head(hidden).float(), y)

    def training_step(self, batch, batch_idx):
        self.kill.start(self.current_epoch * PER_EPOCH + batch_idx)
        loss = self.loss()
        if self.automatic_optimization:
            self.kill.middle()
            return loss
        self.manual_backward(loss)
        optimizers, lrs = self.optimizers(), self.lr_schedulers()
        if not isinstance(optimizers, list):
            optimizers, lrs = [optimizers], [lrs]
        window = 3 if len(optimizers) == 1 else 1  # checkpoints hold no gradients: none in between
        for index, (optimizer, lr) in enumerate(zip(optimizers, lrs)):
            if (self.kill.batch + 1) % (window + index) == 0:
                optimizer.step()
                lr.step()
            self.kill.middle()
        if (self.kill.batch + 1) % window == 0:
            self.zero_grad()
        return None

    def configure_optimizers(self):
        body = [*self.body.parameters(), *self.branch.parameters()]
        head = [{"params": [p]} for p in self.head.parameters()]
        if self.variant == "manual, two optimizers":
            both = [
                torch.optim.SGD(body, lr=0.05, momentum=0.9, **OWN),
                torch.optim.Adam(head, lr=0.02, **OWN),
            ]
            return both, [LinearLR(both[0], 0.1, total_iters=20), CosineAnnealingLR(both[1], 30)]
        groups = [{"params": body}, {"params": [*self.head.parameters()], "lr": 0.03}]
        optimizer = torch.optim.Adam(groups, lr=0.04, **OWN)
        if self.variant == "accumulation":
            steps = int(self.trainer.estimated_stepping_batches)
            lr = OneCycleLR(optimizer, max_lr=0.04, total_steps=steps)
        else:
            lr = CosineAnnealingLR(optimizer, 30)
        return [optimizer], [{"scheduler": lr, "interval": "step"}]


class Saver(pl.callbacks.ModelCheckpoint):
    """Saves where Lightning itself resumes to the same bits.

    That is not within a window of accumulation, as gradients are not saved, and not at the last
    batch of an epoch: the next checkpoint would repeat batches (Lightning 2.6.6).
    """

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.steps = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self.steps and batch_idx + 1 < PER_EPOCH:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.steps = trainer.global_step


class Files(TorchCheckpointIO):
    """Lightning's own, with a kill while it writes."""

    def __init__(self, kill):
        super().__init__()
        self.kill = kill

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.kill.save(checkpoint, path)
        super().save_checkpoint(checkpoint, path, storage_options)


def train(variant, folder, kill):
    """Trains from the newest checkpoint to the end and returns the final state."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    ours, settings = VARIANTS[variant]
    decay = DecoupledWD(**ours)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[decay, Saver(folder, "{step}", every_n_train_steps=2, save_last=True)],
        plugins=[Files(kill)],
        **settings,
    )
    model = Model(variant, kill)
    data = DataLoader(torch.arange(PER_EPOCH), batch_size=1)
    trainer.fit(model, data, ckpt_path=newest(folder)[0], **safely(trainer))
    return {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "lrs": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "decay": decay.state_dict(),
        "steps": trainer.global_step,
    }


if __name__ == "__main__":
    main(train)
