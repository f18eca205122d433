"""Features of one very long series, and what they are worth: the published experiment on two million minutes.

An encoder learns from the first part of a series x, its negatives being other windows of the same series. Then, at
times t, the features of the last period, f(x[t - w : t]), predict by a linear map how the mean changes,

    mean(x[t : t + w]) - mean(x[t - w : t]),

next to a linear map of the w raw values themselves. Both maps are fitted on the first part by Adam on all times at
once, and tested on the rest. A period is a day (1440 minutes) or a quarter (12 weeks).

Two things differ from the publication so that two CPU cores do in minutes what took hours on a GPU; both are arguments:
the features are of times a stride apart, not of consecutive minutes, and the windows in the training of the encoder are
capped. The regressor on raw values, a correlation with w weights, learns from consecutive minutes, as published: it is
computed by fast Fourier transform, which makes a minute of its published time of more than an hour. Both are tested at
the times that have features.

Source: Franceschi, Dieuleveut and Jaggi, "Unsupervised scalable representation learning for multivariate time series",
NeurIPS 2019, section on the household's power consumption.

Needs scikit-learn (the extra ``models``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykernels._errors import InputError, require
from pykernels.models._triplet import ENCODING_SAMPLES, Encoder, EncoderTraining, new_encoder
from pykernels.models.published import published_regression

__all__ = [
    "DAY",
    "QUARTER",
    "LongSeriesResult",
    "LongSeriesSettings",
    "Period",
    "PeriodResult",
    "Regression",
    "clusters",
    "long_series_experiment",
    "long_series_table",
    "long_series_training",
    "sliding_features",
]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Period:
    """A period of ``samples``, and how it is looked back on.

    ``stride`` is from one time with features to the next, ``raw_stride`` from one time that the regressor on raw values
    learns from to the next. ``features_rate`` and ``raw_rate`` are the learning rates of the two regressors.
    """

    name: str
    samples: int
    stride: int
    features_rate: float
    raw_rate: float
    raw_stride: int = 1


DAY = Period("day", 1440, stride=60, features_rate=1e-3, raw_rate=1e-4)
QUARTER = Period("quarter", 12 * 7 * 1440, stride=1440, features_rate=1e-4, raw_rate=1e-3)


@dataclass(frozen=True)
class LongSeriesSettings:
    """Of the experiment; the defaults are as published but for ``longest_window`` and the periods' strides.

    Attributes:
        n_train: samples of the first part.
        n_negatives, n_steps, batch_size, learning_rate, longest_window: of
            :class:`~pykernels.models.usrl.EncoderTraining`; None for windows up to the whole first part, as published.
        channels, depth, reduced_size, out_channels: of :class:`pykernels.nn.CausalCNNEncoder`.
        periods: to look back on.
        epochs: steps of the regressors, each on all times of the first part.
        seed: of the encoder and of the regressors.
        dtype: of the encoder; the regressors compute in float64.
        backend, device: of the encoder.
    """

    n_train: int = 500_000
    n_negatives: int = 10
    n_steps: int = 400
    batch_size: int = 1
    learning_rate: float = 1e-3
    longest_window: int | None = 14 * 1440
    channels: int = 30
    depth: int = 10
    reduced_size: int = 80
    out_channels: int = 160
    periods: tuple[Period, ...] = (DAY, QUARTER)
    epochs: int = 400
    seed: int = 0
    dtype: str = "float32"
    backend: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Regression:
    """Mean squared errors of a fitted regressor, and the time that the fit took."""

    train_mse: float
    test_mse: float
    seconds: float


@dataclass(frozen=True)
class PeriodResult:
    """Of one period, with the numbers of times with features in the first part and in the rest.

    ``constant_mse`` is the test error of the mean change of the first part, whatever the window, and
    ``encoding_seconds`` is the time of computing all features, which ``features.seconds`` does not contain.
    """

    period: Period
    n_train: int
    n_test: int
    features: Regression
    raw: Regression
    constant_mse: float
    encoding_seconds: float


@dataclass(frozen=True)
class LongSeriesResult:
    """Of the whole experiment.

    ``first_features`` has shape (times, out_channels): those of the first period, at the times of the first part, for
    :func:`clusters` and pictures; ``first_windows`` the windows' first samples, shape (times,).
    """

    settings: LongSeriesSettings
    mean: float
    std: float
    training_seconds: float
    losses: Array
    periods: tuple[PeriodResult, ...]
    encoder: Encoder = field(repr=False)
    first_features: Array = field(repr=False)
    first_windows: npt.NDArray[np.int64] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """All numbers but the features and the weights, as JSON can hold them."""
        return {
            "settings": asdict(self.settings),
            "mean": self.mean,
            "std": self.std,
            "training_seconds": self.training_seconds,
            "losses": self.losses.tolist(),
            "periods": [asdict(period) for period in self.periods],
        }


def long_series_training(series: npt.ArrayLike, settings: LongSeriesSettings | None = None) -> EncoderTraining:
    """The training of the encoder on the first part of a series, not begun.

    Args:
        series: shape (T,), finite; normalised here by its mean and standard deviation, as published.
        settings: None for the defaults.

    Raises:
        InputError: if the series is too short for the settings, or not like that.
    """
    settings = settings or LongSeriesSettings()
    x, _, _ = _normalised(series, settings)
    part = torch.tensor(x[: settings.n_train], dtype=getattr(torch, settings.dtype), device=settings.device)
    encoder = new_encoder(
        1,
        settings.seed,
        channels=settings.channels,
        depth=settings.depth,
        reduced_size=settings.reduced_size,
        out_channels=settings.out_channels,
        backend=settings.backend,
        dtype=part.dtype,
    ).to(settings.device)
    longest = min(settings.n_train, settings.longest_window or settings.n_train)
    return EncoderTraining(
        encoder,
        part[None, None],
        n_negatives=settings.n_negatives,
        generator=np.random.default_rng(settings.seed),
        n_steps=settings.n_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        longest_window=settings.longest_window,
        per_term=longest * (settings.n_negatives + 1) > ENCODING_SAMPLES,
    )


def long_series_experiment(
    series: npt.ArrayLike,
    settings: LongSeriesSettings | None = None,
    *,
    training: EncoderTraining | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> LongSeriesResult:
    """Train the encoder, and compare its features with the raw values.

    Args:
        series: shape (T,), finite, for example :func:`pykernels.data.household_power`.
        settings: None for the defaults.
        training: a :func:`long_series_training` with these settings, done or on its way; None for a new one.
        report: called with a line of text now and then.

    Raises:
        InputError: if the series is too short for the settings, or not like that.
    """
    settings = settings or LongSeriesSettings()
    x, mean, std = _normalised(series, settings)
    training = training or long_series_training(series, settings)
    while not training.done:
        loss = training.step()
        if training.steps_done % 10 == 0 or training.done:
            report(f"step {training.steps_done} of {training.n_steps}, loss {loss:.3f}")
    whole = torch.tensor(x, dtype=training.series.dtype, device=settings.device)[None]
    results = []
    first: tuple[Array, npt.NDArray[np.int64]] | None = None
    for period in settings.periods:
        starts = np.arange(0, len(x) - 2 * period.samples + 1, period.stride)
        start = time.perf_counter()
        features = sliding_features(training.encoder, whole, period.samples, period.stride)[: len(starts)]
        seconds = time.perf_counter() - start
        report(f"{period.name}: features at {len(starts)} times in {seconds:.1f} s")
        result = _compare(x, starts, features.double().cpu(), period, settings, seconds)
        report(f"{period.name}: test error {result.features.test_mse:.4f} (raw values {result.raw.test_mse:.4f})")
        results.append(result)
        first = first or (features[: result.n_train].double().cpu().numpy(), starts[: result.n_train])
    assert first is not None
    return LongSeriesResult(
        settings, mean, std, training.seconds, training.losses, tuple(results), training.encoder, *first
    )


def sliding_features(encoder: Encoder, series: Tensor, width: int, stride: int = 1) -> Tensor:
    """Features of all windows of a series, exactly as of each window by itself.

    Args:
        encoder: of series (B, C, T) into features (B, F).
        series: shape (C, T), T >= ``width``.
        width, stride: of the windows; window i is ``series[:, i * stride : i * stride + width]``.

    Returns:
        Shape ((T - width) // stride + 1, F).
    """
    windows = series.unfold(1, width, stride).movedim(1, 0)  # a view, (windows, C, width)
    with torch.inference_mode(), encoder.folded():
        parts = torch.split(windows, max(1, ENCODING_SAMPLES // width))
        return torch.cat([encoder(part.contiguous()) for part in parts])


def clusters(features: Array, n_clusters: int = 6) -> npt.NDArray[np.int64]:
    """The cluster of each window by k-means on its features, shape (windows,); always the same for the same features.

    Clusters are numbered in the order in which they appear.
    """
    cluster = require("sklearn.cluster", "scikit-learn", "models", "clustering")
    found = cluster.KMeans(n_clusters, n_init=10, random_state=0).fit_predict(features)
    _, first, number = np.unique(found, return_index=True, return_inverse=True)
    numbers: npt.NDArray[np.int64] = np.argsort(np.argsort(first))[number]
    return numbers


def long_series_table(result: LongSeriesResult) -> str:
    """Errors and times beside the published ones (on the measured series, on a GPU), in Markdown."""
    lines = [
        "| period | regressor on | test MSE | fit, s | published MSE | published fit, s |",
        "| ------ | ------------ | -------- | ------ | ------------- | ---------------- |",
    ]
    for period in result.periods:
        for name, regression in (("features", period.features), ("raw", period.raw)):
            figures = published_regression(period.period.name, name)
            mse, seconds = ("", "") if figures is None else (f"{figures[0]:.4f}", f"{figures[1]:.0f}")
            lines.append(
                f"| {period.period.name} | {name} | {regression.test_mse:.4f} | {regression.seconds:.1f} "
                f"| {mse} | {seconds} |"
            )
        lines.append(f"| {period.period.name} | nothing | {period.constant_mse:.4f} | | | |")
    return "\n".join(lines) + "\n"


def _normalised(series: npt.ArrayLike, settings: LongSeriesSettings) -> tuple[Array, float, float]:
    x = np.asarray(series, dtype=np.float64)
    if x.ndim != 1:
        raise InputError(f"series must have shape (T,), got {x.shape}")
    if not np.isfinite(x).all():
        raise InputError("series has missing values (NaN) or infinite ones; fill them in first")
    if not settings.periods:
        raise InputError("periods must be one at least")
    for period in settings.periods:
        last = len(x) - 2 * period.samples
        if settings.n_train < 2 * period.samples or last - last % period.stride < settings.n_train:
            raise InputError(
                f"n_train must leave two periods and a stride ({period}) on each side, got {settings.n_train} of "
                f"{len(x)} samples"
            )
    mean, std = float(x.mean()), float(x.std())
    if std == 0:
        raise InputError("series is constant")
    return (x - mean) / std, mean, std


def _compare(
    x: Array,
    starts: npt.NDArray[np.int64],
    features: Tensor,
    period: Period,
    settings: LongSeriesSettings,
    seconds: float,
) -> PeriodResult:
    width = period.samples
    sums = np.concatenate([[0.0], np.cumsum(x)])

    def changes(starts: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy((sums[starts + 2 * width] - 2 * sums[starts + width] + sums[starts]) / width)

    # A time is of one part if its window and what it is to predict are.
    n_train, n_test = int((starts + 2 * width <= settings.n_train).sum()), int((starts >= settings.n_train).sum())
    train, test = starts[:n_train], starts[-n_test:]
    raw_train = np.arange(0, settings.n_train - 2 * width + 1, period.raw_stride)
    target = changes(test)
    whole = torch.from_numpy(x)
    on_features = (_linear(features[:n_train]), changes(train)), (_linear(features[-n_test:]), target)
    on_values = (_correlation(whole, width, raw_train), changes(raw_train)), (_correlation(whole, width, test), target)
    return PeriodResult(
        period,
        n_train,
        n_test,
        _regress(*on_features, features.shape[1], period.features_rate, settings),
        _regress(*on_values, width, period.raw_rate, settings),
        float((target - changes(train).mean()).square().mean()),
        seconds,
    )


Prediction = Callable[[Tensor], Tensor]
Examples = tuple[Prediction, Tensor]


def _linear(features: Tensor) -> Prediction:
    return lambda weight: features @ weight


def _correlation(x: Tensor, width: int, starts: npt.NDArray[np.int64]) -> Prediction:
    """The product of weights with each window, ``sum_k weight[k] x[start + k]``, by fast Fourier transform.

    ``starts`` are equally far apart.
    """
    begin, end = int(starts[0]), int(starts[-1]) + width
    size = 1 << (end - begin - 1).bit_length()
    spectrum = torch.fft.rfft(x[begin:end], size)
    chosen = slice(0, int(starts[-1]) - begin + 1, int(starts[1] - starts[0]) if len(starts) > 1 else 1)
    return lambda weight: torch.fft.irfft(spectrum * torch.fft.rfft(weight, size).conj(), size)[chosen]


def _regress(train: Examples, test: Examples, size: int, rate: float, settings: LongSeriesSettings) -> Regression:
    """Fit a linear map and its bias by Adam on all times at once, from the weights that PyTorch's layers begin with.

    ``train`` and ``test`` are what gives predictions from ``size`` weights, and the targets.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    bound = size**-0.5
    weight, bias = (
        ((2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1) * bound).requires_grad_() for n in (size, 1)
    )
    optimizer = torch.optim.Adam([weight, bias], lr=rate)

    def error(examples: Examples) -> Tensor:
        predict, targets = examples
        mean: Tensor = (predict(weight) + bias - targets).square().mean()
        return mean

    start = time.perf_counter()
    for _ in range(settings.epochs):
        optimizer.zero_grad()
        error(train).backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        return Regression(error(train).item(), error(test).item(), seconds)
