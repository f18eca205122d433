"""
One sample, and wider and wider networks
========================================

Above, a single sample and a single point of data, the cross: arrows say where the sample goes from each place, the
darker the faster, once the discriminator has been trained on the two. All of it happens in the plane of the two points,
in two dimensions or in 512. Below, discriminators of finite width trained by ten steps of gradient ascent, beside the
limit that :class:`pykernels.models.gantk.InfiniteDiscriminator` gives in closed form. Dots below are samples, dots
above are data.
"""

import matplotlib.pyplot as plt
import numpy as np

from pykernels.models.gantk import KERNELS, InfiniteDiscriminator
from pykernels.models.gantk_protocols import adequacy, dirac_field

# %%
# Four fields of a single sample, and two comparisons of widths.

fields = {
    f"{KERNELS[kernel].title}, {dimension} dimensions": dirac_field(
        InfiniteDiscriminator(kernel, "ipm"), dimension=dimension, n_points=16
    )
    for kernel, dimension in (("relu", 2), ("relu", 512), ("relu_no_bias", 2), ("rbf", 2))
}
comparisons = {loss: adequacy(loss, widths=(16, 64, 256), n_networks=4) for loss in ("ipm", "lsgan")}

# %%
# The picture.

figure = plt.figure(figsize=(12, 6), layout="constrained")
above, below = figure.subfigures(2, 1, height_ratios=(1, 1.5))
for ax, (title, (places, directions)) in zip(above.subplots(1, 4), fields.items(), strict=True):
    speed = np.linalg.norm(directions, axis=1)
    unit = directions[:, :2] / np.maximum(speed, 1e-30)[:, None]
    ax.quiver(*places[:, :2].T, *unit.T, speed, cmap="viridis_r", pivot="mid", scale=20, width=0.009)
    ax.plot(1, 0, "X", color="#D55E00", markersize=11, markeredgecolor="white")
    ax.set_title(title, fontsize=10)
    ax.set(aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
for ax, (loss, result) in zip(below.subplots(1, 2), comparisons.items(), strict=True):
    for width, colour in zip(result.finite, ("#c6dbef", "#6baed6", "#2171b5"), strict=True):
        ax.plot(result.points, result.finite[width].T, color=colour, linewidth=1)
        ax.plot([], [], color=colour, label=f"width {width}")
    ax.plot(result.points, result.infinite, color="black", linewidth=2, label="infinite width")
    low, high = result.infinite.min(), result.infinite.max()
    ax.plot(result.fake, np.full_like(result.fake, low), "o", color="#E69F00", clip_on=False)
    ax.plot(result.real, np.full_like(result.real, high), "o", color="#009E73", clip_on=False)
    ax.set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
    ax.set_title({"ipm": "IPM, after the time 1", "lsgan": "LSGAN, after the time 1"}[loss], fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
