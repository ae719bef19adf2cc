"""Decoupled weight decay in Lightning, on scikit-learn's digits."""

from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from wd_callbacks.lightning import DecoupledWD


class Digits(pl.LightningModule):
    """A small classifier, trained with 1cycle."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Logs the accuracy."""
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        """Adam, with its learning rate on a 1cycle schedule."""
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


x, y = map(torch.tensor, load_digits(return_X_y=True))
x = x.float() / 16
train = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True)
valid = DataLoader(TensorDataset(x[1400:], y[1400:]), batch_size=397)

# On a schedule from 0.1 to 0 instead: DecoupledWD(lambda progress: 0.1 * (1 - progress))
decay = DecoupledWD(0.1)
trainer = pl.Trainer(max_epochs=8, callbacks=[decay], logger=False, enable_checkpointing=False)
trainer.fit(Digits(), train, valid)
print(f"accuracy {trainer.callback_metrics['accuracy']:.1%}")
