"""The compiled kernels against the reference: values and gradients, layouts of memory, numbers that are not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import pykernels
from pykernels import NTK, Activation

from ..guarded import check_guarded
from .networks import FEW, NETWORKS, Network, error, ids, normal, pairs, sample, size_of

NAN, INF = float("nan"), float("inf")
F64 = torch.float64
#: How the results of :func:`results` are called.
NAMES = ("nngp", "ntk", "product", "values", "gradients")


class Points(NamedTuple):
    """Points x (..., N, d) and y (..., M, d) or None, factors v (..., M, p) and a (..., M)."""

    x: Tensor
    y: Tensor | None
    v: Tensor
    a: Tensor

    @classmethod
    def of(
        cls, n: int, m: int | None, d: int, p: int = 2, lead: tuple[int, ...] = (), dtype: torch.dtype = F64
    ) -> Points:
        """``m`` None: of one set."""
        columns = n if m is None else m
        y = None if m is None else normal(*lead, m, d, seed=1, dtype=dtype)
        tensors = normal(*lead, columns, p, seed=2, dtype=dtype), normal(*lead, columns, seed=3, dtype=dtype)
        return cls(normal(*lead, n, d, dtype=dtype), y, *tensors)

    @property
    def z(self) -> Tensor:
        return self.x if self.y is None else self.y

    def to(self, dtype: torch.dtype) -> Points:
        return Points(*(None if t is None else t.to(dtype) for t in self))

    def map(self, function: Callable[[Tensor], Tensor]) -> Points:
        return Points(*(None if t is None else function(t) for t in self))


def results(network: Network, points: Points, backend: str, kind: str = "ntk", **options: str) -> list[Tensor]:
    """Both Gram matrices, and of one kind the product with v, and the witness's values and gradients."""
    kernels, given = network.kernels(), {"kind": kind, "backend": backend, **options}
    return [
        *kernels.gram(points.x, points.y, **{**given, "kind": "both"}),
        kernels.matvec(points.x, points.z, points.v, **given),
        *kernels.witness(points.x, points.z, points.a, **given),
    ]


def gradients(network: Network, points: Points, backend: str, kind: str = "ntk") -> list[list[Tensor]]:
    """Of points, factors and scales, through each of the functions."""
    kernels, found = network.kernels(learnable=True), []
    leaves = points.map(lambda t: t.detach().clone().requires_grad_())
    given = {"kind": kind, "backend": backend}
    wanted = [t for t in leaves if t is not None] + list(kernels.parameters())
    outputs = [
        torch.stack(kernels.gram(leaves.x, leaves.y, **{**given, "kind": "both"})),
        kernels.matvec(leaves.x, leaves.z, leaves.v, **given),
        kernels.witness(leaves.x, leaves.z, leaves.a, **given)[0],
    ]
    for output in outputs:
        weights = normal(*output.shape, seed=11, dtype=output.dtype)
        found.append(list(torch.autograd.grad(output, wanted, weights, materialize_grads=True)))
    return found


def gradient_error(actual: list[list[Tensor]], expected: list[list[Tensor]], share: float = 0.01) -> float:
    """Relative to the largest number in a gradient, or to ``share`` of the largest one through the same function."""
    largest = 0.0
    for ours, theirs in zip(actual, expected, strict=True):
        everywhere = max((float(t.double().abs().max()) for t in theirs if t.numel() > 0), default=0.0)
        for one, other in zip(ours, theirs, strict=True):
            if other.numel() > 0:
                size = max(float(other.double().abs().max()), share * everywhere, 1e-300)
                largest = max(largest, error(one, other, size))
    return largest


def without_scales(groups: list[list[Tensor]]) -> list[list[Tensor]]:
    """The last two tensors of each are the scales'."""
    return [group[:-2] for group in groups]


def together(groups: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[tensor for group in groups for tensor in group]]


