"""Explicit Runge-Kutta methods as data.

A step of size h from (t, y) is ``y + h sum_i b[i] k[i]`` with the stages
``k[i] = f(t + c[i] h, y + h sum_j a[i][j] k[j])``.

Sources: Hairer, Norsett and Wanner, "Solving ordinary differential equations I", section II.1; ssp_rk3: Shu and Osher,
"Efficient implementation of essentially non-oscillatory shock-capturing schemes", J. Comput. Phys. 77 (1988).
"""

from __future__ import annotations

from typing import NamedTuple


class Tableau(NamedTuple):
    """Coefficients of a method: nodes c, stage coefficients a (row i has i entries), weights b, and its order."""

    name: str
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int

    @property
    def stages(self) -> int:
        return len(self.b)


TABLEAUX: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        Tableau("euler", (0.0,), ((),), (1.0,), 1),
        Tableau("midpoint", (0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0), 2),
        Tableau("heun2", (0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2), 2),
        Tableau("heun3", (0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4), 3),
        # Kutta's 3/8 rule, which torchdiffeq has under this name.
        Tableau(
            "rk4",
            (0.0, 1 / 3, 2 / 3, 1.0),
            ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
            (1 / 8, 3 / 8, 3 / 8, 1 / 8),
            4,
        ),
        Tableau(
            "rk4_classic",
            (0.0, 1 / 2, 1 / 2, 1.0),
            ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
            (1 / 6, 1 / 3, 1 / 3, 1 / 6),
            4,
        ),
        Tableau("ssp_rk3", (0.0, 1.0, 1 / 2), ((), (1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3), 3),
    )
}
