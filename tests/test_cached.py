"""What the decay remembers about the parameters never outlives a change of them."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from wd_callbacks.torch import DecoupledWD

LR, WD, QUANTUM = 0.5, 0.2, 0.3


class Marked(torch.Tensor):
    """A tensor type of its own, with nothing else new."""


class Run:
    """A few steps of one optimizer, and the weights after each.

    Args:
        decays: Attaches a decay to the optimizer; None for the hand-written one.
        cls: The optimizer.
        still: Whether gradients are 0, so that the decay alone changes the weights.
        wd: The coefficient of the hand-written decay.
    """

    def __init__(self, decays=None, cls=SGD, still=False, wd=WD):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        self.optimizer = cls(self.model.parameters(), lr=LR, foreach=False)
        self.decay = decays(self.optimizer) if decays else None
        self.still = still
        self.wd = wd
        self.history = []
        self.due, self.applied = {}, {}
        self.rough = set()  # parameters that were rounded to half precision

    @property
    def groups(self):
        return self.optimizer.param_groups

    @property
    def params(self):
        return self.groups[0]["params"]

    def listed(self):
        """Every parameter of the optimizer once."""
        return list(dict.fromkeys(p for group in self.groups for p in group["params"]))

    def new_group(self, *params, lr=LR / 2):
        self.optimizer.add_param_group({"params": list(params), "lr": lr})

    def step(self, *without, context=nullcontext):
        """A step in which the parameters ``without`` have no gradient."""
        for index, p in enumerate(self.listed()):
            p.grad = None
            if not any(p is q for q in without):
                generator = torch.Generator().manual_seed(100 * len(self.history) + index)
                gradient = torch.randn(p.shape, generator=generator) * (0 if self.still else 1)
                p.grad = torch.zeros_like(p) + gradient.to(p.device, p.dtype)
        before = {p: p.detach().clone() for p in self.listed()}
        with context():
            if self.decay is None:
                self.by_hand()
            self.optimizer.step()
        if self.still:
            self.keep_books(before)
        self.history.append([p.detach().clone() for p in self.listed()])

    def by_hand(self):
        """The hand-written loop; a parameter that is listed twice decays once."""
        decayed = set()
        for group in self.groups:
            for p in group["params"]:
                if p.grad is not None and p not in decayed:
                    p.data.mul_(1 - group["lr"] * self.wd)
                    decayed.add(p)

    def keep_books(self, before):
        """Checks in float64 that what has been applied is what was due less what is owed."""
        owed = dict.fromkeys(before, 0.0)
        for group, debts in zip(self.groups, self.decay.state_dict()["owed"], strict=True):
            for p, debt in zip(group["params"], debts, strict=True):
                owed[p] += debt
        for p in before:
            lr = next(g["lr"] for g in self.groups if any(p is q for q in g["params"]))
            if p.grad is not None:
                self.due[p] = self.due.get(p, 0.0) - math.log1p(-lr * WD)
            if p.device.type == "meta":
                continue
            lost = -torch.log((p.detach().double() / before[p].double()).mean()).item()
            self.applied[p] = self.applied.get(p, 0.0) + lost
            assert 0 <= -math.expm1(-owed[p]) < QUANTUM
            if p.dtype in (torch.float16, torch.bfloat16):
                self.rough.add(p)
            rel, abs_ = (0.02, 4e-3) if p in self.rough else (1e-5, 1e-6)
            expected = self.due.get(p, 0.0) - owed[p]
            assert self.applied[p] == pytest.approx(expected, rel=rel, abs=abs_)


def same(run, other):
    """Whether two runs went through the same bits."""
    return len(run.history) == len(other.history) and all(
        a.dtype == b.dtype and (a.device.type == "meta" or torch.equal(a, b))
        for left, right in zip(run.history, other.history)
        for a, b in zip(left, right, strict=True)
    )


def changed(flag, value=True):
    """Sets one of torch's ways of moving a module, for a while."""

    @contextmanager
    def context():
        old = getattr(torch.__future__, f"get_{flag}")()
        getattr(torch.__future__, f"set_{flag}")(value)
        try:
            yield
        finally:
            getattr(torch.__future__, f"set_{flag}")(old)

    return context()


# Changes. Each is played twice: by hand and by us.


