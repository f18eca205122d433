"""The loader, and the table of published figures."""

import csv
from pathlib import Path

import numpy as np
import pytest

import pykernels.data.ucr as ucr
from pykernels.data import available, load, normalised, read_series


@pytest.fixture
def no_network(monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", lambda *args, **options: pytest.fail("it opened a connection"))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "name", ["GunPoint", "ArrowHead", "ItalyPowerDemand", "BasicMotions", "JapaneseVowels", "PickupGestureWiimoteZ"]
)
def test_files_are_read_as_aeon_reads_them(name):
    datasets = pytest.importorskip("aeon.datasets")
    data = load(name)
    for part, X, y in (("TRAIN", data.X_train, data.y_train), ("TEST", data.X_test, data.y_test)):
        path = ucr._aeon_folder() / name / f"{name}_{part}.ts"
        expected_X, expected_y = datasets.load_from_ts_file(str(path))
        raw, labels = read_series(path)
        assert type(raw) is type(X) is type(expected_X)
        assert len(raw) == len(X) == len(expected_X)
        for case, normal, expected in zip(raw, X, expected_X, strict=True):
            np.testing.assert_array_equal(case, expected)
            assert normal.shape == expected.shape
            assert normal.dtype == np.float64
        assert [label.lower() for label in labels] == list(expected_y)  # aeon writes labels in lower case
        np.testing.assert_array_equal(y, labels)


def test_gunpoint_is_taken_as_it_is():
    pytest.importorskip("aeon")
    data = load("GunPoint")
    assert data.X_train.shape == (50, 1, 150)
    assert data.X_test.shape == (150, 1, 150)
    assert set(data.y_train) == {"1", "2"}
    folder = ucr._aeon_folder() / "GunPoint"
    np.testing.assert_array_equal(data.X_train, read_series(folder / "GunPoint_TRAIN.ts")[0])
    assert (data.mean, data.std, data.n_channels, data.lengths) == (None, None, 1, (150, 150))
    same, labels = read_series(folder / "GunPoint_TRAIN.tsv")
    np.testing.assert_allclose(same, data.X_train, rtol=1e-6)
    assert labels.tolist() == data.y_train.tolist()


def test_data_sets_that_cannot_be_used():
    pytest.importorskip("aeon")
    assert "GunPoint" in available()
    assert "Airline" not in available()
    with pytest.raises(ValueError, match=r"^no data set 'GunPiont' in the installed aeon; it has .*GunPoint, "):
        load("GunPiont")
    with pytest.raises(ValueError, match="no data set"):
        load("Covid3Month")  # it has a number to predict, no classes


