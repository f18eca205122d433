"""Warps of the same images by other libraries, for cpu_gaussian_warp.py.

Some compute the Gaussian warp itself: as a separable einsum, as a sum over pairs of pixels by KeOps, and by a kernel of
NVIDIA Warp with the same window. Others sample the same positions with another kernel, for which no exponential is due:
bilinear by ``grid_sample``, its grid built from the flow, and cubic by torch-interpol. Each is checked in float64.
Peers that are not installed are left out with a line that says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from contenders import lazy_tensor
from torch import Tensor

import pykernels
from pykernels.ops.gaussian_warp.window import axis_tolerance, radius

Warp = Callable[[Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    """image (B, C, H, W), flow (B, 2, H, W) in pixels, the gradient of the result."""

    image: Tensor
    flow: Tensor
    grad: Tensor

    @classmethod
    def random(cls, shape: tuple[int, int, int, int], rough: bool = False) -> Problem:
        """With a flow of some three pixels that varies over an eighth of the image, or from pixel to pixel."""
        torch.manual_seed(0)
        batch, _, *sizes = shape
        if rough:
            flow = 3 * torch.randn(batch, 2, *sizes)
        else:
            flow = F.interpolate(3 * torch.randn(batch, 2, 8, 8), size=sizes, mode="bicubic")
        return cls(torch.randn(shape), flow, torch.randn(shape))


def positions(flow: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pixel reads, x and y."""
    height, width = flow.shape[-2:]
    x = torch.arange(width, dtype=flow.dtype) - flow[:, 0]
    y = torch.arange(height, dtype=flow.dtype).unsqueeze(1) - flow[:, 1]
    return x, y


def bilinear(image: Tensor, flow: Tensor) -> Tensor:
    height, width = flow.shape[-2:]
    x, y = positions(flow)
    grid = torch.stack([x * (2 / (width - 1)) - 1, y * (2 / (height - 1)) - 1], -1)
    return F.grid_sample(image, grid, align_corners=True)


def einsum(variance: float) -> Warp:
    """The whole image's weights on each axis, which are multiplied out."""

    def warp(image: Tensor, flow: Tensor) -> Tensor:
        scale = 1 / math.sqrt(2 * variance)

        def weights(position: Tensor, size: int) -> Tensor:
            edges = torch.arange(size + 1, dtype=flow.dtype) - 0.5
            mass = torch.erf((edges - position.flatten(1).unsqueeze(-1)) * scale).diff()
            return mass / 2

        x, y = positions(flow)
        height, width = flow.shape[-2:]
        return torch.einsum("bnp,bcpq,bnq->bcn", weights(y, height), image, weights(x, width)).view_as(image)

    return warp


def keops(variance: float) -> Warp:
    """Pairs of pixels, with the density rather than the mass of the Gaussian."""

    def warp(image: Tensor, flow: Tensor) -> Tensor:
        lazy = lazy_tensor()
        height, width = flow.shape[-2:]
        centres = torch.stack(positions(flow), -1).flatten(1, 2)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        pixels = torch.stack([x, y], -1).to(flow.dtype).view(1, -1, 2).expand(len(flow), -1, -1).contiguous()
        distance = ((lazy(centres[:, :, None, :]) - lazy(pixels[:, None, :, :])) ** 2).sum(-1)
        weights = (-distance / (2 * variance)).exp()
        values = image.flatten(2).transpose(1, 2).contiguous()
        summed = (weights @ values) / (2 * math.pi * variance)
        return summed.transpose(1, 2).reshape(image.shape)

    return warp


@cache
def _warp_kernel(taps: int) -> Any:
    import warp as wp

    wp.config.quiet = True
    wp.init()

    @wp.kernel
    def gaussian(
        image: wp.array3d(dtype=wp.float32),
        flow: wp.array4d(dtype=wp.float32),
        scale: wp.float32,
        out: wp.array3d(dtype=wp.float32),
    ):
        b, i, j = wp.tid()
        x = wp.float32(j) - flow[b, 0, i, j]
        y = wp.float32(i) - flow[b, 1, i, j]
        left = wp.int32(wp.floor(x + 0.5)) - taps // 2
        top = wp.int32(wp.floor(y + 0.5)) - taps // 2
        total = wp.float32(0.0)
        mass = wp.float32(0.0)
        edge_y = wp.erf((wp.float32(top) - 0.5 - y) * scale)
        for p in range(top, top + taps):
            next_y = wp.erf((wp.float32(p) + 0.5 - y) * scale)
            edge_x = wp.erf((wp.float32(left) - 0.5 - x) * scale)
            for q in range(left, left + taps):
                next_x = wp.erf((wp.float32(q) + 0.5 - x) * scale)
                weight = (next_y - edge_y) * (next_x - edge_x)
                mass += weight
                if p >= 0 and p < image.shape[1] and q >= 0 and q < image.shape[2]:
                    total += weight * image[b, p, q]
                edge_x = next_x
            edge_y = next_y
        out[b, i, j] = total / mass

    return gaussian


def nvidia_warp(variance: float, taps: int) -> Warp:
    """One channel, float32, without gradients; its CPU kernels run on one thread."""

    def warp(image: Tensor, flow: Tensor) -> Tensor:
        import warp as wp

        out = torch.empty_like(image)
        kernel = _warp_kernel(taps)
        arrays = [wp.from_torch(t) for t in (image[:, 0], flow)]
        scale = 1 / math.sqrt(2 * variance)
        target = wp.from_torch(out[:, 0])
        wp.launch(kernel, dim=tuple(image[:, 0].shape), inputs=[*arrays, scale, target], device="cpu")
        return out

    return warp


def cubic(image: Tensor, flow: Tensor) -> Tensor:
    import interpol

    x, y = positions(flow)
    return interpol.grid_pull(image, torch.stack([y, x], -1), interpolation=3, bound="zero", prefilter=False)


def peers(variance: float, support: int | None, shape: tuple[int, int, int, int], backward: bool) -> dict[str, Warp]:
    """By name, those that are installed and can do it, in a time that bears repeating."""
    batch, channels, height, _ = shape
    found: dict[str, Warp] = {"bilinear grid_sample": bilinear}
    taps = 2 * radius(variance, axis_tolerance(1e-4, 2, "window", "zeros"), 127) + 1 if support is None else support
    if channels == 1 and support is None and not backward:
        found["warp-lang"] = nvidia_warp(variance, taps)
    if not backward:
        found["cubic torch-interpol"] = cubic
    if height <= 64 and support is None:
        found["separable einsum"] = einsum(variance)
        if batch <= 4 and not backward:
            found["pykeops"] = keops(variance)
    tiny = torch.ones(1, channels, 4, 4)
    for name in list(found):
        try:
            found[name](tiny, torch.zeros(1, 2, 4, 4))
        except ImportError as error:
            print(f"without {name}: {error}")
            del found[name]
    return found


def expected(name: str, problem: Problem, variance: float, support: int | None, ours: dict[str, Any]) -> Warp:
    """What a peer should compute, in float64."""
    if name in ("bilinear grid_sample", "pykernels bilinear"):
        return bilinear
    if name == "cubic torch-interpol":
        return cubic
    if name == "separable einsum":
        return einsum(variance)
    options = {"form": "density", "normalize": "none"} if name == "pykeops" else {"support": support, **ours}
    return lambda image, flow: pykernels.gaussian_warp(image, flow, variance, **options)
