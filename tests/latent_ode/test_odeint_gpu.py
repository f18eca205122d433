"""odeint on a GPU: no synchronisation, and capture in a CUDA graph."""

from __future__ import annotations

import warnings

import pytest
import torch

import pykernels
from pykernels.ops.latent_ode.tableaux import TABLEAUX

from .fields import Net, random, results

pytestmark = pytest.mark.gpu
OPTIONS = ({}, {"perturb": True}, {"interp": "cubic"})


@pytest.fixture
def synchronisations():
    """What waits for the device, as warnings."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    torch.cuda.set_sync_debug_mode("default")


def problem():
    return Net().cuda(), random(64, 3).cuda(), torch.linspace(0, 1, 6, dtype=torch.float64, device="cuda")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("method", TABLEAUX)
def test_numbers_of_the_cpu(method, options):
    net, y0, t = problem()
    actual = results(pykernels.odeint, net, y0, t, method=method, options=options)
    expected = results(pykernels.odeint, net.cpu(), y0.cpu(), t.cpu(), method=method, options=options)
    for a, b in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_waits_for_the_device(options, synchronisations):
    net, y0, t = problem()
    synchronisations.clear()
    for solver in (pykernels.odeint, pykernels.odeint_adjoint):
        states = solver(net, y0.clone().requires_grad_(), t.clone().requires_grad_(), method="rk4", options=options)
        states.square().sum().backward()
    assert synchronisations == []


def test_a_step_size_waits_for_the_device_once(synchronisations):
    net, y0, t = problem()
    synchronisations.clear()
    pykernels.odeint(net, y0, t, method="rk4", options={"step_size": 0.03, "interp": "cubic"})
    assert len(synchronisations) == 1


def test_captured_in_a_cuda_graph():
    net, y0, t = problem()
    y0.requires_grad_()

    def step():
        states = pykernels.odeint(net, y0, t, method="rk4")
        return states, *torch.autograd.grad(states.square().sum(), [y0, *net.parameters()])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        y0.mul_(0.5)
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
