"""Stage combinations in one pass, and their derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import pykernels
from pykernels.ops.latent_ode import combine as module
from pykernels.ops.latent_ode.combine import combination, fused

from .fields import TIMES, random

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, in forward mode
SIZES = (0, 1, 3, 17, 255, 16384, 16385, 70001)
FACTORS = [0.1, -0.7, 1.3, 0.01]


def problem(size, terms, dtype=torch.float64):
    return random(size, dtype=dtype), FACTORS[:terms], [random(size, dtype=dtype, seed=1 + j) for j in range(terms)]


def exact(y, factors, stages):
    return y.double() + sum(c * k.double() for c, k in zip(factors, stages, strict=True))


@pytest.fixture
def always(monkeypatch):
    """Kernels for small states too."""
    monkeypatch.setattr(module, "SMALLEST", 0)
    monkeypatch.setattr(module, "SMALLEST_RECORDED", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("terms", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, terms, dtype, capability, poisoned, always):
    y, factors, stages = problem(size, terms, dtype)
    eps = torch.finfo(dtype).eps
    expected = exact(y, factors, stages)
    scale = 1.0 if size == 0 else expected.abs().max().item() + 1
    actual = fused(y, factors, stages)
    assert actual.dtype == dtype
    assert ((actual - expected).abs() <= 4 * eps * scale).all()
    leaves = [x.clone().requires_grad_() for x in (y, *stages)]
    recorded = fused(leaves[0], factors, leaves[1:])
    assert type(recorded.grad_fn).__name__ == "_CombineBackward"
    assert torch.equal(recorded, actual)
    grad = random(size, dtype=dtype, seed=9)
    for found, factor in zip(torch.autograd.grad(recorded, leaves, grad), (1.0, *factors), strict=True):
        assert ((found - factor * grad).abs() <= 2 * eps * (factor * grad).abs()).all()


@pytest.mark.parametrize("needed", range(1, 8))
def test_any_subset_of_gradients(needed, always):
    y, factors, stages = problem(33, 2)
    leaves = [x.requires_grad_(bool(needed >> i & 1)) for i, x in enumerate((y, *stages))]
    wanted = [x for x in leaves if x.requires_grad]
    actual = torch.autograd.grad(fused(y, factors, stages).sin().sum(), wanted)
    expected = torch.autograd.grad(exact(y, factors, stages).sin().sum(), wanted)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_gradcheck_and_gradgradcheck(always):
    y, factors, stages = problem(5, 3)
    leaves = [x.requires_grad_() for x in (y, *stages)]
    assert torch.autograd.gradcheck(lambda y, *k: fused(y, factors, k).sin(), leaves)
    assert torch.autograd.gradgradcheck(lambda y, *k: fused(y, factors, k).sin(), leaves)


def test_bits_do_not_depend_on_the_number_of_threads(capability, always):
    y, factors, stages = problem(200_003, 4, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [x.clone().requires_grad_() for x in (y, *stages)]
        value = fused(leaves[0], factors, leaves[1:])
        results.append([value, *torch.autograd.grad(value.sin().sum(), leaves)])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_complex_states(always):
    y, factors, stages = problem(37, 3, torch.complex128)
    leaves = [x.clone().requires_grad_() for x in (y, *stages)]
    value = fused(leaves[0], factors, leaves[1:])
    expected = leaves[0] + sum(c * k for c, k in zip(factors, leaves[1:], strict=True))
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-14)
    ours, theirs = (torch.autograd.grad(v.sin().abs().sum(), leaves) for v in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert fused(y.conj(), factors, stages) is None


def test_what_the_kernels_cannot_read_is_left_to_torch(always):
    y, factors, stages = problem(12, 2)
    square = random(3, 4)
    negated = torch._neg_view(stages[0])
    assert negated.is_neg()
    for other in (stages[0].float(), stages[0][:6], stages[0][None], square.flatten()[::2], negated):
        assert fused(y, factors, [other, stages[1]]) is None
    assert fused(square.T, factors, [square.T, square.T]) is None
    assert fused(y.half(), factors, [k.half() for k in stages]) is None
    assert fused(y, factors, stages) is not None
    with forward_ad.dual_level():
        assert fused(forward_ad.make_dual(y, y), factors, stages) is None
    assert torch.func.vmap(lambda k: y if fused(y, factors, [k, k]) is None else k)(torch.stack(stages)).shape == (
        2,
        12,
    )
    with TorchDispatchMode():
        assert fused(y, factors, stages) is None


@pytest.mark.parametrize(("method", "calls"), [("heun3", 1), ("rk4", 3)])
def test_large_states_have_the_numbers_of_small_ones(method, calls, capability, monkeypatch):
    """The same trajectories and gradients by the kernels, from their own sizes on, and by operations of torch."""
    weight = random(3, seed=3)

    def field(t, y):
        return torch.sin(y * weight) * t

    def run(record, every=None):
        y0 = random(module.SMALLEST_RECORDED // 3 + 1, 3).requires_grad_(record)
        with torch.set_grad_enabled(record):
            states = pykernels.odeint(field, y0, TIMES[:3], method=method, checkpoint_every=every)
        return (states, *torch.autograd.grad(states.square().sum(), y0)) if record else (states,)

    counted = []
    forward = module._forward
    monkeypatch.setattr(module, "_forward", lambda *args: counted.append(args) or forward(*args))
    kernels = [run(False), run(True)]
    assert len(counted) == 2 * 2 * calls  # two runs of two steps, with so many combinations of several stages
    assert all(map(torch.equal, run(True, every=1), kernels[1]))
    monkeypatch.setattr(module, "SMALLEST", 1 << 60)
    for a, b in zip(kernels, [run(False), run(True)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_zero_coefficients_are_skipped():
    y, _, stages = problem(4, 3)
    stages[1].fill_(torch.nan)
    for sizes in ([2.0], torch.tensor([2.0], dtype=torch.float64)):
        actual = combination((1.0, 0.0, 3.0), sizes)(0, y, stages)
        torch.testing.assert_close(actual, y + 2 * stages[0] + 6 * stages[2])
