"""Trajectories of any vector field: torchdiffeq's numbers and gradients, orders of convergence, errors."""

from __future__ import annotations

import inspect
import math
import warnings
from itertools import pairwise

import pytest
import torch
import torchdiffeq
from torch import nn

import pykernels
from pykernels.ops.latent_ode import grids
from pykernels.ops.latent_ode.tableaux import TABLEAUX

from .fields import OPTIONS, SHARED, TIMES, ComplexNet, Net, PairNet, assert_same, random, results


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", SHARED)
def test_numbers_and_gradients_of_torchdiffeq(method, options, backward):
    net, y0, t = Net(), random(2, 3), TIMES.flip(0) if backward else TIMES
    expected = results(torchdiffeq.odeint, net, y0, t, method=method, options=options)
    assert_same(results(pykernels.odeint, net, y0, t, method=method, options=options), expected)
    # Without a gradient for t, the sizes of the steps are plain numbers.
    with torch.no_grad():
        assert (pykernels.odeint(net, y0, t, method=method, options=options) - expected[0][0]).abs().max() <= 1e-10


@pytest.mark.parametrize("options", [{}, {"step_size": 0.13}, {"step_size": 0.13, "interp": "cubic"}], ids=str)
@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("kind", ["tuple", "complex"])
def test_tuples_and_complex_states(kind, method, options):
    if kind == "tuple":
        net, y0 = PairNet(), (random(2, 3), random(5, seed=1))
    else:
        net, y0 = ComplexNet(), random(2, 3, dtype=torch.complex128)
    for t in (TIMES, TIMES.flip(0)):
        expected = results(torchdiffeq.odeint, net, y0, t, method=method, options=options)
        assert_same(results(pykernels.odeint, net, y0, t, method=method, options=options), expected)


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize(
    ("dtype", "time_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.float32)],
)
def test_other_dtypes(dtype, time_dtype, method):
    net, y0, t = Net(dtype), random(2, 3, dtype=dtype), TIMES.to(time_dtype)
    for options in ({}, {"step_size": 0.13}):
        expected = results(torchdiffeq.odeint, net, y0, t, method=method, options=options)
        actual = results(pykernels.odeint, net, y0, t, method=method, options=options)
        if dtype == torch.float64:  # the gradient of t is in its own precision
            torch.testing.assert_close(actual[1][1], expected[1][1])
            actual, expected = ((states, (*grads[:1], *grads[2:])) for states, grads in (actual, expected))
        assert_same(actual, expected, 2e-6 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("method", SHARED)
def test_the_field_sees_the_times_of_torchdiffeq_in_the_dtype_of_the_state(method):
    for options in ({}, {"perturb": True}, {"step_size": 0.2, "perturb": True}):
        for t in (TIMES, TIMES.flip(0), TIMES.float()):
            seen = []

            def field(t, y, seen=seen):
                seen.append(t)
                return -y

            for solver in (torchdiffeq.odeint, pykernels.odeint):
                solver(field, torch.ones(3, dtype=torch.float64), t, method=method, options=options)
            half = len(seen) // 2
            assert [x.item() for x in seen[:half]] == [x.item() for x in seen[half:]]
            assert {(x.dtype, x.shape) for x in seen} == {(torch.float64, torch.Size([]))}


def test_shapes():
    for y0 in (torch.ones(()), torch.ones(0, 3), torch.ones(2, 1, 4)):
        assert pykernels.odeint(lambda t, y: -y, y0, TIMES, method="rk4").shape == (5, *y0.shape)
    only = pykernels.odeint(lambda t, y: -y, torch.ones(2), TIMES[:1], method="rk4")
    assert torch.equal(only, torch.ones(1, 2))


@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)
def test_order_conditions(tableau):
    """Consistency, and the conditions on b of every rooted tree up to the order of the method."""
    stages = range(tableau.stages)
    a = [[*row, *[0.0] * (tableau.stages - len(row))] for row in tableau.a]
    b, c = tableau.b, tableau.c
    assert len(a) == len(b) == len(c)
    assert all(math.isclose(sum(a[i]), c[i], abs_tol=1e-15) for i in stages)
    ac = [sum(a[i][j] * c[j] for j in stages) for i in stages]
    acc = [sum(a[i][j] * c[j] ** 2 for j in stages) for i in stages]
    aac = [sum(a[i][j] * ac[j] for j in stages) for i in stages]
    conditions = [
        (1, [1.0] * tableau.stages, 1),
        (2, c, 1 / 2),
        (3, [x * x for x in c], 1 / 3),
        (3, ac, 1 / 6),
        (4, [x**3 for x in c], 1 / 4),
        (4, [x * y for x, y in zip(c, ac, strict=True)], 1 / 8),
        (4, acc, 1 / 12),
        (4, aac, 1 / 24),
    ]
    for order, tree, value in conditions:
        holds = math.isclose(sum(x * y for x, y in zip(b, tree, strict=True)), value, abs_tol=1e-15)
        assert holds or order > tableau.order
        if order == tableau.order + 1 == 2:
            assert not holds


@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)
def test_order_of_convergence(tableau):
    """y' = y cos t, whose solution is exp(sin t)."""
    errors = []
    for steps in (20, 40, 80):
        t = torch.linspace(0, 2, steps + 1, dtype=torch.float64)
        y = pykernels.odeint(lambda t, y: y * t.cos(), torch.ones((), dtype=torch.float64), t, method=tableau.name)
        errors.append((y - t.sin().exp()).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert abs(math.log2(coarse / fine) - tableau.order) <= 0.2


@pytest.mark.parametrize("method", TABLEAUX)
def test_gradcheck_and_gradgradcheck(method):
    def states(y0, weight, t):
        return pykernels.odeint(lambda t, y: torch.sin(y @ weight) * t, y0, t, method=method)

    leaves = [x.requires_grad_() for x in (random(2, 2), random(2, 2, seed=1), TIMES[:3].clone())]
    assert torch.autograd.gradcheck(states, leaves)
    assert torch.autograd.gradgradcheck(states, leaves)


@pytest.mark.parametrize("every", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("options", [{}, {"step_size": 0.11, "interp": "cubic"}], ids=["plain", "cubic"])
def test_recomputation_has_the_same_bits(options, every):
    for net, y0 in ((Net(), random(2, 3)), (PairNet(), (random(2, 3), random(5)))):
        expected = results(pykernels.odeint, net, y0, TIMES, method="rk4", options=options)
        for keywords in (
            {"options": options, "checkpoint_every": every},
            {"options": {**options, "checkpoint_every": every}},
        ):
            actual = results(pykernels.odeint, net, y0, TIMES, method="rk4", **keywords)
            for a, b in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
                assert torch.equal(a, b)


def test_recomputation_repeats_random_numbers():
    net, y0 = Net(), random(2, 3)

    def noisy(t, y):
        return net(t, y) * nn.functional.dropout(torch.ones_like(y))

    gradients = []
    for every in (None, 2):
        torch.manual_seed(0)
        y = y0.clone().requires_grad_()
        states = pykernels.odeint(noisy, y, TIMES, method="midpoint", checkpoint_every=every)
        gradients.append(torch.autograd.grad(states.sum(), [y, net.weight]))
    assert all(map(torch.equal, *gradients))


def test_recomputation_saves_memory_and_evaluations_are_as_many_as_they_must_be():
    evaluations, alive = 0, []

    def field(t, y):
        nonlocal evaluations
        evaluations += 1
        return y.sin()

    t = torch.linspace(0, 1, 41)
    for every, expected in ((None, 40), (4, 76)):
        evaluations, saved = 0, []
        y = torch.ones(3, requires_grad=True)

        def pack(x, saved=saved):
            saved.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            states = pykernels.odeint(field, y, t, method="euler", checkpoint_every=every)
        alive.append(len(saved))
        states.sum().backward()
        assert evaluations == expected
    assert alive[0] >= 40
    assert alive[1] <= 25


class Recording(nn.Module):
    """A field with the callbacks that torchdiffeq knows."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls = []

    def forward(self, t, y):
        return tuple(-self.rate * t * x for x in y) if isinstance(y, tuple) else -self.rate * t * y

    def callback_step(self, t, y, dt):
        self.calls.append((t, y if isinstance(y, tuple) else (y,), dt))


@pytest.mark.parametrize("y0", [random(3), (random(3), random(2, 2))], ids=["tensor", "tuple"])
@pytest.mark.parametrize("t", [TIMES, TIMES.flip(0)], ids=["forward", "backward"])
def test_callbacks(y0, t):
    recordings = []
    for solver in (torchdiffeq.odeint, pykernels.odeint):
        field = Recording()
        solver(field, y0, t, method="heun3", options={"step_size": 0.25})
        recordings.append(field.calls)
    assert len(recordings[0]) == len(recordings[1]) > 4
    for (t0, y, dt), (t1, z, ds) in zip(*recordings, strict=True):
        torch.testing.assert_close((t0, *y, dt), (t1, *z, ds), rtol=0, atol=1e-12)


def test_recomputation_calls_no_callback_again():
    field = Recording()
    states = pykernels.odeint(field, random(3), TIMES, method="euler", checkpoint_every=1)
    states.sum().backward()
    assert len(field.calls) == 4


def test_callbacks_of_adaptive_steps_are_warned_of():
    field = Recording()
    field.callback_accept_step = lambda t, y, dt: None
    with pytest.warns(UserWarning, match="callback_accept_step") as seen:
        pykernels.odeint(field, random(3), TIMES, method="euler")
    assert seen[0].filename == __file__


def test_signature_of_torchdiffeq():
    ours = inspect.signature(pykernels.odeint).parameters
    theirs = inspect.signature(torchdiffeq.odeint).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default)


def test_half_precision_fields_as_autocast_has_them():
    net = nn.Linear(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        states = [s(lambda t, y: net(y), torch.ones(2, 3), TIMES, method="rk4") for s in SOLVERS]
    assert states[1].dtype == torch.float32
    assert net(torch.ones(1, 3)).dtype == torch.float32
    torch.testing.assert_close(*states, rtol=2e-2, atol=2e-2)  # bfloat16 keeps 8 bits, 4e-3, at each evaluation


SOLVERS = (torchdiffeq.odeint, pykernels.odeint)


def test_results_have_the_dtype_of_the_state_as_in_torchdiffeq():
    y0 = torch.ones(3)
    states = [s(lambda t, y: -y.double(), y0, TIMES, method="rk4") for s in SOLVERS]
    assert states[0].dtype == states[1].dtype == torch.float32
    torch.testing.assert_close(*states)
    mixed = (torch.ones(3), torch.ones(2, dtype=torch.float64))
    states = [s(lambda t, y: (-y[0], y[0][:2] * y[1]), mixed, TIMES, method="rk4") for s in SOLVERS]
    assert [x.dtype for x in states[0]] == [x.dtype for x in states[1]]
    torch.testing.assert_close(*states)


def decay(t, y):
    return -y


ONES = torch.ones(3, dtype=torch.float64)
PROBLEM = {"func": decay, "y0": ONES, "t": TIMES, "method": "rk4"}
NAN_TIMES = torch.tensor([0.0, math.nan, 1.0])
WRONG = [
    ({"method": None}, ValueError, "method must be given, one of 'euler'.*'ssp_rk3'"),
    ({"method": "dopri5"}, ValueError, "'rk4_classic'.*'dopri5'.*adaptive and Adams"),
    ({"method": "explicit_adams"}, ValueError, "'euler'.*'explicit_adams'"),
    ({"method": 4}, ValueError, "method must be one of"),
    ({"event_fn": decay}, ValueError, "event_fn"),
    ({"func": 3}, TypeError, "func must be a callable.*int"),
    ({"t": [0.0, 1.0]}, TypeError, "t must be a tensor.*list"),
    ({"t": torch.arange(3)}, TypeError, "t must be of a floating-point dtype, got torch.int64"),
    ({"t": torch.ones(2, 2)}, ValueError, r"t must be one-dimensional.*\(2, 2\)"),
    ({"t": torch.tensor(1.0)}, ValueError, r"t must be one-dimensional.*\(\)"),
    ({"t": torch.empty(0)}, ValueError, "at least one time"),
    ({"t": torch.tensor([0.0, 2.0, 1.0])}, ValueError, r"t must be strictly increasing.*\[0.0, 2.0, 1.0\]"),
    ({"t": torch.ones(2)}, ValueError, "t must be strictly increasing or strictly decreasing"),
    ({"t": torch.zeros(1000)}, ValueError, r"got \[0.0, 0.0, 0.0, 0.0, 0.0, ..., 0.0\]$"),
    ({"t": NAN_TIMES}, ValueError, "t must be strictly increasing"),
    ({"y0": torch.ones(3, dtype=torch.int64)}, TypeError, "y0 must be of a floating-point.*torch.int64"),
    ({"y0": (ONES, torch.ones(2, dtype=torch.bool))}, TypeError, r"y0\[1\] must be of a floating-point.*torch.bool"),
    ({"y0": [ONES]}, TypeError, "y0 must be a tensor or a tuple of tensors, got list"),
    ({"y0": ()}, TypeError, "y0 must be a tensor or a tuple"),
    ({"y0": (ONES, 1.0)}, TypeError, r"y0\[1\] must be a tensor, got float"),
    ({"func": lambda t, y: y[:2]}, ValueError, r"the state has \(3,\), func returned \(2,\)"),
    ({"func": lambda t, y: y.sum()}, ValueError, r"the state has \(3,\), func returned \(\)"),
    ({"func": lambda t, y: 1.0}, TypeError, "func must return a tensor, got float"),
    ({"func": lambda t, y: y * 1j}, ValueError, "complex128 for a real state; make y0 complex"),
    ({"func": lambda t, y: y, "y0": (ONES,)}, None, ""),
    ({"func": lambda t, y: y[0], "y0": (ONES,)}, TypeError, "tuple of 1 tensors.*got Tensor"),
    ({"func": lambda t, y: (y[0],), "y0": (ONES, ONES)}, TypeError, "tuple of 2 tensors.*got 1"),
    ({"func": lambda t, y: (y[0], y[1][:2]), "y0": (ONES, ONES)}, ValueError, r"position 1.*\(3,\).*\(2,\)"),
    ({"options": {"step_size": "0.1"}}, TypeError, "step_size must be a number or a tensor, got str"),
    ({"options": {"stepsize": 0.1}}, ValueError, "unknown 'stepsize'.*'step_size'"),
    ({"options": [1]}, TypeError, "options must be a dict, got list"),
    ({"options": {"interp": "quadratic"}}, ValueError, "interp must be 'linear' or 'cubic', got 'quadratic'"),
    ({"options": {"step_size": 0.0}}, ValueError, "step_size must be positive and finite, got 0.0"),
    ({"options": {"step_size": -0.1}}, ValueError, "step_size must be positive"),
    ({"options": {"step_size": torch.tensor(-0.1)}}, ValueError, "step_size must be positive"),
    ({"options": {"step_size": 0.1, "grid_constructor": lambda f, y, t: t}}, ValueError, "only one of 'step_size'"),
    ({"options": {"grid_constructor": lambda f, y, t: t[1:]}}, ValueError, "grid_constructor must return times from"),
    ({"options": {"grid_constructor": lambda f, y, t: t[:-1]}}, ValueError, "grid_constructor must return times"),
    (
        {"options": {"grid_constructor": lambda f, y, t: t.tolist()}},
        TypeError,
        "grid_constructor must return a tensor of times",
    ),
    ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be a number of steps, at least 1, got 0"),
    ({"checkpoint_every": 2, "options": {"checkpoint_every": 3}}, ValueError, "contradicts"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input(changes, error, message):
    arguments = {**PROBLEM, **changes}
    call = [arguments.pop(name) for name in ("func", "y0", "t")]
    if error is None:
        pykernels.odeint(*call, **arguments)
        return
    with pytest.raises(error, match=message):
        pykernels.odeint(*call, **arguments)


@pytest.mark.parametrize("times", [[0.0, 0.7, 0.2, 1.0], [0.0, 2.0, 1.0], [1.0, 0.4, 0.4, 0.0], [0.0, math.nan, 1.0]])
def test_times_whose_values_are_read_only_for_a_step_size_are_checked_then(times):
    """As on a device; this is what does it, on the CPU."""
    grid = torch.linspace(times[0], times[-1], 5)
    with pytest.raises(ValueError, match="t must be strictly increasing or strictly decreasing"):
        grids.locate(grid, torch.tensor(times), grid.tolist(), times)


def test_options_of_other_methods_are_warned_of_as_in_torchdiffeq():
    options = {"max_num_steps": 10, "first_step": 0.1}
    for solver in SOLVERS:
        with pytest.warns(UserWarning, match="max_num_steps"):
            solver(decay, ONES, TIMES, method="rk4", options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pykernels.odeint(decay, ONES, TIMES, rtol=1e-3, atol=(1e-3,), method="rk4", options={"norm": abs})


def test_large_states_without_gradients_are_stored_once():
    """Beside the states, only as much as a step needs."""
    y0, t = torch.ones(1 << 20), torch.linspace(0, 1, 21)
    sizes = []

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.stack.default, torch.ops.aten.cat.default, torch.ops.aten.new_empty.default):
                sizes.append(result.numel())
            return result

    with torch.no_grad():
        expected = pykernels.odeint(decay, y0[:4], t, method="euler")
        with Allocations():
            states = pykernels.odeint(decay, y0, t, method="euler")
    assert sizes == [21 << 20]
    assert torch.equal(states[:, :4], expected)
    options = {"step_size": 0.03, "interp": "cubic"}
    with torch.no_grad():
        large = pykernels.odeint(decay, y0, t, method="rk4", options=options)
        torch.testing.assert_close(large[:, :4], pykernels.odeint(decay, y0[:4], t, method="rk4", options=options))


class Fused(nn.Module):
    """A field with kernels of its own, whose states cannot be mistaken."""

    answer = None

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, t, y):
        return tuple(-x for x in y) if isinstance(y, tuple) else -y

    def _fused_odeint(self, y0, t, method, options):
        self.asked.append((method, options))
        return torch.full((len(t), *y0.shape), 7.0) if self.answer is None else self.answer


EVEN = torch.linspace(0, 1, 11, dtype=torch.float64)


@pytest.mark.parametrize(
    ("keywords", "asked"),
    [
        ({}, {"substeps": 1}),
        ({"t": TIMES}, {"substeps": 1}),
        ({"options": {"step_size": 0.1}}, {"substeps": 1}),
        ({"options": {"step_size": 0.025, "interp": "cubic"}}, {"substeps": 4}),
        ({"options": {"step_size": 0.025}, "t": EVEN.float().flip(0)}, {"substeps": 4}),
        ({"checkpoint_every": 3}, {"substeps": 1, "checkpoint_every": 3}),
        ({"options": {"step_size": 0.03}}, None),
        ({"options": {"step_size": 0.3}}, None),
        ({"options": {"step_size": 0.1}, "t": TIMES}, None),
        ({"options": {"step_size": 0.1}, "t": EVEN.clone().requires_grad_()}, None),
        ({"options": {"perturb": True}}, None),
        ({"options": {"grid_constructor": lambda func, y0, t: t}}, None),
        ({"y0": (ONES, ONES)}, None),
    ],
)
def test_fields_with_kernels_of_their_own(keywords, asked):
    field = Fused()
    arguments = {"y0": ONES, "t": EVEN, "method": "rk4", **keywords}
    states = pykernels.odeint(field, arguments.pop("y0"), arguments.pop("t"), **arguments)
    if asked is None:
        assert field.asked == []
    else:
        assert field.asked == [("rk4", asked)]
        assert (states == 7).all()
        field.answer = NotImplemented
        assert (pykernels.odeint(field, ONES, keywords.get("t", EVEN), method="rk4") != 7).all()
    with torch.no_grad():
        adjoint = pykernels.odeint_adjoint(Fused(), ONES, EVEN, method="rk4")
    assert (adjoint == 7).all()


def test_a_field_with_callbacks_takes_its_steps_one_by_one():
    field, calls = Fused(), []
    field.callback_step = lambda t, y, dt: calls.append(t)
    pykernels.odeint(field, ONES, EVEN, method="rk4")
    assert len(calls) == 10
    assert field.asked == []
