"""A plain loop that may be killed at any time and goes on from the newest checkpoint that loads.

    python -m killed.plain_run VARIANT FOLDER [--kill BATCH] [--tear BATCH] [--pause SECONDS]

``FOLDER/end.pt`` is what it comes to. ``torch.save`` writes in place: a kill can leave half a file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from killed.kills import Fate, arguments, newest
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from wd_callbacks.schedules import Cosine, Linear
from wd_callbacks.torch import DecoupledWD

BATCHES, EVERY = 60, 4
VARIANTS = ("two optimizers", "bfloat16", "overflow")

INNER = {"weight_decay": 0.37}  # would show if it were used, or lost


class Net(nn.Module):
    """A small network with a branch that is used now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(0.1))
        self.branch = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
        x = self.trunk(x)
        return self.head(x + self.branch(x) if branch else x)


class Training:
    """All that a checkpoint has to bring back."""

    def __init__(self, variant: str) -> None:
        torch.manual_seed(0)
        self.variant = variant
        self.model = Net().to(torch.bfloat16 if variant == "bfloat16" else torch.float32)
        self.scaler = torch.amp.GradScaler("cpu", growth_interval=5, enabled=variant == "overflow")
        body = [*self.model.trunk.parameters(), *self.model.branch.parameters()]
        heads = [
            {"params": self.model.head[0].parameters()},
            {"params": self.model.head[2].parameters(), "lr": 0.02},
        ]
        both = [
            torch.optim.SGD(body, lr=0.05, momentum=0.9, **INNER),
            torch.optim.Adam(heads, lr=0.01, **INNER),
        ]
        self.optimizers = both
        self.lrs = [LinearLR(both[0], 0.1, total_iters=20), CosineAnnealingLR(both[1], BATCHES)]
        length = {"model": self.model, "total_steps": BATCHES}
        if variant == "bfloat16":  # against a quantum of 2^-6
            self.decays = [
                DecoupledWD(both[0], Cosine(0.06, 0.02), exclude="bias", **length),
                DecoupledWD(both[1], [0.4, Linear(0.1, 0.3)], **length),
            ]
        else:
            self.decays = [
                DecoupledWD(both[0], Cosine(0.04, 0.01), quantum=4e-3, **length),
                DecoupledWD(
                    both[1],
                    [Linear(1e-3, 0), 4e-4],
                    scale_by="lr_ratio",
                    quantum=3e-3,
                    exclude=["bias", "norm"],
                    **length,
                ),
            ]

    def parts(self) -> dict:
        """What has a state."""
        lists = {"optimizer": self.optimizers, "lr": self.lrs, "decay": self.decays}
        several = {
            f"{name}{i}": part for name, parts in lists.items() for i, part in enumerate(parts)
        }
        return {"model": self.model, "scaler": self.scaler, **several}

    def state(self, batch: int) -> dict:
        """The checkpoint, when ``batch`` is the next one."""
        states = {name: part.state_dict() for name, part in self.parts().items()}
        return {**states, "rng": torch.get_rng_state(), "batch": batch}

    def load(self, state: dict) -> int:
        """Takes up a checkpoint, and tells the batch to go on with."""
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        return state["batch"]

    def step(self, batch: int, fate: Fate) -> None:
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
            fate.middle()
        self.scaler.update()


def train(variant: str, folder: Path, fate: Fate) -> dict:
    """Trains from the newest checkpoint to the end, and gives the state it comes to."""
    torch.set_num_threads(1)
    training = Training(variant)
    path, state = newest(folder)
    start = 0 if path is None else training.load(state)
    for batch in range(start, BATCHES):
        fate.start(batch)
        training.step(batch, fate)
        if (batch + 1) % EVERY == 0:
            state, path = training.state(batch + 1), folder / f"batch={batch + 1}.ckpt"
            fate.save(state, path)
            torch.save(state, path)
    return training.state(BATCHES)


if __name__ == "__main__":
    given = arguments()
    fate = Fate(given.kill, given.tear, given.pause)
    torch.save(train(given.variant, given.folder, fate), given.folder / "end.pt")
