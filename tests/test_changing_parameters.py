"""The decay follows the parameters, groups, dtypes and devices of its optimizer (P2, P5)."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import (
    HALF,
    NoUpdate,
    caught,
    parameter,
    zero_gradients,
)
from torch import nn
from torch.optim import SGD, Optimizer

from wd_callbacks.torch import DecoupledWD

LR, WD, QUANTUM = 0.5, 0.2, 0.3


# Which parameters decay


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice_decays_once():  # P2
    p = parameter(3)
    optimizer = SGD([p, p], lr=0.1)
    DecoupledWD(optimizer, 0.5)
    optimizer.step()
    assert torch.equal(p.data, torch.full((3,), 0.95))


def test_a_sparse_gradient_decays_its_whole_tensor_and_warns_once():  # P2
    model = nn.Embedding(4, 2, sparse=True)
    before = model.weight.detach().clone()
    optimizer = SGD(model.parameters(), lr=0.1)
    DecoupledWD(optimizer, 0.5)
    with pytest.warns(UserWarning, match="sparse") as records:
        for _ in range(2):
            optimizer.zero_grad()
            (0 * model(torch.tensor([1]))).sum().backward()
            optimizer.step()
    assert len([it for it in records if "sparse" in str(it.message)]) == 1
    assert torch.allclose(model.weight, before * 0.95**2)


LAZY = {  # arguments, and by what each of weight, bias, head's weight and bias is multiplied
    "exclude": ({"wd": 1.0, "exclude": "bias"}, [0.9, 1, 0.9, 1]),
    "vector": ({"wd": 1.0, "exclude": "vector"}, [0.9, 1, 0.9, 1]),
    "keys": ({"wd": {"1.*": 0.5, "*": 1.0}}, [0.9, 0.9, 0.95, 0.95]),
    "anchor": ({"wd": 1.0, "anchor": {"0.weight": torch.zeros(2, 3)}}, [0.9, 0.9, 0.9, 0.9]),
}


class StaysLazyLinear(nn.LazyLinear):
    cls_to_become = None


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.LBFGS])
@pytest.mark.parametrize("layer", [nn.LazyLinear, StaysLazyLinear])
@pytest.mark.parametrize(("arguments", "factors"), LAZY.values(), ids=LAZY)
def test_names_hold_for_lazy_parameters(arguments, factors, layer, cls):  # P7, P14, P15
    model = nn.Sequential(layer(2), nn.Linear(2, 1))
    optimizer = cls(model.parameters(), lr=0.1)
    decay = DecoupledWD(optimizer, model=model, quantum=0, **arguments)
    assert [row.name for row in decay.describe(parameters=True)][:2] == ["0.weight", "0.bias"]
    model(torch.ones(1, 3))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(lambda: 0.0)
    for p, old, factor in zip(model.parameters(), before, factors):
        torch.testing.assert_close(p.detach(), old * factor)


def test_lazy_parameters_decay_once_they_are_there():  # P2
    model = nn.ModuleList([nn.LazyLinear(3), nn.LazyLinear(4)])
    optimizer = SGD(model.parameters(), lr=0.1)
    decay = DecoupledWD(optimizer, 0.5)
    decay.describe()
    for layer, inputs in zip(model, (2, 3)):
        layer(torch.ones(1, inputs)).sum().backward()
        layer.bias.data.fill_(1)
        optimizer.step()
        assert torch.equal(layer.bias.detach(), torch.ones_like(layer.bias).mul(0.95).sub(0.1))


def test_many_steps_without_any_gradient_warn_once():  # P7
    p = nn.Parameter(torch.ones(2))
    optimizer = SGD([p], lr=0.1)
    DecoupledWD(optimizer, 0.5)
    _, (message,) = caught(lambda: [optimizer.step() for _ in range(50)])
    assert "had a gradient in 20 steps in a row" in message
    assert torch.equal(p.detach(), torch.ones(2))


def test_steps_without_gradient_that_are_not_in_a_row_do_not_warn():  # P7
    p = nn.Parameter(torch.ones(2))
    optimizer = SGD([p], lr=0.1)
    DecoupledWD(optimizer, 0.5)
    for i in range(50):
        p.grad = torch.zeros(2) if i % 2 else None
        optimizer.step()
    assert p[0].item() == pytest.approx(0.95**25)


def test_describe_knows_a_parameter_that_has_replaced_another():  # P7
    optimizer = SGD([parameter(2), parameter(3)], lr=0.1)
    decay = DecoupledWD(optimizer, 0.5)
    optimizer.step()
    optimizer.param_groups[0]["params"][1] = parameter(4)
    assert [row.shape for row in decay.describe(parameters=True)] == [(2,), (4,)]


def test_mixed_dtypes_in_one_group():  # P5
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
    params = [parameter(3, dtype=dtype) for dtype in dtypes]
    optimizer = SGD(params, lr=0.1, foreach=False)
    DecoupledWD(optimizer, 0.5)
    optimizer.step()
    for p in params:
        assert torch.equal(p.data, torch.ones_like(p).mul_(1 - 0.1 * 0.5))


def test_replaced_parameters_are_selected_again():  # P2, P7
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    optimizer = SGD(model.parameters(), lr=LR)
    exclude = ["norm", lambda name, p: p.ndim < 2]
    DecoupledWD(optimizer, WD, quantum=0, exclude=exclude, model=model)

    def check():
        for p in model.parameters():
            p.data.fill_(1)
        zero_gradients(model)
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


# Anything that may change between two steps


class Marked(torch.Tensor):
    """A tensor type of its own, with nothing else new."""


class Run:
    """A few steps of one optimizer, and the weights after each.

    Args:
        attach: Attaches a decay to the optimizer; None for the hand-written one.
        cls: The optimizer.
        still: Whether gradients are 0, so that the decay alone changes the weights.
        wd: The coefficient of the hand-written decay.
    """

    def __init__(self, attach=None, cls=SGD, still=False, wd=WD):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        self.optimizer = cls(self.model.parameters(), lr=LR, foreach=False)
        self.decay = attach(self.optimizer) if attach else None
        self.still, self.wd = still, wd
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

    def steps(self, count, *without):
        for _ in range(count):
            self.step(*without)

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
            self.compare(before)
        self.history.append([p.detach().clone() for p in self.listed()])

    def by_hand(self):
        """The hand-written loop; a parameter that is listed twice decays once."""
        decayed = set()
        for group in self.groups:
            for p in group["params"]:
                if p.grad is not None and p not in decayed:
                    p.data.mul_(1 - group["lr"] * self.wd)
                    decayed.add(p)

    def compare(self, before):
        """Checks in float64 that what was applied is what was due less what is deferred."""
        waiting = dict.fromkeys(before, 0.0)
        for group, each in zip(self.groups, self.decay.state_dict()["owed"], strict=True):
            for p, log in zip(group["params"], each, strict=True):
                waiting[p] += log
        for p in before:
            lr = next(g["lr"] for g in self.groups if any(p is q for q in g["params"]))
            if p.grad is not None:
                self.due[p] = self.due.get(p, 0.0) - math.log1p(-lr * WD)
            if p.device.type == "meta":
                continue
            lost = -torch.log((p.detach().double() / before[p].double()).mean()).item()
            self.applied[p] = self.applied.get(p, 0.0) + lost
            assert 0 <= -math.expm1(-waiting[p]) < QUANTUM
            if p.dtype in HALF:
                self.rough.add(p)
            rel, abs_ = (0.02, 4e-3) if p in self.rough else (1e-5, 1e-6)
            expected = self.due.get(p, 0.0) - waiting[p]
            assert self.applied[p] == pytest.approx(expected, rel=rel, abs=abs_)


def same_history(run, other):
    return len(run.history) == len(other.history) and all(
        a.dtype == b.dtype and (a.device.type == "meta" or torch.equal(a, b))
        for left, right in zip(run.history, other.history)
        for a, b in zip(left, right, strict=True)
    )


@contextmanager
def changed(flag):
    """Sets one of torch's ways to move a module, for a while."""
    old = getattr(torch.__future__, f"get_{flag}")()
    getattr(torch.__future__, f"set_{flag}")(True)
    try:
        yield
    finally:
        getattr(torch.__future__, f"set_{flag}")(old)