def frozen_and_unfrozen(run):
    p, q = run.params[1:3]
    run.step()
    p.requires_grad_(False)
    for _ in range(4):
        run.step(p)
    p.requires_grad_(True)
    q.requires_grad_(False)
    for _ in range(4):
        run.step(q)


def frozen_with_the_gradient_left_in_place(run):
    for frozen in (False, True, False):
        run.params[1].requires_grad_(not frozen)
        for _ in range(2):
            run.step()


def gradients_that_are_none_at_times(run):
    for index in range(12):
        run.step(*[p for i, p in enumerate(run.params) if (index + i) % 3 == 0])


def alternating_sets_of_equal_size(run):
    for index in range(10):
        run.step(*run.params[index % 2 :: 2])


def no_gradient_at_all_in_between(run):
    run.step()
    run.step(*run.params)
    for _ in range(4):
        run.step()


def a_group_added(run):
    late = [run.params.pop(), run.params.pop()]
    run.step()
    run.new_group(*late)
    for _ in range(6):
        run.step()


def appended_in_place(run):
    late = run.params.pop()
    for _ in range(2):
        run.step()
    run.params.append(late)
    for _ in range(4):
        run.step()


def inserted_in_the_middle(run):
    late = run.params.pop()
    run.step()
    run.params.insert(2, late)
    for _ in range(6):
        run.step()


def removed_in_place(run):
    for _ in range(2):
        run.step()
    del run.params[1]
    for _ in range(4):
        run.step()


def reordered_in_place(run):
    run.step(run.params[0])
    run.params.reverse()
    run.step(run.params[0])
    run.params[1], run.params[2] = run.params[2], run.params[1]
    for _ in range(4):
        run.step()


def another_list(run):
    run.step(run.params[3])
    run.groups[0]["params"] = run.params[2:] + run.params[:1]
    for _ in range(4):
        run.step()


def another_group_dict(run):
    run.step(run.params[3])
    run.groups[0] = {**run.groups[0], "lr": LR / 3}
    for _ in range(10):
        run.step()


def another_list_of_groups(run):
    late = [run.params.pop(), run.params.pop()]
    run.new_group(*late)
    run.step()
    run.optimizer.param_groups = [{**run.groups[0], "params": late}]
    for _ in range(4):
        run.step()


def learning_rates_changed(run):
    for lr in (0.5, 0.25, 0.75, 0.0, 0.125, 0.5):
        run.groups[0]["lr"] = lr
        run.step()


def a_loaded_state(run):
    run.step()
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["param_groups"][0]["lr"] = LR / 3
    run.step()
    group = run.groups[0]
    run.optimizer.load_state_dict(saved)
    assert run.groups[0] is not group
    for _ in range(10):
        run.step(run.params[2])


def a_parameter_replaced_in_the_group(run):
    run.step()
    run.params[2] = nn.Parameter(torch.randn(run.params[2].shape) + 2)
    for _ in range(6):
        run.step()


def other_data(run):
    run.step()
    for p in run.params[1:3]:
        p.data = torch.randn(p.shape) + 2
    for _ in range(6):
        run.step()


def other_data_of_the_same_storage(run):
    run.step()
    p = run.params[2]
    p.data = p.data.t()
    for _ in range(6):
        run.step()


def resized(run):
    run.step()
    run.params[2].data = torch.randn(6, 5) + 2
    run.params[3].data = torch.randn(1) + 2
    for _ in range(6):
        run.step()


def every_dtype_changed(run):
    for dtype in (torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float32):
        run.model.to(dtype)
        for _ in range(3):
            run.step()


def one_dtype_changed(dtype, start=torch.float32):
    """The one in the middle: not the first of its group, so not the one that a look may take."""

    def change(run):
        run.model.to(start)
        for _ in range(2):
            run.step()
        p = run.params[2]
        p.data = p.data.to(dtype)
        for _ in range(5):
            run.step()
        p.data = p.data.to(start)
        for _ in range(4):
            run.step()

    return change


def every_dtype_changed_by_swapping(run):
    with changed("swap_module_params_on_conversion"):
        for dtype in (torch.float64, torch.float32):
            run.step()
            p = run.params[1]
            run.model.to(dtype)
            assert run.params[1] is p
            run.step()
            run.step()


def every_parameter_overwritten(run):
    with changed("overwrite_module_params_on_conversion"):
        run.step()
        run.model.to(torch.float64)
        assert run.params[1] is not run.model[0].bias
        run.step()  # the optimizer goes on with what it has
        run.groups[0]["params"] = list(run.model.parameters())
        for _ in range(6):
            run.step()


