"""GAN(TK)^2: discriminators of infinite and finite width, particles and generators that follow them."""

import json
import math
from dataclasses import astuple

import numpy as np
import pytest
import torch

import pykernels
from pykernels.data import digits, eight_gaussians, image_densities
from pykernels.models import _gantk_losses as losses
from pykernels.models.gantk import (
    KERNELS,
    LOSSES,
    FiniteDiscriminator,
    Generator,
    GeneratorTraining,
    InfiniteDiscriminator,
    ParticleDescent,
    WideNetwork,
    WitnessLoss,
    descend,
    half_squared_w2,
    load_particles,
    mmd,
    sinkhorn_divergence,
)
from pykernels.models.gantk_protocols import (
    adequacy,
    descent_table,
    dirac_field,
    generator_gram,
    particle_scores,
    published_settings,
)
from pykernels.models.published import published_particles

DATA = eight_gaussians(40)
POINTS = torch.from_numpy(np.concatenate([DATA.fake, DATA.real]))
#: Of sums of 80 kernels, each below 30, in float64: a few units in the last place of what they add up to.
ROUNDING = 3e-14
TRAINED = ("relu", "relu_no_bias", "sigmoid", "relu+sin")  # those of networks that have a finite width


def weights(loss, kernel="relu", points=POINTS, n_fake=40, **options):
    discriminator = InfiniteDiscriminator(kernel, loss, **options)
    discriminator.train(points, n_fake)
    return discriminator.weights


def values(loss, points=POINTS, n_fake=40, **options):
    """f at the points that it was trained on."""
    discriminator = InfiniteDiscriminator(loss=loss, **options)
    discriminator.train(points, n_fake)
    return discriminator(points)[0]


# The data


def test_eight_gaussians():
    data = eight_gaussians(4000, seed=3)
    assert data.fake.shape == data.real.shape == (4000, 2)
    # 3.5 standard errors or more of means and covariances of 4000 points
    np.testing.assert_allclose(data.fake.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(np.cov(data.fake.T), np.eye(2), atol=0.08)
    angles = 2 * math.pi * np.arange(8) / 8
    means = 5 * np.stack([np.cos(angles), np.sin(angles)], 1)
    distances = np.linalg.norm(data.real[:, None] - means, axis=2)
    nearest = distances.argmin(1)
    assert (np.bincount(nearest, minlength=8) > 400).all()
    assert (data.real - means[nearest]).std() == pytest.approx(0.5, rel=0.03)  # 3.8 standard errors
    again = eight_gaussians(4000, seed=3)
    np.testing.assert_array_equal(again.real, data.real)
    assert again.describe() == data.describe() != eight_gaussians(4000, seed=4).describe()


def test_images_are_densities(tmp_path):
    """A dark pixel at the upper left, and a darker one at the lower right."""
    image = np.zeros((3, 5))
    image[0, 0], image[2, 4] = 1, 3
    flat = np.ones((2, 2))
    data = image_densities(image, flat, 2000, seed=1)
    upper = data.fake[:, 0] < 0
    # three standard errors or more, for 2000 points and for about 500 of them
    assert upper.mean() == pytest.approx(0.25, abs=0.03)
    np.testing.assert_allclose(data.fake[upper].mean(0), [-1, 1], atol=0.06)
    np.testing.assert_allclose(data.fake[~upper].mean(0), [1, -1], atol=0.06)
    np.testing.assert_allclose((data.fake[upper]).std(0), [1 / 5, 1 / 3], rtol=0.1)
    assert np.abs(data.real).mean() > 0.9

    pillow = pytest.importorskip("PIL.Image")
    grey = (255 - 85 * image).astype(np.uint8)
    pillow.fromarray(grey).save(tmp_path / "grey.png")
    from_file = image_densities(str(tmp_path / "grey.png"), flat, 2000, seed=1)
    np.testing.assert_array_equal(from_file.fake, data.fake)
    alpha = np.dstack([np.zeros((3, 5, 3)), np.where(image > 0, 85 * image, 0)]).astype(np.uint8)
    pillow.fromarray(alpha, "RGBA").save(tmp_path / "alpha.png")  # black, where it is not transparent
    np.testing.assert_array_equal(image_densities(tmp_path / "alpha.png", flat, 2000, seed=1).fake, data.fake)

    with pytest.raises(FileNotFoundError):
        image_densities(tmp_path / "none.png", flat)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png is no image"):
        image_densities(flat, tmp_path / "text.png")
    pillow.fromarray(np.full((3, 3), 7, np.uint8)).save(tmp_path / "even.png")
    with pytest.raises(ValueError, match="same grey everywhere"):
        image_densities(tmp_path / "even.png", flat)


def test_digits():
    pytest.importorskip("sklearn")
    data = digits(100, seed=2)
    assert data.real.shape == data.fake.shape == (100, 64)
    assert data.pixels == (8, 8)
    assert data.real.min() == -1
    assert data.real.max() == 1
    assert len(digits().real) == 1797
    with pytest.raises(ValueError, match="at most 1797"):
        digits(1798)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eight_gaussians(0), "n_points must be at least 1, got 0"),
        (lambda: eight_gaussians(std=-1), "std must be finite and not negative, got -1"),
        (lambda: eight_gaussians(radius=math.nan), "radius must be finite and not negative, got nan"),
        (lambda: image_densities(np.ones(3), np.ones((2, 2))), r"source must have shape \(H, W\)"),
        (lambda: image_densities(np.ones((2, 2)), np.zeros((2, 2))), "target must have finite values"),
        (lambda: image_densities(np.full((2, 2), -1.0), np.ones((2, 2))), "source must have finite values"),
    ],
)
def test_bad_data_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Infinitely wide discriminators


