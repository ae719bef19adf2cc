"""On a GPU: the same bits, no synchronization, no memory, and CUDA graphs."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from helpers import (
    HALF,
    INNER_WD,
    NoUpdate,
    applied,
    deferred,
    flat,
    parameter,
    params_of,
    random_gradients,
    spread,
    weights,
)
from reference.loops import decay_by_hand
from torch import nn
from torch.optim import SGD, Adam, AdamW

from wd_callbacks.torch import DecoupledWD

LR, WD, STEPS = 0.05, 0.5, 10

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def decreasing(progress):
    return WD * (1 - progress)


def network(device="cuda", dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(device, dtype)


def options(name):
    """Arguments of Adam, made anew as some hold a tensor."""
    return {
        "for-loop": {"foreach": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
        "found_inf": {"fused": True},
        "capturable": {"capturable": True},
        "tensor lr": {"capturable": True, "lr": torch.tensor(LR, device="cuda")},
        "for-loop, tensor lr": {"foreach": False, "lr": torch.tensor(LR, device="cuda")},
        "fused, tensor lr": {"fused": True, "lr": torch.tensor(LR, device="cuda")},
    }[name]


def path(cls, wd, attach=None, dtype=torch.float32, by_hand=False, steps=STEPS, **settings):
    """The weights after each step, with gradients that do not depend on them."""
    model = network(dtype=dtype)
    if cls is not SGD:
        settings["eps"] = 1e-3 if dtype in HALF else 1e-8  # float16 has no 1e-8
    optimizer = cls(model.parameters(), **{"lr": LR, "weight_decay": wd, **settings})
    if attach:
        attach(optimizer)
    after = []
    for step in range(steps):
        random_gradients(model, step)
        if by_hand:
            decay_by_hand(optimizer.param_groups, WD)
        optimizer.step()
        after.append(flat(model))
    return torch.stack(after)


def attach(quantum=None, wd=WD):
    return lambda optimizer: DecoupledWD(optimizer, wd, quantum=quantum)


@needs_gpu
@pytest.mark.parametrize(
    "name", ["for-loop", "foreach", "capturable", "tensor lr", "for-loop, tensor lr"]
)
@each_dtype
def test_adam_is_adamw(dtype, name):  # P4
    expected = path(AdamW, WD, dtype=dtype, **options(name))
    for quantum in (None, 0):
        ours = path(Adam, INNER_WD, attach(quantum), dtype, **options(name))
        if dtype in HALF:  # LR * WD is at least the quantum; AdamW's own factor may be rounded
            assert torch.allclose(ours, expected, rtol=STEPS * torch.finfo(dtype).eps, atol=1e-2)
        else:
            assert torch.equal(ours, expected)
        assert not torch.equal(ours, path(Adam, 0.0, dtype=dtype, **options(name)))


@needs_gpu
@each_dtype
def test_sgd_equals_the_hand_written_loop(dtype):  # P4, P5
    ours = path(SGD, INNER_WD, attach(0), dtype)
    assert torch.equal(ours, path(SGD, 0.0, dtype=dtype, by_hand=True))


@needs_gpu
@each_dtype
def test_fused_adam_is_within_one_ulp_of_adamw_per_step(dtype):  # P4
    eps = 1e-3 if dtype in HALF else 1e-8
    theirs, ours = network(dtype=dtype), network(dtype=dtype)
    adamw = AdamW(theirs.parameters(), lr=LR, weight_decay=WD, eps=eps, fused=True)
    adam = Adam(ours.parameters(), lr=LR, weight_decay=INNER_WD, eps=eps, fused=True)
    DecoupledWD(adam, WD, quantum=0)
    for step in range(STEPS):
        before = flat(theirs).double()
        for model, optimizer in ((theirs, adamw), (ours, adam)):
            random_gradients(model, step)
            optimizer.step()
        a, b = flat(theirs).double(), flat(ours).double()
        largest = torch.stack([before.abs(), a.abs(), b.abs()]).max(dim=0).values
        ulp = torch.finfo(dtype).eps * 2 ** largest.log2().floor()
        assert ((a - b).abs() <= ulp).all()
        assert ((a - before).abs() > 2 * ulp).any()
        ours.load_state_dict(theirs.state_dict())  # each step on its own


@contextlib.contextmanager
def no_synchronization():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def forbid_synchronization(optimizer, attach):
    """Only inside ``optimizer.step``: a GradScaler synchronizes by itself around it."""
    optimizer.register_step_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    decay = attach(optimizer)
    optimizer.register_step_post_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    return decay


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wd", [WD, 1e-6, decreasing], ids=["number", "deferred", "schedule"])
@pytest.mark.parametrize(
    "name", ["for-loop", "foreach", "fused", "capturable", "tensor lr", "fused, tensor lr"]
)
def test_a_step_does_not_synchronize(name, wd, dtype):  # P11
    model = network(dtype=dtype)
    optimizer = Adam(model.parameters(), **{"lr": LR, **options(name)})
    DecoupledWD(optimizer, wd, total_steps=8)
    random_gradients(model, 0)
    for _ in range(2):  # the first ones set up the optimizer's state
        optimizer.step()
    with no_synchronization():
        for _ in range(6):
            optimizer.step()
        with pytest.raises(RuntimeError, match="synchronizing"):
            flat(model).sum().item()


@needs_gpu
def test_a_first_step_does_not_synchronize_for_an_unused_max_lr():  # P11
    p = parameter(5, device="cuda")
    DecoupledWD(optimizer := NoUpdate([p], lr=torch.tensor(LR, device="cuda")), WD)
    with no_synchronization():
        optimizer.step()
    assert torch.allclose(p.data, torch.full_like(p, 1 - LR * WD))


@needs_gpu
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_an_overflow_decays_nothing_without_a_synchronization(fused):  # P1, P11
    def run(cls, wd, decays):
        model = network()
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd, fused=fused)
        if decays:
            forbid_synchronization(optimizer, lambda o: DecoupledWD(o, WD, quantum=0, max_lr=LR))
        scaler = torch.amp.GradScaler("cuda", init_scale=4.0, growth_interval=100)
        after = [flat(model)]
        for step in range(8):
            optimizer.zero_grad()
            x = torch.full((2, 5), 0.1 * (step + 1), device="cuda")
            loss = model(x).square().mean() * (float("inf") if step % 3 == 1 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            after.append(flat(model))
        return torch.stack(after)

    ours, expected = run(Adam, INNER_WD, True), run(AdamW, WD, False)
    for step in range(8):
        assert torch.equal(ours[step], ours[step + 1]) == (step % 3 == 1)
    if fused:  # rounded elsewhere, see above
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(ours, expected)


def allocated(optimizer):
    """How many blocks and bytes of GPU memory a step takes, including what it gives back."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    names = ("allocation.all.allocated", "allocated_bytes.all.allocated")
    return [after[name] - before[name] for name in names]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["for-loop", "foreach", "fused", "capturable", "tensor lr", "found_inf"]
)
def test_a_step_takes_no_memory_but_for_numbers(name, dtype):  # P11
    def run(decays):
        params = [nn.Parameter(torch.ones(1 << 18, device="cuda", dtype=dtype)) for _ in range(3)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = Adam(params, **{"lr": LR, **options(name)})
        if name == "found_inf":
            optimizer.found_inf = torch.tensor(0.0, device="cuda")
            optimizer.grad_scale = None
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        for _ in range(3):
            optimizer.step()
        return allocated(optimizer)

    (blocks, size), (their_blocks, their_size) = run(True), run(False)
    numbers = 8 if name in ("tensor lr", "found_inf") else 0
    assert blocks - their_blocks <= numbers
    assert size - their_size <= 512 * numbers  # the allocator's smallest block


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_small_shrinks_are_not_lost(dtype):  # P8
    shrink = 1e-8 if dtype == torch.float32 else 1e-4
    p = nn.Parameter(spread(dtype).data.to("cuda"))
    p.grad = torch.zeros_like(p)
    before = p.detach().clone()
    optimizer = SGD([p], lr=0.01)
    decay = DecoupledWD(optimizer, shrink / 0.01)
    for _ in range(500):
        optimizer.step()
    (waiting,) = deferred(decay)
    assert applied(p, before) > 0
    assert applied(p, before) == pytest.approx(-500 * math.log1p(-shrink) - waiting, rel=0.02)


@needs_gpu
def test_gpu_and_cpu_parameters_in_one_group():  # P5, P11
    def run(decays):
        model = network("cpu")
        model[2].to("cuda")
        optimizer = SGD(model.parameters(), lr=LR, foreach=False)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        for step in range(9):
            if step in (3, 6):  # the middle of the list moves, and keeps its identity
                model[0].bias.data = model[0].bias.data.to("cuda" if step == 3 else "cpu")
                model[0].bias.grad = None
            random_gradients(model, step)
            if not decays:
                decay_by_hand(optimizer.param_groups, WD)
            optimizer.step()
        return flat(model.cpu())

    assert torch.equal(run(True), run(False))


@needs_gpu
@pytest.mark.parametrize("source", ["lr", "found_inf"])
def test_numbers_of_the_gpu_are_awaited_where_parameters_are_on_the_cpu(source):  # P5
    """An asynchronous copy to the CPU is no value yet while the GPU is busy."""
    p = parameter(5)
    optimizer = NoUpdate([p], lr=torch.tensor(LR, device="cuda") if source == "lr" else LR)
    DecoupledWD(optimizer, WD, max_lr=LR)
    expected = torch.ones(5)
    for step in range(5):
        torch.cuda._sleep(100_000_000)
        if source == "lr":
            optimizer.param_groups[0]["lr"] = torch.tensor(LR / 2, device="cuda") * (step + 1)
            expected *= 1 - LR / 2 * (step + 1) * WD
        else:
            optimizer.found_inf = torch.tensor(float(step % 2), device="cuda") * 1
            expected *= 1 if step % 2 else 1 - LR * WD
        optimizer.step()
        assert torch.allclose(p.data, expected, rtol=1e-5)


# CUDA graphs: a replay repeats what was captured. A number of the host is frozen in it.


def replayed(cls, wd, attach=None, tensor=True, capture=True):
    """The weights after replays for which the lr, if it is a tensor, and gradients change."""
    model = network()
    lr = torch.tensor(LR, device="cuda") if tensor else LR
    optimizer = cls(model.parameters(), lr=lr, weight_decay=wd, capturable=True)
    if attach:
        attach(optimizer)
    random_gradients(model, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    step = optimizer.step
    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        step = graph.replay
    after = []
    for index in range(6):
        if tensor:
            lr.fill_(LR / (index + 1))
        random_gradients(model, index)
        step()
        after.append(flat(model))
    return torch.stack(after)


@needs_gpu
@pytest.mark.parametrize("tensor", [True, False], ids=["tensor lr", "float lr"])
def test_a_graph_replays_the_decay(tensor):  # P4, P8: with a tensor nothing is deferred
    for quantum, wd in [(None, WD), (0, WD), *([(None, 1e-6)] if tensor else [])]:
        ours = replayed(Adam, INNER_WD, attach(quantum, wd), tensor=tensor)
        assert torch.equal(ours, replayed(AdamW, wd, tensor=tensor))
        assert torch.equal(ours, replayed(AdamW, wd, tensor=tensor, capture=False))


@needs_gpu
@pytest.mark.parametrize("wd", [decreasing, 1e-6], ids=["schedule", "deferred"])
def test_a_graph_that_would_be_wrong_is_refused(wd):  # P8, P10
    model = network()
    optimizer = Adam(model.parameters(), lr=LR, weight_decay=INNER_WD, capturable=True)
    DecoupledWD(optimizer, wd, total_steps=20)
    random_gradients(model, 0)
    for _ in range(3):
        optimizer.step()
    before = flat(model)
    with pytest.raises(ValueError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert torch.equal(flat(model), before)
    optimizer.step()
    assert not torch.equal(flat(model), before)
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD


@pytest.fixture
def capturing(monkeypatch):
    """Returns functions that pretend that a CUDA graph is being captured, and end it."""

    def start():
        for name in ("is_available", "is_initialized", "is_current_stream_capturing"):
            monkeypatch.setattr(torch.cuda, name, lambda: True)
        monkeypatch.setattr(torch.cuda, "_initialized", True)

    return start, monkeypatch.undo


@pytest.mark.parametrize(
    ("wd", "match"),
    [([decreasing] * 2, "schedule"), ([decreasing, WD], "schedule"), ([1e-6] * 2, "quantum")],
)
def test_a_capture_that_would_be_wrong_is_refused_without_a_gpu(wd, match, capturing):  # P8, P10
    optimizer = NoUpdate([{"params": [parameter(5)]} for _ in range(2)])
    optimizer.param_groups[0]["weight_decay"] = INNER_WD
    DecoupledWD(optimizer, wd, total_steps=8)
    optimizer.step()
    before = weights(optimizer)
    start, end = capturing
    start()
    with pytest.raises(ValueError, match=f"(?s)(?=.*CUDA graph)(?=.*{match})"):
        optimizer.step()
    assert all(map(torch.equal, before, params_of(optimizer)))
    end()
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD
    for _ in range(3):
        optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD


def test_a_capture_of_a_constant_shrink_is_right_without_a_gpu(capturing):  # P4
    p = parameter(5)
    optimizer = NoUpdate([p], lr=LR)
    DecoupledWD(optimizer, WD)
    expected = torch.ones(5)
    start, _ = capturing
    start()
    for _ in range(3):
        optimizer.step()
        expected.mul_(1 - LR * WD)
        assert torch.equal(p.data, expected)
