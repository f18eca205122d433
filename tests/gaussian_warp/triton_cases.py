"""Warps for the Triton kernels, and how far they may be off: the same in the interpreter and on a GPU."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels.ops import bilinear_warp, gaussian_warp_rollout
from pykernels.ops.gaussian_warp.reference import Options, Tensors

Values = dict[str, Tensor]
NAN, INFINITY = float("nan"), float("inf")


class Mode(NamedTuple):
    """A warp, or several of each other's results.

    ``variance`` is a number, or "map" (of every sample, step and pixel), "one map", "shared" (of every sample) or
    "shared by steps". ``odd`` puts NaN, infinity, huge displacements and the variance 0 in.
    """

    sizes: tuple[int, ...] = (9, 11)
    form: str = "integrated"
    normalize: str = "window"
    padding_mode: str = "zeros"
    support: int | None = 3
    variance: float | str = 0.6
    batch: int = 1
    channels: int = 1
    steps: int = 1
    max_support: int = 255
    xy: bool = True
    odd: bool = False
    motion: float = 2.0

    def __str__(self) -> str:
        named = zip(self._fields, self, self._field_defaults.values(), strict=True)
        return " ".join(f"{name}={value}" for name, value, default in named if value != default) or "default"

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> Values:
        """Image, flows and, unless it is a number, variance, on the CPU."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        ranks = len(self.sizes)
        found = {
            "image": random(self.batch, self.channels, *self.sizes),
            "flows": self.motion * random(self.batch, self.steps, ranks, *self.sizes),
        }
        shapes = {
            "map": (self.batch, self.steps, 1, *self.sizes),
            "one map": (1, 1, 1, *self.sizes),
            "shared": (self.batch, 1, 1, *[1] * ranks),
            "shared by steps": (1, self.steps, 1, *[1] * ranks),
        }
        if isinstance(self.variance, str):
            found["variance"] = random(*shapes[self.variance]).square() / 8 + 0.05
        if self.odd:
            flow = found["flows"][0, 0, -1].view(-1)
            flow[:5] = torch.tensor([1e9, -3e9, INFINITY, NAN, 1e5 + 0.7])
            if self.variance == "map":
                found["variance"].view(-1)[1::7] = 0
                found["variance"].view(-1)[5] = NAN
        return {name: value.to(dtype) for name, value in found.items()}

    def grad(self, dtype: torch.dtype, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + seed)
        shape = (self.batch, self.steps, self.channels, *self.sizes)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def run(self, values: Values, backend: str) -> Tensor:
        options: dict[str, Any] = {"padding_mode": self.padding_mode, "indexing": "xy" if self.xy else "ij"}
        options["backend"] = backend
        if self.form == "linear":
            return bilinear_warp(values["image"], values["flows"][:, 0], **options).unsqueeze(1)
        options |= {"form": self.form, "normalize": self.normalize, "support": self.support}
        options |= {"max_support": self.max_support, "validate": False}
        variance = values.get("variance", self.variance)
        return gaussian_warp_rollout(values["image"], values["flows"], variance, **options)

    def results(self, values: Values, grad: Tensor, backend: str) -> Values:
        """The frames, and the gradient of every tensor by its name."""
        leaves = {name: t.detach().requires_grad_() for name, t in values.items()}
        frames = self.run(leaves, backend)
        gradients = torch.autograd.grad(frames, list(leaves.values()), grad)
        return {"frames": frames.detach()} | {f"grad of {n}": g for n, g in zip(leaves, gradients, strict=True)}

    def arguments(self, dtype: torch.dtype) -> tuple[Tensors, Options]:
        """What the operator is given."""
        values = self.tensors(dtype)
        linear = self.form == "linear"
        value = 0.0 if isinstance(self.variance, str) or linear else self.variance
        normalize, support = ("none", 2) if linear else (self.normalize, self.support or 0)
        scale = [1.0] * len(self.sizes)
        options = Options(
            value, self.form, normalize, self.padding_mode, support, 1e-4, self.max_support, scale, self.xy
        )
        return Tensors(values["image"], values["flows"], values.get("variance")), options


