"""How a training program is killed, and which checkpoint it goes on from."""

from __future__ import annotations

import importlib
import inspect
import io
import math
import os
import pickle
import signal
from pathlib import Path

import torch


class Kill:
    """Kills its own process in the middle of a batch, or in its first save from a batch on."""

    def __init__(self, middle=math.inf, saving=math.inf):
        self.at_middle, self.at_saving = middle, saving
        self.batch = 0  # the program's current one

    def middle(self):
        if self.batch == self.at_middle:
            os.kill(os.getpid(), signal.SIGKILL)

    def save(self, state, path):
        """Writes half of the file, if it kills."""
        if self.batch >= self.at_saving:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            os.kill(os.getpid(), signal.SIGKILL)


def run(name, folder, **kill):
    """Trains by the program of this name, in a process of its own, and saves how it ends."""
    os.environ["TMPDIR"] = str(folder)  # Lightning writes there first: a kill may leave the file
    end = importlib.import_module(f"kill_and_resume.{name}").train(folder, Kill(**kill))
    torch.save(end, folder / "end.pt")


def newest(folder):
    """The newest checkpoint that loads, and its content; a kill may leave half a file."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda it: it.stat().st_mtime_ns, reverse=True):
        try:
            return path, torch.load(path, weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):
            continue
    return None, {}


def safely(trainer):
    """Lets a Lightning of 2.6 or later unpickle nothing but plain data when it resumes."""
    known = inspect.signature(trainer.fit).parameters
    return {"weights_only": True} if "weights_only" in known else {}
