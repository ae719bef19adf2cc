"""Optimizers that are replaced during a run, steps that others make, and shared callbacks."""

import functools

import pytest
import torch
from fastai.callback.core import CancelBatchException, CancelStepException
from fastai.optimizer import SGD as FastaiSGD
from fastai.optimizer import OptimWrapper
from still import (
    BATCHES,
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

ALL = 0.9 ** (3 * BATCHES)  # lr 0.1, wd 1, three epochs


# Lightning


def set_up_again(trainer):
    trainer.strategy.setup_optimizers(trainer)


def assign(trainer):
    trainer.strategy.optimizers = [sgd(trainer.lightning_module.parameters())]


LIGHTNING_HOOKS = [
    "on_train_epoch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
]


PLACES = [("on_train_batch_start", "before"), ("on_train_batch_start", "after")]
PLACES += [(hook, "module") for hook in LIGHTNING_HOOKS]


@pytest.mark.parametrize("replace", [set_up_again, assign])
@pytest.mark.parametrize(("hook", "place"), PLACES)
def test_a_new_lightning_optimizer_decays_from_its_first_step(hook, place, replace):  # P1, P3
    def function(_, trainer, *args, **kwargs):
        if trainer.current_epoch == 1:
            replace(trainer)
        return trainer.current_epoch == 1

    other, decay = at(LightningCallback, hook, function), LightningWD(1.0)
    callbacks = {"before": [other, decay], "after": [decay, other], "module": [decay]}[place]
    model = StillModule()
    if place == "module":
        setattr(model, hook, lambda *args, **kwargs: getattr(other, hook)(model.trainer))
    factor = Factor(model)
    lightning_trainer(*callbacks, epochs=3).fit(model)
    assert factor() == pytest.approx(ALL, rel=1e-5)
    assert not _global_optimizer_pre_hooks


class Manual(StillModule):
    """Steps its optimizers itself; ``change`` is called in the second epoch."""

    def __init__(self, optimizers, change):
        super().__init__()
        self.automatic_optimization = False
        self.make, self.change, self.is_changed = optimizers, change, False

    def configure_optimizers(self):
        return self.make(self)

    def training_step(self, batch, batch_idx):
        if self.current_epoch == 1 and not self.is_changed:
            self.is_changed = True
            self.change(self)
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch).sum() * 0)
            optimizer.step()


def one(model):
    return [sgd(model.parameters())]


def two(model):
    return [sgd([model.layer.weight]), sgd([model.layer.bias])]


CHANGES = {
    "fewer": (two, lambda model: one(model)),
    "more": (one, lambda model: two(model)[::-1]),
    "in another order": (two, lambda model: model.trainer.optimizers[::-1]),
    "the second of two": (two, lambda model: [model.trainer.optimizers[0], two(model)[1]]),
}


@pytest.mark.parametrize("change", ["the second of two", "in another order"])
def test_optimizers_that_a_step_replaces_before_it_steps_them_decay_at_once(change):  # P1
    make, new = CHANGES[change]
    model = Manual(make, lambda model: setattr(model.trainer.strategy, "optimizers", new(model)))
    factor = Factor(model)
    lightning_trainer(LightningWD(1.0), epochs=3).fit(model)
    assert factor() == pytest.approx(ALL, rel=1e-5)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_list_of_optimizers_decays_or_is_refused(change):  # P5, P10
    make, new = CHANGES[change]
    model = Manual(make, lambda model: None)

    def function(_, trainer, module):
        if trainer.current_epoch == 1:
            trainer.strategy.optimizers = new(module)
        return trainer.current_epoch == 1

    factor = Factor(model)
    other = at(LightningCallback, "on_train_epoch_start", function)
    try:
        lightning_trainer(other, LightningWD(1.0), epochs=3).fit(model)
    except ValueError as error:
        assert "optimizers" in str(error)
    else:
        assert factor() == pytest.approx(ALL, rel=1e-5)


def test_a_replacement_keeps_schedule_steps_and_what_is_deferred():  # P1, P6, P8
    seen = []

    def again(_, trainer, *args):
        if trainer.current_epoch == 1:
            set_up_again(trainer)
        return trainer.current_epoch == 1

    def note(*args):
        seen.extend(decay.coefficients[0])

    decay = LightningWD(Linear(1e-8, 0))
    other = at(LightningCallback, "on_train_epoch_start", again)
    rec = at(LightningCallback, "on_train_batch_end", note)
    saved = []
    end = at(LightningCallback, "on_train_end", lambda *args: saved.append(decay.state_dict()[0]))
    lightning_trainer(other, decay, rec, end, epochs=2).fit(StillModule())
    assert seen == pytest.approx([1e-8 * (1 - i / 8) for i in range(8)])
    assert saved[0]["steps"] == 8
    assert saved[0]["owed"][0][0] == pytest.approx(4.5e-9)  # 0.1 * 1e-8 * (8 + 7 + ... + 1) / 8
    assert saved[0]["due"] == [pytest.approx(4.5e-9)]


