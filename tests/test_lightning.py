"""The Lightning callback in real Trainers, against AdamW, hand-written loops and closed forms."""

from __future__ import annotations

import copy
import pickle
import re
import signal
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from lightning_models import (
    IMPORTANT,
    PACKAGES,
    Endless,
    batch_of,
    fit,
    loader,
    model_class,
    network,
    quiet_trainer,
    same,
    turns_class,
    weights,
)
from reference.loops import decay_by_hand
from torch.nn.functional import mse_loss
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from wd_callbacks.lightning import DecoupledWD

# The warnings of Lightning and torch, by their text: ours must not get lost among them.
FOREIGN = (
    ".*does not have many workers",
    ".*but have no `val_dataloader`",
    r".*isinstance\(treespec, LeafSpec\)",
    ".*`training_step` returned `None`",
    ".*that ended before the epoch ended and your dataloader is not resumable",
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
    "Using ModelCheckpoint with manual optimization and every_n_train_steps",
    "Checkpoint directory .* exists and is not empty",
    r".*call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`",
    "You are using `torch.load` with `weights_only=False`",  # before torch 2.6
)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in FOREIGN]

LR, WD = 0.01, 0.1


@pytest.fixture(params=PACKAGES, ids=lambda package: package.__name__)
def package(request):
    return request.param


def adam(module, **settings):
    """The optimizer to decay. Its own weight decay would change every bit if it were used."""
    return Adam(module.parameters(), **{"lr": LR, "weight_decay": IMPORTANT} | settings)


def adamw(module, **settings):
    """The oracle."""
    return AdamW(module.parameters(), **{"lr": LR, "weight_decay": WD} | settings)


def inner(model):
    """The torch optimizer of a model that was trained."""
    return model.trainer.optimizers[0]


def hooks_of(optimizer):
    return [
        hook
        for name, hooks in vars(optimizer).items()
        if name.endswith("_hooks")
        for hook in hooks.values()
    ]


# P4: bit for bit


