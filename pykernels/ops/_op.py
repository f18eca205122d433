"""Raw operators of torch: their registration, and when they may be gone around."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pykernels.backends import Cost, is_recording, observed

library = torch.library.Library("pykernels", "FRAGMENT")
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def unobserved(*tensors: Tensor) -> bool:
    """Whether the kernels may be called without torch's dispatcher, which costs 5 us: nothing looks on."""
    return (
        all(type(t) in _PLAIN_TYPES for t in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not is_recording()
        and not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )


def reads_values(t: Tensor, validate: bool | None) -> bool:
    """Whether to check values of an argument: those of ``t``, or of another one where ``t`` is."""
    if validate is not None and not isinstance(validate, bool):
        raise TypeError(f"validate must be True, False or None, got {validate!r}")
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return t.device.type == "cpu" if validate is None else validate


def _refuse_gradients(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """An Autograd kernel that raises where calling ``op`` itself would silently drop the gradient."""

    def requires_grad(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(requires_grad, value))
        return isinstance(value, Tensor) and value.requires_grad

    def guard(*args: Any) -> Any:
        if torch.is_grad_enabled() and requires_grad(args):
            raise RuntimeError(f"{op} has no derivative of its own; call the public function in pykernels.ops")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return guard


def implement(
    op: torch._ops.OpOverload,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    devices: tuple[str, ...] = ("CPU",),
    cost: Callable[..., Cost] | None = None,
) -> None:
    """Register what runs a raw operator on these devices, its shapes for tracing, and the guard of its gradient.

    ``cost`` says what a call amounts to, from the arguments of ``run``.
    """
    name = op._schema.name
    for device in devices:
        library.impl(name, observed(op, run, cost), device)
    library.impl(name, _refuse_gradients(op), "Autograd")
    torch.library.register_fake(name, fake, lib=library)
