"""Cautious decay: only of elements that the update moves towards the anchor as well."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CASES,
    INNER_WD,
    Climber,
    WithoutWD,
    caught,
    flat,
    one_weight,
    parameter,
    weights,
    zero_gradients,
)
from reference.steps import make_steps, without_wd
from torch import nn

from wd_callbacks.schedules import Linear
from wd_callbacks.torch import DecoupledWD

STEPS, LR, WD = 6, 0.05, 0.5
EACH_CLASS = {case.cls: case for case in CASES}.values()


def by_hand(p, before, anchor, shrink):
    """``p - shrink * (before - anchor)`` where the update went towards the anchor, or nowhere."""
    distance = before - anchor
    agrees = (before - p.data) * distance >= 0
    p.data.copy_(torch.where(agrees, p.data - shrink * distance, p.data))


# Against a loop by hand in float64


@pytest.mark.filterwarnings("ignore::wd_callbacks.core.warn.DecoupledWDWarning")  # lambd, sparse
@pytest.mark.parametrize(
    ("case", "anchored"),
    [(case, False) for case in CASES] + [(case, True) for case in EACH_CLASS],
    ids=lambda it: getattr(it, "id", it),
)
def test_every_optimizer_equals_the_loop_by_hand(case, anchored):  # P16, P1
    ours, closed, hand, none = (case.model(torch.float64) for _ in range(4))
    name, first = next(hand.named_parameters())
    anchors = {name: first.detach() + 0.1} if anchored else {}
    for model in (ours, closed):
        optimizer = case.build(model.parameters())
        options = {"cautious": True, "anchor": anchors or None, "model": model}
        DecoupledWD(optimizer, WD, **options)
        with_closure = model is closed and not case.sparse
        make_steps(case, model, optimizer, range(STEPS), closure=with_closure)

    before = {}

    def note(step):
        before.update((name, p.detach().clone()) for name, p in hand.named_parameters())

    def decay(step):
        for name, p in hand.named_parameters():
            by_hand(p, before[name], anchors.get(name, 0.0), LR * WD)

    make_steps(case, hand, without_wd(case, hand.parameters()), range(STEPS), note, decay)
    make_steps(case, none, without_wd(case, none.parameters()), range(STEPS))
    for model in (ours, closed):
        torch.testing.assert_close(weights(model), weights(hand), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(flat(ours), flat(none))


# Single weights


def stepped(values, gradients, wd=1.0, lr=0.1, dtype=torch.float64, **options):
    """Weights after a step of SGD."""
    p = nn.Parameter(torch.tensor(values, dtype=dtype))
    p.grad = torch.tensor(gradients, dtype=dtype)
    optimizer = torch.optim.SGD([p], lr=lr)
    DecoupledWD(optimizer, wd, cautious=True, **options)
    optimizer.step()
    return p.tolist()


def test_the_signs():  # P16: away, towards and without an update
    found = stepped([1.0, 1.0, 1.0, -1.0, -1.0, 0.0], [-1.0, 1.0, 0.0, 1.0, -1.0, 1.0])
    assert found == pytest.approx([1.1, 0.9 - 0.1, 1 - 0.1, -1.1, -0.9 + 0.1, -0.1])


def test_products_that_underflow_count_by_their_sign():  # P16
    tiny = 1e-30  # times an update of 1e-31 it is 0 in float32
    found = stepped([tiny, -tiny], [-tiny, -tiny], dtype=torch.float32)
    expected = [1.1 * tiny, -0.8 * tiny]
    assert found == pytest.approx(expected, rel=1e-5, abs=0)


def test_real_and_imaginary_parts_go_apart():  # P16
    (found,) = stepped([1 + 1j], [1 - 1j], dtype=torch.complex128)
    assert found == pytest.approx(0.9 - 0.1 + 1.1j)


def test_a_shrink_below_the_quantum_is_applied_at_once():  # P16
    assert stepped([1.0], [0.0], wd=1e-8) == [1 - 1e-9]
    assert stepped([1.0], [0.0], wd=1e-8, quantum=0) == [1 - 1e-9]


def test_scales_schedules_mappings_and_exclude():  # P16
    model = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in "abc"}).double()
    for p in model.parameters():
        nn.init.ones_(p)
    zero_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"scale_by": "none", "exclude": "c.*", "total_steps": 2, "model": model}
    decay = DecoupledWD(optimizer, {"a.*": Linear(0.2, 0), "*": 0.1}, cautious=True, **options)
    optimizer.step()
    optimizer.step()
    assert [p.item() for p in model.parameters()] == pytest.approx([0.8 * 0.9, 0.9**2, 1])
    rows = decay.describe()
    assert [row.due for row in rows] == pytest.approx([1 - 0.8 * 0.9, 1 - 0.9**2])
    decay.detach()
    optimizer.step()
    assert model["a"].weight.item() == pytest.approx(0.8 * 0.9)


def test_initial_anchors():  # P15, P16
    p, optimizer = one_weight(torch.float64, weight_decay=0)
    DecoupledWD(optimizer, 1.0, cautious=True, anchor="initial")
    for gradient, expected in ((-1.0, 1.1), (-1.0, 1.2), (1.0, 1.1 - 0.1 * 0.2)):
        p.grad.fill_(gradient)
        optimizer.step()
        assert p.tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize("cls", [WithoutWD, Climber])
def test_other_optimizers(cls):  # P16
    p = parameter(dtype=torch.float64)
    optimizer = cls([p])
    caught(lambda: DecoupledWD(optimizer, 1.0, cautious=True))  # Climber's own decay is smaller

    def evaluate():
        p.grad = torch.ones_like(p)

    optimizer.step(evaluate)
    moved = {WithoutWD: 0.1, Climber: 3 * 0.01}[cls]
    assert p.tolist() == pytest.approx([1 - moved - 0.1] * 2)


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
    p, optimizer = one_weight(lr=lr, cls=cls, fused=True, weight_decay=0)
    DecoupledWD(optimizer, 1.0, cautious=True)
    optimizer.grad_scale = None
    for found_inf, expected in ((1.0, 1.0), (0.0, 0.9), (1.0, 0.9)):
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        assert p.tolist() == pytest.approx([expected] * 2)


def test_a_real_scaler():  # P1, P16
    p, optimizer = one_weight(lr=0.1, fused=True, cls=torch.optim.Adam, weight_decay=0)
    DecoupledWD(optimizer, 1.0, cautious=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, expected in ((float("inf"), 1.0), (0.0, 0.9)):
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


def test_a_step_that_raises_decays_nothing():  # P1, P16
    p, optimizer = one_weight(torch.float64, cls=Fails)
    decay = DecoupledWD(optimizer, 1.0, cautious=True)
    optimizer.fails = True
    for _ in range(2):
        with pytest.raises(RuntimeError):
            optimizer.step()
    assert p.tolist() == [0.0] * 2
    optimizer.fails, optimizer.ignores = False, True
    p.data.fill_(-1)
    _, messages = caught(lambda: optimizer.step(lambda: None))  # evaluates no closure: no decay
    assert "nothing decayed" in messages[0]
    assert p.tolist() == [-1.0] * 2
    optimizer.ignores = False
    optimizer.step()
    assert p.tolist() == pytest.approx([-0.9] * 2)
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD  # P3
    assert decay.is_attached


def test_a_closure_that_raises():  # P16
    p, optimizer = one_weight(torch.float64)
    DecoupledWD(optimizer, 1.0, cautious=True)

    def fails():
        raise RuntimeError("out of memory")

    optimizer.step()
    with pytest.raises(RuntimeError):
        optimizer.step(fails)
    assert p.tolist() == pytest.approx([0.9] * 2)
    optimizer.step()
    assert p.tolist() == pytest.approx([0.81] * 2)


# Nonsense


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_refused(dtype):  # P16
    p, optimizer = one_weight(dtype)
    with pytest.raises(ValueError, match="cautious=True needs weights in float32"):
        DecoupledWD(optimizer, 0.1, cautious=True)
    p, optimizer = one_weight()
    DecoupledWD(optimizer, 0.1, cautious=True)
    p.data = p.data.to(dtype)  # during training
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="cautious=True needs weights in float32"):
        optimizer.step()
    assert p.tolist() == [1.0] * 2


@pytest.mark.parametrize("wd", [{"0.*": 0.1}, {"1.*": 0, "*": 0.1}], ids=str)
def test_half_precision_that_does_not_decay_is_not(wd):  # P16
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half().requires_grad_(False))
    DecoupledWD(torch.optim.SGD(model.parameters(), lr=0.1), wd, cautious=True, model=model)


# Frameworks


def test_lightning(package):  # P16
    from lightning_helpers import LR, adam, fit
    from torch.optim import Adam

    from wd_callbacks.lightning import DecoupledWD

    class ByHand(Adam):
        def step(self, closure):
            params = self.param_groups[0]["params"]
            before = [p.detach().clone() for p in params]
            loss = super().step(closure)
            for p, old in zip(params, before):
                by_hand(p, old, 0.0, LR * 1.0)
            return loss

    ours = fit(package, adam, DecoupledWD(1.0, cautious=True))
    hand = fit(package, lambda module: ByHand(module.parameters(), lr=LR))
    torch.testing.assert_close(weights(ours), weights(hand), rtol=1e-4, atol=1e-6)
    none = fit(package, lambda module: Adam(module.parameters(), lr=LR))
    assert not torch.allclose(weights(ours)[0], weights(none)[0], rtol=1e-3)


@pytest.mark.parametrize("anchor", [None, "initial"])
def test_fastai(anchor):  # P15, P16
    from fastai.callback.core import Callback
    from fastai_helpers import L2, learner

    from wd_callbacks.fastai import DecoupledWD

    class ByHand(Callback):
        def before_fit(self):
            self.anchors = weights(self.model)

        def before_step(self):
            self.before = weights(self.model)

        def after_step(self):
            for p, old, start in zip(self.model.parameters(), self.before, self.anchors):
                if self.opt.state[p].get("do_wd", True):
                    by_hand(p, old, start if anchor else 0.0, self.opt.hypers[0]["lr"] * WD)

    def fitted(cb, **options):
        learn = learner(L2, wd_bn_bias=False, lr=0.02, **options)
        learn.fit(2, cbs=cb)
        return weights(learn.model)

    ours = fitted(DecoupledWD(WD, cautious=True, anchor=anchor))
    torch.testing.assert_close(ours, fitted(ByHand(), wd=0.0), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(ours[0], fitted(None, wd=0.0)[0], rtol=1e-3)