def test_ipm_is_the_difference_of_mean_kernels():
    points, n_fake = POINTS[:60], 40  # clouds of two sizes
    gram = KERNELS["relu"].kernel().gram(points)
    expected = gram[:, :40].mean(1) - gram[:, 40:].mean(1)
    torch.testing.assert_close(values("ipm", points, n_fake), expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(values("ipm", points, n_fake, time=2.5), 2.5 * expected, rtol=0, atol=ROUNDING)
    # L(f_t) = t MMD^2
    f = values("ipm", points, n_fake, time=2.5)
    squared = mmd(points[:40], points[40:])
    assert (f[:40].mean() - f[40:].mean()).item() == pytest.approx(2.5 * squared.item(), rel=ROUNDING)
    assert squared.item() == pytest.approx((expected[:40].mean() - expected[40:].mean()).item(), rel=ROUNDING)


@pytest.mark.parametrize(("n_fake", "time"), [(40, 0.3), (40, 1.0), (50, 1.0), (40, 50.0)])
def test_closed_forms_solve_the_equation(n_fake, time):
    for loss, solvers in (("ipm", ["closed"]), ("lsgan", ["lanczos", "eigenvalues"])):
        integrated = values(loss, n_fake=n_fake, time=time, solver="ode")
        for solver in solvers:
            f = values(loss, n_fake=n_fake, time=time, solver=solver)
            # The steps of the integration; 3e-7 seen.
            torch.testing.assert_close(f, integrated, rtol=0, atol=2e-6)


def test_lsgan_by_few_products_is_that_by_eigenvalues():
    for kernel in KERNELS:
        exact = weights("lsgan", kernel, solver="eigenvalues")
        # Where Lanczos stops, at rounding: 6e-15 seen.
        torch.testing.assert_close(weights("lsgan", kernel), exact, rtol=0, atol=5e-14 * exact.abs().max().item())
    gram = KERNELS["relu"].kernel().gram(POINTS)
    calls = []

    def product(v):
        calls.append(v)
        return gram @ v

    rho, gamma = losses.signs(40, 40, POINTS)
    few = losses.spectral_weights("lsgan", product, rho, gamma, 1.0)
    torch.testing.assert_close(few, weights("lsgan", solver="eigenvalues"), rtol=0, atol=3e-15)  # weights are 0.05
    assert len(calls) <= 16


def test_lsgan_between_its_limits():
    """After a short time f is 4 t T(rho), after a long one it interpolates the data."""
    gram, (rho, gamma) = KERNELS["relu"].kernel().gram(POINTS), losses.signs(40, 40, POINTS)
    # The next term of the exponential is 2e-7 times an eigenvalue; the slowest direction is still 3e-6 away.
    torch.testing.assert_close(values("lsgan", time=1e-7) / 4e-7, gram @ (gamma * rho), rtol=0, atol=1e-6)
    assert (values("lsgan", time=1e4, solver="eigenvalues") - rho).abs().max() < 2e-5
    # Without the matrix: the same from products that are computed anew.
    exact = weights("lsgan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pykernels.models._gantk_kernels.LARGEST_GRAM", 10)
        torch.testing.assert_close(weights("lsgan"), exact, rtol=0, atol=1e-15)  # 7e-17 seen of 0.05


def test_lanczos_of_few_eigenvalues_ends_early():
    matrix = torch.diag(torch.tensor([1.0, 1, 2, 2, 0, 0], dtype=torch.float64))
    start = torch.tensor([1.0, 2, 3, -1, 2, 5], dtype=torch.float64)
    calls = []
    result = losses.lanczos(lambda v: calls.append(v) or matrix @ v, start, torch.exp)
    torch.testing.assert_close(result, matrix.diagonal().exp() * start, rtol=0, atol=1e-13)  # of 22
    assert len(calls) <= 4


def test_lambert_function():
    special = pytest.importorskip("scipy.special")
    s = torch.tensor([-40.0, -3.0, -1e-9, 0.0, 1e-14, 1e-6, 0.3, 5.0, 300.0], dtype=torch.float64)
    v = losses.log_lambert(s)
    expected = special.lambertw(np.exp(1 + s.numpy())).real
    np.testing.assert_allclose(v.exp().numpy(), expected, rtol=2e-15)  # v is up to 5.7, and rounded
    np.testing.assert_allclose(v[4].item(), 0.5e-14, rtol=1e-14)  # where W itself has lost it; the next term is s / 8
    far = torch.tensor([1e8], dtype=torch.float64)
    v = losses.log_lambert(far)
    # Its exponential would overflow; v is 18.4, so rounding it moves W by 4e-16 of 1e8.
    assert (v + v.exp() - 1 - far).abs().item() < 1e-6


def test_vanilla_gan_by_the_lambert_function():
    """Exact for one eigenvalue, and close to the equation for short times."""
    gram = torch.tensor([[2.0, 0], [0, 2.0]], dtype=torch.float64)
    rho, gamma = losses.signs(1, 1, gram)
    approximate = losses.spectral_weights("vanilla", gram.__matmul__, rho, gamma, 3.0, gram=gram)
    exact = losses.ode_weights(LOSSES["vanilla"], gram.__matmul__, rho, gamma, 3.0, steps=400)
    torch.testing.assert_close(approximate, exact, rtol=2e-12, atol=0)  # the steps of the integration; 2e-13 seen

    # What is left out grows with the time; 0.4 of these bounds seen.
    for time, error in ((0.01, 1e-5), (0.1, 1e-3), (1.0, 0.1)):
        ode = values("vanilla", time=time)
        for solver in ("lanczos", "eigenvalues"):
            closed = values("vanilla", time=time, solver=solver)
            assert (closed - ode).norm() < error * ode.norm()
    rho, gamma = losses.signs(40, 40, POINTS)
    gram = KERNELS["relu"].kernel().gram(POINTS)
    # The next term is a multiple of the time.
    torch.testing.assert_close(values("vanilla", time=1e-6) / 1e-6, gram @ (gamma * rho), rtol=1e-5, atol=1e-6)


def test_hinge_is_linear_until_the_margin():
    gram, (rho, gamma) = KERNELS["relu"].kernel().gram(POINTS), losses.signs(40, 40, POINTS)
    slope = 2 * gram @ (gamma * rho)
    time = 0.9 / slope.abs().max().item()
    torch.testing.assert_close(values("hinge", time=time), time * slope, rtol=0, atol=ROUNDING)
    late = values("hinge", time=30.0)
    assert 0.9 < (rho * late).min() < 1.1


@pytest.mark.parametrize("loss", LOSSES)
def test_slopes_and_ascents_are_derivatives(loss):
    """Of the published losses, by automatic differentiation."""
    a, b, c = {
        "ipm": (lambda f: f, lambda f: f, lambda f: f),
        "lsgan": (lambda f: -((f + 1) ** 2), lambda f: (f - 1) ** 2, lambda f: f**2),
        "vanilla": (
            lambda f: torch.log(1 - f.sigmoid()),
            lambda f: -torch.log(f.sigmoid()),
            lambda f: -torch.log(f.sigmoid()),
        ),
        "hinge": (lambda f: -torch.relu(1 + f), lambda f: torch.relu(1 - f), lambda f: -f),
    }[loss]
    f = torch.linspace(-2.3, 2.4, 10, dtype=torch.float64, requires_grad=True)
    rho, gamma = losses.signs(4, 6, f.detach())
    ascended = a(f[:4]).mean() - b(f[4:]).mean()
    (gradient,) = torch.autograd.grad(ascended, f)
    for ours, published in (
        (gamma * LOSSES[loss].ascent(f.detach(), rho), gradient),
        (LOSSES[loss].cost(f), c(f)),
        (LOSSES[loss].slope(f.detach()), torch.autograd.grad(c(f).sum(), f)[0]),
    ):
        torch.testing.assert_close(ours, published, rtol=0, atol=2e-15)  # rounding of numbers up to 11


def test_gradients_are_those_of_the_values():
    for kernel in KERNELS:
        discriminator = InfiniteDiscriminator(kernel, "lsgan")
        discriminator.train(POINTS, 40)
        x, h = torch.tensor([[0.3, -1.2], [3.0, 4.0]], dtype=torch.float64), 1e-5
        gradient = discriminator(x)[1]
        for axis in range(2):
            step = h * torch.eye(2, dtype=torch.float64)[axis]
            difference = (discriminator(x + step)[0] - discriminator(x - step)[0]) / (2 * h)
            # The rounding of values of 0.1, divided by h, and h^2 times the third derivative.
            torch.testing.assert_close(gradient[:, axis], difference, rtol=0, atol=1e-10)


def test_a_kernel_of_ones_own():
    ntk = pykernels.NTK(1, "erf", bias_std=0.3)
    own = InfiniteDiscriminator(ntk, kind="nngp")
    own.train(POINTS, 40)
    gram = ntk.gram(POINTS, kind="nngp")
    torch.testing.assert_close(own(POINTS)[0], gram[:, :40].mean(1) - gram[:, 40:].mean(1), rtol=0, atol=1e-15)
    json.dumps(own.options)


# A single particle and a single target


def test_the_dirac_gan_stays_in_the_span():
    """In 512 dimensions nothing leaves the plane of the particle and the target; all of it points along the target's
    side where the two are mirrored."""
    for kernel in KERNELS:
        discriminator = InfiniteDiscriminator(kernel)
        _, directions = dirac_field(discriminator, dimension=512, n_points=4)
        assert not directions[:, 2:].any()
        assert np.isfinite(directions).all()
        assert (np.linalg.norm(directions, axis=1) > 0).any()
        random = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        discriminator.train(torch.cat([random[:1], random[1:2]]), 1)
        gradient = discriminator(random[:1])[1][0]
        basis = torch.linalg.qr(random[:2].T)[0]
        torch.testing.assert_close(basis @ (basis.T @ gradient), gradient, rtol=0, atol=2e-15)  # of 0.6
    with pytest.raises(ValueError, match="dimension must be at least 2"):
        dirac_field(discriminator, dimension=1)


def test_without_a_bias_two_clouds_look_the_same():
    """Then the kernel is homogeneous, k(y / 2, .) = k(y, .) / 2, and y / 2 is like half a point at 0 and half at y."""
    y = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    half, both = y / 2, torch.cat([torch.zeros_like(y), y])
    without = KERNELS["relu_no_bias"].kernel()
    z = POINTS[:10]
    torch.testing.assert_close(without.gram(half, z), without.gram(y, z) / 2, rtol=2e-15, atol=0)
    assert without.gram(torch.zeros_like(y), z).abs().max() < 5e-18  # no bias counts as 1e-18
    assert abs(mmd(half, both, "relu_no_bias").item()) < 1e-15
    assert mmd(half, both, "relu").item() == pytest.approx(0.2911, abs=5e-5)  # the digits that are published


# Networks of finite width


@pytest.mark.parametrize("kernel", TRAINED)
def test_networks_have_the_kernel_of_their_limit(kernel):
    x = POINTS[38:42]
    network = WideNetwork(2, kernel, width=512, antisymmetric=True, seed=5)
    assert torch.equal(network(x), torch.zeros(4, dtype=torch.float64))
    parameters = list(network.parameters())
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(f, parameters, retain_graph=True)]) for f in network(x)]
    jacobian = torch.stack(rows)
    expected = KERNELS[kernel].kernel().gram(x)
    # 3 / sqrt(width); 0.12 seen
    assert ((jacobian @ jacobian.T - expected).norm() / expected.norm()).item() < 0.15


