"""Layers of dilated causal convolutions, and the time-series encoder made of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm, weight_norm

from pykernels.ops import BlockWeights, CausalConvStream, causal_conv1d, causal_conv_block, causal_conv_stack
from pykernels.ops import weight_norm as weight_norm_op


class CausalConv1d(nn.Conv1d):
    """:class:`torch.nn.Conv1d` that sees no future sample: output t depends on inputs up to t.

    Same constructor and state_dict as ``nn.Conv1d``, and an output as long as the input. The activation and the
    residual are fused into the convolution.

    Args:
        in_channels, out_channels, kernel_size, dilation, groups, bias, device, dtype: as for ``nn.Conv1d``.
        stride, padding, padding_mode: accepted at their defaults only (the causal padding is built in).
        activation, negative_slope, residual_before_activation, backend: see :func:`pykernels.causal_conv1d`.

    Shape:
        input (B, C, T) or (C, T), residual and output (B, O, T) or (O, T). ``forward`` also takes the arguments
        ``initial_state``, ``return_final_state``, ``cu_seqlens`` and ``lengths`` of :func:`pykernels.causal_conv1d`,
        with inputs (B, C, T).

    Raises:
        ValueError: if ``stride``, ``padding`` or ``padding_mode`` is not at its default.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: str | int | tuple[int] = 0,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual_before_activation: bool = False,
        backend: str | None = None,
    ) -> None:
        for name, value, accepted in (
            ("stride", stride, (1, (1,))),
            ("padding", padding, (0, (0,))),
            ("padding_mode", padding_mode, ("zeros",)),
        ):
            if value not in accepted:
                raise ValueError(f"CausalConv1d supports {name}={accepted[0]!r} only, got {value!r}")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            dilation=dilation,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.activation = activation
        self.negative_slope = negative_slope
        self.residual_before_activation = residual_before_activation
        self.backend = backend

    def forward(self, input: Tensor, residual: Tensor | None = None, **modes: Any) -> Any:
        unbatched = input.dim() == 2
        if unbatched:
            if any(mode is not None and mode is not False for mode in modes.values()):
                raise ValueError(f"{', '.join(modes)}: input must have shape (B, C, T), got {tuple(input.shape)}")
            input = input.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
        y = causal_conv1d(
            input,
            self.weight,
            self.bias,
            dilation=self.dilation[0],
            groups=self.groups,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            residual_before_activation=self.residual_before_activation,
            backend=self.backend,
            **modes,
        )
        return y.squeeze(0) if unbatched else y

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        if self.activation is not None:
            text += f", activation={self.activation!r}"
            if self.activation == "leaky_relu":
                text += f", negative_slope={self.negative_slope}"
        if self.residual_before_activation:
            text += ", residual_before_activation=True"
        return text


