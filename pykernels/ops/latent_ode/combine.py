"""Stage combinations of Runge-Kutta methods: ``y + h (c_0 k_0 + c_1 k_1 + ...)``.

The sum over the stages comes first, so that float32 rounds once at the size of the state. A single stage is one
operation of torch. Several stages of large states on the CPU are read once, by the kernels of
``kernels/latent_ode/combine.hpp``, with a derivative that does the same; for small ones a chain of operations costs
less than a call of those, and compilers fuse it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pykernels import _native
from pykernels.ops._autograd import apply, recording, transforming
from pykernels.ops._memory import IS_DOUBLE
from pykernels.ops._op import unobserved

#: ``combine(i, y, stages)``: the combination with the size of step i.
Combine = Callable[[int, Tensor, Sequence[Tensor]], Tensor]

#: Elements from which on the kernels are faster than a chain of operations, and where the call is recorded, which costs
#: 10 us more.
SMALLEST, SMALLEST_RECORDED = 16384, 131072


def combination(coefficients: Sequence[float], sizes: Sequence[float] | Tensor) -> Combine:
    """What combines stages with these coefficients.

    Args:
        coefficients: of the stages, at least one of them not zero.
        sizes: of the steps; numbers, or a tensor (steps,) where they need a gradient or are not known to Python.
    """
    used = [j for j, c in enumerate(coefficients) if c != 0]
    first, lead = used[0], coefficients[used[0]]
    rest = [(j, coefficients[j] / lead) for j in used[1:]]

    def total(stages: Sequence[Tensor]) -> Tensor:
        result = stages[first]
        for j, ratio in rest:
            result = torch.add(result, stages[j], alpha=ratio)
        return result

    if isinstance(sizes, Tensor):
        scales = (sizes * lead).unbind()
        return lambda i, y, stages: torch.addcmul(y, total(stages), scales[i])
    numbers = [h * lead for h in sizes]

    def combine(i: int, y: Tensor, stages: Sequence[Tensor]) -> Tensor:
        if rest and y.numel() >= SMALLEST:
            h = sizes[i]
            result = fused(y, [h * coefficients[j] for j in used], [stages[j] for j in used])
            if result is not None:
                return result
        return torch.add(y, total(stages), alpha=numbers[i])

    return combine


def fused(y: Tensor, factors: list[float], stages: list[Tensor]) -> Tensor | None:
    """``y + sum_j factors[j] * stages[j]`` by the kernels, or None if they cannot, or gain nothing."""
    if _native.cpu is None or not unobserved(y, *stages) or transforming(y, *stages):
        return None
    if y.is_complex():
        if not all(k.dtype == y.dtype and _plain(k, y) and not k.is_conj() for k in (y, *stages)):
            return None
        result = fused(torch.view_as_real(y), factors, [torch.view_as_real(k) for k in stages])
        return None if result is None else torch.view_as_complex(result)
    if y.dtype not in IS_DOUBLE or not all(k.dtype == y.dtype and _plain(k, y) for k in (y, *stages)):
        return None
    if not recording(y, *stages):
        return _forward(y, factors, stages)
    if y.numel() < SMALLEST_RECORDED:
        return None
    recorded: Tensor = apply(_Combine, factors, y, *stages)
    return recorded


def _plain(k: Tensor, y: Tensor) -> bool:
    """Whether the memory of ``k`` is as the kernels read it, element by element of ``y``."""
    return k.is_cpu and k.is_contiguous() and k.shape == y.shape and not k.is_neg()


def _forward(y: Tensor, factors: list[float], stages: Sequence[Tensor]) -> Tensor:
    assert _native.cpu is not None
    out = torch.empty_like(y)
    _native.cpu.ode_combine(
        IS_DOUBLE[y.dtype],
        y.numel(),
        y.data_ptr(),
        [k.data_ptr() for k in stages],
        factors,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factors: list[float], y: Tensor, *stages: Tensor) -> Tensor:
        ctx.factors = factors
        return _forward(y, factors, stages)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or transforming(grad) or not unobserved(grad) or not _plain(grad, grad):
            return None, grad, *(grad * c if n else None for c, n in zip(ctx.factors, needed, strict=True))
        assert _native.cpu is not None
        grads = [torch.empty_like(grad) if n else None for n in needed]
        wanted = [(c, g.data_ptr()) for c, g in zip(ctx.factors, grads, strict=True) if g is not None]
        if wanted:
            _native.cpu.ode_combine_backward(
                IS_DOUBLE[grad.dtype],
                grad.numel(),
                grad.data_ptr(),
                [c for c, _ in wanted],
                [address for _, address in wanted],
                torch.get_num_threads(),
            )
        return None, grad, *grads
