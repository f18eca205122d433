"""Benchmarks on a GPU: ``bench/gpu.sh`` builds the package, runs the GPU tests, and then this.

Every result is checked against float64 in the run that times it. Contenders take turns; a time is the median over the
turns, between CUDA events around a few calls in a row, so that it holds what a call costs on the host where that is
more than what it costs on the GPU. Products of float32 matrices are computed in float32 throughout, without TF32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from cases import relative_error
from gpu_cases import Case, Limits, judge, table, wrong_results
from measure import machine

#: One module for each family of operators, with a function ``cases`` that yields its benchmarks.
FAMILIES = ("gpu_causal_conv", "gpu_latent_ode", "gpu_gaussian_warp", "gpu_ntk_gram")


def elapsed(run: Callable[[], Any], calls: int) -> float:
    """Seconds per call of several in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def times_in_turns(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each contender in every turn, for about ``seconds`` in all."""
    calls = {}
    for name, run in runs.items():
        elapsed(run, 3)
        calls[name] = max(1, min(100, int(2e-3 / elapsed(run, 5))))
    turn = sum(calls[name] * elapsed(run, calls[name]) for name, run in runs.items())
    turns = max(7, min(100, int(seconds / turn)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            times[name].append(elapsed(run, calls[name]))
    return times


def run_case(case: Case, limits: Limits, seconds: float) -> dict[str, Any]:
    runs, expected = case.prepare("cuda")
    errors = {
        name: max(relative_error(value, exact) for value, exact in zip(run(), expected, strict=True))
        for name, run in runs.items()
    }
    del expected
    torch.cuda.empty_cache()
    times = {} if wrong_results(errors, case.dtype) else times_in_turns(runs, seconds)
    return judge(case, times, errors, limits)


def measure_limits() -> Limits:
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy_s = sorted(times_in_turns({"copy": lambda: target.copy_(source)}, 1.0)["copy"])
    rates = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        size = 8192
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        gemm_s = sorted(times_in_turns({"gemm": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, 1.0)["gemm"])
        rates[dtype] = 2 * size**3 / gemm_s[len(gemm_s) // 2]
    return Limits(2 * source.nbytes / copy_s[len(copy_s) // 2], rates)


def gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": import_module("triton").__version__,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "results" / "gpu", help="folder (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each case (default: %(default)s)")
    parser.add_argument("--only", default="", help="run the cases whose name contains this, and write no file")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench/gpu.py: PyTorch sees no GPU here", file=sys.stderr)
        return 2

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    limits = measure_limits()
    rates = {str(dtype)[6:]: rate for dtype, rate in limits.gemm_flop_per_s.items()}
    report: dict[str, Any] = {
        "machine": {**machine(), **gpu()},
        "limits": {"copy_bytes_per_s": limits.copy_bytes_per_s, "gemm_flop_per_s": rates},
        "cases": {},
    }
    for family in FAMILIES:
        for case in import_module(family).cases():
            if args.only in case.name:
                torch.compiler.reset()
                report["cases"][case.name] = run_case(case, limits, args.seconds)
                print(case.name, flush=True)
                if not args.only:  # after every case, so that an interrupted run leaves what it has
                    args.out.mkdir(parents=True, exist_ok=True)
                    (args.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
                    (args.out / "gpu.txt").write_text(table(report))
    print(table(report), end="")
    return int(any("wrong" in result for result in report["cases"].values()))


if __name__ == "__main__":
    sys.exit(main())
