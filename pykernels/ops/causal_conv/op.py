"""Operators ``pykernels::causal_conv1d*``: schemas, shapes for tracing, and the choice of the kernels that run them.

Private: :func:`pykernels.causal_conv1d` checks the arguments and adds the derivatives. A backend's kernels are a module
with these two functions:

``forward(x, weight, bias, residual, initial_state, cu_seqlens, lengths, options, save) -> (y, saved)``
    ``saved``, None unless ``save``: what the backward needs beside y. For silu and gelu it is their argument, for the
    other activations their value, which is y itself unless a residual was added to it.
``backward(grad_y, saved, x, weight, initial_state, cu_seqlens, lengths, options, need_x, need_weight, need_bias, need_state)``
    returns the gradients of x, weight, bias and initial_state; one that is not needed is empty. A residual added before
    the activation is the caller's affair, who passes the gradient of z and no activation.
"""  # noqa: E501

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pykernels.ops._op import implement, library
from pykernels.ops.causal_conv import cost
from pykernels.ops.causal_conv.reference import Options

#: Activation names and their codes in kernels/causal_conv/causal_conv.hpp.
ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2, "tanh": 3, "silu": 4, "gelu": 5}

#: Activations whose derivative follows from their argument only, and not from their value.
NEEDS_ARGUMENT = frozenset({"silu", "gelu"})

_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? initial_state, Tensor? cu_seqlens, "
    "Tensor? lengths, int dilation, int groups, str activation, float negative_slope, bool residual_before_activation, "
    "str backend"
)
library.define(f"causal_conv1d({_INPUTS}) -> Tensor")
library.define(f"causal_conv1d_saving({_INPUTS}) -> (Tensor, Tensor)")
library.define(
    "causal_conv1d_backward(Tensor grad_y, Tensor? saved, Tensor x, Tensor weight, Tensor? initial_state, "
    "Tensor? cu_seqlens, Tensor? lengths, int dilation, int groups, str activation, float negative_slope, "
    "str backend, bool need_x, bool need_weight, bool need_bias, bool need_state) -> (Tensor, Tensor, Tensor, Tensor)"
)

forward_op = torch.ops.pykernels.causal_conv1d.default
saving_op = torch.ops.pykernels.causal_conv1d_saving.default
backward_op = torch.ops.pykernels.causal_conv1d_backward.default

_kernels: dict[str, Any] = {}


def kernels(backend: str) -> Any:
    """The module with the kernels of a backend; imported when it is first used, since it may need another package."""
    module = _kernels.get(backend)
    if module is None:
        module = _kernels[backend] = import_module(f"pykernels.ops.causal_conv.{backend}")
    return module


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    dilation: int,
    groups: int,
    activation: str,
    negative_slope: float,
    residual_before_activation: bool,
    backend: str,
) -> Tensor:
    options = Options(dilation, groups, activation, negative_slope, residual_before_activation)
    y: Tensor = kernels(backend).forward(x, weight, bias, residual, initial_state, cu_seqlens, lengths, options, False)[
        0
    ]
    return y


def _saving(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, backend = args
    y, saved = kernels(backend).forward(*tensors[:7], Options(*tensors[7:]), True)
    return y, saved


def _backward(
    grad_y: Tensor,
    saved: Tensor | None,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    dilation: int,
    groups: int,
    activation: str,
    negative_slope: float,
    backend: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_state: bool,
) -> tuple[Tensor, ...]:
    if saved is None and activation != "none":
        raise ValueError(f"activation {activation!r} needs what the forward saved")
    options = Options(dilation, groups, activation, negative_slope)
    gradients: tuple[Tensor, ...] = kernels(backend).backward(
        grad_y,
        saved,
        x,
        weight,
        initial_state,
        cu_seqlens,
        lengths,
        options,
        need_x,
        need_weight,
        need_bias,
        need_state,
    )
    return gradients


def empty_gradients(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the gradients of x, weight, bias and initial_state; one that is not needed is empty."""
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
        x.new_empty(initial_state.shape if need_state and initial_state is not None else (0,)),
    )


def _forward_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0], x.shape[2]))


def _saving_fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y = _forward_fake(x, weight)
    return y, torch.empty_like(y)


def _backward_fake(
    grad_y: Tensor, saved: Tensor | None, x: Tensor, weight: Tensor, initial_state: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return empty_gradients(x, weight, initial_state, *rest[-4:])


implement(forward_op, _forward, _forward_fake, devices=("CPU", "CUDA"), cost=cost.forward)
implement(saving_op, _saving, _saving_fake, devices=("CPU", "CUDA"), cost=cost.saving)
implement(backward_op, _backward, _backward_fake, devices=("CPU", "CUDA"), cost=cost.backward)
