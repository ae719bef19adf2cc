"""The decay of one optimizer's weights at a step. It knows no framework and holds no optimizer.

On every step each weight is multiplied by ``1 - shrink``, or moved by ``shrink`` of its distance to
an anchor: rules -> shrinks -> buckets -> one multi-tensor call.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wd_callbacks.core.cautious import CautiousStep
from wd_callbacks.core.deferred import Call
from wd_callbacks.core.groups import Group, own_wd
from wd_callbacks.core.inplace import below_autograd, lerp_, multiply_, on_device_
from wd_callbacks.core.layout import (
    Layout,
    Setup,
    check_fit,
    check_parameters,
    make_layout,
    updated_params,
)
from wd_callbacks.core.rules import Shrink
from wd_callbacks.core.warn import Once

NO_GRADIENT_STEPS = 20  # in a row, after which a warning asks whether this is the right optimizer


class Decay:
    """Decoupled weight decay of the weights of one optimizer.

    Args:
        setup: The config, and what is known of the model and the run.
    """

    def __init__(self, setup: Setup) -> None:
        self.warn = Once(setup.warn)
        self.setup = replace(setup, warn=self.warn)
        self.layout = Layout()
        self.rereads_groups = False  # at the first step
        self.shrinks: list[Shrink] = []  # of the last step, one per rule
        self.steps = 0  # that did not raise
        self.progress = 0.0  # at the last step
        self._cautious: CautiousStep | None = None  # of the step that is being made
        self._has_started = False
        self._without_gradient = 0  # steps in a row

    @property
    def coefficients(self) -> list[float]:
        """The coefficient of each rule at the last step."""
        return [shrink.coefficient for shrink in self.shrinks]

    def decay_(
        self,
        groups: Sequence[Group],
        progress: float,
        found_inf: Tensor | None = None,
        needs_grad: bool = True,
    ) -> None:
        """Decay every parameter that the step will update, or defer its shrink.

        Args:
            groups: The optimizer's param groups.
            progress: Training progress in [0, 1].
            found_inf: 0-dim tensor, above 0 if the step will be skipped on the device.
            needs_grad: False to decay parameters whose gradient is still to come, too.

        Raises:
            ValueError: A coefficient or a shrink is invalid. No weight has changed then.
        """
        layout = self.layout_of(groups, needs_grad)
        shrinks = [rule.shrink(groups[rule.group], progress) for rule in layout.rules]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._check_capture(layout, shrinks)
        # Nothing has changed up to here, and nothing raises from here on.
        self.layout, self.shrinks, self.progress = layout, shrinks, progress
        self.rereads_groups = False
        self.steps += 1
        if self.setup.config.cautious:  # the update decides
            self._cautious = CautiousStep(layout.buckets(), shrinks, found_inf)
        else:
            shrink_(layout.calls, shrinks, found_inf)
        self._observe(groups, found_inf is None)

    def finish_(self) -> None:
        """Decay what a cautious step leaves until the update is made."""
        if self._cautious is not None:
            with below_autograd():
                self._cautious.decay_()
            self._cautious = None

    def cancel(self) -> None:
        """Forget a step that raised."""
        self._cautious = None

    def release(self) -> None:
        """Drop every reference to weights, as their optimizer is gone."""
        self.layout, self._cautious = Layout(), None
        self.setup.selection.release()

    def inherit(self, old: Decay) -> None:
        """Go on from the decay of an optimizer that this one's has replaced."""
        before, layout = old.layout, self.layout
        if before.sizes == layout.sizes:  # the param groups are those of before
            layout = replace(layout, states=before.states, rules=before.rules)
        self.layout = replace(layout, deferred=before.all_deferred(), anchors=before.anchors)
        self.steps, self.warn = old.steps, old.warn
        self.setup = replace(self.setup, warn=old.warn)
        self._has_started = old._has_started

    def layout_of(self, groups: Sequence[Group], needs_grad: bool = True) -> Layout:
        """Return the layout for a step, the last one unless something has changed since."""
        params, old = updated_params(groups, needs_grad), self.layout
        if self.rereads_groups:
            check_fit(self.setup.config, groups, old)
            old = Layout(deferred=old.deferred, anchors=old.anchors)
        if (
            len(params) == len(old.params)
            and all(map(operator.is_, params, old.params))
            and [len(group["params"]) for group in groups] == old.sizes
            and all(map(Call.is_current, old.calls))
        ):
            return old
        return make_layout(self.setup, groups, params, old)

    def check_max_lr(self) -> None:
        """Warn of guesses of max_lr that the learning rate has stayed far below so far."""
        for rule in self.layout.rules:
            if rule.is_guess and rule.uses_max_lr and 0 < 4 * rule.highest_lr < (rule.max_lr or 0):
                self.warn(
                    f"param group {rule.group}: lr was at most {rule.highest_lr:g}, far below "
                    f"max_lr {rule.max_lr:g}, a guess from the group. So {rule.effect} decays less "
                    f"than it says: pass max_lr",
                    once=("low max_lr", rule.group),
                )

    def _observe(self, groups: Sequence[Group], is_known: bool) -> None:
        """Add up what was due in this step, and warn of what the user should know."""
        layout, shrinks = self.layout, self.shrinks
        for index in layout.active:
            rule = layout.rules[index]
            rule.add_due(groups[rule.group], shrinks[index].amount, is_known)
        if layout.watched:
            self._check_lrs()
        is_rounded = layout.anchors and self._cautious is None
        if is_rounded and not all(layout.rules[index].is_known for index in layout.active):
            self.warn(
                "only the device knows each step (lr is a device tensor, or a fused optimizer runs "
                "under a GradScaler), so every step is applied at once, and weights near their "
                "anchor move by less than is due: keep lr a number, or use a foreach optimizer"
            )
        if not layout.params:
            self._count_without_gradient()
            return
        self._without_gradient = 0
        if not self._has_started:
            self._has_started = True
            self._check_start(groups)

    def _check_lrs(self) -> None:
        """Warn of a max_lr that lr exceeds, or stays far below until the middle of the run."""
        for rule in self.layout.watched:
            if rule.highest_lr > (rule.max_lr or math.inf) * (1 + 1e-6):  # schedulers round
                self.warn(
                    f"param group {rule.group}: lr exceeds max_lr (lr {rule.highest_lr:g}, "
                    f"max_lr {rule.max_lr:g}{', a guess from the group' * rule.is_guess}), so "
                    f"{rule.effect} decays more than it says: pass the peak of lr as max_lr",
                    once=("high max_lr", rule.group),
                )
        if self.progress >= 0.5:
            self.check_max_lr()

    def _count_without_gradient(self) -> None:
        self._without_gradient += 1
        if self._without_gradient == NO_GRADIENT_STEPS:
            self.warn(
                f"none of the optimizer's parameters had a gradient in {NO_GRADIENT_STEPS} steps "
                f"in a row, so nothing decays: attach to the optimizer that updates the weights. "
                f"If several optimizers step inside backward, attach one DecoupledWD to each"
            )

    def _check_start(self, groups: Sequence[Group]) -> None:
        """Warn if the first step that has gradients leaves every weight alone."""
        config, rules = self.setup.config, self.layout.rules
        active = [rules[index] for index in self.layout.active]
        is_zero = config.wd is None and not any(
            own_wd(groups[rule.group], rule.group) for rule in active
        )
        if rules and not active and all(rule.wd == 0 and not rule.is_no_decay for rule in rules):
            return  # the user asked for it
        if not active:
            self.warn(
                "nothing decays: every parameter with a gradient is excluded, in a no-decay group, "
                "or matched by no key of wd. Print describe(parameters=True) to see why"
            )
        elif is_zero and not self.setup.schedules_own_wd:
            self.warn(
                "nothing decays: wd is None, and the weight decay of every param group is 0. Pass "
                "a coefficient, as in DecoupledWD(0.1), or set the groups' own weight decay"
            )

    def _check_capture(self, layout: Layout, shrinks: Sequence[Shrink]) -> None:
        """Raise if captured in a CUDA graph whose replays would not decay as they should."""
        if not (layout.calls and torch.cuda.is_current_stream_capturing()):
            return
        if self.setup.config.is_scheduled:
            raise ValueError(
                "a CUDA graph replays the coefficient that it captured, but wd is a schedule: keep "
                "optimizer.step out of the graph, or pass a number as wd"
            )
        for bucket in layout.buckets():
            amount = shrinks[bucket.rule].amount
            if not isinstance(amount, Tensor) and 0 < amount < bucket.precision.quantum:
                raise ValueError(
                    f"a CUDA graph cannot defer a shrink, and {amount:g} is below the quantum: "
                    f"pass quantum=0, or keep lr in a tensor on the device"
                )


def make_decay(setup: Setup, groups: Sequence[Group]) -> Decay:
    """Return a decay of ``groups``, checked against them.

    Raises:
        ValueError: The config does not fit the groups or their parameters.
    """
    decay = Decay(setup)
    decay.layout = make_layout(decay.setup, groups, (), decay.layout)
    check_parameters(decay.setup, groups, decay.layout)
    return decay


def shrink_(
    calls: Sequence[Call], shrinks: Sequence[Shrink], found_inf: Tensor | None = None
) -> None:
    """Shrink the weights in each bucket by what its rule says, or defer that."""
    with below_autograd():
        for call in calls:
            parts = []
            for bucket in call.buckets:
                shrink = shrinks[bucket.rule]
                if found_inf is not None or type(shrink.amount) is not float:
                    on_device_(bucket, shrink, found_inf)
                    continue
                now = bucket.take(shrink)  # None: deferred
                if now is not None:
                    parts.append((bucket, now))
            if parts and call.buckets[0].anchors is None:
                multiply_(call, parts)  # <- the weight decay
            elif parts:
                lerp_(call, parts)
