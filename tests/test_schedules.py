"""Every schedule against its closed form, alone and in real runs."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

import wd_callbacks.torch
from wd_callbacks import schedules
from wd_callbacks.schedules import (
    Cosine,
    Exponential,
    Join,
    Linear,
    Normalized,
    Polynomial,
    Restarts,
    Run,
    Steps,
    Timescale,
)

POINTS = [0.0, 1e-9, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.999, 1.0]

CLOSED_FORMS = [
    (Linear(0.04, 0.4), lambda p: 0.04 + 0.36 * p),
    (Linear(0.3, 0), lambda p: 0.3 * (1 - p)),
    (Cosine(0.04, 0.4), lambda p: 0.4 - 0.36 * (1 + math.cos(math.pi * p)) / 2),
    (Exponential(1e-4, 1e-2), lambda p: 10 ** (-4 + 2 * p)),
    (Polynomial(1, 0.2, 3), lambda p: 1 - 0.8 * p**3),
    (Polynomial(0, 2, 0.5), lambda p: 2 * math.sqrt(p)),
    (Steps({0.0: 0.1, 0.25: 0.2, 0.5: 0}), lambda p: 0.1 if p < 0.25 else 0.2 if p < 0.5 else 0.0),
    (
        Join([(0.25, Linear(0, 1)), (0.75, Cosine(1, 0))]),
        lambda p: 4 * p if p < 0.25 else (1 + math.cos(math.pi * (p - 0.25) / 0.75)) / 2,
    ),
    (Restarts(Linear(1, 0), 4), lambda p: 1 - (4 * p) % 1 if p < 1 else 0.0),
    (
        Restarts(Linear(1, 0), 2, mult=3),
        lambda p: 1 - 4 * p if p < 0.25 else 1 - (p - 0.25) / 0.75,
    ),
    (Restarts(Join([(0.5, Linear(0, 1)), (0.5, Linear(1, 0))]), 2), lambda p: tent(2 * p % 1)),
]


def short(value):
    """Part of a test's name."""
    return None if callable(value) and not hasattr(value, "__dataclass_fields__") else repr(value)


def tent(p):
    return 2 * p if p < 0.5 else 2 - 2 * p


@pytest.mark.parametrize(("schedule", "formula"), CLOSED_FORMS, ids=short)
def test_closed_forms(schedule, formula):
    for point in POINTS:
        assert schedule(point) == pytest.approx(formula(point), rel=1e-9, abs=1e-8)
    assert schedule(-1) == schedule(0)  # clamped at both ends
    assert schedule(7) == schedule(1)


@pytest.mark.parametrize(
    ("schedule", "start", "end"),
    [
        (Linear(0.1, 0.3), 0.1, 0.3),
        (Cosine(0.1, 0.3), 0.1, 0.3),
        (Exponential(0.1, 0.3), 0.1, 0.3),
        (Polynomial(0.1, 0.3, 2), 0.1, 0.3),
        (Restarts(Cosine(0.1, 0.3), 7), 0.1, 0.3),
        (Join([(0.1, Linear(0.1, 0.7))] * 10), 0.1, 0.7),
    ],
)
def test_the_ends_are_exact(schedule, start, end):
    assert schedule(0) == start
    assert schedule(1) == end


def test_ten_tenths_join_and_each_piece_starts_at_its_own_start():
    schedule = Join([(0.1, Linear(i, i + 0.5)) for i in range(10)])
    for i in range(10):
        assert schedule(i / 10) == pytest.approx(i, abs=1e-6)
        assert schedule((i + 1) / 10 - 1e-6) == pytest.approx(i + 0.5, abs=1e-4)


EVERY = [schedule for schedule, _ in CLOSED_FORMS] + [
    Normalized(0.05),
    Timescale(epochs=3),
    Timescale(steps=100),
    Restarts(Normalized(0.05), 3, mult=2),
]


@pytest.mark.parametrize("schedule", EVERY, ids=short)
def test_they_print_compare_and_pickle(schedule):
    assert eval(repr(schedule), vars(schedules)) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert schedule != Linear(0.123, 0.456)
    with pytest.raises(AttributeError):  # frozen
        schedule.start = 0


