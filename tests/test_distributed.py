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
from helpers import INNER_WD, network, same, weights
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_helpers import LR, WD, adam, fit
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD, Adam, AdamW

from wd_callbacks.lightning import DecoupledWD as LightningWD
from wd_callbacks.torch import DecoupledWD

HERE = Path(__file__).parent
LIMIT = 300  # seconds; a tenth of that is needed on two cores

gloo = pytest.mark.skipif(
    sys.platform == "win32"
    or not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="there is no gloo",
)


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
def folder(tmp_path_factory):
    """What the scenarios saved. They run once for all tests."""
    pytest.importorskip("torch.distributed.fsdp")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "processes"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            launch(folder)
    return folder


@pytest.fixture(scope="session")
def ends(folder):
    """Gives what a scenario came to in each process."""
    from processes.fsdp2 import RUNS_ON_CPUS

    paths = [folder / f"rank{rank}.pt" for rank in range(2)]
    saved = [torch.load(path) if path.exists() else {} for path in paths]
    missing = f"it did not come to that:\n{(folder / 'log').read_text()[-6000:]}"

    def came_to(scenario):
        if "fsdp2" in scenario and not RUNS_ON_CPUS:
            pytest.skip("FSDP2 needs a GPU before torch 2.6")
        found = [each.get(scenario, missing) for each in saved]
        for rank, end in enumerate(found):
            assert not isinstance(end, str), f"process {rank}: {end}"
        return found

    return came_to


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


SHARDS = ("lightning_fsdp1", "fsdp1_excludes")  # in which each process holds a part


def check(processes, scenario):
    """Ours are AdamW's bits, in every process the same if each holds the whole model."""
    for end in processes:
        assert equal(end["ours"], end["adamw"])
        assert not equal(end["ours"], end["undecayed"])
        if scenario not in SHARDS:
            assert equal(end["ours"], processes[0]["ours"])


SCENARIOS = [
    *("ddp", "ddp_manual", "ddp_in_the_other_package", "ddp_accumulation_and_one_cycle"),
    *("ddp_schedule", "lightning_fsdp1", "lightning_fsdp2"),
    *("fsdp2_for_loop", "fsdp2_foreach", "fsdp2_beside_plain_tensors", "fsdp2_grad_scaler"),  # P1
    *("fsdp2_over_several_meshes", "fsdp2_and_tensor_parallel", "fsdp1_flattened"),
    *("ddp_unused", "zero_in_buckets", "local_sgd"),  # P2, P3
]


@gloo
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_equals_adamw(ends, scenario):  # P4, P5, P12
    check(ends(scenario), scenario)


@gloo
def test_lightning_logs_and_prints_on_rank_zero_alone(ends):  # P7, P13
    first, second = ends("ddp_schedule")
    assert [value for metrics, _ in first["notes"] for value in metrics.values()] == first["used"]
    assert [step for _, step in first["notes"]] == list(range(8))
    assert second["notes"] == []
    assert first["used"] == second["used"]
    assert first["printed"].count("group") == 1
    assert second["printed"] == ""


@gloo
def test_lightning_that_starts_its_own_processes(ends, folder):  # P4, P12
    spawned = torch.load(folder / "ddp_fork.pt")
    assert equal(spawned["ours"], ends("ddp")[0]["adamw"])
    assert spawned["attached"] == {}


@gloo
@pytest.mark.parametrize("scenario", ["ddp_resumed", "lightning_fsdp2_resumed", "fsdp2_resumed"])
def test_resumed_equals_uninterrupted(ends, scenario):  # P9, P12
    first, second = ends(scenario)
    for end in (first, second):
        assert equal(end["resumed"], end["whole"])
        assert not equal(end["forgetful"], end["whole"])
        assert equal(end["whole"], first["whole"])
    if scenario == "fsdp2_resumed":
        assert first["state"] == second["state"]
        assert first["end"] == second["end"]
        assert len(set(first["state"]["owed"][0])) > 1  # it differs between parameters
    else:
        assert first["states"] == second["states"] == [first["states"][0]] * 2


@gloo
@pytest.mark.parametrize(
    ("scenario", "prefixes"),
    [
        ("fsdp2_excludes", ("trunk.0._checkpoint_wrapped_module.", "branch._orig_mod.")),
        ("compiled_ddp_excludes", ("_orig_mod.module.trunk.0._checkpoint_wrapped_module.",)),
        ("fsdp1_excludes", ("_fsdp_wrapped_module.trunk._fsdp_wrapped_module.0.",)),
        ("zero_excludes", ("module.branch.",)),
    ],
)
def test_excludes_by_the_names_without_wrappers(ends, scenario, prefixes):  # P7, P12
    processes = ends(scenario)
    check(processes, scenario)
    for prefix in prefixes:
        assert any(name.startswith(prefix) for name in processes[0]["names"])


@gloo
def test_deferred_decay_is_applied_as_in_one_process(ends):  # P2, P8, P12
    for end in ends("fsdp2_deferred"):
        assert equal(end["ours"], end["alone"])
        assert not equal(end["ours"], end["start"])
    (ours, state), (theirs, other) = (end["deferred"] for end in ends("ddp_unused"))
    assert equal(ours, theirs)
    assert state == other
    assert len(set(state["owed"][0])) > 1


