"""Penalties of a motion field in plain PyTorch: the definition. See README.md."""

from __future__ import annotations

import math
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
    total = flow[..., :0].sum(tuple(range(1, flow.dim())))  # what is left where all coefficients are zero
    if options.divergence:
        total = total + options.divergence * _mean(_divergence(flow, options).square().unsqueeze(1))
    if options.magnitude:
        total = total + options.magnitude * _mean(flow.square())
    if options.smoothness:
        for dim in range(2, flow.dim()):
            total = total + options.smoothness * _mean(difference(flow, dim).square())
    return total


def gradient(grads: Tensor, flow: Tensor, options: Options) -> Tensor:
    """That of the penalties times ``grads`` (B,): linear in both."""
    total = options.magnitude * flow if options.magnitude else torch.zeros_like(flow)
    if options.smoothness:
        for dim in range(2, flow.dim()):
            total = total + options.smoothness * transposed(difference(flow, dim), dim)
    if options.divergence:
        divergence = _divergence(flow, options)
        dims = range(2, flow.dim())
        terms = [transposed(divergence, dim - 1) for dim in (reversed(dims) if options.xy else dims)]
        total = total + options.divergence * torch.stack(terms, 1)
    return total * (2 / math.prod(flow.shape[2:]) * grads).reshape(-1, *(1 for _ in flow.shape[1:]))


def _divergence(flow: Tensor, options: Options) -> Tensor:
    """(B, *S)."""
    ranks = flow.dim() - 2
    terms = [difference(flow[:, c], ranks - c if options.xy else 1 + c) for c in range(ranks)]
    return sum(terms[1:], terms[0])


def difference(field: Tensor, dim: int) -> Tensor:
    """From each pixel to the next one; the last pixel's is that of the one before, a single pixel's is zero."""
    size = field.shape[dim]
    if size == 1:
        return torch.zeros_like(field)
    steps = field.narrow(dim, 1, size - 1) - field.narrow(dim, 0, size - 1)
    return torch.cat([steps, steps.narrow(dim, size - 2, 1)], dim)


def transposed(field: Tensor, dim: int) -> Tensor:
    """The transpose of :func:`difference`."""
    size = field.shape[dim]
    if size == 1:
        return torch.zeros_like(field)
    end = field.narrow(dim, size - 2, 1) + field.narrow(dim, size - 1, 1)
    steps = torch.cat([field.narrow(dim, 0, size - 2), end], dim)
    none = torch.zeros_like(end)
    return torch.cat([none, steps], dim) - torch.cat([steps, none], dim)


def _mean(squares: Tensor) -> Tensor:
    """Over the pixels, and the sum over the components."""
    return squares.mean(tuple(range(2, squares.dim()))).sum(1)
