"""What turns the timings of a CPU benchmark into a result."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

#: Largest relative error, in the Euclidean norm against float64, of a float32 result whose time is reported. It tells
#: right from wrong; the tests hold the errors to what plain PyTorch makes.
ALLOWED_ERROR = 1e-3


class Limits(NamedTuple):
    """Measured rates of the machine with this many threads."""

    threads: int
    gemm_flop_per_s: float
    copy_bytes_per_s: float


def relative_error(value: Tensor, expected: Tensor) -> float:
    """In the Euclidean norm."""
    return float((value.detach().double() - expected).norm() / expected.norm())


def verdict(
    results: dict[str, dict[str, Any]],
    errors: dict[str, float],
    *,
    limits: Limits | None = None,
    flops: int = 0,
    moved: int = 0,
) -> dict[str, Any]:
    """Speed against the fastest of the others that were checked, and against the measured limit, if one is given.

    Args:
        limits: of the machine; needed where flops or bytes are given.
        flops: of the work.
        moved: bytes that the work must move.
    """
    wrong = {name: error for name, error in errors.items() if not error <= ALLOWED_ERROR}
    if wrong:
        raise SystemExit(f"results differ, no speed is reported: {wrong}")
    ours = results["pykernels"]["median_s"]
    others = {name: results[name]["median_s"] for name in errors if not name.startswith("pykernels")}
    fastest = min(others, key=others.__getitem__)
    found = {
        "contenders": results,
        "errors": errors,
        "fastest_other": fastest,
        "speedup": others[fastest] / ours,
    }
    if flops and limits:
        rate = flops / ours
        found |= {"flops": flops, "flop_per_s": rate, "share_of_gemm": rate / limits.gemm_flop_per_s}
    if moved and limits:
        rate = moved / ours
        found |= {"bytes": moved, "bytes_per_s": rate, "share_of_copy": rate / limits.copy_bytes_per_s}
    return found
