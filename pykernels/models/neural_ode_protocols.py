"""The published experiment of :mod:`pykernels.models.neural_ode`: forecasts of the damped pendulum.

A forecast is scored by the natural logarithm of its mean squared error over all observations of the test trajectories,
noise included. No model does better than the true equation from the same noisy first states, which is scored beside.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pykernels.data.pendulum import Array, PendulumData
from pykernels.models.neural_ode import NeuralODE, log_mse
from pykernels.models.published import published_forecast
from pykernels.ops import odeint

__all__ = ["PendulumScores", "forecast_table", "pendulum_scores", "true_forecast"]


@dataclass(frozen=True)
class PendulumScores:
    """How well a model forecasts the test trajectories.

    Attributes:
        log_mse: natural logarithm of the mean squared error.
        true_log_mse: that of the true equation, with the model's method and steps, from the same noisy first states.
        energy_error: mean absolute difference of the energies of forecast and observation.
    """

    log_mse: float
    true_log_mse: float
    energy_error: float


def pendulum_scores(model: NeuralODE, data: PendulumData) -> PendulumScores:
    """Score a model on the test trajectories."""
    predicted = model.predict(data.test[:, 0], data.times)
    energies = data.pendulum.energy(predicted), data.pendulum.energy(data.test)
    return PendulumScores(
        log_mse(predicted, data.test),
        log_mse(true_forecast(data, data.test, model.method), data.test),
        float(np.abs(energies[0] - energies[1]).mean()),
    )


def true_forecast(data: PendulumData, states: Array, method: str = "rk4") -> Array:
    """Trajectories of the true equation from the first of these observed states, one step to an observation.

    Args:
        data: gives the equation and the times.
        states: shape (N, T, 2).
        method: of integration.
    """
    first, times = torch.from_numpy(states[:, 0].copy()), torch.from_numpy(data.times)
    forecast: Array = odeint(lambda t, y: data.pendulum.field(y), first, times, method=method).numpy()
    return forecast.swapaxes(0, 1)


def forecast_table(results: Iterable[Mapping[str, Any]]) -> str:
    """Test errors of runs beside the published ones, a table in Markdown with a row for each model and each system.

    Args:
        results: of ``pykernels reproduce neural-ode``.
    """
    groups: dict[tuple[float, float, float], list[Mapping[str, Any]]] = {}
    for result in results:
        system = result["system"]
        groups.setdefault((system["period"], system["damping"], system["noise"]), []).extend(result["runs"])
    lines = [
        "| model | period | damping | noise | runs | log MSE | published |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (period, damping, noise), runs in groups.items():
        for model, key in (("Neural ODE", "log_mse"), ("true ODE", "true_log_mse")):
            published = published_forecast(model)
            lines.append(
                f"| {model} | {period:g} | {damping:g} | {noise:g} | {len(runs)} "
                f"| {spread([run[key] for run in runs])} "
                f"| {'' if published is None else f'{published[0]:.2f} ± {published[1]:.2f}'} |"
            )
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Their mean, and if there are several their standard deviation."""
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"
