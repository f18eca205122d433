"""A picture and an animation of a forecast of images. They need matplotlib (the extra ``plot``)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pykernels._errors import require
from pykernels.models._picture import _saved

ARROWS = 16  # along each axis of a motion field
TRUE_MOTION = "#009E73"
MILLISECONDS = 500  # that a frame of the animation is shown

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Shown:
    """One forecast.

    Attributes:
        inputs: images it starts from, shape (K, H, W).
        images: predicted, shape (T, H, W).
        truth: what came, or None.
        flows: motion in pixels per frame, shape (T, 2, H, W), channel 0 along the last axis, or None.
        true_flows: the same, where it is known.
        valid: which pixels to show, shape (H, W), or None for all.
        unit: of the images.
        upwards: whether the first row is at the bottom.
    """

    inputs: Array
    images: Array
    truth: Array | None = None
    flows: Array | None = None
    true_flows: Array | None = None
    valid: Array | None = None
    unit: str = "standard deviations"
    upwards: bool = True

    def masked(self, images: Array) -> Array:
        return images if self.valid is None else np.where(self.valid, images, np.nan)

    def limits(self) -> tuple[float, float]:
        """Smallest and largest value to show, the same for all images."""
        parts = [self.inputs, self.images] + ([] if self.truth is None else [self.truth])
        values = np.concatenate([self.masked(part).ravel() for part in parts])
        low, high = np.nanpercentile(values, (0.5, 99.5))
        return float(low), float(high)


def forecast_picture(shown: Shown, *, title: str, suffix: str = ".png") -> bytes:
    """The inputs; below them for each lead time the prediction, and as far as there are any the truth, the error, and
    the motion as arrows, the true one in green.

    Args:
        shown: the forecast.
        title: of the whole.
        suffix: format of the picture.
    """
    figure_module = require("matplotlib.figure", "matplotlib", "plot", "a picture")
    count, steps = len(shown.inputs), len(shown.images)
    rows = ["inputs", "prediction"]
    if shown.truth is not None:
        rows += ["truth", "error"]
    if shown.flows is not None:
        rows.append("motion")
    columns = max(count, steps)
    figure = figure_module.Figure(figsize=(1.9 * columns + 1.2, 1.9 * len(rows) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    low, high = shown.limits()
    origin = "lower" if shown.upwards else "upper"
    colours = {"cmap": "RdYlBu_r", "vmin": low, "vmax": high, "origin": origin}

    for row, name in enumerate(rows):
        for column, panel in enumerate(axes[row]):
            panel.set(xticks=[], yticks=[])
            if column >= (count if name == "inputs" else steps):
                panel.set_visible(False)
        true = name == "motion" and shown.true_flows is not None
        axes[row, 0].set_ylabel("motion (true: green)" if true else name)
    for k in range(count):
        temperature = axes[0, k].imshow(shown.masked(shown.inputs[k]), **colours)
        axes[0, k].set_title(f"t{k - count + 1:+d}" if k < count - 1 else "t", fontsize=9)
    figure.colorbar(temperature, ax=list(axes[: 3 if shown.truth is not None else 2].flat), label=shown.unit)
    for k in range(steps):
        axes[1, k].imshow(shown.masked(shown.images[k]), **colours)
        axes[1, k].set_title(f"t{k + 1:+d}", fontsize=9)
    if shown.truth is not None:
        errors = shown.masked(shown.images - shown.truth)
        largest = float(np.nanmax(np.abs(errors))) or 1.0
        for k in range(steps):
            axes[2, k].imshow(shown.masked(shown.truth[k]), **colours)
            difference = axes[3, k].imshow(errors[k], cmap="PuOr", vmin=-largest, vmax=largest, origin=origin)
        figure.colorbar(difference, ax=list(axes[3]), label="prediction - truth")
    if shown.flows is not None:
        for k in range(steps):
            axes[-1, k].imshow(shown.masked(shown.images[k]), alpha=0.5, **colours)
            _draw_motion(axes[-1, k], shown, k)
    return _saved(figure, suffix)


def forecast_animation(shown: Shown, *, title: str) -> bytes:
    """A GIF: the inputs, and then side by side the prediction with its motion, and the truth if there is any."""
    animation = require("matplotlib.animation", "matplotlib", "plot", "an animation")
    figure_module = require("matplotlib.figure", "matplotlib", "plot", "an animation")
    backend = require("matplotlib.backends.backend_agg", "matplotlib", "plot", "an animation")
    panels = ["prediction"] if shown.truth is None else ["prediction", "truth"]
    figure = figure_module.Figure(figsize=(3.4 * len(panels), 3.9), layout="constrained")
    backend.FigureCanvasAgg(figure)
    low, high = shown.limits()
    count = len(shown.inputs)
    writer = animation.PillowWriter(fps=1000 / MILLISECONDS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "forecast.gif"
        with writer.saving(figure, str(path), dpi=80):
            for k in range(count + len(shown.images)):
                figure.clear()
                axes = figure.subplots(1, len(panels), squeeze=False)[0]
                time = k - count + 1
                figure.suptitle(f"{title}, t{time:+d}" if time else f"{title}, t", fontsize=10)
                for panel, name in zip(axes, panels, strict=True):
                    future = shown.images if name == "prediction" else shown.truth
                    assert future is not None
                    image = shown.inputs[k] if k < count else future[k - count]
                    panel.imshow(
                        shown.masked(image),
                        cmap="RdYlBu_r",
                        vmin=low,
                        vmax=high,
                        origin="lower" if shown.upwards else "upper",
                    )
                    panel.set(xticks=[], yticks=[], title="input" if k < count else name)
                if k >= count and shown.flows is not None:
                    _draw_motion(axes[0], shown, k - count)
                writer.grab_frame()
        return path.read_bytes()


def _draw_motion(panel: Any, shown: Shown, step: int) -> None:
    """Arrows of one step, to the same scale in all steps: the fastest are one and a half arrow spacings long."""
    assert shown.flows is not None
    both = [(shown.flows, "black")]
    if shown.true_flows is not None:
        both.insert(0, (shown.true_flows, TRUE_MOTION))
    height, width = shown.inputs.shape[1:]
    stride = max(1, max(height, width) // ARROWS)
    rows, columns = np.meshgrid(
        np.arange(stride // 2, height, stride), np.arange(stride // 2, width, stride), indexing="ij"
    )
    chosen = np.ones(rows.shape, dtype=np.bool_) if shown.valid is None else shown.valid[rows, columns]
    lengths = np.linalg.norm(both[0][0], axis=1)
    scale = max(float(np.percentile(lengths, 99)), 1e-6) / (1.5 * stride)
    for flows, colour in both:
        x, y = flows[step][:, rows[chosen], columns[chosen]]
        panel.quiver(
            columns[chosen],
            rows[chosen],
            x,
            y,
            color=colour,
            angles="xy",
            scale_units="xy",
            scale=scale,
            width=0.006,
        )
