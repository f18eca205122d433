"""MLPField: its values and gradients are those of plain modules stepped one by one, and it is a well-behaved module."""

from __future__ import annotations

import copy
import pickle
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import pykernels
from pykernels import FusionError
from pykernels.nn import MLPField, Sin, Swish
from pykernels.ops.latent_ode.reference import INPUT_MAPS
from pykernels.ops.latent_ode.tableaux import TABLEAUX

TIMES = torch.tensor([0.2, 0.5, 0.7, 1.3], dtype=torch.float64)

#: Modules of torch, with the activation and slope that a field calls them.
MODULES = {
    "relu": (nn.ReLU, "relu", None),
    "leaky_relu": (nn.LeakyReLU, "leaky_relu", None),
    "leaky_relu-0.2": (lambda: nn.LeakyReLU(0.2), "leaky_relu", 0.2),
    "tanh": (nn.Tanh, "tanh", None),
    "softplus": (nn.Softplus, "softplus", None),
    "silu": (nn.SiLU, "silu", None),
    "elu": (nn.ELU, "elu", None),
    "elu-0.5": (lambda: nn.ELU(0.5), "elu", 0.5),
    "sin": (Sin, "sin", None),
    "swish": (lambda: Swish(1.3, dtype=torch.float64), "silu", "learned"),
}


@pytest.fixture(autouse=True, params=["cpu", "reference"])
def backend(request):
    """Every backend that runs CPU tensors."""
    with pykernels.backend(request.param):
        yield request.param


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequential(dims, activation, inputs: int | None = None) -> nn.Sequential:
    modules: list[nn.Module] = []
    widths = [dims[0] if inputs is None else inputs, *dims[1:]]
    for i in range(len(dims) - 1):
        modules += [nn.Linear(widths[i], widths[i + 1], dtype=torch.float64), activation()]
    return nn.Sequential(*modules[:-1])


def stepped(func, y0, t, method="rk4", substeps=1):
    """States from one call of ``func`` for each stage: func is no module, so that nothing can be fused."""
    states = [y0]
    for t0, t1 in pairwise(t):
        for j in range(substeps):
            h = (t1 - t0) / substeps
            ends = torch.stack([t0 + j * h, t0 + (j + 1) * h])
            y0 = pykernels.odeint(lambda t, y: func(t, y), y0, ends, method=method)[-1]
        states.append(y0)
    return torch.stack(states)


def assert_same(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODULES)
def test_field_computes_what_its_modules_do(name):
    module, activation, slope = MODULES[name]
    network = sequential((3, 7, 6, 3), module)
    field = MLPField.from_sequential(network)
    y = random(2, 5, 3)
    assert (field.activation, field.slopes is None) == (activation, slope != "learned")
    assert_same(field(0.0, y), network(y), 1e-14)
    assert_same(field.trajectory(y, TIMES), stepped(lambda t, y: network(y), y, TIMES))
    if slope != "learned":
        own = MLPField((3, 7, 6, 3), activation, slope=slope, dtype=torch.float64)
        own.load_state_dict(field.state_dict())
        assert_same(own(0.0, y), network(y), 1e-14)
        assert_same(own.trajectory(y, TIMES), field.trajectory(y, TIMES), 0)


@pytest.mark.parametrize("input_map", INPUT_MAPS)
@pytest.mark.parametrize("time_input", [False, True])
def test_map_of_the_state_and_time_input(input_map, time_input):
    network = sequential((2, 8, 2), nn.Tanh, 2 + time_input)
    field = MLPField.from_sequential(network, time_input=time_input, input_map=input_map)
    maps = {
        "none": lambda y: y,
        "square": lambda y: y**2,
        "cube": lambda y: y**3,
        "sin": torch.sin,
        "cos": torch.cos,
        "tanh": torch.tanh,
    }

    def plain(t, y):
        a = maps[input_map](y)
        return network(torch.cat([a, t.expand(*y.shape[:-1], 1)], -1) if time_input else a)

    y = random(4, 2)
    assert_same(field(TIMES[1], y), plain(TIMES[1], y), 1e-14)
    assert_same(field(float(TIMES[1]), y), plain(TIMES[1], y), 1e-14)
    assert_same(field.trajectory(y, TIMES, substeps=2), stepped(plain, y, TIMES, substeps=2))


