"""How much each step decays each weight, and what it defers, one parameter at a time.

Written from the promises and docs/theory.md: plain Python floats, which are float64, and no
multi-tensor calls, buckets or caches. It holds no tensor, so that a deep copy is a checkpoint.

Where the promises leave a choice, it is made here:

- A call of ``step`` counts for the progress of a schedule once its gradients are final, also if the
  update raises. One whose closure raises at its first evaluation does not count, nor one that is
  refused.
- A decay is not taken back when the update that it was made for raises.
- Whether a param group is a no-decay group, and its ``max_lr``, follow from what it holds at the
  first step, or when a state is loaded.
- A decay that is attached anew starts with nothing deferred, at progress 0.
- The deferred decay may exceed the quantum after that has become smaller (in a resumed run, or with
  another dtype), until the next step that decays the parameter.
- torch's fused updates compute in double precision, also with a learning rate that is a tensor.
- A run whose ``wd`` has one value per group, or is None, notes which groups are no-decay groups,
  for a run with a single number that resumes it.
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
    """A shrink would be 1 or more, or a ``max_lr`` that it is divided by is 0."""


@dataclass
class Weight:
    """A parameter as one step sees it."""

    name: str
    dtype: str
    has_grad: bool


@dataclass
class Due:
    """The decay of a parameter that is due in one step.

    ``factor`` is ``1 - shrink``, in the arithmetic of the learning rate; 1 where it does not decay.
    Less than ``quantum`` may be deferred afterwards.
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
    """The arguments are those of ``DecoupledWD``, except that ``excluded`` is a set of names.

    With ``lrs_at_attaching``, a learning rate when it was attached counts as a guess of ``max_lr``
    if it is larger than at the first step.
    """

    wd: Any
    scale_by: Any = "lr"
    max_lr: Any = None
    excluded: frozenset = frozenset()
    quantum: float | None = None
    total_steps: int | None = None
    lrs_at_attaching: list | None = None
    steps: int = 0
    group_count: int = 0
    max_lrs: list = field(default_factory=list)
    no_decay: list = field(default_factory=list)
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
        new = copy.deepcopy(self)
        rows = new._rows(groups, weights, on_device)
        self.steps += 1
        self.group_count, self.max_lrs, self.no_decay = new.group_count, new.max_lrs, new.no_decay
        self.coefficients = new.coefficients
        return rows

    def _rows(self, groups, weights, on_device):
        progress = 0.0 if self.total_steps is None else min(self.steps / self.total_steps, 1.0)
        self._init_groups(groups)
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
        new = copy.deepcopy(self)
        new.steps = saved.steps
        if saved.group_count:
            if self.max_lr is None and saved.max_lr is None:
                new.max_lrs = list(saved.max_lrs)
            new.no_decay = list(saved.no_decay)
            new._init_groups(groups)
        return new

    def _wd(self, index, group, progress):
        wd = _of_group(self.wd, index)
        if wd is None:
            return float(group["weight_decay"])
        if self.no_decay[index] and not isinstance(self.wd, list):
            return 0.0
        return float(wd(progress) if callable(wd) else wd)

    def _init_groups(self, groups):
        if self.group_count == len(groups):
            return
        self.max_lrs = [self._max_lr(index, group) for index, group in enumerate(groups)]
        own = [group.get("weight_decay", 0.0) for group in groups]
        for index in range(len(self.no_decay), len(groups)):
            self.no_decay.append(own[index] == 0 and any(own))
        self.group_count = len(groups)

    def _max_lr(self, index, group):
        known = self.max_lrs[index] if index < len(self.max_lrs) else None
        if self.max_lr is not None:
            known = _of_group(self.max_lr, index)
        elif known is None:
            key = next(key for key in ("max_lr", "initial_lr", "lr") if key in group)
            known = float(group[key])
            if key == "lr" and index < len(self.lrs_at_attaching or []):
                known = max(known, self.lrs_at_attaching[index])
        if known == 0:
            if _of_group(self.scale_by, index) in ("lr_ratio", "lr_squared"):
                raise RefusedError
            return None
        return known

    def _scale(self, index, group):
        scale, lr, max_lr = _of_group(self.scale_by, index), group["lr"], self.max_lrs[index]
        if group.get("fused"):
            lr = float(lr)
        if callable(scale):
            return scale(group)
        return {
            "lr": lambda: lr,
            "lr_ratio": lambda: lr / max_lr,
            "lr_squared": lambda: lr * lr / max_lr,
            "none": lambda: 1.0,
        }[scale]()

    def _due(self, weight, shrink, factor, on_device):
        quantum = QUANTA[weight.dtype] if self.quantum is None else self.quantum
        if not weight.has_grad or weight.name in self.excluded:
            shrink, factor = 0.0, 1.0
        return Due(shrink, factor, on_device or shrink >= quantum, quantum)


def _of_group(value, index):
    return value[index] if isinstance(value, list) else value
