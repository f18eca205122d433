"""Forecasts by estimated motion: the network, the warp that it steers, its training, and how it is scored."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import pykernels
from pykernels.data.ocean import simulate
from pykernels.models import advection_diffusion
from pykernels.models.advection_diffusion import (
    AdvectionDiffusionForecaster,
    AdvectionDiffusionTraining,
    MotionEstimator,
    Penalties,
    charbonnier,
    train_advection_diffusion,
)
from pykernels.models.advection_diffusion_protocols import (
    METHODS,
    ForecastData,
    baseline_scores,
    flow_scores,
    forecast_scores,
    forecast_table,
    simulated_ocean,
)

SIZE = 16


@pytest.fixture(scope="module", autouse=True)
def _tiny_networks():
    """The layers of both networks, narrow enough for tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, published in (("tiny", False), ("tiny published", True)):
            widths = advection_diffusion._Widths((4, 6, 6), (6, 4, 4), published)
            patch.setitem(advection_diffusion.SIZES, name, widths)
        yield


@pytest.fixture(scope="module")
def data():
    return simulated_ocean(6, 4, size=SIZE, speed=1.0, seed=0)


class Constant(nn.Module):
    """In the place of an estimator: the same motion everywhere, a parameter."""

    def __init__(self, *motion, dtype=torch.float32):
        super().__init__()
        self.motion = nn.Parameter(torch.tensor(motion, dtype=dtype))

    def forward(self, frames):
        return self.motion.view(1, -1, 1, 1).expand(len(frames), -1, *frames.shape[2:])


def moving(*motion, dtype="float32", **options):
    """A model that infers the same motion whatever it sees."""
    model = AdvectionDiffusionForecaster("tiny", dtype=dtype, padding_mode="periodic", seed=0, **options)
    model.estimator = Constant(*motion, dtype=next(model.parameters()).dtype)
    return model


def frames(batch=2, size=SIZE, count=4, seed=0):
    return torch.randn(batch, count, size, size, generator=torch.Generator().manual_seed(seed))


# The network


def test_the_published_network():
    """Kernels as (out, in), with a normalisation after each of the encoder's."""
    network = MotionEstimator(size="published")
    encoder = [(64, 4), (128, 64), (256, 128), (256, 256), (512, 256), (512, 512), (1024, 512), (1024, 1024)]
    decoder = [(256, 1024), (128, 768), (64, 384), (32, 192), (16, 96), (2, 20)]
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [m.weight.shape for m in convolutions] == [(*widths, 3, 3) for widths in encoder + decoder]
    assert [m.stride[0] for m in convolutions] == [2, 2, 2, 1, 2, 1, 2, 1] + [1] * 6
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.num_features for m in norms] == [width for width, _ in encoder]
    assert len({id(m) for m in norms}) == len(norms)
    assert all(m.bias is None for m in convolutions)
    for m in convolutions:
        deviation = 0.02 / (9 * m.out_channels)
        assert m.weight.std().item() == pytest.approx(deviation, rel=0.2)
    with torch.no_grad():
        motion = network.eval()(frames(1, 64))
    assert motion.shape == (1, 2, 64, 64)
    assert 0 < motion.abs().max() < 0.05  # of half the image


def test_the_small_network():
    network = MotionEstimator()
    assert 1e4 < sum(p.numel() for p in network.parameters()) < 1e5
    for shape in ((64, 64), (32, 48), (17, 9)):
        motion = network(torch.randn(2, 4, *shape))
        assert motion.shape == (2, 2, *shape)
        assert 0 < motion.abs().max() < 0.1


@pytest.mark.parametrize("size", ["tiny", "tiny published"])
def test_a_periodic_image_has_no_border(size):
    """What is moved by as much as the coarsest pixels measure gives what is moved."""
    torch.manual_seed(0)
    network = MotionEstimator(size=size, periodic=True).double()
    seen = frames(2, 24).double()
    moved = network(seen.roll((8, 16), (2, 3)))
    assert moved.std() > 0
    torch.testing.assert_close(moved, network(seen).roll((8, 16), (2, 3)), rtol=1e-6, atol=0)
    plain = MotionEstimator(size=size).double()
    plain.load_state_dict(network.state_dict())  # the same but near the border
    seen = frames(1, 128).double()
    inside = (..., slice(56, 72), slice(56, 72))
    ours, theirs = (n.eval()(seen) for n in (network, plain))
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=1e-9, atol=0)
    assert not torch.allclose(ours, theirs, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match=r"periodic image must be multiples of 8, got \(24, 20\)"):
        network(torch.zeros(1, 4, 24, 20, dtype=torch.float64))


