"""The Triton kernels in Triton's interpreter, on the CPU: test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import mpmath
import pytest
import torch
import triton
import triton.language as tl

from pykernels.ops import gaussian_warp
from pykernels.ops._triton_math import error_functions
from pykernels.ops.gaussian_warp import triton as kernels

from .triton_cases import (
    ACCURACY,
    BILINEAR,
    CHOICES,
    INFINITY,
    NAN,
    SIZES,
    WIDTHS,
    Mode,
    check_accuracy,
    check_float64,
    error,
)


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None) -> None:
    pass


def test_kernels_are_interpreted():
    assert kernels.INTERPRETED


@pytest.mark.parametrize("mode", CHOICES + BILINEAR + WIDTHS + SIZES, ids=str)
def test_float64(mode: Mode):
    check_float64(mode, "cpu")


@pytest.mark.parametrize("mode", ACCURACY, ids=str)
def test_accuracy(mode: Mode):
    check_accuracy(mode, "cpu", seeds=2)


@triton.jit
def error_functions_of(z, erf, erfc, power, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    found = error_functions(tl.load(z + i))
    tl.store(erf + i, found[0])
    tl.store(erfc + i, found[1])
    tl.store(power + i, found[2])


@pytest.mark.parametrize(("dtype", "largest", "allowed"), [(torch.float32, 9.0, 4), (torch.float64, 26.0, 512)])
def test_error_functions(dtype: torch.dtype, largest: float, allowed: int):
    """Relative to themselves, in units of the last place; exp(-z^2) of float64 loses what rounding z^2 does."""
    z = torch.cat([torch.linspace(0, largest, 1000), torch.logspace(-8, 0, 22), torch.tensor([0.4999999, 0.5])])
    z = z.to(dtype)
    found = [torch.empty_like(z) for _ in range(3)]
    error_functions_of[(1,)](z, *found, BLOCK=len(z))
    with mpmath.workdps(40):
        for function, values in zip((mpmath.erf, mpmath.erfc, lambda x: mpmath.exp(-x * x)), found, strict=True):
            for x, value in zip(z.tolist(), values.tolist(), strict=True):
                exact = function(mpmath.mpf(x))
                assert abs(value - exact) <= allowed * torch.finfo(dtype).eps * exact, (x, value)


def spread(t: torch.Tensor) -> torch.Tensor:
    """The same values with gaps of NaN between all of them."""
    wide = torch.full([2 * n for n in t.shape], NAN, dtype=t.dtype)
    return wide[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


def test_bits_depend_on_neither_the_run_nor_the_strides():
    mode = Mode((5, 6), batch=2, channels=2, steps=2, variance="map")
    values, grad = mode.tensors(torch.float32), mode.grad(torch.float32)
    first = mode.results(values, grad, "triton")
    for change in (torch.clone, spread, lambda t: t.mT.contiguous().mT):
        again = mode.results({name: change(t) for name, t in values.items()}, change(grad), "triton")
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_the_order_of_additions_does_not_matter(monkeypatch):
    """Other blocks of pixels, whose additions come in another order, give the image's gradient the same bits."""
    mode = Mode((6, 13), support=4, motion=8.0, padding_mode="border")
    values, grad = mode.tensors(torch.float32), mode.grad(torch.float32)
    expected = mode.results(values, grad, "triton")["grad of image"]
    for block in (32, 64):
        monkeypatch.setattr(kernels, "BLOCK", block)
        assert torch.equal(mode.results(values, grad, "triton")["grad of image"], expected)


def test_one_value_for_all():
    """Strides of 0 in image and gradient."""
    mode = Mode((5, 6), batch=2, channels=2)
    values, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
    values["image"] = values["image"][:1, :1].expand_as(values["image"])
    grad = grad[:, :, :1, :1, :1].expand_as(grad)
    expected = mode.results(values, grad, "reference")
    for name, value in mode.results(values, grad, "triton").items():
        assert error(value, expected[name]) <= 1e-12


