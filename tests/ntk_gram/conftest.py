import pytest
import torch


@pytest.fixture(autouse=True)
def _settings(one_thread_and_restored_capability: None) -> None:
    """The same numbers in every run too: torch begins with a seed of its own, and the bounds are near what is seen."""
    torch.manual_seed(0)
