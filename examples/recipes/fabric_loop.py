"""Lightning Fabric: the decay is saved and loaded with model and optimizer.

python examples/recipes/fabric_loop.py
"""

import torch
from data import digits
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wd_callbacks.schedules import Cosine
from wd_callbacks.torch import DecoupledWD

EPOCHS, PATH = 6, "out/fabric.ckpt"


def train(first: int, last: int) -> nn.Module:
    """Train epochs ``first`` to ``last``, from the checkpoint unless ``first`` is 0, and save."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0)
    x, y, x_test, y_test = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, y), batch_size=50))
    steps = EPOCHS * len(loader)
    decay = DecoupledWD(optimizer, Cosine(0.1, 0), model=model, exclude="bias", total_steps=steps)
    state = {"model": model, "optimizer": optimizer, "decay": decay}
    if first:
        fabric.load(PATH, state)
    for _ in range(first, last):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            fabric.backward(loss)
            optimizer.step()
    fabric.save(PATH, state)
    accuracy = (model(x_test).argmax(1) == y_test).float().mean()
    print(f"epochs {first} to {last}: {decay.steps} of {steps} steps, accuracy {accuracy:.1%}")
    print(decay.describe())
    return model


whole, _, resumed = train(0, EPOCHS), train(0, EPOCHS // 2), train(EPOCHS // 2, EPOCHS)
gaps = [(p - q).abs().max() for p, q in zip(whole.parameters(), resumed.parameters())]
print(f"largest difference between the resumed run and the whole one: {max(gaps):g}")
