"""Trajectories for the Triton kernels, and how far they may be off: the same in the interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pykernels.backends import OPERATORS
from pykernels.ops.latent_ode.mlp import trajectory
from pykernels.ops.latent_ode.reference import Options, Tensors

Values = dict[str, Tensor]


class Mode(NamedTuple):
    """A problem: sizes and options.

    ``hidden`` are the widths between input and output; ``sets`` 0 means weights (out, in), not stacked.
    """

    batch: int = 5
    dim: int = 3
    hidden: tuple[int, ...] = (7, 6)
    times: int = 3
    activation: str = "tanh"
    method: str = "rk4_classic"
    substeps: int = 2
    sets: int = 0
    controls: int = 0
    groups: int = 0
    correction: tuple[int, ...] = (5,)
    reinject: bool = False
    norms: bool = False
    energy: bool | str = False
    time_input: bool = False
    input_map: str = "none"
    falling: bool = False
    max_memory: int | None = None

    def __str__(self) -> str:
        named = zip(self._fields, self, self._field_defaults.values(), strict=True)
        differing = [f"{name}={value}" for name, value, default in named if value != default]
        return " ".join(differing) or "default"

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> Values:
        """The differentiable arguments, on the CPU. States stay of order one."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        found = {"y0": random(self.batch, self.dim)}
        t = torch.rand(self.times, generator=generator, dtype=torch.float64) + 0.5
        t = t.cumsum(0) * 0.3
        found["t"] = t.flip(0) if self.falling else t
        inputs = self.dim + self.controls + self.time_input
        networks = [("", (self.sets,) if self.sets else (), self.hidden)]
        if self.groups:
            networks.append(("correction ", (self.groups,), self.correction))
        for name, count, hidden in networks:
            widths = (inputs, *hidden, self.dim)
            for i, (n, m) in enumerate(pairwise(widths)):
                found[f"{name}weight {i}"] = random(*count, m, n) / n**0.5
                found[f"{name}bias {i}"] = random(*count, m) / 2
            if self.activation == "silu":
                found[f"{name}slope"] = 1 + random(*count, len(hidden)) / 4
        if self.controls:
            found["control"] = random(self.times - 1, self.batch, self.controls)
        if self.reinject:
            found["injected"] = random(self.times, self.batch, self.dim)
        return {name: value.to(dtype) for name, value in found.items()}

    def grads(self, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """Of states, norms and energy."""
        generator = torch.Generator().manual_seed(1000 + seed)
        shapes = [(self.times, self.batch, self.dim), (self.times - 1, self.batch), (self.times - 1, self.batch)]
        kept = [True, self.norms, bool(self.energy)]
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape, keep in zip(shapes, kept, strict=True)
            if keep
        ]

    def choices(self, device: str = "cpu") -> Values:
        """The groups of the samples, and which states are injected."""
        generator = torch.Generator().manual_seed(7)
        found = {}
        if self.groups:
            found["group"] = torch.randint(self.groups, (self.batch,), generator=generator).to(device)
        if self.reinject:
            found["mask"] = (torch.rand(self.times, self.batch, generator=generator) < 0.4).to(device)
        return found

    def run(self, tensors: Values, backend: str, choices: Values | None = None, **changed: Any) -> tuple[Tensor, ...]:
        """States, and norms and energy where the mode has them."""
        if choices is None:
            choices = self.choices(str(tensors["y0"].device))
        options: dict[str, Any] = {
            "activation": self.activation,
            "method": self.method,
            "substeps": self.substeps,
            "slope": tensors.get("slope", 0.3 if self.activation in ("leaky_relu", "elu") else None),
            "control": tensors.get("control"),
            "return_residual_norms": self.norms,
            "return_energy": self.energy,
            "time_input": self.time_input,
            "input_map": self.input_map,
            "max_memory": self.max_memory,
            "backend": backend,
        }
        if self.groups:
            layers = range(len(self.correction) + 1)
            correction: list[Any] = [[tensors[f"correction {kind} {i}"] for i in layers] for kind in ("weight", "bias")]
            if "correction slope" in tensors:
                correction.append(tensors["correction slope"])
            options["correction"] = correction
            options["group"] = choices["group"]
        if self.reinject:
            options["reinject"] = (choices["mask"], tensors["injected"])
        layers = range(len(self.hidden) + 1)
        weights, biases = ([tensors[f"{kind} {i}"] for i in layers] for kind in ("weight", "bias"))
        results = trajectory(tensors["y0"], tensors["t"], weights, biases, **{**options, **changed})
        return results if isinstance(results, tuple) else (results,)

    def results(self, tensors: Values, grads: list[Tensor], backend: str, **changed: Any) -> Values:
        """States, norms and energy by name, and the gradient of every tensor by its name."""
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        outputs = self.run(leaves, backend, **changed)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), grads, materialize_grads=True)
        names = ["states", *["norms"] * self.norms, *["energy"] * bool(self.energy)]
        found = {name: value.detach() for name, value in zip(names, outputs, strict=True)}
        return found | {f"grad of {name}": g for name, g in zip(leaves, gradients, strict=True)}


METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4", "rk4_classic", "ssp_rk3")

