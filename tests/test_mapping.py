"""A coefficient per parameter, by keys that select parameters in the model."""

from __future__ import annotations

import collections
import math
import re
import types

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
    keys = {"0.*": 0.05, "2.*": FADES, "*": 0.1} if not case.sparse else {"w*": FADES, "*": 0.1}
    optimizer = case.build(ours.parameters())
    DecoupledWD(optimizer, keys, model=ours, total_steps=STEPS)
    make_steps(case, ours, optimizer, range(STEPS))

    layers = [list(it.parameters()) for it in ([hand] if case.sparse else [hand[0], hand[2]])]
    groups = hand.parameters() if case.needs_closure else [{"params": it} for it in layers]

    def decay(step):
        for params, wd in zip(layers[::-1], (FADES(step / STEPS), 0.05)):
            for p in params:
                p.data.mul_(1 - 0.05 * wd)

    make_steps(case, hand, without_wd(case, groups), range(STEPS), before=decay)
    make_steps(case, none, without_wd(case, none.parameters()), range(STEPS))
    assert [same(ours, it) for it in models] == [True, True, False]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 2), nn.LayerNorm(2)
        self.linear.bias._no_weight_decay = True


def network():
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "block": Block(), "head": nn.Linear(2, 1)})
    for p in model.parameters():
        nn.init.ones_(p)
    return model


NAMES = [name for name, _ in network().named_parameters()]


