"""Microbenchmarks for pytest-benchmark: ``pytest bench/test_micro.py``. Each checks its result first."""

import pytest
import torch

import pykernels
from pykernels.ops.causal_conv import reference

CASES = {"tiny": (1, 1, 8, 1), "short": (10, 40, 150, 16), "long": (1, 40, 20_000, 512)}


def _inputs(case, requires_grad):
    batch, channels, length, dilation = CASES[case]
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, channels, length), (channels, channels, 3), (channels,))
    return [torch.randn(s, generator=generator).requires_grad_(requires_grad) for s in shapes], dilation


def _reference(x, weight, bias, dilation):
    return reference.causal_conv1d(x, weight, bias, None, None, None, None, dilation, 1, "relu", 0.01, False)


@pytest.mark.parametrize("case", CASES)
def test_forward(benchmark, case):
    tensors, dilation = _inputs(case, requires_grad=False)
    expected = _reference(*tensors, dilation)
    y = benchmark(lambda: pykernels.causal_conv1d(*tensors, dilation=dilation, activation="relu"))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_backward(benchmark, case):
    tensors, dilation = _inputs(case, requires_grad=True)
    expected = torch.autograd.grad(_reference(*tensors, dilation).sum(), tensors)

    def run():
        y = pykernels.causal_conv1d(*tensors, dilation=dilation, activation="relu")
        return torch.autograd.grad(y.sum(), tensors)

    for value, reference_value in zip(benchmark(run), expected, strict=True):
        scale = float(reference_value.abs().max())
        torch.testing.assert_close(value, reference_value, rtol=1e-4, atol=1e-5 * scale)


def test_weight_norm(benchmark):
    v, g = [torch.randn(40, 40, 3) for _ in range(22)], [torch.randn(40, 1, 1) for _ in range(22)]
    weights = benchmark(lambda: pykernels.ops.weight_norm(v, g))
    torch.testing.assert_close(weights[0], torch._weight_norm(v[0], g[0], 0))


@pytest.mark.parametrize("batch", [1, 32])
def test_trajectory(benchmark, batch):
    field = pykernels.nn.MLPField((2, 64, 64, 2), "tanh")
    y0, t = torch.randn(batch, 2), torch.linspace(0, 1, 101)
    with torch.no_grad():
        expected = field.trajectory(y0, t, method="rk4", backend="reference")
        states = benchmark(lambda: field.trajectory(y0, t, method="rk4"))
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
