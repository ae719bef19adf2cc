"""One decay per real step (P1), and an optimizer that is otherwise as the user left it (P3)."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    ADAMW,
    INNER_WD,
    CallsSuper,
    Case,
    Climber,
    Positions,
    hooks_of,
    one_weight,
    parameter,
    same,
    weights,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from wd_callbacks.torch import DecoupledWD

WD = 0.5


def test_a_step_that_calls_super_decays_once():  # P1
    torch.optim.Adam([parameter()])  # from here on Adam.step runs hooks itself
    expected, _ = ADAMW.train(WD)
    for closure in (False, True):
        ours, _ = Case(CallsSuper, {"lr": 0.05}).train(
            decay=lambda optimizer: DecoupledWD(optimizer, WD), closure=closure
        )
        assert torch.equal(ours, expected)


# torch's distributed checkpoints, which call `step` to create the optimizer's state


class Loop:
    def __init__(self, wd=WD, **arguments):
        self.model = nn.Linear(2, 2)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1, weight_decay=INNER_WD)
        self.decay = DecoupledWD(self.optimizer, wd, **arguments)

    def step(self):
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self):
        return copy.deepcopy(get_optimizer_state_dict(self.model, self.optimizer))


@pytest.mark.parametrize("steps", [0, 3])
def test_saving_a_distributed_checkpoint_decays_nothing(steps):  # P1, P3, P6
    schedule = Positions(0.1)
    loop = Loop(schedule, scale_by="none", total_steps=4)
    for _ in range(steps):
        loop.step()
    before, state = weights(loop.model), loop.save()
    assert all(map(torch.equal, before, loop.model.parameters()))
    assert state["param_groups"][0]["weight_decay"] == INNER_WD
    loop.step()  # without a warning that a state has been forgotten
    assert schedule.seen == [0, 0.25, 0.5, 0.75][: steps + 1]


def test_a_distributed_checkpoint_is_loaded_before_the_first_step():  # P9
    first, second = Loop(scale_by="lr_ratio"), Loop(scale_by="lr_ratio")
    first.step()
    set_optimizer_state_dict(second.model, second.optimizer, first.save())
    second.model.load_state_dict(first.model.state_dict())
    second.decay.load_state_dict(first.decay.state_dict())
    for loop in (first, second):
        loop.step()
    assert same(first.model, second.model)


# The weight decay in the param groups, as closures, hooks and the user see it


def test_a_closure_may_change_the_weight_decay_raise_or_detach(recwarn):  # P3
    _, optimizer = one_weight(cls=Climber, weight_decay=1)
    decay = DecoupledWD(optimizer, WD, scale_by="none")
    group, seen = optimizer.param_groups[0], []

    def closure():
        seen.append(group["weight_decay"])
        group["weight_decay"] += 1
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert [*seen, group["weight_decay"]] == [1, 2, 3, 4]
    optimizer.step(decay.detach)
    assert group["weight_decay"] == 4
    assert hooks_of(optimizer) == []
    assert not recwarn.list


def test_a_closure_that_is_not_evaluated_warns_once():  # P7
    class Ignores(torch.optim.SGD):
        def step(self, closure=None):
            return super().step()

    _, optimizer = one_weight(cls=Ignores)
    DecoupledWD(optimizer, 0.1)
    with pytest.warns(UserWarning, match="closure") as records:
        optimizer.step(lambda: torch.zeros(()))
    optimizer.step()
    assert len(records) == 1


def test_post_hooks_of_others_find_the_user_s_weight_decay():  # P3
    _, optimizer = one_weight(weight_decay=0.4)
    group, seen = optimizer.param_groups[0], []

    def halve(*_):
        seen.append(optimizer.state_dict()["param_groups"][0]["weight_decay"])
        group["weight_decay"] /= 2

    optimizer.register_step_post_hook(halve)
    decay = DecoupledWD(optimizer)
    for _ in range(3):
        optimizer.step()
    assert [*seen, group["weight_decay"]] == [0.4, 0.2, 0.1, 0.05]
    assert decay.coefficients == [0.1]


def test_a_weight_decay_that_is_set_during_a_step_is_kept_and_warns_once():  # P3
    _, optimizer = one_weight()
    DecoupledWD(optimizer, 0.1)
    group, values = optimizer.param_groups[0], iter([0.0, 0.2, 0.2])
    optimizer.register_step_pre_hook(lambda *_: group.update(weight_decay=next(values)))
    optimizer.step()  # 0 acts on nothing
    with pytest.warns(UserWarning, match="set in a param group") as records:
        optimizer.step()
        optimizer.step()
    assert len(records) == 1
    assert group["weight_decay"] == 0.2


def test_detach_and_with_leave_the_optimizer_as_it_was():  # P3
    p, optimizer = one_weight(weight_decay=0.0)
    with DecoupledWD(optimizer, WD):
        optimizer.step()
    optimizer.step()
    decay = DecoupledWD(optimizer, WD)
    optimizer.step()
    decay.detach()
    decay.detach()
    optimizer.step()
    assert torch.equal(p.data, torch.full((2,), 1.0).mul(0.95).mul(0.95))
    assert hooks_of(optimizer) == []
    assert "step" not in vars(optimizer)
