"""Errors that are the user's to mend: the command line prints them as one line and exits with status 2."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


class InputError(ValueError):
    """An argument or a data set that cannot be used, with what is accepted instead."""


class FusionError(InputError):
    """A vector field that :class:`pykernels.nn.MLPField` cannot stand for, with the module or operation that is why."""


class MissingExtraError(ModuleNotFoundError):
    """An optional package that is not installed, with the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}: run pip install '.[{extra}]' in a checkout of this project, "
            f"or give pip the path of the wheel followed by [{extra}]",
            name=package,
        )


def users_line() -> int:
    """The stacklevel with which the caller's warning points at the line outside of this package and of torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("pykernels", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def require(module: str, package: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: what to import, for example ``"sklearn.svm"``.
        package: its name for pip.
        extra: the extra of this project that brings it.
        purpose: what needs it, the subject of the message.

    Raises:
        MissingExtraError: if the package is not installed. A package that is there but broken raises its own error.
    """
    root = module.partition(".")[0]
    try:
        importlib.import_module(root)
    except ModuleNotFoundError as error:
        if error.name != root:
            raise
        raise MissingExtraError(package, extra, purpose) from error
    return importlib.import_module(module)
