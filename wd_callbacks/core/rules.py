"""How much: the shrink that some parameters of a param group get at one step.

    shrink = scale * coefficient

The coefficient is the ``wd`` in force. The scale is what ``scale_by`` makes of the learning rate:
by default the learning rate itself, as in ``torch.optim.AdamW``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, LambdaLR

from wd_callbacks.core.checks import is_sequence, number, of_group
from wd_callbacks.core.config import RATIOS, Config, depends_on_max_lr, schedule_name
from wd_callbacks.core.groups import Group, host_lr, own_wd
from wd_callbacks.schedules import Run, Schedule, resolved


class DivergenceError(ValueError):
    """A shrink of 1 or more, with which a search for a learning rate ends."""


class Shrink(NamedTuple):
    """What a step subtracts from weights, as a fraction of them.

    Numbers, or 0-dim tensors if the learning rate is on a device.
    """

    coefficient: float
    amount: float | Tensor
    factor: float | Tensor  # 1 - amount, in the arithmetic of the learning rate


NOTHING = Shrink(0.0, 0.0, 1.0)

ABSOLUTE = (LambdaLR, CosineAnnealingWarmRestarts)  # compute lr from their base_lrs alone


class GroupState(NamedTuple):
    """What is read from a param group once, when it is new.

    Attributes:
        max_lr: The peak learning rate; None if nothing tells and nothing needs it.
        is_guess: Whether ``max_lr`` was read from the group, and not given by the user.
        no_decay: Whether its own weight decay was 0 while another group's was not.
    """

    max_lr: float | None
    is_guess: bool
    no_decay: bool


@dataclass(eq=False)
class Rule:
    """The decay of one param group, or of those of its parameters that one key of ``wd`` matches.

    Attributes:
        group: Index of the param group.
        key: Text of the key of ``wd``; None if ``wd`` is not a mapping of parameters.
        wd: A number, a schedule, or None for the group's own weight decay.
        scale_by: As the user gave it for this group.
        max_lr: The group's peak learning rate.
        is_guess: Whether ``max_lr`` was read from the group, and not given by the user.
        uses_max_lr: Whether the decay depends on ``max_lr``.
        source: What ``wd`` is called in errors.
        schedule: Name of the schedule that the user gave; empty if there is none.
        highest_lr: Largest learning rate of a step so far.
        due: ``-log`` of the factor due so far, for parameters with a gradient at every step.
        is_known: False if lr or found_inf stayed on the device, so that ``due`` is unknown.
        is_no_decay: Whether the group is a no-decay group, and ``wd`` therefore 0.
    """

    group: int
    key: str | None
    wd: float | Schedule | None
    scale_by: Any
    max_lr: float | None
    is_guess: bool = False
    uses_max_lr: bool = False
    source: str = "wd"
    schedule: str = ""
    highest_lr: float = 0.0
    due: float = 0.0
    is_known: bool = True
    is_no_decay: bool = False

    @property
    def effect(self) -> str:
        """What the user wrote that depends on ``max_lr``."""
        return f"scale_by={self.scale_by!r}" if self.scale_by in RATIOS else f"wd={self.schedule}"

    def add_due(self, group: Group, amount: float | Tensor, is_known: bool) -> None:
        """Add up what a step was due to subtract, if the host knows."""
        lr = group.get("lr")
        if type(lr) is not float:
            lr = host_lr(group)
        if lr > self.highest_lr:
            self.highest_lr = lr
        if type(amount) is not float:
            self.is_known = False
        elif amount:
            self.is_known = self.is_known and is_known
            self.due -= math.log1p(-amount)

    @property
    def decays(self) -> bool:
        """False if the coefficient is 0 for good."""
        return self.wd is None or callable(self.wd) or self.wd > 0

    def coefficient(self, group: Group, progress: float) -> float:
        """Return the coefficient in force at ``progress`` in [0, 1].

        Raises:
            ValueError: It is negative, NaN or infinite.
        """
        if callable(self.wd):
            value = self.wd(progress)
            if type(value) is float and 0 <= value < math.inf:
                return value  # without the cost of a message
            source = f"the schedule {self.source} = {self.wd!r} at progress {progress:g}"
            return _checked(value, source)
        if self.wd is None:
            source = f"the weight decay of param group {self.group}"
            return _checked(own_wd(group, self.group), source)
        return self.wd

    def shrink(self, group: Group, progress: float) -> Shrink:
        """Return what the step at ``progress`` subtracts from the weights.

        Raises:
            ValueError: The coefficient or the shrink is invalid.
        """
        wd = self.wd
        coefficient = wd if type(wd) is float else self.coefficient(group, progress)
        if coefficient == 0:
            return NOTHING
        amount: Any = self.scale(group) * coefficient
        factor: Any = 1 - amount
        if type(amount) is not float:
            if not amount.is_cpu:
                return Shrink(coefficient, amount, factor)
            amount, factor = amount.item(), factor.item()
        if not 0 <= amount < 1:
            raise (DivergenceError if amount >= 1 else ValueError)(
                f"param group {self.group}: a step would shrink its weights by {amount:g}, "
                f"expected at least 0 and below 1 (lr {group.get('lr')}, wd {coefficient:g}, "
                f"scale_by {self.scale_by!r}): change one of them"
            )
        return Shrink(coefficient, amount, factor)

    def scale(self, group: Group) -> Any:
        """Return what the coefficient is multiplied by: a number or a 0-dim tensor."""
        scale_by = self.scale_by
        if callable(scale_by):
            return _scalar(scale_by(group), f"param group {self.group}: scale_by")
        if scale_by == "none":
            return 1.0
        lr: Any = group.get("lr")
        if type(lr) is not float:
            lr = _scalar(lr, f"param group {self.group}: lr")
            if group.get("fused") and isinstance(lr, Tensor) and lr.is_cpu:
                lr = lr.item()  # torch's fused updates compute with it in double precision
        if scale_by == "lr":
            return lr
        assert self.max_lr is not None
        return lr / self.max_lr if self.scale_by == "lr_ratio" else lr * lr / self.max_lr

    def peak_amount(self, coefficient: float, group: Group) -> float | None:
        """Return the shrink at ``max_lr``; None if it is not known.

        A callable scale gives that of the group as it is now.
        """
        if callable(self.scale_by):
            scale = self.scale(group)
            return None if isinstance(scale, Tensor) and not scale.is_cpu else scale * coefficient
        if self.scale_by in ("lr", "lr_squared"):
            return None if self.max_lr is None else self.max_lr * coefficient
        return coefficient


def make_rule(config: Config, run: Run, index: int, state: GroupState, key: str | None) -> Rule:
    """Return the rule of the parameters of a group that a key of ``wd`` matches.

    Args:
        config: What the user asked for.
        run: The length of the run.
        index: Index of the param group.
        state: What was read from it.
        key: Text of the key; None if ``wd`` is not a mapping of parameters.
    """
    if key is None:
        source = f"wd[{index}]" if is_sequence(config.wd) else "wd"
        wd = of_group(config.wd, index)
    else:
        source = f"wd[{key!r}]"
        wd = config.wd[config.keys[config.key_names.index(key)]]
    scale_by = of_group(config.scale_by, index)
    given, schedule = wd, ""
    is_no_decay = state.no_decay and config.keeps_no_decay_groups
    if is_no_decay:
        wd = 0.0
    elif callable(wd):
        schedule = schedule_name(wd)
        wd = resolved(wd, replace(run, peak_scale=_peak_scale(scale_by, state.max_lr)))
    elif wd is not None:
        wd = float(wd)
    uses_max_lr = depends_on_max_lr(scale_by, given)
    return Rule(
        group=index,
        key=key,
        wd=wd,
        scale_by=scale_by,
        max_lr=state.max_lr,
        is_guess=state.is_guess,
        uses_max_lr=uses_max_lr,
        source=source,
        schedule=schedule,
        is_no_decay=is_no_decay,
    )


def read_groups(
    config: Config,
    groups: Sequence[Group],
    known: Sequence[GroupState],
    max_lrs: Sequence[float | None],
    least: Sequence[float],
    no_decay: Sequence[bool],
) -> list[GroupState]:
    """Return the states of ``groups``: those that are ``known``, and what the others tell now.

    Args:
        config: What the user asked for.
        groups: The param groups.
        known: States of the first ones.
        max_lrs: Peak learning rates from a better source than the groups.
        least: Learning rates that the groups have had already.
        no_decay: Whether each of the first groups is a no-decay group, if that is known.

    Raises:
        ValueError: A ``max_lr`` is not above 0, and ``scale_by`` divides by it.
    """
    own = [own_wd(group, index) for index, group in enumerate(groups)]
    states = list(known[: len(groups)])
    for index in range(len(states), len(groups)):
        given = max_lrs[index] if index < len(max_lrs) else None
        max_lr, is_guess = _max_lr(
            config, index, groups[index], given, least[index] if index < len(least) else 0.0
        )
        is_zero_alone = any(own) and not own[index]
        is_no_decay = no_decay[index] if index < len(no_decay) else is_zero_alone
        states.append(GroupState(max_lr, is_guess, is_no_decay))
    return states


def _max_lr(
    config: Config, index: int, group: Group, given: float | None, least: float
) -> tuple[float | None, bool]:
    """Return the peak learning rate of a group, and whether it is a guess."""
    if config.max_lr is not None:
        return float(of_group(config.max_lr, index)), False
    source, max_lr = "max_lr", given
    if max_lr is None:
        keys = [key for key in ("max_lr", "initial_lr", "lr") if group.get(key) is not None]
        source = keys[0] if keys else "lr"
        value = group[source] if keys else math.nan
        if isinstance(value, Tensor) and not value.is_cpu and not config.uses_max_lr(index):
            return None, True  # asking would synchronize
        max_lr = number(value, f"param group {index}: {source}")
        if source == "initial_lr" and group.get("lr_scale") is not None:  # timm's layer decay
            max_lr *= number(group["lr_scale"], f"param group {index}: lr_scale")
        if source == "lr":
            max_lr = max(max_lr, least)
    if math.isfinite(max_lr) and max_lr > 0:
        return max_lr, given is None and source != "max_lr"
    scale_by = of_group(config.scale_by, index)
    if scale_by in RATIOS:
        raise ValueError(
            f"param group {index}: scale_by={scale_by!r} divides by the peak learning rate, which "
            f"seems to be {max_lr}: pass max_lr"
        )
    return None, False


def scheduler_max_lrs(scheduler: Any) -> list[float]:
    """Return the peak learning rates that a torch scheduler knows; none if it knows none.

    If a search for a learning rate has set lr since the scheduler was made, most schedulers go on
    from there, and their peak has moved as far.
    """
    known = _own_max_lrs(scheduler)
    if known or isinstance(scheduler, ABSOLUTE):
        return known
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
    lrs = list(map(host_lr, groups))
    last, base = getattr(scheduler, "_last_lr", ()), getattr(scheduler, "base_lrs", ())
    if last == lrs or not (len(last) == len(base) == len(lrs) and all(last) and all(lrs)):
        return []
    return [float(top * lr / of) for top, lr, of in zip(base, lrs, last)]


def _own_max_lrs(scheduler: Any) -> list[float]:
    """Return those of CyclicLR, also inside of other schedulers."""
    inner = [_own_max_lrs(each) for each in getattr(scheduler, "_schedulers", ())]
    known = [list(scheduler.max_lrs) if isinstance(scheduler, CyclicLR) else [], *inner]
    return [max(lrs) for lrs in zip(*filter(None, known))]


def _peak_scale(scale_by: Any, max_lr: float | None) -> float | None:
    """Return the scale at the peak learning rate; None if it is not known."""
    if callable(scale_by):
        return None
    return 1.0 if scale_by in ("lr_ratio", "none") else max_lr


def _checked(value: Any, source: str) -> float:
    coefficient = number(value, source)
    if not (math.isfinite(coefficient) and coefficient >= 0):
        raise ValueError(f"{source} is {coefficient}, expected a finite coefficient of at least 0")
    return coefficient


def _scalar(value: Any, source: str) -> Any:
    """Return a float, or a 0-dim tensor: some optimizers keep their learning rate on the device."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        return value.detach().reshape(())
    return number(value, source)
