"""The simulated power, and the experiment on one long series."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
import pykernels.models.usrl_long_series as long_series
from pykernels.data import household_power
from pykernels.models.published import published_regression
from pykernels.models.usrl import LSTMEncoder, new_encoder
from pykernels.models.usrl_long_series import (
    DAY,
    QUARTER,
    LongSeriesSettings,
    Period,
    clusters,
    long_series_experiment,
    long_series_table,
    long_series_training,
    sliding_features,
)

DAY_MINUTES = 1440


def test_household_power_repeats_and_depends_on_the_seed():
    power = household_power(5000, seed=1)
    assert (power.shape, power.dtype) == ((5000,), np.float64)
    np.testing.assert_array_equal(power, household_power(5000, seed=1))
    assert (power != household_power(5000, seed=2)).mean() > 0.9
    assert household_power(1).shape == (1,)
    with pytest.raises(ValueError, match="n_samples must be at least 1, got 0"):
        household_power(0)


def test_household_power_has_days_weeks_years_and_events():
    power = household_power(2 * 365 * DAY_MINUTES)
    assert power.min() > 0
    assert 0.4 < power.mean() < 1.2
    hours = power.reshape(-1, 24, 60).mean(2)
    weekend = np.arange(len(hours)) % 7 >= 5
    weekdays, weekends = hours[~weekend].mean(0), hours[weekend].mean(0)
    assert weekdays[18:22].mean() > 1.5 * weekdays[13:16].mean()  # an evening peak
    assert weekdays[2:5].mean() < 0.8 * weekdays[13:16].mean()  # a quiet night
    assert weekdays[7] > weekends[7]  # weekends begin later
    assert weekends[10] > weekdays[10]
    year = hours.mean(1)[:364].reshape(-1, 28).mean(1)
    assert year[[0, 1, 12]].mean() > 1.5 * year[5:8].mean()  # winter and summer
    assert hours[214:235].mean() < 0.6 * hours[190:211].mean()  # holidays
    assert (power > 2.5).any()
    assert np.abs(np.diff(power)).max() > 1.5  # appliances are switched
    lag = [np.corrcoef(power[:-n], power[n:])[0, 1] for n in (1, DAY_MINUTES // 2, DAY_MINUTES)]
    assert lag[0] > 0.9
    assert lag[2] > 1.3 * lag[1]


@pytest.mark.parametrize("stride", [1, 7, 100])
@pytest.mark.parametrize("kind", ["cnn", "lstm"])
def test_sliding_features_are_those_of_each_window(stride, kind, monkeypatch):
    monkeypatch.setattr(long_series, "ENCODING_SAMPLES", 100)
    sizes = {"channels": 3, "depth": 2, "reduced_size": 5, "out_channels": 4}
    encoder = new_encoder(2, 0, dtype=torch.float64, **sizes) if kind == "cnn" else LSTMEncoder(2, 5, 4).double()
    series = torch.randn((2, 61), dtype=torch.float64)
    expected = [encoder(series[None, :, i : i + 20]) for i in range(0, 42, stride)]
    features = sliding_features(encoder, series, 20, stride)
    torch.testing.assert_close(features, torch.cat(expected).detach(), rtol=1e-12, atol=1e-14)


def test_raw_regressor_is_a_product_with_each_window():
    x, weight = torch.randn(100, dtype=torch.float64), torch.randn(13, dtype=torch.float64)
    starts = np.arange(20, 80, 3)
    expected = torch.stack([x[s : s + 13] @ weight for s in starts])
    torch.testing.assert_close(long_series._correlation(x, 13, starts)(weight), expected)


def test_regression_is_that_of_a_layer_trained_by_adam():
    torch.manual_seed(0)
    features, targets = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    examples = long_series._linear(features), targets

    def fitted(epochs):
        return long_series._regress(examples, examples, 4, 1e-2, LongSeriesSettings(epochs=epochs))

    design = np.column_stack([features, np.ones(50)])
    _, residual, *_ = np.linalg.lstsq(design, targets.numpy())
    result = fitted(2000)
    assert result.train_mse == pytest.approx(residual[0] / 50, rel=1e-6)
    assert result.test_mse == result.train_mse
    assert fitted(1).train_mse > 1.1 * result.train_mse


def small_settings(**options):
    sizes = {"channels": 3, "depth": 2, "reduced_size": 5, "out_channels": 4}
    periods = (Period("day", 24, 2, 1e-2, 1e-2), Period("quarter", 100, 10, 1e-2, 1e-2))
    defaults = {"n_train": 600, "n_steps": 5, "n_negatives": 2, "longest_window": 50, "epochs": 50, "periods": periods}
    return LongSeriesSettings(**{**sizes, **defaults, **options})


def signal(n=1500):
    random = np.random.default_rng(0)
    return 3 + np.sin(2 * np.pi * np.arange(n) / 180) + 0.1 * random.standard_normal(n)


def test_experiment():
    x, settings, said = signal(), small_settings(), []
    result = long_series_experiment(x, settings, report=said.append)
    assert (result.mean, result.std) == (pytest.approx(x.mean()), pytest.approx(x.std()))
    assert len(result.losses) == 5
    day, quarter = result.periods
    # Window and change within the part: starts 0, 2, ..., 552 of 600, and 600, 602, ..., 1452 of 1500.
    assert (day.n_train, day.n_test) == (277, 427)
    assert (quarter.n_train, quarter.n_test) == (41, 71)
    assert result.first_features.shape == (277, 4)
    assert result.first_windows[:3].tolist() == [0, 2, 4]
    part = torch.tensor((x[4:28] - x.mean()) / x.std(), dtype=torch.float32)[None, None]
    np.testing.assert_allclose(result.first_features[2], result.encoder(part)[0].detach(), rtol=1e-4, atol=1e-6)
    assert day.raw.test_mse < 0.5 * day.constant_mse  # a sine is easy to continue
    for period in result.periods:
        for regression in (period.features, period.raw):
            assert 0 < regression.test_mse < 10
            assert regression.seconds > 0
    assert json.loads(json.dumps(result.summary()))["periods"][0]["raw"]["test_mse"] == day.raw.test_mse
    assert said[0].startswith("step 5 of 5, loss ")
    again = long_series_experiment(x, settings)
    np.testing.assert_array_equal(again.first_features, result.first_features)
    assert again.periods[0].features.test_mse == day.features.test_mse
    table = long_series_table(result).splitlines()
    assert len(table) == 8
    assert table[2].startswith(f"| day | features | {day.features.test_mse:.4f} | ")
    assert table[2].endswith("| 0.0892 | 12 |")
    assert table[-1].startswith("| quarter | nothing | ")


def test_constant_predictor_and_targets():
    x = np.arange(300.0) ** 2
    settings = small_settings(n_train=100, periods=(Period("ten", 10, 5, 1e-2, 1e-2),), n_steps=1)
    result = long_series_experiment(x, settings)
    z = (x - x.mean()) / x.std()
    change = {s: z[s + 10 : s + 20].mean() - z[s : s + 10].mean() for s in range(0, 281, 5)}
    learned = np.mean([change[s] for s in range(0, 81, 5)])
    expected = np.mean([(change[s] - learned) ** 2 for s in range(100, 281, 5)])
    assert result.periods[0].constant_mse == pytest.approx(expected)


def test_a_training_may_be_given():
    x, settings = signal(), small_settings()
    training = long_series_training(x, settings)
    assert training.series.shape == (1, 1, 600)
    assert training.longest_window == 50
    assert not training.per_term
    training.step()
    result = long_series_experiment(x, settings, training=training)
    np.testing.assert_array_equal(result.losses, long_series_experiment(x, settings).losses)
    assert long_series_training(household_power(), LongSeriesSettings()).per_term


def test_published_settings():
    settings = LongSeriesSettings()
    assert (settings.n_train, settings.n_steps, settings.n_negatives, settings.batch_size) == (500_000, 400, 10, 1)
    assert (settings.channels, settings.reduced_size, settings.out_channels) == (30, 80, 160)
    assert (DAY.samples, QUARTER.samples) == (1440, 120_960)
    assert (DAY.features_rate, DAY.raw_rate) == (1e-3, 1e-4)
    assert (QUARTER.features_rate, QUARTER.raw_rate) == (1e-4, 1e-3)
    assert published_regression("quarter", "features") == (0.0726, 9)
    assert published_regression("week", "raw") is None


BAD = {
    "two dimensions": (np.zeros((2, 500)), {}, r"^series must have shape \(T,\), got \(2, 500\)"),
    "NaN": (np.full(1500, np.nan), {}, "^series has missing values"),
    "constant": (np.ones(1500), {}, "^series is constant"),
    "short first part": (signal(), {"n_train": 199}, "^n_train must leave two periods"),
    "short second part": (signal(), {"n_train": 1301}, "^n_train must leave two periods"),
    "no periods": (signal(), {"periods": ()}, "^periods must be one at least"),
}


@pytest.mark.parametrize(("series", "options", "message"), BAD.values(), ids=BAD)
def test_bad_series(series, options, message):
    for call in (long_series_training, long_series_experiment):
        with pytest.raises(ValueError, match=message):
            call(series, small_settings(**options))


def test_clusters():
    random = np.random.default_rng(0)
    labels = np.array([2, 2, 0, 1, 0] * 8)
    features = np.eye(3)[labels] * 10 + random.normal(size=(40, 3))
    found = clusters(features, 3)
    assert found[:5].tolist() == [0, 0, 1, 2, 1]  # numbered as they appear
    np.testing.assert_array_equal(found, np.array([1, 2, 0])[labels])
    assert len(set(clusters(random.normal(size=(50, 3))))) == 6
