"""Time of a training step beside the same step in plain PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pykernels.models._plain import PlainCausalCNNEncoder
from pykernels.models._triplet import (
    Encoder,
    Indices,
    Windows,
    new_encoder,
    sample_windows,
    shuffled_batches,
    window_loss,
)

Batch = tuple[Indices, Windows]


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
    series: Tensor,
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
    ``torch.get_num_threads()``.

    Args:
        series: training set, shape (N, C, T).
        n_negatives: K, negatives for each series of a batch.
        batch_size: series in a batch.
        steps: how many to time.
        seed: of the weights and the windows.
        backend: of :class:`pykernels.nn.CausalCNNEncoder`.

    Raises:
        RuntimeError: if the two encoders disagree.
    """
    n_series, in_channels, length = series.shape
    ours = new_encoder(in_channels, seed, backend=backend, dtype=series.dtype)
    plain = PlainCausalCNNEncoder(in_channels, dtype=series.dtype)
    plain.load_state_dict(ours.state_dict())
    error = _output_error(ours, plain, series[:batch_size])

    generator = np.random.default_rng(seed)
    batches = shuffled_batches(n_series, batch_size, generator)

    def draw(count: int) -> list[Batch]:
        chosen = [next(batches) for _ in range(count)]
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

    def __init__(self, encoder: Encoder, series: Tensor) -> None:
        self.encoder = encoder
        self.series = series
        self.optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3, fused=True)

    def time(self, batch: Batch, threads: int) -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        window_loss(self.encoder, self.series, *batch).backward()
        self.optimizer.step()
        return time.perf_counter() - start


def _output_error(ours: Encoder, plain: Encoder, series: Tensor) -> float:
    with torch.inference_mode():
        features, expected = ours(series), plain(series)
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
