"""Decoupled weight decay in fastai, on scikit-learn's digits."""

import fastai.callback.schedule  # noqa: F401 adds fit_one_cycle
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from sklearn.datasets import load_digits
from torch import nn

from wd_callbacks.fastai import DecoupledWD

x, y = map(torch.tensor, load_digits(return_X_y=True))
digits = list(zip(x.float() / 16, y))
dls = DataLoaders.from_dsets(digits[:1400], digits[1400:], bs=64)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
learn = Learner(dls, model, nn.CrossEntropyLoss(), opt_func=Adam, metrics=accuracy)

# On a schedule instead: DecoupledWD(SchedCos(0.1, 0.0)), with fastai.callback.schedule's SchedCos
learn.fit_one_cycle(8, 1e-2, cbs=DecoupledWD(0.1))

print(f"accuracy {learn.validate()[1]:.1%}")
