"""
Where a GAN sends its samples
=============================

Four discriminators without a single weight: infinitely wide networks, trained in closed form to tell the points in the
middle from those around. Colour is their value, lines are where they send a sample. Those of ReLU networks grow
without end: at first they send everything outwards, past the data too, and turn around only as samples arrive. A
sigmoid sees directions, and little else. The radial kernel calls back what has gone too far, and fades with the
distance. Each picture is one call of :meth:`pykernels.NTK.witness`, the one that moves all particles in
:doc:`/systems/gantk`.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

from pykernels.data import eight_gaussians
from pykernels.models.gantk import KERNELS, InfiniteDiscriminator

REACH, PIXELS = 9.0, 60

# %%
# The value and the gradient of each discriminator on a grid.

data = eight_gaussians(100, seed=1)
points = torch.tensor(np.concatenate([data.fake, data.real]))
axis = torch.linspace(-REACH, REACH, PIXELS, dtype=torch.float64)
grid = torch.cartesian_prod(axis, axis)
fields = {}
for name in ("relu", "relu_no_bias", "sigmoid", "rbf"):
    discriminator = InfiniteDiscriminator(name, "ipm")
    discriminator.train(points, len(data.fake))
    value, gradient = discriminator(grid)
    fields[KERNELS[name].title] = value.reshape(PIXELS, PIXELS).T, -gradient.T.reshape(2, PIXELS, PIXELS).mT

# %%
# The picture. Where it is dark, samples are taken for generated.

paper, ink = "#101321", "#e9e4d8"
figure, axes = plt.subplots(1, 4, figsize=(14, 4), facecolor=paper, layout="constrained")
for ax, (title, (value, direction)) in zip(axes, fields.items(), strict=True):
    middle, spread = value.median(), (value - value.median()).abs().quantile(0.98)
    shade = -((value - middle) / spread).numpy()
    extent = (-REACH, REACH, -REACH, REACH)
    ax.imshow(shade, origin="lower", extent=extent, cmap="magma", vmin=-1.3, vmax=1.3, interpolation="bilinear")
    u, v = direction.numpy()
    ax.streamplot(axis.numpy(), axis.numpy(), u, v, color=(1, 1, 1, 0.45), linewidth=0.7, density=1.1, arrowsize=0.7)
    ax.plot(*data.real.T, "o", color="#5fd3bc", markersize=2.5)
    ax.plot(*data.fake.T, "o", color=ink, markersize=1.5)
    ax.set_title(title, color=ink, fontsize=11)
    ax.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set_visible(False)
