"""Decoupled weight decay as a Lightning callback."""

from __future__ import annotations

import importlib
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from wd_callbacks import torch as plain
from wd_callbacks.arguments import Arguments
from wd_callbacks.checks import NO_STATE, check_state, is_amount, is_count, is_fraction, is_sequence
from wd_callbacks.description import Description
from wd_callbacks.schedules import Run, Schedule

# LightningCLI reads and writes configs by these, trying the members of a union in turn, None last.
# Callables come late, as anything passes for one when it writes, None too, but not Literal[None].
# Sequences of schedules come after schedules, as `--trainer.callbacks.wd.end 1` would make a list
# of one; the tuple reads the lists.
Word: TypeAlias = Literal["lr", "lr_ratio", "lr_squared", "none"]
Scale: TypeAlias = Callable[[dict[str, Any]], float]
Named: TypeAlias = str | type[nn.Module]
Predicate: TypeAlias = Callable[[str, nn.Parameter], bool]
Coefficients: TypeAlias = (
    float
    | Literal[None]
    | Sequence[float]
    | tuple[float | Schedule, ...]
    | Schedule
    | Sequence[float | Schedule]
)


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
    """How long a run is, and where in it the current batch starts.

    Attributes:
        batches: Training batches of the run, as far as its epochs, or the steps of automatic
            optimization, limit them.
        steps: Optimizer steps of the run; with manual optimization, which may make any number of
            them in a batch, only ``max_steps`` tells.
        steps_per_epoch: Those of its first epoch, with automatic optimization.
        by_epochs: Whether its epochs end it, and not ``max_steps``.
        position: What part of the run was done when the current batch started, from 0 to 1.
    """

    def __init__(self, trainer: Any, max_epochs: int, automatic: bool) -> None:
        self.automatic = automatic
        self.per_epoch = trainer.num_training_batches
        self.epochs = math.inf if max_epochs == -1 else max_epochs
        self.batches = self.epochs * self.per_epoch if self.epochs and self.per_epoch else 0
        self.steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
        self.steps_per_epoch = math.inf
        self.by_epochs = True
        if automatic:
            most, self.windows = self.batches, _accumulation(trainer)
            self.batches, self.steps = _until(self.per_epoch, self.windows, self.epochs, self.steps)
            self.steps_per_epoch = _until(self.per_epoch, self.windows, 1, math.inf)[1]
            self.by_epochs = self.batches == most
        self.position = 0.0

    def is_finite(self) -> bool:
        """Whether the run ends after a known number of batches or steps."""
        return math.isfinite(self.length())

    def length(self) -> float:
        """Its batches, or its steps where these alone are known."""
        return min(self.batches, math.inf if self.automatic else self.steps)

    def start_batch(self, trainer: Any) -> None:
        """Moves on to the batch that starts."""
        steps = trainer.global_step
        if not self.by_epochs:  # whatever epochs came before, and however long they were
            batches, _ = _until(self.per_epoch, self.windows, self.epochs, steps)
            self.position = batches / self.batches
        elif self.automatic:
            self.position = self._part_of_epochs(trainer)
        else:
            self.position = max(self._part_of_epochs(trainer), steps / self.steps)

    def _part_of_epochs(self, trainer: Any) -> float:
        per_epoch, epoch = trainer.num_training_batches, trainer.current_epoch
        batch_idx = trainer.fit_loop.batch_idx  # the hook's lags behind with a dataloader_iter
        if per_epoch == self.per_epoch < math.inf:
            return float((epoch * per_epoch + batch_idx) / self.batches)
        return float((epoch + batch_idx / per_epoch) / self.epochs)  # the length has changed


def _accumulation(trainer: Any) -> dict[int, int]:
    """How many batches are in a window of accumulation, by the epoch from where that holds."""
    for callback in trainer.callbacks:
        if hasattr(callback, "get_accumulate_grad_batches"):
            return dict(sorted(callback.scheduling.items()))
    return {0: int(trainer.accumulate_grad_batches)}


