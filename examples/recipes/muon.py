"""Muon for the hidden matrices and Adam for the rest, each with its own decay.

python examples/recipes/muon.py  # needs torch >= 2.9
"""

import torch
from data import digits
from torch import nn

from wd_callbacks.schedules import Cosine
from wd_callbacks.torch import DecoupledWD

STEPS = 300

torch.manual_seed(0)
x, y, x_test, y_test = digits()
model = nn.Sequential(
    *(nn.Linear(64, 128), nn.ReLU()),
    *(nn.Linear(128, 128), nn.ReLU()),
    *(nn.Linear(128, 128), nn.ReLU()),
    nn.Linear(128, 10),
)
hidden = [model[2].weight, model[4].weight]
others = [p for p in model.parameters() if all(p is not q for q in hidden)]
optimizers = [
    torch.optim.Muon(hidden, lr=0.02, weight_decay=0.0),
    torch.optim.Adam(others, lr=3e-3),
]
decays = [
    DecoupledWD(optimizers[0], Cosine(0.1, 0), total_steps=STEPS),
    DecoupledWD(optimizers[1], 0.01, exclude="vector"),
]
for _ in range(STEPS):
    batch = torch.randint(len(x), (64,))
    loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()

for decay in decays:
    print(decay.describe())
print(f"loss {loss:.3f}, accuracy {(model(x_test).argmax(1) == y_test).float().mean():.1%}")
