"""Time-series classification data sets of the UCR and UEA archives, from files on the disk.

The files are those that the package ``aeon`` carries (it is located, not imported), or in a folder of the user's. Two
formats:

- ``.ts``: a header of ``@`` lines, then one case per line, channels separated by colons, samples by commas, the label
  last;
- ``.tsv``: one case of one channel per line, the label and the samples separated by tabs, shorter series filled up with
  NaN at their end (the layout of the UCR archive of 2018).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pykernels._errors import InputError, MissingExtraError

Array: TypeAlias = npt.NDArray[np.float64]
Labels: TypeAlias = npt.NDArray[np.str_]
# Cases of equal length, shape (cases, channels, time), or a list of arrays (channels, time) where they differ.
Series: TypeAlias = Array | list[Array]

SUFFIXES = (".ts", ".tsv")

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
    """A data set split as published.

    ``X_train`` and ``X_test`` have shape (cases, channels, time), or are lists of arrays (channels, time) if not all
    series of that part have one length. ``y_train`` and ``y_test`` have shape (cases,). Where the series were
    normalised, ``mean`` and ``std`` have shape (channels, 1): what was subtracted, and divided by then.
    """

    name: str
    X_train: Series
    y_train: Labels
    X_test: Series
    y_test: Labels
    mean: Array | None = None
    std: Array | None = None

    @property
    def n_channels(self) -> int:
        return len(self.X_train[0])

    @property
    def lengths(self) -> tuple[int, int]:
        """The shortest and the longest series, in samples."""
        lengths = [series.shape[1] for part in (self.X_train, self.X_test) for series in part]
        return min(lengths), max(lengths)


def load(name: str, folder: str | Path | None = None) -> Dataset:
    """Load a classification data set, normalised as in Franceschi et al. (NeurIPS 2019).

    The mean and the variance of training and test cases together normalise the multivariate sets, each channel by its
    own, and the univariate sets in :data:`NORMALISED`. All others, GunPoint among them, are taken as they are.

    Args:
        name: of the data set, for example ``"GunPoint"``.
        folder: where ``NAME/NAME_TRAIN.ts`` and ``NAME/NAME_TEST.ts`` are, or the same two with ``.tsv``; None for the
            data sets inside ``aeon``.

    Raises:
        InputError: if there is no such data set, or it has missing values or empty series. A :class:`ValueError`.
        MissingExtraError: if ``folder`` is None and aeon is not installed. A :class:`ModuleNotFoundError`.
    """
    root = _aeon_folder() if folder is None else Path(folder)
    found = dict(_sets(root))
    if name not in found:
        where = "the installed aeon" if folder is None else f"{root} (as NAME/NAME_TRAIN.ts and NAME/NAME_TEST.ts)"
        raise InputError(f"no data set {name!r} in {where}; it has {', '.join(found) or 'none'}")
    (X_train, y_train), (X_test, y_test) = (_labelled(path) for path in found[name])
    channels = [X[0].shape[0] for X in (X_train, X_test)]
    if channels[0] != channels[1]:
        raise InputError(f"{name} has {channels[0]} channels for training, but {channels[1]} for testing")
    if channels[0] == 1 and name not in NORMALISED:
        return Dataset(name, X_train, y_train, X_test, y_test)
    union = np.concatenate([*X_train, *X_test], axis=1)
    mean, std = union.mean(1)[:, None], union.std(1)[:, None]
    std[std == 0] = 1.0
    X_train, X_test = (normalised(X, mean, std) for X in (X_train, X_test))
    return Dataset(name, X_train, y_train, X_test, y_test, mean, std)


def normalised(series: Series, mean: Array, std: Array) -> Series:
    """Series less ``mean`` and divided by ``std``, both of shape (channels, 1)."""
    return [(x - mean) / std for x in series] if isinstance(series, list) else (series - mean) / std


def available(folder: str | Path | None = None) -> list[str]:
    """Names of the classification data sets in ``folder``, or inside the installed ``aeon``.

    Raises:
        MissingExtraError: if ``folder`` is None and aeon is not installed.
    """
    return [name for name, _ in _sets(_aeon_folder() if folder is None else Path(folder))]


def read_series(path: str | Path, *, labels: bool = True) -> tuple[Series, Labels | None]:
    """Read the series of one ``.ts`` or ``.tsv`` file, as they are.

    Args:
        path: of the file.
        labels: whether the first column of a ``.tsv`` file is the label; a ``.ts`` file says it itself.

    Returns:
        The series, of shape (cases, channels, time) or, if their lengths differ, a list of arrays (channels, time);
        and their labels, shape (cases,), or None where there are none. The numbers that the cases of a regression are
        to give count as labels.

    Raises:
        InputError: if the file is not there or not of this kind, or has missing values or empty series. A
            :class:`ValueError`.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} must be a .ts or .tsv file")
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    try:
        cases = list(_ts_cases(path) if path.suffix == ".ts" else _tsv_cases(path, labels))
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not a text file in UTF-8 ({error})") from error
    series = _series(path.name, [case for case, _ in cases])
    found = [label for _, label in cases if label is not None]
    return series, np.array(found) if found else None


