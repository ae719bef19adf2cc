"""The events of a fastai fit: cancelled batches, validation in the middle, interrupted fits."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from fastai.callback.core import (
    Callback,
    CancelBatchException,
    CancelFitException,
    CancelStepException,
)
from fastai.optimizer import SGD, Adam, OptimWrapper, ranger
from fastai_helpers import (
    ADAMW,
    BATCHES,
    L2,
    WD,
    CpuMixedPrecision,
    DecayByHand,
    Trace,
    When,
    different,
    fitted,
    halves,
    learner,
    no_loss,
    state,
    still_learner,
    throw,
    wrapped,
)
from helpers import INNER_WD, Positions, evenly, pickled, weights, zero_gradients
from torch import nn

from wd_callbacks.fastai import DecoupledWD
from wd_callbacks.torch import DecoupledWD as TorchWD

# Steps that do not happen

CANCELLED = {0, 3, 9}
BEFORE, AFTER = DecoupledWD.order - 1, DecoupledWD.order + 1


@pytest.mark.parametrize("exception", [CancelBatchException, CancelStepException])
@pytest.mark.parametrize("order", [BEFORE, AFTER])
def test_a_cancelled_step_decays_nothing(exception, order):  # P1
    def cancel():
        return When("before_step", throw(exception), CANCELLED, order)

    own, used = fitted(ADAMW, cancel()), cancel()
    assert different(own, fitted(L2, used, DecoupledWD(WD))) == []
    assert used.hits == len(CANCELLED)
    assert different(own, fitted(ADAMW))
    learn = still_learner()  # the weight itself, where decay is all that happens
    learn.fit(2, cbs=[DecoupledWD(0.5, scale_by="none"), cancel()])
    assert learn.model[0].weight[0, 0] == 0.5 ** (2 * BATCHES - len(CANCELLED))


def test_an_overflow_decays_nothing():  # P1, P6 (the attempt counts)
    amp, schedule, trace = CpuMixedPrecision(), Positions(0.01), Trace()
    cbs = [amp, DecoupledWD(schedule, scale_by="none"), trace]
    learner(partial(Adam, wd=INNER_WD)).fit(2, cbs=cbs)
    skipped = set(range(2 * BATCHES)) - set(amp.steps)
    assert 0 in skipped
    assert skipped != set(range(len(skipped)))  # also in the middle
    assert schedule.seen == [i / (2 * BATCHES) for i in amp.steps]
    for i in skipped - {0}:
        assert trace.weights[i] == trace.weights[i - 1]


# Validation


class Interlude(Callback):
    """Validates and predicts between the epochs of a fit."""

    order = 500

    def __init__(self, event):
        self.event, self.inside, self.count = event, False, 0

    def __call__(self, event):
        if event == self.event and not self.inside:
            self.inside = True
            self.learn.validate()
            self.learn.get_preds(ds_idx=0)
            self.inside, self.count = False, self.count + 1


@pytest.mark.parametrize(
    ("event", "as_cbs"), [("after_epoch", True), ("after_train", False), ("after_validate", True)]
)
def test_validation_in_the_middle_of_a_fit(event, as_cbs):  # P4, P6
    # validate fires before_fit and after_fit too
    def one_cycle(learn, cbs):
        learn.fit_one_cycle(3, 0.05, cbs=cbs)

    def fit(decay):
        learn, interlude = learner(L2, cbs=None if as_cbs else decay), Interlude(event)
        one_cycle(learn, [interlude, *[decay] * as_cbs])
        assert interlude.count >= 3
        return state(learn)

    expected = fitted(ADAMW, Interlude(event), fit=one_cycle)
    assert different(expected, fit(DecoupledWD(WD, quantum=0))) == []
    schedule = Positions(0.01)
    fit(DecoupledWD(schedule))
    assert schedule.seen == evenly(3 * BATCHES)


def test_validation_alone():  # P3
    learn = learner(L2, cbs=DecoupledWD(WD))
    learn.create_opt()
    before = state(learn)
    learn.validate()
    learn.get_preds()
    assert different(before, state(learn)) == []
    learn.fit(2)
    learn.validate()
    assert different(fitted(ADAMW), state(learn)) == []
    assert learn.opt.hypers[0]["wd"] == INNER_WD


# The optimizer as others see it


class Watch(Callback):
    """Checks at every event what can be seen of the optimizer and its copies."""

    def __init__(self, order, opt):
        self.order, self.seen, self.hypers = order, set(), [dict(h) for h in opt.hypers]

    def __call__(self, event):
        self.seen.add(event)
        opt = self.learn.opt
        copied = copy.deepcopy(opt)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
        for hypers in (opt.hypers, groups, copied.hypers, pickled(opt).hypers):
            assert list(map(dict, hypers)) == self.hypers
        if isinstance(opt, OptimWrapper):
            for groups in (opt.state_dict()["param_groups"], copied.opt.param_groups):
                assert {g["weight_decay"] for g in groups} == {INNER_WD}
        else:
            assert opt.state_dict()["hypers"] == self.hypers


EVERY_EVENT = {
    *("before_fit", "before_epoch", "before_train", "before_batch", "after_pred", "after_loss"),
    *("before_backward", "after_backward", "before_step", "after_cancel_step", "after_step"),
    *("after_cancel_batch", "after_batch", "after_train", "before_validate", "after_validate"),
    *("after_epoch", "after_fit"),
}


WATCHED = {
    "Adam, before": (L2, BEFORE),
    "Adam, after": (L2, AFTER),
    "ranger": (partial(ranger, wd=INNER_WD, decouple_wd=False), 1000),
    "OptimWrapper": (wrapped(torch.optim.Adam, weight_decay=INNER_WD), -1000),
}


@pytest.mark.parametrize(("opt_func", "order"), WATCHED.values(), ids=WATCHED)
def test_the_own_wd_is_there_at_every_event(opt_func, order):  # P3
    learn = learner(opt_func, batches=4, splitter=halves)
    learn.create_opt()
    watch = Watch(order, learn.opt)
    cbs = [
        watch,
        When("before_step", throw(CancelStepException), {1, 7}, 900),  # 7 is the last
        When("before_step", throw(CancelBatchException), {2}, 900),
    ]
    learn.fit(2, cbs=[DecoupledWD(WD), *cbs])
    assert watch.seen >= EVERY_EVENT
    assert [h["wd"] for h in watch.hypers] == [INNER_WD] * 2
    assert "step" not in vars(learn.opt)


def test_a_copied_optimizer_steps_by_itself():
    # P3: a copy made right before the step is an optimizer as any other
    copies = []
    note = When("before_step", lambda learn: copies.append(copy.deepcopy(learn.opt)), {0}, 900)
    learner(partial(SGD, wd=0.0)).fit(1, cbs=[DecoupledWD(WD), note])
    params = [p for ps in copies[0].param_lists for p in ps]
    before = weights(params)
    zero_gradients(params)
    copies[0].step()
    assert all(map(torch.equal, before, params))


def test_a_step_by_hand_after_a_fit():
    # P3: also where the last step of the fit was cancelled at the last moment
    for exception in (CancelBatchException, CancelStepException, CancelFitException):
        learn = still_learner(cbs=DecoupledWD(0.5, scale_by="none"))
        last = When("before_step", throw(exception), {BATCHES - 1}, order=900)
        learn.fit(1, cbs=last)
        assert last.hits == 1
        learn.opt.step()
        assert learn.model[0].weight[0, 0] == 0.5 ** (BATCHES - 1)
        assert "step" not in vars(learn.opt)


def test_a_step_that_someone_else_replaced():
    # P3: nothing else about the optimizer changes
    learn = learner(L2)
    learn.create_opt()
    count, step = [], learn.opt.step

    def counted(*args, **kwargs):
        count.append(learn.opt.hypers[0]["wd"])
        return step(*args, **kwargs)

    learn.opt.step = counted
    learn.fit(2, cbs=DecoupledWD(WD))
    assert count == [0.0] * 2 * BATCHES
    assert learn.opt.step is counted
    assert different(state(learn), fitted(ADAMW)) == []


# Fits that are interrupted


def throw_in_step(exception):
    """An action that has the optimizer raise in its next step."""

    def action(learn):
        def stepper(p, wd, **_):
            learn.opt.cbs.remove(stepper)
            assert wd == 0.0
            raise exception

        stepper.defaults = {}
        learn.opt.cbs.append(stepper)

    return action


FAILURES = {  # event, action, order of the callback that raises, whether ours is of the Learner
    "before_batch": ("before_batch", throw, 0, False),
    "before our before_step": ("before_step", throw, BEFORE, False),
    "after our before_step": ("before_step", throw, AFTER, True),
    "in the step": ("before_step", throw_in_step, 1000, True),
    "before our after_step": ("after_step", throw, BEFORE, False),
    "after_batch": ("after_batch", throw, 0, True),
}


@pytest.mark.parametrize(("event", "action", "order", "stays"), FAILURES.values(), ids=FAILURES)
def test_a_fit_that_was_interrupted(event, action, order, stays):
    # P3: however training ends; P6: the next fit starts afresh; P1
    kind = KeyboardInterrupt if stays else RuntimeError
    schedule = Positions(WD)
    decay = DecoupledWD(schedule)
    of_learner, of_fit = ([decay], []) if stays else ([], [decay])
    learn = learner(L2, cbs=of_learner)
    with pytest.raises(kind, match="stop"):
        learn.fit(2, cbs=[*of_fit, When(event, action(kind("stop")), {3}, order)])
    assert schedule.seen
    schedule.seen.clear()
    assert learn.opt.hypers[0]["wd"] == INNER_WD
    assert set(learn.opt.hypers[0]) == {"lr", "mom", "sqr_mom", "eps", "wd"}
    learn.opt.zero_grad()  # else gradients of the batch that was not stepped are added

    def fresh(opt_func):
        """A Learner that goes on from here and never had the callback."""
        new = learner(opt_func, model=copy.deepcopy(learn.model))
        new.create_opt()
        new.opt.load_state_dict(copy.deepcopy(learn.opt.state_dict()))
        return new

    plain = fresh(L2)
    plain.fit(1)
    with learn.removed_cbs(of_learner):
        learn.fit(1)
    assert schedule.seen == []
    assert different(state(learn), state(plain)) == []
    own = fresh(partial(Adam, decouple_wd=True))
    own.fit(2, wd=WD)
    learn.fit(2, cbs=of_fit)
    assert different(state(learn), state(own)) == []
    assert schedule.seen == evenly(2 * BATCHES)
    assert "step" not in vars(learn.opt)


# Which parameters


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight
        nn.init.ones_(self.a.weight)

    def forward(self, x):
        return self.b(self.a(x))


def test_tied_parameters_decay_once():  # P2
    one_group, two_groups = [["a", "b"]], [["a"], ["b"]]
    for groups in (one_group, two_groups):

        def split(model, groups=groups):
            return [[getattr(model, name).weight for name in group] for group in groups]

        kwargs = {"model": Tied(), "splitter": split, "loss_func": no_loss}
        learn = learner(partial(SGD, decouple_wd=False), **kwargs)
        learn.fit(2, 0.5, cbs=DecoupledWD(1.0))
        assert learn.model.a.weight[0, 0].item() == 0.5**16


@pytest.mark.parametrize("train_bn", [True, False])
def test_frozen_layers_stay_untouched(train_bn):
    # P2: what has no gradient; fastai trains frozen norm layers all the same
    def frozen(opt_func, *cbs):
        learn = learner(opt_func, train_bn=train_bn, splitter=halves, wd_bn_bias=True)
        before = state(learn)
        learn.freeze()
        learn.fit(2, cbs=list(cbs))
        return before, state(learn)

    before, after = frozen(L2, DecoupledWD(WD))
    assert different(frozen(ADAMW)[1], after) == []
    names = {"0.weight", "0.bias"} | (set() if train_bn else {"1.weight", "1.bias"})
    every = {name for name, _ in learner().model.named_parameters()}
    assert set(different(before, after)) & every == every - names


def test_another_model_from_the_second_epoch_on():  # P2, P4, P7
    class Replace(Callback):
        order = -5

        def before_epoch(self):
            if self.epoch == 1:
                self.learn.model = learner().model
                self.learn.create_opt()
                self.opt.set_hypers(lr=0.05)

    decay = DecoupledWD(WD, quantum=0)
    learn = learner(L2, wd_bn_bias=False)
    learn.fit(2, cbs=[Replace(), decay])
    assert different(state(learn), fitted(ADAMW, Replace(), wd_bn_bias=False)) == []
    assert decay.describe()[0].decaying[0] == 3


# Refusals beside those of test_validation.py


def test_what_does_not_fit_the_groups_is_refused():  # P3, P10
    learn = learner(partial(SGD, wd=INNER_WD), splitter=halves)
    before = weights(learn.model)
    for wds, message in (
        ([0.1, 0.2, 0.3], "2 param groups"),
        ([0.1, 30.0], r"group 1.*lr 0\.05.*wd 30"),
    ):
        with pytest.raises(ValueError, match=message):
            learn.fit(1, cbs=DecoupledWD(wds))
        assert all(map(torch.equal, before, weights(learn.model)))
        assert [h["wd"] for h in learn.opt.hypers] == [INNER_WD] * 2


def test_a_decay_of_the_inner_optimizer_is_refused():  # P10
    learn = learner(wrapped(torch.optim.Adam))
    learn.create_opt()
    inner = TorchWD(learn.opt.opt, WD)
    before = state(learn)
    with pytest.raises(ValueError, match="DecoupledWD"):
        learn.fit(1, cbs=DecoupledWD(WD))
    assert different(before, state(learn)) == []
    inner.detach()
    learn.fit(2, cbs=DecoupledWD(WD))
    assert different(state(learn), fitted(wrapped(torch.optim.Adam), DecayByHand())) == []
