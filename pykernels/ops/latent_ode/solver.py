"""Fixed-step integration of any vector field: the steps of an explicit Runge-Kutta method."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pykernels.ops._autograd import transforming
from pykernels.ops.latent_ode import grids
from pykernels.ops.latent_ode.combine import combination
from pykernels.ops.latent_ode.tableaux import Tableau

Field = Callable[[Tensor, Tensor], Tensor]
#: Called before each step with the time, the state and the length of the step.
Callback = Callable[[Tensor, Tensor, Tensor], object]


class Options(NamedTuple):
    """Options of fixed-step methods, see :func:`pykernels.odeint`."""

    step_size: float | Tensor | None = None
    grid_constructor: grids.GridConstructor | None = None
    interp: str = "linear"
    perturb: bool = False
    checkpoint_every: int | None = None


def solve(
    field: Field, y0: Tensor, t: Tensor, tableau: Tableau, options: Options, callback: Callback | None = None
) -> Tensor:
    """The states (T, \\*y0.shape) at the times ``t`` (T,), at least one.

    ``field(t, y)`` returns a tensor of the shape of y.
    """
    if len(t) == 1:
        return y0[None]
    if options.step_size is not None:
        grid = grids.of_step_size(t, options.step_size)
    elif options.grid_constructor is not None:
        grid = options.grid_constructor(field, y0, t)
    else:
        grid = t
    outputs = None if grid is t else grids.locate(grid, t)
    numbers = grids.readable(grid) and grids.readable(t) and not (grid.requires_grad or t.requires_grad)
    numbers = numbers and not transforming(grid, t)
    clock = y0.real.dtype if y0.is_complex() else y0.dtype

    def weights(values: Tensor) -> list[float] | Tensor:
        return values.tolist() if numbers else values.to(y0.device, clock)

    starts, ends, steps = grid[:-1], grid[1:], grid.diff()
    sizes = weights(steps)
    update = combination(tableau.b, sizes)
    stages = []
    for c, row in zip(tableau.c, tableau.a, strict=True):
        times = starts if c == 0 else ends if c == 1 else starts + steps * c
        times = times.to(y0.device, clock)
        if options.perturb and c in (0, 1):
            towards = ends if c == 0 else starts
            times = _next_after(times, towards.to(y0.device, clock))
        stages.append((times.unbind(), combination(row, sizes) if any(row) else None))
    if outputs is not None:
        positions, lengths = weights(outputs.positions), weights(outputs.lengths)
    if options.interp == "cubic" and outputs is not None:
        end_times = ends.to(y0.device, clock).unbind()
    if callback is not None:
        called, callback_times, callback_steps = 0, starts.unbind(), steps.abs().unbind()

    def advance(first: int, last: int, y: Tensor) -> list[Tensor]:
        """Outputs of the steps from ``first`` up to ``last``, and the state behind them."""
        nonlocal called
        results = []
        for i in range(first, last):
            if callback is not None and i >= called:  # a recomputation calls it no second time
                callback(callback_times[i], y, callback_steps[i])
                called = i + 1
            ks: list[Tensor] = []
            for times, combine in stages:
                ks.append(field(times[i], y if combine is None else combine(i, y, ks)))
            y_start, y = y, update(i, y, ks)
            if outputs is None:
                results.append(y)
                continue
            end_field = None
            for j, is_end in outputs.of_step[i]:
                if options.interp == "cubic":
                    if end_field is None:
                        end_field = field(end_times[i], y)
                    results.append(_hermite(positions[j - 1], lengths[j - 1], y_start, ks[0], y, end_field))
                elif is_end:
                    results.append(y)
                else:
                    results.append(y_start + positions[j - 1] * (y - y_start))
        results.append(y)
        return results

    states, y, count, first = [y0], y0, len(steps), 0
    every = options.checkpoint_every
    if every is not None and torch.is_grad_enabled() and not transforming(y0):
        # The last run of steps is the first whose gradient is needed: nothing is gained by forgetting it.
        while first + every < count:
            *results, y = checkpoint(advance, first, first + every, y, use_reentrant=False)
            states += results
            first += every
    states += advance(first, count, y)[:-1]
    return torch.stack([s if s.dtype == y0.dtype else s.to(y0.dtype) for s in states])


def _next_after(times: Tensor, towards: Tensor) -> Tensor:
    """The floating-point numbers next to ``times``, with the derivative of ``times`` themselves."""
    return times + (torch.nextafter(times.detach(), towards.detach()) - times.detach())


def _hermite(s: float | Tensor, h: float | Tensor, y0: Tensor, f0: Tensor, y1: Tensor, f1: Tensor) -> Tensor:
    """The cubic through y0 and y1 with the derivatives f0 and f1, at the fraction s of a step of length h."""
    r = 1 - s
    return (1 + 2 * s) * (r * r) * y0 + s * (r * r) * h * f0 + s * s * (3 - 2 * s) * y1 - s * s * r * h * f1
