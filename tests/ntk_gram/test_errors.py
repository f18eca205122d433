"""Wrong arguments of the kernels."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import pykernels
from pykernels import NTK, Activation, ntk_diag, ntk_gram, ntk_matvec, ntk_witness

X, Z, V, A = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5, 2), torch.randn(5)
NAN, INF = math.nan, math.inf
nn = torch.nn


def test_the_arguments_that_the_errors_are_about_are_otherwise_right():
    assert ntk_gram(X, Z).shape == (4, 5)
    assert ntk_matvec(X, Z, V).shape == (4, 2)
    assert ntk_witness(X, Z, A)[1].shape == (4, 3)
    assert ntk_diag(X).shape == (4,)


#: Of all functions of two sets.
COMMON = [
    ({"x": None}, TypeError, "^x must be a tensor, got NoneType"),
    ({"x": X.numpy()}, TypeError, "^x must be a tensor, got ndarray"),
    ({"x": X.int()}, TypeError, r"^x must have a floating dtype, got torch\.int32"),
    ({"x": X.to(torch.complex64)}, TypeError, r"^x must have a floating dtype, got torch\.complex64"),
    ({"x": X.to(torch.float8_e5m2)}, TypeError, r"^x must have a floating dtype of 16 bits or more, got torch\.float8"),
    ({"x": X.to_sparse()}, TypeError, r"^x must be a dense tensor, got torch\.sparse_coo"),
    ({"x": X[0]}, ValueError, r"^x must have shape \(\.\.\., points, d\), got \(3,\)"),
    ({"x": torch.tensor(1.0)}, ValueError, r"^x must have shape .* got \(\)"),
    ({"z": Z.numpy()}, TypeError, "^[yz] must be a tensor, got ndarray"),
    ({"z": Z.bool()}, TypeError, r"^[yz] must have a floating dtype, got torch\.bool"),
    ({"z": Z[:, :2]}, ValueError, r"^[yz] must have the leading dimensions and the d of x, \(4, 3\), got \(5, 2\)"),
    ({"z": Z[None]}, ValueError, r"^[yz] must have the leading dimensions .* got \(1, 5, 3\)"),
    ({"z": Z[0]}, ValueError, r"^[yz] must have shape \(\.\.\., points, d\), got \(3,\)"),
    ({"z": Z.to("meta")}, ValueError, "^[yz] must be on the device of x, cpu, got meta"),
    ({"kind": "conv"}, ValueError, "^kind must be one of 'nngp', 'ntk'.*got 'conv'"),
    ({"kind": None}, ValueError, "^kind must be one of"),
    ({"precision": "float8"}, ValueError, "^precision must be one of 'float32', 'tf32', 'bf16', got 'float8'"),
    ({"backend": "abacus"}, ValueError, "^backend must be one of 'cpu', .*'reference' or None, got 'abacus'"),
    ({"activation": "swish"}, ValueError, "^activation must be one of identity, relu, .* got 'swish'"),
    ({"activation": "relu+swish"}, ValueError, r"^activation must be one of .* got 'relu\+swish'"),
    ({"activation": ["relu", None]}, TypeError, "^an activation must be a name or an Activation, got NoneType"),
    ({"activation": 3}, TypeError, "^activation must be a name, an Activation or a sequence of them, got 3"),
    ({"weight_std": -1.0}, ValueError, "^weight_std must be at least 0 and finite, got -1.0"),
    ({"weight_std": NAN}, ValueError, "^weight_std must be at least 0 and finite, got nan"),
    ({"weight_std": INF}, ValueError, "^weight_std must be at least 0 and finite, got inf"),
    ({"weight_std": "1"}, TypeError, "^weight_std must be a number"),
    ({"weight_std": True}, TypeError, "^weight_std must be a number, a sequence of numbers or a tensor, got True"),
    ({"weight_std": None}, TypeError, "^weight_std must be a number"),
    ({"weight_std": [1.0]}, ValueError, r"^weight_std must be one number or 2, .* got shape \(1,\)"),
    ({"weight_std": torch.tensor([1.0, -1.0])}, ValueError, "^weight_std must be at least 0 and finite, got"),
    ({"weight_std": torch.ones(2, dtype=torch.cfloat)}, TypeError, r"^weight_std must be real numbers, got torch\.com"),
    ({"weight_std": torch.ones(3)}, ValueError, r"^weight_std must be one number or 2, .* got shape \(3,\)"),
    ({"bias_std": -0.1}, ValueError, "^bias_std must be at least 0 and finite, got -0.1"),
    ({"bias_std": [0.1, -0.1]}, ValueError, "^bias_std must be at least 0 and finite, got -0.1"),
    ({"bias_std": [0.1, 0.1, 0.1]}, ValueError, r"^bias_std must be one number or 2, .* got shape \(3,\)"),
]


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), COMMON)
def test_arguments(change, error, message, backend):
    given = {"x": X, "z": Z, "backend": backend} | change
    x, z = given.pop("x"), given.pop("z")
    for call in (
        lambda: ntk_gram(x, z, **given),
        lambda: ntk_matvec(x, z, V, **given),
        lambda: ntk_witness(x, z, A, **given),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("v", "error", "message"),
    [
        (None, TypeError, "^[va] must be a tensor, got NoneType"),
        (V.numpy(), TypeError, "^[va] must be a tensor, got ndarray"),
        (A.int(), TypeError, r"^[va] must have a floating dtype, got torch\.int32"),
        (A[:4], ValueError, r"^(v must have shape \(5,\) or \(5, p\)|a must have shape \(5,\)), .*, got \(4,\)"),
        (A.to_sparse(), TypeError, r"^[va] must be a dense tensor, got torch\.sparse_coo"),
        (torch.tensor(1.0), ValueError, r"^[va] must have shape \(5,\)"),
        (torch.ones(5, 2, 2), ValueError, r"^[va] must have shape \(5,\).* got \(5, 2, 2\)"),
        (A.to("meta"), ValueError, "^[va] must be on the device of x, cpu, got meta"),
    ],
)
def test_factors(v, error, message):
    for function in (ntk_matvec, ntk_witness):
        with pytest.raises(error, match=message):
            function(X, Z, v)


def test_one_kind_at_a_time():
    for function, factor in ((ntk_matvec, V), (ntk_witness, A)):
        with pytest.raises(ValueError, match=r"^kind must be one of 'nngp', 'ntk', got 'both'"):
            function(X, Z, factor, kind="both")
    with pytest.raises(ValueError, match=r"^a must have shape \(5,\), a number for each point of z, got \(5, 2\)"):
        ntk_witness(X, Z, V)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, "^depth must be at least 0, got -1"),
        ((1.5,), TypeError, "^depth must be an int, got float"),
        ((True,), TypeError, "^depth must be an int, got bool"),
        ((2, ["relu"]), ValueError, "^activation must be one for each of 2 hidden layers, got 1"),
        ((2, "relu", [1.0, 1.0]), ValueError, r"^weight_std must be one number or 3, .* got shape \(2,\)"),
        ((2, "relu", 1.0, [1.0, 1.0, 1.0]), ValueError, r"^bias_std must be one number or 2, .* got shape \(3,\)"),
        ((2, "relu", 1.0, [1.0], True), ValueError, r"^bias_std must be one number or 3, .* got shape \(1,\)"),
        ((2, "relu", -1.0), ValueError, "^weight_std must be at least 0 and finite, got -1.0"),
    ],
)
def test_networks(arguments, error, message):
    with pytest.raises(error, match=message):
        NTK(*arguments)


@pytest.mark.parametrize(
    ("arguments", "parameters", "error", "message"),
    [
        (("tanh",), {}, ValueError, "^activation must be one of identity, relu, .*, rbf, or a sum of them; got 'tanh'"),
        (("",), {}, ValueError, "^activation must be one of"),
        ((None,), {}, TypeError, "^an activation must be a name or an Activation, got NoneType"),
        (("relu",), {"slope": 0.1}, TypeError, "^relu takes amplitude; got 'slope'"),
        (("sigmoid_like",), {"amplitude": 1.0}, TypeError, "^sigmoid_like takes no parameters; got 'amplitude'"),
        (("relu+sin",), {"amplitude": 1.0}, TypeError, r"^parameters belong to one activation, got 'relu\+sin'"),
        (("sin",), {"phase": "0"}, TypeError, "^phase of sin must be a number, got str"),
        (("sin",), {"phase": NAN}, ValueError, "^phase of sin must be finite, got nan"),
        (("rbf",), {"gamma": -1.0}, ValueError, "^gamma of rbf must be finite and not negative, got -1.0"),
        (("erf",), {"frequency": True}, TypeError, "^frequency of erf must be a number, got bool"),
    ],
)
def test_activations(arguments, parameters, error, message):
    with pytest.raises(error, match=message):
        Activation(*arguments, **parameters)


def test_only_activations_add_to_activations():
    with pytest.raises(TypeError):
        Activation("relu") + "sin"


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([], ValueError, "^network must begin and end with an nn.Linear"),
        ([nn.ReLU()], ValueError, "^each activation must follow an nn.Linear, got ReLU"),
        ([nn.Linear(3, 3), nn.ReLU()], ValueError, "^network must begin and end with an nn.Linear"),
        ([nn.Linear(3, 3), nn.ReLU(), nn.ReLU(), nn.Linear(3, 1)], ValueError, "^each activation must follow an nn.L"),
        ([nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)], TypeError, r"^layers of the network must be .* got Tanh\(\)"),
        ([nn.Linear(3, 3), nn.GELU("tanh"), nn.Linear(3, 1)], TypeError, "^layers of the network must be .* got GELU"),
        ([nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 1)], TypeError, "^layers of the network must be .* got Dropout"),
        ([nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)], TypeError, "^layers of the network must be .* got Bat"),
        (
            [nn.Linear(3, 3), nn.Conv1d(3, 3, 3), nn.Linear(3, 1)],
            TypeError,
            "^layers of the network must be .* got Conv1d",
        ),
    ],
)
def test_networks_that_cannot_be_read(layers, error, message):
    with pytest.raises(error, match=message):
        NTK.from_sequential(nn.Sequential(*layers))


def test_only_stacks_are_read():
    with pytest.raises(TypeError, match=r"^network must be an nn\.Sequential, got Linear"):
        NTK.from_sequential(nn.Linear(3, 1))


@pytest.mark.parametrize("name", ["ntk_gram", "ntk_matvec", "ntk_witness"])
def test_backends(name):
    """A backend asked for by name runs or says why not; the automatic choice warns before it takes the reference."""
    calls = {
        "ntk_gram": lambda **o: ntk_gram(X, Z, **o),
        "ntk_matvec": lambda **o: ntk_matvec(X, Z, V, **o),
        "ntk_witness": lambda **o: ntk_witness(X, Z, A, **o)[1],
    }
    run = calls[name]
    assert pykernels.available_backends()[name]["cpu"].ok
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(), run(backend="cpu"), rtol=0, atol=0)
        with pykernels.backend("reference"):
            assert torch.equal(run(), run(backend="reference"))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="triton"):
            run(backend="triton")


def test_diagonals_take_the_options_of_their_neighbours():
    expected = ntk_diag(X)
    assert torch.equal(ntk_diag(X, precision="bf16", backend="cpu"), expected)
    assert torch.equal(NTK(1).diag(X, precision="bf16", backend="cpu"), expected)
    with pytest.raises(ValueError, match=r"^precision must be one of .* got 'float8'"):
        ntk_diag(X, precision="float8")
    with pytest.raises(ValueError, match=r"^backend must be one of .* got 'abacus'"):
        ntk_diag(X, backend="abacus")