def measured(model, wd, optimizer=None, steps=1, **options):
    """The coefficient of each parameter: by what a step without gradients shrinks it."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=LR)
    DecoupledWD(optimizer, wd, model=model, **options)
    zero_gradients(model)
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
    after = dict(model.named_parameters())
    return {n: round((1 - (after[n] / p).min().item()) / LR, 4) for n, p in before.items()}


BIASES = {"block.linear.bias", "block.norm.bias", "head.bias"}
LINEAR = {name for name in NAMES if "linear" in name or "head" in name}

KEYS = {
    "bias": BIASES,
    "norm": {"block.norm.weight", "block.norm.bias"},
    "embedding": {"embed.weight"},
    "marked": {"block.linear.bias"},
    "vector": {*BIASES, "block.norm.weight"},
    "torch.nn.Linear": LINEAR,
    nn.Linear: LINEAR,
    Block: {name for name in NAMES if name.startswith("block")},
    (lambda name, p: p.numel() == 6): {"embed.weight"},
}


@pytest.mark.parametrize("key", KEYS, ids=lambda it: getattr(it, "__name__", it).strip("<>"))
def test_keys_are_what_exclude_takes(key):  # P14
    found = measured(network(), {key: 0.2, "*": 0.4})
    assert found == {name: 0.2 if name in KEYS[key] else 0.4 for name in NAMES}


HEAD = {"head.weight": 0.2, "head.bias": 0.2}
OF_BIAS = dict.fromkeys(BIASES, 0.1)
RATIO, SQUARED = {"scale_by": "lr_ratio", "max_lr": 4.0}, {"scale_by": "lr_squared", "max_lr": 0.4}
RULES = {
    "the first match counts": ({"bias": 0.1, "head.*": 0.2}, {}, HEAD | OF_BIAS),
    "without a match": ({"head.*": 0.2, "bias": 0.1}, {}, OF_BIAS | HEAD),  # it does not decay
    "all match the first": ({"*": 0.3, "head.*": 0.1}, {}, dict.fromkeys(NAMES, 0.3)),
    "exclude comes first": ({"head.*": 0.2}, {"exclude": "bias"}, {"head.weight": 0.2}),
    "lr_ratio": ({"head.*": 0.8}, RATIO, HEAD),
    "lr_squared": ({"head.*": 0.8}, SQUARED, HEAD),
    "none": ({"head.*": 0.02}, {"scale_by": "none"}, HEAD),
    "callable": ({"head.*": 0.4}, {"scale_by": lambda group: group["lr"] / 2}, HEAD),
    "as OmegaConf's": (collections.UserDict({"head.*": torch.tensor(0.2)}), {}, HEAD),
    "read-only": (types.MappingProxyType({"head.*": 0.2}), {}, HEAD),
}


@pytest.mark.parametrize(("wd", "options", "expected"), RULES.values(), ids=RULES)
def test_which_coefficient_counts(wd, options, expected):  # P14
    found = measured(network(), wd, **options)
    assert found == {name: expected.get(name, 0) for name in NAMES}


def test_each_key_follows_its_own_schedule():  # P14
    wd = {"head.*": Linear(0.4, 0), "block.*": FADES, "*": lambda progress: progress}
    for step in range(4):
        found = measured(network(), wd, steps=step + 1, total_steps=4)
        expected = {"head.bias": 0.4 - 0.1 * step, "embed.weight": step / 4}
        expected["block.norm.bias"] = FADES(step / 4)
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_a_tied_parameter_has_the_first_key_of_any_of_its_names():  # P14
    model = network()
    model["out"] = nn.Linear(2, 3, bias=False)
    model["out"].weight = model["embed"].weight
    found, (message,) = caught(lambda: measured(model, {"out.*": 0.2, "embed.*": 0.4}))
    assert found["embed.weight"] == 0.2
    assert "tied" in message
    assert "embed.weight, out.weight" in message
    assert measured(model, {"*.weight": 0.3})["embed.weight"] == 0.3  # and no warning


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_add_no_prefix(wrap):  # P12
    wrapped = wrap(network())
    found = measured(wrapped, {"head.weight": 0.2, "*": 0.4})
    assert sorted(found.values()) == [0.2, *[0.4] * (len(NAMES) - 1)]


def test_types_of_one_name_are_told_apart():  # P14
    kinds = [type("Layer", (nn.Linear,), {}) for _ in range(2)]
    model = nn.Sequential(*(kind(1, 1, bias=False) for kind in kinds))
    found = measured(model, dict(zip(kinds, (0.1, 0.2))))
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
    found, messages = caught(lambda: measured(model, wd, grouped(model, own), steps=3))
    assert found == {name: expected if "head" in name else 0.2 for name in NAMES}
    assert [bool(re.search("key 'head.*no-decay", it)) for it in messages] == [True] * count


def second():
    def is_second(name, p):
        return name.startswith("1.")

    return is_second  # another function each time, as in another process


ORDERS = {  # of the keys in a saved run and in the next, and the number of warnings
    "same": ({second(): 0.5, "*": 1}, {second(): 0.5, "*": 1}, 0),
    "another": ({"*.weight": 0.5, "1.*": 1}, {"1.*": 1, "*.weight": 0.5}, 1),
}


@pytest.mark.parametrize(("old", "new", "count"), ORDERS.values(), ids=ORDERS)
def test_another_order_of_keys_warns(old, new, count):  # P9, P14
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizers = [torch.optim.SGD(model.parameters(), lr=LR) for _ in range(2)]
    saved, loads = (DecoupledWD(o, wd, model=model) for o, wd in zip(optimizers, (old, new)))
    _, messages = caught(lambda: loads.load_state_dict(saved.state_dict()))
    assert ["wd was {" in message for message in messages] == [True] * count


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


def test_parameters_without_a_name_or_a_key_do_not_decay():  # P14, P7
    model, extra = network(), parameter()
    optimizer = torch.optim.SGD([*model["head"].parameters(), extra], lr=LR)
    options = {"exclude": "vector", "model": model}
    decay, (message,) = caught(lambda: DecoupledWD(optimizer, {"head.*": 0.1}, **options))
    assert "does not name" in message
    zero_gradients(model)
    optimizer.step()
    assert (model["head"].weight[0, 0].item(), extra[0].item()) == (pytest.approx(0.99), 1)
    decay.detach()
    decay, _ = caught(lambda: DecoupledWD(optimizer, {"embed.*": 0.1}, model=model))
    assert any("nothing decays" in message for message in caught(optimizer.step)[1])


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


# What the user sees


def test_describe_has_a_row_per_group_and_key():  # P7
    model = network()
    wd = {"vector": 0, "head.*": Cosine(0.2, 0), "*": 0.1}
    decay = DecoupledWD(optimizer := grouped(model, 0.5), wd, model=model, total_steps=10)
    rows = decay.describe()
    counts = [(row.decaying.tensors, row.not_decaying.tensors) for row in rows]
    assert [(row.group, row.key, row.coefficient, *each) for row, each in zip(rows, counts)] == [
        *[("0", "vector", 0, 0, 3), ("0", "*", 0.1, 2, 0)],
        *[("1", "vector", 0, 0, 1), ("1", "head.*", 0.2, 1, 0)],
    ]
    assert "0.2 now, Cosine(start=0.2, end=0)" in str(rows)
    optimizer.step()
    assert decay.coefficients == [0, 0.1, 0, 0.2]


def test_describe_says_why_each_parameter_does_not_decay():  # P7, in its order
    model = network()
    model.requires_grad_(False)["block"].linear.requires_grad_(True)
    optimizer = grouped(model, 0)  # no key matches the head, either
    wd = {"block.norm.*": 0, "embed.*": 0.2, "block.linear.*": 0.1}
    decay = DecoupledWD(optimizer, wd, model=model, exclude=["block.norm.bias", "head.bias"])
    model["block"].linear.weight.grad = torch.zeros(2, 2)
    optimizer.step()
    rows = decay.describe(parameters=True)
    assert {row.name: row.reason for row in rows} == {
        "embed.weight": "frozen",
        "block.linear.weight": "decays",
        "block.linear.bias": "no gradient so far",
        "block.norm.weight": "coefficient 0",
        "block.norm.bias": "excluded by 'block.norm.bias'",
        "head.weight": "no-decay group",
        "head.bias": "excluded by 'head.bias'",
    }
    assert [row.name for row in rows if row.decays] == ["block.linear.weight"]
    decay.detach()
    rows = DecoupledWD(optimizer, {"embed.*": 1}, model=model).describe(parameters=True)
    assert {row.name: row.reason for row in rows}["block.norm.bias"] == "no key matches"


def attached(wd, steps=0, **options):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    decay = DecoupledWD(optimizer, wd, model=model, **options)
    zero_gradients(model)
    for _ in range(steps):
        optimizer.step()
    return model, optimizer, decay


def test_what_is_deferred_goes_on_with_other_keys():  # P14
    _, _first, decay = attached({"head.*": 0.05, "*": 0.02}, steps=1, quantum=0.01)
    saved = decay.state_dict()  # 0.005 and 0.002 are deferred
    model, optimizer, decay = attached({"embed.*": 0.09, "*": 0.06}, quantum=0.01)
    _, (message,) = caught(lambda: decay.load_state_dict(saved))
    assert re.search(r"wd was .*head.*embed", message)
    optimizer.step()
    assert model["head"].weight[0, 0].item() == pytest.approx((1 - 0.005) * (1 - 0.006))
    assert model["embed"].weight[0, 0].item() == pytest.approx((1 - 0.002) * (1 - 0.009))
    assert model["block"].norm.bias[0] == 1  # 0.002 and 0.006 are still deferred
    _, _second, same_keys = attached({"embed.*": 0.09, "*": 0.06}, quantum=0.01)
    same_keys.load_state_dict(decay.state_dict())  # no warning


def test_a_predicate_is_the_same_key_in_another_process():  # P9
    def small(steps):  # a new function each time
        return attached({lambda name, p: p.numel() < 3: 0.1, "*": 0.2}, steps)

    (_, _first, saved), (_, _second, decay) = small(3), small(0)
    decay.load_state_dict(saved.state_dict())  # no warning
    assert [row.due for row in decay.describe()] == [row.due for row in saved.describe()]


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
