"""Operators ``pykernels::ntk_*``: schemas, shapes for tracing, and the choice of the kernels that run them.

Private: the functions of :mod:`kernel` check the arguments and add the derivatives. Here points have one batch
dimension, (B, N, d); the scales are float64, (depth + 1,) each; the network is written as
:class:`~pykernels.ops.ntk_gram.activations.Options` has it. A backend's kernels are a module with these functions:

``gram(problem, options) -> Tensor``
    (K, B, N, M): the kernels asked for, NNGP first.
``matvec(problem, v, options) -> Tensor``
    (B, N, p), of one kernel times v (B, M, p).
``witness(problem, left, right, dense, options, rows) -> tuple[Tensor, Tensor, Tensor | None]``
    of the sums s_i = sum_j W_ij k(x_i, y_j), where W = left right^T, (B, N, p) and (B, M, p), no ``left`` being ones
    and p = 1, or W = ``dense`` (B, N, M) of any strides: s (B, N); their gradients (B, N, d + 1) with respect to the
    vectors :func:`reference.augment` of x alone, y's being constant; and, if ``rows``, those with respect to
    :func:`reference.primary` of x at constant vectors, (B, N, P).

No y is x: its Gram matrix is symmetric, and only half of it is computed.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pykernels.ops._op import implement, library
from pykernels.ops.ntk_gram import cost, reference
from pykernels.ops.ntk_gram.activations import N_CONSTANTS, Options
from pykernels.ops.ntk_gram.reference import Problem

_POINTS = "Tensor x, Tensor? y, Tensor weight_std, Tensor bias_std"
_NETWORK = "int[] counts, int[] codes, float[] constants, float[] offsets, int kind, str precision, str backend"
library.define(f"ntk_gram({_POINTS}, {_NETWORK}) -> Tensor")
library.define(f"ntk_matvec({_POINTS}, Tensor v, {_NETWORK}) -> Tensor")
library.define(
    f"ntk_witness({_POINTS}, Tensor? left, Tensor? right, Tensor? dense, {_NETWORK}, bool rows) "
    "-> (Tensor, Tensor, Tensor)"
)

# What the scales take of the results of ntk_witness, which torch.compile would not trace.
library.define(
    "ntk_witness_scales(Tensor x, Tensor weight_std, Tensor bias_std, Tensor gradients, Tensor rows, "
    f"{_NETWORK.removesuffix(', str backend')}) -> (Tensor, Tensor)"
)

gram_op = torch.ops.pykernels.ntk_gram.default
matvec_op = torch.ops.pykernels.ntk_matvec.default
witness_op = torch.ops.pykernels.ntk_witness.default
scales_op = torch.ops.pykernels.ntk_witness_scales.default

_N_POINTS = len(Problem._fields)
_N_OPTIONS = len(Options._fields)
_kernels: dict[str, Any] = {}


def kernels(backend: str) -> Any:
    """The module with the kernels of a backend; imported when it is first used, since it may need another package."""
    module = _kernels.get(backend)
    if module is None:
        module = _kernels[backend] = import_module(f"pykernels.ops.ntk_gram.{backend}")
    return module


def gram_shape(problem: Problem, options: Options) -> tuple[int, ...]:
    x, y = problem.x, problem.x if problem.y is None else problem.y
    return (2 if options.kind == 2 else 1, *x.shape[:2], y.shape[1])


def witness_shapes(problem: Problem, options: Options) -> tuple[tuple[int, ...], ...]:
    batch, n, d = problem.x.shape
    return (batch, n), (batch, n, d + 1), (batch, n, options.row_parameters())


def _gram(*args: Any) -> Tensor:
    problem, options = Problem(*args[:_N_POINTS]), Options(*args[_N_POINTS:-1])
    _check(problem, options)
    result: Tensor = kernels(args[-1]).gram(problem, options)
    return result


def _matvec(*args: Any) -> Tensor:
    problem, v, options = Problem(*args[:_N_POINTS]), args[_N_POINTS], Options(*args[_N_POINTS + 1 : -1])
    _check(problem, options)
    _check_factor(v, problem, 1, v.shape[-1] if v.dim() == 3 else 1)
    _check_one_kind(options)
    result: Tensor = kernels(args[-1]).matvec(problem, v, options)
    return result


def _witness(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem, (left, right, dense) = Problem(*args[:_N_POINTS]), args[_N_POINTS : _N_POINTS + 3]
    options, (backend, rows) = Options(*args[_N_POINTS + 3 : -2]), args[-2:]
    _check(problem, options)
    _check_one_kind(options)
    if (right is None) == (dense is None) or (dense is not None and left is not None):
        raise ValueError("the weights are left and right, or dense; call pykernels.ntk_witness instead")
    if right is not None:
        _check_factor(right, problem, 1, right.shape[-1] if left is not None else 1)
    if left is not None:
        _check_factor(left, problem, 0, right.shape[-1])
    if dense is not None and (dense.shape != gram_shape(problem, options)[1:] or dense.dtype != problem.x.dtype):
        raise ValueError(f"weights of shape {tuple(dense.shape)}; call pykernels.ntk_witness instead")
    values, gradients, found = kernels(backend).witness(problem, left, right, dense, options, rows)
    return values, gradients, values.new_empty(0) if found is None else found


def _check(problem: Problem, options: Options) -> None:
    """Raise unless the arguments fit together: the public function has checked more, but need not have been called."""
    x, y, weight_std, bias_std = problem
    branches = sum(options.counts)
    fits = (
        x.dim() == 3
        and (y is None or (y.dim() == 3 and y.shape[0] == x.shape[0] and y.shape[2] == x.shape[2]))
        and (y is None or (y.dtype == x.dtype and y.device == x.device))
        and weight_std.shape == bias_std.shape == (options.depth + 1,)
        and weight_std.dtype == bias_std.dtype == torch.float64
        and min(options.counts, default=1) >= 1
        and len(options.codes) == branches
        and len(options.constants) == N_CONSTANTS * branches
        and len(options.offsets) == options.depth
        and 0 <= options.kind <= 2
    )
    if not fits:
        raise ValueError(
            f"points of shapes {tuple(x.shape)} and {None if y is None else tuple(y.shape)} and a network of "
            f"{options.counts} branches do not fit together; call pykernels.ntk_gram rather than the raw operator"
        )


def _check_one_kind(options: Options) -> None:
    if options.kind == 2:
        raise ValueError("one kernel at a time; call pykernels.ntk_matvec or pykernels.ntk_witness instead")


def _check_factor(t: Tensor, problem: Problem, side: int, columns: int) -> None:
    points = problem.x if side == 0 or problem.y is None else problem.y
    expected = (*points.shape[:2], columns)
    if t.shape != expected or t.dtype != points.dtype or t.device != points.device:
        raise ValueError(
            f"a tensor of shape {tuple(t.shape)} and dtype {t.dtype} must be {expected} and {points.dtype}; "
            "call pykernels.ntk_matvec rather than the raw operator"
        )


def _gram_fake(*args: Any) -> Tensor:
    problem, options = Problem(*args[:_N_POINTS]), Options(*args[_N_POINTS:-1])
    return problem.x.new_empty(gram_shape(problem, options))


def _matvec_fake(*args: Any) -> Tensor:
    x, v = args[0], args[_N_POINTS]
    fake: Tensor = x.new_empty((*x.shape[:2], v.shape[-1]))
    return fake


def _witness_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem, options = Problem(*args[:_N_POINTS]), Options(*args[_N_POINTS + 3 : -2])
    values, gradients, rows = witness_shapes(problem, options)
    new = problem.x.new_empty
    return new(values), new(gradients), new(rows if args[-1] else 0)


def scale_gradients(
    x: Tensor, weight_std: Tensor, bias_std: Tensor, gradients: Tensor, rows: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of the scales, from those of the points' vectors and of their row parameters: sums over the points."""
    network = Options(*options)
    leaves = weight_std.detach().requires_grad_(), bias_std.detach().requires_grad_()
    with torch.enable_grad():
        augmented = reference.augment(x.detach(), *leaves)
        q = reference.normalized(augmented.detach())[1]
        parameters = reference.primary(reference.rows(q, *leaves, network), network)
        total = (augmented * gradients.double()).sum() + (parameters * rows.double()).sum()
        found = torch.autograd.grad(total, leaves, materialize_grads=True)
    return found[0], found[1]


def _scales(*args: Any) -> tuple[Tensor, Tensor]:
    """In another thread: in an operator, torch's dispatcher keeps autograd from recording in this one."""
    with ThreadPoolExecutor(1) as other:
        return other.submit(scale_gradients, *args).result()


def _scales_fake(x: Tensor, weight_std: Tensor, bias_std: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight_std), torch.empty_like(bias_std)


implement(gram_op, _gram, _gram_fake, devices=("CPU", "CUDA"), cost=cost.gram)
implement(matvec_op, _matvec, _matvec_fake, devices=("CPU", "CUDA"), cost=cost.matvec)
implement(scales_op, _scales, _scales_fake, devices=("CPU", "CUDA"))
implement(witness_op, _witness, _witness_fake, devices=("CPU", "CUDA"), cost=cost.witness)
