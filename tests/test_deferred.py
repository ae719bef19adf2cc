"""What was applied is what was due less what is deferred, in every dtype (P8)."""

from __future__ import annotations

import math

import pytest
import torch
from fastai_helpers import When, still_learner
from helpers import QUANTA, applied, deferred, one_weight, params_of, spread

from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.torch import DecoupledWD


def build(dtype, shrink, count=1, **arguments):
    """Weights that shrink by ``shrink`` in each step, their values in float64, and the rest."""
    params = [spread(dtype) for _ in range(count)]
    optimizer = torch.optim.SGD(params, lr=1.0)
    decay = DecoupledWD(optimizer, shrink, **arguments)
    return params, [p.detach().double().clone() for p in params], optimizer, decay


def step(optimizer, params):
    """A step in which ``params`` alone have a gradient."""
    for p in params_of(optimizer):
        p.grad = torch.zeros_like(p) if any(p is q for q in params) else None
    optimizer.step()


SHRINKS = [
    (torch.float32, 1e-8, 400),
    (torch.float32, 1e-5, 200),
    (torch.float64, 1e-17, 10),
    (torch.float64, 1e-8, 400),
    (torch.float64, 1e-5, 200),
    (torch.bfloat16, 1e-5, 5000),
    (torch.bfloat16, 2.0**-11, 2000),
    (torch.bfloat16, 1e-2, 60),
    (torch.float16, 1e-5, 2000),
    (torch.float16, 1e-2, 60),
]


@pytest.mark.parametrize(("dtype", "shrink", "steps"), SHRINKS)
def test_applied_is_due_less_deferred(dtype, shrink, steps):  # P8
    [p], [before], optimizer, decay = build(dtype, shrink)
    for done in range(1, steps + 1):
        step(optimizer, [p])
        due = -done * math.log1p(-shrink)
        [waiting] = deferred(decay)
        assert 0 <= -math.expm1(-waiting) < QUANTA[dtype]
        if done % (steps // 4) == 0:
            assert applied(p, before) == pytest.approx(due - waiting, rel=0.02, abs=1e-12)


def test_a_parameter_that_pauses_keeps_its_deferred_decay():  # P8, P11
    (p, q), before, optimizer, decay = build(torch.float64, 0.4, count=2, quantum=0.5)
    for with_gradient in ([p], [q], [p], [p, q]):
        step(optimizer, with_gradient)
    # The second shrink of each reaches 1 - 0.6**2 = 0.64; the third of p is deferred.
    assert deferred(decay) == pytest.approx([-math.log(0.6), 0.0], abs=1e-12)
    torch.testing.assert_close(p.detach(), before[0] * 0.36)
    torch.testing.assert_close(q.detach(), before[1] * 0.36)


def test_a_larger_quantum_is_applied_seldom():  # P8, P11
    [p], _, optimizer, _ = build(torch.float32, 1e-5, quantum=1e-3)
    changes = 0
    for _ in range(250):
        before = p.detach().clone()
        step(optimizer, [p])
        changes += not torch.equal(p.detach(), before)
    assert changes == 2  # 250 * 1e-5 is two quanta and a half


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decays_faithfully_where_only_the_device_knows(dtype):  # P1, P8
    p = spread(dtype)
    optimizer = torch.optim.SGD([p], lr=0.1, fused=True)
    DecoupledWD(optimizer, 0.4)
    for found_inf, shrink in ((0.0, 0.04), (1.0, 0.0)):
        before = p.detach().double()
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        assert (1 - p.double() / before).mean().item() == pytest.approx(shrink, rel=0.02, abs=0)


@pytest.mark.filterwarnings("ignore:.*quantum")
def test_a_quantum_of_0_applies_all_that_is_deferred_at_once():  # P8, P4
    _, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 0.1, quantum=0.99)
    for lr in torch.linspace(0.9, 0.1, 8).tolist():
        optimizer.param_groups[0]["lr"] = lr
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


def test_fastai_defers_across_validations_and_forgets_between_fits():  # P8
    validate = When("after_train", lambda learn: learn.validate())
    validate.run_valid = True
    learn = still_learner(cbs=[FastaiWD(1e-4), validate])
    learn.fit(20, 1e-4)  # 160 shrinks of 1e-8: the quantum, and 64 that stay deferred
    after = learn.model[0].weight[0, 0].item()
    assert after == pytest.approx(1 - 2.0**-20, abs=1e-8)
    learn.fit(10, 1e-4)  # 80 more, which come to less than the quantum
    assert learn.model[0].weight[0, 0].item() == after
