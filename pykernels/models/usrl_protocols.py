"""The published experiments on features of :mod:`pykernels.models.usrl`, and their tables.

All start from a fitted :class:`~pykernels.models.usrl.USRLTransformer` and a data set, and compute the features once:

- an SVM on the features of each encoder, and on those of all encoders together ("combined");
- the nearest neighbour (Euclidean distance) in place of the SVM;
- transfer: a transformer that learned from another data set;
- sparse labels: the SVM on a few labelled cases.

Methods are named as the columns of :mod:`pykernels.models.published`, and where nothing was published in the same way.

Source: Franceschi, Dieuleveut and Jaggi, "Unsupervised scalable representation learning for multivariate time series",
NeurIPS 2019. Needs scikit-learn (the extra ``models``).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from pykernels._errors import InputError, require
from pykernels.data import Dataset
from pykernels.models.published import is_published, published_accuracy, published_sparse_labels
from pykernels.models.usrl import USRLTransformer, fit_nearest_neighbour, fit_svm

__all__ = [
    "COMBINATIONS",
    "TOLERANCES",
    "Accuracy",
    "SparseLabels",
    "accuracies",
    "accuracy_table",
    "archive_of",
    "method_name",
    "read_results",
    "sparse_label_table",
    "sparse_labels",
]

COMBINATIONS = {"ucr": (1, 2, 5, 10), "uea": (5, 10, 20)}
# How far a reproduction may be from the published figure of the combined encoders: the spread between seeds, wider for
# smaller test sets and single seeds.
TOLERANCES = {
    "GunPoint": 0.02,
    "ItalyPowerDemand": 0.02,
    "OSULeaf": 0.04,
    "ArrowHead": 0.04,
    "BasicMotions": 0.03,
    "JapaneseVowels": 0.03,
}


@dataclass(frozen=True)
class Accuracy:
    """A test accuracy, and the published one of the same method (None where there is none)."""

    dataset: str
    method: str
    accuracy: float
    published: float | None


@dataclass(frozen=True)
class SparseLabels:
    """Test accuracies of SVMs on ``labels`` labelled cases, drawn anew for each; published are mean and std of five."""

    dataset: str
    labels: int
    accuracies: tuple[float, ...]
    published: tuple[float, float] | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        return statistics.pstdev(self.accuracies)


def archive_of(data: Dataset) -> str:
    """``"ucr"`` for univariate data sets, ``"uea"`` for multivariate ones."""
    return "ucr" if data.n_channels == 1 else "uea"


def method_name(
    negatives: Sequence[int], archive: str, *, encoder: str = "cnn", nearest: bool = False, source: str | None = None
) -> str:
    """The column of a method in the published tables, or a name made like it.

    Args:
        negatives: K of each encoder.
        archive: ``"ucr"`` or ``"uea"``, which combine other encoders.
        encoder: ``"cnn"`` or ``"lstm"``.
        nearest: whether the nearest neighbour classifies, not the SVM.
        source: the data set that the encoders learned from, if it was another one.
    """
    kind = "K" + "_".join(map(str, negatives))
    if tuple(negatives) == COMBINATIONS[archive]:
        kind = "combined"
    name = "_".join(["LSTM" if encoder == "lstm" else "ours", *([source] if source else []), kind])
    return name + "_1NN" * nearest + "_transfer" * (source is not None)


def accuracies(transformer: USRLTransformer, data: Dataset, *, source: str | None = None) -> list[Accuracy]:
    """Test accuracies of all that a fitted transformer can be used for.

    Args:
        transformer: fitted, on the training series of ``data`` or of another data set.
        data: whose training cases an SVM and the nearest neighbour learn from.
        source: the name of the other data set.

    Returns:
        For each encoder by itself, if there are several, the SVM; for all together the SVM, then the nearest neighbour.

    Raises:
        InputError: if the transformer learned from series with another number of channels.
    """
    train, test = transformer.transform(data.X_train), transformer.transform(data.X_test)
    negatives = transformer.n_negatives
    negatives = tuple(negatives) if isinstance(negatives, (tuple, list, np.ndarray)) else (negatives,)
    found = []

    def measure(negatives: Sequence[int], columns: slice, *, nearest: bool = False) -> None:
        fit = fit_nearest_neighbour if nearest else fit_svm
        accuracy = float(fit(train[:, columns], data.y_train).score(test[:, columns], data.y_test))
        archive = archive_of(data)
        method = method_name(negatives, archive, encoder=transformer.encoder, nearest=nearest, source=source)
        found.append(Accuracy(data.name, method, accuracy, _published(data.name, method, archive)))

    if len(negatives) > 1:
        size = train.shape[1] // len(negatives)
        for i, k in enumerate(negatives):
            measure([k], slice(i * size, (i + 1) * size))
    measure(negatives, slice(None))
    measure(negatives, slice(None), nearest=True)
    return found


def sparse_labels(
    transformer: USRLTransformer,
    data: Dataset,
    *,
    labels: Sequence[int | float] | None = None,
    runs: int = 5,
    seed: int = 0,
) -> list[SparseLabels]:
    """Test accuracies of the SVM when it sees the labels of a stratified random sample only.

    Args:
        transformer: fitted, on all training series without labels.
        data: the data set.
        labels: how many cases are labelled, numbers (int) or fractions of the training set (float); None for the
            published ones, 12 * 1.25**i rounded down, and all.
        runs: samples for each number.
        seed: of the samples.

    Raises:
        InputError: if a number of labels leaves a class without any, or exceeds the training set.
    """
    split = require("sklearn.model_selection", "scikit-learn", "models", "sparse labels").train_test_split
    n_cases, n_classes = len(data.y_train), len(np.unique(data.y_train))
    if labels is None:
        published = (int(12 * 1.25**i) for i in range(100))
        counts = [n for n in published if n_classes <= n <= n_cases - n_classes] + [n_cases]
    else:
        counts = [n if isinstance(n, (int, np.integer)) else round(n * n_cases) for n in labels]
    for count in counts:
        if not (n_classes <= count <= n_cases - n_classes or count == n_cases):
            raise InputError(
                f"labels must be from {n_classes} (the classes) to {n_cases - n_classes}, or all {n_cases}; got {count}"
            )
    train, test = transformer.transform(data.X_train), transformer.transform(data.X_test)
    figures = published_sparse_labels(data.name)
    random = np.random.RandomState(seed)

    def score(count: int) -> float:
        features, known = train, data.y_train
        if count < n_cases:
            features, _, known, _ = split(
                train, data.y_train, train_size=count, stratify=data.y_train, random_state=random
            )
        return float(fit_svm(features, known).score(test, data.y_test))

    return [SparseLabels(data.name, int(n), tuple(score(n) for _ in range(runs)), figures.get(int(n))) for n in counts]


def sparse_label_table(results: Iterable[SparseLabels]) -> str:
    """Accuracies by the number of labels, beside the published ones, in Markdown."""
    rows = [
        (
            result.dataset,
            str(result.labels),
            f"{result.mean:.3f} ± {result.std:.3f}",
            "" if result.published is None else "{:.3f} ± {:.3f}".format(*result.published),
        )
        for result in results
    ]
    return _markdown(("data set", "labels", "measured", "published"), rows)


def read_results(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Results of runs for :func:`accuracy_table`.

    Args:
        paths: files of JSON documents, or of one JSON document per line. A document is a result, a list of results, or
            holds a list of them under ``"results"``. A result has at least ``"dataset"``, ``"method"`` and
            ``"accuracy"``.

    Raises:
        InputError: if a file is not like that.
    """
    return [result for path in map(Path, paths) for result in _results(path)]