def test_wider_networks_are_closer_to_their_limit():
    for loss in ("ipm", "lsgan"):
        figure = adequacy(loss, widths=(16, 512), n_networks=4, n_points=20)
        # By the widths' roots it would be 5.7 times; 3.5 and 0.2 seen, averages over four networks.
        assert figure.error(16) > 3 * figure.error(512)
        assert figure.error(512) < 0.3
        assert figure.infinite.shape == (20,)
        assert figure.finite[16].shape == (4, 20)


def test_finite_discriminators_follow_the_equation_in_short_steps():
    """Width 512, LSGAN, twenty steps to the time 0.2, beside the equation by Euler's method with as many."""
    points = POINTS[36:44]
    gram, (rho, gamma) = KERNELS["relu"].kernel().gram(points), losses.signs(4, 4, points)
    a = torch.zeros(8, dtype=torch.float64)
    for _ in range(20):
        a += 0.01 * gamma * LOSSES["lsgan"].ascent(gram @ a, rho)
    network = FiniteDiscriminator(2, loss="lsgan", width=512, learning_rate=0.01, n_steps=20)
    network.train(points, 4)
    # 0.09 seen, by the width
    assert ((network(points)[0] - gram @ a).norm() / (gram @ a).norm()).item() < 0.15


def test_weights_drawn_anew():
    kept, reset = (FiniteDiscriminator(2, width=16, learning_rate=0.1, reset=r, seed=1) for r in (False, True))
    first = []
    for discriminator in (kept, reset):
        discriminator.train(POINTS, 40)
        first.append(discriminator(POINTS)[0])
        discriminator.train(POINTS, 40)
    assert torch.equal(*first)
    assert kept(POINTS)[0].abs().mean() > 1.5 * first[0].abs().mean()
    second = reset(POINTS)[0]
    assert 0.3 < second.abs().mean() / first[0].abs().mean() < 3
    assert not torch.equal(second, first[0])
    # A single network, without antisymmetry, is not zero at first.
    assert WideNetwork(2, width=16, seed=1)(POINTS).abs().max() > 0.1


