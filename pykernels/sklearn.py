"""Infinitely wide networks as scikit-learn estimators: regression by their kernels.

A network trained to the end by gradient descent on squared errors, infinitely wide and with its initial outputs taken
away, is kernel regression by its tangent kernel; the posterior mean of the network as a prior is that by its NNGP
kernel. ``alpha`` is the ridge, or variance of the noise. :func:`ntk_kernel` is for scikit-learn's own kernel machines.

Needs scikit-learn (the extra ``models``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykernels._errors import InputError, MissingExtraError, users_line
from pykernels.nn.ntk import NTK

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import column_or_1d
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ModuleNotFoundError as error:
    if error.name != "sklearn":
        raise
    raise MissingExtraError("scikit-learn", "models", "pykernels.sklearn") from error

__all__ = ["NTKClassifier", "NTKRegressor", "ntk_kernel"]

Array = npt.NDArray[Any]

SOLVERS = ("auto", "cholesky", "cg")
#: Cases up to which ``solver="auto"`` forms the Gram matrix: 800 MB in float64.
MOST_DENSE = 10_000
#: Cases of the preconditioner of conjugate gradients.
LANDMARKS = 500
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class _Kernel:
    """See :func:`ntk_kernel`."""

    depth: int
    activation: Any
    weight_std: Any
    bias_std: Any
    output_bias: bool
    kind: str
    dtype: str
    backend: str | None

    def __post_init__(self) -> None:
        if self.kind not in ("ntk", "nngp"):
            raise InputError(f"kind must be 'ntk' or 'nngp', got {self.kind!r}")
        if not isinstance(self.dtype, str) or self.dtype not in _DTYPES:
            raise InputError(f"dtype must be {' or '.join(map(repr, _DTYPES))}, got {self.dtype!r}")
        self.network()

    def network(self) -> NTK:
        return NTK(self.depth, self.activation, self.weight_std, self.bias_std, self.output_bias)

    def tensor(self, a: Array) -> Tensor:
        return torch.tensor(a, dtype=_DTYPES[self.dtype])

    def gram(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        result: Tensor = self.network().gram(x, y, kind=self.kind, backend=self.backend)
        return result

    def diag(self, x: Tensor) -> Tensor:
        result: Tensor = self.network().diag(x, kind=self.kind)
        return result

    def matvec(self, x: Tensor, z: Tensor, v: Tensor) -> Tensor:
        return self.network().matvec(x, z, v, kind=self.kind, backend=self.backend)

    def __call__(self, X: npt.ArrayLike, Y: npt.ArrayLike | None = None) -> Array:
        x = self.tensor(np.asarray(X))
        result: Array = self.gram(x, None if Y is None or Y is X else self.tensor(np.asarray(Y))).numpy()
        return result


def ntk_kernel(
    depth: int = 1,
    activation: Any = "relu",
    *,
    weight_std: Any = 2**0.5,
    bias_std: Any = 0.5,
    output_bias: bool = False,
    kind: str = "ntk",
    dtype: str = "float64",
    backend: str | None = None,
) -> Any:
    """The kernel of an infinitely wide network as a function of two arrays, for ``sklearn.svm.SVC(kernel=...)``.

    Args:
        depth, activation, weight_std, bias_std, output_bias: of :class:`pykernels.NTK`.
        kind: ``"ntk"`` or ``"nngp"``.
        dtype: ``"float32"`` or ``"float64"``, in which to compute.
        backend: see :meth:`pykernels.NTK.gram`.

    Returns:
        a function of arrays (N, d) and (M, d) that returns (N, M). It can be pickled, copied and compared.

    Raises:
        TypeError, ValueError: as :class:`pykernels.NTK`.
    """
    return _Kernel(depth, activation, weight_std, bias_std, output_bias, kind, dtype, backend)


# scikit-learn has no types, so its classes count as Any.
class _NTKEstimator(BaseEstimator):  # type: ignore[misc]
    """Kernel ridge regression on targets with their mean taken away."""

    dual_coef_: Array
    intercept_: Any
    X_fit_: Array
    n_iter_: int
    n_features_in_: int

    def __init__(
        self,
        depth: int = 1,
        activation: Any = "relu",
        *,
        weight_std: Any = 2**0.5,
        bias_std: Any = 0.5,
        output_bias: bool = False,
        kind: str = "ntk",
        alpha: float = 1e-2,
        solver: str = "auto",
        tol: float = 1e-6,
        max_iter: int = 1000,
        dtype: str = "float64",
        backend: str | None = None,
    ) -> None:
        self.depth = depth
        self.activation = activation
        self.weight_std = weight_std
        self.bias_std = bias_std
        self.output_bias = output_bias
        self.kind = kind
        self.alpha = alpha
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.dtype = dtype
        self.backend = backend

    def _kernel(self) -> _Kernel:
        network = (self.depth, self.activation, self.weight_std, self.bias_std, self.output_bias)
        return _Kernel(*network, self.kind, self.dtype, self.backend)

    def _fit(self, X: Array, targets: Array) -> None:
        """Solve (K + alpha I) dual = targets - mean, for targets (N, p)."""
        kernel = self._kernel()
        _check_numbers(self)
        x, y = kernel.tensor(X), kernel.tensor(targets)
        if not kernel.diag(x).isfinite().all():
            raise InputError(f"X is too large: the kernel of a case with itself is not finite in {self.dtype}")
        mean = y.mean(0)
        solver = self.solver if self.solver != "auto" else "cholesky" if len(X) <= MOST_DENSE else "cg"
        if solver == "cholesky":
            dual, self.n_iter_ = _cholesky(kernel, x, y - mean, self.alpha), 1
        else:
            dual, self.n_iter_ = _conjugate_gradients(kernel, x, y - mean, self.alpha, self.tol, self.max_iter)
        self.X_fit_, self.dual_coef_, self.intercept_ = x.numpy(), dual.numpy(), mean.numpy()

    def _values(self, X: npt.ArrayLike) -> Array:
        """(N, p)."""
        check_is_fitted(self)
        kernel = self._kernel()
        x = kernel.tensor(validate_data(self, X, reset=False))
        dual = kernel.tensor(self.dual_coef_).reshape(len(self.X_fit_), -1)
        values: Array = kernel.matvec(x, kernel.tensor(self.X_fit_), dual).numpy() + self.intercept_
        return values


class NTKRegressor(MultiOutputMixin, RegressorMixin, _NTKEstimator):  # type: ignore[misc]
    """Ridge regression by the kernel of an infinitely wide network.

    The prediction is ``mean(y) + K(x, X) (K(X, X) + alpha I)^-1 (y - mean(y))``. Columns of X should have like scales:
    put a ``StandardScaler`` in front.

    Args:
        depth, activation, weight_std, bias_std, output_bias: of the network, see :class:`pykernels.NTK`. Without any
            bias the ReLU kernel is homogeneous, so that predictions on a ray from the origin lie on a line.
        kind: ``"ntk"``, the trained network, or ``"nngp"``, the Bayesian one.
        alpha: the ridge, at least 0.
        solver: ``"cholesky"`` forms the Gram matrix; ``"cg"`` does not, but takes conjugate gradients on products with
            it, preconditioned by its Nystrom approximation on 500 cases; ``"auto"`` is the first up to 10 000 cases.
        tol: where conjugate gradients end: the norm of the residual relative to that of the targets.
        max_iter: of conjugate gradients. They warn where this does not suffice.
        dtype: ``"float32"`` or ``"float64"``, in which to compute. Conjugate gradients in float32 cannot go far below
            ``tol=1e-5``.
        backend: see :meth:`pykernels.NTK.gram`.

    Attributes:
        dual_coef_: shape (N,), or (N, p) for p targets.
        intercept_: the mean of the targets, a number or shape (p,).
        X_fit_: the cases of the fit.
        n_iter_: iterations of conjugate gradients; 1 for Cholesky.
        n_features_in_: d.

    Errors in arguments are a ``ValueError`` or ``TypeError`` that names them.

    Source: Jacot, Gabriel and Hongler, "Neural tangent kernel", NeurIPS 2018; Frangella, Tropp and Udell, "Randomized
    Nystrom preconditioning", SIAM J. Matrix Anal. Appl. 2023, for the preconditioner.
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Learn from cases (N, d) with targets (N,) or (N, p)."""
        cases, targets = validate_data(self, X, y, multi_output=True, y_numeric=True)
        self._fit(cases, targets.reshape(len(cases), -1))
        if targets.ndim == 1:
            self.dual_coef_, self.intercept_ = self.dual_coef_[:, 0], self.intercept_[0]
        return self

    def predict(self, X: npt.ArrayLike) -> Array:
        """Targets (N,) or (N, p) of cases (N, d)."""
        values = self._values(X)
        return values if self.dual_coef_.ndim > 1 else values[:, 0]


class NTKClassifier(ClassifierMixin, _NTKEstimator):  # type: ignore[misc]
    """Classification by :class:`NTKRegressor` on targets 1 for the class of a case and -1 for all others.

    The scores are least-squares estimates of 2 P(class) - 1 that need not lie between -1 and 1, so that there is no
    ``predict_proba``; ``sklearn.calibration.CalibratedClassifierCV`` makes probabilities of them.

    Args:
        depth, activation, weight_std, bias_std, output_bias, kind, alpha, solver, tol, max_iter, dtype, backend: as for
            :class:`NTKRegressor`.

    Attributes:
        classes_: the classes, sorted.
        dual_coef_: shape (N, classes), for two classes (N, 1), of the second one.
        intercept_: the mean of the targets, shape (classes,) or (1,).
        X_fit_, n_iter_, n_features_in_: as there.
    """

    classes_: Array

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Learn from cases (N, d) with labels (N,), of two classes at least."""
        cases, labels = validate_data(self, X, y)
        check_classification_targets(labels)
        self.classes_, numbers = np.unique(column_or_1d(labels), return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"y must have at least two classes, got one class, {self.classes_[0]!r}")
        targets = 2.0 * (numbers[:, None] == np.arange(len(self.classes_))) - 1
        self._fit(cases, targets if len(self.classes_) > 2 else targets[:, 1:])
        return self

    def decision_function(self, X: npt.ArrayLike) -> Array:
        """Scores (N, classes) of cases (N, d); for two classes (N,), positive for the second one."""
        values = self._values(X)
        return values if len(self.classes_) > 2 else values[:, 0]

    def predict(self, X: npt.ArrayLike) -> Array:
        """The labels (N,) with the best scores."""
        scores = self.decision_function(X)
        found: Array = self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]
        return found


