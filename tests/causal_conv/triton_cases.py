"""Problems for the Triton kernels, and how far they may be off: the same in the interpreter and on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels.ops import causal_conv1d

from .cases import error, pooled_error, results

LOW = {torch.float16, torch.bfloat16}


class Mode(NamedTuple):
    """A convolution to compute: sizes, options, and how long its sequences are."""

    batch: int
    in_channels: int
    out_channels: int
    length: int
    kernel_size: int
    dilation: int = 1
    groups: int = 1
    activation: str | None = None
    residual: str | None = None  # "before" or "after" the activation
    bias: bool = True
    state: bool = False
    packed: tuple[int, ...] | None = None  # lengths of packed sequences
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        b, c, o, t, k, d, g, activation, residual, bias, state, packed, lengths = self
        flags = [
            activation,
            residual,
            "bias" * bias,
            "state" * state,
            "packed" * bool(packed),
            "lengths" * bool(lengths),
        ]
        return "-".join([f"{b}x{c}x{t}-O{o}-K{k}-d{d}-g{g}", *filter(None, flags)])

    def tensors(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """The differentiable arguments, of such a size that outputs are of order one."""
        generator = torch.Generator().manual_seed(seed)
        fan_in = self.in_channels // self.groups * self.kernel_size
        shapes = {
            "x": (self.batch, self.in_channels, self.length),
            "weight": (self.out_channels, self.in_channels // self.groups, self.kernel_size),
        }
        if self.bias:
            shapes["bias"] = (self.out_channels,)
        if self.residual:
            shapes["residual"] = (self.batch, self.out_channels, self.length)
        if self.state:
            sequences = len(self.packed) if self.packed else self.batch
            shapes["initial_state"] = (sequences, self.in_channels, (self.kernel_size - 1) * self.dilation)
        tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        tensors["weight"] *= fan_in**-0.5
        return {name: t.to(device, dtype) for name, t in tensors.items()}

    def grad(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
        shape = (self.batch, self.out_channels, self.length)
        generator = torch.Generator().manual_seed(1000 + seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def options(self, device: str = "cpu") -> dict[str, Any]:
        options: dict[str, Any] = {
            "dilation": self.dilation,
            "groups": self.groups,
            "activation": self.activation,
            "negative_slope": 0.3,
            "residual_before_activation": self.residual == "before",
        }
        if self.packed:
            offsets = torch.tensor([0, *self.packed]).cumsum(0)
            options["cu_seqlens"] = offsets.to(device, torch.int32)
        if self.lengths:
            options["lengths"] = torch.tensor(self.lengths, device=device)
        return options


#: Every activation with every kind of residual, on both kinds of kernel.
EPILOGUES = [
    Mode(2, channels, channels, 37, 3, 2, groups, activation, residual)
    for channels, groups in ((6, 1), (3, 3))
    for activation in (None, "relu", "leaky_relu", "tanh", "silu", "gelu")
    for residual in (None, "after", "before")
]

#: Sizes at the edges of tiles, taps beyond the start, groups.
SIZES = [
    Mode(1, 1, 1, 1, 1, bias=False),
    Mode(2, 6, 6, 1, 3, 5),
    Mode(1, 6, 6, 2, 3, 1),
    Mode(1, 6, 6, 3, 3, 1),
    Mode(1, 7, 5, 31, 4, 2**40),
    Mode(1, 5, 7, 19, 5, 18),
    Mode(2, 17, 33, 63, 1),
    Mode(1, 33, 17, 64, 3, 5),
    Mode(1, 16, 65, 65, 2, 64),
    Mode(2, 13, 6, 127, 3, 7),
    Mode(1, 6, 13, 128, 3, 128),
    Mode(1, 6, 6, 129, 5, 31),
    Mode(2, 1, 20, 50, 3, 4),
    Mode(2, 20, 1, 50, 3, 4),
    Mode(2, 5, 5, 127, 4, 3, 5),
    Mode(1, 5, 15, 1025, 4, 1, 5, bias=False),
    Mode(2, 12, 10, 37, 3, 2, 2),
    Mode(2, 4, 6, 37, 3, 2, 2),
    Mode(3, 40, 24, 67, 3, 4, 4),
]

#: States, packed and padded sequences.
SEQUENCES = [
    mode
    for channels, groups in ((6, 1), (3, 3))
    for mode in (
        Mode(2, channels, channels, 37, 3, 4, groups, "tanh", state=True),
        Mode(2, channels, channels, 5, 4, 7, groups, "silu", "after", state=True),
        Mode(2, channels, channels, 33, 1, 7, groups, "gelu", state=True),
        Mode(3, channels, channels, 37, 3, 4, groups, "silu", "before", lengths=(0, 37, 11)),
        Mode(3, channels, channels, 70, 3, 4, groups, None, "after", state=True, lengths=(70, 1, 63)),
        Mode(1, channels, channels, 37, 3, 4, groups, "gelu", "after", packed=(0, 5, 0, 1, 14, 17, 0)),
        Mode(1, channels, channels, 130, 3, 4, groups, "leaky_relu", "before", state=True, packed=(129, 1)),
        Mode(1, channels, channels, 64, 3, 90, groups, "relu", state=True, packed=(64,)),
    )
]


def check_float64(mode: Mode, device: str) -> None:
    """Within 1e-12 of the reference, output and gradients."""
    tensors, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
    expected = results(causal_conv1d, tensors, grad, backend="reference", **mode.options())
    moved = {name: t.to(device) for name, t in tensors.items()}
    actual = results(causal_conv1d, moved, grad.to(device), backend="triton", **mode.options(device))
    for name, value in actual.items():
        e = error(value.cpu(), expected[name])
        assert e <= 1e-12, f"{name} is off by {e:.1e}"


def check_accuracy(modes: list[Mode], dtype: torch.dtype, device: str, seeds: int) -> None:
    """Outputs at most twice, gradients three times as far from float64 as PyTorch in the same dtype, and 2 eps.

    Errors are pooled over draws of the inputs. Outputs near the kink of relu get no gradient: on which side of it they
    fall is chance.
    """
    eps = torch.finfo(dtype).eps
    for mode in modes:
        ours: dict[str, list[Tensor]] = {}
        theirs: dict[str, list[Tensor]] = {}
        exact: dict[str, list[Tensor]] = {}
        for seed in range(seeds):
            tensors, grad = mode.tensors(dtype, seed=seed), mode.grad(dtype, seed=seed)
            doubles = {name: t.double() for name, t in tensors.items()}
            if mode.activation in ("relu", "leaky_relu"):
                plain = {**mode.options(), "activation": None}
                before = dict(doubles) if mode.residual == "before" else {**doubles, "residual": None}
                grad[causal_conv1d(**before, backend="reference", **plain).abs() < 16 * eps] = 0
            runs = (
                (exact, doubles, "cpu", "reference"),
                (theirs, tensors, device, "reference"),
                (ours, tensors, device, "triton"),
            )
            for found, inputs, where, backend in runs:
                moved = {name: t.to(where) for name, t in inputs.items()}
                g = grad.to(where, moved["x"].dtype)
                for name, value in results(causal_conv1d, moved, g, backend=backend, **mode.options(where)).items():
                    found.setdefault(name, []).append(value.cpu())
        for name in ours:
            e, reference = (pooled_error(found[name], exact[name]) for found in (ours, theirs))
            allowed = (2 if name == "y" else 3) * reference + 2 * eps
            assert e <= allowed, f"{mode}: {name} is off by {e:.1e}, PyTorch by {reference:.1e}"
