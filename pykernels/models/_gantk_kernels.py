"""Infinitely wide discriminators: functions of points in closed form, trained anew on any two clouds."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pykernels import NTK, Activation
from pykernels._errors import InputError
from pykernels.models._gantk_losses import LOSSES, Loss, Product, ipm_weights, ode_weights, signs, spectral_weights

#: Clouds of more points than this are multiplied without their Gram matrix.
LARGEST_GRAM = 8192


class Architecture(NamedTuple):
    """A multilayer perceptron of any width.

    Attributes:
        title: in tables.
        depth: hidden layers.
        activation: of the hidden layers; several names joined by ``+`` are branches that add.
        bias_std: of the biases; the last layer has none.
        kind: ``"ntk"``, all layers are trained, or ``"nngp"``, the last one only.
    """

    title: str
    depth: int
    activation: Activation
    bias_std: float
    kind: str

    def kernel(self) -> NTK:
        return NTK(self.depth, self.activation, bias_std=self.bias_std)


#: The published kernels, and the sum of ReLU and sine branches. That of "rbf" is exp(-|x - y|^2 / (2 d)).
KERNELS = {
    "relu": Architecture("ReLU", 3, Activation("relu"), 1.0, "ntk"),
    "rbf": Architecture("RBF", 1, Activation("rbf", gamma=0.5), 0.0, "nngp"),
    "relu_no_bias": Architecture("ReLU without bias", 3, Activation("relu"), 0.0, "ntk"),
    "sigmoid": Architecture("sigmoid-like", 3, Activation("sigmoid_like"), 0.2, "ntk"),
    "relu+sin": Architecture("ReLU + sine without bias", 3, Activation("relu") + Activation("sin"), 0.0, "ntk"),
}


class InfiniteDiscriminator:
    """An infinitely wide network trained from zero on two clouds for some time.

    Args:
        kernel: a name in ``KERNELS``, or an :class:`pykernels.NTK`.
        loss: ``"ipm"``, ``"lsgan"``, ``"vanilla"`` or ``"hinge"``.
        kind: of the kernel, ``"ntk"`` or ``"nngp"``; only with an :class:`pykernels.NTK`.
        time: of the training.
        solver: how it is done, by default the first one of the loss: IPM ``"closed"``, ``"ode"``; LSGAN ``"lanczos"``,
            ``"eigenvalues"``, ``"ode"``; vanilla ``"ode"``, and as approximations for short times ``"lanczos"``,
            ``"eigenvalues"``; hinge ``"ode"``.
        backend: of the kernel; None for the best that runs.

    Attributes:
        loss: the :class:`Loss`.
        points: of the last training, fake ones first, (N + M, d).
        weights: A of f = sum_j A_j k(., points_j), (N + M,).

    Raises:
        InputError: naming the argument that cannot be used.
    """

    def __init__(
        self,
        kernel: str | NTK = "relu",
        loss: str = "ipm",
        *,
        kind: str = "ntk",
        time: float = 1.0,
        solver: str | None = None,
        backend: str | None = None,
    ) -> None:
        self.ntk, self.kind = _kernel(kernel, kind)
        self.loss = find_loss(loss)
        if not 0 < time < math.inf:
            raise InputError(f"time must be positive and finite, got {time!r}")
        solver = self.loss.solvers[0] if solver is None else solver
        if solver not in self.loss.solvers:
            raise InputError(f"solver of {loss} must be one of {', '.join(self.loss.solvers)}; got {solver!r}")
        self.time = time
        self.solver = solver
        self.backend = backend
        self.options = {
            "kernel": kernel if isinstance(kernel, str) else f"{kernel}, {self.kind}",
            "loss": loss,
            "time": time,
            "solver": solver,
        }
        self._loss_name = loss

    @torch.no_grad()  # scales of the kernel may be parameters
    def train(self, points: Tensor, n_fake: int) -> None:
        """Train from zero on the first ``n_fake`` of these points (N + M, d) against the others.

        They are not copied: particles may be moved in place before the next training.
        """
        rho, gamma = signs(n_fake, len(points) - n_fake, points)
        self.points = points
        if self.solver == "closed":
            self.weights = ipm_weights(rho, gamma, self.time)
            return
        gram = None
        if self.solver == "eigenvalues" or len(points) <= LARGEST_GRAM:
            gram = self.ntk.gram(points, kind=self.kind, backend=self.backend)
            if not math.isfinite(float(gram.sum())):
                raise FloatingPointError("the kernel is not finite")
        product: Product = self._product if gram is None else gram.__matmul__
        if self.solver == "ode":
            self.weights = ode_weights(self.loss, product, rho, gamma, self.time)
        else:
            exact = gram if self.solver == "eigenvalues" else None
            self.weights = spectral_weights(self._loss_name, product, rho, gamma, self.time, gram=exact)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) and its gradient, (N,) and (N, d), at points x (N, d).

        Raises:
            RuntimeError: before the first training.
        """
        if not hasattr(self, "weights"):
            raise RuntimeError("this discriminator is not trained yet; call its train() first")
        return self.ntk.witness(x, self.points, self.weights, kind=self.kind, backend=self.backend)

    def _product(self, v: Tensor) -> Tensor:
        return self.ntk.matvec(self.points, self.points, v, kind=self.kind, backend=self.backend)


def find_loss(name: str) -> Loss:
    if name not in LOSSES:
        raise InputError(f"loss must be one of {', '.join(LOSSES)}; got {name!r}")
    return LOSSES[name]


def find_kernel(name: str) -> Architecture:
    if name not in KERNELS:
        raise InputError(f"kernel must be one of {', '.join(KERNELS)}; got {name!r}")
    return KERNELS[name]


def _kernel(kernel: str | NTK, kind: str) -> tuple[NTK, str]:
    if isinstance(kernel, str):
        architecture = find_kernel(kernel)
        return architecture.kernel(), architecture.kind
    if kind not in ("ntk", "nngp"):
        raise InputError(f"kind must be ntk or nngp, got {kind!r}")
    if not isinstance(kernel, NTK):
        raise InputError(f"kernel must be one of {', '.join(KERNELS)}, or a pykernels.NTK; got {kernel!r}")
    return kernel, kind


def mmd(fake: Tensor, real: Tensor, kernel: str | NTK = "relu", *, kind: str = "ntk") -> Tensor:
    """Squared maximum mean discrepancy of two clouds (N, d) and (M, d), pairs of a point with itself included."""
    ntk, kind = _kernel(kernel, kind)
    points = torch.cat((fake, real))
    rho, gamma = signs(len(fake), len(real), points)
    weights = ipm_weights(rho, gamma, 1.0)
    return weights @ ntk.matvec(points, points, weights, kind=kind)
