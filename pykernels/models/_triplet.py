"""The triplet loss of :mod:`pykernels.models.usrl`, its windows, and the training of an encoder by it.

A training set is a tensor (N, C, T), or :class:`Ragged` where the series have unequal lengths. All windows of a batch
of ragged series are laid end to end and go through the encoder in one call, which gets their offsets (`cu_seqlens`).

Source: Franceschi, Dieuleveut and Jaggi, "Unsupervised scalable representation learning for multivariate time series",
NeurIPS 2019 (the loss is equation 1, the sampling algorithm 1).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pykernels._errors import InputError
from pykernels.models._lstm import LSTMEncoder
from pykernels.models._plain import PlainCausalCNNEncoder
from pykernels.nn import CausalCNNEncoder

Indices: TypeAlias = npt.NDArray[np.int64]
Encoder: TypeAlias = CausalCNNEncoder | PlainCausalCNNEncoder | LSTMEncoder
# What an encoder gets: series (B, C, T) and None, or packed series (1, C, total) and their B + 1 offsets.
Inputs: TypeAlias = tuple[Tensor, Tensor | None]

Made = TypeVar("Made")

ENCODING_BATCH = 50
ENCODING_SAMPLES = 200_000
LONG_SERIES = 10_000


@dataclass(frozen=True)
class Ragged:
    """N series of C channels and unequal lengths, end to end.

    ``values`` has shape (C, total), ``offsets`` (N + 1,): series i is ``values[:, offsets[i]:offsets[i + 1]]``.
    """

    values: Tensor
    offsets: Indices

    @classmethod
    def of(cls, series: Sequence[Tensor]) -> Ragged:
        """From tensors (C, T_i)."""
        lengths = [part.shape[1] for part in series]
        return cls(torch.cat(list(series), 1), np.cumsum([0, *lengths]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Indices:
        return np.diff(self.offsets)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def to(self, device: torch.device | str) -> Ragged:
        return Ragged(self.values.to(device), self.offsets)

    def cut(self, series: Indices, start: Indices, length: Indices) -> Inputs:
        """Windows of these series, all of shape (B,), packed."""
        offsets = np.cumsum([0, *length])
        shift = self.offsets[series] + start - offsets[:-1]
        index = torch.from_numpy(np.arange(offsets[-1]) + np.repeat(shift, length))
        device = self.values.device
        packed = self.values[:, index.to(device)]
        return packed[None], torch.tensor(offsets, dtype=torch.int32, device=device)

    def take(self, series: Indices) -> Inputs:
        """Whole series, packed."""
        return self.cut(series, np.zeros_like(series), self.lengths[series])


SeriesSet: TypeAlias = Tensor | Ragged


def n_channels(series: SeriesSet) -> int:
    return len(series.values) if isinstance(series, Ragged) else series.shape[1]


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
    batch_size: int,
    n_series: int,
    series_length: int,
    n_negatives: int,
    generator: np.random.Generator,
    longest_window: int | None = None,
) -> Windows:
    """Draw the windows of one batch, for series of equal length T.

    One length of the positives, uniform in 1..T, and one of the anchors, uniform from there to T, for the whole batch.
    Every anchor lies anywhere in its series, every positive anywhere in its anchor, every negative anywhere in a series
    drawn with replacement from the whole training set, the anchor's own included. With ``longest_window`` the lengths
    are drawn as for series no longer than that, and the windows still lie anywhere.
    """
    limit = series_length if longest_window is None else min(series_length, longest_window)
    length = int(generator.integers(1, limit + 1))
    anchor_length = int(generator.integers(length, limit + 1))
    anchor_start = generator.integers(0, series_length - anchor_length + 1, batch_size)
    return Windows(
        anchor_length=anchor_length,
        length=length,
        anchor_start=anchor_start,
        positive_start=anchor_start + generator.integers(0, anchor_length - length + 1, batch_size),
        negative_series=generator.integers(0, n_series, (n_negatives, batch_size)),
        negative_start=generator.integers(0, series_length - length + 1, (n_negatives, batch_size)),
    )


class RaggedWindows(NamedTuple):
    """Windows of a batch of B ragged series: row 0 the anchors, row 1 the positives, then the K negatives.

    All three have shape (K + 2, B); ``series`` and ``start`` are in the training set.
    """

    series: Indices
    start: Indices
    length: Indices


def sample_ragged_windows(
    batch: Indices,
    lengths: Indices,
    n_negatives: int,
    generator: np.random.Generator,
    longest_window: int | None = None,
) -> RaggedWindows:
    """Draw the windows of one batch, for series of unequal lengths: those of each element by themselves.

    In a series of length s, a length of the positive, uniform in 1..s, and one of the anchor, uniform from there to s;
    for every negative a series, drawn with replacement from the whole training set, and a length, uniform up to that
    series' own. All places are uniform. ``longest_window`` is as in :func:`sample_windows`.

    Args:
        batch: the series of the batch, shape (B,).
        lengths: of all series of the training set, shape (N,).
    """
    limits = lengths if longest_window is None else np.minimum(lengths, longest_window)
    positive = generator.integers(1, limits[batch] + 1)
    anchor = generator.integers(positive, limits[batch] + 1)
    anchor_start = generator.integers(0, lengths[batch] - anchor + 1)
    positive_start = anchor_start + generator.integers(0, anchor - positive + 1)
    others = generator.integers(0, len(lengths), (n_negatives, len(batch)))
    negatives = generator.integers(1, limits[others] + 1)
    negative_start = generator.integers(0, lengths[others] - negatives + 1)
    return RaggedWindows(
        series=np.concatenate([batch[None], batch[None], others]),
        start=np.concatenate([anchor_start[None], positive_start[None], negative_start]),
        length=np.concatenate([anchor[None], positive[None], negatives]),
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


def ragged_window_loss(encoder: Encoder, series: Ragged, windows: RaggedWindows) -> Tensor:
    """The triplet loss of one batch of ragged series: all (K + 2) B windows go through the encoder in one call."""
    features = encode_inputs(encoder, series.cut(*(part.ravel() for part in windows)))
    features = features.view(*windows.series.shape, -1)
    return triplet_loss(features[0], features[1], features[2:])


def backward_per_term(encoder: Encoder, cut: Callable[[int], Inputs], n_negatives: int) -> float:
    """The triplet loss and its gradients, term by term: no more than one evaluation of the encoder is kept at a time.

    The features of the anchors are in every term. They are computed first without a graph, gather their gradient from
    all terms, and hand it on through a second evaluation: K + 3 evaluations in the place of K + 2.

    Args:
        encoder: whose parameters' gradients are added to.
        cut: gives the windows of the anchors (0), the positives (1) and the negatives (2 to K + 1).
        n_negatives: K.

    Returns:
        The loss.
    """
    with torch.no_grad():
        anchor = encode_inputs(encoder, cut(0))
    anchor.requires_grad_()
    loss = 0.0
    for row in range(1, n_negatives + 2):
        similarity = (anchor * encode_inputs(encoder, cut(row))).sum(-1)
        term = -F.logsigmoid(similarity if row == 1 else -similarity).mean() / (1 if row == 1 else n_negatives)
        term.backward()
        loss += term.item()
    encode_inputs(encoder, cut(0)).backward(anchor.grad)
    return loss


def encode_inputs(encoder: Encoder, inputs: Inputs) -> Tensor:
    """Features (B, F)."""
    x, cu_seqlens = inputs
    features: Tensor = encoder(x) if cu_seqlens is None else encoder(x, cu_seqlens=cu_seqlens)
    return features


def _cut_row(series: Tensor, batch: Indices, windows: Windows, row: int) -> Tensor:
    """Windows of the anchors (row 0), the positives (row 1) or the negatives (from 2 on)."""
    if row == 0:
        return _cut(series, batch, windows.anchor_start, windows.anchor_length)
    if row == 1:
        return _cut(series, batch, windows.positive_start, windows.length)
    return _cut(series, windows.negative_series[row - 2], windows.negative_start[row - 2], windows.length)


def _cut(series: Tensor, index: Indices, start: Indices, length: int) -> Tensor:
    """Windows (B, C, length) of the series (N, C, T)."""
    windows: Tensor = series.unfold(2, length, 1)  # a view, (N, C, T - length + 1, length)
    return windows[torch.from_numpy(index), :, torch.from_numpy(start)]


def new_encoder(in_channels: int, seed: int, **options: Any) -> CausalCNNEncoder:
    """An encoder with the weights of this seed; ``options`` are those of :class:`pykernels.nn.CausalCNNEncoder`.

    PyTorch's global random numbers stay as they were.
    """
    return seeded(CausalCNNEncoder, in_channels, seed, **options)


def seeded(kind: Callable[..., Made], in_channels: int, seed: int, **options: Any) -> Made:
    """As :func:`new_encoder`, for any kind of encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return kind(in_channels, **options)


