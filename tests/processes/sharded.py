"""Sharded and replicated models in plain loops: FSDP2, FSDP1, ZeRO and DDP."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from processes.common import (
    IMPORTANT,
    LR,
    WD,
    batch_of,
    main,
    network,
    rank,
    scenario,
    three_runs,
    values,
)
from processes.fsdp2 import DTensor, Replicate, fully_shard
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.model_averaging import averagers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

from wd_callbacks.torch import DecoupledWD

EXCLUDE = ["bias", "norm", "branch.w*"]
EXCLUDED = {"trunk.0.bias", "trunk.1.weight", "trunk.1.bias", "branch.weight", "branch.bias"}
EXCLUDED |= {"head.bias"}


def sharded() -> nn.Module:
    """The network in three units of FSDP2."""
    model = network()
    for module in (model.trunk, model.branch, model):
        fully_shard(module)
    return model


def steps(
    model: nn.Module,
    optimizer: Any,
    batches: Any,
    branch: Any = lambda index: True,
    of: int | None = None,
) -> None:
    """The plain loop."""
    for index in batches:
        x, y = batch_of(index, of)
        mse_loss(model(x, branch(index)), y).backward()
        optimizer.step()
        optimizer.zero_grad()


# FSDP2


def fsdp2(foreach: bool, quantum: float | None) -> dict[str, Any]:
    def train(cls: Any, wd: float, decays: bool) -> Any:
        model = sharded()
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd, foreach=foreach)
        if decays:
            DecoupledWD(optimizer, WD, quantum=quantum)
        steps(model, optimizer, range(6))
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert optimizer.param_groups[0]["weight_decay"] == wd
        return values(model.parameters())

    rows = [p.to_local().shape[0] for p in sharded().parameters()]
    return {**three_runs(train), "rows": rows}


@scenario
def fsdp2_for_loop() -> Any:
    return fsdp2(False, 0)


@scenario
def fsdp2_foreach() -> Any:
    return fsdp2(True, 0)


@scenario
def fsdp2_by_default() -> Any:
    return fsdp2(False, None)


def wrapped(compiled: bool = True) -> nn.Module:
    """With an activation checkpoint around one module and the compiler around another."""
    model = network()
    model.trunk[0] = checkpoint_wrapper(model.trunk[0])
    if compiled:
        model.branch = torch.compile(model.branch, backend="eager")
    return model


def split(model: nn.Module, cls: Any, wd: float, excluded: Any = EXCLUDED, **settings: Any) -> Any:
    """An optimizer with the decay in the groups, by the names that an unwrapped model has."""
    names = [name for name, _ in network().named_parameters()]
    params = list(model.parameters())
    assert len(names) == len(params)
    groups = [
        {"params": [p], "weight_decay": 0.0 if name in excluded else wd}
        for name, p in zip(names, params)
    ]
    return cls(groups, lr=LR, **settings)


def excludes(wrap: Any) -> dict[str, Any]:
    """Against AdamW in which the excluded parameters have a group without decay."""

    def train(cls: Any, wd: float, decays: bool) -> Any:
        model = wrap()
        if decays:
            optimizer = cls(model.parameters(), lr=LR, weight_decay=wd)
            DecoupledWD(optimizer, WD, quantum=0, exclude=EXCLUDE, model=model)
        else:
            optimizer = split(model, cls, wd)
        steps(model, optimizer, range(4))
        return values(model.parameters())

    names = [name for name, _ in wrap().named_parameters()]
    return {**three_runs(train), "names": names}


@scenario
def fsdp2_excludes() -> Any:
    def wrap() -> nn.Module:
        model = wrapped()
        for module in (model.trunk, model.branch, model):
            fully_shard(module)
        return model

    return excludes(wrap)


@scenario
def ddp_excludes() -> Any:
    return excludes(lambda: DistributedDataParallel(wrapped()))


@scenario
def compiled_ddp_excludes() -> Any:
    torch._dynamo.config.optimize_ddp = False  # torch 2.4 cannot split what is checkpointed

    def wrap() -> nn.Module:
        return torch.compile(DistributedDataParallel(wrapped(compiled=False)), backend="eager")

    return excludes(wrap)


@scenario
def fsdp2_resumed() -> Any:
    """With debts that differ, as the branch is left out now and then, and are paid now and then."""
    quantum = 2.5e-3  # against a shrink of 1e-3

    def start() -> Any:
        model = sharded()
        optimizer = Adam(model.parameters(), lr=LR, weight_decay=IMPORTANT)
        return model, optimizer, DecoupledWD(optimizer, WD, quantum=quantum)

    def go_on(model: nn.Module, optimizer: Any, _: Any, batches: Any) -> None:
        steps(model, optimizer, batches, branch=lambda index: index % 4 != 2)

    parts = start()
    go_on(*parts, range(8))
    state = copy.deepcopy([part.state_dict() for part in parts])
    go_on(*parts, range(8, 14))

    def resumed(owed: bool) -> Any:
        again = start()
        for part, saved in zip(again, state):
            if owed or not isinstance(part, DecoupledWD):
                part.load_state_dict(saved)
        go_on(*again, range(8, 14))
        return values(again[0].parameters())

    return {
        "state": state[2],
        "end": parts[2].state_dict(),
        "whole": values(parts[0].parameters()),
        "resumed": resumed(True),
        "forgetful": resumed(False),
    }


@scenario
def fsdp2_with_debts() -> Any:
    """Against a model that is not sharded, where the decay alone changes the weights."""
    quantum, branch = 2.5e-3, lambda index: index % 4 != 2

    def decayed(model: nn.Module) -> Any:
        optimizer = Adam(model.parameters(), lr=LR, weight_decay=IMPORTANT)
        DecoupledWD(optimizer, WD, quantum=quantum)
        for index in range(14):
            x, _ = batch_of(index)
            (model(x, branch(index)).sum() * 0).backward()
            optimizer.step()
            optimizer.zero_grad()
        return values(model.parameters())

    ends = {"ours": decayed(sharded()), "alone": decayed(network())}
    return {**ends, "start": values(network().parameters())}


@scenario
def fsdp2_beside_plain_tensors() -> Any:
    """A unit of FSDP2 and parameters that are nowhere sharded, in one param group."""

    def train(cls: Any, wd: float, decays: bool) -> Any:
        model = network()
        fully_shard(model.trunk)
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd, foreach=False)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        for index in range(6):
            x, y = batch_of(index)
            mse_loss(model(x), y).backward()
            for p in (*model.branch.parameters(), *model.head.parameters()):
                dist.all_reduce(p.grad)
            optimizer.step()
            optimizer.zero_grad()
        assert {isinstance(p, DTensor) for p in model.parameters()} == {False, True}
        return values(model.parameters())

    return three_runs(train)


@scenario
def fsdp2_overflow() -> Any:
    """What a gradient scaler tells a fused optimizer."""

    def train(cls: Any, wd: float, decays: bool) -> Any:
        model = sharded()
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd, fused=True)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        for index in range(6):
            x, y = batch_of(index)
            mse_loss(model(x), y).backward()
            optimizer.grad_scale = None
            optimizer.found_inf = torch.tensor(float(index % 3 == 0))
            optimizer.step()
            optimizer.zero_grad()
        return values(model.parameters())

    return three_runs(train)


@scenario
def fsdp2_over_several_meshes() -> Any:
    """As where experts are sharded over other processes than the rest of the model."""
    whole = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))

    def train(cls: Any, wd: float, decays: bool) -> Any:
        model = network()
        fully_shard(model.branch, mesh=hybrid)
        fully_shard(model, mesh=whole)
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd, foreach=False)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        steps(model, optimizer, range(6))
        return values(model.parameters())

    return three_runs(train)


@scenario
def fsdp2_and_tensor_parallel() -> Any:
    """A layer that is split over the processes, which see the same data, beside others."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))

    def train(cls: Any, wd: float, decays: bool) -> Any:
        model = network()
        by_column = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(model.branch, mesh["tensor"], by_column)
        fully_shard(model, mesh=mesh["data"])
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        steps(model, optimizer, range(6), of=0)
        return values(model.parameters())

    return three_runs(train)


