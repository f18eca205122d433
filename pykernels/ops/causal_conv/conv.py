"""The public causal convolution: arguments, choice of backend, recording of the derivative."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pykernels import _native, _triton
from pykernels.backends import YES, Answer, Check, Implementation, Operator, register, select
from pykernels.ops._check import compare
from pykernels.ops._op import reads_values
from pykernels.ops.causal_conv import autograd, cost, reference
from pykernels.ops.causal_conv.op import ACTIVATIONS

CPU_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    residual_before_activation: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
    validate: bool | None = None,
) -> Any:
    """Dilated causal convolution over time, with bias, activation and residual in one pass.

    ``y[b,o,t] = act(bias[o] + sum_{c,k} weight[o,c,k] x[b,c,t-(K-1-k)*dilation]) + residual[b,o,t]``, where ``x`` is
    zero before the start of the series. Same as ``act(conv1d(pad(x, ((K-1)*dilation, 0)), weight, bias,
    dilation=dilation, groups=groups)) + residual`` of ``torch.nn.functional``, without the padded copy.

    Args:
        x: input, shape (B, C, T), any strides. The compiled backends take float32 and float64, and float16 and bfloat16
            with sums in float32; the reference any floating dtype. Under autocast, as ``torch.nn.functional.conv1d``.
        weight: shape (O, C / groups, K), the layout of :class:`torch.nn.Conv1d`; any kernel width K.
        bias: shape (O,), or None.
        dilation: samples between taps, at least 1; may exceed the length.
        groups: blocks of channels that do not see each other; ``groups=C`` is a depthwise convolution.
        activation: None, ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"silu"`` (or ``"swish"``) or ``"gelu"`` (the exact
            one, with the error function).
        negative_slope: slope of ``"leaky_relu"`` below zero, at least 0.
        residual: shape (B, O, T), or None; added after the activation.
        residual_before_activation: add the residual before the activation instead.
        initial_state: the samples before the start, oldest first, shape (B, C, (K-1)*dilation), or None for zeros. With
            the final state of one call as the initial state of the next, a series may be cut anywhere.
        return_final_state: return ``(y, final_state)``, the last (K-1)*dilation samples of the series, as
            ``initial_state`` for what follows. A tensor of its own.
        cu_seqlens: int32 offsets (N+1,) of N sequences packed one after the other into x (1, C, total): 0, not
            decreasing, total at the end. Each sequence is convolved on its own; the states are (N, C, (K-1)*dilation).
        lengths: valid samples of each series of a padded batch, integers (B,) from 0 to T. Behind them the result is 0,
            whatever x and residual hold there, and so are the gradients. Not with ``cu_seqlens``.
        backend: a name in :data:`pykernels.backends.BACKENDS`, or None to choose automatically.
        validate: check the values of ``cu_seqlens`` and ``lengths``: True, False, or None to do so on the CPU only,
            where it does not wait for a device. Unchecked ones are clamped.

    Returns:
        y, shape (B, O, T), contiguous, dtype of ``x``; with ``return_final_state`` the pair (y, final_state).

    Gradients for every floating-point argument, of any order, and forward mode, ``torch.func.grad``, ``jvp`` and
    ``vmap``. Under ``torch.compile`` first derivatives only.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if an argument has the wrong shape, device or value.
        RuntimeError: if the backend asked for by name cannot run the call.

    Source of the algorithm: Chaudhary et al., "Efficient and generic 1D dilated convolution layer for deep learning",
    arXiv 2104.08002 (2021).
    """
    if _autocasting(x):
        x, weight, bias, residual, initial_state = _autocast(x, weight, bias, residual, initial_state)
    if activation is None:
        activation = "none"
    elif activation == "swish":
        activation = "silu"
    check_input(x)
    check_options(dilation, activation, negative_slope)
    batch, channels, length = x.shape
    check_weight(weight, "weight", channels, x, groups)
    out_channels, _, kernel_size = weight.shape
    check_bias(bias, "bias", out_channels, x)
    if not isinstance(residual_before_activation, bool):
        raise TypeError(f"residual_before_activation must be a bool, got {type(residual_before_activation).__name__}")
    if residual is not None:
        check_tensor(residual, "residual", (batch, out_channels, length), x)
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, x, validate)
        if lengths is not None:
            raise ValueError("lengths cannot be combined with cu_seqlens: packed sequences have no padding")
    if lengths is not None:
        check_lengths(lengths, x, validate)
    if initial_state is not None:
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        check_tensor(initial_state, "initial_state", (sequences, channels, (kernel_size - 1) * dilation), x)
    y: Tensor = select(_OPERATOR, backend, x).run(
        x,
        weight,
        bias,
        residual,
        initial_state,
        cu_seqlens,
        lengths,
        dilation,
        groups,
        activation,
        negative_slope,
        residual_before_activation,
    )
    if not return_final_state:
        return y
    return y, reference.final_state(x, (kernel_size - 1) * dilation, initial_state, cu_seqlens, lengths)


def _autocasting(x: object) -> bool:
    if not isinstance(x, Tensor) or not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return False
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def _autocast(x: Tensor, *others: Tensor | None) -> list[Any]:
    """The arguments in the dtype of autocast, which leaves float64 alone."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Tensor | None) -> Tensor | None:
        return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t

    return [cast(t) for t in (x, *others)]


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
    _check_count(dilation, "dilation")
    if activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS if name != "none")
        raise ValueError(f"activation must be None or one of {names}, got {activation!r}")
    if not negative_slope >= 0:
        raise ValueError(f"negative_slope must be at least 0, got {negative_slope}")


