"""timm's layer decay: a smaller lr in each layer further down, and its no-decay groups.

python examples/recipes/timm_layer_decay.py
"""

import timm
import torch
from data import digits
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler

from wd_callbacks.torch import DecoupledWD

EPOCHS, BATCH, LR = 20, 50, 3e-3

torch.manual_seed(0)
x, y, x_test, y_test = digits()
x, x_test = x.view(-1, 1, 8, 8), x_test.view(-1, 1, 8, 8)
model = timm.create_model(
    "vit_tiny_patch16_224",
    img_size=8,
    patch_size=2,
    in_chans=1,
    embed_dim=32,
    depth=2,
    num_heads=2,
    num_classes=10,
)
groups = param_groups_layer_decay(
    model, weight_decay=0.1, layer_decay=0.8, no_weight_decay_list=model.no_weight_decay()
)
for group in groups:  # NAdam ignores lr_scale; timm's scheduler applies it
    group["lr"] = LR * group["lr_scale"]
optimizer = torch.optim.NAdam(groups, lr=LR)
decay = DecoupledWD(optimizer, model=model)  # wd=None: each group's own, 0.1 or 0
steps = EPOCHS * len(x) // BATCH
scheduler = CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)

for step in range(steps):
    batch = torch.randint(len(x), (BATCH,))
    loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step_update(step + 1)

print(decay.describe())  # a timescale per layer, and a dash for groups that do not decay
with torch.no_grad():
    print(f"accuracy {(model.eval()(x_test).argmax(1) == y_test).float().mean():.1%}")
