"""Training on several processes, against AdamW in the same setting: bit for bit, on every process.

The programs in ``processes/`` are started as torchrun would start them, two processes each, with
gloo on the CPU. Each of them runs many scenarios, as most of the time goes into starting.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from lightning_models import model_class, network, quiet_trainer, same
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Adam, AdamW

from wd_callbacks.torch import DecoupledWD

HERE = Path(__file__).parent
LIMIT = 300  # seconds for a program, which needs a tenth of that alone on two cores
LR, WD, IMPORTANT = 0.01, 0.1, 0.37

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
]
gloo = pytest.mark.skipif(
    sys.platform == "win32"
    or not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="there is no gloo",
)


# Starting the programs


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def launch(program, folder, processes):
    """Runs a program to its end, or to that of our patience; its output is in ``folder``."""
    folder.mkdir()
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # else FSDP2 would shard over GPUs
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        with open(folder / f"log{rank}", "w") as log:
            command = [sys.executable, "-m", f"processes.{program}", str(folder)]
            env = {**os.environ, **shared, **own}
            started.append(
                subprocess.Popen(
                    command, cwd=HERE, env=env, stdout=log, stderr=log, start_new_session=True
                )
            )
    deadline = time.monotonic() + LIMIT
    try:
        for process in started:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in started:  # and what they have started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def ends(tmp_path_factory):
    """Gives what a scenario came to in each process. A program runs once for all tests."""
    pytest.importorskip("torch.distributed.fsdp")
    from processes.fsdp2 import RUNS_ON_CPUS

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    @functools.cache
    def results(program, processes):
        folder = shared / f"processes-{program}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                launch(program, folder, processes)
        logs = [folder / f"log{rank}" for rank in range(processes)]
        paths = [folder / f"rank{rank}.pt" for rank in range(processes)]
        saved = [torch.load(path) if path.exists() else {} for path in paths]
        return list(zip(saved, [log.read_text()[-3000:] for log in logs]))

    def came_to(program, scenario, processes=2):
        if "fsdp2" in scenario and not RUNS_ON_CPUS:
            pytest.skip("FSDP2 needs a GPU before torch 2.6")
        found = []
        for rank, (saved, log) in enumerate(results(program, processes)):
            end = saved.get(scenario, f"it did not come to that:\n{log}")
            assert not isinstance(end, str), f"process {rank}: {end}"
            found.append(end)
        return found

    return came_to


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def check(processes, whole=True):
    """Ours are AdamW's bits, in every process the same where each holds the ``whole`` model."""
    for end in processes:
        assert equal(end["ours"], end["adamw"])
        assert not equal(end["ours"], end["undecayed"])
        if whole:
            assert equal(end["ours"], processes[0]["ours"])


# Lightning


@gloo
@pytest.mark.parametrize(
    "scenario",
    [
        "ddp",
        "ddp_by_default",
        "ddp_manual",
        "ddp_in_the_other_package",
        "ddp_accumulation_and_one_cycle",
        "ddp_bf16",
        "ddp_schedule",
        "fsdp2",
    ],
)
def test_lightning_equals_adamw(ends, scenario):  # P4, P12
    check(ends("lightning_run", scenario))


@gloo
def test_lightning_flattened_equals_adamw(ends):  # P4, P12
    check(ends("lightning_run", "fsdp1"), whole=False)


@gloo
def test_lightning_logs_and_prints_on_rank_zero_alone(ends):  # P7, P13
    first, second = ends("lightning_run", "ddp_schedule")
    assert [coefficient for it, _ in first["told"] for coefficient in it.values()] == first["used"]
    assert [step for _, step in first["told"]] == list(range(8))
    assert second["told"] == []
    assert first["used"] == second["used"]
    assert first["printed"].count("1 / shrink") == 1
    assert second["printed"] == ""


@gloo
@pytest.mark.parametrize("scenario", ["ddp_resumed", "fsdp2_resumed"])
def test_lightning_resumed_equals_uninterrupted(ends, scenario):  # P9, P12
    first, second = ends("lightning_run", scenario)
    for end in (first, second):
        assert equal(end["resumed"], end["whole"])
        assert not equal(end["forgetful"], end["whole"])
        assert equal(end["whole"], first["whole"])
        assert end["states"][0] == end["states"][1] == first["states"][0]


@gloo
def test_lightning_that_starts_its_own_processes(ends):  # P4, P12
    (spawned,) = ends("spawning", "ddp_fork", processes=1)
    assert equal(spawned["ours"], ends("lightning_run", "ddp")[0]["adamw"])
    assert spawned["attached"] == {}


# FSDP2


@gloo
@pytest.mark.parametrize(
    "scenario",
    [
        "fsdp2_for_loop",
        "fsdp2_foreach",
        "fsdp2_by_default",
        "fsdp2_beside_plain_tensors",
        "fsdp2_overflow",
        "fsdp2_grad_scaler",
    ],
)
def test_fsdp2_equals_adamw(ends, scenario):  # P1, P4, P12
    check(ends("sharded", scenario))


