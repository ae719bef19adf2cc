"""Decoupled weight decay as a Lightning callback."""

from __future__ import annotations

import importlib
import logging
import math
import reprlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from wd_callbacks.core.adapter import Adapter
from wd_callbacks.core.attach import Attached, attach, unwrapped, watch
from wd_callbacks.core.checks import is_sequence
from wd_callbacks.core.config import Config
from wd_callbacks.core.layout import Setup
from wd_callbacks.core.rules import scheduler_max_lrs
from wd_callbacks.core.selection import Selection
from wd_callbacks.core.state import NOT_A_STATE, check_entries, is_amount, is_count
from wd_callbacks.core.step import Position
from wd_callbacks.core.table import Description
from wd_callbacks.core.warn import warn
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

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _bases() -> tuple[type, ...]:
    """Return the Callback of each Lightning package that is in use; of one if none is.

    Each Trainer takes its own package's callbacks, and importing a package that is not in use would
    redirect the log messages of the other.
    """
    in_use = [package for package in PACKAGES if sys.modules.get(package) is not None]
    in_use = in_use or [_first_installed()]
    return tuple(sys.modules[package].Callback for package in in_use)


def _first_installed() -> str:
    """Import a Lightning package, and return its name; the levels of loggers stay as they are."""
    names = (*PACKAGES, "lightning", "lightning.fabric", "lightning_fabric")
    levels = {name: logging.getLogger(name).level for name in names}
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError:
            continue
        for name, level in levels.items():
            if level != logging.NOTSET:  # set by the user
                logging.getLogger(name).setLevel(level)
        return package
    raise ImportError(
        "wd_callbacks.lightning needs pytorch-lightning or lightning: "
        "pip install 'wd_callbacks[lightning]'"
    )


BASES = _bases()

from lightning_utilities.core.rank_zero import rank_zero_only  # noqa: E402

rank_zero_warn = rank_zero_only(warn)


