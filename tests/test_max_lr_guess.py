"""A guessed max_lr: read from where the framework knows it, and checked against what comes.

Warnings of the package are errors, except where a test catches them.
"""

import math
import re

import numpy as np
import pytest
import torch
from fastai.callback.schedule import ParamScheduler, SchedCos
from helpers import caught, parameter
from still import (
    FastaiCallback,
    LightningCallback,
    StillModule,
    StillNet,
    at,
    hf_trainer,
    learner,
    lightning_trainer,
    quietly,
)
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)

from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.lightning import DecoupledWD as LightningWD
from wd_callbacks.schedules import Steps, Timescale
from wd_callbacks.torch import DecoupledWD
from wd_callbacks.transformers import DecoupledWD as TrainerWD


def still(lr=1e-3, **group):
    return SGD([{"params": [parameter()], **group}], lr=lr)


ABOVE = r"lr exceeds max_lr \(lr 0.00595, max_lr 0.001.* as max_lr$"  # in the second step
BELOW = "lr was at most 0.001, far below max_lr 1"
PLAIN = {  # group, scheduler, arguments, max_lr, the warning in training, that of detach
    "constant": ({}, None, {}, 1e-3, None, None),
    "timm's layer decay": ({"initial_lr": 1e-2, "lr_scale": 0.1}, None, {}, 1e-3, None, None),
    "one cycle": ({}, lambda o: OneCycleLR(o, 0.1, 41), {}, 0.1, None, None),
    "above": ({}, lambda o: CyclicLR(o, 1e-3, 0.1, 20), {}, 1e-3, ABOVE, None),
    "below": ({"initial_lr": 1.0}, None, {}, 1.0, None, BELOW),
    "below, known length": ({"initial_lr": 1.0}, None, {"total_steps": 40}, 1.0, BELOW, None),
    "given": ({}, None, {"max_lr": 1.0}, 1.0, None, None),
}


@pytest.mark.parametrize("case", PLAIN)
def test_a_guess_that_does_not_hold_warns_once(case):
    group, make_scheduler, arguments, max_lr, in_training, at_detach = PLAIN[case]
    optimizer = still(**group)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    decay = DecoupledWD(optimizer, Timescale(steps=1000), **arguments)

    def train():
        for _ in range(40):
            optimizer.step()
            if scheduler:
                scheduler.step()

    for action, pattern in ((train, in_training), (decay.detach, at_detach)):
        _, messages = caught(action)
        assert [bool(re.search(pattern, it)) for it in messages] == [True] * (pattern is not None)
    assert decay.coefficients == pytest.approx([1 / (1000 * max_lr)])


def test_a_rate_set_by_hand_counts_from_where_the_optimizer_was_built():
    optimizer = still()
    decay = DecoupledWD(optimizer, Timescale(steps=1000))
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1) / 20
        optimizer.step()
    assert decay.coefficients == pytest.approx([1 / (1000 * 1e-3)])


def test_a_timescale_that_does_not_follow_lr_has_no_peak_to_warn_of():
    optimizer = still()
    DecoupledWD(optimizer, Timescale(steps=1000), scale_by="none")
    for _ in range(2):
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 2


@pytest.mark.parametrize("lr", [1e3, 1e300, math.inf])
def test_a_refused_step_does_not_count_as_a_rate_that_was_used(lr):  # P9
    optimizer = still(lr=0.1)
    with DecoupledWD(optimizer, 0.1) as decay:
        optimizer.param_groups[0]["lr"] = lr
        with pytest.raises(ValueError, match="shrink"):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        assert decay.describe()[0].highest_lr == 0.1
        state = decay.state_dict()
    DecoupledWD(optimizer, 0.1).load_state_dict(state)


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor])
def test_a_peak_that_lr_has_while_the_coefficient_is_0_counts(kind):
    optimizer = still(lr=1.0)
    schedule = Steps({0: 0, 0.25: 0.1})
    decay = DecoupledWD(optimizer, schedule, scale_by="lr_ratio", total_steps=8)
    for i in range(8):
        optimizer.param_groups[0]["lr"] = kind(1.0 if i < 2 else 0.1)
        optimizer.step()
    assert decay.describe()[0].highest_lr == 1.0