@pytest.mark.parametrize("method", TABLEAUX)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
def test_methods_and_shapes_of_the_state(method, lead):
    field = MLPField((2, 6, 2), "softplus", time_input=True, dtype=torch.float64)
    y = random(*lead, 2)
    states = field.trajectory(y, TIMES, method=method, substeps=3)
    assert states.shape == (4, *lead, 2)
    assert_same(states, stepped(field, y, TIMES, method, 3))


def test_all_options_are_those_of_mlp_odeint():
    field = MLPField((2, 6, 5, 2), "silu", slope="learned", control_dim=3, dtype=torch.float64)
    with torch.no_grad():
        for i, slope in enumerate(field.slopes):
            slope.fill_(0.5 + i)
    y, control = random(2, 3, 2), random(3, 2, 3, 3, seed=1)
    group = torch.tensor([[0, 1, 1], [1, 0, 0]])
    correction = (
        [random(2, 4, 5, seed=2), random(2, 2, 4, seed=3)],
        [random(2, 4, seed=4), None],
        random(2, 1, seed=5),
    )
    mask, injected = random(4, 2, 3, seed=6) > 0, random(4, 2, 3, 2, seed=7)
    options = {"method": "heun3", "substeps": 2, "correction": correction, "reverse": True, "validate": False}
    options |= {"return_residual_norms": True, "return_energy": "time", "max_memory": 0}
    found = field.trajectory(y, TIMES, control=control, group=group, reinject=(mask, injected), **options)
    layers = list(field.layers)
    expected = pykernels.mlp_odeint(
        y.reshape(6, 2),
        TIMES,
        [layer.weight for layer in layers],
        [layer.bias for layer in layers],
        activation="silu",
        slope=torch.stack(list(field.slopes)),
        control=control.reshape(3, 6, 3),
        group=group.reshape(6),
        reinject=(mask.reshape(4, 6), injected.reshape(4, 6, 2)),
        **options,
    )
    for value, flat, shape in zip(found, expected, [(4, 2, 3, 2), (3, 2, 3), (3, 2, 3)], strict=True):
        assert value.shape == shape
        assert_same(value.reshape(flat.shape), flat, 0)
    # Control is an input of the plain field too.
    z = random(3, 3, seed=8)
    assert_same(
        field.trajectory(y[0], TIMES, control=z.expand(3, 3, 3)), stepped(lambda t, y: field(t, y, z), y[0], TIMES)
    )


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_the_modules(name):
    network = sequential((2, 5, 4, 2), MODULES[name][0])
    field = MLPField.from_sequential(network)
    leaves = [random(3, 2).requires_grad_(), TIMES.clone().requires_grad_(), *network.parameters()]
    weights = random(4, 3, 2, seed=1)
    found = torch.autograd.grad((field.trajectory(leaves[0], leaves[1]) * weights).sum(), leaves)
    expected = torch.autograd.grad((stepped(lambda t, y: network(y), *leaves[:2]) * weights).sum(), leaves)
    assert len(found) == 2 + 6 + 2 * (name == "swish")
    for gradient, reference in zip(found, expected, strict=True):
        assert_same(gradient, reference)


def test_gradcheck_through_the_module():
    field = MLPField((2, 4, 3, 2), "silu", slope="learned", time_input=True, input_map="cube", dtype=torch.float64)
    names = [name for name, _ in field.named_parameters()]

    def states(y0, t, *parameters):
        for name, value in zip(names, parameters, strict=True):
            module, _, attribute = name.rpartition(".")
            owner = copied.get_submodule(module)
            owner._parameters.pop(attribute, None)
            setattr(owner, attribute, value)
        return copied.trajectory(y0, t, method="rk4_classic")

    copied = copy.deepcopy(field)
    values = [p.detach().clone().requires_grad_() for p in field.parameters()]
    assert torch.autograd.gradcheck(states, [random(2, 2).requires_grad_(), TIMES[:3].requires_grad_(), *values])


