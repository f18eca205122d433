"""The compiled warps against the reference: values and gradients, layouts of memory, numbers that are not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import pykernels
from pykernels import gaussian_warp, gaussian_warp_rollout

from ..guarded import check_guarded
from .warps import (
    FORMS,
    NORMALIZE,
    PADDING_MODES,
    VARIANCES,
    Problem,
    assert_agree,
    error,
    ids,
    options,
    sample,
    shapes,
)

EPS = torch.finfo(torch.float32).eps
NAN, INF = float("nan"), float("inf")
OPTIONS, SHAPES = options(), shapes()
SAMPLE = sample(60, seed=1)
#: A few that together go through most of the code.
FEW = [
    Problem((9, 33), variance="scalar", smooth=True),
    Problem((7, 35), variance="everything", steps=2, padding_mode="reflection", form="density"),
    Problem((40,), variance="samples", normalize="inside", support=4, batch=3),
    Problem((3, 4, 5), variance="number", padding_mode="periodic", support=3),
    Problem((6, 34), form="linear", padding_mode="border"),
]
each_few = pytest.mark.parametrize("problem", FEW, ids=str)


each_runner = pytest.mark.parametrize("runner", [*pykernels.cpu_capabilities(), "reference"])


def use(runner: str) -> str:
    """The backend of a CPU capability, which is set, or the reference."""
    if runner == "reference":
        return runner
    pykernels.set_cpu_capability(runner)
    return "cpu"


def check_float64(problem: Problem) -> None:
    tensors, grad = problem.tensors(), problem.grad()
    expected = problem.results(tensors, grad, "reference")
    actual = problem.results(tensors, grad, "cpu")
    assert_agree(actual, expected, problem)
    with torch.no_grad():
        assert torch.equal(problem.run(tensors, "cpu"), actual["frames"])


@pytest.mark.parametrize("problem", OPTIONS, ids=ids(OPTIONS))
def test_options(problem, capability, poisoned):
    check_float64(problem)


def test_shapes(capability, poisoned):
    for problem in SHAPES:
        check_float64(problem)


def test_sample(capability, poisoned):
    for problem in SAMPLE:
        check_float64(problem)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads(threads, poisoned):
    """One large sample is shared by rows, many by samples; only the image's gradient is a sum over the threads."""
    for problem in (
        Problem((65, 70), batch=1, variance="scalar", smooth=True),
        Problem((65, 70), batch=1, steps=2, variance="everything", padding_mode="reflection"),
        Problem((70, 65), batch=threads, padding_mode="border", variance="steps", steps=2),
        Problem((17, 16, 18), batch=1, channels=1, support=3, variance="scalar", padding_mode="periodic"),
        Problem((4100,), batch=1, normalize="inside", variance="samples"),
        Problem((65, 70), batch=7, channels=1, variance="row", form="density"),
    ):
        tensors, grad = problem.tensors(), problem.grad()
        torch.set_num_threads(1)
        expected = problem.results(tensors, grad, "cpu")
        torch.set_num_threads(threads)
        for _ in range(2):
            actual = problem.results(tensors, grad, "cpu")
            assert_agree(actual, expected, problem)
            for name in ("frames", "flows"):
                if problem.steps == 1 or name == "frames":
                    assert torch.equal(actual[name], expected[name]), (problem, name)
        again = problem.results(tensors, grad, "cpu")
        assert all(torch.equal(actual[name], again[name]) for name in again)


def float32_errors(problem: Problem) -> dict[str, tuple[float, float]]:
    """For every tensor, the errors of the kernels and of the reference in float32, pooled over draws of the inputs."""
    ours, theirs, expected = [], [], []
    for seed in range(3):
        tensors, grad = problem.tensors(torch.float32, seed), problem.grad(torch.float32, seed)
        exact = {name: t.double() for name, t in tensors.items()}
        # The same variance in both, where it is no tensor.
        problem = problem._replace(value=torch.tensor(problem.value).item())
        expected.append(problem.results(exact, grad.double(), "reference"))
        ours.append(problem.results(tensors, grad, "cpu"))
        theirs.append(problem.results(tensors, grad, "reference"))
    return {
        name: tuple(error([r[name] for r in run], [e[name] for e in expected]) for run in (ours, theirs))
        for name in expected[0]
    }