def one_cycle(make, module, steps=12):
    optimizer = make(module)
    scheduler = OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
    return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def half_precision(package, init_scale):
    """fp16 with a scaler on the CPU. The first gradients overflow where the scale is large."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, backoff_factor=2.0**-10)
    return package.plugins.MixedPrecision("16-mixed", "cpu", scaler)


SETTINGS = {
    "automatic": {},
    "manual": {"model": {"manual": True}},
    "manual, steps=3": {"model": {"manual": True, "steps": 3}},
    "manual, every=2": {"model": {"manual": True, "every": 2}},
    "manual, by closure": {"model": {"manual": True, "by": "closure"}},
    "manual, by the raw optimizer": {"model": {"manual": True, "by": "raw"}},
    "accumulation": {"batches": 8, "accumulate_grad_batches": 4},
    "accumulation, shorter last window": {"batches": 10, "accumulate_grad_batches": 4},
    "clipped norm": {"gradient_clip_val": 0.05},
    "clipped values": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-mixed, manual": {"precision": "bf16-mixed", "model": {"manual": True}},
    "64-true": {"precision": "64-true"},
    "skipped batches": {"model": {"skipped": (0, 3)}},
    "skipped batches, accumulation": {
        "model": {"skipped": (0, 2, 7)},
        "batches": 8,
        "accumulate_grad_batches": 2,
    },
}
KINDS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "tensor lr": {"lr": torch.tensor(LR), "foreach": False},
}


def assert_equals_adamw(package, run, kind, *, make=lambda optimizer: optimizer, quantum=0):
    """Trains with AdamW, with our decay, and without any: the first two end with the same bits."""
    decay = DecoupledWD(WD, quantum=quantum)
    ours = fit(package, make(partial(adam, **kind)), decay, **run())
    oracle = fit(package, make(partial(adamw, **kind)), **run())
    undecayed = fit(package, make(partial(adamw, **kind, weight_decay=0)), **run())
    assert same(ours, oracle)
    assert not same(ours, undecayed)
    return ours


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_adamw(package, name):  # P1, P3, P4
    assert_equals_adamw(package, lambda: SETTINGS[name], {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["automatic", "manual", "skipped batches"])
def test_equals_adamw_in_every_implementation(package, name, kind):  # P4, P5
    assert_equals_adamw(package, lambda: SETTINGS[name], KINDS[kind])


@pytest.mark.parametrize("kind", ["for-loop", "foreach", "fused"])
def test_equals_adamw_by_default_where_the_shrink_is_large(package, kind):  # P4
    assert_equals_adamw(package, dict, KINDS[kind], quantum=None)


@pytest.mark.parametrize("kind", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_an_overflow_decays_nothing(package, manual, kind):  # P1, P4
    def run():
        return {"plugins": half_precision(package, 2.0**40), "model": {"manual": manual}}

    ours = assert_equals_adamw(package, run, KINDS[kind])
    state = inner(ours).state[ours.head.weight]
    assert 0 < state["step"] < 12  # some of the twelve steps did overflow


@pytest.mark.parametrize("kind", ["for-loop", "foreach", "fused"])
def test_equals_adamw_under_one_cycle(package, kind):  # P4
    assert_equals_adamw(package, dict, KINDS[kind], make=lambda make: partial(one_cycle, make))


def averager(package, name):
    """A callback that averages the weights."""
    if not hasattr(package.callbacks, name):
        pytest.skip(f"this {package.__name__} has no {name}")
    return getattr(package.callbacks, name)


def test_decays_the_averaged_weights_as_adamw_does(package):  # P4
    class Plain(package.Callback):
        """Notes the weights before they are replaced by the averaged ones."""

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weights = weights(pl_module)

    def run(make, *callbacks):
        plain = Plain()
        ema = averager(package, "EMAWeightAveraging")(decay=0.8)
        return fit(package, make, *callbacks, ema, plain), plain.weights

    ours, ours_plain = run(adam, DecoupledWD(WD, quantum=0))
    theirs, theirs_plain = run(adamw)
    assert same(ours, theirs)
    assert all(map(torch.equal, ours_plain, theirs_plain))
    assert not all(map(torch.equal, ours_plain, weights(ours)))


def test_lbfgs_decays_once_per_step(package):  # P1, P5
    settings = {"lr": 0.1, "max_iter": 4}
    calls = []
    ours = fit(
        package,
        lambda module: torch.optim.LBFGS(module.parameters(), **settings),
        DecoupledWD(WD, quantum=0),
        model={"watch": lambda hook, _: calls.append(hook)},
    )
    net = network()
    optimizer = torch.optim.LBFGS(net.parameters(), **settings)
    for epoch, index in ((e, i) for e in range(2) for i in range(6)):
        evaluations = []

        def closure(epoch=epoch, index=index, evaluations=evaluations):
            optimizer.zero_grad()
            x, y = batch_of(epoch, index)
            loss = mse_loss(net(x), y)
            loss.backward()
            if not evaluations:
                decay_by_hand(optimizer.param_groups, WD)
            evaluations.append(loss)
            return loss

        optimizer.step(closure)
    assert same(ours, net)
    assert calls.count("training_step") > 2 * 12  # else the closure was evaluated once per step


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_sgd_equals_the_hand_written_loop(package, manual):  # P1, P4
    make = partial(SGD, lr=LR, momentum=0.9)
    ours = fit(
        package,
        lambda module: make(module.parameters(), weight_decay=IMPORTANT),
        DecoupledWD(WD, quantum=0),
        model={"manual": manual},
    )
    net = network()
    optimizer = make(net.parameters())
    for epoch, index in ((e, i) for e in range(2) for i in range(6)):
        optimizer.zero_grad()
        x, y = batch_of(epoch, index)
        mse_loss(net(x), y).backward()
        decay_by_hand(optimizer.param_groups, WD)
        optimizer.step()
    assert same(ours, net)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_without_wd_each_group_s_own_decays_and_may_be_changed(package, manual):  # P3, P4
    class Changes(package.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.05 * (batch_idx + 1)

    groups = {"weight_decay": 0.2}
    ours, theirs = (
        fit(package, make, Changes(), *callbacks, model={"manual": manual})
        for make, callbacks in (
            (partial(adam, **groups), [DecoupledWD(quantum=0)]),
            (partial(adamw, **groups), []),
        )
    )
    assert same(ours, theirs)
    assert inner(ours).param_groups[0]["weight_decay"] == 0.05 * 6


def test_equals_adamw_where_the_weights_are_bf16(package):  # P4
    """As a loop: torch's multi-tensor call would round ``1 - lr * wd`` to bf16 on the CPU."""
    wd = 1.0  # by less, AdamW decays nothing there

    def run(make, *callbacks):
        return fit(package, partial(make, foreach=False), *callbacks, precision="bf16-true")

    ours = run(adam, DecoupledWD(wd, quantum=0))
    assert ours.head.weight.dtype == torch.bfloat16
    assert same(ours, run(partial(adamw, weight_decay=wd)))
    assert not same(ours, run(partial(adamw, weight_decay=0)))


# P5: several optimizers, and groups that come later


def split(make, first, second):
    """Two optimizers, one for each layer."""

    def optimizers(module):
        return [
            make(module.backbone.parameters(), lr=LR, weight_decay=first),
            make(module.head.parameters(), lr=LR / 2, weight_decay=second),
        ]

    return optimizers


BOTH = split(Adam, IMPORTANT, IMPORTANT)


@pytest.mark.parametrize(
    ("callbacks", "first", "second"),
    [
        ([{"wd": WD}], WD, WD),
        ([{"wd": {0: 0.1, 1: 0.3}}], 0.1, 0.3),
        ([{"wd": {0: 0.1, 1: None}}], 0.1, IMPORTANT),
        ([{"wd": 0.2, "optimizers": 0}, {"wd": 0.1, "optimizers": [1]}], 0.2, 0.1),
        ([{"wd": {1: 0.2}, "optimizers": 1}, {"wd": [0.4], "optimizers": 0}], 0.4, 0.2),
        ([{"wd": {1: 0.2, 0: 0.1}, "optimizers": (1, 0)}], 0.1, 0.2),
    ],
)
def test_each_optimizer_has_its_own_decay(package, callbacks, first, second):  # P1, P4, P5
    decays = [DecoupledWD(**arguments, quantum=0) for arguments in callbacks]
    ours = fit(package, BOTH, *decays, model={"manual": True})
    theirs = fit(package, split(AdamW, first, second), model={"manual": True})
    assert same(ours, theirs)
    shown = {index: values for decay in decays for index, values in decay.coefficients.items()}
    assert shown == {0: [first], 1: [second]}


