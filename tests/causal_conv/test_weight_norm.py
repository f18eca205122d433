"""Weight normalisation of several weights at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pykernels.ops import weight_norm

from .cases import COMPILED, RUNNERS, error, pooled_error

SHAPES = [(40, 1, 3), (40, 40, 3), (1, 1), (7, 5), (3, 2, 2, 2), (160, 41, 3), (2, 1, 17), (5, 1000)]
EPS = torch.finfo(torch.float32).eps


def tensors(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    v = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    g = [torch.randn((s[0], *[1] * (len(s) - 1)), generator=generator, dtype=torch.float64) for s in SHAPES]
    grad = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    return [[t.to(dtype) for t in group] for group in (v, g, grad)]


def run(function, v, g, grad):
    leaves = [t.clone().requires_grad_() for t in (*v, *g)]
    w = function(leaves[: len(v)], leaves[len(v) :])
    return [t.detach() for t in w], list(torch.autograd.grad(w, leaves, grad))


def definition(v, g):
    return [b * a / a.square().sum(tuple(range(1, a.dim())), keepdim=True).sqrt() for a, b in zip(v, g, strict=True)]


def torch_weight_norm(v, g):
    return [torch._weight_norm(a, b, 0) for a, b in zip(v, g, strict=True)]


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_float64(runner):
    v, g, grad = tensors(torch.float64)
    backend = runner.use()
    expected_w, expected_grads = run(definition, v, g, grad)
    w, grads = run(lambda *t: weight_norm(*t, backend=backend), v, g, grad)
    for actual, expected in zip(w, expected_w, strict=True):
        assert error(actual, expected) <= 1e-12
    for actual, expected in zip(grads, expected_grads, strict=True):
        # grad_v of a single column is zero but for rounding
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("runner", COMPILED, ids=str)
def test_float32_against_torch(runner):
    """Weights at most twice as far from float64 as torch's own in float32, gradients three times, up to 2 eps."""
    outcomes = []
    for seed in range(3):
        v, g, grad = tensors(torch.float32, seed)
        exact = run(definition, *([t.double() for t in group] for group in (v, g, grad)))
        ours = run(lambda *t: weight_norm(*t, backend=runner.use()), v, g, grad)
        outcomes.append((exact, ours, run(torch_weight_norm, v, g, grad)))
    for part, factor in ((0, 2), (1, 3)):
        for i in range(len(outcomes[0][0][part])):
            if SHAPES[i % len(SHAPES)] == (1, 1):
                continue  # a norm of one number: w = sign(v) g, and grad_v is zero
            exact, ours, theirs = ([outcome[which][part][i] for outcome in outcomes] for which in range(3))
            assert pooled_error(ours, exact) <= factor * pooled_error(theirs, exact) + 2 * EPS, (part, i)


def test_equals_torch_parametrization():
    layer = parametrizations.weight_norm(nn.Conv1d(3, 5, 4, dtype=torch.float64))
    parameters = layer.parametrizations.weight
    with torch.no_grad():
        parameters.original0.mul_(1.7)
    w = weight_norm([parameters.original1], [parameters.original0])[0]
    assert error(w, layer.weight) <= 1e-14
    grads = [torch.autograd.grad(t.sin().sum(), list(parameters.parameters())) for t in (w, layer.weight)]
    for actual, expected in zip(*grads, strict=True):
        assert error(actual, expected) <= 1e-12


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_gradcheck(runner):
    backend = runner.use()
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 2), (3, 2), (2, 1, 1), (3,))]
    assert torch.autograd.gradcheck(lambda a, b, c, d: tuple(weight_norm([a, b], [c, d], backend=backend)), leaves)


@pytest.mark.parametrize("needed", range(1, 16))
def test_any_subset_of_gradients(needed):
    values = [torch.randn(s) for s in ((2, 3, 2), (3, 2), (2, 1, 1), (3,))]
    leaves = [t.requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(values)]
    outcome = [weight_norm(leaves[:2], leaves[2:], backend=backend) for backend in ("cpu", "reference")]
    wanted = [t for t in leaves if t.requires_grad]
    ours, expected = (torch.autograd.grad(sum(t.sin().sum() for t in w), wanted) for w in outcome)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_unused_weight_gets_no_gradient_or_zero(capability):
    v, g, grad = tensors(torch.float64)
    leaves = [t.clone().requires_grad_() for t in (*v[:2], *g[:2])]
    w = weight_norm(leaves[:2], leaves[2:], backend="cpu")
    grads = torch.autograd.grad(w[0], leaves, grad[0], allow_unused=True)
    assert grads[0].abs().max() > 0
    for i in (1, 3):
        assert grads[i] is None or not grads[i].any()


def test_zero_direction_as_in_torch(capability):
    v = torch.ones(2, 3)
    v[0] = 0
    g = torch.ones(2, 1)
    torch.testing.assert_close(weight_norm([v], [g], backend="cpu")[0], torch._weight_norm(v, g, 0), equal_nan=True)


def test_bits_depend_on_neither_the_run_nor_the_thread_count(capability):
    v, g, grad = tensors(torch.float32)
    outcomes = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        w, grads = run(lambda *t: weight_norm(*t, backend="cpu"), v, g, grad)
        outcomes.append([*w, *grads])
    for other in outcomes[1:]:
        assert all(map(torch.equal, other, outcomes[0]))


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize(
    ("v", "g", "message"),
    [
        ([], [], "at least one"),
        ([torch.ones(2, 3)], [], "equally many"),
        ([torch.ones(2, 3)], [torch.ones(2)] * 2, "equally many"),
        ([torch.ones(2, 3)], [torch.ones(3)], r"g\[0\]"),
        ([torch.ones(2, 3)] * 2, [torch.ones(2), torch.ones(1)], r"g\[1\]"),
        ([torch.ones(3)], [torch.ones(3)], r"v\[0\]"),
        ([torch.ones(0, 3)], [torch.ones(0)], r"v\[0\]"),
        ([torch.ones(2, 0)], [torch.ones(2)], r"v\[0\]"),
        ([torch.ones(2, 3)], [torch.ones(2).double()], r"g\[0\].*dtype"),
        ([torch.ones(2, 3), torch.ones(2, 3).double()], [torch.ones(2), torch.ones(2).double()], r"v\[1\].*dtype"),
        ([torch.ones(2, 3)], [torch.ones(2, device="meta")], r"g\[0\].*device"),
    ],
)
def test_what_does_not_fit_together_is_refused(v, g, message, backend):
    with pytest.raises(ValueError, match=message):
        weight_norm(v, g, backend=backend)
