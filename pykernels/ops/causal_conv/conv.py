"""The public causal convolution: arguments, choice of backend, recording of the derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from pykernels import _native
from pykernels.backends import YES, Answer, Check, Implementation, Operator, register, select
from pykernels.ops.causal_conv import reference
from pykernels.ops.causal_conv.autograd import apply, recording_function
from pykernels.ops.causal_conv.check import compare
from pykernels.ops.causal_conv.op import ACTIVATIONS, forward_op


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Dilated causal convolution over time, with bias, activation and residual in one pass.

    ``y[b,o,t] = act(bias[o] + sum_{c,k} weight[o,c,k] x[b,c,t-(K-1-k)*dilation]) + residual[b,o,t]``, where ``x`` is
    zero before the start of the series. Same as ``act(conv1d(pad(x, ((K-1)*dilation, 0)), weight, bias,
    dilation=dilation)) + residual`` of ``torch.nn.functional``, without the padded copy.

    Args:
        x: input, shape (B, C, T), float32 or float64 (any floating dtype with the reference backend), any strides.
        weight: shape (O, C, K), the layout of :class:`torch.nn.Conv1d`; any kernel width K.
        bias: shape (O,), or None.
        dilation: samples between taps, at least 1; may exceed the length.
        activation: None, ``"relu"``, ``"leaky_relu"`` or ``"tanh"``.
        negative_slope: slope of ``"leaky_relu"`` below zero, at least 0.
        residual: added after the activation, shape (B, O, T), or None.
        backend: a name in :data:`pykernels.backends.BACKENDS`, or None to choose automatically.

    Returns:
        y, shape (B, O, T), contiguous, dtype of ``x``.

    First-order gradients for every tensor argument, also under ``torch.compile``. The compiled backends refuse double
    backward, forward mode and ``vmap``; the reference backend supports them.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if an argument has the wrong shape, device or value.
        RuntimeError: if the backend asked for by name cannot run the call.

    Source of the algorithm: Chaudhary et al., "Efficient and generic 1D dilated convolution layer for deep learning",
    arXiv 2104.08002 (2021).
    """
    if activation is None:
        activation = "none"
    _check_arguments(x, weight, bias, dilation, activation, negative_slope, residual)
    y: Tensor = select(_OPERATOR, backend, x).run(x, weight, bias, residual, dilation, activation, negative_slope)
    return y


def _check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
) -> None:
    check_input(x)
    batch, channels, length = x.shape
    check_weight(weight, "weight", channels, x)
    out_channels = weight.shape[0]
    check_bias(bias, "bias", out_channels, x)
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"residual must be a tensor or None, got {type(residual).__name__}")
        if residual.shape != (batch, out_channels, length):
            raise ValueError(
                f"residual must have the output's shape {(batch, out_channels, length)}, got {tuple(residual.shape)}"
            )
        _check_like(residual, "residual", x)
    check_options(dilation, activation, negative_slope)


def check_input(x: Tensor) -> None:
    """Raise unless x can be (batch, channels, time) data."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() != 3:
        raise ValueError(f"x must have shape (batch, channels, time), got {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must have a floating-point dtype, got {x.dtype}")


def check_options(dilation: int, activation: str, negative_slope: float) -> None:
    """Raise unless the options make sense."""
    if not isinstance(dilation, (int, torch.SymInt)) or isinstance(dilation, bool):
        raise TypeError(f"dilation must be an integer, got {type(dilation).__name__}")
    if not 1 <= dilation < 2**62:
        raise ValueError(f"dilation must be at least 1 and below 2**62, got {dilation}")
    if activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS if name != "none")
        raise ValueError(f"activation must be None or one of {names}, got {activation!r}")
    if not negative_slope >= 0:
        raise ValueError(f"negative_slope must be at least 0, got {negative_slope}")


def check_weight(weight: Tensor, name: str, in_channels: int, x: Tensor) -> None:
    """Raise unless ``weight`` is (any, ``in_channels``, any) like x."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if weight.dim() != 3 or weight.numel() == 0:
        raise ValueError(
            f"{name} must have shape (out_channels, in_channels, kernel_size), none 0, got {tuple(weight.shape)}"
        )
    if weight.shape[1] != in_channels:
        raise ValueError(
            f"{name}, of shape {tuple(weight.shape)}, takes {weight.shape[1]} channels, but its input has {in_channels}"
        )
    _check_like(weight, name, x)


def check_bias(bias: Tensor | None, name: str, out_channels: int, x: Tensor) -> None:
    """Raise unless ``bias`` is None, or (``out_channels``,) like x."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(bias).__name__}")
    if bias.dim() != 1 or bias.shape[0] != out_channels:
        raise ValueError(f"{name} must have shape ({out_channels},), got {tuple(bias.shape)}")
    _check_like(bias, name, x)


def _check_like(t: Tensor, name: str, x: Tensor) -> None:
    if t.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")


def run_compiled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dilation: int,
    activation: str,
    negative_slope: float,
) -> Tensor:
    compiling = torch.compiler.is_compiling()
    function = recording_function(x, weight, bias, residual)
    if function is not None:
        if compiling and residual is x:  # Dynamo refuses one tensor as two arguments of a Function
            residual = x.view_as(x)
        result = apply(function, x, weight, bias, residual, dilation, activation, negative_slope)
        y: Tensor = result[0] if isinstance(result, tuple) else result
        return y
    if compiling:
        y = forward_op(x, weight, bias, residual, dilation, activation, negative_slope)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        y = forward_op(x, weight, bias, residual, dilation, activation, negative_slope)
    return y


def cpu_available() -> Answer:
    return YES if _native.cpu_error is None else Answer(False, _native.cpu_error)


def cpu_can_run(x: Tensor) -> Answer:
    if _native.cpu_error is not None:
        return Answer(False, _native.cpu_error)
    if x.device.type != "cpu":
        return Answer(False, f"x is on {x.device}, not on the CPU")
    if x.dtype != torch.float32 and x.dtype != torch.float64:
        return Answer(False, f"dtype {x.dtype} is not supported, only float32 and float64")
    return YES


def _check(backend: str) -> Check:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = (random(10, 40, 150), random(17, 40, 3), random(17), random(10, 17, 150))
    return compare(
        lambda x, w, b, r: reference.causal_conv1d(x, w, b, r, 64, "tanh", 0.01),
        lambda x, w, b, r: causal_conv1d(x, w, b, dilation=64, activation="tanh", residual=r, backend=backend),
        tensors,
    )


_OPERATOR = register(
    Operator(
        name="causal_conv1d",
        implementations={
            "cpu": Implementation(run_compiled, cpu_can_run, cpu_available),
            "reference": Implementation(reference.causal_conv1d, lambda x: YES, lambda: YES),
        },
        check=_check,
    )
)
