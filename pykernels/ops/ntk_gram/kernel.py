"""The public functions: arguments, choice of backend, derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pykernels import _native, _triton
from pykernels.backends import YES, Answer, Check, Implementation, Operator, register, select
from pykernels.ops import _op
from pykernels.ops._check import compare
from pykernels.ops.ntk_gram import autograd, cost, reference
from pykernels.ops.ntk_gram.activations import KINDS, PRECISIONS, Activation, Options, network
from pykernels.ops.ntk_gram.reference import Problem

Activations = str | Activation | Sequence[str | Activation]
Scales = float | Sequence[float] | Tensor


def ntk_gram(
    x: Tensor,
    y: Tensor | None = None,
    *,
    activation: Activations = "relu",
    weight_std: Scales = 1.0,
    bias_std: Scales = 0.0,
    kind: str = "ntk",
    precision: str = "float32",
    backend: str | None = None,
) -> Any:
    """The kernel of an infinitely wide network between two sets of points.

    :meth:`pykernels.NTK.gram` as a function; that class explains networks, scales and conventions.

    Args:
        x: (..., N, d), of a floating dtype. Computed in float32 at least.
        y: (..., M, d) with the leading dimensions of x, or None for x itself: then half of the work is done.
        activation: of each hidden layer: a name, an :class:`~pykernels.Activation`, or a sequence of them, one for each
            layer; none of them is the linear kernel.
        weight_std: a number, or one for each layer and the output layer, (L + 1,).
        bias_std: likewise; a number is that of the hidden layers, and the output layer then has no bias.
        kind: ``"ntk"``, ``"nngp"`` or ``"both"``.
        precision: of the inner products of float32 points: ``"float32"``, ``"tf32"`` or ``"bf16"``.
        backend: a name in :data:`pykernels.backends.BACKENDS`, or None to choose automatically.

    Returns:
        (..., N, M) in the dtype of x; for both kinds ``(nngp, ntk)``.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if an argument has the wrong shape, device or value.
        RuntimeError: if the backend asked for by name cannot run the call.
    """
    return gram(x, y, *arranged(activation, weight_std, bias_std), kind, precision, backend)


def ntk_matvec(
    x: Tensor,
    z: Tensor,
    v: Tensor,
    *,
    activation: Activations = "relu",
    weight_std: Scales = 1.0,
    bias_std: Scales = 0.0,
    kind: str = "ntk",
    precision: str = "float32",
    backend: str | None = None,
) -> Tensor:
    """K(x, z) v without the matrix K, in memory of the size of the arguments: :meth:`pykernels.NTK.matvec`.

    Args:
        x: (..., N, d).
        z: (..., M, d).
        v: (..., M) or (..., M, p).
        activation, weight_std, bias_std, precision, backend: as in :func:`ntk_gram`.
        kind: ``"ntk"`` or ``"nngp"``.

    Returns:
        (..., N) or (..., N, p).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ntk_gram`.
    """
    return matvec(x, z, v, *arranged(activation, weight_std, bias_std), kind, precision, backend)


def ntk_witness(
    x: Tensor,
    z: Tensor,
    a: Tensor,
    *,
    activation: Activations = "relu",
    weight_std: Scales = 1.0,
    bias_std: Scales = 0.0,
    kind: str = "ntk",
    precision: str = "float32",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_j a_j k(x_i, z_j) and its gradient with respect to x_i, in one pass: :meth:`pykernels.NTK.witness`.

    Args:
        x: (..., N, d).
        z: (..., M, d), constant in the gradient, even where it is x.
        a: (..., M).
        activation, weight_std, bias_std, precision, backend: as in :func:`ntk_gram`.
        kind: ``"ntk"`` or ``"nngp"``.

    Returns:
        (..., N) and (..., N, d).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ntk_gram`.
    """
    return witness(x, z, a, *arranged(activation, weight_std, bias_std), kind, precision, backend)


def ntk_diag(
    x: Tensor,
    *,
    activation: Activations = "relu",
    weight_std: Scales = 1.0,
    bias_std: Scales = 0.0,
    kind: str = "ntk",
) -> Any:
    """k(x_i, x_i): :meth:`pykernels.NTK.diag`.

    Args:
        x: (..., N, d).
        activation, weight_std, bias_std, kind: as in :func:`ntk_gram`.

    Returns:
        (..., N) in the dtype of x; for both kinds ``(nngp, ntk)``.

    Raises:
        TypeError, ValueError: as :func:`ntk_gram`.
    """
    return diag(x, *arranged(activation, weight_std, bias_std), kind)


def activations_of(activation: Activations, depth: int | None = None) -> tuple[Activation, ...]:
    """One for each of ``depth`` hidden layers, or as many as are given."""
    if isinstance(activation, (str, Activation)):
        one = activation if isinstance(activation, Activation) else Activation(activation)
        return (one,) * (1 if depth is None else depth)
    if not isinstance(activation, Sequence):
        raise TypeError(f"activation must be a name, an Activation or a sequence of them, got {activation!r}")
    if depth is not None and len(activation) != depth:
        raise ValueError(f"activation must be one for each of {depth} hidden layers, got {len(activation)}")
    return tuple(a if isinstance(a, Activation) else Activation(a) for a in activation)


def scales_of(value: Scales, name: str, layers: int, output: bool = True) -> Tensor:
    """In float64, (layers,); a number is that of all, or of all but the last one."""
    if isinstance(value, Tensor):
        scales = value.double()
    else:
        numbers = list(value) if isinstance(value, Sequence) else [value] * layers
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{name} must be a number, a sequence of numbers or a tensor, got {value!r}")
            if not 0 <= number < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {number}")
        if not isinstance(value, Sequence) and not output:
            numbers[-1] = 0.0
        scales = torch.tensor(numbers, dtype=torch.float64)
    if scales.shape != (layers,):
        raise ValueError(
            f"{name} must be one number or {layers}, for the hidden layers and the output layer, "
            f"got shape {tuple(scales.shape)}"
        )
    if (
        isinstance(value, Tensor)
        and _op.reads_values(scales, None)
        and not bool((scales >= 0).all() & scales.isfinite().all())
    ):
        raise ValueError(f"{name} must be at least 0 and finite, got {scales.tolist()}")
    return scales


def arranged(
    activation: Activations, weight_std: Scales, bias_std: Scales
) -> tuple[tuple[Activation, ...], Tensor, Tensor]:
    activations = activations_of(activation)
    layers = len(activations) + 1
    return activations, scales_of(weight_std, "weight_std", layers), scales_of(bias_std, "bias_std", layers, False)


def gram(
    x: Tensor,
    y: Tensor | None,
    activations: tuple[Activation, ...],
    weight_std: Tensor,
    bias_std: Tensor,
    kind: str,
    precision: str,
    backend: str | None,
) -> Any:
    options = _options(activations, kind, precision, both=True)
    problem, lead = _problem(x, y, "y", weight_std, bias_std)
    kernels = select(_GRAM, backend, problem, options).run(problem, options)
    found = [_restored(k, x, lead) for k in kernels]
    return (found[0], found[1]) if kind == "both" else found[0]


def matvec(
    x: Tensor,
    z: Tensor,
    v: Tensor,
    activations: tuple[Activation, ...],
    weight_std: Tensor,
    bias_std: Tensor,
    kind: str,
    precision: str,
    backend: str | None,
) -> Tensor:
    options = _options(activations, kind, precision)
    problem, lead = _problem(x, z, "z", weight_std, bias_std)
    if not isinstance(v, Tensor):
        raise TypeError(f"v must be a tensor, got {type(v).__name__}")
    column = v.dim() == z.dim() - 1
    factor = _factor(v.unsqueeze(-1) if column and v.dim() > 0 else v, "v", z, problem.x.dtype, None)
    product = select(_MATVEC, backend, problem, factor, options).run(problem, factor, options)
    return _restored(product.squeeze(-1) if column else product, x, lead)


def witness(
    x: Tensor,
    z: Tensor,
    a: Tensor,
    activations: tuple[Activation, ...],
    weight_std: Tensor,
    bias_std: Tensor,
    kind: str,
    precision: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    options = _options(activations, kind, precision)
    problem, lead = _problem(x, z, "z", weight_std, bias_std)
    if not isinstance(a, Tensor):
        raise TypeError(f"a must be a tensor, got {type(a).__name__}")
    if a.dim() != z.dim() - 1:
        raise ValueError(f"a must have shape {tuple(z.shape[:-1])}, a number for each point of z, got {tuple(a.shape)}")
    factor = _factor(a.unsqueeze(-1), "a", z, problem.x.dtype, 1).squeeze(-1)
    values, gradients = select(_WITNESS, backend, problem, factor, options).run(problem, factor, options)
    return _restored(values, x, lead), _restored(gradients, x, lead)


def diag(x: Tensor, activations: tuple[Activation, ...], weight_std: Tensor, bias_std: Tensor, kind: str) -> Any:
    options = _options(activations, kind, "float32", both=True)
    problem, lead = _problem(x, None, "y", weight_std, bias_std)
    found = [_restored(k, x, lead) for k in reference.diagonal(problem, options)]
    return (found[0], found[1]) if kind == "both" else found[0]


def _options(activations: tuple[Activation, ...], kind: str, precision: str, both: bool = False) -> Options:
    kinds = tuple(KINDS) if both else ("nngp", "ntk")
    for value, name, known in ((kind, "kind", kinds), (precision, "precision", PRECISIONS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return network(activations, kind, precision)


def _problem(
    x: Tensor, y: Tensor | None, name: str, weight_std: Tensor, bias_std: Tensor
) -> tuple[Problem, tuple[int, ...]]:
    """With one batch dimension, and the leading dimensions that there were."""
    for key, points in (("x", x), (name, y)):
        if points is None and key == "y":
            continue
        if not isinstance(points, Tensor):
            raise TypeError(f"{key} must be a tensor, got {type(points).__name__}")
        if not points.dtype.is_floating_point:
            raise TypeError(f"{key} must have a floating dtype, got {points.dtype}")
        if points.dim() < 2:
            raise ValueError(f"{key} must have shape (..., points, d), got {tuple(points.shape)}")
    lead = tuple(x.shape[:-2])
    dtype = torch.promote_types(x.dtype, torch.float32)
    if y is not None:
        dtype = torch.promote_types(dtype, y.dtype)
        if tuple(y.shape[:-2]) != lead or y.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"{name} must have the leading dimensions and the d of x, {tuple(x.shape)}, got {tuple(y.shape)}"
            )
        if y.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {y.device}")

    def batched(points: Tensor) -> Tensor:
        points = points if points.dtype == dtype else points.to(dtype)
        return points.unsqueeze(0) if not lead else points if len(lead) == 1 else points.flatten(0, -3)

    return Problem(batched(x), None if y is None else batched(y), weight_std, bias_std), lead


def _factor(v: Tensor, name: str, z: Tensor, dtype: torch.dtype, columns: int | None) -> Tensor:
    """(B, M, p)."""
    wanted = f"{tuple(z.shape[:-1])}" + (" or with another dimension" if columns is None else "")
    if v.dim() != z.dim() or v.shape[:-1] != z.shape[:-1]:
        shape = tuple(v.shape[:-1] if columns == 1 else v.shape)
        raise ValueError(f"{name} must have shape {wanted}, a number for each point of z, got {shape}")
    if not v.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating dtype, got {v.dtype}")
    if v.device != z.device:
        raise ValueError(f"{name} must be on the device of x, {z.device}, got {v.device}")
    v = v if v.dtype == dtype else v.to(dtype)
    return v.unsqueeze(0) if v.dim() == 2 else v if v.dim() == 3 else v.flatten(0, -3)


def _restored(t: Tensor, x: Tensor, lead: tuple[int, ...]) -> Tensor:
    t = t.squeeze(0) if not lead else t if len(lead) == 1 else t.unflatten(0, lead)
    return t if t.dtype == x.dtype else t.to(x.dtype)


def _cpu_can_run(problem: Problem, *rest: Any) -> Answer:
    if _native.cpu_error is not None:
        return Answer(False, _native.cpu_error)
    if problem.x.device.type != "cpu":
        return Answer(False, f"x is on {problem.x.device}, not on the CPU")
    return YES


def _triton_can_run(problem: Problem, *rest: Any) -> Answer:
    return _triton.can_run(problem.x)


def _implementations(compiled: Callable[..., Any], plain: Callable[..., Any]) -> dict[str, Implementation]:
    def on(backend: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            return compiled(*args, backend)

        return run

    return {
        "cpu": Implementation(on("cpu"), _cpu_can_run, _native.available),
        "triton": Implementation(on("triton"), _triton_can_run, _triton.available),
        "reference": Implementation(plain, lambda *args: YES, lambda: YES),
    }


def _check(function: Callable[..., Any]) -> Callable[[str], Check]:
    def check(backend: str) -> Check:
        generator = torch.Generator().manual_seed(0)
        shapes = ((5, 3), (7, 3), (7,))
        tensors = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

        def run(backend: str, *tensors: Tensor) -> Tensor:
            result: Tensor = function(
                *tensors, activation=("relu", "erf"), weight_std=1.2, bias_std=0.5, backend=backend
            )
            return result

        return compare(partial(run, "reference"), partial(run, backend), tensors, backend)

    return check


def _gram_times(x: Tensor, z: Tensor, v: Tensor, **options: Any) -> Tensor:
    gram: Tensor = ntk_gram(x, z, **options)
    return gram * v


def _witness_values(x: Tensor, z: Tensor, a: Tensor, **options: Any) -> Tensor:
    value, gradient = ntk_witness(x, z, a, **options)
    return torch.cat((value.unsqueeze(-1), gradient), -1)


_GRAM = register(
    Operator(
        name="ntk_gram",
        implementations=_implementations(autograd.gram, reference.gram),
        check=_check(_gram_times),
        path="recursion in registers",
        cost=lambda problem, options: cost.gram(*problem, *options),
    )
)
_MATVEC = register(
    Operator(
        name="ntk_matvec",
        implementations=_implementations(autograd.matvec, reference.matvec),
        check=_check(ntk_matvec),
        path="recursion in registers, without the matrix",
        cost=lambda problem, v, options: cost.matvec(*problem, v, *options),
    )
)
_WITNESS = register(
    Operator(
        name="ntk_witness",
        implementations=_implementations(autograd.witness, reference.witness),
        check=_check(_witness_values),
        path="value and gradient in one pass",
        cost=lambda problem, a, options: cost.witness(*problem, None, a, None, *options),
    )
)
