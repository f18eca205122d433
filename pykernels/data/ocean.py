"""An ocean tile: temperature that moving vortices advect and that diffuses, with the motion known.

    dI/dt + w . grad I = D lap I,   div w = 0

The current w has a stream function, so that it has no divergence: Gaussian vortices that travel, and a uniform drift.
The temperature starts as a smooth random field with warm and cold blobs. Solved in float64 on a periodic square in
Fourier space: derivatives are exact, products are freed of aliasing by the 2/3 rule, diffusion and drift are integrated
exactly (an integrating factor), and the rest by the classic Runge-Kutta method of order 4.

The system that learns from such data: de Bezenac, Pajot and Gallinari, "Deep learning for physical processes:
incorporating prior scientific knowledge", ICLR 2018.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykernels._errors import InputError

Array: TypeAlias = npt.NDArray[np.float64]

# Pixels that the fastest current goes in a step: less than half of what the method's stability allows.
LONGEST_STEP = 0.4
SMALLEST_SIZE = 16


@dataclass(frozen=True)
class OceanSequences:
    """Simulated sequences, with the motion between their frames.

    Attributes:
        images: temperature, shape (N, T, H, W), float32, standardised: minus ``mean``, divided by ``deviation``.
        flow: shape (N, T - 1, 2, H, W), float32: the displacement from frame t to frame t + 1 in pixels; channel 0
            is along the last axis (x), channel 1 along the one before (y). It is the velocity at each pixel times the
            interval between frames, averaged over that interval, and so without divergence. ``images[:, t + 1]`` is
            about ``images[:, t]`` read at ``x - flow[:, t]`` and blurred by a Gaussian of variance 2 ``diffusivity``:
            what :func:`pykernels.gaussian_warp` computes. It is not exactly that: water passes other pixels on its way,
            so that its displacement differs from this one by a part of the displacement times the velocity's gradient.
        diffusivity: D in pixels squared per frame.
        periodic: whether what leaves the tile comes back on the other side. If not, the borders are open.
        mean, deviation: of the temperature over all pixels of all frames.
    """

    images: Tensor
    flow: Tensor
    diffusivity: float
    periodic: bool
    mean: float
    deviation: float

    @property
    def variance(self) -> float:
        """Of the Gaussian that diffusion over one frame is, in pixels squared."""
        return 2 * self.diffusivity


def simulate(
    sequences: int = 500,
    frames: int = 10,
    size: int = 64,
    *,
    diffusivity: float = 0.45,
    speed: float = 3.0,
    vortices: int = 8,
    periodic: bool = True,
    seed: int = 0,
    batch_size: int = 25,
) -> OceanSequences:
    """Simulate sequences of an ocean tile, each with vortices, a drift and a temperature of its own.

    Args:
        sequences: how many.
        frames: of each, at least 2.
        size: pixels on each side, at least 16.
        diffusivity: D in pixels squared per frame, not negative.
        speed: of the fastest current that may be, in pixels per frame, not negative. Every sequence draws a bound
            between half of this and this, and divides it between vortices and drift, which gets a third at most.
        vortices: in a square of ``size`` by ``size`` pixels. Their radii are between a twelfth and a sixth of ``size``.
        periodic: whether the tile is periodic. If not, it is cut out of a periodic square of about twice its area,
            and water flows in and out through the open borders.
        seed: of all that is random. A sequence depends on this and on its number only, but for the standardisation,
            which is over all of them.
        batch_size: how many are computed at once; it changes nothing but time, memory and rounding.

    Raises:
        InputError: if an argument is out of its range. A :class:`ValueError`.
    """
    least = (
        ("sequences", sequences, 1),
        ("frames", frames, 2),
        ("size", size, SMALLEST_SIZE),
        ("vortices", vortices, 0),
        ("seed", seed, 0),
        ("batch_size", batch_size, 1),
    )
    for name, count, smallest in least:
        if isinstance(count, bool) or not isinstance(count, int) or count < smallest:
            raise InputError(f"{name} must be an integer of at least {smallest}, got {count!r}")
    for name, value in (("diffusivity", diffusivity), ("speed", speed)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise InputError(f"{name} must be a number that is not negative, got {value!r}")
    domain = size if periodic else 2 * math.ceil(0.75 * size)
    margin = (domain - size) // 2
    tile = (..., slice(margin, margin + size), slice(margin, margin + size))
    steps = max(1, math.ceil(speed / LONGEST_STEP))
    images = torch.empty(sequences, frames, size, size)
    flow = torch.empty(sequences, frames - 1, 2, size, size)
    for start in range(0, sequences, batch_size):
        numbers = range(start, min(start + batch_size, sequences))
        draws = [_draw(np.random.default_rng([seed, i]), domain, size, frames, speed, vortices) for i in numbers]
        current = Current.join([current for current, _ in draws])
        first = torch.cat([temperature for _, temperature in draws])
        for t, (image, displacement) in enumerate(advect_diffuse(first, current, diffusivity, frames, steps)):
            images[numbers.start : numbers.stop, t] = image[tile]
            if t > 0:
                flow[numbers.start : numbers.stop, t - 1] = displacement[tile]
    mean = images.mean(dtype=torch.float64).item()
    deviation = images.sub_(mean).square().mean(dtype=torch.float64).sqrt().item()
    return OceanSequences(images.div_(deviation), flow, float(diffusivity), bool(periodic), mean, deviation)


@dataclass(frozen=True)
class Current:
    """Travelling Gaussian vortices on periodic squares, and a uniform drift. Lengths are in pixels, times in frames.

    The stream function of a vortex of radius s about its centre is ``strength * s * exp(-distance^2 / (2 s^2))``; the
    velocity is (d/dy, -d/dx) of the sum.

    Attributes:
        centres: at time 0, shape (B, V, 2), x before y.
        travel: the velocity of the centres, shape (B, V, 2).
        radii: shape (B, V).
        strengths: shape (B, V), in pixels per frame.
        drift: shape (B, 2).
        size: of the square.
    """

    centres: Tensor
    travel: Tensor
    radii: Tensor
    strengths: Tensor
    drift: Tensor
    size: int

    @classmethod
    def join(cls, currents: list[Current]) -> Current:
        """One of the batches of several."""
        tensors = zip(*((c.centres, c.travel, c.radii, c.strengths, c.drift) for c in currents), strict=True)
        centres, travel, radii, strengths, drift = map(torch.cat, tensors)
        return cls(centres, travel, radii, strengths, drift, currents[0].size)

    def velocity(self, time: float) -> Tensor:
        """The velocity at the pixels without the drift, shape (B, 2, H, W)."""
        centres = (self.centres + time * self.travel).unsqueeze(-1)
        offsets = torch.arange(self.size, dtype=torch.float64) - centres
        radii = self.radii[:, :, None, None]
        value, slope = torch.zeros_like(offsets), torch.zeros_like(offsets)
        # Of the vortex' periodic copies the nearest is on each side of a pixel within one size: radii are far smaller.
        nearest = torch.remainder(offsets + self.size / 2, self.size) - self.size / 2
        for copy in (-self.size, 0, self.size):
            z = (nearest + copy) / radii
            gaussian = torch.exp(-z * z / 2)
            value += gaussian
            slope -= z * gaussian
        (x, y), (x_slope, y_slope) = value.unbind(2), slope.unbind(2)
        strength = self.strengths.unsqueeze(-1)
        along_x = torch.einsum("bvy,bvx->byx", strength * y_slope, x)
        along_y = torch.einsum("bvy,bvx->byx", strength * y, -x_slope)
        return torch.stack([along_x, along_y], 1)


def advect_diffuse(
    first: Tensor, current: Current, diffusivity: float, frames: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Solve the equation on periodic squares.

    Args:
        first: the state at time 0, shape (B, H, H), float64. What is beyond the 2/3 of the wave numbers that the solver
            keeps is cut off.
        current: of the same B and size.
        diffusivity: in pixels squared per frame.
        frames: how many to give, the first included.
        steps: of Runge and Kutta between two frames.

    Yields:
        The state at times 0, 1, ..., shape (B, H, H), and the velocity, drift included, averaged over the interval that
        ends there, shape (B, 2, H, H); at time 0 it is the velocity of that time.
    """
    size = first.shape[-1]
    wave_y = 2 * math.pi * torch.fft.fftfreq(size, dtype=torch.float64).unsqueeze(-1)
    wave_x = 2 * math.pi * torch.fft.rfftfreq(size, dtype=torch.float64)
    keep = (wave_x.abs() < 2 * math.pi / 3) & (wave_y.abs() < 2 * math.pi / 3)
    waves = torch.where(keep, 1j * torch.stack(torch.broadcast_tensors(wave_x, wave_y)), 0)
    step = 1 / steps
    # Over half a step: what drift and diffusion do to each wave.
    exponent = (current.drift[:, :, None, None] * waves).sum(1) + diffusivity * (wave_x**2 + wave_y**2)
    half = torch.exp(-step / 2 * exponent)
    whole = half * half

    def change(state: Tensor, velocity: Tensor) -> Tensor:
        """What the vortices change in a step: minus the divergence of the flux of temperature."""
        flux = velocity * torch.fft.irfft2(state, s=(size, size)).unsqueeze(1)
        divergence: Tensor = (waves * torch.fft.rfft2(flux)).sum(1)
        return -step * divergence

    state = torch.where(keep, torch.fft.rfft2(first), 0)
    velocity = current.velocity(0.0)
    drift = current.drift[:, :, None, None]
    yield torch.fft.irfft2(state, s=(size, size)), velocity + drift
    for frame in range(frames - 1):
        displacement = drift.expand_as(velocity).clone()
        for i in range(steps):
            time = frame + i * step
            start, middle, end = velocity, current.velocity(time + step / 2), current.velocity(time + step)
            a = change(state, start)
            b = change(half * (state + a / 2), middle)
            c = change(half * state + b / 2, middle)
            d = change(whole * state + half * c, end)
            state = whole * (state + a / 6) + half * (b + c) / 3 + d / 6
            displacement += step / 6 * (start + 4 * middle + end)  # Simpson's rule
            velocity = end
        yield torch.fft.irfft2(state, s=(size, size)), displacement


