import gc
import zlib

import pytest
import torch
from helpers import FOREIGN_WARNINGS


def pytest_configure(config):
    for text in FOREIGN_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{text}")


def pytest_collection_finish(session):
    gc.freeze()  # Trainers and tests collect garbage: not among all that was imported


@pytest.fixture(autouse=True)
def one_thread():
    """Models here are tiny: a second thread only waits."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def package(request):
    """One of the two Lightning packages: the tests take turns, by their names."""
    turn = zlib.crc32(request.node.name.encode()) % 2
    default = ("pytorch_lightning", "lightning.pytorch")[turn]
    return pytest.importorskip(getattr(request, "param", default))
