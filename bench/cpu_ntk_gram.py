"""Benchmarks of kernels of infinitely wide networks on the CPU, for run.py, and how exact they are in float32.

Results are checked against the printed formula in float64, which is good to 1e-8. Flops are those that the package
reckons with: pykernels/ops/ntk_gram/cost.py.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Limits, relative_error, verdict
from measure import Contender, compare, peak_memory
from ntk_empirical import empirical_cases
from ntk_peers import Network, Remote, block_matvec, keops_matvec, neural_tangents, textbook, witness
from torch import Tensor

import pykernels
from pykernels.backends import Cost
from pykernels.ops.ntk_gram import cost
from pykernels.ops.ntk_gram.activations import network as options_of

#: Points and dimensions of the Gram matrices.
GRAMS = ((2048, 32), (4096, 784))
#: Rows, columns, dimension and depth of the products without the matrix.
MATVECS = ((100_000, 500, 16, 1), (20_000, 500, 16, 3))
#: Points and dimensions of the product whose memory is measured.
LARGE = (100_000, 16)


def _compiled(function: Callable[..., Any], network: Network) -> Callable[..., Any]:
    return torch.compile(partial(function, network), fullgraph=True, dynamic=False)


def _cost(of: Callable[..., Cost], network: Network, x: Tensor, y: Tensor | None, *factors: Any) -> Cost:
    options = options_of([pykernels.Activation(network.activation)] * network.depth, "ntk", "float32")
    return of(x[None], None if y is None else y[None], None, None, *factors, *options)


def bench_gram(network: Network, n: int, d: int, apart: bool, limits: Limits, seconds: float) -> dict[str, Any]:
    """Of one set of points, or of two; the GEMM is that of all inner products."""
    torch.manual_seed(0)
    x = torch.randn(n, d)
    y = torch.randn(n, d) if apart else None
    other, ours, out = x if y is None else y, network.ours(), torch.empty(n, n)
    compiled = _compiled(textbook, network)
    ways: dict[str, Callable[[], Tensor]] = {
        "pykernels": lambda: ours.gram(x, y),
        "eager": lambda: textbook(network, x, other),
        "compiled": lambda: compiled(x, other),
    }
    expected = textbook(network, x.double(), other.double())
    errors = {name: relative_error(run(), expected) for name, run in ways.items()}
    contenders = [Contender(*way) for way in ways.items()]
    contenders.append(Contender("GEMM alone", lambda: torch.mm(x, other.T, out=out)))
    with neural_tangents() as worker:
        if worker is not None:
            (found,) = worker.results(network, x=x, **({} if y is None else {"y": y}))
            errors["neural-tangents"] = relative_error(found, expected)
            contenders.append(Remote(worker))
        del expected
        results = compare(contenders, seconds=seconds, most_threads=limits.threads)
    work = _cost(cost.gram, network, x, y)
    return verdict(results, errors, limits=limits, flops=work.flops, moved=work.bytes)


def bench_witness(network: Network, dtype: torch.dtype, limits: Limits, seconds: float) -> dict[str, Any]:
    """500 points that move towards 500 others, in the plane, as in the published particle experiments."""
    torch.manual_seed(0)
    n = 500
    x, a = torch.randn(n, 2), torch.cat((torch.ones(n), -torch.ones(n))) / n
    z = torch.cat((torch.randn(n, 2), 4 * torch.randn(n, 2)))
    arrays = [t.to(dtype) for t in (x, z, a)]
    ours = network.ours()
    ways: dict[str, Callable[..., Any]] = {
        "pykernels": ours.witness,
        "eager": partial(witness, network),
        "compiled": _compiled(witness, network),
    }
    expected = witness(network, x.double(), z.double(), a.double())

    def error(found: Any) -> float:
        return max(map(relative_error, found, expected))

    errors = {name: error(way(*arrays)) for name, way in ways.items()}
    contenders = [Contender(name, partial(way, *arrays)) for name, way in ways.items()]
    with neural_tangents(dtype) as worker:
        if worker is not None:
            found = worker.results(network, x=arrays[0], y=arrays[1], a=arrays[2])
            errors["neural-tangents"] = error(found)
            contenders.append(Remote(worker))
        results = compare(contenders, seconds=seconds, most_threads=limits.threads)
    work = _cost(cost.witness, network, *arrays[:2], None, arrays[2][None], None)
    measured = limits if dtype == torch.float32 else None  # the limits are those of float32
    return verdict(results, errors, limits=measured, flops=work.flops, moved=work.bytes)


def bench_matvec(network: Network, rows: int, columns: int, d: int, limits: Limits, seconds: float) -> dict[str, Any]:
    """Some columns only: every contender's time grows in proportion with them."""
    torch.manual_seed(0)
    x, z, v = torch.randn(rows, d), torch.randn(columns, d), torch.randn(columns, 1)
    ways: dict[str, Callable[[], Tensor]] = {
        "pykernels": partial(network.ours().matvec, x, z, v),
        "compiled, some rows at a time": partial(block_matvec, network, x, z, v),
        "pykeops": partial(keops_matvec, network, x, z, v),
    }
    expected = torch.cat([textbook(network, some.double(), z.double()) @ v.double() for some in x.split(4000)])
    errors = {}
    for name in list(ways):
        try:
            errors[name] = relative_error(ways[name](), expected)
        except ModuleNotFoundError as error:
            print(f"without {name}: {error}")
            del ways[name]
    results = compare([Contender(*way) for way in ways.items()], seconds=seconds, most_threads=limits.threads)
    work = _cost(cost.matvec, network, x, z, v[None])
    return verdict(results, errors, limits=limits, flops=work.flops, moved=work.bytes)