def test_the_other_optimizer_is_left_alone(package):  # P3, P5
    ours = fit(package, BOTH, DecoupledWD(0.2, optimizers=1, quantum=0), model={"manual": True})

    def one_of_each(module):
        coupled, _ = BOTH(module)
        _, decoupled = split(AdamW, 0, 0.2)(module)
        return coupled, decoupled

    assert same(ours, fit(package, one_of_each, model={"manual": True}))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([{"optimizers": 2}], r"optimizers=\(2,\).* has 2 optimizers"),
        ([{"optimizers": (0, 5)}], r"optimizers=\(0, 5\).* has 2 optimizers"),
        ([{"wd": {0: 0.1}}], r"entries for the optimizers \[0\], expected .*\[0, 1\]"),
        ([{"wd": {0: 0.1, 2: 0.1}}], r"\[0, 2\], expected .*\[0, 1\]"),
        ([{"wd": {0: 0.1, 1: 0.1}, "optimizers": 1}], r"\[0, 1\], expected .*\[1\]"),
        ([{"wd": 0.1}, {"wd": 0.1, "optimizers": 1}], "has a DecoupledWD attached already"),
        ([{"wd": 0.1, "optimizers": 1}, {"wd": 0.1}], "has a DecoupledWD attached already"),
        ([{"wd": {0: 0.1, 1: [0.1, 0.2]}}], "wd has 2 values, but the optimizer has 1 param"),
        ([{"wd": 0.1, "max_lr": [1, 2]}], "max_lr has 2 values"),
    ],
)
def test_refuses_what_does_not_fit_the_optimizers(package, callbacks, message):  # P3, P10
    module = model_class(package)(BOTH, manual=True)
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

    ours = fit(package, make(Adam, IMPORTANT), DecoupledWD(WD, quantum=0), Adds(), epochs=3)
    assert same(ours, fit(package, make(AdamW, WD), Adds(), epochs=3))
    assert not same(ours, fit(package, make(AdamW, 0), Adds(), epochs=3))


# P3: the optimizer as everybody else sees it


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