def test_seeds_of_the_first_weights():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    weights = [
        torch.cat([t.ravel() for t in AdvectionDiffusionForecaster("tiny", seed=seed).estimator.state_dict().values()])
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# The forecast


def test_a_constant_motion_is_a_rollout():
    model = moving(1.25, -0.5, diffusivity=0.45)
    seen = frames()
    images, flows = model(seen, 3)
    motion = torch.tensor([1.25, -0.5]).view(1, 1, 2, 1, 1).expand(2, 3, 2, SIZE, SIZE)
    assert torch.equal(flows, motion)
    expected = pykernels.gaussian_warp_rollout(seen[:, 3:], motion, 0.9, form="density", padding_mode="periodic")
    torch.testing.assert_close(images, expected[:, :, 0], rtol=1e-5, atol=1e-5)


def test_a_bilinear_warp_by_whole_pixels_rolls():
    model = moving(2.0, -1.0, warp="bilinear")
    seen = frames()
    images = model(seen, 2).images
    assert torch.equal(images[:, 0], seen[:, 3].roll((-1, 2), (1, 2)))
    assert torch.equal(images[:, 1], seen[:, 3].roll((-2, 4), (1, 2)))
    assert model.diffusivity is None
    assert "raw_diffusivity" not in model.state_dict()


@pytest.mark.parametrize("warp", ["gaussian", "direct"])
def test_predictions_are_fed_back(warp):
    model = AdvectionDiffusionForecaster("tiny", warp=warp, seed=0)
    seen = frames()
    images, flows = model(seen, 3)
    assert images.shape == (2, 3, SIZE, SIZE)
    assert (flows is None) == (warp == "direct")
    window = seen
    for step in range(3):
        image, motion = model(window, 1)
        torch.testing.assert_close(image, images[:, step : step + 1])
        if flows is not None:
            torch.testing.assert_close(motion, flows[:, step : step + 1])
        window = torch.cat([window[:, 1:], image], 1)


def test_motion_of_the_published_network_is_in_pixels():
    """It is relative to half the image, which is (S - 1) / 2 pixels."""
    model = AdvectionDiffusionForecaster("tiny published", seed=0)
    model.estimator = Constant(0.1, -0.2)
    flows = model(torch.randn(1, 4, 9, 17), 1).flows
    torch.testing.assert_close(flows[0, 0, :, 0, 0], torch.tensor([0.1 * 8, -0.2 * 4]))


@pytest.mark.parametrize("value", [1e-6, 0.45, 50.0])
def test_diffusivity(value):
    learned = AdvectionDiffusionForecaster("tiny", diffusivity=value, seed=0)
    assert learned.diffusivity.item() == pytest.approx(value, rel=1e-5)
    fixed = AdvectionDiffusionForecaster("tiny", diffusivity=value, learn_diffusivity=False, seed=0)
    assert fixed.diffusivity == value
    assert set(learned.state_dict()) - set(fixed.state_dict()) == {"raw_diffusivity"}
    with torch.no_grad():
        learned.raw_diffusivity -= 20
    assert 0 < learned.diffusivity < value


def test_gradients_pass_through_all_steps():
    model = moving(0.3, -0.6, dtype="float64", diffusivity=0.5)
    seen, target = frames().double(), frames(seed=1)[:, :3].double()
    parameters = (model.estimator.motion, model.raw_diffusivity)

    def loss():
        return (model(seen, 3).images - target).square().mean()

    exact = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, exact, strict=True):
        numbers = parameter.data.view(-1)
        for i, found in enumerate(gradient.view(-1)):
            step = 1e-5
            numbers[i] += step
            above = loss().item()
            numbers[i] -= 2 * step
            below = loss().item()
            numbers[i] += step
            assert (above - below) / (2 * step) == pytest.approx(found.item(), rel=1e-5, abs=1e-9)


