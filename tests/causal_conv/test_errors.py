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


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


PACKED = {"x": X[:1], "residual": RESIDUAL[:1]}


def test_the_arguments_that_the_errors_are_about_are_otherwise_right():
    assert causal_conv1d(X, WEIGHT, BIAS, residual=RESIDUAL, dilation=2, activation="tanh").shape == (2, 4, 11)
    state, lengths = torch.zeros(2, 3, 2), torch.tensor([11, 3])
    assert causal_conv1d(X, WEIGHT, initial_state=state, lengths=lengths, validate=True).shape == (2, 4, 11)
    packed = {**PACKED, "cu_seqlens": offsets(0, 5, 11), "initial_state": state}
    assert causal_conv1d(weight=WEIGHT, groups=1, **packed).shape == (1, 4, 11)
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
        ({"groups": 2}, ValueError, "^groups must divide the 3 channels of x and the 4 of weight, got 2"),
        ({"groups": 3}, ValueError, "^groups must divide the 3 channels of x and the 4 of weight, got 3"),
        ({"groups": 2, "x": torch.randn(2, 4, 11)}, ValueError, "^weight.*takes 3 channels in each of 2 .* has 4"),
        ({"groups": 0}, ValueError, "^groups must be at least 1.*got 0"),
        ({"groups": -1}, ValueError, "^groups must be at least 1"),
        ({"groups": True}, TypeError, "^groups must be an integer, got bool"),
        ({"groups": 1.0}, TypeError, "^groups must be an integer, got float"),
        ({"groups": None}, TypeError, "^groups must be an integer, got NoneType"),
        ({"residual_before_activation": "yes"}, TypeError, "^residual_before_activation must be a bool, got str"),
        ({"residual_before_activation": 1}, TypeError, "^residual_before_activation must be a bool, got int"),
        ({"initial_state": 0}, TypeError, "^initial_state must be a tensor or None, got int"),
        ({"initial_state": torch.zeros(2, 3, 3)}, ValueError, r"^initial_state must .*\(2, 3, 2\), got \(2, 3, 3\)"),
        ({"initial_state": torch.zeros(1, 3, 2)}, ValueError, "^initial_state must have shape"),
        ({"initial_state": torch.zeros(2, 3, 2), "dilation": 2}, ValueError, r"^initial_state must .*\(2, 3, 4\)"),
        ({"initial_state": torch.zeros(2, 3, 2).double()}, TypeError, "^initial_state must have the dtype of x"),
        ({"initial_state": torch.zeros(2, 3, 2, device="meta")}, ValueError, "^initial_state must be on the device"),
        ({"cu_seqlens": [0, 11]}, TypeError, "^cu_seqlens must be a tensor or None, got list"),
        ({"cu_seqlens": offsets(0, 11)}, ValueError, r"^x must have shape \(1, .* with cu_seqlens, got \(2, 3, 11\)"),
        ({**PACKED, "cu_seqlens": offsets(0, 11).long()}, TypeError, "^cu_seqlens must have .*int32, got .*int64"),
        ({**PACKED, "cu_seqlens": offsets(0, 11).float()}, TypeError, "^cu_seqlens must have dtype"),
        ({**PACKED, "cu_seqlens": offsets(0, 11)[None]}, ValueError, r"^cu_seqlens must have shape .* got \(1, 2\)"),
        ({**PACKED, "cu_seqlens": offsets()}, ValueError, r"^cu_seqlens must have shape .* got \(0,\)"),
        ({**PACKED, "cu_seqlens": offsets(0, 11).to("meta")}, ValueError, "^cu_seqlens must be on the device of x"),
        ({**PACKED, "cu_seqlens": offsets(0)}, ValueError, "^cu_seqlens must hold .* one sequence.* 11 samples"),
        ({**PACKED, "cu_seqlens": offsets(0), "validate": False}, ValueError, "^cu_seqlens must hold the end"),
        ({**PACKED, "cu_seqlens": offsets(1, 11)}, ValueError, "^cu_seqlens must start with 0"),
        ({**PACKED, "cu_seqlens": offsets(0, 12)}, ValueError, r"^cu_seqlens must start with 0.*\[0, 12\]"),
        ({**PACKED, "cu_seqlens": offsets(0, 10)}, ValueError, "^cu_seqlens must start with 0"),
        ({**PACKED, "cu_seqlens": offsets(0, 5, 4, 11)}, ValueError, r"^cu_seqlens must .*\[0, 5, 4, 11\]"),
        ({**PACKED, "cu_seqlens": offsets(*[0] * 99)}, ValueError, r"got \[0, 0, 0, 0, 0, ..., 0\]$"),
        ({**PACKED, "cu_seqlens": offsets(0, 11), "lengths": offsets(11)}, ValueError, "^lengths cannot be combined"),
        ({**PACKED, "cu_seqlens": offsets(0, 11), "initial_state": torch.zeros(2, 3, 2)}, ValueError, "^initial_state"),
        ({**PACKED, "cu_seqlens": offsets(0, 3, 11), "initial_state": torch.zeros(1, 3, 2)}, ValueError,
         r"^initial_state must have shape \(2, 3, 2\), got \(1, 3, 2\)"),
        ({"lengths": [11, 11]}, TypeError, "^lengths must be a tensor or None, got list"),
        ({"lengths": torch.tensor([11.0, 11.0])}, TypeError, "^lengths must have .*int64, got torch.float32"),
        ({"lengths": torch.tensor([11, 11]).short()}, TypeError, "^lengths must have dtype"),
        ({"lengths": torch.tensor([11])}, ValueError, r"^lengths must have shape \(2,\).* got \(1,\)"),
        ({"lengths": torch.tensor(11)}, ValueError, "^lengths must have shape"),
        ({"lengths": torch.tensor([[11, 11]])}, ValueError, "^lengths must have shape"),
        ({"lengths": torch.tensor([11, 11]).to("meta")}, ValueError, "^lengths must be on the device of x"),
        ({"lengths": torch.tensor([12, 11])}, ValueError, "^lengths must be between 0 and 11, got 12"),
        ({"lengths": torch.tensor([3, -1])}, ValueError, "^lengths must be between 0 and 11, got -1"),
        ({"lengths": torch.tensor([3, -1]), "validate": True}, ValueError, "^lengths must be between"),
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
            with pytest.raises(ValueError, match=f"^backend must be one of 'cpu', 'triton', 'reference' or None, got '{name}'"):
                causal_conv1d(X, WEIGHT, backend=name)
        with pytest.raises(ValueError, match=r"^backend must be one of"), pykernels.backend(name):
            pytest.fail("the block must not run")
    with pytest.raises(ValueError, match=r"^backend must be one of"):
        weight_norm([WEIGHT], [BIAS], backend="abacus")
    with pytest.raises(ValueError, match=r"^backend must be one of"):
        causal_conv_block(X, *BLOCK, backend="abacus")


