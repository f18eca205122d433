"""What mlp_odeint refuses, with which message, and how it reports states that are not finite."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from pykernels import backends, mlp_odeint
from pykernels.nn import MLPField
from pykernels.ops.latent_ode.mlp import trajectory
from pykernels.ops.latent_ode.tableaux import TABLEAUX

from .trajectories import RUNNERS

NAN, INF = float("nan"), float("inf")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def call(**changed):
    arguments = {
        "y0": zeros(4, 2),
        "t": torch.tensor([0.0, 1.0, 2.0]),
        "weights": [zeros(5, 2), zeros(2, 5)],
        "biases": [zeros(5), zeros(2)],
        "activation": "tanh",
        "method": "rk4",
    }
    return trajectory(**(arguments | changed))


GROUP, CORRECTION = torch.tensor([0, 1, 2, 0]), ([zeros(3, 2, 2)], [zeros(3, 2)])
MASK, STATES = zeros(3, 4, dtype=torch.bool), zeros(3, 4, 2)
WITH_CONTROL = [zeros(5, 4), zeros(2, 5)]
DOUBLE = torch.float64

REFUSED = [
    (TypeError, "y0 must be a tensor, got list", {"y0": [[0.0, 0.0]]}),
    (TypeError, "y0 must have a floating dtype, got torch.int64", {"y0": zeros(4, 2, dtype=torch.int64)}),
    (TypeError, "y0 must have a floating dtype, got torch.complex64", {"y0": zeros(4, 2, dtype=torch.complex64)}),
    (ValueError, "y0 must have shape (batch, dimensions)", {"y0": zeros(2)}),
    (ValueError, "y0 must have shape (batch, dimensions)", {"y0": zeros(4, 2, 1)}),
    (ValueError, "at least one dimension, got (4, 0)", {"y0": zeros(4, 0)}),
    (TypeError, "t must be a tensor, got list", {"t": [0.0, 1.0]}),
    (TypeError, "t must have a floating dtype, got torch.int64", {"t": torch.arange(3)}),
    (ValueError, "t must have shape (times,)", {"t": zeros(3, 1)}),
    (ValueError, "at least one time, got (0,)", {"t": zeros(0)}),
    (ValueError, "t must be on the device of y0, cpu, got meta", {"t": torch.zeros(3, device="meta")}),
    (ValueError, "t must be strictly increasing or strictly decreasing", {"t": torch.tensor([0.0, 2.0, 1.0])}),
    (ValueError, "t must be strictly increasing or strictly decreasing", {"t": torch.tensor([0.0, 0.0, 1.0])}),
    (ValueError, "and finite, got", {"t": torch.tensor([0.0, NAN, 1.0])}),
    (ValueError, "and finite, got", {"t": torch.tensor([0.0, 1.0, INF])}),
    (ValueError, "method must be one of 'euler', 'midpoint', ", {"method": "dopri5"}),
    (ValueError, "method must be one of ", {"method": None}),
    (ValueError, "activation must be one of 'relu', 'leaky_relu', ", {"activation": "gelu"}),
    (ValueError, "activation must be one of ", {"activation": None}),
    (ValueError, "activation must be one of ", {"activation": ["tanh", "tanh"]}),
    (ValueError, "input_map must be one of 'none', 'square', ", {"input_map": "exp"}),
    (ValueError, "substeps must be an int of at least 1, got 0", {"substeps": 0}),
    (ValueError, "substeps must be an int of at least 1, got 1.5", {"substeps": 1.5}),
    (ValueError, "substeps must be an int of at least 1, got True", {"substeps": True}),
    (ValueError, "substeps must be at most 2147483648, got 9223372036854775808", {"substeps": 2**63}),
    (TypeError, "weights must be a list of at least one tensor, got Tensor", {"weights": zeros(2, 2)}),
    (TypeError, "weights must be a list of at least one tensor, got an empty one", {"weights": [], "biases": []}),
    (TypeError, "weights[1] must be a tensor, got NoneType", {"weights": [zeros(5, 2), None]}),
    (TypeError, "weights[0] must have the dtype of y0", {"weights": [zeros(5, 2, dtype=DOUBLE), zeros(2, 5)]}),
    (ValueError, "weights[0] must be on the device", {"weights": [torch.zeros(5, 2, device="meta"), zeros(2, 5)]}),
    (ValueError, "weights[0] must map 2 inputs to 5 outputs", {"weights": [zeros(5, 3), zeros(2, 5)]}),
    (ValueError, "weights[1] must map 5 inputs to 2 outputs", {"weights": [zeros(5, 2), zeros(3, 5)]}),
    (ValueError, "weights[1] must map 5 inputs to 2 outputs", {"weights": [zeros(5, 2), zeros(2, 4)]}),
    (ValueError, "weights must all have shape (out, in), or (P, out, in)", {"weights": [zeros(5), zeros(2, 5)]}),
    (ValueError, "with the same P, got (2, 5) for layer 1", {"weights": [zeros(3, 5, 2), zeros(2, 5)], "biases": None}),
    (ValueError, "with the same P", {"weights": [zeros(3, 5, 2), zeros(2, 2, 5)], "biases": None}),
    (ValueError, "with the same P, got (0, 5, 2)", {"weights": [zeros(0, 5, 2), zeros(0, 2, 5)]}),
    (ValueError, "biases must be a list of 2 tensors, as many as weights, or None", {"biases": [zeros(5)]}),
    (ValueError, "biases must be a list of 2 tensors", {"biases": zeros(2, 5)}),
    (ValueError, "biases[1] must have shape (2,), got (3,)", {"biases": [zeros(5), zeros(3)]}),
    (TypeError, "biases[0] must have the dtype of y0", {"biases": [zeros(5, dtype=DOUBLE), zeros(2)]}),
    (TypeError, "biases[0] must be a tensor, got float", {"biases": [1.0, zeros(2)]}),
    (ValueError, "slope is for leaky_relu, elu and silu, got one with activation 'tanh'", {"slope": 0.1}),
    (TypeError, "slope must be a number with elu, got Tensor", {"activation": "elu", "slope": torch.tensor(1.0)}),
    (TypeError, "slope must be a number with elu, got bool", {"activation": "elu", "slope": True}),
    (ValueError, "slope must be at least 0 and finite, got -0.1", {"activation": "leaky_relu", "slope": -0.1}),
    (ValueError, "slope must be at least 0 and finite, got nan", {"activation": "elu", "slope": NAN}),
    (ValueError, "slope must have shape (), (1,) or (1, 1)", {"activation": "silu", "slope": zeros(2)}),
    (TypeError, "slope must have the dtype of y0", {"activation": "silu", "slope": zeros(1, dtype=DOUBLE)}),
    (TypeError, "slope must be a tensor, got str", {"activation": "silu", "slope": "1"}),
    (TypeError, "control must be a tensor, got list", {"control": [0.0]}),
    (ValueError, "control must have shape (T-1, B, C), here (2, 4, C), got (3, 4, 2)",
     {"control": zeros(3, 4, 2), "weights": WITH_CONTROL}),
    (ValueError, "control must have shape (T-1, B, C)", {"control": zeros(2, 3, 2), "weights": WITH_CONTROL}),
    (ValueError, "control must have shape (T-1, B, C)", {"control": zeros(2, 4), "weights": WITH_CONTROL}),
    (TypeError, "control must have the dtype of y0",
     {"control": zeros(2, 4, 2, dtype=DOUBLE), "weights": WITH_CONTROL}),
    (ValueError, "weights[0] must map 4 inputs to 5 outputs", {"control": zeros(2, 4, 2)}),
    (ValueError, "weights[0] must map 3 inputs to 5 outputs", {"time_input": True}),
    (ValueError, "group and correction go together", {"group": GROUP}),
    (ValueError, "group and correction go together", {"correction": CORRECTION}),
    (TypeError, "correction must be a tuple", {"group": GROUP, "correction": zeros(3, 2, 2)}),
    (TypeError, "correction must be a tuple", {"group": GROUP, "correction": (CORRECTION[0],)}),
    (ValueError, "correction weights must all have shape (G, out, in), got (2, 2)",
     {"group": GROUP, "correction": ([zeros(2, 2)], None)}),
    (ValueError, "correction weights[0] must map 2 inputs to 2 outputs",
     {"group": GROUP, "correction": ([zeros(3, 2, 3)], None)}),
    (ValueError, "correction biases[0] must have shape (3, 2), got (2,)",
     {"group": GROUP, "correction": (CORRECTION[0], [zeros(2)])}),
    (ValueError, "a slope in correction is for silu only", {"group": GROUP, "correction": (*CORRECTION, zeros(3, 0))}),
    (TypeError, "group must be a tensor, got list", {"group": [0, 1, 2, 0], "correction": CORRECTION}),
    (TypeError, "group must have dtype torch.int64, got torch.int32",
     {"group": GROUP.int(), "correction": CORRECTION}),
    (ValueError, "group must have shape (4,), one for each sample, got (3,)",
     {"group": GROUP[:3], "correction": CORRECTION}),
    (ValueError, "group must be between 0 and 2, got 3",
     {"group": torch.tensor([0, 3, 1, 0]), "correction": CORRECTION}),
    (ValueError, "group must be between 0 and 2, got -1",
     {"group": torch.tensor([0, 2, -1, 0]), "correction": CORRECTION}),
    (TypeError, "reinject must be a tuple (mask, states)", {"reinject": MASK}),
    (TypeError, "reinject must be a tuple (mask, states)", {"reinject": (MASK,)}),
    (TypeError, "the mask of reinject must be a bool tensor, got torch.float32", {"reinject": (MASK.float(), STATES)}),
    (TypeError, "the mask of reinject must be a bool tensor, got list", {"reinject": ([True], STATES)}),
    (TypeError, "the states of reinject must have the dtype of y0", {"reinject": (MASK, STATES.double())}),
    (ValueError, "reinject must have shapes (3, 4) and (3, 4, 2)", {"reinject": (MASK[1:], STATES)}),
    (ValueError, "reinject must have shapes (3, 4) and (3, 4, 2)", {"reinject": (MASK, STATES[1:])}),
    (ValueError, "return_energy must be False, True or 'time', got 'space'", {"return_energy": "space"}),
    (ValueError, "return_energy must be False, True or 'time', got ['time']", {"return_energy": ["time"]}),
    (TypeError, "validate must be True, False or None, got 'yes'", {"validate": "yes"}),
    (ValueError, "max_memory must be a number of bytes, at least 0, got -1", {"max_memory": -1}),
    (ValueError, "max_memory must be a number of bytes, at least 0, got 1000.0", {"max_memory": 1e3}),
    (ValueError, "backend must be one of", {"backend": "abacus"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "changed"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_bad_arguments(kind, message, changed):
    assert call().shape == (3, 4, 2)
    with pytest.raises(kind, match=re.escape(message)):
        call(**changed)


def test_what_exists_is_named():
    with pytest.raises(ValueError, match=re.escape(", ".join(map(repr, TABLEAUX)))):
        call(method="dopri5")


def test_a_dtype_that_only_the_reference_takes():
    half = {"y0": zeros(4, 2).half(), "weights": [zeros(2, 2).half()], "biases": None}
    assert call(backend="reference", **half).dtype == torch.float16
    with pytest.raises(RuntimeError, match=r"dtype torch\.float16 is not supported, only float32 and float64"):
        call(backend="cpu", **half)


def test_unchecked_groups_are_clamped():
    group = torch.tensor([-5, 1, 99, 0])
    correction = [torch.arange(3.0).view(3, 1, 1).expand(3, 2, 2)], None
    expected = call(y0=torch.ones(4, 2), group=group.clamp(0, 2), correction=correction)
    for backend in ("cpu", "reference"):
        actual = call(y0=torch.ones(4, 2), group=group, correction=correction, validate=False, backend=backend)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("batch", [5, 200])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_divergence_names_the_first(batch, threads, capability):
    """dy/dt = 1e30 y: from 1 not finite after the second of the Euler steps of size 1; a smaller start takes longer."""
    torch.set_num_threads(threads)
    for late, early in ((4, 3), (0, 4), (batch - 1, batch - 2), (1, batch // 2)):
        y0 = torch.zeros(batch, 2)
        y0[late], y0[early] = 1e-30, 1.0
        t, w = torch.arange(4.0) * 2, [torch.eye(2) * 1e30]
        options = {"activation": "tanh", "method": "euler", "substeps": 2}
        with pytest.raises(FloatingPointError) as caught:
            mlp_odeint(y0, t, w, None, backend="cpu", **options)
        assert str(caught.value).startswith(
            f"the state of sample {early} is not finite after sub-step 2 of 2 of the interval from t[0]: "
        )
        with pytest.raises(FloatingPointError, match=rf"^the state of sample {early} is not finite at t\[1\]: "):
            mlp_odeint(y0, t, w, None, backend="reference", **options)
        # among those of the same sub-step, the first sample
        y0[early] = 1e-30
        with pytest.raises(FloatingPointError) as caught:
            mlp_odeint(y0, t, w, None, backend="cpu", **options)
        assert str(caught.value).startswith(
            f"the state of sample {min(late, early)} is not finite after sub-step 1 of 2 of the interval from t[1]: "
        )


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("batch", [3, 50])
def test_divergence_without_validation(runner, batch):
    """NaN and infinity come back, in the samples that they belong to only, with and without groups."""
    y0 = torch.ones(batch, 2)
    y0[1] = NAN
    y0[2] = 1e38
    t, w = torch.arange(4.0), [torch.eye(2) * 9]
    group = torch.arange(batch) % 2
    for options in ({}, {"group": group, "correction": ([torch.zeros(2, 2, 2)], None)}):
        options |= {"activation": "tanh", "method": "midpoint", "backend": runner.use()}
        states = mlp_odeint(y0, t, w, None, validate=False, **options)
        finite = torch.ones(batch, dtype=torch.bool)
        finite[1:3] = False
        assert torch.equal(states[-1].isfinite().all(1), finite)
        assert states[:, 1].isnan().all()
        with pytest.raises(FloatingPointError, match="the state of sample 1 is not finite"):
            mlp_odeint(y0, t, w, None, **options)
        with pytest.raises(FloatingPointError, match="the state of sample 2 is not finite"):
            mlp_odeint(y0[[0, 0, 2]], t, w, None, **(options | {"group": group[:3]} if "group" in options else options))


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_a_gradient_is_wanted_of_what_diverges(runner):
    y0 = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(FloatingPointError, match="sample 0 is not finite"):
        mlp_odeint(y0, torch.arange(4.0), [torch.eye(2) * 1e30], None, activation="tanh", method="rk4",
                   backend=runner.use())  # fmt: skip


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("times", [1, 2])
def test_a_start_that_is_not_finite(runner, times):
    y0 = torch.zeros(3, 2)
    y0[2, 1] = INF
    with pytest.raises(FloatingPointError, match="the state of sample 2 is not finite"):
        mlp_odeint(y0, torch.arange(float(times)), [torch.zeros(2, 2)], None, activation="tanh", method="euler",
                   backend=runner.use())  # fmt: skip


def test_any_number_of_bytes_is_a_limit():
    torch.testing.assert_close(call(max_memory=2**70), call())


def _half_field(y0, t):
    return MLPField((2, 3, 2), "tanh", dtype=y0.dtype).trajectory(y0, t)


def _half_weights(y0, t):
    return mlp_odeint(y0, t, [y0.new_zeros(2, 2)], None, activation="tanh", method="rk4")


@pytest.mark.parametrize("solve", [_half_field, _half_weights])
def test_the_slow_backend_is_announced_where_it_was_called(solve, monkeypatch):
    monkeypatch.setattr(backends._state, "requested", None)
    monkeypatch.setattr(backends._state, "warned", set())
    with pytest.warns(RuntimeWarning, match="mlp_odeint runs on the slow 'reference' backend.*float16") as seen:
        solve(zeros(4, 2, dtype=torch.float16), torch.tensor([0.0, 1.0]))
    assert seen[0].filename == __file__
