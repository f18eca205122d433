"""Trajectories of ordinary differential equations in one call."""

from pykernels.ops.latent_ode.odeint import odeint

__all__ = ["odeint"]
