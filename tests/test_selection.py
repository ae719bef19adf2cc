"""Every form of ``exclude``, on a model that has all kinds of layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from wd_callbacks.selection import Selection
from wd_callbacks.torch import DecoupledWD


class ScaleNorm(nn.Module):
    """A normalization layer from elsewhere."""

    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.bag = nn.EmbeddingBag(5, 4)
        self.norms = nn.ModuleDict(
            {
                "batch": nn.BatchNorm1d(4),
                "batch3": nn.BatchNorm3d(4),
                "sync": nn.SyncBatchNorm(4),
                "instance": nn.InstanceNorm2d(4, affine=True),
                "layer": nn.LayerNorm(4),
                "group": nn.GroupNorm(2, 4),
                "rms": nn.RMSNorm(4),
                "scale": ScaleNorm(),
            }
        )
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.rnn = nn.LSTM(4, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        self.biased = nn.Bilinear(4, 4, 2)
        self.pos = nn.Parameter(torch.ones(3))
        self.pos._no_weight_decay = True
        self.token = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self):
        return {"token", "absent"}


def excluded(*entries, model=None):
    model = Zoo() if model is None else model
    decays = Selection(entries, model)
    return {name for name, p in model.named_parameters() if not decays(p)}


EVERY = {name for name, _ in Zoo().named_parameters()}
BIASES = {
    name
    for name in EVERY
    if name.endswith((".bias", "in_proj_bias", "bias_k", "bias_v")) or ".bias_" in name
}
NORMS = {name for name in EVERY if name.startswith("norms.")}

FORMS = [
    (["bias"], BIASES),
    (["norm"], NORMS),
    (["embedding"], {"embed.weight", "bag.weight"}),
    (["marked"], {"pos", "token"}),
    (["bias", "norm", "marked"], BIASES | NORMS | {"pos", "token"}),
    (["head.*"], {"head.weight", "head.bias"}),
    (["head.weight"], {"head.weight"}),
    (["*.weight_[ih]h_l0"], {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}),
    ([nn.LayerNorm], {"norms.layer.weight", "norms.layer.bias"}),
    (["torch.nn.LayerNorm"], {"norms.layer.weight", "norms.layer.bias"}),
    (["torch.nn.modules.linear.Bilinear"], {"biased.weight", "biased.bias"}),
    ([nn.MultiheadAttention], {name for name in EVERY if name.startswith("attention.")}),
    ([lambda name, p: p.ndim < 2 and name.startswith("body")], {"body.0.bias"}),
    ([], set()),
]


@pytest.mark.parametrize(("entries", "expected"), FORMS)
def test_every_form(entries, expected):  # P7
    assert excluded(*entries) == expected


def test_the_words_find_something_and_others_stay():
    assert len(BIASES) > 10
    assert "in_proj_bias" in str(BIASES)
    assert "rnn.bias_ih_l0" in BIASES
    assert "attention.bias_k" in BIASES
    assert "biased.weight" not in BIASES


@pytest.mark.parametrize("word", ["bias", "norm", "embedding", "marked"])
def test_the_words_may_match_nothing(word):  # P7
    assert excluded(word, model=nn.Sequential(nn.Linear(2, 2, bias=False))) == set()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("haed.*", r"exclude entry 'haed\.\*' matches no parameter .* nearest are .*'head\.bias'"),
        ("norms", "exclude entry 'norms' matches no parameter .* nearest are .*'norm'"),
        ("torch.nn.Conv2d", "exclude entry 'torch.nn.Conv2d' matches no parameter"),
        (nn.Conv2d, "exclude entry <class 'torch.nn.*Conv2d'> matches no parameter"),
        (lambda name, p: False, "exclude entry <function .* matches no parameter"),
    ],
)
def test_an_entry_that_matches_nothing_is_an_error(entry, message):  # P7
    with pytest.raises(ValueError, match=message):
        excluded(entry)


@pytest.mark.parametrize("entry", [3, None, 0.1, {"bias": True}, ["bias"]])
def test_what_is_no_entry(entry):  # P10
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"exclude holds .*, expected one of 'bias', "):
        DecoupledWD(optimizer, 0.1, exclude=[entry])


def test_a_predicate_s_own_error_names_the_parameter():  # P7
    def predicate(name, p):
        return p.shape[1] > 2

    with pytest.raises(IndexError, match=r"out of range \(in the exclude predicate .* at param"):
        excluded(predicate)


def test_tied_parameters_have_several_names():  # P7
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.warns(UserWarning, match=r"some of its names only.*: embed\.weight, head\.weight"):
        assert excluded("embedding", model=model) == {"embed.weight"}
    with pytest.warns(UserWarning, match="some of its names only"):
        assert excluded("head.*", model=model) == {"embed.weight"}
    assert excluded("*.weight", model=model) == {"embed.weight"}


def test_the_prefixes_of_wrappers_are_no_part_of_a_name():  # P12
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), nn.Linear(2, 2))
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    names = {name for name, _ in wrapped.named_parameters()}
    assert any("_orig_mod" in name and "_checkpoint_wrapped_module" in name for name in names)
    decays = Selection(["0.weight"], wrapped)
    assert [tuple(p.shape) for p in wrapped.parameters() if not decays(p)] == [(2, 2)]
    own = nn.ModuleDict({"module": nn.Linear(2, 2)})  # a name of the user's
    assert excluded("module.bias", model=own) == {"module.bias"}


def test_flattened_parameters_are_refused():  # P12
    model = nn.Module()
    model._flat_param = nn.Parameter(torch.ones(9))
    with pytest.raises(ValueError, match=r"FSDP has flattened them: .* use_orig_params=True"):
        excluded("bias", model=model)


def model_and_optimizer():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    for p in model.parameters():
        p.data.fill_(1)
        p.grad = torch.zeros_like(p)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def decayed(model):
    return [name for name, p in model.named_parameters() if (p < 1).all()]


def test_a_plain_loop():  # P2, P7
    model, optimizer = model_and_optimizer()
    DecoupledWD(optimizer, 0.5, exclude=["bias", nn.LayerNorm], model=model)
    optimizer.step()
    assert decayed(model) == ["0.weight", "2.weight"]


def test_a_single_entry_needs_no_list():
    model, optimizer = model_and_optimizer()
    DecoupledWD(optimizer, 0.5, exclude="*.weight", model=model)
    optimizer.step()
    assert decayed(model) == ["0.bias", "1.bias", "2.bias"]


def test_a_plain_loop_needs_the_model():  # P10
    _, optimizer = model_and_optimizer()
    with pytest.raises(ValueError, match="exclude needs the names of the parameters: give model"):
        DecoupledWD(optimizer, 0.5, exclude="bias")


def test_parameters_that_join_the_model_later():  # P5
    model, optimizer = model_and_optimizer()
    DecoupledWD(optimizer, 0.5, exclude="bias", model=model)
    model.append(nn.Linear(2, 2))
    for p in model[3].parameters():
        p.data.fill_(1)
        p.grad = torch.zeros_like(p)
    optimizer.add_param_group({"params": list(model[3].parameters())})
    optimizer.step()
    assert decayed(model) == ["0.weight", "1.weight", "2.weight", "3.weight"]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"]
)
def test_copies_exclude_the_same(duplicate):  # P9
    model, optimizer = model_and_optimizer()
    decay = DecoupledWD(optimizer, 0.5, exclude="bias", model=model)
    other, stepped, _ = duplicate((model, optimizer, decay))
    for p in other.parameters():
        p.grad = torch.zeros_like(p)
    stepped.step()
    assert decayed(other) == ["0.weight", "1.weight", "2.weight"]


def test_other_entries_are_told_when_a_run_is_resumed():  # P9
    model, optimizer = model_and_optimizer()
    state = DecoupledWD(optimizer, 0.5, exclude="bias", model=model).state_dict()
    model, optimizer = model_and_optimizer()
    decay = DecoupledWD(optimizer, 0.5, exclude=["bias", nn.LayerNorm], model=model)
    with pytest.warns(UserWarning, match=r"exclude was \['bias'\] .* \['bias', 'torch.nn"):
        decay.load_state_dict(state)


def test_fastai_excludes_by_the_learner_s_model():  # P2, P7
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    from wd_callbacks.fastai import DecoupledWD

    data = [(torch.zeros(2), torch.ones(2))] * 2
    dls = DataLoaders.from_dsets(data, data, bs=2, device="cpu")
    model, _ = model_and_optimizer()
    learn = Learner(dls, model, lambda y, _: 0 * y.sum(), lr=0.1, wd_bn_bias=True)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=DecoupledWD(0.5, exclude=["bias"]))
    assert decayed(model) == ["0.weight", "1.weight", "2.weight"]
    learn.create_opt()
    model[0].weight.data.fill_(1)
    with pytest.raises(ValueError, match="matches no parameter"):
        learn.fit(1, cbs=DecoupledWD(0.5, exclude=["heads.*"]))
    assert "0.weight" not in decayed(model)


@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")
def test_lightning_excludes_by_the_module():  # P7
    import pytorch_lightning as pl
    from lightning_models import loader, model_class, quiet_trainer

    from wd_callbacks.lightning import DecoupledWD

    def sgd(module):
        return torch.optim.SGD(module.parameters(), lr=1e-9)

    def fit(exclude):
        module = model_class(pl)(sgd)
        for p in module.parameters():
            p.data.fill_(1)
        decay = DecoupledWD(0.1, scale_by="none", exclude=exclude)
        quiet_trainer(pl, decay, max_epochs=1).fit(module, loader(2))
        return [name for name, p in module.named_parameters() if (p < 0.95).all()]

    assert fit(["bias"]) == ["backbone.weight", "head.weight"]
    assert fit(["head.*"]) == ["backbone.weight", "backbone.bias"]
    with pytest.raises(ValueError, match=r"matches no parameter .* nearest are .*'head.bias'"):
        fit(["hea.bias"])


def test_a_glob_imports_no_script_of_that_name(tmp_path, monkeypatch):  # P7
    (tmp_path / "head.py").write_text("raise RuntimeError('this is a script')")
    monkeypatch.syspath_prepend(tmp_path)
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    for entry in ("head.*", "head.weight"):
        decays = Selection([entry], model)
        assert not decays(model["head"].weight)
        assert decays(model["body"].weight)


def test_words_mean_the_tensors_that_parametrizations_make():  # P7
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrizations.orthogonal(model[1])
    for module in model[1:]:
        nn.utils.parametrize.register_parametrization(module, "bias", nn.Softplus())
    expected = {
        "embedding": {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
        "bias": {"1.parametrizations.bias.original", "2.parametrizations.bias.original"},
        "norm": {"2.weight", "2.parametrizations.bias.original"},
    }
    for word, names in expected.items():
        decays = Selection([word], model)
        assert {name for name, p in model.named_parameters() if not decays(p)} == names
