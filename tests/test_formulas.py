"""The update formulas of the sources, written out by hand, in every adapter (P4)."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from adapters import BATCHES, EPOCHS, batches, each_adapter, run
from torch import nn
from torch.nn.functional import mse_loss

from wd_callbacks.schedules import Normalized, Restarts
from wd_callbacks.torch import DecoupledWD

LR, WD = 0.1, 0.05


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))


class At(NamedTuple):
    """Where a formula is applied."""

    lr: float
    step: int
    steps: int
    layer: int


def by_hand(part, epochs, lr_at):
    """The loop in which each weight loses ``part(at)`` of itself before its step."""
    net, steps = model(), epochs * BATCHES
    for step, (x, y) in enumerate(batches(epochs)):
        net.zero_grad()
        mse_loss(net(x), y).backward()
        lr = LR * lr_at(step / steps)
        for layer, module in enumerate(net):
            for p in module.parameters():
                p.data.sub_(part(At(lr, step, steps, layer)) * p.data)
                p.data.sub_(lr * p.grad)
    return net


def check(adapter, arguments, part, epochs=EPOCHS, lr_at=lambda progress: 1.0, own=None):
    ours = model()
    run(adapter, arguments, ours, lr=LR, lr_at=lr_at, epochs=epochs, own=own)
    expected, undecayed = (by_hand(it, epochs, lr_at) for it in (part, lambda at: 0.0))
    for p, q, u in zip(expected.parameters(), ours.parameters(), undecayed.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(u, q, rtol=1e-3)


FORMULAS = {  # arguments, and what part of itself a weight loses in a step
    "fast.ai, AdamW and Super-convergence": ({"wd": WD}, lambda at: at.lr * WD),
    "fastai 0.7, use_wd_sched at first": ({"wd": WD, "scale_by": "none"}, lambda at: WD),
    "arXiv 1711.05101, Algorithm 2": (
        {"wd": WD, "scale_by": "lr_ratio", "max_lr": LR},
        lambda at: at.lr / LR * WD,
    ),
    "equation 14": ({"wd": Normalized(WD)}, lambda at: at.lr * WD / math.sqrt(at.steps)),
}


@each_adapter
@pytest.mark.parametrize(("arguments", "part"), FORMULAS.values(), ids=FORMULAS)
def test_a_formula_of_the_sources(adapter, arguments, part):  # P4
    check(adapter, arguments, part, lr_at=lambda progress: 1 - progress)


# The rows of docs/coming-from.md that are none of these


def cycle_steps(step):
    """Steps of the cycle in which ``step`` is, with ``cycle_len=1`` and ``cycle_mult=2``."""
    ends = ((1, 1), (2, 3), (4, 7))
    return next(length * BATCHES for length, end in ends if step < end * BATCHES)


OF_FASTAI_07 = {
    "wds per layer group": ({"wd": [WD, 3 * WD]}, lambda at: LR * (WD, 3 * WD)[at.layer]),
    "wds_sched_mult": (
        {"wd": lambda progress: WD * (1 - progress**2)},
        lambda at: LR * WD * (1 - (at.step / at.steps) ** 2),
    ),
    "norm_wds with cycles": (
        {"wd": Restarts(Normalized(WD), cycles=3, mult=2)},
        lambda at: LR * WD / math.sqrt(cycle_steps(at.step)),
    ),
}


@pytest.mark.parametrize(("arguments", "part"), OF_FASTAI_07.values(), ids=OF_FASTAI_07)
def test_a_row_of_the_fastai_07_table(arguments, part):  # P4
    own = [0.1, 0.1] if isinstance(arguments["wd"], list) else 0.1
    check("fastai", arguments, part, epochs=7, own=own)


@pytest.mark.parametrize(("momentum", "agree"), [(0.0, True), (0.9, False)])
def test_l2_agrees_for_sgd_without_momentum_only(momentum, agree):  # the sources' first claim
    nets = [model(), model()]
    for net, l2 in zip(nets, (WD, 0.0)):
        optimizer = torch.optim.SGD(net.parameters(), lr=LR, weight_decay=l2, momentum=momentum)
        if l2 == 0:
            DecoupledWD(optimizer, WD)
        for x, y in batches():
            optimizer.zero_grad()
            mse_loss(net(x), y).backward()
            optimizer.step()
    weights = [net[0].weight for net in nets]
    assert torch.allclose(*weights, rtol=1e-4, atol=1e-6) == agree
