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
from pykernels.ops import gaussian_warp

from .triton_cases import ACCURACY, BILINEAR, CHOICES, SIZES, WIDTHS, Mode, check_accuracy, check_float64, error

pytest.importorskip("triton")
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from pykernels.ops.gaussian_warp import triton as kernels

POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.int64: "*i64"}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
#: Bytes of a thread's memory outside of registers that are not worth a word: a few spills.
STACK = 32

#: What is compiled: forms, normalisations, paddings and axes with narrow windows, and wide ones in both dtypes.
COMPILED = {
    "float32 bilinear": (torch.float32, Mode((64, 64), "linear")),
    "float32 inside": (torch.float32, Mode((64, 64), normalize="inside", batch=8)),
    "float32 density": (torch.float32, Mode((33, 65), "density", "none", "reflection", 5, "shared", xy=False)),
    "float32 varying": (torch.float32, Mode((64, 64), support=None, variance="map", steps=3)),
    "float32 wide": (torch.float32, Mode((640,), padding_mode="periodic", support=15, variance="shared")),
    "float32 three axes": (torch.float32, Mode((16, 17, 64), "density", "window", "border", 3, "one map", channels=2)),
    "float64 narrow": (torch.float64, Mode((64, 64), variance="shared by steps", steps=2)),
    "float64 varying": (torch.float64, Mode((100,), "density", support=None, variance="map", normalize="inside")),
    "float32 64-bit offsets": (torch.float32, Mode((64, 64), variance="shared")),
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
def test_compiles_ahead_of_time(name: str, target: str, monkeypatch, tmp_path):
    dtype, mode = COMPILED[name]
    launches: dict[str, tuple[Any, dict[str, Any]]] = {}

    def record(device: torch.device, kernel: Any, programs: int, **arguments: Any) -> None:
        launches.setdefault(kernel.fn.__name__, (kernel, arguments))

    monkeypatch.setattr(kernels, "launch", record)
    if name.endswith("offsets"):
        monkeypatch.setattr(kernels, "INT32_LIMIT", 0)
    tensors, options = mode.arguments(dtype)
    frames = kernels.forward(tensors, options)
    kernels.backward(frames, frames, tensors, options, [True, True, tensors.variance is not None])
    assert len(launches) == 4
    for kernel, arguments in launches.values():
        compiled = compile_launch(kernel, arguments, TARGETS[target])
        if target == "gfx942":
            assert compiled.asm["hsaco"]
        elif target == "sm_90" and CUOBJDUMP.exists():
            (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
            command = [CUOBJDUMP, "--dump-resource-usage", tmp_path / "kernel.cubin"]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert int(usage.split("STACK:")[1].split()[0]) <= STACK, usage
        else:
            assert compiled.asm["cubin"]


def compile_launch(kernel: Any, arguments: dict[str, Any], target: GPUTarget) -> Any:
    """Compile a kernel as a launch with these arguments would: 1 is a constant, multiples of 16 are known as such."""
    signature, constants, multiples = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        known = isinstance(value, int) and parameter.name not in kernels.UNSPECIALIZED
        if parameter.is_constexpr or value is None or (known and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (known and value % 16 == 0):
            multiples[(i,)] = [["tt.divisibility", 16]]
    return compile(ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiples), target=target)


def test_who_runs_what_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not pykernels.available_backends()["gaussian_warp"]["triton"].ok
    mode = Mode()
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run gaussian_warp: the tensors are on cpu"):
        mode.run(mode.tensors(torch.float32), "triton")


LARGE = [
    Mode((64, 64), batch=64, variance="map", support=None, steps=6),
    Mode((256, 256), batch=8, variance=0.8, support=None),
    Mode((481, 781), batch=2, channels=3, normalize="inside", motion=20.0),
    Mode((481, 781), "linear", batch=8, channels=3, padding_mode="reflection"),
    Mode((300_000,), "density", support=31, variance="shared", batch=2),
    Mode((33, 65, 129), variance="shared", channels=2, padding_mode="periodic"),
    Mode((65, 64), variance=0.5, batch=3, motion=1e6, padding_mode="border"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", CHOICES + BILINEAR + WIDTHS + SIZES + LARGE, ids=str)
def test_gpu_float64(mode: Mode):
    check_float64(mode, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ACCURACY + LARGE[:-1], ids=str)
def test_gpu_accuracy(mode: Mode):
    check_accuracy(mode, "cuda", seeds=3)


def on_gpu(mode: Mode) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return {name: t.cuda() for name, t in mode.tensors(torch.float32).items()}, mode.grad(torch.float32).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [*WIDTHS, *LARGE], ids=str)
def test_gpu_bits_do_not_depend_on_the_run(mode: Mode):
    first, *others = (mode.results(*on_gpu(mode), "triton") for _ in range(3))
    for again in others:
        for name, value in first.items():
            torch.testing.assert_close(again[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", LARGE, ids=str)
def test_gpu_is_never_waited_for(mode: Mode):
    """Forward and backward can be captured into a graph, and the graph gives the same bits."""
    values, grad = on_gpu(mode)
    expected = mode.results(values, grad, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mode.results(values, grad, "triton")
    graph.replay()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


@pytest.mark.gpu
def test_gpu_sizes_beyond_31_bits():
    """The last of more than 2^31 numbers come out as if they were alone."""
    batch = 2**31 // (256 * 256) + 3
    image, flow = torch.randn(1, 1, 256, 256, device="cuda"), torch.randn(1, 2, 256, 256, device="cuda")
    alone = gaussian_warp(image, flow, 0.5)
    together = gaussian_warp(image.expand(batch, -1, -1, -1), flow.expand(batch, -1, -1, -1), 0.5)
    assert together.numel() > 2**31
    assert torch.equal(together[-2:], alone.expand(2, -1, -1, -1))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", LARGE[:2], ids=str)
def test_gpu_compile_without_graph_breaks(mode: Mode):
    values, grad = on_gpu(mode)
    eager = mode.results(values, grad, "triton")
    leaves = {name: t.requires_grad_() for name, t in values.items()}
    frames = torch.compile(lambda leaves: mode.run(leaves, "triton"), fullgraph=True)(leaves)
    gradients = torch.autograd.grad(frames, list(leaves.values()), grad)
    assert torch.equal(frames, eager["frames"])
    for name, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(gradient, eager[f"grad of {name}"])


@pytest.mark.gpu
def test_gpu_against_grid_sample():
    """On the same device: what bilinear_warp replaces."""
    mode = LARGE[3]
    values, _ = on_gpu(mode)
    rows, columns = (torch.arange(n, device="cuda") for n in mode.sizes)
    flow = values["flows"][:, 0]
    x, y = columns - flow[:, 0], rows[:, None] - flow[:, 1]
    grid = torch.stack(((2 * x + 1) / mode.sizes[1] - 1, (2 * y + 1) / mode.sizes[0] - 1), -1)
    expected = torch.nn.functional.grid_sample(
        values["image"], grid, padding_mode="reflection", align_corners=False, mode="bilinear"
    )
    assert error(mode.run(values, "triton")[:, 0], expected) <= 1e-3
