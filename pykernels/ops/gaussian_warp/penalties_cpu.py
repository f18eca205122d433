"""The CPU kernels of :mod:`penalties_op`: memory for their results, and addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from pykernels import _native
from pykernels.ops._memory import IS_DOUBLE, address, plain
from pykernels.ops.gaussian_warp.penalties_reference import Options


def forward(flow: Tensor, options: Options) -> Tensor:
    assert _native.cpu is not None
    flow = plain(flow).contiguous()
    values = flow.new_empty(flow.shape[:1])
    run = _native.cpu.flow_penalties_double if IS_DOUBLE[flow.dtype] else _native.cpu.flow_penalties_float
    run(*_described(flow, options), values.data_ptr(), torch.get_num_threads())
    return values


def backward(grads: Tensor, flow: Tensor, options: Options) -> Tensor:
    assert _native.cpu is not None
    flow, grads = plain(flow).contiguous(), plain(grads).contiguous()
    gradient = torch.empty_like(flow)
    double = IS_DOUBLE[flow.dtype]
    run = _native.cpu.flow_penalties_backward_double if double else _native.cpu.flow_penalties_backward_float
    at = address(grads, flow.shape[:1], flow.dtype, "grads")
    run(*_described(flow, options), at, gradient.data_ptr(), torch.get_num_threads())
    return gradient


def _described(flow: Tensor, options: Options) -> tuple[int, tuple[int, ...], int, bool, tuple[float, float, float]]:
    at = address(flow, flow.shape, flow.dtype, "flow")
    return flow.shape[0], tuple(flow.shape[2:]), at, options.xy, (*options[:3],)
