"""Loss, sampling and training of the triplet-loss encoder."""

import copy
import json
import math
from itertools import islice

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from pykernels.models import _triplet
from pykernels.models._plain import PlainCausalCNNEncoder
from pykernels.models.usrl import (
    EncoderTraining,
    Ragged,
    Windows,
    encode,
    n_channels,
    new_encoder,
    published_steps,
    ragged_window_loss,
    sample_ragged_windows,
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


def test_windows_may_be_capped():
    for seed in range(200):
        w = sample_windows(6, 9, 30, 4, np.random.default_rng(seed), longest_window=5)
        assert 1 <= w.length <= w.anchor_length <= 5
        assert sample_windows(6, 9, 4, 4, np.random.default_rng(seed), longest_window=5).anchor_length <= 4
    starts = [sample_windows(1, 1, 30, 1, np.random.default_rng(i), 5).anchor_start[0] for i in range(400)]
    assert max(starts) >= 25  # they lie in the whole series
    np.testing.assert_equal(draw(3), sample_windows(6, 9, 12, 4, np.random.default_rng(3), longest_window=12))


def draw_ragged(seed, lengths=(1, 2, 3, 9, 5), batch=(3, 0, 4), n_negatives=4, **options):
    generator = np.random.default_rng(seed)
    return sample_ragged_windows(np.array(batch), np.array(lengths), n_negatives, generator, **options)


def test_ragged_windows_lie_inside():
    lengths = np.array((1, 2, 3, 9, 5))
    for seed in range(300):
        w = draw_ragged(seed)
        assert w.series.shape == w.start.shape == w.length.shape == (6, 3)
        assert w.series[:2].tolist() == [[3, 0, 4]] * 2
        assert (w.length >= 1).all()
        assert (w.start >= 0).all()
        assert (w.start + w.length <= lengths[w.series]).all()
        assert (w.start[1] >= w.start[0]).all()
        assert (w.start[1] + w.length[1] <= w.start[0] + w.length[0]).all()
        assert (draw_ragged(seed, longest_window=2).length <= 2).all()


def test_ragged_windows_are_uniform_and_of_each_element_by_itself():
    draws = [draw_ragged(seed, lengths=(3, 6), batch=(1, 1)) for seed in range(6000)]
    assert frequencies([w.length[1] - 1 for w in draws], 6) == pytest.approx(1 / 6, abs=0.02)
    assert np.mean([w.length[1, 0] == w.length[1, 1] for w in draws]) == pytest.approx(1 / 6, abs=0.02)
    given = [w.length[0, 0] - 4 for w in draws if w.length[1, 0] == 4]
    assert frequencies(given, 3) == pytest.approx(1 / 3, abs=0.05)
    given = [w.start[0, 0] for w in draws if w.length[0, 0] == 4]
    assert frequencies(given, 3) == pytest.approx(1 / 3, abs=0.05)
    given = [w.start[1, 0] - w.start[0, 0] for w in draws if w.length[0, 0] - w.length[1, 0] == 2]
    assert frequencies(given, 3) == pytest.approx(1 / 3, abs=0.05)
    assert frequencies([w.series[2:] for w in draws], 2) == pytest.approx(1 / 2, abs=0.01)
    series, start, length = (np.stack([w[i][2:] for w in draws]) for i in range(3))
    assert frequencies(length[series == 0] - 1, 3) == pytest.approx(1 / 3, abs=0.01)
    assert frequencies(length[series == 1] - 1, 6) == pytest.approx(1 / 6, abs=0.01)
    assert frequencies(start[(series == 1) & (length == 4)], 3) == pytest.approx(1 / 3, abs=0.02)


def ragged_series(lengths=(3, 9, 1, 6, 4), channels=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    parts = [torch.randn((channels, n), generator=generator, dtype=dtype) for n in lengths]
    return parts, Ragged.of(parts)


def test_ragged_series():
    parts, ragged = ragged_series()
    assert len(ragged) == 5
    assert ragged.lengths.tolist() == [3, 9, 1, 6, 4]
    assert ragged.dtype == ragged.to("cpu").dtype == torch.float64
    packed, offsets = ragged.cut(np.array([1, 3, 1]), np.array([2, 0, 5]), np.array([4, 6, 1]))
    assert (offsets.dtype, offsets.tolist()) == (torch.int32, [0, 4, 10, 11])
    assert torch.equal(packed, torch.cat([parts[1][:, 2:6], parts[3], parts[1][:, 5:6]], 1)[None])
    packed, offsets = ragged.take(np.array([4, 0]))
    assert torch.equal(packed, torch.cat([parts[4], parts[0]], 1)[None])
    assert offsets.tolist() == [0, 4, 7]


def one_by_one(encoder, parts, windows):
    """The loss, with a call of the encoder for every window."""
    shape = windows.series.shape
    features = torch.stack(
        [
            encoder(parts[i][None, :, start : start + length])[0]
            for i, start, length in zip(*(w.ravel() for w in windows), strict=True)
        ]
    ).view(*shape, -1)
    return triplet_loss(features[0], features[1], features[2:])


@pytest.mark.parametrize("kind", [CausalCNNEncoder, PlainCausalCNNEncoder])
def test_ragged_loss_and_gradients_are_those_of_one_window_at_a_time(kind):
    parts, ragged = ragged_series()
    encoder = kind(2, dtype=torch.float64, **TINY)
    for seed in range(5):
        windows = sample_ragged_windows(np.array([1, 4, 0]), ragged.lengths, 3, np.random.default_rng(seed))
        loss, expected = ragged_window_loss(encoder, ragged, windows), one_by_one(encoder, parts, windows)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        gradients, wanted = (torch.autograd.grad(value, list(encoder.parameters())) for value in (loss, expected))
        for gradient, reference in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("n_negatives", [1, 5])
def test_backward_per_term_is_the_backward_of_the_loss(ragged, n_negatives):
    series = ragged_series()[1] if ragged else torch.randn((5, 2, 9), dtype=torch.float64)
    losses, gradients = [], []
    for per_term in (False, True):
        encoder = new_encoder(2, 0, dtype=torch.float64, **TINY)
        training = EncoderTraining(
            encoder,
            series,
            n_negatives=n_negatives,
            generator=np.random.default_rng(0),
            n_steps=3,
            batch_size=3,
            per_term=per_term,
        )
        losses.append([training.step() for _ in range(3)])
        gradients.append([p.grad for p in encoder.parameters()])
    np.testing.assert_allclose(*losses, rtol=1e-12)
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


class Held:
    """A tensor kept for the backward, and the bytes of all of them."""

    now = most = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Held.now += tensor.nbytes
        Held.most = max(Held.most, Held.now)

    def __del__(self):
        Held.now -= self.tensor.nbytes


@pytest.mark.parametrize("ragged", [False, True])
def test_backward_per_term_keeps_one_evaluation_at_a_time(ragged):
    series = torch.zeros((10, 1, 2000))
    series = Ragged.of(list(series)) if ragged else series
    encoder = PlainCausalCNNEncoder(1, **TINY)

    def held(act):
        Held.now = Held.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            act()
        return Held.most

    options = {"n_negatives": 9, "generator": np.random.default_rng(0), "n_steps": 4}
    one = held(lambda: encoder(torch.zeros((10, 1, 2000))).sum().backward())
    together = EncoderTraining(encoder, series, per_term=False, **options)
    term_by_term = EncoderTraining(encoder, series, per_term=True, **options)
    assert max(held(together.step) for _ in range(4)) > 3 * one
    assert max(held(term_by_term.step) for _ in range(4)) <= 1.01 * one


def test_backward_per_term_is_automatic_for_long_multivariate_series():
    def per_term(series):
        return EncoderTraining(
            new_encoder(n_channels(series), 0, **TINY), series, n_negatives=1, generator=np.random.default_rng(0)
        ).per_term

    assert _triplet.LONG_SERIES == 10_000
    assert not per_term(torch.zeros((1, 2, 10_000)))
    assert per_term(torch.zeros((1, 2, 10_001)))
    assert not per_term(torch.zeros((1, 1, 10_001)))
    assert per_term(Ragged.of([torch.zeros((2, 5)), torch.zeros((2, 10_001))]))
    assert not per_term(Ragged.of([torch.zeros((2, 9_000)), torch.zeros((2, 9_001))]))


def test_ragged_training():
    parts = [series[:, : 5 + 2 * i] for i, series in enumerate(levels())]
    encoder = new_encoder(1, 0, **SMALL)
    options = {"n_negatives": 2, "generator": np.random.default_rng(0), "n_steps": 150, "learning_rate": 1e-2}
    losses = train_encoder(encoder, Ragged.of(parts), **options)
    assert losses[0] > 1.3
    assert losses[-50:].mean() < 1.25


def test_encode_ragged_series_is_the_encoder_one_by_one(monkeypatch):
    parts, ragged = ragged_series(lengths=[1 + 13 * i % 37 for i in range(40)])
    encoder = new_encoder(2, 0, dtype=torch.float64, **TINY)
    expected = torch.cat([encoder(part[None]) for part in parts]).detach()
    for limit in (1, 50, 300, 10**6):
        monkeypatch.setattr(_triplet, "ENCODING_SAMPLES", limit)
        sizes = [len(part) for part in _triplet._parts(ragged.lengths)]
        assert sum(sizes) == 40
        assert (len(sizes) == 1) == (limit == 10**6)
        torch.testing.assert_close(encode(encoder, ragged), expected, rtol=1e-12, atol=1e-14)


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


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 12])  # an epoch has three
def test_a_restored_training_goes_on_bit_by_bit(steps, ragged):
    options = {"series": Ragged.of([series[:, : 9 + i] for i, series in enumerate(levels())])} if ragged else {}
    uninterrupted = finished(small_training(**options))
    interrupted = small_training(**options)
    for _ in range(steps):
        interrupted.step()
    tensors, values = interrupted.state()
    kept = copy.deepcopy((tensors, values))
    finished(interrupted)  # must not reach into the state
    assert values == kept[1]
    assert all(torch.equal(tensors[name], kept[0][name]) for name in tensors)

    restored = small_training(generator=np.random.default_rng(99), **options)
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
    assert small_training(n_steps=None).n_steps == 1500


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
