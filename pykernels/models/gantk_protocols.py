"""The experiments of :mod:`pykernels.models.gantk`: particle descents scored beside the published ones, gradient fields
of a single particle and a single target, and networks of growing width beside their limit.

A descent is scored by half the squared 2-Wasserstein distance of the particles and their target, exactly, by
assignment, and by the published Sinkhorn divergence, which is close to it down to about 1e-6. As its step is fixed, the
distance can rise again late: the lowest one on the way is reported too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pykernels._errors import InputError, MissingExtraError
from pykernels.models._gantk_finite import FiniteDiscriminator
from pykernels.models._gantk_kernels import KERNELS, InfiniteDiscriminator, find_kernel
from pykernels.models._gantk_metrics import half_squared_w2, sinkhorn_divergence
from pykernels.models.gantk import LOSSES, ParticleDescent
from pykernels.models.published import published_particles

__all__ = [
    "Adequacy",
    "Settings",
    "adequacy",
    "descent_table",
    "dirac_field",
    "generator_gram",
    "particle_scores",
    "published_settings",
]

Array: TypeAlias = npt.NDArray[np.float64]

#: The points of the published adequacy figure.
OVERLAPPING = (1.5 * np.array([-1.2, -1.34, -0.8, -0.7, -0.2]), 1.5 * np.array([0.6, 1, 1.23, 1.32, -1.1, -1, -1.8]))
SEPARATE = (1.5 * np.array([-1.2, -1.34, -0.8, -0.7, -0.3]), 1.5 * np.array([0.6, 1, 1.23, 1.32, 0.2]))
#: Of the step size: gradients of sigmoids are as much smaller, and those of sines larger (the latter not published).
STEP_FACTORS = {"sigmoid": 1000.0, "relu+sin": 0.25}
ADEQUACY_STEPS, ADEQUACY_RATE = 10, 0.1
#: Of each cloud, where it is not 500.
PUBLISHED_POINTS = {"digits": 1024}


@dataclass(frozen=True)
class Settings:
    """Of a descent.

    Attributes:
        n_steps: how many.
        step_size: eta.
        time: of the training of an infinitely wide discriminator.
        learning_rate: of one of finite width.
        antisymmetric: whether one of finite width is zero at first.
    """

    n_steps: int
    step_size: float
    time: float
    learning_rate: float
    antisymmetric: bool


def published_settings(data: str, loss: str, kernel: str, discriminator: str = "infinite") -> Settings:
    """The published settings. Those of the IPM are taken for the losses without any.

    Args:
        data: ``"8gaussians"``, ``"digits"``, or anything else for images as densities.
        loss, kernel: names in ``LOSSES`` and ``KERNELS``.
        discriminator: ``"infinite"``, ``"finite"`` or ``"reset"``.
    """
    n_steps = {"8gaussians": 20_000, "digits": 50_000}.get(data, 10_000)
    finite_lsgan = loss == "lsgan" and discriminator != "infinite"
    step_size = 1.0 if finite_lsgan else 100.0 if discriminator == "finite" or data == "digits" else 1000.0
    step_size *= STEP_FACTORS.get(kernel, 1.0)
    learning_rate = 0.1 if loss == "lsgan" or discriminator == "reset" else 0.01
    return Settings(n_steps, step_size, 1000.0 if data == "digits" else 1.0, learning_rate, not finite_lsgan)


def particle_scores(descent: ParticleDescent) -> dict[str, Any]:
    """Distances of the particles to their target, for JSON.

    Returns:
        ``half_w2`` of now, ``first_half_w2``, ``lowest_half_w2`` and ``lowest_step`` on the way, as far as there are as
        many particles as targets, and ``sinkhorn``, None without GeomLoss.
    """
    scores: dict[str, Any] = {}
    if len(descent.particles) == len(descent.real):
        scores["half_w2"] = half_squared_w2(descent.particles, descent.real)
        scores["first_half_w2"] = half_squared_w2(descent.frames[0][1], descent.real)
        step, lowest = min([*descent.distances, (descent.steps_done, scores["half_w2"])], key=lambda pair: pair[1])
        scores["lowest_half_w2"], scores["lowest_step"] = lowest, step
    try:
        scores["sinkhorn"] = sinkhorn_divergence(descent.particles, descent.real)
    except MissingExtraError:
        scores["sinkhorn"] = None
    return scores


def descent_table(results: Iterable[Mapping[str, Any]]) -> str:
    """Distances of runs beside the published ones, a table in Markdown with a row for each setting.

    Nothing is published for particles that are moved by a generator's kernel.

    Args:
        results: of ``pykernels reproduce gantk``.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for result in results:
        key = tuple(result[name] for name in ("data", "loss", "discriminator", "kernel", "generator"))
        steps = f"{result['n_steps']} x {result['step_size']:g}"
        groups.setdefault((*key, result["clouds"]["fake"], steps), []).extend(result["runs"])
    lines = [
        "| data | loss | discriminator | kernel | steps x eta | runs | half squared W2, exact | lowest on the way "
        "| Sinkhorn divergence | published |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (data, loss, discriminator, kernel, generator, points, steps), runs in groups.items():
        published = None if generator else published_particles(data, loss, discriminator, kernel)
        size = "" if points == PUBLISHED_POINTS.get(data, 500) else f", {points} points"
        network = KERNELS[kernel].title + (f", generator {KERNELS[generator].title}" if generator else "")
        lines.append(
            f"| {data}{size} | {LOSSES[loss].title} | {discriminator} | {network} | {steps} | {len(runs)} "
            f"| {spread([run.get('half_w2') for run in runs])} | {spread([run.get('lowest_half_w2') for run in runs])} "
            f"| {spread([run['sinkhorn'] for run in runs])} "
            f"| {'' if published is None else f'{published[0]:.2e} ± {published[1]:.2e}'} |"
        )
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float | None]) -> str:
    """Their mean, and if there are several their standard deviation; nothing where there is none."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return ""
    mean = f"{statistics.fmean(numbers):.2e}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.2e}"


def dirac_field(
    discriminator: InfiniteDiscriminator,
    *,
    dimension: int = 2,
    n_points: int = 20,
    dtype: torch.dtype = torch.float64,
) -> tuple[Array, Array]:
    """Directions of a single particle x under a discriminator that tells it from a single target y = (1, 0, ...).

    The particle is put on a grid over [-2, 2] x [0, 2] in the span of y and a vector orthogonal to it. Kernels of fully
    connected networks depend on norms and inner products only, so that it never leaves this plane.

    Args:
        discriminator: trained anew for each place of the particle.
        dimension: of the space, at least 2.
        n_points: of the grid, along its first axis; half as many along the second.
        dtype: of the computation.

    Returns:
        Places and directions -grad c(f), both (P, dimension).

    Raises:
        InputError: if the dimension or the number of points is smaller than 2.
    """
    for name, number in (("dimension", dimension), ("n_points", n_points)):
        if number < 2:
            raise InputError(f"{name} must be at least 2, got {number}")
    first, second = np.meshgrid(np.linspace(-2, 2, n_points), np.linspace(0, 2, max(2, n_points // 2)))
    places = np.zeros((first.size, dimension))
    places[:, 0], places[:, 1] = first.ravel(), second.ravel()
    target = torch.zeros(1, dimension, dtype=dtype)
    target[0, 0] = 1
    directions = np.empty_like(places)
    for i, place in enumerate(places):
        x = torch.as_tensor(place[None]).to(dtype)
        discriminator.train(torch.cat((x, target)), 1)
        value, gradient = discriminator(x)
        directions[i] = (-discriminator.loss.slope(value)[:, None] * gradient)[0]
    return places, directions


@dataclass(frozen=True)
class Adequacy:
    """Trained networks of several widths beside the infinitely wide one.

    Attributes:
        points: where they are evaluated, (P,).
        fake, real: what they were trained on.
        infinite: values of the infinitely wide one, (P,).
        finite: values of the others by width, (networks, P).
    """

    points: Array
    fake: Array
    real: Array
    infinite: Array
    finite: dict[int, Array]

    def error(self, width: int) -> float:
        """Root mean square over networks and points, relative to that of the infinitely wide one."""
        difference = self.finite[width] - self.infinite
        return float(math.sqrt(np.square(difference).mean() / np.square(self.infinite).mean()))


def adequacy(
    loss: str = "ipm",
    kernel: str = "relu",
    *,
    widths: Sequence[int] = (32, 128, 512),
    n_networks: int = 3,
    n_points: int = 100,
    seed: int = 0,
) -> Adequacy:
    """The published comparison on points of the line: 10 steps of gradient ascent at the rate 0.1, and the time 1.

    Args:
        loss: ``"ipm"``, whose clouds overlap, or another one.
        kernel: a name in ``KERNELS`` of kind ``"ntk"``.
        widths: of the networks.
        n_networks: of each width, which differ in their first weights.
        n_points: evenly from -4 to 4, at which they are evaluated.
        seed: of the weights.

    Raises:
        InputError: naming the argument that cannot be used.
    """
    for name, value in (("n_networks", n_networks), ("n_points", n_points)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    fake, real = OVERLAPPING if loss == "ipm" else SEPARATE
    points = torch.from_numpy(np.concatenate((fake, real))[:, None])
    places = torch.linspace(-4, 4, n_points, dtype=torch.float64)[:, None]
    infinite = InfiniteDiscriminator(kernel, loss, time=ADEQUACY_STEPS * ADEQUACY_RATE)
    infinite.train(points, len(fake))
    finite = {}
    for width in widths:
        values = np.empty((n_networks, n_points))
        for i in range(n_networks):
            network = FiniteDiscriminator(
                1, kernel, loss, width=width, learning_rate=ADEQUACY_RATE, n_steps=ADEQUACY_STEPS, seed=seed + i
            )
            network.train(points, len(fake))
            values[i] = network(places)[0].numpy()
        finite[width] = values
    return Adequacy(places[:, 0].numpy(), fake, real, infinite(places)[0].numpy(), finite)


def generator_gram(inputs: npt.ArrayLike, kernel: str = "relu") -> Array:
    """Gram matrix (N, N) of a generator's kernel at its inputs (N, d), divided by its largest eigenvalue.

    With it the steps of a :class:`pykernels.models.gantk.ParticleDescent` are at most as long as without. Each output
    of the generator has the same kernel.

    Raises:
        InputError: if there is no such kernel, or the inputs have another shape.
    """
    architecture = find_kernel(kernel)
    points = torch.from_numpy(np.array(inputs, dtype=np.float64))
    if points.dim() != 2 or not len(points):
        raise InputError(f"inputs must have shape (N, d), N at least 1, got {tuple(points.shape)}")
    gram = architecture.kernel().gram(points, kind=architecture.kind)
    scaled: Array = (gram / torch.linalg.matrix_norm(gram, 2)).numpy()
    return scaled
