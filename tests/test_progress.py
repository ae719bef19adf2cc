"""Progress: step i of n is at i / n, whatever accumulates, overflows or resumes (P6)."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from fastai.callback.core import (
    Callback,
    CancelBatchException,
    CancelFitException,
    CancelStepException,
)
from fastai.callback.schedule import SchedCos, SchedPoly, combined_cos
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai_helpers import (
    BATCHES,
    BS,
    FITS,
    Trace,
    When,
    items,
    learner,
    loaders,
    still_learner,
    throw,
)
from helpers import Positions, evenly, one_weight, same
from lightning_helpers import (
    Endless,
    adam,
    averaging,
    each_way,
    fit,
    half_precision,
    loader,
    model_class,
    notes_logger,
    quiet_trainer,
    reloading_class,
    turns_class,
    two_adams,
)
from torch.utils.data import DataLoader, IterableDataset

from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.lightning import DecoupledWD as LightningWD
from wd_callbacks.schedules import Linear, Normalized
from wd_callbacks.torch import DecoupledWD

# A plain loop


@pytest.mark.filterwarnings("ignore:.*total_steps")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"total_steps": 4}, [0, 0.25, 0.5, 0.75, 1, 1]),  # past its end it stays there
        ({"progress": iter([0.0, 0.25, 0.25, 0.9, 1.5, 2]).__next__}, [0, 0.25, 0.25, 0.9, 1, 1]),
    ],
    ids=["total_steps", "the loop's own"],
)
def test_a_plain_loop(arguments, expected):
    _, optimizer = one_weight()
    decay = DecoupledWD(optimizer, schedule := Positions(), **arguments)
    for progress in expected:
        optimizer.step()
        assert schedule.last(1) == [progress]
    assert decay.coefficients == [0.0]


# Lightning


def positions(package, *callbacks, make=adam, **settings):
    """The progress at which the schedule was asked, step by step."""
    schedule = Positions()
    fit(package, make, LightningWD(schedule), *callbacks, **settings)
    return schedule.seen


def per_batch(batches, steps):
    """``steps`` in each batch of a run."""
    return [batch / batches for batch in range(batches) for _ in range(steps)]


MANUAL = {"manual": True}
TENTHS = {"batches": 10, "accumulate_grad_batches": 4}  # the last window of an epoch is shorter

LIGHTNING = {
    "plain": ({}, evenly(12)),
    "accumulation": ({"batches": 64, "epochs": 1, "accumulate_grad_batches": 4}, evenly(16)),
    "shorter last window": (TENTHS, [i / 20 for i in (0, 4, 8, 10, 14, 18)]),
    "limit_train_batches, a fraction": ({"batches": 20, "limit_train_batches": 0.25}, evenly(10)),
    "max_steps first": ({"epochs": 10, "max_steps": 15}, evenly(15)),
    "max_epochs first": ({"epochs": 2, "max_steps": 1000}, evenly(12)),
    "max_steps, shorter last window": (
        {**TENTHS, "epochs": None, "max_steps": 5},
        [i / 18 for i in (0, 4, 8, 10, 14)],
    ),
    "max_steps at the end of an epoch": (
        {**TENTHS, "epochs": None, "max_steps": 6},
        [i / 20 for i in (0, 4, 8, 10, 14, 18)],
    ),
    "manual": ({"model": MANUAL}, evenly(12)),
    "manual, 5 steps per batch": ({"model": {**MANUAL, "steps": 5}}, per_batch(12, 5)),
    "manual, accumulation": ({"model": {**MANUAL, "every": 3}}, evenly(4)),
    "manual, raw": ({"model": {**MANUAL, "by": "raw", "steps": 2}}, per_batch(12, 2)),
    "manual, max_steps": ({"model": MANUAL, "epochs": None, "max_steps": 15}, evenly(15)),
    "manual, 5 steps per batch, max_steps": (
        {"model": {**MANUAL, "steps": 5}, "epochs": None, "max_steps": 50},
        per_batch(10, 5),
    ),
    "manual, max_epochs first": (
        {"model": {**MANUAL, "steps": 2}, "epochs": 1, "max_steps": 1000},
        per_batch(6, 2),
    ),
    "endless, max_steps": ({"batches": Endless(), "epochs": None, "max_steps": 9}, evenly(9)),
    "endless, limit_train_batches": ({"batches": Endless(), "limit_train_batches": 4}, evenly(8)),
    "a skipped batch was an attempt": ({"model": {"skipped": (1, 2)}, "epochs": 1}, evenly(6)),
    "fast_dev_run": ({"epochs": None, "fast_dev_run": 3}, evenly(3)),
}


@pytest.mark.parametrize(("settings", "expected"), LIGHTNING.values(), ids=LIGHTNING)
def test_lightning(package, settings, expected):
    assert positions(package, **settings) == pytest.approx(expected, abs=1e-12)


def test_lightning_with_an_accumulation_that_changes(package):
    def run(**settings):
        scheduler = package.callbacks.GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
        return positions(package, scheduler, batches=8, **settings)

    done = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20]
    assert run(epochs=3) == pytest.approx([batch / 24 for batch in done])
    # Eight steps in the first epoch, four in the second, and then one of four batches.
    assert run(epochs=None, max_steps=13) == pytest.approx([batch / 20 for batch in done[:13]])


def test_lightning_with_stochastic_weight_averaging(package):
    average = averaging(package, "StochasticWeightAveraging")
    seen = positions(package, average, epochs=4, model={"norm": True})
    # A fifth epoch renews the statistics of the norm. Lightning ends it with a step by old
    # gradients, after the run.
    assert seen == pytest.approx([*evenly(24), 1.0])


@pytest.mark.parametrize(
    ("manual", "settings", "expected"),
    [
        ({"steps": 2}, {}, [[batch / 12 for batch in range(12) for _ in range(2)]] * 2),
        ((1, 3), {}, [evenly(12), evenly(4)]),
        (
            (1, 3),
            {"max_steps": 16, "max_epochs": -1},
            [[(batch + batch // 3) / 16 for batch in range(12)], evenly(4)],
        ),
    ],
    ids=["together", "in turns", "in turns, max_steps"],
)
def test_lightning_with_several_optimizers(package, manual, settings, expected):
    first, second = Positions(), Positions()
    trainer = quiet_trainer(
        package, LightningWD({0: first, 1: second}), **{"max_epochs": 2, **settings}
    )
    if isinstance(manual, dict):
        model = model_class(package)(two_adams, manual=True, **manual)
    else:
        model = turns_class(package, *manual)(two_adams, manual=True)
    trainer.fit(model, loader(6))
    assert [first.seen, second.seen] == [pytest.approx(each) for each in expected]


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@each_way
def test_an_overflow_takes_its_place_in_the_schedule(package, manual, fused):
    seen = positions(
        package,
        make=partial(adam, fused=fused),
        plugins=half_precision(package),
        model={"manual": manual},
    )
    overflows = 0 if fused else 12 - len(seen)  # a fused optimizer is called all the same
    assert (overflows > 0) == (not fused)
    assert seen == pytest.approx(evenly(12)[overflows:])


def test_a_schedule_needs_a_length(package):
    for settings in ({"batches": Endless(3)}, {"epochs": -1}):
        with pytest.raises(ValueError, match=r"max_epochs.*max_steps"):
            fit(package, adam, LightningWD(lambda p: p), **settings)


def test_a_second_fit_goes_on_in_the_schedule(package):
    schedule = Positions()
    module = model_class(package)(adam)
    trainer = quiet_trainer(package, LightningWD(schedule), max_epochs=1)
    trainer.fit(module, loader(6))
    trainer.validate(module, loader(2), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(6))
    assert schedule.seen == pytest.approx([*evenly(6), *evenly(12)[6:]])


# Lightning: epochs that change their length


@pytest.mark.parametrize("lengths", [(6, 3, 3), (4, 1, 7)], ids=str)
def test_a_loader_whose_length_changes(package, lengths):  # P13
    logger, schedule = notes_logger(package), Positions(0.1)
    settings = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1, "log_every_n_steps": 1}
    trainer = quiet_trainer(package, LightningWD(schedule), logger=logger, **settings)
    trainer.fit(reloading_class(package, lambda epoch: lengths[epoch])(adam))
    expected = [(epoch + i / n) / 3 for epoch, n in enumerate(lengths) for i in range(n)]
    assert schedule.seen == pytest.approx(expected, abs=1e-12)
    assert [metrics for metrics, _ in logger.notes] == [{"wd-Adam": 0.1}] * sum(lengths)


@pytest.mark.parametrize("lengths", [(4, 2, 4, 2, 4), (8, 1, 1, 1, 8), (2, 5, 8)], ids=str)
def test_a_loader_whose_length_changes_under_max_steps(package, tmp_path, lengths):  # P9
    def run(*callbacks, ckpt_path=None, **settings):
        schedule = Positions()
        settings |= {"max_steps": 14, "max_epochs": -1, "reload_dataloaders_every_n_epochs": 1}
        trainer = quiet_trainer(package, LightningWD(schedule), *callbacks, **settings)
        module = reloading_class(package, lambda epoch: lengths[epoch])(adam)
        trainer.fit(module, ckpt_path=ckpt_path)
        return schedule

    save = package.callbacks.ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    run(save, enable_checkpointing=True)  # saves samples of the schedule
    assert run().seen == evenly(14)
    for stop in (4, 9):
        resumed = run(ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert resumed.last(14 - stop) == evenly(14)[stop:]


RESUMED = {
    # batches and settings before and after, steps before and after
    "shorter epochs": ((20, {"epochs": 2}), (5, {"epochs": 6}), 10, 30),
    "longer epochs": ((8, {"epochs": 2}), (20, {"epochs": 4}), 40, 80),
    "max_steps instead of max_epochs": (
        (5, {"epochs": 2, "max_steps": 60}),
        (20, {"epochs": None, "max_steps": 60}),
        10,
        60,
    ),
    "more max_steps": (
        (4, {"epochs": None, "max_steps": 6}),
        (4, {"epochs": None, "max_steps": 12}),
        6,
        12,
    ),
}


@pytest.mark.filterwarnings("ignore:.*length")
@pytest.mark.parametrize(("before", "after", "start", "steps"), RESUMED.values(), ids=RESUMED)
def test_resumed_with_another_length(package, tmp_path, before, after, start, steps):  # P9
    batches, settings = before
    done = fit(package, adam, LightningWD(Positions()), batches=batches, **settings)
    done.trainer.save_checkpoint(tmp_path / "a.ckpt")
    schedule, (batches, settings) = Positions(), after
    resume = {"resume": tmp_path / "a.ckpt", **settings}
    fit(package, adam, LightningWD(schedule), batches=batches, **resume)
    assert schedule.last(steps - start) == [i / steps for i in range(start, steps)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_epochs_that_are_shorter_than_announced(package, accumulate):
    class Short(IterableDataset):
        def __iter__(self):
            return iter(range(6))

        def __len__(self):
            return 10

    settings = {"accumulate_grad_batches": accumulate, "epochs": None, "max_steps": 15}
    assert positions(package, batches=Short(), **settings) == evenly(15)


def test_endless_batches_from_where_an_exception_left_them(package, tmp_path):  # P9
    class Fail(package.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 4:
                raise RuntimeError("out of memory")

    def run(schedule, *callbacks, **settings):
        limits = {"batches": Endless(), "epochs": None, "max_steps": 10}
        return fit(package, adam, LightningWD(schedule), *callbacks, **limits, **settings)

    whole, resumed = Positions(0.1), Positions(0.1)
    expected = run(whole)
    save = package.callbacks.OnExceptionCheckpoint(tmp_path, filename="a")
    with pytest.raises(RuntimeError, match="out of memory"):
        run(Positions(0.1), Fail(), save, enable_checkpointing=True)
    model = run(resumed, resume=tmp_path / "a.ckpt")
    assert resumed.last(6) == whole.seen[4:] == evenly(10)[4:]
    assert same(model, expected)


def test_a_training_step_that_takes_the_iterator(package):
    class Iterates(model_class(package)):
        def training_step(self, dataloader_iter):
            next(dataloader_iter)
            return self.loss(0)

    schedule = Positions()
    quiet_trainer(package, LightningWD(schedule), max_epochs=2).fit(Iterates(adam), loader(4))
    assert schedule.seen == evenly(8)


@pytest.mark.filterwarnings("ignore:.*optimizer.step")
def test_a_trial_in_the_middle_leaves_no_trace(package, tmp_path):  # P3, P8, P9
    class Finder(package.callbacks.LearningRateFinder):
        """In the middle of training, as Lightning's documentation shows it."""

        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    class Model(reloading_class(package, lambda epoch: 6)):
        def loss(self, index):  # the finder counts batches of its own
            return super().loss(0)

    def run(*callbacks):
        decay, model = LightningWD(lambda p: 1e-3 * (1 - p), quantum=5e-5), Model(adam)
        trainer = quiet_trainer(package, decay, *callbacks, max_epochs=3, default_root_dir=tmp_path)
        trainer.fit(model)
        return decay, model

    finder = Finder(num_training_steps=3, min_lr=1e-5, max_lr=1e-4, update_attr=False)
    (decay, model), (tried, tried_model) = run(), run(finder)
    assert tried.state_dict() == decay.state_dict()
    assert tried.coefficients == decay.coefficients
    assert same(tried_model, model)


