"""What attaching says of an optimizer, and of which it says nothing."""

import warnings

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Adam as FastaiAdam
from fastai.optimizer import Larc, OptimWrapper
from optimizers import CASES
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from wd_callbacks.fastai import DecoupledWD as FastaiDecoupledWD
from wd_callbacks.torch import DecoupledWD


def said(optimizer, **arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DecoupledWD(optimizer, 0.1, **arguments).detach()
    return [str(warning.message) for warning in caught]


def weights():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_of_torch_s_optimizers_only_asgd_decays_by_itself(case):  # P5
    remarks = said(case.build(case.model().parameters()))
    if case.cls is torch.optim.ASGD:
        (remark,) = remarks
        assert "also where the weight decay of its param groups is 0" in remark
    else:
        assert remarks == []


class Own(Optimizer):
    """SGD whose own weight decay is what a subclass makes of it."""

    def __init__(self, params, lr=0.1, **defaults):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, **defaults})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(self.update(p, group, group["weight_decay"]), alpha=-group["lr"])

    def update(self, p, group, wd):
        return p.grad + wd * p


class SwitchedRatio(Own):
    """LARS as timm has it: no trust ratio where there is no weight decay."""

    def update(self, p, group, wd):
        ratio = p.norm() / (p.grad.norm() + wd * p.norm()) if wd else 1.0
        return ratio * (p.grad + wd * p)


class Cautious(Own):
    """Decays only the weights that the update makes smaller."""

    def update(self, p, group, wd):
        return p.grad + wd * p * (p * p.grad > 0)


class SparesVectors(Own):
    """Decoupled, of matrices alone."""

    def update(self, p, group, wd):
        return p.grad.sign() + (wd * p if p.ndim > 1 else 0)


class Thrice(Own):
    """Decoupled, with a rate that is not lr."""

    def update(self, p, group, wd):
        return p.grad.sign() + 3 * wd * p


class Always(Own):
    """Decays whatever the group says."""

    def update(self, p, group, wd):
        return p.grad + 0.05 * p


class AlwaysVectors(Own):
    """Decays vectors by a key of their own, as pytorch_optimizer's MARS."""

    def update(self, p, group, wd):
        return p.grad + (wd if p.ndim > 1 else 0.05) * p


class Relative(Own):
    """Adafactor with relative steps: whatever the group says."""

    def update(self, p, group, wd):
        return p.grad * 0.01 / group["lr"]


class Learned(Own):
    """A learned factor of the rate, as in Prodigy and D-Adaptation."""

    def __init__(self, params):
        super().__init__(params, d=1e-6, betas=(0.9, 0.999))

    def update(self, p, group, wd):
        return group["d"] * (p.grad + wd * p)


REMARKS = {
    SwitchedRatio: "leaves a part of its update out where its own weight decay is 0",
    Cautious: "own weight decay is neither L2 nor decoupled",
    SparesVectors: "own weight decay is neither L2 nor decoupled on all weights",
    Thrice: "own weight decay takes 2.99 times lr * wd",
    Always: "decays its weights also where the weight decay of its param groups is 0",
    AlwaysVectors: "decays its weights also where the weight decay of its param groups is 0",
    Relative: "makes the same update at any learning rate",
    Learned: "learns a factor 'd' of its learning rate",
}


@pytest.mark.parametrize("cls", REMARKS, ids=lambda cls: cls.__name__)
def test_what_a_user_should_know_is_said_once(cls):  # P5
    params = weights()
    before = [p.detach().clone() for p in params]
    random_state = torch.get_rng_state()
    optimizer = cls([{"params": [p]} for p in params])
    remark, *others = said(optimizer)
    assert len(others) == (cls is AlwaysVectors)  # of which its own weight decay tells more
    assert remark.startswith(cls.__name__)
    assert REMARKS[cls] in remark
    assert all(map(torch.equal, before, params))
    assert not optimizer.state
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize("cls", [Thrice, Relative, Learned], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("scale_by", ["none", lambda group: 0.1], ids=["none", "callable"])
def test_the_rate_is_no_matter_where_the_decay_does_not_follow_it(cls, scale_by):  # P5
    assert said(cls(weights()), scale_by=scale_by) == []


@pytest.mark.parametrize("scale_by", ["lr_ratio", "lr_squared", ["none", "lr"]])
def test_the_rate_matters_where_any_group_follows_it(scale_by):  # P5
    groups = [{"params": [p]} for p in weights()]
    (remark,) = said(Relative(groups), scale_by=scale_by)
    assert "at any learning rate" in remark


def test_an_own_decay_that_is_l2_or_decoupled_is_no_remark():  # P5
    assert said(Own(weights())) == []
    assert said(torch.optim.AdamW(weights(), weight_decay=0.3)) == []


def test_an_optimizer_that_cannot_be_tried_is_not_remarked_on():  # P5
    class Stateful(Own):
        def update(self, p, group, wd):
            raise RuntimeError("only real weights, please")

    assert said(Stateful(weights())) == []


def test_many_groups_are_tried_by_one_of_their_kind():  # P5, P11
    class Counting(Cautious):
        seen = 0

        def update(self, p, group, wd):
            Counting.seen += 1
            return super().update(p, group, wd)

    def groups(count):
        return [{"params": [nn.Parameter(torch.ones(2, 2))], "lr": 0.1} for _ in range(count)]

    (remark,) = said(Counting(groups(1)))
    once, Counting.seen = Counting.seen, 0
    assert said(Counting(groups(50))) == [remark]
    assert Counting.seen == once > 0


def fit(opt_func):
    data = [(torch.ones(2), torch.ones(1))] * 4
    dls = DataLoaders.from_dsets(data, data, bs=2, device="cpu")
    learn = Learner(dls, nn.Linear(2, 1), nn.functional.mse_loss, opt_func=opt_func)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=FastaiDecoupledWD(0.1))


def test_fastai_s_larc_loses_its_trust_ratio_s_wd():  # P4, P5
    with pytest.warns(UserWarning, match="`larc_layer_lr` of this optimizer takes `wd`"):
        fit(Larc)


@pytest.mark.parametrize("opt_func", [FastaiAdam, lambda ps, **kw: OptimWrapper(ps, Adam, lr=0.1)])
def test_fastai_s_adam_is_no_remark(opt_func):  # P5
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(opt_func)


def test_a_wrapped_optimizer_is_remarked_on_in_fastai_too():  # P5
    with pytest.warns(UserWarning, match="Relative makes the same update"):
        fit(lambda ps, **kw: OptimWrapper(ps, Relative, lr=0.1))


def test_sgd_inside_a_schedule_is_no_remark():  # P5
    optimizer = SGD(weights(), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert said(optimizer) == []


def test_nothing_is_said_of_an_optimizer_that_maximizes():  # P5
    assert said(torch.optim.SGD(weights(), lr=0.1, momentum=0.9, maximize=True)) == []
