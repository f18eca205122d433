"""Neural ODE: a vector field learned from observed trajectories.

    dy/dt = f(y),   f a multilayer perceptron,

integrated by a fixed-step method with one step from each observation to the next. A trajectory is predicted from its
first state alone, and the mean squared error over all of it is minimised by Adam on the whole training set at once.

The defaults are those of the published comparison on the damped pendulum: 2-200-200-2 with ReLU, orthogonal weights of
gain 0.2 and zero biases, Kutta's 3/8 rule, learning rate 1e-3, at most 5000 steps, the model with the best validation
error kept. When to stop early is not published; here it is after ten validations without a new best.

Source: Yin, Le Guen, Dona, de Bezenac, Ayed, Thome and Gallinari, "Augmenting physical models with deep networks for
complex dynamics forecasting" (APHYNITY), ICLR 2021, the Neural ODE of its tables; Chen, Rubanova, Bettencourt and
Duvenaud, "Neural ordinary differential equations", NeurIPS 2018.

Checkpoints need safetensors (the extra ``models``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pykernels._errors import InputError
from pykernels.models import _checkpoint
from pykernels.models._checkpoint import damage_named
from pykernels.models._training import DTYPES, AdamTraining
from pykernels.nn import MLPField
from pykernels.ops import odeint
from pykernels.ops.latent_ode.tableaux import TABLEAUX

__all__ = ["NeuralODE", "NeuralODETraining", "log_mse", "train_neural_ode"]

Array: TypeAlias = npt.NDArray[Any]

MODEL, TRAINING = "neural_ode.model", "neural_ode.training"


class NeuralODE(nn.Module):
    """A vector field, and its trajectories.

    Args:
        n_features: size D of the state.
        hidden: units of each hidden layer.
        activation: of the hidden layers; see :class:`pykernels.nn.MLPField`.
        method: of integration; one of the fixed-step methods of :func:`pykernels.odeint`.
        gain: of the orthogonal first weights.
        dtype: ``"float32"`` or ``"float64"``.
        device: of the parameters. The first weights do not depend on it.
        seed: of the first weights; None to draw from PyTorch's global random numbers.

    Attributes:
        field: the :class:`pykernels.nn.MLPField`.
        options: the arguments of the constructor, without the device and the seed.

    Raises:
        InputError: naming the argument that cannot be used.
    """

    def __init__(
        self,
        n_features: int = 2,
        hidden: Sequence[int] = (200, 200),
        activation: str = "relu",
        *,
        method: str = "rk4",
        gain: float = 0.2,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        widths = [n_features, *hidden]
        if any(int(width) != width or width < 1 for width in widths):
            raise InputError(f"n_features and hidden must be positive integers, got {n_features} and {tuple(hidden)}")
        widths = [int(width) for width in widths]
        if method not in TABLEAUX:
            raise InputError(f"method must be one of {', '.join(TABLEAUX)}; got {method!r}")
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        self.options: dict[str, Any] = {
            "n_features": int(n_features),
            "hidden": [int(width) for width in hidden],
            "activation": activation,
            "method": method,
            "gain": gain,
            "dtype": dtype,
        }
        self.method = method
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            self.field = MLPField((*widths, widths[0]), activation, dtype=DTYPES[dtype])
            for name, parameter in self.field.named_parameters():
                if parameter.ndim == 2:
                    nn.init.orthogonal_(parameter, gain)
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)
        self.to(device)

    def forward(self, y0: Tensor, t: Tensor) -> Tensor:
        """The trajectories that begin at ``y0``.

        Args:
            y0: states at ``t[0]``, shape (B, D).
            t: increasing or decreasing times, shape (T,); the method takes one step from each to the next.

        Returns:
            States, shape (T, B, D).
        """
        states: Tensor = odeint(self.field, y0, t, method=self.method)
        return states

    def predict(self, y0: npt.ArrayLike, times: npt.ArrayLike) -> Array:
        """As :meth:`forward`, for arrays and without gradients: shape (B, D) to (B, T, D).

        Raises:
            InputError: if ``y0`` or ``times`` has another shape, or numbers that are not finite.
        """
        y0, times = np.asarray(y0, dtype=np.float64), np.asarray(times, dtype=np.float64)
        if y0.ndim != 2 or y0.shape[1] != self.options["n_features"]:
            raise InputError(f"y0 must have shape (B, {self.options['n_features']}), got {y0.shape}")
        _check_times(times)
        _check_finite("y0", y0)
        like = next(self.parameters())
        with torch.no_grad():
            states = self(torch.as_tensor(y0).to(like), _since_first(times).to(like))
        trajectories: Array = states.transpose(0, 1).cpu().numpy()
        return trajectories

    def derivative(self, states: npt.ArrayLike) -> Array:
        """The learned vector field at these states, both of shape (..., D), for arrays and without gradients."""
        states = np.asarray(states, dtype=np.float64)
        if states.ndim < 1 or states.shape[-1] != self.options["n_features"]:
            raise InputError(f"states must have shape (..., {self.options['n_features']}), got {states.shape}")
        like = next(self.parameters())
        with torch.no_grad():
            values: Array = self.field(like.new_zeros(()), torch.as_tensor(states).to(like)).cpu().numpy()
        return values

    def save(self, path: str | Path, *, about: Mapping[str, Any] | None = None) -> None:
        """Write the model to one file of tensors and JSON (safetensors), whole or not at all.

        Args:
            path: the file.
            about: kept with it, for readers; what JSON can hold.
        """
        _checkpoint.save(Path(path), MODEL, self.state_dict(), {"options": self.options, "about": dict(about or {})})

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Read what :meth:`save` wrote; nothing in the file is executed. It predicts the same, bit for bit.

        Raises:
            InputError: if the file is something else, damaged or of a newer version. A :class:`ValueError`.
        """
        path = Path(path)
        tensors, values = _checkpoint.load(path, MODEL)
        with damage_named(path):
            model = cls(**values["options"], seed=0)
            if any(tensor.dtype != DTYPES[model.options["dtype"]] for tensor in tensors.values()):
                raise InputError(f"the weights are not all {model.options['dtype']}")
            model.load_state_dict(tensors)
        return model.to(device)


