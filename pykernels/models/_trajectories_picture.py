"""A picture of learned dynamics in the plane. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pykernels._errors import require
from pykernels.models._picture import COLOURS, _saved

SHOWN = 4  # trajectories
GRID = 15  # points of the vector fields along each axis

Array = npt.NDArray[Any]


def trajectories_picture(
    times: Array,
    true: Array,
    predicted: Array,
    fields: tuple[Callable[[Array], Array], Callable[[Array], Array]],
    losses: Array,
    validations: Sequence[tuple[int, float]],
    *,
    title: str,
    names: tuple[str, str],
    suffix: str = ".png",
) -> bytes:
    """Trajectories in time and in the plane, the vector fields behind them, and the losses.

    Args:
        times: shape (T,).
        true, predicted: trajectories, shape (N, T, 2), of which the first four are shown.
        fields: the true and the learned derivative, each of states (..., 2) into (..., 2).
        losses: of the training steps.
        validations: steps and errors.
        title: of the whole.
        names: of the two coordinates.
        suffix: format of the picture.
    """
    figure_module = require("matplotlib.figure", "matplotlib", "plot", "a picture")
    figure = figure_module.Figure(figsize=(11, 8.5), layout="constrained")
    (in_time, in_plane), (arrows, curve) = figure.subplots(2, 2)
    figure.suptitle(title, fontsize=12)

    for i, colour in zip(range(min(SHOWN, len(true))), COLOURS, strict=False):
        first = i == 0
        in_time.plot(times, true[i, :, 0], "o", color=colour, markersize=3, label="observed" if first else None)
        in_time.plot(times, predicted[i, :, 0], color=colour, linewidth=1.2, label="forecast" if first else None)
        in_plane.plot(*true[i].T, "o", color=colour, markersize=3)
        in_plane.plot(*predicted[i].T, color=colour, linewidth=1.2)
        in_plane.plot(*true[i, 0], "o", color=colour, markersize=9, markerfacecolor="none")
    in_time.set(xlabel="time", ylabel=names[0], title="Test trajectories, forecast from their first states")
    in_plane.set(xlabel=names[0], ylabel=names[1], title="The same in the phase plane")
    in_time.legend(frameon=False, fontsize=9)

    low, high = true.min((0, 1)), true.max((0, 1))
    grid = np.stack(np.meshgrid(*np.linspace(low, high, GRID).T), -1)
    exact, learned = (field(grid) for field in fields)
    error = np.linalg.norm(learned - exact, axis=-1)
    shade = arrows.pcolormesh(grid[..., 0], grid[..., 1], error, shading="gouraud", cmap="Blues")
    figure.colorbar(shade, ax=arrows, label="norm of the difference")
    scale = 0.8 * np.abs(exact).max() * GRID
    for values, colour, label in ((exact, "black", "true"), (learned, COLOURS[1], "learned")):
        arrows.quiver(
            grid[..., 0], grid[..., 1], *np.moveaxis(values, -1, 0), color=colour, scale=scale, width=0.004, label=label
        )
    arrows.set(xlabel=names[0], ylabel=names[1], title="Vector fields")
    arrows.legend(fontsize=9, loc="upper right")

    curve.plot(np.arange(1, len(losses) + 1), losses, color=COLOURS[0], linewidth=0.8, label="training")
    if validations:
        curve.plot(*zip(*validations, strict=True), "o-", color=COLOURS[1], markersize=3, label="validation")
    curve.set(xlabel="training step", ylabel="mean squared error", title="Losses", yscale="log")
    curve.legend(frameon=False, fontsize=9)
    for panel in (in_time, in_plane, arrows, curve):
        panel.spines[["top", "right"]].set_visible(False)
    return _saved(figure, suffix)
