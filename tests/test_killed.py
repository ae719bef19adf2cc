"""Runs that are killed and go on from what they find end with the same bits as one that was not.

The programs in ``killed/`` are started as processes of their own and killed with SIGKILL: in the
middle of a batch, while they write a checkpoint, and from outside at any time. Each next life goes
on from the newest checkpoint that loads.

The run of the test suite is bounded and always the same. A longer one kills every variant of every
program that many times, at other places at every run:

    KILLS=6 pytest -n 2 tests/test_killed.py -k survives
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
from torch import nn
from torch.nn.functional import mse_loss

from wd_callbacks.schedules import Cosine

HERE = Path(__file__).parent
KILLS = int(os.environ.get("KILLS", "0"))

posix = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")


def differences(ours, theirs, at="."):
    """Where two nested states are not the same, to the bit and to the type."""
    if type(ours) is not type(theirs):
        return [f"{at}: {type(ours)} and {type(theirs)}"]
    if isinstance(ours, dict):
        if list(ours) != list(theirs):
            return [f"{at}: {list(ours)} and {list(theirs)}"]
        return [it for key in ours for it in differences(ours[key], theirs[key], f"{at}/{key}")]
    if isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs):
            return [f"{at}: {len(ours)} and {len(theirs)} elements"]
        pairs = enumerate(zip(ours, theirs))
        return [it for i, pair in pairs for it in differences(*pair, f"{at}/{i}")]
    if isinstance(ours, torch.Tensor):
        equal = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    else:
        equal = ours == theirs
    return [] if equal else [f"{at}: {ours} and {theirs}"]


# Killed and resumed


class Victim:
    """A program that trains in ``folder``, in as many lives as it takes."""

    def __init__(self, name, variant, folder, rng):
        self.command = [sys.executable, "-m", f"killed.{name}", variant, str(folder)]
        self.folder, self.rng = folder, rng
        self.kills = importlib.import_module("killed.kills")

    def start(self, *options):
        # Lightning writes to a temporary file first: a kill may leave it there.
        env = {**os.environ, "TMPDIR": str(self.folder), "OMP_NUM_THREADS": "1"}
        with open(self.folder / "log", "w") as log:
            return subprocess.Popen(
                [*self.command, *map(str, options)],
                cwd=HERE,
                env=env,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def die(self, end, batch):
        """Lives until it is killed, at ``batch`` or soon after; tells the last one it came to."""
        if end == "outside":
            with self.start("--pause", 0.05) as process:
                at = batch
                for batch in map(int, process.stdout):
                    if batch == at:
                        time.sleep(self.rng.uniform(0, 0.1))
                        process.kill()
        else:
            with self.start(f"--{end}", batch) as process:
                process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, (self.folder / "log").read_text()
        return batch

    def live(self):
        """Lives to the end; gives what it comes to."""
        with self.start() as process:
            process.communicate(timeout=300)
        assert process.returncode == 0, (self.folder / "log").read_text()
        return torch.load(self.folder / "end.pt", weights_only=True)

    def owed(self):
        """The most that a parameter owes in the checkpoint with which the next life starts."""
        state = self.kills.newest(self.folder)[1]
        callbacks = state.get("callbacks", {}).values()
        of_callbacks = [part for parts in callbacks for part in parts.values()]
        parts = [it for it in [*of_callbacks, *state.values()] if isinstance(it, dict)]
        return max((max(map(max, it["owed"])) for it in parts if it.get("owed")), default=0.0)


def survives(name, variant, ends, folder, rng):
    """Kills the program once for each of ``ends``, and compares what it and an unkilled come to."""
    program = importlib.import_module(f"killed.{name}")
    victim = Victim(name, variant, folder, rng)
    safe = program.BATCHES - 13  # after that there may be no checkpoint more
    reached, owed = 0, 0.0
    for end, batch in zip(ends, sorted(rng.randrange(2, safe) for _ in ends)):
        reached = max(batch, reached)
        if reached >= safe:
            end = "kill"
        reached = victim.die(end, min(reached, program.BATCHES - 1))
        if end == "tear":
            last = max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
            assert victim.kills.newest(folder)[0] != last
        owed = max(owed, victim.owed())
    assert owed > 0  # else its next life would have done without the state
    killed = victim.live()
    (folder / "whole").mkdir()
    whole = program.train(variant, folder / "whole", victim.kills.Fate())
    assert differences(killed, whole) == []


@posix
def test_a_plain_loop_survives(tmp_path):  # P9
    survives("plain_run", "two optimizers", ["kill", "outside"], tmp_path, random.Random(0))


@posix
def test_lightning_survives(tmp_path):  # P9
    pytest.importorskip("pytorch_lightning")
    ends = ["kill", "tear", "outside"]
    # With this seed it resumes twice where the second optimizer's last step is two batches ago.
    survives("lightning_run", "manual, two optimizers", ends, tmp_path, random.Random(21))


DEEP = [
    *(("plain_run", it) for it in ("two optimizers", "bfloat16", "overflow")),
    ("lightning_run", "manual, two optimizers"),
    ("lightning_run", "manual, every third batch"),
    *(("lightning_run", it) for it in ("accumulation", "bf16-mixed", "bf16-true")),
]


@posix
@pytest.mark.skipif(not KILLS, reason="KILLS=6 kills every variant six times")
@pytest.mark.parametrize(("name", "variant"), DEEP)
def test_survives_many(tmp_path, name, variant):  # P9
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown where it fails
    rng = random.Random(seed)
    ends = rng.choices(["kill", "tear", "outside"], k=KILLS)
    survives(name, variant, ends, tmp_path, rng)


# With the callback on one side of the checkpoint only


WD, LR, OWN = 0.1, 0.01, 0.37  # OWN: the inner optimizer's, which would show if it were used


def adam(module, weight_decay=OWN):
    return torch.optim.Adam(module.parameters(), lr=LR, weight_decay=weight_decay)


def half(tmp_path, make, *callbacks):
    """A checkpoint of Lightning after 4 of 12 batches, from a run with ``callbacks``."""
    models = pytest.importorskip("lightning_models")
    (package, *_) = models.PACKAGES
    save = package.callbacks.ModelCheckpoint(
        tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}"
    )
    models.fit(package, make, *callbacks, save, enable_checkpointing=True)
    return package, tmp_path / "step=4.ckpt"


def heard(action):
    """The result of ``action``, and all that was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, [str(warning.message) for warning in caught]


