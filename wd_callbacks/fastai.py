"""Decoupled weight decay as a fastai callback."""

from __future__ import annotations

import math
import warnings
from collections import ChainMap
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch

from wd_callbacks import probe
from wd_callbacks.arguments import Arguments, Group
from wd_callbacks.decay import Decay
from wd_callbacks.description import Description
from wd_callbacks.schedules import Run
from wd_callbacks.selection import Selection
from wd_callbacks.torch import check_undecayed

try:
    import numpy as np
    from fastai.callback.core import Callback
    from fastai.callback.schedule import ParamScheduler
    from fastai.callback.training import GradientAccumulation
    from fastai.optimizer import OptimWrapper, l2_reg, weight_decay
    from fastai.torch_core import rank_distrib
    from scipy.optimize import minimize_scalar
except ImportError as error:
    raise ImportError(
        "wd_callbacks.fastai needs fastai: pip install 'wd_callbacks[fastai]'"
    ) from error


class DecoupledWD(Callback):  # type: ignore[misc]
    """Decay the weights by `lr*wd` right before their update, and step with a `wd` of 0.

    With it any optimizer decays as fastai's own do with `decouple_wd=True`, and parameters that
    fastai marks `do_wd=False` are left alone. A schedule's progress is that of the fit:
    `start_epoch` is where it starts. Each fit starts with nothing owed.

    Args:
        wd: The coefficient, at least 0: a number for every param group; a schedule, that is a
            callable from training progress (0.0 at the first step, towards 1.0) to a coefficient,
            such as `SchedCos(0.04, 0.4)`; a sequence of either, one per param group; None for each
            group's own `wd`, read afresh at every step, so that a `ParamScheduler` can set it. With
            a single number or schedule, a group whose own `wd` is 0 while another's is not does not
            decay.
        scale_by: How much of `wd` one step takes: `"lr"`: `lr*wd`. `"lr_ratio"`: `lr/lr_max*wd`.
            `"lr_squared"`: `lr**2/lr_max*wd`. `"none"`: `wd`. Or a callable from the param group to
            the number that replaces `lr`, or a sequence of these, one per group.
        max_lr: `lr_max` of the above, above 0, a number or one per group. None: the maximum of the
            fit's `lr` schedule, else the `lr` it starts with.
        exclude: Parameters that do not decay, an entry or several: `"bias"`, `"norm"`,
            `"embedding"`, `"marked"` (`p._no_weight_decay`, or named by the model's
            `no_weight_decay()`), a glob on the full parameter name, a module type or its dotted
            path, or a predicate `(name, parameter) -> bool`.
        quantum: Smallest shrink that is applied at once, in [0, 1); smaller ones are saved up until
            they come to this. None: 2**-20, for float16 2**-8, for bfloat16 2**-6. 0: every step.
        verbose: Whether `describe()` is printed when the fit starts to train, on rank zero.

    Raises:
        TypeError, ValueError: An argument makes no sense or, when the fit starts to train, does not
            fit the optimizer; at a step and before a weight has changed, where a coefficient is
            negative, NaN or infinite, or a shrink 1 or more.

    Example:
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
        max_lr: float | Sequence[float] | None = None,
        exclude: Any = (),
        quantum: float | None = None,
        verbose: bool = False,
    ) -> None:
        self.arguments = Arguments(
            wd, scale_by, max_lr=max_lr, exclude=exclude, quantum=quantum, verbose=verbose
        ).of_optimizer(0, [0])
        self._decay: Decay | None = None  # of the fit that is running, or of the last one
        self._fits = 0  # `validate` in the middle of a fit fires `before_fit` and `after_fit` too
        self._bound = False
        self._opt: Any = None  # the optimizer that `_decay` is of

    @property
    def coefficients(self) -> list[float]:
        """The coefficient of each param group at the last step."""
        return [] if self._decay is None else self._decay.coefficients

    def describe(self) -> Description:
        """A table of what the decay does to each param group; `print` shows it.

        The coefficients are those of the last step, before the first one those at progress 0.

        Raises:
            ValueError: No fit has started to train.
        """
        if self._decay is None:
            raise ValueError("there is nothing to describe before a fit has started to train")
        return self._decay.describe(_groups(self._opt))

    def before_fit(self) -> None:
        self._fits += 1

    def before_train(self) -> None:
        """Start afresh in the first epoch that trains, also after a fit that was interrupted."""
        self._n_iter = len(self.dl)
        starts = not self._bound or self._fits > 1
        if starts:
            self._fits, self._bound = 1, True
            self._position = self._done(0)
            self._used: list[float] = []
            self._batches = 0
        if starts or self.opt is not self._opt:
            self._opt = self.opt
            self._decay = self._new_decay()
        if starts and self.arguments.verbose and rank_distrib() == 0:
            print(self.describe())

    def before_step(self) -> None:
        """Have the optimizer decay when it steps, which another callback may still cancel."""
        if not self._bound:  # a fit within this one has ended
            self.before_train()
            self._position = self._done(self.iter)
        _Step.remove(self.opt)
        self.opt.step = _Step(self.opt, self._decayed_step)

    def after_step(self) -> None:
        """Note what part of the fit is done, also where the step was cancelled."""
        _Step.remove(self.opt)
        self._position = self._done(self.iter + 1)

    def after_batch(self) -> None:
        self._batches += 1

    def after_fit(self) -> None:
        """Let `recorder.plot_sched` draw `wd`, beside what this fit's schedulers have recorded."""
        self._fits -= 1
        if self._fits == 0 and self._bound:
            self._bound = False
            if hasattr(self.learn, "recorder"):
                self.recorder.hps = self._hps()

    def _done(self, batches: int) -> float:
        """What part of the fit is done after some batches of this epoch."""
        return float((self.epoch * self._n_iter + batches) / (self._n_iter * self.n_epoch))

    def _hps(self) -> dict[str, list[Any]]:
        scheds = [cb for cb in self.learn.cbs if isinstance(cb, ParamScheduler)]
        hps = {name: values for cb in scheds for name, values in getattr(cb, "hps", {}).items()}
        used = self._used + self._used[-1:] * (self._batches - len(self._used))
        return {**hps, "wd": used[: self._batches]}

    def _new_decay(self) -> Decay:
        if sum(isinstance(cb, DecoupledWD) for cb in self.learn.cbs) > 1:
            raise ValueError("this Learner has two DecoupledWD callbacks, which would decay twice")
        if isinstance(self.opt, OptimWrapper):
            check_undecayed(self.opt.opt)
            probe.check_weights(self.opt.opt)
            remarks = probe.remarks(self.opt.opt, self.arguments.follows_lr)
        else:
            remarks = _remarks(self.opt)
        for remark in remarks:
            warnings.warn(remark, stacklevel=2)
        self._selection = Selection(self.arguments.exclude, self.model)
        decay = Decay(self.arguments, run=self._run(), peaks=self._peaks(), decays=self._decays)
        decay.meet(_groups(self.opt))
        return decay

    def _run(self) -> Run:
        """How many steps the fit makes, with accumulation taken into account."""
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

    def _peaks(self) -> Any:
        """The maximum of the fit's `lr` schedule for each param group, if it has one."""
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
        peaks = sampled.max(axis=0)
        for group, top in enumerate(grid[sampled.argmax(axis=0)]):  # between the samples, its top
            around = max(top - 1e-3, 0), min(top + 1e-3, 1)
            found = minimize_scalar(lambda x, i=group: -lrs(x)[i], bounds=around, method="bounded")
            peaks[group] = max(peaks[group], -found.fun)
        return peaks.tolist()

    def _decays(self, p: torch.Tensor) -> bool:
        state = self._opt.state
        return self._selection(p) and bool(p not in state or state[p].get("do_wd", True))

    def _decayed_step(self, opt: Any, *args: Any, **kwargs: Any) -> Any:
        if self.learn is None or not self._bound:  # left behind by a fit that was interrupted
            return opt.step(*args, **kwargs)
        assert self._decay is not None
        groups = partial(_groups, opt)
        args, kwargs = self._decay.begin(groups, lambda: self._position, args, kwargs)
        try:
            return opt.step(*args, **kwargs)
        finally:
            self._decay.give_back()
            self._position = self._done(self.iter + 1)  # a callback may cancel our `after_step`
            # One value for each batch that has led to this step, as ParamScheduler records them.
            self._used += self._decay.coefficients[-1:] * (self._batches + 1 - len(self._used))

    def __getstate__(self) -> dict[str, Any]:
        """Exports and copies take the arguments along, not the fit."""
        own = {name: value for name, value in vars(self).items() if name in ("arguments", "learn")}
        return {**own, "_decay": None, "_fits": 0, "_bound": False, "_opt": None}


