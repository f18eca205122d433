"""Derivatives of the compiled trajectories.

First derivatives outside of transforms go through one Function around the kernels. Function transforms, forward mode and
derivatives of derivatives run :func:`reference.solve`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pykernels.ops._autograd import apply, differentiable_gradients, recording, transforming
from pykernels.ops._op import unobserved
from pykernels.ops.latent_ode import reference
from pykernels.ops.latent_ode.op import (
    N_TENSORS,
    backward_op,
    differentiable,
    forward_op,
    kernels,
    problem,
    saving_op,
)
from pykernels.ops.latent_ode.reference import Options, Tensors

Results = tuple[Tensor, Tensor, Tensor]


def run(tensors: Tensors, options: Options, backend: str) -> Results:
    """The operator on a compiled backend, with derivatives."""
    inputs = differentiable(tensors)
    compiling = torch.compiler.is_compiling()
    if not compiling and transforming(*inputs):
        return reference.solve(tensors, options._replace(validate=False))
    args = (*tensors, *options, backend)
    if recording(*inputs):
        function = MLPOdeint if compiling else EagerMLPOdeint
        counts = tuple(len(group) for group in tensors[6:10])
        results = apply(function, counts, *inputs, tensors.group, tensors.mask, *options, backend)
        return results[0], results[1], results[2]
    if compiling:
        results = forward_op(*args)
        return results[0], results[1], results[2]
    if unobserved(tensors.y0, *tensors.weights):
        results = kernels(backend).forward(tensors, options, False)
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
        flat, states, saved = ctx.saved_tensors[: ctx.n_tensors], *_split(ctx.saved_tensors[ctx.n_tensors :])
        grad_states, grad_norms, grad_energy = grads[:3]
        unused = (None,) * (2 + len(ctx.rest))  # group, mask and options
        needed = [bool(n) for n in ctx.needs_input_grad[1 : ctx.n_tensors - 1]]
        if grad_states is None and grad_norms is None and grad_energy is None:
            return (None, *(None,) * len(needed), *unused)
        args = _regrouped(ctx.counts, (*flat, *ctx.rest))
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transforming(*grads[:3])):
            gradients = _gradients_by_composition((grad_states, grad_norms, grad_energy), args, needed)
        else:
            if grad_states is None:
                grad_states = torch.zeros_like(states)
            found = backward_op(grad_states, grad_norms, grad_energy, states, list(saved), *args, needed)
            gradients = [g if n else None for g, n in zip(found, needed, strict=True)]
        return (None, *gradients, *unused)


class EagerMLPOdeint(torch.autograd.Function):
    """The same with the context passed to ``forward``, which costs less per call but cannot be transformed."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = MLPOdeint.forward(*inputs)
        MLPOdeint.setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return MLPOdeint.backward(ctx, *grads)


def _split(tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    return tensors[0], tensors[1:]


def _gradients_by_composition(
    grads: Sequence[Tensor | None], args: Sequence[Any], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients, themselves differentiable, from the reference, which is run and recorded anew."""
    tensors, options = problem(args[:-1])
    counts = [len(group) for group in tensors[6:10]]
    present = [i for i, g in enumerate(grads) if g is not None]

    def compute(*flat: Any) -> list[Tensor]:
        again = Tensors(*_regrouped(counts, (*flat, tensors.group, tensors.mask))[:N_TENSORS])
        results = reference.solve(again, options._replace(validate=False))
        return [results[i] for i in present]

    given = [g for g in grads if g is not None]
    flat = differentiable(tensors)
    return differentiable_gradients(
        compute, given, flat, [n and t is not None for n, t in zip(needed, flat, strict=True)]
    )
