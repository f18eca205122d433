"""Sea-surface temperature from NetCDF files: square regions, windows of consecutive frames, and back to degrees.

    normalised = (temperature - climatology[calendar day or month] - mean) / deviation

Climatology, mean and deviation are those of the training years, region by region. Land and missing pixels become 0.
Needs xarray and h5netcdf, the extra ``netcdf``.

The protocol is that of de Bezenac, Pajot and Gallinari, "Deep learning for physical processes: incorporating prior
scientific knowledge", ICLR 2018: regions of 64 by 64 pixels, the years 2006 to 2015 for training and 2016 and 2017 for
testing, four frames in and six to forecast. Their program normalises every image by itself (``standardise="image"``).
"""

from __future__ import annotations

import calendar
import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykernels._errors import InputError, require

Array: TypeAlias = npt.NDArray[Any]
Years: TypeAlias = tuple[int, int]

SPLITS = ("train", "validation", "test")
CLIMATOLOGIES = ("auto", "day", "month", "none")
LEVELS = ("region", "pixel")
STANDARDISE = ("region", "image")
# Slots of a year. Days are counted as if every month had 31, so that they are the same in all years and calendars.
SLOTS = {"day": 12 * 31, "month": 12, "none": 1}
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


class Box(NamedTuple):
    """The first row and column of a square region in the file."""

    row: int
    column: int


@dataclass(frozen=True)
class SSTFrames:
    """Where the frames of N windows of T frames come from, and how they were normalised.

    ``frames[windows]`` and ``frames[windows, times]`` are a part of it, by whatever indexes an array: ``frames[:, 4:]``
    are the frames that four inputs are followed by.

    Attributes:
        region: the number of each window's region, shape (N,), int64.
        times: shape (N, T), as datetime64, or as objects of cftime where the file's calendar is not the common one.
        slots: calendar day or month of each frame, the index into the climatology, shape (N, T), int64.
        mean, deviation: by which the frames, less the climatology, are normalised, shape (N, T), float32.
    """

    region: Array
    times: Array
    slots: Array
    mean: Array
    deviation: Array

    def __len__(self) -> int:
        return len(self.region)

    def __getitem__(self, index: Any) -> SSTFrames:
        windows, frames = index if isinstance(index, tuple) else (index, slice(None))
        parts = (getattr(self, name)[windows][:, frames] for name in ("times", "slots", "mean", "deviation"))
        return SSTFrames(self.region[windows], *parts)


