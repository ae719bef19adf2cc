"""Every optimizer of torch.optim, in each implementation that it has, as one table."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

INNER_WD = 0.37


@dataclass(frozen=True)
class Case:
    cls: type[torch.optim.Optimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)
    needs_closure: bool = False
    sparse: bool = False
    matrices_only: bool = False

    @property
    def has_wd(self) -> bool:
        return "weight_decay" in inspect.signature(self.cls).parameters

    @property
    def id(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.kwargs.items() if k != "lr")
        return f"{self.cls.__name__}({options})"

    def build(self, params, **overrides) -> torch.optim.Optimizer:
        wd = {"weight_decay": INNER_WD} if self.has_wd else {}
        return self.cls(params, **{**self.kwargs, **wd, **overrides})

    def model(self, dtype=torch.float32) -> nn.Module:
        torch.manual_seed(0)
        if self.sparse:
            return nn.Embedding(6, 3, sparse=True).to(dtype)
        bias = not self.matrices_only
        layers = nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 2, bias=bias)
        return nn.Sequential(*layers).to(dtype)

    def loss(self, model, step):
        """A loss that depends on the step, so that gradients differ from step to step."""
        generator = torch.Generator().manual_seed(step)
        if self.sparse:
            return model(torch.randint(6, (4,), generator=generator)).square().sum()
        dtype = next(model.parameters()).dtype
        return model(torch.randn(9, 5, generator=generator).to(dtype)).square().mean()


SPECIAL = {
    "LBFGS": {"needs_closure": True},
    "SparseAdam": {"sparse": True},
    "Muon": {"matrices_only": True},
}


def _cases() -> list[Case]:
    classes = [
        cls
        for cls in vars(torch.optim).values()
        if inspect.isclass(cls)
        and issubclass(cls, torch.optim.Optimizer)
        and cls is not torch.optim.Optimizer
    ]
    cases = []
    for cls in classes:
        accepted = inspect.signature(cls).parameters
        kwargs: dict[str, Any] = {"lr": 0.05}
        special = SPECIAL.get(cls.__name__, {})
        options = [{o: True} for o in ("foreach", "fused") if o in accepted]
        if "foreach" in accepted:
            options.insert(0, {"foreach": False})
        cases += [Case(cls, {**kwargs, **option}, **special) for option in options or [{}]]
    momentum = {"lr": 0.05, "momentum": 0.9, "foreach": False}
    return [*cases, Case(torch.optim.SGD, momentum), Case(torch.optim.RMSprop, momentum)]


CASES = _cases()
every_optimizer = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
