"""GAN(TK)^2: particles that descend the cost of a discriminator, whose network may be infinitely wide.

A discriminator f trained on particles x_1..x_N against data y tells them apart; the particles follow the gradient of
the generator's cost c at their places,

    x_i <- x_i - (eta / N) grad c(f(x_i)),

f held fixed; then f is trained anew. Infinitely wide, f is given by a neural tangent kernel k in closed form,
f(.) = sum_j A_j k(., z_j), z = (x, y); of finite width, it is a network and goes on from step to step, or begins anew.
A generator network adds its own kernel k_g between the particles: x_i <- x_i - (eta / N) sum_j k_g(u_i, u_j) grad
c(f(x_j)), u its inputs.

Source: Franceschi, de Bezenac, Ayed, Chen, Lamprier and Gallinari, "A neural tangent kernel perspective of GANs", ICML
2022, and the theses of its first three authors (Sorbonne Universite). From their released program come the scale of
eta, that the last layer has no bias, and that the first one divides by the square root of the dimension.

Checkpoints need safetensors (the extra ``models``), exact distances SciPy (the extra ``gantk``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykernels._errors import InputError
from pykernels.models import _checkpoint
from pykernels.models._checkpoint import damage_named
from pykernels.models._gantk_finite import FiniteDiscriminator, WideNetwork
from pykernels.models._gantk_generator import Generator, GeneratorTraining, WitnessLoss
from pykernels.models._gantk_kernels import KERNELS, InfiniteDiscriminator, mmd
from pykernels.models._gantk_losses import LOSSES, Loss
from pykernels.models._gantk_metrics import half_squared_w2, sinkhorn_divergence
from pykernels.models._training import DTYPES

__all__ = [
    "KERNELS",
    "LOSSES",
    "FiniteDiscriminator",
    "Generator",
    "GeneratorTraining",
    "InfiniteDiscriminator",
    "ParticleDescent",
    "WideNetwork",
    "WitnessLoss",
    "descend",
    "half_squared_w2",
    "load_particles",
    "mmd",
    "sinkhorn_divergence",
]

Array: TypeAlias = npt.NDArray[np.float64]

PARTICLES, TRAINING = "gantk.particles", "gantk.training"
FRAMES = 60  # positions that are kept, at ever longer intervals
CAPTURED_READS = 100  # steps of a captured graph between two looks at the cost, which wait for the GPU


class Discriminator(Protocol):
    """What :class:`ParticleDescent` needs."""

    loss: Loss
    options: dict[str, Any]

    def train(self, points: Tensor, n_fake: int) -> None: ...
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


class ParticleDescent:
    """The descent of particles, step by step, which can be saved and continued.

    One that is restored from the :meth:`state` of another goes on as that one would, bit for bit.

    Args:
        fake: particles as they are at first, (N, d), finite.
        real: their target, (M, d), finite.
        discriminator: an :class:`InfiniteDiscriminator` or a :class:`FiniteDiscriminator` of the same dtype.
        n_steps: how many.
        step_size: eta.
        generator_gram: of the generator's kernel at its inputs, (N, N); None for particles without a generator.
        evaluate_every: steps between two exact distances, after the first of which any rise is seen; None for none,
            as must be unless N = M.
        dtype: ``"float64"`` or ``"float32"``.
        device: of the particles. On a GPU, steps under an infinitely wide IPM run as one captured graph.

    Attributes:
        particles: where they are, (N, d).
        steps_done: how many steps are done.
        seconds: the time they took, without the distances.
        distances: the steps after which the distance was evaluated, and half the squared 2-Wasserstein distances then.
        frames: steps, from 0 on, and the positions after them.

    Raises:
        InputError: naming the argument that cannot be used.
    """

    def __init__(
        self,
        fake: npt.ArrayLike,
        real: npt.ArrayLike,
        discriminator: Discriminator,
        *,
        n_steps: int = 20_000,
        step_size: float = 1000.0,
        generator_gram: npt.ArrayLike | None = None,
        evaluate_every: int | None = 1000,
        dtype: str = "float64",
        device: str | torch.device = "cpu",
    ) -> None:
        fake = _cloud("fake", fake)
        real = _cloud("real", real, fake.shape[1])
        for name, value in (("n_steps", n_steps), ("evaluate_every", evaluate_every)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if evaluate_every is not None and len(fake) != len(real):
            raise InputError(
                f"evaluate_every must be None unless fake and real have as many points, got {len(fake)} and {len(real)}"
            )
        if not 0 < step_size < math.inf:
            raise InputError(f"step_size must be positive and finite, got {step_size!r}")
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        self.discriminator = discriminator
        self.n_steps = n_steps
        self.step_size = step_size
        self.evaluate_every = evaluate_every
        self.dtype = dtype
        self.steps_done = 0
        self.seconds = 0.0
        self.distances: list[tuple[int, float]] = []
        self.frames: list[tuple[int, Array]] = [(0, fake)]
        self.real = real
        # Fake points first; the particles are moved where they lie.
        self._points = torch.from_numpy(np.concatenate((fake, real))).to(device, DTYPES[dtype])
        self._x = self._points[: len(fake)]
        if isinstance(discriminator, FiniteDiscriminator):
            weight = discriminator.network.weights[0]
            given, expected = ((t.shape[-1], t.dtype, t.device) for t in (weight, self._points))
            if given != expected:
                d, kind, place = given
                raise InputError(
                    f"discriminator must be for points of {expected[0]} dimensions, {expected[1]}, on {expected[2]}; "
                    f"got one for {d} dimensions, {kind}, on {place}"
                )
        self._gram = None
        if generator_gram is not None:
            self._gram = torch.as_tensor(np.asarray(generator_gram)).to(self._x)
            if self._gram.shape != (len(fake), len(fake)):
                raise InputError(f"generator_gram must have shape {(len(fake),) * 2}, got {tuple(self._gram.shape)}")
        self._frame_steps = set(np.unique(np.geomspace(1, n_steps, FRAMES).round().astype(int)).tolist())
        self._cost = self._points.new_zeros(())
        self._last_cost = 0.0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capture = self._points.is_cuda and getattr(discriminator, "solver", None) == "closed"

    @property
    def particles(self) -> Array:
        return self._x.detach().cpu().numpy().astype(np.float64)

    @property
    def done(self) -> bool:
        return self.steps_done >= self.n_steps

    def step(self) -> float:
        """Train the discriminator and move the particles.

        Returns:
            The mean cost of the particles before they moved. In a captured graph, that of a step not long ago.

        Raises:
            FloatingPointError: if a particle is not finite any more.
            RuntimeError: if the descent is done.
        """
        if self.done:
            raise RuntimeError(f"this descent is done, after {self.steps_done} steps")
        start = time.perf_counter()
        try:
            if self._capture:
                self._replay()
            else:
                self._move()
            if not self._capture or self.steps_done % CAPTURED_READS == 0:
                self._last_cost = self._cost.item()
                if not math.isfinite(self._last_cost):
                    raise FloatingPointError(f"the cost is {self._last_cost}")
        except FloatingPointError as error:
            raise FloatingPointError(
                f"the descent diverges at step {self.steps_done + 1}: {error}; use a smaller step size"
            ) from error
        self.steps_done += 1
        self.seconds += time.perf_counter() - start
        if self.steps_done in self._frame_steps:
            self.frames.append((self.steps_done, self.particles))
        if self.evaluate_every is not None and (self.steps_done % self.evaluate_every == 0 or self.done):
            self.distances.append((self.steps_done, half_squared_w2(self.particles, self.real)))
        return self._last_cost

    def field(self, points: npt.ArrayLike, particles: npt.ArrayLike | None = None) -> tuple[Array, Array]:
        """What a particle at these points would feel: f and the direction -grad c(f).

        Args:
            points: (P, d).
            particles: for an infinitely wide discriminator, where the others are (N, d); by default where they are now.
                One of finite width is taken as it is.

        Returns:
            Values (P,) and directions (P, d).

        Raises:
            InputError: if ``points`` or ``particles`` have another shape, or numbers that are not finite.
        """
        d = self.real.shape[1]
        x = torch.from_numpy(_cloud("points", points, d)).to(self._x)
        if isinstance(self.discriminator, InfiniteDiscriminator):
            cloud = self._x if particles is None else torch.from_numpy(_cloud("particles", particles, d)).to(self._x)
            self.discriminator.train(torch.cat((cloud, self._points[len(self._x) :])), len(cloud))
        value, gradient = self.discriminator(x)
        direction = -self.discriminator.loss.slope(value)[:, None] * gradient
        return value.cpu().double().numpy(), direction.cpu().double().numpy()

    def _move(self) -> None:
        loss = self.discriminator.loss
        self.discriminator.train(self._points, len(self._x))
        value, gradient = self.discriminator(self._x)
        direction = loss.slope(value)[:, None] * gradient
        if self._gram is not None:
            direction = self._gram @ direction
        self._cost.copy_(loss.cost(value).mean())
        self._x.sub_(direction, alpha=self.step_size / len(self._x))

    def _replay(self) -> None:
        """As :meth:`_move`, by one launch on the GPU."""
        if self._graph is None:
            before = self._x.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # outside of the capture, kernels are compiled and memory is reserved
                for _ in range(2):
                    self._move()
            torch.cuda.current_stream().wait_stream(stream)
            self._x.copy_(before)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._move()
        self._graph.replay()

    def _settings(self) -> dict[str, Any]:
        return {
            "discriminator": self.discriminator.options,
            "fake": len(self._x),
            "real": len(self.real),
            "dimension": self.real.shape[1],
            "n_steps": self.n_steps,
            "step_size": self.step_size,
            "generator": self._gram is not None,
            "evaluate_every": self.evaluate_every,
            "dtype": self.dtype,
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that :meth:`restore` needs in a descent made with the same arguments.

        Returns:
            Copies of the tensors (``particles``, ``frames`` and ``network.*``), and values that JSON can hold.
        """
        tensors = {
            "particles": self._x.clone(),
            "frames": torch.from_numpy(np.stack([positions for _, positions in self.frames])),
        }
        values = {
            "settings": self._settings(),
            "steps_done": self.steps_done,
            "seconds": self.seconds,
            "distances": self.distances,
            "frames": [step for step, _ in self.frames],
            "last_cost": self._last_cost,
        }
        if isinstance(self.discriminator, FiniteDiscriminator):
            tensors |= {f"network.{name}": tensor for name, tensor in self.discriminator.state().items()}
            values["trainings"] = self.discriminator.trainings
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state`, which may have been through a file.

        Raises:
            InputError: if it is not the state of a descent like this one, which is then left as it was.
        """
        settings, expected = values.get("settings"), self._settings()
        if settings != expected:
            raise InputError(f"the saved descent has other settings: {settings}, where this one has {expected}")
        if tensors["particles"].shape != self._x.shape:
            raise InputError("the saved descent has no fitting particles")
        if isinstance(self.discriminator, FiniteDiscriminator):
            self.discriminator.restore(_checkpoint.part(tensors, "network."), values["trainings"])
        self._x.copy_(tensors["particles"])
        self.frames = list(zip(values["frames"], tensors["frames"].numpy().astype(np.float64), strict=True))
        self.distances = [(step, distance) for step, distance in values["distances"]]
        self.steps_done = values["steps_done"]
        self.seconds = values["seconds"]
        self._last_cost = values["last_cost"]

    def save(self, path: str | Path, *, about: Mapping[str, Any] | None = None) -> None:
        """Write the particles, their frames and the target to one file (safetensors), whole or not at all.

        Args:
            path: the file.
            about: kept with it, for readers; what JSON can hold.
        """
        tensors = {
            "particles": torch.from_numpy(self.particles),
            "real": torch.from_numpy(self.real),
            "frames": torch.from_numpy(np.stack([positions for _, positions in self.frames])),
            "frame_steps": torch.tensor([step for step, _ in self.frames]),
        }
        _checkpoint.save(Path(path), PARTICLES, tensors, {"settings": self._settings(), "about": dict(about or {})})


def load_particles(path: str | Path) -> dict[str, npt.NDArray[Any]]:
    """What :meth:`ParticleDescent.save` wrote.

    Returns:
        ``particles`` (N, d), ``real`` (M, d), ``frames`` (F, N, d) and ``frame_steps`` (F,).

    Raises:
        InputError: if the file is something else, damaged or of a newer version. A :class:`ValueError`.
    """
    path = Path(path)
    tensors, _ = _checkpoint.load(path, PARTICLES)
    with damage_named(path):
        return {name: tensors[name].numpy() for name in ("particles", "real", "frames", "frame_steps")}


def _cloud(name: str, points: npt.ArrayLike, d: int | None = None) -> Array:
    """Finite points (N, d), copied."""
    cloud = np.array(points, dtype=np.float64)
    if cloud.ndim != 2 or not cloud.size or (d is not None and cloud.shape[1] != d):
        raise InputError(f"{name} must have shape (N, {'d' if d is None else d}), N at least 1, got {cloud.shape}")
    if not np.isfinite(cloud).all():
        raise InputError(f"{name} contains {'NaN' if np.isnan(cloud).any() else 'infinity'}")
    return cloud


def descend(descent: ParticleDescent, *, on_step: Callable[[int, float], None] | None = None) -> ParticleDescent:
    """Do all steps that are left.

    Args:
        descent: done in place.
        on_step: called after each step with the number of steps done and the cost.
    """
    while not descent.done:
        cost = descent.step()
        if on_step is not None:
            on_step(descent.steps_done, cost)
    return descent
