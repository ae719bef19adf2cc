"""A run that is killed and resumed ends with the same bits as one that was not.

The programs in ``kill_and_resume/`` run in processes of their own and are killed with SIGKILL: in
the middle of a batch, while they write a checkpoint, and from outside at any time. Each then
resumes from the newest checkpoint that loads.

The run in the test suite is short and always the same. A longer one kills each variant of each
program that many times, at other places each time:

    KILLS=6 pytest -n 2 tests/test_kill_and_resume.py -k many_kills
"""

from __future__ import annotations

import importlib
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import INNER_WD, batch_of, caught, comparable, network, same, weights
from torch.nn.functional import mse_loss

from wd_callbacks.schedules import Cosine
from wd_callbacks.torch import DecoupledWD

KILLS = int(os.environ.get("KILLS", "0"))

posix = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")


def module(name):
    return importlib.import_module(f"kill_and_resume.{name}")


# Killed and resumed


class Program:
    """A program that trains in ``folder``, in as many processes as it takes."""

    def __init__(self, name, variant, folder, rng):
        self.command = [sys.executable, "-m", f"kill_and_resume.{name}", variant, str(folder)]
        self.folder, self.rng = folder, rng

    def start(self, *options):
        # Lightning writes to a temporary file first: a kill may leave it there.
        env = {**os.environ, "TMPDIR": str(self.folder), "OMP_NUM_THREADS": "1"}
        command = [*self.command, *map(str, options)]
        with open(self.folder / "log", "w") as log:
            pipes = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
            return subprocess.Popen(command, cwd=Path(__file__).parent, env=env, **pipes)

    def run_until_killed(self, how, batch):
        """Runs until it is killed at ``batch`` or soon after; returns the last batch it reached."""
        if how == "outside":
            with self.start("--pause", 0.05) as process:
                at = batch
                for batch in map(int, process.stdout):
                    if batch == at:
                        time.sleep(self.rng.uniform(0, 0.1))
                        process.kill()
        else:
            with self.start(f"--{how}", batch) as process:
                process.communicate(timeout=300)
        self.check_end(process, -signal.SIGKILL)
        return batch

    def run_to_the_end(self):
        with self.start() as process:
            process.communicate(timeout=300)
        self.check_end(process, 0)
        return torch.load(self.folder / "end.pt", weights_only=True)

    def check_end(self, process, code):
        assert process.returncode == code, (self.folder / "log").read_text()

    def most_deferred(self):
        """The most deferred decay of a parameter in the checkpoint that is resumed next."""
        state = module("kills").newest(self.folder)[1]
        in_callbacks = [
            it for parts in state.get("callbacks", {}).values() for it in parts.values()
        ]
        states = [it for it in [*in_callbacks, *state.values()] if isinstance(it, dict)]
        return max((max(map(max, it["owed"])) for it in states if it.get("owed")), default=0.0)


def check_kills(name, variant, kills, folder, rng):
    """Kills the program in each of these ways, and compares its end with that of a whole run."""
    batches = module(name).BATCHES
    program = Program(name, variant, folder, rng)
    safe = batches - 13  # no checkpoint may follow after that
    reached, deferred = 0, 0.0
    for how, batch in zip(kills, sorted(rng.randrange(2, safe) for _ in kills)):
        reached = max(batch, reached)
        if reached >= safe:
            how = "middle"
        reached = program.run_until_killed(how, min(reached, batches - 1))
        if how == "saving":
            last = max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
            assert module("kills").newest(folder)[0] != last
        deferred = max(deferred, program.most_deferred())
    assert deferred > 0  # else the program could do without the state
    end = program.run_to_the_end()
    (folder / "whole").mkdir()
    whole = module(name).train(variant, folder / "whole", module("kills").Kill())
    assert comparable(end) == comparable(whole)


@posix
@pytest.mark.parametrize("variant", ["two optimizers", "anchors and keys"])
def test_a_plain_loop(tmp_path, variant):  # P9, P14, P15
    check_kills("plain_run", variant, ["middle", "outside"], tmp_path, random.Random(0))


@posix
def test_lightning(tmp_path):  # P9
    pytest.importorskip("pytorch_lightning")
    kills = ["middle", "saving", "outside"]
    # With this seed it resumes twice two batches after the second optimizer's last step.
    check_kills("lightning_run", "manual, two optimizers", kills, tmp_path, random.Random(21))


PLAIN = ["two optimizers", "anchors and keys", "bfloat16", "overflow"]
LIGHTNING = [
    *("manual, two optimizers", "manual, every third batch"),
    *("accumulation", "bf16-mixed", "bf16-true"),
]


@posix
@pytest.mark.skipif(not KILLS, reason="KILLS=6 kills every variant six times")
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *(("plain_run", it) for it in PLAIN),
        *(("lightning_run", it) for it in LIGHTNING),
    ],
)
def test_many_kills(tmp_path, name, variant):  # P9
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown if it fails
    rng = random.Random(seed)
    kills = rng.choices(["middle", "saving", "outside"], k=KILLS)
    check_kills(name, variant, kills, tmp_path, rng)


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
    resumed, _ = caught(lambda: fit(make, ours(linear, quantum=0), resume=path))
    assert same(resumed, fit(make, ours(late, quantum=0)))
    assert not same(resumed, fit(make, ours(linear, quantum=0)))