class _Run:
    """The length of a run, and where in it the current batch starts.

    Attributes:
        batches: Training batches of the run, as far as its epochs, or the steps of automatic
            optimization, limit them.
        steps: Optimizer steps of the run; with manual optimization, which may make any number of
            them in a batch, they are known from ``max_steps`` only.
        steps_per_epoch: Those of its first epoch, with automatic optimization.
        by_epochs: Whether its epochs end it, and not ``max_steps``.
        position: The fraction of the run that was done when the current batch started, in [0, 1].
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
        """Return True if the run ends after a known number of batches or steps."""
        return math.isfinite(self.length())

    def as_run(self) -> Run:
        """Return the numbers of steps that schedules may need."""
        steps, per_epoch = self.steps, self.steps_per_epoch
        return Run(
            steps if math.isfinite(steps) else None, per_epoch if math.isfinite(per_epoch) else None
        )

    def length(self) -> float:
        """Return its batches, or its steps if only these are known."""
        return min(self.batches, math.inf if self.automatic else self.steps)

    def start_batch(self, trainer: Any) -> None:
        """Move on to the batch that starts."""
        if not self.by_epochs:  # whatever epochs came before, and however long they were
            batches, _ = _until(self.per_epoch, self.windows, self.epochs, trainer.global_step)
            position = batches / self.batches
        elif self.automatic:
            position = self._part_of_epochs(trainer)
        else:
            position = max(self._part_of_epochs(trainer), trainer.global_step / self.steps)
        self.position = min(position, 1.0)  # max_epochs may be raised during the run

    def _part_of_epochs(self, trainer: Any) -> float:
        per_epoch, epoch = trainer.num_training_batches, trainer.current_epoch
        batch_idx = trainer.fit_loop.batch_idx  # the hook's lags behind with a dataloader_iter
        if per_epoch == self.per_epoch < math.inf:
            return float((epoch * per_epoch + batch_idx) / self.batches)
        batch_idx = min(batch_idx, per_epoch - 1)  # the length has changed
        return float((epoch + batch_idx / per_epoch) / self.epochs)


def _accumulation(trainer: Any) -> dict[int, int]:
    """Return the batches per step, by the epoch from which that holds."""
    for callback in trainer.callbacks:
        if hasattr(callback, "get_accumulate_grad_batches"):
            return dict(sorted(callback.scheduling.items()))
    return {0: int(trainer.accumulate_grad_batches)}


def _until(
    per_epoch: float, windows: dict[int, int], epochs: float, most: float
) -> tuple[float, float]:
    """Return batches and steps until ``epochs`` are over or ``most`` steps are made."""
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


class _Optimizer:
    """One of the Trainer's optimizers, with its decay and its place in the run."""

    def __init__(self, attached: Attached, position: Position) -> None:
        self.attached, self.position = attached, position
        self.optimizer: Any = attached.optimizer  # until training ends, also if it is replaced
        self.is_skipped = False  # the step of this batch, by a gradient scaler
        self.steps_before = self.steps_logged = attached.decay.steps

    def detach(self) -> None:
        """Remove the decay from the optimizer."""
        self.attached.detach()
        self.optimizer = None

    def inherit(self, old: _Optimizer) -> None:
        """Go on from an optimizer that was replaced."""
        self.attached.inherit(old.attached)
        self.is_skipped, self.steps_before = old.is_skipped, old.steps_before
        self.steps_logged = old.steps_logged

    @property
    def has_stepped(self) -> bool:
        """Whether the current batch has attempted a step, also one that Lightning did not see."""
        return self.is_skipped or self.attached.decay.steps > self.steps_before

    @property
    def has_news(self) -> bool:
        """Whether a step was made that is not logged yet."""
        return self.attached.is_attached and self.attached.decay.steps > self.steps_logged

    def start_batch(self, run: _Run) -> None:
        """Move on to where the run is, if a step was attempted since the last batch started."""
        if self.has_stepped or self.position.value is None:
            self.position.value, self.is_skipped = run.position, False
            self.steps_before = self.attached.decay.steps

    def state_dict(self, run: _Run) -> dict[str, Any]:
        """Return the state, with the position of the next step and the length of the run."""
        position = None if self.has_stepped else self.position.value
        own = {"position": position, "length": run.length(), "total_steps": None}
        return {**self.attached.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any], run: _Run) -> None:
        """Go on from a saved state."""
        check_entries(state, steps=is_count, total_steps=lambda _: True, length=lambda _: True)
        if "position" in state:
            check_entries(state, position=lambda it: it is None or is_amount(it))
            position = state["position"] and min(state["position"], 1.0)
        else:  # version 0.1.0 counted batches
            check_entries(state, done=lambda done: done is None or is_count(done))
            position = _fraction(state["done"], state["length"])
        decay, length = self.attached.decay, run.length()
        lengths = {"length": (state["length"], length)} if decay.setup.config.is_scheduled else {}
        self.attached.load_state_dict(state, **lengths)
        self.steps_before = self.steps_logged = decay.steps
        self.position.value = position if state["length"] == length else None
        self.is_skipped = False


def _fraction(done: int | None, length: Any) -> float | None:
    """Return the part of a run of ``length`` batches that is ``done``."""
    return min(done / length, 1.0) if done is not None and is_amount(length) and length else None


class _StateKey(property):
    """A property that Trainers read first, to check their callbacks: it checks them too."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Return the key.

        Raises:
            TypeError: A Trainer has the class as a callback.
            ValueError: A Trainer has two callbacks with the same key.
        """
        caller = sys._getframe(1)  # in place of Lightning's own errors, which do not name these
        if caller.f_code.co_name == "_validate_callbacks_list":
            callbacks = caller.f_locals["callbacks"]
            if _CLASS in callbacks:
                raise TypeError(
                    "callbacks has the class DecoupledWD, expected an instance: DecoupledWD(1e-4)"
                )
            same = [cb for cb in callbacks if isinstance(cb, _CLASS)]
            if sum(cb.optimizers == instance.optimizers for cb in same) > 1:
                raise ValueError(
                    "this Trainer has two DecoupledWD for the same optimizers, which would decay "
                    "twice: merge them, or pass different optimizers= to each"
                )
        return super().__get__(instance, owner)


