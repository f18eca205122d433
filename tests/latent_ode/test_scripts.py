"""Programs as users of torchdiffeq write them run as they are, with the import changed, and print the same."""

from __future__ import annotations

import pytest
import torch

SCRIPTS = {
    # Fitting a network to a spiral, with minibatches of short trajectories.
    "spiral": """
import torch
from torch import nn
from {module} import {odeint} as odeint

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
true_A = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
t = torch.linspace(0.0, 5.0, 50)

class Lambda(nn.Module):
    def forward(self, t, y):
        return torch.mm(y**3, true_A)

with torch.no_grad():
    true_y = odeint(Lambda(), torch.tensor([[2.0, 0.0]]), t, method="rk4")

class ODEFunc(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 2))
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        return self.net(y**3)

func = ODEFunc()
optimizer = torch.optim.RMSprop(func.parameters(), lr=1e-3)
for _ in range(3):
    start = torch.randint(40, (8,))
    batch_y = torch.stack([true_y[start + i] for i in range(6)])
    optimizer.zero_grad()
    pred_y = odeint(func, batch_y[0], t[:6], rtol=1e-7, atol=1e-9, method="rk4")
    loss = torch.mean(torch.abs(pred_y - batch_y))
    loss.backward()
    optimizer.step()
result = [loss.detach(), *(p.detach() for p in func.parameters()), torch.tensor(float(func.nfe))]
""",
    # A continuous normalising flow: the state with its log density, there and back.
    "flow": """
import torch
from torch import nn
from {module} import {odeint} as odeint

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

class CNF(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, t, states):
        z, logp_z = states
        with torch.set_grad_enabled(True):
            z.requires_grad_(True)
            dz_dt = self.net(torch.cat([z, t.expand(len(z), 1)], 1))
            trace = sum(torch.autograd.grad(dz_dt[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2))
        return (dz_dt, -trace.view(-1, 1))

func = CNF()
x = torch.randn(5, 2)
z_t, logp_diff_t = odeint(
    func, (x, torch.zeros(5, 1)), torch.tensor([1.0, 0.0]), atol=1e-5, rtol=1e-5, method="midpoint",
    options=dict(step_size=0.1),
)
loss = (z_t[-1].square().sum(1) - logp_diff_t[-1].view(-1)).mean()
loss.backward()
result = [z_t.detach(), logp_diff_t.detach(), *(p.grad for p in func.parameters())]
""",
    # A latent ODE: decoding at irregular times, with a closure and a learned time.
    "latent": """
import functools
import torch
from torch import nn
from {module} import {odeint} as odeint

torch.manual_seed(0)
drift, decoder = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()
solver = functools.partial(odeint, method="euler", options={{"step_size": 0.05}}{extra})
times = torch.tensor([0.0, 0.31, 0.32, 0.9], dtype=torch.float64)
end = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
z0 = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
states = solver(lambda t, z: torch.tanh(drift(z)) * torch.sin(t), z0, torch.cat([times, end[None]]))
decoder(states).permute(1, 0, 2).square().sum().backward()
result = [states.detach(), z0.grad, end.grad, drift.weight.grad]
""",
}


def run(name, module, odeint):
    extra = ", adjoint_params=tuple(drift.parameters())" if odeint == "odeint_adjoint" else ""
    namespace = {}
    dtype = torch.get_default_dtype()
    try:
        exec(compile(SCRIPTS[name].format(module=module, odeint=odeint, extra=extra), name, "exec"), namespace)
    finally:
        torch.set_default_dtype(dtype)
    return namespace["result"]


@pytest.mark.parametrize("odeint", ["odeint", "odeint_adjoint"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_same_results_with_the_import_changed(name, odeint):
    for ours, theirs in zip(run(name, "pykernels", odeint), run(name, "torchdiffeq", odeint), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
