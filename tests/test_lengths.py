"""Runs whose epochs change their length, and those that are interrupted by a trial."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def package(request):
    return pytest.importorskip(request.param)


@pytest.fixture
def ours():
    return pytest.importorskip("wd_callbacks.lightning").DecoupledWD


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
    pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:length was .* in the saved run"),
]


class Seen:
    """A schedule that notes the progress at which steps ask it."""

    def __init__(self):
        self.all = []

    def __call__(self, progress):
        self.all.append(progress)
        return 0.1

    def steps(self, count):
        """Those of the last steps: before, the arguments may have been compared by samples."""
        return self.all[-count:]


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=0.01)


# Lightning


@pytest.mark.parametrize(("batches", "epochs"), [(5, 6), (80, 4), (10, 4)])
def test_resumed_with_another_number_of_batches(package, tmp_path, ours, batches, epochs):  # P6, P9
    from lightning_models import fit

    save = package.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    fit(package, adam, ours(Seen()), save, batches=20, enable_checkpointing=True)
    seen, steps = Seen(), (epochs - 2) * batches
    fit(package, adam, ours(seen), batches=batches, epochs=epochs, resume=tmp_path / "last.ckpt")
    whole = epochs * batches
    assert seen.steps(steps) == [i / whole for i in range(2 * batches, whole)]


@pytest.mark.parametrize("lengths", [(6, 3, 3), (3, 6, 6), (4, 1, 7)])
def test_a_loader_whose_length_changes(package, ours, lengths):  # P6, P13
    from lightning_models import loader, model_class, quiet_trainer

    class Reloads(model_class(package)):
        def train_dataloader(self):
            return loader(lengths[self.current_epoch])

    logged = []

    class Log(package.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.append(metrics)

    seen = Seen()
    settings = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    trainer = quiet_trainer(package, ours(seen), logger=Log(), log_every_n_steps=1, **settings)
    trainer.fit(Reloads(adam))
    expected = [(epoch + i / n) / 3 for epoch, n in enumerate(lengths) for i in range(n)]
    assert seen.all == pytest.approx(expected, abs=1e-12)
    assert logged == [{"wd-Adam": 0.1}] * sum(lengths)


def test_a_loader_whose_length_changes_under_max_steps(package, ours):  # P6
    from lightning_models import loader, model_class, quiet_trainer

    class Reloads(model_class(package)):
        def train_dataloader(self):
            return loader(2 + 3 * self.current_epoch)

    seen = Seen()
    settings = {"max_steps": 12, "max_epochs": -1, "reload_dataloaders_every_n_epochs": 1}
    quiet_trainer(package, ours(seen), **settings).fit(Reloads(adam))
    assert seen.all == pytest.approx([i / 12 for i in range(12)], abs=1e-12)


@pytest.mark.parametrize("lengths", [(4, 2, 4, 2, 4), (8, 1, 1, 1, 8), (2, 5, 8)])
@pytest.mark.parametrize("stop", [None, 4, 9])
def test_lengths_that_come_back_under_max_steps(package, tmp_path, ours, lengths, stop):  # P6, P9
    from lightning_models import loader, model_class, quiet_trainer

    class Reloads(model_class(package)):
        def train_dataloader(self):
            return loader(lengths[self.current_epoch])

    settings = {"max_steps": 14, "max_epochs": -1, "reload_dataloaders_every_n_epochs": 1}
    saved = {} if stop is None else {"ckpt_path": tmp_path / f"step={stop}.ckpt"}
    if saved:
        names = {"filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1}
        save = package.callbacks.ModelCheckpoint(tmp_path, **names)
        callbacks = ours(Seen()), save
        quiet_trainer(package, *callbacks, enable_checkpointing=True, **settings).fit(Reloads(adam))
    seen, start = Seen(), stop or 0
    quiet_trainer(package, ours(seen), **settings).fit(Reloads(adam), **saved)
    assert seen.steps(14 - start) == [i / 14 for i in range(start, 14)]


@pytest.mark.parametrize(("before", "batches"), [(5, 20), (20, 10), (20, 20), (10, 40)])
def test_resumed_under_max_steps(package, tmp_path, ours, before, batches):  # P6, P9
    from lightning_models import fit

    save = package.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    settings = {"epochs": 2, "max_steps": 60, "enable_checkpointing": True}
    fit(package, adam, ours(Seen()), save, batches=before, **settings)
    seen, last = Seen(), tmp_path / "last.ckpt"
    fit(package, adam, ours(seen), batches=batches, epochs=None, max_steps=60, resume=last)
    assert seen.steps(60 - 2 * before) == [i / 60 for i in range(2 * before, 60)]


def test_more_steps_from_where_max_steps_cut_an_epoch_short(package, tmp_path, ours):  # P6, P9
    from lightning_models import fit

    done = fit(package, adam, ours(Seen()), batches=4, epochs=None, max_steps=6)
    done.trainer.save_checkpoint(tmp_path / "a.ckpt")
    seen = Seen()
    resume = {"batches": 4, "epochs": None, "max_steps": 12, "resume": tmp_path / "a.ckpt"}
    fit(package, adam, ours(seen), **resume)
    assert seen.steps(6) == [i / 12 for i in range(6, 12)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_epochs_that_are_shorter_than_announced(package, ours, accumulate):  # P6
    from lightning_models import fit

    class Short(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(6))

        def __len__(self):
            return 10

    seen, accumulation = Seen(), {"accumulate_grad_batches": accumulate}
    fit(package, adam, ours(seen), batches=Short(), epochs=None, max_steps=15, **accumulation)
    assert seen.all == [i / 15 for i in range(15)]


def test_endless_batches_from_where_an_exception_left_them(package, tmp_path, ours):  # P6, P9
    from lightning_models import Endless, fit, same

    class Fail(package.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 4:
                raise RuntimeError("out of memory")

    def run(seen, *callbacks, **settings):
        batches, limits = Endless(), {"epochs": None, "max_steps": 10}
        return fit(package, adam, ours(seen), *callbacks, batches=batches, **limits, **settings)

    whole, resumed = Seen(), Seen()
    expected = run(whole)
    save = package.callbacks.OnExceptionCheckpoint(tmp_path, filename="a")
    with pytest.raises(RuntimeError, match="out of memory"):
        run(Seen(), Fail(), save, enable_checkpointing=True)
    model = run(resumed, resume=tmp_path / "a.ckpt")
    assert resumed.steps(6) == whole.all[4:] == [i / 10 for i in range(4, 10)]
    assert same(model, expected)


def test_a_training_step_that_takes_the_iterator(package, ours):  # P6
    from lightning_models import loader, model_class, quiet_trainer

    class Iterates(model_class(package)):
        def training_step(self, dataloader_iter):
            next(dataloader_iter)
            return self.loss(0)

    seen = Seen()
    quiet_trainer(package, ours(seen), max_epochs=2).fit(Iterates(adam), loader(4))
    assert seen.all == [i / 8 for i in range(8)]


def test_turns_under_max_steps(package, ours):  # P6
    from lightning_models import loader, quiet_trainer, turns_class

    def both(module):
        return [adam(module.backbone), adam(module.head)]

    first, second = Seen(), Seen()
    trainer = quiet_trainer(package, ours({0: first, 1: second}), max_steps=16)
    trainer.fit(turns_class(package)(both, manual=True), loader(6))
    steps = [batch + batch // 3 for batch in range(12)]  # made before a batch
    assert first.all == [step / 16 for step in steps]
    assert second.all == [0, 4 / 16, 8 / 16, 12 / 16]


def test_how_long_a_run_is_in_closed_form(ours):  # P6
    from wd_callbacks.lightning import _until

    def counted(per_epoch, windows, epochs, most):
        batches = steps = 0
        for epoch in range(epochs):
            every = windows[max(start for start in windows if start <= epoch)]
            for batch in range(per_epoch):
                if steps == most:
                    return batches, steps
                batches += 1
                steps += (batch + 1) % every == 0 or batch + 1 == per_epoch
        return batches, steps

    cases = itertools.product(
        (1, 3, 8), ({0: 1}, {0: 3}, {0: 1, 2: 2}, {0: 4, 1: 3, 5: 1}), (1, 2, 7), (1, 5, 9, 30)
    )
    for case in cases:
        assert _until(*case) == counted(*case), case
    assert _until(7, {0: 2}, 10**9, math.inf) == (7 * 10**9, 4 * 10**9)
    assert _until(7, {0: 2}, math.inf, 10**9) == (7 * 10**9 // 4, 10**9)


def finder(package):
    """LearningRateFinder in the middle of training, as Lightning's documentation shows it."""

    class Finder(package.callbacks.LearningRateFinder):
        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    return Finder(num_training_steps=3, min_lr=1e-5, max_lr=1e-4, update_attr=False)