def one_device_changed(run):
    run.step()
    p = run.params[2]
    cpu = p.detach().clone() + 1
    torch.utils.swap_tensors(p, nn.Parameter(p.detach().to("meta")))
    assert run.params[2].device.type == "meta"
    for _ in range(2):
        run.step()
    torch.utils.swap_tensors(p, nn.Parameter(cpu))
    for _ in range(5):
        run.step()


def every_device_changed(run):
    values = [p.detach().clone() + 1 for p in run.params]
    run.step()
    with changed("swap_module_params_on_conversion"):
        run.model.to("meta")
    for _ in range(2):
        run.step()
    for p, value in zip(run.params, values):
        torch.utils.swap_tensors(p, nn.Parameter(value.clone()))
    for _ in range(5):
        run.step()


def every_parameter_replaced_by_way_of_meta(run):
    run.step()
    values = [p.detach().clone() + 1 for p in run.params]
    run.model.to("meta")
    run.groups[0]["params"] = list(run.model.parameters())
    run.step()
    run.model.to_empty(device="cpu")
    run.groups[0]["params"] = list(run.model.parameters())
    for p, value in zip(run.params, values):
        p.data.copy_(value)
    for _ in range(5):
        run.step()


def one_type_changed(run):
    run.step()
    p = run.params[2]
    torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone().as_subclass(Marked)))
    assert type(p) is Marked
    for _ in range(6):
        run.step()


def a_parameter_moves_to_a_later_group(run):
    run.new_group(run.params.pop())
    for _ in range(2):
        run.step()
    run.groups[1]["params"].append(run.params.pop(1))
    for _ in range(6):
        run.step()


def a_parameter_moves_to_an_earlier_group(run):
    run.new_group(run.params.pop(), run.params.pop())
    for _ in range(3):
        run.step()
    run.params.append(run.groups[1]["params"].pop())
    for _ in range(6):
        run.step()


def a_parameter_is_tied_to_an_earlier_group(run):
    run.new_group(run.params.pop(), run.params.pop())
    for _ in range(2):
        run.step()
    run.params.append(run.groups[1]["params"][0])
    for _ in range(6):
        run.step()


def a_parameter_is_untied_from_the_earlier_group(run):
    run.new_group(run.params.pop(), run.params.pop())
    run.params.append(run.groups[1]["params"][0])
    for _ in range(2):
        run.step()
    run.params.pop()
    for _ in range(6):
        run.step()


def a_group_removed(run):
    run.new_group(run.params.pop(), run.params.pop())
    for _ in range(2):
        run.step()
    del run.groups[0]
    for _ in range(6):
        run.step()


def groups_reordered(run):
    run.new_group(run.params.pop(), run.params.pop())
    for _ in range(2):
        run.step()
    run.groups.reverse()
    for _ in range(6):
        run.step()


def autograd_modes(run):
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad, nullcontext)
    for index in range(16):
        run.step(context=modes[index % 4])
        run.step(run.params[1], context=modes[index % 3])


def a_step_before_another_set_of_gradients(run):
    """The same number of gradients, the first and the last of them the same."""
    run.step(run.params[1])
    run.step(run.params[2])
    for _ in range(4):
        run.step(run.params[3])


CHANGES = [
    frozen_and_unfrozen,
    frozen_with_the_gradient_left_in_place,
    gradients_that_are_none_at_times,
    alternating_sets_of_equal_size,
    no_gradient_at_all_in_between,
    a_step_before_another_set_of_gradients,
    a_group_added,
    appended_in_place,
    inserted_in_the_middle,
    removed_in_place,
    reordered_in_place,
    another_list,
    another_group_dict,
    another_list_of_groups,
    learning_rates_changed,
    a_loaded_state,
    a_parameter_replaced_in_the_group,
    other_data,
    other_data_of_the_same_storage,
    resized,
    every_dtype_changed,
    every_dtype_changed_by_swapping,
    every_parameter_overwritten,
    one_device_changed,
    every_device_changed,
    every_parameter_replaced_by_way_of_meta,
    one_type_changed,
    a_parameter_moves_to_a_later_group,
    a_parameter_moves_to_an_earlier_group,
    a_parameter_is_tied_to_an_earlier_group,
    a_parameter_is_untied_from_the_earlier_group,
    a_group_removed,
    groups_reordered,
    autograd_modes,
]
for to, start in [
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.float16, torch.float64),
    (torch.float16, torch.bfloat16),
]:
    change = one_dtype_changed(to, start)
    change.__name__ = f"one_dtype_changed_from_{start}_to_{to}".replace("torch.", "")
    CHANGES.append(change)


