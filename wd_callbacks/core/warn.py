"""Warnings that point at the user's line, not at ours or the framework's."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable

FRAMEWORKS = {
    "wd_callbacks",
    "torch",
    "fastai",
    "fastcore",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "pytorch_lightning",
    "transformers",
    "accelerate",
    "contextlib",
}


class DecoupledWDWarning(UserWarning):
    """The category of all warnings of this package."""


def warn(message: str) -> None:
    """Warn, as from the innermost line that is in no framework."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in FRAMEWORKS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DecoupledWDWarning, stacklevel=level)


class Once:
    """Passes each warning on to ``warn`` once.

    Args:
        warn: Where warnings go.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._given: set[Hashable] = set()

    def __call__(self, message: str, once: Hashable = None) -> None:
        """Warn, unless the same was said before: the message, or what ``once`` identifies."""
        if (once or message) not in self._given:
            self._given.add(once or message)
            self._warn(message)


def _package(module: dict[str, object]) -> str:
    return str(module.get("__name__")).partition(".")[0]
