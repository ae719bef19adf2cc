"""Cases that no other test tells apart from a broken package, found by ``scripts/mutants.py``."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from wd_callbacks.torch import DecoupledWD


def one_weight(dtype=torch.float32, lr=1.0, count=4096, **options):
    """Weights spread over two binades, with a gradient of zero."""
    p = nn.Parameter((torch.rand(count) * 1.5 + 0.5).to(dtype))
    p.grad = torch.zeros_like(p)
    return p, torch.optim.SGD([p], lr=lr, **options)


def test_what_has_come_to_exactly_a_quantum_is_paid():  # P8: owes less than one quantum
    quantum = -math.expm1(2 * math.log1p(-0.25))  # two steps of 0.25 as they add up
    p, optimizer = one_weight(torch.float64)
    decay = DecoupledWD(optimizer, 0.25, quantum=quantum)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p.detach(), before)
    optimizer.step()
    torch.testing.assert_close(p.detach(), before * 0.75**2)
    assert decay.state_dict()["owed"][0][0] < 1e-12


@pytest.mark.parametrize("units", [5.5, 5.52])
def test_what_float32_cannot_represent_of_a_payment_stays_owed(units):  # P8
    """Three steps make a quantum of 16 units, and lie between two numbers of float32 below 1."""
    shrink = units * 2.0**-24
    p, optimizer = one_weight()
    decay = DecoupledWD(optimizer, shrink)
    before = p.detach().double()
    for _ in range(3000):
        optimizer.step()
    due = -3000 * math.log1p(-shrink) - decay.state_dict()["owed"][0][0]
    applied = -torch.log(p.detach().double() / before).mean().item()
    assert applied == pytest.approx(due, rel=0.02)


def test_a_weight_decay_that_is_set_after_a_step_raised_is_kept():  # P3
    class Raises(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("out of memory")

    p = nn.Parameter(torch.ones(2))
    p.grad = torch.zeros(2)
    optimizer = Raises([p], lr=0.1, weight_decay=0.5)
    decay = DecoupledWD(optimizer, 0.1)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.25
    decay.detach()
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