def test_layers_are_shared():
    shared = Swish(dtype=torch.float64)
    network = nn.Sequential(
        nn.Sequential(nn.Linear(2, 4, dtype=torch.float64), shared, nn.Identity()),
        nn.Linear(4, 4, bias=False, dtype=torch.float64),
        nn.Dropout(0.0),
        shared,  # the same module twice
        nn.Linear(4, 2, dtype=torch.float64),
    )
    field = MLPField.from_sequential(network)
    assert {id(p) for p in field.parameters()} == {id(p) for p in network.parameters()}
    assert list(field.layers) == [network[0][0], network[1], network[4]]
    before, y = [p.clone() for p in network.parameters()], random(3, 2)
    optimizer = torch.optim.SGD(field.parameters(), 0.1)
    field.trajectory(y, TIMES)[-1].square().sum().backward()
    optimizer.step()
    assert all((p != q).any() for p, q in zip(network.parameters(), before, strict=True))
    assert_same(field.trajectory(y, TIMES), stepped(lambda t, y: network(y), y, TIMES))
    network[1].weight = nn.Parameter(random(4, 4))  # the layer is the same one, so a new parameter arrives too
    assert_same(field.trajectory(y, TIMES), stepped(lambda t, y: network(y), y, TIMES))


def test_learned_slopes_start_at_silu_and_have_gradients():
    learned = MLPField((2, 5, 5, 2), "silu", slope="learned", dtype=torch.float64)
    fixed = MLPField((2, 5, 5, 2), "silu", dtype=torch.float64)
    fixed.layers.load_state_dict(learned.layers.state_dict())
    y = random(3, 2)
    assert_same(learned.trajectory(y, TIMES), fixed.trajectory(y, TIMES))
    learned.trajectory(y, TIMES).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in learned.parameters())
    fixed.slope = 0.3
    with torch.no_grad():
        for slope in learned.slopes:
            slope.fill_(0.3)
    assert_same(learned(0.0, y), fixed(0.0, y))
    assert_same(learned.trajectory(y, TIMES), fixed.trajectory(y, TIMES))


class Negative(MLPField):
    def forward(self, t, y):
        return -super().forward(t, y)


class OtherLinear(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def _double_first_layer(field):
    layer = OtherLinear(2, 4, dtype=torch.float64)
    layer.load_state_dict(field.layers[0].state_dict())
    field.layers[0] = layer


@pytest.fixture
def calls(monkeypatch):
    """Counts the trajectories in one call."""
    counted = []
    whole = MLPField.trajectory

    def trajectory(self, *args, **keywords):
        counted.append(keywords)
        return whole(self, *args, **keywords)

    monkeypatch.setattr(MLPField, "trajectory", trajectory)
    return counted


@pytest.mark.parametrize("method", TABLEAUX)
def test_odeint_takes_the_trajectory_in_one_call(method, calls):
    field = MLPField((2, 4, 2), "tanh", time_input=True, dtype=torch.float64)
    y = random(3, 2)
    for t in (TIMES, TIMES.flip(0)):
        assert_same(pykernels.odeint(field, y, t, method=method), stepped(field, y, t, method))
    even = torch.linspace(0, 1, 5, dtype=torch.float64)
    found = pykernels.odeint(field, y, even, method=method, options={"step_size": 0.125})
    assert_same(found, stepped(field, y, even, method, 2))
    assert len(calls) == 3
    found = pykernels.odeint(field, y, even, method=method, options={"step_size": 0.1})
    expected = pykernels.odeint(lambda t, y: field(t, y), y, even, method=method, options={"step_size": 0.1})
    assert_same(found, expected)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "prepare",
    [
        lambda field: field.register_forward_hook(lambda module, args, output: 2 * output),
        lambda field: field.register_forward_pre_hook(lambda module, args: (args[0], 2 * args[1])),
        lambda field: field.layers[1].register_forward_hook(lambda module, args, output: 2 * output),
        lambda field: setattr(field, "forward", lambda t, y: -y),
        lambda field: setattr(field.layers[0], "forward", lambda y: torch.ones(*y.shape[:-1], 4).double()),
        lambda field: setattr(field, "__class__", Negative),
        _double_first_layer,
        lambda field: spectral_norm(field.layers[0]),
    ],
    ids=["hook", "pre-hook", "layer-hook", "forward", "layer-forward", "subclass", "layer-subclass", "parametrization"],
)
def test_odeint_goes_around_nothing(prepare, calls):
    field = MLPField((2, 4, 2), "tanh", dtype=torch.float64).eval()
    prepare(field)
    y = random(3, 2)
    assert_same(pykernels.odeint(field, y, TIMES, method="rk4"), stepped(field, y, TIMES))
    assert calls == []


