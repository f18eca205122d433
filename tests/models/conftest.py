import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Threads gain nothing on models this small, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
