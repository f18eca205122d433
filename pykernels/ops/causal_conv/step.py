"""The causal convolution one sample at a time, with the past in a ring buffer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykernels import _native
from pykernels.backends import YES, Answer, Check, Implementation, Operator, register, select
from pykernels.ops._autograd import recording, transforming
from pykernels.ops._check import relative_error
from pykernels.ops._memory import IS_DOUBLE, address, plain
from pykernels.ops.causal_conv import conv, cost, reference
from pykernels.ops.causal_conv.op import ACTIVATIONS

LANES = 16  # stream_lanes of kernels/causal_conv/stream.hpp


class ConvState:
    """The past of a causal convolution of B series: a ring buffer that :func:`pykernels.causal_conv1d_step` advances.

    Args:
        past: the last S = (K-1)*dilation samples of each series, oldest first, shape (B, C, S): the ``initial_state``
            or the final state of :func:`pykernels.causal_conv1d`. It is copied.

    Attributes:
        buffer: shape (B, C, S), the sample of time t at t mod S. In memory the channels lie side by side.
        position: the time of the next sample; the first one after ``past`` has time 0.
    """

    def __init__(self, past: Tensor) -> None:
        if not isinstance(past, Tensor) or past.dim() != 3 or not past.is_floating_point():
            what = tuple(past.shape) if isinstance(past, Tensor) else type(past).__name__
            raise ValueError(f"past must be a floating-point tensor (batch, channels, samples), got {what}")
        self.buffer = past.detach().transpose(1, 2).contiguous().clone().transpose(1, 2)
        self.position = 0
        self._packed: tuple[Tensor, int, Tensor] | None = None

    @classmethod
    def zeros(
        cls,
        batch_size: int,
        channels: int,
        kernel_size: int,
        dilation: int = 1,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ConvState:
        """The state before the first sample."""
        return cls(torch.zeros((batch_size, channels, (kernel_size - 1) * dilation), dtype=dtype, device=device))

    @property
    def past(self) -> Tensor:
        """The samples in the buffer, oldest first, shape (B, C, S); a tensor of its own."""
        size = self.buffer.shape[2]
        return self.buffer.roll(-(self.position % size), 2) if size > 0 else self.buffer.clone()

    def clone(self) -> ConvState:
        """A state that goes on independently."""
        other = ConvState(self.buffer)
        other.position = self.position
        return other

    def packed(self, weight: Tensor, groups: int) -> Tensor:
        """``weight`` as the kernel reads it, repacked when it is another one or has changed."""
        version = None if weight.is_inference() else weight._version
        if self._packed is not None and self._packed[0] is weight and self._packed[1] == version:
            return self._packed[2]
        packed = pack(weight, groups)
        self._packed = None if version is None else (weight, version, packed)
        return packed

    def __repr__(self) -> str:
        return f"ConvState(buffer={tuple(self.buffer.shape)}, dtype={self.buffer.dtype}, position={self.position})"


def causal_conv1d_step(
    x_t: Tensor,
    state: ConvState,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    residual_before_activation: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The next output of :func:`pykernels.causal_conv1d` for a batch of endless series.

    The outputs of successive calls are those of one call on the whole series; on the CPU they have the same bits.

    Args:
        x_t: the next sample of each series, shape (B, C).
        state: their past, of the same B, C and dtype and for this kernel width and dilation. It is advanced in place.
        weight, bias, dilation, groups, activation, negative_slope, residual_before_activation, backend: as for
            :func:`pykernels.causal_conv1d`.
        residual: shape (B, O), or None.

    Returns:
        y_t, shape (B, O).

    Raises:
        TypeError, ValueError: if an argument has the wrong type, shape, dtype or device.
        RuntimeError: if a gradient is asked for: call it under ``torch.no_grad()``.
    """
    if activation is None:
        activation = "none"
    elif activation == "swish":
        activation = "silu"
    if not isinstance(x_t, Tensor) or x_t.dim() != 2:
        what = tuple(x_t.shape) if isinstance(x_t, Tensor) else type(x_t).__name__
        raise ValueError(f"x_t must be a tensor of shape (batch, channels), got {what}")
    if not isinstance(state, ConvState):
        raise TypeError(f"state must be a pykernels.ConvState, got {type(state).__name__}")
    x = x_t[:, :, None]
    conv.check_input(x)
    conv.check_options(dilation, activation, negative_slope)
    batch, channels = x_t.shape
    conv.check_weight(weight, "weight", channels, x, groups)
    out_channels, _, kernel_size = weight.shape
    conv.check_bias(bias, "bias", out_channels, x)
    conv.check_tensor(state.buffer, "state", (batch, channels, (kernel_size - 1) * dilation), x)
    if residual is not None:
        conv.check_tensor(residual, "residual", (batch, out_channels), x)
    if recording(x_t, weight, bias, residual) or transforming(x_t, weight, bias, residual):
        raise RuntimeError("causal_conv1d_step has no derivative; call it under torch.no_grad(), or causal_conv1d")
    y: Tensor = select(_OPERATOR, backend, x_t).run(
        x_t, state, weight, bias, residual, dilation, groups, activation, negative_slope, residual_before_activation
    )
    state.position += 1
    return y


