"""Operators, one folder per family."""

from pykernels.ops.causal_conv import BlockWeights, causal_conv1d, causal_conv_block, causal_conv_stack, weight_norm

__all__ = ["BlockWeights", "causal_conv1d", "causal_conv_block", "causal_conv_stack", "weight_norm"]
