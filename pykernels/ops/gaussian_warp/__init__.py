"""Images advected by a motion field, with a Gaussian or bilinear kernel, and penalties of such fields."""

from pykernels.ops.gaussian_warp.penalties import flow_penalties
from pykernels.ops.gaussian_warp.warp import bilinear_warp, diffusion_variance, gaussian_warp, gaussian_warp_rollout

__all__ = ["bilinear_warp", "diffusion_variance", "flow_penalties", "gaussian_warp", "gaussian_warp_rollout"]
