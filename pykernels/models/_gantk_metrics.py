"""Distances between two clouds of points."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

import numpy as np
import numpy.typing as npt
import torch

from pykernels._errors import InputError, require

BLUR, SCALING = 0.001, 0.95  # as published


def half_squared_w2(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Half the squared 2-Wasserstein distance of two clouds of as many points, exactly.

    It is the least mean of ``|x_i - y_s(i)|^2 / 2`` over all assignments s. Needs SciPy (the extra ``gantk``).

    Args:
        x, y: both (N, d).

    Raises:
        InputError: if they have other shapes, or numbers that are not finite. A :class:`ValueError`.
    """
    optimize = require("scipy.optimize", "scipy", "gantk", "the exact distance")
    x, y = _clouds(x, y)
    if len(x) != len(y):
        raise InputError(f"x and y must have as many points for the exact distance, got {len(x)} and {len(y)}")
    # Differences, not norms and products, which would lose the digits of small distances.
    cost = np.zeros((len(x), len(y)))
    for first, second in zip(x.T, y.T, strict=True):
        cost += np.square(first[:, None] - second) / 2
    rows, columns = optimize.linear_sum_assignment(cost)
    return float(cost[rows, columns].mean())


def sinkhorn_divergence(x: npt.ArrayLike, y: npt.ArrayLike, *, blur: float = BLUR, scaling: float = SCALING) -> float:
    """The Sinkhorn divergence of two clouds for the cost ``|x - y|^2 / 2``, by GeomLoss (the extra ``gantk``).

    Close to half the squared 2-Wasserstein distance, down to about ``blur**2``. The defaults are the published ones.

    Args:
        x, y: (N, d) and (M, d).
        blur, scaling: of ``geomloss.SamplesLoss``.

    Raises:
        InputError: if they have other shapes, or numbers that are not finite. A :class:`ValueError`.
        MissingExtraError: if GeomLoss is not installed. A :class:`ModuleNotFoundError`.
    """
    with redirect_stdout(sys.stderr):  # where KeOps says that it finds no GPU
        geomloss = require("geomloss", "geomloss", "gantk", "the Sinkhorn divergence")
    x, y = _clouds(x, y)
    loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, scaling=scaling, backend="tensorized")
    return float(loss(torch.from_numpy(x), torch.from_numpy(y)))


def _clouds(x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    x, y = (np.array(cloud, dtype=np.float64) for cloud in (x, y))
    for name, cloud in (("x", x), ("y", y)):
        if cloud.ndim != 2 or not cloud.size or cloud.shape[1] != x.shape[1]:
            raise InputError(f"{name} must have shape (N, d), of the same d as the other cloud, got {cloud.shape}")
        if not np.isfinite(cloud).all():
            raise InputError(f"{name} contains {'NaN' if np.isnan(cloud).any() else 'infinity'}")
    return x, y
