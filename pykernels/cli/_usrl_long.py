"""``pykernels reproduce usrl-long-series``: features of one series of two million samples."""

from __future__ import annotations

import argparse
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pykernels._errors import InputError
from pykernels.backends import BACKENDS
from pykernels.cli._job import Job
from pykernels.cli._options import Parser, add_run_options, environment, integer, positive

METRICS = ("K", "step", "loss", "seconds")


def add(systems: dict[str, Any]) -> None:
    """Add the system to the command ``reproduce``."""
    parser: Parser = systems["reproduce"].add_parser(
        "usrl-long-series", help="what features of a very long series tell", description=_reproduce.__doc__
    )
    parser.add_setting(
        "--series", default=None, metavar="FILE", help=".npy of shape (T,) (default: a simulated household's power)"
    )
    parser.add_setting(
        "--samples", type=positive, default=None, metavar="T", help="of the simulation (default: 2075259)"
    )
    parser.add_setting(
        "--train-samples", type=positive, default=500_000, metavar="T", help="to learn from (default: 500000)"
    )
    parser.add_setting("--periods", choices=["day", "quarter", "both"], default="both", help="default: both")
    parser.add_setting(
        "--day-stride", type=positive, default=60, metavar="N", help="minutes between features of a day (default: 60)"
    )
    parser.add_setting(
        "--quarter-stride", type=positive, default=1440, metavar="N", help="and of a quarter (default: 1440)"
    )
    parser.add_setting(
        "--longest-window",
        type=_window,
        default=14 * 1440,
        metavar="N",
        help="in the training, in samples; 0 for all, as published (default: 20160)",
    )
    parser.add_setting("--steps", type=positive, default=400, metavar="N", help="training steps (default: 400)")
    parser.add_setting("--dtype", choices=["float32", "float64"], default="float32", help="default: float32")
    parser.add_setting("--backend", choices=BACKENDS, default=None, help="default: the best that runs")
    add_run_options(parser)
    parser.set_defaults(run=_reproduce)


def _window(text: str) -> int:
    return integer(text, 0, 2**31)


def _reproduce(args: argparse.Namespace) -> int:
    """Train an encoder on part of a very long series; predict changes of the mean from its features and raw values."""
    job = Job(args)
    if job.finished():
        return 0
    settings = job.settings
    from pykernels.models._curves import losses_picture
    from pykernels.models._picture import long_series_picture
    from pykernels.models._usrl_checkpoint import Normalisation, SavedTrainings, save, save_trainings
    from pykernels.models.usrl import USRLTransformer
    from pykernels.models.usrl_long_series import (
        clusters,
        long_series_experiment,
        long_series_table,
        long_series_training,
    )

    series = _series(settings)
    choices = _choices(settings)
    training = long_series_training(series, choices)
    job.begin({"series": hashlib.sha256(np.ascontiguousarray(series).tobytes()).hexdigest()})
    job.say(f"{len(series)} samples, {choices.n_train} to learn from; K={choices.n_negatives}, {choices.n_steps} steps")
    file = job.training_file()
    saved = SavedTrainings(file) if file is not None and file.is_file() else None
    if saved is not None:
        saved.restore([training])

    def row(index: int, training: Any, loss: float) -> tuple[Any, ...]:
        return training.n_negatives, training.steps_done, loss, f"{training.seconds:.6f}"

    def keep(size: int) -> None:
        assert file is not None
        save_trainings([training], file, {"metrics": size})

    with job.run(METRICS, saved.values["metrics"] if saved else None) as run:
        run.train([training], [f"training, K={choices.n_negatives}"], row, keep)
        result = long_series_experiment(series, choices, training=training, report=job.note)
        job.say(
            f"training step {1e3 * training.seconds / training.n_steps:.0f} ms, last loss {training.losses[-1]:.3f}"
        )
        job.say("\n" + long_series_table(result))
        if job.folder is not None:
            model = USRLTransformer(
                choices.n_negatives,
                n_steps=choices.n_steps,
                batch_size=choices.batch_size,
                channels=choices.channels,
                depth=choices.depth,
                reduced_size=choices.reduced_size,
                out_channels=choices.out_channels,
                dtype=choices.dtype,
                random_state=choices.seed,
                backend=choices.backend,
                device=choices.device,
            ).finish([training])
            normalisation = Normalisation(np.array([[result.mean]]), np.array([[result.std]]))
            save(
                model, job.folder.path / "model.safetensors", normalisation=normalisation, about={"seed": choices.seed}
            )
            job.picture("loss.png", partial(losses_picture, {f"K = {choices.n_negatives}": training.losses}))
            width, found = choices.periods[0].samples, result.first_features
            job.picture(
                f"{choices.periods[0].name}s.png",
                lambda: long_series_picture(series, width, result.first_windows, found, clusters(found), ".png"),
            )
        return job.finish({**result.summary(), **environment()})


def _series(settings: argparse.Namespace) -> Any:
    from pykernels.data import household_power

    if settings.series is None:
        return household_power(seed=0, **({} if settings.samples is None else {"n_samples": settings.samples}))
    path = Path(settings.series)
    if settings.samples is not None:
        raise InputError("--samples is the length of the simulated series; leave it out beside --series")
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"--series: {path} is not a .npy file of numbers ({error})") from error


def _choices(settings: argparse.Namespace) -> Any:
    from dataclasses import replace

    from pykernels.models.usrl_long_series import DAY, QUARTER, LongSeriesSettings

    periods = {
        "day": replace(DAY, stride=settings.day_stride),
        "quarter": replace(QUARTER, stride=settings.quarter_stride),
    }
    return LongSeriesSettings(
        n_train=settings.train_samples,
        n_steps=settings.steps,
        longest_window=settings.longest_window or None,
        periods=tuple(periods.values()) if settings.periods == "both" else (periods[settings.periods],),
        seed=settings.seed,
        dtype=settings.dtype,
        backend=settings.backend,
        device=settings.device,
    )
