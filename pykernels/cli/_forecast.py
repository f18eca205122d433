"""``pykernels forecast``: what a trained model expects to follow the frames of a NetCDF file."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pykernels import _files
from pykernels._errors import InputError, MissingExtraError, require
from pykernels.cli._options import Parser, add_device, check_device, natural, positive
from pykernels.models._run import run_model

if TYPE_CHECKING:
    from pykernels.data.sst import SSTRegions
    from pykernels.models._forecast_picture import Shown


def add(commands: Any) -> None:
    """Add the command ``forecast``."""
    parser: Parser = commands.add_parser(
        "forecast", help="the frames that follow those of a NetCDF file", description=_forecast.__doc__
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="of train advection-diffusion, or the folder of that run"
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="NetCDF, on the grid of the file trained on")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="NetCDF to write")
    parser.add_argument(
        "--last", type=int, default=-1, metavar="N", help="number of the last frame to look at (default: the file's)"
    )
    parser.add_argument("--steps", type=positive, default=6, metavar="N", help="frames to forecast (default: 6)")
    parser.add_argument("--variable", metavar="NAME", help="of the file, needed if it cannot be told")
    parser.add_argument(
        "--region", type=natural, default=0, metavar="N", help="which one the pictures show (default: 0, the first)"
    )
    parser.add_argument("--no-pictures", action="store_true", help="no .png and .gif beside the NetCDF file")
    add_device(parser)
    parser.set_defaults(run=_forecast)


def _forecast(args: argparse.Namespace) -> int:
    """Forecast the frames that follow those of a NetCDF file, in its units and coordinates, and the motion in pixels.

    Beside the NetCDF file go a picture and an animation with the same name, with what came where the file has it.
    """
    _files.check_output(args.out, "--out")
    check_device(args.device)
    require("safetensors.torch", "safetensors", "models", "a trained model")
    from pykernels.data.sst import SSTRegions, SSTScaling
    from pykernels.models._checkpoint import damage_named
    from pykernels.models.advection_diffusion import AdvectionDiffusionForecaster

    checkpoint = run_model(args.checkpoint)
    model, about, arrays = AdvectionDiffusionForecaster.load_all(checkpoint, device=args.device)
    if "scaling" not in about:
        raise InputError(f"{checkpoint} was not trained on a NetCDF file (train advection-diffusion --netcdf)")
    with damage_named(checkpoint):
        scaling = SSTScaling.from_state(arrays, about["scaling"])
    inputs = model.options["inputs"]
    regions = SSTRegions(args.file, variable=args.variable, inputs=inputs, horizon=args.steps, scaling=scaling)
    images, _, frames = regions.latest(args.last)
    if args.region >= len(frames):
        raise InputError(f"--region must be less than {len(frames)}, the number of regions, got {args.region}")
    forecast = model.predict(images, args.steps)
    degrees = scaling.restore(forecast.images, frames[:, inputs:])
    dataset = regions.dataset(degrees, frames[:, inputs:])
    if forecast.flows is not None:
        for channel, name in enumerate(("motion_x", "motion_y")):
            motion = np.where(np.isnan(degrees), np.nan, forecast.flows[:, :, channel])
            dataset[name] = regions.dataset(motion, frames[:, inputs:], name=name)[name]
            axis = ("last axis", "axis before the last")[channel]
            dataset[name].attrs = {"long_name": f"motion along the {axis} in one frame", "units": "pixels"}
    dataset.attrs["source"] = f"pykernels forecast {checkpoint.name} {args.file.name}"
    _write(dataset, args.out)
    written = [args.out]
    if not args.no_pictures:
        known = scaling.restore(images, frames[:, :inputs])
        shown = _shown(args, regions, known, degrees, forecast.flows, int(frames.region[args.region]))
        written += _pictures(shown, args.out, f"{args.file.name}, region {args.region}")
    print(
        f"{len(frames)} region{'s' * (len(frames) > 1)}, {args.steps} frames after {frames.times[0, inputs - 1]}: "
        + ", ".join(map(str, written))
    )
    return 0


def _write(dataset: Any, path: Path) -> None:
    """The whole file or none."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "forecast.nc"
        dataset.to_netcdf(file, engine="h5netcdf")
        _files.write(path, file.read_bytes())


def _shown(args: argparse.Namespace, regions: SSTRegions, known: Any, degrees: Any, flows: Any, region: int) -> Shown:
    """What the pictures show of one region, with the truth if the file has all of it."""
    from pykernels.models._forecast_picture import Shown

    start = args.last % len(regions.times) - regions.inputs + 1
    later = (region, start) in zip(*(column.tolist() for column in regions.starts("all")), strict=True)
    truth = None
    if later:
        images, _, frames = regions.gather(np.array([region]), np.array([start]))
        truth = regions.scaling.restore(images, frames)[0, regions.inputs :]
    latitude = [values[region] for name, values in regions.coordinates.items() if name.lower().startswith("lat")]
    downwards = bool(latitude) and latitude[0].ravel()[0] > latitude[0].ravel()[-1]
    return Shown(
        inputs=known[args.region],
        images=degrees[args.region],
        truth=truth,
        flows=None if flows is None else flows[args.region],
        valid=regions.scaling.sea[region],
        unit=regions.units,
        upwards=not downwards,
    )


def _pictures(shown: Shown, out: Path, title: str) -> list[Path]:
    """Write them beside ``out``; without matplotlib there are none, and a note says so."""
    from pykernels.models._forecast_picture import forecast_animation, forecast_picture

    written = []
    for draw, suffix in ((forecast_picture, ".png"), (forecast_animation, ".gif")):
        try:
            _files.write(out.with_suffix(suffix), draw(shown, title=title))
        except MissingExtraError as error:
            print(f"pykernels: no {out.with_suffix(suffix)}: {error}", file=sys.stderr)
        else:
            written.append(out.with_suffix(suffix))
    return written
