"""Everything that a training loop may do to an optimizer and its decay, in any order.

A state machine (hypothesis) draws an optimizer, dtypes, arguments and a sequence of actions. After
each action the weights, the deferred decay and the param groups are those of the reference in
``reference/decay.py``. The optimizer's own update is compared with that of a copy without a decay,
which starts from the decayed weights.

The run in the test suite is short and always the same. A longer one, different each time:

    HYPOTHESIS_PROFILE=deep pytest -n 0 tests/test_state_machine.py
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import math
import pickle
import re
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import helpers
import pytest
import torch
from helpers import DEEP, INNER_WD, CallsSuper, Climber, params_of, same, weights
from hypothesis import HealthCheck, seed, settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from reference.decay import ReferenceDecay, RefusedError, Weight
from torch import nn

from wd_callbacks.schedules import Linear
from wd_callbacks.torch import DecoupledWD

# Optimizers

EPS = {"eps": 1e-3}  # in float16 the default is 0
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"foreach": False}),
    "SGD momentum foreach": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    "Adam foreach": (torch.optim.Adam, {"foreach": True, **EPS}),
    "Adam fused": (torch.optim.Adam, {"fused": True, **EPS}),
    "AdamW": (torch.optim.AdamW, EPS),
    "Climber": (Climber, {}),
    "CallsSuper": (CallsSuper, EPS),
}


# Arguments

falling, small = Linear(0.3, 0), Linear(1e-4, 2e-4)


def half_lr(group):
    return 0.5 * group["lr"]


EXCLUDED = {  # the names of the parameters that these entries mean
    (): (),
    ("bias",): ("layer.bias", "norm.bias"),
    ("norm",): ("norm.weight", "norm.bias"),
    ("layer.*",): ("layer.weight", "layer.bias"),
    (nn.LayerNorm, "wide"): ("wide", "norm.weight", "norm.bias"),
}
WDS = [0.06, 0.3, 0.01, 1e-4, 3e-6, None, falling, small, [0.3, small], [3e-6, 0.0]]
SCALES = ["lr", "lr_ratio", "lr_squared", "none", half_lr, ["lr", "none"]]
arguments = st.fixed_dictionaries(  # lists have one value per param group, repeated for more
    {
        "wd": st.sampled_from(WDS),
        "scale_by": st.sampled_from(SCALES),
        "max_lr": st.sampled_from([None, 0.2, [0.5, 0.1]]),
        "exclude": st.sampled_from(list(EXCLUDED)),
        "quantum": st.sampled_from([None, 0, 0.05, 1e-3]),
        "total_steps": st.sampled_from([20, 7]),
    }
)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MIXED = [torch.bfloat16, torch.float32, torch.float64, torch.float16, torch.float32]


class Model(nn.Module):
    """A tensor that is spread over two binades, and small ones."""

    def __init__(self):
        super().__init__()
        signs = torch.linspace(-1, 1, 256).sign()
        self.wide = nn.Parameter(signs * (0.5 + 1.5 * torch.rand(256)))
        self.layer, self.norm = nn.Linear(3, 2), nn.LayerNorm(4)


# What a user has, and what is expected of it


@dataclass
class Run:
    """What a user has. It is copied and pickled as a whole."""

    model: Model
    added: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    decay: DecoupledWD | None = None

    @classmethod
    def new(cls, name, model, added):
        """An optimizer of this name with two param groups, and one for each added parameter."""
        wide, weight, *rest = model.parameters()
        groups = [{"params": [wide, weight]}, {"params": rest}, *({"params": [p]} for p in added)]
        optimizer, options = OPTIMIZERS[name]
        return cls(model, added, optimizer(groups, lr=0.1, weight_decay=INNER_WD, **options))

    @property
    def groups(self):
        return self.optimizer.param_groups

    @property
    def options(self):
        """The param groups without their parameters."""
        return [{key: value for key, value in g.items() if key != "params"} for g in self.groups]

    @property
    def deferred(self):
        values = [] if self.decay is None else helpers.deferred(self.decay)
        return values or [0.0] * len(params_of(self.optimizer))

    def seen(self):
        """The parameters as the reference sees them."""
        names = {p: name for name, p in self.model.named_parameters()}
        return [
            [
                Weight(names.get(p, "added"), str(p.dtype).split(".")[1], p.grad is not None)
                for p in group["params"]
            ]
            for group in self.groups
        ]


@dataclass
class Expected:
    """What is known of a run beside its objects, so that a deep copy is a checkpoint."""

    arguments: dict[str, Any]
    groups: list[dict[str, Any]]  # as the user has set them
    reference: ReferenceDecay
    deferred: list[float]
    may_be_zeroed: bool = False  # the weight decay, as a step has raised


def state_of(optimizer):
    return [helpers.comparable(optimizer.state.get(p, {})) for p in params_of(optimizer)]


# Steps


class RaisedError(Exception):
    """Raised on demand."""


@dataclass
class Step:
    """A call of ``step``, for an optimizer with a decay and for its copy without one."""

    with_grad: tuple[bool, ...]  # which parameters have a gradient, repeated
    seed: int
    scale: float  # of the gradients
    closure: bool = False
    # The update of a param group, or an evaluation and whether after it has set the gradients.
    raises: int | tuple[int, bool] | None = None
    scaler: str | None = None  # a GradScaler makes the step: "finite", "overflow"

    def set_gradients(self, optimizer, evaluation=0):
        """Gradients that depend on the weights."""
        for place, p in enumerate(params_of(optimizer)):
            p.grad = None
            if self.with_grad[place % len(self.with_grad)] and p.requires_grad:
                seed = 1000 * self.seed + 100 * evaluation + place
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
                p.grad = ((noise + p.detach()) * self.scale).to(p.dtype)
                if self.scaler == "overflow":
                    p.grad.fill_(torch.inf)

    def make(self, optimizer, when_final):
        """Makes the step and returns what it raised; calls ``when_final`` at every evaluation."""
        evaluations = itertools.count()

        def closure():
            evaluation = next(evaluations)
            if self.raises == (evaluation, False):
                raise RaisedError
            self.set_gradients(optimizer, evaluation)
            when_final(evaluation)
            if self.raises == (evaluation, True):
                raise RaisedError
            return torch.zeros(())

        if isinstance(self.raises, int):
            fail_at(optimizer, self.raises)
        try:
            if self.closure:
                optimizer.step(closure=closure)
            else:
                closure()
                if self.scaler is None:
                    optimizer.step()
                else:
                    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
                    scaler.scale(torch.zeros(()))
                    scaler.step(optimizer)
        except (RaisedError, ValueError) as error:
            return error
        finally:  # torch leaves the scaler's two if a step has raised
            for name in ("_init_group", "grad_scale", "found_inf"):
                vars(optimizer).pop(name, None)
        return None


def fail_at(optimizer, index):
    """Lets the update of the param group ``index`` raise."""
    groups = itertools.count()

    def init_group(*args, **kwargs):
        if next(groups) >= index:
            raise RaisedError
        return type(optimizer)._init_group(optimizer, *args, **kwargs)

    optimizer._init_group = init_group


class Observer:
    """A pre-hook that runs after the decay's: it sees what the update sees."""

    def __init__(self):
        self.called = False
        self.decayed = None  # the weights, once the gradients are final
        self.own_wds = []

    def __call__(self, optimizer, args, kwargs):
        if self.called:  # `step` has called `super().step`
            return None
        self.called = True
        if "closure" not in kwargs:
            self._look(optimizer)
            return None

        def evaluate():
            before = weights(optimizer)
            loss = kwargs["closure"]()
            assert self.decayed is None or same(before, optimizer)  # P1
            self._look(optimizer)
            return loss

        return args, {"closure": evaluate}

    def _look(self, optimizer):
        if self.decayed is None:
            self.decayed = weights(optimizer)
        self.own_wds += [g["weight_decay"] for g in optimizer.param_groups]


