"""Invalid input: one table per kind, over all adapters.

A row holds an argument, an invalid value, the type of the error and a pattern that the message
contains, beside the name of the argument. No weight has changed then, and the optimizer works as
before. Left out: values that nobody passes (integers beyond a float, bytes, iterators).

At the end hypothesis draws states and coefficients; more of them, at random:

    HYPOTHESIS_PROFILE=deep pytest -n 0 tests/test_validation.py -k fuzz
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import deque
from functools import cache, partial

import numpy as np
import pytest
import torch
from helpers import (
    QUANTA,
    WithoutHooks,
    comparable,
    deferred,
    fuzz,
    params_of,
    random_gradients,
    zero_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wd_callbacks.schedules import Linear, Normalized, Timescale
from wd_callbacks.torch import DecoupledWD

LR, WD, OWN_WD, BATCHES = 0.05, 0.1, 0.3, 4
EITHER = (TypeError, ValueError)


# Runs of each adapter: two param groups, BATCHES batches


class Run:
    """A short training.

    Attributes:
        model: None until it is built.
        weights_before: The weights at the start, and before each batch that has started.
        values: What the second param group holds from batch number ``at`` on.
        given: What the callables return that a test passes as arguments.
    """

    def __init__(self, at=0, **values):
        self.model, self.at, self.values, self.given = None, at, values, 0.05
        self.weights_before = []

    @property
    def groups(self):
        return self.optimizer.param_groups

    def weights(self):
        return comparable(params_of(self.model))

    def start(self):
        self.weights_before.append(self.weights())

    def change(self):
        if len(self.weights_before) > self.at:
            self.groups[1].update(self.values)

    def check_works(self):
        """Checks that the optimizer has its options, and steps as a copy does (without hooks)."""
        for group in self.groups:
            assert (group["lr"], group["weight_decay"]) == (LR, OWN_WD)
        check_steps_as_a_copy(self.optimizer)
        DecoupledWD(self.optimizer, WD).detach()  # no other decay is attached


def check_steps_as_a_copy(optimizer):
    """Torch copies no hooks."""
    clone = copy.deepcopy(optimizer)
    for each in (optimizer, clone):
        random_gradients(each, 0)
        each.step()
    assert comparable(params_of(optimizer)) == comparable(params_of(clone))


def adam(*parts):
    groups = [{"params": params_of(part)} for part in parts]
    return torch.optim.Adam(groups, lr=LR, weight_decay=OWN_WD)


class PlainRun(Run):
    """Adam, two dtypes."""

    def __init__(self, at=0, **values):
        super().__init__(at, **values)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 1))
        self.optimizer = adam(self.model[:2], self.model[2:].to(torch.bfloat16))
        self.decay, self.steps = None, 0
        self.start()

    def attach(self, wd=WD, **arguments):
        defaults = {"model": self.model, "total_steps": 40, "steps_per_epoch": 10}
        self.decay = DecoupledWD(self.optimizer, wd, **{**defaults, **arguments})

    def set_gradients(self):
        random_gradients(self.model, self.steps)
        return torch.zeros(())

    def step(self, count=1, closure=False):
        for _ in range(count):
            self.set_gradients()
            self.optimizer.step(*[self.set_gradients] if closure else [])
            self.steps += 1

    def train(self, **arguments):
        self.attach(**{"total_steps": BATCHES, **arguments})
        for _ in range(BATCHES):
            self.start()
            self.change()
            self.step()

    def check_works(self):
        if self.decay is not None:
            self.decay.detach()
        super().check_works()


class FastaiRun(Run):
    is_wrapped = False

    @property
    def groups(self):
        return self.learn.opt.opt.param_groups if self.is_wrapped else self.learn.opt.hypers

    def train(self, *others, **arguments):
        decay = pytest.importorskip("wd_callbacks.fastai").DecoupledWD(**{"wd": WD, **arguments})
        self.build()
        self.fit(decay, *others)

    def build(self):
        from fastai_helpers import Adam, halves, learner, wrapped

        opt_func = wrapped(torch.optim.Adam) if self.is_wrapped else Adam
        options = {"lr": LR, "wd": OWN_WD, "splitter": halves}
        self.learn = learner(opt_func, batches=BATCHES, **options)
        self.model = self.learn.model
        self.learn.create_opt()
        self.learn.opt.set_hypers(wd=OWN_WD)
        self.start()

    def fit(self, *callbacks):
        from fastai_helpers import When

        watch = When("before_batch", lambda _: self.start())
        change = When("before_step", lambda _: self.change())
        self.learn.fit(1, cbs=[*callbacks, watch, change])

    def check_works(self):
        """Checks that it trains as a Learner without the callback that starts from here."""
        key = "weight_decay" if self.is_wrapped else "wd"
        assert [(group["lr"], group[key]) for group in self.groups] == [(LR, OWN_WD)] * 2
        self.learn.opt.zero_grad()
        clone = type(self)()
        clone.build()
        clone.model.load_state_dict(self.model.state_dict())
        clone.learn.opt.load_state_dict(copy.deepcopy(self.learn.opt.state_dict()))
        for run in (self, clone):
            run.fit()
        assert self.weights() == clone.weights() != self.weights_before[0]


class WrapperRun(FastaiRun):
    is_wrapped = True


class LightningRun(Run):
    def make(self, module):
        self.optimizer = adam(module.backbone, module.head)
        return self.optimizer

    def train(self, *others, **arguments):
        decay = pytest.importorskip("wd_callbacks.lightning").DecoupledWD(**{"wd": WD, **arguments})
        self.fit(decay, *others)

    def fit(self, *callbacks):
        import pytorch_lightning as pl
        from lightning_helpers import loader, model_class, quiet_trainer

        class Watch(pl.Callback):
            def on_train_batch_start(watch, *args):  # noqa: N805
                self.start()

            def on_before_optimizer_step(watch, *args):  # noqa: N805
                self.change()

        self.model = model_class(pl)(self.make)
        self.start()
        trainer = quiet_trainer(pl, *callbacks, Watch(), max_epochs=1)
        trainer.fit(self.model, loader(BATCHES))


class Regression(nn.Module):
    """A model as Hugging Face's Trainer wants it."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(3, 2), nn.Linear(2, 1)

    def forward(self, x, y):
        return {"loss": (self.head(self.backbone(x)) - y).square().mean()}


