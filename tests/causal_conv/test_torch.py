"""How the operators fit into torch: registration, compilation, transforms, and derivatives that are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import pykernels
from pykernels.nn import CausalCNNEncoder
from pykernels.ops import BlockWeights, causal_conv1d, causal_conv_block, causal_conv_stack, weight_norm

from .cases import ACTIVATIONS, Case, assert_agree, error, results

# torch itself still uses torch.jit, in forward mode and in inductor.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
ops = torch.ops.pykernels


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


X, WEIGHT, BIAS, RESIDUAL, GRAD = (
    random(2, 3, 16),
    random(4, 3, 3),
    random(4),
    random(2, 4, 16),
    random(2, 4, 16, seed=1),
)
# Two blocks: 3 -> 5 -> 4 channels with a skip of width 1, then 4 -> 6 -> 4 with the identity.
SKIPPING = BlockWeights(random(5, 3, 3), random(5), random(4, 5, 3), random(4), random(4, 3, 1), random(4, seed=2))
IDENTITY = BlockWeights(random(6, 4, 2), random(6), random(4, 6, 3), None)
BLOCKS, DILATIONS = [*SKIPPING, *IDENTITY], [2, 3]
PRESENT = [t is not None for t in BLOCKS]
STACK, POOLED = (DILATIONS, 0.01, False), (DILATIONS, 0.01, True)
# What the forward saves, in a layout of its own. At this length it has no gaps, whose contents would be anything.
SAVED, POOL_SAVED = (ops.causal_conv_stack(X, BLOCKS, *options, True)[1:] for options in (STACK, POOLED))
TIME = POOL_SAVED[-1]
RAW = {
    "causal_conv1d": [
        (X, WEIGHT, None, None, 2, "none", 0.01),
        (X, WEIGHT, BIAS, RESIDUAL, 2, "tanh", 0.01),
        (X.transpose(1, 2).contiguous().transpose(1, 2), WEIGHT, BIAS, None, 1, "relu", 0.01),
    ],
    "causal_conv1d_activated": [(X, WEIGHT, BIAS, RESIDUAL, 2, "leaky_relu", 0.01)],
    "causal_conv1d_backward": [
        (GRAD, None, X, WEIGHT, 2, "none", 0.01, True, True, True),
        (GRAD, RESIDUAL, X, WEIGHT, 2, "leaky_relu", 0.01, True, False, True),
        (GRAD, RESIDUAL, X, WEIGHT, 2, "leaky_relu", 0.01, False, True, False),
    ],
    "causal_conv_stack": [(X, BLOCKS, *options, save) for options in (STACK, POOLED) for save in (False, True)],
    "causal_conv_stack_backward": [
        (GRAD, X, BLOCKS, SAVED, *STACK, [True, *PRESENT]),
        (GRAD, X, BLOCKS, SAVED, *STACK, [False, *PRESENT]),
        (GRAD, X, BLOCKS, SAVED, *STACK, [False] * 7 + PRESENT[6:]),
        (GRAD, X, BLOCKS, SAVED, *STACK, [False, True, False, True] + [False] * 9),
        (random(2, 4), X, BLOCKS, POOL_SAVED, *POOLED, [True, *PRESENT]),
        (random(2, 4), X, BLOCKS, POOL_SAVED, *POOLED, [True] + [False] * 12),
    ],
    "weight_norm": [([WEIGHT, SKIPPING.weight2], [BIAS, random(4, 1, 1)])],
    "weight_norm_backward": [
        ([WEIGHT, SKIPPING.weight2], [random(4, 3, 3), random(4, 5, 3, seed=1)], [BIAS, random(4, 1, 1)])
    ],
}
CALLS = [pytest.param(name, args, id=f"{name}-{i}") for name, calls in RAW.items() for i, args in enumerate(calls)]


def test_every_raw_operator_is_covered():
    registered = torch._C._dispatch_get_all_op_names()
    assert {name.removeprefix("pykernels::") for name in registered if name.startswith("pykernels::")} == RAW.keys()


@pytest.mark.parametrize(("name", "args"), CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(name, args, dtype):
    def convert(value):
        if isinstance(value, list):
            return [convert(v) for v in value]
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    checks = torch.library.opcheck(getattr(ops, name).default, tuple(map(convert, args)))
    assert checks.keys() >= {"test_schema", "test_faketensor", "test_aot_dispatch_dynamic"}
    assert set(checks.values()) == {"SUCCESS"}


def differentiable_arguments(args):
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            yield i, lambda t: t
        elif isinstance(value, list) and isinstance(value[0], Tensor):
            yield i, lambda t: t[0]


@pytest.mark.parametrize(("name", "args"), CALLS)
def test_raw_operators_refuse_to_drop_a_gradient(name, args):
    operator = getattr(ops, name)
    places = list(differentiable_arguments(args))
    assert places
    for i, pick in places:
        tracked = list(args)
        tracked[i] = [args[i][0].clone(), *args[i][1:]] if isinstance(args[i], list) else args[i].clone()
        pick(tracked[i]).requires_grad_()
        with pytest.raises(RuntimeError, match=f"{name}.* no derivative of its own"):
            operator(*tracked)
        with torch.no_grad():
            operator(*tracked)
    operator(*args)


def test_raw_operators_refuse_what_does_not_fit_together():
    """Whoever goes round the public functions gets an exception and no access outside the tensors."""
    options = (1, "none", 0.01)
    maxima, needed = random(2, 4), [True, *PRESENT]
    calls: list[tuple[str, tuple]] = [
        ("causal_conv1d", (X, random(4, 2, 3), None, None, *options)),
        ("causal_conv1d", (X, random(4, 3), None, None, *options)),
        ("causal_conv1d", (X[0], WEIGHT, None, None, *options)),
        ("causal_conv1d", (X, WEIGHT.float(), None, None, *options)),
        ("causal_conv1d", (X.half(), WEIGHT.half(), None, None, *options)),
        ("causal_conv1d", (X, WEIGHT, random(3), None, *options)),
        ("causal_conv1d", (X, WEIGHT, BIAS.float(), None, *options)),
        ("causal_conv1d", (X, WEIGHT, BIAS, RESIDUAL[:, :, 1:], *options)),
        ("causal_conv1d", (X, WEIGHT, BIAS, RESIDUAL.float(), *options)),
        ("causal_conv1d", (X, WEIGHT, BIAS, None, 0, "none", 0.01)),
        ("causal_conv1d", (X, WEIGHT, BIAS, None, -3, "none", 0.01)),
        ("causal_conv1d", (X, WEIGHT, BIAS, None, 1, "gelu", 0.01)),
        ("causal_conv1d_activated", (X, WEIGHT, BIAS, RESIDUAL[:1], *options)),
        ("causal_conv1d_activated", (X, WEIGHT[:, :2], BIAS, RESIDUAL, *options)),
        ("causal_conv1d_backward", (GRAD[:, :2], None, X, WEIGHT, *options, True, True, True)),
        ("causal_conv1d_backward", (GRAD, None, X, WEIGHT[:2], *options, True, True, True)),
        ("causal_conv1d_backward", (GRAD, GRAD[:, :, :5], X, WEIGHT, 1, "relu", 0.01, True, True, True)),
        ("causal_conv1d_backward", (GRAD, None, X, WEIGHT, 1, "relu", 0.01, True, True, True)),
        ("causal_conv1d_backward", (GRAD.float(), None, X, WEIGHT, *options, True, True, True)),
        ("causal_conv_stack", (X, [*SKIPPING, *IDENTITY[:2], random(4, 5, 3), *IDENTITY[3:]], *STACK, True)),
        ("causal_conv_stack", (X, [*SKIPPING[:4], None, None], [2], 0.01, False, True)),
        ("causal_conv_stack", (X, [*SKIPPING[:3], random(5), *SKIPPING[4:]], [2], 0.01, False, True)),
        ("causal_conv_stack", (X, BLOCKS, [2], 0.01, False, True)),
        ("causal_conv_stack", (X, BLOCKS, [2, 0], 0.01, False, True)),
        ("causal_conv_stack", (X.float(), BLOCKS, *STACK, True)),
        ("causal_conv_stack", (X.half(), [None if t is None else t.half() for t in BLOCKS], *STACK, True)),
        ("causal_conv_stack", (X[:, :, :0], BLOCKS, *POOLED, True)),
        ("causal_conv_stack_backward", (GRAD[:, :3], X, BLOCKS, SAVED, *STACK, needed)),
        ("causal_conv_stack_backward", (GRAD, X[:, :, 1:], BLOCKS, SAVED, *STACK, needed)),
        ("causal_conv_stack_backward", (GRAD, X, BLOCKS, [SAVED[0][1:], *SAVED[1:]], *STACK, needed)),
        ("causal_conv_stack_backward", (GRAD, X, BLOCKS, [], *STACK, needed)),
        ("causal_conv_stack_backward", (GRAD.float(), X, BLOCKS, SAVED, *STACK, needed)),
        ("causal_conv_stack_backward", (GRAD, X, BLOCKS, POOL_SAVED, *POOLED, needed)),
        ("causal_conv_stack_backward", (maxima, X, BLOCKS, [*POOL_SAVED[:-1], TIME[:1]], *POOLED, needed)),
        ("causal_conv_stack_backward", (maxima, X, BLOCKS, [*POOL_SAVED[:-1], TIME.int()], *POOLED, needed)),
        ("weight_norm", ([WEIGHT], [random(3)])),
        ("weight_norm", ([WEIGHT], [BIAS, BIAS])),
        ("weight_norm", ([WEIGHT, WEIGHT.float()], [BIAS, BIAS.float()])),
        ("weight_norm_backward", ([WEIGHT[:, :2]], [WEIGHT], [BIAS])),
        ("weight_norm_backward", ([WEIGHT], [WEIGHT], [random(5)])),
    ]  # fmt: skip
    for name, args in calls:
        with pytest.raises((ValueError, TypeError, RuntimeError, LookupError)):
            getattr(ops, name)(*args)


@pytest.mark.parametrize("time", [-1, 16, 2**40])
def test_raw_pooled_backward_refuses_times_outside_the_series(time):
    outside = TIME.clone()
    outside[1, 2] = time
    with pytest.raises((ValueError, LookupError, RuntimeError)):
        ops.causal_conv_stack_backward(random(2, 4), X, BLOCKS, [*POOL_SAVED[:-1], outside], *POOLED, [True, *PRESENT])


#: Dynamo itself instantiates the autograd functions that it traces.
compiles = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


def compiled(function: Callable, **options) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})


@compiles
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_compile_convolution(activation, residual):
    case = Case(2, 3, 4, 20, 3, 2, activation, residual=residual)
    tensors, grad = case.tensors(torch.float64), case.grad(torch.float64)
    function = compiled(lambda **t: causal_conv1d(**t, backend="cpu", **case.options()))
    assert_agree(results(function, tensors, grad), results(causal_conv1d, tensors, grad, **case.options()))
    with torch.no_grad():
        assert torch.equal(function(**tensors), causal_conv1d(**tensors, **case.options()))


@compiles
def test_compile_once_for_every_length():
    function = compiled(lambda x, w, b: causal_conv1d(x, w, b, dilation=4, activation="relu"), dynamic=True)
    leaves = [t.clone().requires_grad_() for t in (X, WEIGHT, BIAS)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((2, 16), (3, 50), (5, 7)):
            x = random(batch, 3, length)
            y = function(x, *leaves[1:])
            assert error(y, causal_conv1d(x, *leaves[1:], dilation=4, activation="relu")) <= 1e-12
            y.sum().backward()


@compiles
def test_compile_x_as_its_own_residual():
    weight = random(3, 3, 3).requires_grad_()
    for activation in ACTIVATIONS:
        function = compiled(lambda x, w, a=activation: causal_conv1d(x, w, dilation=2, activation=a, residual=x))
        x = X.clone().requires_grad_()
        outputs = function(x, weight), causal_conv1d(x, weight, dilation=2, activation=activation, residual=x)
        gradients = [torch.autograd.grad(y.sin().sum(), (x, weight)) for y in outputs]
        assert error(*outputs) <= 1e-12
        for actual, expected in zip(*gradients, strict=True):
            assert error(actual, expected) <= 1e-10


@compiles
@pytest.mark.parametrize("name", ["block", "stack", "pooled stack", "weight norm"])
def test_compile_other_operators(name):
    function, tensors = calls("cpu")[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = [f(*leaves) for f in (compiled(function), function)]
    gradients = [torch.autograd.grad(y.sin().sum(), leaves) for y in outputs]
    assert error(*outputs) <= 1e-12
    for actual, expected in zip(*gradients, strict=True):
        assert error(actual, expected) <= 1e-10


def encoder_step(encoder, function, x):
    encoder.zero_grad()
    y = function(x)
    y.square().mean().backward()
    return {"y": y.detach(), **{name: p.grad.clone() for name, p in encoder.named_parameters()}}


@compiles
def test_compile_encoder():
    torch.manual_seed(0)
    encoder = CausalCNNEncoder(2, channels=4, depth=2, reduced_size=6, out_channels=5, dtype=torch.float64)
    x = random(3, 2, 30)
    assert_agree(encoder_step(encoder, compiled(encoder), x), encoder_step(encoder, encoder, x))


@compiles
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
def test_compile_with_inductor():
    case = Case(2, 3, 3, 20, 3, 2, "tanh")
    tensors, grad = case.tensors(torch.float64), case.grad(torch.float64)
    function = compiled(lambda **t: causal_conv1d(**t, **case.options()).sin(), backend="inductor")
    expected = results(lambda **t: causal_conv1d(**t, **case.options()).sin(), tensors, grad)
    assert_agree(results(function, tensors, grad), expected)


@compiles
def test_compile_honours_the_backend():
    """A change of backend after compilation compiles again."""
    graphs = []

    def record(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    function = compiled(lambda x: causal_conv1d(x, WEIGHT), backend=record)
    expected = causal_conv1d(X, WEIGHT)

    def native(names):
        return any("pykernels.causal_conv1d" in name for name in names)

    for name, compilations in ((None, 1), ("reference", 2), (None, 2), ("cpu", 3)):
        with pykernels.backend(name):
            assert error(function(X), expected) <= 1e-12
        assert len(graphs) <= compilations
        assert native(graphs[-1]) == (len(graphs) != 2)
    assert len(graphs) >= 2


def stack(x: Tensor, *weights: Tensor, **options) -> Tensor:
    blocks = [BlockWeights(*weights[:6]), BlockWeights(*weights[6:], None)]
    return causal_conv_stack(x, blocks, DILATIONS, **options)


def calls(backend: str | None = None) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Every public operator as a function of tensors to one tensor."""
    options: dict[str, Any] = {"dilation": 2, "backend": backend}
    return {
        "conv": (
            lambda x, w, b, r: causal_conv1d(x, w, b, residual=r, activation="tanh", **options),
            [X, WEIGHT, BIAS, RESIDUAL],
        ),
        "linear conv": (lambda x, w: causal_conv1d(x, w, **options), [X, WEIGHT]),
        "block": (lambda *t: causal_conv_block(*t, **options), [X, *SKIPPING]),
        "stack": (lambda *t: stack(*t, backend=backend), [X, *SKIPPING, *IDENTITY[:3]]),
        "pooled stack": (lambda *t: stack(*t, pool=True, backend=backend), [X, *SKIPPING, *IDENTITY[:3]]),
        "weight norm": (lambda v, g: weight_norm([v], [g], backend=backend)[0], [WEIGHT, BIAS]),
    }


