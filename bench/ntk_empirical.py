"""Benchmarks of tangent kernels of finite networks on the CPU, beside the recipe of torch.func's tutorial."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from cases import Limits, relative_error, verdict
from measure import Contender, compare
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import pykernels

Way = Callable[[nn.Module, Tensor, Tensor, bool], Tensor]


def mlp(*widths: int) -> nn.Sequential:
    """Linear maps with ReLU between them."""
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Sequential:
    """Three convolutions of images of 3 channels, and a linear map to 10 outputs."""
    layers: list[nn.Module] = []
    for channels in ((3, 32), (32, 32), (32, 32)):
        layers += [nn.Conv2d(*channels, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


#: Networks, the shape of a sample, the numbers of samples, and whether the kernel of all outputs is asked for.
PROBLEMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, bool]] = {
    "empirical NTK, MLP 32-512-512-512-1, 256 x 128": (lambda: mlp(32, 512, 512, 512, 1), (32,), 256, 128, False),
    "empirical NTK, MLP 784-256-256-10, 64 x 64, trace": (lambda: mlp(784, 256, 256, 10), (784,), 64, 64, False),
    "empirical NTK, MLP 784-256-256-10, 64 x 64, all outputs": (lambda: mlp(784, 256, 256, 10), (784,), 64, 64, True),
    "empirical NTK, 3 convolutions of 3x32x32, 32 x 32, trace": (convolutions, (3, 32, 32), 32, 32, False),
}


def ours(network: nn.Module, x: Tensor, y: Tensor, full: bool) -> Tensor:
    return pykernels.empirical_ntk(network, x, y, trace_outputs=not full)


def by_jacobians(network: nn.Module, x: Tensor, y: Tensor, full: bool) -> Tensor:
    """Jacobians of all samples, contracted parameter by parameter."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def f(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        result: Tensor = functional_call(network, parameters, (sample[None],))[0]
        return result

    jacobians = [vmap(jacrev(f), (None, 0))(parameters, points).values() for points in (x, y)]
    equation = "naf,mbf->nmab" if full else "naf,maf->nm"
    parts = [torch.einsum(equation, a.flatten(2), b.flatten(2)) for a, b in zip(*jacobians, strict=True)]
    return torch.stack(parts).sum(0) / (1 if full else parts[0].new_tensor(next(iter(jacobians[0])).shape[1]))


def _bench(
    make: Callable[[], nn.Module], shape: tuple[int, ...], n: int, m: int, full: bool, limits: Limits, seconds: float
) -> dict[str, Any]:
    torch.manual_seed(0)
    network = make()
    x, y = torch.randn(n, *shape), torch.randn(m, *shape)
    ways: dict[str, Way] = {"pykernels": ours, "torch.func Jacobians": by_jacobians}
    expected = ours(copy.deepcopy(network).double(), x.double(), y.double(), full)
    errors = {name: relative_error(way(network, x, y, full), expected) for name, way in ways.items()}
    runs = [Contender(name, lambda way=way: way(network, x, y, full)) for name, way in ways.items()]
    return verdict(compare(runs, seconds=seconds, most_threads=limits.threads), errors)


def empirical_cases(limits: Limits, seconds: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """Benchmarks by name, as ``cases`` of the modules of run.py."""
    return {
        name: lambda problem=problem: _bench(*problem, limits=limits, seconds=seconds)
        for name, problem in PROBLEMS.items()
    }
