"""Streaming: one sample at a time gives what whole series give, bit for bit on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pykernels
from pykernels import ConvState, causal_conv1d, causal_conv1d_step
from pykernels.nn import CausalCNNEncoder
from pykernels.ops import BlockWeights, CausalConvStream, causal_conv_stack

from .cases import error


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


#: in channels, out channels, groups, kernel size, dilation, activation
CONVOLUTIONS = [
    (3, 7, 1, 3, 4, "leaky_relu"),
    (40, 40, 1, 3, 16, "gelu"),
    (8, 8, 8, 4, 1, "silu"),
    (6, 9, 3, 2, 5, "tanh"),
    (70, 50, 1, 3, 1, "relu"),
    (4, 8, 4, 3, 2, "swish"),
    (5, 5, 1, 1, 1, None),
    (1, 1, 1, 1, 7, None),
]


@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_steps_have_the_bits_of_the_series(capability, dtype, convolution, batch):
    channels, out_channels, groups, kernel_size, dilation, activation = convolution
    length = 40
    x, w = (
        random(batch, channels, length, dtype=dtype),
        random(out_channels, channels // groups, kernel_size, dtype=dtype),
    )
    bias, residual = random(out_channels, dtype=dtype), random(batch, out_channels, length, dtype=dtype)
    past = random(batch, channels, (kernel_size - 1) * dilation, dtype=dtype)
    options = {
        "dilation": dilation,
        "groups": groups,
        "activation": activation,
        "residual_before_activation": batch == 3,
        "backend": "cpu",
    }
    expected, final = causal_conv1d(
        x, w, bias, residual=residual, initial_state=past, return_final_state=True, **options
    )
    state = ConvState(past)
    steps = [
        causal_conv1d_step(x_t, state, w, bias, residual=r_t, **options)
        for x_t, r_t in zip(x.unbind(2), residual.unbind(2), strict=True)
    ]
    assert torch.equal(torch.stack(steps, 2), expected)
    assert torch.equal(state.past, final)
    assert state.position == length


def test_reference_steps():
    x, w, bias = random(2, 3, 20), random(4, 3, 3), random(4)
    expected = causal_conv1d(x, w, bias, dilation=2, activation="silu", backend="reference")
    state = ConvState.zeros(2, 3, 3, 2, dtype=torch.float64)
    steps = [
        causal_conv1d_step(x_t, state, w, bias, dilation=2, activation="silu", backend="reference")
        for x_t in x.unbind(2)
    ]
    assert error(torch.stack(steps, 2), expected) <= 1e-14


def test_a_changed_weight_is_noticed():
    w, state = random(4, 3, 2), ConvState.zeros(1, 3, 2, dtype=torch.float64)
    x = random(1, 3)
    before = causal_conv1d_step(x, state.clone(), w)
    first = state.clone()
    causal_conv1d_step(x, first, w)
    w.mul_(2)
    assert error(causal_conv1d_step(x, ConvState.zeros(1, 3, 2, dtype=torch.float64), w), 2 * before) <= 1e-15
    expected = causal_conv1d(torch.stack([x, x], 2), w)[:, :, 1]
    assert error(causal_conv1d_step(x, first, w), expected) <= 1e-14
    with torch.inference_mode():
        other = random(4, 3, 2, seed=5)
        for _ in range(2):
            causal_conv1d_step(x, state, other)
            other.mul_(3)


def test_states_are_independent():
    past = random(2, 3, 4)
    state = ConvState(past)
    copy = state.clone()
    causal_conv1d_step(random(2, 3), state, random(4, 3, 3), dilation=2)
    assert torch.equal(copy.past, past)
    assert torch.equal(ConvState(state.past).past, state.past)
    assert "position=1" in repr(state)


def test_step_arguments():
    x, w, state = random(2, 3), random(4, 3, 3), ConvState.zeros(2, 3, 3, dtype=torch.float64)
    for error_type, match, call in [
        (ValueError, "^x_t must", lambda: causal_conv1d_step(x[0], state, w)),
        (TypeError, "^state must", lambda: causal_conv1d_step(x, torch.zeros(2, 3, 2), w)),
        (ValueError, r"^state must have shape \(2, 3, 4\)", lambda: causal_conv1d_step(x, state, w, dilation=2)),
        (TypeError, "^state must have the dtype", lambda: causal_conv1d_step(x.float(), state, w.float())),
        (ValueError, "^weight", lambda: causal_conv1d_step(x, state, w[:, :2])),
        (ValueError, "^bias", lambda: causal_conv1d_step(x, state, w, random(3))),
        (ValueError, "^residual", lambda: causal_conv1d_step(x, state, w, residual=random(2, 3))),
        (ValueError, "^activation", lambda: causal_conv1d_step(x, state, w, activation="selu")),
        (RuntimeError, "no derivative", lambda: causal_conv1d_step(x.clone().requires_grad_(), state, w)),
        (ValueError, "^past must", lambda: ConvState(x)),
    ]:
        with pytest.raises(error_type, match=match):
            call()
    assert state.position == 0


BLOCKS = [
    BlockWeights(random(5, 2, 3), random(5), random(4, 5, 3), None, random(4, 2, 1), random(4, seed=3)),
    BlockWeights(random(6, 4, 2), None, random(4, 6, 3), random(4, seed=4)),
    BlockWeights(random(4, 4, 1), random(4), random(18, 4, 1), random(18), random(18, 4, 1)),
]
DILATIONS = [1, 3, 2]


@pytest.mark.parametrize("batch", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_stream_has_the_bits_of_the_stack(capability, dtype, batch):
    blocks = [BlockWeights(*(None if t is None else t.to(dtype) for t in block)) for block in BLOCKS]
    x, eye = random(batch, 2, 30, dtype=dtype), torch.eye(18, dtype=dtype)
    stream = CausalConvStream(blocks, DILATIONS, eye, None, batch_size=batch)
    for _ in range(2):
        for t in range(1, 21):
            features = stream.step(x[:, :, t - 1])
            if t % 5 == 0:
                expected = causal_conv_stack(x[:, :, :t], blocks, DILATIONS, pool=True, backend="cpu")
                assert torch.equal(features, expected)
        expected = causal_conv_stack(x, blocks, DILATIONS, pool=True, backend="cpu")
        assert torch.equal(stream.extend(x[:, :, 20:]), expected)
        assert stream.time == 30
        stream.reset()


def test_stream_of_the_encoder():
    torch.manual_seed(0)
    encoder = CausalCNNEncoder(3, channels=6, depth=3, reduced_size=10, out_channels=7)
    x = random(4, 3, 50, dtype=torch.float32)
    stream = encoder.stream(4)
    with torch.no_grad():
        expected = encoder(x)
        for parameter in encoder.parameters():
            parameter.zero_()
    assert error(stream.extend(x), expected) <= 1e-6
    assert stream.extend(x[:, :, 1:].flip(2)).shape == (4, 7)


def test_stream_keeps_nan_and_forgets_on_reset():
    stream = CausalConvStream(BLOCKS, DILATIONS, torch.eye(18, dtype=torch.float64), None, batch_size=2)
    x = random(2, 2, 10)
    x[0, 1, 4] = torch.nan
    features = stream.extend(x)
    assert features[0].isnan().all()
    assert features[1].isfinite().all()
    stream.extend(x[:, :, :3])
    assert torch.equal(stream.step(x[:, :, 0]).isnan(), features.isnan())
    stream.reset()
    assert stream.extend(x[:, :, :4]).isfinite().all()


def test_stream_threads_do_not_change_bits():
    x, features = random(9, 2, 12), []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            stream = CausalConvStream(BLOCKS, DILATIONS, torch.eye(18, dtype=torch.float64), None, batch_size=9)
            features.append(stream.extend(x))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*features)


def test_stream_arguments():
    encoder = CausalCNNEncoder(2, channels=4, depth=1, reduced_size=5, out_channels=3)
    stream = encoder.stream(2)
    for error_type, match, call in [
        (ValueError, "^batch_size", lambda: encoder.stream(0)),
        (ValueError, "^x_t must", lambda: stream.step(torch.zeros(2, 2, 1))),
        (ValueError, "^x_t must have 2 series of 2", lambda: stream.step(torch.zeros(3, 2))),
        (ValueError, "^x must", lambda: stream.extend(torch.zeros(2, 2))),
        (ValueError, "^x must", lambda: stream.extend(torch.zeros(2, 2, 0))),
        (TypeError, "^x must be torch.float32", lambda: stream.extend(torch.zeros(2, 2, 3).double())),
        (RuntimeError, "stream cannot run", lambda: encoder.half().stream()),
    ]:
        with pytest.raises(error_type, match=match):
            call()
    assert stream.time == 0


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("tile_bytes", [1 << 7, 1 << 10, 3 << 10, 40 << 10])
def test_a_stack_without_backward_is_taken_in_tiles_with_the_same_bits(capability, monkeypatch, tile_bytes, pool):
    x = random(5, 2, 150)
    x[3, 1, 70] = torch.nan
    expected = causal_conv_stack(x.requires_grad_(), BLOCKS, DILATIONS, pool=pool, backend="cpu").detach()
    monkeypatch.setattr("pykernels.ops.causal_conv.stack._TILE_BYTES", tile_bytes)
    actual = causal_conv_stack(x.detach(), BLOCKS, DILATIONS, pool=pool, backend="cpu")
    assert torch.equal(actual.nan_to_num(1e9), expected.nan_to_num(1e9))
    assert expected.isnan().any()


def test_public_names():
    assert {"ConvState", "causal_conv1d_step"} <= set(pykernels.__all__)