@scenario
def fsdp2_grad_scaler() -> Any:
    """The first gradients overflow, in process 1 alone."""

    def train(cls: Any, wd: float, decays: bool) -> Any:
        model = sharded()
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        for index in range(6):
            x, y = batch_of(index)
            loss = mse_loss(model(x), y) * (torch.inf if rank() == 1 and index % 3 == 0 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 2.0**18
        return values(model.parameters())

    return three_runs(train)


# FSDP1


def fsdp1(exclude: Any = (), **settings: Any) -> dict[str, Any]:
    def train(cls: Any, wd: float, decays: bool) -> Any:
        model = network()
        model.trunk = FullyShardedDataParallel(
            model.trunk, device_id=torch.device("cpu"), **settings
        )
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **settings)
        if decays:
            optimizer = cls(model.parameters(), lr=LR, weight_decay=wd)
            DecoupledWD(optimizer, WD, quantum=0, exclude=exclude, model=model)
        elif exclude:
            optimizer = split(model, cls, wd)
        else:
            optimizer = cls(model.parameters(), lr=LR, weight_decay=wd)
        steps(model, optimizer, range(6))
        names[:] = [name for name, _ in model.named_parameters()]
        with FullyShardedDataParallel.summon_full_params(model):
            return values(model.parameters())

    names: list[str] = []
    return {**three_runs(train), "names": names}


@scenario
def fsdp1_flattened() -> Any:
    return fsdp1(use_orig_params=False)


@scenario
def fsdp1_by_name() -> Any:
    return fsdp1(use_orig_params=True)


@scenario
def fsdp1_excludes() -> Any:
    return fsdp1(EXCLUDE, use_orig_params=True)


