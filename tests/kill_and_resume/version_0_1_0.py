"""Two runs whose checkpoints were saved with version 0.1.0, which later versions resume.

This made ``plain-0.1.0.pt`` and ``lightning-0.1.0.ckpt``, and makes them with that version only:

    python -m kill_and_resume.version_0_1_0

Nothing here is random, so that the runs are the same wherever they are made.
"""

from __future__ import annotations

from pathlib import Path

import torch
from kill_and_resume.kills import safely
from torch import nn
from torch.optim.lr_scheduler import LinearLR

import wd_callbacks
from wd_callbacks import torch as plain
from wd_callbacks.schedules import Cosine

HERE = Path(__file__).parent
PLAIN, LIGHTNING = HERE / "plain-0.1.0.pt", HERE / "lightning-0.1.0.ckpt"

STEPS, SAVED = 30, 13  # in the plain loop; in Lightning two batches each, in three epochs

DECAY = {
    "wd": [Cosine(1.5e-3, 4e-4), 7e-4],
    "scale_by": ["lr_ratio", "none"],
    "quantum": 2e-3,
    "exclude": "bias",
}


def network():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    for p in model.parameters():
        p.data = torch.linspace(-1, 1.2, p.numel(), dtype=p.dtype).sin().view_as(p)
    return model


def loss(model, batch):
    x = torch.arange(15, dtype=torch.float64).mul(batch + 0.7).cos().view(5, 3)
    return (model(x) - x[:, :1] * x[:, 1:2]).square().mean()


def adam(model):
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.03}]
    optimizer = torch.optim.Adam(groups, lr=0.02, weight_decay=0.37)
    return optimizer, LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)


def plain_run(saved, stop=STEPS):
    """A plain loop, from what was ``saved`` or None, until ``stop``; returns what it would save."""
    model = network()
    optimizer, lr = adam(model)
    decay = plain.DecoupledWD(optimizer, **DECAY, model=model, total_steps=STEPS)
    parts = {"model": model, "optimizer": optimizer, "lr": lr, "decay": decay}
    for name, part in parts.items() if saved else ():
        part.load_state_dict(saved[name])
    for step in range(saved["step"] if saved else 0, stop):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        lr.step()
    return {**{name: part.state_dict() for name, part in parts.items()}, "step": stop}


def lightning_run(path, save=None):
    """Lightning, from the checkpoint at ``path`` or None; returns the states of model and decay.

    With ``save``, a checkpoint is written there after ``SAVED`` steps.
    """
    import pytorch_lightning as pl
    from lightning_helpers import loader, quiet_trainer

    from wd_callbacks.lightning import DecoupledWD

    per_epoch = 2 * STEPS // 3

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, batch_idx):
            return loss(self.net, self.current_epoch * per_epoch + batch_idx)

        def configure_optimizers(self):
            optimizer, lr = adam(self.net)
            return [optimizer], [{"scheduler": lr, "interval": "step"}]

        def on_train_batch_end(self, outputs, batch, batch_idx):
            done = self.current_epoch * per_epoch + batch_idx + 1
            if save is not None and done == 2 * SAVED:
                self.trainer.save_checkpoint(save)

    decay = DecoupledWD(**DECAY)
    settings = {"max_epochs": 3, "accumulate_grad_batches": 2, "precision": "64-true"}
    trainer = quiet_trainer(pl, decay, **settings)
    model = Model()
    trainer.fit(model, loader(per_epoch), ckpt_path=path, **safely(trainer))
    return model.net.state_dict(), decay.state_dict()


if __name__ == "__main__":
    assert wd_callbacks.__version__ == "0.1.0", "a later version saves under a name of its own"
    torch.save(plain_run(None, SAVED), PLAIN)
    lightning_run(None, LIGHTNING)
