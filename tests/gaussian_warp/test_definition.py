"""What a warp is: sums over all pairs of pixels, written out, and solutions that are known otherwise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pykernels import bilinear_warp, diffusion_variance, gaussian_warp, gaussian_warp_rollout

FORMS = ["integrated", "density"]
NORMALIZE = ["none", "window", "inside"]
PADDING_MODES = ["zeros", "border", "reflection", "periodic"]
each_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])
each_form = pytest.mark.parametrize("form", FORMS)
each_normalize = pytest.mark.parametrize("normalize", NORMALIZE)
each_padding_mode = pytest.mark.parametrize("padding_mode", PADDING_MODES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def weight(form: str, distance: float, variance: float) -> float:
    if form == "density":
        return math.exp(-(distance**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    near, far = ((abs(distance) + half) / math.sqrt(2 * variance) for half in (-0.5, 0.5))
    if near < 0:
        return (math.erf(far) - math.erf(near)) / 2
    return (math.erfc(near) - math.erfc(far)) / 2


def pixel_inside(p: int, size: int, padding_mode: str) -> int | None:
    """The pixel that stands for p, found by going there step by step."""
    if padding_mode == "zeros":
        return p if 0 <= p < size else None
    if padding_mode == "border":
        return min(max(p, 0), size - 1)
    while not 0 <= p < size:
        if padding_mode == "periodic":
            p += size if p < 0 else -size
        else:
            p = -1 - p if p < 0 else 2 * size - 1 - p
    return p


def axis_matrix(
    centre: float, size: int, variance: float, form: str, normalize: str, padding_mode: str, window: Sequence[int]
) -> list[float]:
    """What each pixel of an axis weighs for one centre, all pixels of the window in that which stands for them."""
    weights = {p: weight(form, p - centre, variance) for p in window}
    row = [0.0] * size
    for p, w in weights.items():
        at = pixel_inside(p, size, padding_mode)
        if at is not None:
            row[at] += w
    total = 1.0
    if normalize == "window":
        total = math.fsum(weights.values())
    if normalize == "inside":
        total = math.fsum(row)
    return [w / total for w in row] if total > 0 else row


def double_sum(
    image: Tensor,
    flow: Tensor,
    variance: float,
    form: str,
    normalize: str,
    padding_mode: str,
    window: Callable[[float], Sequence[int]],
) -> Tensor:
    """out[x] = sum over all pixels p of w(p - (x - flow[x])) image[p], in loops; channel 0 along the last axis."""
    sizes = image.shape[2:]
    out = torch.zeros_like(image)
    pixels = list(itertools.product(*(range(n) for n in sizes)))
    for b in range(image.shape[0]):
        for x in pixels:
            rows = []
            for axis, size in enumerate(sizes):
                centre = x[axis] - flow[(b, len(sizes) - 1 - axis, *x)].item()
                rows.append(axis_matrix(centre, size, variance, form, normalize, padding_mode, window(centre)))
            for c in range(image.shape[1]):
                terms = [math.prod(r[i] for r, i in zip(rows, p, strict=True)) * image[(b, c, *p)] for p in pixels]
                out[(b, c, *x)] = math.fsum(terms)
    return out


def everywhere(reach: int) -> Callable[[float], Sequence[int]]:
    return lambda centre: range(math.floor(centre) - reach, math.floor(centre) + reach + 1)


def nearest(taps: int) -> Callable[[float], Sequence[int]]:
    """The pixels nearest to the centre."""

    def window(centre: float) -> Sequence[int]:
        candidates = range(math.floor(centre) - taps, math.floor(centre) + taps + 2)
        return sorted(candidates, key=lambda p: abs(p - centre))[:taps]

    return window


def blob(centre: Sequence[float], variance: float, sizes: Sequence[int]) -> Tensor:
    """A Gaussian, pixel by pixel."""
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in sizes), indexing="ij")
    squares = sum((g - c).square() for g, c in zip(grid, centre, strict=True))
    result: Tensor = (-squares / (2 * variance)).exp() / (2 * math.pi * variance) ** (len(sizes) / 2)
    return result[None, None]


def uniform(flow: Sequence[float], sizes: Sequence[int]) -> Tensor:
    """The same displacement everywhere."""
    shape = (1, len(flow)) + (1,) * len(sizes)
    return torch.tensor(flow, dtype=torch.float64).view(shape).expand(1, len(flow), *sizes)


CASES = [((9,), 0.9), ((1,), 0.4), ((4, 5), 0.9), ((2, 3), 3.0), ((5, 4), 0.06), ((3, 2, 3), 0.5)]


@each_backend
@each_normalize
@each_padding_mode
@each_form
def test_dense_sum(form, padding_mode, normalize, backend):
    """The whole sum to 1e-12 where nothing is left out, and else to the tolerance."""
    for sizes, variance in CASES if backend == "reference" else CASES[:4]:
        image, flow = random(1, 1, *sizes), 2.5 * random(1, len(sizes), *sizes)
        options = {"form": form, "normalize": normalize, "padding_mode": padding_mode, "backend": backend}
        reach = math.ceil(9 * math.sqrt(variance)) + 1
        expected = double_sum(image, flow, variance, form, normalize, padding_mode, everywhere(reach))
        # Without a window, mass inside the image counts however far away; the window sees none of it beyond its reach.
        mass = double_sum(torch.ones_like(image), flow, variance, form, "none", padding_mode, everywhere(reach))
        seen = mass > (1e-3 if normalize == "inside" else -1)
        wide = gaussian_warp(image, flow, variance, support=2 * reach + 1, **options)
        torch.testing.assert_close(wide[seen], expected[seen], rtol=1e-12, atol=1e-12)
        span = image.max().clamp(min=0) - image.min().clamp(max=0)
        for tolerance in (1e-2, 1e-4, 1e-12):
            windowed = gaussian_warp(image, flow, variance, tolerance=tolerance, **options)
            seen = mass > (0.1 if normalize == "inside" else -1)
            # A density's sum over pixels is not 1, so that what is left out weighs more or less than its mass.
            slack = 2.6 if form == "density" and variance < 0.2 else 1.01
            difference = (windowed - expected)[seen].abs().max().item() if seen.any() else 0.0
            assert difference <= slack * tolerance * span + 1e-12, (sizes, variance, tolerance, difference / span)


@each_backend
@pytest.mark.parametrize("support", [1, 2, 3, 4, 5, 8])
@each_normalize
@each_form
def test_supports_are_the_nearest_pixels(form, normalize, support, backend):
    for sizes, padding_mode in itertools.product([(9,), (3, 5)], PADDING_MODES):
        image, flow = random(1, 2, *sizes), 2.5 * random(1, len(sizes), *sizes)
        expected = double_sum(image, flow, 0.7, form, normalize, padding_mode, nearest(support))
        actual = gaussian_warp(
            image, flow, 0.7, form=form, normalize=normalize, padding_mode=padding_mode, support=support,
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def released(image: Tensor, grid: Tensor, std: float, size: int, border: bool) -> Tensor:
    """The published program's sampler, for a grid (B, H, W, 2) with (x, y) in [-1, 1], corners aligned."""

    def phi(z: float) -> float:
        return math.erfc(-z / math.sqrt(2)) / 2

    batch, channels, height, width = image.shape
    out = torch.zeros_like(image)
    for b, y, x in itertools.product(range(batch), range(height), range(width)):
        ix = (grid[b, y, x, 0].item() + 1) / 2 * (width - 1)
        iy = (grid[b, y, x, 1].item() + 1) / 2 * (height - 1)
        left = math.floor(ix + 0.5) - (size - 1) // 2
        top = math.floor(iy + 0.5) - (size - 1) // 2
        total, sums = 0.0, [0.0] * channels
        for j, i in itertools.product(range(size), range(size)):
            px, py = left + i, top + j
            if not border and not (0 <= px < width and 0 <= py < height):
                continue
            w = (phi((px + 0.5 - ix) / std) - phi((px - 0.5 - ix) / std)) * (
                phi((py + 0.5 - iy) / std) - phi((py - 0.5 - iy) / std)
            )
            total += w
            for c in range(channels):
                sums[c] += w * image[b, c, min(max(py, 0), height - 1), min(max(px, 0), width - 1)].item()
        if total > 0:
            out[b, :, y, x] = torch.tensor([s / total for s in sums], dtype=torch.float64)
    return out


