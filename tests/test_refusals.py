"""What makes no sense is refused with its name, its value and a remedy, before a weight changes."""

from __future__ import annotations

import math

import pytest
import schedulefree
import torch
from torch import nn

from wd_callbacks.torch import DecoupledWD


def two_groups(**options):
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    for p in params:
        p.grad = torch.zeros_like(p)
    return torch.optim.SGD([{"params": [p]} for p in params], **{"lr": 0.1, **options})


ARGUMENTS = [
    ({"wd": -0.1}, ValueError, r"wd must be finite and at least 0, got -0\.1"),
    ({"wd": math.nan}, ValueError, "wd must be finite and at least 0, got nan"),
    ({"wd": math.inf}, ValueError, "wd must be finite and at least 0, got inf"),
    ({"wd": "1e-4"}, TypeError, r"wd must be a number or a schedule .*, got '1e-4' \(str\)"),
    ({"wd": True}, TypeError, r"wd must be .*, got True \(bool\)"),
    ({"wd": 1j}, TypeError, "wd must be a number or a schedule"),
    ({"wd": []}, ValueError, "wd is an empty sequence"),
    ({"wd": [0.1, -1]}, ValueError, r"wd\[1\] must be finite and at least 0, got -1"),
    ({"wd": [0.1, None]}, TypeError, r"wd\[1\] must be .*, got None \(NoneType\)"),
    ({"wd": [0.1]}, ValueError, "wd has 1 values, but the optimizer has 2 param groups"),
    ({"wd": [0.1] * 3}, ValueError, "wd has 3 values, but the optimizer has 2 param groups"),
    ({"wd": {}}, ValueError, "wd is an empty dict"),
    ({"wd": {1: 0.1}}, ValueError, r"wd has entries for the optimizers \[1\], expected .* \[0\]"),
    ({"wd": {"0": 0.1}}, TypeError, "wd has the key '0', expected the index of an optimizer"),
    ({"wd": {0: {0: 0.1}}}, TypeError, r"wd\[0\] is a dict inside a dict"),
    ({"wd": {0: -1}}, ValueError, r"wd\[0\] must be finite and at least 0"),
    ({"wd": lambda p: 0.1}, ValueError, "give total_steps, or progress"),
    ({"scale_by": "lrs"}, ValueError, "scale_by must be one of 'lr', 'lr_ratio', .* got 'lrs'"),
    ({"scale_by": 2}, TypeError, r"scale_by must be one of .* got 2 \(int\)"),
    ({"scale_by": []}, ValueError, "scale_by is an empty sequence"),
    ({"scale_by": ["lr", "no"]}, ValueError, r"scale_by\[1\] must be one of .* got 'no'"),
    ({"scale_by": ["lr"]}, ValueError, "scale_by has 1 values, but the optimizer has 2"),
    ({"max_lr": 0}, ValueError, "max_lr must be finite and above 0, got 0"),
    ({"max_lr": -1}, ValueError, "max_lr must be finite and above 0, got -1"),
    ({"max_lr": "1"}, TypeError, "max_lr must be a number, got '1'"),
    ({"max_lr": [1.0]}, ValueError, "max_lr has 1 values, but the optimizer has 2"),
    ({"max_lr": [1.0, math.nan]}, ValueError, r"max_lr\[1\] must be finite"),
    ({"quantum": -1e-3}, ValueError, r"quantum must be finite and at least 0, got -0\.001"),
    ({"quantum": 1}, ValueError, "quantum must be below 1, got 1"),
    ({"quantum": "small"}, TypeError, "quantum must be a number, got 'small'"),
    ({"total_steps": 0}, ValueError, "total_steps must be a whole number of at least 1, got 0"),
    ({"total_steps": 2.5}, ValueError, "total_steps must be a whole number .* got 2.5"),
    ({"total_steps": "9"}, ValueError, "total_steps must be a whole number .* got '9'"),
    ({"progress": 0.5}, TypeError, "progress must be a callable .* got 0.5"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS)
def test_arguments(arguments, error, message):  # P10
    optimizer = two_groups()
    with pytest.raises(error, match=message):
        DecoupledWD(optimizer, **{"wd": 0.1, **arguments})
    assert not optimizer._optimizer_step_pre_hooks


AT_A_STEP = [
    ({"wd": 11.0}, {}, r"param group 0: .* shrink its weights by 1\.1, .*lr 0\.1, wd 11"),
    ({"wd": [0.1, 10.0]}, {}, r"param group 1: .* shrink its weights by 1,"),
    ({"wd": 1.0, "scale_by": "none"}, {}, "shrink its weights by 1, .* scale_by 'none'"),
    ({"wd": 0.1, "scale_by": lambda g: -1.0}, {}, r"shrink its weights by -0\.1"),
    ({"wd": 0.1, "scale_by": lambda g: math.nan}, {}, "shrink its weights by nan"),
    ({"wd": lambda p: p - 0.5}, {}, r"the schedule wd = <function .* at progress 0 is -0\.5"),
    ({"wd": [0.1, lambda p: math.inf]}, {}, r"the schedule wd\[1\] = .* progress 0 is inf"),
    ({"wd": lambda p: math.nan}, {}, "the schedule wd = .* at progress 0 is nan"),
    ({"wd": None}, {"weight_decay": -1.0}, "the weight decay of group 1 is -1"),
    ({"wd": None}, {"weight_decay": math.nan}, "the weight decay of group 1 is nan"),
    ({"wd": 0.1}, {"lr": -1.0}, r"param group 1: .* shrink its weights by -0\.1"),
    ({"wd": 0.1}, {"lr": torch.tensor(20.0)}, "param group 1: .* shrink its weights by 2"),
    ({"wd": 0.1, "scale_by": "lr_ratio"}, {"lr": 0.0}, "param group 1: .* give max_lr"),
]


@pytest.mark.parametrize(("arguments", "group", "message"), AT_A_STEP)
def test_values_at_a_step(arguments, group, message):  # P10
    optimizer = two_groups()
    optimizer.param_groups[1].update(group)
    held = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    DecoupledWD(optimizer, **arguments, total_steps=4)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    for g, was in zip(optimizer.param_groups, held):
        assert torch.equal(g["params"][0].data, torch.ones(2, 2))
        assert str({k: v for k, v in g.items() if k != "params"}) == str(was)


def test_a_schedule_says_at_which_progress():  # P10
    optimizer = two_groups()
    DecoupledWD(optimizer, lambda p: 0.1 if p < 0.7 else -0.1, total_steps=4)
    for _ in range(3):
        optimizer.step()
    weights = [g["params"][0].data.clone() for g in optimizer.param_groups]
    with pytest.raises(ValueError, match=r"at progress 0\.75 is -0\.1"):
        optimizer.step()
    assert all(torch.equal(g["params"][0], w) for g, w in zip(optimizer.param_groups, weights))


def test_progress_that_is_no_number():  # P10
    optimizer = two_groups()
    DecoupledWD(optimizer, 0.1, progress=lambda: math.nan)
    with pytest.raises(ValueError, match=r"progress\(\) gave nan, expected a number in \[0, 1\]"):
        optimizer.step()


@pytest.mark.parametrize("value", [None, "0.1", [0.1], torch.ones(2), 1j, True])
@pytest.mark.parametrize("source", ["wd", "scale_by", "progress", "weight_decay", "lr"])
def test_what_is_no_number_is_named(value, source):  # P10
    optimizer = two_groups(weight_decay=0.1)
    arguments = {
        "wd": {"wd": lambda p: value, "total_steps": 2},
        "scale_by": {"wd": 0.1, "scale_by": lambda g: value},
        "progress": {"wd": 0.1, "progress": lambda: value},
    }.get(source, {"wd": None})
    DecoupledWD(optimizer, **arguments)
    if source in ("weight_decay", "lr"):
        optimizer.param_groups[1][source] = value
    with pytest.raises(TypeError, match=f"{source}.* is .*, expected a number"):
        optimizer.step()
    assert all(torch.equal(g["params"][0], torch.ones(2, 2)) for g in optimizer.param_groups)


def test_a_group_beyond_the_sequence():  # P10
    optimizer = two_groups()
    DecoupledWD(optimizer, [0.1, 0.2])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match="wd has 2 values, but the optimizer has 3 param groups"):
        optimizer.step()