#: Every option alone and together with others; narrow networks.
OPTIONS = [
    *(Mode(method=method, time_input=True, energy="time", norms=True) for method in METHODS),
    *(
        Mode(activation=activation, method="heun2", groups=2)
        for activation in ("relu", "leaky_relu", "softplus", "silu", "elu", "sin")
    ),
    *(
        Mode(input_map=m, controls=2, method="heun3", time_input=True, falling=True)
        for m in ("square", "cube", "sin", "cos", "tanh")
    ),
    Mode(hidden=(), method="midpoint"),
    Mode(hidden=(), activation="silu", sets=1, method="midpoint"),
    Mode(hidden=(), groups=2, correction=(), method="euler"),
    Mode(hidden=(4,), sets=3, times=5, method="midpoint"),
    Mode(sets=7, times=3, substeps=2, method="euler", activation="silu"),
    Mode(times=5, controls=2, reinject=True, method="euler", substeps=3, energy=True),
    Mode(groups=3, correction=(4, 5, 6), batch=37, activation="silu", sets=2, times=4, method="euler", norms=True),
    Mode(groups=40, batch=4, substeps=1, method="midpoint", controls=1, time_input=True, reinject=True),
    Mode(falling=True, energy="time", norms=True, method="rk4"),
]

#: Sizes at the edges of blocks and tiles; 65 and more make a network wide.
SIZES = [
    *(Mode(batch=batch, method="midpoint", substeps=1) for batch in (1, 15, 16, 17, 33)),
    *(Mode(dim=dim, controls=1, method="heun2", substeps=1) for dim in (1, 17, 65)),
    *(Mode(hidden=(width, 5), method="midpoint", substeps=1) for width in (1, 16, 17, 64, 65)),
    Mode(hidden=(65, 3, 130), method="rk4", substeps=1, controls=17, norms=True, energy="time", time_input=True),
    Mode(hidden=(20, 70), activation="silu", input_map="cube", method="heun2", groups=2, correction=(66,), sets=2),
    Mode(hidden=(70,), activation="sin", method="euler", reinject=True, batch=17, controls=2),
    Mode(hidden=(66,), dim=20, activation="softplus", method="euler", controls=20),
    Mode(times=1),
    Mode(times=2, substeps=1, method="euler"),
]

#: What is computed again in pieces of one, two and some sub-steps, with every thing that a piece may cut through.
PIECES = [
    Mode(max_memory=0, time_input=True, norms=True, energy="time", method="heun2"),
    Mode(max_memory=0, sets=3, times=4, method="euler"),
    Mode(max_memory=100_000, times=6, controls=2, substeps=3, reinject=True, method="midpoint", input_map="cube"),
    Mode(max_memory=600_000, times=5, sets=3, groups=2, activation="silu", method="midpoint"),
    Mode(max_memory=100_000, times=4, hidden=(66,), method="euler"),
]


def arguments_of(mode: Mode, dtype: torch.dtype) -> tuple[Tensors, Options]:
    """What the public function makes of a mode's arguments."""
    seen: list[tuple[Tensors, Options]] = []

    def run(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor, Tensor]:
        seen.append((tensors, options))
        return tensors.y0, tensors.y0, tensors.y0

    implementations = OPERATORS["mlp_odeint"].implementations
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(implementations, "reference", replace(implementations["reference"], run=run))
        mode.run(mode.tensors(dtype), "reference")
    return seen[0]


def error(value: Tensor, expected: Tensor) -> float:
    """``max|value - expected| / max|expected|``; infinite where only zeros are expected and something else comes."""
    return pooled_error([value], [expected])


def pooled_error(values: list[Tensor], expected: list[Tensor]) -> float:
    """The same with both maxima taken over several tensors."""
    difference = largest = 0.0
    for v, e in zip(values, expected, strict=True):
        assert v.shape == e.shape
        if e.numel() > 0:
            d = (v.double() - e.double()).abs().max().item()
            difference = max(difference, d if d == d else float("inf"))
            largest = max(largest, e.double().abs().max().item())
    if difference == 0:
        return 0.0
    return difference / largest if largest > 0 else float("inf")


def check_float64(mode: Mode, device: str) -> None:
    """Within 1e-12 of the reference, results and gradients."""
    tensors, grads = mode.tensors(torch.float64), mode.grads(torch.float64)
    expected = mode.results(tensors, grads, "reference")
    moved = {name: t.to(device) for name, t in tensors.items()}
    actual = mode.results(moved, [g.to(device) for g in grads], "triton")
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        e = error(value.cpu(), expected[name])
        assert e <= 1e-12, f"{name} is off by {e:.1e}"


def check_accuracy(mode: Mode, device: str, seeds: int) -> None:
    """float32: results at most twice, gradients three times as far from float64 as PyTorch in float32, and 2 eps.

    Errors are pooled over draws of the inputs.
    """
    eps = torch.finfo(torch.float32).eps
    found: dict[str, dict[str, list[Tensor]]] = {}
    for seed in range(seeds):
        tensors, grads = mode.tensors(torch.float32, seed), mode.grads(torch.float32, seed)
        for kind, dtype, where, backend in (
            ("exact", torch.float64, "cpu", "reference"),
            ("theirs", torch.float32, device, "reference"),
            ("ours", torch.float32, device, "triton"),
        ):
            moved = {name: t.to(where, dtype) for name, t in tensors.items()}
            results = mode.results(moved, [g.to(where, dtype) for g in grads], backend)
            for name, value in results.items():
                found.setdefault(name, {}).setdefault(kind, []).append(value.cpu())
    for name, values in found.items():
        ours, theirs = (pooled_error(values[kind], values["exact"]) for kind in ("ours", "theirs"))
        allowed = (3 if name.startswith("grad") else 2) * theirs + 2 * eps
        assert ours <= allowed, f"{mode}: {name} is off by {ours:.1e}, PyTorch by {theirs:.1e}"
