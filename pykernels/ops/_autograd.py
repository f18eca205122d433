"""What the derivatives of all families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, which torch does not annotate."""
    return function.apply(*args)


def transforming(*tensors: Tensor | None) -> bool:
    """Whether a function transform or forward-mode differentiation is at work, which a fused kernel cannot follow."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.autograd.forward_ad._current_level >= 0 and any(
        t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def recording(*tensors: Tensor | None) -> bool:
    """Whether a gradient will be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def differentiable_gradients(
    compute: Callable[..., Tensor | Sequence[Tensor]],
    grads: Tensor | Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``compute(*tensors)`` that can be differentiated again: it is computed and recorded anew.

    Args:
        compute: differentiable twice.
        grads: of its results.
        tensors: its arguments.
        needed: which gradients are wanted; the others are None.
    """
    with torch.enable_grad():
        # Views, because one tensor may stand for several arguments.
        arguments = [t if t is None else t.view_as(t) for t in tensors]
        results = compute(*arguments)
        wanted = [t for t, n in zip(arguments, needed, strict=True) if n and t is not None]
        if not wanted:
            return [None] * len(tensors)
        outputs = [results] if isinstance(results, Tensor) else list(results)
        grad_outputs = [grads] if isinstance(grads, Tensor) else list(grads)
        found = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=True, materialize_grads=True))
    return [next(found) if n else None for n in needed]
