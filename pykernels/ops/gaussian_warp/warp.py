"""The public warps: arguments, choice of backend, derivatives."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pykernels import _native, _triton
from pykernels.backends import YES, Answer, Check, Implementation, Operator, register, select
from pykernels.ops import _op
from pykernels.ops._check import compare
from pykernels.ops.gaussian_warp import autograd, cost, reference
from pykernels.ops.gaussian_warp.reference import FORMS, NORMALIZE, PADDING_MODES, Options, Tensors

DEFAULT_TOLERANCE = 1e-4
DEFAULT_MAX_SUPPORT = 255
_MOST_SUPPORT = 4095
_FORMS = tuple(form for form in FORMS if form != "linear")
_UNITS = ("pixels", "normalized")
_INDEXING = ("xy", "ij")


def gaussian_warp(
    image: Tensor,
    flow: Tensor,
    variance: float | Tensor,
    *,
    form: str = "integrated",
    normalize: str = "window",
    padding_mode: str = "zeros",
    support: int | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    max_support: int = DEFAULT_MAX_SUPPORT,
    units: str = "pixels",
    align_corners: bool | None = None,
    indexing: str = "xy",
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advect an image by a motion field and diffuse it: one step of advection-diffusion.

    ``out[x] = sum over pixels p of w(p - (x - flow[x])) image[p]`` with a Gaussian w of the given variance: output
    pixel x reads around ``x - flow(x)``, so that what the image shows moves *along* the flow. (Optical-flow codes often
    read at ``x + flow(x)``: negate their flow.)

    The defaults are a mean of the window's pixels, weighted by the Gaussian's mass in each: its weights sum to 1
    whatever the variance and the sub-pixel position. The raw sum of the publication (``form="density",
    normalize="none"``) is the exact solution for standard deviations from about a pixel on, but multiplies brightness
    by 0.19 to 2.55 at a quarter of a pixel.

    Args:
        image: (B, C, *S) with one to three spatial axes, of a floating dtype. Computed in float32 at least.
        flow: (B, R, *S), a displacement in the R = len(S) axes for each pixel.
        variance: of the Gaussian on each axis in pixels squared, 2 D dt (:func:`diffusion_variance`): a number, or a
            tensor that broadcasts to (B, 1, *S). At least 0; at 0 every form is the nearest pixel.
        form: ``"integrated"``: a weight is the Gaussian's mass in the pixel's cell, which blurs by 1/12 of a pixel
            squared more; ``"density"``: its density at the pixel's centre.
        normalize: ``"window"`` divides by the sum of all weights of the window, inside the image or not; ``"inside"``
            by the sum over the pixels inside the image, which differs for zeros only, and jumps to 0 where the window
            leaves the image; ``"none"`` does not divide.
        padding_mode: what is beyond the border: ``"zeros"``, ``"border"`` (the nearest pixel inside), ``"reflection"``
            about the outer edges of the pixels (as ``grid_sample`` with ``align_corners=False``) or ``"periodic"``.
        support: taps per axis, those nearest to the centre, even or odd; the rest is cut off. By default as many as
            ``tolerance`` asks for, pixel by pixel where the variance varies.
        tolerance: the mass that the window may leave out, at the worst position of its centre. No jump of the result,
            where a window moves on by a pixel, exceeds it, relative to the image's range (for ``"inside"``: where at
            least a tenth of the mass is inside the image).
        max_support: bounds the taps per axis where ``support`` is None; wider windows are cut off there.
        units: of the flow: ``"pixels"``, or ``"normalized"`` to [-1, 1] across the image as in ``grid_sample``; then
            ``align_corners`` must be given: one pixel is 2 / (S - 1) if it is True and 2 / S if not.
        indexing: whether channel 0 of the flow is along the last axis (``"xy"``, as optical flow has it and
            ``grid_sample``) or along the first (``"ij"``).
        validate: check that no variance is negative: True, False, or None to do so on the CPU only, where it does not
            wait for a device. Where unchecked ones are negative the result is NaN.
        backend: a name in :data:`pykernels.backends.BACKENDS`, or None to choose automatically.

    Returns:
        (B, C, *S) in the dtype of the image. Where the flow or the variance is NaN the pixel is NaN, and passes no
        gradient on. Displacements are cut off at 2**30 pixels.

    Gradients for image, flow and a variance that is a tensor; the position of the window is not differentiated.
    Derivatives of higher order, forward mode and ``torch.func`` transforms run the reference. Deterministic.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if an argument has the wrong shape, device or value.
        RuntimeError: if the backend asked for by name cannot run the call.

    The equation is that of de Bezenac, Pajot and Gallinari, "Deep learning for physical processes: incorporating prior
    scientific knowledge" (2018), section 3; their program computes ``form="integrated"``, ``normalize="inside"`` with
    ``support=3``.
    """
    _check_image(image)
    _check_flow(flow, image, "flow", (image.shape[0],))
    arranged, value = _check_variance(variance, image, None, validate)
    options = _options(
        image, value, form, normalize, padding_mode, support, tolerance, max_support, units, align_corners, indexing
    )
    return _run(image, flow.unsqueeze(1), arranged, options, backend).squeeze(1)


