"""Penalties of a motion field in plain PyTorch: the definition. See README.md."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """What is not a tensor: the three coefficients, and whether channel 0 of the flow is along the last axis."""

    divergence: float
    magnitude: float
    smoothness: float
    xy: bool


def penalties(flow: Tensor, options: Options) -> Tensor:
    """Of each sample, (B,), for a flow (B, R, *S). Differentiable any number of times."""
    axes = range(flow.dim() - 2)
    total = flow.flatten(1)[:, :0].sum(1)  # what is left where all coefficients are zero
    if options.divergence:
        channels = [len(axes) - 1 - axis if options.xy else axis for axis in axes]
        components = [difference(flow[:, channel], 1 + axis) for axis, channel in zip(axes, channels, strict=True)]
        total = total + options.divergence * _mean(sum(components[1:], components[0]).square().unsqueeze(1))
    if options.magnitude:
        total = total + options.magnitude * _mean(flow.square())
    if options.smoothness:
        for axis in axes:
            total = total + options.smoothness * _mean(difference(flow, 2 + axis).square())
    return total


def difference(field: Tensor, dim: int) -> Tensor:
    """From each pixel to the next one; the last pixel's is that of the one before, a single pixel's is zero."""
    size = field.shape[dim]
    if size == 1:
        return torch.zeros_like(field)
    steps = field.narrow(dim, 1, size - 1) - field.narrow(dim, 0, size - 1)
    return torch.cat([steps, steps.narrow(dim, size - 2, 1)], dim)


def _mean(squares: Tensor) -> Tensor:
    """Over the pixels, and the sum over the components."""
    return squares.flatten(2).mean(2).sum(1)
