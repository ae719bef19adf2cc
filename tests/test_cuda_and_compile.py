"""On a GPU: the same bits, no synchronization, no memory, CUDA graphs. Under torch.compile: no more
graphs than without the decay, and the same weights."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import warnings

import pytest
import torch
import torch._dynamo
from reference.loops import decay_by_hand
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from wd_callbacks.torch import DecoupledWD

LR, WD, INNER_WD, STEPS = 0.05, 0.5, 0.37, 10

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def fading(progress):
    return WD * (1 - progress)


def network(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(device, dtype)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def set_gradients(params, step):
    """Gradients that are the same on every device, in place where there are some."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        gradient = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        if p.grad is None:
            p.grad = gradient
        else:
            p.grad.copy_(gradient)


class Still(Optimizer):
    """Leaves the weights to the decay."""

    def __init__(self, params, lr=LR):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def step(self, closure=None):
        pass


# On a GPU

IMPLEMENTATIONS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def gpu_run(cls, wd, decays=None, dtype=torch.float32, steps=STEPS, lr=LR, **options):
    """The weights after each step, with gradients that do not depend on them."""
    model = network("cuda", dtype)
    if "tensor" in options:
        del options["tensor"]
        lr = torch.tensor(lr, device="cuda")
    eps = 1e-8 if dtype in (torch.float32, torch.float64) else 1e-3  # float16 has no 1e-8
    optimizer = cls(model.parameters(), lr=lr, weight_decay=wd, eps=eps, **options)
    if decays:
        decays(optimizer)
    path = []
    for step in range(steps):
        set_gradients(model.parameters(), step)
        optimizer.step()
        path.append(weights(model))
    return torch.stack(path)


@needs_gpu
@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("name", ["for-loop", "foreach", "capturable"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_adam_is_adamw(dtype, name, tensor):  # P4
    options = dict(IMPLEMENTATIONS[name])
    if tensor and name == "foreach":
        options["capturable"] = True  # torch wants it for a tensor on the device
    if tensor:
        options["tensor"] = True
    expected = gpu_run(AdamW, WD, dtype=dtype, **options)
    for quantum in (None, 0):
        ours = gpu_run(
            Adam, INNER_WD, lambda o, q=quantum: DecoupledWD(o, WD, quantum=q), dtype, **options
        )
        if dtype in (torch.float32, torch.float64):
            assert torch.equal(ours, expected)
        else:  # P8: LR * WD is at least both quanta, and AdamW's own factor may be rounded
            assert torch.allclose(ours, expected, rtol=STEPS * torch.finfo(dtype).eps, atol=1e-2)
        assert not torch.equal(ours, gpu_run(Adam, 0.0, None, dtype, **options))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_equals_the_hand_written_loop(dtype):  # P4, P5
    def run(decays):
        model = network("cuda", dtype)
        optimizer = SGD(model.parameters(), lr=LR)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        path = []
        for step in range(STEPS):
            set_gradients(model.parameters(), step)
            if not decays:
                decay_by_hand(optimizer.param_groups, WD)
            optimizer.step()
            path.append(weights(model))
        return torch.stack(path)

    assert torch.equal(run(True), run(False))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_fused_adam_is_within_one_ulp_of_adamw_per_step(dtype):  # P4
    eps = 1e-8 if dtype in (torch.float32, torch.float64) else 1e-3
    theirs, ours = network("cuda", dtype), network("cuda", dtype)
    adamw = AdamW(theirs.parameters(), lr=LR, weight_decay=WD, eps=eps, fused=True)
    adam = Adam(ours.parameters(), lr=LR, weight_decay=INNER_WD, eps=eps, fused=True)
    DecoupledWD(adam, WD, quantum=0)
    for step in range(STEPS):
        before = weights(theirs).double()
        for model, optimizer in ((theirs, adamw), (ours, adam)):
            set_gradients(model.parameters(), step)
            optimizer.step()
        a, b = weights(theirs).double(), weights(ours).double()
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
@pytest.mark.parametrize("wd", [WD, 1e-6, fading], ids=["number", "owed", "schedule"])
@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "tensor lr", "fused, tensor lr"])
def test_gpu_step_does_not_synchronize(name, wd, dtype):  # P11
    options = {
        **IMPLEMENTATIONS,
        "tensor lr": {"capturable": True, "lr": torch.tensor(LR, device="cuda")},
        "fused, tensor lr": {"fused": True, "lr": torch.tensor(LR, device="cuda")},
    }[name]
    model = network("cuda", dtype)
    optimizer = Adam(model.parameters(), **{"lr": LR, **options})
    DecoupledWD(optimizer, wd, total_steps=8)
    set_gradients(model.parameters(), 0)
    for _ in range(2):  # the first ones set up the optimizer's state
        optimizer.step()
    with no_synchronization():
        for _ in range(6):
            optimizer.step()
        with pytest.raises(RuntimeError, match="synchronizing"):
            weights(model).sum().item()


