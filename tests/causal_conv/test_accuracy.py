"""Values and gradients of the convolution and of the block, on every backend and CPU capability."""

from __future__ import annotations

import itertools

import pytest
import torch

from pykernels.backends import OPERATORS
from pykernels.ops import BlockWeights, causal_conv1d, causal_conv_block, causal_conv_stack
from pykernels.ops._check import compare

from .cases import (
    ACTIVATIONS,
    CASES,
    COMPILED,
    RUNNERS,
    Case,
    assert_agree,
    definition,
    plain,
    pooled_error,
    results,
)

EPS = torch.finfo(torch.float32).eps
SEEDS = range(3)


def test_by_hand():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]])
    weight = torch.tensor([[[10.0, 1.0]], [[0.0, -1.0]]])
    y = causal_conv1d(x, weight, torch.tensor([0.5, 0.0]), dilation=2, backend="reference")
    assert y.tolist() == [[[1.5, 2.5, 13.5, 24.5, 35.5], [-1.0, -2.0, -3.0, -4.0, -5.0]]]
    x.requires_grad_()
    causal_conv1d(x, weight[:1], dilation=2, backend="reference").sum().backward()
    assert x.grad.tolist() == [[[11.0, 11.0, 11.0, 1.0, 1.0]]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(case: Case):
    """Every backend against the definition tap by tap; the reference also against ``F.pad`` and ``F.conv1d``."""
    tensors, grad = case.tensors(torch.float64), case.grad(torch.float64)
    expected = results(definition, tensors, grad, **case.options())
    assert_agree(results(plain, tensors, grad, **case.options()), expected, "plain PyTorch")
    for runner in RUNNERS:
        actual = results(causal_conv1d, tensors, grad, backend=runner.use(), **case.options())
        assert_agree(actual, expected, runner)
        without_graph = causal_conv1d(**tensors, backend=runner.backend, **case.options())
        assert torch.equal(without_graph, actual["y"]), runner


def float32_errors(case: Case, runner) -> dict[str, tuple[float, float]]:
    """For every tensor, the error of the backend and that of plain PyTorch, pooled over a few draws of the inputs.

    Both are errors of float32 against float64 for the same inputs, ``max|difference| / max|expected|``. Outputs within
    1e-5 of the kink of relu and leaky relu get no gradient: on which side of it float32 falls is chance.
    """
    expected, ours, theirs = [], [], []
    for seed in SEEDS:
        tensors, grad = case.tensors(torch.float32, seed), case.grad(torch.float32, seed)
        exact = {name: t.double() for name, t in tensors.items()}
        z = plain(**{n: t for n, t in exact.items() if n != "residual"}, **{**case.options(), "activation": None})
        grad[z.abs() < 1e-5] = 0
        expected.append(results(plain, exact, grad.double(), **case.options()))
        theirs.append(results(plain, tensors, grad, **case.options()))
        ours.append(results(causal_conv1d, tensors, grad, backend=runner.use(), **case.options()))
    return {
        name: tuple(pooled_error([r[name] for r in run], [e[name] for e in expected]) for run in (ours, theirs))
        for name in expected[0]
    }


@pytest.mark.parametrize("runner", COMPILED, ids=str)
def test_float32_against_plain_pytorch(runner):
    """Outputs at most twice as far from float64 as plain PyTorch in float32, gradients at most three times.

    Case by case this holds up to 2 eps, since one rounding more or less decides where errors are that small; over all
    cases together it holds as it stands.
    """
    totals: dict[str, list[float]] = {}
    for case in CASES:
        for name, (ours, theirs) in float32_errors(case, runner).items():
            factor = 2 if name == "y" else 3
            assert ours <= factor * theirs + 2 * EPS, f"{case}: {name} is off by {ours:.1e}, plain by {theirs:.1e}"
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += ours
            total[1] += theirs
    assert totals.keys() == {"y", "x", "weight", "bias", "residual"}
    for name, (ours, theirs) in totals.items():
        assert ours <= (2 if name == "y" else 3) * theirs, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_gradcheck(runner, activation):
    backend = runner.use()
    for bias, residual, slope in itertools.product((False, True), (False, True), (0.0, 0.01, 1.0, 2.5)):
        if slope != 0.01 and activation != "leaky_relu":
            continue
        case = Case(2, 3, 2, 6, 3, 2, activation, slope, bias, residual)
        tensors = case.tensors(torch.float64)
        leaves = [t.requires_grad_() for t in tensors.values()]

        def function(*args, case=case, names=tuple(tensors)):
            return causal_conv1d(**dict(zip(names, args, strict=True)), backend=backend, **case.options())

        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=4)), ids=str)
