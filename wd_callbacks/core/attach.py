"""A decay attached to a torch optimizer, by the hooks around its ``step``."""

from __future__ import annotations

import functools
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from wd_callbacks.core import compat, state, table
from wd_callbacks.core.decay import Decay, make_decay
from wd_callbacks.core.groups import Group
from wd_callbacks.core.layout import Setup
from wd_callbacks.core.step import Step
from wd_callbacks.core.table import Description

WRAPPERS = {"LightningOptimizer", "_FabricOptimizer", "AcceleratedOptimizer"}
STATE_SETUP = "torch.distributed.checkpoint.state_dict"  # steps with gradients and lr of 0
untraced: Callable[[Any], Any] = torch.compiler.disable
HOOKED_STEP = Optimizer.profile_hook_step(lambda *_: None).__code__  # what runs the hooks

Progress = Callable[[Decay], float]
"""Returns the training progress in [0, 1] of the step that a decay is about to make."""


def attach(
    optimizer: Optimizer,
    setup: Setup,
    progress: Progress,
    on_start: Callable[[Attached], None] | None = None,
    on_divergence: Callable[[], bool] | None = None,
    is_running: Callable[[], Any] | None = None,
    rereads_groups: bool = False,
) -> Attached:
    """Attach a decay to a torch optimizer.

    Args:
        optimizer: The optimizer.
        setup: What the decay is built with.
        progress: Returns the training progress.
        on_start: Called right before the first step.
        on_divergence: See ``Step``.
        is_running: Returns False outside of the run, whose steps alone decay.
        rereads_groups: Whether ``max_lr`` and no-decay groups are those of the first step.

    Raises:
        TypeError, ValueError: The optimizer cannot be decayed from outside, or the config does not
            fit it.
    """
    optimizer = checked(optimizer)
    setup.config.check_groups(optimizer.param_groups)  # before toy copies step
    for message in compat.check_compatible(optimizer, setup.config.follows_lr):
        setup.warn(message)
    decay = make_decay(setup, optimizer.param_groups)
    decay.rereads_groups = rereads_groups
    return Attached(optimizer, decay, progress, on_start, on_divergence, is_running)


