"""Derivatives of the compiled trajectories.

First derivatives outside of transforms go through one Function around the kernels. Function transforms, forward mode
and derivatives of derivatives run :func:`reference.solve`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels.ops._autograd import apply, differentiable_gradients, recording, transforming
from pykernels.ops._op import unobserved
from pykernels.ops.latent_ode import reference
from pykernels.ops.latent_ode.op import (
    backward_op,
    differentiable,
    forward_op,
    kernels,
    problem,
    saving_op,
)
from pykernels.ops.latent_ode.reference import Options, Tensors

Results = tuple[Tensor, Tensor | None, Tensor | None]


def run(tensors: Tensors, options: Options, backend: str) -> Results:
    """The operator on a compiled backend, with derivatives."""
    inputs = differentiable(tensors)
    compiling = torch.compiler.is_compiling()
    if not compiling and transforming(*inputs):
        return reference.solve(tensors, options._replace(validate=False))
    if recording(*inputs):
        if compiling:
            counts = tuple(len(group) for group in tensors[6:10])
            results = apply(MLPOdeint, counts, *inputs, tensors.group, tensors.mask, *options, backend)
        else:
            results = apply(EagerMLPOdeint, Problem(tensors, options, backend), *inputs)
        return results[0], results[1], results[2]
    if not compiling and unobserved(tensors.y0, *tensors.weights):
        results = kernels(backend).forward(tensors, options, False)
        return results[0], results[1], results[2]
    args = (*tensors, *options, backend)
    if compiling:
        results = forward_op(*args)
        return results[0], results[1], results[2]
    with torch._C._AutoDispatchBelowAutograd():
        results = forward_op(*args)
    return results[0], results[1], results[2]


def _regrouped(counts: Sequence[int], flat: Sequence[Any]) -> list[Any]:
    """What :func:`differentiable` made flat, and what follows it, as arguments of the operator."""
    grouped: list[Any] = list(flat[:6])
    at = 6
    for count in counts:
        grouped.append(list(flat[at : at + count]))
        at += count
    return grouped + list(flat[at:])


class MLPOdeint(torch.autograd.Function):
    """States, norms and energy, and then what the backward needs. Tensors are flat, since a Function sees no lists."""

    @staticmethod
    def forward(counts: Sequence[int], *flat: Any) -> Any:
        states, norms, energy, saved = saving_op(*_regrouped(counts, flat))
        return (states, norms, energy, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        counts, *flat = inputs
        n_tensors = 6 + sum(counts) + 2
        ctx.counts, ctx.n_tensors, ctx.rest = counts, n_tensors, flat[n_tensors:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(*flat[:n_tensors], output[0], *output[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        flat, (states, *saved) = ctx.saved_tensors[: ctx.n_tensors], ctx.saved_tensors[ctx.n_tensors :]
        grad_states, grad_norms, grad_energy = grads[:3]
        needed = [bool(n) for n in ctx.needs_input_grad[1 : ctx.n_tensors - 1]]
        unused = (None,) * (2 + len(ctx.rest))  # group, mask and options
        if grad_states is None:
            grad_states = torch.zeros_like(states)
        args = _regrouped(ctx.counts, (*flat, *ctx.rest))
        found = backward_op(grad_states, grad_norms, grad_energy, states, list(saved), *args, needed)
        return (None, *(g if n else None for g, n in zip(found, needed, strict=True)), *unused)


class Problem(NamedTuple):
    """A call outside of ``torch.compile``."""

    tensors: Tensors
    options: Options
    backend: str


class EagerMLPOdeint(torch.autograd.Function):
    """The same with the context passed to ``forward``, which costs less per call but cannot be traced.

    The problem is an argument beside its differentiable tensors, which torch has to see.
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, *flat: Tensor | None) -> Any:
        tensors, options, backend = problem
        if unobserved(tensors.y0, *tensors.weights):
            states, norms, energy, saved = kernels(backend).forward(tensors, options, True)
        else:
            states, norms, energy, saved = saving_op(*tensors, *options, backend)
        ctx.set_materialize_grads(False)
        ctx.counts = [len(group) for group in tensors[6:10]]
        ctx.rest = (*options, backend)
        ctx.save_for_backward(*flat, tensors.group, tensors.mask, states, *saved)
        return states, norms, energy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        n = 6 + sum(ctx.counts)
        everything = ctx.saved_tensors
        flat, (group, mask, states, *saved) = everything[:n], everything[n:]
        needed = ctx.needs_input_grad[1:]
        if grads[0] is None and grads[1] is None and grads[2] is None:
            return (None,) * (1 + n)
        *args, backend = _regrouped(ctx.counts, (*flat, group, mask, *ctx.rest))
        tensors, options = problem(args)
        if torch.is_grad_enabled() or transforming(*grads) or _batched(*grads):
            return None, *_gradients_by_composition(grads, tensors, options, needed)
        grad_states = torch.zeros_like(states) if grads[0] is None else grads[0]
        results = (grad_states, grads[1], grads[2], states, saved)
        if unobserved(grad_states, states):
            found = kernels(backend).backward(*results, tensors, options, needed)
        else:
            found = backward_op(*results, *args, backend, needed)
            found = [g if need else None for g, need in zip(found, needed, strict=True)]
        return None, *found


def _batched(*grads: Tensor | None) -> bool:
    """Whether these are several gradients at once, of ``torch.autograd.grad(..., is_grads_batched=True)``."""
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)


def _gradients_by_composition(
    grads: Sequence[Tensor | None], tensors: Tensors, options: Options, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients, themselves differentiable, from the reference, which is run and recorded anew."""
    counts = [len(group) for group in tensors[6:10]]
    present = [i for i, g in enumerate(grads) if g is not None]

    def compute(*flat: Any) -> list[Tensor]:
        again = Tensors(*_regrouped(counts, (*flat, tensors.group, tensors.mask)))
        results = reference.solve(again, options._replace(validate=False))
        return [results[i] for i in present]

    flat = differentiable(tensors)
    wanted = [n and t is not None for n, t in zip(needed, flat, strict=True)]
    return differentiable_gradients(compute, [g for g in grads if g is not None], flat, wanted)
