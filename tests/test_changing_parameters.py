"""The decay follows the parameters, groups, dtypes and devices of its optimizer (P2, P5)."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import Marked, NoUpdate, caught, parameter, random_gradients, weights, zero_gradients
from torch import nn
from torch.optim import LBFGS, SGD

from wd_callbacks.torch import DecoupledWD

LR, WD, QUANTUM = 0.5, 0.2, 0.3


@contextmanager
def changed(flag):
    """Sets one of torch's ways to move a module, for a while."""
    set_flag = getattr(torch.__future__, f"set_{flag}")
    set_flag(True)
    try:
        yield
    finally:
        set_flag(False)


# Which parameters decay


def test_a_sparse_gradient_decays_its_whole_tensor_and_warns_once():  # P2
    p = nn.Parameter(torch.ones(4, 2))
    p.grad = torch.zeros(4, 2).to_sparse()
    optimizer = SGD([p], lr=0.1)
    DecoupledWD(optimizer, 0.5)
    _, (message,) = caught(lambda: [optimizer.step() for _ in range(2)])
    assert "sparse" in message
    torch.testing.assert_close(p.detach(), torch.full((4, 2), 0.95**2))


LAZY = {  # arguments, and by what each of weight, bias, head's weight and bias is multiplied
    "exclude": ({"wd": 1.0, "exclude": "bias"}, [0.9, 1, 0.9, 1]),
    "vector": ({"wd": 1.0, "exclude": "vector"}, [0.9, 1, 0.9, 1]),
    "keys": ({"wd": {"1.*": 0.5, "*": 1.0}}, [0.9, 0.9, 0.95, 0.95]),
    "anchor": ({"wd": 1.0, "anchor": {"0.weight": torch.zeros(2, 3)}}, [0.9, 0.9, 0.9, 0.9]),
}


class StaysLazyLinear(nn.LazyLinear):
    cls_to_become = None


@pytest.mark.parametrize("cls", [SGD, LBFGS])
@pytest.mark.parametrize("layer", [nn.LazyLinear, StaysLazyLinear])
@pytest.mark.parametrize(("arguments", "factors"), LAZY.values(), ids=LAZY)
def test_names_hold_for_lazy_parameters(arguments, factors, layer, cls):  # P7, P14, P15
    model = nn.Sequential(layer(2), nn.Linear(2, 1))
    optimizer = cls(model.parameters(), lr=0.1)
    decay = DecoupledWD(optimizer, model=model, quantum=0, **arguments)
    assert [row.name for row in decay.describe(parameters=True)][:2] == ["0.weight", "0.bias"]
    model(torch.ones(1, 3))
    before = weights(model)
    zero_gradients(model)
    optimizer.step(lambda: 0.0)
    for p, old, factor in zip(model.parameters(), before, factors):
        torch.testing.assert_close(p.detach(), old * factor)


def test_lazy_parameters_decay_once_they_are_there():  # P2
    model = nn.ModuleList([nn.LazyLinear(3), nn.LazyLinear(4)])
    optimizer = SGD(model.parameters(), lr=0.1)
    DecoupledWD(optimizer, 0.5).describe()
    for layer, inputs in zip(model, (2, 3)):
        layer(torch.ones(1, inputs)).sum().backward()
        layer.bias.data.fill_(1)
        optimizer.step()
        assert torch.equal(layer.bias.detach(), torch.ones_like(layer.bias).mul(0.95).sub(0.1))


