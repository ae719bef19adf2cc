"""One multi-tensor call per kind of parameter, no copy and no synchronization (P11)."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers import NoUpdate, parameter, params_of, zero_gradients
from torch import nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from wd_callbacks.torch import DecoupledWD

LR, WD, QUANTUM = 0.5, 0.2, 0.3


class Marked(torch.Tensor):
    """A tensor type of its own, with nothing else new."""


class Operations(TorchDispatchMode):
    """Notes the tensors of each in-place multi-tensor call, and the elements of what is made."""

    def __init__(self):
        super().__init__()
        self.calls, self.made = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("_foreach") and name.endswith("_"):
            self.calls.append(len(args[0]))
        elif func.overloadpacket is not torch.ops.aten.detach:  # what `p.data` is
            self.made += [t.numel() for t in [result] if isinstance(t, torch.Tensor)]
        return result


def seen(optimizer):
    """The multi-tensor calls of a step, which must make nothing but numbers."""
    with Operations() as operations:
        optimizer.step()
    assert set(operations.made) <= {1}
    return operations.calls


def mixed_groups():
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    first = [parameter(5, dtype=dtype) for dtype in (*dtypes, *dtypes[:2])]
    marked = [nn.Parameter(torch.ones(5).as_subclass(Marked)) for _ in range(2)]
    second = [*marked, *(parameter(5, device=d) for d in ("cpu", "meta", "meta"))]
    zero_gradients(second)
    return [{"params": first}, {"params": second, "lr": LR / 2}]


@pytest.mark.parametrize("quantum", [0, QUANTUM], ids=["applied", "deferred"])
def test_one_call_for_each_kind_of_parameter(quantum):  # P11
    optimizer = NoUpdate(mixed_groups(), lr=LR)
    DecoupledWD(optimizer, WD, quantum=quantum)
    optimizer.step()
    for _ in range(2):
        calls = seen(optimizer)
        first, second = sorted(calls[:5]), sorted(calls[5:])
        assert (first, second) == (([1, 1, 1, 2, 2], [1, 2, 2]) if quantum == 0 else ([], []))


@pytest.mark.parametrize("change", ["dtype", "type", "device"])
def test_a_parameter_changed_in_the_middle_has_its_own_call(change):  # P11
    params = [parameter(5) for _ in range(3)]
    optimizer = NoUpdate(params, lr=LR)
    DecoupledWD(optimizer, WD)
    optimizer.step()
    params[1].grad = None  # torch swaps the gradients along
    new = {
        "dtype": torch.ones(5, dtype=torch.float64),
        "type": torch.ones(5).as_subclass(Marked),
        "device": torch.ones(5, device="meta"),
    }[change]
    torch.utils.swap_tensors(params[1], nn.Parameter(new))
    zero_gradients(params[1:2])
    for _ in range(2):
        assert sorted(seen(optimizer)) == [1, 2]


@pytest.mark.filterwarnings("ignore:.*quantum")
def test_one_call_where_the_deferred_decay_differs():  # P8, P11
    optimizer = NoUpdate([parameter(5) for _ in range(6)], lr=LR)
    decay = DecoupledWD(optimizer, WD, quantum=1e-9)
    optimizer.step()
    state = decay.state_dict()
    state["owed"] = [[0.0, 0.0, 0.1, 0.1, 0.2, 0.3]]
    decay.detach()
    decay = DecoupledWD(optimizer, WD, quantum=0.15)
    decay.load_state_dict(state)
    assert seen(optimizer) == [4]  # 0.1 each, and the first two have not come to 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_step_allocates_no_memory_but_for_numbers(dtype):  # P11
    optimizer = NoUpdate([parameter(4096, dtype=dtype) for _ in range(3)], lr=LR)
    DecoupledWD(optimizer, WD)
    optimizer.step()

    def largest(action):
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            action()
        events = [event for event in profile.events() if event.name != "[memory]"]
        return max(event.cpu_memory_usage for event in events)

    assert largest(optimizer.step) <= 64
    assert largest(lambda: params_of(optimizer)[0].data * 2) >= 4096  # it would be seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_lr", [LR, None], ids=["max_lr", "no max_lr"])
@pytest.mark.parametrize("source", ["number", "tensor lr", "found_inf", "both"])
def test_a_device_is_never_asked_for_a_value(source, max_lr, dtype):  # P11
    """The device "meta" has no values: an attempt to read one raises."""
    lr = torch.tensor(LR, device="meta") if source in ("tensor lr", "both") else LR
    params = [parameter(5, dtype=dtype, device="meta") for _ in range(3)]
    optimizer = NoUpdate(params, lr=lr)
    DecoupledWD(optimizer, lambda progress: WD * (1 - progress), total_steps=8, max_lr=max_lr)
    if source in ("found_inf", "both"):
        optimizer.found_inf = torch.tensor(0.0, device="meta")
    optimizer.step()
    for _ in range(3):
        assert seen(optimizer) == [3]
    with pytest.raises(RuntimeError, match="meta tensors"):
        params[0].sum().item()


# Lifetimes


@pytest.mark.parametrize("quantum", [0, QUANTUM])
def test_a_decay_that_outlives_its_optimizer_keeps_no_weight(quantum):  # P11
    optimizer = SGD([parameter(5)], lr=LR)
    decay = DecoupledWD(optimizer, WD, quantum=quantum)
    optimizer.step()
    weight = weakref.ref(params_of(optimizer)[0])
    del optimizer
    gc.collect()
    assert weight() is None
    assert not decay.is_attached


@pytest.mark.parametrize("quantum", [0, QUANTUM])
def test_replaced_data_is_freed(quantum):  # P11
    values = torch.ones(5).numpy().copy()
    storage = weakref.ref(values)
    params = [parameter(5), nn.Parameter(torch.from_numpy(values)), parameter(5)]
    del values
    zero_gradients(params)
    optimizer = SGD(params, lr=LR)
    DecoupledWD(optimizer, WD, quantum=quantum)
    optimizer.step()
    assert storage() is not None
    params[1].data = torch.ones(5)
    optimizer.step()
    gc.collect()
    assert storage() is None


@pytest.mark.parametrize(("quantum", "replaced"), [(0, True), (QUANTUM, False)])
def test_parameters_that_have_left_are_freed(quantum, replaced):  # P11
    params = [parameter(5) for _ in range(3)]
    optimizer = SGD(params, lr=LR)
    DecoupledWD(optimizer, WD, quantum=quantum)
    optimizer.step()
    left = weakref.ref(params[1])
    optimizer.param_groups[0]["params"][1:2] = [parameter(5)] if replaced else []
    del params
    optimizer.step()
    gc.collect()
    assert left() is None