def gaussian_warp_rollout(
    image: Tensor,
    flows: Tensor,
    variance: float | Tensor,
    *,
    form: str = "integrated",
    normalize: str = "window",
    padding_mode: str = "zeros",
    support: int | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    max_support: int = DEFAULT_MAX_SUPPORT,
    units: str = "pixels",
    align_corners: bool | None = None,
    indexing: str = "xy",
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Warp an image by one motion field after another, in one call forward and one backward.

    The same as a loop of ``image = gaussian_warp(image, flows[:, t], variance)`` that keeps every image.

    Args:
        image: (B, C, *S).
        flows: (B, T, R, *S).
        variance: a number or a tensor as in :func:`gaussian_warp` for all steps, or a tensor with one dimension more
            that broadcasts to (B, T, 1, *S).
        form, normalize, padding_mode, support, tolerance, max_support: as in :func:`gaussian_warp`.
        units, align_corners, indexing, validate, backend: as there.

    Returns:
        (B, T, C, *S), the image after each step.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`gaussian_warp`.
    """
    _check_image(image)
    if not isinstance(flows, Tensor) or flows.dim() != image.dim() + 1:
        got = tuple(flows.shape) if isinstance(flows, Tensor) else type(flows).__name__
        raise ValueError(f"flows must have shape (B, T, R, *S), {image.dim() + 1} dimensions for this image, got {got}")
    _check_flow(flows, image, "flows", tuple(flows.shape[:2]))
    arranged, value = _check_variance(variance, image, flows.shape[1], validate)
    options = _options(
        image, value, form, normalize, padding_mode, support, tolerance, max_support, units, align_corners, indexing
    )
    return _run(image, flows, arranged, options, backend)


def bilinear_warp(
    image: Tensor,
    flow: Tensor,
    *,
    padding_mode: str = "zeros",
    units: str = "pixels",
    align_corners: bool | None = None,
    indexing: str = "xy",
    backend: str | None = None,
) -> Tensor:
    """Advect an image by a motion field, with linear interpolation on each axis.

    The same as ``torch.nn.functional.grid_sample`` (``align_corners=False`` for reflection) of the grid of
    ``x - flow(x)``, without the grid, for one to three axes and with periodic borders too.

    Args:
        image: (B, C, *S) with one to three spatial axes, of a floating dtype.
        flow: (B, R, *S); output pixel x reads at ``x - flow(x)``.
        padding_mode, units, align_corners, indexing, backend: as in :func:`gaussian_warp`.

    Returns:
        (B, C, *S), NaN where the flow is.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`gaussian_warp`.
    """
    _check_image(image)
    _check_flow(flow, image, "flow", (image.shape[0],))
    _check_choice(padding_mode, "padding_mode", tuple(PADDING_MODES))
    scale, xy = _geometry(image, units, align_corners, indexing)
    options = Options(0.0, "linear", "none", padding_mode, 2, DEFAULT_TOLERANCE, DEFAULT_MAX_SUPPORT, scale, xy)
    return _run(image, flow.unsqueeze(1), None, options, backend).squeeze(1)


def diffusion_variance(diffusivity: float | Tensor, dt: float | Tensor = 1.0) -> Any:
    """The variance of the heat kernel, ``2 * diffusivity * dt``, for :func:`gaussian_warp`.

    Args:
        diffusivity: D in pixels squared per unit of time; a number or a tensor.
        dt: the step, in units of time.

    Returns:
        The variance on each axis in pixels squared, a tensor where one of the two is.
    """
    return 2 * diffusivity * dt


def _run(image: Tensor, flows: Tensor, variance: Tensor | None, options: Options, backend: str | None) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(image.dtype, flows.dtype), torch.float32)
    if variance is not None:
        dtype = torch.promote_types(dtype, variance.dtype)
        variance = variance if variance.dtype == dtype else variance.to(dtype)
    tensors = Tensors(
        image if image.dtype == dtype else image.to(dtype),
        flows if flows.dtype == dtype else flows.to(dtype),
        variance,
    )
    frames: Tensor = select(_OPERATOR, backend, tensors, options).run(tensors, options)
    return frames if frames.dtype == image.dtype else frames.to(image.dtype)


def _options(
    image: Tensor,
    value: float,
    form: str,
    normalize: str,
    padding_mode: str,
    support: int | None,
    tolerance: float,
    max_support: int,
    units: str,
    align_corners: bool | None,
    indexing: str,
) -> Options:
    _check_choice(form, "form", _FORMS)
    _check_choice(normalize, "normalize", tuple(NORMALIZE))
    _check_choice(padding_mode, "padding_mode", tuple(PADDING_MODES))
    for name, number in (("support", 1 if support is None else support), ("max_support", max_support)):
        if type(number) is not int:
            raise TypeError(f"{name} must be an int, got {number!r}")
        if not 1 <= number <= _MOST_SUPPORT:
            raise ValueError(f"{name} must be between 1 and {_MOST_SUPPORT} taps, got {number}")
    if not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance must be a number, got {tolerance!r}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}")
    scale, xy = _geometry(image, units, align_corners, indexing)
    return Options(value, form, normalize, padding_mode, support or 0, float(tolerance), max_support, scale, xy)


def _geometry(image: Tensor, units: str, align_corners: bool | None, indexing: str) -> tuple[list[float], bool]:
    """Pixels per unit of the flow for each axis, and whether its channels run from the last axis to the first."""
    _check_choice(units, "units", _UNITS)
    _check_choice(indexing, "indexing", _INDEXING)
    sizes = image.shape[2:]
    if units == "pixels":
        if align_corners is not None:
            raise ValueError(f"align_corners is for units='normalized', got {align_corners!r} with units='pixels'")
        return [1.0] * len(sizes), indexing == "xy"
    if not isinstance(align_corners, bool):
        raise ValueError(f"units='normalized' needs align_corners=True or False, got {align_corners!r}")
    return [(size - align_corners) / 2 for size in sizes], indexing == "xy"


def _check_choice(value: Any, name: str, known: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _check_image(image: Tensor) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a tensor, got {type(image).__name__}")
    if not image.dtype.is_floating_point:
        raise TypeError(f"image must have a floating dtype, got {image.dtype}")
    if not 3 <= image.dim() <= 5 or 0 in image.shape[2:]:
        raise ValueError(
            "image must have shape (B, C, *S) with one to three spatial axes of at least one pixel, "
            f"got {tuple(image.shape)}"
        )


def _check_flow(flow: Tensor, image: Tensor, name: str, leading: tuple[int, ...]) -> None:
    if not isinstance(flow, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(flow).__name__}")
    if not flow.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating dtype, got {flow.dtype}")
    if flow.device != image.device:
        raise ValueError(f"{name} must be on the device of the image, {image.device}, got {flow.device}")
    expected = (image.shape[0], *leading[1:], image.dim() - 2, *image.shape[2:])
    if flow.shape != expected:
        raise ValueError(
            f"{name} must have shape {expected}, a displacement in {image.dim() - 2} axes for each pixel of an image "
            f"{tuple(image.shape)}, got {tuple(flow.shape)}"
        )


def _check_variance(
    variance: float | Tensor, image: Tensor, steps: int | None, validate: bool | None
) -> tuple[Tensor | None, float]:
    """The variance as (B or 1, T or 1, 1, *S or R ones), or as a number; ``steps`` in a rollout."""
    reads_values = _op.reads_values(image, validate)
    if not isinstance(variance, Tensor):
        if isinstance(variance, bool) or not isinstance(variance, (int, float)):
            raise TypeError(f"variance must be a number or a tensor, got {type(variance).__name__}")
        if not 0 <= variance <= sys.float_info.max:
            raise ValueError(f"variance must be at least 0 and finite, in pixels squared, got {variance}")
        return None, float(variance)
    if not variance.dtype.is_floating_point:
        raise TypeError(f"variance must have a floating dtype, got {variance.dtype}")
    if variance.device != image.device:
        raise ValueError(f"variance must be on the device of the image, {image.device}, got {variance.device}")
    shape, sizes = variance.shape, tuple(image.shape[2:])
    timed = steps is not None and variance.dim() == image.dim() + 1
    full = (image.shape[0], *((steps,) if timed else ()), 1, *sizes)
    padded = (1,) * (len(full) - len(shape)) + tuple(shape)
    if len(padded) != len(full) or any(n not in (1, m) for n, m in zip(padded, full, strict=True)):
        wanted = f"(B, 1, *S), here {full}" if not timed else f"(B, T, 1, *S), here {full}"
        raise ValueError(f"variance must broadcast to {wanted}, got {tuple(shape)}")
    if reads_values and variance.numel() > 0:
        smallest = variance.detach().nan_to_num(0.0, math.inf, -math.inf).min().item()
        if smallest < 0:
            raise ValueError(f"variance must be at least 0, in pixels squared, got {smallest}")
    variance = variance.reshape(padded) if timed else variance.reshape(padded).unsqueeze(1)
    if any(n > 1 for n in variance.shape[3:]):
        variance = variance.expand(*variance.shape[:3], *sizes)
    return variance, 0.0


def _run_cpu(tensors: Tensors, options: Options) -> Tensor:
    return autograd.run(tensors, options, "cpu")


def _run_triton(tensors: Tensors, options: Options) -> Tensor:
    return autograd.run(tensors, options, "triton")


def _cpu_can_run(tensors: Tensors, options: Options) -> Answer:
    if _native.cpu_error is not None:
        return Answer(False, _native.cpu_error)
    if tensors.image.device.type != "cpu":
        return Answer(False, f"the image is on {tensors.image.device}, not on the CPU")
    return YES


def _triton_can_run(tensors: Tensors, options: Options) -> Answer:
    return _triton.can_run(tensors.image)


def _check(backend: str) -> Check:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = (random(2, 3, 11, 13), 3 * random(2, 2, 11, 13), random(2, 1, 11, 13).square())

    def run(backend: str, *tensors: Tensor) -> Tensor:
        return gaussian_warp(*tensors, padding_mode="reflection", backend=backend)

    return compare(partial(run, "reference"), partial(run, backend), tensors, backend)


_OPERATOR = register(
    Operator(
        name="gaussian_warp",
        implementations={
            "cpu": Implementation(_run_cpu, _cpu_can_run, _native.available),
            "triton": Implementation(_run_triton, _triton_can_run, _triton.available),
            "reference": Implementation(reference.warp, lambda *args: YES, lambda: YES),
        },
        check=_check,
        path="whole warps",
        cost=lambda tensors, options: cost.forward(*tensors, *options, None),
    )
)