def test_predict():
    model = AdvectionDiffusionForecaster("tiny published", padding_mode="zeros", seed=0)
    model(frames(8))  # the averages of its normalisations change
    assert model.training
    seen = frames(5).numpy()
    images, flows = model.predict(seen, 2)
    assert model.training
    again = model.predict(seen, 2, batch_size=2)
    np.testing.assert_allclose(again.images, images, rtol=1e-5, atol=1e-6)
    model.eval()
    with torch.no_grad():
        expected = model(torch.as_tensor(seen), 2)
    np.testing.assert_array_equal(images, expected.images)
    np.testing.assert_array_equal(flows, expected.flows)
    assert model.predict(seen).images.shape == (5, 6, SIZE, SIZE)
    assert AdvectionDiffusionForecaster("tiny", warp="direct", seed=0).predict(seen).flows is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "large"}, "size must be one of small, published, .*; got 'large'"),
        ({"warp": "cubic"}, "warp must be one of gaussian, bilinear, direct; got 'cubic'"),
        ({"form": "linear"}, "form must be one of density, integrated; got 'linear'"),
        ({"normalize": "all"}, "normalize must be one of none, window, inside; got 'all'"),
        ({"padding_mode": "wrap"}, "padding_mode must be one of zeros, border, reflection, periodic; got 'wrap'"),
        ({"dtype": "float16"}, "dtype must be one of float32, float64; got 'float16'"),
        ({"diffusivity": 0.0}, "diffusivity must be positive, or 0 if it is not learned, got 0.0"),
        ({"diffusivity": -1.0, "learn_diffusivity": False}, "diffusivity must be positive, or 0 if it is not learned"),
        ({"diffusivity": math.inf}, "diffusivity must be positive"),
        ({"inputs": 0}, "inputs must be at least 1, got 0"),
    ],
)
def test_models_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        AdvectionDiffusionForecaster(**options)


def test_networks_that_do_not_exist():
    with pytest.raises(ValueError, match="out_channels must be at least 1, got 0"):
        MotionEstimator(out_channels=0)


