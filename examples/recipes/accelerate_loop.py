"""Accelerate: a schedule, accumulation, and a decay that save_state and load_state include.

python examples/recipes/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from data import digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wd_callbacks.schedules import Cosine
from wd_callbacks.torch import DecoupledWD

EPOCHS, FOLDER = 6, "out/accelerate"


def train(first: int, last: int) -> nn.Module:
    """Train epochs ``first`` to ``last``, from the saved state unless ``first`` is 0, and save."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    x, y, x_test, y_test = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(x, y), batch_size=50)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = EPOCHS * len(loader) // 2  # optimizer steps
    decay = DecoupledWD(optimizer, Cosine(0.1, 0), model=model, exclude="bias", total_steps=steps)
    accelerator.register_for_checkpointing(decay)
    if first:
        accelerator.load_state(FOLDER)
    for _ in range(first, last):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    accelerator.save_state(FOLDER)
    accuracy = (model(x_test).argmax(1) == y_test).float().mean()
    print(f"epochs {first} to {last}: {decay.steps} of {steps} steps, accuracy {accuracy:.1%}")
    print(decay.describe())
    return model


whole, _, resumed = train(0, EPOCHS), train(0, EPOCHS // 2), train(EPOCHS // 2, EPOCHS)
gaps = [(p - q).abs().max() for p, q in zip(whole.parameters(), resumed.parameters())]
print(f"largest difference between the resumed run and the whole one: {max(gaps):g}")
