"""The damped pendulum and the Neural ODE that learns it."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from pykernels.data import Pendulum, damped_pendulum
from pykernels.models.neural_ode import NeuralODE, NeuralODETraining, log_mse, train_neural_ode
from pykernels.models.neural_ode_protocols import forecast_table, pendulum_scores, true_forecast
from pykernels.models.published import published_forecast

SMALL = {"hidden": (16, 16), "seed": 0}
TIMES = np.arange(0, 3, 0.5)


@pytest.fixture(scope="module")
def data():
    return damped_pendulum(6, period=6.0, n_times=6)


# The simulator


@pytest.mark.parametrize("period", [3.0, 6.0, 12.0])
def test_trajectories_agree_with_an_adaptive_method_of_order_eight(period):
    integrate = pytest.importorskip("scipy.integrate")
    data = damped_pendulum(10, period=period, noise=0.0, seed=1)
    omega = 2 * math.pi / period

    def field(t, state):
        return [state[1], -(omega**2) * math.sin(state[0]) - 0.2 * state[1]]

    for trajectory in np.concatenate([data.train, data.test]):
        exact = integrate.solve_ivp(
            field, (0, 20), trajectory[0], method="DOP853", t_eval=data.times, rtol=3e-14, atol=1e-14
        )
        assert np.abs(exact.y.T - trajectory).max() < 1e-9


def test_small_swings_are_damped_oscillations():
    """theta'' + omega^2 theta + a theta' = 0 has the solution exp(-a t / 2) cos(w t), w^2 = omega^2 - a^2 / 4."""
    pendulum = Pendulum(period=6.0, damping=0.2)
    times = np.linspace(0, 10, 21)
    size, frequency = 1e-4, math.sqrt(pendulum.omega**2 - 0.01)
    first = size * np.array([[1.0, -0.1]])
    angle = pendulum.solve(first, times)[0, :, 0]
    np.testing.assert_allclose(angle, size * np.exp(-0.1 * times) * np.cos(frequency * times), atol=1e-11)


def test_energy_is_kept_without_damping_and_falls_with_it():
    times = np.arange(0, 20, 0.5)
    first = [[2.0, 0.5], [0.1, -2.2]]
    free = Pendulum(period=6.0, damping=0.0)
    energy = free.energy(free.solve(first, times))
    np.testing.assert_allclose(energy, energy[:, :1].repeat(40, 1), rtol=1e-8)
    assert energy[0, 0] == pytest.approx(0.125 + free.omega**2 * (1 - math.cos(2)))
    damped = dataclasses.replace(free, damping=0.2)
    energy = damped.energy(damped.solve(first, times))
    assert (np.diff(energy) < 0).all()
    # Over a short time it falls by damping * theta'^2.
    states = damped.solve(first, [0, 1e-3])
    loss = np.diff(damped.energy(states))[:, 0] / 1e-3
    np.testing.assert_allclose(loss, -0.2 * np.square(states[..., 1]).mean(1), rtol=1e-5)


def test_the_data_are_as_published():
    data = damped_pendulum()
    np.testing.assert_array_equal(data.times, np.arange(0, 20, 0.5))
    assert data.describe() == {
        "period": 6.0,
        "damping": 0.2,
        "noise": 0.01,
        "n_times": 40,
        "train": 25,
        "validation": 25,
        "test": 25,
    }
    many = damped_pendulum(2000, n_times=1, noise=0.0)
    radius = np.linalg.norm(np.concatenate([many.train, many.validation, many.test])[:, 0], axis=1)
    assert radius.min() >= 1.3
    assert radius.max() <= 2.3
    assert radius.mean() == pytest.approx(1.8, abs=0.02)
    # Directions are those of points of a square: the corners get more than the sides.
    slope = np.abs(many.train[:, 0]).min(1) / np.abs(many.train[:, 0]).max(1)
    assert (slope < 0.5).mean() == pytest.approx(0.5, abs=0.05)


