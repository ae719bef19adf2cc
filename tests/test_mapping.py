"""A coefficient per parameter, by keys that select parameters in the model."""

from __future__ import annotations

import math
import re
from collections import UserDict

import pytest
import torch
from helpers import INNER_WD, caught, every_optimizer, parameter, same, zero_gradients
from reference.steps import make_steps, without_wd
from torch import nn

from wd_callbacks.schedules import Cosine, Linear
from wd_callbacks.torch import DecoupledWD

STEPS, LR = 6, 0.1
FADES = Cosine(0.1, 0)


@pytest.mark.filterwarnings("ignore::wd_callbacks.core.warn.DecoupledWDWarning")  # lambd, sparse
@every_optimizer
def test_equals_param_groups_by_hand(case):  # P14
    ours, hand, none = models = [case.model() for _ in range(3)]
    optimizer = case.build(ours.parameters())
    keys = {"*weight": FADES, "*": 0.05}
    DecoupledWD(optimizer, keys, model=ours, total_steps=STEPS)
    make_steps(case, ours, optimizer, range(STEPS))

    matrices = [p for p in hand.parameters() if p.ndim == 2]
    vectors = [p for p in hand.parameters() if p.ndim == 1]
    groups = [{"params": it} for it in (matrices, vectors) if it]
    by_hand = without_wd(case, hand.parameters() if case.needs_closure else groups)

    def decay(step):
        for params, wd in ((matrices, FADES(step / STEPS)), (vectors, 0.05)):
            for p in params:
                p.data.mul_(1 - 0.05 * wd)

    make_steps(case, hand, by_hand, range(STEPS), before=decay)
    make_steps(case, none, without_wd(case, none.parameters()), range(STEPS))
    assert [same(ours, it) for it in models] == [True, True, False]


def network():
    layers = {"embed": nn.Embedding(3, 2), "body": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}
    return nn.ModuleDict({**layers, "head": nn.Linear(2, 1)})


NAMES = [name for name, _ in network().named_parameters()]


def attached(wd, model=None, optimizer=None, **options):
    """A model of ones without gradients that decay, its optimizer, and the decay."""
    model = model or network()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=LR)
    decay = DecoupledWD(optimizer, wd, model=model, **options)
    for p in model.parameters():
        p.data.fill_(1)
    zero_gradients(model)
    return model, optimizer, decay


def measured(*args, **options):
    """The coefficient of each parameter: by what a step without gradients shrinks it."""
    model, optimizer, _ = attached(*args, **options)
    optimizer.step()
    return {name: round((1 - p.min().item()) / LR, 4) for name, p in model.named_parameters()}


def at(coefficient, word):
    """That coefficient, for each parameter that has the word in its name."""
    return {name: coefficient for name in NAMES if word in name}


RATIO = {"scale_by": "lr_ratio", "max_lr": 4.0}
HEAD, OF_BIAS = at(0.2, "head"), at(0.1, "bias")
RULES = {  # keys and coefficients, other arguments, the coefficients that decay
    "a word": ({"vector": 0.1}, {}, OF_BIAS | {"norm.weight": 0.1}),
    "a type": ({nn.Linear: 0.1}, {}, at(0.1, "body") | at(0.1, "head")),
    "a path": ({"torch.nn.LayerNorm": 0.1}, {}, at(0.1, "norm")),
    "a predicate": ({lambda name, p: p.numel() == 6: 0.1}, {}, at(0.1, "embed")),
    "the first match counts": ({"bias": 0.1, "head.*": 0.2}, {}, HEAD | OF_BIAS),
    "in another order": ({"head.*": 0.2, "bias": 0.1}, {}, OF_BIAS | HEAD),
    "all match the first": ({"*": 0.3, "head.*": 0.1}, {}, dict.fromkeys(NAMES, 0.3)),
    "exclude comes first": ({"head.*": 0.2}, {"exclude": "bias"}, {"head.weight": 0.2}),
    "a scale": ({"head.*": 0.8}, RATIO, HEAD),
    "as OmegaConf's": (UserDict({"head.*": torch.tensor(0.2)}), {}, HEAD),
}


@pytest.mark.parametrize(("wd", "options", "expected"), RULES.values(), ids=RULES)
def test_which_coefficient_counts(wd, options, expected):  # P14
    assert measured(wd, **options) == dict.fromkeys(NAMES, 0) | expected