def test_backend_by_name_that_cannot_run():
    x, weight, bias = (t.to(torch.float8_e5m2) for t in (X, WEIGHT, BIAS))
    block = [t.to(torch.float8_e5m2) for t in BLOCK]
    message = r"backend 'cpu' cannot run \w+: dtype torch.float8_e5m2 is not supported, only float32, float64, float16"
    for call in (
        lambda **b: causal_conv1d(x, weight, **b),
        lambda **b: causal_conv_block(x, *block, **b),
        lambda **b: weight_norm([weight], [bias], **b),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(backend="cpu")
        with pykernels.backend("cpu"), pytest.raises(RuntimeError, match=message):
            call()
    meta = X.to("meta"), WEIGHT.to("meta")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run causal_conv1d: x is on meta"):
        causal_conv1d(*meta, backend="cpu")
    with pykernels.backend("cpu"), warnings.catch_warnings():
        warnings.simplefilter("error")
        causal_conv1d(*meta, backend="reference")


def test_automatic_fallback_warns_once_for_each_reason(monkeypatch):
    monkeypatch.setattr(backends._state, "requested", None)
    monkeypatch.setattr(backends._state, "warned", set())
    meta = X.to("meta"), WEIGHT.to("meta"), BIAS.to("meta")
    with pytest.warns(RuntimeWarning, match="causal_conv1d runs on the slow 'reference' backend.*meta") as seen:
        y = causal_conv1d(*meta, dilation=2, activation="tanh")
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert y.is_meta
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        causal_conv1d(*meta)
        with pykernels.backend("reference"):
            causal_conv_block(X.to("meta"), *(t.to("meta") for t in BLOCK))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            causal_conv1d(X.to(dtype), WEIGHT.to(dtype))
    with pytest.warns(RuntimeWarning, match="causal_conv_stack.*meta"):
        causal_conv_block(X.to("meta"), *(t.to("meta") for t in BLOCK))


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