class TrainerRun(Run):
    decay = None

    def train(self, *others, **arguments):
        module = pytest.importorskip("wd_callbacks.transformers")
        self.decay = module.DecoupledWD(**{"wd": WD, **arguments})
        self.fit(self.decay, *others)

    def build(self):
        self.model = Regression()
        self.optimizer = adam(self.model.backbone, self.model.head)

    def fit(self, *callbacks):
        import transformers

        class Watch(transformers.TrainerCallback):
            def on_step_begin(watch, *args, **kwargs):  # noqa: N805
                self.start()

            def on_pre_optimizer_step(watch, *args, **kwargs):  # noqa: N805
                self.change()

        self.build()
        self.start()
        quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
        transformers.Trainer(
            self.model,
            transformers.TrainingArguments(
                per_device_train_batch_size=1, num_train_epochs=1, lr_scheduler_type="constant",
                **quiet,
            ),
            train_dataset=[{"x": torch.ones(3), "y": torch.ones(1)}] * BATCHES,
            callbacks=[*callbacks, Watch()],
            optimizers=(self.optimizer, None),
        ).train()  # fmt: skip

    def check_works(self):
        self.decay.detach()  # the Trainer does not say that training ended in an error
        super().check_works()


RUNS = {
    "plain": PlainRun,
    "fastai": FastaiRun,
    "OptimWrapper": WrapperRun,
    "lightning": LightningRun,
    "transformers": TrainerRun,
}


def check_message(error, types, *patterns):
    assert type(error) in (types if isinstance(types, tuple) else (types,)), repr(error)
    for pattern in patterns:
        assert re.search(pattern, str(error), re.DOTALL), str(error)


def check_refused(run, act, types, *patterns, batch=0):
    """Checks that ``act`` raises in this batch, 0 for before the first, and changes no weight."""
    with pytest.raises(types) as caught:
        act()
    check_message(caught.value, types, *patterns)
    if run.model is not None:
        assert len(run.weights_before) == batch + 1
        assert run.weights() == run.weights_before[-1]


# Arguments


def never(name, parameter):
    return False


def returns_nothing(name, parameter):
    name.endswith("bias")


def raises(*_):
    raise LookupError("of the user")


def takes_one(name):
    return True


def nan_later(progress):
    return math.nan if progress > 0.4 else WD


COEFFICIENT = "number or a schedule"
GROUPS = "2 param groups.* one value per group"
NEAREST = "matches no parameter.*nearest"

