"""Kernels for the Triton backend, and how far they may be off: the same in the interpreter and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels.ops.ntk_gram import Activation, ntk_diag, ntk_gram, ntk_matvec, ntk_witness

Values = dict[str, Tensor]
#: What a case computes: Gram matrices of both kinds, one of one set, a product, and a witness with its gradient.
FUNCTIONS = ("gram", "symmetric", "matvec", "witness")


class Case(NamedTuple):
    """A network between two sets of points, among them equal, opposite and nearly equal ones."""

    activation: tuple[str | Activation, ...] = ("relu", "relu")
    n: int = 5
    m: int = 7
    d: int = 3
    kind: str = "ntk"
    batch: int = 1
    precision: str = "float32"
    bias: bool = True
    columns: int = 1
    backward: tuple[str, ...] = ("gram",)

    def __str__(self) -> str:
        values = (v if f != "activation" else "-".join(map(str, v)) for f, v in zip(self._fields, self, strict=True))
        named = zip(self._fields, values, self._field_defaults.values(), strict=True)
        return " ".join(f"{name}={value}" for name, value, default in named if value != default) or "default"

    def values(self, dtype: torch.dtype, seed: int = 0) -> Values:
        """Points x and z, scales, weights v of products and a of witnesses, and of a Gram matrix; on the CPU."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        x, z = random(self.batch, self.n, self.d), random(self.batch, self.m, self.d)
        for i, change in enumerate((lambda p: p, lambda p: -p, lambda p: 2 * p, lambda p: 1e-3 - p)):
            if i < min(self.n, self.m):
                z[:, i] = change(x[:, i])
        layers = len(self.activation) + 1
        found = {
            "x": x,
            "z": z,
            "weight_std": 0.8 + random(layers).abs() / 2,
            "bias_std": random(layers).abs() / 2 * self.bias,
            "v": random(self.batch, self.m, self.columns),
            "a": random(self.batch, self.m),
            "w": random(self.batch, self.n, self.m),
            "symmetric": random(self.batch, self.n, self.n),
        }
        return {name: t if name.endswith("std") else t.to(dtype) for name, t in found.items()}

    def options(self, backend: str, kind: str | None = None) -> dict[str, Any]:
        kind = self.kind if kind is None else kind
        return {"activation": self.activation, "kind": kind, "precision": self.precision, "backend": backend}

    def forward(self, values: Values, backend: str, functions: Collection[str] = FUNCTIONS) -> Values:
        x, z, v, a = (values[name] for name in "xzva")
        options = self.options(backend) | {name: values[name] for name in ("weight_std", "bias_std")}
        found = {}
        if "gram" in functions:
            found["nngp"], found["ntk"] = ntk_gram(x, z, **options | {"kind": "both"})
        if "symmetric" in functions:
            found["symmetric"] = ntk_gram(x, **options)
        if "matvec" in functions:
            found["matvec"] = ntk_matvec(x, z, v, **options)
        if "witness" in functions:
            found["value"], found["gradient"] = ntk_witness(x, z, a, **options)
        return found

    def gradients(self, values: Values, backend: str) -> Values:
        """Of points, scales and factors from a Gram matrix, a symmetric one, and a product."""
        fixed = ("w", "symmetric", "a")
        leaves = {name: t if name in fixed else t.detach().requires_grad_() for name, t in values.items()}
        x, z, v = (leaves[name] for name in "xzv")
        options = self.options(backend) | {name: leaves[name] for name in ("weight_std", "bias_std")}
        totals = {
            "gram": lambda: (ntk_gram(x, z, **options) * leaves["w"]).sum(),
            "symmetric": lambda: (ntk_gram(x, **options) * leaves["symmetric"]).sum(),
            "matvec": lambda: (ntk_matvec(x, z, v, **options) * leaves["w"][..., : self.columns]).sum(),
        }
        found = {}
        for name in self.backward:
            asked = [key for key in leaves if key not in fixed and (name == "matvec" or key != "v")]
            asked = [key for key in asked if name != "symmetric" or key != "z"]
            gradients = torch.autograd.grad(totals[name](), [leaves[key] for key in asked])
            found |= {f"{name} by {key}": g for key, g in zip(asked, gradients, strict=True)}
        return found

    def results(self, values: Values, backend: str, functions: Collection[str] = FUNCTIONS) -> Values:
        return self.forward(values, backend, functions) | self.gradients(values, backend)


