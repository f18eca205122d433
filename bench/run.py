"""Benchmarks against plain PyTorch on this machine: ``python bench/run.py``.

Every result is checked in the run that times it. Writes medians, spreads, the machine and its measured limits to a
JSON file, and the figure drawn from that file. Refuses to report where other processes keep the machine busy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modes
import torch
from contenders import ChannelsLastEncoder, as_image, channels_last_layer, plain_layer, training_step
from figure import draw
from measure import ALLOWED_LOAD, Contender, Load, compare, copy_rate, gemm_rate, machine
from modes import relative_error
from torch import Tensor

import pykernels
from pykernels.models._plain import PlainCausalCNNEncoder
from pykernels.nn import CausalCNNEncoder

RESULTS = Path(__file__).parent / "results"
#: Largest relative error, in the Euclidean norm against float64, of a float32 result whose time is reported. It tells
#: right from wrong; the tests hold the errors to what plain PyTorch makes.
ALLOWED_ERROR = 1e-3


def live_flops(batch: int, in_channels: int, out_channels: int, length: int, kernel_size: int, dilation: int) -> int:
    """Multiplications and additions of a causal convolution, without taps that reach before the start."""
    live = sum(max(0, length - tap * dilation) for tap in range(kernel_size))
    return 2 * batch * in_channels * out_channels * live


def encoder_flops(encoder: CausalCNNEncoder, batch: int, length: int) -> int:
    """Of one forward and a dense backward, twice the forward, also where the maximum over time spares some of it."""
    convs = [m for m in encoder.modules() if isinstance(m, pykernels.nn.CausalConv1d)]
    sizes = [(batch, c.in_channels, c.out_channels, length, c.kernel_size[0], c.dilation[0]) for c in convs]
    return 3 * sum(live_flops(*size) for size in sizes)


def verdict(
    results: dict[str, dict[str, Any]],
    errors: dict[str, float],
    *,
    flops: int = 0,
    peak: float = 0.0,
    moved: int = 0,
    copy: float = 0.0,
) -> dict[str, Any]:
    """Speed against the fastest of the others that were checked, and against the measured limit, if one is given.

    Args:
        flops, peak: of the work, and of a GEMM per second.
        moved, copy: bytes that the work must move, and that a copy moves per second.
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
    if flops:
        found |= {"flop_per_s": flops / ours, "share_of_gemm": flops / ours / peak}
    if moved:
        found |= {"bytes_per_s": moved / ours, "share_of_copy": moved / ours / copy}
    return found


def bench_mode(
    runs: modes.Runs, errors: dict[str, float], args: argparse.Namespace, seconds: float, **limits: Any
) -> dict[str, Any]:
    results = compare([Contender(*c) for c in runs.items()], seconds=seconds, most_threads=args.threads)
    return verdict(results, errors, **limits)


def bench_encoder(length: int, args: argparse.Namespace, peak: float) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(10, 1, length)
    ours = CausalCNNEncoder(1)
    forwards: dict[str, tuple[torch.nn.Module, Callable[[Tensor], Tensor]]] = {"pykernels": (ours, ours)}
    for name in ("eager", "channels-last", "compiled"):
        plain = PlainCausalCNNEncoder(1)
        plain.load_state_dict(ours.state_dict())
        forward: Callable[[Tensor], Tensor] = plain
        if name == "channels-last":
            forward = ChannelsLastEncoder(plain)
        elif name == "compiled":
            forward = torch.compile(plain, dynamic=False)
        forwards[name] = (plain, forward)
    exact = PlainCausalCNNEncoder(1, dtype=torch.float64)
    exact.load_state_dict(ours.state_dict())
    expected = training_step(exact, exact, x.double())()
    gradients = {name: p.grad for name, p in exact.named_parameters()}
    steps, errors = {}, {}
    for name, (encoder, forward) in forwards.items():
        steps[name] = training_step(encoder, forward, x)
        errors[name] = relative_error(steps[name](), expected)
        for key, parameter in encoder.named_parameters():
            errors[name] = max(errors[name], relative_error(parameter.grad, gradients[key]))
    results = compare([Contender(*c) for c in steps.items()], seconds=args.seconds * 4, most_threads=args.threads)
    return verdict(results, errors, flops=encoder_flops(ours, 10, length), peak=peak)


def bench_layer(
    shape: tuple[int, int, int], dilation: int, backward: bool, args: argparse.Namespace, peak: float
) -> dict[str, Any]:
    torch.manual_seed(0)
    batch, channels, length = shape
    x, bias = torch.randn(shape), torch.randn(channels)
    weight = torch.randn(channels, channels, 3) / (3 * channels) ** 0.5
    compiled = torch.compile(plain_layer, dynamic=False)
    ways: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "pykernels": (_layer, [x, weight, bias]),
        "eager": (plain_layer, [x, weight, bias]),
        "channels-last": (channels_last_layer, [as_image(x), as_image(weight), bias]),
        "compiled": (compiled, [x, weight, bias]),
    }
    exact = [t.double().requires_grad_(backward) for t in (x, weight, bias)]
    expected = _layer_run(plain_layer, exact, dilation)()
    runs, errors = {}, {}
    for name, (function, tensors) in ways.items():
        inputs = [t.detach().requires_grad_(backward) for t in tensors]
        runs[name] = _layer_run(function, inputs, dilation)
        values = [v.squeeze(2) if v.dim() == 4 else v for v in runs[name]()]
        errors[name] = max(map(relative_error, values, expected))
    results = compare([Contender(*c) for c in runs.items()], seconds=args.seconds, most_threads=args.threads)
    flops = live_flops(batch, channels, channels, length, 3, dilation) * (3 if backward else 1)
    return verdict(results, errors, flops=flops, peak=peak)