each_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


@each_change
def test_equals_the_hand_written_loop(change):  # P2, P4, P5, P11
    def played(*args, **kwargs):
        run = Run(*args, **kwargs)
        change(run)
        return run

    ours = played(lambda optimizer: DecoupledWD(optimizer, WD, quantum=0))
    assert same(ours, played())
    assert not same(ours, played(wd=0.0))


@each_change
def test_what_is_owed_is_kept_for_each_parameter(change):  # P8, P11
    run = Run(lambda optimizer: DecoupledWD(optimizer, WD, quantum=QUANTUM), still=True)
    change(run)  # the run keeps the books
    assert any(lost > 0.1 for lost in run.applied.values())


def test_a_dtype_changed_in_the_middle_brings_its_own_quantum():  # P8
    params = [nn.Parameter(torch.rand(2000) + 1) for _ in range(3)]
    optimizer = SGD(params, lr=0.1)
    decay = DecoupledWD(optimizer, 1e-3)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    params[1].data = params[1].data.bfloat16()
    params[1].grad = params[1].grad.bfloat16()
    before = params[1].detach().double()
    for _ in range(800):
        optimizer.step()
    ((_, owed, _),) = decay.state_dict()["owed"]
    applied = -torch.log(params[1].detach().double() / before).mean().item()
    assert applied == pytest.approx(-801 * math.log1p(-1e-4) - owed, rel=0.02)
    assert applied > 2**-6


def test_a_copied_optimizer_decays_its_own_parameters():  # P9, P11
    def played(decays):
        run = Run(decays, cls=Adam)
        run.step()
        old = run.optimizer
        left = [p.detach().clone() for p in run.params]
        run.optimizer, run.decay = copy.deepcopy((run.optimizer, run.decay))
        for _ in range(3):
            run.step(run.params[2])
        assert all(map(torch.equal, left, old.param_groups[0]["params"]))
        return run

    assert same(played(lambda o: DecoupledWD(o, WD, quantum=0)), played(None))


def test_a_loaded_state_keeps_the_debts():  # P8, P9: the group dicts are replaced, nothing else is
    run = Run(lambda optimizer: DecoupledWD(optimizer, WD, quantum=QUANTUM), still=True, cls=Adam)
    run.step()
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    for _ in range(6):
        run.step(run.params[1])


def test_replaced_parameters_are_selected_afresh():  # P2, P7
    def predicate(name, p):
        return p.ndim < 2

    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    optimizer = SGD(model.parameters(), lr=LR)
    DecoupledWD(optimizer, WD, quantum=0, exclude=["norm", predicate], model=model)

    def check():
        for p in model.parameters():
            p.data.fill_(1)
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p in model.parameters():
            assert torch.equal(p, torch.ones_like(p).mul_(1 - LR * WD if p.ndim == 2 else 1))

    check()
    model[0] = nn.Linear(3, 3)
    optimizer.param_groups[0]["params"][:2] = model[0].parameters()
    check()
    with changed("overwrite_module_params_on_conversion"):
        model.double()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    check()
    with changed("swap_module_params_on_conversion"):
        model.float()
    check()


# What a step costs


class Still(Optimizer):
    """Leaves the weights to the decay, so that all that is seen in its step is the decay's."""

    def __init__(self, params, lr=LR):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def step(self, closure=None):
        pass


