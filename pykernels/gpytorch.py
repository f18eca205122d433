"""The kernel of an infinitely wide network for Gaussian processes in GPyTorch.

Needs GPyTorch (the extra ``gpytorch``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pykernels._errors import InputError, MissingExtraError
from pykernels.nn.ntk import NTK
from pykernels.ops.ntk_gram import kernel as ops

try:
    from gpytorch.constraints import Positive
    from gpytorch.kernels import Kernel
except ModuleNotFoundError as error:
    if error.name != "gpytorch":
        raise
    raise MissingExtraError("gpytorch", "gpytorch", "pykernels.gpytorch") from error

__all__ = ["NTKKernel"]

_STDS = ("weight_std", "bias_std")


class NTKKernel(Kernel):  # type: ignore[misc]
    """The kernel of an infinitely wide network, with scales that are hyperparameters.

    By default it is the NNGP kernel: then the Gaussian process is the network with random weights. The tangent kernel
    is that of the trained network. Neither is stationary, and both grow with the points: standardise the inputs.

    Args:
        depth, activation, output_bias: of the network, see :class:`pykernels.NTK`.
        weight_std, bias_std: where the scales begin, as there; positive numbers. A ``bias_std`` of 0 is no
            hyperparameter, and stays.
        kind: ``"nngp"`` or ``"ntk"``.
        weight_std_constraint, bias_std_constraint: of the scales; positive by default.
        weight_std_prior, bias_std_prior: of the scales, if any.
        backend: see :meth:`pykernels.NTK.gram`.
        kwargs: ``batch_shape`` and ``active_dims``, of :class:`gpytorch.kernels.Kernel`.

    Attributes:
        weight_std: the scales, shape (\\*batch_shape, depth + 1), with a setter. The parameter is ``raw_weight_std``.
        bias_std: likewise (\\*batch_shape, depth), with ``output_bias`` one more.

    Raises:
        TypeError, ValueError: as :class:`pykernels.NTK`, and for scales that cannot be learned.

    Source: Lee et al., "Deep neural networks as Gaussian processes", ICLR 2018, for the Gaussian process; Jacot,
    Gabriel and Hongler, NeurIPS 2018, for the tangent kernel.
    """

    has_lengthscale = False

    def __init__(
        self,
        depth: int = 1,
        activation: Any = "relu",
        *,
        weight_std: Any = 2**0.5,
        bias_std: Any = 0.5,
        output_bias: bool = False,
        kind: str = "nngp",
        weight_std_constraint: Any = None,
        bias_std_constraint: Any = None,
        weight_std_prior: Any = None,
        bias_std_prior: Any = None,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if kind not in ("ntk", "nngp"):
            raise InputError(f"kind must be 'ntk' or 'nngp', got {kind!r}")
        network = NTK(depth, activation, weight_std, bias_std, output_bias)
        self.activations, self.output_bias = network.activations, network.output_bias
        self.kind, self.backend = kind, backend
        constraints, priors = (weight_std_constraint, bias_std_constraint), (weight_std_prior, bias_std_prior)
        for name, constraint, prior in zip(_STDS, constraints, priors, strict=True):
            start = getattr(network, name).to(torch.get_default_dtype())
            self.register_parameter(f"raw_{name}", None)
            if name == "bias_std" and not start.any():
                continue
            if not bool((start > 0).all()):
                raise InputError(f"{name} must be positive to be learned, got {start.tolist()}")
            parameter = nn.Parameter(torch.zeros(*self.batch_shape, len(start)))
            self.register_parameter(f"raw_{name}", parameter)
            self.register_constraint(f"raw_{name}", Positive() if constraint is None else constraint)
            self._set(name, start.expand(parameter.shape))
            if prior is not None:
                self.register_prior(
                    f"{name}_prior",
                    prior,
                    lambda m, name=name: getattr(m, name),
                    lambda m, value, name=name: m._set(name, value),
                )

    @property
    def weight_std(self) -> Tensor:
        return self._scales("weight_std", len(self.activations) + 1)

    @weight_std.setter
    def weight_std(self, value: Any) -> None:
        self._set("weight_std", value)

    @property
    def bias_std(self) -> Tensor:
        return self._scales("bias_std", len(self.activations) + self.output_bias)

    @bias_std.setter
    def bias_std(self, value: Any) -> None:
        self._set("bias_std", value)

    def _scales(self, name: str, count: int) -> Tensor:
        raw = getattr(self, f"raw_{name}")
        if raw is None:
            return torch.zeros(*self.batch_shape, count).to(self.raw_weight_std)
        scales: Tensor = getattr(self, f"raw_{name}_constraint").transform(raw)
        return scales

    def _set(self, name: str, value: Any) -> None:
        raw = getattr(self, f"raw_{name}")
        if raw is None:
            raise InputError(f"{name} is 0 and no hyperparameter; begin with a positive one")
        value = torch.as_tensor(value).to(raw)
        fits = all(n in (1, m) for n, m in zip(value.shape[::-1], raw.shape[::-1], strict=False))
        if value.dim() > raw.dim() or not fits:
            raise InputError(f"{name} must be one number or have shape {tuple(raw.shape)}, got {tuple(value.shape)}")
        value = value.expand(raw.shape)
        self.initialize(**{f"raw_{name}": getattr(self, f"raw_{name}_constraint").inverse_transform(value)})

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> Tensor:
        """k(x1, x2), shape (..., N, M), or for ``diag`` (..., N), of x1 (..., N, d) and x2 (..., M, d)."""
        # Half of the work is done for one set of points; gradients must find their way to both.
        same = x1 is x2 or (x1.shape == x2.shape and not (x1.requires_grad or x2.requires_grad) and torch.equal(x1, x2))
        weight, bias = self.weight_std.double(), self.bias_std.double()
        if not self.output_bias:
            bias = torch.cat((bias, bias.new_zeros(*bias.shape[:-1], 1)), -1)
        if last_dim_is_batch:
            x1, x2 = (x.transpose(-1, -2).unsqueeze(-1) for x in (x1, x2))
            weight, bias = weight.unsqueeze(-2), bias.unsqueeze(-2)
        lead = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2], weight.shape[:-1])
        x1, x2 = (x.expand(*lead, *x.shape[-2:]) for x in (x1, x2))
        if weight.dim() == 1:
            return self._kernel(x1, None if same else x2, weight, bias, diag)
        weight, bias = (scales.expand(*lead, scales.shape[-1]).flatten(0, -2) for scales in (weight, bias))
        x1, x2 = (x.flatten(0, -3) for x in (x1, x2))
        parts = [self._kernel(x1[i], None if same else x2[i], weight[i], bias[i], diag) for i in range(math.prod(lead))]
        result: Tensor = torch.stack(parts).unflatten(0, lead)
        return result

    def _kernel(self, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, diag: bool) -> Tensor:
        network = ops.Network(self.activations, weight, bias)
        options = (self.kind, "float32", self.backend)
        result: Tensor
        if diag and y is None:
            result = ops.diag(x, network, *options)
        elif diag:
            assert y is not None
            result = ops.gram(x.unsqueeze(-2), y.unsqueeze(-2), network, *options).flatten(-3)
        else:
            result = ops.gram(x, y, network, *options)
        return result
