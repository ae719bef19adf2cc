"""Decoupled weight decay from a LightningCLI config, on scikit-learn's digits.

python main.py fit --config config.yaml
"""

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    """A small network.

    Args:
        width: Size of the hidden layer.
        lr: Peak learning rate of 1cycle.
    """

    def __init__(self, width: int = 64, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 10)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Logs the accuracy."""
        accuracy = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> tuple[list, list]:
        """Adam, with its learning rate on a 1cycle schedule."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Digits(pl.LightningDataModule):
    """1400 digits to train on and 397 to validate on.

    Args:
        batch_size: Digits in a batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        x, y = map(torch.tensor, load_digits(return_X_y=True))
        self.data = TensorDataset(x.float() / 16, y)

    def train_dataloader(self) -> DataLoader:
        """Shuffled."""
        train = torch.utils.data.Subset(self.data, range(1400))
        return DataLoader(train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """In one batch."""
        return DataLoader(torch.utils.data.Subset(self.data, range(1400, 1797)), 397)


if __name__ == "__main__":
    LightningCLI(Classifier, Digits, save_config_callback=None)
