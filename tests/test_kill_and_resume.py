"""A run that is killed and resumed ends with the same bits as one that was not.

The programs in ``kill_and_resume/`` are killed with SIGKILL: in the middle of a batch, while they
write a checkpoint, and from outside. Each then resumes from the newest checkpoint that loads.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from functools import partial

import pytest
import torch
from helpers import INNER_WD, batch_of, caught, comparable, network, same
from torch.nn.functional import mse_loss

from wd_callbacks.schedules import Cosine
from wd_callbacks.torch import DecoupledWD


def module(name):
    return importlib.import_module(f"kill_and_resume.{name}")


# Killed and resumed


def run(name, folder, until=None, **kill):
    """Runs a program to its end, or kills it once the file ``until`` exists; returns its exit code.

    Each run is a process of its own, forked from one that has imported everything.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"kill_and_resume.{name}"])
    process = context.Process(target=module("kills").run, args=(name, folder), kwargs=kill)
    process.start()
    while until is not None and process.is_alive() and not (folder / until).exists():
        time.sleep(0.01)
    if until is not None:
        process.kill()
    process.join(300)
    return process.exitcode


def most_deferred(state):
    """The most deferred decay of a parameter in a checkpoint."""
    if isinstance(state, (dict, list)):
        parts = state.values() if isinstance(state, dict) else state
        own = map(max, state["owed"]) if isinstance(state, dict) and "owed" in state else ()
        return max([0.0, *own, *map(most_deferred, parts)])
    return 0.0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
@pytest.mark.parametrize(
    ("name", "kills"),
    [
        # It resumes two batches after the second optimizer's last step.
        ("lightning_run", [{"middle": 7}, {"saving": 15}]),
        ("plain_run", [{"middle": 17}, {"saving": 20}, {"until": "batch=30.ckpt", "pause": 0.02}]),
    ],
    ids=["Lightning", "a plain loop"],
)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch, name, kills):
    # P9, P14, P15, P16
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    newest = module("kills").newest
    for kill in kills:
        assert run(name, tmp_path, **kill) == -signal.SIGKILL
        path, state = newest(tmp_path)
        assert most_deferred(state) > 0  # else the program could do without it
        if "saving" in kill:  # half a file is passed over
            assert path != max(tmp_path.glob("*.ckpt"), key=lambda it: it.stat().st_mtime_ns)
    assert run(name, tmp_path) == 0
    (tmp_path / "whole").mkdir()
    whole = module(name).train(tmp_path / "whole", module("kills").Kill())
    assert comparable(torch.load(tmp_path / "end.pt", weights_only=True)) == comparable(whole)


# Lightning, with the callback on one side of the checkpoint only


@pytest.fixture
def ours():
    return pytest.importorskip("wd_callbacks.lightning").DecoupledWD


@pytest.fixture
def fit():
    helpers = pytest.importorskip("lightning_helpers")
    return partial(helpers.fit, pytest.importorskip("pytorch_lightning"))


def adam(module, weight_decay=INNER_WD):
    return torch.optim.Adam(module.parameters(), lr=0.01, weight_decay=weight_decay)


def checkpoint(tmp_path, fit, make, *callbacks):
    """The checkpoint of a Lightning run with ``callbacks`` after 4 of 12 batches: its path."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    save = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit(make, *callbacks, save, enable_checkpointing=True)
    return tmp_path / "step=4.ckpt"


def test_resumed_with_the_callback_only_now(tmp_path, fit, ours):  # P9, P6
    def linear(progress):
        return 0.1 * (1 - progress)

    def late(progress):
        return linear(progress) * (progress >= 4 / 12)

    make = partial(adam, weight_decay=0)
    path = checkpoint(tmp_path, fit, make)
    with pytest.warns(UserWarning, match="no state of this DecoupledWD.*after 4 steps"):
        resumed = fit(make, ours(linear, quantum=0), resume=path)
    assert same(resumed, fit(make, ours(late, quantum=0)))
    assert not same(resumed, fit(make, ours(linear, quantum=0)))


def test_resumed_without_the_callback(tmp_path, fit, ours):  # P9, P3
    path = checkpoint(tmp_path, fit, adam, ours(0.1))
    resumed, _ = caught(lambda: fit(adam, resume=path))
    saved = torch.load(path, weights_only=True)
    model = network()
    for p, value in zip(model.parameters(), saved["state_dict"].values()):
        p.data.copy_(value)
    optimizer = adam(model)
    optimizer.load_state_dict(saved["optimizer_states"][0])
    for batch in range(4, 12):
        x, y = batch_of(*divmod(batch, 6))
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    assert same(resumed, model)


# fastai, which saves no state of callbacks

BATCHES, EPOCHS = 7, 4


def train(learn, fit, decay, *others, **options):
    """Trains by the Learner's method ``fit``, with a checkpoint after each epoch."""
    from fastai.callback.tracker import SaveModelCallback

    save = SaveModelCallback(every_epoch=True, with_opt=True, fname="epoch")
    getattr(learn, fit)(EPOCHS, cbs=[decay, save, *others], **options)


