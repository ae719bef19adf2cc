"""The plain decay on optimizers that Fabric and Accelerate wrap, against AdamW (P5)."""

from __future__ import annotations

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
from torch.optim.lr_scheduler import OneCycleLR

from wd_callbacks.torch import DecoupledWD

LR, WD = 0.01, 0.1
FOR_LOOP, FUSED = {"foreach": False}, {"fused": True}


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


def three_runs(train, options, attached):
    """Ends with the same bits as AdamW, and not with those of an optimizer without decay.

    ``train(make, attach)`` gets how to make the optimizer of a network, and what to call with the
    wrapped and the raw one.
    """

    def run(cls, wd, decays):
        raws = []

        def make(net):
            raws.append(cls(net.parameters(), lr=LR, weight_decay=wd, **options))
            attach(None, raws[0], "before")
            return raws[0]

        def attach(wrapped, raw, when="after"):
            if decays and (when == "before") == (attached == "before"):
                DecoupledWD(wrapped if attached == "wrapped" else raw, WD, quantum=0)

        net = train(make, attach)
        assert raws[0].param_groups[0]["weight_decay"] == wd  # P3
        return net

    decayed = run(Adam, INNER_WD, True)
    assert same(decayed, run(AdamW, WD, False))
    assert not same(decayed, run(AdamW, 0, False))


@pytest.mark.parametrize(
    ("package", "precision", "options"),
    [
        (lightning.fabric, "32-true", FOR_LOOP),
        (lightning_fabric, "32-true", FUSED),
        (lightning_fabric, "bf16-mixed", {"foreach": True}),
    ],
    ids=["for-loop", "fused", "bf16-mixed"],
)
def test_fabric(package, precision, options, attached):  # P3, P4, P5
    def train(make, attach):
        fabric = package.Fabric(accelerator="cpu", devices=1, precision=precision)
        net = network()
        raw = make(net)
        model, optimizer = fabric.setup(net, raw)
        attach(optimizer, raw)
        for index in range(8):
            x, y = batch_of(0, index)
            with fabric.no_backward_sync(model, enabled=index % 2 == 0):
                fabric.backward(mse_loss(model(x), y))
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
        return net

    three_runs(train, options, attached)


def test_fabric_with_a_closure(attached):  # P1, P3, P4, P5
    def train(make, attach):
        fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1)
        net = network()
        raw = make(net)
        own = raw.param_groups[0]["weight_decay"]
        model, optimizer = fabric.setup(net, raw)
        attach(optimizer, raw)
        for index in range(6):

            def closure(index=index):
                assert optimizer.param_groups[0]["weight_decay"] == own
                optimizer.zero_grad()
                x, y = batch_of(0, index)
                loss = mse_loss(model(x), y)
                fabric.backward(loss)
                return loss

            optimizer.step(closure)
        return net

    three_runs(train, {}, attached)


def test_fabric_saves_the_user_s_weight_decay(tmp_path, attached):  # P3, P9
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1)
    net = network()
    raw = Adam(net.parameters(), lr=LR, weight_decay=INNER_WD)
    model, optimizer = fabric.setup(net, raw)
    decay = DecoupledWD(optimizer if attached == "wrapped" else raw, 1e-4, quantum=1e-5)

    def train(batches):
        for index in batches:
            x, y = batch_of(0, index)
            optimizer.zero_grad()
            fabric.backward(mse_loss(model(x), y))
            optimizer.step()

    train(range(7))
    path = tmp_path / "state.ckpt"
    fabric.save(path, {"model": model, "optimizer": optimizer, "decay": decay})
    train(range(7, 15))
    whole = weights(net)
    (group,) = torch.load(path, weights_only=True)["optimizer"]["param_groups"]
    assert group["weight_decay"] == INNER_WD
    decay.detach()
    decay = DecoupledWD(optimizer, 1e-4, quantum=1e-5)
    fabric.load(path, {"model": model, "optimizer": optimizer, "decay": decay})
    train(range(7, 15))
    assert same(whole, net)


@pytest.mark.parametrize(
    ("accumulate", "scheduler", "options"),
    [(1, True, FOR_LOOP), (2, False, {"foreach": True}), (2, True, FUSED)],
    ids=["one cycle", "accumulation", "both"],
)
def test_accelerate(accumulate, scheduler, options, attached):  # P1, P3, P4, P5
    def train(make, attach):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        net = network()
        raw = make(net)
        model, optimizer = accelerator.prepare(net, raw)
        if scheduler:
            cycle = accelerator.prepare(OneCycleLR(raw, 0.05, total_steps=8))
        attach(optimizer, raw)
        for index in range(8):
            x, y = batch_of(0, index)
            with accelerator.accumulate(model):
                accelerator.backward(mse_loss(model(x), y))
                optimizer.step()
                if scheduler:
                    cycle.step()
                optimizer.zero_grad()
        return net

    three_runs(train, options, attached)


def test_accelerate_counts_the_steps_it_makes(attached):  # P6
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    net = network()
    raw = Adam(net.parameters(), lr=LR, weight_decay=INNER_WD)
    model, optimizer = accelerator.prepare(net, raw)
    schedule = Positions()
    DecoupledWD(optimizer if attached == "wrapped" else raw, schedule, total_steps=4)
    for index in range(16):
        x, y = batch_of(0, index)
        with accelerator.accumulate(model):
            accelerator.backward(mse_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    assert schedule.seen == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("options", [FOR_LOOP, FUSED], ids=["for-loop", "fused"])
def test_accelerate_with_an_overflow(options, attached):  # P1, P4, P5
    def train(make, attach):
        Accelerator(cpu=True)
        net = network()
        raw = make(net)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-20)
        optimizer = AcceleratedOptimizer(raw, scaler=scaler)
        attach(optimizer, raw)
        for index in range(6):
            x, y = batch_of(0, index)
            optimizer.zero_grad()
            scaler.scale(mse_loss(net(x), y) * 100).backward()
            optimizer.step()
        assert 0 < raw.state[net[0].weight]["step"] < 6
        return net

    three_runs(train, options, attached)
