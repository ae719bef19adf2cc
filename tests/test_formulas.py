"""The update formulas of the sources, written out by hand, in every adapter (P4)."""

from __future__ import annotations

import math

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


def by_hand(formula, epochs=EPOCHS, lr_at=lambda progress: 1.0):
    """The loop in which ``formula(p, layer, lr, step, steps)`` decays a weight before its step."""
    net, steps = model(), epochs * BATCHES
    for step, (x, y) in enumerate(batches(epochs)):
        net.zero_grad()
        mse_loss(net(x), y).backward()
        lr = LR * lr_at(step / steps)
        for layer, module in enumerate(net):
            for p in module.parameters():
                formula(p, layer, lr, step, steps)
                p.data.sub_(lr * p.grad)
    return net


def compare(expected, ours):
    undecayed = by_hand(lambda p, *_: None)
    for p, q, u in zip(expected.parameters(), ours.parameters(), undecayed.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(u, q, rtol=1e-3)


# The paper and the posts


def fastai_2018(p, layer, lr, step, steps):
    """AdamW and Super-convergence is now the fastest way to train neural nets: the loop."""
    p.data.add_(p.data, alpha=-WD * lr)


def fastai_07_first(p, layer, lr, step, steps):
    """fastai 0.7, ``use_wd_sched=True`` in its first form: ``wd * w``, whatever the lr."""
    p.data.sub_(WD * p.data)


def loshchilov_hutter(p, layer, lr, step, steps):
    """arXiv 1711.05101, Algorithm 2, line 12: the schedule multiplier times the coefficient."""
    p.data.sub_(lr / LR * WD * p.data)


def equation_14(p, layer, lr, step, steps):
    """arXiv 1711.05101: the coefficient over the root of the steps; fastai 0.7's ``norm_wds``."""
    p.data.mul_(1 - lr * WD / math.sqrt(steps))


FORMULAS = [
    (fastai_2018, {"wd": WD}),
    (fastai_07_first, {"wd": WD, "scale_by": "none"}),
    (loshchilov_hutter, {"wd": WD, "scale_by": "lr_ratio", "max_lr": LR}),
    (equation_14, {"wd": Normalized(WD)}),
]


@each_adapter
@pytest.mark.parametrize(("formula", "arguments"), FORMULAS, ids=[f.__name__ for f, _ in FORMULAS])
def test_a_formula_of_the_sources(adapter, formula, arguments):  # P4
    ours = model()
    run(adapter, arguments, ours, lr=LR, lr_at=lambda progress: 1 - progress)
    compare(by_hand(formula, lr_at=lambda progress: 1 - progress), ours)


# The rows of docs/coming-from.md that are none of these. There, weights lose a part after backward.


def mult(progress):
    """What ``wds_sched_mult`` was used for: less decay later."""
    return 1 - progress**2


def cycle_steps(step):
    """Steps of the cycle in which ``step`` is, with ``cycle_len=1`` and ``cycle_mult=2``."""
    ends = ((1, 1), (2, 3), (4, 7))
    return next(length * BATCHES for length, end in ends if step < end * BATCHES)


ROWS = {
    "wds per layer group": ({"wd": [WD, 3 * WD]}, lambda step, layer: LR * (WD, 3 * WD)[layer]),
    "wds_sched_mult": (
        {"wd": lambda progress: WD * mult(progress)},
        lambda step, layer: LR * WD * mult(step / (7 * BATCHES)),
    ),
    "norm_wds with cycles": (
        {"wd": Restarts(Normalized(WD), cycles=3, mult=2)},
        lambda step, layer: LR * WD / math.sqrt(cycle_steps(step)),
    ),
}


@pytest.mark.parametrize(("arguments", "part"), ROWS.values(), ids=ROWS)
def test_a_row_of_the_fastai_07_table(arguments, part):  # P4
    def formula(p, layer, lr, step, steps):
        p.data.sub_(part(step, layer) * p.data)

    ours = model()
    own = [0.1, 0.1] if isinstance(arguments["wd"], list) else 0.1
    run("fastai", arguments, ours, lr=LR, epochs=7, own=own)
    compare(by_hand(formula, epochs=7), ours)


@pytest.mark.parametrize(("momentum", "agree"), [(0.0, True), (0.9, False)])
def test_l2_agrees_for_sgd_without_momentum_only(momentum, agree):  # the sources' first claim
    nets = []
    for decoupled in (False, True):
        net = model()
        own = 0.0 if decoupled else WD
        optimizer = torch.optim.SGD(net.parameters(), lr=LR, weight_decay=own, momentum=momentum)
        if decoupled:
            DecoupledWD(optimizer, WD)
        for x, y in batches():
            optimizer.zero_grad()
            mse_loss(net(x), y).backward()
            optimizer.step()
        nets.append(net[0].weight)
    assert torch.allclose(*nets, rtol=1e-4, atol=1e-6) == agree
