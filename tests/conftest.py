import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Models here are tiny: a second thread only waits."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
