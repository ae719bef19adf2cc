"""A run that is stopped and resumed ends with the same bits as one that is not (P9)."""

from __future__ import annotations

import copy
import io
import json
import re
import warnings
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from fastai.callback.schedule import SchedCos
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import load_learner
from fastai_helpers import ADAMW, BS, FITS, L2, When, different, fitted, learner, state, throw
from helpers import INNER_WD, caught, deferred, hooks_of, one_weight, pickled, same, zero_gradients
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
from wd_callbacks.schedules import Cosine
from wd_callbacks.torch import DecoupledWD

STEPS = 40
duplicates = pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["copy", "pickle"])


# A plain loop


def schedule(progress):
    return 1e-3 * (1 - progress)


ARGUMENTS = {
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


CHANGES = {  # what differs from wd=0.1, the warning, and the coefficient at step 7
    "wd": ({"wd": 0.2}, r"wd.*0\.1\b.*0\.2", 0.2),
    "a sequence": ({"wd": [0.1, 0.1]}, r"wd.*0\.1\b.*\[0\.1, 0\.1\]", 0.1),
    "a schedule": ({"wd": schedule}, r"wd.*0\.1\b.*0\.001", schedule(7 / STEPS)),
    "scale_by": ({"scale_by": "none"}, "scale_by.*lr.*none", 0.1),
    "max_lr": ({"max_lr": 0.5}, r"max_lr.*None.*0\.5", 0.1),
    "quantum": ({"quantum": 0}, "quantum.*None.* 0", 0.1),
    "total_steps": ({"total_steps": 30}, "40.* 30", 0.1),
}


@pytest.mark.parametrize(("change", "message", "wd"), CHANGES.values(), ids=CHANGES)
def test_arguments_win_over_the_checkpoint_and_warn(change, message, wd):
    arguments = {"wd": 0.1, "total_steps": STEPS}
    first, second = Run(arguments), Run({**arguments, **change})
    first.train(0, 7)
    _, [warning] = caught(lambda: second.load(first.save()))
    assert re.search(message, warning)
    second.train(7, 8)
    assert second.decay.coefficients == [wd] * 2


def test_callables_are_compared_by_value():
    def resume(wd, scale):
        second = Run({"wd": wd, "scale_by": scale, "total_steps": STEPS})
        return caught(lambda: second.load(first.save()))[1]

    first = Run({"wd": schedule, "scale_by": lambda g: g["lr"], "total_steps": STEPS})
    first.train(0, 7)
    assert resume(lambda p: 1e-3 * (1 - p), lambda g: 1 * g["lr"]) == []
    of_wd, of_scale = resume(lambda p: 2e-4, lambda g: 2 * g["lr"])
    assert re.search(r"wd.*0\.001.*0\.0002", of_wd)
    assert "scale_by" in of_scale


MAX_LRS = {  # the argument before and after, and what counts
    "a guess is saved": (None, None, 0.1),
    "a given one wins": (None, 0.2, 0.2),
    "given no more: the group's": (1.0, None, 0.05),
}


@pytest.mark.filterwarnings("ignore:.*max_lr")
@pytest.mark.parametrize(("old", "new", "expected"), MAX_LRS.values(), ids=MAX_LRS)
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


def test_a_resumed_run_is_described_as_the_one_before():  # P7, P13
    def build():
        _, optimizer = one_weight()
        return optimizer, DecoupledWD(optimizer, lambda p: 0.1 + 0.4 * p, total_steps=10)

    (first, before), (second, decay) = build(), build()
    for _ in range(5):
        first.step()
    for _ in range(2):  # the second time it replaces, and does not add
        decay.load_state_dict(before.state_dict())
        assert str(decay.describe()) == str(before.describe())
        assert decay.coefficients == before.coefficients == [pytest.approx(0.1 + 0.4 * 0.4)]
        second.step()


# Copies


@duplicates
def test_a_copied_decay_acts_on_the_copied_optimizer(duplicate):  # P3
    _, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 1e-6)
    optimizer.step()
    state = decay.state_dict()
    other, copied = duplicate((optimizer, decay))
    assert other.param_groups[0]["weight_decay"] == INNER_WD
    assert copied.state_dict() == state
    zero_gradients(other)
    other.step()
    assert deferred(copied) != deferred(decay)
    assert decay.state_dict() == state
    assert hooks_of(duplicate(optimizer)) == []  # the optimizer alone: no decay


