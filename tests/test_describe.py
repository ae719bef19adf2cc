"""The description of a decay, and the warnings of one without effect (P7)."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from adapters import each_adapter, run
from fastai.callback.schedule import SchedLin
from helpers import caught, one_weight, two_groups, zero_gradients
from lightning_helpers import adam, fit, loader
from torch import nn

from wd_callbacks.lightning import DecoupledWD as LightningWD
from wd_callbacks.schedules import Linear
from wd_callbacks.torch import DecoupledWD


def test_before_and_after_a_step():
    model, optimizer = two_groups()
    arguments = {"exclude": "bias", "model": model, "total_steps": 4, "steps_per_epoch": 2}
    decay = DecoupledWD(optimizer, [Linear(0.5, 0), 0.2], **arguments)
    first, second = decay.describe()
    assert (first.coefficient, first.due, first.applied) == (0.5, 0, 0)
    assert (first.decaying, second.decaying) == ((1, 9), (1, 6))
    assert (first.shrink, first.timescale) == pytest.approx((0.05, 20))
    assert decay.coefficients == []  # to describe is not to start
    optimizer.step()
    optimizer.step()
    first, _ = decay.describe()
    assert first.coefficient == 0.375
    assert (first.due, first.applied) == pytest.approx([1 - 0.95 * 0.9625] * 2)
    lines = [line.split() for line in str(decay.describe()).splitlines()]
    assert lines[0][0] == "group"
    assert {"0", "0.375", "lr"} <= set(lines[1])
    assert {"1", "0.2", "lr"} <= set(lines[2])


def test_what_is_deferred_and_what_only_the_device_knows():  # P8
    _, optimizer = two_groups(fused=True)
    decay = DecoupledWD(optimizer, 1e-6, quantum=1e-3)
    for _ in range(3):
        optimizer.step()
    row = decay.describe()[0]
    assert (row.due, row.applied) == (pytest.approx(3e-7), pytest.approx(0, abs=1e-12))
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert decay.describe()[0].applied is None
    assert "device" in str(decay.describe())


def test_max_lr_is_not_taken_before_training_starts():
    p, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 0.1, scale_by="lr_ratio")
    decay.describe()
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=9)
    optimizer.step()
    assert p[0].item() == pytest.approx(1 - 0.1 / 25)


def test_a_frozen_parameter_with_a_gradient_decays():  # P7, P2
    p, optimizer = one_weight(lr=0.1)
    decay = DecoupledWD(optimizer, 0.5)
    p.requires_grad_(False)
    optimizer.step()
    assert [row.reason for row in decay.describe(parameters=True)] == ["decays"]
    optimizer.zero_grad()
    assert [row.reason for row in decay.describe(parameters=True)] == ["frozen"]


def falling(progress, end=0):
    return 0.1 + (end - 0.1) * progress


NAMES = [
    (Linear(0.1, 0), "Linear(start=0.1, end=0)"),
    (SchedLin(0.1, 0), "sched_lin"),
    (falling, "falling"),
    (partial(falling, end=0.2), "falling"),
]


@pytest.mark.parametrize(("schedule", "text"), NAMES)
def test_a_schedule_goes_by_its_name(schedule, text):
    _, optimizer = one_weight(lr=1e-6)
    decay = DecoupledWD(optimizer, schedule, total_steps=4)
    optimizer.step()
    assert f"0.1 now, {text} " in str(decay.describe())
    assert "0% of 1e-05%" in str(decay.describe())  # deferred; and small numbers are no zeros


def test_a_group_that_is_added_has_a_row():
    _, optimizer = one_weight(lr=0.1)
    decay = DecoupledWD(optimizer, lambda progress: 0.5 * progress, total_steps=4)
    for _ in range(3):
        optimizer.step()
    (row,) = decay.describe()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 1))]})
    first, second = decay.describe()
    assert (first.coefficient, first.due) == (row.coefficient, row.due)
    assert row.due > 0
    assert (second.coefficient, second.due, second.decaying) == (0.25, 0, (1, 3))


@each_adapter
def test_every_adapter_describes_and_prints_once_when_verbose(adapter, capsys):
    model = nn.Linear(3, 1)
    decay = run(adapter, {"wd": 0.1, "exclude": "bias", "verbose": True}, model, lr=0.01)
    printed = [line for line in capsys.readouterr().out.splitlines() if "group" in line]
    assert len(printed) == 1
    (row,) = decay.describe()
    assert row.decaying == (1, 3)
    assert row.timescale == pytest.approx(1 / (0.1 * 0.01))
    cells = str(decay.describe()).splitlines()[1].split()
    assert {"1,000", "125"} <= set(cells) or {"1000", "125"} <= set(cells)  # steps and epochs


def test_verbose_prints_when_training_starts_also_in_a_resumed_run(capsys):  # P9
    def attached(**options):
        _, optimizer = one_weight()
        return optimizer, DecoupledWD(optimizer, Linear(0.1, 0.5), total_steps=10, **options)

    before, decay = attached()
    for _ in range(5):
        before.step()
    optimizer, resumed = attached(verbose=True)
    resumed.load_state_dict(decay.state_dict())
    assert capsys.readouterr().out == ""
    optimizer.step()
    optimizer.step()
    assert capsys.readouterr().out.count("0.26") == 1


def test_lightning_describes_the_fit_also_after_a_test_of_its_checkpoint(package, tmp_path):  # P13
    decay = LightningWD(Linear(0.6, 0))
    save = package.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    model = fit(package, adam, decay, save, enable_checkpointing=True)
    described, state = str(decay.describe()), decay.state_dict()
    model.trainer.test(model, loader(1), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert str(decay.describe()) == described
    assert decay.coefficients == {0: [pytest.approx(0.6 / 12)]}
    assert decay.state_dict() == state


# A decay without effect, or with an unwanted one


IDLE = {  # arguments, the optimizer's own weight decay, number of warnings
    "own of 0": ({"wd": None}, 0.0, 1),
    "all excluded": ({"wd": 0.1, "exclude": "*"}, 0.0, 1),
    "own, all excluded": ({"wd": None, "exclude": "*"}, 0.1, 1),
    "0": ({"wd": 0}, 0.1, 0),
    "0 for now": ({"wd": lambda progress: 0.0, "total_steps": 9}, 0.0, 0),
}


@pytest.mark.parametrize(("arguments", "own", "count"), IDLE.values(), ids=IDLE)
def test_a_decay_that_touches_nothing_warns_once(arguments, own, count):
    model, optimizer = two_groups(weight_decay=own)
    model.zero_grad()
    DecoupledWD(optimizer, **arguments, model=model)
    optimizer.step()  # no gradient: not a real step
    zero_gradients(model)
    _, messages = caught(lambda: [optimizer.step() for _ in range(2)])
    assert ["nothing decays" in message for message in messages] == [True] * count


def test_20_steps_without_any_gradient_warn_at_the_user_s_line():
    _, optimizer = one_weight()
    optimizer.zero_grad()
    DecoupledWD(optimizer, 0.1)
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        for _ in range(20):
            assert records == []
            optimizer.step()
    (record,) = records
    assert "gradient in 20 steps" in str(record.message)
    assert record.filename == __file__


@pytest.mark.parametrize(("own", "count"), [((0.1, 0), 0), ((0, 0), 1), ((0.1, 0.1), 0)], ids=str)
def test_vectors_in_a_group_of_their_own_are_asked_about_once(own, count):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    matrices, vectors = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": it, "weight_decay": wd} for it, wd in zip((matrices, vectors), own)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    zero_gradients(model)
    decay, first = caught(lambda: DecoupledWD(optimizer, 0.1, model=model))
    _, later = caught(lambda: [optimizer.step() for _ in range(3)])
    assert ["exclude='vector'" in message for message in first + later] == [True] * count
    no_decay = [row.not_decaying.tensors for row in decay.describe()]
    assert no_decay == ([0, 3] if own == (0.1, 0) else [0, 0])
