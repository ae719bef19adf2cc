"""Invalid input: tables of what is given, the error and what its message says.

A refusal changes no weight and leaves the optimizer as it was. Most rows run in a plain loop; a few
show that the other adapters make the same checks. Hypothesis draws states; more of them, at random:

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
    weights,
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

from wd_callbacks import schedules
from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.lightning import DecoupledWD as LightningWD
from wd_callbacks.schedules import Linear, Normalized, Steps, Timescale
from wd_callbacks.torch import DecoupledWD
from wd_callbacks.transformers import DecoupledWD as TrainerWD

WD = 0.1


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


def cases(names, rows):
    """A test for each row of a dict."""
    return pytest.mark.parametrize(names.split(), rows.values(), ids=rows)


# Arguments


def never(name, parameter):
    return False


def raises(*_):
    raise LookupError("of the user")


COEFFICIENT = "number or a schedule"
NEAREST = "matches no parameter.*nearest"
COUNT = "whole number of at least 1, got"
ARGUMENTS = [
    ("wd", -0.1, ValueError, r"at least 0, got -0\.1"),
    ("wd", math.inf, ValueError, "got inf"),
    ("wd", np.float32("nan"), ValueError, "got nan"),
    ("wd", "1e-4", TypeError, rf"{COEFFICIENT}.*'1e-4' \(str\)"),
    ("wd", True, TypeError, rf"{COEFFICIENT}.*True \(bool\)"),
    ("wd", torch.ones(2), TypeError, rf"{COEFFICIENT}.*shape \(2,\) \(Tensor\)"),
    ("wd", Normalized, TypeError, "Normalized"),  # the class instead of an instance
    ("wd", [], ValueError, "empty sequence"),
    ("wd", [0.1, -1], ValueError, r"wd\[1\].* -1"),
    ("wd", range(3), ValueError, "3 values.* 2 param groups: pass one value per group"),
    ("wd", {}, ValueError, "empty mapping"),
    ("wd", {None: 0.1}, TypeError, "keys of wd.*None"),
    ("wd", {nn.Linear: -0.1}, ValueError, r"wd\['torch\.nn\..*Linear'\].* -0\.1"),
    ("wd", {"*": [0.1, 0.1]}, TypeError, r"wd\['?\*'?\].*0\.1, 0\.1"),
    ("wd", {"*": 0.1, "2.*": 0.1}, ValueError, rf"2\.\*.*{NEAREST}.*'1\.bias'"),  # P7, P14
    ("wd", {0: 0.1}, TypeError, "attaches one DecoupledWD to each optimizer"),
    ("wd", {"*": 0.1, 0: 0.1}, TypeError, r"mixes.*\['\*', 0\]"),
    ("wd", {-1: 0.1}, TypeError, "key -1"),
    ("wd", {True: 0.1}, TypeError, "key True"),
    ("wd", {0: [0.1, -1]}, ValueError, r"wd\[0\]\[1\].* -1"),
    ("wd", {0: {0: 0.1}}, TypeError, r"wd\[0\] is a mapping inside"),
    ("scale_by", None, TypeError, "'lr_ratio'.*None"),
    ("scale_by", ["lr", "LR"], ValueError, r"scale_by\[1\].*'lr_ratio', 'lr_squared'.*'LR'"),
    ("scale_by", ["lr"], ValueError, "1 values.* 2 param groups"),
    ("max_lr", 0, ValueError, "above 0, got 0"),
    ("max_lr", [1.0], ValueError, "1 values.* 2 param groups"),
    ("max_lr", [1.0, None], TypeError, r"max_lr\[1\].*None"),
    ("quantum", -1e-3, ValueError, r"at least 0, got -0\.001"),
    ("quantum", 1, ValueError, "below 1, got 1"),
    ("verbose", "no", TypeError, "True or False.*'no'"),
    ("cautious", 0.5, TypeError, r"True or False.*0\.5"),  # P16
    ("anchor", "zero", TypeError, "'initial'.*'zero'"),  # P15
    ("anchor", torch.ones(2), TypeError, "mapping.*Tensor"),
    ("anchor", {}, ValueError, "names no"),
    ("anchor", {"0.weight": 1.0}, TypeError, r"anchor\['0.weight'\] is 1\.0, expected a tensor"),
    ("anchor", {"0.wieght": torch.ones(1)}, ValueError, "no parameter.*0.wieght.*'0.weight'"),
    ("anchor", {"0.weight": torch.ones(2, 3)}, ValueError, r"0.weight'\].*\(2, 3\).*\(3, 3\)"),
    ("exclude", None, TypeError, "None.*'bias'.*glob.*predicate"),
    ("exclude", {"bias": True}, TypeError, "bias.*True"),
    ("exclude", torch.ones(100, 100), TypeError, r"shape \(100, 100\).*pass its name"),
    ("exclude", [nn.LayerNorm(8)], TypeError, "of LayerNorm.*LayerNorm without parentheses"),
    ("exclude", nn.Sequential(nn.LayerNorm(8)), TypeError, "instance of Sequential"),
    ("exclude", "decoder.*", ValueError, rf"decoder\.\*.*{NEAREST}"),  # P7
    ("exclude", "norms", ValueError, f"'norms'.*{NEAREST}.*'norm'"),
    ("exclude", ["bias", ""], ValueError, f"''.*{NEAREST}"),
    ("exclude", nn.Conv2d, ValueError, "torch.nn.*Conv2d.*matches no parameter"),
    ("exclude", "torch.nn.Conv2d", ValueError, rf"torch\.nn\.Conv2d.*{NEAREST}"),
    ("exclude", "no.such.Module", ValueError, rf"no\.such\.Module.*{NEAREST}"),
    ("exclude", never, ValueError, "never.*matches no parameter"),
    ("total_steps", 0, ValueError, f"{COUNT} 0"),
    ("total_steps", 2.5, ValueError, rf"{COUNT} 2\.5"),
    ("steps_per_epoch", True, ValueError, f"{COUNT} True"),
    ("progress", 0.5, TypeError, r"callable.*0\.5"),
    ("model", "m", TypeError, r"torch\.nn\.Module"),
    ("total_step", 9, TypeError, "unexpected keyword"),
]


@pytest.mark.parametrize(("argument", "value", "error", "pattern"), ARGUMENTS)
def test_an_invalid_argument_is_refused_by_its_name(argument, value, error, pattern):  # P7, P10
    model, optimizer = start()
    with refused(optimizer, error, pattern) as found:
        DecoupledWD(optimizer, **{"wd": WD, "model": model, "total_steps": 4, argument: value})
    assert argument in str(found.value)
    assert len(str(found.value)) < 500
    assert hooks_of(optimizer) == []


def no_own_wd(model, optimizer):
    for group in optimizer.param_groups:
        del group["weight_decay"]


def no_marks(model, optimizer):
    model.no_weight_decay = lambda: None


def group_has(**values):
    return lambda model, optimizer: optimizer.param_groups[1].update(values)


UNKNOWN, LENGTH = {"total_steps": None}, "pass total_steps or progress"
NO_LENGTH = {**UNKNOWN, "progress": lambda: 0.0}
SHORT = {"wd": Timescale(epochs=0.1), "steps_per_epoch": 10}
RATIO, NINE = {"scale_by": "lr_ratio"}, {"wd": Timescale(steps=9)}
REAL_RATE = "scale_by='none', or a callable"
NAMED = {"0.weight": torch.ones(3, 3)}
TOGETHER = {  # arguments, a change of the model or the optimizer, error, pattern
    "length": ({"wd": Linear(0, 1), **UNKNOWN}, None, ValueError, LENGTH),
    "length, keys": ({"wd": {"*": Linear(0, 1)}, **UNKNOWN}, None, ValueError, LENGTH),
    "exclude": ({"exclude": "bias", "model": None}, None, ValueError, "exclude.*pass model"),
    "keys": ({"wd": {"*": WD}, "model": None}, None, ValueError, "wd.*pass model"),
    "anchors": ({"anchor": NAMED, "model": None}, None, ValueError, "anchor.*pass model"),
    # P16
    "cautious": ({"cautious": True, "quantum": 0.1}, None, ValueError, "cautious.*quantum=0"),
    "half": ({"cautious": True}, lambda m, _: m[1].half(), ValueError, "cautious.*float16"),
    "marks": ({"exclude": "marked"}, no_marks, TypeError, r"no_weight_decay\(\).*None"),
    "raises": ({"exclude": raises}, None, LookupError, r"user.*predicate.*parameter '0\.weight'"),
    "no lr": ({}, lambda _, o: o.param_groups[1].pop("lr"), ValueError, f"no 'lr'.*{REAL_RATE}"),
    "lr=None": (RATIO, group_has(lr=None), ValueError, f"lr=None.*{REAL_RATE}"),
    "no own wd": ({"wd": None}, no_own_wd, ValueError, "wd=None.*none"),
    "groups": ({"wd": [1] * 2}, lambda _, o: o.param_groups.pop(), ValueError, "1 param group[^s]"),
    "ratio": (RATIO, group_has(lr=0.0), ValueError, "group 1.*lr_ratio.*max_lr"),
    "Timescale": (NINE, group_has(lr=0.0), ValueError, "steps=9.*max_lr"),
    "Timescale, scale": ({**NINE, "scale_by": len}, None, ValueError, "callable"),
    "Timescale, epochs": ({"wd": Timescale(epochs=3)}, None, ValueError, "steps_per_epoch"),
    "Timescale, short": (SHORT, None, ValueError, "above 1, got 1"),
    "Normalized": ({"wd": Normalized(1), **NO_LENGTH}, None, ValueError, "Normalized.*total_steps"),
}


@cases("arguments change error pattern", TOGETHER)
def test_arguments_that_do_not_go_with_the_rest_are_refused(arguments, change, error, pattern):
    model, optimizer = start()  # P7, P10
    if change is not None:
        change(model, optimizer)
    with refused(optimizer, error, pattern):
        DecoupledWD(optimizer, **{"wd": WD, "model": model, "total_steps": 4, **arguments})
    assert hooks_of(optimizer) == []


def only_decays(*dtypes, **options):
    """SGD of weights of 1 with gradients of 0, each in a param group of its own."""
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes or [torch.float64] * 2]
    zero_gradients(params)
    return torch.optim.SGD([{"params": [p]} for p in params], lr=0.1, **options)


ACCEPTED = {  # arguments and the coefficients of the first step
    "numpy": ({"wd": np.float32(0.5), "max_lr": np.array(0.5)}, [0.5, 0.5]),
    "half": ({"wd": torch.tensor(0.5, dtype=torch.half)}, [0.5, 0.5]),
    "numbers": ({"wd": deque([torch.tensor(0.5), np.int64(0)])}, [0.5, 0]),
    "a number, a schedule": ({"wd": (0.5, lambda p: 1), "total_steps": np.int64(9)}, [0.5, 1]),
    "below 0": ({"wd": Linear(0.5, 1), "progress": lambda: -0.5}, [0.5, 0.5]),
    "above 1": ({"wd": Linear(0.5, 1), "progress": lambda: np.array(1.5)}, [1, 1]),
    "a schedule of tensors": ({"wd": lambda p: torch.tensor(p + 0.5), "total_steps": 9}, [0.5] * 2),
    "nothing excluded": ({"wd": 0.5, "exclude": set(), "verbose": None}, [0.5, 0.5]),
    "another model": ({"wd": 0.5, "model": nn.Linear(1, 1)}, [0.5, 0.5]),
}


@cases("arguments coefficients", ACCEPTED)
def test_what_looks_odd_is_accepted(arguments, coefficients, recwarn):  # P10
    optimizer = only_decays()
    decay = DecoupledWD(optimizer, quantum=0, **arguments)
    optimizer.step()
    assert decay.coefficients == pytest.approx(coefficients)
    for p, wd in zip(params_of(optimizer), coefficients):
        assert p.tolist() == pytest.approx([1 - 0.1 * wd] * 3, rel=1e-12)
    assert not recwarn.list


def test_odd_groups_are_accepted(recwarn):  # P2
    for change in (
        lambda group: setattr(group["params"][0], "grad", None),
        lambda group: group["params"].clear(),
        lambda group: group.update(max_lr=None, weight_decay=-math.inf),  # not used
    ):
        optimizer = only_decays(weight_decay=INNER_WD)
        change(optimizer.param_groups[0])
        DecoupledWD(optimizer, 0.5)
        optimizer.step()
        for p in params_of(optimizer):
            assert torch.equal(p, torch.full_like(p, 1 if p.grad is None else 0.95))
    assert not recwarn.list


# At a step


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


NAN = r"wd\[1\].*nan_later.*progress 0\.5 .*nan"
ENTRY = {"exclude": ["*.bias", "0.*t"]}
AT_A_STEP = {  # arguments, steps before, what changes then, error, pattern
    "shrink": ({"wd": 15.0}, 0, None, ValueError, r"group 0.*1\.5.*lr 0\.1.*wd 15.*'lr'"),
    "of 1": ({"wd": 1.0, "scale_by": "none"}, 0, None, ValueError, "group 0.*wd 1,.*'none'"),
    "lr": ({}, 2, group_has(lr=20.0), ValueError, r"group 1.* 2,.*lr 20\.0.*wd 0\.1.*'lr'"),
    "schedule": ({"wd": [WD, nan_later]}, 2, None, ValueError, NAN),
    "schedule raises": ({"wd": raises}, 0, None, LookupError, "of the user"),
    "progress raises": ({"progress": raises}, 0, None, LookupError, "of the user"),
    "values": ({"wd": [WD, WD]}, 2, new_group, ValueError, "wd has 2 values.*3 param groups"),
    "predicate": ({"exclude": raises_for_the_new}, 2, new_group, LookupError, "of the user"),
    "entry": (ENTRY, 2, new_without_old, ValueError, "exclude.*0.\\*t.*no p"),
}


@cases("arguments steps change error pattern", AT_A_STEP)
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
    optimizer.param_groups[1]["lr"] = 0.1
    before = weights(optimizer)[1]
    optimizer.step()
    assert torch.equal(params_of(optimizer)[1], before * (1 - 0.1 * INNER_WD))


SOURCES = {  # arguments that read a number of the user's, by what the message calls it
    "wd": lambda now: {"wd": lambda progress: now()},
    "wd[1]": lambda now: {"wd": [WD, lambda progress: now()]},
    "wd['1.*']": lambda now: {"wd": {"1.*": lambda progress: now(), "*": WD}},
    "scale_by": lambda now: {"scale_by": lambda group: now()},
    "progress": lambda now: {"wd": Linear(WD, WD), "progress": now},
    "lr": lambda now: {},
    "weight_decay": lambda now: {"wd": None},
    "max_lr": lambda now: {"scale_by": "lr_ratio"},
    "initial_lr": lambda now: {"scale_by": "lr_squared"},
}
IN_THE_GROUP = ("lr", "weight_decay", "max_lr", "initial_lr")
INVALID_VALUES = {  # by what the message shows
    "'0.1'": "0.1",
    r"tensor\(\[1., 1.\]\)": torch.ones(2),
    "True": True,
    "None": None,
    "nan": math.nan,
    "inf": torch.tensor(math.inf),
    "-0.0?1": -0.1,
}
VALID = {"max_lr": "None", "initial_lr": "None", "progress": "-0.0?1"}  # nevertheless


def steps_with(source, values, closure):
    """A step with each value: returns the errors, and the weights and the state at the end."""
    model, optimizer = start()
    value = 0.3
    if source in IN_THE_GROUP:
        optimizer.param_groups[1][source] = value
    arguments = {"wd": WD, "total_steps": 40, **SOURCES[source](lambda: value)}
    decay, errors = DecoupledWD(optimizer, model=model, **arguments), []
    for value in values:
        if source in IN_THE_GROUP:
            optimizer.param_groups[1][source] = value
        try:
            optimizer.step(closure)
        except (TypeError, ValueError) as error:
            errors.append(error)
    return errors, (comparable(params_of(optimizer)), comparable(decay.state_dict()))


@pytest.mark.parametrize("source", SOURCES)
def test_a_refused_value_is_as_if_it_never_was(source):  # P6, P10
    """With the value mended, the run goes on as one that never had it."""
    after = [0.3, 0.3, 0.2, 0.2]
    is_read_once = source in ("max_lr", "initial_lr")
    for before, closure in [([], None), ([0.3, 0.3], lambda: None)][: 1 if is_read_once else 2]:
        _, expected = steps_with(source, [*before, *after], closure)
        for shown, value in INVALID_VALUES.items():
            if shown != VALID.get(source):
                (error,), end = steps_with(source, [*before, value, *after], closure)
                assert end == expected
                name = re.escape(source).replace("_", "[ _]")
                assert re.search(f"{name}|peak learning rate", str(error))
                assert re.search(shown, str(error))


def test_a_warning_as_an_error_changes_nothing():  # P10
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2).to_sparse()
    optimizer = torch.optim.SGD([p], lr=0.1)
    DecoupledWD(optimizer, WD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="sparse gradient"):
            optimizer.step()
        assert torch.equal(p, torch.ones(2, 2))
        warnings.simplefilter("ignore")
        optimizer.step()
    torch.testing.assert_close(p.data, torch.full((2, 2), 1 - 0.1 * WD - 0.1))


@pytest.mark.parametrize("loads", [True, False])
def test_a_forgotten_load_state_dict_warns(loads):  # P6
    _, optimizer = two_groups(momentum=0.9)
    with DecoupledWD(optimizer, Linear(1, 0), total_steps=8) as decay:
        for _ in range(4):
            optimizer.step()
        state = decay.state_dict()
    decay = DecoupledWD(optimizer, Linear(1, 0), total_steps=8)
    if loads:
        decay.load_state_dict(state)
    _, messages = caught(optimizer.step)
    assert ["call load_state_dict" in message for message in messages] == [True] * (not loads)
    assert decay.coefficients == [0.5 if loads else 1] * 2


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


def of_lightning(*cbs, model=None):
    model, trainer = model or StillModule(), lightning_trainer(*cbs, epochs=1)
    return model, lambda: trainer.fit(model), lambda: trainer.optimizers[0]


def of_trainer(*cbs, **settings):
    trainer = hf_trainer(*cbs, epochs=1, **settings)
    return trainer.model, trainer.train, lambda: trainer.optimizer


RUNS = {  # the adapter, and what makes a model, its training and what returns its optimizer
    "fastai": (FastaiWD, of_fastai),
    "OptimWrapper": (FastaiWD, partial(of_fastai, opt_func=wrapped(torch.optim.SGD))),
    "lightning": (LightningWD, of_lightning),
    "transformers": (TrainerWD, of_trainer),
}
OF_ALL = {  # arguments, steps before, pattern
    "an entry": ({"exclude": "decoder.*"}, 0, rf"decoder\.\*.*{NEAREST}"),  # P7
    "a shrink": ({"wd": 30.0}, 0, r"group 0.* 3,.*lr 0\.1, wd 30"),
    "a schedule": ({"wd": nan_later}, 2, r"nan_later.*progress 0\.5 is nan"),
}


@pytest.mark.parametrize("adapter", RUNS)
@cases("arguments steps pattern", OF_ALL)
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
    is_plain = cls is DecoupledWD
    make = partial(cls, optimizer, model=model, total_steps=4) if is_plain else cls
    with pytest.raises(ValueError, match="wd must be finite and at least 0"):
        make(-0.1)
    decay = make(Linear(1, 0), exclude="bias", anchor=NAMED)
    shown = "DecoupledWD(Linear(start=1, end=0), exclude=['bias'], anchor=<1 tensors>)"
    assert repr(decay) == shown
    assert repr(copy.deepcopy(decay)) == repr(pickle.loads(pickle.dumps(decay))) == repr(decay)
    for name, value in ASSIGNED:
        with pytest.raises(AttributeError, match=f"{name} is fixed when DecoupledWD is built"):
            setattr(decay, name, value)
        assert getattr(decay, name) != value
    if not is_plain:
        with pytest.raises(ValueError, match="nothing to describe before"):
            decay.describe()
    if cls in (FastaiWD, TrainerWD):
        with pytest.raises(TypeError, match="maps optimizer indices.*has one optimizer"):
            make({0: 0.1})


INDEX = "index.*whole number of at least 0"
OF_OPTIMIZERS = [
    *[({"optimizers": given}, INDEX) for given in (-1, "0", True, [], {0})],
    ({"optimizers": [0, 0]}, r"twice.*\[0, 0\]"),
    ({"optimizers": 2}, "2.*2 optimizers"),
    ({"wd": {2: 0.1}}, r"optimizers \[2\].*\[0, 1\]"),
    ({"wd": {1: 0.1}}, r"pass optimizers=\[1\]"),
]


@pytest.mark.parametrize(("arguments", "pattern"), OF_OPTIMIZERS, ids=str)
def test_lightning_refuses_optimizers_that_are_not_there(arguments, pattern):  # P10
    model = StillModule()
    model.automatic_optimization = False
    model.configure_optimizers = lambda: [sgd([p]) for p in model.parameters()]
    factor = Factor(model)
    with pytest.raises((TypeError, ValueError), match=pattern):
        of_lightning(LightningWD(**{"wd": WD, **arguments}), model=model)[1]()
    assert factor() == 1


@pytest.mark.parametrize("adapter", RUNS)
def test_two_decays_are_to_be_merged(adapter):  # P10
    cls, make = RUNS[adapter]
    for options in [{}] + [{"optimizers": 0}] * (adapter == "lightning"):
        with pytest.raises(ValueError, match="two DecoupledWD.*merge|attached already.*merge"):
            make(cls(0.1), cls(0.2, **options))[1]()


def decayed(optimizer):
    DecoupledWD(optimizer, WD)
    return optimizer


def test_optimizers_that_cannot_take_the_decay_are_refused():  # P5, P10
    for change, pattern in (
        (decayed, "SGD has a DecoupledWD attached already"),
        (WithoutHooks, "WithoutHooks never runs step hooks.*'base'"),
    ):
        model = StillModule()
        optimizer = change(sgd(model.parameters()))
        model.configure_optimizers = lambda it=optimizer: it
        with pytest.raises(ValueError, match=pattern):
            of_lightning(LightningWD(WD), model=model)[1]()
    model = StillNet()
    optimizers = decayed(sgd(model.parameters())), None
    with pytest.raises(ValueError, match="attached already"):
        of_trainer(TrainerWD(WD), model=model, optimizers=optimizers)[1]()
    learn = still_learner(opt_func=wrapped(torch.optim.SGD), cbs=FastaiWD(WD))
    learn.create_opt()
    decayed(learn.opt.opt)
    with pytest.raises(ValueError, match="attached already"):
        learn.fit(1)


FRAMEWORKS = ("fastai", "lightning", "transformers")
WRONG = [(a, b) for a in ("torch", *FRAMEWORKS) for b in FRAMEWORKS if a != b]


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


def in_training_only(progress):
    return small(progress) if progress < 0.9 else raises()


def deferring(steps=9):
    """A decay that has applied some and deferred the rest, and its model and optimizer."""
    model, optimizer = start()
    decay = DecoupledWD(optimizer, [in_training_only, 2.2e-6], total_steps=40)
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


AMOUNTS = [math.nan, math.inf, -1e-9, "0", None]
LISTS = [None, 5, "ab", [None], [0.5], [0.5] * 3]
ROWS = [*LISTS, [[0, 0]], [[0, 0]] * 3, [[0], [0, 0]]]
INVALID_STATE = {  # two groups of two parameters: what is put in place of an entry
    "steps": [None, "3", 2.5, -1],
    "arguments": [None],
    "owed": [*ROWS, *[[[value, 0], [0, 0]] for value in [*AMOUNTS, 40.0]]],
    "payments": [*ROWS, *[[[value, 0], [0, 0]] for value in [*AMOUNTS, 1.5]]],
    "due": [*LISTS, *[[value, 0] for value in AMOUNTS]],
    "lr_max": [*LISTS, *[[value, 0.1] for value in (-1, 0.0, "1", math.inf)]],
    "no_decay": [*LISTS, [0], *[[value, 0] for value in ("0", None, 2)]],
    "guess": [5, [0], [2, 0]],
    "known": [5, [1], [2, 1]],
    "highest_lr": [5, [0.1], [-1, 0.1]],
    "rules": [5, [[0, None]], [5, 5]],
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
    good, states = decay.state_dict(), NOT_STATES
    if key in INVALID_STATE:
        states = [{**good, key: value} for value in INVALID_STATE[key]]
        states += [] if key in OPTIONAL else [{k: v for k, v in good.items() if k != key}]
    for state in states:
        pattern = f"not the state of a.*({key}|lists|lacks)|the state is of"
        with refused(optimizer, ValueError, pattern):
            decay.load_state_dict(copy.deepcopy(state))
        assert decay.state_dict() == good
    assert later(model, optimizer, decay) == resumed()


def of_arguments(wd, shown):
    return {"arguments": {"wd": wd, "shown": {"wd": shown}}}


NOW = "in the saved run and is .* in this one"
LOADED = {  # what differs in the saved state, and the warning
    "nothing": ({}, None),
    "a later version's": ({"of a later version": {"a": [math.nan, None]}}, None),
    "no arguments": ({"arguments": {}}, None),
    "length": ({"total_steps": 30}, f"total_steps was 30 {NOW}"),
    "no length": ({"total_steps": None}, f"total_steps was None {NOW}"),
    "epoch": ({"steps_per_epoch": 3}, f"steps_per_epoch was 3 {NOW}"),
    "argument": ({"arguments": {"quantum": 0.5}}, f"quantum was 0.5 {NOW}"),
    "schedule": (of_arguments([[1, 1, 1, 1, 0], 0], "[x, 0]"), rf"wd was \[x, 0\] {NOW}"),
    "unknown": (of_arguments([None, 2.2e-6], "[x, 2.2e-06]"), rf"wd was \[x, 2.2e-06\] {NOW}"),
    "the same": (of_arguments([None, 2.2e-6], "[in_training_only, 2.2e-06]"), None),
}


@cases("changes pattern", LOADED)
def test_a_state_is_loaded_with_a_warning_for_each_difference(changes, pattern):  # P9
    model, optimizer, decay = deferring()
    state = {**decay.state_dict(), **changes}
    _, messages = caught(lambda: decay.load_state_dict(state))
    assert [bool(re.search(pattern, it)) for it in messages] == [True] * (pattern is not None)
    loaded = decay.state_dict()
    assert later(model, optimizer, decay)[0] == resumed()[0]
    if pattern:  # as an error it changes all or nothing
        _, _optimizer, decay = deferring(5)
        before = decay.state_dict()
        with warnings.catch_warnings(), pytest.raises(UserWarning, match=pattern):
            warnings.simplefilter("error")
            decay.load_state_dict(state)
        assert decay.state_dict() in (before, loaded)


def test_what_is_deferred_shows_in_the_comparison():
    """Negative control of the tests above."""
    model, optimizer, decay = deferring()
    assert all(deferred(decay))
    owed = [[0.0] * len(row) for row in decay.state_dict()["owed"]]
    decay.load_state_dict({**decay.state_dict(), "owed": owed})
    assert later(model, optimizer, decay)[0] != resumed()[0]


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


@cases("change pattern", LIGHTNING_STATES)
def test_lightning_refuses_an_invalid_state(change, pattern):  # P9, P10
    decay = LightningWD(WD)
    model, train, _ = of_lightning(decay)
    train()
    state, factor = change(decay.state_dict()[0]), Factor(model)
    loads = at(LightningCallback, "on_fit_start", lambda *_: decay.load_state_dict(state))
    _, train, optimizer = of_lightning(decay, loads, model=model)
    with pytest.raises(ValueError, match=pattern):
        train()
    assert factor() == 1
    assert hooks_of(optimizer()) == []


# Fuzzing

ROUNDING = {torch.float64: 1e-14, torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7}

numbers = st.integers(-2, 60) | st.floats(0, 1) | st.floats() | st.just(10**400)
text = st.text(max_size=3)
anything = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=2),
    max_leaves=4,
)


def places(state):
    """Every mapping and list in the state, with each of its keys."""
    items = {dict: dict.items, list: enumerate}.get(type(state), lambda _: ())(state)
    return [place for key, value in items for place in ((state, key), *places(value))]


def mutated(state, data):
    """The state with one change at one place."""
    state = copy.deepcopy(state)
    found = places(state)
    if not found:
        return data.draw(anything)
    holder, key = found[data.draw(st.integers(0, len(found) - 1))]
    do = data.draw(st.sampled_from(["replace", "delete", "duplicate"]))
    if do == "replace":
        holder[key] = data.draw(anything)
    elif do == "delete":
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    return state


def check_a_step(optimizer, decay):
    """Checks that what a step applies and what it defers then are what was deferred and due."""
    before, owed = weights(optimizer), deferred(decay) or [0.0] * 3
    first = 0.1 * small(min(decay.steps / 40, 1))
    optimizer.step()
    shrinks = [first, first, 0.1 * 0.07]
    for p, was, shrink, old, left in zip(
        params_of(optimizer), before, shrinks, owed, deferred(decay)
    ):
        due = old - math.log1p(-shrink)
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
    optimizer = only_decays(*ROUNDING)
    decay = DecoupledWD(optimizer, [small, small, 0.07], total_steps=40)
    for _ in range(4):
        optimizer.step()
    before, values = decay.state_dict(), comparable(params_of(optimizer))
    state = before
    for _ in range(data.draw(st.integers(1, 3))):
        state = mutated(state, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            decay.load_state_dict(state)
        except (TypeError, ValueError):
            assert decay.state_dict() == before
        assert comparable(params_of(optimizer)) == values
        for _ in range(4):
            check_a_step(optimizer, decay)


# Schedules

HALF_THE_RUN = (0.5, Linear(0, 1))
SCHEDULES = [
    ("Linear", (-0.1, 0), ValueError, r"start.* -0\.1"),
    ("Linear", (0, math.nan), ValueError, "end.* nan"),
    ("Linear", (Linear(0, 1), 1), TypeError, "start.*Linear"),
    ("Cosine", (-1, 0), ValueError, "start.* -1"),
    ("Cosine", (0, math.inf), ValueError, "end.* inf"),
    ("Exponential", (0, 1), ValueError, "start.* 0"),
    ("Exponential", (1, 0), ValueError, "end.* 0"),
    ("Polynomial", (0, 1, 0), ValueError, "power.* 0"),
    ("Polynomial", (0, -1, 1), ValueError, "end.* -1"),
    ("Steps", ({0.5: 1},), ValueError, r"key 0, got \[0\.5\]"),
    ("Steps", ({0: 1, 1.0: 2},), ValueError, r"key.* below 1, got 1\.0"),
    ("Steps", ({0: 1, -1: 1},), ValueError, "key.* -1"),
    ("Steps", ({0: -1},), ValueError, r"values\[0\].* -1"),
    ("Steps", ([0.1],), TypeError, r"values.*\[0\.1\]"),
    ("Join", (None,), TypeError, "pairs, got None"),
    ("Join", ([HALF_THE_RUN],), ValueError, r"add up to 1, got 0\.5"),
    ("Join", ([(0, len), HALF_THE_RUN, HALF_THE_RUN],), ValueError, "fraction.* got 0"),
    ("Join", ([Linear(0, 1)],), TypeError, "pairs"),
    ("Join", ([(1, 0.1)],), TypeError, "pairs"),
    ("Restarts", (0.1, 2), TypeError, r"schedule.*0\.1"),
    ("Restarts", (len, 0), ValueError, "cycles.* 0"),
    ("Restarts", (len, 2, 0), ValueError, "mult.* 0"),
    ("Restarts", (len, 2000, 2), ValueError, "2000.*mult 2"),
    ("Normalized", (-1,), ValueError, "wd_norm.* -1"),
    ("Timescale", (), ValueError, "epochs or steps"),
    ("Timescale", (1, 2), ValueError, "epochs or steps"),
    ("Timescale", (0,), ValueError, "epochs.* 0"),
    ("Timescale", (None, 1), ValueError, "steps.*above 1, got 1"),
]


@pytest.mark.parametrize(("name", "arguments", "error", "pattern"), SCHEDULES)
def test_an_invalid_schedule_is_refused(name, arguments, error, pattern):  # P10
    with pytest.raises(error, match=f"(?s){name}.*{pattern}"):
        getattr(schedules, name)(*arguments)


def test_a_schedule_is_refused_where_it_has_no_value():  # P10
    with pytest.raises(ValueError, match="progress.*nan"):
        Steps({0: 1})(math.nan)
    for schedule in (Normalized(0.1), Timescale(3)):
        with pytest.raises(TypeError, match="no value before"):
            schedule(0.5)
