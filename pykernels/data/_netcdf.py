"""Temperatures in NetCDF files: finding the variable and its axes, and reading frames of it block by block."""

from __future__ import annotations

import calendar
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pykernels._errors import InputError, require

Array: TypeAlias = npt.NDArray[Any]

BLOCK = 64  # frames that are read at once

# What the axes and the variable are called, in lower case, where attributes do not say it.
_STANDARD_NAMES = {
    "time": {"time"},
    "depth": {"depth", "height", "altitude", "model_level_number"},
    "y": {"latitude", "grid_latitude", "projection_y_coordinate"},
    "x": {"longitude", "grid_longitude", "projection_x_coordinate"},
}
_UNITS = {
    "y": {"degrees_north", "degree_north", "degrees_n", "degree_n", "degreesn", "degreen"},
    "x": {"degrees_east", "degree_east", "degrees_e", "degree_e", "degreese", "degreee"},
}
_NAMES = {
    "time": {"time", "t", "time_counter", "date"},
    "depth": {"depth", "deptht", "lev", "level", "z", "st_ocean", "zlev", "altitude"},
    "y": {"lat", "latitude", "y", "yc", "j", "nj", "rlat", "nlat", "nav_lat"},
    "x": {"lon", "longitude", "x", "xc", "i", "ni", "rlon", "nlon", "nav_lon"},
}
_CF_AXES = {"t": "time", "z": "depth", "y": "y", "x": "x"}
_TEMPERATURES = {
    "sea_surface_temperature",
    "sea_surface_foundation_temperature",
    "sea_surface_skin_temperature",
    "sea_surface_subskin_temperature",
    "sea_water_potential_temperature",
    "sea_water_conservative_temperature",
    "sea_water_temperature",
}
_TEMPERATURE_NAMES = {"sst", "tos", "thetao", "analysed_sst", "votemper", "temperature"}


class Coordinate(NamedTuple):
    """Latitude or longitude, on one axis or on both."""

    dims: tuple[str, ...]
    values: Array
    attributes: dict[str, Any]
    spatial: tuple[str, str]

    def of(self, box: tuple[int, int], size: int) -> Array:
        corner = dict(zip(self.spatial, box, strict=True))
        part: Array = self.values[tuple(slice(corner[dim], corner[dim] + size) for dim in self.dims)]
        return part


@dataclass
class Grid:
    """The temperature in a file, read by blocks of frames."""

    array: Any
    dims: tuple[str, str, str]
    times: Array
    missing_value: float | None
    close: Callable[[], None]

    @classmethod
    def open(cls, source: Any, variable: str | None, depth: int, missing_value: float | None) -> Grid:
        xarray = import_xarray()
        if isinstance(source, (str, os.PathLike)):
            dataset, where = _open(xarray, Path(source)), str(source)
            close = dataset.close
        elif isinstance(source, (xarray.Dataset, xarray.DataArray)):
            dataset = source if isinstance(source, xarray.Dataset) else source.to_dataset(name=source.name or "sst")
            where, close = "the data set", lambda: None
        else:
            raise InputError(f"source must be a path or a Dataset or DataArray of xarray, got {type(source).__name__}")
        try:
            array, dims = _temperature(dataset, variable, depth, where)
            times = _checked_times(array, dims[0], where)
        except BaseException:
            close()
            raise
        return cls(array, dims, times, missing_value, close)

    def __enter__(self) -> Grid:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def variable(self) -> str:
        return str(self.array.name)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return tuple(self.array.sizes[dim] for dim in self.dims[1:])

    @property
    def units(self) -> str:
        return str(self.array.attrs.get("units", ""))

    @property
    def attributes(self) -> dict[str, Any]:
        """What still holds for other values of the same kind."""
        keep = ("units", "standard_name", "long_name")
        return {key: self.array.attrs[key] for key in keep if key in self.array.attrs}

    @property
    def coordinates(self) -> dict[str, Coordinate]:
        found = {}
        for name, values in self.array.coords.items():
            if values.ndim and set(values.dims) <= set(self.dims[1:]):
                found[str(name)] = Coordinate(values.dims, values.values, dict(values.attrs), self.dims[1:])
        return found

    def missing_share(self) -> Array:
        """How often each pixel is missing, shape (rows, columns)."""
        total: Any = 0
        for _, block in self._blocks():
            total = total + (~np.isfinite(block)).sum(0)
        share: Array = total / len(self.times)
        return share

    def read(self, boxes: Sequence[tuple[int, int]], size: int) -> Array:
        """Regions, shape (R, T, size, size), float32."""
        out = np.empty((len(boxes), len(self.times), size, size), dtype=np.float32)
        for start, block in self._blocks():
            for region, box in zip(out, boxes, strict=True):
                region[start : start + len(block)] = block[:, *square(box, size)]
        return out

    def _blocks(self) -> Iterator[tuple[int, Array]]:
        """Blocks of frames and the number of their first, (frames, rows, columns), float32."""
        time = self.dims[0]
        for start in range(0, len(self.times), BLOCK):
            block = self.array.isel({time: slice(start, start + BLOCK)}).load().transpose(*self.dims)
            values = np.array(block.values, dtype=np.float32)
            if self.missing_value is not None:
                values[values == np.float32(self.missing_value)] = np.nan
            yield start, values


def import_xarray() -> Any:
    return require("xarray", "xarray", "netcdf", "pykernels.data.sst")


