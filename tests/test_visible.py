"""What a user sees: the description, the warning of a decay without effect, and the logs."""

from __future__ import annotations

import csv

import matplotlib as mpl
import pytest
import torch
from torch import nn

from wd_callbacks.schedules import Linear
from wd_callbacks.torch import DecoupledWD

mpl.use("Agg")


def two_groups(**options):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    groups = [{"params": list(layer.parameters())} for layer in model]
    return model, torch.optim.SGD(groups, lr=0.1, **options)


def test_describe_before_and_after_a_step():  # P7
    model, optimizer = two_groups()
    decay = DecoupledWD(
        optimizer,
        [Linear(0.5, 0), 0.2],
        exclude="bias",
        model=model,
        total_steps=4,
        steps_per_epoch=2,
    )
    first, second = decay.describe()
    assert (first.group, first.coefficient, first.scale) == ("0", 0.5, "lr")
    assert (first.decaying, first.spared) == ((1, 9), (1, 3))
    assert (second.decaying, second.spared) == ((1, 6), (1, 2))
    assert first.timescale == pytest.approx(1 / (0.1 * 0.5))
    assert (first.due, first.applied) == (0, 0)
    assert decay.coefficients == []  # to describe is not to start
    optimizer.step()
    optimizer.step()
    first, second = decay.describe()
    assert first.coefficient == 0.375
    assert first.due == pytest.approx(1 - 0.95 * 0.9625)
    assert first.applied == pytest.approx(first.due)
    lines = str(decay.describe()).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[:3] == ["group", "wd", "scale_by"]
    assert lines[1].split()[:5] == ["0", "0.375", "lr", "0.1", "1"]
    assert "26.67   13.33" in lines[1]  # steps and epochs


def test_describe_tells_what_is_owed():  # P7, P8
    _, optimizer = two_groups()
    decay = DecoupledWD(optimizer, 1e-6, quantum=1e-3)
    for _ in range(3):
        optimizer.step()
    row = decay.describe()[0]
    assert row.due == pytest.approx(3e-7)
    assert row.applied == pytest.approx(0, abs=1e-12)


def test_describe_says_what_only_the_device_knows():  # P8
    _, optimizer = two_groups(fused=True)
    decay = DecoupledWD(optimizer, 0.1)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert decay.describe()[0].applied is None
    assert "on the device" in str(decay.describe())


def test_describe_does_not_take_lr_max_before_training_starts():  # P7
    _, optimizer = two_groups()
    decay = DecoupledWD(optimizer, 0.1, scale_by="lr_ratio")
    assert decay.describe()[0].lr_max == 0.1
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=9)
    optimizer.step()
    assert decay.describe()[0].lr_max == 1.0


def test_verbose_shows_it_once_when_training_starts(capsys):  # P7
    _, optimizer = two_groups()
    DecoupledWD(optimizer, 0.1, verbose=True)
    assert capsys.readouterr().out == ""
    optimizer.step()
    optimizer.step()
    assert capsys.readouterr().out.count("scale_by") == 1


@pytest.mark.parametrize(
    ("arguments", "own"),
    [({"wd": None}, 0.0), ({"wd": 0.1, "exclude": "*"}, 0.0), ({"wd": None, "exclude": "*"}, 0.1)],
)
def test_a_decay_that_touches_nothing_warns_once(arguments, own):  # P7
    model, optimizer = two_groups(weight_decay=own)
    model.zero_grad()
    DecoupledWD(optimizer, **arguments, model=model)
    optimizer.step()  # no gradient: not a real step
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match="nothing decays: ") as said:
        optimizer.step()
        optimizer.step()
    assert len(said) == 1


def test_a_schedule_that_starts_at_zero_is_silent(recwarn):  # P7
    _, optimizer = two_groups()
    DecoupledWD(optimizer, Linear(0, 0.1), total_steps=3)
    optimizer.step()
    assert not recwarn.list


# fastai


def learner(**options):
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    data = [(torch.randn(2), torch.randn(1)) for _ in range(16)]
    dls = DataLoaders.from_dsets(data, data, bs=2, shuffle=False, device="cpu")
    return Learner(dls, nn.Linear(2, 1), nn.functional.mse_loss, **options)


def fit(learn, method="fit", epochs=2, **arguments):
    with learn.no_bar(), learn.no_logging():
        getattr(learn, method)(epochs, **arguments)


