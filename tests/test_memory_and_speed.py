"""One multi-tensor call per kind of parameter, no copy and no synchronization (P11)."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers import Marked, NoUpdate, parameter, zero_gradients
from torch import nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from wd_callbacks.torch import DecoupledWD

LR, WD, QUANTUM = 0.5, 0.2, 0.3


def marked():
    return nn.Parameter(torch.ones(5).as_subclass(Marked))


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


def calls_of(optimizer):
    """The multi-tensor calls of a step, which must make nothing but numbers."""
    with Operations() as operations:
        optimizer.step()
    assert set(operations.made) <= {1}
    return operations.calls


@pytest.mark.parametrize(("quantum", "calls"), [(0, [1, 1, 1, 2, 2, 1, 2, 2]), (QUANTUM, [])])
def test_one_call_for_each_kind_of_parameter(quantum, calls):  # P11
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
    first = [parameter(5, dtype=dtype) for dtype in (*dtypes, *dtypes[:2])]
    second = [marked(), marked(), *(parameter(5, device=it) for it in ("cpu", "meta", "meta"))]
    zero_gradients(second)
    optimizer = NoUpdate([{"params": first}, {"params": second, "lr": LR / 2}], lr=LR)
    DecoupledWD(optimizer, WD, quantum=quantum)
    optimizer.step()
    for _ in range(2):
        seen = calls_of(optimizer)
        assert [*sorted(seen[:5]), *sorted(seen[5:])] == calls


@pytest.mark.parametrize("change", ["dtype", "type", "device"])
def test_a_parameter_changed_in_the_middle_has_its_own_call(change):  # P11
    params = [parameter(5) for _ in range(3)]
    DecoupledWD(optimizer := NoUpdate(params, lr=LR), WD)
    optimizer.step()
    params[1].grad = None  # torch swaps the gradients along
    new = {"dtype": parameter(5, dtype=torch.float64), "device": parameter(5, device="meta")}
    torch.utils.swap_tensors(params[1], new.get(change, marked()))
    zero_gradients(params[1:2])
    for _ in range(2):
        assert sorted(calls_of(optimizer)) == [1, 2]


@pytest.mark.filterwarnings("ignore:.*quantum")
def test_one_call_where_the_deferred_decay_differs():  # P8, P11
    optimizer = NoUpdate([parameter(5) for _ in range(6)], lr=LR)
    with DecoupledWD(optimizer, WD, quantum=1e-9) as decay:
        optimizer.step()
        state = decay.state_dict()
    state["owed"] = [[0.0, 0.0, 0.1, 0.1, 0.2, 0.3]]
    DecoupledWD(optimizer, WD, quantum=0.15).load_state_dict(state)
    assert calls_of(optimizer) == [4]  # 0.1 each, and the first two have not come to 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_allocates_no_memory_but_for_numbers(dtype):  # P11
    p = parameter(4096, dtype=dtype)
    DecoupledWD(optimizer := NoUpdate([p, parameter(4096, dtype=dtype)], lr=LR), WD)
    optimizer.step()

    def largest(action):
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            action()
        return max(it.cpu_memory_usage for it in profile.events() if it.name != "[memory]")

    assert largest(optimizer.step) <= 64
    assert largest(lambda: p.data * 2) >= 4096  # it would be seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_lr", [LR, None], ids=["max_lr", "no max_lr"])
@pytest.mark.parametrize("source", ["tensor lr", "found_inf", "both"])
def test_a_device_is_never_asked_for_a_value(source, max_lr, dtype):  # P11
    """The device "meta" has no values: an attempt to read one raises."""
    lr = LR if source == "found_inf" else torch.tensor(LR, device="meta")
    p = parameter(5, dtype=dtype, device="meta")
    optimizer = NoUpdate([p], lr=lr)
    DecoupledWD(optimizer, lambda progress: WD * (1 - progress), total_steps=8, max_lr=max_lr)
    if source != "tensor lr":
        optimizer.found_inf = torch.tensor(0.0, device="meta")
    for _ in range(3):
        assert calls_of(optimizer) == [1]
    with pytest.raises(RuntimeError, match="meta tensors"):
        p.sum().item()


@pytest.mark.parametrize("quantum", [0, QUANTUM])
def test_what_has_left_is_freed(quantum):  # P11
    optimizer = SGD([parameter(5) for _ in range(4)], lr=LR)
    decay = DecoupledWD(optimizer, WD, quantum=quantum)
    params = optimizer.param_groups[0]["params"]
    array = torch.ones(5).numpy().copy()
    params[1].data = torch.from_numpy(array)
    of_data, *of_params = map(weakref.ref, (array, *params))
    del array

    def freed():
        gc.collect()
        return [it() is None for it in (of_data, *of_params)]

    optimizer.step()
    assert freed() == [False, False, False, False, False]
    params[1].data = torch.ones(5)
    optimizer.step()
    assert freed() == [True, False, False, False, False]
    params[2:] = [parameter(5)]  # one is replaced, one leaves
    optimizer.step()
    assert freed() == [True, False, False, True, True]
    del optimizer, params
    assert freed() == [True] * 5
    assert not decay.is_attached
