"""Checkpoint files: tensors and JSON values in one safetensors file, from which nothing can be executed.

The tensors are the file's tensors. Everything else is one JSON text in the metadata of its header: ``{"kind": what the
file holds, "version": of the format, "pykernels": that wrote it, "values": ...}``. One file is written whole or not at
all, which two would not be. Needs safetensors (the extra ``models``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pykernels import _files
from pykernels._errors import InputError, require

FORMAT = "pykernels.checkpoint"
VERSION = 1


class Checkpoint(NamedTuple):
    """What is in a file: tensors, on the CPU, and values of JSON."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save(path: Path, kind: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: the file, which is replaced if it is there.
        kind: what it holds, for :func:`load` to ask for, such as ``"usrl.model"``.
        tensors: of any device and layout.
        values: what JSON can hold, and NumPy's numbers.

    Raises:
        MissingExtraError: if safetensors is not installed. A :class:`ModuleNotFoundError`.
        OSError: if the file cannot be written.
    """
    from pykernels import __version__

    safetensors = _safetensors()
    content = {"kind": kind, "version": VERSION, "pykernels": __version__, "values": dict(values)}
    # Copies, because safetensors refuses tensors that share memory.
    dense = {name: torch.clone(t.detach().cpu(), memory_format=torch.contiguous_format) for name, t in tensors.items()}
    metadata = {FORMAT: json.dumps(content, default=_number)}
    _files.write(path, safetensors.torch.save(dense, metadata))


def load(path: Path, kind: str) -> Checkpoint:
    """Read a checkpoint of this kind.

    Raises:
        InputError: if the file is something else, damaged, of another kind or of a newer format. A :class:`ValueError`.
        MissingExtraError: if safetensors is not installed. A :class:`ModuleNotFoundError`.
        OSError: if the file cannot be read.
    """
    safetensors = _safetensors()
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a checkpoint file")
    path.open("rb").close()  # safetensors' own error for a file that is not there has no name in it
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a checkpoint, or it is cut off or damaged ({error})") from error
    if FORMAT not in metadata:
        raise InputError(f"{path} is a safetensors file, but no checkpoint of pykernels")
    try:
        content = json.loads(metadata[FORMAT])
        found, version, values = content["kind"], content["version"], content["values"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"the header of {path} is damaged ({error!r})") from error
    if version != VERSION:
        raise InputError(
            f"{path} has format {version!r}, written by pykernels {content.get('pykernels')!r}; "
            f"this one reads format {VERSION}"
        )
    if found != kind:
        raise InputError(f"{path} holds a {found!r}, where a {kind!r} is needed")
    return Checkpoint(tensors, values)


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class Training(Protocol):
    """A training that can be saved and continued."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...
    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None: ...


def save_trainings(trainings: Sequence[Training], path: Path, kind: str, values: Mapping[str, Any]) -> None:
    """Write trainings as they are now, with values of the caller's."""
    states = [training.state() for training in trainings]
    tensors = {f"{i}.{name}": t for i, (parts, _) in enumerate(states) for name, t in parts.items()}
    save(path, kind, tensors, {"trainings": [v for _, v in states], "caller": dict(values)})


class SavedTrainings:
    """Trainings in a file, and ``values``, those of who saved them."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path = path
        self._checkpoint = load(path, kind)
        with damage_named(path):
            self.values: dict[str, Any] = dict(self._checkpoint.values["caller"])

    def restore(self, trainings: Sequence[Training]) -> None:
        """Bring these, made with the same arguments, to where the saved ones were.

        Raises:
            InputError: if they do not fit.
        """
        with damage_named(self._path):
            states = self._checkpoint.values["trainings"]
            if len(states) != len(trainings):
                raise InputError(f"it holds {len(states)} trainings, where there are {len(trainings)} now")
            for i, (training, state) in enumerate(zip(trainings, states, strict=True)):
                training.restore(part(self._checkpoint.tensors, f"{i}."), state)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """What does not fit inside a file becomes an error that names the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except KeyError as error:
        raise InputError(f"{path} is damaged: there is no {error} in it") from error
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # RuntimeError: load_state_dict
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _safetensors() -> Any:
    require("safetensors.torch", "safetensors", "models", "a checkpoint")
    return require("safetensors", "safetensors", "models", "a checkpoint")


def _number(value: object) -> int | float:
    if isinstance(value, (np.integer, np.floating)):
        number: int | float = value.item()
        return number
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")
