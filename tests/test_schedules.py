"""Every schedule against its closed form, alone and in real runs; invalid ones by hypothesis.

More of them, at random: ``HYPOTHESIS_PROFILE=deep pytest -n 0 tests/test_schedules.py -k fuzz``.
"""

from __future__ import annotations

import math

import pytest
import torch
from adapters import BATCHES, each_adapter, run
from fastai.callback.training import GradientAccumulation
from fastai_helpers import Trace, learner
from helpers import fuzz, parameter, pickled, weights
from hypothesis import example, given
from hypothesis import strategies as st
from lightning_helpers import LR, adam, fit
from torch import nn

from wd_callbacks import schedules
from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.lightning import DecoupledWD as LightningWD
from wd_callbacks.schedules import (
    Cosine,
    Exponential,
    Join,
    Linear,
    Normalized,
    Polynomial,
    Restarts,
    Steps,
    Timescale,
)
from wd_callbacks.torch import DecoupledWD

TENT = Join([(0.5, Linear(0, 1)), (0.5, Linear(1, 0))])
CLOSED_FORMS = {
    Linear(0.04, 0.4): lambda p: 0.04 + 0.36 * p,
    Cosine(0.04, 0.4): lambda p: 0.4 - 0.18 * (1 + math.cos(math.pi * p)),
    Exponential(1e-4, 1e-2): lambda p: 10 ** (-4 + 2 * p),
    Polynomial(1, 0.2, 3): lambda p: 1 - 0.8 * p**3,
    Steps({0.0: 0.1, 0.25: 0.2, 0.5: 0}): lambda p: 0.1 if p < 0.25 else 0.2 if p < 0.5 else 0.0,
    Join([(0.25, Linear(0, 1)), (0.75, Linear(1, 0))]): lambda p: min(4 * p, (1 - p) / 0.75),
    Restarts(Linear(1, 0), 4): lambda p: 1 - (4 * p) % 1 if p < 1 else 0.0,
    Restarts(Linear(1, 0), 2, mult=3): lambda p: 1 - 4 * p if p < 0.25 else (1 - p) / 0.75,
    Restarts(TENT, 2): lambda p: 1 - abs(1 - (4 * p) % 2),
}


def used(wd, steps, **arguments):
    """The coefficients of the steps of a plain loop."""
    optimizer = torch.optim.SGD([parameter()], lr=0.1)
    decay = DecoupledWD(optimizer, wd, total_steps=steps, **arguments)
    coefficients = []
    for _ in range(steps):
        optimizer.step()
        coefficients += decay.coefficients
    return coefficients


@pytest.mark.parametrize("schedule", CLOSED_FORMS, ids=repr)
def test_a_schedule_follows_its_closed_form_also_in_a_loop(schedule):  # P6
    expected = CLOSED_FORMS[schedule]
    for point in (0.0, 1e-9, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.999, 1.0):
        assert schedule(point) == pytest.approx(expected(point), rel=1e-9, abs=1e-8)
    assert schedule(-1) == schedule(0)  # clamped at both ends
    assert schedule(7) == schedule(1)
    values = [expected(i / 12) for i in range(12)]
    assert used(schedule, 12) == pytest.approx(values, abs=1e-8)


RESOLVED = [Normalized(0.05), Timescale(epochs=3), Timescale(steps=100)]


@pytest.mark.parametrize("schedule", [*CLOSED_FORMS, *RESOLVED], ids=repr)
def test_schedules_are_frozen_and_print_compare_and_pickle(schedule):
    for each in (schedule, Restarts(schedule, 3, mult=2)):
        assert eval(repr(each), vars(schedules)) == pickled(each) == each
        assert hash(pickled(each)) == hash(each)
        assert each != Linear(0.123, 0.456)
        with pytest.raises(AttributeError):
            each.start = 0


