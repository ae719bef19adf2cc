"""The plain callback on optimizers that Fabric and Accelerate wrap, against AdamW."""

from __future__ import annotations

import lightning.fabric
import lightning_fabric
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning_models import IMPORTANT, batch_of, network, same
from torch.nn.functional import mse_loss
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from wd_callbacks.torch import DecoupledWD

LR, WD = 0.01, 0.1
KINDS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
ATTACHED = ["wrapped", "raw"]

pytestmark = pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)")


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(params=ATTACHED)
def attached(request):
    return request.param


def three_runs(train, kind, attached):
    """Ends with the same bits as AdamW, and not with those of an optimizer without decay."""
    decayed = train(Adam, IMPORTANT, kind, attached)
    assert same(decayed, train(AdamW, WD, kind, None))
    assert not same(decayed, train(AdamW, 0, kind, None))


@pytest.mark.parametrize("package", [lightning.fabric, lightning_fabric], ids=lambda p: p.__name__)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(package, precision, kind, attached):  # P3, P4, P5
    def train(make, wd, kind, attached):
        fabric = package.Fabric(accelerator="cpu", devices=1, precision=precision)
        net = network()
        raw = make(net.parameters(), lr=LR, weight_decay=wd, **kind)
        model, optimizer = fabric.setup(net, raw)
        if attached is not None:
            DecoupledWD({"wrapped": optimizer, "raw": raw}[attached], WD, quantum=0)
        for index in range(8):
            x, y = batch_of(0, index)
            with fabric.no_backward_sync(model, enabled=index % 2 == 0):
                fabric.backward(mse_loss(model(x), y))
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
        assert optimizer.param_groups[0]["weight_decay"] == wd
        return net

    three_runs(train, kind, attached)


@pytest.mark.parametrize("package", [lightning.fabric, lightning_fabric], ids=lambda p: p.__name__)
def test_fabric_with_a_closure(package, attached):  # P1, P4, P5
    def train(make, wd, kind, attached):
        fabric = package.Fabric(accelerator="cpu", devices=1)
        net = network()
        raw = make(net.parameters(), lr=LR, weight_decay=wd)
        model, optimizer = fabric.setup(net, raw)
        if attached is not None:
            DecoupledWD({"wrapped": optimizer, "raw": raw}[attached], WD, quantum=0)
        for index in range(6):

            def closure(index=index):
                assert optimizer.param_groups[0]["weight_decay"] == wd
                optimizer.zero_grad()
                x, y = batch_of(0, index)
                loss = mse_loss(model(x), y)
                fabric.backward(loss)
                return loss

            optimizer.step(closure)
        return net

    three_runs(train, {}, attached)


@pytest.mark.parametrize("package", [lightning.fabric, lightning_fabric], ids=lambda p: p.__name__)
def test_fabric_saves_what_the_user_set(package, tmp_path, attached):  # P3, P9
    fabric = package.Fabric(accelerator="cpu", devices=1)
    net = network()
    raw = Adam(net.parameters(), lr=LR, weight_decay=IMPORTANT)
    model, optimizer = fabric.setup(net, raw)
    decay = DecoupledWD({"wrapped": optimizer, "raw": raw}[attached], 1e-4, quantum=1e-5)

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
    whole = [p.detach().clone() for p in net.parameters()]
    (group,) = torch.load(path, weights_only=True)["optimizer"]["param_groups"]
    assert group["weight_decay"] == IMPORTANT
    decay.detach()
    decay = DecoupledWD(optimizer, 1e-4, quantum=1e-5)
    fabric.load(path, {"model": model, "optimizer": optimizer, "decay": decay})
    train(range(7, 15))
    assert all(map(torch.equal, whole, net.parameters()))


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its settings in the process: the next test needs others."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scheduler", [False, True], ids=["", "one cycle"])
@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate(accumulate, scheduler, kind, attached):  # P1, P3, P4, P5
    def train(make, wd, kind, attached):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        net = network()
        raw = make(net.parameters(), lr=LR, weight_decay=wd, **kind)
        model, optimizer = accelerator.prepare(net, raw)
        if scheduler:
            cycle = accelerator.prepare(OneCycleLR(raw, 0.05, total_steps=8))
        if attached is not None:
            DecoupledWD({"wrapped": optimizer, "raw": raw}[attached], WD, quantum=0)
        for index in range(8):
            x, y = batch_of(0, index)
            with accelerator.accumulate(model):
                accelerator.backward(mse_loss(model(x), y))
                optimizer.step()
                if scheduler:
                    cycle.step()
                optimizer.zero_grad()
        assert optimizer.param_groups[0]["weight_decay"] == wd
        return net

    three_runs(train, kind, attached)


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate_counts_the_steps_it_makes(attached):  # P6
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    net = network()
    raw = Adam(net.parameters(), lr=LR, weight_decay=IMPORTANT)
    model, optimizer = accelerator.prepare(net, raw)
    seen = []
    DecoupledWD(
        {"wrapped": optimizer, "raw": raw}[attached],
        lambda progress: seen.append(progress) or 0.0,
        total_steps=4,
    )
    for index in range(16):
        x, y = batch_of(0, index)
        with accelerator.accumulate(model):
            accelerator.backward(mse_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    assert seen == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate_with_an_overflow(kind, attached):  # P1, P4, P5
    from accelerate.optimizer import AcceleratedOptimizer

    def train(make, wd, kind, attached):
        Accelerator(cpu=True)
        net = network()
        raw = make(net.parameters(), lr=LR, weight_decay=wd, **kind)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-20)
        optimizer = AcceleratedOptimizer(raw, scaler=scaler)
        if attached is not None:
            DecoupledWD({"wrapped": optimizer, "raw": raw}[attached], WD, quantum=0)
        for index in range(6):
            x, y = batch_of(0, index)
            optimizer.zero_grad()
            scaler.scale(mse_loss(net(x), y) * 100).backward()
            optimizer.step()
        assert 0 < raw.state[net[0].weight]["step"] < 6
        return net

    three_runs(train, kind, attached)
