"""Decoupled weight decay as a fastai callback."""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections import ChainMap
from collections.abc import Callable
from inspect import signature
from types import FrameType
from typing import Any

from torch import Tensor

from wd_callbacks.core import table
from wd_callbacks.core.adapter import Adapter
from wd_callbacks.core.attach import attach
from wd_callbacks.core.config import Config
from wd_callbacks.core.decay import Decay, make_decay
from wd_callbacks.core.groups import Group
from wd_callbacks.core.layout import Setup
from wd_callbacks.core.selection import Selection
from wd_callbacks.core.step import Position, Step
from wd_callbacks.core.table import Description
from wd_callbacks.schedules import Run

try:
    import numpy as np
    from fastai.callback.core import Callback, CancelFitException
    from fastai.callback.schedule import LRFinder, ParamScheduler
    from fastai.callback.training import GradientAccumulation
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper, l2_reg, weight_decay
    from fastai.torch_core import rank_distrib
    from scipy.optimize import minimize_scalar
except ImportError as error:
    raise ImportError(
        "wd_callbacks.fastai needs fastai: pip install 'wd_callbacks[fastai]'"
    ) from error


class DecoupledWD(Adapter, Callback):  # type: ignore[misc]
    """Decays the weights by `lr*wd` right before their update, with any optimizer.

    Any optimizer then decays as fastai's own do with `decouple_wd=True`. Parameters that fastai
    marks `do_wd=False` do not decay. A schedule covers the whole fit; a fit with `start_epoch`
    continues it there. Each fit starts with nothing deferred.

    Args:
        wd: The coefficient, at least 0. A number, or a schedule: a callable from training progress
            (0.0 at the first step, towards 1.0) to a coefficient, such as `SchedCos(0.04, 0.4)`. Or
            a sequence of these, one per param group. Or a mapping from parameters to these, such as
            `{"1.*": 0.1, "*": 0.01}`; keys are entries as in `exclude`, and the first one that
            matches counts. None: each group's own `wd`, read at every step, so that a
            `ParamScheduler` can set it. If some groups have a `wd` of 0 and others do not, those
            with 0 do not decay, unless `wd` is a sequence.
        scale_by: The factor that multiplies `wd` in a step. `"lr"`: `lr`. `"lr_ratio"`:
            `lr/max_lr`. `"lr_squared"`: `lr**2/max_lr`. `"none"`: 1. Or a callable from the param
            group to a number, or a sequence of these, one per group.
        max_lr: The peak learning rate, above 0, a number or one per group. None: the maximum of the
            fit's `lr` schedule, else the `lr` it starts with.
        exclude: Parameters that do not decay, one entry or several: `"bias"`, `"norm"`,
            `"embedding"`, `"vector"` (fewer than two dimensions), `"marked"` (`p._no_weight_decay`,
            or named by a module's `no_weight_decay()`), a glob on the full parameter name, a module
            type or its dotted path, or a predicate `(name, parameter) -> bool`.
        anchor: The values that weights decay towards. None: zero. `"initial"`: each parameter's
            value right before its first update in the fit. Or a mapping from parameter name to
            tensor, such as a pretrained `state_dict()`; parameters that it does not name decay
            towards zero.
        cautious: If True, an element decays only if the update moves it towards the anchor as well
            (arXiv 2510.12402).
        quantum: Smallest shrink that is applied at once, in [0, 1); smaller ones are deferred and
            added up. None: `2**-20`, for float16 `2**-8`, for bfloat16 `2**-6`; with an anchor
            `2**-10`, `2**-5` and `2**-3`. 0: apply every step.
        verbose: If True, print `describe()` when the fit starts to train, on rank zero.

    Raises:
        TypeError, ValueError: An argument is invalid or, when the fit starts to train, does not fit
            the optimizer. A step raises, before a weight changes, if a coefficient is negative, NaN
            or infinite, or if a shrink is 1 or more. In `lr_find`, a shrink of 1 or more ends the
            search instead.

    Examples:
        >>> import torch
        >>> from fastai.data.core import DataLoaders
        >>> from fastai.learner import Learner
        >>> data = [(torch.ones(1), torch.ones(1))] * 4
        >>> dls = DataLoaders.from_dsets(data, data, bs=2, device="cpu")
        >>> learn = Learner(dls, torch.nn.Linear(1, 1), loss_func=torch.nn.functional.mse_loss)
        >>> with learn.no_logging(), learn.no_bar():
        ...     learn.fit_one_cycle(1, cbs=DecoupledWD(1e-4))
    """

    order, run_valid = ParamScheduler.order + 1, False

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
        if sys._getframe(1).f_code is Learner.add_cb.__code__:
            raise TypeError(
                "cbs has the class DecoupledWD, expected an instance: DecoupledWD(1e-4)"
            )
        self.config = Config(wd, scale_by, max_lr, exclude, anchor, cautious, quantum, verbose)
        if self.config.maps_optimizers:
            raise TypeError(
                f"wd maps optimizer indices, got {self.config!r}, but a Learner has one optimizer: "
                f"pass the wd of that one"
            )
        self._attached: Any = None  # in the fit that is running, or in the last one
        self._optimizer: Any = None  # held until the fit ends, also if it is replaced
        self._fits = 0  # `validate` in the middle of a fit fires `before_fit` and `after_fit` too
        self._is_fitting = False
        self._position = Position()

    @property
    def coefficients(self) -> list[float]:
        """The coefficient at the last step, one per row of `describe()`."""
        return [] if self._attached is None else self._attached.decay.coefficients

    def describe(self, parameters: bool = False) -> Description:
        """Return a table of what the decay does; `print` shows it.

        The coefficients are those of the last step; before the first one, those at progress 0.

        Args:
            parameters: If False, a row per param group (and key of `wd`). If True, a row per
                parameter: whether it decays and, if not, why.

        Raises:
            ValueError: No fit has started to train, or its optimizer is gone.
        """
        if self._attached is None:
            raise ValueError(
                "there is nothing to describe before a fit has started to train: call describe() "
                "later, or pass verbose=True"
            )
        description: Description = self._attached.describe(parameters=parameters)
        return description

    def before_fit(self) -> None:
        self._fits += 1

    def before_train(self) -> None:
        """Start afresh in the first epoch that trains, also after a fit that was interrupted."""
        self._check_learner()
        self._n_iter = len(self.dl)
        starts = not self._is_fitting or self._fits > 1
        if starts:
            self._fits, self._is_fitting = 1, True
            self._position.value, self._batches = self._done(0), 0
            self._used: dict[str, list[float]] = {}
        self._has_attempted, self._steps = False, 0
        if starts or not self._is_current():
            self._attach(goes_on=not starts)
        if starts and self.config.verbose and rank_distrib() == 0:
            print(self.describe())

    def before_batch(self) -> None:
        """Go on after a fit inside this one, or with an optimizer that replaced another."""
        if not self._is_fitting:
            self.before_train()
            self._position.value = self._done(self.iter)
        self.before_step()
        self._steps = self._attached.decay.steps

    def before_step(self) -> None:
        """Go on with an optimizer that has replaced another one."""
        if not self._is_current():
            self._attach(goes_on=True)

    def after_step(self) -> None:
        """Note an attempt to step, also one that was cancelled."""
        self._has_attempted = True

    def after_batch(self) -> None:
        """Note the progress of the fit, and the coefficients of each batch up to its step."""
        self._batches += 1
        decay = self._attached.decay
        has_stepped = decay.steps > self._steps
        if has_stepped or self._has_attempted:
            self._position.value, self._has_attempted = self._done(self.iter + 1), False
        if has_stepped:
            for name, coefficient in _named(decay).items():
                used = self._used.setdefault(name, [])
                used += [coefficient] * (self._batches - len(used))

    def after_fit(self) -> None:
        """Detach, and let `recorder.plot_sched` draw `wd` beside `lr`."""
        self._fits -= 1
        if self._fits == 0 and self._is_fitting:
            self._is_fitting = False
            self._attached.detach()
            self._optimizer = None
            if hasattr(self.learn, "recorder"):
                self.recorder.hps = self._hps()

    def _check_learner(self) -> None:
        """Raise ValueError if the events come from another Learner than the one it was given to."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "_with_events":
            frame = frame.f_back
        if frame is not None and frame.f_locals["self"] is not self.learn:
            raise ValueError(
                "this DecoupledWD was passed to another Learner since: build one per Learner"
            )

    def _done(self, batches: int) -> float:
        """Return the part of the fit that is done after some batches of this epoch."""
        return float((self.epoch * self._n_iter + batches) / (self._n_iter * self.n_epoch))

    def _hps(self) -> dict[str, list[Any]]:
        scheds = [cb for cb in self.learn.cbs if isinstance(cb, ParamScheduler)]
        hps = {name: values for cb in scheds for name, values in getattr(cb, "hps", {}).items()}
        for name, used in (self._used or {"wd": []}).items():
            hps[name] = (used + used[-1:] * (self._batches - len(used)))[: self._batches]
        return hps

    def _is_current(self) -> bool:
        attached = self._attached
        return attached is not None and attached.is_attached and attached.is_of(_inner(self.opt))

    def _attach(self, goes_on: bool) -> None:
        """Decay in the steps of the Learner's optimizer, whoever makes them."""
        if sum(isinstance(cb, DecoupledWD) for cb in self.learn.cbs) > 1:
            raise ValueError(
                "this Learner has two DecoupledWD, which would decay twice: merge them"
            )
        old = self._attached
        if old is not None:
            old.detach()
        scheds = [cb.scheds for cb in self.learn.cbs if isinstance(cb, ParamScheduler)]
        setup = Setup(
            self.config,
            Selection(self.config.exclude, self.config.keys, self.model),
            self._run(),
            max_lrs=self._max_lrs(),
            schedules_own_wd=any("wd" in each for each in scheds),
            may_decay=functools.partial(_does_wd, weakref.ref(self.opt)),
        )
        this = weakref.ref(self)
        make = attach if isinstance(self.opt, OptimWrapper) else _AttachedStep
        self._attached = make(
            _inner(self.opt),
            setup,
            self._position,
            on_divergence=functools.partial(_end_search, this),
            is_running=functools.partial(_is_fitting, this),
        )
        if old is not None and goes_on:
            self._attached.decay.inherit(old.decay)
        self._optimizer = _inner(self.opt)

    def _run(self) -> Run:
        """Return how many steps the fit makes, with accumulation taken into account."""
        batches = 1
        for cb in self.learn.cbs:
            if isinstance(cb, GradientAccumulation):
                dl = self.dls.train
                bs = getattr(dl, "bs", None) or getattr(dl, "batch_size", None)
                if bs is None:  # the data come in batches already, of which nothing is known
                    return Run()
                batches = math.ceil(cb.n_acc / bs)
        steps_per_epoch = self._n_iter / batches
        return Run(steps_per_epoch * self.n_epoch, steps_per_epoch)

    def _max_lrs(self) -> Any:
        """Return the maximum of the fit's `lr` schedule for each param group, if it has one."""
        scheds = [
            cb.scheds["lr"]
            for cb in self.learn.cbs.sorted("order")
            if isinstance(cb, ParamScheduler) and callable(cb.scheds.get("lr"))
        ]
        if not scheds:
            return []

        def lrs(progress: float) -> Any:
            return np.broadcast_to(scheds[-1](progress), len(self.opt.hypers)).astype(float)

        grid = np.linspace(0, 1, 1001)
        sampled = np.array([lrs(progress) for progress in grid])
        max_lrs = sampled.max(axis=0)
        for group, top in enumerate(grid[sampled.argmax(axis=0)]):  # between the samples, its top
            around = max(top - 1e-3, 0), min(top + 1e-3, 1)
            found = minimize_scalar(lambda x, i=group: -lrs(x)[i], bounds=around, method="bounded")
            max_lrs[group] = max(max_lrs[group], -found.fun)
        return max_lrs.tolist()

    def __getstate__(self) -> dict[str, Any]:
        """Exports and copies take the arguments along, not the fit."""
        own = {name: value for name, value in vars(self).items() if name in ("config", "learn")}
        run = {"_attached": None, "_optimizer": None, "_fits": 0, "_is_fitting": False}
        return {**own, **run, "_position": Position()}