@each_backend
@pytest.mark.parametrize("std", [0.25, 0.45, 0.95])
def test_the_released_program(std, backend):
    """3 x 3 taps, integrated, divided by what lies inside; and with its border mode, which divides by the window."""
    image, flow = random(2, 2, 5, 7), 0.5 * random(2, 2, 5, 7)
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in (5, 7)), indexing="ij")
    grid = torch.stack([x, y], -1) - flow.movedim(1, -1)
    options = {"support": 3, "units": "normalized", "align_corners": True, "backend": backend}
    actual = gaussian_warp(image, flow, std**2, normalize="inside", **options)
    # Where hardly any mass is inside, its Phi has lost the digits in which ours is exact.
    torch.testing.assert_close(actual, released(image, grid, std, 3, False), rtol=1e-9, atol=1e-9)
    for normalize in ("window", "inside"):
        actual = gaussian_warp(image, flow, std**2, normalize=normalize, padding_mode="border", **options)
        torch.testing.assert_close(actual, released(image, grid, std, 3, True), rtol=1e-12, atol=1e-12)


@each_backend
@pytest.mark.parametrize(
    ("flow", "variance", "bound"),
    [
        *(((f, v, b) for f in [(0.0,), (1.3,), (-0.5, 2.2), (3.0, 0.25)] for v, b in [(0.9, 1e-5), (3.0, 1e-10)])),
        ((0.6, -1.1, 0.5), 0.9, 1e-5),
    ],
    ids=str,
)
def test_a_blob_moves_and_spreads_as_the_heat_equation_says(flow, variance, bound, backend):
    """A blob of variance 3 moved by a constant flow becomes one of variance 3 + v, at its place plus the flow."""
    sizes = [(61,), (51, 47), (23, 23, 23)][len(flow) - 1]
    support = 2 * math.ceil(7 * math.sqrt(variance)) - 1
    centre = [(n - 1) / 2 - 0.3 for n in sizes]
    actual = gaussian_warp(
        blob(centre, 3.0, sizes), uniform(flow, sizes), variance, form="density", normalize="none", support=support,
        backend=backend,
    )  # fmt: skip
    expected = blob([c + f for c, f in zip(centre, reversed(flow), strict=True)], 3 + variance, sizes)
    inner = (..., *(slice(8, -8) for _ in sizes))
    difference = (actual - expected)[inner].abs().max().item()
    assert difference <= bound * expected.max().item()


