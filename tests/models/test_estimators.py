"""The scikit-learn estimators and the SVM rule."""

import copy
import pickle
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", "1.6")
from sklearn.base import clone
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks

import pykernels.models.usrl as usrl
from pykernels.models.usrl import USRLClassifier, USRLTransformer, fit_svm

TINY = {"channels": 3, "depth": 1, "reduced_size": 5, "out_channels": 4, "n_steps": 3, "random_state": 0}


def waves(n=20, channels=1, length=24, seed=0):
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 6, (n, channels, 1))
    y = np.arange(n) % 2
    return np.sin(0.3 * (1 + 2 * y[:, None, None]) * np.arange(length) + phase), np.array(["slow", "fast"])[y]


ANY_LENGTH = "series may have another length than in fit, and the channels are what must match"
EXPECTED_FAILURES = {
    "check_n_features_in": ANY_LENGTH,
    "check_n_features_in_after_fitting": ANY_LENGTH,
    "check_transformer_general": ANY_LENGTH,
    "check_classifiers_train": ANY_LENGTH,
    "check_estimators_empty_data_messages": "the message speaks of empty series, not of features",
}


@parametrize_with_checks(
    [USRLTransformer((1, 2), dtype="float64", **TINY), USRLClassifier(1, dtype="float64", **{**TINY, "n_steps": 40})],
    expected_failed_checks=lambda estimator: EXPECTED_FAILURES,
)
@pytest.mark.filterwarnings("ignore:Solver terminated early")  # some checks give labels that are noise
def test_scikit_learn(estimator, check, monkeypatch):
    monkeypatch.setattr(usrl, "SVM_MAX_ITERATIONS", 10_000)
    check(estimator)


def test_features_are_those_of_each_encoder_side_by_side():
    X, _ = waves(channels=2)
    model = USRLTransformer((1, 3), **TINY).fit(X)
    features = model.transform(X)
    assert features.shape == (20, 8)
    assert features.dtype == np.float32
    assert [len(losses) for losses in model.losses_] == [3, 3]
    assert len(model.step_seconds_) == 2
    assert min(model.step_seconds_) > 0
    for i, encoder in enumerate(model.encoders_):
        expected = encoder(torch.tensor(X, dtype=torch.float32)).detach().numpy()
        np.testing.assert_allclose(features[:, 4 * i : 4 * i + 4], expected, rtol=1e-5, atol=1e-6)
    assert list(model.get_feature_names_out()) == [f"usrltransformer{i}" for i in range(8)]
    assert model.n_features_in_ == 2


def test_encoders_are_trained_by_the_published_recipe():
    X, _ = waves()
    trainings = USRLTransformer(**{**TINY, "n_steps": None}).trainings(X)
    assert [t.n_negatives for t in trainings] == [1, 2, 5, 10]
    assert [t.n_steps for t in trainings] == [1500, 1500, 1500, 2000]
    assert {(t.batch_size, t.learning_rate) for t in trainings} == {(10, 1e-3)}
    defaults = USRLTransformer().get_params()
    sizes = ("channels", "depth", "reduced_size", "out_channels", "kernel_size", "dtype")
    assert [defaults[name] for name in sizes] == [40, 10, 160, 320, 3, "float32"]


def test_fit_is_the_trainings_done_by_somebody_else():
    X, y = waves()
    model = USRLTransformer((1, 2), **TINY)
    trainings = model.trainings(X)
    for training in reversed(trainings):
        while not training.done:
            training.step()
    fitted = clone(model).fit(X)
    assert model.finish(trainings) is model
    np.testing.assert_array_equal(model.transform(X), fitted.transform(X))
    for losses, expected in zip(model.losses_, fitted.losses_, strict=True):
        np.testing.assert_array_equal(losses, expected)
    assert model.n_features_in_ == 1
    assert min(model.step_seconds_) > 0
    classifier = USRLClassifier((1, 2), **TINY)
    assert classifier.finish(model, X, y) is classifier
    np.testing.assert_array_equal(classifier.decision_function(X), clone(classifier).fit(X, y).decision_function(X))


def test_a_training_that_is_not_done_is_not_taken():
    X, _ = waves()
    model = USRLTransformer(2, **TINY)
    trainings = model.trainings(X)
    trainings[0].step()
    with pytest.raises(ValueError, match=r"^trainings must be done, but the one with K=2 has 2 of 3 steps left$"):
        model.finish(trainings)


