"""Published test accuracies of time-series classifiers, as numbers.

Source: Franceschi, Dieuleveut and Jaggi, "Unsupervised scalable representation learning for multivariate time series",
NeurIPS 2019: 125 UCR data sets (``usrl_ucr.csv``) and 30 UEA data sets (``usrl_uea.csv``). The columns of the method
itself are ``ours_K1``, ``ours_K2``, ``ours_K5``, ``ours_K10``, ``ours_K20`` (UEA) and ``ours_combined``.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib.resources import files

__all__ = ["archive", "published_accuracy"]

_ARCHIVES = ("ucr", "uea")
_NOT_FIGURES = ("dataset", "part", "note")


@cache
def _table(archive: str) -> dict[str, dict[str, str]]:
    with (files(__name__) / f"usrl_{archive}.csv").open(encoding="utf-8") as file:
        return {row["dataset"]: row for row in csv.DictReader(file)}


@cache
def _columns() -> frozenset[str]:
    return frozenset(
        column for name in _ARCHIVES for column in next(iter(_table(name).values())) if column not in _NOT_FIGURES
    )


def archive(dataset: str) -> str | None:
    """``"ucr"`` or ``"uea"``, the table that has this data set, or None."""
    return next((name for name in _ARCHIVES if dataset in _table(name)), None)


def published_accuracy(dataset: str, column: str) -> float | None:
    """The published test accuracy, between 0 and 1.

    Args:
        dataset: name in the UCR or UEA archive, for example ``"GunPoint"``.
        column: of the tables, for example ``"ours_K5"`` or ``"DTW"``.

    Returns:
        The accuracy, or None where nothing was published.

    Raises:
        ValueError: if no table has such a column.
    """
    if column not in _columns():
        raise ValueError(f"column must be one of {', '.join(sorted(_columns()))}; got {column!r}")
    name = archive(dataset)
    cell = _table(name)[dataset].get(column) if name is not None else None
    return float(cell) if cell else None
