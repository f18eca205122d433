"""Drop-in layers."""

from pykernels.nn.causal_conv import CausalCNNEncoder, CausalConv1d, CausalConvBlock

__all__ = ["CausalCNNEncoder", "CausalConv1d", "CausalConvBlock"]
