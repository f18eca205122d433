"""``pykernels train | reproduce | table neural-ode``: a vector field learned from trajectories."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
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
    not_negative,
    package_version,
    positive,
    positive_number,
)
from pykernels.ops.latent_ode.tableaux import TABLEAUX

if TYPE_CHECKING:
    from pykernels.data import PendulumData
    from pykernels.models.neural_ode import NeuralODE, NeuralODETraining

METRICS = ("seed", "step", "loss", "validation_loss", "seconds")
PICTURE = "pendulum.png"


def add(systems: dict[str, Any]) -> None:
    """Add the system to the commands ``train``, ``reproduce`` and ``table``."""
    train = systems["train"].add_parser("neural-ode", help="a vector field of trajectories", description=_train.__doc__)
    _add_settings(train)
    train.set_defaults(run=_train)

    reproduce = systems["reproduce"].add_parser(
        "neural-ode", help="a vector field of trajectories, and its forecasts", description=_reproduce.__doc__
    )
    _add_settings(reproduce)
    reproduce.add_setting("--seeds", type=positive, default=1, metavar="N", help="seeds S to S+N-1 (default: 1)")
    reproduce.set_defaults(run=_reproduce)

    table = systems["table"].add_parser(
        "neural-ode", help="test errors beside the published ones", description=_table.__doc__
    )
    table.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its result.json")
    table.set_defaults(run=_table)


def _add_settings(parser: Parser) -> None:
    data = parser.add_argument_group("data")
    parser.add_setting("--data", group=data, choices=["pendulum"], default="pendulum", help="default: pendulum")
    for name, kind, default, metavar, text in (
        ("--t0", positive_number, 6.0, "X", "period of small swings; published are 6 and 12"),
        ("--damping", not_negative, 0.2, "X", "of the pendulum"),
        ("--noise", not_negative, 0.01, "X", "standard deviation of the noise on all observations"),
        ("--trajectories", positive, 25, "N", "as many to train on, to validate with and to test on"),
    ):
        parser.add_setting(
            name, group=data, type=kind, default=default, metavar=metavar, help=f"{text} (default: {default})"
        )
    parser.add_setting(
        "--steps", type=positive, default=5000, metavar="N", help="at most so many training steps (default: 5000)"
    )
    parser.add_setting(
        "--patience",
        type=positive,
        default=10,
        metavar="N",
        help="validations, one every 100 steps, without a new best after which the training stops (default: 10)",
    )
    parser.add_setting(
        "--hidden", type=positive, default=200, metavar="N", help="units of a hidden layer (default: 200)"
    )
    parser.add_setting("--layers", type=positive, default=2, metavar="N", help="hidden layers (default: 2)")
    parser.add_setting("--method", choices=list(TABLEAUX), default="rk4", help="default: rk4, Kutta's 3/8 rule")
    parser.add_setting(
        "--learning-rate", type=positive_number, default=1e-3, metavar="X", help="of Adam (default: 0.001)"
    )
    parser.add_setting("--dtype", choices=["float32", "float64"], default="float32", help="default: float32")
    parser.add_setting("--backend", choices=BACKENDS, default=None, help="default: the best that runs")
    add_run_options(parser)


class _Job(Job):
    """A command that learns a pendulum's vector field, for one seed or several."""

    needs_sklearn = False
    operator = "mlp_odeint"

    def data(self, seed: int) -> PendulumData:
        """The trajectories of a seed, whose simulation takes a second."""
        settings = self.settings
        return _simulated(settings.trajectories, settings.t0, settings.damping, settings.noise, seed)

    def train_seeds(
        self,
        seeds: Sequence[int],
        evaluate: Callable[[NeuralODETraining, PendulumData], dict[str, Any]],
    ) -> list[dict[str, Any]]:
        """Train a model for each seed, from where the run was interrupted if it was.

        Args:
            seeds: of the trajectories and the first weights.
            evaluate: what to report of a training in JSON.
        """
        from pykernels.models._checkpoint import SavedTrainings, save_trainings
        from pykernels.models.neural_ode import TRAINING, NeuralODE, NeuralODETraining

        settings, training_file = self.settings, self.training_file()
        saved = None
        if training_file is not None and training_file.is_file():
            saved = SavedTrainings(training_file, TRAINING)
        reports: list[dict[str, Any]] = list(saved.values["reports"]) if saved else []
        backend = nullcontext() if settings.backend is None else pykernels.backend(settings.backend)
        with backend, self.run(METRICS, saved.values["metrics"] if saved else None) as run:
            for seed in seeds[len(reports) :]:
                data = self.data(seed)
                model = NeuralODE(
                    hidden=[settings.hidden] * settings.layers,
                    method=settings.method,
                    dtype=settings.dtype,
                    device=settings.device,
                    seed=seed,
                )
                training = NeuralODETraining(
                    model,
                    data.times,
                    data.train,
                    data.validation,
                    n_steps=settings.steps,
                    learning_rate=settings.learning_rate,
                    patience=settings.patience,
                )
                if saved is not None:
                    saved.restore([training])
                    saved = None

                def row(index: int, training: Any, loss: float, seed: int = seed) -> tuple[Any, ...]:
                    step = training.steps_done
                    validated = training.validations and training.validations[-1][0] == step
                    validation = training.validation_loss if validated else ""
                    return seed, step, loss, validation, f"{training.seconds:.6f}"

                def keep(size: int, training: Any = training) -> None:
                    assert training_file is not None
                    save_trainings([training], training_file, TRAINING, {"reports": reports, "metrics": size})

                run.train([training], [f"training, seed {seed}"], row, keep)
                reports.append({"seed": seed, **_report(training), **evaluate(training, data)})
                if self.folder is not None:
                    about = {"system": data.describe(), "seed": seed}
                    model.save(self.folder.path / self.name("model.safetensors", seed), about=about)
                    self.draw(training, data, seed)
        return reports

    def draw(self, training: NeuralODETraining, data: PendulumData, seed: int) -> None:
        """The picture of one seed, in the run folder."""
        from pykernels.models._trajectories_picture import trajectories_picture

        model = training.model
        self.picture(
            self.name(PICTURE, seed),
            lambda: trajectories_picture(
                data.times,
                data.test,
                model.predict(data.test[:, 0], data.times),
                (data.pendulum.derivative, model.derivative),
                training.losses,
                training.validations,
                title=f"Damped pendulum, period {data.pendulum.period:g}, damping {data.pendulum.damping:g}, "
                f"noise {data.noise:g}: {_shape(model)} learned from {len(data.train)} trajectories",
                names=("angle", "angular velocity"),
            ),
        )

    def what(self, data: PendulumData) -> dict[str, Any]:
        """What was run, and where, for the result."""
        settings = self.settings
        return {
            "data": settings.data,
            "system": data.describe(),
            "hidden": [settings.hidden] * settings.layers,
            "method": settings.method,
            "steps": settings.steps,
            "dtype": settings.dtype,
            "device": settings.device,
            "threads": torch.get_num_threads(),
            "cpu": cpu_name(),
            "cpu_capability": pykernels.cpu_capability(),
            "versions": {name: package_version(name) for name in ("pykernels", "torch", "numpy")},
        }

    def name(self, name: str, seed: int) -> str:
        """The name of a file of one seed: as it is if there is one seed only."""
        stem, _, suffix = name.partition(".")
        return name if getattr(self.settings, "seeds", 1) == 1 else f"{stem}-seed{seed}.{suffix}"