@pytest.mark.parametrize(
    ("name", "copies"),
    [
        ("automatic", False),
        ("automatic", True),
        ("manual", False),
        ("manual", True),
        ("manual, by closure", False),
        ("accumulation", False),
        ("clipped norm", False),
        ("skipped batches", False),
        ("one cycle", False),
        ("fp16", False),
        ("fp16", True),
    ],
)
def test_everybody_sees_the_groups_as_the_user_set_them(package, tmp_path, name, copies):  # P3
    def run(*decay):
        settings = {k: v for k, v in SETTINGS.get(name, {}).items() if k != "batches"}
        if name == "fp16":
            settings["plugins"] = half_precision(package, 2.0**40)
        return watched(
            package,
            decay,
            make=partial(one_cycle, adam) if name == "one cycle" else adam,
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
    assert {group["weight_decay"] for group in groups} == {IMPORTANT}


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_checkpoints_hold_what_the_user_set(package, tmp_path, manual):  # P3
    class Saves(package.Callback):
        """Saves in the middle of a step as well."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.save(trainer)

        def on_train_batch_end(self, trainer, *_):
            self.save(trainer)

        def save(self, trainer):
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}.ckpt"
            trainer.save_checkpoint(path)

    fit(package, adam, Saves(), DecoupledWD(WD), Saves(), model={"manual": manual}, epochs=1)
    paths = list(tmp_path.iterdir())
    assert len(paths) == 4 * 6
    saved = [torch.load(path, weights_only=True)["optimizer_states"][0] for path in paths]
    assert {state["param_groups"][0]["weight_decay"] for state in saved} == {IMPORTANT}


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
        made.append(kind(module.parameters(), lr=LR, weight_decay=IMPORTANT))
        return made[0]

    decay = DecoupledWD(1e-4, quantum=0.5)  # large: all is owed

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
    assert made[0].param_groups[0]["weight_decay"] == IMPORTANT
    assert hooks_of(made[0]) == []
    (path,) = tmp_path.iterdir()
    checkpoint = torch.load(path, weights_only=True)
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert group["weight_decay"] == IMPORTANT
    state = checkpoint["callbacks"][decay.state_key][0]
    steps = 3 + (where == "optimizer.step")  # a step that raises has decayed already
    owed = [debt for debts in state["owed"] for debt in debts]
    assert owed == pytest.approx([steps * LR * 1e-4] * 4, rel=1e-6)


def test_an_interrupt_leaves_what_the_user_set(package):  # P3
    handler = signal.getsignal(signal.SIGINT)
    made = []

    def make(module):
        made.append(Failing(module.parameters(), lr=LR, weight_decay=IMPORTANT))
        return made[0]

    try:
        with pytest.raises(SystemExit):
            fit(package, make, DecoupledWD(WD), model={"raises": (3, KeyboardInterrupt())})
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    assert made[0].param_groups[0]["weight_decay"] == IMPORTANT
    assert hooks_of(made[0]) == []


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_no_hooks_stay_on_the_optimizer(package, manual):  # P3
    seen = []
    watch = {"watch": lambda hook, module: seen.append(len(hooks_of(module.trainer.optimizers[0])))}
    model = fit(package, adam, DecoupledWD(WD), model={"manual": manual, **watch})
    assert min(seen) > 0
    assert hooks_of(inner(model)) == []


# P6: where in the run a step is made


def positions(package, *callbacks, make=adam, **settings):
    """The progress at which the schedule was asked, step by step."""
    seen = []

    def schedule(progress):
        seen.append(progress)
        return 0.0

    fit(package, make, DecoupledWD(schedule), *callbacks, **settings)
    return seen


def evenly(steps, of=None):
    return [step / (of or steps) for step in range(steps)]


PROGRESS = {
    "plain": ({}, evenly(12)),
    "accumulation": (
        {"batches": 64, "epochs": 1, "accumulate_grad_batches": 4},
        evenly(16),
    ),
    "accumulation, shorter last window": (
        {"batches": 10, "accumulate_grad_batches": 4},
        [0, 4 / 20, 8 / 20, 10 / 20, 14 / 20, 18 / 20],
    ),
    "limit_train_batches": ({"batches": 20, "limit_train_batches": 5}, evenly(10)),
    "limit_train_batches, a fraction": ({"batches": 20, "limit_train_batches": 0.25}, evenly(10)),
    "max_steps alone": ({"epochs": None, "max_steps": 15}, evenly(15)),
    "max_steps first": ({"epochs": 10, "max_steps": 15}, evenly(15)),
    "max_epochs first": ({"epochs": 2, "max_steps": 1000}, evenly(12)),
    "max_steps and accumulation": (
        {"batches": 10, "epochs": None, "max_steps": 5, "accumulate_grad_batches": 4},
        [0, 4 / 18, 8 / 18, 10 / 18, 14 / 18],
    ),
    "max_steps at the end of an epoch": (
        {"batches": 10, "epochs": None, "max_steps": 6, "accumulate_grad_batches": 4},
        [0, 4 / 20, 8 / 20, 10 / 20, 14 / 20, 18 / 20],
    ),
    "manual": ({"model": {"manual": True}}, evenly(12)),
    "manual, 5 steps per batch": (
        {"model": {"manual": True, "steps": 5}},
        [batch / 12 for batch in range(12) for _ in range(5)],
    ),
    "manual, accumulation": (
        {"model": {"manual": True, "every": 3}},
        evenly(4),
    ),
    "manual, by the raw optimizer": (
        {"model": {"manual": True, "by": "raw", "steps": 2}},
        [batch / 12 for batch in range(12) for _ in range(2)],
    ),
    "manual, max_steps": (
        {"model": {"manual": True}, "epochs": None, "max_steps": 15},
        evenly(15),
    ),
    "manual, 5 steps per batch, max_steps": (
        {"model": {"manual": True, "steps": 5}, "epochs": None, "max_steps": 50},
        [batch / 10 for batch in range(10) for _ in range(5)],
    ),
    "manual, max_epochs first": (
        {"model": {"manual": True, "steps": 2}, "epochs": 1, "max_steps": 1000},
        [batch / 6 for batch in range(6) for _ in range(2)],
    ),
    "an iterable without a length, max_steps": (
        {"batches": Endless(), "epochs": None, "max_steps": 9},
        evenly(9),
    ),
    "an iterable without a length, manual, max_steps": (
        {"batches": Endless(), "epochs": None, "max_steps": 9, "model": {"manual": True}},
        evenly(9),
    ),
    "an iterable without a length, limit_train_batches": (
        {"batches": Endless(), "limit_train_batches": 4},
        evenly(8),
    ),
    "a batch that is skipped was an attempt": (
        {"model": {"skipped": (1, 2)}, "epochs": 1},
        evenly(6),
    ),
    "fast_dev_run": ({"epochs": None, "fast_dev_run": 3}, evenly(3)),
}


@pytest.mark.parametrize("name", PROGRESS)
def test_progress(package, name):  # P6
    settings, expected = PROGRESS[name]
    assert positions(package, **settings) == pytest.approx(expected, abs=1e-12)


def test_progress_with_an_accumulation_that_changes(package):  # P6
    def run(**settings):
        scheduler = package.callbacks.GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
        return positions(package, scheduler, batches=8, **settings)

    done = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20]
    assert run(epochs=3) == pytest.approx([batch / 24 for batch in done])
    # Eight steps in the first epoch, four in the second, and then one of four batches.
    assert run(epochs=None, max_steps=13) == pytest.approx([batch / 20 for batch in done[:13]])


def test_progress_with_stochastic_weight_averaging(package):  # P6
    averaging = package.callbacks.StochasticWeightAveraging(swa_lrs=LR, swa_epoch_start=2)
    seen = positions(package, averaging, epochs=4, model={"norm": True})
    # A fifth epoch renews the statistics of the norm. Lightning ends it with a step by old
    # gradients, after the run.
    assert seen == pytest.approx([*evenly(24), 1.0])


def test_equals_adamw_with_stochastic_weight_averaging(package):  # P4
    ours, theirs = (
        fit(
            package,
            make,
            *decay,
            package.callbacks.StochasticWeightAveraging(swa_lrs=LR, swa_epoch_start=2),
            epochs=4,
            model={"norm": True},
        )
        for make, decay in ((adam, [DecoupledWD(WD, quantum=0)]), (adamw, []))
    )
    assert same(ours, theirs)


def test_progress_of_several_optimizers(package):  # P6
    seen = {0: [], 1: []}
    wd = {i: lambda p, i=i: seen[i].append(p) or 0.0 for i in seen}
    fit(package, BOTH, DecoupledWD(wd), model={"manual": True, "steps": 2})
    both = [batch / 12 for batch in range(12) for _ in range(2)]
    assert seen == {0: pytest.approx(both), 1: pytest.approx(both)}


def test_progress_of_optimizers_that_take_turns(package):  # P6
    seen = {0: [], 1: []}
    wd = {i: lambda p, i=i: seen[i].append(p) or 0.0 for i in seen}
    trainer = quiet_trainer(package, DecoupledWD(wd), max_epochs=2)
    trainer.fit(turns_class(package)(BOTH, manual=True), loader(6))
    assert seen == {0: pytest.approx(evenly(12)), 1: pytest.approx(evenly(4))}


@pytest.mark.parametrize("kind", ["foreach", "fused"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_an_overflow_takes_its_place_in_the_schedule(package, manual, kind):  # P6
    seen = positions(
        package,
        make=partial(adam, **KINDS[kind]),
        plugins=half_precision(package, 2.0**40),
        model={"manual": manual},
    )
    # A fused optimizer is called all the same, and told.
    overflows = 0 if kind == "fused" else 12 - len(seen)
    assert (overflows > 0) == (kind != "fused")
    assert seen == pytest.approx(evenly(12)[overflows:])


def test_a_schedule_needs_a_length(package):  # P6
    with pytest.raises(ValueError, match=r"max_epochs.*max_steps"):
        fit(package, adam, DecoupledWD(lambda p: p), batches=Endless(3))
    with pytest.raises(ValueError, match=r"max_epochs.*max_steps"):
        fit(package, adam, DecoupledWD(lambda p: p), epochs=-1)


def test_a_number_needs_no_length(package):  # P4, P6
    ours = fit(package, adam, DecoupledWD(WD, quantum=0), batches=Endless(3))
    assert same(ours, fit(package, adamw, batches=Endless(3)))


# P9: resumed


DEBTS = {"wd": 1e-4, "quantum": 1e-5}  # against a shrink of 1e-6 per step


def linear(progress):
    return 0.3 * (1 - progress)


RESUMED = {
    "schedule": ({"wd": linear}, adam, {}),
    "debts": (DEBTS, adam, {}),
    "own": ({}, adam, {}),
    "accumulation": ({"wd": linear}, adam, {"accumulate_grad_batches": 2}),
    "accumulation, shorter last window": (
        {"wd": linear, "quantum": 0.005},
        adam,
        {"accumulate_grad_batches": 4},
    ),
    "max_steps": ({"wd": linear}, adam, {"epochs": None, "max_steps": 11}),
    "manual": ({"wd": linear, "quantum": 0.005}, adam, {"model": {"manual": True}}),
    "manual, max_steps": (
        {"wd": linear},
        adam,
        {"model": {"manual": True, "steps": 2}, "epochs": None, "max_steps": 22},
    ),
    "manual, accumulation": ({"wd": linear}, adam, {"model": {"manual": True, "every": 2}}),
    "two optimizers": (
        {"wd": {0: linear, 1: 1e-4}, "quantum": 1e-5},
        BOTH,
        {"model": {"manual": True}},
    ),
    "lr_ratio": (
        {"wd": 0.01, "scale_by": "lr_ratio", "quantum": 0},
        partial(one_cycle, adam),
        {},
    ),
    "step lr, lr_ratio": (
        {"wd": 0.01, "scale_by": "lr_ratio"},
        lambda module: {
            "optimizer": (optimizer := adam(module)),
            "lr_scheduler": {"scheduler": StepLR(optimizer, 3, 0.5), "interval": "step"},
        },
        {},
    ),
}


def saver(package, path, every=2):
    return package.callbacks.ModelCheckpoint(
        path, every_n_train_steps=every, save_top_k=-1, filename="{step}", save_last=False
    )


def uninterrupted(package, path, arguments, make, **settings):
    """Trains to the end, saves on the way, and returns the model with the checkpoints."""
    callbacks = [DecoupledWD(**arguments), saver(package, path)]
    model = fit(package, make, *callbacks, enable_checkpointing=True, **settings)
    checkpoints = sorted(path.glob("*.ckpt"), key=lambda file: int(file.stem.split("=")[1]))
    assert checkpoints
    return model, checkpoints


def heard(action):
    """The result of ``action``, and what we warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    texts = [str(warning.message) for warning in caught]
    return result, [text for text in texts if not any(re.match(it, text) for it in FOREIGN)]


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_equals_uninterrupted(package, tmp_path, name):  # P9
    arguments, make, settings = RESUMED[name]
    whole, checkpoints = uninterrupted(package, tmp_path, arguments, make, **settings)
    assert same(whole, fit(package, make, DecoupledWD(**arguments), **settings))
    for checkpoint in checkpoints:
        decay = DecoupledWD(**arguments)
        again = partial(fit, package, make, decay, resume=checkpoint, **settings)
        resumed, told = heard(again)
        assert same(whole, resumed)
        assert told == []


@pytest.mark.parametrize(
    ("arguments", "loses"),
    [(DEBTS, "owed"), ({"wd": 0.01, "scale_by": "lr_ratio", "quantum": 0}, "lr_max")],
    ids=["owed", "lr_max"],
)
def test_the_resumed_state_matters(package, tmp_path, arguments, loses):  # P9
    """Negative control: without its state, the callback does not end with the same bits."""

    def make(module):  # its peak is known at the first step only
        optimizer = adam(module)
        scheduler = {"scheduler": StepLR(optimizer, 2, 0.5), "interval": "step"}
        for group in optimizer.param_groups:
            del group["initial_lr"]
        return [optimizer], [scheduler]

    if loses == "owed":
        make = adam
    whole, checkpoints = uninterrupted(package, tmp_path, arguments, make)
    checkpoint = torch.load(checkpoints[1], weights_only=True)
    resumed = fit(package, make, DecoupledWD(**arguments), resume=checkpoints[1])
    del checkpoint["callbacks"][DecoupledWD(**arguments).state_key]
    torch.save(checkpoint, checkpoints[1])
    forgetful = fit(package, make, DecoupledWD(**arguments), resume=checkpoints[1])
    assert same(whole, resumed)
    assert not same(whole, forgetful)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"wd": 0.1}, {"wd": 0.2}, "wd was 0.1 .* is 0.2"),
        ({"wd": linear}, {"wd": 0.2}, r"wd was \[0.3, .*, 0.0\] .* is 0.2"),
        ({"wd": 0.1}, {"wd": None}, "wd was 0.1 .* is None"),
        ({"wd": 0.1}, {"wd": 0.1, "scale_by": "none"}, "scale_by was lr .* is none"),
        ({"wd": 0.1}, {"wd": 0.1, "quantum": 0.01}, "quantum was None .* is 0.01"),
        (
            {"wd": 0.1, "scale_by": "lr_ratio", "max_lr": LR},
            {"wd": 0.1, "scale_by": "lr_ratio", "max_lr": 2 * LR},
            "max_lr was 0.01 .* is 0.02",
        ),
    ],
)
def test_arguments_win_over_the_checkpoint(package, tmp_path, old, new, message):  # P9
    _, (_, path, *_) = uninterrupted(package, tmp_path, old, adam)

    def resume(decay):
        return heard(lambda: fit(package, adam, decay, resume=path))

    as_before, silence = resume(DecoupledWD(**old))
    ours, (told,) = resume(DecoupledWD(**new))
    assert silence == []
    assert re.search(message, told)
    assert not same(ours, as_before)
    # By its other name it has no state there, and nothing is owed that could make a difference.
    stateless, (told,) = resume(DecoupledWD(**new, optimizers=0))
    assert "decay begins here" in told
    assert same(ours, stateless)


