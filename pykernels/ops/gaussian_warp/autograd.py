"""Derivatives of the compiled warps.

First derivatives outside of transforms go through one Function around the kernels. Function transforms, forward mode
and derivatives of derivatives run :func:`reference.warp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pykernels.ops._autograd import apply, differentiable_gradients, recording, transforming
from pykernels.ops._op import unobserved
from pykernels.ops.gaussian_warp import reference
from pykernels.ops.gaussian_warp.op import backward_op, forward_op, kernels, problem
from pykernels.ops.gaussian_warp.reference import Options, Tensors

_N_OPTIONS = len(Options._fields) + 1  # and the backend


def run(tensors: Tensors, options: Options, backend: str) -> Tensor:
    """The operator on a compiled backend, with derivatives."""
    compiling = torch.compiler.is_compiling()
    if not compiling and transforming(*tensors):
        return reference.warp(tensors, options)
    if recording(*tensors):
        function = GaussianWarp if compiling else EagerGaussianWarp
        frames: Tensor = apply(function, *tensors, *options, backend)
        return frames
    return _forward(tensors, options, backend, compiling)


def _forward(tensors: Tensors, options: Options, backend: str, compiling: bool) -> Tensor:
    frames: Tensor
    if not compiling and unobserved(tensors.image, tensors.flow):
        frames = kernels(backend).forward(tensors, options)
    elif compiling:
        frames = forward_op(*tensors, *options, backend)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            frames = forward_op(*tensors, *options, backend)
    return frames


class GaussianWarp(torch.autograd.Function):
    """For ``torch.compile``."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        frames: Tensor = forward_op(*args)
        return frames

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rest = inputs[3:]
        ctx.save_for_backward(*inputs[:3], output if inputs[1].shape[1] > 1 else None)

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> Any:
        *tensors, frames = ctx.saved_tensors
        needed = [bool(n) for n in ctx.needs_input_grad[:3]]
        found = backward_op(grads, frames, *tensors, *ctx.rest, needed)
        return *(g if n else None for g, n in zip(found, needed, strict=True)), *((None,) * _N_OPTIONS)


class EagerGaussianWarp(torch.autograd.Function):
    """The same with the context passed to ``forward``, which costs less per call but cannot be traced."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, backend = args
        tensors, options = problem(inputs)
        frames = _forward(tensors, options, backend, False)
        ctx.rest = args[3:]
        ctx.save_for_backward(*tensors, frames if tensors.flow.shape[1] > 1 else None)
        return frames

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> Any:
        *inputs, frames = ctx.saved_tensors
        *options_, backend = ctx.rest
        tensors, options = problem((*inputs, *options_))
        needed = ctx.needs_input_grad[:3]
        unused = (None,) * _N_OPTIONS
        if torch.is_grad_enabled() or transforming(grads) or torch._C._functorch.is_legacy_batchedtensor(grads):
            return *_gradients_by_composition(grads, tensors, options, needed), *unused
        if unobserved(grads, tensors.image, tensors.flow):
            return *kernels(backend).backward(grads, frames, tensors, options, needed), *unused
        found = backward_op(grads, frames, *tensors, *ctx.rest, needed)
        return *(g if n else None for g, n in zip(found, needed, strict=True)), *unused


def _gradients_by_composition(
    grads: Tensor, tensors: Tensors, options: Options, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients, themselves differentiable, from the reference, which is run and recorded anew."""

    def compute(*arguments: Any) -> Tensor:
        return reference.warp(Tensors(*arguments), options)

    wanted = [n and t is not None for n, t in zip(needed, tensors, strict=True)]
    return differentiable_gradients(compute, grads, tensors, wanted)
