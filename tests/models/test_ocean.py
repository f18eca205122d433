"""The simulated ocean: solutions that are known, what is conserved, and the motion that goes with the images."""

import itertools
import math

import pytest
import torch

import pykernels
from pykernels.data.ocean import LONGEST_STEP, Current, advect_diffuse, simulate

SIZE = 32
SMOOTH = 15.0  # the variance of a blob without waves that the solver cuts off


def current(size: int = SIZE, vortices: int = 4, drift: tuple[float, float] = (0.0, 0.0), speed: float = 1) -> Current:
    """Two squares with vortices that reach over their borders."""
    random = torch.Generator().manual_seed(3)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(2, vortices, *shape, dtype=torch.float64, generator=random)

    return Current(
        centres=uniform(0, size, 2),
        travel=uniform(-1, 1, 2),
        radii=uniform(size / 12, size / 6),
        strengths=speed * uniform(1, 2) * torch.tensor([1, -1]).repeat(2)[:vortices],
        drift=torch.tensor([drift, drift], dtype=torch.float64),
        size=size,
    )


def solve(first: torch.Tensor, flow: Current, diffusivity: float, frames: int, steps: int) -> torch.Tensor:
    return torch.stack([state for state, _ in advect_diffuse(first, flow, diffusivity, frames, steps)], 1)


def blob(centre: tuple[float, float], variance: float, size: int = SIZE) -> torch.Tensor:
    """A Gaussian of mass 1 on two periodic squares, its centre given as x and y."""
    axes = []
    for c in centre:
        offset = torch.arange(size, dtype=torch.float64) - c
        copies = offset + size * torch.arange(-3, 4, dtype=torch.float64).unsqueeze(-1)
        axes.append(torch.exp(-(copies**2) / (2 * variance)).sum(0) / math.sqrt(2 * math.pi * variance))
    return (axes[1].unsqueeze(-1) * axes[0]).expand(2, size, size)


