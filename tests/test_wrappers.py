"""The plain decay on optimizers that Fabric and Accelerate wrap, against AdamW (P5)."""

from __future__ import annotations

from contextlib import nullcontext

import lightning.fabric
import lightning_fabric
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from helpers import INNER_WD, Positions, batch_of, network, same, weights
from torch.nn.functional import mse_loss
from torch.optim import Adam, AdamW

from wd_callbacks.torch import DecoupledWD

LR, WD, BATCHES = 0.01, 0.1, 8


@pytest.fixture(params=["wrapped", "raw", "before"])
def attached(request):
    """To which optimizer the decay is attached, and when: before one wraps the other or after."""
    return request.param


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its settings in the process: the next test needs others."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def attach(attached, setup, net, raw, *arguments, **options):
    """The wrapped model and optimizer, and the decay."""
    decay = DecoupledWD(raw, *arguments, **options) if attached == "before" else None
    model, optimizer = setup(net, raw)
    if decay is None:
        decay = DecoupledWD(optimizer if attached == "wrapped" else raw, *arguments, **options)
    return model, optimizer, decay


# Each returns the wrapper of model and optimizer, the backward, and the context of a batch.


def fabric(package, precision):
    it = package.Fabric(accelerator="cpu", devices=1, precision=precision)
    return it.setup, it.backward, nullcontext


def accelerate():
    it = Accelerator(cpu=True, gradient_accumulation_steps=2)
    return it.prepare, it.backward, it.accumulate


def overflow():
    """The first gradients overflow."""
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-20)

    def setup(net, raw):
        return net, AcceleratedOptimizer(raw, scaler=scaler)

    return setup, lambda loss: scaler.scale(loss * 100).backward(), nullcontext


WRAPPERS = {  # how it wraps, options of the optimizer, and the numbers of steps that may be made
    "Fabric": (lambda: fabric(lightning.fabric, "32-true"), {"foreach": False}, [BATCHES]),
    "bf16": (lambda: fabric(lightning_fabric, "bf16-mixed"), {"foreach": True}, [BATCHES]),
    "Accelerate": (accelerate, {"fused": True}, [BATCHES // 2]),
    "overflow": (overflow, {"foreach": False}, range(1, BATCHES)),
    "overflow, fused": (overflow, {"fused": True}, range(1, BATCHES)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_adam_is_adamw(name, attached):  # P1, P3, P4, P5, P6
    wrap, options, steps = WRAPPERS[name]

    def run(cls, wd, schedule=None):
        net = network()
        raw = cls(net.parameters(), lr=LR, weight_decay=wd, **options)
        setup, backward, context = wrap()
        if schedule is None:
            model, optimizer = setup(net, raw)
        else:
            decay = {"wd": schedule, "quantum": 0, "total_steps": BATCHES}
            model, optimizer, _ = attach(attached, setup, net, raw, **decay)
        for index in range(BATCHES):
            x, y = batch_of(0, index)
            with context(model):
                backward(mse_loss(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        assert raw.param_groups[0]["weight_decay"] == wd
        made = int(raw.state[net[0].weight]["step"])
        assert made in steps
        return net, made

    (ours, made), (theirs, _) = run(Adam, INNER_WD, schedule := Positions(WD)), run(AdamW, WD)
    if name != "overflow, fused":  # which is called all the same
        assert schedule.seen == [i / BATCHES for i in range(made)]
    assert same(ours, theirs)
    assert not same(ours, run(AdamW, 0)[0])


def test_fabric_with_a_closure_and_a_checkpoint(tmp_path, attached):  # P1, P3, P9
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1)

    def start():
        net = network()
        raw = Adam(net.parameters(), lr=LR, weight_decay=INNER_WD)
        parts = attach(attached, fabric.setup, net, raw, WD, quantum=0.0035)
        return dict(zip(("model", "optimizer", "decay"), parts))

    def train(model, optimizer, decay, batches):
        for index in batches:

            def closure(index=index):
                assert optimizer.param_groups[0]["weight_decay"] == INNER_WD
                optimizer.zero_grad()
                x, y = batch_of(0, index)
                loss = mse_loss(model(x), y)
                fabric.backward(loss)
                return loss

            optimizer.step(closure)
        return weights(model)

    parts, again = start(), start()
    train(**parts, batches=range(6))
    fabric.save(tmp_path / "state.ckpt", parts)
    (group,) = torch.load(tmp_path / "state.ckpt", weights_only=True)["optimizer"]["param_groups"]
    assert group["weight_decay"] == INNER_WD
    whole = train(**parts, batches=range(6, 12))
    fabric.load(tmp_path / "state.ckpt", again)
    assert all(map(torch.equal, whole, train(**again, batches=range(6, 12))))


@pytest.mark.parametrize("package", [lightning.fabric, lightning_fabric])
def test_a_parameter_in_fabric_has_one_name(package):  # P12
    model, optimizer = package.Fabric(accelerator="cpu", devices=1).setup(
        net := network(), Adam(net.parameters())
    )
    names = [name for name, _ in net.named_parameters()]
    decay = DecoupledWD(optimizer, {names[0]: 0.1, "*": 0.2}, exclude=names[1], model=model)
    assert [row.name for row in decay.describe(parameters=True)] == names
