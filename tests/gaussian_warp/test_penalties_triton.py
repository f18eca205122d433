"""The Triton kernels of the penalties: in the interpreter, compiled ahead of time, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pykernels import _triton

from .penalty_cases import PROBLEMS, SUBSETS, Problem, check_float32, check_float64

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from pykernels.ops.gaussian_warp import penalties_triton as kernels

POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32"}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: One to three axes, both dtypes, single terms, sizes that a launch knows as 1 or as multiples of 16, 64-bit offsets.
COMPILED = {
    "float32 one axis": (torch.float32, Problem((2048,)), False),
    "float32 two axes": (torch.float32, Problem((64, 64)), False),
    "float64 three axes": (torch.float64, Problem((5, 17, 31), xy=False), False),
    "float32 one pixel, wide": (torch.float32, Problem((1, 1)), True),
    "float32 divergence": (torch.float32, Problem((1, 33), 1.0, 0.0, 0.0), False),
    "float64 magnitude": (torch.float64, Problem((30, 30), 0.0, 1.0, 0.0), True),
}


def test_in_the_interpreter():
    """A process of its own: Triton decides when a kernel is defined whether it is interpreted."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "penalties_interpreted.py"],
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
    dtype, problem, wide = COMPILED[name]
    launches: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(kernels, "launch", lambda device, kernel, programs, **args: launches.append((kernel, args)))
    if wide:
        monkeypatch.setattr(kernels, "INT32_LIMIT", 0)
    flow = problem.flow(dtype)
    kernels.forward(flow, problem.options)
    kernels.backward(problem.grads(dtype), flow, problem.options)
    assert len(launches) == 2
    for kernel, arguments in launches:
        assert compile_launch(kernel, arguments, TARGETS[target]).asm["hsaco" if target == "gfx942" else "cubin"]


def compile_launch(kernel: Any, arguments: dict[str, Any], target: GPUTarget) -> Any:
    """Compile a kernel as a launch with these arguments would: 1 is a constant, multiples of 16 are known as such."""
    signature, constants, multiples = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            multiples[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiples)
    return compile(source, target=target)


def test_who_runs_what_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run flow_penalties: the tensors are on cpu"):
        Problem().run(Problem().flow(), "triton")


LARGE = [Problem((481, 781), batch=8), Problem((3_000_000,)), Problem((65, 129, 257))]


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [*PROBLEMS, *SUBSETS, *LARGE], ids=str)
def test_gpu(problem: Problem):
    check_float64(problem, "triton", "cuda")
    check_float32(problem, "triton", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("problem", LARGE, ids=str)
def test_gpu_bits_do_not_depend_on_the_run(problem: Problem):
    flow, grads = problem.flow(torch.float32).cuda(), problem.grads(torch.float32).cuda()
    first, *others = (problem.results(flow, grads, "triton") for _ in range(3))
    for other in others:
        assert all(map(torch.equal, other, first))


@pytest.mark.gpu
def test_gpu_is_never_waited_for():
    """Forward and backward can be captured into a graph, and the graph gives the same bits."""
    problem = Problem((64, 64), batch=8)
    flow, grads = problem.flow(torch.float32).cuda(), problem.grads(torch.float32).cuda()
    expected = problem.results(flow, grads, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.results(flow, grads, "triton")
    graph.replay()
    assert all(map(torch.equal, captured, expected))