SIN = Activation("sin", frequency=0.7, phase=0.3, amplitude=1.3)
#: All activations; those whose layers keep the angles near pi, in front of one that needs them; sums.
NETWORKS = [
    Case(()),
    Case(("identity", "relu"), bias=False, backward=("matvec",)),
    Case(("relu", "relu", "relu"), backward=("gram", "symmetric", "matvec")),
    Case((Activation("leaky_relu", slope=0.2, amplitude=0.7), "abs"), kind="nngp", backward=("symmetric",)),
    Case(("erf", "relu"), backward=("matvec",)),
    Case(("sigmoid_like", Activation("erf", amplitude=2.0, frequency=0.5, offset=0.3)), backward=("symmetric",)),
    Case(("gelu", Activation("gelu", amplitude=0.6))),
    Case(("sin", "relu"), kind="nngp", backward=("matvec",)),
    Case(("cos", SIN), backward=("symmetric",)),
    Case((Activation("rbf", gamma=0.4), "rbf"), kind="nngp"),
    Case(("relu+sin", "erf+abs+identity", "rbf+gelu"), backward=("symmetric",)),
]
#: One point, sizes about a tile's, components about a block's, batches, several columns.
SIZES = [
    Case(("relu",), n=1, m=1, d=1),
    Case(("erf",), n=17, m=33, d=7, columns=3, backward=("matvec",)),
    Case(("relu",), n=31, m=32, d=8, kind="nngp", batch=2),
    Case(("rbf",), n=33, m=20, d=15, columns=17, backward=("matvec",)),
    Case(("relu",), n=16, m=33, d=70, columns=2, backward=("symmetric",)),
]


def error(value: Tensor, expected: Tensor) -> float:
    """``max|value - expected| / max|expected|``, infinite unless NaN is where it is expected."""
    assert value.shape == expected.shape
    if not torch.equal(value.isnan(), expected.isnan()):
        return math.inf
    value, expected = value.double().nan_to_num(), expected.double().nan_to_num()
    difference = (value - expected).abs().max().item() if value.numel() > 0 else 0.0
    if difference == 0:
        return 0.0
    largest = expected.abs().max().item()
    return difference / largest if largest > 0 else math.inf


def check_float64(case: Case, device: str) -> None:
    """Within rounding of the reference and its derivatives by autograd: 1e-14 seen in the interpreter.

    Of the matrix of one set and of the product where the case has their derivatives: the interpreter is slow.
    """
    bound = 1e-13 if device == "cpu" else 1e-11  # a GPU adds up in other orders, and has functions of its own
    values, functions = case.values(torch.float64), {"gram", "witness", *case.backward}
    expected = case.results(values, "reference", functions)
    actual = case.results({name: t.to(device) for name, t in values.items()}, "triton", functions)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        e = error(value.cpu(), expected[name])
        assert e <= bound, f"{name} is off by {e:.1e}"


def pairs(d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random, equal and opposite points, and points at 1e-5 to 1e-2 of each other."""
    generator = torch.Generator().manual_seed(d)
    x, noise = (torch.randn(24, d, generator=generator) for _ in range(2))
    z = torch.randn(24, d, generator=generator)
    z[:4], z[4:8] = x[:4], -x[4:8]
    for i in range(8, 20):
        distance = 10.0 ** (-5 + (i - 8) % 4) * x[i].norm() / noise[i].norm()
        z[i] = (1 if i < 16 else -1) * x[i] + distance * noise[i]
    return x.to(dtype), z.to(dtype)


def check_accuracy(d: int, activation: tuple[str, ...], device: str, bias: float = 0.0) -> None:
    """float32 within 1e-6 sqrt(k(x, x) k(z, z)) of float64 on the same points."""
    x, z = pairs(d, torch.float32)
    options: dict[str, Any] = {"activation": activation, "weight_std": math.sqrt(2), "bias_std": bias, "kind": "both"}
    exact = ntk_gram(x.double(), z.double(), backend="reference", **options)
    found = ntk_gram(x.to(device), z.to(device), backend="triton", **options)
    sizes = [ntk_diag(points.double(), **options) for points in (x, z)]
    for kind, name in enumerate(("nngp", "ntk")):
        scale = (sizes[0][kind][:, None] * sizes[1][kind]).sqrt()
        e = ((found[kind].cpu() - exact[kind]).abs() / scale).max().item()
        assert e <= 1e-6, f"{name} is off by {e:.1e}"
