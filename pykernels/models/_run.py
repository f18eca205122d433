"""Runs of a training: the folder they write to, their metrics, their progress bar, and how they are interrupted.

A run folder holds ``config.json`` (the command and its settings, where it ran), ``metrics.csv`` (a row for each step),
``training.safetensors`` (the trainings on their way, until they are done), what the system makes of them, such as
``model.safetensors`` and pictures, and at the end ``result.json``. It can be continued from any moment on: each file is
written whole or not at all, and the metrics are cut back to where the last saved training was.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from pykernels import _files
from pykernels._errors import InputError, require

CONFIG, METRICS, TRAINING, RESULT = "config.json", "metrics.csv", "training.safetensors", "result.json"


class Training(Protocol):
    """What can be trained step by step."""

    n_steps: int
    steps_done: int
    seconds: float

    @property
    def done(self) -> bool: ...
    def step(self) -> float: ...


class RunFolder:
    """A folder of one run, which no other process uses at the same time. ``config`` is what is in its config.json."""

    def __init__(self, path: Path, config: dict[str, Any], lock: int) -> None:
        self.path = path
        self.config = config
        self._unlock = weakref.finalize(self, os.close, lock)  # also where an error keeps close() from being called

    @staticmethod
    def check_new(path: Path) -> None:
        """Raise unless a run can be made there.

        Raises:
            InputError: if there is a file, or a folder that is not empty, or no folder can be made there.
        """
        if path.is_dir():
            if any(path.iterdir()):
                inside = f", or continue the run in it with --resume {path}" if (path / CONFIG).is_file() else ""
                raise InputError(f"--out: the folder {path} is not empty; give a new one{inside}")
        elif path.exists():
            raise InputError(f"--out: {path} is not a folder; give the name of a new one")
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
        if not os.access(existing, os.W_OK):
            raise InputError(f"--out: the folder {existing} is not writable")

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> RunFolder:
        """Make the folder of a new run, with its configuration."""
        cls.check_new(path)
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path, dict(config), _locked(path))
        folder.write_json(CONFIG, config)
        return folder

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """The folder of a run that was interrupted, or that is finished.

        Raises:
            InputError: if there is no run, or another process is at work on it.
        """
        file = path / CONFIG
        if not file.is_file():
            raise InputError(f"--resume: there is no run in {path} (it has no {CONFIG})")
        folder = cls(path, {}, _locked(path))
        for leftover in path.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(config["command"], str) or not isinstance(config["settings"], dict):
                raise TypeError("the command or the settings are of another type")
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"--resume: {file} is damaged ({error!r})") from error
        folder.config = config
        return folder

    def close(self) -> None:
        self._unlock()

    def write(self, name: str, content: bytes) -> Path:
        """Write a file of the run, whole or not at all, and return its path."""
        _files.write(self.path / name, content)
        return self.path / name

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=2) + "\n").encode())

    def result(self) -> Any:
        """What a finished run found, or None."""
        file = self.path / RESULT
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def finish(self, result: Any) -> None:
        """Write the result; the trainings need not be continued any more."""
        self.write_json(RESULT, result)
        (self.path / TRAINING).unlink(missing_ok=True)


class Metrics:
    """Rows of numbers, in a CSV file that can be read while it grows.

    Args:
        path: the file.
        columns: their names.
        size: bytes of the file to keep, None to begin it.

    Raises:
        InputError: if the file is shorter than ``size``.
    """

    def __init__(self, path: Path, columns: Sequence[str], size: int | None = None) -> None:
        if size is not None:
            if not path.is_file() or path.stat().st_size < size:
                raise InputError(f"{path} is shorter than when the training was saved; the run cannot be continued")
            os.truncate(path, size)
        self._file = path.open("wb" if size is None else "ab")
        if size is None:
            self.add(*columns)

    def add(self, *row: Any) -> None:
        self._file.write((",".join(map(str, row)) + "\n").encode())

    def sync(self) -> int:
        """Bring all rows to the disk, and return the size of the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class Interrupts:
    """SIGINT and SIGTERM as :class:`KeyboardInterrupt`, at once, or inside :meth:`deferred` when a step is done.

    There the first signal sets ``requested``, and the second one stops at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def __enter__(self) -> Self:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred or self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not by print: the signal may have come while something was being printed.
        os.write(2, b"\npykernels: finishing this step and saving; interrupt again to stop at once\n")


class Run:
    """The trainings of a command, shown, saved and interrupted as its user wants it.

    Args:
        folder: to save to, or None.
        resume_command: what continues the run, for the message of an interruption.
        columns: of the metrics.
        metrics_size: see :class:`Metrics`.
        quiet: no progress bar.
        save_every: seconds between two saves.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        resume_command: str,
        *,
        columns: Sequence[str],
        metrics_size: int | None = None,
        quiet: bool = False,
        save_every: float = 60.0,
    ) -> None:
        self.folder = folder
        self._resume_command = resume_command
        self._interrupts = Interrupts()
        self._metrics = None if folder is None else Metrics(folder.path / METRICS, columns, metrics_size)
        self._save_every = save_every
        self._tqdm = None if quiet else require("tqdm", "tqdm", "models", "a progress bar (or give --quiet)").tqdm

    def __enter__(self) -> Self:
        self._interrupts.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupts.__exit__()
        if self._metrics is not None:
            self._metrics.close()
        if self.folder is not None:
            self.folder.close()
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"interrupted; to go on: {self._resume_command}") from error

    def train(
        self,
        trainings: Sequence[Training],
        names: Sequence[str],
        row: Callable[[int, Training, float], Sequence[Any]],
        save: Callable[[int], None],
    ) -> None:
        """Do all steps that are left, one training after the other.

        Args:
            trainings: they may have begun.
            names: one for each, shown beside the progress bar.
            row: of the metrics, from the index of the training, itself, and the loss of its step.
            save: called with the size of the metrics from time to time, and before an interruption.

        Raises:
            KeyboardInterrupt: after SIGINT or SIGTERM, with all steps that were done saved if there is a folder.
        """
        saved_at = time.monotonic()
        with self._interrupts.deferred() if self.folder else nullcontext():
            for index, (training, name) in enumerate(zip(trainings, names, strict=True)):
                with self._bar(training, name) as bar:
                    while not training.done:
                        loss = training.step()
                        if bar is not None:
                            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
                            bar.update()
                        if self._metrics is None:
                            continue
                        self._metrics.add(*row(index, training, loss))
                        if self._interrupts.requested:
                            save(self._metrics.sync())
                            raise KeyboardInterrupt
                        if time.monotonic() - saved_at >= self._save_every:
                            save(self._metrics.sync())
                            saved_at = time.monotonic()
        if self._metrics is not None:
            save(self._metrics.sync())

    def metrics_size(self) -> int:
        """Bytes of the metrics now, 0 without a folder."""
        return 0 if self._metrics is None else self._metrics.sync()

    def _bar(self, training: Training, name: str) -> Any:
        if self._tqdm is None or training.done:
            return nullcontext()
        # In a log, where a bar cannot be redrawn, one line every ten seconds is enough.
        return self._tqdm(
            total=training.n_steps,
            initial=training.steps_done,
            desc=name,
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )


def run_model(path: Path) -> Path:
    """The file of a model, given by itself or by the folder of the run that left it.

    Raises:
        InputError: if the run has left none yet, or several.
    """
    if not (path.is_dir() and (path / CONFIG).is_file()):
        return path
    models = sorted(file.name for file in path.glob("model*.safetensors"))
    if not models:
        raise InputError(f"the run in {path} has no model yet; finish it with --resume {path}")
    if len(models) > 1:
        raise InputError(f"the run in {path} has several models; give the file of one of them: {', '.join(models)}")
    return path / models[0]


def _locked(folder: Path) -> int:
    """A descriptor of the folder that keeps other processes out until it is closed."""
    with ExitStack() as stack:
        descriptor = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is at work in {folder}") from error
        stack.pop_all()
    return descriptor
