"""Representations of time series learned without labels, by a triplet loss with time-based negative sampling.

An encoder maps a window of a series to a vector. A window and a smaller one inside it should have similar vectors;
windows from anywhere in the training set should not:

    L = - log s(f(x_ref) . f(x_pos)) - 1/K sum_k log s(- f(x_ref) . f(x_neg_k)),   s the logistic function.

A support vector machine on the vectors classifies the series. They may have several channels, and unequal lengths.

Source: Franceschi, Dieuleveut and Jaggi, "Unsupervised scalable representation learning for multivariate time series",
NeurIPS 2019 (the loss is equation 1, the sampling algorithm 1).

Needs scikit-learn (the extra ``models``).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykernels._errors import InputError, MissingExtraError, require
from pykernels.models._lstm import LSTMEncoder
from pykernels.models._triplet import (
    Encoder,
    EncoderTraining,
    Indices,
    Ragged,
    RaggedWindows,
    SeriesSet,
    Windows,
    encode,
    n_channels,
    new_encoder,
    published_steps,
    ragged_window_loss,
    sample_ragged_windows,
    sample_windows,
    seeded,
    shuffled_batches,
    train_encoder,
    triplet_loss,
    window_loss,
)

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV, train_test_split
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC
    from sklearn.utils import assert_all_finite, check_random_state, column_or_1d
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted
except ModuleNotFoundError as error:
    if error.name != "sklearn":
        raise
    raise MissingExtraError("scikit-learn", "models", "pykernels.models.usrl") from error

__all__ = [
    "Encoder",
    "EncoderTraining",
    "Indices",
    "LSTMEncoder",
    "Ragged",
    "RaggedWindows",
    "SeriesSet",
    "USRLClassifier",
    "USRLTransformer",
    "Windows",
    "encode",
    "fit_nearest_neighbour",
    "fit_svm",
    "n_channels",
    "new_encoder",
    "published_steps",
    "ragged_window_loss",
    "sample_ragged_windows",
    "sample_windows",
    "shuffled_batches",
    "train_encoder",
    "triplet_loss",
    "window_loss",
]

Features: TypeAlias = npt.NDArray[np.floating[Any]]

# Stands for an infinite penalty: the same solution where classes can be separated with multipliers below it, and a
# finite one where they cannot be, while SVC(C=inf) then raises an error.
SVM_INFINITY = 1e10
SVM_PENALTIES = (*(10.0**i for i in range(-4, 5)), SVM_INFINITY)
SVM_SEARCH_CASES = 10_000
SVM_MAX_ITERATIONS = 10_000_000


def fit_svm(features: Features, labels: npt.NDArray[Any]) -> SVC:
    """Fit the published classifier: an SVM with an RBF kernel, its penalty C chosen by cross-validation.

    The features are not scaled; ``gamma="scale"``. C is infinite when there are fewer than 50 cases, or fewer than 5
    per class on average. Otherwise it has the best mean accuracy over 5 stratified folds, not shuffled, among 10**i for
    i = -4, ..., 4 and infinity, the smallest of equals. Of more than 10 000 cases a stratified sample of 10 000 serves
    for the search and, as in the published program, for the final fit. 1e10 stands for infinity, at
    which scikit-learn fails on classes that cannot be separated.

    Args:
        features: shape (N, F).
        labels: shape (N,), at least two classes.

    Returns:
        The fitted SVM; ``.C`` is the chosen penalty.
    """
    n_cases = len(features)
    svm = new_svm(SVM_INFINITY)
    if n_cases // len(np.unique(labels)) < 5 or n_cases < 50:
        return svm.fit(features, labels)
    if n_cases > SVM_SEARCH_CASES:
        features, _, labels, _ = train_test_split(
            features, labels, train_size=SVM_SEARCH_CASES, random_state=0, stratify=labels
        )
    search = GridSearchCV(svm, {"C": SVM_PENALTIES}, cv=5, refit=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a candidate that does not converge is judged by its score
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # the rule looks at the average
        search.fit(features, labels)
    best = _first_best(search.cv_results_["mean_test_score"])
    return svm.set_params(C=SVM_PENALTIES[best]).fit(features, labels)


def new_svm(penalty: float) -> SVC:
    """The published classifier before it is fitted, with this penalty C."""
    return SVC(C=penalty, gamma="scale", max_iter=SVM_MAX_ITERATIONS)


def fit_nearest_neighbour(features: Features, labels: npt.NDArray[Any]) -> KNeighborsClassifier:
    """Fit the published alternative to the SVM: the label of the nearest case, by Euclidean distance."""
    return KNeighborsClassifier(n_neighbors=1).fit(features, labels)


def _first_best(scores: npt.NDArray[np.float64]) -> int:
    """Index of the first of the best scores, where those that differ by rounding alone are equal."""
    return int(np.flatnonzero(scores >= scores.max() - 1e-9)[0])


# scikit-learn has no types, so its classes count as Any.
class _USRL(BaseEstimator):  # type: ignore[misc]
    """The parameters that the transformer and the classifier share."""

    def __init__(
        self,
        n_negatives: int | tuple[int, ...] = (1, 2, 5, 10),
        *,
        n_steps: int | None = None,
        batch_size: int = 10,
        learning_rate: float = 1e-3,
        encoder: str = "cnn",
        channels: int = 40,
        depth: int = 10,
        reduced_size: int = 160,
        out_channels: int = 320,
        kernel_size: int = 3,
        hidden_size: int = 256,
        dtype: str = "float32",
        random_state: int | np.random.RandomState | None = None,
        backend: str | None = None,
        device: str = "cpu",
        progress: bool = False,
    ) -> None:
        self.n_negatives = n_negatives
        self.n_steps = n_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.encoder = encoder
        self.channels = channels
        self.depth = depth
        self.reduced_size = reduced_size
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.random_state = random_state
        self.backend = backend
        self.device = device
        self.progress = progress

    def save(self, path: str | Path) -> None:
        """Write the fitted estimator to one file of tensors and JSON (safetensors), whole or not at all.

        A classifier brings its transformer along, and its SVM as arrays.
        """
        from pykernels.models import _usrl_checkpoint

        _usrl_checkpoint.save(self, path)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu") -> Self:
        """Read what :meth:`save` wrote; nothing in the file is executed. It answers the same, bit for bit.

        A transformer is also read from the file of a classifier.

        Raises:
            InputError: if the file is something else, damaged or of a newer version. A :class:`ValueError`.
        """
        from pykernels.models import _usrl_checkpoint

        model: Self = _usrl_checkpoint.SavedModel(path, device).model(cls)
        return model

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.non_deterministic = self.random_state is None
        return tags


class USRLTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _USRL):  # type: ignore[misc]
    """Learns features of time series without labels: one encoder for each value in ``n_negatives``.

    The series are an array of shape (cases, channels, time), or (cases, time) if they have one channel, or a list of
    arrays (channels, time) or (time,) if their lengths differ. They are used as they are: normalise them first if they
    need it. :meth:`transform` may get series of other lengths than :meth:`fit`.

    Args:
        n_negatives: K, negatives per series and step: one number, or several to concatenate their features.
        n_steps: training steps of each encoder; None for the published rule, 2000 from K = 10 on, else 1500.
        batch_size, learning_rate: of the training by Adam.
        encoder: ``"cnn"``, or ``"lstm"`` for the :class:`LSTMEncoder` that the method is compared with (published with
            K = 5 and 160 ``out_channels``).
        channels, depth, reduced_size, kernel_size: of :class:`pykernels.nn.CausalCNNEncoder`.
        hidden_size: of the LSTM.
        out_channels: features of each encoder.
        dtype: ``"float32"`` or ``"float64"``, of the encoders and the features.
        random_state: seed of the first weights, the order of the series and the windows.
        backend: see :func:`pykernels.causal_conv1d`.
        device: where to train and to encode, for example ``"cuda"``. The first weights do not depend on it.
        progress: show a progress bar (needs tqdm).

    Attributes:
        encoders_: the trained encoders, in the order of ``n_negatives``.
        losses_: the loss of each training step, one array per encoder.
        step_seconds_: mean time of a training step, one number per encoder.
        n_features_in_: number of channels of the series.

    Errors in the data are ``ValueError``s that name ``X``.

    Source: Franceschi, Dieuleveut and Jaggi, NeurIPS 2019, whose tables the defaults reproduce.
    """

    encoders_: list[Encoder]
    losses_: list[npt.NDArray[np.float64]]
    step_seconds_: list[float]
    n_features_in_: int

    def fit(self, X: npt.ArrayLike, y: object = None) -> Self:
        """Train the encoders on these series; ``y`` is not used."""
        tqdm = require("tqdm", "tqdm", "models", "a progress bar").tqdm if self.progress else None
        trainings = self.trainings(X)
        for training in trainings:
            with nullcontext() if tqdm is None else _bar(tqdm, training.n_steps, training.n_negatives) as bar:
                while not training.done:
                    loss = training.step()
                    if bar is not None:
                        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                        bar.update()
        return self.finish(trainings)

    def trainings(self, X: npt.ArrayLike) -> list[EncoderTraining]:
        """The trainings that :meth:`fit` does one after the other, for a caller that saves or shows them on the way.

        ``fit(X)`` is the same as doing all their steps, in any order, and then :meth:`finish`.

        Args:
            X: as for :meth:`fit`.

        Returns:
            One training for each value in ``n_negatives``, not begun. The same ones at every call if ``random_state``
            is an int.
        """
        negatives, dtype = _check_parameters(self)
        series = _check_series(X, dtype).to(self.device)
        random = check_random_state(self.random_state)
        seeds = [int(random.randint(np.iinfo(np.int32).max)) for _ in negatives]
        return [
            EncoderTraining(
                self._encoder(n_channels(series), seed),
                series,
                n_negatives=n_negatives,
                generator=np.random.default_rng(seed),
                n_steps=self.n_steps,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
            )
            for n_negatives, seed in zip(negatives, seeds, strict=True)
        ]

    def finish(self, trainings: Sequence[EncoderTraining]) -> Self:
        """Take the encoders of these trainings, all done, which makes this transformer a fitted one.

        Raises:
            InputError: if one has steps left.
        """
        for training in trainings:
            if not training.done:
                raise InputError(
                    f"trainings must be done, but the one with K={training.n_negatives} has "
                    f"{training.n_steps - training.steps_done} of {training.n_steps} steps left"
                )
        self.encoders_ = [training.encoder for training in trainings]
        self.losses_ = [training.losses for training in trainings]
        self.step_seconds_ = [training.seconds / training.n_steps for training in trainings]
        self.n_features_in_ = n_channels(trainings[0].series)
        return self

    def transform(self, X: npt.ArrayLike) -> Features:
        """Features of these series, shape (cases, encoders * out_channels)."""
        check_is_fitted(self)
        like = next(self.encoders_[0].parameters())
        series = _check_series(X, like.dtype).to(like.device)
        if (channels := n_channels(series)) != self.n_features_in_:
            shape = f" (shape {tuple(series.shape)})" if isinstance(series, Tensor) else ""
            raise InputError(
                f"X has {channels} channels{shape}, but {type(self).__name__} was fitted with {self.n_features_in_}"
            )
        features: Features = torch.cat([encode(encoder, series) for encoder in self.encoders_], 1).cpu().numpy()
        return features

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags

    @property
    def _n_features_out(self) -> int:
        return sum(encoder.linear.out_features for encoder in self.encoders_)

    def _encoder(self, in_channels: int, seed: int) -> Encoder:
        common = {"out_channels": self.out_channels, "dtype": getattr(torch, self.dtype)}
        encoder: Encoder
        if self.encoder == "lstm":
            encoder = seeded(LSTMEncoder, in_channels, seed, hidden_size=self.hidden_size, **common)
        else:
            encoder = new_encoder(
                in_channels,
                seed,
                channels=self.channels,
                depth=self.depth,
                reduced_size=self.reduced_size,
                kernel_size=self.kernel_size,
                backend=self.backend,
                **common,
            )
        return encoder.to(self.device)

    def __getstate__(self) -> dict[str, Any]:
        # Modules with normalised weights cannot be pickled, only their state_dict.
        state: dict[str, Any] = dict(super().__getstate__())
        if "encoders_" in state:
            state["encoders_"] = [encoder.state_dict() for encoder in state["encoders_"]]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "encoders_" in state:
            weights, self.encoders_ = state["encoders_"], []
            for state_dict in weights:
                encoder = self._encoder(self.n_features_in_, seed=0)
                encoder.load_state_dict(state_dict)
                self.encoders_.append(encoder.eval())


class USRLClassifier(ClassifierMixin, _USRL):  # type: ignore[misc]
    """Classifies time series by an SVM on the features of :class:`USRLTransformer`, whose arguments it takes.

    Attributes:
        transformer_: the fitted :class:`USRLTransformer`.
        svm_: the SVM that :func:`fit_svm` chose.
        classes_: the labels.
        n_features_in_: number of channels of the series.
    """

    transformer_: USRLTransformer
    svm_: SVC
    classes_: npt.NDArray[Any]
    n_features_in_: int

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Train on these series, as for :class:`USRLTransformer`, with labels ``y`` of shape (cases,)."""
        if y is None:
            raise InputError("USRLClassifier requires y to be passed, but the target y is None")
        self._check(X, y)
        return self.finish(USRLTransformer(**self.get_params()).fit(X), X, y)

    def finish(self, transformer: USRLTransformer, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Fit the SVM alone, on the features that a fitted transformer gives ``X``; ``fit`` trains the transformer too.

        The transformer may have learned from other series: from another data set, or from those without labels.
        """
        check_is_fitted(transformer)
        labels = self._check(X, y)
        self.transformer_ = transformer
        self.svm_ = fit_svm(transformer.transform(X), labels)
        self.classes_ = self.svm_.classes_
        self.n_features_in_ = transformer.n_features_in_
        return self

    def _check(self, X: npt.ArrayLike, y: npt.ArrayLike) -> npt.NDArray[Any]:
        """The labels, if they are those of the series and can be told apart."""
        labels: npt.NDArray[Any] = column_or_1d(y, warn=True)
        assert_all_finite(labels, input_name="y")
        check_classification_targets(labels)
        _, dtype = _check_parameters(self)
        n_cases = len(_check_series(X, dtype))
        if len(labels) != n_cases:
            raise InputError(f"y has {len(labels)} labels, but X has {n_cases} cases")
        if len(classes := np.unique(labels)) < 2:
            raise InputError(f"y has one class only, {classes[0]}; at least two are needed")
        return labels

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[Any]:
        """Labels of these series, shape (cases,)."""
        features = self._features(X)
        labels: npt.NDArray[Any] = self.svm_.predict(features)
        return labels

    def decision_function(self, X: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Confidence per class, as :meth:`sklearn.svm.SVC.decision_function`."""
        features = self._features(X)
        values: npt.NDArray[np.float64] = self.svm_.decision_function(features)
        return values

    def _features(self, X: npt.ArrayLike) -> Features:
        check_is_fitted(self)
        return self.transformer_.transform(X)


def _bar(tqdm: Any, n_steps: int, n_negatives: int) -> Any:
    # In a log, where a bar cannot be redrawn, one line every ten seconds is enough.
    return tqdm(
        total=n_steps,
        desc=f"training, K={n_negatives}",
        unit="step",
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )


def _check_parameters(estimator: _USRL) -> tuple[tuple[int, ...], torch.dtype]:
    """``n_negatives`` as a tuple and ``dtype`` as PyTorch's.

    Raises:
        InputError: if a parameter has a value that cannot work.
    """
    negatives = estimator.n_negatives
    values = tuple(negatives) if isinstance(negatives, (tuple, list, np.ndarray)) else (negatives,)
    if not values or not all(_is_count(value) for value in values):
        raise InputError(f"n_negatives must be a positive integer or several of them, got {negatives!r}")
    for name in (
        "batch_size",
        "channels",
        "depth",
        "reduced_size",
        "out_channels",
        "kernel_size",
        "hidden_size",
        "n_steps",
    ):
        value = getattr(estimator, name)
        if not (_is_count(value) or (name == "n_steps" and value is None)):
            raise InputError(f"{name} must be a positive integer{' or None' * (name == 'n_steps')}, got {value!r}")
    rate: object = estimator.learning_rate
    if not isinstance(rate, (int, float, np.floating)) or not 0 < rate < float("inf"):
        raise InputError(f"learning_rate must be a positive number, got {rate!r}")
    if estimator.encoder not in ("cnn", "lstm"):
        raise InputError(f"encoder must be 'cnn' or 'lstm', got {estimator.encoder!r}")
    if estimator.dtype not in ("float32", "float64"):
        raise InputError(f"dtype must be 'float32' or 'float64', got {estimator.dtype!r}")
    _check_device(estimator.device)
    return tuple(int(value) for value in values), getattr(torch, estimator.dtype)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:  # the last one where PyTorch has no CUDA
        raise InputError(f"device must be one that PyTorch can use here, got {device!r} ({error})") from error


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 1


def _check_series(X: npt.ArrayLike, dtype: torch.dtype) -> SeriesSet:
    """A copy of ``X`` as a tensor (cases, channels, time), or as ragged series if lengths differ.

    Raises:
        InputError: if it is not an array of numbers, has the wrong number of dimensions, is empty or not finite.
    """
    if hasattr(X, "toarray"):
        raise InputError("X is a sparse matrix, which is not supported; pass X.toarray()")
    cases = _arrays(X)
    if len({case.shape for case in cases}) > 1:
        return _check_ragged(cases, dtype)
    array = _as_numbers(X)
    if array.ndim not in (2, 3):
        raise InputError(
            f"X must have shape (cases, channels, time), or (cases, time) for one channel, got {array.shape}. "
            "Reshape your data"
        )
    array = array if array.ndim == 3 else array[:, None]
    for axis, what in enumerate(("no cases", "no channels", "empty series")):
        if array.shape[axis] == 0:
            raise InputError(f"X has {what}; it has shape {np.shape(X)}")
    _check_finite(array, dtype)
    return torch.tensor(array, dtype=dtype)


def _arrays(X: npt.ArrayLike) -> list[Any]:
    """The cases, if ``X`` is a list (or an array of objects) of arrays or tensors."""
    is_list = isinstance(X, (list, tuple)) or (isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 1)
    cases = list(X) if is_list else []  # type: ignore[arg-type]
    return cases if all(hasattr(case, "shape") for case in cases) else []


def _check_ragged(cases: Sequence[Any], dtype: torch.dtype) -> Ragged:
    arrays = [_as_numbers(case) for case in cases]
    for number, array in enumerate(arrays):
        if array.ndim not in (1, 2):
            raise InputError(f"X[{number}] must have shape (channels, time) or (time,), got {array.shape}")
        if 0 in array.shape:
            raise InputError(f"X has empty series; X[{number}] has shape {array.shape}")
    arrays = [np.atleast_2d(array) for array in arrays]
    if len(channels := sorted({len(array) for array in arrays})) > 1:
        raise InputError(f"X has series of {' and '.join(map(str, channels))} channels; all must have as many")
    for array in arrays:
        _check_finite(array, dtype)
    return Ragged.of([torch.tensor(array, dtype=dtype) for array in arrays])


def _as_numbers(X: npt.ArrayLike) -> npt.NDArray[np.float64]:
    try:
        array = np.asarray(X)
        if array.dtype.kind == "c":
            raise InputError("Complex data not supported: X must be real; pass X.real and X.imag as two channels")
        return array.astype(np.float64, copy=False)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else InputError
        raise kind(
            "X must be an array of numbers, of shape (cases, channels, time) or (cases, time), or a list of arrays "
            f"(channels, time) ({error})"
        ) from error


def _check_finite(array: npt.NDArray[np.float64], dtype: torch.dtype) -> None:
    if not np.isfinite(array).all() or np.abs(array).max() > torch.finfo(dtype).max:
        bad = "NaN" if np.isnan(array).any() else f"infinity or values too large for {dtype}"
        raise InputError(f"X contains {bad}; fill in or leave out those series")
