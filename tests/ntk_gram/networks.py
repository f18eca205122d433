"""What the tests of the kernels share: networks, points, the measure of error, and kernels computed to many digits."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import mpmath
import torch
from mpmath import mp
from torch import Tensor

from pykernels import NTK, Activation


class Network(NamedTuple):
    """Arguments of :class:`pykernels.NTK`."""

    depth: int = 3
    activation: Any = "relu"
    weight_std: Any = 1.0
    bias_std: Any = 0.0
    output_bias: bool = False

    def __str__(self) -> str:
        def text(value: Any) -> str:
            return "+".join(map(text, value)) if isinstance(value, list) else str(value)

        return "-".join(text(v) for v in self)

    def kernels(self, **options: Any) -> NTK:
        return NTK(*self, **options)


def A(name: str, **parameters: float) -> Activation:  # noqa: N802
    return Activation(name, **parameters)


#: Every activation, with and without a bias, at several depths and scales.
NETWORKS = [
    Network(3, "relu", 1.0, 1.0),
    Network(3, "relu"),
    Network(1, A("relu", amplitude=1.4), 1.2, 0.3, True),
    Network(10, "relu", 2**0.5, 0.1),
    Network(2, A("leaky_relu", slope=0.2), 1.3, [0.5, 0.0]),
    Network(2, A("leaky_relu", slope=1.5, amplitude=0.7), 1.0),
    Network(3, "abs", 0.8, 0.2),
    Network(3, "erf", 1.5, 0.3),
    Network(2, A("erf", amplitude=1.3, frequency=0.6, offset=0.4), 1.1),
    Network(3, "sigmoid_like", 1.0, 0.2),
    Network(2, "gelu", 1.3, 0.2, True),
    Network(2, A("sin", frequency=1.7, phase=0.4), 1.0, 0.3),
    Network(2, "sin"),
    Network(2, A("cos", amplitude=1.2), [0.9, 1.1, 1.0], 0.5),
    Network(1, A("rbf", gamma=0.5)),
    Network(2, A("rbf", gamma=0.3, amplitude=1.1), 1.2, 0.4),
    Network(2, "identity", 1.2, 0.5),
    Network(3, "relu+sin", 0.9, 0.4),
    Network(4, ["gelu", "relu+erf", "identity", A("cos") + A("abs", amplitude=0.5)], [1, 1.1, 0.9, 1.2, 0.8], 0.3),
    Network(0, "relu", 1.3, [], False),
    Network(0, "relu", 1.3, [0.6], True),
]
#: A few that together go through most of the code.
FEW = [NETWORKS[0], NETWORKS[1], NETWORKS[7], NETWORKS[10], NETWORKS[18]]


def ids(networks: list[Network]) -> list[str]:
    return list(map(str, networks))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers in every dtype, which float32 holds."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1009 * seed + sum(shape))).to(dtype)


def pairs(d: int, n: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points (n, d), and others: equal to them, nearly so, opposite, nearly that, on the same ray, and anywhere."""
    x = normal(n, d, seed=seed)
    near = [x + size * normal(n, d, seed=seed + i) for i, size in enumerate((1e-5, 1e-4, 1e-3, 1e-2), 1)]
    y = torch.cat([x, *near, -x, -near[2], 1e-5 * x, 3 * x, normal(n, d, seed=seed + 9)])
    return x, y.float().double()


def size_of(network: Network, x: Tensor, y: Tensor, kind: str = "ntk") -> Tensor:
    """sqrt(k(x, x) k(y, y)), which errors are relative to: (..., N, M)."""
    kernels = network.kernels()
    own = [kernels.diag(t.double(), kind=kind) for t in (x, y)]
    return (own[0].unsqueeze(-1) * own[1].unsqueeze(-2)).sqrt()


def error(actual: Tensor, expected: Tensor, size: Tensor | float | None = None) -> float:
    """Largest difference relative to ``size``, or to the largest number expected; NaN must be in the same places."""
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    if expected.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - expected.detach().double()).nan_to_num(0.0).abs()
    if size is None:
        size = max(expected.detach().double().nan_to_num(0.0).abs().max().item(), 1e-300)
    return float((difference / size).max())


# Kernels by the formulas as they are printed, in so many digits that their cancellation does no harm.


def _relu(q: Any, r: Any, c: Any) -> tuple[Any, Any]:
    root = mpmath.sqrt(q * r)
    if root == 0:
        return mp.mpf(0), mp.mpf(1) / 4
    angle = mpmath.acos(max(-1, min(1, c / root)))
    slope = (mp.pi - angle) / (2 * mp.pi)
    return root * mpmath.sin(angle) / (2 * mp.pi) + slope * c, slope


def _leaky(s: Any, q: Any, r: Any, c: Any) -> tuple[Any, Any]:
    value, slope = _relu(q, r, c)
    return s * c + (1 - s) ** 2 * value, s + (1 - s) ** 2 * slope


def _erf(q: Any, r: Any, c: Any) -> tuple[Any, Any]:
    product = (1 + 2 * q) * (1 + 2 * r)
    return 2 / mp.pi * mpmath.asin(2 * c / mpmath.sqrt(product)), 4 / mp.pi / mpmath.sqrt(product - 4 * c * c)


