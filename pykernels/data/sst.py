"""Sea-surface temperature from NetCDF files: square regions, windows of consecutive frames, and back to degrees.

    normalised = (temperature - climatology[calendar day or month] - mean) / deviation

Climatology, mean and deviation are those of the training years, region by region. Land and missing pixels become 0.
Needs xarray and h5netcdf, the extra ``netcdf``.

The protocol is that of de Bezenac, Pajot and Gallinari, "Deep learning for physical processes: incorporating prior
scientific knowledge", ICLR 2018: regions of 64 by 64 pixels, the years 2006 to 2015 for training and 2016 and 2017 for
testing, four frames in and six to forecast. Their program normalises every image by itself (``standardise="image"``).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykernels._errors import InputError
from pykernels.data._netcdf import Grid, date, days_between, import_xarray, months_later, square, text

Array: TypeAlias = npt.NDArray[Any]
Years: TypeAlias = tuple[int, int]

SPLITS = ("train", "validation", "test")
CLIMATOLOGIES = ("auto", "day", "month", "none")
LEVELS = ("region", "pixel")
STANDARDISE = ("region", "image")
# Slots of a year. Days are counted as if every month had 31, so that they are the same in all years and calendars.
SLOTS = {"day": 12 * 31, "month": 12, "none": 1}


class Box(NamedTuple):
    """The first row and column of a square region in the file."""

    row: int
    column: int


@dataclass(frozen=True)
class SSTFrames:
    """Where the frames of N windows of T frames come from, and how they were normalised.

    ``frames[windows]`` and ``frames[windows, times]``, with slices or arrays of indices, are a part of it:
    ``frames[:, 4:]`` are the frames that follow four inputs.

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
        splits: first and last year by the name of the split.
        inputs, horizon: as given.
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
        with Grid.open(source, variable, depth, missing_value) as grid:
            self.variable, self.units, self._attributes = grid.variable, grid.units, grid.attributes
            self.times = grid.times
            if scaling is None:
                land = grid.missing_share() > 0.5
                chosen = _boxes(land, size, stride or size, boxes, max_land)
                sea = np.stack([~land[square(box, size)] for box in chosen])
            else:
                size, chosen, sea = scaling.size, _inside(scaling.boxes, scaling.size, grid.shape), scaling.sea
            self._degrees = grid.read(chosen, size)
            self.coordinates = {name: [c.of(box, size) for box in chosen] for name, c in grid.coordinates.items()}
            self._coordinates = grid.coordinates
            self._dims = grid.dims
        self._complete = np.stack(
            [np.isfinite(d[:, s]).all(1) for d, s in zip(self._degrees, sea, strict=True)]
        )  # (R, T)
        gaps = days_between(self.times)
        self._step = float(np.median(gaps)) if len(gaps) else 1.0
        self._breaks = gaps > 1.5 * self._step
        self._years = np.asarray([date(time)[0] for time in self.times])
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
                f"the file goes from {text(self.times[0])} to {text(self.times[-1])}"
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
            raise InputError(f"there are no {self.inputs} frames without a gap up to {text(self.times[last])}")
        region = np.flatnonzero(self._complete[:, start : start + self.inputs].all(1))
        if len(region) == 0:
            raise InputError(f"values of the sea are missing in every region up to {text(self.times[last])}")
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
        xarray = import_xarray()
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
            "first": text(self.times[0]),
            "last": text(self.times[-1]),
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
            gaps = np.sort(np.diff(self.times))
            return np.asarray([time + step * gaps[len(gaps) // 2] for step in steps])
        months = max(1, round(self._step / 30.4))
        return np.asarray([months_later(time, step * months) for step in steps])

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
                    f"{text(self.times[0])} to {text(self.times[-1])}: choose others by train=(first, last)"
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


def _slots(times: Array, unit: str) -> Array:
    """The calendar day, month or nothing of each time."""
    if unit == "none":
        return np.zeros(times.shape, dtype=np.int64)
    if times.dtype.kind == "M":
        months, days = times.astype("datetime64[M]"), times.astype("datetime64[D]")
        month, day = months.astype(np.int64) % 12, (days - months).astype(np.int64)
    else:
        dates = np.asarray([date(time) for time in times.ravel()], dtype=np.int64).reshape(*times.shape, 3)
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


def _boxes(
    land: Array, size: int, stride: int, boxes: Sequence[tuple[int, int]] | None, max_land: float
) -> tuple[Box, ...]:
    """The regions: those asked for, or all on the grid of the stride without much land."""
    rows, columns = land.shape
    if boxes is not None:
        asked = _inside([Box(*map(int, box)) for box in boxes], size, land.shape)
        for box in asked:
            if land[square(box, size)].all():
                raise InputError(f"boxes: there is no sea in the region at {tuple(box)}")
        return asked
    if size > min(rows, columns):
        raise InputError(f"size must be at most {min(rows, columns)} for a grid of {rows} by {columns}, got {size}")
    grid = [Box(r, c) for r in range(0, rows - size + 1, stride) for c in range(0, columns - size + 1, stride)]
    shares = [land[square(box, size)].mean() for box in grid]
    chosen = tuple(box for box, share in zip(grid, shares, strict=True) if share <= max_land)
    if not chosen:
        raise InputError(
            f"no region of {size} by {size} has at most {max_land:.0%} of land, the best has {min(shares):.0%}: "
            "choose a smaller size, another stride or a larger max_land"
        )
    return chosen


def _inside(boxes: Sequence[Box], size: int, shape: tuple[int, ...]) -> tuple[Box, ...]:
    if not boxes:
        raise InputError("boxes must name at least one region")
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
