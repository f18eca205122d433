"""The tables of published figures, and the aggregates computed from them."""

import csv
from pathlib import Path

import pytest

import pykernels.models.published as published
from pykernels.models.published import (
    average_ranks,
    compare_published,
    is_published,
    mean_accuracy,
    published_accuracy,
    published_sparse_labels,
)


def test_published_figures():
    assert published_accuracy("GunPoint", "ours_K5") == 0.987
    assert published_accuracy("GunPoint", "ours_combined") == 0.993
    assert published_accuracy("BasicMotions", "ours_K20", "uea") == 1.0
    assert published_accuracy("Phoneme", "ours_K5") == 0.249
    assert published_accuracy("Phoneme", "ours_K5", "uea") == 0.216
    assert published_accuracy("GunPoint", "TimeNet") is None
    assert published_accuracy("FordA", "TimeNet") is None
    assert published_accuracy("GunPoint", "ours_K20") is None
    assert published_accuracy("GunPoint", "ours_K5", "uea") is None
    assert published_accuracy("MyOwn", "ours_K5") is None
    assert published_accuracy("Adiac", "LSTM_K5") == 0.269
    assert published_accuracy("GunPoint", "LSTM_K5") is None
    with pytest.raises(ValueError, match="archive must be one of ucr, uea; got 'ucsd'"):
        published_accuracy("GunPoint", "ours_K5", "ucsd")
    for column in ("ours_K3", "note", "dataset"):
        assert not is_published(column)
        with pytest.raises(ValueError, match=r"column must be one of .*LSTM_K5, .*ours_K5"):
            published_accuracy("GunPoint", column)


def test_every_cell_is_an_accuracy_or_nothing():
    for archive in published.ARCHIVES:
        for dataset, row in published._table(archive).items():
            for column in set(row) - {"dataset", "part", "note"}:
                value = published_accuracy(dataset, column, archive)
                assert value is None or 0 <= value <= 1


def test_average_ranks_are_the_published_ones():
    ranks = average_ranks()
    assert list(ranks) == ["HIVE_COTE", "ours_combined", "ST", "BOSS", "EE", "DTW"]
    expected = [1.71, 2.92, 2.95, 3.51, 3.72, 5.18]  # the first three are printed, the others follow from the table
    assert [round(rank, 2) for rank in ranks.values()] == expected
    assert average_ranks(["DTW"]) == {"DTW": 1.0}


MEANS = {
    ("ours_K5", "first85"): (0.799, 85),
    ("ours_combined", "first85"): (0.821, 85),
    ("ours_combined_1NN", "first85"): (0.754, 83),
    ("ours_FordA_K5_transfer", "first85"): (0.787, 85),
    ("DTW", "first85"): (0.740, 85),
    ("ST", "first85"): (0.822, 85),
    ("BOSS", "first85"): (0.810, 85),
    ("HIVE_COTE", "first85"): (0.847, 85),
    ("EE", "first85"): (0.792, 85),
    ("ours_combined", None): (0.820, 125),
    ("ours_K10", None): (0.806, 125),
    ("ours_K5", None): (0.799, 125),
    ("ours_FordA_K5_transfer", None): (0.773, 125),
    ("DTW", None): (0.727, 125),
}


@pytest.mark.parametrize(("column", "part"), MEANS)
def test_mean_accuracies_of_the_univariate_sets(column, part):
    mean, count = MEANS[column, part]
    assert mean_accuracy(column, part=part) == (pytest.approx(mean, abs=1e-3), count)


def test_mean_accuracies_of_the_multivariate_sets():
    for column, mean in (("ours_K5", 0.655), ("ours_K10", 0.654), ("ours_K20", 0.658), ("ours_combined", 0.669)):
        assert mean_accuracy(column, "uea") == (pytest.approx(mean, abs=6e-4), 30)


def test_wins_and_losses():
    assert compare_published("ours_combined", "TimeNet") == (10, 1, 1)  # 11 of 12 with the tie
    assert compare_published("ours_combined", "RWS") == (8, 1, 2)
    assert compare_published("ResNet", "ours_combined") == (45, 5, 21)  # 45 of 71
    assert compare_published("ours_combined_1NN", "DTW") == (71, 11, 41)  # 82 of 123 with ties
    assert compare_published("ours_combined", "DTW_D", "uea") == (18, 2, 9)  # 20 of 29 with ties
    assert compare_published("DTW", "DTW") == (0, 125, 0)


def test_requests_that_have_no_answer():
    with pytest.raises(ValueError, match="part must be None or 'first85' or 'new43'; got 'last'"):
        mean_accuracy("DTW", part="last")
    with pytest.raises(ValueError, match="part must be None; got 'first85'"):
        mean_accuracy("DTW_D", "uea", part="first85")
    with pytest.raises(ValueError, match="'uea' has no data set with figures of DTW, DTW_D"):
        average_ranks(["DTW", "DTW_D"], "uea", part=None)
    with pytest.raises(ValueError, match="column must be one of"):
        compare_published("DTW", "dtw")


def test_lstm_table_agrees_with_the_large_one():
    with (Path(published.__file__).parent / "usrl_lstm.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 11
    for row in rows:
        assert published_accuracy(row["dataset"], "ours_K5") == pytest.approx(float(row["CNN_K5"]))
    assert compare_published("ours_K5", "LSTM_K5") == (9, 2, 0)


def test_sparse_labels():
    figures = published_sparse_labels("TwoPatterns")
    assert figures[15] == (pytest.approx(0.81, abs=0.005), 0.0400)  # 1.5 % of the labels
    assert all(mean > 0.99 for labels, (mean, _) in figures.items() if labels >= 111)
    assert published_sparse_labels("TwoPatterns", "ResNet")[15][0] == pytest.approx(0.26, abs=0.005)
    assert published_sparse_labels("GunPoint") == {}
    with pytest.raises(ValueError, match="column must be 'ours_combined' or 'ResNet', got 'DTW'"):
        published_sparse_labels("TwoPatterns", "DTW")
