"""Penalties of motion fields."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad

import pykernels
from pykernels import flow_penalties
from pykernels.backends import OPERATORS
from pykernels.ops.gaussian_warp import penalties_reference

from .penalty_cases import PROBLEMS, SUBSETS, Problem, by_loops, check_float32, check_float64, error

# torch itself still uses torch.jit, in forward mode and in inductor.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
ops = torch.ops.pykernels
SMALL = [Problem((5,)), Problem((4, 3)), Problem((2, 3), xy=False), Problem((2, 3, 2)), Problem((1, 4))]
BACKENDS = ["cpu", "reference"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_small = pytest.mark.parametrize("problem", SMALL, ids=str)


@pytest.mark.parametrize("problem", [p for p in [*PROBLEMS, *SUBSETS] if math.prod(p.sizes) <= 512], ids=str)
def test_the_reference_is_the_definition(problem):
    flow = problem.flow()
    torch.testing.assert_close(problem.run(flow, "reference"), by_loops(problem, flow), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("problem", [*PROBLEMS, *SUBSETS], ids=str)
def test_float64(problem, capability, poisoned):
    check_float64(problem, "cpu")


@pytest.mark.parametrize("problem", [*PROBLEMS[::3], *SUBSETS[::3], Problem((200, 300), batch=1)], ids=str)
def test_float32(problem, capability, poisoned):
    check_float32(problem, "cpu")


@each_backend
def test_mean_over_the_batch(backend):
    problem = Problem(batch=5)
    flow = problem.flow()
    mean = problem.run(flow, backend, "mean")
    assert mean.shape == ()
    torch.testing.assert_close(mean, problem.run(flow, backend).mean())


@each_backend
def test_a_rotation_has_no_divergence_and_a_source_has(backend):
    """At every pixel, those at the border included; channel 0 is along the last axis."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (6, 9)), indexing="ij")
    for flow, expected in ((torch.stack([-y, x]), 0.0), (torch.stack([x, -y]), 0.0), (torch.stack([x, 2 * y]), 9.0)):
        assert flow_penalties(flow[None], divergence=1.0, backend=backend).item() == expected
        swapped = flow_penalties(flow.flip(0)[None], divergence=1.0, indexing="ij", backend=backend)
        assert swapped.item() == expected
    shear = torch.stack([y, x])[None]
    assert flow_penalties(shear, smoothness=0.5, backend=backend).item() == 1.0
    assert flow_penalties(torch.stack([3 + 0 * x, 4 + 0 * x])[None], magnitude=-0.1, backend=backend).item() == -2.5


def test_published_coefficients_in_pixels():
    """The factors of the docstring: the same loss for the same motion in pixels and normalized."""
    size, flow = 64, Problem((64, 64)).flow()
    factor = (2 / (size - 1)) ** 2
    normalized = flow_penalties(flow * 2 / (size - 1), divergence=1.0, smoothness=0.4, magnitude=-0.0015)
    pixels = flow_penalties(flow, divergence=factor, smoothness=0.4 * factor, magnitude=-0.0015 * factor)
    torch.testing.assert_close(pixels, normalized)
    assert [f"{c * factor:.1e}" for c in (0.4, 1.0, -0.0015)] == ["4.0e-04", "1.0e-03", "-1.5e-06"]


@each_small
@each_backend
def test_gradcheck(problem, backend):
    flow = problem.flow().requires_grad_()
    run = {"nondet_tol": 0.0, "check_batched_grad": True}
    assert torch.autograd.gradcheck(lambda w: problem.run(w, backend), flow, check_forward_ad=True, **run)
    assert torch.autograd.gradgradcheck(lambda w: problem.run(w, backend), flow, **run)


def test_the_derivative_of_the_gradient_runs_the_kernels(monkeypatch):
    """Also that of a third and fourth order; nothing runs the reference."""
    problem = Problem()
    monkeypatch.setattr(penalties_reference, "gradient", None)
    monkeypatch.setattr(penalties_reference, "penalties", None)
    flow = problem.flow().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.run(flow).exp().sum(), flow, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), flow, create_graph=True)
    (third,) = torch.autograd.grad(second.square().sum(), flow)
    monkeypatch.undo()
    (gradient,) = torch.autograd.grad(problem.run(flow, "reference").exp().sum(), flow, create_graph=True)
    (second_,) = torch.autograd.grad(gradient.square().sum(), flow, create_graph=True)
    (third_,) = torch.autograd.grad(second_.square().sum(), flow)
    assert error(second.detach(), second_.detach()) <= 1e-12
    assert error(third, third_) <= 1e-12


