"""Representations of time series learned without labels, by a triplet loss with time-based negative sampling.

An encoder maps a window of a series to a vector. A window and a smaller one inside it should have similar vectors;
windows from anywhere in the training set should not:

    L = - log s(f(x_ref) . f(x_pos)) - 1/K sum_k log s(- f(x_ref) . f(x_neg_k)),   s the logistic function.

A support vector machine on the vectors classifies the series. Here all training series have the same length.

Source: Franceschi, Dieuleveut and Jaggi, "Unsupervised scalable representation learning for multivariate time series",
NeurIPS 2019 (the loss is equation 1, the sampling algorithm 1).

Needs scikit-learn (the extra ``models``).
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pykernels._errors import InputError, MissingExtraError, require
from pykernels.models._plain import PlainCausalCNNEncoder
from pykernels.nn import CausalCNNEncoder

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV, train_test_split
    from sklearn.svm import SVC
    from sklearn.utils import assert_all_finite, check_random_state, column_or_1d
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted
except ModuleNotFoundError as error:
    if error.name != "sklearn":
        raise
    raise MissingExtraError("scikit-learn", "models", "pykernels.models.usrl") from error

__all__ = [
    "USRLClassifier",
    "USRLTransformer",
    "Windows",
    "encode",
    "fit_svm",
    "new_encoder",
    "published_steps",
    "sample_windows",
    "shuffled_batches",
    "train_encoder",
    "triplet_loss",
    "window_loss",
]

Features: TypeAlias = npt.NDArray[np.floating[Any]]
Indices: TypeAlias = npt.NDArray[np.int64]
Encoder: TypeAlias = CausalCNNEncoder | PlainCausalCNNEncoder

# Stands for an infinite penalty: the same solution where classes can be separated with multipliers below it, and a
# finite one where they cannot be, while SVC(C=inf) then raises an error.
SVM_INFINITY = 1e10
SVM_PENALTIES = (*(10.0**i for i in range(-4, 5)), SVM_INFINITY)
SVM_SEARCH_CASES = 10_000
SVM_MAX_ITERATIONS = 10_000_000
ENCODING_BATCH = 50


def triplet_loss(anchor: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
    """Mean over the batch of ``-log s(a.p) - 1/K sum_k log s(-a.n_k)``.

    Args:
        anchor, positive: features, shape (B, F).
        negatives: features, shape (K, B, F).

    Returns:
        Scalar, the dtype of the features.
    """
    attraction = F.logsigmoid((anchor * positive).sum(-1))
    repulsion = F.logsigmoid(-(anchor * negatives).sum(-1)).mean(0)
    return -(attraction + repulsion).mean()


class Windows(NamedTuple):
    """Where the windows of a batch of B series lie. Positives and negatives all have ``length`` samples.

    ``anchor_start`` and ``positive_start`` have shape (B,), in the series of the batch; ``negative_series`` and
    ``negative_start`` have shape (K, B), in the training set.
    """

    anchor_length: int
    length: int
    anchor_start: Indices
    positive_start: Indices
    negative_series: Indices
    negative_start: Indices


def sample_windows(
    batch_size: int, n_series: int, series_length: int, n_negatives: int, generator: np.random.Generator
) -> Windows:
    """Draw the windows of one batch, for series of equal length T.

    One length of the positives, uniform in 1..T, and one of the anchors, uniform from there to T, for the whole batch.
    Every anchor lies anywhere in its series, every positive anywhere in its anchor, every negative anywhere in a series
    drawn with replacement from the whole training set, the anchor's own included.
    """
    length = int(generator.integers(1, series_length + 1))
    anchor_length = int(generator.integers(length, series_length + 1))
    anchor_start = generator.integers(0, series_length - anchor_length + 1, batch_size)
    return Windows(
        anchor_length=anchor_length,
        length=length,
        anchor_start=anchor_start,
        positive_start=anchor_start + generator.integers(0, anchor_length - length + 1, batch_size),
        negative_series=generator.integers(0, n_series, (n_negatives, batch_size)),
        negative_start=generator.integers(0, series_length - length + 1, (n_negatives, batch_size)),
    )


def shuffled_batches(n_series: int, batch_size: int, generator: np.random.Generator) -> Iterator[Indices]:
    """Indices of the series, batch by batch, for ever: each epoch is shuffled, and its last batch may be smaller."""
    while True:
        order = generator.permutation(n_series)
        for start in range(0, n_series, batch_size):
            yield order[start : start + batch_size]


def window_loss(encoder: Encoder, series: Tensor, batch: Indices, windows: Windows) -> Tensor:
    """The triplet loss of one batch.

    Positives and negatives are equally long, so they go through the encoder in one call of (K + 1) B windows.

    Args:
        encoder: of series (B, C, T) into features (B, F).
        series: the training set, shape (N, C, T).
        batch: the series of the batch, shape (B,).
        windows: of the batch.
    """
    n_negatives = len(windows.negative_series)
    others = np.concatenate([batch[None], windows.negative_series]).ravel()
    starts = np.concatenate([windows.positive_start[None], windows.negative_start]).ravel()
    with encoder.folded():
        anchor = encoder(_cut(series, batch, windows.anchor_start, windows.anchor_length))
        features = encoder(_cut(series, others, starts, windows.length))
    features = features.view(n_negatives + 1, len(batch), -1)
    return triplet_loss(anchor, features[0], features[1:])


def _cut(series: Tensor, index: Indices, start: Indices, length: int) -> Tensor:
    """Windows (B, C, length) of the series (N, C, T)."""
    windows: Tensor = series.unfold(2, length, 1)  # a view, (N, C, T - length + 1, length)
    return windows[torch.from_numpy(index), :, torch.from_numpy(start)]


def new_encoder(in_channels: int, seed: int, **options: Any) -> CausalCNNEncoder:
    """An encoder with the weights of this seed; ``options`` are those of :class:`pykernels.nn.CausalCNNEncoder`.

    PyTorch's global random numbers stay as they were.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return CausalCNNEncoder(in_channels, **options)