def published_steps(n_negatives: int) -> int:
    """Optimisation steps of the published tables: 2000 from ten negatives on, else 1500."""
    return 2000 if n_negatives >= 10 else 1500


class EncoderTraining:
    """The training of an encoder by Adam, step by step, which can be saved and continued.

    A training restored from the :meth:`state` of another one goes on as that one would, bit for bit.

    Args:
        encoder: trained in place, with the dtype and the device of ``series``.
        series: training set, shape (N, C, T), or ragged; finite.
        n_negatives: K, negatives for each series of a batch.
        generator: draws the order of the series and the windows.
        n_steps: optimisation steps, one per batch; None for :func:`published_steps`.
        batch_size: series in a batch; the last one of an epoch may have fewer.
        learning_rate: of Adam.
        longest_window: no window is longer; None for the published rule, up to the whole series.
        per_term: backward after each term of the loss, which saves memory and costs little time; None for the published
            rule, where multivariate series exceed 10 000 samples.

    Attributes:
        steps_done: how many of the ``n_steps`` are done.
        seconds: the time they took.
    """

    def __init__(
        self,
        encoder: Encoder,
        series: SeriesSet,
        *,
        n_negatives: int,
        generator: np.random.Generator,
        n_steps: int | None = None,
        batch_size: int = 10,
        learning_rate: float = 1e-3,
        longest_window: int | None = None,
        per_term: bool | None = None,
    ) -> None:
        self.encoder = encoder
        self.series = series
        self.n_negatives = n_negatives
        self.generator = generator
        self.n_steps = published_steps(n_negatives) if n_steps is None else n_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.longest_window = longest_window
        self.per_term = _is_long_and_multivariate(series) if per_term is None else per_term
        self.steps_done = 0
        self.seconds = 0.0
        self._losses = np.zeros(self.n_steps)
        self._order = np.empty(0, dtype=np.int64)  # of the series, in this epoch
        self._place = 0  # in it
        self._optimizer = torch.optim.Adam(encoder.parameters(), lr=learning_rate, fused=True)
        encoder.train(not self.done)

    @property
    def done(self) -> bool:
        return self.steps_done >= self.n_steps

    @property
    def losses(self) -> npt.NDArray[np.float64]:
        """The loss of each step done."""
        return self._losses[: self.steps_done].copy()

    def step(self) -> float:
        """Do one step and return its loss.

        Raises:
            RuntimeError: if the loss is not finite, or all steps are done.
        """
        if self.steps_done == self.n_steps:
            raise RuntimeError(f"all {self.n_steps} steps of this training are done")
        start = time.perf_counter()
        batch = self._next_batch()
        self._optimizer.zero_grad()
        loss = self._backward(batch)
        self._optimizer.step()
        if not np.isfinite(loss):
            raise RuntimeError(f"the loss is {loss} at step {self.steps_done + 1}; use a smaller learning_rate")
        self._losses[self.steps_done] = loss
        self.steps_done += 1
        if self.done:
            self.encoder.eval()
        self.seconds += time.perf_counter() - start
        return loss

    def _backward(self, batch: Indices) -> float:
        """Draw windows, and add the gradients of their loss to the encoder's."""
        encoder, series, limit = self.encoder, self.series, self.longest_window
        if isinstance(series, Ragged):
            ragged = sample_ragged_windows(batch, series.lengths, self.n_negatives, self.generator, limit)
            if self.per_term:
                return backward_per_term(
                    encoder, lambda row: series.cut(*(part[row] for part in ragged)), self.n_negatives
                )
            loss = ragged_window_loss(encoder, series, ragged)
        else:
            n_series, _, length = series.shape
            windows = sample_windows(len(batch), n_series, length, self.n_negatives, self.generator, limit)
            if self.per_term:
                return backward_per_term(
                    encoder, lambda row: (_cut_row(series, batch, windows, row), None), self.n_negatives
                )
            loss = window_loss(encoder, series, batch, windows)
        loss.backward()
        return loss.item()

    def _next_batch(self) -> Indices:
        """The next series: each epoch is shuffled, and its last batch may be smaller."""
        if self._place >= len(self._order):
            self._order, self._place = self.generator.permutation(len(self.series)), 0
        batch = self._order[self._place : self._place + self.batch_size]
        self._place += self.batch_size
        return batch

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that :meth:`restore` needs in a training made with the same arguments.

        Returns:
            Copies of the tensors (``encoder.*``, the weights, and ``adam.*``, the moments and steps of the optimiser),
            and values that JSON can hold.
        """
        tensors = {f"encoder.{name}": tensor for name, tensor in self.encoder.state_dict().items()}
        for name, parameter in self.encoder.named_parameters():
            for key, tensor in self._optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = tensor
        values = {
            "settings": self._settings(),
            "steps_done": self.steps_done,
            "seconds": self.seconds,
            "losses": self.losses.tolist(),
            "order": self._order.tolist(),
            "place": self._place,
            "generator": _listed(self.generator.bit_generator.state),
        }
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state`, which may have been through a file.

        Raises:
            InputError: if it is not the state of a training like this one, which is then left as it was.
        """
        settings, expected = values.get("settings"), self._settings()
        if settings != expected:
            raise InputError(f"the saved training has other settings: {settings}, where this one has {expected}")
        shapes = {f"encoder.{name}": tensor.shape for name, tensor in self.encoder.state_dict().items()}
        if values["steps_done"]:
            for name, parameter in self.encoder.named_parameters():
                shapes |= {f"adam.{name}.{key}": parameter.shape for key in ("exp_avg", "exp_avg_sq")}
                shapes[f"adam.{name}.step"] = torch.Size()
        if wrong := {name for name in shapes if name not in tensors or tensors[name].shape != shapes[name]}:
            raise InputError(f"the saved training has no fitting tensors {', '.join(sorted(wrong))}")

        self.encoder.load_state_dict({name: tensors[f"encoder.{name}"] for name in self.encoder.state_dict()})
        self._optimizer.state.clear()
        for name, parameter in self.encoder.named_parameters():
            prefix = f"adam.{name}."
            if f"{prefix}step" in shapes:
                self._optimizer.state[parameter] = {
                    key: tensors[prefix + key].to(parameter.device, copy=True)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self.steps_done = values["steps_done"]
        self.seconds = values["seconds"]
        self._losses[: self.steps_done] = values["losses"]
        self._order = np.array(values["order"], dtype=np.int64)
        self._place = values["place"]
        self.generator.bit_generator.state = values["generator"]
        self.encoder.train(not self.done)

    def _settings(self) -> dict[str, Any]:
        return {
            "cases": len(self.series),
            "channels": n_channels(self.series),
            "samples": self.series.lengths.tolist() if isinstance(self.series, Ragged) else self.series.shape[2],
            "dtype": str(self.series.dtype).removeprefix("torch."),
            "n_negatives": self.n_negatives,
            "n_steps": self.n_steps,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "longest_window": self.longest_window,
            "per_term": self.per_term,
        }


def _is_long_and_multivariate(series: SeriesSet) -> bool:
    longest = series.lengths.max() if isinstance(series, Ragged) else series.shape[2]
    return bool(n_channels(series) > 1 and longest > LONG_SERIES)


def _listed(value: Any) -> Any:
    """The state of a bit generator with lists for arrays."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def train_encoder(
    encoder: Encoder,
    series: SeriesSet,
    *,
    on_step: Callable[[int, float], None] | None = None,
    **options: Any,
) -> npt.NDArray[np.float64]:
    """Train an encoder in place, by Adam: all steps of an :class:`EncoderTraining`, whose arguments it takes.

    Args:
        on_step: called after each step with the number of steps done and the loss.

    Returns:
        The loss of each step.

    Raises:
        RuntimeError: if the loss is no longer finite.
    """
    training = EncoderTraining(encoder, series, **options)
    while not training.done:
        loss = training.step()
        if on_step is not None:
            on_step(training.steps_done, loss)
    return training.losses


def encode(encoder: Encoder, series: SeriesSet) -> Tensor:
    """Features (N, F) of the series, without gradients, a few at a time to bound the memory."""
    with torch.inference_mode(), encoder.folded():
        if isinstance(series, Ragged):
            return torch.cat([encode_inputs(encoder, series.take(part)) for part in _parts(series.lengths)])
        return torch.cat([encoder(part) for part in torch.split(series, ENCODING_BATCH)])


def _parts(lengths: Indices) -> Iterator[Indices]:
    """Consecutive series, of no more than :data:`ENCODING_SAMPLES` together unless a single one has more."""
    start, total = 0, 0
    for i, length in enumerate(lengths):
        if i > start and total + length > ENCODING_SAMPLES:
            yield np.arange(start, i)
            start, total = i, 0
        total += length
    yield np.arange(start, len(lengths))