def test_odeint_of_other_states_and_dtypes(calls):
    field = MLPField((2, 4, 2), "tanh", dtype=torch.bfloat16)
    states = pykernels.odeint(field, random(3, 2).bfloat16(), TIMES.bfloat16(), method="rk4")
    assert states.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = random(3, 2).float()
        states = pykernels.odeint(field.float(), y, TIMES.float(), method="euler")
        torch.testing.assert_close(states, stepped(field, y, TIMES.float(), "euler"))
    field.double()
    pair = (random(3, 2), random(3, 2, seed=1))
    both = pykernels.odeint(lambda t, y: (field(t, y[0]), field(t, y[1])), pair, TIMES, method="rk4")
    assert calls == []
    assert_same(both[1], pykernels.odeint(field, pair[1], TIMES, method="rk4"))
    assert len(calls) == 1
    with pytest.raises(ValueError, match=re.escape("y must have shape (..., 2), got (3, 4)")):
        pykernels.odeint(field, random(3, 4), TIMES, method="rk4")
    controlled = MLPField((2, 4, 2), "tanh", control_dim=1, dtype=torch.float64)
    with pytest.raises(ValueError, match="z must be given to a field with control_dim=1"):
        pykernels.odeint(controlled, pair[0], TIMES, method="rk4")


@pytest.mark.parametrize(
    "prepare",
    [
        (lambda field: field.layers[1].register_forward_hook(print), "layers.1 has a forward hook, which a trajectory"),
        (_double_first_layer, "layers.0 (OtherLinear) has a forward of its own, which"),
    ],
    ids=["hook", "subclass"],
)
def test_trajectory_does_not_go_around_layers_in_silence(prepare):
    field = MLPField((2, 4, 2), "tanh", dtype=torch.float64)
    prepare[0](field)
    with pytest.raises(RuntimeError, match=re.escape(prepare[1])):
        field.trajectory(random(3, 2), TIMES)


def test_parametrized_layers_have_gradients_in_trajectories():
    field = MLPField((2, 4, 2), "tanh", dtype=torch.float64)
    weight_norm(field.layers[0])
    leaves, y = list(field.parameters()), random(3, 2)
    assert len(leaves) == 5
    found = torch.autograd.grad(field.trajectory(y, TIMES).sum(), leaves)
    expected = torch.autograd.grad(stepped(field, y, TIMES).sum(), leaves)
    for gradient, reference in zip(found, expected, strict=True):
        assert_same(gradient, reference)


