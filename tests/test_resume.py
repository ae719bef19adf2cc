"""A run that is stopped and resumed ends with the same bits as one that is not."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from wd_callbacks.torch import DecoupledWD

STEPS = 40


def schedule(progress):
    return 1e-3 * (1 - progress)


def constant(progress):
    return 2e-4


ARGUMENTS = {
    "number": {"wd": 0.1},
    "schedule": {"wd": schedule, "total_steps": STEPS},
    "owed": {"wd": 1e-4, "quantum": 3e-5},
    "owed by schedule": {"wd": [schedule, 1e-4], "total_steps": STEPS, "quantum": 3e-5},
    "ratio": {"wd": 0.01, "scale_by": "lr_ratio"},
}


class Run:
    """A plain loop whose second layer has a gradient at every other step only."""

    def __init__(self, arguments, dtype=torch.float32):
        torch.manual_seed(0)
        self.model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).to(dtype)
        groups = [{"params": list(layer.parameters())} for layer in self.model]
        self.optimizer = torch.optim.Adam(groups, lr=0.05)
        self.warm = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.1, total_iters=9)
        self.decay = DecoupledWD(self.optimizer, **arguments)
        self.parts = self.model, self.optimizer, self.warm, self.decay

    def train(self, start, stop):
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(3, 4, generator=generator).to(self.model[0].weight)
            layers = self.model if step % 2 else self.model[:1]
            self.optimizer.zero_grad()
            sum(layer(x).square().mean() for layer in layers).backward()
            self.optimizer.step()
            self.warm.step()
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def save(self):
        file = io.BytesIO()
        torch.save([part.state_dict() for part in self.parts], file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, states):
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("stop", [1, 7, 20, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_equals_uninterrupted(arguments, stop, dtype, recwarn):  # P9
    whole = Run(arguments, dtype).train(0, STEPS)
    first, second = Run(arguments, dtype), Run(arguments, dtype)
    first.train(0, stop)
    second.load(first.save())
    assert torch.equal(second.train(stop, STEPS), whole)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["schedule", "owed"])
def test_without_the_saved_state_it_does_not(name):  # P9, the negative control
    arguments = ARGUMENTS[name]
    whole = Run(arguments).train(0, STEPS)
    first, second = Run(arguments), Run(arguments)
    first.train(0, 7)
    states = first.save()
    second.load(states[:3])
    assert not torch.equal(second.train(7, STEPS), whole)


CHANGES = [
    ({"wd": 0.2}, r"wd was 0\.1 in the saved run and is 0\.2 in this one"),
    ({"wd": [0.1, 0.1]}, r"wd was 0\.1 .* is \[0\.1, 0\.1\]"),
    ({"scale_by": "none"}, "scale_by was lr in the saved run and is none"),
    ({"max_lr": 0.5}, r"max_lr was None .* is 0\.5"),
    ({"quantum": 0}, "quantum was None .* is 0"),
    ({"total_steps": 30}, "total_steps was 40 .* is 30"),
    ({"wd": schedule}, r"wd was 0\.1 .* is \[0\.001, 0\.00075, "),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_arguments_win_over_the_checkpoint_and_say_so(change, message):  # P9
    arguments = {"wd": 0.1, "total_steps": STEPS}
    first, second = Run(arguments), Run({**arguments, **change})
    first.train(0, 7)
    with pytest.warns(UserWarning, match=message) as said:
        second.load(first.save())
    assert len(said) == 1
    second.train(7, 8)
    wd = change.get("wd", 0.1)
    expected = wd(7 / STEPS) if callable(wd) else 0.1 if isinstance(wd, list) else wd
    assert second.decay.coefficients == [expected] * 2


def test_callables_are_compared_by_value(recwarn):  # P9
    first = Run({"wd": schedule, "scale_by": lambda g: g["lr"], "total_steps": STEPS})
    second = Run({"wd": lambda p: 1e-3 * (1 - p), "scale_by": lambda g: 1 * g["lr"], **LENGTH})
    first.train(0, 7)
    second.load(first.save())
    assert not recwarn.list
    third = Run({"wd": constant, "scale_by": lambda g: 2 * g["lr"], **LENGTH})
    third.load(first.save())
    told = [str(w.message) for w in recwarn.list]
    assert len(told) == 2
    assert told[0].startswith("wd was [0.001, 0.00075,")
    assert told[1] == "scale_by was 0.5 in the saved run and is 1.0 in this one"


LENGTH = {"total_steps": STEPS}


def test_an_explicit_max_lr_wins_over_the_saved_one():  # P9
    first = Run({"wd": 0.01, "scale_by": "lr_ratio"})
    first.train(0, 3)
    assert first.decay.state_dict()["lr_max"] == [0.05, 0.05]
    second = Run({"wd": 0.01, "scale_by": "lr_ratio", "max_lr": 0.1})
    with pytest.warns(UserWarning, match="max_lr was None"):
        second.load(first.save())
    assert second.decay.state_dict()["lr_max"] == [0.1, 0.1]


def test_the_state_of_another_model_is_refused():  # P9, P10
    first, other = Run({"wd": 0.1}), Run({"wd": 0.1})
    first.train(0, 2)
    other.optimizer.param_groups[1]["params"].pop()
    with pytest.raises(
        ValueError, match=r"param groups with \[2, 2\] .* optimizer's have \[2, 1\]"
    ):
        other.decay.load_state_dict(first.decay.state_dict())


def test_the_state_holds_plain_numbers_and_adds_nothing_to_the_optimizer_s():  # P3, P9
    run = Run(ARGUMENTS["owed by schedule"])
    run.train(0, 7)

    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(each) for key, each in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or type(value) in (int, float, str)

    state = run.decay.state_dict()
    assert plain(state)
    assert any(map(any, state["owed"]))
    without = torch.optim.Adam(run.model.parameters(), lr=0.05)
    keys = set(without.param_groups[0]) | {"initial_lr"}
    assert all(set(group) == keys for group in run.optimizer.param_groups)
    assert all(
        set(each) == {"step", "exp_avg", "exp_avg_sq"} for each in run.optimizer.state.values()
    )


def one_weight(**options):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.zeros(2)
    return p, torch.optim.SGD([p], lr=0.1, **options)


def test_a_state_saved_right_after_add_param_group_loads():  # P9
    _, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 1e-7)
    optimizer.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    state = decay.state_dict()
    decay.load_state_dict(state)
    assert decay.state_dict()["owed"][0] == state["owed"][0] != [0.0]


def test_what_was_taken_for_a_no_decay_group_stays_one():  # P9
    def run(resume):
        p, optimizer = one_weight(weight_decay=0.0)
        decay = DecoupledWD(optimizer, 0.5)
        optimizer.step()
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0.1})
        optimizer.step()
        if resume:
            state = decay.state_dict()
            decay.detach()
            decay = DecoupledWD(optimizer, 0.5)
            decay.load_state_dict(state)
        optimizer.step()
        return p.data

    assert torch.equal(run(resume=True), run(resume=False))
    assert torch.allclose(run(resume=False), torch.full((2,), 0.95**3))


def test_a_state_saved_before_the_first_step_takes_nothing():  # P9
    _, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 0.1, scale_by="lr_ratio")
    decay.load_state_dict(decay.state_dict())
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=9)
    optimizer.step()
    assert decay.state_dict()["lr_max"] == [1.0]


@pytest.mark.parametrize("state", ["{}", "optimizer", "no payments", "short", None])
def test_what_is_no_state_is_refused_and_changes_nothing(state):  # P9, P10
    _, optimizer = one_weight()
    decay = DecoupledWD(optimizer, 1e-7)
    optimizer.step()
    before = decay.state_dict()
    wrong = {
        "{}": {},
        "optimizer": optimizer.state_dict(),
        "no payments": {k: v for k, v in before.items() if k != "payments"},
        "short": {**before, "payments": [[]]},
        None: None,
    }[state]
    with pytest.raises(ValueError, match=r"no state of a DecoupledWD: it lacks|param groups with"):
        decay.load_state_dict(wrong)
    assert decay.state_dict() == before
