"""A run that is killed and resumed ends with the same bits as one that was not (P9).

The programs in ``kill_and_resume/`` are killed with SIGKILL in the middle of a batch and while they
write a checkpoint. Each then resumes from the newest checkpoint that loads. Two other runs resume
from checkpoints of version 0.1.0.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys

import pytest
import torch
from helpers import caught, comparable, one_weight
from kill_and_resume import version_0_1_0 as runs
from kill_and_resume.kills import Kill, newest
from kill_and_resume.kills import run as run_program

from wd_callbacks.torch import DecoupledWD


def run(name, folder, **kill):
    """Runs a program in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"kill_and_resume.{name}"])
    process = context.Process(target=run_program, args=(name, folder), kwargs=kill)
    process.start()
    process.join(300)
    return process.exitcode


def most_deferred(state):
    """The most deferred decay of a parameter in a checkpoint."""
    if isinstance(state, (dict, list)):
        parts = state.values() if isinstance(state, dict) else state
        own = map(max, state["owed"]) if isinstance(state, dict) and "owed" in state else ()
        return max([0.0, *own, *map(most_deferred, parts)])
    return 0.0


KILLS = {
    # It resumes two batches after the second optimizer's last step.
    "lightning_run": [{"middle": 7}, {"saving": 15}],
    "plain_run": [{"middle": 17}, {"saving": 20}, {"middle": 40}],
}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch, name):
    # P9, P14, P15, P16
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    for kill in KILLS[name]:
        assert run(name, tmp_path, **kill) == -signal.SIGKILL
        path, state = newest(tmp_path)
        assert most_deferred(state) > 0  # else the program could do without it
        if "saving" in kill:  # half a file is passed over
            assert path != max(tmp_path.glob("*.ckpt"), key=lambda it: it.stat().st_mtime_ns)
    assert run(name, tmp_path) == 0
    (tmp_path / "whole").mkdir()
    program = importlib.import_module(f"kill_and_resume.{name}")
    whole = program.train(tmp_path / "whole", Kill())
    assert comparable(torch.load(tmp_path / "end.pt", weights_only=True)) == comparable(whole)


# Checkpoints of version 0.1.0


def known_to_0_1_0(state):
    """The part of a state that version 0.1.0 saved too."""
    arguments = ("wd", "scale_by", "max_lr", "exclude", "quantum")
    keys = ("steps", "total_steps", "owed", "payments", "due", "lr_max", "no_decay")
    arguments = {key: state["arguments"][key] for key in arguments}
    return {"arguments": arguments, **{key: state[key] for key in keys}}


def check_ends(resumed, whole, resumed_decay, whole_decay):
    """Checks weights, up to the arithmetic of other CPUs and versions of torch, and states."""
    torch.testing.assert_close(resumed, whole, rtol=1e-9, atol=1e-12)
    assert comparable(known_to_0_1_0(resumed_decay)) == comparable(known_to_0_1_0(whole_decay))


DEFERRED = [[True, False]] * 2  # which parameters have deferred decay, by group


def test_a_plain_checkpoint_of_version_0_1_0(recwarn):  # P9
    saved = torch.load(runs.PLAIN, weights_only=True)
    assert [[owed > 0 for owed in group] for group in saved["decay"]["owed"]] == DEFERRED
    now = runs.plain_run(None, runs.SAVED)["decay"]
    assert comparable(saved["decay"]) == comparable(known_to_0_1_0(now))
    resumed, whole = runs.plain_run(saved), runs.plain_run(None)
    assert not recwarn.list
    check_ends(resumed["model"], whole["model"], resumed["decay"], whole["decay"])


def test_a_lightning_checkpoint_of_version_0_1_0():  # P9
    [saved] = torch.load(runs.LIGHTNING, weights_only=True)["callbacks"].values()
    assert [[owed > 0 for owed in group] for group in saved[0]["owed"]] == DEFERRED
    (resumed, decay), messages = caught(lambda: runs.lightning_run(runs.LIGHTNING))
    (whole, whole_decay), _ = caught(lambda: runs.lightning_run(None))
    assert not [text for text in messages if "saved run" in text]
    check_ends(resumed, whole, decay[0], whole_decay[0])


def test_a_late_checkpoint_of_version_0_1_0_is_resumed_without_a_warning():  # P9
    """It does not say how high the learning rate was."""
    (_, first), (_, second) = one_weight(), one_weight()
    saved, resumed = (
        DecoupledWD(optimizer, 0.01, scale_by="lr_ratio", total_steps=100)
        for optimizer in (first, second)
    )
    for step in range(80):
        first.param_groups[0]["lr"] = 0.1 * (1 - step / 100)
        first.step()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(known_to_0_1_0(saved.state_dict()))
    second.step()
    resumed.detach()