def test_it_is_a_well_behaved_module(tmp_path):
    field = MLPField((2, 4, 4, 2), "silu", slope="learned", time_input=True, input_map="sin", dtype=torch.float64)
    y = random(3, 2)
    expected = field.trajectory(y, TIMES)
    copied, pickled = copy.deepcopy(field), pickle.loads(pickle.dumps(field))
    loaded = MLPField((2, 4, 4, 2), "silu", slope="learned", time_input=True, input_map="sin")
    torch.save(field.state_dict(), tmp_path / "field.pt")
    loaded.double().load_state_dict(torch.load(tmp_path / "field.pt"))
    for other in (copied, pickled, loaded):
        assert_same(other.trajectory(y, TIMES), expected, 0)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in field.parameters()}
        assert repr(other) == repr(field)
    assert list(field.state_dict()) == [
        *(f"layers.{i}.{name}" for i in range(3) for name in ("weight", "bias")),
        "slopes.0",
        "slopes.1",
    ]
    single = field.float().trajectory(y.float(), TIMES.float())
    torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=1e-5)  # rounding of float32


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (lambda: MLPField((2, 4, 2), "tanh"), "(2, 4, 2), 'tanh'"),
        (lambda: MLPField((2, 2), "elu", slope=0.5, time_input=True), "(2, 2), 'elu', slope=0.5, time_input=True"),
        (
            lambda: MLPField((1, 3, 1), "silu", slope="learned", control_dim=2, input_map="cos", bias=False),
            "(1, 3, 1), 'silu', slope='learned', input_map='cos', control_dim=2",
        ),
    ],
)
def test_printing(field, text):
    assert field().extra_repr() == text
    assert text in repr(field())


def test_layers_start_as_those_of_torch():
    torch.manual_seed(3)
    field = MLPField((2, 8, 2), "relu", time_input=True, control_dim=4)
    torch.manual_seed(3)
    layers = [nn.Linear(7, 8), nn.Linear(8, 2)]
    for mine, theirs in zip(field.layers, layers, strict=True):
        assert (mine.weight == theirs.weight).all()
        assert (mine.bias == theirs.bias).all()


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # of torch.compile
def test_compile_in_one_graph():
    network = sequential((2, 4, 4, 2), lambda: Swish(0.7, dtype=torch.float64), 3)
    field = MLPField.from_sequential(network, time_input=True)
    y = random(2, 3, 2).requires_grad_()

    def loss(y):
        return field.trajectory(y, TIMES[:3], method="euler").square().sum() + field(TIMES[0], y).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [y, *field.parameters()]
    assert_same(compiled(y), loss(y))
    found, expected = (torch.autograd.grad(f(y), leaves) for f in (compiled, loss))
    for gradient, reference in zip(found, expected, strict=True):
        assert_same(gradient, reference)

    def through_odeint(y):
        return pykernels.odeint(field, y, TIMES[:2], method="midpoint")

    compiled = torch.compile(through_odeint, fullgraph=True, backend="aot_eager")
    assert_same(compiled(y), through_odeint(y))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.func itself
def test_function_transforms():
    field = MLPField((2, 4, 2), "tanh", time_input=True, dtype=torch.float64)
    y = random(5, 2)
    mapped = torch.func.vmap(lambda y: field.trajectory(y, TIMES))(y)
    assert_same(mapped.transpose(0, 1), field.trajectory(y, TIMES))
    parameters = {f"field.{name}": p.detach() for name, p in field.named_parameters()}

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.field = field

        def forward(self, y):
            return self.field.trajectory(y, TIMES).sum()

    gradients = torch.func.grad(lambda p: torch.func.functional_call(Loss(), p, (y,)))(parameters)
    expected = torch.autograd.grad(Loss()(y), list(field.parameters()))
    for gradient, reference in zip(gradients.values(), expected, strict=True):
        assert_same(gradient, reference)
    hessian = torch.func.hessian(lambda y: field.trajectory(y, TIMES)[-1].sum())(y[0])
    by_steps = torch.func.hessian(lambda y: stepped(field, y, TIMES)[-1].sum())(y[0])
    assert_same(hessian, by_steps)