def test_any_subset_of_gradients(capability, needed):
    """A gradient does not depend on which others are computed; one that is not needed is not made."""
    case = Case(3, 9, 8, 385, 3, 130, "leaky_relu")
    tensors, grad = case.tensors(torch.float32), case.grad(torch.float32)
    everything = results(causal_conv1d, tensors, grad, backend="cpu", **case.options())
    leaves = {n: t.detach().requires_grad_(need) for (n, t), need in zip(tensors.items(), needed, strict=True)}
    y = causal_conv1d(**leaves, backend="cpu", **case.options())
    assert y.requires_grad == any(needed)
    if any(needed):
        y.backward(grad)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad
        assert leaf.grad is None or torch.equal(leaf.grad, everything[name]), name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("batch", "length"), [(0, 0), (0, 5), (3, 0)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty(backend, batch, length, activation):
    case = Case(batch, 3, 4, length, 3, 2, activation)
    for dtype in (torch.float32, torch.float64):
        tensors, grad = case.tensors(dtype), case.grad(dtype)
        actual = results(causal_conv1d, tensors, grad, backend=backend, **case.options())
        assert actual["y"].shape == (batch, 4, length)
        for name, t in tensors.items():
            assert torch.equal(actual[name], torch.zeros_like(t)), name


BLOCKS = [  # batch, C, hidden, O, T, K of the first and of the second, dilation, slope, biases, skip, bias of the skip
    (2, 4, 4, 4, 50, 3, 3, 2, 0.01, True, False, False),
    (10, 40, 40, 40, 150, 3, 3, 64, 0.01, True, False, False),
    (3, 40, 41, 40, 100, 3, 3, 512, 0.01, True, False, False),
    (2, 1, 40, 40, 385, 3, 3, 1, 0.01, True, True, True),
    (2, 13, 9, 5, 101, 2, 5, 7, 2.5, False, True, False),
    (1, 3, 8, 3, 17, 64, 1, 2, 0.0, True, True, True),
    (33, 2, 3, 2, 9, 3, 2, 2, 1.0, True, False, False),
    (1, 1, 1, 1, 1, 3, 3, 2**40, 0.01, False, False, False),
    (0, 3, 4, 5, 20, 3, 3, 2, 0.01, True, True, True),
    (2, 3, 4, 5, 0, 3, 3, 2, 0.01, True, True, True),
]


def block_tensors(block, dtype, seed=0):
    batch, c, hidden, o, length, k1, k2, _, _, biases, skip, skip_bias = block
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (batch, c, length), "weight1": (hidden, c, k1), "weight2": (o, hidden, k2)}
    if biases:
        shapes |= {"bias1": (hidden,), "bias2": (o,)}
    if skip:
        shapes["skip_weight"] = (o, c, 1)
    if skip_bias:
        shapes["skip_bias"] = (o,)
    tensors = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    for name in ("weight1", "weight2"):
        tensors[name] /= tensors[name][0].numel() ** 0.5
    grad = torch.randn(batch, o, length, generator=g, dtype=torch.float64)
    return {name: t.to(dtype) for name, t in tensors.items()}, grad.to(dtype)


def block_of(one):
    """The block as its equation, of single convolutions computed by ``one``."""

    def block(
        x, weight1, weight2, *, dilation, negative_slope, bias1=None, bias2=None, skip_weight=None, skip_bias=None
    ):
        activated = {"dilation": dilation, "activation": "leaky_relu", "negative_slope": negative_slope}
        h = one(one(x, weight1, bias1, **activated), weight2, bias2, **activated)
        if skip_weight is None:
            return h + x
        return h + one(x, skip_weight, skip_bias, dilation=1, activation=None, negative_slope=0.0)

    return block


def run_block(tensors, grad, **options):
    def call(x, weight1, weight2, bias1=None, bias2=None, **rest):
        return causal_conv_block(x, weight1, bias1, weight2, bias2, **rest)

    return results(call, tensors, grad, **options)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "-".join(map(str, block)))
def test_block_float64(block):
    tensors, grad = block_tensors(block, torch.float64)
    options = {"dilation": block[7], "negative_slope": block[8]}
    expected = results(block_of(definition), tensors, grad, **options)
    for runner in RUNNERS:
        assert_agree(run_block(tensors, grad, backend=runner.use(), **options), expected, runner)
        with torch.no_grad():
            y = run_block_without_graph(tensors, backend=runner.backend, **options)
        assert_agree({"y": y}, {"y": expected["y"]}, runner)


def run_block_without_graph(tensors, **options):
    bias1, bias2 = tensors.get("bias1"), tensors.get("bias2")
    skip = {name: tensors.get(name) for name in ("skip_weight", "skip_bias")}
    return causal_conv_block(tensors["x"], tensors["weight1"], bias1, tensors["weight2"], bias2, **skip, **options)


