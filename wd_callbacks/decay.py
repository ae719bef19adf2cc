"""The decay itself: how much each param group shrinks, what it still owes, and the multiplication.

On every step each weight is multiplied by ``1 - shrink``, where ``shrink = scale * coefficient``:
the coefficient is the ``wd`` in force, the scale is what ``scale_by`` makes of the learning rate
(by default the learning rate itself, as in ``torch.optim.AdamW``).

A ``Decay`` knows no framework and holds no optimizer: it is handed the param groups.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy

from wd_callbacks.arguments import Arguments, Group, own_wd, wd_key
from wd_callbacks.checks import check_debts, number
from wd_callbacks.description import Description, Row
from wd_callbacks.schedules import Run

Groups: TypeAlias = Callable[[], Sequence[Group]]
Kind: TypeAlias = tuple[torch.device, torch.dtype, type, Any]

HALF_QUANTA = {torch.float16: 2.0**-8, torch.bfloat16: 2.0**-6}
QUANTUM = 2.0**-20
DOUBLES = (torch.float64, torch.complex128)

# Payments of one size move a half-precision weight by the same few units in the last place every
# time and are rounded the same way: in bfloat16 that is 2 % too little. These sizes average out.
SHARES = (1.0, 5 / 6, 2 / 3)

# What counts the in-place changes of a tensor, which autograd compares where a graph is kept.
_VERSIONS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

_LENT = float("0")  # recognized by identity, so that a 0.0 set by someone else is left alone


class Shrink(NamedTuple):
    """What a step takes from the weights of a param group.

    Numbers, or 0-dim tensors where only the device knows them.
    """

    amount: float | Tensor
    factor: float | Tensor  # 1 - amount, in the arithmetic of the learning rate


class Debt(NamedTuple):
    """What a parameter owes, and how often it has paid."""

    owed: float = 0.0  # -log of the factor that is still to be applied, so that it adds up
    payments: int = 0


@dataclass
class Cohort:
    """Parameters of one group with the same device, dtype, tensor type, mesh and debt."""

    kind: Kind
    params: list[Tensor]
    quantum: float
    debt: Debt

    def charge(self, shrink: float, factor: float) -> float | None:
        """The factor to apply now; None where the shrink only joins what is owed."""
        owed, payments = self.debt
        dtype = self.kind[1]
        # What a factor cannot represent. Half precision multiplies in float32.
        grain = 2.0**-53 if dtype in DOUBLES else 2.0**-24
        # A debt may be larger than the quantum where that was larger when it was saved.
        if shrink >= self.quantum and -math.expm1(-owed) < max(self.quantum, 2 * grain):
            return factor
        owed -= math.log1p(-shrink)
        payment = -math.expm1(-owed)
        if payment < self.quantum:
            self.debt = Debt(owed, payments)
            return None
        share = SHARES[payments % len(SHARES)] if dtype in HALF_QUANTA else 1.0
        if payment * (1 - share) < self.quantum:
            payment *= share
        payment = min(math.floor(payment / grain), 1 / grain - 1) * grain
        owed = max(0.0, owed + math.log1p(-payment))
        if shrink >= self.quantum and -math.expm1(-owed) * (1 - payment) < grain:
            owed = 0.0  # the end of it, from where on each step is applied as it is
        self.debt = Debt(owed, payments + 1)
        return 1 - payment

    def is_current(self, shrink: float) -> bool:
        """Whether its parameters are still what they were: they may move, or change their class.

        The first one tells, and each one where ``shrink`` is to be multiplied with.
        """
        if self.kind != _kind(self.params[0]):
            return False
        if shrink < self.quantum and self.debt.owed + 2 * shrink < self.quantum:
            return True
        device, dtype, cls, _ = self.kind
        found = torch._C._group_tensors_by_device_and_dtype([[*self.params]], False)
        same_class = list(map(type, self.params)).count(cls) == len(self.params)
        return same_class and found.keys() == {(device, dtype)}


@dataclass
class Account:
    """What a param group owes, in cohorts of those of its parameters that had a gradient last."""

    with_grad: list[Tensor] = field(default_factory=list)
    cohorts: list[Cohort] = field(default_factory=list)
    due: float = 0.0  # of parameters with a gradient at every step, as -log of the factor
    known: bool = True  # to the host: what was due, and that the steps have happened

    def is_current(self, with_grad: list[Tensor], shrink: Shrink) -> bool:
        """Whether the cohorts still hold for the parameters that have a gradient now."""
        amount = 1.0 if isinstance(shrink.amount, Tensor) else shrink.amount
        return (
            len(with_grad) == len(self.with_grad)
            and all(map(operator.is_, with_grad, self.with_grad))
            and all(cohort.is_current(amount) for cohort in self.cohorts)
        )


class Decay:
    """Decoupled weight decay of one optimizer: shrinks its groups and lends it a weight decay of 0.

    Args:
        arguments: What the user asked for.
        run: The length of the run, as far as it is known.
        peaks: The ``lr_max`` of the first param groups, where the caller knows better than they do.
        decays: Whether a parameter decays; None for all.
        warn: Where warnings go; each is said once.
    """

    def __init__(
        self,
        arguments: Arguments,
        *,
        run: Run = Run(),  # noqa: B008 frozen
        peaks: Sequence[float] = (),
        decays: Callable[[Tensor], bool] | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.arguments = arguments
        self._run = run
        self._resolved = arguments
        self.coefficients: list[float] = []
        self._peaks = peaks
        self.lr_max: list[float | None] = list(peaks)
        self._decays = decays
        self._warn = warn
        self._warned: set[Hashable] = set()
        self._no_decay: list[bool] = []
        self._has_started = False
        self._accounts: list[Account] = []
        self._whole = 0  # the number of param groups where they are not all alike
        self._dormant: dict[Tensor, Debt] = {}  # of parameters that had no gradient last
        self._lent: list[tuple[Group, str, Any]] = []
        self.steps = 0  # that were not refused
        self._progress = 0.0  # at the last step
        self._awaits_closure = False  # which is to be evaluated in the step that is being made
        self.attached = True  # cleared by a closure that detaches it

    # One step

    def begin(
        self,
        groups: Groups,
        progress: Callable[[], float],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found_inf: Tensor | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Decays for the step that begins, and lends the optimizer a weight decay of 0.

        With a closure the gradients are there only after its first evaluation: the decay follows
        that. Inside every evaluation the groups hold what the user set.

        Args:
            groups: Gives the optimizer's param groups.
            progress: Gives the training progress in [0, 1].
            args: Positional arguments of ``optimizer.step``.
            kwargs: Keyword arguments of ``optimizer.step``.
            found_inf: 0-dim tensor, above 0 where the step will be skipped on the device.

        Returns:
            The arguments to step with: ``args`` and ``kwargs`` with the closure wrapped.
        """
        self.give_back()
        closure = kwargs.get("closure", args[0] if args else None)
        self._awaits_closure = callable(closure)
        if not callable(closure):
            self.apply(groups(), progress(), found_inf)
        else:
            evaluate = self._after(closure, groups, progress, found_inf)
            if "closure" in kwargs:
                kwargs = {**kwargs, "closure": evaluate}
            else:
                args = (evaluate, *args[1:])
        self.lend(groups())
        return args, kwargs

    def _after(
        self,
        closure: Callable[..., Any],
        groups: Groups,
        progress: Callable[[], float],
        found_inf: Tensor | None,
    ) -> Callable[..., Any]:
        """The closure, followed by the decay where it is the first evaluation of the step."""

        @functools.wraps(closure)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            self.give_back()
            result = closure(*args, **kwargs)
            if self.attached:
                self._follow(groups, progress, found_inf)
            return result

        return evaluate

    @_disable_dynamo  # the closure itself may be compiled
    def _follow(
        self, groups: Groups, progress: Callable[[], float], found_inf: Tensor | None
    ) -> None:
        """What comes after an evaluation of the closure: the decay, if it is due, and the loan."""
        if self._awaits_closure:
            self.apply(groups(), progress(), found_inf)
            self._awaits_closure = False
        self.lend(groups())

    def skip(self, groups: Sequence[Group]) -> None:
        """Lends for a call of ``step`` that only sets up the optimizer's state."""
        self.give_back()
        self._awaits_closure = False
        self.lend(groups)

    def end(self) -> None:
        """Takes the weight decay back after a step, and tells of what went wrong in it."""
        if any(group[key] is not _LENT and group[key] != 0 for group, key, _ in self._lent):
            self._say(
                "a weight decay was set in a param group while the optimizer stepped, which took "
                "it on top of this one: set it before step"
            )
        self.give_back()
        if self._awaits_closure:
            self._say(
                "the optimizer has not evaluated the closure that its step was given, so that "
                "nothing decayed: evaluate it yourself, and call step without it"
            )

    def apply(
        self, groups: Sequence[Group], progress: float, found_inf: Tensor | None = None
    ) -> None:
        """Multiplies every parameter that has a gradient by ``1 - shrink``, or lets it owe that.

        Args:
            groups: The optimizer's param groups.
            progress: Training progress in [0, 1].
            found_inf: 0-dim tensor, above 0 where nothing is to be decayed.

        Raises:
            ValueError: A coefficient or a shrink makes no sense. No weight has changed then.
        """
        # All of them before the first weight is touched: any of them may be refused.
        shrinks = self._shrinks(groups, progress)
        self._open(groups, shrinks)
        self.steps += 1
        payers = [
            (account, shrink)
            for account, shrink in zip(self._accounts, shrinks)
            if isinstance(shrink.amount, Tensor) or shrink.amount > 0
        ]
        self._check_capture(payers)
        # Graphs that are kept stay valid. `p.data` would do that too, but take longest of all here.
        with torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(_VERSIONS):
            for account, shrink in payers:
                _pay(account, shrink, found_inf)
        if not self._has_started:
            self._start(groups)

    def _check_capture(self, payers: list[tuple[Account, Shrink]]) -> None:
        """Refuses to be captured in a CUDA graph whose replays would not decay as they should."""
        if not (payers and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
            return
        if not torch.cuda.is_current_stream_capturing():
            return
        if self.arguments.scheduled:
            raise ValueError(
                "a CUDA graph would replay the coefficient that it captures, but wd is a schedule: "
                "capture the steps without the optimizer's, or give wd a number"
            )
        for account, (amount, _) in payers:
            if any(not isinstance(amount, Tensor) and amount < c.quantum for c in account.cohorts):
                raise ValueError(
                    f"a CUDA graph cannot save up a shrink of {amount:g}, which is below the "
                    f"quantum: give quantum=0, or keep lr in a tensor on the device"
                )

    def preview(self, groups: Sequence[Group], progress: float) -> list[tuple[float, Any]]:
        """The coefficient and the shrink of each param group at ``progress``; nothing decays."""
        shrinks = self._shrinks(groups, progress)
        return [(wd, shrink.amount) for wd, shrink in zip(self.coefficients, shrinks)]

    def lend(self, groups: Sequence[Group]) -> None:
        """Sets the weight decay of ``groups`` to 0 until ``give_back``."""
        for group in groups:
            key = wd_key(group)
            if key is not None:
                self._lent.append((group, key, group[key]))
                group[key] = _LENT

    @_disable_dynamo
    def give_back(self) -> None:
        """Restores what ``lend`` replaced, unless something else has been set since."""
        for group, key, value in self._lent:
            if group[key] is _LENT:
                group[key] = value
        self._lent.clear()

    # How much

    def check_groups(self, groups: Sequence[Group]) -> None:
        """Checks that the arguments fit the groups, and that none is missing which differs.

        Raises:
            ValueError: They do not, or one is.
        """
        if len(groups) < self._whole:
            raise ValueError(
                f"the optimizer has {len(groups)} param groups, but had {self._whole}, which do "
                f"not decay alike: what holds of each goes by its index, so that none can be taken "
                f"away, nor stepped apart from the others (as DeepSpeed's ZeRO does)"
            )
        self.arguments.check_groups(groups)
        self._whole = len(groups) if self.arguments.tells_apart(groups) else 0

    def meet(self, groups: Sequence[Group]) -> None:
        """Checks param groups that are new and takes from them what is taken once.

        Raises:
            ValueError: The arguments do not fit the groups.
        """
        if len(groups) == len(self._accounts):
            return
        self.check_groups(groups)
        known = [*self.lr_max, *[None] * len(groups)]
        lr_max = list(map(self.arguments.peak, itertools.count(), groups, known))
        resolved = self.arguments.resolved(self._run, lr_max)
        no_decay = self._no_decay[: len(groups)]
        own = list(map(own_wd, groups, itertools.count()))
        for index in range(len(no_decay), len(groups)):
            no_decay.append(any(own) and not own[index])
            if no_decay[index] and self.arguments.spares_no_decay_groups:
                self._say(
                    f"param group {index} has a weight decay of 0 while another's is not: it is "
                    f"taken for a no-decay group and does not decay; give wd a sequence, one value "
                    f"per group, to overrule"
                )
        self._dormant = self._debts()
        new = [Account() for _ in groups[len(self._accounts) :]]
        self._accounts = [*self._accounts[: len(groups)], *new]
        self.lr_max, self._resolved, self._no_decay = lr_max, resolved, no_decay

    def _shrinks(self, groups: Sequence[Group], progress: float) -> list[Shrink]:
        """What a step takes from each group; where it is refused, new groups stay new."""
        before = {**vars(self)}
        try:
            self.meet(groups)
            self.coefficients, self._progress = self._coefficients(groups, progress), progress
            return list(map(self._shrink, itertools.count(), self.coefficients, groups))
        except BaseException:
            vars(self).update(before)
            raise

    def _coefficients(self, groups: Sequence[Group], progress: float) -> list[float]:
        coefficients = self._resolved.coefficients(groups, progress)
        if not self.arguments.spares_no_decay_groups:
            return coefficients
        return [0.0 if spared else wd for spared, wd in zip(self._no_decay, coefficients)]

    def _is_spared(self, index: int) -> bool:
        return self._no_decay[index] and self.arguments.spares_no_decay_groups

    def _may_decay(self, p: Tensor) -> bool:
        return self._decays is None or self._decays(p)

    def _shrink(self, index: int, coefficient: float, group: Group) -> Shrink:
        if coefficient == 0:
            return Shrink(0.0, 1.0)
        amount = self._scale(index, group) * coefficient
        factor = 1 - amount
        if isinstance(amount, Tensor):
            if amount.device.type != "cpu":
                return Shrink(amount, factor)
            amount, factor = amount.item(), factor.item()
        if not 0 <= amount < 1:
            raise ValueError(
                f"param group {index}: a step would shrink its weights by {amount:g}, expected at "
                f"least 0 and below 1 (lr {group.get('lr')}, wd {coefficient:g}, scale_by "
                f"{self.arguments.scale(index)!r})"
            )
        return Shrink(amount, factor)

    def _scale(self, index: int, group: Group) -> Any:
        """How much of the coefficient one step takes: a number or a 0-dim tensor."""
        scale = self.arguments.scale(index)
        if callable(scale):
            return _scalar(scale(group), index, "scale_by")
        if scale == "none":
            return 1.0
        lr, lr_max = _scalar(group.get("lr"), index, "lr"), self.lr_max[index]
        if group.get("fused") and isinstance(lr, Tensor) and lr.is_cpu:
            lr = lr.item()  # torch's fused updates compute with it in double precision
        if scale == "lr":
            return lr
        assert lr_max is not None
        is_known = isinstance(lr, float) or lr.is_cpu
        if is_known and lr > lr_max * (1 + 1e-6):  # schedulers round
            self._say(
                f"param group {index}: lr / lr_max exceeds 1 (lr {lr:g}, lr_max {lr_max:g}), so a "
                f"step takes more than scale_by={scale!r} means it to: give max_lr",
                once=("lr_max", index),
            )
        return lr / lr_max if scale == "lr_ratio" else lr * lr / lr_max

    # Who pays

    def _open(self, groups: Sequence[Group], shrinks: Sequence[Shrink]) -> None:
        """Opens new accounts where the parameters that will be updated are not those of before."""
        # FSDP's processes hold nothing of some parameters, whose debts they keep all the same.
        with_grad = [
            [p for p in group["params"] if p.grad is not None or _is_empty(p)] for group in groups
        ]
        if all(map(Account.is_current, self._accounts, with_grad, shrinks)):
            return
        debts = self._debts()
        seen: set[Tensor] = set()
        dormant = {p: debts[p] for group in groups for p in group["params"] if p in debts}
        opened: list[list[Cohort]] = []
        for params in with_grad:
            opened.append(self._cohorts((p for p in params if p not in seen), dormant))
            seen.update(params)
        # Only now, as a predicate of `exclude` may have raised.
        self._dormant = dormant
        for account, params, cohorts in zip(self._accounts, with_grad, opened):
            account.with_grad, account.cohorts = params, cohorts

    def _cohorts(self, params: Iterable[Tensor], debts: dict[Tensor, Debt]) -> list[Cohort]:
        """Those of ``params`` that decay, which take their ``debts`` along."""
        cohorts: dict[Any, Cohort] = {}
        for p in filter(self._may_decay, dict.fromkeys(params)):
            if p.grad is not None and p.grad.layout != torch.strided:
                self._say(
                    "a parameter has a sparse gradient: the whole tensor decays, not only the rows "
                    "that the gradient touches"
                )
            quantum = self.arguments.quantum
            if quantum is None:
                quantum = HALF_QUANTA.get(p.dtype, QUANTUM)
            kind, debt = _kind(p), debts.pop(p, Debt())
            cohort = cohorts.setdefault((kind, debt), Cohort(kind, [], quantum, debt))
            cohort.params.append(p)
        return list(cohorts.values())

    def _debts(self) -> dict[Tensor, Debt]:
        """What each parameter owes."""
        cohorts = [cohort for account in self._accounts for cohort in account.cohorts]
        return self._dormant | {p: cohort.debt for cohort in cohorts for p in cohort.params}

    def _start(self, groups: Sequence[Group]) -> None:
        """Warns if the first step that has gradients leaves every weight alone."""
        self._has_started = any(p.grad is not None for group in groups for p in group["params"])
        if self._has_started and not any(
            account.cohorts
            for index, (account, group) in enumerate(zip(self._accounts, groups))
            if not self._is_spared(index)
            and (self.arguments.wd is not None or own_wd(group, index))
        ):
            self._say(
                "nothing decays: every parameter with a gradient is excluded, in a no-decay group, "
                "or in a group whose own weight decay, which wd=None takes, is 0"
            )

    def describe(self, groups: Sequence[Group], label: str = "") -> Description:
        """What the decay does to each param group, as a table.

        Args:
            groups: The optimizer's param groups.
            label: What stands before the index of each.
        """
        if len(groups) != len(self._accounts):
            trial = copy.copy(self)
            trial._warn, trial._warned = _silent, set()
            trial.meet(groups)
            return trial.describe(groups, label)
        coefficients = [
            *self.coefficients,
            *self._coefficients(groups, self._progress)[len(self.coefficients) :],
        ]
        return Description(
            self._row(index, group, coefficients[index], label)
            for index, group in enumerate(groups)
        )

    def _row(self, index: int, group: Group, coefficient: float, label: str) -> Row:
        account, params = self._accounts[index], list(dict.fromkeys(group["params"]))
        decaying = [] if self._is_spared(index) else list(filter(self._may_decay, params))
        debts = self._debts()
        owed = sum(debts.get(p, Debt()).owed for p in decaying) / max(len(decaying), 1)
        amount, scale = self._shrink(index, coefficient, group).amount, self.arguments.scale(index)
        numbers = [sum(0 if is_lazy(p) else p.numel() for p in s) for s in (params, decaying)]
        return Row(
            group=f"{label}{index}",
            coefficient=coefficient,
            scale=scale if isinstance(scale, str) else getattr(scale, "__name__", repr(scale)),
            lr_max=self.lr_max[index],
            decaying=(len(decaying), numbers[1]),
            spared=(len(params) - len(decaying), numbers[0] - numbers[1]),
            shrink=None if isinstance(amount, Tensor) else amount,
            steps_per_epoch=self._run.steps_per_epoch,
            due=-math.expm1(-account.due),
            applied=max(0.0, -math.expm1(owed - account.due)) if account.known else None,
        )

    # State

    def state_dict(self, groups: Sequence[Group]) -> dict[str, Any]:
        """What is owed and what was taken once, as plain numbers, with the arguments they serve."""
        new = [Account() for _ in groups[len(self._accounts) :]]
        accounts = [*self._accounts, *new] if self._accounts else []
        owed = self._debts()
        debts = [
            [owed.pop(p, Debt()) for p in group["params"]] for _, group in zip(accounts, groups)
        ]
        return {
            "arguments": self._resolved.record(),
            "lr_max": list(self.lr_max),
            "no_decay": list(map(int, self._no_decay)),
            "owed": [[debt.owed for debt in group] for group in debts],
            "payments": [[debt.payments for debt in group] for group in debts],
            "due": [account.due for account in accounts],
            "progress": self._progress,
        }

    def load_state_dict(self, state: dict[str, Any], groups: Sequence[Group]) -> None:
        """Takes up what ``state_dict`` gave; arguments that have changed since win.

        Raises:
            ValueError: It is no such state, or that of other param groups. Nothing is taken then.
        """
        check_debts(state, [len(group["params"]) for group in groups])
        loaded = copy.copy(self)
        loaded._accounts, loaded._dormant, loaded.coefficients = [], {}, []
        loaded._no_decay, loaded.lr_max, loaded._resolved = [], list(self._peaks), self.arguments
        if state["owed"]:  # else it was saved before the first step, when nothing was taken
            loaded._no_decay = list(map(bool, state["no_decay"]))
            if self.arguments.max_lr is None and state["arguments"].get("max_lr") is None:
                loaded.lr_max = list(state["lr_max"])
            loaded.meet(groups)
        rows = zip(state["owed"], state["payments"], state["due"])
        for account, group, (owed, payments, due) in zip(loaded._accounts, groups, rows):
            for p, debt in zip(group["params"], map(Debt, owed, payments)):
                loaded._dormant.setdefault(p, debt)  # a tied one's stands where it is listed first
            account.due = due
        if loaded._accounts:
            loaded._progress = state.get("progress", 0.0)
            loaded.coefficients = loaded._coefficients(groups, loaded._progress)
        vars(self).update(vars(loaded))  # only now, as any of it may have been refused

    def tell_changes(self, state: Mapping[str, Any], lengths: Mapping[str, Any]) -> None:
        """Warns of arguments and ``lengths`` that are not those of the run that was saved."""
        old = {**state["arguments"], **{name: state[name] for name in lengths}}
        new = {**self._resolved.record(), **lengths}
        for name, value in old.items():
            if value != new.get(name):
                self._say(f"{name} was {value} in the saved run and is {new.get(name)} in this one")

    def _say(self, message: str, once: Hashable = None) -> None:
        """Warns, but once of the same, which is the message unless something else tells it."""
        if (once or message) not in self._warned:
            self._warned.add(once or message)
            self._warn(message)


def _silent(message: str) -> None:
    """Says nothing: the same will be said when training starts."""


def _is_empty(p: Tensor) -> bool:
    return not is_lazy(p) and p.numel() == 0


def _kind(p: Tensor) -> Kind:
    """What parameters that are multiplied in one call have in common; DTensors their mesh too."""
    return p.device, p.dtype, type(p), getattr(p, "device_mesh", None)


def _scalar(value: Any, index: int, name: str) -> Any:
    """A float, or a 0-dim tensor: some optimizers keep their learning rate on the device."""
    if type(value) is float:
        return value  # without the cost of a message
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        return value.detach().reshape(())
    return number(value, f"param group {index}: {name}")


def _pay(account: Account, shrink: Shrink, found_inf: Tensor | None) -> None:
    """Multiplies the parameters of a group by what is due now, in one call per kind."""
    if found_inf is not None or isinstance(shrink.amount, Tensor):
        account.known = False
        for cohort in account.cohorts:
            _multiply_on_device(cohort, shrink, found_inf)
        return
    if account.with_grad:
        account.due -= math.log1p(-shrink.amount)
    due: dict[Any, list[tuple[list[Tensor], float]]] = {}
    for cohort in account.cohorts:
        factor = cohort.charge(shrink.amount, cast(float, shrink.factor))
        if factor is not None:
            due.setdefault(cohort.kind, []).append((cohort.params, factor))
    for (params, factor), *others in due.values():
        operand: Any = _operand(factor, params[0])
        if others:  # parameters that owed something else, each with its own factor
            operand = [operand] * len(params)
            for more, factor in others:
                params = params + more
                operand += [_operand(factor, more[0])] * len(more)
        _multiply(params, operand)


def _multiply(params: list[Tensor], factor: Any) -> None:
    """The multiplication: ``p <- p * factor``."""
    torch._foreach_mul_(params, factor)


def _operand(factor: float, p: Tensor) -> float | Tensor:
    """The factor in a form that is not rounded to half precision before it is used.

    On the CPU torch's multi-tensor call rounds numbers to the dtype of the weights, elsewhere
    tensors.
    """
    if p.device.type != "cpu":
        return factor
    dtype = torch.float64 if p.dtype in DOUBLES else torch.float32
    return torch.scalar_tensor(factor, dtype=dtype, device="cpu")


def _multiply_on_device(cohort: Cohort, shrink: Shrink, found_inf: Tensor | None) -> None:
    """The multiplication where only the device knows the shrink, or whether the step will happen.

    In half precision a tensor factor would be rounded to eight or eleven bits before it is used, so
    there ``p - p * amount`` is computed, in which only the amount is.
    """
    device, dtype, *_ = cohort.kind
    half = dtype in HALF_QUANTA
    value = shrink.amount if half else shrink.factor
    if isinstance(value, Tensor):
        value = _on(device, value)
    else:
        value = torch.full((), value, device=device, dtype=dtype.to_real())
    if found_inf is not None:
        skipped = _on(device, found_inf.reshape(())) > 0
        value = torch.where(skipped, 0.0 if half else 1.0, value)
    if half:
        amounts = [value.to(dtype)] * len(cohort.params)
        torch._foreach_addcmul_(cohort.params, cohort.params, amounts, value=-1)
    else:
        torch._foreach_mul_(cohort.params, value)


def _on(device: torch.device, value: Tensor) -> Tensor:
    """``value`` on ``device``, awaited where that is the host."""
    return value.to(device, non_blocking=device.type != "cpu")