class _AttachedStep:
    """A decay that stands in for `step` of a fastai optimizer, which has no hooks.

    It holds the optimizer weakly. A fit that is interrupted leaves it behind: outside of a fit it
    steps as `opt.step` did.
    """

    def __init__(
        self,
        opt: Any,
        setup: Setup,
        position: Position,
        on_divergence: Callable[[], bool],
        is_running: Callable[[], bool],
    ) -> None:
        self.remove(opt)
        groups = _groups(opt)
        for message in _compatibility(opt):
            setup.warn(message)
        self.decay = decay = make_decay(setup, groups)
        self._opt = opt_ref = weakref.ref(opt, lambda _: decay.release())
        self._step = Step(decay, lambda: _groups(opt_ref()), position, on_divergence=on_divergence)
        self._is_running = is_running
        self._replaced = vars(opt).get("step")
        self._inner: Any = opt.step
        opt.step = self

    @property
    def opt(self) -> Any:
        """The optimizer."""
        opt = self._opt()
        if opt is None:
            raise ValueError("the optimizer of this DecoupledWD is gone, and its decay with it")
        return opt

    @property
    def is_attached(self) -> bool:
        """Whether the optimizer's steps decay."""
        return self._inner is not None and self._opt() is not None

    def is_of(self, opt: Any) -> bool:
        """Return True if it is attached to `opt`."""
        return self._opt() is opt

    def describe(self, parameters: bool = False) -> Description:
        """Return a table of what the decay does."""
        make = table.describe_parameters if parameters else table.describe
        return make(self.decay, _groups(self.opt))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Decay, and step with a weight decay of 0."""
        if not self._is_running():
            return self._inner(*args, **kwargs)
        args, kwargs = self._step.before(args, kwargs)
        try:
            result = self._inner(*args, **kwargs)
        except BaseException:
            self._step.cancel()
            raise
        self._step.after()
        return result

    def detach(self) -> None:
        """Give the optimizer its own step back."""
        opt = self._opt()
        if opt is not None and vars(opt).get("step") is self:
            self.remove(opt)
            self.decay.check_max_lr()
        self._step.cancel()

    @staticmethod
    def remove(opt: Any) -> None:
        """Give `opt` back the step that it had, its class's or one of its own."""
        step = vars(opt).get("step")
        if isinstance(step, _AttachedStep):
            del opt.step
            if step._replaced is not None:
                opt.step = step._replaced
            step._inner = None

    def __reduce__(self) -> Any:
        """Copies of the optimizer step without decay."""
        if self._replaced is not None:
            return _same, (self._replaced,)
        return _PlainStep, (self._opt(),)


