"""How the operators fit into torch: registration, compilation, transforms, derivatives of every kind and order."""

from __future__ import annotations

import contextlib
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
from .modes import FEW_MODES, Mode

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
# Groups of one channel (depthwise), and two groups; a state; sequences packed into one series; a padded batch.
DEPTHWISE, GROUPED = random(3, 1, 3), random(4, 2, 3)
STATE, PACKED_STATE = random(2, 3, 4), random(3, 3, 4)
OFFSETS, LENGTHS = torch.tensor([0, 3, 3, 16], dtype=torch.int32), torch.tensor([16, 5])
NOWHERE = (None, None, None)  # no state, offsets and lengths
PLAIN = (2, 1, "none", 0.01)  # dilation, groups, activation, slope
# What the forward saves, in a layout of its own. At this length it has no gaps, whose contents would be anything.
SAVED, POOL_SAVED = (ops.causal_conv_stack(X, BLOCKS, None, None, *options, True)[1:] for options in (STACK, POOLED))
PACKED_SAVED = ops.causal_conv_stack(X[:1], BLOCKS, OFFSETS[[0, 1, 3]], None, *POOLED, True)[1:]
PADDED_SAVED = ops.causal_conv_stack(X, BLOCKS, None, LENGTHS, *STACK, True)[1:]
TIME = POOL_SAVED[-1]
FORWARD = [
    (X, WEIGHT, None, None, *NOWHERE, *PLAIN, False, "cpu"),
    (X, WEIGHT, BIAS, RESIDUAL, *NOWHERE, 2, 1, "tanh", 0.01, False, "cpu"),
    (X.transpose(1, 2).contiguous().transpose(1, 2), WEIGHT, BIAS, None, *NOWHERE, 1, 1, "relu", 0.01, False, "cpu"),
    (X, WEIGHT, BIAS, RESIDUAL, *NOWHERE, 2, 1, "gelu", 0.01, True, "cpu"),
    (X, DEPTHWISE, None, X, *NOWHERE, 2, 3, "silu", 0.01, False, "cpu"),
    (RESIDUAL, GROUPED, BIAS, None, *NOWHERE, 2, 2, "none", 0.01, False, "cpu"),
    (X, WEIGHT, BIAS, None, STATE, None, None, 2, 1, "silu", 0.01, False, "cpu"),
    (X[:1], WEIGHT, BIAS, None, PACKED_STATE, OFFSETS, None, 2, 1, "none", 0.01, False, "cpu"),
    (X[:1], DEPTHWISE, None, None, None, OFFSETS, None, 2, 3, "tanh", 0.01, False, "cpu"),
    (X, WEIGHT, BIAS, RESIDUAL, None, None, LENGTHS, 2, 1, "leaky_relu", 0.01, False, "cpu"),
]
RAW = {
    "causal_conv1d": FORWARD,
    "causal_conv1d_saving": FORWARD[1:],
    "causal_conv1d_backward": [
        (GRAD, None, X, WEIGHT, *NOWHERE, *PLAIN, "cpu", True, True, True, False),
        (GRAD, RESIDUAL, X, WEIGHT, *NOWHERE, 2, 1, "leaky_relu", 0.01, "cpu", True, False, True, False),
        (GRAD, RESIDUAL, X, WEIGHT, *NOWHERE, 2, 1, "gelu", 0.01, "cpu", False, True, False, False),
        (X, X, X, DEPTHWISE, *NOWHERE, 2, 3, "silu", 0.01, "cpu", True, True, True, False),
        (GRAD, None, RESIDUAL, GROUPED, *NOWHERE, 2, 2, "none", 0.01, "cpu", True, True, False, False),
        (GRAD, GRAD, X, WEIGHT, STATE, None, LENGTHS, 2, 1, "tanh", 0.01, "cpu", True, True, True, True),
        (GRAD[:1], None, X[:1], WEIGHT, PACKED_STATE, OFFSETS, None, *PLAIN, "cpu", False, True, False, True),
        (GRAD[:1], None, X[:1], WEIGHT, None, OFFSETS, None, *PLAIN, "cpu", True, True, True, False),
    ],
    "causal_conv_stack": [
        (X[:batch], BLOCKS, *where, *options, save)
        for options in (STACK, POOLED)
        for save in (False, True)
        for batch, *where in ((2, None, None), (1, OFFSETS[[0, 1, 3]], None), (2, None, LENGTHS))
    ],
    "causal_conv_stack_backward": [
        (GRAD, X, BLOCKS, None, None, SAVED, *STACK, [True, *PRESENT]),
        (GRAD, X, BLOCKS, None, None, SAVED, *STACK, [False, *PRESENT]),
        (GRAD, X, BLOCKS, None, None, SAVED, *STACK, [False] * 7 + PRESENT[6:]),
        (GRAD, X, BLOCKS, None, None, SAVED, *STACK, [False, True, False, True] + [False] * 9),
        (GRAD, X, BLOCKS, None, LENGTHS, PADDED_SAVED, *STACK, [True, *PRESENT]),
        (random(2, 4), X, BLOCKS, None, None, POOL_SAVED, *POOLED, [True, *PRESENT]),
        (random(2, 4), X, BLOCKS, None, None, POOL_SAVED, *POOLED, [True] + [False] * 12),
        (random(2, 4), X[:1], BLOCKS, OFFSETS[[0, 1, 3]], None, PACKED_SAVED, *POOLED, [True, *PRESENT]),
    ],
    "sequence_argmax": [(X[:1], OFFSETS[[0, 1, 3]]), (X[:1], OFFSETS[[0, 3]])],
    "weight_norm": [([WEIGHT, SKIPPING.weight2], [BIAS, random(4, 1, 1)])],
    "weight_norm_backward": [
        ([WEIGHT, SKIPPING.weight2], [random(4, 3, 3), random(4, 5, 3, seed=1)], [BIAS, random(4, 1, 1)])
    ],
}
CALLS = [pytest.param(name, args, id=f"{name}-{i}") for name, calls in RAW.items() for i, args in enumerate(calls)]