class CausalConvBlock(nn.Module):
    """Two weight-normalised causal convolutions with leaky ReLU, and a residual connection around them.

    ``h = act(conv(act(conv(x))))``, output ``h + x``, or ``h + conv1x1(x)`` where the number of channels changes. Both
    convolutions have the same dilation. Source: Franceschi, Dieuleveut and Jaggi, "Unsupervised scalable representation
    learning for multivariate time series", NeurIPS 2019.

    Args:
        in_channels, out_channels, kernel_size, dilation: of the convolutions.
        negative_slope: of the leaky ReLU.
        backend: see :func:`pykernels.causal_conv1d`.

    Shape:
        input (B, C, T), output (B, O, T).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        dilation: int = 1,
        *,
        negative_slope: float = 0.01,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def conv(channels: int) -> CausalConv1d:
            layer = CausalConv1d(
                channels,
                out_channels,
                kernel_size,
                dilation=dilation,
                device=device,
                dtype=dtype,
                activation="leaky_relu",
                negative_slope=negative_slope,
                backend=backend,
            )
            weight_norm(layer)
            return layer

        self.conv1: CausalConv1d = conv(in_channels)
        self.conv2: CausalConv1d = conv(out_channels)
        self.skip: CausalConv1d | None = (
            None
            if in_channels == out_channels
            else CausalConv1d(in_channels, out_channels, 1, device=device, dtype=dtype, backend=backend)
        )

    def forward(self, x: Tensor) -> Tensor:
        return causal_conv_block(
            x,
            *self.weights(self.conv1.weight, self.conv2.weight),
            dilation=self.conv1.dilation[0],
            negative_slope=self.conv1.negative_slope,
            backend=self.conv1.backend,
        )

    def weights(self, weight1: Tensor, weight2: Tensor) -> BlockWeights:
        """The tensors of the block, with these in place of its own two normalised weights."""
        skip = (None, None) if self.skip is None else (self.skip.weight, self.skip.bias)
        return BlockWeights(weight1, self.conv1.bias, weight2, self.conv2.bias, *skip)


class CausalCNNEncoder(nn.Module):
    """Encoder of time series into vectors: dilated causal blocks, maximum over time, linear map.

    ``depth`` blocks of ``channels`` channels with dilations 1, 2, 4, ..., then one block of ``reduced_size`` channels
    with dilation 2**depth. Source: Franceschi, Dieuleveut and Jaggi, NeurIPS 2019, whose tables use the defaults here.

    ``load_state_dict`` also takes the keys of the published implementation.

    Args:
        in_channels: channels of the series.
        channels: channels of the inner blocks.
        depth: number of inner blocks.
        reduced_size: channels before the maximum over time.
        out_channels: size of the representation.
        kernel_size: of the convolutions.
        backend: see :func:`pykernels.causal_conv1d`.

    Shape:
        input (B, in_channels, T) with T >= 1, output (B, out_channels). With ``cu_seqlens``, input (1, in_channels,
        total) and output (N, out_channels) for N packed series; with ``lengths``, series that end before T, see
        :func:`pykernels.causal_conv1d`.
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
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * depth + [reduced_size]
        self.blocks = nn.Sequential(
            *(
                CausalConvBlock(c_in, c_out, kernel_size, 2**i, backend=backend, device=device, dtype=dtype)
                for i, (c_in, c_out) in enumerate(pairwise(widths))
            )
        )
        self.backend = backend
        self._folded: list[Tensor] | None = None
        self.linear = nn.Linear(reduced_size, out_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        if x.dim() != 3 or x.shape[2] == 0:
            raise ValueError(
                f"x must have shape (batch, channels, time) with at least one sample, got {tuple(x.shape)}"
            )
        blocks, weights = self._blocks(), self._normalised_weights()
        features = causal_conv_stack(
            x,
            [block.weights(*weights[2 * i : 2 * i + 2]) for i, block in enumerate(blocks)],
            [block.conv1.dilation[0] for block in blocks],
            negative_slope=blocks[0].conv1.negative_slope,
            pool=True,
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            backend=self.backend,
        )
        y: Tensor = self.linear(features)
        return y

    def stream(self, batch_size: int = 1) -> CausalConvStream:
        """Online encoding of ``batch_size`` endless series, sample by sample, with the weights of now.

        ``stream.step(x_t)`` takes the next sample of each, (B, in_channels), and returns the features (B, out_channels)
        of the series so far, those that the encoder gives for the whole series. CPU, float32 or float64.
        """
        with torch.no_grad():
            blocks, weights = self._blocks(), self._normalised_weights()
            return CausalConvStream(
                [block.weights(*weights[2 * i : 2 * i + 2]) for i, block in enumerate(blocks)],
                [block.conv1.dilation[0] for block in blocks],
                self.linear.weight,
                self.linear.bias,
                batch_size=batch_size,
                negative_slope=blocks[0].conv1.negative_slope,
            )

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Inside this context the normalised weights are computed once, however often the encoder is called.

        Leave it before the optimiser's step, and keep to one gradient mode inside. Not for use from several threads.
        """
        self._folded = self._normalised_weights()
        try:
            yield
        finally:
            self._folded = None

    def _normalised_weights(self) -> list[Tensor]:
        """The weights of all convolutions but the skips, block by block, normalised in one call where they can be."""
        if self._folded is not None:
            return self._folded
        convs = [conv for block in self._blocks() for conv in (block.conv1, block.conv2)]
        originals = [] if torch.compiler.is_compiling() else list(filter(None, map(_weight_norm_tensors, convs)))
        if len(originals) < len(convs):
            return [conv.weight for conv in convs]
        return weight_norm_op([v for v, _ in originals], [g for _, g in originals], backend=self.backend)

    def _blocks(self) -> list[CausalConvBlock]:
        return list(self.blocks)  # type: ignore[arg-type]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`; also takes the keys of the published implementation."""
        return super().load_state_dict({_own_key(k): v for k, v in state_dict.items()}, strict, assign)


def _weight_norm_tensors(conv: CausalConv1d) -> tuple[Tensor, Tensor] | None:
    """Direction and norm, if the weight is normalised per output channel and not otherwise parametrised."""
    if not parametrize.is_parametrized(conv, "weight"):
        return None
    weight: Any = conv.parametrizations["weight"]  # type: ignore[index]
    if len(weight) != 1 or not isinstance(weight[0], _WeightNorm) or weight[0].dim != 0:
        return None
    return weight.original1, weight.original0


_PUBLISHED_BLOCK = re.compile(r"network\.0\.network\.(\d+)\.(causal\.[03]|upordownsample)\.(\w+)")
_PUBLISHED_MODULES = {"causal.0": "conv1", "causal.3": "conv2", "upordownsample": "skip"}
_PUBLISHED_WEIGHTS = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def _own_key(key: str) -> str:
    """The key of this encoder for one of the published implementation; any other key unchanged."""
    if match := _PUBLISHED_BLOCK.fullmatch(key):
        index, module, parameter = match.groups()
        return f"blocks.{index}.{_PUBLISHED_MODULES[module]}.{_PUBLISHED_WEIGHTS.get(parameter, parameter)}"
    if key in ("network.3.weight", "network.3.bias"):
        return key.replace("network.3", "linear")
    return key