# Metrics


def test_distances():
    random = np.random.default_rng(0)
    x = random.standard_normal((30, 3))
    assert half_squared_w2(x, x[random.permutation(30)]) == 0
    shift = np.array([0.3, -0.2, 1.0])
    assert half_squared_w2(x, (x + shift)[::-1]) == pytest.approx(np.square(shift).sum() / 2, rel=1e-14)
    # 1e-9 is added to numbers that are rounded to 2e-16
    assert half_squared_w2(x, x + 1e-9) == pytest.approx(1.5e-18, rel=5e-7, abs=0)
    line, other = random.standard_normal((2, 50, 1))
    sorted_ = np.square(np.sort(line, 0) - np.sort(other, 0)).mean() / 2
    assert half_squared_w2(line, other) == pytest.approx(sorted_, rel=1e-14, abs=0)
    # As published, before any step.
    data = eight_gaussians(500, seed=0)
    assert 7.0 < half_squared_w2(data.fake, data.real) < 7.9


def test_sinkhorn_divergence_is_half_the_squared_distance():
    pytest.importorskip("geomloss")
    x, y = (torch.randn(25, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).numpy() for i in (0, 1))
    assert sinkhorn_divergence(x, y) == pytest.approx(half_squared_w2(x, y), rel=1e-13)  # so little is the blur
    assert abs(sinkhorn_divergence(x, x, scaling=0.8)) < 1e-15


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.ones((3, 2)), np.ones((4, 2)), "as many points"),
        (np.ones((3, 2)), np.ones((3, 1)), r"y must have shape \(N, d\)"),
        (np.ones(3), np.ones(3), r"x must have shape \(N, d\)"),
        (np.full((3, 2), np.nan), np.ones((3, 2)), "x contains NaN"),
        (np.ones((3, 2)), np.full((3, 2), np.inf), "y contains infinity"),
    ],
)
def test_distances_of_what_has_none(x, y, message):
    with pytest.raises(ValueError, match=message):
        half_squared_w2(x, y)


