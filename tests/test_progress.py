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
from fastai.callback.schedule import combined_cos
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai_helpers import BATCHES, BS, FITS, When, items, learner, loaders, throw
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
from wd_callbacks.schedules import Normalized
from wd_callbacks.torch import DecoupledWD

# A plain loop


@pytest.mark.filterwarnings("ignore:.*total_steps")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"total_steps": 4}, [0, 0.25, 0.5, 0.75, 1, 1]),  # past its end it stays there
        ({"progress": iter([0, 0.25, 0.25, 0.9, 1.5]).__next__}, [0, 0.25, 0.25, 0.9, 1]),
    ],
    ids=["total_steps", "the loop's own"],
)
def test_a_plain_loop(arguments, expected):
    _, optimizer = one_weight()
    decay = DecoupledWD(optimizer, schedule := Positions(), **arguments)
    for _ in expected:
        optimizer.step()
    assert schedule.last(len(expected)) == expected
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


def manual(**model):
    return {"model": {"manual": True, **model}}


TENTHS = {"batches": 10, "accumulate_grad_batches": 4}  # the last window of an epoch is shorter
NO_EPOCHS = {"epochs": None}

LIGHTNING = {  # settings, six batches and two epochs unless they say otherwise; the positions
    "plain": ({}, evenly(12)),
    "shorter last window": (TENTHS, [i / 20 for i in (0, 4, 8, 10, 14, 18)]),
    "max_steps": ({**TENTHS, **NO_EPOCHS, "max_steps": 5}, [i / 18 for i in (0, 4, 8, 10, 14)]),
    "max_steps first": ({"epochs": 10, "max_steps": 15}, evenly(15)),
    "max_epochs first": ({"max_steps": 1000}, evenly(12)),
    "two epochs of steps": (
        {**TENTHS, **NO_EPOCHS, "max_steps": 6},
        [i / 20 for i in (0, 4, 8, 10, 14, 18)],
    ),
    "manual, 5 steps per batch": (manual(steps=5), per_batch(12, 5)),
    "manual, accumulation": (manual(every=3), evenly(4)),
    "manual, raw": (manual(by="raw", steps=2), per_batch(12, 2)),
    "manual, max_steps": ({**manual(steps=5), **NO_EPOCHS, "max_steps": 50}, per_batch(10, 5)),
    "manual, max_epochs first": ({**manual(steps=2), "max_steps": 1000}, per_batch(12, 2)),
    "endless, max_steps": ({"batches": Endless(), **NO_EPOCHS, "max_steps": 9}, evenly(9)),
    "endless, limit_train_batches": ({"batches": Endless(), "limit_train_batches": 4}, evenly(8)),
    "a skipped batch was an attempt": ({"model": {"skipped": (1, 2)}}, evenly(12)),
    "fast_dev_run": ({**NO_EPOCHS, "fast_dev_run": 3}, evenly(3)),
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
    ("settings", "done", "batches"),
    [
        ({"max_epochs": 2}, range(12), 12),
        ({"max_epochs": -1, "max_steps": 16}, [i + i // 3 for i in range(12)], 16),
    ],
    ids=["max_epochs", "max_steps"],
)
def test_lightning_with_optimizers_that_take_turns(package, settings, done, batches):
    first, second = Positions(), Positions()
    trainer = quiet_trainer(package, LightningWD({0: first, 1: second}), **settings)
    trainer.fit(turns_class(package, 1, 3)(two_adams, manual=True), loader(6))
    assert first.seen == pytest.approx([i / batches for i in done])
    assert second.seen == pytest.approx(evenly(4))


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@each_way
def test_an_overflow_takes_its_place_in_the_schedule(package, manual, fused):
    make, scaler = partial(adam, fused=fused), half_precision(package)
    seen = positions(package, make=make, plugins=scaler, model={"manual": manual})
    overflows = 0 if fused else 12 - len(seen)  # a fused optimizer is called all the same
    assert (overflows > 0) == (not fused)
    assert seen == pytest.approx(evenly(12)[overflows:])


def test_a_schedule_needs_a_length(package):
    for settings in ({"batches": Endless(3)}, {"epochs": -1}):
        with pytest.raises(ValueError, match=r"max_epochs.*max_steps"):
            fit(package, adam, LightningWD(lambda p: p), **settings)


def test_a_second_fit_goes_on_in_the_schedule(package):
    module = fit(package, adam, LightningWD(schedule := Positions()), epochs=1)
    module.trainer.validate(module, loader(2), verbose=False)
    module.trainer.fit_loop.max_epochs = 2
    module.trainer.fit(module, loader(6))
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


MORE = {"epochs": None, "max_steps": 12}
RESUMED = {  # batches and settings before and after; of how many steps how many are done
    "shorter epochs": (20, {"epochs": 2}, 5, {"epochs": 6}, 10, 30),
    "longer epochs": (8, {"epochs": 2}, 20, {"epochs": 4}, 40, 80),
    "max_steps, not max_epochs": (5, {"epochs": 2, "max_steps": 60}, 1, MORE, 10, 12),
    "more max_steps": (4, {"epochs": None, "max_steps": 6}, 4, MORE, 6, 12),
    "endless": (Endless(), {"epochs": None, "max_steps": 6}, Endless(), MORE, 6, 12),
}


@pytest.mark.filterwarnings("ignore:.*length")
@pytest.mark.parametrize(
    ("batches", "settings", "new_batches", "new_settings", "done", "steps"),
    RESUMED.values(),
    ids=RESUMED,
)
def test_resumed_with_another_length(
    package, tmp_path, batches, settings, new_batches, new_settings, done, steps
):  # P9
    module = fit(package, adam, LightningWD(Positions()), batches=batches, **settings)
    module.trainer.save_checkpoint(path := tmp_path / "a.ckpt")
    decay = LightningWD(schedule := Positions())
    fit(package, adam, decay, batches=new_batches, resume=path, **new_settings)
    assert schedule.last(steps - done) == evenly(steps)[done:]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_epochs_that_are_shorter_than_announced(package, accumulate):
    class Short(IterableDataset):
        def __iter__(self):
            return iter(range(6))

        def __len__(self):
            return 10

    settings = {"accumulate_grad_batches": accumulate, "epochs": None, "max_steps": 15}
    assert positions(package, batches=Short(), **settings) == evenly(15)


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


def cancel(event, exception):
    return with_cbs(When(event, throw(exception), {3, 4}))


def two_fits(learn, cbs):
    learn.fit(2, cbs=cbs)
    learn.fit_one_cycle(2, cbs=cbs)


FASTAI = {  # fit, and the batches done at the previous step, of 16
    "fit": (FITS["fit"], range(16)),
    "accumulation": (with_cbs(GradientAccumulation(3 * BS)), [0, 3, 6, 9, 12]),
    "no step": (cancel("before_step", CancelStepException), [0, 1, 2, 5, *range(6, 16)]),
    "no batch": (cancel("after_loss", CancelBatchException), [0, 1, 2, 3, *range(6, 16)]),
    "cancelled after its step": (cancel("after_step", CancelBatchException), range(16)),
    "start_epoch": (lambda learn, cbs: learn.fit(2, cbs=cbs, start_epoch=1), range(8, 16)),
    "two fits": (two_fits, [*range(16), *range(16)]),
}


@pytest.mark.parametrize(("run", "done"), FASTAI.values(), ids=FASTAI)
def test_fastai(run, done):
    schedule = Positions(0.01)
    run(learner(), [FastaiWD(schedule)])
    assert schedule.seen == [i / 16 for i in done]


def test_fastai_with_batches_that_grow():  # P13
    class Grow(Callback):
        order = -1

        def before_epoch(self):
            self.learn.dls = loaders(items(), [5, 10, 20][self.epoch])

    learn, schedule = learner(), combined_cos(0.3, 0.1, 0.5, 0.02)
    learn.fit(3, cbs=[Grow(), FastaiWD(schedule)])
    expected = [(epoch + i / n) / 3 for epoch, n in enumerate((8, 4, 2)) for i in range(n)]
    assert learn.recorder.hps["wd"] == pytest.approx(list(map(schedule, expected)))


def test_fastai_fits_within_a_fit():  # P1
    class Within(Callback):
        order = 100

        def after_batch(self):
            if (self.epoch, self.iter, self.n_epoch) == (0, 3, 2):
                outer = dict(vars(self.learn))
                self.learn.fit(1)
                vars(self.learn).update(outer)
                self.model.train()

    schedule = Positions(0.1)
    learner(cbs=FastaiWD(schedule)).fit(2, cbs=Within())
    assert schedule.seen == [*evenly(16)[:4], *evenly(8), *evenly(16)[4:]]


def test_fastai_accumulates_over_loaders_of_torch():  # P5
    def coefficients(wd, data, batch_size):
        dls = DataLoaders(*(DataLoader(data, batch_size=batch_size) for _ in range(2)))
        decay = FastaiWD(wd)
        learner(dls=dls).fit(2, cbs=[GradientAccumulation(10), decay])
        return decay.coefficients

    assert coefficients(Normalized(1.0), items(), 5) == [1 / math.sqrt(8)]
    batches = [tuple(map(torch.stack, zip(*items()[5 * i : 5 * i + 5]))) for i in range(8)]
    assert coefficients(0.1, batches, None) == [0.1]
    with pytest.raises(ValueError, match="steps"):  # of unknown size
        coefficients(Normalized(1.0), batches, None)


def test_every_fit_starts_at_0_also_after_one_that_was_cancelled():  # P3
    schedule = Positions(0.01)
    learn = learner(cbs=FastaiWD(schedule))
    for event in ("before_fit", "before_batch", "after_batch"):
        cancel = When(event, throw(CancelFitException), order=-50)
        learn.fit(1, cbs=cancel)
        assert cancel.hits == 1
        schedule.seen.clear()
        learn.fit(1)
        assert schedule.seen == evenly(BATCHES)