def test_every_raw_operator_is_covered():
    registered = torch._C._dispatch_get_all_op_names()
    names = {name.removeprefix("pykernels::") for name in registered if name.startswith("pykernels::")}
    others = ("mlp_odeint", "gaussian_warp", "flow_penalties", "ntk_")  # of other families, with tests of their own
    assert {name for name in names if not name.startswith(others)} == RAW.keys()


@pytest.mark.parametrize(("name", "args"), CALLS)
def test_opcheck(name, args):
    opcheck(name, args, torch.float64)


@pytest.mark.parametrize(("name", "calls"), RAW.items(), ids=RAW)
def test_opcheck_in_float32(name, calls):
    opcheck(name, calls[0], torch.float32)


def opcheck(name, args, dtype):
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
    nothing: tuple = (None, None)
    maxima, needed = random(2, 4), [True, *PRESENT]

    def forward(x=X, weight=WEIGHT, bias=None, residual=None, state=None, offsets=None, lengths=None,
                options=(1, 1, "none", 0.01), backend="cpu"):  # fmt: skip
        for name in ("causal_conv1d", "causal_conv1d_saving"):
            yield name, (x, weight, bias, residual, state, offsets, lengths, *options, False, backend)

    def backward(grad=GRAD, saved=None, x=X, weight=WEIGHT, state=None, offsets=None, lengths=None,
                 options=(1, 1, "none", 0.01), backend="cpu"):  # fmt: skip
        needs = (True, True, True, state is not None)
        yield "causal_conv1d_backward", (grad, saved, x, weight, state, offsets, lengths, *options, backend, *needs)

    calls: list[tuple[str, tuple]] = [
        *forward(weight=random(4, 2, 3)),
        *forward(weight=random(4, 3)),
        *forward(x=X[0]),
        *forward(weight=WEIGHT.float()),
        *forward(x=X.long(), weight=WEIGHT.long()),
        *forward(bias=random(3)),
        *forward(bias=BIAS.float()),
        *forward(residual=RESIDUAL[:, :, 1:]),
        *forward(residual=RESIDUAL.float()),
        *forward(residual=RESIDUAL[:1]),
        *forward(options=(0, 1, "none", 0.01)),
        *forward(options=(-3, 1, "none", 0.01)),
        *forward(options=(1, 1, "softplus", 0.01)),
        *forward(options=(1, 0, "none", 0.01)),
        *forward(options=(1, 3, "none", 0.01)),
        *forward(weight=WEIGHT[:, :1], options=(1, 3, "none", 0.01)),
        *forward(backend="abacus"),
        *forward(state=STATE),
        *forward(state=random(2, 3, 2).float()),
        *forward(state=random(2, 2, 2)),
        *forward(state=random(1, 3, 2)),
        *forward(offsets=OFFSETS),
        *forward(x=X[:1], offsets=OFFSETS.long()),
        *forward(x=X[:1], offsets=OFFSETS[:1]),
        *forward(x=X[:1], offsets=OFFSETS, state=random(1, 3, 2)),
        *forward(lengths=LENGTHS[:1]),
        *forward(lengths=LENGTHS[:, None]),
        *backward(grad=GRAD[:, :2]),
        *backward(weight=WEIGHT[:2]),
        *backward(saved=GRAD[:, :, :5], options=(1, 1, "relu", 0.01)),
        *backward(options=(1, 1, "relu", 0.01)),
        *backward(grad=GRAD.float()),
        *backward(options=(1, 3, "none", 0.01)),
        *backward(offsets=OFFSETS),
        *backward(lengths=LENGTHS[:1]),
        *backward(state=random(2, 3, 1)),
        ("causal_conv_stack", (X, [*SKIPPING, *IDENTITY[:2], random(4, 5, 3), *IDENTITY[3:]], *nothing, *STACK, True)),
        ("causal_conv_stack", (X, [*SKIPPING[:4], None, None], *nothing, [2], 0.01, False, True)),
        ("causal_conv_stack", (X, [*SKIPPING[:3], random(5), *SKIPPING[4:]], *nothing, [2], 0.01, False, True)),
        ("causal_conv_stack", (X, BLOCKS, *nothing, [2], 0.01, False, True)),
        ("causal_conv_stack", (X, BLOCKS, *nothing, [2, 0], 0.01, False, True)),
        ("causal_conv_stack", (X.float(), BLOCKS, *nothing, *STACK, True)),
        ("causal_conv_stack", (X.half(), [None if t is None else t.half() for t in BLOCKS], *nothing, *STACK, True)),
        ("causal_conv_stack", (X[:, :, :0], BLOCKS, *nothing, *POOLED, True)),
        ("causal_conv_stack", (X, BLOCKS, OFFSETS, None, *STACK, True)),
        ("causal_conv_stack", (X, BLOCKS, None, LENGTHS[:1], *STACK, True)),
        ("causal_conv_stack", (X[:1], BLOCKS, OFFSETS, None, *POOLED, True)),
        ("causal_conv_stack", (X, BLOCKS, None, 0 * LENGTHS, *POOLED, True)),
        ("causal_conv_stack_backward", (GRAD[:, :3], X, BLOCKS, *nothing, SAVED, *STACK, needed)),
        ("causal_conv_stack_backward", (GRAD, X[:, :, 1:], BLOCKS, *nothing, SAVED, *STACK, needed)),
        ("causal_conv_stack_backward", (GRAD, X, BLOCKS, *nothing, [SAVED[0][1:], *SAVED[1:]], *STACK, needed)),
        ("causal_conv_stack_backward", (GRAD, X, BLOCKS, *nothing, [], *STACK, needed)),
        ("causal_conv_stack_backward", (GRAD.float(), X, BLOCKS, *nothing, SAVED, *STACK, needed)),
        ("causal_conv_stack_backward", (GRAD, X, BLOCKS, *nothing, POOL_SAVED, *POOLED, needed)),
        ("causal_conv_stack_backward", (GRAD, X, BLOCKS, OFFSETS, None, SAVED, *STACK, needed)),
        ("causal_conv_stack_backward", (maxima, X, BLOCKS, *nothing, [*POOL_SAVED[:-1], TIME[:1]], *POOLED, needed)),
        ("causal_conv_stack_backward", (maxima, X, BLOCKS, *nothing, [*POOL_SAVED[:-1], TIME.int()], *POOLED, needed)),
        ("weight_norm", ([WEIGHT], [random(3)])),
        ("weight_norm", ([WEIGHT], [BIAS, BIAS])),
        ("weight_norm", ([WEIGHT, WEIGHT.float()], [BIAS, BIAS.float()])),
        ("weight_norm_backward", ([WEIGHT[:, :2]], [WEIGHT], [BIAS])),
        ("weight_norm_backward", ([WEIGHT], [WEIGHT], [random(5)])),
    ]  # fmt: skip
    accepted = []
    for i, (name, args) in enumerate(calls):
        with contextlib.suppress(ValueError, TypeError, RuntimeError, LookupError, ImportError):
            getattr(ops, name)(*args)
            accepted.append((i, name))
    assert not accepted


