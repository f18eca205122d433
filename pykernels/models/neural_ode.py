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

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pykernels._errors import InputError
from pykernels.models import _checkpoint
from pykernels.models._checkpoint import damage_named, part
from pykernels.nn import MLPField
from pykernels.ops import odeint
from pykernels.ops.latent_ode.tableaux import TABLEAUX

__all__ = ["NeuralODE", "NeuralODETraining", "log_mse", "train_neural_ode"]

Array: TypeAlias = npt.NDArray[Any]

MODEL, TRAINING = "neural_ode.model", "neural_ode.training"
DTYPES = {"float32": torch.float32, "float64": torch.float64}


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


class NeuralODETraining:
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
        validation_loss: the last one, None before the first.
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
        for name, value in (("n_steps", n_steps), ("validate_every", validate_every), ("patience", patience)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not 0 < learning_rate < math.inf:
            raise InputError(f"learning_rate must be positive, got {learning_rate!r}")
        times = np.asarray(times, dtype=np.float64)
        _check_times(times)
        self._like = next(model.parameters())
        self._times = _since_first(times).to(self._like)
        self._states = self._prepared("states", states, model)
        self._validation = None if validation is None else self._prepared("validation", validation, model)
        self.model = model
        self.n_steps = n_steps
        self.learning_rate = learning_rate
        self.validate_every = validate_every
        self.patience = patience
        self.steps_done = 0
        self.seconds = 0.0
        self.validations: list[tuple[int, float]] = []
        self.best_step = 0
        self._best = _copies(model)
        self._losses = np.zeros(n_steps)
        self._optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)

    def _prepared(self, name: str, states: npt.ArrayLike, model: NeuralODE) -> Tensor:
        """The states, time first: (T, N, D)."""
        array = np.asarray(states, dtype=np.float64)
        shape = (len(self._times), model.options["n_features"])
        if array.ndim != 3 or array.shape[1:] != shape or not len(array):
            raise InputError(f"{name} must have shape (N, {shape[0]}, {shape[1]}), N at least 1, got {array.shape}")
        _check_finite(name, array)
        return torch.as_tensor(array).transpose(0, 1).contiguous().to(self._like)

    @property
    def done(self) -> bool:
        return self.steps_done >= self.n_steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether there have been too many validations without a new best."""
        since = sum(step > self.best_step for step, _ in self.validations)
        return self.patience is not None and since >= self.patience

    @property
    def losses(self) -> npt.NDArray[np.float64]:
        """The loss of each step done."""
        return self._losses[: self.steps_done].copy()

    @property
    def validation_loss(self) -> float | None:
        return self.validations[-1][1] if self.validations else None

    def step(self) -> float:
        """Do one step and return its loss, the mean squared error before it.

        Raises:
            FloatingPointError: if a trajectory or the loss is not finite.
            RuntimeError: if the training is done.
        """
        if self.done:
            raise RuntimeError(f"this training is done, after {self.steps_done} steps")
        start = time.perf_counter()
        try:
            loss = self._descend()
            if self._validation is not None and (
                self.steps_done % self.validate_every == 0 or self.steps_done == self.n_steps
            ):
                self._validate(self._validation)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"the training diverges at step {self.steps_done + 1}: {error}; use a smaller learning_rate"
            ) from error
        self.seconds += time.perf_counter() - start
        return loss

    def _descend(self) -> float:
        self._optimizer.zero_grad()
        loss = self._loss(self._states)
        loss.backward()
        self._optimizer.step()
        value = _finite(loss)
        self._losses[self.steps_done] = value
        self.steps_done += 1
        return value

    def _loss(self, states: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.model(states[0], self._times), states)

    def _validate(self, validation: Tensor) -> None:
        with torch.no_grad():
            value = _finite(self._loss(validation))
        if not self.validations or value < min(error for _, error in self.validations):
            self.best_step = self.steps_done
            self._best = _copies(self.model)
        self.validations.append((self.steps_done, value))
        if self.done:
            self.model.load_state_dict(self._best)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that :meth:`restore` needs in a training made with the same arguments.

        Returns:
            Copies of the tensors (``model.*``, the weights, ``best.*``, those of the best validation, and ``adam.*``,
            the moments and steps of the optimiser), and values that JSON can hold.
        """
        tensors = {f"model.{name}": tensor for name, tensor in _copies(self.model).items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        for name, parameter in self.model.named_parameters():
            for key, tensor in self._optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = tensor.clone()
        values = {
            "settings": self._settings(),
            "steps_done": self.steps_done,
            "seconds": self.seconds,
            "losses": self.losses.tolist(),
            "validations": self.validations,
            "best_step": self.best_step,
        }
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state`, which may have been through a file.

        Raises:
            InputError: if it is not the state of a training like this one, which is then left as it was.
        """
        settings, expected = values.get("settings"), self._settings()
        if settings != expected:
            raise InputError(f"the saved training has other settings: {settings}, where this one has {expected}")
        shapes = {
            f"{prefix}.{name}": tensor.shape
            for prefix in ("model", "best")
            for name, tensor in self.model.state_dict().items()
        }
        if values["steps_done"]:
            for name, parameter in self.model.named_parameters():
                shapes |= {f"adam.{name}.{key}": parameter.shape for key in ("exp_avg", "exp_avg_sq")}
                shapes[f"adam.{name}.step"] = torch.Size()
        if wrong := {name for name in shapes if name not in tensors or tensors[name].shape != shapes[name]}:
            raise InputError(f"the saved training has no fitting tensors {', '.join(sorted(wrong))}")

        self.model.load_state_dict(part(tensors, "model."))
        self._best = {name: tensor.to(self._like, copy=True) for name, tensor in part(tensors, "best.").items()}
        self._optimizer.state.clear()
        for name, parameter in self.model.named_parameters():
            if f"adam.{name}.step" in shapes:
                self._optimizer.state[parameter] = {
                    key: tensors[f"adam.{name}.{key}"].to(parameter.device, copy=True)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self.steps_done = values["steps_done"]
        self.seconds = values["seconds"]
        self._losses[: self.steps_done] = values["losses"]
        self.validations = [(step, error) for step, error in values["validations"]]
        self.best_step = values["best_step"]

    def _settings(self) -> dict[str, Any]:
        return {
            "model": self.model.options,
            "times": self._times.tolist(),
            "trajectories": self._states.shape[1],
            "validation": None if self._validation is None else self._validation.shape[1],
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


def _finite(loss: Tensor) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value}")
    return value


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


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