# Each change is made twice: in the hand-written loop and with the decay.

CHANGES = {}


def change(function):
    CHANGES[function.__name__] = function
    return function


@change
def gradients_that_come_and_go(run):
    for index in range(12):
        run.step(*[p for i, p in enumerate(run.params) if (index + i) % 3 == 0])
    for index in range(10):
        run.step(*run.params[index % 2 :: 2])  # as many, but others
    for index in (1, 2, 3, 3, 3):
        run.step(run.params[index])  # as many, and the same first and last ones
    run.step(*run.params)
    run.steps(4)


@change
def the_list_edited_in_place(run):
    late = [run.params.pop(), run.params.pop()]
    run.steps(2, run.params[0])
    run.params.append(late[0])
    run.steps(2)
    run.params.insert(1, late[1])
    run.steps(2)
    del run.params[2]
    run.steps(2)
    run.params.reverse()
    run.step(run.params[0])
    run.params[1], run.params[2] = run.params[2], run.params[1]
    run.steps(4)


@change
def groups_added_replaced_and_removed(run):
    late = [run.params.pop(), run.params.pop()]
    run.step(run.params[3])
    run.new_group(*late)
    run.steps(3)
    run.groups[0] = {**run.groups[0], "lr": LR / 3}
    run.steps(6)
    run.groups.reverse()
    run.steps(3)
    run.optimizer.param_groups = [{**run.groups[0], "params": late}]
    run.steps(4)


