"""``pykernels train gantk``: a generator network trained on mini-batches by an infinitely wide discriminator."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

import pykernels
from pykernels._errors import require
from pykernels.backends import BACKENDS
from pykernels.cli._gantk import add_data, add_discriminator, check_data, clouds
from pykernels.cli._info import cpu_name
from pykernels.cli._job import Job
from pykernels.cli._options import Parser, add_run_options, package_version, positive, positive_number

if TYPE_CHECKING:
    from pykernels.data import PointClouds
    from pykernels.models.gantk import GeneratorTraining

METRICS = ("step", "loss", "discrepancy", "seconds")
SCORED = 5000  # points whose exact distance is computed, by a matrix of all pairs
MODEL, PICTURE = "model.safetensors", "generated.png"


def add(systems: dict[str, Any]) -> None:
    """Add the system to the command ``train``."""
    parser: Parser = systems["train"].add_parser(
        "gantk", help="a generator of points, by the kernel of a discriminator", description=_train.__doc__
    )
    add_data(parser)
    add_discriminator(parser, parser.add_argument_group("discriminator"))
    generator = parser.add_argument_group("generator")
    parser.add_setting(
        "--generator", group=generator, choices=["relu", "sigmoid", "relu+sin"], default="relu", help="default: relu"
    )
    training = parser.add_argument_group("training")
    for group, option, kind, default, metavar, text in (
        (generator, "--width", positive, 256, "N", "of its hidden layers"),
        (generator, "--inputs", positive, 2, "N", "Gaussian numbers for each point"),
        (training, "--steps", positive, 5000, "N", "how many"),
        (training, "--batch-size", positive, 256, "N", "points of each cloud in a step"),
        (training, "--learning-rate", positive_number, 0.01, "X", "of Adam"),
        (training, "--validate-every", positive, 100, "N", "steps; the weights of the best validation are kept"),
    ):
        parser.add_setting(
            option, group=group, type=kind, default=default, metavar=metavar, help=f"{text} (default: {default})"
        )
    parser.add_setting("--dtype", choices=["float32", "float64"], default="float32", help="default: float32")
    parser.add_setting("--threads", type=positive, default=None, metavar="N", help="default: PyTorch's")
    parser.add_setting("--backend", choices=BACKENDS, default=None, help="of the kernel (default: the best that runs)")
    add_run_options(parser)
    parser.set_defaults(run=_train)


class _Job(Job):
    """The training of one generator."""

    needs_sklearn = False
    operator = "ntk_witness"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args, needs_out=True)
        require("scipy.optimize", "scipy", "gantk", "the exact distance")
        check_data(self.settings)
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)

    def training(self, data: PointClouds) -> GeneratorTraining:
        from pykernels.models.gantk import Generator, GeneratorTraining, InfiniteDiscriminator
        from pykernels.models.gantk_protocols import published_settings

        s = self.settings
        generator = Generator(
            s.inputs, data.real.shape[1], s.generator, width=s.width, dtype=s.dtype, device=s.device, seed=s.seed
        )
        time = s.time or published_settings(s.data, s.loss, s.kernel).time
        return GeneratorTraining(
            generator,
            data.real,
            InfiniteDiscriminator(s.kernel, s.loss, time=time, solver=s.solver),
            n_steps=s.steps,
            batch_size=s.batch_size,
            learning_rate=s.learning_rate,
            validate_every=s.validate_every,
            seed=s.seed,
        )

    def train(self, training: GeneratorTraining) -> None:
        """All steps, from where the run was interrupted if it was."""
        from pykernels.models._checkpoint import SavedTrainings, save_trainings
        from pykernels.models.gantk import TRAINING

        training_file = self.training_file()
        assert training_file is not None
        saved = SavedTrainings(training_file, TRAINING) if training_file.is_file() else None
        if saved is not None:
            saved.restore([training])

        def row(index: int, training: Any, loss: float) -> tuple[Any, ...]:
            step = training.steps_done
            validated = training.validations and training.validations[-1][0] == step
            return step, loss, training.validation_loss if validated else "", f"{training.seconds:.6f}"

        def keep(size: int) -> None:
            save_trainings([training], training_file, TRAINING, {"metrics": size})

        backend = nullcontext() if self.settings.backend is None else pykernels.backend(self.settings.backend)
        with backend, self.run(METRICS, saved.values["metrics"] if saved else None) as run:
            run.train([training], ["training"], row, keep)


def _train(args: argparse.Namespace) -> int:
    """Train a generator to draw points like the data, and keep it in a run folder.

    Each step trains an infinitely wide discriminator on a mini-batch, in closed form, and moves the generator by its
    gradient. With the loss ipm this descends the maximum mean discrepancy of the kernel.
    """
    job = _Job(args)
    if job.finished():
        return 0
    s = job.settings
    data = clouds(s, s.seed)
    training = job.training(data)
    job.begin(data.describe())
    job.train(training)
    assert job.folder is not None
    generator = training.model
    points = generator.sample(len(data.real), seed=s.seed)
    generator.save(job.folder.path / MODEL, about={"data": data.describe(), "seed": s.seed})

    from pykernels.models._gantk_picture import descent_picture
    from pykernels.models.gantk import half_squared_w2

    frames = [(training.best_step, points)]
    job.picture(
        PICTURE,
        lambda: descent_picture(
            frames,
            data.real,
            training.validations,
            None,
            title=f"{s.data}, generated",
            unit="squared discrepancy",
            pixels=data.pixels,
        ),
    )
    best = min(error for _, error in training.validations)
    distance = half_squared_w2(points[:SCORED], data.real[:SCORED])
    job.say(
        f"{training.steps_done} steps of {1e3 * training.seconds / training.steps_done:.1f} ms; squared discrepancy "
        f"{best:.3g} at step {training.best_step}, whose weights are kept; half squared W2 {distance:.3g}"
    )
    return job.finish(
        {
            "data": s.data,
            "clouds": data.describe(),
            "steps": training.steps_done,
            "best_step": training.best_step,
            "discrepancy": best,
            "half_w2": distance,
            "step_seconds": training.seconds / training.steps_done,
            "threads": torch.get_num_threads(),
            "cpu": cpu_name(),
            "cpu_capability": pykernels.cpu_capability(),
            "versions": {name: package_version(name) for name in ("pykernels", "torch", "numpy", "scipy")},
        }
    )