def cases(limits: Limits, seconds: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """Benchmarks by name; each runs for a small multiple of ``seconds``."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for activation in ("relu", "erf"):
        network = Network(3, activation)
        for n, d in GRAMS:
            name = f"{activation} depth 3, Gram of {n} points, d={d}"
            found[name] = lambda a=(network, n, d, False): bench_gram(*a, limits, seconds)
    n, d = GRAMS[0]
    found[f"relu depth 3, Gram of {n} and {n} points, d={d}"] = lambda: bench_gram(
        Network(), n, d, True, limits, seconds
    )
    for dtype in (torch.float32, torch.float64):
        name = f"relu depth 3, witness 500 x 1000, d=2{', float64' if dtype == torch.float64 else ''}"
        found[name] = lambda dtype=dtype: bench_witness(Network(), dtype, limits, seconds)
    for rows, columns, d, depth in MATVECS:
        name = f"relu depth {depth}, matvec {rows} x {columns}, d={d}"
        network = Network(depth)
        found[name] = lambda a=(network, rows, columns, d): bench_matvec(*a, limits, seconds)
    return found | empirical_cases(limits, seconds)


def memory() -> dict[str, Any]:
    """Seconds and peak bytes of a product with a matrix that does not fit, in a process of its own."""
    command = [sys.executable, __file__, *map(str, LARGE)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    result: dict[str, Any] = json.loads(output.stdout)
    n, d = LARGE
    return result | {"points": n, "d": d, "matrix_bytes": 4 * n * n, "argument_bytes": 4 * n * (d + 2)}


def _large_matvec(n: int, d: int) -> dict[str, Any]:
    ours = Network().ours()
    x, v = torch.randn(n, d), torch.randn(n)
    ours.matvec(x[:10], x[:10], v[:10])  # libraries and thread pools
    start = time.perf_counter()
    peak = peak_memory(lambda: ours.matvec(x, x, v))
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak}


#: How the second point of a pair comes from the first one, in the table of accuracies: its perturbation.
NEAR = (1e-5, 1e-4, 1e-3, 1e-2)


def accuracy() -> list[dict[str, Any]]:
    """Largest |K32 - K64| / sqrt(K(x, x) K(y, y)) on the same float32 points, by kind of pair, for ours and others."""
    found = []
    with neural_tangents() as worker:
        for activation, d, depth, (weight_std, bias_std) in itertools.product(
            ("relu", "erf"), (2, 16, 784), (1, 3, 10), ((1.0, 0.0), (1.0, 1.0), (2**0.5, 0.0))
        ):
            network = Network(depth, activation, weight_std, bias_std)
            torch.manual_seed(0)
            x = torch.randn(32, d)
            others = {
                "random": torch.randn(32, d),
                "duplicate": x,
                **{f"near {size:g}": x + size * torch.randn(32, d) for size in NEAR},
                "antipodal": -x,
            }
            y, ours = torch.cat(list(others.values())), network.ours()
            exact = ours.gram(x.double(), y.double(), backend="reference")
            sizes = (ours.diag(x.double()).unsqueeze(1) * ours.diag(y.double())).sqrt()
            results = {"pykernels": ours.gram(x, y), "eager": textbook(network, x, y)}
            if worker is not None:
                (results["neural-tangents"],) = worker.results(network, x=x, y=y)
            errors = {}
            for name, result in results.items():
                error = ((result.double() - exact).abs() / sizes).nan_to_num(nan=float("inf"))
                own = error.view(32, -1, 32).diagonal(dim1=0, dim2=2).amax(1)
                errors[name] = dict(zip(others, own.tolist(), strict=True))
                errors[name]["random"] = max(errors[name]["random"], float(error.view(32, -1, 32)[:, 0].max()))
            found.append({"d": d, **network._asdict(), "largest_error": errors})
    return found


def _overhead() -> float:
    """Of a call: one point, without gradients."""
    ours, x = Network(1).ours(), torch.zeros(1, 1)
    torch.set_num_threads(1)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(100):
            ours.gram(x)
        times.append((time.perf_counter() - start) / 100)
    return sorted(times)[len(times) // 2]


def extras(only: str) -> dict[str, Any]:
    """What is measured beside times of cases."""
    found: dict[str, Any] = {}
    if only in "memory":
        found["memory"] = large = memory()
        print(
            f"memory of a product with a matrix of {LARGE[0]} x {LARGE[0]}: {large['peak_bytes'] / 1e6:.1f} MB, its "
            f"arguments {large['argument_bytes'] / 1e6:.1f} MB, the matrix {large['matrix_bytes'] / 1e9:.0f} GB; "
            f"{large['seconds']:.1f} s"
        )
    if only in "accuracy":
        found["accuracy"] = rows = accuracy()
        for activation, name in itertools.product(("relu", "erf"), rows[0]["largest_error"]):
            errors = [row["largest_error"][name] for row in rows if row["activation"] == activation]
            worst = ", ".join(f"{kind} {max(error[kind] for error in errors):.1e}" for kind in errors[0])
            print(f"largest errors of {name} in float32, {activation}: {worst}")
    if only in "call overhead":
        found["call_overhead_s"] = {"pykernels": _overhead()}
        print(f"call overhead: {found['call_overhead_s']['pykernels'] * 1e6:.1f} us")
    return found


if __name__ == "__main__":
    print(json.dumps(_large_matvec(*map(int, sys.argv[1:]))))
