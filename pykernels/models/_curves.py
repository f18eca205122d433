"""A picture of the losses of trainings. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pykernels._errors import require
from pykernels.models._picture import COLOURS


def losses_picture(losses: Mapping[str, npt.NDArray[np.float64]], suffix: str = ".png") -> bytes:
    """The loss of each step, pale, and above it the mean over a fiftieth of the training, one colour for each name."""
    figure_module = require("matplotlib.figure", "matplotlib", "plot", "a picture")
    figure = figure_module.Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(losses.items()):
        colour = COLOURS[i % len(COLOURS)]
        steps = np.arange(1, len(values) + 1)
        width = max(1, len(values) // 50)
        mean = np.convolve(values, np.full(width, 1 / width), mode="valid")
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.25)
        axes.plot(steps[width - 1 :], mean, color=colour, linewidth=1.6, label=name)
    axes.set_xlabel("training step")
    axes.set_ylabel("triplet loss")
    if all((values > 0).all() for values in losses.values()):
        axes.set_yscale("log")  # the first steps are ten times above the rest
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix.removeprefix("."), dpi=160)
    return buffer.getvalue()
