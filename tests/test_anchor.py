"""Decay towards an anchor: the initial weights, or tensors given by name."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from adapters import batches, each_adapter, run
from helpers import ADAM, caught, every_optimizer, flat, same, weights, zero_gradients
from reference.steps import make_steps, without_wd
from torch import nn
from torch.nn.functional import mse_loss

from wd_callbacks.torch import DecoupledWD

STEPS, LR, WD = 6, 0.05, 0.5
ONES = torch.ones(2)


def by_hand(named, anchors, shrink):
    for name, p in named:
        if p.requires_grad:
            p.data.sub_(shrink * (p.data - anchors.get(name, 0.0)))


@pytest.mark.filterwarnings("ignore::wd_callbacks.core.warn.DecoupledWDWarning")  # lambd, sparse
@pytest.mark.parametrize("kind", ["mapping", "initial"])
@every_optimizer
def test_every_optimizer_equals_the_loop_by_hand(case, kind):  # P1, P2, P15
    ours, hand, none = models = [case.model(torch.float64) for _ in range(3)]
    anchors = {name: torch.full_like(p, 0.5) for name, p in hand.named_parameters()}
    optimizer = case.build(ours.parameters())
    DecoupledWD(optimizer, WD, anchor=anchors if kind == "mapping" else kind, model=ours)
    for p in (p for model in models for p in model.parameters()):
        p.data.add_(0.25)  # as weights that are loaded after attaching
    if kind == "initial":
        anchors = {name: p.detach().clone() for name, p in hand.named_parameters()}

    def decay(step):
        by_hand(hand.named_parameters(), anchors, LR * WD)

    make_steps(case, ours, optimizer, range(STEPS))
    make_steps(case, hand, without_wd(case, hand.parameters()), range(STEPS), before=decay)
    make_steps(case, none, without_wd(case, none.parameters()), range(STEPS))
    torch.testing.assert_close(weights(ours), weights(hand), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(flat(ours), flat(none))


def one(value=(2.0, 2.0), dtype=torch.float64, lr=0.1, **options):
    """A module with the parameter ``weight``, whose gradient is zero, and its optimizer."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.as_tensor(value, dtype=dtype))
    zero_gradients(model)
    return model, torch.optim.SGD([model.weight], lr=lr, **options)


def values(model):
    return pytest.approx(model.weight.tolist())


def test_a_new_head_decays_towards_zero():  # P15
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    anchor = {"0.weight": torch.ones(2, 2), "other": torch.ones(3)}  # in another dtype, and more
    decay = DecoupledWD(optimizer, 1e-4, anchor=anchor, model=model)
    expected = {name: p * (1 - 1e-5) for name, p in model.state_dict().items()}
    expected["0.weight"] = model[0].weight.detach().clone()  # a shrink below 2^-10 is deferred
    zero_gradients(model)
    optimizer.step()
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=1e-12, atol=0)
    found = {row.name: row.anchor for row in decay.describe(parameters=True)}
    assert found == dict.fromkeys(expected, "zero") | {"0.weight": "given"}


