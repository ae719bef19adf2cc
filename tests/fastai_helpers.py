"""Learners that keep quiet, and the callbacks that watch or disturb their fits."""

from __future__ import annotations

from functools import partial

import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastcore.basics import noop
from helpers import INNER_WD
from reference.loops import decay_by_hand
from torch import nn
from torch.nn.functional import mse_loss

from wd_callbacks.fastai import DecoupledWD

WD = 0.1
BS, BATCHES = 5, 8

L2 = partial(Adam, wd=INNER_WD, decouple_wd=False)
"""The optimizer to decay. Its own weight decay would change every bit if it were used."""

ADAMW = partial(Adam, wd=WD, decouple_wd=True)
"""The oracle."""


class Items(list):
    """A dataset that can be exported."""

    def new_empty(self):
        return Items()


def items(n=BS * BATCHES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(n, 4, generator=generator, dtype=dtype)
    return Items(zip(xs, xs[:, :1] - xs[:, 1:2] * xs[:, 2:3] + 0.5))


def loaders(data, bs=BS, valid=None):
    valid = data[: 2 * bs] if valid is None else valid
    return DataLoaders.from_dsets(
        data, Items(valid), bs=bs, shuffle=False, device="cpu", num_workers=0
    )


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()),
        *(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()),
        nn.Linear(6, 1),
    )


def learner(opt_func=SGD, *, model=None, dls=None, batches=BATCHES, dtype=torch.float32, **kwargs):
    """A Learner of a model with norms and biases, the same at every call."""
    dls = dls or loaders(items(BS * batches, dtype))
    kwargs = {"loss_func": mse_loss, "lr": 0.05, **kwargs}
    learn = Learner(dls, model or network(), opt_func=opt_func, **kwargs)
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn


def still_learner(groups=1, **kwargs):
    """A Learner whose float64 weights, all ones, only decay: their gradients are zero.

    Each of the ``groups`` weights is a param group of its own.
    """
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(groups))).double()
    for p in model.parameters():
        nn.init.ones_(p)
    kwargs = {"opt_func": partial(SGD, decouple_wd=False), "splitter": layers, **kwargs}
    return learner(model=model, dtype=torch.float64, loss_func=no_loss, **kwargs)


def no_loss(pred, _):
    return (0 * pred.sum()).float()  # fastai averages losses in float32


def layers(model):
    return [list(layer.parameters()) for layer in model]


def halves(model):
    return [list(model[:3].parameters()), list(model[3:].parameters())]


def thirds(model):
    return [list(part.parameters()) for part in (model[:3], model[3:6], model[6:])]


def state(learn):
    return {name: value.clone() for name, value in learn.model.state_dict().items()}


def different(a, b):
    """The names of the tensors that are not the same to the bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def fitted(opt_func, *cbs, fit=None, **kwargs):
    """The weights after a fit with ``cbs``."""
    learn = learner(opt_func, **kwargs)
    (fit or FITS["two_epochs"])(learn, list(cbs))
    return state(learn)


FITS = {
    "two_epochs": lambda learn, cbs: learn.fit(2, cbs=cbs),
    "fit": lambda learn, cbs: learn.fit(2, 0.05, cbs=cbs),
    "fit_slice": lambda learn, cbs: learn.fit(2, slice(1e-3, 0.05), cbs=cbs),
    "fit_slice_stop": lambda learn, cbs: learn.fit(2, slice(0.05), cbs=cbs),
    "one_cycle": lambda learn, cbs: learn.fit_one_cycle(2, slice(1e-3, 0.05), cbs=cbs),
    "flat_cos": lambda learn, cbs: learn.fit_flat_cos(2, slice(1e-3, 0.05), cbs=cbs),
    "sgdr": lambda learn, cbs: learn.fit_sgdr(2, 1, slice(1e-3, 0.05), cbs=cbs),
    "fine_tune": lambda learn, cbs: learn.fine_tune(2, 0.05, cbs=cbs),
    "twice": lambda learn, cbs: (learn.fit(1, cbs=cbs), learn.fit_one_cycle(1, cbs=cbs)),
    "reset_opt": lambda learn, cbs: [learn.fit(1, cbs=cbs, reset_opt=True) for _ in range(2)],
    "start_epoch": lambda learn, cbs: learn.fit_one_cycle(3, 0.05, cbs=cbs, start_epoch=1),
}


def wrapped(opt, **kwargs):
    """A torch optimizer in an OptimWrapper."""
    return partial(OptimWrapper, opt=partial(opt, **kwargs))


class DecayByHand(Callback):
    """The oracle: multiplies before the step, for an optimizer whose own wd is 0."""

    order, run_valid = DecoupledWD.order, False

    def __init__(self, wds=WD):
        self.wds = wds

    def before_step(self):
        groups = [
            {"lr": h["lr"], "params": [p for p in ps if self.opt.state[p].get("do_wd", True)]}
            for h, ps in zip(self.opt.hypers, self.opt.param_lists)
        ]
        decay_by_hand(groups, self.wds)


class Trace(Callback):
    """The hypers, the coefficients and the first weight of each group after every step."""

    order, run_valid = 1000, False

    def __init__(self, decay=None):
        self.decay = decay
        self.hypers, self.coefficients, self.weights = [], [], []

    def after_step(self):
        self.hypers.append([dict(h) for h in self.opt.hypers])
        self.weights.append([ps[0].detach().flatten()[0].item() for ps in self.opt.param_lists])
        if self.decay is not None:
            self.coefficients.append(list(self.decay.coefficients))

    def lrs(self, group=0):
        return [float(h[group]["lr"]) for h in self.hypers]


class When(Callback):
    """Does something at one event of some batches, counted over all epochs of a fit."""

    run_valid = False

    def __init__(self, event, action, batches=None, order=0):
        self.event, self.action, self.batches, self.order = event, action, batches, order
        self.hits = 0

    def __call__(self, event):
        if event != self.event or (event != "before_fit" and not self.learn.training):
            return
        if self.batches is None or self.learn.train_iter in self.batches:
            self.hits += 1
            self.action(self.learn)


class CpuMixedPrecision(MixedPrecision):
    """fastai's, on the CPU: its own before_fit asks for CUDA. It notes the steps that happen.

    Gradients that are multiplied by 2^127 overflow float32: at the first batch and every third.
    """

    def __init__(self):
        scales = {"init_scale": 2.0**127, "growth_factor": 2.0**8, "backoff_factor": 2.0**-8}
        super().__init__(**scales, growth_interval=2)

    def before_fit(self):
        self.autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler("cpu", **self.kwargs)
        self.scales, self.steps = [], []

    def after_step(self):
        if not self.skipped:
            self.steps.append(self.learn.train_iter)
        super().after_step()


def throw(exception):
    def action(_):
        raise exception

    return action
