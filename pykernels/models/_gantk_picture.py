"""Pictures and an animation of particles under a discriminator. They need matplotlib (the extra ``plot``)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pykernels._errors import require
from pykernels.models._picture import COLOURS, _saved

Array: TypeAlias = npt.NDArray[np.float64]
Field: TypeAlias = Callable[[Array, Array], Array | None]

ARROWS = 19  # along each axis
SHOWN_FRAMES = 30
MILLISECONDS = 120  # that a frame of the animation is shown
STILL = 10  # times as long for the last one
IMAGES = (6, 6)  # rows and columns of those that are shown
FAKE, REAL = COLOURS[1], COLOURS[0]


def descent_picture(
    frames: Sequence[tuple[int, Array]],
    real: Array,
    distances: Sequence[tuple[int, float]],
    field: Field | None,
    *,
    title: str,
    unit: str = "half squared 2-Wasserstein distance",
    pixels: tuple[int, int] | None = None,
    suffix: str = ".png",
) -> bytes:
    """Points at first, in between and at the end, beside their target, and the distance to it.

    In the plane, arrows show where the discriminator sends a particle; their colour is how fast, as a share of the
    fastest. Where points are images, some are shown.

    Args:
        frames: steps and positions, (N, d).
        real: the target, (M, d).
        distances: steps and distances; may be empty.
        field: from places (P, 2) and particles (N, 2), directions (P, 2), or None where they are not known.
        title: of the whole.
        unit: of the distances.
        pixels: (height, width) of the image that each point is, or None.
        suffix: format of the picture.
    """
    figure_module = require("matplotlib.figure", "matplotlib", "plot", "a picture")
    chosen = [frames[i] for i in sorted({0, len(frames) // 2, len(frames) - 1})]
    columns = len(chosen) + (1 if pixels is not None else 0) + (1 if distances else 0)
    figure = figure_module.Figure(figsize=(3.7 * columns, 4.1), layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for panel, (step, positions) in zip(panels, chosen, strict=False):
        if pixels is None:
            _draw_points(panel, positions, real, _limits(frames, real))
            if field is not None:
                _draw_field(panel, positions, field)
        else:
            _draw_images(panel, positions, pixels)
        panel.set_title("at first" if step == 0 else f"after {step} steps", fontsize=10)
    if pixels is None:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    else:
        _draw_images(panels[len(chosen)], real, pixels)
        panels[len(chosen)].set_title("target", fontsize=10)
    if distances:
        steps, values = zip(*distances, strict=True)
        panels[-1].plot(steps, values, color=COLOURS[2], marker="." if len(steps) < 50 else None)
        panels[-1].set(xlabel="step", yscale="log")
        panels[-1].set_title(unit, fontsize=10)
        panels[-1].spines[["top", "right"]].set_visible(False)
    return _saved(figure, suffix)


def descent_animation(
    frames: Sequence[tuple[int, Array]], real: Array, *, title: str, pixels: tuple[int, int] | None = None
) -> bytes:
    """A GIF of the particles on their way. Arguments as for :func:`descent_picture`."""
    animation = require("matplotlib.animation", "matplotlib", "plot", "an animation")
    figure_module = require("matplotlib.figure", "matplotlib", "plot", "an animation")
    backend = require("matplotlib.backends.backend_agg", "matplotlib", "plot", "an animation")
    figure = figure_module.Figure(figsize=(4, 4.3), layout="constrained")
    backend.FigureCanvasAgg(figure)
    numbers = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), SHOWN_FRAMES)).round().astype(int))
    writer = animation.PillowWriter(fps=1000 / MILLISECONDS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "descent.gif"
        with writer.saving(figure, str(path), dpi=72):
            for number in [*numbers, *[numbers[-1]] * (STILL - 1)]:
                step, positions = frames[number]
                figure.clear()
                panel = figure.subplots()
                figure.suptitle(f"{title}\nafter {step} steps", fontsize=9)
                if pixels is None:
                    _draw_points(panel, positions, real, _limits(frames, real))
                else:
                    _draw_images(panel, positions, pixels)
                writer.grab_frame()
        return path.read_bytes()


def _draw_points(panel: Any, positions: Array, real: Array, limits: tuple[Array, Array]) -> None:
    """The first two coordinates; of points on a line, that one and nothing."""
    for cloud, name, colour, marker in ((real, "target", REAL, "o"), (positions, "particles", FAKE, "x")):
        panel.scatter(*_plane(cloud).T, s=9, c=colour, marker=marker, linewidth=0.8, alpha=0.7, label=name)
    (left, low), (right, high) = limits
    panel.set(xlim=(left, right), ylim=(low, high), aspect="equal", xticks=[], yticks=[])


def _draw_field(panel: Any, positions: Array, field: Field) -> None:
    if positions.shape[1] != 2:
        return
    (left, right), (low, high) = panel.get_xlim(), panel.get_ylim()
    x, y = np.meshgrid(np.linspace(left, right, ARROWS), np.linspace(low, high, ARROWS))
    directions = field(np.stack([x.ravel(), y.ravel()], 1), positions)
    if directions is None:
        return
    speed = np.linalg.norm(directions, axis=1)
    fastest = speed.max() or 1.0
    unit = directions / np.maximum(speed, 1e-300)[:, None]
    panel.quiver(
        x.ravel(), y.ravel(), *unit.T, speed / fastest, cmap="Greys", clim=(-0.4, 1), pivot="mid", width=0.004, zorder=0
    )


def _draw_images(panel: Any, points: Array, pixels: tuple[int, int]) -> None:
    rows, columns = IMAGES
    height, width = pixels
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for i, image in enumerate(points[: rows * columns]):
        row, column = divmod(i, columns)
        top, left = row * (height + 1), column * (width + 1)
        sheet[top : top + height, left : left + width] = image.reshape(pixels)
    panel.imshow(sheet, cmap="gray_r", vmin=-1, vmax=1)
    panel.set(xticks=[], yticks=[])


def _plane(points: Array) -> Array:
    return points[:, :2] if points.shape[1] > 1 else np.concatenate((points, np.zeros_like(points)), 1)


def _limits(frames: Sequence[tuple[int, Array]], real: Array) -> tuple[Array, Array]:
    """Corners of a square that has the target and the particles at first and at the end in it."""
    points = np.concatenate([_plane(real), _plane(frames[0][1]), _plane(frames[-1][1])])
    centre = (points.max(0) + points.min(0)) / 2
    half = 0.55 * float(np.ptp(points, axis=0).max()) or 1.0
    return centre - half, centre + half