@pytest.fixture
def ours():
    return pytest.importorskip("wd_callbacks.lightning").DecoupledWD


def test_a_run_without_it_goes_on_with_it(tmp_path, ours):  # P9, P6
    from lightning_models import fit, same

    def linear(progress):
        return WD * (1 - progress)

    def late(progress):
        return linear(progress) * (progress >= 4 / 12)

    make = partial(adam, weight_decay=0)
    package, path = half(tmp_path, make)
    resumed, _ = heard(lambda: fit(package, make, ours(linear, quantum=0), resume=path))
    assert same(resumed, fit(package, make, ours(late, quantum=0)))
    assert not same(resumed, fit(package, make, ours(linear, quantum=0)))


def test_a_run_without_it_that_goes_on_with_it_is_told(tmp_path, ours):  # P9
    from lightning_models import fit

    package, path = half(tmp_path, adam)
    _, told = heard(lambda: fit(package, adam, ours(WD), resume=path))
    assert [text for text in told if "decay begins here, after 4 steps" in text]


def test_a_run_that_goes_on_is_told_nothing(tmp_path, ours):  # P9
    from lightning_models import fit

    package, path = half(tmp_path, adam, ours(WD))
    for resume in (path, None):
        _, told = heard(lambda resume=resume: fit(package, adam, ours(WD), resume=resume))
        assert not [text for text in told if "begins here" in text]


def test_a_run_with_it_goes_on_without_it(tmp_path, ours):  # P9, P3
    from lightning_models import batch_of, fit, network, weights

    package, path = half(tmp_path, adam, ours(WD))
    seen = []

    class Watch(package.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            seen.append(optimizer.param_groups[0]["weight_decay"])

    resumed, told = heard(lambda: fit(package, adam, Watch(), resume=path))
    assert seen
    assert set(seen) == {OWN}
    assert [text for text in told if "Please add the following callbacks" in text]

    checkpoint = torch.load(path, weights_only=True)
    model = network()
    states = zip(model.parameters(), checkpoint["state_dict"].values())
    for p, saved in states:
        p.data.copy_(saved)
    optimizer = adam(model)
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    for batch in range(4, 12):
        x, y = batch_of(*divmod(batch, 6))
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    assert differences(weights(resumed), weights(model)) == []


# fastai, which saves no state of callbacks


BS, BATCHES, EPOCHS = 4, 7, 4


def learner(path, zero=False):
    """A Learner of fastai; ``zero`` gradients leave the weights, all ones, to the decay."""
    pytest.importorskip("fastai")
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import Adam

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))
    xs = torch.randn(BS * BATCHES, 3, generator=torch.Generator().manual_seed(1))
    if zero:
        model, xs = nn.Linear(3, 1, bias=False).double(), xs.double()
        nn.init.ones_(model.weight)
    data = [(x, x[:1] * x[1:2]) for x in xs]
    dls = DataLoaders.from_dsets(
        data, data[: 2 * BS], bs=BS, shuffle=False, device="cpu", num_workers=0
    )

    def loss(predictions, targets):
        return mse_loss(predictions, targets).float() * (0 if zero else 1)

    optimizer = partial(Adam, wd=OWN, decouple_wd=False)
    learn = Learner(dls, model, loss, opt_func=optimizer, lr=0.05, path=path)
    learn.remove_cbs(ProgressCallback)
    learn.logger = lambda *_: None
    return learn


