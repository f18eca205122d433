"""Operators ``pykernels::flow_penalties*`` and their derivatives.

Private: :func:`pykernels.flow_penalties` checks the arguments. A backend's kernels are a module
``penalties_<backend>`` with these functions of a flow (B, R, *S) and the options of :mod:`penalties_reference`:

``forward(flow, options) -> Tensor``
    the penalties (B,).
``backward(grads, flow, options) -> Tensor``
    their gradient times grads (B,), like the flow and contiguous.

The penalties are quadratic, so their gradient is a linear map of the flow, equal to its own transpose: the derivative
of the gradient is that gradient again, of another flow.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pykernels.backends import Cost
from pykernels.ops._autograd import apply, recording, transforming
from pykernels.ops._memory import size
from pykernels.ops._op import implement, library, unobserved
from pykernels.ops.gaussian_warp import penalties_reference as reference
from pykernels.ops.gaussian_warp.penalties_reference import Options

_OPTIONS = "float divergence, float magnitude, float smoothness, bool xy, str backend"
library.define(f"flow_penalties(Tensor flow, {_OPTIONS}) -> Tensor")
library.define(f"flow_penalties_backward(Tensor grads, Tensor flow, {_OPTIONS}) -> Tensor")

forward_op = torch.ops.pykernels.flow_penalties.default
backward_op = torch.ops.pykernels.flow_penalties_backward.default

_kernels: dict[str, Any] = {}


def kernels(backend: str) -> Any:
    """The module with the kernels of a backend; imported when it is first used, since it may need another package."""
    module = _kernels.get(backend)
    if module is None:
        module = _kernels[backend] = import_module(f"pykernels.ops.gaussian_warp.penalties_{backend}")
    return module


def run(flow: Tensor, options: Options, backend: str) -> Tensor:
    """The operator on a compiled backend, with derivatives."""
    compiling = torch.compiler.is_compiling()
    if not compiling and transforming(flow):
        return reference.penalties(flow, options)
    if recording(flow):
        values: Tensor = apply(FlowPenalties if compiling else EagerFlowPenalties, flow, *options, backend)
        return values
    return _forward(flow, options, backend)


def _forward(flow: Tensor, options: Options, backend: str) -> Tensor:
    values: Tensor
    if torch.compiler.is_compiling():
        values = forward_op(flow, *options, backend)
    elif unobserved(flow):
        values = kernels(backend).forward(flow, options)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            values = forward_op(flow, *options, backend)
    return values


def _gradient(grads: Tensor, flow: Tensor, options: Options, backend: str) -> Tensor:
    """With derivatives."""
    gradient: Tensor
    if transforming(grads, flow) or any(map(torch._C._functorch.is_legacy_batchedtensor, (grads, flow))):
        gradient = reference.gradient(grads, flow, options)
    elif recording(grads, flow):
        gradient = apply(FlowPenaltiesGradient, grads, flow, *options, backend)
    elif unobserved(grads, flow):
        gradient = kernels(backend).backward(grads, flow, options)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            gradient = backward_op(grads, flow, *options, backend)
    return gradient


class FlowPenalties(torch.autograd.Function):
    """For ``torch.compile``."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        values: Tensor = forward_op(*args)
        return values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rest = inputs[1:]
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> Any:
        return backward_op(grads, *ctx.saved_tensors, *ctx.rest), *((None,) * len(ctx.rest))


class EagerFlowPenalties(torch.autograd.Function):
    """The same with the context passed to ``forward``, which costs less per call but cannot be traced."""

    @staticmethod
    def forward(ctx: Any, flow: Tensor, *rest: Any) -> Tensor:
        ctx.rest = rest
        ctx.save_for_backward(flow)
        return _forward(flow, Options(*rest[:-1]), rest[-1])

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> Any:
        (flow,), rest = ctx.saved_tensors, ctx.rest
        options, backend = Options(*rest[:-1]), rest[-1]
        return _gradient(grads, flow, options, backend), *((None,) * len(rest))


class FlowPenaltiesGradient(torch.autograd.Function):
    """``grads[b] A flow[b]`` with A equal to its transpose."""

    @staticmethod
    def forward(ctx: Any, grads: Tensor, flow: Tensor, *rest: Any) -> Tensor:
        ctx.rest = rest
        ctx.save_for_backward(grads, flow)
        return _gradient(grads, flow, Options(*rest[:-1]), rest[-1])

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> Any:
        (grads, flow), rest = ctx.saved_tensors, ctx.rest
        options, backend = Options(*rest[:-1]), rest[-1]
        of_grads = of_flow = None
        if ctx.needs_input_grad[0]:
            gradient = _gradient(torch.ones_like(grads), flow, options, backend)
            of_grads = (direction * gradient).sum(tuple(range(1, flow.dim())))
        if ctx.needs_input_grad[1]:
            of_flow = _gradient(grads, direction, options, backend)
        return of_grads, of_flow, *((None,) * len(rest))


def _check(flow: Tensor, grads: Tensor | None = None) -> None:
    """Raise unless the tensors fit: the public function has checked more, but need not have been called."""
    if not 3 <= flow.dim() <= 5 or flow.shape[1] != flow.dim() - 2 or 0 in flow.shape[2:]:
        raise ValueError(f"a flow of shape {tuple(flow.shape)}; call pykernels.flow_penalties instead")
    if grads is not None and (grads.shape != flow.shape[:1] or grads.dtype != flow.dtype):
        raise ValueError(
            f"gradients of shape {tuple(grads.shape)} and dtype {grads.dtype} must be {tuple(flow.shape[:1])} and "
            f"{flow.dtype}; call pykernels.flow_penalties rather than the raw operator"
        )


def _run_forward(flow: Tensor, *rest: Any) -> Tensor:
    _check(flow)
    values: Tensor = kernels(rest[-1]).forward(flow, Options(*rest[:-1]))
    return values


def _run_backward(grads: Tensor, flow: Tensor, *rest: Any) -> Tensor:
    _check(flow, grads)
    gradient: Tensor = kernels(rest[-1]).backward(grads, flow, Options(*rest[:-1]))
    return gradient


def _forward_fake(flow: Tensor, *rest: Any) -> Tensor:
    return flow.new_empty(flow.shape[:1])


def _backward_fake(grads: Tensor, flow: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(flow, memory_format=torch.contiguous_format)


def cost(flow: Tensor, *rest: Any) -> Cost:
    """A difference, its square and its sum for each component and axis, the squares of the components, and the sum of R
    differences."""
    ranks = flow.dim() - 2
    return Cost(flow.numel() * (3 * ranks + 3), size((flow,)))


def _backward_cost(grads: Tensor, flow: Tensor, *rest: Any) -> Cost:
    """Differences of differences, for the smoothness of each component and axis and for the divergence."""
    ranks = flow.dim() - 2
    return Cost(flow.numel() * (6 * ranks + 2), 2 * size((flow,)))


implement(forward_op, _run_forward, _forward_fake, devices=("CPU", "CUDA"), cost=cost)
implement(backward_op, _run_backward, _backward_fake, devices=("CPU", "CUDA"), cost=_backward_cost)
