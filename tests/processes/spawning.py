"""A Trainer that starts its processes itself, by ``strategy="ddp_fork"``.

    python -m processes.spawning FOLDER

The weights that come back to this process are left in ``FOLDER/rank0.pt``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from processes.common import IMPORTANT, WD, values
from processes.lightning_run import Model, trained
from torch.optim import Adam

from wd_callbacks.lightning import DecoupledWD

if __name__ == "__main__":
    torch.set_num_threads(1)
    decay = DecoupledWD(WD, quantum=0)
    model = trained(Model(Adam, IMPORTANT), decay, strategy=lambda: "ddp_fork")
    ends = {"ours": values(model.net.parameters()), "attached": decay.coefficients}
    torch.save({"ddp_fork": ends}, Path(sys.argv[1]) / "rank0.pt")
