"""Losses of GANs, and infinitely wide discriminators trained with them: in closed form, or by their equation.

With N fake points x and M real ones y, let z be all of them, gamma = 1/(2N) and 1/(2M) their weights, K = k(z, z) the
Gram matrix and rho = -1 on fake points, +1 on real ones. Trained from f = 0, a discriminator is at any time

    f(.) = sum_j A_j k(., z_j),   dA/dt = gamma grad L(f(z)),   A = 0 at t = 0,

where grad L is the gradient, per weight, of the loss L(f) = E_x[a(f)] - E_y[b(f)] that it ascends. With the symmetric
matrix S = sqrt(gamma) K sqrt(gamma), A = sqrt(gamma) g(S) sqrt(gamma) rho for these losses:

- IPM, a = b = id: grad L = -2 rho, hence A = -2 t gamma rho, that is t/N and -t/M;
- LSGAN, a = -(f + 1)^2, b = (f - 1)^2: grad L = 4 (rho - f), g(u) = (1 - exp(-4 t u)) / u;
- vanilla, a = log(1 - s(f)), b = -log s(f), s the logistic function: grad L = 1 + rho - 2 s(f). Each eigenvector alone
  would follow y' = 2 u / (1 + exp(y)), which gives g(u) = log W(exp(1 + 2 t u)) / u, W the Lambert function. This is an
  approximation, as s is not linear: close for small t;
- hinge, a = -max(0, 1 + f), b = max(0, 1 - f): grad L is -2 on fake points with f > -1, 2 on real ones with f < 1.

Source: Franceschi et al., "A neural tangent kernel perspective of GANs", ICML 2022. Signs are those that the equations
above give: b of LSGAN and the solution of vanilla GANs have misprints there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pykernels._errors import InputError
from pykernels.ops import odeint

Product = Callable[[Tensor], Tensor]

#: Products that are enough for the exponential of any Gram matrix that fits into the memory; 10 to 15 are usual.
MOST_PRODUCTS = 200
LANCZOS_TOLERANCE = 1e-13
ODE_STEPS = 20  # at least


class Loss(NamedTuple):
    """What a discriminator ascends and a generator descends.

    Attributes:
        title: in tables.
        ascent: gradient of L at f, per weight, from f and rho.
        slope: derivative of the generator's cost c(f).
        cost: c(f).
        rate: how fast the ascent falls with f, at most (of hinge, whose ascent jumps, what counts for the steps).
        solvers: how A can be found, the default first.
    """

    title: str
    ascent: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    cost: Callable[[Tensor], Tensor]
    rate: float
    solvers: tuple[str, ...]


def _hinge_ascent(f: Tensor, rho: Tensor) -> Tensor:
    return 2 * rho * (rho * f < 1)


LOSSES = {
    "ipm": Loss("IPM", lambda f, rho: -2 * rho + 0 * f, torch.ones_like, lambda f: f, 0.0, ("closed", "ode")),
    "lsgan": Loss(
        "LSGAN", lambda f, rho: 4 * (rho - f), lambda f: 2 * f, torch.square, 4.0, ("lanczos", "eigenvalues", "ode")
    ),
    "vanilla": Loss(
        "vanilla GAN",
        lambda f, rho: 1 + rho - 2 * f.sigmoid(),
        lambda f: f.sigmoid() - 1,
        lambda f: -torch.nn.functional.logsigmoid(f),
        0.5,
        ("ode", "lanczos", "eigenvalues"),
    ),
    "hinge": Loss("hinge", _hinge_ascent, lambda f: -torch.ones_like(f), torch.neg, 2.0, ("ode",)),
}


def signs(n_fake: int, n_real: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """rho and gamma, both (N + M,), of the dtype and device of ``like``.

    Raises:
        InputError: if one of the clouds is empty.
    """
    if min(n_fake, n_real) < 1:
        raise InputError(f"there must be fake and real points, got {n_fake} and {n_real} of them")
    rho = like.new_ones(n_fake + n_real)
    rho[:n_fake] = -1
    gamma = like.new_full((n_fake + n_real,), 0.5 / n_real)
    gamma[:n_fake] = 0.5 / n_fake
    return rho, gamma


def ipm_weights(rho: Tensor, gamma: Tensor, time: float) -> Tensor:
    """A of the IPM, (N + M,)."""
    return -2 * time * gamma * rho


def spectral_weights(
    loss: str, product: Product, rho: Tensor, gamma: Tensor, time: float, *, gram: Tensor | None = None
) -> Tensor:
    """A = sqrt(gamma) g(S) sqrt(gamma) rho for ``"lsgan"`` or ``"vanilla"``.

    Args:
        loss: which g.
        product: v -> K v, for the Lanczos iteration.
        rho, gamma: (N + M,).
        time: of the training.
        gram: K (N + M, N + M), for its eigenvalues and vectors in the place of the iteration.
    """
    function = _FUNCTIONS[loss]
    root = gamma.sqrt()
    start = root * rho
    if gram is not None:
        values, vectors = torch.linalg.eigh(root[:, None] * gram * root)
        weights: Tensor = root * (vectors @ (function(values, time) * (start @ vectors)))
        return weights
    return root * lanczos(lambda v: root * product(root * v), start, lambda u: function(u, time))


def ode_weights(
    loss: Loss, product: Product, rho: Tensor, gamma: Tensor, time: float, *, steps: int | None = None
) -> Tensor:
    """A by the classical Runge-Kutta method.

    Args:
        loss: any.
        product: v -> K v.
        rho, gamma: (N + M,).
        time: of the training.
        steps: how many; None for two in the time that the fastest eigenvector takes to settle, and at least 20.
    """
    if steps is None:
        largest = float(product(gamma).abs().max())  # of the eigenvalues, where the kernel is positive, as it mostly is
        if not math.isfinite(largest):
            raise FloatingPointError("the kernel is not finite")
        steps = max(ODE_STEPS, math.ceil(2 * loss.rate * time * largest))
    times = torch.tensor([0.0, time], dtype=rho.dtype, device=rho.device)
    path: Tensor = odeint(
        lambda t, a: gamma * loss.ascent(product(a), rho),
        torch.zeros_like(rho),
        times,
        method="rk4_classic",
        options={"step_size": time / steps},
    )
    return path[-1]


def lanczos(product: Product, start: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """f(S) b of a symmetric matrix S, given by its products, from the Krylov space of b.

    Ends when the newest direction carries less than 1e-13 of the result (1e-6 in float32); all directions are made
    orthogonal to each other twice, so that none comes back by rounding.

    Args:
        product: v -> S v.
        start: b, (n,).
        function: of the eigenvalues, elementwise.
    """
    tolerance = LANCZOS_TOLERANCE if start.dtype == torch.float64 else 1e-6
    norm = torch.linalg.vector_norm(start)
    basis = start.new_empty(min(MOST_PRODUCTS, len(start)), len(start))
    basis[0] = start / norm
    diagonal: list[float] = []
    beside: list[float] = []
    for k in range(len(basis)):
        w = product(basis[k])
        diagonal.append(float(w @ basis[k]))
        if not math.isfinite(diagonal[-1]):
            raise FloatingPointError("the kernel is not finite")
        for _ in range(2):
            w = w - (basis[: k + 1] @ w) @ basis[: k + 1]
        length = float(torch.linalg.vector_norm(w))
        largest = max(map(abs, diagonal))
        last = length <= 1e-14 * largest or k + 1 == len(basis)
        if last or (k > 3 and k % 2):  # looking takes as long as a product
            coefficients = _first_column(diagonal, beside, function)
            carried = abs(float(coefficients[-1])) * length
            if last or carried <= tolerance * largest * float(torch.linalg.vector_norm(coefficients)):
                break
        beside.append(length)
        basis[k + 1] = w / length
    result: Tensor = norm * (coefficients.to(start) @ basis[: k + 1])
    return result


def _first_column(diagonal: list[float], beside: list[float], function: Callable[[Tensor], Tensor]) -> Tensor:
    """f(T) e_1 of the tridiagonal matrix T, on the CPU in float64."""
    off = torch.tensor(beside, dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    column: Tensor = vectors @ (function(values) * vectors[0])
    return column


def saturation(u: Tensor, time: float) -> Tensor:
    """(1 - exp(-4 t u)) / u, which is 4 t at 0."""
    x = 4 * time * u
    safe = torch.where(x == 0, torch.ones_like(x), x)
    return 4 * time * torch.where(x == 0, torch.ones_like(x), -torch.expm1(-safe) / safe)


def lambert_growth(u: Tensor, time: float) -> Tensor:
    """log W(exp(1 + 2 t u)) / u, which is t at 0."""
    x = 2 * time * u
    safe = torch.where(x == 0, torch.ones_like(x), x)
    return 2 * time * torch.where(x == 0, torch.full_like(x, 0.5), log_lambert(safe) / safe)


def log_lambert(s: Tensor) -> Tensor:
    """v = log W(exp(1 + s)), the solution of v + exp(v) = 1 + s, by Newton's method.

    Neither overflows nor cancels: W(exp(1 + s)) is exp(v), and v is right to the last digits also where s is small.
    """
    v = torch.minimum(s / 2, torch.log1p(s.clamp_min(0)))  # above the solution, from where the steps never overshoot
    for _ in range(8):
        v = v - (v + torch.expm1(v) - s) / (1 + v.exp())
    return v


_FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {"lsgan": saturation, "vanilla": lambert_growth}
