"""What the programs share: models, data that differ from process to process, and how to report.

    python -m processes.PROGRAM FOLDER

runs every scenario of a program in one of the processes, as the environment, which is torchrun's,
says, and leaves what they came to in ``FOLDER/rank0.pt`` and so on. The tests compare.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Adam, AdamW

LR, WD = 0.01, 0.1
IMPORTANT = 0.37  # the inner optimizer's own weight decay: would show if it were used, or lost
TIMEOUT = timedelta(seconds=30)  # of a collective, should one process fall out

SCENARIOS: dict[str, Callable[[], Any]] = {}


def scenario(function: Callable[[], Any]) -> Callable[[], Any]:
    """Registers what a program is to run, by its name."""
    SCENARIOS[function.__name__] = function
    return function


def rank() -> int:
    """Which of the processes this is."""
    return dist.get_rank()


def main() -> None:
    """Runs the scenarios, all or those named, and saves what each returned, or how it failed."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=UserWarning, module="wd_callbacks")
    warnings.filterwarnings("ignore", message=".*its decay begins here")
    dist.init_process_group("gloo", timeout=TIMEOUT)
    asides, number = dist.new_group(timeout=TIMEOUT), rank()
    ends: dict[str, Any] = {}
    for name in sys.argv[2:] or SCENARIOS:
        torch.manual_seed(0)
        try:
            ends[name] = SCENARIOS[name]()
        except Exception:
            ends[name] = traceback.format_exc()
        # Where one has failed alone the other waits for it, and for the wrong thing from then on.
        failures: list[Any] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(failures, isinstance(ends[name], str), group=asides)
        except RuntimeError:
            break
        if len(set(failures)) > 1:
            break
    torch.save(ends, Path(sys.argv[1]) / f"rank{number}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


class Net(nn.Module):
    """Weights, biases and a norm, and a branch that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh())
        self.branch = nn.Linear(5, 5)
        self.head = nn.Linear(5, 1)  # one row: with two processes one of them has no shard of it

    def forward(self, x: torch.Tensor, branch: bool = True) -> torch.Tensor:
        x = self.trunk(x)
        return self.head(x + self.branch(x) if branch else x)


def network() -> Net:
    """The same network, with the same weights, in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Net()


def batch_of(index: int, of: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets that depend on the position, and on the process."""
    generator = torch.Generator().manual_seed(2 * index + (rank() if of is None else of))
    return torch.randn(4, 6, generator=generator), torch.randn(4, 1, generator=generator)


def values(parameters: Any) -> list[torch.Tensor]:
    """Copies, whole where they are sharded."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    return [p.detach().clone() for p in whole]


def three_runs(train: Callable[..., Any]) -> dict[str, Any]:
    """With the decay, with AdamW, and with neither: ``train`` takes the class, its wd and which."""
    return {
        "ours": train(Adam, IMPORTANT, True),
        "adamw": train(AdamW, WD, False),
        "undecayed": train(AdamW, 0.0, False),
    }
