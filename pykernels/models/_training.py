"""Training by Adam, step by step, with the weights of the best validation kept, which can be saved and continued."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pykernels._errors import InputError
from pykernels.models._checkpoint import part

Model = TypeVar("Model", bound=nn.Module)

DTYPES = {"float32": torch.float32, "float64": torch.float64}  # of models


class AdamTraining(ABC, Generic[Model]):
    """Steps, validations and early stops; what is minimised is up to the subclass.

    A training restored from the :meth:`state` of another one goes on as that one would, bit for bit. When it is done,
    the model has the weights of its best validation, or without validations the last ones.

    Args:
        model: trained in place.
        n_steps: at most so many.
        learning_rate: of Adam.
        validate_every: steps between two validations.
        patience: validations without a new best after which the training is done; None for no early stop.
        groups: of parameters with options of their own; by default all parameters.
        adam: more options of the optimiser.

    Attributes:
        steps_done: how many steps are done.
        seconds: the time they took, with the validations.
        validations: the steps after which the model was validated, and its errors then.
        best_step: of the weights with the smallest validation error so far.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_steps: int,
        learning_rate: float,
        validate_every: int,
        patience: int | None,
        groups: Iterable[dict[str, Any]] | None = None,
        **adam: Any,
    ) -> None:
        for name, value in (("n_steps", n_steps), ("validate_every", validate_every), ("patience", patience)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not 0 < learning_rate < math.inf:
            raise InputError(f"learning_rate must be positive, got {learning_rate!r}")
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
        self._optimizer = torch.optim.Adam(
            model.parameters() if groups is None else groups, lr=learning_rate, fused=True, **adam
        )

    @abstractmethod
    def _loss(self) -> Tensor:
        """What the next step minimises."""

    @abstractmethod
    def _validation(self) -> Tensor | None:
        """The validation error of the model as it is, or None if there is nothing to validate with."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What a training must have in common with one that it is restored from, for JSON."""

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
        """The last one, None before the first."""
        return self.validations[-1][1] if self.validations else None

    def step(self) -> float:
        """Do one step and return its loss, as it was before it.

        Raises:
            FloatingPointError: if a forecast or the loss is not finite.
            RuntimeError: if the training is done.
        """
        if self.done:
            raise RuntimeError(f"this training is done, after {self.steps_done} steps")
        start = time.perf_counter()
        try:
            loss = self._descend()
            if self.steps_done % self.validate_every == 0 or self.steps_done == self.n_steps:
                self._validate()
        except FloatingPointError as error:
            raise FloatingPointError(
                f"the training diverges at step {self.steps_done + 1}: {error}; use a smaller learning_rate"
            ) from error
        self.seconds += time.perf_counter() - start
        return loss

    def _descend(self) -> float:
        self._optimizer.zero_grad()
        loss = self._loss()
        loss.backward()
        self._optimizer.step()
        value = _finite(loss)
        self._losses[self.steps_done] = value
        self.steps_done += 1
        return value

    def _validate(self) -> None:
        with torch.no_grad():
            error = self._validation()
        if error is None:
            return
        value = _finite(error)
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
        now = self.model.state_dict()
        shapes = {f"{prefix}.{name}": tensor.shape for prefix in ("model", "best") for name, tensor in now.items()}
        if values["steps_done"]:
            for name, parameter in self.model.named_parameters():
                shapes |= {f"adam.{name}.{key}": parameter.shape for key in ("exp_avg", "exp_avg_sq")}
                shapes[f"adam.{name}.step"] = torch.Size()
        if wrong := {name for name in shapes if name not in tensors or tensors[name].shape != shapes[name]}:
            raise InputError(f"the saved training has no fitting tensors {', '.join(sorted(wrong))}")

        self.model.load_state_dict(part(tensors, "model."))
        self._best = {name: tensor.to(now[name], copy=True) for name, tensor in part(tensors, "best.").items()}
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


def _finite(loss: Tensor) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value}")
    return value


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
