"""Flops and bytes of warps, from shapes: README.md, "Cost".

Flops are the taps' products and sums for every channel, and the weights' are left out. Bytes are arguments and results:
neighbouring windows share what they read.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pykernels.backends import Cost
from pykernels.ops._memory import size
from pykernels.ops.gaussian_warp.reference import Options, mass_beyond, most_radius
from pykernels.ops.gaussian_warp.window import radius


def taps(options: Options, ranks: int) -> int:
    """Taps per axis; of a variance that is a tensor, whose values are not read, the fewest."""
    if options.support > 0:
        return options.support
    return 2 * max(1, radius(options.value, mass_beyond(options, ranks), most_radius(options))) + 1


def _tap_flops(image: Tensor, flow: Tensor, options: Options) -> int:
    """Of one product and one sum per tap, all channels and steps."""
    ranks = image.dim() - 2
    return 2 * int(taps(options, ranks) ** ranks) * image.numel() * flow.shape[1]


def forward(image: Tensor, flow: Tensor, variance: Any, *options: Any) -> Cost:
    frames = size((image,)) * flow.shape[1]
    return Cost(_tap_flops(image, flow, Options(*options[:-1])), size((image, flow, variance)) + frames)


def backward(grads: Tensor, frames: Any, image: Tensor, flow: Tensor, variance: Any, *options: Any) -> Cost:
    """The image's gradient costs as much as the warp, and each axis' derivative of the flow as well."""
    terms = 1 + image.dim() - 2
    moved = size((grads, frames)) + 2 * size((image, flow, variance))
    return Cost(terms * _tap_flops(image, flow, Options(*options[:-2])), moved)
