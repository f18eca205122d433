"""A stack of residual blocks, the maximum over time and a linear map, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pykernels import _native
from pykernels.ops._memory import IS_DOUBLE
from pykernels.ops.causal_conv import conv
from pykernels.ops.causal_conv.stack import BlockWeights
from pykernels.ops.causal_conv.step import pack, record

_SAMPLE, _HIDDEN, _SKIP = 0, 1, 2  # columns of channels; the outputs of the blocks take turns in 3 and 4


class CausalConvStream:
    """Online encoding of a batch of endless series.

    One new column per layer and sample: the cost of a sample does not depend on how many came before. After any number
    of samples the features are those of the whole series so far; the maxima before ``head`` have the same bits.

    Args:
        blocks, dilations, negative_slope: as for :func:`pykernels.ops.causal_conv_stack`, on the CPU, float32 or
            float64. The weights are copied: later changes have no effect.
        head_weight, head_bias: of the linear map behind the maximum over time, (F, O) and (F,) or None.
        batch_size: B, at least 1.

    Attributes:
        time: samples of each series so far.

    Raises:
        RuntimeError: if the weights are not on the CPU or have another dtype.
    """

    def __init__(
        self,
        blocks: Sequence[BlockWeights],
        dilations: Sequence[int],
        head_weight: Tensor,
        head_bias: Tensor | None,
        *,
        batch_size: int = 1,
        negative_slope: float = 0.01,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
        first = blocks[0].weight1
        answer = conv.cpu_can_run(first)
        if not answer.ok or first.dtype not in IS_DOUBLE:
            raise RuntimeError(
                f"a stream cannot run: {answer.reason or f'dtype {first.dtype}; it takes float32 and float64'}"
            )
        assert _native.cpu is not None
        self.batch_size, self.in_channels = batch_size, first.shape[1]
        self.time = 0
        self._rings: list[Tensor] = []
        self._keep: list[Tensor] = []  # tensors whose addresses the kernels hold
        layers: list[Any] = []
        column = _SAMPLE
        for i, (block, dilation) in enumerate(zip(blocks, dilations, strict=True)):
            skip, output = column, 3 + i % 2
            if block.skip_weight is not None:
                skip_record = self._conv(block.skip_weight, block.skip_bias, 1, "none", negative_slope)
                layers.append((skip_record, column, -1, _SKIP))
                skip = _SKIP
            first_record = self._conv(block.weight1, block.bias1, dilation, "leaky_relu", negative_slope)
            second_record = self._conv(block.weight2, block.bias2, dilation, "leaky_relu", negative_slope)
            layers += [(first_record, column, -1, _HIDDEN), (second_record, _HIDDEN, skip, output)]
            column = output
        head = self._conv(head_weight[:, :, None], head_bias, 1, "none", 0.0)
        new = _native.cpu.StreamDouble if first.dtype == torch.float64 else _native.cpu.StreamFloat
        self._native = new(layers, head, batch_size)
        self._maximum = first.new_empty((batch_size, head_weight.shape[1]))
        self._out_features = head_weight.shape[0]
        self.reset()

    def _conv(self, weight: Tensor, bias: Tensor | None, dilation: int, activation: str, slope: float) -> Any:
        packed = pack(weight, 1)
        bias = None if bias is None else bias.detach().clone()
        past = (weight.shape[2] - 1) * dilation
        ring = weight.new_zeros((self.batch_size, past, weight.shape[1])) if past > 0 else None
        self._keep += [packed] if bias is None else [packed, bias]
        if ring is not None:
            self._rings.append(ring.detach())
        return record(weight, packed, bias, ring, dilation, 1, activation, slope)

    def reset(self) -> None:
        """Forget all samples."""
        self.time = 0
        self._maximum.fill_(-torch.inf)
        for ring in self._rings:
            ring.zero_()

    def step(self, x_t: Tensor) -> Tensor:
        """Features (B, F) of the series with one more sample each, ``x_t`` of shape (B, C)."""
        if not isinstance(x_t, Tensor) or x_t.dim() != 2:
            what = tuple(x_t.shape) if isinstance(x_t, Tensor) else type(x_t).__name__
            raise ValueError(f"x_t must be a tensor of shape {(self.batch_size, self.in_channels)}, got {what}")
        return self._run(x_t[:, :, None], "x_t")

    def extend(self, x: Tensor) -> Tensor:
        """Features (B, F) of the series with n more samples, ``x`` of shape (B, C, n) with n >= 1."""
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] == 0:
            what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a tensor of shape {(self.batch_size, self.in_channels, 'n')}, got {what}")
        return self._run(x, "x")

    def _run(self, x: Tensor, name: str) -> Tensor:
        batch, channels, steps = x.shape
        if (batch, channels) != (self.batch_size, self.in_channels):
            raise ValueError(f"{name} must have {self.batch_size} series of {self.in_channels} channels, got {x.shape}")
        if x.dtype != self._maximum.dtype or not x.is_cpu:
            raise TypeError(f"{name} must be {self._maximum.dtype} on the CPU, got {x.dtype} on {x.device}")
        x = x.detach().resolve_neg()
        features = x.new_empty((batch, self._out_features))
        self._native.run(
            self.time,
            steps,
            x.data_ptr(),
            x.stride(),
            self._maximum.data_ptr(),
            features.data_ptr(),
            torch.get_num_threads(),
        )
        self.time += steps
        return features