ARGUMENTS = [  # argument, value, error, pattern
    ("wd", -0.1, ValueError, r"at least 0, got -0\.1"),
    ("wd", math.nan, ValueError, "got nan"),
    ("wd", -math.inf, ValueError, "got -inf"),
    ("wd", np.float32("nan"), ValueError, "nan"),
    ("wd", "1e-4", TypeError, rf"{COEFFICIENT}.*'1e-4' \(str\)"),
    ("wd", True, TypeError, rf"{COEFFICIENT}.*True \(bool\)"),
    ("wd", 1j, TypeError, COEFFICIENT),
    ("wd", np.ones(2), TypeError, rf"{COEFFICIENT}.*\(ndarray\)"),
    ("wd", torch.ones(2), TypeError, rf"{COEFFICIENT}.*\(Tensor\)"),
    ("wd", {0.1}, TypeError, rf"{COEFFICIENT}.*0\.1.*\(set\)"),
    ("wd", Normalized, TypeError, "Normalized"),  # the class instead of an instance
    ("wd", [], ValueError, "empty"),
    ("wd", deque(), ValueError, "empty"),
    ("wd", [0.1, -1], ValueError, r"wd\[1\].* -1"),
    ("wd", (0.1, math.nan), ValueError, r"wd\[1\].* nan"),
    ("wd", [0.1, None], TypeError, r"wd\[1\].*None"),
    ("wd", [0.1, "0.1"], TypeError, r"wd\[1\].*'0\.1'"),
    ("wd", [[0.1], [0.2]], TypeError, r"wd\[0\].*\[0\.1\]"),
    ("wd", [0.1], ValueError, f"1 value.*{GROUPS}"),
    ("wd", range(3), ValueError, f"3 values.*{GROUPS}"),
    ("wd", {}, ValueError, "empty"),
    ("wd", {None: 0.1}, TypeError, "key.*None"),
    ("wd", {True: 0.1}, TypeError, "key.*True"),
    ("wd", {0.5: 0.1}, TypeError, r"key.*0\.5"),
    ("wd", {nn.Linear(1, 1): 0.1}, TypeError, "instance of Linear"),
    ("wd", {"*": 0.1, 0: 0.1}, TypeError, r"\['\*', 0\]"),
    ("wd", {"*": -0.1}, ValueError, r"wd\['?\*'?\].* -0\.1"),
    ("wd", {"*": math.nan}, ValueError, r"wd\['?\*'?\].* nan"),
    ("wd", {"*": "0.1"}, TypeError, r"wd\['?\*'?\].*'0\.1'"),
    ("wd", {"*": None}, TypeError, r"wd\['?\*'?\].*None"),
    ("wd", {"*": [0.1, 0.1]}, TypeError, r"wd\['?\*'?\].*0\.1, 0\.1"),
    ("wd", {"*": {"*": 0.1}}, TypeError, r"wd\['?\*'?\].*dict"),
    ("wd", {"*": 0.1, "decoder.*": 0.1}, ValueError, rf"decoder\.\*.*{NEAREST}"),  # P7, P14
    ("wd", {nn.Conv2d: 0.1}, ValueError, "Conv2d.*matches no parameter"),
    ("wd", {-1: 0.1}, EITHER, "key.*-1"),
    ("wd", {0: -0.1}, ValueError, r"wd\[0\].* -0\.1"),
    ("wd", {0: "0.1"}, TypeError, r"wd\[0\].*'0\.1'"),
    ("wd", {0: []}, ValueError, r"wd\[0\].*empty"),
    ("wd", {0: {0: 0.1}}, TypeError, r"wd\[0\]"),
    ("scale_by", None, TypeError, "'lr_ratio'.*None"),
    ("scale_by", 2, TypeError, r"callable.*2 \(int\)"),
    ("scale_by", torch.ones(2), TypeError, "callable.*Tensor"),
    ("scale_by", {"lr"}, TypeError, r"callable.*\(set\)"),
    ("scale_by", "LR", ValueError, "'lr_ratio', 'lr_squared', 'none'.*'LR'"),
    ("scale_by", "", ValueError, "'none'.*''"),
    ("scale_by", [], ValueError, "empty"),
    ("scale_by", ["lr", "no"], ValueError, r"scale_by\[1\].*'no'"),
    ("scale_by", ["lr", ["lr"]], TypeError, r"scale_by\[1\].*\['lr'\]"),
    ("scale_by", ["lr"], ValueError, f"1 value.*{GROUPS}"),
    ("max_lr", 0, ValueError, "above 0, got 0"),
    ("max_lr", -1, ValueError, "above 0, got -1"),
    ("max_lr", math.nan, ValueError, "got nan"),
    ("max_lr", math.inf, ValueError, "got inf"),
    ("max_lr", "1", TypeError, "number.*'1'"),
    ("max_lr", True, TypeError, "number.*True"),
    ("max_lr", len, TypeError, "number.*len"),
    ("max_lr", torch.ones(2), TypeError, "number.*Tensor"),
    ("max_lr", [], ValueError, "empty"),
    ("max_lr", [1.0], ValueError, f"1 value.*{GROUPS}"),
    ("max_lr", [1.0, math.nan], ValueError, r"max_lr\[1\].*nan"),
    ("max_lr", [1.0, None], TypeError, r"max_lr\[1\].*None"),
    ("quantum", -1e-3, ValueError, r"at least 0, got -0\.001"),
    ("quantum", 1, ValueError, "below 1, got 1"),
    ("quantum", math.nan, ValueError, "got nan"),
    ("quantum", "small", TypeError, "number.*'small'"),
    ("quantum", True, TypeError, "number.*True"),
    ("quantum", [0.1, 0.1], TypeError, r"number.*\(list\)"),
    ("verbose", "no", TypeError, "True or False.*'no'"),
    ("cautious", "no", TypeError, "True or False.*'no'"),
    ("cautious", 0.5, TypeError, r"True or False.*0\.5"),
    ("anchor", "zero", TypeError, "'initial'.*'zero'"),
    ("anchor", 0.0, TypeError, r"mapping.*0\.0"),
    ("anchor", [torch.ones(1)], TypeError, "mapping.*tensor"),
    ("anchor", torch.ones(2), TypeError, "mapping.*Tensor"),
    ("anchor", np.ones(2), TypeError, "mapping.*ndarray"),
    ("anchor", nn.Linear(1, 1), TypeError, "mapping.*Linear"),
    ("anchor", {"weight": 1.0}, TypeError, r"anchor\['weight'\].*1\.0.*tensor"),
    ("anchor", {"decoder.weight": torch.ones(1)}, ValueError, "decoder.weight"),  # P15
    ("anchor", {}, ValueError, "anchor"),  # P15: it names nothing
    ("exclude", None, TypeError, "None.*'bias'"),
    ("exclude", 1, TypeError, "1.*glob"),
    ("exclude", [["bias"]], TypeError, r"\['bias'\].*predicate"),
    ("exclude", {"bias": True}, TypeError, "bias.*True"),
    ("exclude", torch.ones(2), TypeError, "Tensor.*glob"),
    ("exclude", "decoder.*", ValueError, rf"decoder\.\*.*{NEAREST}"),  # P7
    ("exclude", ["bias", ""], ValueError, f"''.*{NEAREST}"),
    ("exclude", "Bias", ValueError, f"Bias.*{NEAREST}"),
    ("exclude", nn.Conv2d, ValueError, "Conv2d.*matches no parameter"),
    ("exclude", "torch.nn.Conv2d", ValueError, rf"torch\.nn\.Conv2d.*{NEAREST}"),
    ("exclude", "no.such.Module", ValueError, rf"no\.such\.Module.*{NEAREST}"),
    ("exclude", never, ValueError, "never.*matches no parameter"),
    ("exclude", returns_nothing, ValueError, "returns_nothing.*matches no parameter"),
    ("exclude", raises, LookupError, r"of the user.*at parameter '\w+\.weight'"),
    ("exclude", takes_one, TypeError, r"positional.*at parameter '\w+\.weight'"),
    ("exclude", lambda *_: torch.ones(2), RuntimeError, "ambiguous.*at parameter"),
    ("exclude", nn.Linear(1, 1), TypeError, "instance of Linear.*type"),
    ("total_step", 9, TypeError, "unexpected keyword"),
]
OF_OPTIMIZERS = [
    ("wd", {1: 0.1}, ValueError, r"optimizers.*\[1\].*\[0\]"),
    ("wd", {0: 0.1, 1: 0.1}, ValueError, r"optimizers.*\[0, 1\].*\[0\]"),
]
OF_ONE_OPTIMIZER = [
    ("wd", {index: 0.1}, TypeError, rf"optimizer.*{{{index}: 0\.1}}") for index in (0, 1)
]
WHOLE = "whole number of at least 1.*"
PLAIN = [
    *(("total_steps", value, EITHER, f"{WHOLE}{value}") for value in (0, -1, 2.5, 10.0, math.nan)),
    *(("total_steps", value, EITHER, WHOLE) for value in ("9", True, [9], torch.tensor([9, 9]))),
    *(("steps_per_epoch", value, EITHER, f"{WHOLE}{value}") for value in (0, 2.5, "3")),
    *(("progress", value, TypeError, "callable.*got") for value in (0.5, "0.5", [len])),
    *(("model", value, TypeError, r"torch\.nn\.Module") for value in ("m", [1], nn.Linear)),
]
INDEX = "index.*whole number of at least 0"
LIGHTNING = [
    *(("optimizers", value, EITHER, INDEX) for value in (-1, "0", 1.0, True, [], [0, -1], {0})),
    ("optimizers", [0, 0], ValueError, r"twice.*\[0, 0\]"),
    ("optimizers", 1, ValueError, r"1.*1 optimizer"),
]


