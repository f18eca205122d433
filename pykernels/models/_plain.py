"""The encoder of :class:`pykernels.nn.CausalCNNEncoder` in plain PyTorch, to compare speed and results with."""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm


class PlainCausalConvBlock(nn.Module):
    """:class:`pykernels.nn.CausalConvBlock` by ``F.pad``, ``nn.Conv1d``, ``F.leaky_relu`` and ``+``.

    Padding on the left alone is the fast eager form: ``nn.Conv1d(padding=...)`` pads both sides and computes
    ``(kernel_size - 1) * dilation`` outputs more, to be cut off again.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        dilation: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def conv(channels: int) -> nn.Module:
            layer: nn.Module = weight_norm(
                nn.Conv1d(channels, out_channels, kernel_size, dilation=dilation, device=device, dtype=dtype)
            )
            return layer

        self.padding = (kernel_size - 1) * dilation
        self.conv1 = conv(in_channels)
        self.conv2 = conv(out_channels)
        self.skip = (
            None if in_channels == out_channels else nn.Conv1d(in_channels, out_channels, 1, device=device, dtype=dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.leaky_relu(self.conv1(F.pad(x, (self.padding, 0))), 0.01)
        y = F.leaky_relu(self.conv2(F.pad(y, (self.padding, 0))), 0.01)
        return y + (x if self.skip is None else self.skip(x))


class PlainCausalCNNEncoder(nn.Module):
    """:class:`pykernels.nn.CausalCNNEncoder` without pykernels: same arguments, same state_dict.

    Shape:
        input (B, in_channels, T) with T >= 1, output (B, out_channels). With ``cu_seqlens`` (N + 1,), the offsets of N
        series packed into (1, in_channels, total), which then go one after the other: (N, out_channels).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 40,
        depth: int = 10,
        reduced_size: int = 160,
        out_channels: int = 320,
        kernel_size: int = 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * depth + [reduced_size]
        self.blocks = nn.Sequential(
            *(
                PlainCausalConvBlock(c_in, c_out, kernel_size, 2**i, device=device, dtype=dtype)
                for i, (c_in, c_out) in enumerate(pairwise(widths))
            )
        )
        self.linear = nn.Linear(reduced_size, out_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        parts = [x] if cu_seqlens is None else torch.split(x, cu_seqlens.diff().tolist(), 2)
        y: Tensor = self.linear(torch.cat([self.blocks(part).max(2).values for part in parts]))
        return y

    def folded(self) -> AbstractContextManager[None]:
        """As :meth:`pykernels.nn.CausalCNNEncoder.folded`."""
        return parametrize.cached()
