"""Gaussian warping in plain PyTorch: the definition, tap by tap.

Output pixel x reads around c = x - flow(x). On each axis the K taps nearest to c, at pixels p, have weights w(p - c):

    integrated   Phi((p + 1/2 - c) / s) - Phi((p - 1/2 - c) / s)     the Gaussian's mass in the pixel's cell, s^2 = v
    density      exp(-(p - c)^2 / (2 v)) / sqrt(2 pi v)
    linear       1 - |p - c|                                         with K = 2: bilinear sampling

and the result is the sum, over the product of the axes' windows, of the products of weights times the image, whose
pixels beyond the border are those of the padding mode. Normalisation divides each axis' weights by their sum. See
README.md.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pykernels.ops.gaussian_warp.window import axis_tolerance, largest_variances, radius

FORMS = {"integrated": 0, "density": 1, "linear": 2}
NORMALIZE = {"none": 0, "window": 1, "inside": 2}
PADDING_MODES = {"zeros": 0, "border": 1, "reflection": 2, "periodic": 3}

#: Displacements are cut off here, in pixels: the integers that follow from them stay exact and far from overflow.
FARTHEST = float(1 << 30)


class Options(NamedTuple):
    """What is not a tensor.

    Args:
        value: the variance where no tensor holds it, in pixels squared.
        form: a key of :data:`FORMS`.
        normalize: a key of :data:`NORMALIZE`.
        padding_mode: a key of :data:`PADDING_MODES`.
        support: taps per axis, or 0: as many as the tolerance asks for.
        tolerance: mass that may lie beyond the window.
        max_support: most taps per axis where ``support`` is 0.
        scale: pixels per unit of the flow, for each spatial axis from the first to the last.
        xy: whether channel 0 of the flow is along the last axis, rather than the first.
    """

    value: float
    form: str
    normalize: str
    padding_mode: str
    support: int
    tolerance: float
    max_support: int
    scale: list[float]
    xy: bool


class Tensors(NamedTuple):
    """The tensors of T warps, each of the last one's result, with R spatial axes of sizes S.

    Args:
        image: (B, C, *S).
        flow: (B, T, R, *S), in the dtype of the image, as is the variance.
        variance: (B or 1, T or 1, 1, *S or R ones), or None.
    """

    image: Tensor
    flow: Tensor
    variance: Tensor | None


def most_radius(options: Options) -> int:
    """Of windows whose width follows from the variance."""
    return (options.max_support - 1) // 2


def mass_beyond(options: Options, ranks: int) -> float:
    """What may lie beyond such a window on each axis."""
    return axis_tolerance(options.tolerance, ranks, options.normalize, options.padding_mode)


def warp(tensors: Tensors, options: Options) -> Tensor:
    """The images (B, T, C, *S) after each warp. Differentiable any number of times."""
    image, flow, variance = tensors
    frames = []
    for step in range(flow.shape[1]):
        v = None if variance is None else variance[:, step if variance.shape[1] > 1 else 0, 0]
        image = _warp(image, flow[:, step], v, options)
        frames.append(image)
    return torch.stack(frames, 1) if frames else image.unsqueeze(1)[:, :0]


def _warp(image: Tensor, flow: Tensor, variance: Tensor | None, options: Options) -> Tensor:
    """One warp; the variance is (B or 1, *S or ones)."""
    sizes = image.shape[2:]
    ranks = len(sizes)
    valid = ~flow.isnan().any(1)
    if variance is not None:
        valid = valid & (variance >= 0)  # neither negative nor NaN
        variance = torch.where(variance >= 0, variance, 0)
    taps = _taps(variance, options, ranks)
    weights, masks, indices = [], [], []
    for axis, size in enumerate(sizes):
        displacement = -options.scale[axis] * flow[:, ranks - 1 - axis if options.xy else axis]
        displacement = torch.where(valid, displacement, 0).clamp(-FARTHEST, FARTHEST)
        # The whole pixels of a displacement and the rest are told apart before the position is added, which is larger.
        whole = _whole(displacement.detach(), taps)
        rest = displacement - whole
        offsets = torch.arange(-((taps - 1) // 2), taps // 2 + 1, device=image.device)
        shape = [1] * ranks
        shape[axis] = size
        positions = torch.arange(size, device=image.device).view(shape)
        pixels = (positions + whole.long()).unsqueeze(-1) + offsets
        inside = (pixels >= 0) & (pixels < size)
        weight, used = _weights(offsets - rest.unsqueeze(-1), offsets, inside, variance, options, ranks)
        weights.append(weight)
        masks.append(used)
        indices.append(_padded(pixels, size, options.padding_mode))
    result = _sum(image, weights, masks, indices)
    return torch.where(valid.unsqueeze(1), result, torch.nan)


def _whole(displacement: Tensor, taps: int) -> Tensor:
    """The pixel nearest to a displacement, or for an even number of taps the one before it."""
    if taps % 2 == 0:
        return displacement.floor()
    # From 2^22 on, in float32, the sum would lose the half.
    exact = 0.5 / torch.finfo(displacement.dtype).eps
    return torch.where(displacement.abs() < exact, displacement + 0.5, displacement).floor()


def _taps(variance: Tensor | None, options: Options, ranks: int) -> int:
    """How many taps each axis' window has; where the variance varies, the widest one."""
    if options.support > 0:
        return options.support
    if variance is None:
        largest = options.value
    elif torch.compiler.is_compiling():
        return options.max_support
    else:
        plain = variance.detach()
        while torch._C._functorch.is_functorch_wrapped_tensor(plain):
            plain = torch._C._functorch.get_unwrapped(plain)
        largest = plain.nan_to_num(0.0).max().item() if plain.numel() else 0.0
    return 2 * radius(largest, mass_beyond(options, ranks), most_radius(options)) + 1