def test_another_length_is_told_where_a_schedule_depends_on_it(package, tmp_path):  # P9
    for wd, tells in ((linear, True), (0.1, False)):
        _, checkpoints = uninterrupted(package, tmp_path / str(tells), {"wd": wd}, adam)
        longer = partial(fit, package, adam, DecoupledWD(wd), resume=checkpoints[1], epochs=3)
        _, told = heard(longer)
        assert told == ["length was 12 in the saved run and is 18 in this one"] * tells


def test_a_window_that_was_cut_keeps_its_position(package, tmp_path):  # P6, P9
    class Saves(package.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    settings = {"batches": 12, "epochs": 1, "accumulate_grad_batches": 4}
    fit(package, adam, DecoupledWD(float), Saves(), **settings)
    shown = []

    class Notes(package.Callback):
        def on_train_batch_end(self, trainer, *_):
            shown.append(decay.coefficients[0])

    decay = DecoupledWD(float)
    fit(package, adam, decay, Notes(), resume=tmp_path / "cut.ckpt", **settings)
    # The step before was made after four batches, although the run goes on with the seventh.
    assert shown[1:] == [[4 / 12], [4 / 12], [4 / 12], [4 / 12], [8 / 12]]


def test_joins_a_run_that_had_no_decay(package, tmp_path):  # P6
    fit(package, adam, saver(package, tmp_path, every=4), enable_checkpointing=True)
    seen = positions(package, resume=tmp_path / "step=4.ckpt")
    assert seen == pytest.approx(evenly(12)[4:])


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_resumed_equals_uninterrupted_beside_averaging(package, tmp_path, name):  # P9
    def averaging():
        arguments = {"decay": 0.8} if name.startswith("EMA") else {"swa_lrs": LR}
        if name.startswith("Stochastic"):
            arguments["swa_epoch_start"] = 2
        return averager(package, name)(**arguments)

    arguments = {"wd": linear, "quantum": 0.005}
    settings = {"epochs": 3, "enable_checkpointing": True}
    save = package.callbacks.ModelCheckpoint(
        tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}"
    )
    whole = fit(package, adam, DecoupledWD(**arguments), averaging(), save, **settings)
    for epoch in range(2):
        resumed = fit(
            package,
            adam,
            DecoupledWD(**arguments),
            averaging(),
            resume=tmp_path / f"epoch={epoch}.ckpt",
            epochs=3,
        )
        assert same(whole, resumed)


