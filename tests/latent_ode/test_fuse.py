"""fuse: the field computes what the user's does, with the same parameters; all else is refused, and left as it was."""

from __future__ import annotations

import re
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pykernels
from pykernels import FusionError, FusionHint, fuse
from pykernels.nn import MLPField, Sin, Swish
from pykernels.nn.fuse import fusable

TIMES = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _same_weights_every_time():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Field(nn.Module):
    """Three layers, called by ``compute(self, t, y)``."""

    def __init__(self, compute, inputs: int = 2, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.compute = compute
        self.first = nn.Linear(inputs, 5, dtype=dtype)
        self.second = nn.Linear(5, 4, dtype=dtype)
        self.last = nn.Linear(4, 2, dtype=dtype)
        self.slope = nn.Parameter(torch.tensor([0.7], dtype=dtype))
        self.counter, self.seen, self.table = 0, [], {"a": 1}
        self.register_buffer("count", torch.zeros((), dtype=dtype))
        self.drop = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(5, dtype=dtype)

    def net(self, y, activation=torch.tanh):
        return self.last(activation(self.second(activation(self.first(y)))))

    def forward(self, t, y):
        return self.compute(self, t, y)


def assert_fuses(func, y: Tensor | None = None, t: Tensor = TIMES[0], **attributes):
    """``func`` and its field have the same values and gradients at one point, and as trajectories."""
    field = fuse(func)
    y = random(3, 2) / 3 if y is None else y
    for name, value in attributes.items():
        assert getattr(field, name) == value, name
    expected = func(t, y)
    torch.testing.assert_close(field(t, y), expected, rtol=1e-13, atol=1e-13)
    leaves = list(field.parameters())
    whole = pykernels.odeint(field, y, TIMES, method="rk4")
    stepped = pykernels.odeint(lambda t, y: func(t, y), y, TIMES, method="rk4")
    torch.testing.assert_close(whole, stepped, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(states.square().sum(), leaves) for states in (whole, stepped))
    for found, wanted in zip(*gradients, strict=True):
        # Sums over all steps in another order.
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    return field


def silu_by_parts(x):
    return torch.sigmoid(x) * x


class Gelu(nn.Module):
    def forward(self, x):
        return F.gelu(x)


ACTIVATIONS = {
    "torch.tanh": (torch.tanh, "tanh"),
    "F.tanh": (F.tanh, "tanh"),
    "tanh": (lambda x: x.tanh(), "tanh"),
    "nn.Tanh": (nn.Tanh(), "tanh"),
    "torch.relu": (torch.relu, "relu"),
    "F.relu": (F.relu, "relu"),
    "relu": (lambda x: x.relu(), "relu"),
    "F.relu inplace": (lambda x: F.relu(x, inplace=True), "relu"),
    "relu_": (lambda x: x.relu_(), "relu"),
    "nn.ReLU inplace": (nn.ReLU(inplace=True), "relu"),
    "F.leaky_relu": (F.leaky_relu, "leaky_relu"),
    "F.leaky_relu 0.2": (lambda x: F.leaky_relu(x, 0.2), "leaky_relu"),
    "F.leaky_relu keyword": (lambda x: F.leaky_relu(x, negative_slope=0.3), "leaky_relu"),
    "nn.LeakyReLU": (nn.LeakyReLU(0.2), "leaky_relu"),
    "F.softplus": (F.softplus, "softplus"),
    "F.softplus arguments": (lambda x: F.softplus(x, beta=1, threshold=20), "softplus"),
    "nn.Softplus": (nn.Softplus(), "softplus"),
    "F.silu": (F.silu, "silu"),
    "nn.SiLU": (nn.SiLU(), "silu"),
    "x sigmoid(x)": (lambda x: x * torch.sigmoid(x), "silu"),
    "sigmoid(x) x": (silu_by_parts, "silu"),
    "x.mul(x.sigmoid())": (lambda x: x.mul(x.sigmoid()), "silu"),
    "x sigmoid(2 x)": (lambda x: x * torch.sigmoid(2 * x), "silu"),
    "x F.sigmoid(x 2)": (lambda x: x * F.sigmoid(x * 2.0), "silu"),
    "F.elu": (F.elu, "elu"),
    "F.elu 0.5": (lambda x: F.elu(x, 0.5), "elu"),
    "nn.ELU": (nn.ELU(0.5), "elu"),
    "torch.sin": (torch.sin, "sin"),
    "sin": (lambda x: x.sin(), "sin"),
    "Sin": (Sin(), "sin"),
    "Swish": (Swish(0.4, dtype=torch.float64), "silu"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    activation, key = ACTIVATIONS[name]
    func = Field(lambda self, t, y: self.net(y, activation))
    func.activation = activation if isinstance(activation, nn.Module) else None
    assert_fuses(func, activation=key, dims=(2, 5, 4, 2), time_input=False, input_map="none")


def test_learned_slopes():
    func = Field(lambda self, t, y: self.net(y, lambda x: x * torch.sigmoid(self.slope * x)))
    field = assert_fuses(func, activation="silu")
    assert [id(slope) for slope in field.slopes] == [id(func.slope)] * 2
    func = Field(lambda self, t, y: self.net(y, lambda x: torch.sigmoid(x * self.slope) * x))
    assert_fuses(func, activation="silu")


MAPS = {
    "y**2": (lambda y: y**2, "square"),
    "y * y": (lambda y: y * y, "square"),
    "square": (torch.square, "square"),
    "y.pow(2)": (lambda y: y.pow(2), "square"),
    "y**3": (lambda y: y**3, "cube"),
    "y**3.0": (lambda y: y**3.0, "cube"),
    "torch.pow(y, 3)": (lambda y: torch.pow(y, 3), "cube"),
    "pow by keyword": (lambda y: torch.pow(y, exponent=3), "cube"),
    "y * y * y": (lambda y: y * y * y, "cube"),
    "y * y**2": (lambda y: y * y**2, "cube"),
    "y.mul(y.square())": (lambda y: y.mul(y.square()), "cube"),
    "torch.sin": (torch.sin, "sin"),
    "y.sin()": (lambda y: y.sin(), "sin"),
    "Sin": (Sin(), "sin"),
    "torch.cos": (torch.cos, "cos"),
    "y.cos()": (lambda y: y.cos(), "cos"),
    "torch.tanh": (torch.tanh, "tanh"),
    "nn.Tanh": (nn.Tanh(), "tanh"),
    "y**1": (lambda y: y**1, "none"),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_of_the_state(name):
    mapping, key = MAPS[name]
    assert_fuses(Field(lambda self, t, y: self.net(mapping(y))), input_map=key)
    # With as many states as hidden units, nothing but the order of operations tells a map from an activation.
    square = nn.Linear(2, 2, dtype=torch.float64)
    assert_fuses(lambda t, y: square(mapping(y)), input_map=key, dims=(2, 2))


TIME_INPUTS = {
    "expand": lambda t, y: torch.cat([y, t.expand(y.shape[0], 1)], 1),
    "expand all": lambda t, y: torch.cat((y, t.expand(*y.shape[:-1], 1)), dim=-1),
    "expand sum of shapes": lambda t, y: torch.cat([y, t.expand(y.shape[:-1] + torch.Size([1]))], -1),
    "expand_as": lambda t, y: torch.cat([y, t.expand_as(y[:, :1])], 1),
    "repeat": lambda t, y: torch.cat([y, t.reshape(1, 1).repeat(y.size(0), 1)], dim=-1),
    "view and expand": lambda t, y: torch.cat([y, t.view(1, 1).expand(len_of(y), 1)], dim=-1),
    "ones": lambda t, y: torch.cat([y, t * torch.ones(y.shape[0], 1, dtype=y.dtype)], 1),
    "ones_like": lambda t, y: torch.concat([y, torch.ones_like(y[..., :1]) * t], -1),
    "zeros_like": lambda t, y: torch.cat([y, torch.zeros_like(y[..., :1]) + t], -1),
    "full_like": lambda t, y: torch.cat([y, torch.full_like(y[..., :1], 1.0) * t], -1),
    "to": lambda t, y: torch.cat([y, t.to(y).unsqueeze(0).expand(y.shape[0], 1)], -1),
    "new_ones": lambda t, y: torch.cat([y, t * y.new_ones(y.shape[0], 1)], -1),
    "mapped": lambda t, y: torch.cat([y**3, t.expand(y.shape[0], 1)], -1),
}


def len_of(y):
    return y.shape[0]


@pytest.mark.parametrize("name", TIME_INPUTS)
def test_time_as_the_last_input(name):
    entry = TIME_INPUTS[name]
    func = Field(lambda self, t, y: self.net(entry(t, y)), 3)
    assert_fuses(func, time_input=True, input_map="cube" if name == "mapped" else "none")


def test_time_for_states_without_a_batch():
    func = Field(lambda self, t, y: self.net(torch.cat([y, t.reshape(1)])), 3)
    field = assert_fuses(func, random(2), time_input=True)
    torch.testing.assert_close(field(TIMES[0], random(3, 2))[1], func(TIMES[0], random(3, 2)[1]))


def test_an_example_tells_the_shape_of_the_state():
    func = Field(lambda self, t, y: self.net(torch.cat([y, t.expand(2, 3, 1)], -1)), 3)
    with pytest.raises(FusionError, match=re.escape("a state of shape (5, 2) raises RuntimeError")):
        fuse(func)
    assert fuse(func, random(2, 3, 2)).time_input


def test_attributes_may_hold_anything():
    func = Field(lambda self, t, y: self.net(y))
    func.seen = [(random(2), random(2)), {1: random(2)}]
    func.table = {"pair": (random(2), random(2))}
    assert_fuses(func)
    func.compute = _append
    seen = list(func.seen)
    with pytest.raises(FusionError, match="its forward changes seen"):
        fuse(func)
    assert list(map(id, func.seen)) == list(map(id, seen))


class Stateless(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()

    def forward(self, y, scale=None):
        return self.net(y if scale is None else y * scale)


class OwnWeights(nn.Module):
    """Layers of F.linear, without a bias in the last."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([random(4, 2), random(2, 4)])
        self.bias = nn.Parameter(random(4))

    def forward(self, t, y):
        h = F.linear(y, self.weights[0], bias=self.bias).tanh()
        return F.linear(h, self.weights[1])


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = OwnWeights()
        self.unused = nn.Conv1d(1, 1, 1)

    def forward(self, t, y, *args):
        return self.inner(t, y)


def test_modules_and_functions():
    network = nn.Sequential(nn.Linear(2, 3), nn.ELU(), nn.Linear(3, 2)).double()
    field = fuse(network)
    torch.testing.assert_close(field(0.0, random(3, 2)), network(random(3, 2)))
    assert field.layers[0] is network[0]
    assert_fuses(lambda t, y: network(y**3), activation="elu", input_map="cube")
    stateless = Stateless()
    torch.testing.assert_close(fuse(stateless)(0.0, random(3, 2)), stateless(random(3, 2)))
    own = OwnWeights()
    field = assert_fuses(own)
    assert [id(p) for p in field.parameters()] == [id(own.weights[0]), id(own.bias), id(own.weights[1])]
    assert_fuses(Nested())
    assert_fuses(OwnWeights().forward)
    assert fuse(field) is field
    linear = nn.Linear(2, 2).double()
    assert_fuses(lambda t, y: linear(y), dims=(2, 2))
    shared = Field(lambda self, t, y: self.last(torch.tanh(self.second(torch.tanh(self.first(y))))))
    shared.last.bias = shared.first.bias = None
    assert_fuses(shared)


@pytest.mark.parametrize("slope", [None, "learned"])
def test_a_field_in_a_module(slope):
    inner = MLPField((2, 4, 3, 2), "silu", slope=slope, time_input=True, input_map="sin", dtype=torch.float64)
    outer = Field(lambda self, t, y: self.inner(t, y))
    outer.inner = inner
    field = assert_fuses(outer)
    assert [*map(id, field.parameters())] == [*map(id, inner.parameters())]
    assert repr(field) == repr(inner)
    parametrizations.weight_norm(inner.layers[1])
    with pytest.raises(FusionError, match=re.escape("inner.layers.1 (ParametrizedLinear) has a parametrization")):
        fuse(outer)
    outer.compute = lambda self, t, y: self.inner(2 * t, y)
    with pytest.raises(FusionError, match=re.escape("inner (MLPField) is no Linear layer")):
        fuse(outer)


def test_one_layer_twice_and_single_precision():
    middle, ends = nn.Linear(4, 4), (nn.Linear(2, 4), nn.Linear(4, 2))
    field = fuse(nn.Sequential(ends[0], nn.Tanh(), middle, nn.Tanh(), middle, nn.Tanh(), ends[1]))
    assert field.layers[1] is field.layers[2] is middle
    assert len(list(field.parameters())) == 6
    assert field.layers[0].weight.dtype == torch.float32


def test_training_the_field_trains_the_original():
    func = Field(lambda self, t, y: self.net(y))
    optimizer = torch.optim.SGD(func.parameters(), lr=0.1)
    field, y = fuse(func), random(3, 2)
    before = {name: p.clone() for name, p in func.named_parameters()}
    pykernels.odeint(field, y, TIMES, method="rk4")[-1].square().sum().backward()
    optimizer.step()
    for name in ("first.weight", "first.bias", "second.weight", "last.bias"):
        assert (func.get_parameter(name) != before[name]).any(), name
    torch.testing.assert_close(field(TIMES[0], y), func(TIMES[0], y))
    assert {id(p) for p in field.parameters()} <= {id(p) for p in func.parameters()}


def test_zero_weights_hide_nothing():
    func = Field(lambda self, t, y: self.net(torch.cat([y, (t * 2).expand(y.shape[0], 1)], -1)), 3)
    with torch.no_grad():
        func.last.weight.zero_()
    with pytest.raises(FusionError, match="the value is not that of an MLPField"):
        fuse(func)


@settings(max_examples=20, deadline=None, database=None)
@given(data=st.data())
def test_random_networks(data):
    """Any mix of ways to write the same network."""
    dim = data.draw(st.integers(1, 3))
    widths = [dim, *data.draw(st.lists(st.integers(1, 6), max_size=3)), dim]
    time_input = data.draw(st.booleans())
    key = data.draw(st.sampled_from(["tanh", "relu", "softplus", "elu", "sin"]))
    modules = {"tanh": nn.Tanh, "relu": nn.ReLU, "softplus": nn.Softplus, "elu": nn.ELU, "sin": Sin}
    functions = {"tanh": torch.tanh, "relu": F.relu, "softplus": F.softplus, "elu": F.elu, "sin": torch.sin}
    mapping, map_key = MAPS[data.draw(st.sampled_from(list(MAPS)))]
    layers = nn.ModuleList()
    for i in range(len(widths) - 1):
        layers.append(nn.Linear(widths[i] + (time_input and i == 0), widths[i + 1], bias=data.draw(st.booleans())))
    layers.double()
    with torch.no_grad():  # small, or some states of y**3 would be infinite before the last time
        for parameter in layers.parameters():
            parameter.mul_(0.2)
    ways = [data.draw(st.sampled_from([functions[key], modules[key]()])) for _ in widths[1:-1]]
    functional = [data.draw(st.booleans()) for _ in layers]

    def func(t, y):
        a = mapping(y)
        if time_input:
            a = torch.cat([a, t.expand(*y.shape[:-1], 1)], -1)
        for i, layer in enumerate(layers):
            a = F.linear(a, layer.weight, layer.bias) if functional[i] else layer(a)
            if i < len(ways):
                a = ways[i](a)
        return a

    module = Field(lambda self, t, y: func(t, y))
    module.layers = layers
    field = assert_fuses(module, random(4, dim) / 3, dims=tuple(widths), time_input=time_input, input_map=map_key)
    assert not ways or field.activation == key


def _count(self, t, y):
    self.counter += 1
    return self.net(y)


def _append(self, t, y):
    self.seen.append(y)
    return self.net(y)


def _write_in_table(self, t, y):
    self.table["a"] = 2
    return self.net(y)


def _new_attribute(self, t, y):
    self.latest = y
    return self.net(y)


def _replace_buffer(self, t, y):
    self.count = torch.ones_like(self.count)
    return self.net(y)


def _add_in_place(self, t, y):
    self.count.add_(1)
    return self.net(y)


def _branch(self, t, y):
    return self.net(y) if y.sum() > 0 else self.net(-y)


def _branch_on_time(self, t, y):
    return self.net(y) if t > 1 else self.net(y**3)


def _without_gradient(self, t, y):
    with torch.no_grad():
        return self.net(y)


def _detached(self, t, y):
    return self.net(y.detach())


def _energy(self, t, y):
    y = y.requires_grad_()
    return torch.autograd.grad(self.net(y).sum(), y, create_graph=True)[0]


def _also_prints_the_mean(self, t, y):
    self.net(y).mean()
    return self.net(y)


def _shifted(self, t, y):
    return self.net(y) + torch.ones(2)


def _draws(self, t, y):
    torch.randn(3)
    return self.net(y)


def _in_place(self, t, y):
    y.mul_(2)
    return self.net(y)


def _numpy(self, t, y):
    return self.net(y.numpy())


def _raises(self, t, y):
    raise KeyError("nothing")


REFUSED = {
    "counter": (_count, "its forward changes counter, which a fused trajectory would not do"),
    "list": (_append, "its forward changes seen, which"),
    "dict": (_write_in_table, "its forward changes table, which"),
    "attribute": (_new_attribute, "its forward changes latest, which"),
    "buffer": (_replace_buffer, "its forward changes count, which"),
    "buffer in place": (_add_in_place, "its forward changes a tensor in place by .add_()"),
    "state in place": (_in_place, "its forward changes a tensor in place by .mul_()"),
    "branch": (_branch, "its forward depends on values of its arguments"),
    "branch on time": (_branch_on_time, "its forward depends on values of its arguments"),
    "no_grad": (_without_gradient, "the gradient of y is not that of an MLPField with the same layers"),
    "detach": (_detached, ".detach() is none of the known activations"),
    "gradient": (_energy, "getitem() is no Linear layer, as must be the last operation"),
    "unused": (_also_prints_the_mean, "its forward computes first (Linear), on which the result does not depend"),
    "shifted": (_shifted, "add() is no Linear layer, as must be the last operation"),
    "random": (_draws, "its forward draws random numbers"),
    "numpy": (_numpy, ".numpy() is none of the known activations"),
    "raises": (_raises, "tracing its forward failed with KeyError: 'nothing'"),
    "negative": (lambda self, t, y: -self.net(y), "neg() is no Linear layer, as must be the last operation"),
    "residual": (lambda self, t, y: y + self.net(y), "add() is no Linear layer"),
    "tuple": (lambda self, t, y: (self.net(y), y), "its forward returns a tuple, not a tensor"),
    "constant": (lambda self, t, y: torch.zeros(2), "a constant tensor is no Linear layer"),
    "state": (lambda self, t, y: y, "the state is no Linear layer, as must be the last operation"),
    "parameter": (lambda self, t, y: y @ self.first.weight, "matmul() is no Linear layer"),
    "linear of a result": (
        lambda self, t, y: F.linear(self.first(y).tanh(), self.first.weight.t()),
        "linear() has .t() where a parameter must be",
    ),
    "no activation": (lambda self, t, y: self.net(y, lambda x: x), "there is no activation behind second (Linear)"),
    "last activation": (lambda self, t, y: self.net(y).tanh(), ".tanh() is no Linear layer, as must be the last"),
    "sigmoid": (lambda self, t, y: self.net(y, torch.sigmoid), "sigmoid() is none of the known activations: ReLU"),
    "gelu": (lambda self, t, y: self.net(y, F.gelu), "gelu() is none of the known activations"),
    "softplus": (lambda self, t, y: self.net(y, lambda x: F.softplus(x, 2)), "softplus() is none of the known"),
    "glu": (lambda self, t, y: self.net(y, lambda x: x * x), "mul() is no x * sigmoid(slope * x)"),
    "mixed": (
        lambda self, t, y: self.last(torch.relu(self.second(torch.tanh(self.first(y))))),
        "all activations must be the same, got tanh and relu",
    ),
    "two slopes": (
        lambda self, t, y: self.last(F.elu(self.second(F.elu(self.first(y))), 0.5)),
        "all activations must be the same, got elu(slope=1.0) and elu(slope=0.5)",
    ),
    "dropout": (
        lambda self, t, y: self.net(y, lambda x: F.dropout(x, 0.5, self.training)),
        "dropout() is none of the known activations",
    ),
    "drop": (lambda self, t, y: self.net(y, self.drop), "drop (Dropout) has p=0.5: a trajectory in one call drops"),
    "norm": (
        lambda self, t, y: self.last(torch.tanh(self.second(self.norm(self.first(y))))),
        "norm (LayerNorm) is none of the known activations",
    ),
    "training": (
        lambda self, t, y: self.net(y**2 if self.training else y),
        "its forward depends on whether it is in training mode",
    ),
    "other layers in training": (
        lambda self, t, y: self.net(y) if self.training else F.linear(y, self.slope.expand(2, 2)),
        "linear() has .expand() where a parameter must be",
    ),
    "other order in training": (
        lambda self, t, y: self.net(y) if self.training else self.last(torch.tanh(self.first(y))),
        "its forward depends on whether it is in training mode",
    ),
    "fourth power": (lambda self, t, y: self.net(y**4), "pow() is none of the known activations"),
    "scaled state": (lambda self, t, y: self.net(2 * y), "mul() is no x * sigmoid(slope * x)"),
}


def state_of(module):
    attributes = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    return {**attributes, "seen": list(module.seen), "table": dict(module.table), "tensors": dict(module.state_dict())}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(name):
    compute, message = REFUSED[name]
    func = Field(compute)
    before, rng = state_of(func), torch.get_rng_state()
    with pytest.raises(FusionError, match=re.escape("Field cannot be fused: ")) as raised:
        fuse(func)
    assert message in str(raised.value)
    tensors, tensors_before = state_of(func).pop("tensors"), before.pop("tensors")
    assert {k: v for k, v in state_of(func).items() if k != "tensors"} == before
    assert all((tensors[k] == v).all() for k, v in tensors_before.items())
    assert (torch.get_rng_state() == rng).all()


TIME_REFUSED = {
    "time in front": (lambda t, y: torch.cat([t.expand(y.shape[0], 1), y], 1), "cat() has the time in front"),
    "scaled time": (
        lambda t, y: torch.cat([y, 2 * t.expand(y.shape[0], 1)], 1),
        "the value is not that of an MLPField",
    ),
    "shifted time": (lambda t, y: torch.cat([y, t.expand(y.shape[0], 1) + 1], 1), "the value is not that"),
    "time and state": (lambda t, y: torch.cat([y, t * y[:, :1]], 1), "the value is not that of"),
    "sine of the time": (
        lambda t, y: torch.cat([y, t.sin().expand(y.shape[0], 1)], 1),
        "cat() must be of the state and",
    ),
    "state twice": (lambda t, y: torch.cat([y, y[:, :1]], 1), "cat() must be of the state and the time"),
    "only time": (lambda t, y: t.expand(y.shape[0], 3), ".expand() is none of the known activations"),
}


@pytest.mark.parametrize("name", TIME_REFUSED)
def test_other_inputs_are_refused(name):
    entry, message = TIME_REFUSED[name]
    with pytest.raises(FusionError, match=re.escape(message)):
        fuse(Field(lambda self, t, y: self.net(entry(t, y)), 3))


def _weight_norm_of_old(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda f: f.register_forward_hook(lambda *args: None), "Field has a forward hook, which a fused trajectory"),
        (lambda f: f.second.register_forward_hook(lambda *args: None), "second (Linear) has a forward hook"),
        (lambda f: f.second.register_forward_pre_hook(lambda *args: None), "second (Linear) has a forward pre-hook"),
        (lambda f: f.second.register_full_backward_hook(lambda *args: None), "second (Linear) has a backward hook"),
        (lambda f: f.last.register_full_backward_pre_hook(lambda *args: None), "last (Linear) has a backward pre-hook"),
        (lambda f: parametrizations.weight_norm(f.last), "has a parametrization of weight; fuse first"),
        (lambda f: parametrizations.spectral_norm(f.last), "last (ParametrizedLinear) has a parametrization of weight"),
        (lambda f: _weight_norm_of_old(f.first), "first (Linear) has a forward pre-hook"),
        (lambda f: setattr(f, "forward", lambda t, y: y), "Field has its forward replaced"),
        (lambda f: setattr(f.first, "forward", lambda y: y), "first (Linear) has its forward replaced"),
        (lambda f: f.to("meta"), "its parameters are on the meta device"),
    ],
)
def test_altered_modules_are_refused(alter, message):
    func = Field(lambda self, t, y: self.net(y))
    assert fusable(func)
    alter(func)
    with pytest.raises(FusionError, match=re.escape(message)):
        fuse(func)
    assert fusable(func) == ("meta" in message)  # which only the comparison finds out


def test_global_hooks_are_refused():
    func = Field(lambda self, t, y: self.net(y))
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(FusionError, match="there are global forward hooks"):
            fuse(func)
    finally:
        handle.remove()
    handle = nn.modules.module.register_module_full_backward_hook(lambda *args: None)
    try:
        with pytest.raises(FusionError, match="there are global backward hooks"):
            fuse(func)
    finally:
        handle.remove()


def test_casts_inside_are_refused():
    def cast(self, t, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.net(y)

    with pytest.raises(FusionError, match=re.escape("with the same layers in torch.float32")):
        fuse(Field(cast, dtype=torch.float32))


def test_shapes_that_do_not_fit():
    func = Field(lambda self, t, y: self.second(torch.tanh(self.first(y))))
    with pytest.raises(FusionError, match="the first layer must have 4 inputs, as many as the last one has outputs"):
        fuse(func)


def test_other_arguments():
    with pytest.raises(TypeError, match="func must be a module or a function, got int"):
        fuse(3)
    for example in ([1.0], torch.tensor(1.0)):
        with pytest.raises(TypeError, match="example must be a tensor of at least one dimension"):
            fuse(nn.Linear(2, 2), example)
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    with pytest.raises(FusionError, match=re.escape("has its forward replaced, for example by torch.compile")):
        fuse(compiled)
    with pytest.raises(FusionError, match="is no Linear layer"):
        fuse(lambda t, y: -y)


def test_fusable_is_quiet():
    good = Field(lambda self, t, y: self.net(y**3))
    assert fusable(good)
    assert not any(fusable(Field(compute)) for compute, message in REFUSED.values() if "the gradient" not in message)
    for other in (nn.Conv1d(1, 1, 1), nn.ReLU(), nn.Sequential(), lambda t, y: y, 3):
        assert not fusable(other)


class Hinted(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()

    def forward(self, t, y):
        return self.net(y)


def test_odeint_hints_once_per_class():
    class Own(Hinted):
        pass

    class Compiled(Hinted):
        pass

    class Counting(Hinted):
        def forward(self, t, y):
            self.calls = getattr(self, "calls", 0) + 1
            return self.net(y)

    y = random(3, 2)
    with pytest.warns(
        FusionHint, match=re.escape("Own is a multilayer perceptron: pykernels.odeint(pykernels.fuse(")
    ) as w:
        expected = pykernels.odeint(Own(), y, TIMES, method="euler")
    assert w[0].filename == __file__
    assert expected.shape == (3, 3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pykernels.odeint(Own(), y, TIMES, method="euler")  # not a second time
        counting = Counting()
        pykernels.odeint(counting, y, TIMES, method="euler")  # not fusable
        assert counting.calls == 2
        pykernels.odeint(fuse(Own()), y, TIMES, method="euler")
        network = Compiled()
        torch.func.vmap(lambda y: pykernels.odeint(network, y, TIMES, method="euler"))(y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FusionHint)
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.compile
        torch.compile(lambda y: pykernels.odeint(network, y, TIMES, method="euler"), backend="eager")(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FusionHint)
        pykernels.odeint(Compiled(), y, TIMES, method="euler")


def test_other_threads_run_on_while_fx_traces():
    func, failed, stop = Field(lambda self, t, y: self.net(y)), [], threading.Event()
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh())

    def run():
        while not stop.is_set():
            try:
                network(torch.ones(2))
            except Exception as error:
                failed.append(error)
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(10):
            assert isinstance(fuse(func), MLPField)
    finally:
        stop.set()
        thread.join()
    assert failed == []
