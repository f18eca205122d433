"""Trajectories of an MLP vector field in plain PyTorch: the definition.

The field of a sample with state y at time t is

    a = [map(y), z, t],   f = W_L act(... act(W_1 a + b_1) ...) + b_L,   f += the same with the correction of its group

where z is the control of the interval and t is there with ``time_input`` only. See README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pykernels.ops.latent_ode.tableaux import TABLEAUX


class Options(NamedTuple):
    """What is not a tensor.

    Args:
        substeps: steps of the method in each interval between requested times.
        method: a key of :data:`TABLEAUX`.
        activation: between the layers, a key of :data:`ACTIVATIONS`.
        slope: of leaky_relu below zero, alpha of elu.
        time_input: whether the last input of the networks is the time.
        input_map: a key of :data:`INPUT_MAPS`, applied to the state where it enters the networks.
        norms: whether to sum ``||y_{n+1} - y_n||`` over the sub-steps of each interval.
        energy: ``"none"``, or the sum over sub-steps of ``sum_i b_i ||k_i||^2``: ``"plain"``, or each times |h|:
            ``"time"``.
        max_memory: bytes that the forward may keep for the backward; what exceeds them is computed again.
        validate: raise FloatingPointError when a state is not finite.
    """

    substeps: int
    method: str
    activation: str
    slope: float
    time_input: bool
    input_map: str
    norms: bool
    energy: str
    max_memory: int
    validate: bool


class Tensors(NamedTuple):
    """The tensors of a problem, with T requested times, B samples, D state dimensions.

    Args:
        y0: states at t[0], (B, D).
        t: times (T,), monotone, float32 or float64 whatever the dtype of y0.
        slopes: of silu, z sigmoid(slope z), one for each set and hidden layer (P, H); else None.
        control: held over each interval (T-1, B, C), or None.
        correction_slopes: like slopes, (G, H'), or None.
        injected: states (T, B, D) that replace the marked ones, or None.
        weights: of each layer (P, out, in), where sub-step n uses set n mod P; or all (out, in).
        biases: (P, out), or (out,).
        correction_weights, correction_biases: of G groups, (G, out, in) and (G, out); empty without corrections.
        group: of each sample, int64 (B,), or None.
        mask: which states are replaced, bool (T, B), or None. The last row has no effect.
    """

    y0: Tensor
    t: Tensor
    slopes: Tensor | None
    control: Tensor | None
    correction_slopes: Tensor | None
    injected: Tensor | None
    weights: list[Tensor]
    biases: list[Tensor]
    correction_weights: list[Tensor]
    correction_biases: list[Tensor]
    group: Tensor | None
    mask: Tensor | None


def stacked(tensors: Tensors) -> Tensors:
    """The same with weights (P, out, in) and biases (P, out), views where they were (out, in)."""
    if tensors.weights[0].dim() == 3:
        return tensors
    weights, biases = [w.unsqueeze(0) for w in tensors.weights], [b.unsqueeze(0) for b in tensors.biases]
    return tensors._replace(weights=weights, biases=biases)


#: Activations by name and their codes in kernels/latent_ode/activation.hpp.
ACTIVATIONS = {"relu": 0, "leaky_relu": 1, "tanh": 2, "softplus": 3, "silu": 4, "elu": 5, "sin": 6}

#: Pointwise maps of the state, by name and their codes there.
INPUT_MAPS = {"none": 0, "square": 1, "cube": 2, "sin": 3, "cos": 4, "tanh": 5}


def activate(z: Tensor, activation: str, slope: float, beta: Tensor | None) -> Tensor:
    """act(z); ``beta`` is the slope of silu, which broadcasts to z."""
    match activation:
        case "relu":
            return F.relu(z)
        case "leaky_relu":
            return F.leaky_relu(z, slope)
        case "tanh":
            return z.tanh()
        case "softplus":
            return torch.logaddexp(z, z.new_zeros(()))  # without F.softplus's jump of 2e-9 at 20
        case "silu":
            return z * torch.sigmoid(z if beta is None else beta * z)
        case "elu":
            return F.elu(z, slope)
        case "sin":
            return z.sin()
    raise ValueError(f"unknown activation {activation!r}")


def map_input(y: Tensor, input_map: str) -> Tensor:
    match input_map:
        case "none":
            return y
        case "square":
            return y * y
        case "cube":
            return y * y * y
        case "sin":
            return y.sin()
        case "cos":
            return y.cos()
        case "tanh":
            return y.tanh()
    raise ValueError(f"unknown input map {input_map!r}")


def _network(
    a: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], slopes: Tensor | None, options: Options
) -> Tensor:
    """Weights (out, in), or (B, out, in) for a network of each sample."""
    last = len(weights) - 1
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        a = F.linear(a, w, b) if w.dim() == 2 else torch.einsum("boi,bi->bo", w, a) + b
        if layer < last:
            beta = None if slopes is None else slopes[..., layer : layer + 1]
            a = activate(a, options.activation, options.slope, beta)
    return a


def field(tensors: Tensors, options: Options, interval: int, step: int) -> Callable[[Tensor, Tensor], Tensor]:
    """``f(t, y)`` in sub-step ``step``, which lies in this interval; weights (P, out, in)."""
    which = step % tensors.weights[0].shape[0]
    weights, biases = [w[which] for w in tensors.weights], [b[which] for b in tensors.biases]
    slopes = None if tensors.slopes is None else tensors.slopes[which]
    group = tensors.group
    if group is not None:
        group_weights = [w[group] for w in tensors.correction_weights]
        group_biases = [b[group] for b in tensors.correction_biases]
        group_slopes = None if tensors.correction_slopes is None else tensors.correction_slopes[group]

    def f(t: Tensor, y: Tensor) -> Tensor:
        parts = [map_input(y, options.input_map)]
        if tensors.control is not None:
            parts.append(tensors.control[interval])
        if options.time_input:
            parts.append(t.to(y.dtype).expand(y.shape[0], 1))
        a = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        k = _network(a, weights, biases, slopes, options)
        if group is not None:
            k = k + _network(a, group_weights, group_biases, group_slopes, options)
        return k

    return f


def solve(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """States (T, B, D), norms (T-1, B) and energy (T-1, B); the last two are empty (0,) if not asked for.

    Raises:
        FloatingPointError: if a state is not finite and ``options.validate``.
    """
    tensors = stacked(tensors)
    y, t = tensors.y0, tensors.t
    tableau = TABLEAUX[options.method]
    states, norms, energies = [y], [], []
    zero = y.new_zeros(y.shape[:1])
    for i in range(len(t) - 1):
        if tensors.mask is not None and tensors.injected is not None:
            y = torch.where(tensors.mask[i].unsqueeze(1), tensors.injected[i], y)
        h = (t[i + 1] - t[i]) / options.substeps
        norm, energy = zero, zero
        for j in range(options.substeps):
            start = t[i] + j * h
            f = field(tensors, options, i, i * options.substeps + j)
            stages: list[Tensor] = []
            for c, row in zip(tableau.c, tableau.a, strict=True):
                inner = _combine(row, stages)
                stages.append(f(start + c * h, y if inner is None else y + h * inner))
            increment = _combine(tableau.b, stages)
            assert increment is not None
            change = h * increment
            if options.norms:
                norm = norm + _length(change)
            if options.energy != "none":
                squares = [b * k.square().sum(1) for b, k in zip(tableau.b, stages, strict=True) if b != 0]
                step_energy = torch.stack(squares).sum(0)
                energy = energy + (h.abs() * step_energy if options.energy == "time" else step_energy)
            y = y + change
        states.append(y)
        norms.append(norm)
        energies.append(energy)
    result = torch.stack(states)
    if options.validate:
        check_finite(result)
    nothing = y.new_empty(0)
    return (
        result,
        _stack(norms, zero) if options.norms else nothing,
        _stack(energies, zero) if options.energy != "none" else nothing,
    )


def _combine(coefficients: Sequence[float], stages: Sequence[Tensor]) -> Tensor | None:
    """The sum of the stages with these coefficients; None if there is nothing to add."""
    total: Tensor | None = None
    for c, k in zip(coefficients, stages, strict=True):
        if c != 0:
            total = c * k if total is None else total + c * k
    return total


def _stack(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows) if rows else like.new_empty((0, *like.shape))


def _length(v: Tensor) -> Tensor:
    """The Euclidean norm of each row, with gradient 0 at 0."""
    length: Tensor = torch.linalg.vector_norm(v, dim=1)
    return length


def check_finite(states: Tensor) -> None:
    """Raise if a state (T, B, D) is not finite, naming the first.

    Raises:
        FloatingPointError: with the interval and the sample.
    """
    bad = ~torch.isfinite(states).all(2)
    if bool(bad.any()):
        interval, sample = (int(v) for v in bad.nonzero()[0])
        raise FloatingPointError(diverged(f"at t[{interval}]", sample))


def diverged(where: str, sample: int) -> str:
    """The message about a state that is not finite."""
    return (
        f"the state of sample {sample} is not finite {where}: take smaller steps or look for NaN in the inputs; "
        "validate=False returns it as it is"
    )
