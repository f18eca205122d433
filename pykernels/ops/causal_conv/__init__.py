"""Dense dilated causal 1-D convolutions with fused bias, activation and residual. README.md has the mathematics."""

from pykernels.ops.causal_conv.block import causal_conv_block, causal_conv_block_max
from pykernels.ops.causal_conv.conv import causal_conv1d
from pykernels.ops.causal_conv.weight_norm import weight_norm

__all__ = ["causal_conv1d", "causal_conv_block", "causal_conv_block_max", "weight_norm"]
