"""A GAN with manual optimization: only the discriminator decays.

python examples/recipes/gan.py
"""

import pytorch_lightning as pl
import torch
from data import digits
from torch import Tensor, nn

from wd_callbacks.lightning import DecoupledWD


class GAN(pl.LightningModule):
    """Generates digits from 16 random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid()
        )
        self.discriminator = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(), nn.Linear(128, 1))

    def training_step(self, real: Tensor, batch_idx: int) -> None:
        """Make a step of the generator, and one of the discriminator."""
        fake = self.generator(torch.randn(len(real), 16))
        softplus, (g, d) = nn.functional.softplus, self.optimizers()
        losses = {"g": softplus(-self.discriminator(fake)).mean()}
        g.zero_grad()
        self.manual_backward(losses["g"])
        g.step()
        right = softplus(self.discriminator(fake.detach())), softplus(-self.discriminator(real))
        losses["d"] = sum(right).mean()
        d.zero_grad()
        self.manual_backward(losses["d"])
        d.step()
        self.log_dict(losses, prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for each: index 0 is the generator's, index 1 the discriminator's."""
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), lr=1e-3, betas=(0.5, 0.9)) for part in parts]


pl.seed_everything(0)
decay, model = DecoupledWD(1.0, optimizers=1, exclude="bias"), GAN()
trainer = pl.Trainer(max_epochs=10, callbacks=[decay], logger=False, enable_checkpointing=False)
trainer.fit(model, torch.utils.data.DataLoader(digits()[0], batch_size=64, shuffle=True))
print(decay.describe())
for name, loss in trainer.callback_metrics.items():
    print(f"loss of {name}: {loss:.3f}")
for row in model.generator(torch.randn(1, 16)).view(8, 8):
    print("".join(" .:-=+*#%@"[min(int(10 * value), 9)] * 2 for value in row))