@dataclass(frozen=True)
class SSTScaling:
    """What turns degrees into what a network sees, and back, for R regions. A checkpoint keeps it: :meth:`state`.

    Attributes:
        size: pixels on each side of a region.
        boxes: where the regions are in the file.
        sea: where there is sea, shape (R, size, size), bool.
        unit: of the climatology: ``"day"``, ``"month"`` or ``"none"``.
        climatology: mean temperature by calendar day or month, shape (R, slots), or (R, slots, size, size) if pixel by
            pixel, float32.
        standardise: ``"region"`` or ``"image"``.
        mean, deviation: over the training years less the climatology, shape (R,), float32. For ``"image"`` every frame
            has its own, which :class:`SSTFrames` keeps.
    """

    size: int
    boxes: tuple[Box, ...]
    sea: Array
    unit: str
    climatology: Array
    standardise: str
    mean: Array
    deviation: Array

    def normalise(self, degrees: npt.ArrayLike, region: npt.ArrayLike, times: Array) -> tuple[Array, SSTFrames]:
        """Frames as a network sees them.

        Args:
            degrees: shape (N, T, H, W), in the units of the file.
            region: number of each window's region, shape (N,).
            times: shape (N, T).

        Returns:
            The normalised frames, shape (N, T, H, W), float32, 0 on land; and what :meth:`restore` needs.
        """
        region = np.asarray(region, dtype=np.int64)
        slots = _slots(times, self.unit)
        sea = self.sea[region][:, None]
        values = np.where(sea, np.asarray(degrees, dtype=np.float32) - self._climatology(region, slots), 0)
        if self.standardise == "image":
            count = sea.sum((-2, -1))
            mean = values.sum((-2, -1), dtype=np.float64) / count
            squares = np.where(sea, values - mean[..., None, None], 0) ** 2
            deviation = _not_zero(np.sqrt(squares.sum((-2, -1)) / count))
        else:
            mean, deviation = (np.broadcast_to(x[region, None], slots.shape) for x in (self.mean, self.deviation))
        frames = SSTFrames(region, times, slots, mean.astype(np.float32), deviation.astype(np.float32))
        scaled = (values - frames.mean[..., None, None]) / frames.deviation[..., None, None]
        return np.where(sea, scaled, np.float32(0)), frames

    def restore(self, values: Tensor | npt.ArrayLike, frames: SSTFrames) -> Array:
        """The inverse of :meth:`normalise`.

        Args:
            values: normalised frames, shape (N, T, H, W).
            frames: of the same N and T.

        Returns:
            Temperatures in the units of the file, shape (N, T, H, W), float32, NaN on land.
        """
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        expected = (*frames.slots.shape, self.size, self.size)
        if array.shape != expected:
            raise InputError(f"values must have shape {expected}, that of the frames, got {array.shape}")
        degrees = array * frames.deviation[..., None, None] + frames.mean[..., None, None]
        degrees = degrees + self._climatology(frames.region, frames.slots)
        restored: Array = np.where(self.sea[frames.region][:, None], degrees, np.nan).astype(np.float32)
        return restored

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Its arrays, and the rest, for JSON."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        settings = {"size": self.size, "boxes": self.boxes, "unit": self.unit, "standardise": self.standardise}
        return arrays, settings

    @classmethod
    def from_state(cls, arrays: Mapping[str, Array], settings: Mapping[str, Any]) -> SSTScaling:
        """The inverse of :meth:`state`."""
        boxes = tuple(Box(*box) for box in settings["boxes"])
        sea, climatology, mean, deviation = (np.asarray(arrays[name]) for name in _ARRAYS)
        return cls(
            settings["size"], boxes, sea, settings["unit"], climatology, settings["standardise"], mean, deviation
        )

    def _climatology(self, region: Array, slots: Array) -> Array:
        """For each window and frame, to be subtracted from (N, T, H, W)."""
        climatology: Array = self.climatology[region[:, None], slots]
        return climatology if climatology.ndim == 4 else climatology[..., None, None]


_ARRAYS = ("sea", "climatology", "mean", "deviation")


