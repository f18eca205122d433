"""Generator networks trained on mini-batches by the witness of an infinitely wide discriminator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pykernels._errors import InputError
from pykernels.models import _checkpoint
from pykernels.models._checkpoint import damage_named
from pykernels.models._gantk_finite import WideNetwork
from pykernels.models._gantk_kernels import InfiniteDiscriminator, mmd
from pykernels.models._training import DTYPES, AdamTraining

GENERATOR = "gantk.generator"


class WitnessLoss(nn.Module):
    """The cost of generated points under an infinitely wide discriminator that was trained on them and on data.

    With the loss ``"ipm"`` this is training by the maximum mean discrepancy of the kernel. The discriminator is held
    fixed in the gradient: that of the cost is multiplied with what the points depend on.

    Args:
        discriminator: trained anew for each batch.

    Shape:
        fake (N, d) and real (M, d) to ().
    """

    def __init__(self, discriminator: InfiniteDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        x = fake.detach()
        loss = self.discriminator.loss
        self.discriminator.train(torch.cat((x, real)), len(x))
        value, gradient = self.discriminator(x)
        direction = loss.slope(value)[:, None] * gradient / len(x)
        # The second term is zero, and has the gradient.
        return loss.cost(value).mean() + ((fake - x) * direction).sum()


class Generator(WideNetwork):
    """A multilayer perceptron from Gaussian inputs to points.

    Args:
        n_inputs: Gaussian numbers for a point.
        n_features: of a point.
        kernel, width: as for :class:`WideNetwork`.
        dtype: ``"float32"`` or ``"float64"``.
        device: of the weights.
        seed: of the weights.
    """

    def __init__(
        self,
        n_inputs: int,
        n_features: int,
        kernel: str = "relu",
        *,
        width: int = 256,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        super().__init__(n_inputs, kernel, width=width, n_outputs=n_features, seed=seed, dtype=DTYPES[dtype])
        self.options: dict[str, Any] = {
            "n_inputs": n_inputs,
            "n_features": n_features,
            "kernel": kernel,
            "width": width,
            "dtype": dtype,
        }
        self.to(device)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).reshape(len(x), self.n_outputs)

    def inputs(self, count: int, seed: int | list[int]) -> Tensor:
        """Gaussian inputs (count, n_inputs)."""
        numbers = np.random.default_rng(seed).standard_normal((count, self.options["n_inputs"]))
        return torch.from_numpy(numbers).to(self.weights[0])

    def sample(self, count: int, *, seed: int = 0) -> npt.NDArray[np.float64]:
        """Points (count, n_features)."""
        with torch.no_grad():
            points: npt.NDArray[np.float64] = self(self.inputs(count, seed)).double().cpu().numpy()
        return points

    def save(self, path: str | Path, *, about: Mapping[str, Any] | None = None) -> None:
        """Write the generator to one file (safetensors), whole or not at all; ``about`` is kept with it."""
        _checkpoint.save(
            Path(path), GENERATOR, self.state_dict(), {"options": self.options, "about": dict(about or {})}
        )

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Generator:
        """Read what :meth:`save` wrote; nothing in the file is executed.

        Raises:
            InputError: if the file is something else, damaged or of a newer version. A :class:`ValueError`.
        """
        path = Path(path)
        tensors, values = _checkpoint.load(path, GENERATOR)
        with damage_named(path):
            generator = cls(**values["options"])
            generator.load_state_dict(tensors)
        return generator.to(device)


class GeneratorTraining(AdamTraining[Generator]):
    """The training of a generator on mini-batches by Adam, which can be saved and continued bit for bit.

    Args:
        generator: trained in place.
        real: data, (M, d).
        discriminator: gives the gradient; see :class:`WitnessLoss`.
        n_steps: how many.
        batch_size: generated points, and data drawn for them without repetition, in each step.
        learning_rate: of Adam.
        validate_every: steps between two validations, each by the discrepancy between fixed generated points and as
            many data by the discriminator's kernel; the weights of the best one are kept.
        seed: of all that is drawn.

    Raises:
        InputError: naming the argument that cannot be used.
    """

    def __init__(
        self,
        generator: Generator,
        real: npt.ArrayLike,
        discriminator: InfiniteDiscriminator,
        *,
        n_steps: int = 5000,
        batch_size: int = 256,
        learning_rate: float = 1e-2,
        validate_every: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(
            generator, n_steps=n_steps, learning_rate=learning_rate, validate_every=validate_every, patience=None
        )
        real = np.asarray(real, dtype=np.float64)
        if real.ndim != 2 or real.shape[1] != generator.n_outputs or not np.isfinite(real).all():
            raise InputError(f"real must be finite and have shape (M, {generator.n_outputs}), got {real.shape}")
        if not 1 <= batch_size <= len(real):
            raise InputError(f"batch_size must be from 1 to {len(real)}, the number of data; got {batch_size}")
        self.batch_size = batch_size
        self.seed = seed
        self._real = torch.from_numpy(real).to(generator.weights[0])
        self._witness = WitnessLoss(discriminator)

    def _loss(self) -> Tensor:
        # Draws depend on the step alone, so that there is nothing of them to save.
        random = np.random.default_rng([self.seed, 1, self.steps_done])
        chosen = torch.from_numpy(random.permutation(len(self._real))[: self.batch_size]).to(self._real.device)
        fake = self.model(self.model.inputs(self.batch_size, [self.seed, 2, self.steps_done]))
        loss: Tensor = self._witness(fake, self._real[chosen])
        return loss

    def _validation(self) -> Tensor:
        count = min(len(self._real), 1024)
        discriminator = self._witness.discriminator
        fake = self.model(self.model.inputs(count, [self.seed, 3]))
        return mmd(fake, self._real[:count], discriminator.ntk, kind=discriminator.kind)

    def _settings(self) -> dict[str, Any]:
        return {
            "generator": self.model.options,
            "discriminator": self._witness.discriminator.options,
            "data": len(self._real),
            "n_steps": self.n_steps,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "validate_every": self.validate_every,
            "seed": self.seed,
        }