def sizes(network: Network, points: Points, kind: str) -> list[Tensor | None]:
    """What the errors of :func:`results` are relative to."""
    x, z = points.x.double(), points.z.double()
    own = size_of(network, x, z, kind)
    return [
        size_of(network, x, z, "nngp"),
        size_of(network, x, z, "ntk"),
        own @ points.v.double().abs(),
        (own @ points.a.double().abs().unsqueeze(-1)).squeeze(-1),
        None,
    ]


class Expected(NamedTuple):
    """By the reference."""

    results: list[Tensor]
    gradients: list[list[Tensor]]
    sizes: list[Tensor | None]


_EXPECTED: dict[str, Expected] = {}


def expected_of(network: Network, points: Points, kind: str = "ntk", derivatives: bool = True) -> Expected:
    """Computed once for all capabilities; the points are those of :meth:`Points.of`."""
    shapes = [None if t is None else tuple(t.shape) for t in points]
    key = f"{network} {shapes} {points.x.dtype} {kind} {derivatives}"
    if key not in _EXPECTED:
        slopes = gradients(network, points, "reference", kind) if derivatives else []
        _EXPECTED[key] = Expected(results(network, points, "reference", kind), slopes, sizes(network, points, kind))
    return _EXPECTED[key]


def check_float64(network: Network, points: Points, kind: str = "ntk", derivatives: bool = True) -> None:
    expected = expected_of(network, points, kind, derivatives)
    actual = results(network, points, "cpu", kind)
    for name, one, other, size in zip(NAMES, actual, expected.results, expected.sizes, strict=True):
        off = error(one, other, None if size is None else size.clamp_min(1e-30))
        assert off <= 4e-14, f"{network}, {points.x.shape}, {name}: {off:.1e}"  # rounding, 4e-15 seen
    if derivatives:
        off = gradient_error(gradients(network, points, "cpu", kind), expected.gradients)
        # Terms that are much larger cancel in some of them, such as those of scales; 1e-13 seen.
        assert off <= 1e-12, f"{network}, {points.x.shape}, gradients: {off:.1e}"


#: Rows, columns (None: of one set), dimensions: around those of vectors, tiles, strips of them, and parts of products.
SHAPES = [
    (1, None, 1), (1, 1, 1), (2, None, 2), (3, 2, 1), (1, 7, 3), (7, 1, 5), (5, 3, 7), (8, None, 6), (9, 8, 8),
    (15, 17, 7), (16, 16, 9), (17, None, 15), (31, 33, 16), (32, None, 8), (33, 31, 17), (47, None, 10), (48, 49, 3),
    (49, None, 31), (63, 65, 8), (64, None, 33), (65, 1, 95), (1, 129, 96), (2, 257, 9), (257, 2, 4), (97, None, 97),
    (127, 3, 98), (4, 383, 11), (3, 385, 2), (129, None, 2), (11, 13, 191), (13, None, 192), (6, 5, 193), (5, 6, 784),
]  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS, ids=ids(NETWORKS))
def test_networks(network, capability, poisoned):
    """Every two of: a kind, one set or two, few dimensions or many."""
    for kind, n, m, d in (("ntk", 19, None, 3), ("ntk", 18, 21, 20), ("nngp", 19, 21, 3), ("nngp", 18, None, 20)):
        check_float64(network, Points.of(n, m, d), kind)


def test_shapes(capability, poisoned):
    networks = itertools.cycle(FEW)
    for i, (n, m, d) in enumerate(SHAPES):
        points = Points.of(n, m, d, p=(1, 2, 3, 4, 5, 8, 9, 17)[i % 8])
        check_float64(next(networks), points, ("ntk", "nngp")[i % 3 == 2], derivatives=n * (m or n) * d < 20_000)


def test_sample(capability, poisoned):
    for network, (batch, n, m, d, p) in sample(25, seed=1):
        points = Points.of(n, None if p == 1 else m, d, p, (batch,) if batch > 1 else ())
        check_float64(network, points, derivatives=n * m < 2000)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (1, 1, 2)], ids=str)
