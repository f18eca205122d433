"""Trajectories of ordinary differential equations in one call."""

from pykernels.ops.latent_ode.adjoint import odeint_adjoint
from pykernels.ops.latent_ode.mlp import mlp_odeint
from pykernels.ops.latent_ode.odeint import odeint

__all__ = ["mlp_odeint", "odeint", "odeint_adjoint"]
