"""Point clouds: particles to be moved, and where they are to go.

- :func:`eight_gaussians`: from a Gaussian to eight of them on a circle;
- :func:`image_densities`: from one image to another, each read as a density in the plane, the darker the denser;
- :func:`digits`: from noise to images of handwritten digits, which come with scikit-learn.

Source of the first two: Franceschi, de Bezenac, Ayed, Chen, Lamprier and Gallinari, "A neural tangent kernel
perspective of GANs", ICML 2022; the images there are those of the examples of GeomLoss.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pykernels._errors import InputError, require

Array: TypeAlias = npt.NDArray[np.float64]

DIGITS_PIXELS = (8, 8)


@dataclass(frozen=True)
class PointClouds:
    """Two clouds of points.

    Attributes:
        name: what they are.
        fake: particles as they are at first, shape (N, d).
        real: their target, shape (M, d).
        pixels: (height, width) of the image that each point is, or None.
    """

    name: str
    fake: Array
    real: Array
    pixels: tuple[int, int] | None = None

    def describe(self) -> dict[str, Any]:
        """Sizes, and a fingerprint of the numbers, for JSON."""
        content = hashlib.sha256(np.ascontiguousarray(self.fake).tobytes() + np.ascontiguousarray(self.real).tobytes())
        return {
            "name": self.name,
            "fake": len(self.fake),
            "real": len(self.real),
            "dimension": self.fake.shape[1],
            "sha256": content.hexdigest()[:16],
        }


def eight_gaussians(
    n_points: int = 500, *, components: int = 8, radius: float = 5.0, std: float = 0.5, seed: int = 0
) -> PointClouds:
    """From a standard Gaussian in the plane to a mixture of Gaussians around a circle, of equal weights.

    Args:
        n_points: of each cloud.
        components: Gaussians of the mixture.
        radius: of the circle of their means.
        std: standard deviation of each.
        seed: of all that is random.

    Raises:
        InputError: if an argument is out of its range. A :class:`ValueError`.
    """
    _check_count("n_points", n_points)
    _check_count("components", components)
    for name, value in (("radius", radius), ("std", std)):
        if not 0 <= value < math.inf:
            raise InputError(f"{name} must be finite and not negative, got {value!r}")
    random = np.random.default_rng(seed)
    fake = random.standard_normal((n_points, 2))
    angles = 2 * math.pi / components * random.integers(0, components, n_points)
    means = radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    return PointClouds(f"{components}gaussians", fake, means + std * random.standard_normal((n_points, 2)))


def image_densities(
    source: str | Path | npt.ArrayLike, target: str | Path | npt.ArrayLike, n_points: int = 500, *, seed: int = 0
) -> PointClouds:
    """From one image to another. A pixel is drawn the more often the darker it is, white ones never.

    The centres of the outermost pixels are at -1 and 1; each point is moved by Gaussian noise of standard deviation
    1 / width and 1 / height.

    Args:
        source, target: files (PNG or what else Pillow reads, of the extra ``gantk``), or darknesses, shape (H, W).
        n_points: of each cloud.
        seed: of all that is random.

    Raises:
        InputError: if a file is no image, or an image is white, or an array has another shape or values that are
            negative or not finite.
        MissingExtraError: if a file is given and Pillow is not installed. A :class:`ModuleNotFoundError`.
        OSError: if a file cannot be read.
    """
    _check_count("n_points", n_points)
    images = {"source": source, "target": target}
    fake, real = (
        _points(_darkness(name, image), n_points, np.random.default_rng([seed, part]))
        for part, (name, image) in enumerate(images.items())
    )
    return PointClouds("images", fake, real)


def digits(n_points: int | None = None, *, seed: int = 0) -> PointClouds:
    """From standard Gaussian noise to images of handwritten digits, 8 x 8 pixels from -1 to 1.

    Args:
        n_points: of each cloud, at most 1797; None for all.
        seed: of which digits are taken, and of the noise.

    Raises:
        InputError: if there are not so many digits.
        MissingExtraError: if scikit-learn is not installed. A :class:`ModuleNotFoundError`.
    """
    datasets = require("sklearn.datasets", "scikit-learn", "models", "the digits")
    images = datasets.load_digits().data / 8 - 1  # grey levels from 0 to 16
    count = len(images) if n_points is None else n_points
    _check_count("n_points", count)
    if count > len(images):
        raise InputError(f"n_points must be at most {len(images)}, the number of digits; got {count}")
    random = np.random.default_rng(seed)
    real = images[random.permutation(len(images))[:count]]
    return PointClouds("digits", random.standard_normal(real.shape), real, DIGITS_PIXELS)


def _darkness(name: str, image: str | Path | npt.ArrayLike) -> Array:
    """The weight of each pixel, shape (H, W)."""
    if isinstance(image, (str, Path)):
        return _read(Path(image))
    weights = np.asarray(image, dtype=np.float64)
    if weights.ndim != 2 or min(weights.shape) < 2:
        raise InputError(f"{name} must have shape (H, W), both at least 2, got {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise InputError(f"{name} must have finite values, not negative and not all zero")
    return weights


def _read(path: Path) -> Array:
    pillow: Any = require("PIL.Image", "pillow", "gantk", "an image")
    path.open("rb").close()  # the error for a file that is not there
    try:
        with pillow.open(path) as file:
            coloured = file.convert("RGBA")
    except pillow.UnidentifiedImageError as error:
        raise InputError(f"{path} is no image that Pillow can read") from error
    white = pillow.new("RGBA", coloured.size, "white")  # what is transparent is white
    grey = np.asarray(pillow.alpha_composite(white, coloured).convert("L"), dtype=np.float64)
    weights: Array = grey.max() - grey
    if min(weights.shape) < 2 or not weights.any():
        raise InputError(f"{path} has the same grey everywhere, or less than two pixels along a side")
    return weights


def _points(weights: Array, count: int, random: np.random.Generator) -> Array:
    height, width = weights.shape
    chosen = random.choice(weights.size, count, p=weights.ravel() / weights.sum())
    row, column = np.divmod(chosen, width)
    centres = np.stack([2 * column / (width - 1) - 1, 1 - 2 * row / (height - 1)], 1)  # upwards is positive
    points: Array = centres + random.standard_normal((count, 2)) / (width, height)
    return points


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")
