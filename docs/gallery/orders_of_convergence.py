"""
What a step of each method buys
===============================

The error of a pendulum's state after ten units of time, against what it costs: evaluations of the vector field. On
logarithmic axes each method of :func:`pykernels.odeint` draws a line whose slope is its order. Methods of one order
differ by a constant: the two of order four, Kutta's 3/8 rule (`rk4`) and the textbook's (`rk4_classic`), hardly do.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import pykernels
from pykernels.data import Pendulum

ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "ssp_rk3": 3, "rk4_classic": 4, "rk4": 4}
STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "ssp_rk3": 3, "rk4_classic": 4, "rk4": 4}
STEPS = 2 ** np.arange(5, 11)
DURATION = 10.0

pendulum = Pendulum(period=6.0, damping=0.2)
start = np.array([[2.0, 0.0]])
exact = pendulum.solve(start, [0.0, DURATION])[0, -1]

# %%
# One call for each method and number of steps. The last slope is the order, to within 0.2.

errors = {}
for method, order in ORDERS.items():
    ends = [
        pykernels.odeint(
            lambda t, y: pendulum.field(y),
            torch.tensor(start),
            torch.linspace(0, DURATION, steps + 1, dtype=torch.float64),
            method=method,
        )[-1, 0]
        for steps in STEPS
    ]
    errors[method] = np.array([np.linalg.norm(end.numpy() - exact) for end in ends])
    slope = -np.diff(np.log2(errors[method]))[-2:].mean()
    print(f"{method:12} order {order}, measured {slope:.2f}")
    assert abs(slope - order) < 0.2

# %%
# The picture.

figure, ax = plt.subplots(figsize=(7.5, 5), layout="constrained")
colors = plt.get_cmap("viridis")(np.linspace(0, 0.85, 4))
for (method, values), marker in zip(errors.items(), "os^vDPX", strict=True):
    color = colors[ORDERS[method] - 1]
    hollow = method in ("heun2", "rk4")  # they lie on others
    ax.loglog(
        STAGES[method] * STEPS,
        values,
        marker=marker,
        color=color,
        markersize=9 if hollow else 5,
        fillstyle="none" if hollow else "full",
        linewidth=1,
        label=method,
    )
ax.set(
    xlabel="evaluations of the vector field",
    ylabel="error of the state at time 10",
    title="fixed-step methods on a damped pendulum",
)
ax.legend(frameon=False, ncols=2)
ax.grid(alpha=0.2)
ax.spines[["top", "right"]].set_visible(False)
