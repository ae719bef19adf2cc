"""Lightning's hooks, checkpoints and callbacks, and several optimizers in one Trainer."""

from __future__ import annotations

import copy
import signal
from functools import partial

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from helpers import INNER_WD, Positions, hooks_of, same, weights
from lightning_helpers import (
    LR,
    WD,
    adam,
    adamw,
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

each_way = pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])


def optimizer_of(model):
    """The torch optimizer of a model that was trained."""
    return model.trainer.optimizers[0]


def test_is_a_callback_of_both_packages():
    for package in (pytorch_lightning, lightning.pytorch):
        assert isinstance(DecoupledWD(0.1), package.Callback)


# Several optimizers, and groups that come later


@pytest.mark.parametrize(
    ("callbacks", "first", "second"),
    [
        ([{"wd": WD}], WD, WD),
        ([{"wd": {0: 0.1, 1: 0.3}}], 0.1, 0.3),
        ([{"wd": {0: 0.1, 1: None}}], 0.1, INNER_WD),
        ([{"wd": 0.2, "optimizers": 0}, {"wd": 0.1, "optimizers": [1]}], 0.2, 0.1),
        ([{"wd": {1: 0.2}, "optimizers": 1}, {"wd": [0.4], "optimizers": 0}], 0.4, 0.2),
        ([{"wd": {1: 0.2, 0: 0.1}, "optimizers": (1, 0)}], 0.1, 0.2),
    ],
)
def test_each_optimizer_has_its_own_decay(package, callbacks, first, second):  # P1, P4, P5
    decays = [DecoupledWD(**arguments, quantum=0) for arguments in callbacks]
    ours = fit(package, two_adams, *decays, model={"manual": True})
    theirs = fit(package, split(AdamW, first, second), model={"manual": True})
    assert same(ours, theirs)
    shown = {index: values for decay in decays for index, values in decay.coefficients.items()}
    assert shown == {0: [first], 1: [second]}


def test_the_other_optimizer_is_left_alone(package):  # P3, P5
    ours = fit(
        package, two_adams, DecoupledWD(0.2, optimizers=1, quantum=0), model={"manual": True}
    )

    def one_of_each(module):
        coupled, _ = two_adams(module)
        _, decoupled = split(AdamW, 0, 0.2)(module)
        return coupled, decoupled

    assert same(ours, fit(package, one_of_each, model={"manual": True}))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([{"optimizers": 2}], r"\(2,\).* 2 optimizers"),
        ([{"optimizers": (0, 5)}], r"\(0, 5\).* 2 optimizers"),
        ([{"wd": {0: 0.1}}], r"\[0\].*\[0, 1\]"),
        ([{"wd": {0: 0.1, 2: 0.1}}], r"\[0, 2\].*\[0, 1\]"),
        ([{"wd": {0: 0.1, 1: 0.1}, "optimizers": 1}], r"\[0, 1\].*\[1\]"),
        ([{"wd": 0.1}, {"wd": 0.1, "optimizers": 1}], "DecoupledWD"),
        ([{"wd": 0.1, "optimizers": 1}, {"wd": 0.1}], "DecoupledWD"),
        ([{"wd": {0: 0.1, 1: [0.1, 0.2]}}], "wd has 2 values.* 1 param"),
        ([{"wd": 0.1, "max_lr": [1, 2]}], "max_lr has 2 values"),
    ],
)
def test_refuses_what_does_not_fit_the_optimizers(package, callbacks, message):  # P3, P10
    module = model_class(package)(two_adams, manual=True)
    before = weights(module)
    decays = [DecoupledWD(**{"wd": 0.1} | arguments) for arguments in callbacks]
    trainer = quiet_trainer(package, *decays, max_epochs=1)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, loader(2))
    assert all(map(torch.equal, before, weights(module)))
    assert [hooks_of(optimizer) for optimizer in trainer.optimizers] == [[], []]