def _open(xarray: Any, path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    with path.open("rb") as file:
        classic = file.read(3) == b"CDF"
    engine = "scipy" if classic else "h5netcdf"
    for package in (engine,) if classic else (engine, "h5py"):
        require(package, package, "netcdf", "pykernels.data.sst")
    with warnings.catch_warnings():
        # One of several values that mean missing: all are read as NaN, which is what is wanted.
        warnings.filterwarnings("ignore", "variable .* has multiple fill values", xarray.SerializationWarning)
        try:
            return xarray.open_dataset(path, engine=engine, cache=False, decode_timedelta=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as NetCDF: {error}") from error


def _role(array: Any, dim: str) -> str | None:
    """Whether a dimension is the time, the depth, y or x; None if it does not say."""
    attributes: dict[str, Any] = {}
    if dim in array.coords:
        coordinate = array.coords[dim]
        attributes = coordinate.attrs
        first = coordinate.values.reshape(-1)[:1]
        if coordinate.dtype.kind == "M" or (len(first) and hasattr(first[0], "calendar")):
            return "time"
    said = str(attributes.get("standard_name", "")).lower()
    units = str(attributes.get("units", "")).lower()
    axis = str(attributes.get("axis", "")).lower()
    for role, names in _STANDARD_NAMES.items():
        if said in names or units in _UNITS.get(role, ()) or _CF_AXES.get(axis) == role:
            return role
    if "positive" in attributes:
        return "depth"
    return next((role for role, names in _NAMES.items() if dim.lower() in names), None)


def _axes(array: Any) -> dict[str, str] | None:
    """The dimensions that are the time, the depth, y and x, or None if time, y and x are not all there."""
    roles: dict[str, str] = {}
    unknown = []
    for dim in map(str, array.dims):
        role = _role(array, dim)
        if role is None:
            unknown.append(dim)
        elif role in roles:
            return None
        else:
            roles[role] = dim
    if "y" not in roles and "x" not in roles and len(unknown) >= 2:
        roles["y"], roles["x"] = unknown[-2:]
        unknown = unknown[:-2]
    if not {"time", "y", "x"} <= roles.keys() or any(array.sizes[dim] != 1 for dim in unknown):
        return None
    return roles


def _temperature(dataset: Any, variable: str | None, depth: int, where: str) -> tuple[Any, tuple[str, str, str]]:
    """The variable without its depth, and its dimensions of time, y and x."""
    found = {str(name): _axes(array) for name, array in dataset.data_vars.items()}
    usable = {name: axes for name, axes in found.items() if axes}
    if variable is None:
        named = [
            name
            for name in usable
            if str(dataset[name].attrs.get("standard_name", "")).lower() in _TEMPERATURES
            or name.lower() in _TEMPERATURE_NAMES
        ]
        choice = named if len(named) == 1 else list(usable)
        if len(choice) != 1:
            several = f"several: {', '.join(map(repr, usable))}" if usable else f"none among {_shapes(dataset)}"
            raise InputError(f"variable must name one with time, latitude and longitude; {where} has {several}")
        variable = choice[0]
    elif variable not in found:
        raise InputError(f"variable must be one of {', '.join(map(repr, found))}, got {variable!r}")
    axes = found[variable]
    if axes is None:
        raise InputError(
            f"variable {variable!r} must have a time, a latitude and a longitude and perhaps a depth, "
            f"got {_shapes(dataset[[variable]])}"
        )
    array = dataset[variable]
    if "depth" in axes:
        levels = array.sizes[axes["depth"]]
        if not -levels <= depth < levels:
            raise InputError(f"depth must be one of the {levels} levels of {axes['depth']!r}, got {depth}")
        array = array.isel({axes["depth"]: depth}, drop=True)
    dims = (axes["time"], axes["y"], axes["x"])
    # What is left beside these has one element.
    return array.isel({dim: 0 for dim in array.dims if dim not in dims}, drop=True), dims


def _shapes(dataset: Any) -> str:
    return "; ".join(f"{name} ({', '.join(map(str, a.dims))})" for name, a in dataset.data_vars.items()) or "nothing"


def _checked_times(array: Any, dim: str, where: str) -> Array:
    times: Array = np.asarray(array.coords[dim].values) if dim in array.coords else np.empty(0)
    if len(times) == 0 or not (times.dtype.kind == "M" or hasattr(times[0], "calendar")):
        raise InputError(f"the time axis {dim!r} of {where} must have dates: units such as 'days since 2006-01-01'")
    if len(times) > 1 and not (days_between(times) > 0).all():
        raise InputError(f"the times of {where} must increase")
    return times


def days_between(times: Array) -> Array:
    """The time between frames in days."""
    gaps = np.diff(times)
    if times.dtype.kind == "M":
        days: Array = gaps / np.timedelta64(1, "D")
        return days
    return np.asarray([gap.total_seconds() / 86400 for gap in gaps])


def date(time: Any) -> tuple[int, int, int]:
    """Year, month and day."""
    if isinstance(time, np.datetime64):
        year, month, day = str(time.astype("datetime64[D]")).split("-")
        return int(year), int(month), int(day)
    return time.year, time.month, time.day


def text(time: Any) -> str:
    return "{:04d}-{:02d}-{:02d}".format(*date(time))


def months_later(time: Any, months: int) -> Any:
    """The same day of a later month, or the last one of a month that has no such day."""
    year, month, day = date(time)
    year, month = year + (month - 1 + months) // 12, (month - 1 + months) % 12 + 1
    if isinstance(time, np.datetime64):
        day = min(day, calendar.monthrange(year, month)[1])
        moment = time - time.astype("datetime64[D]")  # of the day
        return np.datetime64(f"{year:04d}-{month:02d}-{day:02d}") + moment
    first = time.replace(year=year, month=month, day=1)
    return first.replace(day=min(day, first.daysinmonth))


def square(box: tuple[int, int], size: int) -> tuple[slice, slice]:
    return slice(box[0], box[0] + size), slice(box[1], box[1] + size)
