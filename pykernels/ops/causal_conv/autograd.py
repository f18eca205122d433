"""First-order derivatives of the causal convolution's compiled kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pykernels.ops.causal_conv.op import backward_op, forward_activated_op, forward_op

UNSUPPORTED = "the compiled causal_conv1d does not support {} yet; use backend='reference'"


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, which torch does not annotate."""
    return function.apply(*args)


def recording_function(*tensors: Tensor | None) -> type[torch.autograd.Function] | None:
    """The Function that must record a call on ``tensors``, or None if the operator itself will do.

    Raises:
        RuntimeError: inside forward-mode differentiation or a function transform other than ``torch.func.grad``.
    """
    records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if torch.compiler.is_compiling():
        return CausalConv1d if records else None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        for interpreter in torch._C._functorch.get_interpreter_stack() or ():
            transform = interpreter.key()
            if transform != torch._C._functorch.TransformType.Grad:
                raise RuntimeError(UNSUPPORTED.format(f"torch.func.{transform.name.lower()}"))
        return CausalConv1d
    if torch.autograd.forward_ad._current_level >= 0 and any(
        t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(UNSUPPORTED.format("forward-mode differentiation"))
    return EagerCausalConv1d if records else None


class CausalConv1d(torch.autograd.Function):
    """``y``, or ``(y, act(z))`` where the backward needs the activation and a residual hides it in ``y``."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        dilation: int,
        activation: str,
        negative_slope: float,
    ) -> Any:
        if residual is not None and activation != "none":
            return forward_activated_op(x, weight, bias, residual, dilation, activation, negative_slope)
        return forward_op(x, weight, bias, residual, dilation, activation, negative_slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, _, ctx.dilation, ctx.activation, ctx.negative_slope = inputs
        ctx.set_materialize_grads(False)
        activated = None
        if isinstance(output, tuple):
            activated = output[1]
            ctx.mark_non_differentiable(activated)
        elif ctx.activation != "none":
            activated = output
        ctx.save_for_backward(x, weight, activated)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_y = grads[0]
        if grad_y is None:
            return (None,) * 7
        x, weight, activated = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        options = (ctx.dilation, ctx.activation, ctx.negative_slope, need_x, need_weight, need_bias)
        grad_x = grad_weight = grad_bias = None
        if need_x or need_weight or need_bias:
            gradients = run_backward(backward_op, grad_y, activated, x, weight, *options)
            grad_x = gradients[0] if need_x else None
            grad_weight = gradients[1] if need_weight else None
            grad_bias = gradients[2] if need_bias else None
        return grad_x, grad_weight, grad_bias, grad_y if need_residual else None, None, None, None


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


class FirstDerivativeOnly(torch.autograd.Function):
    """A backward ``run(*args)``, recorded so that differentiating it raises instead of giving a silent zero."""

    @staticmethod
    def forward(run: Callable[..., Any], *args: Any) -> Any:
        return tuple(run(*args))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(UNSUPPORTED.format("double backward"))


def run_backward(run: Callable[..., Any], *args: Any) -> Any:
    """``run(*args)``, recorded where the backward itself is being recorded."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return apply(FirstDerivativeOnly, run, *args)
    return run(*args)