@pytest.mark.parametrize("time", [-1, 16, 2**40])
def test_raw_pooled_backward_refuses_times_outside_the_series(time):
    for x, where, saved in ((X, (None, None), POOL_SAVED), (X[:1], (OFFSETS[[0, 1, 3]], None), PACKED_SAVED)):
        outside = saved[-1].clone()
        outside[1, 2] = time
        with pytest.raises((ValueError, LookupError, RuntimeError)):
            ops.causal_conv_stack_backward(
                random(2, 4), x, BLOCKS, *where, [*saved[:-1], outside], *POOLED, [True, *PRESENT]
            )


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
        "silu conv": (
            lambda x, w, b, r: causal_conv1d(
                x, w, b, residual=r, residual_before_activation=True, activation="silu", groups=2, **options
            ),
            [RESIDUAL, GROUPED, BIAS, random(2, 4, 16, seed=5)],
        ),
        "depthwise conv": (
            lambda x, w, s: causal_conv1d(x, w, initial_state=s, groups=3, activation="gelu", **options),
            [X, DEPTHWISE, STATE],
        ),
        "packed conv": (
            lambda x, w, b, s: causal_conv1d(
                x, w, b, initial_state=s, cu_seqlens=OFFSETS, activation="silu", **options
            ),
            [X[:1], WEIGHT, BIAS, PACKED_STATE],
        ),
        "padded conv": (
            lambda x, w, r: causal_conv1d(x, w, residual=r, lengths=LENGTHS, activation="gelu", **options),
            [X, WEIGHT, RESIDUAL],
        ),
        "block": (lambda *t: causal_conv_block(*t, **options), [X, *SKIPPING]),
        "stack": (lambda *t: stack(*t, backend=backend), [X, *SKIPPING, *IDENTITY[:3]]),
        "pooled stack": (lambda *t: stack(*t, pool=True, backend=backend), [X, *SKIPPING, *IDENTITY[:3]]),
        "packed stack": (
            lambda *t: stack(*t, pool=True, cu_seqlens=OFFSETS[[0, 1, 3]], backend=backend),
            [X[:1], *SKIPPING, *IDENTITY[:3]],
        ),
        "padded stack": (
            lambda *t: stack(*t, pool=True, lengths=LENGTHS, backend=backend),
            [X, *SKIPPING, *IDENTITY[:3]],
        ),
        "weight norm": (lambda v, g: weight_norm([v], [g], backend=backend)[0], [WEIGHT, BIAS]),
    }


