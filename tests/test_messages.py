"""Messages and silences that sent people the wrong way (lines 6, 8, 9, 14, 16 to 20, 22)."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from still import StillModule, StillNet, hf_trainer, learner, lightning_trainer, quietly
from torch import nn
from torch.optim import SGD, Adam

from wd_callbacks.fastai import DecoupledWD as FastaiWD
from wd_callbacks.lightning import DecoupledWD as LightningWD
from wd_callbacks.schedules import Cosine, Linear
from wd_callbacks.torch import DecoupledWD
from wd_callbacks.transformers import DecoupledWD as TrainerWD

ADAPTERS = [FastaiWD, LightningWD, TrainerWD]


def still(lr=0.1, **group):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    return SGD([{"params": [p], **group}], lr=lr)


# 6: nothing decays, or the reverse


@pytest.mark.parametrize("steps", [19, 20, 60])
def test_steps_without_any_gradient_warn_once(steps):  # P7
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    DecoupledWD(optimizer, 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step()
    assert len([w for w in caught if "gradient in 20 steps" in str(w.message)]) == (steps >= 20)


def test_a_coefficient_of_0_for_now_is_no_reason_to_warn():  # P7
    optimizer = still()
    decay = DecoupledWD(optimizer, Linear(0, 1), total_steps=4)
    for _ in range(4):
        optimizer.step()
    assert decay.coefficients == [0.75]


# 8: messages


class Wrapper:
    """As mmengine's OptimWrapper."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups


class Slotted(Wrapper):
    __slots__ = ("optimizer",)


class Hidden:
    def __init__(self, optimizer):
        self._inner = optimizer

    optimizer = property(lambda self: self._inner)
    param_groups = property(lambda self: self._inner.param_groups)


WRAPPERS = {
    "plain": lambda o: (Wrapper(o), "optimizer"),
    "of a wrapper": lambda o: (Wrapper(Wrapper(o)), "optimizer.optimizer"),
    "slots": lambda o: (Slotted(o), "optimizer"),
    "property": lambda o: (Hidden(o), "_inner"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_only_looks_like_an_optimizer_is_told_of_its_attribute(kind):  # P10
    wrapper, name = WRAPPERS[kind](still())
    with pytest.raises(TypeError, match=rf"attach to its '{name}'") as error:
        DecoupledWD(wrapper, 0.1)
    assert "DeepSpeed" not in str(error.value)


@pytest.mark.parametrize("scale_by", ["lr", "lr_ratio", "lr_squared"])
def test_lr_none_is_refused_when_attaching(scale_by):  # P10
    optimizer = still()
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="lr=None.*scale_by='none', or a callable"):
        DecoupledWD(optimizer, 0.1, scale_by=scale_by)
    DecoupledWD(optimizer, 0.1, scale_by="none")


ASSIGNED = [("wd", 0.7), ("exclude", "bias"), ("max_lr", 1.0), ("quantum", 0), ("cautious", True)]


@pytest.mark.parametrize(("name", "value"), ASSIGNED)
@pytest.mark.parametrize(
    "make", [lambda: DecoupledWD(still(), 0.1), *[lambda a=a: a(0.1) for a in ADAPTERS]]
)
def test_an_argument_that_is_assigned_takes_effect_or_raises(make, name, value):  # P10
    decay = make()
    with pytest.raises(AttributeError, match="fixed when DecoupledWD is built"):
        setattr(decay, name, value)
    assert getattr(decay, name) != value


# 9: many optimizers


# 14: no-decay groups


def two_groups(own):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == is_matrix], "weight_decay": wd}
        for is_matrix, wd in zip((True, False), own)
    ]
    return model, groups