def _aeon_folder() -> Path:
    spec = find_spec("aeon")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("aeon", "data", "a built-in data set")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


def _sets(root: Path) -> Iterator[tuple[str, tuple[Path, Path]]]:
    """Names of the data sets with classes, with the files of their two parts."""
    if not root.is_dir():
        raise InputError(f"{root} is not a folder")
    for path in sorted(root.iterdir()):
        for suffix in SUFFIXES:
            train, test = (path / f"{path.name}_{part}{suffix}" for part in ("TRAIN", "TEST"))
            if train.is_file() and test.is_file() and (suffix == ".tsv" or _is_true(_header(train), "classlabel")):
                yield path.name, (train, test)
                break


def _labelled(path: Path) -> tuple[Series, Labels]:
    series, labels = read_series(path)
    if labels is None:
        raise InputError(f"{path.name} has no labels")
    return series, labels


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


def _is_true(header: dict[str, str], key: str) -> bool:
    return header.get(key, "").startswith("true")


def _ts_cases(path: Path) -> Iterator[tuple[list[Array], str | None]]:
    """The channels and the label of each case."""
    header = _header(path)
    if _is_true(header, "timestamps"):
        raise InputError(f"{path.name} has time stamps, which are not supported")
    labelled = _is_true(header, "classlabel") or _is_true(header, "targetlabel")
    with path.open(encoding="utf-8") as file:
        body, number = False, 0
        for line in map(str.strip, file):
            if not body or not line:
                body = body or line.lower() == "@data"
                continue
            number += 1
            channels = line.split(":")
            label = channels.pop().strip() if labelled else None
            fields = [channel.replace("?", "nan").split(",") if channel else [] for channel in channels]
            yield _numbers(path, number, fields), label


def _tsv_cases(path: Path, labelled: bool) -> Iterator[tuple[list[Array], str | None]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(filter(str.strip, file), 1):
            fields = line.rstrip("\n").split("\t")
            label = fields.pop(0).strip() if labelled else None
            (channel,) = _numbers(path, number, [fields])
            given = np.flatnonzero(~np.isnan(channel))
            yield [channel[: given[-1] + 1 if len(given) else 0]], label


def _numbers(path: Path, number: int, channels: list[list[str]]) -> list[Array]:
    try:
        return [np.array(channel, dtype=np.float64) for channel in channels]
    except ValueError as error:
        raise InputError(f"case {number} of {path.name} is not made of numbers ({error})") from error


def _series(name: str, cases: Sequence[list[Array]]) -> Series:
    """The cases as one array if they have one length."""
    if not cases:
        raise InputError(f"{name} has no cases")
    if len({len(case) for case in cases}) > 1 or not cases[0]:
        raise InputError(f"the cases of {name} do not have the same number of channels")
    for number, case in enumerate(cases, 1):
        lengths = sorted({len(channel) for channel in case})
        if lengths[0] == 0:
            raise InputError(f"{name} has empty series, for example case {number}; remove them")
        if len(lengths) > 1:
            raise InputError(f"the channels of case {number} of {name} have unequal lengths, {lengths}")
        if not np.isfinite(case).all():
            raise InputError(
                f"{name} has missing values (NaN) or infinite ones, for example in case {number}; fill them in first"
            )
    if len({len(case[0]) for case in cases}) == 1:
        return np.array(cases)
    return [np.array(case) for case in cases]
