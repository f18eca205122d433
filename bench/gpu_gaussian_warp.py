"""GPU benchmarks of warps: bilinear ones against ``grid_sample``, Gaussian ones against their definition in PyTorch.

The Gaussian warps of a shape can be held against its bilinear warp, which reads 4 pixels for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_cases import Case
from torch import Tensor

import pykernels

VARIANCE = 0.9


class Warp(NamedTuple):
    """Sizes of the image, and the window: ``taps`` 2 means bilinear.

    With ``varying`` each pixel has a variance of its own, up to :data:`VARIANCE`, and windows of up to ``taps``.
    """

    shape: tuple[int, int, int, int]
    taps: int
    steps: int = 1
    varying: bool = False

    def __str__(self) -> str:
        kind = "bilinear" if self.taps == 2 else f"{self.taps}x{self.taps} window"
        kind = "variance of each pixel" if self.varying else kind
        steps = f", {self.steps} steps" if self.steps > 1 else ""
        return f"{kind} {'x'.join(map(str, self.shape))}{steps}"

    def flops(self, backward: bool) -> int:
        """One product and one sum per tap; the backward has three more: for the image and for the flow's two axes."""
        batch, channels, height, width = self.shape
        return 2 * self.taps**2 * batch * channels * height * width * self.steps * (4 if backward else 1)

    def bytes_moved(self, backward: bool) -> int:
        """Reads image, flow and variances, writes frames; then reads the same and grads, and writes the gradients."""
        batch, channels, height, width = self.shape
        pixels = batch * height * width
        image, frames, flow = channels * pixels, channels * pixels * self.steps, 2 * pixels * self.steps
        variance = pixels if self.varying else 0
        elements = image + flow + variance + frames
        if backward:
            elements += frames + 2 * (image + flow) + variance
        return 4 * elements

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        """Image, flows of some three pixels that vary over an eighth of it, gradients and the variance, in float64."""
        generator = torch.Generator(device).manual_seed(0)
        batch, channels, *sizes = self.shape

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)

        flow = F.interpolate(3 * random(batch * self.steps, 2, 8, 8), size=sizes, mode="bicubic")
        grads = random(batch, self.steps, channels, *sizes)
        variance = VARIANCE * torch.rand(batch, 1, *sizes, generator=generator, dtype=torch.float64, device=device)
        flows = flow.view(batch, self.steps, 2, *sizes)
        return random(*self.shape), flows, grads, variance if self.varying else VARIANCE


Step = Callable[..., Tensor]


def sample(image: Tensor, flow: Tensor, variance: Tensor | float) -> Tensor:
    """Bilinear sampling as users write it today."""
    height, width = flow.shape[-2:]
    x = torch.arange(width, dtype=flow.dtype, device=flow.device) - flow[:, 0]
    y = torch.arange(height, dtype=flow.dtype, device=flow.device)[:, None] - flow[:, 1]
    grid = torch.stack((x * (2 / (width - 1)) - 1, y * (2 / (height - 1)) - 1), -1)
    return F.grid_sample(image, grid, align_corners=True)


def loop(step: Step, image: Tensor, flows: Tensor, variance: Tensor | float) -> Tensor:
    frames = []
    for t in range(flows.shape[1]):
        image = step(image, flows[:, t], variance)
        frames.append(image)
    return torch.stack(frames, 1)


def run(function: Step, tensors: tuple[Tensor, Tensor, Tensor | float], grads: Tensor | None) -> list[Tensor]:
    frames = function(*tensors)
    return [frames.detach()] + ([] if grads is None else list(torch.autograd.grad(frames, tensors[:2], grads)))


def prepare(case: Warp, backward: bool, device: str) -> tuple[dict[str, Any], list[Tensor]]:
    support = None if case.varying else case.taps

    def ours(image: Tensor, flow: Tensor, variance: Tensor | float) -> Tensor:
        if case.taps == 2:
            return pykernels.bilinear_warp(image, flow)
        return pykernels.gaussian_warp(image, flow, variance, support=support)

    def rollout(image: Tensor, flows: Tensor, variance: Tensor | float) -> Tensor:
        return pykernels.gaussian_warp_rollout(image, flows, variance, support=support)

    def definition(image: Tensor, flow: Tensor, variance: Tensor | float) -> Tensor:
        return pykernels.gaussian_warp(image, flow, variance, support=support, backend="reference")

    plain = sample if case.taps == 2 else definition
    image, flows, grads, variance = case.tensors(device)
    exact = (image.requires_grad_(backward), flows.requires_grad_(backward), variance)
    expected = run(partial(loop, plain), exact, grads if backward else None)
    tensors = (
        image.detach().float().requires_grad_(backward),
        flows.detach().float().requires_grad_(backward),
        variance.float() if isinstance(variance, Tensor) else variance,
    )
    ways = {
        "pykernels": rollout if case.steps > 1 and case.taps > 2 else partial(loop, ours),
        "eager": partial(loop, plain),
    }
    if not case.varying:  # compiled, the definition would take the widest window there is
        ways["compiled"] = partial(loop, torch.compile(plain, dynamic=False))
    given = grads.float() if backward else None
    return {name: partial(run, way, tensors, given) for name, way in ways.items()}, expected


SMALL, MIDDLE, LARGE = (64, 1, 64, 64), (8, 1, 256, 256), (8, 3, 481, 781)
WARPS = [
    *(Warp(shape, taps) for shape in (SMALL, MIDDLE, LARGE) for taps in (2, 3)),
    *(Warp(shape, 9) for shape in (SMALL, MIDDLE)),
    Warp(SMALL, 9, varying=True),
    *(Warp(SMALL, taps, steps=6) for taps in (2, 3)),
]


def cases() -> Iterator[Case]:
    for case in WARPS:
        for backward in (False, True):
            name = f"{case} float32{', backward' if backward else ''}"
            cost = (case.flops(backward), case.bytes_moved(backward))
            yield Case(name, torch.float32, *cost, partial(prepare, case, backward))