WRONG = [
    (
        lambda: Linear(-0.1, 0),
        ValueError,
        r"Linear: start must be finite and at least 0, got -0\.1",
    ),
    (lambda: Linear(0, math.nan), ValueError, "Linear: end must be finite and at least 0, got nan"),
    (lambda: Linear("0", 0), TypeError, r"Linear: start must be a number, got '0' \(str\)"),
    (lambda: Linear(True, 0), TypeError, r"Linear: start must be a number, got True \(bool\)"),
    (lambda: Cosine(0, math.inf), ValueError, "Cosine: end must be finite"),
    (lambda: Exponential(0, 1), ValueError, "Exponential: start must be finite and above 0, got 0"),
    (lambda: Exponential(1, 0), ValueError, "Exponential: end must be finite and above 0, got 0"),
    (lambda: Polynomial(0, 1, 0), ValueError, "Polynomial: power must be finite and above 0"),
    (lambda: Steps({0.5: 1}), ValueError, r"Steps: values must have the key 0, got \[0\.5\]"),
    (lambda: Steps({}), ValueError, "Steps: values must have the key 0"),
    (
        lambda: Steps({0: 1, 1.0: 2}),
        ValueError,
        r"Steps: a key of values must be below 1, got 1\.0",
    ),
    (lambda: Steps({0: -1}), ValueError, r"Steps: values\[0\] must be finite and at least 0"),
    (lambda: Steps([0.1]), TypeError, r"Steps: values must be a dict, got \[0\.1\]"),
    (lambda: Join([]), ValueError, "Join: the fractions of pieces must add up to 1, got 0"),
    (lambda: Join([(0.5, Linear(0, 1))]), ValueError, r"must add up to 1, got 0\.5"),
    (lambda: Join([(1.5, Linear(0, 1)), (-0.5, Linear(0, 1))]), ValueError, r"above 0, got -0\.5"),
    (lambda: Join([Linear(0, 1)]), TypeError, "Join: pieces must be pairs of a fraction and a sch"),
    (
        lambda: Join([(1, 0.1)]),
        TypeError,
        "Join: pieces must be pairs of a fraction and a schedule",
    ),
    (lambda: Restarts(0.1, 2), TypeError, r"Restarts: schedule must be a schedule, got 0\.1"),
    (lambda: Restarts(Linear(0, 1), 0), ValueError, "Restarts: cycles must be a whole number"),
    (lambda: Restarts(Linear(0, 1), 1.5), ValueError, "Restarts: cycles must be a whole number"),
    (lambda: Restarts(Linear(0, 1), 2, 0), ValueError, "Restarts: mult must be finite and above 0"),
    (lambda: Normalized(-1), ValueError, "Normalized: wd_norm must be finite and at least 0"),
    (lambda: Timescale(), ValueError, "Timescale: give epochs or steps, one of the two"),
    (lambda: Timescale(1, 2), ValueError, "Timescale: give epochs or steps, one of the two"),
    (lambda: Timescale(epochs=0), ValueError, "Timescale: epochs must be finite and above 0"),
    (lambda: Normalized(0.1)(0.5), TypeError, "has no value before it is resolved"),
    (lambda: Normalized(0.1).resolved(Run()), ValueError, "needs the number of steps of the run"),
    (lambda: Timescale(epochs=1).resolved(Run(10, peak=1)), ValueError, "steps of an epoch"),
    (lambda: Timescale(steps=9).resolved(Run(10)), ValueError, "needs the peak .* give max_lr"),
]


@pytest.mark.parametrize(("build", "error", "message"), WRONG)
def test_nonsense_is_refused_when_it_is_built(build, error, message):  # P10
    with pytest.raises(error, match=message):
        build()


# In real runs


def coefficients_used(wd, steps, lr=0.1, **arguments):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)
    decay = wd_callbacks.torch.DecoupledWD(optimizer, wd, **arguments)
    used = []
    for _ in range(steps):
        optimizer.step()
        used.append(decay.coefficients[0])
    return used


@pytest.mark.parametrize(("schedule", "formula"), CLOSED_FORMS, ids=short)
def test_a_plain_loop_uses_them(schedule, formula):  # P6
    used = coefficients_used(schedule, 12, total_steps=12)
    assert used == pytest.approx([formula(i / 12) for i in range(12)], abs=1e-8)


def test_normalized_divides_by_the_root_of_the_steps():
    used = coefficients_used(Normalized(0.5), 3, total_steps=25)
    assert used == pytest.approx([0.1] * 3)
    cycles = coefficients_used(Restarts(Normalized(0.6), 2, mult=3), 16, total_steps=16)
    assert cycles == pytest.approx([0.6 / 2] * 4 + [0.6 / math.sqrt(12)] * 12)
    joined = Join([(0.5, Linear(0, 0.5)), (0.5, Normalized(0.4))])
    assert coefficients_used(joined, 16, total_steps=16)[8:] == pytest.approx([0.1] * 8)
    inside = Join([(0.5, Linear(0, 0)), (0.5, Restarts(Normalized(0.4), 2))])
    assert coefficients_used(inside, 16, total_steps=16)[8:] == pytest.approx([0.2] * 8)


