"""What the scenarios share: a model, and data that differ from process to process."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

try:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
except ImportError:  # before torch 2.6, where they run on GPUs alone
    from torch.distributed._composable.fsdp import fully_shard
    from torch.distributed._tensor import DTensor

__all__ = ["DTensor", "fully_shard"]
TIMEOUT = timedelta(seconds=60)  # of a collective, if one process stops

SCENARIOS = {}
"""From a name to a function that returns what the tests compare."""


def scenario(function):
    SCENARIOS[function.__name__] = function
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


def whole(model):
    """Copies of the weights, whole where they are sharded by FSDP2."""
    params = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().clone() for p in params]
