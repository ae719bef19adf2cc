"""Fine-tuning in fastai: weights decay towards their pretrained values (L2-SP), not towards 0.

python examples/recipes/fastai_finetune.py
"""

import copy

import fastai.callback.schedule  # noqa: F401 adds fine_tune
import torch
from data import digits
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from fastai.torch_core import params
from torch import nn

from wd_callbacks.fastai import DecoupledWD

x, y, x_test, y_test = digits()


def loaders(count: int, shift: int) -> DataLoaders:
    """Return batches of ``count`` images, shifted by ``shift`` pixels."""
    sets = (x[:count], y[:count]), (x_test, y_test)
    sets = [(a.view(-1, 8, 8).roll(shift, 2).flatten(1), b) for a, b in sets]
    return DataLoaders.from_dsets(*(list(zip(a, b)) for a, b in sets), bs=20, device="cpu")


def learner(model: nn.Module, dls: DataLoaders) -> Learner:
    """Return a Learner with two layer groups, body and head."""
    return Learner(
        dls,
        model,
        nn.CrossEntropyLoss(),
        opt_func=Adam,
        metrics=accuracy,
        splitter=lambda model: [params(model[0]), params(model[1])],
    )


torch.manual_seed(0)
body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
pretrained = nn.Sequential(body, nn.Linear(64, 10))
learner(pretrained, loaders(1400, shift=0)).fit_one_cycle(5, 1e-2)

results = {}
for anchor in (None, "initial"):
    torch.manual_seed(1)
    model = copy.deepcopy(pretrained)
    model[1].reset_parameters()  # a new head
    learn, decay = learner(model, loaders(100, shift=1)), DecoupledWD([10.0, 0.1], anchor=anchor)
    learn.fine_tune(8, 1e-2, lr_mult=10, cbs=decay)  # the body at a tenth of the head's lr
    print(decay.describe(parameters=True))
    moved = torch.dist(nn.utils.parameters_to_vector(model[0].parameters()),
                       nn.utils.parameters_to_vector(pretrained[0].parameters()))  # fmt: skip
    results[anchor] = f"accuracy {learn.validate()[1]:.1%}, the body moved by {moved:.2f}"
for anchor, result in results.items():
    print(f"anchor={anchor!r}: {result}")
