"""
How dilation widens what a causal encoder sees
==============================================

A stack of causal convolutions with dilations 1, 2, 4, ... looks back over a time that doubles with every block, at a
cost that grows by one block. Above, the samples of a chirp that one output depends on, tap by tap; below, how strongly
each block's output at that moment depends on each sample of the past: the gradient of
:func:`pykernels.causal_conv1d`, measured and not drawn from a formula. Nothing to the right of the moment matters.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import LineCollection

import pykernels

KERNEL_SIZE, DEPTH = 3, 6
NOW, LENGTH = 300, 340  # samples
CHANNELS, SIGNALS = 16, 64

t = torch.arange(LENGTH, dtype=torch.float64)
chirp = torch.sin(2 * torch.pi * (t / 90 + (t / 75) ** 2 / 2)) * torch.exp(-(((t - 190) / 130) ** 2))

# %%
# The sensitivity is the root mean square, over random signals and over the channels, of the derivative of a block's
# output now with respect to each sample. One backward pass for each channel gives the derivatives for all signals.

encoder = pykernels.nn.CausalCNNEncoder(
    1, CHANNELS, DEPTH - 1, CHANNELS, 1, kernel_size=KERNEL_SIZE, dtype=torch.float64
)
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    for name, parameter in encoder.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 10)
        if name.endswith("original0"):  # the norms of the weights: convolutions that outweigh the skip connections
            parameter.fill_(2.5)

signals = (chirp + torch.randn(SIGNALS, 1, LENGTH, generator=generator, dtype=torch.float64)).requires_grad_()
sensitivity, h = [], signals
for block in encoder.blocks:
    h = block(h)
    squares = sum(
        torch.autograd.grad(h[:, channel, NOW].sum(), signals, retain_graph=True)[0].square().mean((0, 1))
        for channel in range(CHANNELS)
    )
    sensitivity.append((squares / CHANNELS).sqrt().numpy())

# Two convolutions to a block: each adds (K - 1) times its dilation to the reach.
reach = [2 * (KERNEL_SIZE - 1) * (2 ** (i + 1) - 1) for i in range(DEPTH)]
for values, past in zip(sensitivity, reach, strict=True):
    assert values[NOW - past] > 0
    assert not values[: NOW - past].any()
    assert not values[NOW + 1 :].any()

# %%
# The picture.

ink, paper = "#e8e6e3", "#12141c"
colors = plt.get_cmap("plasma")(np.linspace(0.35, 0.95, DEPTH))
plt.rcParams.update({"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink})
figure, (tree, ridges) = plt.subplots(
    2, sharex=True, figsize=(9, 8), facecolor=paper, height_ratios=(1, 1.15), layout="constrained"
)

# Every path of taps from the output now back to the samples, one level for each convolution.
nodes, level = {NOW}, 2 * DEPTH
for i in reversed(range(DEPTH)):
    for _ in range(2):
        taps = [(node, node - k * 2**i) for node in nodes for k in range(KERNEL_SIZE)]
        lines = [[(now, level), (then, level - 1)] for now, then in taps]
        tree.add_collection(
            LineCollection(lines, colors=[colors[i]], linewidths=0.6, alpha=min(1, 25 / len(nodes) ** 0.8))
        )
        nodes, level = {then for _, then in taps}, level - 1
tree.plot(t, 1.6 * chirp - 2, color=ink, linewidth=1)
tree.plot(NOW, 2 * DEPTH, "o", color=ink)
tree.annotate("output now", (NOW, 2 * DEPTH), (8, -3), textcoords="offset points")
tree.set_yticks([2 * i + 1 for i in range(DEPTH)], [f"dilation {2**i}" for i in range(DEPTH)])
tree.set_title("the taps that one output of the encoder sums over", loc="left")

for i, values in reversed(list(enumerate(sensitivity))):
    ridge = 1.9 * (values / values.max()) ** 0.5
    ridges.fill_between(t, i, i + ridge, color=colors[i], alpha=0.75, linewidth=0, zorder=DEPTH - i)
    ridges.plot([NOW - reach[i], NOW], [i, i], color=colors[i], linewidth=1.5, zorder=DEPTH - i)
    ridges.annotate(
        f"{reach[i]} samples", (NOW - reach[i], i), (-6, 3), textcoords="offset points", ha="right", color=colors[i]
    )
ridges.set_yticks(range(DEPTH), [f"block {i + 1}" for i in range(DEPTH)])
ridges.set_title(
    "how much the output of each block depends on the past (square root, each to its own scale)", loc="left"
)
ridges.set_xlabel("sample")
ridges.set_xlim(0, LENGTH)
for ax in (tree, ridges):
    ax.set_facecolor(paper)
    ax.axvline(NOW, color=ink, linewidth=0.6, linestyle=":")
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
