"""Causal convolution in plain PyTorch: the definition that the other backends are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pykernels.backends import exporting


def activate(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """``act(z)`` for an activation name of this family."""
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    if activation == "tanh":
        return torch.tanh(z)
    return z


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dilation: int,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """``act(conv(pad(x))) + residual``, see :func:`pykernels.causal_conv1d`. Any dtype, device, order of derivative."""
    length = x.shape[2]
    # Taps that lie wholly before the start of the data add nothing; without them the padding stays short. An exported
    # program keeps them, since it must fit all lengths.
    live = weight.shape[2] if exporting() else max(1, min(weight.shape[2], (length - 1) // dilation + 1))
    if x.shape[0] == 0 or length == 0:  # F.conv1d accepts neither; keep the result in the graph
        y = torch.einsum("bct,oc->bot", x, weight.sum(2))
    else:
        padded = F.pad(x, ((live - 1) * dilation, 0))
        y = F.conv1d(padded, weight[:, :, weight.shape[2] - live :], dilation=dilation)
    if bias is not None:
        y = y + bias[:, None]
    y = activate(y, activation, negative_slope)
    return y if residual is None else y + residual