@settings(max_examples=25, deadline=None, database=None)
@given(data=st.data())
def test_random_fields(data):
    dim, control = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 2))
    dims = [dim, *data.draw(st.lists(st.integers(1, 9), max_size=3)), dim]
    field = MLPField(
        dims,
        data.draw(st.sampled_from(["relu", "leaky_relu", "tanh", "softplus", "silu", "elu", "sin"])),
        time_input=data.draw(st.booleans()),
        input_map=data.draw(st.sampled_from(list(INPUT_MAPS))),
        control_dim=control,
        bias=data.draw(st.booleans()),
        dtype=torch.float64,
    )
    lead = data.draw(st.lists(st.integers(1, 3), max_size=2))
    y, z = random(*lead, dim), random(*lead, control, seed=1) if control else None
    method, substeps = data.draw(st.sampled_from(list(TABLEAUX))), data.draw(st.integers(1, 3))
    t = torch.tensor([0.4, 0.1], dtype=torch.float64)
    held = None if z is None else z[None]
    found = field.trajectory(y, t, method=method, substeps=substeps, control=held)
    assert_same(found, stepped(lambda t, y: field(t, y, z), y, t, method, substeps))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPField((2,), "tanh"), "dims must be (D, hidden widths ..., D)"),
        (lambda: MLPField((2, 4, 3), "tanh"), "got (2, 4, 3)"),
        (lambda: MLPField((2, 0, 2), "tanh"), "got (2, 0, 2)"),
        (lambda: MLPField((2, 4.0, 2), "tanh"), "got (2, 4.0, 2)"),
        (lambda: MLPField((2, 4, 2), "gelu"), "activation must be one of 'relu', 'leaky_relu', 'tanh'"),
        (lambda: MLPField((2, 4, 2), "tanh", slope=0.2), "slope is for leaky_relu, elu and silu"),
        (lambda: MLPField((2, 4, 2), "elu", slope=-1.0), "slope must be at least 0 and finite, got -1.0"),
        (lambda: MLPField((2, 4, 2), "elu", slope="learned"), "'learned' for silu, got 'learned' with 'elu'"),
        (lambda: MLPField((2, 4, 2), "silu", slope="free"), "slope must be a number, or 'learned' for silu"),
        (lambda: MLPField((2, 4, 2), "tanh", input_map="exp"), "input_map must be one of 'none', 'square', 'cube'"),
        (lambda: MLPField((2, 4, 2), "tanh", control_dim=-1), "control_dim must be an int of at least 0, got -1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"y0": random(3, 4)}, "y0 must have shape (..., 2), got (3, 4)"),
        ({"control": random(2, 3, 3)}, "control must have shape (T-1, B, C), here (3, 3, C), got (2, 3, 3)"),
        ({"control": random(3, 3, 4)}, "control must have shape (T-1, ..., 3), got (3, 3, 4)"),
        ({"control": None}, "control must be given to a field with control_dim=3"),
        ({"method": "dopri5"}, "method must be one of 'euler', 'midpoint'"),
        ({"substeps": 0}, "substeps must be an int of at least 1"),
        ({"t": TIMES[[0, 2, 1, 3]]}, "t must be strictly increasing"),
        ({"y0": random(2, 3, 2), "control": random(3, 3, 2, 3)}, "control must have dimensions (2, 3) from 1 on"),
    ],
)
def test_bad_arguments_of_trajectories(keywords, message):
    field = MLPField((2, 4, 2), "tanh", control_dim=3, dtype=torch.float64)
    arguments = {"y0": random(3, 2), "t": TIMES, "control": random(3, 3, 3)} | keywords
    with pytest.raises(ValueError, match=re.escape(message)):
        field.trajectory(**arguments)


def test_widths_of_numpy():
    assert MLPField(np.array([2, 4, 2]), "tanh").dims == (2, 4, 2)


def test_wrong_types_and_calls():
    field = MLPField((2, 4, 2), "tanh", dtype=torch.float64)
    with pytest.raises(TypeError, match="y0 must be a tensor, got list"):
        field.trajectory([1.0, 2.0], TIMES)
    with pytest.raises(TypeError, match=re.escape("reinject must be a tuple (mask, states)")):
        field.trajectory(random(2, 3, 2), TIMES, reinject=3)
    with pytest.raises(ValueError, match="control must not be given to a field with control_dim=0"):
        field.trajectory(random(3, 2), TIMES, control=random(3, 3, 1))
    with pytest.raises(ValueError, match="z must not be given to a field with control_dim=0"):
        field(0.0, random(3, 2), random(3, 1))
    with pytest.raises(ValueError, match=re.escape("y must have shape (..., 2), got ()")):
        field(0.0, random())
    with pytest.raises(FloatingPointError, match="the state of sample 1 is not finite"):
        field.trajectory(torch.tensor([[0.0, 0.0], [0.0, torch.nan]], dtype=torch.float64), TIMES)


