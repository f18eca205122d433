"""Checkpoint files of :mod:`pykernels.models.usrl`: fitted estimators, and trainings on their way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import sklearn
import torch
from sklearn.svm import SVC
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from pykernels._errors import InputError
from pykernels.models import _checkpoint
from pykernels.models._checkpoint import damage_named, part
from pykernels.models.usrl import EncoderTraining, USRLClassifier, USRLTransformer, _check_parameters, new_svm

MODEL, TRAINING = "usrl.model", "usrl.training"
_PROBES = 8
Arrays = dict[str, npt.NDArray[Any]]


class Normalisation(NamedTuple):
    """What was subtracted from the series of a data set, and what they were divided by then, shape (channels, 1)."""

    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]


def save(
    model: Any,
    path: str | Path,
    *,
    normalisation: Normalisation | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a fitted estimator.

    Args:
        model: a USRLTransformer, or a USRLClassifier, which brings its transformer along.
        path: the file, written whole or not at all.
        normalisation: of the series that it was fitted on, for whoever encodes others with it.
        about: kept with it, for readers.
    """
    check_is_fitted(model)
    classifier = model if isinstance(model, USRLClassifier) else None
    transformer = model.transformer_ if isinstance(model, USRLClassifier) else model
    tensors, values = _transformer_state(transformer)
    content: dict[str, Any] = {"transformer": values, "classifier": None, "about": dict(about or {})}
    if classifier is not None:
        arrays, svm = _svm_state(classifier.svm_)
        tensors |= {f"svm.{name}": torch.from_numpy(array) for name, array in arrays.items()}
        content["classifier"] = {"parameters": _saved_parameters(classifier), "svm": svm}
    for name, array in (normalisation._asdict() if normalisation else {}).items():
        tensors[f"normalisation.{name}"] = torch.from_numpy(array)
    _checkpoint.save(Path(path), MODEL, tensors, content)


class SavedModel:
    """An estimator in a file, on a device, with ``normalisation`` and ``about`` as they were saved.

    Raises:
        InputError, MissingExtraError, OSError: as :func:`pykernels.models._checkpoint.load`; the methods too.
    """

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        self.path = Path(path)
        self.device = device
        self._tensors, self._values = _checkpoint.load(self.path, MODEL)
        with damage_named(self.path):
            self.about: dict[str, Any] = dict(self._values["about"])
            self.has_classifier: bool = self._values["classifier"] is not None
            self.normalisation: Normalisation | None = None
            if found := part(self._tensors, "normalisation."):
                mean, std = (found[name].numpy() for name in Normalisation._fields)
                channels = self._values["transformer"]["n_features_in"]
                if mean.shape != (channels, 1) or std.shape != (channels, 1) or not (std > 0).all():
                    raise InputError(f"the normalisation must have shape ({channels}, 1), and a positive std")
                self.normalisation = Normalisation(mean, std)

    def model(self, cls: type[Any]) -> Any:
        """The estimator as a ``USRLClassifier``, or the transformer alone as a ``USRLTransformer``."""
        if not issubclass(cls, USRLClassifier):
            return self._transformer(cls)
        if not self.has_classifier:
            raise InputError(f"{self.path} holds a transformer without a classifier; USRLTransformer.load reads it")
        transformer = self._transformer(USRLTransformer)
        with damage_named(self.path):
            values = self._values["classifier"]
            model = cls(**_loaded_parameters(values["parameters"], self.device))
            arrays = {name: tensor.numpy() for name, tensor in part(self._tensors, "svm.").items()}
            model.transformer_ = transformer
            model.svm_ = _svm(arrays, values["svm"], transformer._n_features_out)
            model.classes_ = model.svm_.classes_
            model.n_features_in_ = transformer.n_features_in_
            return model

    def _transformer(self, cls: type[USRLTransformer]) -> USRLTransformer:
        with damage_named(self.path):
            values = self._values["transformer"]
            model = cls(**_loaded_parameters(values["parameters"], self.device))
            negatives, dtype = _check_parameters(model)
            model.n_features_in_ = int(values["n_features_in"])
            model.encoders_ = []
            for i in range(len(negatives)):
                encoder = model._encoder(model.n_features_in_, seed=0)
                weights = part(self._tensors, f"encoders.{i}.")
                if any(tensor.dtype != dtype for tensor in weights.values()):
                    raise InputError(f"the weights of encoder {i} are not all {dtype}")
                encoder.load_state_dict(weights)
                model.encoders_.append(encoder.eval())
            model.losses_ = [np.array(losses, dtype=np.float64) for losses in values["losses"]]
            model.step_seconds_ = [float(seconds) for seconds in values["step_seconds"]]
            return model


def save_trainings(trainings: Sequence[EncoderTraining], path: Path, values: Mapping[str, Any]) -> None:
    """Write trainings as they are now, with values of the caller's."""
    _checkpoint.save_trainings(trainings, path, TRAINING, values)


class SavedTrainings(_checkpoint.SavedTrainings):
    """Trainings of encoders in a file, and ``values``, those of who saved them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, TRAINING)


def _transformer_state(model: USRLTransformer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"encoders.{i}.{name}": t for i, e in enumerate(model.encoders_) for name, t in e.state_dict().items()}
    values = {
        "parameters": _saved_parameters(model),
        "n_features_in": model.n_features_in_,
        "losses": [np.asarray(losses).tolist() for losses in model.losses_],
        "step_seconds": list(model.step_seconds_),
    }
    return tensors, values


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
        "scikit-learn": sklearn.__version__,
    }
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}, values


def _svm(arrays: Arrays, values: Mapping[str, Any], n_features: int) -> SVC:
    """The SVM of :func:`_svm_state`: the same decision values, bit for bit."""
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
