"""How odeint fits into torch: compilation, function transforms, forward mode, devices whose values stay unread."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import pykernels
from pykernels.ops.latent_ode.tableaux import TABLEAUX

from .fields import TIMES, ComplexNet, Net, PairNet, random, results

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
CASES = {
    "tensor": (Net, lambda: random(2, 3)),
    "tuple": (PairNet, lambda: (random(2, 3), random(5))),
    "complex": (ComplexNet, lambda: random(2, 3, dtype=torch.complex128)),
}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("case", "options"),
    [("tensor", {"perturb": True}), ("tensor", {"checkpoint_every": 1}), ("tuple", {}), ("complex", {})],
    ids=str,
)
def test_compiled_in_one_graph_forward_and_backward(case, options):
    make, state = CASES[case]
    net, y0, t = make(), state(), TIMES[:3]
    expected = results(pykernels.odeint, net, y0, t, method="midpoint", options=options)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda net, y0, t: pykernels.odeint(net, y0, t, method="midpoint", options=options),
        fullgraph=True,
        backend="aot_eager",
    )
    assert_close(results(compiled, net, y0, t), expected)
    with torch.no_grad():
        assert_close(compiled(net, y0, t), pykernels.odeint(net, y0, t, method="midpoint", options=options))


def test_compiled_by_inductor_forward_and_backward():
    net, y0, t = Net(), random(2, 3), TIMES[:3]

    def gradients(solve):
        return torch.autograd.grad(solve(y0).square().sum(), list(net.parameters()))

    def solve(y0):
        return pykernels.odeint(net, y0, t, method="midpoint")

    torch._dynamo.reset()
    assert_close(gradients(torch.compile(solve, fullgraph=True)), gradients(solve))


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2}, {"perturb": True}], ids=str)
def test_vmap_over_states_times_and_parameters(options):
    net, y0 = Net(), random(4, 2, 3)
    times = torch.stack([TIMES * s for s in (1.0, 0.5, -1.0, 2.0)])

    def solve(y0, t):
        return pykernels.odeint(net, y0, t, method="rk4", options=options)

    for dims, y, t in (((0, None), y0, TIMES), ((None, 0), y0[0], times), ((0, 0), y0, times)):
        expected = [solve(y[i] if dims[0] == 0 else y, t[i] if dims[1] == 0 else t) for i in range(4)]
        assert_close(torch.func.vmap(solve, in_dims=dims)(y, t), torch.stack(expected))
    weights = random(4, 3, 3, seed=4)

    def of_weight(weight):
        return pykernels.odeint(lambda t, y: torch.tanh(y @ weight), y0[0], TIMES, method="rk4")

    assert_close(torch.func.vmap(of_weight)(weights), torch.stack([of_weight(w) for w in weights]))


def test_vmap_with_a_step_size():
    net = Net()

    def solve(y0):
        return pykernels.odeint(net, y0, TIMES, method="heun3", options={"step_size": 0.13, "interp": "cubic"})

    y0 = random(4, 2, 3)
    assert_close(torch.func.vmap(solve)(y0), torch.stack([solve(y) for y in y0]))


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2}, {"step_size": 0.13}], ids=str)
def test_grad_jvp_vjp_jacobians_and_hessian(options):
    net, y0, t = Net(), random(2, 3), TIMES

    def loss(y0, t):
        return pykernels.odeint(net, y0, t, method="rk4", options=options).square().sum()

    def states(y0):
        return pykernels.odeint(net, y0, t, method="rk4", options=options)

    leaves = [y0.clone().requires_grad_(), t.clone().requires_grad_()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    if "step_size" not in options:  # whose number of steps depends on the values of t
        assert_close(torch.func.grad(loss, argnums=(0, 1))(y0, t), expected)
    assert_close(torch.func.grad(loss)(y0, t), expected[0])
    jacobian = torch.autograd.functional.jacobian(states, y0)
    assert_close(torch.func.jacrev(states)(y0), jacobian)
    assert_close(torch.func.jacfwd(states)(y0), jacobian)
    direction = random(2, 3, seed=5)
    tangent = (jacobian * direction).sum((-2, -1))
    assert_close(torch.func.jvp(states, (y0,), (direction,)), (states(y0), tangent))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(states(forward_ad.make_dual(y0, direction)))
        assert_close(tuple(dual), (states(y0), tangent))
        moving = pykernels.odeint(net, y0, forward_ad.make_dual(t, torch.ones_like(t)), method="rk4")
        shift = torch.autograd.functional.jvp(
            lambda t: pykernels.odeint(net, y0, t, method="rk4"), t, torch.ones_like(t)
        )
        assert_close(tuple(forward_ad.unpack_dual(moving)), shift)
    hessian = torch.autograd.functional.hessian(lambda y0: loss(y0, t), y0)
    assert_close(torch.func.hessian(lambda y0: loss(y0, t))(y0), hessian)


def test_exported():
    class Rollout(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, y0):
            return pykernels.odeint(self.net, y0, TIMES, method="rk4")

    module, y0 = Rollout(), random(2, 3)
    assert_close(torch.export.export(module, (y0,)).module()(y0), module(y0))


def test_no_value_of_a_tensor_is_read_where_reading_would_wait_for_a_device():
    """Meta tensors have shapes and no values, so that reading one raises."""
    y0, t = torch.ones(2, 3, device="meta"), torch.linspace(0, 1, 5, device="meta")
    net = Net(torch.float32).to("meta")
    for method in TABLEAUX:
        for options in ({}, {"perturb": True}, {"interp": "cubic"}, {"checkpoint_every": 2}):
            states = pykernels.odeint(net, y0.requires_grad_(), t, method=method, options=options)
            assert states.shape == (5, 2, 3)
            states.sum().backward()
    pykernels.odeint_adjoint(net, y0, t, method="rk4").sum().backward()


def test_values_are_not_read_under_a_fake_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y0, t = torch.ones(2, 3), torch.linspace(0, 1, 5)
        assert pykernels.odeint(lambda t, y: -y, y0, t, method="rk4").shape == (5, 2, 3)


def test_times_and_state_on_two_devices():
    y0 = torch.ones(2, 3, device="meta")
    states = pykernels.odeint(lambda t, y: -y * t, y0, TIMES, method="rk4", options={"step_size": 0.1})
    assert states.device == y0.device
    assert states.shape == (5, 2, 3)
