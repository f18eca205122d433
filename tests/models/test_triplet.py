"""Loss, sampling and training of the triplet-loss encoder."""

import copy
import json
import math
from itertools import islice

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from pykernels.models._plain import PlainCausalCNNEncoder
from pykernels.models.usrl import (
    EncoderTraining,
    Windows,
    encode,
    new_encoder,
    published_steps,
    sample_windows,
    shuffled_batches,
    train_encoder,
    triplet_loss,
    window_loss,
)
from pykernels.nn import CausalCNNEncoder

TINY = {"channels": 3, "depth": 2, "reduced_size": 5, "out_channels": 4}
SMALL = {"channels": 8, "depth": 3, "reduced_size": 16, "out_channels": 16}


def direct_loss(anchor, positive, negatives):
    """Equation by equation, in Python's floats."""

    def log_sigmoid(z):
        return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))

    total = 0.0
    for b in range(len(anchor)):
        total -= log_sigmoid(float(anchor[b] @ positive[b]))
        for negative in negatives:
            total -= log_sigmoid(-float(anchor[b] @ negative[b])) / len(negatives)
    return total / len(anchor)


@pytest.mark.parametrize(("batch", "n_negatives"), [(1, 1), (4, 3), (10, 10)])
def test_loss_is_the_equation(batch, n_negatives):
    generator = torch.Generator().manual_seed(1)
    anchor, positive = torch.randn(2, batch, 6, generator=generator, dtype=torch.float64)
    negatives = torch.randn(n_negatives, batch, 6, generator=generator, dtype=torch.float64)
    expected = direct_loss(anchor.numpy(), positive.numpy(), negatives.numpy())
    assert triplet_loss(anchor, positive, negatives).item() == pytest.approx(expected, rel=1e-12)


def test_loss_of_large_features_is_finite_and_has_a_gradient():
    anchor = torch.full((2, 3), 100.0, requires_grad=True)
    loss = triplet_loss(anchor, -torch.full((2, 3), 100.0), torch.full((4, 2, 3), 100.0))
    assert loss.item() == pytest.approx(60_000)
    loss.backward()
    assert torch.isfinite(anchor.grad).all()
    assert anchor.grad.abs().min() > 1


def test_loss_gradients():
    generator = torch.Generator().manual_seed(2)
    features = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4), (3, 4), (2, 3, 4))]
    assert torch.autograd.gradcheck(triplet_loss, [f.requires_grad_() for f in features])


def draw(seed, batch_size=6, n_series=9, series_length=12, n_negatives=4):
    return sample_windows(batch_size, n_series, series_length, n_negatives, np.random.default_rng(seed))


@pytest.mark.parametrize("series_length", [1, 2, 12])
def test_windows_lie_inside(series_length):
    for seed in range(300):
        w = draw(seed, series_length=series_length)
        assert 1 <= w.length <= w.anchor_length <= series_length
        assert w.anchor_start.shape == w.positive_start.shape == (6,)
        assert w.negative_series.shape == w.negative_start.shape == (4, 6)
        assert (w.anchor_start >= 0).all()
        assert (w.anchor_start + w.anchor_length <= series_length).all()
        assert (w.positive_start >= w.anchor_start).all()
        assert (w.positive_start + w.length <= w.anchor_start + w.anchor_length).all()
        assert (w.negative_start >= 0).all()
        assert (w.negative_start + w.length <= series_length).all()
        assert ((w.negative_series >= 0) & (w.negative_series < 9)).all()


def frequencies(values, count):
    return np.bincount(np.ravel(values), minlength=count) / np.size(values)


def test_windows_are_uniform():
    draws = [draw(seed, batch_size=4, n_series=5, series_length=6, n_negatives=3) for seed in range(6000)]
    assert frequencies([w.length - 1 for w in draws], 6) == pytest.approx(1 / 6, abs=0.02)
    given = [w for w in draws if w.length == 4]
    assert frequencies([w.anchor_length - 4 for w in given], 3) == pytest.approx(1 / 3, abs=0.05)
    given = [w for w in draws if w.anchor_length == 4]
    assert frequencies([w.anchor_start for w in given], 3) == pytest.approx(1 / 3, abs=0.05)
    given = [w for w in draws if (w.anchor_length, w.length) == (5, 3)]
    assert frequencies([w.positive_start - w.anchor_start for w in given], 3) == pytest.approx(1 / 3, abs=0.07)
    given = [w for w in draws if w.length == 3]
    assert frequencies([w.negative_start for w in given], 4) == pytest.approx(1 / 4, abs=0.03)
    assert frequencies([w.negative_series for w in draws], 5) == pytest.approx(1 / 5, abs=0.01)


