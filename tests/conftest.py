from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pykernels
from pykernels import _triton


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


@pytest.fixture(autouse=True, scope="session")
def _language_is_patched_once_a_launch() -> Iterator[None]:
    """Triton's interpreter does it again whenever a kernel calls a function, which takes a third of all its time."""
    if not _triton.interpreting():
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang"):  # another Triton
        yield
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules: dict[Any, tuple[bool, bool]] = {}  # which of the language's a function sees: these are patched
    done: set[tuple[bool, bool]] = set()

    def patch_once(function: Any) -> Any:
        if function not in modules:
            seen = function.__globals__.values()
            modules[function] = any(v is language for v in seen), any(v is language.core for v in seen)
        if modules[function] in done:
            return None
        done.add(modules[function])
        return patch(function)

    def launch_anew(executor: Any, *args: Any, **options: Any) -> Any:
        done.clear()
        return launch(executor, *args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang", patch_once)
        patched.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield
