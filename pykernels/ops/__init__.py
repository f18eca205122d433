"""Operators, one folder per family."""

from pykernels.ops.causal_conv import (
    BlockWeights,
    CausalConvStream,
    ConvState,
    causal_conv1d,
    causal_conv1d_step,
    causal_conv_block,
    causal_conv_stack,
    weight_norm,
)
from pykernels.ops.gaussian_warp import (
    bilinear_warp,
    diffusion_variance,
    flow_penalties,
    gaussian_warp,
    gaussian_warp_rollout,
)
from pykernels.ops.latent_ode import mlp_odeint, odeint, odeint_adjoint
from pykernels.ops.ntk_gram import Activation, ntk_diag, ntk_gram, ntk_matvec, ntk_witness

__all__ = [
    "Activation",
    "BlockWeights",
    "CausalConvStream",
    "ConvState",
    "bilinear_warp",
    "causal_conv1d",
    "causal_conv1d_step",
    "causal_conv_block",
    "causal_conv_stack",
    "diffusion_variance",
    "flow_penalties",
    "gaussian_warp",
    "gaussian_warp_rollout",
    "mlp_odeint",
    "ntk_diag",
    "ntk_gram",
    "ntk_matvec",
    "ntk_witness",
    "odeint",
    "odeint_adjoint",
    "weight_norm",
]