def in_short(value):
    return repr(value)[:30].split(" at ")[0]


def argument_rows():
    of_adapters = {
        **{adapter: [*ARGUMENTS, *OF_ONE_OPTIMIZER] for adapter in RUNS},
        "plain": [*ARGUMENTS, *OF_ONE_OPTIMIZER, *PLAIN],
        "lightning": [*ARGUMENTS, *OF_OPTIMIZERS, *LIGHTNING],
    }
    return [
        pytest.param(adapter, *row, id=f"{adapter} {row[0]}={in_short(row[1])}")
        for adapter, rows in of_adapters.items()
        for row in rows
    ]


@pytest.mark.parametrize(("adapter", "argument", "value", "error", "pattern"), argument_rows())
def test_arguments(adapter, argument, value, error, pattern):  # P7, P10
    run, named = RUNS[adapter](), f"{argument}|in the predicate"
    check_refused(run, lambda: run.train(**{argument: value}), error, named, pattern)
    if run.model is not None:
        run.check_works()


def returns_none(run):
    run.model.no_weight_decay = lambda: None
    return {"exclude": "marked"}


def no_lr(run):
    for group in run.groups:
        del group["lr"]
    return {}


def no_own_wd(run):
    for group in run.groups:
        del group["weight_decay"]
    return {"wd": None}


@pytest.mark.parametrize(
    ("prepare", "error", "pattern"),
    [
        (
            lambda run: {"wd": Linear(0, 1), "total_steps": None},
            ValueError,
            "total_steps.*progress",
        ),
        (lambda run: {"exclude": "bias", "model": None}, ValueError, "exclude.*give model"),
        (lambda run: {"wd": {"*": WD}, "model": None}, ValueError, "wd.*give model"),
        (
            lambda run: {"anchor": run.model.state_dict(), "model": None},
            ValueError,
            "anchor.*give model",
        ),
        (
            lambda run: {"anchor": {"0.weight": torch.ones(2, 3)}},
            ValueError,
            r"anchor\['0.weight'\].*\(2, 3\).*\(3, 3\)",
        ),
        (lambda run: {"cautious": True}, ValueError, "cautious.*bfloat16"),  # P16
        (lambda run: {"cautious": True, "quantum": 0.1}, ValueError, r"cautious.*quantum=0\.1"),
        (returns_none, TypeError, r"no_weight_decay\(\).*None"),
        (no_lr, ValueError, "scale_by='lr'.*learning rate.*'none'"),
        (no_own_wd, ValueError, "wd=None.*none"),
    ],
)
def test_arguments_that_need_something_else(prepare, error, pattern):  # P7, P10
    run = PlainRun()
    check_refused(run, lambda: run.attach(**prepare(run)), error, pattern)
    for group in run.groups:
        group.update(lr=LR, weight_decay=OWN_WD)
    run.check_works()


# At a step


AT_A_STEP = [  # arguments, what changes in the second group, error, pattern, batch
    ({"wd": 30.0}, {}, ValueError, r"group 0.*1\.5.*lr 0\.05.*wd 30", 1),
    ({"wd": [WD, 20]}, {}, ValueError, r"group 1.*lr 0\.05.*wd 20", 1),
    ({"wd": 1.0, "scale_by": "none"}, {}, ValueError, "group 0.*wd 1.*'none'", 1),
    ({"scale_by": lambda group: -1.0}, {}, ValueError, r"group 0.*-0\.1", 1),
    ({"scale_by": lambda group: "0.1"}, {}, TypeError, "scale_by.*'0.1'.*number", 1),
    ({"wd": lambda progress: progress - 0.5}, {}, ValueError, r"wd.*progress 0 .*-0\.5", 1),
    ({"wd": [WD, nan_later]}, {}, ValueError, r"wd\[1\].*nan_later.*progress 0\.5.*nan", 3),
    ({"wd": lambda progress: "0.1"}, {}, TypeError, "wd.*'0.1'.*number", 1),
    ({"wd": raises}, {}, LookupError, "of the user", 1),
    ({"wd": lambda: 0.1}, {}, TypeError, "positional argument", 1),
    ({}, {"lr": 20.0}, ValueError, r"group 1.* 2.*lr 20\.0.*wd 0\.1.*'lr'", 3),
    ({}, {"lr": math.nan}, ValueError, "group 1.*nan", 3),
    ({}, {"lr": -LR}, ValueError, r"group 1.*-0\.05", 3),
    ({}, {"lr": None}, TypeError, "group 1.*lr.*None.*number", 3),
    ({"wd": None}, {"weight_decay": -1.0}, ValueError, r"group 1.*-1\.0", 3),
    ({"wd": None}, {"weight_decay": math.nan}, ValueError, "group 1.*nan", 3),
]


@pytest.mark.parametrize("adapter", RUNS)
@pytest.mark.parametrize(("arguments", "values", "error", "pattern", "batch"), AT_A_STEP)
def test_values_at_a_step(adapter, arguments, values, error, pattern, batch):  # P10
    if adapter == "fastai" and "weight_decay" in values:
        values = {"wd": values["weight_decay"]}
    run = RUNS[adapter](batch, **values)
    check_refused(run, lambda: run.train(**arguments), error, pattern, batch=batch)
    run.values = {key: LR if key == "lr" else OWN_WD for key in values}
    run.change()
    run.values = {}
    run.check_works()


