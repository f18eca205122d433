"""``pykernels train | reproduce | table advection-diffusion``: images forecast by the motion that they show."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import pykernels
from pykernels.backends import BACKENDS
from pykernels.cli._info import cpu_name
from pykernels.cli._job import Job, print_table
from pykernels.cli._options import (
    Parser,
    add_run_options,
    natural,
    not_negative,
    number,
    package_version,
    positive,
    positive_number,
    years,
)

if TYPE_CHECKING:
    from pykernels.models.advection_diffusion import AdvectionDiffusionTraining, Penalties
    from pykernels.models.advection_diffusion_protocols import ForecastData, Method

METRICS = ("method", "seed", "step", "loss", "validation_loss", "seconds")
METHOD_NAMES = ("regularised", "unregularised", "bilinear", "direct")
WARPS = ("gaussian", "bilinear", "direct")
COEFFICIENTS = ("divergence", "magnitude", "smoothness")


def add(systems: dict[str, Any]) -> None:
    """Add the system to the commands ``train``, ``reproduce`` and ``table``."""
    train = systems["train"].add_parser(
        "advection-diffusion", help="forecasts of images that move and diffuse", description=_train.__doc__
    )
    _add_settings(train)
    train.add_setting("--warp", choices=WARPS, default="gaussian", help="default: gaussian; direct is none at all")
    train.set_defaults(run=_train)

    reproduce = systems["reproduce"].add_parser(
        "advection-diffusion",
        help="forecasts with and without a warp, beside each other",
        description=_reproduce.__doc__,
    )
    _add_settings(reproduce)
    reproduce.add_setting(
        "--methods", nargs="+", choices=METHOD_NAMES, default=list(METHOD_NAMES), metavar="M", help="default: all four"
    )
    reproduce.add_setting("--seeds", type=positive, default=1, metavar="N", help="seeds S to S+N-1 (default: 1)")
    reproduce.set_defaults(run=_reproduce)

    table = systems["table"].add_parser(
        "advection-diffusion", help="test errors of the methods", description=_table.__doc__
    )
    table.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its result.json")
    table.set_defaults(run=_table)


def _add_settings(parser: Parser) -> None:
    data = parser.add_argument_group("simulated data")
    parser.add_setting(
        "--data", group=data, choices=["simulated"], default="simulated", help="default, without --netcdf"
    )
    for name, kind, default, metavar, text in (
        ("--sequences", positive, 200, "N", "to train on"),
        ("--tests", positive, 100, "N", "to validate with, and as many to test on"),
        ("--size", positive, 64, "N", "pixels on each side; of the regions of a file too"),
        ("--true-diffusivity", not_negative, 0.45, "X", "in pixels squared per frame"),
        ("--speed", not_negative, 3.0, "X", "of the fastest current, in pixels per frame"),
    ):
        parser.add_setting(
            name, group=data, type=kind, default=default, metavar=metavar, help=f"{text} (default: {default})"
        )
    parser.add_setting(
        "--bounded", group=data, action="store_true", default=False, help="a tile with open borders, not a periodic one"
    )

    file = parser.add_argument_group("sea-surface temperature (the extra netcdf)")
    parser.add_setting("--netcdf", group=file, type=str, default=None, metavar="FILE", help="in the place of --data")
    parser.add_setting("--variable", group=file, default=None, metavar="NAME", help="needed if it cannot be told")
    for name, first, last in (("train", 2006, 2013), ("validation", 2014, 2015), ("test", 2016, 2017)):
        parser.add_setting(
            f"--{name}-years",
            group=file,
            type=years,
            default=[first, last],
            metavar="FIRST-LAST",
            help=f"default: {first}-{last}",
        )
    parser.add_setting(
        "--max-land", group=file, type=not_negative, default=0.0, metavar="X", help="of a region (default: 0)"
    )
    parser.add_setting(
        "--standardise", group=file, choices=["region", "image"], default="region", help="default: region"
    )
    parser.add_setting(
        "--window-stride", group=file, type=positive, default=1, metavar="N", help="one of N windows (default: 1)"
    )

    model = parser.add_argument_group("model")
    parser.add_setting("--network", group=model, choices=["small", "published"], default="small", help="default: small")
    parser.add_setting(
        "--diffusivity",
        group=model,
        type=positive_number,
        default=0.25,
        metavar="X",
        help="in pixels squared per frame, to begin with (default: 0.25)",
    )
    parser.add_setting("--fixed-diffusivity", group=model, action="store_true", default=False, help="it is not learned")
    for name in COEFFICIENTS:
        parser.add_setting(
            f"--{name}",
            group=model,
            type=number,
            default=None,
            metavar="X",
            help="penalty of the motion, in pixels (default: the published one, converted)",
        )
    parser.add_setting(
        "--loss", group=model, choices=["squared", "charbonnier"], default="squared", help="default: squared"
    )
    parser.add_setting(
        "--border", group=model, type=natural, default=0, metavar="N", help="pixels at the edges that do not count"
    )

    training = parser.add_argument_group("training")
    for name, kind, default, metavar, text in (
        ("--steps", positive, 2000, "N", "at most so many"),
        ("--batch-size", positive, 16, "N", "sequences in each step"),
        ("--learning-rate", positive_number, 1e-3, "X", "of Adam; published is 0.0001"),
        ("--weight-decay", not_negative, 0.0, "X", "of Adam; published is 0.0004"),
        ("--validate-every", positive, 100, "N", "steps; the weights of the best validation are kept"),
    ):
        parser.add_setting(
            name, group=training, type=kind, default=default, metavar=metavar, help=f"{text} (default: {default})"
        )
    parser.add_setting(
        "--patience", group=training, type=positive, default=None, metavar="N", help="validations without a new best"
    )
    parser.add_setting("--dtype", choices=["float32", "float64"], default="float32", help="default: float32")
    parser.add_setting("--threads", type=positive, default=None, metavar="N", help="default: PyTorch's")
    parser.add_setting("--backend", choices=BACKENDS, default=None, help="of the warp (default: the best that runs)")
    add_run_options(parser)


class _Job(Job):
    """A command that learns to forecast, by one method and seed or several."""

    needs_sklearn = False
    operator = "gaussian_warp"

    def __init__(self, args: argparse.Namespace, *, needs_out: bool = False) -> None:
        super().__init__(args, needs_out=needs_out)
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)

    def data(self, seed: int) -> ForecastData:
        """The sequences: those of a file, or the simulated ones of a seed."""
        s = self.settings
        if s.netcdf is not None:
            return _from_file(
                s.netcdf,
                s.variable,
                s.size,
                s.max_land,
                s.standardise,
                s.window_stride,
                *(tuple(split) for split in (s.train_years, s.validation_years, s.test_years)),
            )
        return _simulated(s.sequences, s.tests, s.size, s.true_diffusivity, s.speed, not s.bounded, seed)

    def penalties(self, data: ForecastData) -> Penalties:
        """The published ones, but for what was given."""
        from pykernels.models.advection_diffusion import Penalties

        given = {name: getattr(self.settings, name) for name in COEFFICIENTS}
        published = Penalties.published(data.train.shape[-1])
        return published._replace(**{name: value for name, value in given.items() if value is not None})

    def train_all(self, tasks: Sequence[tuple[str, Method, int]], single: bool = False) -> list[dict[str, Any]]:
        """Train and test a model for each name, method and seed, from where the run was interrupted if it was.

        Args:
            tasks: the data of one seed should follow each other.
            single: whether there is only one; its files have short names then.
        """
        from pykernels.models._checkpoint import SavedTrainings, save_trainings
        from pykernels.models.advection_diffusion import TRAINING
        from pykernels.models.advection_diffusion_protocols import forecast_scores

        settings, training_file = self.settings, self.training_file()
        saved = None
        if training_file is not None and training_file.is_file():
            saved = SavedTrainings(training_file, TRAINING)
        reports: list[dict[str, Any]] = list(saved.values["reports"]) if saved else []
        backend = nullcontext() if settings.backend is None else pykernels.backend(settings.backend)
        with backend, self.run(METRICS, saved.values["metrics"] if saved else None) as run:
            for name, method, seed in tasks[len(reports) :]:
                data = self.data(seed)
                training = self.training(method, data, seed)
                if saved is not None:
                    saved.restore([training])
                    saved = None

                def row(index: int, training: Any, loss: float, name: str = name, seed: int = seed) -> tuple[Any, ...]:
                    step = training.steps_done
                    validated = training.validations and training.validations[-1][0] == step
                    validation = training.validation_loss if validated else ""
                    return name, seed, step, loss, validation, f"{training.seconds:.6f}"

                def keep(size: int, training: Any = training) -> None:
                    assert training_file is not None
                    save_trainings([training], training_file, TRAINING, {"reports": reports, "metrics": size})

                run.train([training], [f"{name}, seed {seed}"], row, keep)
                report = {
                    "method": name,
                    "seed": seed,
                    **_report(training),
                    **forecast_scores(training.model, data, border=settings.border),
                }
                reports.append(report)
                if self.folder is not None:
                    end = "" if single else f"-{name}-seed{seed}"
                    about = {"method": name, "seed": seed, **data.about}
                    training.model.save(self.folder.path / f"model{end}.safetensors", about=about, arrays=data.arrays)
                    self.draw(training, data, end)
                self.say(_line(method.title, report))
        return reports

    def training(self, method: Method, data: ForecastData, seed: int) -> AdvectionDiffusionTraining:
        from pykernels.models.advection_diffusion import AdvectionDiffusionForecaster, AdvectionDiffusionTraining

        settings = self.settings
        model = AdvectionDiffusionForecaster(
            settings.network,
            warp=method.warp,
            diffusivity=settings.diffusivity,
            learn_diffusivity=not settings.fixed_diffusivity,
            padding_mode=data.padding_mode,
            dtype=settings.dtype,
            device=settings.device,
            seed=seed,
        )
        return AdvectionDiffusionTraining(
            model,
            data.train,
            data.validation,
            valid=data.train_valid,
            validation_valid=data.validation_valid,
            border=settings.border,
            n_steps=settings.steps,
            batch_size=settings.batch_size,
            loss=settings.loss,
            penalties=method.penalties(self.penalties(data)),
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            validate_every=settings.validate_every,
            patience=settings.patience,
            seed=seed,
        )

    def draw(self, training: AdvectionDiffusionTraining, data: ForecastData, end: str) -> None:
        """The picture of the first test sequence, in the run folder, and the animation if there is one model only."""
        from pykernels.models._forecast_picture import Shown, forecast_animation, forecast_picture

        inputs = training.model.options["inputs"]
        sequence = data.test[:1]
        forecast = training.model.predict(sequence[:, :inputs], sequence.shape[1] - inputs)
        valid = data.test_valid if data.test_valid is None or data.test_valid.ndim == 2 else data.test_valid[0]
        shown = Shown(
            inputs=sequence[0, :inputs],
            images=forecast.images[0],
            truth=sequence[0, inputs:],
            flows=None if forecast.flows is None else forecast.flows[0],
            true_flows=None if data.flow is None else data.flow[0],
            valid=valid,
        )
        title = "First test sequence"
        self.picture(f"forecast{end}.png", lambda: forecast_picture(shown, title=title))
        if not end:
            self.picture("forecast.gif", lambda: forecast_animation(shown, title=title))

    def what(self, data: ForecastData) -> dict[str, Any]:
        """What was run, and where, for the result."""
        settings = self.settings
        return {
            "system": data.about,
            "network": settings.network,
            "penalties": self.penalties(data)._asdict(),
            "loss": settings.loss,
            "border": settings.border,
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "first_diffusivity": settings.diffusivity,
            "learn_diffusivity": not settings.fixed_diffusivity,
            "dtype": settings.dtype,
            "device": settings.device,
            "threads": torch.get_num_threads(),
            "cpu": cpu_name(),
            "cpu_capability": pykernels.cpu_capability(),
            "versions": {name: package_version(name) for name in ("pykernels", "torch", "numpy")},
        }

    def baselines(self, data: ForecastData, seed: int) -> dict[str, Any]:
        from pykernels.models.advection_diffusion_protocols import baseline_scores

        scores = baseline_scores(data, border=self.settings.border)
        for name, found in scores.items():
            self.say(_line(name, found))
        return {"seed": seed, "scores": scores}


def _train(args: argparse.Namespace) -> int:
    """Learn to forecast simulated or real images by the motion that they show, test it, and keep it in a run folder."""
    job = _Job(args, needs_out=True)
    if job.finished():
        return 0
    from pykernels.models.advection_diffusion_protocols import Method

    settings = job.settings
    data = job.data(settings.seed)
    method = Method(f"{settings.warp} warp" if settings.warp != "direct" else "direct prediction", settings.warp, True)
    job.training(method, data, settings.seed)  # what is wrong is said before anything is written
    job.begin(data.about)
    baselines = job.baselines(data, settings.seed)
    (report,) = job.train_all([(settings.warp, method, settings.seed)], single=True)
    job.say(
        f"{report['steps']} steps of {1e3 * report['step_seconds']:.0f} ms; validation error "
        f"{report['validation_loss']:.4f} at step {report['best_step']}, whose weights are kept"
    )
    return job.finish({**job.what(data), "baselines": [baselines], "runs": [report]})


def _reproduce(args: argparse.Namespace) -> int:
    """Learn to forecast by a regularised warp, one without penalties, a bilinear one, and directly; test them all.

    Each seed draws its own simulated sequences and first weights. The published errors, of other data, are printed
    beside: what compares is the order.
    """
    job = _Job(args)
    if job.finished():
        return 0
    from pykernels.models.advection_diffusion_protocols import METHODS, forecast_table

    settings = job.settings
    seeds = range(settings.seed, settings.seed + settings.seeds)
    tasks = [(name, METHODS[name], seed) for seed in seeds for name in settings.methods]
    data = job.data(seeds[0])
    job.training(tasks[0][1], data, seeds[0])  # what is wrong is said before anything is written
    job.begin(data.about)
    job.say(
        f"{len(data.train)} sequences to train on, {len(data.validation)} to validate with, {len(data.test)} to test on"
    )
    reports = job.train_all(tasks)
    baselines = [job.baselines(job.data(seed), seed) for seed in seeds]
    result = {**job.what(data), "baselines": baselines, "runs": reports}
    job.say("\n" + forecast_table([result]))
    return job.finish(result)


def _table(args: argparse.Namespace) -> int:
    """Print the test errors of runs of ``reproduce advection-diffusion``, as a table in Markdown."""
    from pykernels.models.advection_diffusion_protocols import forecast_table

    return print_table(args.runs, forecast_table, "reproduce advection-diffusion")


def _line(title: str, scores: dict[str, Any]) -> str:
    """One line on a model or a baseline."""
    text = f"{title}: test MSE {scores['mean_mse']:.4f}, from {scores['mse'][0]:.4f} to {scores['mse'][-1]:.4f}"
    if "flow" in scores:
        flow, visible = scores["flow"], scores["flow_visible"]
        text += (
            f"; motion wrong by {flow['endpoint']:.2f} of {flow['true_speed']:.2f} pixels, "
            f"{visible['endpoint']:.2f} of {visible['true_speed']:.2f} where it shows"
        )
    if "diffusivity" in scores:
        text += f"; diffusivity {scores['diffusivity']:.3f}"
    if "forecast_seconds" in scores:
        text += f"; {1e3 * scores['forecast_seconds']:.1f} ms for a forecast"
    return text


def _report(training: AdvectionDiffusionTraining) -> dict[str, Any]:
    return {
        "steps": training.steps_done,
        "best_step": training.best_step,
        "stopped_early": training.stopped_early,
        "last_loss": float(training.losses[-1]),
        "validation_loss": min(error for _, error in training.validations),
        "step_seconds": training.seconds / training.steps_done,
    }


@lru_cache(maxsize=1)
def _simulated(
    sequences: int, tests: int, size: int, diffusivity: float, speed: float, periodic: bool, seed: int
) -> ForecastData:
    from pykernels.models.advection_diffusion_protocols import simulated_ocean

    return simulated_ocean(
        sequences, tests, size=size, diffusivity=diffusivity, speed=speed, periodic=periodic, seed=seed
    )


@lru_cache(maxsize=1)
def _from_file(
    path: str,
    variable: str | None,
    size: int,
    max_land: float,
    standardise: str,
    every: int,
    train: tuple[int, int],
    validation: tuple[int, int],
    test: tuple[int, int],
) -> ForecastData:
    from pykernels.models.advection_diffusion_protocols import sea_surface

    return sea_surface(
        path,
        variable=variable,
        size=size,
        max_land=max_land,
        standardise=standardise,
        every=every,
        train=train,
        validation=validation,
        test=test,
    )
