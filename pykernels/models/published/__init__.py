"""Published results of the systems, as numbers.

Test accuracies of time-series classifiers.

Source: Franceschi, Dieuleveut and Jaggi, "Unsupervised scalable representation learning for multivariate time series",
NeurIPS 2019:

- ``usrl_ucr.csv``, 125 univariate data sets, and ``usrl_uea.csv``, 30 multivariate ones. The columns of the method
  itself are ``ours_K1``, ``ours_K2``, ``ours_K5``, ``ours_K10``, ``ours_K20`` (UEA), ``ours_combined``,
  ``ours_combined_1NN`` and ``ours_FordA_K5_transfer`` (UCR);
- ``usrl_lstm.csv``, the causal network beside an LSTM of two layers in its place, on 11 of the UCR data sets;
- ``usrl_sparse_labels.csv``, classifiers trained on few labels, from the results file that the authors released;
- ``usrl_long_series.csv``, regressors on features and on raw values of a household's electric power, on a GPU.

Forecasts of the damped pendulum. Source: Yin et al., "Augmenting physical models with deep networks for complex
dynamics forecasting" (APHYNITY), ICLR 2021, as in the theses of its authors E. de Bezenac and I. Ayed (Sorbonne
Universite):

- ``neural_ode.csv``: natural logarithm of the test mean squared error over 40 observations, mean and standard deviation
  over runs, and the relative error of the physical parameters where a model has any.

Forecasts of sea surface temperature. Source: de Bezenac, Pajot and Gallinari, "Deep learning for physical processes:
incorporating prior scientific knowledge", ICLR 2018, as in the thesis of E. de Bezenac (Sorbonne Universite):

- ``advection_diffusion.csv``: test mean squared error over six days of normalised images, and seconds for a forecast on
  a GPU (the first row's: on a CPU). The data are not public, and the unit of the errors is not given.

Particles under a discriminator. Source: Franceschi et al., "A neural tangent kernel perspective of GANs", ICML 2022, as
in the theses of its authors J.-Y. Franceschi, E. de Bezenac and I. Ayed (Sorbonne Universite):

- ``gantk.csv``: Sinkhorn divergence of the particles and their target at the end, mean and standard deviation over
  three runs, for infinitely wide discriminators, finite ones, and finite ones with new weights at each step.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

__all__ = [
    "ARCHIVES",
    "average_ranks",
    "compare_published",
    "is_published",
    "mean_accuracy",
    "published_accuracy",
    "published_forecast",
    "published_particles",
    "published_regression",
    "published_sea_surface",
    "published_sparse_labels",
]

ARCHIVES = ("ucr", "uea")
_NOT_FIGURES = ("dataset", "part", "note")
_NOT_AVAILABLE = ("", "X")  # the second one where the other method's authors gave no figure


def _rows(name: str) -> list[dict[str, str]]:
    with (files(__name__) / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@cache
def _table(archive: str) -> dict[str, dict[str, str]]:
    table = {row["dataset"]: row for row in _rows(f"usrl_{archive}")}
    if archive == "ucr":
        for row in _rows("usrl_lstm"):
            table[row["dataset"]]["LSTM_K5"] = row["LSTM_K5"]
    return table


@cache
def _columns() -> frozenset[str]:
    return frozenset(
        column for name in ARCHIVES for row in _table(name).values() for column in row if column not in _NOT_FIGURES
    )


def published_accuracy(dataset: str, column: str, archive: str = "ucr") -> float | None:
    """The published test accuracy, between 0 and 1.

    Args:
        dataset: name in the archive, for example ``"GunPoint"``.
        column: of the tables, for example ``"ours_K5"``, ``"DTW"`` or, on a few data sets, ``"LSTM_K5"``.
        archive: ``"ucr"`` for univariate or ``"uea"`` for multivariate data sets; both have a ``"Phoneme"``.

    Returns:
        The accuracy, or None where nothing was published.

    Raises:
        ValueError: if no table has such a column, or there is no such archive.
    """
    _check(archive, column)
    return _figure(_table(archive).get(dataset, {}), column)


def is_published(column: str) -> bool:
    """Whether a table has such a column."""
    return column in _columns()


def average_ranks(
    columns: Sequence[str] = ("HIVE_COTE", "ours_combined", "ST", "BOSS", "EE", "DTW"),
    archive: str = "ucr",
    part: str | None = "first85",
) -> dict[str, float]:
    """Mean rank of each method among these, where equal accuracies all get the best of their ranks.

    The defaults are those of the published critical-difference diagram.

    Args:
        columns: methods, of which only data sets with a figure for each one count.
        archive: as for :func:`published_accuracy`.
        part: of the archive, ``"first85"`` or ``"new43"`` (UCR), or None for all of it.

    Raises:
        ValueError: for an unknown archive, part or column.
    """
    cases = _complete(columns, archive, part)
    ranks = [[1 + sum(other > own for other in case) for own in case] for case in cases]
    return {column: sum(rank) / len(ranks) for column, rank in zip(columns, zip(*ranks, strict=True), strict=True)}


def mean_accuracy(column: str, archive: str = "ucr", part: str | None = None) -> tuple[float, int]:
    """Mean of a method's published accuracies, and over how many data sets. Arguments as for :func:`average_ranks`."""
    values = [value for (value,) in _complete([column], archive, part)]
    return sum(values) / len(values), len(values)


