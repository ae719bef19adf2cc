"""Optimizers that are replaced during a run, steps that others make, and shared callbacks."""

import functools
import math

import pytest
import torch
from fastai.callback.core import CancelBatchException, CancelStepException
from fastai.optimizer import SGD as FastaiSGD
from fastai.optimizer import OptimWrapper
from helpers import hooks_of, zero_gradients
from still import (
    BATCHES,
    OWN,
    Factor,
    FastaiCallback,
    LightningCallback,
    StillModule,
    StillNet,
    TrainerCallback,
    at,
    hf_trainer,
    learner,
    lightning_trainer,
    quietly,
    sgd,
)
from torch.optim.optimizer import _global_optimizer_pre_hooks

from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.lightning import DecoupledWD as LightningWD
from wd_callbacks.schedules import Linear
from wd_callbacks.transformers import DecoupledWD as TrainerWD

WRAPPED = functools.partial(OptimWrapper, opt=torch.optim.SGD)

# Runs of three epochs with a learning rate of 0.1. Each returns the factor of the first weight.


def fit_lightning(*callbacks, model=None, epochs=3):
    model = model or StillModule()
    factor = Factor(model)
    lightning_trainer(*callbacks, epochs=epochs).fit(model)
    return factor()


def fit_fastai(learn, *cbs, epochs=3):
    factor = Factor(learn.model)
    quietly(learn, "fit", epochs, 0.1, cbs=list(cbs))
    return factor()


def fit_trainer(*callbacks, model=None, epochs=3, **settings):
    trainer = hf_trainer(*callbacks, model=model, epochs=epochs, **settings)
    factor = Factor(trainer.model)
    trainer.train()
    return factor()


def factor_of(coefficients):
    return pytest.approx(math.prod(1 - 0.1 * wd for wd in coefficients), rel=1e-5)


def line(steps):
    """The coefficients of ``Linear(1, 0)``."""
    return [1 - step / steps for step in range(steps)]


ALL = factor_of([1.0] * 3 * BATCHES)


def lightning_other(hook, action, epoch=1):
    """A callback that calls ``action`` with the Trainer, at the first ``hook`` of an epoch."""

    def function(_, trainer, *args, **kwargs):
        is_due = trainer.current_epoch == epoch
        if is_due:
            action(trainer)
        return is_due

    return at(LightningCallback, hook, function)


def fastai_other(hook, action, epoch=1):
    """A callback that calls ``action`` with the Learner, at the first ``hook`` of an epoch."""

    def function(callback):
        is_due = callback.epoch == epoch
        if is_due:
            action(callback.learn)
        return is_due

    return at(FastaiCallback, hook, function, order=0)


def step(model, optimizer):
    """A step that changes the weights by weight decay alone."""
    zero_gradients(model)
    optimizer.step()
    optimizer.zero_grad()


# Lightning


def set_up_again(trainer):
    trainer.strategy.setup_optimizers(trainer)


def assign(trainer):
    trainer.strategy.optimizers = [sgd(trainer.lightning_module.parameters())]


@pytest.mark.parametrize("replace", [set_up_again, assign])
@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"]
)
def test_a_new_lightning_optimizer_decays_from_its_first_step(hook, is_first, replace):  # P1, P3
    def action(trainer):
        old.extend(trainer.optimizers)
        replace(trainer)

    old = []
    other, decay = lightning_other(hook, action), LightningWD(1.0)
    assert fit_lightning(*([other, decay] if is_first else [decay, other])) == ALL
    assert not _global_optimizer_pre_hooks
    assert hooks_of(*old) == []


def one(model):
    return [sgd(model.parameters())]


def two(model):
    return [sgd([model.layer.weight]), sgd([model.layer.bias])]


def two_reversed(model):
    return model.trainer.optimizers[::-1]


def two_with_a_new_second(model):
    return [model.trainer.optimizers[0], two(model)[1]]