def ratio_after_replacement_lightning():
    def function(_, trainer, module):
        if trainer.current_epoch == 2:
            set_up_again(trainer)
            trainer.optimizers[0].param_groups[0]["lr"] = 0.01
        return trainer.current_epoch == 2

    model = StillModule()
    factor = Factor(model)
    other = at(LightningCallback, "on_train_epoch_start", function)
    lightning_trainer(other, LightningWD(0.1, scale_by="lr_ratio"), epochs=4).fit(model)
    return factor()


def ratio_after_replacement_fastai():
    def function(callback):
        if callback.epoch == 2:
            callback.learn.create_opt()
            callback.learn.opt.set_hyper("lr", 0.01)
        return callback.epoch == 2

    learn = learner(
        FastaiWD(0.1, scale_by="lr_ratio"), at(FastaiCallback, "before_epoch", function)
    )
    factor = Factor(learn.model)
    quietly(learn, "fit", 4, 0.1)
    return factor()


RATIOS = [
    ratio_after_replacement_lightning,
    ratio_after_replacement_fastai,
]


@pytest.mark.parametrize("run", RATIOS)
def test_max_lr_is_read_once_also_where_the_optimizer_is_replaced(run):  # P9
    # 0.1 * lr / 0.1: 0.1 for eight steps, then 0.01 for eight
    assert run() == pytest.approx(0.9**8 * 0.99**8, rel=1e-5)


# fastai

FASTAI_HOOKS = [
    "before_epoch",
    "before_train",
    "before_batch",
    "after_pred",
    "after_loss",
    "before_backward",
    "after_backward",
    "before_step",
    "after_step",
    "after_batch",
    "after_train",
]


@pytest.mark.parametrize("order", [0])
@pytest.mark.parametrize("hook", FASTAI_HOOKS)
def test_a_new_fastai_optimizer_decays_from_its_first_step(hook, order):  # P1, P3
    def function(callback):
        if callback.epoch == 1 and callback.training:
            callback.learn.create_opt()
        return callback.epoch == 1 and callback.training

    learn = learner(FastaiWD(1.0), at(FastaiCallback, hook, function, order))
    factor = Factor(learn.model)
    quietly(learn, "fit", 3, 0.1)
    assert factor() == pytest.approx(ALL, rel=1e-5)
    assert "step" not in vars(learn.opt)


WRAPPED = functools.partial(OptimWrapper, opt=torch.optim.SGD)


@pytest.mark.parametrize("hook", ["before_epoch", "before_batch", "after_backward"])
def test_a_new_torch_optimizer_inside_a_fastai_one_decays_from_its_first_step(hook):  # P1, P3
    def function(callback):
        if callback.epoch == 1 and callback.training:
            callback.learn.opt.opt = sgd(callback.learn.model.parameters())
        return callback.epoch == 1 and callback.training

    learn = learner(FastaiWD(1.0), at(FastaiCallback, hook, function), opt_func=WRAPPED)
    factor = Factor(learn.model)
    quietly(learn, "fit", 3, 0.1)
    assert factor() == pytest.approx(ALL, rel=1e-5)
    assert not learn.opt.opt._optimizer_step_pre_hooks


def step(callback):
    for p in callback.learn.model.parameters():
        p.grad = torch.zeros_like(p)
    callback.learn.opt.step()
    callback.learn.opt.zero_grad()


def step_inside(callback):
    for p in callback.learn.model.parameters():
        p.grad = torch.zeros_like(p)
    callback.learn.opt.opt.step()
    callback.learn.opt.zero_grad()


