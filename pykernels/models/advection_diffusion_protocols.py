"""The experiment of :mod:`pykernels.models.advection_diffusion`: forecasts of six images from four, and what they cost.

A forecast is scored by its mean squared error at each lead time, over all pixels that count, in units of the data's
standard deviation. Where the data are simulated, the motion that the model inferred and its diffusivity are compared
with the true ones. Where the temperature is even, motion changes nothing and no model can see it: its error is also
given where the temperature changes most, at the half of all pixels with the larger gradients.

Beside the models: persistence, which says that nothing changes, and for simulated data the warp by the true diffusivity
without motion, and with the true motion, which is as good as a warp from frame to frame can be.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pykernels.data.ocean import simulate
from pykernels.data.sst import SSTRegions
from pykernels.models.advection_diffusion import (
    HORIZON,
    INPUTS,
    AdvectionDiffusionForecaster,
    Penalties,
    counted_pixels,
)
from pykernels.models.published import published_sea_surface
from pykernels.ops import diffusion_variance, gaussian_warp_rollout

__all__ = [
    "METHODS",
    "ForecastData",
    "Method",
    "baseline_scores",
    "flow_scores",
    "forecast_scores",
    "forecast_seconds",
    "forecast_table",
    "sea_surface",
    "simulated_ocean",
]

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Method:
    """A model of the comparison.

    Attributes:
        title: in tables, and in the published ones.
        warp: of :class:`pykernels.models.advection_diffusion.AdvectionDiffusionForecaster`.
        regularised: whether its motion is penalised.
    """

    title: str
    warp: str
    regularised: bool

    def penalties(self, penalties: Penalties) -> Penalties:
        """These, or none."""
        return penalties if self.regularised else Penalties()


METHODS = {
    "regularised": Method("Gaussian warp, regularised", "gaussian", True),
    "unregularised": Method("Gaussian warp", "gaussian", False),
    "bilinear": Method("bilinear warp, regularised", "bilinear", True),
    "direct": Method("direct prediction", "direct", False),
}


@dataclass(frozen=True)
class ForecastData:
    """Sequences of images to learn from, to choose by and to test on.

    Attributes:
        train, validation, test: shape (N, inputs + horizon, H, W), normalised, without NaN.
        train_valid, validation_valid, test_valid: which pixels count, shape (H, W) or (N, H, W), or None for all.
        padding_mode: what is beyond the border.
        about: the data in a few words and numbers, for JSON.
        flow: the true motion of the predicted test images in pixels, shape (N, horizon, 2, H, W), if it is known.
        diffusivity: the true one, in pixels squared per frame, if it is known.
        arrays: what it takes to bring forecasts back to the units of the data, to be kept with a model.
    """

    train: Array
    validation: Array
    test: Array
    padding_mode: str
    about: dict[str, Any] = field(default_factory=dict)
    train_valid: Array | None = None
    validation_valid: Array | None = None
    test_valid: Array | None = None
    flow: Array | None = None
    diffusivity: float | None = None
    arrays: dict[str, Array] = field(default_factory=dict)


def simulated_ocean(
    sequences: int,
    tests: int,
    *,
    size: int = 64,
    diffusivity: float = 0.45,
    speed: float = 3.0,
    periodic: bool = True,
    seed: int = 0,
) -> ForecastData:
    """Sequences of :func:`pykernels.data.ocean.simulate`.

    Args:
        sequences: to train on.
        tests: to validate with, and as many to test on.
        size, diffusivity, speed, periodic, seed: of the simulation.

    Raises:
        InputError: if an argument is out of its range.
    """
    ocean = simulate(
        sequences + 2 * tests,
        INPUTS + HORIZON,
        size,
        diffusivity=diffusivity,
        speed=speed,
        periodic=periodic,
        seed=seed,
    )
    train, validation, test = np.split(ocean.images.numpy(), [sequences, sequences + tests])
    return ForecastData(
        train,
        validation,
        test,
        padding_mode="periodic" if periodic else "reflection",
        about={
            "data": "simulated",
            "size": size,
            "diffusivity": diffusivity,
            "speed": speed,
            "periodic": periodic,
            "train": sequences,
            "validation": tests,
            "test": tests,
        },
        flow=ocean.flow[sequences + tests :, INPUTS - 1 :].numpy(),
        diffusivity=diffusivity,
    )


def sea_surface(
    path: str | Path,
    *,
    variable: str | None = None,
    size: int = 64,
    max_land: float = 0.0,
    standardise: str = "region",
    every: int = 1,
    train: tuple[int, int] = (2006, 2013),
    validation: tuple[int, int] = (2014, 2015),
    test: tuple[int, int] = (2016, 2017),
) -> ForecastData:
    """Windows of sea-surface temperature from a NetCDF file, by :class:`pykernels.data.sst.SSTRegions`.

    The published years of training are 2006 to 2015, of which the last two choose the best model here.

    Args:
        path: of the file.
        variable, size, max_land, standardise: of the regions.
        every: takes one of so many windows that follow each other; all of them take ten times the memory of the file.
        train, validation, test: first and last year of each split.

    Raises:
        InputError: if the file or an argument cannot be used.
        MissingExtraError: without the extra ``netcdf``.
    """
    regions = SSTRegions(
        path,
        variable=variable,
        size=size,
        max_land=max_land,
        standardise=standardise,
        train=train,
        validation=validation,
        test=test,
        inputs=INPUTS,
        horizon=HORIZON,
    )
    parts = {split: regions.windows(split, stride=every) for split in ("train", "validation", "test")}
    images = {split: frames.numpy() for split, (frames, _, _) in parts.items()}
    sea = {split: None if valid.all() else valid.numpy() for split, (_, valid, _) in parts.items()}
    arrays, settings = regions.scaling.state()
    return ForecastData(
        train=images["train"],
        validation=images["validation"],
        test=images["test"],
        padding_mode="reflection",
        about={"data": Path(path).name, "every": every, **regions.describe(), "scaling": settings},
        train_valid=sea["train"],
        validation_valid=sea["validation"],
        test_valid=sea["test"],
        arrays=arrays,
    )


def forecast_scores(model: AdvectionDiffusionForecaster, data: ForecastData, *, border: int = 0) -> dict[str, Any]:
    """Score a model on the test sequences.

    Args:
        model: trained.
        data: gives the sequences, and where it has them the true motion and diffusivity.
        border: so many pixels along the edges do not count.

    Returns:
        For JSON: ``mse``, a list over lead times, and ``mean_mse``; ``forecast_seconds``, of one sequence; and, where
        there are any, ``diffusivity``, and ``flow`` and ``flow_visible``, of :func:`flow_scores`, everywhere and where
        the temperature changes most.
    """
    inputs = model.options["inputs"]
    counted = _counted(data, border)
    forecast = model.predict(data.test[:, :inputs], data.test.shape[1] - inputs)
    scores: dict[str, Any] = _errors(forecast.images, data.test[:, inputs:], counted)
    scores["forecast_seconds"] = forecast_seconds(model, data.test[:1, :inputs])
    diffusivity = model.diffusivity
    if diffusivity is not None:
        scores["diffusivity"] = diffusivity.item() if isinstance(diffusivity, torch.Tensor) else diffusivity
    if forecast.flows is not None and data.flow is not None:
        pixels = _with_time(counted, data.test)
        scores["flow"] = flow_scores(forecast.flows, data.flow, pixels)
        # The motion of a step is seen in the image that it moves.
        gradients = np.linalg.norm(np.gradient(data.test[:, inputs - 1 : -1], axis=(2, 3)), axis=0)
        visible = gradients > np.median(gradients, axis=(2, 3), keepdims=True)
        scores["flow_visible"] = flow_scores(forecast.flows, data.flow, visible & pixels)
    return scores


def baseline_scores(data: ForecastData, *, border: int = 0) -> dict[str, dict[str, Any]]:
    """``mse`` and ``mean_mse`` of ``persistence``, and where they are known of the true diffusivity and motion.

    ``diffusion alone`` is the warp by no motion, ``true motion`` by the true one.
    """
    counted = _counted(data, border)
    last, truth = data.test[:, INPUTS - 1 : INPUTS], data.test[:, INPUTS:]
    scores = {"persistence": _errors(np.broadcast_to(last, truth.shape), truth, counted)}
    if data.flow is not None and data.diffusivity is not None:
        for name, flow in (("diffusion alone", np.zeros_like(data.flow)), ("true motion", data.flow)):
            images = gaussian_warp_rollout(
                torch.as_tensor(last),
                torch.as_tensor(flow),
                diffusion_variance(data.diffusivity, 1),
                form="density",
                padding_mode=data.padding_mode,
            )
            scores[name] = _errors(images[:, :, 0].numpy(), truth, counted)
    return scores


def flow_scores(flow: Array, truth: Array, counted: Array | None = None) -> dict[str, float]:
    """How far an inferred motion is from the true one.

    Args:
        flow, truth: shape (N, T, 2, H, W).
        counted: pixels, shape (N or 1, T or 1, H, W); None for all.

    Returns:
        ``endpoint``, the mean length of the difference, in pixels; ``relative``, the norm of the difference relative to
        that of the true motion; ``cosine``, the mean cosine of the angle between them; and ``true_speed``, the mean
        length of the true motion.
    """
    chosen = np.ones(flow[:, :, 0].shape, dtype=np.bool_)
    if counted is not None:
        chosen &= counted
    ours, theirs = (np.moveaxis(f, 2, -1)[chosen].astype(np.float64) for f in (flow, truth))
    difference, speed, true_speed = (np.linalg.norm(f, axis=-1) for f in (ours - theirs, ours, theirs))
    lengths = np.maximum(speed * true_speed, np.finfo(np.float64).tiny)
    return {
        "endpoint": float(difference.mean()),
        "relative": float(np.linalg.norm(difference) / np.linalg.norm(true_speed)),
        "cosine": float(((ours * theirs).sum(-1) / lengths).mean()),
        "true_speed": float(true_speed.mean()),
    }


def forecast_seconds(
    model: AdvectionDiffusionForecaster, frames: Array, steps: int = HORIZON, *, repeats: int = 20
) -> float:
    """Median time of a forecast of these frames (B, inputs, H, W), after one that does not count."""
    model.predict(frames, steps)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.predict(frames, steps)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def forecast_table(results: Iterable[Mapping[str, Any]]) -> str:
    """Test errors of runs beside the published ones, a table in Markdown with a row for each method and baseline.

    The order is what compares with the publication, whose data are other ones.

    Args:
        results: of ``pykernels reproduce advection-diffusion``.
    """
    results = list(results)
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        for run in result["runs"]:
            runs.setdefault(METHODS[run["method"]].title, []).append(run)
        for baselines in result["baselines"]:
            for name, scores in baselines["scores"].items():
                runs.setdefault(name, []).append(scores)
    lines = [
        "| model | runs | MSE, mean of all lead times | first | last | end-point error | where it shows | diffusivity "
        "| ms per forecast | published MSE |",
        "| --- |" + " --- |" * 9,
    ]
    for title, found in runs.items():
        published = published_sea_surface(title)
        cells = [
            title,
            str(len(found)),
            _spread([run["mean_mse"] for run in found], ".4f"),
            _spread([run["mse"][0] for run in found], ".4f"),
            _spread([run["mse"][-1] for run in found], ".4f"),
            _spread([run["flow"]["endpoint"] for run in found if "flow" in run], ".3f"),
            _spread([run["flow_visible"]["endpoint"] for run in found if "flow_visible" in run], ".3f"),
            _spread([run["diffusivity"] for run in found if "diffusivity" in run], ".3f"),
            _spread([1e3 * run["forecast_seconds"] for run in found if "forecast_seconds" in run], ".1f"),
            "" if published is None else f"{published[0]:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], format: str) -> str:
    """Their mean, and if there are several their standard deviation."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{format}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{format}}"


def _counted(data: ForecastData, border: int) -> Array | None:
    return counted_pixels("test_valid", data.test_valid, (len(data.test), *data.test.shape[2:]), border)


def _with_time(counted: Array | None, like: Array) -> Array:
    return np.ones((1, 1, *like.shape[2:]), dtype=np.bool_) if counted is None else counted[:, None]


def _errors(images: Array, truth: Array, counted: Array | None) -> dict[str, Any]:
    squares = np.square(images.astype(np.float64) - truth)
    chosen = np.broadcast_to(_with_time(counted, squares), squares.shape)
    mse = (squares * chosen).sum((0, 2, 3)) / chosen.sum((0, 2, 3))
    return {"mse": mse.tolist(), "mean_mse": float(mse.mean())}
