"""On a GPU: the same bits, no synchronization, no memory, and CUDA graphs."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers import INNER_WD, NoUpdate, flat, parameter, random_gradients
from reference.loops import decays_by_hand
from torch import nn
from torch.optim import SGD, Adam, AdamW

from wd_callbacks.schedules import Linear
from wd_callbacks.torch import DecoupledWD

LR, WD, STEPS = 0.05, 0.5, 10

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
two_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)


def network(device="cuda", dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(device, dtype)


def options(name):
    """Arguments of Adam."""
    implementation, *tensor = name.split(", ")
    options = {"foreach": False} if implementation == "for-loop" else {implementation: True}
    return {**options, "lr": torch.tensor(LR, device="cuda") if tensor else LR}


def optimizer_of(model, cls, wd, **settings):
    if cls is not SGD:
        is_half = next(model.parameters()).dtype.itemsize == 2
        settings["eps"] = 1e-3 if is_half else 1e-8  # float16 has no 1e-8
    return cls(model.parameters(), **{"lr": LR, "weight_decay": wd, **settings})


def decay(quantum=None, wd=WD):
    return lambda optimizer: DecoupledWD(optimizer, wd, quantum=quantum)


def by_hand(optimizer):
    decays_by_hand(optimizer, WD)


def path(cls, wd, attach=None, dtype=torch.float32, step_of=lambda it: it.step, **settings):
    """The weights after each step. Gradients, and a learning rate in a tensor, change in place."""
    model = network(dtype=dtype)
    optimizer = optimizer_of(model, cls, wd, **settings)
    if attach:
        attach(optimizer)
    random_gradients(model, 0)
    step = step_of(optimizer)
    after = []
    for index in range(STEPS):
        random_gradients(model, index)
        if isinstance(settings.get("lr"), torch.Tensor):
            settings["lr"].fill_(LR / (index + 1))
        step()
        after.append(flat(model))
    return torch.stack(after)


ADAMS = ["for-loop", "foreach", "capturable", "capturable, tensor lr", "for-loop, tensor lr"]


@needs_gpu
@pytest.mark.parametrize("name", ADAMS)
@each_dtype
def test_adam_is_adamw(dtype, name):  # P4
    expected = path(AdamW, WD, dtype=dtype, **options(name))
    for quantum in (None, 0):
        ours = path(Adam, INNER_WD, decay(quantum), dtype, **options(name))
        if dtype.itemsize == 2:  # AdamW's own factor may be rounded
            assert torch.allclose(ours, expected, rtol=STEPS * torch.finfo(dtype).eps, atol=1e-2)
        else:
            assert torch.equal(ours, expected)
        assert not torch.equal(ours, path(Adam, 0.0, dtype=dtype, **options(name)))


@needs_gpu
@each_dtype
def test_sgd_equals_the_hand_written_loop(dtype):  # P4, P5
    assert torch.equal(path(SGD, INNER_WD, decay(0), dtype), path(SGD, 0.0, by_hand, dtype))


@needs_gpu
@each_dtype
def test_fused_adam_is_within_one_ulp_of_adamw_per_step(dtype):  # P4
    theirs, ours = network(dtype=dtype), network(dtype=dtype)
    adamw = optimizer_of(theirs, AdamW, WD, fused=True)
    adam = optimizer_of(ours, Adam, INNER_WD, fused=True)
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


ALL = ["for-loop", "foreach", "fused", "capturable", "capturable, tensor lr", "fused, tensor lr"]


@needs_gpu
@two_dtypes
@pytest.mark.parametrize("wd", [WD, 1e-6, Linear(WD, 0)], ids=["number", "deferred", "schedule"])
@pytest.mark.parametrize("name", ALL)
def test_a_step_does_not_synchronize(name, wd, dtype):  # P11
    model = network(dtype=dtype)
    optimizer = Adam(model.parameters(), **options(name))
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
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_an_overflow_decays_nothing_without_a_synchronization(fused):  # P1, P11
    def run(cls, wd, decays):
        model = network()
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd, fused=fused)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0, max_lr=LR)
            # In the step alone: a GradScaler synchronizes by itself around it.
            optimizer.step = no_synchronization()(optimizer.step)
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


@needs_gpu
@two_dtypes
@pytest.mark.parametrize("name", [*ALL[:5], "found_inf"])
def test_a_step_takes_no_memory_but_for_numbers(name, dtype):  # P11
    def run(decays):
        """How many blocks and bytes a step takes, including what it gives back."""
        params = [parameter(1 << 18, device="cuda", dtype=dtype) for _ in range(3)]
        optimizer = Adam(params, **options("fused" if name == "found_inf" else name))
        if name == "found_inf":
            optimizer.found_inf = torch.tensor(0.0, device="cuda")
            optimizer.grad_scale = None
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        stats = []
        for _ in range(4):
            optimizer.step()
            torch.cuda.synchronize()
            stats.append(torch.cuda.memory_stats())
        keys = ("allocation.all.allocated", "allocated_bytes.all.allocated")
        return [stats[-1][key] - stats[-2][key] for key in keys]

    (blocks, size), (their_blocks, their_size) = run(True), run(False)
    numbers = 8 if name in ("capturable, tensor lr", "found_inf") else 0
    assert blocks - their_blocks <= numbers
    assert size - their_size <= 512 * numbers  # the allocator's smallest block


@needs_gpu
def test_gpu_and_cpu_parameters_in_one_group():  # P5, P11
    def run(attach):
        model = network("cpu")
        model[2].to("cuda")
        optimizer = SGD(model.parameters(), lr=LR, foreach=False)
        attach(optimizer)
        for step in range(STEPS):
            random_gradients(model, step)
            optimizer.step()
        return flat(model.cpu())

    assert torch.equal(run(decay(0)), run(by_hand))


@needs_gpu
@pytest.mark.parametrize("source", ["lr", "found_inf"])
def test_numbers_of_the_gpu_are_awaited_where_parameters_are_on_the_cpu(source):  # P5
    """An asynchronous copy to the CPU is no value yet while the GPU is busy."""
    p, expected = parameter(5), torch.ones(5)
    optimizer = NoUpdate([p], lr=torch.tensor(LR, device="cuda") if source == "lr" else LR)
    DecoupledWD(optimizer, WD, max_lr=LR)
    for step in range(6):
        number = torch.tensor(step % 2, device="cuda")
        torch.cuda._sleep(100_000_000)
        if source == "lr":
            optimizer.param_groups[0]["lr"] = LR * number
            expected *= 1 - LR * WD * (step % 2)
        else:
            optimizer.found_inf = 1.0 * number
            expected *= 1 if step % 2 else 1 - LR * WD
        optimizer.step()
        assert torch.allclose(p.data, expected, rtol=1e-5)


# CUDA graphs: a replay repeats what was captured. A number of the host is frozen in it.


@contextlib.contextmanager
def pretended_capture():
    """torch says that a CUDA graph is being captured."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("is_available", "is_initialized", "is_current_stream_capturing"):
            patch.setattr(torch.cuda, name, lambda: True)
        patch.setattr(torch.cuda, "_initialized", True)
        yield