def test_wide_offsets(monkeypatch):
    """Large sizes take 64-bit offsets; with the limit lowered, the small problem does."""
    monkeypatch.setattr(kernels, "INT32_LIMIT", 0)
    check_float64(Mode((5, 6), support=None, variance="map", odd=True), "cpu")


def test_gradients_that_are_not_finite():
    """They reach the pixels that they would reach in PyTorch; the rest of the image is as precise as without them."""
    mode = Mode((9, 11), channels=3, motion=0.5)
    values, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
    grad[0, 0, 0, 2, 2], grad[0, 0, 0, 6, 7], grad[0, 0, 1, 4, 4] = NAN, INFINITY, -INFINITY
    expected = mode.results(values, grad, "reference")
    actual = mode.results(values, grad, "triton")
    assert torch.equal(actual["grad of image"].isinf(), expected["grad of image"].isinf())
    for name in ("grad of image", "grad of flows"):
        finite = expected[name].isfinite()
        assert torch.equal(actual[name].isfinite(), finite)
        assert error(actual[name][finite], expected[name][finite]) <= 1e-12
    assert expected["grad of image"].isinf().any()
    assert expected["grad of image"].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_any_size(dtype: torch.dtype):
    """From numbers that are nearly too large to ones that are nearly 0, and only zeros."""
    mode = Mode((5, 6), channels=1)
    values, grad = mode.tensors(dtype), mode.grad(dtype)
    largest = torch.finfo(dtype).max / 64
    for scale in (0.0, torch.finfo(dtype).tiny * 64, 1e-20, 1e20, largest):
        expected = mode.results(values, grad * scale, "reference")["grad of image"]
        actual = mode.results(values, grad * scale, "triton")["grad of image"]
        assert (actual - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_tiny_variances():
    """Weights of the densest of Gaussians neither underflow nor overflow, nor do derivatives, without a warning."""
    for form, normalize, variance in (("density", "window", 1e-30), ("integrated", "none", 1e-12)):
        mode = Mode((5, 6), form, normalize, variance="map", motion=0.3)
        values, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
        values["variance"].fill_(variance)
        expected = mode.run(values, "reference")
        found = mode.results(values, grad, "triton")
        assert error(found["frames"], expected) <= 1e-12
        assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("shape", [(0, 1, 2, 3, 4), (2, 1, 0, 3, 4), (1, 0, 1, 3, 4)])
def test_empty(shape):
    """No samples, no channels, no steps."""
    batch, steps, channels, *sizes = shape
    mode = Mode(tuple(sizes), batch=batch, steps=steps, channels=channels, variance="shared")
    values, grad = mode.tensors(torch.float32), mode.grad(torch.float32)
    found = mode.results(values, grad, "triton")
    assert found["frames"].shape == shape
    assert all(value.eq(0).all() for value in found.values())


def test_only_the_gradients_that_are_needed():
    mode = Mode((5, 6), steps=2, variance="map")
    values, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
    expected = mode.results(values, grad, "triton")
    for name in values:
        leaves = {n: t.clone().requires_grad_(n == name) for n, t in values.items()}
        mode.run(leaves, "triton").backward(grad)
        assert torch.equal(leaves[name].grad, expected[f"grad of {name}"])


def test_low_precision_and_units():
    image, flow = torch.randn(2, 3, 5, 6).half(), torch.randn(2, 2, 5, 6) / 3
    options = {"units": "normalized", "align_corners": False, "support": 3}
    found = gaussian_warp(image, flow, 0.5, backend="triton", **options)
    expected = gaussian_warp(image.double(), flow.double(), 0.5, backend="reference", **options)
    assert found.dtype == torch.float16
    assert error(found, expected) <= 1e-3


def test_derivatives_of_derivatives():
    image, flow = torch.randn(1, 1, 4, 5, dtype=torch.float64), torch.randn(1, 2, 4, 5, dtype=torch.float64)
    tensors = (image.requires_grad_(), flow.requires_grad_(), torch.tensor(0.7, dtype=torch.float64).requires_grad_())

    def function(*t: torch.Tensor) -> torch.Tensor:
        return gaussian_warp(*t, support=3, backend="triton")

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