def compare_published(column: str, other: str, archive: str = "ucr") -> tuple[int, int, int]:
    """On how many data sets one method is better than another, equal to it, and worse. Arguments as above."""
    pairs = _complete([column, other], archive, None)
    better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return better, len(pairs) - better - worse, worse


def published_sparse_labels(dataset: str, column: str = "ours_combined") -> dict[int, tuple[float, float]]:
    """Mean and standard deviation of the accuracy over five draws, by the number of labels.

    Args:
        dataset: ``"TwoPatterns"``, the only one published; others have no figures.
        column: ``"ours_combined"`` or ``"ResNet"``.

    Raises:
        ValueError: if there is no such column.
    """
    if column not in ("ours_combined", "ResNet"):
        raise ValueError(f"column must be 'ours_combined' or 'ResNet', got {column!r}")
    return {
        int(row["labels"]): (float(row[f"{column}_mean"]), float(row[f"{column}_std"]))
        for row in _rows("usrl_sparse_labels")
        if row["dataset"] == dataset
    }


def published_regression(period: str, regressor: str) -> tuple[float, float] | None:
    """Test error, and the seconds that the fit took, of a regressor on the long series; None where there is none.

    Args:
        period: ``"day"`` or ``"quarter"``.
        regressor: on ``"features"`` or on ``"raw"`` values.
    """
    for row in _rows("usrl_long_series"):
        if (row["period"], row["regressor"]) == (period, regressor):
            return float(row["mse"]), float(row["seconds"])
    return None


def published_forecast(model: str, system: str = "pendulum") -> tuple[float, float] | None:
    """Natural logarithm of the test error of a model, and its standard deviation over runs; None where there is none.

    Args:
        model: for example ``"Neural ODE"`` or ``"true ODE"``.
        system: ``"pendulum"``.
    """
    for row in _rows("neural_ode"):
        if (row["system"], row["model"]) == (system, model):
            return float(row["log_mse"]), float(row["log_mse_std"])
    return None


def published_sea_surface(model: str) -> tuple[float, float] | None:
    """Mean squared error and seconds of a model that forecasts sea surface temperature; None where there is none.

    Args:
        model: for example ``"Gaussian warp, regularised"``, ``"Gaussian warp"`` or ``"direct prediction"``.
    """
    for row in _rows("advection_diffusion"):
        if row["model"] == model:
            return float(row["mse"]), float(row["seconds"])
    return None


def published_particles(data: str, loss: str, discriminator: str, kernel: str) -> tuple[float, float] | None:
    """Sinkhorn divergence at the end, and its standard deviation over three runs; None where there is none.

    Args:
        data: ``"8gaussians"``, ``"density"`` or ``"ab"``.
        loss: ``"ipm"`` or ``"lsgan"``.
        discriminator: ``"infinite"``, ``"finite"`` or ``"reset"``.
        kernel: ``"relu"``, ``"rbf"``, ``"relu_no_bias"`` or ``"sigmoid"``.
    """
    for row in _rows("gantk"):
        if (row["data"], row["loss"], row["discriminator"], row["kernel"]) == (data, loss, discriminator, kernel):
            return float(row["mean"]), float(row["std"])
    return None


def _check(archive: str, *columns: str) -> None:
    if archive not in ARCHIVES:
        raise ValueError(f"archive must be one of {', '.join(ARCHIVES)}; got {archive!r}")
    for column in columns:
        if column not in _columns():
            raise ValueError(f"column must be one of {', '.join(sorted(_columns()))}; got {column!r}")


def _figure(row: dict[str, str], column: str) -> float | None:
    cell = row.get(column, "")
    return None if cell in _NOT_AVAILABLE else float(cell)


def _complete(columns: Sequence[str], archive: str, part: str | None) -> list[list[float]]:
    """The accuracies of these methods on each data set that has them all."""
    _check(archive, *columns)
    parts = {row.get("part") for row in _table(archive).values()} - {None}
    if part is not None and part not in parts:
        raise ValueError(
            f"part must be None{''.join(f' or {known!r}' for known in sorted(map(str, parts)))}; got {part!r}"
        )
    rows = [row for row in _table(archive).values() if part in (None, row.get("part"))]
    figures = [[_figure(row, column) for column in columns] for row in rows]
    complete = [[value for value in case if value is not None] for case in figures]
    complete = [case for case in complete if len(case) == len(columns)]
    if not complete:
        raise ValueError(f"the archive {archive!r} has no data set with figures of {', '.join(columns)}")
    return complete