def test_leading_dimensions(lead, capability, poisoned):
    """A batch has, cloud by cloud, the bits that each has alone."""
    for network, m in itertools.product(FEW[:3], (None, 20)):
        points = Points.of(17, m, 5, lead=lead)
        check_float64(network, points)
        whole = results(network, points, "cpu")
        flat = points.map(lambda t: t.flatten(0, len(lead) - 1) if lead else t.unsqueeze(0))
        for b in range(max(1, math.prod(lead))):
            alone = results(network, flat.map(lambda t: t[b]), "cpu")  # noqa: B023
            for one, all_of_them in zip(alone, whole, strict=True):
                together = all_of_them.flatten(0, len(lead) - 1) if lead else all_of_them.unsqueeze(0)
                assert torch.equal(one, together[b])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_sets(backend, poisoned):
    """No rows, no columns, no clouds, no columns of v, no dimensions: the shapes are right and sums are 0."""
    network = Network(2, "relu", 1.1, 0.4)
    for n, m, d, p, lead in [
        (0, 3, 2, 1, ()), (3, 0, 2, 1, ()), (0, 0, 2, 1, ()), (0, None, 2, 1, ()), (3, 4, 2, 0, ()), (3, 4, 2, 1, (0,)),
        (3, 4, 2, 2, (2, 0)), (3, None, 2, 2, (0,)), (3, 4, 0, 2, ()), (3, None, 0, 1, (2,)), (0, 4, 0, 0, (0,)),
    ]:  # fmt: skip
        points = Points.of(n, m, d, p, lead)
        found = results(network, points, backend)
        columns = n if m is None else m
        shapes = [(*lead, n, columns)] * 2 + [(*lead, n, p), (*lead, n), (*lead, n, d)]
        assert [tuple(t.shape) for t in found] == shapes
        if columns == 0:
            assert all((t == 0).all() for t in found)
        if d == 0:  # only biases are left
            torch.testing.assert_close(found[0], torch.full_like(found[0], own_of_bias(network)), rtol=0, atol=1e-16)
        assert all(t.isfinite().all() for of_one in gradients(network, points, backend) for t in of_one)


def own_of_bias(network: Network) -> float:
    return float(network.kernels().diag(torch.zeros(1, 1, dtype=F64), kind="nngp"))


def everything(network: Network, points: Points) -> list[Tensor]:
    return [*results(network, points, "cpu"), *itertools.chain(*gradients(network, points, "cpu"))]


def test_threads(poisoned):
    """The same bits, whatever the number of threads.

    Two are used once only: as many threads as a small machine has cores spin where they wait, and it may be busy.
    """
    for network, (n, m, d, lead) in itertools.product(
        FEW[1:3], [(150, None, 3, ()), (130, 90, 20, ()), (3, 900, 9, ()), (900, 3, 2, ()), (40, None, 100, (5,))]
    ):
        for dtype in (torch.float32, F64)[d > 5 :]:
            points = Points.of(n, m, d, lead=lead, dtype=dtype)
            torch.set_num_threads(1)
            expected = everything(network, points)
            for threads in (3, 5, 2) if n == 150 and dtype == F64 else (3, 5):
                torch.set_num_threads(threads)
                again = zip(everything(network, points), expected, strict=True)
                assert all(torch.equal(one, other) for one, other in again)


#: Dimensions, depths and scales for which float32 is promised to 1e-6 of sqrt(k(x, x) k(y, y)).
PROMISED = list(itertools.product((2, 16, 784), (1, 3, 10), ((1.0, 0.0), (1.0, 1.0), (2**0.5, 0.0))))