PADDINGS = ("zeros", "border", "reflection", "periodic")
#: Everything with everything, where windows are narrow.
CHOICES = [
    Mode((5, 7), form, normalize, padding, support, "shared", odd=True)
    for (form, support), normalize, padding in product(
        (("integrated", 3), ("density", 4)), ("none", "window", "inside"), PADDINGS
    )
]
BILINEAR = [
    Mode(sizes, "linear", padding_mode=padding, odd=True, xy=xy)
    for (sizes, xy), padding in product((((13,), True), ((5, 7), False), ((3, 4, 5), True)), PADDINGS)
]
#: Widths that follow from the variance, several patches, several steps, one to three axes, all kinds of variances.
WIDTHS = [
    Mode(support=None),
    Mode((7, 8), support=None, variance="map", normalize="inside", odd=True, steps=2),
    Mode((7, 8), support=None, variance="one map", form="density", batch=2, padding_mode="periodic"),
    Mode((5, 6), support=None, variance="map", max_support=5, channels=2, xy=False),
    Mode((5, 6), normalize="none", support=None, variance="map", max_support=4),
    Mode((5, 6), normalize="none", support=None, variance="map", max_support=1),
    Mode((5, 6), support=None, variance=0.0),
    Mode((5, 6), support=4, variance=0.0, normalize="inside"),
    Mode((5, 6), form="density", support=4, variance=1e-40),
    Mode((37,), support=None, variance="map", normalize="none", odd=True),
    Mode((37,), support=15, variance="shared", padding_mode="reflection", steps=2, batch=2),
    Mode((37,), support=8, variance="map", form="density", normalize="inside", odd=True, channels=3),
    Mode((3, 4, 5), support=3, variance="shared by steps", steps=2, batch=2, channels=2, odd=True),
    Mode((3, 4, 5), support=2, variance="map", form="density", padding_mode="border", xy=False),
    Mode((2, 3, 4), support=7, variance="one map", normalize="none", padding_mode="periodic"),
]
#: One pixel, and sizes about a program's.
SIZES = [
    Mode(sizes, steps=2, variance="shared")
    for sizes in ((1,), (2,), (127,), (128,), (129,), (1, 1), (1, 130), (131, 1), (1, 1, 1), (2, 5, 13))
]
ACCURACY = [
    *CHOICES[::5],
    *BILINEAR[1::4],
    Mode(support=None, variance=1.5),
    Mode((5, 6), support=None, variance="map"),
    Mode((37,), support=None, variance="map", form="density", normalize="inside"),
    Mode((3, 4, 5), variance="shared", padding_mode="reflection"),
]


def error(value: Tensor, expected: Tensor) -> float:
    """``max|value - expected| / max|expected|`` where numbers are expected, infinite if NaN is elsewhere."""
    return pooled_error([value], [expected])


def pooled_error(values: list[Tensor], expected: list[Tensor]) -> float:
    """The same with both maxima taken over several tensors."""
    difference = largest = 0.0
    for v, e in zip(values, expected, strict=True):
        assert v.shape == e.shape
        if not torch.equal(v.isnan(), e.isnan()):
            return math.inf
        v, e = v.double().nan_to_num(), e.double().nan_to_num()
        if e.numel() > 0:
            difference = max(difference, (v - e).abs().max().item())
            largest = max(largest, e.abs().max().item())
    if difference == 0:
        return 0.0
    return difference / largest if largest > 0 else math.inf


def check_float64(mode: Mode, device: str) -> None:
    """Within 1e-12 of the reference, results and gradients."""
    values, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
    expected = mode.results(values, grad, "reference")
    actual = mode.results({name: t.to(device) for name, t in values.items()}, grad.to(device), "triton")
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
        values, grad = mode.tensors(torch.float32, seed), mode.grad(torch.float32, seed)
        for kind, dtype, where, backend in (
            ("exact", torch.float64, "cpu", "reference"),
            ("theirs", torch.float32, device, "reference"),
            ("ours", torch.float32, device, "triton"),
        ):
            moved = {name: t.to(where, dtype) for name, t in values.items()}
            for name, value in mode.results(moved, grad.to(where, dtype), backend).items():
                found.setdefault(name, {}).setdefault(kind, []).append(value.cpu())
    for name, results in found.items():
        ours, theirs = (pooled_error(results[kind], results["exact"]) for kind in ("ours", "theirs"))
        allowed = (3 if name.startswith("grad") else 2) * theirs + 2 * eps
        assert ours <= allowed, f"{mode}: {name} is off by {ours:.1e}, PyTorch by {theirs:.1e}"
