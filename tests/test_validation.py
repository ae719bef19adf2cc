"""Invalid input: tables of what is given, the error and what its message says.

A refusal changes no weight and leaves the optimizer as it was. Most rows run in a plain loop; a few
show that the other adapters make the same checks. At the end hypothesis draws states and
coefficients; more of them, at random:

    HYPOTHESIS_PROFILE=deep pytest -n 0 tests/test_validation.py -k fuzz
"""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import re
import warnings
from collections import deque
from functools import cache, partial

import numpy as np
import pytest
import torch
from fastai_helpers import still_learner, wrapped
from helpers import (
    INNER_WD,
    QUANTA,
    WithoutHooks,
    caught,
    comparable,
    deferred,
    fuzz,
    hooks_of,
    params_of,
    two_groups,
    zero_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from lightning_utilities.core.imports import RequirementCache
from still import (
    LR,
    OWN,
    Factor,
    LightningCallback,
    StillModule,
    StillNet,
    at,
    hf_trainer,
    lightning_trainer,
    sgd,
)
from torch import nn

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
from wd_callbacks.transformers import DecoupledWD as TrainerWD

WD = 0.1
EITHER = (TypeError, ValueError)


@contextlib.contextmanager
def refused(optimizer, error, pattern):
    """Checks that the block raises, and changes neither a weight nor an option."""

    def seen():
        options = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
        return comparable(params_of(optimizer)), comparable(options)

    before = seen()
    with pytest.raises(error, match=f"(?s){pattern}") as found:
        yield found
    assert seen() == before


def start():
    """A model and its optimizer with two param groups, the same at every call."""
    torch.manual_seed(0)
    return two_groups(weight_decay=INNER_WD)


def named(rows):
    """Rows of a dict, by their keys."""
    return [pytest.param(*row, id=name) for name, row in rows.items()]


# Arguments


def never(name, parameter):
    return False


def raises(*_):
    raise LookupError("of the user")


COEFFICIENT = "number or a schedule"
NEAREST = "matches no parameter.*nearest"
COUNT = "whole number of at least 1, got "
INSTANCE = "instance of LayerNorm.*LayerNorm without parentheses"
ARGUMENTS = {
    "wd": [
        (-0.1, ValueError, r"at least 0, got -0\.1"),
        (math.inf, ValueError, "got inf"),
        (np.float32("nan"), ValueError, "got nan"),
        ("1e-4", TypeError, rf"{COEFFICIENT}.*'1e-4' \(str\)"),
        (True, TypeError, rf"{COEFFICIENT}.*True \(bool\)"),
        (torch.ones(2), TypeError, rf"{COEFFICIENT}.*shape \(2,\) \(Tensor\)"),
        (Normalized, TypeError, "Normalized"),  # the class instead of an instance
        ([], ValueError, "empty sequence"),
        ([0.1, -1], ValueError, r"wd\[1\].* -1"),
        ([0.1, None], TypeError, r"wd\[1\].*None"),
        ([[0.1], [0.2]], TypeError, r"wd\[0\].*\[0\.1\]"),
        (range(3), ValueError, "3 values.* 2 param groups: pass one value per group"),
        ({}, ValueError, "empty mapping"),
        ({None: 0.1}, TypeError, "keys of wd.*None"),
        ({nn.LayerNorm(8): 0.1}, TypeError, INSTANCE),
        ({"*": -0.1}, ValueError, r"wd\['?\*'?\].* -0\.1"),
        ({"*": [0.1, 0.1]}, TypeError, r"wd\['?\*'?\].*0\.1, 0\.1"),
        ({"*": {"*": 0.1}}, TypeError, r"wd\['?\*'?\].*dict"),
        ({"*": 0.1, "2.*": 0.1}, ValueError, rf"2\.\*.*{NEAREST}.*'1\.bias'"),  # P7, P14
        ({nn.Conv2d: 0.1}, ValueError, "Conv2d.*matches no parameter"),
        ({0: 0.1}, TypeError, "attaches one DecoupledWD to each optimizer"),
        ({"*": 0.1, 0: 0.1}, TypeError, r"mixes.*\['\*', 0\]"),
        ({-1: 0.1}, TypeError, "key -1"),
        ({True: 0.1}, TypeError, "key True"),
        ({0: [0.1, -1]}, ValueError, r"wd\[0\]\[1\].* -1"),
        ({0: {0: 0.1}}, TypeError, r"wd\[0\] is a mapping inside"),
    ],
    "scale_by": [
        (None, TypeError, "'lr_ratio'.*None"),
        ("LR", ValueError, "'lr_ratio', 'lr_squared', 'none'.*'LR'"),
        ([], ValueError, "empty"),
        (["lr", "no"], ValueError, r"scale_by\[1\].*'no'"),
        (["lr"], ValueError, "1 values.* 2 param groups"),
    ],
    "max_lr": [
        (0, ValueError, "above 0, got 0"),
        (math.nan, ValueError, "got nan"),
        ("1", TypeError, "number.*'1'"),
        ([1.0], ValueError, "1 values.* 2 param groups"),
        ([1.0, None], TypeError, r"max_lr\[1\].*None"),
    ],
    "quantum": [
        (-1e-3, ValueError, r"at least 0, got -0\.001"),
        (1, ValueError, "below 1, got 1"),
        ("small", TypeError, "number.*'small'"),
    ],
    "verbose": [("no", TypeError, "True or False.*'no'")],
    "cautious": [(0.5, TypeError, r"True or False.*0\.5")],  # P16
    "anchor": [  # P15
        ("zero", TypeError, "'initial'.*'zero'"),
        (torch.ones(2), TypeError, "mapping.*Tensor"),
        (nn.Linear(1, 1), TypeError, "mapping.*Linear"),
        ({}, ValueError, "names no"),
        ({"0.weight": 1.0}, TypeError, r"anchor\['0.weight'\] is 1\.0, expected a tensor"),
        ({"0.wieght": torch.ones(1)}, ValueError, "names no parameter.*0.wieght.*'0.weight'"),
        ({"0.weight": torch.ones(2, 3)}, ValueError, r"0.weight'\].*\(2, 3\).*\(3, 3\)"),
    ],
    "exclude": [
        (None, TypeError, "None.*'bias'"),
        (0.1, TypeError, r"0\.1.*glob"),
        ([["bias"]], TypeError, r"\['bias'\].*predicate"),
        ({"bias": True}, TypeError, "bias.*True"),
        (torch.ones(100, 100), TypeError, r"shape \(100, 100\).*pass its name"),
        ([nn.LayerNorm(8)], TypeError, INSTANCE),
        (nn.Sequential(nn.LayerNorm(8)), TypeError, "instance of Sequential"),
        ("decoder.*", ValueError, rf"decoder\.\*.*{NEAREST}"),  # P7
        ("norms", ValueError, f"'norms'.*{NEAREST}.*'norm'"),
        (["bias", ""], ValueError, f"''.*{NEAREST}"),
        (nn.Conv2d, ValueError, "torch.nn.*Conv2d.*matches no parameter"),
        ("torch.nn.Conv2d", ValueError, rf"torch\.nn\.Conv2d.*{NEAREST}"),
        ("no.such.Module", ValueError, rf"no\.such\.Module.*{NEAREST}"),
        (never, ValueError, "never.*matches no parameter"),
    ],
    "total_steps": [(value, EITHER, f"{COUNT}{value!r}") for value in (0, 2.5, math.nan, "9")],
    "steps_per_epoch": [(0, ValueError, f"{COUNT}0"), (True, EITHER, COUNT)],
    "progress": [(0.5, TypeError, r"callable.*0\.5")],
    "model": [("m", TypeError, r"torch\.nn\.Module"), (nn.Linear, TypeError, r"torch\.nn\.Module")],
    "total_step": [(9, TypeError, "unexpected keyword")],
}


def short(value):
    return (value.__name__ if isinstance(value, type) else repr(value))[:30].split(" at ")[0]


@pytest.mark.parametrize(
    ("argument", "value", "error", "pattern"),
    [
        pytest.param(argument, *row, id=f"{argument}={short(row[0])}")
        for argument, rows in ARGUMENTS.items()
        for row in rows
    ],
)
def test_an_invalid_argument_is_refused_by_its_name(argument, value, error, pattern):  # P7, P10
    model, optimizer = start()
    with refused(optimizer, error, pattern) as found:
        DecoupledWD(optimizer, **{"wd": WD, "model": model, "total_steps": 4, argument: value})
    assert argument in str(found.value)
    assert len(str(found.value)) < 500
    assert hooks_of(optimizer) == []


def groups_have(key, value, **arguments):
    """Returns what sets it in all groups, or deletes it if ``value`` is None."""

    def prepare(model, optimizer):
        for group in optimizer.param_groups:
            group[key] = value
            if value is None:
                del group[key]
        return arguments

    return prepare


def one_group(model, optimizer):
    del optimizer.param_groups[1]
    return {"wd": [0.1, 0.2]}


def lr_is_none(model, optimizer):
    optimizer.param_groups[1]["lr"] = None
    return {"scale_by": "lr_ratio"}


def in_half_precision(model, optimizer):
    model[1].to(torch.bfloat16)
    return {"cautious": True}


def marks_without_names(model, optimizer):
    model.no_weight_decay = lambda: None
    return {"exclude": "marked"}


AT_WEIGHT = r"in the predicate.*at parameter '0\.weight'"
SCALE_BY_NONE = "scale_by='none', or a callable"
NAMED = {"0.weight": torch.ones(3, 3)}
EPOCH, NO_LENGTH = {"steps_per_epoch": 10}, {"total_steps": None, "progress": lambda: 0.0}
TOGETHER = {  # arguments, or what returns them for a model and its optimizer
    "a schedule": ({"wd": Linear(0, 1), "total_steps": None}, ValueError, "total_steps.*progress"),
    "exclude, no model": ({"exclude": "bias", "model": None}, ValueError, "exclude.*pass model"),
    "keys, no model": ({"wd": {"*": WD}, "model": None}, ValueError, "wd.*pass model"),
    "anchors, no model": ({"anchor": NAMED, "model": None}, ValueError, "anchor.*pass model"),
    "cautious, half": (in_half_precision, ValueError, "cautious.*bfloat16"),  # P16
    "cautious, quantum": ({"cautious": True, "quantum": 0.1}, ValueError, "cautious.*quantum=0"),
    "no_weight_decay()": (marks_without_names, TypeError, r"no_weight_decay\(\).*None"),
    "a predicate raises": ({"exclude": raises}, LookupError, f"of the user.*{AT_WEIGHT}"),
    "a predicate of one": ({"exclude": lambda name: 1}, TypeError, f"positional.*{AT_WEIGHT}"),
    "no lr": (groups_have("lr", None), ValueError, f"scale_by='lr'.*no 'lr'.*{SCALE_BY_NONE}"),
    "lr=None": (lr_is_none, ValueError, f"lr=None.*{SCALE_BY_NONE}"),
    "no own wd": (groups_have("weight_decay", None, wd=None), ValueError, "wd=None.*none"),
    "one group": (one_group, ValueError, "has 1 param group[^s]"),
    "lr 0, ratio": (
        groups_have("lr", 0.0, scale_by="lr_ratio"),
        ValueError,
        "group 0.*lr_ratio.*max_lr",
    ),
    "lr 0, Timescale": (
        groups_have("lr", 0.0, wd=Timescale(steps=9)),
        ValueError,
        "steps=9.*max_lr",
    ),
    "Timescale, callable": ({"wd": Timescale(steps=9), "scale_by": len}, ValueError, "callable"),
    "Timescale, no epochs": ({"wd": Timescale(epochs=3)}, ValueError, "steps_per_epoch"),
    "Timescale, short": ({"wd": Timescale(epochs=0.1), **EPOCH}, ValueError, "above 1, got 1"),
    "Normalized": ({"wd": Normalized(1), **NO_LENGTH}, ValueError, "Normalized.*total_steps"),
}


@pytest.mark.parametrize(("prepare", "error", "pattern"), named(TOGETHER))
def test_arguments_that_do_not_go_with_the_rest_are_refused(prepare, error, pattern):  # P7, P10
    model, optimizer = start()
    arguments = prepare(model, optimizer) if callable(prepare) else prepare
    with refused(optimizer, error, pattern):
        DecoupledWD(optimizer, **{"wd": WD, "model": model, "total_steps": 4, **arguments})
    assert hooks_of(optimizer) == []


HALVES = [np.float32(0.5), np.array(0.5), torch.tensor(0.5, dtype=torch.half)]
ACCEPTED = {  # arguments and the coefficients of the first step
    **{f"a {type(n).__name__}, {n.dtype}": ({"wd": n, "max_lr": n}, [0.5, 0.5]) for n in HALVES},
    "numbers": ({"wd": deque([torch.tensor(0.5), np.int64(0)])}, [0.5, 0]),
    "a number and a schedule": ({"wd": (0.5, lambda progress: 1), "total_steps": 9}, [0.5, 1]),
    "total_steps": ({"wd": Linear(0.5, 1), "total_steps": np.int64(3)}, [0.5, 0.5]),
    "progress below 0": ({"wd": Linear(0.5, 1), "progress": lambda: -0.5}, [0.5, 0.5]),
    "progress above 1": ({"wd": Linear(0.5, 1), "progress": lambda: 1.5}, [1, 1]),
    "tensor": ({"wd": lambda p: torch.tensor(0.5 + p), "progress": lambda: np.array(0.5)}, [1, 1]),
    "nothing excluded": ({"wd": 0.5, "exclude": set(), "verbose": None}, [0.5, 0.5]),
    "another model": ({"wd": 0.5, "model": nn.Linear(1, 1)}, [0.5, 0.5]),
}


def only_decays(*dtypes, **options):
    """An optimizer with a param group for each list of dtypes: weights of 1, gradients of 0."""
    groups = [
        {"params": [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in group]}
        for group in dtypes or [[torch.float64], [torch.float64]]
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, **options)
    zero_gradients(optimizer)
    return optimizer


@pytest.mark.parametrize(("arguments", "coefficients"), named(ACCEPTED))
def test_what_looks_odd_is_accepted(arguments, coefficients, recwarn):  # P10
    optimizer = only_decays()
    decay = DecoupledWD(optimizer, quantum=0, **arguments)
    optimizer.step()
    assert decay.coefficients == pytest.approx(coefficients)
    for p, wd in zip(params_of(optimizer), coefficients):
        assert p.tolist() == pytest.approx([1 - 0.1 * wd] * 3, rel=1e-12)
    assert not recwarn.list


def frozen(group):
    group["params"][0].requires_grad_(False).grad = None


def test_odd_groups_are_accepted(recwarn):  # P2
    for change in (
        frozen,
        lambda group: group["params"].clear(),
        lambda group: group.update(max_lr=None),  # not used
        lambda group: group.update(weight_decay=-math.inf),  # not used
    ):
        optimizer = only_decays(weight_decay=INNER_WD)
        change(optimizer.param_groups[0])
        DecoupledWD(optimizer, 0.5)
        optimizer.step()
        for p in params_of(optimizer):
            assert torch.equal(p, torch.full_like(p, 1 if p.grad is None else 0.95))
    assert not recwarn.list


# At a step


def groups_are(index=1, **values):
    return lambda model, optimizer: optimizer.param_groups[index].update(values)


def new_group(model, optimizer):
    model.append(nn.Linear(2, 2))
    zero_gradients(model[2:])
    optimizer.add_param_group({"params": list(model[2].parameters())})


def new_without_old(model, optimizer):
    new_group(model, optimizer)
    model[0] = nn.Identity()


def raises_for_the_new(name, parameter):
    return raises() if name.startswith("2.") else name == "0.weight"


def nan_later(progress):
    return math.nan if progress > 0.4 else WD


FIRST = "group 0.*"
SECOND = "group 1.*"
AT_A_STEP = {  # arguments, steps before, what changes then, error, pattern
    "shrink": ({"wd": 15.0}, 0, None, ValueError, f"{FIRST}1\\.5.*lr 0\\.1.*wd 15.*'lr'"),
    "of a group": ({"wd": [WD, 20]}, 0, None, ValueError, f"{SECOND} 2,.*wd 20"),
    "shrink of 1": ({"wd": 1.0, "scale_by": "none"}, 0, None, ValueError, f"{FIRST}wd 1,.*'none'"),
    "schedule": ({"wd": [WD, nan_later]}, 2, None, ValueError, r"wd\[1\].*nan_later.*s 0\.5 .*nan"),
    "schedule raises": ({"wd": raises}, 0, None, LookupError, "of the user"),
    "progress": ({"progress": raises}, 0, None, LookupError, "of the user"),
    "lr": ({}, 2, groups_are(lr=20.0), ValueError, f"{SECOND} 2,.*lr 20\\.0.*wd 0\\.1.*'lr'"),
    "own wd": ({}, 0, groups_are(weight_decay=None), TypeError, f"{SECOND}weight_decay.*None"),
    "values": ({"wd": [WD, WD]}, 2, new_group, ValueError, "wd has 2 values.*3 param groups"),
    "predicate": ({"exclude": raises_for_the_new}, 2, new_group, LookupError, "of the user"),
    "entry": (
        {"exclude": ["*.bias", "0.*t"]},
        2,
        new_without_old,
        ValueError,
        "exclude.*0.\\*t.*no p",
    ),
}


@pytest.mark.parametrize(("arguments", "steps", "change", "error", "pattern"), named(AT_A_STEP))
def test_a_step_is_refused_before_a_weight_changes(arguments, steps, change, error, pattern):
    model, optimizer = start()  # P6, P7, P10
    decay = DecoupledWD(optimizer, **{"wd": WD, "model": model, "total_steps": 4, **arguments})
    for _ in range(steps):
        optimizer.step()
    if change is not None:
        change(model, optimizer)
    for _ in range(2):
        with refused(optimizer, error, pattern):
            optimizer.step()
        assert decay.steps == steps
    decay.detach()
    optimizer.param_groups[1].update(lr=0.1, weight_decay=INNER_WD)
    before = params_of(optimizer)[1].detach().clone()
    optimizer.step()
    assert torch.equal(params_of(optimizer)[1], before * (1 - 0.1 * INNER_WD))


class Sourced:
    """A plain loop that takes one number from the user's code."""

    value = 0.3

    def __init__(self, source, steps):
        self.source = source
        self.model, self.optimizer = start()
        self.give(0.3)
        arguments = {"wd": WD, "total_steps": 40, **SOURCES[source](self)}
        self.decay = DecoupledWD(self.optimizer, model=self.model, **arguments)
        self.make(steps)

    def give(self, value):
        if self.source in ("lr", "weight_decay", "max_lr", "initial_lr"):
            self.optimizer.param_groups[1][self.source] = value
        self.value = value

    def make(self, steps):
        for _ in range(steps):
            self.optimizer.step()

    def go_on(self):
        for value in (0.3, 0.2):
            self.give(value)
            self.make(2)
        return comparable(params_of(self.optimizer)), comparable(self.decay.state_dict())


SOURCES = {  # arguments that read the number, by what the message calls it
    "wd": lambda run: {"wd": lambda progress: run.value},
    "wd[1]": lambda run: {"wd": [WD, lambda progress: run.value]},
    "wd['1.*']": lambda run: {"wd": {"1.*": lambda progress: run.value, "*": WD}},
    "scale_by": lambda run: {"scale_by": lambda group: run.value},
    "progress": lambda run: {"wd": Linear(WD, WD), "progress": lambda: run.value},
    "lr": lambda run: {},
    "weight_decay": lambda run: {"wd": None},
    "max_lr": lambda run: {"scale_by": "lr_ratio"},
    "initial_lr": lambda run: {"scale_by": "lr_squared"},
}
NOT_NUMBERS = ["0.1", torch.ones(2), True, None]
NOT_COEFFICIENTS = [math.nan, torch.tensor(math.inf), -0.1]


@pytest.mark.parametrize("source", SOURCES)
def test_a_refused_value_is_as_if_it_never_was(source):  # P6, P10
    """With the value mended, the run goes on as one that never had it."""
    is_max_lr = source.endswith("_lr")  # read once, and None if it is unknown
    values = [(value, EITHER) for value in NOT_NUMBERS[: -1 if is_max_lr else None]]
    values += [(v, ValueError) for v in NOT_COEFFICIENTS[: -1 if source == "progress" else None]]
    for steps in (0,) if is_max_lr else (0, 2):
        expected = Sourced(source, steps).go_on()
        for value, error in values:
            run = Sourced(source, steps)
            run.give(value)
            is_number = error is ValueError
            shown = f"{float(value):g}|{value / 10:g}" if is_number else re.escape(repr(value))
            name = "max_lr|peak learning rate" if is_max_lr and is_number else re.escape(source)
            with refused(run.optimizer, error, shown) as found:
                run.optimizer.step(*[lambda: None] if steps else [])
            assert re.search(name.replace("_", "[ _]"), str(found.value))
            assert run.go_on() == expected


def test_a_warning_as_an_error_changes_nothing():  # P10
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    for p in weights:
        p.grad = torch.ones(2, 2).to_sparse()
        DecoupledWD(optimizer := torch.optim.SGD([p], lr=0.1), WD)
        with warnings.catch_warnings():
            if p is weights[0]:
                warnings.simplefilter("error")
                with pytest.raises(UserWarning, match="sparse gradient"):
                    optimizer.step()
                assert torch.equal(p, torch.ones(2, 2))
            warnings.simplefilter("ignore")
            optimizer.step()
    assert torch.equal(*weights)


@pytest.mark.parametrize("loads", [True, False])
def test_a_forgotten_load_state_dict_warns(loads):  # P6
    optimizer = torch.optim.Adam(two_groups()[0].parameters(), lr=0.1)
    decay = DecoupledWD(optimizer, Linear(1, 0), total_steps=8)
    zero_gradients(optimizer)
    for _ in range(4):
        optimizer.step()
    state = decay.state_dict()
    decay.detach()
    decay = DecoupledWD(optimizer, Linear(1, 0), total_steps=8)
    if loads:
        decay.load_state_dict(state)
    _, messages = caught(optimizer.step)
    assert ["call load_state_dict" in message for message in messages] == [True] * (not loads)
    assert decay.coefficients == [0.5 if loads else 1]


def test_more_steps_than_total_steps_warn_once():  # P6
    _, optimizer = two_groups()
    DecoupledWD(optimizer, Linear(1, 0), total_steps=2)
    found = [caught(optimizer.step)[1] for _ in range(5)]
    assert [len(messages) for messages in found] == [0, 0, 1, 0, 0]
    assert "the 2 steps of total_steps" in found[2][0]


# The adapters of frameworks


def of_fastai(*cbs, **settings):
    learn = still_learner(batches=4, cbs=cbs, lr=LR, wd=OWN, **settings)
    return learn.model, lambda: learn.fit(1), lambda: learn.opt


def of_wrapper(*cbs):
    return of_fastai(*cbs, opt_func=wrapped(torch.optim.SGD))


def of_lightning(*cbs, model=None):
    model, trainer = model or StillModule(), lightning_trainer(*cbs, epochs=1)
    return model, lambda: trainer.fit(model), lambda: trainer.optimizers[0]


def of_trainer(*cbs, **settings):
    trainer = hf_trainer(*cbs, epochs=1, **settings)
    return trainer.model, trainer.train, lambda: trainer.optimizer


RUNS = {  # the adapter, and what makes a model, its training and what returns its optimizer
    "fastai": (FastaiWD, of_fastai),
    "OptimWrapper": (FastaiWD, of_wrapper),
    "lightning": (LightningWD, of_lightning),
    "transformers": (TrainerWD, of_trainer),
}
OF_ALL = {  # arguments, steps before, pattern
    "a wrong length": ({"wd": [0.1] * 3}, 0, "wd has 3 values, but the optimizer has"),
    "an entry": ({"exclude": "decoder.*"}, 0, rf"decoder\.\*.*{NEAREST}"),  # P7
    "an anchor": ({"anchor": {"decoder": torch.ones(1)}}, 0, "anchor names no parameter"),  # P15
    "a shrink": ({"wd": 30.0}, 0, r"group 0.* 3,.*lr 0\.1, wd 30"),
    "a schedule": ({"wd": nan_later}, 2, r"nan_later.*progress 0\.5 is nan"),
}


@pytest.mark.parametrize("adapter", RUNS)
@pytest.mark.parametrize(("arguments", "steps", "pattern"), named(OF_ALL))
def test_every_adapter_refuses_before_a_weight_changes(adapter, arguments, steps, pattern):  # P10
    cls, make = RUNS[adapter]
    decay = cls(**{"wd": WD, **arguments})
    model, train, optimizer = make(decay)
    factor = Factor(model)
    with pytest.raises(ValueError, match=pattern):
        train()
    assert factor() == pytest.approx((1 - LR * WD) ** steps)
    if adapter == "transformers":
        decay.detach()  # the Trainer does not say that training ended in an error
    zero_gradients(model)
    optimizer().step()
    assert factor() == pytest.approx((1 - LR * WD) ** steps * (1 - LR * OWN))  # its own wd


ASSIGNED = [("wd", 0.7), ("exclude", "bias"), ("max_lr", 1.0), ("quantum", 0), ("cautious", True)]


@pytest.mark.parametrize("cls", [DecoupledWD, FastaiWD, LightningWD, TrainerWD])
def test_every_adapter_checks_shows_and_fixes_its_arguments(cls):  # P10
    model, optimizer = start()
    make = cls
    if cls is DecoupledWD:
        make = partial(cls, optimizer, model=model, total_steps=4)
    with pytest.raises(ValueError, match="wd must be finite and at least 0"):
        make(-0.1)
    with pytest.raises(TypeError, match="must be True or False"):
        make(0.1, verbose="no")
    decay = make(Linear(1, 0), exclude="bias")
    assert repr(decay) == "DecoupledWD(Linear(start=1, end=0), exclude=['bias'])"
    assert repr(copy.deepcopy(decay)) == repr(pickle.loads(pickle.dumps(decay))) == repr(decay)
    for name, value in ASSIGNED:
        with pytest.raises(AttributeError, match=f"{name} is fixed when DecoupledWD is built"):
            setattr(decay, name, value)
        assert getattr(decay, name) != value
    if cls is not DecoupledWD:
        with pytest.raises(ValueError, match="nothing to describe before"):
            decay.describe()
    if cls not in (DecoupledWD, LightningWD):
        with pytest.raises(TypeError, match="maps optimizer indices.*has one optimizer"):
            make({0: 0.1})


class TwoOptimizers(StillModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [sgd([p]) for p in self.parameters()]


INDEX = "index.*whole number of at least 0"
OF_OPTIMIZERS = {
    **{f"optimizers={v}": ({"optimizers": v}, EITHER, INDEX) for v in (-1, "0", True, [], {0})},
    "optimizers=[0, 0]": ({"optimizers": [0, 0]}, ValueError, r"twice.*\[0, 0\]"),
    "optimizers=2": ({"optimizers": 2}, ValueError, "2.*2 optimizers"),
    "another index": ({"wd": {2: 0.1}}, ValueError, r"optimizers \[2\].*\[0, 1\]"),
    "one of two": ({"wd": {1: 0.1}}, ValueError, r"pass optimizers=\[1\]"),
}


@pytest.mark.parametrize(("arguments", "error", "pattern"), named(OF_OPTIMIZERS))
def test_lightning_refuses_optimizers_that_are_not_there(arguments, error, pattern):  # P10
    model = TwoOptimizers()
    factor = Factor(model)
    with pytest.raises(error, match=pattern):
        lightning_trainer(LightningWD(**{"wd": WD, **arguments}), epochs=1).fit(model)
    assert factor() == 1


TWICE = {
    **{name: lambda n=name: RUNS[n][1](RUNS[n][0](0.1), RUNS[n][0](0.2)) for name in RUNS},
    "lightning, optimizers=0": lambda: of_lightning(
        LightningWD(0.1), LightningWD(0.1, optimizers=0)
    ),
}


@pytest.mark.parametrize("case", TWICE)
def test_two_decays_are_to_be_merged(case):  # P10
    with pytest.raises(ValueError, match="two DecoupledWD.*merge|attached already.*merge"):
        TWICE[case]()[1]()


class DecaysAlready(StillModule):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        DecoupledWD(optimizer, WD)
        return optimizer


class Unhooked(StillModule):
    def configure_optimizers(self):
        return WithoutHooks(super().configure_optimizers())


def test_optimizers_that_cannot_take_the_decay_are_refused():  # P5, P10
    with pytest.raises(ValueError, match="SGD has a DecoupledWD attached already"):
        of_lightning(LightningWD(WD), model=DecaysAlready())[1]()
    with pytest.raises(ValueError, match="WithoutHooks never runs step hooks.*'base'"):
        of_lightning(LightningWD(WD), model=Unhooked())[1]()
    model = StillNet()
    DecoupledWD(optimizer := sgd(model.parameters()), WD)
    with pytest.raises(ValueError, match="attached already"):
        of_trainer(TrainerWD(WD), model=model, optimizers=(optimizer, None))[1]()
    learn = still_learner(opt_func=wrapped(torch.optim.SGD), cbs=FastaiWD(WD))
    learn.create_opt()
    DecoupledWD(learn.opt.opt, WD)
    with pytest.raises(ValueError, match="attached already"):
        learn.fit(1)


WRONG = [(a, b) for a in ("torch", *RUNS) for b in RUNS if "OptimWrapper" not in (a, b) and a != b]


@pytest.mark.parametrize(("adapter", "framework"), WRONG)
def test_the_wrong_adapter_names_the_right_module(adapter, framework):  # P10
    if framework == "lightning" and RequirementCache("pytorch-lightning<2.6"):
        pytest.skip("Lightning itself refuses what is no Callback before 2.6")
    _, optimizer = two_groups()
    decay = DecoupledWD(optimizer, WD) if adapter == "torch" else RUNS[adapter][0](WD)
    pattern = rf"of wd_callbacks\.{adapter}, .*import DecoupledWD from wd_callbacks\.{framework}"
    with pytest.raises(TypeError, match=pattern):
        RUNS[framework][1](decay)[1]()


def test_fastai_refuses_the_class_for_an_instance():  # P10
    for give in (lambda cls: still_learner(cbs=cls), lambda cls: still_learner().fit(1, cbs=cls)):
        with pytest.raises(TypeError, match="expected an instance"):
            give(FastaiWD)


# Saved states


def small(progress):
    return 2e-6 * (1 - progress / 2)


def deferring(steps=9):
    """A decay that has applied some and deferred the rest, and its model and optimizer."""
    model, optimizer = start()
    decay = DecoupledWD(optimizer, [small, 2.2e-6], total_steps=40)
    for _ in range(steps):
        optimizer.step()
    return model, optimizer, decay


def later(model, optimizer, decay):
    for _ in range(8):
        optimizer.step()
    return comparable(params_of(model)), comparable(decay.state_dict())


@cache
def resumed():
    return later(*deferring())


def first_is(value):
    """Nested lists with the very first number replaced."""

    def change(values):
        head, *tail = values
        return [first_is(value)(head) if isinstance(head, list) else value, *tail]

    return change


def shorter(values):
    return values[:-1]


def longer(values):
    return [*values, values[-1]]


def a_row_is_shorter(values):
    return [values[0][:-1], *values[1:]]


AMOUNTS = [math.nan, math.inf, -1e-9, "0", None]
LISTS = [None, 5, "ab", [None], shorter, longer]
INVALID_STATE = {  # what is put in place of an entry; a function changes it
    "steps": [None, "3", 2.5, -1],
    "arguments": [None],
    "owed": [*LISTS, *map(first_is, [*AMOUNTS, 40.0]), a_row_is_shorter],
    "payments": [*LISTS, *map(first_is, [*AMOUNTS, 1.5]), a_row_is_shorter],
    "due": [*LISTS, *map(first_is, AMOUNTS)],
    "lr_max": [*LISTS, *map(first_is, [-1, 0.0, "1", math.inf])],
    "no_decay": [*LISTS, *map(first_is, ["0", None, 2])],
    "guess": [5, shorter, first_is(2)],
    "known": [5, shorter, first_is(2)],
    "highest_lr": [5, shorter, first_is(-1)],
    "rules": [5, shorter, [5, 5]],
    "progress": [None, -0.1, 1.1],
    "anchors": [5, [[]]],
}
OPTIONAL = ("guess", "known", "highest_lr", "rules", "progress", "anchors")  # version 0.1.0


def other_state():
    decay = DecoupledWD(optimizer := only_decays(), WD)
    optimizer.step()
    return decay.state_dict()


NOT_STATES = [{}, None, [], "steps", {0: other_state()}, only_decays().state_dict(), other_state()]


@pytest.mark.parametrize("key", ["the whole", *INVALID_STATE])
def test_an_invalid_state_is_refused_and_nothing_changes(key):  # P9, P10
    model, optimizer, decay = deferring()
    before = good = decay.state_dict()
    states = NOT_STATES
    if key in INVALID_STATE:
        values = [v(good[key]) if callable(v) else v for v in INVALID_STATE[key]]
        states = [{**good, key: value} for value in values]
        states += [] if key in OPTIONAL else [{k: v for k, v in good.items() if k != key}]
    for state in states:
        pattern = f"not the state of a.*({key}|lists|lacks)|the state is of"
        with refused(optimizer, ValueError, pattern):
            decay.load_state_dict(copy.deepcopy(state))
        assert decay.state_dict() == before
    assert later(model, optimizer, decay) == resumed()


ARGUMENTS_NOW = "and is .* in this one"
LOADED = {  # what differs in the saved state, and the warnings
    "nothing": ({}, []),
    "a later version's": ({"of a later version": {"a": [math.nan, None]}}, []),
    "no arguments": ({"arguments": {}}, []),
    "length": ({"total_steps": 30}, [f"total_steps was 30 in the saved run {ARGUMENTS_NOW}"]),
    "no length": ({"total_steps": None}, [f"total_steps was None .*{ARGUMENTS_NOW}"]),
    "epoch": ({"steps_per_epoch": 3}, [f"steps_per_epoch was 3 .*{ARGUMENTS_NOW}"]),
    "argument": ({"arguments": {"quantum": 0.5}}, [f"quantum was 0.5 .*{ARGUMENTS_NOW}"]),
}


@pytest.mark.parametrize(("changes", "patterns"), named(LOADED))
def test_a_state_is_loaded_with_a_warning_for_each_difference(changes, patterns):  # P9
    model, optimizer, decay = deferring()
    state = {**decay.state_dict(), **changes}
    _, messages = caught(lambda: decay.load_state_dict(state))
    assert len(messages) == len(patterns)
    assert all(map(re.search, patterns, messages))
    assert later(model, optimizer, decay)[0] == resumed()[0]
    if patterns:  # as an error it changes all or nothing
        _, _optimizer, decay = deferring(5)
        before = decay.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=patterns[0]):
                decay.load_state_dict(state)
        now, parts = decay.state_dict(), ("steps", "lr_max", "owed", "payments", "due")
        assert [now[key] for key in parts] in ([s[key] for key in parts] for s in (before, state))


def test_what_is_deferred_shows_in_the_comparison():
    """Negative control of the tests above."""
    model, optimizer, decay = deferring()
    assert all(deferred(decay))
    owed = [[0.0] * len(row) for row in decay.state_dict()["owed"]]
    decay.load_state_dict({**decay.state_dict(), "owed": owed})
    assert later(model, optimizer, decay)[0] != resumed()[0]


def in_training_only(progress):
    return 0.1 if progress < 0.1 else raises()


SCHEDULES_CHANGED = {  # the schedule, that of the resumed run, the warning
    "number": (Cosine(0.04, 0.4), 0.3, r"Cosine\(start=0.04, end=0.4\).*and is 0.3 in this"),
    "unknown": (in_training_only, Linear(1, 0), r"in_training_only.*and is Linear"),
    "the same": (in_training_only, in_training_only, None),
}


@pytest.mark.parametrize(("before", "now", "pattern"), named(SCHEDULES_CHANGED))
def test_a_changed_schedule_is_shown_by_its_name(before, now, pattern):  # P9
    _, optimizer = two_groups()
    with DecoupledWD(optimizer, before, total_steps=4) as decay:
        optimizer.step()
        state = decay.state_dict()
    decay = DecoupledWD(optimizer, now, total_steps=4)
    _, messages = caught(lambda: decay.load_state_dict(state))
    assert [bool(re.search(pattern, it)) for it in messages] == [True] * (pattern is not None)


def test_a_state_from_before_the_first_step_starts_afresh():  # P9
    _, optimizer = two_groups()
    decay = DecoupledWD(optimizer, WD, scale_by="lr_ratio", max_lr=1.0)
    state = decay.state_dict()
    optimizer.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    decay.load_state_dict(state)
    assert decay.state_dict() == state
    assert decay.coefficients == []


def test_a_state_for_groups_that_are_refused_changes_nothing():  # P9, P10
    _, optimizer, decay = deferring(5)
    other = decay.state_dict()
    optimizer.step()
    before = decay.state_dict()
    optimizer.param_groups[1]["weight_decay"] = None
    with refused(optimizer, TypeError, r"group 1.*weight_decay.*None"):
        decay.load_state_dict(other)
    assert decay.state_dict() == before


def of_0_1_0(state):
    return {**{key: value for key, value in state.items() if key != "position"}, "done": "1"}


LIGHTNING_STATES = {
    "none": (lambda state: None, r"optimizers \[0\]"),
    "a key": (lambda state: {"0": state}, r"optimizers \[0\].*'0'"),
    "of two": (lambda state: {0: state, 1: state}, r"optimizers \[0\].*1: "),
    "nothing": (lambda state: {0: {}}, "lacks steps, total_steps, length"),
    "plain": (lambda state: {0: {**other_state(), "position": 0.1, "length": 9}}, "parameters"),
    "position": (lambda state: {0: {**state, "position": math.nan}}, "position cannot be nan"),
    "of 0.1.0": (lambda state: {0: of_0_1_0(state)}, "done cannot be '1'"),
}


@pytest.mark.parametrize(("change", "pattern"), named(LIGHTNING_STATES))
def test_lightning_refuses_an_invalid_state(change, pattern):  # P9, P10
    decay, model = LightningWD(WD), StillModule()
    lightning_trainer(decay, epochs=1).fit(model)
    state, factor = change(decay.state_dict()[0]), Factor(model)
    loads = at(LightningCallback, "on_fit_start", lambda *_: decay.load_state_dict(state))
    trainer = lightning_trainer(decay, loads, epochs=1)
    with pytest.raises(ValueError, match=f"not the state of a DecoupledWD.*{pattern}|{pattern}"):
        trainer.fit(model)
    assert factor() == 1
    assert hooks_of(trainer.optimizers[0]) == []


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
    optimizer = only_decays([torch.float64, torch.float32], [torch.bfloat16])
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


# Schedules

HALF = (0.5, Linear(0, 1))
SCHEDULES = [
    (Linear, (-0.1, 0), ValueError, r"start.* -0\.1"),
    (Linear, (0, math.nan), ValueError, "end.* nan"),
    (Linear, ("0", 0), TypeError, "start.* '0'"),
    (Linear, (True, 0), TypeError, "start.* True"),
    (Linear, (Linear(0, 1), 1), TypeError, "start.*Linear"),
    (Cosine, (0, math.inf), ValueError, "end.* inf"),
    (Exponential, (0, 1), ValueError, "start.* 0"),
    (Exponential, (1, 0), ValueError, "end.* 0"),
    (Polynomial, (0, 1, 0), ValueError, "power.* 0"),
    (Polynomial, (0, -1, 1), ValueError, "end.* -1"),
    (Steps, ({},), ValueError, "values.*key 0"),
    (Steps, ({0.5: 1},), ValueError, r"key 0, got \[0\.5\]"),
    (Steps, ({0: 1, 1.0: 2},), ValueError, r"key.* below 1, got 1\.0"),
    (Steps, ({0: 1, -1: 1},), ValueError, "key.* -1"),
    (Steps, ({"0": 1},), TypeError, "key.*'0'"),
    (Steps, ({0: -1},), ValueError, r"values\[0\].* -1"),
    (Steps, ([0.1],), TypeError, r"values.*\[0\.1\]"),
    (Join, (None,), TypeError, "pairs, got None"),
    (Join, ([],), ValueError, "add up to 1, got 0"),
    (Join, ([HALF],), ValueError, r"add up to 1, got 0\.5"),
    (Join, ([(0, Linear(0, 1)), HALF, HALF],), ValueError, "fraction.* got 0"),
    (Join, ([("1", len)],), TypeError, "fraction.*'1'"),
    (Join, ([Linear(0, 1)],), TypeError, "pairs"),
    (Join, ([(1, 0.1)],), TypeError, "pairs"),
    (Restarts, (0.1, 2), TypeError, r"schedule.*0\.1"),
    (Restarts, (len, 0), ValueError, "cycles.* 0"),
    (Restarts, (len, 1.5), ValueError, r"cycles.* 1\.5"),
    (Restarts, (len, 2, 0), ValueError, "mult.* 0"),
    (Restarts, (len, 2000, 2), ValueError, "2000.*mult 2"),
    (Normalized, (-1,), ValueError, "wd_norm.* -1"),
    (Timescale, (), ValueError, "epochs or steps"),
    (Timescale, (1, 2), ValueError, "epochs or steps"),
    (Timescale, (0,), ValueError, "epochs.* 0"),
    (Timescale, (None, 1), ValueError, "steps.*above 1, got 1"),
]


@pytest.mark.parametrize(
    ("cls", "arguments", "error", "pattern"),
    SCHEDULES,
    ids=[f"{cls.__name__}{arguments}" for cls, arguments, *_ in SCHEDULES],
)
def test_an_invalid_schedule_is_refused(cls, arguments, error, pattern):  # P10
    with pytest.raises(error, match=f"(?s){cls.__name__}.*{pattern}"):
        cls(*arguments)


def test_a_schedule_is_refused_where_it_has_no_value():  # P10
    with pytest.raises(ValueError, match="progress.*nan"):
        Steps({0: 1})(math.nan)
    for schedule in (Normalized(0.1), Timescale(3)):
        with pytest.raises(TypeError, match="no value before"):
            schedule(0.5)