@scenario
def fsdp1_flattened_excludes() -> Any:
    inner = network()
    model = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=False)
    told = {}
    for name, named in (("wrapped", model), ("inner", inner)):
        optimizer = Adam(model.parameters(), lr=LR)
        try:
            DecoupledWD(optimizer, WD, exclude="bias", model=named)
        except ValueError as error:
            told[name] = str(error)
    return told


@scenario
def fsdp1_resumed() -> Any:
    """With the debts that this process has noted, and with those that process 0 has.

    Each process has a gradient only for the parameters of which it holds a part.
    """

    def start() -> Any:
        model = FullyShardedDataParallel(
            network(), device_id=torch.device("cpu"), use_orig_params=True
        )
        steps(model, torch.optim.SGD(model.parameters(), lr=0.0), [0])  # it shards when it is used
        optimizer = Adam(model.parameters(), lr=LR, weight_decay=IMPORTANT)
        return model, optimizer, DecoupledWD(optimizer, WD, quantum=2.5e-3)

    model, optimizer, decay = start()
    steps(model, optimizer, range(5))
    weights = values(model.parameters())
    state, owed = copy.deepcopy((optimizer.state_dict(), decay.state_dict()))
    steps(model, optimizer, range(5, 9))

    def resumed(owed: Any) -> Any:
        model, optimizer, decay = start()
        with torch.no_grad():
            for p, weight in zip(model.parameters(), weights):
                p.copy_(weight)
        optimizer.load_state_dict(copy.deepcopy(state))
        decay.load_state_dict(owed)
        steps(model, optimizer, range(5, 9))
        return values(model.parameters())

    noted = [owed]
    dist.broadcast_object_list(noted)
    return {
        "owed": owed,
        "whole": values(model.parameters()),
        "by its own": resumed(owed),
        "by process 0's": resumed(noted[0]),
    }


# DDP


@scenario
def ddp_unused() -> Any:
    """A branch that process 0 uses more often than process 1, and neither of them in some steps."""

    def used(index: int) -> bool:
        return index % 4 < (3 if rank() == 0 else 2)

    def train(cls: Any, wd: float, decays: bool, quantum: float = 0) -> Any:
        model = DistributedDataParallel(network(), find_unused_parameters=True)
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd)
        decay = DecoupledWD(optimizer, WD, quantum=quantum) if decays else None
        steps(model, optimizer, range(10), used)
        state = decay.state_dict() if quantum else None
        return (values(model.parameters()), state) if quantum else values(model.parameters())

    return {**three_runs(train), "owing": train(Adam, IMPORTANT, True, 2.5e-3)}


# ZeRO


def zero(**settings: Any) -> dict[str, Any]:
    def train(cls: Any, wd: float, decays: bool) -> Any:
        model = DistributedDataParallel(network())
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), cls, **settings, lr=LR, weight_decay=wd
        )
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        steps(model, optimizer, range(6))
        optimizer.consolidate_state_dict(to=0)
        assert optimizer.param_groups[0]["weight_decay"] == wd
        if rank() == 0:
            assert optimizer.state_dict()["param_groups"][0]["weight_decay"] == wd
        return values(model.parameters())

    return three_runs(train)


@scenario
def zero_of_adam() -> Any:
    return zero()


@scenario
def zero_excludes() -> Any:
    def train(cls: Any, wd: float, decays: bool) -> Any:
        model = DistributedDataParallel(network())
        make = partial(ZeroRedundancyOptimizer, optimizer_class=cls)
        if decays:
            optimizer = make(model.parameters(), lr=LR, weight_decay=wd)
            DecoupledWD(optimizer, WD, quantum=0, exclude=EXCLUDE, model=model)
        else:
            optimizer = split(model, make, wd)
        steps(model, optimizer, range(4))
        names[:] = [name for name, _ in model.named_parameters()]
        return values(model.parameters())

    names: list[str] = []
    return {**three_runs(train), "names": names}


@scenario
def zero_overlapped() -> Any:
    """Its updates are made by a hook of DDP's, in ``backward``, and ``step`` does nothing."""
    model = DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), Adam, overlap_with_ddp=True, lr=LR)
    try:
        DecoupledWD(optimizer, WD)
    except ValueError as error:
        return {"told": str(error)}
    return {"told": None}


@scenario
def local_sgd() -> Any:
    """The processes average their weights at every second step, the last one included."""
    told = []

    def train(cls: Any, wd: float, decays: bool) -> Any:
        model = network()
        inner = cls(model.parameters(), lr=LR, weight_decay=wd)
        averager = averagers.PeriodicModelAverager(period=2)
        optimizer = PostLocalSGDOptimizer(inner, averager)
        if decays:
            try:
                DecoupledWD(optimizer, WD)
            except ValueError as error:
                told.append(str(error))
            DecoupledWD(inner, WD, quantum=0)
        steps(model, optimizer, range(5))
        return values(model.parameters())

    return {**three_runs(train), "told": told}


@scenario
def zero_in_buckets() -> Any:
    return zero(parameters_as_bucket_view=True)


if __name__ == "__main__":
    main()
