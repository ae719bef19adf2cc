"""Sharded and replicated models in plain loops: FSDP2, FSDP1, ZeRO and DDP."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.distributed as dist
from processes.common import (
    INNER_WD,
    LR,
    SCENARIOS,
    WD,
    batch_of,
    network,
    scenario,
    three_runs,
    values,
)
from processes.fsdp2 import DTensor, Replicate, fully_shard
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.model_averaging import averagers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam

from wd_callbacks.torch import DecoupledWD

EXCLUDE = ["bias", "norm", "branch.w*"]
EXCLUDED = {"trunk.0.bias", "trunk.1.weight", "trunk.1.bias", "branch.weight", "branch.bias"}
EXCLUDED |= {"head.bias"}
QUANTUM = 2.5e-3  # against a shrink of 1e-3


def steps(model, optimizer, batches=range(6), branch=lambda index: True, of=None):
    """The plain loop."""
    for index in batches:
        x, y = batch_of(index, of)
        mse_loss(model(x, branch(index)), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def seldom(index):
    """The branch is left out now and then, so that what is deferred differs."""
    return index % 4 != 2


def split(model, cls, wd, **settings):
    """An optimizer with the decay in the groups, by the names that an unwrapped model has."""
    names = [name for name, _ in network().named_parameters()]
    groups = [
        {"params": [p], "weight_decay": 0.0 if name in EXCLUDED else wd}
        for name, p in zip(names, model.parameters(), strict=True)
    ]
    return cls(groups, **settings)


def whole(model):
    return values(model.parameters())


def against_adamw(
    build,
    *,
    train=steps,
    make=lambda params, cls, **settings: cls(params, **settings),
    quantum=0,
    exclude=(),
    check=lambda model, optimizer: None,
    end=whole,
    **settings,
):
    """Ours, AdamW and neither; where ours excludes, AdamW has groups without decay.

    ``check`` is called with model and optimizer after training; ``end`` gives the whole weights.
    """
    names = []

    def run(cls, wd, decays):
        model = build()
        if exclude and not decays:
            optimizer = split(model, partial(make, cls=cls), wd, lr=LR, **settings)
        else:
            optimizer = make(model.parameters(), cls=cls, lr=LR, weight_decay=wd, **settings)
        if decays:
            DecoupledWD(optimizer, WD, quantum=quantum, exclude=exclude, model=model)
        train(model, optimizer)
        if not exclude:
            assert optimizer.param_groups[0]["weight_decay"] == wd
        check(model, optimizer)
        names[:] = [name for name, _ in model.named_parameters()]
        return end(model)

    return {**three_runs(run), "names": names}


# FSDP2


def sharded(model=None, **settings):
    """The network in three units of FSDP2."""
    model = model or network()
    for module in (model.trunk, model.branch, model):
        fully_shard(module, **settings)
    return model


def fsdp2(**settings):
    def check(model, _):
        assert all(isinstance(p, DTensor) for p in model.parameters())

    rows = [p.to_local().shape[0] for p in sharded().parameters()]
    # Uneven: of some parameters process 1 holds nothing.
    assert rows == [[3, 3, 3, 3, 3, 3, 1, 1], [2, 2, 2, 2, 2, 2, 0, 0]][dist.get_rank()]
    return against_adamw(sharded, check=check, **settings)


def wrapped(compiled):
    """With an activation checkpoint around one module and the compiler around another."""
    model = network()
    model.trunk[0] = checkpoint_wrapper(model.trunk[0])
    if compiled:
        model.branch = torch.compile(model.branch, backend="eager")
    return model


def compiled_ddp():
    torch._dynamo.config.optimize_ddp = False  # torch 2.4 cannot split what is checkpointed
    return torch.compile(DistributedDataParallel(wrapped(False)), backend="eager")


@scenario
def fsdp2_resumed():
    def start():
        model = sharded()
        optimizer = Adam(model.parameters(), lr=LR, weight_decay=INNER_WD)
        return model, optimizer, DecoupledWD(optimizer, WD, quantum=QUANTUM)

    parts = start()
    steps(*parts[:2], range(8), seldom)
    state = copy.deepcopy([part.state_dict() for part in parts])
    steps(*parts[:2], range(8, 14), seldom)

    def resumed(with_decay):
        again = start()
        for part, saved in zip(again, state):
            if with_decay or not isinstance(part, DecoupledWD):
                part.load_state_dict(saved)
        steps(*again[:2], range(8, 14), seldom)
        return whole(again[0])

    return {
        "state": state[2],
        "end": parts[2].state_dict(),
        "whole": whole(parts[0]),
        "resumed": resumed(True),
        "forgetful": resumed(False),
    }


@scenario
def fsdp2_deferred():
    """Against a model that is not sharded, where the decay alone changes the weights."""

    def decayed(model):
        optimizer = Adam(model.parameters(), lr=LR, weight_decay=INNER_WD)
        DecoupledWD(optimizer, WD, quantum=QUANTUM)
        for index in range(14):
            x, _ = batch_of(index)
            (model(x, seldom(index)).sum() * 0).backward()
            optimizer.step()
            optimizer.zero_grad()
        return whole(model)

    return {"ours": decayed(sharded()), "alone": decayed(network()), "start": whole(network())}


@scenario
def fsdp2_anchored():
    """Towards a full state_dict, against a model that is not sharded; initial weights raise."""
    anchor = {name: value + 0.5 for name, value in network().state_dict().items()}

    def decayed(model, anchor=anchor):
        optimizer = Adam(model.parameters(), lr=LR)
        DecoupledWD(optimizer, WD, anchor=anchor, model=model, quantum=0)
        for index in range(6):
            (model(batch_of(index)[0]).sum() * 0).backward()
            optimizer.step()
            optimizer.zero_grad()
        return whole(model)

    try:
        decayed(sharded(), "initial")
    except ValueError as error:
        refused = str(error)
    ends = {"ours": decayed(sharded()), "alone": decayed(network()), "start": whole(network())}
    return {**ends, "refused": refused}


@scenario
def fsdp2_beside_plain_tensors():
    """A unit of FSDP2 and parameters that are nowhere sharded, in one param group."""

    def build():
        model = network()
        fully_shard(model.trunk)
        return model

    def train(model, optimizer):
        for index in range(6):
            x, y = batch_of(index)
            mse_loss(model(x), y).backward()
            for p in (*model.branch.parameters(), *model.head.parameters()):
                dist.all_reduce(p.grad)
            optimizer.step()
            optimizer.zero_grad()
        assert {isinstance(p, DTensor) for p in model.parameters()} == {False, True}

    return against_adamw(build, train=train, foreach=False)


@scenario
def fsdp2_grad_scaler():
    """The first gradients overflow, in process 1 alone."""

    def train(model, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        for index in range(6):
            x, y = batch_of(index)
            overflows = dist.get_rank() == 1 and index % 3 == 0
            loss = mse_loss(model(x), y) * (torch.inf if overflows else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 2.0**18

    return against_adamw(sharded, train=train, fused=True)


@scenario
def fsdp2_over_several_meshes():
    """As where experts are sharded over other processes than the rest of the model."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))

    def build():
        model = network()
        fully_shard(model.branch, mesh=hybrid)
        fully_shard(model, mesh=mesh)
        return model

    return against_adamw(build, foreach=False)


