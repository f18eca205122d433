"""Flops and bytes of trajectories, from shapes: README.md, "Cost".

Flops are the products of the layers; activations and stage sums are left out. Bytes are arguments and results: all else
can stay on the chip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pykernels.backends import Cost
from pykernels.ops._memory import size
from pykernels.ops.latent_ode.tableaux import TABLEAUX

_WEIGHTS, _CORRECTION_WEIGHTS, _SUBSTEPS, _METHOD = 6, 8, 12, 13


def products(args: Sequence[Any]) -> int:
    """Flops of the layers in one forward, from the arguments of ``pykernels::mlp_odeint``."""
    y0, t = args[:2]
    layers: list[Tensor] = [*args[_WEIGHTS], *args[_CORRECTION_WEIGHTS]]
    per_sample = sum(w.shape[-1] * w.shape[-2] for w in layers)
    evaluations: int = max(0, t.shape[0] - 1) * args[_SUBSTEPS] * TABLEAUX[args[_METHOD]].stages
    samples: int = y0.shape[0]
    return 2 * samples * evaluations * per_sample


def forward(*args: Any) -> Cost:
    """Of ``mlp_odeint`` and ``mlp_odeint_saving``."""
    y0, t = args[:2]
    return Cost(products(args), size(args) + t.shape[0] * size((y0,)))


def backward(*args: Any) -> Cost:
    """Of ``mlp_odeint_backward``: a product for the inputs and one for the weights of every layer."""
    arguments = args[5:-1]
    return Cost(2 * products(arguments), 2 * size(arguments) + size(args[:5]))
