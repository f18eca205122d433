"""Estimators by the kernels of infinitely wide networks."""

import copy
import pickle
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", "1.6")
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris, make_friedman1
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks

import pykernels
import pykernels.sklearn
from pykernels.sklearn import NTKClassifier, NTKRegressor, ntk_kernel


@parametrize_with_checks([NTKRegressor(), NTKRegressor(solver="cg"), NTKClassifier(), NTKClassifier(2, "erf")])
def test_scikit_learn(estimator, check):
    check(estimator)


def data(n=60, d=4, p=None, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, np.sin(X @ rng.normal(size=(d, *([] if p is None else [p]))))


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
@pytest.mark.parametrize("p", [None, 1, 3])
@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_prediction_is_the_formula(solver: str, p: int | None, kind: str):
    X, y = data(p=p)
    new = data(7, seed=1)[0]
    options = {"weight_std": [1.1, 1.2, 1.3], "bias_std": [0.3, 0.2, 0.1], "output_bias": True}
    model = NTKRegressor(2, "erf", alpha=0.05, kind=kind, solver=solver, tol=1e-12, **options).fit(X, y)
    network = pykernels.NTK(2, "erf", **options)
    K, k = (network.gram(torch.tensor(a), torch.tensor(X), kind=kind).numpy() for a in (X, new))
    dual = np.linalg.solve(K + 0.05 * np.eye(60), y - y.mean(0))
    # Conjugate gradients end at tol, and K divides by what it is to alpha; 7e-12 and 1e-12 seen.
    np.testing.assert_allclose(model.dual_coef_, dual, rtol=0, atol=7e-11)
    np.testing.assert_allclose(model.predict(new), y.mean(0) + k @ dual, rtol=0, atol=1e-11)
    assert model.predict(new).shape == (7, *y.shape[1:])
    assert model.n_features_in_ == 4
    assert model.X_fit_.shape == X.shape
    np.testing.assert_allclose(model.intercept_, y.mean(0), rtol=1e-14)


def test_is_kernel_ridge_regression():
    X, y = data()
    K = ntk_kernel(1)(X)
    expected = KernelRidge(alpha=0.1, kernel="precomputed").fit(K, y - y.mean()).predict(K)
    # Rounding of 1, times the condition of K + 0.1.
    np.testing.assert_allclose(NTKRegressor(alpha=0.1).fit(X, y).predict(X) - y.mean(), expected, rtol=1e-9, atol=0)


def test_conjugate_gradients_of_more_cases_than_the_preconditioner_has(monkeypatch: pytest.MonkeyPatch):
    X, y = data(300, 3, 2)
    new = data(50, 3, seed=2)[0]
    expected = NTKRegressor(2, solver="cholesky", alpha=1e-3).fit(X, y)
    iterations = []
    for landmarks in (250, 1):
        monkeypatch.setattr(pykernels.sklearn, "LANDMARKS", landmarks)
        model = NTKRegressor(2, solver="cg", alpha=1e-3, tol=1e-8).fit(X, y)
        np.testing.assert_allclose(model.predict(new), expected.predict(new), rtol=0, atol=2e-7)  # 4e-8 seen, by tol
        iterations.append(model.n_iter_)
    assert expected.n_iter_ == 1
    assert 1 < iterations[0] < iterations[1] / 5


def test_conjugate_gradients_warn_where_they_do_not_converge():
    X, y = data(600)
    with pytest.warns(ConvergenceWarning, match=r"^conjugate gradients did not converge in max_iter=1 iterations"):
        model = NTKRegressor(solver="cg", max_iter=1, tol=1e-10, alpha=1e-6).fit(X, y)
    assert model.n_iter_ == 1


def test_solver_is_chosen_by_size(monkeypatch: pytest.MonkeyPatch):
    X, y = data(40)
    assert NTKRegressor().fit(X, y).n_iter_ == 1
    monkeypatch.setattr(pykernels.sklearn, "MOST_DENSE", 39)
    monkeypatch.setattr(pykernels.sklearn, "LANDMARKS", 10)
    assert NTKRegressor().fit(X, y).n_iter_ > 1


def test_constant_targets():
    X, _ = data(20)
    for solver in ("cholesky", "cg"):
        model = NTKRegressor(solver=solver).fit(X, np.full((20, 2), 3.0))
        np.testing.assert_array_equal(model.predict(X), np.full((20, 2), 3.0))


def test_dtype():
    X, y = data()
    exact = NTKRegressor().fit(X, y).predict(X)
    rough = NTKRegressor(dtype="float32").fit(X, y)
    assert rough.dual_coef_.dtype == np.float32
    assert 0 < np.abs(rough.predict(X) - exact).max() < 1e-3


def test_learns_better_than_a_linear_kernel():
    X, y = make_friedman1(200, random_state=0)
    scores = [
        cross_val_score(make_pipeline(StandardScaler(), NTKRegressor(depth)), X, y, cv=3).mean() for depth in (0, 1)
    ]
    assert scores[1] > 0.84 > 0.73 > scores[0]  # an RBF kernel has 0.87 at best


def test_classifier():
    X, y = load_digits(return_X_y=True)
    X, y = X[:600] / 16, y[:600]
    names = np.array([f"digit {i}" for i in range(10)])
    model = NTKClassifier(2).fit(X[:400], names[y[:400]])
    assert model.score(X[400:], names[y[400:]]) > 0.86  # an SVC has 0.88
    assert list(model.classes_) == list(names)
    scores = model.decision_function(X[400:])
    assert scores.shape == (200, 10)
    np.testing.assert_allclose(scores.sum(1), -8, rtol=2e-13)  # the targets of all classes sum to it
    regressor = NTKRegressor(2).fit(X[:400], np.where(y[:400] == 3, 1.0, -1.0))
    np.testing.assert_allclose(scores[:, 3], regressor.predict(X[400:]), rtol=0, atol=5e-13)
    assert not hasattr(model, "predict_proba")


def test_classifier_of_two_classes():
    X, y = load_iris(return_X_y=True)
    X, y = X[50:], np.where(y[50:] == 1, "b", "a")
    model = NTKClassifier(alpha=0.1).fit(X, y)
    scores = model.decision_function(X)
    assert scores.shape == (100,)
    assert model.dual_coef_.shape == (100, 1)
    np.testing.assert_array_equal(model.predict(X), np.where(scores > 0, "b", "a"))
    assert model.score(X, y) > 0.95


@pytest.mark.parametrize("copied", [clone, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied):
    X, y = data()
    activation = pykernels.Activation("relu") + pykernels.Activation("sin")
    model = NTKRegressor(2, [activation, "erf"], solver="cg").fit(X, y)
    again = copied(model)
    if copied is clone:
        again.fit(X, y)
    np.testing.assert_array_equal(again.predict(X), model.predict(X))


def test_kernel_of_a_support_vector_machine():
    X, y = load_iris(return_X_y=True)
    svm = SVC(kernel=ntk_kernel(2, bias_std=1.0), C=10.0)
    assert cross_val_score(svm, X, y, cv=3).mean() > 0.95
    search = GridSearchCV(svm, {"kernel": [ntk_kernel(1), ntk_kernel(3, "erf")]}, cv=3).fit(X, y)
    assert search.best_params_["kernel"] in (ntk_kernel(1), ntk_kernel(3, "erf"))
    again = pickle.loads(pickle.dumps(search))
    np.testing.assert_array_equal(again.predict(X), search.predict(X))


def test_kernel_as_a_function():
    X, _ = data(5)
    kernel = ntk_kernel(2, "gelu", kind="nngp")
    expected = pykernels.NTK(2, "gelu", 2**0.5, 0.5).gram(torch.tensor(X), kind="nngp").numpy()
    np.testing.assert_allclose(kernel(X), expected, rtol=1e-14)
    np.testing.assert_allclose(kernel(X, X[:2]), expected[:, :2], rtol=1e-14)
    np.testing.assert_allclose(kernel(X.tolist(), X[:2].tolist()), expected[:, :2], rtol=1e-14)
    assert ntk_kernel(dtype="float32")(X).dtype == np.float32
    with pytest.raises(ValueError, match=r"^depth must be at least 0, got -1$"):
        ntk_kernel(-1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, "alpha must be at least 0 and finite, got -1.0"),
        ({"alpha": float("inf")}, ValueError, "alpha must be at least 0 and finite, got inf"),
        ({"alpha": "small"}, TypeError, "alpha must be a number, got 'small'"),
        ({"tol": 0}, ValueError, "tol must be positive and finite, got 0"),
        ({"max_iter": 0}, ValueError, "max_iter must be an integer of at least 1, got 0"),
        ({"solver": "lu"}, ValueError, "solver must be one of 'auto', 'cholesky', 'cg', got 'lu'"),
        ({"kind": "both"}, ValueError, "kind must be 'ntk' or 'nngp', got 'both'"),
        ({"dtype": "half"}, ValueError, "dtype must be 'float32' or 'float64', got 'half'"),
        ({"depth": 1.5}, TypeError, "depth must be an int, got float"),
        ({"weight_std": -1}, ValueError, "weight_std must be at least 0"),
    ],
)
def test_errors(options, error, message):
    X, y = data(10)
    with pytest.raises(error, match=f"^{message}"):
        NTKRegressor(**options).fit(X, y)


def test_cases_that_are_there_twice_need_a_ridge():
    X, y = data(10)
    X = np.concatenate([X, X])
    with pytest.raises(ValueError, match=r"^alpha must be larger: with alpha=0 K \+ alpha I is singular to float64"):
        NTKRegressor(alpha=0).fit(X, np.concatenate([y, y]))


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("sklearn", "scikit-learn", "models"), ("gpytorch", "gpytorch", "gpytorch")]
)
def test_a_missing_package_is_named(name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is not PathFinder])
    own = spec_from_file_location(f"pykernels.{name}", Path(pykernels.__file__).with_name(f"{name}.py"))
    with pytest.raises(ModuleNotFoundError, match=rf"^pykernels\.{name} needs {package}: run pip .*'\.\[{extra}\]'"):
        own.loader.exec_module(module_from_spec(own))


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_cases_that_overflow(solver):
    X, y = data(10)
    with pytest.raises(
        ValueError, match=r"^X is too large: the kernel of a case with itself is not finite in float32$"
    ):
        NTKRegressor(solver=solver, dtype="float32").fit(1e30 * X, y)
