"""GPU benchmarks of trajectories of MLP fields: small networks over many steps, and a wide one with control."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_cases import Case
from torch import Tensor

import pykernels

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


class Trajectory(NamedTuple):
    """A field and its steps: ``widths`` from the inputs, controls among them, to the state."""

    batch: int
    widths: tuple[int, ...]
    activation: str
    method: str  # rk4_classic or euler
    intervals: int
    substeps: int = 1

    @property
    def controls(self) -> int:
        return self.widths[0] - self.widths[-1]

    @property
    def stages(self) -> int:
        return 4 if self.method == "rk4_classic" else 1

    def __str__(self) -> str:
        steps = f"{self.intervals * self.substeps} {self.method}"
        return f"{'-'.join(map(str, self.widths))} B={self.batch} {steps}"

    def flops(self, backward: bool) -> int:
        """Of the products; the backward has twice as many as the forward."""
        per_evaluation = 2 * self.batch * sum(n * m for n, m in pairwise(self.widths))
        return per_evaluation * self.intervals * self.substeps * self.stages * (3 if backward else 1)

    def bytes_moved(self, backward: bool) -> int:
        """Parameters, first state and control are read, states written; their gradients go the other way."""
        parameters = sum((n + 1) * m for n, m in pairwise(self.widths))
        inputs = parameters + self.batch * (self.widths[-1] + self.intervals * self.controls)
        states = self.batch * (self.intervals + 1) * self.widths[-1]
        return 4 * (inputs + states) * (2 if backward else 1)

    def tensors(self, device: str) -> list[Tensor]:
        """y0, any control, weights, biases, in float64."""
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)

        weights = [random(m, n) / n**0.5 for n, m in pairwise(self.widths)]
        biases = [random(m) / 2 for m in self.widths[1:]]
        control = [random(self.intervals, self.batch, self.controls)] if self.controls else []
        return [random(self.batch, self.widths[-1]), *control, *weights, *biases]


def split(
    case: Trajectory, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, Sequence[Tensor], Sequence[Tensor]]:
    y0, *rest = tensors
    control = rest.pop(0) if case.controls else None
    layers = len(rest) // 2
    return y0, control, rest[:layers], rest[layers:]


def take_step(case: Trajectory, h: float, y: Tensor, z: Tensor | None, *parameters: Tensor) -> Tensor:
    """One step as users write it today."""
    layers = len(parameters) // 2

    def f(y: Tensor) -> Tensor:
        a = y if z is None else torch.cat((y, z), 1)
        for i, (w, b) in enumerate(zip(parameters[:layers], parameters[layers:], strict=True)):
            a = F.linear(a, w, b)
            if i < layers - 1:
                a = ACTIVATIONS[case.activation](a)
        return a

    k1 = f(y)
    if case.method == "euler":
        return y + h * k1
    k2 = f(y + h / 2 * k1)
    k3 = f(y + h / 2 * k2)
    k4 = f(y + h * k3)
    return y + h / 6 * (k1 + 2 * (k2 + k3) + k4)


def loop(step: Callable[..., Tensor], case: Trajectory, *tensors: Tensor) -> Tensor:
    y, control, weights, biases = split(case, tensors)
    h = 1 / (case.intervals * case.substeps)
    states = [y]
    for i in range(case.intervals):
        z = None if control is None else control[i]
        for _ in range(case.substeps):
            y = step(case, h, y, z, *weights, *biases)
        states.append(y)
    return torch.stack(states)


def ours(case: Trajectory, t: Tensor, *tensors: Tensor) -> Tensor:
    y0, control, weights, biases = split(case, tensors)
    states: Tensor = pykernels.mlp_odeint(
        y0,
        t,
        weights,
        biases,
        activation=case.activation,
        method=case.method,
        substeps=case.substeps,
        control=control,
    )
    return states


def run(function: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor | None) -> list[Tensor]:
    y = function(*tensors)
    return [y.detach()] if grad is None else [y.detach(), *torch.autograd.grad(y, tensors, grad)]


def graphed(function: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """The same work on the same tensors as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def prepare(case: Trajectory, backward: bool, device: str) -> tuple[dict[str, Any], list[Tensor]]:
    exact = case.tensors(device)
    doubles = [t.requires_grad_(backward) for t in exact]
    generator = torch.Generator(device).manual_seed(1)
    shape = (case.intervals + 1, case.batch, case.widths[-1])
    grad = torch.randn(shape, generator=generator, dtype=torch.float64, device=device) if backward else None
    expected = run(partial(loop, take_step, case), doubles, grad)
    tensors = [t.detach().float().requires_grad_(backward) for t in exact]
    grad = None if grad is None else grad.float()
    t = torch.linspace(0, 1, case.intervals + 1, device=device)
    eager = partial(run, partial(loop, take_step, case), tensors, grad)
    # Of a step, not of the loop: unrolled, hundreds of evaluations take minutes to compile.
    compiled = torch.compile(take_step, dynamic=False)
    runs = {
        "pykernels": partial(run, partial(ours, case, t), tensors, grad),
        "eager": eager,
        "compiled steps": partial(run, partial(loop, compiled, case), tensors, grad),
    }
    if device == "cuda":
        runs["graphed eager"] = graphed(eager)
    return runs, expected


TRAJECTORIES = [
    Trajectory(1024, (20, 64, 64, 20), "tanh", "rk4_classic", 100),
    *(Trajectory(batch, (2, 200, 200, 2), "tanh", "rk4_classic", 100) for batch in (25, 4096)),
    *(Trajectory(batch, (40, 512, 512, 512, 20), "relu", "euler", 19, 2) for batch in (128, 1600)),
]


def cases() -> Iterator[Case]:
    for case in TRAJECTORIES:
        for backward in (False, True):
            name = f"{case} float32{', backward' if backward else ''}"
            cost = (case.flops(backward), case.bytes_moved(backward))
            yield Case(name, torch.float32, *cost, partial(prepare, case, backward))