class NeuralODETraining(AdamTraining[NeuralODE]):
    """The training of a model on observed trajectories, step by step, which can be saved and continued.

    A training restored from the :meth:`state` of another one goes on as that one would, bit for bit. When it is done,
    the model has the weights of its best validation, or without validation trajectories the last ones.

    Args:
        model: trained in place.
        times: of the observations, increasing, shape (T,), T at least 2.
        states: trajectories to learn from, shape (N, T, D); finite.
        validation: trajectories to choose the best model by, shape (M, T, D), or None.
        n_steps: at most so many, each on all trajectories.
        learning_rate: of Adam.
        validate_every: steps between two validations.
        patience: validations without a new best after which the training is done; None for no early stop.

    Attributes:
        steps_done: how many steps are done.
        seconds: the time they took, with the validations.
        validations: the steps after which the model was validated, and its errors then.
        best_step: of the weights with the smallest validation error so far.
    """

    def __init__(
        self,
        model: NeuralODE,
        times: npt.ArrayLike,
        states: npt.ArrayLike,
        validation: npt.ArrayLike | None = None,
        *,
        n_steps: int = 5000,
        learning_rate: float = 1e-3,
        validate_every: int = 100,
        patience: int | None = 10,
    ) -> None:
        super().__init__(
            model, n_steps=n_steps, learning_rate=learning_rate, validate_every=validate_every, patience=patience
        )
        times = np.asarray(times, dtype=np.float64)
        _check_times(times)
        self._like = next(model.parameters())
        self._times = _since_first(times).to(self._like)
        self._states = self._prepared("states", states)
        self._validated = None if validation is None else self._prepared("validation", validation)

    def _prepared(self, name: str, states: npt.ArrayLike) -> Tensor:
        """The states, time first: (T, N, D)."""
        array = np.asarray(states, dtype=np.float64)
        shape = (len(self._times), self.model.options["n_features"])
        if array.ndim != 3 or array.shape[1:] != shape or not len(array):
            raise InputError(f"{name} must have shape (N, {shape[0]}, {shape[1]}), N at least 1, got {array.shape}")
        _check_finite(name, array)
        return torch.as_tensor(array).transpose(0, 1).contiguous().to(self._like)

    def _error(self, states: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.model(states[0], self._times), states)

    def _loss(self) -> Tensor:
        return self._error(self._states)

    def _validation(self) -> Tensor | None:
        return None if self._validated is None else self._error(self._validated)

    def _settings(self) -> dict[str, Any]:
        return {
            "model": self.model.options,
            "times": self._times.tolist(),
            "trajectories": self._states.shape[1],
            "validation": None if self._validated is None else self._validated.shape[1],
            "n_steps": self.n_steps,
            "learning_rate": self.learning_rate,
            "validate_every": self.validate_every,
            "patience": self.patience,
        }


def train_neural_ode(
    model: NeuralODE,
    times: npt.ArrayLike,
    states: npt.ArrayLike,
    validation: npt.ArrayLike | None = None,
    *,
    on_step: Callable[[int, float], None] | None = None,
    **options: Any,
) -> NeuralODETraining:
    """Train a model in place: all steps of a :class:`NeuralODETraining`, whose arguments it takes.

    Args:
        on_step: called after each step with the number of steps done and the loss.

    Returns:
        The training, done.

    Raises:
        FloatingPointError: if the training diverges.
    """
    training = NeuralODETraining(model, times, states, validation, **options)
    while not training.done:
        loss = training.step()
        if on_step is not None:
            on_step(training.steps_done, loss)
    return training


def log_mse(predicted: npt.ArrayLike, states: npt.ArrayLike) -> float:
    """Natural logarithm of the mean squared error, as published for the pendulum. Both have shape (N, T, D)."""
    predicted, states = np.asarray(predicted, dtype=np.float64), np.asarray(states, dtype=np.float64)
    if predicted.shape != states.shape:
        raise InputError(f"predicted and states must have the same shape, got {predicted.shape} and {states.shape}")
    return float(np.log(np.square(predicted - states).mean()))


def _since_first(times: Array) -> Tensor:
    """Only differences of times matter to a field that does not depend on time; those of a clock need more digits."""
    return torch.as_tensor(times - times[0])


def _check_times(times: Array) -> None:
    if times.ndim != 1 or len(times) < 2:
        raise InputError(f"times must have shape (T,), T at least 2, got {times.shape}")
    if not (np.isfinite(times).all() and (np.diff(times) > 0).all()):
        raise InputError("times must be finite and increasing")


def _check_finite(name: str, array: Array) -> None:
    if not np.isfinite(array).all():
        raise InputError(f"{name} contains {'NaN' if np.isnan(array).any() else 'infinity'}")
