"""DINO: the weight decay grows from 0.04 to 0.4, and the teacher is an average of the student.

python examples/recipes/dino.py
"""

import copy
from typing import Any

import pytorch_lightning as pl
import torch
from data import digits
from torch import Tensor, nn

from wd_callbacks.lightning import DecoupledWD
from wd_callbacks.schedules import Cosine


def view(images: Tensor) -> Tensor:
    """Return the images shifted by up to one pixel, with noise."""
    shifts = torch.randint(-1, 2, (2,)).tolist()
    return images.view(-1, 8, 8).roll(shifts, (1, 2)).flatten(1) + 0.1 * torch.randn_like(images)


class DINO(pl.LightningModule):
    """A student that predicts what its teacher sees in another view of the image."""

    def __init__(self) -> None:
        super().__init__()
        body = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 64))
        self.student = nn.Sequential(body, nn.Linear(64, 128, bias=False))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(128))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the cross-entropy between the two views."""
        targets = self.teacher(view(batch))
        loss = nn.functional.cross_entropy(
            self.student(view(batch)) / 0.1, ((targets - self.center) / 0.04).softmax(1)
        )
        self.center.lerp_(targets.mean(0), 0.1)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Move the teacher towards the student."""
        for mean, p in zip(self.teacher.parameters(), self.student.parameters()):
            mean.lerp_(p.detach(), 0.01)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam: the callback decays."""
        return torch.optim.Adam(self.student.parameters(), lr=1e-3)


pl.seed_everything(0)
x, y, x_test, y_test = digits()
decay, model = DecoupledWD(Cosine(0.04, 0.4), exclude=["bias", "norm"]), DINO()
trainer = pl.Trainer(max_epochs=10, callbacks=[decay], logger=False, enable_checkpointing=False)
trainer.fit(model, torch.utils.data.DataLoader(x, batch_size=64, shuffle=True))
print(decay.describe())
nearest = torch.cdist(model.teacher[0](x_test), model.teacher[0](x)).argmin(1)
print(f"accuracy of the nearest neighbour {(y[nearest] == y_test).float().mean():.1%}")
