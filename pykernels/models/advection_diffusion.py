"""Forecasts of images that are carried along and diffuse, such as sea surface temperature.

    dI/dt + (w . grad) I = D lap I

A convolution-deconvolution network looks at the last images and estimates the motion w; the last image is warped by it
with a Gaussian kernel (:func:`pykernels.gaussian_warp`), which solves the equation over one frame. The result is
appended to the images, the oldest one is dropped, and so on. Only images are observed: the motion is learned because it
explains them, helped by penalties on its divergence, size and roughness.

Beside it, for comparison: the same with bilinear sampling, and the same network when it predicts the image itself.

Source: de Bezenac, Pajot and Gallinari, "Deep learning for physical processes: incorporating prior scientific
knowledge", ICLR 2018, and E. de Bezenac's thesis (Sorbonne Universite). The layers, the first weights and the
coefficients of the ``"published"`` network are those of the program that the authors released; the thesis does not
give them.

Checkpoints need safetensors (the extra ``models``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels._errors import InputError
from pykernels.models import _checkpoint
from pykernels.models._checkpoint import damage_named, part
from pykernels.models._training import DTYPES, AdamTraining
from pykernels.ops import bilinear_warp, diffusion_variance, flow_penalties, gaussian_warp

__all__ = [
    "AdvectionDiffusionForecaster",
    "AdvectionDiffusionTraining",
    "Forecast",
    "MotionEstimator",
    "Penalties",
    "charbonnier",
    "train_advection_diffusion",
]

Array: TypeAlias = npt.NDArray[Any]

MODEL, TRAINING = "advection_diffusion.model", "advection_diffusion.training"
INPUTS, HORIZON = 4, 6  # images seen and predicted in the publication

WARPS = ("gaussian", "bilinear", "direct")
LOSSES = ("squared", "charbonnier")
PADDING_MODES = ("zeros", "border", "reflection", "periodic")


class _Widths(NamedTuple):
    """Channels of a network, and what goes with them."""

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    published: bool  # batch normalisation, no biases, tiny first weights, motion in normalised units


SIZES = {
    "small": _Widths((16, 32, 64), (32, 16, 8), False),
    "published": _Widths((64, 128, 256, 512, 1024), (256, 128, 64, 32, 16), True),
}


class MotionEstimator(nn.Module):
    """Convolutions that halve the image, and up-samplings that bring it back, each beside what had its size before.

    The encoder's convolutions have stride 2, and from the third on each is followed by one of stride 1. The decoder
    doubles the size bilinearly and convolves. All kernels are 3x3 and all activations ReLU, but for the last
    convolution, which has none and sees the input too.

    Args:
        in_channels: images that it looks at.
        out_channels: 2 for a motion field.
        size: ``"published"``, five halvings, up to 1024 channels, 22 million parameters, with batch normalisation; or
            ``"small"``, three halvings, up to 64 channels, 90 thousand parameters, without.
        periodic: whether the other side of the image is beyond its border, rather than zeros as published. Then H and W
            must be multiples of 8, or of 32 for the published network.

    Shape:
        input (B, in_channels, H, W), output (B, out_channels, H, W).

    Raises:
        InputError: naming the argument that cannot be used.
    """

    def __init__(
        self, in_channels: int = INPUTS, out_channels: int = 2, size: str = "small", *, periodic: bool = False
    ) -> None:
        super().__init__()
        self.periodic = periodic
        convolution = _PeriodicConv2d if periodic else nn.Conv2d
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        _check_choice("size", size, SIZES)
        encoder, decoder, published = SIZES[size]

        def block(channels: int, width: int, *, stride: int = 1, normalised: bool = published) -> nn.Sequential:
            conv = convolution(channels, width, 3, stride, 1, bias=not published)
            return nn.Sequential(conv, *[nn.BatchNorm2d(width)] * normalised, nn.ReLU())

        self.encoder = nn.ModuleList()
        for level, (channels, width) in enumerate(pairwise((in_channels, *encoder))):
            blocks = [block(channels, width, stride=2)]
            if level >= 2:
                blocks.append(block(width, width))
            self.encoder.append(nn.Sequential(*blocks))
        self.decoder = nn.ModuleList()
        beside = (0, *encoder[-2::-1])  # channels that join before each up-sampling
        for (channels, width), skip in zip(pairwise((encoder[-1], *decoder)), beside, strict=True):
            self.decoder.append(block(channels + skip, width, normalised=False))
        self.last = convolution(decoder[-1] + in_channels, out_channels, 3, 1, 1, bias=False)
        self._first_weights(published)

    def _first_weights(self, published: bool) -> None:
        """The motion begins near zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if published:
                    nn.init.normal_(module.weight, std=0.02 / (9 * module.out_channels))
                else:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        if not published:
            nn.init.normal_(self.last.weight, std=1e-3)

    def forward(self, frames: Tensor) -> Tensor:
        multiple = 2 ** len(self.encoder)
        if self.periodic and any(size % multiple for size in frames.shape[2:]):
            raise InputError(
                f"the sizes of a periodic image must be multiples of {multiple}, got {tuple(frames.shape[2:])}"
            )
        # Pixel by pixel: convolutions and up-samplings of few channels take half the time so.
        levels = [frames.contiguous(memory_format=torch.channels_last)]
        for level in self.encoder:
            levels.append(level(levels[-1]))
        x = levels.pop()
        for block in self.decoder:
            beside = levels.pop()
            x = torch.cat([beside, block(self._doubled(x, beside))], 1)
        flow: Tensor = self.last(x)
        return flow.contiguous()

    def _doubled(self, x: Tensor, like: Tensor) -> Tensor:
        """Up-sampled to the size of another."""
        if self.periodic:
            return F.interpolate(_wrapped(x), scale_factor=2, mode="bilinear")[..., 2:-2, 2:-2]
        return F.interpolate(x, size=like.shape[2:], mode="bilinear")


