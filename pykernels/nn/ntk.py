"""Infinitely wide networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pykernels.ops.ntk_gram import kernel
from pykernels.ops.ntk_gram.activations import Activation
from pykernels.ops.ntk_gram.kernel import Activations, Network, Scales

_LAYERS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid_like",
    nn.GELU: "gelu",
    nn.Identity: "identity",
}


class NTK(nn.Module):
    """An infinitely wide fully connected network, by its kernels.

    The covariance of its outputs at random initialisation is the NNGP kernel C_L, and its tangent kernel, which does
    not change in training, is Theta_L (L is ``depth``, n the dimension of the points):

    .. code-block:: text

        C_0 = w_0^2 <x, y> / n + b_0^2            Theta_0 = C_0
        C_l = w_l^2 K(C_{l-1}) + b_l^2            Theta_l = C_l + w_l^2 Theta_{l-1} K'(C_{l-1})

    with K(C) = E[phi(f(x)) phi(f(y))] and K' that of phi's derivative, for f a Gaussian process of covariance C. This
    is the NTK parametrisation: a layer computes w W h / sqrt(width) + b beta, with all entries of W and beta standard
    normal. Of layers of ``nn.Linear`` whose weights have standard deviation s, w is s sqrt(fan_in): He's initialisation
    is ``weight_std=2**0.5``, LeCun's 1.

    Points that nearly coincide keep their digits: angles are carried as such, and small ones come from the points'
    difference. Gradients are finite there too; at two equal points they are half of those of ``k(x, x)``.

    Args:
        depth: hidden layers, each followed by an activation; 0 is the linear kernel.
        activation: a name or an :class:`Activation`, which may be a sum of branches, for all hidden layers; or a
            sequence of them, one for each.
        weight_std: w, a number, or ``depth + 1``.
        bias_std: b, a number, or one for each layer that has a bias: ``depth``, with ``output_bias`` one more.
        output_bias: whether the last layer has a bias.
        learnable: whether ``weight_std`` and ``bias_std`` are parameters; else they are buffers. They are float64; the
            kernels depend on their squares.

    Raises:
        TypeError, ValueError: if an argument is not as above, or a scale is negative.

    Published: A. Jacot, F. Gabriel and C. Hongler, "Neural tangent kernel: convergence and generalization in neural
    networks" (2018); Y. Cho and L. Saul, "Kernel methods for deep learning" (2009), for ``relu``; C. Williams,
    "Computing with infinite networks" (1997), for ``erf``.
    """

    weight_std: Tensor
    bias_std: Tensor

    def __init__(
        self,
        depth: int,
        activation: Activations = "relu",
        weight_std: Scales = 1.0,
        bias_std: Scales = 0.0,
        output_bias: bool = False,
        *,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(depth, bool) or not hasattr(depth, "__index__"):  # integers of NumPy have it
            raise TypeError(f"depth must be an int, got {type(depth).__name__}")
        if depth < 0:
            raise ValueError(f"depth must be at least 0, got {depth}")
        self.depth, self.output_bias = int(depth), bool(output_bias)
        self.activations = kernel.activations_of(activation, self.depth)
        scales = {
            "weight_std": kernel.scales_of(weight_std, "weight_std", self.depth + 1),
            "bias_std": kernel.scales_of(bias_std, "bias_std", self.depth + self.output_bias),
        }
        for name, value in scales.items():
            value = value.detach().clone()
            if learnable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @classmethod
    def from_sequential(
        cls, network: nn.Sequential, weight_std: Scales = 1.0, bias_std: Scales = 0.0, *, learnable: bool = False
    ) -> NTK:
        """The infinitely wide counterpart of a stack of ``nn.Linear`` and activations.

        Args:
            network: ``nn.Linear``, and between each two of them one activation out of ``nn.ReLU``, ``nn.LeakyReLU``,
                ``nn.GELU()``, ``nn.Sigmoid`` (as the sigmoid-like erf, which is within 0.02 of it) or ``nn.Identity``;
                or none, which is the identity. Nested stacks are followed, ``nn.Flatten`` and ``nn.Dropout`` in
                evaluation mode passed over. Weights and widths play no part.
            weight_std, bias_std: as in the class, one number or one for each layer; layers without a bias keep none.
            learnable: as there.

        Raises:
            TypeError: if the network is no ``nn.Sequential``, or has another layer.
            ValueError: if it does not begin and end with ``nn.Linear``, or an activation follows another one.
        """
        if not isinstance(network, nn.Sequential):
            raise TypeError(f"network must be an nn.Sequential, got {type(network).__name__}")
        linear: list[nn.Linear] = []
        activations: list[Activation] = []
        for layer in _flat(network):
            if isinstance(layer, nn.Linear):
                if len(linear) > len(activations):
                    activations.append(Activation("identity"))
                linear.append(layer)
            else:
                activations.append(_activation(layer))
                if len(linear) != len(activations):
                    raise ValueError(
                        f"each activation must follow an nn.Linear, got {type(layer).__name__} as number "
                        f"{len(activations)} after {len(linear)} linear layers"
                    )
        if len(linear) != len(activations) + 1:
            raise ValueError(f"network must begin and end with an nn.Linear, got {network}")
        biased = [layer.bias is not None for layer in linear]
        bias_std = kernel.scales_of(bias_std, "bias_std", len(biased) - (not biased[-1]))
        bias_std = bias_std * bias_std.new_tensor(biased[: len(bias_std)])
        return cls(len(activations), activations, weight_std, bias_std, biased[-1], learnable=learnable)

    def _network(self) -> Network:
        bias = self.bias_std.double()
        if not self.output_bias:
            bias = torch.cat((bias, bias.new_zeros(1)))
        return Network(self.activations, self.weight_std.double(), bias)

    def gram(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        kind: str = "ntk",
        precision: str = "float32",
        backend: str | None = None,
    ) -> Any:
        """The kernel between two sets of points.

        Args:
            x: (..., N, d), of a floating dtype of 16 bits at least.
            y: (..., M, d) with the leading dimensions of x, or None for x itself: then half of the work is done.
                Computed in the wider one of both dtypes, and in float32 at least.
            kind: ``"ntk"``, ``"nngp"`` or ``"both"``.
            precision: of the inner products of float32 points: ``"float32"``, ``"tf32"`` or ``"bf16"``; the recursion
                is in float32.
            backend: a name in :data:`pykernels.backends.BACKENDS`, or None to choose automatically.

        Returns:
            (..., N, M) in the dtype of x; for both kinds ``(nngp, ntk)``.

        Raises:
            TypeError: if an argument has the wrong type or dtype.
            ValueError: if an argument has the wrong shape, device or value.
            RuntimeError: if the backend asked for by name cannot run the call.
        """
        return kernel.gram(x, y, self._network(), kind, precision, backend)

    def matvec(
        self,
        x: Tensor,
        z: Tensor,
        v: Tensor,
        *,
        kind: str = "ntk",
        precision: str = "float32",
        backend: str | None = None,
    ) -> Tensor:
        """K(x, z) v without the matrix K, in memory of the size of the arguments.

        Args:
            x: (..., N, d).
            z: (..., M, d).
            v: (..., M) or (..., M, p), of a floating dtype; rounded to the one that is computed in.
            kind: ``"ntk"`` or ``"nngp"``.
            precision, backend: as in :meth:`gram`.

        Returns:
            (..., N) or (..., N, p).

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`gram`.
        """
        return kernel.matvec(x, z, v, self._network(), kind, precision, backend)

    def witness(
        self,
        x: Tensor,
        z: Tensor,
        a: Tensor,
        *,
        kind: str = "ntk",
        precision: str = "float32",
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """sum_j a_j k(x_i, z_j) and its gradient with respect to x_i, in one pass.

        Args:
            x: (..., N, d).
            z: (..., M, d), constant in the gradient, even where it is x.
            a: (..., M), as ``v`` of :meth:`matvec`.
            kind: ``"ntk"`` or ``"nngp"``.
            precision, backend: as in :meth:`gram`.

        Returns:
            (..., N) and (..., N, d).

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`gram`.
        """
        return kernel.witness(x, z, a, self._network(), kind, precision, backend)

    def diag(self, x: Tensor, *, kind: str = "ntk", precision: str = "float32", backend: str | None = None) -> Any:
        """k(x_i, x_i).

        Args:
            x: (..., N, d).
            kind: as in :meth:`gram`.
            precision, backend: as there, and checked as there; but a diagonal takes no inner products of two points,
                and is computed by PyTorch on every backend.

        Returns:
            (..., N) in the dtype of x; for both kinds ``(nngp, ntk)``.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`gram`.
        """
        return kernel.diag(x, self._network(), kind, precision, backend)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The tangent kernel's Gram matrix, as :meth:`gram` has it."""
        result: Tensor = self.gram(x, y)
        return result

    def extra_repr(self) -> str:
        names = [str(activation) for activation in self.activations]
        shown = names[0] if names and len(set(names)) == 1 else ", ".join(names) or "none"
        numbers = [f"{v:g}" for v in self.weight_std.tolist()], [f"{v:g}" for v in self.bias_std.tolist()]
        weight, bias = (v[0] if len(set(v)) == 1 else f"[{', '.join(v)}]" for v in numbers)
        scales = f"weight_std={weight}, bias_std={bias}, output_bias={self.output_bias}"
        return f"depth={self.depth}, activation={shown}, {scales}"


def _flat(network: nn.Sequential) -> list[nn.Module]:
    """The layers that do something."""
    found: list[nn.Module] = []
    for layer in network:
        if isinstance(layer, nn.Sequential):
            found += _flat(layer)
        elif not (isinstance(layer, nn.Flatten) or (isinstance(layer, nn.Dropout) and not layer.training)):
            found.append(layer)
    return found


def _activation(layer: nn.Module) -> Activation:
    if type(layer) is nn.LeakyReLU:
        return Activation("leaky_relu", slope=layer.negative_slope)
    name = _LAYERS.get(type(layer))
    if name is None or (isinstance(layer, nn.GELU) and layer.approximate != "none"):
        known = ", ".join(sorted({"Linear", "LeakyReLU", *(t.__name__ for t in _LAYERS)}))
        raise TypeError(f"layers of the network must be {known}, got {layer}")
    return Activation(name)
