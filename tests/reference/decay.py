"""What every step takes from every weight and what is then owed, one parameter at a time.

Written from the promises and docs/theory.md: plain Python floats, which are float64, and no
multi-tensor calls, cohorts or caches. It holds no tensor, so that a deep copy is a checkpoint.

Where the promises leave a choice, it is made here:

- A call of ``step`` counts for the progress of a schedule once its gradients are final, however it
  ends: also if the update raises, or the decay is refused. One whose closure raises at its first
  evaluation does not count.
- A decay is not taken back when the update that it was made for raises.
- Whether a param group is a no-decay group, and its ``lr_max``, are told by what it holds when a
  step, or the loading of a state, first meets it.
- A decay that is attached anew starts with nothing owed, at progress 0.
- What is owed may exceed the quantum after that has become smaller (in a resumed run, or with
  another dtype), until the next step that decays the parameter.
- torch's fused updates compute in double precision, also with a learning rate that is a tensor.
- A run whose ``wd`` has one value per group, or is None, notes which groups a single number would
  spare, for one that resumes it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

QUANTA = {
    "float64": 2.0**-20,
    "float32": 2.0**-20,
    "float16": 2.0**-8,
    "bfloat16": 2.0**-6,
}


class RefusedError(Exception):
    """A shrink would be 1 or more, or a peak learning rate that it is divided by is 0."""


@dataclass
class Weight:
    """A parameter as one step sees it."""

    name: str
    dtype: str
    has_grad: bool


@dataclass
class Due:
    """What a step is to take from a parameter.

    Attributes:
        shrink: The part of the weight that is due; 0.0 where it does not decay.
        factor: ``1 - shrink``, in the arithmetic of the learning rate.
        at_once: Whether all of it is applied by this step.
        quantum: Less than this may be owed afterwards.
    """

    shrink: float
    factor: float
    at_once: bool
    quantum: float

    def as_log(self):
        """As -log of the factor, so that it adds up over steps."""
        return -math.log1p(-self.shrink)


@dataclass
class ReferenceDecay:
    """The arguments are those of ``DecoupledWD``, except that ``excluded`` is a set of names."""

    wd: Any
    scale_by: Any = "lr"
    max_lr: Any = None
    excluded: frozenset = frozenset()
    quantum: float | None = None
    total_steps: int | None = None
    steps: int = 0
    met: int = 0
    peaks: list = field(default_factory=list)
    spared: list = field(default_factory=list)
    coefficients: list = field(default_factory=list)

    def step(self, groups, weights, on_device=False):
        """What the step that is made now takes: a ``Due`` for each weight of each group.

        Args:
            groups: Dicts with what the user set: ``lr``, ``weight_decay`` if there is one, ...
            weights: A list of ``Weight`` for each of them.
            on_device: Whether only the device knows if the update will happen.

        Raises:
            RefusedError: Nothing is taken, groups that are new stay new, and the step is none.
        """
        trial = copy.deepcopy(self)
        rows = trial._rows(groups, weights, on_device)
        self.steps += 1
        self.met, self.peaks, self.spared = trial.met, trial.peaks, trial.spared
        self.coefficients = trial.coefficients
        return rows

    def _rows(self, groups, weights, on_device):
        progress = 0.0 if self.total_steps is None else min(self.steps / self.total_steps, 1.0)
        self._meet(groups)
        self.coefficients = [self._wd(i, group, progress) for i, group in enumerate(groups)]
        rows = []
        for index, (group, wd) in enumerate(zip(groups, self.coefficients)):
            shrink = self._scale(index, group) * wd if wd else 0.0
            factor = 1 - shrink
            if hasattr(shrink, "item"):
                shrink, factor = shrink.item(), factor.item()
            if shrink >= 1:
                raise RefusedError
            rows.append([self._due(w, shrink, factor, on_device) for w in weights[index]])
        return rows

    def loaded_from(self, saved, groups):
        """This one, going on from where ``saved`` was: its own arguments win."""
        fresh = copy.deepcopy(self)
        fresh.steps = saved.steps
        if saved.met:
            if self.max_lr is None and saved.max_lr is None:
                fresh.peaks = list(saved.peaks)
            fresh.spared = list(saved.spared)
            fresh._meet(groups)
        return fresh

    def _wd(self, index, group, progress):
        wd = _of_group(self.wd, index)
        if wd is None:
            return float(group["weight_decay"])
        if self.spared[index] and not isinstance(self.wd, list):
            return 0.0
        return float(wd(progress) if callable(wd) else wd)

    def _meet(self, groups):
        if self.met == len(groups):
            return
        self.peaks = [self._peak(index, group) for index, group in enumerate(groups)]
        own = [group.get("weight_decay", 0.0) for group in groups]
        for index in range(len(self.spared), len(groups)):
            self.spared.append(own[index] == 0 and any(own))
        self.met = len(groups)

    def _peak(self, index, group):
        known = self.peaks[index] if index < len(self.peaks) else None
        if self.max_lr is not None:
            known = _of_group(self.max_lr, index)
        elif known is None:
            known = float(next(group[k] for k in ("max_lr", "initial_lr", "lr") if k in group))
        if known == 0:
            if _of_group(self.scale_by, index) in ("lr_ratio", "lr_squared"):
                raise RefusedError
            return None
        return known

    def _scale(self, index, group):
        scale, lr, peak = _of_group(self.scale_by, index), group["lr"], self.peaks[index]
        if group.get("fused"):
            lr = float(lr)
        if callable(scale):
            return scale(group)
        return {
            "lr": lambda: lr,
            "lr_ratio": lambda: lr / peak,
            "lr_squared": lambda: lr * lr / peak,
            "none": lambda: 1.0,
        }[scale]()

    def _due(self, weight, shrink, factor, on_device):
        quantum = QUANTA[weight.dtype] if self.quantum is None else self.quantum
        if not weight.has_grad or weight.name in self.excluded:
            shrink, factor = 0.0, 1.0
        return Due(shrink, factor, on_device or shrink >= quantum, quantum)


def _of_group(value, index):
    return value[index] if isinstance(value, list) else value