CHANGED = re.compile(r"(\w+) was .* in the saved run and is .* in this one", re.DOTALL)
ALLOWED = re.compile(
    "no-decay|max_lr|nothing decays|does not name|total_steps|load_state_dict|only vectors"
    "|own weight decay shrinks"
)


@contextlib.contextmanager
def warnings_of_changes(*names):
    """Checks that exactly these arguments are said to differ, and that other warnings are known."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(w.message) for w in caught]
    assert len(set(messages)) == len(messages), messages
    changes = [match[1] for match in map(CHANGED.match, messages) if match]
    assert sorted(changes) == sorted(names)
    assert all(CHANGED.match(message) or ALLOWED.search(message) for message in messages), messages


def check_weight(x, y, old, new, due, on_device):
    """Checks a decay: the weights ``x`` before and ``y`` after, and what was and is deferred."""
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    grain = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24  # what no factor can represent
    limit = max(due.quantum, 2 * grain)  # of the deferred decay
    if due.shrink == 0:
        assert torch.equal(x, y)  # P2
        assert new == old
    elif due.at_once and (on_device or -math.expm1(-old) < limit):
        assert new == old
        if on_device and is_half:
            check_close(x, y, 1 - due.shrink, 2.0**-8 * due.shrink)  # P8
        else:
            assert torch.equal(y, x.clone().mul_(due.factor))  # P4
    else:
        total = old + due.as_log()
        if -math.expm1(-total) < limit * (1 - 1e-9):
            assert torch.equal(x, y)
            assert math.isclose(new, total, rel_tol=1e-12)
        elif new != total:
            check_close(x, y, math.exp(new - total), 0 if x.dtype == torch.float64 else 2.0**-24)
        assert 0 <= -math.expm1(-new) < limit * (1 + 1e-9)  # P8


def check_close(x, y, factor, rounding):
    """Checks that ``y`` is ``x * factor``, rounded once, with a factor off by ``rounding``."""
    eps = torch.finfo(x.dtype).eps
    smallest = torch.finfo(x.dtype).smallest_normal * eps
    bound = x.double().abs() * (0.51 * eps + 1e-15 + rounding) + smallest
    assert ((y.double() - x.double() * factor).abs() <= bound).all()


# The machine

places = st.integers(0, 11)  # of a param group, modulo their number
wds = st.sampled_from([0.2, 1e-4, 0.0, 1])


def calls(**fields):
    grads = [(True,), (True, False), (True, True, False), (False, True, True), (False,)]
    seeds, scales = st.integers(0, 99), st.sampled_from([0.0, 0.1])
    return st.builds(Step, st.sampled_from(grads), seeds, scales, **fields)


def attach(run, arguments):
    """Attaches a decay; returns what to expect of the run, or None if it is refused."""
    arguments = {
        name: [value[i % len(value)] for i in range(len(run.groups))]
        if isinstance(value, list)
        else value
        for name, value in arguments.items()
    }
    reference = {name: value for name, value in arguments.items() if name != "exclude"}
    reference["excluded"] = frozenset(EXCLUDED[arguments["exclude"]])
    reference["lrs_at_attaching"] = [float(group["lr"]) for group in run.groups]
    groups, reference = copy.deepcopy(run.options), ReferenceDecay(**reference)
    try:
        with warnings_of_changes():
            run.decay = DecoupledWD(run.optimizer, model=run.model, **arguments)
    except ValueError:
        with pytest.raises(RefusedError):  # a max_lr of 0 is refused here or at the first step
            reference.step(groups, run.seen())
        return None
    return Expected(arguments, groups, reference, [0.0] * len(params_of(run.optimizer)))


class Machine(stateful.RuleBasedStateMachine):
    def __init__(self, name):
        super().__init__()
        self.name = name

    @stateful.initialize(
        dtypes=st.sampled_from([*([dtype] * 5 for dtype in DTYPES), MIXED, [torch.bfloat16] * 5]),
        arguments=arguments,
        second_wd=st.sampled_from([INNER_WD, 0.0]),
        keys=st.sampled_from([{}, {"initial_lr": 0.2}, {"initial_lr": 0.05, "max_lr": 0.4}]),
    )
    def start(self, dtypes, arguments, second_wd, keys):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.saved = self.other = None
        self.needs_closure = self.name == "Climber"
        self.takes_tensor_lr = self.name in ("Adam fused", "AdamW", "CallsSuper")
        model = Model()
        for p, dtype in zip(model.parameters(), dtypes):
            p.data = p.data.to(dtype)
        self.run = Run.new(self.name, model, [])
        self.run.groups[1].update(keys, weight_decay=second_wd)
        self.expected = attach(self.run, arguments)
        self.save()

    @property
    def is_attached(self):
        return self.run.decay is not None

    # Steps

    @rule(step=calls(closure=st.booleans()), count=st.sampled_from([1, 1, 1, 4]))
    def steps(self, step, count):
        for index in range(count):
            self.check_step(replace(step, seed=step.seed + index))

    @rule(step=calls(closure=st.booleans(), raises=st.integers(0, 1)))
    def update_raises(self, step):
        self.check_step(step)

    @rule(step=calls(), evaluation=st.integers(0, 2), after=st.booleans())
    def closure_raises(self, step, evaluation, after):
        raises = evaluation if self.needs_closure else 0, after
        self.check_step(replace(step, raises=raises, closure=True))

    @precondition(lambda self: not self.needs_closure)
    @rule(step=calls(scaler=st.sampled_from(["finite", "overflow"])))
    def step_by_scaler(self, step):
        step.set_gradients(self.run.optimizer)
        params = params_of(self.run.optimizer)
        has_float16 = any(p.dtype == torch.float16 for p in params)
        if any(p.grad is not None for p in params) and not has_float16:
            self.check_step(step)

    def check_step(self, step):
        """Makes a step; compares with the reference, and with a copy that has no decay."""
        step = replace(step, closure=step.closure or self.needs_closure)
        run, expected, optimizer = self.run, self.expected, self.run.optimizer
        before, old = weights(optimizer), expected.deferred
        undecayed = copy.deepcopy(optimizer)  # torch copies no hooks
        takes_found_inf = getattr(optimizer, "_step_supports_amp_scaling", False)
        if takes_found_inf:  # which torch does not copy either
            undecayed._step_supports_amp_scaling = True
        for group, mine in zip(undecayed.param_groups, expected.groups):
            group.update(copy.deepcopy(mine))
            if self.is_attached:
                group["weight_decay"] = 0.0

        # The step

        def check_groups_in_closure(_):
            if step.closure:
                assert run.options == expected.groups  # P3

        observer = Observer()
        hook = optimizer.register_step_pre_hook(observer)
        with warnings_of_changes():
            error = step.make(optimizer, check_groups_in_closure)
        hook.remove()

        # The decay

        skipped = step.scaler == "overflow" and not takes_found_inf  # `step` is not called
        on_device = step.scaler is not None and takes_found_inf
        due = None
        if self.is_attached and step.raises not in ((0, False), (0, True)) and not skipped:
            try:
                due = expected.reference.step(expected.groups, run.seen(), on_device)
            except RefusedError:
                assert isinstance(error, ValueError)  # P10
                assert same(optimizer, before)
                assert run.deferred == old
                expected.may_be_zeroed = False
                return
            assert run.decay.coefficients == expected.reference.coefficients  # P6, P13
        assert not isinstance(error, ValueError), error
        decayed = before if observer.decayed is None else observer.decayed
        if due is None or step.scaler == "overflow":
            assert same(decayed, before)  # P1
            assert run.deferred == old
        else:
            for each in zip(before, decayed, old, run.deferred, itertools.chain(*due)):
                check_weight(*each, on_device)
        assert not (self.is_attached and any(observer.own_wds))  # P3
        expected.deferred = run.deferred

        # The update

        def put_decayed(evaluation):
            for p, value in zip(params_of(undecayed), decayed):
                if evaluation == 0:
                    p.data.copy_(value)

        if not skipped:
            assert type(error) is type(step.make(undecayed, put_decayed))
            assert state_of(optimizer) == state_of(undecayed)  # P3
            expected.may_be_zeroed = error is not None and isinstance(step.raises, int)
        assert same(optimizer, undecayed)  # P4

    # What the user changes

    def set_option(self, place, key, value):
        index = place % len(self.run.groups)
        self.run.groups[index][key] = self.expected.groups[index][key] = value

    @rule(place=places, lr=st.sampled_from([0.1, 0.5, 0.03, 1e-3, 0.0]), as_tensor=st.booleans())
    def set_lr(self, place, lr, as_tensor):
        self.set_option(place, "lr", torch.tensor(lr) if as_tensor and self.takes_tensor_lr else lr)

    @rule(place=places, wd=wds)
    def set_wd(self, place, wd):
        self.set_option(place, "weight_decay", wd)

    @rule(place=st.integers(0, 4), requires_grad=st.booleans())
    def freeze_or_unfreeze(self, place, requires_grad):
        list(self.run.model.parameters())[place].requires_grad_(requires_grad)

    def has_lists(self):
        return any(isinstance(each, list) for each in self.expected.arguments.values())

    @precondition(lambda self: len(self.run.groups) < 4)
    @precondition(lambda self: not (self.is_attached and self.has_lists()))
    @rule(dtype=st.sampled_from(DTYPES), wd=wds)
    def add_param_group(self, dtype, wd):
        p = nn.Parameter(torch.linspace(-1, 1, 5).to(dtype))
        self.run.added.append(p)
        self.run.optimizer.add_param_group({"params": [p], "weight_decay": wd})
        self.expected.groups.append(copy.deepcopy(self.run.options[-1]))
        self.expected.deferred = [*self.expected.deferred, 0.0]

    @rule(dtype=st.sampled_from([None, *DTYPES]))
    def move_to_dtype(self, dtype):
        if dtype is not None:
            for p in [*self.run.model.parameters(), *self.run.added]:
                p.data, p.grad = p.data.to(dtype), None
        # The optimizer casts its state, and has new dicts for groups afterwards.
        self.run.optimizer.load_state_dict(self.run.optimizer.state_dict())
        self.expected.may_be_zeroed = False

    @precondition(lambda self: self.is_attached)
    @rule()
    def describe(self):
        """Nothing changes."""
        with warnings_of_changes():
            try:
                str(self.run.decay.describe())
            except ValueError as error:  # P10: the next step would raise it
                assert re.search("max_lr|shrink its weights", str(error))

    # Detaching, attaching, saving, loading, copying

    @precondition(lambda self: self.is_attached)
    @rule()
    def detach(self):
        with warnings_of_changes():
            self.run.decay.detach()
        self.run.decay = None
        self.expected.may_be_zeroed = False
        self.expected.deferred = [0.0] * len(self.expected.deferred)

    @precondition(lambda self: not self.is_attached)
    @rule(arguments=arguments)
    def attach(self, arguments):
        self.expected = attach(self.run, arguments) or self.expected

    @rule()
    def save(self):
        run, file = self.run, io.BytesIO()
        states = [part and part.state_dict() for part in (run.optimizer, run.decay)]
        torch.save([run.model.state_dict(), *states, [p.detach() for p in run.added]], file)
        self.expected.may_be_zeroed = False
        self.saved = file.getvalue(), copy.deepcopy(self.expected)

    @rule(arguments=st.none() | arguments, saves_first=st.booleans(), optimizer_first=st.booleans())
    def load(self, arguments, saves_first, optimizer_first):
        """Into new objects, with the arguments that it was saved with or with others."""
        if saves_first:
            self.save()
        file, saved = self.saved
        model, optimizer, decay, added = torch.load(io.BytesIO(file), weights_only=True)
        new = Model()
        for name, p in new.named_parameters():
            p.data = p.data.to(model[name].dtype)
        new.load_state_dict(model)
        run = Run.new(self.name, new, [nn.Parameter(p) for p in added])
        if optimizer_first:
            run.optimizer.load_state_dict(optimizer)
        expected = attach(run, arguments or saved.arguments)
        if expected is None:
            return
        if not optimizer_first:
            run.optimizer.load_state_dict(optimizer)
        expected.groups = copy.deepcopy(saved.groups)
        if decay is not None:
            changed = [k for k, v in expected.arguments.items() if v != saved.arguments[k]]
            try:
                expected.reference = expected.reference.loaded_from(saved.reference, saved.groups)
            except RefusedError:
                with pytest.raises(ValueError, match="max_lr"):  # P10
                    run.decay.load_state_dict(decay)
                return
            with warnings_of_changes(*changed):  # P9
                run.decay.load_state_dict(decay)
            expected.deferred = saved.deferred
        self.run, self.expected = run, expected

    # Hooks do not reach a copy that is made after the optimizer's own step has raised.
    @precondition(lambda self: not self.expected.may_be_zeroed)
    @rule(by_pickle=st.booleans(), go_on_with_copy=st.booleans())
    def copy_all(self, by_pickle, go_on_with_copy):
        """Goes on with one of the two; the other has to stay as it is."""
        self.check_other()
        duplicate = pickle.loads(pickle.dumps(self.run)) if by_pickle else copy.deepcopy(self.run)
        one, other = (duplicate, self.run) if go_on_with_copy else (self.run, duplicate)
        self.run, self.other = one, (other, weights(one.optimizer), copy.deepcopy(self.expected))
        self.check_other()

    # After every action

    def check_other(self):
        if self.other is not None:
            run, values, expected = self.other
            assert same(run.optimizer, values)
            check_run(run, expected)

    @stateful.invariant()
    def check(self):
        check_run(self.run, self.expected)
        assert bool(helpers.hooks_of(self.run.optimizer)) == self.is_attached
        if self.is_attached:
            state, reference = self.run.decay.state_dict(), self.expected.reference
            assert state["steps"] == reference.steps  # P6
            assert state["lr_max"] == reference.max_lrs or not reference.group_count

    def teardown(self):
        if hasattr(self, "run"):
            self.check_other()


def check_run(run, expected):
    for group, mine in zip(run.options, expected.groups):
        if expected.may_be_zeroed and group["weight_decay"] == 0:
            group["weight_decay"] = mine["weight_decay"]
        assert group == mine  # P3
    assert run.deferred == expected.deferred  # P8


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_machine(name):
    examples = 200 if DEEP else 30 if name == "Adam fused" else 12  # it alone handles overflows
    bounds = settings(
        helpers.fuzz,
        max_examples=examples,
        stateful_step_count=60 if DEEP else 30,
        suppress_health_check=list(HealthCheck),
    )
    machine = partial(Machine, name)
    if not DEEP:
        machine = seed(list(OPTIMIZERS).index(name))(machine)
    stateful.run_state_machine_as_test(machine, settings=bounds)
