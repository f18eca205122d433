"""The continuous adjoint: torchdiffeq's gradients, the errors, and how it differs from the exact ones."""

from __future__ import annotations

import inspect

import pytest
import torch
import torchdiffeq

import pykernels

from .fields import OPTIONS, SHARED, TIMES, ComplexNet, Net, PairNet, assert_same, random, results

ADJOINT = {
    "same": {},
    "other-method": {"adjoint_method": "rk4"},
    "steps-backwards": {"adjoint_options": {"step_size": 0.11}},
    "both": {"options": {"step_size": 0.07, "interp": "cubic"}},
    "perturb": {"options": {"perturb": True}},
    "grid": {"options": {"grid_constructor": OPTIONS["grid"]["grid_constructor"]}},
    "apart": {"options": {"step_size": 0.3}, "adjoint_method": "midpoint", "adjoint_options": {"step_size": 0.05}},
    "tolerances": {"adjoint_rtol": 1e-3, "adjoint_atol": 1e-3, "adjoint_options": {"norm": "seminorm"}},
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("keywords", ADJOINT.values(), ids=ADJOINT)
@pytest.mark.parametrize("method", SHARED)
def test_gradients_of_torchdiffeq(method, keywords, backward):
    t = TIMES.flip(0) if backward else TIMES
    for net, y0 in ((Net(), random(2, 3)), (PairNet(), (random(2, 3), random(5)))):
        expected = results(torchdiffeq.odeint_adjoint, net, y0, t, method=method, **keywords)
        assert_same(results(pykernels.odeint_adjoint, net, y0, t, method=method, **keywords), expected)


def test_approaches_the_exact_gradients_of_complex_states():
    """torchdiffeq fails here, unless nothing but y0 needs a gradient."""
    net, y0 = ComplexNet(), random(2, 3, dtype=torch.complex128)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    exact = results(pykernels.odeint, net, y0, t, method="rk4")
    assert_same(results(pykernels.odeint_adjoint, net, y0, t, method="rk4"), exact, 1e-7)
    net.requires_grad_(False)
    gradients = []
    for solver in (torchdiffeq.odeint_adjoint, pykernels.odeint_adjoint):
        leaf = y0.clone().requires_grad_()
        loss = solver(net, leaf, t, method="rk4").abs().square().sum()
        gradients += torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_float32_and_parameters_of_another_dtype():
    net, y0 = Net(torch.float32), random(2, 3, dtype=torch.float32)
    expected = results(torchdiffeq.odeint_adjoint, net, y0, TIMES.float(), method="rk4")
    assert_same(results(pykernels.odeint_adjoint, net, y0, TIMES.float(), method="rk4"), expected, 5e-6)
    coarse = results(pykernels.odeint_adjoint, Net(), y0.double(), TIMES.float(), method="rk4")
    assert [g.dtype for g in coarse[1][:2]] == [torch.float64, torch.float32]
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    states = pykernels.odeint_adjoint(
        lambda t, y: net(t, y) * scale.to(y.dtype), y0, TIMES, method="rk4", adjoint_params=[scale]
    )
    states.sum().backward()
    assert scale.grad.dtype == torch.float64
    assert all(p.grad is None for p in net.parameters())


def test_only_what_needs_gradients_gets_them():
    net, y0 = Net(), random(2, 3)
    net.bias.requires_grad_(False)
    pykernels.odeint_adjoint(net, y0, TIMES, method="rk4").sum().backward()
    assert net.weight.grad is not None
    assert net.bias.grad is None
    y0.requires_grad_()
    states = pykernels.odeint_adjoint(lambda t, y: -y, y0, TIMES, method="rk4", adjoint_params=())
    states[-1].sum().backward()
    assert (y0.grad - (-(TIMES[-1] - TIMES[0])).exp()).abs().max() < 0.1


class Recording(Net):
    def __init__(self):
        super().__init__()
        self.calls, self.adjoint_calls = [], []

    def callback_step(self, t, y, dt):
        self.calls.append((t, y, dt))

    def callback_step_adjoint(self, t, state, dt):
        self.adjoint_calls.append((t, *state, dt))


def test_callbacks():
    recordings = []
    for solver in (torchdiffeq.odeint_adjoint, pykernels.odeint_adjoint):
        net = Recording()
        solver(net, random(2, 3), TIMES, method="rk4", options={"step_size": 0.3}).square().sum().backward()
        recordings.append(net)
    theirs, ours = recordings
    assert len(ours.calls) == len(theirs.calls) > 4
    assert len(ours.adjoint_calls) == len(theirs.adjoint_calls) > 4
    for a, b in zip([*ours.calls, *ours.adjoint_calls], [*theirs.calls, *theirs.adjoint_calls], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_callbacks_of_adaptive_steps_are_warned_of():
    net = Net()
    net.callback_reject_step_adjoint = print
    with pytest.warns(UserWarning, match="callback_reject_step_adjoint"):
        pykernels.odeint_adjoint(net, random(2, 3), TIMES, method="rk4")


def test_signature_of_torchdiffeq():
    ours = inspect.signature(pykernels.odeint_adjoint).parameters
    theirs = inspect.signature(torchdiffeq.odeint_adjoint).parameters
    assert {n: (p.kind, p.default) for n, p in ours.items()} == {n: (p.kind, p.default) for n, p in theirs.items()}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": None}, "method must be given"),
        ({"adjoint_method": "dopri5"}, "'rk4_classic'.*'dopri5'"),
        ({"event_fn": print}, "event_fn"),
        ({"options": {"step_size": 0.1}, "adjoint_method": "euler"}, "adjoint_options must be given"),
        ({"options": {"checkpoint_every": 3}}, "checkpoint_every"),
        ({"adjoint_options": {"stepsize": 3}}, "adjoint_options has unknown 'stepsize'"),
        ({"t": TIMES[[0, 2, 1]]}, "t must be strictly"),
        ({"func": lambda t, y: -y}, "adjoint_params must be given"),
        ({"func": lambda t, y: y[:1], "adjoint_params": ()}, r"\(2, 3\), func returned \(1, 3\)"),
    ],
)
def test_bad_input(keywords, message):
    arguments = {"func": Net(), "y0": random(2, 3), "t": TIMES, "method": "rk4", **keywords}
    with pytest.raises(ValueError, match=message):
        pykernels.odeint_adjoint(arguments.pop("func"), arguments.pop("y0"), arguments.pop("t"), **arguments)


def test_second_derivatives_and_transforms_are_refused():
    net, y0 = Net(), random(2, 3).requires_grad_()
    loss = pykernels.odeint_adjoint(net, y0, TIMES, method="rk4").square().sum()
    (gradient,) = torch.autograd.grad(loss, y0, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="no function transforms"):
        torch.func.grad(lambda y: pykernels.odeint_adjoint(net, y, TIMES, method="rk4").sum())(random(2, 3))