# Particles


def short(discriminator, **options):
    options = {"n_steps": 30, "step_size": 80.0, "evaluate_every": 10, **options}
    return ParticleDescent(DATA.fake, DATA.real, discriminator, **options)


@pytest.mark.parametrize("loss", LOSSES)
def test_particles_reach_their_target(loss):
    first = half_squared_w2(DATA.fake, DATA.real)
    descent = descend(short(InfiniteDiscriminator("relu", loss)))
    assert [step for step, _ in descent.distances] == [10, 20, 30]
    assert descent.distances[-1][1] < 0.3 * first
    assert descent.distances[-1][1] == half_squared_w2(descent.particles, DATA.real)
    scores = particle_scores(descent)
    assert scores["half_w2"] == descent.distances[-1][1]
    assert scores["first_half_w2"] == first
    assert scores["lowest_half_w2"] == min(distance for _, distance in descent.distances)


def test_a_step_is_minus_eta_times_the_gradient_of_the_mean_cost():
    for loss in LOSSES:
        discriminator = InfiniteDiscriminator("rbf", loss)
        descent = short(discriminator)
        cost = descent.step()
        x = torch.from_numpy(DATA.fake.copy()).requires_grad_()
        discriminator.train(POINTS, 40)
        f = discriminator.ntk.gram(x, POINTS, kind="nngp") @ discriminator.weights
        mean = LOSSES[loss].cost(f).mean()
        assert cost == pytest.approx(mean.item(), rel=ROUNDING)
        (gradient,) = torch.autograd.grad(mean, x)
        np.testing.assert_allclose(descent.particles, (x - 80.0 * gradient).detach().numpy(), rtol=0, atol=ROUNDING)
        where, direction = descent.field(DATA.fake, DATA.fake)
        np.testing.assert_allclose(direction, -40 * gradient.numpy(), rtol=0, atol=ROUNDING)
        np.testing.assert_allclose(where, f.detach().numpy(), rtol=0, atol=ROUNDING)


