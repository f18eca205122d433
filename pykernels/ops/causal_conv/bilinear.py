"""The convolution without its epilogue as a bilinear map, differentiable any number of times on the compiled kernels.

With z = conv(x, w), and <a, b> the sum of products, the three maps

    z = conv(x, w),   gx = grad_input(dz, w),   gw = grad_weight(dz, x)

satisfy <dz, conv(x, w)> = <grad_input(dz, w), x> = <grad_weight(dz, x), w>, so that the derivatives of each are the
other two. Under ``vmap``, batched weights become groups of channels and other batches become samples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels.ops.causal_conv.op import backward_op, forward_op


class Geometry(NamedTuple):
    """What the three maps share; ``weight_shape`` is (O, C/groups, K)."""

    cu_seqlens: Tensor | None
    dilation: int
    groups: int
    weight_shape: tuple[int, ...]
    backend: str

    def repeated(self, times: int) -> Geometry:
        """The same for ``times`` problems side by side, as groups of one."""
        shape = (self.weight_shape[0] * times, *self.weight_shape[1:])
        return self._replace(groups=self.groups * times, weight_shape=shape)


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    z: Tensor = _Convolve.apply(x, weight, geometry)  # type: ignore[no-untyped-call]
    return z


def grad_input(dz: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    gx: Tensor = _GradInput.apply(dz, weight, geometry)  # type: ignore[no-untyped-call]
    return gx


def grad_weight(dz: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    gw: Tensor = _GradWeight.apply(dz, x, geometry)  # type: ignore[no-untyped-call]
    return gw


def _front(t: Tensor, dim: int | None, size: int) -> Tensor:
    """``t`` with its batch dimension in front."""
    front: Tensor = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return front


def _side_by_side(t: Tensor) -> Tensor:
    """(V, B, C, T) as (B, V C, T)."""
    return t.transpose(0, 1).flatten(1, 2)


def _apart(t: Tensor, size: int) -> Tensor:
    """(B, V C, T) as (V, B, C, T)."""
    apart: Tensor = t.unflatten(1, (size, -1))
    return apart.transpose(0, 1)


class _Map(torch.autograd.Function):
    """What the three maps have in common: (a, b, geometry) -> c, linear in a and in b."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        a, b, ctx.geometry = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @classmethod
    def _jvp(cls, ctx: Any, a_tangent: Tensor | None, b_tangent: Tensor | None) -> Any:
        a, b = ctx.saved_tensors
        terms = []
        if a_tangent is not None:
            terms.append(cls.apply(a_tangent, b, ctx.geometry))  # type: ignore[no-untyped-call]
        if b_tangent is not None:
            terms.append(cls.apply(a, b_tangent, ctx.geometry))  # type: ignore[no-untyped-call]
        return sum(terms[1:], terms[0]) if terms else None


def _vmap_over_series(
    function: Any, info: Any, in_dims: tuple[Any, ...], t: Tensor, weight: Tensor, g: Geometry
) -> Any:
    """``vmap`` of a map from series and weights to series."""
    t_dim, weight_dim, _ = in_dims
    size = info.batch_size
    if weight_dim is None and g.cu_seqlens is None:
        out = function(_front(t, t_dim, size).flatten(0, 1), weight, g)
        return out.unflatten(0, (size, -1)), 0
    t, weight = _front(t, t_dim, size), _front(weight, weight_dim, size)
    return _apart(function(_side_by_side(t), weight.flatten(0, 1), g.repeated(size)), size), 0


class _Convolve(_Map):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
        z: Tensor = forward_op(
            x, weight, None, None, None, g.cu_seqlens, None, g.dilation, g.groups, "none", 0.0, False, g.backend
        )
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        return (
            grad_input(dz, weight, ctx.geometry) if need_x else None,
            grad_weight(dz, x, ctx.geometry) if need_weight else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Convolve._jvp(ctx, *tangents[:2])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, g: Geometry) -> Any:
        return _vmap_over_series(convolve, info, in_dims, x, weight, g)


def _backward(dz: Tensor, x: Tensor, weight: Tensor, g: Geometry, need_x: bool) -> Tensor:
    gradients = backward_op(
        dz,
        None,
        x,
        weight,
        None,
        g.cu_seqlens,
        None,
        g.dilation,
        g.groups,
        "none",
        0.0,
        g.backend,
        need_x,
        not need_x,
        False,
        False,
    )
    gradient: Tensor = gradients[0 if need_x else 1]
    return gradient


class _GradInput(_Map):
    @staticmethod
    def forward(dz: Tensor, weight: Tensor, g: Geometry) -> Tensor:
        channels = g.weight_shape[1] * g.groups
        x = dz.new_empty(1).expand(dz.shape[0], channels, dz.shape[2])  # only its shape is used
        return _backward(dz, x, weight, g, need_x=True)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        dz, weight = ctx.saved_tensors
        need_dz, need_weight, _ = ctx.needs_input_grad
        return (
            convolve(x, weight, ctx.geometry) if need_dz else None,
            grad_weight(dz, x, ctx.geometry) if need_weight else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _GradInput._jvp(ctx, *tangents[:2])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], dz: Tensor, weight: Tensor, g: Geometry) -> Any:
        return _vmap_over_series(grad_input, info, in_dims, dz, weight, g)


class _GradWeight(_Map):
    @staticmethod
    def forward(dz: Tensor, x: Tensor, g: Geometry) -> Tensor:
        weight = x.new_empty(1).expand(g.weight_shape)  # only its shape is used
        return _backward(dz, x, weight, g, need_x=False)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> Any:
        dz, x = ctx.saved_tensors
        need_dz, need_x, _ = ctx.needs_input_grad
        return (
            convolve(x, weight, ctx.geometry) if need_dz else None,
            grad_input(dz, weight, ctx.geometry) if need_x else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _GradWeight._jvp(ctx, *tangents[:2])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], dz: Tensor, x: Tensor, g: Geometry) -> Any:
        size = info.batch_size
        dz, x = _front(dz, in_dims[0], size), _front(x, in_dims[1], size)
        gw = grad_weight(_side_by_side(dz), _side_by_side(x), g.repeated(size))
        return gw.unflatten(0, (size, -1)), 0
