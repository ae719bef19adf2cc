"""How a training program is killed, and which checkpoint it goes on from."""

from __future__ import annotations

import argparse
import inspect
import io
import os
import pickle
import signal
import time
from pathlib import Path

import torch


class Kill:
    """When a program kills itself. With a ``pause`` it prints each batch, for others to kill it.

    Args:
        middle: In the middle of this batch.
        saving: While it saves, at this batch or later: half of the file is written.
        pause: How many seconds longer each batch takes.
    """

    def __init__(self, middle=None, saving=None, pause=0.0):
        self.at_middle, self.at_saving, self.pause, self.batch = middle, saving, pause, 0

    def start(self, batch):
        self.batch = batch
        if self.pause:
            print(batch, flush=True)
            time.sleep(self.pause)

    def middle(self):
        if self.batch == self.at_middle:
            os.kill(os.getpid(), signal.SIGKILL)

    def save(self, state, path):
        if self.at_saving is not None and self.batch >= self.at_saving:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            os.kill(os.getpid(), signal.SIGKILL)


def main(train):
    """The command line of a program, which writes its final state to ``end.pt``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variant")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--middle", type=int)
    parser.add_argument("--saving", type=int)
    parser.add_argument("--pause", type=float, default=0.0)
    args = parser.parse_args()
    kill = Kill(args.middle, args.saving, args.pause)
    torch.save(train(args.variant, args.folder, kill), args.folder / "end.pt")


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
