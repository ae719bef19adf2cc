"""What was applied is what was due less what is deferred, in every dtype (P8)."""

from __future__ import annotations

import math

import pytest
import torch
from fastai_helpers import When, still_learner
from helpers import QUANTA, applied, deferred, one_weight, spread

from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.torch import DecoupledWD


def build(dtype, lr, wd, count=1, cls=torch.optim.SGD, **arguments):
    params = [spread(dtype) for _ in range(count)]
    optimizer = cls(params, lr=lr, foreach=False)
    return params, optimizer, DecoupledWD(optimizer, wd, **arguments)


def step(optimizer, params):
    """A step in which ``params`` alone have a gradient."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if any(p is q for q in params) else None
    optimizer.step()


def copies(params):
    return [p.detach().double().clone() for p in params]


@pytest.mark.parametrize(
    ("dtype", "shrink", "steps"),
    [
        (torch.float32, 1e-8, 400),
        (torch.float32, 1e-6, 200),
        (torch.float32, 1e-5, 200),
        (torch.float64, 1e-17, 10),
        (torch.float64, 1e-8, 400),
        (torch.float64, 1e-5, 200),
        (torch.bfloat16, 1e-5, 5000),
        (torch.bfloat16, 2.0**-11, 2000),
        (torch.bfloat16, 1e-2, 60),
        (torch.float16, 1e-5, 2000),
        (torch.float16, 1e-2, 60),
    ],
)
def test_applied_is_due_less_deferred(dtype, shrink, steps):  # P8
    (p,), optimizer, decay = build(dtype, lr=1e-2, wd=shrink / 1e-2)
    (before,) = copies([p])
    due = 0.0
    for index in range(steps):
        step(optimizer, [p])
        due -= math.log1p(-shrink)
        (waiting,) = deferred(decay)
        assert 0 <= -math.expm1(-waiting) < QUANTA[dtype]
        if index % (steps // 4) == steps // 4 - 1:
            assert applied(p, before) == pytest.approx(due - waiting, rel=0.02, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_adamw_loses_what_is_kept_here(dtype):  # the reason for P8
    shrink = 1e-8 if dtype == torch.float32 else 1e-4
    p = spread(dtype)
    before = p.detach().clone()
    optimizer = torch.optim.AdamW([p], lr=1e-2, weight_decay=shrink / 1e-2, eps=1e-4)
    for _ in range(300):
        optimizer.step()
    assert torch.equal(p.detach(), before)


def test_gradients_that_come_and_go_are_counted_by_parameter():  # P8
    (p, q), optimizer, decay = build(torch.float32, lr=1e-2, wd=3e-5, count=2)
    before = copies([p, q])
    for index in range(1000):
        step(optimizer, [p] if index % 2 else [q])
    due = -500 * math.log1p(-3e-7)
    for x, start, waiting in zip((p, q), before, deferred(decay)):
        assert applied(x, start) == pytest.approx(due - waiting, rel=0.02)
        assert waiting < 2.0**-20


def test_a_parameter_that_pauses_keeps_its_deferred_decay():  # P8, P11
    (p, q), optimizer, decay = build(torch.float64, lr=1.0, wd=0.4, count=2, quantum=0.5)
    before = copies([p, q])
    step(optimizer, [p])
    step(optimizer, [p, q])  # p reaches 1 - 0.6**2 = 0.64; of q 0.4 is deferred
    assert deferred(decay) == pytest.approx([0.0, -math.log(0.6)], abs=1e-12)
    step(optimizer, [q])
    torch.testing.assert_close(p.detach(), before[0] * 0.36)
    torch.testing.assert_close(q.detach(), before[1] * 0.36)


def test_a_larger_quantum_is_applied_seldom():  # P8, P11
    (p,), optimizer, _ = build(torch.float32, lr=1e-2, wd=1e-3, quantum=1e-3)
    changes = 0
    for _ in range(250):
        before = p.detach().clone()
        step(optimizer, [p])
        changes += not torch.equal(p.detach(), before)
    assert changes == 2  # 250 * 1e-5 is two quanta and a half


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decays_faithfully_where_only_the_device_knows(dtype):  # P1, P8
    p = spread(dtype)
    before = p.detach().double()
    optimizer = torch.optim.SGD([p], lr=0.1, fused=True)
    DecoupledWD(optimizer, 0.4)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert (1 - p.double() / before).mean().item() == pytest.approx(0.04, rel=0.02)
    optimizer.found_inf = torch.tensor(1.0)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p.data, before)


@pytest.mark.filterwarnings("ignore:.*quantum")
@pytest.mark.parametrize("large", [0.04, 0.3, 0.9])
def test_a_quantum_of_0_applies_all_that_is_deferred_at_once(large):  # P8, P4
    _, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 0.1, quantum=0.99)
    for lr in torch.linspace(1, 0, 9)[:-1].tolist():
        optimizer.param_groups[0]["lr"] = large * lr
        optimizer.step()
        p, fresh = one_weight(lr=1e-3)
        resumed = DecoupledWD(fresh, 0.1, quantum=0)
        resumed.load_state_dict(decay.state_dict())
        fresh.step()
        assert deferred(resumed) == [0.0]
        before = p.detach().clone()
        fresh.step()
        assert torch.equal(p.detach(), before.mul(1 - 1e-3 * 0.1))


@pytest.mark.filterwarnings("ignore:.*(quantum|wd) was")
def test_a_bfloat16_weight_applies_enough_under_a_smaller_quantum():  # P8, P9
    _, optimizer = one_weight(torch.bfloat16)
    decay = DecoupledWD(optimizer, 1.0, quantum=0.2)
    for lr in (0.19, 0.19, 0.19, 0.19, 0.1):  # the second and the fourth step apply
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    state = decay.state_dict()
    decay.detach()
    decay = DecoupledWD(optimizer, 0.01)
    decay.load_state_dict(state)
    optimizer.step()
    assert -math.expm1(-deferred(decay)[0]) < 2.0**-6


# Through the adapters


def test_fastai_defers_within_a_fit_and_forgets_between_fits():  # P8
    learn = still_learner(cbs=FastaiWD(1e-4))
    learn.fit(20, 1e-4)  # 160 steps of 1e-8
    due, quantum = 160 * 1e-8, 2.0**-20
    weight = learn.model[0].weight
    assert due - quantum < 1 - weight[0, 0].item() <= due * (1 + 1e-6)
    before = weight[0, 0].item()
    learn.fit(10, 1e-4)  # 80 steps come to less than the quantum
    assert weight[0, 0].item() == before < 1


def test_fastai_defers_across_a_validation():  # P8
    # 32 shrinks of 4e-8 come to more than the quantum, those of one epoch do not
    learn = still_learner()
    validate = When("after_train", lambda learn: learn.validate())
    validate.run_valid = True
    learn.fit(4, 1e-4, cbs=[FastaiWD(4e-4), validate])
    assert learn.model[0].weight[0, 0].item() == pytest.approx(1 - 2.0**-20, abs=4e-8)
    assert learn.model[0].weight[0, 0] < 1