# In frameworks


class Ceiling(LambdaLR):
    max_lrs = (9.9,)  # which lr may never reach, as those of transformers' GreedyLR


def in_sequence(optimizer, first, second):
    return SequentialLR(optimizer, [first, second], [8])


SCHEDULERS = {  # the scheduler of an lr of 1e-3, and its peak
    "ceiling": (lambda o: Ceiling(o, lambda i: min(1, (i + 1) / 8)), 1e-3),
    "cyclic": (lambda o: CyclicLR(o, 1e-3, 0.1, 4), 0.1),
    "then cyclic": (lambda o: in_sequence(o, ConstantLR(o, 1.0), CyclicLR(o, 1e-3, 0.1, 4)), 0.1),
    "one cycle": (lambda o: OneCycleLR(o, 0.1, 16), 0.1),
    "warm-up": (lambda o: in_sequence(o, LinearLR(o, 0.1), CosineAnnealingLR(o, 8)), 1e-3),
}


class Scheduled(StillModule):
    def __init__(self, make):
        super().__init__(lr=1e-3)
        self.make = make

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": self.make(optimizer), "interval": "step"}]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_lightning_and_trainer_know_the_peak_of_their_schedulers(name):
    make, peak = SCHEDULERS[name]
    in_lightning, in_trainer = (cls(Timescale(steps=1000)) for cls in (LightningWD, TrainerWD))
    lightning_trainer(in_lightning, epochs=4).fit(Scheduled(make))
    model = StillNet()
    optimizer = SGD(model.parameters(), lr=1e-3)
    hf_trainer(in_trainer, model=model, epochs=4, optimizers=(optimizer, make(optimizer))).train()
    for decay in (in_lightning, in_trainer):
        assert decay.describe()[0].max_lr == pytest.approx(peak)
        assert decay.describe()[0].highest_lr == pytest.approx(peak, rel=0.5)


@pytest.mark.parametrize("make", [CosineAnnealingLR, CosineAnnealingWarmRestarts])
def test_a_rate_that_lightning_s_search_has_found_moves_the_peak_of_most_schedulers(make):
    decay, model = LightningWD(Timescale(steps=1000)), Scheduled(lambda o: make(o, 16))

    def search(_, trainer, *args):  # as LearningRateFinder does
        trainer.optimizers[0].param_groups[0]["lr"] = 1e-4
        return True

    lightning_trainer(at(LightningCallback, "on_fit_start", search), decay, epochs=4).fit(model)
    peak = 1e-4 if make is CosineAnnealingLR else 1e-3
    assert decay.describe()[0].max_lr == pytest.approx(peak)


def test_fastai_knows_the_peak_of_the_fit():
    schedule = ParamScheduler({"lr": SchedCos(0.3, 0.01)})
    for method, cbs, peak in (("fit_one_cycle", [], 0.1), ("fit", [schedule], 0.3)):
        decay = FastaiWD(Timescale(steps=1000))
        quietly(learner(decay), method, 2, 0.1, cbs=cbs)
        row = decay.describe()[0]
        assert (row.timescale, row.max_lr) == pytest.approx((1000, peak))
        assert not row.is_guess


def test_a_rate_that_a_fastai_callback_raises_warns():
    def raises_lr(callback):
        callback.learn.opt.set_hyper("lr", 0.5)

    raising = at(FastaiCallback, "before_batch", raises_lr, order=0)
    learn = learner(FastaiWD(Timescale(steps=100)), raising)
    with pytest.warns(UserWarning, match=r"lr 0.5, max_lr 0.1, a guess"):
        quietly(learn, "fit", 1, 0.1)
