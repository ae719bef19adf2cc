"""Around a step: the decay, and the optimizer's own weight decay, which is 0 during the step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wd_callbacks.core.decay import Decay
from wd_callbacks.core.groups import WD_KEYS, Group
from wd_callbacks.core.rules import DivergenceError

_untraced = functools.cache(torch.compiler.disable)  # imports the compiler, so not here
_ZERO = float("0")  # recognized by identity, so that a 0.0 set by someone else is left alone


class Position:
    """The training progress of an optimizer's next step, as its adapter notes it."""

    def __init__(self) -> None:
        self.value: float | None = None  # None: not known yet

    def __call__(self, decay: Decay) -> float:
        """Return it, in [0, 1]."""
        return self.value or 0.0


class Step:
    """Decays right before an optimizer's update, and zeroes its own weight decay meanwhile.

    Args:
        decay: What decays.
        groups: Returns the optimizer's param groups.
        progress: Returns the training progress in [0, 1] of the step that is about to be made.
        decays_first: Whether a step with a closure decays before the first evaluation.
        on_divergence: Called if a shrink is 1 or more; True if that ends a search for a learning
            rate, so that nothing is raised.
    """

    def __init__(
        self,
        decay: Decay,
        groups: Callable[[], Sequence[Group]],
        progress: Callable[[Decay], float],
        decays_first: bool = False,
        on_divergence: Callable[[], bool] | None = None,
    ) -> None:
        self.decay = decay
        self.is_attached = True
        self._groups, self._progress, self._decays_first = groups, progress, decays_first
        self._on_divergence = on_divergence
        self._is_cautious = decay.setup.config.cautious
        self._zeroed: list[tuple[Group, str, Any]] = []
        self._awaits_closure = False

    def before(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], found_inf: Tensor | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Decay for the step that begins, and zero the optimizer's own weight decay.

        With a closure the gradients are there only after its first evaluation, and the decay
        follows that. During every evaluation the groups hold what the user set.

        Args:
            args: Positional arguments of ``optimizer.step``.
            kwargs: Keyword arguments of ``optimizer.step``.
            found_inf: 0-dim tensor, above 0 if the step will be skipped on the device.

        Returns:
            The arguments to step with: a closure is wrapped.
        """
        if self._zeroed or self._is_cautious:
            self.cancel()  # what a step that raised has left behind
        groups = self._groups()
        closure: Any = kwargs.get("closure", args[0] if args else None) if args or kwargs else None
        self._awaits_closure = callable(closure) and not self._decays_first
        if not self._awaits_closure:
            self._decay(groups, found_inf)
        if callable(closure):
            evaluate = self._wrapped(closure, found_inf)
            if "closure" in kwargs:
                kwargs = {**kwargs, "closure": evaluate}
            else:
                args = (evaluate, *args[1:])
        self.zero(groups)
        return args, kwargs

    def _decay(self, groups: Sequence[Group], found_inf: Tensor | None) -> None:
        progress = self._progress(self.decay)
        try:
            self.decay.decay_(groups, progress, found_inf, not self._decays_first)
        except DivergenceError:
            if self._on_divergence is None or not self._on_divergence():
                raise

    def _wrapped(self, closure: Callable[..., Any], found_inf: Tensor | None) -> Callable[..., Any]:
        """Return the closure, followed by the decay if it is the first evaluation of a step."""
        # The closure itself may be compiled.
        before, after = _untraced(Step.restore), _untraced(Step._after_closure)

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            before(self)
            result = closure(*args, **kwargs)
            if self.is_attached:
                after(self, found_inf)
            return result

        return evaluate

    def _after_closure(self, found_inf: Tensor | None) -> None:
        if self._awaits_closure:
            self._decay(self._groups(), found_inf)
            self._awaits_closure = False
        self.zero(self._groups())

    def after(self) -> None:
        """Restore the weight decay after the update, and warn of what went wrong."""
        if self._is_cautious:
            self.decay.finish_()
        if not self.restore():
            self.decay.warn(
                "a weight decay was set in a param group while the optimizer stepped, so it acts "
                "on top of DecoupledWD: set it before step"
            )
        if self._awaits_closure:
            self._awaits_closure = False
            self.decay.warn(
                "the optimizer did not evaluate the closure that was passed to step, so nothing "
                "decayed: evaluate it yourself, and call step without it"
            )

    def skip(self) -> None:
        """Zero the weight decay for a step that only sets up the optimizer's state."""
        self.cancel()
        self.zero(self._groups())

    def cancel(self) -> None:
        """Restore what a step that raised has left behind."""
        self.restore()
        self._awaits_closure = False
        self.decay.cancel()

    def zero(self, groups: Sequence[Group]) -> None:
        """Set the optimizer's own weight decay to 0 until ``restore``."""
        for group in groups:
            for key in WD_KEYS:
                if key in group:
                    self._zeroed.append((group, key, group[key]))
                    group[key] = _ZERO
                    break

    def restore(self) -> bool:
        """Restore what ``zero`` replaced; return False if something above 0 was set since."""
        is_as_zeroed = True
        for group, key, value in self._zeroed:
            if group[key] is _ZERO:
                group[key] = value
            elif group[key] != 0:
                is_as_zeroed = False
        self._zeroed.clear()
        return is_as_zeroed
