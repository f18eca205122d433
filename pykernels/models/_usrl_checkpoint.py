"""Checkpoint files of :mod:`pykernels.models.usrl`: fitted estimators, and trainings on their way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykernels._errors import InputError, require
from pykernels.models import _checkpoint
from pykernels.models._checkpoint import Checkpoint, part
from pykernels.models._triplet import EncoderTraining

if TYPE_CHECKING:
    from sklearn.svm import SVC

    from pykernels.models.usrl import USRLClassifier, USRLTransformer

MODEL, TRAINING = "usrl.model", "usrl.training"
_PROBES = 8
Arrays = dict[str, npt.NDArray[Any]]


def save_transformer(model: USRLTransformer, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a fitted transformer; ``about`` is kept with it, for readers."""
    tensors, values = _transformer_state(model)
    values = {"transformer": values, "classifier": None, "about": dict(about or {})}
    _checkpoint.save(Path(path), MODEL, tensors, values)


def save_classifier(model: USRLClassifier, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a fitted classifier with its transformer; ``about`` is kept with it, for readers."""
    from sklearn.utils.validation import check_is_fitted

    check_is_fitted(model)
    tensors, values = _transformer_state(model.transformer_)
    arrays, svm = _svm_state(model.svm_)
    tensors |= {f"svm.{name}": torch.from_numpy(array) for name, array in arrays.items()}
    values = {
        "transformer": values,
        "classifier": {"parameters": _saved_parameters(model), "svm": svm},
        "about": dict(about or {}),
    }
    _checkpoint.save(Path(path), MODEL, tensors, values)


def load_transformer(path: str | Path, device: str = "cpu") -> USRLTransformer:
    """Read a transformer, or that of a classifier."""
    path = Path(path)
    checkpoint = _checkpoint.load(path, MODEL)
    with _damage_named(path):
        return _transformer(checkpoint, device)


def load_classifier(path: str | Path, device: str = "cpu") -> USRLClassifier:
    """Read a classifier."""
    from pykernels.models.usrl import USRLClassifier

    path = Path(path)
    checkpoint = _checkpoint.load(path, MODEL)
    with _damage_named(path):
        values = checkpoint.values["classifier"]
        if values is None:
            raise InputError("it holds a transformer without a classifier; USRLTransformer.load reads it")
        model = USRLClassifier(**_loaded_parameters(values["parameters"], device))
        model.transformer_ = _transformer(checkpoint, device)
        arrays = {name: tensor.numpy() for name, tensor in part(checkpoint.tensors, "svm.").items()}
        model.svm_ = _svm(arrays, values["svm"], model.transformer_._n_features_out)
        model.classes_ = model.svm_.classes_
        model.n_features_in_ = model.transformer_.n_features_in_
        return model


def about(path: Path) -> dict[str, Any]:
    """What was kept with the model in this file."""
    values = _checkpoint.load(path, MODEL).values
    with _damage_named(path):
        return dict(values["about"])


def save_trainings(trainings: Sequence[EncoderTraining], path: Path, values: Mapping[str, Any]) -> None:
    """Write trainings as they are now, with values of the caller's."""
    states = [training.state() for training in trainings]
    tensors = {f"{i}.{name}": t for i, (parts, _) in enumerate(states) for name, t in parts.items()}
    _checkpoint.save(path, TRAINING, tensors, {"trainings": [v for _, v in states], "caller": dict(values)})


class SavedTrainings:
    """Trainings in a file, and ``values``, those of who saved them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checkpoint = _checkpoint.load(path, TRAINING)
        with _damage_named(path):
            self.values: dict[str, Any] = dict(self._checkpoint.values["caller"])

    def restore(self, trainings: Sequence[EncoderTraining]) -> None:
        """Bring these, made with the same arguments, to where the saved ones were.

        Raises:
            InputError: if they do not fit.
        """
        with _damage_named(self._path):
            states = self._checkpoint.values["trainings"]
            if len(states) != len(trainings):
                raise InputError(f"it holds {len(states)} trainings, where there are {len(trainings)} now")
            for i, (training, state) in enumerate(zip(trainings, states, strict=True)):
                training.restore(part(self._checkpoint.tensors, f"{i}."), state)


def _transformer_state(model: USRLTransformer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from sklearn.utils.validation import check_is_fitted

    check_is_fitted(model)
    tensors = {f"encoders.{i}.{name}": t for i, e in enumerate(model.encoders_) for name, t in e.state_dict().items()}
    values = {
        "parameters": _saved_parameters(model),
        "n_features_in": model.n_features_in_,
        "losses": [np.asarray(losses).tolist() for losses in model.losses_],
        "step_seconds": list(model.step_seconds_),
    }
    return tensors, values


def _transformer(checkpoint: Checkpoint, device: str) -> USRLTransformer:
    from pykernels.models.usrl import USRLTransformer, _check_parameters

    values = checkpoint.values["transformer"]
    model = USRLTransformer(**_loaded_parameters(values["parameters"], device))
    negatives, dtype = _check_parameters(model)
    model.n_features_in_ = int(values["n_features_in"])
    model.encoders_ = []
    for i in range(len(negatives)):
        encoder = model._encoder(model.n_features_in_, seed=0)
        weights = part(checkpoint.tensors, f"encoders.{i}.")
        if any(tensor.dtype != dtype for tensor in weights.values()):
            raise InputError(f"the weights of encoder {i} are not all {dtype}")
        encoder.load_state_dict(weights)
        model.encoders_.append(encoder.eval())
    model.losses_ = [np.array(losses, dtype=np.float64) for losses in values["losses"]]
    model.step_seconds_ = [float(seconds) for seconds in values["step_seconds"]]
    return model


def _saved_parameters(model: Any) -> dict[str, Any]:
    """The constructor's arguments in JSON; a random state is the numbers it is made of."""
    parameters: dict[str, Any] = model.get_params()
    if isinstance(parameters["n_negatives"], (tuple, np.ndarray)):
        parameters["n_negatives"] = list(parameters["n_negatives"])
    random = parameters["random_state"]
    if isinstance(random, np.random.RandomState):
        state: Any = random.get_state(legacy=False)
        key = state["state"]["key"].tolist()
        parameters["random_state"] = {**state, "state": {**state["state"], "key": key}}
    return parameters


def _loaded_parameters(values: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The constructor's arguments, for another device."""
    from pykernels.models.usrl import USRLTransformer

    parameters = {**values, "device": device}
    if unknown := set(parameters) - set(USRLTransformer().get_params()):
        raise InputError(f"a newer pykernels wrote it: there are no parameters {', '.join(sorted(unknown))} here")
    if isinstance(parameters["n_negatives"], list):
        parameters["n_negatives"] = tuple(parameters["n_negatives"])
    if isinstance(parameters["random_state"], dict):
        random = np.random.RandomState()
        random.set_state(parameters["random_state"])
        parameters["random_state"] = random
    return parameters


def _svm_state(svm: SVC) -> tuple[Arrays, dict[str, Any]]:
    """The arrays of a fitted SVM, and the rest of it in JSON.

    ``probes`` are decision values of its first support vectors, to find out when it is loaded whether scikit-learn
    understands the arrays as it did.
    """
    arrays = {
        "support": svm.support_,
        "support_vectors": svm.support_vectors_,
        "n_support": svm.n_support_,
        "dual_coef": svm._dual_coef_,
        "intercept": svm._intercept_,
        "n_iter": np.atleast_1d(svm.n_iter_),
        "probes": svm.decision_function(svm.support_vectors_[:_PROBES]),
    }
    values = {
        "C": svm.C,
        "gamma": svm._gamma,
        "classes": svm.classes_.tolist(),
        "classes_dtype": svm.classes_.dtype.str,
        "shape_fit": svm.shape_fit_,
        "fit_status": svm.fit_status_,
        "scikit-learn": require("sklearn", "scikit-learn", "models", "an SVM").__version__,
    }
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}, values


def _svm(arrays: Arrays, values: Mapping[str, Any], n_features: int) -> SVC:
    """The SVM of :func:`_svm_state`: the same decision values, bit for bit."""
    from pykernels.models.usrl import new_svm

    classes = np.array(values["classes"], dtype=np.dtype(values["classes_dtype"]))
    _check_svm_arrays(arrays, len(classes), n_features)
    svm = new_svm(float(values["C"]))
    svm.classes_ = classes
    svm.class_weight_ = np.ones(len(classes))
    svm.n_features_in_ = n_features
    svm.shape_fit_ = tuple(values["shape_fit"])
    svm.fit_status_ = int(values["fit_status"])
    svm.support_ = arrays["support"]
    svm.support_vectors_ = arrays["support_vectors"]
    svm._n_support = arrays["n_support"]
    svm._dual_coef_, svm._intercept_ = arrays["dual_coef"], arrays["intercept"]
    # With two classes scikit-learn shows them with the other sign.
    sign = -1 if len(classes) == 2 else 1
    svm.dual_coef_, svm.intercept_ = sign * svm._dual_coef_, sign * svm._intercept_
    svm.n_iter_ = svm._num_iter = arrays["n_iter"]
    svm._gamma = float(values["gamma"])
    svm._sparse = svm._effective_probability = False
    svm._probA = svm._probB = np.empty(0)
    try:
        probes = svm.decision_function(arrays["support_vectors"][:_PROBES])
        agrees = np.allclose(probes, arrays["probes"], rtol=1e-6, atol=1e-9)
    except (AttributeError, TypeError, ValueError):
        agrees = False
    if not agrees:
        raise InputError(
            f"its SVM, of scikit-learn {values['scikit-learn']}, does not work in the scikit-learn that is installed; "
            "install that version, or fit USRLClassifier.finish on the transformer again"
        )
    return svm


def _check_svm_arrays(arrays: Arrays, n_classes: int, n_features: int) -> None:
    """Sizes and types as the C code of the SVM takes them for granted."""
    n_vectors = len(arrays["support_vectors"])
    n_pairs = n_classes * (n_classes - 1) // 2
    expected: dict[str, tuple[tuple[int, ...], type]] = {
        "support": ((n_vectors,), np.int32),
        "support_vectors": ((n_vectors, n_features), np.float64),
        "n_support": ((n_classes,), np.int32),
        "dual_coef": ((n_classes - 1, n_vectors), np.float64),
        "intercept": ((n_pairs,), np.float64),
        "n_iter": ((n_pairs,), np.int32),
    }
    for name, (shape, dtype) in expected.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != dtype:
            raise InputError(
                f"svm.{name} must have shape {shape} and dtype {np.dtype(dtype)}, got {array.shape} and {array.dtype}"
            )
    counts = arrays["n_support"]
    if n_classes < 2 or (counts < 0).any() or counts.sum(dtype=np.int64) != n_vectors:
        raise InputError(f"svm.n_support must add up to {n_vectors}, got {counts.tolist()}")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """What does not fit inside a file becomes an error that names the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except KeyError as error:
        raise InputError(f"{path} is damaged: there is no {error} in it") from error
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # RuntimeError: load_state_dict
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())}") from error
