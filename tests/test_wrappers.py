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

LR, WD, BATCHES = 0.01, 0.1, 8
FOR_LOOP, FOREACH, FUSED = {"foreach": False}, {"foreach": True}, {"fused": True}


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


def fabric(package, precision="32-true"):
    """How Fabric wraps model and optimizer, and runs a batch; every second one steps."""
    it = package.Fabric(accelerator="cpu", devices=1, precision=precision)

    def batch(model, index, backward, step):
        with it.no_backward_sync(model, enabled=index % 2 == 0):
            backward(it.backward)
        if index % 2:
            step()

    return it.setup, batch


def accelerate(every, cycles=False):
    """How Accelerate does; every ``every``-th batch steps."""
    it = Accelerator(cpu=True, gradient_accumulation_steps=every)
    lrs = []

    def setup(net, raw):
        if cycles:
            lrs.append(it.prepare(OneCycleLR(raw, 0.05, total_steps=BATCHES)))
        return it.prepare(net, raw)

    def batch(model, index, backward, step):
        with it.accumulate(model):
            backward(it.backward)
            step()
            for lr in lrs:
                lr.step()

    return setup, batch


def overflowing():
    """How Accelerate wraps an optimizer with a scaler: the first gradients overflow."""
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-20)

    def setup(net, raw):
        return net, AcceleratedOptimizer(raw, scaler=scaler)

    def batch(model, index, backward, step):
        backward(lambda loss: scaler.scale(loss * 100).backward())
        step()

    return setup, batch


WRAPPERS = {
    # how it wraps, options of the optimizer, and how many steps are made
    "Fabric": (lambda: fabric(lightning.fabric), FOR_LOOP, 4),
    "the other Fabric": (lambda: fabric(lightning_fabric), FUSED, 4),
    "Fabric, bf16-mixed": (lambda: fabric(lightning_fabric, "bf16-mixed"), FOREACH, 4),
    "Accelerate, one cycle": (lambda: accelerate(1, cycles=True), FOR_LOOP, 8),
    "Accelerate, accumulation": (lambda: accelerate(2), FOREACH, 4),
    "Accelerate, both": (lambda: accelerate(2, cycles=True), FUSED, 4),
    "Accelerate, overflow": (overflowing, FOR_LOOP, None),
    "Accelerate, overflow, fused": (overflowing, FUSED, None),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_adam_is_adamw(name, attached):  # P1, P3, P4, P5, P6
    wrap, options, steps = WRAPPERS[name]
    schedule = Positions(WD)

    def run(cls, wd, decays=False):
        net = network()
        raw = cls(net.parameters(), lr=LR, weight_decay=wd, **options)
        setup, batch = wrap()
        if decays:
            decay = {"wd": schedule, "quantum": 0, "total_steps": BATCHES}
            model, optimizer, _ = attach(attached, setup, net, raw, **decay)
        else:
            model, optimizer = setup(net, raw)

        def step():
            optimizer.step()
            optimizer.zero_grad()

        for index in range(BATCHES):
            x, y = batch_of(0, index)
            batch(model, index, lambda back, x=x, y=y: back(mse_loss(model(x), y)), step)
        assert raw.param_groups[0]["weight_decay"] == wd
        made = int(raw.state[net[0].weight]["step"])
        assert made == steps or (steps is None and 0 < made < BATCHES)
        if decays and not (steps is None and options == FUSED):  # which is called all the same
            assert schedule.seen == [i / BATCHES for i in range(made)]
        return net

    ours = run(Adam, INNER_WD, decays=True)
    assert same(ours, run(AdamW, WD))
    assert not same(ours, run(AdamW, 0))


def test_fabric_with_a_closure_and_a_checkpoint(tmp_path, attached):  # P1, P3, P9
    def start():
        it = lightning.fabric.Fabric(accelerator="cpu", devices=1)
        net = network()
        raw = Adam(net.parameters(), lr=LR, weight_decay=INNER_WD)
        parts = attach(attached, it.setup, net, raw, WD, quantum=0.0035)
        return it, dict(zip(("model", "optimizer", "decay"), parts))

    def train(it, parts, batches):
        model, optimizer = parts["model"], parts["optimizer"]
        for index in batches:

            def closure(index=index):
                assert optimizer.param_groups[0]["weight_decay"] == INNER_WD
                optimizer.zero_grad()
                x, y = batch_of(0, index)
                loss = mse_loss(model(x), y)
                it.backward(loss)
                return loss

            optimizer.step(closure)
        return weights(model)

    it, parts = start()
    train(it, parts, range(6))
    it.save(tmp_path / "state.ckpt", parts)
    (group,) = torch.load(tmp_path / "state.ckpt", weights_only=True)["optimizer"]["param_groups"]
    assert group["weight_decay"] == INNER_WD
    whole = train(it, parts, range(6, 12))
    it, again = start()
    it.load(tmp_path / "state.ckpt", again)
    assert all(map(torch.equal, whole, train(it, again, range(6, 12))))


@pytest.mark.parametrize("package", [lightning.fabric, lightning_fabric])
def test_a_parameter_in_fabric_has_one_name(package):  # P12
    model, optimizer = package.Fabric(accelerator="cpu", devices=1).setup(
        net := network(), Adam(net.parameters())
    )
    names = [name for name, _ in net.named_parameters()]
    decay = DecoupledWD(optimizer, {names[0]: 0.1, "*": 0.2}, exclude=names[1], model=model)
    assert [row.name for row in decay.describe(parameters=True)] == names
