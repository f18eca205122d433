"""A command that trains: its settings, the folder of its run, and what it prints."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pykernels
from pykernels._errors import InputError, MissingExtraError, require
from pykernels.cli._options import check_same, configuration, settle
from pykernels.models import _run
from pykernels.models._run import Run, RunFolder


class Job:
    """A command with its settings and its run.

    Args:
        args: as parsed.
        needs_out: whether it cannot work without a run folder.

    Attributes:
        operator: whose backends ``--backend`` chooses among.
        needs_sklearn: whether it cannot work without scikit-learn.

    Raises:
        InputError, MissingExtraError: if it cannot work, before anything is trained or written.
    """

    operator = "causal_conv1d"
    needs_sklearn = True

    def __init__(self, args: argparse.Namespace, *, needs_out: bool = False) -> None:
        if self.needs_sklearn:
            require("sklearn", "scikit-learn", "models", args.parser.prog)
        if not args.quiet:
            require("tqdm", "tqdm", "models", "a progress bar (or give --quiet)")
        if args.out is not None or args.resume is not None:
            require("safetensors.torch", "safetensors", "models", "a run folder")
        self.args = args
        self.settings, self.folder = settle(args, needs_out=needs_out)
        backend = getattr(self.settings, "backend", None)
        if backend is not None:
            ok, reason = pykernels.available_backends()[self.operator][backend]
            if not ok:
                raise InputError(f"--backend {backend}: {reason}")

    def begin(self, data: dict[str, str]) -> None:
        """Make the folder of the run, or see that the one to continue is of the same data, given by fingerprints."""
        if self.folder is not None:
            check_same(self.folder, data)
        elif self.args.out is not None:
            self.folder = RunFolder.create(self.args.out, configuration(self.args, self.settings, data))

    def training_file(self) -> Path | None:
        """Where the trainings on their way are kept, if they are."""
        return None if self.folder is None else self.folder.path / _run.TRAINING

    def run(self, columns: Sequence[str], metrics_size: int | None) -> Run:
        """The run of its trainings; see :class:`pykernels.models._run.Run`."""
        path = self.args.out or self.args.resume
        return Run(
            self.folder,
            f"{self.args.parser.prog} --resume {shlex.quote(str(path))}",
            columns=columns,
            metrics_size=metrics_size,
            quiet=self.args.quiet,
            save_every=self.args.save_every,
        )

    def picture(self, name: str, draw: Any) -> None:
        """Write a picture into the folder of the run; without matplotlib there is none, and a note says so."""
        if self.folder is None:
            return
        try:
            self.folder.write(name, draw())
        except MissingExtraError as error:
            print(f"pykernels: the run goes without {name}: {error}", file=sys.stderr)

    def say(self, text: str) -> None:
        """Print a line of the result, unless it is to be JSON."""
        if not self.args.json:
            print(text, flush=True)

    def note(self, text: str) -> None:
        """Print a line of progress."""
        if not self.args.quiet:
            print(text, file=sys.stderr, flush=True)

    def finish(self, result: dict[str, Any]) -> int:
        """Print the result as JSON if that is wanted, and keep it in the folder."""
        if self.folder is not None:
            self.folder.finish(result)
            self.say(f"the run is in {self.folder.path}")
        if self.args.json:
            print(json.dumps(result, indent=2))
        return 0

    def finished(self) -> bool:
        """Whether the run that is to be continued needs nothing more. Its result is printed then."""
        result = None if self.folder is None else self.folder.result()
        if self.folder is None or result is None:
            return False
        self.say(f"the run in {self.folder.path} is finished; its result is in {_run.RESULT}")
        if self.args.json:
            print(json.dumps(result, indent=2))
        return True


def result_file(path: Path) -> Path:
    """The file with the result of a run, given by its folder or by itself."""
    if path.is_dir() and not (path / _run.RESULT).is_file():
        resume = f"; finish it with --resume {path}" if (path / _run.CONFIG).is_file() else ""
        raise InputError(f"{path} has no {_run.RESULT}{resume}")
    return path / _run.RESULT if path.is_dir() else path


def print_table(runs: Sequence[Path], table: Callable[[list[Any]], str], command: str) -> int:
    """Print the table of the results of ``pykernels <command>`` in these runs."""
    results = []
    for path in map(result_file, runs):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            table([result])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is no result of pykernels {command} ({error!r})") from error
        results.append(result)
    print(table(results), end="")
    return 0
