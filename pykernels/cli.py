"""The command line: ``pykernels info``, ``pykernels train`` and ``pykernels reproduce``.

Exit status: 0, or 1 when a check fails, 2 for bad input (one line on stderr says what to do), 130 when interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

import pykernels
from pykernels._errors import InputError, MissingExtraError, require
from pykernels.backends import BACKENDS, OPERATORS

if TYPE_CHECKING:
    from pykernels.data import Dataset
    from pykernels.models._compare import StepTimes

OPTIONAL_PACKAGES = ("scikit-learn", "safetensors", "tqdm", "aeon", "matplotlib")
DEFAULT_K = 5
PUBLISHED_COMBINATION = {"ucr": (1, 2, 5, 10), "uea": (5, 10, 20)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments (those of the process by default) and return the exit status."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except (InputError, MissingExtraError) as error:
        return _fail(str(error), 2)
    except BrokenPipeError:  # the reader of our output left: no one to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, status: int) -> int:
    print(f"pykernels: {' '.join(message.split())}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pykernels", description=pykernels.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pykernels {pykernels.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    info = commands.add_parser(
        "info", help="what a bug report needs: versions, CPU, GPU, backends", description=_info.__doc__
    )
    info.add_argument("--check", action="store_true", help="compare every operator with its reference (seconds)")
    info.set_defaults(run=_info)

    train = commands.add_parser("train", help="train a published system", description=_train.__doc__)
    train.add_argument("system", choices=["usrl"], metavar="SYSTEM", help="usrl")
    _add_data_arguments(train)
    train.add_argument(
        "--k", type=_positive, default=DEFAULT_K, metavar="K", help=f"negatives per series (default: {DEFAULT_K})"
    )
    train.add_argument("--seed", type=_seed, default=0, metavar="S", help="random seed (default: 0)")
    train.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    _add_training_arguments(train)
    train.set_defaults(run=_train)

    reproduce = commands.add_parser(
        "reproduce", help="train, test, and print the published figure beside", description=_reproduce.__doc__
    )
    reproduce.add_argument("system", choices=["usrl"], metavar="SYSTEM", help="usrl")
    _add_data_arguments(reproduce)
    which = reproduce.add_mutually_exclusive_group()
    # No default here: argparse could not tell it from the same number on the command line, beside --combined.
    which.add_argument("--k", type=_positive, metavar="K", help=f"negatives per series (default: {DEFAULT_K})")
    which.add_argument(
        "--combined", action="store_true", help="one encoder for each published K, features concatenated"
    )
    reproduce.add_argument("--seeds", type=_positive, default=1, metavar="N", help="seeds 0 to N-1 (default: 1)")
    reproduce.add_argument("--compare", action="store_true", help="time some training steps beside plain PyTorch")
    reproduce.add_argument("--picture", type=Path, metavar="FILE", help="picture of the learned features to write")
    reproduce.add_argument("--json", action="store_true", help="print the result as JSON")
    _add_training_arguments(reproduce)
    reproduce.set_defaults(run=_reproduce)
    return parser


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, metavar="NAME", help="for example GunPoint")
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where NAME/NAME_TRAIN.ts and NAME/NAME_TEST.ts are (default: the data sets inside aeon)",
    )


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=_positive, metavar="N", help="training steps (default: as published)")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="default: float32")
    parser.add_argument("--backend", choices=BACKENDS, help="default: the best that runs")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _positive(text: str) -> int:
    return _integer(text, 1, 2**31)


def _seed(text: str) -> int:
    return _integer(text, 0, 2**32)


def _integer(text: str, lowest: int, end: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = end
    if not lowest <= value < end:
        raise argparse.ArgumentTypeError(f"must be an integer from {lowest} to {end - 1}, got {text!r}")
    return value


def _info(args: argparse.Namespace) -> int:
    """Print what a bug report needs; with --check, also compare every operator with its reference."""
    rows = [(name, _version(name)) for name in ("pykernels", "torch", "numpy", *OPTIONAL_PACKAGES)]
    capabilities = pykernels.cpu_capabilities()
    rows += [
        ("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}"),
        ("CPU", _cpu_name()),
        ("CPU capability", f"{pykernels.cpu_capability()} (this machine runs: {', '.join(capabilities) or 'none'})"),
        ("threads", f"{torch.get_num_threads()} of {_usable_cpus()} usable CPUs"),
        ("GPU", _gpu()),
        *((name, value) for name, value in sorted(os.environ.items()) if name.startswith(("PYKERNELS_", "OMP_"))),
    ]
    _print_table(rows)
    print()
    table = [("operator", "backend", "runs here", "why not")]
    for operator, answers in pykernels.available_backends().items():
        table += [(operator, name, "yes" if ok else "no", reason) for name, (ok, reason) in answers.items()]
    _print_table(table)
    if not args.check:
        return 0
    print()
    return 0 if _check_operators() else 1


def _check_operators() -> bool:
    """Compare every operator with its reference on every backend that runs here, and print the outcome."""
    table = [("operator", "backend", "quantity", "error", "allowed", "")]
    passed = True
    for operator, answers in pykernels.available_backends().items():
        for backend in (name for name, (ok, _) in answers.items() if ok):
            try:
                check = OPERATORS[operator].check(backend)
            except Exception as error:  # a check that cannot run has failed, and the others still run
                table.append((operator, backend, f"{type(error).__name__}: {error}", "", "", "FAILED"))
                passed = False
                continue
            passed &= check.passed
            for quantity, allowed in check.allowed.items():
                error_size = check.errors[quantity]
                verdict = "ok" if error_size <= allowed else "FAILED"
                table.append((operator, backend, quantity, f"{error_size:.1e}", f"{allowed:.0e}", verdict))
    _print_table(table)
    print("every operator agrees with its reference" if passed else "some operators FAILED")
    return passed


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "unknown"


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu() -> str:
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return f"{names} (CUDA {torch.version.cuda})"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"none visible to PyTorch, which was built {'for ' * bool(torch.version.cuda)}{built}"


def _train(args: argparse.Namespace) -> int:
    """Train the encoder on the training series, without labels, and save its state_dict."""
    _check_output(args.out, "--out")
    safetensors = require("safetensors.torch", "safetensors", "models", "pykernels train")
    transformer = _transformer_arguments(args)
    data = _load(args)
    from pykernels.models.usrl import USRLTransformer

    model = USRLTransformer(args.k, random_state=args.seed, **transformer).fit(data.X_train)
    encoder = model.encoders_[0]
    sizes = ("channels", "depth", "reduced_size", "out_channels", "kernel_size")
    metadata = {
        "system": "usrl",
        "dataset": data.name,
        "n_negatives": str(args.k),
        "steps": str(len(model.losses_[0])),
        "seed": str(args.seed),
        "pykernels": pykernels.__version__,
        "encoder": json.dumps({"in_channels": model.n_features_in_} | {name: getattr(model, name) for name in sizes}),
    }
    _write(args.out, safetensors.save(encoder.state_dict(), metadata))
    losses, milliseconds = model.losses_[0], 1e3 * model.step_seconds_[0]
    print(f"{data.name}: K={args.k}, {len(losses)} steps of {milliseconds:.1f} ms, last loss {losses[-1]:.3f}")
    print(f"the encoder's state_dict is in {args.out}")
    return 0


def _reproduce(args: argparse.Namespace) -> int:
    """Train the encoder without labels, an SVM on its features, and print the accuracy beside the published one."""
    options = _transformer_arguments(args)
    if args.picture is not None:
        from pykernels.models._picture import check_format

        _check_output(args.picture, "--picture")
        check_format(args.picture.suffix)
    data = _load(args)
    from pykernels.models.usrl import USRLClassifier, published_steps

    archive = "ucr" if data.n_channels == 1 else "uea"
    negatives = PUBLISHED_COMBINATION[archive] if args.combined else (args.k or DEFAULT_K,)
    steps = [args.steps or published_steps(k) for k in negatives]
    column = "ours_combined" if args.combined else f"ours_K{negatives[0]}"
    published = _published(data.name, column, archive)

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    n_train, channels, (shortest, longest) = len(data.X_train), data.n_channels, data.lengths
    length = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    say(
        f"{data.name}: {n_train} training and {len(data.X_test)} test series, {len(set(data.y_train))} classes, "
        f"{channels} channel{'s' * (channels > 1)}, {length} samples"
    )
    say(f"K={_join(negatives)}, {_join(steps)} training steps{' (not the published number)' * bool(args.steps)}")
    runs, accuracies = [], []
    first: Any = None
    for seed in range(args.seeds):
        model = USRLClassifier(negatives, random_state=seed, **options).fit(data.X_train, data.y_train)
        accuracy = float(model.score(data.X_test, data.y_test))
        accuracies.append(accuracy)
        seconds = model.transformer_.step_seconds_
        runs.append({"seed": seed, "accuracy": accuracy, "C": str(model.svm_.C), "step_seconds": seconds})
        say(
            f"seed {seed}: test accuracy {accuracy:.3f} "
            f"(training step {_join(f'{1e3 * s:.1f}' for s in seconds)} ms, SVM with C={model.svm_.C:g})"
        )
        first = first or model
    mean = statistics.fmean(accuracies)
    say(_verdict(mean, published, args.seeds, column))

    comparisons = _compare(data, negatives, args) if args.compare else []
    for times in comparisons:
        say(
            f"K={times.n_negatives}, median of {times.steps} training steps: pykernels {1e3 * times.seconds:.1f} ms "
            f"({_threads(times.threads)}), plain PyTorch {1e3 * times.plain_seconds:.1f} ms "
            f"({_threads(times.plain_threads)}, its fastest), ratio {times.ratio:.1f}"
        )
    if args.picture is not None:
        from pykernels.models._picture import features_picture

        subtitle = f"encoder K={_join(negatives)}, trained without labels; test accuracy {accuracies[0]:.3f}"
        features = [first.transformer_.transform(X) for X in (data.X_train, data.X_test)]
        _write(args.picture, features_picture(data, features[0], features[1], args.picture.suffix, subtitle))
        say(f"the picture of the features is in {args.picture}")
    if args.json:
        result = {
            "dataset": data.name,
            "n_negatives": negatives,
            "steps": steps,
            "dtype": args.dtype,
            "runs": runs,
            "accuracy": mean,
            "published": published,
            "comparisons": [vars(times) for times in comparisons],
            "threads": torch.get_num_threads(),
            "cpu": _cpu_name(),
            "cpu_capability": pykernels.cpu_capability(),
            "versions": {name: _version(name) for name in ("pykernels", "torch", "numpy", "scikit-learn")},
        }
        print(json.dumps(result, indent=2))
    return 0


def _transformer_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The estimators' arguments, once all that they need is known to be there."""
    require("sklearn", "scikit-learn", "models", f"pykernels {args.system}")
    if not args.quiet:
        require("tqdm", "tqdm", "models", "a progress bar (or give --quiet)")
    if args.backend is not None:
        ok, reason = pykernels.available_backends()["causal_conv1d"][args.backend]
        if not ok:
            raise InputError(f"--backend {args.backend}: {reason}")
    return {"n_steps": args.steps, "dtype": args.dtype, "backend": args.backend, "progress": not args.quiet}


