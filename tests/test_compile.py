"""Under torch.compile: the same weights, and no more graphs than without the decay."""

from __future__ import annotations

import functools
import shutil
import warnings

import pytest
import torch
import torch._dynamo
from helpers import INNER_WD, CallsSuper, deferred, flat, random_gradients
from reference.loops import decay_by_hand
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.optim import SGD, Adam, AdamW

from wd_callbacks.torch import DecoupledWD

LR, WD, STEPS = 0.05, 0.5, 6


def decreasing(progress):
    return WD * (1 - progress)


def attach(wd=decreasing, **arguments):
    return lambda optimizer: DecoupledWD(optimizer, wd, total_steps=STEPS, **arguments)


def network(device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(device)


def batch(index):
    return torch.full((2, 5), 0.1 * (index + 1))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_step(model, optimizer, how, backend, seen):
    """A function of the index of the step; ``how`` names what of it is compiled.

    A closure notes in ``seen`` the weight decay that it finds.
    """

    def forward(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    def whole_step(x):
        forward(x)
        optimizer.step()

    def closure(x):
        seen.append(optimizer.param_groups[0]["weight_decay"])
        return forward(x)

    if how == "whole step":
        train = torch.compile(whole_step, backend=backend)
        return lambda index: train(batch(index))
    step = optimizer.step if how != "function" else lambda: optimizer.step()
    if how != "not":
        step = torch.compile(step, backend=backend)
    if how == "closure":
        return lambda index: step(lambda: closure(batch(index)))
    return lambda index: (forward(batch(index)), step())


def compiled_run(how, cls=Adam, wd=INNER_WD, attach=None, late=False, by_hand=None, backend=None):
    """The weights after each step, and how many graphs had been compiled by then.

    ``attach`` attaches the decay, ``late`` after compiling. ``by_hand`` is the coefficient of the
    hand-written decay as a function of the progress.
    """
    model, backend, seen = network(), backend or CompileCounter(), []
    optimizer = cls(model.parameters(), lr=LR, weight_decay=wd)
    if attach and not late:
        attach(optimizer)
    step = compiled_step(model, optimizer, how, backend, seen)
    if attach and late:
        attach(optimizer)
    progress = 0.0

    @torch.compiler.disable
    def decay(*_):  # after the gradients, before the update, which is then the compiled one
        decay_by_hand(optimizer.param_groups, by_hand(progress))

    if by_hand:
        optimizer.register_step_pre_hook(decay)
    path, frames = [], []
    for index in range(STEPS):
        progress = index / STEPS
        step(index)
        path.append(flat(model))
        frames.append(backend.frame_count)
    assert optimizer.param_groups[0]["weight_decay"] == wd  # P3
    assert seen == [wd] * STEPS * (how == "closure")
    return torch.stack(path), frames


def test_a_compiled_model():  # P4, P5
    def run(cls, wd, decays):
        net = network()
        model = torch.compile(net, backend="aot_eager")
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd)
        if decays:
            excluded = {"exclude": "2.bias", "model": model} if decays == "bias" else {}
            DecoupledWD(optimizer, WD, quantum=0, **excluded)
        for index in range(STEPS):
            optimizer.zero_grad()
            model(batch(index)).square().mean().backward()
            optimizer.step()
        return flat(net)

    ours = run(Adam, INNER_WD, True)
    assert torch.equal(ours, run(AdamW, WD, False))
    assert not torch.equal(ours, run(Adam, 0.0, False))
    assert not torch.equal(ours, run(Adam, INNER_WD, "bias"))  # P12: without the prefix


HOW = [("optimizer.step", True), ("function", False), ("function", True), ("whole step", False)]


@pytest.mark.parametrize(("how", "late"), HOW)
def test_a_compiled_step_is_compiled_adamw_s(how, late):  # P4, P5
    expected, graphs = compiled_run(how, AdamW, WD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of the decay is beyond the compiler
        warnings.filterwarnings("ignore", message="Guards may run slower on Python")
        ours, frames = compiled_run(how, attach=lambda o: DecoupledWD(o, WD), late=late)
    assert torch.equal(ours, expected)
    assert frames == graphs


AOT = functools.partial(CompileCounterWithBackend, "aot_eager")
CHANGING = {
    "optimizer.step": (0, CompileCounter),
    "whole step": (None, CompileCounter),
    "function": (0, AOT),
}


@pytest.mark.parametrize("how", CHANGING)
def test_a_changing_coefficient_compiles_nothing_anew(how):  # P4, P6, P11
    quantum, backend = CHANGING[how]
    expected, graphs = compiled_run(how, wd=0.0, by_hand=decreasing, backend=backend())
    ours, frames = compiled_run(how, attach=attach(quantum=quantum), backend=backend())
    assert torch.equal(ours, expected)
    if how == "whole step":  # which the hand-written one cuts in two
        graphs = compiled_run(how, wd=0.0)[1]
    assert frames == graphs
    assert frames[0] == frames[-1]


@pytest.mark.parametrize("how", ["optimizer.step", "function", "whole step"])
def test_deferred_decay_compiles_nothing_anew(how):  # P8, P11
    decays, optimizers = [], []

    def attach(optimizer):
        decays.append(DecoupledWD(optimizer, decreasing, quantum=0.06, total_steps=STEPS))
        optimizers.append(optimizer)  # which a decay does not keep alive

    ours, frames = compiled_run(how, SGD, attach=attach)
    expected, _ = compiled_run("not", SGD, attach=attach)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    assert frames == compiled_run(how, SGD, 0.0)[1]
    assert decays[0].state_dict() == decays[1].state_dict()
    assert deferred(decays[0])[0] > 0


@pytest.mark.parametrize("quantum", [0, 0.06], ids=["applied", "deferred"])
def test_a_compiled_step_with_a_closure(quantum):  # P1, P3, P11
    ours, frames = compiled_run("closure", attach=attach(quantum=quantum))
    expected, _ = compiled_run("not", attach=attach(quantum=quantum))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert frames[3] == frames[-1]  # torch 2.4 compiles some frames anew up to there
    if quantum == 0:
        by_hand, _ = compiled_run("optimizer.step", wd=0.0, by_hand=decreasing)
        assert torch.equal(ours, by_hand)


def test_a_compiled_step_that_calls_super_decays_once():  # P1
    Adam([nn.Parameter(torch.ones(1))])  # from here on Adam.step runs hooks itself
    AdamW([nn.Parameter(torch.ones(1))])
    expected, graphs = compiled_run("function", AdamW, WD)
    ours, frames = compiled_run("function", CallsSuper, attach=lambda o: DecoupledWD(o, WD))
    assert torch.equal(ours, expected)
    assert frames[1] == frames[-1]
    assert graphs[1] == graphs[-1]


SLOW = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")]
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = [pytest.param("cpu", marks=SLOW), pytest.param("cuda", marks=ON_GPU)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_compiled_to_machine_code_is_near_adamw_s(device):  # P4, P5
    def run(cls, wd, decays):
        model = network(device)
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        step = torch.compile(optimizer.step) if decays else optimizer.step
        for index in range(3):
            random_gradients(model, index)
            step()
        return flat(model)

    ours, expected = run(Adam, INNER_WD, True), run(AdamW, WD, False)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert (ours - run(Adam, 0.0, False)).abs().max() > 1e-3
