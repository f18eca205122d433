"""``pykernels train | reproduce | table advection-diffusion`` and ``forecast``: what they leave, and how they go on."""

import json
import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
import pykernels
from pykernels.backends import Answer
from pykernels.cli import main
from pykernels.models import _forecast_picture
from pykernels.models.advection_diffusion import (
    AdvectionDiffusionForecaster,
    AdvectionDiffusionTraining,
    Penalties,
    train_advection_diffusion,
)
from pykernels.models.advection_diffusion_protocols import forecast_scores, simulated_ocean

from .command_line import interrupt, names, refused, rows, without

STEPS = 4
SIZES = ["--sequences", "4", "--tests", "2", "--size", "16", "--speed", "1", "--steps", str(STEPS), "--quiet"]
TRAIN = ["--batch-size", "3", "--validate-every", "2", "--learning-rate", "0.005"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(command, out=None, *options):
    return [command, "advection-diffusion", *SIZES, *TRAIN, *(["--out", str(out)] if out else []), *options]


def without_times(result):
    for run in result["runs"]:
        run.pop("step_seconds")
        run.pop("forecast_seconds")
    return result


# Training on simulated sequences


def test_train_fills_a_run_folder(tmp_path, capsys):
    out = tmp_path / "new" / "run"
    options = [
        "--seed",
        "3",
        "--dtype",
        "float64",
        "--weight-decay",
        "0.0004",
        "--loss",
        "charbonnier",
        "--border",
        "1",
    ]
    assert main(arguments("train", out, *options, "--magnitude=-0.001", "--diffusivity", "0.3", "--threads", "1")) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert re.search(r"^persistence: test MSE 0\.\d{4}, from ", printed.out, re.M)
    assert re.search(r"^true motion: test MSE 0\.\d{4}, from ", printed.out, re.M)
    assert re.search(
        r"^gaussian warp: .*; motion wrong by .*; diffusivity 0\.\d{3}; \d+\.\d ms for a fo", printed.out, re.M
    )
    assert re.search(
        r"^4 steps of \d+ ms; validation error .* at step [24], whose weights are kept$", printed.out, re.M
    )
    assert names(out) == sorted(
        ["config.json", "metrics.csv", "model.safetensors", "forecast.png", "forecast.gif", "result.json"]
    )

    data = simulated_ocean(4, 2, size=16, speed=1.0, seed=3)
    expected = AdvectionDiffusionForecaster(padding_mode="periodic", diffusivity=0.3, dtype="float64", seed=3)
    training = train_advection_diffusion(
        expected,
        data.train,
        data.validation,
        n_steps=STEPS,
        batch_size=3,
        validate_every=2,
        learning_rate=0.005,
        weight_decay=0.0004,
        loss="charbonnier",
        border=1,
        penalties=Penalties.published(16)._replace(magnitude=-0.001),
        seed=3,
    )
    model, about, arrays = AdvectionDiffusionForecaster.load_all(out / "model.safetensors")
    assert model.options == expected.options
    assert about == {"method": "gaussian", "seed": 3, **data.about}
    assert arrays == {}
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    metrics = rows(out)
    assert metrics[0] == ["method", "seed", "step", "loss", "validation_loss"]
    assert [float(row[3]) for row in metrics[1:]] == training.losses.tolist()
    assert [row[4] for row in metrics[1:]] == ["", str(training.validations[0][1]), "", str(training.validations[1][1])]
    config = json.loads((out / "config.json").read_text())
    assert config["command"] == "train advection-diffusion"
    result = json.loads((out / "result.json").read_text())
    (run,) = result["runs"]
    scores = forecast_scores(model, data, border=1)
    assert run["mse"] == scores["mse"]
    assert run["flow"] == scores["flow"]
    assert result["system"] == data.about
    assert result["baselines"][0]["scores"].keys() == {"persistence", "diffusion alone", "true motion"}
    assert (out / "forecast.png").read_bytes().startswith(b"\x89PNG")
    gif = (out / "forecast.gif").read_bytes()
    assert gif.startswith(b"GIF8")


def test_an_animation_shows_every_frame(tmp_path):
    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "run"
    assert main(arguments("train", out, "--warp", "direct", "--bounded")) == 0
    with image.open(out / "forecast.gif") as animation:
        assert animation.n_frames == 10


@contextmanager
def blank_pictures():
    """They take more time than the trainings here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_forecast_picture, "forecast_picture", lambda shown, title: b"")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of two methods and two seeds that was not interrupted."""
    path = tmp_path_factory.mktemp("whole") / "run"
    with blank_pictures():
        assert main(several(path)) == 0
    return path


def several(path, *options):
    return arguments("reproduce", path, "--methods", "regularised", "direct", "--seeds", "2", *options)


def test_reproduce_trains_all_methods(tmp_path, capsys):
    assert main(arguments("reproduce", tmp_path / "run", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert [run["method"] for run in result["runs"]] == ["regularised", "unregularised", "bilinear", "direct"]
    assert ["diffusivity" in run for run in result["runs"]] == [True, True, False, False]
    assert ["flow" in run for run in result["runs"]] == [True, True, True, False]
    first, second = (run["last_loss"] for run in result["runs"][:2])
    assert first != second  # by the penalties
    assert len(rows(tmp_path / "run")) == 1 + 4 * STEPS
    files = names(tmp_path / "run")
    assert len(files) == 3 + 4 * 2
    assert "model-direct-seed0.safetensors" in files


def test_reproduce_prints_a_table(capsys):
    assert main(arguments("reproduce", None, "--methods", "unregularised")) == 0
    printed = capsys.readouterr().out
    assert "4 sequences to train on, 2 to validate with, 2 to test on" in printed
    assert re.search(r"^\| Gaussian warp \| 1 \| 0\.\d{4} \| .* \| 2\.01 \|$", printed, re.M)
    assert re.search(r"^\| persistence \| 1 \| 0\.\d{4} \|", printed, re.M)


def test_table(whole, capsys, tmp_path):
    assert main(["table", "advection-diffusion", str(whole), str(whole / "result.json")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in table[2:]] == [
        [" Gaussian warp, regularised ", " 4 "],
        [" direct prediction ", " 4 "],
        [" persistence ", " 4 "],
        [" diffusion alone ", " 4 "],
        [" true motion ", " 4 "],
    ]
    other = tmp_path / "other.json"
    for content in ("no JSON", "[]", '{"runs": []}'):
        other.write_text(content)
        error = refused(capsys, ["table", "advection-diffusion", str(other)])
        assert "is no result of pykernels reproduce advection-diffusion" in error


@pytest.mark.parametrize("steps", [(1,), (STEPS + 1, 2 * STEPS + 2, 4 * STEPS)])
def test_an_interrupted_run_goes_on_bit_for_bit(steps, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a run"
    interrupt(monkeypatch, AdvectionDiffusionTraining, steps)
    command = several(out)
    for done in steps:
        with blank_pictures():
            assert main(command) == 130
        error = capsys.readouterr().err
        assert error.endswith(f"to go on: pykernels reproduce advection-diffusion --resume '{out}'\n")
        assert len(rows(out)) == 1 + done
        command = ["reproduce", "advection-diffusion", "--resume", str(out), "--quiet"]
    with blank_pictures():
        assert main(command) == 0
    assert names(out) == names(whole)
    assert rows(out) == rows(whole)
    for file in whole.glob("model*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    ours, theirs = (without_times(json.loads((path / "result.json").read_text())) for path in (out, whole))
    assert ours == theirs


def test_backends_agree(tmp_path):
    for backend in ("cpu", "reference"):
        assert main(arguments("train", tmp_path / backend, "--backend", backend, "--dtype", "float64")) == 0
    ours, theirs = ([float(row[3]) for row in rows(tmp_path / name)[1:]] for name in ("cpu", "reference"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_backend_that_cannot_run_here(monkeypatch, capsys):
    answers = {"gaussian_warp": {"cpu": Answer(False, "it did not load")}}
    monkeypatch.setattr(pykernels, "available_backends", lambda: answers)
    assert "--backend cpu: it did not load" in refused(capsys, arguments("reproduce", None, "--backend", "cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--divergence", "much"], "argument --divergence: must be a number, got 'much'"),
        (["--smoothness", "inf"], "argument --smoothness: must be a number, got 'inf'"),
        (["--diffusivity", "0"], "argument --diffusivity: must be a positive number, got '0'"),
        (["--border", "-1"], "argument --border: must be an integer from 0"),
        (["--methods", "best"], "argument --methods: invalid choice: 'best'"),
        (["--network", "large"], "argument --network: invalid choice: 'large'"),
        (["--train-years", "2006:2013"], "argument --train-years: must be a year or two such as 2006-2015"),
        (["--size", "3"], "size must be an integer of at least 16, got 3"),
        (["--border", "8"], "border must be from 0 to less than half of the image 16 x 16, got 8"),
    ],
)
def test_bad_arguments_are_named(options, message, capsys):
    assert message in refused(capsys, arguments("reproduce", None, *options))


def test_scikit_learn_and_matplotlib_are_not_needed(tmp_path, monkeypatch, capsys):
    without(monkeypatch, "sklearn", "matplotlib")
    assert main(arguments("train", tmp_path / "run")) == 0
    error = capsys.readouterr().err
    assert "the run goes without forecast.png" in error
    assert "the run goes without forecast.gif" in error
    assert names(tmp_path / "run") == ["config.json", "metrics.csv", "model.safetensors", "result.json"]


# Sea-surface temperature


@pytest.fixture(scope="module")
def ocean(tmp_path_factory):
    """Three years of monthly temperatures on 16 by 32 pixels, from north to south, with an island in the east."""
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    path = tmp_path_factory.mktemp("ocean") / "sst.nc"
    times = np.arange("2014-01", "2017-01", dtype="datetime64[M]").astype("datetime64[ns]")
    latitude, longitude = 50 - 0.5 * np.arange(16), 0.5 * np.arange(32)
    phase = 0.3 * np.arange(len(times))[:, None, None]
    degrees = 15 + np.sin(np.pi * longitude / 4 - phase) + np.cos(np.pi * latitude[:, None] / 2 + phase)
    degrees[:, 4:7, 20:26] = np.nan
    array = xarray.DataArray(
        degrees.astype(np.float32),
        {"time": times, "lat": latitude, "lon": longitude},
        ("time", "lat", "lon"),
        attrs={"units": "degree_C", "standard_name": "sea_surface_temperature"},
    )
    array.to_dataset(name="sst").to_netcdf(path, engine="h5netcdf")
    return path


def from_file(ocean, out):
    data = ["--netcdf", str(ocean), "--size", "16", "--max-land", "0.2"]
    years = ["--train-years", "2014", "--validation-years", "2015", "--test-years", "2016-2016"]
    run = ["--steps", "4", "--validate-every", "2", "--quiet", "--out", str(out)]
    return ["train", "advection-diffusion", *data, *years, *run]


@pytest.fixture(scope="module")
def trained(ocean, tmp_path_factory):
    """The folder of a run on that file."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(from_file(ocean, out)) == 0
    return out


def test_training_on_a_file(trained):
    result = json.loads((trained / "result.json").read_text())
    assert result["system"]["variable"] == "sst"
    assert result["system"]["windows"] == {"train": 6, "validation": 6, "test": 6}
    assert result["baselines"][0]["scores"].keys() == {"persistence"}
    (run,) = result["runs"]
    assert "flow" not in run
    assert 0 < run["mean_mse"] < 10
    model = AdvectionDiffusionForecaster.load(trained / "model.safetensors")
    assert model.options["padding_mode"] == "reflection"


@pytest.mark.parametrize("last", [-1, 20])
def test_forecast(last, trained, ocean, tmp_path, capsys):
    xarray = pytest.importorskip("xarray")
    from pykernels.data.sst import SSTRegions, SSTScaling

    out = tmp_path / "later.nc"
    assert main(["forecast", str(trained), str(ocean), "-o", str(out), "--last", str(last), "--region", "1"]) == 0
    assert re.match(
        r"2 regions, 6 frames after 201\d-.*: .*later.nc, .*later.png, .*later.gif$", capsys.readouterr().out
    )
    assert names(tmp_path) == ["later.gif", "later.nc", "later.png"]

    model, about, arrays = AdvectionDiffusionForecaster.load_all(trained / "model.safetensors")
    scaling = SSTScaling.from_state(arrays, about["scaling"])
    seen, sea, frames = SSTRegions(ocean, scaling=scaling).latest(last)
    expected = model.predict(seen)
    with xarray.open_dataset(out, engine="h5netcdf") as written:
        degrees = written["sst"].values
        np.testing.assert_array_equal(degrees, scaling.restore(expected.images, frames[:, 4:]))
        np.testing.assert_array_equal(np.isnan(degrees), ~np.broadcast_to(sea.numpy()[:, None], degrees.shape))
        assert 10 < np.nanmean(degrees) < 20
        assert written["sst"].attrs["units"] == "degree_C"
        first = np.datetime64("2017-01" if last == -1 else "2015-10")
        np.testing.assert_array_equal(written["time"].values[0].astype("datetime64[M]"), first + np.arange(6))
        np.testing.assert_array_equal(written["lat"].values[1], 50 - 0.5 * np.arange(16))
        np.testing.assert_array_equal(written["lon"].values[1], 8 + 0.5 * np.arange(16))
        motion = written["motion_y"].values
        assert written["motion_y"].attrs["units"] == "pixels"
        np.testing.assert_array_equal(motion, np.where(np.isnan(degrees), np.nan, expected.flows[:, :, 1]))


def test_forecast_without_pictures(trained, ocean, tmp_path):
    xarray = pytest.importorskip("xarray")
    command = ["forecast", str(trained / "model.safetensors"), str(ocean), "--out", str(tmp_path / "f.nc")]
    assert main([*command, "--no-pictures", "--steps", "2"]) == 0
    assert names(tmp_path) == ["f.nc"]
    with xarray.open_dataset(tmp_path / "f.nc", engine="h5netcdf") as written:
        assert written["sst"].shape == (2, 2, 16, 16)


def test_pictures_of_a_forecast_show_the_truth_if_there_is_one(trained, ocean, tmp_path, monkeypatch):
    """Rows from north to south, in degrees."""
    shown = []
    monkeypatch.setattr(_forecast_picture, "forecast_picture", lambda part, title: shown.append(part) or b"")
    monkeypatch.setattr(_forecast_picture, "forecast_animation", lambda part, title: b"")
    for last in ("-1", "29", "30"):
        command = ["forecast", str(trained), str(ocean), "-o", str(tmp_path / "f.nc"), "--last", last, "--region", "1"]
        assert main(command) == 0
    assert [part.truth is None for part in shown] == [True, False, True]
    assert not shown[0].upwards
    assert shown[0].unit == "degree_C"
    truth = shown[1].truth
    assert truth.shape == (6, 16, 16)
    longitude, latitude, phase = 8 + 0.5 * np.arange(16), 50 - 0.5 * np.arange(16)[:, None], 0.3 * 35
    degrees = 15 + np.sin(np.pi * longitude / 4 - phase) + np.cos(np.pi * latitude / 2 + phase)
    sea = shown[1].valid
    assert (~sea).sum() == 3 * 6
    np.testing.assert_allclose(truth[-1][sea], degrees[sea], atol=1e-4)


def test_what_cannot_be_forecast(trained, ocean, whole, tmp_path, capsys):
    out = ["-o", str(tmp_path / "f.nc")]
    simulated = str(whole / "model-direct-seed0.safetensors")
    assert "was not trained on a NetCDF file" in refused(capsys, ["forecast", simulated, str(ocean), *out])
    assert "has several models" in refused(capsys, ["forecast", str(whole), str(ocean), *out])
    command = ["forecast", str(trained), str(ocean)]
    assert "there is no folder" in refused(capsys, [*command, "-o", str(tmp_path / "no" / "f.nc")])
    assert "--region must be less than 2, the number of regions, got 2" in refused(
        capsys, [*command, *out, "--region", "2"]
    )
    assert "last must be one of the 36 frames" in refused(capsys, [*command, *out, "--last", "36"])
    assert "argument --steps: must be an integer from 1" in refused(capsys, [*command, *out, "--steps", "0"])
    assert names(tmp_path) == []
