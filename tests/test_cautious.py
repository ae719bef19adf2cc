"""Cautious decay: only of elements that the update moves towards the anchor as well."""

from __future__ import annotations

import copy

import numpy
import pytest
import torch
from adapters import batches, each_adapter, run
from helpers import (
    HALF,
    INNER_WD,
    caught,
    every_optimizer,
    flat,
    one_weight,
    parameter,
    weights,
    zero_gradients,
)
from reference.steps import make_steps, without_wd
from torch import nn
from torch.nn.functional import mse_loss

from wd_callbacks.schedules import Linear
from wd_callbacks.torch import DecoupledWD

STEPS, LR, WD = 6, 0.05, 0.5


def by_hand(p, before, anchor, shrink):
    """``p - shrink * (before - anchor)`` where the update went towards the anchor, or nowhere."""
    distance = before - anchor
    agrees = (before - p.data) * distance >= 0
    p.data.copy_(torch.where(agrees, p.data - shrink * distance, p.data))


@pytest.mark.filterwarnings("ignore::wd_callbacks.core.warn.DecoupledWDWarning")  # lambd, sparse
@every_optimizer
def test_every_optimizer_equals_the_loop_by_hand(case):  # P1, P15, P16
    hand, none = (case.model(torch.float64) for _ in range(2))
    name, first = next(hand.named_parameters())
    anchors = {name: first.detach() + 0.1}  # of the others it is zero
    before = {}

    def note(step):
        before.update((name, p.detach().clone()) for name, p in hand.named_parameters())

    def decay(step):
        for name, p in hand.named_parameters():
            by_hand(p, before[name], anchors.get(name, 0.0), LR * WD)

    make_steps(case, hand, without_wd(case, hand.parameters()), range(STEPS), note, decay)
    make_steps(case, none, without_wd(case, none.parameters()), range(STEPS))
    assert not torch.allclose(flat(hand), flat(none))
    for closure in {False, not case.sparse}:
        ours = case.model(torch.float64)
        optimizer = case.build(ours.parameters())
        DecoupledWD(optimizer, WD, cautious=True, anchor=anchors, model=ours)
        make_steps(case, ours, optimizer, range(STEPS), closure=closure)
        torch.testing.assert_close(weights(ours), weights(hand), rtol=1e-9, atol=1e-12)


TINY = 1e-200  # times an update of 1e-201 it is 0
SINGLE = {  # weights, gradients, weights after a step with a lr of 0.1, other arguments
    "towards": ([1.0, -1.0], [1.0, -1.0], [0.9 - 0.1, -0.9 + 0.1], {}),
    "away": ([1.0, -1.0], [-1.0, 1.0], [1.1, -1.1], {}),
    "no update": ([1.0, -1.0], [0.0, 0.0], [0.9, -0.9], {}),
    "from zero": ([0.0, 0.0], [1.0, -1.0], [-0.1, 0.1], {}),
    "products that underflow": ([TINY, -TINY], [-TINY, -TINY], [1.1 * TINY, -0.8 * TINY], {}),
    "real and imaginary parts": ([1 + 1j], [1 - 1j], [0.8 + 1.1j], {}),
    "below the quantum": ([1.0], [0.0], [1 - 1e-9], {"wd": 1e-8}),
    "a quantum of 0": ([1.0], [0.0], [1 - 1e-9], {"wd": 1e-8, "quantum": 0}),
}


@pytest.mark.parametrize(("before", "gradient", "after", "options"), SINGLE.values(), ids=SINGLE)
def test_single_weights(before, gradient, after, options):  # P16
    p = nn.Parameter(torch.from_numpy(numpy.array(before)))
    p.grad = torch.from_numpy(numpy.array(gradient))
    optimizer = torch.optim.SGD([p], lr=0.1)
    DecoupledWD(optimizer, **{"wd": 1.0, "cautious": True, **options})
    optimizer.step()
    assert p.tolist() == pytest.approx(after, rel=1e-12, abs=0)


def test_scales_schedules_mappings_and_exclude():  # P16
    model = nn.ParameterDict({name: torch.ones(1, dtype=torch.float64) for name in "abc"})
    zero_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"scale_by": "none", "exclude": "c", "total_steps": 2, "model": model}
    decay = DecoupledWD(optimizer, {"a": Linear(0.2, 0), "*": 0.1}, cautious=True, **options)
    optimizer.step()
    optimizer.step()
    assert [p.item() for p in model.parameters()] == pytest.approx([0.8 * 0.9, 0.9**2, 1])
    assert [row.due for row in decay.describe()] == pytest.approx([1 - 0.8 * 0.9, 1 - 0.9**2])
    decay.detach()
    optimizer.step()
    assert model["a"].item() == pytest.approx(0.8 * 0.9)


