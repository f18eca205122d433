"""The strongest forms of the same work in plain PyTorch, and KeOps as fast as it goes."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels.models._plain import PlainCausalCNNEncoder


@cache
def lazy_tensor() -> Any:
    """KeOps' symbolic tensors, compiled for this machine: by default it is twice as slow."""
    os.environ.setdefault("CXXFLAGS", "-O3 -march=native -ffast-math")
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)
    return LazyTensor


def plain_layer(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """Pad, convolve, leaky ReLU."""
    padded = F.pad(x, ((weight.shape[2] - 1) * dilation, 0))
    return F.leaky_relu(F.conv1d(padded, weight, bias, dilation=dilation), 0.01)


def channels_last_layer(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """The same for images of height 1, x (B, C, 1, T) and weight (O, C, 1, K), both in channels-last memory."""
    padded = F.pad(x, ((weight.shape[3] - 1) * dilation, 0))
    return F.leaky_relu(F.conv2d(padded, weight, bias, dilation=(1, dilation)), 0.01)


def as_image(t: Tensor) -> Tensor:
    """(A, B, T) as (A, B, 1, T) in channels-last memory."""
    return t.unsqueeze(2).contiguous(memory_format=torch.channels_last)


def training_step(encoder: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """One step on windows x: forward, backward, weight normalisation and Adam."""
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        features = forward(x)
        features.square().mean().backward()
        optimizer.step()
        return features.detach()

    return step


class ChannelsLastEncoder(nn.Module):
    """The plain encoder with its data in channels-last memory."""

    def __init__(self, plain: PlainCausalCNNEncoder) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        y = as_image(x)
        for block in self.plain.blocks:
            residual = y if block.skip is None else _convolve(y, block.skip)
            for conv in (block.conv1, block.conv2):
                y = F.leaky_relu(_convolve(F.pad(y, (block.padding, 0)), conv), 0.01)
            y = y + residual
        features: Tensor = self.plain.linear(y.amax((2, 3)))
        return features


def _convolve(x: Tensor, conv: Any) -> Tensor:
    return F.conv2d(x, as_image(conv.weight), conv.bias, dilation=(1, *conv.dilation))
