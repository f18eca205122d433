"""Derivatives of the compiled kernels.

First derivatives outside of transforms go through Functions around the kernels: those of a Gram matrix and of a product
with one are sums of the witness's form, for any weights. What remains runs the reference: function transforms, forward
mode, derivatives of derivatives, and those of the witness's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pykernels.ops._autograd import apply, differentiable_gradients, recording, transforming
from pykernels.ops._op import unobserved
from pykernels.ops.ntk_gram import reference
from pykernels.ops.ntk_gram.activations import Options
from pykernels.ops.ntk_gram.op import gram_op, kernels, matvec_op, scale_gradients, scales_op, witness_op
from pykernels.ops.ntk_gram.reference import Problem

_N_POINTS = len(Problem._fields)
_N_REST = len(Options._fields) + 1  # and the backend
Gradients = list[Tensor | None]


def gram(problem: Problem, options: Options, backend: str) -> Tensor:
    """(K, B, N, M) on a compiled backend, with derivatives."""
    if not torch.compiler.is_compiling() and transforming(*problem):
        return reference.gram(problem, options)
    if recording(*problem):
        result: Tensor = apply(Gram, *problem, *options, backend)
        return result
    return _gram(problem, options, backend)


def matvec(problem: Problem, v: Tensor, options: Options, backend: str) -> Tensor:
    """(B, N, p)."""
    if not torch.compiler.is_compiling() and transforming(*problem, v):
        return reference.matvec(problem, v, options)
    if recording(*problem, v):
        result: Tensor = apply(Matvec, *problem, v, *options, backend)
        return result
    return _matvec(problem, v, options, backend)


def witness(problem: Problem, a: Tensor, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    """(B, N) and (B, N, d), for a (B, M)."""
    # torch.compile does not trace the derivatives of the gradient inside a Function.
    if recording(*problem, a) if torch.compiler.is_compiling() else transforming(*problem, a):
        return reference.witness(problem, a, options)
    if recording(*problem, a):
        result: tuple[Tensor, Tensor] = apply(Witness, *problem, a, *options, backend)
        return result
    values, gradients, _ = _witness(problem, None, a.unsqueeze(-1), None, options, backend, False)
    return values, _of_points(gradients, problem)


def _call(op: torch._ops.OpOverload, run: Callable[[], Any], args: tuple[Any, ...], tensors: Sequence[Any]) -> Any:
    """The kernels themselves where nobody looks, else the raw operator."""
    if torch.compiler.is_compiling():
        return op(*args)
    if unobserved(*(t for t in tensors if t is not None)):
        return run()
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _gram(problem: Problem, options: Options, backend: str) -> Tensor:
    args = (*problem, *options, backend)
    result: Tensor = _call(gram_op, lambda: kernels(backend).gram(problem, options), args, problem[:2])
    return result


def _matvec(problem: Problem, v: Tensor, options: Options, backend: str) -> Tensor:
    args = (*problem, v, *options, backend)
    result: Tensor = _call(matvec_op, lambda: kernels(backend).matvec(problem, v, options), args, (*problem[:2], v))
    return result


def _witness(
    problem: Problem,
    left: Tensor | None,
    right: Tensor | None,
    dense: Tensor | None,
    options: Options,
    backend: str,
    rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    args = (*problem, left, right, dense, *options, backend, rows)
    result: tuple[Tensor, Tensor, Tensor] = _call(
        witness_op,
        lambda: kernels(backend).witness(problem, left, right, dense, options, rows),
        args,
        (*problem[:2], left, right, dense),
    )
    return result


def _of_points(gradients: Tensor, problem: Problem) -> Tensor:
    """From those of the vectors :func:`reference.augment`."""
    d = problem.x.shape[-1]
    scale = problem.weight_std[0] / math.sqrt(max(d, 1))
    # A number on the host stays there: a graph that is being captured takes no copy of it.
    return gradients[..., :d] * (scale if scale.device.type == "cpu" else scale.to(gradients.device))


class _Sums:
    """Gradients of sum_ij W_ij k(x_i, y_j) with respect to a problem's tensors, from its witnesses."""

    def __init__(self, problem: Problem, options: Options, backend: str, needed: Sequence[bool]) -> None:
        self.problem, self.options, self.backend, self.needed = problem, options, backend, list(needed[:_N_POINTS])
        self.scales = any(self.needed[2:])
        self.found: Gradients = [None] * _N_POINTS

    def add(self, left: Tensor | None, right: Tensor | None, dense: Tensor | None, kind: int) -> None:
        """With weights left right^T or dense."""
        x, y, *scales = self.problem
        if y is None:
            if left is not None and right is not None:
                left, right = torch.cat((left, right), -1), torch.cat((right, left), -1)
            both = None if dense is None else dense + dense.mT
            self._side(0, self.problem, left, right, both, kind)
            return
        if self.needed[0] or self.scales:
            self._side(0, self.problem, left, right, dense, kind)
        if self.needed[1] or self.scales:
            self._side(1, Problem(y, x, *scales), right, left, None if dense is None else dense.mT, kind)

    def _side(
        self, which: int, problem: Problem, left: Tensor | None, right: Tensor | None, dense: Tensor | None, kind: int
    ) -> None:
        options = self.options._replace(kind=kind)
        _, gradients, rows = _witness(problem, left, right, dense, options, self.backend, self.scales)
        if self.needed[which]:
            self._accumulate(which, _of_points(gradients, problem))
        if not self.scales:
            return
        args = (problem.x, *problem[2:], gradients, rows, *self.options)
        found = scales_op(*args) if torch.compiler.is_compiling() else scale_gradients(*args)
        for i, gradient in enumerate(found, start=2):
            if self.needed[i]:
                self._accumulate(i, gradient)

    def _accumulate(self, which: int, gradient: Tensor) -> None:
        before = self.found[which]
        self.found[which] = gradient if before is None else before + gradient

    def gradients(self) -> Gradients:
        return [
            torch.zeros_like(t) if g is None and n and t is not None else g
            for g, t, n in zip(self.found, self.problem, self.needed, strict=True)
        ]