class Manual(StillModule):
    """Steps its optimizers itself, from the second epoch on those that ``after`` returns."""

    def __init__(self, before, after):
        super().__init__()
        self.automatic_optimization = False
        self.before, self.after = before, after

    def configure_optimizers(self):
        return self.before(self)

    def training_step(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 0:
            self.trainer.strategy.optimizers = self.after(self)
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            step(self, optimizer)


@pytest.mark.parametrize("after", [two_reversed, two_with_a_new_second])
def test_optimizers_that_a_step_replaces_before_it_steps_them_decay_at_once(after):  # P1, P5
    assert fit_lightning(LightningWD(1.0), model=Manual(two, after)) == ALL


@pytest.mark.parametrize(("before", "after"), [(two, one), (one, two)])
def test_another_number_of_optimizers_is_refused(before, after):  # P10
    with pytest.raises(ValueError, match="optimizers and had"):
        fit_lightning(LightningWD(1.0), model=Manual(before, after))


def test_a_replacement_keeps_schedule_steps_and_what_is_deferred():  # P1, P6, P8
    decay, seen, saved = LightningWD(Linear(1e-8, 0)), [], []
    other = lightning_other("on_train_epoch_start", set_up_again)
    note = at(
        LightningCallback, "on_train_batch_end", lambda *args: seen.extend(decay.coefficients[0])
    )
    end = at(LightningCallback, "on_train_end", lambda *args: saved.append(decay.state_dict()[0]))
    fit_lightning(other, decay, note, end, epochs=2)
    assert seen == pytest.approx([1e-8 * wd for wd in line(8)])
    assert saved[0]["steps"] == 8
    assert saved[0]["owed"][0][0] == pytest.approx(0.1 * 1e-8 * sum(line(8)))
    assert saved[0]["due"] == [pytest.approx(0.1 * 1e-8 * sum(line(8)))]


# fastai


def new_optimizer(learn):
    learn.create_opt()


def new_inner_optimizer(learn):
    learn.opt.opt = sgd(learn.model.parameters())


@pytest.mark.parametrize(
    ("opt_func", "replace"), [(FastaiSGD, new_optimizer), (WRAPPED, new_inner_optimizer)]
)
@pytest.mark.parametrize("hook", ["before_epoch", "before_batch", "before_step", "after_step"])
def test_a_new_fastai_optimizer_decays_from_its_first_step(hook, opt_func, replace):  # P1, P3
    learn = learner(FastaiWD(1.0), opt_func=opt_func)
    assert fit_fastai(learn, fastai_other(hook, replace)) == ALL
    assert "step" not in vars(learn.opt)
    if opt_func is WRAPPED:
        assert not learn.opt.opt._optimizer_step_pre_hooks


@pytest.mark.parametrize("opt_func", [FastaiSGD, WRAPPED], ids=["fastai's", "torch's"])
@pytest.mark.parametrize(
    ("hook", "cancel"),
    [("after_pred", CancelBatchException), ("before_step", CancelStepException)],
)
def test_a_step_that_a_fastai_callback_makes_decays(hook, cancel, opt_func):  # P1
    def function(callback):
        if callback.training:
            step(callback.model, getattr(callback.opt, "opt", callback.opt))
            raise cancel

    other = at(FastaiCallback, hook, function, times=99)
    learn = learner(FastaiWD(0.5), other, opt_func=opt_func)
    assert fit_fastai(learn, epochs=1) == factor_of([0.5] * 4)


# Hugging Face's Trainer


@pytest.mark.parametrize("hook", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
def test_a_new_optimizer_of_a_trainer_decays_from_its_first_step(hook):  # P1, P3
    def function(_, args, state, control, **kwargs):
        if state.global_step == 4:
            trainer.optimizer = sgd(trainer.model.parameters())
        return state.global_step == 4

    trainer = hf_trainer(TrainerWD(1.0), at(TrainerCallback, hook, function), epochs=3)
    factor = Factor(trainer.model)
    trainer.train()
    assert factor() == ALL
    assert not _global_optimizer_pre_hooks


def test_a_step_that_a_trainer_callback_makes_decays():  # P1
    def function(_, args, state, control, optimizer=None, model=None, **kwargs):
        step(model, optimizer)
        return True

    other = at(TrainerCallback, "on_step_end", function, times=99)
    assert fit_trainer(TrainerWD(0.5), other, epochs=1) == factor_of([0.5] * 8)


# max_lr


def test_max_lr_is_read_once_also_where_the_optimizer_is_replaced():  # P9
    def lightning_at_a_lower_lr(trainer):
        set_up_again(trainer)
        trainer.optimizers[0].param_groups[0]["lr"] = 0.01

    def fastai_at_a_lower_lr(learn):
        learn.create_opt()
        learn.opt.set_hyper("lr", 0.01)

    # 0.1 * lr / 0.1: 0.1 for eight steps, then 0.01 for four
    expected = pytest.approx(0.9**8 * 0.99**4, rel=1e-5)
    other = lightning_other("on_train_epoch_start", lightning_at_a_lower_lr, epoch=2)
    assert fit_lightning(other, LightningWD(0.1, scale_by="lr_ratio")) == expected
    other = fastai_other("before_epoch", fastai_at_a_lower_lr, epoch=2)
    assert fit_fastai(learner(FastaiWD(0.1, scale_by="lr_ratio")), other) == expected


# Shared callbacks

RUNS = {
    "Lightning": (LightningWD, fit_lightning),
    "fastai": (FastaiWD, lambda decay, epochs: fit_fastai(learner(), decay, epochs=epochs)),
    "Trainer": (TrainerWD, fit_trainer),
}


@pytest.mark.parametrize(("adapter", "fit"), RUNS.values(), ids=RUNS)
def test_runs_by_turns_share_a_callback(adapter, fit):  # P6
    decay = adapter(Linear(1, 0))
    assert [fit(decay, epochs=1) for _ in range(3)] == [factor_of(line(4))] * 3


@pytest.mark.parametrize("method", ["validate", "test", "predict", "fit"])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_batch_start"])
def test_what_another_lightning_trainer_does_meanwhile_leaves_a_fit_alone(hook, method):  # P1, P10
    def use_another(_):
        other = lightning_trainer(decay, epochs=1)
        if method == "fit":
            with pytest.raises(ValueError, match="another Trainer"):
                other.fit(StillModule())
        else:
            getattr(other, method)(StillModule())

    decay = LightningWD(Linear(1, 0))
    assert fit_lightning(decay, lightning_other(hook, use_another, epoch=0)) == factor_of(line(12))


@pytest.mark.parametrize("hook", ["on_train_begin", "on_step_begin", "on_step_end"])
def test_a_train_inside_a_train_is_refused(hook):  # P6, P10
    def function(*args, **kwargs):
        with pytest.raises(ValueError, match="another Trainer"):
            fit_trainer(decay, epochs=1)
        return True

    decay = TrainerWD(Linear(1, 0))
    assert fit_trainer(decay, at(TrainerCallback, hook, function)) == factor_of(line(12))


def test_a_fastai_fit_inside_a_fit_with_the_same_callback_is_refused():  # P10
    decay, inner = FastaiWD(1.0), []
    other = fastai_other("before_epoch", lambda _: inner.append(fit_fastai(learner(), decay)))
    with pytest.raises(ValueError, match="build one per Learner"):
        fit_fastai(learner(decay), other)
    assert inner == [ALL]


def test_a_callback_of_two_learners_is_refused_in_the_first():  # P10
    decay = FastaiWD(1.0)
    first, second = learner(decay), learner(decay)
    assert fit_fastai(second) == ALL
    with pytest.raises(ValueError, match="another Learner"):
        fit_fastai(first)


# A run that ends by an exception leaves no decay behind


def stop(*args, **kwargs):
    raise RuntimeError("stop")


def interrupted_lightning():
    model = StillModule()
    end = at(LightningCallback, "on_train_batch_end", stop)
    trainer = lightning_trainer(LightningWD(1.0), end)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(model)
    return model, trainer.optimizers[0]


def interrupted_fastai():
    learn = learner(FastaiWD(1.0), at(FastaiCallback, "after_batch", stop))
    with pytest.raises(RuntimeError, match="stop"):
        fit_fastai(learn)
    return learn.model, learn.opt


def interrupted_trainer():
    model = StillNet()
    optimizer = sgd(model.parameters())
    callbacks = TrainerWD(1.0), at(TrainerCallback, "on_step_end", stop)
    with pytest.raises(RuntimeError, match="stop"):
        fit_trainer(*callbacks, model=model, optimizers=(optimizer, None))
    return model, optimizer


@pytest.mark.parametrize(
    "interrupted", [interrupted_lightning, interrupted_fastai, interrupted_trainer]
)
def test_an_interrupted_run_leaves_no_decay_behind(interrupted):  # P3
    model, optimizer = interrupted()
    factor = Factor(model)
    step(model, optimizer)
    assert factor() == factor_of([OWN])


def run_again_in_fastai(opt_func, *cbs):
    learn = learner(opt_func=opt_func)
    with pytest.raises(RuntimeError, match="stop"):
        fit_fastai(learn, FastaiWD(1.0), at(FastaiCallback, "after_batch", stop))
    return fit_fastai(learn, *cbs)


def run_again_in_a_trainer(*callbacks):
    model, optimizer = interrupted_trainer()
    return fit_trainer(*callbacks, model=model, optimizers=(optimizer, None))


AGAIN = {
    "fastai": (functools.partial(run_again_in_fastai, FastaiSGD), FastaiWD),
    "torch's in fastai": (functools.partial(run_again_in_fastai, WRAPPED), FastaiWD),
    "Trainer": (run_again_in_a_trainer, TrainerWD),
}


@pytest.mark.parametrize(("run_again", "adapter"), AGAIN.values(), ids=AGAIN)
def test_a_run_after_an_interrupted_one_decays_as_it_asks(run_again, adapter):  # P1, P3, P10
    assert run_again(adapter(0.5)) == factor_of([0.5] * 12)
    assert run_again() == factor_of([OWN] * 12)
