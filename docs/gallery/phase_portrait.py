"""
What a network has learned of a pendulum
========================================

Left, the flow of a damped pendulum: short trajectories, in the colours of their energy. Right, the flow of a
network that has seen the white dots, 25 noisy trajectories, and no equation. Near them the two are the same: the
spiral into rest at the bottom. Away from them the network has missed that a pendulum can go over the top, where
trajectories part. All trajectories of a flow are one call of :func:`pykernels.odeint`.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize

import pykernels
from pykernels.data import damped_pendulum

WIDTH, HEIGHT = 3.6, 2.7  # of the shown half plane
TRAJECTORIES, DURATION, STEPS = 9000, 1.2, 24

# %%
# The network learns from whole trajectories, each predicted from its first state.

data = damped_pendulum(seed=0)
torch.manual_seed(0)
field = pykernels.nn.MLPField((2, 64, 64, 2), "silu")
optimizer = torch.optim.Adam(field.parameters(), lr=5e-3)
times = torch.tensor(data.times, dtype=torch.float32)
observed = torch.tensor(data.train, dtype=torch.float32).transpose(0, 1)
for _ in range(500):
    optimizer.zero_grad()
    loss = (pykernels.odeint(field, observed[0], times, method="rk4") - observed).square().mean()
    loss.backward()
    optimizer.step()

# %%
# The same starting points for both flows, spread evenly by a Kronecker sequence.

golden = np.array([0.7548776662466927, 0.5698402909980532])
start = (2 * ((0.5 + np.outer(np.arange(TRAJECTORIES), golden)) % 1) - 1) * [2 * WIDTH, HEIGHT + 0.8]
t = torch.linspace(0, DURATION, STEPS + 1)
with torch.no_grad():
    flows = [
        pykernels.odeint(vector_field, torch.tensor(start, dtype=torch.float32), t, method="rk4")
        for vector_field in (lambda t, y: data.pendulum.field(y), field)
    ]

# %%
# The picture. Lines grow from faint to strong in the direction of time.

ink, paper = "#e8e6e3", "#12141c"
plt.rcParams.update({"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink})
figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, facecolor=paper, layout="constrained")
colors = plt.get_cmap("plasma")
energies = data.pendulum.energy(np.array([[np.pi, 0.0], [0.0, 0.0]]))
scale = Normalize(0, 1.4 * energies[0])  # the energy of the pendulum at rest upside down, and some more
fade = np.linspace(0.02, 0.9, STEPS)
for ax, flow, title in zip(axes, flows, ("the pendulum", "learned from the dots"), strict=True):
    states = flow.numpy()
    pieces = np.stack([states[:-1], states[1:]], 2)  # (steps, trajectories, two ends, 2)
    shades = colors(scale(data.pendulum.energy(states[:-1])))
    shades[..., 3] = fade[:, None]
    ax.add_collection(LineCollection(pieces.reshape(-1, 2, 2), colors=shades.reshape(-1, 4), linewidths=0.5))
    ax.set(xlim=(-WIDTH, WIDTH), ylim=(-HEIGHT, HEIGHT), xlabel="angle", facecolor=paper)
    ax.set_xticks([-np.pi, 0, np.pi], ["-π", "0", "π"])
    ax.set_title(title, loc="left")
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
axes[0].set_ylabel("angular velocity")
axes[1].plot(*data.train.reshape(-1, 2).T, ".", color="white", markersize=1.5, alpha=0.7)