def train(learn, fit, decay, *others, **settings):
    """Trains by the Learner's method ``fit`` with a checkpoint after each epoch."""
    from fastai.callback.tracker import SaveModelCallback

    save = SaveModelCallback(every_epoch=True, with_opt=True, fname="epoch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(learn, fit)(EPOCHS, cbs=[decay, save, *others], **settings)
    return learn


def interrupted(learn, fit, decay, batch):
    """The same, until the process would have been killed in the middle of a ``batch``."""
    from fastai.callback.core import Callback

    class Killer(Callback):
        def after_backward(self):
            if self.epoch * BATCHES + self.iter == batch:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(learn, fit, decay, Killer())


def decay_of_fastai(*args, **kwargs):
    return pytest.importorskip("wd_callbacks.fastai").DecoupledWD(*args, **kwargs)


@pytest.mark.parametrize("killed", [7, 20])
@pytest.mark.parametrize(
    ("fit", "scale_by"), [("fit", "lr"), ("fit_one_cycle", "lr"), ("fit_one_cycle", "lr_ratio")]
)
def test_fastai_goes_on_in_the_schedule(tmp_path, fit, scale_by, killed):  # P9, P6
    def decay():
        return decay_of_fastai(Cosine(0.02, 0.002), scale_by=scale_by, quantum=0)

    whole = train(learner(tmp_path / "whole"), fit, decay())
    interrupted(learner(tmp_path), fit, decay(), killed)

    epoch = killed // BATCHES  # those that are over
    resumed = learner(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed.load(f"epoch_{epoch - 1}")
    assert {hyper["wd"] for hyper in resumed.opt.hypers} == {OWN}  # P3
    train(resumed, fit, decay(), start_epoch=epoch)
    expected = [Cosine(0.02, 0.002)(i / (EPOCHS * BATCHES)) for i in range(EPOCHS * BATCHES)]
    assert whole.recorder.hps["wd"] == expected
    assert resumed.recorder.hps["wd"] == expected[epoch * BATCHES :]
    assert differences(resumed.model.state_dict(), whole.model.state_dict()) == []


def test_fastai_forgets_what_was_owed(tmp_path):  # P9
    """Less than one quantum for each weight and each resume, and nothing else, is lost."""
    shrink = 0.05 * 2e-3
    quantum = 10.5 * shrink  # eleven steps come together
    steps = -math.log1p(-shrink)

    def decay():
        return decay_of_fastai(2e-3, quantum=quantum)

    def applied(learn):
        return -learn.model.weight.log().mean().item() / steps

    whole = train(learner(tmp_path / "whole", zero=True), "fit", decay())
    assert applied(whole) == pytest.approx(22)  # of 28, and 6 are owed

    interrupted(learner(tmp_path, zero=True), "fit", decay(), 17)
    resumed = learner(tmp_path, zero=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed.load("epoch_1")
    assert applied(resumed) == pytest.approx(11)  # of 14: 3 are owed, and forgotten
    train(resumed, "fit", decay(), start_epoch=2)
    assert applied(resumed) == pytest.approx(11 + 11)  # of 14 more

    one_by_one = learner(tmp_path, zero=True)  # a resume before ever so much has come together
    for epoch in range(EPOCHS):
        one_by_one.fit(epoch + 1, cbs=decay(), start_epoch=epoch)
    assert applied(one_by_one) == 0
    one_by_one.fit(1, cbs=decay_of_fastai(2e-3, quantum=0))
    assert applied(one_by_one) == pytest.approx(BATCHES)


# Checkpoints of version 0.1.0


def close(ours, theirs):
    """Whether the weights are the same up to the arithmetic of other CPUs and versions of torch."""
    return list(ours) == list(theirs) and all(
        torch.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-12) for name in ours
    )


def test_a_plain_checkpoint_of_version_0_1_0_goes_on(recwarn):  # P9
    runs = importlib.import_module("killed.version_0_1_0")
    saved = torch.load(runs.PLAIN, weights_only=True)
    owed = saved["decay"]["owed"]
    assert [[debt > 0 for debt in group] for group in owed] == [[True, False]] * 2
    now = runs.plain_run(None, runs.SAVED)["decay"]
    assert now.pop("progress") == pytest.approx((now["steps"] - 1) / now["total_steps"])
    assert differences(saved["decay"], now) == []
    resumed, whole = runs.plain_run(saved), runs.plain_run(None)
    assert not recwarn.list
    assert differences(resumed["decay"], whole["decay"]) == []
    assert close(resumed["model"], whole["model"])
    del saved["decay"]["due"]
    with pytest.raises(ValueError, match="lacks due"):
        runs.plain_run(saved)


def test_a_checkpoint_of_lightning_of_version_0_1_0_goes_on():  # P9
    pytest.importorskip("pytorch_lightning")
    runs = importlib.import_module("killed.version_0_1_0")
    (saved,) = torch.load(runs.LIGHTNING, weights_only=True)["callbacks"].values()
    assert [[debt > 0 for debt in group] for group in saved[0]["owed"]] == [[True, False]] * 2
    (model, decay), told = heard(lambda: runs.lightning_run(runs.LIGHTNING))
    (whole, theirs), _ = heard(lambda: runs.lightning_run(None))
    assert not [text for text in told if "saved run" in text]
    assert differences(decay, theirs) == []
    assert close(model, whole)
