"""Dense dilated causal 1-D convolutions with fused bias, activation and residual. README.md has the mathematics."""

from pykernels.ops.causal_conv.conv import causal_conv1d
from pykernels.ops.causal_conv.stack import BlockWeights, causal_conv_block, causal_conv_stack
from pykernels.ops.causal_conv.step import ConvState, causal_conv1d_step
from pykernels.ops.causal_conv.stream import CausalConvStream
from pykernels.ops.causal_conv.weight_norm import weight_norm

__all__ = [
    "BlockWeights",
    "CausalConvStream",
    "ConvState",
    "causal_conv1d",
    "causal_conv1d_step",
    "causal_conv_block",
    "causal_conv_stack",
    "weight_norm",
]
