"""Tangent kernels of the same networks by other means, for cpu_ntk_gram.py.

The formula as publications print it, with an arccosine, in PyTorch, eager and compiled; neural-tangents, jitted, in a
process of its own that ``PYKERNELS_NT_PYTHON`` names the Python for (ntk_neural_tangents.py says what it needs); and
KeOps for products without the matrix. Peers that are not there are left out with a line that says so.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from contenders import lazy_tensor
from measure import Contender
from torch import Tensor

import pykernels

#: The Python of an environment with neural-tangents.
WORKER_VARIABLE = "PYKERNELS_NT_PYTHON"


class Network(NamedTuple):
    """``depth`` hidden layers of ``activation``, a bias in all layers but the last."""

    depth: int = 3
    activation: str = "relu"
    weight_std: float = 1.0
    bias_std: float = 1.0

    def ours(self) -> pykernels.NTK:
        return pykernels.NTK(self.depth, self.activation, self.weight_std, self.bias_std)


def _relu(norm: Any, c: Any) -> tuple[Any, Any]:
    """E[relu(u) relu(v)] and E[relu'(u) relu'(v)] from the product of the standard deviations and the covariance."""
    cosine = (c / norm).clamp(-1, 1)
    rest = math.pi - cosine.acos()
    return norm * ((1 - cosine * cosine).sqrt() + rest * cosine) / (2 * math.pi), rest / (2 * math.pi)


def _erf(norm: Any, c: Any) -> tuple[Any, Any]:
    """The same for erf, where norm is the product of the two sqrt(1 + 2 variance)."""
    twice = 2 * c
    return (2 / math.pi) * (twice / norm).asin(), (4 / math.pi) / (norm * norm - twice * twice).sqrt()


PAIRS = {"relu": _relu, "erf": _erf}


def _norms(network: Network, x: Tensor) -> list[Tensor]:
    """What each point of x (N, d) contributes to the norm in each layer, (N, 1)."""
    weight, norms = network.weight_std**2, []
    variance = weight * x.square().mean(1, keepdim=True) + network.bias_std**2
    for _ in range(network.depth):
        if network.activation == "relu":
            norms.append(variance.sqrt())
            mean = variance / 2
        else:
            norms.append((1 + 2 * variance).sqrt())
            mean = (2 / math.pi) * (2 * variance / (1 + 2 * variance)).asin()
        variance = weight * mean + network.bias_std**2
    return norms


def _recursion(network: Network, norms_x: Sequence[Any], norms_y: Sequence[Any], c: Any) -> Any:
    """The tangent kernel from the covariances c of the first layer, for matrices and for KeOps' symbolic ones."""
    weight, bias = network.weight_std**2, network.bias_std**2
    tangent = c
    for layer, (one, other) in enumerate(zip(norms_x, norms_y, strict=True), 1):
        value, slope = PAIRS[network.activation](one * other, c)
        c = weight * value + (bias if layer < network.depth else 0.0)
        tangent = c + weight * tangent * slope
    return tangent


def textbook(network: Network, x: Tensor, y: Tensor) -> Tensor:
    """The tangent kernel (N, M) of x (N, d) and y (M, d), all in matrices."""
    c = network.weight_std**2 / x.shape[1] * (x @ y.T) + network.bias_std**2
    return _recursion(network, _norms(network, x), [norm.T for norm in _norms(network, y)], c)


def keops_matvec(network: Network, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """The product of the same formula with v (M, p), without the matrix."""
    lazy = lazy_tensor()
    norms_x = [lazy(norm.unsqueeze(1)) for norm in _norms(network, x)]
    norms_y = [lazy(norm.unsqueeze(0)) for norm in _norms(network, y)]
    products = (lazy(x.unsqueeze(1)) * lazy(y.unsqueeze(0))).sum(-1)
    c = products * (network.weight_std**2 / x.shape[1]) + network.bias_std**2
    result: Tensor = _recursion(network, norms_x, norms_y, c) @ v
    return result


def block_matvec(network: Network, x: Tensor, y: Tensor, v: Tensor, rows: int = 2000) -> Tensor:
    """The same by compiled matrices of some rows at a time."""
    return torch.cat([_block(network, block, y, v) for block in x.split(rows)])


@torch.compile(dynamic=False)
def _block(network: Network, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    return textbook(network, x, y) @ v


def witness(network: Network, x: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Value (N,) and gradient (N, d) with respect to x of the sum of a_j k(x, y_j), by autograd."""

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        value = textbook(network, x, y) @ a
        return value.sum(), value

    # In one graph of its own, which the compiler turns into code twice as fast as from a forward and a backward.
    gradient, value = torch.func.grad(total, has_aux=True)(x)
    return value, gradient


class Worker:
    """A process with neural-tangents that answers one request at a time."""

    def __init__(self, python: str, dtype: torch.dtype) -> None:
        command = [python, Path(__file__).with_name("ntk_neural_tangents.py"), str(dtype).removeprefix("torch.")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> list[float]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise SystemExit(f"the process with neural-tangents ended with exit code {self.process.wait()}")
        seconds: list[float] = json.loads(answer)
        return seconds

    def results(self, network: Network, **arrays: Tensor) -> list[Tensor]:
        """The kernel of x and, if given, y; with a also given, the witness. Later timings are of the same."""
        with tempfile.TemporaryDirectory() as folder:
            problem, results = str(Path(folder) / "problem.npz"), str(Path(folder) / "results.npz")
            np.savez(problem, **{name: array.numpy() for name, array in arrays.items()})
            self.ask(problem=problem, results=results, network=network._asdict())
            with np.load(results) as found:
                return [torch.from_numpy(found[name]) for name in found.files]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Remote(Contender):
    """A contender that times itself, in its own process, with the threads that it takes by itself."""

    def __init__(self, worker: Worker) -> None:
        super().__init__("neural-tangents", lambda: worker.ask(repeats=1))
        self.worker = worker

    def time(self, repeats: int) -> list[float]:
        return self.worker.ask(repeats=repeats)

    def choose_threads(self, most: int) -> None:
        self.threads = most


@contextmanager
def neural_tangents(dtype: torch.dtype = torch.float32) -> Iterator[Worker | None]:
    """A worker for as long as the context lasts; None where the environment names no Python that has it."""
    python = os.environ.get(WORKER_VARIABLE)
    if python is None:
        print(f"without neural-tangents: {WORKER_VARIABLE} names no Python that has it")
        yield None
        return
    worker = Worker(python, dtype)
    try:
        yield worker
    finally:
        worker.close()  # and waited for, so that its time counts as this process'
