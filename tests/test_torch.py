"""The plain adapter against hand-written loops, over every optimizer of torch.optim."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from optimizers import CASES, INNER_WD, every_optimizer
from reference.loops import decay_by_hand
from torch import nn

from wd_callbacks.torch import DecoupledWD

WD, STEPS = 0.2, 12


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(case, closure=False, attach=None, by_hand=None, dtype=torch.float32, **overrides):
    """Trains a small model; returns its weights and the optimizer."""
    model = case.model(dtype)
    optimizer = case.build(model.parameters(), **overrides)
    decay = attach(optimizer) if attach else None
    for step in range(STEPS):
        due = [True]

        def evaluate(step=step, due=due):
            optimizer.zero_grad()
            loss = case.loss(model, step)
            loss.backward()
            if by_hand is not None and due:
                decay_by_hand(optimizer.param_groups, by_hand)
                due.clear()
            return loss

        if closure or case.needs_closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        if decay is not None and case.has_wd:
            assert [g["weight_decay"] for g in optimizer.param_groups] == [INNER_WD]  # P3
    return weights(model), optimizer


def without_own_wd(case):
    return {"weight_decay": 0.0} if case.has_wd else {}


@every_optimizer
@pytest.mark.filterwarnings("ignore:ASGD decays its weights also")
@pytest.mark.parametrize("closure", [False, True], ids=["step()", "step(closure)"])
@pytest.mark.filterwarnings("ignore:a parameter has a sparse gradient")
def test_equals_the_hand_written_loop_bit_for_bit(case, closure):  # P4, P5
    expected, _ = train(case, closure, by_hand=WD, **without_own_wd(case))
    for quantum in (None, 0):
        ours, optimizer = train(case, closure, lambda o, q=quantum: DecoupledWD(o, WD, quantum=q))
        assert torch.equal(ours, expected)
        assert set(optimizer.param_groups[0]) == {"params", *optimizer.defaults}  # P3: no new key


@every_optimizer
@pytest.mark.filterwarnings("ignore:ASGD decays its weights also")
@pytest.mark.filterwarnings("ignore:a parameter has a sparse gradient")
def test_is_near_the_loop_in_float64(case):  # P4
    if case.cls is torch.optim.Rprop:
        pytest.skip("Rprop takes the sign of products of gradients: rounding changes its path")
    expected, _ = train(case, by_hand=WD, dtype=torch.float64, **without_own_wd(case))
    ours, _ = train(case, attach=lambda o: DecoupledWD(o, WD))
    tolerance = 2e-2 if case.matrices_only else 2e-3  # Muon orthogonalizes in bfloat16
    assert (ours.double() - expected).abs().max() < tolerance
    undecayed, _ = train(case, dtype=torch.float64, **without_own_wd(case))
    assert (undecayed - expected).abs().max() > 5 * (ours.double() - expected).abs().max()


@pytest.mark.parametrize(
    "options",
    [{"foreach": False}, {"foreach": True}, {"fused": True}, {"lr": torch.tensor(0.05)}],
    ids=str,
)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_is_adamw(options, amsgrad):  # P4
    case = next(case for case in CASES if case.cls is torch.optim.Adam)
    options = {"foreach": None, "amsgrad": amsgrad, **options}
    adamw = type(case)(torch.optim.AdamW, case.kwargs)
    expected, _ = train(adamw, weight_decay=WD, **options)
    for quantum in (None, 0):
        ours, _ = train(case, attach=lambda o, q=quantum: DecoupledWD(o, WD, quantum=q), **options)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_adam_is_adamw_in_other_dtypes(dtype):  # P4
    options = {"foreach": False, "eps": 1e-3}  # float16 has no 1e-8
    adamw = type(CASES[0])(torch.optim.AdamW, {"lr": 0.05})
    expected, _ = train(adamw, dtype=dtype, weight_decay=0.5, **options)
    adam = type(CASES[0])(torch.optim.Adam, {"lr": 0.05})
    ours, _ = train(adam, attach=lambda o: DecoupledWD(o, 0.5), dtype=dtype, **options)
    assert torch.equal(ours, expected)


def test_own_weight_decay_is_read_afresh_at_every_step():  # P3, wd=None
    def run(cls, **attach):
        model = nn.Linear(3, 3)
        nn.init.ones_(model.weight)
        optimizer = cls(model.parameters(), lr=0.1, weight_decay=0.0)
        decay = DecoupledWD(optimizer, **attach) if attach else None
        for step in range(1, 4):
            optimizer.param_groups[0]["weight_decay"] = 0.1 * step
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
        return weights(model), decay

    torch.manual_seed(0)
    expected, _ = run(torch.optim.AdamW)
    torch.manual_seed(0)
    ours, decay = run(torch.optim.Adam, wd=None)
    assert torch.equal(ours, expected)
    assert decay.coefficients == [pytest.approx(0.3)]


def test_sgd_equals_l2_only_without_momentum():  # the source's first claim
    for momentum, close in ((0.0, True), (0.9, False)):
        case = type(CASES[0])(torch.optim.SGD, {"lr": 0.05, "momentum": momentum})
        l2, _ = train(case, weight_decay=WD)
        ours, _ = train(case, attach=lambda o: DecoupledWD(o, WD))
        assert torch.allclose(l2, ours, atol=1e-6) == close


# Which parameters


def two_layers():
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def test_parameters_without_gradient_stay_untouched():  # P2
    model = two_layers()
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DecoupledWD(optimizer, 0.5)
    model[0].weight.grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.equal(model[0].weight, before[0].weight * (1 - 0.1 * 0.5))
    assert torch.equal(model[0].bias, before[0].bias)
    assert torch.equal(weights(model[1]), weights(before[1]))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice_decays_once():  # P2
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p, p], lr=0.1)
    DecoupledWD(optimizer, 0.5)
    p.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(p.data, torch.full((3,), 0.95))


def test_sparse_gradients_decay_the_whole_tensor_and_say_so_once():  # P2
    model = nn.Embedding(4, 2, sparse=True)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DecoupledWD(optimizer, 0.5)
    with pytest.warns(UserWarning, match="sparse gradient: the whole tensor decays") as said:
        for _ in range(2):
            optimizer.zero_grad()
            (0 * model(torch.tensor([1]))).sum().backward()
            optimizer.step()
    assert len([w for w in said if "sparse" in str(w.message)]) == 1
    assert torch.allclose(model.weight, before * 0.95**2)


def test_groups_added_during_training_decay_and_replaced_parameters_too():  # P5
    p, q, r = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([p], lr=0.1)
    DecoupledWD(optimizer, 0.5)
    for x in (p, q, r):
        x.grad = torch.zeros(2)
    optimizer.step()
    optimizer.add_param_group({"params": [q], "lr": 0.2})
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = r
    optimizer.step()
    assert torch.allclose(p.data, torch.full((2,), 0.95**2))
    assert torch.allclose(q.data, torch.full((2,), 0.9**2))
    assert torch.allclose(r.data, torch.full((2,), 0.95))


def test_mixed_dtypes_in_one_group():  # P5
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    optimizer = torch.optim.SGD(params, lr=0.1, foreach=False)
    DecoupledWD(optimizer, 0.5)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in params:
        assert torch.equal(p.data, torch.ones_like(p).mul_(1 - 0.1 * 0.5))


def test_one_multi_tensor_call_per_group_and_dtype(monkeypatch):  # P11
    calls = []
    multiply = torch._foreach_mul_
    monkeypatch.setattr(
        torch, "_foreach_mul_", lambda *a: calls.append(float(a[1])) or multiply(*a)
    )
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5))).append(nn.Linear(2, 2).double())
    optimizer = torch.optim.SGD(
        [{"params": list(model[:2].parameters())}, {"params": list(model[2:].parameters())}],
        lr=0.1,
        foreach=False,
    )
    DecoupledWD(optimizer, 0.5)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert calls == pytest.approx(
        [0.95] * 9
    )  # a step: one for the first group, two dtypes in the second


# When


class StepTwice(torch.optim.Adam):
    def step(self, closure=None):
        return super().step(closure)


def test_a_step_that_calls_super_decays_once():  # P1
    torch.optim.Adam([nn.Parameter(torch.ones(1))])  # from here on Adam.step runs hooks itself
    case = type(CASES[0])(StepTwice, {"lr": 0.05})
    expected, _ = train(type(case)(torch.optim.AdamW, {"lr": 0.05}), weight_decay=WD)
    for closure in (False, True):
        ours, _ = train(case, closure, lambda o: DecoupledWD(o, WD))
        assert torch.equal(ours, expected)


class Raising(torch.optim.SGD):
    fail = False

    def step(self, closure=None):
        if self.fail:
            raise RuntimeError("out of memory")
        return super().step(closure)


def after_a_raise():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.zeros(2)
    optimizer = Raising([p], lr=0.1, weight_decay=INNER_WD)
    decay = DecoupledWD(optimizer, 0.5)
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.fail = False
    return optimizer, decay, p


def test_the_step_after_one_that_raised_decays_once():  # P1, P3
    optimizer, _, p = after_a_raise()
    before = p.data.clone()
    optimizer.step()
    assert torch.equal(p.data, before * 0.95)
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD


def test_a_step_that_raised_leaves_the_user_s_weight_decay():  # P3
    optimizer, _, _ = after_a_raise()
    assert optimizer.state_dict()["param_groups"][0]["weight_decay"] == INNER_WD
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD
    optimizer, decay, _ = after_a_raise()
    decay.detach()
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD


def test_a_closure_sees_the_user_s_weight_decay_and_may_raise_or_change_it():  # P3
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([p], lr=0.1, max_iter=5)
    optimizer.param_groups[0]["weight_decay"] = INNER_WD
    DecoupledWD(optimizer, 0.5)
    seen = []

    def closure():
        seen.append(optimizer.param_groups[0]["weight_decay"])
        optimizer.param_groups[0]["weight_decay"] = seen[-1] + 1
        if len(seen) == 3:
            raise KeyboardInterrupt
        optimizer.zero_grad()
        loss = (p**4).sum()
        loss.backward()
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert seen == [INNER_WD, INNER_WD + 1, INNER_WD + 2]
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD + 3


def test_post_hooks_of_others_find_the_user_s_weight_decay():  # P3
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.zeros(2)
    optimizer = torch.optim.SGD([p], lr=0.1, weight_decay=0.4)
    group, seen = optimizer.param_groups[0], []

    def halve(*_):
        seen.append(optimizer.state_dict()["param_groups"][0]["weight_decay"])
        group["weight_decay"] /= 2

    optimizer.register_step_post_hook(halve)
    decay = DecoupledWD(optimizer)
    for _ in range(3):
        optimizer.step()
    assert seen == [0.4, 0.2, 0.1]
    assert group["weight_decay"] == 0.05
    assert decay.coefficients == [0.1]


def test_a_closure_may_detach():  # P3
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1, weight_decay=INNER_WD)
    decay = DecoupledWD(optimizer, 0.5)
    optimizer.step(decay.detach)
    assert optimizer.param_groups[0]["weight_decay"] == INNER_WD


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step(backend):  # P5
    def run(compiled):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        DecoupledWD(optimizer, lambda progress: 0.5 * (1 - progress), total_steps=6)
        step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
        for index in range(6):
            optimizer.zero_grad()
            model(torch.full((2, 3), 1.0 + index)).square().mean().backward()
            step()
        return weights(model)

    torch.testing.assert_close(run(compiled=True), run(compiled=False), rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_differentiates_inside_step_works():  # P5
    class SecondOrder(torch.optim.Optimizer):
        """Divides by the second derivative, as AdaHessian does, from graphs kept by backward."""

        def __init__(self, params):
            super().__init__(params, {"lr": 0.1, "weight_decay": 0.0})

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                (hessian,) = torch.autograd.grad(p.grad.sum(), p)
                p.data.sub_(0.1 * p.grad.detach() / hessian)

    p = nn.Parameter(torch.full((2,), 2.0))
    optimizer = SecondOrder([p])
    DecoupledWD(optimizer, 0.5)
    (p**2).sum().backward(create_graph=True)
    optimizer.step()
    assert torch.allclose(p.data, torch.full((2,), 2 * 0.95 - 0.1 * 4 / 2))


# AMP


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_overflow_decays_nothing(fused, dtype):  # P1
    def run(cls, wd, attach):
        torch.manual_seed(0)
        model = nn.Linear(4, 4).to(dtype)
        optimizer = cls(model.parameters(), lr=0.1, weight_decay=wd, fused=fused)
        if attach:
            DecoupledWD(optimizer, WD)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
        path = []
        for step in range(6):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4, dtype=dtype)).sum() * (float("inf") if step % 3 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            path.append(weights(model))
        return torch.stack(path)

    expected = run(torch.optim.AdamW, WD, False)
    assert torch.equal(expected[0], expected[2])
    assert not torch.equal(expected[2], expected[3])
    assert torch.equal(run(torch.optim.Adam, INNER_WD, True), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decays_faithfully_where_only_the_device_knows(dtype):  # P8
    p = nn.Parameter(torch.rand(4096).add(1).to(dtype))
    before = p.detach().double()
    optimizer = torch.optim.SGD([p], lr=0.1, fused=True)
    DecoupledWD(optimizer, 0.4)
    optimizer.found_inf = torch.tensor(0.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (1 - p.double() / before).mean().item() == pytest.approx(0.04, rel=0.02)
    optimizer.found_inf = torch.tensor(1.0)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p.data, before)


# Attaching


def test_detach_and_context_manager_leave_the_optimizer_as_it_was():  # P3
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.zeros(2)
    optimizer = torch.optim.SGD([p], lr=0.1, weight_decay=0.0)
    with DecoupledWD(optimizer, 0.5):
        optimizer.step()
    optimizer.step()
    assert torch.equal(p.data, torch.full((2,), 0.95))
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_state_dict_pre_hooks


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_copies_decay_the_copied_optimizer(duplicate):  # P9, P3
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.zeros(2)
    optimizer = torch.optim.SGD([p], lr=0.1, weight_decay=INNER_WD)
    decay = DecoupledWD(optimizer, 1e-5)
    optimizer.step()
    other, twin = duplicate((optimizer, decay))
    assert twin.optimizer is other
    assert other.param_groups[0]["weight_decay"] == INNER_WD
    assert twin.state_dict() == decay.state_dict()
    other.step()
    assert twin.steps == 2
    assert decay.steps == 1
    alone = copy.deepcopy(optimizer)  # the optimizer alone: no decay
    assert not alone._optimizer_step_pre_hooks


# The values of each argument


def shrinks(optimizer, steps=5, after=lambda: None, **arguments):
    """1 - the factor by which each step multiplied each group's weights, without gradient."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.data.fill_(1)
            p.grad = torch.zeros_like(p)
    DecoupledWD(optimizer, **arguments)
    rows = []
    for _ in range(steps):
        before = [g["params"][0].item() for g in optimizer.param_groups]
        optimizer.step()
        after()
        now = [g["params"][0].item() for g in optimizer.param_groups]
        rows.append([1 - b / a for a, b in zip(before, now)])
    return torch.tensor(rows)