# fastai


def with_cbs(*others):
    return lambda learn, cbs: learn.fit(2, cbs=[*cbs, *others])


def cancel(event, exception, batches=None):
    return with_cbs(When(event, throw(exception), batches))


FASTAI = {
    # fit, and the batches done at the previous step, of 16
    "fit": (FITS["fit"], range(16)),
    "one_cycle": (FITS["one_cycle"], range(16)),
    "accumulate_2": (with_cbs(GradientAccumulation(2 * BS)), range(0, 16, 2)),
    "accumulate_3": (with_cbs(GradientAccumulation(3 * BS)), [0, 3, 6, 9, 12]),
    "cancelled_step": (
        cancel("before_step", CancelStepException, {3, 4}),
        [0, 1, 2, 5, *range(6, 16)],
    ),
    "cancelled_batch": (
        cancel("after_loss", CancelBatchException, {3, 4}),
        [0, 1, 2, 3, *range(6, 16)],
    ),
    "cancelled_after_its_step": (cancel("after_step", CancelBatchException), range(16)),
    "start_epoch": (lambda learn, cbs: learn.fit(2, cbs=cbs, start_epoch=1), range(8, 16)),
    "two_fits": (
        lambda learn, cbs: (learn.fit(2, cbs=cbs), learn.fit_one_cycle(2, cbs=cbs)),
        [*range(16), *range(16)],
    ),
}