def test_noise_and_seeds():
    exact = damped_pendulum(4, n_times=5, noise=0.0, seed=3)
    noisy = damped_pendulum(4, n_times=5, noise=0.1, seed=3)
    for split in ("train", "validation", "test"):
        noise = getattr(noisy, split) - getattr(exact, split)
        assert 0.05 < noise.std() < 0.15
        assert noise[:, 0].all()  # the first states as well
        np.testing.assert_array_equal(
            getattr(noisy, split), getattr(damped_pendulum(4, n_times=5, noise=0.1, seed=3), split)
        )
    first = [part[:, 0] for part in (exact.train, exact.validation, exact.test, damped_pendulum(4, seed=4).train)]
    assert len(np.unique(np.concatenate(first)[:, 0])) == 16
    np.testing.assert_array_equal(damped_pendulum(4, period=12.0, noise=0.0, seed=3).test[:, 0], exact.test[:, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_trajectories": 0}, "n_trajectories must be at least 1, got 0"),
        ({"n_times": 0}, "n_times must be at least 1, got 0"),
        ({"period": 0.0}, "period must be positive, got 0.0"),
        ({"period": math.inf}, "period must be positive, got inf"),
        ({"damping": -1.0}, "damping must not be negative, got -1.0"),
        ({"time_step": math.nan}, "time_step must be positive, got nan"),
        ({"noise": -0.1}, "noise must not be negative, got -0.1"),
    ],
)
def test_what_cannot_be_simulated(options, message):
    with pytest.raises(ValueError, match=message):
        damped_pendulum(**options)


def test_first_states_of_another_shape():
    with pytest.raises(ValueError, match=r"first_states must have shape \(N, 2\), got \(3,\)"):
        Pendulum().solve(np.zeros(3), TIMES)


# The model


def test_the_published_network():
    model = NeuralODE(seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 41_202
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        if parameter.ndim == 1:
            assert name.endswith("bias")
            assert not parameter.any()
        else:
            matrix = parameter.detach().double() / 0.2
            gram = matrix @ matrix.T if len(matrix) <= len(matrix.T) else matrix.T @ matrix
            torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0)


