"""``pykernels reproduce | table gantk``: particles that descend the cost of a discriminator."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import pykernels
from pykernels._errors import InputError, require
from pykernels.backends import BACKENDS
from pykernels.cli._info import cpu_name
from pykernels.cli._job import Job, print_table
from pykernels.cli._options import Parser, add_run_options, package_version, positive, positive_number

if TYPE_CHECKING:
    from pykernels.data import PointClouds
    from pykernels.models.gantk import ParticleDescent

METRICS = ("seed", "step", "cost", "half_w2", "seconds")
DATA = ("8gaussians", "digits", "density", "ab", "images")
LOSSES = ("ipm", "lsgan", "vanilla", "hinge")
KERNELS = ("relu", "rbf", "relu_no_bias", "sigmoid", "relu+sin")
PARTICLES = "particles.safetensors"
PUBLISHED_WIDTH = 128


def add(systems: dict[str, Any]) -> None:
    """Add the system to the commands ``reproduce`` and ``table``."""
    parser: Parser = systems["reproduce"].add_parser(
        "gantk", help="particles under a discriminator of infinite width", description=_reproduce.__doc__
    )
    add_data(parser)
    discriminator = parser.add_argument_group("discriminator")
    add_discriminator(parser, discriminator)
    for option, kind, metavar, text in (
        ("--width", positive, "N", "of the hidden layers; without it, it is infinitely wide"),
        ("--learning-rate", positive_number, "X", "of one of finite width"),
    ):
        parser.add_setting(option, group=discriminator, type=kind, default=None, metavar=metavar, help=text)
    parser.add_setting(
        "--reset", group=discriminator, action="store_true", default=False, help="all weights are new at each step"
    )

    descent = parser.add_argument_group("descent (default: as published)")
    parser.add_setting("--iterations", group=descent, type=positive, default=None, metavar="N", help="how many")
    parser.add_setting(
        "--step", group=descent, type=positive_number, default=None, metavar="X", help="eta, divided by the particles"
    )
    parser.add_setting(
        "--generator",
        group=descent,
        choices=["relu", "sigmoid", "relu+sin"],
        default=None,
        help="move the particles by the kernel of such a network, from inputs as many as dimensions",
    )
    parser.add_setting(
        "--evaluate-every",
        group=descent,
        type=positive,
        default=1000,
        metavar="N",
        help="steps between two exact distances (default: 1000)",
    )
    parser.add_setting("--dtype", choices=["float64", "float32"], default="float64", help="default: float64")
    parser.add_setting("--threads", type=positive, default=None, metavar="N", help="default: PyTorch's")
    parser.add_setting("--backend", choices=BACKENDS, default=None, help="of the kernel (default: the best that runs)")
    parser.add_setting("--seeds", type=positive, default=1, metavar="N", help="seeds S to S+N-1 (default: 1)")
    add_run_options(parser)
    parser.set_defaults(run=_reproduce)

    table = systems["table"].add_parser("gantk", help="distances beside the published ones", description=_table.__doc__)
    table.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its result.json")
    table.set_defaults(run=_table)


def add_data(parser: Parser) -> None:
    """What the points are, for :func:`check_data` and :func:`clouds`."""
    data = parser.add_argument_group("data")
    parser.add_setting(
        "--data",
        group=data,
        choices=DATA,
        default="8gaussians",
        help="default: 8gaussians; density and ab are the published names of two pairs of images",
    )
    for name in ("--source", "--target"):
        parser.add_setting(
            name, group=data, type=str, default=None, metavar="FILE", help="image, the darker the denser"
        )
    parser.add_setting(
        "--points",
        group=data,
        type=positive,
        default=None,
        metavar="N",
        help="of each cloud (default: 500; digits: 1024)",
    )


def add_discriminator(parser: Parser, group: Any) -> None:
    """What an infinitely wide discriminator is."""
    parser.add_setting("--loss", group=group, choices=LOSSES, default="ipm", help="default: ipm")
    parser.add_setting("--kernel", group=group, choices=KERNELS, default="relu", help="default: relu")
    for option, kind, metavar, text in (
        ("--time", positive_number, "X", "of the training of an infinitely wide one (default: 1; digits: 1000)"),
        ("--solver", str, "NAME", "of an infinitely wide one: closed, lanczos, eigenvalues or ode, as the loss has it"),
    ):
        parser.add_setting(option, group=group, type=kind, default=None, metavar=metavar, help=text)


def check_data(settings: argparse.Namespace) -> None:
    """Raise unless images are given where there must be, and only there.

    Raises:
        InputError: naming the option.
    """
    given = [settings.source is not None, settings.target is not None]
    if settings.data in ("8gaussians", "digits"):
        if any(given):
            raise InputError("--source and --target are images; they need --data images, density or ab")
    elif not all(given):
        raise InputError(f"--data {settings.data} needs --source and --target, two images")


def clouds(settings: argparse.Namespace, seed: int) -> PointClouds:
    """The points of a seed."""
    from pykernels.data import digits, eight_gaussians, image_densities

    if settings.data == "8gaussians":
        return eight_gaussians(settings.points or 500, seed=seed)
    if settings.data == "digits":
        return digits(settings.points or 1024, seed=seed)
    return image_densities(settings.source, settings.target, settings.points or 500, seed=seed)


class _Job(Job):
    """Descents of one setting, one for each seed."""

    needs_sklearn = False
    operator = "ntk_witness"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        require("scipy.optimize", "scipy", "gantk", "the exact distance")
        s = self.settings
        check_data(s)
        if s.width is None and (s.reset or s.learning_rate is not None):
            raise InputError("--reset and --learning-rate are of discriminators of finite width; give --width")
        if s.width is not None and (s.time is not None or s.solver is not None):
            raise InputError("--time and --solver are of infinitely wide discriminators; leave out --width")
        if s.threads is not None:
            torch.set_num_threads(s.threads)
        from pykernels.models.gantk_protocols import published_settings

        self.discriminator = "infinite" if s.width is None else "reset" if s.reset else "finite"
        self.published = published_settings(s.data, s.loss, s.kernel, self.discriminator)
        if s.width not in (None, PUBLISHED_WIDTH):
            self.discriminator += f", width {s.width}"
        self.n_steps = s.iterations or self.published.n_steps
        self.step_size = s.step or self.published.step_size

    def descent(self, data: PointClouds, seed: int) -> ParticleDescent:
        """The descent of a seed, which draws the clouds, and the weights of a finite discriminator."""
        from pykernels.models.gantk import FiniteDiscriminator, InfiniteDiscriminator, ParticleDescent
        from pykernels.models.gantk_protocols import generator_gram

        s, published = self.settings, self.published
        discriminator: Any
        if s.width is None:
            discriminator = InfiniteDiscriminator(s.kernel, s.loss, time=s.time or published.time, solver=s.solver)
        else:
            discriminator = FiniteDiscriminator(
                data.real.shape[1],
                s.kernel,
                s.loss,
                width=s.width,
                learning_rate=s.learning_rate or published.learning_rate,
                antisymmetric=published.antisymmetric,
                reset=s.reset,
                seed=seed,
                dtype=getattr(torch, s.dtype),
                device=s.device,
            )
        return ParticleDescent(
            data.fake,
            data.real,
            discriminator,
            n_steps=self.n_steps,
            step_size=self.step_size,
            generator_gram=None if s.generator is None else generator_gram(data.fake, s.generator),
            evaluate_every=s.evaluate_every,
            dtype=s.dtype,
            device=s.device,
        )

    def descend_all(self, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """The descents of all seeds, from where the run was interrupted if it was."""
        from pykernels.models._checkpoint import SavedTrainings, save_trainings
        from pykernels.models.gantk import TRAINING
        from pykernels.models.gantk_protocols import particle_scores

        training_file = self.training_file()
        saved = None
        if training_file is not None and training_file.is_file():
            saved = SavedTrainings(training_file, TRAINING)
        reports: list[dict[str, Any]] = list(saved.values["reports"]) if saved else []
        backend = nullcontext() if self.settings.backend is None else pykernels.backend(self.settings.backend)
        with backend, self.run(METRICS, saved.values["metrics"] if saved else None) as run:
            for seed in seeds[len(reports) :]:
                data = clouds(self.settings, seed)
                descent = self.descent(data, seed)
                if saved is not None:
                    saved.restore([descent])
                    saved = None

                def row(index: int, training: Any, cost: float, seed: int = seed) -> tuple[Any, ...]:
                    step = training.steps_done
                    evaluated = training.distances and training.distances[-1][0] == step
                    return seed, step, cost, training.distances[-1][1] if evaluated else "", f"{training.seconds:.6f}"

                def keep(size: int, descent: Any = descent) -> None:
                    assert training_file is not None
                    save_trainings([descent], training_file, TRAINING, {"reports": reports, "metrics": size})

                run.train([descent], [f"descent, seed {seed}"], row, keep)
                report = {
                    "seed": seed,
                    **particle_scores(descent),
                    "distances": descent.distances,
                    "seconds": descent.seconds,
                }
                reports.append(report)
                self.say(_line(report))
                if self.folder is not None:
                    about = {"data": data.describe(), "seed": seed}
                    descent.save(self.folder.path / self.name(PARTICLES, seed), about=about)
                    self.draw(descent, data, seed)
        return reports

    def draw(self, descent: ParticleDescent, data: PointClouds, seed: int) -> None:
        """The picture and the animation of one seed, in the run folder."""
        from pykernels.models._gantk_picture import descent_animation, descent_picture
        from pykernels.models.gantk import InfiniteDiscriminator

        def field(places: Any, particles: Any) -> Any:
            infinite = isinstance(descent.discriminator, InfiniteDiscriminator)
            if not infinite and not np.array_equal(particles, descent.particles):
                return None  # a network knows its last weights only
            return descent.field(places, particles)[1]

        title = self.title()
        self.picture(
            self.name("descent.png", seed),
            lambda: descent_picture(
                descent.frames, descent.real, descent.distances, field, title=title, pixels=data.pixels
            ),
        )
        self.picture(
            self.name("descent.gif", seed),
            lambda: descent_animation(descent.frames, descent.real, title=title, pixels=data.pixels),
        )

    def title(self) -> str:
        from pykernels.models.gantk import KERNELS, LOSSES

        s = self.settings
        width = "infinite width" if s.width is None else f"width {s.width}{', reset' if s.reset else ''}"
        return f"{s.data}, {LOSSES[s.loss].title}, {KERNELS[s.kernel].title}, {width}"

    def what(self, data: PointClouds) -> dict[str, Any]:
        """What was run, and where, for the result."""
        s = self.settings
        return {
            "data": s.data,
            "clouds": data.describe(),
            "loss": s.loss,
            "kernel": s.kernel,
            "discriminator": self.discriminator,
            "width": s.width,
            "n_steps": self.n_steps,
            "step_size": self.step_size,
            "generator": s.generator,
            "dtype": s.dtype,
            "device": s.device,
            "threads": torch.get_num_threads(),
            "cpu": cpu_name(),
            "cpu_capability": pykernels.cpu_capability(),
            "versions": {name: package_version(name) for name in ("pykernels", "torch", "numpy", "scipy", "geomloss")},
        }

    def name(self, name: str, seed: int) -> str:
        """The name of a file of one seed: as it is if there is one seed only."""
        stem, _, suffix = name.partition(".")
        return name if self.settings.seeds == 1 else f"{stem}-seed{seed}.{suffix}"


def _reproduce(args: argparse.Namespace) -> int:
    """Move particles to a target by a discriminator's gradient, and print their last distance beside the published one.

    Each seed draws its own clouds.
    """
    job = _Job(args)
    if job.finished():
        return 0
    from pykernels.models.gantk_protocols import descent_table

    seeds = range(job.settings.seed, job.settings.seed + job.settings.seeds)
    data = clouds(job.settings, seeds[0])
    job.descent(data, seeds[0])  # what is wrong is said before anything is written
    job.begin(data.describe())
    job.say(
        f"{job.title()}: {job.n_steps} steps of {len(data.fake)} particles to {len(data.real)} targets, "
        f"eta {job.step_size:g}"
    )
    result = {**job.what(data), "runs": job.descend_all(seeds)}
    job.say("\n" + descent_table([result]))
    if any(run["sinkhorn"] is None for run in result["runs"]):
        job.note("pykernels: there is no Sinkhorn divergence without geomloss, of the extra gantk")
    return job.finish(result)


def _table(args: argparse.Namespace) -> int:
    """Print the distances of runs of ``reproduce gantk`` beside the published ones, as a table in Markdown."""
    from pykernels.models.gantk_protocols import descent_table

    return print_table(args.runs, descent_table, "reproduce gantk")


def _line(report: dict[str, Any]) -> str:
    sinkhorn = "" if report["sinkhorn"] is None else f", Sinkhorn divergence {report['sinkhorn']:.3g}"
    rise = report["half_w2"] / report["lowest_half_w2"] if report["lowest_half_w2"] else 1.0
    late = f", after {report['lowest_half_w2']:.3g} at step {report['lowest_step']}" if rise > 1.1 else ""
    return (
        f"seed {report['seed']}: half squared W2 from {report['first_half_w2']:.3g} to {report['half_w2']:.3g}{late}"
        f"{sinkhorn}; {report['seconds']:.0f} s"
    )