class _PeriodicConv2d(nn.Conv2d):
    """With the other side of the image in the place of zeros. PyTorch's own circular padding takes twice as long."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(_wrapped(x), self.weight, self.bias, self.stride)


def _wrapped(x: Tensor) -> Tensor:
    """An image (B, C, H, W) with one more row and column on each side, from the other one."""
    x = torch.cat([x[..., -1:, :], x, x[..., :1, :]], -2)
    return torch.cat([x[..., -1:], x, x[..., :1]], -1)


class Forecast(NamedTuple):
    """Predicted images (B, T, H, W), and the motion (B, T, 2, H, W) that led to each, in pixels per frame.

    Channel 0 of the motion is along the last axis. It is None where the network predicted the images directly.
    """

    images: Any
    flows: Any


class AdvectionDiffusionForecaster(nn.Module):
    """A motion estimator and the warp that it steers.

    Args:
        size: of the :class:`MotionEstimator`, ``"small"`` or ``"published"``.
        warp: how the motion is applied: ``"gaussian"``, ``"bilinear"``, or ``"direct"`` for none at all, where the
            network predicts the image.
        diffusivity: D in pixels squared per frame; where it is learned, to begin with.
        learn_diffusivity: whether it is a parameter (``softplus`` of one, so that it stays positive).
        form, normalize: of :func:`pykernels.gaussian_warp`. The normalised density does not blur beyond its variance.
        padding_mode: beyond the border, for the warp. The convolutions see zeros there, or with ``"periodic"`` the
            other side.
        inputs: images seen.
        dtype: ``"float32"`` or ``"float64"``.
        device: of the parameters. The first weights do not depend on it.
        seed: of the first weights; None to draw from PyTorch's global random numbers.

    Attributes:
        estimator: the network.
        options: the arguments of the constructor, without the device and the seed.

    Raises:
        InputError: naming the argument that cannot be used.
    """

    def __init__(
        self,
        size: str = "small",
        *,
        warp: str = "gaussian",
        diffusivity: float = 0.45,
        learn_diffusivity: bool = True,
        form: str = "density",
        normalize: str = "window",
        padding_mode: str = "reflection",
        inputs: int = INPUTS,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _check_choice("warp", warp, WARPS)
        _check_choice("form", form, ("density", "integrated"))
        _check_choice("normalize", normalize, ("none", "window", "inside"))
        _check_choice("padding_mode", padding_mode, PADDING_MODES)
        _check_choice("dtype", dtype, DTYPES)
        if not (0 <= diffusivity < math.inf and (diffusivity > 0 or not learn_diffusivity)):
            raise InputError(f"diffusivity must be positive, or 0 if it is not learned, got {diffusivity!r}")
        if inputs < 1:
            raise InputError(f"inputs must be at least 1, got {inputs}")
        self.options: dict[str, Any] = {
            "size": size,
            "warp": warp,
            "diffusivity": float(diffusivity),
            "learn_diffusivity": bool(learn_diffusivity),
            "form": form,
            "normalize": normalize,
            "padding_mode": padding_mode,
            "inputs": int(inputs),
            "dtype": dtype,
        }
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            self.estimator = MotionEstimator(
                inputs, 1 if warp == "direct" else 2, size, periodic=padding_mode == "periodic"
            )
        if warp == "gaussian" and learn_diffusivity:
            self.raw_diffusivity = nn.Parameter(torch.tensor(diffusivity + math.log(-math.expm1(-diffusivity))))
        self.to(device, DTYPES[dtype])

    @property
    def diffusivity(self) -> float | Tensor | None:
        """D as it is now, in pixels squared per frame: a tensor where it is learned, None where there is none."""
        if self.options["warp"] != "gaussian":
            return None
        if self.options["learn_diffusivity"]:
            return F.softplus(self.raw_diffusivity)
        fixed: float = self.options["diffusivity"]
        return fixed

    def forward(self, frames: Tensor, steps: int = HORIZON) -> Forecast:
        """The images that follow.

        Args:
            frames: (B, inputs, H, W), oldest first.
            steps: how many images to predict. Gradients pass through all of them.

        Returns:
            Images (B, steps, H, W), and motion (B, steps, 2, H, W) or None.
        """
        images, flows = [], []
        for _ in range(steps):
            output = self.estimator(frames)
            if self.options["warp"] == "direct":
                image = output
            else:
                flow = self._in_pixels(output)
                flows.append(flow)
                image = self._warped(frames[:, -1:], flow)
            images.append(image)
            frames = torch.cat([frames[:, 1:], image], 1)
        return Forecast(torch.cat(images, 1), torch.stack(flows, 1) if flows else None)

    def _in_pixels(self, output: Tensor) -> Tensor:
        """Of the published network's motion, which is relative to half the image."""
        if not SIZES[self.options["size"]].published:
            return output
        height, width = output.shape[2:]
        return output * output.new_tensor([(width - 1) / 2, (height - 1) / 2]).view(2, 1, 1)

    def _warped(self, image: Tensor, flow: Tensor) -> Tensor:
        padding_mode = self.options["padding_mode"]
        diffusivity = self.diffusivity
        if diffusivity is None:
            return bilinear_warp(image, flow, padding_mode=padding_mode)
        return gaussian_warp(
            image,
            flow,
            diffusion_variance(diffusivity, 1),
            form=self.options["form"],
            normalize=self.options["normalize"],
            padding_mode=padding_mode,
        )

    def predict(self, frames: npt.ArrayLike, steps: int = HORIZON, *, batch_size: int = 64) -> Forecast:
        """As :meth:`forward`, for arrays, without gradients and in evaluation mode.

        Args:
            frames: (B, inputs, H, W), oldest first; finite.
            steps: how many images to predict.
            batch_size: of these at a time.

        Raises:
            InputError: if ``frames`` has another shape, or numbers that are not finite, or ``steps`` is not positive.
        """
        frames = np.asarray(frames)
        if frames.ndim != 4 or frames.shape[1] != self.options["inputs"] or not len(frames):
            raise InputError(f"frames must have shape (B, {self.options['inputs']}, H, W), got {frames.shape}")
        _check_finite("frames", frames)
        for name, value in (("steps", steps), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        like = next(self.parameters())
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                parts = [self(part.to(like), steps) for part in torch.as_tensor(frames).split(batch_size)]
        finally:
            self.train(training)
        images, flows = zip(*parts, strict=True)
        return Forecast(torch.cat(images).cpu().numpy(), None if flows[0] is None else torch.cat(flows).cpu().numpy())

    def save(
        self,
        path: str | Path,
        *,
        about: Mapping[str, Any] | None = None,
        arrays: Mapping[str, Array] | None = None,
    ) -> None:
        """Write the model to one file of tensors and JSON (safetensors), whole or not at all.

        Args:
            path: the file.
            about: kept with it, for readers; what JSON can hold.
            arrays: kept with it too, such as what normalises its data.
        """
        tensors = {f"model.{name}": tensor for name, tensor in self.state_dict().items()}
        tensors |= {f"arrays.{name}": torch.as_tensor(array) for name, array in (arrays or {}).items()}
        _checkpoint.save(Path(path), MODEL, tensors, {"options": self.options, "about": dict(about or {})})

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Read what :meth:`save` wrote; nothing in the file is executed. It predicts the same, bit for bit.

        Raises:
            InputError: if the file is something else, damaged or of a newer version. A :class:`ValueError`.
        """
        return cls.load_all(path, device=device)[0]

    @classmethod
    def load_all(
        cls, path: str | Path, *, device: str | torch.device = "cpu"
    ) -> tuple[Self, dict[str, Any], dict[str, Array]]:
        """As :meth:`load`, with the ``about`` and the ``arrays`` that were kept with the model."""
        path = Path(path)
        tensors, values = _checkpoint.load(path, MODEL)
        with damage_named(path):
            model = cls(**values["options"], seed=0)
            model.load_state_dict(part(tensors, "model."))
            about = dict(values["about"])
        arrays = {name: tensor.numpy() for name, tensor in part(tensors, "arrays.").items()}
        return model.to(device), about, arrays


class Penalties(NamedTuple):
    """Coefficients of :func:`pykernels.flow_penalties`, for motion in pixels per frame."""

    divergence: float = 0.0
    magnitude: float = 0.0
    smoothness: float = 0.0

    @classmethod
    def published(cls, size: int) -> Penalties:
        """Those of the authors' program, 1, -0.003 and 0.4, converted for images of ``size`` pixels.

        They are for motion in units of which 2 are the width of the image, or (size - 1) pixels, so that in pixels
        squares are larger by ((size - 1) / 2)^2. The program's magnitude is the mean of both components' squares, half
        of the squared length that is penalised here.
        """
        if size < 2:
            raise InputError(f"size must be at least 2, got {size}")
        square = (2 / (size - 1)) ** 2
        return cls(square, -0.0015 * square, 0.4 * square)


def charbonnier(error: Tensor, eps: float = 1e-3, exponent: float = 0.45) -> Tensor:
    """The generalised Charbonnier penalty ``(error^2 + eps^2)^exponent`` of each number, a smooth absolute value.

    Exponent 1/2 is the pseudo-Huber loss, and 1 the square. The thesis and the released program print two other forms.
    """
    return (error.square() + eps**2) ** exponent


class AdvectionDiffusionTraining(AdamTraining[AdvectionDiffusionForecaster]):
    """The training of a forecaster on image sequences, step by step, which can be saved and continued.

    Each step forecasts a batch from its first images, and minimises the mean over lead times and pixels of the loss of
    the forecast error, and the penalties of the motion. Validation is by the mean squared error.

    Args:
        model: trained in place.
        sequences: to learn from, shape (N, inputs + horizon, H, W); finite, land included.
        validation: sequences to choose the best model by, or None.
        valid: which pixels count, True for sea: shape (H, W), or (N, H, W) for each sequence; None for all.
        validation_valid: the same for ``validation``.
        border: so many pixels along the edges do not count.
        n_steps: at most so many, each on a batch.
        batch_size: of sequences; they are shuffled once in each pass over them.
        loss: ``"squared"`` or ``"charbonnier"`` (:func:`charbonnier`).
        penalties: of the motion, in pixels.
        learning_rate, betas, weight_decay: of Adam. The diffusivity does not decay.
        validate_every: steps between two validations.
        patience: validations without a new best after which the training is done; None for no early stop.
        seed: of the shuffles.

    Attributes:
        steps_done: how many steps are done.
        seconds: the time they took, with the validations.
        validations: the steps after which the model was validated, and its errors then.
        best_step: of the weights with the smallest validation error so far.
    """

    def __init__(
        self,
        model: AdvectionDiffusionForecaster,
        sequences: npt.ArrayLike,
        validation: npt.ArrayLike | None = None,
        *,
        valid: npt.ArrayLike | None = None,
        validation_valid: npt.ArrayLike | None = None,
        border: int = 0,
        n_steps: int = 2000,
        batch_size: int = 16,
        loss: str = "squared",
        penalties: Penalties = Penalties(),  # noqa: B008  (immutable)
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        validate_every: int = 100,
        patience: int | None = None,
        seed: int = 0,
    ) -> None:
        _check_choice("loss", loss, LOSSES)
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= weight_decay < math.inf:
            raise InputError(f"weight_decay must not be negative, got {weight_decay!r}")
        diffusivity = [p for name, p in model.named_parameters() if name == "raw_diffusivity"]
        super().__init__(
            model,
            n_steps=n_steps,
            learning_rate=learning_rate,
            validate_every=validate_every,
            patience=patience,
            groups=[
                {"params": list(model.estimator.parameters()), "weight_decay": weight_decay},
                *[{"params": diffusivity}] * bool(diffusivity),
            ],
            betas=betas,
        )
        self.batch_size = batch_size
        self.loss = loss
        self.penalties = penalties
        self._more_settings = {"border": border, "betas": list(betas), "weight_decay": weight_decay, "seed": seed}
        self._seed = seed
        self._order: tuple[int, Array] = (-1, np.empty(0, dtype=np.int64))
        self._sequences = self._prepared("sequences", sequences)
        self._weights = self._counted("valid", valid, self._sequences, border)
        self._validated = None if validation is None else self._prepared("validation", validation)
        self._validated_weights = (
            None
            if self._validated is None
            else self._counted("validation_valid", validation_valid, self._validated, border)
        )

    def _prepared(self, name: str, sequences: npt.ArrayLike) -> Tensor:
        array = np.asarray(sequences)
        inputs = self.model.options["inputs"]
        if array.ndim != 4 or array.shape[1] <= inputs or not len(array):
            raise InputError(
                f"{name} must have shape (N, T, H, W), N at least 1 and T at least {inputs + 1}, got {array.shape}"
            )
        _check_finite(name, array)
        return torch.as_tensor(array).to(next(self.model.parameters()))

    def _counted(self, name: str, valid: npt.ArrayLike | None, sequences: Tensor, border: int) -> Tensor | None:
        """Weights (1 or N, H, W) whose sum is that of all pixels, or None."""
        weights = counted_pixels(name, valid, (len(sequences), *sequences.shape[2:]), border)
        return None if weights is None else torch.as_tensor(weights / weights.mean()).to(sequences)

    def _batch(self) -> Tensor:
        """Indices of this step's sequences, which follow from its number and the seed."""
        count = len(self._sequences)
        size = min(self.batch_size, count)
        epoch, position = divmod(self.steps_done, count // size)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(count)
        return torch.as_tensor(self._order[1][position * size : (position + 1) * size])

    def _loss(self) -> Tensor:
        self.model.train()
        chosen = self._batch().to(self._sequences.device)
        sequences = self._sequences[chosen]
        images, flows = self._forecast(sequences)
        error = images - sequences[:, self.model.options["inputs"] :]
        values = error.square() if self.loss == "squared" else charbonnier(error)
        weights = self._weights if self._weights is None or len(self._weights) == 1 else self._weights[chosen]
        loss = _weighted_mean(values, weights)
        if flows is not None and any(self.penalties):
            loss = loss + flow_penalties(flows.flatten(0, 1), **self.penalties._asdict())
        return loss

    def _forecast(self, sequences: Tensor) -> Forecast:
        inputs = self.model.options["inputs"]
        forecast: Forecast = self.model(sequences[:, :inputs], sequences.shape[1] - inputs)
        return forecast

    def _validation(self) -> Tensor | None:
        if self._validated is None:
            return None
        self.model.eval()
        inputs = self.model.options["inputs"]
        parts = [self._forecast(part).images for part in self._validated.split(64)]
        return _weighted_mean((torch.cat(parts) - self._validated[:, inputs:]).square(), self._validated_weights)

    def _settings(self) -> dict[str, Any]:
        return {
            "model": self.model.options,
            "sequences": list(self._sequences.shape),
            "validation": None if self._validated is None else list(self._validated.shape),
            "n_steps": self.n_steps,
            "batch_size": self.batch_size,
            "loss": self.loss,
            "penalties": list(self.penalties),
            "learning_rate": self.learning_rate,
            "validate_every": self.validate_every,
            "patience": self.patience,
            **self._more_settings,
        }


def train_advection_diffusion(
    model: AdvectionDiffusionForecaster,
    sequences: npt.ArrayLike,
    validation: npt.ArrayLike | None = None,
    *,
    on_step: Callable[[int, float], None] | None = None,
    **options: Any,
) -> AdvectionDiffusionTraining:
    """Train a model in place: all steps of an :class:`AdvectionDiffusionTraining`, whose arguments it takes.

    Args:
        on_step: called after each step with the number of steps done and the loss.

    Returns:
        The training, done.

    Raises:
        FloatingPointError: if the training diverges.
    """
    training = AdvectionDiffusionTraining(model, sequences, validation, **options)
    while not training.done:
        loss = training.step()
        if on_step is not None:
            on_step(training.steps_done, loss)
    return training


def counted_pixels(
    name: str, valid: npt.ArrayLike | None, shape: tuple[int, int, int], border: int
) -> npt.NDArray[np.bool_] | None:
    """Which pixels count, (1 or N, H, W), from a mask and a border; None for all.

    Raises:
        InputError: if the mask has another shape or type, or no pixel is left.
    """
    _, height, width = shape
    if not 0 <= 2 * border < min(height, width):
        raise InputError(f"border must be from 0 to less than half of the image {height} x {width}, got {border}")
    if valid is None and border == 0:
        return None
    inside = np.zeros((1, height, width), dtype=np.bool_)
    inside[:, border : height - border, border : width - border] = True
    if valid is not None:
        mask = np.asarray(valid)
        if mask.dtype != np.bool_ or mask.shape not in ((height, width), shape):
            raise InputError(
                f"{name} must be boolean, of shape ({height}, {width}) or {shape}, got {mask.dtype} {mask.shape}"
            )
        inside = inside & (mask if mask.ndim == 3 else mask[None])
    if not inside.any():
        raise InputError(f"{name} and border leave no pixel that counts")
    return inside


def _weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Of values (N, T, H, W) with weights (1 or N, H, W)."""
    return values.mean() if weights is None else (values * weights.unsqueeze(1)).mean()


def _check_choice(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def _check_finite(name: str, array: Array) -> None:
    if not np.isfinite(array).all():
        raise InputError(f"{name} contains {'NaN' if np.isnan(array).any() else 'infinity'}")
