"""Trajectories of any vector field by fixed-step methods, with the arguments of torchdiffeq."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pykernels.ops._autograd import transforming
from pykernels.ops.latent_ode.grids import equal_substeps
from pykernels.ops.latent_ode.hint import hint_once
from pykernels.ops.latent_ode.problem import (
    Problem,
    State,
    VectorField,
    callback_of,
    fixed_step,
    members,
    read_options,
    state_problem,
)
from pykernels.ops.latent_ode.solver import Options, solve
from pykernels.ops.latent_ode.tableaux import Tableau


def odeint(
    func: VectorField,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: None = None,
    checkpoint_every: int | None = None,
) -> Any:
    """Solve ``dy/dt = func(t, y)``, ``y(t[0]) = y0`` with a fixed-step method, with torchdiffeq's arguments.

    Args:
        func: the vector field, ``func(t, y)`` with a 0-dimensional t, returning the shape of y. Any callable; if it has
            a method ``callback_step(t, y, dt)``, that is called before each step.
        y0: the state at ``t[0]``, floating-point or complex, of any shape; or a tuple of such tensors, which ``func``
            gets and returns as a tuple.
        t: times (T,), strictly increasing or decreasing.
        rtol: for adaptive methods, accepted and not used, like atol.
        atol: see rtol.
        method: ``"euler"``, ``"midpoint"``, ``"heun2"``, ``"heun3"``, ``"rk4"`` (Kutta's 3/8 rule, as in torchdiffeq),
            ``"rk4_classic"`` or ``"ssp_rk3"``.
        options: any of

            - ``step_size``: the length of a step; without it, each step goes from one time of t to the next;
            - ``grid_constructor``: ``grid_constructor(func, y0, t)`` returns the times between which the steps are
              taken, from ``t[0]`` to ``t[-1]``;
            - ``interp``: ``"linear"`` (default) or ``"cubic"``, how times of t inside a step are reached;
            - ``perturb``: evaluate the field just inside a step instead of on its ends, for fields that jump there;
            - ``checkpoint_every``: see below.
        event_fn: not supported.
        checkpoint_every: keep the states of every n-th step only, and compute n steps again at a time in the backward
            pass: same gradients, less memory. In function transforms all states are kept.

    Returns:
        The states ``(T, *y0.shape)``, or a tuple of them. Differentiable to any order with respect to y0, t and
        whatever ``func`` depends on; in forward mode, by ``torch.func`` and inside ``torch.compile(fullgraph=True)``
        too. There, ``step_size`` and ``grid_constructor`` break the graph: the number of steps depends on the values
        of t.

    Raises:
        ValueError: if there is no such method or option, t is not monotone, or func returns another shape than y's.
        TypeError: if an argument, or what func returns, is not of the right kind.

    Source: Hairer, Norsett and Wanner, "Solving ordinary differential equations I", section II.1; R. T. Q. Chen,
    torchdiffeq, 2018, for the arguments.
    """
    tableau = fixed_step(method, event_fn)
    chosen = read_options(options, checkpoint_every)
    problem = state_problem(func, y0, t)
    states = trajectory(func, problem, tableau, chosen)
    return states if problem.shapes is None else members(states, problem.shapes)


def trajectory(func: VectorField, problem: Problem, tableau: Tableau, options: Options) -> Tensor:
    """The states of a checked problem: by the field's own kernels if it has them, and else step by step.

    A class of fields says that it has by a method ``_fused_odeint(y0, t, method, options)``, which returns the states
    or NotImplemented. ``options["substeps"]`` is the number of equal steps in each interval of t; a "checkpoint_every"
    is there if it was asked for.
    """
    callback = callback_of(func, problem.shapes)
    if hasattr(type(func), "_fused_odeint"):
        plain = problem.shapes is None and callback is None and not options.perturb and options.grid_constructor is None
        substeps = equal_substeps(problem.t, options.step_size) if plain else None
        if substeps is not None:
            asked = {"substeps": substeps}
            if options.checkpoint_every is not None:
                asked["checkpoint_every"] = options.checkpoint_every
            states: Tensor = func._fused_odeint(problem.y0, problem.t, tableau.name, asked)  # type: ignore[attr-defined]
            if states is not NotImplemented:
                return states
    elif isinstance(func, nn.Module) and not torch.compiler.is_compiling() and not transforming(problem.y0, problem.t):
        hint_once(func)
    return solve(problem.field, problem.y0, problem.t, tableau, options, callback)
