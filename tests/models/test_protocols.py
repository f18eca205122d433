"""The published experiments on features, and their tables."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from pykernels.data import Dataset
from pykernels.models.usrl import LSTMEncoder, USRLTransformer, fit_nearest_neighbour, fit_svm
from pykernels.models.usrl_protocols import (
    Accuracy,
    SparseLabels,
    accuracies,
    accuracy_table,
    archive_of,
    method_name,
    read_results,
    sparse_label_table,
    sparse_labels,
)

TINY = {"channels": 3, "depth": 1, "reduced_size": 5, "out_channels": 4, "n_steps": 3, "random_state": 0}


def waves(n=24, channels=1, name="GunPoint", classes=2, ragged=False):
    rng = np.random.default_rng(7)
    labels = np.array([f"c{i % classes}" for i in range(n)])
    parts = []
    for _ in range(2):
        phase = rng.uniform(0, 6, (n, channels, 1))
        X = np.sin(0.3 * (1 + (np.arange(n) % classes))[:, None, None] * np.arange(30) + phase)
        parts.append([case[:, : 10 + i % 20] for i, case in enumerate(X)] if ragged else X)
    return Dataset(name, parts[0], labels, parts[1], labels)


@pytest.mark.parametrize("ragged", [False, True])
def test_accuracies(ragged):
    data = waves(ragged=ragged)
    transformer = USRLTransformer((1, 2, 5, 10), **TINY).fit(data.X_train)
    results = accuracies(transformer, data)
    assert [r.method for r in results] == [
        "ours_K1",
        "ours_K2",
        "ours_K5",
        "ours_K10",
        "ours_combined",
        "ours_combined_1NN",
    ]
    assert [r.published for r in results] == [0.953, 0.987, 0.987, 0.980, 0.993, 0.833]
    assert {r.dataset for r in results} == {"GunPoint"}
    train, test = transformer.transform(data.X_train), transformer.transform(data.X_test)
    expected = [
        fit_svm(train[:, i : i + 4], data.y_train).score(test[:, i : i + 4], data.y_test) for i in range(0, 16, 4)
    ]
    expected += [fit(train, data.y_train).score(test, data.y_test) for fit in (fit_svm, fit_nearest_neighbour)]
    assert [r.accuracy for r in results] == expected


def test_nearest_neighbour_is_that_of_the_euclidean_distance():
    rng = np.random.default_rng(0)
    train, test, labels = rng.normal(size=(30, 5)), rng.normal(size=(20, 5)), rng.integers(0, 3, 30)
    nearest = ((test[:, None] - train) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(fit_nearest_neighbour(train, labels).predict(test), labels[nearest])


def test_transfer():
    transformer = USRLTransformer(5, **TINY).fit(waves(name="FordA").X_train)
    data = waves(n=30, name="ArrowHead")
    svm, nearest = accuracies(transformer, data, source="FordA")
    assert (svm.method, svm.published) == ("ours_FordA_K5_transfer", 0.817)
    assert (nearest.method, nearest.published) == ("ours_FordA_K5_1NN_transfer", None)
    features = [transformer.transform(X) for X in (data.X_train, data.X_test)]
    assert svm.accuracy == fit_svm(features[0], data.y_train).score(features[1], data.y_test)
    with pytest.raises(ValueError, match=r"^X has 2 channels"):
        accuracies(transformer, waves(channels=2), source="FordA")


def test_method_names():
    assert method_name((5, 10, 20), "uea") == "ours_combined"
    assert method_name((5, 10, 20), "ucr") == "ours_K5_10_20"
    assert method_name([5], "ucr", encoder="lstm") == "LSTM_K5"
    assert method_name((1, 2, 5, 10), "ucr", nearest=True) == "ours_combined_1NN"
    assert archive_of(waves()) == "ucr"
    assert archive_of(waves(channels=2)) == "uea"


def test_lstm():
    data = waves(name="Adiac")
    options = {"n_steps": 3, "random_state": 0, "out_channels": 6, "hidden_size": 5}
    transformer = USRLTransformer(5, encoder="lstm", **options).fit(data.X_train)
    (encoder,) = transformer.encoders_
    assert isinstance(encoder, LSTMEncoder)
    assert transformer.transform(data.X_train).shape == (24, 6)
    assert len(transformer.get_feature_names_out()) == 6
    result = accuracies(transformer, data)[0]
    assert (result.method, result.published) == ("LSTM_K5", 0.269)
    ragged = waves(ragged=True).X_train
    features = USRLTransformer(5, encoder="lstm", **options).fit(ragged).transform(ragged)
    assert np.isfinite(features).all()
    with pytest.raises(ValueError, match=r"^encoder must be 'cnn' or 'lstm', got 'gru'"):
        USRLTransformer(5, encoder="gru").fit(data.X_train)


def test_lstm_encoder_is_the_last_output_of_two_layers():
    encoder = LSTMEncoder(2, hidden_size=7, out_channels=3, dtype=torch.float64)
    x = torch.randn((4, 2, 9), dtype=torch.float64)
    output, _ = encoder.lstm(x.permute(2, 0, 1))
    torch.testing.assert_close(encoder(x), encoder.linear(output[-1]))
    parts = [x[0], x[1, :, :3], x[2, :, :1], x[3, :, :8]]
    packed = torch.cat(parts, 1)[None]
    offsets = torch.tensor([0, 9, 12, 13, 21], dtype=torch.int32)
    expected = torch.cat([encoder(part[None]) for part in parts])
    torch.testing.assert_close(encoder(packed, cu_seqlens=offsets), expected)
    published = LSTMEncoder(1)
    assert (published.lstm.hidden_size, published.lstm.num_layers, published.linear.out_features) == (256, 2, 160)


def test_sparse_labels():
    data = waves(200, name="TwoPatterns", classes=4)
    transformer = USRLTransformer(5, **{**TINY, "n_steps": 30}).fit(data.X_train)
    results = sparse_labels(transformer, data, labels=[12, 0.25, 200], runs=3)
    assert [r.labels for r in results] == [12, 50, 200]
    assert [len(r.accuracies) for r in results] == [3, 3, 3]
    assert results[0].published == (0.7198, 0.0763)
    assert results[1].published is None
    assert len(set(results[0].accuracies)) > 1
    assert len(set(results[2].accuracies)) == 1
    assert results[0].mean < results[2].mean
    assert results[2].std == 0
    again = sparse_labels(transformer, data, labels=[12, 0.25, 200], runs=3)
    assert again == results
    default = [r.labels for r in sparse_labels(transformer, data, runs=1)]
    assert (default[:5], default[-2:]) == ([12, 15, 18, 23, 29], [174, 200])
    for labels in ([3], [201], [199], [0.0]):
        with pytest.raises(ValueError, match=r"^labels must be from 4 \(the classes\) to 196, or all 200; got "):
            sparse_labels(transformer, data, labels=labels)


def test_sparse_samples_are_stratified(monkeypatch):
    import pykernels.models.usrl_protocols as protocols

    seen = []
    monkeypatch.setattr(protocols, "fit_svm", lambda features, labels: seen.append(labels) or fit_svm(features, labels))
    data = waves(40)
    sparse_labels(USRLTransformer(5, **TINY).fit(data.X_train), data, labels=[10], runs=4)
    assert [sorted(labels).count("c0") for labels in seen] == [5] * 4


def test_sparse_label_table():
    table = sparse_label_table(
        [
            SparseLabels("TwoPatterns", 12, (0.7, 0.8), (0.7198, 0.0763)),
            SparseLabels("Other", 100, (1.0,), None),
        ]
    )
    assert table.splitlines() == [
        "| data set    | labels | measured      | published     |",
        "| ----------- | ------ | ------------- | ------------- |",
        "| TwoPatterns | 12     | 0.750 ± 0.050 | 0.720 ± 0.076 |",
        "| Other       | 100    | 1.000 ± 0.000 |               |",
    ]


def test_accuracy_table():
    results = [
        Accuracy("Own", "ours_K3", 0.5, None),
        {"dataset": "OSULeaf", "method": "ours_combined", "seed": 0, "accuracy": 0.79},
        {"dataset": "GunPoint", "method": "ours_combined", "accuracy": 0.98},
        {"dataset": "GunPoint", "method": "ours_combined", "accuracy": 1.0, "published": None},
        Accuracy("JapaneseVowels", "ours_combined", 0.989, 0.989),
        Accuracy("GunPoint", "ours_K5", 0.9, 0.987),
        {"dataset": "OSULeaf", "method": "ours_combined", "seed": 1, "accuracy": 0.79},
    ]
    assert accuracy_table(results).splitlines() == [
        "| data set       | method        | runs | measured      | published | difference | within     |",
        "| -------------- | ------------- | ---- | ------------- | --------- | ---------- | ---------- |",
        "| GunPoint       | ours_K5       | 1    | 0.900         | 0.987     | -0.087     |            |",
        "| GunPoint       | ours_combined | 2    | 0.990 ± 0.010 | 0.993     | -0.003     | yes (0.02) |",
        "| OSULeaf        | ours_combined | 2    | 0.790 ± 0.000 | 0.831     | -0.041     | no (0.04)  |",
        "| JapaneseVowels | ours_combined | 1    | 0.989         | 0.989     | +0.000     | yes (0.03) |",
        "| Own            | ours_K3       | 1    | 0.500         |           |            |            |",
    ]
    assert accuracy_table([]).count("\n") == 2


def test_read_results(tmp_path):
    one = {"dataset": "A", "method": "ours_K5", "accuracy": 0.5}
    two = {**one, "seed": 3}
    lines, document, several = tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "c.json"
    lines.write_text(f"{json.dumps(one)}\n\n{json.dumps(two)}\n")
    document.write_text(json.dumps({"command": "x", "results": [two]}, indent=1))
    several.write_text(json.dumps([one, two]))
    assert read_results([lines, str(document), several]) == [one, two, two, one, two]
    assert "ours_K5" in accuracy_table(read_results([lines]))
    for text, message in (
        ("{", "b.json holds no JSON"),
        ('{"dataset": "A"}', "b.json has a result without"),
        ("[1]", "b.json has"),
    ):
        document.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_results([document])
    with pytest.raises(ValueError, match=r"none\.json cannot be read"):
        read_results([tmp_path / "none.json"])
