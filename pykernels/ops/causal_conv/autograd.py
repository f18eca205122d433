"""Derivatives of the compiled causal convolution.

First derivatives outside of transforms go through one Function around the fused kernels. Function transforms, forward
mode and derivatives of derivatives go through :func:`reference.compose` on the maps of :mod:`bilinear`, which run the
same kernels but for the elementwise operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pykernels.ops._autograd import apply, differentiable_gradients, recording, transforming
from pykernels.ops._op import unobserved
from pykernels.ops.causal_conv import bilinear
from pykernels.ops.causal_conv.op import NEEDS_ARGUMENT, backward_op, forward_op, kernels, saving_op
from pykernels.ops.causal_conv.reference import Options, compose, padding


def run(*args: Any) -> Tensor:
    """The operator on a compiled backend, with derivatives. Arguments of ``pykernels::causal_conv1d``."""
    differentiable = args[:5]
    compiling = torch.compiler.is_compiling()
    if not compiling and transforming(*differentiable):
        return composed(*args)
    if recording(*differentiable):
        x, residual = args[0], args[3]
        if compiling and residual is x:  # Dynamo refuses one tensor as two arguments of a Function
            args = (*args[:3], x.view_as(x), *args[4:])
        result = apply(CausalConv1d if compiling else EagerCausalConv1d, *args)
        y: Tensor = result[0] if isinstance(result, tuple) else result
        return y
    if compiling:
        y = forward_op(*args)
        return y
    if unobserved(args[0], args[1]):
        y = kernels(args[-1]).forward(*args[:7], Options(*args[7:-1]), False)[0]
        return y
    with torch._C._AutoDispatchBelowAutograd():
        y = forward_op(*args)
    return y


def composed(*args: Any) -> Tensor:
    """The same from bilinear maps and elementwise operations, differentiable in every way and to every order."""
    backend = args[-1]

    def convolve(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, dilation: int, groups: int) -> Tensor:
        geometry = bilinear.Geometry(cu_seqlens, dilation, groups, tuple(weight.shape), backend)
        return bilinear.convolve(x, weight, geometry)

    x, weight, bias, residual, initial_state, cu_seqlens, lengths, *options = args[:-1]
    tensors = (x, weight, bias, residual, initial_state, cu_seqlens, lengths)
    return compose(convolve, *tensors, Options(*options))


class CausalConv1d(torch.autograd.Function):
    """``y``, or ``(y, saved)`` where the backward needs something that is not y itself."""

    @staticmethod
    def forward(*args: Any) -> Any:
        residual, activation = args[3], args[9]
        residual_after = residual is not None and not args[11]
        if activation in NEEDS_ARGUMENT or (residual_after and activation != "none"):
            return saving_op(*args)
        return forward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, residual, initial_state, cu_seqlens, lengths, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        saved = None
        if isinstance(output, tuple):
            saved = output[1]
            ctx.mark_non_differentiable(saved)
        elif inputs[9] != "none":
            saved = output
        if not inputs[11]:
            residual = None  # no derivative depends on one that is added at the end
        ctx.save_for_backward(x, weight, bias, residual, initial_state, cu_seqlens, lengths, saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_y, need = grads[0], ctx.needs_input_grad[:5]
        if grad_y is None:
            return (None,) * 13
        *inputs, saved = ctx.saved_tensors
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transforming(grad_y)):
            gradients = _gradients_by_composition(grad_y, inputs, ctx.options, need)
        else:
            gradients = _gradients(grad_y, saved, inputs, ctx.options, need)
        return (*gradients, *(None,) * 8)


class EagerCausalConv1d(torch.autograd.Function):
    """The same with the context passed to ``forward``, which costs 20 us less per call but cannot be transformed."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = CausalConv1d.forward(*inputs)
        CausalConv1d.setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return CausalConv1d.backward(ctx, *grads)


def _gradients(
    grad_y: Tensor, saved: Tensor | None, inputs: Sequence[Any], options: Sequence[Any], need: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, residual and initial_state from the fused kernels."""
    x, weight, _, _, initial_state, cu_seqlens, lengths = inputs
    dilation, groups, activation, negative_slope, residual_before_activation, backend = options
    need_x, need_weight, need_bias, need_residual, need_state = need
    grad_residual = None
    if need_residual and residual_before_activation and saved is not None:
        grad_residual = grad_y = _activation_backward(grad_y, saved, lengths, activation, negative_slope, backend)
        saved, activation = None, "none"
    elif need_residual:
        grad_residual = grad_y if lengths is None else grad_y.masked_fill(padding(x, lengths), 0)
    if not (need_x or need_weight or need_bias or need_state):
        return [None, None, None, grad_residual, None]
    gradients = backward_op(
        grad_y,
        saved,
        x,
        weight,
        initial_state,
        cu_seqlens,
        lengths,
        dilation,
        groups,
        activation,
        negative_slope,
        backend,
        need_x,
        need_weight,
        need_bias,
        need_state,
    )
    return [
        gradients[0] if need_x else None,
        gradients[1] if need_weight else None,
        gradients[2] if need_bias else None,
        grad_residual,
        gradients[3] if need_state else None,
    ]


def _activation_backward(
    grad: Tensor, saved: Tensor, lengths: Tensor | None, activation: str, negative_slope: float, backend: str
) -> Tensor:
    """``grad * act'(z)`` as the fused kernels compute it: the input gradient of a convolution that only activates.

    PyTorch's elementwise operations would not do: their last bits depend on where in memory an element lies.
    """
    channels = saved.shape[1]
    ones, nothing = saved.new_ones(channels, 1, 1), (None, None, lengths)
    options = (1, channels, activation, negative_slope, backend)
    dz: Tensor = backward_op(grad, saved, saved, ones, *nothing, *options, True, False, False, False)[0]
    return dz


def _gradients_by_composition(
    grad_y: Tensor, inputs: Sequence[Any], options: Sequence[Any], need: Sequence[bool]
) -> list[Tensor | None]:
    """The same, itself differentiable. The residual among ``inputs`` is None if it is added after the activation."""
    *tensors, cu_seqlens, lengths = inputs
    grad_after = None
    if need[3] and tensors[3] is None:
        grad_after = grad_y if lengths is None else grad_y.masked_fill(padding(grad_y, lengths), 0)

    def compute(*t: Any) -> Tensor:
        return composed(*t, cu_seqlens, lengths, *options)

    needed = [n and t is not None for n, t in zip(need, tensors, strict=True)]
    gradients = differentiable_gradients(compute, grad_y, tensors, needed)
    return [grad_after if i == 3 and grad_after is not None else g for i, g in enumerate(gradients)]
