"""The damped pendulum: its equation, its energy, and trajectories observed with noise.

    theta'' + omega^2 sin(theta) + damping theta' = 0,   omega = 2 pi / period

The state is (theta, theta'), in radians and radians per unit of time. Without damping the energy
theta'^2 / 2 + omega^2 (1 - cos theta) is kept, otherwise it falls at the rate damping theta'^2.

Source: Yin, Le Guen, Dona, de Bezenac, Ayed, Thome and Gallinari, "Augmenting physical models with deep networks for
complex dynamics forecasting" (APHYNITY), ICLR 2021, section 4 and its released program, from which the distribution of
the first states is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykernels._errors import InputError
from pykernels.ops import odeint

Array: TypeAlias = npt.NDArray[np.float64]

SPLITS = ("train", "validation", "test")
RADIUS = (1.3, 2.3)  # of the first states
# The 3/8 rule at 400 steps per unit of time, and 1200 per period, is within 1e-9 of the solution at all times up to 20.
STEPS_PER_UNIT, STEPS_PER_PERIOD = 400, 1200


@dataclass(frozen=True)
class Pendulum:
    """The equation with its constants.

    Args:
        period: 2 pi / omega, the period of small swings without damping; positive.
        damping: not negative.
    """

    period: float = 6.0
    damping: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.period < math.inf:
            raise InputError(f"period must be positive, got {self.period!r}")
        if not 0 <= self.damping < math.inf:
            raise InputError(f"damping must not be negative, got {self.damping!r}")

    @property
    def omega(self) -> float:
        return 2 * math.pi / self.period

    def field(self, states: Tensor) -> Tensor:
        """The derivative of the states in time, both of shape (..., 2)."""
        angle, velocity = states.unbind(-1)
        return torch.stack([velocity, -(self.omega**2) * torch.sin(angle) - self.damping * velocity], -1)

    def derivative(self, states: npt.ArrayLike) -> Array:
        """As :meth:`field`, for arrays."""
        derivative: Array = self.field(torch.as_tensor(np.asarray(states, dtype=np.float64))).numpy()
        return derivative

    def energy(self, states: npt.ArrayLike) -> Array:
        """Energy per moment of inertia, shape (...), of states of shape (..., 2)."""
        angle, velocity = np.moveaxis(np.asarray(states, dtype=np.float64), -1, 0)
        energy: Array = velocity**2 / 2 + self.omega**2 * (1 - np.cos(angle))
        return energy

    def solve(self, first_states: npt.ArrayLike, times: npt.ArrayLike) -> Array:
        """Trajectories of the equation, within 1e-9 up to time 20.

        Args:
            first_states: at ``times[0]``, shape (N, 2).
            times: increasing, shape (T,).

        Returns:
            States, shape (N, T, 2).
        """
        first = torch.as_tensor(np.asarray(first_states, dtype=np.float64))
        if first.ndim != 2 or first.shape[1] != 2:
            raise InputError(f"first_states must have shape (N, 2), got {tuple(first.shape)}")
        step = min(1 / STEPS_PER_UNIT, self.period / STEPS_PER_PERIOD)
        with torch.no_grad():
            states = odeint(
                lambda t, y: self.field(y),
                first,
                torch.as_tensor(np.asarray(times, dtype=np.float64)),
                method="rk4",
                options={"step_size": step},
            )
        trajectories: Array = states.transpose(0, 1).contiguous().numpy()
        return trajectories


@dataclass(frozen=True)
class PendulumData:
    """Observed trajectories of a pendulum.

    Attributes:
        pendulum: the equation they follow.
        noise: standard deviation of what was added to every state, the first ones included.
        times: of the observations, shape (T,).
        train, validation, test: states, shape (N, T, 2).
    """

    pendulum: Pendulum
    noise: float
    times: Array
    train: Array
    validation: Array
    test: Array

    def describe(self) -> dict[str, Any]:
        """The constants, for JSON."""
        constants = {field.name: getattr(self.pendulum, field.name) for field in fields(Pendulum)}
        return {
            **constants,
            "noise": self.noise,
            "n_times": len(self.times),
            **{split: len(getattr(self, split)) for split in SPLITS},
        }


def damped_pendulum(
    n_trajectories: int = 25,
    *,
    period: float = 6.0,
    damping: float = 0.2,
    n_times: int = 40,
    time_step: float = 0.5,
    noise: float = 0.01,
    seed: int = 0,
) -> PendulumData:
    """Simulate trajectories for training, validation and testing. The defaults are the published constants.

    Of the two published periods, 6 in the caption of the results and 12 in the text, 6 agrees with the published error
    of the true equation. With 12 some of the pendulums start so fast that they go over the top or come to a halt there,
    and what they do then hangs on the noise of their first state.

    Every trajectory begins at a random state: the direction of a point drawn from the square [-1, 1]^2, at a distance
    from the origin that is uniform in 1.3 to 2.3.

    Args:
        n_trajectories: of each of the three splits.
        period, damping: of :class:`Pendulum`.
        n_times: observations of each trajectory, at 0, ``time_step``, 2 ``time_step``, ...
        noise: standard deviation of the Gaussian noise on every observed number.
        seed: of all that is random. The same seed gives the same first states for any ``period`` and ``noise``.

    Raises:
        InputError: if an argument is out of its range. A :class:`ValueError`.
    """
    for name, value in (("n_trajectories", n_trajectories), ("n_times", n_times)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if not 0 < time_step < math.inf:
        raise InputError(f"time_step must be positive, got {time_step!r}")
    if not 0 <= noise < math.inf:
        raise InputError(f"noise must not be negative, got {noise!r}")
    pendulum = Pendulum(period, damping)
    times: Array = time_step * np.arange(n_times, dtype=np.float64)
    generators = [np.random.default_rng([seed, part]) for part in range(len(SPLITS))]
    first = np.concatenate([_first_states(n_trajectories, generator) for generator in generators])
    exact = np.split(pendulum.solve(first, times), len(SPLITS))
    train, validation, test = (
        part + noise * random.standard_normal(part.shape) for part, random in zip(exact, generators, strict=True)
    )
    return PendulumData(pendulum, noise, times, train, validation, test)


def _first_states(count: int, random: np.random.Generator) -> Array:
    direction = random.uniform(-1, 1, (count, 2))
    states: Array = direction / np.linalg.norm(direction, axis=1, keepdims=True) * random.uniform(*RADIUS, (count, 1))
    return states
