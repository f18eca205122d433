"""Sea-surface temperature from files that the tests write, and from a real one where it is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pykernels.data.sst import Box, SSTRegions, SSTScaling

xr = pytest.importorskip("xarray")
pytest.importorskip("h5netcdf")

DAYS = np.arange("2014-01-01", "2018-01-01", dtype="datetime64[D]").astype("datetime64[ns]")
MONTHS = np.arange("2006-01", "2018-01", dtype="datetime64[M]").astype("datetime64[ns]")
SMALL = {"size": 4, "max_land": 0.5, "train": (2014, 2015), "test": (2016, 2017), "inputs": 2, "horizon": 3}
MONTHLY = {**SMALL, "train": (2006, 2015)}


def temperatures(times: np.ndarray, rows: int = 8, columns: int = 12, seed: int = 0) -> np.ndarray:
    """A season, a gradient and noise."""
    phase = 2 * np.pi * np.arange(len(times)) / (365.25 if len(times) > 500 else 12)
    noise = np.random.default_rng(seed).standard_normal((len(times), rows, columns))
    gradient = np.linspace(0, 5, rows)[:, None] + np.linspace(0, 2, columns)
    return (15 + 6 * np.cos(phase)[:, None, None] + gradient + 0.5 * noise).astype(np.float32)


def dataset(values: np.ndarray, times: np.ndarray, name: str = "sst", **attributes: str) -> "xr.Dataset":
    rows, columns = values.shape[1:]
    return xr.Dataset(
        {name: (("time", "lat", "lon"), values, {"units": "degC", **attributes})},
        {
            "time": times,
            "lat": ("lat", 60 - 0.5 * np.arange(rows), {"units": "degrees_north"}),  # from north to south
            "lon": ("lon", -30 + 0.5 * np.arange(columns), {"units": "degrees_east"}),
        },
    )


@pytest.fixture(scope="module")
def days() -> np.ndarray:
    return temperatures(DAYS)


@pytest.fixture
def write(tmp_path):
    def write_to_file(data: "xr.Dataset", name: str = "sst.nc", **encoding: dict) -> Path:
        path = tmp_path / name
        data.to_netcdf(path, engine="h5netcdf", encoding=encoding)
        return path

    return write_to_file


def test_windows_of_daily_data(write, days):
    regions = SSTRegions(write(dataset(days, DAYS)), **SMALL)
    assert regions.scaling.unit == "day"
    assert regions.scaling.boxes == tuple(Box(r, c) for r in (0, 4) for c in (0, 4, 8))
    assert (regions.variable, regions.units, len(regions)) == ("sst", "degC", 6)
    images, sea, frames = regions.windows("train")
    per_region = 2 * 365 - 4
    assert images.shape == (6 * per_region, 5, 4, 4)
    assert (images.dtype, sea.dtype, frames.region.dtype) == (torch.float32, torch.bool, np.int64)
    assert sea.shape == (6 * per_region, 4, 4)
    assert sea.all()
    assert frames.region.tolist() == np.repeat(np.arange(6), per_region).tolist()
    assert frames.times[0].tolist() == DAYS[:5].tolist()
    assert frames.times[per_region - 1].tolist() == DAYS[725:730].tolist()
    test = regions.windows("test")[2]
    assert len(test) == 6 * (366 + 365 - 4)
    assert test.times.min() == DAYS[730]
    assert test.times.max() == DAYS[-1]


@pytest.mark.parametrize("level", ["region", "pixel"])
def test_normalisation_is_that_of_the_training_years(write, days, level):
    changed = days.copy()
    changed[730:] += 100
    regions = SSTRegions(write(dataset(changed, DAYS)), level=level, boxes=[(2, 5)], **SMALL)
    own = days[:730, 2:6, 5:9].astype(np.float64)
    day_means = own.reshape(2, 365, 4, 4).mean(0)
    if level == "region":
        day_means = day_means.mean((1, 2), keepdims=True)
    rest = (own.reshape(2, 365, 4, 4) - day_means).reshape(730, 4, 4)
    expected = (rest - rest.mean()) / rest.std()
    images, _, frames = regions.windows("train")
    np.testing.assert_allclose(images[:, 0], expected[:-4], atol=2e-5)
    np.testing.assert_allclose(images[-1], expected[-5:], atol=2e-5)
    np.testing.assert_allclose(regions.scaling.restore(images, frames)[10], own[10:15], atol=1e-5)
    images, _, frames = regions.windows("test")
    assert images.min() > 10
    np.testing.assert_allclose(regions.scaling.restore(images, frames)[:, 2], changed[732:-2, 2:6, 5:9], atol=5e-5)


def test_leap_days_without_climatology_take_the_day_before(write, days):
    scaling = SSTRegions(write(dataset(days, DAYS)), **SMALL).scaling  # no leap year among 2014 and 2015
    times = np.array([["2016-02-28", "2016-02-29", "2016-03-01"]], dtype="datetime64[ns]")
    _, frames = scaling.normalise(np.zeros((1, 3, 4, 4)), [0], times)
    offset = scaling.climatology[0, frames.slots[0]]
    assert offset[0] == offset[1] != offset[2]


def test_monthly_data(write):
    values = temperatures(MONTHS)
    regions = SSTRegions(write(dataset(values, MONTHS)), boxes=[(0, 0)], **MONTHLY)
    assert regions.scaling.unit == "month"
    means = values[:120, :4, :4].astype(np.float64).reshape(10, 12, 4, 4).mean((0, 2, 3))
    np.testing.assert_allclose(regions.scaling.climatology, means[None], rtol=1e-6)
    assert regions.windows("train")[0].shape[0] == 120 - 4
    plain = SSTRegions(write(dataset(values, MONTHS)), boxes=[(0, 0)], climatology="none", **MONTHLY).scaling
    assert (plain.unit, plain.climatology.shape) == ("none", (1, 1))
    everything = values[:120, :4, :4].astype(np.float64)
    np.testing.assert_allclose(plain.climatology[0] + plain.mean, everything.mean(), rtol=1e-6)
    np.testing.assert_allclose(plain.deviation, everything.std(), rtol=1e-5)


def test_every_image_by_itself(write):
    values = temperatures(MONTHS)
    values[:, 0, :2] = np.nan
    regions = SSTRegions(write(dataset(values, MONTHS)), boxes=[(0, 0)], standardise="image", **MONTHLY)
    images, sea, frames = regions.windows("test")
    seen = images[:, :, sea[0]].double()
    torch.testing.assert_close(seen.mean(-1), torch.zeros_like(seen[..., 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(seen.std(-1, correction=0), torch.ones_like(seen[..., 0]), rtol=0, atol=1e-5)
    restored = regions.scaling.restore(images[:, 2:], frames[:, 2:])
    np.testing.assert_allclose(restored[0], values[122:125, :4, :4], atol=1e-5)
    latest, _, frames = regions.latest()
    assert frames.deviation.shape == (1, 5)
    assert (frames.deviation[0, 2:] == frames.deviation[0, 1]).all()
    restored = regions.scaling.restore(latest[:, -1:], frames[:, 4:])  # by the last input's, in another month
    season = regions.scaling.climatology[0]
    np.testing.assert_allclose(restored[0, 0] - season[2], values[-1, :4, :4] - season[11], atol=1e-5)


@pytest.mark.parametrize("how", ["nan", "fill", "two fill values", "undeclared", "packed"])
def test_land(write, how):
    values = temperatures(MONTHS)
    land = np.zeros((8, 12), dtype=bool)
    land[:4, :4] = True  # all of the first region
    land[0, 4:7] = True  # 3 of 16 pixels of the second
    values[:, land] = np.nan
    data, encoding, options = dataset(values, MONTHS), {}, {}
    if how == "fill":
        encoding = {"sst": {"_FillValue": np.float32(-999)}}
    elif how == "two fill values":
        data = dataset(np.where(land, np.float32(-999), values), MONTHS)
        data["sst"][0, 0, 0] = 1e20
        data["sst"].attrs |= {"missing_value": np.float32(-999)}
        encoding = {"sst": {"_FillValue": np.float32(1e20)}}
    elif how == "undeclared":
        data, options = dataset(np.where(land, np.float32(-999), values), MONTHS), {"missing_value": -999}
    elif how == "packed":
        encoding = {"sst": {"dtype": "int16", "scale_factor": 0.01, "add_offset": 10.0, "_FillValue": -32767}}
    regions = SSTRegions(write(data, **encoding), **MONTHLY, **options)
    assert regions.scaling.boxes[:2] == ((0, 4), (0, 8))
    images, sea, frames = regions.windows("test")
    assert (~sea[0]).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    assert (images[0, :, 0, :3] == 0).all()
    assert (images[0, :, sea[0]] != 0).all()
    degrees = regions.scaling.restore(images, frames)
    np.testing.assert_allclose(degrees[0], values[120:125, :4, 4:8], atol=0.006 if how == "packed" else 1e-5)
    assert np.isnan(degrees[0, :, 0, :3]).all()
    bare = {**MONTHLY, "max_land": 0.1}
    assert SSTRegions(write(data, **encoding), **bare, **options).scaling.boxes[0] == (0, 8)


def test_gaps_in_time_break_windows(write, days):
    kept = np.r_[0:100, 103:200, 730:900]
    regions = SSTRegions(write(dataset(days[kept], DAYS[kept])), boxes=[(0, 0)], **SMALL)
    times = regions.windows("train")[2].times
    assert len(times) == (100 - 4) + (97 - 4)
    assert (np.diff(times, axis=1) == np.timedelta64(1, "D")).all()
    assert len(regions.windows("train", stride=10)[2]) == 10 + 10  # from 0 to 90 and from 100 to 190
    short = SSTRegions(write(dataset(days[kept], DAYS[kept]), "b.nc"), boxes=[(0, 0)], **{**SMALL, "horizon": 99})
    with pytest.raises(ValueError, match=r"no 101 frames without a gap for train in the years \(2014, 2015\);"):
        short.windows("train")


def test_missing_months_break_windows(write):
    kept = np.delete(np.arange(len(MONTHS)), 30)
    regions = SSTRegions(write(dataset(temperatures(MONTHS)[kept], MONTHS[kept])), boxes=[(0, 0)], **MONTHLY)
    assert len(regions.windows("train")[2]) == (30 - 4) + (89 - 4)


def test_frames_with_missing_values_of_the_sea_are_left_out(write, days):
    values = days.copy()
    values[50, 1, 1] = np.nan  # in the first region
    regions = SSTRegions(write(dataset(values, DAYS)), boxes=[(0, 0), (0, 4)], **SMALL)
    images, sea, frames = regions.windows("train")
    assert sea.all()
    assert images.isfinite().all()
    assert np.bincount(frames.region).tolist() == [730 - 4 - 5, 730 - 4]
    assert DAYS[50] not in frames.times[frames.region == 0]


def test_a_window_is_in_one_split(write, days):
    options = {**SMALL, "train": (2014, 2014), "validation": (2015, 2015)}
    regions = SSTRegions(write(dataset(days, DAYS)), boxes=[(0, 0)], **options)
    lengths = {split: len(regions.windows(split)[2]) for split in ("train", "validation", "test", "all")}
    assert lengths == {"train": 361, "validation": 361, "test": 727, "all": 1457}
    years = regions.windows("validation")[2].times.astype("datetime64[Y]").astype(int) + 1970
    assert (years == 2015).all()
    assert regions.describe()["windows"] == {"train": 361, "validation": 361, "test": 727}
    json.dumps(regions.describe())


def test_batches_are_parts_of_all_windows(write, days):
    regions = SSTRegions(write(dataset(days, DAYS)), **SMALL)
    images, sea, frames = regions.windows("test")
    region, start = regions.starts("test")
    chosen = np.array([700, 3, 1500])
    some, some_sea, some_frames = regions.gather(region[chosen], start[chosen])
    assert torch.equal(some, images[chosen])
    assert torch.equal(some_sea, sea[chosen])
    for name in ("region", "times", "slots", "mean", "deviation"):
        np.testing.assert_array_equal(getattr(some_frames, name), getattr(frames[chosen], name))
    assert frames[chosen, 2:].times.tolist() == frames.times[chosen][:, 2:].tolist()
    assert len(frames[:7, 2:]) == 7


def test_depth_and_axes_of_length_one(write):
    values = temperatures(MONTHS)
    data = dataset(values, MONTHS, "thetao", standard_name="sea_water_potential_temperature")
    level = xr.DataArray([0.5, 10.0, 30.0], dims="depth", attrs={"positive": "down"})
    data["thetao"] = (data["thetao"] - 0.1 * level.assign_coords(depth=level)).expand_dims(member=[1])
    path = write(data.transpose("time", "member", "depth", "lat", "lon"))
    for depth, offset in ((0, 0.05), (-1, 3.0)):
        regions = SSTRegions(path, depth=depth, boxes=[(0, 0)], **MONTHLY)
        images, _, frames = regions.windows("test")
        np.testing.assert_allclose(
            regions.scaling.restore(images, frames)[0], values[120:125, :4, :4] - offset, atol=1e-4
        )
    with pytest.raises(ValueError, match="depth must be one of the 3 levels of 'depth', got 3"):
        SSTRegions(path, depth=3, **MONTHLY)


AXES = {
    "common names": ({"time": "t", "lat": "y", "lon": "x"}, False, {}),
    "other common names": ({"time": "time_counter", "lat": "nav_lat", "lon": "nav_lon"}, False, {}),
    "by their place": ({"time": "time", "lat": "rows", "lon": "columns"}, False, {}),
    "units": (
        {"time": "a", "lat": "b", "lon": "c"},
        True,
        {"b": {"units": "degrees_N"}, "c": {"units": "degree_east"}},
    ),
    "axis": ({"time": "a", "lat": "b", "lon": "c"}, True, {"b": {"axis": "Y"}, "c": {"axis": "X"}}),
    "standard name": (
        {"time": "a", "lat": "b", "lon": "c"},
        True,
        {"b": {"standard_name": "latitude"}, "c": {"standard_name": "longitude"}},
    ),
}


@pytest.mark.parametrize(("names", "coordinates", "attributes"), AXES.values(), ids=AXES)
def test_axes_are_found(write, names, coordinates, attributes):
    values = temperatures(MONTHS)
    data = dataset(values, MONTHS)
    data = data if coordinates else data.drop_vars(["lat", "lon"])
    data = data.rename({old: new for old, new in names.items() if old != new})
    for name in ("b", "c") if coordinates else ():
        data[name].attrs = attributes[name]
    data = data.transpose(names["lon"], names["time"], names["lat"]) if coordinates else data
    regions = SSTRegions(write(data), boxes=[(1, 6)], **MONTHLY)
    images, _, frames = regions.windows("test")
    degrees = regions.scaling.restore(images, frames)
    np.testing.assert_allclose(degrees[0], values[120:125, 1:5, 6:10], atol=1e-5)
    out = regions.dataset(degrees[:1], frames[:1])
    assert out["sst"].dims == (names["time"], names["lat"], names["lon"])


@pytest.mark.parametrize("calendar", ["noleap", "360_day"])
def test_other_calendars(write, calendar):
    pytest.importorskip("cftime")
    times = xr.date_range("2014-01-01", "2017-12-30", freq="D", calendar=calendar, use_cftime=True).values
    values = temperatures(times)
    path = write(dataset(values, times))
    regions = SSTRegions(path, boxes=[(0, 0)], **SMALL)
    assert regions.scaling.unit == "day"
    year = {"noleap": 365, "360_day": 360}[calendar]
    images, _, frames = regions.windows("test")
    assert len(frames) == len(times) - 2 * year - 4
    np.testing.assert_allclose(
        regions.scaling.restore(images, frames)[0], values[2 * year :][:5, :4, :4], rtol=0, atol=1e-5
    )
    latest, _, frames = regions.latest()
    assert frames.times[0, 2] == times[-1] + (times[1] - times[0])
    forecast = regions.dataset(regions.scaling.restore(latest, frames[:, 2:4]), frames[:, 2:4])
    with xr.open_dataset(write(forecast, "out.nc"), engine="h5netcdf") as back:
        assert back["time"].values.tolist() == frames.times[0, 2:4].tolist()
    monthly = xr.date_range("2006-01-30", periods=143, freq="ME", calendar=calendar, use_cftime=True).values
    regions = SSTRegions(write(dataset(temperatures(monthly), monthly), "m.nc"), boxes=[(0, 0)], **MONTHLY)
    assert regions.scaling.unit == "month"
    following = [(t.year, t.month) for t in regions.latest()[2].times[0, 2:]]
    assert following == [(2017, 12), (2018, 1), (2018, 2)]


def test_inputs_of_a_forecast(write, days):
    regions = SSTRegions(write(dataset(days, DAYS)), **SMALL)
    images, sea, frames = regions.latest()
    assert images.shape == (6, 2, 4, 4)
    assert sea.shape == (6, 4, 4)
    assert frames.times[0].astype("datetime64[D]").astype(str).tolist() == [
        "2017-12-30", "2017-12-31", "2018-01-01", "2018-01-02", "2018-01-03"
    ]  # fmt: skip
    known, _, window = regions.gather(np.array([4]), np.array([700]))
    images, _, frames = regions.latest(last=701)
    assert torch.equal(images[4], known[0, :2])
    for name in ("times", "slots", "mean", "deviation"):
        np.testing.assert_array_equal(getattr(frames, name)[4], getattr(window, name)[0])
    with pytest.raises(ValueError, match="last must be one of the 1461 frames of the file, got 1461"):
        regions.latest(last=1461)
    with pytest.raises(ValueError, match="no 2 frames without a gap up to 2014-01-01"):
        regions.latest(last=0)


def test_inputs_of_a_forecast_have_no_gap(write, days):
    values = days[:40].copy()
    values[38, :4, :4] = np.nan
    kept = np.r_[0:20, 25:40]
    regions = SSTRegions(write(dataset(values[kept], DAYS[kept])), **SMALL)
    assert regions.latest()[2].region.tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="no 2 frames without a gap up to 2014-01-26"):
        regions.latest(last=20)


def test_months_follow_each_other(write):
    regions = SSTRegions(write(dataset(temperatures(MONTHS)[:-1], MONTHS[:-1])), boxes=[(0, 0)], **MONTHLY)
    following = regions.latest()[2].times[0, 2:].astype("datetime64[D]").astype(str).tolist()
    assert following == ["2017-12-01", "2018-01-01", "2018-02-01"]
    ends = MONTHS[1:] - np.timedelta64(12, "h")
    regions = SSTRegions(write(dataset(temperatures(ends), ends), "ends.nc"), boxes=[(0, 0)], **MONTHLY)
    following = regions.latest(last=-10)[2].times[0, 2:].astype("datetime64[m]").astype(str).tolist()
    assert following == ["2017-03-28T12:00", "2017-04-28T12:00", "2017-05-28T12:00"]


def test_forecasts_are_written_with_their_coordinates(write, days):
    regions = SSTRegions(write(dataset(days, DAYS, standard_name="sea_surface_temperature")), **SMALL)
    assert regions.coordinates["lat"][4].tolist() == [58, 57.5, 57, 56.5]
    assert regions.coordinates["lon"][4].tolist() == [-28, -27.5, -27, -26.5]
    images, _, frames = regions.latest()
    degrees = regions.scaling.restore(images, frames[:, 2:4])
    one = write(regions.dataset(degrees[4:5], frames[4:5, 2:4]), "one.nc")
    with xr.open_dataset(one, engine="h5netcdf") as back:
        assert back["sst"].dims == ("time", "lat", "lon")
        assert back["lat"].values.tolist() == [58, 57.5, 57, 56.5]
        assert back["time"].values.tolist() == frames.times[0, 2:4].tolist()
        assert back["sst"].attrs == {"units": "degC", "standard_name": "sea_surface_temperature"}
        assert back["lat"].attrs == {"units": "degrees_north"}
        np.testing.assert_array_equal(back["sst"].values, degrees[4])
    several = write(regions.dataset(degrees, frames[:, 2:4], name="forecast"), "several.nc")
    with xr.open_dataset(several, engine="h5netcdf") as back:
        assert back["forecast"].dims == ("window", "step", "y", "x")
        assert back["lon"].dims == ("window", "x")
        assert back["lon"].values[4].tolist() == [-28, -27.5, -27, -26.5]
        assert back["time"].values[5].tolist() == frames.times[0, 2:4].tolist()
        np.testing.assert_array_equal(back["forecast"].values, degrees)
    with pytest.raises(ValueError, match=r"degrees must have shape \(6, 5, 4, 4\), that of the frames, got \(6, 2, 4"):
        regions.dataset(degrees, frames)


def test_coordinates_of_curved_grids(write):
    data = dataset(temperatures(MONTHS), MONTHS).drop_vars(["lat", "lon"]).rename(lat="j", lon="i")
    latitude = np.add.outer(np.arange(8.0), 0.1 * np.arange(12.0))
    data = data.assign_coords(nav_lat=(("j", "i"), latitude))
    regions = SSTRegions(write(data), boxes=[(2, 3), (4, 0)], **MONTHLY)
    np.testing.assert_array_equal(regions.coordinates["nav_lat"][0], latitude[2:6, 3:7])
    images, _, frames = regions.latest()
    out = regions.dataset(regions.scaling.restore(images, frames[:, 2:4]), frames[:, 2:4])
    assert out["nav_lat"].dims == ("window", "y", "x")
    np.testing.assert_array_equal(out["nav_lat"].values[1], latitude[4:, :4])


@pytest.mark.parametrize("level", ["region", "pixel"])
def test_scaling_goes_through_a_checkpoint_to_another_file(write, days, level):
    values = days.copy()
    values[:, 0, 0] = np.nan
    first = SSTRegions(write(dataset(values, DAYS)), boxes=[(0, 0), (3, 8)], level=level, **SMALL)
    arrays, settings = first.scaling.state()
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    loaded = {name: tensor.numpy() for name, tensor in tensors.items()}
    scaling = SSTScaling.from_state(loaded, json.loads(json.dumps(settings)))
    later = DAYS[-40:] + np.timedelta64(500, "D")
    second = SSTRegions(write(dataset(values[-40:], later), "later.nc"), scaling=scaling, inputs=2, horizon=3)
    images, sea, frames = second.latest()
    assert images.shape == (2, 2, 4, 4)
    assert not sea[0, 0, 0]
    np.testing.assert_allclose(scaling.restore(images, frames[:, :2])[1], values[-2:, 3:7, 8:], atol=1e-5)
    np.testing.assert_array_equal(scaling.climatology, first.scaling.climatology)
    assert len(second.windows("all")[2]) == 2 * 36
    with pytest.raises(ValueError, match=r"the region of 4 by 4 at \(3, 8\) is not within the grid of 6 by 12"):
        SSTRegions(dataset(values[-40:, :6], later), scaling=scaling)


def test_arrays_of_xarray_and_classic_files(tmp_path, write, days):
    pytest.importorskip("scipy")
    data = dataset(days, DAYS)
    expected = SSTRegions(write(data), **SMALL).windows("test")[0]
    assert torch.equal(SSTRegions(data, **SMALL).windows("test")[0], expected)
    assert torch.equal(SSTRegions(data["sst"], **SMALL).windows("test")[0], expected)
    classic = tmp_path / "classic.nc"
    data.to_netcdf(classic, engine="scipy", format="NETCDF3_64BIT")
    assert torch.equal(SSTRegions(str(classic), **SMALL).windows("test")[0], expected)


def test_which_variable(write):
    values = temperatures(MONTHS)
    data = dataset(values, MONTHS)
    data["salinity"] = data["sst"] + 20
    data["mask"] = data["sst"][0]
    path = write(data)
    assert SSTRegions(path, boxes=[(0, 0)], **MONTHLY).variable == "sst"
    assert SSTRegions(path, variable="salinity", boxes=[(0, 0)], **MONTHLY).variable == "salinity"
    with pytest.raises(ValueError, match="variable must be one of 'sst', 'salinity', 'mask', got 'sss'"):
        SSTRegions(path, variable="sss", **MONTHLY)
    with pytest.raises(ValueError, match=r"variable 'mask' must have a time, .* got mask \(lat, lon\)"):
        SSTRegions(path, variable="mask", **MONTHLY)
    both = data.rename(sst="a", salinity="b")
    with pytest.raises(ValueError, match=r"variable must name one .* has several: 'a', 'b'"):
        SSTRegions(both, **MONTHLY)
    with pytest.raises(ValueError, match=r"has none among mask \(lat, lon\)"):
        SSTRegions(data[["mask"]], **MONTHLY)
    assert SSTRegions(both[["b"]], boxes=[(0, 0)], **MONTHLY).variable == "b"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 9}, "size must be at most 8 for a grid of 8 by 12, got 9"),
        ({"size": 0}, "size must be an integer of at least 1, got 0"),
        ({"stride": -1}, "stride must be an integer of at least 1, got -1"),
        ({"inputs": 0}, "inputs must be an integer of at least 1, got 0"),
        ({"horizon": 1.5}, "horizon must be an integer of at least 1, got 1.5"),
        ({"max_land": 1.0}, "max_land must be at least 0 and less than 1, got 1.0"),
        ({"climatology": "week"}, "climatology must be one of 'auto', 'day', 'month', 'none', got 'week'"),
        ({"level": "basin"}, "level must be one of 'region', 'pixel', got 'basin'"),
        ({"standardise": "all"}, "standardise must be one of 'region', 'image', got 'all'"),
        ({"boxes": []}, "boxes must name at least one region"),
        ({"boxes": [(5, 0)]}, r"the region of 4 by 4 at \(5, 0\) is not within the grid of 8 by 12"),
        ({"boxes": [(0, 0)]}, r"boxes: there is no sea in the region at \(0, 0\)"),
        ({"size": 8, "max_land": 0.1}, "no region of 8 by 8 has at most 10% of land, the best has 25%: choose .*"),
        ({"train": (2017, 2016)}, r"train must be the first and the last year, got \(2017, 2016\)"),
        ({"train": (2006, 2016)}, r"the years of train and test must not overlap, got .*"),
        ({"train": (1990, 1995)}, "no frame of the training years 1990 to 1995 .* from 2006-01-01 to 2017-12-01: .*"),
    ],
)
def test_bad_arguments(options, message):
    values = temperatures(MONTHS)
    values[:, :4, :4] = np.nan
    with pytest.raises(ValueError, match=f"^{message}$"):
        SSTRegions(dataset(values, MONTHS), **{**MONTHLY, **options})


def test_bad_calls(write):
    regions = SSTRegions(dataset(temperatures(MONTHS), MONTHS), **MONTHLY)
    with pytest.raises(ValueError, match="split must be one of 'train', 'validation', 'test', 'all', got 'valid'"):
        regions.windows("valid")
    with pytest.raises(ValueError, match="SSTRegions was given no years for validation"):
        regions.windows("validation")
    with pytest.raises(ValueError, match="stride must be an integer of at least 1, got 0"):
        regions.windows("train", stride=0)
    images, _, frames = regions.windows("test")
    with pytest.raises(ValueError, match=r"values must have shape \(120, 5, 4, 4\), that of the frames, got \(120, 3"):
        regions.scaling.restore(images[:, :3], frames)


def test_files_that_cannot_be_used(tmp_path, write):
    text = tmp_path / "text.nc"
    text.write_text("no NetCDF")
    for source, message in (
        (tmp_path / "none.nc", "none.nc is not a file"),
        (text, "text.nc cannot be read as NetCDF: "),
        (3, "source must be a path or a Dataset or DataArray of xarray, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            SSTRegions(source)
    values = temperatures(MONTHS)
    for times in (np.arange(144), np.arange(144.0)):
        with pytest.raises(ValueError, match=r"the time axis 'time' of .*numbers.nc must have dates: units such as"):
            SSTRegions(write(dataset(values, times), "numbers.nc"), **MONTHLY)
    for times in (MONTHS[::-1], np.r_[MONTHS[:-1], MONTHS[-2]]):
        with pytest.raises(ValueError, match="the times of the data set must increase"):
            SSTRegions(dataset(values, times), **MONTHLY)


@pytest.mark.parametrize("package", ["xarray", "h5netcdf", "h5py"])
def test_missing_packages_are_named(monkeypatch, write, package):
    path = write(dataset(temperatures(MONTHS), MONTHS))
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"pykernels.data.sst needs {package}: run pip install '\.\[netcdf\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        SSTRegions(path)


def test_nothing_optional_is_imported_before_it_is_needed():
    program = "import sys, pykernels.data.sst; sys.exit(any(name in sys.modules for name in ('xarray', 'h5netcdf')))"
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


@pytest.fixture
def real_file() -> Path:
    """NOAA's reconstruction ERSSTv5: 128 months from 2010 on, 2 degrees, from north to south, NaN on land."""
    folders = [Path(__file__).parents[2] / "shared" / "data", Path(__file__).parents[3] / "shared" / "data"]
    if "PYKERNELS_SHARED_DATA" in os.environ:
        folders.insert(0, Path(os.environ["PYKERNELS_SHARED_DATA"]))
    path = next((path for path in (folder / "sst" / "sst.mnmean.nc" for folder in folders) if path.is_file()), None)
    if path is None:
        pytest.skip("no sst/sst.mnmean.nc: PYKERNELS_SHARED_DATA names the folder of shared data")
    return path