@pytest.mark.filterwarnings("ignore:.*optimizer.step")
def test_a_trial_in_the_middle_leaves_no_trace(package, tmp_path, ours):  # P9, P8, P3
    from lightning_models import loader, model_class, quiet_trainer, same

    class Model(model_class(package)):
        def train_dataloader(self):
            return loader(6)

        def loss(self, index):  # the finder counts batches of its own
            return super().loss(0)

    def run(*callbacks):
        decay, model = ours(lambda p: 1e-3 * (1 - p), quantum=5e-5), Model(adam)
        trainer = quiet_trainer(package, decay, *callbacks, max_epochs=3, default_root_dir=tmp_path)
        trainer.fit(model)
        return decay, model

    (decay, model), (tried, tried_model) = run(), run(finder(package))
    assert tried.state_dict() == decay.state_dict()
    assert max(map(max, decay.state_dict()[0]["owed"])) > 0
    assert tried.coefficients == decay.coefficients
    assert not tried_model.trainer.optimizers[0]._optimizer_step_pre_hooks
    assert same(tried_model, model)


# fastai


def learner(bs=5, dls=None, **settings):
    pytest.importorskip("fastai")
    from fastai.learner import Learner

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    learn = Learner(dls or batches_of(bs), model, loss_func=mse_loss, **settings)
    learn.remove_cbs(list(learn.cbs)[-1:])
    learn.logger = lambda *_: None
    return learn


