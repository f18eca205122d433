"""Warps on the C++ kernels of ``kernels/gaussian_warp``; the functions that op.py asks of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pykernels import _native
from pykernels.ops._memory import plain
from pykernels.ops.gaussian_warp.op import empty_frames, empty_gradients
from pykernels.ops.gaussian_warp.reference import (
    FORMS,
    NORMALIZE,
    PADDING_MODES,
    Options,
    Tensors,
    mass_beyond,
    most_radius,
)
from pykernels.ops.gaussian_warp.window import largest_variances, radius

_SUFFIX = {torch.float32: "float", torch.float64: "double"}


@lru_cache(maxsize=64)
def _limits(axis_tolerance: float, radii: int) -> Tensor:
    """The largest variances of the radii, as the kernels read them."""
    return torch.tensor(largest_variances(axis_tolerance, radii), dtype=torch.float64)


def _rows(t: Tensor, leading: int) -> Tensor:
    """``t`` with its dimensions from ``leading`` on contiguous; a copy only where they are not."""
    t = plain(t)
    expected = 1
    for size, stride in zip(reversed(t.shape[leading:]), reversed(t.stride()[leading:]), strict=True):
        if size > 1 and stride != expected:
            return t.contiguous()
        expected *= size
    return t


def _stride(t: Tensor, dim: int) -> int:
    return 0 if t.shape[dim] == 1 else t.stride(dim)


def _arguments(tensors: Tensors, options: Options, frames: Tensor | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The problem for the kernels, and the tensors behind it, to be kept alive."""
    ranks = tensors.image.dim() - 2
    image = plain(tensors.image)
    if image.shape[-1] > 1 and image.stride(-1) != 1:
        image = image.contiguous()
    flow = _rows(tensors.flow, 2)  # the kernels find the channels of its gradient where those of the flow are
    variance = None if tensors.variance is None else _rows(tensors.variance, 3)
    varies = variance is not None and variance.numel() > 0 and any(n > 1 for n in variance.shape[3:])
    missing = 3 - ranks
    axes = [0] * missing + [(ranks - 1 - a if options.xy else a) * flow.stride(2) for a in range(ranks)]
    support, limits = options.support, None
    if support == 0:
        beyond, most = mass_beyond(options, ranks), most_radius(options)
        if variance is None:
            support = 2 * radius(options.value, beyond, most) + 1
        elif most > 0:
            limits = _limits(beyond, most)
    sizes = [
        *image.shape[:2],
        flow.shape[1],
        *([1] * missing),
        *image.shape[2:],
        ranks,
        FORMS[options.form],
        NORMALIZE[options.normalize],
        PADDING_MODES[options.padding_mode],
        support,
        0 if limits is None else len(limits),
        torch.get_num_threads(),
    ]
    strides = [
        *image.stride()[:2],
        *([0] * missing),
        *image.stride()[2:-1],
        *flow.stride()[:2],
        *axes,
        *((0, 0) if variance is None else (_stride(variance, 0), _stride(variance, 1))),
    ]
    arrays = (
        0 if limits is None else limits.data_ptr(),
        image.data_ptr(),
        flow.data_ptr(),
        0 if variance is None else variance.data_ptr(),
        0 if frames is None else frames.data_ptr(),
    )
    scale = [1.0] * missing + options.scale
    return (sizes, strides, arrays, options.value, scale, varies), (image, flow, variance, limits)


def forward(tensors: Tensors, options: Options) -> Tensor:
    """See op.py."""
    assert _native.cpu is not None
    frames = empty_frames(tensors)
    problem, _kept = _arguments(tensors, options, frames)
    getattr(_native.cpu, f"gaussian_warp_forward_{_SUFFIX[frames.dtype]}")(*problem)
    return frames


def backward(
    grads: Tensor, frames: Tensor | None, tensors: Tensors, options: Options, needed: Sequence[bool]
) -> list[Tensor | None]:
    """See op.py."""
    assert _native.cpu is not None
    image, flow, variance = tensors
    batch, steps = flow.shape[:2]
    gradients = empty_gradients(tensors._replace(variance=None), (needed[0] or steps > 1, needed[1], False))
    grads = plain(grads).contiguous()
    kept = None if frames is None else plain(frames).contiguous()
    each = None
    if variance is not None and needed[2]:
        # Of every sample and step; what they share is summed up afterwards.
        each = variance.new_zeros((batch, steps, *variance.shape[2:]))
    problem, _kept = _arguments(tensors, options, kept)
    if image.numel() > 0 and steps > 0:
        addresses = (
            grads.data_ptr(),
            *(0 if g is None else g.data_ptr() for g in gradients[:2]),
            0 if each is None else each.data_ptr(),
        )
        getattr(_native.cpu, f"gaussian_warp_backward_{_SUFFIX[grads.dtype]}")(*problem, addresses)
    else:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    if variance is not None and each is not None:
        shared = [dim for dim in (0, 1) if variance.shape[dim] == 1 and each.shape[dim] != 1]
        gradients[2] = each.sum(shared, keepdim=True) if shared else each
    if not needed[0]:
        gradients[0] = None
    return gradients
