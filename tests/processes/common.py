"""What the scenarios share: models, and data that differ from process to process."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Adam, AdamW

LR, WD, INNER_WD = 0.01, 0.1, 0.37
TIMEOUT = timedelta(seconds=60)  # of a collective, if one process stops

SCENARIOS = {}
"""From a name to a function of the folder, which returns what the tests compare."""


def scenario(function):
    """Registers a scenario that takes no folder, by its name."""
    SCENARIOS[function.__name__] = lambda folder: function()
    return function


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
    generator = torch.Generator().manual_seed(2 * index + (dist.get_rank() if of is None else of))
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
