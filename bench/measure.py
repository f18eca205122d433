"""Timing side by side: what machine this is, whether it is quiet, and interleaved rounds of contenders."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pykernels

#: Share of one core that other processes may use before results are refused.
ALLOWED_LOAD = 0.15


def _busy_ticks() -> tuple[float, float]:
    """Ticks that all cores have spent working, and this process with its children among them."""
    fields = [float(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    own = sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")
    return sum(fields) - fields[3] - fields[4], own  # without idle and iowait


class Load:
    """Cores that other processes used since this object was made; None where /proc does not tell."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.ticks = _busy_ticks() if Path("/proc/stat").exists() else None

    def others(self) -> float | None:
        if self.ticks is None:
            return None
        elapsed = (time.perf_counter() - self.start) * os.sysconf("SC_CLK_TCK")
        busy, own = (now - then for now, then in zip(_busy_ticks(), self.ticks, strict=True))
        return max(0.0, (busy - own) / elapsed)


def machine() -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "capability": pykernels.cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pykernels": pykernels.__version__,
        "load_average": os.getloadavg()[0],
    }


@dataclass
class Contender:
    """One way to do the work, timed with the number of threads that suits it best."""

    name: str
    run: Callable[[], Any]
    threads: int = 0
    seconds: list[float] = field(default_factory=list)

    def time(self, repeats: int) -> list[float]:
        torch.set_num_threads(self.threads)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            self.run()
            times.append(time.perf_counter() - start)
        return times

    def choose_threads(self, most: int) -> None:
        """Use the number of threads, of 1, 2, 4, ... and ``most``, with the best time of a few runs."""
        best = {}
        for self.threads in sorted({1, *(2**i for i in range(10) if 2**i < most), most}):
            best[self.threads] = min(self.time(4)[1:])
        self.threads = min(best, key=best.__getitem__)

    def summary(self) -> dict[str, Any]:
        low, middle, high = statistics.quantiles(self.seconds, n=4)
        return {"median_s": middle, "quartiles_s": [low, high], "runs": len(self.seconds), "threads": self.threads}


def compare(contenders: list[Contender], *, seconds: float, most_threads: int) -> dict[str, dict[str, Any]]:
    """Time the contenders in turns, a few runs at a time, for about ``seconds`` in all.

    The first run of a turn meets caches full of the others' data and is not counted.
    """
    for contender in contenders:
        contender.run()
        contender.choose_threads(most_threads)
    slowest = max(min(c.time(2)) for c in contenders)
    rounds = max(5, min(60, int(seconds / (6 * slowest * len(contenders)))))
    for _ in range(rounds):
        for contender in contenders:
            contender.seconds += contender.time(6)[1:]
    torch.set_num_threads(most_threads)
    return {c.name: c.summary() for c in contenders}


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes that a call takes at its peak beyond what the process held before. Needs Linux."""

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def gemm_rate(size: int, threads: int) -> float:
    """flop/s of the best of several float32 products of square matrices."""
    torch.set_num_threads(threads)
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    contender = Contender("gemm", lambda: torch.mm(a, b, out=out), threads)
    return 2 * size**3 / statistics.median(contender.time(12)[2:])


def copy_rate(threads: int) -> float:
    """bytes/s, read and written, of a copy that fits no cache."""
    torch.set_num_threads(threads)
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    contender = Contender("copy", lambda: target.copy_(source), threads)
    return 2 * source.nbytes / statistics.median(contender.time(8)[2:])