class Operations(TorchDispatchMode):
    """Counts multi-tensor multiplications, and the elements of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.multiplied = []
        self.made = []
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        if name == "aten._foreach_mul_":
            self.multiplied.append(len(args[0]))
        elif name != "aten.detach":  # what `p.data` is, and what a number becomes a tensor by
            self.names.add(name)
            self.made += [t.numel() for t in [result] if isinstance(t, torch.Tensor)]
        return result


def mixed_groups():
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    first = [nn.Parameter(torch.ones(5, dtype=dtype)) for dtype in (*dtypes, *dtypes[:2])]
    marked = [nn.Parameter(torch.ones(5).as_subclass(Marked)) for _ in range(2)]
    second = [*marked, *(nn.Parameter(torch.ones(5, device=d)) for d in ("cpu", "meta", "meta"))]
    return [{"params": first}, {"params": second, "lr": LR / 2}]


FIVE_KINDS, THREE_KINDS = [1, 1, 1, 2, 2], [1, 2, 2]


@pytest.mark.parametrize(("quantum", "calls"), [(0, 2), (QUANTUM, 0)], ids=["applied", "owed"])
def test_one_multiplication_for_each_kind_and_nothing_made(quantum, calls):  # P11
    optimizer = Still(mixed_groups())
    params = [p for group in optimizer.param_groups for p in group["params"]]
    DecoupledWD(optimizer, WD, quantum=quantum)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for _ in range(2):
        with Operations() as seen:
            optimizer.step()
        first, second = seen.multiplied[:5], seen.multiplied[5:]
        assert (sorted(first), sorted(second)) == ((FIVE_KINDS, THREE_KINDS) if calls else ([], []))
        assert set(seen.made) <= {1}


@pytest.mark.parametrize("what", ["dtype", "type", "device"])
def test_a_kind_changed_in_the_middle_has_its_own_multiplication(what):  # P11
    params = [nn.Parameter(torch.ones(5)) for _ in range(3)]
    optimizer = Still(params)
    DecoupledWD(optimizer, WD)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    params[1].grad = None  # torch swaps the gradients along
    new = {
        "dtype": torch.ones(5, dtype=torch.float64),
        "type": torch.ones(5).as_subclass(Marked),
        "device": torch.ones(5, device="meta"),
    }[what]
    torch.utils.swap_tensors(params[1], nn.Parameter(new))
    params[1].grad = torch.zeros_like(params[1])
    for _ in range(2):
        with Operations() as seen:
            optimizer.step()
        assert sorted(seen.multiplied) == [1, 2]


def test_one_multiplication_for_each_kind_where_the_debts_differ():  # P8, P11
    optimizer = Still([nn.Parameter(torch.ones(5)) for _ in range(6)])
    params = optimizer.param_groups[0]["params"]
    decay = DecoupledWD(optimizer, WD, quantum=1e-9)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decay_state = decay.state_dict()
    decay_state["owed"] = [[0.0, 0.0, 0.1, 0.1, 0.2, 0.3]]
    decay.detach()
    decay = DecoupledWD(optimizer, WD, quantum=0.15)
    with pytest.warns(UserWarning, match="quantum was"):
        decay.load_state_dict(decay_state)
    with Operations() as seen:
        optimizer.step()
    assert seen.multiplied == [4]  # 0.1 each, and the first two have not come to 0.15
    assert set(seen.made) <= {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_step_allocates_no_memory_but_for_numbers(dtype):  # P11
    optimizer = Still([nn.Parameter(torch.ones(4096, dtype=dtype)) for _ in range(3)])
    DecoupledWD(optimizer, WD)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        optimizer.step()
    events = [event for event in profile.events() if event.name != "[memory]"]
    assert any(event.name == "aten::_foreach_mul_" for event in events)
    assert max(event.cpu_memory_usage for event in events) <= 64
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        optimizer.param_groups[0]["params"][0].data * 2
    assert max(event.cpu_memory_usage for event in profile.events()) >= 4096  # it would be seen


def tracked(shape):
    """A tensor, and a reference that dies with its storage."""
    values = torch.ones(shape).numpy().copy()
    return torch.from_numpy(values), weakref.ref(values)


@pytest.mark.parametrize("quantum", [0, QUANTUM])
def test_replaced_data_is_let_go(quantum):  # P11
    old, storage = tracked(5)
    params = [nn.Parameter(torch.ones(5)), nn.Parameter(old), nn.Parameter(torch.ones(5))]
    del old
    optimizer = SGD(params, lr=LR)
    DecoupledWD(optimizer, WD, quantum=quantum)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert storage() is not None
    params[1].data = torch.ones(5)
    optimizer.step()
    gc.collect()
    assert storage() is None


@pytest.mark.parametrize("quantum", [0, QUANTUM])
@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "removed"])
def test_parameters_that_have_left_are_let_go(quantum, replaced):  # P11
    params = [nn.Parameter(torch.ones(5)) for _ in range(3)]
    optimizer = SGD(params, lr=LR)
    decay = DecoupledWD(optimizer, WD, quantum=quantum)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    left = weakref.ref(params[1])
    new = nn.Parameter(torch.ones(5))
    new.grad = torch.zeros(5)
    optimizer.param_groups[0]["params"][1:2] = [new] if replaced else []
    del params, p
    optimizer.step()
    gc.collect()
    assert left() is None
    assert decay.steps == 2


# Autograd


@pytest.mark.parametrize("quantum", [0, QUANTUM], ids=["applied", "owed"])
def test_version_counters_stay_as_they_are(quantum):  # P5
    params = [nn.Parameter(torch.ones(5, dtype=d)) for d in (torch.float32, torch.float64) * 2]
    optimizer = Still(params)
    DecoupledWD(optimizer, WD, quantum=quantum)
    versions = [p._version for p in params]
    for _ in range(8):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert [p._version for p in params] == versions
    assert all((p < 1).all() for p in params)


class SecondOrder(Optimizer):
    """Divides by the second derivative, as AdaHessian does, from graphs that backward kept."""

    def __init__(self, params, lr=LR):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def step(self, closure=None):
        params = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        gradients = [p.grad for p in params]
        hessians = torch.autograd.grad([g.sum() for g in gradients], params, retain_graph=True)
        for p, gradient, hessian in zip(params, gradients, hessians):
            p.data.sub_(0.01 * gradient.detach() / hessian.abs().clamp(min=0.1))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_graphs_kept_for_the_step_stay_valid():  # P5
    """The weights are saved for the second derivative: an in-place change that counts is fatal."""

    def run(decays):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        optimizer = SecondOrder(model.parameters())
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        for step in range(5):
            optimizer.zero_grad()
            model[0].bias.requires_grad_(step != 2)
            model(torch.ones(2, 3)).pow(4).sum().backward(create_graph=True)
            if not decays:
                for p in model.parameters():
                    if p.grad is not None:
                        p.data.mul_(1 - LR * WD)
            optimizer.step()
        model.zero_grad()  # else the graph and the gradient keep each other alive
        return [p.detach().clone() for p in model.parameters()]

    assert all(map(torch.equal, run(True), run(False)))


# Sharded parameters


@pytest.fixture
def mesh():
    """A group of one process, inside this one."""
    fsdp2 = pytest.importorskip("processes.fsdp2", exc_type=ImportError)
    if not fsdp2.RUNS_ON_CPUS:
        pytest.skip("FSDP2 needs a GPU before torch 2.6")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reshard", [True, False], ids=["resharded", "left whole"])
@pytest.mark.parametrize("foreach", [False, True], ids=["for-loop", "foreach"])
def test_parameters_that_are_sharded_anew_decay_as_adamw_s(mesh, reshard, foreach):  # P11, P12
    from processes.fsdp2 import DTensor, fully_shard

    def run(cls, wd, decays=False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
        optimizer = cls(model.parameters(), lr=LR / 10, weight_decay=wd, foreach=foreach)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        for step in range(6):
            optimizer.zero_grad()
            model(torch.full((2, 3), 1.0 + step)).square().mean().backward()
            optimizer.step()
            if step == 3:
                model[0].unshard()
                model[0].reshard()
        assert all(isinstance(p, DTensor) for p in optimizer.param_groups[0]["params"])
        return [p.full_tensor().detach().clone() for p in model.parameters()]

    ours = run(Adam, 0.3, decays=True)
    assert all(map(torch.equal, ours, run(AdamW, WD)))
    assert not any(map(torch.equal, ours, run(Adam, 0.0)))


def test_parameters_that_become_sharded_while_training_decay_on(mesh):  # P11, P12
    """The tensor type changes under the decay, and another Parameter takes the place."""
    from processes.fsdp2 import DTensor, fully_shard

    def run(decays):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = SGD(model.parameters(), lr=LR, foreach=False)
        if decays:
            DecoupledWD(optimizer, WD, quantum=0)
        for step in range(4):
            if step == 2:
                fully_shard(model[1], mesh=mesh)
                optimizer.param_groups[0]["params"] = list(model.parameters())
            optimizer.zero_grad()
            model(torch.full((2, 3), 0.1 * step)).square().mean().backward()
            if not decays:
                for p in model.parameters():
                    p.data.mul_(1 - LR * WD)
            optimizer.step()
        assert [isinstance(p, DTensor) for p in model.parameters()] == [False, False, True, True]
        return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]

    assert all(map(torch.equal, run(True), run(False)))
