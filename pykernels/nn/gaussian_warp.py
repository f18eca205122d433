"""Advection and diffusion as layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pykernels.ops import bilinear_warp, diffusion_variance, gaussian_warp, gaussian_warp_rollout
from pykernels.ops.gaussian_warp.warp import DEFAULT_MAX_SUPPORT, DEFAULT_TOLERANCE

_KERNELS = ("bilinear", "gaussian")

#: Runge-Kutta methods: how far along the slope of the stage before each stage is, and the weights of the stages.
_METHODS = {
    "euler": ((0.0,), (1.0,)),
    "midpoint": ((0.0, 0.5), (0.0, 1.0)),
    "rk4": ((0.0, 0.5, 0.5, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


class GaussianWarp(nn.Module):
    """Advects an image by a motion field and diffuses it: :func:`pykernels.gaussian_warp` with a variance of its own.

    Args:
        variance: of the Gaussian on each axis, in pixels squared; or
        diffusivity: D in pixels squared per unit of time, of which the variance is 2 D dt.
        dt: the step, for the diffusivity.
        learnable: whether the variance is learned. It stays positive: the parameter is ``log_variance``, of shape ().
        form, normalize, padding_mode, support, tolerance, max_support: as there.
        units, align_corners, indexing, backend: as there.
        device, dtype: of the parameter.

    Shape:
        image (B, C, *S), flow (B, R, *S), output (B, C, *S).

    Raises:
        TypeError, ValueError: as :func:`pykernels.gaussian_warp`; if not one of variance and diffusivity is given; and
            if the one to be learned is not positive.
    """

    def __init__(
        self,
        variance: float | None = None,
        *,
        diffusivity: float | None = None,
        dt: float = 1.0,
        learnable: bool = False,
        form: str = "integrated",
        normalize: str = "window",
        padding_mode: str = "zeros",
        support: int | None = None,
        tolerance: float = DEFAULT_TOLERANCE,
        max_support: int = DEFAULT_MAX_SUPPORT,
        units: str = "pixels",
        align_corners: bool | None = None,
        indexing: str = "xy",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "variance" if diffusivity is None else "diffusivity"
        given = variance if diffusivity is None else diffusivity
        if (variance is None) == (diffusivity is None):
            raise ValueError(f"one of variance and diffusivity must be given, got {variance} and {diffusivity}")
        for key, number in ((name, given), ("dt", dt)):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{key} must be a number, got {type(number).__name__}; learnable=True learns it")
            if not 0 <= number < math.inf or (number == 0 and (learnable or key == "dt")):
                kind = "positive" if learnable or key == "dt" else "at least 0"
                raise ValueError(f"{key} must be {kind} and finite, got {number}")
        self.dt = float(dt)
        value = float(variance if variance is not None else diffusion_variance(diffusivity or 0.0, dt))
        self.options: dict[str, Any] = {
            "form": form,
            "normalize": normalize,
            "padding_mode": padding_mode,
            "support": support,
            "tolerance": tolerance,
            "max_support": max_support,
            "units": units,
            "align_corners": align_corners,
            "indexing": indexing,
            "backend": backend,
        }
        # What is wrong with the options is said now, not when the first image comes.
        pixel = torch.zeros(1, 1, 1)
        gaussian_warp(pixel, pixel, value, **{**self.options, "backend": "reference"})
        self.log_variance: nn.Parameter | None
        if learnable:
            self.log_variance = nn.Parameter(torch.full((), math.log(value), device=device, dtype=dtype))
        else:
            self.register_parameter("log_variance", None)
            self._value = value

    @property
    def variance(self) -> float | Tensor:
        """In pixels squared: a tensor if it is learned."""
        return self._value if self.log_variance is None else self.log_variance.exp()

    @property
    def diffusivity(self) -> float | Tensor:
        """``variance / (2 dt)``."""
        return self.variance / (2 * self.dt)

    def forward(self, image: Tensor, flow: Tensor) -> Tensor:
        return gaussian_warp(image, flow, self.variance, **self.options)

    def rollout(self, image: Tensor, flows: Tensor) -> Tensor:
        """The images (B, T, C, *S) after each of the motions (B, T, R, *S), in one call.

        See :func:`pykernels.gaussian_warp_rollout`.
        """
        return gaussian_warp_rollout(image, flows, self.variance, **self.options)

    def extra_repr(self) -> str:
        parts = [f"dt={self.dt:g}"] if self.dt != 1 else []
        if self.log_variance is not None:
            parts.append("learnable=True")
        if self.log_variance is None or not self.log_variance.is_meta:
            value = self.variance
            parts.insert(0, f"variance={value.item() if isinstance(value, Tensor) else value:.6g}")
        defaults = gaussian_warp.__kwdefaults__ or {}
        return ", ".join(parts + [f"{name}={v!r}" for name, v in self.options.items() if v != defaults[name]])


class SemiLagrangian(nn.Module):
    """One step of semi-Lagrangian advection: each pixel takes what the flow has carried to it.

    The path that ends in a pixel is followed back in time, through ``dX/dt = u(X, t)``, and the field is read where it
    started: stable however far that is. The velocity between pixels is interpolated linearly, and beyond the border it
    is that of the border, or periodic with the field.

    Args:
        method: of the way back: ``"euler"``, which reads at ``x - dt u(x)``, ``"midpoint"`` or ``"rk4"``.
        kernel: that samples the field: ``"bilinear"`` (:func:`pykernels.bilinear_warp`), or ``"gaussian"``
            (:func:`pykernels.gaussian_warp`), which diffuses it as well.
        variance: of the Gaussian for the whole step, positive, in pixels squared, ``2 D dt``.
        learnable: whether the variance is learned, as in :class:`GaussianWarp`, the submodule ``warp``.
        dt: the step.
        steps: of the method for the way back; the field is sampled once whatever their number.
        padding_mode: what the field is beyond the border, as in :func:`pykernels.gaussian_warp`.
        form, normalize, support, tolerance, max_support: of the Gaussian, as there.
        units: of the velocity times dt: ``"pixels"``, or ``"normalized"`` with ``align_corners``.
        indexing, backend: as there.
        device, dtype: of the parameter.

    Shape:
        field (B, C, *S); velocity (B, R, *S), or (B, K, R, *S) at K >= 2 times equally spaced from the start of the
        step to its end, and linear in between; output (B, C, *S).

    Raises:
        TypeError, ValueError: if an argument is wrong, naming what is accepted.

    Source: A. Staniforth and J. Cote, "Semi-Lagrangian integration schemes for atmospheric models: a review", Monthly
    Weather Review 119 (1991).
    """

    def __init__(
        self,
        method: str = "rk4",
        *,
        kernel: str = "bilinear",
        variance: float = 0.0,
        learnable: bool = False,
        dt: float = 1.0,
        steps: int = 1,
        padding_mode: str = "zeros",
        form: str = "integrated",
        normalize: str = "window",
        support: int | None = None,
        tolerance: float = DEFAULT_TOLERANCE,
        max_support: int = DEFAULT_MAX_SUPPORT,
        units: str = "pixels",
        align_corners: bool | None = None,
        indexing: str = "xy",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (("method", method, tuple(_METHODS)), ("kernel", kernel, _KERNELS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        if type(steps) is not int:
            raise TypeError(f"steps must be an int, got {steps!r}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if isinstance(dt, bool) or not isinstance(dt, (int, float)):
            raise TypeError(f"dt must be a number, got {type(dt).__name__}")
        if not math.isfinite(dt):
            raise ValueError(f"dt must be finite, got {dt}")
        if (kernel == "gaussian") != (variance != 0):
            raise ValueError(
                "kernel='gaussian' needs a positive variance"
                if kernel == "gaussian"
                else f"variance={variance} is for kernel='gaussian', got kernel={kernel!r}"
            )
        self.method = method
        self.kernel = kernel
        self.dt = float(dt)
        self.steps = steps
        geometry = {"units": units, "align_corners": align_corners, "indexing": indexing, "backend": backend}
        self.geometry: dict[str, Any] = {"padding_mode": padding_mode, **geometry}
        self.warp: GaussianWarp | None = None
        if kernel == "gaussian":
            self.warp = GaussianWarp(
                variance,
                learnable=learnable,
                form=form,
                normalize=normalize,
                support=support,
                tolerance=tolerance,
                max_support=max_support,
                device=device,
                dtype=dtype,
                **self.geometry,
            )
        elif learnable:
            raise ValueError("learnable=True is for kernel='gaussian', got kernel='bilinear'")
        else:
            pixel = torch.zeros(1, 1, 1)
            bilinear_warp(pixel, pixel, **{**self.geometry, "backend": "reference"})
        self._beyond: dict[str, Any] = geometry | {
            "padding_mode": "periodic" if padding_mode == "periodic" else "border"
        }

    def displacement(self, velocity: Tensor) -> Tensor:
        """How far what ends in each pixel has come, (B, R, *S), for a steady velocity (B, R, *S).

        In the units of the velocity times dt; the field is read at ``x - displacement(x)``.
        """
        return self._displacement([velocity])

    def _displacement(self, velocities: list[Tensor]) -> Tensor:
        """For velocities at equally spaced times, the last one at the end of the step."""
        stages, weights = _METHODS[self.method]
        h = self.dt / self.steps
        travelled: Tensor | None = None
        for step in range(self.steps):
            slope: Tensor | None = None
            total: Tensor | None = None
            for stage, weight in zip(stages, weights, strict=True):
                back = travelled
                if stage > 0 and slope is not None:
                    back = stage * h * slope if travelled is None else torch.add(travelled, slope, alpha=stage * h)
                velocity = _at(velocities, 1 - (step + stage) / self.steps)
                slope = velocity if back is None else bilinear_warp(velocity, back, **self._beyond)
                if weight > 0:
                    total = weight * slope if total is None else torch.add(total, slope, alpha=weight)
            assert total is not None
            travelled = h * total if travelled is None else torch.add(travelled, total, alpha=h)
        assert travelled is not None
        return travelled

    def forward(self, field: Tensor, velocity: Tensor) -> Tensor:
        for name, value in (("field", field), ("velocity", velocity)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        timed = velocity.dim() == field.dim() + 1
        shape = (field.shape[0], field.dim() - 2, *field.shape[2:])
        got = tuple(velocity.shape)
        if (got[:1] + got[2:] if timed else got) != shape or (timed and got[1] < 2):
            raise ValueError(
                f"velocity must have shape {shape}, or {(shape[0], 'K', *shape[1:])} at K >= 2 times, "
                f"for a field {tuple(field.shape)}, got {got}"
            )
        displacement = self._displacement(list(velocity.unbind(1)) if timed else [velocity])
        if self.warp is not None:
            advected: Tensor = self.warp(field, displacement)
            return advected
        return bilinear_warp(field, displacement, **self.geometry)

    def extra_repr(self) -> str:
        parts = [f"method={self.method!r}", f"kernel={self.kernel!r}", f"dt={self.dt:g}", f"steps={self.steps}"]
        return ", ".join([*parts, f"padding_mode={self.geometry['padding_mode']!r}"])


def _at(velocities: list[Tensor], fraction: float) -> Tensor:
    """The velocity at a fraction of the step, by linear interpolation in time."""
    position = fraction * (len(velocities) - 1)
    before = int(position)
    if before == position:
        return velocities[before]
    return torch.lerp(velocities[before], velocities[before + 1], position - before)
