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

library = torch.library.Library("pykernels", "FRAGMENT")
library.define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int dilation, str activation, "
    "float negative_slope) -> Tensor"
)
library.define(  # also returns act(z), which the backward cannot take from y when a residual was added to it
    "causal_conv1d_activated(Tensor x, Tensor weight, Tensor? bias, Tensor residual, int dilation, str activation, "
    "float negative_slope) -> (Tensor, Tensor)"
)
library.define(  # a gradient that is not needed is returned empty
    "causal_conv1d_backward(Tensor grad_y, Tensor? activated, Tensor x, Tensor weight, int dilation, str activation, "
    "float negative_slope, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)

forward_op = torch.ops.pykernels.causal_conv1d.default
forward_activated_op = torch.ops.pykernels.causal_conv1d_activated.default
backward_op = torch.ops.pykernels.causal_conv1d_backward.default

IS_DOUBLE = {torch.float32: False, torch.float64: True}
Strides = tuple[int, int, int]


def plain(t: Tensor) -> Tensor:
    return t.resolve_neg() if t.is_neg() else t


def rows(t: Tensor) -> tuple[Tensor, Strides]:
    """``t`` with a time stride of 1, and its strides."""
    t = plain(t)
    if t.stride(2) != 1:
        t = t.contiguous()
    return t, (t.stride(0), t.stride(1), 1)


def address(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> int:
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
    """y, and act(z) into ``activated`` if given."""
    assert _native.cpu is not None
    x, weight = plain(x), plain(weight).contiguous()
    y = x.new_empty((x.shape[0], weight.shape[0], x.shape[2]))
    bias_address = residual_address = 0
    residual_strides: Strides = (0, 0, 1)
    if bias is not None:
        bias = plain(bias).contiguous()
        bias_address = address(bias, weight.shape[:1], x.dtype, "bias")
    if residual is not None:
        residual, residual_strides = rows(residual)
        residual_address = address(residual, y.shape, x.dtype, "residual")
    _native.cpu.causal_conv1d_forward(
        IS_DOUBLE[x.dtype],
        x.shape,
        weight.shape,
        dilation,
        x.data_ptr(),
        x.stride(),
        address(weight, weight.shape, x.dtype, "weight"),
        bias_address,
        residual_address,
        residual_strides,
        y.data_ptr(),
        0 if activated is None else activated.data_ptr(),
        (0, 0, 0),
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
    weight, grad_y = plain(weight).contiguous(), plain(grad_y)
    x, x_strides = rows(x)
    gradients = _gradients_like(x, weight, need_x, need_weight, need_bias)
    shape = (x.shape[0], weight.shape[0], x.shape[2])
    if activated is None and activation != "none":
        raise ValueError(f"activation {activation!r} needs the activated output")
    h = grad_y if activated is None else plain(activated)
    _native.cpu.causal_conv1d_backward(
        IS_DOUBLE[x.dtype],
        x.shape,
        weight.shape,
        dilation,
        address(grad_y, shape, x.dtype, "grad_y"),
        grad_y.stride(),
        address(h, shape, x.dtype, "activated"),
        h.stride(),
        x.data_ptr(),
        x_strides,
        address(weight, weight.shape, x.dtype, "weight"),
        0,
        (0, 0, 1),
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

    def requires_grad(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(requires_grad, value))
        return isinstance(value, Tensor) and value.requires_grad

    def guard(*args: Any) -> Any:
        if torch.is_grad_enabled() and requires_grad(args):
            raise RuntimeError(f"{op} has no derivative of its own; call the public function in pykernels.ops")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return guard


def implement(op: torch._ops.OpOverload, cpu: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register the CPU implementation of a raw operator, its shapes for tracing, and the guard of its gradient."""
    name = op._schema.name
    library.impl(name, cpu, "CPU")
    library.impl(name, _refuse_gradients(op), "Autograd")
    torch.library.register_fake(name, fake, lib=library)


implement(forward_op, _forward_cpu, _forward_fake)
implement(forward_activated_op, _forward_activated_cpu, _forward_activated_fake)
implement(backward_op, _backward_cpu, _backward_fake)
