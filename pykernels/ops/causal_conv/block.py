"""Two causal convolutions with leaky ReLU and a residual connection around them, as one operator.

One boundary between Python and the kernels for the whole block instead of one per convolution, and the two gradients
of the block's input are added as the second one is written. With the maximum over time behind the block, the backward
of its last convolutions visits only the times of the maxima.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pykernels.backends import YES, Check, Implementation, Operator, register, select
from pykernels.ops.causal_conv import conv, reference
from pykernels.ops.causal_conv.autograd import UNSUPPORTED, CausalConv1d, recording_function
from pykernels.ops.causal_conv.check import compare
from pykernels.ops.causal_conv.op import (
    implement,
    library,
    run_backward,
    run_backward_at,
    run_forward,
    run_forward_max,
)

_ACTIVATION = "leaky_relu"

library.define(  # y, and if save the outputs h1 and h2 of the two activations
    "causal_conv_block(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? skip_weight, "
    "Tensor? skip_bias, int dilation, float negative_slope, bool save) -> Tensor[]"
)
library.define(  # gradients of the first seven arguments above, those that are not needed empty
    "causal_conv_block_backward(Tensor grad_y, Tensor x, Tensor h1, Tensor h2, Tensor weight1, Tensor weight2, "
    "Tensor? skip_weight, int dilation, float negative_slope, bool[] needed) -> Tensor[]"
)
library.define(  # the maximum of y over time, and if save its times, h1, and h2 at these times
    "causal_conv_block_max(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? skip_weight, "
    "Tensor? skip_bias, int dilation, float negative_slope, bool save) -> Tensor[]"
)
library.define(
    "causal_conv_block_max_backward(Tensor grad, Tensor time, Tensor x, Tensor h1, Tensor h2, Tensor weight1, "
    "Tensor weight2, Tensor? skip_weight, int dilation, float negative_slope, bool[] needed) -> Tensor[]"
)
_forward_op = torch.ops.pykernels.causal_conv_block.default
_backward_op = torch.ops.pykernels.causal_conv_block_backward.default
_max_forward_op = torch.ops.pykernels.causal_conv_block_max.default
_max_backward_op = torch.ops.pykernels.causal_conv_block_max_backward.default


def causal_conv_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    skip_weight: Tensor | None = None,
    skip_bias: Tensor | None = None,
    *,
    dilation: int = 1,
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    """Residual block ``act(conv2(act(conv1(x)))) + skip(x)`` of dilated causal convolutions, act the leaky ReLU.

    Both convolutions have the same dilation; ``skip`` is the identity, or a convolution of width 1.

    Args:
        x: input, shape (B, C, T).
        weight1, bias1: of the first convolution, shapes (H, C, K) and (H,), the bias or None.
        weight2, bias2: of the second, shapes (O, H, K') and (O,), the bias or None.
        skip_weight, skip_bias: of the skip, shapes (O, C, 1) and (O,); without a weight O must be C.
        dilation, negative_slope, backend: see :func:`pykernels.causal_conv1d`, for dtypes and errors too.

    Returns:
        y, shape (B, O, T).

    Source: Franceschi, Dieuleveut and Jaggi, "Unsupervised scalable representation learning for multivariate time
    series", NeurIPS 2019.
    """
    tensors = (x, weight1, bias1, weight2, bias2, skip_weight, skip_bias)
    _check_arguments(*tensors, dilation, negative_slope)
    return select(_OPERATOR, backend, x).run(*tensors, dilation, negative_slope)


def causal_conv_block_max(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    skip_weight: Tensor | None = None,
    skip_bias: Tensor | None = None,
    *,
    dilation: int = 1,
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    """Maximum over time of :func:`causal_conv_block`, with the same arguments.

    Its gradient belongs to one time per sample and channel, the first one that reaches the maximum, so the backward of
    the second convolution and of the skip costs as much as for a series of at most O samples.

    Returns:
        The maxima, shape (B, O).

    Raises:
        ValueError: as the block, and if the series are empty.
    """
    tensors = (x, weight1, bias1, weight2, bias2, skip_weight, skip_bias)
    _check_arguments(*tensors, dilation, negative_slope)
    if x.shape[2] == 0:
        raise ValueError("x holds empty series: the maximum over time needs at least one sample")
    return select(_MAX_OPERATOR, backend, x).run(*tensors, dilation, negative_slope)


def _check_arguments(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
    dilation: int,
    negative_slope: float,
) -> None:
    conv.check_arguments(x, weight1, bias1, dilation, _ACTIVATION, negative_slope, None)
    conv.check_weight(weight2, "weight2", weight1.shape[0], x)
    out_channels = weight2.shape[0]
    conv.check_bias(bias2, "bias2", out_channels, x)
    if skip_weight is None:
        if skip_bias is not None:
            raise ValueError("skip_bias needs a skip_weight")
        if x.shape[1] != out_channels:
            raise ValueError(
                f"skip_weight is needed, since x has {x.shape[1]} channels and weight2 gives {out_channels}"
            )
    else:
        conv.check_weight(skip_weight, "skip_weight", x.shape[1], x)
        if skip_weight.shape[0] != out_channels or skip_weight.shape[2] != 1:
            raise ValueError(
                f"skip_weight must have shape ({out_channels}, {x.shape[1]}, 1), got {tuple(skip_weight.shape)}"
            )
        conv.check_bias(skip_bias, "skip_bias", out_channels, x)


def _run_reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
    dilation: int,
    negative_slope: float,
    one: Any = reference.causal_conv1d,
) -> Tensor:
    """The definition, with ``one`` as the single convolution."""
    residual = x if skip_weight is None else one(x, skip_weight, skip_bias, None, 1, "none", negative_slope)
    h1 = one(x, weight1, bias1, None, dilation, _ACTIVATION, negative_slope)
    y: Tensor = one(h1, weight2, bias2, residual, dilation, _ACTIVATION, negative_slope)
    return y


def _max_reference(*args: Any) -> Tensor:
    return _run_reference(*args).max(2).values


def _records_eagerly(tensors: tuple[Tensor | None, ...]) -> bool | None:
    """Whether a call is recorded as one block; None if it is compiled or transformed, and so taken apart."""
    function = recording_function(*tensors)
    if torch.compiler.is_compiling() or function is CausalConv1d:
        return None
    return function is not None


def _run_compiled(*args: Any) -> Tensor:
    records = _records_eagerly(args[:7])
    if records is None:
        return _run_reference(*args, one=conv.run_compiled)
    if records:
        y: Tensor = CausalConvBlock.apply(*args)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = _forward_op(*args, False)[0]
        return result


def _max_compiled(*args: Any) -> Tensor:
    records = _records_eagerly(args[:7])
    if records is None:
        return _run_reference(*args, one=conv.run_compiled).max(2).values
    if records:
        y: Tensor = CausalConvBlockMax.apply(*args)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = _max_forward_op(*args, False)[0]
        return result


def _forward_cpu(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
    dilation: int,
    negative_slope: float,
    save: bool,
) -> list[Tensor]:
    residual = x
    if skip_weight is not None:
        residual = run_forward(x, skip_weight, skip_bias, None, 1, "none", negative_slope, None)
    h1 = run_forward(x, weight1, bias1, None, dilation, _ACTIVATION, negative_slope, None)
    h2 = x.new_empty((x.shape[0], weight2.shape[0], x.shape[2])) if save else None
    y = run_forward(h1, weight2, bias2, residual, dilation, _ACTIVATION, negative_slope, h2)
    return [y] if h2 is None else [y, h1, h2]


def _backward_cpu(
    grad_y: Tensor,
    x: Tensor,
    h1: Tensor,
    h2: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    skip_weight: Tensor | None,
    dilation: int,
    negative_slope: float,
    needed: list[bool],
) -> list[Tensor]:
    options = (dilation, _ACTIVATION, negative_slope)
    need_x, *need_first = needed[:3]
    grad_h1, *second = run_backward(grad_y, h2, h1, weight2, *options, need_x or any(need_first), *needed[3:5], None)
    addend, skip = grad_y, [grad_y.new_empty(0)] * 2
    if skip_weight is not None:
        addend, *skip = run_backward(
            grad_y, None, x, skip_weight, 1, "none", negative_slope, need_x, *needed[5:7], None
        )
    first = [grad_y.new_empty(0)] * 3
    if need_x or any(need_first):
        first = list(run_backward(grad_h1, h1, x, weight1, *options, *needed[:3], addend if need_x else None))
    return [*first, *second, *skip]


def _max_forward_cpu(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
    dilation: int,
    negative_slope: float,
    save: bool,
) -> list[Tensor]:
    residual = x
    if skip_weight is not None:
        residual = run_forward(x, skip_weight, skip_bias, None, 1, "none", negative_slope, None)
    h1 = run_forward(x, weight1, bias1, None, dilation, _ACTIVATION, negative_slope, None)
    value, time, h2 = run_forward_max(h1, weight2, bias2, residual, dilation, _ACTIVATION, negative_slope)
    return [value, time, h1, h2] if save else [value]


def _max_backward_cpu(
    grad: Tensor,
    time: Tensor,
    x: Tensor,
    h1: Tensor,
    h2: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    skip_weight: Tensor | None,
    dilation: int,
    negative_slope: float,
    needed: list[bool],
) -> list[Tensor]:
    need_x, *need_first = needed[:3]
    through = need_x or any(need_first)
    dz = torch.where(h2 <= 0, negative_slope * grad, grad)
    grad_h1, *second = run_backward_at(dz, time, h1, weight2, dilation, through, *needed[3:5])
    addend, skip = None, [grad.new_empty(0)] * 2
    if skip_weight is not None:
        addend, *skip = run_backward_at(grad, time, x, skip_weight, 1, need_x, *needed[5:7])
    elif need_x:
        addend = torch.zeros_like(x).scatter_(2, time[..., None], grad[..., None])
    first = [grad.new_empty(0)] * 3
    if through:
        options = (dilation, _ACTIVATION, negative_slope)
        first = list(run_backward(grad_h1, h1, x, weight1, *options, *needed[:3], addend if need_x else None))
    return [*first, *second, *skip]


def _forward_fake(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
    dilation: int,
    negative_slope: float,
    save: bool,
) -> list[Tensor]:
    channels = [weight2.shape[0], weight1.shape[0], weight2.shape[0]]
    return [x.new_empty((x.shape[0], c, x.shape[2])) for c in (channels if save else channels[:1])]


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    h1: Tensor,
    h2: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    skip_weight: Tensor | None,
    dilation: int,
    negative_slope: float,
    needed: list[bool],
) -> list[Tensor]:
    skip = (0,) if skip_weight is None else skip_weight.shape
    shapes = [x.shape, weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1], skip, skip[:1]]
    return [x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed, strict=True)]


def _max_forward_fake(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
    dilation: int,
    negative_slope: float,
    save: bool,
) -> list[Tensor]:
    shape = (x.shape[0], weight2.shape[0])
    value = x.new_empty(shape)
    if not save:
        return [value]
    h1 = x.new_empty((x.shape[0], weight1.shape[0], x.shape[2]))
    return [value, x.new_empty(shape, dtype=torch.int64), h1, x.new_empty(shape)]


def _max_backward_fake(
    grad: Tensor,
    time: Tensor,
    x: Tensor,
    h1: Tensor,
    h2: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    skip_weight: Tensor | None,
    dilation: int,
    negative_slope: float,
    needed: list[bool],
) -> list[Tensor]:
    return _backward_fake(grad, x, h1, h2, weight1, weight2, skip_weight, dilation, negative_slope, needed)


implement(_forward_op, _forward_cpu, _forward_fake)
implement(_backward_op, _backward_cpu, _backward_fake)
implement(_max_forward_op, _max_forward_cpu, _max_forward_fake)
implement(_max_backward_op, _max_backward_cpu, _max_backward_fake)


class CausalConvBlock(torch.autograd.Function):
    """Eager recording of a block; what is transformed or compiled records its convolutions one by one."""

    forward_op, backward_op = _forward_op, _backward_op

    @classmethod
    def forward(cls, ctx: Any, *args: Any) -> Any:
        y, *saved = cls.forward_op(*args, True)
        x, weight1, _, weight2, _, skip_weight, _, ctx.dilation, ctx.negative_slope = args
        ctx.has_time = len(saved) == 3
        time = saved[:1] if ctx.has_time else []
        ctx.save_for_backward(*time, x, *saved[-2:], weight1, weight2, skip_weight)
        return y

    @classmethod
    def backward(cls, ctx: Any, grad: Tensor) -> Any:
        needed = list(ctx.needs_input_grad[:7])
        arguments = (grad, *ctx.saved_tensors, ctx.dilation, ctx.negative_slope, needed)
        if torch.is_grad_enabled():
            gradients = CausalConvBlockBackward.apply(cls.backward_op, *arguments)
        else:
            gradients = cls.backward_op(*arguments)
        return (*(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None)


class CausalConvBlockMax(CausalConvBlock):
    """The same for the maximum of a block over time."""

    forward_op, backward_op = _max_forward_op, _max_backward_op


class CausalConvBlockBackward(torch.autograd.Function):
    """The backward as a recorded operation, so that differentiating it raises instead of giving a silent zero."""

    @staticmethod
    def forward(ctx: Any, op: Any, *args: Any) -> Any:
        return tuple(op(*args))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(UNSUPPORTED.format("double backward"))


def _check(backend: str, function: Callable[..., Tensor], definition: Callable[..., Tensor]) -> Check:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 5, 70), (40, 5, 3), (40,), (16, 40, 3), (16,), (16, 5, 1), (16,))
    tensors = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return compare(lambda *t: definition(*t, 8, 0.01), lambda *t: function(*t, dilation=8, backend=backend), tensors)


_OPERATOR = register(
    Operator(
        name="causal_conv_block",
        implementations={
            "cpu": Implementation(_run_compiled, conv.cpu_can_run, conv.cpu_available),
            "reference": Implementation(_run_reference, lambda x: YES, lambda: YES),
        },
        check=lambda backend: _check(backend, causal_conv_block, _run_reference),
    )
)
_MAX_OPERATOR = register(
    Operator(
        name="causal_conv_block_max",
        implementations={
            "cpu": Implementation(_max_compiled, conv.cpu_can_run, conv.cpu_available),
            "reference": Implementation(_max_reference, lambda x: YES, lambda: YES),
        },
        check=lambda backend: _check(backend, causal_conv_block_max, _max_reference),
    )
)
