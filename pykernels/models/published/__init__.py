"""Published test accuracies of time-series classifiers, as numbers.

Source: Franceschi, Dieuleveut and Jaggi, "Unsupervised scalable representation learning for multivariate time series",
NeurIPS 2019: 125 UCR data sets (``usrl_ucr.csv``) and 30 UEA data sets (``usrl_uea.csv``). The columns of the method
itself are ``ours_K1``, ``ours_K2``, ``ours_K5``, ``ours_K10``, ``ours_K20`` (UEA) and ``ours_combined``.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib.resources import files

__all__ = ["ARCHIVES", "published_accuracy"]

ARCHIVES = ("ucr", "uea")
_NOT_FIGURES = ("dataset", "part", "note")


@cache
def _table(archive: str) -> dict[str, dict[str, str]]:
    with (files(__name__) / f"usrl_{archive}.csv").open(encoding="utf-8") as file:
        return {row["dataset"]: row for row in csv.DictReader(file)}


@cache
def _columns() -> frozenset[str]:
    return frozenset(
        column for name in ARCHIVES for column in next(iter(_table(name).values())) if column not in _NOT_FIGURES
    )


def published_accuracy(dataset: str, column: str, archive: str = "ucr") -> float | None:
    """The published test accuracy, between 0 and 1.

    Args:
        dataset: name in the archive, for example ``"GunPoint"``.
        column: of the tables, for example ``"ours_K5"`` or ``"DTW"``.
        archive: ``"ucr"`` for univariate or ``"uea"`` for multivariate data sets; both have a ``"Phoneme"``.

    Returns:
        The accuracy, or None where nothing was published.

    Raises:
        ValueError: if no table has such a column, or there is no such archive.
    """
    if archive not in ARCHIVES:
        raise ValueError(f"archive must be one of {', '.join(ARCHIVES)}; got {archive!r}")
    if column not in _columns():
        raise ValueError(f"column must be one of {', '.join(sorted(_columns()))}; got {column!r}")
    cell = _table(archive).get(dataset, {}).get(column)
    return float(cell) if cell else None
