"""What the tests of the command line share."""

from __future__ import annotations

import csv
import itertools
import os
import signal
import sys
import time
from collections.abc import Container, Sequence
from pathlib import Path

import pytest

from pykernels.cli import main


def rows(path: Path) -> list[list[str]]:
    """The metrics of a run without the times."""
    with (path / "metrics.csv").open() as file:
        return [row[:-1] for row in csv.reader(file)]


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """The one line that the command prints before it exits with status 2."""
    try:
        status = main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("pykernels")
    return captured.err


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """As if these were not installed."""
    for module in modules:
        for name in [name for name in sys.modules if name.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, module, None)


def interrupt(monkeypatch: pytest.MonkeyPatch, training: type, numbers: Container[int], *signals: int) -> None:
    """Send signals, SIGINT unless told, to this process during the steps of a training with these numbers."""
    count = itertools.count(1)
    step = training.step

    def stepping(self):
        if next(count) in numbers:
            for number in signals or (signal.SIGINT,):
                os.kill(os.getpid(), number)
                time.sleep(0)  # the handler runs now
        return step(self)

    monkeypatch.setattr(training, "step", stepping)


class Crash(BaseException):
    pass


def crash(monkeypatch: pytest.MonkeyPatch, training: type, number: int) -> None:
    """Raise :class:`Crash` instead of the step with this number."""
    count = itertools.count(1)
    step = training.step

    def stepping(self):
        if next(count) == number:
            raise Crash
        return step(self)

    monkeypatch.setattr(training, "step", stepping)
