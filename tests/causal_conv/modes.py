"""Problems in the other modes of the convolution: groups, states, packed and padded sequences, the residual."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import ACTIVATIONS, activate
from .cases import definition as convolve


class Mode(NamedTuple):
    """A convolution to compute: sizes and options. With ``packed``, the lengths of its sequences, batch is 1."""

    batch: int
    in_channels: int
    out_channels: int
    length: int
    kernel_size: int
    dilation: int = 1
    groups: int = 1
    activation: str | None = None
    residual: str | None = None  # "after" or "before" the activation
    bias: bool = True
    state: bool = False
    packed: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    negative_slope: float = 0.2

    def __str__(self) -> str:
        sizes = f"B{self.batch}-C{self.in_channels}-O{self.out_channels}-T{self.length}-K{self.kernel_size}"
        parts = [sizes, f"d{self.dilation}", f"g{self.groups}", str(self.activation), self.residual]
        parts += ["bias" if self.bias else None, "state" if self.state else None]
        for name, lengths in (("packed", self.packed), ("padded", self.lengths)):
            if lengths is not None:
                parts.append(f"{name}{'.'.join(map(str, lengths[:5]))}")
        return "-".join(filter(None, parts))

    @property
    def sequences(self) -> int:
        return self.batch if self.packed is None else len(self.packed)

    @property
    def reach(self) -> int:
        return (self.kernel_size - 1) * self.dilation

    def options(self) -> dict[str, Any]:
        ends = None if self.packed is None else torch.tensor([0, *accumulate(self.packed)], dtype=torch.int32)
        return {
            "dilation": self.dilation,
            "groups": self.groups,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
            "residual_before_activation": self.residual == "before",
            "cu_seqlens": ends,
            "lengths": None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int64),
        }

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """x, weight and what else the mode has. Outputs are of order one."""
        g = torch.Generator().manual_seed(seed)
        per_group = self.in_channels // self.groups
        shapes: dict[str, tuple[int, ...]] = {
            "x": (self.batch, self.in_channels, self.length),
            "weight": (self.out_channels, per_group, self.kernel_size),
        }
        if self.bias:
            shapes["bias"] = (self.out_channels,)
        if self.residual:
            shapes["residual"] = (self.batch, self.out_channels, self.length)
        if self.state:
            shapes["initial_state"] = (self.sequences, self.in_channels, self.reach)
        tensors = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
        tensors["weight"] *= (per_group * self.kernel_size) ** -0.5
        return {name: t.to(dtype) for name, t in tensors.items()}

    def grad(self, dtype: torch.dtype, seed: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(1000 + seed)
        return torch.randn(self.batch, self.out_channels, self.length, generator=g, dtype=torch.float64).to(dtype)

    def spans(self) -> Iterator[tuple[slice, slice]]:
        """Where every sequence lies: its sample and its time."""
        if self.packed is not None:
            for begin, end in pairwise(accumulate(self.packed, initial=0)):
                yield slice(0, 1), slice(begin, end)
        else:
            for i in range(self.batch):
                yield slice(i, i + 1), slice(0, self.length if self.lengths is None else self.lengths[i])


def define(mode: Mode, convolve: Any = convolve) -> Any:
    """The operator as a function of its tensors: every group of every sequence on its own, behind its state."""

    def function(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        initial_state: Tensor | None = None,
    ) -> Tensor:
        linear = {"dilation": mode.dilation, "activation": None, "negative_slope": 0.0}
        rows: list[list[Tensor]] = [[] for _ in range(mode.batch)]
        for i, (sample, time) in enumerate(mode.spans()):
            series = x[sample, :, time]
            if initial_state is not None:
                series = torch.cat([initial_state[i : i + 1], series], 2)
            z = series.new_zeros(1, weight.shape[0], series.shape[2])
            if series.shape[2] > 0:
                groups = zip(series.chunk(mode.groups, 1), weight.chunk(mode.groups, 0), strict=True)
                z = torch.cat([convolve(s, w, **linear) for s, w in groups], 1)
            if initial_state is not None:
                z = z[:, :, mode.reach :]
            if bias is not None:
                z = z + bias[:, None]
            if residual is not None and mode.residual == "before":
                z = z + residual[sample, :, time]
            y = activate(z, mode.activation, mode.negative_slope)
            if residual is not None and mode.residual == "after":
                y = y + residual[sample, :, time]
            if mode.lengths is not None:
                y = F.pad(y, (0, mode.length - y.shape[2]))
            rows[sample.start].append(y)
        return torch.cat([torch.cat(row, 2) for row in rows])

    return function


def final_states(mode: Mode, x: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """The last samples of every sequence, behind its state or zeros."""
    states = []
    for i, (sample, time) in enumerate(mode.spans()):
        past = x.new_zeros(1, x.shape[1], mode.reach) if initial_state is None else initial_state[i : i + 1]
        series = torch.cat([past, x[sample, :, time]], 2)
        states.append(series[:, :, series.shape[2] - mode.reach :])
    return torch.cat(states) if states else x.new_zeros(0, x.shape[1], mode.reach)


def _sample(count: int, seed: int) -> list[Mode]:
    rng = random.Random(seed)
    modes: list[Mode] = []
    while len(modes) < count:
        kernel_size = rng.choice([1, 2, 3, 3, 4, 5, 9, 17])
        dilation = rng.choice([1, 1, 2, 3, 7, 16, 64, 130])
        groups, multiplier = rng.choice([(1, 1), (1, 2), (2, 1), (3, 2), (4, 1), (5, 1), (8, 1), (13, 2), (41, 1)])
        per_group = rng.choice([1, 1, 2, 5])
        lengths = [0, 1, 2, 5, 15, 16, 17, 33, 64, 100, 385, (kernel_size - 1) * dilation]
        kind = rng.choice(["whole", "packed", "padded"])
        packed = padded = None
        if kind == "packed":
            packed = tuple(rng.choice(lengths) for _ in range(rng.choice([1, 2, 3, 7, 40])))
            batch, length = 1, sum(packed)
        else:
            batch, length = rng.choice([1, 2, 3, 9]), max(1, rng.choice(lengths))
            if kind == "padded":
                padded = tuple(rng.choice([0, 1, length // 2, length - 1, length]) for _ in range(batch))
        if length == 0 or groups * per_group > 60:
            continue
        mode = Mode(
            batch,
            groups * per_group,
            groups * multiplier * rng.choice([1, per_group]),
            length,
            kernel_size,
            dilation,
            groups,
            rng.choice(ACTIVATIONS),
            rng.choice([None, "after", "before"]),
            rng.random() < 0.7,
            rng.random() < 0.5 and kernel_size * dilation < 600,
            packed,
            padded,
        )
        flops = mode.batch * mode.length * mode.out_channels * per_group * kernel_size
        if flops < 3e6 and mode.sequences * groups < 250:
            modes.append(mode)
    return modes


#: One problem per mode and pair of modes, and at the edges of the kernels' tiles; then a random sample.
MODES = [
    Mode(2, 6, 8, 97, 3, 4, 2, "silu", "after"),
    Mode(3, 6, 6, 50, 4, 3, 3, "gelu", "before", bias=False),
    Mode(2, 9, 9, 97, 3, 4, 9, "silu", "after"),  # depthwise
    Mode(2, 9, 9, 385, 4, 1, 9, "gelu", "before", state=True),
    Mode(1, 7, 7, 5000, 5, 2, 7, "tanh", "after"),  # more than a block of the depthwise backward
    Mode(1, 3, 3, 9000, 3, 1024, 3, None, None, state=True),
    Mode(4, 5, 5, 20, 3, 40, 5, "leaky_relu", "after"),  # no tap but one sees the series
    Mode(2, 5, 10, 60, 3, 4, 5, "relu", "after"),  # two filters per channel
    Mode(2, 4, 12, 100, 2, 7, 4, "silu", "before", state=True),
    Mode(1, 1, 1, 700, 3, 5, 1, "gelu", "after", state=True),
    Mode(2, 5, 7, 97, 3, 4, 1, "silu", "before"),
    Mode(3, 9, 8, 385, 3, 130, 1, "gelu", "after"),
    Mode(2, 5, 7, 97, 3, 4, 1, "tanh", "before", state=True),
    Mode(2, 5, 4, 3, 5, 16, 1, "gelu", None, state=True),  # shorter than its state
    Mode(2, 5, 4, 1, 3, 1, 1, None, None, state=True),
    Mode(3, 5, 4, 30, 1, 3, 1, "silu", "after", state=True),  # the state of a single tap is empty
    Mode(2, 13, 9, 1500, 3, 512, 1, "leaky_relu", "before", state=True),
    Mode(1, 4, 5, 300, 64, 1, 1, "tanh", "after", state=True),
    Mode(1, 5, 7, 97, 3, 4, 1, "tanh", "after", packed=(97,)),
    Mode(1, 5, 7, 200, 3, 4, 1, "silu", "before", packed=(60, 1, 0, 100, 39)),
    Mode(1, 5, 7, 200, 3, 4, 1, "gelu", "after", state=True, packed=(60, 0, 7, 100, 33)),
    Mode(1, 6, 6, 120, 3, 16, 6, "silu", None, state=True, packed=(0, 60, 1, 31, 28, 0)),
    Mode(1, 6, 6, 120, 3, 2, 6, "gelu", "before", packed=(60, 0, 60)),
    Mode(1, 6, 4, 120, 3, 16, 2, "relu", "after", packed=(40, 40, 3, 37)),
    Mode(1, 3, 8, 900, 3, 300, 1, "leaky_relu", "after", packed=(400, 5, 495)),  # lengths below the dilation
    Mode(1, 3, 8, 64, 3, 2, 1, "tanh", None, packed=(1,) * 64),
    Mode(1, 40, 41, 3000, 3, 8, 1, "leaky_relu", "after", packed=(1000, 1, 1023, 385, 591)),
    Mode(1, 4, 4, 6000, 3, 8, 4, "silu", "after", state=True, packed=(5000, 999, 1)),
    Mode(3, 5, 7, 97, 3, 4, 1, "tanh", "after", lengths=(97, 0, 40)),
    Mode(3, 5, 7, 97, 3, 4, 1, "silu", "before", state=True, lengths=(1, 97, 5)),
    Mode(2, 6, 6, 60, 3, 7, 6, "gelu", "before", lengths=(60, 13)),
    Mode(3, 6, 6, 60, 3, 7, 6, "silu", "after", state=True, lengths=(0, 59, 13)),
    Mode(2, 6, 8, 700, 3, 64, 2, "leaky_relu", "before", lengths=(3, 650)),
    Mode(33, 4, 3, 17, 2, 5, 1, "gelu", "after", lengths=tuple(i % 18 for i in range(33))),
    Mode(2, 3, 4, 20, 1, 1, 1, "gelu", "after", lengths=(20, 7)),
    *_sample(60, seed=1),
]

#: A few of them, for properties that do not depend on every size: each mode in each kernel.
FEW_MODES = [
    Mode(2, 6, 8, 97, 3, 4, 2, "silu", "before"),
    Mode(2, 9, 9, 97, 3, 4, 9, "gelu", "after", state=True),
    Mode(2, 5, 7, 385, 3, 130, 1, "gelu", "before", state=True),
    Mode(1, 5, 7, 200, 3, 4, 1, "silu", "after", state=True, packed=(60, 0, 7, 100, 33)),
    Mode(1, 6, 6, 120, 3, 16, 6, "tanh", "before", state=True, packed=(50, 9, 61)),
    Mode(3, 5, 7, 97, 3, 4, 1, "tanh", "before", state=True, lengths=(97, 0, 40)),
    Mode(3, 6, 6, 60, 3, 7, 6, "silu", "after", lengths=(60, 0, 13)),
    Mode(2, 4, 8, 50, 2, 7, 4, "leaky_relu", "after", lengths=(50, 21)),
]
