"""What the kernels are: published numbers, the printed formulas in 50 digits, integrals, and wide networks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import pykernels
from pykernels import NTK, Activation

from .networks import NETWORKS, Network, error, exact, ids, normal, pairs, size_of

each_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])

#: x, y, and NTK and NNGP with a bias of 1 and without; three relu layers, two dimensions.
PUBLISHED = [
    ((1, 0), (0, 1), 2.059035729733, 0.894431823182, 0.066274256675, 0.037801607507),
    ((0.5, -1.2), (2, 0.3), 2.172081842715, 0.965295999562, 0.218062752937, 0.108549158485),
    ((0.5, -1.2), (0.5, -1.2), 2.672500000000, 0.980625000000, 0.422500000000, 0.105625000000),
    ((5, 0), (-5, 0), 2.373942300820, 1.513867282777, 1.071419744192, 0.771454828438),
]


@each_backend
@pytest.mark.parametrize(("x", "y", "ntk", "nngp", "ntk_without", "nngp_without"), PUBLISHED)
def test_published_values(x, y, ntk, nngp, ntk_without, nngp_without, backend):
    for bias, expected in ((1.0, (nngp, ntk)), (0.0, (nngp_without, ntk_without))):
        # The printed digits, and a few roundings of 2.
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            points = [torch.tensor([p], dtype=dtype) for p in (x, y)]
            found = NTK(3, "relu", bias_std=bias).gram(*points, kind="both", backend=backend)
            for value, number in zip(found, expected, strict=True):
                assert abs(value.item() - number) <= bound


@each_backend
@pytest.mark.parametrize("network", NETWORKS, ids=ids(NETWORKS))
def test_fifty_digits(network, backend):
    """2e-14 of sqrt(k(x, x) k(y, y)) in float64, wherever the points are: ten layers' rounding."""
    for d, n in ((2, 3), (7, 1)):
        x, y = pairs(d, n)
        found = network.kernels().gram(x, y, kind="both", backend=backend)
        for kind, value, expected in zip(("nngp", "ntk"), found, exact(network, x, y), strict=True):
            off = error(value, expected, size_of(network, x, y, kind))
            assert off <= 2e-14, (kind, d, off)


@pytest.mark.parametrize("network", NETWORKS, ids=ids(NETWORKS))
def test_diagonal(network):
    x = normal(4, 3)
    for kind, own, expected in zip(
        ("nngp", "ntk"), network.kernels().diag(x, kind="both"), exact(network, x, x), strict=True
    ):
        torch.testing.assert_close(own, expected.diagonal(), rtol=2e-14, atol=0)
        assert torch.equal(network.kernels().diag(x, kind=kind), own)


FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu(slope=0.3)": lambda z: np.where(z > 0, z, 0.3 * z),
    "abs": np.abs,
    "erf(frequency=0.8, offset=0.3)": lambda z: np.vectorize(math.erf)(0.8 * z) + 0.3,
    "sigmoid_like": lambda z: (1 + np.vectorize(math.erf)(z / 2.4020563531719796)) / 2,
    "gelu": lambda z: z * (1 + np.vectorize(math.erf)(z / math.sqrt(2))) / 2,
    "sin(phase=0.4, frequency=1.3)": lambda z: np.sin(1.3 * z + 0.4),
    "cos(amplitude=1.7)": lambda z: 1.7 * np.cos(z),
    "rbf(gamma=0.4)": lambda z: math.sqrt(2) * np.sin(math.sqrt(0.8) * z + math.pi / 4),
    "identity(amplitude=0.5)": lambda z: 0.5 * z,
}


def activation_of(name: str) -> Activation:
    base, _, rest = name.partition("(")
    options = dict(item.split("=") for item in rest.rstrip(")").split(", ")) if rest else {}
    return Activation(base, **{key: float(value) for key, value in options.items()})