@scenario
def fsdp2_and_tensor_parallel():
    """A layer that is split over the processes, which see the same data, beside others."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))

    def build():
        model = network()
        by_column = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(model.branch, mesh["tensor"], by_column)
        fully_shard(model, mesh=mesh["data"])
        return model

    return against_adamw(build, train=partial(steps, of=0))


# FSDP1


def flattened(model, **settings):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **settings)


def fsdp1(exclude=(), **settings):
    def build():
        model = network()
        model.trunk = flattened(model.trunk, **settings)
        return flattened(model, **settings)

    def end(model):
        with FullyShardedDataParallel.summon_full_params(model):
            return whole(model)

    return against_adamw(build, exclude=exclude, end=end)


def refusal(action):
    """The message with which ``action`` is refused, None if it is not."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return None


@scenario
def fsdp1_flattened_excludes():
    inner = network()
    model = flattened(inner, use_orig_params=False)

    def attach(named):
        DecoupledWD(Adam(model.parameters(), lr=LR), WD, exclude="bias", model=named)

    return {"wrapped": refusal(lambda: attach(model)), "inner": refusal(lambda: attach(inner))}


@scenario
def fsdp1_resumed():
    """With the deferred decay that this process has saved, and with that of process 0.

    Each process has a gradient only for the parameters of which it holds a part.
    """

    def start():
        model = flattened(network(), use_orig_params=True)
        steps(model, SGD(model.parameters(), lr=0.0), [0])  # it shards when it is used
        optimizer = Adam(model.parameters(), lr=LR, weight_decay=INNER_WD)
        return model, optimizer, DecoupledWD(optimizer, WD, quantum=QUANTUM)

    model, optimizer, decay = start()
    steps(model, optimizer, range(5))
    weights = whole(model)
    state, decay_state = copy.deepcopy((optimizer.state_dict(), decay.state_dict()))
    steps(model, optimizer, range(5, 9))

    def resumed(decay_state):
        model, optimizer, decay = start()
        with torch.no_grad():
            for p, weight in zip(model.parameters(), weights):
                p.copy_(weight)
        optimizer.load_state_dict(copy.deepcopy(state))
        decay.load_state_dict(decay_state)
        steps(model, optimizer, range(5, 9))
        return whole(model)

    saved = [decay_state]
    dist.broadcast_object_list(saved)
    return {
        "state": decay_state,
        "whole": whole(model),
        "by its own": resumed(decay_state),
        "by process 0's": resumed(saved[0]),
    }


