"""Tensors as the C++ kernels take them: addresses of memory that has been checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

IS_DOUBLE = {torch.float32: False, torch.float64: True}
#: Dtypes whose tensors are copied to float32 for the kernels, and the results back.
HALF = (torch.float16, torch.bfloat16)


def plain(t: Tensor) -> Tensor:
    return t.resolve_neg() if t.is_neg() else t


def address(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> int:
    """The address of ``t``'s data, which must be what the kernel is about to read."""
    if t.shape != shape or t.dtype != dtype or not t.is_cpu:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} and dtype {dtype}, got {tuple(t.shape)} and {t.dtype}; "
            "call the public function rather than the raw operator"
        )
    return t.data_ptr()


def size(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among the arguments, lists of them included."""
    total = 0
    for t in tensors:
        if isinstance(t, Tensor):
            total += t.numel() * t.element_size()
        elif isinstance(t, (list, tuple)):
            total += size(t)
    return total
