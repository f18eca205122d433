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

from .triton_cases import OPTIONS, PIECES, SIZES, Mode, arguments_of, check_accuracy, check_float64, error

pytest.importorskip("triton")
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from pykernels.ops.latent_ode import triton as kernels

POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.int64: "*i64", torch.bool: "*i1"}

#: Targets, and the shared memory in bytes that a program has there.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
#: Bytes of a thread's memory outside of registers: what sin and cos take for large arguments, and few for spills.
STACK = 64

#: What is compiled: narrow and wide networks in both dtypes, few and all options, a large block of samples.
COMPILED = {
    "float32 narrow": (
        torch.float32,
        Mode(16384, 20, (64, 64), times=2, substeps=1),
    ),
    "float32 narrow, all options": (
        torch.float32,
        Mode(
            40,
            3,
            (20,),
            activation="silu",
            sets=2,
            controls=2,
            groups=2,
            reinject=True,
            norms=True,
            energy="time",
            time_input=True,
            input_map="cube",
        ),
    ),
    "float32 wide": (torch.float32, Mode(128, 20, (512, 512, 512), activation="relu", method="euler", controls=20)),
    "float64 narrow": (torch.float64, Mode(40, 5, (32,), activation="softplus", method="rk4", groups=3, energy=True)),
    "float64 wide, pieces": (
        torch.float64,
        Mode(40, 20, (64,), activation="sin", method="heun2", controls=3, norms=True, input_map="tanh", max_memory=0),
    ),
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
    launches: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}

    def record(device: torch.device, kernel: Any, programs: int, **arguments: Any) -> None:
        signature, constants, _ = specialize(kernel, arguments)
        launches.setdefault((kernel, str(signature), str(constants)), (kernel, arguments))

    monkeypatch.setattr(kernels, "launch", record)
    tensors, options = arguments_of(mode, dtype)
    options = options._replace(validate=False)
    states, norms, energy, saved = kernels.forward(tensors, options, True)
    needed = [True] * (6 + sum(map(len, tensors[6:10])))
    kernels.backward(states, norms, energy, states, saved, tensors, options, needed)
    assert {kernel.fn.__name__ for kernel, _ in launches.values()} >= {"trajectory_forward", "trajectory_backward"}
    gpu, memory = TARGETS[target]
    for kernel, arguments in launches.values():
        signature, constants, multiples = specialize(kernel, arguments)
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiples)
        compiled = compile(source, target=gpu, options={"num_warps": arguments.get("num_warps", 4)})
        assert compiled.metadata.shared <= memory
        if gpu.backend == "hip":
            assert compiled.asm["hsaco"]
        elif target == "sm_90" and CUOBJDUMP.exists():
            (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
            command = [CUOBJDUMP, "--dump-resource-usage", tmp_path / "kernel.cubin"]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert int(usage.split("STACK:")[1].split()[0]) <= STACK, usage
        else:
            assert compiled.asm["cubin"]


def specialize(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Types, constants and multiples of 16 as a launch would know them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    multiples: dict[Any, Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        known = isinstance(value, int) and parameter.name not in kernels.UNSPECIALIZED
        if parameter.is_constexpr or value is None or (known and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or (known and value % 16 == 0):
            multiples[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, multiples


def test_who_runs_what_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not pykernels.available_backends()["mlp_odeint"]["triton"].ok
    mode = Mode()
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run mlp_odeint: the tensors are on cpu"):
        mode.run(mode.tensors(torch.float32), "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert pykernels.available_backends()["mlp_odeint"]["triton"].ok
    with pytest.raises(RuntimeError, match=r"torch.float16 is not supported"):
        mode.run(mode.tensors(torch.float16), "triton")
    for wide in (Mode(1, 1025, (1,)), Mode(1, 1, (1,), controls=1024, time_input=True)):
        with pytest.raises(RuntimeError, match=r"1025 .* at most 1024"):
            wide.run(wide.tensors(torch.float32), "triton")


LARGE = [
    Mode(1024, 20, (64, 64), times=11, substeps=2),
    Mode(8200, 20, (64, 64), times=3, method="heun2"),
    Mode(16400, 20, (64, 64), times=3, method="euler", activation="silu"),
    Mode(4096, 2, (200, 200), times=3, method="rk4", norms=True),
    Mode(128, 20, (512, 512, 512), times=14, method="euler", controls=20, substeps=1),
    Mode(1000, 4, (64, 64), groups=10, correction=(32, 32), times=6, activation="silu", sets=2, energy="time"),
    Mode(100, 1000, (100,), times=3, method="midpoint"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", OPTIONS + SIZES + PIECES + LARGE, ids=str)
def test_gpu_float64(mode: Mode):
    check_float64(mode, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", OPTIONS + SIZES[10:] + PIECES + LARGE, ids=str)
def test_gpu_accuracy(mode: Mode):
    check_accuracy(mode, "cuda", seeds=3)


def on_gpu(mode: Mode) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    tensors, grads = mode.tensors(torch.float32), mode.grads(torch.float32)
    return {name: t.cuda() for name, t in tensors.items()}, [g.cuda() for g in grads]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [*OPTIONS[-6:], *PIECES, *LARGE], ids=str)
def test_gpu_bits_do_not_depend_on_the_run(mode: Mode):
    first, *others = (mode.results(*on_gpu(mode), "triton") for _ in range(3))
    for again in others:
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [*OPTIONS[-6:], *PIECES, *LARGE], ids=str)
def test_gpu_is_never_waited_for(mode: Mode):
    """Forward and backward can be captured into a graph, and the graph gives the same bits."""
    tensors, grads = on_gpu(mode)
    choices = mode.choices("cuda")
    expected = mode.results(tensors, grads, "triton", choices=choices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mode.results(tensors, grads, "triton", choices=choices)
    graph.replay()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


@pytest.mark.gpu
def test_gpu_sizes_beyond_31_bits():
    """More than 2^31 numbers: the last samples come out as if they were alone, in smaller blocks."""
    mode = Mode(2**17 + 5, 16, (16,), times=1030, method="euler", substeps=1)
    tensors, _ = on_gpu(mode._replace(batch=50))
    alone = mode.run(tensors, "triton")[0]
    tensors["y0"] = torch.cat([torch.zeros(mode.batch - 50, 16, device="cuda"), tensors["y0"]])
    states = mode.run(tensors, "triton")[0]
    assert states.numel() > 2**31
    assert error(states[:, -50:], alone) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [LARGE[0], OPTIONS[-4]], ids=str)
def test_gpu_compile_without_graph_breaks(mode: Mode):
    tensors, grads = on_gpu(mode)
    choices = mode.choices("cuda")
    eager = mode.results(tensors, grads, "triton")

    def run(leaves: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return mode.run(leaves, "triton", choices)

    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    outputs = torch.compile(run, fullgraph=True)(leaves)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
    assert torch.equal(outputs[0], eager["states"])
    for name, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(gradient, eager[f"grad of {name}"])


@pytest.mark.gpu
def test_gpu_validate():
    mode = Mode(times=5, activation="relu")
    tensors, _ = on_gpu(mode)
    tensors["y0"][3] = float("nan")
    assert mode.run(tensors, "triton")[0].isnan().any()
    with pytest.raises(FloatingPointError, match="sample 3"):
        mode.run(tensors, "triton", validate=True)