def test_seeds_of_the_first_weights():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    states = [NeuralODE(hidden=(5,), seed=seed).state_dict() for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [torch.cat([tensor.ravel() for tensor in state.values()]) for state in states]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    one, other = (NeuralODE(hidden=(5,)).derivative(np.ones(2)) for _ in range(2))
    assert (one != other).any()


@pytest.mark.parametrize("method", ["euler", "rk4", "rk4_classic"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_predictions(method, dtype):
    """One step of the method from each time to the next, here written out."""
    model = NeuralODE(3, (8,), "tanh", method=method, gain=1.0, dtype=dtype, seed=1)
    y0 = np.random.default_rng(0).normal(size=(4, 3)).astype(dtype)
    times = np.array([0.0, 0.5, 0.75])
    y, expected = y0, [y0]
    for h in np.diff(times).astype(dtype):
        k1 = model.derivative(y)
        if method == "euler":
            y = y + h * k1
        elif method == "rk4":
            k2 = model.derivative(y + h / 3 * k1)
            k3 = model.derivative(y + h * (k2 - k1 / 3))
            k4 = model.derivative(y + h * (k1 - k2 + k3))
            y = y + h * (k1 + 3 * k2 + 3 * k3 + k4) / 8
        else:
            k2 = model.derivative(y + h / 2 * k1)
            k3 = model.derivative(y + h / 2 * k2)
            k4 = model.derivative(y + h * k3)
            y = y + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6
        expected.append(y)
    predicted = model.predict(y0, times)
    assert predicted.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(predicted, np.stack(expected, 1), rtol=tolerance, atol=tolerance)


def test_times_of_a_clock(data):
    """They keep their differences, which float32 would round away."""
    model, later = (NeuralODE(**SMALL) for _ in range(2))
    y0, clock = data.test[:, 0], data.times + 1.7e9
    np.testing.assert_array_equal(model.predict(y0, clock), model.predict(y0, data.times))
    losses = train_neural_ode(model, data.times, data.train, n_steps=2).losses
    np.testing.assert_array_equal(train_neural_ode(later, clock, data.train, n_steps=2).losses, losses)


def test_widths_of_numpy():
    assert NeuralODE(hidden=np.array([4, 5])).options["hidden"] == [4, 5]


def test_trajectories_have_gradients():
    model = NeuralODE(hidden=(6,), activation="tanh", gain=1.0, dtype="float64", seed=0)
    y0 = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    parameters = tuple(model.parameters())
    assert torch.autograd.gradcheck(lambda y0, *_: model(y0, t), (y0, *parameters))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": (200, 0)}, r"n_features and hidden must be positive integers, got 2 and \(200, 0\)"),
        ({"n_features": 0}, "n_features and hidden must be positive"),
        ({"method": "dopri5"}, "method must be one of euler, .*rk4.*; got 'dopri5'"),
        ({"dtype": "float16"}, "dtype must be one of float32, float64; got 'float16'"),
        ({"activation": "step"}, "activation must be one of .*'step'"),
    ],
)
def test_models_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralODE(**options)


@pytest.mark.parametrize(
    ("y0", "times", "message"),
    [
        (np.zeros(2), TIMES, r"y0 must have shape \(B, 2\), got \(2,\)"),
        (np.zeros((3, 4)), TIMES, r"y0 must have shape \(B, 2\), got \(3, 4\)"),
        (np.full((1, 2), np.nan), TIMES, "y0 contains NaN"),
        (np.zeros((1, 2)), [0.0], r"times must have shape \(T,\), T at least 2, got \(1,\)"),
        (np.zeros((1, 2)), [0.0, 1.0, 1.0], "times must be finite and increasing"),
        (np.zeros((1, 2)), [0.0, np.inf], "times must be finite and increasing"),
    ],
)
def test_what_cannot_be_predicted(y0, times, message):
    with pytest.raises(ValueError, match=message):
        NeuralODE(**SMALL).predict(y0, times)


def test_derivative_of_other_states():
    model = NeuralODE(**SMALL)
    assert model.derivative(np.zeros((3, 4, 2))).shape == (3, 4, 2)
    with pytest.raises(ValueError, match=r"states must have shape \(..., 2\), got \(3,\)"):
        model.derivative(np.zeros(3))


# The training


def training_of(data, model=None, **options):
    model = NeuralODE(**SMALL) if model is None else model
    return NeuralODETraining(
        model, data.times, data.train, data.validation, **{"n_steps": 12, "validate_every": 5} | options
    )


def test_the_loss_falls_and_the_best_model_is_kept(data):
    training = training_of(data, n_steps=200, learning_rate=5e-3, validate_every=20)
    first = training.model.state_dict()["field." + next(iter(dict(training.model.field.named_parameters())))].clone()
    steps = []
    while not training.done:
        steps.append((training.step(), training.steps_done))
    assert training.losses.tolist() == [loss for loss, _ in steps]
    assert training.losses[-1] < training.losses[0] / 5
    assert training.seconds > 0
    assert [step for step, _ in training.validations] == list(range(20, 201, 20))
    best = min(error for _, error in training.validations)
    assert dict(training.validations)[training.best_step] == best
    found = log_mse(training.model.predict(data.validation[:, 0], data.times), data.validation)
    assert found == pytest.approx(math.log(best), abs=1e-4)
    assert not torch.equal(next(iter(training.model.parameters())), first)
    with pytest.raises(RuntimeError, match="this training is done, after 200 steps"):
        training.step()


def test_the_loss_and_its_gradient_are_those_of_the_whole_trajectories(data):
    model = NeuralODE(**SMALL, dtype="float64")
    expected = NeuralODE(**SMALL, dtype="float64")
    states = torch.tensor(data.train)
    predicted = expected(states[:, 0], torch.tensor(data.times)).transpose(0, 1)
    loss = (predicted - states).square().mean()
    loss.backward()
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-3)
    optimizer.step()
    assert training_of(data, model).step() == pytest.approx(loss.item(), rel=1e-12)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_early_stopping_keeps_an_early_model(data):
    """With a learning rate that soon makes things worse."""
    training = training_of(data, n_steps=400, learning_rate=0.03, validate_every=1, patience=3)
    while not training.done:
        training.step()
    errors = [error for _, error in training.validations]
    assert training.stopped_early
    assert training.steps_done < 400
    assert len(errors) == training.steps_done
    assert training.best_step == 1 + int(np.argmin(errors)) == training.steps_done - 3
    found = log_mse(training.model.predict(data.validation[:, 0], data.times), data.validation)
    assert found == pytest.approx(math.log(min(errors)), abs=1e-3)


