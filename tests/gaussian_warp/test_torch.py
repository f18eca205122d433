"""How the warps fit into torch: registration, compilation, transforms, derivatives of every kind and order."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pykernels import bilinear_warp, gaussian_warp, gaussian_warp_rollout

from .warps import NORMALIZE, PADDING_MODES, Problem, assert_agree, error

# torch itself still uses torch.jit, in forward mode and in inductor.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
ops = torch.ops.pykernels
#: Small problems that together have every option.
SMALL = [
    Problem((4, 5), variance="scalar", motion=2.0),
    Problem((5,), steps=2, variance="everything", padding_mode="reflection", form="density", motion=1.0),
    Problem((3, 4), variance="samples", normalize="inside", support=4, xy=False),
    Problem((2, 3, 2), variance="pixels", padding_mode="periodic", support=3),
    Problem((4, 3), padding_mode="border", steps=3, motion=1.0),
    Problem((3, 4), form="linear", padding_mode="border"),
]
each_small = pytest.mark.parametrize("problem", SMALL, ids=str)
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def tensors_of(problem: Problem) -> dict[str, Tensor]:
    """Without variances of 0, which are a kink."""
    tensors = problem.tensors()
    if "variance" in tensors:
        tensors["variance"] = tensors["variance"] + 0.1
    return tensors


def function(problem: Problem, backend: str = "cpu") -> Callable[..., Tensor]:
    """The frames of the image, the flows and, where it is a tensor, the variance."""

    def run(*tensors: Tensor) -> Tensor:
        return problem.run(dict(zip(("image", "flows", "variance"), tensors, strict=False)), backend)

    return run


def agree(actual, expected, bound: float = 1e-11) -> None:
    assert error(actual, expected) <= bound


@each_backend
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("sizes", [(5,), (3, 4), (2, 2, 3)], ids=str)
def test_gradcheck(sizes, padding_mode, backend):
    """Of image, flow and variance, in flows that leave the image."""
    choices = itertools.product(("integrated", "density"), NORMALIZE)
    for i, (form, normalize) in enumerate(choices):
        problem = Problem(
            sizes, 1, 1, variance=("scalar", "pixels")[i % 2], form=form, normalize=normalize, motion=2.0,
            padding_mode=padding_mode, support=(3, 5, 4)[i % 3] if len(sizes) < 3 else 2 + i % 2,
        )  # fmt: skip
        leaves = [t.requires_grad_() for t in tensors_of(problem).values()]
        fast = len(sizes) == 3
        assert torch.autograd.gradcheck(function(problem, backend), leaves, fast_mode=fast, atol=1e-6)
    problem = Problem(sizes, 1, 2, form="linear", padding_mode=padding_mode, motion=2.0)
    leaves = [t.requires_grad_() for t in problem.tensors().values()]
    assert torch.autograd.gradcheck(function(problem, backend), leaves)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("sizes", [(4,), (2, 3), (1, 2, 2)], ids=str)
def test_second_derivatives(sizes, padding_mode):
    for form, normalize in (("integrated", "window"), ("density", "inside"), ("density", "none")):
        support = 3 if len(sizes) < 3 else 2
        problem = Problem(
            sizes, 1, 1, variance="pixels", form=form, normalize=normalize, padding_mode=padding_mode, support=support,
            motion=2.0,
        )  # fmt: skip
        leaves = [t.requires_grad_() for t in tensors_of(problem).values()]
        assert torch.autograd.gradgradcheck(function(problem), leaves, atol=1e-6)


@each_small
def test_gradient_penalty(problem):
    """Double backward, of everything through the gradient of the image, and a third derivative."""
    outcomes = []
    for backend in ("cpu", "reference"):
        leaves = [t.requires_grad_() for t in tensors_of(problem).values()]
        frames = function(problem, backend)(*leaves)
        (gradient,) = torch.autograd.grad(frames.sin().sum(), leaves[0], create_graph=True)
        second = torch.autograd.grad(gradient.square().sum(), leaves, create_graph=True)
        third = torch.autograd.grad(sum(g.square().sum() for g in second), leaves[0])
        outcomes.append([gradient.detach(), *(g.detach() for g in second), *third])
    agree(*outcomes, 1e-10)


@each_small
def test_forward_mode(problem):
    tensors = tuple(tensors_of(problem).values())
    run = function(problem)
    g = torch.Generator().manual_seed(5)
    tangents = tuple(torch.randn(t.shape, generator=g, dtype=t.dtype) for t in tensors)
    value, derivative = torch.func.jvp(run, tensors, tangents)
    agree([value], [run(*tensors)])
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v, d) for v, d in zip(tensors, tangents, strict=True)]
        agree([forward_ad.unpack_dual(run(*duals)).tangent], [derivative])
        assert forward_ad.unpack_dual(run(*tensors)).tangent is None
    step = 1e-6
    ahead, behind = (run(*(v + s * step * d for v, d in zip(tensors, tangents, strict=True))) for s in (1, -1))
    agree([derivative], [(ahead - behind) / (2 * step)], 1e-6)


@each_small
def test_function_transforms(problem):
    """``grad``, ``vmap`` over every argument alone and over all, ``jacrev``, ``hessian`` and ``vmap(grad)``."""
    values = list(tensors_of(problem).values())
    run = function(problem)

    def number(*tensors: Tensor) -> Tensor:
        return run(*tensors).sin().sum()

    every = tuple(range(len(values)))
    leaves = [t.clone().requires_grad_() for t in values]
    expected = torch.autograd.grad(number(*leaves), leaves)
    agree(torch.func.grad(number, every)(*values), expected, 1e-10)
    many = [torch.stack([t, 1.1 * t]) for t in values]
    for chosen in [[i] for i in every] + [list(every)]:
        dims = tuple(0 if i in chosen else None for i in every)
        args = [many[i] if i in chosen else t for i, t in enumerate(values)]
        actual = torch.func.vmap(run, dims)(*args)
        for which in range(2):
            agree([actual[which]], [run(*(a[which] if i in chosen else a for i, a in enumerate(args)))], 1e-12)
    actual = torch.func.vmap(torch.func.grad(number, every), (0, *[None] * (len(values) - 1)))(many[0], *values[1:])
    agree([a[0] for a in actual], expected, 1e-10)
    leaf = values[1].clone().requires_grad_()
    rows = [torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in run(values[0], leaf, *values[2:]).flatten()]
    jacobian = torch.func.jacrev(run, 1)(*values)
    agree([jacobian.flatten(0, -1 - leaf.dim())], [torch.stack(rows)], 1e-10)
    hessian = torch.func.hessian(number, 1)(*values)
    direction = torch.ones_like(leaf)
    (slope,) = torch.autograd.grad(number(values[0], leaf, *values[2:]), leaf, create_graph=True)
    (product,) = torch.autograd.grad(slope, leaf, direction)
    agree([hessian.flatten(leaf.dim()).sum(-1)], [product], 1e-10)


@each_small
def test_batched_gradients(problem):
    """``is_grads_batched``, which torch's own vmap of the backward is."""
    leaves = [t.requires_grad_() for t in tensors_of(problem).values()]
    frames = function(problem)(*leaves)
    grads = torch.stack([problem.grad(seed=s) for s in range(3)])
    batched = torch.autograd.grad(frames, leaves, grads, retain_graph=True, is_grads_batched=True)
    for i in range(3):
        agree([g[i] for g in batched], torch.autograd.grad(frames, leaves, grads[i], retain_graph=True), 1e-10)


