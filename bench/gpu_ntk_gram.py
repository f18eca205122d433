"""GPU benchmarks of kernels of infinitely wide networks, against the printed formula in PyTorch, eager and compiled.

Products without the matrix are held against the formula with some rows of the matrix at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_cases import Case
from ntk_peers import Network, block_matvec, textbook, witness
from torch import Tensor

import pykernels
from pykernels.backends import Cost
from pykernels.ops.ntk_gram import cost
from pykernels.ops.ntk_gram.activations import network as options_of


class Kernel(NamedTuple):
    """What is computed of ``rows`` points and, unless it is the Gram matrix of one set, ``columns`` others."""

    what: str
    rows: int
    columns: int | None
    d: int
    activation: str = "relu"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        others = "" if self.columns is None else f" x {self.columns}"
        return f"{self.activation} depth 3 {self.what} {self.rows}{others}, d={self.d} {str(self.dtype)[6:]}"

    @property
    def network(self) -> Network:
        return Network(3, self.activation)

    def cost(self) -> Cost:
        def points(n: int, *shape: int) -> Tensor:
            return torch.empty((1, n, *shape), dtype=self.dtype, device="meta")

        x = points(self.rows, self.d)
        y = None if self.columns is None else points(self.columns, self.d)
        factors = {
            "Gram": (),
            "matvec": (points(self.columns or 0, 1),),
            "witness": (None, points(self.columns or 0, 1), None),
        }[self.what]
        activations = [pykernels.Activation(self.activation)] * self.network.depth
        options = options_of(activations, "ntk", "float32")
        of: Callable[..., Cost] = getattr(cost, self.what.lower())
        return of(x, y, None, None, *factors, *options)

    def tensors(self, device: str) -> list[Tensor]:
        """Points and, where they are needed, factors, in float64."""
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)

        x = random(self.rows, self.d)
        if self.columns is None:
            return [x]
        if self.what == "witness":  # half of the points attract the others, as in the published particle experiments
            half = self.columns // 2
            z = torch.cat((random(self.columns - half, self.d), 4 * random(half, self.d)))
            return [x, z, torch.cat((random(self.columns - half), -random(half))) / half]
        return [x, random(self.columns, self.d), random(self.columns, 1)]


def prepare(case: Kernel, device: str) -> tuple[dict[str, Callable[[], Sequence[Tensor]]], list[Tensor]]:
    network, ours = case.network, case.network.ours().to(device)
    # Every way takes the same tensors and returns all results.
    ways: dict[str, Callable[..., Any]]
    if case.what == "Gram":
        plain = partial(textbook, network)
        ways = {
            "pykernels": lambda x: [ours.gram(x)],
            "eager": lambda x: [plain(x, x)],
            "compiled": lambda x: [compiled(x, x)],
        }
        compiled = torch.compile(plain, dynamic=False)
    elif case.what == "witness":
        plain = partial(witness, network)
        ways = {"pykernels": ours.witness, "eager": plain, "compiled": torch.compile(plain, dynamic=False)}
    else:
        plain = partial(block_matvec, network)
        ways = {
            "pykernels": lambda x, z, v: [ours.matvec(x, z, v)],
            "compiled, some rows at a time": lambda x, z, v: [plain(x, z, v)],
        }
    tensors = case.tensors(device)
    expected = list(ways["eager" if "eager" in ways else "compiled, some rows at a time"](*tensors))
    given = [t.to(case.dtype) for t in tensors]
    return {name: partial(way, *given) for name, way in ways.items()}, expected


KERNELS = [
    *(Kernel("Gram", n, None, d, activation) for activation in ("relu", "erf") for n, d in ((2048, 32), (8192, 784))),
    *(Kernel("witness", 500, 1000, 2, dtype=dtype) for dtype in (torch.float32, torch.float64)),
    Kernel("witness", 1024, 2048, 1024),
    Kernel("matvec", 100_000, 100_000, 16),
]


def cases() -> Iterator[Case]:
    for case in KERNELS:
        work = case.cost()
        yield Case(str(case), case.dtype, work.flops, work.bytes, partial(prepare, case))