def published_steps(n_negatives: int) -> int:
    """Optimisation steps of the published tables: 2000 from ten negatives on, else 1500."""
    return 2000 if n_negatives >= 10 else 1500


def train_encoder(
    encoder: Encoder,
    series: Tensor,
    *,
    n_negatives: int,
    generator: np.random.Generator,
    n_steps: int | None = None,
    batch_size: int = 10,
    learning_rate: float = 1e-3,
    on_step: Callable[[int, float], None] | None = None,
) -> npt.NDArray[np.float64]:
    """Train an encoder in place, by Adam.

    Args:
        encoder: to train, with the dtype of ``series``.
        series: training set, shape (N, C, T), finite.
        n_negatives: K, negatives for each series of a batch.
        generator: draws the order of the series and the windows.
        n_steps: optimisation steps, one per batch; None for :func:`published_steps`.
        batch_size: series in a batch; the last one of an epoch may have fewer.
        learning_rate: of Adam.
        on_step: called after each step with the number of steps done and the loss.

    Returns:
        The loss of each step.

    Raises:
        RuntimeError: if the loss is no longer finite.
    """
    n_steps = published_steps(n_negatives) if n_steps is None else n_steps
    n_series, _, length = series.shape
    optimizer = torch.optim.Adam(encoder.parameters(), lr=learning_rate, fused=True)
    losses = np.empty(n_steps)
    batches = shuffled_batches(n_series, batch_size, generator)
    encoder.train()
    for step in range(n_steps):
        batch = next(batches)
        windows = sample_windows(len(batch), n_series, length, n_negatives, generator)
        optimizer.zero_grad()
        loss = window_loss(encoder, series, batch, windows)
        loss.backward()
        optimizer.step()
        losses[step] = loss.item()
        if not np.isfinite(losses[step]):
            raise RuntimeError(f"the loss is {losses[step]} at step {step + 1}; use a smaller learning_rate")
        if on_step is not None:
            on_step(step + 1, losses[step])
    encoder.eval()
    return losses


