"""Whether Triton's kernels can run, found out without importing Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from pykernels.backends import YES, Answer

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def available() -> Answer:
    if find_spec("triton") is None:
        return Answer(False, "Triton is not installed; the extra [triton] brings it")
    if torch.cuda.is_available() or interpreting():
        return YES
    return Answer(False, "PyTorch sees no GPU, and TRITON_INTERPRET=1 is not set")


def can_run(x: Tensor) -> Answer:
    if x.device.type != "cuda" and not (x.device.type == "cpu" and interpreting()):
        return Answer(False, f"the tensors are on {x.device}, not on a GPU")
    if x.dtype not in DTYPES:
        return Answer(False, f"dtype {x.dtype} is not supported, only {', '.join(str(d)[6:] for d in DTYPES)}")
    if find_spec("triton") is None:
        return available()
    return YES


def check_device() -> torch.device:
    """Where a quick check of the kernels puts its tensors."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