KEYS = ("lr", "weight_decay", "max_lr", "initial_lr")  # of the second param group
SOURCES = {
    "wd": lambda run: {"wd": lambda progress: run.given},
    "wd[1]": lambda run: {"wd": [WD, lambda progress: run.given]},
    "wd['2.*']": lambda run: {"wd": {"2.*": lambda progress: run.given, "*": WD}},
    "scale_by": lambda run: {"scale_by": lambda group: run.given},
    "progress": lambda run: {"wd": Linear(WD, WD), "progress": lambda: run.given},
    "lr": lambda run: {},
    "weight_decay": lambda run: {"wd": None},
    "max_lr": lambda run: {"scale_by": "lr_ratio"},
    "initial_lr": lambda run: {"scale_by": "lr_squared"},
}
NOT_NUMBERS = [None, "0.1", [0.1], torch.ones(2), 1j, True]
NOT_COEFFICIENTS = [-0.1, torch.tensor(-0.125), math.nan, math.inf, torch.tensor(math.nan)]


def source_rows():
    """Every pair, but None for what may be unknown, and progress below 0, which is clamped."""
    for source in SOURCES:
        for value in NOT_NUMBERS if "_lr" not in source else NOT_NUMBERS[1:]:
            yield source, value, EITHER if value is None and source == "lr" else TypeError
        for value in NOT_COEFFICIENTS if source != "progress" else NOT_COEFFICIENTS[2:]:
            yield source, value, ValueError


@pytest.mark.parametrize(("source", "value", "error"), list(source_rows()))
def test_values_from_the_user_s_code(source, value, error):  # P6, P10
    """A refused step is none: with the value mended, the run goes on as one that never had it."""
    is_number = error is ValueError
    shown = rf"{float(value):g}|{0.1 * float(value):g}" if is_number else re.escape(repr(value))
    name = "max_lr" if is_number and "_lr" in source else source
    for steps in (0,) if "_lr" in source else (0, 2):  # max_lr is read once
        run = with_source(source, steps)
        set_value(run, source, value)
        weights, owed = run.weights(), deferred(run.decay)
        with pytest.raises(error) as caught:
            run.step(closure=steps > 0)
        check_message(caught.value, error, re.escape(name).replace("_", "[ _]"), shown)
        assert run.weights() == weights
        assert sum(deferred(run.decay)) == sum(owed)
        assert going_on(run, source) == expected(source, steps)


def with_source(source, steps):
    run = PlainRun()
    set_value(run, source, 0.05)
    run.attach(**SOURCES[source](run))
    run.step(steps)
    return run


def going_on(run, source):
    for value in (0.05, 0.025):
        set_value(run, source, value)
        run.step(2)
    return run.weights(), comparable(run.decay.state_dict())


@cache
def expected(source, steps):
    return going_on(with_source(source, steps), source)


def set_value(run, source, value):
    if source in KEYS:
        run.groups[1][source] = value
    else:
        run.given = value


def new_layer(entry):
    """A model that has another layer since ``entry`` was given."""

    def prepare(run):
        run.attach(exclude=["*.bias", entry])
        run.step(2)
        run.model.append(nn.Linear(2, 2))
        run.optimizer.add_param_group({"params": list(run.model[3].parameters())})

    return prepare


def raises_for_the_new(name, parameter):
    return raises() if name.startswith("3.") else name == "0.weight"


def without_its_layer(run):
    new_layer("1.weight")(run)
    run.model[1] = nn.Identity()


def too_few_values(run):
    run.attach([WD, WD])
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def own_wd_is_none(run):
    run.attach()
    run.groups[1]["weight_decay"] = None


def lr_of_0(**arguments):
    def prepare(run):
        for group in run.groups:
            group["lr"] = 0.0
        run.attach(**arguments)

    return prepare


def attached(**arguments):
    return lambda run: run.attach(**arguments)


LACKING = [
    (lr_of_0(scale_by="lr_ratio"), "group 0.*lr_ratio.*max_lr"),
    (lr_of_0(wd=Timescale(steps=9)), "Timescale.*steps=9.*max_lr"),
    (attached(wd=Timescale(steps=9), scale_by=len), "Timescale.*steps=9.*max_lr"),
    (attached(wd=Timescale(epochs=3), steps_per_epoch=None), "steps_per_epoch"),
    (attached(wd=Timescale(epochs=0.1)), "Timescale.*above 1, got 1"),
    (attached(wd=Normalized(0.5), total_steps=None, progress=lambda: 0.0), "Normalized.*steps"),
]


@pytest.mark.parametrize(("prepare", "pattern"), LACKING)
def test_what_the_run_lacks(prepare, pattern):  # P6, P10
    run = PlainRun()
    check_refused(run, lambda: (prepare(run), run.step()), ValueError, pattern)
    for group in run.groups:
        group["lr"] = LR
    run.check_works()


LATER = [
    (new_layer(raises_for_the_new), LookupError, "of the user"),
    (without_its_layer, ValueError, "exclude.*1.weight.*matches no parameter"),
    (too_few_values, ValueError, "wd.*2 values.*3 param groups"),
    (own_wd_is_none, TypeError, "group 1.*weight_decay.*None.*number"),
    (attached(progress=raises), LookupError, "of the user"),
    (attached(progress=lambda step: 0.1), TypeError, "positional argument"),
    (attached(wd=nn.Linear(1, 1)), TypeError, "must be Tensor"),
]


@pytest.mark.parametrize(("prepare", "error", "pattern"), LATER)
def test_refused_at_a_step(prepare, error, pattern):  # P6, P7, P10
    run = PlainRun()
    prepare(run)
    weights, steps = run.weights(), run.decay.steps
    for _ in range(2):
        with pytest.raises(error) as caught:
            run.step()
        check_message(caught.value, error, pattern)
        assert run.weights() == weights
        assert run.decay.steps == steps
    run.decay.detach()
    run.groups[1].update(lr=LR, weight_decay=OWN_WD)
    check_steps_as_a_copy(run.optimizer)


def test_a_warning_as_an_error_changes_nothing():  # P10
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    for p in weights:
        p.grad = torch.ones(2, 2).to_sparse()
        DecoupledWD(optimizer := torch.optim.SGD([p], lr=LR), WD)
        with warnings.catch_warnings():
            if p is weights[0]:
                warnings.simplefilter("error")
                with pytest.raises(UserWarning, match="sparse gradient"):
                    optimizer.step()
                assert torch.equal(p, torch.ones(2, 2))
            warnings.simplefilter("ignore")
            optimizer.step()
    assert torch.equal(*weights)


