"""The temporal convolutional network against a plain one, written from its description."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pykernels
from pykernels.nn import TemporalConvNet

from .cases import RUNNERS, error


class PlainLevel(nn.Module):
    """One level: pad on both sides, cut what sees the future, twice; a residual connection; everything as a module."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, dilation: int, dropout: float, norm) -> None:
        super().__init__()
        self.reach = (kernel_size - 1) * dilation

        def conv(channels: int) -> nn.Module:
            return norm(nn.Conv1d(channels, outputs, kernel_size, padding=self.reach, dilation=dilation))

        self.conv1, self.conv2 = conv(inputs), conv(outputs)
        places = [self.conv1, nn.Identity(), nn.ReLU(), nn.Dropout(dropout)]
        places += [self.conv2, nn.Identity(), nn.ReLU(), nn.Dropout(dropout)]
        self.net = nn.Sequential(*places)  # every parameter has two names in the state_dict
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x
        for i, layer in enumerate(self.net):
            h = layer(h)
            if i in (0, 4):
                h = h[..., : x.shape[-1]]
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class Plain(nn.Module):
    def __init__(self, inputs: int, channels: list[int], kernel_size: int = 2, dropout: float = 0.2, norm=None) -> None:
        super().__init__()
        widths = [inputs, *channels]
        self.network = nn.Sequential(
            *(PlainLevel(widths[i], widths[i + 1], kernel_size, 2**i, dropout, norm) for i in range(len(channels)))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and what most state_dicts were saved with
        return torch.nn.utils.weight_norm(layer)


NORMS = {"old": old_weight_norm, "parametrisation": torch.nn.utils.parametrizations.weight_norm}
SIZES = (3, [5, 5, 8], 3)


@pytest.fixture
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("style", NORMS)
@pytest.mark.parametrize("train", [False, True])
def test_outputs_and_gradients_are_those_of_the_plain_network(runner, style, train):
    plain = randomised(Plain(*SIZES, dropout=0.0 if train else 0.5, norm=NORMS[style])).train(train)
    ours = TemporalConvNet(*SIZES, dropout=plain.network[0].net[3].p, backend=runner.use()).train(train)
    assert ours.load_state_dict(plain.state_dict()).missing_keys == []
    x = torch.randn(4, 3, 50, requires_grad=True)
    grad = torch.randn(4, 8, 50)
    y, expected = ours(x), plain(x)
    assert error(y, expected) <= 1e-12
    names = [name for name, _ in ours.named_parameters()]
    gradients = torch.autograd.grad(y, [x, *ours.parameters()], grad)
    by_name = dict(plain.named_parameters())
    renamed = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    parameters = []
    for name in names:
        for new, old in renamed.items() if style == "old" else ():
            name = name.replace(new, old)
        parameters.append(by_name[name])
    for name, value, wanted in zip(
        ["x", *names], gradients, torch.autograd.grad(expected, [x, *parameters], grad), strict=True
    ):
        assert error(value, wanted) <= 1e-10, name


def test_dropout_acts_behind_both_convolutions():
    """The same masks, since both draw them in the same order."""
    plain = randomised(Plain(*SIZES, dropout=0.5, norm=old_weight_norm))
    ours = TemporalConvNet(*SIZES, dropout=0.5)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 50)
    outputs = []
    for module in (ours.train(), plain.train()):
        torch.manual_seed(1)
        outputs.append(module(x))
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(ours(x), ours(x))
    assert torch.equal(ours.eval()(x), ours(x))


@pytest.mark.parametrize("style", NORMS)
def test_state_dicts_go_both_ways(style):
    plain, ours = Plain(*SIZES, norm=NORMS[style]), randomised(TemporalConvNet(*SIZES))
    state = ours.published_state_dict() if style == "old" else ours.state_dict()
    outcome = plain.load_state_dict(state, strict=style == "old")
    assert all(".net." in key for key in outcome.missing_keys)  # second names of what has been loaded
    assert outcome.unexpected_keys == []
    x = torch.randn(2, 3, 40, dtype=torch.float64)
    assert error(ours.double().eval()(x), plain.double().eval()(x)) <= 1e-12
    again = TemporalConvNet(*SIZES)
    again.load_state_dict(ours.published_state_dict())
    assert all(map(torch.equal, again.state_dict().values(), ours.state_dict().values()))
    again.load_state_dict(ours.state_dict())


def test_loads_as_a_part_of_another_module():
    plain, ours = (
        nn.ModuleDict({"tcn": net}) for net in (Plain(*SIZES, norm=old_weight_norm), TemporalConvNet(*SIZES))
    )
    ours.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"network\.7"):
        ours.load_state_dict(plain.state_dict() | {"tcn.network.7.conv1.bias": torch.zeros(5)})


def test_sees_no_future_and_as_much_of_the_past_as_its_dilations_reach():
    net = randomised(TemporalConvNet(1, [4, 4, 4], kernel_size=3, dilations=[1, 3, 9], activation="tanh")).eval()
    x = torch.randn(1, 1, 100, requires_grad=True)
    (grad,) = torch.autograd.grad(net(x)[0, :, 80].sum(), x)
    reach = 2 * 2 * (1 + 3 + 9)
    assert grad[0, 0, 80 - reach : 81].ne(0).all()
    assert not grad[0, 0, 81:].any()
    assert not grad[0, 0, : 80 - reach].any()


@pytest.mark.parametrize("train", [False, True])
def test_series_of_unequal_length_packed_or_padded(train):
    torch.manual_seed(0)
    net = TemporalConvNet(3, [5, 8], kernel_size=3, dropout=0.0 if train else 0.3).train(train)
    series = [torch.randn(1, 3, n) for n in (20, 1, 33)]
    alone = [net(x) for x in series]
    packed = net(torch.cat(series, 2), cu_seqlens=torch.tensor([0, 20, 21, 54], dtype=torch.int32))
    torch.testing.assert_close(packed, torch.cat(alone, 2))
    padded = torch.full((3, 3, 33), float("nan"))
    for i, x in enumerate(series):
        padded[i, :, : x.shape[2]] = x
    y = net(padded, lengths=torch.tensor([20, 1, 33]))
    for i, expected in enumerate(alone):
        torch.testing.assert_close(y[i : i + 1, :, : expected.shape[2]], expected)
        assert not y[i, :, expected.shape[2] :].any()
    net = TemporalConvNet(3, [3], dropout=0.5).train()
    assert net(padded, lengths=torch.tensor([20, 1, 33])).isfinite().all()


def test_start_shapes_and_copies():
    torch.manual_seed(0)
    net = TemporalConvNet(3, [50, 50], kernel_size=5)
    assert 0.008 < net.network[0].downsample.weight.std() < 0.012
    assert net.network[1].downsample is None
    assert net(torch.randn(3, 20)).shape == (50, 20)
    x = torch.randn(2, 3, 20)
    assert torch.equal(copy.deepcopy(net).eval()(x), net.eval()(x))
    explanation = pykernels.explain(net, x)
    assert [call.path for call in explanation.calls] == ["single convolution"] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_channels": []}, "num_channels must have at least one level"),
        ({"dilations": [1, 2, 4]}, "dilations must have one value for each of the 2 levels, got 3"),
        ({"activation": "softmax"}, "activation must be one of .*'relu'.*, got 'softmax'"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        TemporalConvNet(**{"num_inputs": 3, "num_channels": [4, 4]} | options)
