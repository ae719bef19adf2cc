"""Everything that a training loop may do to an optimizer and its decay, in any order.

A state machine (hypothesis) draws an optimizer, dtypes, arguments and a sequence of actions. After
each action the weights, the deferred decay and the param groups are those of the reference in
``reference/decay.py``. The optimizer's own update is compared with that of a copy without a decay,
which starts from the decayed weights.

The run in the test suite is short and always the same. A longer one, different each time:

    HYPOTHESIS_PROFILE=deep pytest -n 0 tests/test_state_machine.py

``MACHINE_EXAMPLES`` (per optimizer) and ``MACHINE_STEPS`` set its length.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import math
import os
import pickle
import re
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers import (
    DEEP,
    INNER_WD,
    CallsSuper,
    Climber,
    WithoutWD,
    deferred,
    hooks_of,
    params_of,
    weights,
)
from hypothesis import HealthCheck, Phase, seed, settings, stateful
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
    "WithoutWD": (WithoutWD, {}),
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


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


DTYPES = {name_of(it): it for it in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
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
        wd = {} if optimizer is WithoutWD else {"weight_decay": INNER_WD}
        return cls(model, added, optimizer(groups, lr=0.1, **wd, **options))

    @property
    def groups(self):
        return self.optimizer.param_groups

    def deferred(self):
        values = [] if self.decay is None else deferred(self.decay)
        return values or [0.0] * len(params_of(self.optimizer))

    def seen(self):
        """The parameters as the reference sees them."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [
            [Weight(names.get(id(p), "added"), name_of(p.dtype), p.grad is not None) for p in group]
            for group in (group["params"] for group in self.groups)
        ]


@dataclass
class Totals:
    """Of one parameter, as -log of factors: due and applied."""

    due: float = 0.0
    applied: float = 0.0

    def deferred(self):
        return self.due - self.applied


@dataclass
class Expected:
    """What is known of a run beside its objects, so that a deep copy is a checkpoint."""

    arguments: dict[str, Any]
    groups: list[dict[str, Any]]  # as the user has set them
    reference: ReferenceDecay
    totals: list[Totals]
    may_be_zeroed: bool = False  # the weight decay, as a step has raised


def options(groups):
    return [{key: value for key, value in g.items() if key != "params"} for g in groups]


def put(optimizer, values):
    for p, value in zip(params_of(optimizer), values):
        p.data.copy_(value)


def same(a, b):
    return all(map(torch.equal, a, b))


def same_state(a, b):
    pairs = [(a.state.get(p, {}), b.state.get(q, {})) for p, q in zip(params_of(a), params_of(b))]
    return all(
        set(x) == set(y)
        and all(torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for k in x)
        for x, y in pairs
    )


# Steps


class RaisedError(Exception):
    """Raised on demand."""


@dataclass
class Step:
    """A call of ``step``, for an optimizer with a decay and for its copy without one."""

    with_grad: tuple[bool, ...]  # which parameters have a gradient, repeated
    seed: int
    scale: float  # of the gradients
    closure: str | None = None  # "positional", "keyword"
    # "early", "late": the pre-hook of another; "post": a post-hook; an index: the update of that
    # param group; a pair: the evaluation, and whether after it has set the gradients.
    raises: str | int | tuple[int, bool] | None = None
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
        evaluation = 0

        def closure():
            nonlocal evaluation
            if self.raises == (evaluation, False):
                raise RaisedError
            self.set_gradients(optimizer, evaluation)
            when_final(evaluation)
            if self.raises == (evaluation, True):
                raise RaisedError
            evaluation += 1
            return torch.zeros(())

        if isinstance(self.raises, int):
            fail_at(optimizer, self.raises)
        try:
            if self.closure == "positional":
                optimizer.step(closure)
            elif self.closure == "keyword":
                optimizer.step(closure=closure)
            else:
                self.set_gradients(optimizer)
                when_final(0)
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

    def makes_gradients_final(self):
        """Whether the decay is called, with final gradients."""
        if self.closure is None:
            return self.raises != "early"
        return self.raises not in ("early", "late", (0, False), (0, True))


def raise_error(*_):
    raise RaisedError


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
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._look(optimizer)
            return None

        def evaluate():
            before = weights(optimizer)
            loss = closure()
            assert self.decayed is None or same(before, weights(optimizer))  # P1
            self._look(optimizer)
            return loss

        return (optimizer, evaluate), {}

    def _look(self, optimizer):
        if self.decayed is None:
            self.decayed = weights(optimizer)
        self.own_wds += [g.get("weight_decay", 0.0) for g in optimizer.param_groups]


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


