"""The update formulas of the sources, written out by hand, agree with the three loops.

Each trains the same linear model on the same batches with SGD, where every formula fits in a line.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

LR, WD, BATCHES, EPOCHS = 0.1, 0.05, 8, 2
N = BATCHES * EPOCHS


def data():
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(3, generator=generator), torch.randn(1, generator=generator))
        for _ in range(2 * BATCHES)
    ]


def model():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def batches():
    for _ in range(EPOCHS):
        for i in range(0, 2 * BATCHES, 2):
            yield tuple(map(torch.stack, zip(*data()[i : i + 2])))


# The formulas


def fastai_2018(p, lr, wd, **_):
    """AdamW and Super-convergence is now the fastest way to train neural nets: the loop."""
    p.data.add_(p.data, alpha=-wd * lr)


def fastai_07_first(p, wd, **_):
    """fastai 0.7, ``use_wd_sched=True`` in its first form: ``wd * w``, whatever the lr."""
    p.data.sub_(wd * p.data)


def loshchilov_hutter(p, eta, wd, **_):
    """arXiv 1711.05101, Algorithm 2, line 12: the schedule multiplier times the coefficient."""
    p.data.sub_(eta * wd * p.data)


FORMULAS = [
    (fastai_2018, {"wd": WD}),
    (fastai_07_first, {"wd": WD, "scale_by": "none"}),
    (loshchilov_hutter, {"wd": WD, "scale_by": "lr_ratio", "max_lr": LR}),
]


def lr_at(step):
    """The learning rate of every loop here: linear from LR down to 0."""
    return LR * (1 - step / N)


def by_hand(formula):
    net = model()
    for step, (x, y) in enumerate(batches()):
        net.zero_grad()
        mse_loss(net(x), y).backward()
        for p in net.parameters():
            formula(p, lr=lr_at(step), wd=WD, eta=lr_at(step) / LR)
            p.data.sub_(lr_at(step) * p.grad)
    return net


def plain_loop(arguments):
    from wd_callbacks.torch import DecoupledWD

    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, weight_decay=0.37)
    DecoupledWD(optimizer, **arguments)
    for step, (x, y) in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = lr_at(step)
        optimizer.zero_grad()
        mse_loss(net(x), y).backward()
        optimizer.step()
    return net


def fastai_loop(arguments):
    from fastai.callback.schedule import ParamScheduler, SchedLin
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import SGD

    from wd_callbacks.fastai import DecoupledWD

    dls = DataLoaders.from_dsets(data(), data(), bs=2, shuffle=False, device="cpu")
    learn = Learner(
        dls, model(), loss_func=mse_loss, opt_func=SGD, lr=LR, wd_bn_bias=True, default_cbs=True
    )
    cbs = [ParamScheduler({"lr": SchedLin(LR, 0)}), DecoupledWD(**arguments)]
    # The loader drops nothing and shuffles nothing, so that its batches are those of `batches()`.
    learn.dls.train.shuffle = False
    with learn.no_bar(), learn.no_logging():
        learn.fit(EPOCHS, cbs=cbs)
    return learn.model


def lightning_loop(arguments):
    import pytorch_lightning as pl

    from wd_callbacks.lightning import DecoupledWD

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model()

        def training_step(self, batch, _):
            return mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=LR)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / N)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    module = Module()
    pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[DecoupledWD(**arguments)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, torch.utils.data.DataLoader(data(), batch_size=2))
    return module.net


@pytest.mark.parametrize("loop", [plain_loop, fastai_loop, lightning_loop])
@pytest.mark.parametrize(("formula", "arguments"), FORMULAS, ids=[f.__name__ for f, _ in FORMULAS])
@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")
def test_a_formula_of_the_sources(loop, formula, arguments):  # P4
    expected, ours = by_hand(formula), loop(arguments)
    for p, q in zip(expected.parameters(), ours.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    undecayed = by_hand(lambda p, **_: None)
    assert not torch.allclose(undecayed.weight, ours.weight, rtol=1e-3)


def test_norm_wds_is_the_coefficient_over_the_root_of_the_steps():  # fastai 0.7, paper's eq. 14
    expected = by_hand(lambda p, lr, **_: p.data.mul_(1 - lr * WD / math.sqrt(N)))
    ours = plain_loop({"wd": WD / math.sqrt(N)})
    torch.testing.assert_close(expected.weight, ours.weight)
