"""A test for each row of docs/fastai-0.7.md, against fastai 0.7's formula written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn

from wd_callbacks.fastai import DecoupledWD
from wd_callbacks.schedules import Normalized, Restarts

LR, WD, BATCHES, EPOCHS = 0.1, 0.05, 4, 7
N = BATCHES * EPOCHS


def data():
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(3, generator=generator), torch.randn(1, generator=generator))
        for _ in range(2 * BATCHES)
    ]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))


def layer_groups(net):
    return [list(net[0].parameters()), list(net[1].parameters())]


def fastai_07(amount):
    """Its training loop: after backward every weight loses ``amount(step, layer group)`` of it."""
    net, batches = model(), data()
    for step in range(N):
        i = 2 * (step % BATCHES)
        x, y = map(torch.stack, zip(*batches[i : i + 2]))
        net.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        for index, group in enumerate(layer_groups(net)):
            for p in group:
                p.data.sub_(amount(step, index) * p.data)
                p.data.sub_(LR * p.grad)
    return net


def today(decay):
    dls = DataLoaders.from_dsets(data(), data(), bs=2, device="cpu")
    dls.train.shuffle = False
    learn = Learner(
        dls,
        model(),
        nn.functional.mse_loss,
        opt_func=SGD,
        lr=LR,
        splitter=layer_groups,
        wd_bn_bias=True,
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(EPOCHS, cbs=decay)
    return learn.model


def mult(progress):
    """What ``wds_sched_mult`` was used for: less decay later."""
    return 1 - progress**2


def cycle_steps(step):
    """Steps of the cycle in which ``step`` is, with ``cycle_len=1`` and ``cycle_mult=2``."""
    return next(
        length * BATCHES for length, end in ((1, 1), (2, 3), (4, 7)) if step < end * BATCHES
    )


ROWS = {
    "use_wd_sched, later": (DecoupledWD(WD), lambda step, group: LR * WD),
    "use_wd_sched, first": (DecoupledWD(WD, scale_by="none"), lambda step, group: WD),
    "wds per layer group": (
        DecoupledWD([WD, 3 * WD]),
        lambda step, group: LR * (WD, 3 * WD)[group],
    ),
    "wds_sched_mult": (
        DecoupledWD(lambda progress: WD * mult(progress)),
        lambda step, group: LR * WD * mult(step / N),
    ),
    "norm_wds": (
        DecoupledWD(Normalized(WD)),
        lambda step, group: LR * WD / math.sqrt(N),
    ),
    "norm_wds with cycles": (
        DecoupledWD(Restarts(Normalized(WD), cycles=3, mult=2)),
        lambda step, group: LR * WD / math.sqrt(cycle_steps(step)),
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_table(row):
    decay, amount = ROWS[row]
    expected, ours = fastai_07(amount), today(decay)
    undecayed = fastai_07(lambda step, group: 0.0)
    for p, q, u in zip(expected.parameters(), ours.parameters(), undecayed.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(u, q, rtol=1e-3)


def test_without_use_wd_sched_it_is_l2():
    """Which the callback is not: with momentum the two part."""
    net, optimizer = model(), None
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, weight_decay=WD)
    for step in range(N):
        i = 2 * (step % BATCHES)
        x, y = map(torch.stack, zip(*data()[i : i + 2]))
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    ours = today(DecoupledWD(WD))
    torch.testing.assert_close(net[0].weight, ours[0].weight, rtol=1e-4, atol=1e-6)
