"""The two tasks: real data that every machine has, and the small networks that learn it.

Digits: scikit-learn's 1,797 images of 8x8 pixels. Text: the source files of Python's standard
library, a character at a time, split by module.
"""

from __future__ import annotations

import functools
import sysconfig
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

PIXELS, HIDDEN, CLASSES = 64, 64, 10
SYMBOLS, LENGTH = 128, 64  # characters of the alphabet, and how many the transformer sees
WRONG_LABELS = 0.2  # of the digits, or every network comes to 99 %
NEW_CLASS = 5  # the digits from here on are new to a network that was trained on the others

Split = tuple[Tensor, Tensor]  # inputs and targets


@functools.cache
def images() -> Split:
    """All images, with values in [0, 1], and their labels."""
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    return x.float() / 16, y


def cut(inputs: Tensor, targets: Tensor, order: Tensor, sizes: list[int]) -> list[Split]:
    """Splits the rows in this order, at these places."""
    return [(inputs[part], targets[part]) for part in order.tensor_split(sizes)]


def digits(seed: int, count: int) -> list[Split]:
    """``count`` images to train on; the halves of the others to choose with and to test on.

    A fifth of all labels is wrong.
    """
    x, y = images()
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=draw)
    wrong = torch.rand(len(y), generator=draw) < WRONG_LABELS
    y = torch.where(wrong, (y + torch.randint(1, CLASSES, y.shape, generator=draw)) % CLASSES, y)
    return cut(x, y, order, [count, count + (len(y) - count) // 2])


def old_digits() -> Split:
    """All images of the digits 0 to 4."""
    x, y = images()
    return x[y < NEW_CLASS], y[y < NEW_CLASS]


def new_digits(seed: int, count: int) -> list[Split]:
    """``count`` images of the digits 5 to 9, as many of each, to train on.

    The halves of the others are to choose with and to test on.
    """
    x, y = images()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    order = order[y[order] >= NEW_CLASS]
    each = count // (CLASSES - NEW_CLASS)
    few = torch.cat([order[y[order] == digit][:each] for digit in range(NEW_CLASS, CLASSES)])
    order = torch.cat([few, order[~torch.isin(order, few)]])
    return cut(x, y, order, [count, count + (len(order) - count) // 2])


@functools.cache
def source(package: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Source files as one symbol per byte: modules to train on, to choose with, to test on.

    Args:
        package: A package, split by its submodules. Empty: the standard library.
    """
    spec = find_spec(package) if package else None
    locations = list(spec.submodule_search_locations or []) if spec else []
    root = Path(locations[0] if locations else sysconfig.get_paths()["stdlib"])
    parts: list[list[bytes]] = [[], [], []]
    for path in sorted(root.rglob("*.py")):
        names = path.relative_to(root).parts
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(names):
            continue
        place = zlib.crc32(names[0].removesuffix(".py").encode()) % 10
        parts[(place == 0) + 2 * (place == 1)].append(path.read_bytes())
    joined = (bytearray(b"".join(files)) for files in parts)
    train, valid, test = (torch.frombuffer(p, dtype=torch.uint8).clamp(max=127) for p in joined)
    return train, valid, test


def blocks(symbols: Tensor, count: int, seed: int) -> Split:
    """``count`` pieces from random places, and the same moved on by a symbol."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(symbols) - LENGTH, (count, 1), generator=draw)
    pieces = symbols[starts + torch.arange(LENGTH + 1)].long()
    return pieces[:, :-1], pieces[:, 1:]


def batches(split: Split, size: int, seed: int) -> Iterator[Split]:
    """Batches without end: one order of all rows after the other, cut into equal pieces."""
    draw, rest = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    while True:
        while len(rest) < size:
            rest = torch.cat([rest, torch.randperm(len(split[0]), generator=draw)])
        now, rest = rest[:size], rest[size:]
        yield split[0][now], split[1][now]


class Block(nn.Module):
    """A layer of the transformer, normalized before each part."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Adds attention and a small network to ``x`` [batch, length, width]."""
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Predicts the next character; 0.63 million weights at a width of 128."""

    def __init__(self, width: int, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, width)
        self.position = nn.Parameter(torch.zeros(LENGTH, width))
        self.body = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, SYMBOLS, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits [batch, length, symbol]."""
        return self.head(self.norm(self.body(self.embedding(x) + self.position)))


class Perceptron(nn.Module):
    """Classifies digits; its hidden layer is normalized if ``norm``."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        middle = nn.LayerNorm(HIDDEN) if norm else nn.Identity()
        self.body = nn.Sequential(nn.Linear(PIXELS, HIDDEN, bias=not norm), middle, nn.ReLU())
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits [batch, class]."""
        return self.head(self.body(x))