def test_the_recorder_has_wd_also_after_a_plain_fit():  # P13
    from wd_callbacks.fastai import DecoupledWD

    learn = learner()
    fit(learn, "fit_one_cycle", cbs=DecoupledWD(Linear(0.2, 0)))
    assert set(learn.recorder.hps) == {"lr", "mom", "wd"}
    assert learn.recorder.hps["wd"] == pytest.approx([0.2 * (1 - i / 16) for i in range(16)])
    assert len(learn.recorder.hps["lr"]) == 16
    fit(learn, cbs=DecoupledWD(0.3))  # nothing of the fit before
    assert learn.recorder.hps == {"wd": [0.3] * 16}


def test_the_recorder_has_one_value_per_batch_with_accumulation():  # P13
    from fastai.callback.training import GradientAccumulation

    from wd_callbacks.fastai import DecoupledWD

    learn = learner()
    cbs = [DecoupledWD(Linear(0.8, 0)), GradientAccumulation(6)]  # three batches to a step
    fit(learn, "fit_one_cycle", cbs=cbs)
    expected = [0.8 * (1 - 3 * (i // 3) / 16) for i in range(15)]
    assert learn.recorder.hps["wd"] == pytest.approx([*expected, expected[-1]])


def test_plot_sched_draws_it():  # P13
    import matplotlib.pyplot as plt

    from wd_callbacks.fastai import DecoupledWD

    learn = learner()
    fit(learn, "fit_one_cycle", cbs=DecoupledWD(0.1))
    learn.recorder.plot_sched()
    assert [ax.get_ylabel() for ax in plt.gcf().axes[:3]] == ["lr", "mom", "wd"]
    plt.close("all")
    fit(learn, cbs=DecoupledWD(0.1))
    learn.recorder.plot_sched()
    assert [ax.get_ylabel() for ax in plt.gcf().axes] == ["wd"]
    plt.close("all")


def test_fastai_describes_and_is_verbose(capsys):  # P7
    from wd_callbacks.fastai import DecoupledWD

    decay = DecoupledWD(0.1, exclude="bias", verbose=True)
    with pytest.raises(ValueError, match="nothing to describe before a fit has started"):
        decay.describe()
    learn = learner()
    fit(learn, "fit_one_cycle", lr_max=0.01, cbs=decay)
    assert capsys.readouterr().out.count("scale_by") == 1
    row = decay.describe()[0]
    assert (row.decaying, row.spared) == ((1, 2), (1, 1))
    assert row.lr_max == pytest.approx(0.01)
    assert row.steps_per_epoch == 8


# Lightning


def logged(logger):
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return [row for row in csv.DictReader(file) if any(k.startswith("wd-") for k in row)]


def lightning_fit(tmp_path, decay, make, manual=False, **settings):
    import pytorch_lightning as pl
    from lightning_models import loader, model_class

    loggers = [pl.loggers.CSVLogger(tmp_path, name=name) for name in ("one", "two")]
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[decay],
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"log_every_n_steps": 1, "max_epochs": 2, **settings},
    )
    trainer.fit(model_class(pl)(make, manual=manual), loader(6))
    return [logged(logger) for logger in loggers]


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=0.01)


lightning_only = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")


@lightning_only
@pytest.mark.parametrize(("settings", "steps"), [({}, 12), ({"accumulate_grad_batches": 3}, 4)])
def test_lightning_logs_what_each_step_used(tmp_path, settings, steps):  # P13
    from wd_callbacks.lightning import DecoupledWD

    rows, others = lightning_fit(tmp_path, DecoupledWD(Linear(0.6, 0)), adam, **settings)
    assert rows == others
    assert [int(row["step"]) for row in rows] == list(range(steps))
    used = [float(row["wd-Adam"]) for row in rows]
    assert used == pytest.approx([0.6 * (1 - i / steps) for i in range(steps)])


@lightning_only
@pytest.mark.parametrize("every", [1, 2, 3])
def test_lightning_logs_windows_of_accumulation_once(tmp_path, every):  # P13
    from wd_callbacks.lightning import DecoupledWD

    settings = {"accumulate_grad_batches": 2, "log_every_n_steps": every}
    rows, _ = lightning_fit(tmp_path, DecoupledWD(Linear(0.6, 0)), adam, **settings)
    steps = list(range(every - 1, 6, every))
    assert [int(row["step"]) for row in rows] == steps
    used = [float(row["wd-Adam"]) for row in rows]
    assert used == pytest.approx([0.6 * (1 - step / 6) for step in steps])


@lightning_only
def test_lightning_logs_at_the_trainer_s_interval(tmp_path):  # P13
    from wd_callbacks.lightning import DecoupledWD

    rows, _ = lightning_fit(tmp_path, DecoupledWD(0.1), adam, log_every_n_steps=5)
    assert [int(row["step"]) for row in rows] == [4, 9]


