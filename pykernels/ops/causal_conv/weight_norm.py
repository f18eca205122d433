"""Weight normalisation ``w = g v / ||v||`` of all the weights of a network in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pykernels import _native, _triton
from pykernels.backends import YES, Answer, Check, Implementation, Operator, register, select
from pykernels.ops._autograd import apply, differentiable_gradients, recording, transforming
from pykernels.ops._check import compare
from pykernels.ops._memory import HALF, IS_DOUBLE, address, plain
from pykernels.ops._op import implement, library
from pykernels.ops.causal_conv import conv, cost

library.define("weight_norm(Tensor[] v, Tensor[] g) -> Tensor[]")
# Gradients of every v, then of every g.
library.define("weight_norm_backward(Tensor[] grad_w, Tensor[] v, Tensor[] g) -> Tensor[]")
_forward_op = torch.ops.pykernels.weight_norm.default
_backward_op = torch.ops.pykernels.weight_norm_backward.default


def weight_norm(v: Sequence[Tensor], g: Sequence[Tensor], *, backend: str | None = None) -> list[Tensor]:
    """Normalised weights ``g[i] * v[i] / ||v[i]||``, the norm taken over all but the first dimension.

    Args:
        v: directions, each of shape (O, ...), all of one dtype and device, float32 or float64.
        g: norms, each of as many elements as its direction has rows, such as (O, 1, 1).
        backend: see :func:`pykernels.causal_conv1d`.

    Returns:
        One weight for each direction, of its shape. First-order gradients for all of them.

    Raises:
        ValueError: if the numbers, shapes, dtypes or devices do not fit together.

    Source: Salimans and Kingma, "Weight normalization", NeurIPS 2016.
    """
    v, g = list(v), list(g)
    if len(v) != len(g) or not v:
        raise ValueError(f"v and g must be equally many tensors, at least one, got {len(v)} and {len(g)}")
    for i, (direction, norm) in enumerate(zip(v, g, strict=True)):
        if direction.dim() < 2 or direction.numel() == 0 or norm.numel() != direction.shape[0]:
            raise ValueError(
                f"v[{i}] must have at least one row and g[{i}] one element for each, "
                f"got {tuple(direction.shape)} and {tuple(norm.shape)}"
            )
        if {direction.dtype, norm.dtype} != {v[0].dtype} or {direction.device, norm.device} != {v[0].device}:
            raise ValueError(f"v[{i}] and g[{i}] must have the dtype and device of v[0], {v[0].dtype} on {v[0].device}")
    weights: list[Tensor] = select(_OPERATOR, backend, v, g).run(v, g)
    return weights


def _run_reference(v: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    return [
        direction * (norm.reshape(-1) / direction.flatten(1).norm(dim=1)).reshape(-1, *[1] * (direction.dim() - 1))
        for direction, norm in zip(v, g, strict=True)
    ]


def _run_compiled(v: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    # Compilers fuse it as well as a kernel does.
    if torch.compiler.is_compiling() or v[0].dtype in HALF or transforming(*v, *g):
        return _run_reference(v, g)
    if recording(*v, *g):
        return list(apply(WeightNorm, len(v), *v, *g))
    with torch._C._AutoDispatchBelowAutograd():
        return list(_forward_op(v, g))


def _forward_cpu(v: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    assert _native.cpu is not None
    dtype = v[0].dtype
    v, g = _contiguous(v, dtype), _contiguous(g, dtype)
    w = [torch.empty_like(t) for t in v]
    records = [
        (a.data_ptr(), b.data_ptr(), c.data_ptr(), _rows(a, b), a[0].numel()) for a, b, c in zip(v, g, w, strict=True)
    ]
    _native.cpu.weight_norm_forward(IS_DOUBLE[dtype], records, torch.get_num_threads())
    return w


def _backward_cpu(grad_w: list[Tensor], v: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    assert _native.cpu is not None
    dtype = v[0].dtype
    v, g, grad_w = _contiguous(v, dtype), _contiguous(g, dtype), _contiguous(grad_w, dtype)
    grad_v, grad_g = [torch.empty_like(t) for t in v], [torch.empty_like(t) for t in g]
    records = [
        (
            a.data_ptr(),
            b.data_ptr(),
            address(d, a.shape, dtype, "grad_w"),
            grad_a.data_ptr(),
            grad_b.data_ptr(),
            _rows(a, b),
            a[0].numel(),
        )
        for a, b, d, grad_a, grad_b in zip(v, g, grad_w, grad_v, grad_g, strict=True)
    ]
    _native.cpu.weight_norm_backward(IS_DOUBLE[dtype], records, torch.get_num_threads())
    return grad_v + grad_g


def _contiguous(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What the kernel can read: of one dtype, on the CPU, dense."""
    if any(t.dtype != dtype or not t.is_cpu for t in tensors):
        raise ValueError(f"all tensors must have dtype {dtype} and be on the CPU; call pykernels.ops.weight_norm")
    return [plain(t) if t.is_contiguous() else plain(t).contiguous() for t in tensors]


def _rows(direction: Tensor, norm: Tensor) -> int:
    rows = direction.shape[0]
    if norm.numel() != rows or rows == 0:
        raise ValueError(f"g must have one element per row of v, got {tuple(norm.shape)} for {tuple(direction.shape)}")
    return rows


def _forward_fake(v: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t) for t in v]


def _backward_fake(grad_w: list[Tensor], v: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t) for t in (*v, *g)]


implement(_forward_op, _forward_cpu, _forward_fake, cost=cost.weight_norm)
implement(_backward_op, _backward_cpu, _backward_fake, cost=cost.weight_norm_backward)


class WeightNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Any:
        ctx.count = count
        ctx.save_for_backward(*tensors)
        return tuple(_forward_op(list(tensors[:count]), list(tensors[count:])))

    @staticmethod
    def backward(ctx: Any, *grad_w: Tensor) -> Any:
        count, tensors = ctx.count, ctx.saved_tensors
        if not (torch.is_grad_enabled() or transforming(*grad_w)):
            return None, *_backward_op(list(grad_w), list(tensors[:count]), list(tensors[count:]))

        def compute(*t: Tensor) -> list[Tensor]:
            return _run_reference(list(t[:count]), list(t[count:]))

        return None, *differentiable_gradients(compute, grad_w, tensors, ctx.needs_input_grad[1:])


def _can_run(v: list[Tensor], g: list[Tensor]) -> Answer:
    return conv.cpu_can_run(v[0])


def _check(backend: str) -> Check:
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 5, 3), (1, 4), (7, 1, 1), (1,))
    tensors = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

    def flat(weights: list[Tensor]) -> Tensor:
        return torch.cat([w.flatten() for w in weights])

    return compare(
        lambda *t: flat(_run_reference([*t[:2]], [*t[2:]])),
        lambda *t: flat(weight_norm(t[:2], t[2:], backend=backend)),
        tensors,
        backend,
    )


_OPERATOR = register(
    Operator(
        name="weight_norm",
        implementations={
            "cpu": Implementation(_run_compiled, _can_run, _native.available),
            # A few elementwise operations on small tensors: nothing for a kernel of its own to gain on a GPU.
            "triton": Implementation(_run_reference, lambda v, g: _triton.can_run(v[0]), _triton.available),
            "reference": Implementation(_run_reference, lambda v, g: YES, lambda: YES),
        },
        check=_check,
        path="all weights in one call",
        cost=cost.weight_norm,
    )
)
