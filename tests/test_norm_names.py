"""Norms by other names: compared with the rules of Hugging Face's Trainer and of timm."""

import re
from fnmatch import fnmatch

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, Trainer

from wd_callbacks.core.selection import Selection


def excluded(model, entries):
    found = Selection(entries, [], model).look_up(model.parameters())
    return {name for name, p in model.named_parameters() if found[p].exclude is not None}


def is_norm(name, model):
    owner, _, _ = name.rpartition(".")
    kind = type(model.get_submodule(owner)).__name__
    return bool(re.search("norm", kind, re.IGNORECASE))


# Usual norms, norms with other names, and gated ones.
ARCHITECTURES = ["bert", "llama", "convnext", "mamba2", "qwen3_next"]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name in CONFIG_MAPPING])
def test_norms_that_the_trainer_spares_are_norms(name):
    config_class = CONFIG_MAPPING[name]
    with torch.device("meta"):
        model = MODEL_MAPPING[config_class](config_class())
    decaying = set(Trainer.get_decay_parameter_names(None, model))
    spared = {name for name, _ in model.named_parameters()} - decaying
    norms = {name for name in spared if is_norm(name, model)}
    assert norms
    assert norms <= excluded(model, ["bias", "norm"])


NAMES = [
    "Qwen3NextRMSNormGated", "RmsNormAct2d", "LayerNormFp32", "FrozenBatchNorm2d", "GroupNormAct",
    "InstanceNormAct", "EvoNorm2dS0", "FilterResponseNormTlu2d", "SimpleNorm", "SimpleNorm2d",
]  # fmt: skip
OTHER_NAMES = ["NormalizedLinear", "WeightNormLinear", "Normalizer", "Enormous"]


def test_a_norm_is_known_by_the_name_of_its_class():
    """A class that only sounds like a norm is none."""
    kinds = {name: type(name, (nn.Linear,), {}) for name in [*NAMES, *OTHER_NAMES]}
    model = nn.ModuleDict({name: kind(1, 1, bias=False) for name, kind in kinds.items()})
    assert excluded(model, ["norm"]) == {f"{name}.weight" for name in NAMES}


# With names that no_weight_decay() returns, in some; a token, relative positions, scales.
TIMM = ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"]
TIMM += ["beit_base_patch16_224", "tiny_vit_5m_224", "nfnet_f0"]


@pytest.mark.parametrize("name", TIMM)
def test_vector_and_marked_are_timm_s_rule(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    skipped = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=skipped)
    spared = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    theirs = {name for name, p in model.named_parameters() if id(p) in spared}
    assert excluded(model, ["vector", "marked"]) == theirs


@pytest.mark.parametrize("marks", [["0.w*"], ("*.bias",), {"?.weight"}, ["[01].weight"]], ids=str)
def test_no_weight_decay_may_give_globs(marks):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.no_weight_decay = lambda: marks
    names = {name for name, _ in model.named_parameters()}
    right = {name for name in names if any(fnmatch(name, mark) for mark in marks)}
    assert excluded(model, ["marked"]) == right
