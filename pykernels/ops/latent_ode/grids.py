"""Times of a fixed-step method: where its steps begin and end, and which outputs fall into which step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

GridConstructor = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]


def readable(t: Tensor) -> bool:
    """Whether Python may look at the values of ``t``: neither a device, a compiler nor a transform would notice."""
    if torch.compiler.is_compiling():
        return False
    return (
        t.is_cpu
        and type(t) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def check_times(t: Tensor) -> None:
    """Raises ValueError if ``t`` is not strictly increasing or decreasing, as far as its values are readable."""
    if not readable(t):
        return
    steps = t.detach().diff()
    if not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError(f"t must be strictly increasing or strictly decreasing, got {t.detach().tolist()}")


def of_step_size(t: Tensor, step_size: float | Tensor) -> Tensor:
    """Times ``step_size`` apart, from the first of ``t`` towards the last, which ends a possibly shorter last step.

    Raises:
        ValueError: if ``step_size`` is not positive.
    """
    span = (t[-1] - t[0]).detach()
    points = (span.abs() / step_size + 1).item()
    if not 1 < points < math.inf:
        raise ValueError(f"step_size must be positive and finite, got {float(step_size)}")
    count = math.ceil(points)
    indices = torch.arange(count - 1, dtype=t.dtype, device=t.device)
    return torch.cat([t[0] + torch.sign(span) * (indices * step_size), t[-1:]])


class Outputs(NamedTuple):
    """Where the requested times lie among the steps.

    Args:
        of_step: for each step, the outputs that lie in it, each with whether it is the step's very end.
        positions: for each output from the second on, its place in its step, from 0 to 1; (T - 1,).
        lengths: the lengths of these steps; (T - 1,).
    """

    of_step: list[list[tuple[int, bool]]]
    positions: Tensor
    lengths: Tensor


def locate(grid: Tensor, t: Tensor) -> Outputs:
    """Where the times ``t`` lie on ``grid``; both run in the same direction, from and to the same times.

    Raises:
        TypeError, ValueError: if they do not.
    """
    if not isinstance(grid, Tensor) or grid.dim() != 1:
        raise TypeError(f"the grid_constructor must return a tensor of times (N,), got {grid}")
    both = torch.cat([grid.detach(), t.detach()]).tolist()  # one look at a device
    ends, times = both[: len(grid)], both[len(grid) :]
    if len(ends) < 2 or ends[0] != times[0] or ends[-1] != times[-1]:
        raise ValueError(
            f"the grid_constructor must return times from t[0] to t[-1], which are {times[0]} and {times[-1]}, "
            f"got {ends[:1] + ends[-1:]}"
        )
    sign = 1.0 if times[-1] > times[0] else -1.0
    of_step: list[list[tuple[int, bool]]] = []
    step_of: list[int] = []
    j = 1
    for i, end in enumerate(ends[1:]):
        inside = []
        while j < len(times) and sign * end >= sign * times[j]:
            inside.append((j, end == times[j]))
            step_of.append(i)
            j += 1
        of_step.append(inside)
    index = torch.tensor(step_of, device=grid.device)
    lengths = grid.diff()[index]
    return Outputs(of_step, (t[1:] - grid[index]) / lengths, lengths)
