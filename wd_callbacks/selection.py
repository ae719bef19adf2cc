"""Which parameters do not decay: the entries of ``exclude``, matched against a model."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

WORDS = ("bias", "norm", "embedding", "marked")
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
NORM_ENDINGS = ("Norm", "Norm1d", "Norm2d", "Norm3d")
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # they hold it as `module`

Match = Callable[[str, Tensor, Sequence[nn.Module]], bool]
"""Whether an entry means a parameter: its full name, itself, and the modules it is in."""


class Selection:
    """Tells which parameters of a model decay.

    Args:
        exclude: Entries that say which do not: the words ``"bias"``, ``"norm"``, ``"embedding"``
            and ``"marked"``, globs on the full parameter name, module types, as objects or as
            dotted paths, and predicates ``(name, parameter) -> bool``.
        model: The model that names the parameters; None if it is not known.
        warn: Where warnings go.

    Raises:
        TypeError: The model is none, or its ``no_weight_decay()`` gives no names.
        ValueError: An entry matches nothing, or there is no model to match with.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> decays = Selection(["bias", "norm"], model)
        >>> [name for name, p in model.named_parameters() if decays(p)]
        ['0.weight']
    """

    def __init__(
        self,
        exclude: Sequence[Any],
        model: nn.Module | None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self._exclude = exclude
        self._model = model
        self._warn = warn
        self._decays: dict[Tensor, bool] = {}
        self._has_told = False
        if not isinstance(model, nn.Module | None):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if exclude:
            if model is None:
                raise ValueError("exclude needs the names of the parameters: give model")
            self._look()

    def __call__(self, p: Tensor) -> bool:
        """Whether ``p`` decays."""
        if self._exclude and p not in self._decays:
            self._look()  # the model has changed
            if p not in self._decays:
                self._decays[p] = True
                self._tell_of_strangers()
        return not self._exclude or self._decays[p]

    def _tell_of_strangers(self) -> None:
        if not self._has_told:
            self._has_told = True
            self._warn(
                "exclude goes by the model's names, and the optimizer holds parameters that have "
                "none there: they decay. Give a model that holds them; flattened copies, as "
                "DeepSpeed makes them, cannot be excluded"
            )

    def _look(self) -> None:
        assert self._model is not None
        named = list(_named_parameters(self._model))
        excluded: dict[Tensor, list[bool]] = {}
        names: dict[Tensor, list[str]] = {}
        matched: set[int] = set()
        known = [name for name, *_ in named]
        matches = [_match(entry, self._model, known) for entry in self._exclude]
        for name, p, modules in named:
            hits = {i for i, match in enumerate(matches) if match(name, p, modules)}
            matched |= hits
            excluded.setdefault(p, []).append(bool(hits))
            names.setdefault(p, []).append(name)
        for index, entry in enumerate(self._exclude):
            if index not in matched and entry not in WORDS:
                _refuse(entry, known)
        for p, each in excluded.items():
            if any(each) and not all(each) and p not in self._decays:
                self._warn(
                    f"exclude matches a parameter by some of its names only, so it does not decay: "
                    f"{', '.join(names[p])}"
                )
        self._decays = {p: not any(each) for p, each in excluded.items()}


def check_entry(entry: Any) -> None:
    """Raises TypeError where ``entry`` is nothing that ``exclude`` may hold."""
    if not (isinstance(entry, str) or callable(entry)):
        raise TypeError(
            f"exclude holds {entry!r} ({type(entry).__name__}), expected one of "
            f"{', '.join(map(repr, WORDS))}, a glob on parameter names, a module type or a "
            f"predicate (name, parameter) -> bool"
        )


def _named_parameters(model: nn.Module) -> Any:
    """Every name of every parameter, with the modules that it is in, the innermost last."""

    def walk(module: nn.Module, path: tuple[str, ...], above: tuple[nn.Module, ...]) -> Any:
        inside = (*above, module)
        for name, p in module._parameters.items():
            if p is not None:
                if name == "_flat_param":
                    raise ValueError(
                        "exclude needs the parameters by name, but FSDP has flattened them: wrap "
                        "the model with use_orig_params=True, or use fully_shard"
                    )
                yield ".".join((*path, name)), p, inside
        for name, child in module._modules.items():
            if child is not None and child not in inside:
                wrapped = name in WRAPPED or (name == "module" and isinstance(module, WRAPPERS))
                yield from walk(child, path if wrapped else (*path, name), inside)

    return walk(model, (), ())


def _match(entry: Any, model: nn.Module, names: Sequence[str]) -> Match:
    """How ``entry`` is matched, in a model whose parameters have these ``names``."""
    if entry == "bias":
        return lambda name, p, modules: _is_bias(_own_name(name, modules))
    if entry == "norm":
        return lambda name, p, modules: _is_norm(_owner(modules))
    if entry == "embedding":
        return lambda name, p, modules: isinstance(_owner(modules), EMBEDDINGS)
    if entry == "marked":
        return _is_marked(model)
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
    """The module whose tensor it is, also where a parametrization holds what that is made of."""
    return modules[-3] if isinstance(modules[-1], ParametrizationList) else modules[-1]


def _own_name(name: str, modules: Sequence[nn.Module]) -> str:
    """The last part of the name, or that of the tensor which a parametrization makes of it."""
    return name.split(".")[-2 if isinstance(modules[-1], ParametrizationList) else -1]


def _is_bias(name: str) -> bool:
    return name == "bias" or name.startswith("bias_") or name.endswith("_bias")


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, NORMS) or type(module).__name__.endswith(NORM_ENDINGS)


def _is_marked(model: nn.Module) -> Match:
    """By ``p._no_weight_decay``, or by a module's ``no_weight_decay()``, as in timm and Mamba."""
    listed: set[int] = set()
    for module in model.modules():
        names = getattr(module, "no_weight_decay", None)
        if callable(names):
            found, own = names(), dict(module.named_parameters(remove_duplicate=False))
            if not isinstance(found, Iterable):
                raise TypeError(f"no_weight_decay() of {type(module).__name__} gave {found!r}")
            listed |= {id(own[name]) for name in found if name in own}
    return lambda name, p, modules: bool(getattr(p, "_no_weight_decay", False)) or id(p) in listed


def _module_type(path: str) -> type[nn.Module] | None:
    """The module type at a dotted path; None if there is none."""
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
        error.args = (f"{error} (in the exclude predicate {predicate!r}, at parameter {name!r})",)
        raise


def _refuse(entry: Any, names: Sequence[str]) -> None:
    message = f"exclude entry {entry!r} matches no parameter of the model"
    if isinstance(entry, str):
        near = difflib.get_close_matches(entry, [*names, *WORDS], n=3, cutoff=0)
        message += f"; the nearest are {', '.join(map(repr, near))}"
    raise ValueError(message)
