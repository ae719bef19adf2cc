"""A planned run is what a run then does."""

from __future__ import annotations

import math

import matplotlib as mpl
import pytest
import torch
from helpers import parameter

from wd_callbacks.plan import plan, plot_plan
from wd_callbacks.schedules import Cosine, Linear, Normalized, Timescale
from wd_callbacks.torch import DecoupledWD

mpl.use("Agg")


def lr(progress):
    return 0.1 * (1 - progress)


@pytest.mark.parametrize("scale_by", ["lr", "lr_ratio", "lr_squared", "none"])
def test_a_run_does_what_was_planned(scale_by):
    planned = plan(Cosine(0.2, 0), lr, 20, scale_by=scale_by)
    p = parameter(1, dtype=torch.float64)
    optimizer = torch.optim.SGD([p], lr=0.1)
    decay = DecoupledWD(
        optimizer, Cosine(0.2, 0), scale_by=scale_by, max_lr=0.1, total_steps=20, quantum=0
    )
    for step in range(20):
        optimizer.param_groups[0]["lr"] = lr(step / 20)
        optimizer.step()
        assert decay.coefficients[0] == planned.coefficients[step]
        assert p.item() == pytest.approx(planned.left[step], rel=1e-12)
    assert planned.lrs == [lr(i / 20) for i in range(20)]


def test_its_numbers_follow_closed_forms():
    constant = plan(0.5, 0.1, 10)
    assert constant.left[-1] == pytest.approx(0.95**10)
    assert plan(Normalized(0.3), 0.1, 9).coefficients == pytest.approx([0.1] * 9)
    peak = plan(Timescale(epochs=2), lr, 30, steps_per_epoch=10).shrinks[0]
    assert peak == pytest.approx(1 / 20)


WRONG = {
    "steps": ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
    "lr": ({"lr": lambda progress: None}, "lr is None, expected a number"),
    "wd": ({"wd": -0.1}, "wd must be finite and at least 0"),
    "a shrink": ({"wd": 20}, "param group 0: a step would shrink its weights by 2"),
    "a schedule": ({"wd": lambda progress: 0.5 - progress}, r"at progress 0\.75 is -0\.25"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_nonsense_is_refused(arguments, message):  # P10
    with pytest.raises((TypeError, ValueError), match=message):
        plan(**{"wd": 0.1, "lr": 0.1, "steps": 4, **arguments})


def test_the_picture_shows_every_series():
    figure = plot_plan(Linear(0.1, 0), lr, 50)
    planned = plan(Linear(0.1, 0), lr, 50)
    drawn = [ax.lines[0].get_ydata() for ax in figure.axes]
    assert list(drawn[0]) == planned.coefficients
    assert list(drawn[2]) == planned.shrinks
    assert drawn[3][0] == pytest.approx(1 / planned.shrinks[0])
    assert list(drawn[4]) == planned.left
    assert f"{planned.left[-1]:.1%}" in figure.get_suptitle()
    assert not math.isnan(drawn[3][0])
