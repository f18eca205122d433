"""Discriminators of finite width: the networks whose limits the kernels are, trained by gradient ascent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pykernels._errors import InputError
from pykernels.models._gantk_kernels import KERNELS, find_kernel, find_loss
from pykernels.models._gantk_losses import signs
from pykernels.ops.ntk_gram.activations import SIGMOID_SCALE

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid_like": lambda z: 0.5 * torch.erf(z / SIGMOID_SCALE) + 0.5,
    "sin": torch.sin,
}


class WideNetwork(nn.Module):
    """A multilayer perceptron in the parametrisation of its tangent kernel, whose weights are all standard normal.

    Layers are W h / sqrt(n) + bias_std b, n the number of inputs of W; the last one has no bias. The hidden layers of a
    kernel with branches have them all, each with weights of its own.

    Args:
        n_features: of the points.
        kernel: a name in ``KERNELS`` of kind ``"ntk"``.
        width: of the hidden layers.
        n_outputs: of the last layer.
        antisymmetric: (g - g') / sqrt(2) of two networks that begin alike: zero at first, with the same kernel.
        seed: of the weights: numbers for :func:`numpy.random.default_rng`.
        dtype: of the weights.

    Shape:
        (N, n_features) to (N, n_outputs), or (N,) if ``n_outputs`` is 1.

    Raises:
        InputError: naming the argument that cannot be used.
    """

    def __init__(
        self,
        n_features: int,
        kernel: str = "relu",
        *,
        width: int = 128,
        n_outputs: int = 1,
        antisymmetric: bool = False,
        seed: int | Sequence[int] = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        architecture = find_kernel(kernel)
        names = architecture.activation.name.split("+")
        if architecture.kind != "ntk":
            known = ", ".join(name for name, other in KERNELS.items() if other.kind == "ntk")
            raise InputError(f"kernel {kernel!r} is not that of a network that is trained, as {known} are")
        for name, value in (("n_features", n_features), ("width", width), ("n_outputs", n_outputs)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        self.bias_std = architecture.bias_std
        self.n_outputs = n_outputs
        self._branches = [_ACTIVATIONS[name] for name in names]
        copies = 2 if antisymmetric else 1
        inputs = [n_features] + [width] * architecture.depth
        outputs = [width] * architecture.depth + [n_outputs]
        branches = [1] + [len(names)] * architecture.depth
        self.weights = nn.ParameterList(
            torch.empty(copies, m, n * b, dtype=dtype) for n, m, b in zip(inputs, outputs, branches, strict=True)
        )
        self._scales = [1 / math.sqrt(n) for n in inputs]
        biases = outputs[:-1] if self.bias_std else []
        self.biases = nn.ParameterList(torch.empty(copies, 1, m, dtype=dtype) for m in biases)
        self.reset(seed)

    def reset(self, seed: int | Sequence[int]) -> None:
        """Draw all weights anew."""
        random = np.random.default_rng(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.from_numpy(random.standard_normal(parameter.shape[1:])).to(parameter))

    def forward(self, x: Tensor) -> Tensor:
        h = (x * self._scales[0]).expand(len(self.weights[0]), *x.shape)
        for i, weight in enumerate(self.weights):
            if i:
                h = torch.cat([activation(h) for activation in self._branches], -1) * self._scales[i]
            h = torch.baddbmm(self.bias_std * self.biases[i], h, weight.mT) if i < len(self.biases) else h @ weight.mT
        output = (h[0] - h[1]) / math.sqrt(2) if len(h) == 2 else h[0]
        return output.squeeze(-1) if self.n_outputs == 1 else output


class FiniteDiscriminator:
    """A network of finite width, trained by gradient ascent on all points at once, without momentum.

    Args:
        n_features: of the points.
        kernel: its architecture, a name in ``KERNELS`` of kind ``"ntk"``.
        loss: as for :class:`InfiniteDiscriminator`.
        width: of the hidden layers.
        learning_rate: of a step. ``n_steps`` of them are like the time ``n_steps * learning_rate``.
        n_steps: at each training.
        antisymmetric: see :class:`WideNetwork`; published for all losses but LSGAN.
        reset: draw all weights anew before each training; else it goes on from where the last one ended.
        seed: of all weights that are drawn.
        dtype, device: of the weights.

    Attributes:
        network: the :class:`WideNetwork`.

    Raises:
        InputError: naming the argument that cannot be used.
    """

    def __init__(
        self,
        n_features: int,
        kernel: str = "relu",
        loss: str = "ipm",
        *,
        width: int = 128,
        learning_rate: float = 0.01,
        n_steps: int = 1,
        antisymmetric: bool = True,
        reset: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
    ) -> None:
        self.loss = find_loss(loss)
        if not 0 < learning_rate < math.inf:
            raise InputError(f"learning_rate must be positive and finite, got {learning_rate!r}")
        if n_steps < 1:
            raise InputError(f"n_steps must be at least 1, got {n_steps}")
        self.network = WideNetwork(
            n_features, kernel, width=width, antisymmetric=antisymmetric, seed=[seed, 0], dtype=dtype
        ).to(device)
        self.learning_rate = learning_rate
        self.n_steps = n_steps
        self.seed = seed
        self.trainings = 0
        self.options = {
            "kernel": kernel,
            "loss": loss,
            "width": width,
            "learning_rate": learning_rate,
            "n_steps": n_steps,
            "antisymmetric": antisymmetric,
            "reset": reset,
            "seed": seed,
        }
        self._reset = reset

    def train(self, points: Tensor, n_fake: int) -> None:
        """Train on the first ``n_fake`` of these points (N + M, d) against the others."""
        if self._reset and self.trainings:
            self.network.reset([self.seed, self.trainings])
        self.trainings += 1
        rho, gamma = signs(n_fake, len(points) - n_fake, points)
        parameters: list[Tensor] = list(self.network.parameters())
        for _ in range(self.n_steps):
            f = self.network(points)
            gradients = torch.autograd.grad(f, parameters, gamma * self.loss.ascent(f.detach(), rho))
            with torch.no_grad():
                torch._foreach_add_(parameters, gradients, alpha=self.learning_rate)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) and its gradient, (N,) and (N, d), at points x (N, d)."""
        x = x.detach().requires_grad_()
        f = self.network(x)
        (gradient,) = torch.autograd.grad(f.sum(), x)
        return f.detach(), gradient

    def state(self) -> dict[str, Tensor]:
        """Copies of the weights."""
        return {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def restore(self, tensors: Mapping[str, Tensor], trainings: int) -> None:
        """Continue from a :meth:`state` after so many trainings."""
        self.network.load_state_dict(dict(tensors))
        self.trainings = trainings