def groups(*options):
    return [
        {"params": [nn.Parameter(torch.ones(1, dtype=torch.float64))], **each} for each in options
    ]


def approx(rows):
    return pytest.approx(torch.tensor(rows, dtype=torch.float32).numpy(), rel=1e-4)


SCALES = {
    "lr": lambda lr: lr,
    "lr_ratio": lambda lr: lr / 0.5,
    "lr_squared": lambda lr: lr**2 / 0.5,
    "none": lambda lr: 1.0,
}


@pytest.mark.parametrize("scale_by", SCALES)
def test_scale_by_under_a_onecycle_schedule(scale_by):
    optimizer = torch.optim.SGD(groups({}), lr=0.1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    lrs = []

    def advance():
        lrs.append(optimizer.param_groups[0]["lr"])
        cycle.step()

    lrs.append(optimizer.param_groups[0]["lr"])
    seen = shrinks(
        optimizer,
        8,
        lambda: (cycle.step(), lrs.append(cycle.get_last_lr()[0])),
        wd=0.1,
        scale_by=scale_by,
    )
    assert seen.numpy() == approx([[0.1 * SCALES[scale_by](lr)] for lr in lrs[:-1]])
    assert max(lrs) == pytest.approx(0.5, rel=0.1)


def test_scale_by_may_be_a_callable_or_differ_by_group():
    optimizer = torch.optim.SGD(groups({"lr": 0.1}, {"lr": 0.2, "d": 3.0}, {"lr": 0.4}), lr=0.1)
    for group in optimizer.param_groups:
        group.setdefault("d", 1.0)
    seen = shrinks(
        optimizer,
        2,
        wd=0.1,
        scale_by=["none", lambda g: g["lr"] * g["d"], "lr_ratio"],
        max_lr=[1.0, 1.0, 0.8],
    )
    assert seen.numpy() == approx([[0.1, 0.1 * 0.6, 0.1 * 0.4 / 0.8]] * 2)


@pytest.mark.parametrize(
    ("keys", "lr_max"),
    [({"max_lr": 2.0, "initial_lr": 4.0}, 2.0), ({"initial_lr": 4.0}, 4.0), ({}, 0.1)],
)
def test_lr_max_is_taken_from_the_group_once(keys, lr_max):
    optimizer = torch.optim.SGD(groups(keys), lr=0.1)

    def disturb():
        optimizer.param_groups[0].update(dict.fromkeys(keys, 100.0))

    seen = shrinks(optimizer, 3, disturb, wd=0.1, scale_by="lr_ratio")
    assert seen.numpy() == approx([[0.1 * 0.1 / lr_max]] * 3)


def test_a_ratio_above_one_warns_once():
    optimizer = torch.optim.SGD(groups({"initial_lr": 0.05}), lr=0.1)
    with pytest.warns(UserWarning, match="lr / lr_max exceeds 1") as said:
        shrinks(optimizer, 3, wd=0.1, scale_by="lr_ratio")
    assert len(said) == 1


def test_wd_per_group_and_schedules():  # P6
    optimizer = torch.optim.SGD(groups({}, {"lr": 0.5}), lr=0.1)
    seen = shrinks(optimizer, 5, wd=[0.1, lambda progress: 0.2 * (1 - progress)], total_steps=4)
    expected = [[0.01, 0.1 * (1 - i / 4)] for i in range(4)]
    assert seen.numpy() == approx([*expected, [0.01, 0.0]])  # past its end a schedule stays there


def test_progress_may_come_from_the_loop():  # P6
    positions = iter([0.0, 0.25, 0.25, 0.9, 1.5])
    optimizer = torch.optim.SGD(groups({}), lr=0.1)
    seen = shrinks(optimizer, 5, wd=lambda progress: progress, progress=lambda: next(positions))
    assert seen.numpy() == approx([[0.1 * p] for p in (0.0, 0.25, 0.25, 0.9, 1.0)])


def test_no_decay_groups_stay_no_decay_groups():
    def build():
        options = {"weight_decay": 0.01}, {"weight_decay": 0.0}
        return torch.optim.SGD(groups(*options), lr=0.1)

    with pytest.warns(UserWarning, match="param group 1 has a weight decay of 0") as said:
        seen = shrinks(build(), 2, wd=lambda progress: 0.1 + progress, total_steps=2)
    assert len(said) == 1
    assert seen.numpy() == approx([[0.01, 0.0], [0.06, 0.0]])
    assert shrinks(build(), 1, wd=[0.1, 0.2]).numpy() == approx([[0.01, 0.02]])
    assert shrinks(build(), 1, wd=None).numpy() == approx([[0.001, 0.0]])


def test_where_no_group_decays_by_itself_all_do(recwarn):
    optimizer = torch.optim.SGD(groups({}, {}), lr=0.1)
    assert shrinks(optimizer, 1, wd=0.1).numpy() == approx([[0.01, 0.01]])
    assert not recwarn.list
