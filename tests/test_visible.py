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
def test_lightning_logs_at_the_trainer_s_interval(tmp_path):  # P13
    from wd_callbacks.lightning import DecoupledWD

    rows, _ = lightning_fit(tmp_path, DecoupledWD(0.1), adam, log_every_n_steps=5)
    assert [int(row["step"]) for row in rows] == [4, 9]


@lightning_only
def test_lightning_names_are_those_of_learning_rate_monitor(tmp_path):  # P13
    import pytorch_lightning as pl
    from lightning_models import loader, model_class

    from wd_callbacks.lightning import DecoupledWD

    def groups(module):
        return torch.optim.Adam(
            [{"params": [p]} for p in module.backbone.parameters()]
            + [{"params": list(module.head.parameters())}],
            lr=0.01,
        )

    def names(make):
        logger = pl.loggers.CSVLogger(tmp_path, name=str(make.__name__))
        callbacks = [DecoupledWD(0.1), pl.callbacks.LearningRateMonitor("step")]
        trainer = pl.Trainer(
            accelerator="cpu",
            callbacks=callbacks,
            logger=logger,
            max_epochs=1,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model_class(pl)(make), loader(2))
        with open(f"{logger.log_dir}/metrics.csv") as file:
            columns = next(csv.reader(file))
        return [{c[3:] for c in columns if c.startswith(start)} for start in ("wd-", "lr-")]

    ours, theirs = names(groups)
    assert ours == theirs == {"Adam/pg1", "Adam/pg2", "Adam/pg3"}
    ours, theirs = names(adam)
    assert ours == theirs == {"Adam"}


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
