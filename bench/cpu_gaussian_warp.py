"""Benchmarks of Gaussian warping on the CPU, for run.py: against bilinear sampling, which reads twenty times less."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import warp_peers
from cases import Limits, relative_error, verdict
from measure import Contender, compare
from torch import Tensor
from warp_peers import Problem, Warp

import pykernels

VARIANCE = 0.9
SHAPES = ((8, 1, 256, 256), (64, 1, 64, 64))
STEPS = 6


def _run(
    warp: Warp, problem: Problem, backward: bool, dtype: torch.dtype = torch.float32
) -> Callable[[], list[Tensor]]:
    image, flow, grad = (t.to(dtype) for t in problem)
    if not backward:
        return lambda: [warp(image, flow)]
    inputs = (image.requires_grad_(), flow.requires_grad_())

    def both() -> list[Tensor]:
        result = warp(*inputs)
        return [result.detach(), *torch.autograd.grad(result, inputs, grad)]

    return both


def _error(name: str, found: list[Tensor], should: list[Tensor]) -> float:
    """Without the flow's gradient where it jumps from cell to cell, as that of linear interpolation does."""
    compared = 2 if "bilinear" in name else 3
    return max(map(relative_error, found[:compared], should[:compared]))


def bench_warp(
    shape: tuple[int, int, int, int],
    backward: bool,
    limits: Limits,
    seconds: float,
    support: int | None = None,
    rough: bool = False,
    varying: bool = False,
) -> dict[str, Any]:
    """Checked against float64: the window of the same taps by the kernels, the others by themselves."""
    problem = Problem.random(shape, rough)
    variance: float | Tensor = VARIANCE
    if varying:
        variance = VARIANCE * torch.rand(shape[0], 1, *shape[2:])

    def ours(image: Tensor, flow: Tensor) -> Tensor:
        v = variance.to(image.dtype) if isinstance(variance, Tensor) else variance
        return pykernels.gaussian_warp(image, flow, v, support=support)

    ways = {"pykernels": ours, **warp_peers.peers(VARIANCE, support, shape, backward)}
    if varying or rough:
        ways = {name: ways[name] for name in ("pykernels", "bilinear grid_sample")}
    errors = {}
    for name, warp in ways.items():
        exact = ours if varying and name == "pykernels" else warp_peers.expected(name, problem, VARIANCE, support, {})
        found, should = _run(warp, problem, backward)(), _run(exact, problem, backward, torch.float64)()
        errors[name] = _error(name, found, should)
    runs = {name: _run(warp, problem, backward) for name, warp in ways.items()}
    results = compare([Contender(*r) for r in runs.items()], seconds=seconds, most_threads=limits.threads)
    taps = support or 9
    pixels = problem.image.numel()
    flops = 2 * taps * taps * pixels * (4 if backward else 1)
    moved = 4 * (pixels * (5 if backward else 2) + problem.flow.numel() * (3 if backward else 1))
    return verdict(results, errors, limits=limits, flops=flops, moved=moved)


def bench_bilinear(shape: tuple[int, int, int, int], backward: bool, limits: Limits, seconds: float) -> dict[str, Any]:
    problem = Problem.random(shape)
    ways = {"pykernels": pykernels.bilinear_warp, "bilinear grid_sample": warp_peers.bilinear}
    should = _run(warp_peers.bilinear, problem, backward, torch.float64)()
    errors = {name: _error("bilinear", _run(warp, problem, backward)(), should) for name, warp in ways.items()}
    runs = {name: _run(warp, problem, backward) for name, warp in ways.items()}
    results = compare([Contender(*r) for r in runs.items()], seconds=seconds, most_threads=limits.threads)
    return verdict(results, errors, limits=limits)


def bench_rollout(backward: bool, limits: Limits, seconds: float) -> dict[str, Any]:
    """Six steps in one call, against a loop of calls and of grid_sample."""
    problem = Problem.random((64, 1, 64, 64))
    flows = torch.stack([problem.flow.roll(step, -1) for step in range(STEPS)], 1)
    grads = torch.randn(64, STEPS, 1, 64, 64)

    def loop(warp: Warp) -> Warp:
        def steps(image: Tensor, flows: Tensor) -> Tensor:
            frames = []
            for step in range(STEPS):
                image = warp(image, flows[:, step])
                frames.append(image)
            return torch.stack(frames, 1)

        return steps

    def one(image: Tensor, flow: Tensor) -> Tensor:
        return pykernels.gaussian_warp(image, flow, VARIANCE)

    rollout = Problem(problem.image, flows, grads)
    ways: dict[str, Warp] = {
        "pykernels": lambda image, flows: pykernels.gaussian_warp_rollout(image, flows, VARIANCE),
        "pykernels loop": loop(one),
        "bilinear grid_sample": loop(warp_peers.bilinear),
    }
    exact = {name: ways["bilinear grid_sample" if "bilinear" in name else "pykernels loop"] for name in ways}
    errors = {
        name: _error(name, _run(warp, rollout, backward)(), _run(exact[name], rollout, backward, torch.float64)())
        for name, warp in ways.items()
    }
    runs = {name: _run(warp, rollout, backward) for name, warp in ways.items()}
    results = compare([Contender(*r) for r in runs.items()], seconds=seconds, most_threads=limits.threads)
    flops = 2 * 81 * flows[:, :, 0].numel() * (4 if backward else 1)
    return verdict(results, errors, limits=limits, flops=flops)


def cases(limits: Limits, seconds: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """Benchmarks by name; each runs for a small multiple of ``seconds``."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for backward in (False, True):
        what = "forward and backward" if backward else "forward"

        def case(
            name: str, shape: tuple[int, int, int, int], backward: bool = backward, what: str = what, **options: Any
        ) -> None:
            size = "x".join(map(str, shape))
            found[f"{name}, {size}, {what}"] = lambda: bench_warp(shape, backward, limits, seconds, **options)

        for shape in SHAPES:
            case("9x9 window", shape)
            case("3x3 window", shape, support=3)
        case("9x9 window", (4, 1, 64, 64))
        case("9x9 window", (1, 3, 481, 781))
        case("9x9 window, rough flow", SHAPES[1], rough=True)
        case("variance of each pixel", SHAPES[1], varying=True)
        for shape in SHAPES:
            name = f"bilinear, {'x'.join(map(str, shape))}, {what}"
            found[name] = lambda shape=shape, b=backward: bench_bilinear(shape, b, limits, seconds)
        found[f"rollout of {STEPS} steps, 64x1x64x64, {what}"] = lambda b=backward: bench_rollout(b, limits, seconds)
    return found


def extras(only: str) -> dict[str, Any]:
    """The overhead of a call: one pixel, without gradients."""
    image, flow = torch.zeros(1, 1, 1, 1), torch.zeros(1, 2, 1, 1)
    torch.set_num_threads(1)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(300):
            pykernels.gaussian_warp(image, flow, VARIANCE)
        times.append((time.perf_counter() - start) / 300)
    overhead = sorted(times)[len(times) // 2]
    print(f"call overhead: {overhead * 1e6:.1f} us")
    return {"call_overhead_s": {"pykernels": overhead}}
