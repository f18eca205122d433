"""Time of a training step beside the same step in plain PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from pykernels.models._plain import PlainCausalCNNEncoder
from pykernels.models._triplet import (
    Encoder,
    Indices,
    Inputs,
    Ragged,
    RaggedWindows,
    SeriesSet,
    Windows,
    encode_inputs,
    n_channels,
    new_encoder,
    ragged_window_loss,
    sample_ragged_windows,
    sample_windows,
    shuffled_batches,
    window_loss,
)

Batch = tuple[Indices, Windows | RaggedWindows]


@dataclass(frozen=True)
class StepTimes:
    """Medians in seconds over the same ``steps`` training steps, with the number of threads of each encoder.

    ``output_error`` is the largest difference between the two encoders' features before the first step, relative to the
    largest feature.
    """

    n_negatives: int
    steps: int
    seconds: float
    threads: int
    plain_seconds: float
    plain_threads: int
    output_error: float

    @property
    def ratio(self) -> float:
        return self.plain_seconds / self.seconds


def compare_step_times(
    series: SeriesSet,
    n_negatives: int,
    *,
    batch_size: int = 10,
    steps: int = 20,
    seed: int = 0,
    backend: str | None = None,
) -> StepTimes:
    """Time training steps of the published encoder and of its plain PyTorch form, in turns, on the same windows.

    Both start from the same weights, which must give the same features. Plain PyTorch runs with the number of threads,
    from one to ``torch.get_num_threads()``, that is fastest on three steps before; pykernels with
    ``torch.get_num_threads()``. Windows of ragged series go through plain PyTorch one by one, as published: padding
    them to one length would compute more, and still need care not to change the result.

    Args:
        series: training set, shape (N, C, T), or ragged.
        n_negatives: K, negatives for each series of a batch.
        batch_size: series in a batch.
        steps: how many to time.
        seed: of the weights and the windows.
        backend: of :class:`pykernels.nn.CausalCNNEncoder`.

    Raises:
        RuntimeError: if the two encoders disagree.
    """
    n_series, in_channels = len(series), n_channels(series)
    ours = new_encoder(in_channels, seed, backend=backend, dtype=series.dtype)
    plain = PlainCausalCNNEncoder(in_channels, dtype=series.dtype)
    plain.load_state_dict(ours.state_dict())
    first = np.arange(min(batch_size, n_series))
    error = _output_error(
        ours, plain, series.take(first) if isinstance(series, Ragged) else (series[:batch_size], None)
    )

    generator = np.random.default_rng(seed)
    batches = shuffled_batches(n_series, batch_size, generator)

    def draw(count: int) -> list[Batch]:
        chosen = [next(batches) for _ in range(count)]
        if isinstance(series, Ragged):
            return [(b, sample_ragged_windows(b, series.lengths, n_negatives, generator)) for b in chosen]
        length = series.shape[2]
        return [(b, sample_windows(len(b), n_series, length, n_negatives, generator)) for b in chosen]

    our_steps, plain_steps = _Steps(ours, series), _Steps(plain, series)
    threads = torch.get_num_threads()
    probes = draw(3)
    with _threads_kept():
        plain_threads = min(range(1, threads + 1), key=lambda count: sum(plain_steps.time(b, count) for b in probes))
        for batch in probes:
            our_steps.time(batch, threads)
        times = [(our_steps.time(b, threads), plain_steps.time(b, plain_threads)) for b in draw(steps)]
    seconds, plain_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    return StepTimes(n_negatives, steps, seconds, threads, plain_seconds, plain_threads, error)


class _Steps:
    """Training steps of one encoder, timed one by one."""

    def __init__(self, encoder: Encoder, series: SeriesSet) -> None:
        self.encoder = encoder
        self.series = series
        self.optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3, fused=True)

    def time(self, batch: Batch, threads: int) -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        chosen, windows = batch
        if isinstance(self.series, Ragged):
            assert isinstance(windows, RaggedWindows)
            loss = ragged_window_loss(self.encoder, self.series, windows)
        else:
            assert isinstance(windows, Windows)
            loss = window_loss(self.encoder, self.series, chosen, windows)
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start


def _output_error(ours: Encoder, plain: Encoder, inputs: Inputs) -> float:
    with torch.inference_mode():
        features, expected = encode_inputs(ours, inputs), encode_inputs(plain, inputs)
    error = float((features - expected).abs().max() / expected.abs().max())
    if not error <= 1e-4:
        raise RuntimeError(f"the encoder and its plain PyTorch form differ by {error:.1e} of the largest feature")
    return error


@contextmanager
def _threads_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
