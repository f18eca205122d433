"""Vector fields, and what a solver makes of them."""

from __future__ import annotations

import torch
from torch import nn

#: torchdiffeq has no others.
SHARED = ("euler", "midpoint", "heun2", "heun3", "rk4")
TIMES = torch.tensor([0.3, 0.5, 0.9, 1.0, 1.7], dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "step_size": {"step_size": 0.13},
    "step_size-as-a-tensor": {"step_size": torch.tensor(0.13, dtype=torch.float64)},
    "step_size-on-the-times": {"step_size": 0.1},
    "cubic": {"step_size": 0.13, "interp": "cubic"},
    "cubic-without-steps": {"interp": "cubic"},
    "perturb": {"perturb": True},
    "perturb-cubic": {"perturb": True, "step_size": 0.3, "interp": "cubic"},
    "grid": {"grid_constructor": lambda func, y0, t: torch.cat([t[:1], (t[:-1] + t[1:]) / 2, t[-1:]])},
    "grid-cubic": {"grid_constructor": lambda func, y0, t: torch.cat([t[:2], t[3:]]), "interp": "cubic"},
    "grid-without-gradient": {
        "grid_constructor": lambda func, y0, t: torch.linspace(t[0].item(), t[-1].item(), 7, dtype=t.dtype),
    },
    "norm": {"norm": lambda y: y.abs().max()},
}


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Net(nn.Module):
    """A field of any shape with three states in the last dimension, which depends on time."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(random(3, 3, dtype=dtype, seed=7))
        self.bias = nn.Parameter(random(3, dtype=dtype, seed=8))

    def forward(self, t, y):
        return torch.tanh(y @ self.weight + self.bias * t) - 0.3 * y * t.cos()


class PairNet(Net):
    """States of two shapes."""

    def forward(self, t, state):
        y, z = state
        return super().forward(t, y) * z.sin().mean(), -z * y.mean() * t


class ComplexNet(Net):
    def forward(self, t, y):
        return torch.tanh(y @ self.weight.to(y.dtype)) - (0.3j + t + self.bias) * y


def results(solver, net, y0, t, **keywords):
    """States, and gradients with respect to everything, of a loss that weights all states differently."""
    tensors = y0 if isinstance(y0, tuple) else (y0,)
    leaves = [x.clone().requires_grad_() for x in (*tensors, t)]
    states = solver(net, tuple(leaves[:-1]) if isinstance(y0, tuple) else leaves[0], leaves[-1], **keywords)
    outputs = states if isinstance(states, tuple) else (states,)
    loss = sum((random(*x.shape, dtype=x.dtype, seed=3) * x).abs().square().sum() for x in outputs)
    wanted = [*leaves, *net.parameters()]
    return [x.detach() for x in outputs], torch.autograd.grad(loss, wanted)


def assert_same(actual, expected, tolerance=1e-10):
    for a, b in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())
