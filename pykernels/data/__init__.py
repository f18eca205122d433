"""Data sets. Nothing here downloads: what is not on the disk is an error."""

from pykernels.data import ocean, sst
from pykernels.data.pendulum import Pendulum, PendulumData, damped_pendulum
from pykernels.data.power import household_power
from pykernels.data.ucr import Dataset, available, load, normalised, read_series

__all__ = [
    "Dataset",
    "Pendulum",
    "PendulumData",
    "available",
    "damped_pendulum",
    "household_power",
    "load",
    "normalised",
    "ocean",
    "read_series",
    "sst",
]
