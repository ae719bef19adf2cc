"""Runs in which every gradient is zero, so that the decay alone changes the weights.

Four batches an epoch and a learning rate of 0.1 in each framework. The optimizer's own weight decay
is 0.37, which would show if it acted.
"""

from __future__ import annotations

import tempfile

import lightning.pytorch
import torch
from fastai.callback.core import Callback as FastaiCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD as FastaiSGD
from lightning_helpers import quiet_trainer
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

__all__ = ["FastaiCallback", "TrainerCallback"]
LightningCallback = lightning.pytorch.Callback
OWN, LR, BATCHES = 0.37, 0.1, 4


def sgd(params, lr=LR):
    return SGD(params, lr=lr, weight_decay=OWN)


class Factor:
    """What the first weight of a model has been multiplied by since."""

    def __init__(self, model):
        self.weight = next(model.parameters())
        self.start = self.weight.detach().clone()

    def __call__(self):
        return (self.weight.detach() / self.start).mean().item()


class StillModule(lightning.pytorch.LightningModule):
    def __init__(self, batches=BATCHES, lr=LR):
        super().__init__()
        self.layer, self.batches, self.lr = nn.Linear(4, 1), batches, lr

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum() * 0

    def validation_step(self, batch, batch_idx):
        pass

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return sgd(self.parameters(), self.lr)

    def train_dataloader(self):
        return DataLoader(torch.ones(self.batches, 4), batch_size=1)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def lightning_trainer(*callbacks, epochs=2, **settings):
    settings = {"default_root_dir": tempfile.mkdtemp(), "max_epochs": epochs, **settings}
    return quiet_trainer(lightning.pytorch, *callbacks, **settings)


def zero_loss(prediction, target):
    return (prediction * 0).sum()


def learner(*cbs, opt_func=FastaiSGD, loss_func=zero_loss, batches=BATCHES):
    data = [(torch.ones(4), torch.ones(1))] * batches
    dls = DataLoaders.from_dsets(data, data[:1], bs=1, device="cpu", num_workers=0)
    model = nn.Linear(4, 1)
    path = tempfile.mkdtemp()
    settings = {"opt_func": opt_func, "loss_func": loss_func, "path": path, "lr": LR, "wd": OWN}
    return Learner(dls, model, cbs=list(cbs), **settings)


def quietly(learn, method, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        return getattr(learn, method)(*args, **kwargs)


class StillNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x, labels=None):
        return {"loss": self.layer(x).sum() * 0, "logits": x}


class Ones(Dataset):
    def __len__(self):
        return BATCHES

    def __getitem__(self, index):
        return {"x": torch.ones(4), "labels": torch.ones(1)}


def hf_trainer(*callbacks, epochs=2, model=None, optimizers=(None, None), **settings):
    quiet = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 1,
        "num_train_epochs": epochs,
        "learning_rate": LR,
        "weight_decay": OWN,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    args = TrainingArguments(**quiet | settings)
    model = StillNet() if model is None else model
    return Trainer(
        model, args, train_dataset=Ones(), callbacks=list(callbacks), optimizers=optimizers
    )


def at(base, hook, function, order=None, times=1):
    """A callback of ``base`` that calls ``function`` in ``hook``, the first ``times`` times.

    ``function`` takes the callback and the hook's arguments, and returns whether it did anything.
    """
    done = []

    def method(self, *args, **kwargs):
        if len(done) < times and function(self, *args, **kwargs):
            done.append(True)

    attributes = {hook: method} if order is None else {hook: method, "order": order}
    return type("At", (base,), attributes)()