def test_real_temperatures(real_file):
    regions = SSTRegions(real_file, size=16, stride=8, max_land=0.1)
    assert (regions.variable, regions.units, regions.scaling.unit) == ("sst", "degC", "month")
    assert regions.times.shape == (128,)
    train, sea, frames = regions.windows("train")
    n_regions = len(regions)
    assert n_regions > 30
    assert train.shape == (n_regions * (72 - 9), 10, 16, 16)
    assert regions.windows("test")[0].shape == (n_regions * (24 - 9), 10, 16, 16)
    assert train.isfinite().all()
    seen = train[sea.unsqueeze(1).expand_as(train)]
    assert abs(seen.mean().item()) < 0.05
    assert seen.std().item() == pytest.approx(1, abs=0.05)
    degrees = regions.scaling.restore(train, frames)
    with xr.open_dataset(real_file, engine="h5netcdf") as data:
        row, column = regions.scaling.boxes[5]
        expected = data["sst"].values[3:13, row : row + 16, column : column + 16]
        latitude = data["lat"].values[row : row + 16]
    np.testing.assert_allclose(degrees[5 * 63 + 3], expected, atol=1e-5)
    assert regions.coordinates["lat"][5].tolist() == latitude.tolist()
    images, _, frames = regions.latest()
    assert images.shape == (n_regions, 4, 16, 16)
    assert frames.times[0, -1] == np.datetime64("2021-02-01")
    # A season's forecast by its climatology beats one by the last frame, and in the right units.
    test, sea, frames = regions.windows("test")
    truth = regions.scaling.restore(test, frames)[:, 4:]
    season = regions.scaling.restore(torch.zeros_like(test), frames)[:, 4:]
    last = regions.scaling.restore(test, frames)[:, 3:4]
    # The mean over a region: what the climatology of regions knows.
    errors = [np.nanmean((np.nanmean(x, (-2, -1)) - np.nanmean(truth, (-2, -1))) ** 2) for x in (season, last)]
    assert errors[0] < errors[1] / 3
    assert 0 < errors[0] < 2