def check_close(x, y, factor, rounding):
    """Checks that ``y`` is ``x * factor``, rounded once, with a factor off by ``rounding``."""
    eps = torch.finfo(x.dtype).eps
    smallest = torch.finfo(x.dtype).smallest_normal * eps
    bound = x.double().abs() * (0.51 * eps + 1e-15 + rounding) + smallest
    assert ((y.double() - x.double() * factor).abs() <= bound).all()


# The machine

lrs = st.sampled_from([0.1, 0.5, 0.03, 1e-3, 0.0])
wds = st.sampled_from([0.2, 1e-4, 0.0, 1])
grads = st.sampled_from([(True,), (True, False), (True, True, False), (False, True), (False,)])
closures = st.sampled_from(["positional", "keyword"])
errors = st.sampled_from([0, 1, "early", "late", "post"])


def calls(**fields):
    return st.builds(Step, grads, st.integers(0, 99), st.sampled_from([0.0, 0.1]), **fields)


class Machine(stateful.RuleBasedStateMachine):
    def __init__(self, name):
        super().__init__()
        self.name = name

    @stateful.initialize(
        dtype=st.sampled_from([*DTYPES, "mixed", "bfloat16"]),
        arguments=arguments,
        second_wd=st.sampled_from([INNER_WD, 0.0]),
        keys=st.sampled_from([{}, {"initial_lr": 0.2}, {"initial_lr": 0.05, "max_lr": 0.4}]),
    )
    def start(self, dtype, arguments, second_wd, keys):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.saved = self.other = None
        self.cls, given = OPTIMIZERS[self.name]
        self.needs_closure, self.has_own_wd = self.cls is Climber, self.cls is not WithoutWD
        adams = (torch.optim.Adam, torch.optim.AdamW, CallsSuper)
        self.takes_tensor_lr = self.cls in adams and "foreach" not in given
        model = Model()
        dtypes = MIXED if dtype == "mixed" else [DTYPES[dtype]] * 5
        for p, each in zip(model.parameters(), dtypes):
            p.data = p.data.to(each)
        self.run = Run.new(self.name, model, [])
        self.run.groups[1].update(keys, **({"weight_decay": second_wd} if self.has_own_wd else {}))
        self.attach_to(self.run, arguments)
        self.save()

    def attach_to(self, run, arguments):
        """Attaches a decay with nothing deferred, and starts the reference anew.

        Returns False if it is refused.
        """
        if arguments["wd"] is None and not self.has_own_wd:
            arguments = {**arguments, "wd": 0.01}
        arguments = {
            name: [value[i % len(value)] for i in range(len(run.groups))]
            if isinstance(value, list)
            else value
            for name, value in arguments.items()
        }
        reference = {name: value for name, value in arguments.items() if name != "exclude"}
        reference["excluded"] = frozenset(EXCLUDED[arguments["exclude"]])
        reference["lrs_at_attaching"] = [float(group["lr"]) for group in run.groups]
        new = Expected(
            arguments,
            copy.deepcopy(options(run.groups)),
            ReferenceDecay(**reference),
            [Totals() for _ in params_of(run.optimizer)],
        )
        try:
            with warnings_of_changes():
                run.decay = DecoupledWD(run.optimizer, model=run.model, **arguments)
        except ValueError:
            with pytest.raises(RefusedError):  # a max_lr of 0 is refused here or at the first step
                copy.deepcopy(new.reference).step(new.groups, run.seen())
            return False
        self.expected = new
        return True

    @property
    def is_attached(self):
        return self.run.decay is not None

    # Steps

    @rule(step=calls(closure=st.none() | closures), count=st.sampled_from([1, 1, 1, 4]))
    def steps(self, step, count):
        self.check_steps(step, count)

    @rule(step=calls(closure=closures, raises=st.tuples(st.integers(0, 2), st.booleans())))
    def closure_raises(self, step):
        evaluation, has_set_gradients = step.raises
        raises = evaluation if self.needs_closure else 0, has_set_gradients
        self.check_steps(replace(step, raises=raises))

    @rule(step=calls(closure=closures | st.none(), raises=errors))
    def step_raises(self, step):
        self.check_steps(step)

    @precondition(lambda self: not self.needs_closure and not self.has_float16())
    @rule(step=calls(), kinds=st.lists(st.sampled_from(["finite", "overflow"]), min_size=1))
    def steps_by_scaler(self, step, kinds):
        for kind in kinds[:4]:
            step = replace(step, scaler=kind, seed=step.seed + 1)
            step.set_gradients(self.run.optimizer)
            if any(p.grad is not None for p in params_of(self.run.optimizer)):
                self.check_step(step)

    def has_float16(self):
        return any(p.dtype == torch.float16 for p in params_of(self.run.optimizer))

    def check_steps(self, step, count=1):
        if self.needs_closure and step.closure is None:
            step = replace(step, closure="positional")
        for index in range(count):
            self.check_step(replace(step, seed=step.seed + index))

    @precondition(lambda self: self.is_attached)
    @rule(step=calls(closure=closures))
    def step_with_huge_lr(self, step):
        """A shrink is 1 or more, if any is above 0."""
        before = [group["lr"] for group in self.expected.groups]
        self.set_lrs([1e6] * len(before))
        try:
            copy.deepcopy(self.expected.reference).step(self.expected.groups, self.run.seen())
        except RefusedError:
            self.check_steps(step)
        self.set_lrs(before)

    def set_lrs(self, lrs):
        for group, expected, lr in zip(self.run.groups, self.expected.groups, lrs):
            group["lr"] = expected["lr"] = lr

    def check_step(self, step):
        """Makes a step; compares with the reference, and with a copy that has no decay."""
        run, expected, optimizer = self.run, self.expected, self.run.optimizer
        before, old = weights(optimizer), run.deferred()
        undecayed = copy.deepcopy(optimizer)  # torch copies no hooks
        takes_found_inf = getattr(optimizer, "_step_supports_amp_scaling", False)
        if takes_found_inf:  # which torch does not copy either
            undecayed._step_supports_amp_scaling = True
        for group, mine in zip(undecayed.param_groups, expected.groups):
            group.update(copy.deepcopy(mine))
            if self.is_attached and "weight_decay" in group:
                group["weight_decay"] = 0.0

        # The step

        def check_groups_in_closure(_):
            if step.closure:
                assert options(run.groups) == expected.groups  # P3

        observer = Observer()
        with self.hooks_of_others(step, observer), warnings_of_changes():
            error = step.make(optimizer, check_groups_in_closure)

        # The decay

        skipped = step.scaler == "overflow" and not takes_found_inf  # `step` is not called
        on_device = step.scaler is not None and takes_found_inf
        due = None
        if self.is_attached and step.makes_gradients_final() and not skipped:
            try:
                due = expected.reference.step(expected.groups, run.seen(), on_device)
            except RefusedError:
                assert isinstance(error, ValueError)  # P10
                assert same(weights(optimizer), before)
                assert run.deferred() == old
                expected.may_be_zeroed = False
                return
            assert run.decay.coefficients == expected.reference.coefficients  # P6, P13
        assert not isinstance(error, ValueError), error
        decayed = before if observer.decayed is None else observer.decayed
        if due is None or step.scaler == "overflow":
            assert same(decayed, before)  # P1
            assert run.deferred() == old
        else:
            due = itertools.chain(*due)
            for each in zip(before, decayed, old, run.deferred(), due, expected.totals):
                check_weight(*each, on_device)
        assert not (self.is_attached and any(observer.own_wds))  # P3

        # The update

        if step.raises in ("early", "late") or skipped:
            put(undecayed, decayed)
        else:
            expected_error = step.make(
                undecayed, lambda evaluation: evaluation or put(undecayed, decayed)
            )
            from_hook = RaisedError if step.raises == "post" else None
            assert type(error) in (type(expected_error), from_hook)
            assert same_state(optimizer, undecayed)  # P3
        assert same(weights(optimizer), weights(undecayed))  # P4

        # After some errors torch does not say that the step is over

        if step.raises != "early" and not skipped:
            hooks_run_twice = step.raises == "post" and self.cls is CallsSuper
            in_update = isinstance(step.raises, int) or step.raises == "late"
            expected.may_be_zeroed = error is not None and (in_update or hooks_run_twice)

    @contextlib.contextmanager
    def hooks_of_others(self, step, observer):
        optimizer = self.run.optimizer
        hooks = [optimizer.register_step_pre_hook(observer)]
        if step.raises == "post":
            hooks.append(optimizer.register_step_post_hook(raise_error))
        elif step.raises in ("early", "late"):
            hooks.append(optimizer.register_step_pre_hook(raise_error))
        if step.raises == "early":
            optimizer._optimizer_step_pre_hooks.move_to_end(hooks[-1].id, last=False)
        yield
        for hook in hooks:
            hook.remove()

    # What the user changes

    @rule(data=st.data(), lr=lrs, as_tensor=st.booleans())
    def set_lr(self, data, lr, as_tensor):
        index = data.draw(st.integers(0, len(self.run.groups) - 1))
        value = torch.tensor(lr) if as_tensor and self.takes_tensor_lr else lr
        self.run.groups[index]["lr"] = self.expected.groups[index]["lr"] = value

    @precondition(lambda self: self.has_own_wd)
    @rule(data=st.data(), wd=wds)
    def set_wd(self, data, wd):
        index = data.draw(st.integers(0, len(self.run.groups) - 1))
        self.run.groups[index]["weight_decay"] = self.expected.groups[index]["weight_decay"] = wd

    @rule(place=st.integers(0, 4), requires_grad=st.booleans())
    def freeze_or_unfreeze(self, place, requires_grad):
        list(self.run.model.parameters())[place].requires_grad_(requires_grad)

    def has_lists(self):
        return any(isinstance(each, list) for each in self.expected.arguments.values())

    @precondition(lambda self: len(self.run.groups) < 4)
    @precondition(lambda self: not (self.is_attached and self.has_lists()))
    @rule(dtype=st.sampled_from(list(DTYPES)), wd=wds)
    def add_param_group(self, dtype, wd):
        p = nn.Parameter(torch.linspace(-1, 1, 5).to(DTYPES[dtype]))
        group = {"params": [p], **({"weight_decay": wd} if self.has_own_wd else {})}
        self.run.added.append(p)
        self.run.optimizer.add_param_group(group)
        self.expected.groups += copy.deepcopy(options(self.run.groups[-1:]))
        self.expected.totals.append(Totals())

    @rule(dtype=st.sampled_from([None, *DTYPES]))
    def move_to_dtype(self, dtype):
        if dtype is not None:
            for p in [*self.run.model.parameters(), *self.run.added]:
                p.data, p.grad = p.data.to(DTYPES[dtype]), None
        # The optimizer casts its state, and has new dicts for groups afterwards.
        self.run.optimizer.load_state_dict(self.run.optimizer.state_dict())
        self.expected.may_be_zeroed = False

    @rule()
    def look(self):
        """Nothing changes."""
        refused = ""
        state = self.run.optimizer.state_dict()
        self.expected.may_be_zeroed = False
        assert options(state["param_groups"]) == self.expected.groups  # P3
        if self.is_attached:
            with warnings_of_changes():
                try:
                    str(self.run.decay.describe())
                except ValueError as error:  # P10: the next step would raise it
                    refused = str(error)
            assert re.search("^$|max_lr|shrink its weights", refused)

    # Detaching, attaching, saving, loading, copying

    @precondition(lambda self: self.is_attached)
    @rule(by_with=st.booleans())
    def detach(self, by_with):
        with warnings_of_changes():
            with self.run.decay if by_with else contextlib.nullcontext():
                pass
            self.run.decay.detach()
        self.run.decay = None
        self.expected.may_be_zeroed = False
        self.expected.totals = [Totals() for _ in self.expected.totals]

    @precondition(lambda self: not self.is_attached)
    @rule(arguments=arguments)
    def attach(self, arguments):
        self.attach_to(self.run, arguments)

    @rule()
    def save(self):
        run, file = self.run, io.BytesIO()
        states = [part and part.state_dict() for part in (run.optimizer, run.decay)]
        torch.save([run.model.state_dict(), *states, [p.detach() for p in run.added]], file)
        self.expected.may_be_zeroed = False
        self.saved = file.getvalue(), copy.deepcopy(self.expected)

    @rule(
        saves_first=st.booleans(),
        arguments=st.one_of(st.none(), arguments),
        optimizer_first=st.booleans(),
    )
    def load(self, saves_first, arguments, optimizer_first):
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
        current = self.expected
        if not self.attach_to(run, arguments or saved.arguments):
            return
        if not optimizer_first:
            run.optimizer.load_state_dict(optimizer)
        self.expected.groups = copy.deepcopy(saved.groups)
        if decay is not None:
            changed = [k for k, v in self.expected.arguments.items() if v != saved.arguments[k]]
            try:
                reference = self.expected.reference.loaded_from(saved.reference, saved.groups)
            except RefusedError:
                with pytest.raises(ValueError, match="max_lr"):  # P10
                    run.decay.load_state_dict(decay)
                self.expected = current
                return
            with warnings_of_changes(*changed):  # P9
                run.decay.load_state_dict(decay)
            self.expected.reference = reference
            self.expected.totals = copy.deepcopy(saved.totals)
        self.run = run

    # Hooks do not reach a copy that is made after the optimizer's own step has raised.
    @precondition(lambda self: not self.expected.may_be_zeroed)
    @rule(by_pickle=st.booleans(), go_on_with_copy=st.booleans())
    def copy_all(self, by_pickle, go_on_with_copy):
        """Goes on with one of the two; the other has to stay as it is."""
        self.check_other()
        duplicate = pickle.loads(pickle.dumps(self.run)) if by_pickle else copy.deepcopy(self.run)
        one, other = (duplicate, self.run) if go_on_with_copy else (self.run, duplicate)
        self.run = one
        self.other = other, weights(one.optimizer), one.deferred(), copy.deepcopy(self.expected)
        self.check_other()

    # After every action

    def check_other(self):
        if self.other is not None:
            run, values, old, expected = self.other
            assert same(weights(run.optimizer), values)
            assert run.deferred() == old
            check_groups(run, expected)

    @stateful.invariant()
    def check(self):
        if not hasattr(self, "run"):
            return
        run, expected = self.run, self.expected
        check_groups(run, expected)
        assert bool(hooks_of(run.optimizer)) == self.is_attached
        if self.is_attached:
            state = run.decay.state_dict()
            assert state["steps"] == expected.reference.steps  # P6
            if expected.reference.group_count:
                assert state["lr_max"] == expected.reference.max_lrs
            for left, totals in zip(run.deferred(), expected.totals):
                assert math.isclose(totals.deferred(), left, rel_tol=1e-9, abs_tol=1e-12)  # P8

    def teardown(self):
        if hasattr(self, "run"):
            self.check_other()


