"""The temporal convolutional network: residual blocks of dilated causal convolutions, as widely copied."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pykernels.nn.causal_conv import CausalConv1d
from pykernels.ops.causal_conv.reference import padding

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
}


class TemporalBlock(nn.Module):
    """Two weight-normalised causal convolutions with activation and dropout, and a residual connection around them.

    ``h = drop(act(conv1(x)))``, output ``act(drop(act(conv2(h))) + x)``, with a convolution of width 1 on ``x`` where
    the number of channels changes. Arguments and shapes as for :class:`TemporalConvNet`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int,
        dropout: float = 0.2,
        *,
        activation: str = "relu",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype}

        def conv(channels: int) -> CausalConv1d:
            layer = CausalConv1d(
                channels, out_channels, kernel_size, dilation=dilation, activation=activation, **options
            )
            weight_norm(layer)
            return layer

        self.conv1: CausalConv1d = conv(in_channels)
        self.conv2: CausalConv1d = conv(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.downsample: CausalConv1d | None = None
        if in_channels != out_channels:
            self.downsample = CausalConv1d(in_channels, out_channels, 1, **options)
            nn.init.normal_(self.downsample.weight, 0, 0.01)

    def forward(self, x: Tensor, **modes: Tensor | None) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x, **modes)
        h = self.dropout(self.conv1(x, **modes))
        dropping = self.training and self.dropout.p > 0
        y = self.dropout(self.conv2(h, **modes)) + residual if dropping else self.conv2(h, residual, **modes)
        assert self.conv2.activation is not None
        return ACTIVATIONS[self.conv2.activation](y)


class TemporalConvNet(nn.Module):
    """Temporal convolutional network (TCN), a drop-in for the widely copied implementation.

    Level i is a residual block of two weight-normalised causal convolutions with dilation ``2**i``:
    ``h = drop(relu(conv1(x)))``, output ``relu(drop(relu(conv2(h))) + x)``, with a convolution of width 1 on ``x``
    where the number of channels changes. Weights start as there: those of width 1 normally distributed with deviation
    0.01, all others as in :class:`torch.nn.Conv1d`.

    ``load_state_dict`` takes the keys of that implementation, with weight normalisation of the old style (``weight_g``,
    ``weight_v``) or as a parametrisation, also where the network is a part of another module.
    :meth:`published_state_dict` gives them back.

    Args:
        num_inputs: channels of the series.
        num_channels: channels of each level.
        kernel_size: of the convolutions.
        dropout: probability, while training, that a value behind an activation is set to zero.
        dilations: of each level, in place of 1, 2, 4, ...
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"silu"`` or ``"gelu"``, in all places.
        backend: see :func:`pykernels.causal_conv1d`.

    Shape:
        input (B, num_inputs, T) or (num_inputs, T), output (B, num_channels[-1], T) or (num_channels[-1], T).
        ``forward`` also takes ``cu_seqlens`` or ``lengths``, see :func:`pykernels.causal_conv1d`, with (B, C, T).

    Raises:
        ValueError: if ``num_channels`` is empty, ``dilations`` has another length, or there is no such activation.

    Source: Bai, Kolter and Koltun, "An empirical evaluation of generic convolutional and recurrent networks for
    sequence modeling", arXiv 1803.01271 (2018).
    """

    def __init__(
        self,
        num_inputs: int,
        num_channels: Sequence[int],
        kernel_size: int = 2,
        dropout: float = 0.2,
        *,
        dilations: Sequence[int] | None = None,
        activation: str = "relu",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(num_channels) == 0:
            raise ValueError("num_channels must have at least one level, got none")
        if dilations is None:
            dilations = [2**i for i in range(len(num_channels))]
        if len(dilations) != len(num_channels):
            raise ValueError(
                f"dilations must have one value for each of the {len(num_channels)} levels, got {len(dilations)}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
        widths = [num_inputs, *num_channels]
        self.network = nn.Sequential(
            *(
                TemporalBlock(
                    widths[i],
                    widths[i + 1],
                    kernel_size,
                    dilation,
                    dropout,
                    activation=activation,
                    backend=backend,
                    device=device,
                    dtype=dtype,
                )
                for i, dilation in enumerate(dilations)
            )
        )
        self.register_load_state_dict_pre_hook(_drop_duplicates)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None and x.dim() == 3:  # the residual connections carry x past the convolutions
            x = x.masked_fill(padding(x, lengths), 0)
        for block in self.network:
            x = block(x, cu_seqlens=cu_seqlens, lengths=lengths)
        return x

    def published_state_dict(self) -> dict[str, Tensor]:
        """The state_dict with the keys of the widely copied implementation, weight normalisation of the old style."""
        old: dict[str, Tensor] = {}
        for key, value in self.state_dict().items():
            name = key.replace("parametrizations.weight.original0", "weight_g")
            name = name.replace("parametrizations.weight.original1", "weight_v")
            old[name] = value
            if (duplicate := name.replace(".conv1.", ".net.0.").replace(".conv2.", ".net.4.")) != name:
                old[duplicate] = value
        return old


_DUPLICATE = re.compile(r"network\.\d+\.net\.[04]\.")


def _drop_duplicates(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Leave out the keys under which the widely copied implementation has each convolution a second time."""
    for key in list(state_dict):
        if key.startswith(prefix) and _DUPLICATE.match(key, len(prefix)):
            del state_dict[key]
