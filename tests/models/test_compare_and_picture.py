"""The timing beside plain PyTorch, and the picture of the features."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
import pykernels.models._compare as compare
import pykernels.models._picture as picture_module
from pykernels.data import Dataset
from pykernels.models._picture import check_format, features_picture, long_series_picture
from pykernels.models._triplet import Ragged


def test_step_times(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    series = torch.randn((7, 1, 20), generator=torch.Generator().manual_seed(0))
    times = compare.compare_step_times(series, 2, batch_size=4, steps=3)
    assert (times.n_negatives, times.steps, times.threads) == (2, 3, 2)
    assert times.plain_threads in (1, 2)
    assert 0 < times.seconds < 60
    assert 0 < times.plain_seconds < 60
    assert times.ratio == times.plain_seconds / times.seconds
    assert 0 <= times.output_error < 1e-5
    assert threads[:6] == [1, 1, 1, 2, 2, 2]  # plain PyTorch is probed with each number of threads
    assert threads[9:15] == [2, times.plain_threads] * 3  # then the two take turns
    assert threads[-1] == 2


def test_step_times_of_ragged_series():
    series = Ragged.of([torch.randn((2, n)) for n in (3, 20, 11, 7, 5)])
    times = compare.compare_step_times(series, 3, batch_size=4, steps=2)
    assert 0 < times.seconds < 60
    assert 0 < times.plain_seconds < 60
    assert 0 <= times.output_error < 1e-5


def test_encoders_that_disagree_are_not_timed(monkeypatch):
    class Wrong(compare.PlainCausalCNNEncoder):
        def forward(self, x, **options):
            return super().forward(x, **options) * 1.001

    monkeypatch.setattr(compare, "PlainCausalCNNEncoder", Wrong)
    for series in (torch.ones((3, 1, 9)), Ragged.of([torch.ones((1, 9)), torch.ones((1, 3))])):
        with pytest.raises(RuntimeError, match=r"differ by 1\.0e-03"):
            compare.compare_step_times(series, 1, steps=1)


def data_set(n_classes, channels=1, ragged=False):
    rng = np.random.default_rng(0)
    labels = np.array([f"c{i % n_classes}" for i in range(20)])
    X = rng.normal(size=(20, channels, 15))
    parts = [[case[:, : 5 + i % 9] for i, case in enumerate(part)] if ragged else part for part in (X, X + 0.1)]
    return Dataset("Toy", parts[0], labels, parts[1], labels)


@pytest.mark.parametrize(
    ("n_classes", "channels", "ragged", "suffix", "start"),
    [(2, 1, True, ".png", b"\x89PNG"), (12, 3, False, ".PDF", b"%PDF"), (3, 1, False, ".svg", b"<?xml")],
)
def test_picture(n_classes, channels, ragged, suffix, start):
    pytest.importorskip("matplotlib")
    check_format(suffix)
    data = data_set(n_classes, channels, ragged)
    features = np.random.default_rng(1).normal(size=(20, 15))
    picture = features_picture(data, features, features + 0.1, suffix, "a subtitle")
    assert picture.startswith(start)
    if suffix == ".svg":
        text = picture.decode()
        # Words are drawn as paths, each after a comment with its text.
        for words in ("Toy: up to 5 training series", "class c2, test", "a subtitle", "sample"):
            assert words in text


def test_picture_of_a_long_series(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(picture_module, "LONG_SERIES_POINTS", 30)
    rng = np.random.default_rng(0)
    series = rng.normal(size=400)
    starts = np.arange(0, 380, 8)
    features, clusters = rng.normal(size=(48, 4)), np.arange(48) % 6
    text = long_series_picture(series, 20, starts, features, clusters, ".svg", unit="kW").decode()
    for words in ("kW", "cluster 6, 8 windows", "Mean window of each cluster"):
        assert words in text
    assert long_series_picture(series, 20, starts, features, clusters, ".png").startswith(b"\x89PNG")


def test_format_of_the_picture():
    pytest.importorskip("matplotlib")
    for suffix in (".xyz", ""):
        with pytest.raises(ValueError, match=r"cannot have the format .*use \.png"):
            check_format(suffix)
