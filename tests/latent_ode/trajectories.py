"""What the tests of mlp_odeint share: the backends, the problems, and the measure of error."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pykernels
from pykernels.ops.latent_ode.mlp import trajectory
from pykernels.ops.latent_ode.reference import ACTIVATIONS, INPUT_MAPS
from pykernels.ops.latent_ode.tableaux import TABLEAUX


class Runner(NamedTuple):
    """A backend, with the CPU capability that it uses if it is the compiled one."""

    backend: str
    capability: str | None = None

    def __str__(self) -> str:
        return self.capability or self.backend

    def use(self) -> str:
        if self.capability is not None:
            pykernels.set_cpu_capability(self.capability)
        return self.backend


COMPILED = [Runner("cpu", capability) for capability in pykernels.cpu_capabilities()]
RUNNERS = [*COMPILED, Runner("reference")]  # Triton has tests of its own


class Problem(NamedTuple):
    """A trajectory to compute: sizes and options.

    ``slope`` is a number, or for silu the shape of a tensor. ``sets`` 0 means weights (out, in), not stacked.
    ``groups`` of a correction with hidden layers ``correction``; the last group has no sample if there are several.
    """

    batch: int = 5
    dim: int = 3
    hidden: tuple[int, ...] = (7,)
    times: int = 3
    substeps: int = 2
    method: str = "rk4"
    activation: str = "tanh"
    slope: float | tuple[int, ...] | None = None
    sets: int = 0
    biases: bool = True
    control: int | None = None
    groups: int = 0
    correction: tuple[int, ...] = (5,)
    reinject: bool = False
    reverse: bool = False
    decreasing: bool = False
    norms: bool = False
    energy: bool | str = False
    time_input: bool = False
    input_map: str = "none"

    def __str__(self) -> str:
        """What differs from the default."""
        default = Problem()
        changed = [f"{n}={v}" for n, v, d in zip(self._fields, self, default, strict=True) if v != d]
        return "-".join(changed).replace(" ", "") or "default"

    @property
    def inputs(self) -> int:
        return self.dim + (self.control or 0) + self.time_input

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        """The differentiable arguments by name, of a size that keeps states of order one."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        t = torch.rand(self.times, generator=g, dtype=torch.float64).cumsum(0) / 2 + 0.1 * torch.arange(self.times)
        tensors = {"y0": normal(self.batch, self.dim), "t": t.flip(0) if self.decreasing else t}

        def network(prefix: str, lead: tuple[int, ...], hidden: tuple[int, ...], scale: float) -> None:
            for i, (n_in, n_out) in enumerate(pairwise((self.inputs, *hidden, self.dim))):
                tensors[f"{prefix}w{i}"] = normal(*lead, n_out, n_in) * scale / n_in**0.5
                if self.biases:
                    tensors[f"{prefix}b{i}"] = normal(*lead, n_out) * 0.3

        growing = self.input_map in ("square", "cube")  # fields of which states must not grow
        network("", (self.sets,) if self.sets else (), self.hidden, 0.1 if growing else 1.0)
        if self.control is not None:
            tensors["control"] = normal(self.times - 1, self.batch, self.control)
        if isinstance(self.slope, tuple):
            tensors["slope"] = 0.5 + torch.rand(self.slope, generator=g, dtype=torch.float64)
        if self.groups:
            network("correction ", (self.groups,), self.correction, 0.1 if growing else 0.5)
            if self.activation == "silu":
                slopes = torch.rand(self.groups, len(self.correction), generator=g, dtype=torch.float64)
                tensors["correction slope"] = 0.5 + slopes
        if self.reinject:
            tensors["injected"] = normal(self.times, self.batch, self.dim)
        return {name: value.to(dtype) for name, value in tensors.items()}

    def arguments(self, tensors: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What :func:`trajectory` takes."""

        def network(prefix: str, hidden: tuple[int, ...]) -> list[Any]:
            layers = range(len(hidden) + 1)
            return [[tensors.get(f"{prefix}{kind}{i}") for i in layers] for kind in "wb"]

        options: dict[str, Any] = {
            "activation": self.activation,
            "method": self.method,
            "substeps": self.substeps,
            "slope": tensors["slope"] if isinstance(self.slope, tuple) else self.slope,
            "time_input": self.time_input,
            "input_map": self.input_map,
            "control": tensors.get("control"),
            "reverse": self.reverse,
            "return_residual_norms": self.norms,
            "return_energy": self.energy,
        }
        sample = torch.arange(self.batch)
        if self.groups:
            options["group"] = sample * 7 % 5 % max(1, self.groups - 1)
            correction = network("correction ", self.correction)
            own = tensors.get("correction slope")
            options["correction"] = correction if own is None else [*correction, own]
        if self.reinject:
            mask = (torch.arange(self.times)[:, None] * 5 + sample * 3) % 7 < 3
            options["reinject"] = (mask, tensors["injected"])
        return (tensors["y0"], tensors["t"], *network("", self.hidden)), options

    def run(
        self, tensors: dict[str, Tensor], function: Callable[..., Any] = trajectory, **changed: Any
    ) -> dict[str, Tensor]:
        """The outputs by name."""
        args, options = self.arguments(tensors)
        outputs = function(*args, **(options | changed))
        names = ["states", *(["norms"] if self.norms else []), *(["energy"] if self.energy else [])]
        return dict(zip(names, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))

    def grads(self, outputs: dict[str, Tensor], seed: int = 1) -> list[Tensor]:
        """Random gradients of the outputs."""
        g = torch.Generator().manual_seed(seed)
        return [torch.randn(v.shape, generator=g, dtype=torch.float64).to(v.dtype) for v in outputs.values()]

    def results(self, tensors: dict[str, Tensor], **changed: Any) -> dict[str, Tensor]:
        """The outputs, and the gradients of all tensors, by name."""
        leaves = {name: value.detach().requires_grad_() for name, value in tensors.items()}
        outputs = self.run(leaves, **changed)
        # Of no interval, norms and energies depend on nothing.
        recorded = {name: value for name, value in outputs.items() if value.requires_grad}
        gradients = torch.autograd.grad(
            list(recorded.values()), list(leaves.values()), self.grads(recorded), materialize_grads=True
        )
        named = {f"grad of {name}": value for name, value in zip(leaves, gradients, strict=True)}
        return {name: value.detach() for name, value in outputs.items()} | named


def error(value: Tensor, expected: Tensor) -> float:
    """``max|value - expected| / max|expected|``; infinite for NaN, or where only zeros are expected and others come."""
    assert value.shape == expected.shape
    value, expected = value.detach().double(), expected.detach().double()
    if expected.numel() == 0 or torch.equal(value, expected):
        return 0.0
    difference, largest = (value - expected).abs().max(), expected.abs().max()
    return float((difference / largest).nan_to_num(torch.inf)) if largest > 0 else torch.inf


def assert_agree(
    actual: dict[str, Tensor], expected: dict[str, Tensor], message: object = "", tolerance: float = 1e-12
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        e = error(value, expected[name])
        assert e <= tolerance, f"{message}: {name} is off by {e:.1e}"


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], message: object = "") -> None:
    """The same bits."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), f"{message}: {name} differs by {error(value, expected[name]):.1e}"


def sample(count: int, seed: int) -> list[Problem]:
    """Problems with several options at once."""
    rng = random.Random(seed)
    problems: list[Problem] = []
    while len(problems) < count:
        hidden = tuple(rng.choice([1, 2, 5, 8, 16, 31, 33, 40, 65]) for _ in range(rng.choice([0, 1, 2, 3])))
        sets = rng.choice([0, 0, 1, 2, 3])
        activation = rng.choice(list(ACTIVATIONS))
        slopes = {
            "silu": [None, 1.3, (), (len(hidden),), (max(sets, 1), len(hidden))],
            "leaky_relu": [None, 0.2, 1.0],
            "elu": [None, 0.3, 1.4],
        }
        problems.append(
            Problem(
                batch=rng.choice([1, 2, 3, 5, 7, 8, 9, 10, 11, 16, 17, 31, 33, 64, 65, 130]),
                dim=rng.choice([1, 2, 3, 5, 8, 17, 20]),
                hidden=hidden,
                times=rng.choice([2, 3, 5]),
                substeps=rng.choice([1, 2, 3]),
                method=rng.choice(list(TABLEAUX)),
                activation=activation,
                slope=rng.choice(slopes.get(activation, [None])),
                sets=sets,
                biases=rng.random() < 0.8,
                control=rng.choice([None, None, 1, 3, 9]),
                groups=rng.choice([0, 0, 1, 3]),
                correction=tuple(rng.choice([1, 6, 17]) for _ in range(rng.choice([0, 1, 2]))),
                reinject=rng.random() < 0.3,
                reverse=rng.random() < 0.3,
                decreasing=rng.random() < 0.4,
                norms=rng.random() < 0.4,
                energy=rng.choice([False, True, "time"]),
                time_input=rng.random() < 0.3,
                input_map=rng.choice(["none", "none", *INPUT_MAPS]),
            )
        )
    return problems


_EVERYTHING = Problem(
    method="rk4_classic",
    activation="silu",
    slope=(2, 2),
    hidden=(9, 6),
    sets=2,
    control=3,
    groups=3,
    reinject=True,
    norms=True,
    energy="time",
    time_input=True,
    input_map="sin",
)
#: A few problems for properties that do not depend on every size: few samples (blocks in rows) and many (in lanes).
FEW = [
    Problem(),
    Problem(batch=70, hidden=(33, 40), activation="softplus", norms=True, energy=True),
    _EVERYTHING,
    _EVERYTHING._replace(batch=67, reverse=True),
]
