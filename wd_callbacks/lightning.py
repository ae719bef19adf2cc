"""Decoupled weight decay as a Lightning callback."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from wd_callbacks import torch as plain
from wd_callbacks.arguments import Arguments


def _callbacks() -> tuple[type, ...]:
    """The Callback of each Lightning package that is installed: each Trainer takes its own."""
    bases = []
    for package in ("pytorch_lightning", "lightning.pytorch"):
        try:
            bases.append(importlib.import_module(package).Callback)
        except ImportError:
            continue
    if not bases:
        raise ImportError(
            "wd_callbacks.lightning needs pytorch-lightning or lightning: "
            "pip install 'wd_callbacks[lightning]'"
        )
    return tuple(bases)


class _Run:
    """How long a run is, and at which of its batches it is.

    Attributes:
        batches: Training batches of the run, as far as its epochs, or the steps of automatic
            optimization, limit them.
        steps: ``max_steps`` where that does not tell the batches: manual optimization may make any
            number of steps in one.
        batch: The current batch, counted from the start of the run.
        start: The batch with which this process started.
        fraction: ``global_step / steps`` when the current batch started.
    """

    def __init__(self, trainer: Any, max_epochs: int, automatic: bool) -> None:
        self.batches = math.inf if max_epochs == -1 else max_epochs * trainer.num_training_batches
        self.steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
        if automatic and math.isfinite(self.steps):
            self.batches = min(self.batches, _batches_of_steps(trainer, self.steps, self.batches))
            self.steps = math.inf
        self.batch, self.fraction = 0, 0.0
        self.start: int | None = None

    def is_finite(self) -> bool:
        """Whether the run ends after a known number of batches or steps."""
        return math.isfinite(min(self.batches, self.steps))

    def start_batch(self, trainer: Any, batch_idx: int) -> None:
        """Moves on to the batch that starts."""
        per_epoch = trainer.num_training_batches
        if math.isfinite(per_epoch):
            self.batch = trainer.current_epoch * per_epoch + batch_idx
        else:
            self.batch = trainer.fit_loop.total_batch_idx
        self.fraction = trainer.global_step / self.steps
        if self.start is None:
            self.start = self.batch


def _batches_of_steps(trainer: Any, steps: float, most: float) -> float:
    """Batches until automatic optimization has made ``steps`` steps, as far as below ``most``."""
    accumulations = [
        callback.get_accumulate_grad_batches
        for callback in trainer.callbacks
        if hasattr(callback, "get_accumulate_grad_batches")
    ] or [lambda epoch: trainer.accumulate_grad_batches]
    per_epoch, batches = float(trainer.num_training_batches), 0.0
    for epoch in itertools.count():
        every = int(accumulations[0](epoch))
        if batches >= most or steps * every <= per_epoch:
            break
        # The last window of an epoch may be shorter, so this is not per_epoch / every.
        steps -= math.ceil(per_epoch / every)
        batches += per_epoch
        if steps <= 0:
            return batches
    return batches + steps * every


class _Attached(plain.DecoupledWD):
    """The decay of one of the Trainer's optimizers, which counts by the batches of the run."""

    _warn = staticmethod(rank_zero_warn)

    def __init__(self, optimizer: Optimizer, arguments: Arguments, run: _Run) -> None:
        self.run = run
        self.position = 0  # batches that were done when the previous step was made
        self.done: int | None = None  # batches that are done when the current step is made
        super().__init__(
            optimizer,
            arguments.wd,
            scale_by=arguments.scale_by,
            max_lr=arguments.max_lr,
            quantum=arguments.quantum,
            progress=self._fraction,
        )

    def _attach(self) -> None:
        self._decay.meet(self._groups())  # lr_max is the one with which training starts
        super()._attach()

    def attempt(self) -> None:
        """Notes an attempt to step. Those in one batch share its position."""
        done = self.run.start if self.done is None else self.done
        if done is not None and done <= self.run.batch:
            self.position, self.done = done, self.run.batch + 1

    def _fraction(self) -> float:
        self.attempt()  # also where the step is made behind Lightning's back
        return max(self.position / self.run.batches, self.run.fraction)

    def state_dict(self) -> dict[str, Any]:
        """Adds the position in the run, in batches, and the length that it refers to."""
        length = min(self.run.batches, self.run.steps)
        return {**super().state_dict(), "done": self.done, "length": length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where ``state_dict`` was called."""
        super().load_state_dict(state)
        if self._decay.arguments.scheduled:
            length = min(self.run.batches, self.run.steps)
            self._decay.tell_changes({"length": state["length"]}, {"length": length})
        self.done = state["done"]


class DecoupledWD(*_callbacks()):  # type: ignore[misc]
    """Decays the weights by ``lr * wd`` right before their update, with any optimizer.

    On every step each weight with a gradient is multiplied by ``1 - lr * wd``, and the optimizer
    makes its update with a weight decay of 0 (Loshchilov & Hutter,
    https://arxiv.org/abs/1711.05101, Algorithm 2). Works with automatic and manual optimization,
    accumulation, clipping and mixed precision; a step that is skipped decays nothing. A run that is
    resumed from a checkpoint goes on where it was.

    Args:
        wd: The coefficient, at least 0: a number for every param group; a schedule, that is a
            callable from training progress (0.0 at the first step, towards 1.0) to a coefficient; a
            sequence of either, one per param group; None for each group's own weight decay, read
            afresh at every step; where several optimizers differ, a dict from the optimizer's index
            to any of these. With a single number or schedule, a group whose own weight decay is 0
            while another's is not does not decay.
        scale_by: How much of ``wd`` one step takes: ``"lr"``: ``lr * wd``. ``"lr_ratio"``:
            ``lr / lr_max * wd``. ``"lr_squared"``: ``lr**2 / lr_max * wd``. ``"none"``: ``wd``. Or
            a callable from the param group to the number that replaces ``lr``, or a sequence of
            these, one per group.
        max_lr: ``lr_max`` of the above, above 0, a number or one per group. None: the group's
            ``max_lr``, else its ``initial_lr``, else its ``lr``, when training starts.
        quantum: Smallest shrink that is applied at once, in [0, 1); smaller ones are saved up until
            they come to this. None: 2**-20, for float16 2**-8, for bfloat16 2**-6. 0: every step.
        optimizers: The index or indices of the Trainer's optimizers to act on; None for all.

    Raises:
        TypeError, ValueError: An argument makes no sense or, when training starts, does not fit the
            optimizers or the Trainer; at a step and before a weight has changed, where a
            coefficient is negative, NaN or infinite, or a shrink 1 or more.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from pytorch_lightning.demos.boring_classes import BoringModel
        >>> trainer = Trainer(
        ...     fast_dev_run=True,
        ...     accelerator="cpu",
        ...     enable_progress_bar=False,
        ...     enable_model_summary=False,
        ...     callbacks=[DecoupledWD(1e-4)],
        ... )
        >>> trainer.fit(BoringModel())
    """

    def __init__(
        self,
        wd: Any = None,
        *,
        scale_by: Any = "lr",
        max_lr: float | Sequence[float] | None = None,
        quantum: float | None = None,
        optimizers: int | Sequence[int] | None = None,
    ) -> None:
        self.arguments = Arguments(wd, scale_by, max_lr, quantum)
        self.optimizers = _indices(optimizers)
        self._attached: dict[int, _Attached] = {}
        self._loaded: dict[int, Any] = {}

    @property
    def coefficients(self) -> dict[int, list[float]]:
        """The coefficient of each param group at the last step, by the index of the optimizer."""
        return {index: decay.coefficients for index, decay in self._attached.items()}

    @property
    def state_key(self) -> str:
        """The same for callbacks that act on the same optimizers."""
        return str(self._generate_state_key(optimizers=self.optimizers))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Starts afresh, and notes the length before StochasticWeightAveraging adds to it."""
        if stage == "fit":
            self._max_epochs = trainer.max_epochs
            self._attached, self._loaded = {}, {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attaches to the optimizers, whose state and learning rates are final now."""
        count = len(trainer.optimizers)
        indices = range(count) if self.optimizers is None else self.optimizers
        if any(index >= count for index in indices):
            raise ValueError(f"optimizers={indices!r}, but the Trainer has {count} optimizers")
        run = _Run(trainer, self._max_epochs, pl_module.automatic_optimization)
        if self.arguments.scheduled and not run.is_finite():
            raise ValueError(
                "wd is a schedule, which needs the length of the run, and this one has none: give "
                "the Trainer max_epochs with limit_train_batches or a loader that has a length, or "
                "max_steps"
            )
        self._run = run
        for index in indices:
            arguments = self.arguments.of_optimizer(index, list(indices))
            self._attached[index] = _Attached(trainer.optimizers[index], arguments, run)
            if index in self._loaded:
                self._attached[index].load_state_dict(self._loaded[index])
        self._loaded = {}

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes where in the run the steps of this batch are made."""
        self._run.start_batch(trainer, batch_idx)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Notes an attempt to step, also one that the gradient scaler will skip."""
        for decay in self._attached.values():
            if decay.optimizer is plain.unwrapped(optimizer):
                decay.attempt()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leaves the optimizers as the user configured them."""
        self.detach()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leaves the optimizers as the user configured them."""
        self.detach()

    def detach(self) -> None:
        """Takes the decay off the optimizers; checkpoints that follow still hold its state."""
        for decay in self._attached.values():
            decay.detach()

    def state_dict(self) -> dict[Any, Any]:
        """What the decays need to go on, as plain numbers, by the optimizer's index."""
        return {i: decay.state_dict() for i, decay in self._attached.items()} or self._loaded

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        """Keeps the state until training starts, when the optimizers are there."""
        self._attached, self._loaded = {}, state_dict

    def __getstate__(self) -> dict[str, Any]:
        """Copies take the arguments along, not the run, nor the methods that Trainers put here."""
        own = {"arguments": self.arguments, "optimizers": self.optimizers}
        return {**own, "_attached": {}, "_loaded": {}}


def _indices(optimizers: Any) -> tuple[int, ...] | None:
    """The indices as a tuple, so that ``0`` and ``[0]`` name the same state."""
    if optimizers is None:
        return None
    indices = tuple(optimizers) if isinstance(optimizers, Sequence) else (optimizers,)
    if not indices or not all(type(index) is int and index >= 0 for index in indices):
        raise ValueError(
            f"optimizers must be an index or several, each a whole number of at least 0, got "
            f"{optimizers!r}"
        )
    if len(set(indices)) != len(indices):
        raise ValueError(f"optimizers names one twice: {optimizers!r}")
    return indices
