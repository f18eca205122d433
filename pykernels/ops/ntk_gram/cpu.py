"""The C++ kernels of ``kernels/ntk_gram``; the functions that op.py asks of a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykernels import _native
from pykernels.ops._memory import plain
from pykernels.ops.ntk_gram.activations import PRECISIONS, Options
from pykernels.ops.ntk_gram.op import gram_shape, witness_shapes
from pykernels.ops.ntk_gram.reference import Problem

_SUFFIX = {torch.float32: "float", torch.float64: "double"}


def _points(x: Tensor) -> Tensor:
    """With contiguous features."""
    x = plain(x)
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _arguments(problem: Problem, options: Options) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The problem for the kernels, and the tensors behind it, to be kept alive."""
    assert _native.cpu is not None
    x = _points(problem.x)
    y = None if problem.y is None else _points(problem.y)
    network = _native.cpu.NtkNetwork(
        options.counts,
        options.codes,
        options.constants,
        options.offsets,
        problem.weight_std.tolist(),
        problem.bias_std.tolist(),
    )
    batch, n, features = x.shape
    m = -1 if y is None else y.shape[1]
    sizes = (batch, n, m, features, options.kind, PRECISIONS.index(options.precision), torch.get_num_threads())
    others = (0, 0, 0) if y is None else (y.data_ptr(), *y.stride()[:2])
    points = (x.data_ptr(), others[0], *x.stride()[:2], *others[1:])
    return (network, sizes, points), (x, y)


def gram(problem: Problem, options: Options) -> Tensor:
    """See op.py."""
    result = problem.x.new_empty(gram_shape(problem, options))
    if result.numel() > 0:
        arguments, _kept = _arguments(problem, options)
        getattr(_native.cpu, f"ntk_gram_{_SUFFIX[result.dtype]}")(*arguments, result.data_ptr())
    return result


def matvec(problem: Problem, v: Tensor, options: Options) -> Tensor:
    """See op.py."""
    product = problem.x.new_empty((*problem.x.shape[:2], v.shape[-1]))
    if product.numel() == 0 or v.shape[1] == 0:
        return product.zero_()
    v = plain(v).contiguous()
    arguments, _kept = _arguments(problem, options)
    run = getattr(_native.cpu, f"ntk_matvec_{_SUFFIX[product.dtype]}")
    run(*arguments, v.data_ptr(), v.shape[-1], product.data_ptr())
    return product


def witness(
    problem: Problem, left: Tensor | None, right: Tensor | None, dense: Tensor | None, options: Options, rows: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See op.py."""
    new = problem.x.new_empty
    shapes = witness_shapes(problem, options)
    values, gradients, found = new(shapes[0]), new(shapes[1]), new(shapes[2]) if rows else None
    columns = 0 if right is None else right.shape[-1]
    others = problem.x if problem.y is None else problem.y
    if values.numel() == 0 or others.shape[1] == 0 or (right is not None and columns == 0):
        return values.zero_(), gradients.zero_(), None if found is None else found.zero_()
    left, right = (None if t is None else plain(t).contiguous() for t in (left, right))
    dense = None if dense is None else plain(dense)
    arguments, _kept = _arguments(problem, options)
    arrays = [0 if t is None else t.data_ptr() for t in (left, right, dense, values, gradients, found)]
    strides = (0, 0, 0) if dense is None else dense.stride()
    getattr(_native.cpu, f"ntk_witness_{_SUFFIX[values.dtype]}")(*arguments, columns, strides, arrays)
    return values, gradients, found