def test_two_dimensions_are_one_channel_and_another_length_will_do():
    X, _ = waves()
    model = USRLTransformer(2, **TINY)
    features = model.fit_transform(X)
    np.testing.assert_array_equal(clone(model).fit(X[:, 0]).transform(X[:, 0]), features)
    assert model.transform(X[:, :, :7]).shape == features.shape
    assert model.transform(X[:1, :, :1]).shape == (1, 4)


def test_dtype_is_that_of_the_encoders_and_the_features():
    X, _ = waves()
    for dtype in ("float32", "float64"):
        model = USRLTransformer(2, **TINY, dtype=dtype).fit(X)
        assert {p.dtype for p in model.encoders_[0].parameters()} == {getattr(torch, dtype)}
        assert model.transform(X.astype("float32")).dtype == dtype


def test_random_state():
    X, _ = waves()
    model = USRLTransformer(2, **TINY)
    features = model.fit_transform(X)
    np.testing.assert_array_equal(clone(model).fit_transform(X), features)
    assert (clone(model).set_params(random_state=1).fit_transform(X) != features).any()
    state = np.random.RandomState(3)
    model.set_params(random_state=state)
    assert (model.fit_transform(X) != model.fit_transform(X)).any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_give_the_same_answers(copied):
    X, y = waves()
    model = USRLClassifier((1, 2), **TINY).fit(X, y)
    np.testing.assert_array_equal(copied(model).decision_function(X), model.decision_function(X))
    unfitted = copied(USRLTransformer(3, **TINY))
    assert unfitted.get_params() == USRLTransformer(3, **TINY).get_params()


def test_classifier_is_the_svm_on_the_features():
    X, y = waves()
    model = USRLClassifier(2, **TINY).fit(X, y)
    features = USRLTransformer(2, **TINY).fit_transform(X)
    expected = fit_svm(features, y)
    np.testing.assert_array_equal(model.predict(X), expected.predict(features))
    np.testing.assert_array_equal(model.decision_function(X), expected.decision_function(features))
    assert list(model.classes_) == ["fast", "slow"]
    assert model.n_features_in_ == 1


def test_classifier_learns_the_waves_and_works_with_scikit_learn():
    X, y = waves(40)
    scores = cross_val_score(USRLClassifier(2, **{**TINY, "n_steps": 40, "learning_rate": 1e-2}), X, y, cv=3)
    assert scores.mean() > 0.9
    pipeline = make_pipeline(USRLTransformer(2, **TINY), StandardScaler(), SVC()).fit(X, y)
    assert pipeline.predict(X).shape == (40,)


def ragged_waves(n=20, channels=2, seed=0):
    X, y = waves(n, channels, seed=seed)
    return [case[:, : 3 + 7 * i % 22] for i, case in enumerate(X)], y