def test_negatives_are_drawn_one_by_one_with_replacement_and_may_be_the_own_series():
    w = draw(0, batch_size=10, n_series=10, series_length=500, n_negatives=10)
    assert w.length < 450
    for drawn in (w.negative_series, w.negative_start):
        assert all(len(set(line)) > 1 for line in (*drawn, *drawn.T))
    assert (w.negative_series == np.arange(10)).any()
    assert all(len(set(column)) < 10 for column in w.negative_series.T)


def test_batches_cover_every_epoch_in_a_new_order():
    epochs = []
    batches = shuffled_batches(23, 10, np.random.default_rng(0))
    for _ in range(3):
        epoch = list(islice(batches, 3))
        assert [len(b) for b in epoch] == [10, 10, 3]
        assert sorted(np.concatenate(epoch)) == list(range(23))
        epochs.append(tuple(np.concatenate(epoch)))
    assert len(set(epochs)) == 3


def test_window_loss_takes_the_windows_it_is_given():
    series = torch.randn((5, 2, 9), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    encoder = new_encoder(2, 0, dtype=torch.float64, **TINY)
    windows = Windows(
        anchor_length=6,
        length=2,
        anchor_start=np.array([0, 3]),
        positive_start=np.array([4, 3]),
        negative_series=np.array([[1, 0], [4, 4], [2, 3]]),
        negative_start=np.array([[7, 0], [1, 5], [6, 6]]),
    )
    loss = window_loss(encoder, series, np.array([4, 1]), windows)

    def features(index, start, length):
        return encoder(series[index : index + 1, :, start : start + length])[0].detach().numpy()

    anchor = [features(4, 0, 6), features(1, 3, 6)]
    positive = [features(4, 4, 2), features(1, 3, 2)]
    negatives = [
        [features(1, 7, 2), features(0, 0, 2)],
        [features(4, 1, 2), features(4, 5, 2)],
        [features(2, 6, 2), features(3, 6, 2)],
    ]
    assert loss.item() == pytest.approx(direct_loss(anchor, positive, negatives), rel=1e-12)


def test_published_number_of_steps():
    assert [published_steps(k) for k in (1, 2, 5, 9, 10, 20)] == [1500, 1500, 1500, 1500, 2000, 2000]


def levels(n=12, length=30):
    """Noise around -1 and around +1, one channel."""
    rng = np.random.default_rng(5)
    series = rng.normal(size=(n, 1, length)) * 0.1 + np.where(np.arange(n) % 2, 1, -1)[:, None, None]
    return torch.tensor(series, dtype=torch.float32)


def train_small(seed=0, **options):
    encoder = new_encoder(1, seed, **SMALL)
    seen = []
    losses = train_encoder(
        encoder,
        levels(),
        n_negatives=2,
        generator=np.random.default_rng(seed),
        on_step=lambda step, loss: seen.append((step, loss)),
        **({"n_steps": 200, "learning_rate": 1e-2} | options),
    )
    return encoder, losses, seen


def test_training_lowers_the_loss():
    encoder, losses, seen = train_small()
    assert losses.shape == (200,)
    assert seen == [(i + 1, loss) for i, loss in enumerate(losses)]
    # Useless features cost 2 log 2 = 1.39; those that tell the levels apart, whatever the draw, -log(2/3) - log(1/3)/2.
    assert losses[0] > 1.3
    assert 0.8 < losses[-50:].mean() < 1.25
    before = new_encoder(1, 0, **SMALL)
    assert all((p != q).any() for p, q in zip(encoder.parameters(), before.parameters(), strict=True))


def test_training_repeats_bit_by_bit_and_depends_on_the_seed():
    first, losses, _ = train_small(0, n_steps=5)
    second, again, _ = train_small(0, n_steps=5)
    _, other, _ = train_small(1, n_steps=5)
    assert losses.tolist() == again.tolist()
    assert losses.tolist() != other.tolist()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def small_training(n_steps=12, series=None, **options):
    generator = options.pop("generator", np.random.default_rng(0))
    encoder = new_encoder(1, 0, **SMALL)
    series = levels() if series is None else series
    return EncoderTraining(
        encoder, series, n_negatives=2, generator=generator, n_steps=n_steps, batch_size=5, **options
    )


def finished(training):
    while not training.done:
        training.step()
    return training


def assert_same_state(training, other):
    (tensors, values), (expected, wanted) = training.state(), other.state()
    assert {**values, "seconds": 0} == {**wanted, "seconds": 0}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 12])  # an epoch has three