@pytest.mark.parametrize("scale_by", ["lr", "lr_ratio", "lr_squared", "none"])
def test_timescale_shrinks_by_one_over_the_steps_at_the_peak(scale_by):
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=0.2)
    peaks = {"scale_by": scale_by, "steps_per_epoch": 5}
    wd_callbacks.torch.DecoupledWD(optimizer, Timescale(epochs=8), **peaks)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert 1 - p.item() == pytest.approx(1 / 40)


def test_timescale_takes_each_group_s_own_peak():
    params = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [params[0]], "lr": 0.1}, {"params": [params[1]], "max_lr": 0.4}]
    optimizer = torch.optim.SGD(groups, lr=0.2)
    decay = wd_callbacks.torch.DecoupledWD(optimizer, Timescale(steps=100))
    optimizer.step()
    assert decay.coefficients == pytest.approx([0.1, 0.025])


def test_timescale_does_not_go_with_a_callable_scale():  # P10
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    wd_callbacks.torch.DecoupledWD(optimizer, Timescale(steps=9), scale_by=lambda g: g["lr"])
    with pytest.raises(ValueError, match=r"Timescale.*needs the peak .* no callable"):
        optimizer.step()


@pytest.mark.parametrize("n_acc", [None, 4, 5])
def test_fastai_counts_the_steps_of_a_fit(n_acc):  # P6
    from fastai.callback.core import Callback
    from fastai.callback.training import GradientAccumulation
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    from wd_callbacks.fastai import DecoupledWD

    class Notes(Callback):
        order = DecoupledWD.order + 1

        def before_fit(self):
            self.coefficients = []

        def after_step(self):
            self.coefficients += self.learn.decoupled_wd.coefficients

    data = [(torch.ones(1), torch.ones(1))] * 24
    dls = DataLoaders.from_dsets(data, data, bs=2, shuffle=False, device="cpu")
    learn = Learner(dls, nn.Linear(1, 1), nn.functional.mse_loss)
    window = 1 if n_acc is None else math.ceil(n_acc / 2)
    steps_per_epoch = 12 / window
    for wd, expected in [
        (Normalized(0.6), 0.6 / math.sqrt(3 * steps_per_epoch)),
        (Timescale(epochs=2), 1 / (2 * steps_per_epoch * 1e-2)),
    ]:
        decay, notes = DecoupledWD(wd), Notes()
        cbs = [decay, notes] if n_acc is None else [decay, notes, GradientAccumulation(n_acc)]
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(3, 1e-2, cbs=cbs)
        assert notes.coefficients == [pytest.approx(expected)] * int(3 * steps_per_epoch)


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 4}, {"max_steps": 5}])
@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")
def test_lightning_counts_the_steps_of_a_run(settings):  # P6
    import pytorch_lightning as pl
    from lightning_models import loader, model_class, quiet_trainer

    from wd_callbacks.lightning import DecoupledWD

    window = settings.get("accumulate_grad_batches", 1)
    per_epoch = math.ceil(6 / window)
    steps = settings.get("max_steps", 2 * per_epoch)

    def adam(module):
        return torch.optim.Adam(module.parameters(), lr=0.01)

    for wd, expected in [
        (Normalized(0.6), 0.6 / math.sqrt(steps)),
        (Timescale(epochs=2), 1 / (2 * per_epoch * 0.01)),
    ]:
        decay = DecoupledWD(wd)
        trainer = quiet_trainer(pl, decay, max_epochs=2, **settings)
        trainer.fit(model_class(pl)(adam), loader(6))
        assert trainer.global_step == steps
        assert decay.coefficients[0] == [pytest.approx(expected)]


@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")
def test_lightning_does_not_guess_the_steps_of_manual_optimization():  # P10
    import pytorch_lightning as pl
    from lightning_models import loader, model_class, quiet_trainer

    from wd_callbacks.lightning import DecoupledWD

    def adam(module):
        return torch.optim.Adam(module.parameters(), lr=0.01)

    def fit(wd, **settings):
        trainer = quiet_trainer(pl, DecoupledWD(wd), **settings)
        trainer.fit(model_class(pl)(adam, manual=True), loader(6))
        return trainer.callbacks[0].coefficients[0]

    with pytest.raises(ValueError, match="needs the number of steps of the run"):
        fit(Normalized(0.6), max_epochs=2)
    with pytest.raises(ValueError, match="needs the number of steps of an epoch"):
        fit(Timescale(epochs=2), max_epochs=2)
    assert fit(Normalized(0.6), max_epochs=2, max_steps=4) == [pytest.approx(0.3)]
    assert fit(Timescale(steps=50), max_epochs=2) == [pytest.approx(2)]


def test_a_timescale_needs_no_length_of_the_run():  # P6
    used = coefficients_used(Timescale(steps=50), 3)
    assert used == pytest.approx([0.2] * 3)
    with pytest.raises(ValueError, match="give total_steps, or progress"):
        coefficients_used(Normalized(0.1), 1)
