"""Benchmarks of causal convolutions against plain PyTorch on the CPU, for run.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import modes
import torch
from cases import Limits, relative_error, verdict
from contenders import ChannelsLastEncoder, as_image, channels_last_layer, plain_layer, training_step
from measure import Contender, compare
from torch import Tensor

import pykernels
from pykernels.models._plain import PlainCausalCNNEncoder
from pykernels.nn import CausalCNNEncoder


def live_flops(batch: int, in_channels: int, out_channels: int, length: int, kernel_size: int, dilation: int) -> int:
    """Multiplications and additions of a causal convolution, without taps that reach before the start."""
    live = sum(max(0, length - tap * dilation) for tap in range(kernel_size))
    return 2 * batch * in_channels * out_channels * live


def encoder_flops(encoder: CausalCNNEncoder, batch: int, length: int) -> int:
    """Of one forward and a dense backward, twice the forward, also where the maximum over time spares some of it."""
    convs = [m for m in encoder.modules() if isinstance(m, pykernels.nn.CausalConv1d)]
    sizes = [(batch, c.in_channels, c.out_channels, length, c.kernel_size[0], c.dilation[0]) for c in convs]
    return 3 * sum(live_flops(*size) for size in sizes)


def bench_mode(
    runs: modes.Runs, errors: dict[str, float], limits: Limits, seconds: float, moved: int = 0
) -> dict[str, Any]:
    results = compare([Contender(*c) for c in runs.items()], seconds=seconds, most_threads=limits.threads)
    return verdict(results, errors, limits=limits, moved=moved)


def bench_encoder(length: int, limits: Limits, seconds: float) -> dict[str, Any]:
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
    results = compare([Contender(*c) for c in steps.items()], seconds=seconds * 4, most_threads=limits.threads)
    return verdict(results, errors, flops=encoder_flops(ours, 10, length), limits=limits)


def bench_layer(
    shape: tuple[int, int, int], dilation: int, backward: bool, limits: Limits, seconds: float
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
    results = compare([Contender(*c) for c in runs.items()], seconds=seconds, most_threads=limits.threads)
    flops = live_flops(batch, channels, channels, length, 3, dilation) * (3 if backward else 1)
    return verdict(results, errors, flops=flops, limits=limits)


def bench_depthwise(backward: bool, limits: Limits, seconds: float) -> dict[str, Any]:
    runs, errors, moved = modes.depthwise(backward)
    return bench_mode(runs, errors, limits, seconds, moved)


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


def cases(limits: Limits, seconds: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """Benchmarks by name; each runs for a small multiple of ``seconds``."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        f"encoder step, length {length}": lambda length=length: bench_encoder(length, limits, seconds)
        for length in (150, 500)
    }
    for shape in ((8, 40, 1000), (1, 40, 100_000)):
        for dilation in (1, 64, 512):
            for backward in (False, True):
                what = "forward and backward" if backward else "forward"
                name = f"layer {'x'.join(map(str, shape))}, dilation {dilation}, {what}"
                found[name] = lambda a=(shape, dilation, backward): bench_layer(*a, limits, seconds)
    for backward in (False, True):
        what = "forward and backward" if backward else "forward"
        found[f"layer 16x64x4096, dilation 1, {what}"] = lambda b=backward: bench_layer(
            (16, 64, 4096), 1, b, limits, seconds
        )
        found[f"depthwise 1x8192x1024, width 4, silu, {what}"] = lambda b=backward: bench_depthwise(b, limits, seconds)
    found["ragged training step, 60 windows of 1 to 150"] = lambda: bench_mode(
        *modes.ragged_step(), limits, seconds * 4
    )
    for batch in (1, 16):
        found[f"streaming encoder, one sample of {batch} series"] = lambda b=batch: bench_mode(
            *modes.streaming(b), limits, seconds * 2
        )
    return found


def extras(only: str) -> dict[str, Any]:
    """What is measured beside times of cases: peaks of memory, and the overhead of a call."""
    memory = {name: modes.memory(name) for name in modes.MEMORY_CASES if only in name}
    for name, result in memory.items():
        peaks = ", ".join(f"{n} {b / 1e6:.1f} MB" for n, b in result["peak_bytes"].items())
        print(f"memory of {name}, forward and backward: needed {result['needed_bytes'] / 1e6:.1f} MB, peaks {peaks}")
    overhead = call_overhead()
    print("call overhead: " + ", ".join(f"{n} {s * 1e6:.1f} us" for n, s in overhead.items()))
    return {"memory": memory, "call_overhead_s": overhead}
