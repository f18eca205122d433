"""Operators ``pykernels::causal_conv1d*``: schemas, shapes for tracing, and the CPU implementation.

Private: :func:`pykernels.causal_conv1d` checks the arguments and adds the derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pykernels import _native

#: Activation names and their codes in kernels/causal_conv/causal_conv.hpp.
ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2, "tanh": 3}

_library = torch.library.Library("pykernels", "FRAGMENT")
_library.define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int dilation, str activation, "
    "float negative_slope) -> Tensor"
)
_library.define(  # also returns act(z), which the backward cannot take from y when a residual was added to it
    "causal_conv1d_activated(Tensor x, Tensor weight, Tensor? bias, Tensor residual, int dilation, str activation, "
    "float negative_slope) -> (Tensor, Tensor)"
)
_library.define(  # a gradient that is not needed is returned empty
    "causal_conv1d_backward(Tensor grad_y, Tensor? activated, Tensor x, Tensor weight, int dilation, str activation, "
    "float negative_slope, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)

forward_op = torch.ops.pykernels.causal_conv1d.default
forward_activated_op = torch.ops.pykernels.causal_conv1d_activated.default
backward_op = torch.ops.pykernels.causal_conv1d_backward.default

_IS_DOUBLE = {torch.float32: False, torch.float64: True}
_Strides = tuple[int, int, int]


def _plain(t: Tensor) -> Tensor:
    return t.resolve_neg() if t.is_neg() else t


def _rows(t: Tensor) -> tuple[Tensor, _Strides]:
    """``t`` with a time stride of 1, and its strides."""
    t = _plain(t)
    if t.stride(2) != 1:
        t = t.contiguous()
    return t, (t.stride(0), t.stride(1), 1)


def _address(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> int:
    """The address of ``t``'s data, which must be what the kernel is about to read."""
    if t.shape != shape or t.dtype != dtype or not t.is_cpu:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} and dtype {dtype}, got {tuple(t.shape)} and {t.dtype}; "
            "call pykernels.causal_conv1d rather than the raw operator"
        )
    return t.data_ptr()


def _run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dilation: int,
    activation: str,
    negative_slope: float,
    activated: Tensor | None,
) -> Tensor:
    assert _native.cpu is not None
    x, weight = _plain(x), _plain(weight).contiguous()
    y = x.new_empty((x.shape[0], weight.shape[0], x.shape[2]))
    bias_address = residual_address = activated_address = 0
    residual_strides: _Strides = (0, 0, 1)
    if bias is not None:
        bias = _plain(bias).contiguous()
        bias_address = _address(bias, (weight.shape[0],), x.dtype, "bias")
    if residual is not None:
        residual, residual_strides = _rows(residual)
        residual_address = _address(residual, y.shape, x.dtype, "residual")
    if activated is not None:
        activated_address = activated.data_ptr()
    _native.cpu.causal_conv1d_forward(
        _IS_DOUBLE[x.dtype],
        x.shape,
        weight.shape,
        dilation,
        x.data_ptr(),
        x.stride(),
        _address(weight, weight.shape, x.dtype, "weight"),
        bias_address,
        residual_address,
        residual_strides,
        y.data_ptr(),
        activated_address,
        ACTIVATIONS[activation],
        negative_slope,
        torch.get_num_threads(),
    )
    return y


def _forward_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dilation: int,
    activation: str,
    negative_slope: float,
) -> Tensor:
    return _run_forward(x, weight, bias, residual, dilation, activation, negative_slope, None)


def _forward_activated_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    dilation: int,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    h = x.new_empty((x.shape[0], weight.shape[0], x.shape[2]))
    return _run_forward(x, weight, bias, residual, dilation, activation, negative_slope, h), h


def _gradients_like(
    x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _backward_cpu(
    grad_y: Tensor,
    activated: Tensor | None,
    x: Tensor,
    weight: Tensor,
    dilation: int,
    activation: str,
    negative_slope: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    assert _native.cpu is not None
    weight, grad_y = _plain(weight).contiguous(), _plain(grad_y)
    x, x_strides = _rows(x)
    gradients = _gradients_like(x, weight, need_x, need_weight, need_bias)
    shape = (x.shape[0], weight.shape[0], x.shape[2])
    if activated is None and activation != "none":
        raise ValueError(f"activation {activation!r} needs the activated output")
    h = grad_y if activated is None else _plain(activated)
    _native.cpu.causal_conv1d_backward(
        _IS_DOUBLE[x.dtype],
        x.shape,
        weight.shape,
        dilation,
        _address(grad_y, shape, x.dtype, "grad_y"),
        grad_y.stride(),
        _address(h, shape, x.dtype, "activated"),
        h.stride(),
        x.data_ptr(),
        x_strides,
        _address(weight, weight.shape, x.dtype, "weight"),
        gradients[0].data_ptr() if need_x else 0,
        gradients[1].data_ptr() if need_weight else 0,
        gradients[2].data_ptr() if need_bias else 0,
        ACTIVATIONS[activation],
        negative_slope,
        torch.get_num_threads(),
    )
    return gradients


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dilation: int,
    activation: str,
    negative_slope: float,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0], x.shape[2]))


def _forward_activated_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    dilation: int,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    y = _forward_fake(x, weight, bias, residual, dilation, activation, negative_slope)
    return y, torch.empty_like(y)


def _backward_fake(
    grad_y: Tensor,
    activated: Tensor | None,
    x: Tensor,
    weight: Tensor,
    dilation: int,
    activation: str,
    negative_slope: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like(x, weight, need_x, need_weight, need_bias)


def _refuse_gradients(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """An Autograd kernel that raises where calling ``op`` itself would silently drop the gradient."""

    def guard(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(f"{op} has no derivative of its own; call pykernels.causal_conv1d")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return guard


for _op, _cpu, _fake in (
    (forward_op, _forward_cpu, _forward_fake),
    (forward_activated_op, _forward_activated_cpu, _forward_activated_fake),
    (backward_op, _backward_cpu, _backward_fake),
):
    _name = _op._schema.name
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _refuse_gradients(_op), "Autograd")
    torch.library.register_fake(_name, _fake, lib=_library)
