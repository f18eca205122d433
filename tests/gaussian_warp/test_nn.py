"""The layers of the family."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch

from pykernels import bilinear_warp, diffusion_variance, gaussian_warp, gaussian_warp_rollout
from pykernels.nn import GaussianWarp, SemiLagrangian

# torch itself still uses torch.jit in inductor.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
METHODS = {"euler": 1, "midpoint": 2, "rk4": 4}
SIZES = [(9,), (5, 6), (4, 3, 5)]
each_size = pytest.mark.parametrize("sizes", SIZES, ids=str)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


@each_size
def test_gaussian_warp_is_the_function(sizes):
    image, flow = random(2, 3, *sizes), random(2, len(sizes), *sizes)
    options = {"form": "density", "normalize": "inside", "padding_mode": "zeros", "tolerance": 1e-6, "indexing": "ij"}
    layer = GaussianWarp(0.7, **options)
    assert torch.equal(layer(image, flow), gaussian_warp(image, flow, 0.7, **options))
    flows = torch.stack([flow, -flow], 1)
    assert torch.equal(layer.rollout(image, flows), gaussian_warp_rollout(image, flows, 0.7, **options))
    assert layer.state_dict() == {}
    assert layer.variance == 0.7
    assert layer.diffusivity == 0.35


def test_learned_variance():
    """Starts where it was put, stays positive under steps that a variance itself would not survive, and is saved."""
    image, flow = random(2, 1, 16, 16), random(2, 2, 16, 16)
    layer = GaussianWarp(diffusivity=0.25, dt=2.0, learnable=True, padding_mode="border", dtype=torch.float64)
    assert layer.variance.item() == pytest.approx(diffusion_variance(0.25, 2.0))
    assert layer.diffusivity.item() == pytest.approx(0.25)
    expected = gaussian_warp(image, flow, 1.0, padding_mode="border")
    torch.testing.assert_close(layer(image, flow), expected, rtol=0, atol=2e-4)  # of windows that fit a tensor
    optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
    for _ in range(3):
        optimizer.zero_grad()
        layer(image, flow).square().mean().neg().backward()
        optimizer.step()
    assert 0 < layer.variance.item() < 1
    other = GaussianWarp(3.0, learnable=True, padding_mode="border", dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert list(layer.state_dict()) == ["log_variance"]
    assert torch.equal(other(image, flow), layer(image, flow))
    assert torch.equal(copy.deepcopy(layer)(image, flow), layer(image, flow))
    assert layer.float().log_variance.dtype == torch.float32


def test_a_learned_variance_finds_the_diffusion():
    """Of images that were made with another one."""
    image, flow = random(4, 1, 24, 24), random(4, 2, 24, 24)
    target = gaussian_warp(image, flow, 0.6, padding_mode="periodic")
    layer = GaussianWarp(2.0, learnable=True, padding_mode="periodic")
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(80):
        optimizer.zero_grad()
        (layer(image, flow) - target).square().mean().backward()
        optimizer.step()
    assert layer.variance.item() == pytest.approx(0.6, rel=0.02)


def test_what_is_printed():
    assert repr(GaussianWarp(0.5)) == "GaussianWarp(variance=0.5)"
    layer = GaussianWarp(0.5, learnable=True, padding_mode="border", units="normalized", align_corners=True)
    expected = "variance=0.5, learnable=True, padding_mode='border', units='normalized', align_corners=True"
    assert repr(layer) == f"GaussianWarp({expected})"
    assert repr(GaussianWarp(diffusivity=1.0, dt=0.5)) == "GaussianWarp(variance=1, dt=0.5)"
    assert repr(GaussianWarp(0.5, learnable=True, device="meta")) == "GaussianWarp(learnable=True)"
    assert repr(SemiLagrangian()) == (
        "SemiLagrangian(method='rk4', kernel='bilinear', dt=1, steps=1, padding_mode='zeros')"
    )
    assert "variance=0.5" in repr(SemiLagrangian(kernel="gaussian", variance=0.5))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "one of variance and diffusivity must be given, got None and None", {}),
        (ValueError, "one of variance and diffusivity", {"variance": 1.0, "diffusivity": 1.0}),
        (TypeError, "variance must be a number, got Tensor; learnable=True", {"variance": torch.tensor(1.0)}),
        (ValueError, "variance must be at least 0 and finite, got -1.0", {"variance": -1.0}),
        (ValueError, "diffusivity must be positive and finite, got 0.0", {"diffusivity": 0.0, "learnable": True}),
        (ValueError, "dt must be positive and finite, got 0", {"diffusivity": 1.0, "dt": 0}),
        (ValueError, "padding_mode must be one of", {"variance": 1.0, "padding_mode": "circular"}),
        (ValueError, "align_corners", {"variance": 1.0, "units": "normalized"}),
        (TypeError, "support must be an int", {"variance": 1.0, "support": 3.0}),
    ],
)
def test_gaussian_warp_refuses(error, message, arguments):
    """When it is made."""
    with pytest.raises(error, match=message):
        GaussianWarp(**arguments)


def rotation(size: int, angle: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The velocity of a solid rotation by an angle per unit of time, and the exact displacement after one."""
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(x, x, indexing="ij")
    c, s = math.cos(angle), math.sin(angle)
    exact = torch.stack([x - (c * x + s * y), y - (c * y - s * x)])[None]
    return angle * torch.stack([-y, x])[None], exact


