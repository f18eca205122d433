"""The README's figure, from a results file: ``python bench/figure.py bench/results/cpu.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHERS = "#0b6e99", {"eager": "#9aa5ad", "channels-last": "#c3cad0", "compiled": "#6d7880"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Times of every contender as bars relative to pykernels, one group for each case."""
    cases = report["cases"]
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(cases) * 1.6 + 1.4), layout="constrained")
    names = ["pykernels", *OTHERS]
    height = 0.8 / len(names)
    for row, (_, case) in enumerate(cases.items()):
        ours = case["contenders"]["pykernels"]["median_s"]
        for i, name in enumerate(names):
            result = case["contenders"][name]
            ratio = result["median_s"] / ours
            y = row + (i - (len(names) - 1) / 2) * height
            axes.barh(y, ratio, height * 0.92, color=OTHERS.get(name, OURS), label=name if row == 0 else None)
            low, high = (q / ours for q in result["quartiles_s"])
            axes.plot([low, high], [y, y], color="black", linewidth=0.8)
        label = f"{case['speedup']:.1f}x" if case["speedup"] < 10 else f"{case['speedup']:.0f}x"
        end = min(c["median_s"] for n, c in case["contenders"].items() if n != "pykernels") / ours
        axes.annotate(label, (max(1.0, end), row + 0.42), fontsize=8, color=OURS, va="bottom")
    axes.set_yticks(range(len(cases)), list(cases), fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time relative to pykernels (log scale); bars are medians, lines quartiles; less is faster")
    axes.axvline(1.0, color=OURS, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    machine, limits = report["machine"], report["limits"]
    axes.set_title(
        f"float32 on {machine['cpu']}, {limits['threads']} threads, {machine['capability']}, torch {machine['torch']}",
        fontsize=9,
    )
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
