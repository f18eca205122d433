"""Benchmarks of the modes of the causal convolution: depthwise, ragged training, streaming, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import relative_error
from contenders import plain_layer, training_step
from measure import peak_memory
from torch import Tensor

import pykernels
from pykernels.models._plain import PlainCausalCNNEncoder
from pykernels.nn import CausalCNNEncoder

Runs = dict[str, Callable[[], Any]]


def depthwise(backward: bool) -> tuple[Runs, dict[str, float], int]:
    """One series of 8192 channels and 1024 samples, width 4, silu: runs, errors, and bytes that must move."""
    torch.manual_seed(0)
    channels, length, width = 8192, 1024, 4
    tensors = [torch.randn(1, channels, length), torch.randn(channels, 1, width), torch.randn(channels)]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.conv1d(F.pad(x, (width - 1, 0)), weight, bias, groups=channels))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = pykernels.causal_conv1d(x, weight, bias, groups=channels, activation="silu")
        return y

    ways = {"pykernels": ours, "eager": plain, "compiled": torch.compile(plain, dynamic=False)}
    grad = torch.randn(1, channels, length)
    expected = _gradients(plain, tensors, grad, torch.float64, backward)()
    runs: Runs = {}
    errors = {}
    for name, function in ways.items():
        runs[name] = _gradients(function, tensors, grad, torch.float32, backward)
        errors[name] = max(map(relative_error, runs[name](), expected))
    # The limit is a copy that allocates its result, as every layer does.
    x, size = tensors[0], tensors[0].nbytes
    runs["clone"] = (lambda: [x.clone() for _ in range(3)]) if backward else x.clone
    # Forward: x is read, y and, with gradients, z are written. Backward: grad, z and x are read, grad_x is written.
    return runs, errors, (7 if backward else 2) * size


def _gradients(
    function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, dtype: torch.dtype, backward: bool
) -> Callable[[], list[Tensor]]:
    inputs = [t.to(dtype).requires_grad_(backward) for t in tensors]
    grad = grad.to(dtype)

    def run() -> list[Tensor]:
        y = function(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)] if backward else [y]

    return run


def ragged_step() -> tuple[Runs, dict[str, float]]:
    """A training step on 60 windows of 1 to 150 samples: one packed call, or one window after the other."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 151, (60,), generator=generator)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    x = torch.randn(1, 1, int(offsets[-1]))
    ours, exact = CausalCNNEncoder(1), PlainCausalCNNEncoder(1, dtype=torch.float64)
    exact.load_state_dict(ours.state_dict())

    def one_by_one(encoder: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda packed: torch.cat([encoder(part) for part in packed.split(lengths.tolist(), 2)])

    expected = training_step(exact, one_by_one(exact), x.double())()
    gradients = {name: p.grad for name, p in exact.named_parameters()}
    ways: dict[str, tuple[torch.nn.Module, Callable[[Tensor], Tensor]]] = {
        "pykernels": (ours, lambda packed: ours(packed, cu_seqlens=offsets))
    }
    alone, eager, folded = CausalCNNEncoder(1), PlainCausalCNNEncoder(1), PlainCausalCNNEncoder(1)
    for encoder in (alone, eager, folded):
        encoder.load_state_dict(ours.state_dict())
    ways["pykernels, one by one"] = (alone, one_by_one(alone))
    ways["eager"] = (eager, one_by_one(eager))

    def folded_once(packed: Tensor) -> Tensor:
        with folded.folded():
            return one_by_one(folded)(packed)

    ways["eager, weights folded once"] = (folded, folded_once)
    runs: Runs = {}
    errors = {}
    for name, (encoder, forward) in ways.items():
        runs[name] = training_step(encoder, forward, x)
        errors[name] = relative_error(runs[name](), expected)
        for key, parameter in encoder.named_parameters():
            errors[name] = max(errors[name], relative_error(parameter.grad, gradients[key]))
    return runs, errors


def streaming(batch: int) -> tuple[Runs, dict[str, float]]:
    """The features after one more sample: a step of the stream, or the encoding of the last 5000 samples anew."""
    torch.manual_seed(0)
    window = 5000
    ours = CausalCNNEncoder(1).eval()
    plain, exact = PlainCausalCNNEncoder(1).eval(), PlainCausalCNNEncoder(1, dtype=torch.float64)
    plain.load_state_dict(ours.state_dict())
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(batch, 1, window)
    stream = ours.stream(batch)
    with torch.no_grad():
        expected = exact(x.double())
    errors = {"pykernels": relative_error(stream.extend(x), expected)}
    sample = x[:, :, 0]

    def again() -> Tensor:
        with torch.no_grad(), plain.folded():
            return plain(x)

    errors["eager, window anew"] = relative_error(again(), expected)
    return {"pykernels": lambda: stream.step(sample), "eager, window anew": again}, errors


#: Shape, groups and activation of the layers whose memory is measured.
MEMORY_CASES = {
    "dense 16x64x4096": ((16, 64, 4096), 1, "leaky_relu"),
    "depthwise 1x8192x1024": ((1, 8192, 1024), 8192, "silu"),
}


def memory(name: str) -> dict[str, Any]:
    """Peak bytes of a layer's forward and backward beyond its inputs, each in a process of its own."""
    (batch, channels, length), groups, _ = MEMORY_CASES[name]
    size = 4 * batch * channels * length
    peaks = {}
    for contender in ("pykernels", "eager"):
        command = [sys.executable, __file__, name, contender]
        output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        peaks[contender] = json.loads(output.stdout)
    # y, grad_x, and z where the derivative needs it; the gradients of the weights are small.
    needed = (3 if groups > 1 else 2) * size
    return {"peak_bytes": peaks, "needed_bytes": needed, "tensor_bytes": size}


def _peak(name: str, contender: str) -> int:
    (batch, channels, length), groups, activation = MEMORY_CASES[name]

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if contender == "pykernels":
            y: Tensor = pykernels.causal_conv1d(x, weight, bias, groups=groups, activation=activation)
            return y
        if groups == 1:
            return plain_layer(x, weight, bias, 1)
        return F.silu(F.conv1d(F.pad(x, (weight.shape[2] - 1, 0)), weight, bias, groups=groups))

    def run(samples: int) -> int:
        x = torch.randn(batch, channels, samples, requires_grad=True)
        weight = torch.randn(channels, channels // groups, 3, requires_grad=True)
        bias = torch.randn(channels, requires_grad=True)
        grad = torch.randn(batch, channels, samples)
        return peak_memory(lambda: layer(x, weight, bias).backward(grad))

    run(2)  # libraries and thread pools
    return run(length)


if __name__ == "__main__":
    print(json.dumps(_peak(*sys.argv[1:])))