@each_backend
def test_diffusion_variance(backend):
    """Two steps of D dt spread a blob as much as one of twice the time."""
    sizes = (51,)
    assert diffusion_variance(0.45) == 0.9
    assert diffusion_variance(0.25, 4) == 2
    assert diffusion_variance(torch.tensor([0.5]), 3).tolist() == [3.0]
    image, flow = blob((20.0,), 4.0, sizes), uniform((1.25,), sizes)
    options = {"form": "density", "normalize": "none", "tolerance": 1e-14, "backend": backend}
    twice = gaussian_warp_rollout(image, torch.stack([flow, flow], 1), diffusion_variance(0.75, 2.0), **options)[:, 1]
    once = gaussian_warp(image, 2 * flow, diffusion_variance(0.75, 4.0), **options)
    # Sums over pixels stand for integrals: off by exp(-2 pi^2 v), with variances that add up, and by the tolerance.
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-11)


@each_backend
@each_form
@pytest.mark.parametrize("support", [None, 1, 2, 3, 6])
@pytest.mark.parametrize("variance", [0.0, 1e-30, 0.01, 0.2, 2.0])
def test_constants(variance, support, form, backend):
    """Stay what they are, to rounding, wherever the padding continues them; and inside of zeros."""
    for sizes in ((15,), (6, 9)):
        flow, image = 6 * random(1, len(sizes), *sizes), torch.full((1, 1, *sizes), 3.0, dtype=torch.float64)
        options = {"form": form, "support": support, "backend": backend}
        for padding_mode, normalize in itertools.product(PADDING_MODES[1:], NORMALIZE[1:]):
            actual = gaussian_warp(image, flow, variance, padding_mode=padding_mode, normalize=normalize, **options)
            torch.testing.assert_close(actual, image, rtol=1e-14, atol=0)
        inside = gaussian_warp(image, flow.clamp(-0.4, 0.4), variance, normalize="inside", **options)
        torch.testing.assert_close(inside, image, rtol=1e-14, atol=0)
        at_borders = gaussian_warp(image, flow, variance, normalize="inside", **options)
        assert ((at_borders == 0) | ((at_borders - 3).abs() < 1e-13)).all()
        assert (at_borders == 0).any()
        assert (at_borders > 0).any()


