"""The same run in every adapter, for checks that hold in all of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import INNER_WD
from torch.nn.functional import mse_loss

BATCHES, EPOCHS = 8, 2
N = BATCHES * EPOCHS


def data(size=3, batches=BATCHES):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, generator=generator), torch.randn(1, generator=generator))
        for _ in range(2 * batches)
    ]


def batches(epochs=EPOCHS, count=BATCHES):
    """Those of every adapter's run."""
    for _ in range(epochs):
        for i in range(0, 2 * count, 2):
            yield tuple(map(torch.stack, zip(*data(batches=count)[i : i + 2])))


def no_loss(prediction, _):
    """Its gradients are zero: of SGD, nothing but the decay is left."""
    return 0 * prediction.sum()


def run(adapter, arguments, model, *, lr=0.1, lr_at=None, own=None, loss=mse_loss, epochs=EPOCHS):
    """Trains ``model``, which takes 3 inputs, with SGD and the decay; returns the decay.

    ``lr_at`` gives the fraction of ``lr`` at a progress. ``own`` is the optimizer's weight decay: a
    sequence makes a param group of each layer.
    """
    own = INNER_WD if own is None else own
    several = isinstance(own, (list, tuple))
    groups = [list(it.parameters()) for it in (model if several else [model])]
    own = list(own) if several else [own]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="wd_callbacks")
        return {"torch": _torch, "fastai": _fastai, "lightning": _lightning}[adapter](
            arguments, model, groups, own, lr, lr_at, loss, epochs
        )


def sgd(groups, own, lr):
    return torch.optim.SGD(
        [{"params": params, "weight_decay": wd} for params, wd in zip(groups, own)], lr=lr
    )


def _torch(arguments, model, groups, own, lr, lr_at, loss, epochs):
    from wd_callbacks.torch import DecoupledWD

    optimizer = model.optimizer = sgd(groups, own, lr)  # a decay lives as long as its optimizer
    steps = epochs * BATCHES
    decay = DecoupledWD(
        optimizer, model=model, total_steps=steps, steps_per_epoch=BATCHES, **arguments
    )
    for step, (x, y) in enumerate(batches(epochs)):
        for group in optimizer.param_groups:
            group["lr"] = lr * (lr_at(step / steps) if lr_at else 1)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return decay


def _fastai(arguments, model, groups, own, lr, lr_at, loss, epochs):
    from fastai.callback.schedule import ParamScheduler
    from fastai.optimizer import SGD
    from fastai_helpers import learner, loaders

    from wd_callbacks.fastai import DecoupledWD

    learn = learner(
        SGD,
        model=model,
        dls=loaders(data(), bs=2, valid=data()),
        loss_func=loss,
        lr=lr,
        splitter=lambda _: groups,
        wd_bn_bias=True,
    )
    decay = DecoupledWD(**arguments)
    cbs = [ParamScheduler({"lr": lambda p: lr * lr_at(p)})] if lr_at else []
    learn.fit(epochs, wd=own if len(own) > 1 else own[0], cbs=[*cbs, decay])
    return decay


def _lightning(arguments, model, groups, own, lr, lr_at, loss, epochs):
    import pytorch_lightning as pl
    from lightning_helpers import quiet_trainer

    from wd_callbacks.lightning import DecoupledWD

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model

        def training_step(self, batch, _):
            return loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = sgd(groups, own, lr)
            steps = epochs * BATCHES
            factor = (lambda step: lr_at(step / steps)) if lr_at else (lambda step: 1.0)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    decay = DecoupledWD(**arguments)
    trainer = quiet_trainer(pl, decay, max_epochs=epochs)
    trainer.fit(Module(), torch.utils.data.DataLoader(data(), batch_size=2))
    return decay


each_adapter = pytest.mark.parametrize("adapter", ["torch", "fastai", "lightning"])
