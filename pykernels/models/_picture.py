"""Pictures of series and of what an encoder makes of them. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from pykernels._errors import InputError, require
from pykernels.data import Dataset

SERIES_PER_CLASS = 5
LONG_SERIES_POINTS = 1500
# Okabe and Ito's colours, told apart with any colour vision, without the pale yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def check_format(suffix: str) -> None:
    """Raise an error unless matplotlib is there and writes pictures of this format (``".png"``, for example).

    Raises:
        MissingExtraError: if matplotlib is not installed.
        InputError: if it does not know the format.
    """
    backend = require("matplotlib.backends.backend_agg", "matplotlib", "plot", "a picture")
    known = backend.FigureCanvasAgg.get_supported_filetypes()
    if suffix.removeprefix(".").lower() not in known:
        raise InputError(f"a picture cannot have the format {suffix!r}; use .png, .svg or .pdf")


def features_picture(
    data: Dataset, train: npt.NDArray[Any], test: npt.NDArray[Any], suffix: str, subtitle: str
) -> bytes:
    """Left, series of each class; right, the features of all cases in two dimensions, by t-SNE.

    Args:
        data: the data set.
        train, test: features of its cases, shape (cases, F).
        suffix: format of the picture, such as ``".png"``.
        subtitle: says how the features were learned.
    """
    figure_module = require("matplotlib.figure", "matplotlib", "plot", "a picture")
    figure = figure_module.Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    classes = np.unique(np.concatenate([data.y_train, data.y_test]))
    colours = _colours(len(classes))

    for label, colour in zip(classes, colours, strict=True):
        for i, case in enumerate(np.flatnonzero(data.y_train == label)[:SERIES_PER_CLASS]):
            left.plot(
                data.X_train[case][0], color=colour, linewidth=1, alpha=0.7, label=None if i else f"class {label}"
            )
    left.set_title(f"{data.name}: up to {SERIES_PER_CLASS} training series of each class", fontsize=11)
    left.set_xlabel("sample")
    left.set_ylabel("value" if data.n_channels == 1 else "value of the first channel")
    left.set_xlim(0, data.lengths[1] - 1)

    points = _plane(np.concatenate([train, test]))
    parts = (("train", points[: len(train)], data.y_train), ("test", points[len(train) :], data.y_test))
    for label, colour in zip(classes, colours, strict=True):
        for part, position, labels in parts:
            chosen = position[labels == label]
            right.scatter(
                *chosen.T,
                s=42 if part == "train" else 26,
                marker="o" if part == "train" else "^",
                facecolor=colour if part == "train" else "none",
                edgecolor="white" if part == "train" else colour,
                linewidth=0.6 if part == "train" else 1.0,
                label=f"class {label}, {part}",
                zorder=3 if part == "train" else 2,
            )
    right.set_title(f"Features in two dimensions (t-SNE)\n{subtitle}", fontsize=11)
    right.set_xlabel("t-SNE, first coordinate")
    right.set_ylabel("t-SNE, second coordinate")
    right.set_xticks([])
    right.set_yticks([])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        if len(classes) <= len(COLOURS):
            axes.legend(frameon=False, fontsize=9)
    return _saved(figure, suffix)


def long_series_picture(
    series: npt.NDArray[Any],
    width: int,
    starts: npt.NDArray[Any],
    features: npt.NDArray[Any],
    clusters: npt.NDArray[Any],
    suffix: str,
    *,
    unit: str = "value",
) -> bytes:
    """What the windows of a long series have in common: their clusters, in time and by their features.

    Above, the first 28 windows' length of the series, each stretch in the colour of the cluster of the window that
    begins with it; below, the features in two dimensions by t-SNE (of at most 1500 windows, evenly spread), and the
    mean window of each cluster.

    Args:
        series: shape (T,).
        width, starts: the windows, ``series[start : start + width]``; ``starts`` has shape (N,), in order.
        features: of the windows, shape (N, F).
        clusters: of the windows, numbers from 0, shape (N,).
        suffix: format of the picture, such as ``".png"``.
        unit: of the series.
    """
    figure_module = require("matplotlib.figure", "matplotlib", "plot", "a picture")
    figure = figure_module.Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplot_mosaic([["series", "series"], ["plane", "means"]])
    colours = _colours(int(clusters.max()) + 1)

    shown = np.flatnonzero(starts < starts[0] + 28 * width)
    ends = np.append(starts[1:], starts[-1] + width)
    for i in shown:
        time = np.arange(starts[i], min(ends[i] + 1, len(series)))
        axes["series"].plot(time, series[time], color=colours[clusters[i]], linewidth=0.6)
    axes["series"].set_title("The series, in the colour of the cluster of the window that begins there", fontsize=11)
    axes["series"].set_xlabel("sample")
    axes["series"].set_ylabel(unit)
    axes["series"].margins(x=0)

    chosen = np.unique(np.linspace(0, len(starts) - 1, LONG_SERIES_POINTS).astype(int))
    points = _plane(features[chosen])
    for cluster, colour in enumerate(colours):
        position = points[clusters[chosen] == cluster]
        label = f"cluster {cluster + 1}, {(clusters == cluster).sum()} windows"
        axes["plane"].scatter(*position.T, s=9, color=colour, linewidth=0, label=label)
    axes["plane"].set_title("Features in two dimensions (t-SNE)", fontsize=11)
    axes["plane"].set_xlabel("t-SNE, first coordinate")
    axes["plane"].set_ylabel("t-SNE, second coordinate")
    axes["plane"].set_xticks([])
    axes["plane"].set_yticks([])

    windows = np.lib.stride_tricks.sliding_window_view(series, width)
    for cluster, colour in enumerate(colours):
        own = starts[clusters == cluster]
        mean = np.mean([windows[start] for start in own], axis=0)
        axes["means"].plot(mean, color=colour, linewidth=1)
    axes["means"].set_title("Mean window of each cluster", fontsize=11)
    axes["means"].set_xlabel("sample of the window")
    axes["means"].set_ylabel(unit)
    for panel in axes.values():
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8, markerscale=2)
    return _saved(figure, suffix)


def _saved(figure: Any, suffix: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix.removeprefix(".").lower(), dpi=160)
    return buffer.getvalue()


def _colours(count: int) -> list[Any]:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    colormaps = require("matplotlib", "matplotlib", "plot", "a picture").colormaps
    return list(colormaps["turbo"](np.linspace(0.05, 0.95, count)))


def _plane(features: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Coordinates (cases, 2) by t-SNE, always the same for the same features."""
    manifold = require("sklearn.manifold", "scikit-learn", "models", "a picture")
    perplexity = min(30.0, (len(features) - 1) / 3)
    tsne = manifold.TSNE(perplexity=perplexity, init="pca", random_state=0)
    plane: npt.NDArray[Any] = tsne.fit_transform(features.astype(np.float64))
    return plane