PREFIXES = ["", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module."]
WRAPPED = {
    "nothing": (lambda model: model, PREFIXES),
    "the model": (nn.DataParallel, PREFIXES),
    "a part": (lambda it: nn.ModuleDict({"part": nn.DataParallel(it)}), ["part.", "part.module."]),
}


@pytest.mark.parametrize(("wrap", "prefixes"), WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("name", ["weight", "tied"])
def test_any_name_counts_and_prefixes_of_wrappers_do_not(wrap, prefixes, name):  # P12, P15
    for prefix in prefixes:
        model, optimizer = one()
        model.tied = model.weight
        DecoupledWD(optimizer, 1.0, anchor={prefix + name: ONES}, model=wrap(model))
        optimizer.step()
        assert values(model) == [1.9] * 2


def test_a_state_dict_is_copied():  # P15
    model, optimizer = one()
    DecoupledWD(optimizer, 1.0, anchor=model.state_dict(), model=model)
    model.weight.data.fill_(3)
    optimizer.step()
    assert values(model) == [2.9] * 2


def test_flattened_parameters_are_refused():  # P12
    model, optimizer = one()
    model.weight._fsdp_flattened = True  # as FSDP with use_orig_params=True marks them
    for anchor in ("initial", model.state_dict()):
        with pytest.raises(ValueError, match="FSDP has flattened them: use fully_shard"):
            DecoupledWD(optimizer, 1.0, anchor=anchor, model=model)


SPARED = [{"wd": 0.1, "exclude": "1.weight"}, {"wd": {"0.*": 0.1}}, {"wd": {"1.*": 0, "*": 0.1}}]


@pytest.mark.parametrize("arguments", SPARED, ids=str)
def test_only_what_decays_has_an_anchor(arguments):  # P15
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = DecoupledWD(optimizer, **arguments, anchor="initial", model=model)
    model[0].weight.grad = model[1].weight.grad = torch.zeros(2, 2)
    optimizer.step()
    assert [it is not None for it in decay.state_dict()["anchors"][0]] == [True, False, False]
    decay.detach()
    wrong = {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(5)}  # as of another class count
    DecoupledWD(optimizer, **arguments, anchor=wrong, model=model)


@pytest.mark.parametrize("count", [2, 12])  # few and many calls
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_keys_of_a_mapping_have_anchors_too(count, dtype):  # P14, P15
    model = nn.ParameterList([torch.full((2,), 2.0, dtype=dtype) for _ in range(count)])
    zero_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    wd = {str(i): (i + 1) / 16 for i in range(count)}
    anchor = {str(i): i * ONES for i in range(0, count, 2)}
    DecoupledWD(optimizer, wd, anchor=anchor, model=model, quantum=0)
    optimizer.step()
    expected = [2 - (i + 1) / 16 * (2 if i % 2 else 2 - i) for i in range(count)]
    assert [p[0].item() for p in model] == pytest.approx(expected, rel=2**-8)


FAITHFUL = [  # dtype, quantum, distance relative to the weight, shrink
    (torch.float64, 2**-10, 1e-3, 1e-5),
    *[(torch.float32, 2**-10, *each) for each in ((1, 1e-5), (1e-3, 1e-3), (1e-3, 1e-5))],
    *[(torch.float16, 2**-5, 0.15, shrink) for shrink in (1e-2, 1e-3)],
    *[(torch.bfloat16, 2**-3, 0.15, shrink) for shrink in (1e-2, 1e-3)],
]


@pytest.mark.parametrize(("dtype", "quantum", "distance", "shrink"), FAITHFUL, ids=str)
def test_what_is_applied_is_what_was_due(dtype, quantum, distance, shrink):  # P8
    anchor, spread = torch.rand(4096) + 1, torch.rand(4096) + 0.5
    given = {"weight": anchor.to(dtype)}
    model, optimizer = one(anchor * (1 + distance * spread), dtype, lr=1.0)
    decay = DecoupledWD(optimizer, shrink, anchor=given, model=model)

    def mean():
        return (model.weight.double() - given["weight"].double()).mean().item()

    before, steps = mean(), max(3, int(3.5 * quantum / shrink))
    for _ in range(steps):
        optimizer.step()
    log = decay.state_dict()["owed"][0][0]
    assert -math.expm1(-log) < quantum
    due = -steps * math.log1p(-shrink) - log
    assert -math.log(mean() / before) == pytest.approx(due, rel=0.02)


def test_steps_that_only_the_device_knows_warn():  # P1, P15
    model, optimizer = one(fused=True)
    DecoupledWD(optimizer, 1.0, anchor={"weight": ONES}, model=model)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(0.0)
    _, (message,) = caught(lambda: [optimizer.step() for _ in range(2)])
    assert "near their anchor move by less than is due" in message
    assert values(model) == [1.81] * 2
    optimizer.found_inf.fill_(1)
    optimizer.step()
    assert values(model) == [1.81] * 2


def test_complex_weights_move_towards_complex_anchors():  # P15
    model, optimizer = one((3 + 4j, 4j), torch.complex64)
    anchor = {"weight": torch.tensor([1 + 2j, 2j])}
    DecoupledWD(optimizer, 1.0, anchor=anchor, model=model)
    optimizer.step()
    assert values(model) == [2.8 + 3.8j, 3.8j]


def test_anchors_follow_the_dtype():  # P15
    model, optimizer = one(dtype=torch.float32)
    DecoupledWD(optimizer, 1.0, anchor={"weight": ONES}, model=model)
    optimizer.step()
    model.double()
    zero_gradients(model)
    optimizer.step()
    assert model.weight.dtype is torch.float64
    assert values(model) == [1.81] * 2


def test_initial_is_each_parameters_own_first_update():  # P15
    model = nn.ParameterList([torch.ones(2, dtype=torch.float64) for _ in range(2)])
    zero_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DecoupledWD(optimizer, 1.0, anchor="initial")
    model[1].grad = None
    for value in (2.0, 3.0, 4.0):
        model[0].data.fill_(value)
        model[1].data.fill_(value)
        optimizer.step()
        if value == 3:
            model[1].grad = torch.zeros(2, dtype=torch.float64)
    assert model[0].tolist() == pytest.approx([4 - 0.2] * 2)  # since 2.0
    assert model[1].tolist() == [4.0] * 2  # since this step


@pytest.mark.parametrize("wd", [0.3, 0.003])  # at once, and deferred
def test_a_resumed_loop_ends_with_the_same_bits(wd, tmp_path):  # P9
    def train(first, last, states=()):
        model = ADAM.model()
        optimizer = ADAM.build(model.parameters())
        parts = model, optimizer, DecoupledWD(optimizer, wd, anchor="initial")
        for part, state in zip(parts, states):
            part.load_state_dict(state)
        _, messages = caught(lambda: make_steps(ADAM, model, optimizer, range(first, last)))
        torch.save([part.state_dict() for part in parts], tmp_path / "checkpoint.pt")
        return model, messages

    whole, _ = train(0, 20)
    train(0, 5)
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed, messages = train(5, 20, states)
    assert messages == []
    assert same(resumed, whole)
    forgotten, (message,) = train(5, 20, states[:2])  # without that of the decay
    assert "call load_state_dict" in message
    assert not same(forgotten, whole)


def test_another_anchor_warns():  # P9
    _, first = one()
    old = DecoupledWD(first, 1.0, anchor="initial")
    first.step()
    model, optimizer = one((3.0, 3.0))
    decay = DecoupledWD(optimizer, 1.0, anchor={"weight": ONES}, model=model)
    _, (message,) = caught(lambda: decay.load_state_dict(old.state_dict()))
    assert message.startswith("anchor was initial in the saved run and is mapping")
    assert "anchors" not in decay.state_dict()  # a mapping is not saved
    optimizer.step()
    assert values(model) == [2.8] * 2


# Frameworks


@pytest.mark.parametrize("kind", ["mapping", "initial"])
@each_adapter
def test_every_adapter_equals_the_loop_by_hand(adapter, kind):  # P15
    start = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    ours, hand, none = (copy.deepcopy(start) for _ in range(3))
    anchors = {name: p.detach() for name, p in start.named_parameters()}
    if kind == "mapping":  # in Lightning the module of the user has a name
        anchors = {name: torch.full((4, 3), 0.5) for name in ("0.weight", "net.0.weight")}
    run(adapter, {"wd": WD, "anchor": anchors if kind == "mapping" else kind}, ours, lr=LR)
    for model, wd in ((hand, WD), (none, 0.0)):
        for x, y in batches():
            model.zero_grad()
            mse_loss(model(x), y).backward()
            by_hand(model.named_parameters(), anchors, LR * wd)
            for p in model.parameters():
                p.data.sub_(LR * p.grad)
    torch.testing.assert_close(weights(ours), weights(hand), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(flat(ours), flat(none), rtol=1e-3)


def test_lightning_resumed_equals_uninterrupted(package, tmp_path):  # P9
    from lightning_helpers import adam, fit

    from wd_callbacks.lightning import DecoupledWD

    anchored = {"wd": 1.0, "anchor": "initial"}
    options = {"every_n_train_steps": 5, "save_top_k": -1}
    saves = package.callbacks.ModelCheckpoint(tmp_path, "{step}", **options)
    whole = fit(package, adam, DecoupledWD(**anchored), saves, enable_checkpointing=True)
    resumed = fit(package, adam, DecoupledWD(**anchored), resume=tmp_path / "step=5.ckpt")
    assert same(resumed, whole)
    assert not same(fit(package, adam), whole)
