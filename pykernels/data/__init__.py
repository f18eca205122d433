"""Data sets. Nothing here downloads: what is not on the disk is an error."""

from pykernels.data.power import household_power
from pykernels.data.ucr import Dataset, available, load, normalised, read_series

__all__ = ["Dataset", "available", "household_power", "load", "normalised", "read_series"]
