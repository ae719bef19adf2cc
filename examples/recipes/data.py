"""Small real data for the recipes, without a download."""

import functools
import sysconfig
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's digits: images (64 values in [0, 1]) and labels.

    The first 1,400 are to train on, the other 397 to test.
    """
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    x = x.float() / 16
    return x[:1400], y[:1400], x[1400:], y[1400:]


@functools.cache
def text(files: int = 40) -> Tensor:
    """Return source files of Python's standard library as tokens in [0, 128), one per byte."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:files]
    source = bytearray(b"".join(path.read_bytes() for path in paths))
    return torch.frombuffer(source, dtype=torch.uint8).long().clamp(max=127)


def blocks(tokens: Tensor, count: int, length: int, seed: int) -> Tensor:
    """Return ``count`` blocks of ``length`` tokens from random places."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length, (count, 1), generator=generator)
    return tokens[starts + torch.arange(length)]