# Other decays on the optimizer


def test_two_decays():  # P10
    run = PlainRun()
    run.attach()
    attach = partial(DecoupledWD, run.optimizer, WD)
    check_refused(run, attach, ValueError, "Adam.*attached already.*detach")
    run.check_works()


@pytest.mark.parametrize("adapter", ["fastai", "OptimWrapper", "lightning", "transformers"])
def test_two_callbacks(adapter):  # P10
    run = RUNS[adapter]()
    if adapter == "lightning":
        second = pytest.importorskip("wd_callbacks.lightning").DecoupledWD(WD, optimizers=0)
    else:
        module = "transformers" if adapter == "transformers" else "fastai"
        second = pytest.importorskip(f"wd_callbacks.{module}").DecoupledWD(WD)
    check_refused(run, lambda: run.train(second), ValueError, "two DecoupledWD|attached already")
    run.check_works()


@pytest.mark.parametrize("adapter", ["OptimWrapper", "lightning", "transformers"])
def test_a_callback_beside_a_plain_decay(adapter):  # P10
    run, decays = RUNS[adapter](), []
    name = "make" if adapter == "lightning" else "build"
    original = getattr(run, name)

    def with_a_decay(*args):
        made = original(*args)
        optimizer = run.learn.opt.opt if adapter == "OptimWrapper" else run.optimizer
        decays.append(DecoupledWD(optimizer, WD))
        return made

    setattr(run, name, with_a_decay)
    check_refused(run, run.train, ValueError, "Adam.*attached already")
    decays[0].detach()
    run.check_works()


def test_lightning_refuses_an_optimizer_without_hooks():  # P5
    run = LightningRun()
    make = run.make
    run.make = lambda module: WithoutHooks(make(module))
    check_refused(run, run.train, ValueError, "WithoutHooks.*hooks.*'base'")


ADAPTERS = {
    "wd_callbacks.torch": ("fastai", "lightning", "transformers"),
    "wd_callbacks.fastai": ("lightning", "transformers"),
    "wd_callbacks.lightning": ("fastai", "transformers"),
    "wd_callbacks.transformers": ("fastai", "lightning"),
}


@pytest.mark.parametrize(
    ("adapter", "framework"), [(it, other) for it, others in ADAPTERS.items() for other in others]
)
def test_an_adapter_in_another_framework_s_trainer(adapter, framework):  # P10
    module, right = pytest.importorskip(adapter), f"wd_callbacks.{framework}"
    pytest.importorskip(right)
    run, other = RUNS[framework](), PlainRun()
    if adapter == "wd_callbacks.torch":
        decay = module.DecoupledWD(other.optimizer, WD)
    else:
        decay = module.DecoupledWD(WD)
    if framework == "fastai":
        run.build()
    with pytest.raises(TypeError) as caught:
        run.fit(decay)
    check_message(caught.value, TypeError, f"of {adapter}.* {right}")


@pytest.mark.parametrize("adapter", ["fastai", "lightning", "transformers"])
def test_nothing_to_describe_before_training(adapter):  # P10
    decay = pytest.importorskip(f"wd_callbacks.{adapter}").DecoupledWD(WD)
    with pytest.raises(ValueError, match="describe"):
        decay.describe()


# What looks odd and is accepted


def only_decays(dtypes=((torch.float64,), (torch.float64,)), **options):
    """An optimizer whose weights, all 1, have gradients of 0."""
    groups = [[nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in group] for group in dtypes]
    optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=0.1, **options)
    zero_gradients(optimizer)
    return optimizer


def returning(value):
    return {"wd": lambda progress: value, "total_steps": 9}


ACCEPTED = [
    ({"wd": np.float32(0.5)}, [0.5, 0.5]),
    ({"wd": np.int64(1)}, [1, 1]),
    ({"wd": deque([0.5, 0])}, [0.5, 0]),
    ({"wd": (0.5, lambda progress: 1), "total_steps": 9}, [0.5, 1]),
    ({"wd": Linear(0.5, 1), "total_steps": np.int64(3)}, [0.5, 0.5]),
    ({"wd": Linear(0.5, 1), "progress": lambda: -0.5}, [0.5, 0.5]),
    ({"wd": Linear(0.5, 1), "progress": lambda: 1.5}, [1, 1]),
    ({"wd": Linear(0, 1), "progress": lambda: torch.tensor(0.5)}, [0.5, 0.5]),
    (returning(torch.tensor(0.5)), [0.5, 0.5]),
    (returning(np.float32(0.5)), [0.5, 0.5]),
    ({"wd": 0.5, "exclude": set()}, [0.5, 0.5]),
    ({"wd": 0.5, "model": nn.Linear(1, 1)}, [0.5, 0.5]),
    ({"wd": 0.5, "verbose": None}, [0.5, 0.5]),
]


@pytest.mark.parametrize(("arguments", "coefficients"), ACCEPTED)
def test_accepted_arguments(arguments, coefficients, recwarn):
    optimizer = only_decays()
    decay = DecoupledWD(optimizer, quantum=0, **arguments)
    optimizer.step()
    assert decay.coefficients == pytest.approx(coefficients)
    for group, wd in zip(optimizer.param_groups, coefficients):
        assert group["params"][0].tolist() == pytest.approx([1 - 0.1 * wd] * 3, rel=1e-12)
    assert not recwarn.list


@pytest.mark.parametrize(
    "change",
    [
        lambda group: group["params"].clear(),
        lambda group: setattr(group["params"][0].requires_grad_(False), "grad", None),
        lambda group: group.update(max_lr=None),  # not used
        lambda group: group.update(weight_decay=-math.inf),  # not used
    ],
)
def test_accepted_groups(change, recwarn):
    optimizer = only_decays(weight_decay=OWN_WD)
    change(optimizer.param_groups[0])
    DecoupledWD(optimizer, 0.5)
    optimizer.step()
    for p in params_of(optimizer):
        assert torch.equal(p, torch.full_like(p, 1 if p.grad is None else 0.95))
    assert not recwarn.list