def _gelu(q: Any, r: Any, c: Any) -> tuple[Any, Any]:
    qq, rr = 1 + q, 1 + r
    rest = qq * rr - c * c
    j = 1 / (2 * mp.pi * mpmath.sqrt(rest))
    i = mp.mpf(1) / 4 + mpmath.asin(c / mpmath.sqrt(qq * rr)) / (2 * mp.pi)
    return c * i + j * (q * r - c * c + c * c / qq + c * c / rr), i + j * c * (1 / qq + 1 / rr + 1 / rest)


def _sine(phase: Any, q: Any, r: Any, c: Any) -> tuple[Any, Any]:
    u, v = mpmath.exp(c - (q + r) / 2), mpmath.exp(-c - (q + r) / 2)
    even = mpmath.cos(2 * phase)
    return (u - even * v) / 2, (u + even * v) / 2


def _branch(name: str, options: dict[str, Any], q: Any, r: Any, c: Any) -> tuple[Any, Any]:
    """E[phi phi] and E[phi' phi'] of an activation."""
    a, b, offset = (mp.mpf(options.get(k, v)) for k, v in (("amplitude", 1), ("frequency", 1), ("offset", 0)))
    if name == "sigmoid_like":
        a, b, offset, name = mp.mpf(1) / 2, 1 / mp.mpf(2.4020563531719796), mp.mpf(1) / 2, "erf"
    phase = mp.mpf(options.get("phase", 0)) + (mp.pi / 2 if name == "cos" else 0)
    square = b * b
    if name in ("relu", "leaky_relu", "abs", "identity"):
        slope = {"relu": 0, "abs": -1, "identity": 1}.get(name, mp.mpf(options.get("slope", 0.01)))
        value, derivative = _leaky(mp.mpf(slope), q, r, c)
    elif name == "erf":
        value, derivative = _erf(square * q, square * r, square * c)
    elif name == "gelu":
        value, derivative = _gelu(q, r, c)
    elif name in ("sin", "cos"):
        value, derivative = _sine(phase, square * q, square * r, square * c)
    else:
        gamma = mp.mpf(options.get("gamma", 1))
        value = mpmath.exp(-gamma * (q + r - 2 * c))
        derivative = 2 * gamma * value
    return a * a * value + offset * offset, a * a * square * derivative


def _parts(activation: Any) -> list[tuple[str, dict[str, Any]]]:
    """Names and parameters of the branches, read from the printed name: ``erf(frequency=2)+sin``."""
    found = []
    for part in str(activation).split("+"):
        name, _, rest = part.partition("(")
        items = (item.split("=") for item in rest.rstrip(")").split(", ") if item)
        found.append((name, {key: float(value) for key, value in items}))
    return found


def exact(network: Network, x: Tensor, y: Tensor, digits: int = 50) -> tuple[Tensor, Tensor]:
    """NNGP and tangent kernel of all pairs of points (N, d) and (M, d), in float64."""
    kernels = network.kernels()
    with mp.workdps(digits):
        # Squares of the scales as float64 has them.
        weight = [mp.mpf(w) ** 2 for w in kernels.weight_std.tolist()]
        bias = [mp.mpf(b) ** 2 for b in kernels.bias_std.tolist()] + ([] if network.output_bias else [mp.mpf(0)])
        layers = [_parts(activation) for activation in kernels.activations]

        def inner(u: list[float], v: list[float]) -> Any:
            return weight[0] * mpmath.fdot(zip(map(mp.mpf, u), map(mp.mpf, v), strict=True)) / len(u) + bias[0]

        def layer(i: int, q: Any, r: Any, c: Any) -> tuple[Any, Any]:
            values = [_branch(name, options, q, r, c) for name, options in layers[i]]
            return sum(v for v, _ in values), sum(d for _, d in values)

        rows, columns = x.tolist(), y.tolist()
        found = torch.empty(2, len(rows), len(columns), dtype=torch.float64)
        for row, u in enumerate(rows):
            for column, v in enumerate(columns):
                q, r, c = inner(u, u), inner(v, v), inner(u, v)
                tangent = c
                for i, (w, b) in enumerate(zip(weight[1:], bias[1:], strict=True)):
                    value, slope = layer(i, q, r, c)
                    q, r = (w * layer(i, t, t, t)[0] + b for t in (q, r))
                    c = w * value + b
                    tangent = c + w * tangent * slope
                found[0, row, column], found[1, row, column] = float(c), float(tangent)
    return found[0], found[1]


def sample(count: int, seed: int) -> list[tuple[Network, tuple[int, ...]]]:
    """Networks and sizes (batch, N, M, d, p) drawn at random; no M where y is x."""
    r = random.Random(seed)
    found = []
    for _ in range(count):
        depth = r.choice((0, 1, 1, 2, 3, 5))
        names = ["relu", "leaky_relu", "abs", "erf", "sigmoid_like", "gelu", "sin", "cos", "rbf", "identity"]
        layers = ["+".join(r.sample(names, r.choice((1, 1, 1, 2, 3)))) for _ in range(depth)]
        output = r.random() < 0.3
        bias = [r.choice((0.0, 0.3, 1.0)) for _ in range(depth + output)]
        network = Network(depth, layers, [r.choice((0.7, 1.0, 1.4)) for _ in range(depth + 1)], bias, output)
        sizes = [r.choice((1, 2, 3, 7, 16, 17, 33, 50, 65, 130)) for _ in range(2)]
        shape = (r.choice((1, 1, 2, 3)), *sizes, r.choice((1, 2, 3, 5, 16, 17, 40)), r.choice((1, 2, 3, 5)))
        found.append((network, shape))
    return found