# DDP and ZeRO


@scenario
def ddp_unused():
    """A branch that process 0 uses more often than process 1, and neither of them in some steps."""

    def used(index):
        return index % 4 < 3 - dist.get_rank()

    def build():
        return DistributedDataParallel(network(), find_unused_parameters=True)

    def train(model, optimizer):
        steps(model, optimizer, range(10), used)

    model = build()
    optimizer = Adam(model.parameters(), lr=LR, weight_decay=INNER_WD)
    decay = DecoupledWD(optimizer, WD, quantum=QUANTUM)
    train(model, optimizer)
    return {**against_adamw(build, train=train), "deferred": (whole(model), decay.state_dict())}


def zero(exclude=(), **settings):
    def make(params, cls, **arguments):
        return ZeroRedundancyOptimizer(params, cls, **settings, **arguments)

    def check(_, optimizer):
        own = optimizer.param_groups[0]["weight_decay"]
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            assert optimizer.state_dict()["param_groups"][0]["weight_decay"] == own

    return against_adamw(
        lambda: DistributedDataParallel(network()), make=make, check=check, exclude=exclude
    )


@scenario
def zero_overlapped():
    """Its updates are made by a hook of DDP's, in ``backward``, and ``step`` does nothing."""
    model = DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), Adam, overlap_with_ddp=True, lr=LR)
    return {"refusal": refusal(lambda: DecoupledWD(optimizer, WD))}


@scenario
def local_sgd():
    """The processes average their weights at every second step, the last one included."""
    refusals = []

    def run(cls, wd, decays):
        model = network()
        inner = cls(model.parameters(), lr=LR, weight_decay=wd)
        optimizer = PostLocalSGDOptimizer(inner, averagers.PeriodicModelAverager(period=2))
        if decays:
            refusals.append(refusal(lambda: DecoupledWD(optimizer, WD)))
            DecoupledWD(inner, WD, quantum=0)
        steps(model, optimizer, range(5))
        return whole(model)

    return {**three_runs(run), "refusal": refusals[0]}


SCENARIOS |= {
    "fsdp2_for_loop": lambda folder: fsdp2(foreach=False),
    "fsdp2_foreach": lambda folder: fsdp2(foreach=True, quantum=None),
    "fsdp2_excludes": lambda folder: against_adamw(lambda: sharded(wrapped(True)), exclude=EXCLUDE),
    "compiled_ddp_excludes": lambda folder: against_adamw(compiled_ddp, exclude=EXCLUDE),
    "fsdp1_flattened": lambda folder: fsdp1(use_orig_params=False),
    "fsdp1_excludes": lambda folder: fsdp1(EXCLUDE, use_orig_params=True),
    "zero_in_buckets": lambda folder: zero(parameters_as_bucket_view=True),
    "zero_excludes": lambda folder: zero(EXCLUDE),
}