def test_a_restored_training_goes_on_bit_by_bit(steps):
    uninterrupted = finished(small_training())
    interrupted = small_training()
    for _ in range(steps):
        interrupted.step()
    tensors, values = interrupted.state()
    kept = copy.deepcopy((tensors, values))
    finished(interrupted)  # must not reach into the state
    assert values == kept[1]
    assert all(torch.equal(tensors[name], kept[0][name]) for name in tensors)

    restored = small_training(generator=np.random.default_rng(99))
    if steps:
        restored.step()  # whatever it did is forgotten
    restored.restore(tensors, json.loads(json.dumps(values)))
    assert restored.steps_done == steps
    assert restored.encoder.training == (steps < 12)
    assert_same_state(finished(restored), uninterrupted)
    assert_same_state(interrupted, uninterrupted)
    assert all(torch.equal(tensors[name], kept[0][name]) for name in tensors)


def test_a_training_counts_its_steps_and_its_time():
    training = small_training(3)
    assert (training.steps_done, training.n_steps, training.seconds, training.done) == (0, 3, 0, False)
    assert training.encoder.training
    losses = [training.step() for _ in range(3)]
    assert training.losses.tolist() == losses
    assert training.done
    assert training.seconds > 0
    assert not training.encoder.training
    with pytest.raises(RuntimeError, match="all 3 steps of this training are done"):
        training.step()


@pytest.mark.parametrize("bits", [np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_any_bit_generator_can_be_saved(bits):
    training = small_training(4, generator=np.random.Generator(bits(1)))
    training.step()
    tensors, values = training.state()
    restored = small_training(4, generator=np.random.Generator(bits(2)))
    restored.restore(tensors, json.loads(json.dumps(values)))
    assert_same_state(finished(restored), finished(training))


def test_a_state_of_another_training_is_refused():
    training = small_training()
    training.step()
    tensors, values = training.state()
    for other in (small_training(13), small_training(learning_rate=1e-2), small_training(series=levels(13))):
        before = other.state()
        with pytest.raises(ValueError, match=r"^the saved training has other settings: .*'n_steps': 12"):
            other.restore(tensors, values)
        assert other.state()[1] == before[1]
    other = small_training()
    for name, tensor in (("encoder.linear.bias", tensors["encoder.linear.bias"][:1]), ("adam.linear.bias.step", None)):
        wrong = {key: value for key, value in {**tensors, name: tensor}.items() if value is not None}
        with pytest.raises(ValueError, match=f"^the saved training has no fitting tensors {name}$"):
            other.restore(wrong, values)
    assert_same_state(other, small_training())


def test_training_in_float32_follows_float64():
    single = new_encoder(1, 0, **SMALL)
    double = new_encoder(1, 0, dtype=torch.float64, **SMALL)
    double.load_state_dict(single.state_dict())
    losses = [
        train_encoder(encoder, series, n_negatives=2, generator=np.random.default_rng(0), n_steps=5)
        for encoder, series in ((single, levels()), (double, levels().double()))
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert next(double.parameters()).dtype == torch.float64


def test_published_number_of_steps_is_the_default():
    _, losses, _ = train_small(n_steps=None, batch_size=2)
    assert len(losses) == 1500


def test_training_that_diverges_says_so():
    with pytest.raises(RuntimeError, match="smaller learning_rate"):
        train_small(learning_rate=1e30)


def test_a_new_encoder_leaves_the_random_numbers_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    weights = next(new_encoder(1, 0, **TINY).parameters())
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weights, next(new_encoder(1, 0, **TINY).parameters()))
    assert not torch.equal(weights, next(new_encoder(1, 1, **TINY).parameters()))


def test_encode_is_the_encoder_in_parts():
    encoder = new_encoder(1, 0, dtype=torch.float64, **TINY)
    series = levels(n=103).double()
    torch.testing.assert_close(encode(encoder, series), encoder(series).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [{}, {**TINY, "kernel_size": 2}], ids=["published", "tiny"])
def test_plain_encoder_is_the_same_model(sizes):
    encoder = CausalCNNEncoder(2, dtype=torch.float64, **sizes)
    plain = PlainCausalCNNEncoder(2, dtype=torch.float64, **sizes)
    assert list(plain.state_dict()) == list(encoder.state_dict())
    plain.load_state_dict(encoder.state_dict())
    x = torch.randn((2, 2, 37), dtype=torch.float64)
    y, expected = encoder(x), plain(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    gradients = [
        torch.autograd.grad(out.square().sum(), m.parameters()) for out, m in ((y, encoder), (expected, plain))
    ]
    for gradient, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-9)