@gloo
def test_fsdp2_shards_unevenly(ends):
    """What the tests above are about: of some parameters a process holds nothing."""
    first, second = ends("sharded", "fsdp2_for_loop")
    assert first["rows"] == [3, 3, 3, 3, 3, 3, 1, 1]
    assert second["rows"] == [2, 2, 2, 2, 2, 2, 0, 0]


@gloo
@pytest.mark.parametrize("scenario", ["fsdp2_over_several_meshes", "fsdp2_and_tensor_parallel"])
def test_fsdp2_beside_another_mesh_equals_adamw(ends, scenario):  # P4, P5, P12
    check(ends("sharded", scenario))


@gloo
@pytest.mark.parametrize(
    ("scenario", "prefixes"),
    [
        ("fsdp2_excludes", ("trunk.0._checkpoint_wrapped_module.", "branch._orig_mod.")),
        ("ddp_excludes", ("module.trunk.0._checkpoint_", "module.branch._orig_mod.")),
        ("compiled_ddp_excludes", ("_orig_mod.module.trunk.0._checkpoint_wrapped_module.",)),
        ("fsdp1_excludes", ("_fsdp_wrapped_module.trunk._fsdp_wrapped_module.0.",)),
        ("zero_excludes", ("module.branch.",)),
    ],
)
def test_excludes_by_the_names_without_wrappers(ends, scenario, prefixes):  # P7, P12
    processes = ends("sharded", scenario)
    check(processes, whole=scenario != "fsdp1_excludes")
    for prefix in prefixes:
        assert any(name.startswith(prefix) for name in processes[0]["names"])


@gloo
def test_fsdp2_resumed_equals_uninterrupted(ends):  # P9, P12
    first, second = ends("sharded", "fsdp2_resumed")
    assert first["state"] == second["state"]
    assert first["end"] == second["end"]
    assert len(set(first["state"]["owed"][0])) > 1  # not all parameters owe the same
    assert min(first["state"]["owed"][0]) >= 0
    for end in (first, second):
        assert equal(end["resumed"], end["whole"])
        assert not equal(end["forgetful"], end["whole"])
        assert equal(end["whole"], first["whole"])


@gloo
def test_fsdp2_pays_debts_as_one_process_does(ends):  # P8, P12
    for end in ends("sharded", "fsdp2_with_debts"):
        assert equal(end["ours"], end["alone"])
        assert not equal(end["ours"], end["start"])


# FSDP1


@gloo
@pytest.mark.parametrize("scenario", ["fsdp1_flattened", "fsdp1_by_name"])
def test_fsdp1_equals_adamw(ends, scenario):  # P4, P12
    check(ends("sharded", scenario))


@gloo
def test_fsdp1_refuses_to_exclude_from_what_is_flattened(ends):  # P10, P12
    for told in ends("sharded", "fsdp1_flattened_excludes"):
        assert list(told) == ["wrapped", "inner"]
        for message in told.values():
            assert "FSDP has flattened them: wrap the model with use_orig_params=True" in message


@gloo
def test_fsdp1_resumed_by_each_process_s_own_state(ends):  # P9, P12
    for end in ends("sharded", "fsdp1_resumed"):
        assert equal(end["by its own"], end["whole"])


@gloo
def test_fsdp1_resumed_by_the_state_of_process_0(ends):  # P9, P12
    first, second = ends("sharded", "fsdp1_resumed")
    assert first["owed"] == second["owed"]
    assert equal(second["by process 0's"], second["whole"])


# DDP and ZeRO


@gloo
def test_ddp_with_parameters_that_are_not_always_used(ends):  # P2, P12
    first, second = ends("sharded", "ddp_unused")
    check([first, second])
    (ours, state), (theirs, other) = first["owing"], second["owing"]
    assert equal(ours, theirs)
    assert state == other
    assert len(set(state["owed"][0])) > 1


@gloo
@pytest.mark.parametrize("scenario", ["zero_of_adam", "zero_in_buckets"])
def test_zero_equals_adamw(ends, scenario):  # P3, P4, P12
    check(ends("sharded", scenario))


@gloo
def test_zero_that_steps_inside_backward_is_refused(ends):  # P5, P10
    for end in ends("sharded", "zero_overlapped"):
        assert end["told"] is not None
        assert "overlap_with_ddp=False" in end["told"]


@gloo
def test_local_sgd(ends):  # P4, P5
    processes = ends("sharded", "local_sgd")
    for end in processes:
        assert end["told"][0].endswith("attach the decay to its 'optim'")
    check(processes)


# Fabric and Accelerate