def pack(weight: Tensor, groups: int) -> Tensor:
    """Weights (O, C/groups, K) as [group][tap, the newest first][in channel][out channel, padded with zeros].

    Those of a depthwise convolution as [tap][channel].
    """
    out_channels, per_group, _ = weight.shape
    newest_first = plain(weight.detach()).flip(2)
    if groups > 1 and per_group == 1 and out_channels == groups:
        return newest_first[:, 0].T.contiguous()
    packed = newest_first.unflatten(0, (groups, -1)).permute(0, 3, 2, 1)
    return torch.nn.functional.pad(packed, (0, -packed.shape[3] % LANES)).contiguous()


def record(
    weight: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    ring: Tensor | None,
    dilation: int,
    groups: int,
    activation: str,
    negative_slope: float,
    residual_before_activation: bool = False,
) -> tuple[Any, ...]:
    """A convolution as the kernels take it; the tensors, which must be contiguous, have to outlive it."""
    out_channels, per_group, kernel_size = weight.shape
    addresses = (
        packed.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if ring is None else ring.data_ptr(),
    )
    sizes = (per_group * groups, out_channels, kernel_size, dilation, groups)
    return sizes, addresses, ACTIVATIONS[activation], negative_slope, residual_before_activation


def _run_cpu(
    x_t: Tensor,
    state: ConvState,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dilation: int,
    groups: int,
    activation: str,
    negative_slope: float,
    residual_before_activation: bool,
) -> Tensor:
    assert _native.cpu is not None
    batch, channels = x_t.shape
    x_t = _dense(x_t)
    bias = None if bias is None else plain(bias).contiguous()
    residual = None if residual is None else _dense(residual)
    ring = state.buffer.transpose(1, 2)
    if not ring.is_contiguous():
        raise ValueError("state.buffer must be contiguous with its last two dimensions exchanged")
    packed = state.packed(weight, groups)
    y = x_t.new_empty((batch, weight.shape[0]))
    _native.cpu.causal_conv1d_step(
        IS_DOUBLE[x_t.dtype],
        record(
            weight,
            packed,
            bias,
            ring,
            dilation,
            groups,
            activation,
            negative_slope,
            residual_before_activation,
        ),
        batch,
        state.position,
        address(x_t, (batch, channels), ring.dtype, "x_t"),
        x_t.stride(0),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def _dense(t: Tensor) -> Tensor:
    """``t`` with a channel stride of 1."""
    t = plain(t)
    return t if t.stride(1) == 1 else t.contiguous()


def _run_reference(
    x_t: Tensor,
    state: ConvState,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *options: Any,
) -> Tensor:
    x, past = x_t[:, :, None], state.past
    size = past.shape[2]
    residual = None if residual is None else residual[:, :, None]
    y = reference.causal_conv1d(x, weight, bias, residual, past, None, None, *options)
    if size > 0:
        state.buffer[:, :, state.position % size] = x_t
    return y[:, :, 0]


def _can_run(x_t: Tensor) -> Answer:
    answer = conv.cpu_can_run(x_t)
    if answer.ok and x_t.dtype not in IS_DOUBLE:
        return Answer(False, f"dtype {x_t.dtype} is not supported, only float32 and float64")
    return answer


def _check(backend: str) -> Check:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 5, 40), (7, 5, 3), (7,)))
    expected = reference.causal_conv1d(x, w, b, None, None, None, None, 4, 1, "tanh", 0.01, False)
    errors = {}
    for dtype, name in ((torch.float64, "float64 forward"), (torch.float32, "float32 forward")):
        state = ConvState.zeros(3, 5, 3, 4, dtype=dtype)
        weights = w.to(dtype), b.to(dtype)
        steps = [
            causal_conv1d_step(x_t, state, *weights, dilation=4, activation="tanh", backend=backend)
            for x_t in x.to(dtype).unbind(2)
        ]
        errors[name] = relative_error(torch.stack(steps, 2), expected)
    return Check(errors, {"float64 forward": 1e-12, "float32 forward": 1e-5})


_OPERATOR = register(
    Operator(
        name="causal_conv1d_step",
        implementations={
            "cpu": Implementation(_run_cpu, _can_run, _native.available),
            "reference": Implementation(_run_reference, lambda x_t: YES, lambda: YES),
        },
        check=_check,
        path="one sample",
        cost=cost.step,
    )
)
