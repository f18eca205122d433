"""How far the window of taps reaches, from the variance and the tolerance.

A window of radius r around the nearest pixel holds 2 r + 1 taps per axis. For a Gaussian of standard deviation s whose
centre is half a pixel off, the worst case, the mass beyond it on one axis is

    (erfc(r / (sqrt(2) s)) + erfc((r + 1) / (sqrt(2) s))) / 2

and the radius is the smallest, at least 1, for which this is at most the tolerance divided by the number of axes. The
tap that leaves or enters when the window jumps weighs less than that as well.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache

#: Weights below this are lost in float64; smaller tolerances ask for as much.
SMALLEST_TOLERANCE = 1e-17
#: Under ``normalize="inside"`` the promise about jumps holds where the inside mass is at least this.
INSIDE_MASS = 0.1


def axis_tolerance(tolerance: float, ranks: int, normalize: str, padding_mode: str) -> float:
    """Mass that may lie beyond the window on each axis."""
    if normalize == "inside" and padding_mode == "zeros":
        tolerance *= INSIDE_MASS
    return max(tolerance, SMALLEST_TOLERANCE) / ranks


def _neglected(radius: int, deviation: float) -> float:
    scale = 1 / (math.sqrt(2) * deviation)
    return (math.erfc(radius * scale) + math.erfc((radius + 1) * scale)) / 2


def largest_variances(axis_tolerance: float, radii: int) -> tuple[float, ...]:
    """The largest variance for which each radius 1, 2, ..., ``radii`` is enough, increasing."""
    return _largest_variances(axis_tolerance, radii)


@lru_cache(maxsize=64)
def _largest_variances(axis_tolerance: float, radii: int) -> tuple[float, ...]:
    variances = []
    for radius in range(1, radii + 1):
        low, high = 0.0, 4.0 * (radius + 1)
        while (middle := (low + high) / 2) not in (low, high):
            low, high = (middle, high) if _neglected(radius, middle) <= axis_tolerance else (low, middle)
        variances.append(low * low)
    return tuple(variances)


def radius(variance: float, axis_tolerance: float, most: int) -> int:
    """The radius for a variance, at most ``most``; 0 for variance 0."""
    if variance <= 0 or most == 0:
        return 0
    return 1 + bisect_left(largest_variances(axis_tolerance, most)[:-1], variance)


# As by torch.compiler.assume_constant_result, which imports the whole compiler, and need not see into the searches.
for _function in (largest_variances, radius):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010  (mypy knows no such attribute)
