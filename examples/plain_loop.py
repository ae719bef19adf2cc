"""Adam with decoupled weight decay in a plain PyTorch loop, on scikit-learn's digits."""

import torch
from sklearn.datasets import load_digits

from wd_callbacks.torch import DecoupledWD

x, y = map(torch.tensor, load_digits(return_X_y=True))
x = x.float() / 16
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
decay = DecoupledWD(optimizer, 0.1)
# A schedule from 0.1 to 0 instead: DecoupledWD(optimizer, lambda t: 0.1 * (1 - t), total_steps=400)
for _ in range(400):
    batch = torch.randint(0, 1400, (64,))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()
print(f"accuracy {(model(x[1400:]).argmax(1) == y[1400:]).float().mean():.1%}")
