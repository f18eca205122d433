"""Trajectories of ordinary differential equations in one call."""
