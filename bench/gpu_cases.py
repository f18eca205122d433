"""What a GPU benchmark consists of, and what turns its timings into a result; needs no GPU by itself."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Largest error of a result whose time is reported, in the Euclidean norm relative to float64. It tells right from
#: wrong; the tests hold the errors to what plain PyTorch makes.
ALLOWED_ERROR = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """A problem, its least cost, and the ways to solve it.

    Args:
        name: what is computed, with sizes.
        dtype: of the inputs.
        flops: multiplications and additions.
        bytes_moved: what has to be read and written at least, every tensor once in each direction.
        prepare: makes the inputs on a device and returns the runs, by contender, and the expected results in float64.
            Every run returns all results.
    """

    name: str
    dtype: torch.dtype
    flops: int
    bytes_moved: int
    prepare: Callable[[str], tuple[dict[str, Callable[[], Sequence[Tensor]]], Sequence[Tensor]]]


class Limits(NamedTuple):
    """Measured rates of the machine."""

    copy_bytes_per_s: float
    gemm_flop_per_s: dict[torch.dtype, float]


def wrong_results(errors: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    return {name: error for name, error in errors.items() if not error <= ALLOWED_ERROR[dtype]}


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"median_s": middle, "quartiles_s": [low, high], "runs": len(seconds)}


def judge(case: Case, seconds: dict[str, list[float]], errors: dict[str, float], limits: Limits) -> dict[str, Any]:
    """The result of a case, or, if a contender is wrong, only its error.

    ``limit_s`` is the time that the copy bandwidth or the rate of matrix products allows, whichever is longer.
    """
    result: dict[str, Any] = {
        "dtype": str(case.dtype).removeprefix("torch."),
        "flops": case.flops,
        "bytes": case.bytes_moved,
        "flops_per_byte": case.flops / case.bytes_moved,
        "errors": errors,
    }
    wrong = wrong_results(errors, case.dtype)
    if wrong:
        return {**result, "wrong": wrong}
    contenders = {name: summary(times) for name, times in seconds.items()}
    ours = contenders["pykernels"]["median_s"]
    others = {name: c["median_s"] for name, c in contenders.items() if name != "pykernels"}
    fastest = min(others, key=others.__getitem__)
    memory_s = case.bytes_moved / limits.copy_bytes_per_s
    compute_s = case.flops / limits.gemm_flop_per_s[case.dtype]
    return {
        **result,
        "contenders": contenders,
        "fastest_other": fastest,
        "speedup": others[fastest] / ours,
        "limit_s": max(memory_s, compute_s),
        "limited_by": "memory" if memory_s >= compute_s else "products",
        "share_of_limit": max(memory_s, compute_s) / ours,
    }


def table(report: dict[str, Any]) -> str:
    """The report as text, one line for each case."""
    limits = report["limits"]
    rates = ", ".join(f"{name} {rate / 1e12:.1f} Tflop/s" for name, rate in limits["gemm_flop_per_s"].items())
    lines = [
        f"{report['machine']['gpu']}: copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s, matrix products {rates}",
        f"{'case':58} {'ms':>9} {'of limit':>9}   against the others",
    ]
    for name, result in report["cases"].items():
        if "wrong" in result:
            lines.append(f"{name:58} no time is reported, results are wrong: {result['wrong']}")
            continue
        ours = result["contenders"]["pykernels"]["median_s"]
        others = ", ".join(
            f"{c['median_s'] / ours:.2f} x {other}" for other, c in result["contenders"].items() if other != "pykernels"
        )
        limit = f"{result['share_of_limit']:.0%}"
        lines.append(f"{name:58} {ours * 1e3:9.4f} {limit:>9}   {others} ({result['limited_by']})")
    return "\n".join(lines) + "\n"
