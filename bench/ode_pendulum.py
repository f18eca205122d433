"""Training steps of the Neural ODE on the damped pendulum beside torchdiffeq: ``python bench/ode_pendulum.py``.

The same network, 2-200-200-2 with ReLU, from the same weights on the same 25 trajectories of 40 observations: Kutta's
3/8 rule with one step to an observation, the mean squared error over all of them, its gradient, a step of Adam.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from measure import Contender, compare
from torch import Tensor, nn
from torchdiffeq import odeint as torchdiffeq_odeint

from pykernels.data import damped_pendulum
from pykernels.models.neural_ode import NeuralODE, NeuralODETraining

Runs = dict[str, Callable[[], Any]]
CURVE_STEPS = 200


class PlainField(nn.Module):
    """What users of torchdiffeq write."""

    def __init__(self, widths: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs, dtype=dtype), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


def torchdiffeq_step(model: NeuralODE, times: Tensor, states: Tensor) -> Callable[[], float]:
    """A training step of a copy of ``model``; ``states`` have shape (T, B, D)."""
    field = PlainField([*model.field.dims], states.dtype)
    with torch.no_grad():
        for ours, theirs in zip(model.field.parameters(), field.parameters(), strict=True):
            theirs.copy_(ours)
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        predicted = torchdiffeq_odeint(field, states[0], times, method="rk4")
        loss = nn.functional.mse_loss(predicted, states)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def pendulum_step(curve_steps: int = CURVE_STEPS) -> tuple[Runs, dict[str, float], dict[str, list[float]], int]:
    """One training step of each, to be timed, after ``curve_steps`` of them have been compared.

    Returns:
        Training steps by contender; the largest relative difference of a loss from that of torchdiffeq in float64,
        over all compared steps; the compared losses, also of float64; floating-point operations of a step.
    """
    data = damped_pendulum()
    model = NeuralODE(seed=0)
    steps: Runs = {"torchdiffeq": _plain(model, data, torch.float32), "float64": _plain(model, data, torch.float64)}
    # More steps than any benchmark does, and no validation.
    training = NeuralODETraining(model, data.times, data.train, n_steps=10_000_000)
    steps["pykernels"] = training.step
    losses = {name: [step() for _ in range(curve_steps)] for name, step in steps.items()}
    expected = np.array(losses["float64"])
    errors = {name: float(np.abs(np.array(losses[name]) / expected - 1).max()) for name in ("pykernels", "torchdiffeq")}
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    evaluations = 4 * (len(data.times) - 1) * len(data.train)
    # The gradients for the inputs and for the weights take as much as the forward each.
    return {name: steps[name] for name in errors}, errors, losses, 3 * 2 * weights * evaluations


def _plain(model: NeuralODE, data: Any, dtype: torch.dtype) -> Callable[[], float]:
    times, states = torch.as_tensor(data.times, dtype=dtype), torch.as_tensor(data.train, dtype=dtype)
    return torchdiffeq_step(model, times, states.transpose(0, 1).contiguous())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="for the timing (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="most threads (default: all)")
    parser.add_argument("--steps", type=int, default=CURVE_STEPS, help="losses to compare (default: %(default)s)")
    args = parser.parse_args()
    start = time.perf_counter()
    runs, errors, losses, flops = pendulum_step(args.steps)
    for name, error in errors.items():
        print(f"{name}: losses of {args.steps} steps within {error:.1e} of float64, last {losses[name][-1]:.6f}")
    print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    results = compare([Contender(*run) for run in runs.items()], seconds=args.seconds, most_threads=args.threads)
    for name, result in results.items():
        rate = flops / result["median_s"] / 1e9
        print(f"{name}: {result['median_s'] * 1e3:.2f} ms, {rate:.0f} GFLOP/s, {result['threads']} threads")
    print(f"{results['torchdiffeq']['median_s'] / results['pykernels']['median_s']:.1f} times faster")


if __name__ == "__main__":
    main()
