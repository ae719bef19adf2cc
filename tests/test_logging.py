"""The coefficient of each step is logged where users look (P13)."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from fastai.callback.training import GradientAccumulation
from fastai_helpers import BS, learner
from lightning_helpers import (
    adam,
    fit,
    loader,
    notes_logger,
    quiet_trainer,
    turns_class,
)

from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.lightning import DecoupledWD as LightningWD
from wd_callbacks.schedules import Linear

mpl.use("Agg")

# fastai


def test_the_recorder_has_wd_also_after_a_plain_fit():
    learn = learner()
    learn.fit_one_cycle(2, cbs=FastaiWD(Linear(0.2, 0)))
    assert set(learn.recorder.hps) == {"lr", "mom", "wd"}
    assert learn.recorder.hps["wd"] == pytest.approx([0.2 * (1 - i / 16) for i in range(16)])
    assert len(learn.recorder.hps["lr"]) == 16
    learn.fit(2, cbs=FastaiWD(0.3))  # nothing of the fit before
    assert learn.recorder.hps == {"wd": [0.3] * 16}


def test_the_recorder_has_one_value_per_batch_with_accumulation():
    learn = learner()
    learn.fit_one_cycle(2, cbs=[FastaiWD(Linear(0.8, 0)), GradientAccumulation(3 * BS)])
    expected = [0.8 * (1 - 3 * (i // 3) / 16) for i in range(15)]
    assert learn.recorder.hps["wd"] == pytest.approx([*expected, expected[-1]])


def test_plot_sched_draws_it():
    learn = learner()
    for method, labels in (("fit_one_cycle", ["lr", "mom", "wd"]), ("fit", ["wd"])):
        getattr(learn, method)(1, cbs=FastaiWD(0.1))
        learn.recorder.plot_sched()
        assert [ax.get_ylabel() for ax in plt.gcf().axes[: len(labels)]] == labels
        plt.close("all")


# Lightning


LOGGED = {  # batches per step, steps per note, the steps noted, all steps
    "every step": (1, 1, range(12), 12),
    "every fifth": (1, 5, [4, 9], 12),
    "accumulating": (3, 1, range(4), 4),
    "accumulating, every second": (2, 2, range(1, 6, 2), 6),
    "accumulating, every third": (2, 3, range(2, 6, 3), 6),
}


@pytest.mark.parametrize(("window", "interval", "steps", "total"), LOGGED.values(), ids=LOGGED)
def test_every_logger_has_what_each_step_used(package, window, interval, steps, total):
    loggers = [notes_logger(package) for _ in range(2)]
    settings = {"accumulate_grad_batches": window, "log_every_n_steps": interval}
    fit(package, adam, LightningWD(Linear(0.6, 0)), logger=loggers, **settings)
    notes, others = ([it for it in logger.notes if "wd-Adam" in it[0]] for logger in loggers)
    assert notes == others
    assert [step for _, step in notes] == list(steps)
    used = [metrics["wd-Adam"] for metrics, _ in notes]
    assert used == pytest.approx([0.6 * (1 - step / total) for step in steps])


# The weight decay is ten times the learning rate: a name's value shows which group it means.


def of(cls, *parts, lr=0.01, **options):
    """An optimizer with a param group for each of the modules."""
    groups = [
        {"params": list(part.parameters()), "lr": lr * i, "weight_decay": 10 * lr * i, **options}
        for i, part in enumerate(parts, start=1)
    ]
    return cls(groups)


def constant(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def two_adams(module):
    return [of(torch.optim.Adam, module.backbone), of(torch.optim.Adam, module.head, lr=0.05)]


def second_has_a_scheduler(module):
    first, second = two_adams(module)
    return [first, second], [constant(second)]


def named_schedulers(module):
    first, second = two_adams(module)
    configs = [
        {"scheduler": constant(it), "name": n} for it, n in ((first, "lr-mine"), (second, None))
    ]
    return [first, second], configs


def named_groups(module):
    optimizer = of(torch.optim.SGD, module.backbone, module.head)
    for group, name in zip(optimizer.param_groups, ("body", "head")):
        group["name"] = name
    return optimizer


NAMES = {
    "one group": (lambda m: of(torch.optim.Adam, m), {"Adam"}),
    "groups": (
        lambda m: of(torch.optim.SGD, m.backbone, m.middle, m.head),
        {"SGD/pg1", "SGD/pg2", "SGD/pg3"},
    ),
    "a named group": (lambda m: of(torch.optim.SGD, m, name="all"), {"SGD/all"}),
    "named groups": (named_groups, {"SGD/body", "SGD/head"}),
    "two of a class": (two_adams, {"Adam", "Adam-1"}),
    "the second has a scheduler": (second_has_a_scheduler, {"Adam", "Adam-1"}),
    "named schedulers": (named_schedulers, {"mine", "Adam"}),
}


def names_logged(package, make, *callbacks, repeated=()):
    """The names without ``wd-`` and ``lr-``: both have the same, for the same groups.

    Those of ``repeated`` repeat the value of another name.
    """
    values = {"wd": {}, "lr": {}}
    logger = notes_logger(package)
    monitor = package.callbacks.LearningRateMonitor("step")
    settings = {"logger": logger, "log_every_n_steps": 1, "model": {"manual": True}}
    fit(package, make, LightningWD(), monitor, *callbacks, **settings)
    for metrics, _ in logger.notes:
        for name, value in metrics.items():
            values[name[:2]][name[3:]] = value
    expected = {name: 10 * lr for name, lr in values["lr"].items() if name not in repeated}
    assert values["wd"] == pytest.approx(expected)
    return set(values["wd"])


@pytest.mark.parametrize(("make", "expected"), NAMES.values(), ids=NAMES)
def test_lightning_names_are_those_of_learning_rate_monitor(package, make, expected):
    assert names_logged(package, make) == expected


def test_lightning_names_an_optimizer_of_two_schedulers_by_the_first(package):
    def make(module):
        optimizers = two_adams(module)
        return optimizers, [constant(optimizers[i]) for i in (0, 0, 1)]

    assert names_logged(package, make, repeated={"Adam-1"}) == {"Adam", "Adam-2"}


def test_lightning_names_groups_that_are_added(package):
    class Unfreeze(package.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                added = of(torch.optim.Adam, pl_module.head, lr=0.03).param_groups[0]
                trainer.optimizers[0].add_param_group(added)

    names = names_logged(package, lambda m: of(torch.optim.Adam, m.backbone), Unfreeze())
    assert names == {"Adam", "Adam/pg1", "Adam/pg2"}


def test_lightning_logs_an_optimizer_that_seldom_steps(package):
    decay = LightningWD({0: Linear(1, 0), 1: Linear(1, 0)})
    logger = notes_logger(package)
    trainer = quiet_trainer(package, decay, max_epochs=1, logger=logger, log_every_n_steps=4)
    trainer.fit(turns_class(package, 1, 5)(two_adams, manual=True), loader(20))
    rows = [metrics for metrics, _ in logger.notes]
    used = [row["wd-Adam"] for row in rows if "wd-Adam" in row]
    assert used == pytest.approx([1 - i / 20 for i in range(3, 20, 4)])
    # It steps in the batches 4, 9, 14 and 19, each time at the position of the time before.
    seldom = [row["wd-Adam-1"] for row in rows if "wd-Adam-1" in row]
    assert seldom == pytest.approx([1, 1 - 5 / 20, 1 - 10 / 20, 1 - 15 / 20])