def distance_from_kink(tensors, dilation, negative_slope):
    """The smallest absolute value of what the two activations of a block are applied to."""
    linear = {"dilation": dilation, "activation": None, "negative_slope": negative_slope}
    z1 = plain(tensors["x"], tensors["weight1"], tensors.get("bias1"), **linear)
    h1 = torch.nn.functional.leaky_relu(z1, negative_slope)
    z2 = plain(h1, tensors["weight2"], tensors.get("bias2"), **linear)
    return min(z1.abs().min(), z2.abs().min())


@pytest.mark.parametrize("runner", COMPILED, ids=str)
def test_block_float32_against_plain_pytorch(runner):
    """The rule of :func:`test_float32_against_plain_pytorch`, for draws where nothing is within 2e-6 of a kink."""
    for block in BLOCKS:
        if block[0] == 0 or block[4] == 0:
            continue
        options = {"dilation": block[7], "negative_slope": block[8]}
        expected, ours, theirs = [], [], []
        for seed in range(20):
            tensors, grad = block_tensors(block, torch.float32, seed)
            exact = {name: t.double() for name, t in tensors.items()}
            if distance_from_kink(exact, **options) < 2e-6:
                continue
            expected.append(results(block_of(plain), exact, grad.double(), **options))
            theirs.append(results(block_of(plain), tensors, grad, **options))
            ours.append(run_block(tensors, grad, backend=runner.use(), **options))
            if len(ours) == len(SEEDS):
                break
        assert len(ours) == len(SEEDS)
        for name in expected[0]:
            our_error, their_error = (
                pooled_error([r[name] for r in run], [e[name] for e in expected]) for run in (ours, theirs)
            )
            assert our_error <= (2 if name == "y" else 3) * their_error + 2 * EPS, (block, name)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize(
    "block",
    [(2, 3, 2, 3, 6, 3, 3, 2, 0.01, True, False, False), (1, 2, 3, 4, 5, 2, 3, 1, 2.5, True, True, True)],
    ids=["identity", "skip"],
)
def test_block_gradcheck(runner, block):
    tensors, _ = block_tensors(block, torch.float64)
    backend = runner.use()

    def function(*args):
        named = dict(zip(tensors, args, strict=True))
        return run_block_without_graph(named, dilation=block[7], negative_slope=block[8], backend=backend)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize("needed", range(0, 128, 5))
def test_any_subset_of_a_blocks_gradients(needed):
    block = (2, 13, 9, 5, 101, 2, 5, 7, 0.01, True, True, True)
    tensors, grad = block_tensors(block, torch.float64)
    everything = run_block(tensors, grad, dilation=7, backend="cpu")
    leaves = {name: t.detach().requires_grad_(bool(needed >> i & 1)) for i, (name, t) in enumerate(tensors.items())}
    y = run_block_without_graph(leaves, dilation=7, backend="cpu")
    assert y.requires_grad == (needed > 0)
    if needed:
        y.backward(grad)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad
        assert leaf.grad is None or torch.equal(leaf.grad, everything[name]), name


STACKS = [  # batch, length, widths, kernel size, dilations, biases
    (3, 50, (3, 8, 8, 5), 3, (1, 2, 4), True),
    (2, 385, (1, 40, 40, 160), 3, (1, 64, 512), True),
    (1, 1, (2, 2), 3, (2**40,), False),
    (5, 17, (4, 4, 3, 3), 2, (1, 1, 3), False),
    (33, 9, (2, 41, 2), 5, (2, 1), True),
    (0, 20, (2, 3, 3), 3, (1, 2), True),
]


def stack_tensors(stack, dtype, seed=0):
    """x by its name, then the weights in their order."""
    batch, length, widths, kernel_size, _, biases = stack
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (batch, widths[0], length)}
    for i, (c, o) in enumerate(itertools.pairwise(widths)):
        shapes |= {f"{i}.weight1": (o, c, kernel_size), f"{i}.weight2": (o, o, kernel_size)}
        if biases:
            shapes |= {f"{i}.bias1": (o,), f"{i}.bias2": (o,)}
        if c != o:
            shapes |= {f"{i}.skip_weight": (o, c, 1), f"{i}.skip_bias": (o,)}
    tensors = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    for name, t in tensors.items():
        if "weight" in name:
            t /= t[0].numel() ** 0.5
    return {name: t.to(dtype) for name, t in tensors.items()}


def blocks_of(weights):
    count = 1 + max(int(name.partition(".")[0]) for name in weights)
    return [BlockWeights(*(weights.get(f"{i}.{field}") for field in BlockWeights._fields)) for i in range(count)]


def run_stack(dilations, pool, **options):
    def function(x, **weights):
        return causal_conv_stack(x, blocks_of(weights), dilations, pool=pool, **options)

    return function


