"""The Triton kernels: in the interpreter, compiled ahead of time, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import pykernels
from pykernels import _triton
from pykernels.ops.ntk_gram import Activation, ntk_gram, ntk_matvec, ntk_witness
from pykernels.ops.ntk_gram.activations import network
from pykernels.ops.ntk_gram.reference import Problem

from .triton_cases import NETWORKS, SIZES, Case, Values, check_accuracy, check_float64, error

pytest.importorskip("triton")
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from pykernels.ops.ntk_gram import triton as kernels

POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16"}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
#: Bytes of a thread's memory outside of registers that are not worth a word: a few spills.
STACK = 64


class Compiled(NamedTuple):
    """A problem and its network; ``some`` of the kernels, not those that differ little from others."""

    target: str
    activation: tuple[str, ...]
    dtype: torch.dtype
    d: int
    precision: str = "float32"
    weights: str = "right"
    wide: bool = False
    some: bool = True


#: Each of the ways to multiply, and each activation.
COMPILED = {
    "float32": Compiled("sm_90", ("relu", "relu"), torch.float32, 32, some=False),
    "float32, few components": Compiled("gfx942", ("relu+sin",), torch.float32, 2, weights="dense"),
    "float64": Compiled("sm_90", ("abs+rbf",), torch.float64, 40, weights="left"),
    "tf32": Compiled("sm_80", ("cos+erf",), torch.float32, 40, "tf32"),
    "bfloat16, 64-bit offsets": Compiled("sm_100", ("gelu",), torch.float32, 784, "bf16", wide=True, some=False),
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
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_ahead_of_time(name: str, monkeypatch, tmp_path):
    case = COMPILED[name]
    launches: dict[str, tuple[Any, dict[str, Any]]] = {}

    def record(device: torch.device, kernel: Any, programs: int, **arguments: Any) -> None:
        launches[kernel.fn.__name__] = (kernel, arguments)

    monkeypatch.setattr(kernels, "launch", record)
    if case.wide:
        monkeypatch.setattr(kernels, "INT32_LIMIT", 0)
    options = network([Activation(a) for a in case.activation], "ntk", case.precision)
    x, y = torch.zeros(2, 65, case.d, dtype=case.dtype), torch.zeros(2, 130, case.d, dtype=case.dtype)
    scales = torch.ones(2, len(case.activation) + 1, dtype=torch.float64)
    problem = Problem(x, y, *scales)
    left, right, dense = x.new_zeros(2, 65, 2), x.new_zeros(2, 130, 2), x.new_zeros(2, 65, 130)
    kernels.gram(problem if case.weights == "dense" else problem._replace(y=None), options)
    kernels.matvec(problem, right, options)
    if case.weights == "dense":
        kernels.witness(problem, None, None, dense, options, False)
    else:
        kernels.witness(problem, left if case.weights == "left" else None, right, None, options, True)
    assert len(launches) == 4
    for kernel_name, (kernel, arguments) in launches.items():
        if case.some and kernel_name in ("ntk_gram_rows", "ntk_gram_product"):
            continue
        compiled = compile_launch(kernel, arguments, TARGETS[case.target])
        if case.target == "gfx942":
            assert compiled.asm["hsaco"]
        elif case.target == "sm_90" and CUOBJDUMP.exists():
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
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiples)
    return compile(source, target=target, options={"num_warps": arguments.get("num_warps", 4)})


def test_who_runs_what_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for operator in ("ntk_gram", "ntk_matvec", "ntk_witness"):
        assert not pykernels.available_backends()[operator]["triton"].ok
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run ntk_gram: the tensors are on cpu"):
        ntk_gram(torch.zeros(2, 3), backend="triton")


def test_layers_of_one_kind_are_one_run():
    """Unless one keeps angles near pi, for a layer behind it that needs them."""
    layers = [Activation(name) for name in ("relu", "relu", "erf", "erf", "relu", "erf", "erf")]
    layout = kernels.described(network(layers, "ntk", "float32"))
    assert [(run.times, run.stride) for run in layout.runs] == [(2, 2), (2, 5), (1, 0), (2, 5)]
    assert [run.layer.stable for run in layout.runs] == [False, True, False, False]
    columns = [layer.s for layer in layout.layers]
    assert columns == [1, 3, 8, 13, 15, 20, 25]


LARGE = [
    Case(("relu",) * 3, n=1000, m=700, d=32),
    Case(("relu",) * 10, n=300, m=300, d=784),
    Case(("erf",) * 2, n=500, m=1000, d=2),
    Case(("gelu+sin", "relu"), n=130, m=140, d=20, batch=3, columns=5),
    Case(("rbf",), n=2000, m=100, d=3, kind="nngp"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", NETWORKS + SIZES + LARGE[:1], ids=str)
def test_gpu_float64(case: Case):
    check_float64(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [1, 3, 10])
@pytest.mark.parametrize("d", [2, 16, 784])
def test_gpu_accuracy(d: int, depth: int):
    check_accuracy(d, ("relu",) * depth, "cuda")


def on_gpu(case: Case) -> Values:
    return {name: t.cuda() for name, t in case.values(torch.float32).items()}


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_gpu_bits_do_not_depend_on_the_run(case: Case):
    values = on_gpu(case)
    first, *others = (case.results(values, "triton") for _ in range(3))
    for again in others:
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_gpu_close_to_float64(case: Case):
    values = on_gpu(case)
    expected = case.forward({name: t.double() for name, t in values.items()}, "reference")
    for name, value in case.forward(values, "triton").items():
        assert error(value, expected[name]) <= (1e-2 if name == "gradient" else 1e-5), name


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_gpu_rounded_inner_products(precision: str):
    case = LARGE[0]._replace(precision=precision)
    values = on_gpu(case)
    expected, actual = (case.forward(values, backend) for backend in ("reference", "triton"))
    for name in ("nngp", "ntk", "symmetric"):
        assert error(actual[name], expected[name]) <= {"tf32": 2.0**-11, "bf16": 2.0**-8}[precision]


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_gpu_is_never_waited_for(case: Case):
    """All of it can be captured into a graph, and the graph gives the same bits; scales may be on the host."""
    values = on_gpu(case)
    options = case.options("triton") | {"weight_std": 1.2, "bias_std": 0.3}
    x, z, v, a = (values[name] for name in "xzva")

    def run() -> list[torch.Tensor]:
        return [ntk_gram(x, z, **options), ntk_matvec(x, z, v, **options), *ntk_witness(x, z, a, **options)]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(map(torch.equal, captured, expected))


@pytest.mark.gpu
def test_gpu_sizes_beyond_31_bits():
    """The last rows of a matrix with more than 2^31 numbers come out as if they were alone."""
    x, z = torch.randn(50_000, 3, device="cuda"), torch.randn(45_000, 3, device="cuda")
    gram = ntk_gram(x, z)
    assert gram.numel() > 2**31
    torch.testing.assert_close(gram[-40:], ntk_gram(x[-40:], z), rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_gpu_compile_without_graph_breaks():
    case = LARGE[0]
    values = on_gpu(case)
    x, z, v = (values[name].requires_grad_() for name in "xzv")
    options = case.options("triton")
    eager = ntk_matvec(x, z, v, **options)
    compiled = torch.compile(lambda x, z, v: ntk_matvec(x, z, v, **options), fullgraph=True)(x, z, v)
    assert torch.equal(compiled, eager)
    gradients = (torch.autograd.grad(t.sum(), (x, z, v)) for t in (eager, compiled))
    assert all(map(torch.equal, *gradients))