# Saved states


def deferring(steps=9):
    """A run that has deferred decay in both groups, and applied some in the second one."""
    run = PlainRun()
    run.attach([lambda progress: 2e-6 * (1 - progress / 2), 0.1])
    run.step(steps)
    return run


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


def having(key, value):
    return lambda state: {**state, key: value(state[key]) if callable(value) else value}


def first_is(value):
    """Nested lists with the very first number replaced."""

    def change(values):
        head, *tail = values
        return [first_is(value)(head) if isinstance(head, list) else value, *tail]

    return change


def other_state():
    optimizer = only_decays()
    decay = DecoupledWD(optimizer, WD)
    optimizer.step()
    return decay.state_dict()


NO_STATE = "no state of a DecoupledWD"
AMOUNTS = [math.nan, math.inf, -1e-9, "0", None, []]
STATES = [
    *((lambda state, v=v: v, NO_STATE) for v in ({}, None, [], "steps", 5)),
    (lambda state: [state], NO_STATE),
    (lambda state: {0: state}, NO_STATE),
    (lambda state: PlainRun().optimizer.state_dict(), NO_STATE),
    (lambda state: other_state(), r"\[1, 1\] parameters.*\[4, 2\]"),
    *(
        (without(key), f"{NO_STATE}.*{key}")
        for key in ("steps", "total_steps", "lr_max", "no_decay", "owed", "payments", "due")
    ),
    *((having("steps", value), "steps") for value in (None, "3", 2.5, math.nan, -1, [1])),
    *(
        (having(key, value), f"{key}|parameters")
        for key in ("owed", "payments", "due", "lr_max", "no_decay")
        for value in (None, 5, "ab", [None], lambda old: old[:-1], lambda old: [*old, old[-1]])
    ),
    *((having("owed", first_is(value)), "owed") for value in (*AMOUNTS, 40.0)),
    *((having("due", first_is(value)), "due") for value in AMOUNTS),
    *((having("payments", first_is(value)), "payments") for value in (*AMOUNTS, 1.5)),
    *((having("lr_max", first_is(value)), "lr_max") for value in (-1, 0.0, "1", math.inf)),
    *((having("no_decay", first_is(value)), "no_decay") for value in ("0", None, 2)),
    *((having(key, lambda old: [old[0][:-1], *old[1:]]), key) for key in ("owed", "payments")),
]


@cache
def resumed():
    return later(deferring())


def later(run):
    run.step(9)
    return run.weights(), comparable(run.decay.state_dict())


@pytest.mark.parametrize(("change", "pattern"), STATES)
def test_states(change, pattern):  # P9, P10
    run = deferring()
    state, weights = run.decay.state_dict(), run.weights()
    with pytest.raises(EITHER) as caught:
        run.decay.load_state_dict(change(copy.deepcopy(state)))
    check_message(caught.value, EITHER, f"{pattern}|the state is of|lists")
    assert run.decay.state_dict() == state
    assert run.weights() == weights
    assert later(run) == resumed()


def test_deferred_decay_shows_in_the_comparison():
    """Negative control of the test above."""
    run = deferring()
    owed = [[0.0] * len(row) for row in run.decay.state_dict()["owed"]]
    run.decay.load_state_dict({**run.decay.state_dict(), "owed": owed})
    assert later(run)[0] != resumed()[0]


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        (lambda state: state, []),
        (having("of a later version", {"a": [math.nan, None]}), []),
        (having("arguments", {}), []),
        (having("total_steps", 30), ["total_steps was 30 .* 40 "]),
        (having("total_steps", None), ["total_steps was None .* 40 "]),
    ],
)
def test_accepted_states(change, warned):  # P9
    run = deferring()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.decay.load_state_dict(change(run.decay.state_dict()))
    assert len(caught) == len(warned)
    assert all(re.search(pattern, str(w.message)) for pattern, w in zip(warned, caught))
    assert later(run)[0] == resumed()[0]


@pytest.mark.parametrize("change", [having("total_steps", 30), having("arguments", {"wd": 0.5})])
def test_a_warning_as_an_error_loads_all_of_a_state_or_nothing(change):  # P9
    run, other = deferring(), deferring(5)
    state, before = change(other.decay.state_dict()), run.decay.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="in the saved run and is"):
            run.decay.load_state_dict(state)
    now = run.decay.state_dict()
    parts = ("steps", "lr_max", "owed", "payments", "due")
    assert [now[key] for key in parts] in ([s[key] for key in parts] for s in (before, state))


def test_a_state_from_before_the_first_step():  # P9
    run = PlainRun()
    run.attach(scale_by="lr_ratio", max_lr=1.0, total_steps=None)
    state = run.decay.state_dict()
    run.step(2)
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    run.decay.load_state_dict(state)
    assert run.decay.state_dict() == state
    assert run.decay.coefficients == []


def test_a_state_for_groups_that_are_refused():  # P9, P10
    run, other = deferring(), deferring(5)
    before = run.decay.state_dict()
    run.groups[1]["weight_decay"] = None
    with pytest.raises(TypeError, match=r"group 1.*weight_decay.*None"):
        run.decay.load_state_dict(other.decay.state_dict())
    assert run.decay.state_dict() == before


@pytest.fixture(scope="module")
def lightning_state():
    decay = pytest.importorskip("wd_callbacks.lightning").DecoupledWD(WD)
    LightningRun().fit(decay)
    return decay.state_dict()


def of_0_1_0(done):
    return lambda state: having("done", done)(without("position")(state))