def test_without_validation_the_last_model_counts(data):
    training = NeuralODETraining(NeuralODE(**SMALL), data.times, data.train, n_steps=3)
    for _ in range(3):
        training.step()
    assert training.done
    assert training.validations == []
    assert training.validation_loss is None
    other = train_neural_ode(NeuralODE(**SMALL), data.times, data.train, data.validation, n_steps=3)
    assert [step for step, _ in other.validations] == [3]  # at the end in any case
    for ours, theirs in zip(training.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_train_neural_ode_tells_of_each_step(data):
    told = []
    training = train_neural_ode(
        NeuralODE(**SMALL), data.times, data.train, n_steps=3, on_step=lambda step, loss: told.append((step, loss))
    )
    assert told == list(enumerate(training.losses, 1))


def through_json(state):
    tensors, values = state
    return tensors, json.loads(json.dumps(values))


@pytest.mark.parametrize("at", [0, 1, 5, 9, 12])
def test_a_restored_training_goes_on_bit_for_bit(at, data):
    whole = training_of(data, learning_rate=0.05)
    while not whole.done:
        whole.step()
    begun = training_of(data, learning_rate=0.05)
    for _ in range(at):
        begun.step()
    state = through_json(begun.state())
    for _ in range(12 - at):
        begun.step()  # does not touch the state
    resumed = training_of(data, NeuralODE(hidden=(16, 16), seed=9), learning_rate=0.05)
    resumed.restore(*state)
    assert resumed.steps_done == at
    while not resumed.done:
        resumed.step()
    for training in (begun, resumed):
        assert training.losses.tolist() == whole.losses.tolist()
        assert training.validations == whole.validations
        assert training.best_step == whole.best_step
        for ours, theirs in zip(training.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_states_of_other_trainings_are_refused(data):
    training = training_of(data)
    training.step()
    tensors, values = training.state()
    for options in ({"n_steps": 13}, {"learning_rate": 0.1}, {"validate_every": 6}, {"patience": 2}):
        with pytest.raises(ValueError, match="the saved training has other settings"):
            training_of(data, **options).restore(tensors, values)
    with pytest.raises(ValueError, match="the saved training has other settings"):
        training_of(data, NeuralODE(hidden=(16, 17))).restore(tensors, values)
    name = next(name for name in tensors if name.startswith("adam."))
    with pytest.raises(ValueError, match=f"no fitting tensors {name}"):
        training_of(data).restore({key: value for key, value in tensors.items() if key != name}, values)


def test_a_diverging_training_is_told():
    data = damped_pendulum(2, n_times=4)
    training = NeuralODETraining(NeuralODE(**SMALL, gain=1e20), data.times, data.train)
    with pytest.raises(FloatingPointError, match=r"diverges at step 1: .*; use a smaller learning_rate"):
        training.step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
        ({"validate_every": 0}, "validate_every must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"times": TIMES[::-1]}, "times must be finite and increasing"),
        ({"states": np.zeros((3, 5, 2))}, r"states must have shape \(N, 6, 2\), N at least 1, got \(3, 5, 2\)"),
        ({"states": np.zeros((0, 6, 2))}, r"states must have shape \(N, 6, 2\), N at least 1, got \(0, 6, 2\)"),
        ({"states": np.full((3, 6, 2), np.inf)}, "states contains infinity"),
        ({"validation": np.zeros((3, 6, 3))}, r"validation must have shape \(N, 6, 2\)"),
        ({"validation": np.full((3, 6, 2), np.nan)}, "validation contains NaN"),
    ],
)
def test_what_cannot_be_trained(changes, message):
    arguments = {"times": TIMES, "states": np.zeros((3, 6, 2)), **changes}
    with pytest.raises(ValueError, match=message):
        NeuralODETraining(NeuralODE(**SMALL), **arguments)


# Files


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_saved_models_predict_the_same(dtype, tmp_path):
    pytest.importorskip("safetensors")
    model = NeuralODE(3, (8, 5), "tanh", method="heun2", gain=1.0, dtype=dtype, seed=4)
    model.save(tmp_path / "model", about={"why": "a test"})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = NeuralODE.load(tmp_path / "model")
    y0 = np.random.default_rng(0).normal(size=(4, 3))
    np.testing.assert_array_equal(loaded.predict(y0, TIMES), model.predict(y0, TIMES))
    assert loaded.options == model.options
    loaded.save(str(tmp_path / "again"), about={"why": "a test"})
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()


def test_files_that_are_no_models(tmp_path):
    pytest.importorskip("safetensors")
    from pykernels.models import _checkpoint

    path = tmp_path / "model"
    path.write_text("hello")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        NeuralODE.load(path)
    _checkpoint.save(path, "usrl.model", {}, {})
    with pytest.raises(ValueError, match=r"holds a 'usrl.model', where a 'neural_ode.model' is needed"):
        NeuralODE.load(path)
    model = NeuralODE(**SMALL)
    for options, tensors, message in (
        ({**model.options, "method": "dopri5"}, model.state_dict(), "method must be one of"),
        ({**model.options, "depth": 3}, model.state_dict(), "is damaged: .*depth"),
        (model.options, {}, "is damaged: .*Missing key"),
        (model.options, model.double().state_dict(), "the weights are not all float32"),
    ):
        _checkpoint.save(path, "neural_ode.model", tensors, {"options": options, "about": {}})
        with pytest.raises(ValueError, match=message) as caught:
            NeuralODE.load(path)
        assert str(path) in str(caught.value)
    _checkpoint.save(path, "neural_ode.model", {}, {})
    with pytest.raises(ValueError, match="there is no 'options' in it"):
        NeuralODE.load(path)


# Scores


def test_log_mse_is_natural():
    assert log_mse(np.zeros((1, 2, 2)), np.full((1, 2, 2), math.e)) == pytest.approx(2)
    with pytest.raises(ValueError, match=r"must have the same shape, got \(1, 2, 2\) and \(2, 2, 2\)"):
        log_mse(np.zeros((1, 2, 2)), np.zeros((2, 2, 2)))


def test_the_true_equation_scores_as_its_method_allows():
    exact = damped_pendulum(5, period=6.0, noise=0.0)
    # One step of 0.5 to an observation: an error of order four, far below that of any noise.
    assert log_mse(true_forecast(exact, exact.test), exact.test) < -12
    assert log_mse(true_forecast(exact, exact.test, "euler"), exact.test) > -3
    noisy = damped_pendulum(period=6.0, seed=1)
    floor = log_mse(true_forecast(noisy, noisy.test), noisy.test)
    assert 2 * math.log(0.01) < floor < -7


def test_scores_of_a_model(data):
    model = NeuralODE(**SMALL)
    scores = pendulum_scores(model, data)
    predicted = model.predict(data.test[:, 0], data.times)
    assert scores.log_mse == log_mse(predicted, data.test)
    assert scores.true_log_mse == log_mse(true_forecast(data, data.test), data.test)
    # The first weights are small: the model stays about where it begins, so its energy does not fall.
    loss = data.pendulum.energy(data.test)[:, 0].mean() - data.pendulum.energy(data.test).mean()
    assert scores.energy_error == pytest.approx(loss, rel=0.5)


def test_published_forecasts():
    assert published_forecast("Neural ODE") == (-2.84, 0.70)
    assert published_forecast("true ODE") == (-8.58, 0.20)
    assert published_forecast("APHYNITY (omega, damping)") == (-8.31, 0.30)
    assert published_forecast("Neural ODE", "wave") is None


def test_forecast_table():
    system = {"period": 6.0, "damping": 0.2, "noise": 0.01}
    results = [
        {"system": system, "runs": [{"log_mse": -3.0, "true_log_mse": -8.0}]},
        {"system": system, "runs": [{"log_mse": -4.0, "true_log_mse": -9.0}]},
        {"system": {**system, "period": 12.0}, "runs": [{"log_mse": -1.0, "true_log_mse": -7.0}]},
    ]
    assert forecast_table(results).splitlines()[2:] == [
        "| Neural ODE | 6 | 0.2 | 0.01 | 2 | -3.50 ± 0.71 | -2.84 ± 0.70 |",
        "| true ODE | 6 | 0.2 | 0.01 | 2 | -8.50 ± 0.71 | -8.58 ± 0.20 |",
        "| Neural ODE | 12 | 0.2 | 0.01 | 1 | -1.00 | -2.84 ± 0.70 |",
        "| true ODE | 12 | 0.2 | 0.01 | 1 | -7.00 | -8.58 ± 0.20 |",
    ]
