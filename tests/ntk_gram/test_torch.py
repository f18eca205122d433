"""How the kernels fit into torch: registration, compilation, transforms, derivatives of every kind and order."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import pykernels
from pykernels import NTK, ntk_gram, ntk_matvec, ntk_witness
from pykernels.ops.ntk_gram.activations import network as options_of
from pykernels.ops.ntk_gram.kernel import activations_of

from .networks import A, error, normal

# torch itself still uses torch.jit, in forward mode and in inductor.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
ops = torch.ops.pykernels
F64 = torch.float64
#: Networks that together have every activation, as layers.
LAYERS = [["relu"], ["leaky_relu", "abs"], ["erf", "relu+sin"], ["gelu", "sigmoid_like"], ["cos", A("rbf", gamma=0.4)]]
each_network = pytest.mark.parametrize("layers", LAYERS, ids=lambda layers: "-".join(map(str, layers)))
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])
#: Dynamo itself instantiates the autograd functions that it traces.
compiles = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


def arguments(layers: list[Any], n: int = 3, m: int | None = 2, d: int = 2) -> list[Tensor]:
    """x, y unless ``m`` is None, the scales of weights and those of biases, the output's included."""
    scales = torch.linspace(0.8, 1.3, len(layers) + 1, dtype=F64), torch.linspace(0.7, 0.3, len(layers) + 1, dtype=F64)
    points = [normal(n, d)] if m is None else [normal(n, d), normal(m, d, seed=1)]
    return [*points, *scales]


def gram(layers: list[Any], backend: str = "cpu", kind: str = "ntk") -> Callable[..., Tensor]:
    """The kernel of x, y unless it is left out, and the scales."""

    def run(*tensors: Tensor) -> Tensor:
        x, y = tensors[0], tensors[1] if len(tensors) == 4 else None
        weight, bias = tensors[-2:]
        found = ntk_gram(x, y, activation=layers, weight_std=weight, bias_std=bias, kind=kind, backend=backend)
        return torch.stack(found) if kind == "both" else found

    return run


def product(layers: list[Any], backend: str = "cpu") -> Callable[..., Tensor]:
    """K v of x, y, v and the scales."""

    def run(x: Tensor, y: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ntk_matvec(x, y, v, activation=layers, weight_std=weight, bias_std=bias, backend=backend)

    return run


def sums(layers: list[Any], backend: str = "cpu") -> Callable[..., Tensor]:
    """Values and gradients of the witness of x, y, a and the scales, in one tensor."""

    def run(x: Tensor, y: Tensor, a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        value, gradient = ntk_witness(x, y, a, activation=layers, weight_std=weight, bias_std=bias, backend=backend)
        return torch.cat([value.unsqueeze(-1), gradient], -1)

    return run


def every(layers: list[Any], backend: str = "cpu") -> list[tuple[Callable[..., Tensor], list[Tensor]]]:
    """All functions, with their arguments."""
    pair = arguments(layers)
    return [
        (gram(layers, backend, "both"), pair),
        (gram(layers, backend), arguments(layers, m=None)),
        (product(layers, backend), [*pair[:2], normal(2, 3, seed=2), *pair[2:]]),
        (sums(layers, backend), [*pair[:2], normal(2, seed=3), *pair[2:]]),
    ]


def agree(actual: Any, expected: Any, bound: float = 3e-14) -> None:
    """Up to rounding in float64, of the largest number: 3e-15 seen."""
    for one, other in zip(actual, expected, strict=True):
        assert error(one, other) <= bound


@each_backend
@each_network
def test_gradcheck(layers, backend):
    for function, tensors in every(layers, backend):
        leaves = [t.clone().requires_grad_() for t in tensors]
        assert torch.autograd.gradcheck(function, leaves)


@each_network
def test_second_derivatives(layers):
    for function, tensors in every(layers):
        leaves = [t.clone().requires_grad_() for t in tensors]
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True, atol=1e-6)


@each_network
def test_gradient_penalty(layers):
    """Double backward, of everything through the gradient of x, and a third derivative."""
    for (function, tensors), (other, _) in zip(every(layers), every(layers, "reference"), strict=True):
        outcomes = []
        for run in (function, other):
            leaves = [t.clone().requires_grad_() for t in tensors]
            (gradient,) = torch.autograd.grad(run(*leaves).sin().sum(), leaves[0], create_graph=True)
            second = torch.autograd.grad(gradient.square().sum(), leaves, create_graph=True)
            third = torch.autograd.grad(sum(g.square().sum() for g in second), leaves[0])
            outcomes.append([gradient.detach(), *(g.detach() for g in second), *third])
        agree(*outcomes, 1e-13)  # third derivatives: 1e-14 seen


@each_network
def test_forward_mode(layers):
    for run, tensors in every(layers):
        tangents = tuple(normal(*t.shape, seed=5) for t in tensors)
        value, derivative = torch.func.jvp(run, tuple(tensors), tangents)
        agree([value], [run(*tensors)])
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(v, d) for v, d in zip(tensors, tangents, strict=True)]
            agree([forward_ad.unpack_dual(run(*duals)).tangent], [derivative])
            assert forward_ad.unpack_dual(run(*tensors)).tangent is None
        step = 1e-6
        ahead, behind = (run(*(v + s * step * d for v, d in zip(tensors, tangents, strict=True))) for s in (1, -1))
        agree([derivative], [(ahead - behind) / (2 * step)], 1e-8)  # rounding, divided by the step