LIGHTNING_STATES = [
    *((lambda state, v=v: {0: v}, f"{NO_STATE}.*length") for v in ({}, None)),
    *((lambda state, k=k: {0: without(k)(state[0])}, k) for k in ("length", "steps", "owed")),
    *(
        (lambda state, v=v: {0: having("position", v)(state[0])}, "position")
        for v in ("1", math.nan, -1, True)
    ),
    *((lambda state, v=v: {0: of_0_1_0(v)(state[0])}, "done") for v in ("1", -1)),
    (lambda state: {0: without("position")(state[0])}, "done|position"),
    (lambda state: {0: {**other_state(), "position": 0.1, "length": 9}}, r"\[1, 1\] parameters"),
    *((lambda state, v=v: v, r"optimizers \[0\]") for v in (None, [])),
    (lambda state: {"0": state[0]}, r"optimizers \[0\].*'0'"),
    (lambda state: {0: state[0], 1: state[0]}, r"optimizers \[0\].*1: "),
    (lambda state: {1: state[0]}, r"optimizers \[0\].*1: "),
]


@pytest.mark.parametrize(("change", "pattern"), LIGHTNING_STATES)
def test_lightning_states(change, pattern, lightning_state):  # P9, P10
    pl = pytest.importorskip("pytorch_lightning")
    decay = pytest.importorskip("wd_callbacks.lightning").DecoupledWD(WD)
    state = change(copy.deepcopy(lightning_state))

    class Loads(pl.Callback):
        def on_fit_start(self, *_):  # right after Lightning has read a checkpoint
            decay.load_state_dict(state)

    run = LightningRun()
    check_refused(run, lambda: run.fit(decay, Loads()), EITHER, pattern)
    run.check_works()


# Fuzzing

ROUNDING = {torch.float64: 1e-14, torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7}

numbers = st.integers(-2, 60) | st.floats(0, 1) | st.floats() | st.sampled_from([10**400])
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(state, path=()):
    """Every path in the state, except that of the whole."""
    items = {dict: lambda: state.items(), list: lambda: enumerate(state)}.get(type(state), list)()
    return [each for k, v in items for each in ((*path, k), *places(v, (*path, k)))]


def mutated(state, data):
    """The state with one change at one place."""
    paths = places(state)
    if not paths:
        return data.draw(anything)
    *above, last = data.draw(st.sampled_from(paths))
    holder = root = copy.deepcopy(state)
    for key in above:
        holder = holder[key]
    do = data.draw(st.sampled_from(["replace", "delete", "duplicate"]))
    if do == "replace":
        holder[last] = data.draw(anything)
    elif do == "delete":
        del holder[last]
    elif isinstance(holder, list):
        holder.insert(last, copy.deepcopy(holder[last]))
    else:
        holder[f"{last}, again"] = copy.deepcopy(holder[last])
    return root


def small(progress):
    return 1e-6 * (1 - progress / 2)


def check_a_step(optimizer, decay):
    """Checks that what a step applies and what it defers then are what was deferred and due."""
    state, params = decay.state_dict(), params_of(optimizer)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    shrinks = [0.1 * small(min(state["steps"] / 40, 1))] * 2 + [0.1 * 0.07]
    old, new = (
        [owed for group in s["owed"] for owed in group] or [0.0] * 3
        for s in (state, decay.state_dict())
    )
    for p, was, shrink, owed, left in zip(params, before, shrinks, old, new):
        due = owed - math.log1p(-shrink)
        assert 0 <= left <= due * (1 + 1e-12)
        # Far more than one quantum, which only a state can hold, is applied over several steps.
        in_parts = p.dtype == torch.bfloat16 or due > 1
        assert left < -math.log1p(-QUANTA[p.dtype]) or (in_parts and left < due)
        factor = (p.double() / was.double())[0].item()
        assert factor == pytest.approx(math.exp(left - due), rel=ROUNDING[p.dtype])
    assert all(math.isfinite(due) and due >= 0 for due in decay.state_dict()["due"])


@given(st.data())
@fuzz
def test_fuzz_states(data):  # P8, P9, P10
    """A state is loaded, and the steps after it are right, or it is refused and nothing changes."""
    optimizer = only_decays(dtypes=((torch.float64, torch.float32), (torch.bfloat16,)))
    decay = DecoupledWD(optimizer, [small, 0.07], total_steps=40)
    for _ in range(4):
        optimizer.step()
    before, weights = decay.state_dict(), comparable(params_of(optimizer))
    state = before
    for _ in range(data.draw(st.integers(1, 3))):
        state = mutated(state, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            decay.load_state_dict(state)
        except (TypeError, ValueError):
            assert decay.state_dict() == before
        assert comparable(params_of(optimizer)) == weights
        for _ in range(4):
            check_a_step(optimizer, decay)


@given(
    st.lists(st.floats(0, 12) | st.floats() | st.floats(0, 2e-5), min_size=1, max_size=8),
    st.sampled_from([0, None, 0.05]),
)
@fuzz
def test_fuzz_coefficients(values, quantum):  # P8, P10
    """Each step decays by its coefficient, or is refused before a weight has changed."""
    optimizer = only_decays()
    count, step = len(values), 0
    decay = DecoupledWD(
        optimizer,
        lambda progress: values[min(round(progress * count), count - 1)],
        progress=lambda: step / count,
        quantum=quantum,
    )
    params = params_of(optimizer)
    expected, due = torch.ones(3, dtype=torch.float64), 0.0
    for step, wd in enumerate(values):
        before = comparable(params)
        if 0 <= wd < math.inf and 0.1 * wd < 1:
            optimizer.step()
            expected *= 1 - 0.1 * wd
            due -= math.log1p(-0.1 * wd)
        else:
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                optimizer.step()
            is_number = 0 <= wd < math.inf
            shown = f"group 0.*{0.1 * wd:g}" if is_number else f"progress {step / count:g} .*{wd}"
            check_message(caught.value, ValueError, shown.replace("+", r"\+"))
            assert comparable(params) == before
        for p, owed in zip(params, [row[0] for row in decay.state_dict()["owed"]] or [0.0] * 2):
            if quantum == 0:
                assert torch.equal(p, expected)
            limit = -math.log1p(-(2.0**-20 if quantum is None else quantum))
            assert 0 <= owed <= limit * (1 + 1e-12)
            assert p[0].item() == pytest.approx(math.exp(owed - due), rel=1e-12)