def _train(args: argparse.Namespace) -> int:
    """Learn the vector field of a damped pendulum from simulated trajectories, and keep it in a run folder."""
    job = _Job(args, needs_out=True)
    if job.finished():
        return 0
    seed = job.settings.seed
    data = job.data(seed)
    job.begin(data.describe())
    (report,) = job.train_seeds([seed], lambda training, data: {})
    job.say(
        f"{report['steps']} steps of {1e3 * report['step_seconds']:.1f} ms, last loss {report['last_loss']:.3g}; "
        f"validation error {report['validation_loss']:.3g} at step {report['best_step']}, whose weights are kept"
    )
    return job.finish({**job.what(data), **report})


def _reproduce(args: argparse.Namespace) -> int:
    """Learn the vector field of a damped pendulum, forecast fresh trajectories, and print the published error beside.

    Each seed draws its own trajectories and first weights.
    """
    job = _Job(args)
    if job.finished():
        return 0
    from pykernels.models.neural_ode_protocols import forecast_table, pendulum_scores, spread
    from pykernels.models.published import published_forecast

    settings = job.settings
    seeds = range(settings.seed, settings.seed + settings.seeds)
    data = job.data(seeds[0])
    job.begin(data.describe())
    job.say(
        f"damped pendulum: period {settings.t0:g}, damping {settings.damping:g}, noise {settings.noise:g}; "
        f"{settings.trajectories} trajectories each to train, validate and test, {len(data.times)} observations"
    )

    def evaluate(training: NeuralODETraining, data: PendulumData) -> dict[str, Any]:
        scores = pendulum_scores(training.model, data)
        early = ", stopped early" if training.stopped_early else ""
        job.say(
            f"test log MSE {scores.log_mse:.2f} (the true equation: {scores.true_log_mse:.2f}), weights of step "
            f"{training.best_step} of {training.steps_done}{early}, "
            f"{1e3 * training.seconds / training.steps_done:.1f} ms for a training step"
        )
        return vars(scores)

    reports = job.train_seeds(seeds, evaluate)
    errors = [report["log_mse"] for report in reports]
    published = published_forecast("Neural ODE")
    assert published is not None
    result = {
        **job.what(data),
        "runs": reports,
        "log_mse": statistics.fmean(errors),
        "published": {"log_mse": published[0], "std": published[1]},
    }
    job.say(
        f"mean test log MSE (natural) of {len(seeds)} seed{'s' * (len(seeds) > 1)}: {spread(errors)}, "
        f"published: {published[0]:.2f} ± {published[1]:.2f}"
    )
    job.say("\n" + forecast_table([result]))
    return job.finish(result)


def _table(args: argparse.Namespace) -> int:
    """Print the test errors of runs of ``reproduce neural-ode`` beside the published ones, as a table in Markdown."""
    from pykernels.models.neural_ode_protocols import forecast_table

    return print_table(args.runs, forecast_table, "reproduce neural-ode")


@lru_cache(maxsize=1)
def _simulated(trajectories: int, period: float, damping: float, noise: float, seed: int) -> PendulumData:
    from pykernels.data import damped_pendulum

    return damped_pendulum(trajectories, period=period, damping=damping, noise=noise, seed=seed)


def _report(training: NeuralODETraining) -> dict[str, Any]:
    return {
        "steps": training.steps_done,
        "best_step": training.best_step,
        "stopped_early": training.stopped_early,
        "last_loss": float(training.losses[-1]),
        "validation_loss": min(error for _, error in training.validations),
        "step_seconds": training.seconds / training.steps_done,
    }


def _shape(model: NeuralODE) -> str:
    widths = (model.options["n_features"], *model.options["hidden"], model.options["n_features"])
    return "-".join(map(str, widths))
