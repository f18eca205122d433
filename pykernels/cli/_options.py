"""Arguments of the command line: their types, the options of all commands that train, and settings kept with a run."""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch

import pykernels
from pykernels._errors import InputError
from pykernels.models._run import RunFolder

REQUIRED = object()


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line, and that knows which arguments are settings of a run.

    ``settings`` has their names and defaults; in what it parses they are there only if they were given.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.settings: dict[str, Any] = {}

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def add_setting(self, name: str, *, default: Any, group: Any = None, **options: Any) -> None:
        """Add an argument that :func:`settle` keeps in the configuration of a run."""
        action = (group or self).add_argument(name, default=argparse.SUPPRESS, **options)
        self.settings[action.dest] = default


def positive(text: str) -> int:
    return integer(text, 1, 2**31)


def seed(text: str) -> int:
    return integer(text, 0, 2**32)


def integer(text: str, lowest: int, end: int) -> int:
    """An integer from ``lowest`` to ``end - 1``."""
    try:
        value = int(text)
    except ValueError:
        value = end
    if not lowest <= value < end:
        raise argparse.ArgumentTypeError(f"must be an integer from {lowest} to {end - 1}, got {text!r}")
    return value


def natural(text: str) -> int:
    return integer(text, 0, 2**31)


def positive_number(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def number(text: str) -> float:
    value = _number(text)
    if not -float("inf") < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def years(text: str) -> list[int]:
    """The first and the last year of ``"2006-2015"``, or of ``"2016"``, which is both."""
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?", text):
        raise argparse.ArgumentTypeError(f"must be a year or two such as 2006-2015, got {text!r}")
    both = [int(year) for year in text.split("-")]
    return [both[0], both[-1]]


def not_negative(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def seconds(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


def device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    return text


def check_device(name: str) -> None:
    """Raise unless PyTorch has this device.

    Raises:
        InputError: naming ``--device``.
    """
    if name == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise InputError(f"--device {name}: PyTorch sees no GPU here (it was built {built}); use --device cpu")
    if torch.device(name).index is not None and torch.device(name).index >= count:
        raise InputError(f"--device {name}: the GPUs here are cuda:0 to cuda:{count - 1}")


def add_device(parser: Parser) -> None:
    parser.add_argument("--device", type=device, default="cpu", metavar="D", help="cpu, cuda or cuda:N (default: cpu)")


def add_run_options(parser: Parser) -> None:
    """The options that all commands that train have."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, metavar="DIR", help="folder for the run, to be continued if interrupted")
    group.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in this folder, with its settings")
    parser.add_setting("--seed", group=group, type=seed, default=0, metavar="S", help="random seed (default: 0)")
    parser.add_setting(
        "--device", group=group, type=device, default="cpu", metavar="D", help="cpu, cuda or cuda:N (default: cpu)"
    )
    group.add_argument("--json", action="store_true", help="print the result as JSON")
    group.add_argument("--quiet", action="store_true", help="no progress bar")
    group.add_argument(
        "--save-every", type=seconds, default=60.0, metavar="SECONDS", help="between two saves (default: 60)"
    )
    parser.set_defaults(parser=parser)


def settle(args: argparse.Namespace, *, needs_out: bool = False) -> tuple[argparse.Namespace, RunFolder | None]:
    """The settings of the run, and its folder if it is to be continued.

    They come from the command line, or with ``--resume`` from the run's folder; then only the device may be given anew.

    Raises:
        InputError: if the folder is no run of this command, or the arguments contradict each other.
    """
    parser: Parser = args.parser
    given = {name: getattr(args, name) for name in parser.settings if hasattr(args, name)}
    folder = None
    if args.resume is None:
        settings = {**parser.settings, **given}
        missing = [name for name, value in settings.items() if value is REQUIRED]
        missing += ["out"] * (needs_out and args.out is None)
        if missing:
            parser.error(f"the following arguments are required: {', '.join(map(_option, missing))}")
        if args.out is not None:
            RunFolder.check_new(args.out)
    else:
        if args.out is not None:
            parser.error("argument --out: not allowed with argument --resume")
        if others := [_option(name) for name in given if name != "device"]:
            raise InputError(f"--resume takes its settings from the run; leave out {', '.join(others)}")
        folder = RunFolder.reopen(args.resume)
        settings = {**folder.config["settings"], **given}
        if folder.config["command"] != command(parser):
            raise InputError(f"--resume: {args.resume} is a run of pykernels {folder.config['command']}")
        if set(settings) != set(parser.settings):
            wrote = folder.config.get("environment", {}).get("pykernels")
            raise InputError(f"--resume: {args.resume} is a run of pykernels {wrote}, which had other settings")
    check_device(settings["device"])
    return argparse.Namespace(**settings), folder


def command(parser: argparse.ArgumentParser) -> str:
    """The command of a parser, such as ``"train usrl"``."""
    return parser.prog.partition(" ")[2]


def configuration(args: argparse.Namespace, settings: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    """What config.json holds: the command, its settings, its data, and what else the bits of the result depend on."""
    return {
        "command": command(args.parser),
        "settings": vars(settings),
        "data": data,
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """Versions, CPU and threads."""
    return {
        **{name: package_version(name) for name in ("pykernels", "torch", "numpy", "scikit-learn")},
        "python": platform.python_version(),
        "cpu_capability": pykernels.cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def check_same(folder: RunFolder, data: dict[str, Any]) -> None:
    """Compare what a run was begun with and what it is continued with.

    Raises:
        InputError: if the data are other ones. Other versions or threads are only told: the result may differ slightly.
    """
    if folder.config.get("data") != json.loads(json.dumps(data)):
        raise InputError(f"--resume: the data of the run in {folder.path} have changed since it was begun")
    then, now = folder.config.get("environment", {}), environment()
    changes = [f"{name} was {then.get(name)} and is {now[name]}" for name in now if then.get(name) != now[name]]
    if changes:
        print(f"pykernels: the result may differ in rounding: {', '.join(changes)}", file=sys.stderr)


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