def test_the_ends_are_exact():
    for schedule in (Linear(0.1, 0.3), Cosine(0.1, 0.3), Exponential(0.1, 0.3)):
        assert (schedule(0), schedule(1)) == (0.1, 0.3)
        assert Restarts(schedule, 7)(1) == Join([(0.1, schedule)] * 10)(1) == 0.3
    assert Polynomial(0.1, 0.3, 2)(1) == 0.3


def test_ten_tenths_join_and_each_piece_starts_at_its_own_start():
    schedule = Join([(0.1, Linear(i, i + 0.5)) for i in range(10)])
    for i in range(10):
        assert schedule(i / 10) == pytest.approx(i, abs=1e-6)
        assert schedule((i + 1) / 10 - 1e-6) == pytest.approx(i + 0.5, abs=1e-4)


# Random arguments


def attempt(cls, *arguments):
    """The schedule, or None if it is refused."""
    try:
        return cls(*arguments)
    except (TypeError, ValueError):
        return None


def joined(parts):
    total = sum(length for length, _ in parts)
    return attempt(Join, [(length / total, schedule) for length, schedule in parts])


def compounds(inner):
    parts = st.lists(st.tuples(st.integers(1, 9), inner), min_size=1, max_size=4)
    cycles, mults = st.integers(0, 60), st.floats(0.25, 4) | numbers
    restarts = st.builds(attempt, st.just(Restarts), inner, cycles, mults)
    return st.builds(joined, parts) | restarts


LARGEST = 1.7976931348623157e308
ODD = st.sampled_from([None, "0.1", True, 10**400, math.nan, math.inf, -1, 0, 1e308, 5e-324])
numbers = st.floats(0, 2) | st.floats(0, LARGEST) | ODD
step_values = st.dictionaries(st.just(0.0) | st.floats(0, 1), numbers, max_size=4)
leaves = (
    st.builds(attempt, st.sampled_from([Linear, Cosine, Exponential]), numbers, numbers)
    | st.builds(attempt, st.just(Polynomial), numbers, numbers, numbers)
    | st.builds(attempt, st.just(Steps), step_values)
).filter(bool)


def bounds(schedule):
    """The values between which a schedule stays."""
    if isinstance(schedule, Join):
        return [bound for _, piece in schedule.pieces for bound in bounds(piece)]
    if isinstance(schedule, Restarts):
        return bounds(schedule.schedule)
    if isinstance(schedule, Steps):
        return list(schedule.values.values())
    return [schedule.start, schedule.end]


@given(st.recursive(leaves, compounds, max_leaves=5), st.lists(st.floats(0, 1), max_size=4))
@example(attempt(Exponential, LARGEST, LARGEST), [0.3])
@example(attempt(Restarts, Linear(0, 1), 3, 1e300), [])
@example(attempt(Restarts, Linear(0, 1), 3, 1e-300), [])
@fuzz
def test_fuzz_schedules(schedule, points):  # P10
    """A schedule is refused when it is built, or right wherever it is called."""
    if schedule is None:
        return
    low, high = min(bounds(schedule)), max(bounds(schedule))
    copies = pickled(schedule), eval(repr(schedule), vars(schedules))
    assert all(each == schedule for each in copies)
    for progress in (0, 0.25, 1 / 3, 0.5, 1 - 1e-10, 1, *points):
        value = schedule(progress)
        assert math.isfinite(value)
        assert low * (1 - 1e-12) - 1e-323 <= value <= high * (1 + 1e-12) + 1e-323
        assert all(each(progress) == value for each in copies)
    for outside, end in ((-0.5, 0), (-math.inf, 0), (1.5, 1), (math.inf, 1)):
        assert schedule(outside) == schedule(end)


# Schedules that depend on the run

PAUSE = (0.5, Steps({0: 0}))
NORMALIZED = {
    Normalized(0.5): [0.1] * 25,
    Restarts(Normalized(0.6), 2, mult=3): [0.6 / 2] * 4 + [0.6 / math.sqrt(12)] * 12,
    Join([PAUSE, (0.5, Normalized(0.4))]): [0] * 8 + [0.1] * 8,
    Join([PAUSE, (0.5, Restarts(Normalized(0.4), 2))]): [0] * 8 + [0.2] * 8,
    Join([PAUSE, (0.5, Join([PAUSE, (0.5, Restarts(Normalized(0.4), 2))]))]): [0] * 24 + [0.2] * 8,
}