@pytest.fixture(scope="module", params=["relu", "leaky_relu"])
def promised(request: pytest.FixtureRequest) -> list[tuple[Network, Tensor, list[Tensor], list[Tensor]]]:
    """Networks, points of which the last 45 are compared with the first 5, the kernels in float64, and their sizes."""
    found = []
    for d, depth, scales in PROMISED:
        network = Network(depth, request.param, *scales)
        x, y = pairs(d, 5)
        points = torch.cat([x, y[torch.arange(len(y)) // 5 != 7]]).float()  # but for those near zero
        exact = network.kernels().gram(points.double(), points.double(), kind="both", backend="reference")
        found.append((network, points, exact, [size_of(network, points, points, kind) for kind in ("nngp", "ntk")]))
    return found


def test_float32(promised, capability):
    """On random, equal, nearly equal and opposite points, of one set and of two."""
    for network, points, exact, of in promised:
        kernels, x, y = network.kernels(), points[:5], points[5:]
        found = kernels.gram(x, y, kind="both", backend="cpu"), kernels.gram(points, kind="both", backend="cpu")
        for two_sets, one_set, expected, size in zip(*found, exact, of, strict=True):
            assert error(two_sets, expected[:5, 5:], size[:5, 5:]) <= 1e-6, network
            assert error(one_set, expected, size) <= 1e-6, network
        v = normal(len(y), 2, dtype=torch.float32)  # sums over points, whose errors are of both signs
        expected, size = exact[1][:5, 5:] @ v.double(), of[1][:5, 5:] @ v.double().abs()
        assert error(kernels.matvec(x, y, v, backend="cpu"), expected, size) <= 4e-7, network
        value, _ = kernels.witness(x, y, v[:, 0].contiguous(), backend="cpu")
        assert error(value, expected[:, 0], size[:, 0]) <= 4e-7, network


@pytest.mark.parametrize("network", NETWORKS, ids=ids(NETWORKS))
def test_float32_beside_the_reference(network, capability):
    """Errors at most twice those of the reference in float32, gradients three times; or of the size of rounding.

    Gradients of scales relative to the largest gradient through any function: they may be small sums of large terms.
    """
    ours, theirs = [0.0] * 5, [0.0] * 5
    own, their = [0.0, 0.0], [0.0, 0.0]  # of points and factors, and of scales
    for n, m, d in ((20, None, 2), (17, 19, 12), (10, 11, 130)):
        points = Points.of(n, m, d, dtype=torch.float32)
        exact, rough = expected_of(network, points.to(F64)), expected_of(network, points)
        for total, values in ((ours, results(network, points, "cpu")), (theirs, rough.results)):
            for i, (found, expected, size) in enumerate(zip(values, exact.results, exact.sizes, strict=True)):
                total[i] = max(total[i], error(found, expected, size))
        found = gradients(network, points, "cpu")
        for total, slopes in ((own, found), (their, rough.gradients)):
            total[0] = max(total[0], gradient_error(*map(without_scales, (slopes, exact.gradients)), 1.0))
            total[1] = max(total[1], gradient_error(*map(together, (slopes, exact.gradients)), 1.0))
    eps = torch.finfo(torch.float32).eps
    for name, one, other in zip(NAMES, ours, theirs, strict=True):
        assert one <= (3 if name == "gradients" else 2) * other + 4 * eps, (name, one, other)
    assert own[0] <= 3 * their[0] + 16 * eps, (own, their)  # rounding adds up in sums over points
    assert own[1] <= 3 * their[1] + 4 * eps, (own, their)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precision_of_inner_products(precision, capability):
    """The unit vectors are rounded as the reference rounds them; float64 is left alone; near points stay exact."""
    unit = {"tf32": 2**-11, "bf16": 2**-9}[precision]
    for network in FEW[:3]:
        points = Points.of(33, 40, 24, dtype=torch.float32)
        found = results(network, points, "cpu", precision=precision)
        expected = results(network, points, "reference", precision=precision)
        full = results(network, points, "reference")
        for name, one, other, exact, size in zip(
            NAMES, found, expected, full, sizes(network, points, "ntk"), strict=True
        ):
            # Derivatives are those of exact vectors, taken at rounded ones in places of their own.
            assert error(one, other, size) <= (8 * unit if name == "gradients" else 2e-6), name
            if name != "gradients":
                assert error(one, exact, size) <= 4 * unit  # of two rounded vectors; 0.6 seen
                assert not torch.equal(one, exact)
        double = points.to(F64)
        same = results(network, double, "cpu", precision=precision)
        assert all(torch.equal(a, b) for a, b in zip(same, results(network, double, "cpu"), strict=True))


def inside(t: Tensor) -> Tensor:
    """The values of ``t``, as a view into memory that holds NaN everywhere around it and between its rows."""
    view = t.new_full([n + 6 for n in t.shape], NAN)[(slice(3, -3),) * t.dim()]
    return view.copy_(t)


def every_second(t: Tensor) -> Tensor:
    return t.new_full([2 * n for n in t.shape], NAN)[(slice(None, None, 2),) * t.dim()].copy_(t)


def transposed(t: Tensor) -> Tensor:
    return inside(t.movedim(-1, 0)).movedim(0, -1)


def backwards(t: Tensor) -> Tensor:
    """Points in memory in reversed order of batches, as far as torch has no negative strides: permuted."""
    return inside(t.movedim(0, -1)).movedim(-1, 0)


def negated(t: Tensor) -> Tensor:
    view = torch._neg_view(inside(-t))
    assert view.is_neg()
    return view


@pytest.mark.parametrize("layout", [inside, every_second, transposed, backwards, negated])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_any_strides(dtype, layout: Callable[[Tensor], Tensor], capability):
    """The same bits as for contiguous tensors, if one argument is laid out otherwise, and if all are."""
    for network, (m, d, p, lead) in zip(FEW, [(9, 3, 1, ()), (None, 20, 5, (2,)), (12, 9, 3, (2, 2))], strict=False):
        points = Points.of(11, m, d, p, lead, dtype)
        expected = results(network, points, "cpu")
        assert all(t.isfinite().all() for t in expected)
        views = points.map(layout)
        changed = [points._replace(**{name: view}) for name, view in views._asdict().items() if view is not None]
        for one in [*changed, views]:
            for name, found, t in zip(NAMES, results(network, one, "cpu"), expected, strict=True):
                assert torch.equal(found, t), name
        leaves = [views.x.detach().requires_grad_(), points.x.clone().requires_grad_()]
        weights = layout(normal(*expected[1].shape, seed=5, dtype=dtype))
        grads = [torch.autograd.grad(network.kernels().gram(t, points.y), t, weights)[0] for t in leaves]
        assert torch.equal(*grads)


def test_expanded(capability):
    """Strides of 0, in the arguments and in the gradient that ``sum`` sends back."""
    for network, dim in itertools.product((FEW[0], FEW[2]), range(3)):
        full = Points.of(9, 8, 10, 3, (2,))
        points = full.map(lambda t: t.narrow(dim, 0, 1).expand(t.shape) if t.dim() > dim else t)  # noqa: B023
        copies = points.map(torch.Tensor.contiguous)
        actual, expected = (results(network, p, "cpu") for p in (points, copies))
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
        x = copies.x.clone().requires_grad_()
        sums = [network.kernels().gram(x, copies.y, backend=b).sum() for b in ("cpu", "reference")]
        one, other = (torch.autograd.grad(s, x)[0] for s in sums)
        assert error(one, other) <= 2e-14  # rounding of sums in different orders


def test_one_set_is_two_equal_ones(capability):
    """Half of the matrix is computed, and it is symmetric to the bit."""
    for network, (n, d) in itertools.product(FEW, [(5, 3), (70, 20), (130, 2)]):
        x = Points.of(n, None, d).x
        for dtype in (torch.float32, F64):
            points = x.to(dtype)
            found = network.kernels().gram(points, kind="both", backend="cpu")
            other = network.kernels().gram(points, points.clone(), kind="both", backend="cpu")
            own = network.kernels().diag(points, kind="both")
            for kind, one, two, diagonal in zip(("nngp", "ntk"), found, other, own, strict=True):
                assert torch.equal(one, one.mT)
                eps = torch.finfo(dtype).eps
                assert error(one, two, size_of(network, points, points, kind)) <= 16 * eps
                torch.testing.assert_close(one.diagonal(), diagonal, rtol=16 * eps, atol=0)


def test_inputs_are_left_alone_and_results_repeat(capability):
    for network in FEW:
        points = Points.of(20, 30, 9)
        copies = points.map(torch.Tensor.clone)
        first, second = (everything(network, points) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        assert all(torch.equal(one, other) for one, other in zip(points, copies, strict=True))


def test_any_subset_of_the_gradients():
    """A gradient does not depend on which others are computed; one that is not needed is not made."""
    network = Network(2, ["relu", "erf"], 1.2, 0.4)
    kernels = network.kernels()
    base = [*Points.of(6, 7, 4)[:2], kernels.weight_std, torch.cat([kernels.bias_std, torch.zeros(1, dtype=F64)])]

    def run(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pykernels.ntk_gram(
            x, y, activation=["relu", "erf"], weight_std=weight, bias_std=bias, backend="cpu"
        ).sin()

    leaves = [t.clone().requires_grad_() for t in base]
    expected = torch.autograd.grad(run(*leaves).sum(), leaves)
    for wanted in itertools.product((False, True), repeat=4):
        leaves = [t.clone().requires_grad_(w) for t, w in zip(base, wanted, strict=True)]
        found = run(*leaves)
        assert found.requires_grad == any(wanted)
        if any(wanted):
            found.sum().backward()
        for leaf, value in zip(leaves, expected, strict=True):
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, value, rtol=0, atol=1e-14)  # of 19: as good as equal


each_runner = pytest.mark.parametrize("runner", [*pykernels.cpu_capabilities(), "reference"])


def use(runner: str) -> str:
    """The backend of a CPU capability, which is set, or the reference."""
    if runner == "reference":
        return runner
    pykernels.set_cpu_capability(runner)
    return "cpu"


@each_runner
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_infinity(value, runner):
    """NaN in their row and column, and nowhere else."""
    backend = use(runner)
    bounded = [NETWORKS[12], NETWORKS[14]]  # whose variances may be finite all the same
    for network, m, d, dtype in itertools.product(FEW + bounded, (None, 40), (3, 20), (torch.float32, F64)):
        points = Points.of(37, m, d, dtype=dtype)
        clean = network.kernels().gram(points.x, points.y, backend=backend)
        points.x[5, 1] = value
        if m is not None:
            points.y[7, 2] = value
        kernel = network.kernels().gram(points.x, points.y, backend=backend)
        broken = torch.zeros(kernel.shape, dtype=torch.bool)
        broken[5] = True
        broken[:, 5 if m is None else 7] = True
        assert torch.equal(kernel.isnan(), broken)
        nngp = network.kernels().gram(points.x, points.y, kind="nngp", backend=backend)
        assert torch.equal(nngp.isnan(), broken)
        # Where a vector holds a broken pair, all of its pairs may go another way through the kernel.
        eps = torch.finfo(dtype).eps
        # The same operations, but for which lanes go through the branch of near pairs with others.
        torch.testing.assert_close(kernel[~broken], clean[~broken], rtol=16 * eps, atol=min(16 * eps, 1e-7))
        values, slopes = network.kernels().witness(
            points.x, normal(9, d, dtype=dtype), normal(9, dtype=dtype), backend=backend
        )
        assert torch.equal(values.isnan(), broken[:, 0])
        assert torch.equal(slopes.isnan().any(1), broken[:, 0])


@each_runner
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("activation", ["sin", Activation("sin", frequency=30.0), "erf", "identity"], ids=str)
def test_odd_activations_of_opposite_points(activation, dtype, runner):
    """k(x, -x) = -k(x, x), of long points too, with finite gradients."""
    backend = use(runner)
    x = torch.tensor([[1.0, 0.3], [10.0, 3.0], [100.0, -30.0]], dtype=dtype, requires_grad=True)
    for depth, kind in itertools.product((1, 2), ("ntk", "nngp")):
        kernels = NTK(depth, activation)
        opposite = kernels.gram(x, -x, kind=kind, backend=backend).diagonal()
        torch.testing.assert_close(opposite, -kernels.diag(x, kind=kind), rtol=8 * torch.finfo(dtype).eps, atol=0)
        (slope,) = torch.autograd.grad(opposite.sum(), x)
        assert slope.isfinite().all()


SMOOTH = ["erf", "sigmoid_like", "gelu", "sin", "cos", "rbf"]


@each_runner
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "abs", "identity", "relu+sin", *SMOOTH])
def test_zero_vectors(activation, runner):
    """Finite, with finite gradients for all points, and what the variance 0 says; tiny vectors come close to it."""
    backend = use(runner)
    for bias, dtype in itertools.product((0.0, 0.5), (torch.float32, F64)):
        kernels = NTK(2, activation, bias_std=bias)
        x = torch.tensor(
            [[0.0, 0.0], [1.0, 0.5], [1e-20, -1e-20], [0.0, 0.0], [1e-6, 0.0]], dtype=dtype
        ).requires_grad_()
        for kind in ("nngp", "ntk"):
            kernel = kernels.gram(x, kind=kind, backend=backend)
            assert kernel.isfinite().all()
            (gradient,) = torch.autograd.grad(kernel.sum(), x)
            assert gradient.isfinite().all(), kind
            # A point at 1e-8 says what the limit is; the slope of these kernels there is finite.
            small = torch.tensor([[1e-8, 0.0]], dtype=F64)
            near = kernels.gram(small, x.detach().double(), kind=kind, backend="reference")
            # The kernel may change by 1e-8 times its slope, and by its rounding in float32.
            torch.testing.assert_close(kernel[0].detach().double(), near[0], rtol=0, atol=5e-7)
            values, slopes = kernels.witness(
                x.detach(), x.detach(), torch.ones(5, dtype=dtype), kind=kind, backend=backend
            )
            assert values.isfinite().all()
            assert slopes.isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "erf", "gelu", "sin"])
