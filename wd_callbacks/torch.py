"""Decoupled weight decay in a plain PyTorch loop, or any other that steps a torch optimizer."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch.distributed
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from wd_callbacks import probe
from wd_callbacks.arguments import Arguments, Group
from wd_callbacks.checks import check_count, check_state, is_count, number
from wd_callbacks.decay import Decay
from wd_callbacks.description import Description
from wd_callbacks.schedules import Run
from wd_callbacks.selection import Selection

if TYPE_CHECKING:
    from typing_extensions import Self

DYNAMO = ("torch._compile", "torch._dynamo.eval_frame")  # where torch.compile leaves hooks alone
STATE_SETUP = "torch.distributed.checkpoint.state_dict"  # steps with gradients and lr of 0
WRAPPERS = ("LightningOptimizer", "_FabricOptimizer", "AcceleratedOptimizer")


class DecoupledWD:
    """Decays the weights of ``optimizer`` at its every step, from when it is built to ``detach``.

    On every step each weight with a gradient is multiplied by ``1 - lr * wd`` right before its
    update, and the optimizer makes the update with a weight decay of 0 (Loshchilov & Hutter,
    https://arxiv.org/abs/1711.05101, Algorithm 2). Adam with it is ``torch.optim.AdamW`` to the
    bit. Outside ``optimizer.step`` the param groups hold what they held.

    Args:
        optimizer: Any ``torch.optim.Optimizer``, also wrapped by Lightning, Fabric or Accelerate.
        wd: The coefficient, at least 0: a number for every param group; a schedule, that is a
            callable from training progress (0.0 at the first step, towards 1.0) to a coefficient; a
            sequence of either, one per param group; None for each group's own weight decay, read
            afresh at every step. With a single number or schedule, a group whose own weight decay
            is 0 while another's is not does not decay.
        scale_by: How much of ``wd`` one step takes: ``"lr"``: ``lr * wd``. ``"lr_ratio"``:
            ``lr / lr_max * wd``. ``"lr_squared"``: ``lr**2 / lr_max * wd``. ``"none"``: ``wd``. Or
            a callable from the param group to the number that replaces ``lr``, or a sequence of
            these, one per group.
        max_lr: ``lr_max`` of the above, above 0, a number or one per group. None: the group's
            ``max_lr``, else its ``initial_lr``, else its ``lr``, when the first step is made.
        exclude: Parameters that do not decay, an entry or several: ``"bias"``, ``"norm"``,
            ``"embedding"``, ``"marked"`` (``p._no_weight_decay``, or named by the model's
            ``no_weight_decay()``), a glob on the full parameter name, a module type or its dotted
            path, or a predicate ``(name, parameter) -> bool``. Needs ``model``.
        quantum: Smallest shrink that is applied at once, in [0, 1); smaller ones are saved up until
            they come to this. None: 2**-20, for float16 2**-8, for bfloat16 2**-6. 0: every step,
            however small.
        verbose: Whether ``describe()`` is printed at the first step, on rank zero.
        model: What ``exclude`` takes the names of the parameters from.
        total_steps: Number of calls of ``optimizer.step`` in the run, for a schedule.
        steps_per_epoch: Number of them in an epoch, for ``Timescale(epochs=...)``.
        progress: Gives the training progress in [0, 1], for loops that know it better than by the
            number of steps.

    Raises:
        TypeError, ValueError: An argument makes no sense, does not fit the optimizer, or the
            optimizer cannot be decayed from outside. Later, from ``optimizer.step`` and before a
            weight has changed: a coefficient is negative, NaN or infinite, or a shrink 1 or more.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> decay = DecoupledWD(optimizer, 0.5)
        >>> weight.grad = torch.zeros(2)
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9500, 0.9500])
    """

    _warn: Callable[[str], None] = staticmethod(warnings.warn)

    def __init__(
        self,
        optimizer: Optimizer,
        wd: Any = None,
        *,
        scale_by: Any = "lr",
        max_lr: float | Sequence[float] | None = None,
        exclude: Any = (),
        quantum: float | None = None,
        verbose: bool = False,
        model: nn.Module | None = None,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        progress: Callable[[], float] | None = None,
    ) -> None:
        self.optimizer = unwrapped(optimizer)
        probe.check_hooks(self.optimizer)
        check_undecayed(self.optimizer)
        probe.check_weights(self.optimizer)
        for name, count in (("total_steps", total_steps), ("steps_per_epoch", steps_per_epoch)):
            if count is not None:
                check_count(name, count)
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be a callable without arguments, got {progress!r}")
        arguments = Arguments(
            wd, scale_by, max_lr=max_lr, exclude=exclude, quantum=quantum, verbose=verbose
        ).of_optimizer(0, [0])
        if arguments.scheduled and total_steps is None and progress is None:
            raise ValueError(
                "wd is a schedule, which needs the length of the run: give total_steps, or progress"
            )
        self.total_steps = None if total_steps is None else int(total_steps)
        self.steps_per_epoch = steps_per_epoch
        self.progress = progress
        self._decay = Decay(
            arguments,
            run=self._length(),
            decays=Selection(arguments.exclude, model, self._warn),
            warn=self._warn,
        )
        self._decay.check_groups(self._groups())
        for remark in probe.remarks(self.optimizer, arguments.follows_lr):
            self._warn(remark)
        self._has_shown = False  # what verbose=True asks for
        self._frame: FrameType | None = None
        self._handles: list[RemovableHandle] = []
        self._attach()

    @property
    def coefficients(self) -> list[float]:
        """The coefficient of each param group at the last step."""
        return self._decay.coefficients

    @property
    def steps(self) -> int:
        """How many steps were made, those before a checkpoint among them."""
        return self._decay.steps

    @property
    def is_attached(self) -> bool:
        """Whether the optimizer's steps decay."""
        return bool(self._handles)

    def describe(self, label: str = "") -> Description:
        """A table of what the decay does to each param group; ``print`` shows it.

        The coefficients are those of the last step, before the first one those at progress 0.

        Args:
            label: What stands before the index of each group.
        """
        return self._decay.describe(self._groups(), label)

    def detach(self) -> None:
        """Takes the decay off the optimizer, which is left as the user configured it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._decay.attached = False
        self._end_step()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _attach(self) -> None:
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
            self.optimizer.register_state_dict_pre_hook(self._before_state_dict),
        ]
        # Post hooks of others find the groups as the user set them.
        after = self.optimizer._optimizer_step_post_hooks
        after.move_to_end(self._handles[1].id, last=False)

    # Events of the optimizer, in firing order

    @_disable_dynamo  # traced, a coefficient would be a constant to be compiled anew
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _is_running(self._frame):
            return None  # `step` called `super().step()`
        self._frame = _caller()
        if not optimizer.state and _is_called_from(STATE_SETUP):
            self._decay.skip(self._groups())
            return None
        if not self._has_shown:
            self._show()
        found_inf = getattr(optimizer, "found_inf", None)
        args, kwargs = self._decay.begin(
            self._groups,
            self._position,
            args[1:],
            kwargs,
            found_inf if isinstance(found_inf, Tensor) else None,
        )
        return (optimizer, *args), kwargs

    @_disable_dynamo
    def _after_step(self, *_: object) -> None:
        if _caller() is self._frame:
            self._frame = None
            self._decay.end()

    def _before_state_dict(self, _: Optimizer) -> None:
        if not _is_running(self._frame):
            self._end_step()

    def _end_step(self) -> None:
        self._frame = None
        self._decay.give_back()

    def _show(self) -> None:
        self._has_shown = True
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self._decay.arguments.verbose and not (distributed and torch.distributed.get_rank()):
            print(self.describe())

    def _groups(self) -> list[Group]:
        return list(self.optimizer.param_groups)

    def _length(self) -> Run:
        return Run(self.total_steps, self.steps_per_epoch)

    def _position(self) -> float:
        """Training progress at the step that is being made."""
        if self.progress is not None:
            position = number(self.progress(), "progress()")
            if not math.isfinite(position):
                raise ValueError(f"progress() gave {position}, expected a number in [0, 1]")
            return min(max(position, 0.0), 1.0)
        return 0.0 if self.total_steps is None else min(self.steps / self.total_steps, 1.0)

    # State

    def state_dict(self) -> dict[str, Any]:
        """The position in the schedule, what is owed and ``lr_max``, as plain numbers.

        Loadable with ``torch.load(..., weights_only=True)``.
        """
        return {
            "steps": self.steps,
            "total_steps": self.total_steps,
            **self._decay.state_dict(self._groups()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where ``state_dict`` was called. Load the optimizer's state first.

        The arguments that this object was built with stay in force; a warning tells those that
        differ from the saved ones.

        Raises:
            ValueError: It is no such state, or that of other param groups. Nothing is taken then.
        """
        self._take(state)
        self._decay.tell_changes(state, self._lengths())

    def _take(self, state: dict[str, Any]) -> None:
        """Takes up all of the state, or where something of it is refused, nothing."""
        check_state(state, steps=is_count, total_steps=lambda _: True)
        self._decay.load_state_dict(state, self._groups())
        self._decay.steps = state["steps"]

    def _lengths(self) -> dict[str, Any]:
        """What the state tells of the length of the run that it was saved in."""
        return {"total_steps": self.total_steps}

    def __getstate__(self) -> dict[str, Any]:
        """Copies decay the copied optimizer, pickles the unpickled one."""
        self._before_state_dict(self.optimizer)
        return {**vars(self), "_frame": None, "_handles": [], "_attached": bool(self._handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_attached")
        vars(self).update(state)
        if attached:
            check_undecayed(self.optimizer)  # a shallow copy shares it
            self._attach()


def check_undecayed(optimizer: Optimizer) -> None:
    """Raises ValueError where a DecoupledWD is attached to ``optimizer``."""
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), DecoupledWD) for hook in hooks):
        raise ValueError(
            f"this {type(optimizer).__name__} has a DecoupledWD attached already, and two would "
            f"decay twice: detach the other one first"
        )


def unwrapped(optimizer: Any) -> Any:
    """The torch optimizer inside the wrappers of Lightning, Fabric and Accelerate."""
    while any(cls.__name__ in WRAPPERS for cls in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    return optimizer


def _caller() -> FrameType | None:
    """The frame that runs the hooks."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in DYNAMO:
        frame = frame.f_back
    return frame


def _is_running(frame: FrameType | None) -> bool:
    """Whether ``frame`` is on the call stack: a step that raised is not, and has no end."""
    caller = sys._getframe(1) if frame is not None else None
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None


def _is_called_from(module: str) -> bool:
    """Whether code of ``module`` is on the call stack."""
    caller = sys._getframe(1) if module in sys.modules else None
    while caller is not None and caller.f_globals.get("__name__") != module:
        caller = caller.f_back
    return caller is not None
