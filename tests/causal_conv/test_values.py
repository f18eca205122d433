"""NaN, infinity, causality, determinism, and the accuracy of the activations."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch

import pykernels
from pykernels.ops import causal_conv1d, causal_conv_stack

from .cases import ACTIVATIONS, CASES, FEW, RUNNERS, Case, activate, results

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_what_depends_on_it_and_nothing_else(runner, activation, dtype):
    for length, dilation, time in ((100, 4, 37), (100, 4, 99), (700, 130, 200), (9, 40, 3)):
        case = Case(3, 5, 9, length, 3, dilation, activation, residual=False)
        tensors, grad = case.tensors(dtype), case.grad(dtype)
        tensors["x"][1, 2, time] = NAN
        y = causal_conv1d(**tensors, backend=runner.use(), **case.options())
        expected = torch.zeros_like(y, dtype=torch.bool)
        expected[1, :, time::dilation][..., :3] = True
        assert torch.equal(y.isnan(), expected)

        grad[2, 4, time] = NAN
        tensors = case.tensors(dtype)
        tensors["bias"] += 5  # every unit is on
        gradients = results(causal_conv1d, tensors, grad, backend=runner.backend, **case.options())
        expected = torch.zeros_like(tensors["x"], dtype=torch.bool)
        for tap in range(3):
            if time - tap * dilation >= 0:
                expected[2, :, time - tap * dilation] = True
        assert torch.equal(gradients["x"].isnan(), expected)
        assert gradients["bias"].isnan().nonzero().tolist() == [[4]]
        rows = gradients["weight"].isnan()
        assert rows[4, :, -1].all()
        assert not rows[[0, 1, 2, 3, 5, 6, 7, 8]].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_as_in_pytorch(capability, activation, dtype):
    """Activation and its derivative at infinities, NaN, zeros, the largest and the smallest numbers.

    Against PyTorch in float64, since its float32 gelu overflows at the largest numbers.
    """
    info = torch.finfo(dtype)
    one_side = [0.0, info.smallest_normal, info.tiny / 8, 1e-20, 0.25, 1.0, 30.0, 1e10, info.max, INF]
    values = torch.tensor([sign * v for v in one_side for sign in (1, -1)] + [NAN] * 3, dtype=dtype)
    x = values.reshape(1, 1, -1).requires_grad_()
    weight = torch.ones(1, 1, 1, dtype=dtype)
    for slope in (0.0, 0.01, 1.0, 2.5):
        y = causal_conv1d(x, weight, activation=activation, negative_slope=slope, backend="cpu")
        expected = activate(x.double(), activation, slope).to(dtype)
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=4 * info.eps, atol=0)
        actual_grad, expected_grad = (torch.autograd.grad(t.sum(), x)[0] for t in (y, expected))
        if activation == "leaky_relu":  # where the output is NaN, its slope is anyone's choice
            actual_grad, expected_grad = actual_grad[~y.isnan()], expected_grad[~y.isnan()]
        torch.testing.assert_close(actual_grad, expected_grad, equal_nan=True, rtol=4 * info.eps, atol=4 * info.eps)


def test_infinity_is_multiplied_like_any_number(capability):
    case = Case(1, 2, 3, 50, 3, 4)
    tensors = case.tensors(torch.float32)
    tensors["x"][0, 1, 20] = INF
    y = causal_conv1d(**tensors, backend="cpu", **case.options())
    for tap in range(3):
        assert torch.equal(y[0, :, 20 + 4 * tap], INF * tensors["weight"][:, 1, 2 - tap].sign())
    y[0, :, 20:29:4] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_the_future_does_not_change_the_past(runner, case: Case):
    backend = runner.use()
    tensors = case.tensors(torch.float32)
    y = causal_conv1d(**tensors, backend=backend, **case.options())
    for time in {1, case.length // 3, case.length // 2, case.length - 1}:
        changed = dict(tensors, x=tensors["x"].clone())
        changed["x"][:, :, time:] = NAN
        y_changed = causal_conv1d(**changed, backend=backend, **case.options())
        assert torch.equal(y_changed[:, :, :time], y[:, :, :time])
        assert y_changed[:, :, time].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in (*FEW, *CASES[:90]) if case.flops > 200_000], ids=str)
def test_bits_depend_on_neither_the_run_nor_the_thread_count(case: Case, dtype, capability):
    """For problems that are large enough to be shared between threads."""
    tensors, grad = case.tensors(dtype), case.grad(dtype)
    expected = results(causal_conv1d, tensors, grad, backend="cpu", **case.options())
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        actual = results(causal_conv1d, tensors, grad, backend="cpu", **case.options())
        for name, t in actual.items():
            assert torch.equal(t, expected[name]), (threads, name)


@pytest.mark.parametrize("pool", [False, True])
def test_bits_of_a_stack_depend_on_neither_the_run_nor_the_thread_count(capability, pool):
    g = torch.Generator().manual_seed(0)
    shapes = [(10, 40, 385), (41, 40, 3), (41,), (160, 41, 3), (160,), (160, 40, 1), (160,)]
    leaves = [torch.randn(s, generator=g).requires_grad_() for s in shapes]
    outcomes = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        y = causal_conv_stack(leaves[0], [leaves[1:]], [16], pool=pool, backend="cpu")
        outcomes.append((y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)))
    for other in outcomes[1:]:
        assert all(map(torch.equal, other, outcomes[0]))


@pytest.mark.parametrize("case", [c for c in (*FEW, *CASES[:18]) if c.batch > 1], ids=str)
def test_bits_of_a_sample_do_not_depend_on_the_others(case: Case, capability):
    tensors, grad = case.tensors(torch.float32), case.grad(torch.float32)
    whole = results(causal_conv1d, tensors, grad, backend="cpu", **case.options())
    for sample in {0, case.batch // 2, case.batch - 1}:
        rows = slice(sample, sample + 1)
        one = {name: t[rows] if name in ("x", "residual") else t for name, t in tensors.items()}
        alone = results(causal_conv1d, one, grad[rows], backend="cpu", **case.options())
        for name in {"y", "x", "residual"} & alone.keys():
            assert torch.equal(alone[name], whole[name][rows]), (sample, name)


def test_inputs_are_left_alone(capability):
    case = FEW[1]
    tensors, grad = case.tensors(torch.float32), case.grad(torch.float32)
    copies, grad_copy = {name: t.clone() for name, t in tensors.items()}, grad.clone()
    results(causal_conv1d, tensors, grad, backend="cpu", **case.options())
    assert all(torch.equal(t, copies[name]) for name, t in tensors.items())
    assert torch.equal(grad, grad_copy)


def through_tanh(values: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(values).reshape(1, 1, -1)
    weight = torch.ones(1, 1, 1, dtype=x.dtype)
    return causal_conv1d(x, weight, activation="tanh", backend="cpu").numpy().reshape(-1)


def ulps(actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Distance from ``exact``, of a longer type, in units in the last place of the nearest number of actual's type."""
    return np.abs(actual.astype(exact.dtype) - exact) / np.spacing(np.abs(exact).astype(actual.dtype))