def bench_depthwise(backward: bool, args: argparse.Namespace, copy: float) -> dict[str, Any]:
    runs, errors, moved = modes.depthwise(backward)
    return bench_mode(runs, errors, args, args.seconds, moved=moved, copy=copy)


def _layer(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    return pykernels.causal_conv1d(x, weight, bias, dilation=dilation, activation="leaky_relu")


def _layer_run(function: Callable[..., Tensor], inputs: list[Tensor], dilation: int) -> Callable[[], list[Tensor]]:
    y = function(*inputs, dilation)
    if not y.requires_grad:
        return lambda: [function(*inputs, dilation)]
    grad = torch.ones_like(y).detach()

    def run() -> list[Tensor]:
        y = function(*inputs, dilation)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    return run


def call_overhead() -> dict[str, float]:
    """Seconds per call on a tiny input without gradients, the median of several thousand calls in a row."""
    x, weight = torch.randn(1, 1, 8), torch.randn(1, 1, 3)

    def per_call(function: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(30):
            start = time.perf_counter()
            for _ in range(300):
                function()
            times.append((time.perf_counter() - start) / 300)
        return sorted(times)[len(times) // 2]

    torch.set_num_threads(1)
    return {
        "pykernels": per_call(lambda: pykernels.causal_conv1d(x, weight)),
        "eager": per_call(lambda: torch.nn.functional.conv1d(torch.nn.functional.pad(x, (2, 0)), weight)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json", help="results file (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each layer (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="most threads (default: all)")
    parser.add_argument("--only", default="", help="run the cases whose name contains this, and write no file")
    parser.add_argument("--allow-load", action="store_true", help="report even when other processes are busy")
    args = parser.parse_args()

    quiet = Load()
    time.sleep(1.0)
    if _refuse(quiet.others(), args.allow_load):
        return 2
    load = Load()
    peak = gemm_rate(2048, args.threads)
    report: dict[str, Any] = {
        "machine": machine(),
        "limits": {"threads": args.threads, "gemm_flop_per_s": peak, "copy_bytes_per_s": copy_rate(args.threads)},
        "cases": {},
    }
    print(f"float32 GEMM {peak / 1e9:.0f} GFLOP/s, copy {report['limits']['copy_bytes_per_s'] / 1e9:.0f} GB/s")
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        f"encoder step, length {length}": lambda length=length: bench_encoder(length, args, peak)
        for length in (150, 500)
    }
    for shape in ((8, 40, 1000), (1, 40, 100_000)):
        for dilation in (1, 64, 512):
            for backward in (False, True):
                what = "forward and backward" if backward else "forward"
                name = f"layer {'x'.join(map(str, shape))}, dilation {dilation}, {what}"
                cases[name] = lambda a=(shape, dilation, backward): bench_layer(*a, args, peak)
    for backward in (False, True):
        what = "forward and backward" if backward else "forward"
        cases[f"layer 16x64x4096, dilation 1, {what}"] = lambda b=backward: bench_layer(
            (16, 64, 4096), 1, b, args, peak
        )
        cases[f"depthwise 1x8192x1024, width 4, silu, {what}"] = lambda b=backward: bench_depthwise(
            b, args, report["limits"]["copy_bytes_per_s"]
        )
    cases["ragged training step, 60 windows of 1 to 150"] = lambda: bench_mode(
        *modes.ragged_step(), args, args.seconds * 4
    )
    for batch in (1, 16):
        cases[f"streaming encoder, one sample of {batch} series"] = lambda b=batch: bench_mode(
            *modes.streaming(b), args, args.seconds * 2
        )
    for name, case in cases.items():
        if args.only in name:
            torch.compiler.reset()
            report["cases"][name] = result = case()
            times = ", ".join(f"{n} {r['median_s'] * 1e3:.3f} ms" for n, r in result["contenders"].items())
            shares = [f", {result[f'share_of_{k}']:.0%} of {k}" for k in ("gemm", "copy") if f"share_of_{k}" in result]
            print(f"{name}: {result['speedup']:.2f} x {result['fastest_other']}{''.join(shares)} ({times})", flush=True)
    report["memory"] = {name: modes.memory(name) for name in modes.MEMORY_CASES if args.only in name}
    for name, result in report["memory"].items():
        peaks = ", ".join(f"{n} {b / 1e6:.1f} MB" for n, b in result["peak_bytes"].items())
        print(f"memory of {name}, forward and backward: needed {result['needed_bytes'] / 1e6:.1f} MB, peaks {peaks}")
    report["call_overhead_s"] = call_overhead()
    print("call overhead: " + ", ".join(f"{n} {s * 1e6:.1f} us" for n, s in report["call_overhead_s"].items()))
    report["machine"]["load_of_others"] = others = load.others()
    if _refuse(others, args.allow_load):
        return 2
    if not args.only:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        draw(report, args.out.with_suffix(".png"))
        print(f"wrote {args.out} and {args.out.with_suffix('.png').name}")
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
