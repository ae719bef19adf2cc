"""Decay towards an anchor: the initial weights, or tensors given by name."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import ADAM, CASES, INNER_WD, caught, flat, same, weights, zero_gradients
from reference.steps import make_steps, without_wd
from torch import nn

from wd_callbacks.torch import DecoupledWD

STEPS, LR, WD = 6, 0.05, 0.5
EACH_CLASS = {case.cls: case for case in CASES}.values()
ONES = torch.ones(2)


def by_hand(named, anchors, shrink):
    for name, p in named:
        if p.requires_grad:
            anchor = anchors.get(name, torch.zeros_like(p))
            p.data.copy_(p.data - shrink * (p.data - anchor))


@pytest.mark.filterwarnings("ignore::wd_callbacks.core.warn.DecoupledWDWarning")  # lambd, sparse
@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, "mapping") for case in CASES] + [(case, "initial") for case in EACH_CLASS],
    ids=lambda it: getattr(it, "id", it),
)
def test_every_optimizer_equals_the_loop_by_hand(case, kind):  # P15, P1
    ours, hand, none = models = [case.model(torch.float64) for _ in range(3)]
    anchors = {name: torch.full_like(p, 0.5) for name, p in hand.named_parameters()}
    if len(anchors) > 1:  # the last one decays towards zero
        anchors.popitem()
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


def one(value=1.0, *, anchor, dtype=torch.float64, lr=0.1, wd=1.0, **options):
    """A module with the parameter ``weight`` and its optimizer; its gradient is zero."""
    model = nn.Module()
    value = value if isinstance(value, torch.Tensor) else torch.tensor([value] * 2)
    model.weight = nn.Parameter(value.to(dtype))
    zero_gradients(model)
    optimizer = torch.optim.SGD([model.weight], lr=lr, **options)
    return model, optimizer, DecoupledWD(optimizer, wd, anchor=anchor, model=model)


def values(model):
    return pytest.approx(model.weight.tolist())


def test_a_new_head_decays_towards_zero():  # P15
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    anchor = {"0.weight": torch.ones(2, 2), "other": torch.ones(3)}  # in another dtype, and more
    decay = DecoupledWD(optimizer, 1e-4, anchor=anchor, model=model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    zero_gradients(model)
    optimizer.step()
    for name, p in model.named_parameters():  # a shrink of 1e-5: above 2^-20, below 2^-10
        expected = before[name] if name == "0.weight" else before[name] * (1 - 1e-5)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=0)
    found = {row.name: row.anchor for row in decay.describe(parameters=True)}
    assert found == dict.fromkeys(before, "zero") | {"0.weight": "given"}


def test_a_state_dict_is_copied():  # P15
    model, optimizer, decay = one(2.0, anchor=None)
    decay.detach()
    DecoupledWD(optimizer, 1.0, anchor=model.state_dict(), model=model)
    model.weight.data.fill_(3)
    optimizer.step()
    assert values(model) == [2.9] * 2


PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]


@pytest.mark.parametrize("prefix", [*PREFIXES, "_fsdp_wrapped_module."])
def test_prefixes_of_wrappers_do_not_count(prefix):  # P12
    for wrap in (lambda it: it, nn.DataParallel):
        model, optimizer, decay = one(2.0, anchor=None)
        decay.detach()
        DecoupledWD(optimizer, 1.0, anchor={f"{prefix}weight": ONES}, model=wrap(model))
        optimizer.step()
        assert values(model) == [1.9] * 2


def test_a_wrapped_part_has_its_anchor():  # P12
    model = nn.ModuleDict({"body": nn.DataParallel(nn.Linear(2, 2)), "head": nn.Linear(2, 1)})
    anchors = model.state_dict()
    assert "body.module.weight" in anchors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = DecoupledWD(optimizer, 1.0, anchor=anchors, model=model)
    assert {row.anchor for row in decay.describe(parameters=True)} == {"given"}


@pytest.mark.parametrize("kind", ["initial", "mapping"])
def test_flattened_parameters_are_refused(kind):  # P15
    model = nn.Linear(2, 1)
    model.weight._fsdp_flattened = True  # as FSDP with use_orig_params=True marks them
    anchor = "initial" if kind == "initial" else model.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="FSDP has flattened them: use fully_shard"):
        DecoupledWD(optimizer, 1.0, anchor=anchor, model=model)


def test_tied_parameters_go_by_any_name():  # P15
    model, optimizer, decay = one(anchor=None)
    decay.detach()
    model.other = model.weight
    decay = DecoupledWD(optimizer, 1.0, anchor={"other": ONES}, model=model)
    assert decay.describe(parameters=True)[0].anchor == "given"


HOW = {
    "excluded": {"exclude": "1.weight"},
    "no key": {"wd": {"0.*": 0.1}},
    "a coefficient of 0": {"wd": {"1.*": 0, "*": 0.1}},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_only_what_decays_has_an_anchor(how):  # P15
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    model[2].requires_grad_(False)
    options = {"wd": 0.1, "anchor": "initial", "model": model, **how}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = DecoupledWD(optimizer, **options)
    model[0].weight.grad = model[1].weight.grad = torch.zeros(2, 2)
    optimizer.step()
    assert [it is not None for it in decay.state_dict()["anchors"][0]] == [True, False, False]
    wrong = {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(5)}  # as of another class count
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DecoupledWD(optimizer, **options | {"anchor": wrong})


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


SINGLE = [(distance, shrink) for distance in (1, 0.1, 0.01, 1e-3) for shrink in (1e-3, 1e-5)]
HALF = [(distance, shrink) for distance in (1, 0.15) for shrink in (1e-2, 1e-3)]
TABLE = [
    *[(torch.float64, 2**-10, *each) for each in ((1, 1e-3), (1e-3, 1e-5))],
    *[(torch.float32, 2**-10, *each) for each in (*SINGLE, (1e-3, 1e-7))],
    *[(torch.float16, 2**-5, *each) for each in HALF],
    *[(torch.bfloat16, 2**-3, *each) for each in HALF],
]


@pytest.mark.parametrize(("dtype", "quantum", "distance", "shrink"), TABLE, ids=str)
def test_what_is_applied_is_what_was_due(dtype, quantum, distance, shrink):  # P8
    generator = torch.Generator().manual_seed(0)
    anchor, spread = (torch.rand(4096, generator=generator) + low for low in (1, 0.5))
    given, value = {"weight": anchor.to(dtype)}, anchor * (1 + distance * spread)
    model, optimizer, decay = one(value, anchor=given, dtype=dtype, lr=1.0, wd=shrink)

    def mean():
        return (model.weight.detach().double() - given["weight"].double()).mean()

    before = mean()
    steps = min(int(max(3, 3.5 * quantum / shrink)), 12_000)
    for _ in range(steps):
        optimizer.step()
    log = decay.state_dict()["owed"][0][0]
    assert -math.expm1(-log) < quantum
    due = -steps * math.log1p(-shrink) - log
    assert -torch.log(mean() / before) == pytest.approx(due, rel=0.02)


def test_steps_that_only_the_device_knows_warn():  # P15, P1
    model, optimizer, _ = one(2.0, anchor={"weight": ONES}, fused=True)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(0.0)
    _, (message,) = caught(lambda: [optimizer.step() for _ in range(2)])
    assert "near their anchor move by less than is due" in message
    assert values(model) == [1.81] * 2
    optimizer.found_inf.fill_(1)
    optimizer.step()
    assert values(model) == [1.81] * 2


def test_complex_weights_move_towards_complex_anchors():  # P15
    dtype = torch.complex64
    model, optimizer, _ = one(3 + 4j, anchor={"weight": torch.full((2,), 1 + 2j)}, dtype=dtype)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.full((2,), 2.8 + 3.8j, dtype=dtype))


def test_sparse_gradients_decay_the_whole_tensor():  # P2
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    DecoupledWD(optimizer, 1.0, anchor={"weight": torch.ones(4, 2)}, model=model)
    expected = model.weight.detach() * 0.9 + 0.1
    model(torch.tensor([0])).sum().backward()
    _, (message,) = caught(optimizer.step)
    assert "sparse" in message
    torch.testing.assert_close(model.weight.detach()[1:], expected[1:])


def test_anchors_follow_the_dtype():  # P15
    model, optimizer, _ = one(2.0, anchor={"weight": ONES}, dtype=torch.float32)
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
    def start(*states):
        model = ADAM.model()
        optimizer = ADAM.build(model.parameters())
        parts = model, optimizer, DecoupledWD(optimizer, wd, anchor="initial")
        for part, state in zip(parts, states):
            part.load_state_dict(state)
        return parts

    def go_on(model, optimizer, decay):
        return caught(lambda: make_steps(ADAM, model, optimizer, range(5, 20)))[1], model

    parts = start()
    make_steps(ADAM, *parts[:2], range(5))
    torch.save([part.state_dict() for part in parts], tmp_path / "checkpoint.pt")
    copies = copy.deepcopy(parts)
    _, whole = go_on(*parts)
    assert same(go_on(*copies)[1], whole)
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    messages, resumed = go_on(*start(*states))
    assert messages == []
    assert same(resumed, whole)
    (message,), forgotten = go_on(*start(*states[:2]))  # that of the decay
    assert "call load_state_dict" in message
    assert not same(forgotten, whole)


def test_another_anchor_warns():  # P9
    _, first, old = one(anchor="initial")
    first.step()
    saved = old.state_dict()
    model, optimizer, decay = one(3.0, anchor={"weight": ONES})
    _, (message,) = caught(lambda: decay.load_state_dict(saved))
    assert message.startswith("anchor was initial in the saved run and is mapping")
    assert "anchors" not in decay.state_dict()  # a mapping is not saved
    optimizer.step()
    assert values(model) == [2.8] * 2


# Frameworks


def test_lightning(package, tmp_path):  # P9, P15
    from lightning_helpers import LR, adam, fit

    from wd_callbacks.lightning import DecoupledWD

    class Saves(package.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "at.ckpt")

    class ByHand(package.Callback):
        def on_train_start(self, trainer, module):
            self.anchors = {name: p.detach().clone() for name, p in module.named_parameters()}

        def on_before_optimizer_step(self, trainer, module, optimizer):
            by_hand(module.named_parameters(), self.anchors, LR * 1.0)

    def decay():
        return DecoupledWD(1.0, anchor="initial")

    whole = fit(package, adam, decay(), Saves())
    hand = fit(package, lambda module: adam(module, weight_decay=0), ByHand())
    torch.testing.assert_close(weights(whole), weights(hand), rtol=1e-4, atol=1e-6)
    assert same(fit(package, adam, decay(), resume=tmp_path / "at.ckpt"), whole)
    assert not same(fit(package, adam), whole)


OF_FASTAI = [("SGD", "mapping"), ("Adam", "initial"), ("Larc", "initial"), ("Lamb", "mapping")]


@pytest.mark.parametrize(("name", "kind"), [*OF_FASTAI, ("ranger", "initial")])
def test_fastai(name, kind):  # P15
    from fastai import optimizer
    from fastai_helpers import DecayByHand, learner

    from wd_callbacks.fastai import DecoupledWD

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def loss(pred, target):
        return nn.functional.mse_loss(pred, target).float()  # as fastai averages losses

    anchors = {name: p.detach() for name, p in network().named_parameters()}
    if kind == "mapping":
        anchors = {"0.weight": torch.full_like(anchors["0.weight"], 0.5)}

    class ByHand(DecayByHand):
        def before_step(self):
            named = [*self.model.named_parameters()]
            decaying = [(n, p) for n, p in named if self.opt.state[p].get("do_wd", True)]
            by_hand(decaying, anchors, self.opt.hypers[0]["lr"] * WD)

    def fitted(cb, wd):
        options = {"dtype": torch.float64, "loss_func": loss, "wd_bn_bias": False, "lr": 0.01}
        learn = learner(getattr(optimizer, name), model=network(), wd=wd, **options)
        learn.fit(2, cbs=cb)
        return weights(learn.model)

    decay = DecoupledWD(WD, anchor=anchors if kind == "mapping" else kind)
    ours, _ = caught(lambda: fitted(decay, INNER_WD))
    torch.testing.assert_close(ours, fitted(ByHand(), 0.0), rtol=1e-8, atol=1e-10)
    assert not torch.allclose(ours[0], fitted(None, 0.0)[0], rtol=1e-3)