def encode(encoder: Encoder, series: Tensor) -> Tensor:
    """Features (N, F) of the series (N, C, T), without gradients, a few at a time to bound the memory."""
    with torch.inference_mode(), encoder.folded():
        return torch.cat([encoder(part) for part in torch.split(series, ENCODING_BATCH)])


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
    svm = SVC(C=SVM_INFINITY, gamma="scale", max_iter=SVM_MAX_ITERATIONS)
    if n_cases // len(np.unique(labels)) < 5 or n_cases < 50:
        return svm.fit(features, labels)
    if n_cases > SVM_SEARCH_CASES:
        features, _, labels, _ = train_test_split(
            features, labels, train_size=SVM_SEARCH_CASES, random_state=0, stratify=labels
        )
    search = GridSearchCV(svm, {"C": SVM_PENALTIES}, cv=5, refit=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a candidate that does not converge is judged by its score
        search.fit(features, labels)
    best = _first_best(search.cv_results_["mean_test_score"])
    return svm.set_params(C=SVM_PENALTIES[best]).fit(features, labels)


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
        channels: int = 40,
        depth: int = 10,
        reduced_size: int = 160,
        out_channels: int = 320,
        kernel_size: int = 3,
        dtype: str = "float32",
        random_state: int | np.random.RandomState | None = None,
        backend: str | None = None,
        progress: bool = False,
    ) -> None:
        self.n_negatives = n_negatives
        self.n_steps = n_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.channels = channels
        self.depth = depth
        self.reduced_size = reduced_size
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.dtype = dtype
        self.random_state = random_state
        self.backend = backend
        self.progress = progress

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.non_deterministic = self.random_state is None
        return tags


class USRLTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _USRL):  # type: ignore[misc]
    """Learns features of time series without labels: one encoder for each value in ``n_negatives``.

    The series are an array of shape (cases, channels, time), or (cases, time) if they have one channel. They are used
    as they are: normalise them first if they need it. :meth:`transform` may get series of another length than
    :meth:`fit`.

    Args:
        n_negatives: K, negatives per series and step: one number, or several to concatenate their features.
        n_steps: training steps of each encoder; None for the published rule, 2000 from K = 10 on, else 1500.
        batch_size, learning_rate: of the training by Adam.
        channels, depth, reduced_size, out_channels, kernel_size: of :class:`pykernels.nn.CausalCNNEncoder`.
        dtype: ``"float32"`` or ``"float64"``, of the encoders and the features.
        random_state: seed of the first weights, the order of the series and the windows.
        backend: see :func:`pykernels.causal_conv1d`.
        progress: show a progress bar (needs tqdm).

    Attributes:
        encoders_: the trained encoders, in the order of ``n_negatives``.
        losses_: the loss of each training step, one array per encoder.
        step_seconds_: mean time of a training step, one number per encoder.
        n_features_in_: number of channels of the series.

    Errors in the data are ``ValueError``s that name ``X``.

    Source: Franceschi, Dieuleveut and Jaggi, NeurIPS 2019, whose tables the defaults reproduce.
    """

    encoders_: list[CausalCNNEncoder]
    losses_: list[npt.NDArray[np.float64]]
    step_seconds_: list[float]
    n_features_in_: int

    def fit(self, X: npt.ArrayLike, y: object = None) -> Self:
        """Train the encoders on series of shape (cases, channels, time) or (cases, time); ``y`` is not used."""
        negatives, dtype = _check_parameters(self)
        series = _check_series(X, dtype)
        tqdm = require("tqdm", "tqdm", "models", "a progress bar").tqdm if self.progress else None
        random = check_random_state(self.random_state)
        encoders, losses, seconds = [], [], []
        for n_negatives in negatives:
            seed = int(random.randint(np.iinfo(np.int32).max))
            encoder = self._encoder(series.shape[1], seed)
            n_steps = published_steps(n_negatives) if self.n_steps is None else self.n_steps
            start = time.perf_counter()
            with nullcontext() if tqdm is None else _bar(tqdm, n_steps, n_negatives) as bar:
                losses.append(
                    train_encoder(
                        encoder,
                        series,
                        n_negatives=n_negatives,
                        generator=np.random.default_rng(seed),
                        n_steps=n_steps,
                        batch_size=self.batch_size,
                        learning_rate=self.learning_rate,
                        on_step=None if bar is None else _reporter(bar),
                    )
                )
            seconds.append((time.perf_counter() - start) / n_steps)
            encoders.append(encoder)
        self.encoders_ = encoders
        self.losses_ = losses
        self.step_seconds_ = seconds
        self.n_features_in_ = series.shape[1]
        return self

    def transform(self, X: npt.ArrayLike) -> Features:
        """Features of series (cases, channels, time) or (cases, time), shape (cases, encoders * out_channels)."""
        check_is_fitted(self)
        series = _check_series(X, next(self.encoders_[0].parameters()).dtype)
        if series.shape[1] != self.n_features_in_:
            raise InputError(
                f"X has {series.shape[1]} channels (shape {tuple(series.shape)}), but {type(self).__name__} was fitted "
                f"with {self.n_features_in_}"
            )
        features: Features = torch.cat([encode(encoder, series) for encoder in self.encoders_], 1).numpy()
        return features

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags

    @property
    def _n_features_out(self) -> int:
        return sum(encoder.linear.out_features for encoder in self.encoders_)

    def _encoder(self, in_channels: int, seed: int) -> CausalCNNEncoder:
        return new_encoder(
            in_channels,
            seed,
            channels=self.channels,
            depth=self.depth,
            reduced_size=self.reduced_size,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            backend=self.backend,
            dtype=getattr(torch, self.dtype),
        )

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
        """Train on series (cases, channels, time) or (cases, time) with labels ``y`` of shape (cases,)."""
        if y is None:
            raise InputError("USRLClassifier requires y to be passed, but the target y is None")
        labels = column_or_1d(y, warn=True)
        assert_all_finite(labels, input_name="y")
        check_classification_targets(labels)
        _, dtype = _check_parameters(self)
        series = _check_series(X, dtype)
        if len(labels) != len(series):
            raise InputError(f"y has {len(labels)} labels, but X has {len(series)} cases")
        classes = np.unique(labels)
        if len(classes) < 2:
            raise InputError(f"y has one class only, {classes[0]}; at least two are needed")
        self.classes_ = classes
        self.transformer_ = USRLTransformer(**self.get_params()).fit(X)
        self.svm_ = fit_svm(self.transformer_.transform(X), labels)
        self.n_features_in_ = self.transformer_.n_features_in_
        return self

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[Any]:
        """Labels of series (cases, channels, time) or (cases, time), shape (cases,)."""
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


