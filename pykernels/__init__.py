"""Fast kernels for deep learning on dynamical systems, and published systems on top of them."""

from importlib.metadata import version as _version

from pykernels import export, nn
from pykernels._errors import FusionError
from pykernels._explain import explain
from pykernels._native import cpu_capabilities, cpu_capability, set_cpu_capability
from pykernels.backends import available_backends, backend
from pykernels.nn.empirical_ntk import empirical_ntk, empirical_ntk_matvec
from pykernels.nn.fuse import fuse
from pykernels.nn.ntk import NTK
from pykernels.ops import (
    Activation,
    ConvState,
    bilinear_warp,
    causal_conv1d,
    causal_conv1d_step,
    diffusion_variance,
    flow_penalties,
    gaussian_warp,
    gaussian_warp_rollout,
    mlp_odeint,
    ntk_diag,
    ntk_gram,
    ntk_matvec,
    ntk_witness,
    odeint,
    odeint_adjoint,
)
from pykernels.ops.latent_ode.hint import FusionHint

__version__ = _version("pykernels")

__all__ = [
    "NTK",
    "Activation",
    "ConvState",
    "FusionError",
    "FusionHint",
    "available_backends",
    "backend",
    "bilinear_warp",
    "causal_conv1d",
    "causal_conv1d_step",
    "cpu_capabilities",
    "cpu_capability",
    "diffusion_variance",
    "empirical_ntk",
    "empirical_ntk_matvec",
    "explain",
    "export",
    "flow_penalties",
    "fuse",
    "gaussian_warp",
    "gaussian_warp_rollout",
    "mlp_odeint",
    "nn",
    "ntk_diag",
    "ntk_gram",
    "ntk_matvec",
    "ntk_witness",
    "odeint",
    "odeint_adjoint",
    "set_cpu_capability",
]