def _draw(
    random: np.random.Generator, domain: int, size: int, frames: int, speed: float, vortices: int
) -> tuple[Current, Tensor]:
    """The current of one sequence and its temperature at time 0, on a square of ``domain`` pixels; batches of one."""
    fastest = speed * random.uniform(0.5, 1)
    angle, share = random.uniform(0, 2 * math.pi), random.uniform(0, 1 / 3)
    drift = share * fastest * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    count = max(round(vortices * (domain / size) ** 2), min(vortices, 1))
    current = Current(
        centres=torch.from_numpy(random.uniform(0, domain, (1, count, 2))),
        travel=drift.unsqueeze(1) + fastest / 4 * torch.from_numpy(random.standard_normal((1, count, 2))),
        radii=torch.from_numpy(random.uniform(size / 12, size / 6, (1, count))),
        strengths=torch.from_numpy(random.choice([-1.0, 1.0], (1, count)) * random.uniform(0.5, 1, (1, count))),
        drift=drift,
        size=domain,
    )
    swirl = max((current.velocity(float(t)).norm(dim=1).max().item() for t in range(frames)), default=0.0)
    if swirl > 0:
        current = replace(current, strengths=current.strengths * ((1 - share) * fastest / swirl))
    temperature = _smooth_noise(random, domain, size) + _blobs(random, domain, size)
    return current, torch.from_numpy(temperature).unsqueeze(0)


