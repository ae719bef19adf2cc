"""A guessed max_lr: read from where the framework knows it, and checked against what comes."""

import math
import warnings

import numpy as np
import pytest
import torch
from fastai.callback.schedule import ParamScheduler, SchedCos
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

STEPS = 40


def still(**group):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    group = {"params": [p], **group}
    return SGD([group], lr=group.pop("lr", 6e-4))


def run_plain(optimizer, lr=None, scheduler=None, **arguments):
    """The shortest timescale reached, and the warnings."""
    shortest, lrs = math.inf, []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decay = DecoupledWD(optimizer, Timescale(steps=1000), **arguments)
        for i in range(STEPS):
            if lr is not None:
                optimizer.param_groups[0]["lr"] = lr(i)
            lrs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            shortest = min(shortest, 1 / (decay.coefficients[0] * lrs[-1]))
            if scheduler is not None:
                scheduler.step()
        decay.detach()
    return shortest, [str(w.message) for w in caught if "max_lr" in str(w.message)]


def test_a_rate_set_by_hand_counts_from_where_the_optimizer_was_built():
    shortest, said = run_plain(still(), lr=lambda i: 6e-4 * min(1, (i + 1) / 20))
    assert shortest == pytest.approx(1000)
    assert not said


def test_timm_s_layer_decay_counts():
    optimizer = still(lr=1e-4, initial_lr=1e-3, lr_scale=0.1)
    shortest, said = run_plain(optimizer)
    assert shortest == pytest.approx(1000)
    assert not said


def test_one_cycle_in_a_plain_loop_is_known():
    optimizer = still()
    shortest, said = run_plain(optimizer, scheduler=OneCycleLR(optimizer, 0.1, STEPS + 1))
    assert shortest == pytest.approx(1000, rel=1e-2)
    assert not said


def test_a_rate_above_the_guess_warns_once_and_at_once():
    optimizer = still(lr=1e-3)
    shortest, said = run_plain(optimizer, scheduler=CyclicLR(optimizer, 1e-3, 0.1, 20))
    assert shortest < 20
    assert len(said) == 1
    assert "lr exceeds max_lr (lr 0.00595, max_lr 0.001" in said[0]  # the second step's
    assert said[0].endswith("as max_lr")


@pytest.mark.parametrize("arguments", [{}, {"total_steps": STEPS}], ids=["detach", "middle"])
def test_a_rate_far_below_the_guess_warns_once(arguments):
    shortest, said = run_plain(still(lr=1e-3, initial_lr=1.0), **arguments)
    assert shortest == pytest.approx(1e6)
    assert len(said) == 1
    assert "lr was at most 0.001, far below max_lr 1" in said[0]


def test_a_given_max_lr_is_never_doubted_for_being_low():
    optimizer = still(lr=1e-3)
    shortest, said = run_plain(optimizer, max_lr=1.0)
    assert shortest == pytest.approx(1e6)
    assert not said