def expectation(function: Callable[[np.ndarray], np.ndarray], q: float, r: float, c: float, smooth: bool) -> float:
    """E[phi(u) phi(v)] by quadrature: Gauss and Hermite's, or by angle where phi has a kink at 0."""
    if smooth:
        nodes, weights = np.polynomial.hermite_e.hermegauss(90)
        weights = weights / math.sqrt(2 * math.pi)
        u = math.sqrt(q) * nodes[:, None]
        v = c / math.sqrt(q) * nodes[:, None] + math.sqrt(r - c * c / q) * nodes[None, :]
        return float((weights[:, None] * weights[None, :] * function(u) * function(v)).sum())
    angle = math.acos(c / math.sqrt(q * r))
    turns = 2 * math.pi * (np.arange(2_000_000) + 0.5) / 2_000_000
    return float(2 * math.sqrt(q * r) * (function(np.cos(turns)) * function(np.cos(turns - angle))).mean())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_expectations(name):
    """The kernel is the expectation it is meant to be, and the tangent kernel has that of the derivatives."""
    function, smooth = FUNCTIONS[name], not name.startswith(("relu", "leaky_relu", "abs"))
    x, y = normal(3, 2), normal(3, 2, seed=3)
    network = NTK(1, activation_of(name), weight_std=1.2, bias_std=0.4)
    nngp, ntk = network.gram(x, y, kind="both")
    own = [1.44 * (t**2).sum(-1) / 2 + 0.16 for t in (x, y)]
    c = 1.44 * x @ y.T / 2 + 0.16
    for i, j in ((0, 0), (1, 2), (2, 1)):
        q, r, s = own[0][i].item(), own[1][j].item(), c[i, j].item()
        # Where phi has a kink the nodes are 3e-6 apart, and their error is the square.
        assert abs(nngp[i, j].item() - 1.44 * expectation(function, q, r, s, smooth)) < 1e-11

        def slopes(z: np.ndarray) -> np.ndarray:
            return (function(z + 1e-4) - function(z - 1e-4)) / 2e-4

        if smooth:
            expected = nngp[i, j].item() + 1.44 * s * expectation(slopes, q, r, s, smooth)
            assert abs(ntk[i, j].item() - expected) < 4e-8  # the square of the step of the slopes, 1e-8, and a factor


@pytest.mark.parametrize(
    "network",
    [
        Network(2, "relu", 1.4, 0.5),
        Network(3, ["erf", "relu", "sin"], 1.2, 0.3, True),
        Network(1, "relu+cos", 1.0, 0.5),
    ],
    ids=str,
)
def test_wide_networks(network):
    """Averages over random networks of width 600, of the last features' products and of the tangent kernel."""
    functions = {"relu": torch.relu, "erf": torch.erf, "sin": torch.sin, "cos": torch.cos}
    kernels, width, x = network.kernels(), 600, normal(4, 3)
    weight = kernels.weight_std.tolist()
    bias = [*kernels.bias_std.tolist(), *([] if network.output_bias else [0.0])]
    generator = torch.Generator().manual_seed(1)
    nngp, ntk = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    runs = 40
    for _ in range(runs):
        branches, hidden = [x], []  # what enters a layer; its pre-activations
        for layer in range(network.depth):
            z = bias[layer] * torch.randn(width, generator=generator, dtype=torch.float64)
            for part in branches:
                entries = torch.randn(part.shape[1], width, generator=generator, dtype=torch.float64)
                z = z + weight[layer] * part @ entries / part.shape[1] ** 0.5
            hidden.append((branches, z.requires_grad_()))
            names = str(kernels.activations[layer]).split("+")
            branches = [functions[name](z) for name in names]
        last = [torch.randn(width, generator=generator, dtype=torch.float64) for _ in branches]
        output = sum(weight[-1] * part @ w / width**0.5 for part, w in zip(branches, last, strict=True))
        top = weight[-1] ** 2 * sum(part @ part.T / width for part in branches).detach() + bias[-1] ** 2
        nngp += top / runs
        total = top
        for layer, (inputs, z) in enumerate(hidden):
            (sensitivity,) = torch.autograd.grad(output.sum(), z, retain_graph=True)
            features = (
                weight[layer] ** 2 * sum(part @ part.T / part.shape[1] for part in inputs).detach() + bias[layer] ** 2
            )
            total = total + features * (sensitivity @ sensitivity.T)
        ntk += total / runs
    for kind, found in (("nngp", nngp), ("ntk", ntk)):
        # 0.018 seen, of chance: 1 / sqrt(40 width) is 0.006
        assert error(found, kernels.gram(x, kind=kind), size_of(network, x, x, kind)) < 0.05, kind


@each_backend
def test_depth_zero_is_the_linear_kernel(backend):
    x, y = normal(3, 5), normal(4, 5)
    linear = 1.3**2 * x @ y.T / 5
    for kind in ("ntk", "nngp"):
        torch.testing.assert_close(
            NTK(0, "relu", 1.3).gram(x, y, kind=kind, backend=backend), linear, rtol=0, atol=1e-14
        )
        with_bias = NTK(0, "relu", 1.3, 0.7, True).gram(x, y, kind=kind, backend=backend)
        torch.testing.assert_close(with_bias, linear + 0.49, rtol=0, atol=1e-14)  # rounding of sums up to 2