def test_gradients_where_variances_are_the_least(activation, capability):
    """A variance that is taken for the least one has no derivative."""
    kernels, y, a = NTK(3, activation, 0.5), normal(4, 2, seed=1), normal(4, seed=2)
    for scale, kind in itertools.product((1e-17, 1e-18, 1e-19), ("nngp", "ntk")):
        x = scale * normal(3, 2)
        slopes = [kernels.witness(x, y, a, kind=kind, backend=backend)[1] for backend in ("cpu", "reference")]
        assert error(*slopes) <= 1e-9


@each_runner
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "abs", "identity", *SMOOTH])
def test_large_points(activation, runner):
    """Finite, with finite gradients, short of 1e9 in float32, whose fourth powers overflow."""
    backend = use(runner)
    for bias, dtype in itertools.product((0.0, 1.0), (torch.float32, F64)):
        kernels = NTK(2, activation, bias_std=bias)
        for scale in (1e2, 1e3, 1e5, 1e10)[: 3 if dtype == torch.float32 else 4]:
            x = torch.tensor([[1.0, -1.0], [1.0, 0.5], [1.0, -1.001]], dtype=dtype) * scale
            x = torch.cat([x, torch.tensor([[1.0, 0.0]], dtype=dtype)]).requires_grad_()
            kernel = kernels.gram(x, backend=backend)
            assert kernel.isfinite().all(), scale
            assert torch.autograd.grad(kernel.sum(), x)[0].isfinite().all(), scale


