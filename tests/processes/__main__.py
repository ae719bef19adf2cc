"""Runs every scenario in two processes, with gloo on the CPU, and saves what each came to.

    python -m processes FOLDER

saves ``FOLDER/rank0.pt`` and ``rank1.pt``, which the tests compare. Most of the time goes into
imports: they are made once, before the processes are forked.
"""

import multiprocessing
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from processes import lightning_run, sharded  # noqa: F401, as both register their scenarios
from processes.common import SCENARIOS, TIMEOUT


def run(rank, folder):
    """Runs the scenarios, and saves what each returned, or how it failed."""
    os.chdir(folder)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    warnings.filterwarnings("error", category=UserWarning, module="wd_callbacks")
    warnings.filterwarnings("ignore", message=".*no state")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=TIMEOUT)
    asides = dist.new_group(timeout=TIMEOUT)
    ends = {}
    for name, scenario in SCENARIOS.items():
        torch.manual_seed(0)
        try:
            ends[name] = scenario()
        except Exception:
            ends[name] = traceback.format_exc()
        # If one process failed alone, the other waits for it, and for the wrong thing from then on.
        failures = [None] * 2
        try:
            dist.all_gather_object(failures, isinstance(ends[name], str), group=asides)
        except RuntimeError:
            break
        if failures[0] != failures[1]:
            break
    torch.save(ends, f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]).absolute()
    lightning_run.start_processes(folder)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