NAMES = list(calls())


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
@pytest.mark.parametrize("mode", FEW_MODES, ids=str)
def test_compile_every_mode(mode: Mode):
    """With the final state, whose gradient counts too."""
    tensors, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
    target = random(mode.sequences, mode.in_channels, mode.reach)

    def function(**t):
        return causal_conv1d(**t, backend="cpu", return_final_state=True, **mode.options())

    outcomes = []
    for run in (compiled(function), function):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        y, state = run(**leaves)
        gradients = torch.autograd.grad([y, state], list(leaves.values()), [grad, target])
        outcomes.append({"y": y.detach(), "state": state.detach(), **dict(zip(leaves, gradients, strict=True))})
        with torch.no_grad():
            assert torch.equal(run(**tensors)[0], y)
    assert_agree(*outcomes)


@compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compile_half_precision_and_autocast(dtype):
    mode = Mode(2, 4, 6, 20, 3, 2, 2, "silu", "before", state=True)
    tensors, grad = mode.tensors(torch.float32), mode.grad(dtype)
    function = compiled(lambda **t: causal_conv1d(**t, backend="cpu", **mode.options()))
    halves = {name: t.to(dtype) for name, t in tensors.items()}
    expected = results(causal_conv1d, halves, grad, backend="cpu", **mode.options())
    for name, t in results(function, halves, grad).items():
        assert torch.equal(t, expected[name]), name
    with torch.autocast("cpu", dtype=dtype):
        actual = results(function, tensors, grad)
    for name, t in actual.items():
        assert torch.equal(t, expected[name].float() if name != "y" else expected[name]), name