@each_backend
def test_gaussian_kernel(backend):
    x, y = normal(5, 4), normal(6, 4)
    found = NTK(1, Activation("rbf", gamma=0.5)).gram(x, y, kind="nngp", backend=backend)
    torch.testing.assert_close(found, torch.exp(-torch.cdist(x, y).square() / 8), rtol=0, atol=2e-15)


@each_backend
def test_facts_of_relu_networks(backend):
    """Without a bias it is homogeneous and cannot tell some measures apart; with one it can."""
    x, y = normal(4, 3), normal(5, 3)
    network = NTK(3, "relu")
    kernel = network.gram(x, y, backend=backend)
    torch.testing.assert_close(network.gram(2.5 * x, y, backend=backend), 2.5 * kernel, rtol=0, atol=5e-15)
    zero = torch.zeros(1, 3, dtype=torch.float64)
    # no bias counts as 1e-18
    assert network.gram(zero, y, backend=backend).abs().max() < 5e-18
    rotation = torch.linalg.qr(normal(3, 3, seed=7))[0]
    torch.testing.assert_close(network.gram(x @ rotation, y @ rotation, backend=backend), kernel, rtol=0, atol=5e-15)

    def discrepancy(bias: float) -> float:
        points = torch.tensor([[0.5, 1.0], [0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
        a = torch.tensor([1.0, -0.5, -0.5], dtype=torch.float64)
        return float(a @ NTK(3, "relu", bias_std=bias).matvec(points, points, a, backend=backend))

    assert abs(discrepancy(0.0)) < 1e-15  # rounding of kernels below 1
    assert discrepancy(1.0) > 1e-3


@each_backend
def test_branches_add(backend):
    x, y = normal(4, 3), normal(5, 3)
    one, other = Activation("erf", frequency=0.5), Activation("abs")
    both = NTK(1, one + other, 1.2, 0.3).gram(x, y, kind="both", backend=backend)
    apart = [NTK(1, a, 1.2, 0.3).gram(x, y, kind="both", backend=backend) for a in (one, other)]
    torch.testing.assert_close(both[0], apart[0][0] + apart[1][0], rtol=0, atol=1e-14)
    torch.testing.assert_close(both[1], apart[0][1] + apart[1][1], rtol=0, atol=1e-14)
    assert torch.equal(
        NTK(1, "relu+sin").gram(x, backend=backend), NTK(1, Activation("relu+sin")).gram(x, backend=backend)
    )


@each_backend
@pytest.mark.parametrize("network", NETWORKS, ids=ids(NETWORKS))
def test_gradient_at_equal_points(network, backend):
    """Half of the gradient of k(x, x); what is tangential is zero, though one-sided slopes are not."""
    x = normal(3, 4)
    leaf = x.clone().requires_grad_()
    (own,) = torch.autograd.grad(network.kernels().diag(leaf).sum(), leaf)
    a = torch.ones(1, dtype=torch.float64)
    for i in range(3):
        value, gradient = network.kernels().witness(x[i : i + 1], x[i : i + 1], a, backend=backend)
        torch.testing.assert_close(gradient, own[i : i + 1] / 2, rtol=2e-14, atol=2e-15)
        torch.testing.assert_close(value, network.kernels().diag(x[i : i + 1]), rtol=2e-14, atol=0)


@each_backend
def test_slopes_of_the_cusp(backend):
    """Near duplicates have the one-sided slopes of the cusp, down to distances of 1e-9."""
    y = torch.tensor([[0.4, 2.1]], dtype=torch.float64)
    tangent = torch.tensor([-2.1, 0.4], dtype=torch.float64) / math.hypot(2.1, 0.4)
    network, one = NTK(3, "relu", bias_std=1.0), torch.ones(1, dtype=torch.float64)
    for distance in (1e-4, 1e-6, 1e-9):
        for sign in (-1, 1):
            _, gradient = network.witness(y + sign * distance * tangent, y, one, backend=backend)
            # The digits that are published, and how much the slope changes over 1e-4.
            assert abs(float(gradient[0] @ tangent) + sign * 0.3207) < 1e-4


def test_networks_are_read_from_torch():
    nn = torch.nn
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 9), nn.ReLU(), nn.Sequential(nn.Linear(9, 8, bias=False), nn.LeakyReLU(0.2)),
        nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 5), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 1, bias=False),
    )  # fmt: skip
    read = NTK.from_sequential(network, 1.2, 0.4)
    layers = ["relu", Activation("leaky_relu", slope=0.2), "gelu", "identity", "sigmoid_like"]
    written = NTK(5, layers, 1.2, [0.4, 0.0, 0.4, 0.4, 0.4])
    x = normal(3, 6)
    assert torch.equal(read.gram(x), written.gram(x))
    assert not read.output_bias
    last = NTK.from_sequential(nn.Sequential(nn.Linear(3, 1)), bias_std=0.5)
    assert last.depth == 0
    assert last.output_bias
    assert last.bias_std.tolist() == [0.5]


