"""Benchmarks on this machine: ``python bench/run.py``, or one family: ``python bench/run.py --family latent_ode``.

Every result is checked in the run that times it. Writes medians, spreads, the machine and its measured limits to a
JSON file for each family, and the figure drawn from that file. Refuses to report where other processes keep the
machine busy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from cases import Limits
from figure import draw
from measure import ALLOWED_LOAD, Load, copy_rate, gemm_rate, machine

RESULTS = Path(__file__).parent / "results"
#: Families of operators: a module cpu_<family> each, with ``cases`` and ``extras``.
FAMILIES = ("causal_conv", "gaussian_warp", "latent_ode", "ntk_gram")


def run_family(family: str, limits: Limits, args: argparse.Namespace) -> dict[str, Any]:
    """The report of a family, without the load."""
    module = import_module(f"cpu_{family}")
    report: dict[str, Any] = {"machine": machine(), "limits": limits._asdict(), "cases": {}}
    for name, case in module.cases(limits, args.seconds).items():
        if args.only in name:
            torch.compiler.reset()
            report["cases"][name] = result = case()
            times = ", ".join(f"{n} {r['median_s'] * 1e3:.3f} ms" for n, r in result["contenders"].items())
            shares = [f", {result[f'share_of_{k}']:.0%} of {k}" for k in ("gemm", "copy") if f"share_of_{k}" in result]
            print(f"{name}: {result['speedup']:.2f} x {result['fastest_other']}{''.join(shares)} ({times})", flush=True)
    return report | module.extras(args.only)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, help="only this family of operators (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for a simple case (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="most threads (default: all)")
    parser.add_argument("--only", default="", help="run the cases whose name contains this, and write no file")
    parser.add_argument("--allow-load", action="store_true", help="report even when other processes are busy")
    args = parser.parse_args()

    quiet = Load()
    time.sleep(1.0)
    if _refuse(quiet.others(), args.allow_load):
        return 2
    for family in FAMILIES if args.family is None else (args.family,):
        load = Load()
        limits = Limits(args.threads, gemm_rate(2048, args.threads), copy_rate(args.threads))
        print(f"float32 GEMM {limits.gemm_flop_per_s / 1e9:.0f} GFLOP/s, copy {limits.copy_bytes_per_s / 1e9:.0f} GB/s")
        report = run_family(family, limits, args)
        report["machine"]["load_of_others"] = others = load.others()
        if _refuse(others, args.allow_load):
            return 2
        if not args.only:
            args.out.mkdir(parents=True, exist_ok=True)
            path = args.out / f"{family}.json"
            path.write_text(json.dumps(report, indent=1) + "\n")
            draw(report, path.with_suffix(".png"))
            print(f"wrote {path} and {path.with_suffix('.png').name}")
    return 0


def _refuse(others: float | None, allowed: bool) -> bool:
    if allowed or others is None or others <= ALLOWED_LOAD:
        return False
    print(
        f"Other processes use {others:.0%} of a core: no figures are reported. Stop them, or pass --allow-load.",
        file=sys.stderr,
    )
    return True


if __name__ == "__main__":
    sys.exit(main())
