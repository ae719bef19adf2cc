"""Which parameters an entry of ``exclude``, or a key of a ``wd`` mapping, selects in a model."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from wd_callbacks.core.checks import shown
from wd_callbacks.core.warn import warn

WORDS = ("bias", "norm", "embedding", "marked", "vector")
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
NORM_NAME = re.compile(
    r"([Rr][Mm][Ss]|Layer|Batch|Group|Instance|Evo|FilterResponse)Norm|Norm(\dd)?(Gated)?$"
)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
WRAPPED |= {"_forward_module", "_original_module"}  # Fabric's, both of the same parameters
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # they hold it as `module`

Match = Callable[[str, Tensor, Sequence[nn.Module]], bool]
"""Whether an entry selects a parameter: its full name, itself, and the modules it is in."""


# The last search in each model, as hundreds of optimizers may share one.
_LAST_SEARCHES: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()

Named = tuple[str, Tensor, tuple[nn.Module, ...]]


class Selected(NamedTuple):
    """What the entries and keys say of one parameter.

    Attributes:
        names: Its full names in the model: several if it is tied, none if the model lacks it.
        exclude: The entry that excludes it; None if none does.
        key: Index of the first key that matches it; None if none does.
    """

    names: tuple[str, ...] = ()
    exclude: Any = None
    key: int | None = None


class Selection:
    """Looks up parameters in a model.

    Args:
        exclude: Entries: the words in ``WORDS``, globs on the full parameter name, module types, as
            objects or as dotted paths, and predicates ``(name, parameter) -> bool``.
        keys: Entries of the same kinds; the first one that matches counts.
        model: The model that names the parameters, held weakly; None if it is not known.
        warn: Where warnings go.

    Raises:
        TypeError: ``model`` is not a module, or its ``no_weight_decay()`` returns no names.
        ValueError: An entry matches nothing, or needs names and there is no model.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> selection = Selection(["bias", "norm"], [], model)
        >>> found = selection.look_up(model.parameters())
        >>> [name for name, p in model.named_parameters() if found[p].exclude is None]
        ['0.weight']
    """

    def __init__(
        self,
        exclude: Sequence[Any],
        keys: Sequence[Any],
        model: nn.Module | None,
        warn: Callable[[str], None] = warn,
    ) -> None:
        if not isinstance(model, nn.Module | None):
            raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
        self._exclude, self._keys, self._warn = exclude, keys, warn
        self._model: Callable[[], nn.Module | None] = (
            _nothing if model is None else weakref.ref(model)
        )
        self._named: dict[Tensor, Selected] = {}
        self._has_lazy = False  # parameters, whose dimensions are not known yet
        self._has_warned = False
        for name, entries in (("exclude", exclude), ("wd", keys)):
            if model is None and any(entry != "vector" for entry in entries):
                raise ValueError(f"{name} needs the names of the parameters: pass model")
        if exclude or keys:
            self._search()

    def look_up(self, params: Iterable[Tensor]) -> dict[Tensor, Selected]:
        """Return what is selected of each of ``params``."""
        params = list(params)
        if self._has_lazy or any(p not in self._named for p in params):
            self._search()  # the model has changed
        return {p: self._named.get(p) or self._nameless(p) for p in params}

    def names(self) -> list[str]:
        """Return the names of all parameters of the model."""
        return [name for selected in self._named.values() for name in selected.names]

    def matched(self, key: int) -> set[Tensor]:
        """Return the parameters of the model that the key of this index selects."""
        return {p for p, selected in self._named.items() if selected.key == key}

    def release(self) -> None:
        """Drop every reference to weights."""
        self._named = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the model that belongs to them."""
        return {**vars(self), "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["_model"]
        vars(self).update(state, _model=_nothing if model is None else weakref.ref(model))

    def _search(self) -> None:
        model = self._model()
        if model is None:
            return
        named = _named_parameters(model)
        self._has_lazy = any(is_lazy(p) for _, p, _ in named)
        places = [(name, id(p), is_lazy(p), type(inside[-1])) for name, p, inside in named]
        seen = places, self._exclude, self._keys
        is_fixed = all(isinstance(e, str) and e != "marked" for e in (*self._exclude, *self._keys))
        cached = _LAST_SEARCHES.get(model)
        if is_fixed and cached is not None and cached[0] == seen:
            self._named = cached[1]
            return
        names: dict[Tensor, list[str]] = {}
        for name, p, _ in named:
            names.setdefault(p, []).append(name)
        excluded = self._matches("exclude", self._exclude, model, named)
        keyed = self._matches("wd", self._keys, model, named)
        found = {
            p: Selected(tuple(each), _first(excluded, self._exclude, p), _first(keyed, None, p))
            for p, each in names.items()
        }
        decaying = {p: each for p, each in keyed.items() if found[p].exclude is None}
        for what, matches in (("exclude", excluded), ("a key of wd", decaying)):
            self._warn_if_tied_differ(what, matches, names)
        self._named = found
        _LAST_SEARCHES[model] = seen, found

    def _matches(
        self, what: str, entries: Sequence[Any], model: nn.Module, named: Sequence[Named]
    ) -> dict[Tensor, list[int | None]]:
        """Return the index of the first entry that matches, for each name of each parameter."""
        known = [name for name, *_ in named]
        for name, p, _ in named if entries else ():
            _check_unflattened(p, name)
        tests = [_match(entry, model, known) for entry in entries]
        hits = [[test(*each) for test in tests] for each in named]
        for index, entry in enumerate(entries):
            if entry not in WORDS and not any(hit[index] for hit in hits):
                _raise_unmatched(what, entry, known)
        first: dict[Tensor, list[int | None]] = {}
        for (_, p, _), hit in zip(named, hits):
            first.setdefault(p, []).append(hit.index(True) if any(hit) else None)
        return first

    def _warn_if_tied_differ(
        self, what: str, matches: dict[Tensor, list[int | None]], names: dict[Tensor, list[str]]
    ) -> None:
        for p, each in matches.items():
            # Which entry excludes makes no difference; which key matches does.
            differ = len({index is None if what == "exclude" else index for index in each}) > 1
            if differ and p not in self._named:
                effect = "it does not decay" if what == "exclude" else "the first key counts"
                self._warn(
                    f"{what} matches a tied parameter by some of its names only, so {effect}: "
                    f"{', '.join(names[p])}. Match all of its names to make this explicit"
                )

    def _nameless(self, p: Tensor) -> Selected:
        """Select ``p``, which the model does not hold, by its dimensions alone."""
        if not is_lazy(p) and any(entry != "vector" for entry in (*self._exclude, *self._keys)):
            self._warn_of_unnamed()
        if "vector" not in self._exclude and "vector" not in self._keys:
            return Selected()
        _check_unflattened(p)
        is_vector = p.ndim < 2
        excluded = "vector" if is_vector and "vector" in self._exclude else None
        is_keyed = is_vector and "vector" in self._keys
        return Selected((), excluded, list(self._keys).index("vector") if is_keyed else None)

    def _warn_of_unnamed(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            effect = "do not decay" if self._keys else "decay"
            self._warn(
                f"the optimizer holds parameters that the model does not name. No name in exclude "
                f"or wd matches them, and they {effect}: pass the model that holds them "
                f"(DeepSpeed's flattened copies have no names)"
            )


def _nothing() -> None:
    """Stand in for a reference to a model that is not known."""


def check_entry(what: str, entry: Any) -> None:
    """Raise TypeError unless ``entry`` is of a kind that ``exclude`` or a key may have."""
    if isinstance(entry, nn.Module):
        raise TypeError(
            f"{what} holds an instance of {type(entry).__name__}, expected its type: write "
            f"{type(entry).__name__} without parentheses"
        )
    if not (isinstance(entry, str) or callable(entry)):
        hint = ": pass its name instead" if isinstance(entry, Tensor) else ""
        raise TypeError(
            f"{what} holds {shown(entry)} ({type(entry).__name__}), expected one of "
            f"{', '.join(map(repr, WORDS))}, a glob on parameter names, a module type or a "
            f"predicate (name, parameter) -> bool{hint}"
        )


def entry_name(entry: Any) -> str | None:
    """Return the text of an entry, or the path of a module type; None for a predicate."""
    if isinstance(entry, str):
        return entry
    return f"{entry.__module__}.{entry.__qualname__}" if isinstance(entry, type) else None


def clean_name(name: str) -> str:
    """Return a parameter's name without the prefixes that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def _first(
    matches: dict[Tensor, list[int | None]], entries: Sequence[Any] | None, p: Tensor
) -> Any:
    """Return the first match of any name of ``p``: its index, or the entry itself."""
    index = min((index for index in matches[p] if index is not None), default=None)
    return index if entries is None or index is None else entries[index]


def _named_parameters(model: nn.Module) -> list[Named]:
    """Return every name of every parameter, with the modules that it is in, the innermost last."""
    named: dict[Any, Named] = {}
    for each in _walk(model, (), ()):
        named.setdefault(each[:2], each)  # a wrapper may hold a module twice
    return list(named.values())


def _walk(
    module: nn.Module, path: tuple[str, ...], above: tuple[nn.Module, ...]
) -> Iterator[Named]:
    inside = (*above, module)
    for own, p in module._parameters.items():
        if p is not None:
            yield ".".join((*path, own)), p, inside
    for name, child in module._modules.items():
        if child is not None and child not in inside:
            wrapped = name in WRAPPED or (name == "module" and isinstance(module, WRAPPERS))
            yield from _walk(child, path if wrapped else (*path, name), inside)


def _check_unflattened(p: Tensor, name: str = "") -> None:
    if name.endswith("_flat_param") or type(p).__name__ == "FlatParameter":
        raise ValueError(
            "exclude and keys of wd need the parameters themselves, but FSDP has flattened them: "
            "wrap the model with use_orig_params=True, or use fully_shard"
        )


def _match(entry: Any, model: nn.Module, names: Sequence[str]) -> Match:
    """Return the test of ``entry``, in a model whose parameters have these ``names``."""
    if isinstance(entry, str) and entry in WORDS:
        return _is_marked(model) if entry == "marked" else _WORD_TESTS[entry]
    if isinstance(entry, str):
        # Only what is no glob here, as a script beside may have the name of a submodule.
        is_glob = any(fnmatch.fnmatchcase(name, entry) for name in names)
        kind = None if is_glob else _module_type(entry)
        if kind is None:
            return lambda name, p, modules: fnmatch.fnmatchcase(name, entry)
        entry = kind
    if isinstance(entry, type) and issubclass(entry, nn.Module):
        return lambda name, p, modules: any(isinstance(module, entry) for module in modules)
    return lambda name, p, modules: _predicate(entry, name, p)


def _owner(modules: Sequence[nn.Module]) -> nn.Module:
    """Return the module of a tensor, also if a parametrization computes that tensor."""
    return modules[-3] if isinstance(modules[-1], ParametrizationList) else modules[-1]


def _is_bias(name: str, p: Tensor, modules: Sequence[nn.Module]) -> bool:
    # The last part of the name, or that of the tensor which a parametrization computes.
    own = name.split(".")[-2 if isinstance(modules[-1], ParametrizationList) else -1]
    return own == "bias" or own.startswith("bias_") or own.endswith("_bias")


def _is_norm(name: str, p: Tensor, modules: Sequence[nn.Module]) -> bool:
    owner = _owner(modules)
    return isinstance(owner, NORMS) or bool(NORM_NAME.search(type(owner).__name__))


def _is_embedding(name: str, p: Tensor, modules: Sequence[nn.Module]) -> bool:
    return isinstance(_owner(modules), EMBEDDINGS)


def _is_vector(name: str, p: Tensor, modules: Sequence[nn.Module]) -> bool:
    return not is_lazy(p) and p.ndim < 2


_WORD_TESTS: dict[str, Match] = {
    "bias": _is_bias,
    "norm": _is_norm,
    "embedding": _is_embedding,
    "vector": _is_vector,
}


def _is_marked(model: nn.Module) -> Match:
    """Test ``p._no_weight_decay`` and modules' ``no_weight_decay()``, as in timm and Mamba."""
    listed: set[int] = set()
    for module in model.modules():
        names = getattr(module, "no_weight_decay", None)
        if callable(names):
            found = names()
            if not isinstance(found, Iterable):
                raise TypeError(
                    f"no_weight_decay() of {type(module).__name__} returned {found!r}, expected "
                    f"the names of parameters"
                )
            globs = tuple(found)
            for name, p in module.named_parameters(remove_duplicate=False):
                if any(fnmatch.fnmatchcase(name, glob) for glob in globs):
                    listed.add(id(p))
    return lambda name, p, modules: bool(getattr(p, "_no_weight_decay", False)) or id(p) in listed


def _module_type(path: str) -> type[nn.Module] | None:
    """Return the module type at a dotted path; None if there is none."""
    package, _, name = path.rpartition(".")
    if not package or path.startswith("."):  # the latter would be imported as a relative path
        return None
    try:
        found = getattr(importlib.import_module(package), name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _predicate(predicate: Callable[[str, Tensor], bool], name: str, p: Tensor) -> bool:
    try:
        return bool(predicate(name, p))
    except Exception as error:
        error.args = (f"{error} (in the predicate {predicate!r}, at parameter {name!r})",)
        raise


def _raise_unmatched(what: str, entry: Any, names: Sequence[str]) -> None:
    kind = "exclude entry" if what == "exclude" else "key of wd"
    message = f"{kind} {entry!r} matches no parameter of the model"
    if isinstance(entry, str):
        near = difflib.get_close_matches(entry, [*names, *WORDS], n=3, cutoff=0)
        message += f"; the nearest are {', '.join(map(repr, near))}"
        if any(name.startswith(f"{entry}.") for name in names):
            message += f". For all parameters of the module, pass '{entry}.*'"
    raise ValueError(message)
