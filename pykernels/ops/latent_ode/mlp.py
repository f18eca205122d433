"""The public trajectory of an MLP field: arguments, choice of backend, recording of the derivative."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pykernels import _native, _triton
from pykernels.backends import YES, Answer, Check, Implementation, Operator, register, select
from pykernels.ops import _op
from pykernels.ops._check import compare
from pykernels.ops._memory import IS_DOUBLE
from pykernels.ops.latent_ode import autograd, cost, reference
from pykernels.ops.latent_ode.grids import check_monotone
from pykernels.ops.latent_ode.reference import ACTIVATIONS, INPUT_MAPS, Options, Tensors
from pykernels.ops.latent_ode.tableaux import TABLEAUX

#: What the forward may keep for the backward by default; it computes again what exceeds that.
DEFAULT_MAX_MEMORY = 512 << 20
_MOST_MEMORY, _MOST_SUBSTEPS = 1 << 62, 1 << 31  # so that the kernels' arithmetic does not overflow
_NEGATIVE_SLOPE, _ELU_ALPHA = 0.01, 1.0
#: Most dimensions of the state, and of control and time, that a block of samples can have in registers on a GPU.
_TRITON_INPUTS = 1024


def mlp_odeint(
    y0: Tensor,
    t: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    *,
    activation: str,
    method: str,
    substeps: int = 1,
    slope: float | Tensor | None = None,
    control: Tensor | None = None,
    group: Tensor | None = None,
    correction: Sequence[Any] | None = None,
    reinject: Sequence[Tensor] | None = None,
    reverse: bool = False,
    return_residual_norms: bool = False,
    return_energy: bool | str = False,
    max_memory: int | None = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Any:
    """Trajectories of ``dy/dt = MLP([y, z])`` by a fixed-step Runge-Kutta method, in one call forward and one backward.

    The same as a Python loop of ``y = y + h * sum(b_i * k_i)`` with ``k_i = MLP(...)``, that is as
    :func:`pykernels.odeint` of the network with ``step_size``, without a call for each operation of each step.

    Args:
        y0: states at the first time, shape (B, D), float32 or float64 (the reference takes any floating dtype).
        t: times (T,), at least one, strictly increasing or decreasing. Steps are computed in float64, or by the
            reference in the dtype of t, which need not be that of y0.
        weights: of the layers, each (out, in) as in :class:`torch.nn.Linear`, the first with D + C inputs, the last
            with D outputs; or each (P, out, in): then sub-step n of the whole trajectory uses set n mod P, in all its
            stages. A residual network is Euler with steps of size 1 (t = 0, P, 2P, ... and ``substeps=P``).
        biases: of the layers, each (out,) or (P, out), or None for none; or None.
        activation: between the layers: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"``, ``"silu"``,
            ``"elu"`` or ``"sin"``.
        method: ``"euler"``, ``"midpoint"``, ``"heun2"``, ``"heun3"``, ``"rk4"`` (Kutta's 3/8 rule, as torchdiffeq),
            ``"rk4_classic"`` or ``"ssp_rk3"``.
        substeps: equal steps in each interval between two times.
        slope: of leaky_relu below zero (default 0.01); alpha of elu (default 1); the slope s of silu,
            ``z * sigmoid(s * z)`` (default 1), there also a tensor, differentiable: (), (H,) for each of the H hidden
            layers, or (P, H).
        control: inputs z (T-1, B, C), held constant over each interval.
        group: of each sample, int64 (B,), from 0 to G-1; with ``correction``.
        correction: ``(weights, biases)`` or ``(weights, biases, slope)`` of a second network of its own depth for each
            group: weights (G, out, in), biases (G, out) or None, slope for silu (G, H'). The field is the sum of both.
        reinject: ``(mask, states)``, bool (T, B) and (T, B, D): interval i starts from
            ``where(mask[i], states[i], out[i])``, while out[i] stays the prediction (scheduled sampling).
        reverse: integrate backwards: y0 is the state at t[-1], times, control and weight sets are flipped, and the
            results come in the order of integration; reinject is in that order too.
        return_residual_norms: also return (T-1, B), the sum of ``||y_{n+1} - y_n||`` over the sub-steps of each
            interval, with subgradient 0 at 0.
        return_energy: also return (T-1, B), the sum over the sub-steps of ``sum_i b_i ||k_i||^2``; ``"time"``
            multiplies each by ``|h|``.
        max_memory: bytes that the forward may keep for the backward, 512 MiB by default. What exceeds them is computed
            again, in pieces.
        validate: check that times are monotone, groups in range and states finite: True, False, or None to do so on the
            CPU only, where it does not wait for a device. Unchecked groups are clamped.
        backend: a name in :data:`pykernels.backends.BACKENDS`, or None to choose automatically.

    Returns:
        states (T, B, D), the first being y0; with norms or energy a tuple (states, norms, energy) of what is asked for.

    Gradients for y0, t, weights, biases, slopes, control and injected states: exact ones of the discrete steps.
    Derivatives of higher order, forward mode and ``torch.func`` transforms run the reference. Under ``torch.compile``
    first derivatives only.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if an argument has the wrong shape, device or value.
        FloatingPointError: if a state is not finite, with the step and the sample (see ``validate``).
        RuntimeError: if the backend asked for by name cannot run the call.
    """
    return trajectory(
        y0,
        t,
        weights,
        biases,
        activation=activation,
        method=method,
        substeps=substeps,
        slope=slope,
        control=control,
        group=group,
        correction=correction,
        reinject=reinject,
        reverse=reverse,
        return_residual_norms=return_residual_norms,
        return_energy=return_energy,
        max_memory=max_memory,
        validate=validate,
        backend=backend,
    )


def trajectory(
    y0: Tensor,
    t: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    *,
    activation: str,
    method: str,
    substeps: int = 1,
    slope: float | Tensor | None = None,
    time_input: bool = False,
    input_map: str = "none",
    control: Tensor | None = None,
    group: Tensor | None = None,
    correction: Sequence[Any] | None = None,
    reinject: Sequence[Tensor] | None = None,
    reverse: bool = False,
    return_residual_norms: bool = False,
    return_energy: bool | str = False,
    max_memory: int | None = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Any:
    """:func:`mlp_odeint` with what :class:`pykernels.nn.MLPField` adds.

    Args:
        time_input: the last input of the networks is the time of the stage.
        input_map: what is applied to the state where it enters the networks: ``"none"``, ``"square"``, ``"cube"``,
            ``"sin"``, ``"cos"`` or ``"tanh"``.
    """
    _check_state(y0)
    reads_values = _op.reads_values(y0, validate)
    t = _check_times(t, y0, reads_values)
    _check_choice(method, "method", TABLEAUX)
    _check_choice(activation, "activation", ACTIVATIONS)
    _check_choice(input_map, "input_map", INPUT_MAPS)
    if type(substeps) is not int or substeps < 1:
        raise ValueError(f"substeps must be an int of at least 1, got {substeps!r}")
    if substeps > _MOST_SUBSTEPS:
        raise ValueError(f"substeps must be at most {_MOST_SUBSTEPS}, got {substeps}")
    batch, dim = y0.shape
    intervals = t.shape[0] - 1
    if reverse:
        t = t.flip(0)
    inputs = dim + bool(time_input)
    if control is not None:
        _check_like(control, "control", y0)
        if control.dim() != 3 or control.shape[:2] != (intervals, batch):
            raise ValueError(
                f"control must have shape (T-1, B, C), here ({intervals}, {batch}, C), got {tuple(control.shape)}"
            )
        inputs += control.shape[2]
        if reverse:
            control = control.flip(0)
    layers, offsets = _check_layers(weights, biases, "weights", "biases", False, inputs, y0)
    hidden, sets = len(layers) - 1, layers[0].shape[0] if layers[0].dim() == 3 else 1
    number, slopes = _check_slope(slope, activation, sets, hidden, y0)
    if reverse and sets > 1:
        order = [(intervals * substeps - 1 - n) % sets for n in range(sets)]
        layers, offsets = [w[order] for w in layers], [b[order] for b in offsets]
        slopes = None if slopes is None else slopes[order]
    correction_weights: list[Tensor] = []
    correction_biases: list[Tensor] = []
    correction_slopes = None
    if (group is None) != (correction is None):
        raise ValueError("group and correction go together: give both or neither")
    if group is not None and correction is not None:
        if not isinstance(correction, (tuple, list)) or len(correction) not in (2, 3):
            raise TypeError("correction must be a tuple (weights, biases) or (weights, biases, slope)")
        correction_weights, correction_biases = _check_layers(
            correction[0], correction[1], "correction weights", "correction biases", True, inputs, y0
        )
        groups, own = correction_weights[0].shape[0], correction[2] if len(correction) == 3 else None
        if activation == "silu":
            _, correction_slopes = _check_slope(own, activation, groups, len(correction_weights) - 1, y0)
        elif own is not None:
            raise ValueError(f"a slope in correction is for silu only, got one with activation {activation!r}")
        group = _check_group(group, groups, y0, reads_values)
    mask = injected = None
    if reinject is not None:
        mask, injected = _check_reinject(reinject, t.shape[0], y0)
    energies_of = {False: "none", True: "plain", "time": "time"}
    energy = energies_of.get(return_energy) if isinstance(return_energy, (bool, str)) else None
    if energy is None:
        raise ValueError(f"return_energy must be False, True or 'time', got {return_energy!r}")
    if max_memory is None:
        max_memory = DEFAULT_MAX_MEMORY
    elif type(max_memory) is not int or max_memory < 0:
        raise ValueError(f"max_memory must be a number of bytes, at least 0, got {max_memory!r}")
    max_memory = min(max_memory, _MOST_MEMORY)
    tensors = Tensors(
        y0,
        t,
        slopes,
        control,
        correction_slopes,
        injected,
        layers,
        offsets,
        correction_weights,
        correction_biases,
        group,
        mask,
    )
    options = Options(
        substeps,
        method,
        activation,
        number,
        bool(time_input),
        input_map,
        bool(return_residual_norms),
        energy,
        max_memory,
        reads_values,
    )
    states, norms, energies = select(_OPERATOR, backend, tensors, options).run(tensors, options)
    if not return_residual_norms and energy == "none":
        return states
    return (states, *([norms] if return_residual_norms else []), *([energies] if energy != "none" else []))


def _check_state(y0: Tensor) -> None:
    if not isinstance(y0, Tensor):
        raise TypeError(f"y0 must be a tensor, got {type(y0).__name__}")
    if not y0.dtype.is_floating_point:
        raise TypeError(f"y0 must have a floating dtype, got {y0.dtype}")
    if y0.dim() != 2 or y0.shape[1] < 1:
        raise ValueError(f"y0 must have shape (batch, dimensions) with at least one dimension, got {tuple(y0.shape)}")


def _check_times(t: Tensor, y0: Tensor, reads_values: bool) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor, got {type(t).__name__}")
    if not t.dtype.is_floating_point:
        raise TypeError(f"t must have a floating dtype, got {t.dtype}")
    if t.dim() != 1 or t.shape[0] < 1:
        raise ValueError(f"t must have shape (times,) with at least one time, got {tuple(t.shape)}")
    if t.device != y0.device:
        raise ValueError(f"t must be on the device of y0, {y0.device}, got {t.device}")
    if reads_values:
        check_monotone(t.tolist())
    return t if t.dtype in IS_DOUBLE else t.float()


def _check_choice(value: Any, name: str, known: dict[str, Any]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _check_layers(
    weights: Any, biases: Any, name: str, bias_name: str, stacked: bool, inputs: int, y0: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases, zeros where there are none. With ``stacked`` they are (G, out, in) and (G, out)."""
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence) or len(weights) == 0:
        got = "an empty one" if isinstance(weights, Sequence) and len(weights) == 0 else type(weights).__name__
        raise TypeError(f"{name} must be a list of at least one tensor, got {got}")
    if biases is None:
        biases = [None] * len(weights)
    if isinstance(biases, Tensor) or not isinstance(biases, Sequence) or len(biases) != len(weights):
        raise ValueError(f"{bias_name} must be a list of {len(weights)} tensors, as many as {name}, or None")
    last, dim = len(weights) - 1, y0.shape[1]
    dtype, device = y0.dtype, y0.device
    checked: list[Tensor] = []
    sets: Sequence[int] = ()
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if not isinstance(w, Tensor) or w.dtype != dtype or w.device != device:
            _check_like(w, f"{name}[{layer}]", y0)
        shape = w.shape
        if layer == 0:
            sets = shape[:-2]
        if len(shape) not in ((3,) if stacked else (2, 3)) or shape[:-2] != sets or 0 in sets:
            shapes = "(G, out, in)" if stacked else "(out, in), or (P, out, in) with the same P"
            raise ValueError(f"{name} must all have shape {shapes}, got {tuple(shape)} for layer {layer}")
        outputs = shape[-2] if layer < last else dim
        if shape[-1] != inputs or shape[-2] != outputs or outputs < 1:
            raise ValueError(
                f"{name}[{layer}] must map {inputs} inputs to {outputs} outputs, that is have shape "
                f"({outputs}, {inputs}), got {tuple(shape[-2:])}"
            )
        inputs = outputs
        if b is None:
            b = w.new_zeros(shape[:-1])
        elif not isinstance(b, Tensor) or b.dtype != dtype or b.device != device:
            _check_like(b, f"{bias_name}[{layer}]", y0)
        if b.shape != shape[:-1]:
            raise ValueError(f"{bias_name}[{layer}] must have shape {tuple(shape[:-1])}, got {tuple(b.shape)}")
        checked.append(b)
    return list(weights), checked


def _check_slope(
    slope: float | Tensor | None, activation: str, sets: int, hidden: int, y0: Tensor
) -> tuple[float, Tensor | None]:
    """The number for leaky_relu and elu, and the slopes (sets, hidden) of silu."""
    if activation == "silu":
        if slope is None or isinstance(slope, (int, float)):
            return 0.0, y0.new_full((sets, hidden), 1.0 if slope is None else float(slope))
        _check_like(slope, "slope", y0)
        if slope.shape not in ((), (hidden,), (sets, hidden)):
            raise ValueError(
                f"slope must have shape (), ({hidden},) or ({sets}, {hidden}), one for each hidden layer, "
                f"got {tuple(slope.shape)}"
            )
        return 0.0, slope.expand(sets, hidden)
    if activation not in ("leaky_relu", "elu"):
        if slope is not None:
            raise ValueError(f"slope is for leaky_relu, elu and silu, got one with activation {activation!r}")
        return 0.0, None
    if slope is None:
        return (_NEGATIVE_SLOPE if activation == "leaky_relu" else _ELU_ALPHA), None
    if isinstance(slope, bool) or not isinstance(slope, (int, float)):
        raise TypeError(f"slope must be a number with {activation}, got {type(slope).__name__}")
    if not 0 <= slope < math.inf:
        raise ValueError(f"slope must be at least 0 and finite, got {slope}")
    return float(slope), None


def _check_group(group: Tensor, groups: int, y0: Tensor, reads_values: bool) -> Tensor:
    if not isinstance(group, Tensor):
        raise TypeError(f"group must be a tensor, got {type(group).__name__}")
    if group.dtype != torch.int64:
        raise TypeError(f"group must have dtype torch.int64, got {group.dtype}")
    if group.shape != y0.shape[:1]:
        raise ValueError(f"group must have shape ({y0.shape[0]},), one for each sample, got {tuple(group.shape)}")
    if group.device != y0.device:
        raise ValueError(f"group must be on the device of y0, {y0.device}, got {group.device}")
    if reads_values and len(group) > 0:
        low, high = (int(v) for v in torch.aminmax(group))
        if low < 0 or high >= groups:
            raise ValueError(f"group must be between 0 and {groups - 1}, got {low if low < 0 else high}")
        return group
    return group.clamp(0, groups - 1)


def _check_reinject(reinject: Any, times: int, y0: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(reinject, (tuple, list)) or len(reinject) != 2:
        raise TypeError("reinject must be a tuple (mask, states)")
    mask, states = reinject
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"the mask of reinject must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}"
        )
    _check_like(states, "the states of reinject", y0)
    if mask.shape != (times, y0.shape[0]) or states.shape != (times, *y0.shape):
        raise ValueError(
            f"reinject must have shapes ({times}, {y0.shape[0]}) and ({times}, {', '.join(map(str, y0.shape))}), "
            f"got {tuple(mask.shape)} and {tuple(states.shape)}"
        )
    if mask.device != y0.device:
        raise ValueError(f"the mask of reinject must be on the device of y0, {y0.device}, got {mask.device}")
    return mask, states


def _check_like(t: Any, name: str, y0: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype != y0.dtype:
        raise TypeError(f"{name} must have the dtype of y0, {y0.dtype}, got {t.dtype}")
    if t.device != y0.device:
        raise ValueError(f"{name} must be on the device of y0, {y0.device}, got {t.device}")


def _run_cpu(tensors: Tensors, options: Options) -> autograd.Results:
    return autograd.run(tensors, options, "cpu")


def _run_triton(tensors: Tensors, options: Options) -> autograd.Results:
    return autograd.run(tensors, options, "triton")


def _cpu_can_run(tensors: Tensors, options: Options) -> Answer:
    if _native.cpu_error is not None:
        return Answer(False, _native.cpu_error)
    if tensors.y0.device.type != "cpu":
        return Answer(False, f"y0 is on {tensors.y0.device}, not on the CPU")
    if tensors.y0.dtype not in IS_DOUBLE:
        return Answer(False, f"dtype {tensors.y0.dtype} is not supported, only float32 and float64")
    return YES


def _triton_can_run(tensors: Tensors, options: Options) -> Answer:
    if tensors.y0.dtype not in IS_DOUBLE:
        return Answer(False, f"dtype {tensors.y0.dtype} is not supported, only float32 and float64")
    controls = 0 if tensors.control is None else tensors.control.shape[2]
    largest = max(tensors.y0.shape[1], controls + options.time_input)
    if largest > _TRITON_INPUTS:
        return Answer(
            False, f"the state or the control has {largest} dimensions, at most {_TRITON_INPUTS} are supported"
        )
    return _triton.can_run(tensors.y0)


def _check(backend: str) -> Check:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = (random(5, 3), random(17, 5) / 2, random(17), random(3, 17) / 4, random(3), random(4, 5, 2))

    def run(backend: str, *tensors: Tensor) -> Tensor:
        y0, w1, b1, w2, b2, z = tensors
        t = torch.linspace(0, 1, 5, dtype=y0.dtype, device=y0.device)
        states: Tensor = mlp_odeint(
            y0, t, [w1, w2], [b1, b2], activation="tanh", method="rk4", substeps=2, control=z, backend=backend
        )
        return states

    return compare(partial(run, "reference"), partial(run, backend), tensors, backend)


_OPERATOR = register(
    Operator(
        name="mlp_odeint",
        implementations={
            "cpu": Implementation(_run_cpu, _cpu_can_run, _native.available),
            "triton": Implementation(_run_triton, _triton_can_run, _triton.available),
            "reference": Implementation(reference.solve, lambda *args: YES, lambda: YES),
        },
        check=_check,
        path="whole trajectory",
        cost=lambda tensors, options: cost.forward(*tensors, *options),
    )
)
