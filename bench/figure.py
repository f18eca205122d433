"""The README's figure, from a results file: ``python bench/figure.py bench/results/causal_conv.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = {
    "pykernels": ("#0b6e99", "o", 70),
    "eager": ("#c4622d", "s", 38),
    "channels-last": ("#7a8b2f", "D", 34),
    "compiled": ("#6d5a8d", "^", 44),
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Times of all contenders relative to pykernels, a row for each case, and on the right what they come to."""
    cases = {name: case for name, case in report["cases"].items() if "share_of_gemm" in case}
    figure, axes = plt.subplots(figsize=(10, 0.36 * len(cases) + 1.7), layout="constrained")
    for row, (_, case) in enumerate(cases.items()):
        ours = case["contenders"]["pykernels"]["median_s"]
        for name, (color, marker, size) in STYLES.items():
            if name not in case["contenders"]:
                continue
            result = case["contenders"][name]
            low, high = (quartile / ours for quartile in result["quartiles_s"])
            axes.plot([low, high], [row, row], color=color, linewidth=1.5, zorder=2)
            label = name if row == 0 else None
            axes.scatter(result["median_s"] / ours, row, size, color=color, marker=marker, label=label, zorder=3)
    end = axes.get_xlim()[1]
    for row, case in enumerate(cases.values()):
        ours = case["contenders"]["pykernels"]["median_s"]
        text = f"{case['speedup']:4.1f}x {ours * 1e3:6.2f} ms {case['share_of_gemm']:4.0%}"
        axes.text(end * 1.02, row, text, va="center", fontsize=8.5, family="monospace")
    axes.text(end * 1.02, -1.0, "faster    time       of GEMM", va="center", fontsize=8.5, style="italic")
    axes.set_xlim(0, end)
    axes.set_ylim(len(cases) - 0.4, -0.7)
    axes.set_yticks(range(len(cases)), list(cases), fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="0.92", zorder=0)
    axes.axvline(1.0, color=STYLES["pykernels"][0], linewidth=0.8, zorder=1)
    axes.set_xlabel("time relative to pykernels: medians and quartiles, left is faster", fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    machine, limits = report["machine"], report["limits"]
    figure.suptitle(
        f"float32, {machine['cpu']}, {limits['threads']} threads, GEMM {limits['gemm_flop_per_s'] / 1e9:.0f} GFLOP/s, "
        f"torch {machine['torch']}",
        fontsize=10,
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=len(STYLES), fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
