from collections.abc import Iterator

import pytest
import torch

import pykernels


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="PyTorch sees no GPU"))


@pytest.fixture
def one_thread_and_restored_capability() -> Iterator[None]:
    """For tests that may change both.

    Results do not depend on the number of threads, which has tests of its own; more than one would make the others slow
    on a busy machine, where OpenMP's threads spin while they wait for each other.
    """
    capability, threads = pykernels.cpu_capability(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if capability is not None:
        pykernels.set_cpu_capability(capability)


@pytest.fixture(params=pykernels.cpu_capabilities())
def capability(request: pytest.FixtureRequest) -> str:
    """Every CPU capability of this machine in turn."""
    pykernels.set_cpu_capability(request.param)
    return str(request.param)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Inside a test with this fixture, memory that torch hands out uninitialised holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.zeros(3).new_empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(3)).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
