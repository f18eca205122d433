"""Flops and bytes of kernels of infinitely wide networks, from shapes: README.md, "Cost".

Flops are those of the inner products, and for each pair and branch about as many as its polynomials have terms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykernels.backends import Cost
from pykernels.ops._memory import size

#: Of a branch of a layer, in float32 and float64, and what its derivatives take besides.
_BRANCH_FLOPS = {torch.float32: 50, torch.float64: 80}
_DERIVATIVE_FLOPS = 30


def _pairs(x: Tensor, y: Any) -> float:
    """How many are computed: half of them where y is x."""
    n = x.shape[-2]
    return x.shape[0] * (n * (n + 1) / 2 if y is None else n * y.shape[-2])


def _pair_flops(x: Tensor, codes: Any) -> int:
    return 2 * (int(x.shape[-1]) + 1) + len(codes) * _BRANCH_FLOPS.get(x.dtype, 50)


def gram(x: Tensor, y: Any, weight_std: Any, bias_std: Any, counts: Any, codes: Any, *rest: Any) -> Cost:
    kernels = 2 if rest[2] == 2 else 1
    entries = kernels * x.shape[0] * x.shape[1] * (x if y is None else y).shape[1]
    return Cost(int(_pairs(x, y) * _pair_flops(x, codes)), size((x, y)) + entries * x.element_size())


def matvec(x: Tensor, y: Any, weight_std: Any, bias_std: Any, v: Tensor, counts: Any, codes: Any, *rest: Any) -> Cost:
    other = x if y is None else y
    flops = _pairs(x, other) * (_pair_flops(x, codes) + 2 * v.shape[-1])
    result = x.shape[0] * x.shape[1] * v.shape[-1] * x.element_size()
    return Cost(int(flops), size((x, y, v)) + result)


def witness(
    x: Tensor,
    y: Any,
    weight_std: Any,
    bias_std: Any,
    left: Any,
    right: Any,
    dense: Any,
    counts: Any,
    codes: Any,
    *_: Any,
) -> Cost:
    """The gradient takes another product with the points."""
    other = x if y is None else y
    flops = _pairs(x, other) * (2 * (x.shape[-1] + 1) + len(codes) * _DERIVATIVE_FLOPS + _pair_flops(x, codes))
    return Cost(int(flops), 2 * size((x,)) + size((y, left, right, dense)))