def _hooked() -> nn.Sequential:
    network = sequential((2, 4, 2), nn.Tanh)
    network[2].register_forward_pre_hook(lambda *args: None)
    return network


class Doubled(nn.Sequential):
    def forward(self, input):
        return 2 * super().forward(input)


class OwnTanh(nn.Tanh):
    pass


L = nn.Linear


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: nn.Sequential(), "the network must end with a Linear, but there is none"),
        (lambda: nn.Sequential(L(2, 4), nn.Tanh()), "must end with a Linear, the last layer has no activation"),
        (lambda: nn.Sequential(L(2, 4), L(4, 2)), "there is no activation in front of 1 (Linear)"),
        (lambda: nn.Sequential(nn.Tanh(), L(2, 2)), "0 (Tanh) must come between two Linear layers"),
        (
            lambda: nn.Sequential(L(2, 4), nn.Tanh(), L(4, 4), nn.ELU(0.5), L(4, 2)),
            "all activations must be the same, got tanh and elu(slope=0.5)",
        ),
        (
            lambda: nn.Sequential(L(2, 4), nn.SiLU(), L(4, 4), Swish(), L(4, 2)),
            "got silu(slope=1.0) and silu(slope=learned)",
        ),
        (lambda: nn.Sequential(L(2, 4), nn.Tanh(), L(3, 2)), "Linear number 1 has 4 outputs, the next one 3 inputs"),
        (lambda: nn.Sequential(L(3, 4), nn.Tanh(), L(4, 2)), "and one more with time_input=True; it has 3"),
        (
            lambda: nn.Sequential(L(2, 4), nn.GELU(), L(4, 2)),
            "1 (GELU) is none of the known activations: ReLU, LeakyReLU",
        ),
        (lambda: nn.Sequential(L(2, 4), OwnTanh(), L(4, 2)), "1 (OwnTanh) is none of the known activations"),
        (lambda: nn.Sequential(L(2, 4), nn.Softplus(2), L(4, 2)), "1 (Softplus) is none of the known activations"),
        (
            lambda: nn.Sequential(L(2, 4), nn.Sequential(nn.Tanh(), nn.Dropout(0.1)), L(4, 2)).eval(),
            "1.1 (Dropout)",
        ),
        (lambda: nn.Sequential(OtherLinear(2, 4), nn.Tanh(), L(4, 2)), "0 (OtherLinear) must come between"),
        (lambda: Doubled(L(2, 4), nn.Tanh(), L(4, 2)), "Doubled has a forward of its own; see pykernels.fuse"),
        (_hooked, "2 (Linear) has a forward pre-hook"),
        (
            lambda: nn.Sequential(L(2, 4), nn.Tanh(), weight_norm(L(4, 2))),
            "2 (ParametrizedLinear) has a parametrization of weight",
        ),
    ],
)
def test_networks_that_are_no_fields(network, message):
    with pytest.raises(FusionError, match=re.escape(message)):
        MLPField.from_sequential(network())


def test_from_sequential_takes_nothing_else():
    with pytest.raises(TypeError, match=r"network must be an nn\.Sequential, got Linear"):
        MLPField.from_sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="input_map must be one of"):
        MLPField.from_sequential(nn.Sequential(nn.Linear(2, 2)), input_map="exp")
    with pytest.raises(FusionError, match="and one for the time, and 3 of the control; it has 2"):
        MLPField.from_sequential(nn.Sequential(nn.Linear(2, 2)), time_input=True, control_dim=3)