def _by_reference(*grads: Tensor | None) -> bool:
    """Whether the gradients have to be differentiable themselves, or follow a transform."""
    present = [g for g in grads if g is not None]
    return not torch.compiler.is_compiling() and (
        torch.is_grad_enabled()
        or transforming(*present)
        or any(torch._C._functorch.is_legacy_batchedtensor(g) for g in present)
    )


def _saved(ctx: Any) -> tuple[Problem, list[Any], Options, str]:
    tensors = ctx.saved_tensors
    return Problem(*tensors[:_N_POINTS]), list(tensors[_N_POINTS:]), Options(*ctx.rest[:-1]), ctx.rest[-1]


class Gram(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _gram(Problem(*args[:_N_POINTS]), Options(*args[_N_POINTS:-1]), args[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:_N_POINTS])
        ctx.rest = inputs[_N_POINTS:]

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> Any:
        problem, _, options, backend = _saved(ctx)
        needed = [bool(n) for n in ctx.needs_input_grad[:_N_POINTS]]
        if _by_reference(grads):
            found = differentiable_gradients(lambda *t: reference.gram(Problem(*t), options), grads, problem, needed)
        else:
            sums = _Sums(problem, options, backend, needed)
            for i, grad in enumerate(grads):
                sums.add(None, None, grad, i if options.kind == 2 else options.kind)
            found = sums.gradients()
        return *found, *((None,) * _N_REST)


class Matvec(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _matvec(Problem(*args[:_N_POINTS]), args[_N_POINTS], Options(*args[_N_POINTS + 1 : -1]), args[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[: _N_POINTS + 1])
        ctx.rest = inputs[_N_POINTS + 1 :]

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> Any:
        problem, (v,), options, backend = _saved(ctx)
        needed = [bool(n) for n in ctx.needs_input_grad[: _N_POINTS + 1]]
        if _by_reference(grads):

            def compute(*t: Any) -> Tensor:
                return reference.matvec(Problem(*t[:_N_POINTS]), t[_N_POINTS], options)

            found = differentiable_gradients(compute, grads, (*problem, v), needed)
        else:
            sums = _Sums(problem, options, backend, needed)
            if any(needed[:_N_POINTS]):
                sums.add(grads, v, None, options.kind)
            found = [*sums.gradients(), _transposed_matvec(problem, grads, options, backend) if needed[-1] else None]
        return *found, *((None,) * _N_REST)


def _transposed_matvec(problem: Problem, grads: Tensor, options: Options, backend: str) -> Tensor:
    swapped = problem if problem.y is None else Problem(problem.y, problem.x, *problem[2:])
    return _matvec(swapped, grads, options, backend)


class Witness(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        problem, a = Problem(*args[:_N_POINTS]), args[_N_POINTS]
        options = Options(*args[_N_POINTS + 1 : -1])
        values, gradients, _ = _witness(problem, None, a.unsqueeze(-1), None, options, args[-1], False)
        return values, _of_points(gradients, problem)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: _N_POINTS + 1])
        ctx.rest = inputs[_N_POINTS + 1 :]

    @staticmethod
    def backward(ctx: Any, of_values: Tensor | None, of_gradients: Tensor | None) -> Any:
        problem, (a,), options, backend = _saved(ctx)
        needed = [bool(n) for n in ctx.needs_input_grad[: _N_POINTS + 1]]
        found: Gradients = [None] * (_N_POINTS + 1)
        if of_gradients is None and of_values is not None and not _by_reference(of_values):
            grads = of_values.unsqueeze(-1)
            sums = _Sums(problem, options, backend, needed)
            if any(needed[:_N_POINTS]):
                sums.add(grads, a.unsqueeze(-1), None, options.kind)
            of_a = _transposed_matvec(problem, grads, options, backend).squeeze(-1) if needed[-1] else None
            found = [*sums.gradients(), of_a]
        elif of_values is not None or of_gradients is not None:
            values = problem.x.new_zeros(problem.x.shape[:-1]) if of_values is None else of_values
            gradients = torch.zeros_like(problem.x) if of_gradients is None else of_gradients

            def compute(*t: Any) -> tuple[Tensor, Tensor]:
                return reference.witness(Problem(*t[:_N_POINTS]), t[_N_POINTS], options)

            found = differentiable_gradients(compute, (values, gradients), (*problem, a), needed)
            if not _by_reference(values, gradients):  # nobody asked for their derivatives
                found = [None if g is None else g.detach() for g in found]
        return *found, *((None,) * _N_REST)
