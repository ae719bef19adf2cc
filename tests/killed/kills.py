"""How a training program dies, and what it finds when it is started again."""

from __future__ import annotations

import argparse
import inspect
import io
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import torch


def arguments() -> argparse.Namespace:
    """The command line of a program: what it trains, where it saves, and how it is to die."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variant")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", type=int, help="die in the middle of this batch")
    parser.add_argument("--tear", type=int, help="die while saving, at this batch or later")
    parser.add_argument(
        "--pause", type=float, default=0.0, help="seconds that a batch lasts longer"
    )
    return parser.parse_args()


class Fate:
    """When a program dies by its own hand; it says which batch it is at, for those that kill it."""

    def __init__(self, kill: int | None = None, tear: int | None = None, pause: float = 0.0):
        self.kill, self.tear, self.pause = kill, tear, pause
        self.batch = 0

    def start(self, batch: int) -> None:
        """A batch starts."""
        self.batch = batch
        if self.pause:
            print(batch, flush=True)
            time.sleep(self.pause)

    def middle(self) -> None:
        """The batch is half done."""
        if self.batch == self.kill:
            die()

    def save(self, state: dict, path: Path) -> None:
        """Leaves half of the file where this is the end."""
        if self.tear is not None and self.batch >= self.tear:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            die()


def die() -> None:
    """As the kernel does it when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def newest(folder: Path) -> tuple[Path | None, dict]:
    """The newest checkpoint of those that load, with what it holds; a kill may tear the last."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda it: it.stat().st_mtime_ns, reverse=True):
        try:
            return path, torch.load(path, weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):
            continue
    return None, {}


def safely(trainer: Any) -> dict[str, bool]:
    """Has a Lightning of 2.6 or later unpickle nothing but plain data when it resumes."""
    known = inspect.signature(trainer.fit).parameters
    return {"weights_only": True} if "weights_only" in known else {}
