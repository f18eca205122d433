"""Data sets. Nothing here downloads: what is not on the disk is an error."""

from pykernels.data import ocean, sst
from pykernels.data.pendulum import Pendulum, PendulumData, damped_pendulum
from pykernels.data.point_clouds import PointClouds, digits, eight_gaussians, image_densities
from pykernels.data.power import household_power
from pykernels.data.ucr import Dataset, available, load, normalised, read_series

__all__ = [
    "Dataset",
    "Pendulum",
    "PendulumData",
    "PointClouds",
    "available",
    "damped_pendulum",
    "digits",
    "eight_gaussians",
    "household_power",
    "image_densities",
    "load",
    "normalised",
    "ocean",
    "read_series",
    "sst",
]