@each_backend
def test_constants_inside_of_zeros(backend):
    image = torch.ones(1, 1, 40, dtype=torch.float64)
    actual = gaussian_warp(image, uniform((0.3,), (40,)), 0.9, backend=backend)
    torch.testing.assert_close(actual[..., 6:-6], image[..., 6:-6], rtol=1e-14, atol=0)
    assert actual[..., 0].item() < 0.7


@each_backend
@each_form
@pytest.mark.parametrize("flow", [(0.0,), (-37.3,), (0.5, 2.25), (3.3, -0.1, 8.8)], ids=str)
def test_mass_in_a_periodic_image(flow, form, backend):
    """A constant flow takes every pixel as often as any other."""
    sizes = [(13,), (7, 10), (4, 5, 3)][len(flow) - 1]
    image = random(2, 2, *sizes).square()
    moved = uniform(flow, sizes).expand(2, -1, *sizes)
    actual = gaussian_warp(image, moved, 0.6, form=form, padding_mode="periodic", backend=backend)
    dims = list(range(2, 2 + len(sizes)))
    torch.testing.assert_close(actual.sum(dims), image.sum(dims), rtol=1e-13, atol=0)
    raw = gaussian_warp(
        image, moved, 0.6, form="integrated", normalize="none", padding_mode="periodic", tolerance=1e-14,
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(raw.sum(dims), image.sum(dims), rtol=1e-13, atol=0)


@each_backend
@each_form
@pytest.mark.parametrize("support", [None, 1, 3, 5])
def test_small_variances_are_the_nearest_pixel(support, form, backend):
    image, flow = random(1, 2, 8, 9), 3 * random(1, 2, 8, 9)
    x = torch.arange(9) - flow[:, 0]
    y = torch.arange(8)[:, None] - flow[:, 1]
    far = ((x - x.round()).abs() < 0.45) & ((y - y.round()).abs() < 0.45)  # from the middle between pixels
    i, j = x.round().long().clamp(0, 8), y.round().long().clamp(0, 7)
    expected = image[0][:, j[0], i[0]][None]
    zero = gaussian_warp(image, flow, 0.0, form=form, support=support, padding_mode="border", backend=backend)
    assert torch.equal(zero, expected)
    for variance in (1e-6, 1e-30, 5e-324):
        small = gaussian_warp(image, flow, variance, form=form, support=support, padding_mode="border", backend=backend)
        torch.testing.assert_close(small[..., far[0]], expected[..., far[0]], rtol=1e-14, atol=0)


@each_backend
@each_form
@each_padding_mode
@each_normalize
def test_without_motion_and_diffusion_nothing_changes(normalize, padding_mode, form, backend):
    for sizes in ((7,), (4, 5), (2, 3, 4)):
        image = random(2, 2, *sizes)
        flow = torch.zeros(2, len(sizes), *sizes, dtype=torch.float64)
        options = {"form": form, "normalize": normalize, "padding_mode": padding_mode, "backend": backend}
        for variance in (0.0, 1e-4):
            if form == "density" and normalize == "none" and variance > 0:
                continue
            assert torch.equal(gaussian_warp(image, flow, variance, **options), image)
            assert torch.equal(gaussian_warp(image, flow, variance, support=3, **options), image)
        assert torch.equal(bilinear_warp(image, flow, padding_mode=padding_mode, backend=backend), image)


def moved_point(flow: Tensor, indexing: str, backend: str, **options) -> list[tuple[int, ...]]:
    """Where a point in the middle of an image goes, with each warp."""
    image = torch.zeros(1, 1, *flow.shape[2:], dtype=torch.float64)
    image[(0, 0, *(n // 2 for n in flow.shape[2:]))] = 1
    warps = [
        bilinear_warp(image, flow, indexing=indexing, backend=backend, **options),
        gaussian_warp(image, flow, 0.01, indexing=indexing, backend=backend, **options),
    ]
    return [tuple((w[0, 0] > 0.99).nonzero()[0].tolist()) for w in warps]


@each_backend
def test_what_is_shown_moves_along_the_flow(backend):
    """With "xy", channel 0 is along the last axis; with "ij" along the first."""
    along = uniform((2.0, 1.0, -1.0), (7, 7, 7))
    assert moved_point(along, "xy", backend) == [(2, 4, 5)] * 2
    assert moved_point(along, "ij", backend) == [(5, 4, 2)] * 2
    assert moved_point(along[:, :2, 0], "xy", backend) == [(4, 5)] * 2
    assert moved_point(along[:, :2, 0], "ij", backend) == [(5, 4)] * 2
    assert (
        moved_point(along[:, :1, 0, 0], "xy", backend) == moved_point(along[:, :1, 0, 0], "ij", backend) == [(5,)] * 2
    )


@each_backend
@pytest.mark.parametrize("align_corners", [False, True])
def test_normalized_units(align_corners, backend):
    """From -1 to 1 it is the whole image: its outermost pixels' centres if corners are aligned, else their edges."""
    sizes = (5, 9)
    image, pixels = random(1, 2, *sizes), 2 * random(1, 2, *sizes)
    lengths = torch.tensor([n - 1 if align_corners else n for n in reversed(sizes)], dtype=torch.float64)
    flow = pixels * 2 / lengths.view(2, 1, 1)
    options = {"units": "normalized", "align_corners": align_corners, "backend": backend}
    expected = gaussian_warp(image, pixels, 0.5, backend=backend)
    # The flow is rounded on its way to the other units and back.
    torch.testing.assert_close(gaussian_warp(image, flow, 0.5, **options), expected, rtol=1e-11, atol=1e-12)
    swapped = gaussian_warp(image, flow.flip(1), 0.5, indexing="ij", **options)
    torch.testing.assert_close(swapped, expected, rtol=1e-11, atol=1e-12)
    expected = bilinear_warp(image, pixels, backend=backend)
    torch.testing.assert_close(bilinear_warp(image, flow, **options), expected, rtol=1e-11, atol=1e-12)


@each_backend
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 6), (7, 5), (3, 4, 5)], ids=str)
def test_bilinear_warp_is_grid_sample(sizes, padding_mode, backend):
    """Values and gradients."""
    for scale in (0.4, 3.0, 30.0):
        image = random(2, 3, *sizes).requires_grad_()
        flow = (scale * random(2, len(sizes), *sizes)).requires_grad_()
        axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in sizes), indexing="ij")
        where = torch.stack(axes[::-1], -1) - flow.movedim(1, -1)
        grid = (2 * where + 1) / torch.tensor(sizes[::-1]) - 1
        expected = torch.nn.functional.grid_sample(image, grid, padding_mode=padding_mode, align_corners=False)
        actual = bilinear_warp(image, flow, padding_mode=padding_mode, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        grads = random(*actual.shape, seed=1)
        pair = [torch.autograd.grad(out, (image, flow), grads) for out in (actual, expected)]
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-11)


