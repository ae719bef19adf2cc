"""Training on several processes is AdamW's in the same setting, to the bit, on each of them (P12).

``python -m processes`` runs all scenarios in two processes, with gloo on the CPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch
import pytest
import torch
import torch.distributed
from filelock import FileLock
from helpers import INNER_WD, network, same
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_helpers import LR, WD, adam, fit
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Adam, AdamW

from wd_callbacks.lightning import DecoupledWD as LightningWD
from wd_callbacks.torch import DecoupledWD

HERE = Path(__file__).parent
LIMIT = 300  # seconds; a tenth of that is needed on two cores


def launch(folder):
    """Runs the scenarios to their end, or to that of our patience; what they print is a log."""
    folder.mkdir()
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # else FSDP2 would shard over GPUs
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    command = [sys.executable, "-m", "processes", str(folder)]
    with open(folder / "log", "w") as log:
        streams = {"stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen(command, cwd=HERE, env=env, **streams)
    try:
        process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):  # and what it has started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def ends(tmp_path_factory):
    """Gives what a scenario came to in each process. They run once for all tests."""
    distributed = torch.distributed
    if sys.platform == "win32" or not (
        distributed.is_available() and distributed.is_gloo_available()
    ):
        pytest.skip("there is no gloo")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "processes"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            launch(folder)
    paths = [folder / f"rank{rank}.pt" for rank in range(2)]
    saved = [torch.load(path) if path.exists() else {} for path in paths]
    missing = f"it did not come to that:\n{(folder / 'log').read_text()[-6000:]}"

    def came_to(scenario):
        if "fsdp2" in scenario and not hasattr(fsdp, "fully_shard"):
            pytest.skip("FSDP2 needs a GPU before torch 2.6")
        found = [each.get(scenario, missing) for each in saved]
        for rank, end in enumerate(found):
            assert not isinstance(end, str), f"process {rank}: {end}"
        return found

    return came_to


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


PARTS = ("lightning_fsdp1", "fsdp1_resumed")  # scenarios in which each process holds a part
AGAINST_ADAMW = [
    *("ddp", "ddp_manual", "ddp_schedule", "lightning_fsdp2", "lightning_fsdp1"),
    *("fsdp2", "fsdp2_later", "fsdp2_over_several_meshes", "fsdp1_flattened"),  # P11
    *("fsdp2_grad_scaler", "ddp_unused"),  # P1, P2
    *("fsdp2_excludes", "compiled_ddp_excludes", "fsdp1_excludes", "zero_excludes"),  # P3, P7
    *("fsdp2_deferred", "fsdp2_anchored"),  # P8, P15; against one process
]


@pytest.mark.parametrize("scenario", AGAINST_ADAMW)
def test_equals_adamw(ends, scenario):  # P4, P5, P12
    """In every process the same, if each holds the whole model."""
    first, second = ends(scenario)
    for end in (first, second):
        assert equal(end["ours"], end["expected"])
        assert not equal(end["ours"], end["undecayed"])
    assert scenario in PARTS or equal(first["ours"], second["ours"])


RUNS = ("ddp", "lightning_fsdp2", "fsdp2", "fsdp1", "ddp_unused")


@pytest.mark.parametrize("scenario", [f"{run}_resumed" for run in RUNS])
def test_resumed_equals_uninterrupted(ends, scenario):  # P8, P9, P12
    first, second = ends(scenario)
    for end in (first, second):
        assert equal(end["resumed"], end["whole"])
        assert not equal(end["forgetful"], end["whole"])
        assert end["states"] == [first["states"][0]] * 2
    assert scenario in PARTS or equal(first["whole"], second["whole"])
    if scenario in ("fsdp2_resumed", "ddp_unused_resumed"):  # P2: a branch pauses now and then
        assert len(set(first["states"][0]["owed"][0])) > 1


def test_lightning_logs_and_prints_on_rank_zero_alone(ends):  # P7, P13
    first, second = ends("ddp_schedule")
    assert [value for metrics, _ in first["notes"] for value in metrics.values()] == first["used"]
    assert [step for _, step in first["notes"]] == list(range(8))
    assert second["notes"] == []
    assert first["used"] == second["used"]
    assert first["printed"].count("group") == 1
    assert second["printed"] == ""


def test_lightning_that_starts_its_own_processes(ends):  # P4, P12
    assert equal(ends("ddp_fork")[0]["ours"], ends("ddp")[0]["expected"])


REMEDIES = {
    "names of flattened parameters": "use_orig_params=True",
    "names inside of the wrapper": "use_orig_params=True",
    "updates inside backward": "overlap_with_ddp=False",
    "no hooks": "attach to its 'optim'",
    "initial anchors": "pass a mapping as anchor",
}


@pytest.mark.parametrize("scenario", ["refused", "fsdp2_refused"])
def test_refuses_with_a_remedy(ends, scenario):  # P5, P10, P15
    for end in ends(scenario):
        assert end
        for case, message in end.items():
            assert REMEDIES[case] in message


# DeepSpeed's wrapper, rebuilt as far as it matters here


class DeepSpeedZeroOptimizer:
    """As DeepSpeed's, for one process: it is no torch optimizer, though it holds one.

    That one steps on flattened copies of the weights, which come back into the model, and it does
    so for one param group after another.
    """

    def __init__(self, optimizer):
        self.optimizer, self.state = optimizer, optimizer.state
        self.param_groups = optimizer.param_groups
        self.own = [group["params"] for group in self.param_groups]
        for group in self.param_groups:
            group["params"] = [nn.Parameter(parameters_to_vector(group["params"]).detach())]

    def step(self):
        for group, params in zip(self.param_groups, self.own):
            (flat,) = group["params"]
            flat.grad = parameters_to_vector([p.grad for p in params])
            self.optimizer.param_groups = [group]
            self.optimizer.step()
            vector_to_parameters(flat.data, params)


def under_deepspeed(cls, *wds, attach=lambda optimizer, model: None):
    """Trains a layer for each of the ``wds``, in a param group of its own."""
    model = network()
    layers = (model[0], model[2])
    groups = [{"params": list(it.parameters()), "weight_decay": wd} for it, wd in zip(layers, wds)]
    optimizer = cls(groups, lr=LR, foreach=False)
    attach(optimizer, model)
    engine = DeepSpeedZeroOptimizer(optimizer)
    for step in range(6):
        model.zero_grad()
        model(torch.full((2, 6), 0.1 * step)).square().mean().backward()
        engine.step()
    return model


def test_deepspeed_s_wrapper_is_refused_in_lightning():  # P5, P10
    """Its DeepSpeedStrategy leaves the wrapper as the Trainer's optimizer."""

    class Strategy(SingleDeviceStrategy):
        def setup_optimizers(self, trainer):
            super().setup_optimizers(trainer)
            self.optimizers = [DeepSpeedZeroOptimizer(it) for it in self.optimizers]

    strategy = {"strategy": Strategy(device="cpu"), "accelerator": "auto", "epochs": 1}
    with pytest.raises(TypeError, match="(?s)DeepSpeedZeroOptimizer.*AdamW.*fully_shard"):
        fit(lightning.pytorch, adam, LightningWD(WD), **strategy)


def test_an_optimizer_that_deepspeed_wraps_later_decays_as_adamw():  # P4
    ours = under_deepspeed(
        Adam, INNER_WD, attach=lambda optimizer, _: DecoupledWD(optimizer, WD, quantum=0)
    )
    assert same(ours, under_deepspeed(AdamW, WD))
    assert not same(ours, under_deepspeed(AdamW, 0.0))


def test_an_optimizer_that_is_stepped_one_param_group_at_a_time_is_refused():  # P5, P10
    with pytest.raises(ValueError, match=r"param groups.*DeepSpeed"):
        under_deepspeed(Adam, INNER_WD, 0.0, attach=lambda it, _: DecoupledWD(it, WD))


def test_exclude_warns_if_deepspeed_has_flattened_the_weights():  # P7, P12
    with pytest.warns(UserWarning, match="exclude"):
        under_deepspeed(
            Adam, 0.0, attach=lambda it, model: DecoupledWD(it, WD, exclude="*", model=model)
        )
