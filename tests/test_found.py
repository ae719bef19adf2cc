"""What test_anything.py and attempts to break promises have found, each case reduced by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from wd_callbacks.torch import DecoupledWD


def one_weight(dtype=torch.float32):
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    p.grad = torch.zeros_like(p)
    return p, torch.optim.SGD([p], lr=0.1, weight_decay=0.37)


@pytest.mark.parametrize("quantum", [None, 0], ids=["default", "0"])
@pytest.mark.filterwarnings("ignore:quantum was 0.05 in the saved run")
def test_what_is_owed_is_paid_under_a_smaller_quantum(quantum):  # P8, P9
    p, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 0.1, quantum=0.05)
    for _ in range(4):
        optimizer.step()  # owes four times 0.01
    state = decay.state_dict()
    decay.detach()
    decay = DecoupledWD(optimizer, 0.1, quantum=quantum)
    decay.load_state_dict(state)
    optimizer.step()
    assert decay.state_dict()["owed"][0][0] < 2.0**-20
    assert p.detach().double().log().mean().item() == pytest.approx(5 * math.log(0.99), rel=1e-5)


@pytest.mark.filterwarnings("ignore:(quantum|wd) was")
@pytest.mark.parametrize("owed", [0.04, 0.3, 0.9])
def test_all_of_a_debt_is_paid_at_once_under_a_quantum_of_0(owed):  # P8, P4
    p, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 0.1, quantum=0.99)
    for lr in torch.linspace(1, 0, 9)[:-1].tolist():
        optimizer.param_groups[0]["lr"] = owed * lr
        optimizer.step()
        state = decay.state_dict()
        other, fresh = one_weight()
        fresh.param_groups[0]["lr"] = 1e-3
        resumed = DecoupledWD(fresh, 0.1, quantum=0)
        resumed.load_state_dict(state)
        fresh.step()
        assert resumed.state_dict()["owed"] == [[0.0]]
        before = other.detach().clone()
        fresh.step()
        assert torch.equal(other.detach(), before.mul(1 - 1e-3 * 0.1))
    assert torch.equal(p.detach(), torch.ones(2))


@pytest.mark.filterwarnings("ignore:(quantum|wd) was")
def test_a_bfloat16_weight_pays_enough_of_a_debt_under_a_smaller_quantum():  # P8, P9
    _, optimizer = one_weight(torch.bfloat16)
    decay = DecoupledWD(optimizer, 1.0, quantum=0.2)
    for lr in (0.19, 0.19, 0.19, 0.19, 0.1):  # the second and the fourth step pay
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    state = decay.state_dict()
    decay.detach()
    decay = DecoupledWD(optimizer, 0.01)
    decay.load_state_dict(state)
    optimizer.step()
    assert -math.expm1(-decay.state_dict()["owed"][0][0]) < 2.0**-6


def test_what_a_bfloat16_weight_owes_is_paid_when_it_has_become_float32():  # P8
    p, optimizer = one_weight(torch.bfloat16)
    decay = DecoupledWD(optimizer, 0.1)
    optimizer.step()
    p.data, p.grad = p.data.float(), torch.zeros(2)
    optimizer.step()
    assert decay.state_dict()["owed"][0][0] < 2.0**-20
    assert p.detach().double().log().mean().item() == pytest.approx(2 * math.log(0.99), rel=1e-5)


@pytest.mark.parametrize("before", [[0.5, 0.0], None], ids=["sequence", "None"])
@pytest.mark.filterwarnings("ignore:wd was", "ignore:param group 1 has a weight decay of 0")
def test_a_single_number_spares_no_decay_groups_after_a_sequence_too(before):  # P9
    _, optimizer = one_weight()
    q = nn.Parameter(torch.ones(2))
    q.grad = torch.zeros(2)
    optimizer.add_param_group({"params": [q], "weight_decay": 0.0})
    decay = DecoupledWD(optimizer, before)
    optimizer.step()
    state = decay.state_dict()
    decay.detach()
    decay = DecoupledWD(optimizer, 0.5)
    decay.load_state_dict(state)
    optimizer.step()
    assert decay.coefficients == [0.5, 0.0]
    assert torch.equal(q.detach(), torch.ones(2))


# torch's distributed checkpoints call `step` with gradients and lr of 0 where there is no state


class Loop:
    def __init__(self, cls, wd=0.5, **arguments):
        self.model = nn.Linear(2, 2)
        self.optimizer = cls(self.model.parameters(), lr=0.1, weight_decay=0.37)
        self.decay = DecoupledWD(self.optimizer, wd, **arguments)

    def step(self):
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self):
        return copy.deepcopy(get_optimizer_state_dict(self.model, self.optimizer))


def test_saving_a_distributed_checkpoint_decays_nothing():  # P1, P3
    loop = Loop(torch.optim.Adam, scale_by="none")
    before = [p.detach().clone() for p in loop.model.parameters()]
    state = loop.save()
    assert all(map(torch.equal, before, loop.model.parameters()))
    assert not any(it["exp_avg"].any() for it in state["state"].values())
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.37]
    assert loop.decay.steps == 0


def test_saving_a_distributed_checkpoint_does_not_move_a_schedule_on():  # P6
    seen = []
    loop = Loop(torch.optim.SGD, lambda progress: seen.append(progress) or 0.1, total_steps=4)
    for _ in range(4):
        loop.step()
        loop.save()
    assert seen == [0, 0.25, 0.5, 0.75]


def test_a_distributed_checkpoint_is_loaded_before_the_first_step():  # P9
    first, second = (Loop(torch.optim.Adam, scale_by="lr_ratio") for _ in range(2))
    first.step()
    set_optimizer_state_dict(second.model, second.optimizer, first.save())
    second.model.load_state_dict(first.model.state_dict())
    second.decay.load_state_dict(first.decay.state_dict())
    for loop in (first, second):
        loop.step()
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))


# Groups, parameters and closures


@pytest.mark.filterwarnings("ignore:max_lr was 1.0 in the saved run and is None in this one")
def test_max_lr_is_the_group_s_again_where_it_is_given_no_more():  # P9
    p, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 0.5, scale_by="lr_ratio", max_lr=1.0)
    optimizer.step()
    state = decay.state_dict()
    decay.detach()
    decay = DecoupledWD(optimizer, 0.5, scale_by="lr_ratio")
    decay.load_state_dict(state)
    optimizer.step()
    assert decay.describe()[0].lr_max == 0.1
    assert p.tolist() == pytest.approx([0.95 * 0.5] * 2)


def test_describe_goes_on_where_a_group_was_added():  # P7
    _, optimizer = one_weight()
    decay = DecoupledWD(optimizer, lambda progress: 0.5 * progress, total_steps=4)
    for _ in range(3):
        optimizer.step()
    (row,) = decay.describe()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    first, second = decay.describe()
    assert first == row
    assert row.due > 0
    assert (second.coefficient, second.due, second.decaying) == (0.25, 0, (1, 3))


def test_parameters_that_are_not_there_yet_are_left_alone():  # P2
    model = nn.ModuleList([nn.LazyLinear(3), nn.LazyLinear(4)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = DecoupledWD(optimizer, 0.5)
    assert decay.describe()[0].decaying == (4, 0)
    model[0](torch.ones(1, 2)).sum().backward()
    bias = model[0].bias.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].bias.detach(), bias.mul(0.95).sub(0.1))
    model[1](torch.ones(1, 2)).sum().backward()
    model[1].bias.data.fill_(1)
    optimizer.step()
    assert torch.equal(model[1].bias.detach(), torch.ones(4).mul(0.95).sub(0.1))


def test_a_shallow_copy_is_a_second_decay():  # P10
    p, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 0.5)
    with pytest.raises(ValueError, match="has a DecoupledWD attached already"):
        copy.copy(decay)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((2,), 0.95))


def test_a_closure_that_is_not_evaluated_is_told_of():  # P7
    class Deaf(torch.optim.SGD):
        def step(self, closure=None):
            return super().step()

    _, optimizer = one_weight()
    deaf = Deaf(optimizer.param_groups[0]["params"], lr=0.1)
    DecoupledWD(deaf, 0.1)
    with pytest.warns(UserWarning, match="has not evaluated the closure"):
        deaf.step(lambda: torch.zeros(()))
    deaf.step()


def test_a_weight_decay_that_is_set_after_it_was_lent_is_told_of():  # P3
    _, optimizer = one_weight()
    DecoupledWD(optimizer, 0.1)
    optimizer.register_step_pre_hook(lambda it, *_: it.param_groups[0].update(weight_decay=0.2))
    with pytest.warns(UserWarning, match="was set in a param group while the opt.* step") as said:
        optimizer.step()
        optimizer.step()
    assert len(said) == 1
    assert optimizer.param_groups[0]["weight_decay"] == 0.2


def test_what_is_set_inside_a_closure_is_no_matter(recwarn):  # P3
    _, optimizer = one_weight()
    DecoupledWD(optimizer, 0.1)
    optimizer.step(lambda: optimizer.param_groups[0].update(weight_decay=0.2))
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    assert not recwarn.list


@pytest.mark.parametrize("on_device", [False, True])
def test_a_ratio_that_keeps_growing_is_told_of_once(recwarn, on_device):  # P7
    _, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 0.1, scale_by="lr_ratio")
    for step in range(1, 9):
        lr = 0.1 * step
        optimizer.param_groups[0]["lr"] = torch.tensor(lr) if on_device else lr
        optimizer.step()
    (said,) = recwarn.list
    assert "param group 0: lr / lr_max exceeds 1 (lr 0.2, lr_max 0.1)" in str(said.message)
    assert decay.steps == 8


# What is shown of a run that is resumed


def resumed(**arguments):
    """A run of ten steps, resumed after five of them."""
    (_, first), (_, second) = one_weight(), one_weight()
    schedule = lambda progress: 0.1 + 0.4 * progress  # noqa: E731
    before = DecoupledWD(first, schedule, total_steps=10)
    for _ in range(5):
        first.step()
    decay = DecoupledWD(second, schedule, total_steps=10, **arguments)
    decay.load_state_dict(before.state_dict())
    return before, decay


def test_describe_right_after_a_state_is_loaded():  # P7, P9, P13
    before, decay = resumed()
    assert decay.describe() == before.describe()
    assert decay.coefficients == before.coefficients == [pytest.approx(0.1 + 0.4 * 0.4)]
    assert decay.steps == 5


def test_describe_tells_of_the_state_and_not_of_the_run_before_it():  # P7, P9
    before, decay = resumed()
    for _ in range(3):
        decay.optimizer.step()
    decay.load_state_dict(before.state_dict())
    assert decay.describe() == before.describe()


def test_a_state_that_does_not_tell_the_progress_is_loaded():  # P9
    before, decay = resumed()
    state = before.state_dict()
    del state["progress"]  # version 0.1.0
    decay.load_state_dict(state)
    decay.optimizer.step()
    before.optimizer.step()
    assert decay.state_dict() == before.state_dict()


def test_verbose_shows_a_resumed_run_too(capsys):  # P7
    _, decay = resumed(verbose=True)
    decay.optimizer.step()
    decay.optimizer.step()
    (line,) = (it for it in capsys.readouterr().out.splitlines() if not it.startswith("group"))
    assert line.split()[:2] == ["0", "0.26"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lr", [1e-3, 0.0123])
def test_a_fused_update_computes_with_its_tensor_of_a_learning_rate_in_double(dtype, lr):  # P4
    torch.manual_seed(0)
    start, gradient = torch.randn(2, 1000, dtype=dtype)

    def run(cls, wd):
        p = nn.Parameter(start.clone())
        optimizer = cls([p], lr=torch.tensor(lr), weight_decay=wd, fused=True)
        if cls is torch.optim.Adam:
            DecoupledWD(optimizer, 0.1)
        for _ in range(3):
            p.grad = gradient.clone()
            optimizer.step()
        return p.detach()

    assert torch.equal(run(torch.optim.Adam, 0.37), run(torch.optim.AdamW, 0.1))