def _smooth_noise(random: np.random.Generator, domain: int, size: int) -> Array:
    """A periodic random field of mean 0 and deviation 1, with most of its power in waves longer than ``size`` / 2."""
    wave_y, wave_x = np.fft.fftfreq(domain)[:, None], np.fft.rfftfreq(domain)
    amplitude = ((2 / size) ** 2 + wave_y**2 + wave_x**2) ** -1.25
    amplitude[0, 0] = 0
    field = np.fft.irfft2(amplitude * np.fft.rfft2(random.standard_normal((domain, domain))), s=(domain, domain))
    smooth: Array = field / field.std()
    return smooth


def _blobs(random: np.random.Generator, domain: int, size: int) -> Array:
    """Warm and cold Gaussians, a dozen in a square of ``size`` pixels, on a periodic square."""
    count = round(12 * (domain / size) ** 2)
    centres = random.uniform(0, domain, (2, count, 1))
    radii = random.uniform(size / 24, size / 10, (count, 1))
    heights = random.choice([-1.0, 1.0], (count, 1)) * random.uniform(0.5, 1.5, (count, 1))
    offsets = (np.arange(domain) - centres + domain / 2) % domain - domain / 2
    y, x = np.exp(-((offsets / radii) ** 2) / 2)
    blobs: Array = (heights * y).T @ x
    return blobs
