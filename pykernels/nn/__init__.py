"""Drop-in layers."""

from pykernels.nn.causal_conv import CausalCNNEncoder, CausalConv1d, CausalConvBlock
from pykernels.nn.tcn import TemporalConvNet

__all__ = ["CausalCNNEncoder", "CausalConv1d", "CausalConvBlock", "TemporalConvNet"]
