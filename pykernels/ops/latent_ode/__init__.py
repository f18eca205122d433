"""Trajectories of ordinary differential equations in one call."""

from pykernels.ops.latent_ode.mlp import mlp_odeint

__all__ = ["mlp_odeint"]
