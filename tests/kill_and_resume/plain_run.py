"""A plain loop that may be killed at any time and goes on from the newest checkpoint that loads.

``torch.save`` writes in place: a kill can leave half a file.
"""

from __future__ import annotations

import torch
from kill_and_resume.kills import main, newest
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from wd_callbacks.schedules import Cosine, Linear
from wd_callbacks.torch import DecoupledWD

BATCHES, EVERY = 60, 4
VARIANTS = ("two optimizers", "anchors and keys", "bfloat16", "overflow")

OWN = {"weight_decay": 0.37}  # any use or loss of it changes the weights


class Net(nn.Module):
    """A small network with a branch that has a gradient now and then."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(0.1))
        self.branch = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x, branch):
        x = self.trunk(x)
        return self.head(x + self.branch(x) if branch else x)


class Training:
    """All that a checkpoint has to restore."""

    def __init__(self, variant):
        torch.manual_seed(0)
        self.variant = variant
        self.model = Net().to(torch.bfloat16 if variant == "bfloat16" else torch.float32)
        self.scaler = torch.amp.GradScaler("cpu", growth_interval=5, enabled=variant == "overflow")
        body = [*self.model.trunk.parameters(), *self.model.branch.parameters()]
        heads = [
            {"params": self.model.head[0].parameters()},
            {"params": self.model.head[2].parameters(), "lr": 0.02},
        ]
        sgd = torch.optim.SGD(body, lr=0.05, momentum=0.9, **OWN)
        adam = torch.optim.Adam(heads, lr=0.01, **OWN)
        self.optimizers = [sgd, adam]
        self.lrs = [LinearLR(sgd, 0.1, total_iters=20), CosineAnnealingLR(adam, BATCHES)]
        if variant == "bfloat16":  # with a quantum of 2^-6
            ours = [
                {"wd": Cosine(0.06, 0.02), "exclude": "bias"},
                {"wd": [0.4, Linear(0.1, 0.3)]},
            ]
        elif variant == "anchors and keys":
            keys = {"trunk.*": Cosine(0.06, 0.02), "*": 0.01}
            ours = [
                {"wd": keys, "anchor": "initial"},
                {"wd": {"*.bias": 0.1, "*": Linear(0.1, 0.3)}, "cautious": True},
            ]
        else:
            ratio = {"scale_by": "lr_ratio", "quantum": 3e-3, "exclude": ["bias", "norm"]}
            ours = [
                {"wd": Cosine(0.04, 0.01), "quantum": 4e-3},
                {"wd": [Linear(1e-3, 0), 4e-4], **ratio},
            ]
        self.decays = [
            DecoupledWD(optimizer, **arguments, model=self.model, total_steps=BATCHES)
            for optimizer, arguments in zip(self.optimizers, ours)
        ]

    def parts(self):
        """Everything that has a state, by name."""
        lists = {"optimizer": self.optimizers, "lr": self.lrs, "decay": self.decays}
        several = {
            f"{name}{i}": part for name, parts in lists.items() for i, part in enumerate(parts)
        }
        return {"model": self.model, "scaler": self.scaler, **several}

    def state(self, batch):
        """The checkpoint if ``batch`` is the next one."""
        states = {name: part.state_dict() for name, part in self.parts().items()}
        return {**states, "rng": torch.get_rng_state(), "batch": batch}

    def load(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])

    def step(self, batch, kill):
        """One batch; the second optimizer steps in every second one, for both."""
        x = torch.randn(4, 6).to(self.model.branch.weight)
        loss = self.model(x, branch=batch % 6 < 4).square().mean()
        if self.variant == "overflow" and batch % 7 == 5:
            loss = loss * torch.inf
        self.scaler.scale(loss).backward()
        for index, (optimizer, lr) in enumerate(zip(self.optimizers, self.lrs)):
            if (batch + 1) % (index + 1) == 0:
                self.scaler.step(optimizer)
                optimizer.zero_grad()
                lr.step()
            kill.middle()
        self.scaler.update()


def train(variant, folder, kill):
    """Trains from the newest checkpoint to the end and returns the final state."""
    torch.set_num_threads(1)
    training = Training(variant)
    path, state = newest(folder)
    if path is not None:
        training.load(state)
    for batch in range(state.get("batch", 0), BATCHES):
        kill.start(batch)
        training.step(batch, kill)
        if (batch + 1) % EVERY == 0:
            state, path = training.state(batch + 1), folder / f"batch={batch + 1}.ckpt"
            kill.save(state, path)
            torch.save(state, path)
    return training.state(BATCHES)


if __name__ == "__main__":
    main(train)
