"""A small LightningModule for either Lightning package, and a Trainer that keeps quiet."""

from __future__ import annotations

import functools

import lightning.pytorch
import pytorch_lightning
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset

PACKAGES = [pytorch_lightning, lightning.pytorch]

IMPORTANT = 0.37
"""The weight decay of the inner optimizers: one that would show if it were used, or lost."""


def batch_of(epoch, index):
    """Inputs and targets that depend on the position alone, so that a resumed run sees the same."""
    generator = torch.Generator().manual_seed(1000 * epoch + index)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 1, generator=generator)


def network(norm=False):
    """The same small network, with the same weights, at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        middle = nn.BatchNorm1d(5) if norm else nn.Tanh()
        return nn.Sequential(nn.Linear(6, 5), middle, nn.Linear(5, 1))


class Recipe:
    """What the models of both packages share.

    Args:
        optimizers: From a network to the optimizer, to a list of them, or to what else
            ``configure_optimizers`` may return.
        manual: Whether the model steps on its own, every optimizer ``steps`` times per batch, and
            only in every ``every``-th batch.
        by: How it does so: ``"step"``, with a ``"closure"``, or by the ``"raw"`` torch optimizer.
        skipped: Batches for which ``training_step`` returns None.
        raises: What to raise in which batch, a pair.
        watch: Called with the model's own hooks, by name.
        lr: What a finder of learning rates looks for.
    """

    def __init__(
        self,
        optimizers,
        *,
        manual=False,
        steps=1,
        every=1,
        by="step",
        norm=False,
        skipped=(),
        raises=None,
        watch=None,
        lr=None,
    ):
        super().__init__()
        self.backbone, self.middle, self.head = network(norm)
        self.make, self.automatic_optimization = optimizers, not manual
        self.steps, self.every, self.by = steps, every, by
        self.skipped, self.raises, self.watch, self.lr = skipped, raises, watch, lr

    def forward(self, x):
        return self.head(self.middle(self.backbone(x)))

    def configure_optimizers(self):
        return self.make(self)

    def loss(self, index):
        x, y = (values.to(self.dtype) for values in batch_of(self.current_epoch, index))
        wide = torch.promote_types(self.dtype, torch.float32)  # torch 2.4 has it in no other
        return mse_loss(self(x).to(wide), y.to(wide))

    def training_step(self, batch, batch_idx):
        self._see("training_step")
        if self.raises is not None and self.raises[0] == batch_idx:
            raise self.raises[1]
        if batch_idx in self.skipped:
            return None
        if self.automatic_optimization:
            return self.loss(batch_idx)
        optimizers = self.optimizers(use_pl_optimizer=self.by != "raw")
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            for step in range(self.steps):
                self._step(optimizer, step, batch_idx)
        return None

    def _step(self, optimizer, step, batch_idx):
        def evaluate():
            if step or batch_idx % self.every == 0:
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch_idx))

        if self.by == "closure":
            optimizer.step(closure=evaluate)
            return
        evaluate()
        if (batch_idx + 1) % self.every == 0:
            optimizer.step()

    def validation_step(self, batch, batch_idx):
        self._see("validation_step")

    def test_step(self, batch, batch_idx):
        self._see("test_step")

    def predict_step(self, batch, batch_idx):
        return self(batch_of(0, batch_idx)[0])

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self._see("configure_gradient_clipping")
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _see(self, hook):
        if self.watch is not None:
            self.watch(hook, self)


@functools.cache
def model_class(package):
    """The model as a LightningModule of ``package``."""
    return type("Model", (Recipe, package.LightningModule), {})


def turns_class(package):
    """A model with two optimizers, the second of which steps in every third batch."""

    class Turns(model_class(package)):
        def training_step(self, batch, batch_idx):
            for optimizer, every in zip(self.optimizers(), (1, 3)):
                if batch_idx % every == every - 1:
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch_idx))
                    optimizer.step()

    return Turns


def loader(batches):
    return DataLoader(torch.arange(batches), batch_size=1)


class Endless(IterableDataset):
    """Batches without a length: ``count`` of them, or more than anybody wants."""

    def __init__(self, count=10**6):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


def quiet_trainer(package, *callbacks, **settings):
    """A Trainer on the CPU that prints, logs and saves nothing unless told."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return package.Trainer(**quiet | settings, callbacks=list(callbacks))


def fit(package, optimizers, *callbacks, batches=6, epochs=2, model=None, resume=None, **settings):
    """Trains a new model and returns it; its ``trainer`` is still there."""
    module = model_class(package)(optimizers, **model or {})
    if epochs is not None:
        settings["max_epochs"] = epochs
    trainer = quiet_trainer(package, *callbacks, **settings)
    data = loader(batches) if isinstance(batches, int) else DataLoader(batches, batch_size=None)
    trainer.fit(module, data, ckpt_path=resume)
    return module


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(ours, theirs):
    """Whether two models have the same weights, to the bit."""
    return all(map(torch.equal, weights(ours), weights(theirs)))