@each_network
def test_function_transforms(layers):
    """``grad``, ``vmap`` over each argument alone and over all, ``jacrev``, ``hessian`` and ``vmap(grad)``."""
    for run, values in every(layers):

        def number(*tensors: Tensor) -> Tensor:
            return run(*tensors).sin().sum()  # noqa: B023

        all_of_them = tuple(range(len(values)))
        leaves = [t.clone().requires_grad_() for t in values]
        expected = torch.autograd.grad(number(*leaves), leaves)
        agree(torch.func.grad(number, all_of_them)(*values), expected)
        many = [torch.stack([t, 1.1 * t]) for t in values]
        for chosen in [[i] for i in all_of_them] + [list(all_of_them)]:
            dims = tuple(0 if i in chosen else None for i in all_of_them)
            args = [many[i] if i in chosen else t for i, t in enumerate(values)]
            actual = torch.func.vmap(run, dims)(*args)
            for which in range(2):
                alone = run(*(a[which] if i in chosen else a for i, a in enumerate(args)))
                agree([actual[which]], [alone])
        actual = torch.func.vmap(torch.func.grad(number, all_of_them), (0, *[None] * (len(values) - 1)))(
            many[0], *values[1:]
        )
        agree([a[0] for a in actual], expected)
        leaf = values[0].clone().requires_grad_()
        rows = [torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in run(leaf, *values[1:]).flatten()]
        jacobian = torch.func.jacrev(run, 0)(*values)
        agree([jacobian.flatten(0, -3)], [torch.stack(rows)])
    hessian = torch.func.hessian(number, 0)(*values)
    (slope,) = torch.autograd.grad(number(leaf, *values[1:]), leaf, create_graph=True)
    (line,) = torch.autograd.grad(slope, leaf, torch.ones_like(leaf))
    agree([hessian.flatten(2).sum(-1)], [line])


def test_batched_gradients():
    """``is_grads_batched``, which torch's own vmap of the backward is."""
    for function, tensors in every(LAYERS[2]):
        leaves = [t.clone().requires_grad_() for t in tensors]
        output = function(*leaves)
        grads = normal(3, *output.shape, seed=4)
        batched = torch.autograd.grad(output, leaves, grads, retain_graph=True, is_grads_batched=True)
        for i in range(3):
            alone = torch.autograd.grad(output, leaves, grads[i], retain_graph=True)
            agree([g[i] for g in batched], alone)


def compiled(fn: Callable, **options) -> Callable:
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, **{"backend": "aot_eager", **options})


