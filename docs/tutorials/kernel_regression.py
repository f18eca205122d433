"""
Regression by networks of infinite width
========================================

What does a wide network learn from a few points? The answer in the limit of infinite width needs no training: it is
regression by the tangent kernel. Here it is beside networks that are trained, and beside the kernel that a finite
network has. Everything runs in a few seconds on one core.

Needed are the extras ``models`` and ``plot``.
"""

# %%
# A few points of a curve
# -----------------------

import matplotlib.pyplot as plt
import numpy as np
import torch

torch.manual_seed(0)
angles = np.array([-2.6, -1.9, -1.2, -0.3, 0.6, 0.9, 1.8, 2.6])


def on_circle(angle):
    """As points of the plane, where the ReLU kernel has no preferred origin."""
    return np.stack([np.cos(angle), np.sin(angle)], -1)


values = np.sin(2 * angles) + 0.5 * np.cos(3 * angles)
grid = np.linspace(-np.pi, np.pi, 200)

# %%
# The limit
# ---------
# :class:`~pykernels.sklearn.NTKRegressor` is an estimator of scikit-learn. ``alpha`` is the ridge; hardly any is what
# training to the end amounts to.

from pykernels.sklearn import NTKRegressor

limit = NTKRegressor(depth=2, weight_std=2**0.5, bias_std=0.1, alpha=1e-8).fit(on_circle(angles), values)
print(f"largest error at the points {np.abs(limit.predict(on_circle(angles)) - values).max():.1e}")

# %%
# Networks that are trained
# -------------------------
# Layers in the NTK parametrisation: standard normal weights, scaled by the square root of 2 over the number of inputs.
# Predictions are those of the trained network minus those it began with, and gradient descent is that of the mean.

from torch import nn


class Layer(nn.Linear):
    """A linear map with weights that begin standard normal, whatever its size."""

    def __init__(self, inputs, outputs, bias=True):
        super().__init__(inputs, outputs, bias)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.scale = (2 / inputs) ** 0.5

    def forward(self, x):
        y = nn.functional.linear(self.scale * x, self.weight)
        return y if self.bias is None else y + 0.1 * self.bias


def wide_network(width):
    return nn.Sequential(Layer(2, width), nn.ReLU(), Layer(width, width), nn.ReLU(), Layer(width, 1, bias=False))


x = torch.tensor(on_circle(angles), dtype=torch.float32)
y = torch.tensor(values - values.mean(), dtype=torch.float32)[:, None]
fine = torch.tensor(on_circle(grid), dtype=torch.float32)


def trained(width, steps=600, rate=0.1):
    network = wide_network(width)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    with torch.no_grad():
        first, at_points = network(fine), network(x)
    for _ in range(steps):
        optimizer.zero_grad()
        (network(x) - at_points - y).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return (network(fine) - first).squeeze(1).numpy() + values.mean()


figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
for ax, width in zip(axes, (32, 512), strict=True):
    for _ in range(3):
        ax.plot(grid, trained(width), color="tab:blue", alpha=0.5, linewidth=1)
    ax.plot(grid, limit.predict(on_circle(grid)), color="black", label="infinite width")
    ax.plot(angles, values, "o", color="tab:red")
    ax.set(title=f"three networks of width {width}", xlabel="angle")
axes[0].legend(frameon=False)

# %%
# The kernel of a finite network
# ------------------------------
# :func:`pykernels.empirical_ntk` is the tangent kernel of a network as it is. It comes closer to the limit as the
# network gets wider, by one over the square root of the width.

import pykernels

kernel = pykernels.NTK(2, weight_std=2**0.5, bias_std=0.1).gram(x)
widths, distances = (16, 64, 256, 1024), []
for width in widths:
    found = [pykernels.empirical_ntk(wide_network(width), x) for _ in range(5)]
    distances.append(float(torch.stack([(f - kernel).norm() / kernel.norm() for f in found]).mean()))
    print(f"width {width:4d}: {distances[-1]:.3f} from the limit")

figure, ax = plt.subplots(figsize=(5, 3.5), layout="constrained")
ax.loglog(widths, distances, "o-", label="mean of five networks")
ax.loglog(widths, distances[0] * (np.array(widths) / widths[0]) ** -0.5, "--", color="gray", label="slope -1/2")
ax.set(xlabel="width", ylabel="relative distance to the limit")
ax.legend(frameon=False)
