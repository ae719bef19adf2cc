"""Every form of ``exclude``, on a model that has all kinds of layers (P7)."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters import each_adapter, no_loss, run
from helpers import pickled, zero_gradients
from torch import nn

from wd_callbacks.core.selection import Selection
from wd_callbacks.torch import DecoupledWD


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.bag = nn.Embedding(5, 4), nn.EmbeddingBag(5, 4)
        kinds = nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.RMSNorm
        norms = *(kind(4) for kind in kinds), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        self.norms = nn.ModuleDict({type(norm).__name__: norm for norm in norms})
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.rnn = nn.LSTM(4, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        self.biased = nn.Bilinear(4, 4, 2)
        self.pos, self.token = (nn.Parameter(torch.ones(3)) for _ in range(2))
        self.pos._no_weight_decay = True

    def no_weight_decay(self):
        return {"token", "absent"}


def excluded(*entries, model=None):
    """The names of the parameters that one step with the decay leaves as they are."""
    model = Zoo() if model is None else model
    for p in model.parameters():
        p.data.fill_(1)
    zero_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DecoupledWD(optimizer, 0.5, exclude=entries, model=model)
    optimizer.step()
    return {name for name, p in model.named_parameters() if (p == 1).all()}


EVERY = {name for name, _ in Zoo().named_parameters()}
BIASES = {name for name in EVERY if "bias" in name} - {"biased.weight"}
NORMS = {name for name in EVERY if name.startswith("norms.")}
MARKED = {"pos", "token"}

FORMS = [  # entries of exclude, and the parameters that do not decay
    (["bias"], BIASES),
    (["norm"], NORMS),
    (["embedding"], {"embed.weight", "bag.weight"}),
    (["marked"], MARKED),
    (["bias", "norm", "marked"], BIASES | NORMS | MARKED),
    (["body.0.weight"], {"body.0.weight"}),
    (["*.weight_[ih]h_l0"], {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}),
    ([nn.LayerNorm], {"norms.LayerNorm.weight", "norms.LayerNorm.bias"}),
    (["torch.nn.Bilinear"], {"biased.weight", "biased.bias"}),
    ([nn.MultiheadAttention], {name for name in EVERY if name.startswith("attention.")}),
    ([lambda name, p: p.ndim < 2 and name.startswith("body")], {"body.0.bias"}),
    ([], set()),
]


@pytest.mark.parametrize(
    ("entries", "expected"), FORMS, ids=[str(row[0]).split(" at ")[0] for row in FORMS]
)
def test_every_form(entries, expected):
    assert excluded(*entries) == expected


def test_the_words_may_match_nothing():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    assert excluded("bias", "norm", "embedding", "marked", "vector", model=model) == set()


def test_tied_parameters_have_several_names():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    model["rest"] = nn.Linear(2, 2)
    for entry in ("embedding", "head.*"):
        with pytest.warns(UserWarning, match="names"):
            assert excluded(entry, model=model) == {"embed.weight"}
    assert excluded("*.weight", model=model) == {"embed.weight", "rest.weight"}


def test_the_prefixes_of_wrappers_are_no_part_of_a_name():  # P12
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), nn.Linear(2, 2))
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    expected = {"module._orig_mod.0._checkpoint_wrapped_module.weight"}
    assert excluded("0.weight", model=wrapped) == expected
    own = nn.ModuleDict({"module": nn.Linear(2, 2)})  # a name of the user's
    assert excluded("module.bias", model=own) == {"module.bias"}


def test_flattened_parameters_are_refused():  # P12
    model = nn.Module()
    model._flat_param = nn.Parameter(torch.ones(9))
    with pytest.raises(ValueError, match="use_orig_params=True"):
        excluded("bias", model=model)


def test_a_glob_imports_no_script_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "head.py").write_text("raise RuntimeError('this is a script')")
    monkeypatch.syspath_prepend(tmp_path)
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert excluded("head.*", model=model) == {"head.weight", "head.bias"}
    assert excluded("head.weight", model=model) == {"head.weight"}


def test_words_mean_the_tensors_that_parametrizations_make():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrizations.orthogonal(model[1])
    for module in model[1:]:
        nn.utils.parametrize.register_parametrization(module, "bias", nn.Softplus())
    weights = {f"0.parametrizations.weight.original{i}" for i in (0, 1)}
    biases = [f"{i}.parametrizations.bias.original" for i in (1, 2)]
    assert excluded("embedding", model=model) == weights
    assert excluded("bias", model=model) == {*biases}
    assert excluded("norm", model=model) == {"2.weight", biases[1]}


# In a run


def network():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    for p in model.parameters():
        p.data.fill_(1)
    zero_gradients(model)
    return model


def decayed(model):
    return [name for name, p in model.named_parameters() if (p < 1).all()]


@each_adapter
def test_excludes_by_the_model_of_each_adapter(adapter):  # P2
    model, exclude = network(), ["bias", nn.LayerNorm, "*2.weight"]
    run(adapter, {"wd": 0.5, "exclude": exclude}, model, loss=no_loss)
    assert decayed(model) == ["0.weight"]


def plain_decay(**arguments):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, DecoupledWD(optimizer, 0.5, model=model, **arguments)


def test_parameters_that_join_the_model_later():  # P5
    model, optimizer, _ = plain_decay(exclude="bias")
    model.append(nn.Linear(2, 2))
    for p in model[3].parameters():
        p.data.fill_(1)
    zero_gradients(model[3])
    optimizer.add_param_group({"params": list(model[3].parameters())})
    optimizer.step()
    assert decayed(model) == ["0.weight", "1.weight", "2.weight", "3.weight"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["copy", "pickle"])
def test_copies_exclude_the_same(duplicate):  # P9
    model, optimizer, _decay = duplicate(plain_decay(exclude="bias"))
    zero_gradients(model)
    optimizer.step()
    assert decayed(model) == ["0.weight", "1.weight", "2.weight"]


def test_other_entries_warn_when_a_run_is_resumed():  # P9
    first, second = plain_decay(exclude="bias"), plain_decay(exclude=["bias", nn.LayerNorm])
    with pytest.warns(UserWarning, match=r"exclude.*\['bias'\].*\['bias', .*LayerNorm"):
        second[2].load_state_dict(first[2].state_dict())


def test_a_layer_that_takes_over_the_parameters_of_another():  # P7
    class Scale(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.bias = norm.weight, norm.bias

    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    norm = {*model[1].parameters()}
    for expected in (norm, set()):
        found = Selection(["norm"], [], model).look_up(model.parameters())
        assert {p for p, selected in found.items() if selected.exclude == "norm"} == expected
        model[1] = Scale(model[1])
