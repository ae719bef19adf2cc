"""Compatibility of the optimizers of torch, fastai, timm and other packages.

Each is built for a matrix and a vector, and a ``DecoupledWD`` is attached to it. The table lists
the warnings and errors. Optimizers that their package cannot build here (for a GPU, or with more
arguments) are listed below it::

    python scripts/optimizers.py             # Markdown, as in docs/compatibility.md
"""

from __future__ import annotations

import importlib
import io
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from wd_callbacks.torch import DecoupledWD

Make = Callable[..., Any]


def of_module(module: str) -> Iterator[tuple[str, Make]]:
    """The optimizers among the names of a module, and what wraps one without being one."""
    for name, value in vars(importlib.import_module(module)).items():
        steps = isinstance(value, type) and {"step", "zero_grad"} <= set(dir(value))
        if steps and value is not Optimizer:
            yield name, value


def of_timm(module: str) -> Iterator[tuple[str, Make]]:
    """The optimizers that timm knows by name, with the arguments that go with the name."""
    timm = importlib.import_module(module)
    for name in [*timm.list_optimizers(), "lookahead_adamw"]:
        yield name, lambda params, name=name: timm.create_optimizer_v2(params, name)


def of_pytorch_optimizer(module: str) -> Iterator[tuple[str, Make]]:
    """The optimizers that pytorch_optimizer knows by name, and those that wrap another."""
    package = importlib.import_module(module)
    known = {name: package.load_optimizer(name) for name in package.get_supported_optimizers()}
    yield from known.items()
    yield from ((name, make) for name, make in of_module(module) if make not in known.values())


NUMBERS = {
    r"shrinks weights by [\d.e+-]+ \* lr \* wd": "shrinks weights by N * lr * wd",
    r"lr\*\*2 / [\d.e+-]+": "lr**2 / N",
    r"max_lr=[\d.e+-]+": "max_lr=N",
    r"takes [\d.e+-]+ times": "takes N times",
}
"""Numbers in the texts, which differ between optimizers."""

PACKAGES = {
    "torch.optim": of_module,
    "timm.optim": of_timm,
    "pytorch_optimizer": of_pytorch_optimizer,
    "optimi": of_module,
    "schedulefree": of_module,
    "prodigyopt": of_module,
}


def build(make: Make) -> Optimizer:
    """An optimizer around SGD, or of a matrix and a vector, or of a matrix alone."""
    model = nn.Linear(4, 4)
    params = list(model.parameters())
    sgd = torch.optim.SGD(params, lr=0.1)
    base = {"base_optimizer": torch.optim.SGD}
    for options in ({"lr": 1e-2}, {}, {"lr": 1e-2, **base}, base):
        for args in ([sgd], [params], [params[:1]], [model, params]):
            try:
                return make(*args, **options)
            except Exception as error:
                found = error
    raise found


def said_of(make: Make) -> str:
    """The error or the warnings of attaching a decay to it."""
    optimizer = build(make)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            DecoupledWD(optimizer, 0.1)
        except (TypeError, ValueError) as error:
            return anonymous(f"**refused**: {error}", optimizer)
    texts = dict.fromkeys(str(warning.message) for warning in caught)
    return anonymous("; ".join(texts), optimizer)


def anonymous(said: str, optimizer: Optimizer) -> str:
    """What was said without the optimizer's name and numbers, as it is said of others too."""
    name = type(optimizer).__name__
    said = re.sub(rf"\b(?<!as ){name}('s)?", lambda found: "its" if found[1] else "it", said)
    for pattern, text in NUMBERS.items():
        said = re.sub(pattern, text, said)
    return said


def said_by_fastai(make: Make) -> str:
    """What the callback says of one of fastai's own optimizers when a fit starts."""
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    from wd_callbacks.fastai import DecoupledWD as Callback

    data = [(torch.ones(2), torch.ones(1))] * 4
    dls = DataLoaders.from_dsets(data, data, bs=2, device="cpu")
    learn = Learner(dls, nn.Linear(2, 1), nn.functional.mse_loss, opt_func=make)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, cbs=Callback(0.1))
    said = [w for w in caught if "wd_callbacks" in w.filename or "DecoupledWD" in str(w.message)]
    return "; ".join(str(warning.message) for warning in said)


def main() -> None:
    """Tries them and prints the table."""
    told: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    unbuilt: dict[str, list[str]] = defaultdict(list)
    for package, found in PACKAGES.items():
        try:
            listed = list(found(package))
        except ImportError:
            print(f"{package} is not installed\n")
            continue
        for name, make in listed:
            try:
                with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                    warnings.simplefilter("ignore")
                    said = said_of(make)
            except Exception:
                unbuilt[package].append(name)
            else:
                told[said][package].append(name)
    try:
        from fastai import optimizer
    except ImportError:
        print("fastai is not installed\n")
    else:
        for name in ("SGD", "RMSProp", "Adam", "RAdam", "QHAdam", "Larc", "Lamb", "ranger"):
            told[said_by_fastai(getattr(optimizer, name))]["fastai"].append(name)
    count = sum(len(names) for packages in told.values() for names in packages.values())
    print(f"{count} optimizers were tried.\n")
    print("| said | of |\n| --- | --- |")
    for said in sorted(told, key=lambda said: (said.startswith("**"), said)):
        of = "; ".join(f"{package}: {', '.join(n)}" for package, n in told[said].items())
        print(f"| {said or 'nothing'} | {of} |")
    left = "; ".join(f"{package}: {', '.join(names)}" for package, names in unbuilt.items())
    print(f"\nNot built here: {left}.")


if __name__ == "__main__":
    main()