def test_a_tied_parameter_has_the_first_key_of_any_of_its_names():  # P14
    model = network()
    model["out"] = nn.Linear(2, 3, bias=False)
    model["out"].weight = model["embed"].weight
    found, (message,) = caught(lambda: measured({"out.*": 0.2, "embed.*": 0.4}, model))
    assert found["embed.weight"] == 0.2
    assert "tied" in message
    assert "embed.weight, out.weight" in message
    assert measured({"*.weight": 0.3}, model)["embed.weight"] == 0.3  # and no warning
    excluded = measured({"out.*": 0.2, "*": 0.4}, model, exclude=["embed.*", "out.*"])
    assert excluded["embed.weight"] == 0  # and no warning


def test_types_of_one_name_are_told_apart():  # P14
    kinds = [type("Layer", (nn.Linear,), {}) for _ in range(2)]
    model = nn.Sequential(*(kind(1, 1, bias=False) for kind in kinds))
    found = measured(dict(zip(kinds, (0.1, 0.2))), model)
    assert found == {"0.weight": 0.1, "1.weight": 0.2}


def grouped(model, head_wd):
    head = list(model["head"].parameters())
    rest = [p for name, p in model.named_parameters() if "head" not in name]
    groups = [{"params": rest}, {"params": head, "weight_decay": head_wd}]
    return torch.optim.SGD(groups, lr=LR, weight_decay=INNER_WD)


GROUPS = {  # the weight decay of the head's group, keys, what the head gets, number of warnings
    "no decay": (0, {"*": 0.2}, 0, 0),
    "no effect": (0, {"head.*": 0.1, "*": 0.2}, 0, 1),
    "a decay": (0.5, {"head.*": 0.1, "*": 0.2}, 0.1, 0),
}


@pytest.mark.parametrize(("own", "wd", "expected", "count"), GROUPS.values(), ids=GROUPS)
def test_no_decay_groups_win(own, wd, expected, count):  # P14
    model = network()
    found, messages = caught(lambda: measured(wd, model, grouped(model, own)))
    assert found == dict.fromkeys(NAMES, 0.2) | at(expected, "head")
    assert [bool(re.search("key 'head.*no-decay", it)) for it in messages] == [True] * count


def test_a_key_that_another_optimizer_needs_has_an_effect():  # P14
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    spared = [
        {"params": [model[0].weight], "weight_decay": 0.1},
        {"params": [model[0].bias], "weight_decay": 0},
    ]
    for groups in (spared, model[1].parameters()):
        optimizer = torch.optim.SGD(groups, lr=LR)
        _, messages = caught(lambda o=optimizer: DecoupledWD(o, {"bias": 0.1, "*": 1}, model=model))
        assert messages == []


def test_parameters_without_a_name_or_a_key_do_not_decay():  # P7, P14
    model, extra = network(), parameter()
    optimizer = torch.optim.SGD([*model["head"].parameters(), extra], lr=LR)
    options = {"exclude": "vector", "model": model, "optimizer": optimizer}
    (*_, decay), (message,) = caught(lambda: attached({"head.*": 0.1}, **options))
    assert "does not name" in message
    optimizer.step()
    assert (model["head"].weight[0, 0].item(), extra[0].item()) == (pytest.approx(0.99), 1)
    decay.detach()
    _, messages = caught(lambda: measured({"embed.*": 0.1}, model, optimizer))
    assert any("nothing decays" in message for message in messages)


def test_vectors_need_no_name():  # P14
    for arguments, expected in (
        ({"wd": {"vector": 0.5}}, [1, 0.95]),
        ({"wd": 0.5, "exclude": "vector"}, [0.95, 1]),
    ):
        params = parameter(2, 2), parameter(2)
        optimizer = torch.optim.SGD(params, lr=LR)
        DecoupledWD(optimizer, **arguments)
        optimizer.step()
        assert [p.mean().item() for p in params] == pytest.approx(expected)


def test_describe_has_a_row_per_group_and_key():  # P7
    wd = {"vector": 0, "head.*": Cosine(0.2, 0), "*": 0.1}
    model = network()
    _, optimizer, decay = attached(wd, model, grouped(model, 0.5), total_steps=10)
    rows = decay.describe()
    assert [(row.group, row.key, row.coefficient, row.decaying.tensors) for row in rows] == [
        *[("0", "vector", 0, 0), ("0", "*", 0.1, 2)],
        *[("1", "vector", 0, 0), ("1", "head.*", 0.2, 1)],
    ]
    assert [row.not_decaying.tensors for row in rows] == [3, 0, 1, 0]
    assert "0.2 now, Cosine(start=0.2, end=0)" in str(rows)
    optimizer.step()
    assert decay.coefficients == [0, 0.1, 0, 0.2]


