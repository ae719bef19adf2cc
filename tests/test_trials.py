"""The steps of copies that attaching tries: they leave no trace, whatever an optimizer does."""

from __future__ import annotations

import functools
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from wd_callbacks.torch import DecoupledWD

WORLD = {}


class Own(torch.optim.Optimizer):
    """SGD that does something besides."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad + group["weight_decay"] * p, alpha=-group["lr"])
        self.besides()

    def besides(self):
        pass


class OfTheWorld(Own):
    def besides(self):
        for p in WORLD["model"].parameters():
            p.mul_(0.9)


class OfAWeakReference(Own):
    def besides(self):
        self.model().weight.data.mul_(0.9)


class OfAPartial(Own):
    def besides(self):
        self.clip()


class OfAnAverage(Own):
    def besides(self):
        WORLD["average"].update_parameters(WORLD["model"])


class OfGradients(Own):
    def besides(self):
        torch._foreach_mul_([WORLD["model"].weight], 0.9)


def attached(cls):
    """A model on whose optimizer a decay is attached, and what was said."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = cls(model.parameters())
    WORLD.update(model=model, average=AveragedModel(model))
    if cls is OfAWeakReference:
        optimizer.model = weakref.ref(model)
    if cls is OfAPartial:
        optimizer.clip = functools.partial(lambda: model.weight.data.mul_(0.9))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        DecoupledWD(optimizer, 0.1)
    return model, list(map(str, said))


@pytest.mark.parametrize(
    "cls", [OfTheWorld, OfAWeakReference, OfAPartial, OfAnAverage, OfGradients]
)
def test_the_real_weights_are_out_of_reach(cls):  # P10, P3
    model, said = attached(cls)
    torch.manual_seed(0)
    assert all(map(torch.equal, model.parameters(), nn.Linear(3, 3).parameters()))
    assert WORLD["average"].n_averaged == 0
    assert said == []


def test_what_is_printed_is_not_shown(capsys):
    class Prints(Own):
        def besides(self):
            print("a step")

    attached(Prints)
    assert capsys.readouterr().out == ""


def test_random_states_stay_and_noise_is_no_remark(monkeypatch):  # P3, P5
    class Noisy(Own):
        def besides(self):
            for p in self.param_groups[0]["params"]:
                noise = np.random.rand() + random.random() + torch.rand(()).item()
                p.add_(1e-3 * noise)

    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    states = torch.get_rng_state, random.getstate, lambda: np.random.get_state()[1].tolist()
    _, said = attached(Noisy)
    torch.manual_seed(0)
    nn.Linear(3, 3)
    before = [state() for state in states]
    DecoupledWD(Noisy([nn.Parameter(torch.ones(2))]), 0.1)
    for state, was in zip(states, before):
        assert str(state()) == str(was)
    assert seeded == [0, 0]  # those of this test
    assert said == []


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch cannot before 2.6")
def test_nothing_is_compiled_for_them():  # P11
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def update(p):
        return p.mul_(1.0)

    class Compiled(Own):
        def besides(self):
            update(self.param_groups[0]["params"][0])

    model, _ = attached(Compiled)
    assert compiled == []
    update(model.weight.data)
    assert len(compiled) == 1


@pytest.mark.parametrize("kinds", [1, 2])
def test_groups_are_tried_by_one_of_each_kind(kinds):  # P11
    class Counts(Own):
        most = 0

        def besides(self):
            Counts.most = max(Counts.most, len(self.param_groups))

    groups = [
        {
            "params": [nn.Parameter(torch.ones(2, 2))],
            "lr": torch.tensor(0.1 + i),
            "name": f"layer {i}",
            "depth": 1 + i,
            "nesterov": i % kinds == 1,
        }
        for i in range(40)
    ]
    DecoupledWD(Counts(groups), 0.01, scale_by="none")
    assert Counts.most == kinds
