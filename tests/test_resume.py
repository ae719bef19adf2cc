"""A run that is stopped and resumed ends with the same bits as one that is not (P9)."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from fastai.callback.schedule import SchedCos
from fastai.learner import load_learner
from fastai_helpers import (
    ADAMW,
    BS,
    FITS,
    L2,
    When,
    different,
    fitted,
    learner,
    state,
    throw,
)
from helpers import (
    INNER_WD,
    caught,
    deferred,
    hooks_of,
    one_weight,
    pickled,
    same,
    zero_gradients,
)
from lightning_helpers import (
    LR,
    WD,
    adam,
    averaging,
    fit,
    loader,
    model_class,
    one_cycle,
    quiet_trainer,
    two_adams,
)
from torch import nn
from torch.optim.lr_scheduler import StepLR

from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.lightning import DecoupledWD as LightningWD
from wd_callbacks.torch import DecoupledWD

STEPS = 40
duplicates = pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["copy", "pickle"])


def schedule(progress):
    return 1e-3 * (1 - progress)


# A plain loop

ARGUMENTS = {
    "number": {"wd": 0.1},
    "schedule": {"wd": schedule, "total_steps": STEPS},
    "deferred": {"wd": 1e-4, "quantum": 3e-5},
    "deferred by schedule": {"wd": [schedule, 1e-4], "total_steps": STEPS, "quantum": 3e-5},
    "ratio": {"wd": 0.01, "scale_by": "lr_ratio"},
}


class Run:
    """A plain loop whose second layer has a gradient at every other step only."""

    def __init__(self, arguments, dtype=torch.float32):
        torch.manual_seed(0)
        self.model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).to(dtype)
        groups = [{"params": list(layer.parameters())} for layer in self.model]
        self.optimizer = torch.optim.Adam(groups, lr=0.05)
        self.warm = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.1, total_iters=9)
        self.decay = DecoupledWD(self.optimizer, **arguments)
        self.parts = self.model, self.optimizer, self.warm, self.decay

    def train(self, start, stop):
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(3, 4, generator=generator).to(self.model[0].weight)
            layers = self.model if step % 2 else self.model[:1]
            self.optimizer.zero_grad()
            sum(layer(x).square().mean() for layer in layers).backward()
            self.optimizer.step()
            self.warm.step()
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def save(self):
        file = io.BytesIO()
        torch.save([part.state_dict() for part in self.parts], file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, states):
        for part, saved in zip(self.parts, states):
            part.load_state_dict(saved)


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_equals_uninterrupted(arguments, dtype, recwarn):
    whole = Run(arguments, dtype).train(0, STEPS)
    first = Run(arguments, dtype)
    for start, stop in pairwise([0, 1, 7, 20, 33]):
        first.train(start, stop)
        second = Run(arguments, dtype)
        second.load(first.save())
        assert torch.equal(second.train(stop, STEPS), whole)
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:.*load_state_dict")
@pytest.mark.parametrize("name", ["schedule", "deferred"])
def test_without_the_saved_state_it_does_not(name):  # the negative control
    first, second = Run(ARGUMENTS[name]), Run(ARGUMENTS[name])
    first.train(0, 7)
    second.load(first.save()[:3])
    assert not torch.equal(second.train(7, STEPS), first.train(7, STEPS))


CHANGES = {
    "wd": ({"wd": 0.2}, r"wd.*0\.1\b.*0\.2"),
    "a sequence": ({"wd": [0.1, 0.1]}, r"wd.*0\.1\b.*\[0\.1, 0\.1\]"),
    "scale_by": ({"scale_by": "none"}, "scale_by.*lr.*none"),
    "max_lr": ({"max_lr": 0.5}, r"max_lr.*None.*0\.5"),
    "quantum": ({"quantum": 0}, "quantum.*None.* 0"),
    "total_steps": ({"total_steps": 30}, "40.* 30"),
    "a schedule": ({"wd": schedule}, r"wd.*0\.1\b.*0\.001"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_arguments_win_over_the_checkpoint_and_warn(change, message):
    arguments = {"wd": 0.1, "total_steps": STEPS}
    first, second = Run(arguments), Run({**arguments, **change})
    first.train(0, 7)
    with pytest.warns(UserWarning, match=message) as records:
        second.load(first.save())
    assert len(records) == 1
    second.train(7, 8)
    wd = change.get("wd", 0.1)
    expected = wd(7 / STEPS) if callable(wd) else 0.1 if isinstance(wd, list) else wd
    assert second.decay.coefficients == [expected] * 2


def test_callables_are_compared_by_value():
    def run(wd, scale):
        return Run({"wd": wd, "scale_by": scale, "total_steps": STEPS})

    first = run(schedule, lambda g: g["lr"])
    first.train(0, 7)
    saved = first.save()
    alike = run(lambda p: 1e-3 * (1 - p), lambda g: 1 * g["lr"])
    assert caught(lambda: alike.load(saved))[1] == []
    other = run(lambda p: 2e-4, lambda g: 2 * g["lr"])
    _, messages = caught(lambda: other.load(first.save()))
    assert re.search(r"wd.*0\.001.*0\.0002", messages[0])
    assert "scale_by" in messages[1]


@pytest.mark.filterwarnings("ignore:.*max_lr")
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [(None, None, 0.1), (None, 0.2, 0.2), (1.0, None, 0.05)],
    ids=["a guess is saved", "a given one wins", "given no more: the group's"],
)
def test_the_max_lr_after_resuming(old, new, expected):
    _, before = one_weight(lr=0.1)
    first = DecoupledWD(before, 0.5, scale_by="lr_ratio", max_lr=old)
    before.step()
    p, optimizer = one_weight(lr=0.05)
    second = DecoupledWD(optimizer, 0.5, scale_by="lr_ratio", max_lr=new)
    second.load_state_dict(first.state_dict())
    optimizer.step()
    assert p[0].item() == pytest.approx(1 - 0.5 * 0.05 / expected)


def test_the_state_of_another_model_is_refused():  # P10
    first, other = Run({"wd": 0.1}), Run({"wd": 0.1})
    first.train(0, 2)
    other.optimizer.param_groups[1]["params"].pop()
    with pytest.raises(ValueError, match=r"\[2, 2\].*\[2, 1\]"):
        other.decay.load_state_dict(first.decay.state_dict())


def plain(value):
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and plain(each) for key, each in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (int, float, str, bool)


# A description of the resumed run


def resumed(**arguments):
    """A run of ten steps, resumed after five of them; with its optimizer."""
    (_, first), (_, second) = one_weight(), one_weight()
    arguments = {"wd": lambda p: 0.1 + 0.4 * p, "total_steps": 10, **arguments}
    before = DecoupledWD(first, **arguments)
    for _ in range(5):
        first.step()
    decay = DecoupledWD(second, **arguments)
    decay.load_state_dict(before.state_dict())
    return before, first, decay, second


def test_a_resumed_run_is_described_as_the_one_before():  # P7, P13
    before, _before, decay, optimizer = resumed()
    assert str(decay.describe()) == str(before.describe())
    assert decay.coefficients == before.coefficients == [pytest.approx(0.1 + 0.4 * 0.4)]
    for _ in range(3):
        optimizer.step()
    decay.load_state_dict(before.state_dict())  # it replaces, and does not add
    assert str(decay.describe()) == str(before.describe())


def test_a_state_without_the_progress_is_loaded():  # version 0.1.0
    before, first, decay, optimizer = resumed()
    state = before.state_dict()
    del state["progress"]
    decay.load_state_dict(state)
    first.step()
    optimizer.step()
    assert decay.state_dict() == before.state_dict()


# Copies


@duplicates
def test_a_copied_decay_acts_on_the_copied_optimizer(duplicate):  # P3
    _, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 1e-6)
    optimizer.step()
    other, copied = duplicate((optimizer, decay))
    assert other.param_groups[0]["weight_decay"] == INNER_WD
    assert copied.state_dict() == decay.state_dict()
    state = decay.state_dict()
    zero_gradients(other)
    for _ in range(3):
        other.step()
    assert deferred(copied) != deferred(decay)
    assert decay.state_dict() == state
    alone = duplicate(optimizer)  # the optimizer alone: no decay
    assert hooks_of(alone) == []


def test_a_shallow_copy_is_a_second_decay():  # P10
    p, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 0.5)
    with pytest.raises(ValueError, match="DecoupledWD"):
        copy.copy(decay)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((2,), 0.95))


@duplicates
def test_copied_lightning_callbacks_decay_like_the_original(package, duplicate):
    decay = LightningWD(linear, quantum=0, optimizers=0)
    new = duplicate(decay)
    whole = fit(package, adam, decay)
    trained = duplicate(decay)
    for each in (new, trained, decay):  # the copies have taken nothing from it
        assert each.state_key == decay.state_key
        assert same(whole, fit(package, adam, each))


def test_a_copy_made_in_the_middle_of_training_is_not_attached(package):  # P3, P9
    class Copies(package.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.trainer_copy = copy.deepcopy(trainer.callbacks[0])
            self.bytes = pickle.dumps(trainer.callbacks[0])

    copies = Copies()
    whole = fit(package, adam, LightningWD(linear, quantum=0), copies)
    assert same(whole, fit(package, adam, LightningWD(linear, quantum=0)))
    for duplicate in (copies.trainer_copy, pickle.loads(copies.bytes)):
        assert duplicate.state_dict() == {}
        assert same(whole, fit(package, adam, duplicate))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
def test_copied_fastai_callbacks_train_the_same(duplicate):
    fit = FITS["one_cycle"]
    arguments = {"wd": SchedCos(0.05, 0.5), "scale_by": "lr_ratio", "quantum": 0}
    used, interrupted = FastaiWD(**arguments), FastaiWD(**arguments)
    expected = fitted(L2, used, fit=fit)
    with pytest.raises(KeyboardInterrupt):
        fitted(L2, interrupted, When("after_batch", throw(KeyboardInterrupt()), {3}))
    assert interrupted.coefficients
    assert duplicate(interrupted).coefficients == []  # the fit stays behind
    for decay in (FastaiWD(**arguments), used, interrupted):
        assert different(expected, fitted(L2, duplicate(decay), fit=fit)) == []
    assert different(expected, fitted(L2, FastaiWD(0.05), fit=fit))


# Lightning


def linear(progress):
    return 0.3 * (1 - progress)


DEFERRED = {"wd": 1e-4, "quantum": 1e-5}  # against a shrink of 1e-6 per step

LIGHTNING = {
    "schedule": ({"wd": linear}, adam, {}),
    "deferred": (DEFERRED, adam, {}),
    "own": ({}, adam, {}),
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
        two_adams,
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
        path, every_n_train_steps=every, save_top_k=-1, filename="{step}"
    )


def uninterrupted(package, path, arguments, make, **settings):
    """Trains to the end, saves on the way, and returns the model with the checkpoints."""
    callbacks = [LightningWD(**arguments), saver(package, path)]
    model = fit(package, make, *callbacks, enable_checkpointing=True, **settings)
    checkpoints = sorted(path.glob("*.ckpt"), key=lambda file: int(file.stem.split("=")[1]))
    assert checkpoints
    return model, checkpoints


@pytest.mark.parametrize(("arguments", "make", "settings"), LIGHTNING.values(), ids=LIGHTNING)
def test_lightning_resumed_equals_uninterrupted(package, tmp_path, arguments, make, settings):
    whole, checkpoints = uninterrupted(package, tmp_path, arguments, make, **settings)
    assert same(whole, fit(package, make, LightningWD(**arguments), **settings))
    for checkpoint in {*checkpoints[:2], checkpoints[-1]}:
        decay = LightningWD(**arguments)
        again = partial(fit, package, make, decay, resume=checkpoint, **settings)
        resumed, messages = caught(again)
        assert same(whole, resumed)
        assert messages == []


def without_initial_lr(module):
    """Its peak is known at the first step only."""
    optimizer = adam(module)
    scheduler = {"scheduler": StepLR(optimizer, 2, 0.5), "interval": "step"}
    for group in optimizer.param_groups:
        del group["initial_lr"]
    return [optimizer], [scheduler]


@pytest.mark.filterwarnings("ignore:.*no state")
@pytest.mark.parametrize(
    ("arguments", "make"),
    [
        (DEFERRED, adam),
        ({"wd": 0.01, "scale_by": "lr_ratio", "quantum": 0}, without_initial_lr),
    ],
    ids=["deferred", "max_lr"],
)
def test_the_resumed_state_matters(package, tmp_path, arguments, make):
    """Negative control: without its state, the callback does not end with the same bits."""
    whole, (_, path, *_) = uninterrupted(package, tmp_path, arguments, make)
    checkpoint = torch.load(path, weights_only=True)
    assert same(whole, fit(package, make, LightningWD(**arguments), resume=path))
    del checkpoint["callbacks"][LightningWD(**arguments).state_key]
    torch.save(checkpoint, path)
    assert not same(whole, fit(package, make, LightningWD(**arguments), resume=path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"wd": 0.1}, {"wd": 0.2}, r"wd.*0\.1\b.*0\.2"),
        (
            {"wd": 0.1, "scale_by": "lr_ratio", "max_lr": LR},
            {"wd": 0.1, "scale_by": "lr_ratio", "max_lr": 2 * LR},
            r"max_lr.*0\.01.*0\.02",
        ),
    ],
    ids=["wd", "max_lr"],
)
def test_lightning_arguments_win_over_the_checkpoint(package, tmp_path, old, new, message):
    _, (_, path, *_) = uninterrupted(package, tmp_path, old, adam)

    def resume(decay):
        return caught(lambda: fit(package, adam, decay, resume=path))

    as_before, silence = resume(LightningWD(**old))
    with pytest.warns(UserWarning, match=message):
        ours = fit(package, adam, LightningWD(**new), resume=path)
    assert silence == []
    assert not same(ours, as_before)
    # By its other name it has no state there, and nothing is deferred that makes a difference.
    stateless, (message,) = resume(LightningWD(**new, optimizers=0))
    assert "no state" in message
    assert same(ours, stateless)


@pytest.mark.parametrize(("wd", "warns"), [(linear, True), (0.1, False)])
def test_another_length_warns_if_a_schedule_depends_on_it(package, tmp_path, wd, warns):
    _, checkpoints = uninterrupted(package, tmp_path, {"wd": wd}, adam)
    longer = partial(fit, package, adam, LightningWD(wd), resume=checkpoints[1], epochs=3)
    _, messages = caught(longer)
    assert len(messages) == warns
    assert all("12" in it and "18" in it for it in messages)


def test_a_window_that_was_cut_keeps_its_position(package, tmp_path):  # P6
    class Saves(package.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    settings = {"batches": 12, "epochs": 1, "accumulate_grad_batches": 4}
    fit(package, adam, LightningWD(float), Saves(), **settings)
    shown = []

    class Notes(package.Callback):
        def on_train_batch_end(self, trainer, *_):
            shown.append(decay.coefficients[0])

    decay = LightningWD(float)
    fit(package, adam, decay, Notes(), resume=tmp_path / "cut.ckpt", **settings)
    # The step before was made after four batches, although the run goes on with the seventh.
    assert shown[1:] == [[4 / 12], [4 / 12], [4 / 12], [4 / 12], [8 / 12]]


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_resumed_equals_uninterrupted_beside_averaging(package, tmp_path, name):  # P9
    def run(*callbacks, **settings):
        decay = LightningWD(linear, quantum=0.005)
        callbacks = [decay, averaging(package, name), *callbacks]
        return fit(package, adam, *callbacks, epochs=3, **settings)

    save = package.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    whole = run(save, enable_checkpointing=True)
    for epoch in range(2):
        assert same(whole, run(resume=tmp_path / f"epoch={epoch}.ckpt"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"wd": np.float32(1e-4), "quantum": np.float64(1e-5), "max_lr": np.float64(1)},
        {"wd": {0: [linear]}},
        {"wd": 0.1, "scale_by": ["lr_ratio"], "max_lr": (0.1,)},
    ],
    ids=["NumPy", "schedule", "ratio"],
)
def test_the_lightning_state_is_plain_numbers(package, tmp_path, arguments):
    decay = LightningWD(**arguments)
    model = fit(package, partial(adam, lr=torch.tensor(LR), foreach=False), decay)
    model.trainer.save_checkpoint(tmp_path / "whole.ckpt")
    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=False)
    state = checkpoint["callbacks"][decay.state_key]
    assert state == decay.state_dict()
    assert list(state) == [0]
    assert plain(state)


def test_the_state_key_depends_on_the_optimizers_alone():
    assert LightningWD(0.1).state_key == LightningWD(linear, scale_by="none").state_key
    assert LightningWD(0.1, optimizers=0).state_key == LightningWD(0.2, optimizers=[0]).state_key
    keys = {LightningWD(0.1, optimizers=o).state_key for o in (None, 0, 1, (0, 1), (1, 0))}
    assert len(keys) == 5


def test_an_evaluated_checkpoint_is_not_resumed(package, tmp_path):
    arguments = {"wd": 1e-3, "quantum": 7e-5}
    decay = LightningWD(**arguments)
    _, checkpoints = uninterrupted(package, tmp_path, arguments, adam)
    module = model_class(package)(adam)
    quiet_trainer(package, decay).validate(module, loader(2), checkpoints[1], verbose=False)
    assert same(fit(package, adam, decay), fit(package, adam, LightningWD(**arguments)))


def test_a_second_fit_starts_with_nothing_deferred(package, tmp_path):  # P8
    arguments = {"wd": 1e-3, "quantum": 7e-5}  # against a shrink of 1e-5 per step

    def run(decay):
        # It saves before training starts, with whatever state there is, and comes back to that.
        finder = package.callbacks.LearningRateFinder(num_training_steps=3, update_attr=False)
        settings = {"batches": 12, "epochs": 1, "default_root_dir": tmp_path, "logger": True}
        settings["log_every_n_steps"] = 1
        return fit(package, adam, decay, finder, model={"lr": LR}, **settings)

    decay = LightningWD(**arguments)
    fit(package, adam, decay)
    assert same(run(decay), run(LightningWD(**arguments)))


# fastai


def test_a_copied_learner_trains_the_same():
    # P9
    learn = learner(L2, cbs=FastaiWD(WD))
    for one in (learn, copy.deepcopy(learn)):
        one.fit(2)
        assert different(state(one), fitted(ADAMW)) == []
        assert one.decoupled_wd.learn is one


def test_export_and_load(tmp_path):
    # P9, P3
    learn = learner(L2, cbs=FastaiWD(SchedCos(0.05, 0.5)), path=tmp_path)
    learn.fit(2)
    trained = state(learn)
    assert learn.opt.hypers[0]["wd"] == INNER_WD
    learn.export()
    assert learn.opt.hypers[0]["wd"] == INNER_WD
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pickle")
        loaded = load_learner(tmp_path / "export.pkl")
    assert loaded.opt is None
    assert different(trained, state(loaded)) == []
    for one in (learn, loaded):
        preds, _ = one.get_preds(dl=learn.dls.valid)
        assert preds.shape == (2 * BS, 1)
        one.validate(dl=learn.dls.valid)
        assert different(trained, state(one)) == []

    # It goes on to decay, as its own callback and after a fresh start of the optimizer
    fresh = learner(L2, model=copy.deepcopy(loaded.model))
    fresh.fit(1, cbs=FastaiWD(SchedCos(0.05, 0.5)))
    loaded.dls = learn.dls
    loaded.fit(1)
    assert different(state(fresh), state(loaded)) == []
