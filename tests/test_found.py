"""What test_anything.py has found, each case reduced by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

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
