"""The Triton kernels: in the interpreter, compiled ahead of time, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pykernels
from pykernels import _triton
from pykernels.backends import OPERATORS
from pykernels.ops import causal_conv1d

from .cases import error, results
from .triton_cases import EPILOGUES, SEQUENCES, SIZES, Mode, check_accuracy, check_float64

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from pykernels.ops.causal_conv import triton as kernels
from pykernels.ops.causal_conv.reference import Options

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

#: Targets, and the shared memory in bytes that a program has there.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}

#: What is compiled: both kinds of kernel in all dtypes, every activation, every kind of sequence, 64-bit offsets.
COMPILED = {
    "float32 dense": (torch.float32, Mode(8, 40, 40, 1000, 3, 1, 1, "leaky_relu", "after")),
    "bfloat16 dense": (
        torch.bfloat16,
        Mode(1, 64, 64, 4096, 3, 16, 1, "gelu", "before", state=True, packed=(4000, 96)),
    ),
    "float16 depthwise": (torch.float16, Mode(2, 64, 64, 1024, 4, 1, 64, "silu", state=True, lengths=(5, 9))),
    "float64 grouped": (torch.float64, Mode(2, 64, 32, 1000, 3, 7, 4, "tanh", "after")),
    "float32 depthwise wide": (torch.float32, Mode(1, 32, 32, 700, 4, 3, 32, "relu", packed=(350, 350))),
}


def test_in_the_interpreter():
    """A process of its own: Triton decides when a kernel is defined whether it is interpreted."""
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "triton_interpreted.py"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr


@pytest.mark.skipif(_triton.interpreting(), reason="kernels are interpreted, not compiled")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_ahead_of_time(name: str, target: str, monkeypatch):
    dtype, mode = COMPILED[name]
    launches: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(kernels, "launch", lambda device, kernel, programs, **args: launches.append((kernel, args)))
    if name.endswith("wide"):
        monkeypatch.setattr(kernels, "INT32_LIMIT", 0)
    tensors, options = mode.tensors(dtype), mode.options()
    x, weight = tensors["x"], tensors["weight"]
    where = (tensors.get("initial_state"), options.pop("cu_seqlens", None), options.pop("lengths", None))
    y, saved = kernels.forward(x, weight, tensors["bias"], tensors.get("residual"), *where, Options(**options), True)
    kernels.backward(y, saved, x, weight, *where, Options(**options), True, True, True, mode.state)
    assert len(launches) >= 3 + mode.state
    gpu, memory = TARGETS[target]
    for kernel, arguments in launches:
        compiled = compile_launch(kernel, arguments, gpu)
        assert compiled.asm["hsaco" if gpu.backend == "hip" else "cubin"]
        assert compiled.metadata.shared <= memory


def compile_launch(kernel: Any, arguments: dict[str, Any], target: GPUTarget) -> Any:
    """Compile a kernel as a launch with these arguments would: 1 is a constant, multiples of 16 are known as such."""
    signature, constants, multiples = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            multiples[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiples)
    return compile(source, target=target, options={"num_warps": arguments.get("num_warps", 4)})


def test_who_runs_what_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ok, reason = pykernels.available_backends()["causal_conv1d"]["triton"]
    assert not ok
    assert "no GPU" in reason
    x = torch.zeros(1, 1, 1)
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run causal_conv1d: the tensors are on cpu"):
        causal_conv1d(x, x, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert pykernels.available_backends()["causal_conv1d"]["triton"].ok
    assert _triton.can_run(x).ok
    assert "dtype torch.complex64" in _triton.can_run(x.to(torch.complex64)).reason
    monkeypatch.setattr(_triton, "find_spec", lambda name: None)
    assert "[triton]" in _triton.can_run(x).reason
    assert "[triton]" in _triton.available().reason


LARGE = [
    Mode(8, 40, 40, 1000, 3, 64, 1, "silu", "after"),
    Mode(3, 64, 64, 4097, 3, 1, 1, "leaky_relu"),
    Mode(2, 256, 128, 513, 5, 16, 2, "gelu", "before"),
    Mode(2, 512, 512, 2049, 4, 1, 512, "silu", state=True),
    Mode(1, 48, 48, 5000, 3, 4, 1, "tanh", state=True, packed=(1, 999, 0, 4000)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", EPILOGUES + SIZES + SEQUENCES + LARGE, ids=str)
def test_gpu_float64(mode: Mode):
    check_float64(mode, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", EPILOGUES[::2] + SIZES[10:] + SEQUENCES[::2] + LARGE, ids=str)
def test_gpu_accuracy(mode: Mode, dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check_accuracy([mode], dtype, "cuda", seeds=3)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", LARGE, ids=str)
def test_gpu_bits_do_not_depend_on_the_run(mode: Mode):
    tensors, grad = mode.tensors(torch.float32, "cuda"), mode.grad(torch.float32, "cuda")
    first, *others = (results(causal_conv1d, tensors, grad, **mode.options("cuda")) for _ in range(3))
    for again in others:
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", LARGE, ids=str)
def test_gpu_is_never_waited_for(mode: Mode):
    """Forward and backward can be captured into a graph, and the graph gives the same bits."""
    tensors, grad = mode.tensors(torch.float32, "cuda"), mode.grad(torch.float32, "cuda")
    options = mode.options("cuda")
    expected = results(causal_conv1d, tensors, grad, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(causal_conv1d, tensors, grad, **options)
    graph.replay()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


@pytest.mark.gpu
def test_gpu_sizes_beyond_31_bits():
    length = 2**31 + 77
    x = torch.zeros(1, 1, length, dtype=torch.float16, device="cuda")
    x[:, :, -100:] = torch.randn(100, device="cuda")
    weight = torch.randn(1, 1, 3, dtype=torch.float16, device="cuda")
    y = causal_conv1d(x, weight, dilation=5)
    assert torch.equal(y[:, :, -90:], causal_conv1d(x[:, :, -100:], weight, dilation=5)[:, :, 10:])
    assert y[:, :, :-100].count_nonzero() == 0


@pytest.mark.gpu
def test_gpu_compile_without_graph_breaks():
    mode = LARGE[0]
    tensors, grad = mode.tensors(torch.float32, "cuda"), mode.grad(torch.float32, "cuda")
    eager = results(causal_conv1d, tensors, grad, **mode.options("cuda"))
    function = torch.compile(causal_conv1d, fullgraph=True)
    compiled = results(function, tensors, grad, **mode.options("cuda"))
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


@pytest.mark.gpu
def test_gpu_encoder():
    """The whole encoder on the kernels, without a fallback's warning, agrees with the CPU."""
    encoder = pykernels.nn.CausalCNNEncoder(2, dtype=torch.float64)
    x = torch.randn(3, 2, 300, dtype=torch.float64)
    expected = encoder(x)
    assert error(encoder.cuda()(x.cuda()).cpu(), expected) < 1e-12


@pytest.mark.gpu
def test_gpu_quick_check():
    for operator in OPERATORS.values():
        if operator.implementations.get("triton"):
            assert operator.check("triton").passed