@pytest.mark.parametrize(("run", "done"), FASTAI.values(), ids=FASTAI)
def test_fastai(run, done):
    schedule = Positions(0.01)
    run(learner(), [FastaiWD(schedule)])
    assert schedule.seen == [i / 16 for i in done]


@pytest.mark.parametrize(
    "schedule",
    [SchedCos(0.04, 0.4), combined_cos(0.3, 0.1, 0.5, 0.02), SchedPoly(0.5, 0.1, 2)],
    ids=["cos", "combined_cos", "poly"],
)
def test_fastais_schedules_in_closed_form(schedule):  # P13
    trace = Trace(FastaiWD(schedule, quantum=0))
    learn = still_learner()
    learn.fit(2, 0.1, cbs=[trace.decay, trace])
    expected = [schedule(progress) for progress in evenly(2 * BATCHES)]
    assert trace.coefficients == [[wd] for wd in expected]
    factor = math.prod(1 - 0.1 * wd for wd in expected)
    assert trace.weights[-1][0] == pytest.approx(factor, rel=1e-12)


def test_fastai_with_batches_that_grow():  # P13
    class Grow(Callback):
        order = -1

        def before_epoch(self):
            self.learn.dls = loaders(items(), [5, 10, 20][self.epoch])

    learn = learner()
    learn.fit(3, cbs=[Grow(), FastaiWD(Linear(1, 0))])
    expected = [(epoch + i / n) / 3 for epoch, n in enumerate((8, 4, 2)) for i in range(n)]
    assert learn.recorder.hps["wd"] == pytest.approx([1 - progress for progress in expected])