@pytest.mark.parametrize(("gradients", "warnings"), [([None] * 50, 1), ([None, 0.0] * 25, 0)])
def test_many_steps_in_a_row_without_any_gradient_warn_once(gradients, warnings):  # P7
    p = nn.Parameter(torch.ones(2))
    optimizer = SGD([p], lr=0.1)
    DecoupledWD(optimizer, 0.5)

    def steps():
        for value in gradients:
            p.grad = None if value is None else torch.full((2,), value)
            optimizer.step()

    _, messages = caught(steps)
    assert ["had a gradient in 20 steps in a row" in each for each in messages] == [True] * warnings
    assert p[0].item() == pytest.approx(0.95 ** gradients.count(0.0))


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
        optimizer.param_groups[0]["params"] = list(model.parameters())
        before = weights(model)
        zero_gradients(model)
        optimizer.step()
        for p, old in zip(model.parameters(), before):
            assert torch.equal(p, old.mul(1 - LR * WD) if p.ndim == 2 else old)

    check()
    model[0] = nn.Linear(3, 3)
    check()
    with changed("overwrite_module_params_on_conversion"):
        model.double()
    check()
    with changed("swap_module_params_on_conversion"):
        model.float()
    check()


# Anything that may change between two steps


class Run:
    """A few steps of SGD, and the weights after each.

    Args:
        quantum: That of the decay, above 0 also for gradients of 0, so that the decay alone changes
            the weights, which is checked in each step. None: the hand-written decay.
        wd: The coefficient.
    """

    def __init__(self, quantum, wd=WD):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        self.optimizer = SGD(self.model.parameters(), lr=LR, foreach=False)
        self.is_by_hand, self.is_still = quantum is None, bool(quantum)
        self.decay = None if self.is_by_hand else DecoupledWD(self.optimizer, wd, quantum=quantum)
        self.wd, self.history = wd, []
        self.due, self.applied = {}, {}  # by parameter, as -log of the factor
        self.tolerance = 1e-5

    @property
    def groups(self):
        return self.optimizer.param_groups

    @property
    def params(self):
        return self.groups[0]["params"]

    def lrs(self):
        """The learning rate of each parameter; that of its first group, if it is in two."""
        return {p: group["lr"] for group in self.groups[::-1] for p in group["params"]}

    def steps(self, count, *without):
        for _ in range(count):
            self.step(*without)

    def step(self, *without, context=nullcontext):
        """A step in which the parameters ``without`` have no gradient."""
        lrs = self.lrs()
        self.optimizer.zero_grad()
        random_gradients(lrs, step=len(self.history))
        if self.is_still:
            zero_gradients(lrs)
        for p in without:
            p.grad = None
        before = {p: p.detach().clone() for p in lrs}
        with context():
            if self.is_by_hand:
                self.decay_by_hand()
            self.optimizer.step()
        if self.is_still:
            self.compare(before)
        self.history.append([p.tolist() for p in lrs if p.device.type != "meta"])

    def decay_by_hand(self):
        for p, lr in self.lrs().items():
            if p.grad is not None:
                p.data.mul_(1 - lr * self.wd)

    def compare(self, before):
        """Checks that what was applied is what was due less what is deferred."""
        deferred = dict.fromkeys(before, 0.0)
        for group, logs in zip(self.groups, self.decay.state_dict()["owed"], strict=True):
            for p, log in zip(group["params"], logs, strict=True):
                deferred[p] += log
        for p, lr in self.lrs().items():
            if p.grad is not None:
                self.due[p] = self.due.get(p, 0.0) - math.log1p(-lr * self.wd)
            if p.device.type == "meta":
                continue
            lost = -torch.log((p.detach().double() / before[p].double()).mean()).item()
            self.applied[p] = self.applied.get(p, 0.0) + lost
            assert 0 <= -math.expm1(-deferred[p]) < QUANTUM
            expected = self.due.get(p, 0.0) - deferred[p]
            assert self.applied[p] == pytest.approx(expected, abs=self.tolerance)


def gradients_that_come_and_go(run):
    for index in range(12):
        run.step(*[p for i, p in enumerate(run.params) if (index + i) % 3 == 0])
    for index in range(10):
        run.step(*run.params[index % 2 :: 2])  # as many, but others
    for index in (1, 2, 3, 3, 3):
        run.step(run.params[index])  # as many, and the same first and last ones
    run.step(*run.params)
    run.steps(4)


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
    run.steps(4)
    run.params.append(run.params[0])  # listed twice
    run.steps(4)