@pytest.mark.filterwarnings("ignore:.*")  # of fastai, on what it loads
@pytest.mark.parametrize(
    ("fit", "scale_by", "batch"), [("fit", "lr", 7), ("fit_one_cycle", "lr_ratio", 20)]
)
def test_fastai_resumes_the_schedule(tmp_path, fit, scale_by, batch):  # P9, P6
    helpers = pytest.importorskip("fastai_helpers")
    schedule = Cosine(0.02, 0.002)

    def decay():
        return helpers.DecoupledWD(schedule, scale_by=scale_by, quantum=0)

    def learner(path=tmp_path):
        return helpers.learner(helpers.L2, batches=BATCHES, path=path)

    whole, interrupted, resumed = learner(tmp_path / "whole"), learner(), learner()
    train(whole, fit, decay())
    kill = helpers.When("after_backward", helpers.throw(KeyboardInterrupt), [batch])
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, fit, decay(), kill)
    epoch = batch // BATCHES
    resumed.load(f"epoch_{epoch - 1}")
    assert {hyper["wd"] for hyper in resumed.opt.hypers} == {INNER_WD}  # P3
    train(resumed, fit, decay(), start_epoch=epoch)
    expected = [schedule(i / (EPOCHS * BATCHES)) for i in range(EPOCHS * BATCHES)]
    assert whole.recorder.hps["wd"] == expected
    assert resumed.recorder.hps["wd"] == expected[epoch * BATCHES :]
    assert comparable(resumed.model.state_dict()) == comparable(whole.model.state_dict())


# Checkpoints of version 0.1.0


def check_close(ours, theirs):
    """Up to the arithmetic of other CPUs and versions of torch."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def known_to_0_1_0(state):
    """The part of a state that version 0.1.0 saved too."""
    arguments = ("wd", "scale_by", "max_lr", "exclude", "quantum")
    keys = ("steps", "total_steps", "owed", "payments", "due", "lr_max", "no_decay")
    arguments = {key: state["arguments"][key] for key in arguments}
    return {"arguments": arguments, **{key: state[key] for key in keys}}


DEFERRED = [[True, False]] * 2  # which parameters have deferred decay, by group


def test_a_plain_checkpoint_of_version_0_1_0(recwarn):  # P9
    runs = module("version_0_1_0")
    saved = torch.load(runs.PLAIN, weights_only=True)
    assert [[owed > 0 for owed in group] for group in saved["decay"]["owed"]] == DEFERRED
    now = runs.plain_run(None, runs.SAVED)["decay"]
    assert comparable(saved["decay"]) == comparable(known_to_0_1_0(now))
    resumed, whole = runs.plain_run(saved), runs.plain_run(None)
    assert not recwarn.list
    resumed_state, whole_state = (known_to_0_1_0(it["decay"]) for it in (resumed, whole))
    assert comparable(resumed_state) == comparable(whole_state)
    check_close(resumed["model"], whole["model"])


def test_a_late_checkpoint_of_version_0_1_0_is_resumed_without_a_warning():  # P9
    """It does not say how high the learning rate was."""

    def build():
        p = torch.nn.Parameter(torch.ones(2))
        p.grad = torch.zeros(2)
        optimizer = torch.optim.SGD([p], lr=0.1)
        lr = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        decay = DecoupledWD(optimizer, 0.01, scale_by="lr_ratio", total_steps=100)
        return optimizer, lr, decay

    parts, resumed = build(), build()
    for _ in range(80):
        parts[0].step()
        parts[1].step()
    for part, new in zip(parts, resumed):
        state = part.state_dict()
        new.load_state_dict(known_to_0_1_0(state) if new is resumed[2] else state)
    resumed[0].step()
    resumed[2].detach()


def test_a_lightning_checkpoint_of_version_0_1_0():  # P9
    pytest.importorskip("pytorch_lightning")
    runs = module("version_0_1_0")
    (saved,) = torch.load(runs.LIGHTNING, weights_only=True)["callbacks"].values()
    assert [[owed > 0 for owed in group] for group in saved[0]["owed"]] == DEFERRED
    (model, decay), messages = caught(lambda: runs.lightning_run(runs.LIGHTNING))
    (whole, theirs), _ = caught(lambda: runs.lightning_run(None))
    assert not [text for text in messages if "saved run" in text]
    assert comparable(known_to_0_1_0(decay[0])) == comparable(known_to_0_1_0(theirs[0]))
    check_close(model, whole)
