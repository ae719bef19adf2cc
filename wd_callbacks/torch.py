"""Decoupled weight decay in a plain PyTorch loop, or any other that steps a torch optimizer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed
from torch import Tensor, nn
from torch.optim import Optimizer

from wd_callbacks.core.adapter import Adapter
from wd_callbacks.core.attach import Attached, Progress, attach, check_unattached, checked
from wd_callbacks.core.checks import check_count, number
from wd_callbacks.core.config import Config
from wd_callbacks.core.decay import Decay
from wd_callbacks.core.groups import host_lr
from wd_callbacks.core.layout import Setup
from wd_callbacks.core.selection import Selection
from wd_callbacks.core.state import check_entries
from wd_callbacks.core.table import Description
from wd_callbacks.schedules import Run

if TYPE_CHECKING:
    from typing_extensions import Self


class DecoupledWD(Adapter):
    """Decays the weights of ``optimizer`` at each of its steps, until ``detach``.

    Right before its update, each weight with a gradient is multiplied by ``1 - lr * wd``. The
    optimizer makes the update with a weight decay of 0 (Loshchilov & Hutter,
    https://arxiv.org/abs/1711.05101, Algorithm 2). With ``quantum=0``, Adam + ``DecoupledWD``
    equals ``torch.optim.AdamW`` to the bit. Outside of ``optimizer.step`` the param groups hold
    what you set.

    Args:
        optimizer: Any ``torch.optim.Optimizer``, also wrapped by Lightning, Fabric or Accelerate.
        wd: The coefficient, at least 0. A number, or a schedule: a callable from training progress
            (0.0 at the first step, towards 1.0) to a coefficient. Or a sequence of these, one per
            param group. Or a mapping from parameters to these, such as
            ``{"head.*": 0.1, "*": 0.01}``; keys are entries as in ``exclude``, and the first one
            that matches counts. None: each group's own weight decay, read at every step. If some
            groups have a weight decay of 0 and others do not, those with 0 do not decay, unless
            ``wd`` is a sequence.
        scale_by: The factor that multiplies ``wd`` in a step. ``"lr"``: ``lr``. ``"lr_ratio"``:
            ``lr / max_lr``. ``"lr_squared"``: ``lr**2 / max_lr``. ``"none"``: 1. Or a callable from
            the param group to a number, or a sequence of these, one per group.
        max_lr: The peak learning rate, above 0, a number or one per group. None: the group's
            ``max_lr``, else its ``initial_lr``, else its ``lr`` when attached or at the first step,
            whichever is larger.
        exclude: Parameters that do not decay, one entry or several: ``"bias"``, ``"norm"``,
            ``"embedding"``, ``"vector"`` (fewer than two dimensions), ``"marked"``
            (``p._no_weight_decay``, or named by a module's ``no_weight_decay()``), a glob on the
            full parameter name, a module type or its dotted path, or a predicate
            ``(name, parameter) -> bool``. All but ``"vector"`` need ``model``.
        anchor: The values that weights decay towards. None: zero. ``"initial"``: each parameter's
            value right before its first update. Or a mapping from parameter name to tensor, such as
            a pretrained ``state_dict()``; parameters that it does not name decay towards zero.
        cautious: If True, an element decays only if the update moves it towards the anchor as well
            (arXiv 2510.12402).
        quantum: Smallest shrink that is applied at once, in [0, 1); smaller ones are deferred and
            added up. None: ``2**-20``, for float16 ``2**-8``, for bfloat16 ``2**-6``; with an
            anchor ``2**-10``, ``2**-5`` and ``2**-3``. 0: apply every step.
        verbose: If True, print ``describe()`` at the first step, on rank zero.
        model: The model that names the parameters.
        total_steps: Number of calls of ``optimizer.step`` in the run. A schedule needs it, or
            ``progress``.
        steps_per_epoch: Number of these calls in an epoch, for ``Timescale(epochs=...)``.
        progress: A callable that returns the training progress in [0, 1]. It replaces
            ``total_steps`` in loops that do not count steps.

    Raises:
        TypeError, ValueError: An argument is invalid or does not fit the optimizer, or the
            optimizer would lose decay from outside. ``optimizer.step`` raises, before a weight
            changes, if a coefficient is negative, NaN or infinite, or if a shrink is 1 or more.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> decay = DecoupledWD(optimizer, 0.5)
        >>> weight.grad = torch.zeros(2)
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9500, 0.9500])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        wd: Any = None,
        *,
        scale_by: Any = "lr",
        max_lr: Any = None,
        exclude: Any = (),
        anchor: Any = None,
        cautious: bool = False,
        quantum: float | None = None,
        verbose: bool = False,
        model: nn.Module | None = None,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        progress: Callable[[], float] | None = None,
    ) -> None:
        optimizer = checked(optimizer)
        for name, count in (("total_steps", total_steps), ("steps_per_epoch", steps_per_epoch)):
            if count is not None:
                check_count(name, count)
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be a callable without arguments, got {progress!r}")
        self.config = Config(wd, scale_by, max_lr, exclude, anchor, cautious, quantum, verbose)
        if self.config.maps_optimizers:
            raise TypeError(
                f"wd maps optimizer indices, got {self.config!r}, but a plain loop attaches one "
                f"DecoupledWD to each optimizer: build one per optimizer, each with its own wd"
            )
        if self.config.is_scheduled and total_steps is None and progress is None:
            raise ValueError(
                "wd is a schedule, which needs the length of the run: pass total_steps or progress"
            )
        if self.config.anchor not in (None, "initial") and model is None:
            raise ValueError("anchor needs the names of the parameters: pass model")
        self.total_steps = None if total_steps is None else int(total_steps)
        self.steps_per_epoch = steps_per_epoch
        self.progress = progress
        self._owned: Optimizer | None = None  # by a copy
        setup = Setup(
            self.config,
            Selection(self.config.exclude, self.config.keys, model),
            Run(self.total_steps, steps_per_epoch),
            least_lrs=[host_lr(group) for group in optimizer.param_groups],
        )
        self._attached = attach(optimizer, setup, self._position(), _start, rereads_groups=True)

    def _position(self) -> Progress:
        return functools.partial(_position, self.total_steps, self.progress)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, which is held weakly."""
        return self._attached.optimizer

    @property
    def coefficients(self) -> list[float]:
        """The coefficient at the last step, one per row of ``describe()``."""
        return self._attached.decay.coefficients

    @property
    def steps(self) -> int:
        """The number of steps so far, including those before a checkpoint."""
        return self._attached.decay.steps

    @property
    def is_attached(self) -> bool:
        """True while the optimizer's steps decay."""
        return self._attached.is_attached

    def describe(self, parameters: bool = False) -> Description:
        """Return a table of what the decay does; ``print`` shows it.

        The coefficients are those of the last step; before the first one, those at progress 0.

        Args:
            parameters: If False, a row per param group (and key of ``wd``). If True, a row per
                parameter: whether it decays and, if not, why.

        Raises:
            ValueError: The optimizer is gone.
        """
        return self._attached.describe(parameters=parameters)

    def detach(self) -> None:
        """Remove the decay from the optimizer, which is left as you configured it."""
        self._attached.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule, deferred shrinks and ``max_lr``, as plain numbers.

        With ``anchor="initial"`` also the anchors, as tensors. ``torch.load`` reads it with
        ``weights_only=True``.

        Raises:
            ValueError: The optimizer is gone.
        """
        lengths = {"total_steps": self.total_steps, "steps_per_epoch": self.steps_per_epoch}
        return {**self._attached.state_dict(), **lengths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where ``state_dict`` was called. Load the optimizer's state first.

        The arguments of this object stay in force. A warning names those that differ from the
        saved ones.

        Raises:
            ValueError: ``state`` is not one of ``state_dict``, or is that of other param groups.
                Nothing changes then.
        """
        check_entries(state, total_steps=lambda _: True)
        per_epoch = self.steps_per_epoch
        self._attached.load_state_dict(
            state,
            total_steps=(state["total_steps"], self.total_steps),
            steps_per_epoch=(state.get("steps_per_epoch", per_epoch), per_epoch),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies decay the copied optimizer, which they hold."""
        self._attached.settle()
        own = {k: v for k, v in vars(self).items() if k not in ("_attached", "_owned")}
        return {
            **own,
            "_owned": self.optimizer,
            "decay": self._attached.decay,
            "is_attached": self.is_attached,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        decay, is_attached = state.pop("decay"), state.pop("is_attached")
        optimizer = state["_owned"]
        if is_attached:
            check_unattached(optimizer)  # a shallow copy shares it
        vars(self).update(state)
        self._attached = Attached(optimizer, decay, self._position())
        if not is_attached:
            self._attached.detach()


def _position(total_steps: int | None, progress: Callable[[], float] | None, decay: Decay) -> float:
    """Return the training progress of the step that is being made."""
    if progress is not None:
        position = number(progress(), "progress()")
        if not math.isfinite(position):
            raise ValueError(f"progress() returned {position}, expected a number in [0, 1]")
        return min(max(position, 0.0), 1.0)
    if total_steps is None:
        return 0.0
    if decay.steps >= total_steps:
        decay.warn(
            f"the run makes more than the {total_steps} steps of total_steps, so the coefficient "
            f"stays at the end of its schedule: pass the number of optimizer steps of the run",
            once="total_steps",
        )
    return min(decay.steps / total_steps, 1.0)


def _start(attached: Attached) -> None:
    """Right before the first step: print the table, and warn of a state that was not loaded."""
    decay, config = attached.decay, attached.decay.setup.config
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if config.verbose and not (distributed and torch.distributed.get_rank()):
        print(attached.describe())
    needs_state = config.anchor == "initial" or (config.is_scheduled and decay.setup.run.steps)
    if needs_state and decay.steps == 0 and _has_stepped(attached):
        decay.warn(
            "the optimizer has stepped already, but this DecoupledWD is new: a schedule starts at "
            "its beginning, and anchor='initial' takes the current weights. To resume, call "
            "load_state_dict with the saved state of the DecoupledWD"
        )


def _has_stepped(attached: Attached) -> bool:
    setup = attached.steps_of_setup
    states = [each for each in attached.optimizer.state.values() if isinstance(each, dict)]
    steps = [values.get("step", 1) for values in states]
    return any((isinstance(step, Tensor) and not step.is_cpu) or step > setup for step in steps)
