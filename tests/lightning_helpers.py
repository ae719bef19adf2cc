"""A small LightningModule for either Lightning package, and a Trainer that keeps quiet."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import INNER_WD, batch_of, network
from torch.nn.functional import mse_loss
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, IterableDataset

LR, WD = 0.01, 0.1


class Recipe:
    """What the models of both packages share.

    ``optimizers`` is from the module to what ``configure_optimizers`` may return. A ``manual`` one
    steps every optimizer ``steps`` times per batch, only in every ``every``-th batch, and ``by``
    ``"step"``, with a ``"closure"``, or by the ``"raw"`` torch optimizer. ``skipped`` are batches
    without a loss, ``raises`` is a batch with its exception, ``watch`` is called with the names of
    the model's own hooks, and ``lr`` is for finders of learning rates.
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
            loss = self.loss(batch_idx)
            self.manual_backward(loss)
            return loss

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


def turns_class(package, *every):
    """A model whose n-th optimizer steps in every ``every[n]``-th batch."""

    class Turns(model_class(package)):
        def training_step(self, batch, batch_idx):
            for optimizer, window in zip(self.optimizers(), every):
                if batch_idx % window == window - 1:
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch_idx))
                    optimizer.step()

    return Turns


def reloading_class(package, length):
    """A model whose loader has ``length(epoch)`` batches."""

    class Reloads(model_class(package)):
        def train_dataloader(self):
            return loader(length(self.current_epoch))

    return Reloads


def loader(batches):
    return DataLoader(torch.arange(batches), batch_size=1)


class Endless(IterableDataset):
    """Batches without a length: ``count`` of them, or more than any run takes."""

    def __init__(self, count=10**6):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


def quiet_trainer(package, *callbacks, **settings):
    """A Trainer on the CPU that prints, logs and saves nothing by default."""
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
    """Trains a new model and returns it; its ``trainer`` is still there.

    ``batches`` is their number per epoch or an iterable, ``model`` arguments of ``Recipe`` or a
    module, ``resume`` a checkpoint, and ``settings`` are the Trainer's.
    """
    given = isinstance(model, torch.nn.Module)
    module = model if given else model_class(package)(optimizers, **model or {})
    if epochs is not None:
        settings["max_epochs"] = epochs
    trainer = quiet_trainer(package, *callbacks, **settings)
    data = loader(batches) if isinstance(batches, int) else DataLoader(batches, batch_size=None)
    trainer.fit(module, data, ckpt_path=resume)
    return module


# Optimizers


def adam(module, **settings):
    """The optimizer to decay. Its own weight decay would change every bit if it were used."""
    return Adam(module.parameters(), **{"lr": LR, "weight_decay": INNER_WD} | settings)


def adamw(module, **settings):
    """The oracle."""
    return AdamW(module.parameters(), **{"lr": LR, "weight_decay": WD} | settings)


def split(cls, first, second):
    """Two optimizers, one for each layer, with these weight decays."""

    def optimizers(module):
        return [
            cls(module.backbone.parameters(), lr=LR, weight_decay=first),
            cls(module.head.parameters(), lr=LR / 2, weight_decay=second),
        ]

    return optimizers


two_adams = split(Adam, INNER_WD, INNER_WD)


def one_cycle(make, module, steps=12):
    optimizer = make(module)
    scheduler = OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
    return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def half_precision(package, init_scale=2.0**40):
    """fp16 with a scaler on the CPU. The first gradients overflow where the scale is large."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, backoff_factor=2.0**-10)
    return package.plugins.MixedPrecision("16-mixed", "cpu", scaler)


def notes_logger(package):
    """A logger that keeps what it is given, as pairs of metrics and step."""

    class Notes(package.loggers.logger.DummyLogger):
        def __init__(self):
            super().__init__()
            self.notes = []

        def log_metrics(self, metrics, step=None):
            self.notes.append((dict(metrics), step))

    return Notes()


def averaging(package, name, epoch=2):
    """A callback that averages the weights, if the package has it."""
    cls = getattr(package.callbacks, name, None)
    if cls is None:
        pytest.skip(f"this {package.__name__} has no {name}")
    if name == "EMAWeightAveraging":
        return cls(decay=0.8)
    return cls(swa_lrs=LR, swa_epoch_start=epoch)


each_package = pytest.mark.parametrize(
    "package", ["pytorch_lightning", "lightning.pytorch"], indirect=True
)
"""Both, for a test of what every other one relies on."""
each_way = pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