def test_fastai_fits_within_a_fit():  # P1
    class Within(Callback):
        order = 100
        now = True

        def after_batch(self):
            if (self.epoch, self.iter) == (0, 3) and self.now:
                self.now = False
                names = ("epoch", "n_epoch", "iter", "n_iter", "dl", "model", "xb", "yb", "opt")
                outer = {name: getattr(self.learn, name) for name in names}
                self.learn.fit(1)
                for name, value in outer.items():
                    setattr(self.learn, name, value)
                self.learn.model.train()
                self.learn.training = True

    schedule = Positions(0.1)
    learner(cbs=FastaiWD(schedule)).fit(2, cbs=Within())
    assert schedule.seen == [*evenly(16)[:4], *evenly(8), *evenly(16)[4:]]


@pytest.mark.parametrize(("wd", "expected"), [(0.1, 0.1), (Normalized(1.0), 1 / math.sqrt(8))])
def test_fastai_accumulates_over_a_loader_of_torch(wd, expected):  # P5
    data = items()
    dls = DataLoaders(DataLoader(data, batch_size=5), DataLoader(data[:5], batch_size=5))
    decay = FastaiWD(wd)
    learner(dls=dls).fit(2, cbs=[GradientAccumulation(10), decay])
    assert decay.coefficients == [expected]


def test_fastai_accumulates_over_batches_of_unknown_size():  # P5
    data = [tuple(map(torch.stack, zip(*items()[5 * i : 5 * i + 5]))) for i in range(8)]
    dls = DataLoaders(*(DataLoader(data, batch_size=None) for _ in range(2)))
    learner(dls=dls).fit(1, cbs=[GradientAccumulation(10), FastaiWD(0.1)])
    with pytest.raises(ValueError, match="steps"):
        learner(dls=dls).fit(1, cbs=[GradientAccumulation(10), FastaiWD(Normalized(1.0))])


def test_every_fit_starts_at_0_also_after_one_that_was_cancelled():  # P3
    schedule = Positions(0.01)
    learn = learner(cbs=FastaiWD(schedule))
    for event in ("before_fit", "before_batch", "after_batch"):
        cancel = When(event, throw(CancelFitException), None if event == "before_fit" else {3}, -50)
        learn.fit(1, cbs=cancel)
        assert cancel.hits == 1
        schedule.seen.clear()
        learn.fit(1)
        assert schedule.seen == evenly(BATCHES)
