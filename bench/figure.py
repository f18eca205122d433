"""The README's figure, from a results file: ``python bench/figure.py bench/results/causal_conv.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

#: Colour, marker and size of a contender; those that are named differently stand for the same in another family.
STYLES = {
    "pykernels": ("#0b6e99", "o", 70),
    "eager": ("#c4622d", "s", 38),
    "loop": ("#c4622d", "s", 38),
    "channels-last": ("#7a8b2f", "D", 34),
    "jax scan": ("#7a8b2f", "D", 34),
    "compiled": ("#6d5a8d", "^", 44),
    "loop of compiled steps": ("#6d5a8d", "^", 44),
    "compiled loop": ("#6d5a8d", "v", 44),
    "torchdiffeq": ("#9c2f3f", "P", 46),
    "torchode": ("#8a6d3b", "X", 46),
    "bilinear grid_sample": ("#c4622d", "s", 38),
    "cubic torch-interpol": ("#7a8b2f", "D", 34),
    "separable einsum": ("#6d5a8d", "^", 44),
    "warp-lang": ("#9c2f3f", "P", 46),
    "pykeops": ("#8a6d3b", "X", 46),
    "neural-tangents": ("#9c2f3f", "P", 46),
    "compiled, some rows at a time": ("#6d5a8d", "v", 44),
    "torch.func Jacobians": ("#7a8b2f", "D", 34),
    "GEMM alone": ("0.6", "|", 60),
}
#: Above this ratio of the slowest to pykernels the times are drawn on a logarithmic axis.
LOGARITHMIC_FROM = 8.0


def draw(report: dict[str, Any], path: Path) -> None:
    """Times of all contenders relative to pykernels, a row for each case, and on the right what they come to."""
    cases = {name: case for name, case in report["cases"].items() if "share_of_gemm" in case}
    figure, axes = plt.subplots(figsize=(10, 0.36 * len(cases) + 1.7), layout="constrained")
    labelled: set[str] = set()
    fastest = slowest = 1.0
    for row, case in enumerate(cases.values()):
        ours = case["contenders"]["pykernels"]["median_s"]
        for name, (color, marker, size) in STYLES.items():
            if name not in case["contenders"]:
                continue
            result = case["contenders"][name]
            low, high = (quartile / ours for quartile in result["quartiles_s"])
            fastest, slowest = min(fastest, low), max(slowest, high)
            axes.plot([low, high], [row, row], color=color, linewidth=1.5, zorder=2)
            label = None if name in labelled else name
            labelled.add(name)
            axes.scatter(result["median_s"] / ours, row, size, color=color, marker=marker, label=label, zorder=3)
    if slowest > LOGARITHMIC_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(min(0.7, fastest / 1.3), slowest * 1.3)
    else:
        axes.set_xlim(0, None)
    for row, case in enumerate(cases.values()):
        ours = case["contenders"]["pykernels"]["median_s"]
        digits = 1 if case["speedup"] >= 0.95 else 2
        text = f"{case['speedup']:4.{digits}f}x {ours * 1e3:6.2f} ms {case['share_of_gemm']:4.0%}"
        _beside(axes, row, text, family="monospace")
    _beside(axes, -1.0, "faster    time       of GEMM", style="italic")
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
    figure.legend(loc="outside lower center", ncols=len(labelled), fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _beside(axes: Any, row: float, text: str, **style: Any) -> None:
    """Text to the right of the axes, in a row."""
    axes.text(1.02, row, text, va="center", fontsize=8.5, transform=axes.get_yaxis_transform(), **style)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