def _results(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    try:
        documents = [json.loads(text)]
    except json.JSONDecodeError:
        try:
            documents = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise InputError(f"{path} holds no JSON ({error})") from error
    for document in documents:
        results = document.get("results", document) if isinstance(document, dict) else document
        for result in results if isinstance(results, list) else [results]:
            if not isinstance(result, dict) or not {"dataset", "method", "accuracy"} <= set(result):
                raise InputError(f'{path} has a result without "dataset", "method" and "accuracy": {result!r:.80}')
            yield result


def accuracy_table(results: Iterable[Accuracy | Mapping[str, Any]]) -> str:
    """Mean accuracies over the runs of each data set and method, beside the published ones, in Markdown.

    Args:
        results: with ``dataset``, ``method``, ``accuracy`` and ``published`` (looked up where a mapping has none), one
            for each run. The last column says whether the mean is as near as :data:`TOLERANCES` asks, which speak of
            combined encoders.
    """
    runs = [(r if isinstance(r, Mapping) else vars(r)) for r in results]
    known = list(TOLERANCES)

    def order(run: Mapping[str, Any]) -> tuple[int, str, int, str]:
        dataset, method = run["dataset"], run["method"]
        return known.index(dataset) if dataset in known else len(known), dataset, len(method), method  # K2 before K10

    rows = []
    for (_, dataset, _, method), group in groupby(sorted(runs, key=order), key=order):
        same = list(group)
        values = [float(run["accuracy"]) for run in same]
        mean = statistics.fmean(values)
        published = next((run["published"] for run in same if run.get("published") is not None), None)
        if published is None:
            found = (_published(dataset, method, archive) for archive in COMBINATIONS)
            published = next((value for value in found if value is not None), None)
        spread = f" ± {statistics.pstdev(values):.3f}" if len(values) > 1 else ""
        difference = "" if published is None else f"{mean - published:+.3f}"
        verdict = ""
        if published is not None and method == "ours_combined" and dataset in TOLERANCES:
            near = abs(mean - published) <= TOLERANCES[dataset] + 1e-9
            verdict = f"{'yes' if near else 'no'} ({TOLERANCES[dataset]:.2f})"
        rows.append(
            (
                dataset,
                method,
                str(len(values)),
                f"{mean:.3f}{spread}",
                "" if published is None else f"{published:.3f}",
                difference,
                verdict,
            )
        )
    return _markdown(("data set", "method", "runs", "measured", "published", "difference", "within"), rows)


def _published(dataset: str, method: str, archive: str) -> float | None:
    return published_accuracy(dataset, method, archive) if is_published(method) else None


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its columns aligned in plain text as well."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |\n"

    return line(header) + line("-" * width for width in widths) + "".join(map(line, rows))