class SSTRegions:
    """Square regions of the temperature in a NetCDF file, split by years into training and testing.

    >>> regions = SSTRegions("thetao.nc")                                       # doctest: +SKIP
    >>> images, sea, frames = regions.windows("train")                          # doctest: +SKIP
    >>> degrees = regions.scaling.restore(model(images[:, :4]), frames[:, 4:])  # doctest: +SKIP

    The axes are found by what CF conventions say of them (standard name, axis, units) or by common names; a vertical
    axis may be there too. A pixel is land if more than half of its values are missing. A frame in which a pixel of the
    sea is missing is no part of any window of that region.

    Args:
        source: path of a NetCDF file, or a Dataset or DataArray of xarray, for what is spread over several files or
            named in a way of its own.
        variable: name of the temperature; needed if it cannot be told.
        size: pixels on each side of a region.
        stride: from one region to the next, by default ``size``.
        boxes: first row and column of each region, in the place of all that fit in the file at that stride.
        max_land: regions with a larger part of land than this are left out; those that ``boxes`` asks for are kept.
        depth: index into the vertical axis, if there is one. 0 is the first, the surface in most files.
        missing_value: stands for a missing value in the file, for files that do not say so themselves.
        climatology: what is subtracted: the mean of each calendar ``"day"`` or ``"month"``, or ``"none"``. ``"auto"``
            takes days if frames are at most a day and a half apart and months if not.
        level: whether the climatology is one number for each ``"region"``, as published, which leaves the fronts and
            gradients that currents move as they are, or one for each ``"pixel"``.
        standardise: by the mean and the deviation of each ``"region"`` in the training years, or of each ``"image"`` by
            itself, as the published program does.
        train, validation, test: first and last year of each split; ``validation`` may be None.
        inputs, horizon: a window is that many frames to begin with and that many to forecast. A gap in time breaks
            windows, and a window belongs to a split only with all of its frames.
        scaling: that of another file with the same grid, for example the one that a model was trained on. Then
            ``size``, ``stride``, ``boxes``, ``max_land``, ``climatology``, ``level`` and ``standardise`` are its own.

    Attributes:
        scaling: boxes, land, climatology and deviations, a :class:`SSTScaling`.
        times: of all frames, shape (T,).
        variable, units: of the temperature.
        coordinates: names and values of latitude and longitude (or of what the file has for them), each of a region by
            its number: ``coordinates["lat"][region]``.

    Raises:
        InputError: if the file or an argument cannot be used. A :class:`ValueError`.
        ModuleNotFoundError: without the extra ``netcdf``.
    """

    def __init__(
        self,
        source: Any,
        *,
        variable: str | None = None,
        size: int = 64,
        stride: int | None = None,
        boxes: Sequence[tuple[int, int]] | None = None,
        max_land: float = 0.1,
        depth: int = 0,
        missing_value: float | None = None,
        climatology: str = "auto",
        level: str = "region",
        standardise: str = "region",
        train: Years = (2006, 2015),
        validation: Years | None = None,
        test: Years = (2016, 2017),
        inputs: int = 4,
        horizon: int = 6,
        scaling: SSTScaling | None = None,
    ) -> None:
        _check_choice("climatology", climatology, CLIMATOLOGIES)
        _check_choice("level", level, LEVELS)
        _check_choice("standardise", standardise, STANDARDISE)
        for name, count in (("size", size), ("stride", stride or size), ("inputs", inputs), ("horizon", horizon)):
            _check_count(name, count)
        if not 0 <= max_land < 1:
            raise InputError(f"max_land must be at least 0 and less than 1, got {max_land!r}")
        self.splits = _check_years({"train": train, "validation": validation, "test": test})
        self.inputs, self.horizon = inputs, horizon
        with _Grid.open(source, variable, depth, missing_value) as grid:
            self.variable, self.units, self._attributes = grid.variable, grid.units, grid.attributes
            self.times = grid.times
            land = grid.missing_share() > 0.5
            if scaling is None:
                chosen = _boxes(land, size, stride or size, boxes, max_land)
                sea = np.stack([~land[_window(box, size)] for box in chosen])
            else:
                size, chosen, sea = scaling.size, _inside(scaling.boxes, scaling.size, land.shape), scaling.sea
            self._degrees = grid.read(chosen, size)
            self.coordinates = {name: [c.of(box, size) for box in chosen] for name, c in grid.coordinates.items()}
            self._coordinates = grid.coordinates
            self._dims = grid.dims
        self._complete = np.stack(
            [np.isfinite(d[:, s]).all(1) for d, s in zip(self._degrees, sea, strict=True)]
        )  # (R, T)
        gaps = _days(self.times)
        self._step = float(np.median(gaps)) if len(gaps) else 1.0
        self._breaks = gaps > 1.5 * self._step
        self._years = np.asarray([_date(time)[0] for time in self.times])
        if scaling is None:
            if climatology == "auto":
                climatology = "day" if self._step <= 1.5 else "month"
            scaling = self._fit(size, chosen, sea, climatology, level, standardise)
        self.scaling = scaling

    def __len__(self) -> int:
        """The number of regions."""
        return len(self.scaling.boxes)

    def starts(self, split: str, *, stride: int = 1) -> tuple[Array, Array]:
        """The windows of a split, for :meth:`gather`.

        Args:
            split: ``"train"``, ``"validation"``, ``"test"``, or ``"all"`` for whatever the year.
            stride: takes one of so many windows that follow each other.

        Returns:
            The number of each window's region and of its first frame, shape (N,), int64.
        """
        _check_choice("split", split, (*SPLITS, "all"))
        _check_count("stride", stride)
        length = self.inputs + self.horizon
        usable = self._complete
        if split != "all":
            years = self.splits[split]
            if years is None:
                raise InputError(f"SSTRegions was given no years for {split}, such as {split}=(2014, 2015)")
            usable = usable & (self._years >= years[0]) & (self._years <= years[1])
        n_times = len(self.times)
        if n_times < length:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        good: Any = np.lib.stride_tricks.sliding_window_view(usable, length, axis=1).all(2)
        if length > 1:
            good = good & ~np.lib.stride_tricks.sliding_window_view(self._breaks, length - 1).any(1)
        good[:, np.arange(good.shape[1]) % stride != 0] = False
        region, start = np.nonzero(good)
        return region.astype(np.int64), start.astype(np.int64)

    def gather(self, region: Array, start: Array) -> tuple[Tensor, Tensor, SSTFrames]:
        """The windows of these regions from these frames on: what :meth:`windows` gives, for some of them.

        With many regions and years all windows together take ten times the memory of the file; this gives a batch.
        """
        return self._frames(region, start, self.inputs + self.horizon)

    def windows(self, split: str, *, stride: int = 1) -> tuple[Tensor, Tensor, SSTFrames]:
        """All windows of a split.

        Args:
            split, stride: as in :meth:`starts`.

        Returns:
            Normalised images, shape (N, inputs + horizon, size, size), float32, 0 on land; where there is sea, shape
            (N, size, size), bool; and where the frames are from.

        Raises:
            InputError: if there are none.
        """
        region, start = self.starts(split, stride=stride)
        if len(region) == 0:
            years = "" if split == "all" else f" in the years {self.splits[split]}"
            raise InputError(
                f"no {self.inputs + self.horizon} frames without a gap for {split}{years}; "
                f"the file goes from {_text(self.times[0])} to {_text(self.times[-1])}"
            )
        return self.gather(region, start)

    def latest(self, last: int = -1) -> tuple[Tensor, Tensor, SSTFrames]:
        """The inputs of a forecast, for every region whose frames are there.

        Args:
            last: number of the last input frame in the file; -1 is the file's last.

        Returns:
            Normalised images, shape (N, inputs, size, size), and the sea, shape (N, size, size). And the frames of the
            inputs *and* of the forecast, shape (N, inputs + horizon): ``frames[:, inputs:]`` has the times that follow
            and restores the forecast. With ``standardise="image"`` it is restored by the last input's mean and
            deviation, since its own are not known.

        Raises:
            InputError: if there is no such frame, or no region without a gap before it.
        """
        n_times = len(self.times)
        if not -n_times <= last < n_times:
            raise InputError(f"last must be one of the {n_times} frames of the file, got {last}")
        start = last % n_times - self.inputs + 1
        if start < 0 or self._breaks[start : start + self.inputs - 1].any():
            raise InputError(f"there are no {self.inputs} frames without a gap up to {_text(self.times[last])}")
        region = np.flatnonzero(self._complete[:, start : start + self.inputs].all(1))
        if len(region) == 0:
            raise InputError(f"values of the sea are missing in every region up to {_text(self.times[last])}")
        images, sea, known = self._frames(region, np.full_like(region, start), self.inputs)
        future = self._following(self.times[last])
        times = np.concatenate([known.times, np.broadcast_to(future, (len(region), self.horizon))], 1)
        kept = [np.concatenate([x, np.repeat(x[:, -1:], self.horizon, 1)], 1) for x in (known.mean, known.deviation)]
        return images, sea, SSTFrames(region, times, _slots(times, self.scaling.unit), *kept)

    def dataset(self, degrees: npt.ArrayLike, frames: SSTFrames, *, name: str | None = None) -> Any:
        """Temperatures as a Dataset of xarray with the file's coordinates, to be written by its ``to_netcdf``.

        Args:
            degrees: as :meth:`SSTScaling.restore` gives them, shape (N, T, H, W), NaN on land.
            frames: of the same N and T.
            name: of the variable, by default that of the file.

        Returns:
            For one window a variable of (time, y, x), named as in the file; for several one of (window, step, y, x)
            with times and coordinates for each window.
        """
        xarray = _xarray()
        array = np.asarray(degrees, dtype=np.float32)
        expected = (*frames.slots.shape, self.scaling.size, self.scaling.size)
        if array.shape != expected:
            raise InputError(f"degrees must have shape {expected}, that of the frames, got {array.shape}")
        dims: tuple[str, ...] = ("window", "step", "y", "x")
        time, times = "time", frames.times
        if len(frames) == 1:
            dims, time, array, times = self._dims, self._dims[0], array[0], times[0]
        window = dims[:-3]
        rename = dict(zip(self._dims[1:], dims[-2:], strict=True))
        coordinates: dict[str, Any] = {time: (dims[:-2], times, {"standard_name": "time"})}
        for key, coordinate in self._coordinates.items():
            own = np.stack([self.coordinates[key][region] for region in frames.region])
            values = own if window else own[0]
            coordinates[key] = ((*window, *(rename[dim] for dim in coordinate.dims)), values, coordinate.attributes)
        data = (dims, array, self._attributes)
        return xarray.Dataset({name or self.variable: data}, coordinates, {"Conventions": "CF-1.8"})

    def describe(self) -> dict[str, Any]:
        """What was read and how it was split, for JSON."""
        return {
            "variable": self.variable,
            "units": self.units,
            "size": self.scaling.size,
            "regions": [list(box) for box in self.scaling.boxes],
            "climatology": self.scaling.unit,
            "level": "pixel" if self.scaling.climatology.ndim == 4 else "region",
            "standardise": self.scaling.standardise,
            "first": _text(self.times[0]),
            "last": _text(self.times[-1]),
            "frames": len(self.times),
            "years": dict(self.splits),
            "windows": {split: len(self.starts(split)[0]) for split, years in self.splits.items() if years},
        }

    def _frames(self, region: Array, start: Array, length: int) -> tuple[Tensor, Tensor, SSTFrames]:
        region, index = np.asarray(region), np.asarray(start)[:, None] + np.arange(length)
        degrees = self._degrees[region[:, None], index]
        values, frames = self.scaling.normalise(degrees, region, self.times[index])
        return torch.from_numpy(values), torch.from_numpy(self.scaling.sea[region]), frames

    def _following(self, time: Any) -> Array:
        """The times of the forecast that follows a frame."""
        steps = range(1, self.horizon + 1)
        if self._step < 27:  # days
            one = np.median(np.diff(self.times))
            return np.asarray([time + step * one for step in steps])
        months = max(1, round(self._step / 30.4))
        return np.asarray([_months_later(time, step * months) for step in steps])

    def _fit(
        self, size: int, boxes: tuple[Box, ...], sea: Array, unit: str, level: str, standardise: str
    ) -> SSTScaling:
        """Climatology, means and deviations of the training years."""
        first, last = self.splits["train"] or (0, 0)
        training = (self._years >= first) & (self._years <= last)
        slots = _slots(self.times, unit)
        climatologies, means, deviations = [], [], []
        for degrees, complete, here in zip(self._degrees, self._complete, sea, strict=True):
            used = training & complete
            if not used.any():
                raise InputError(
                    f"no frame of the training years {first} to {last} in a region; the file goes from "
                    f"{_text(self.times[0])} to {_text(self.times[-1])}: choose others by train=(first, last)"
                )
            values = degrees[used][:, here].astype(np.float64)
            climatology = _climatology(values if level == "pixel" else values.mean(1, keepdims=True), slots[used], unit)
            rest = values - climatology[slots[used]]
            means.append(rest.mean())
            deviations.append(_not_zero(rest.std()))
            if level == "pixel":
                full = np.zeros((SLOTS[unit], size, size))
                full[:, here] = climatology
                climatologies.append(full)
            else:
                climatologies.append(climatology[:, 0])
        arrays = (np.asarray(x, dtype=np.float32) for x in (np.stack(climatologies), means, deviations))
        climatology, mean, deviation = arrays
        return SSTScaling(size, boxes, sea, unit, climatology, standardise, mean, deviation)