def test_float32(capability):
    """Errors at most twice those of the reference in float32, gradients three times.

    Problem by problem this holds up to 4 eps, since one rounding more or less decides where errors are that small;
    over all together it holds as it stands.
    """
    totals: dict[str, list[float]] = {}
    for problem in [p for p in [*OPTIONS[::2], *SHAPES[::9], *SAMPLE[::5]] if p.units == "pixels"]:
        for name, (ours, theirs) in float32_errors(problem).items():
            factor = 2 if name == "frames" else 3
            assert ours <= factor * theirs + 4 * EPS, f"{problem}: {name}: {ours:.1e}, reference {theirs:.1e}"
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += ours
            total[1] += theirs
    for name, (ours, theirs) in totals.items():
        assert ours <= (2 if name == "frames" else 3) * theirs, name


def inside(t: Tensor) -> Tensor:
    """The values of ``t``, as a view into memory that holds NaN everywhere around it and between its rows."""
    view = t.new_full([n + 6 for n in t.shape], NAN)[(slice(3, -3),) * t.dim()]
    return view.copy_(t)


def every_second(t: Tensor) -> Tensor:
    return t.new_full([2 * n for n in t.shape], NAN)[(slice(None, None, 2),) * t.dim()].copy_(t)


def transposed(t: Tensor) -> Tensor:
    return inside(t.movedim(-1, 0)).movedim(0, -1) if t.dim() > 0 else t


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t


def every_second_channel(t: Tensor) -> Tensor:
    """Of the dimension in front of the pixels, which for a flow is that of its axes."""
    if t.dim() < 3:
        return t
    dim = 2 if t.dim() > 3 else 1
    shape = list(t.shape)
    shape[dim] *= 2
    return t.new_full(shape, NAN).unflatten(dim, (-1, 2)).select(dim + 1, 1).copy_(t)


def negated(t: Tensor) -> Tensor:
    view = torch._neg_view(inside(-t))
    assert view.is_neg()
    return view


@pytest.mark.parametrize("layout", [inside, every_second, every_second_channel, transposed, channels_last, negated])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_few
def test_any_strides(problem, dtype, layout: Callable[[Tensor], Tensor], capability):
    """The same bits as for contiguous tensors, if one argument is laid out otherwise, and if all are."""
    tensors, grad = problem.tensors(dtype), problem.grad(dtype)
    expected = problem.results(tensors, grad, "cpu")
    assert all(t.isfinite().all() for t in expected.values())
    views = {name: layout(t) for name, t in tensors.items()}
    for changed in [*({name: view} for name, view in views.items()), views]:
        actual = problem.results(tensors | changed, layout(grad), "cpu")
        for name, t in expected.items():
            assert torch.equal(actual[name], t), (list(changed), name)