# Everywhere the weight decay is ten times the learning rate, by which the names are told apart.


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


@lightning_only
@pytest.mark.parametrize(("make", "expected"), NAMES.values(), ids=NAMES)
def test_lightning_names_are_those_of_learning_rate_monitor(make, expected):  # P13
    assert names_logged(make) == expected


@lightning_only
def test_lightning_names_an_optimizer_of_two_schedulers_by_the_first():  # P13
    def make(module):
        optimizers = two_adams(module)
        return optimizers, [constant(optimizers[0]) for _ in range(2)] + [constant(optimizers[1])]

    assert names_logged(make, twins={"Adam-1"}) == {"Adam", "Adam-2"}


@lightning_only
def test_lightning_names_groups_that_are_added():  # P13
    import pytorch_lightning as pl

    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                added = of(torch.optim.Adam, pl_module.head, lr=0.03).param_groups[0]
                trainer.optimizers[0].add_param_group(added)

    names = names_logged(lambda m: of(torch.optim.Adam, m.backbone), Unfreeze())
    assert names == {"Adam", "Adam/pg1", "Adam/pg2"}


def names_logged(make, *callbacks, twins=()):
    """The names without ``wd-`` and ``lr-``: they are to be the same, and tell the same groups.

    Those of ``twins`` tell again of what another name tells.
    """
    import pytorch_lightning as pl
    from lightning_models import fit

    from wd_callbacks.lightning import DecoupledWD

    values = {"wd": {}, "lr": {}}

    class Log(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            for name, value in metrics.items():
                values[name[:2]][name[3:]] = value

    monitor = pl.callbacks.LearningRateMonitor("step")
    settings = {"logger": Log(), "log_every_n_steps": 1, "model": {"manual": True}}
    fit(pl, make, DecoupledWD(), monitor, *callbacks, **settings)
    expected = {name: 10 * lr for name, lr in values["lr"].items() if name not in twins}
    assert values["wd"] == pytest.approx(expected)
    return set(values["wd"])


@lightning_only
def test_lightning_logs_an_optimizer_that_seldom_steps():  # P13
    import pytorch_lightning as pl
    from lightning_models import loader, model_class, quiet_trainer

    from wd_callbacks.lightning import DecoupledWD

    class Turns(model_class(pl)):
        def training_step(self, batch, batch_idx):
            for optimizer, every in zip(self.optimizers(), (1, 5)):
                if batch_idx % every == 0:
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch_idx))
                    optimizer.step()

    rows = []

    class Log(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            rows.append(metrics)

    decay = DecoupledWD({0: Linear(1, 0), 1: Linear(1, 0)})
    trainer = quiet_trainer(pl, decay, max_epochs=1, logger=Log(), log_every_n_steps=4)
    trainer.fit(Turns(two_adams, manual=True), loader(20))
    assert [row["wd-Adam"] for row in rows] == pytest.approx([1 - i / 20 for i in range(3, 20, 4)])
    # It steps in the batches 0, 5, 10 and 15, each time at the position of the time before.
    seldom = [row["wd-Adam-1"] for row in rows if "wd-Adam-1" in row]
    assert seldom == pytest.approx([1, 1 - 1 / 20, 1 - 6 / 20, 1 - 11 / 20])


@lightning_only
def test_lightning_describes_and_is_verbose(tmp_path, capsys):  # P7
    from wd_callbacks.lightning import DecoupledWD

    decay = DecoupledWD(0.1, exclude="bias", verbose=True)
    with pytest.raises(ValueError, match="nothing to describe before training has started"):
        decay.describe()
    lightning_fit(tmp_path, decay, adam)
    assert capsys.readouterr().out.count("scale_by") == 1
    (row,) = decay.describe()
    assert row.decaying[0] == row.spared[0] == 2
    assert row.steps_per_epoch == 6


@lightning_only
def test_lightning_describes_the_fit_also_after_a_test_of_its_checkpoint(tmp_path):  # P7, P13
    import pytorch_lightning as pl
    from lightning_models import fit, loader

    from wd_callbacks.lightning import DecoupledWD

    decay = DecoupledWD(Linear(0.6, 0))
    save = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    model = fit(pl, adam, decay, save, enable_checkpointing=True)
    described, state = decay.describe(), decay.state_dict()
    model.test_step = lambda batch, batch_idx: None
    model.trainer.test(model, loader(1), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert decay.describe() == described
    assert decay.coefficients == {0: [pytest.approx(0.6 / 12)]}
    assert decay.state_dict() == state