def _reporter(bar: Any) -> Callable[[int, float], None]:
    def report(step: int, loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()

    return report


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
    for name in ("batch_size", "channels", "depth", "reduced_size", "out_channels", "kernel_size", "n_steps"):
        value = getattr(estimator, name)
        if not (_is_count(value) or (name == "n_steps" and value is None)):
            raise InputError(f"{name} must be a positive integer{' or None' * (name == 'n_steps')}, got {value!r}")
    rate: object = estimator.learning_rate
    if not isinstance(rate, (int, float, np.floating)) or not 0 < rate < float("inf"):
        raise InputError(f"learning_rate must be a positive number, got {rate!r}")
    if estimator.dtype not in ("float32", "float64"):
        raise InputError(f"dtype must be 'float32' or 'float64', got {estimator.dtype!r}")
    return tuple(int(value) for value in values), getattr(torch, estimator.dtype)


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 1


def _check_series(X: npt.ArrayLike, dtype: torch.dtype) -> Tensor:
    """A copy of ``X`` as a tensor (cases, channels, time).

    Raises:
        InputError: if it is not an array of numbers, has the wrong number of dimensions, is empty or not finite.
    """
    if hasattr(X, "toarray"):
        raise InputError("X is a sparse matrix, which is not supported; pass X.toarray()")
    try:
        array = np.asarray(X)
        if array.dtype.kind == "c":
            raise InputError("Complex data not supported: X must be real; pass X.real and X.imag as two channels")
        array = array.astype(np.float64, copy=False)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else InputError
        raise kind(
            f"X must be an array of numbers, of shape (cases, channels, time) or (cases, time) ({error})"
        ) from error
    if array.ndim not in (2, 3):
        raise InputError(
            f"X must have shape (cases, channels, time), or (cases, time) for one channel, got {array.shape}. "
            "Reshape your data"
        )
    array = array if array.ndim == 3 else array[:, None]
    for axis, what in enumerate(("no cases", "no channels", "empty series")):
        if array.shape[axis] == 0:
            raise InputError(f"X has {what}; it has shape {np.shape(X)}")
    if not np.isfinite(array).all() or np.abs(array).max() > torch.finfo(dtype).max:
        bad = "NaN" if np.isnan(array).any() else f"infinity or values too large for {dtype}"
        raise InputError(f"X contains {bad}; fill in or leave out those series")
    return torch.tensor(array, dtype=dtype)