class _Coordinate(NamedTuple):
    """Latitude or longitude, on one axis or on both."""

    dims: tuple[str, ...]
    values: Array
    attributes: dict[str, Any]
    spatial: tuple[str, str]

    def of(self, box: Box, size: int) -> Array:
        corner = dict(zip(self.spatial, box, strict=True))
        part: Array = self.values[tuple(slice(corner[dim], corner[dim] + size) for dim in self.dims)]
        return part


@dataclass
class _Grid:
    """The temperature in a file, read by blocks of frames."""

    array: Any
    dims: tuple[str, str, str]
    times: Array
    missing_value: float | None
    close: Any

    @classmethod
    def open(cls, source: Any, variable: str | None, depth: int, missing_value: float | None) -> _Grid:
        xarray = _xarray()
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

    def __enter__(self) -> _Grid:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def variable(self) -> str:
        return str(self.array.name)

    @property
    def units(self) -> str:
        return str(self.array.attrs.get("units", ""))

    @property
    def attributes(self) -> dict[str, Any]:
        """What still holds for other values of the same kind."""
        keep = ("units", "standard_name", "long_name")
        return {key: self.array.attrs[key] for key in keep if key in self.array.attrs}

    @property
    def coordinates(self) -> dict[str, _Coordinate]:
        found = {}
        for name, values in self.array.coords.items():
            if values.ndim and set(values.dims) <= set(self.dims[1:]):
                found[str(name)] = _Coordinate(values.dims, values.values, dict(values.attrs), self.dims[1:])
        return found

    def missing_share(self) -> Array:
        """How often each pixel is missing, shape (rows, columns)."""
        total: Any = 0
        for _, block in self._blocks():
            total = total + (~np.isfinite(block)).sum(0)
        share: Array = total / len(self.times)
        return share

    def read(self, boxes: Sequence[Box], size: int) -> Array:
        """Regions, shape (R, T, size, size), float32."""
        out = np.empty((len(boxes), len(self.times), size, size), dtype=np.float32)
        for start, block in self._blocks():
            for region, box in zip(out, boxes, strict=True):
                region[start : start + len(block)] = block[:, *_window(box, size)]
        return out

    def _blocks(self) -> Any:
        """Blocks of frames and the number of their first, (frames, rows, columns), float32."""
        time = self.dims[0]
        for start in range(0, len(self.times), BLOCK):
            block = self.array.isel({time: slice(start, start + BLOCK)}).load().transpose(*self.dims)
            values = np.array(block.values, dtype=np.float32)
            if self.missing_value is not None:
                values[values == np.float32(self.missing_value)] = np.nan
            yield start, values


