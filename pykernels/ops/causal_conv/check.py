"""A quick comparison of a backend with the reference, for ``pykernels info --check``."""

from __future__ import annotations

import torch

from pykernels.backends import Check
from pykernels.ops.causal_conv import reference


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """``max|value - expected| / max|expected|`` in float64; 0 for empty tensors."""
    if expected.numel() == 0:
        return 0.0
    difference = (value.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny))


def check(backend: str) -> Check:
    """Forward and gradients of ``backend`` against the float64 reference, for a few sizes."""
    from pykernels.ops.causal_conv import causal_conv1d

    generator = torch.Generator().manual_seed(0)
    errors: dict[str, float] = {}
    allowed = {"float64 forward": 1e-12, "float64 gradients": 1e-10}
    allowed |= {"float32 forward": 1e-5, "float32 gradients": 1e-5}
    for dtype, name in ((torch.float64, "float64"), (torch.float32, "float32")):
        forward = gradients = 0.0
        for shape, kernel_size, dilation in (((2, 3, 50), 3, 4), ((10, 40, 150), 3, 64), ((1, 17, 2000), 2, 1)):
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            weight = torch.randn((40, shape[1], kernel_size), generator=generator, dtype=torch.float64)
            bias = torch.randn(40, generator=generator, dtype=torch.float64)
            residual = torch.randn((shape[0], 40, shape[2]), generator=generator, dtype=torch.float64)
            expected_inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]
            inputs = [t.detach().to(dtype).requires_grad_() for t in expected_inputs]
            expected = reference.causal_conv1d(*expected_inputs, dilation, "tanh", 0.01)
            y = causal_conv1d(
                *inputs[:3], dilation=dilation, activation="tanh", residual=inputs[3], backend=backend
            )
            forward = max(forward, relative_error(y.detach(), expected.detach()))
            grad_y = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
            for value, reference_value in zip(
                torch.autograd.grad(y, inputs, grad_y.to(dtype)),
                torch.autograd.grad(expected, expected_inputs, grad_y),
                strict=True,
            ):
                gradients = max(gradients, relative_error(value, reference_value))
        errors[f"{name} forward"], errors[f"{name} gradients"] = forward, gradients
    return Check(errors, allowed)
