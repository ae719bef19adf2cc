"""Sharded and replicated models in plain loops: FSDP2, FSDP1, ZeRO and DDP."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.distributed as dist
from helpers import INNER_WD
from lightning_helpers import LR, WD
from processes.common import SCENARIOS, batch_of, fully_shard, network, scenario, whole
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW

from wd_callbacks.torch import DecoupledWD

EXCLUDE, DECAYING = ["bias", "norm", "branch.w*"], {"trunk.0.weight", "head.weight"}
QUANTUM = 2.5e-3  # against a shrink of 1e-3


def always(index):
    return True


def seldom(index):
    """The branch is left out now and then, so that what is deferred differs."""
    return index % 4 != 2


def no_loss(prediction, _):
    return 0 * prediction.sum()


def steps(model, optimizer, batches=range(6), branch=always, loss=mse_loss, of=None):
    """The plain loop."""
    for index in batches:
        x, y = batch_of(index, of)
        loss(model(x, branch(index)), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def against_adamw(
    build,
    *,
    train=steps,
    wrap=lambda cls: cls,
    end=lambda model, optimizer: whole(model),
    quantum=0,
    exclude=(),
    prefix="",
    **settings,
):
    """Ours, AdamW and neither; where ours excludes, AdamW has groups without decay.

    ``wrap`` takes the class of the optimizer, ``prefix`` is part of a name that wrappers add to.
    """

    def run(cls, wd, decays):
        model = build()
        assert any(name.startswith(prefix) for name, _ in model.named_parameters())
        params = list(model.parameters())
        if exclude and not decays:
            names = [name for name, _ in network().named_parameters()]
            params = [
                {"params": [p], "weight_decay": wd if name in DECAYING else 0.0}
                for name, p in zip(names, params, strict=True)
            ]
        optimizer = wrap(cls)(params, lr=LR, weight_decay=wd, **settings)
        if decays:
            DecoupledWD(optimizer, WD, quantum=quantum, exclude=exclude, model=model)
        train(model, optimizer)
        assert optimizer.param_groups[0]["weight_decay"] == wd
        return end(model, optimizer)

    return {
        "ours": run(Adam, INNER_WD, True),
        "expected": run(AdamW, WD, False),
        "undecayed": run(AdamW, 0.0, False),
    }


def resumed(build, branch=always):
    """A run with deferred decay when it is saved, and one that forgets that."""

    def start():
        model = build()
        steps(model, SGD(model.parameters(), lr=0.0), [0])  # FSDP1 shards when it is used
        optimizer = Adam(model.parameters(), lr=LR, weight_decay=INNER_WD)
        return model, optimizer, DecoupledWD(optimizer, WD, quantum=QUANTUM)

    model, optimizer, decay = start()
    steps(model, optimizer, range(8), branch)
    weights = [p.detach().clone() for p in model.parameters()]
    state, decay_state = copy.deepcopy((optimizer.state_dict(), decay.state_dict()))
    steps(model, optimizer, range(8, 16), branch)

    def again(with_decay):
        model, optimizer, decay = start()
        for p, weight in zip(model.parameters(), weights):
            p.data.copy_(weight)
        optimizer.load_state_dict(copy.deepcopy(state))
        if with_decay:
            decay.load_state_dict(decay_state)
        steps(model, optimizer, range(8, 16), branch)
        return whole(model), decay.state_dict()

    ends, last_state = again(True)
    return {
        "whole": whole(model),
        "resumed": ends,
        "forgetful": again(False)[0],
        "states": [decay.state_dict(), last_state],
    }


# FSDP2


def sharded(model=None, **settings):
    """The network in three units of FSDP2."""
    model = model or network()
    for module in (model.trunk, model.branch, model):
        fully_shard(module, **settings)
    rows = [p.to_local().shape[0] for p in model.parameters()]
    # Uneven: of some parameters process 1 holds nothing.
    assert rows == [[3, 3, 3, 3, 3, 3, 1, 1], [2, 2, 2, 2, 2, 2, 0, 0]][dist.get_rank()]
    return model


def wrapped():
    """With an activation checkpoint around one module and the compiler around another."""
    model = network()
    model.trunk[0] = checkpoint_wrapper(model.trunk[0])
    model.branch = torch.compile(model.branch, backend="eager")
    return sharded(model)


def as_in_one_process(**arguments):
    """Against a model that is not sharded, where the decay alone changes the weights."""

    def decayed(model):
        optimizer = Adam(model.parameters(), lr=LR, weight_decay=INNER_WD)
        DecoupledWD(optimizer, WD, model=model, **arguments)
        steps(model, optimizer, range(14), seldom, no_loss)
        return whole(model)

    return {
        "ours": decayed(sharded()),
        "expected": decayed(network()),
        "undecayed": whole(network()),
    }


@scenario
def fsdp2():
    """Some of the parameters stay whole between forward and backward, or are made so in between."""

    def train(model, optimizer):
        steps(model, optimizer, range(3))
        model.trunk.unshard()
        model.trunk.reshard()
        steps(model, optimizer, range(3, 6))

    build = partial(sharded, reshard_after_forward=False)
    return against_adamw(build, train=train, quantum=None, foreach=True)


@scenario
def fsdp2_later():
    """Sharded after some steps: other Parameters, and plain tensors and DTensors in one group."""

    def train(model, optimizer):
        steps(model, optimizer, range(3), of=0)
        fully_shard(model.branch)
        optimizer.param_groups[0]["params"] = list(model.parameters())
        steps(model, optimizer, range(3, 6), of=0)
        assert {hasattr(p, "full_tensor") for p in model.parameters()} == {False, True}

    return against_adamw(network, train=train, foreach=False)


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


# FSDP1


def fsdp1(model=None, use_orig_params=True):
    """The network in two units of FSDP1."""
    model = model or network()
    settings = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    model.trunk = FullyShardedDataParallel(model.trunk, **settings)
    return FullyShardedDataParallel(model, **settings)


flattened = partial(fsdp1, use_orig_params=False)


def summoned(model, _):
    with FullyShardedDataParallel.summon_full_params(model):
        return whole(model)


# DDP and ZeRO


def ddp(**settings):
    return DistributedDataParallel(network(), **settings)


def compiled_ddp():
    return torch.compile(ddp(), backend="eager")


def used(index):
    """Process 0 uses the branch more often than process 1, and neither does in some steps."""
    return index % 4 < 3 - dist.get_rank()


def zero(cls):
    return partial(ZeroRedundancyOptimizer, optimizer_class=cls, parameters_as_bucket_view=True)


def consolidated(model, optimizer):
    own = optimizer.param_groups[0]["weight_decay"]
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        assert optimizer.state_dict()["param_groups"][0]["weight_decay"] == own
    return whole(model)


unused = partial(ddp, find_unused_parameters=True)
excludes = partial(against_adamw, exclude=EXCLUDE)
ANCHOR = {name: value + 0.5 for name, value in network().state_dict().items()}
SCENARIOS |= {
    "fsdp2_excludes": partial(excludes, wrapped, prefix="branch._orig_mod."),
    "fsdp2_deferred": partial(as_in_one_process, quantum=QUANTUM),
    "fsdp2_anchored": partial(as_in_one_process, quantum=0, anchor=ANCHOR),
    "fsdp2_resumed": partial(resumed, sharded, seldom),
    "fsdp1_flattened": partial(against_adamw, flattened, end=summoned),
    "fsdp1_excludes": partial(excludes, fsdp1, end=summoned, prefix="_fsdp_wrapped_module.trunk."),
    "fsdp1_resumed": partial(resumed, fsdp1),
    "ddp_unused": partial(against_adamw, unused, train=partial(steps, branch=used)),
    "ddp_unused_resumed": partial(resumed, unused, used),
    "compiled_ddp_excludes": partial(excludes, compiled_ddp, prefix="_orig_mod.module."),
    "zero_excludes": partial(excludes, ddp, wrap=zero, end=consolidated, prefix="module.branch."),
}


def refusal(optimizer, **arguments):
    """The message with which the decay is refused, None if it is not."""
    try:
        DecoupledWD(optimizer, WD, **arguments)
    except ValueError as error:
        return str(error)
    return None


@scenario
def refused():
    inner = network()
    model = flattened(inner)
    adam = Adam(model.parameters())
    overlap = ZeroRedundancyOptimizer(ddp().parameters(), Adam, overlap_with_ddp=True, lr=LR)
    averaging = PostLocalSGDOptimizer(Adam(network().parameters()), PeriodicModelAverager(period=2))
    return {
        "names of flattened parameters": refusal(adam, exclude="bias", model=model),
        "names inside of the wrapper": refusal(adam, exclude="bias", model=inner),
        "updates inside backward": refusal(overlap),
        "no hooks": refusal(averaging),
    }


@scenario
def fsdp2_refused():
    return {"initial anchors": refusal(Adam(sharded().parameters()), anchor="initial")}