def _xarray() -> Any:
    return require("xarray", "xarray", "netcdf", "pykernels.data.sst")


def _open(xarray: Any, path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    with path.open("rb") as file:
        classic = file.read(3) == b"CDF"
    engine = "scipy" if classic else "h5netcdf"
    require(engine, engine, "netcdf", "pykernels.data.sst")
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
    if len(times) > 1 and not (_days(times) > 0).all():
        raise InputError(f"the times of {where} must increase")
    return times


def _days(times: Array) -> Array:
    """The time between frames in days."""
    gaps = np.diff(times)
    if times.dtype.kind == "M":
        days: Array = gaps / np.timedelta64(1, "D")
        return days
    return np.asarray([gap.total_seconds() / 86400 for gap in gaps])


def _date(time: Any) -> tuple[int, int, int]:
    """Year, month and day."""
    if isinstance(time, np.datetime64):
        year, month, day = str(time.astype("datetime64[D]")).split("-")
        return int(year), int(month), int(day)
    return time.year, time.month, time.day


def _text(time: Any) -> str:
    return "{:04d}-{:02d}-{:02d}".format(*_date(time))


def _months_later(time: Any, months: int) -> Any:
    """The same day of a later month, or the last one of a month that has no such day."""
    year, month, day = _date(time)
    year, month = year + (month - 1 + months) // 12, (month - 1 + months) % 12 + 1
    if isinstance(time, np.datetime64):
        day = min(day, calendar.monthrange(year, month)[1])
        moment = time - time.astype("datetime64[D]")  # of the day
        return np.datetime64(f"{year:04d}-{month:02d}-{day:02d}") + moment
    first = time.replace(year=year, month=month, day=1)
    return first.replace(day=min(day, first.daysinmonth))


def _slots(times: Array, unit: str) -> Array:
    """The calendar day, month or nothing of each time."""
    if unit == "none":
        return np.zeros(times.shape, dtype=np.int64)
    if times.dtype.kind == "M":
        months, days = times.astype("datetime64[M]"), times.astype("datetime64[D]")
        month, day = months.astype(np.int64) % 12, (days - months).astype(np.int64)
    else:
        dates = np.asarray([_date(time) for time in times.ravel()], dtype=np.int64).reshape(*times.shape, 3)
        month, day = dates[..., 1] - 1, dates[..., 2] - 1
    slots: Array = month if unit == "month" else 31 * month + day
    return slots


def _climatology(values: Array, slots: Array, unit: str) -> Array:
    """Means by slot, shape (slots, P), of values (T, P). A slot without values takes those of the nearest with some."""
    n_slots = SLOTS[unit]
    filled = np.unique(slots)
    means = np.stack([values[slots == slot].mean(0) for slot in filled])
    distance = np.abs(np.arange(n_slots)[:, None] - filled)
    nearest = np.minimum(distance, n_slots - distance).argmin(1)
    climatology: Array = means[nearest]
    return climatology


def _window(box: Box, size: int) -> tuple[slice, slice]:
    return slice(box.row, box.row + size), slice(box.column, box.column + size)


def _boxes(
    land: Array, size: int, stride: int, boxes: Sequence[tuple[int, int]] | None, max_land: float
) -> tuple[Box, ...]:
    """The regions: those asked for, or all on the grid of the stride without much land."""
    rows, columns = land.shape
    if boxes is not None:
        asked = _inside([Box(*map(int, box)) for box in boxes], size, land.shape)
        for box in asked:
            if land[_window(box, size)].all():
                raise InputError(f"boxes: there is no sea in the region at {tuple(box)}")
        return asked
    if size > min(rows, columns):
        raise InputError(f"size must be at most {min(rows, columns)} for a grid of {rows} by {columns}, got {size}")
    grid = [Box(r, c) for r in range(0, rows - size + 1, stride) for c in range(0, columns - size + 1, stride)]
    shares = [land[_window(box, size)].mean() for box in grid]
    chosen = tuple(box for box, share in zip(grid, shares, strict=True) if share <= max_land)
    if not chosen:
        raise InputError(
            f"no region of {size} by {size} has at most {max_land:.0%} of land, the best has {min(shares):.0%}: "
            "choose a smaller size, another stride or a larger max_land"
        )
    return chosen


def _inside(boxes: Sequence[Box], size: int, shape: tuple[int, ...]) -> tuple[Box, ...]:
    if not boxes:
        raise InputError("boxes must name a region at least")
    for row, column in boxes:
        if not (0 <= row <= shape[0] - size and 0 <= column <= shape[1] - size):
            raise InputError(
                f"the region of {size} by {size} at {(row, column)} is not within the grid of {shape[0]} by {shape[1]}"
            )
    return tuple(boxes)


def _not_zero(deviation: Any) -> Any:
    """The deviation, or 1 where all values are the same."""
    return np.where(deviation > 0, deviation, 1)


def _check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be an integer of at least 1, got {value!r}")


def _check_years(splits: dict[str, Years | None]) -> dict[str, Years | None]:
    given = {name: years for name, years in splits.items() if years is not None}
    for name, years in given.items():
        if len(years) != 2 or not all(isinstance(year, int) for year in years) or years[0] > years[1]:
            raise InputError(f"{name} must be the first and the last year, got {years!r}")
    ordered = sorted(given.items(), key=lambda item: item[1])
    for (name, years), (other, later) in itertools.pairwise(ordered):
        if later[0] <= years[1]:
            raise InputError(f"the years of {name} and {other} must not overlap, got {years} and {later}")
    return splits