def divergence(flow: torch.Tensor) -> torch.Tensor:
    """Of (..., 2, H, W) on a periodic square, with the derivatives of its Fourier series."""
    size = flow.shape[-1]
    wave = 2j * math.pi * torch.fft.fftfreq(size, dtype=torch.float64)
    wave[size // 2] = 0  # of this one the derivative vanishes at the pixels
    series = torch.fft.fft2(flow.double())
    return torch.fft.ifft2(wave * series[..., 0, :, :] + wave.unsqueeze(-1) * series[..., 1, :, :]).real


def test_mass_is_conserved():
    first = blob((3.0, 20.0), 6.0) + 0.3
    states = solve(first, current(drift=(0.3, -0.7)), 0.45, frames=5, steps=6)
    mass = states.sum((-2, -1))
    torch.testing.assert_close(mass, mass[:, :1].expand_as(mass), rtol=1e-13, atol=0)
    torch.testing.assert_close(mass[:, 0], first.sum((-2, -1)), rtol=1e-13, atol=0)


def test_a_constant_stays():
    states = solve(torch.full((2, SIZE, SIZE), 1.5, dtype=torch.float64), current(), 0.45, frames=3, steps=6)
    torch.testing.assert_close(states, torch.full_like(states, 1.5), rtol=1e-10, atol=0)


def test_diffusion_of_a_wave():
    y, x = torch.meshgrid(*[2 * math.pi * torch.arange(SIZE, dtype=torch.float64) / SIZE] * 2, indexing="ij")
    first = torch.stack([torch.cos(3 * x - 2 * y), torch.sin(5 * y)])
    decay = torch.tensor([3**2 + 2**2, 5**2], dtype=torch.float64) * (2 * math.pi / SIZE) ** 2 * 0.45
    states = solve(first, current(vortices=0), 0.45, frames=4, steps=1)
    for t in range(4):
        torch.testing.assert_close(states[:, t], first * torch.exp(-decay * t)[:, None, None], rtol=0, atol=1e-13)


def test_translation_is_exact():
    first = blob((7.0, 11.0), SMOOTH)
    whole = solve(first, current(vortices=0, drift=(3.0, -2.0)), 0.0, frames=3, steps=2)
    torch.testing.assert_close(whole[:, 2], first.roll((-4, 6), (1, 2)), rtol=0, atol=1e-13)
    part = solve(first, current(vortices=0, drift=(0.37, -1.21)), 0.0, frames=3, steps=1)
    torch.testing.assert_close(part[:, 2], blob((7.74, 8.58), SMOOTH), rtol=0, atol=1e-13)


@pytest.mark.parametrize("diffusivity", [0.45, 1.5])
def test_blob_in_a_constant_flow_is_the_heat_kernel(diffusivity):
    """And what the warp computes, as exactly as a sum over pixels stands for an integral."""
    flow, variance, first = (1.3, -0.6), 2 * diffusivity, blob((14.2, 17.9), SMOOTH)
    states = solve(first, current(vortices=0, drift=flow), diffusivity, frames=4, steps=3)
    for t in range(4):
        centre = (14.2 + t * flow[0], 17.9 + t * flow[1])
        torch.testing.assert_close(states[:, t], blob(centre, SMOOTH + t * variance), rtol=0, atol=1e-13)
    displacement = torch.tensor(flow, dtype=torch.float64).view(1, 2, 1, 1).expand(2, 2, SIZE, SIZE)
    warped = pykernels.gaussian_warp(
        states[:, :1],
        displacement,
        variance,
        form="density",
        normalize="none",
        padding_mode="periodic",
        tolerance=1e-13,
        backend="reference",
    )
    torch.testing.assert_close(
        warped[:, 0], states[:, 1], rtol=0, atol=(1e-5 if diffusivity < 1 else 1e-10) * states.max().item()
    )


def test_velocity_is_that_of_the_stream_function():
    vortices = current()
    x, y, time = 9.0, 30.0, 1.5
    point = torch.tensor([x, y], dtype=torch.float64, requires_grad=True)
    offset = point - vortices.centres[0] - time * vortices.travel[0]
    copies = torch.cartesian_prod(*[SIZE * torch.arange(-3, 4, dtype=torch.float64)] * 2)
    squares = (offset.unsqueeze(1) + copies).square().sum(-1)
    radii = vortices.radii[0]
    stream = (vortices.strengths[0] * radii * torch.exp(-squares / (2 * radii.unsqueeze(-1) ** 2)).sum(1)).sum()
    (slope,) = torch.autograd.grad(stream, point)
    expected = torch.stack([slope[1], -slope[0]])
    torch.testing.assert_close(vortices.velocity(time)[0, :, int(y), int(x)], expected, rtol=1e-10, atol=1e-12)


def test_currents_have_no_divergence():
    velocity = current(64).velocity(0.7)
    assert velocity.abs().max() > 0.5
    assert divergence(velocity).abs().max() < 1e-9
    ocean = simulate(3, 3)
    assert ocean.flow.abs().max() > 1
    assert divergence(ocean.flow).abs().max() < 1e-5  # of float32
    # In a tile that is cut out, by differences of neighbours: theirs is an error of second order.
    tile = simulate(3, 3, periodic=False).flow
    along_x = (tile[:, :, 0, 1:-1, 2:] - tile[:, :, 0, 1:-1, :-2]) / 2
    along_y = (tile[:, :, 1, 2:, 1:-1] - tile[:, :, 1, :-2, 1:-1]) / 2
    assert (along_x + along_y).square().mean() < 1e-3 * along_x.square().mean()


def test_order_of_convergence():
    first = blob((12.0, 16.0), 10.0)
    flow = current(drift=(0.5, 0.2))
    exact, *coarse = (solve(first, flow, 0.45, frames=3, steps=steps)[:, -1] for steps in (64, 4, 8, 16))
    errors = [(state - exact).abs().max().item() for state in coarse]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(3.7 < slope < 4.5 for slope in slopes), (errors, slopes)


def test_steps_are_short_enough():
    """Twice the steps change nothing that float32 shows."""
    fast = current(64, speed=3.0)
    largest = max(fast.velocity(t).norm(dim=1).max().item() for t in (0.0, 1.0, 2.0))
    steps = math.ceil(largest / LONGEST_STEP)
    first = blob((20.0, 40.0), 9.0, 64)
    used, finer = (solve(first, fast, 0.45, frames=3, steps=n)[:, -1] for n in (steps, 2 * steps))
    assert (used - finer).abs().max() < 1e-5 * first.max()


@pytest.mark.parametrize("periodic", [True, False])
def test_flow_is_the_displacement_of_the_next_frame(periodic):
    ocean = simulate(6, 5, diffusivity=0.45, periodic=periodic)
    before, after = ocean.images[:, :-1].flatten(0, 1), ocean.images[:, 1:].flatten(0, 1)
    flow = ocean.flow.flatten(0, 1)

    def error(flow: torch.Tensor) -> float:
        options = {"form": "density", "padding_mode": "periodic" if periodic else "border", "backend": "reference"}
        warped = pykernels.gaussian_warp(before.unsqueeze(1), flow, ocean.variance, **options).squeeze(1)
        inside = (..., slice(6, -6), slice(6, -6))  # of an open border nobody knows what comes in
        return (warped - after)[inside].square().mean().item()

    persistence = (before - after).square().mean().item()
    assert error(flow) < persistence / 100
    assert error(-flow) > persistence
    assert error(flow.flip(1)) > 20 * error(flow)  # x and y exchanged
    assert error(0.5 * flow) > 20 * error(flow)  # in half pixels, as it were


def test_shapes_and_standardisation():
    ocean = simulate(3, 4, 20, diffusivity=0.1)
    assert ocean.images.shape == (3, 4, 20, 20)
    assert ocean.flow.shape == (3, 3, 2, 20, 20)
    assert ocean.images.dtype == ocean.flow.dtype == torch.float32
    assert (ocean.diffusivity, ocean.variance, ocean.periodic) == (0.1, 0.2, True)
    assert abs(ocean.images.double().mean().item()) < 1e-6
    assert ocean.images.double().std(correction=0).item() == pytest.approx(1, abs=1e-6)
    mass = ocean.images.double().mean((-2, -1)) * ocean.deviation + ocean.mean
    torch.testing.assert_close(mass, mass[:, :1].expand_as(mass), rtol=0, atol=1e-6)


def test_speed_is_kept():
    for periodic in (True, False):
        fastest = simulate(8, 6, speed=2.0, periodic=periodic).flow.norm(dim=2).amax((1, 2, 3))
        assert (fastest <= 2.0 * 1.01).all()
        assert fastest.max() > 1.0
    drift = simulate(2, 3, vortices=0).flow
    assert (drift == drift[:, :1, :, :1, :1]).all()
    assert drift.abs().max() > 0
    still = simulate(2, 3, speed=0)
    assert (still.flow == 0).all()
    assert still.images.var((-2, -1)).diff(dim=1).max() < 0


def test_numbers_follow_from_the_seed():
    ocean, again, other = simulate(5, 3, seed=7), simulate(5, 3, seed=7), simulate(5, 3, seed=8)
    assert torch.equal(ocean.images, again.images)
    assert torch.equal(ocean.flow, again.flow)
    assert not torch.isclose(ocean.images, other.images).all(-1).any()
    fewer = simulate(2, 3, seed=7)
    assert torch.equal(fewer.flow, ocean.flow[:2])
    temperatures = [data.images[:2] * data.deviation + data.mean for data in (fewer, ocean)]
    torch.testing.assert_close(*temperatures, rtol=0, atol=1e-5)
    for batch_size in (1, 2):
        same = simulate(5, 3, seed=7, batch_size=batch_size)
        torch.testing.assert_close(same.flow, ocean.flow, rtol=0, atol=1e-6)
        torch.testing.assert_close(same.images, ocean.images, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": 0}, "sequences must be an integer of at least 1, got 0"),
        ({"frames": 1}, "frames must be an integer of at least 2, got 1"),
        ({"size": 15}, "size must be an integer of at least 16, got 15"),
        ({"size": 64.0}, "size must be an integer of at least 16, got 64.0"),
        ({"vortices": -1}, "vortices must be an integer of at least 0, got -1"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"batch_size": True}, "batch_size must be an integer of at least 1, got True"),
        ({"diffusivity": -0.1}, "diffusivity must be a number that is not negative, got -0.1"),
        ({"diffusivity": math.nan}, "diffusivity must be a number that is not negative, got nan"),
        ({"speed": math.inf}, "speed must be a number that is not negative, got inf"),
        ({"speed": "fast"}, "speed must be a number that is not negative, got 'fast'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        simulate(**options)
