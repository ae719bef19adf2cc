"""Lightning's hooks, checkpoints and callbacks, and several optimizers in one Trainer."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import INNER_WD, Positions, hooks_of, same, weights
from lightning_helpers import (
    LR,
    WD,
    adam,
    adamw,
    averaging,
    each_way,
    fit,
    half_precision,
    loader,
    model_class,
    one_cycle,
    quiet_trainer,
    split,
    two_adams,
)
from torch.optim import Adam, AdamW

from wd_callbacks.lightning import DecoupledWD

# Several optimizers

EACH = {  # arguments of each callback, and the coefficient of each optimizer
    "one for both": ([{"wd": WD}], WD, WD),
    "a mapping": ([{"wd": {0: 0.1, 1: 0.3}}], 0.1, 0.3),
    "None in it": ([{"wd": {0: 0.1, 1: None}}], 0.1, INNER_WD),
    "two": ([{"wd": {1: 0.2}, "optimizers": 1}, {"wd": [0.4], "optimizers": 0}], 0.4, 0.2),
    "reversed": ([{"wd": {1: 0.2, 0: 0.1}, "optimizers": (1, 0)}], 0.1, 0.2),
}


@pytest.mark.parametrize(("callbacks", "first", "second"), EACH.values(), ids=EACH)
def test_each_optimizer_has_its_own_decay(package, callbacks, first, second):  # P1, P4, P5
    decays = [DecoupledWD(**arguments, quantum=0) for arguments in callbacks]
    ours = fit(package, two_adams, *decays, model={"manual": True})
    theirs = fit(package, split(AdamW, first, second), model={"manual": True})
    assert same(ours, theirs)
    shown = {index: values for decay in decays for index, values in decay.coefficients.items()}
    assert shown == {0: [first], 1: [second]}


def test_the_other_optimizer_is_left_alone(package):  # P3, P5
    def one_of_each(module):
        return [two_adams(module)[0], split(AdamW, 0, 0.2)(module)[1]]

    decay = DecoupledWD(0.2, optimizers=1, quantum=0)
    ours = fit(package, two_adams, decay, model={"manual": True})
    assert same(ours, fit(package, one_of_each, model={"manual": True}))


REFUSED = [  # beside those of test_validation.py
    ({"wd": {0: 0.1, 2: 0.1}}, r"\[0, 2\].*\[0, 1\]"),
    ({"wd": {0: 0.1, 1: [0.1, 0.2]}}, "wd has 2 values.* 1 param"),
    ({"wd": 0.1, "max_lr": [1, 2]}, "max_lr has 2 values"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=str)
def test_refuses_what_does_not_fit_the_optimizers(package, arguments, message):  # P3, P10
    module = model_class(package)(two_adams, manual=True)
    before = weights(module)
    trainer = quiet_trainer(package, DecoupledWD(**arguments), max_epochs=1)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, loader(2))
    assert all(map(torch.equal, before, weights(module)))
    assert [hooks_of(optimizer) for optimizer in trainer.optimizers] == [[], []]


# Other callbacks


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_averaged_weights_are_those_of_adamw(package, name):  # P4
    class Plain(package.Callback):
        """Notes the weights before they are replaced by the averaged ones."""

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weights = weights(pl_module)

    is_ema = name.startswith("EMA")

    def run(make, *callbacks):
        callbacks = [*callbacks, averaging(package, name), plain := Plain()]
        model = fit(package, make, *callbacks, epochs=4, model={"norm": not is_ema})
        return model, plain.weights

    ours, ours_plain = run(adam, DecoupledWD(WD, quantum=0))
    theirs, theirs_plain = run(adamw)
    assert same(ours, theirs)
    assert all(map(torch.equal, ours_plain, theirs_plain))
    assert same(ours_plain, ours) != is_ema


def test_decays_a_backbone_that_is_unfrozen(package, tmp_path):  # P5, P9
    def run(kind, wd, *callbacks, **settings):
        def head_only(module):  # the callback adds the backbone itself
            return kind(module.head.parameters(), lr=LR, weight_decay=wd)

        finetuning = package.callbacks.BackboneFinetuning(1, lambda _: 1.5, should_align=False)
        return fit(package, head_only, *callbacks, finetuning, epochs=3, **settings)

    ours = run(Adam, INNER_WD, DecoupledWD(WD, quantum=0))
    assert same(ours, run(AdamW, WD))
    assert not same(ours, run(AdamW, 0))
    save = package.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    deferring = partial(run, Adam, INNER_WD, DecoupledWD(WD, quantum=0.0035))
    whole = deferring(save, enable_checkpointing=True)
    # Later Lightning freezes the backbone again when it resumes, and trains the head alone.
    assert same(whole, deferring(resume=tmp_path / "epoch=0.ckpt"))


# The optimizer as others see it


def spy_class(package):
    """A callback that notes in each of its hooks what the param groups and their copies hold."""

    class Spy(package.Callback):
        def __init__(self):
            self.notes = []

        def note(self, hook, trainer):
            copies = [it.state_dict() for it in copy.deepcopy(trainer.optimizers)]
            groups = [it.param_groups for it in trainer.optimizers]
            groups += [it["param_groups"] for it in copies]
            seen = [{k: v for k, v in g.items() if k != "params"} for each in groups for g in each]
            self.notes.append((hook, seen))

    def watching(hook):
        return lambda self, trainer, *args, **kwargs: self.note(hook, trainer)

    for hook in dir(package.Callback):
        if hook.startswith("on_"):
            setattr(Spy, hook, watching(hook))
    return Spy


SEEN = {  # settings of the Trainer and of the model
    "automatic": ({}, {}),
    "manual": ({}, {"manual": True}),
    "manual, by closure": ({}, {"manual": True, "by": "closure"}),
    "accumulation": (
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05},
        {"skipped": (0, 3)},
    ),
    "fp16": ({"plugins": half_precision}, {}),
}
SEEN_AT = {
    *("training_step", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
    *("on_train_batch_start", "on_train_batch_end", "on_save_checkpoint", "on_validation_end"),
    "on_train_end",
}


@pytest.mark.parametrize(("settings", "arguments"), SEEN.values(), ids=SEEN)
def test_everybody_sees_the_groups_as_the_user_set_them(package, tmp_path, settings, arguments):
    # P3
    settings = {k: v(package) if callable(v) else v for k, v in settings.items()}

    def run(*decay):
        """With a spy on each side of the decay and one in the model's own hooks."""
        first, last, own = (spy_class(package)() for _ in range(3))

        def watch(hook, module):
            own.note(hook, module.trainer)

        module = model_class(package)(partial(one_cycle, adam), **arguments, watch=watch)
        options = {"enable_checkpointing": True, "default_root_dir": tmp_path, **settings}
        trainer = quiet_trainer(package, first, *decay, last, max_epochs=2, **options)
        trainer.fit(module, loader(6), loader(2))
        assert hooks_of(trainer.optimizers[0]) == []
        return first.notes, last.notes, own.notes

    ours, plain = run(DecoupledWD(lambda progress: 0.1 * progress)), run()
    assert ours == plain
    assert {hook for notes in ours for hook, _ in notes} >= SEEN_AT
    groups = [group for notes in ours for _, groups in notes for group in groups]
    assert {group["weight_decay"] for group in groups} == {INNER_WD}