#: Dynamo itself instantiates the autograd functions that it traces.
compiles = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


def compiled(fn: Callable, **options) -> Callable:
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, **{"backend": "aot_eager", **options})


@compiles
@pytest.mark.parametrize(
    ("problem", "backend"), [*((p, "cpu") for p in SMALL), (SMALL[2], "reference"), (SMALL[5], "reference")], ids=str
)
def test_compile(problem, backend):
    """Forward and backward, with and without gradients."""
    tensors = tensors_of(problem)
    expected = problem.results(tensors, problem.grad(), backend)
    run = compiled(function(problem, backend))
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    frames = run(*leaves.values())
    gradients = torch.autograd.grad(frames, list(leaves.values()), problem.grad())
    assert_agree({"frames": frames.detach(), **dict(zip(leaves, gradients, strict=True))}, expected)
    with torch.no_grad():
        agree([run(*tensors.values())], [expected["frames"]], 1e-12)


@compiles
def test_compile_once_for_every_batch():
    fn = compiled(gaussian_warp, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (5, 3, 9):
            tensors = Problem((6, 7), batch=batch).tensors()
            image, flow = tensors["image"].requires_grad_(), tensors["flows"][:, 0]
            both = [f(image, flow, 0.5, padding_mode="border", backend="cpu") for f in (fn, gaussian_warp)]
            agree(*([b.detach(), *torch.autograd.grad(b.sum(), image)] for b in both), 1e-12)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, image: Tensor, flow: Tensor, variance: Tensor) -> Tensor:
            return gaussian_warp(image, flow, variance, padding_mode="border", backend="cpu") + bilinear_warp(
                image, flow, backend="cpu"
            )

    tensors = Problem(variance="pixels").tensors()
    args = tensors["image"], tensors["flows"][:, 0], tensors["variance"]
    program = torch.export.export(Module(), args)
    assert {"pykernels::gaussian_warp"} == {
        n.target._schema.name for n in program.graph.nodes if "pykernels" in str(n.target)
    }
    agree([program.module()(*args)], [Module()(*args)], 1e-14)