@gloo
@pytest.mark.parametrize("attached", ["before", "wrapped", "raw"])
@pytest.mark.parametrize(
    "scenario",
    [
        "fabric_ddp",
        "fabric_ddp_bf16",
        "accelerate_ddp",
        "accelerate_ddp_bf16",
        "accelerate_skips",
        "accelerate_skips_fused",
    ],
)
def test_wrapped_optimizers(ends, scenario, attached):  # P1, P4, P5, P6, P12
    processes = [end[attached] for end in ends("wrapped", scenario)]
    check(processes)
    # Once for each step: four of them, also where two batches each are accumulated. GradScaler does
    # not call the optimizer's step where it overflows, unless that is fused.
    seen = [0.0, 0.25, 0.5] if scenario == "accelerate_skips" else [0.0, 0.25, 0.5, 0.75]
    assert [end["progress"] for end in processes] == [seen, seen]


# DeepSpeed, of which only the outlines matter here


class DeepSpeedZeroOptimizer:
    """As DeepSpeed's, for one process: it is no torch optimizer, though it holds one.

    That one steps on flattened copies of the weights, which come back into the model, and it does
    so for one param group after another.
    """

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.own = [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            vector = parameters_to_vector(group["params"])
            group["params"] = [nn.Parameter(vector.detach().clone())]

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state

    def step(self):
        groups = self.param_groups
        for group, params in zip(groups, self.own):
            (flat,) = group["params"]
            flat.grad = parameters_to_vector([p.grad for p in params])
            self.optimizer.param_groups = [group]
            self.optimizer.step()
            vector_to_parameters(flat.data, params)
        self.optimizer.param_groups = groups


def under_deepspeed(cls, wds, decay=None, steps=6):
    """Trains biases and other parameters in a group each where there are two ``wds``."""
    model = network()
    kinds = [[p for p in model.parameters() if p.ndim > 1], []]
    kinds[len(wds) - 1] += [p for p in model.parameters() if p.ndim == 1]
    optimizer = cls(
        [{"params": ps, "weight_decay": wd} for ps, wd in zip(kinds, wds)], lr=LR, foreach=False
    )
    if decay is not None:
        decay(optimizer, model)
    engine = DeepSpeedZeroOptimizer(optimizer)
    for step in range(steps):
        model.zero_grad()
        model(torch.full((2, 6), 0.1 * step)).square().mean().backward()
        engine.step()
    return model


def test_deepspeed_s_wrapper_is_refused():  # P5, P10
    optimizer = DeepSpeedZeroOptimizer(Adam(network().parameters()))
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer, got DeepSpeedZeroOptimizer"):
        DecoupledWD(optimizer, WD)


def in_lightning():
    """What DeepSpeedStrategy leaves as the Trainer's optimizer."""
    import lightning.pytorch
    from lightning.pytorch.strategies import SingleDeviceStrategy

    from wd_callbacks.lightning import DecoupledWD

    class Strategy(SingleDeviceStrategy):
        def setup_optimizers(self, trainer):
            super().setup_optimizers(trainer)
            self.optimizers = [DeepSpeedZeroOptimizer(it) for it in self.optimizers]

    package = lightning.pytorch
    model = model_class(package)(lambda module: Adam(module.parameters(), lr=LR))
    trainer = quiet_trainer(
        package, DecoupledWD(WD), strategy=Strategy(device="cpu"), max_epochs=1, accelerator="auto"
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.arange(2), batch_size=1))


def test_deepspeed_s_wrapper_is_refused_in_lightning():  # P5, P10
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer, got DeepSpeedZeroOptimizer"):
        in_lightning()


def test_deepspeed_s_wrapper_is_refused_with_what_to_use_instead():  # P5, P10
    with pytest.raises(TypeError, match=r"got DeepSpeedZeroOptimizer, .* AdamW.* fully_shard"):
        in_lightning()


def test_what_deepspeed_wraps_later_decays_as_adamw():  # P4
    ours = under_deepspeed(Adam, [IMPORTANT], lambda it, model: DecoupledWD(it, WD, quantum=0))
    assert same(ours, under_deepspeed(AdamW, [WD]))
    assert not same(ours, under_deepspeed(AdamW, [0.0]))


def test_an_optimizer_that_is_stepped_one_param_group_at_a_time_is_refused():  # P5, P10
    attached = []

    def attach(optimizer, model):
        attached.append(([p.detach().clone() for p in model.parameters()], model, optimizer))
        DecoupledWD(optimizer, WD)

    with pytest.raises(ValueError, match=r"1 param groups, but had 2, .* DeepSpeed's"):
        under_deepspeed(Adam, [IMPORTANT, 0.0], attach)
    before, model, optimizer = attached[0]
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.param_groups[0]["weight_decay"] == IMPORTANT


def test_exclude_tells_where_deepspeed_has_flattened_the_weights():  # P7, P12
    def attach(optimizer, model):
        DecoupledWD(optimizer, WD, exclude="*", model=model)

    with pytest.warns(UserWarning, match="exclude goes by the model's names"):
        under_deepspeed(Adam, [0.0], attach)