class _Step:
    """What stands in for `opt.step` for one call; copies of `opt` step without it."""

    def __init__(self, opt: Any, decayed: Callable[..., Any]) -> None:
        self.opt, self.decayed, self.replaced = opt, decayed, vars(opt).get("step")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.remove(self.opt)
        return self.decayed(self.opt, *args, **kwargs)

    def __reduce__(self) -> Any:
        return (
            (_Step, (self.opt, _undecayed)) if self.replaced is None else (_same, (self.replaced,))
        )

    @staticmethod
    def remove(opt: Any) -> None:
        """Give `opt` back the step that it had, its class's or one of its own."""
        step = vars(opt).get("step")
        if isinstance(step, _Step):
            del opt.step
            if step.replaced is not None:
                opt.step = step.replaced


def _undecayed(opt: Any, *args: Any, **kwargs: Any) -> Any:
    """The step of a copy."""
    return opt.step(*args, **kwargs)


def _same(step: Any) -> Any:
    """What a copy gets back of a step that was replaced."""
    return step


def _remarks(opt: Any) -> list[str]:
    """What a user should know of a fastai optimizer: which of its callbacks make more of `wd`."""
    cbs = [cb.func if isinstance(cb, partial) else cb for cb in opt.cbs]
    return [
        f"`{cb.__name__}` of this optimizer takes `wd` into its update, and here finds it 0"
        for cb in cbs
        if cb not in (weight_decay, l2_reg) and "wd" in signature(cb).parameters
    ]


def _groups(opt: Any) -> list[Group]:
    """The param groups of a fastai optimizer, or those of the torch optimizer that it wraps."""
    if isinstance(opt, OptimWrapper):
        return list(opt.opt.param_groups)
    return [ChainMap(h, {"params": params}) for h, params in zip(opt.hypers, opt.param_lists)]
