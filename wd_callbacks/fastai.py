"""Decoupled weight decay as a fastai callback."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from wd_callbacks import probe
from wd_callbacks.arguments import Arguments, Group
from wd_callbacks.decay import Decay
from wd_callbacks.torch import check_undecayed

try:
    import numpy as np
    from fastai.callback.core import Callback
    from fastai.callback.schedule import ParamScheduler
    from fastai.optimizer import OptimWrapper
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
        quantum: Smallest shrink that is applied at once, in [0, 1); smaller ones are saved up until
            they come to this. None: 2**-20, for float16 2**-8, for bfloat16 2**-6. 0: every step.

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
        quantum: float | None = None,
    ) -> None:
        self.arguments = Arguments(wd, scale_by, max_lr, quantum).of_optimizer(0, [0])
        self._decay: Decay | None = None
        self._fits = 0  # `validate` in the middle of a fit fires `before_fit` and `after_fit` too

    @property
    def coefficients(self) -> list[float]:
        """The coefficient of each param group at the last step."""
        return [] if self._decay is None else self._decay.coefficients

    def before_fit(self) -> None:
        self._fits += 1

    def before_train(self) -> None:
        """Start afresh in the first epoch that trains, also after a fit that was interrupted."""
        self._epoch, self._n_iter = self.epoch, len(self.dl)
        if self._decay is None or self._fits > 1:
            self._fits, self._decay = 1, self._new_decay()
            self._done = self._epoch * self._n_iter

    def before_step(self) -> None:
        """Have the optimizer decay when it steps, which another callback may still cancel."""
        _Step.remove(self.opt)
        self.opt.step = _Step(self.opt, self._decayed_step)

    def after_step(self) -> None:
        """Note how many batches are done, also where the step was cancelled."""
        _Step.remove(self.opt)
        self._done = self._epoch * self._n_iter + self.iter + 1

    def after_fit(self) -> None:
        self._fits -= 1
        if self._fits == 0:
            self._decay = None

    def _new_decay(self) -> Decay:
        if sum(isinstance(cb, DecoupledWD) for cb in self.learn.cbs) > 1:
            raise ValueError("this Learner has two DecoupledWD callbacks, which would decay twice")
        if isinstance(self.opt, OptimWrapper):
            check_undecayed(self.opt.opt)
            probe.check_weights(self.opt.opt)
        decay = Decay(self.arguments, peaks=self._peaks(), decays=self._decays)
        decay.meet(_groups(self.opt))
        return decay

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
        return bool(self.opt.state[p].get("do_wd", True)) if p in self.opt.state else True

    def _decayed_step(self, opt: Any, *args: Any, **kwargs: Any) -> Any:
        if self.learn is None or self._decay is None:  # left behind by a fit that was interrupted
            return opt.step(*args, **kwargs)
        args, kwargs = self._decay.begin(partial(_groups, opt), self._progress, args, kwargs)
        try:
            return opt.step(*args, **kwargs)
        finally:
            self._decay.give_back()

    def _progress(self) -> float:
        return float(self._done / (self._n_iter * self.n_epoch))

    def __getstate__(self) -> dict[str, Any]:
        """Exports and copies take the arguments along, not the fit."""
        return {**vars(self), "_decay": None, "_fits": 0}


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


def _groups(opt: Any) -> list[Group]:
    """The param groups of a fastai optimizer, or those of the torch optimizer that it wraps."""
    if isinstance(opt, OptimWrapper):
        return list(opt.opt.param_groups)
    return [ChainMap(h, {"params": params}) for h, params in zip(opt.hypers, opt.param_lists)]
