"""Activations of infinitely wide networks, and networks as the kernels take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

#: The activations whose kernels are known, with what they take and its defaults.
PARAMETERS: dict[str, dict[str, float]] = {
    "identity": {"amplitude": 1.0},
    "relu": {"amplitude": 1.0},
    "leaky_relu": {"amplitude": 1.0, "slope": 0.01},
    "abs": {"amplitude": 1.0},
    "erf": {"amplitude": 1.0, "frequency": 1.0, "offset": 0.0},
    "sigmoid_like": {},
    "gelu": {"amplitude": 1.0},
    "sin": {"amplitude": 1.0, "frequency": 1.0, "phase": 0.0},
    "cos": {"amplitude": 1.0, "frequency": 1.0, "phase": 0.0},
    "rbf": {"amplitude": 1.0, "gamma": 1.0},
}
#: In sigmoid_like, (1 + erf(z / 2.402...)) / 2.
SIGMOID_SCALE = 2.4020563531719796

# What the kernels call them; those of the first three scale with their argument.
IDENTITY, RELU, LEAKY_RELU, ERF, GELU, SIN, RBF = range(7)
N_CONSTANTS = 3


class Branch(NamedTuple):
    """One activation of a layer: its code, and its constants.

    (amplitude, slope, 0) of the first three, (amplitude, frequency, 0) of erf, (amplitude, 0, 0) of gelu,
    (amplitude, frequency, cos(2 phase)) of sin and (amplitude, gamma, 0) of rbf.
    """

    code: int
    constants: tuple[float, float, float]
    offset: float = 0.0

    @property
    def homogeneous(self) -> bool:
        return self.code <= LEAKY_RELU


@dataclass(frozen=True, init=False)
class Activation:
    """An activation function phi of an infinitely wide network, or a sum of such branches.

    =================  ============================================  ==============================
    name               phi(z)                                        parameters, with their defaults
    =================  ============================================  ==============================
    ``identity``       a z                                           ``amplitude=1`` (a)
    ``relu``           a max(z, 0)                                   ``amplitude=1``
    ``leaky_relu``     a max(z, 0) + a s min(z, 0)                   ``amplitude=1, slope=0.01`` (s)
    ``abs``            a abs(z)                                      ``amplitude=1``
    ``erf``            a erf(b z) + d                                ``amplitude=1, frequency=1`` (b), ``offset=0`` (d)
    ``sigmoid_like``   (1 + erf(z / 2.4020563531719796)) / 2         none
    ``gelu``           a z Phi(z), the exact form                    ``amplitude=1``
    ``sin``            a sin(b z + c)                                ``amplitude=1, frequency=1`` (b), ``phase=0`` (c)
    ``cos``            a cos(b z + c)                                as ``sin``
    ``rbf``            a sqrt(2) sin(sqrt(2 g) z + pi/4)             ``amplitude=1, gamma=1`` (g)
    =================  ============================================  ==============================

    ``rbf`` has the kernel a^2 exp(-g (q + r - 2c)), q, r and c being the variances and the covariance of its inputs.

    Activations add: ``Activation("relu") + Activation("sin")`` is a layer with one branch of each, whose outputs are
    added through weights of their own, so that their kernels add.

    Args:
        name: one of the above, or several joined by ``+`` with their defaults, as in ``"relu+sin"``.
        parameters: those of the one activation.

    Raises:
        TypeError: if a parameter is unknown or no number.
        ValueError: if the name is unknown, or a parameter is not finite; if ``gamma`` is negative.
    """

    name: str
    branches: tuple[Branch, ...]

    def __init__(self, name: str, **parameters: float) -> None:
        if not isinstance(name, str):
            raise TypeError(f"an activation must be a name or an Activation, got {type(name).__name__}")
        parts = [part.strip() for part in name.split("+")]
        for part in parts:
            if part not in PARAMETERS:
                raise ValueError(f"activation must be one of {', '.join(PARAMETERS)}, or a sum of them; got {name!r}")
        if len(parts) > 1 and parameters:
            raise TypeError(f"parameters belong to one activation, got {name!r}; add Activation objects instead")
        object.__setattr__(self, "branches", tuple(_branch(part, parameters) for part in parts))
        given = ", ".join(f"{key}={value:g}" for key, value in parameters.items())
        object.__setattr__(self, "name", "+".join(parts) + (f"({given})" if given else ""))

    def __add__(self, other: Activation) -> Activation:
        if not isinstance(other, Activation):
            return NotImplemented
        total = object.__new__(Activation)
        object.__setattr__(total, "name", f"{self.name}+{other.name}")
        object.__setattr__(total, "branches", self.branches + other.branches)
        return total

    def __str__(self) -> str:
        return self.name


def _branch(name: str, parameters: dict[str, Any]) -> Branch:
    values = dict(PARAMETERS[name])
    for key, value in parameters.items():
        if key not in values:
            raise TypeError(f"{name} takes {', '.join(values) or 'no parameters'}; got {key!r}")
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{key} of {name} must be a number, got {type(value).__name__}")
        if not math.isfinite(value) or (key == "gamma" and value < 0):
            raise ValueError(f"{key} of {name} must be finite{' and not negative' * (key == 'gamma')}, got {value}")
        values[key] = float(value)
    a = values.get("amplitude", 1.0)
    if a == 0 or (name == "erf" and values["frequency"] == 0):  # a constant, whose directions would be 0 / 0
        return Branch(IDENTITY, (0.0, 1.0, 0.0), values.get("offset", 0.0))
    if name == "sigmoid_like":
        return Branch(ERF, (0.5, 1 / SIGMOID_SCALE, 0.0), 0.5)
    if name == "erf":
        return Branch(ERF, (a, values["frequency"], 0.0), values["offset"])
    if name in ("sin", "cos"):
        phase = values["phase"] + (math.pi / 2 if name == "cos" else 0.0)
        return Branch(SIN, (a, values["frequency"], math.cos(2 * phase)))
    if name == "rbf":
        return Branch(RBF, (a, values["gamma"], 0.0))
    if name == "gelu":
        return Branch(GELU, (a, 0.0, 0.0))
    slope = {"identity": 1.0, "relu": 0.0, "abs": -1.0}.get(name, values.get("slope", 0.0))
    code = {1.0: IDENTITY, 0.0: RELU}.get(slope, LEAKY_RELU)
    return Branch(code, (a, slope, 0.0))


class Options(NamedTuple):
    """A network, and what is asked of its kernel, in the order of the operators' arguments.

    ``counts`` are the branches of each hidden layer, ``codes`` and ``constants`` those of all branches, ``offsets`` of
    each layer the sum of its branches' squared offsets. ``kind`` is 0 for the NNGP kernel, 1 for the tangent kernel, 2
    for both.
    """

    counts: list[int]
    codes: list[int]
    constants: list[float]
    offsets: list[float]
    kind: int
    precision: str

    @property
    def depth(self) -> int:
        return len(self.counts)

    def layers(self) -> list[list[Branch]]:
        """The branches of each hidden layer (their offsets left out)."""
        found, first = [], 0
        for count in self.counts:
            numbers = range(first, first + count)
            found.append([Branch(self.codes[i], tuple(self.constants[3 * i : 3 * i + 3])) for i in numbers])  # type: ignore[arg-type]
            first += count
        return found

    def row_parameters(self) -> int:
        """How many numbers of each point the kernel depends on but for its direction: see :func:`reference.primary`."""
        return sum(1 if code <= LEAKY_RELU else 2 for code in self.codes) + self.depth + 1


KINDS = {"nngp": 0, "ntk": 1, "both": 2}
PRECISIONS = ("float32", "tf32", "bf16")


def network(activations: Sequence[Activation], kind: str, precision: str) -> Options:
    branches = [branch for activation in activations for branch in activation.branches]
    return Options(
        [len(activation.branches) for activation in activations],
        [branch.code for branch in branches],
        [number for branch in branches for number in branch.constants],
        [sum(branch.offset**2 for branch in activation.branches) for activation in activations],
        KINDS[kind],
        precision,
    )