@pytest.mark.parametrize("order", [0, 100])
@pytest.mark.parametrize(
    ("hook", "cancel"),
    [
        ("before_batch", CancelBatchException),
        ("after_pred", CancelBatchException),
        ("after_backward", CancelBatchException),
        ("before_step", CancelBatchException),
        ("before_step", CancelStepException),
    ],
)
@pytest.mark.parametrize("make", [step, step_inside])
def test_a_step_that_a_fastai_callback_makes_decays(hook, cancel, order, make):  # P1
    def function(callback):
        if not callback.training:
            return
        make(callback)
        raise cancel

    other = at(FastaiCallback, hook, function, order, times=99)
    options = {"opt_func": WRAPPED} if make is step_inside else {}
    learn = learner(FastaiWD(0.5), other, **options)
    factor = Factor(learn.model)
    quietly(learn, "fit", 1, 0.1)
    assert factor() == pytest.approx(0.95**4, rel=1e-5)


# Hugging Face's Trainer

TRAINER_HOOKS = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]


@pytest.mark.parametrize("knows", [True, False], ids=["told", "untold"])
@pytest.mark.parametrize("hook", TRAINER_HOOKS)
def test_a_new_optimizer_of_a_trainer_decays_from_its_first_step(hook, knows):  # P1, P3
    def function(_, args, state, control, **kwargs):
        if state.global_step == 4:
            trainer.optimizer = sgd(trainer.model.parameters())
            if knows:
                trainer.callback_handler.optimizer = trainer.optimizer
        return state.global_step == 4

    trainer = hf_trainer(TrainerWD(1.0), at(TrainerCallback, hook, function), epochs=3)
    factor = Factor(trainer.model)
    trainer.train()
    assert factor() == pytest.approx(ALL, rel=1e-5)


def test_a_step_that_a_trainer_callback_makes_decays():  # P1
    def function(_, args, state, control, optimizer=None, model=None, **kwargs):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return True

    other = at(TrainerCallback, "on_step_end", function, times=99)
    trainer = hf_trainer(TrainerWD(0.5), other, epochs=1)
    factor = Factor(trainer.model)
    trainer.train()
    assert factor() == pytest.approx(0.95**8, rel=1e-5)


# Shared callbacks: right, or refused in one sentence


def turn_lightning(decay):
    model = StillModule()
    factor = Factor(model)
    lightning_trainer(decay, epochs=1).fit(model)
    return factor()


def turn_fastai(decay):
    learn = learner()
    factor = Factor(learn.model)
    quietly(learn, "fit", 1, 0.1, cbs=decay)
    return factor()


def turn_trainer(decay):
    trainer = hf_trainer(decay, epochs=1)
    factor = Factor(trainer.model)
    trainer.train()
    return factor()


TURNS = [(LightningWD, turn_lightning), (FastaiWD, turn_fastai), (TrainerWD, turn_trainer)]


@pytest.mark.parametrize(("adapter", "turn"), TURNS, ids=["Lightning", "fastai", "Trainer"])
def test_runs_by_turns_share_a_callback(adapter, turn):  # P6
    decay = adapter(Linear(1, 0))
    assert [turn(decay) for _ in range(3)] == pytest.approx([0.9 * 0.925 * 0.95 * 0.975] * 3)


LIGHTNING_NESTED = [
    "on_fit_start",
    "on_sanity_check_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_epoch_end",
    "on_train_epoch_end",
]
RIGHT = 0.9 * 0.9125 * 0.925 * 0.9375 * 0.95 * 0.9625 * 0.975 * 0.9875  # Linear(1, 0), two epochs


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("hook", LIGHTNING_NESTED)
def test_a_fit_inside_a_lightning_fit_is_right_or_refused(hook, place):  # P6, P10
    decay, inner = LightningWD(Linear(1, 0)), []

    def function(*args):
        with torch.enable_grad(), torch.inference_mode(False):
            inner.append(turn_lightning(decay))
        return True

    model = StillModule()
    factor = Factor(model)
    other = at(LightningCallback, hook, function)
    callbacks = [other, decay] if place == "before" else [decay, other]
    try:
        lightning_trainer(*callbacks).fit(model)
    except ValueError as error:
        assert "another Trainer" in str(error)
    else:
        assert inner == pytest.approx([0.9 * 0.925 * 0.95 * 0.975])
        assert factor() == pytest.approx(RIGHT)


@pytest.mark.parametrize("method", ["validate", "test", "predict", "fit"])
def test_what_another_lightning_trainer_does_meanwhile_leaves_a_fit_alone(method):  # P1
    decay = LightningWD(1.0)

    def function(_, trainer, *args):
        if trainer.current_epoch != 1:
            return False
        try:
            getattr(lightning_trainer(decay, epochs=1), method)(StillModule())
        except ValueError:
            assert method == "fit"
        return True

    model = StillModule()
    factor = Factor(model)
    lightning_trainer(decay, at(LightningCallback, "on_train_epoch_start", function), epochs=3).fit(
        model
    )
    assert factor() == pytest.approx(ALL, rel=1e-5)


