"""The layers and the encoder."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import pykernels
from pykernels.models._plain import PlainCausalCNNEncoder
from pykernels.nn import CausalCNNEncoder, CausalConv1d, CausalConvBlock

from .cases import COMPILED, RUNNERS, Runner, activate, assert_agree, error

EPS = torch.finfo(torch.float32).eps
SMALL = {"channels": 6, "depth": 3, "reduced_size": 9, "out_channels": 5}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize(
    ("kernel_size", "dilation", "bias"), [(3, 1, True), (2, 5, False), (1, 7, True), (5, 30, True)]
)
def test_convolution_is_a_padded_conv1d(runner, kernel_size, dilation, bias):
    torch.manual_seed(0)
    usual = nn.Conv1d(3, 4, kernel_size, dilation=dilation, bias=bias, dtype=torch.float64)
    for activation in (None, "relu", "leaky_relu", "tanh"):
        layer = CausalConv1d(
            3, 4, kernel_size, dilation=dilation, bias=bias, dtype=torch.float64, activation=activation,
            negative_slope=0.2, backend=runner.use(),
        )  # fmt: skip
        layer.load_state_dict(usual.state_dict())
        x, residual = random(2, 3, 50).requires_grad_(), random(2, 4, 50, seed=1)
        expected = activate(usual(F.pad(x, ((kernel_size - 1) * dilation, 0))), activation, 0.2) + residual
        y = layer(x, residual)
        assert error(y, expected) <= 1e-12
        assert error(layer(x), expected - residual) <= 1e-12
        gradients = [
            torch.autograd.grad(t.sin().sum(), [x, *m.parameters()]) for t, m in ((y, layer), (expected, usual))
        ]
        for actual, e in zip(*gradients, strict=True):
            assert error(actual, e) <= 1e-10
        assert error(layer(x[1].detach(), residual[1]), y[1]) <= 1e-14
        assert layer(x[1].detach()).shape == (4, 50)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_modes_of_the_convolution(runner, groups):
    """Groups, and what ``forward`` passes on."""
    torch.manual_seed(0)
    usual = nn.Conv1d(4, 8, 3, dilation=2, groups=groups, dtype=torch.float64)
    layer = CausalConv1d(
        4, 8, 3, dilation=2, groups=groups, dtype=torch.float64, activation="gelu", residual_before_activation=True,
        backend=runner.use(),
    )  # fmt: skip
    layer.load_state_dict(usual.state_dict())
    x, residual, state = random(2, 4, 50), random(2, 8, 50, seed=1), random(2, 4, 4, seed=2)
    expected = F.gelu(usual(torch.cat([state, x], 2)) + residual)
    y, final = layer(x, residual, initial_state=state, return_final_state=True)
    assert error(y, expected) <= 1e-12
    assert torch.equal(final, x[:, :, -4:])
    y = layer(x, residual, initial_state=state, lengths=torch.tensor([50, 7]))
    assert error(y[0], expected[0]) <= 1e-12
    assert error(y[1, :, :7], expected[1, :, :7]) <= 1e-12
    assert (y[1, :, 7:] == 0).all()
    packed = torch.cat([*x], 1)[None], torch.cat([*residual], 1)[None]
    y = layer(*packed, initial_state=state, cu_seqlens=torch.tensor([0, 50, 100], dtype=torch.int32))
    assert error(y, torch.cat([*expected], 1)[None]) <= 1e-12
    plain = F.gelu(usual(F.pad(x[0], (4, 0))) + residual[0])
    assert error(layer(x[0], residual[0]), plain) <= 1e-12
    with pytest.raises(ValueError, match=r"initial_state: input must have shape \(B, C, T\), got \(4, 50\)"):
        layer(x[0], initial_state=state)


def test_convolution_has_the_constructor_and_the_state_of_conv1d():
    ours, usual = (list(inspect.signature(c).parameters.values()) for c in (CausalConv1d, nn.Conv1d))
    assert [(p.name, p.default) for p in ours[: len(usual)]] == [(p.name, p.default) for p in usual]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(usual) :])
    torch.manual_seed(0)
    layer = CausalConv1d(3, 4, 5, 1, 0, 2, 1, False, "zeros", "cpu", torch.float64)
    torch.manual_seed(0)
    conv = nn.Conv1d(3, 4, 5, 1, 0, 2, 1, False, "zeros", "cpu", torch.float64)
    assert isinstance(layer, nn.Conv1d)
    assert layer.dilation == (2,)
    assert layer.bias is None
    assert torch.equal(layer.weight, conv.weight)
    assert list(layer.state_dict()) == list(conv.state_dict())
    conv.load_state_dict(layer.state_dict())
    layer.load_state_dict(conv.state_dict())
    assert CausalConv1d(3, 4, (5,), (1,), (0,), (2,)).kernel_size == (5,)


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"stride": (2,)}, {"padding": 1}, {"padding": "same"}, {"padding_mode": "circular"}],
    ids=str,
)
def test_convolution_refuses_what_it_cannot_do(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"CausalConv1d supports {name}=.* only, got"):
        CausalConv1d(4, 4, 3, **options)


def test_convolution_refuses_wrong_inputs():
    layer = CausalConv1d(3, 4, 3)
    for shape in ((3,), (1, 1, 3, 10)):
        with pytest.raises(ValueError, match=r"^x must have shape"):
            layer(torch.randn(shape))
    for shape in ((2, 2, 10), (2, 10)):
        with pytest.raises(ValueError, match="takes 3 channels"):
            layer(torch.randn(shape))
    with pytest.raises(TypeError, match="dtype"):
        layer(torch.randn(2, 3, 10).double())
    with pytest.raises(ValueError, match="activation"):
        CausalConv1d(3, 4, 3, activation="elu")(torch.randn(2, 3, 10))


def test_convolution_says_what_it_does():
    text = repr(CausalConv1d(3, 4, 5, dilation=2, activation="leaky_relu", negative_slope=0.2))
    assert all(
        part in text for part in ("3, 4", "(5,)", "dilation=(2,)", "activation='leaky_relu'", "negative_slope=0.2")
    )
    assert "activation" not in repr(CausalConv1d(3, 4, 5))
    text = repr(CausalConv1d(4, 4, 5, groups=2, activation="silu", residual_before_activation=True))
    assert all(part in text for part in ("groups=2", "activation='silu'", "residual_before_activation=True"))
    assert "slope" not in text


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_backend_of_a_layer(runner):
    """It goes before the context."""
    other = "reference" if runner.backend == "cpu" else "cpu"
    layer = CausalConvBlock(3, 4, backend=runner.use())
    x = torch.randn(2, 3, 20)
    expected = layer(x)
    with pykernels.backend(other):
        assert torch.equal(layer(x), expected)
    meta = CausalConv1d(3, 4, 3, backend="cpu", device="meta")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run"):
        meta(x.to("meta"))


def test_receptive_field_of_a_block(capability):
    """y[t] depends on x[t], x[t - d], ..., x[t - 2(K-1)d] and on nothing else."""
    for channels, (kernel_size, dilation) in ((3, (3, 4)), (5, (3, 4)), (3, (2, 7)), (5, (1, 3))):
        block = CausalConvBlock(3, channels, kernel_size, dilation, dtype=torch.float64)
        x = random(1, 3, 100).requires_grad_()
        (gradient,) = torch.autograd.grad(block(x)[0, :, 60].sum(), x)
        seen = gradient[0].abs().sum(0).nonzero().flatten().tolist()
        assert seen == sorted(60 - i * dilation for i in range(2 * (kernel_size - 1) + 1))


def test_block_needs_a_skip_only_where_the_channels_change():
    assert CausalConvBlock(3, 3).skip is None
    keys = {"conv1", "conv2", "skip"}
    assert {key.partition(".")[0] for key in CausalConvBlock(3, 4).state_dict()} == keys
    with pytest.raises(ValueError, match="channels"):
        CausalConvBlock(3, 4)(torch.randn(1, 4, 10))


def step(encoder, x):
    encoder.zero_grad()
    y = encoder(x)
    (y.square().mean() + y[0].sin().sum()).backward()
    return {"y": y.detach(), **{name: p.grad.clone() for name, p in encoder.named_parameters()}}


def pair(dtype, in_channels=1, seed=0, **options):
    """An encoder and the same in plain PyTorch."""
    torch.manual_seed(seed)
    plain = PlainCausalCNNEncoder(in_channels, dtype=torch.float64, **options)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("original0"):  # norms that are not those of the directions
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    backend = options.pop("backend", None)
    encoder = CausalCNNEncoder(in_channels, dtype=dtype, backend=backend, **options)
    encoder.load_state_dict(plain.state_dict())
    return encoder, plain.to(dtype)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_encoder_is_plain_pytorch_in_float64(runner: Runner):
    runner.use()
    with pykernels.backend(runner.backend):
        for in_channels, length, options in ((1, 150, {}), (3, 40, SMALL), (6, 1, SMALL)):
            encoder, plain = pair(torch.float64, in_channels, **options)
            x = random(4, in_channels, length)
            expected = step(plain, x)
            assert_agree(step(encoder, x), expected)
            with torch.no_grad():
                assert error(encoder(x), expected["y"]) <= 1e-12


@pytest.mark.parametrize("runner", COMPILED, ids=str)
def test_encoder_in_float32_against_plain_pytorch(runner: Runner):
    """Outputs at most twice as far from float64 as plain PyTorch in float32, gradients three times.

    The largest error over all parameters and a few draws, since the many roundings on the way make single ones chance.
    """
    runner.use()
    worst = {"y": [0.0, 0.0], "gradients": [0.0, 0.0]}
    for seed in range(3):
        x = random(4, 1, 150, seed=seed).float()
        exact = step(pair(torch.float64, seed=seed)[1], x.double())
        for i, encoder in enumerate(pair(torch.float32, seed=seed)):
            for name, value in step(encoder, x).items():
                key = "y" if name == "y" else "gradients"
                worst[key][i] = max(worst[key][i], error(value, exact[name]))
    for key, factor in (("y", 2), ("gradients", 3)):
        ours, theirs = worst[key]
        assert 0 < ours <= factor * theirs, (key, ours, theirs)


def test_published_size():
    assert sum(p.numel() for p in CausalCNNEncoder(1).parameters()) == 247_720


def published_key(key: str) -> str:
    for ours, theirs in (
        ("blocks.", "network.0.network."),
        ("linear.", "network.3."),
        (".conv1.", ".causal.0."),
        (".conv2.", ".causal.3."),
        (".skip.", ".upordownsample."),
        ("parametrizations.weight.original0", "weight_g"),
        ("parametrizations.weight.original1", "weight_v"),
    ):
        key = key.replace(ours, theirs)
    return key


def test_published_weights_load():
    torch.manual_seed(0)
    source, target = CausalCNNEncoder(2, **SMALL), CausalCNNEncoder(2, **SMALL)
    published = {published_key(key): value for key, value in source.state_dict().items()}
    assert {
        "network.0.network.0.causal.0.weight_g",
        "network.0.network.3.causal.3.weight_v",
        "network.0.network.3.causal.3.bias",
        "network.0.network.0.upordownsample.weight",
        "network.0.network.3.upordownsample.bias",
        "network.3.weight",
        "network.3.bias",
    } <= published.keys()
    x = torch.randn(2, 2, 30)
    assert not torch.equal(target(x), source(x))
    target.load_state_dict(published)
    assert torch.equal(target(x), source(x))
    del published["network.3.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*linear\.bias"):
        target.load_state_dict(published)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*network\.9"):
        target.load_state_dict({**source.state_dict(), "network.9.weight": torch.ones(1)})
    assert target.load_state_dict(published, strict=False).missing_keys == ["linear.bias"]


def test_copies_of_an_encoder(tmp_path):
    torch.manual_seed(0)
    encoder = CausalCNNEncoder(2, **SMALL)
    x = torch.randn(3, 2, 30)
    expected = step(encoder, x)
    path = tmp_path / "encoder.pt"
    torch.save(encoder.state_dict(), path)
    loaded = CausalCNNEncoder(2, **SMALL)
    loaded.load_state_dict(torch.load(path, weights_only=True))
    for other in (copy.deepcopy(encoder), loaded):
        for name, value in step(other, x).items():
            assert torch.equal(value, expected[name]), name
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert torch.equal(encoder(x), expected["y"])


def test_pickle():
    """A layer can be pickled; what is weight-normalised cannot in torch, which says to save the state_dict instead."""
    layer, x = CausalConv1d(2, 3, 3, dilation=2, activation="tanh", backend="cpu"), torch.randn(3, 2, 30)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(CausalCNNEncoder(2, **SMALL))


def test_folded_weights():
    encoder, _ = pair(torch.float64, 2, **SMALL)
    a, b = random(3, 2, 30), random(2, 2, 17, seed=1)

    def loss():
        return encoder(a).square().mean() + encoder(b).sin().sum()

    parameters = list(encoder.parameters())
    expected = loss()
    expected_grads = torch.autograd.grad(expected, parameters)
    with encoder.folded():
        assert encoder._normalised_weights() is encoder._normalised_weights()
        folded = loss()
        grads = torch.autograd.grad(folded, parameters)
    assert torch.equal(folded, expected)
    for actual, e in zip(grads, expected_grads, strict=True):
        assert error(actual, e) <= 1e-12
    with torch.no_grad(), encoder.folded():
        assert torch.equal(encoder(a), encoder(a))


def test_folded_weights_are_forgotten():
    """Outside, a change of the weights counts; also when the block was left by an exception."""
    encoder = CausalCNNEncoder(2, **SMALL)
    x = torch.randn(3, 2, 30)
    with pytest.raises(KeyError), torch.no_grad(), encoder.folded():
        raise KeyError
    before = encoder(x)
    with torch.no_grad():
        encoder.blocks[0].conv1.parametrizations.weight.original0.mul_(3)
    after = encoder(x)
    assert not torch.allclose(before, after)
    with encoder.folded():
        assert torch.equal(encoder(x), after)
    assert not torch.allclose(copy.deepcopy(encoder)(x), before)


@pytest.mark.parametrize("how_many", [1, 8])
def test_weight_norm_may_be_removed(how_many):
    encoder, plain = pair(torch.float64, 2, **SMALL)
    x = random(3, 2, 30)
    expected = plain(x)
    convs = [conv for block in encoder.blocks for conv in (block.conv1, block.conv2)]
    assert len(convs) == 8
    for conv in convs[:how_many]:
        parametrize.remove_parametrizations(conv, "weight")
    assert error(encoder(x), expected) <= 1e-12
    with encoder.folded():
        assert error(encoder(x), expected) <= 1e-12
    encoder(x).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_another_parametrization_is_respected():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    encoder, plain = pair(torch.float64, 2, **SMALL)
    x = random(3, 2, 30)
    for model in (encoder, plain):
        parametrize.register_parametrization(model.blocks[1].conv2, "weight", Doubled())
    expected = step(plain, x)
    assert_agree(step(encoder, x), expected)


def test_frozen_and_unused_parameters():
    encoder, plain = pair(torch.float64, 2, **SMALL)
    x = random(3, 2, 30)
    expected = step(plain, x)
    for model in (encoder.blocks[0], encoder.blocks[2].conv1):
        model.requires_grad_(False)
    encoder.zero_grad(set_to_none=True)
    y = encoder(x)
    (y.square().mean() + y[0].sin().sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or error(parameter.grad, expected[name]) <= 1e-10, name


def test_encoder_sees_the_whole_series_and_any_length(capability):
    encoder, plain = pair(torch.float64, 2, **SMALL)
    for length in (1, 2, 7, 100, 1000):
        x = random(2, 2, length)
        y = encoder(x)
        assert y.shape == (2, 5)
        assert error(y, plain(x)) <= 1e-12
    assert encoder(x[:0]).shape == (0, 5)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_encoder_of_series_of_unequal_lengths(kind, runner: Runner):
    """As one by one: the representation, and the gradients of series and weights."""
    encoder, _ = pair(torch.float64, 2, **SMALL)
    encoder.backend = runner.use()
    lengths = (30, 1, 77, 5)
    series = [random(2, n, seed=n).requires_grad_() for n in lengths]
    targets = random(4, 5, seed=9)
    parameters = list(encoder.parameters())

    def outcome(y, inputs):
        return [y.detach(), *torch.autograd.grad(y, [*inputs, *parameters], targets)]

    expected = outcome(torch.cat([encoder(t[None]) for t in series]), series)
    if kind == "packed":
        x, where = torch.cat(series, 1)[None], {"cu_seqlens": torch.tensor([0, 30, 31, 108, 113], dtype=torch.int32)}
    else:
        x = torch.stack([F.pad(t, (0, 80 - t.shape[1]), value=float("nan")) for t in series])
        where = {"lengths": torch.tensor(lengths)}
    for actual, e in zip(outcome(encoder(x, **where), series), expected, strict=True):
        assert error(actual, e) <= 1e-10
    with torch.no_grad(), encoder.folded():
        assert error(encoder(x, **where), expected[0]) <= 1e-12


def test_bits_of_a_series_do_not_depend_on_how_it_is_given_to_the_encoder(capability):
    torch.manual_seed(0)
    encoder = CausalCNNEncoder(2, **SMALL)
    lengths = (30, 1, 77, 5)
    series = [random(1, 2, n, seed=n).float() for n in lengths]
    pooled = []
    encoder.linear = nn.Identity()  # torch's product of matrices depends on the number of rows
    with torch.no_grad():
        pooled.append(torch.cat([encoder(t) for t in series]))
        offsets = torch.tensor([0, 30, 31, 108, 113], dtype=torch.int32)
        pooled.append(encoder(torch.cat(series, 2), cu_seqlens=offsets))
        padded = torch.cat([F.pad(t, (0, 80 - t.shape[2])) for t in series])
        pooled.append(encoder(padded, lengths=torch.tensor(lengths)))
    assert torch.equal(pooled[0], pooled[1])
    assert torch.equal(pooled[0], pooled[2])


def test_encoder_refuses_series_without_samples():
    encoder, x = CausalCNNEncoder(2, **SMALL), torch.randn(1, 2, 30)
    with pytest.raises(ValueError, match="empty series"):
        encoder(x, cu_seqlens=torch.tensor([0, 30, 30], dtype=torch.int32))
    with pytest.raises(ValueError, match="empty series"):
        encoder(x, lengths=torch.tensor([0]))
    with pytest.raises(ValueError, match=r"^cu_seqlens must"):
        encoder(x, cu_seqlens=torch.tensor([0, 31], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^lengths must be between 0 and 30, got 31"):
        encoder(x, lengths=torch.tensor([31]))
    with pytest.raises(ValueError, match=r"^lengths cannot be combined with cu_seqlens"):
        encoder(x, lengths=torch.tensor([30]), cu_seqlens=torch.tensor([0, 30], dtype=torch.int32))


@pytest.mark.parametrize("shape", [(2, 30), (2, 2, 0), (1, 2, 2, 30), (30,)])
def test_encoder_refuses_wrong_shapes(shape):
    with pytest.raises(ValueError, match=r"^x must have shape \(batch, channels, time\) with at least one sample"):
        CausalCNNEncoder(2, **SMALL)(torch.randn(shape))


def test_encoder_refuses_wrong_channels_and_dtypes():
    with pytest.raises(ValueError, match="takes 2 channels"):
        CausalCNNEncoder(2, **SMALL)(torch.randn(1, 3, 30))
    with pytest.raises(TypeError, match="dtype"):
        CausalCNNEncoder(2, **SMALL)(torch.randn(1, 2, 30).double())


def test_training_step_of_an_optimiser():
    encoder, plain = pair(torch.float64, 2, **SMALL)
    x = random(3, 2, 30)
    for model in (encoder, plain):
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()
    for (name, ours), theirs in zip(encoder.named_parameters(), plain.parameters(), strict=True):
        assert error(ours.detach(), theirs.detach()) <= 1e-8, name


def test_conversion_of_dtype_and_device():
    encoder = CausalCNNEncoder(2, **SMALL)
    assert encoder.double()(random(1, 2, 20)).dtype == torch.float64
    meta = CausalCNNEncoder(2, **SMALL, device="meta", backend="reference")
    assert meta(torch.empty(3, 2, 20, device="meta")).shape == (3, 5)