NAMES = list(calls())


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_is_refused(name):
    function, tensors = calls("cpu")[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    gradients = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
    plain = torch.autograd.grad(function(*leaves).sin().sum(), leaves)
    for gradient, other in zip(gradients, plain, strict=True):
        assert error(gradient.detach(), other) <= 1e-14
    with pytest.raises(RuntimeError, match=r"double backward.*backend='reference'"):
        torch.autograd.grad(sum(g.sum() for g in gradients), leaves)
    with pytest.raises(RuntimeError, match="reference"):
        torch.autograd.functional.hessian(lambda t: function(t, *tensors[1:]).sin().sum(), tensors[0])


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_refused(name):
    function, tensors = calls("cpu")[name]
    for i in range(len(tensors)):
        with forward_ad.dual_level():
            duals = list(tensors)
            duals[i] = forward_ad.make_dual(tensors[i], torch.ones_like(tensors[i]))
            with pytest.raises(RuntimeError, match=r"forward-mode.*backend='reference'"):
                function(*duals)
            assert torch.equal(function(*tensors), calls("cpu")[name][0](*tensors))
    with pytest.raises(RuntimeError, match=r"torch.func.jvp.*backend='reference'"):
        torch.func.jvp(function, tuple(tensors), tuple(map(torch.ones_like, tensors)))
    with pytest.raises(RuntimeError, match=r"torch.func.\w+.*backend='reference'"):
        torch.func.jacfwd(function)(*tensors)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_refused(name):
    function, tensors = calls("cpu")[name]
    stacked = torch.stack([tensors[0]] * 3)
    with pytest.raises(RuntimeError, match=r"torch.func.vmap.*backend='reference'"):
        torch.func.vmap(lambda t: function(t, *tensors[1:]))(stacked)
    gradient = torch.func.grad(lambda t: function(t, *tensors[1:]).sum())
    with pytest.raises(RuntimeError, match=r"torch.func.vmap.*backend='reference'"):
        torch.func.vmap(gradient)(stacked)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_output_gradients_is_right_or_refused(name):
    function, tensors = calls("cpu")[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    many = torch.stack([random(*y.shape, seed=seed) for seed in range(3)])
    try:
        batched = torch.autograd.grad(y, leaves, many, is_grads_batched=True, retain_graph=True)
    except RuntimeError:
        return
    for i, grad in enumerate(many):
        for actual, expected in zip(batched, torch.autograd.grad(y, leaves, grad, retain_graph=True), strict=True):
            assert error(actual[i], expected) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_function_transform_grad(name):
    function, tensors = calls("cpu")[name]
    weights = random(*function(*tensors).shape, seed=3)

    def loss(*args):
        return (function(*args) * weights).sum()

    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    every = tuple(range(len(tensors)))
    for actual, e in zip(torch.func.grad(loss, every)(*tensors), expected, strict=True):
        assert error(actual, e) <= 1e-12
    value, pullback = torch.func.vjp(function, *tensors)
    assert error(value, function(*tensors)) <= 1e-14
    for actual, e in zip(pullback(weights), expected, strict=True):
        assert error(actual, e) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_reference_has_every_derivative(name):
    function, tensors = calls("reference")[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    stacked = torch.stack([tensors[0], 2 * tensors[0]])
    actual = torch.func.vmap(lambda t: function(t, *tensors[1:]))(stacked)
    for i in range(2):
        assert error(actual[i], function(stacked[i], *tensors[1:])) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_changing_a_saved_tensor_is_noticed(name):
    function, tensors = calls("cpu")[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    for i in (0, 1):
        y = function(*leaves)
        with torch.no_grad():
            leaves[i].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh"])
def test_changing_the_output_is_noticed(activation):
    x = X.clone().requires_grad_()
    y = causal_conv1d(x, WEIGHT, activation=activation, backend="cpu")
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = causal_conv1d(x, WEIGHT, activation=activation, residual=RESIDUAL, backend="cpu")
    expected = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    y.add_(1)  # not needed: the activation was saved before the residual was added
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_modes_without_gradients(name):
    function, tensors = calls("cpu")[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = function(*leaves)
    assert expected.requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y = function(*leaves)
        assert not y.requires_grad
        assert torch.equal(y, expected)
    twice = [torch.autograd.grad(expected.sum(), leaves, retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, *twice))
