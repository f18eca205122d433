"""Drop-in layers."""

from pykernels.nn.causal_conv import CausalCNNEncoder, CausalConv1d, CausalConvBlock
from pykernels.nn.gaussian_warp import GaussianWarp, SemiLagrangian
from pykernels.nn.mlp_field import MLPField, Sin, Swish
from pykernels.nn.tcn import TemporalConvNet

__all__ = [
    "CausalCNNEncoder",
    "CausalConv1d",
    "CausalConvBlock",
    "GaussianWarp",
    "MLPField",
    "SemiLagrangian",
    "Sin",
    "Swish",
    "TemporalConvNet",
]
