"""What the programs share: models, data that differ from process to process, and how to report.

    python -m processes.PROGRAM FOLDER

runs every scenario of a program in one process, with torchrun's environment variables, and saves
what each returned in ``FOLDER/rank0.pt`` and so on. The tests compare.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Adam, AdamW

LR, WD, INNER_WD = 0.01, 0.1, 0.37
TIMEOUT = timedelta(seconds=30)  # of a collective, if one process stops

SCENARIOS = {}


def scenario(function):
    """Registers a function for ``main``, by its name."""
    SCENARIOS[function.__name__] = function
    return function


def scenarios(**functions):
    """Registers several."""
    SCENARIOS.update(functions)


def rank():
    """Which of the processes this is."""
    return dist.get_rank()


def main():
    """Runs the scenarios, all or those named, and saves what each returned, or how it failed."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=UserWarning, module="wd_callbacks")
    warnings.filterwarnings("ignore", message=".*no state")
    dist.init_process_group("gloo", timeout=TIMEOUT)
    asides, number = dist.new_group(timeout=TIMEOUT), rank()
    ends = {}
    for name in sys.argv[2:] or SCENARIOS:
        torch.manual_seed(0)
        try:
            ends[name] = SCENARIOS[name]()
        except Exception:
            ends[name] = traceback.format_exc()
        # If one process failed alone, the other waits for it, and for the wrong thing from then on.
        failures = [None] * dist.get_world_size()
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

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh())
        self.branch = nn.Linear(5, 5)
        self.head = nn.Linear(5, 1)  # one row: with two processes one of them has no shard of it

    def forward(self, x, branch=True):
        x = self.trunk(x)
        return self.head(x + self.branch(x) if branch else x)


def network():
    """The same network, with the same weights, in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Net()


def batch_of(index, of=None):
    """Inputs and targets that depend on the position, and on the process."""
    generator = torch.Generator().manual_seed(2 * index + (rank() if of is None else of))
    return torch.randn(4, 6, generator=generator), torch.randn(4, 1, generator=generator)


def values(parameters):
    """Copies, whole where they are sharded."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    return [p.detach().clone() for p in whole]


def three_runs(train):
    """With the decay, with AdamW, and with neither: ``train`` takes the class, its wd and which."""
    return {
        "ours": train(Adam, INNER_WD, True),
        "adamw": train(AdamW, WD, False),
        "undecayed": train(AdamW, 0.0, False),
    }