def finetuning(package):
    return package.callbacks.BackboneFinetuning(1, lambda epoch: 1.5, should_align=False)


def head_only(make, wd):
    """What BackboneFinetuning expects: it adds the backbone itself."""
    return lambda module: make(module.head.parameters(), lr=LR, weight_decay=wd)


def test_decays_a_backbone_that_is_unfrozen(package, tmp_path):  # P5, P9
    def run(make, *callbacks, **settings):
        return fit(package, make, *callbacks, finetuning(package), epochs=3, **settings)

    def owing(*callbacks, **settings):
        decay = DecoupledWD(WD, quantum=0.0035)
        return run(head_only(Adam, IMPORTANT), decay, *callbacks, **settings)

    ours = run(head_only(Adam, IMPORTANT), DecoupledWD(WD, quantum=0))
    assert same(ours, run(head_only(AdamW, WD)))
    assert not same(ours, run(head_only(AdamW, 0)))
    save = package.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = owing(save, enable_checkpointing=True)
    # Later Lightning freezes the backbone again when it resumes, and trains the head alone.
    assert same(whole, owing(resume=tmp_path / "epoch=0.ckpt"))


@pytest.mark.parametrize("name", ["number", "array", "schedule", "dict", "ratio"])
def test_the_state_is_plain_numbers(package, tmp_path, name):  # P9
    arguments = {
        "number": DEBTS,
        "array": {"wd": np.float32(1e-4), "quantum": np.float64(1e-5), "max_lr": np.float64(1)},
        "schedule": {"wd": [linear]},
        "dict": {"wd": {0: linear}},
        "ratio": {"wd": 0.1, "scale_by": ["lr_ratio"], "max_lr": (0.1,)},
    }[name]
    decay = DecoupledWD(**arguments)
    model = fit(package, partial(adam, lr=torch.tensor(LR), foreach=False), decay)
    model.trainer.save_checkpoint(tmp_path / "whole.ckpt")
    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=False)
    torch.save(checkpoint["callbacks"], tmp_path / "callbacks.pt")
    state = torch.load(tmp_path / "callbacks.pt", weights_only=True)[decay.state_key]
    assert state == decay.state_dict()
    assert list(state) == [0]


