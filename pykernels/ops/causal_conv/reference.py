"""Causal convolution in plain PyTorch: the definition that the other backends are compared with.

:func:`compose` puts every mode of the operator together from one bilinear convolution and elementwise operations. With
:func:`convolve` it is the reference; with the convolutions of :mod:`pykernels.ops.causal_conv.bilinear` it is what
function transforms and second derivatives of the compiled backends go through.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pykernels.backends import exporting


class Options(NamedTuple):
    """What is no tensor among the arguments of the operator; ``activation`` is a key of :data:`op.ACTIVATIONS`."""

    dilation: int = 1
    groups: int = 1
    activation: str = "none"
    negative_slope: float = 0.01
    residual_before_activation: bool = False


#: ``(x, weight, cu_seqlens, dilation, groups) -> z``, without bias.
Convolve = Callable[[Tensor, Tensor, Tensor | None, int, int], Tensor]


def activate(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """``act(z)`` for an activation name of this family."""
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    if activation == "tanh":
        return torch.tanh(z)
    if activation == "silu":
        return F.silu(z)
    if activation == "gelu":
        return F.gelu(z)
    return z


def convolve(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, dilation: int, groups: int) -> Tensor:
    """``conv(pad(x))``, for packed sequences one by one. Any dtype, device, order of derivative."""
    if cu_seqlens is not None and len(cu_seqlens) > 2:
        ends = cu_seqlens.tolist()
        parts = [x[:, :, begin:end] for begin, end in pairwise(ends)]
        return torch.cat([convolve(part, weight, None, dilation, groups) for part in parts], 2)
    batch, channels, length = x.shape
    # Taps that lie wholly before the start of the data add nothing; without them the padding stays short. An exported
    # program keeps them, since it must fit all lengths.
    live = weight.shape[2] if exporting() else max(1, min(weight.shape[2], (length - 1) // dilation + 1))
    if batch == 0 or length == 0:  # F.conv1d accepts neither; keep the result in the graph
        per_group, out_channels = channels // groups, weight.shape[0]
        grouped = x.reshape(batch, groups, per_group, length)
        matrices = weight.sum(2).reshape(groups, out_channels // groups, per_group)
        return torch.einsum("bgct,goc->bgot", grouped, matrices).reshape(batch, out_channels, length)
    padded = F.pad(x, ((live - 1) * dilation, 0))
    return F.conv1d(padded, weight[:, :, weight.shape[2] - live :], dilation=dilation, groups=groups)


def compose(
    convolve: Convolve,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    options: Options,
) -> Tensor:
    """The operator with ``convolve`` as its convolution, see :func:`pykernels.causal_conv1d`."""
    if cu_seqlens is not None:
        cu_seqlens = clamped(cu_seqlens, x.shape[2])
    behind = None if lengths is None else padding(x, lengths)
    if behind is not None:
        x = x.masked_fill(behind, 0)
        residual = None if residual is None else residual.masked_fill(behind, 0)
    dilation, groups, activation, negative_slope, residual_before = options
    if initial_state is None or initial_state.shape[2] == 0:
        y = convolve(x, weight, cu_seqlens, dilation, groups)
    elif cu_seqlens is None:
        y = convolve(torch.cat([initial_state, x], 2), weight, None, dilation, groups)[:, :, initial_state.shape[2] :]
    else:
        order, own, offsets = _insertion(cu_seqlens, x.shape[2], initial_state.shape[2])
        states = initial_state.permute(1, 0, 2).reshape(1, x.shape[1], -1)
        y = convolve(torch.cat([x, states], 2)[:, :, order], weight, offsets, dilation, groups)[:, :, own]
    if bias is not None:
        y = y + bias[:, None]
    if residual is not None and residual_before:
        y = y + residual
    y = activate(y, activation, negative_slope)
    if residual is not None and not residual_before:
        y = y + residual
    return y if behind is None else y.masked_fill(behind, 0)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    *options: Any,
) -> Tensor:
    """The definition: :func:`compose` with PyTorch's convolution. ``options`` are the fields of :class:`Options`."""
    return compose(convolve, x, weight, bias, residual, initial_state, cu_seqlens, lengths, Options(*options))


def final_state(
    x: Tensor, size: int, initial_state: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """The last ``size`` samples of ``[initial_state or zeros, x]``, of every sequence: shape (B or N, C, size)."""
    batch, channels, length = x.shape
    if cu_seqlens is None and lengths is None and length >= size:
        return x[:, :, length - size :].clone()
    back = torch.arange(-size, 0, device=x.device)
    if cu_seqlens is None:
        before = x.new_zeros((batch, channels, size)) if initial_state is None else initial_state
        ends = x.new_full((batch,), length, dtype=torch.int64) if lengths is None else lengths.long().clamp(0, length)
        index = (ends[:, None, None] + size + back).expand(batch, channels, size)
        return torch.cat([before, x], 2).gather(2, index)
    offsets = clamped(cu_seqlens, length).long()
    begin, end = offsets[:-1], offsets[1:]
    index = end[:, None] + back  # (N, size)
    inside = index >= begin[:, None]
    if length == 0:
        own = x.new_zeros((len(begin), channels, size))
    else:
        own = x[0][:, index.clamp(0, length - 1)].transpose(0, 1)  # (N, C, size)
    if initial_state is None:
        return own.masked_fill(~inside[:, None], 0)
    index = (index - begin[:, None] + size).clamp(0, max(size - 1, 0))
    before = initial_state.gather(2, index[:, None].expand_as(initial_state))
    return torch.where(inside[:, None], own, before)


def clamped(cu_seqlens: Tensor, total: int) -> Tensor:
    """Offsets that may not have been checked as the kernels take them: sequences side by side that fill ``total``."""
    if len(cu_seqlens) < 2:
        return cu_seqlens
    inner = cu_seqlens[1:-1].clamp(0, total).cummax(0).values
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), total)])


def padding(x: Tensor, lengths: Tensor) -> Tensor:
    """True behind the end of a sample, shape (B, 1, T)."""
    return torch.arange(x.shape[2], device=x.device) >= lengths[:, None, None]


def _insertion(cu_seqlens: Tensor, total: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """How to put ``size`` state samples before every packed sequence.

    Returns:
        Where each sample of the longer series is found in ``[x, states]``, where the samples of x are in the longer
        series, and its offsets.
    """
    begin = cu_seqlens[:-1].long()
    number = torch.arange(len(begin), device=cu_seqlens.device)
    sequence = torch.repeat_interleave(number, cu_seqlens.diff().long(), output_size=total)
    own = torch.arange(total, device=cu_seqlens.device) + size * (sequence + 1)
    states = (begin + size * number)[:, None] + torch.arange(size, device=cu_seqlens.device)
    offsets = cu_seqlens + size * torch.arange(len(cu_seqlens), dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.argsort(torch.cat([own, states.flatten()])), own, offsets
