"""Checkpoint files: what is saved comes back bit for bit, nothing else is accepted, and no crash leaves half a file."""

import itertools
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file
from sklearn.exceptions import NotFittedError

from pykernels.models import _checkpoint, _usrl_checkpoint
from pykernels.models.usrl import USRLClassifier, USRLTransformer

TINY = {"channels": 3, "depth": 1, "reduced_size": 5, "out_channels": 4, "n_steps": 3, "random_state": 0}


def waves(n=20, channels=1, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return np.sin(0.3 * (1 + 2 * y[:, None, None]) * np.arange(24) + rng.uniform(0, 6, (n, channels, 1))), y


LABELS = {
    "words": lambda y: np.array(["slow", "fast", "very fast"])[y],
    "objects": lambda y: np.array(["slow", "fast", "very fast"], dtype=object)[y],
    "int64": lambda y: y - 1,
    "uint8": lambda y: y.astype(np.uint8),
    "float32": lambda y: y.astype(np.float32),
    "bool": lambda y: y > 0,
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("labels", "classes", "n"), [*((name, 3, 24) for name in LABELS), ("words", 2, 60)])
def test_a_classifier_decides_the_same(labels, classes, n, dtype, tmp_path):
    X, y = waves(n, 2, classes)
    model = USRLClassifier((1, 2), dtype=dtype, **TINY).fit(X, LABELS[labels](y))
    model.save(tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = USRLClassifier.load(tmp_path / "model.safetensors")
    other = waves(30, 2, 3, seed=1)[0]
    np.testing.assert_array_equal(loaded.decision_function(other), model.decision_function(other))
    np.testing.assert_array_equal(loaded.predict(other), model.predict(other))
    assert loaded.predict(other).dtype == model.predict(other).dtype
    assert loaded.get_params() == model.get_params()
    assert list(loaded.classes_) == list(model.classes_)
    assert loaded.n_features_in_ == 2
    for name, value in vars(model.svm_).items():
        if name != "class_weight_":
            np.testing.assert_array_equal(getattr(loaded.svm_, name), value, err_msg=name)


def test_a_transformer_gives_the_same_features(tmp_path):
    X, _ = waves()
    model = USRLTransformer((2, 1), **TINY).fit(X)
    model.save(str(tmp_path / "model"))
    loaded = USRLTransformer.load(str(tmp_path / "model"))
    np.testing.assert_array_equal(loaded.transform(X), model.transform(X))
    np.testing.assert_array_equal(loaded.losses_, model.losses_)
    assert loaded.step_seconds_ == model.step_seconds_
    assert loaded.get_params() == model.get_params()
    assert not any(encoder.training for encoder in loaded.encoders_)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()


def test_the_transformer_of_a_classifier(tmp_path):
    X, y = waves()
    model = USRLClassifier(1, **TINY).fit(X, y)
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(
        USRLTransformer.load(tmp_path / "model").transform(X), model.transformer_.transform(X)
    )


def test_parameters_of_other_types(tmp_path):
    X, _ = waves()
    options = {**TINY, "n_steps": np.int64(2), "learning_rate": np.float32(0.01)}
    model = USRLTransformer(np.array([1, 2]), **{**options, "random_state": np.random.RandomState(3)}).fit(X)
    model.save(tmp_path / "model")
    loaded = USRLTransformer.load(tmp_path / "model")
    assert loaded.n_negatives == (1, 2)
    assert loaded.n_steps == 2
    assert loaded.random_state.randint(2**30) == model.random_state.randint(2**30)


def test_what_is_not_fitted_is_not_saved(tmp_path):
    for model in (USRLTransformer(**TINY), USRLClassifier(**TINY)):
        with pytest.raises(NotFittedError):
            model.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a saved classifier."""
    path = tmp_path_factory.mktemp("saved") / "model"
    USRLClassifier(1, **TINY).fit(*waves(24, 2, 3)).save(path)
    return path.read_bytes()


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_executed",)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Evil()))


FILES = {
    "empty": (lambda path: path.write_bytes(b""), "is not a checkpoint, or it is cut off or damaged"),
    "text": (lambda path: path.write_text("hello " * 100), "is not a checkpoint"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Evil())), "is not a checkpoint"),
    "torch.save": (lambda path: torch.save({"a": torch.ones(3)}, path), "is not a checkpoint"),
    "zip": (zipped, "is not a checkpoint"),
    "other safetensors": (lambda path: save_file({"a": torch.ones(3)}, path), "no checkpoint of pykernels"),
    "bad header": (
        lambda path: save_file({"a": torch.ones(3)}, path, {_checkpoint.FORMAT: "{"}),
        r"the header of \S+ is damaged",
    ),
    "folder": (lambda path: path.mkdir(), "is a folder"),
}


@pytest.mark.parametrize(("write", "message"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("cls", [USRLTransformer, USRLClassifier])
def test_other_files_are_refused(write, message, cls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model"
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        cls.load(path)
    assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        USRLClassifier.load(tmp_path / "model")
    assert str(caught.value.filename) == str(tmp_path / "model")


def test_a_file_cut_off_anywhere_is_refused(saved, tmp_path):
    path = tmp_path / "model"
    for end in (*range(0, len(saved), len(saved) // 50), len(saved) - 1):
        path.write_bytes(saved[:end])
        with pytest.raises(ValueError, match="cut off or damaged"):
            USRLClassifier.load(path)


def changed(saved, path, change):
    """Write the saved classifier with other tensors or values."""
    path.write_bytes(saved)
    tensors = load_file(path)
    with _open(path) as file:
        content = json.loads(file.metadata()[_checkpoint.FORMAT])
    change(content, tensors)
    save_file(tensors, path, {_checkpoint.FORMAT: json.dumps(content)})


def _open(path):
    import safetensors

    return safetensors.safe_open(path, "pt")


def at(*keys, value):
    """A change of one value of the JSON."""

    def change(content, tensors):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def tensor(name, function):
    def change(content, tensors):
        tensors[name] = function(tensors[name]).contiguous()

    return change


def without(name):
    def change(content, tensors):
        del tensors[name]

    return change


PARAMETERS = ("values", "transformer", "parameters")
CHANGES = {
    "version": (at("version", value=2), r"has format 2, written by pykernels '\S+'; this one reads format 1"),
    "kind": (at("kind", value="usrl.training"), "holds a 'usrl.training', where a 'usrl.model' is needed"),
    "no values": (lambda content, tensors: content.pop("values"), "header of .* is damaged"),
    "values of another type": (at("values", value=[]), "is damaged"),
    "no parameters": (at("values", "transformer", value={}), "is damaged: there is no 'parameters' in it"),
    "an unknown parameter": (at(*PARAMETERS, "colour", value=1), "a newer pykernels wrote it: .* colour"),
    "a bad parameter": (at(*PARAMETERS, "depth", value=-1), "depth must be a positive integer"),
    "a parameter of another type": (at(*PARAMETERS, "dtype", value={}), "dtype must be 'float32' or 'float64'"),
    "other sizes": (at(*PARAMETERS, "channels", value=7), "is damaged: Error.* in loading state_dict"),
    "other depth": (at(*PARAMETERS, "depth", value=2), "is damaged: .*Missing key"),
    "more encoders": (at(*PARAMETERS, "n_negatives", value=[1, 2]), "is damaged: .*Missing key"),
    "another dtype": (at(*PARAMETERS, "dtype", value="float64"), "weights of encoder 0 are not all torch.float64"),
    "no weight": (without("encoders.0.linear.bias"), "is damaged: .*Missing key"),
    "a weight of another shape": (tensor("encoders.0.linear.bias", lambda t: t[1:]), "size mismatch"),
    "no SVM array": (without("svm.intercept"), "is damaged: there is no 'intercept' in it"),
    "fewer support vectors": (tensor("svm.support_vectors", lambda t: t[1:]), r"svm\.\S+ must have shape"),
    "an SVM that decides otherwise": (tensor("svm.intercept", lambda t: t + 1.0), "does not work in the scikit-learn"),
    "other features": (tensor("svm.support_vectors", lambda t: t[:, 1:]), r"svm\.support_vectors must have shape"),
    "too many vectors of a class": (tensor("svm.n_support", lambda t: t * 1000), "svm.n_support must add up to"),
    "negative counts": (tensor("svm.n_support", lambda t: t - torch.tensor([99, 0, -99]).int()), "must add up to"),
    "float32 SVM": (tensor("svm.dual_coef", lambda t: t.float()), r"svm\.dual_coef must have .* dtype float64"),
    "an executable dtype": (at("values", "classifier", "svm", "classes_dtype", value="os.system"), "is damaged"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_files_that_do_not_fit_together_are_refused(change, message, saved, tmp_path):
    path = tmp_path / "model"
    changed(saved, path, change)
    with pytest.raises(ValueError, match=message) as caught:
        USRLClassifier.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unchanged_copy_is_accepted(saved, tmp_path):
    changed(saved, tmp_path / "model", lambda content, tensors: None)
    assert USRLClassifier.load(tmp_path / "model").predict(waves(3, 2)[0]).shape == (3,)


def test_a_transformer_is_no_classifier(tmp_path):
    USRLTransformer(1, **TINY).fit(waves()[0]).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"holds a transformer without a classifier; USRLTransformer\.load reads it"):
        USRLClassifier.load(tmp_path / "model")


KILLED = """
import os, sys
from pathlib import Path
import torch
from pykernels.models import _checkpoint

path, place, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
original = getattr(os, place)
def killed(*args, **options):
    global count
    count -= 1
    if count < 0:
        os._exit(9)
    return original(*args, **options)
_checkpoint.save(path, "test", {"a": torch.zeros(1000)}, {"which": "old"})
setattr(os, place, killed)
_checkpoint.save(path, "test", {"a": torch.ones(1000)}, {"which": "new"})
"""


@pytest.mark.parametrize(("place", "count"), [("fsync", 0), ("replace", 0), ("fsync", 1), ("unlink", 0)])
def test_a_crash_leaves_the_old_file_or_the_new_one(place, count, tmp_path):
    path = tmp_path / "file"
    run = subprocess.run([sys.executable, "-P", "-c", KILLED, str(path), place, str(count)], timeout=120)
    assert run.returncode == 9
    tensors, values = _checkpoint.load(path, "test")
    assert tensors["a"].unique().tolist() == [values["which"] == "new"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    _checkpoint.save(path, "test", {"a": torch.zeros(3)}, {})
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _checkpoint.save(path, "test", {"a": torch.ones(3)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_tensors_and_values_come_back(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"base": base, "shares": base, "transposed": base.T, "number": torch.tensor(3), "none": torch.empty(0, 2)}
    values = {"float": 0.1 + 0.2, "int": 2**100, "text": "é\n", "list": [1, None, True]}
    _checkpoint.save(tmp_path / "file", "test", tensors, {**values, "numpy": np.float64(0.1)})
    loaded = _checkpoint.load(tmp_path / "file", "test")
    assert loaded.values == {**values, "numpy": 0.1}
    assert all(torch.equal(loaded.tensors[name], value) for name, value in tensors.items())
    with pytest.raises(TypeError, match="a checkpoint cannot hold a set"):
        _checkpoint.save(tmp_path / "file", "test", {}, {"a": {1}})


def trainings(**options):
    return USRLTransformer((1, 2), **{**TINY, **options}).trainings(waves()[0])


@pytest.mark.parametrize("steps", [0, 2, 3, 4])
def test_trainings_go_on_from_a_file(steps, tmp_path):
    whole, first = trainings(), trainings()
    every = list(itertools.chain.from_iterable([t] * t.n_steps for t in whole))
    for training in every:
        training.step()
    for i in range(steps):
        first[0 if i < 3 else 1].step()
    _usrl_checkpoint.save_trainings(first, tmp_path / "file", {"mine": 1})
    second = trainings()
    saved = _usrl_checkpoint.SavedTrainings(tmp_path / "file")
    assert saved.values == {"mine": 1}
    saved.restore(second)
    for training, expected in zip(second, whole, strict=True):
        while not training.done:
            training.step()
        np.testing.assert_array_equal(training.losses, expected.losses)
        for name, value in expected.encoder.state_dict().items():
            assert torch.equal(training.encoder.state_dict()[name], value)


def test_trainings_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "file"
    _usrl_checkpoint.save_trainings(trainings(), path, {})
    saved = _usrl_checkpoint.SavedTrainings(path)
    with pytest.raises(ValueError, match=r"file: the saved training has other settings"):
        saved.restore(trainings(n_steps=9))
    with pytest.raises(ValueError, match=r"file: it holds 2 trainings, where there are 1 now"):
        saved.restore(trainings()[:1])
    with pytest.raises(ValueError, match=r"file: the saved training has no fitting tensors"):
        saved.restore(trainings(channels=4))
    with pytest.raises(ValueError, match=r"holds a 'usrl.training', where a 'usrl.model' is needed"):
        USRLTransformer.load(path)


def test_normalisation_and_notes(tmp_path):
    model = USRLTransformer(1, **TINY).fit(waves(channels=2)[0])
    path = tmp_path / "model"
    normalisation = _usrl_checkpoint.Normalisation(np.array([[1.0], [2.0]]), np.array([[0.5], [0.25]]))
    _usrl_checkpoint.save(model, path, normalisation=normalisation, about={"dataset": "Waves"})
    saved = _usrl_checkpoint.SavedModel(path)
    assert saved.about == {"dataset": "Waves"}
    np.testing.assert_array_equal(saved.normalisation, normalisation)
    for wrong in (normalisation._replace(mean=np.zeros((1, 1))), normalisation._replace(std=np.array([[1.0], [0.0]]))):
        _usrl_checkpoint.save(model, path, normalisation=wrong)
        with pytest.raises(ValueError, match=r"the normalisation must have shape \(2, 1\), and a positive std"):
            _usrl_checkpoint.SavedModel(path)