@pytest.mark.parametrize(
    ("shape", "steps", "message"),
    [
        ((2, 3, 16, 16), 6, r"frames must have shape \(B, 4, H, W\), got \(2, 3, 16, 16\)"),
        ((4, 16, 16), 6, "frames must have shape"),
        ((0, 4, 16, 16), 6, "frames must have shape"),
        ((1, 4, 16, 16), 0, "steps must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_predicted(shape, steps, message):
    with pytest.raises(ValueError, match=message):
        AdvectionDiffusionForecaster("tiny", seed=0).predict(np.zeros(shape), steps)


def test_land_must_be_filled():
    seen = frames(1).numpy()
    seen[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="frames contains NaN"):
        AdvectionDiffusionForecaster("tiny", seed=0).predict(seen)


@pytest.mark.parametrize("size", ["tiny", "tiny published"])
@pytest.mark.parametrize("warp", ["gaussian", "bilinear", "direct"])
def test_a_saved_model_predicts_the_same(size, warp, tmp_path):
    pytest.importorskip("safetensors")
    model = AdvectionDiffusionForecaster(size, warp=warp, dtype="float64", diffusivity=0.3, seed=0)
    model(frames(8).double())
    path = tmp_path / "model.safetensors"
    land = np.array([[True, False]])
    model.save(path, about={"data": "mine"}, arrays={"land": land})
    loaded, about, arrays = AdvectionDiffusionForecaster.load_all(path)
    assert loaded.options == model.options
    assert about == {"data": "mine"}
    assert arrays.keys() == {"land"}
    np.testing.assert_array_equal(arrays["land"], land)
    for ours, theirs in zip(loaded.predict(frames()), model.predict(frames()), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut off or damaged"):
        AdvectionDiffusionForecaster.load(path)


def test_a_file_whose_weights_do_not_fit(tmp_path):
    pytest.importorskip("safetensors")
    model = AdvectionDiffusionForecaster("tiny", seed=0)
    model.options["size"] = "small"
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: .*size mismatch"):
        AdvectionDiffusionForecaster.load(tmp_path / "model.safetensors")


# The loss


def test_charbonnier():
    error = torch.tensor([0.0, 3.0, -3.0], dtype=torch.float64)
    torch.testing.assert_close(charbonnier(error, 4.0, 0.5), torch.tensor([4.0, 5.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(charbonnier(error, 0.0, 1.0), error.square())


def test_published_penalties_are_those_of_normalised_motion():
    """Of a linear motion, whose differences are the same everywhere."""
    size = 9
    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    pixels = np.stack([0.3 * x + 0.1 * y, 0.2 * y - 0.05 * x])
    normalised = pixels * 2 / (size - 1)
    across = normalised[:, :, 1:] - normalised[:, :, :-1]
    down = normalised[:, 1:] - normalised[:, :-1]
    program = {
        "divergence": np.square(across[0, :-1] + down[1, :, :-1]).mean(),
        "magnitude": -0.003 * np.square(normalised).mean(),  # over both components
        "smoothness": 0.4 * (np.square(across).mean((1, 2)).sum() + np.square(down).mean((1, 2)).sum()),
    }
    published = Penalties.published(size)
    for name, expected in program.items():
        penalty = pykernels.flow_penalties(torch.as_tensor(pixels)[None], **{name: getattr(published, name)})
        assert penalty.item() == pytest.approx(expected, rel=1e-9)
    assert Penalties.published(64).divergence == pytest.approx(1.0078e-3, rel=1e-4)
    with pytest.raises(ValueError, match="size must be at least 2, got 1"):
        Penalties.published(1)


def first_loss(model, data, **options):
    training = AdvectionDiffusionTraining(model, data.train, **{"n_steps": 1, "batch_size": 100} | options)
    return training.step()


@pytest.mark.parametrize("loss", ["squared", "charbonnier"])
def test_the_loss_is_the_mean_over_pixels_and_lead_times(loss, data):
    penalties = Penalties(0.5, 0.25, 2.0)
    model = moving(0.3, -0.6, dtype="float64")
    images, flows = model(torch.as_tensor(data.train[:, :4]).double(), 6)
    error = images - torch.as_tensor(data.train[:, 4:])
    expected = (error.square() if loss == "squared" else charbonnier(error)).mean()
    expected = expected + 0.25 * (0.3**2 + 0.6**2)  # the same everywhere: nothing else is penalised
    assert flows.shape == (6, 6, 2, SIZE, SIZE)
    found = first_loss(moving(0.3, -0.6, dtype="float64"), data, loss=loss, penalties=penalties)
    assert found == pytest.approx(expected.item(), rel=1e-12)


def test_penalties_are_the_mean_over_lead_times(data):
    model = AdvectionDiffusionForecaster("tiny", dtype="float64", seed=0)
    with torch.no_grad():
        model.estimator.last.weight *= 1000
    penalties = Penalties(0.5, -0.25, 2.0)
    flows = model(torch.as_tensor(data.train[:, :4]).double(), 6).flows
    each = [pykernels.flow_penalties(flows[:, t], **penalties._asdict()).item() for t in range(6)]
    state = model.state_dict()
    without = AdvectionDiffusionForecaster("tiny", dtype="float64", seed=0)
    without.load_state_dict(state)
    difference = first_loss(model, data, penalties=penalties) - first_loss(without, data)
    assert difference == pytest.approx(np.mean(each), rel=1e-9)


def test_land_and_borders_do_not_count(data):
    """What is there may be anything; the loss is the mean over the other pixels."""
    valid = np.ones((6, SIZE, SIZE), dtype=bool)
    valid[:, 3:7, 5:9] = False
    valid[2, 10:, :] = False
    counted = valid.copy()
    counted[:, :2] = counted[:, -2:] = counted[:, :, :2] = counted[:, :, -2:] = False
    error = moving(0.3, -0.6)(torch.as_tensor(data.train[:, :4]), 6).images.detach().numpy() - data.train[:, 4:]
    where = np.broadcast_to(counted[:, None], error.shape)
    found = first_loss(moving(0.3, -0.6), data, valid=valid, border=2)
    assert found == pytest.approx(np.square(error[where]).mean(), rel=1e-5)
    other = data.train.copy()
    other[:, 4:] = np.where(where, other[:, 4:], 1e3)
    changed = ForecastData(other, data.validation, data.test, "periodic")
    assert first_loss(moving(0.3, -0.6), changed, valid=valid, border=2) == found
    one = first_loss(moving(0.3, -0.6), data, valid=valid[0])
    error = error[:, :, valid[0]]
    assert one == pytest.approx(np.square(error).mean(), rel=1e-5)


# The training


def training_of(data, model=None, **options):
    model = AdvectionDiffusionForecaster("tiny", padding_mode="periodic", seed=0) if model is None else model
    defaults = {"n_steps": 6, "batch_size": 4, "validate_every": 2}
    return AdvectionDiffusionTraining(model, data.train, data.validation, **defaults | options)


def test_it_learns_the_diffusivity_of_still_water():
    """Without motion there is only diffusion: the model finds how much."""
    still = simulate(8, 10, SIZE, speed=0.0, diffusivity=0.45, seed=0).images.numpy()
    model = moving(0.0, 0.0, diffusivity=0.1)
    train_advection_diffusion(model, still, n_steps=150, batch_size=8, learning_rate=0.03)
    assert model.diffusivity.item() == pytest.approx(0.45, rel=0.01)


def test_it_learns_a_drift():
    """The same motion in all sequences, which is not that of the first weights."""
    seen = torch.as_tensor(simulate(4, 2, SIZE, speed=0.0, seed=0).images[:, 1])
    sequences = torch.stack([seen.roll(t, 2) for t in range(10)], 1).numpy()
    model = moving(0.4, 0.1, warp="bilinear")
    training = train_advection_diffusion(model, sequences, n_steps=100, learning_rate=0.03)
    assert training.losses[-1] < training.losses[0] / 100
    torch.testing.assert_close(model.estimator.motion.detach(), torch.tensor([1.0, 0.0]), atol=0.05, rtol=0)


def test_the_loss_falls_and_the_best_model_is_kept(data):
    training = training_of(data, n_steps=30, learning_rate=5e-3, validate_every=10)
    while not training.done:
        training.step()
    assert training.losses[-5:].mean() < training.losses[:5].mean()
    assert [step for step, _ in training.validations] == [10, 20, 30]
    best = min(error for _, error in training.validations)
    predicted = training.model.predict(data.validation[:, :4]).images
    assert np.square(predicted - data.validation[:, 4:]).mean() == pytest.approx(best, rel=1e-4)


def test_every_sequence_is_seen_once_in_a_pass(data):
    training = training_of(data, batch_size=2, n_steps=6)
    seen = []
    while not training.done:
        seen.append(training._batch().tolist())
        training.step()
    for epoch in (seen[:3], seen[3:]):
        assert sorted(np.concatenate(epoch)) == list(range(6))
    assert seen[:3] != seen[3:]
    assert training_of(data, batch_size=2, seed=1)._batch().tolist() != seen[0]


def test_weights_decay_and_the_diffusivity_does_not(data):
    model = AdvectionDiffusionForecaster("tiny", seed=0)
    training = training_of(data, model, weight_decay=4e-4, betas=(0.5, 0.9))
    groups = training._optimizer.param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays.pop(id(model.raw_diffusivity)) == 0
    assert set(decays.values()) == {4e-4}
    assert len(decays) == len(list(model.estimator.parameters()))
    assert all(group["betas"] == (0.5, 0.9) for group in groups)


def through_json(state):
    tensors, values = state
    return tensors, json.loads(json.dumps(values))


@pytest.mark.parametrize("size", ["tiny", "tiny published"])
@pytest.mark.parametrize("at", [0, 1, 2, 5, 6])
def test_a_restored_training_goes_on_bit_for_bit(at, size, data):
    def new():
        return training_of(data, AdvectionDiffusionForecaster(size, seed=0), batch_size=4)

    whole, begun, restored = new(), new(), new()
    while not whole.done:
        whole.step()
    for _ in range(at):
        begun.step()
    restored.restore(*through_json(begun.state()))
    while not restored.done:
        restored.step()
    np.testing.assert_array_equal(restored.losses, whole.losses)
    assert restored.validations == whole.validations
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(restored.model.state_dict()[name], tensor), name


def test_trainings_that_cannot_be_restored(data):
    tensors, values = through_json(training_of(data).state())
    for options in ({"batch_size": 3}, {"border": 1}, {"seed": 1}, {"penalties": Penalties(1.0)}):
        with pytest.raises(ValueError, match="the saved training has other settings"):
            training_of(data, **options).restore(tensors, values)
    del tensors["model.raw_diffusivity"]
    with pytest.raises(ValueError, match=r"no fitting tensors model\.raw_diffusivity"):
        training_of(data).restore(tensors, values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "absolute"}, "loss must be one of squared, charbonnier; got 'absolute'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"border": 8}, "border must be from 0 to less than half of the image 16 x 16, got 8"),
        ({"valid": np.ones((3, 3), dtype=bool)}, r"valid must be boolean, of shape \(16, 16\) or \(6, 16, 16\)"),
        ({"valid": np.ones((SIZE, SIZE))}, "valid must be boolean, .* got float64"),
        ({"valid": np.zeros((SIZE, SIZE), dtype=bool)}, "valid and border leave no pixel that counts"),
        ({"validation_valid": np.ones((2, SIZE, SIZE), dtype=bool)}, "validation_valid must be boolean"),
    ],
)
def test_trainings_that_do_not_exist(options, message, data):
    with pytest.raises(ValueError, match=message):
        training_of(data, **options)


def test_sequences_that_cannot_be_learned_from(data):
    model = AdvectionDiffusionForecaster("tiny", seed=0)
    with pytest.raises(ValueError, match=r"sequences must have shape \(N, T, H, W\), N at least 1 and T at least 5"):
        AdvectionDiffusionTraining(model, data.train[:, :4])
    broken = data.validation.copy()
    broken[0, 0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="validation contains infinity"):
        AdvectionDiffusionTraining(model, data.train, broken)


def test_a_training_that_diverges(data):
    model = AdvectionDiffusionForecaster("tiny", warp="direct", seed=0)
    training = training_of(data, model, n_steps=20, learning_rate=1e30)
    message = r"the training diverges at step \d+: the loss is .*; use a smaller learning_rate"
    with pytest.raises(FloatingPointError, match=message):
        all(training.step() for _ in range(20))


# The experiment


def test_simulated_ocean(data):
    assert data.train.shape == (6, 10, SIZE, SIZE)
    assert data.validation.shape == data.test.shape == (4, 10, SIZE, SIZE)
    assert data.flow.shape == (4, 6, 2, SIZE, SIZE)
    everything = simulate(14, 10, SIZE, speed=1.0, seed=0)
    np.testing.assert_array_equal(np.concatenate([data.train, data.validation, data.test]), everything.images)
    np.testing.assert_array_equal(data.flow, everything.flow[10:, 3:])
    assert json.loads(json.dumps(data.about)) == data.about
    assert simulated_ocean(1, 1, size=SIZE, periodic=False).padding_mode == "reflection"


def test_the_true_motion_beats_persistence(data):
    scores = baseline_scores(data)
    errors = [scores[name]["mean_mse"] for name in ("true motion", "diffusion alone", "persistence")]
    assert errors[0] < 0.05 * errors[1]
    assert errors[1] < errors[2]
    expected = np.square(data.test[:, 3:4] - data.test[:, 4:]).mean((0, 2, 3))
    np.testing.assert_allclose(scores["persistence"]["mse"], expected, rtol=1e-6)
    assert scores["persistence"]["mean_mse"] == pytest.approx(expected.mean())


def test_scores_of_a_model(data):
    model = moving(0.25, 0.0, diffusivity=0.3)
    scores = forecast_scores(model, data)
    images = model.predict(data.test[:, :4]).images
    np.testing.assert_allclose(scores["mse"], np.square(images - data.test[:, 4:]).mean((0, 2, 3)), rtol=1e-5)
    assert scores["diffusivity"] == pytest.approx(0.3)
    assert scores["forecast_seconds"] > 0
    error = np.array([0.25, 0.0]).reshape(2, 1, 1) - data.flow
    assert scores["flow"]["endpoint"] == pytest.approx(np.linalg.norm(error, axis=2).mean(), rel=1e-5)
    assert scores["flow_visible"]["true_speed"] != scores["flow"]["true_speed"]
    assert json.loads(json.dumps(scores)) == scores
    direct = forecast_scores(AdvectionDiffusionForecaster("tiny", warp="direct", seed=0), data)
    assert direct.keys() == {"mse", "mean_mse", "forecast_seconds"}
    fixed = forecast_scores(moving(0.0, 0.0, diffusivity=0.3, learn_diffusivity=False), data)
    assert fixed["diffusivity"] == 0.3


def test_motion_shows_where_the_temperature_changes():
    """A front along y: all of its motion is seen at the half of the columns that are near it."""
    front = np.tanh((np.arange(SIZE) - SIZE / 2 + 0.5) / 3)
    test = np.broadcast_to(front, (1, 10, SIZE, SIZE)).astype(np.float32)
    flow = np.zeros((1, 6, 2, SIZE, SIZE), dtype=np.float32)
    flow[..., 4:12] = 1.0
    scores = forecast_scores(moving(0.0, 0.0), ForecastData(test, test, test, "border", flow=flow))
    assert scores["flow"]["true_speed"] == pytest.approx(math.sqrt(2) / 2)
    assert scores["flow_visible"]["true_speed"] == pytest.approx(math.sqrt(2))


def test_land_and_borders_are_not_scored(data):
    valid = np.ones((4, SIZE, SIZE), dtype=bool)
    valid[:, 5:9] = False
    masked = ForecastData(data.train, data.validation, data.test, "periodic", test_valid=valid, flow=data.flow)
    broken = data.test.copy()
    broken[:, 4:, 5:9] = broken[:, 4:, :1] = 1e3
    other = ForecastData(data.train, data.validation, broken, "periodic", test_valid=valid, flow=data.flow)
    model = moving(0.25, 0.0)
    ours, theirs = (forecast_scores(model, d, border=1) for d in (masked, other))
    assert ours["mse"] == theirs["mse"]
    assert ours["flow"] == theirs["flow"]
    assert baseline_scores(masked, border=1)["persistence"] == baseline_scores(other, border=1)["persistence"]


def test_flow_scores():
    truth = np.zeros((1, 1, 2, 2, 2))
    truth[0, 0, 0] = 3.0
    flow = np.zeros_like(truth)
    flow[0, 0, 1] = 4.0
    assert flow_scores(flow, truth) == pytest.approx(
        {"endpoint": 5.0, "relative": 5 / 3, "cosine": 0.0, "true_speed": 3.0}
    )
    assert flow_scores(2 * truth, truth) == pytest.approx(
        {"endpoint": 3.0, "relative": 1.0, "cosine": 1.0, "true_speed": 3.0}
    )
    flow[0, 0, :, 0, 0] = truth[0, 0, :, 0, 0]
    counted = np.zeros((1, 1, 2, 2), dtype=bool)
    counted[..., 0, 0] = True
    assert flow_scores(flow, truth, counted)["endpoint"] == 0


def test_table():
    baseline = {"mse": [0.1] * 6, "mean_mse": 0.1}
    run = {"mse": [0.01] * 5 + [0.04], "forecast_seconds": 0.002}
    moved = {"flow": {"endpoint": 0.5}, "flow_visible": {"endpoint": 0.25}, "diffusivity": 0.4}
    result = {
        "baselines": [{"seed": 0, "scores": {"persistence": baseline}}],
        "runs": [
            {"method": "regularised", "mean_mse": 0.01, **run, **moved},
            {"method": "regularised", "mean_mse": 0.03, **run, **moved},
            {"method": "direct", "mean_mse": 0.05, **run},
        ],
    }
    lines = forecast_table([result]).splitlines()
    assert lines[2:] == [
        "| Gaussian warp, regularised | 2 | 0.0200 ± 0.0141 | 0.0100 ± 0.0000 | 0.0400 ± 0.0000 "
        "| 0.500 ± 0.000 | 0.250 ± 0.000 | 0.400 ± 0.000 | 2.0 ± 0.0 | 1.42 |",
        "| direct prediction | 1 | 0.0500 | 0.0100 | 0.0400 |  |  |  | 2.0 | 15.84 |",
        "| persistence | 1 | 0.1000 | 0.1000 | 0.1000 |  |  |  |  |  |",
    ]
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_methods():
    penalties = Penalties(1.0, 2.0, 3.0)
    assert {name: (m.warp, any(m.penalties(penalties))) for name, m in METHODS.items()} == {
        "regularised": ("gaussian", True),
        "unregularised": ("gaussian", False),
        "bilinear": ("bilinear", True),
        "direct": ("direct", False),
    }