@pytest.mark.parametrize(("own", "count"), [((0.1, 0), 0), ((0, 0), 1), ((0.1, 0.1), 0)])
def test_vectors_in_a_group_of_their_own_are_asked_about_once(own, count):  # P7
    model, groups = two_groups(own)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = SGD(groups, lr=0.1)
        decay = DecoupledWD(optimizer, 0.1, model=model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(3):
            optimizer.step()
    assert len(caught) == count
    no_decay = [row.not_decaying.tensors for row in decay.describe()]
    assert no_decay == ([0, 3] if own == (0.1, 0) else [0, 0])


def test_trainer_s_second_group_does_not_decay_at_a_weight_decay_of_0():  # P7
    class Net(StillNet):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(1)

        def forward(self, x, labels=None):
            return {"loss": self.norm(self.layer(x)).sum() * 0, "logits": x}

    trainer = hf_trainer(TrainerWD(1.0), model=Net(), weight_decay=0.0, epochs=1)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    for name, p in trainer.model.state_dict().items():
        factor = 0.9**4 if name == "layer.weight" else 1
        torch.testing.assert_close(p, before[name] * factor)


# 16, 17: resuming and lengths


@pytest.mark.parametrize("loads", [True, False])
def test_a_forgotten_load_state_dict_warns(loads):  # P6
    optimizer = Adam(still().param_groups[0]["params"], lr=0.1)
    decay = DecoupledWD(optimizer, Linear(1, 0), total_steps=8)
    for _ in range(4):
        optimizer.step()
    state = decay.state_dict()
    decay.detach()
    decay = DecoupledWD(optimizer, Linear(1, 0), total_steps=8)
    if loads:
        decay.load_state_dict(state)
        optimizer.step()
        assert decay.coefficients == [0.5]
        return
    with pytest.warns(UserWarning, match="load_state_dict"):
        optimizer.step()


def test_more_steps_than_total_steps_warn_once():  # P6
    optimizer = still()
    DecoupledWD(optimizer, Linear(1, 0), total_steps=2)
    optimizer.step()
    optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            optimizer.step()
    assert ["total_steps" in str(w.message) for w in caught] == [True]


# 18, 19: words, and the wrong adapter


def test_the_wrong_adapter_names_the_right_module():  # P10
    runs = {
        "fastai": lambda decay: quietly(learner(decay), "fit", 1, 0.1),
        "lightning": lambda decay: lightning_trainer(decay, epochs=1).fit(StillModule()),
        "transformers": lambda decay: hf_trainer(decay, epochs=1).train(),
    }
    adapters = {"fastai": FastaiWD, "lightning": LightningWD, "transformers": TrainerWD}
    failures = []
    for framework, run in runs.items():
        for name, adapter in adapters.items():
            if name == framework:
                continue
            try:
                run(adapter(0.1))
            except Exception as error:
                if f"wd_callbacks.{framework}" not in str(error):
                    failures.append(f"{name} in {framework}: {type(error).__name__} {error}")
            else:
                failures.append(f"{name} in {framework}: nothing said")
    assert failures == []


def test_the_plain_one_as_a_callback_names_the_others():  # P10
    with pytest.raises(TypeError, match=r"wd_callbacks\.fastai.*wd_callbacks\.transformers"):
        DecoupledWD(0.1)


TWICE = {
    "fastai": lambda: quietly(learner(FastaiWD(0.1), FastaiWD(0.2)), "fit", 1, 0.1),
    "lightning": lambda: lightning_trainer(LightningWD(0.1), LightningWD(0.2)).fit(StillModule()),
    "transformers": lambda: hf_trainer(TrainerWD(0.1), TrainerWD(0.2)).train(),
}


@pytest.mark.parametrize("framework", TWICE)
def test_two_in_one_run_are_to_be_merged(framework):  # P10
    with pytest.raises((ValueError, RuntimeError), match="merge"):
        TWICE[framework]()


# 20: messages that had to be read twice


def test_a_mapping_of_optimizers_suggests_the_argument():  # P10
    class Two(StillModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [SGD([p], lr=0.1) for p in self.parameters()]

    with pytest.raises(ValueError, match=r"optimizers=(\[1\]|1)"):
        lightning_trainer(LightningWD({1: 0.1}), epochs=1).fit(Two())


def test_one_param_group_is_one():  # P10
    with pytest.raises(ValueError, match=r"has 1 param group[^s]"):
        DecoupledWD(still(), [0.1, 0.2])


@pytest.mark.parametrize(
    "entry", [nn.LayerNorm(8), [nn.LayerNorm(8)], nn.Sequential(nn.LayerNorm(8))]
)
def test_an_instance_in_exclude_asks_for_its_type(entry):  # P10
    with pytest.raises(TypeError, match="without parentheses"):
        DecoupledWD(still(), 0.1, model=nn.Linear(2, 2), exclude=entry)


def test_a_parameter_in_exclude_is_shown_by_its_shape():  # P10
    model = nn.Linear(100, 100)
    with pytest.raises(TypeError, match=r"shape \(100, 100\).*name") as error:
        DecoupledWD(still(), 0.1, model=model, exclude=[model.weight])
    assert len(str(error.value)) < 400


def test_a_changed_schedule_is_shown_by_name():  # P9
    optimizer = still()
    decay = DecoupledWD(optimizer, Cosine(0.04, 0.4), total_steps=4)
    optimizer.step()
    state = decay.state_dict()
    decay.detach()
    with pytest.warns(UserWarning, match=r"Cosine\(start=0.04, end=0.4\).*and is 0.3 in this"):
        DecoupledWD(optimizer, 0.3, total_steps=4).load_state_dict(state)


def test_warnings_point_at_the_user_s_line():
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    DecoupledWD(optimizer, 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(20):
            optimizer.step()
    assert [w.filename for w in caught] == [__file__]


# 22: small things


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_print_shows_the_arguments(adapter):
    assert repr(adapter(Linear(1, 0), exclude="bias")) == (
        "DecoupledWD(Linear(start=1, end=0), exclude=['bias'])"
    )
    assert repr(adapter(0.1)) == "DecoupledWD(0.1)"
    assert repr(copy.deepcopy(adapter(0.1))) == repr(pickle.loads(pickle.dumps(adapter(0.1))))


def test_fastai_refuses_the_class_for_an_instance():  # P10
    with pytest.raises(TypeError, match="expected an instance"):
        learner(FastaiWD)
    with pytest.raises(TypeError, match="expected an instance"):
        quietly(learner(), "fit", 1, 0.1, cbs=FastaiWD)


NUMBERS = [np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.half)]


@pytest.mark.parametrize("number", NUMBERS, ids=["numpy", "0-dim array", "0-dim tensor", "half"])
@pytest.mark.parametrize("is_listed", [False, True])
def test_a_number_of_any_kind_is_a_coefficient(number, is_listed):  # P10
    optimizer = still()
    decay = DecoupledWD(optimizer, [number] if is_listed else number, max_lr=number)
    optimizer.step()
    assert decay.coefficients == [0.5]
    assert type(decay.state_dict()["arguments"]["max_lr"]) is float
