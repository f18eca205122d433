"""
Motion and diffusion from two images
====================================

Two images of a tracer that a vortex carries along and that diffuses: what was the motion, and how strong the diffusion?
Both are found by gradient descent through :func:`pykernels.gaussian_warp`, in half a second. Images alone do not say
enough; penalties of the motion field supply the rest.

For the pictures matplotlib is needed (the extra ``plot``).
"""

# %%
# The images
# ----------
# A smooth random field, and the same after one step of advection and diffusion, with a little noise. Output pixel x
# reads around ``x - motion(x)``: what is shown moves along the motion. Channel 0 is the motion along the last axis.

import matplotlib.pyplot as plt
import torch

import pykernels

torch.manual_seed(0)
SIZE, VARIANCE = 64, 0.6
y, x = torch.meshgrid(torch.arange(SIZE) - 31.5, torch.arange(SIZE) - 31.5, indexing="ij")

rest = torch.zeros(1, 2, SIZE, SIZE)
before = pykernels.gaussian_warp(torch.randn(1, 1, SIZE, SIZE), rest, 9.0, padding_mode="periodic")
before /= before.std()
vortex = 0.25 * torch.exp(-(x**2 + y**2) / (2 * 14**2))
motion = torch.stack([-vortex * y, vortex * x])[None]
after = pykernels.gaussian_warp(before, motion, VARIANCE, padding_mode="periodic")
after += 0.05 * torch.randn_like(after)

# %%
# The search
# ----------
# The unknowns are a displacement for each pixel and one variance, which :class:`pykernels.nn.GaussianWarp` keeps
# positive. The loss is the squared difference of the images, and :func:`pykernels.flow_penalties` of the motion.


def estimate(**penalties: float) -> tuple[torch.Tensor, float, float]:
    """The motion, the variance, and the mean squared difference that is left."""
    flow = torch.zeros(1, 2, SIZE, SIZE, requires_grad=True)
    warp = pykernels.nn.GaussianWarp(2.0, learnable=True, padding_mode="periodic")
    optimizer = torch.optim.Adam([{"params": [flow], "lr": 0.05}, {"params": warp.parameters(), "lr": 0.03}])
    for _ in range(200):
        optimizer.zero_grad()
        difference = (warp(before, flow) - after).square().mean()
        (difference + pykernels.flow_penalties(flow, **penalties)).backward()
        optimizer.step()
    return flow.detach(), warp.variance.item(), difference.item()


found = {
    "no penalty": estimate(),
    "smooth": estimate(smoothness=0.03),
    "smooth, and without sources": estimate(smoothness=0.03, divergence=0.3),
}
errors = {name: (flow - motion).square().sum(1).mean().sqrt().item() for name, (flow, _, _) in found.items()}
print(f"the motion: {motion.square().sum(1).mean().sqrt():.2f} pixels, root mean square; the variance: {VARIANCE}")
for name, (_, variance, difference) in found.items():
    print(f"{name}: error {errors[name]:.2f} pixels, variance {variance:.2f}, difference {difference:.5f}")

# %%
# Without a penalty each pixel moves to wherever the other image has its value. The difference vanishes, noise
# included, and the motion is hardly better than none. Smooth motions explain the images up to the noise, whose
# variance is 0.0025, and are found to a fraction of a pixel; the vortex has no sources, and to know that helps again.

assert errors["smooth, and without sources"] < errors["smooth"] < 0.25 < 1 < errors["no penalty"]
assert all(abs(found[name][1] - VARIANCE) < 0.08 for name in found if name != "no penalty")

# %%
# The pictures
# ------------

figure, axes = plt.subplots(1, 5, figsize=(15, 3.4), layout="constrained")
for ax, image, title in zip(axes, (before, after), ("before", "after"), strict=False):
    ax.imshow(image[0, 0].numpy(), cmap="RdBu_r", vmin=-2.5, vmax=2.5)
    ax.set_title(title)
fields = {"the motion": motion, **{name: flow for name, (flow, _, _) in found.items() if name != "smooth"}}
every = slice(2, None, 4)
for ax, (name, flow) in zip(axes[2:], fields.items(), strict=True):
    u, v = flow[0, :, every, every].numpy()
    ax.quiver((x + 31.5)[every, every].numpy(), (y + 31.5)[every, every].numpy(), u, v,
              angles="xy", scale_units="xy", scale=0.8, width=0.004)  # fmt: skip
    ax.set(title=name, aspect="equal", xlim=(0, SIZE - 1), ylim=(SIZE - 1, 0))
for ax in axes:
    ax.set(xticks=[], yticks=[])