@pytest.mark.parametrize("had_callback", [False, True])
def test_a_warning_if_the_saved_run_had_no_callback(tmp_path, fit, ours, had_callback):  # P9
    path = checkpoint(tmp_path, fit, adam, *[ours(0.1)] * had_callback)
    for resume in (path, None):
        _, messages = caught(lambda resume=resume: fit(adam, ours(0.1), resume=resume))
        found = any("4 steps" in text for text in messages)
        assert found == (resume is not None and not had_callback)


def test_resumed_without_the_callback(tmp_path, fit, ours):  # P9, P3
    import pytorch_lightning as pl

    path = checkpoint(tmp_path, fit, adam, ours(0.1))
    own_wds = []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            own_wds.append(optimizer.param_groups[0]["weight_decay"])

    resumed, _ = caught(lambda: fit(adam, Watch(), resume=path))
    assert set(own_wds) == {INNER_WD}

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
    assert comparable(weights(resumed)) == comparable(weights(model))


# fastai, which saves no state of callbacks

BATCHES, EPOCHS = 7, 4


def train(learn, fit, decay, *others, **options):
    """Trains by the Learner's method ``fit``, with a checkpoint after each epoch."""
    from fastai.callback.tracker import SaveModelCallback

    save = SaveModelCallback(every_epoch=True, with_opt=True, fname="epoch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(learn, fit)(EPOCHS, cbs=[decay, save, *others], **options)
    return learn


def interrupted_and_resumed(new_learner, fit, decay, batch):
    """The weights when it resumes, and the Learner at the end, of a run killed in ``batch``."""
    from fastai_helpers import When, throw

    kill = When("after_backward", throw(KeyboardInterrupt), [batch])
    with pytest.raises(KeyboardInterrupt):
        train(new_learner(), fit, decay(), kill)
    resumed, epoch = new_learner(), batch // BATCHES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed.load(f"epoch_{epoch - 1}")
    assert {hyper["wd"] for hyper in resumed.opt.hypers} == {INNER_WD}  # P3
    at_resume = weights(resumed.model)
    return at_resume, train(resumed, fit, decay(), start_epoch=epoch)


@pytest.mark.parametrize("batch", [7, 20])
@pytest.mark.parametrize(
    ("fit", "scale_by"), [("fit", "lr"), ("fit_one_cycle", "lr"), ("fit_one_cycle", "lr_ratio")]
)
def test_fastai_resumes_the_schedule(tmp_path, fit, scale_by, batch):  # P9, P6
    helpers = pytest.importorskip("fastai_helpers")
    schedule = Cosine(0.02, 0.002)

    def decay():
        return helpers.DecoupledWD(schedule, scale_by=scale_by, quantum=0)

    def learner(path=tmp_path):
        return helpers.learner(helpers.L2, batches=BATCHES, path=path)

    whole = train(learner(tmp_path / "whole"), fit, decay())
    _, resumed = interrupted_and_resumed(learner, fit, decay, batch)
    expected = [schedule(i / (EPOCHS * BATCHES)) for i in range(EPOCHS * BATCHES)]
    assert whole.recorder.hps["wd"] == expected
    assert resumed.recorder.hps["wd"] == expected[batch // BATCHES * BATCHES :]
    assert comparable(resumed.model.state_dict()) == comparable(whole.model.state_dict())


def test_fastai_loses_the_deferred_decay(tmp_path):  # P9
    """Less than one quantum is lost for each weight and each resume, and nothing else."""
    helpers = pytest.importorskip("fastai_helpers")
    shrink = 0.05 * 2e-3

    def decay():
        return helpers.DecoupledWD(2e-3, quantum=10.5 * shrink)  # applied every eleven steps

    def learner(path=tmp_path):
        return helpers.still_learner(opt_func=helpers.L2, batches=BATCHES, path=path)

    def steps(weight):
        """How many steps' decay was applied."""
        return weight.log().mean().item() / math.log1p(-shrink)

    whole = train(learner(tmp_path / "whole"), "fit", decay())
    assert steps(whole.model[0].weight) == pytest.approx(22)  # of 28; 6 are deferred
    (at_resume,), resumed = interrupted_and_resumed(learner, "fit", decay, 17)
    assert steps(at_resume) == pytest.approx(11)  # of 14; 3 are deferred, and lost
    assert steps(resumed.model[0].weight) == pytest.approx(11 + 11)  # of 14 more

    each_epoch = learner()  # resumes before enough has added up
    for epoch in range(EPOCHS):
        each_epoch.fit(epoch + 1, cbs=decay(), start_epoch=epoch)
    assert steps(each_epoch.model[0].weight) == 0
    each_epoch.fit(1, cbs=helpers.DecoupledWD(2e-3, quantum=0))
    assert steps(each_epoch.model[0].weight) == pytest.approx(BATCHES)


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