def stack_definition(dilations, pool, negative_slope=0.01):
    def function(x, **weights):
        for block, dilation in zip(blocks_of(weights), dilations, strict=True):
            options = {"dilation": dilation, "negative_slope": negative_slope}
            x = block_of(definition)(x, **block._asdict(), **options)
        return x.amax(2) if pool else x

    return function


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: "-".join(map(str, stack)))
def test_stack_float64(stack, pool):
    tensors, dilations = stack_tensors(stack, torch.float64), stack[4]
    shape = (stack[0], stack[2][-1]) if pool else (stack[0], stack[2][-1], stack[1])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for slope in (0.01, 1.0):
        expected = results(stack_definition(dilations, pool, slope), tensors, grad)
        assert expected["y"].shape == shape
        for runner in RUNNERS:
            function = run_stack(dilations, pool, negative_slope=slope, backend=runner.use())
            actual = results(function, tensors, grad)
            assert_agree(actual, expected, runner)
            assert torch.equal(function(**tensors), actual["y"])


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("needed", range(1, 2**14, 331))
def test_any_subset_of_a_stacks_gradients(needed, pool):
    stack = (5, 17, (3, 4, 4), 2, (1, 3), True)
    tensors = stack_tensors(stack, torch.float64)
    function = run_stack(stack[4], pool, backend="cpu")
    grad = torch.randn(function(**tensors).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    everything = results(function, tensors, grad)
    leaves = {name: t.detach().requires_grad_(bool(needed >> i & 1)) for i, (name, t) in enumerate(tensors.items())}
    y = function(**leaves)
    assert y.requires_grad == any(t.requires_grad for t in leaves.values())
    if y.requires_grad:
        y.backward(grad)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad
        assert leaf.grad is None or torch.equal(leaf.grad, everything[name]), name


def test_pool_takes_the_first_of_equal_maxima(capability):
    """Integers, so that maxima are equal in every backend: the gradient goes where that of ``max(dim)`` goes."""
    g = torch.Generator().manual_seed(0)
    for length, dilation in ((100, 2), (1000, 16), (50, 60)):
        x = torch.randint(-1, 2, (4, 3, length), generator=g).double().requires_grad_()
        weights = [torch.randint(-1, 2, s, generator=g).double().requires_grad_() for s in ((3, 3, 2), (3, 3, 2))]
        block = BlockWeights(weights[0], None, weights[1], None)
        grads = []
        for backend in ("cpu", "reference"):
            y = causal_conv_stack(x, [block], [dilation], negative_slope=0.0, pool=True, backend=backend)
            whole = causal_conv_stack(x, [block], [dilation], negative_slope=0.0, backend=backend)
            assert ((whole == y[..., None]).sum(2) > 1).any()
            assert torch.equal(y, whole.amax(2))
            grads.append(torch.autograd.grad(y.square().sum(), [x, *weights]))
        assert all(map(torch.equal, *grads))


def test_pool_of_nan_and_infinity(capability):
    stack = (4, 700, (2, 9, 9), 3, (1, 130), True)
    tensors = stack_tensors(stack, torch.float32)
    function = run_stack(stack[4], True, backend="cpu")
    expected = function(**tensors)
    tensors["x"][1, 0, 123] = float("nan")
    y = function(**tensors)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2, 3]], expected[[0, 2, 3]])
    lowest = {name: torch.zeros_like(t) for name, t in tensors.items()}
    lowest["x"] += 1
    lowest["1.bias2"] -= float("inf")
    assert (function(**lowest) == -float("inf")).all()


def test_self_check_passes(capability):
    """What ``pykernels info --check`` runs."""
    checked = 0
    for operator in OPERATORS.values():
        for name, implementation in operator.implementations.items():
            if implementation.available().ok:
                check = operator.check(name)
                assert check.errors.keys() == check.allowed.keys()
                assert check.passed, (operator.name, name, check.errors)
                checked += 1
    assert checked >= 6


def test_self_check_sees_a_wrong_value_and_a_wrong_gradient():
    x = (torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64),)
    assert compare(torch.sin, torch.sin, x, "cpu").passed
    assert not compare(torch.sin, lambda t: torch.sin(t) * (1 + 1e-4), x, "cpu").passed
    assert not compare(torch.sin, lambda t: torch.sin(t).detach() + 0 * t, x, "cpu").passed
    assert not compare(torch.sin, lambda t: torch.sin(t) * float("nan"), x, "cpu").passed

    class SecondIsNaN(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(b)
            return a * b

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0], grad * float("nan")

    two = (x[0].detach(), x[0].detach() + 1)
    assert compare(torch.mul, torch.mul, two, "cpu").passed
    assert not compare(torch.mul, SecondIsNaN.apply, two, "cpu").passed
