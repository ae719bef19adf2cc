"""Norms by other names: compared with the rules of Hugging Face's Trainer and of timm."""

import re
from fnmatch import fnmatch

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PretrainedConfig, Trainer

from wd_callbacks.core.selection import Selection

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 32, "vocab_size": 64, "head_dim": 8, "num_experts": 2,
    "num_local_experts": 2, "n_routed_experts": 2, "moe_intermediate_size": 16, "image_size": 32,
    "patch_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# Gated norms, norms with other names, and the usual ones.
ARCHITECTURES = [
    "bert",
    "llama",
    "qwen3_next",
    "zamba2",
    "mamba2",
    "convnext",
    "rwkv",
    "nemotron_h",
]


def small(config_class):
    def shrink(config):
        for name, value in SMALL.items():
            if type(getattr(config, name, None)) is int:
                setattr(config, name, value)
        for value in list(vars(config).values()):
            if isinstance(value, PretrainedConfig):
                shrink(value)
        if isinstance(getattr(config, "layer_types", None), list):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        return config

    return shrink(config_class())


def build(name):
    config_class = CONFIG_MAPPING[name]
    model_class = MODEL_MAPPING[config_class]
    with torch.device("meta"):
        try:
            return model_class(small(config_class))
        except Exception:  # a size that does not fit another one
            pass
        try:
            return model_class(config_class())
        except ValueError:
            pytest.skip("this version of transformers cannot build it")


def excluded(model, entries):
    found = Selection(entries, [], model).look_up(model.parameters())
    return {name for name, p in model.named_parameters() if found[p].exclude is not None}


def is_norm(name, model):
    owner, _, _ = name.rpartition(".")
    kind = type(model.get_submodule(owner)).__name__
    return bool(re.search("norm", kind, re.IGNORECASE))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name in CONFIG_MAPPING])
def test_norms_that_the_trainer_spares_are_norms(name):
    model = build(name)
    decaying = set(Trainer.get_decay_parameter_names(None, model))
    spared = {name for name, _ in model.named_parameters()} - decaying
    ours = excluded(model, ["bias", "norm"])
    assert {each for each in spared - ours if is_norm(each, model)} == set()


NAMES = [
    "Qwen3NextRMSNormGated", "Zamba2RMSNormGated", "KimiRMSNormGated", "FusedRMSNormGated",
    "RmsNormAct2d", "LayerNormAct2d", "BatchNormAct2d", "GroupNormAct", "LlamaRMSNorm",
    "T5LayerNorm", "SimpleNorm", "RmsNorm2d", "LayerNormFp32", "FrozenBatchNorm2d", "EvoNorm2dS0",
    "FilterResponseNormTlu2d",
]  # fmt: skip
OTHER_NAMES = ["NormalizedLinear", "WeightNormLinear", "Normalizer", "Enormous"]


def test_a_norm_is_known_by_the_name_of_its_class():
    """A class that only sounds like a norm is none."""
    kinds = {name: type(name, (nn.Linear,), {}) for name in [*NAMES, *OTHER_NAMES]}
    model = nn.ModuleDict({name: kind(1, 1, bias=False) for name, kind in kinds.items()})
    assert excluded(model, ["norm"]) == {f"{name}.weight" for name in NAMES}


TIMM = [
    "resnet18", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224", "convnext_atto", "beit_base_patch16_224", "levit_128s",
    "nfnet_f0", "hiera_tiny_224", "tiny_vit_5m_224", "vit_relpos_small_patch16_224", "davit_tiny",
]  # fmt: skip


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
    class Marked(nn.Sequential):
        def no_weight_decay(self):
            return marks

    model = Marked(nn.Linear(2, 2), nn.Linear(2, 2))
    names = {name for name, _ in model.named_parameters()}
    right = {name for name in names if any(fnmatch(name, mark) for mark in marks)}
    assert excluded(model, ["marked"]) == right
