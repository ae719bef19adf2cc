"""A Trainer that starts its processes itself, by ``strategy="ddp_fork"``.

    python -m processes.spawning FOLDER

The weights that come back to this process are saved in ``FOLDER/rank0.pt``.
"""

import sys
from pathlib import Path

import torch
from processes.common import INNER_WD, WD, values
from processes.lightning_run import Model, optimizer_of, trained
from torch.optim import Adam

from wd_callbacks.lightning import DecoupledWD

if __name__ == "__main__":
    torch.set_num_threads(1)
    decay = DecoupledWD(WD, quantum=0)
    make = optimizer_of(Adam, INNER_WD)
    model = trained(Model, make, decay, strategy=lambda: "ddp_fork")
    ends = {"ours": values(model.parameters()), "attached": decay.coefficients}
    torch.save({"ddp_fork": ends}, Path(sys.argv[1]) / "rank0.pt")