def raw(problem: Problem, dtype: torch.dtype = torch.float64) -> tuple:
    """Arguments of the raw operator."""
    tensors = problem.tensors(dtype)
    variance = tensors.get("variance")
    if variance is not None:
        ranks = len(problem.sizes)
        spread = variance.dim() > 0 and any(n > 1 for n in variance.shape[-ranks:])
        shape = problem.sizes if spread else (1,) * ranks
        if variance.dim() == ranks + 2:
            variance = variance.unsqueeze(1)
        variance = variance.expand(problem.batch if variance.dim() > 0 else 1, problem.steps, 1, *shape).contiguous()
    options = (
        problem.value, problem.form, problem.normalize if problem.form != "linear" else "none", problem.padding_mode,
        2 if problem.form == "linear" else problem.support or 0, problem.tolerance, 255, [1.0] * len(problem.sizes),
        problem.xy,
    )  # fmt: skip
    return (tensors["image"], tensors["flows"], variance, *options, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_small
def test_opcheck(problem, dtype):
    args = raw(problem, dtype)
    frames = ops.gaussian_warp(*args)
    agree([frames], [problem.run(problem.tensors(dtype), "cpu")], 1e-12 if dtype == torch.float64 else 1e-6)
    kept = frames if problem.steps > 1 else None
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    calls = [(ops.gaussian_warp, args)]
    for needed in ([True, True, args[2] is not None], [False, True, False], [True, False, False]):
        calls.append((ops.gaussian_warp_backward, (problem.grad(dtype), kept, *args, needed)))
    for operator, arguments in calls:
        assert set(torch.library.opcheck(operator.default, arguments, test_utils=tests).values()) == {"SUCCESS"}


@each_small
def test_raw_operators_refuse_to_drop_a_gradient(problem):
    args = raw(problem)
    frames = ops.gaussian_warp(*args)
    backward = (problem.grad(), frames if problem.steps > 1 else None, *args, [True, True, False])
    for operator, arguments in ((ops.gaussian_warp, args), (ops.gaussian_warp_backward, backward)):
        for i, value in enumerate(arguments):
            if isinstance(value, Tensor):
                tracked = [*arguments[:i], value.clone().requires_grad_(), *arguments[i + 1 :]]
                with pytest.raises(RuntimeError, match="no derivative of its own"):
                    operator(*tracked)
                with torch.no_grad():
                    operator(*tracked)


def test_raw_operators_refuse_what_does_not_fit_together():
    """Whoever goes round the public function gets an exception and no access outside the tensors."""
    args = raw(Problem(variance="pixels", steps=2))
    image, flow, variance = args[:3]
    frames = ops.gaussian_warp(*args)
    names = ("image", "flow", "variance", "value", "form", "normalize", "padding_mode", "support", "tolerance",
             "max_support", "scale", "xy", "backend")  # fmt: skip
    given = dict(zip(names, args, strict=True))
    for change in (
        {"image": image[0]}, {"image": image[:1]}, {"image": image.float()}, {"image": image[..., :0]},
        {"flow": flow[:1]}, {"flow": flow[:, :, :1]}, {"flow": flow[..., 1:]}, {"flow": flow.float()},
        {"flow": flow[:, 0]}, {"variance": variance[:, :, 0]}, {"variance": variance[..., 1:]},
        {"variance": variance.float()}, {"variance": variance.expand(2, 2, 2, 5, 7)}, {"variance": variance[:0]},
        {"form": "box"}, {"normalize": "all"}, {"padding_mode": "wrap"}, {"support": -1}, {"support": 10**9},
        {"scale": [1.0]}, {"scale": [1.0] * 3}, {"value": -1.0, "variance": None}, {"backend": "abacus"},
    ):  # fmt: skip
        with pytest.raises(Exception, match=r"."):
            ops.gaussian_warp(*(given | change).values())
    needed = [True, True, True]
    grads = torch.randn_like(frames)
    for g, f in ((grads[:1], frames), (grads.float(), frames), (grads, frames[:, :1]), (grads, None)):
        with pytest.raises(ValueError, match="must be"):
            ops.gaussian_warp_backward(g, f, *args, needed)


@each_backend
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half, backend):
    """Computed in float32 and rounded once; gradients come in the dtypes of their tensors."""
    problem = Problem((6, 9), variance="pixels", steps=2, motion=1.0)
    for chosen in (("image", "flows", "variance"), ("image",), ("flows",)):
        tensors = {n: t.to(half) if n in chosen else t for n, t in problem.tensors(torch.float32).items()}
        grad = problem.grad(torch.float32).to(tensors["image"].dtype)
        actual = problem.results(tensors, grad, backend)
        expected = problem.results({n: t.float() for n, t in tensors.items()}, grad.float(), "reference")
        assert actual["frames"].dtype == tensors["image"].dtype
        for name, t in tensors.items():
            assert actual[name].dtype == t.dtype
        for name, t in expected.items():
            unit = torch.finfo(actual[name].dtype).eps
            assert error([actual[name]], [t]) <= unit + 1e-5