def test_a_generators_kernel_moves_all_particles_together():
    gram = generator_gram(DATA.fake, "relu")
    assert np.linalg.eigvalsh(gram)[-1] == pytest.approx(1, rel=1e-14)
    free, bound = short(InfiniteDiscriminator()), short(InfiniteDiscriminator(), generator_gram=gram)
    free.step()
    bound.step()
    moved = gram @ (free.particles - DATA.fake)
    np.testing.assert_allclose(bound.particles - DATA.fake, moved, rtol=0, atol=2e-15)  # of particles up to 3
    # Nearly what it is without, where the mean moves by (0.17, -0.08); 0.007 seen.
    assert bound.particles.mean(0) == pytest.approx(free.particles.mean(0), abs=0.05)
    descend(bound)
    assert bound.distances[-1][1] < half_squared_w2(DATA.fake, DATA.real)


def test_finite_discriminators_attract_particles():
    for reset in (False, True):
        discriminator = FiniteDiscriminator(2, width=32, learning_rate=0.1 if reset else 0.01, reset=reset)
        descent = descend(short(discriminator, n_steps=60, step_size=100.0 if reset else 20.0))
        assert descent.distances[-1][1] < 0.6 * half_squared_w2(DATA.fake, DATA.real)


def test_clouds_of_two_sizes_and_other_dtypes():
    descent = ParticleDescent(
        DATA.fake[:25], DATA.real, InfiniteDiscriminator(), n_steps=3, step_size=40.0, evaluate_every=None
    )
    descend(descent)
    assert descent.distances == []
    assert "half_w2" not in particle_scores(descent)
    single = descend(short(InfiniteDiscriminator(), dtype="float32", n_steps=5))
    double = descend(short(InfiniteDiscriminator(), n_steps=5))
    np.testing.assert_allclose(single.particles, double.particles, rtol=0, atol=5e-6)  # rounding of 5 in float32


@pytest.mark.parametrize(
    "make",
    [
        lambda: InfiniteDiscriminator("relu", "lsgan"),
        lambda: FiniteDiscriminator(2, width=8),
        lambda: FiniteDiscriminator(2, width=8, reset=True),
    ],
)
def test_descents_go_on_bit_for_bit(make, tmp_path):
    whole = descend(short(make(), n_steps=12, evaluate_every=4))
    begun = short(make(), n_steps=12, evaluate_every=4)
    for _ in range(7):
        begun.step()
    tensors, numbers = begun.state()
    restored = short(make(), n_steps=12, evaluate_every=4)
    restored.restore(tensors, json.loads(json.dumps(numbers)))
    begun.step()  # must not change what was saved
    assert restored.steps_done == 7
    descend(restored)
    np.testing.assert_array_equal(restored.particles, whole.particles)
    assert restored.distances == whole.distances
    assert [step for step, _ in restored.frames] == [step for step, _ in whole.frames]

    pytest.importorskip("safetensors")
    whole.save(tmp_path / "particles.safetensors", about={"seed": 1})
    loaded = load_particles(tmp_path / "particles.safetensors")
    np.testing.assert_array_equal(loaded["particles"], whole.particles)
    np.testing.assert_array_equal(loaded["real"], DATA.real)
    np.testing.assert_array_equal(loaded["frames"][0], DATA.fake)
    assert loaded["frame_steps"].tolist() == [step for step, _ in whole.frames]

    other = short(make(), n_steps=13, evaluate_every=4)
    with pytest.raises(ValueError, match="other settings"):
        other.restore(tensors, numbers)
    with pytest.raises(RuntimeError, match="is done"):
        whole.step()


