"""A decay lives as long as its optimizer, and keeps nothing else alive."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref

import pytest
import torch
from fastai.optimizer import SGD as FastaiSGD
from fastai.optimizer import OptimWrapper
from helpers import network, one_weight, parameter, pickled, zero_gradients
from still import learner, quietly
from torch import nn

from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.schedules import Linear
from wd_callbacks.torch import DecoupledWD

ARGUMENTS = [
    {"wd": 1e-7},
    {"wd": Linear(0.1, 0), "total_steps": 9, "scale_by": "lr_ratio"},
    {"wd": {"*.weight": 0.1, "*": 0.2}, "exclude": "bias"},
    {"wd": 0.1, "anchor": "initial"},
    {"wd": 0.1, "cautious": True},
]


@pytest.fixture
def no_collector():
    """The first optimizer of a process stays in a cycle of torch's own frames."""
    one_weight()
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("is_held", [True, False])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_optimizer_and_model_die_without_the_collector(arguments, is_held):  # P11
    class Caller:
        """What the frame of a step that raises holds."""

    model, caller = network(), Caller()
    zero_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = DecoupledWD(optimizer, **arguments, model=model)
    optimizer.step()
    decay.describe()

    def closure(caller=caller):
        raise RuntimeError

    with contextlib.suppress(RuntimeError):
        optimizer.step(closure)
    optimizer.param_groups[0]["lr"] = 1e9
    with contextlib.suppress(ValueError):
        optimizer.step()
    held = (caller, optimizer, model, model[0].weight)
    references = [weakref.ref(each) for each in held]
    if not is_held:
        del decay
    del closure, caller, optimizer, model, held
    assert [reference() for reference in references] == [None] * 4
    if is_held:
        for method in (decay.describe, decay.state_dict):
            with pytest.raises(ValueError, match="gone"):
                method()
        decay.detach()
        assert not decay.is_attached


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "opt_func", [FastaiSGD, functools.partial(OptimWrapper, opt=torch.optim.SGD)]
)
def test_what_a_fit_has_attached_is_in_no_cycle(opt_func):  # P11
    callback = FastaiWD(0.1)
    quietly(learner(opt_func=opt_func), "fit", 1, 0.1, cbs=callback)
    reference = weakref.ref(callback._attached)
    callback._attached = None
    assert reference() is None


def test_a_decay_that_nobody_holds_acts():  # P11
    p, optimizer = one_weight()
    DecoupledWD(optimizer, 0.5)
    gc.collect()
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((2,), 0.95))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_holds_its_optimizer_and_goes_on(duplicate):  # P9, P11
    p, optimizer = one_weight()
    decay = DecoupledWD(optimizer, Linear(1, 0), total_steps=10)
    for _ in range(4):
        optimizer.step()
    copied = duplicate(decay)
    gc.collect()
    other = copied.optimizer.param_groups[0]["params"][0]
    other.grad = torch.zeros_like(other)
    optimizer.step()
    copied.optimizer.step()
    assert copied.steps == decay.steps == 5
    assert torch.equal(other, p)


def test_lbfgs_decays_before_a_gradient_is_there():  # P1
    p, frozen = parameter(), parameter()
    p.grad = frozen.grad = None
    frozen.requires_grad_(False)
    optimizer = torch.optim.LBFGS([p, frozen], lr=0.1)
    DecoupledWD(optimizer, 0.5)
    seen = []

    def closure():
        seen.extend([p[0].item(), frozen[0].item()])
        raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            optimizer.step(closure)
    assert seen == pytest.approx([0.95, 1, 0.9025, 1])


def test_modules_are_held_by_no_selection():  # P11
    model = nn.Linear(2, 2)
    zero_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = DecoupledWD(optimizer, 0.5, exclude="bias", model=model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert decay.describe(parameters=True)[0].name == "weight"