@pytest.mark.parametrize("schedule", NORMALIZED, ids=repr)
def test_normalized_divides_by_the_root_of_the_steps(schedule):
    expected = NORMALIZED[schedule]
    assert used(schedule, len(expected)) == pytest.approx(expected)


@pytest.mark.parametrize("scale_by", ["lr", "lr_ratio", "lr_squared", "none"])
def test_timescale_shrinks_by_one_over_the_steps_at_each_groups_peak(scale_by):
    first, second = (parameter(2, 2, dtype=torch.float64) for _ in range(2))
    groups = [{"params": first, "lr": 0.2}, {"params": second, "lr": 0.1, "max_lr": 0.4}]
    optimizer = torch.optim.SGD(groups)
    DecoupledWD(optimizer, Timescale(epochs=8), scale_by=scale_by, steps_per_epoch=5)
    optimizer.step()
    optimizer.param_groups[1]["lr"] = 0.4
    before = weights(optimizer)
    optimizer.step()
    shrinks = [1 - (p / old).mean().item() for p, old in zip((first, second), before)]
    assert shrinks == pytest.approx([1 / 40] * 2)


@each_adapter
def test_every_adapter_counts_the_steps_of_a_run(adapter):  # P6
    for wd, expected in [
        (Normalized(0.6), 0.6 / math.sqrt(3 * BATCHES)),
        (Timescale(epochs=2), 1 / (2 * BATCHES * 0.01)),
        (Timescale(steps=50), 1 / (50 * 0.01)),
    ]:
        coefficients = run(adapter, {"wd": wd}, nn.Linear(3, 1), lr=0.01, epochs=3).coefficients
        found = coefficients[0] if adapter == "lightning" else coefficients
        assert found == [pytest.approx(expected)]


def test_fastai_counts_the_steps_with_accumulation():  # P6
    per_epoch = 8 / 3  # of 8 batches
    for wd, expected in [
        (Normalized(0.6), 0.6 / math.sqrt(6 * per_epoch)),
        (Timescale(epochs=2), 1 / (2 * per_epoch * 1e-2)),
    ]:
        trace = Trace(decay := FastaiWD(wd))
        learner().fit_one_cycle(6, 1e-2, cbs=[decay, trace, GradientAccumulation(5 * 3)])
        assert trace.coefficients == [[pytest.approx(expected)]] * int(6 * per_epoch)


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 4}, {"max_steps": 5}], ids=str)
def test_lightning_counts_the_steps_of_a_run(package, settings):  # P6
    per_epoch = math.ceil(6 / settings.get("accumulate_grad_batches", 1))
    steps = settings.get("max_steps", 2 * per_epoch)
    for wd, expected in [
        (Normalized(0.6), 0.6 / math.sqrt(steps)),
        (Timescale(epochs=2), 1 / (2 * per_epoch * LR)),
    ]:
        decay = LightningWD(wd)
        assert fit(package, adam, decay, **settings).trainer.global_step == steps
        assert decay.coefficients[0] == [pytest.approx(expected)]


def test_lightning_does_not_guess_the_steps_of_manual_optimization(package):  # P10
    def coefficient(wd, **settings):
        fit(package, adam, decay := LightningWD(wd), model={"manual": True}, **settings)
        return decay.coefficients[0]

    for wd in (Normalized(0.6), Timescale(epochs=2)):
        with pytest.raises(ValueError, match="number of steps"):
            coefficient(wd)
    assert coefficient(Normalized(0.6), max_steps=4) == [pytest.approx(0.3)]
    assert coefficient(Timescale(steps=50)) == [pytest.approx(1 / (50 * LR))]