def test_functional_forms():
    x, z, v = normal(4, 3), normal(5, 3), normal(5)
    network = NTK(2, ["relu", "sin"], [1.0, 1.1, 1.2], [0.3, 0.0, 0.4], True)
    options = {"activation": ["relu", "sin"], "weight_std": [1.0, 1.1, 1.2], "bias_std": [0.3, 0.0, 0.4]}
    assert torch.equal(network.gram(x, z), pykernels.ntk_gram(x, z, **options))
    assert torch.equal(network(x), pykernels.ntk_gram(x, **options))
    assert torch.equal(network.matvec(x, z, v), pykernels.ntk_matvec(x, z, v, **options))
    for one, other in zip(network.witness(x, z, v), pykernels.ntk_witness(x, z, v, **options), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(network.diag(x), pykernels.ntk_diag(x, **options))
    assert torch.equal(NTK(1, "relu", 1.3, 0.2).gram(x), pykernels.ntk_gram(x, weight_std=1.3, bias_std=0.2))


def test_scales_are_numbers_of_any_kind():
    """Of NumPy too, as a grid search has them, and in tensors with gradients."""
    x = torch.randn(5, 3, dtype=torch.float64)
    options = {"activation": ["relu", "erf"], "weight_std": 1.5, "bias_std": 0.5}
    expected = pykernels.ntk_gram(x, **options)
    for kind in (np.float32, np.array, torch.tensor, lambda s: torch.nn.Parameter(torch.tensor(s))):
        scales = {"weight_std": kind(1.5), "bias_std": kind(0.5)}
        assert torch.equal(pykernels.ntk_gram(x, **options | scales), expected)
        assert torch.equal(NTK(np.int64(2), ["relu", "erf"], **scales).gram(x), expected)
    assert torch.equal(pykernels.ntk_gram(x, **options | {"weight_std": np.full(3, 1.5)}), expected)
    weight = torch.tensor(1.5, requires_grad=True)
    pykernels.ntk_gram(x, **options | {"weight_std": weight}).sum().backward()
    each = torch.full((3,), 1.5, requires_grad=True)
    pykernels.ntk_gram(x, **options | {"weight_std": each}).sum().backward()
    torch.testing.assert_close(weight.grad, each.grad.sum(), rtol=1e-6, atol=0)  # gradients of float32 scales


@each_backend
@pytest.mark.parametrize("name", ["erf", "gelu", "sin", "rbf", "relu"])
def test_constant_activations(name, backend):
    """Of amplitude 0: the last layer sees its biases only, and so do gradients, which are not NaN."""
    x = torch.randn(5, 3, dtype=torch.float64)
    silent = NTK(2, ["relu", pykernels.Activation(name, amplitude=0.0)], bias_std=[1.0, 0.5], output_bias=False)
    value, gradient = silent.witness(x, x, torch.ones(5, dtype=torch.float64), backend=backend)
    assert value.abs().max() < 1e-15
    assert gradient.abs().max() < 1e-15
    flat = NTK(1, pykernels.Activation("erf", frequency=0.0, offset=2.0), weight_std=3.0, bias_std=1.0)
    torch.testing.assert_close(flat.gram(x, kind="nngp", backend=backend), torch.full((5, 5), 36.0).double())
    gradient = flat.witness(x, x, torch.ones(5, dtype=torch.float64), backend=backend)[1]
    assert gradient.abs().max() < 1e-15


def test_layers_without_a_bias_keep_none():
    layers = [torch.nn.Linear(3, 4, bias=False), torch.nn.ReLU(), torch.nn.Linear(4, 1)]
    for bias_std in (0.4, [0.4, 0.4], torch.tensor(0.4, dtype=torch.float64)):
        read = NTK.from_sequential(torch.nn.Sequential(*layers), bias_std=bias_std)
        assert read.output_bias
        assert read.bias_std.tolist() == [0.0, 0.4]
