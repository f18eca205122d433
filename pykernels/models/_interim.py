"""Stands in for pykernels.odeint and pykernels.nn.MLPField until they are merged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pykernels.ops.latent_ode.tableaux import TABLEAUX


class MLPField(nn.Module):
    def __init__(self, dims: Any, activation: str = "relu", *, dtype: Any = None, device: Any = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in zip(dims[:-1], dims[1:], strict=True):
            layers += [nn.Linear(a, b, dtype=dtype, device=device), {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, t: Any, y: Tensor) -> Tensor:
        out: Tensor = self.net(y)
        return out


def odeint(func: Any, y0: Tensor, t: Tensor, *, method: str, options: Any = None) -> Tensor:
    tableau = TABLEAUX[method]
    h = (options or {}).get("step_size")
    out = [y0]
    for t0, t1 in zip(t[:-1].tolist(), t[1:].tolist(), strict=True):
        n = 1 if h is None else max(1, round((t1 - t0) / h))
        step, y = (t1 - t0) / n, out[-1]
        for _ in range(n):
            k: list[Tensor] = []
            for row in tableau.a:
                z = y
                for a, ki in zip(row, k, strict=True):
                    z = z + step * a * ki
                k.append(func(None, z))
            for b, ki in zip(tableau.b, k, strict=True):
                y = y + step * b * ki
        out.append(y)
    return torch.stack(out)
