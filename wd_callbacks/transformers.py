"""Decoupled weight decay as a callback of Hugging Face's Trainer."""

from __future__ import annotations

import functools
import math
import os
import sys
import weakref
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from wd_callbacks.core.adapter import Adapter
from wd_callbacks.core.attach import attach, unwrapped, watch
from wd_callbacks.core.config import Config
from wd_callbacks.core.decay import Decay
from wd_callbacks.core.layout import Setup
from wd_callbacks.core.rules import Rule, scheduler_max_lrs
from wd_callbacks.core.selection import Selection
from wd_callbacks.core.state import check_entries
from wd_callbacks.core.step import Position
from wd_callbacks.core.table import Description
from wd_callbacks.core.warn import warn
from wd_callbacks.schedules import Run

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
    from transformers import TrainingArguments as Arguments
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
except ImportError as error:
    raise ImportError(
        "wd_callbacks.transformers needs transformers and accelerate: "
        "pip install 'wd_callbacks[transformers]'"
    ) from error

# Not the name of the class: the Trainer would rebuild the callback without its arguments.
STATE_KEY = "wd_callbacks.transformers"
ANCHORS_FILE = "decoupled_wd_anchors.pt"


class DecoupledWD(Adapter, TrainerCallback):  # type: ignore[misc]
    """Decays the weights by ``lr * wd`` right before their update, with any optimizer.

    Right before its update, each weight with a gradient is multiplied by ``1 - lr * wd``. The
    optimizer makes the update with a weight decay of 0 (Loshchilov & Hutter,
    https://arxiv.org/abs/1711.05101, Algorithm 2). The Trainer puts biases and norms into a second
    param group, which does not decay. A run that is resumed from a checkpoint continues where it
    stopped.

    Args:
        wd: The coefficient, at least 0. A number, or a schedule: a callable from training progress
            (0.0 at the first step, towards 1.0) to a coefficient. Or a sequence of these, one per
            param group, the second one included. Or a mapping from parameters to these, such as
            ``{"lm_head*": 0.1, "*": 0.01}``; keys are entries as in ``exclude``, and the first one
            that matches counts. None: ``args.weight_decay``.
        scale_by: The factor that multiplies ``wd`` in a step. ``"lr"``: ``lr``. ``"lr_ratio"``:
            ``lr / max_lr``. ``"lr_squared"``: ``lr**2 / max_lr``. ``"none"``: 1. Or a callable from
            the param group to a number, or a sequence of these, one per group.
        max_lr: The peak learning rate, above 0, a number or one per group. None: the group's
            ``max_lr``, else its ``initial_lr`` (``args.learning_rate``), else its ``lr`` when
            training starts.
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
        verbose: If True, print ``describe()`` when training starts, in the main process.

    Raises:
        TypeError, ValueError: An argument is invalid or, when training starts, does not fit the
            optimizer. A step raises, before a weight changes, if a coefficient is negative, NaN or
            infinite, or if a shrink is 1 or more.

    Examples:
        >>> from transformers import Trainer, TrainingArguments
        >>> args = TrainingArguments(optim="adamw_torch", weight_decay=0.0, report_to="none")
        >>> trainer = Trainer(torch.nn.Linear(2, 2), args, callbacks=[DecoupledWD(0.1)])
    """

    def __init__(
        self,
        wd: Any = None,
        *,
        scale_by: Any = "lr",
        max_lr: Any = None,
        exclude: Any = (),
        anchor: Any = None,
        cautious: bool = False,
        quantum: float | None = None,
        verbose: bool = False,
    ) -> None:
        self.config = Config(wd, scale_by, max_lr, exclude, anchor, cautious, quantum, verbose)
        if self.config.maps_optimizers:
            raise TypeError(
                f"wd maps optimizer indices, got {self.config!r}, but a Trainer has one optimizer: "
                f"pass the wd of that one"
            )
        self._attached: Any = None
        self._optimizer: Any = None  # held until training ends, also if it is replaced
        self._watch: Any = None  # of optimizers that replace it, as long as training lasts
        self._position = Position()
        self._steps_logged = 0

    @property
    def coefficients(self) -> list[float]:
        """The coefficient at the last step, one per row of ``describe()``."""
        return [] if self._attached is None else self._attached.decay.coefficients

    def describe(self, parameters: bool = False) -> Description:
        """Return a table of what the decay does; ``print`` shows it.

        The coefficients are those of the last step; before the first one, those at progress 0.

        Args:
            parameters: If False, a row per param group (and key of ``wd``). If True, a row per
                parameter: whether it decays and, if not, why.

        Raises:
            ValueError: No training has started, or its optimizer is gone.
        """
        if self._attached is None:
            raise ValueError(
                "there is nothing to describe before training has started: call describe() later, "
                "or pass verbose=True"
            )
        description: Description = self._attached.describe(parameters=parameters)
        return description

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the optimizer, and continue from a checkpoint's state."""
        if len(_running_trainers()) > 1 and self._attached and self._attached.is_attached:
            raise ValueError(
                "this DecoupledWD is in the middle of another Trainer's training: build one per "
                "Trainer"
            )
        handler = _calling_handler()
        self._stand_before_reporters(handler)
        self.detach()
        self._attached, self._steps_logged = None, 0
        self._attach(args, state, handler, unwrapped(kwargs["optimizer"]))
        self._watch = watch(self._replace)
        saved = (state.stateful_callbacks or {}).get(STATE_KEY)
        if saved is not None:
            self._load(state, saved)
        elif state.global_step:
            warn(
                f"the checkpoint has no state of this DecoupledWD: it was saved after "
                f"{state.global_step} steps without it, and the decay starts with the next step"
            )
        self._store(state)  # a schedule is compared by some of its values: they are read now
        if self.config.verbose and state.is_world_process_zero:
            print(self.describe())

    def _stand_before_reporters(self, handler: Any) -> None:
        """Move to where keys that are added to the logs reach every reporter.

        DefaultFlowCallback, which decides whether to save, comes first.
        """
        if sum(isinstance(callback, DecoupledWD) for callback in handler.callbacks) > 1:
            raise ValueError(
                "this Trainer has two DecoupledWD, which would decay twice: merge them"
            )
        others = [callback for callback in handler.callbacks if callback is not self]
        flows = [isinstance(callback, DefaultFlowCallback) for callback in others]
        place = flows.index(True) + 1 if any(flows) else 0
        handler.callbacks = [*others[:place], self, *others[place:]]  # a new list: one is iterated

    def _attach(self, args: Arguments, state: TrainerState, handler: Any, optimizer: Any) -> None:
        model = handler.model
        setup = Setup(
            self.config,
            Selection(self.config.exclude, self.config.keys, model),
            Run(max(state.max_steps, 1), _steps_per_epoch(args, handler.train_dataloader)),
            max_lrs=scheduler_max_lrs(handler.lr_scheduler),
            no_decay=[False, True] if _are_trainers(optimizer.param_groups, handler) else (),
        )
        is_running = functools.partial(_is_training, weakref.ref(self))
        attached = attach(optimizer, setup, self._position, is_running=is_running)
        if self._attached is not None:
            attached.inherit(self._attached)
        self._attached, self._optimizer = attached, optimizer

    def _replace(self, optimizer: Any) -> None:
        """Go on with an optimizer of the Trainer's that has replaced another one."""
        for trainer in _running_trainers():
            handler = trainer.callback_handler
            if self in handler.callbacks and unwrapped(trainer.optimizer) is optimizer:
                self._attached.detach()
                self._attach(trainer.args, trainer.state, handler, optimizer)

    def on_step_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the position of the step."""
        self._check_begun()
        self._position.value = min(state.global_step / max(state.max_steps, 1), 1.0)

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the state where the Trainer saves it: any callback may still ask for that."""
        self._check_begun()
        self._store(state)

    def on_save(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save initial anchors, which are tensors, beside the checkpoint's other files."""
        if self.config.anchor != "initial" or self._attached is None:
            return
        folder, anchors = _checkpoint(state), self._attached.state_dict()["anchors"]
        if args.should_save and os.path.isdir(folder):
            torch.save(anchors, os.path.join(folder, ANCHORS_FILE))

    def on_log(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the coefficients of the last step beside its loss, if they are not logged yet."""
        decay = None if self._attached is None else self._attached.decay
        if decay is None or logs is None or decay.steps == self._steps_logged:
            return
        if "loss" not in logs:
            return  # metrics of an evaluation stay as they are
        self._steps_logged = decay.steps
        metrics = _metrics(decay)
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the optimizer as the user configured it."""
        self.detach()
        self._optimizer = None

    def detach(self) -> None:
        """Remove the decay from the optimizer, which is left as you configured it."""
        if self._attached is not None:
            self._attached.detach()
        if self._watch is not None:
            self._watch.remove()

    def _check_begun(self) -> None:
        if self._attached is None:
            raise ValueError(
                "this DecoupledWD was added to a Trainer in training, too late to decay: add it "
                "before train()"
            )

    def _store(self, state: TrainerState) -> None:
        saved = self._attached.state_dict()
        saved.pop("anchors", None)
        state.stateful_callbacks[STATE_KEY] = {**saved, "max_steps": state.max_steps}

    def _load(self, state: TrainerState, saved: dict[str, Any]) -> None:
        check_entries(saved, max_steps=lambda _: True, arguments=lambda it: isinstance(it, dict))
        if self.config.anchor == "initial" == saved["arguments"].get("anchor"):
            anchors = torch.load(_anchors_file(state), map_location="cpu", weights_only=True)
            saved = {**saved, "anchors": anchors}
        length = saved["max_steps"], state.max_steps
        lengths = {"max_steps": length} if self.config.is_scheduled else {}
        self._attached.load_state_dict(saved, **lengths)
        self._steps_logged = self._attached.decay.steps

    def __getstate__(self) -> dict[str, Any]:
        """Copies take the arguments along, not the run."""
        run = {"_attached": None, "_optimizer": None, "_watch": None, "_position": Position()}
        return {**vars(self), **run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _steps_logged=0)


def _running_trainers() -> list[Trainer]:
    """Return the Trainers whose training is on the call stack; one that raised is not."""
    trainers: list[Trainer] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        is_train = frame.f_code.co_name in ("train", "_inner_training_loop")
        trainer = frame.f_locals.get("self") if is_train else None
        if isinstance(trainer, Trainer) and trainer not in trainers:
            trainers.append(trainer)
        frame = frame.f_back
    return trainers


def _calling_handler() -> CallbackHandler:
    """Return the Trainer's list of callbacks, whose event is on the call stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    assert frame is not None
    handler: CallbackHandler = frame.f_locals["self"]
    return handler


def _is_training(callback: Any) -> bool:
    """Return True if a Trainer with this callback is training."""
    this = callback()
    return any(this in trainer.callback_handler.callbacks for trainer in _running_trainers())


def _checkpoint(state: TrainerState) -> str:
    """Return the folder of a checkpoint of the running Trainer, in a search that of its trial."""
    trainer = _running_trainers()[0]
    folder = trainer._get_output_dir(getattr(trainer, "_trial", None))
    return os.path.join(folder, f"checkpoint-{state.global_step}")


def _anchors_file(state: TrainerState) -> str:
    """Return the file of the initial anchors in the checkpoint that is resumed."""
    folders = [_checkpoint(state)]
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:  # of `train`, whose argument the Trainer keeps nowhere else
        resumed = frame.f_locals.get("resume_from_checkpoint")
        if frame.f_code.co_name == "train" and isinstance(resumed, str | os.PathLike):
            folders.insert(0, os.fspath(resumed))
        frame = frame.f_back
    for folder in folders:
        path = os.path.join(folder, ANCHORS_FILE)
        if os.path.isfile(path):
            return path
    raise ValueError(
        f"anchor='initial' needs the file {ANCHORS_FILE} of the checkpoint, which is not in "
        f"{folders}: resume from a checkpoint that was saved with anchor='initial', or pass a "
        f"mapping as anchor"
    )


def _steps_per_epoch(args: Any, loader: Any) -> int | None:
    try:
        steps: int = math.ceil(len(loader) / args.gradient_accumulation_steps)
        return max(steps, 1)
    except TypeError:  # it has no length
        return None


def _are_trainers(groups: list[dict[str, Any]], handler: CallbackHandler) -> bool:
    """Return True if the Trainer made the first two param groups: the second does not decay."""
    if len(groups) < 2 or groups[1].get("weight_decay"):
        return False
    trainer = next(each for each in _running_trainers() if each.callback_handler is handler)
    names = set(trainer.get_decay_parameter_names(handler.model))
    parts: tuple[set[Tensor], set[Tensor]] = set(), set()
    for name, p in handler.model.named_parameters():
        parts[name not in names].add(p)
    return all(part.issuperset(group["params"]) for part, group in zip(parts, groups))


def _metrics(decay: Decay) -> dict[str, float]:
    """Return the coefficients by name: one for all groups that decay alike, none for no-decay."""
    is_sequence = not decay.setup.config.keeps_no_decay_groups and decay.setup.config.wd is not None
    pairs = [
        (rule, wd)
        for rule, wd in zip(decay.layout.rules, decay.coefficients)
        if is_sequence or not decay.layout.states[rule.group].no_decay
    ]
    metrics = {}
    for rule, wd in pairs:
        same = [_treatment(*pair) for pair in pairs if pair[0].key == rule.key]
        are_alike = all(treatment == same[0] for treatment in same)
        group = "" if are_alike else f"/pg{rule.group + 1}"
        key = "" if rule.key is None else f"/{rule.key}"
        metrics[f"wd{group}{key}"] = wd
    return metrics


def _treatment(rule: Rule, coefficient: float) -> Any:
    wd = coefficient if rule.wd is None else rule.wd
    return wd, rule.scale_by, rule.max_lr if rule.uses_max_lr else None
