"""Searches for a learning rate or a batch size, which save and restore around their own steps."""

from functools import partial

import pytest
import torch
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import SGD, OptimWrapper
from fastai_helpers import learner, still_learner
from helpers import weights
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from still import LightningCallback, StillModule, at, lightning_trainer
from torch.utils.data import DataLoader

from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.lightning import DecoupledWD as LightningWD
from wd_callbacks.schedules import Linear, Timescale

WRAPPED = partial(OptimWrapper, opt=torch.optim.SGD)
SEARCHED = {  # arguments, and the Learner's optimizer and callbacks
    "schedule": ({"wd": Linear(0.5, 0)}, SGD, []),
    "initial": ({"wd": 0.5, "anchor": "initial"}, SGD, []),
    "accumulating": ({"wd": 0.5, "cautious": True}, SGD, [GradientAccumulation(2)]),
    "wrapper": ({"wd": None}, WRAPPED, []),
    "wrapper, timescale": ({"wd": Timescale(steps=1000)}, WRAPPED, []),
    "ratio": ({"wd": 0.01, "scale_by": "lr_ratio"}, SGD, []),
}


@pytest.mark.parametrize("case", SEARCHED)
def test_lr_find_of_fastai_ends_and_restores(case, tmp_path):  # P10
    arguments, opt_func, cbs = SEARCHED[case]
    decay = FastaiWD(**arguments)
    learn = learner(opt_func, batches=20, wd=0.37, cbs=[decay, *cbs], path=tmp_path)
    start = weights(learn.model)
    learn.lr_find(show_plot=False, stop_div=False)
    assert all(map(torch.equal, start, learn.model.parameters()))
    assert "step" not in vars(learn.opt)
    assert len(learn.recorder.lrs) > 80  # up to a learning rate of at least 0.5


def test_a_fit_after_lr_find_is_as_without(tmp_path):  # P6, P8
    learn = still_learner(batches=4, cbs=FastaiWD(Linear(1, 0)), path=tmp_path, wd=0.37)
    learn.lr_find(show_plot=False)
    learn.fit(1, 0.1)
    expected = torch.full((4, 4), 0.9 * 0.925 * 0.95 * 0.975).double()
    torch.testing.assert_close(weights(learn.model)[0], expected)


class Searched(StillModule):
    def __init__(self):
        super().__init__(batches=60)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch) ** 2).mean()


class InSecondEpoch:
    """Base of a finder that searches there, and not before training."""

    def on_fit_start(self, *args):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            before = weights(pl_module)
            self.search(trainer, pl_module)
            assert all(map(torch.equal, before, pl_module.parameters()))


class RateInSecondEpoch(InSecondEpoch, LearningRateFinder):
    search = LearningRateFinder.lr_find


class SizeInSecondEpoch(InSecondEpoch, BatchSizeFinder):
    search = BatchSizeFinder.scale_batch_size


@pytest.mark.parametrize(("wd", "accumulate"), [(5.0, 1), (Linear(5, 1), 2)], ids=str)
def test_a_learning_rate_finder_in_mid_fit_ends_and_restores(wd, accumulate):  # P10
    decay = LightningWD(wd)
    finder = RateInSecondEpoch(max_lr=1.0, early_stop_threshold=None, num_training_steps=50)
    trainer = lightning_trainer(decay, finder, epochs=3, accumulate_grad_batches=accumulate)
    steps = []
    note = at(LightningCallback, "on_train_end", lambda *_: steps.append(decay.state_dict()[0]))
    trainer.callbacks.append(note)
    trainer.fit(Searched())
    assert finder.optimal_lr is not None
    assert trainer.global_step == steps[0]["steps"] == 180 // accumulate


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_tuner_restores_and_the_fit_goes_on_as_without(accumulate):  # P10
    decay, model = LightningWD(5.0), Searched()
    trainer = lightning_trainer(decay, epochs=1, accumulate_grad_batches=accumulate)
    start = weights(model)
    Tuner(trainer).lr_find(model, max_lr=1.0, early_stop_threshold=None, num_training=50)
    assert all(map(torch.equal, start, model.parameters()))
    trainer.fit(model)
    assert decay.coefficients == {0: [5.0]}


class Sized(StillModule):
    def __init__(self):
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self):
        return DataLoader(torch.ones(16, 4), batch_size=self.batch_size)


@pytest.mark.parametrize(("mode", "accumulate"), [("power", 1), ("binsearch", 2)])
def test_a_batch_size_finder_in_mid_fit_leaves_progress_in_its_epoch(mode, accumulate):  # P6
    decay, model, seen = LightningWD(Linear(1, 0)), Sized(), []

    def note(*args):
        seen.extend((model.current_epoch, coefficient) for coefficient in decay.coefficients[0])

    finder = SizeInSecondEpoch(mode=mode, max_trials=2, steps_per_trial=2)
    model.on_train_batch_end = note  # callbacks are set aside during the search
    # With validation Lightning itself ends the fit after the search.
    settings = {"accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    lightning_trainer(decay, finder, epochs=3, **settings).fit(model)
    assert {epoch for epoch, _ in seen} == {0, 1, 2}
    for epoch, coefficient in seen:
        # A window of accumulation shows the step before it, in batches of up to eight.
        assert 1 - (epoch + 1) / 3 < coefficient <= 1 - epoch / 3 + (accumulate - 1) / 6
    coefficients = [coefficient for _, coefficient in seen]
    assert coefficients == sorted(coefficients, reverse=True)
    assert min(coefficients) > 0.01