def warmed_up(optimizer):
    for _ in range(3):
        optimizer.step()
    return optimizer.step


def captured(optimizer):
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step = warmed_up(optimizer)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@needs_gpu
@pytest.mark.parametrize(
    ("name", "wd"),
    [("capturable", WD), ("capturable, tensor lr", WD), ("capturable, tensor lr", 1e-6)],
)
@pytest.mark.parametrize("quantum", [0, None])
def test_a_graph_replays_the_decay(name, wd, quantum):  # P4, P8: a tensor lr defers nothing
    ours = path(Adam, INNER_WD, decay(quantum, wd), step_of=captured, **options(name))
    assert torch.equal(ours, path(AdamW, wd, step_of=warmed_up, **options(name)))


def test_a_capture_of_a_constant_shrink_is_right_without_a_gpu():  # P4
    p, expected = parameter(5), torch.ones(5)
    DecoupledWD(optimizer := NoUpdate([p], lr=LR), WD)
    with pretended_capture():
        for _ in range(3):
            optimizer.step()
            expected.mul_(1 - LR * WD)
            assert torch.equal(p.data, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize(
    ("wds", "match"), [([Linear(WD, 0), WD], "schedule"), ([1e-6] * 2, "quantum")]
)
def test_a_capture_that_would_be_wrong_is_refused(wds, match, device):  # P8, P10
    optimizer = NoUpdate([{"params": [parameter(5, device=device)]} for _ in range(2)])
    optimizer.param_groups[0]["weight_decay"] = INNER_WD
    DecoupledWD(optimizer, wds, total_steps=8)
    optimizer.step()
    before = flat(optimizer)
    on_cpu = device == "cpu"
    capture = pretended_capture() if on_cpu else torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(ValueError, match=f"(?s)(?=.*CUDA graph)(?=.*{match})"), capture:
        optimizer.step()
    assert torch.equal(before, flat(optimizer))
    for _ in range(3):
        assert optimizer.param_groups[0]["weight_decay"] == INNER_WD
        optimizer.step()
    assert torch.equal(before, flat(optimizer)) == (match == "quantum")  # deferred there
