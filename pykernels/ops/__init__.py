"""Operators, one folder per family."""

from pykernels.ops.causal_conv import causal_conv1d, causal_conv_block, causal_conv_block_max, weight_norm

__all__ = ["causal_conv1d", "causal_conv_block", "causal_conv_block_max", "weight_norm"]