@compiles
@pytest.mark.parametrize(("layers", "backend"), [(LAYERS[0], "cpu"), (LAYERS[2], "cpu"), (LAYERS[0], "reference")])
def test_compile(layers, backend):
    """Forward and backward, with and without gradients; of the witness, whose compilation takes long, once."""
    functions = every(layers, backend)
    if layers is not LAYERS[0]:
        functions.pop()
    for function, tensors in functions if backend == "cpu" else functions[:1]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        expected = function(*leaves)
        weights = normal(*expected.shape, seed=6)
        slopes = torch.autograd.grad(expected, leaves, weights)
        run = compiled(function)
        output = run(*leaves)
        agree([output], [expected])
        agree(torch.autograd.grad(output, leaves, weights), slopes)
        with torch.no_grad():
            agree([run(*tensors)], [expected])


@compiles
def test_compile_once_for_every_number_of_points():
    network = NTK(2, "relu", bias_std=0.3)

    def both(x: Tensor, z: Tensor) -> Tensor:
        return network.gram(x, z, backend="cpu").sum(1)

    fn = compiled(both, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, m in ((5, 6), (3, 9), (9, 4)):
            x, z = normal(n, 3).requires_grad_(), normal(m, 3, seed=1)
            outcomes = [f(x, z) for f in (fn, both)]
            agree(*([o.detach(), *torch.autograd.grad(o.sum(), x)] for o in outcomes))


def test_export():
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernels = NTK(2, "erf", bias_std=0.3)

        def forward(self, x: Tensor, z: Tensor, a: Tensor) -> Tensor:
            value, gradient = self.kernels.witness(x, z, a, backend="cpu")
            return self.kernels.gram(x, z, backend="cpu").sum(1) + value + gradient.sum(1)

    args = normal(3, 2), normal(4, 2, seed=1), normal(4)
    program = torch.export.export(Module(), args)
    found = {n.target._schema.name for n in program.graph.nodes if "pykernels" in str(n.target)}
    assert found == {"pykernels::ntk_gram", "pykernels::ntk_witness"}
    agree([program.module()(*args)], [Module()(*args)], 1e-15)


def raw(layers: list[Any], dtype: torch.dtype, m: int | None, kind: str = "ntk") -> tuple[list[Any], list[Any]]:
    """Of the raw operators: points and scales, and the network."""
    x, *rest, weight, bias = arguments(layers, m=m)
    points = [x.to(dtype)[None], *(t.to(dtype)[None] for t in rest)]
    options = options_of(activations_of(layers), kind, "float32")
    return [*points, *([None] if m is None else []), weight, bias], [*options, "cpu"]


def calls(dtype: torch.dtype, layers: list[Any], m: int | None) -> list[tuple[Any, list[Any]]]:
    points, options = raw(layers, dtype, m)
    columns = 3 if m is None else m
    v, left = normal(1, columns, 2, dtype=dtype), normal(1, 3, 2, dtype=dtype)
    dense = normal(1, 3, columns, dtype=dtype)
    both = raw(layers, dtype, m, "both")
    return [
        (ops.ntk_gram, [*points, *options]),
        (ops.ntk_gram, [*both[0], *both[1]]),
        (ops.ntk_matvec, [*points, v, *options]),
        (ops.ntk_witness, [*points, None, v[..., :1].contiguous(), None, *options, False]),
        (ops.ntk_witness, [*points, left, v, None, *options, True]),
        (ops.ntk_witness, [*points, None, None, dense, *options, True]),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("m", [None, 2])
def test_opcheck(m, dtype):
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    for layers in LAYERS:
        for operator, args in calls(dtype, layers, m):
            assert set(torch.library.opcheck(operator.default, args, test_utils=tests).values()) == {"SUCCESS"}


def test_raw_operators_refuse_to_drop_a_gradient():
    for operator, args in calls(F64, LAYERS[2], 2):
        for i, value in enumerate(args):
            if isinstance(value, Tensor):
                tracked = [*args[:i], value.clone().requires_grad_(), *args[i + 1 :]]
                with pytest.raises(RuntimeError, match="no derivative of its own"):
                    operator(*tracked)
                with torch.no_grad():
                    operator(*tracked)


def test_raw_operators_refuse_what_does_not_fit_together():
    """Whoever goes round the public function gets an exception and no access outside the tensors."""
    names = (
        "x",
        "y",
        "weight_std",
        "bias_std",
        "counts",
        "codes",
        "constants",
        "offsets",
        "kind",
        "precision",
        "backend",
    )
    points, options = raw(LAYERS[2], F64, 2)
    given = dict(zip(names, [*points, *options], strict=True))
    x, y, weight = points[:3]
    for change in (
        {"x": x[0]}, {"x": x.float()}, {"x": x[..., :1]}, {"x": x.expand(2, -1, -1)}, {"y": y[0]}, {"y": y.float()},
        {"y": y[..., :1]}, {"y": y.expand(3, -1, -1)}, {"weight_std": weight[:1]}, {"weight_std": weight.float()},
        {"bias_std": weight[:2]}, {"counts": [1]}, {"counts": [3, 0]}, {"counts": [1, 1]}, {"codes": [3, 1]},
        {"codes": [3, 1, 99]}, {"codes": [-1, 1, 5]}, {"constants": [1.0] * 8}, {"offsets": [0.0]}, {"kind": 3},
        {"kind": -1}, {"precision": "float8"}, {"backend": "abacus"},
    ):  # fmt: skip
        with pytest.raises(Exception, match=r"."):
            ops.ntk_gram(*(given | change).values())
    v, left, dense = normal(1, 2, 3), normal(1, 3, 3), normal(1, 3, 2)
    for factor in (v[0], v[:, :1], v.float(), v.expand(2, -1, -1)):
        with pytest.raises(ValueError, match="must be"):
            ops.ntk_matvec(*points, factor, *options)
    for weights in (
        (None, None, None), (left, None, None), (left, v, dense), (left[:, :2], v, None), (left[..., :2], v, None),
        (None, v, None), (None, v, dense), (None, None, dense.mT), (None, None, dense.float()),
        (left.float(), v, None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"."):
            ops.ntk_witness(*points, *weights, *options, False)
    both = raw(LAYERS[2], F64, 2, "both")[1]
    with pytest.raises(ValueError, match="one kernel at a time"):
        ops.ntk_matvec(*points, v, *both)
    with pytest.raises(ValueError, match="one kernel at a time"):
        ops.ntk_witness(*points, left, v, None, *both, False)


@each_backend
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half, backend):
    """Computed in float32 and rounded once; gradients come in the dtypes of their tensors."""
    network = NTK(2, "relu", bias_std=0.5)
    x, z, v = normal(5, 3, dtype=half), normal(4, 3, seed=1, dtype=half), normal(4, 2, dtype=half)
    unit = torch.finfo(half).eps
    single = [t.float() for t in (x, z, v)]
    found = network.gram(x, z, backend=backend)
    assert found.dtype == half
    assert error(found, network.gram(*single[:2], backend="reference")) <= unit
    found = network.matvec(x, z, v, backend=backend)
    assert found.dtype == half
    assert error(found, network.matvec(*single, backend="reference")) <= unit
    value, gradient = network.witness(x, z, v[:, 0], backend=backend)
    assert value.dtype == gradient.dtype == half
    leaf, other = x.clone().requires_grad_(), single[0].clone().requires_grad_()
    network.gram(leaf, z, backend=backend).sum().backward()
    network.gram(other, single[1], backend="reference").sum().backward()
    assert leaf.grad.dtype == half
    assert error(leaf.grad, other.grad) <= 2 * unit  # rounded twice, at most
    # The other side may be wider; the result has the dtype of x.
    assert network.gram(x, single[1], backend=backend).dtype == half
    assert network.gram(single[0], z, backend=backend).dtype == torch.float32


@each_backend
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast(cast, backend):
    """Inside autocast nothing is rounded that is not already."""
    network, layer = NTK(2, "relu", bias_std=0.5), torch.nn.Linear(4, 3)
    x, z = normal(6, 4, dtype=torch.float32), normal(5, 3, dtype=torch.float32)
    with torch.autocast("cpu", cast):
        features = layer(x)
        assert features.dtype == cast
        found = network.gram(features.float(), z, backend=backend)
        again = network.matvec(features.float(), z, torch.ones(5), backend=backend)
    expected = network.gram(features.float(), z, backend=backend)
    assert torch.equal(found, expected)
    torch.testing.assert_close(again, expected.sum(1), rtol=1e-6, atol=0)  # sums of five in another order
    found.square().sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_module():
    """Scales are buffers or parameters; copies, pickles and state_dicts keep them; they are learned."""
    fixed, learned = NTK(2, "relu", 1.2, 0.3), NTK(2, "relu", 1.2, 0.3, True, learnable=True)
    assert list(fixed.parameters()) == []
    assert set(fixed.state_dict()) == {"weight_std", "bias_std"}
    assert {n: tuple(p.shape) for n, p in learned.named_parameters()} == {"weight_std": (3,), "bias_std": (3,)}
    x = normal(6, 3)
    other = NTK(2, "relu", output_bias=True, learnable=True)
    other.load_state_dict(learned.state_dict())
    for same in (copy.deepcopy(learned), pickle.loads(pickle.dumps(learned)), other):
        assert torch.equal(same.gram(x), learned.gram(x))
    file = io.BytesIO()
    torch.save(fixed.state_dict(), file)
    file.seek(0)
    empty = NTK(2, "relu")
    empty.load_state_dict(torch.load(file))
    assert torch.equal(empty.gram(x), fixed.gram(x))
    target = NTK(2, "relu", 1.0, 0.5, True).gram(x)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.03)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (learned(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    # In another precision scales are still computed with in float64.
    half = copy.deepcopy(fixed).to(torch.bfloat16)
    assert torch.equal(half.gram(x), NTK(2, "relu", *(t.double().tolist() for t in half.state_dict().values())).gram(x))


def test_repr():
    plain = NTK(3, "relu", 1.5, 0.25)
    assert repr(plain) == "NTK(depth=3, activation=relu, weight_std=1.5, bias_std=0.25, output_bias=False)"
    mixed = NTK(2, ["erf", pykernels.Activation("sin", phase=0.5) + pykernels.Activation("relu")], [1, 2, 3], [0.5, 1])
    scales = "weight_std=[1, 2, 3], bias_std=[0.5, 1], output_bias=False"
    assert repr(mixed) == f"NTK(depth=2, activation=erf, sin(phase=0.5)+relu, {scales})"
    assert "activation=none" in repr(NTK(0))


def test_explanations():
    """What explain says of a call: the backend, and its cost."""
    network, x, z = NTK(3, "relu"), normal(64, 10, dtype=torch.float32), normal(32, 10, dtype=torch.float32)
    for run, name in (
        (lambda: network.gram(x, z), "ntk_gram"),
        (lambda: network.gram(x), "ntk_gram"),
        (lambda: network.matvec(x, z, torch.ones(32)), "ntk_matvec"),
        (lambda: network.witness(x, z, torch.ones(32)), "ntk_witness"),
    ):
        (call,) = pykernels.explain(run).calls
        assert (call.operator, call.backend) == (name, "cpu")
        assert call.cost.flops > 64 * 32 * 2 * 10
    costs = [
        pykernels.explain(run).calls[0].cost.flops for run in (lambda: network.gram(x), lambda: network.gram(x, x))
    ]
    assert costs[0] == pytest.approx(costs[1] * 65 / 128, rel=1e-9)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_dimension_is_confused(backend):
    """Broadcasting is not meant to happen: all sizes differ, and each has its place."""
    network = NTK(1, "relu")
    for lead, n, m, d, p in itertools.product([(), (2,), (2, 3)], (4,), (5,), (6,), (7,)):
        x, z, v = normal(*lead, n, d), normal(*lead, m, d), normal(*lead, m, p)
        assert network.gram(x, z, backend=backend).shape == (*lead, n, m)
        assert network.matvec(x, z, v, backend=backend).shape == (*lead, n, p)
        assert network.matvec(x, z, v[..., 0], backend=backend).shape == (*lead, n)
        value, gradient = network.witness(x, z, v[..., 0], backend=backend)
        assert (value.shape, gradient.shape) == ((*lead, n), (*lead, n, d))
        assert network.diag(x).shape == (*lead, n)