@pytest.mark.parametrize("steady", [True, False])
@pytest.mark.parametrize(("method", "order"), METHODS.items())
def test_order_of_the_way_back(method, order, steady):
    """Linear interpolation of a rotation is exact, in time as well: what is left is the error of the method."""
    velocity, exact = rotation(129, 0.8)
    inside = (slice(None), slice(None), slice(32, 97), slice(32, 97))  # whose paths stay in the image
    velocities = [velocity] if steady else [0.4 * velocity, velocity, 1.6 * velocity]
    errors = [
        (SemiLagrangian(method, steps=n)._displacement(velocities) - exact)[inside].abs().max().log2().item()
        for n in (4, 8, 16, 32)
    ]
    slopes = [before - after for before, after in pairwise(errors)]
    assert slopes == pytest.approx([order] * 3, abs=0.15)


@each_size
def test_what_is_read_where(sizes):
    """The field at the displacement, whether the velocity is steady or given at several times."""
    field, velocity = random(2, 3, *sizes), random(2, len(sizes), *sizes)
    layer = SemiLagrangian("midpoint", dt=0.5, padding_mode="reflection")
    half = bilinear_warp(velocity, 0.25 * velocity, padding_mode="border")
    torch.testing.assert_close(layer.displacement(velocity), 0.5 * half)
    expected = bilinear_warp(field, 0.5 * half, padding_mode="reflection")
    torch.testing.assert_close(layer(field, velocity), expected)
    torch.testing.assert_close(layer(field, torch.stack([velocity] * 4, 1)), expected)
    # Only what the velocity is in the middle of the step, and at its end, counts.
    times = torch.stack([torch.full_like(velocity, torch.nan), velocity, velocity], 1)
    torch.testing.assert_close(layer(field, times), expected)


@each_size
@pytest.mark.parametrize("method", METHODS)
def test_a_constant_velocity_is_exact(sizes, method):
    """Whole pixels: the field is shifted by dt times the velocity, along it, whatever the number of steps."""
    field = random(2, 3, *sizes)
    shift = (2, -1, 1)[: len(sizes)]
    velocity = torch.tensor(shift[::-1], dtype=torch.float64).view(1, -1, *[1] * len(sizes)) / 0.5
    velocity = velocity.expand(2, -1, *sizes)
    layer = SemiLagrangian(method, dt=0.5, padding_mode="periodic", steps=2)
    dims = tuple(range(2, 2 + len(sizes)))
    torch.testing.assert_close(layer(field, velocity), field.roll(shift, dims), rtol=0, atol=1e-12)
    back = SemiLagrangian(method, dt=-0.5, padding_mode="periodic")
    torch.testing.assert_close(back(layer(field, velocity), velocity), field, rtol=0, atol=1e-12)
    flipped = SemiLagrangian(method, dt=0.5, padding_mode="periodic", indexing="ij")(field, velocity.flip(1))
    torch.testing.assert_close(flipped, layer(field, velocity), rtol=0, atol=1e-12)
    scale = torch.tensor(sizes[::-1], dtype=torch.float64).view(1, -1, *[1] * len(sizes)) / 2
    normalized = SemiLagrangian(method, dt=0.5, padding_mode="periodic", units="normalized", align_corners=False)(
        field, velocity / scale
    )
    torch.testing.assert_close(normalized, layer(field, velocity), rtol=0, atol=1e-12)