def test_initial_anchors():  # P15, P16
    p, optimizer = one_weight(torch.float64)
    DecoupledWD(optimizer, 1.0, cautious=True, anchor="initial")
    for gradient, expected in ((-1.0, 1.1), (-1.0, 1.2), (1.0, 1.1 - 0.1 * 0.2)):
        p.grad.fill_(gradient)
        optimizer.step()
        assert p.tolist() == pytest.approx([expected] * 2)


def test_lbfgs_leaves_alone_what_has_no_gradient():  # P2, P16
    p, idle = parameter(dtype=torch.float64), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([p, idle], lr=0.1)
    DecoupledWD(optimizer, 1.0, cautious=True)
    optimizer.step(lambda: p.grad.zero_().sum())
    assert (p.tolist(), idle.tolist()) == ([0.9] * 2, [1.0] * 2)


# Steps that do not happen


@pytest.mark.parametrize(
    ("cls", "lr"), [(torch.optim.Adam, 0.1), (torch.optim.SGD, torch.tensor(0.1))], ids=str
)
def test_a_step_that_is_skipped_on_the_device(cls, lr):  # P1, P16
    p, optimizer = one_weight(lr=lr, cls=cls, fused=True)
    DecoupledWD(optimizer, 1.0, cautious=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, expected in ((float("inf"), 1.0), (0.0, 0.9), (float("inf"), 0.9)):
        optimizer.zero_grad()
        scaler.scale((factor * p).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert p.tolist() == pytest.approx([expected] * 2)


class Fails(torch.optim.SGD):
    fails = ignores = False

    def step(self, closure=None):
        if self.fails:
            self.param_groups[0]["params"][0].data.sub_(0.5)
            raise RuntimeError("out of memory")
        return None if self.ignores else super().step(closure)


def raises():
    raise RuntimeError("out of memory")


def test_a_step_that_raises_decays_nothing():  # P1, P3, P16
    p, optimizer = one_weight(torch.float64, cls=Fails)
    DecoupledWD(optimizer, 1.0, cautious=True)
    optimizer.fails = True
    for _ in range(2):
        with pytest.raises(RuntimeError):
            optimizer.step()
    assert p.tolist() == [0.0] * 2
    p.data.fill_(-1)
    optimizer.fails, optimizer.ignores = False, True
    _, messages = caught(lambda: optimizer.step(lambda: None))  # evaluates no closure: no decay
    assert "nothing decayed" in messages[0]
    optimizer.ignores = False
    with pytest.raises(RuntimeError):
        optimizer.step(raises)
    assert p.tolist() == [-1.0] * 2
    optimizer.step()
    assert p.tolist() == pytest.approx([-0.9] * 2)
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD


# Half precision


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_weights_that_become_half_precision_are_refused(dtype):  # P16
    p, optimizer = one_weight()
    DecoupledWD(optimizer, 0.1, cautious=True)
    p.data = p.data.to(dtype)
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="cautious=True needs weights in float32"):
        optimizer.step()
    assert p.tolist() == [1.0] * 2


@pytest.mark.parametrize("wd", [{"0.*": 0.1}, {"1.*": 0, "*": 0.1}], ids=str)
def test_half_precision_that_does_not_decay_is_not(wd):  # P16
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half().requires_grad_(False))
    DecoupledWD(torch.optim.SGD(model.parameters(), lr=0.1), wd, cautious=True, model=model)


# Frameworks


@pytest.mark.parametrize("anchor", [None, "initial"])
@each_adapter
def test_every_adapter_equals_the_loop_by_hand(adapter, anchor):  # P15, P16
    start = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    ours, hand, none = (copy.deepcopy(start) for _ in range(3))
    anchors = weights(start) if anchor else [0.0] * 4
    run(adapter, {"wd": WD, "cautious": True, "anchor": anchor}, ours, lr=LR)
    for model, wd in ((hand, WD), (none, 0.0)):
        for x, y in batches():
            model.zero_grad()
            mse_loss(model(x), y).backward()
            for p, towards in zip(model.parameters(), anchors):
                before = p.detach().clone()
                p.data.sub_(LR * p.grad)
                by_hand(p, before, towards, LR * wd)
    torch.testing.assert_close(weights(ours), weights(hand), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(flat(ours), flat(none), rtol=1e-3)
