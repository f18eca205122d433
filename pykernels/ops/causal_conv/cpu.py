"""Causal convolution on the C++ kernels of ``kernels/causal_conv``; the functions that op.py asks of a backend."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pykernels import _native
from pykernels.ops._memory import HALF, IS_DOUBLE, address, plain
from pykernels.ops.causal_conv.op import ACTIVATIONS, empty_gradients
from pykernels.ops.causal_conv.reference import Options, clamped

Strides = tuple[int, int, int]
NO_STRIDES: Strides = (0, 0, 1)
NO_POOL = (0, 0, 0)
NO_SEQUENCES = (0, 0, 0)


def rows(t: Tensor) -> tuple[Tensor, Strides]:
    """``t`` with a time stride of 1, and its strides."""
    t = plain(t)
    if t.stride(2) != 1:
        t = t.contiguous()
    return t, (t.stride(0), t.stride(1), 1)


class Sequences:
    """Where sequences of unequal lengths lie, as the kernels take it; keeps its tensors alive."""

    def __init__(self, cu_seqlens: Tensor | None, lengths: Tensor | None) -> None:
        self.offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
        if self.offsets is not None:
            self.count = len(self.offsets) - 1
            self.record = (address(self.offsets, (self.count + 1,), torch.int32, "cu_seqlens"), 0, self.count)
        elif self.lengths is not None:
            self.count = len(self.lengths)
            self.record = (0, address(self.lengths, (self.count,), torch.int64, "lengths"), self.count)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    options: Options,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    assert _native.cpu is not None
    if x.dtype in HALF:
        single: list[Any] = [None if t is None else t.float() for t in (x, weight, bias, residual, initial_state)]
        single += [cu_seqlens, lengths, options, save]
        y, saved = forward(*single)
        return y.to(x.dtype), None if saved is None else saved.to(x.dtype)
    dilation, groups, activation, negative_slope, residual_before_activation = options
    x, weight = plain(x), plain(weight).contiguous()
    if groups > 1 and weight.shape[1] == 1:
        x, _ = rows(x)
    batch, channels, length = x.shape
    y = x.new_empty((batch, weight.shape[0], length))
    saved = torch.empty_like(y) if save else None
    bias_address = residual_address = state_address = 0
    residual_strides = state_strides = NO_STRIDES
    if bias is not None:
        bias = plain(bias).contiguous()
        bias_address = address(bias, weight.shape[:1], x.dtype, "bias")
    if residual is not None:
        residual, residual_strides = rows(residual)
        residual_address = address(residual, y.shape, x.dtype, "residual")
    sequences, record = None, NO_SEQUENCES
    if cu_seqlens is not None or lengths is not None:
        sequences = Sequences(cu_seqlens, lengths)
        record = sequences.record
    if initial_state is not None:
        count = batch if sequences is None else sequences.count
        initial_state, state_strides = rows(initial_state)
        shape = (count, channels, (weight.shape[2] - 1) * dilation)
        state_address = address(initial_state, shape, x.dtype, "initial_state")
    _native.cpu.causal_conv1d_forward(
        IS_DOUBLE[x.dtype],
        x.shape,
        weight.shape,
        dilation,
        groups,
        record,
        x.data_ptr(),
        x.stride(),
        address(weight, weight.shape, x.dtype, "weight"),
        bias_address,
        residual_address,
        residual_strides,
        state_address,
        state_strides,
        y.data_ptr(),
        0 if saved is None else saved.data_ptr(),
        NO_POOL,
        ACTIVATIONS[activation],
        negative_slope,
        residual_before_activation,
        torch.get_num_threads(),
    )
    return y, saved


def backward(
    grad_y: Tensor,
    saved: Tensor | None,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    options: Options,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert _native.cpu is not None
    if x.dtype in HALF:
        single: list[Any] = [None if t is None else t.float() for t in (grad_y, saved, x, weight, initial_state)]
        single += [cu_seqlens, lengths, options, need_x, need_weight, need_bias, need_state]
        grad_x, grad_weight, grad_bias, grad_state = (g.to(x.dtype) for g in backward(*single))
        return grad_x, grad_weight, grad_bias, grad_state
    weight, grad_y = plain(weight).contiguous(), plain(grad_y)
    x, x_strides = rows(x)
    if initial_state is not None:
        count = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        shape = (count, x.shape[1], (weight.shape[2] - 1) * options.dilation)
        address(initial_state, shape, x.dtype, "initial_state")
    gradients = empty_gradients(x, weight, initial_state, need_x, need_weight, need_bias, need_state)
    if need_x or need_weight or need_bias:
        shape = (x.shape[0], weight.shape[0], x.shape[2])
        h = grad_y if saved is None else plain(saved)
        record = NO_SEQUENCES
        if cu_seqlens is not None or lengths is not None:
            sequences = Sequences(cu_seqlens, lengths)
            record = sequences.record
        _native.cpu.causal_conv1d_backward(
            IS_DOUBLE[x.dtype],
            x.shape,
            weight.shape,
            options.dilation,
            options.groups,
            record,
            address(grad_y, shape, x.dtype, "grad_y"),
            grad_y.stride(),
            address(h, shape, x.dtype, "saved"),
            h.stride(),
            x.data_ptr(),
            x_strides,
            address(weight, weight.shape, x.dtype, "weight"),
            0,
            NO_STRIDES,
            gradients[0].data_ptr() if need_x else 0,
            gradients[1].data_ptr() if need_weight else 0,
            gradients[2].data_ptr() if need_bias else 0,
            ACTIVATIONS[options.activation],
            options.negative_slope,
            torch.get_num_threads(),
        )
    if initial_state is not None and (need_state or need_weight):
        _add_state_gradients(grad_y, saved, weight, initial_state, cu_seqlens, lengths, options, gradients)
    return gradients


def _add_state_gradients(
    grad_y: Tensor,
    saved: Tensor | None,
    weight: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    options: Options,
    gradients: tuple[Tensor, ...],
) -> None:
    """What the state adds to the gradient of the weight, and its own.

    Both follow from the series ``[state, 0]`` and the gradients of the outputs that see the state, the first S = (K-1)
    dilation or fewer: a convolution of at most 2 S samples, whatever the length of x.
    """
    _, grad_weight, _, grad_state = gradients
    count, channels, size = state.shape
    if size == 0 or count == 0 or grad_y.shape[2] == 0:
        grad_state.zero_()
        return
    early = min(size, grad_y.shape[2])
    shape = (count, weight.shape[0], size + early)
    dz, h = state.new_zeros(shape), None if saved is None else state.new_zeros(shape)
    for t, out in ((grad_y, dz), (saved, h)):
        if t is None or out is None:
            continue
        if cu_seqlens is None:
            out[:, :, size:] = t[:, :, :early]
            continue
        for i, (begin, end) in enumerate(pairwise(clamped(cu_seqlens, grad_y.shape[2]).tolist())):
            seen = min(end - begin, early)
            out[i, :, size : size + seen] = t[0, :, begin : begin + seen]
    if lengths is not None:
        behind = torch.arange(early) >= lengths[:, None, None]
        dz[:, :, size:].masked_fill_(behind, 0)
    series = state.new_zeros((count, channels, size + early))
    series[:, :, :size] = state
    need_state, need_weight = grad_state.numel() > 0, grad_weight.numel() > 0
    grad_series, cross, _, _ = backward(
        dz, h, series, weight, None, None, None, options, need_state, need_weight, False, False
    )
    if need_weight:
        grad_weight += cross
    if need_state:
        grad_state.copy_(grad_series[:, :, :size])