@compiles
def test_compile_once_for_every_packing():
    weight, bias = WEIGHT.clone().requires_grad_(), BIAS.clone().requires_grad_()

    def direct(x, state, cu_seqlens):
        return causal_conv1d(
            x, weight, bias, dilation=4, activation="silu", initial_state=state, cu_seqlens=cu_seqlens, backend="cpu"
        )

    function = compiled(direct, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ends in ((0, 9, 9, 15, 20, 21, 40), (0, 3, 17, 20, 21, 50), (0, 1, 30)):
            offsets = torch.tensor(ends, dtype=torch.int32)
            x, state = random(1, 3, ends[-1]).requires_grad_(), random(len(ends) - 1, 3, 8).requires_grad_()
            outputs = function(x, state, offsets), direct(x, state, offsets)
            assert error(outputs[0].detach(), outputs[1].detach()) <= 1e-12
            gradients = [torch.autograd.grad(y.sin().sum(), (x, state, weight, bias)) for y in outputs]
            for actual, expected in zip(*gradients, strict=True):
                assert error(actual, expected) <= 1e-10


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
@pytest.mark.parametrize("before", [False, True])
def test_compile_x_as_its_own_residual(before):
    weight = random(3, 3, 3).requires_grad_()
    for activation in ACTIVATIONS[2:]:

        def direct(x, w, a=activation):
            return causal_conv1d(x, w, dilation=2, activation=a, residual=x, residual_before_activation=before)

        x = X.clone().requires_grad_()
        outputs = compiled(direct)(x, weight), direct(x, weight)
        gradients = [torch.autograd.grad(y.sin().sum(), (x, weight)) for y in outputs]
        assert error(*outputs) <= 1e-12
        for actual, expected in zip(*gradients, strict=True):
            assert error(actual, expected) <= 1e-10


@compiles
@pytest.mark.parametrize("name", NAMES)
def test_compile_every_operator(name):
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
    for where in ({"lengths": torch.tensor([30, 1, 7])}, {"cu_seqlens": torch.tensor([0, 9, 30], dtype=torch.int32)}):
        some = x[:1] if "cu_seqlens" in where else x
        run = [lambda x, f=f, where=where: f(x, **where) for f in (compiled(encoder), encoder)]
        assert_agree(*(encoder_step(encoder, r, some) for r in run))


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


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_the_first_two_orders(name):
    function, tensors = calls("cpu")[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_gradients_are_the_plain_ones(name):
    """Whether the gradient will be differentiated again does not change it; nor does what else is needed."""
    function, tensors = calls("cpu")[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    grad = random(*function(*tensors).shape, seed=4)
    plain = torch.autograd.grad(function(*leaves), leaves, grad)
    recorded = torch.autograd.grad(function(*leaves), leaves, grad, create_graph=True)
    for gradient, other in zip(recorded, plain, strict=True):
        assert error(gradient.detach(), other) <= 1e-13
    for i, leaf in enumerate(leaves):
        alone = [t.detach() for t in leaves]
        alone[i] = leaf
        (gradient,) = torch.autograd.grad(function(*alone), leaf, grad, create_graph=True)
        assert error(gradient.detach(), plain[i]) <= 1e-13


def agree(function: Callable[[str], Any], tolerance: float = 1e-10) -> None:
    """The compiled kernels and the reference find the same, which is not all zero."""
    actual, expected = (torch.utils._pytree.tree_leaves(function(backend)) for backend in ("cpu", "reference"))
    assert any(t.abs().max() > 0 for t in expected if t.numel() > 0)
    for a, e in zip(actual, expected, strict=True):
        assert error(a.detach(), e.detach()) <= tolerance


@pytest.mark.parametrize("name", NAMES)
def test_hessian(name):
    """Through double backward, forward over reverse, and reverse over forward."""
    every = len(calls()[name][1])

    def hessians(backend):
        function, tensors = calls(backend)[name]

        def loss(t, i):
            return function(*tensors[:i], t, *tensors[i + 1 :]).sin().sum()

        for i in range(min(2, every)):
            t = tensors[i]
            yield torch.autograd.functional.hessian(lambda t, i=i: loss(t, i), t)
            yield torch.func.hessian(loss)(t, i)
            yield torch.func.jacrev(torch.func.grad(loss))(t, i)

    agree(lambda backend: list(hessians(backend)))


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode(name):
    function, tensors = calls("cpu")[name]
    expected = function(*tensors)
    for i, t in enumerate(tensors):
        tangent = random(*t.shape, seed=6)

        def jvp(backend, i=i, t=t, tangent=tangent):
            duals = list(tensors)
            with forward_ad.dual_level():
                duals[i] = forward_ad.make_dual(t, tangent)
                value, derivative = forward_ad.unpack_dual(calls(backend)[name][0](*duals))
                assert error(value, expected) <= 1e-13
                return derivative.clone()

        agree(jvp)
    with forward_ad.dual_level():
        assert torch.equal(function(*tensors), expected)
        assert forward_ad.unpack_dual(function(*tensors)).tangent is None

    def through_functions(backend):
        function, tensors = calls(backend)[name]
        tangents = tuple(random(*t.shape, seed=7) for t in tensors)
        return torch.func.jvp(function, tuple(tensors), tangents), torch.func.jacfwd(function)(*tensors)

    agree(through_functions)


@pytest.mark.parametrize("name", NAMES)
def test_vmap(name):
    """Over each argument alone and over all together, from any dimension, and twice."""
    function, tensors = calls("cpu")[name]
    many = [torch.stack([t, 2 * t, -t]) for t in tensors]
    choices = [[i] for i in range(len(tensors))] + [list(range(len(tensors)))]
    for chosen in choices:
        dims = tuple(0 if i in chosen else None for i in range(len(tensors)))
        args = [many[i] if i in chosen else t for i, t in enumerate(tensors)]
        each = [[a[v] if i in chosen else a for i, a in enumerate(args)] for v in range(3)]
        expected = torch.stack([function(*one) for one in each])
        assert error(torch.func.vmap(function, dims)(*args), expected) <= 1e-12
        last = [a.movedim(0, -1) if d == 0 else a for a, d in zip(args, dims, strict=True)]
        dims = tuple(None if d is None else -1 for d in dims)
        assert error(torch.func.vmap(function, dims, out_dims=1)(*last), expected.movedim(0, 1)) <= 1e-12
    if len(tensors) > 1:
        twice = torch.func.vmap(torch.func.vmap(function, (0, *[None] * (len(tensors) - 1))), (None, 0, *dims[2:]))
        dims = (None,) * (len(tensors) - 2)
        twice = torch.func.vmap(torch.func.vmap(function, (0, None, *dims)), (None, 0, *dims))
        actual = twice(many[0], many[1], *tensors[2:])
        for i in range(3):
            for j in range(3):
                assert error(actual[i, j], function(many[0][j], many[1][i], *tensors[2:])) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_every_sample(name):
    """``vmap(grad)``: over data with shared weights, and over an ensemble of weights."""
    function, tensors = calls("cpu")[name]
    every = tuple(range(len(tensors)))
    weights = random(*function(*tensors).shape, seed=3)

    def loss(*args):
        return (function(*args).sin() * weights).sum()

    for batched in (0, 1):
        args = list(tensors)
        args[batched] = torch.stack([tensors[batched], 2 * tensors[batched], -tensors[batched]])
        dims = tuple(0 if i == batched else None for i in every)
        actual = torch.func.vmap(torch.func.grad(loss, every), dims)(*args)
        for v in range(3):
            leaves = [(t[v] if i == batched else t).detach().clone().requires_grad_() for i, t in enumerate(args)]
            for a, e in zip(actual, torch.autograd.grad(loss(*leaves), leaves), strict=True):
                assert error(a[v], e) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_output_gradients(name):
    """Single convolutions take one; the other operators take it or say that they do not."""
    function, tensors = calls("cpu")[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    many = torch.stack([random(*y.shape, seed=seed) for seed in range(3)])
    try:
        batched = torch.autograd.grad(y, leaves, many, is_grads_batched=True, retain_graph=True)
    except RuntimeError:
        assert not name.endswith("conv")
        return
    for i, grad in enumerate(many):
        for actual, expected in zip(batched, torch.autograd.grad(y, leaves, grad, retain_graph=True), strict=True):
            assert error(actual[i], expected) <= 1e-12


def test_third_derivative():
    x, weight = X[:1, :, :5].clone().requires_grad_(), WEIGHT.clone().requires_grad_()

    def third(backend):
        outcome = causal_conv1d(x, weight, BIAS, dilation=2, activation="gelu", backend=backend).sin().sum()
        for _ in range(2):
            first = torch.autograd.grad(outcome, (x, weight), create_graph=True)
            outcome = sum(g.square().sum() for g in first)
        return torch.autograd.grad(outcome, (x, weight))

    agree(third)


def test_gradient_penalty_of_an_encoder():
    """Double backward through weight normalisation, blocks, maximum and linear map."""
    torch.manual_seed(0)
    encoder = CausalCNNEncoder(2, channels=4, depth=2, reduced_size=6, out_channels=5, dtype=torch.float64)
    x = random(3, 2, 30).requires_grad_()

    def penalty(backend):
        encoder.backend = backend
        (gradient,) = torch.autograd.grad(encoder(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, *encoder.parameters()], allow_unused=True)

    agree(lambda backend: [g for g in penalty(backend) if g is not None])


def test_per_sample_gradients_of_an_encoder():
    torch.manual_seed(0)
    encoder = CausalCNNEncoder(2, channels=4, depth=2, reduced_size=6, out_channels=5, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in encoder.named_parameters()}
    x = random(3, 2, 30)

    def loss(parameters, sample):
        return torch.func.functional_call(encoder, parameters, (sample[None],)).sin().sum()

    actual = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        encoder.zero_grad()
        encoder(sample[None]).sin().sum().backward()
        for name, p in encoder.named_parameters():
            assert error(actual[name][i], p.grad) <= 1e-12, name


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
