"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pykernels._errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write in the ``with`` block; it takes the place of ``path`` at the end of the block.

    Whatever stops the block, or the machine, ``path`` is the old file or the whole new one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)  # or a power failure could undo the renaming
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def check_output(path: Path, option: str) -> None:
    """Find out before long work that a file cannot be written after it.

    Raises:
        InputError: if ``path`` is a folder, or its folder is not there or not writable. It names ``option``.
    """
    folder = path.parent
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder; give the name of a file")
    if not folder.is_dir():
        raise InputError(f"{option}: there is no folder {folder}; create it first")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option}: the folder {folder} is not writable")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
