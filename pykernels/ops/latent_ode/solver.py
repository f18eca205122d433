"""Fixed-step integration of any vector field: the steps of an explicit Runge-Kutta method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pykernels.ops._autograd import recording, transforming
from pykernels.ops.latent_ode import grids
from pykernels.ops.latent_ode.combine import Combine, combination
from pykernels.ops.latent_ode.tableaux import Tableau

Field = Callable[[Tensor, Tensor], Tensor]
#: Called before each step with the time, the state and the length of the step.
Callback = Callable[[Tensor, Tensor, Tensor], object]


#: Elements of a state from which on its memory counts for more than the 2 us that it takes to store each on its own.
SMALLEST_STORED = 16384


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
    """The states, one for each time, at the times ``t`` (T,), at least one.

    ``field(t, y)`` returns a tensor of the shape of y.
    """
    if len(t) == 1:
        return y0[None]
    steps = Steps(field, y0, t, tableau, options, callback)
    if _storable(y0):
        return _stored(steps, y0, len(t))
    states, y, first, every = [y0], y0, 0, options.checkpoint_every
    if every is not None and torch.is_grad_enabled() and not transforming(y0):
        # The last run of steps is the first whose gradient is needed: nothing is gained by forgetting it.
        while first + every < steps.count:
            *results, y = checkpoint(steps.advance, first, first + every, y, use_reentrant=False)
            states += results
            first += every
    states += steps.advance(first, steps.count, y)[:-1]
    return torch.stack([s if s.dtype == y0.dtype else s.to(y0.dtype) for s in states])


def _storable(y0: Tensor) -> bool:
    """Whether states go straight to where they belong: large ones, of which nothing is recorded."""
    return (
        not torch.compiler.is_compiling()
        and y0.numel() >= SMALLEST_STORED
        and not torch.is_grad_enabled()
        and not transforming(y0)
    )


def _stored(steps: Steps, y: Tensor, count: int) -> Tensor:
    """The states, of which no second copy is ever held."""
    states = y.new_empty((count, *y.shape))
    states[0] = y
    j = 1
    for i in range(steps.count):
        *results, y = steps.advance(i, i + 1, y)
        for state in results:
            states[j] = state
            j += 1
    return states


class Steps:
    """All steps of an integration, whose times and sizes are computed beforehand."""

    def __init__(
        self, field: Field, y0: Tensor, t: Tensor, tableau: Tableau, options: Options, callback: Callback | None
    ) -> None:
        grid, outputs = t, None
        if options.step_size is not None:
            grid, outputs = grids.of_step_size(t, options.step_size)
        elif options.grid_constructor is not None:
            grid = options.grid_constructor(field, y0, t)
            outputs = grids.constructed(grid, t)
        # Step sizes are numbers where that is all that is asked of them: arithmetic with them costs half.
        numbers = grids.readable(grid) and grids.readable(t) and not (recording(grid, t) or transforming(grid, t))
        clock = y0.real.dtype if y0.is_complex() else y0.dtype

        def moments(times: Tensor) -> Tensor:
            return times.to(y0.device, clock, non_blocking=not y0.is_cpu)

        def weights(values: Tensor) -> list[float] | Tensor:
            return values.tolist() if numbers else moments(values)

        starts, ends, lengths = grid[:-1], grid[1:], grid.diff()
        sizes = weights(lengths)
        self.field, self.callback, self.count = field, callback, len(lengths)
        self.update = combination(tableau.b, sizes)
        self.stages: list[tuple[Sequence[Tensor], Combine | None]] = []
        for c, row in zip(tableau.c, tableau.a, strict=True):
            times = moments(starts if c == 0 else ends if c == 1 else starts + lengths * c)
            if options.perturb and c in (0, 1):
                times = _next_after(times, moments(ends if c == 0 else starts))
            self.stages.append((times.unbind(), combination(row, sizes) if any(row) else None))
        self.outputs = None if outputs is None else outputs.of_step
        self.cubic = options.interp == "cubic"
        if outputs is not None:
            self.positions, self.lengths = weights(outputs.positions), weights(outputs.lengths)
            self.ends = moments(ends).unbind()
        if callback is not None:
            self.called, self.callback_times, self.callback_steps = 0, starts.unbind(), lengths.abs().unbind()

    def advance(self, first: int, last: int, y: Tensor) -> list[Tensor]:
        """The outputs of the steps from ``first`` up to ``last``, and the state behind them."""
        field, stages, update, outputs = self.field, self.stages, self.update, self.outputs
        results = []
        for i in range(first, last):
            if self.callback is not None and i >= self.called:  # a recomputation calls it no second time
                self.callback(self.callback_times[i], y, self.callback_steps[i])
                self.called = i + 1
            ks: list[Tensor] = []
            for times, combine in stages:
                ks.append(field(times[i], y if combine is None else combine(i, y, ks)))
            start, y = y, update(i, y, ks)
            if outputs is None:
                results.append(y)
            elif outputs[i]:
                results += self.interpolate(i, start, ks[0], y)
        return [*results, y]

    def interpolate(self, i: int, y0: Tensor, f0: Tensor, y1: Tensor) -> list[Tensor]:
        """The outputs inside step ``i`` from y0, where the field is f0, to y1."""
        assert self.outputs is not None
        if self.cubic:
            f1 = self.field(self.ends[i], y1)
            return [_hermite(self.positions[j - 1], self.lengths[j - 1], y0, f0, y1, f1) for j, _ in self.outputs[i]]
        return [y1 if is_end else y0 + self.positions[j - 1] * (y1 - y0) for j, is_end in self.outputs[i]]


def _next_after(times: Tensor, towards: Tensor) -> Tensor:
    """The floating-point numbers next to ``times``, with the derivative of ``times`` themselves."""
    return times + (torch.nextafter(times.detach(), towards.detach()) - times.detach())


def _hermite(s: float | Tensor, h: float | Tensor, y0: Tensor, f0: Tensor, y1: Tensor, f1: Tensor) -> Tensor:
    """The cubic through y0 and y1 with the derivatives f0 and f1, at the fraction s of a step of length h."""
    r = 1 - s
    return (1 + 2 * s) * (r * r) * y0 + s * (r * r) * h * f0 + s * s * (3 - 2 * s) * y1 - s * s * r * h * f1
