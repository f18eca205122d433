"""The Triton kernels in Triton's interpreter, on the CPU: test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import mpmath
import pytest
import torch
import triton
import triton.language as tl

from pykernels.ops._triton_math import arc_of, asin, excess_of
from pykernels.ops.ntk_gram import Activation, ntk_gram, ntk_matvec, ntk_witness, reference
from pykernels.ops.ntk_gram import triton as kernels
from pykernels.ops.ntk_gram.activations import network
from pykernels.ops.ntk_gram.reference import Problem

from .triton_cases import NETWORKS, SIZES, Case, check_accuracy, check_float64, error


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None) -> None:
    pass


def test_kernels_are_interpreted():
    assert kernels.INTERPRETED


@pytest.mark.parametrize("case", NETWORKS + SIZES, ids=str)
def test_float64(case: Case):
    check_float64(case, "cpu")


@pytest.mark.parametrize(("d", "depth"), [(2, 10), (16, 3), (784, 3)])
def test_accuracy(d: int, depth: int):
    check_accuracy(d, ("relu",) * depth, "cpu")


@pytest.mark.parametrize(
    ("d", "activation", "bias"),
    [
        (2, ("erf",) * 10, 0.0),
        (2, ("sin", "relu+gelu"), 0.0),
        (16, ("cos", "rbf", "leaky_relu"), 0.3),
        (2, ("gelu",) * 4, 0.3),
    ],
)
def test_accuracy_of_other_networks(d: int, activation: tuple[str, ...], bias: float):
    check_accuracy(d, activation, "cpu", bias)


@triton.jit
def angles(h, arc, excess, whole, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(h + i)
    tl.store(arc + i, arc_of(x))
    tl.store(excess + i, excess_of(x))
    tl.store(whole + i, asin(1.0 - 4.0 * x, 8.0 * x * (1.0 - 2.0 * x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_angles(dtype: torch.dtype):
    """In units of the last place; the arcsine from -1 to 1."""
    h = torch.cat([torch.linspace(0, 0.5, 120), torch.logspace(-12, -1, 8)]).to(dtype)
    found = [torch.empty_like(h) for _ in range(3)]
    angles[(1,)](h, *found, BLOCK=len(h))
    with mpmath.workdps(40):
        for x, arc, excess, whole in zip(h.tolist(), *(t.tolist() for t in found), strict=True):
            x = mpmath.mpf(x)
            s = mpmath.sqrt(x)
            a = mpmath.asin(s) / s if x > 0 else mpmath.mpf(1)
            b = (mpmath.sqrt(1 - x) - a * (1 - 2 * x)) / x if x > 0 else mpmath.mpf(4) / 3
            for value, exact in ((arc, a), (excess, b)):
                assert abs(value - exact) <= 3 * torch.finfo(dtype).eps * exact, x
            assert abs(whole - mpmath.asin(1 - 4 * x)) <= 3 * torch.finfo(dtype).eps, x


@triton.jit
def gelu_distances(e, q, r, found, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(e + i)
    tl.store(found + i, kernels.gelu_distance(x, 1.0 - x, tl.load(q + i), tl.load(r + i)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_distances_of_gelu(dtype: torch.dtype):
    """Between points of unit length their roots are distances, and these keep all digits however small they are."""
    generator = torch.Generator().manual_seed(0)
    e, q, closeness, noise = (torch.rand(64, generator=generator, dtype=torch.float64) for _ in range(4))
    e, q = 10 ** (-12 * e), 10 ** (4 * q - 2)
    r = q * (1 + noise * 10 ** (-8 * closeness))
    e[:4], r[:8] = 0.0, q[:8]
    e, q, r = e.to(dtype), q.to(dtype), r.to(dtype)
    found = torch.empty_like(e)
    gelu_distances[(1,)](e, q, r, found, BLOCK=len(e))

    def kernel(q: mpmath.mpf, r: mpmath.mpf, c: mpmath.mpf) -> mpmath.mpf:
        qq, rr = 1 + q, 1 + r
        sizes = (q * r - c * c + c * c / qq + c * c / rr) / mpmath.sqrt(qq * rr - c * c)
        return c / 4 + (c * mpmath.asin(c / mpmath.sqrt(qq * rr)) + sizes) / (2 * mpmath.pi)

    with mpmath.workdps(40):
        for values in zip(e.tolist(), q.tolist(), r.tolist(), found.tolist(), strict=True):
            e_, q_, r_, value = map(mpmath.mpf, values)
            sizes = kernel(q_, q_, q_), kernel(r_, r_, r_)
            exact = sizes[0] + sizes[1] - 2 * kernel(q_, r_, mpmath.sqrt(q_ * r_) * (1 - 2 * e_))
            unit = mpmath.sqrt(sizes[0] * sizes[1])
            difference = mpmath.sqrt(max(value, 0) / unit) - mpmath.sqrt(exact / unit)
            assert abs(difference) <= 4 * torch.finfo(dtype).eps, values


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("d", [3, 40])
def test_rounded_inner_products(precision: str, d: int):
    """Those of rounded vectors, as the reference has them."""
    case = Case(("relu",), n=9, m=11, d=d, precision=precision)
    values = case.values(torch.float32)
    expected, actual = (case.forward(values, backend) for backend in ("reference", "triton"))
    exact = case._replace(precision="float32").forward(values, "reference")
    eps = {"tf32": 2.0**-11, "bf16": 2.0**-8}[precision]
    for name in ("nngp", "ntk", "symmetric", "matvec", "value"):
        assert error(actual[name], expected[name]) <= 1e-6
        assert eps / 100 < error(actual[name], exact[name]) <= 2 * eps


def spread(t: torch.Tensor) -> torch.Tensor:
    """The same values with gaps of NaN between all of them."""
    wide = torch.full([2 * n for n in t.shape], float("nan"), dtype=t.dtype)
    return wide[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


def test_bits_depend_on_neither_the_run_nor_the_strides():
    case = Case(("relu",), d=9, columns=2)
    values = case.values(torch.float32)
    first = case.results(values, "triton")
    again = case.results({name: spread(t) for name, t in values.items()}, "triton")
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_one_weight_for_all():
    """Weights with strides of 0, and negated ones, which are views."""
    x = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    z = torch.randn(1, 40, 3, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(ntk_gram(x, z, backend=backend).sum(), x)[0] for backend in ("reference", "triton")
    ]
    assert error(*gradients) <= 1e-14
    negated = torch._neg_view(z)
    assert torch.equal(ntk_gram(x, negated, backend="triton"), ntk_gram(x, negated.clone(), backend="triton"))


def test_symmetric_matrices_are_symmetric():
    x = torch.randn(1, 70, 20)
    gram = ntk_gram(x, activation=("relu", "erf"), bias_std=0.3, backend="triton")
    assert torch.equal(gram, gram.mT)
    assert error(gram, ntk_gram(x, x, activation=("relu", "erf"), bias_std=0.3, backend="triton")) <= 5e-7


@triton.jit
def tiles_of_triangle(found, tiles):
    row, column = kernels.tile_of_triangle(tl.program_id(0), tiles)
    tl.store(found + 2 * tl.program_id(0), row)
    tl.store(found + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize("tiles", [1, 2, 7, 8])
def test_triangles(tiles: int):
    """Every tile on or below the diagonal comes once."""
    found = torch.empty(tiles * (tiles + 1) // 2, 2, dtype=torch.int32)
    tiles_of_triangle[(len(found),)](found, tiles)
    assert sorted(found.tolist()) == [[i, j] for i in range(tiles) for j in range(i + 1)]


def test_sums_in_one_program(monkeypatch):
    """As large problems have them, and in several blocks of components."""
    case = Case(("relu",), m=33, d=33, columns=3, backward=("matvec",))
    values = case.values(torch.float64)
    expected = case.results(values, "reference")
    monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(kernels, "MOST_COMPONENTS", 32)
    for name, value in case.results(values, "triton").items():
        assert error(value, expected[name]) <= 2e-14


def test_wide_offsets(monkeypatch):
    """Large sizes take 64-bit offsets; with the limit lowered, the small problem does."""
    monkeypatch.setattr(kernels, "INT32_LIMIT", 0)
    check_float64(Case(("relu", "gelu")), "cpu")


@pytest.mark.parametrize("activation", [("relu", "relu"), ("sin", "gelu"), ("rbf",)])
def test_zero_vectors(activation: tuple[str, ...]):
    """Of points, and of networks without weights."""
    case = Case(activation, bias=False)
    values = case.values(torch.float64)
    values["x"][0, 1] = 0
    values["z"][0, 2] = 0
    for weight in (1.0, 0.0):
        values["weight_std"][1] *= weight
        expected, actual = (case.forward(values, backend) for backend in ("reference", "triton"))
        for name, value in actual.items():
            assert error(value, expected[name]) <= 2e-14


@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy, in the interpreter: what makes infinities NaN
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite(bad: float):
    """Reaches its own row and column only, and is NaN there."""
    x = torch.randn(6, 3)
    expected = ntk_gram(x, activation="relu", backend="triton")
    x[2, 1] = bad
    found = ntk_gram(x, activation="relu", backend="triton")
    touched = torch.zeros(6, 6, dtype=torch.bool)
    touched[2], touched[:, 2] = True, True
    assert found[touched].isnan().all()
    assert torch.equal(found[~touched], expected[~touched])


def test_points_of_any_size():
    """From nearly 0 to nearly too large: the kernel of a homogeneous network scales with them."""
    x, z = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    expected = ntk_gram(x, z, activation=("relu", "abs"), backend="triton")
    for scale in (1e-9, 1e100):
        assert error(ntk_gram(scale * x, z, activation=("relu", "abs"), backend="triton") / scale, expected) <= 2e-15


def test_gelu_of_points_of_any_size():
    """Four variances of 1e16 have a product beyond float32."""
    x, z = torch.randn(5, 3), torch.randn(4, 3)
    z[0], z[1] = x[0], -x[1]
    for scale in (1e-9, 1e4, 1e8):
        points, options = (scale * x, scale * z), {"activation": ("gelu", "relu"), "kind": "ntk"}
        expected = ntk_gram(*(p.double() for p in points), backend="reference", **options)
        assert error(ntk_gram(*points, backend="triton", **options), expected) <= 1e-6


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (0, 0, 3), (4, 5, 0)])
def test_empty(shape: tuple[int, int, int]):
    """No points, and points without components: only the bias is left of these."""
    n, m, d = shape
    x, z = torch.randn(2, n, d), torch.randn(2, m, d)
    options = {"bias_std": [0.5, 0.0], "backend": "triton"}
    value, gradient = ntk_witness(x, z, torch.randn(2, m), **options)
    product = ntk_matvec(x, z, torch.randn(2, m, 3), **options)
    gram = ntk_gram(x, z, **options)
    assert gradient.shape == x.shape
    assert gram.shape == (2, n, m)
    if m == 0:
        assert value.eq(0).all()
        assert product.eq(0).all()
    if d == 0:
        assert error(gram, torch.full_like(gram, 0.25)) <= 3e-7
    assert product.shape == (2, n, 3)


def test_low_precision():
    x, z = torch.randn(5, 3).half(), torch.randn(4, 3).bfloat16()
    found = ntk_gram(x, z, backend="triton")
    assert found.dtype == torch.float16
    assert error(found, ntk_gram(x.double(), z.double(), backend="reference")) <= 1e-3


def test_gradients_of_the_witness_by_rows():
    """The operator itself: sums of derivatives by row parameters are those of the reference on its constraint."""
    generator = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(1, *shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (6, 3), (5, 6)))
    options = network([Activation("gelu"), Activation("erf+relu")], "ntk", "float32")
    scales = torch.rand(2, 3, generator=generator, dtype=torch.float64) + 0.5
    values, gradients, rows = kernels.witness(Problem(x, y, *scales), None, None, w, options, True)
    assert rows is not None
    assert rows.shape[-1] == options.row_parameters()
    assert torch.equal(rows[..., -1], values)
    augmented = reference.augment(x, *scales).requires_grad_()
    unit, q = reference.normalized(augmented)
    side, other = reference.rows(q, *scales, options), reference._sides(Problem(y, None, *scales), options)[0]
    total = (w * reference._kernels((unit, side), other, options)[0]).sum()
    assert error(gradients, torch.autograd.grad(total, augmented)[0]) <= 1e-14
    # Along the points only the row parameters change.
    log_q = q.detach().log().requires_grad_()
    parameters = reference.primary(reference.rows(log_q.exp(), *scales, options), options)
    (along,) = torch.autograd.grad(parameters, log_q, rows)
    assert error((gradients * augmented).sum(-1).detach(), 2 * along) <= 1e-14


def test_negated_views():
    """The bit that torch keeps for them is heeded, and strides are those of what the kernels get."""
    x = torch.randn(5, 9, dtype=torch.complex64).conj().imag[:, :3]
    assert x.is_neg()
    y, z = x.resolve_neg().clone(), torch.randn(4, 3)
    for of_view, of_copy in (
        (ntk_gram(x, z, backend="triton"), ntk_gram(y, z, backend="triton")),
        (ntk_matvec(z, x, x, backend="triton"), ntk_matvec(z, y, y, backend="triton")),
        (ntk_witness(z, x, x[:, 0], backend="triton")[1], ntk_witness(z, y, y[:, 0], backend="triton")[1]),
    ):
        assert torch.equal(of_view, of_copy)