class DecoupledWD(Adapter, *BASES):  # type: ignore[misc]
    """Decays the weights by ``lr * wd`` right before their update, with any optimizer.

    Right before its update, each weight with a gradient is multiplied by ``1 - lr * wd``. The
    optimizer makes the update with a weight decay of 0 (Loshchilov & Hutter,
    https://arxiv.org/abs/1711.05101, Algorithm 2). It works with automatic and manual optimization,
    accumulation, clipping and mixed precision. A skipped step decays nothing. A run that is resumed
    from a checkpoint continues where it stopped.

    Args:
        wd: The coefficient, at least 0. A number, or a schedule: a callable from training progress
            (0.0 at the first step, towards 1.0) to a coefficient. Or a sequence of these, one per
            param group. Or a mapping from parameters to these, such as
            ``{"head.*": 0.1, "*": 0.01}``; keys are entries as in ``exclude``, and the first one
            that matches counts. None: each group's own weight decay, read at every step. Or a
            mapping from optimizer index to any of these but a mapping. If some groups have a weight
            decay of 0 and others do not, those with 0 do not decay, unless ``wd`` is a sequence.
        scale_by: The factor that multiplies ``wd`` in a step. ``"lr"``: ``lr``. ``"lr_ratio"``:
            ``lr / max_lr``. ``"lr_squared"``: ``lr**2 / max_lr``. ``"none"``: 1. Or a callable from
            the param group to a number, or a sequence of these, one per group.
        max_lr: The peak learning rate, above 0, a number or one per group. None: the peak
            of the scheduler (CyclicLR, OneCycleLR), else the group's ``initial_lr``, else its
            ``lr`` when training starts.
        exclude: Parameters that do not decay, one entry or several: ``"bias"``, ``"norm"``,
            ``"embedding"``, ``"vector"`` (fewer than two dimensions), ``"marked"``
            (``p._no_weight_decay``, or named by a module's ``no_weight_decay()``), a glob on the
            full parameter name, a module type or its dotted path, or a predicate
            ``(name, parameter) -> bool``.
        anchor: The values that weights decay towards. None: zero. ``"initial"``: each parameter's
            value right before its first update. Or a mapping from parameter name to tensor, such as
            a pretrained ``state_dict()``; parameters that it does not name decay towards zero.
        cautious: If True, an element decays only if the update moves it towards the anchor as well
            (arXiv 2510.12402).
        quantum: Smallest shrink that is applied at once, in [0, 1); smaller ones are deferred and
            added up. None: ``2**-20``, for float16 ``2**-8``, for bfloat16 ``2**-6``; with an
            anchor ``2**-10``, ``2**-5`` and ``2**-3``. 0: apply every step.
        verbose: If True, print ``describe()`` when training starts, on rank zero.
        optimizers: The index or indices of the Trainer's optimizers to act on; None for all.

    Raises:
        TypeError, ValueError: An argument is invalid or, when training starts, does not fit the
            optimizers or the Trainer. A step raises, before a weight changes, if a coefficient is
            negative, NaN or infinite, or if a shrink is 1 or more.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> from pytorch_lightning.demos.boring_classes import BoringModel
        >>> from wd_callbacks.lightning import DecoupledWD
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
        wd: Mapping[int, Coefficients] | Coefficients | Mapping[str, float | Schedule] = None,
        *,
        scale_by: Word | Sequence[Word | Scale] | Scale = "lr",
        max_lr: float | Sequence[float] | None = None,
        exclude: Named | Collection[Named | Predicate] | Predicate = (),
        anchor: Literal["initial"] | Mapping[str, Tensor] | None = None,
        cautious: bool = False,
        quantum: float | None = None,
        verbose: bool = False,
        optimizers: int | Sequence[int] | None = None,
    ) -> None:
        _add_bases()
        self.config = Config(wd, scale_by, max_lr, exclude, anchor, cautious, quantum, verbose)
        self.optimizers = _indices(optimizers)
        self._state_key = str(self._generate_state_key(optimizers=self.optimizers))
        self._decays: dict[int, _Optimizer] = {}
        self._loaded: dict[int, Any] = {}
        self._trainer: Any = None  # a weak reference
        self._watch: Any = None  # of optimizers that replace others, as long as training lasts

    @property
    def coefficients(self) -> dict[int, list[float]]:
        """The coefficients at the last step, by optimizer index: one per row of ``describe()``."""
        return {index: each.attached.decay.coefficients for index, each in self._decays.items()}

    def describe(self, parameters: bool = False) -> Description:
        """Return a table of what the decay does; ``print`` shows it.

        The coefficients are those of the last step; before the first one, those at progress 0.

        Args:
            parameters: If False, a row per param group (and key of ``wd``). If True, a row per
                parameter: whether it decays and, if not, why.

        Raises:
            ValueError: No training has started, or its optimizers are gone.
        """
        if not self._decays:
            raise ValueError(
                "there is nothing to describe before training has started: call describe() later, "
                "or pass verbose=True"
            )
        several = len(self._decays) > 1
        return Description(
            row
            for index, each in self._decays.items()
            for row in each.attached.describe(f"{index}/" if several else "", parameters)
        )

    @_StateKey
    def state_key(self) -> str:
        """The key of the saved state: the same for callbacks that act on the same optimizers."""
        return self._state_key

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start afresh, and note the run's length before StochasticWeightAveraging adds to it."""
        if stage != "fit":
            return
        if self._is_busy_elsewhere(trainer):
            raise ValueError(
                "this DecoupledWD is in the middle of another Trainer's fit: build one per Trainer"
            )
        self.detach()
        self._max_epochs, self._trainer = trainer.max_epochs, weakref.ref(trainer)
        self._decays, self._loaded = {}, {}

    def _is_busy_elsewhere(self, trainer: Any) -> bool:
        other = self._trainer and self._trainer()
        return other is not None and other is not trainer

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Warn if the checkpoint was saved without this decay."""
        done = checkpoint["global_step"]
        known = self.state_key in checkpoint.get("callbacks", {})
        if trainer.state.fn == "fit" and done and not known:
            rank_zero_warn(
                f"the checkpoint has no state of this DecoupledWD: it was saved after {done} steps "
                f"without it, and the decay starts with the next step"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizers, whose states and learning rates are final now."""
        count = self._count = len(trainer.optimizers)
        indices = range(count) if self.optimizers is None else self.optimizers
        if any(index >= count for index in indices):
            raise ValueError(
                f"optimizers={indices!r}, but the Trainer has {count} optimizers, and indices "
                f"start at 0"
            )
        if not isinstance(self._loaded, Mapping) or not set(self._loaded) <= set(indices):
            raise ValueError(
                f"{NOT_A_STATE} for the optimizers {list(indices)}: {reprlib.repr(self._loaded)}"
            )
        run = _Run(trainer, self._max_epochs, pl_module.automatic_optimization)
        if self.config.is_scheduled and not run.is_finite():
            raise ValueError(
                "wd is a schedule, which needs the length of the run, and this run has none. Pass "
                "the Trainer max_epochs, with limit_train_batches or a loader that has a length, "
                "or pass it max_steps"
            )
        self._run = run
        configs = [self.config.of_optimizer(index, list(indices)) for index in indices]
        self._selection = Selection(
            self.config.exclude, configs[0].keys if configs else (), pl_module, rank_zero_warn
        )
        for index, config in zip(indices, configs):
            self._decays[index] = self._attach(trainer, index, config, Position())
            if index in self._loaded:
                self._decays[index].load_state_dict(self._loaded[index], run)
        self._loaded = {}
        self._watch = watch(self._replace)
        if self.config.verbose:
            rank_zero_only(print)(self.describe())

    def _attach(self, trainer: Any, index: int, config: Config, position: Position) -> _Optimizer:
        optimizer = trainer.optimizers[index]
        setup = Setup(
            config,
            self._selection,
            self._run.as_run(),
            max_lrs=_max_lrs(trainer, optimizer),
            warn=rank_zero_warn,
        )
        attached = attach(optimizer, setup, position, on_divergence=_EndSearch(trainer))
        return _Optimizer(attached, position)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the training progress of this batch's steps."""
        self._run.start_batch(trainer)
        count = len(trainer.optimizers)
        if count != self._count:
            raise ValueError(
                f"the Trainer has {count} optimizers and had {self._count} when training started: "
                f"replace optimizers one by one, or start a new fit"
            )
        for each in self._decays.values():
            each.start_batch(self._run)

    def _replace(self, optimizer: Any) -> None:
        """Go on with an optimizer of the Trainer's that has replaced another one."""
        trainer = self._trainer and self._trainer()
        for index, old in self._decays.items() if trainer is not None else ():
            if unwrapped(trainer.optimizers[index]) is optimizer:
                old.attached.detach()
                config = self.config.of_optimizer(index, list(self._decays))
                self._decays[index] = self._attach(trainer, index, config, old.position)
                self._decays[index].inherit(old)
                return

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Note an attempt to step, also one that the gradient scaler will skip."""
        for each in self._decays.values():
            if optimizer is each.optimizer or each.attached.is_of(unwrapped(optimizer)):
                each.is_skipped = True

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the coefficients of the last steps, at the Trainer's interval and once each."""
        if not (trainer.loggers and trainer.is_global_zero):
            return
        news = {index: each for index, each in self._decays.items() if each.has_news}
        # The Trainer counts those batches that end a window of accumulation.
        is_due = trainer._logger_connector.should_update_logs
        if not (news and is_due) or trainer.fit_loop._should_accumulate():
            return
        names = _names(trainer)
        metrics: dict[str, float] = {}
        for index, each in news.items():
            decay = each.attached.decay
            each.steps_logged = decay.steps
            for rule, coefficient in zip(decay.layout.rules, decay.coefficients):
                name = names[index][rule.group]
                metrics[name if rule.key is None else f"{name}/{rule.key}"] = coefficient
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the optimizers as the user configured them."""
        self._end_fit(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the optimizers as the user configured them."""
        self._end_fit(trainer)

    def _end_fit(self, trainer: Any) -> None:
        if self._trainer is not None and self._trainer() in (trainer, None):  # else its fit goes on
            self._trainer = None
            self.detach()

    def detach(self) -> None:
        """Remove the decay from the optimizers; checkpoints that follow still hold its state."""
        if self._watch is not None:
            self._watch.remove()
        for each in self._decays.values():
            each.detach()

    def state_dict(self) -> dict[Any, Any]:
        """Return the state of each decay by optimizer index, as plain numbers."""
        decays = self._decays.items()
        return self._loaded or {index: each.state_dict(self._run) for index, each in decays}

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        """Keep the state until training starts, when the optimizers are there."""
        if any(each.attached.is_attached for each in self._decays.values()):
            for index, each in self._decays.items():  # LearningRateFinder has ended its search
                each.load_state_dict(state_dict[index], self._run)
        else:
            self._loaded = state_dict

    def __getstate__(self) -> dict[str, Any]:
        """Copies take the arguments along, not the run, nor the methods that Trainers put here."""
        own = {name: vars(self)[name] for name in ("config", "optimizers", "_state_key")}
        return {**own, "_decays": {}, "_loaded": {}, "_trainer": None, "_watch": None}


