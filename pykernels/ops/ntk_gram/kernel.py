"""The public functions: arguments, choice of backend, derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykernels import _native, _triton
from pykernels.backends import YES, Answer, Check, Implementation, Operator, register, select
from pykernels.ops import _op
from pykernels.ops._check import compare
from pykernels.ops.ntk_gram import autograd, cost, reference
from pykernels.ops.ntk_gram.activations import KINDS, PRECISIONS, Activation, Options
from pykernels.ops.ntk_gram.activations import network as options_of
from pykernels.ops.ntk_gram.reference import Problem

Activations = str | Activation | Sequence[str | Activation]
Scales = float | Sequence[float] | npt.NDArray[Any] | Tensor
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Network(NamedTuple):
    """An infinitely wide network, its scales being float64, (depth + 1,); one without an output bias has a 0 there."""

    activations: tuple[Activation, ...]
    weight_std: Tensor
    bias_std: Tensor


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
        x: (..., N, d), of a floating dtype of 16 bits at least.
        y: (..., M, d) with the leading dimensions of x, or None for x itself: then half of the work is done. Computed
            in the wider one of both dtypes, and in float32 at least.
        activation: of each hidden layer: a name, an :class:`~pykernels.Activation`, or a sequence of them, one for each
            layer; none of them is the linear kernel.
        weight_std: a number, or one for each hidden layer and the output layer, (L + 1,).
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
    return gram(x, y, network_of(activation, weight_std, bias_std), kind, precision, backend)


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
        v: (..., M) or (..., M, p), of a floating dtype; rounded to the one that is computed in.
        activation, weight_std, bias_std, precision, backend: as in :func:`ntk_gram`.
        kind: ``"ntk"`` or ``"nngp"``.

    Returns:
        (..., N) or (..., N, p).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ntk_gram`.
    """
    return matvec(x, z, v, network_of(activation, weight_std, bias_std), kind, precision, backend)


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
        a: (..., M), as ``v`` of :func:`ntk_matvec`.
        activation, weight_std, bias_std, precision, backend: as in :func:`ntk_gram`.
        kind: ``"ntk"`` or ``"nngp"``.

    Returns:
        (..., N) and (..., N, d).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ntk_gram`.
    """
    return witness(x, z, a, network_of(activation, weight_std, bias_std), kind, precision, backend)


def ntk_diag(
    x: Tensor,
    *,
    activation: Activations = "relu",
    weight_std: Scales = 1.0,
    bias_std: Scales = 0.0,
    kind: str = "ntk",
    precision: str = "float32",
    backend: str | None = None,
) -> Any:
    """k(x_i, x_i): :meth:`pykernels.NTK.diag`.

    Args:
        x: (..., N, d).
        activation, weight_std, bias_std, kind: as in :func:`ntk_gram`.
        precision, backend: as there, and checked as there; but a diagonal takes no inner products of two points, and is
            computed by PyTorch on every backend.

    Returns:
        (..., N) in the dtype of x; for both kinds ``(nngp, ntk)``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ntk_gram`.
    """
    return diag(x, network_of(activation, weight_std, bias_std), kind, precision, backend)


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
    """In float64, (layers,); a single number is that of all, without ``output`` of all but the last one."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be real numbers, got {value.dtype}")
        scales = value.double()
        if _op.reads_values(scales, None) and not bool((scales >= 0).all() & scales.isfinite().all()):
            raise ValueError(f"{name} must be at least 0 and finite, got {scales.tolist()}")
    else:
        given: Any = value.tolist() if isinstance(value, np.ndarray) else value
        for number in given if isinstance(given, Sequence) else (given,):
            if isinstance(number, bool) or not isinstance(number, Real):
                raise TypeError(f"{name} must be a number, a sequence of numbers or a tensor, got {value!r}")
            if not 0 <= float(number) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {number}")
        scales = torch.tensor(given, dtype=torch.float64)
    if scales.dim() == 0:
        return scales.repeat(layers) if output else torch.cat((scales.repeat(layers - 1), scales.new_zeros(1)))
    if scales.shape != (layers,):
        raise ValueError(
            f"{name} must be one number or {layers}, one for each layer with a {name.removesuffix('_std')}, "
            f"got shape {tuple(scales.shape)}"
        )
    return scales