@each_backend
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast(cast, backend):
    """A network's flow arrives in half precision; the image stays what it is."""
    torch.manual_seed(0)
    network, image = torch.nn.Conv2d(1, 2, 3, padding=1), torch.randn(2, 1, 8, 9)
    with torch.autocast("cpu", cast):
        flow = network(image)
        assert flow.dtype == cast
        out = gaussian_warp(image, flow, 0.5, backend=backend)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, gaussian_warp(image, flow.float(), 0.5, backend="reference"), rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    assert network.weight.grad.isfinite().all()
    assert (network.weight.grad != 0).any()


@each_backend
def test_gradient_of_a_shared_variance(backend):
    """Summed over all that share it, in whatever shape it came."""
    problem = Problem((5, 6), steps=3, motion=1.0)
    tensors = problem.tensors()
    full = torch.full((2, 3, 1, 5, 6), 0.6, dtype=torch.float64, requires_grad=True)
    frames = gaussian_warp_rollout(tensors["image"], tensors["flows"], full, backend=backend)
    (every,) = torch.autograd.grad(frames, full, problem.grad())
    for shape in ((), (1,), (2, 1, 1, 1), (1, 3, 1, 1, 1), (2, 3, 1, 1, 1), (5, 6), (5, 1), (1, 1, 1, 1, 6)):
        v = torch.full(shape, 0.6, dtype=torch.float64, requires_grad=True)
        frames = gaussian_warp_rollout(tensors["image"], tensors["flows"], v, backend=backend)
        (gradient,) = torch.autograd.grad(frames, v, problem.grad())
        # The dimensions of time and of (B, 1, *S) are not aligned where there is no time.
        summed = every.sum(1) if v.dim() <= 4 else every
        torch.testing.assert_close(gradient, summed.sum_to_size(shape), rtol=1e-10, atol=1e-10)
