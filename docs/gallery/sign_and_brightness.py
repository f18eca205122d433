"""
Which way a flow moves an image, and how bright it stays
========================================================

Left, an image after one warp, with its outlines before: output pixel *x* reads around *x - flow(x)*, so that what is
shown moves along the arrows. In the middle one such pixel, and how strongly it depends on each pixel of the image: the
gradient of :func:`pykernels.gaussian_warp`, measured. Right, what a white image becomes for displacements of parts of a
pixel along both axes: the raw sum over the Gaussian's density flickers once its standard deviation is well below a
pixel, by a factor of 0.19 to 2.55 at a quarter; the default, a mean, stays white.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import pykernels

SIZE, VARIANCE = 96, 1.2

# %%
# A vortex turns three spots by up to ten pixels. The motion is that of a stream function, so that it has no divergence
# but for its discretisation.

y, x = torch.meshgrid(torch.arange(SIZE).double(), torch.arange(SIZE).double(), indexing="ij")


def spot(x0: float, y0: float, width: float) -> torch.Tensor:
    return torch.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * width**2))


centre = (SIZE - 1) / 2
image = spot(centre, 22, 6) + 0.8 * spot(24, 60, 8) + 0.6 * spot(74, 62, 5)
swirl = 0.5 * torch.exp(-((x - centre) ** 2 + (y - centre) ** 2) / (2 * 32**2))
flow = swirl * torch.stack([-(y - centre), x - centre])  # channel 0 along the last axis; y grows downwards
assert 9 < flow.norm(dim=0).max() < 11
assert pykernels.flow_penalties(flow[None], divergence=1.0) < 1e-2 * pykernels.flow_penalties(
    flow[None], smoothness=1.0
)

moved = pykernels.gaussian_warp(image[None, None], flow[None], VARIANCE)[0, 0]

# %%
# One pixel: the gradient of its value is the window that it reads, around x - flow(x).

column, row = 30, 40
leaf = image.clone().requires_grad_()
value = pykernels.gaussian_warp(leaf[None, None], flow[None], VARIANCE)[0, 0, row, column]
(window,) = torch.autograd.grad(value, leaf)
dx, dy = flow[:, row, column].tolist()
read = (column - dx, row - dy)
weighted = [float((window * axis).sum()) for axis in (x, y)]
assert np.abs(np.subtract(weighted, read)).max() < 1e-3

# %%
# A white image, displaced by fractions of a pixel along both axes.

displacements = torch.linspace(-1, 1, 201).double()
white = torch.ones(201, 1, 9, 9).double()
motions = displacements.view(-1, 1, 1, 1).expand(-1, 2, 9, 9)
deviations = (0.25, 0.35, 0.45, 0.95)
brightness = {
    deviation: pykernels.gaussian_warp(white, motions, deviation**2, form="density", normalize="none")[:, 0, 4, 4]
    for deviation in deviations
}
mean = pykernels.gaussian_warp(white, motions, 0.25**2)[:, 0, 4, 4]
assert abs(brightness[0.25].max() - 2.55) < 0.005
assert abs(brightness[0.25].min() - 0.187) < 0.001
assert (mean - 1).abs().max() < 1e-12

# %%
# The picture.

ink, paper = "#e8e6e3", "#12141c"
plt.rcParams.update({"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink})
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 5), facecolor=paper, layout="constrained")

left.imshow(moved.numpy(), cmap="inferno", vmin=0, vmax=1)
left.contour(image.numpy(), levels=(0.25, 0.5), colors=ink, linewidths=0.7, linestyles="--")
every = slice(4, None, 8)
arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "color": "#7fd1ff"}
left.quiver(*(t[every, every].numpy() for t in (x, y, *flow)), width=0.004, alpha=0.8, **arrows)
left.plot(column, row, "s", color="white", markersize=4)
left.set_title("after the warp; dashed before; arrows: the flow", loc="left")

middle.imshow(window.numpy(), cmap="inferno")
middle.quiver(*read, dx, dy, width=0.012, **arrows)
middle.plot(column, row, "s", color="white", markersize=9)
middle.plot(*read, "+", color="white", markersize=12, markeredgewidth=2)
middle.annotate("x, the pixel computed", (column, row), (-8, 10), textcoords="offset points", ha="right", color="white")
middle.annotate("x - flow(x)", read, (48, -4), textcoords="offset points", color="white")
middle.set(xlim=(18.5, 40.5), ylim=(51.5, 29.5), xticks=(20, 25, 30, 35, 40), yticks=(30, 35, 40, 45, 50))
middle.set_title("what one pixel reads: its weights", loc="left")

colors = plt.get_cmap("plasma")(np.linspace(0.3, 0.95, len(deviations)))
for (deviation, values), color in zip(brightness.items(), colors, strict=True):
    right.plot(displacements.numpy(), values.numpy(), color=color, label=f"raw sum, deviation {deviation}")
right.plot(displacements.numpy(), mean.numpy(), color=ink, linestyle="--", label="the default, deviation 0.25")
right.set(yscale="log", xlabel="displacement along both axes, pixels", facecolor=paper)
right.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
right.minorticks_off()
right.legend(facecolor=paper, edgecolor="none", labelcolor=ink, loc="upper center", fontsize=8)
right.set_ylim(0.15, 9)
right.set_title("brightness of a white image", loc="left")
for ax in (left, middle, right):
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