#: Distances of nearly equal points are 10 to the minus these.
EXPONENTS = (0, 2, 4, 6, 8, 12, 15, 17, 30)
#: Up to which exponents values and gradients of nearly equal points are compared.
COMPARED = {torch.float32: 4, F64: 12}


@pytest.fixture(scope="module")
def near_points() -> list[tuple[NTK, list[tuple[Tensor, ...]]]]:
    """Networks, and for each dtype x (9, 1, d), z (9, 2, d), a (9, 2), and value and gradient in float64."""
    found = []
    for activation, bias, d in itertools.product(("relu", "abs", "erf"), (0.0, 1.0), (2, 20)):
        kernels, problems = NTK(3, activation, bias_std=bias), []
        x = normal(1, d).expand(len(EXPONENTS), 1, d)
        y = x + (10.0 ** -torch.tensor(EXPONENTS, dtype=F64)).view(-1, 1, 1) * normal(1, d, seed=3)
        for dtype in (torch.float32, F64):
            given = x.to(dtype), torch.cat([y, -y], 1).to(dtype), torch.tensor([1.0, 0.5], dtype=dtype).expand(9, 2)
            problems.append((*given, *kernels.witness(*(t.double() for t in given), backend="reference")))
        found.append((kernels, problems))
    return found


@each_runner
def test_points_that_nearly_coincide(near_points, runner):
    """Gradients are finite, and those of float64, at every distance down to none."""
    backend = use(runner)
    for kernels, problems in near_points:
        for x, z, a, exact, slope in problems:
            value, gradient = kernels.witness(x, z, a, backend=backend)
            assert value.isfinite().all()
            assert gradient.isfinite().all()
            points = torch.cat([x, z], 1).requires_grad_()
            kernel = kernels.gram(points, backend=backend)
            assert torch.autograd.grad(kernel.sum(), points)[0].isfinite().all()
            for i, exponent in enumerate(EXPONENTS):
                if exponent <= COMPARED[x.dtype]:
                    assert error(value[i], exact[i]) <= (1e-6 if x.dtype == torch.float32 else 2e-14)
                    # The direction of the difference of two unit vectors has their rounding, divided by it.
                    rounding = 1e-7 if x.dtype == torch.float32 else 1e-15
                    assert error(gradient[i], slope[i]) <= rounding * (100 + 10.0**exponent)