class Attached:
    """A decay that acts in the steps of one optimizer, until it is detached.

    The optimizer's hooks hold it, and it holds the optimizer weakly: it lives as long as that does.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        decay: Decay,
        progress: Progress,
        on_start: Callable[[Attached], None] | None = None,
        on_divergence: Callable[[], bool] | None = None,
        is_running: Callable[[], Any] | None = None,
    ) -> None:
        groups = functools.partial(_groups, weakref.ref(optimizer))
        self.decay = decay
        first = decays_first(optimizer, decay)
        self._step = Step(decay, groups, progress, first, on_divergence)
        self._optimizer = weakref.ref(optimizer, lambda _: decay.release())
        self._on_start, self._is_running = on_start, is_running
        self.steps_of_setup = 0  # that torch made for the optimizer's state alone
        self._depth = 0  # of `step` calls: one may call `super().step()`
        # Traced by torch.compile, a coefficient would be a constant to be compiled anew.
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(untraced(self._before_step)),
            optimizer.register_step_post_hook(untraced(self._after_step)),
            optimizer.register_state_dict_pre_hook(self._before_state_dict),
        ]
        # Post hooks of others find the groups as the user set them.
        hooks = cast(OrderedDict[int, Any], optimizer._optimizer_step_post_hooks)
        hooks.move_to_end(self._handles[1].id, last=False)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer.

        Raises:
            ValueError: It is gone.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            raise ValueError(
                "the optimizer of this DecoupledWD is gone, and the state of the decay with it: "
                "call describe() and state_dict() before you delete the optimizer"
            )
        return optimizer

    @property
    def is_attached(self) -> bool:
        """Whether the optimizer's steps decay."""
        return bool(self._handles) and self._optimizer() is not None

    @property
    def is_left_behind(self) -> bool:
        """Whether its run was interrupted, so that nothing has detached it."""
        return self._is_running is not None and not self._is_running()

    def is_of(self, optimizer: Any) -> bool:
        """Return True if it is attached to ``optimizer``."""
        return self._optimizer() is optimizer

    def inherit(self, old: Attached) -> None:
        """Go on from a decay whose optimizer this one's has replaced."""
        self.decay.inherit(old.decay)

    def describe(self, label: str = "", parameters: bool = False) -> Description:
        """Return a table of what the decay does.

        Args:
            label: What stands before the index of each group.
            parameters: Whether it has a row per parameter.
        """
        make = table.describe_parameters if parameters else table.describe
        return make(self.decay, self.optimizer.param_groups, label)

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs to go on, as plain numbers."""
        return state.state_dict(self.decay, self.optimizer.param_groups)

    def load_state_dict(self, saved: dict[str, Any], **lengths: tuple[Any, Any]) -> None:
        """Go on from ``saved``, which is checked first; warn of what has changed since.

        Args:
            saved: The state.
            lengths: What tells the length of the run, as saved and in this run.
        """
        state.load_state_dict(self.decay, saved, self.optimizer.param_groups, lengths)

    def settle(self) -> None:
        """Restore what a step that raised has left behind."""
        if self._depth and not any(_running_steps(self.optimizer)):
            self._depth = 0
            self._step.cancel()

    def detach(self) -> None:
        """Remove the decay from the optimizer, which is left as the user configured it."""
        for handle in self._handles:
            handle.remove()
        was_attached, self._handles, self._depth = bool(self._handles), [], 0
        self._step.is_attached = False
        self._step.cancel()
        if was_attached:
            self.decay.check_max_lr()

    # Hooks of the optimizer, in firing order

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._depth:  # `step` called `super().step()`, or a step before raised
            self._depth = sum(1 for _ in _running_steps(optimizer))
            if self._depth > 1:
                return None
        if self._is_running is not None and not self._is_running():
            if self._depth:  # a step in the run raised
                self._depth = 0
                self._step.cancel()
            return None
        self._depth = 1
        if not optimizer.state and STATE_SETUP in sys.modules and _is_called_from(STATE_SETUP):
            self._step.skip()
            self.steps_of_setup = 1
            return None
        if self._on_start is not None:
            on_start, self._on_start = self._on_start, None
            on_start(self)
        found_inf = vars(optimizer).get("found_inf")  # set by GradScaler for fused optimizers
        if found_inf is not None and not isinstance(found_inf, Tensor):
            found_inf = None
        if len(args) == 1 and not kwargs:  # no closure to wrap
            self._step.before((), kwargs, found_inf)
            return None
        args, kwargs = self._step.before(args[1:], kwargs, found_inf)
        return (optimizer, *args), kwargs

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if self._depth > 1:
            self._depth = sum(1 for _ in _running_steps(optimizer))
            if self._depth > 1:
                return
        if self._depth:
            self._depth = 0
            self._step.after()

    def _before_state_dict(self, _: Optimizer) -> None:
        self.settle()


def decays_first(optimizer: Any, decay: Decay) -> bool:
    """Return True for LBFGS, whose loss, gradient and line search should see the same weights."""
    return isinstance(optimizer, LBFGS) and not decay.setup.config.cautious


def checked(optimizer: Any) -> Optimizer:
    """Return the torch optimizer that ``optimizer`` is or wraps.

    Raises:
        TypeError: It is none.
        ValueError: It runs no step hooks, or a DecoupledWD is attached to it.
    """
    optimizer = unwrapped(optimizer)
    compat.check_hooks(optimizer)
    check_unattached(optimizer)
    return cast(Optimizer, optimizer)


def check_unattached(optimizer: Optimizer) -> None:
    """Raise ValueError if a DecoupledWD is attached; detach one whose run was interrupted."""
    other = attached_to(optimizer)
    if other is not None and other.is_left_behind:
        other.detach()
    elif other is not None:
        raise ValueError(
            f"this {type(optimizer).__name__} has a DecoupledWD attached already, and two would "
            f"decay twice: detach the other one first, or merge their arguments"
        )


def attached_to(optimizer: Optimizer) -> Attached | None:
    """Return the DecoupledWD that is attached to ``optimizer``."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        method = getattr(hook, "__wrapped__", None)  # below torch.compile's
        owner = getattr(method, "__self__", None)
        if type(owner) is Attached:
            return owner
    return None


def watch(on_new: Callable[[Optimizer], None]) -> RemovableHandle:
    """Call ``on_new`` right before a step of an optimizer to which no DecoupledWD is attached.

    That may be one that has replaced another during a run. The method ``on_new`` is held weakly.
    """
    method = weakref.WeakMethod(on_new)

    def before_step(optimizer: Optimizer, *_: object) -> None:
        call = method()
        if call is not None and attached_to(optimizer) is None:
            call(optimizer)

    return register_optimizer_step_pre_hook(untraced(before_step))


def unwrapped(optimizer: Any) -> Any:
    """Return the torch optimizer inside the wrappers of Lightning, Fabric and Accelerate."""
    while not WRAPPERS.isdisjoint(cls.__name__ for cls in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    return optimizer


def _groups(optimizer: Callable[[], Any]) -> Sequence[Group]:
    """Return the param groups of an optimizer that is alive, as it steps."""
    groups: Sequence[Group] = optimizer().param_groups
    return groups


def _running_steps(optimizer: Optimizer) -> Iterator[FrameType]:
    """Yield the frames on the call stack that run a ``step`` of ``optimizer``."""
    code = HOOKED_STEP.co_name, HOOKED_STEP.co_filename
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # Compiled, the code is another one of the same name.
        is_step = (frame.f_code.co_name, frame.f_code.co_filename) == code
        if is_step and frame.f_locals.get("args", (None,))[0] is optimizer:
            yield frame
        frame = frame.f_back


def _is_called_from(module: str) -> bool:
    """Return True if code of ``module`` is on the call stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None