def groups_added_replaced_and_removed(run):
    late = [run.params.pop(), run.params.pop()]
    run.step(run.params[3])
    run.optimizer.add_param_group({"params": late, "lr": LR / 2})
    run.steps(3)
    run.groups[0] = {**run.groups[0], "lr": LR / 3}
    run.steps(6)
    run.groups.reverse()
    run.steps(3)
    run.optimizer.param_groups = [{**run.groups[0], "params": late}]
    run.steps(4)


def parameters_that_move_between_groups(run):
    moved = [run.params.pop(), run.params.pop()]
    run.optimizer.add_param_group({"params": moved, "lr": LR / 2})
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


def a_loaded_state(run):
    for lr in (0.5, 0.25, 0.75, 0.0, 0.125):
        run.groups[0]["lr"] = lr
        run.step()
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["param_groups"][0]["lr"] = LR / 3
    group = run.groups[0]
    run.optimizer.load_state_dict(saved)
    assert run.groups[0] is not group
    run.steps(10, run.params[2])


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


def every_parameter_replaced(run):
    run.step()
    run.groups[0]["params"] = [nn.Parameter(p.detach().double()) for p in run.params]
    run.steps(6)


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


def one_type_changed(run):
    run.step()
    p = run.params[2]
    torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone().as_subclass(Marked)))
    assert type(p) is Marked
    run.steps(6)


def autograd_modes(run):
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad) * 4:
        run.step(context=context)
        run.step(run.params[1], context=context)


def one_dtype_changed(run):
    """The one in the middle of the group: a look at the first or the last does not see it."""
    run.tolerance = 0.02  # of bfloat16
    wide, single, half = torch.float64, torch.float32, torch.bfloat16
    for start, to in ((single, wide), (single, half), (half, single), (wide, single), (wide, half)):
        run.model.to(start)
        run.steps(2)
        p = run.params[2]
        p.data = p.data.to(to)
        run.steps(5)
        p.data = p.data.to(start)
        run.steps(4)


each_change = pytest.mark.parametrize(
    "change",
    [
        gradients_that_come_and_go,
        the_list_edited_in_place,
        groups_added_replaced_and_removed,
        parameters_that_move_between_groups,
        a_loaded_state,
        other_data,
        every_parameter_replaced,
        devices_changed,
        one_type_changed,
        autograd_modes,
        one_dtype_changed,
    ],
)


@each_change
def test_equals_the_hand_written_loop(change):  # P2, P4, P5, P11
    def history(*args, **kwargs):
        run = Run(*args, **kwargs)
        change(run)
        return run.history

    assert history(quantum=0) == history(quantum=None) != history(quantum=None, wd=0.0)


@each_change
def test_deferred_decay_follows_its_parameter(change):  # P8, P11
    run = Run(QUANTUM)
    change(run)  # the run compares
    assert any(lost > 0.1 for lost in run.applied.values())


# Autograd


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("quantum", [0, QUANTUM], ids=["applied", "deferred"])
def test_graphs_that_backward_kept_stay_valid(quantum):  # P5
    """AdaHessian takes second derivatives from them; a change that autograd counts is fatal."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    params, before = list(model.parameters()), weights(model)
    optimizer = NoUpdate(params, lr=LR)
    DecoupledWD(optimizer, WD, quantum=quantum)
    model(torch.ones(2, 3)).pow(4).sum().backward(create_graph=True)
    versions = [p._version for p in params]
    for _ in range(8):
        optimizer.step()
    assert not any(map(torch.equal, params, before))
    assert [p._version for p in params] == versions
    torch.autograd.grad([p.grad.sum() for p in params], params)
    model.zero_grad()  # else the graph and the gradient keep each other alive