def test_series_of_unequal_lengths():
    X, y = ragged_waves()
    model = USRLTransformer(2, dtype="float64", **TINY)
    features = model.fit_transform(X)
    assert features.shape == (20, 4)
    one_by_one = np.concatenate([model.transform(case[None]) for case in X])
    np.testing.assert_allclose(features, one_by_one, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(clone(model).fit_transform(X), features)
    np.testing.assert_array_equal(model.transform(np.array([*X, None], dtype=object)[:-1]), features)
    np.testing.assert_array_equal(model.transform([torch.tensor(case) for case in X]), features)
    classifier = USRLClassifier(2, dtype="float64", **TINY).fit(X, y)
    np.testing.assert_array_equal(classifier.transformer_.transform(X), features)
    assert classifier.predict(X[3:8]).tolist() == classifier.predict(X)[3:8].tolist()
    with pytest.raises(ValueError, match="y has 19 labels, but X has 20 cases"):
        USRLClassifier(2, **TINY).fit(X, y[1:])
    with pytest.raises(ValueError, match=r"^X has 1 channels, but USRLTransformer was fitted with 2$"):
        model.transform([case[0] for case in X])


def test_lists_of_equal_series_are_arrays():
    X, _ = waves()
    features = USRLTransformer(2, **TINY).fit_transform(X)
    for same in (list(X), list(X[:, 0]), X.tolist()):
        np.testing.assert_array_equal(USRLTransformer(2, **TINY).fit_transform(same), features)
    univariate = [case[0, : 5 + i] for i, case in enumerate(X)]
    np.testing.assert_array_equal(
        USRLTransformer(2, **TINY).fit_transform(univariate),
        USRLTransformer(2, **TINY).fit_transform([case[None] for case in univariate]),
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_trained_on_unequal_lengths_and_copied(copied):
    X, _ = ragged_waves()
    model = USRLTransformer(2, **TINY).fit(X)
    np.testing.assert_array_equal(copied(model).transform(X), model.transform(X))


def fitted_transformer():
    return USRLTransformer(1, **TINY).fit(waves()[0])


BAD_SERIES = {
    "one dimension": (np.zeros(5), r"^X must have shape \(cases, channels, time\).*got \(5,\)"),
    "four dimensions": (np.zeros((2, 1, 5, 1)), r"^X must have shape .*got \(2, 1, 5, 1\)"),
    "no cases": (np.zeros((0, 1, 5)), r"^X has no cases; it has shape \(0, 1, 5\)"),
    "no channels": (np.zeros((3, 0, 5)), r"^X has no channels"),
    "empty series": (np.zeros((3, 1, 0)), r"^X has empty series"),
    "empty univariate series": (np.zeros((3, 0)), r"^X has empty series; it has shape \(3, 0\)"),
    "NaN": (np.array([[1.0, np.nan, 2.0]]), r"^X contains NaN"),
    "infinity": (np.array([[1.0, -np.inf, 2.0]]), r"^X contains infinity"),
    "too large for float32": (np.array([[1.0, 1e39, 2.0]]), r"too large for torch.float32"),
    "complex": (np.array([[1.0, 1j]]), r"^Complex data not supported: X"),
    "words": (np.array([["a", "b"]]), r"^X must be an array of numbers"),
    "NaN in one of unequal lengths": ([np.ones((1, 2)), np.full((1, 3), np.nan)], r"^X contains NaN"),
    "one of unequal lengths is empty": ([np.ones((1, 2)), np.ones((1, 0))], r"^X has empty series; X\[1\] has shape"),
    "unequal channels": ([np.ones((1, 2)), np.ones((3, 2))], r"^X has series of 1 and 3 channels; all must have"),
    "unequal dimensions": ([np.ones((1, 2)), np.ones((1, 1, 2))], r"^X\[1\] must have shape \(channels, time\) or"),
    "words of unequal length": ([np.array(["a"]), np.array(["b", "c"])], r"^X must be an array of numbers"),
    "lists of unequal lengths": ([[1.0, 2.0], [1.0]], r"^X must be an array of numbers"),
}


@pytest.mark.parametrize(("X", "message"), BAD_SERIES.values(), ids=BAD_SERIES)
def test_bad_series(X, message):
    for call in (USRLTransformer(1, **TINY).fit, fitted_transformer().transform):
        with pytest.raises(ValueError, match=message) as caught:
            call(X)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        USRLClassifier(1, **TINY).fit(X, ["a", "b", "a"])


def test_wrong_number_of_channels():
    with pytest.raises(ValueError, match=r"^X has 3 channels .*, but USRLTransformer was fitted with 1$"):
        fitted_transformer().transform(np.zeros((2, 3, 24)))


def test_bad_labels_are_found_before_the_training(monkeypatch):
    monkeypatch.setattr(USRLTransformer, "fit", lambda *args: pytest.fail("it trained"))
    X, y = waves()
    for labels, message in (
        (y[:-1], "y has 19 labels, but X has 20 cases"),
        (["a"] * 20, "y has one class only, a;"),
        (None, "requires y"),
    ):
        with pytest.raises(ValueError, match=message):
            USRLClassifier(1, **TINY).fit(X, labels)


BAD_PARAMETERS = [
    ("n_negatives", 0),
    ("n_negatives", ()),
    ("n_negatives", (1, 2.5)),
    ("n_negatives", True),
    ("n_steps", 0),
    ("batch_size", None),
    ("depth", -1),
    ("channels", 2.0),
    ("learning_rate", 0.0),
    ("learning_rate", float("nan")),
    ("learning_rate", "fast"),
    ("dtype", "float16"),
    ("backend", "gpu"),
    ("device", "abacus"),
    ("device", "cuda:99"),
]


@pytest.mark.parametrize(("name", "value"), BAD_PARAMETERS)
def test_bad_parameters_are_named_at_fit(name, value):
    model = USRLTransformer(1, **TINY).set_params(**{name: value})
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        model.fit(waves()[0])


def test_progress_bar(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    USRLTransformer((1, 2), **TINY, progress=True).fit(waves()[0])
    printed = capsys.readouterr().err
    assert "K=1" in printed
    assert "3/3" in printed
    USRLTransformer(1, **TINY).fit(waves()[0])
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ModuleNotFoundError, match=r"a progress bar needs tqdm: run pip install '\.\[models\]'"):
        USRLTransformer(1, **TINY, progress=True).fit(waves()[0])


def blobs(n, n_classes=2, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    return rng.normal(size=(n, 6)) * spread + labels[:, None], labels


@pytest.mark.parametrize(("n", "n_classes"), [(49, 2), (54, 11), (12, 3)])
def test_svm_of_few_cases_has_an_infinite_penalty(n, n_classes, monkeypatch):
    monkeypatch.setattr(usrl, "GridSearchCV", lambda *args, **options: pytest.fail("it searched"))
    svm = fit_svm(*blobs(n, n_classes))
    assert svm.C == usrl.SVM_INFINITY
    assert (svm.kernel, svm.gamma, svm.max_iter) == ("rbf", "scale", 10**7)


@pytest.mark.parametrize(("n", "n_classes"), [(50, 2), (55, 11), (60, 3)])
def test_svm_of_more_cases_is_the_best_of_the_grid(n, n_classes):
    features, labels = blobs(n, n_classes)
    svm = fit_svm(features, labels)
    penalties = [1e-4, 1e-3, 1e-2, 1e-1, 1, 1e1, 1e2, 1e3, 1e4, usrl.SVM_INFINITY]
    folds = list(StratifiedKFold(5).split(features, labels))
    scores = [
        np.mean([SVC(C=C).fit(features[a], labels[a]).score(features[b], labels[b]) for a, b in folds])
        for C in penalties
    ]
    best = penalties[int(np.argmax(np.round(scores, 9)))]
    chosen = svm.C
    assert chosen == best
    np.testing.assert_array_equal(
        svm.decision_function(features), SVC(C=svm.C).fit(features, labels).decision_function(features)
    )


def test_svm_takes_the_smallest_of_equal_penalties():
    features, labels = blobs(60, spread=0.01)
    scores = {C: cross_val_score(SVC(C=C), features, labels, cv=5).mean() for C in (1e-4, 1e-1, 1, 1e4)}
    assert scores[1] == scores[1e4] == 1
    best = min(C for C in usrl.SVM_PENALTIES if cross_val_score(SVC(C=C), features, labels, cv=5).mean() == 1)
    chosen = fit_svm(features, labels).C
    assert chosen == best
    assert usrl._first_best(np.array([0.2, 0.9 - 1e-16, 0.9, 0.9 - 1e-3])) == 1


def test_svm_infinity_is_infinity_where_that_works():
    features, labels = blobs(40, 3)
    expected = SVC(C=np.inf).fit(features, labels)
    assert np.abs(expected.dual_coef_).max() < usrl.SVM_INFINITY
    np.testing.assert_array_equal(
        fit_svm(features, labels).decision_function(features), expected.decision_function(features)
    )


@pytest.mark.parametrize("n", [40, 60])
def test_svm_of_classes_that_cannot_be_separated(n):
    features, _ = blobs(n // 2)
    features = np.concatenate([features, features])
    labels = np.repeat([0, 1], n // 2)
    assert np.isfinite(fit_svm(features, labels).decision_function(features)).all()


def test_svm_of_many_cases_searches_and_fits_a_stratified_sample(monkeypatch):
    monkeypatch.setattr(usrl, "SVM_SEARCH_CASES", 60)
    features, labels = blobs(300, 3)
    svm = fit_svm(features, labels)
    assert svm.shape_fit_[0] == 60
    assert sorted(svm.classes_) == [0, 1, 2]
    np.testing.assert_array_equal(
        svm.decision_function(features), fit_svm(features, labels).decision_function(features)
    )
    monkeypatch.setattr(usrl, "SVM_SEARCH_CASES", 300)
    assert fit_svm(features, labels).shape_fit_[0] == 300


def test_svm_does_not_scale_the_features():
    features, labels = blobs(30)
    features[:, 0] *= 10
    expected = SVC(C=np.inf).fit(features, labels)
    np.testing.assert_array_equal(
        fit_svm(features, labels).decision_function(features), expected.decision_function(features)
    )
