"""Operators ``pykernels::gaussian_warp*``: schemas, shapes for tracing, and the choice of the kernels that run them.

Private: :func:`pykernels.gaussian_warp` checks the arguments and adds the derivatives. A backend's kernels are a module
with these functions of the tensors and options of :mod:`reference`:

``forward(tensors, options) -> Tensor``
    the images (B, T, C, *S) after each of T warps, contiguous.
``backward(grads, frames, tensors, options, needed) -> list[Tensor | None]``
    gradients of image, flow and variance, each like its tensor and contiguous, or None where not ``needed``. ``grads``
    are those of the result, of any strides; ``frames`` is the result, of which warp t read frames[:, t - 1], or None
    where T is 1.

A pixel whose flow or variance is NaN is NaN, and passes no gradient on.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pykernels.ops._op import implement, library
from pykernels.ops.gaussian_warp import cost
from pykernels.ops.gaussian_warp.reference import Options, Tensors

_INPUTS = (
    "Tensor image, Tensor flow, Tensor? variance, float value, str form, str normalize, str padding_mode, int support, "
    "float tolerance, int max_support, float[] scale, bool xy, str backend"
)
library.define(f"gaussian_warp({_INPUTS}) -> Tensor")
library.define(f"gaussian_warp_backward(Tensor grads, Tensor? frames, {_INPUTS}, bool[] needed) -> Tensor[]")

forward_op = torch.ops.pykernels.gaussian_warp.default
backward_op = torch.ops.pykernels.gaussian_warp_backward.default

_N_TENSORS = len(Tensors._fields)
_kernels: dict[str, Any] = {}


def kernels(backend: str) -> Any:
    """The module with the kernels of a backend; imported when it is first used, since it may need another package."""
    module = _kernels.get(backend)
    if module is None:
        module = _kernels[backend] = import_module(f"pykernels.ops.gaussian_warp.{backend}")
    return module


def problem(args: Sequence[Any]) -> tuple[Tensors, Options]:
    """The arguments of ``pykernels::gaussian_warp`` but the backend."""
    return Tensors(*args[:_N_TENSORS]), Options(*args[_N_TENSORS:])


def frames_shape(tensors: Tensors) -> tuple[int, ...]:
    """Of the result."""
    return (*tensors.flow.shape[:2], *tensors.image.shape[1:])


def empty_frames(tensors: Tensors) -> Tensor:
    return tensors.image.new_empty(frames_shape(tensors))


def empty_gradients(tensors: Tensors, needed: Sequence[bool]) -> list[Tensor | None]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need and t is not None else None
        for t, need in zip(tensors, needed, strict=True)
    ]


def _forward(*args: Any) -> Tensor:
    tensors, options = problem(args[:-1])
    _check_shapes(tensors, options)
    frames: Tensor = kernels(args[-1]).forward(tensors, options)
    return frames


def _backward(grads: Tensor, frames: Tensor | None, *args: Any) -> list[Tensor]:
    *args_, backend, needed = args
    tensors, options = problem(args_)
    _check_shapes(tensors, options)
    for t in (grads, frames):
        if t is not None:
            _check(t, frames_shape(tensors), tensors.image.dtype)
    if frames is None and tensors.flow.shape[1] > 1:
        raise ValueError("frames must be the result of the warps")
    gradients: list[Tensor | None] = kernels(backend).backward(grads, frames, tensors, options, needed)
    return [grads.new_empty(0) if g is None else g for g in gradients]


def _check(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if t.shape != shape or t.dtype != dtype:
        raise ValueError(
            f"a tensor of shape {tuple(t.shape)} and dtype {t.dtype} must be {shape} and {dtype}; "
            "call pykernels.gaussian_warp rather than the raw operator"
        )


def _check_shapes(tensors: Tensors, options: Options) -> None:
    """Raise unless the tensors fit together: the public function has checked more, but need not have been called."""
    image, flow, variance = tensors
    sizes = tuple(image.shape[2:])
    if not 1 <= len(sizes) <= 3 or 0 in sizes or flow.dim() != image.dim() + 1 or len(options.scale) != len(sizes):
        raise ValueError(f"an image of shape {tuple(image.shape)}; call pykernels.gaussian_warp instead")
    batch, steps = flow.shape[:2]
    _check(flow, (image.shape[0], steps, len(sizes), *sizes), image.dtype)
    if variance is not None:
        shared = tuple(variance.shape[3:]) == (1,) * len(sizes)
        expected = (1 if variance.shape[0] == 1 else batch, 1 if variance.shape[1] == 1 else steps, 1)
        _check(variance, (*expected, *([1] * len(sizes) if shared else sizes)), image.dtype)


def _forward_fake(*args: Any) -> Tensor:
    return empty_frames(problem(args[:-1])[0])


def _backward_fake(grads: Tensor, frames: Any, *args: Any) -> list[Tensor]:
    *args_, _, needed = args
    gradients = empty_gradients(problem(args_)[0], needed)
    return [grads.new_empty(0) if g is None else g for g in gradients]


implement(forward_op, _forward, _forward_fake, devices=("CPU", "CUDA"), cost=cost.forward)
implement(backward_op, _backward, _backward_fake, devices=("CPU", "CUDA"), cost=cost.backward)