def network_of(activation: Activations, weight_std: Scales, bias_std: Scales) -> Network:
    activations = activations_of(activation)
    layers = len(activations) + 1
    scales = scales_of(weight_std, "weight_std", layers), scales_of(bias_std, "bias_std", layers, output=False)
    return Network(activations, *scales)


def gram(x: Tensor, y: Tensor | None, network: Network, kind: str, precision: str, backend: str | None) -> Any:
    options = _options(network, kind, precision, both=True)
    problem, lead = _problem(x, y, "y", network)
    kernels = select(_GRAM, backend, problem, options).run(problem, options)
    found = [_restored(k, x, lead) for k in kernels]
    return (found[0], found[1]) if kind == "both" else found[0]


def matvec(x: Tensor, z: Tensor, v: Tensor, network: Network, kind: str, precision: str, backend: str | None) -> Tensor:
    options = _options(network, kind, precision)
    problem, lead = _problem(x, z, "z", network)
    factor = _factor(v, "v", z, problem.x.dtype, matrix=True)
    product = select(_MATVEC, backend, problem, factor, options).run(problem, factor, options)
    return _restored(product.squeeze(-1) if v.dim() < z.dim() else product, x, lead)


def witness(
    x: Tensor, z: Tensor, a: Tensor, network: Network, kind: str, precision: str, backend: str | None
) -> tuple[Tensor, Tensor]:
    options = _options(network, kind, precision)
    problem, lead = _problem(x, z, "z", network)
    factor = _factor(a, "a", z, problem.x.dtype, matrix=False).squeeze(-1)
    values, gradients = select(_WITNESS, backend, problem, factor, options).run(problem, factor, options)
    return _restored(values, x, lead), _restored(gradients, x, lead)


def diag(x: Tensor, network: Network, kind: str, precision: str, backend: str | None) -> Any:
    options = _options(network, kind, precision, both=True)
    problem, lead = _problem(x, None, "y", network)
    if backend is not None:  # one that could not run the Gram matrix raises here too
        select(_GRAM, backend, problem, options)
    found = [_restored(k, x, lead) for k in reference.diagonal(problem, options)]
    return (found[0], found[1]) if kind == "both" else found[0]


def _options(network: Network, kind: str, precision: str, both: bool = False) -> Options:
    kinds = tuple(KINDS) if both else ("nngp", "ntk")
    for value, name, known in ((kind, "kind", kinds), (precision, "precision", PRECISIONS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return options_of(network.activations, kind, precision)


def _problem(x: Tensor, y: Tensor | None, name: str, network: Network) -> tuple[Problem, tuple[int, ...]]:
    """With one batch dimension, and the leading dimensions that there were. ``name`` is that of ``y``."""
    for key, points in (("x", x), (name, y)):
        if points is None and key == "y":
            continue
        if not isinstance(points, Tensor):
            raise TypeError(f"{key} must be a tensor, got {type(points).__name__}")
        _check_numbers(points, key)
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

    return Problem(batched(x), None if y is None else batched(y), network.weight_std, network.bias_std), lead


def _check_numbers(t: Tensor, name: str) -> None:
    if t.dtype not in DTYPES:
        raise TypeError(
            f"{name} must have a floating dtype{' of 16 bits or more' * t.is_floating_point()}, got {t.dtype}"
        )
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {t.layout}")


def _factor(v: Tensor, name: str, z: Tensor, dtype: torch.dtype, matrix: bool) -> Tensor:
    """(B, M, p), where p = 1 for a vector."""
    if not isinstance(v, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(v).__name__}")
    vector = v.shape == z.shape[:-1]
    if not (vector or (matrix and v.shape[:-1] == z.shape[:-1])):
        columns = f" or ({', '.join(map(str, z.shape[:-1]))}, p)" * matrix
        raise ValueError(
            f"{name} must have shape {tuple(z.shape[:-1])}{columns}, a number for each point of z, got {tuple(v.shape)}"
        )
    _check_numbers(v, name)
    if v.device != z.device:
        raise ValueError(f"{name} must be on the device of x, {z.device}, got {v.device}")
    v = v.unsqueeze(-1) if vector else v
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