def batches_of(bs):
    from fastai.data.core import DataLoaders

    data = [(torch.ones(4) * i, torch.ones(1)) for i in range(40)]
    return DataLoaders.from_dsets(data, data[:5], bs=bs, shuffle=False, device="cpu", num_workers=0)


def test_fastai_with_batches_that_grow():  # P6, P13
    from fastai.callback.core import Callback

    from wd_callbacks.fastai import DecoupledWD
    from wd_callbacks.schedules import Linear

    class Grow(Callback):
        order = -1

        def before_epoch(self):
            self.learn.dls = batches_of([5, 10, 20][self.epoch])

    learn, decay = learner(), DecoupledWD(Linear(1, 0))
    learn.fit(3, cbs=[Grow(), decay])
    expected = [(epoch + i / n) / 3 for epoch, n in enumerate((8, 4, 2)) for i in range(n)]
    assert learn.recorder.hps["wd"] == pytest.approx([1 - progress for progress in expected])


def test_fastai_fits_within_a_fit():  # P1, P6
    from fastai.callback.core import Callback

    from wd_callbacks.fastai import DecoupledWD

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

    learn, seen = learner(), Seen()
    learn.add_cb(DecoupledWD(seen))
    learn.fit(2, cbs=Within())
    outer, within = [i / 16 for i in range(16)], [i / 8 for i in range(8)]
    assert seen.all == [*outer[:4], *within, *outer[4:]]


def test_fastai_batches_that_are_cancelled_after_their_step():  # P6
    from fastai.callback.core import Callback, CancelBatchException

    from wd_callbacks.fastai import DecoupledWD

    class Cancel(Callback):
        order = 0

        def after_step(self):
            raise CancelBatchException

    seen = Seen()
    learner().fit(2, cbs=[DecoupledWD(seen), Cancel()])
    assert seen.all == [i / 16 for i in range(16)]


@pytest.mark.parametrize("wd", [0.1, "schedule"])
def test_fastai_accumulates_over_a_loader_of_torch(wd):  # P5, P6
    from fastai.callback.training import GradientAccumulation
    from fastai.data.core import DataLoaders
    from torch.utils.data import DataLoader

    from wd_callbacks.fastai import DecoupledWD
    from wd_callbacks.schedules import Normalized

    data = [(torch.ones(4) * i, torch.ones(1)) for i in range(40)]
    dls = DataLoaders(DataLoader(data, batch_size=5), DataLoader(data[:5], batch_size=5))
    learn = learner(dls=dls)
    decay = DecoupledWD(Normalized(1.0) if wd == "schedule" else wd)
    learn.fit(2, cbs=[GradientAccumulation(10), decay])
    assert decay.coefficients == [1 / math.sqrt(8) if wd == "schedule" else 0.1]


def test_fastai_accumulates_over_batches_of_which_nothing_is_known():  # P5, P6
    from fastai.callback.training import GradientAccumulation
    from fastai.data.core import DataLoaders
    from torch.utils.data import DataLoader

    from wd_callbacks.fastai import DecoupledWD
    from wd_callbacks.schedules import Normalized

    data = [(torch.ones(5, 4) * i, torch.ones(5, 1)) for i in range(8)]
    dls = DataLoaders(*(DataLoader(data, batch_size=None) for _ in range(2)))
    learner(dls=dls).fit(1, cbs=[GradientAccumulation(10), DecoupledWD(0.1)])
    with pytest.raises(ValueError, match="steps"):
        learner(dls=dls).fit(1, cbs=[GradientAccumulation(10), DecoupledWD(Normalized(1.0))])


@pytest.mark.parametrize("wd_bn_bias", [True, False])
def test_fastai_with_another_model_from_the_second_epoch_on(wd_bn_bias):  # P2, P4, P7
    from functools import partial

    from fastai.callback.core import Callback
    from fastai.optimizer import Adam

    from wd_callbacks.fastai import DecoupledWD

    class Replace(Callback):
        order = -5

        def before_epoch(self):
            if self.epoch == 1:
                self.learn.model = learner().model
                self.learn.create_opt()
                self.opt.set_hypers(lr=0.05)

    def run(opt_func, *cbs):
        learn = learner(opt_func=opt_func, wd_bn_bias=wd_bn_bias, lr=0.05)
        learn.fit(2, cbs=[Replace(), *cbs])
        return list(learn.model.parameters())

    decay = DecoupledWD(0.1, quantum=0)
    ours = run(partial(Adam, wd=0.37, decouple_wd=False), decay)
    assert all(map(torch.equal, ours, run(partial(Adam, wd=0.1, decouple_wd=True))))
    assert decay.describe()[0].decaying[0] == (6 if wd_bn_bias else 2)