@pytest.mark.parametrize(
    ("name", "channels", "lengths"), [("JapaneseVowels", 12, (7, 29)), ("PickupGestureWiimoteZ", 1, (29, 361))]
)
def test_series_of_unequal_lengths(name, channels, lengths):
    pytest.importorskip("aeon")
    data = load(name)
    assert (data.n_channels, data.lengths) == (channels, lengths)
    union = np.concatenate([*data.X_train, *data.X_test], axis=1)
    np.testing.assert_allclose(union.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(union.std(1), 1, rtol=1e-12)
    raw = read_series(ucr._aeon_folder() / name / f"{name}_TEST.ts")[0]
    for case, expected in zip(normalised(raw, data.mean, data.std), data.X_test, strict=True):
        np.testing.assert_array_equal(case, expected)


def test_missing_aeon_names_the_extra(monkeypatch):
    monkeypatch.setattr(ucr, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs aeon: run pip install '\.\[data\]'"):
        load("GunPoint")


HEADER = "# a comment\n@problemName {name}\n@timeStamps false\n@classLabel true a b\n@data\n"


def write(folder: Path, name: str, train: str, test: str, header: str = HEADER, suffix: str = ".ts") -> None:
    (folder / name).mkdir()
    for part, body in (("TRAIN", train), ("TEST", test)):
        (folder / name / f"{name}_{part}{suffix}").write_text(header.format(name=name) + body)


def test_tab_separated_files(tmp_path):
    write(tmp_path, "Tabs", "2\t1.5\t2\tNaN\n1\t3\t4\t5\n", "1\t5\t6\tNaN\n\n1\t7\t8\tNaN\n", "", ".tsv")
    assert available(tmp_path) == ["Tabs"]
    data = load("Tabs", tmp_path)
    assert [case.tolist() for case in data.X_train] == [[[1.5, 2]], [[3, 4, 5]]]
    assert data.y_train.tolist() == ["2", "1"]
    np.testing.assert_array_equal(data.X_test, [[[5, 6]], [[7, 8]]])
    assert (data.n_channels, data.lengths) == (1, (2, 3))
    series, labels = read_series(tmp_path / "Tabs" / "Tabs_TEST.tsv", labels=False)
    assert labels is None
    np.testing.assert_array_equal(series, [[[1, 5, 6]], [[1, 7, 8]]])


def test_files_without_classes(tmp_path):
    path = tmp_path / "some.ts"
    path.write_text("@timeStamps false\n@classLabel false\n@data\n1,2:3,4\n5,6,7:8,9,10\n")
    series, labels = read_series(path)
    assert labels is None
    assert [case.tolist() for case in series] == [[[1, 2], [3, 4]], [[5, 6, 7], [8, 9, 10]]]
    path.write_text("@targetlabel true\n@data\n1,2:0.5\n")
    series, labels = read_series(path)
    assert (series.tolist(), labels.tolist()) == ([[[1, 2]]], ["0.5"])


def test_files_that_cannot_be_read(tmp_path):
    tabs, words, binary = tmp_path / "a.tsv", tmp_path / "a.csv", tmp_path / "b.ts"
    words.write_text("1,2")
    binary.write_bytes(b"@data\n\xff\n")
    for path, message in (
        (tmp_path / "none.ts", "none.ts is not a file"),
        (words, "a.csv must be a .ts or .tsv file"),
        (binary, "b.ts is not a text file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_series(path)
    for text, message in (
        ("1\t2\tNaN\t3\n", r"a.tsv has missing values \(NaN\) .*in case 1"),
        ("1\t2\n1\tNaN\n", r"a.tsv has empty series, for example case 2"),
        ("1\t2\n1\tx\n", r"case 2 of a.tsv is not made of numbers"),
        ("\n", r"a.tsv has no cases"),
    ):
        tabs.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_series(tabs)


def test_listed_sets_are_normalised_as_a_whole(tmp_path):
    for name in ("Chinatown", "Other"):
        write(tmp_path, name, "1,2:a\n3,4:b\n", "5,6:a\n7,9:b\n")
    train, test = np.array([[[1.0, 2]], [[3, 4]]]), np.array([[[5.0, 6]], [[7, 9]]])
    other = load("Other", tmp_path)
    np.testing.assert_array_equal(other.X_train, train)
    np.testing.assert_array_equal(other.X_test, test)
    union = np.concatenate([train, test])
    listed = load("Chinatown", tmp_path)
    np.testing.assert_allclose(listed.X_train, (train - union.mean()) / union.std(), rtol=1e-14)
    np.testing.assert_allclose(listed.X_test, (test - union.mean()) / union.std(), rtol=1e-14)


def test_the_list_of_normalised_sets():
    with (Path(ucr.__file__).parents[1] / "models" / "published" / "usrl_ucr.csv").open() as file:
        new = {row["dataset"] for row in csv.DictReader(file) if row["part"] == "new43"}
    assert len(ucr.NORMALISED) == 34
    assert new >= ucr.NORMALISED
    assert "GunPoint" not in ucr.NORMALISED


def test_channels_are_normalised_one_by_one(tmp_path):
    write(tmp_path, "Two", "1,2:5,5:a\n3,4:5,5:b\n", "5,6:5,5:a\n7,8:5,5:b\n")
    data = load("Two", tmp_path)
    both = np.concatenate([data.X_train, data.X_test])
    np.testing.assert_allclose(both.mean((0, 2)), 0, atol=1e-15)
    np.testing.assert_allclose(both.std((0, 2)), [1, 0], rtol=1e-14)  # a constant channel stays finite


BAD_FILES = {
    "NaN": ("1,2:a\n3,nan:b\n", r"Bad_TRAIN.ts has missing values \(NaN\)"),
    "question mark": ("1,2:a\n3,?:b\n", r"missing values"),
    "infinity": ("1,2:a\n3,inf:b\n", r"missing values \(NaN\) or infinite ones"),
    "unequal channels": ("1,2:3,4:a\n3:4,5:b\n", r"channels of case 2 of Bad_TRAIN.ts have unequal lengths, \[1, 2\]"),
    "empty series": ("1,2:a\n:b\n", r"Bad_TRAIN.ts has empty series"),
    "no cases": ("", r"Bad_TRAIN.ts has no cases"),
    "no channels": ("a\nb\n", r"same number of channels"),
    "channels differ by case": ("1,2:a\n1,2:3,4:b\n", r"same number of channels"),
    "channels differ by part": ("1,2:3,4:a\n1,2:3,4:b\n", r"Bad has 2 channels for training, but 1 for testing"),
    "words": ("1,2:a\n3,x:b\n", r"case 2 of Bad_TRAIN.ts is not made of numbers"),
}


@pytest.mark.parametrize(("train", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(train, message, tmp_path):
    write(tmp_path, "Bad", train, "1,2:a\n3,4:b\n")
    with pytest.raises(ValueError, match=message):
        load("Bad", tmp_path)


def test_time_stamps_are_refused(tmp_path):
    write(tmp_path, "Stamped", "(0,1):a\n", "(0,1):a\n", HEADER.replace("@timeStamps false", "@timeStamps true"))
    with pytest.raises(ValueError, match="time stamps"):
        load("Stamped", tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        load("GunPoint", tmp_path / "no")
    with pytest.raises(ValueError, match="it has none"):
        load("GunPoint", tmp_path)