def _until(
    per_epoch: float, windows: dict[int, int], epochs: float, most: float
) -> tuple[float, float]:
    """Batches and steps until ``epochs`` are over or ``most`` steps made, one step per window."""
    if math.isinf(per_epoch) or math.isinf(min(epochs, most)):
        return most * windows[0], most
    batches: float = 0
    steps: float = 0
    for (start, every), end in zip(windows.items(), [*[*windows][1:], math.inf]):
        left = max(min(end, epochs) - start, 0) if per_epoch else 0
        in_epoch = math.ceil(per_epoch / every)  # steps of an epoch; the last may be shorter
        whole = left if math.isinf(most) else min(left, (most - steps) // max(in_epoch, 1))
        batches += whole * per_epoch
        steps += whole * in_epoch
        if whole < left and steps < most:
            return batches + min((most - steps) * every, per_epoch), most
    return batches, steps


class _Attached(plain.DecoupledWD):
    """The decay of one of the Trainer's optimizers, which counts by the batches of the run."""

    _warn = staticmethod(rank_zero_warn)

    def __init__(
        self, optimizer: Optimizer, arguments: Arguments, run: _Run, model: nn.Module
    ) -> None:
        self.run = run
        self.position: float | None = None  # what was done when the previous step was made
        self.has_attempted = False  # to step in the current batch, also where a scaler skips it
        self.has_news = False  # coefficients that no logger has seen
        super().__init__(
            optimizer,
            arguments.wd,
            scale_by=arguments.scale_by,
            max_lr=arguments.max_lr,
            exclude=arguments.exclude,
            quantum=arguments.quantum,
            model=model,
            progress=self._fraction,
        )

    def _attach(self) -> None:
        self._decay.meet(self._groups())  # lr_max is the one with which training starts
        super()._attach()

    def start_batch(self) -> None:
        """Moves on to where the run is. The steps of one batch share their position."""
        if self.has_attempted or self.position is None:
            self.position, self.has_attempted = self.run.position, False

    def _length(self) -> Run:
        steps, steps_per_epoch = self.run.steps, self.run.steps_per_epoch
        return Run(
            steps if math.isfinite(steps) else None,
            steps_per_epoch if math.isfinite(steps_per_epoch) else None,
        )

    def _fraction(self) -> float:
        self.has_attempted = self.has_news = True  # also where Lightning did not see the step
        return 0.0 if self.position is None else self.position

    def state_dict(self) -> dict[str, Any]:
        """Adds the position in the run, None for that of the next batch, and the run's length."""
        position = None if self.has_attempted else self.position
        return {**super().state_dict(), "position": position, "length": self.run.length()}

    def _take(self, state: dict[str, Any]) -> None:
        check_state(state, length=lambda _: True)
        if "position" not in state:  # version 0.1.0 counted batches
            check_state(state, done=lambda done: done is None or is_count(done))
            state = {**state, "position": _part(state["done"], state["length"])}
        check_state(state, position=lambda it: it is None or is_fraction(it))
        super()._take(state)
        self.position = state["position"] if state["length"] == self.run.length() else None
        self.has_attempted = False

    def _lengths(self) -> dict[str, Any]:
        return {"length": self.run.length()} if self._decay.arguments.scheduled else {}


def _part(done: int | None, length: Any) -> float | None:
    """The part of a run of ``length`` batches that is ``done``."""
    return min(done / length, 1.0) if done is not None and is_amount(length) and length else None


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
        exclude: Parameters that do not decay, an entry or several: ``"bias"``, ``"norm"``,
            ``"embedding"``, ``"marked"`` (``p._no_weight_decay``, or named by a module's
            ``no_weight_decay()``), a glob on the full parameter name, a module type or its dotted
            path, or a predicate ``(name, parameter) -> bool``.
        quantum: Smallest shrink that is applied at once, in [0, 1); smaller ones are saved up until
            they come to this. None: 2**-20, for float16 2**-8, for bfloat16 2**-6. 0: every step.
        verbose: Whether ``describe()`` is printed when training starts, on rank zero.
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
        wd: Mapping[int, Coefficients] | Coefficients = None,
        *,
        scale_by: Word | Sequence[Word | Scale] | Scale = "lr",
        max_lr: float | Sequence[float] | None = None,
        exclude: Named | Collection[Named | Predicate] | Predicate = (),
        quantum: float | None = None,
        verbose: bool = False,
        optimizers: int | Sequence[int] | None = None,
    ) -> None:
        self.arguments = Arguments(
            wd, scale_by, max_lr=max_lr, exclude=exclude, quantum=quantum, verbose=verbose
        )
        self.optimizers = _indices(optimizers)
        self._attached: dict[int, _Attached] = {}
        self._loaded: dict[int, Any] = {}

    @property
    def coefficients(self) -> dict[int, list[float]]:
        """The coefficient of each param group at the last step, by the index of the optimizer."""
        return {index: decay.coefficients for index, decay in self._attached.items()}

    def describe(self) -> Description:
        """A table of what the decay does to each param group; ``print`` shows it.

        The coefficients are those of the last step, before the first one those at progress 0.

        Raises:
            ValueError: No training has started.
        """
        if not self._attached:
            raise ValueError("there is nothing to describe before training has started")
        several = len(self._attached) > 1
        return Description(
            row
            for index, decay in self._attached.items()
            for row in decay.describe(f"{index}/" if several else "")
        )

    @property
    def state_key(self) -> str:
        """The same for callbacks that act on the same optimizers."""
        return str(self._generate_state_key(optimizers=self.optimizers))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Starts afresh, and notes the length before StochasticWeightAveraging adds to it."""
        if stage == "fit":
            self._max_epochs = trainer.max_epochs
            self._attached, self._loaded = {}, {}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Tells where the decay begins in a run that did without it so far."""
        done = checkpoint["global_step"]
        known = self.state_key in checkpoint.get("callbacks", {})
        if trainer.state.fn == "fit" and done and not known:
            rank_zero_warn(
                f"the checkpoint holds no state of this DecoupledWD: its decay begins here, after "
                f"{done} steps, with nothing owed"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attaches to the optimizers, whose state and learning rates are final now."""
        count = len(trainer.optimizers)
        indices = range(count) if self.optimizers is None else self.optimizers
        if any(index >= count for index in indices):
            raise ValueError(f"optimizers={indices!r}, but the Trainer has {count} optimizers")
        if not isinstance(self._loaded, Mapping) or not set(self._loaded) <= set(indices):
            raise ValueError(
                f"{NO_STATE} of the optimizers {list(indices)}: {reprlib.repr(self._loaded)}"
            )
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
            decay = _Attached(trainer.optimizers[index], arguments, run, pl_module)
            self._attached[index] = decay
            if index in self._loaded:
                decay.load_state_dict(self._loaded[index])
        self._loaded = {}
        if self.arguments.verbose:
            rank_zero_only(print)(self.describe())

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes where in the run the steps of this batch are made."""
        self._run.start_batch(trainer)
        for decay in self._attached.values():
            decay.start_batch()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Notes an attempt to step, also one that the gradient scaler will skip."""
        for decay in self._attached.values():
            if decay.optimizer is plain.unwrapped(optimizer):
                decay.has_attempted = True

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the coefficients of the last steps, at the Trainer's interval and once each."""
        news = {index: decay for index, decay in self._attached.items() if decay.has_news}
        if not (news and trainer.is_global_zero and trainer.loggers):
            return
        # The Trainer counts those batches that end a window of accumulation.
        is_due = trainer._logger_connector.should_update_logs
        if is_due and not trainer.fit_loop._should_accumulate():
            names = _names(trainer)
            metrics = {
                name: coefficient
                for index, decay in news.items()
                for name, coefficient in zip(names[index], decay.coefficients)
            }
            for decay in news.values():
                decay.has_news = False
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

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
        return self._loaded or {i: decay.state_dict() for i, decay in self._attached.items()}

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        """Keeps the state until training starts, when the optimizers are there."""
        if any(decay.is_attached for decay in self._attached.values()):
            for index, decay in self._attached.items():  # LearningRateFinder has ended its trial
                decay.load_state_dict(state_dict[index])
        else:
            self._loaded = state_dict

    def __getstate__(self) -> dict[str, Any]:
        """Copies take the arguments along, not the run, nor the methods that Trainers put here."""
        own = {"arguments": self.arguments, "optimizers": self.optimizers}
        return {**own, "_attached": {}, "_loaded": {}}


def _names(trainer: Any) -> list[list[str]]:
    """A name for each param group of each optimizer: LearningRateMonitor's, with wd for lr."""
    configs = [it for it in trainer.lr_scheduler_configs if hasattr(it.scheduler, "optimizer")]
    named = [(config.scheduler.optimizer, config.name) for config in configs]
    scheduled = {id(optimizer) for optimizer, _ in named}
    unnamed = [(it, None) for it in trainer.optimizers if id(it) not in scheduled]
    seen: Counter[type] = Counter()
    names: dict[int, list[str]] = {}
    # Schedulers are counted first, each of them, and an optimizer has the name of its first.
    for optimizer, name in [*named, *unnamed]:
        cls = type(optimizer)
        seen[cls] += name is None
        name = cls.__name__ if name is None else name.removeprefix("lr-")
        name = f"wd-{name}-{seen[cls] - 1}" if seen[cls] > 1 else f"wd-{name}"
        names.setdefault(id(optimizer), _names_of_groups(name, optimizer.param_groups))
    return [names[id(optimizer)] for optimizer in trainer.optimizers]


def _names_of_groups(name: str, groups: Sequence[Mapping[str, Any]]) -> list[str]:
    if len(groups) == 1:
        return [f"{name}/{groups[0]['name']}" if groups[0].get("name") else name]
    return [f"{name}/{group.get('name', f'pg{i}')}" for i, group in enumerate(groups, start=1)]


def _indices(optimizers: Any) -> tuple[int, ...] | None:
    """The indices as a tuple, so that ``0`` and ``[0]`` name the same state."""
    if optimizers is None:
        return None
    indices = tuple(optimizers) if is_sequence(optimizers) else (optimizers,)
    if not indices or not all(type(index) is int and index >= 0 for index in indices):
        raise ValueError(
            f"optimizers must be an index or several, each a whole number of at least 0, got "
            f"{optimizers!r}"
        )
    if len(set(indices)) != len(indices):
        raise ValueError(f"optimizers names one twice: {optimizers!r}")
    return indices
