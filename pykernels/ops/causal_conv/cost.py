"""Flops and bytes of the operators of this family, from shapes: README.md, "Cost".

Bytes are what has to be read or written at least once: arguments, results, and what the forward keeps for the backward.
With ``cu_seqlens`` and ``lengths``, whose values may be on a GPU, taps before the start of a sequence count as work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from pykernels.backends import Cost
from pykernels.ops._memory import size


def live_samples(length: int, kernel_size: int, dilation: int) -> int:
    """Samples that the taps of one row meet, summed over the taps: those that reach before the start meet fewer."""
    taps = min(kernel_size, (length - 1) // dilation + 1)  # that meet any
    return taps * length - dilation * (taps * (taps - 1) // 2)


def products(x: Sequence[int], weight: Sequence[int], dilation: int, all_live: bool) -> int:
    """Flops of one convolution, or of one of its two gradients, for the shapes of x and weight."""
    batch, _, length = x
    out_channels, group_channels, kernel_size = weight
    samples = kernel_size * length if all_live else live_samples(length, kernel_size, dilation)
    return 2 * batch * out_channels * group_channels * samples


def forward(x: Tensor, weight: Tensor, *rest: Any) -> Cost:
    """Of ``causal_conv1d``; ``rest`` are bias, residual, initial_state, cu_seqlens, lengths, dilation, ..."""
    all_live = any(t is not None for t in rest[2:4])
    y = x.shape[0] * weight.shape[0] * x.shape[2] * x.element_size()
    return Cost(products(x.shape, weight.shape, rest[5], all_live), size((x, weight, *rest)) + y)


def saving(x: Tensor, weight: Tensor, *rest: Any) -> Cost:
    """Of ``causal_conv1d_saving``, which writes a second tensor like y."""
    flops, total = forward(x, weight, *rest)
    return Cost(flops, total + x.shape[0] * weight.shape[0] * x.shape[2] * x.element_size())


def backward(grad_y: Tensor, saved: Tensor | None, x: Tensor, weight: Tensor, *rest: Any) -> Cost:
    """Of ``causal_conv1d_backward``; ``rest`` are initial_state, cu_seqlens, lengths, dilation, ..., four needs."""
    initial_state, cu_seqlens, _, dilation, *_, need_x, need_weight, need_bias, need_state = rest
    all_live = initial_state is not None or cu_seqlens is not None
    flops = (bool(need_x or need_state) + bool(need_weight)) * products(x.shape, weight.shape, dilation, all_live)
    gradients = (x if need_x else None, weight if need_weight else None, initial_state if need_state else None)
    read = (grad_y, saved, x if need_weight else None, weight if need_x else None)
    bias = weight.shape[0] * weight.element_size() if need_bias else 0
    return Cost(flops, size((*read, *gradients)) + bias)


def step(x_t: Tensor, state: Any, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any) -> Cost:
    """Of ``causal_conv1d_step``: one sample of each series is read for every tap, and one is written to the state."""
    batch, kernel_size = x_t.shape[0], weight.shape[2]
    y = batch * weight.shape[0] * x_t.element_size()
    return Cost(2 * batch * weight.numel(), (kernel_size + 1) * size((x_t,)) + size((weight, bias, residual)) + y)


def stack_forward(x: Tensor, weights: Sequence[Tensor | None], *rest: Any) -> Cost:
    """Of ``causal_conv_stack``; ``rest`` are cu_seqlens, lengths, dilations, negative_slope, pool, perhaps save."""
    cu_seqlens, _, dilations, _, pool, *save = rest
    convolutions = list(_convolutions(weights, dilations))
    flops = sum(products(x.shape, w.shape, d, cu_seqlens is not None) for _, w, d in convolutions)
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    column, row = x.shape[0] * x.shape[2] * x.element_size(), sequences * x.element_size()
    y = convolutions[-1][1].shape[0] * (row if pool else column)
    # The first convolution of a block keeps its activation, the second one that and its sum with the skip.
    kept = sum((1 + (place % 6 == 2)) * w.shape[0] * column for place, w, _ in convolutions if place % 6 < 4)
    return Cost(flops, size((x, weights, cu_seqlens)) + y + (kept if any(save) else 0))


def stack_backward(grad: Tensor, x: Tensor, weights: Sequence[Tensor | None], *rest: Any) -> Cost:
    """Of ``causal_conv_stack_backward``; ``rest`` are cu_seqlens, lengths, saved, dilations, slope, pool, needed."""
    cu_seqlens, _, saved, dilations, _, pool, needed = rest
    flops = 0
    for place, weight, dilation in _convolutions(weights, dilations):
        if pool and place >= len(weights) - 4:  # its output has one gradient for each maximum, and zeros
            one = 2 * grad.shape[0] * weight.numel()
        else:
            one = products(x.shape, weight.shape, dilation, cu_seqlens is not None)
        passes_on = needed[0] or place not in (0, 4)
        flops += one * (passes_on + needed[1 + place])
    gradients = [t for t, need in zip((x, *weights), needed, strict=True) if need]
    return Cost(flops, size((grad, x, weights, saved, gradients)))


def _convolutions(weights: Sequence[Tensor | None], dilations: Sequence[int]) -> Iterator[tuple[int, Tensor, int]]:
    """Place among the weights, weight and dilation of every convolution: six tensors to a block."""
    for place, weight in enumerate(weights):
        if place % 2 == 0 and weight is not None:
            yield place, weight, 1 if place % 6 == 4 else dilations[place // 6]


def weight_norm(v: Sequence[Tensor], g: Sequence[Tensor]) -> Cost:
    """Squares and their sum, and the scaling."""
    return Cost(3 * sum(t.numel() for t in v), 2 * size(v) + size(g))


def weight_norm_backward(grad_w: Sequence[Tensor], v: Sequence[Tensor], g: Sequence[Tensor]) -> Cost:
    """Two sums of products, and a combination of two tensors."""
    return Cost(8 * sum(t.numel() for t in v), 3 * size(v) + 2 * size(g))