def test_a_group_added_during_training_decays(package):  # P5
    class Adds(package.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                group = {"params": list(pl_module.head.parameters()), "lr": 2 * LR}
                trainer.optimizers[0].add_param_group(group)

    def make(kind, wd):
        return lambda module: kind(module.backbone.parameters(), lr=LR, weight_decay=wd)

    ours = fit(package, make(Adam, INNER_WD), DecoupledWD(WD, quantum=0), Adds(), epochs=3)
    assert same(ours, fit(package, make(AdamW, WD), Adds(), epochs=3))
    assert not same(ours, fit(package, make(AdamW, 0), Adds(), epochs=3))


# Other callbacks


def averager(package, name):
    """A callback that averages the weights."""
    if not hasattr(package.callbacks, name):
        pytest.skip(f"this {package.__name__} has no {name}")
    return getattr(package.callbacks, name)


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_averaged_weights_are_those_of_adamw(package, name):  # P4
    class Plain(package.Callback):
        """Notes the weights before they are replaced by the averaged ones."""

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weights = weights(pl_module)

    def run(make, *callbacks):
        ema = name.startswith("EMA")
        arguments = {"decay": 0.8} if ema else {"swa_lrs": LR, "swa_epoch_start": 2}
        plain, averaging = Plain(), averager(package, name)(**arguments)
        model = fit(package, make, *callbacks, averaging, plain, epochs=4, model={"norm": not ema})
        return model, plain.weights

    ours, ours_plain = run(adam, DecoupledWD(WD, quantum=0))
    theirs, theirs_plain = run(adamw)
    assert same(ours, theirs)
    assert all(map(torch.equal, ours_plain, theirs_plain))
    assert same(ours_plain, ours) == (not name.startswith("EMA"))


def finetuning(package):
    return package.callbacks.BackboneFinetuning(1, lambda epoch: 1.5, should_align=False)


def head_only(make, wd):
    """What BackboneFinetuning expects: it adds the backbone itself."""
    return lambda module: make(module.head.parameters(), lr=LR, weight_decay=wd)


def test_decays_a_backbone_that_is_unfrozen(package, tmp_path):  # P5, P9
    def run(make, *callbacks, **settings):
        return fit(package, make, *callbacks, finetuning(package), epochs=3, **settings)

    def deferring(*callbacks, **settings):
        decay = DecoupledWD(WD, quantum=0.0035)
        return run(head_only(Adam, INNER_WD), decay, *callbacks, **settings)

    ours = run(head_only(Adam, INNER_WD), DecoupledWD(WD, quantum=0))
    assert same(ours, run(head_only(AdamW, WD)))
    assert not same(ours, run(head_only(AdamW, 0)))
    save = package.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = deferring(save, enable_checkpointing=True)
    # Later Lightning freezes the backbone again when it resumes, and trains the head alone.
    assert same(whole, deferring(resume=tmp_path / "epoch=0.ckpt"))


# The optimizer as others see it


def spy_class(package):
    """A callback that notes in each of its hooks what the param groups hold besides ``params``."""

    def note(self, hook, trainer):
        if self.copies:
            optimizers = copy.deepcopy(trainer.optimizers)
            groups = [group for opt in optimizers for group in opt.state_dict()["param_groups"]]
        else:
            groups = [group for opt in trainer.optimizers for group in opt.param_groups]
        seen = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self.notes.append((hook, copy.deepcopy(seen)))

    def watching(hook):
        return lambda self, trainer, pl_module, *args, **kwargs: note(self, hook, trainer)

    def init(self, name, copies=False):
        self.name, self.copies, self.notes = name, copies, []

    hooks = [name for name in dir(package.Callback) if name.startswith("on_")]
    body = {hook: watching(hook) for hook in hooks}
    body["see"] = lambda self, hook, module: note(self, hook, module.trainer)
    return type("Spy", (package.Callback,), {"__init__": init, **body})


def watched(package, decay, *, make=adam, model=None, copies=False, **settings):
    """Trains with a spy on each side of ``decay`` and one in the model's own hooks."""
    spies = [spy_class(package)(name, copies) for name in ("before", "after", "model")]
    module = model_class(package)(make, **model or {}, watch=spies[2].see)
    trainer = quiet_trainer(
        package, spies[0], *decay, spies[1], **{"max_epochs": 2, "log_every_n_steps": 1} | settings
    )
    trainer.fit(module, loader(6), loader(2))
    trainer.validate(module, loader(2), verbose=False)
    return [spy.notes for spy in spies]


SEEN = {
    # settings of the Trainer and the model, whether copies are looked at
    "automatic": ({}, {}),
    "manual": ({}, {"manual": True}),
    "manual, by closure": ({}, {"manual": True, "by": "closure"}),
    "accumulation": ({"accumulate_grad_batches": 4}, {}),
    "clipped norm": ({"gradient_clip_val": 0.05}, {}),
    "skipped batches": ({}, {"skipped": (0, 3)}),
    "one cycle": ({}, {}),
    "fp16": ({}, {}),
}


@pytest.mark.parametrize(
    ("name", "copies"),
    [*((name, False) for name in SEEN), ("automatic", True), ("manual", True), ("fp16", True)],
)
def test_everybody_sees_the_groups_as_the_user_set_them(package, tmp_path, name, copies):  # P3
    def run(*decay):
        settings, model = SEEN[name]
        if name == "fp16":
            settings = {"plugins": half_precision(package)}
        return watched(
            package,
            decay,
            make=partial(one_cycle, adam) if name == "one cycle" else adam,
            model=model,
            copies=copies,
            enable_checkpointing=True,
            default_root_dir=tmp_path,
            **settings,
        )

    ours, plain = run(DecoupledWD(lambda progress: 0.1 * progress)), run()
    assert ours == plain
    hooks = {hook for notes in ours for hook, _ in notes}
    assert hooks >= {
        "training_step",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_save_checkpoint",
        "on_validation_end",
        "on_train_end",
    } - ({"on_before_zero_grad"} if name.startswith("manual") else set())
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


def raising(package, hook):
    def bang(self, trainer, *_):
        if trainer.global_step == 3:
            raise BangError

    return type("Raises", (package.Callback,), {hook: bang})()


def saver_on_exception(package, path):
    """A ModelCheckpoint since Lightning 2.5.3."""
    try:
        return package.callbacks.ModelCheckpoint(path, save_on_exception=True)
    except TypeError:
        return package.callbacks.OnExceptionCheckpoint(path)


@pytest.mark.parametrize("order", ["saved first", "decayed first"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize(
    "where",
    ["training_step", "optimizer.step", "on_train_batch_start", "on_before_optimizer_step"],
)
def test_an_exception_leaves_what_the_user_set(package, tmp_path, where, manual, order):  # P3, P9
    made = []

    def make(module):
        kind = Failing if where == "optimizer.step" else Adam
        made.append(kind(module.parameters(), lr=LR, weight_decay=INNER_WD))
        return made[0]

    decay = DecoupledWD(1e-4, quantum=0.5)  # large: all is deferred

    class Saves(package.Callback):
        """As ModelCheckpoint, which Lightning puts after all others."""

        def on_exception(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "first.ckpt")

    if order == "saved first":
        callbacks = [Saves(), decay]
    else:
        callbacks = [decay, saver_on_exception(package, tmp_path)]
    if where.startswith("on_"):
        callbacks.insert(1, raising(package, where))
    model = {"manual": manual, "raises": (3, BangError()) if where == "training_step" else None}
    with pytest.raises(BangError):
        fit(package, make, *callbacks, model=model, enable_checkpointing=True)
    assert made[0].param_groups[0]["weight_decay"] == INNER_WD
    assert hooks_of(made[0]) == []
    (path,) = tmp_path.iterdir()
    checkpoint = torch.load(path, weights_only=True)
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert group["weight_decay"] == INNER_WD
    state = checkpoint["callbacks"][decay.state_key][0]
    steps = 3 + (where == "optimizer.step")  # a step that raises has decayed already
    deferred = [it for group in state["owed"] for it in group]
    assert deferred == pytest.approx([steps * LR * 1e-4] * 4, rel=1e-6)


def test_an_interrupt_leaves_what_the_user_set(package):  # P3
    handler = signal.getsignal(signal.SIGINT)
    made = []

    def make(module):
        made.append(Failing(module.parameters(), lr=LR, weight_decay=INNER_WD))
        return made[0]

    try:
        with pytest.raises(SystemExit):
            fit(package, make, DecoupledWD(WD), model={"raises": (3, KeyboardInterrupt())})
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    assert made[0].param_groups[0]["weight_decay"] == INNER_WD
    assert hooks_of(made[0]) == []


@each_way
def test_no_hooks_stay_on_the_optimizer(package, manual):  # P3
    seen = []
    watch = {"watch": lambda hook, module: seen.append(len(hooks_of(module.trainer.optimizers[0])))}
    model = fit(package, adam, DecoupledWD(WD), model={"manual": manual, **watch})
    assert min(seen) > 0
    assert hooks_of(optimizer_of(model)) == []


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


@pytest.mark.parametrize("kept", [False, True], ids=["new optimizer", "same optimizer"])
@pytest.mark.parametrize("between", [None, "validate", "exception", "deepcopy"])
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
        if between == "validate":
            trainer.validate(module, loader(2), verbose=False)
        if between == "exception":
            module.raises = (0, BangError())
            trainer.fit_loop.max_epochs = 2
            with pytest.raises(BangError):
                trainer.fit(module, loader(6))
            module.raises = None
            trainer = quiet_trainer(package, *callbacks, max_epochs=2)
        if between == "deepcopy":
            trainer = quiet_trainer(package, *copy.deepcopy(callbacks), max_epochs=2)
        trainer.fit_loop.max_epochs = 2
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


# Refusals


@pytest.mark.parametrize(
    "optimizers",
    [-1, (0, -1), [], (), (0, 0), [1, 0, 1], "0", "", True, [False], [None], [0.0], 1.5, float],
    ids=repr,
)
def test_refuses_such_optimizers(optimizers):  # P10
    with pytest.raises((TypeError, ValueError), match=r"^optimizers "):
        DecoupledWD(0.1, optimizers=optimizers)


@each_way
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wd": lambda p: 0.1 - p}, r"progress 0\.1.* -0\.0"),
        ({"wd": lambda p: float("nan") if p else 0.1}, r"progress 0\.08\d*.* nan"),
        ({"wd": 100.0}, r"group 0.*lr 0\.01.*wd 100"),
        ({"wd": 1.0, "scale_by": "none"}, "group 0"),
    ],
)
def test_refuses_a_nonsensical_step_before_touching_a_weight(
    package, arguments, message, manual
):  # P3, P10
    class Notes(package.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.weights = weights(pl_module)

    notes, made = Notes(), []

    def make(module):
        made.append(module)
        return adam(module)

    with pytest.raises(ValueError, match=message):
        fit(package, make, DecoupledWD(**arguments), notes, model={"manual": manual})
    assert all(map(torch.equal, notes.weights, weights(made[0])))
    optimizer = optimizer_of(made[0])
    assert hooks_of(optimizer) == []
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD


def test_refuses_an_unknown_max_lr_before_training(package):  # P3, P10
    module = model_class(package)(partial(adam, lr=0.0))
    trainer = quiet_trainer(package, DecoupledWD(0.1, scale_by="lr_ratio"), max_epochs=1)
    with pytest.raises(ValueError, match="max_lr"):
        trainer.fit(module, loader(2))
    assert hooks_of(optimizer_of(module)) == []


def test_two_of_a_kind_are_refused(package):  # P10
    with pytest.raises((RuntimeError, ValueError), match="DecoupledWD"):
        fit(package, adam, DecoupledWD(0.1), DecoupledWD(0.2))