def test_a_shallow_copy_is_a_second_decay():  # P10
    p, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 0.5)
    with pytest.raises(ValueError, match="DecoupledWD"):
        copy.copy(decay)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((2,), 0.95))


@duplicates
def test_copied_lightning_callbacks_train_the_same(package, duplicate):  # P3
    class Copies(package.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.copy = duplicate(decay)

    decay, copies = LightningWD(linear, quantum=0, optimizers=0), Copies()
    new = duplicate(decay)
    whole = fit(package, adam, decay, copies)
    assert copies.copy.state_dict() == {}  # the fit stays behind
    for each in (new, copies.copy, duplicate(decay), decay):
        assert each.state_key == decay.state_key
        assert same(whole, fit(package, adam, each))


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


# Lightning


def linear(progress):
    return 0.3 * (1 - progress)


def without_initial_lr(module):
    """Its peak is known at the first step only."""
    optimizer = adam(module)
    scheduler = {"scheduler": StepLR(optimizer, 2, 0.5), "interval": "step"}
    for group in optimizer.param_groups:
        del group["initial_lr"]
    return [optimizer], [scheduler]


DEFERRED = {"wd": 1e-4, "quantum": 1e-5}  # against a shrink of 1e-6 per step
LINEAR = {"wd": linear, "quantum": 0.005}
RATIO = {"wd": 0.01, "scale_by": "lr_ratio", "quantum": 0}
TWO = {"wd": {0: linear, 1: 1e-4}, "quantum": 1e-5}
MANUAL = {"manual": True}
IN_STEPS = {"epochs": None, "max_steps": 22}

LIGHTNING = {
    "deferred": (DEFERRED, adam, {}),
    "shorter last window": (LINEAR, adam, {"accumulate_grad_batches": 4, "epochs": 3}),
    "max_steps": (LINEAR, adam, {"batches": 12, **IN_STEPS}),
    "manual, max_steps": (LINEAR, adam, {"model": {**MANUAL, "steps": 2}, **IN_STEPS}),
    "manual, accumulation": (LINEAR, adam, {"model": {**MANUAL, "every": 2}}),
    "two optimizers": (TWO, two_adams, {"model": MANUAL}),
    "one cycle": (RATIO, partial(one_cycle, adam), {}),
    "without initial_lr": (RATIO, without_initial_lr, {}),
}


def checkpoints(package, path, make, *callbacks, **settings):
    """Trains to the end; returns the model, and the checkpoints after every other step."""
    save = package.callbacks.ModelCheckpoint(path, "{step}", every_n_train_steps=2, save_top_k=-1)
    model = fit(package, make, *callbacks, save, enable_checkpointing=True, **settings)
    return model, sorted(path.glob("*.ckpt"), key=lambda file: int(file.stem.split("=")[1]))


@pytest.mark.parametrize(("arguments", "make", "settings"), LIGHTNING.values(), ids=LIGHTNING)
def test_lightning_resumed_equals_uninterrupted(package, tmp_path, arguments, make, settings):
    decay = LightningWD(**arguments)
    whole, [first, second, *_, last] = checkpoints(package, tmp_path, make, decay, **settings)
    for path in (first, second, last):
        again = partial(fit, package, make, LightningWD(**arguments), resume=path, **settings)
        resumed, messages = caught(again)
        assert same(whole, resumed)
        assert messages == []


@pytest.mark.filterwarnings("ignore:.*no state")
@pytest.mark.parametrize("name", ["deferred", "without initial_lr"])
def test_the_resumed_state_matters(package, tmp_path, name):  # the negative control
    arguments, make, _ = LIGHTNING[name]
    decay = LightningWD(**arguments)
    whole, [_, path, *_] = checkpoints(package, tmp_path, make, decay)
    saved = torch.load(path, weights_only=True)
    del saved["callbacks"][decay.state_key]
    torch.save(saved, path)
    assert not same(whole, fit(package, make, LightningWD(**arguments), resume=path))


ONE_SIDED = {  # the callbacks before and after step 4, and the schedule that makes the same run
    "only now": ([], [LightningWD(linear, quantum=0)], lambda p: linear(p) * (p >= 4 / 12)),
    "no more": ([LightningWD(linear, quantum=0)], [], lambda p: linear(p) * (p < 4 / 12)),
}


@pytest.mark.parametrize(("before", "after", "schedule"), ONE_SIDED.values(), ids=ONE_SIDED)
def test_resumed_with_the_callback_on_one_side(package, tmp_path, before, after, schedule):
    # P9, P6
    make = partial(adam, weight_decay=0)
    checkpoints(package, tmp_path, make, *before)
    path = tmp_path / "step=4.ckpt"
    resumed, messages = caught(lambda: fit(package, make, *after, resume=path))
    assert same(resumed, fit(package, make, LightningWD(schedule, quantum=0)))
    said = [re.search("no state of this DecoupledWD.*after 4 steps", it) for it in messages]
    assert len(list(filter(None, said))) == len(after)


def test_lightning_arguments_win_over_the_checkpoint(package, tmp_path):
    _, [_, path, *_] = checkpoints(package, tmp_path, adam, LightningWD(0.1))

    def resume(*arguments, **options):
        return caught(lambda: fit(package, adam, LightningWD(*arguments, **options), resume=path))

    ours, [message] = resume(0.2)
    assert re.search(r"wd.*0\.1\b.*0\.2", message)
    # By its other name it has no state there, and nothing is deferred that makes a difference.
    stateless, [message] = resume(0.2, optimizers=0)
    assert "no state" in message
    assert same(ours, stateless)


@pytest.mark.parametrize(("wd", "warns"), [(linear, True), (0.1, False)])
def test_another_length_warns_if_a_schedule_depends_on_it(package, tmp_path, wd, warns):
    _, [path, *_] = checkpoints(package, tmp_path, adam, LightningWD(wd))
    _, messages = caught(partial(fit, package, adam, LightningWD(wd), resume=path, epochs=3))
    assert [("12" in it and "18" in it) for it in messages] == [True] * warns


def test_a_window_that_was_cut_keeps_its_position(package, tmp_path):  # P6
    class Notes(package.Callback):
        def __init__(self):
            self.shown = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")
            self.shown += decay.coefficients[0]

    settings = {"batches": 12, "epochs": 1, "accumulate_grad_batches": 4}
    decay = LightningWD(float)
    fit(package, adam, decay, Notes(), **settings)
    decay, notes = LightningWD(float), Notes()
    fit(package, adam, decay, notes, resume=tmp_path / "cut.ckpt", **settings)
    # The step before was made after four batches, although the run goes on with the seventh.
    assert notes.shown[1:] == [4 / 12, 4 / 12, 4 / 12, 4 / 12, 8 / 12]


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_resumed_equals_uninterrupted_beside_averaging(package, tmp_path, name):  # P9
    def run(*callbacks, **settings):
        callbacks = [LightningWD(**LINEAR), averaging(package, name), *callbacks]
        return fit(package, adam, *callbacks, epochs=3, **settings)

    save = package.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = run(save, enable_checkpointing=True)
    for epoch in range(2):
        assert same(whole, run(resume=tmp_path / f"epoch={epoch}.ckpt"))


NUMBERS = {
    "NumPy": {"wd": np.float32(1e-4), "quantum": np.float64(1e-5), "max_lr": np.float64(1)},
    "lists": {"wd": {0: [linear]}, "scale_by": ["lr_ratio"], "max_lr": (0.1,)},
}


@pytest.mark.parametrize("arguments", NUMBERS.values(), ids=NUMBERS)
def test_the_lightning_state_is_plain_numbers(package, tmp_path, arguments):
    decay = LightningWD(**arguments)
    model = fit(package, partial(adam, lr=torch.tensor(LR), foreach=False), decay)
    model.trainer.save_checkpoint(tmp_path / "whole.ckpt")
    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert checkpoint["callbacks"][decay.state_key] == decay.state_dict()
    assert json.dumps(decay.state_dict())  # raises if there is a tensor
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["weight_decay"] == INNER_WD  # P3


def test_the_state_key_depends_on_the_optimizers_alone():
    assert LightningWD(0.1).state_key == LightningWD(linear, scale_by="none").state_key
    assert LightningWD(0.1, optimizers=0).state_key == LightningWD(0.2, optimizers=[0]).state_key
    keys = {LightningWD(0.1, optimizers=o).state_key for o in (None, 0, 1, (0, 1), (1, 0))}
    assert len(keys) == 5


def test_a_second_fit_starts_with_nothing_deferred(package, tmp_path):  # P8
    arguments = {"wd": 1e-3, "quantum": 7e-5}  # against a shrink of 1e-5 per step

    def run(decay):
        # It saves before training starts, with whatever state there is, and comes back to that.
        finder = package.callbacks.LearningRateFinder(num_training_steps=3, update_attr=False)
        settings = {"batches": 12, "epochs": 1, "default_root_dir": tmp_path, "logger": True}
        settings["log_every_n_steps"] = 1
        return fit(package, adam, decay, finder, model={"lr": LR}, **settings)

    decay = LightningWD(**arguments)
    _, [_, path, *_] = checkpoints(package, tmp_path, adam, decay)
    evaluated = model_class(package)(adam)
    quiet_trainer(package, decay).validate(evaluated, loader(2), path, verbose=False)
    assert same(run(decay), run(LightningWD(**arguments)))


# fastai, which saves no state of callbacks


@pytest.mark.filterwarnings("ignore:.*")  # of fastai, on what it loads
def test_fastai_resumes_the_schedule(tmp_path):  # P9, P6
    schedule = Cosine(0.02, 0.002)
    decay = FastaiWD(schedule, scale_by="lr_ratio", quantum=0)
    whole, resumed = (learner(L2, batches=7, path=tmp_path) for _ in range(2))
    save = SaveModelCallback(every_epoch=True, with_opt=True, fname="epoch")
    whole.fit_one_cycle(4, cbs=[copy.copy(decay), save])
    resumed.load("epoch_1")
    assert {hyper["wd"] for hyper in resumed.opt.hypers} == {INNER_WD}  # P3
    resumed.fit_one_cycle(4, cbs=decay, start_epoch=2)
    expected = [schedule(i / 28) for i in range(28)]
    assert whole.recorder.hps["wd"] == expected
    assert resumed.recorder.hps["wd"] == expected[14:]
    assert different(state(whole), state(resumed)) == []


def test_a_copied_learner_trains_the_same():  # P9
    learn = learner(L2, cbs=FastaiWD(WD))
    for one in (learn, copy.deepcopy(learn)):
        one.fit(2)
        assert different(state(one), fitted(ADAMW)) == []
        assert one.decoupled_wd.learn is one


def test_export_and_load(tmp_path):  # P9, P3
    learn = learner(L2, cbs=FastaiWD(SchedCos(0.05, 0.5)), path=tmp_path)
    learn.fit(2)
    trained = state(learn)
    learn.export()
    assert learn.opt.hypers[0]["wd"] == INNER_WD
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pickle")
        loaded = load_learner(tmp_path / "export.pkl")
    assert loaded.opt is None
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