def test_a_descent_that_diverges_says_so():
    descent = short(InfiniteDiscriminator("relu", "lsgan"), step_size=1e200)
    with pytest.raises(FloatingPointError, match=r"diverges at step .* use a smaller step size"):
        descend(descent)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InfiniteDiscriminator("tanh"), "kernel must be one of relu, rbf"),
        (lambda: InfiniteDiscriminator(loss="wgan"), "loss must be one of ipm, lsgan"),
        (lambda: InfiniteDiscriminator(time=0), "time must be positive and finite, got 0"),
        (lambda: InfiniteDiscriminator(solver="lanczos"), "solver of ipm must be one of closed, ode; got 'lanczos'"),
        (lambda: InfiniteDiscriminator(pykernels.NTK(1), kind="both"), "kind must be ntk or nngp, got 'both'"),
        (lambda: FiniteDiscriminator(2, "rbf"), "kernel 'rbf' is not that of a network that is trained"),
        (lambda: InfiniteDiscriminator(3), "kernel must be one of relu, rbf, .* or a pykernels.NTK; got 3"),
        (
            lambda: InfiniteDiscriminator().train(torch.zeros(3, 2), 3),
            "there must be fake and real points, got 3 and 0",
        ),
        (
            lambda: short(FiniteDiscriminator(3)),
            "discriminator must be for points of 2 dim.*; got one for 3 dimensions",
        ),
        (lambda: short(FiniteDiscriminator(2), dtype="float32"), "dimensions, torch.float32, .* torch.float64, on cpu"),
        (lambda: short(InfiniteDiscriminator()).field([0.0, 0.0]), r"points must have shape \(N, 2\), .*, got \(2,\)"),
        (lambda: short(InfiniteDiscriminator()).field([[0.0, math.inf]]), "points contains infinity"),
        (lambda: generator_gram(DATA.fake, "tanh"), "kernel must be one of relu, rbf"),
        (lambda: generator_gram(DATA.fake[0]), r"inputs must have shape \(N, d\), N at least 1, got \(2,\)"),
        (lambda: dirac_field(InfiniteDiscriminator(), n_points=1), "n_points must be at least 2, got 1"),
        (lambda: adequacy(n_networks=0), "n_networks must be at least 1, got 0"),
        (lambda: FiniteDiscriminator(2, width=0), "width must be at least 1, got 0"),
        (lambda: FiniteDiscriminator(2, learning_rate=-1), "learning_rate must be positive and finite, got -1"),
        (lambda: FiniteDiscriminator(2, n_steps=0), "n_steps must be at least 1, got 0"),
        (lambda: short(InfiniteDiscriminator(), n_steps=0), "n_steps must be at least 1, got 0"),
        (lambda: short(InfiniteDiscriminator(), step_size=math.inf), "step_size must be positive and finite, got inf"),
        (lambda: short(InfiniteDiscriminator(), dtype="float16"), "dtype must be one of float32, float64"),
        (
            lambda: short(InfiniteDiscriminator(), generator_gram=np.eye(3)),
            r"generator_gram must have shape \(40, 40\)",
        ),
        (lambda: ParticleDescent(DATA.fake, DATA.real[:, :1], InfiniteDiscriminator()), "real must have shape"),
        (lambda: ParticleDescent(DATA.fake[:3], DATA.real, InfiniteDiscriminator()), "evaluate_every must be None"),
        (lambda: ParticleDescent(DATA.fake * np.nan, DATA.real, InfiniteDiscriminator()), "fake contains NaN"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_discriminator_is_trained_before_it_is_asked():
    with pytest.raises(RuntimeError, match="not trained yet"):
        InfiniteDiscriminator()(torch.zeros(1, 2))


def test_scales_that_can_be_learned_leave_no_history():
    """Particles are moved in place: with a history every step would keep the ones before it."""
    kernels = [pykernels.NTK(1, bias_std=1.0, learnable=learnable) for learnable in (False, True)]
    fixed, learnable = (descend(short(InfiniteDiscriminator(kernel, "lsgan"), n_steps=3)) for kernel in kernels)
    np.testing.assert_array_equal(learnable.particles, fixed.particles)
    assert not learnable.discriminator.weights.requires_grad


@pytest.mark.gpu
def test_captured_steps_are_those_of_the_cpu():
    expected = descend(short(InfiniteDiscriminator(), n_steps=20))
    descent = descend(short(InfiniteDiscriminator(), n_steps=20, device="cuda"))
    np.testing.assert_allclose(descent.particles, expected.particles, atol=1e-9)


# Generators


def test_the_witness_loss_has_the_gradient_of_the_witness():
    x = POINTS[:40].clone().requires_grad_()
    loss = WitnessLoss(InfiniteDiscriminator("relu", "lsgan"))(x, POINTS[40:])
    discriminator = InfiniteDiscriminator("relu", "lsgan")
    discriminator.train(POINTS, 40)
    f, gradient = discriminator(POINTS[:40])
    assert loss.item() == pytest.approx(f.square().mean().item(), rel=1e-14, abs=0)
    (ours,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(ours, 2 * f[:, None] * gradient / 40, rtol=0, atol=2e-17)  # of 0.008


def test_generators_learn_and_go_on_bit_for_bit(tmp_path):
    def begin():
        generator = Generator(2, 2, width=16, dtype="float64", seed=4)
        return GeneratorTraining(
            generator, DATA.real, InfiniteDiscriminator(), n_steps=30, batch_size=20, learning_rate=0.05,
            validate_every=10,
        )  # fmt: skip

    training = begin()
    first = half_squared_w2(training.model.sample(40), DATA.real)
    for _ in range(13):
        training.step()
    tensors, numbers = training.state()
    restored = begin()
    restored.restore(tensors, json.loads(json.dumps(numbers)))
    for either in (training, restored):
        while not either.done:
            either.step()
    assert training.losses.tolist() == restored.losses.tolist()
    np.testing.assert_array_equal(training.model.sample(5), restored.model.sample(5))
    assert training.validations[-1][1] < training.validations[0][1]
    assert half_squared_w2(training.model.sample(40), DATA.real) < first

    pytest.importorskip("safetensors")
    training.model.save(tmp_path / "model.safetensors")
    again = Generator.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.sample(5, seed=1), training.model.sample(5, seed=1))
    with pytest.raises(ValueError, match="batch_size must be from 1 to 40"):
        GeneratorTraining(training.model, DATA.real, InfiniteDiscriminator(), batch_size=41)
    with pytest.raises(ValueError, match=r"real must be finite and have shape \(M, 2\)"):
        GeneratorTraining(training.model, DATA.real[:, :1], InfiniteDiscriminator())


# What was published


def test_published_settings_and_figures():
    assert astuple(published_settings("8gaussians", "ipm", "relu")) == (20_000, 1000.0, 1.0, 0.01, True)
    assert astuple(published_settings("8gaussians", "ipm", "sigmoid", "finite"))[1:] == (1e5, 1.0, 0.01, True)
    assert published_settings("8gaussians", "vanilla", "relu+sin").step_size == 250
    assert astuple(published_settings("density", "ipm", "relu", "reset")) == (10_000, 1000.0, 1.0, 0.1, True)
    assert astuple(published_settings("ab", "lsgan", "relu", "finite")) == (10_000, 1.0, 1.0, 0.1, False)
    assert astuple(published_settings("digits", "ipm", "relu")) == (50_000, 100.0, 1000.0, 0.01, True)
    assert published_particles("8gaussians", "ipm", "infinite", "relu") == (9.40e-7, 2.71e-7)
    assert published_particles("ab", "lsgan", "finite", "sigmoid") == (8.78e-2, 2.23e-2)
    assert published_particles("8gaussians", "hinge", "infinite", "relu") is None


def test_table():
    result = {
        "data": "8gaussians",
        "loss": "ipm",
        "discriminator": "infinite",
        "kernel": "relu",
        "generator": None,
        "clouds": {"fake": 500},
        "n_steps": 20000,
        "step_size": 1e3,
    }
    runs = [{"half_w2": 1e-6, "lowest_half_w2": 9e-7, "sinkhorn": 2e-6}, {"half_w2": 2e-6, "lowest_half_w2": 2e-6}]
    runs[1]["sinkhorn"] = None
    first, second = ({**result, "runs": [run]} for run in runs)
    row = descent_table([first, second]).splitlines()[2]
    assert "| 20000 x 1000 | 2 | 1.50e-06 ± 7.07e-07 | 1.45e-06 ± 7.78e-07 |  | 9.40e-07 ± 2.71e-07 |" in row
    other = descent_table([first, {**second, "loss": "hinge"}]).splitlines()
    assert other[2].endswith("| 1 | 1.00e-06 | 9.00e-07 | 2.00e-06 | 9.40e-07 ± 2.71e-07 |")
    assert other[3].endswith("| 1 | 2.00e-06 | 2.00e-06 |  |  |")
    other = descent_table([first, {**second, "generator": "relu", "clouds": {"fake": 20}}]).splitlines()
    assert other[3].startswith("| 8gaussians, 20 points | IPM | infinite | ReLU, generator ReLU | 20000 x 1000 | 1 |")
    assert other[3].endswith("|  |  |")
