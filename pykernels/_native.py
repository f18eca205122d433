"""The compiled CPU module, or the reason why it is not there."""

from __future__ import annotations

import os
from types import ModuleType

import torch  # noqa: F401  (loads the OpenMP runtime that the compiled module shares)

from pykernels.backends import YES, Answer

cpu: ModuleType | None
cpu_error: str | None
try:
    import pykernels._cpu as _cpu

    cpu, cpu_error = _cpu, None
except ImportError as error:
    cpu, cpu_error = None, f"the compiled module pykernels._cpu did not load ({error}); reinstall with 'pip install .'"


def available() -> Answer:
    """Whether the kernels of the backend ``cpu`` can run on this machine."""
    return YES if cpu_error is None else Answer(False, cpu_error)


def cpu_capabilities() -> list[str]:
    """CPU capabilities that this machine runs, from least to best; empty without the compiled module."""
    return [] if cpu is None else list(cpu.capabilities())


def cpu_capability() -> str | None:
    """The CPU capability in use, or None without the compiled module."""
    return None if cpu is None else str(cpu.capability())


def set_cpu_capability(name: str) -> None:
    """Use another CPU capability from now on, in the whole process.

    Args:
        name: one of :func:`cpu_capabilities`.

    Raises:
        ValueError: if this machine does not run ``name``.
    """
    if name not in cpu_capabilities():
        raise ValueError(f"CPU capability must be one of {', '.join(cpu_capabilities()) or '(none)'}; got {name!r}")
    assert cpu is not None
    cpu.set_capability(name)


if cpu is not None and (_requested := os.environ.get("PYKERNELS_CPU_CAPABILITY")):
    if _requested not in cpu_capabilities():
        raise ImportError(
            f"PYKERNELS_CPU_CAPABILITY={_requested!r}, but this machine runs {', '.join(cpu_capabilities())}"
        )
    set_cpu_capability(_requested)