def test_the_state_key_depends_on_the_optimizers_alone():  # P9
    assert DecoupledWD(0.1).state_key == DecoupledWD(linear, scale_by="none").state_key
    assert DecoupledWD(0.1, optimizers=0).state_key == DecoupledWD(0.2, optimizers=[0]).state_key
    keys = {DecoupledWD(0.1, optimizers=o).state_key for o in (None, 0, 1, (0, 1), (1, 0))}
    assert len(keys) == 5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
@pytest.mark.parametrize("when", ["new", "trained"])
def test_copies_decay_like_the_original(package, copied, when):  # P9
    decay = DecoupledWD(linear, quantum=0, optimizers=0)
    whole = fit(package, adam, decay)
    duplicate = copied(decay if when == "trained" else DecoupledWD(linear, quantum=0, optimizers=0))
    assert duplicate.state_key == decay.state_key
    assert same(whole, fit(package, adam, duplicate))
    assert same(whole, fit(package, adam, decay))  # the copy has taken nothing from it


def test_a_copy_made_in_the_middle_of_training_is_not_attached(package):  # P3, P9
    class Copies(package.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.trainer_copy = copy.deepcopy(trainer.callbacks[0])
            self.bytes = pickle.dumps(trainer.callbacks[0])

    copies = Copies()
    whole = fit(package, adam, DecoupledWD(linear, quantum=0), copies)
    assert same(whole, fit(package, adam, DecoupledWD(linear, quantum=0)))
    for duplicate in (copies.trainer_copy, pickle.loads(copies.bytes)):
        assert duplicate.state_dict() == {}
        assert same(whole, fit(package, adam, duplicate))


# Runs besides the first


def test_a_checkpoint_that_is_only_evaluated_is_not_resumed(package, tmp_path):  # P9
    arguments = {"wd": 1e-3, "quantum": 7e-5}
    decay = DecoupledWD(**arguments)
    _, checkpoints = uninterrupted(package, tmp_path, arguments, adam)
    module = model_class(package)(adam)
    quiet_trainer(package, decay).validate(module, loader(2), checkpoints[1], verbose=False)
    again = fit(package, adam, decay)
    assert same(again, fit(package, adam, DecoupledWD(**arguments)))


def test_a_second_fit_owes_nothing_from_the_first(package, tmp_path):  # P8, P9
    arguments = {"wd": 1e-3, "quantum": 7e-5}  # against a shrink of 1e-5 per step

    def run(decay):
        # It saves before training starts, with whatever state there is, and comes back to that.
        finder = package.callbacks.LearningRateFinder(num_training_steps=3, update_attr=False)
        settings = {"batches": 12, "epochs": 1, "default_root_dir": tmp_path, "logger": True}
        settings["log_every_n_steps"] = 1
        return fit(package, adam, decay, finder, model={"lr": LR}, **settings)

    decay = DecoupledWD(**arguments)
    fit(package, adam, decay)
    assert same(run(decay), run(DecoupledWD(**arguments)))


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


def test_a_second_fit_goes_on_in_the_schedule(package):  # P6
    seen = []
    module = model_class(package)(adam)
    trainer = quiet_trainer(
        package, DecoupledWD(lambda progress: seen.append(progress) or 0.0), max_epochs=1
    )
    trainer.fit(module, loader(6))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(6))
    assert seen == pytest.approx([*evenly(6), *evenly(12)[6:]])


