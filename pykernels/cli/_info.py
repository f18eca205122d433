"""``pykernels info``: what a bug report needs."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import pykernels
from pykernels.backends import OPERATORS
from pykernels.cli._options import package_version

OPTIONAL_PACKAGES = ("scikit-learn", "safetensors", "tqdm", "aeon", "matplotlib", "onnx", "onnxscript")


def add(commands: Any) -> None:
    """Add the command ``info``."""
    parser = commands.add_parser(
        "info", help="what a bug report needs: versions, CPU, GPU, backends", description=_info.__doc__
    )
    parser.add_argument("--check", action="store_true", help="compare every operator with its reference (seconds)")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> int:
    """Print what a bug report needs; with --check, also compare every operator with its reference."""
    found = _found()
    answers = pykernels.available_backends()
    checks = _checks() if args.check and args.json else []
    if args.json:
        backends = {name: {key: answer._asdict() for key, answer in row.items()} for name, row in answers.items()}
        document = {**found, "backends": backends} | ({"checks": checks} if args.check else {})
        print(json.dumps(document, indent=2))
        return 0 if all(check["ok"] for check in checks) else 1
    _print_table(
        [
            *found["versions"].items(),
            ("Python", found["python"]),
            ("system", found["system"]),
            ("CPU", found["cpu"]),
            (
                "CPU capability",
                f"{found['cpu_capability']} (this machine runs: {', '.join(found['cpu_capabilities']) or 'none'})",
            ),
            ("threads", f"{found['threads']} of {found['usable_cpus']} usable CPUs"),
            ("GPU", _gpu(found)),
            *found["environment"].items(),
        ]
    )
    print()
    table = [("operator", "backend", "runs here", "why not")]
    for operator, row in answers.items():
        table += [(operator, name, "yes" if ok else "no", reason) for name, (ok, reason) in row.items()]
    _print_table(table)
    if not args.check:
        return 0
    print()
    checks = _checks()
    rows = [("operator", "backend", "quantity", "error", "allowed", "")]
    for check in checks:
        verdict = "ok" if check["ok"] else "FAILED"
        if "problem" in check:
            rows.append((check["operator"], check["backend"], check["problem"], "", "", verdict))
        else:
            size, allowed = f"{check['error']:.1e}", f"{check['allowed']:.0e}"
            rows.append((check["operator"], check["backend"], check["quantity"], size, allowed, verdict))
    _print_table(rows)
    passed = all(check["ok"] for check in checks)
    print("every operator agrees with its reference" if passed else "some operators FAILED")
    return 0 if passed else 1


def _found() -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "versions": {name: package_version(name) for name in ("pykernels", "torch", "numpy", *OPTIONAL_PACKAGES)},
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "cpu": cpu_name(),
        "cpu_capability": pykernels.cpu_capability(),
        "cpu_capabilities": list(pykernels.cpu_capabilities()),
        "threads": torch.get_num_threads(),
        "usable_cpus": _usable_cpus(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
        "cuda": torch.version.cuda,
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("PYKERNELS_", "OMP_"))
        },
    }


def _checks() -> list[dict[str, Any]]:
    """Compare every operator with its reference on every backend that runs here: a record for each quantity."""
    records: list[dict[str, Any]] = []
    for operator, answers in pykernels.available_backends().items():
        for backend in (name for name, (ok, _) in answers.items() if ok):
            what = {"operator": operator, "backend": backend}
            try:
                check = OPERATORS[operator].check(backend)
            except Exception as error:  # a check that cannot run has failed, and the others still run
                records.append({**what, "ok": False, "problem": f"{type(error).__name__}: {error}"})
                continue
            for quantity, allowed in check.allowed.items():
                size = check.errors[quantity]
                records.append({**what, "ok": size <= allowed, "quantity": quantity, "error": size, "allowed": allowed})
    return records


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "unknown"


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu(found: dict[str, Any]) -> str:
    cuda = found["cuda"]
    if found["gpus"]:
        return f"{', '.join(found['gpus'])} (CUDA {cuda})"
    return f"none visible to PyTorch, which was built {f'for CUDA {cuda}' if cuda else 'without CUDA'}"