GUARDED = """
import itertools
import pykernels
from pykernels import NTK, Activation

g = torch.Generator().manual_seed(0)


def leaf(*shape):
    return guarded(shape, dtype).copy_(torch.randn(shape, generator=g)).requires_grad_()


networks = itertools.cycle((
    NTK(3, "relu", bias_std=1.0, learnable=True), NTK(1, "erf", 1.2, 0.3), NTK(2, ["relu+sin", "gelu"], 1.0, 0.5),
    NTK(0, "relu"), NTK(2, "leaky_relu", 1.0, 0.2, learnable=True),
))
kinds = itertools.cycle((("ntk", "both"), ("nngp",), ("ntk",)))
for name, dtype in itertools.product(pykernels.cpu_capabilities(), (torch.float32, torch.float64)):
    pykernels.set_cpu_capability(name)
    if dtype == torch.float64 and name != pykernels.cpu_capabilities()[-1]:
        continue  # once in float64 will do
    some = [
        (1, 1, 1, 1, 1, 1), (5, None, 2, 2, 1, 1), (17, 33, 7, 3, 2, 1), (33, 17, 8, 5, 1, 1), (31, None, 9, 1, 3, 1),
        (49, 47, 16, 4, 1, 1), (130, None, 3, 2, 1, 3), (65, 70, 97, 2, 2, 2), (3, 390, 20, 17, 1, 2),
        (390, 3, 5, 1, 1, 2),
    ]
    for n, m, d, p, batch, threads in some:
        torch.set_num_threads(threads)
        for kind in next(kinds):
            network = next(networks)
            x = leaf(batch, n, d)
            y = None if m is None else leaf(batch, m, d)
            z = x if y is None else y
            v, a = leaf(batch, z.shape[1], p), leaf(batch, z.shape[1])
            gram = network.gram(x, y, kind=kind, backend="cpu")
            outputs = list(gram) if kind == "both" else [gram]
            if kind != "both":
                outputs.append(network.matvec(x, z, v, kind=kind, backend="cpu"))
                outputs.append(network.witness(x, z, a, kind=kind, backend="cpu")[0])
            for out in outputs:
                grads = leaf(*out.shape).detach()
                leaves = [t for t in (x, y, v, a, *network.parameters()) if t is not None]
                found = torch.autograd.grad(out, leaves, grads, allow_unused=True, retain_graph=True)
                assert all(bool(t.isfinite().all()) for t in (out, *found) if t is not None)
            del x, y, z, v, a, gram, outputs, out, grads, leaves, found
            kept.clear()
"""


def test_no_access_outside_the_tensors():
    """Every argument and result lies against a page without access, once with its start and once with its end."""
    check_guarded(GUARDED, 200)
