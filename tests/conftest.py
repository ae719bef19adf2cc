import pytest
import torch
from helpers import FOREIGN_WARNINGS


def pytest_configure(config):
    for text in FOREIGN_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{text}")


@pytest.fixture(autouse=True)
def one_thread():
    """Models here are tiny: a second thread only waits."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def package(request):
    """Each of the two Lightning packages."""
    return pytest.importorskip(request.param)
