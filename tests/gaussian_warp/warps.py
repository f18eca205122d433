"""What the tests of the warps share: problems, and the measure of error."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels import bilinear_warp, gaussian_warp_rollout

FORMS = ["integrated", "density"]
NORMALIZE = ["none", "window", "inside"]
PADDING_MODES = ["zeros", "border", "reflection", "periodic"]
#: Where a variance has more than one value: in which dimensions of (batch, step, 1, *sizes).
VARIANCES = ["number", "scalar", "samples", "steps", "row", "pixels", "everything"]


class Problem(NamedTuple):
    """Warps to compute; ``motion`` is the flow's size in pixels, ``value`` the variance or the largest one."""

    sizes: tuple[int, ...] = (5, 7)
    batch: int = 2
    channels: int = 2
    steps: int = 1
    variance: str = "number"
    value: float = 0.9
    motion: float = 3.0
    smooth: bool = False
    form: str = "integrated"
    normalize: str = "window"
    padding_mode: str = "zeros"
    support: int | None = None
    tolerance: float = 1e-4
    xy: bool = True
    units: str = "pixels"
    align_corners: bool | None = None

    def __str__(self) -> str:
        changed = [v for k, v in self._asdict().items() if k == "sizes" or v != Problem._field_defaults[k]]
        return "-".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in changed)

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        """The same numbers in every dtype, which float32 holds."""
        g = torch.Generator().manual_seed(seed)
        batch, steps, ranks = self.batch, self.steps, len(self.sizes)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        flows = normal(batch, steps, ranks, *self.sizes)
        if self.smooth:
            # Slowly varying around a displacement: neighbouring windows lie side by side.
            waves = sum(torch.arange(n).view([-1] + [1] * (ranks - 1 - a)) / 9 for a, n in enumerate(self.sizes))
            flows = normal(batch, steps, ranks, *([1] * ranks)) + 0.3 * torch.sin(waves)
        flows = self.motion * flows
        if self.units == "normalized":
            flows = flows * 2 / max(self.sizes)
        tensors = {"image": normal(batch, self.channels, *self.sizes), "flows": flows}
        shape = {
            "scalar": (),
            "samples": (batch, *([1] * (ranks + 1))),
            "steps": (steps, *([1] * (ranks + 1))),
            "row": self.sizes[-1:],
            "pixels": (batch, 1, *self.sizes),
            "everything": (batch, steps, 1, *self.sizes),
        }.get(self.variance)
        if self.variance == "steps":
            shape = (1, *shape)
        if shape is not None:
            share = torch.rand(shape, generator=g)
            # Where it has many values, some are 0 and some small.
            many = share.numel() > 1 and self.value > 0
            tensors["variance"] = self.value * (torch.where(share < 0.1, 0, share) if many else torch.ones(shape))
        return {name: t.to(dtype) for name, t in tensors.items()}

    def run(self, tensors: dict[str, Tensor], backend: str, **changed: Any) -> Tensor:
        """The images after each step."""
        options = {
            "form": self.form, "normalize": self.normalize, "padding_mode": self.padding_mode,
            "support": self.support, "tolerance": self.tolerance, "indexing": "xy" if self.xy else "ij",
            "units": self.units, "align_corners": self.align_corners, "backend": backend, **changed,
        }  # fmt: skip
        image, flows = tensors["image"], tensors["flows"]
        if self.form == "linear":
            for name in ("form", "normalize", "support", "tolerance"):
                del options[name]
            return bilinear_warp(image, flows[:, 0], **options).unsqueeze(1)
        return gaussian_warp_rollout(image, flows, tensors.get("variance", self.value), **options)

    def grad(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(seed + 99)
        return torch.randn(self.batch, self.steps, self.channels, *self.sizes, generator=g).to(dtype)

    def results(self, tensors: dict[str, Tensor], grad: Tensor, backend: str) -> dict[str, Tensor]:
        """The frames and the gradients of all tensors."""
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        frames = self.run(leaves, backend)
        gradients = torch.autograd.grad(frames, list(leaves.values()), grad, materialize_grads=True)
        return {"frames": frames.detach(), **dict(zip(leaves, gradients, strict=True))}


def error(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """``max|difference| / max(1, max|expected|)`` over several tensors; NaN must be in the same places."""
    difference = scale = 0.0
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert torch.equal(a.isnan(), e.isnan())
        if e.numel() > 0:
            a, e = a.double().nan_to_num(0.0), e.double().nan_to_num(0.0)
            difference = max(difference, (a - e).abs().max().item())
            scale = max(scale, e.abs().max().item())
    return difference / max(1.0, scale)


def assert_agree(actual: dict[str, Tensor], expected: dict[str, Tensor], message: object = "") -> None:
    """To 1e-12, and gradients to 1e-11."""
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        bound = 1e-12 if name == "frames" else 1e-11
        found = error([actual[name]], [e])
        assert found <= bound, f"{message}: {name} is off by {found:.1e}"


def sample(count: int, seed: int) -> list[Problem]:
    """Problems drawn at random, small enough for the reference."""
    r = random.Random(seed)
    problems = []
    for _ in range(count):
        ranks = r.choice((1, 2, 2, 3))
        sizes = tuple(r.choice((1, 2, 3, 5, 7, 11, 16, 33) if ranks < 3 else (1, 2, 3, 5, 6)) for _ in range(ranks))
        units = r.choice(("pixels", "pixels", "normalized"))
        problem = Problem(
            sizes, r.choice((0, 1, 2, 3, 5)), r.choice((1, 2, 3)), r.choice((1, 2, 3)), r.choice(VARIANCES),
            r.choice((0.0, 0.01, 0.05, 0.2, 0.9, 3.0)), r.choice((0.0, 0.5, 3.0, 10.0, 200.0)), r.random() < 0.4,
            r.choice(FORMS), r.choice(NORMALIZE), r.choice(PADDING_MODES),
            r.choice((None, None, 1, 2, 3, 4, 5, 9, 17) if ranks < 3 else (None, None, 1, 2, 3, 4)),
            r.choice((1e-4, 1e-4, 1e-2, 1e-12)), r.random() < 0.5, units,
            r.random() < 0.5 if units == "normalized" else None,
        )  # fmt: skip
        if ranks == 3 and problem.support is None and (problem.value > 0.9 or problem.tolerance < 1e-4):
            problem = problem._replace(support=5)
        problems.append(problem)
    return problems


def options() -> list[Problem]:
    """Every padding mode, normalisation and form, with other things changing in turn."""
    shapes = itertools.cycle([(11,), (5, 33), (9, 8), (33,), (3, 4, 5), (13, 32), (2, 3, 33)])
    variances = itertools.cycle(VARIANCES)
    supports = itertools.cycle([None, None, 3, None, 4])
    products = enumerate(itertools.product(PADDING_MODES, NORMALIZE, FORMS))
    found = [
        Problem(
            next(shapes),
            steps=1 + (i % 3 == 2),
            variance=next(variances),
            smooth=i % 4 == 1,
            form=form,
            normalize=normalize,
            padding_mode=padding_mode,
            support=next(supports),
            xy=i % 2 == 0,
        )
        for i, (padding_mode, normalize, form) in products
    ]
    linear = [((37,), True, 0.4), ((5, 6), True, 3.0), ((9, 34), False, 9.0), ((2, 3, 5), True, 3.0)]
    for padding_mode, (sizes, xy, motion) in itertools.product(PADDING_MODES, linear):
        found.append(Problem(sizes, form="linear", padding_mode=padding_mode, xy=xy, motion=motion))
    return found


def shapes() -> list[Problem]:
    """Sizes around those of blocks, vectors and windows."""
    found = [
        Problem((n,), support=s, smooth=n % 2 == 0, channels=n % 3)
        for s in (None, 3, 16, 17)
        for n in (1, 2, 8, 9, 15, 16, 17, 31, 32, 33, 65)
    ]
    for sizes in [(1, 1), (1, 33), (33, 1), (8, 31), (9, 32), (10, 33), (2, 65), (17, 16)]:
        for support, smooth in ((None, True), (3, True), (5, False), (7, True), (9, False), (11, True)):
            found.append(Problem(sizes, support=support, smooth=smooth, padding_mode="reflection", batch=1))
    for sizes in [(1, 1, 1), (1, 1, 17), (3, 1, 4), (2, 5, 33), (4, 3, 2)]:
        found += [Problem(sizes, padding_mode=mode, support=5, batch=1) for mode in PADDING_MODES]
    found += [Problem(batch=b, channels=c, steps=t) for b, c, t in ((0, 2, 1), (2, 0, 1), (2, 2, 0), (1, 3, 3))]
    found += [Problem(batch=b, channels=c, steps=t, variance="pixels") for b, c, t in ((0, 2, 2), (2, 0, 2), (2, 2, 0))]
    found += [
        Problem((12, 35), variance=v, value=x, form=f, steps=2, smooth=x > 1)
        for v in VARIANCES
        for x, f in ((0.0, "density"), (0.9, "density"), (3.0, "integrated"))
    ]
    return found


def ids(problems: list[Problem]) -> list[str]:
    return list(map(str, problems))