def test_describe_says_why_each_parameter_does_not_decay():  # P7, in its order
    model = network()
    model.requires_grad_(False)["body"].requires_grad_(True)
    optimizer = grouped(model, 0)  # no key matches the head, either
    wd = {"norm.*": 0, "embed.*": 0.2, "body.*": 0.1}
    decay = DecoupledWD(optimizer, wd, model=model, exclude=["norm.bias", "head.bias"])
    model["body"].weight.grad = torch.zeros(2, 2)
    optimizer.step()
    rows = decay.describe(parameters=True)
    assert {row.name: row.reason for row in rows} == {
        "embed.weight": "frozen",
        "body.weight": "decays",
        "body.bias": "no gradient so far",
        "norm.weight": "coefficient 0",
        "norm.bias": "excluded by 'norm.bias'",
        "head.weight": "no-decay group",
        "head.bias": "excluded by 'head.bias'",
    }
    assert [row.name for row in rows if row.decays] == ["body.weight"]
    decay.detach()
    rows = DecoupledWD(optimizer, {"embed.*": 1}, model=model).describe(parameters=True)
    assert {row.name: row.reason for row in rows}["norm.bias"] == "no key matches"


# A resumed run


def norm():
    def is_norm(name, p):
        return "norm" in name

    return is_norm  # another function each time, as in another process


ORDERS = {  # of the keys in a saved run and in the next, and the number of warnings
    "same": ({norm(): 0.5, "*": 1}, {norm(): 0.5, "*": 1}, 0),
    "another": ({"*.weight": 0.5, "head.*": 1}, {"head.*": 1, "*.weight": 0.5}, 1),
}


@pytest.mark.parametrize(("old", "new", "count"), ORDERS.values(), ids=ORDERS)
def test_another_order_of_keys_warns(old, new, count):  # P9, P14
    (_, first, saved), (_, _second, decay) = attached(old), attached(new)
    first.step()
    _, messages = caught(lambda: decay.load_state_dict(saved.state_dict()))
    assert ["wd was {" in message for message in messages] == [True] * count
    found, due = ({row.key: row.due for row in it.describe()} for it in (decay, saved))
    assert found == due


def test_what_is_deferred_goes_on_with_other_keys():  # P14
    _, first, saved = attached({"head.*": 0.05, "*": 0.02}, quantum=0.01)
    first.step()  # 0.005 and 0.002 are deferred
    model, optimizer, decay = attached({"embed.*": 0.09, "*": 0.06}, quantum=0.01)
    _, (message,) = caught(lambda: decay.load_state_dict(saved.state_dict()))
    assert re.search(r"wd was .*head.*embed", message)
    optimizer.step()
    assert model["head"].weight[0, 0].item() == pytest.approx((1 - 0.005) * (1 - 0.006))
    assert model["embed"].weight[0, 0].item() == pytest.approx((1 - 0.002) * (1 - 0.009))
    assert model["norm"].bias[0] == 1  # 0.002 and 0.006 are still deferred


# Frameworks


def test_lightning(package):  # P13, P14
    from lightning_helpers import adam, fit, notes_logger

    from wd_callbacks.lightning import DecoupledWD

    def by_hand(model):
        layers = zip((model.backbone, model.head), (2.0, 0.1))
        groups = [{"params": it.parameters(), "weight_decay": wd} for it, wd in layers]
        return torch.optim.AdamW(groups, lr=0.01)

    decay, logger = DecoupledWD({"head.*": 0.1, "*": Linear(2, 2)}), notes_logger(package)
    ours = fit(package, adam, decay, logger=logger, log_every_n_steps=1)
    assert same(ours, fit(package, by_hand))
    logged = [metrics for metrics, _ in logger.notes if "wd-Adam/head.*" in metrics]
    assert logged == [{"wd-Adam/head.*": 0.1, "wd-Adam/*": 2}] * 12
    assert decay.coefficients == {0: [0.1, 2]}


def test_fastai():  # P2, P7, P13, P14
    from fastai_helpers import learner, no_loss

    from wd_callbacks.fastai import DecoupledWD

    learn = learner(batches=4, loss_func=no_loss, wd_bn_bias=False, lr=LR)
    start = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    decay = DecoupledWD({"6.*": Linear(0.4, 0), "*": 0.2})
    learn.fit(1, cbs=decay)
    head = [0.4, 0.3, 0.2, 0.1]
    for name, p in learn.model.named_parameters():
        wds = head if name == "6.weight" else [0.2 * (name in ("0.weight", "3.weight"))] * 4
        factor = math.prod(1 - LR * wd for wd in wds)
        torch.testing.assert_close(p.detach(), start[name] * factor)
    assert learn.recorder.hps["wd/6.*"] == pytest.approx(head)
    assert learn.recorder.hps["wd/*"] == [0.2] * 4
    reasons = {row.name: row.reason for row in decay.describe(parameters=True)}
    assert (reasons["1.weight"], reasons["6.weight"]) == ("do_wd=False", "decays")
