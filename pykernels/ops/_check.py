"""A quick comparison of a backend with the reference, for ``pykernels info --check``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pykernels import _triton
from pykernels.backends import Check

#: Largest relative errors that pass. The tests hold float32 to a tighter bound, relative to PyTorch's own error.
ALLOWED = {"float64 forward": 1e-12, "float64 gradients": 1e-10, "float32 forward": 1e-5, "float32 gradients": 1e-5}


def relative_error(value: Tensor, expected: Tensor) -> float:
    """``max|value - expected| / max|expected|`` in float64; 0 for empty tensors, infinite for NaN."""
    if expected.numel() == 0:
        return 0.0
    difference = (value.cpu().double() - expected.double()).abs().max()
    error = difference / expected.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float(error.nan_to_num(torch.inf))


def compare(
    reference: Callable[..., Tensor], function: Callable[..., Tensor], tensors: tuple[Tensor, ...], backend: str
) -> Check:
    """Errors of ``function``, in float64 and float32, against ``reference`` in float64, for random output gradients.

    ``function`` gets its tensors where ``backend`` runs.
    """
    device = _triton.check_device() if backend == "triton" else torch.device("cpu")
    errors = {}
    expected_inputs = [t.clone().requires_grad_() for t in tensors]
    expected = reference(*expected_inputs)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, expected_inputs, grad)
    for dtype, name in ((torch.float64, "float64"), (torch.float32, "float32")):
        inputs = [t.to(device, dtype).requires_grad_() for t in tensors]
        value = function(*inputs)
        errors[f"{name} forward"] = relative_error(value.detach(), expected.detach())
        grads = torch.autograd.grad(value, inputs, grad.to(device, dtype))
        errors[f"{name} gradients"] = max(map(relative_error, grads, expected_grads))
    return Check(errors, ALLOWED)