def sweep(dtype: type) -> np.ndarray:
    """Where tanh bends, densely; every magnitude; the joints of the argument reduction."""
    rng = np.random.default_rng(0)
    limits = np.finfo(dtype)
    dense = np.linspace(-1.2 * {np.float32: 10, np.float64: 20}[dtype], 24, 400_001)
    magnitudes = np.exp2(rng.uniform(np.log2(float(limits.tiny)), 6, 100_000)) * rng.choice([-1, 1], 100_000)
    joints = np.arange(-64, 65)[:, None] * np.log(2) / 4 * (1 + np.arange(-50, 51) * float(limits.eps))
    small = rng.uniform(-0.4, 0.4, 200_000)
    return np.concatenate([dense, magnitudes, joints.ravel(), small]).astype(dtype)


@pytest.mark.parametrize(("dtype", "longer"), [(np.float32, np.float64), (np.float64, np.longdouble)])
def test_tanh_is_within_three_ulp(dtype, longer, capability):
    if np.finfo(longer).nmant < np.finfo(dtype).nmant + 10:
        pytest.skip("long double is no longer than double here")
    x = sweep(dtype)
    worst = ulps(through_tanh(x), np.tanh(x.astype(longer)))
    assert worst.max() <= 3.0, (float(worst.max()), float(x[worst.argmax()]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tanh_at_its_ends(dtype, capability):
    limits = np.finfo(dtype)
    large = np.array([10, 20, 50, 1e4, limits.max, np.inf], dtype)
    ends = through_tanh(np.concatenate([large, -large]))
    assert (np.abs(ends) <= 1).all()
    assert (ends[1:6] == 1).all()
    assert (ends[7:] == -1).all()
    assert np.isnan(through_tanh(np.array([np.nan, -np.nan], dtype))).all()
    zeros_and_tiny = np.array([0.0, -0.0, limits.smallest_subnormal, -limits.smallest_subnormal, limits.tiny], dtype)
    np.testing.assert_array_equal(through_tanh(zeros_and_tiny), zeros_and_tiny)
    x = sweep(dtype)
    assert (np.abs(through_tanh(x)) <= 1).all()
    np.testing.assert_array_equal(through_tanh(-x), -through_tanh(x))


def exact(activation: str, derivative: bool, z: float) -> mpmath.mpf:
    z = mpmath.mpf(z)
    if activation == "silu":
        s = 1 / (1 + mpmath.exp(-z))
        return s * (1 + z * (1 - s)) if derivative else z * s
    distribution = mpmath.erfc(-z / mpmath.sqrt(2)) / 2
    return distribution + z * mpmath.npdf(z) if derivative else z * distribution


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("derivative", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_silu_and_gelu(dtype, activation, derivative, groups):
    """silu within 3 ulp, gelu within 2 where z > 0; both within 1.25 eps |z|, and their derivatives eps (1 + |z|).

    PyTorch's float64 is that close too, and its float32 is not. gelu of large negative numbers, close to zero, has no
    more than an absolute error in either. Both in the dense kernel and in the depthwise one.
    """
    rng = np.random.default_rng(0)
    eps = np.finfo(dtype).eps
    small = rng.uniform(-1, 1, 300) * 2.0 ** rng.integers(-100, 1, 300)
    z = np.concatenate([np.linspace(-30, 30, 601), rng.uniform(-6, 6, 600), small]).astype(dtype)
    with mpmath.workdps(40):
        true = [exact(activation, derivative, float(v)) for v in z]
    size = np.spacing(np.abs(np.array(true, dtype=np.float64)).astype(dtype)).astype(np.float64)
    x = torch.from_numpy(z).reshape(1, 1, -1).expand(1, groups, -1).clone().requires_grad_()
    weight = torch.ones(groups, 1, 1, dtype=x.dtype)
    for capability in pykernels.cpu_capabilities():
        pykernels.set_cpu_capability(capability)
        y = causal_conv1d(x, weight, activation=activation, groups=groups, backend="cpu")
        values = torch.autograd.grad(y.sum(), x)[0] if derivative else y.detach()
        assert (values[:, :1] == values).all()
        off = np.array([float(abs(v - t)) for v, t in zip(values[0, 0].tolist(), true, strict=True)])
        if derivative:
            assert (off <= eps * (1 + np.abs(z))).all()
            continue
        assert (off <= 1.25 * eps * np.abs(z)).all()
        if activation == "silu":
            assert (off <= 3 * size).all()
        else:
            assert (off[z > 0] <= 2 * size[z > 0]).all()


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_gelu_far_out(dtype, activation, capability):
    """The identity on the right, nothing on the left, without overflow on the way; zeros keep their sign."""
    info = torch.finfo(dtype)
    far = torch.tensor([40.0, 89.0, 104.0, 710.0, 750.0, 1e5, info.max], dtype=dtype)
    z = torch.cat([far, -far, torch.tensor([0.0, -0.0], dtype=dtype)]).reshape(1, 1, -1).requires_grad_()
    y = causal_conv1d(z, torch.ones(1, 1, 1, dtype=dtype), activation=activation, backend="cpu")
    (gradient,) = torch.autograd.grad(y.sum(), z)
    n = len(far)
    assert torch.equal(y[0, 0, :n], far)
    assert torch.equal(gradient[0, 0, :n], torch.ones_like(far))
    assert (y[0, 0, n:-2].abs() <= 1e-15).all()
    assert (y[0, 0, n:-2] <= 0).all()
    assert (gradient[0, 0, n:-2].abs() <= 1e-15).all()
    assert gradient[0, 0, -2:].tolist() == [0.5, 0.5]
    assert (y[0, 0, -2:] == 0).all()


def test_capabilities_are_really_different():
    """The tests above would be vacuous if the capability could not be switched."""
    names = pykernels.cpu_capabilities()
    for name in names:
        pykernels.set_cpu_capability(name)
        assert pykernels.cpu_capability() == name
    with pytest.raises(ValueError, match="sse9"):
        pykernels.set_cpu_capability("sse9")
    assert pykernels.cpu_capability() == names[-1]