def test_two_decays_on_one_optimizer():  # P10
    optimizer = two_groups()
    decay = DecoupledWD(optimizer, 0.1)
    with pytest.raises(ValueError, match="has a DecoupledWD attached already"):
        DecoupledWD(optimizer, 0.2)
    decay.detach()
    DecoupledWD(optimizer, 0.2)


def test_no_weight_decay_to_read():  # P10
    optimizer = torch.optim.Rprop([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="wd=None takes each param group's own weight decay"):
        DecoupledWD(optimizer)


def test_no_learning_rate_to_scale_by():  # P10
    class NoLR(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            pass

    p = nn.Parameter(torch.ones(1))
    p.grad = torch.zeros(1)
    optimizer = NoLR([p])
    with pytest.raises(ValueError, match=r"scale_by='lr' needs a learning rate, .*'none'"):
        DecoupledWD(optimizer, 0.1)
    DecoupledWD(optimizer, 0.1, scale_by="none")
    optimizer.step()
    assert p.item() == pytest.approx(0.9)


@pytest.mark.parametrize("thing", [nn.Linear(1, 1), 1e-4, None])
def test_no_optimizer(thing):  # P10
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got"):
        DecoupledWD(thing, 0.1)


# Optimizers on which decay from outside is wrong


class WithoutHooks(torch.optim.Optimizer):
    """A wrapper that skips super().__init__, as several third-party ones do."""

    def __init__(self, base):
        self.base = base
        self.param_groups = base.param_groups

    def step(self, closure=None):
        return self.base.step(closure)


class SAM(torch.optim.Optimizer):
    """Foret et al. (arXiv 2010.01412): climbs, evaluates there, and steps from where it was."""

    def __init__(self, params, base, **options):
        super().__init__(params, options)
        self.base = base(self.param_groups, **options)

    @torch.no_grad()
    def step(self, closure):
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        before = [p.clone() for p in params]
        for p in params:
            p.add_(p.grad, alpha=0.05)
        torch.enable_grad()(closure)()
        for p, q in zip(params, before):
            p.copy_(q)
        self.base.step()


class FirstStepSAM(SAM):
    """Climbs by the gradients that are there, as the most used implementation does."""

    @torch.no_grad()
    def step(self, closure):
        params = [p for group in self.param_groups for p in group["params"]]
        torch.stack([p.grad.norm() for p in params if p.grad is not None])  # of none is an error
        super().step(closure)


class LookSAM(SAM):
    """Liu et al. (arXiv 2203.02714): climbs at every tenth step only."""

    calls = 0

    def step(self, closure):
        self.calls += 1
        if self.calls % 10:
            closure()
            self.base.step()
        else:
            super().step(closure)


class WSAM(SAM):
    """Yue et al. (arXiv 2305.15817): evaluates before it climbs, and takes back just the climb."""

    @torch.no_grad()
    def step(self, closure):
        torch.enable_grad()(closure)()
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        climbs = [0.05 * p.grad for p in params]
        for p, climb in zip(params, climbs):
            p.add_(climb)
        torch.enable_grad()(closure)()
        for p, climb in zip(params, climbs):
            p.sub_(climb)
        self.base.step()


class Lookahead(torch.optim.SGD):
    """Zhang et al. (arXiv 1907.08610): every few steps half the way back to slow weights."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            slow = self.state[p].setdefault("slow", p.detach().clone())
            count = self.state[p]["count"] = self.state[p].get("count", 0) + 1
            if count % 5 == 0:
                p.data.copy_(slow.add_(p.data - slow, alpha=0.5))


class HookedWithoutInit(WithoutHooks):
    """As timm's Lookahead, whose ``zero_grad`` marks its ``step`` as one that runs hooks."""

    def __init__(self, base):
        super().__init__(base)
        self.defaults = base.defaults
        self._optimizer_step_pre_hooks = {}


def scheduled(optimizer):
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return optimizer


def with_an_empty_group(params):
    return [{"params": []}, {"params": list(params)}]


def zeroed(optimizer):
    optimizer.zero_grad()
    return optimizer


WRONG = [
    (lambda ps: WithoutHooks(torch.optim.SGD(ps, lr=0.1)), "never runs .* hooks.* its 'base'"),
    (lambda ps: SAM(ps, torch.optim.SGD, lr=0.1), "SAM undoes a decay .* attach .* its 'base'"),
    (lambda ps: FirstStepSAM(ps, torch.optim.SGD, lr=0.1), "FirstStepSAM undoes .* its 'base'"),
    (lambda ps: LookSAM(ps, torch.optim.SGD, lr=0.1), "LookSAM undoes a decay .* its 'base'"),
    (lambda ps: schedulefree.AdamWScheduleFree(ps), "AdamWScheduleFree undoes a decay"),
    (lambda ps: schedulefree.SGDScheduleFree(ps, lr=0.1), "SGDScheduleFree undoes a decay"),
    (lambda ps: schedulefree.RAdamScheduleFree(ps), "RAdamScheduleFree undoes a decay"),
    (lambda ps: scheduled(schedulefree.SGDScheduleFree(ps, lr=0.1)), "SGDScheduleFree undoes"),
    (lambda ps: schedulefree.SGDScheduleFree(ps, lr=0.0), "SGDScheduleFree undoes"),
    (lambda ps: schedulefree.SGDScheduleFree(with_an_empty_group(ps), lr=0.1), "undoes"),
    (lambda ps: zeroed(HookedWithoutInit(torch.optim.SGD(ps, lr=0.1))), "never runs .* its 'base'"),
]


@pytest.mark.parametrize(("build", "message"), WRONG)
def test_optimizers_that_undo_it_are_refused_and_left_alone(build, message):  # P5
    model = nn.Linear(3, 3)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build(model.parameters())
    rng = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        DecoupledWD(optimizer, 0.1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert all(p.grad is None for p in model.parameters())
    assert not vars(optimizer).get("state")
    assert torch.equal(torch.get_rng_state(), rng)
    assert not getattr(optimizer, "_optimizer_step_pre_hooks", None)


def test_lookahead_is_accepted():  # P5
    DecoupledWD(Lookahead([nn.Parameter(torch.ones(2))], lr=0.1), 0.5)


def test_a_wrapper_that_keeps_the_decay_is_accepted():  # P5, P1
    p = nn.Parameter(torch.ones(2))
    optimizer = WSAM([p], torch.optim.SGD, lr=0.1)
    DecoupledWD(optimizer, 0.5)

    def closure():
        p.grad = torch.zeros(2)

    optimizer.step(closure)
    assert torch.equal(p.data, torch.full((2,), 0.95))


def test_what_holds_an_optimizer_without_being_one_names_it():  # P5
    wrapper = schedulefree.ScheduleFreeWrapper(torch.optim.SGD([nn.Parameter(torch.ones(2))]))
    with pytest.raises(TypeError, match=r"got ScheduleFreeWrapper: attach .* to its 'base'"):
        DecoupledWD(wrapper, 0.1)


def test_the_base_of_a_wrapper_is_accepted():  # P5
    p = nn.Parameter(torch.ones(2))
    wrapper = WithoutHooks(torch.optim.SGD([p], lr=0.1))
    DecoupledWD(wrapper.base, 0.5)
    p.grad = torch.zeros(2)
    wrapper.step()
    assert torch.equal(p.data, torch.full((2,), 0.95))


def test_a_refused_step_is_none():  # P6, P10
    optimizer, seen = two_groups(), []
    decay = DecoupledWD(optimizer, lambda p: seen.append(p) or 0.1, total_steps=4)
    optimizer.step()
    state = decay.state_dict()
    for closure in ([], [lambda: torch.zeros(())]):
        optimizer.param_groups[1]["lr"] = 20.0
        with pytest.raises(ValueError, match="shrink its weights by 2"):
            optimizer.step(*closure)
        assert decay.steps == 1
        assert decay.state_dict() == state
    optimizer.param_groups[1]["lr"] = 0.1
    optimizer.step()
    assert seen[-1] == 0.25
    assert decay.steps == 2


def test_silence_where_nothing_is_wrong(recwarn):
    optimizer = two_groups(weight_decay=0.1)
    DecoupledWD(optimizer, lambda p: 0.1, scale_by="lr_ratio", max_lr=1.0, total_steps=2)
    optimizer.step()
    optimizer.step()
    assert not recwarn.list


class Copies(torch.optim.SGD):
    """Updates copies of half-precision weights in single precision."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    copy = self.state[p].setdefault("copy", p.detach().to(torch.float32, copy=True))
                    copy = copy if self.copies(p) else p
                    copy.sub_(p.grad, alpha=group["lr"])
                    p.copy_(copy)

    def copies(self, p):
        return p.dtype != torch.float32


class CopiesOfMatrices(Copies):
    def copies(self, p):
        return p.ndim == 2


REFUSED = r"a second copy that the decay does not reach .* half"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("among", [(), (torch.float32,)])
def test_copies_of_half_precision_weights_are_refused(dtype, among):  # P5
    DecoupledWD(Copies([nn.Parameter(torch.ones(2))], lr=0.1), 0.1)
    params = [nn.Parameter(torch.ones(2, dtype=it)) for it in (*among, dtype, *among)]
    for groups in (params, [{"params": [p]} for p in params]):
        with pytest.raises(ValueError, match=REFUSED):
            DecoupledWD(Copies(groups, lr=0.1), 0.1)


@pytest.mark.parametrize("order", [1, -1])
def test_copies_of_some_weights_are_refused(order):  # P5
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))]
    DecoupledWD(CopiesOfMatrices(params[:1], lr=0.1), 0.1)
    with pytest.raises(ValueError, match=REFUSED):
        DecoupledWD(CopiesOfMatrices(params[::order], lr=0.1), 0.1)