class _PlainStep:
    """The step of a copy: its class's."""

    def __init__(self, opt: Any) -> None:
        self._opt = opt

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        del self._opt.step
        return self._opt.step(*args, **kwargs)


def _same(step: Any) -> Any:
    return step


def _is_fitting(callback: Callable[[], Any]) -> bool:
    """Return True if a fit of the callback's Learner, None if it was removed, is running."""
    learn = getattr(callback(), "learn", None)
    frame: FrameType | None = sys._getframe(1) if learn is not None else None
    while frame is not None:
        if frame.f_code.co_name == "_with_events" and frame.f_locals.get("self") is learn:
            return True
        frame = frame.f_back
    return False


def _end_search(callback: Callable[[], Any]) -> bool:
    """End a search by `lr_find` that diverges; its callback restores the weights."""
    if any(isinstance(cb, LRFinder) for cb in callback().learn.cbs):
        raise CancelFitException
    return False


def _does_wd(opt: Callable[[], Any], p: Tensor) -> bool:
    """Return False for parameters that fastai marks `do_wd=False`."""
    state = opt().state
    return bool(p not in state or state[p].get("do_wd", True))


def _named(decay: Decay) -> dict[str, float]:
    """Return what the last step used, as `wd`, and as `wd/key` if a mapping has several keys."""
    pairs = list(zip(decay.layout.rules, decay.coefficients))
    decaying = [(rule, wd) for rule, wd in pairs if not rule.is_no_decay] or pairs
    keyed = {f"wd/{rule.key}": wd for rule, wd in decaying if rule.key is not None}
    return {"wd": decaying[-1][1], **keyed}


def _compatibility(opt: Any) -> list[str]:
    """Return what a user should know of a fastai optimizer when its `wd` is 0."""
    cbs = [cb.func if isinstance(cb, functools.partial) else cb for cb in opt.cbs]
    return [
        f"`{cb.__name__}` of this optimizer uses `wd` in its update, where DecoupledWD sets `wd` "
        f"to 0: to keep that use, leave DecoupledWD out and pass `wd` to the optimizer"
        for cb in cbs
        if cb not in (weight_decay, l2_reg) and "wd" in signature(cb).parameters
    ]


def _inner(opt: Any) -> Any:
    """Return the torch optimizer in an `OptimWrapper`; a fastai optimizer as it is."""
    return opt.opt if isinstance(opt, OptimWrapper) else opt


def _groups(opt: Any) -> list[Group]:
    """Return the hyperparameters and parameters of a fastai optimizer as param groups."""
    return [ChainMap(h, {"params": params}) for h, params in zip(opt.hypers, opt.param_lists)]