def test_a_fastai_fit_inside_a_fit_with_the_same_callback_is_refused():  # P10
    decay, inner = FastaiWD(1.0), []

    def function(callback):
        inner.append(turn_fastai(decay))
        return True

    learn = learner(decay, at(FastaiCallback, "before_epoch", function))
    with pytest.raises(ValueError, match="build one per Learner"):
        quietly(learn, "fit", 2, 0.1)
    assert inner == pytest.approx([0.9**4])


def test_a_callback_of_two_learners_is_right_or_refused():  # P10
    decay = FastaiWD(1.0)
    first, second = learner(decay), learner(decay)
    for learn in (second, first):
        factor = Factor(learn.model)
        try:
            quietly(learn, "fit", 1, 0.1)
        except ValueError as error:
            assert "another Learner" in str(error)
        else:
            assert factor() == pytest.approx(0.9**4)


@pytest.mark.parametrize(
    "hook", ["on_train_begin", "on_step_begin", "on_pre_optimizer_step", "on_step_end"]
)
@pytest.mark.parametrize("arguments", [{}, {"anchor": "initial"}], ids=["", "anchor"])
def test_a_train_inside_a_train_is_right_or_refused(hook, arguments):  # P6, P10, P15
    class Moving(StillNet):
        def forward(self, x, labels=None):
            return {"loss": self.layer.weight.sum(), "logits": x}

    def run(is_nested):
        torch.manual_seed(0)
        decay = TrainerWD(1.0, **arguments)

        def function(_, args, state, control, **kwargs):
            if is_nested and (state.global_step == 2 or hook == "on_train_begin"):
                hf_trainer(decay, epochs=1).train()
                return True
            return False

        trainer = hf_trainer(decay, at(TrainerCallback, hook, function), model=Moving())
        trainer.train()
        return trainer.model.layer.weight.detach()

    alone = run(False)
    try:
        nested = run(True)
    except ValueError as error:
        assert "another Trainer" in str(error)
    else:
        torch.testing.assert_close(nested, alone)


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
        quietly(learn, "fit", 1, 0.1)
    return learn.model, learn.opt


def interrupted_trainer():
    trainer = hf_trainer(TrainerWD(1.0), at(TrainerCallback, "on_step_end", stop))
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    return trainer.model, trainer.optimizer


INTERRUPTED = [interrupted_lightning, interrupted_fastai, interrupted_trainer]


@pytest.mark.parametrize("run", INTERRUPTED)
def test_an_interrupted_run_leaves_no_decay_behind(run):  # P3
    model, optimizer = run()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    factor = Factor(model)
    optimizer.step()
    assert factor() == pytest.approx(1 - 0.1 * 0.37)  # its own weight decay, and no other


def again_fastai(opt_func):
    def run(next_one):
        first = [FastaiWD(1.0), at(FastaiCallback, "after_batch", stop)]
        learn = learner(*first, opt_func=opt_func)
        with pytest.raises(RuntimeError, match="stop"):
            quietly(learn, "fit", 1, 0.1)
        learn.remove_cbs(first)
        factor = Factor(learn.model)
        quietly(learn, "fit", 1, 0.1, cbs=FastaiWD(next_one) if next_one else None)
        return factor()

    return run


def again_trainer(next_one):
    model = StillNet()
    pair = sgd(model.parameters()), None
    first = hf_trainer(
        TrainerWD(1.0), at(TrainerCallback, "on_step_end", stop), model=model, optimizers=pair
    )
    with pytest.raises(RuntimeError, match="stop"):
        first.train()
    factor = Factor(model)
    callbacks = [TrainerWD(next_one)] if next_one else []
    hf_trainer(*callbacks, model=model, epochs=1, optimizers=pair).train()
    return factor()


AGAIN = {
    "fastai": again_fastai(FastaiSGD),
    "torch's in fastai": again_fastai(WRAPPED),
    "Trainer": again_trainer,
}


@pytest.mark.parametrize("name", AGAIN)
@pytest.mark.parametrize("next_one", [0.5, None])
def test_a_run_after_an_interrupted_one_decays_as_it_asks(name, next_one):  # P1, P3, P10
    step = 1 - 0.1 * (next_one or 0.37)  # without a callback the optimizer's own weight decay
    assert AGAIN[name](next_one) == pytest.approx(step**4, rel=1e-5)
