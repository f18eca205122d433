"""GPU benchmarks of the causal convolutions: dense layers as in encoders, depthwise ones as in state space models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_cases import Case
from torch import Tensor

import pykernels


class Layer(NamedTuple):
    """Sizes of a layer; dense ones add a residual after a leaky ReLU, depthwise ones have SiLU alone."""

    batch: int
    channels: int
    length: int
    kernel_size: int
    dilation: int
    depthwise: bool

    @property
    def groups(self) -> int:
        return self.channels if self.depthwise else 1

    def __str__(self) -> str:
        kind = "depthwise" if self.depthwise else "dense"
        return f"{kind} {self.batch}x{self.channels}x{self.length} K={self.kernel_size} d={self.dilation}"

    def flops(self, backward: bool) -> int:
        """Without taps that reach before the start; the backward has twice as many as the forward."""
        live = sum(max(0, self.length - tap * self.dilation) for tap in range(self.kernel_size))
        return 2 * self.batch * self.channels * (self.channels // self.groups) * live * (3 if backward else 1)

    def bytes_moved(self, dtype: torch.dtype, backward: bool) -> int:
        """Reads x and any residual, writes y; the backward also keeps and reads what act' needs, and writes grad_x."""
        series = self.batch * self.channels * self.length
        weights = self.channels * (self.channels // self.groups) * self.kernel_size + self.channels
        elements = series * (2 if self.depthwise else 3) + weights
        if backward:
            elements += (
                series + 4 * series + 2 * weights
            )  # saved; grad_y, saved, x and grad_x; weights, their gradients
        return elements * dtype.itemsize

    def tensors(self, device: str) -> list[Tensor]:
        """x, weight, bias and, if dense, residual, in float64."""
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)

        per_group = self.channels // self.groups
        series = (self.batch, self.channels, self.length)
        weight = random(self.channels, per_group, self.kernel_size) / (per_group * self.kernel_size) ** 0.5
        return [random(*series), weight, random(self.channels), *([] if self.depthwise else [random(*series)])]


def plain(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """What users write today."""
    padded = F.pad(x, ((layer.kernel_size - 1) * layer.dilation, 0))
    z = F.conv1d(padded, weight, bias, dilation=layer.dilation, groups=layer.groups)
    return F.silu(z) if residual is None else F.leaky_relu(z, 0.01) + residual


def ours(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    y: Tensor = pykernels.causal_conv1d(
        x,
        weight,
        bias,
        dilation=layer.dilation,
        groups=layer.groups,
        activation="silu" if residual is None else "leaky_relu",
        residual=residual,
    )
    return y


def run(function: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor | None) -> list[Tensor]:
    y = function(*tensors)
    return [y.detach()] if grad is None else [y.detach(), *torch.autograd.grad(y, tensors, grad)]


def prepare(layer: Layer, dtype: torch.dtype, backward: bool, device: str) -> tuple[dict[str, Any], list[Tensor]]:
    tensors = [t.to(dtype).requires_grad_(backward) for t in layer.tensors(device)]
    grad = torch.randn(tensors[0].shape, device=device).to(dtype) if backward else None
    doubles = [t.detach().double().requires_grad_(backward) for t in tensors]
    expected = run(partial(plain, layer), doubles, None if grad is None else grad.double())
    ways = {"pykernels": ours, "eager": plain, "compiled": torch.compile(plain, dynamic=False)}
    return {name: partial(run, partial(way, layer), tensors, grad) for name, way in ways.items()}, expected


LAYERS = [
    *(
        Layer(*shape, kernel_size=3, dilation=dilation, depthwise=False)
        for shape in ((8, 40, 1000), (16, 64, 4096), (64, 256, 4096))
        for dilation in (1, 64)
    ),
    Layer(8, 2048, 4096, 4, 1, depthwise=True),
    Layer(1, 8192, 1024, 4, 1, depthwise=True),
]


def cases() -> Iterator[Case]:
    for layer in LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            for backward in (False, True):
                name = f"{layer} {str(dtype)[6:]}{', backward' if backward else ''}"
                cost = (layer.flops(backward), layer.bytes_moved(dtype, backward))
                yield Case(name, dtype, *cost, partial(prepare, layer, dtype, backward))