def check_groups(run, expected):
    for group, mine in zip(options(run.groups), expected.groups):
        if expected.may_be_zeroed and group.get("weight_decay") == 0:
            group["weight_decay"] = mine["weight_decay"]
        assert group == mine  # P3


def check_weight(x, y, old, new, due, totals, on_device):
    """Checks what a step has done to a weight: ``x`` before and ``y`` after the decay.

    ``old`` and ``new`` are the deferred decay before and after it.
    """
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    grain = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24  # what no factor can represent
    limit = max(due.quantum, 2 * grain)  # of the deferred decay
    totals.due += due.as_log()
    if due.shrink == 0:
        assert torch.equal(x, y)  # P2
        assert new == old
    elif due.at_once and (on_device or -math.expm1(-old) < limit):
        assert new == old
        if on_device and is_half:
            check_close(x, y, 1 - due.shrink, 2.0**-8 * due.shrink)  # P8
        else:
            assert torch.equal(y, x.clone().mul_(due.factor))  # P4
        totals.applied += due.as_log()
    else:
        total = old + due.as_log()
        if -math.expm1(-total) < limit * (1 - 1e-9):
            assert torch.equal(x, y)
            assert math.isclose(new, total, rel_tol=1e-12)
        elif new != total:
            applied = total - new
            check_close(x, y, math.exp(-applied), 0 if x.dtype == torch.float64 else 2.0**-24)
            totals.applied += applied
        assert 0 <= -math.expm1(-new) < limit * (1 + 1e-9)  # P8
    assert math.isclose(totals.deferred(), new, rel_tol=1e-9, abs_tol=1e-12)  # P8


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_machine(name):
    examples = 200 if DEEP else 30 if name == "Adam fused" else 12  # it alone handles overflows
    bounds = settings(
        derandomize=not DEEP,
        max_examples=int(os.environ.get("MACHINE_EXAMPLES", examples)),
        stateful_step_count=int(os.environ.get("MACHINE_STEPS", "60" if DEEP else "30")),
        deadline=None,
        database=None,
        phases=list(Phase) if DEEP else [Phase.generate],  # shrinks only what the long run finds
        print_blob=DEEP,
        suppress_health_check=list(HealthCheck),
    )
    machine = partial(Machine, name)
    if not DEEP:
        machine = seed(list(OPTIMIZERS).index(name))(machine)
    stateful.run_state_machine_as_test(machine, settings=bounds)
