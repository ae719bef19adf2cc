"""Small shrinks are owed, not lost: what is applied is what was due less what is owed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from wd_callbacks.torch import DecoupledWD

QUANTA = {
    torch.float64: 2.0**-20,
    torch.float32: 2.0**-20,
    torch.float16: 2.0**-8,
    torch.bfloat16: 2.0**-6,
}


def build(dtype, lr, wd, count=1, cls=torch.optim.SGD, **arguments):
    """Weights spread over two binades, and an optimizer that leaves them to the decay."""
    params = [nn.Parameter((torch.rand(4096) * 1.5 + 0.5).to(dtype)) for _ in range(count)]
    optimizer = cls(params, lr=lr, foreach=False)
    return params, optimizer, DecoupledWD(optimizer, wd, **arguments)


def step(optimizer, params):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if any(p is q for q in params) else None
    optimizer.step()


def applied(p, before):
    """What the weights have lost, as -log, mean over elements."""
    return -torch.log(p.detach().double() / before).mean().item()


def owed(decay):
    return [debt for debts in decay.state_dict()["owed"] for debt in debts]


@pytest.mark.parametrize(
    ("dtype", "shrink", "steps"),
    [
        (torch.float32, 1e-8, 400),
        (torch.float32, 3e-8, 400),
        (torch.float32, 1e-7, 200),
        (torch.float32, 1e-6, 200),
        (torch.float32, 1e-5, 200),
        (torch.float64, 1e-17, 10),
        (torch.float64, 1e-8, 400),
        (torch.float64, 1e-5, 200),
        (torch.bfloat16, 1e-5, 8000),
        (torch.bfloat16, 2.0**-11, 8000),
        (torch.bfloat16, 1e-4, 4000),
        (torch.bfloat16, 1e-2, 60),
        (torch.float16, 1e-5, 4000),
        (torch.float16, 1e-4, 2000),
        (torch.float16, 1e-2, 60),
    ],
)
def test_what_is_applied_is_what_was_due_less_what_is_owed(dtype, shrink, steps):  # P8
    (p,), optimizer, decay = build(dtype, lr=1e-2, wd=shrink / 1e-2)
    before = p.detach().double().clone()
    due = 0.0
    for index in range(steps):
        step(optimizer, [p])
        due -= math.log1p(-shrink)
        debt = owed(decay)[0]
        assert 0 <= -math.expm1(-debt) < QUANTA[dtype]
        if index % (steps // 4) == steps // 4 - 1:
            assert applied(p, before) == pytest.approx(due - debt, rel=0.02, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_adamw_loses_what_is_kept_here(dtype):  # P8, the reason for the quantum
    shrink = 1e-8 if dtype == torch.float32 else 1e-4
    p = nn.Parameter((torch.rand(4096) * 1.5 + 0.5).to(dtype))
    before = p.detach().double().clone()
    optimizer = torch.optim.AdamW([p], lr=1e-2, weight_decay=shrink / 1e-2, eps=1e-4)
    for _ in range(300):
        step(optimizer, [p])
    assert applied(p, before) == 0


def test_gradients_that_come_and_go_are_charged_by_parameter():  # P8
    (p, q), optimizer, decay = build(torch.float32, lr=1e-2, wd=3e-5, count=2)
    before = [p.detach().double().clone(), q.detach().double().clone()]
    for index in range(2000):
        step(optimizer, [p] if index % 2 else [q])
    due = -1000 * math.log1p(-3e-7)
    for x, start, debt in zip((p, q), before, owed(decay)):
        assert applied(x, start) == pytest.approx(due - debt, rel=0.02)
        assert debt < 2.0**-20


def test_a_parameter_that_pauses_keeps_its_debt_and_pays_with_the_others():  # P8, P11
    (p, q), optimizer, decay = build(torch.float64, lr=1.0, wd=0.4, count=2, quantum=0.5)
    before = [p.detach().clone(), q.detach().clone()]
    step(optimizer, [p])
    step(optimizer, [p, q])  # p reaches 1 - 0.6**2 = 0.64 and pays, q owes 0.4
    assert owed(decay) == pytest.approx([0.0, -math.log(0.6)], abs=1e-12)
    step(optimizer, [q])
    torch.testing.assert_close(p.detach(), before[0] * 0.36)
    torch.testing.assert_close(q.detach(), before[1] * 0.36)


def test_weights_change_inside_steps_only():  # P8
    (p,), optimizer, decay = build(torch.float32, lr=1e-2, wd=1e-5)
    before = p.detach().clone()
    step(optimizer, [p])
    decay.state_dict()
    decay.detach()
    assert torch.equal(p.detach(), before)


def test_quantum_0_applies_every_step_as_adamw_does():  # P4, P8
    (p,), optimizer, decay = build(torch.float32, lr=1e-2, wd=3e-6, quantum=0)
    expected = p.detach().clone()
    for _ in range(10):
        step(optimizer, [p])
        expected.mul_(1 - 1e-2 * 3e-6)
    assert torch.equal(p.detach(), expected)
    assert owed(decay) == [0.0]


def test_a_larger_quantum_pays_seldom():  # P8, P11
    (p,), optimizer, _ = build(torch.float32, lr=1e-2, wd=1e-3, quantum=1e-3)
    changes = 0
    for _ in range(250):
        before = p.detach().clone()
        step(optimizer, [p])
        changes += not torch.equal(p.detach(), before)
    assert changes == 2  # 250 * 1e-5 is two quanta and a half


def test_a_step_at_or_above_the_quantum_is_adamw_s_whatever_is_owed():  # P4
    (p,), optimizer, decay = build(torch.float32, lr=1e-8, wd=1.0)
    step(optimizer, [p])
    debt = owed(decay)
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = 2.0**-20
    step(optimizer, [p])
    assert torch.equal(p.detach(), before * (1 - 2.0**-20))
    assert owed(decay) == debt != [0.0]


def test_debts_survive_a_change_of_dtype():  # P8
    (p,), optimizer, decay = build(torch.float32, lr=1.0, wd=1e-7)
    step(optimizer, [p])
    p.data = p.data.bfloat16()
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = 1e4
    for _ in range(15):  # 15 * 1e-3 is below 2**-6
        step(optimizer, [p])
    assert torch.equal(p.detach(), before)
    assert owed(decay)[0] == pytest.approx(-15 * math.log1p(-1e-3) + 1e-7, rel=1e-9)
    step(optimizer, [p])
    assert not torch.equal(p.detach(), before)