@each_small
def test_transforms(problem):
    flow = problem.flow()
    tangent = problem._replace(batch=problem.batch).flow(seed=3)

    def run(w):
        return problem.run(w)

    value, derivative = torch.func.jvp(run, (flow,), (tangent,))
    leaf = flow.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(run(leaf).sum(), leaf)
    torch.testing.assert_close(value, run(flow))
    torch.testing.assert_close(derivative, (gradient * tangent).flatten(1).sum(1))
    with forward_ad.dual_level():
        dual = run(forward_ad.make_dual(flow, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, derivative)
    torch.testing.assert_close(torch.func.grad(lambda w: run(w).sum())(flow), gradient)
    many = torch.stack([flow, 2 * flow, tangent])
    torch.testing.assert_close(torch.func.vmap(run)(many), torch.stack([run(w) for w in many]))
    found = torch.func.vmap(torch.func.grad(lambda w: run(w).sum()))(many)
    torch.testing.assert_close(found[:2], torch.stack([gradient, 2 * gradient]))
    hessian = torch.autograd.functional.hessian(lambda w: run(w).sum(), flow, vectorize=True)
    torch.testing.assert_close(hessian, torch.func.hessian(lambda w: run(w).sum())(flow))


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction):
    torch._dynamo.reset()

    def run(flow):
        return Problem().run(flow, "cpu", reduction).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for problem in (Problem((4, 5), batch=3), Problem((7, 3), batch=6)):
            leaf = problem.flow().requires_grad_()
            values = [compiled(leaf), run(leaf)]
            torch.testing.assert_close(*values)
            torch.testing.assert_close(*(torch.autograd.grad(v.sum(), leaf) for v in values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_small
def test_opcheck(problem, dtype):
    rest = (*problem.options, "cpu")
    flow, grads = problem.flow(dtype), problem.grads(dtype)
    strided = flow.transpose(0, -1).contiguous().transpose(0, -1)
    for name, args in (
        ("flow_penalties", (flow, *rest)),
        ("flow_penalties", (strided, *rest)),
        ("flow_penalties_backward", (grads, flow, *rest)),
    ):
        operator = getattr(ops, name).default
        assert set(torch.library.opcheck(operator, args).values()) == {"SUCCESS"}


def test_raw_operators_check_what_keeps_accesses_inside():
    flow, rest = Problem().flow(), (*Problem().options, "cpu")
    with pytest.raises(ValueError, match=r"call pykernels.flow_penalties"):
        ops.flow_penalties(flow[:, :1], *rest)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        ops.flow_penalties_backward(flow.new_ones(3), flow, *rest)
    with pytest.raises(ValueError, match=r"dtype torch\.float32"):
        ops.flow_penalties_backward(torch.ones(2), flow, *rest)
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        ops.flow_penalties(flow.requires_grad_(), *rest)
    with pytest.raises(ValueError, match="inconsistent sizes"):
        pykernels._cpu.flow_penalties_double(1, (0, 3), 0, True, (1.0, 1.0, 1.0), 0, 1)


@pytest.mark.parametrize("problem", [Problem((129, 257)), Problem((40_000,)), Problem((9, 65, 65))], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(problem, capability):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(problem.results(problem.flow(torch.float32), problem.grads(torch.float32), "cpu"))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_samples_do_not_depend_on_each_other():
    problem = Problem((33, 70), batch=3)
    flow, grads = problem.flow(torch.float32), problem.grads(torch.float32)
    values, gradient = problem.results(flow, grads, "cpu")
    for b in range(3):
        alone, gradient_alone = problem.results(flow[b : b + 1], grads[b : b + 1], "cpu")
        assert torch.equal(alone[0], values[b])
        assert torch.equal(gradient_alone[0], gradient[b])


@each_backend
def test_strides(backend):
    problem = Problem((6, 7))
    flow, grads = problem.flow(), problem.grads()
    expected = problem.results(flow, grads, backend)
    wide = torch.full((4, 4, 12, 14), torch.nan, dtype=torch.float64)
    wide[::2, ::2, ::2, ::2] = flow
    negated = torch._neg_view(-flow)
    assert negated.is_neg()
    for other in (flow.contiguous(memory_format=torch.channels_last), wide[::2, ::2, ::2, ::2], negated):
        found = problem.results(other, torch.stack([grads, grads], 1)[:, 0], backend)
        assert all(map(torch.equal, found, expected))
        assert found[1].is_contiguous()
    constant = flow[..., :1].expand(flow.shape)
    torch.testing.assert_close(problem.run(constant, backend), problem.run(constant.contiguous(), "reference"))


@each_backend
def test_empty_batch(backend):
    problem = Problem(batch=0)
    values, gradient = problem.results(problem.flow(), problem.grads(), backend)
    assert values.shape == (0,)
    assert gradient.shape == (0, 2, 4, 5)
    assert problem.run(problem.flow(), backend, "mean").isnan()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, backend):
    """Computed and given back in float32, of the rounded flow; the gradient in the dtype of the flow."""
    problem = Problem((30, 31))
    flow = (1000 * problem.flow()).to(dtype)  # whose squares do not fit into float16
    values, gradient = problem.results(flow, problem.grads(torch.float32) / 1000, backend)
    expected = problem.results(flow.double(), problem.grads() / 1000, "reference")
    assert values.dtype == torch.float32
    assert gradient.dtype == dtype
    assert error(values, expected[0]) <= 1e-6
    assert error(gradient, expected[1]) <= torch.finfo(dtype).eps


@each_backend
def test_nan_and_infinity(backend):
    """NaN spreads to what reads it, and no further; what a coefficient leaves out is not read."""
    problem = Problem((9, 9), batch=2)
    flow, grads = problem.flow(), problem.grads()
    expected = problem.results(flow, grads, backend)
    flow[0, 1, 4, 4] = torch.nan
    values, gradient = problem.results(flow, grads, backend)
    assert values.isnan().tolist() == [True, False]
    assert torch.equal(gradient[1], expected[1][1])
    assert gradient[0, :, 4, 4].isnan().all()
    untouched = torch.ones(9, 9, dtype=torch.bool)
    untouched[3:6, 3:6] = False
    assert torch.equal(gradient[0, :, untouched], expected[1][0, :, untouched])
    flow[0, 1, 4, 4] = torch.inf
    nothing = Problem((9, 9), 0.0, 0.0, 0.0)
    assert all(not r.any() for r in nothing.results(flow, grads, backend))
    only = Problem((9, 9), 0.0, 2.0, 0.0)
    values, gradient = only.results(flow, grads, backend)
    assert values.isinf().tolist() == [True, False]
    assert gradient.isinf().sum() == 1
    assert not gradient.isnan().any()


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "flow must be a tensor, got list", {"flow": [1.0]}),
        (TypeError, "flow must have a floating dtype, got torch.int64", {"flow": torch.ones(1, 1, 3, dtype=int)}),
        (ValueError, r"flow must have shape \(B, R, \*S\).* got \(2, 3, 4, 5\)", {"flow": torch.ones(2, 3, 4, 5)}),
        (ValueError, r"got \(2, 2, 0, 5\)", {"flow": torch.ones(2, 2, 0, 5)}),
        (ValueError, r"got \(2, 2\)", {"flow": torch.ones(2, 2)}),
        (ValueError, r"got \(2, 6, 2, 4, 4, 4\)", {"flow": torch.ones(2, 6, 2, 4, 4, 4)}),
        (TypeError, r"divergence must be a number, got a tensor; multiply", {"divergence": torch.tensor(1.0)}),
        (TypeError, "magnitude must be a number, got str", {"magnitude": "1"}),
        (TypeError, "smoothness must be a number, got bool", {"smoothness": True}),
        (ValueError, "smoothness must be finite, got nan", {"smoothness": math.nan}),
        (ValueError, "reduction must be one of 'mean', 'none', got 'sum'", {"reduction": "sum"}),
        (ValueError, "indexing must be one of 'xy', 'ij', got 'yx'", {"indexing": "yx"}),
        (ValueError, "backend must be one of", {"backend": "gpu"}),
        (RuntimeError, "cannot run flow_penalties: the flow is on meta", {"flow": torch.ones(1, 1, 3, device="meta")}),
    ],
)
def test_errors(error, message, changed):
    arguments = {"flow": torch.ones(2, 2, 4, 5), "backend": "cpu", **changed}
    with pytest.raises(error, match=message):
        flow_penalties(arguments.pop("flow"), **arguments)


def test_check_and_explain():
    assert OPERATORS["flow_penalties"].check("cpu").passed
    report = pykernels.explain(lambda w: flow_penalties(w, smoothness=1.0), Problem().flow())
    assert "flow_penalties" in str(report)