# Out of the module's names, so that each import asks `__getattr__`.
_CLASS: Any = globals().pop("DecoupledWD")


def __getattr__(name: str) -> Any:
    """Return DecoupledWD, as a callback also of a Lightning package that was imported since."""
    if name != "DecoupledWD":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _add_bases()
    return _CLASS


def _add_bases() -> None:
    for package in PACKAGES:
        base = getattr(sys.modules.get(package), "Callback", None)
        if base is not None and not issubclass(_CLASS, base):
            _CLASS.__bases__ += (base,)


class _EndSearch:
    """Ends the Trainer's search for a learning rate, which has reached one that diverges."""

    def __init__(self, trainer: Any) -> None:
        self._trainer: Any = weakref.ref(trainer)

    def __call__(self) -> bool:
        """Return False if there is no search."""
        trainer = self._trainer()
        is_search = any(type(cb).__name__ == "_LRCallback" for cb in trainer.callbacks)
        if is_search:
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step  # as its own divergence
        return is_search


def _max_lrs(trainer: Any, optimizer: Any) -> list[float]:
    """Return the peak learning rates that the scheduler of ``optimizer`` knows."""
    for config in trainer.lr_scheduler_configs:
        if config.scheduler.optimizer is optimizer:
            return scheduler_max_lrs(config.scheduler)
    return []


def _names(trainer: Any) -> list[list[str]]:
    """A name for each param group of each optimizer: LearningRateMonitor's, with wd for lr."""
    named = [(config.scheduler.optimizer, config.name) for config in trainer.lr_scheduler_configs]
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
        raise ValueError(f"optimizers has an index twice: {optimizers!r}")
    return indices
