"""Time-series classification data sets of the UCR and UEA archives, from files on the disk.

The files are those that the package ``aeon`` carries (it is located, not imported), or in a folder of the user's. The
format is ``.ts``: a header of ``@`` lines, then one case per line, channels separated by colons, samples by commas, the
label last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pykernels._errors import InputError, MissingExtraError

Array: TypeAlias = npt.NDArray[np.float64]
Labels: TypeAlias = npt.NDArray[np.str_]

# The UCR sets that are not z-normalised already; Franceschi et al. (2019) normalise them as a whole.
_NORMALISED = """
    AllGestureWiimoteX AllGestureWiimoteY AllGestureWiimoteZ BME Chinatown Crop EOGHorizontalSignal
    EOGVerticalSignal Fungi GestureMidAirD1 GestureMidAirD2 GestureMidAirD3 GesturePebbleZ1 GesturePebbleZ2
    GunPointAgeSpan GunPointMaleVersusFemale GunPointOldVersusYoung HouseTwenty InsectEPGRegularTrain
    InsectEPGSmallTrain MelbournePedestrian PickupGestureWiimoteZ PigAirwayPressure PigArtPressure PigCVP PLAID
    PowerCons Rock SemgHandGenderCh2 SemgHandMovementCh2 SemgHandSubjectCh2 ShakeGestureWiimoteZ SmoothSubspace
    UMD
"""
NORMALISED = frozenset(_NORMALISED.split())


@dataclass(frozen=True)
class Dataset:
    """A data set split as published. ``X_*`` have shape (cases, channels, time), ``y_*`` (cases,)."""

    name: str
    X_train: Array
    y_train: Labels
    X_test: Array
    y_test: Labels


def load(name: str, folder: str | Path | None = None) -> Dataset:
    """Load a classification data set of equal-length series, normalised as in Franceschi et al. (NeurIPS 2019).

    The mean and the variance of training and test cases together normalise the multivariate sets, each channel by its
    own, and the univariate sets in :data:`NORMALISED`. All others, GunPoint among them, are taken as they are.

    Args:
        name: of the data set, for example ``"GunPoint"``.
        folder: where ``NAME/NAME_TRAIN.ts`` and ``NAME/NAME_TEST.ts`` are; None for the data sets inside ``aeon``.

    Raises:
        InputError: if there is no such data set, or it has unequal lengths, missing values or empty series. A
            :class:`ValueError`.
        MissingExtraError: if ``folder`` is None and aeon is not installed. A :class:`ModuleNotFoundError`.
    """
    root = _aeon_folder() if folder is None else Path(folder)
    names = list(_names(root))
    if name not in names:
        where = "the installed aeon" if folder is None else f"{root} (as NAME/NAME_TRAIN.ts and NAME/NAME_TEST.ts)"
        raise InputError(f"no data set {name!r} in {where}; it has {', '.join(names) or 'none'}")
    X_train, y_train = _read(name, root / name / f"{name}_TRAIN.ts")
    X_test, y_test = _read(name, root / name / f"{name}_TEST.ts")
    if X_train.shape[1] != X_test.shape[1]:
        raise InputError(f"{name} has {X_train.shape[1]} channels for training, but {X_test.shape[1]} for testing")
    if X_train.shape[1] > 1 or name in NORMALISED:
        X_train, X_test = _normalised(X_train, X_test)
    return Dataset(name, X_train, y_train, X_test, y_test)


def available(folder: str | Path | None = None) -> list[str]:
    """Names of the classification data sets in ``folder``, or inside the installed ``aeon``.

    Raises:
        MissingExtraError: if ``folder`` is None and aeon is not installed.
    """
    return list(_names(_aeon_folder() if folder is None else Path(folder)))


def _aeon_folder() -> Path:
    spec = find_spec("aeon")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("aeon", "data", "a built-in data set")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


def _names(root: Path) -> Iterator[str]:
    if not root.is_dir():
        raise InputError(f"{root} is not a folder")
    for path in sorted(root.iterdir()):
        train, test = (path / f"{path.name}_{part}.ts" for part in ("TRAIN", "TEST"))
        if train.is_file() and test.is_file() and _header(train).get("classlabel", "").startswith("true"):
            yield path.name


def _header(path: Path) -> dict[str, str]:
    header = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("@"):
                key, _, value = line[1:].strip().partition(" ")
                if key.lower() == "data":
                    break
                header[key.lower()] = value.strip().lower()
    return header


def _read(name: str, path: Path) -> tuple[Array, Labels]:
    """Series (cases, channels, time) and labels (cases,) of one file."""
    if _header(path).get("timestamps") == "true":
        raise InputError(f"{name} has time stamps, which are not supported")
    cases: list[list[Array]] = []
    labels = []
    with path.open(encoding="utf-8") as file:
        body = False
        for line in map(str.strip, file):
            if not body or not line:
                body = body or line.lower() == "@data"
                continue
            *channels, label = line.split(":")
            try:
                case = [np.array(c.replace("?", "nan").split(",") if c else [], dtype=np.float64) for c in channels]
            except ValueError as error:
                raise InputError(f"case {len(cases) + 1} of {path.name} is not made of numbers ({error})") from error
            cases.append(case)
            labels.append(label.strip())
    if not cases:
        raise InputError(f"{path.name} has no cases")
    if len({len(case) for case in cases}) > 1 or not cases[0]:
        raise InputError(f"the cases of {path.name} do not have the same number of channels")
    lengths = {len(channel) for case in cases for channel in case}
    if min(lengths) == 0:
        raise InputError(f"{path.name} has empty series; remove them")
    if len(lengths) > 1:
        raise InputError(
            f"{name} has series of unequal lengths ({min(lengths)} to {max(lengths)}), which are not supported yet; "
            "choose a data set of equal lengths"
        )
    X = np.array(cases)
    if not np.isfinite(X).all():
        raise InputError(f"{path.name} has missing values (NaN) or infinite ones; fill them in first")
    return X, np.array(labels)


def _normalised(X_train: Array, X_test: Array) -> tuple[Array, Array]:
    """Both parts with zero mean and unit variance over their union, channel by channel."""
    both = [np.moveaxis(X, 1, 0).reshape(X.shape[1], -1) for X in (X_train, X_test)]
    union = np.concatenate(both, axis=1)
    mean, std = union.mean(1)[:, None], union.std(1)[:, None]
    std[std == 0] = 1.0
    return (X_train - mean) / std, (X_test - mean) / std