@each_few
def test_expanded(problem, capability):
    """Strides of 0, in the arguments and in the gradient that ``sum`` sends back."""
    full = problem.tensors()
    for dim in range(3):
        tensors = {n: t.narrow(dim, 0, 1).expand(t.shape) if t.dim() > dim else t for n, t in full.items()}
        copies = {n: t.contiguous() for n, t in tensors.items()}
        grad = torch.ones((), dtype=torch.float64).expand(problem.grad().shape)
        actual, expected = (problem.results(*x, "cpu") for x in ((tensors, grad), (copies, grad.contiguous())))
        assert all(torch.equal(actual[name], t) for name, t in expected.items())
        assert_agree(actual, problem.results(copies, grad, "reference"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_shapes_of_the_variance(backend):
    """Whatever broadcasts to (B, 1, *S), and in a rollout to (B, T, 1, *S); its gradient has its own shape."""
    B, T, S = 2, 3, (4, 5)
    g = torch.Generator().manual_seed(0)
    image = torch.randn(B, 2, *S, generator=g, dtype=torch.float64)
    flows = torch.randn(B, T, 2, *S, generator=g, dtype=torch.float64)
    shapes = [(), (1,), (5,), (4, 1), (4, 5), (1, 4, 5), (2, 1, 1, 1), (1, 1, 1, 5), (2, 1, 4, 5), (2, 1, 4, 1)]
    for shape in shapes:
        v = torch.rand(shape, generator=g, dtype=torch.float64).requires_grad_()
        out = gaussian_warp(image, flows[:, 0], v, backend=backend)
        full = v.detach().expand(B, 1, *S).clone().requires_grad_()
        torch.testing.assert_close(
            out, gaussian_warp(image, flows[:, 0], full, backend=backend), rtol=1e-12, atol=1e-13
        )
        out = gaussian_warp_rollout(image, flows, v, backend=backend)
        assert torch.autograd.grad(out.sum(), v)[0].shape == shape
    for shape in [(2, 3, 1, 4, 5), (1, 3, 1, 1, 1), (2, 1, 1, 1, 1), (1, 1, 1, 4, 5), (1, 3, 1, 4, 1)]:
        v = torch.rand(shape, generator=g, dtype=torch.float64).requires_grad_()
        full = v.detach().expand(B, T, 1, *S).clone().requires_grad_()
        pair = [gaussian_warp_rollout(image, flows, w, backend=backend) for w in (v, full)]
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-13)
        one, many = (torch.autograd.grad(o.sin().sum(), w)[0] for o, w in zip(pair, (v, full), strict=True))
        assert one.shape == shape
        torch.testing.assert_close(one, many.sum_to_size(shape), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variance", VARIANCES)
def test_batch_invariance(variance, dtype, capability):
    """A sample alone has the bits that it has among others."""
    problem = Problem((7, 33), batch=4, steps=2, variance=variance, smooth=True, motion=1.0)
    tensors, grad = problem.tensors(dtype), problem.grad(dtype)
    expected = problem.results(tensors, grad, "cpu")
    one = problem._replace(batch=1)
    for b in range(4):
        part = {n: t[b : b + 1] if t.dim() > 3 and t.shape[0] == 4 else t for n, t in tensors.items()}
        actual = one.results(part, grad[b : b + 1], "cpu")
        for name in part.keys() | {"frames"}:
            if expected[name].shape[:1] == (4,):
                assert torch.equal(actual[name][0], expected[name][b]), name


@each_few
def test_inputs_are_left_alone_and_results_repeat(problem, capability):
    tensors, grad = problem.tensors(), problem.grad()
    copies = {name: t.clone() for name, t in tensors.items()}
    first, second = (problem.results(tensors, grad, "cpu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(t, copies[name]) for name, t in tensors.items())


@pytest.mark.parametrize("problem", [*FEW, FEW[0]._replace(steps=3), FEW[3]._replace(variance="pixels")], ids=str)
def test_any_subset_of_the_gradients(problem, capability):
    """A gradient does not depend on which others are computed; one that is not needed is not made."""
    tensors, grad = problem.tensors(), problem.grad()
    expected = problem.results(tensors, grad, "cpu")
    for wanted in itertools.product((False, True), repeat=len(tensors)):
        leaves = {n: t.clone().requires_grad_(w) for (n, t), w in zip(tensors.items(), wanted, strict=True)}
        frames = problem.run(leaves, "cpu")
        assert frames.requires_grad == any(wanted)
        if any(wanted):
            frames.backward(grad)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("sizes", [(9,), (5, 34), (2, 3, 4)], ids=str)
def test_far_away(sizes, padding_mode, dtype, capability):
    """Displacements of 1e9 pixels; those of more than 2**30 are cut off and have no gradient."""
    distances = (100.0, 1e5, 1e9, -1e9, 2.0**30, 1e30, -1e30, INF, -INF)
    choices = itertools.cycle(itertools.product(VARIANCES[::-2], NORMALIZE, (None, 4)))
    for distance, (variance, normalize, support) in zip(distances, choices, strict=False):
        problem = Problem(sizes, variance=variance, normalize=normalize, padding_mode=padding_mode, support=support)
        tensors, grad = problem.tensors(dtype), problem.grad(dtype)
        tensors["flows"].view(-1)[::3] = distance
        actual = problem.results(tensors, grad, "cpu")
        expected = problem.results(tensors, grad, "reference")
        assert all(t.isfinite().all() for t in actual.values())
        for name, t in expected.items():
            bound = 1e-5 if dtype == torch.float32 else 1e-12 if name == "frames" else 1e-11
            assert error([actual[name]], [t]) <= bound, (distance, name)
        if abs(distance) > 2**30:
            assert (actual["flows"].view(-1)[::3] == 0).all()
        if padding_mode == "zeros":
            gone = tensors["flows"].eq(distance).any(2, keepdim=True).expand_as(actual["frames"])
            assert (actual["frames"][gone] == 0).all()


@each_runner
@pytest.mark.parametrize("variance", ["number", "scalar", "pixels"])
@pytest.mark.parametrize("sizes", [(33,), (5, 34), (2, 3, 4)], ids=str)
def test_nan_in_the_flow(sizes, variance, runner):
    """That pixel is NaN, nothing else is, and no gradient passes it."""
    backend = use(runner)
    for padding_mode, form in itertools.product(PADDING_MODES, FORMS):
        problem = Problem(sizes, variance=variance, padding_mode=padding_mode, form=form)
        tensors, grad = problem.tensors(), problem.grad()
        clean = problem.run(tensors, backend)
        broken = torch.rand(tensors["flows"].shape, generator=torch.Generator().manual_seed(1)) < 0.1
        pixel = broken.any(2, keepdim=True)
        silent = problem.results(tensors, grad.masked_fill(pixel, 0), backend)
        tensors["flows"][broken] = NAN
        actual = problem.results(tensors, grad, backend)
        assert torch.equal(actual["frames"].isnan(), pixel.expand_as(clean))
        assert torch.equal(actual["frames"].nan_to_num(0.0), clean.masked_fill(pixel, 0))
        for name in tensors:
            torch.testing.assert_close(actual[name], silent[name], rtol=1e-13, atol=1e-13)
        assert (actual["flows"][pixel.expand_as(broken)] == 0).all()


@each_runner
@pytest.mark.parametrize("value", [NAN, -1.0, -1e-30, -INF])
@pytest.mark.parametrize("sizes", [(33,), (5, 34), (2, 3, 4)], ids=str)
def test_broken_variances(sizes, value, runner):
    """As a NaN in the flow; negative ones are found where they are looked for."""
    backend = use(runner)
    for normalize, support in itertools.product(NORMALIZE, (None, 3)):
        problem = Problem(sizes, variance="pixels", normalize=normalize, support=support)
        tensors, grad = problem.tensors(), problem.grad()
        clean = problem.run(tensors, backend)
        pixel = torch.rand(tensors["variance"].shape, generator=torch.Generator().manual_seed(2)) < 0.2
        silent = problem.results(tensors, grad.masked_fill(pixel[:, None], 0), backend)
        tensors["variance"][pixel] = value
        if value < 0:
            with pytest.raises(ValueError, match=r"^variance must be at least 0, in pixels squared, got -"):
                problem.run(tensors, backend)
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        frames = problem.run(leaves, backend, validate=False)
        where = pixel[:, None].expand_as(frames)
        assert torch.equal(frames.isnan(), where)
        torch.testing.assert_close(frames.nan_to_num(0.0), clean.masked_fill(where, 0), rtol=1e-13, atol=1e-13)
        frames.backward(grad)
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, silent[name], rtol=1e-12, atol=1e-13)
        for everywhere in (torch.tensor(value), torch.full((2, 1, *[1] * len(sizes)), value)):
            assert problem.run(tensors | {"variance": everywhere}, backend, validate=False).isnan().all()


@each_runner
def test_nan_in_the_image(runner):
    """Reaches the pixels whose windows hold it, and no others."""
    backend = use(runner)
    image = torch.zeros(1, 1, 9, 40, dtype=torch.float64)
    image[..., 4, 20] = NAN
    flow = torch.zeros(1, 2, 9, 40, dtype=torch.float64)
    for variance in (0.9, torch.full((9, 40), 0.9)):
        for support, reach in ((1, 0), (3, 1), (5, 2), (9, 4)):
            out = gaussian_warp(image, flow, variance, support=support, backend=backend)
            seen = torch.zeros(9, 40, dtype=torch.bool)
            seen[4 - reach : 5 + reach, 20 - reach : 21 + reach] = True
            assert torch.equal(out[0, 0].isnan(), seen)
    # Beyond a border of zeros there is nothing to read.
    nothing = gaussian_warp(image, flow + 100, 0.9, backend=backend)
    assert (nothing == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_tiny_variances(form, dtype, capability):
    """Finite, with their gradients, down to the smallest number, and weights still sum to 1."""
    image = torch.ones(1, 1, 7, dtype=dtype)
    flow = torch.tensor([[[0.2, 1.5, -0.4999, 0.3, 0.5, -0.5, 0.0]]], dtype=dtype, requires_grad=True)
    exponents = (-3, -6, -9, -12, -17, -18, -18.9, -19, -20, -30, -38, -45, -150, -153.8, -154, -200, -323)
    for backend, variance in itertools.product(("cpu", "reference"), [10.0**e for e in exponents]):
        for support in (None, 2, 3):
            v = torch.full((1, 1, 7), variance, dtype=dtype, requires_grad=True)
            for values in (v, v.detach()[0, 0, 0].requires_grad_(), variance):
                out = gaussian_warp(
                    image, flow, values, form=form, support=support, padding_mode="border", backend=backend
                )
                assert ((out - 1).abs() < 4 * torch.finfo(dtype).eps).all(), (backend, variance)
                leaves = [flow, values] if isinstance(values, Tensor) else [flow]
                assert all(t.isfinite().all() for t in torch.autograd.grad(out.sum(), leaves)), (backend, variance)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("sizes", [(9,), (5, 6), (2, 3, 4)], ids=str)
def test_rollout_is_the_loop(sizes, variance, backend):
    """Gradients included."""
    problem = Problem(sizes, steps=3, variance=variance, padding_mode="reflection", motion=1.0)
    tensors, grad = problem.tensors(), problem.grad()
    expected = problem.results(tensors, grad, backend)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    v = leaves.get("variance", problem.value)
    image, frames = leaves["image"], []
    for t in range(3):
        each = v
        if variance in ("steps", "everything"):
            each = v[:, t]
        image = gaussian_warp(image, leaves["flows"][:, t], each, padding_mode="reflection", backend=backend)
        frames.append(image)
    stacked = torch.stack(frames, 1)
    torch.testing.assert_close(stacked, expected["frames"], rtol=1e-13, atol=1e-14)
    for name, g in zip(leaves, torch.autograd.grad(stacked, list(leaves.values()), grad), strict=True):
        torch.testing.assert_close(g, expected[name], rtol=1e-12, atol=1e-13)


GUARDED = """
import itertools
import pykernels
from pykernels import bilinear_warp, gaussian_warp_rollout

g = torch.Generator().manual_seed(0)


def leaf(t):
    return guarded(t.shape, dtype).copy_(t).requires_grad_()


kinds = itertools.cycle(((0, 1), (2, 3), (1, 2), (3, 0), (0, 2)))
modes = itertools.cycle(("zeros", "border", "reflection", "periodic"))
motions = itertools.cycle((0.5, 4.0, 300.0, 1e9))
for name, dtype in itertools.product(pykernels.cpu_capabilities(), (torch.float32, torch.float64)):
    pykernels.set_cpu_capability(name)
    if dtype == torch.float64 and name != pykernels.cpu_capabilities()[-1]:
        continue  # once in float64 will do
    for sizes, batch, steps, threads, support in [
        ((1,), 1, 1, 1, 3), ((33,), 2, 2, 1, 9), ((17,), 1, 1, 1, 33), ((5, 31), 3, 1, 1, None),
        ((33, 65), 1, 1, 1, None), ((9, 8), 1, 3, 1, 3), ((65, 66), 1, 1, 3, 5), ((64, 70), 1, 2, 2, 9),
        ((3, 4, 5), 2, 1, 1, 3), ((2, 3, 17), 1, 1, 1, 4), ((1, 1), 1, 1, 1, 17), ((7, 33), 2, 1, 1, 7),
    ]:
        torch.set_num_threads(threads)
        for kind in next(kinds):
            motion, mode = next(motions), next(modes)
            ranks = len(sizes)
            image = leaf(torch.randn(batch, 2, *sizes, generator=g))
            flows = torch.randn(batch, steps, ranks, *sizes, generator=g)
            if kind == 1:
                flows = flows[..., :1].expand(flows.shape)  # windows side by side
            flows = leaf(motion * flows)
            leaves = [image, flows]
            if kind == 3 and steps == 1:
                out = bilinear_warp(image, flows[:, 0], padding_mode=mode, backend="cpu").unsqueeze(1)
            else:
                shape = ((), (batch, steps, 1, *[1] * ranks), (batch, steps, 1, *sizes), (batch, 1, *sizes))[kind]
                variance = leaf(3 * torch.rand(shape, generator=g).square())
                leaves.append(variance)
                out = gaussian_warp_rollout(
                    image, flows, variance, padding_mode=mode, support=support,
                    normalize=("none", "window", "inside")[kind % 3], backend="cpu",
                )
            grads = leaf(torch.randn(out.shape, generator=g)).detach()
            gradients = torch.autograd.grad(out, leaves, grads)
            assert all(bool(t.isfinite().all()) for t in (out, *gradients))
            del image, flows, leaves, out, grads, gradients
            variance = None
            kept.clear()
"""


def test_no_access_outside_the_tensors():
    """Every argument and result lies against a page without access, once with its start and once with its end."""
    check_guarded(GUARDED, 200)


def test_calls_from_several_threads():
    """Each with its own scratch memory, each in parallel itself."""

    def run(i: int) -> dict[str, Tensor]:
        torch.set_num_threads(2)
        problem = Problem((65, 66), batch=1, variance=VARIANCES[i % 3])
        return problem.results(problem.tensors(seed=i % 4), problem.grad(), "cpu")

    expected = [run(i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for i, actual in enumerate(pool.map(run, range(24))):
            assert all(torch.equal(actual[name], t) for name, t in expected[i % 12].items())


def test_learned_variance():
    """Descent along its gradient finds the variance that blurred an image."""
    g = torch.Generator().manual_seed(0)
    image = torch.randn(4, 1, 24, 24, generator=g)
    flow = torch.randn(4, 2, 1, 1, generator=g).expand(4, 2, 24, 24)
    target = gaussian_warp(image, flow, 0.7)
    variance = torch.tensor(0.2, requires_grad=True)
    optimizer = torch.optim.Adam([variance], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        (gaussian_warp(image, flow, variance) - target).square().mean().backward()
        optimizer.step()
    assert math.isclose(variance.item(), 0.7, rel_tol=0.01)