def _load(args: argparse.Namespace) -> Dataset:
    from pykernels.data import load

    return load(args.dataset, args.folder)


def _published(dataset: str, column: str, archive: str) -> float | None:
    from pykernels.models.published import published_accuracy

    try:
        return published_accuracy(dataset, column, archive)
    except ValueError:  # a K that was not published
        return None


def _verdict(mean: float, published: float | None, seeds: int, column: str) -> str:
    text = f"mean test accuracy of {seeds} seed{'s' * (seeds > 1)}: {mean:.3f}"
    if published is None:
        return f"{text}; none is published for {column.removeprefix('ours_')} on this data set"
    difference = round(mean, 3) - published + 0.0  # published with three decimals; + 0.0 makes of -0 a 0
    return f"{text}, published: {published:.3f}, difference: {difference:+.3f}"


def _compare(data: Dataset, negatives: Sequence[int], args: argparse.Namespace) -> list[StepTimes]:
    from pykernels.models._compare import compare_step_times

    series = torch.tensor(data.X_train, dtype=getattr(torch, args.dtype))
    return [compare_step_times(series, k, backend=args.backend) for k in negatives]


def _join(values: Any) -> str:
    return ", ".join(map(str, values))


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _check_output(path: Path, option: str) -> None:
    """Find out before the training that a file cannot be written after it."""
    folder = path.parent
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder; give the name of a file")
    if not folder.is_dir():
        raise InputError(f"{option}: there is no folder {folder}; create it first")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option}: the folder {folder} is not writable")


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
