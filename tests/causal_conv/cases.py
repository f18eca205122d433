"""What the tests of this family share: the definition, plain PyTorch, the problems, and the measure of error."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import pykernels
from pykernels.backends import OPERATORS

ACTIVATIONS = (None, "relu", "leaky_relu", "tanh", "silu", "gelu")


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
RUNNERS = COMPILED + [
    Runner(backend)
    for backend, implementation in OPERATORS["causal_conv1d"].implementations.items()
    if backend != "cpu" and implementation.can_run(torch.zeros(1, 1, 1)).ok
]


class Case(NamedTuple):
    """A convolution to compute: sizes and options."""

    batch: int
    in_channels: int
    out_channels: int
    length: int
    kernel_size: int
    dilation: int = 1
    activation: str | None = None
    negative_slope: float = 0.01
    bias: bool = True
    residual: bool = True

    def __str__(self) -> str:
        with_ = f"{'b' if self.bias else ''}{'r' if self.residual else ''}"
        sizes = f"B{self.batch}-C{self.in_channels}-O{self.out_channels}-T{self.length}-K{self.kernel_size}"
        return f"{sizes}-d{self.dilation}-{self.activation}-{self.negative_slope}-{with_}"

    @property
    def flops(self) -> int:
        taps = min(self.kernel_size, (self.length - 1) // self.dilation + 1)
        return 2 * self.batch * self.in_channels * self.out_channels * self.length * taps

    def options(self) -> dict[str, object]:
        return {"dilation": self.dilation, "activation": self.activation, "negative_slope": self.negative_slope}

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """x, weight and, where the case has them, bias and residual. Outputs are of order one, where tanh is curved."""
        g = torch.Generator().manual_seed(seed)
        fan_in = self.in_channels * self.kernel_size
        shapes = {
            "x": (self.batch, self.in_channels, self.length),
            "weight": (self.out_channels, self.in_channels, self.kernel_size),
        }
        if self.bias:
            shapes["bias"] = (self.out_channels,)
        if self.residual:
            shapes["residual"] = (self.batch, self.out_channels, self.length)
        tensors = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
        tensors["weight"] *= fan_in**-0.5
        return {name: t.to(dtype) for name, t in tensors.items()}

    def grad(self, dtype: torch.dtype, seed: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(1000 + seed)
        return torch.randn(self.batch, self.out_channels, self.length, generator=g, dtype=torch.float64).to(dtype)


def activate(z: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    if activation is None:
        return z
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    return {"relu": torch.relu, "tanh": torch.tanh, "silu": F.silu, "gelu": F.gelu}[activation](z)


def definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int,
    activation: str | None,
    negative_slope: float,
    residual: Tensor | None = None,
) -> Tensor:
    """The equation tap by tap, without torch's convolution."""
    length = x.shape[2]
    z = x.new_zeros(x.shape[0], weight.shape[0], length)
    for k in range(weight.shape[2]):
        shift = (weight.shape[2] - 1 - k) * dilation
        if shift < length:
            tap = torch.einsum("oc,bct->bot", weight[:, :, k], x[:, :, : length - shift])
            z = z + F.pad(tap, (shift, 0))
    if bias is not None:
        z = z + bias[:, None]
    y = activate(z, activation, negative_slope)
    return y if residual is None else y + residual


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int,
    activation: str | None,
    negative_slope: float,
    residual: Tensor | None = None,
) -> Tensor:
    """What users write today. Taps before the start of the data are cut off, or the padding would not fit in memory."""
    taps = min(weight.shape[2], (x.shape[2] - 1) // dilation + 1)
    padded = F.pad(x, ((taps - 1) * dilation, 0))
    z = F.conv1d(padded, weight[:, :, weight.shape[2] - taps :], bias, dilation=dilation)
    y = activate(z, activation, negative_slope)
    return y if residual is None else y + residual


def results(function: Callable[..., Tensor], tensors: dict[str, Tensor], grad: Tensor, **options) -> dict[str, Tensor]:
    """The output as ``"y"``, and the gradient of every tensor by its name."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = function(**leaves, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), grad, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def error(value: Tensor, expected: Tensor) -> float:
    """``max|value - expected| / max|expected|``; infinite where only zeros are expected and something else comes."""
    return pooled_error([value], [expected])


def pooled_error(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
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


def assert_agree(actual: dict[str, Tensor], expected: dict[str, Tensor], message: object = "") -> None:
    """float64: outputs to 1e-12, gradients to 1e-10."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        e = error(value, expected[name])
        assert e <= (1e-12 if name == "y" else 1e-10), f"{message}: {name} is off by {e:.1e}"


def _sample(count: int, seed: int) -> list[Case]:
    rng = random.Random(seed)
    cases: list[Case] = []
    while len(cases) < count:
        kernel_size = rng.choice([1, 2, 3, 3, 3, 5, 64])
        some = [1, 2, 7, 15, 16, 17, 31, 47, 48, 49, 101, 127, 383, 384, 385, 997, 5000]
        length = max(1, rng.choice([kernel_size - 1, kernel_size, kernel_size + 1, *some]))
        some = [1, 1, 2, 3, 16, 63, 64, 65, 512, 2**40]
        channels = [1, 2, 3, 5, 7, 8, 9, 13, 40, 41]
        case = Case(
            rng.choice([1, 1, 3, 10]),
            rng.choice(channels),
            rng.choice(channels),
            length,
            kernel_size,
            max(1, rng.choice([*some, length - 1, length, length + 1])),
            rng.choice(ACTIVATIONS),
            rng.choice([0.0, 0.01, 1.0, 2.5]),
            rng.random() < 0.5,
            rng.random() < 0.5,
        )
        if case.flops < 3e7:
            cases.append(case)
    return cases


#: Problems at the edges of the kernels' tiles, then a random sample.
CASES = [
    Case(1, 1, 1, 1, 1, bias=False, residual=False),
    Case(1, 1, 1, 1, 64, 2**40, "tanh"),
    Case(3, 40, 40, 1, 3, 512, "leaky_relu"),
    Case(10, 40, 40, 150, 3, 1, "leaky_relu"),
    Case(10, 40, 40, 150, 3, 64, "leaky_relu", residual=False),
    Case(2, 40, 41, 385, 3, 63, "relu"),
    Case(2, 41, 40, 384, 3, 64, "tanh"),
    Case(2, 40, 13, 383, 3, 65, "tanh", residual=False),
    Case(1, 13, 9, 1500, 3, 512, "leaky_relu", 2.5),
    Case(10, 5, 7, 5000, 3, 16, "leaky_relu"),  # more groups of tiles than partial weight gradients
    Case(1, 1, 3, 5000, 64, 63, "tanh"),
    Case(1, 2, 1, 5000, 64, 1, "relu"),
    Case(33, 3, 8, 17, 2, 5, "relu"),  # an odd number of samples in groups of several
    Case(300, 2, 3, 9, 3, 2, "tanh"),
    Case(2, 3, 200, 50, 3, 2, "leaky_relu", 0.0),
    Case(2, 200, 3, 50, 3, 2, "leaky_relu", 1.0),
    Case(3, 700, 2, 60, 2, 70, "relu"),  # rows too long for a panel of the usual length
    Case(3, 2, 700, 60, 2, 70, "relu"),
    *_sample(140, seed=0),
]

#: A few of them, for properties that do not depend on every size.
FEW = [
    Case(2, 5, 7, 97, 3, 4, "tanh"),
    Case(3, 9, 8, 385, 3, 130, "leaky_relu"),
    Case(1, 41, 13, 17, 5, 2, None, residual=False),
    Case(2, 3, 2, 1000, 2, 700, "relu", bias=False),
    Case(2, 40, 40, 150, 3, 64, "leaky_relu", residual=False),
]
