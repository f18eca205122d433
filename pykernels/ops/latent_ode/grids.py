"""Times of a fixed-step method: where its steps begin and end, and which outputs fall into which step."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
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
        raise not_monotone(t.tolist())


def not_monotone(times: list[float]) -> ValueError:
    """The error that shows these times, or the ends of many."""
    shown = times if len(times) <= 10 else f"[{', '.join(map(str, times[:5]))}, ..., {times[-1]}]"
    return ValueError(f"t must be strictly increasing or strictly decreasing, got {shown}")


def equal_substeps(t: Tensor, step_size: float | Tensor | None) -> int | None:
    """How many steps of ``step_size`` make up each interval of ``t``; None if no single number is known."""
    if step_size is None:
        return 1
    if len(t) == 1 or isinstance(step_size, Tensor) or not readable(t) or t.requires_grad:
        return None
    intervals = t.diff().abs()
    count = round(intervals[0].item() / step_size)
    rounding = 8 * torch.finfo(t.dtype).eps * t.abs().max()
    return count if count > 0 and ((intervals - count * step_size).abs() <= rounding).all() else None


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


def of_step_size(t: Tensor, step_size: float | Tensor) -> tuple[Tensor, Outputs]:
    """Times ``step_size`` apart, from the first of ``t`` towards the last, which ends a possibly shorter last step.

    Raises:
        ValueError: if ``step_size`` is not positive.
    """
    times = t.detach().cpu()  # all that is ever read of a device
    span = times[-1] - times[0]
    points = (span.abs() / step_size + 1).item()
    if not 1 < points < math.inf:
        raise ValueError(f"step_size must be positive and finite, got {float(step_size)}")
    sign = 1.0 if span > 0 else -1.0

    def grid(t: Tensor) -> Tensor:
        indices = torch.arange(math.ceil(points) - 1, dtype=t.dtype, device=t.device)
        return torch.cat([t[0] + sign * (indices * step_size), t[-1:]])

    ends = grid(t)
    on_host = ends if t.is_cpu else grid(times)
    return ends, locate(ends, t, on_host.tolist(), times.tolist())


def constructed(grid: Tensor, t: Tensor) -> Outputs:
    """Where the times ``t`` lie on the ``grid`` of a user's constructor.

    Raises:
        TypeError, ValueError: if it does not lead from the first to the last of them.
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
    return locate(grid, t, ends, times)


def locate(grid: Tensor, t: Tensor, ends: list[float], times: list[float]) -> Outputs:
    """Where the times ``t`` lie on ``grid``; their values are ``times`` and ``ends``, and run in the same direction.

    Raises:
        ValueError: if ``times`` are not monotone, which has not been looked at where t is on a device.
    """
    sign = 1.0 if times[-1] > times[0] else -1.0
    if not all(sign * (b - a) > 0 for a, b in pairwise(times)):
        raise not_monotone(times)
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
    index = torch.tensor(step_of).to(grid.device, non_blocking=True)
    lengths = grid.diff()[index]
    return Outputs(of_step, (t[1:] - grid[index]) / lengths, lengths)
