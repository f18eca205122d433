"""Motion fields, and their penalties by explicit loops: the same for all backends."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pykernels import flow_penalties
from pykernels.ops.gaussian_warp.penalties_reference import Options


class Problem(NamedTuple):
    """A field of a batch of images of these sizes, and its coefficients."""

    sizes: tuple[int, ...] = (4, 5)
    divergence: float = 1.3
    magnitude: float = -0.2
    smoothness: float = 0.7
    xy: bool = True
    batch: int = 2

    def __str__(self) -> str:
        terms = [name for name in ("divergence", "magnitude", "smoothness") if getattr(self, name) != 0]
        kind = "" if len(terms) == 3 else " " + (" ".join(terms) or "nothing")
        return f"{self.batch}x{'x'.join(map(str, self.sizes))} {'xy' if self.xy else 'ij'}{kind}"

    def flow(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, len(self.sizes), *self.sizes)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def grads(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(self.batch, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)

    @property
    def options(self) -> Options:
        return Options(self.divergence, self.magnitude, self.smoothness, self.xy)

    def run(self, flow: Tensor, backend: str | None = "cpu", reduction: str = "none") -> Tensor:
        return flow_penalties(
            flow,
            divergence=self.divergence,
            magnitude=self.magnitude,
            smoothness=self.smoothness,
            indexing="xy" if self.xy else "ij",
            reduction=reduction,
            backend=backend,
        )

    def results(self, flow: Tensor, grads: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        """The penalties and their gradient."""
        leaf = flow.detach().requires_grad_()
        values = self.run(leaf, backend)
        (gradient,) = torch.autograd.grad(values, leaf, grads)
        return values.detach(), gradient


#: Nothing, one pixel, two, primes, more than a piece of a row (1024) and a block of the GPU's, in one to three axes.
SIZES = [
    *((n,) for n in (1, 2, 3, 17, 1023, 1024, 1025, 1026, 2051)),
    *((1, 1), (1, 5), (5, 1), (2, 2), (3, 2), (7, 13), (64, 64), (3, 1026), (1031, 2)),
    *((1, 1, 1), (1, 3, 4), (3, 1, 4), (3, 4, 1), (2, 2, 2), (5, 7, 11), (3, 2, 1025), (17, 9, 33)),
]
PROBLEMS = [Problem(sizes, xy=xy) for sizes in SIZES for xy in (True, False)]
#: Every subset of the terms.
SUBSETS = [
    Problem(sizes, *coefficients)
    for sizes in ((5,), (4, 5), (3, 4, 5))
    for coefficients in product((0.0, 1.3), (0.0, -0.2), (0.0, 0.7))
]


def by_loops(problem: Problem, flow: Tensor) -> Tensor:
    """The definition, pixel by pixel."""
    ranks, sizes = len(problem.sizes), problem.sizes
    totals = []
    for w in flow.double().numpy():

        def difference(channel, axis, x, w=w):
            if sizes[axis] == 1:
                return 0.0
            low = (*x[:axis], min(x[axis], sizes[axis] - 2), *x[axis + 1 :])
            high = (*x[:axis], low[axis] + 1, *x[axis + 1 :])
            return w[channel][high] - w[channel][low]

        total = 0.0
        for x in np.ndindex(*sizes):
            along = [ranks - 1 - axis if problem.xy else axis for axis in range(ranks)]
            divergence = sum(difference(along[axis], axis, x) for axis in range(ranks))
            magnitude = sum(w[channel][x] ** 2 for channel in range(ranks))
            squares = sum(difference(channel, axis, x) ** 2 for channel in range(ranks) for axis in range(ranks))
            total += problem.divergence * divergence**2 + problem.magnitude * magnitude + problem.smoothness * squares
        totals.append(total / np.prod(sizes))
    return torch.tensor(totals, dtype=torch.float64)


def error(value: Tensor, expected: Tensor) -> float:
    """``max|value - expected| / max|expected|``."""
    assert value.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference = (value.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    if difference == 0:
        return 0.0
    return difference / largest if largest > 0 and difference == difference else float("inf")


def check_float64(problem: Problem, backend: str, device: str = "cpu") -> None:
    """Within 1e-12 of the reference."""
    flow, grads = problem.flow(), problem.grads()
    actual = problem.results(flow.to(device), grads.to(device), backend)
    for a, expected in zip(actual, problem.results(flow, grads, "reference"), strict=True):
        assert error(a.cpu(), expected) <= 1e-12


def check_float32(problem: Problem, backend: str, device: str = "cpu") -> None:
    """Values at most twice, gradients three times as far from float64 as PyTorch in float32, and 2 eps.

    Relative to the terms, which cancel where a coefficient is negative.
    """
    eps = torch.finfo(torch.float32).eps
    flow, grads = problem.flow(torch.float32), problem.grads(torch.float32)
    exact = problem.results(flow.double(), grads.double(), "reference")
    largest = problem._replace(magnitude=abs(problem.magnitude)).results(flow.double(), grads.double(), "reference")
    theirs = problem.results(flow, grads, "reference")
    ours = problem.results(flow.to(device), grads.to(device), backend)
    for a, b, e, scale, times in zip(ours, theirs, exact, largest, (2, 3), strict=True):
        assert a.dtype == torch.float32
        off, allowed = ((v.cpu().double() - e).abs().max() for v in (a, b))
        assert off <= times * allowed + 2 * eps * scale.abs().max()