def test_a_refused_step_does_not_count_as_a_rate_that_was_used():
    optimizer = still(lr=0.1)
    decay = DecoupledWD(optimizer, Timescale(steps=100))
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e3
    with pytest.raises(ValueError, match="shrink"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert decay.describe()[0].highest_lr == 0.1


@pytest.mark.parametrize("lr", [math.inf, 1e300])
def test_a_state_that_is_saved_after_a_refused_step_loads(lr):  # P9
    optimizer = still(lr=0.1)
    decay = DecoupledWD(optimizer, 0.1)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="shrink"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    state = decay.state_dict()
    decay.detach()
    DecoupledWD(optimizer, 0.1).load_state_dict(state)


class Ceiling(LambdaLR):
    max_lrs = (9.9,)  # which lr may never reach, as those of transformers' GreedyLR


SCHEDULERS = {
    "ceiling": lambda o: Ceiling(o, lambda i: min(1, (i + 1) / 8)),
    "cyclic": lambda o: CyclicLR(o, 1e-3, 0.1, 4),
    "cyclic in a sequence": lambda o: SequentialLR(
        o, [ConstantLR(o, 1.0, 2), CyclicLR(o, 1e-3, 0.1, 4)], [2]
    ),
    "one cycle": lambda o: OneCycleLR(o, 0.1, 16),
    "warm-up": lambda o: LinearLR(o, 1e-3, 1.0, 8),
    "lambda": lambda o: LambdaLR(o, lambda i: min(1, (i + 1) / 8)),
    "warm-up in a sequence": lambda o: SequentialLR(
        o, [LinearLR(o, 1e-3, 1.0, 8), CosineAnnealingLR(o, 8)], [8]
    ),
}


class Scheduled(StillModule):
    def __init__(self, make):
        super().__init__(lr=1e-3)
        self.make = make

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": self.make(optimizer), "interval": "step"}]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_lightning_knows_the_peak_of_its_schedulers(name):
    decay, lrs, shortest = LightningWD(Timescale(steps=1000)), [], []

    def before(_, trainer, *args):
        lrs.append(trainer.optimizers[0].param_groups[0]["lr"])

    def after(*args):
        shortest.append(1 / (decay.coefficients[0][0] * lrs[-1]))

    watch = [
        at(LightningCallback, "on_train_batch_start", before),
        at(LightningCallback, "on_train_batch_end", after),
    ]
    lightning_trainer(decay, *watch, epochs=4).fit(Scheduled(SCHEDULERS[name]))
    assert len(shortest) == 16
    assert min(shortest) >= 990


@pytest.mark.parametrize("make", [CosineAnnealingLR, CosineAnnealingWarmRestarts])
def test_a_rate_that_lightning_s_search_has_found_moves_the_peak_of_most_schedulers(make):
    decay, model = LightningWD(Timescale(steps=1000)), Scheduled(lambda o: make(o, 16))

    def search(_, trainer, *args):  # as LearningRateFinder does
        trainer.optimizers[0].param_groups[0]["lr"] = 1e-4
        return True

    lightning_trainer(at(LightningCallback, "on_fit_start", search), decay, epochs=4).fit(model)
    peak = 1e-4 if make is CosineAnnealingLR else 1e-3
    assert decay.describe()[0].max_lr == pytest.approx(peak)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_trainer_knows_the_peak_of_its_scheduler(name):
    decay, model = TrainerWD(Timescale(steps=1000)), StillNet()
    optimizer = SGD(model.parameters(), lr=1e-3)
    trainer = hf_trainer(
        decay, model=model, epochs=4, optimizers=(optimizer, SCHEDULERS[name](optimizer))
    )
    trainer.train()  # without a warning


def test_fastai_knows_the_peak_of_the_fit():
    decay = FastaiWD(Timescale(steps=1000))
    learn = learner(decay)
    quietly(learn, "fit_one_cycle", 2, 0.1)
    assert decay.describe()[0].timescale == pytest.approx(1000)
    assert decay.describe()[0].max_lr == pytest.approx(0.1)
    assert not decay.describe()[0].is_guess


def test_a_rate_that_a_fastai_callback_raises_warns():
    def function(callback):
        callback.learn.opt.set_hyper("lr", 0.5)
        return True

    learn = learner(FastaiWD(Timescale(steps=100)), at(FastaiCallback, "before_batch", function, 0))
    with pytest.warns(UserWarning, match=r"lr 0.5, max_lr 0.1, a guess"):
        quietly(learn, "fit", 1, 0.1)


def test_fastai_s_schedule_of_lr_is_no_guess():
    decay = FastaiWD(Timescale(steps=100))
    learn = learner(decay)
    quietly(learn, "fit", 2, 0.1, cbs=ParamScheduler({"lr": SchedCos(0.3, 0.01)}))
    assert decay.describe()[0].max_lr == pytest.approx(0.3)


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor])
def test_a_peak_that_lr_has_while_the_coefficient_is_0_counts(kind):
    optimizer = still(lr=1.0)
    schedule = Steps({0: 0, 0.25: 0.1})
    decay = DecoupledWD(optimizer, schedule, scale_by="lr_ratio", total_steps=8)
    for i in range(8):
        optimizer.param_groups[0]["lr"] = kind(1.0 if i < 2 else 0.1)
        optimizer.step()  # without a warning
    assert decay.describe()[0].highest_lr == 1.0


def test_a_timescale_that_does_not_follow_lr_has_no_peak_to_warn_of():
    _, said = run_plain(still(lr=1e-3), lr=lambda i: 1e-3 * (i + 1), scale_by="none")
    assert not said