class BangError(RuntimeError):
    """An exception of the tests' own."""


class Failing(Adam):
    """Its fourth step raises after the gradients are there."""

    def step(self, closure=None):
        self.calls = getattr(self, "calls", 0) + 1
        if closure is not None:
            with torch.enable_grad():
                closure()
        if self.calls == 4:
            raise BangError
        return super().step()


def saver_on_exception(package, path):
    """A ModelCheckpoint since Lightning 2.5.3."""
    try:
        return package.callbacks.ModelCheckpoint(path, save_on_exception=True)
    except TypeError:
        return package.callbacks.OnExceptionCheckpoint(path)


@each_way
@pytest.mark.parametrize(
    "where", ["training_step", "optimizer.step", "on_train_batch_start", "on_before_optimizer_step"]
)
def test_an_exception_leaves_what_the_user_set(package, tmp_path, where, manual):  # P3, P9
    made = []

    def make(module):
        kind = Failing if where == "optimizer.step" else Adam
        made.append(kind(module.parameters(), lr=LR, weight_decay=INNER_WD))
        return made[0]

    class Disturbs(package.Callback):
        def on_exception(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "before_ours.ckpt")

    def bang(self, trainer, *_):
        if trainer.global_step == 3:
            raise BangError

    if where.startswith("on_"):
        setattr(Disturbs, where, bang)
    decay = DecoupledWD(1e-4, quantum=0.5)  # large: all is deferred
    callbacks = [Disturbs(), decay, saver_on_exception(package, tmp_path)]
    model = {"manual": manual, "raises": (3, BangError()) if where == "training_step" else None}
    with pytest.raises(BangError):
        fit(package, make, *callbacks, model=model, enable_checkpointing=True)
    assert made[0].param_groups[0]["weight_decay"] == INNER_WD
    assert hooks_of(made[0]) == []
    saved = list(tmp_path.iterdir())
    assert len(saved) == 2
    for path in saved:
        checkpoint = torch.load(path, weights_only=True)
        (group,) = checkpoint["optimizer_states"][0]["param_groups"]
        assert group["weight_decay"] == INNER_WD
        (owed,) = checkpoint["callbacks"][decay.state_key][0]["owed"]
        steps = 3 + (where == "optimizer.step")  # a step that raises has decayed already
        assert owed == pytest.approx([steps * LR * 1e-4] * 4, rel=1e-6)