def test_the_gaussian_diffuses():
    """A blob that goes round comes back wider by the variance, and where it was."""
    size, variance = 64, 1.5
    velocity, _ = rotation(size, math.pi / 2)
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(x, x, indexing="ij")

    def blob(width, x0, y0):
        return (-((x - x0) ** 2 + (y - y0) ** 2) / (2 * width)).exp() / (2 * math.pi * width)

    layer = SemiLagrangian("rk4", kernel="gaussian", variance=variance, form="density", normalize="none",
                           tolerance=1e-12, steps=40)  # fmt: skip
    found = layer(blob(9.0, 10.0, 0.0)[None, None], velocity)
    # The velocity (-y, x) takes what is at (10, 0) to (0, 10).
    torch.testing.assert_close(found[0, 0], blob(9.0 + variance, 0.0, 10.0), rtol=0, atol=1e-7)


@each_size
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("euler", {"padding_mode": "border", "steps": 2}),
        ("midpoint", {"padding_mode": "periodic"}),
        ("rk4", {"padding_mode": "reflection"}),
        ("midpoint", {"kernel": "gaussian", "variance": 0.6, "learnable": True, "support": 4, "dtype": torch.float64}),
    ],
)
def test_gradcheck(sizes, method, options):
    """For field, velocity at three times, and variance."""
    layer = SemiLagrangian(method, dt=0.7, **options)
    field, velocity = random(1, 2, *sizes).requires_grad_(), random(1, 3, len(sizes), *sizes).requires_grad_()

    def run(field, velocity, *parameters):
        named = {name: p for (name, _), p in zip(layer.named_parameters(), parameters, strict=True)}
        return torch.func.functional_call(layer, named, (field, velocity))

    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (field, velocity, *parameters), fast_mode=True)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("layer", [GaussianWarp(0.8), SemiLagrangian("midpoint", padding_mode="border")], ids=str)
def test_compile(layer):
    torch._dynamo.reset()
    image, flow = random(2, 1, 8, 9), random(2, 2, 8, 9)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, flow), layer(image, flow))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "method must be one of 'euler', 'midpoint', 'rk4', got 'heun'", {"method": "heun"}),
        (ValueError, "kernel must be one of", {"kernel": "cubic"}),
        (TypeError, "steps must be an int, got 1.5", {"steps": 1.5}),
        (ValueError, "steps must be at least 1, got 0", {"steps": 0}),
        (TypeError, "dt must be a number, got str", {"dt": "1"}),
        (ValueError, "dt must be finite, got inf", {"dt": math.inf}),
        (ValueError, "variance=0.5 is for kernel='gaussian'", {"variance": 0.5}),
        (ValueError, "kernel='gaussian' needs a positive variance", {"kernel": "gaussian"}),
        (ValueError, "learnable=True is for kernel='gaussian'", {"learnable": True}),
        (ValueError, "padding_mode must be one of", {"padding_mode": "wrap"}),
        (ValueError, "indexing must be one of", {"indexing": "yx"}),
    ],
)
def test_semi_lagrangian_refuses(error, message, arguments):
    """When it is made."""
    with pytest.raises(error, match=message):
        SemiLagrangian(**arguments)


def test_shapes_that_semi_lagrangian_refuses():
    layer, field = SemiLagrangian(), torch.ones(2, 1, 4, 5)
    for shape in ((2, 3, 4, 5), (1, 2, 4, 5), (2, 2, 5, 4), (2, 1, 2, 4, 5), (2, 2), (2, 3, 3, 4, 5)):
        with pytest.raises(ValueError, match=r"velocity must have shape \(2, 2, 4, 5\), or \(2, 'K', 2, 4, 5\)"):
            layer(field, torch.ones(shape))
    with pytest.raises(TypeError, match="velocity must be a tensor, got float"):
        layer(field, 1.0)
    with pytest.raises(TypeError, match="field must be a tensor, got list"):
        layer([1.0], field)