@each_backend
def test_bilinear_warp_of_periodic_and_linear_images(backend):
    image, flow = random(2, 2, 5, 6), 7 * random(2, 2, 5, 6)
    nine = image.repeat(1, 1, 9, 9)
    middle = (..., slice(20, 25), slice(24, 30))
    wide = torch.zeros(2, 2, 45, 54, dtype=torch.float64)
    wide[middle] = flow.clamp(-19, 19)
    expected = bilinear_warp(nine, wide, backend=backend)[middle]
    actual = bilinear_warp(image, flow.clamp(-19, 19), padding_mode="periodic", backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    x = torch.arange(20, dtype=torch.float64)
    ramp = bilinear_warp(x.view(1, 1, 20), uniform((2.3,), (20,)), padding_mode="border", backend=backend)
    torch.testing.assert_close(ramp[0, 0, 3:], x[3:] - 2.3)
    assert ramp[0, 0, 0].item() == 0


def sweep(step: int) -> Tensor:
    """Flows (B, 1, 1): from -4 to 9 in fine steps, and to both sides of every half, where windows move on."""
    even = torch.arange(-4 * step, 9 * step, dtype=torch.float64) / step
    halves = torch.arange(-8, 19, dtype=torch.float64) / 2
    return torch.cat([even, halves - 1e-9, halves + 1e-9]).sort().values.view(-1, 1, 1)


@each_backend
@each_form
@each_normalize
@pytest.mark.parametrize("padding_mode", ["zeros", "reflection"])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-7])
def test_jumps_are_below_the_tolerance(tolerance, padding_mode, normalize, form, backend):
    """Where the window moves on; an image of black and white pixels, which lets a tap that leaves weigh most."""
    for variance in (0.05, 0.2, 0.9, 3.0):
        if form == "density" and normalize == "none" and variance < 0.2:
            continue  # weights are up to 2.5 times the mass
        flow = sweep(1)
        count = len(flow)
        image = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64).expand(count, 1, 9)
        for values in (variance, torch.full((1, 1, 9), variance, dtype=torch.float64)):
            options = {"padding_mode": padding_mode, "form": form, "tolerance": tolerance, "backend": backend}
            flows = flow.expand(count, 1, 9)
            out = gaussian_warp(image, flows, values, normalize=normalize, **options)
            mass = gaussian_warp(torch.ones_like(image), flows, values, normalize="none", **options)
            inside = mass.clamp(max=1) >= (0.1 if normalize == "inside" and padding_mode == "zeros" else 0)
            both = inside[1:] & inside[:-1]
            close = (flow[1:] - flow[:-1]).abs() < 3e-9
            jumps = ((out[1:] - out[:-1]).abs() * both * close).max().item()
            assert jumps <= 1.001 * tolerance + 5e-8, (variance, jumps / tolerance)


