"""Operators, one folder per family."""

from pykernels.ops.causal_conv import causal_conv1d

__all__ = ["causal_conv1d"]