def _weights(
    distance: Tensor, offsets: Tensor, inside: Tensor, variance: Tensor | None, options: Options, ranks: int
) -> tuple[Tensor, Tensor]:
    """Weights (B, *S, K) of taps at these distances from the centre, and which of them read the image."""
    if options.form == "linear":
        # 1 + d and 1 - d: where the centre is on a pixel, the derivative is that towards the next one.
        weights = 1 + (1 - 2 * offsets) * distance
        return weights, inside if options.padding_mode == "zeros" else torch.ones_like(inside)
    v = distance.new_full((), options.value) if variance is None else variance.unsqueeze(-1)
    # Below, the inverse square of a variance would overflow; the result is the nearest pixel long before.
    positive = v > torch.finfo(v.dtype).tiny ** 0.5
    v = torch.where(positive, v, 1)
    window = torch.ones_like(inside)
    if options.support == 0 and variance is not None:
        limits = largest_variances(mass_beyond(options, ranks), most_radius(options))[: max(len(offsets) // 2 - 1, 0)]
        radii = torch.where(positive, 1 + (v > v.new_tensor(limits)).sum(-1, keepdim=True), 0)
        window = offsets.abs() <= radii
    counted = window & inside if options.normalize == "inside" and options.padding_mode == "zeros" else window
    if options.form == "density":
        exponent = distance.square() * (-0.5 / v)
        if options.normalize != "none":
            # The nearest tap has weight 1, so that small variances do not underflow.
            exponent = exponent - torch.where(counted, exponent.detach(), -torch.inf).amax(-1, keepdim=True).clamp(
                min=torch.finfo(v.dtype).min
            )
        weights = torch.where(counted, exponent, 0).exp()
        if options.normalize == "none":
            weights = weights / (2 * math.pi * v).sqrt()
    else:
        scale = (2 * v).rsqrt()
        weights = _mass((distance - 0.5) * scale, (distance + 0.5) * scale)
    # At variance 0 every form is the nearest pixel.
    nearest = offsets == 0
    if len(offsets) % 2 == 0:
        nearest = torch.where(distance[..., (len(offsets) - 1) // 2, None] > -0.5, nearest, offsets == 1)
    weights = torch.where(counted, torch.where(positive, weights, nearest.to(weights.dtype)), 0)
    if options.normalize != "none":
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1)
    return weights, window & inside if options.padding_mode == "zeros" else window


def _mass(low: Tensor, high: Tensor) -> Tensor:
    """``(erf(high) - erf(low)) / 2``, without cancellation in the tails."""
    above, below = low > 0, high < 0
    near = torch.where(above, low, torch.where(below, -high, 0))
    far = torch.where(above, high, torch.where(below, -low, 0))
    tail = torch.erfc(near) - torch.erfc(far)
    middle = ~(above | below)
    body = torch.erf(torch.where(middle, high, 0)) - torch.erf(torch.where(middle, low, 0))
    return torch.where(middle, body, tail) / 2


def _padded(pixels: Tensor, size: int, padding_mode: str) -> Tensor:
    """The pixel inside the image that stands for each; where zeros stand for it, any."""
    match padding_mode:
        case "periodic":
            return pixels.remainder(size)
        case "reflection":  # about the edges of the outermost pixels: ... 1 0 | 0 1 2 | 2 1 ...
            folded = pixels.remainder(2 * size)
            return torch.where(folded < size, folded, 2 * size - 1 - folded)
    return pixels.clamp(0, size - 1)


def _sum(image: Tensor, weights: list[Tensor], masks: list[Tensor], indices: list[Tensor]) -> Tensor:
    """Sum over the windows; gathers one row of taps at a time. What a mask leaves out is not read, were it NaN."""
    batch, channels, *sizes = image.shape
    flat = image.flatten(2)
    total = torch.zeros_like(image)
    for taps in itertools.product(*(range(w.shape[-1]) for w in weights[:-1])):
        index, weight, mask = indices[-1], weights[-1], masks[-1]
        stride = sizes[-1]
        for axis in reversed(range(len(taps))):
            index = index + stride * indices[axis][..., taps[axis], None]
            weight = weight * weights[axis][..., taps[axis], None]
            mask = mask & masks[axis][..., taps[axis], None]
            stride *= sizes[axis]
        where = index.expand(batch, *sizes, -1).flatten(1).unsqueeze(1).expand(-1, channels, -1)
        row = flat.gather(2, where).view(batch, channels, *sizes, index.shape[-1])
        total = total + (torch.where(mask.unsqueeze(1), row, 0) * weight.unsqueeze(1)).sum(-1)
    return total