@each_backend
@each_form
@each_normalize
def test_jumps_where_the_variance_varies(normalize, form, backend):
    """A pixel's window is as wide as its own variance asks for, and grows by a pixel at a time."""
    variance = torch.linspace(0.3, 4, 2001, dtype=torch.float64).view(-1, 1, 1)
    image = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    images, flow = image.expand(len(variance), 1, 9), torch.full((len(variance), 1, 9), 0.45, dtype=torch.float64)
    options = {"form": form, "normalize": normalize, "backend": backend}
    for tolerance in (1e-2, 1e-3):
        out = gaussian_warp(images, flow, variance.expand(-1, 1, 9), tolerance=tolerance, **options)
        exact = gaussian_warp(images, flow, variance.expand(-1, 1, 9), tolerance=1e-15, **options)
        jumps = ((out[1:] - out[:-1]) - (exact[1:] - exact[:-1])).abs()
        assert jumps.max().item() <= tolerance
        assert jumps.max().item() > tolerance / 1000  # there are some
        # and each pixel alone has the window that it has among others
        alone = gaussian_warp(images[700:701], flow[:1], variance[700].item(), tolerance=tolerance, **options)
        torch.testing.assert_close(out[700:701], alone, rtol=1e-12, atol=1e-13)


@each_backend
def test_max_support(backend):
    image, flow = random(1, 1, 20, 20), random(1, 2, 20, 20)
    for most, same in ((1, 1), (4, 3), (9, 9), (10, 9), (255, 15)):
        expected = gaussian_warp(image, flow, 3.0, support=same, backend=backend)
        actual = gaussian_warp(image, flow, 3.0, max_support=most, backend=backend)
        if same == 1:
            expected = gaussian_warp(image, flow, 0.0, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