# Runs besides the first


def test_does_nothing_outside_fit(package):  # P1, P3
    module = model_class(package)(adam)
    decay = DecoupledWD(WD)
    trainer = quiet_trainer(package, decay)
    before = weights(module)
    trainer.validate(module, loader(2), verbose=False)
    trainer.test(module, loader(2), verbose=False)
    trainer.predict(module, loader(2))
    assert all(map(torch.equal, before, weights(module)))
    assert decay.state_dict() == {}
    assert decay.coefficients == {}


BETWEEN = [  # whether the optimizer stays, and what happens between two fits
    *[(False, "validate"), (True, "validate"), (False, "exception"), (True, "exception")],
    (True, "deepcopy"),
]


@pytest.mark.parametrize(("kept", "between"), BETWEEN)
def test_fit_twice(package, kept, between):  # P3, P4
    def run(make, *callbacks):
        made = []

        def once(module):
            if not (kept and made):
                made.append(make(module))
            return made[-1]

        module = model_class(package)(once)
        trainer = quiet_trainer(package, *callbacks, max_epochs=1)
        trainer.fit(module, loader(6))
        trainer.fit_loop.max_epochs = 2
        if between == "validate":
            trainer.validate(module, loader(2), verbose=False)
        if between == "exception":
            module.raises = (0, BangError())
            with pytest.raises(BangError):
                trainer.fit(module, loader(6))
            module.raises = None
            trainer = quiet_trainer(package, *callbacks, max_epochs=2)
        if between == "deepcopy":
            trainer = quiet_trainer(package, *copy.deepcopy(callbacks), max_epochs=2)
        trainer.fit(module, loader(6))
        return module

    assert same(run(adam, DecoupledWD(WD, quantum=0)), run(adamw))


def test_a_step_before_the_first_batch_is_the_first(package):  # P1, P6
    """As of a manual warm-up, by the torch optimizer itself."""

    class WarmsUp(package.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                pl_module.loss(99).backward()
                trainer.optimizers[0].step()

    def run(make, *callbacks):
        return fit(package, make, *callbacks, WarmsUp(), model={"manual": True})

    assert same(run(adam, DecoupledWD(WD, quantum=0)), run(adamw))
    schedule = Positions()
    run(adam, DecoupledWD(schedule))
    assert schedule.seen[0] == 0
