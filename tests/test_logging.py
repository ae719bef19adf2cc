"""The coefficient of each step is logged where users look (P13)."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from fastai.callback.training import GradientAccumulation
from fastai_helpers import BS, learner
from lightning_helpers import adam, fit, loader, notes_logger, quiet_trainer, turns_class, two_adams
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

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
    "every fifth": (1, 5, [4, 9], 12),
    "accumulating": (3, 1, range(4), 4),
    "accumulating, every third": (2, 3, [2, 5], 6),
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


def of(cls, *parts, lr=0.01, names=()):
    """An optimizer with a param group for each of the modules, and names for these."""
    groups = [
        {"params": list(part.parameters()), "lr": lr * i, "weight_decay": 10 * lr * i}
        for i, part in enumerate(parts, start=1)
    ]
    for group, name in zip(groups, names):
        group["name"] = name
    return cls(groups)


def two(module, *schedulers):
    """Two optimizers, with ``schedulers``: the index of the optimizer and the name of each."""
    optimizers = [of(Adam, module.backbone), of(Adam, module.head, lr=0.05)]
    return optimizers, [
        {"scheduler": LambdaLR(optimizers[index], lambda step: 1.0), "name": name}
        for index, name in schedulers
    ]


NAMES = {  # optimizers of a module, and the names without ``wd-``
    "one group": (lambda m: of(SGD, m), {"SGD"}),
    "groups": (lambda m: of(SGD, m.backbone, m.middle, m.head), {"SGD/pg1", "SGD/pg2", "SGD/pg3"}),
    "a named group": (lambda m: of(SGD, m, names=["all"]), {"SGD/all"}),
    "named groups": (lambda m: of(SGD, m.backbone, m.head, names=["a", "b"]), {"SGD/a", "SGD/b"}),
    "two of a class": (two, {"Adam", "Adam-1"}),
    "the second has a scheduler": (lambda m: two(m, (1, None)), {"Adam", "Adam-1"}),
    "named schedulers": (lambda m: two(m, (0, "lr-mine"), (1, None)), {"mine", "Adam"}),
    "one has two": (lambda m: two(m, (0, None), (0, None), (1, None)), {"Adam", "Adam-2"}),
}


def check_names(package, make, names, *callbacks):
    """Checks that these are logged, with the values of LearningRateMonitor's names for lr."""
    logger, values = notes_logger(package), {}
    monitor = package.callbacks.LearningRateMonitor("step")
    settings = {"logger": logger, "log_every_n_steps": 1, "model": {"manual": True}}
    fit(package, make, LightningWD(), monitor, *callbacks, **settings)
    for metrics, _ in logger.notes:
        values |= metrics
    used = {name: value for name, value in values.items() if name.startswith("wd-")}
    assert used == pytest.approx({f"wd-{name}": 10 * values[f"lr-{name}"] for name in names})


@pytest.mark.parametrize(("make", "names"), NAMES.values(), ids=NAMES)
def test_lightning_names_are_those_of_learning_rate_monitor(package, make, names):
    check_names(package, make, names)


def test_lightning_names_groups_that_are_added(package):
    class Unfreeze(package.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                added = of(Adam, pl_module.head, lr=0.03).param_groups[0]
                trainer.optimizers[0].add_param_group(added)

    names = {"Adam", "Adam/pg1", "Adam/pg2"}
    check_names(package, lambda m: of(Adam, m.backbone), names, Unfreeze())


def test_lightning_logs_an_optimizer_that_seldom_steps(package):
    decay = LightningWD({0: Linear(1, 0), 1: Linear(1, 0)})
    logger = notes_logger(package)
    trainer = quiet_trainer(package, decay, max_epochs=1, logger=logger, log_every_n_steps=4)
    trainer.fit(turns_class(package, 1, 10)(two_adams, manual=True), loader(20))
    rows = [metrics for metrics, _ in logger.notes]
    used = [row["wd-Adam"] for row in rows if "wd-Adam" in row]
    assert used == pytest.approx([1 - i / 20 for i in range(3, 20, 4)])
    # It steps in the batches 9 and 19, the second time at the position of the first.
    seldom = [row["wd-Adam-1"] for row in rows if "wd-Adam-1" in row]
    assert seldom == pytest.approx([1, 1 - 10 / 20])