def test_a_step_before_the_first_batch_is_the_first(package):  # P1, P6
    """As of a manual warm-up, by the torch optimizer itself."""

    class WarmsUp(package.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                pl_module.loss(99).backward()
                trainer.optimizers[0].step()

    manual = {"model": {"manual": True}}
    ours = fit(package, adam, DecoupledWD(WD, quantum=0), WarmsUp(), **manual)
    assert same(ours, fit(package, adamw, WarmsUp(), **manual))
    assert positions(package, WarmsUp(), **manual)[0] == 0


# P10


@pytest.mark.parametrize(
    ("optimizers", "error"),
    [
        (-1, ValueError),
        ((0, -1), ValueError),
        ([], ValueError),
        ((), ValueError),
        ((0, 0), ValueError),
        ([1, 0, 1], ValueError),
        ("0", (TypeError, ValueError)),
        ("", (TypeError, ValueError)),
        (True, (TypeError, ValueError)),
        ([False], (TypeError, ValueError)),
        ([None], (TypeError, ValueError)),
        ([0.0], (TypeError, ValueError)),
        (1.5, (TypeError, ValueError)),
        (object(), (TypeError, ValueError)),
        (linear, (TypeError, ValueError)),
    ],
)
def test_refuses_such_optimizers(optimizers, error):  # P10
    with pytest.raises(error, match=r"^optimizers "):
        DecoupledWD(0.1, optimizers=optimizers)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wd": lambda p: 0.1 - p}, r"schedule .* at progress 0.1.* is -0.0"),
        ({"wd": lambda p: float("nan") if p else 0.1}, r"at progress 0.08\d* is nan"),
        ({"wd": 100.0}, r"param group 0: .* shrink .* by 1, .*lr 0.01, wd 100"),
        ({"wd": 1.0, "scale_by": "none"}, "param group 0: .* shrink .* by 1,"),
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
    optimizer = inner(made[0])
    assert hooks_of(optimizer) == []
    assert optimizer.param_groups[0]["weight_decay"] == IMPORTANT


def test_refuses_an_unknown_peak_before_training(package):  # P3, P10
    module = model_class(package)(partial(adam, lr=0.0))
    trainer = quiet_trainer(package, DecoupledWD(0.1, scale_by="lr_ratio"), max_epochs=1)
    with pytest.raises(ValueError, match="give max_lr"):
        trainer.fit(module, loader(2))
    assert hooks_of(inner(module)) == []


def test_two_of_a_kind_are_refused(package):  # P10
    with pytest.raises((RuntimeError, ValueError), match="DecoupledWD"):
        fit(package, adam, DecoupledWD(0.1), DecoupledWD(0.2))


def test_a_no_decay_group_is_said_once(package):  # P7
    def make(kind, wd):
        return lambda module: kind(
            [
                {"params": module.backbone.parameters(), "weight_decay": wd},
                {"params": module.head.parameters(), "weight_decay": 0.0},
            ],
            lr=LR,
        )

    decay = DecoupledWD(WD, quantum=0)
    ours, (told,) = heard(lambda: fit(package, make(Adam, IMPORTANT), decay))
    assert told.startswith("param group 1 has a weight decay of 0")
    assert same(ours, fit(package, make(AdamW, WD)))
    assert decay.coefficients == {0: [WD, 0.0]}


def test_is_a_callback_of_both_packages():
    for package in PACKAGES:
        assert isinstance(DecoupledWD(0.1), package.Callback)