@gloo
def test_fsdp2_decays_towards_a_full_state_dict(ends):  # P12, P15
    for end in ends("fsdp2_anchored"):
        assert equal(end["ours"], end["alone"])
        assert not equal(end["ours"], end["start"])
        assert "pass a mapping as anchor" in end["refused"]


@gloo
def test_fsdp1_resumed_by_its_own_state_and_by_that_of_process_0(ends):  # P9, P12
    first, second = ends("fsdp1_resumed")
    assert first["state"] == second["state"]
    for end in (first, second):
        assert equal(end["by its own"], end["whole"])
    assert equal(second["by process 0's"], second["whole"])


@gloo
@pytest.mark.parametrize(
    ("scenario", "key", "remedy"),
    [
        ("fsdp1_flattened_excludes", "wrapped", "use_orig_params=True"),
        ("fsdp1_flattened_excludes", "inner", "use_orig_params=True"),
        ("zero_overlapped", "refusal", "overlap_with_ddp=False"),
        ("local_sgd", "refusal", "optim"),
    ],
)
def test_refuses_with_a_remedy(ends, scenario, key, remedy):  # P5, P10
    for end in ends(scenario):
        assert remedy in end[key]


# One process


@pytest.fixture
def mesh():
    """A group of one process, inside this one."""
    fsdp2 = pytest.importorskip("processes.fsdp2", exc_type=ImportError)
    if not fsdp2.RUNS_ON_CPUS:
        pytest.skip("FSDP2 needs a GPU before torch 2.6")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def whole(model):
    """Copies of the weights, and which of them are sharded."""
    is_sharded = [hasattr(p, "full_tensor") for p in model.parameters()]
    params = zip(model.parameters(), is_sharded)
    return weights(p.full_tensor() if it else p for p, it in params), is_sharded


@pytest.mark.parametrize(
    ("reshard", "foreach"), [(True, False), (False, True)], ids=["resharded", "left whole"]
)
def test_parameters_that_are_sharded_anew_decay_as_adamw_s(mesh, reshard, foreach):  # P11, P12
    from processes.fsdp2 import fully_shard

    def run(cls, wd, decays=False):
        model = network()
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd, foreach=foreach)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        for step in range(6):
            optimizer.zero_grad()
            model(torch.full((2, 6), 1.0 + step)).square().mean().backward()
            optimizer.step()
            if step == 3:
                model[0].unshard()
                model[0].reshard()
        after, is_sharded = whole(model)
        assert all(is_sharded)
        return after

    ours = run(Adam, INNER_WD, decays=True)
    assert equal(ours, run(AdamW, WD))
    assert not equal(ours, run(Adam, 0.0))


def test_parameters_that_become_sharded_while_training_decay_on(mesh):  # P11, P12
    """The tensor type changes under the decay, and another Parameter takes the place."""
    from processes.fsdp2 import fully_shard

    def run(decays):
        model = network()
        optimizer = SGD(model.parameters(), lr=LR, foreach=False)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        for step in range(4):
            if step == 2:
                fully_shard(model[2], mesh=mesh)
                optimizer.param_groups[0]["params"] = list(model.parameters())
            optimizer.zero_grad()
            model(torch.full((2, 6), 0.1 * step)).square().mean().backward()
            if not decays:
                for p in model.parameters():
                    p.data.mul_(1 - LR * WD)
            optimizer.step()
        after, is_sharded = whole(model)
        assert is_sharded == [False, False, True, True]
        return after

    assert equal(run(True), run(False))


# DeepSpeed's wrapper, rebuilt as far as it matters here


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


def under_deepspeed(cls, wds, decay=lambda optimizer, model: None):
    """Trains biases and other parameters in a group each where there are two ``wds``."""
    model = network()
    kinds = [[p for p in model.parameters() if p.ndim > 1], []]
    kinds[len(wds) - 1] += [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": ps, "weight_decay": wd} for ps, wd in zip(kinds, wds)]
    optimizer = cls(groups, lr=LR, foreach=False)
    decay(optimizer, model)
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
    ours = under_deepspeed(Adam, [INNER_WD], lambda it, model: DecoupledWD(it, WD, quantum=0))
    assert same(ours, under_deepspeed(AdamW, [WD]))
    assert not same(ours, under_deepspeed(AdamW, [0.0]))


def test_an_optimizer_that_is_stepped_one_param_group_at_a_time_is_refused():  # P5, P10
    attached = []

    def attach(optimizer, model):
        attached.append((weights(model), model, optimizer))
        DecoupledWD(optimizer, WD)

    with pytest.raises(ValueError, match=r"param groups.*DeepSpeed"):
        under_deepspeed(Adam, [INNER_WD, 0.0], attach)
    before, model, optimizer = attached[0]
    assert same(before, model)
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD


def test_exclude_warns_if_deepspeed_has_flattened_the_weights():  # P7, P12
    def attach(optimizer, model):
        DecoupledWD(optimizer, WD, exclude="*", model=model)

    with pytest.warns(UserWarning, match="exclude"):
        under_deepspeed(Adam, [0.0], attach)
