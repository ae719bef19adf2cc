"""A plain loop that may be killed at any time and goes on from the newest checkpoint that loads.

``torch.save`` writes in place: a kill can leave half a file.
"""

from __future__ import annotations

import torch
from kill_and_resume.kills import newest
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from wd_callbacks.schedules import Cosine, Linear
from wd_callbacks.torch import DecoupledWD

BATCHES, EVERY = 48, 6

OWN = {"weight_decay": 0.37}  # any use or loss of it changes the weights


class Net(nn.Module):
    """A small network with a branch that has a gradient now and then."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(0.1))
        self.branch, self.neck, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x, branch):
        x = self.trunk(x)
        return self.head(torch.tanh(self.neck(x + self.branch(x) if branch else x)))


def build():
    """A model, and three optimizers with their schedulers, each with another kind of decay."""
    model = Net()
    body = [*model.trunk.parameters(), *model.branch.parameters()]
    weight, bias = model.neck.parameters()
    sgd = torch.optim.SGD(body, lr=0.05, momentum=0.9, **OWN)
    adam = torch.optim.Adam([{"params": [weight]}, {"params": [bias], "lr": 0.02}], lr=0.01, **OWN)
    adagrad = torch.optim.Adagrad(model.head.parameters(), lr=0.02, **OWN)
    lrs = [
        LinearLR(sgd, 0.1, total_iters=20),
        CosineAnnealingLR(adam, BATCHES),
        LinearLR(adagrad, 1.0, 0.5, total_iters=9),
    ]
    ratio = {"scale_by": "lr_ratio", "quantum": 3e-3, "exclude": "norm"}
    arguments = [
        {"wd": {"trunk.*": Cosine(0.06, 0.02), "*": 0.01}, "anchor": "initial"},
        {"wd": [Linear(1e-3, 0), 4e-4], **ratio},
        {"wd": {"*.bias": 0.1, "*": Linear(0.1, 0.3)}, "cautious": True},
    ]
    optimizers = [sgd, adam, adagrad]
    decays = [
        DecoupledWD(optimizer, **each, model=model, total_steps=BATCHES // every)
        for every, (optimizer, each) in enumerate(zip(optimizers, arguments), start=1)
    ]
    return model, optimizers, lrs, decays


def train(folder, kill):
    """Trains from the newest checkpoint to the end and returns the final state."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, optimizers, lrs, decays = build()
    parts = [model, *optimizers, *lrs, *decays]
    path, state = newest(folder)
    if path is not None:
        torch.set_rng_state(state["rng"])
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
    for batch in range(state.get("batch", 0), BATCHES):
        kill.batch = batch
        model(torch.randn(4, 6), branch=batch % 6 < 4).square().mean().backward()
        for every, (optimizer, lr) in enumerate(zip(optimizers, lrs), start=1):
            if (batch + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()
                lr.step()
            kill.middle()
        state = {"parts": [part.state_dict() for part in parts], "batch": batch + 1}
        state["rng"] = torch.get_rng_state()
        if (batch + 1) % EVERY == 0:
            path = folder / f"batch={batch + 1}.ckpt"
            kill.save(state, path)
            torch.save(state, path)
    return state
