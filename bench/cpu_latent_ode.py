"""Benchmarks of trajectories on the CPU, for run.py: small networks, the rollout of SRVP, training on the pendulum."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import ode_pendulum
import torch
import torch.nn.functional as F
from cases import Limits, relative_error, verdict
from measure import Contender, compare
from ode_peers import Problem, errors, peers
from torch import Tensor

import pykernels

STEPS = 100
#: Widths and batch; 100 steps of the classical Runge-Kutta method on [0, 1], tanh.
NETWORKS = (((2, 64, 64, 2), 1), ((2, 64, 64, 2), 32), ((20, 128, 128, 20), 32))
CONTENDERS = ("fused", "torchdiffeq", "loop", "loop of compiled steps", "torchode", "jax scan")
#: Sub-steps of a training rollout of SRVP: Moving MNIST, and KTH with two to a frame.
ROLLOUTS = (14, 38)


def trajectory_cost(widths: Sequence[int], inputs: int, batch: int, evaluations: int, times: int) -> tuple[int, int]:
    """Flops of the layers, and bytes of arguments and results, of a float32 trajectory without gradients."""
    sizes = [inputs, *widths[1:]]
    weights = sum(i * o for i, o in pairwise(sizes))
    return 2 * weights * batch * evaluations, 4 * (weights + sum(sizes[1:]) + batch * inputs * times)


def bench_network(
    widths: tuple[int, ...], batch: int, backward: bool, limits: Limits, seconds: float
) -> dict[str, Any]:
    """Of another method than the others' is torchdiffeq: Kutta's 3/8 rule, of as many stages."""
    problem = Problem.random(widths, batch, STEPS)
    found = {"pykernels" if name == "fused" else name: peer for name, peer in peers(problem, CONTENDERS).items()}
    wrong = {name: max(errors(problem, peer)) for name, peer in found.items()}
    runs = {name: peer.forward_backward if backward else peer.forward for name, peer in found.items()}
    results = compare([Contender(*run) for run in runs.items()], seconds=seconds, most_threads=limits.threads)
    flops, moved = trajectory_cost(widths, widths[0], batch, 4 * STEPS, STEPS + 1)
    return verdict(results, wrong, limits=limits, flops=flops * (3 if backward else 1), moved=moved)


def bench_rollout(substeps: int, backward: bool, limits: Limits, seconds: float) -> dict[str, Any]:
    """The training rollout of SRVP: Euler, batch 128, a state and a control of 20, three hidden layers of 512."""
    torch.manual_seed(0)
    batch, dim, frames = 128, 20, 14
    per_frame, extra = divmod(substeps, frames)
    frames, per_frame = (frames, per_frame) if extra == 0 else (substeps // 2, 2)
    widths = (dim, 512, 512, 512, dim)
    sizes = (2 * dim, *widths[1:])
    weights = [torch.randn(o, i) / i**0.5 for i, o in pairwise(sizes)]
    tensors = [torch.randn(batch, dim), torch.randn(frames, batch, dim), *weights, *(torch.zeros(o) for o in sizes[1:])]
    layers = len(weights)

    def loop(y: Tensor, z: Tensor, *parameters: Tensor) -> Tensor:
        states = [y]
        for frame in range(frames):
            for _ in range(per_frame):
                h = torch.cat([y, z[frame]], 1)
                for layer in range(layers):
                    h = F.linear(h, parameters[layer], parameters[layers + layer])
                    h = F.relu(h) if layer < layers - 1 else h
                y = y + h / per_frame
            states.append(y)
        return torch.stack(states)

    def ours(y: Tensor, z: Tensor, *parameters: Tensor) -> Tensor:
        t = torch.arange(frames + 1, dtype=y.dtype)
        states: Tensor = pykernels.mlp_odeint(
            y,
            t,
            parameters[:layers],
            parameters[layers:],
            activation="relu",
            method="euler",
            substeps=per_frame,
            control=z,
        )
        return states

    grad = torch.randn(frames + 1, batch, dim)

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        inputs = [t.to(dtype).requires_grad_(backward) for t in tensors]
        if not backward:
            return lambda: [function(*inputs)]

        def both() -> list[Tensor]:
            states = function(*inputs)
            return [states.detach(), *torch.autograd.grad(states, inputs, grad.to(dtype))]

        return both

    expected = run(loop, torch.float64)()
    ways = {"pykernels": ours, "loop": loop, "compiled loop": torch.compile(loop, dynamic=False)}
    runs = {name: run(function, torch.float32) for name, function in ways.items()}
    errors = {name: max(map(relative_error, f(), expected)) for name, f in runs.items()}
    results = compare([Contender(*r) for r in runs.items()], seconds=seconds, most_threads=limits.threads)
    flops, moved = trajectory_cost(widths, 2 * dim, batch, substeps, frames + 1)
    return verdict(results, errors, limits=limits, flops=flops * (3 if backward else 1), moved=moved)


def bench_pendulum(limits: Limits, seconds: float) -> dict[str, Any]:
    runs, errors, losses, flops = ode_pendulum.pendulum_step()
    results = compare([Contender(*run) for run in runs.items()], seconds=seconds, most_threads=limits.threads)
    last = {f"loss_after_{len(values)}_steps": values[-1] for values in (losses["float64"],)}
    return verdict(results, errors, limits=limits, flops=flops) | last


def cases(limits: Limits, seconds: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """Benchmarks by name; each runs for a small multiple of ``seconds``."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for backward in (False, True):
        what = "forward and backward" if backward else "forward"
        for widths, batch in NETWORKS:
            name = f"tanh {'-'.join(map(str, widths))}, batch {batch}, {STEPS} RK4 steps, {what}"
            found[name] = lambda a=(widths, batch, backward): bench_network(*a, limits, seconds * 2)
        for substeps in ROLLOUTS:
            name = f"SRVP 40-512-512-512-20, batch 128, {substeps} Euler steps, {what}"
            found[name] = lambda a=(substeps, backward): bench_rollout(*a, limits, seconds * 3)
    found["pendulum training step, 2-200-200-2, 25 x 39 RK4 steps"] = lambda: bench_pendulum(limits, seconds * 3)
    return found


def extras(only: str) -> dict[str, Any]:
    """The overhead of a call: one Euler step of a tiny network, without gradients."""
    y0, t = torch.zeros(1, 2), torch.tensor([0.0, 1.0])
    weights, biases = [torch.zeros(2, 2)], [torch.zeros(2)]
    torch.set_num_threads(1)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(300):
            pykernels.mlp_odeint(y0, t, weights, biases, activation="tanh", method="euler")
        times.append((time.perf_counter() - start) / 300)
    overhead = sorted(times)[len(times) // 2]
    print(f"call overhead: {overhead * 1e6:.1f} us")
    return {"call_overhead_s": {"pykernels": overhead}}
