"""The command line: ``pykernels info | train | reproduce | table | forecast | encode | export``.

Exit status: 0, or 1 when a check fails, 2 for bad input (one line on stderr says what to do), 130 when interrupted.
Results go to stdout, with ``--json`` as one JSON document and nothing else; progress goes to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import pykernels
from pykernels._errors import InputError, MissingExtraError
from pykernels.cli import (
    _advection_diffusion,
    _forecast,
    _gantk,
    _gantk_generator,
    _info,
    _neural_ode,
    _trained,
    _usrl,
    _usrl_long,
)
from pykernels.cli._options import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments (those of the process by default) and return the exit status."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except (InputError, MissingExtraError, FloatingPointError) as error:
        return _fail(str(error), 2)
    except BrokenPipeError:  # the reader of our output left: no one to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}", 2)
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted", 130)


def _fail(message: str, status: int) -> int:
    print(f"pykernels: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parser() -> Parser:
    parser = Parser(prog="pykernels", description=pykernels.__doc__)
    parser.add_argument("--version", action="version", version=f"pykernels {pykernels.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _info.add(commands)
    systems = {
        name: commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".").add_subparsers(
            metavar="SYSTEM", required=True
        )
        for name, text in (
            ("train", "train a published system"),
            ("reproduce", "train, test, and print the published figure beside"),
            ("table", "results of runs beside the published figures, in Markdown"),
        )
    }
    _usrl.add(systems)
    _usrl_long.add(systems)
    _neural_ode.add(systems)
    _advection_diffusion.add(systems)
    _gantk.add(systems)
    _gantk_generator.add(systems)
    _forecast.add(commands)
    _trained.add(commands)
    return parser
