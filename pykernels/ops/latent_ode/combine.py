"""Stage combinations of Runge-Kutta methods: ``y + h (c_0 k_0 + c_1 k_1 + ...)``.

The sum over the stages comes first, so that float32 rounds once at the size of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: ``combine(i, y, stages)``: the combination with the size of step i.
Combine = Callable[[int, Tensor, Sequence[Tensor]], Tensor]


def combination(coefficients: Sequence[float], sizes: Sequence[float] | Tensor) -> Combine:
    """What combines stages with these coefficients.

    Args:
        coefficients: of the stages, at least one of them not zero.
        sizes: of the steps; numbers, or a tensor (steps,) where they need a gradient or are not known to Python.
    """
    (first, lead), *others = [(j, c) for j, c in enumerate(coefficients) if c != 0]
    rest = [(j, c / lead) for j, c in others]

    def total(stages: Sequence[Tensor]) -> Tensor:
        result = stages[first]
        for j, ratio in rest:
            result = torch.add(result, stages[j], alpha=ratio)
        return result

    if isinstance(sizes, Tensor):
        scales = (sizes * lead).unbind()
        return lambda i, y, stages: torch.addcmul(y, total(stages), scales[i])
    numbers = [h * lead for h in sizes]
    return lambda i, y, stages: torch.add(y, total(stages), alpha=numbers[i])
