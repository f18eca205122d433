"""Wrong arguments, and the choice of the backend."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import Tensor

import pykernels
from pykernels import backends
from pykernels.backends import OPERATORS
from pykernels.ops import BlockWeights, causal_conv1d, causal_conv_block, causal_conv_stack, weight_norm

X, WEIGHT, BIAS, RESIDUAL = torch.randn(2, 3, 11), torch.randn(4, 3, 3), torch.randn(4), torch.randn(2, 4, 11)
NAN = float("nan")


def test_the_arguments_that_the_errors_are_about_are_otherwise_right():
    assert causal_conv1d(X, WEIGHT, BIAS, residual=RESIDUAL, dilation=2, activation="tanh").shape == (2, 4, 11)
    assert causal_conv_block(X, *BLOCK).shape == (2, 6, 11)
    assert weight_norm([WEIGHT], [BIAS])[0].shape == WEIGHT.shape


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "^x must be a tensor, got NoneType"),
        ({"x": [[[1.0]]]}, TypeError, "^x must be a tensor, got list"),
        ({"x": X[0]}, ValueError, r"^x must have shape .*\(3, 11\)"),
        ({"x": X[None]}, ValueError, "^x must have shape"),
        ({"x": X.int()}, TypeError, r"^x must have a floating-point dtype, got torch\.int32"),
        ({"x": X.bool()}, TypeError, "^x must have a floating-point dtype"),
        ({"x": X.to(torch.complex64)}, TypeError, "^x must have a floating-point dtype"),
        ({"x": X[:, :2]}, ValueError, "^weight.*takes 3 channels.*has 2"),
        ({"x": X[:, :0]}, ValueError, "^weight.*takes 3 channels.*has 0"),
        ({"x": X.double()}, TypeError, r"^weight must have the dtype of x, torch\.float64, got torch\.float32"),
        ({"x": X.to("meta")}, ValueError, "^weight must be on the device of x, meta, got cpu"),
        ({"weight": WEIGHT.numpy()}, TypeError, "^weight must be a tensor, got ndarray"),
        ({"weight": WEIGHT[0]}, ValueError, r"^weight must have shape \(out_channels.*\(3, 3\)"),
        ({"weight": WEIGHT[:0]}, ValueError, "^weight must have shape"),
        ({"weight": WEIGHT[:, :, :0]}, ValueError, "^weight must have shape"),
        ({"weight": WEIGHT[:, :1]}, ValueError, "^weight.*takes 1 channels.*has 3"),
        ({"weight": WEIGHT.double()}, TypeError, "^weight must have the dtype of x"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "^weight must be on the device of x"),
        ({"bias": 0.5}, TypeError, "^bias must be a tensor or None, got float"),
        ({"bias": BIAS[:3]}, ValueError, r"^bias must have shape \(4,\), got \(3,\)"),
        ({"bias": BIAS[:1]}, ValueError, "^bias must have shape"),
        ({"bias": BIAS[None]}, ValueError, "^bias must have shape"),
        ({"bias": BIAS[0]}, ValueError, "^bias must have shape"),
        ({"bias": BIAS.half()}, TypeError, "^bias must have the dtype of x"),
        ({"bias": BIAS.to("meta")}, ValueError, "^bias must be on the device of x"),
        ({"residual": True}, TypeError, "^residual must be a tensor or None, got bool"),
        ({"residual": X}, ValueError, r"^residual must have .*\(2, 4, 11\), got \(2, 3, 11\)"),
        ({"residual": RESIDUAL[:1]}, ValueError, "^residual must have shape"),
        ({"residual": RESIDUAL[:, :, :1]}, ValueError, "^residual must have shape"),
        ({"residual": RESIDUAL.double()}, TypeError, "^residual must have the dtype of x"),
        ({"residual": RESIDUAL.to("meta")}, ValueError, "^residual must be on the device of x"),
        ({"dilation": 0}, ValueError, "^dilation must be at least 1.*got 0"),
        ({"dilation": -1}, ValueError, "^dilation must be at least 1"),
        ({"dilation": 2**62}, ValueError, r"^dilation must be .* below 2\*\*62"),
        ({"dilation": 10**30}, ValueError, "^dilation must be"),
        ({"dilation": True}, TypeError, "^dilation must be an integer, got bool"),
        ({"dilation": 1.5}, TypeError, "^dilation must be an integer, got float"),
        ({"dilation": 2.0}, TypeError, "^dilation must be an integer, got float"),
        ({"dilation": (2,)}, TypeError, "^dilation must be an integer, got tuple"),
        ({"dilation": None}, TypeError, "^dilation must be an integer, got NoneType"),
        ({"activation": "elu"}, ValueError, "^activation must .* 'leaky_relu', 'tanh', 'silu', 'gelu', got 'elu'"),
        ({"activation": "ReLU"}, ValueError, "^activation must be"),
        ({"activation": torch.relu}, ValueError, "^activation must be"),
        ({"activation": "leaky_relu", "negative_slope": -0.1}, ValueError, "^negative_slope must .* 0, got -0.1"),
        ({"activation": "leaky_relu", "negative_slope": NAN}, ValueError, "^negative_slope must .* 0, got nan"),
        ({"negative_slope": -1}, ValueError, "^negative_slope must be at least 0"),
    ],
)  # fmt: skip
def test_convolution(change, error, message, backend):
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS, "residual": RESIDUAL, **change, "backend": backend}
    with pytest.raises(error, match=message):
        causal_conv1d(**arguments)


BLOCK = BlockWeights(
    torch.randn(5, 3, 3), torch.randn(5), torch.randn(6, 5, 2), torch.randn(6), torch.randn(6, 3, 1), torch.randn(6)
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, "^x must have shape"),
        ({"x": X.double()}, TypeError, "^weight1 must have the dtype of x"),
        ({"x": X.long()}, TypeError, "^x must have a floating-point dtype"),
        ({"weight1": torch.randn(5, 2, 3)}, ValueError, "^weight1.*takes 2 channels.*has 3"),
        ({"weight1": None}, TypeError, "^weight1 must be a tensor"),
        ({"bias1": torch.randn(6)}, ValueError, r"^bias1 must have shape \(5,\), got \(6,\)"),
        ({"weight2": torch.randn(6, 4, 3)}, ValueError, "^weight2.*takes 4 channels.*has 5"),
        ({"weight2": torch.randn(6, 5)}, ValueError, "^weight2 must have shape"),
        ({"bias2": torch.randn(6, 1)}, ValueError, "^bias2 must have shape"),
        ({"bias2": torch.randn(6).double()}, TypeError, "^bias2 must have the dtype"),
        ({"skip_weight": None}, ValueError, "^skip_bias needs a skip_weight"),
        ({"skip_weight": None, "skip_bias": None}, ValueError, "^skip_weight is needed"),
        ({"skip_weight": torch.randn(6, 3, 2)}, ValueError, r"^skip_weight must have shape \(6, 3, 1\)"),
        ({"skip_weight": torch.randn(5, 3, 1)}, ValueError, r"^skip_weight must have shape \(6, 3, 1\)"),
        ({"skip_weight": torch.randn(6, 2, 1)}, ValueError, "^skip_weight.*takes 2 channels"),
        ({"skip_bias": torch.randn(5)}, ValueError, "^skip_bias must have shape"),
        ({"skip_bias": torch.randn(6, device="meta")}, ValueError, "^skip_bias must be on the device of x"),
        ({"dilation": 0}, ValueError, "^dilation must be at least 1"),
        ({"dilation": 1.0}, TypeError, "^dilation must be an integer"),
        ({"negative_slope": -0.5}, ValueError, "^negative_slope must be at least 0"),
    ],
)
def test_block_and_stack(change, error, message):
    with pytest.raises(error, match=message):
        causal_conv_block(**{"x": X, **BLOCK._asdict(), **change})
    options = {"dilation": 1, "negative_slope": 0.01, **change}
    block = BLOCK._replace(**{name: t for name, t in change.items() if name in BLOCK._fields})
    identity = BlockWeights(torch.randn(3, 3, 3), None, torch.randn(3, 3, 3), None)
    x: Tensor = options.get("x", X)
    if x.dtype == torch.float32:
        with pytest.raises(error, match=message):
            causal_conv_stack(x, [identity, block], [1, options["dilation"]], negative_slope=options["negative_slope"])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_stack_of_nothing_and_pool_of_nothing(backend):
    for blocks, dilations in (([], []), ([BLOCK], []), ([BLOCK], [1, 2]), ([], [1])):
        with pytest.raises(ValueError, match=r"blocks and dilations must be equally many, at least one"):
            causal_conv_stack(X, blocks, dilations, backend=backend)
    assert causal_conv_stack(X[:, :, :0], [BLOCK], [1], backend=backend).shape == (2, 6, 0)
    with pytest.raises(ValueError, match="empty series"):
        causal_conv_stack(X[:, :, :0], [BLOCK], [1], pool=True, backend=backend)
    assert causal_conv_stack(X[:0], [BLOCK], [1], pool=True, backend=backend).shape == (0, 6)


def test_unknown_backend():
    for name in ("cuda!", "CPU", ""):
        if name:
            with pytest.raises(ValueError, match=f"^backend must be one of 'cpu', 'reference' or None, got '{name}'"):
                causal_conv1d(X, WEIGHT, backend=name)
        with pytest.raises(ValueError, match=r"^backend must be one of"), pykernels.backend(name):
            pytest.fail("the block must not run")
    with pytest.raises(ValueError, match=r"^backend must be one of"):
        weight_norm([WEIGHT], [BIAS], backend="abacus")
    with pytest.raises(ValueError, match=r"^backend must be one of"):
        causal_conv_block(X, *BLOCK, backend="abacus")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_backend_by_name_that_cannot_run(dtype):
    x, weight, bias = (t.to(dtype) for t in (X, WEIGHT, BIAS))
    block = [t.to(dtype) for t in BLOCK]
    message = rf"backend 'cpu' cannot run \w+: dtype {dtype} is not supported"
    for call in (
        lambda **b: causal_conv1d(x, weight, **b),
        lambda **b: causal_conv_block(x, *block, **b),
        lambda **b: weight_norm([weight], [bias], **b),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(backend="cpu")
        with pykernels.backend("cpu"), pytest.raises(RuntimeError, match=message):
            call()
        with pykernels.backend("cpu"), warnings.catch_warnings():
            warnings.simplefilter("error")
            call(backend="reference")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run causal_conv1d: x is on meta"):
        causal_conv1d(X.to("meta"), WEIGHT.to("meta"), backend="cpu")


def test_automatic_fallback_warns_once_for_each_reason(monkeypatch):
    monkeypatch.setattr(backends._state, "requested", None)
    monkeypatch.setattr(backends._state, "warned", set())
    x, weight = X.half(), WEIGHT.half()
    with pytest.warns(RuntimeWarning, match="causal_conv1d runs on the slow 'reference' backend.*float16") as seen:
        y = causal_conv1d(x, weight, BIAS.half(), dilation=2, activation="tanh")
    assert len(seen) == 1
    assert seen[0].filename == __file__
    expected = causal_conv1d(X, WEIGHT, BIAS, dilation=2, activation="tanh")
    torch.testing.assert_close(y.float(), expected, atol=1e-2, rtol=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        causal_conv1d(x, weight)
        with pykernels.backend("reference"):
            causal_conv1d(X.bfloat16(), WEIGHT.bfloat16())
        causal_conv1d(X, WEIGHT)
    with pytest.warns(RuntimeWarning, match="bfloat16"):
        causal_conv1d(X.bfloat16(), WEIGHT.bfloat16())
    with pytest.warns(RuntimeWarning, match="meta"):
        assert causal_conv1d(X.to("meta"), WEIGHT.to("meta")).is_meta


def test_choice_of_the_backend(monkeypatch):
    """The argument goes before the context, the inner context before the outer one; an exception restores it."""
    monkeypatch.setattr(backends._state, "requested", None)
    ran = []
    operator = OPERATORS["causal_conv1d"]
    for name, implementation in operator.implementations.items():

        def run(*args, name=name, implementation=implementation):
            ran.append(name)
            return implementation.run(*args)

        replacement = backends.Implementation(run, implementation.can_run, implementation.available)
        monkeypatch.setitem(operator.implementations, name, replacement)

    def chosen(**options):
        causal_conv1d(X, WEIGHT, **options)
        return ran.pop()

    assert chosen() == "cpu"
    assert chosen(backend="reference") == "reference"
    with pykernels.backend("reference"):
        assert chosen() == "reference"
        assert chosen(backend="cpu") == "cpu"
        with pykernels.backend("cpu"):
            assert chosen() == "cpu"
            with contextlib.suppress(KeyError), pykernels.backend(None):
                assert chosen() == "cpu"
                raise KeyError
            assert backends._state.requested == "cpu"
        assert chosen() == "reference"
    assert chosen() == "cpu"


def test_table_of_backends():
    table = pykernels.available_backends()
    assert table.keys() == OPERATORS.keys() >= {"causal_conv1d", "causal_conv_stack", "weight_norm"}
    for answers in table.values():
        assert answers["reference"].ok
        assert all(answer.ok or answer.reason for answer in answers.values())
