"""A simulated household's electric power, minute by minute, in the place of a measured series.

The measured one that long-series experiments use has 2 075 259 minutes of a house near Paris (UCI machine learning
repository, "Individual household electric power consumption"). The simulated one has the same length and what makes
such a signal hard to read at one scale: days, weeks and years on top of each other, and abrupt random events.

    power = base + refrigerator + heating + sum of the appliances that are on + noise     (kW)

- refrigerator: on for a third of a cycle of 44.3 minutes;
- heating: by how cold the day is, a sine over the year plus weather that persists for some days (autoregressive), and
  turned down at night;
- appliances: events at random minutes. How many there are follows the hour, with peaks in the morning and the evening,
  later and flatter at weekends. Each has the power and the duration of its kind, both spread at random. In three weeks
  of August nobody is at home.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pykernels._errors import InputError

MINUTES_PER_DAY = 1440
MEASURED_SAMPLES = 2_075_259
_HOLIDAYS = (214, 235)  # days of the year


class _Appliance(NamedTuple):
    per_day: float
    kilowatts: float
    minutes: float


_APPLIANCES = (
    _Appliance(per_day=40.0, kilowatts=0.10, minutes=25.0),  # lights and screens
    _Appliance(per_day=5.0, kilowatts=2.0, minutes=4.0),  # kettle
    _Appliance(per_day=1.5, kilowatts=1.8, minutes=35.0),  # oven and hob
    _Appliance(per_day=0.6, kilowatts=1.2, minutes=75.0),  # washing machine and dish washer
)


def household_power(n_samples: int = MEASURED_SAMPLES, *, seed: int = 0) -> npt.NDArray[np.float64]:
    """Simulate the power of a household.

    Args:
        n_samples: minutes, at least 1; the first is midnight of a Monday, the first of January.
        seed: of all that is random.

    Returns:
        Power in kW, positive, shape (n_samples,).

    Raises:
        InputError: if ``n_samples`` is not positive.
    """
    if n_samples < 1:
        raise InputError(f"n_samples must be at least 1, got {n_samples}")
    random = np.random.default_rng(seed)
    minute = np.arange(n_samples)
    day, hour = minute // MINUTES_PER_DAY, minute % MINUTES_PER_DAY / 60
    away = (day % 365.25 >= _HOLIDAYS[0]) & (day % 365.25 < _HOLIDAYS[1])

    power = np.full(n_samples, 0.15)
    power += 0.12 * ((minute + random.integers(45)) % 44.3 < 14.8)
    night = 0.5 * (1 + np.tanh(2 * (np.abs(hour - 14.5) - 8)))
    power += np.maximum(_cold(int(day[-1]) + 1, random), 0)[day] * (1 - 0.6 * night) * np.where(away, 0.2, 1.0)

    weekend = day % 7 >= 5
    activity = 0.15 + _peak(hour, np.where(weekend, 10.0, 7.5), np.where(weekend, 2.0, 1.0))
    activity = (activity + 1.6 * _peak(hour, np.where(weekend, 18.5, 20.0), 2.2)) * np.where(away, 0.02, 1.0)
    activity /= 0.6  # about its mean, so that appliances run as often as they say
    for appliance in _APPLIANCES:
        power += _events(appliance, activity, random)
    power *= np.exp(0.03 * random.standard_normal(n_samples))
    return power


def _peak(
    hour: npt.NDArray[np.float64], centre: npt.NDArray[np.float64], width: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    peak: npt.NDArray[np.float64] = np.exp(-0.5 * ((hour - centre) / np.asarray(width)) ** 2)
    return peak


def _cold(n_days: int, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Power of the heating in kW, by day."""
    weather = np.empty(n_days)
    state = 0.0
    for i, shock in enumerate(random.standard_normal(n_days)):
        state = weather[i] = 0.8 * state + 0.15 * shock
    weather += 0.35 + 0.5 * np.cos(2 * np.pi * (np.arange(n_days) - 15) / 365.25)
    return weather


def _events(
    appliance: _Appliance, activity: npt.NDArray[np.float64], random: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Power of one kind of appliance: steps up and down at the starts and the ends of its events, summed up."""
    n_samples = len(activity)
    starts = np.flatnonzero(random.random(n_samples) < activity * appliance.per_day / MINUTES_PER_DAY)
    kilowatts = appliance.kilowatts * np.exp(0.25 * random.standard_normal(len(starts)))
    minutes = 1 + random.exponential(appliance.minutes, len(starts)).astype(np.int64)
    steps = np.zeros(n_samples + 1)
    np.add.at(steps, starts, kilowatts)
    np.add.at(steps, np.minimum(starts + minutes, n_samples), -kilowatts)
    return np.maximum(np.cumsum(steps[:-1]), 0)  # rounding leaves nothing below zero
