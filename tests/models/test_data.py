"""The loader, and the table of published figures."""

import csv
from pathlib import Path

import numpy as np
import pytest

import pykernels.data.ucr as ucr
from pykernels.data import available, load
from pykernels.models.published import published_accuracy


@pytest.fixture
def no_network(monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", lambda *args, **options: pytest.fail("it opened a connection"))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["GunPoint", "ArrowHead", "ItalyPowerDemand", "BasicMotions"])
def test_files_are_read_as_aeon_reads_them(name):
    datasets = pytest.importorskip("aeon.datasets")
    data = load(name)
    for part, X, y in (("TRAIN", data.X_train, data.y_train), ("TEST", data.X_test, data.y_test)):
        path = ucr._aeon_folder() / name / f"{name}_{part}.ts"
        expected_X, expected_y = datasets.load_from_ts_file(str(path))
        raw, labels = ucr._read(name, path)
        np.testing.assert_array_equal(raw, expected_X)
        assert [label.lower() for label in labels] == list(expected_y)  # aeon writes labels in lower case
        np.testing.assert_array_equal(y, labels)
        assert X.shape == expected_X.shape
        assert X.dtype == np.float64


def test_gunpoint_is_taken_as_it_is():
    pytest.importorskip("aeon")
    data = load("GunPoint")
    assert data.X_train.shape == (50, 1, 150)
    assert data.X_test.shape == (150, 1, 150)
    assert set(data.y_train) == {"1", "2"}
    np.testing.assert_array_equal(data.X_train, ucr._read("", ucr._aeon_folder() / "GunPoint" / "GunPoint_TRAIN.ts")[0])


def test_data_sets_that_cannot_be_used():
    pytest.importorskip("aeon")
    assert "GunPoint" in available()
    assert "Airline" not in available()
    with pytest.raises(ValueError, match=r"^no data set 'GunPiont' in the installed aeon; it has .*GunPoint, "):
        load("GunPiont")
    with pytest.raises(ValueError, match="no data set"):
        load("Covid3Month")  # it has a number to predict, no classes
    with pytest.raises(ValueError, match=r"PickupGestureWiimoteZ has series of unequal lengths .*not supported yet"):
        load("PickupGestureWiimoteZ")


def test_missing_aeon_names_the_extra(monkeypatch):
    monkeypatch.setattr(ucr, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs aeon: run pip install '\.\[data\]'"):
        load("GunPoint")


HEADER = "# a comment\n@problemName {name}\n@timeStamps false\n@classLabel true a b\n@data\n"


def write(folder: Path, name: str, train: str, test: str, header: str = HEADER) -> None:
    (folder / name).mkdir()
    for part, body in (("TRAIN", train), ("TEST", test)):
        (folder / name / f"{name}_{part}.ts").write_text(header.format(name=name) + body)


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
    "unequal": ("1,2:a\n3:b\n", r"unequal lengths \(1 to 2\)"),
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


def test_published_figures():
    assert published_accuracy("GunPoint", "ours_K5") == 0.987
    assert published_accuracy("GunPoint", "ours_combined") == 0.993
    assert published_accuracy("BasicMotions", "ours_K20", "uea") == 1.0
    assert published_accuracy("Phoneme", "ours_K5") == 0.249
    assert published_accuracy("Phoneme", "ours_K5", "uea") == 0.216
    assert published_accuracy("GunPoint", "TimeNet") is None
    assert published_accuracy("GunPoint", "ours_K20") is None
    assert published_accuracy("GunPoint", "ours_K5", "uea") is None
    assert published_accuracy("MyOwn", "ours_K5") is None
    with pytest.raises(ValueError, match="archive must be one of ucr, uea; got 'ucsd'"):
        published_accuracy("GunPoint", "ours_K5", "ucsd")
    for column in ("ours_K3", "note", "dataset"):
        with pytest.raises(ValueError, match=r"column must be one of .*ours_K5"):
            published_accuracy("GunPoint", column)


def test_published_means_are_those_derived_from_the_tables():
    folder = Path(ucr.__file__).parents[1] / "models" / "published"
    means = {}
    for name, column in (("ucr", "ours_combined"), ("uea", "ours_combined")):
        with (folder / f"usrl_{name}.csv").open() as file:
            names = [row["dataset"] for row in csv.DictReader(file)]
        means[name] = len(names), np.mean([published_accuracy(n, column, name) for n in names])
    assert means["ucr"] == (125, pytest.approx(0.820, abs=1e-3))
    assert means["uea"] == (30, pytest.approx(0.669, abs=1e-3))