@change
def parameters_that_move_between_groups(run):
    run.new_group(run.params.pop(), run.params.pop())
    run.steps(2)
    first, second = (group["params"] for group in run.groups)
    second.append(first.pop(1))
    run.steps(3)
    first.append(second.pop())
    run.steps(3)
    first.append(second[0])  # tied
    run.steps(3)
    first.pop()
    run.steps(6)


@change
def a_loaded_state(run):
    for lr in (0.5, 0.25, 0.75, 0.0, 0.125, 0.5):
        run.groups[0]["lr"] = lr
        run.step()
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["param_groups"][0]["lr"] = LR / 3
    run.step()
    group = run.groups[0]
    run.optimizer.load_state_dict(saved)
    assert run.groups[0] is not group
    run.steps(10, run.params[2])


@change
def other_data(run):
    run.step()
    for p in run.params[1:3]:
        p.data = torch.randn(p.shape) + 2
    run.steps(3)
    run.params[2].data = run.params[2].data.t()  # of the same storage
    run.steps(3)
    run.params[2].data = torch.randn(6, 5) + 2  # of another size
    run.params[3].data = torch.randn(1) + 2
    run.steps(6)


@change
def every_parameter_overwritten(run):
    with changed("overwrite_module_params_on_conversion"):
        run.step()
        run.model.to(torch.float64)
        assert run.params[1] is not run.model[0].bias
        run.step()  # the optimizer goes on with what it has
        run.groups[0]["params"] = list(run.model.parameters())
        run.steps(6)


@change
def devices_changed(run):
    """By way of "meta", which has no values."""
    values = [p.detach().clone() + 1 for p in run.params]
    run.step()
    for indices in ([2], range(4)):
        for i in indices:
            torch.utils.swap_tensors(run.params[i], nn.Parameter(values[i].to("meta")))
        run.steps(2)
        for i in indices:
            torch.utils.swap_tensors(run.params[i], nn.Parameter(values[i].clone()))
        run.steps(5)


@change
def one_type_changed(run):
    run.step()
    p = run.params[2]
    torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone().as_subclass(Marked)))
    assert type(p) is Marked
    run.steps(6)


@change
def autograd_modes(run):
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad, nullcontext)
    for index in range(16):
        run.step(context=modes[index % 4])
        run.step(run.params[1], context=modes[index % 3])


@change
def one_dtype_changed(run):
    """The one in the middle of the group: a look at the first or the last does not see it."""
    wide, single, half = torch.float64, torch.float32, torch.bfloat16
    for start, to in ((single, wide), (single, half), (half, single), (wide, single), (wide, half)):
        run.model.to(start)
        run.steps(2)
        p = run.params[2]
        p.data = p.data.to(to)
        run.steps(5)
        p.data = p.data.to(start)
        run.steps(4)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_equals_the_hand_written_loop(change):  # P2, P4, P5, P11
    def run(*args, **kwargs):
        run = Run(*args, **kwargs)
        change(run)
        return run

    ours = run(lambda optimizer: DecoupledWD(optimizer, WD, quantum=0))
    assert same_history(ours, run())
    assert not same_history(ours, run(wd=0.0))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_deferred_decay_follows_its_parameter(change):  # P8, P11
    run = Run(lambda optimizer: DecoupledWD(optimizer, WD, quantum=QUANTUM), still=True)
    change(run)  # the run compares
    assert any(lost > 0.1 for lost in run.applied.values())


# Autograd


@pytest.mark.parametrize("quantum", [0, QUANTUM], ids=["applied", "deferred"])
def test_version_counters_stay_as_they_are(quantum):  # P5
    params = [nn.Parameter(torch.ones(5, dtype=d)) for d in (torch.float32, torch.float64) * 2]
    optimizer = NoUpdate(params, lr=LR)
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