@needs_gpu
def test_gpu_first_step_does_not_synchronize_for_a_peak_that_nobody_asks_for():  # P11
    p = nn.Parameter(torch.ones(5, device="cuda"))
    p.grad = torch.zeros_like(p)
    optimizer = Still([p], lr=torch.tensor(LR, device="cuda"))
    DecoupledWD(optimizer, WD)
    with no_synchronization():
        optimizer.step()
    assert torch.allclose(p.data, torch.full_like(p, 1 - LR * WD))


@needs_gpu
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_gpu_overflow_decays_nothing_without_a_synchronization(fused):  # P1, P11
    def run(cls, wd, decays):
        model = network("cuda")
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd, fused=fused)
        if decays:
            forbid_synchronization(optimizer, lambda o: DecoupledWD(o, WD, quantum=0, max_lr=LR))
        scaler = torch.amp.GradScaler("cuda", init_scale=4.0, growth_interval=100)
        path = [weights(model)]
        for step in range(8):
            optimizer.zero_grad()
            x = torch.full((2, 5), 0.1 * (step + 1), device="cuda")
            loss = model(x).square().mean() * (float("inf") if step % 3 == 1 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            path.append(weights(model))
        return torch.stack(path)

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
@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "tensor lr", "found_inf"])
def test_gpu_step_takes_no_memory_but_for_numbers(name, dtype):  # P11
    options = {
        **IMPLEMENTATIONS,
        "tensor lr": {"capturable": True, "lr": torch.tensor(LR, device="cuda")},
        "found_inf": {"fused": True},
    }[name]

    def run(decays):
        params = [nn.Parameter(torch.ones(1 << 18, device="cuda", dtype=dtype)) for _ in range(3)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = Adam(params, **{"lr": LR, **options})
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
def test_gpu_small_shrinks_are_not_lost(dtype):  # P8
    shrink = 1e-8 if dtype == torch.float32 else 1e-4
    p = nn.Parameter((torch.rand(4096) + 1).to("cuda", dtype))
    p.grad = torch.zeros_like(p)
    before = p.detach().double()
    optimizer = SGD([p], lr=0.01)
    decay = DecoupledWD(optimizer, shrink / 0.01)
    for _ in range(500):
        optimizer.step()
    ((owed,),) = decay.state_dict()["owed"]
    applied = -torch.log(p.detach().double() / before).mean().item()
    assert applied > 0
    assert applied == pytest.approx(-500 * math.log1p(-shrink) - owed, rel=0.02)


@needs_gpu
def test_gpu_and_cpu_parameters_in_one_group():  # P5, P11
    def run(decays):
        model = network()
        model[2].to("cuda")
        optimizer = SGD(model.parameters(), lr=LR, foreach=False)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        for step in range(9):
            if step in (3, 6):  # the middle of the list moves, and keeps its identity
                model[0].bias.data = model[0].bias.data.to("cuda" if step == 3 else "cpu")
                model[0].bias.grad = None
            set_gradients(model.parameters(), step)
            if not decays:
                decay_by_hand(optimizer.param_groups, WD)
            optimizer.step()
        return weights(model.cpu())

    assert torch.equal(run(True), run(False))


@needs_gpu
@pytest.mark.parametrize("source", ["lr", "found_inf"])
def test_gpu_numbers_are_awaited_where_parameters_are_on_the_cpu(source):  # P5
    """An asynchronous copy to the CPU is no value yet while the GPU is busy."""
    p = nn.Parameter(torch.ones(5))
    p.grad = torch.zeros_like(p)
    optimizer = Still([p], lr=torch.tensor(LR, device="cuda") if source == "lr" else LR)
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


def captured(cls, wd, decays=None, tensor=True, capture=True):
    """The weights after replays for which the lr, if it is a tensor, and gradients change."""
    model = network("cuda")
    params = list(model.parameters())
    lr = torch.tensor(LR, device="cuda") if tensor else LR
    optimizer = cls(params, lr=lr, weight_decay=wd, capturable=True)
    if decays:
        decays(optimizer)
    set_gradients(params, 0)
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
    path = []
    for index in range(6):
        if tensor:
            lr.fill_(LR / (index + 1))
        set_gradients(params, index)
        step()
        path.append(weights(model))
    return torch.stack(path)


@needs_gpu
@pytest.mark.parametrize("tensor", [True, False], ids=["tensor lr", "float lr"])
def test_gpu_graph_replays_the_decay(tensor):  # P4
    for quantum in (None, 0):
        ours = captured(
            Adam, INNER_WD, lambda o, q=quantum: DecoupledWD(o, WD, quantum=q), tensor=tensor
        )
        assert torch.equal(ours, captured(AdamW, WD, tensor=tensor))
        assert torch.equal(ours, captured(AdamW, WD, tensor=tensor, capture=False))


@needs_gpu
def test_gpu_graph_of_a_tensor_lr_owes_nothing():  # P8
    ours = captured(Adam, INNER_WD, lambda o: DecoupledWD(o, 1e-6))
    assert torch.equal(ours, captured(AdamW, 1e-6))


@needs_gpu
@pytest.mark.parametrize("wd", [fading, 1e-6], ids=["schedule", "owed"])
def test_gpu_graph_that_would_be_wrong_is_refused(wd):  # P8, P10
    model = network("cuda")
    optimizer = Adam(model.parameters(), lr=LR, weight_decay=INNER_WD, capturable=True)
    DecoupledWD(optimizer, wd, total_steps=20)
    set_gradients(model.parameters(), 0)
    for _ in range(3):
        optimizer.step()
    before = weights(model)
    with pytest.raises(ValueError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert torch.equal(weights(model), before)
    optimizer.step()
    assert not torch.equal(weights(model), before)
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD


# What of this can be seen without a GPU


@pytest.fixture
def capturing(monkeypatch):
    """Tells that a CUDA graph is being captured, however one asks; returns how to end it."""
    for name in ("is_available", "is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    return monkeypatch.undo


@pytest.mark.parametrize(
    ("wd", "match"), [(fading, "schedule"), ([fading, WD], "schedule"), (1e-6, "quantum")]
)
def test_a_capture_that_would_be_wrong_is_refused(wd, match, monkeypatch, request):  # P8, P10
    params = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizer = Still([{"params": [p]} for p in params])
    optimizer.param_groups[0]["weight_decay"] = INNER_WD
    DecoupledWD(optimizer, wd if isinstance(wd, list) else [wd, wd], total_steps=8)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    end = request.getfixturevalue("capturing")
    with pytest.raises(ValueError, match=f"(?s)(?=.*CUDA graph)(?=.*{match})"):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    end()
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD
    for _ in range(3):
        optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD


def test_a_capture_of_a_constant_shrink_is_right(capturing):  # P4
    p = nn.Parameter(torch.ones(5))
    p.grad = torch.zeros_like(p)
    optimizer = Still([p])
    DecoupledWD(optimizer, WD)
    expected = torch.ones(5)
    for _ in range(3):
        optimizer.step()
        expected.mul_(1 - LR * WD)
        assert torch.equal(p.data, expected)


class Operations(TorchDispatchMode):
    """The names of what is done, and the elements of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.names, self.made = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is not torch.ops.aten.detach:  # what `p.data` is
            self.names.append(func.overloadpacket.__name__)
            self.made += [result.numel()] if isinstance(result, torch.Tensor) else []
        return result


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_lr", [LR, None], ids=["max_lr", "no max_lr"])
@pytest.mark.parametrize("source", ["number", "tensor lr", "found_inf", "both"])
def test_a_device_is_never_asked(source, max_lr, dtype):  # P11
    """The device "meta" has no values: whoever asks for one fails."""
    tensor_lr = source in ("tensor lr", "both")
    params = [nn.Parameter(torch.ones(5, dtype=dtype, device="meta")) for _ in range(3)]
    optimizer = Still(params, lr=torch.tensor(LR, device="meta") if tensor_lr else LR)
    DecoupledWD(optimizer, fading, total_steps=8, max_lr=max_lr)
    if source in ("found_inf", "both"):
        optimizer.found_inf = torch.tensor(0.0, device="meta")
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for _ in range(3):
        with Operations() as seen:
            optimizer.step()
        (done,) = [name for name in seen.names if name.startswith("_foreach")]
        half = dtype in HALVES and source != "number"
        assert done == ("_foreach_addcmul_" if half else "_foreach_mul_")
        assert set(seen.made) <= {1}
        assert not seen.made or source != "number"
    with pytest.raises(RuntimeError, match="meta tensors"):
        params[0].sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("default", "device"),
    [(torch.bfloat16, None), (torch.float16, None), (None, "meta")],
    ids=["bfloat16", "float16", "meta"],
)
def test_the_default_dtype_and_device_do_not_matter(default, device, dtype):  # P4
    p = nn.Parameter(torch.linspace(1, 2, 50).to(dtype))
    p.grad = torch.zeros_like(p)
    expected = p.detach().clone()
    optimizer = SGD([p], lr=0.1, foreach=False)
    DecoupledWD(optimizer, 0.3, quantum=0)
    old = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default or old)
        with torch.device(device) if device else contextlib.nullcontext():
            optimizer.step()
    finally:
        torch.set_default_dtype(old)
    assert torch.equal(p.data, expected.mul_(1 - 0.1 * 0.3))


# torch.compile


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_step(model, optimizer, batch, how, backend):
    """A function of the index of the step, of which ``how`` tells what is compiled."""

    def forward(index):
        optimizer.zero_grad()
        model(batch(index)).square().mean().backward()

    if how == "whole step":

        @torch.compile(backend=backend)
        def train(x):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        return lambda index: train(batch(index))
    if how == "not":
        step = optimizer.step
    elif how == "optimizer.step":
        step = torch.compile(optimizer.step, backend=backend)
    else:
        step = torch.compile(lambda: optimizer.step(), backend=backend)
    return lambda index: (forward(index), step())


HOWS = ["optimizer.step", "function", "whole step"]


def compiled_run(how, cls=Adam, wd=INNER_WD, attach=None, late=False, by_hand=None, backend=None):
    """The weights after each step, and how many graphs had been compiled by then.

    Args:
        how: What is compiled.
        cls: The optimizer.
        wd: Its own weight decay.
        attach: Attaches the decay.
        late: Whether it is attached after the first steps.
        by_hand: The coefficient of the hand-written decay as a function of the progress.
        backend: What compiles.
    """
    model = network()
    optimizer = cls(model.parameters(), lr=LR, weight_decay=wd)
    backend = backend or CompileCounter()
    if attach and not late:
        attach(optimizer)
    step = compiled_step(
        model, optimizer, lambda index: torch.full((2, 5), 0.1 * (index + 1)), how, backend
    )
    path, frames = [], []
    if attach and late:
        attach(optimizer)
    for index in range(STEPS):
        if by_hand:  # after the gradients, before the update, which is then the compiled one

            def decay(*_, index=index):
                decay_by_hand(optimizer.param_groups, by_hand(index / STEPS))

            hook = optimizer.register_step_pre_hook(torch.compiler.disable(decay))
        step(index)
        if by_hand:
            hook.remove()
        path.append(weights(model))
        frames.append(backend.frame_count)
    assert optimizer.param_groups[0]["weight_decay"] == wd  # P3
    return torch.stack(path), frames


@functools.cache
def undecayed(how, cls):
    """A run of the same optimizer alone."""
    return compiled_run(how, cls, 0.0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(backend):  # P4, P5
    def run(cls, wd, decays):
        net = network()
        model = torch.compile(net, backend=backend)
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd)
        if decays:
            excluded = {"exclude": "2.bias", "model": model} if decays == "bias" else {}
            DecoupledWD(optimizer, WD, quantum=0, **excluded)
        for index in range(STEPS):
            optimizer.zero_grad()
            model(torch.full((2, 5), 0.1 * index)).square().mean().backward()
            optimizer.step()
        return weights(net)

    ours, expected = run(Adam, INNER_WD, True), run(AdamW, WD, False)
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, run(Adam, 0.0, False))
    assert not torch.equal(ours, run(Adam, INNER_WD, "bias"))  # P12: without the prefix


@pytest.mark.parametrize(
    ("how", "late"), [*((how, False) for how in HOWS), ("optimizer.step", True), ("function", True)]
)
def test_a_compiled_step_is_compiled_adamw_s(how, late):  # P4, P5
    expected, graphs = compiled_run(how, AdamW, WD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of ours is beyond the compiler
        ours, frames = compiled_run(how, attach=lambda o: DecoupledWD(o, WD), late=late)
    assert torch.equal(ours, expected)
    assert frames == graphs


@pytest.mark.parametrize(("how", "quantum"), [*((how, 0) for how in HOWS), ("function", None)])
def test_a_changing_coefficient_compiles_nothing_anew(how, quantum):  # P4, P6, P11
    expected, _ = compiled_run(how, wd=0.0, by_hand=fading)
    ours, frames = compiled_run(
        how, attach=lambda o: DecoupledWD(o, fading, quantum=quantum, total_steps=STEPS)
    )
    assert torch.equal(ours, expected)
    assert frames == undecayed(how, Adam)[1]
    assert frames[0] == frames[-1]


@pytest.mark.parametrize(("how", "wd"), [*((how, fading) for how in HOWS), ("function", WD)])
def test_debts_compile_nothing_anew(how, wd):  # P8, P11
    decays = []

    def attach(optimizer):
        decays.append(DecoupledWD(optimizer, wd, quantum=0.06, total_steps=STEPS))

    ours, frames = compiled_run(how, SGD, attach=attach)
    expected, _ = compiled_run("not", SGD, attach=attach)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    assert frames == undecayed(how, SGD)[1]
    assert decays[0].state_dict() == decays[1].state_dict()
    assert decays[0].state_dict()["owed"][0][0] > 0
    assert decays[0].state_dict()["payments"][0][0] > 0


@pytest.mark.parametrize("quantum", [0, 0.06], ids=["applied", "owed"])
def test_a_compiled_step_with_a_closure(quantum):  # P1, P3, P11
    def attach(optimizer):
        DecoupledWD(optimizer, fading, quantum=quantum, total_steps=STEPS)

    def run(own, attach=None, by_hand=False, compiled=True):
        model = network()
        optimizer = Adam(model.parameters(), lr=LR, weight_decay=own)
        if attach:
            attach(optimizer)
        counter = CompileCounter()
        step = torch.compile(optimizer.step, backend=counter) if compiled else optimizer.step
        path, frames, seen = [], [], []
        decay = torch.compiler.disable(decay_by_hand)
        for index in range(STEPS):
            x = torch.full((2, 5), 0.1 * (index + 1))

            def closure(x=x, index=index):
                seen.append(optimizer.param_groups[0]["weight_decay"])
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                if by_hand:
                    decay(optimizer.param_groups, fading(index / STEPS))
                return loss

            step(closure)
            path.append(weights(model))
            frames.append(counter.frame_count)
        assert seen == [own] * STEPS
        assert optimizer.param_groups[0]["weight_decay"] == own
        return torch.stack(path), frames

    ours, frames = run(INNER_WD, attach)
    if quantum == 0:
        assert torch.equal(ours, run(0.0, by_hand=True)[0])
    else:
        expected, _ = run(INNER_WD, attach, compiled=False)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert frames[1] == frames[-1]


class StepTwice(Adam):
    def step(self, closure=None):
        return super().step(closure)


def test_a_compiled_step_that_calls_super_decays_once():  # P1
    Adam([nn.Parameter(torch.ones(1))])  # from here on Adam.step runs hooks itself
    AdamW([nn.Parameter(torch.ones(1))])
    expected, graphs = compiled_run("function", AdamW, WD)
    ours, frames = compiled_run("function", StepTwice, attach=lambda o: DecoupledWD(o, WD))
    assert torch.equal(ours, expected)
    assert frames[1] == frames[-1]
    assert graphs[1] == graphs[-1]


def test_fullgraph_is_refused_by_torch_s_own_optimizers():
    """So there is nothing to be had from hooks that could be traced."""
    model = network()
    optimizer = AdamW(model.parameters(), lr=LR)
    set_gradients(model.parameters(), 0)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


def test_a_compiled_step_through_aot():  # P4, P5
    backends = [CompileCounterWithBackend("aot_eager") for _ in range(2)]
    expected, graphs = compiled_run("function", wd=0.0, by_hand=fading, backend=backends[0])
    ours, frames = compiled_run(
        "function",
        attach=lambda o: DecoupledWD(o, fading, quantum=0, total_steps=STEPS),
        backend=backends[1],
    )
    assert torch.equal(ours, expected)
    assert frames == graphs


def inductor(device):
    """Our step, compiled to machine code, is near AdamW's."""

    def run(cls, wd, decays):
        model = network(device)
        optimizer = cls(model.parameters(), lr=LR, weight_decay=wd)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        step = torch.compile(optimizer.step) if decays else optimizer.step
        for index in range(3):
            set_gradients(model.parameters(), index)
            step()
        return weights(model)

    ours, expected = run(Adam, INNER_WD, True), run(AdamW, WD, False)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert (ours - run(Adam, 0.0, False)).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_step_compiled_by_inductor():  # P4, P5
    inductor("cpu")


@needs_gpu
def test_gpu_step_compiled_by_inductor():  # P4, P5
    inductor("cuda")