def _check_count(value: int, name: str) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not 1 <= value < 2**62:
        raise ValueError(f"{name} must be at least 1 and below 2**62, got {value}")


def check_offsets(cu_seqlens: Tensor, x: Tensor, validate: bool | None) -> None:
    """Raise unless ``cu_seqlens`` can be the offsets of sequences packed into x."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor or None, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must have dtype torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    if x.shape[0] != 1:
        raise ValueError(f"x must have shape (1, channels, total) with cu_seqlens, got {tuple(x.shape)}")
    if len(cu_seqlens) == 1 and x.shape[2] > 0:
        raise ValueError(f"cu_seqlens must hold the end of at least one sequence, since x has {x.shape[2]} samples")
    _check_device(cu_seqlens, "cu_seqlens", x)
    if reads_values(cu_seqlens, validate):
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != x.shape[2] or any(a > b for a, b in pairwise(offsets)):
            shown = offsets if len(offsets) <= 10 else f"[{', '.join(map(str, offsets[:5]))}, ..., {offsets[-1]}]"
            raise ValueError(
                f"cu_seqlens must start with 0, not decrease, and end with the {x.shape[2]} samples of x, got {shown}"
            )


def check_lengths(lengths: Tensor, x: Tensor, validate: bool | None) -> None:
    """Raise unless ``lengths`` can be the valid lengths of the series in x."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a tensor or None, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must have dtype torch.int32 or torch.int64, got {lengths.dtype}")
    if lengths.shape != x.shape[:1]:
        raise ValueError(f"lengths must have shape ({x.shape[0]},), one for each series, got {tuple(lengths.shape)}")
    _check_device(lengths, "lengths", x)
    if reads_values(lengths, validate) and len(lengths) > 0:
        low, high = (int(v) for v in torch.aminmax(lengths))
        if low < 0 or high > x.shape[2]:
            raise ValueError(f"lengths must be between 0 and {x.shape[2]}, got {low if low < 0 else high}")


def check_weight(weight: Tensor, name: str, in_channels: int, x: Tensor, groups: int = 1) -> None:
    """Raise unless ``weight`` is (any, ``in_channels / groups``, any) like x."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if weight.dim() != 3 or weight.numel() == 0:
        raise ValueError(
            f"{name} must have shape (out_channels, in_channels, kernel_size), none 0, got {tuple(weight.shape)}"
        )
    if groups != 1 or type(groups) is not int:
        _check_count(groups, "groups")
        if in_channels % groups != 0 or weight.shape[0] % groups != 0:
            raise ValueError(
                f"groups must divide the {in_channels} channels of x and the {weight.shape[0]} of {name}, got {groups}"
            )
    if weight.shape[1] * groups != in_channels:
        taken = f"{weight.shape[1]} channels" + ("" if groups == 1 else f" in each of {groups} groups")
        raise ValueError(f"{name}, of shape {tuple(weight.shape)}, takes {taken}, but its input has {in_channels}")
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


def check_tensor(t: Tensor, name: str, shape: tuple[int, ...], x: Tensor) -> None:
    """Raise unless ``t`` has this shape, and dtype and device of x."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(t).__name__}")
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
    _check_like(t, name, x)


def _check_like(t: Tensor, name: str, x: Tensor) -> None:
    if t.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        _check_device(t, name, x)


def _check_device(t: Tensor, name: str, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")


def _run_cpu(*args: Any) -> Tensor:
    return autograd.run(*args, "cpu")


def _run_triton(*args: Any) -> Tensor:
    return autograd.run(*args, "triton")


def cpu_can_run(x: Tensor) -> Answer:
    if _native.cpu_error is not None:
        return Answer(False, _native.cpu_error)
    if x.device.type != "cpu":
        return Answer(False, f"x is on {x.device}, not on the CPU")
    if x.dtype not in CPU_DTYPES:
        return Answer(False, f"dtype {x.dtype} is not supported, only {', '.join(str(d)[6:] for d in CPU_DTYPES)}")
    return YES


def _check(backend: str) -> Check:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = (random(10, 40, 150), random(17, 40, 3), random(17), random(10, 17, 150))
    return compare(
        lambda x, w, b, r: reference.causal_conv1d(x, w, b, r, None, None, None, 64, 1, "tanh", 0.01, False),
        lambda x, w, b, r: causal_conv1d(x, w, b, dilation=64, activation="tanh", residual=r, backend=backend),
        tensors,
        backend,
    )


_OPERATOR = register(
    Operator(
        name="causal_conv1d",
        implementations={
            "cpu": Implementation(_run_cpu, cpu_can_run, _native.available),
            "triton": Implementation(_run_triton, _triton.can_run, _triton.available),
            "reference": Implementation(reference.causal_conv1d, lambda x: YES, lambda: YES),
        },
        check=_check,
        path="single convolution",
        cost=cost.forward,
    )
)
