"""The continuous adjoint: gradients from an equation integrated backwards in time, in constant memory.

For y' = f(t, y, p) and a loss L, the adjoint a = dL/dy follows

    a' = -a df/dy,      (dL/dp)' = -a df/dp,      (dL/dt)' = -a df/dt

backwards, jumping by dL/dy_i at each time t_i; y itself is integrated backwards with it, and set to the state of the
forward pass at each t_i. The gradient with respect to t_i is <f(t_i, y_i), dL/dy_i>, and that with respect to t_0 what
remains. The gradients have the error of the method; those of :func:`pykernels.odeint` are exact for its steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pykernels.ops._autograd import apply, transforming
from pykernels.ops.latent_ode.odeint import trajectory
from pykernels.ops.latent_ode.problem import (
    Problem,
    State,
    VectorField,
    callback_of,
    fixed_step,
    in_members,
    members,
    read_options,
    state_problem,
)
from pykernels.ops.latent_ode.solver import Callback, Options, solve
from pykernels.ops.latent_ode.tableaux import Tableau


def odeint_adjoint(
    func: VectorField,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """:func:`pykernels.odeint` with gradients from the adjoint equation, integrated backwards, in constant memory.

    Its gradients have the error of the method, and cost about two evaluations of the field more per stage. The exact
    gradients of :func:`pykernels.odeint` take less memory with its ``checkpoint_every``.

    Args:
        func: see :func:`pykernels.odeint`; a method ``callback_step_adjoint(t, state, dt)`` is called before each step
            backwards, where the state is a tuple of dL/dt, y, dL/dy and the gradients of the parameters.
        y0: see :func:`pykernels.odeint`, like the arguments up to event_fn.
        t: see y0.
        rtol: see y0.
        atol: see y0.
        method: see y0.
        options: see y0; without ``checkpoint_every``.
        event_fn: see y0.
        adjoint_rtol: accepted and not used, like adjoint_atol.
        adjoint_atol: see adjoint_rtol.
        adjoint_method: the method backwards; by default that of the forward pass.
        adjoint_options: options backwards; by default those of the forward pass, if the method is the same.
        adjoint_params: the tensors, beside y0 and t, that get gradients; by default ``func.parameters()``. What else
            ``func`` depends on gets none.

    Returns:
        As :func:`pykernels.odeint`; differentiable once, in reverse mode.

    Raises:
        ValueError: as :func:`pykernels.odeint`, and if the parameters or the options backwards are not known.
        TypeError: as :func:`pykernels.odeint`.
        RuntimeError: inside function transforms and forward-mode differentiation.

    Source: Pontryagin et al., "The mathematical theory of optimal processes", 1962; R. T. Q. Chen et al., "Neural
    ordinary differential equations", NeurIPS 2018.
    """
    tableau = fixed_step(method, event_fn)
    chosen = read_options(options)
    if chosen.checkpoint_every is not None:
        raise ValueError("options has 'checkpoint_every', but odeint_adjoint keeps no steps; pykernels.odeint does")
    adjoint_tableau = tableau if adjoint_method is None else fixed_step(adjoint_method)
    if adjoint_options is None:
        if options and adjoint_tableau is not tableau:
            raise ValueError("adjoint_options must be given with options and an adjoint_method that is not the method")
        adjoint_chosen = chosen
    else:
        adjoint_chosen = read_options(adjoint_options, name="adjoint_options")
    if adjoint_params is None:
        if not isinstance(func, nn.Module):
            raise ValueError(
                "adjoint_params must be given where func is no nn.Module: the tensors that need gradients; () if none"
            )
        adjoint_params = func.parameters()
    params = [p for p in adjoint_params if p.requires_grad]
    problem = state_problem(func, y0, t)
    if transforming(problem.y0, t):
        raise RuntimeError("odeint_adjoint has no function transforms and no forward mode; pykernels.odeint has")
    backward = Backward(problem, params, adjoint_tableau, adjoint_chosen, callback_of(func, None, "_adjoint"))
    states: Tensor = apply(_Adjoint, (func, problem, tableau, chosen), backward, problem.y0, t, *params)
    return states if problem.shapes is None else members(states, problem.shapes)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Any, backward: Backward, y0: Tensor, t: Tensor, *params: Tensor) -> Tensor:
        func, problem, tableau, options = forward
        states = trajectory(func, problem._replace(y0=y0, t=t), tableau, options)
        ctx.integrate = backward
        ctx.save_for_backward(t, states, *params)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_states: Tensor) -> Any:
        t, states, *_ = ctx.saved_tensors  # raises if a parameter has been changed in place
        grad_y, grad_t, grad_params = ctx.integrate(t, states, grad_states, ctx.needs_input_grad[3])
        return None, None, grad_y, grad_t, *grad_params


class Backward:
    """The adjoint equation of a problem.

    The state is one tensor of dL/dt, y, dL/dy, and dL/dp for each parameter, one behind the other, in the dtype that
    holds them all.
    """

    def __init__(
        self, problem: Problem, params: list[Tensor], tableau: Tableau, options: Options, callback: Callback | None
    ) -> None:
        self.field, self.params, self.tableau, self.options = problem.field, params, tableau, options
        shape, self.dtype = problem.y0.shape, problem.y0.dtype
        self.clock = problem.y0.real.dtype if problem.y0.is_complex() else self.dtype
        self.shapes = [torch.Size(()), shape, shape, *(p.shape for p in params)]
        self.callback = in_members(callback, self.shapes)

    def __call__(
        self, t: Tensor, states: Tensor, grad_states: Tensor, need_t: bool
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Gradients with respect to the first state, the times, and the parameters."""
        grad_t = torch.zeros_like(t) if need_t else None
        adjoint, grad_clock = grad_states[-1], states.new_zeros(())
        grad_params: Sequence[Tensor] = [torch.zeros_like(p) for p in self.params]
        for i in range(len(t) - 1, 0, -1):
            if grad_t is not None:
                slope = self.field(t[i].to(states.device, self.clock), states[i])
                moved = (slope.conj() * grad_states[i]).sum().real
                grad_t[i] = moved
                grad_clock = grad_clock - moved
            joined = torch.cat([x.reshape(-1) for x in (grad_clock, states[i], adjoint, *grad_params)])
            ends = solve(
                self.derivative,
                joined,
                torch.stack([t[i], t[i - 1]]),
                self.tableau,
                self.options,
                self.callback,
            )
            grad_clock, _, adjoint, *grad_params = members(ends[-1], self.shapes)
            adjoint = adjoint + grad_states[i - 1]
        if grad_t is not None:
            grad_t[0] = grad_clock.real
        reals = [g if p.is_complex() else g.real for g, p in zip(grad_params, self.params, strict=True)]
        return adjoint, grad_t, [g.to(p.dtype) for g, p in zip(reals, self.params, strict=True)]

    def derivative(self, time: Tensor, state: Tensor) -> Tensor:
        _, y, adjoint, *_ = members(state, self.shapes)
        with torch.enable_grad():
            y = y.detach().to(self.dtype).requires_grad_()
            time = time.detach().to(self.clock).requires_grad_()
            slope = self.field(time, y)
            wanted = [time, y, *self.params]
            grads = torch.autograd.grad(
                slope, wanted, -adjoint.to(slope.dtype), allow_unused=True, materialize_grads=True
            )
        return torch.cat([x.reshape(-1) for x in (grads[0], slope.detach(), *grads[1:])])