def _check_numbers(estimator: _NTKEstimator) -> None:
    for name, least, open_end in (("alpha", 0, False), ("tol", 0, True)):
        value = getattr(estimator, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not least <= float(value) < math.inf or (open_end and value == least):
            raise InputError(f"{name} must be {'positive' if open_end else 'at least 0'} and finite, got {value}")
    iterations: Any = estimator.max_iter
    if isinstance(iterations, bool) or not isinstance(iterations, Integral) or int(iterations) < 1:
        raise InputError(f"max_iter must be an integer of at least 1, got {iterations!r}")
    if estimator.solver not in SOLVERS:
        raise InputError(f"solver must be one of {', '.join(map(repr, SOLVERS))}, got {estimator.solver!r}")


def _cholesky(kernel: _Kernel, x: Tensor, y: Tensor, alpha: float) -> Tensor:
    matrix = kernel.gram(x)
    matrix.diagonal().add_(alpha)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise InputError(
            f"alpha must be larger: with alpha={alpha} K + alpha I is singular to {kernel.dtype} rounding, as where "
            "cases are there twice"
        )
    return torch.cholesky_solve(y, factor)


def _conjugate_gradients(
    kernel: _Kernel, x: Tensor, y: Tensor, alpha: float, tol: float, max_iter: int
) -> tuple[Tensor, int]:
    """The solution (N, p) of (K + alpha I) dual = y, and the number of iterations; each column has its own steps."""
    precondition = _preconditioner(kernel, x, alpha)
    dual, residual = torch.zeros_like(y), y.clone()
    limit = tol * y.norm(dim=0)
    direction, slope = torch.zeros_like(y), y.new_ones(y.shape[1])
    for iteration in range(max_iter):
        if bool((residual.norm(dim=0) <= limit).all()):
            return dual, max(1, iteration)
        z = precondition(residual)
        new_slope = (residual * z).sum(0)
        direction = z + direction * _ratio(new_slope, slope) if iteration else z
        slope = new_slope
        image = kernel.matvec(x, x, direction) + alpha * direction
        step = _ratio(slope, (direction * image).sum(0))
        dual += step * direction
        residual -= step * image
    left = float((residual.norm(dim=0) / y.norm(dim=0).clamp_min(1e-300)).max())
    if left > tol:
        warnings.warn(
            f"conjugate gradients did not converge in max_iter={max_iter} iterations: the residual is {left:.1e} of "
            f"the targets, above tol={tol:.1e}; increase max_iter, tol or alpha",
            ConvergenceWarning,
            users_line(),
        )
    return dual, max_iter


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b; 0 where both are, in columns that are solved exactly."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))


def _preconditioner(kernel: _Kernel, x: Tensor, alpha: float) -> Callable[[Tensor], Tensor]:
    """Products with the inverse of the Nystrom approximation K(x, s) K(s, s)^-1 K(s, x) + shift I, for cases s of x."""
    chosen = x[torch.linspace(0, len(x) - 1, min(len(x), LANDMARKS)).round().long().unique()]
    inner, outer = kernel.gram(chosen), kernel.gram(x, chosen)
    rounding = 10 * len(chosen) * torch.finfo(x.dtype).eps * float(inner.diagonal().mean())
    inner.diagonal().add_(rounding)
    values, vectors = torch.linalg.eigh(inner)
    outer = outer @ (vectors / values.clamp_min(rounding).sqrt())  # outer @ outer.T is the approximation
    values, vectors = torch.linalg.eigh(outer.T @ outer)
    values = values.clamp_min(rounding)
    basis, shift = outer @ (vectors / values.sqrt()), max(alpha, rounding)
    gains = (1 / (values + shift) - 1 / shift)[:, None]

    def precondition(residual: Tensor) -> Tensor:
        result: Tensor = residual / shift + basis @ (gains * (basis.T @ residual))
        return result

    return precondition
