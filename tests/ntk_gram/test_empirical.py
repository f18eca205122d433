"""Tangent kernels of finite networks against explicit Jacobians."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import pykernels
from pykernels import empirical_ntk, empirical_ntk_matvec
from pykernels.nn.empirical_ntk import _Structure

from . import finite_networks as networks
from .finite_networks import OTHERS, STRUCTURED, kernel, mlp

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch's own, in forward mode
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # weight normalisation under vmap
]
ALL = [*STRUCTURED, *OTHERS]


def close(found, expected, tolerance=3e-14):
    """Up to rounding, of the norm; 5e-15 seen."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    found, expected = found.detach(), expected.detach()
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("trace", [True, False], ids=["trace", "all outputs"])
@pytest.mark.parametrize("name", ALL)
def test_kernel_is_that_of_the_jacobians(name: str, trace: bool):
    module, x, y = networks.network(name)
    expected = kernel(module, x, y, trace)
    for method in ("auto", "jacobian", *(["structured"] if name in STRUCTURED else [])):
        for max_memory in (1 << 30, 100_000):
            options = {"trace_outputs": trace, "method": method, "max_memory": max_memory}
            close(empirical_ntk(module, x, y, **options), expected)
            close(empirical_ntk(module, y, **options), kernel(module, y, y, trace))


@pytest.mark.parametrize("name", STRUCTURED)
def test_both_forms_of_the_gradients_give_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch):
    module, x, y = networks.network(name)
    for by_rows in (True, False):
        plan = _Structure.__init__

        def forced(self, *args, plan=plan, by_rows=by_rows):
            plan(self, *args)
            self.by_rows = dict.fromkeys(self.by_rows, by_rows)

        with monkeypatch.context() as patch:
            patch.setattr(_Structure, "__init__", forced)
            for trace in (True, False):
                found = empirical_ntk(module, x, y, trace_outputs=trace, method="structured")
                close(found, kernel(module, x, y, trace))


@pytest.mark.parametrize("name", ALL)
def test_product_is_that_with_the_matrix(name: str):
    module, x, y = networks.network(name)
    for trace, columns in ((True, ()), (True, (3,)), (False, ()), (False, (1,))):
        theta = kernel(module, x, y, trace)
        v = torch.randn(4, *([] if trace else theta.shape[3:]), *columns, dtype=torch.float64)
        expected = torch.einsum("nm,m...->n..." if trace else "nmoq,mq...->no...", theta, v)
        close(empirical_ntk_matvec(module, x, y, v, trace_outputs=trace), expected)


def test_memory_of_the_product_does_not_change_it():
    module, x, y = networks.network("images")
    v = torch.randn(4, 3, 5, dtype=torch.float64)
    found = empirical_ntk_matvec(module, x, y, v, trace_outputs=False, max_memory=1)
    close(found, empirical_ntk_matvec(module, x, y, v, trace_outputs=False), 1e-14)


@pytest.mark.parametrize("name", OTHERS)
def test_networks_that_need_jacobians_say_why(name: str):
    module, x, _ = networks.network(name)
    with pytest.raises(ValueError, match=r"^method='structured' cannot treat module: .*(weight|bias|original)"):
        empirical_ntk(module, x, method="structured")


class OutOfSight(nn.Module):
    """The same weight in a linear map, and where no torch function is called with it."""

    def __init__(self, mode: str):
        super().__init__()
        self.linear, self.mode = nn.Linear(3, 3), mode

    def forward(self, x):
        h = self.linear(x)
        if self.mode == "function":
            return h + _Hidden.apply(x, self.linear.weight)
        if self.mode == "batch":
            return h - h.mean(0).tanh()
        x.mul_(2)
        return h


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(x, weight):
        return x @ weight.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = torch.from_numpy(grad.detach().numpy())  # which no transformation can follow
        return grad @ weight.sin().T, (x.T @ grad) * weight.cos()


@pytest.mark.parametrize("mode", ["function", "batch", "in place"])
def test_what_the_record_cannot_see_is_noticed(mode: str):
    with pytest.raises(ValueError, match=r"^method='structured' cannot treat module: .*linear\.weight"):
        empirical_ntk(OutOfSight(mode), torch.randn(4, 3), method="structured")


def test_functions_without_a_rule_for_vmap():
    module, x = OutOfSight("function").double(), torch.randn(4, 3, dtype=torch.float64)
    close(empirical_ntk(module, x), kernel(module, x, x, True))
    module.linear.requires_grad_(False)
    hidden = nn.Sequential(nn.Linear(3, 3), module).double()
    close(empirical_ntk(hidden, x), kernel(hidden, x, x, True))
    with pytest.raises(ValueError, match=r"gradients of several outputs at a time failed"):
        empirical_ntk(hidden, x, method="structured")


def test_weights_of_positions_and_samples_are_not_mixed_up():
    """Time first: as many time steps as samples look like a batch."""
    module = nn.Sequential(mlp(3, 4, 2), nn.Flatten())
    time_first = nn.Sequential(_Transpose(), module[0], _Transpose(), nn.Flatten()).double()
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    close(empirical_ntk(time_first, x), kernel(time_first, x, x, True))
    with pytest.raises(ValueError, match="cannot treat"):
        empirical_ntk(time_first, x, method="structured")


class _Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)


@pytest.mark.parametrize("method", ["structured", "jacobian"])
def test_gradients_and_second_gradients(method: str):
    module, x, y = networks.network("mlp", 2, 2)
    inputs = [t.requires_grad_() for t in (x, y, *module.parameters())]

    def theta(x, y, *_):
        return empirical_ntk(module, x, y, method=method, create_graph=True)

    def expected(x, y, *_):
        return kernel(module, x, y, True)

    grads = [
        torch.autograd.grad(f(*inputs).square().sum(), inputs, create_graph=True, materialize_grads=True)
        for f in (theta, expected)
    ]
    for found, should in zip(*grads, strict=True):
        close(found, should)
    seconds = [torch.autograd.grad(g[0].square().sum(), inputs, materialize_grads=True) for g in grads]
    for found, should in zip(*seconds, strict=True):
        close(found, should)


def test_gradients_of_the_product():
    module, x, z = networks.network("images", 2, 3)
    v = torch.randn(3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, z, v, *module.parameters())]
    products = [empirical_ntk_matvec(module, x, z, v, create_graph=True), kernel(module, x, z, True) @ v]
    grads = [torch.autograd.grad(p.square().sum(), inputs, materialize_grads=True) for p in products]
    for found, expected in zip(*grads, strict=True):
        close(found, expected)


def test_parameters_are_constants_unless_asked_for():
    module, x, _ = networks.network("mlp")
    for method in ("structured", "jacobian"):
        assert not empirical_ntk(module, x, method=method).requires_grad
        assert empirical_ntk(module, x, method=method, create_graph=True).requires_grad
        with torch.no_grad():
            assert not empirical_ntk(module, x, method=method, create_graph=True).requires_grad
    assert not empirical_ntk_matvec(module, x, x, x[:, 0]).requires_grad


@pytest.mark.parametrize("name", ["residual", "product"])
def test_module_stays_as_it_is(name: str):
    module, x, y = networks.network(name)
    module.train(name == "product")
    state, training, given = copy.deepcopy(module.state_dict()), module.training, x.clone()
    empirical_ntk(module, x, y)
    empirical_ntk_matvec(module, x, y, y.flatten(1)[:, 0])
    assert module.training == training
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert torch.equal(x, given)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


def test_buffers_that_a_call_changes_are_not_changed():
    module = Counting()
    empirical_ntk(module, torch.randn(3, 3), method="structured")
    assert module.calls == 0


@pytest.mark.parametrize("name", ["mlp", "images", "product"])
@pytest.mark.parametrize(("n", "m"), [(0, 2), (2, 0), (0, 0), (1, 1), (1, 3)])
def test_small_and_empty_sets(name: str, n: int, m: int):
    module, x, y = networks.network(name, n, m)
    outputs = 2 if name == "product" else 3
    assert empirical_ntk(module, x, y).shape == (n, m)
    full = empirical_ntk(module, x, y, trace_outputs=False)
    assert full.shape == (n, m, outputs, outputs)
    if n and m:
        close(full, kernel(module, x, y, False))
    product = empirical_ntk_matvec(module, x, y, y.new_ones(m, outputs), trace_outputs=False)
    assert product.shape == (n, outputs)
    torch.testing.assert_close(product, full.sum((1, 3)), rtol=0, atol=2e-14)  # of sums up to 10


def test_kernel_of_a_set_with_itself_is_symmetric_and_positive():
    module, x, _ = networks.network("images", 7)
    for max_memory in (1 << 30, 10_000):
        theta = empirical_ntk(module, x, trace_outputs=False, max_memory=max_memory)
        torch.testing.assert_close(theta, theta.permute(1, 0, 3, 2), rtol=0, atol=2e-15)
        eigenvalues = torch.linalg.eigvalsh(theta.permute(0, 2, 1, 3).reshape(21, 21))
        assert eigenvalues[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(dtype: torch.dtype):
    module, x, y = networks.network("mlp", 5, 6, dtype)
    expected = empirical_ntk(copy.deepcopy(module).double(), x.double(), y.double())
    for method in ("structured", "jacobian"):
        found = empirical_ntk(module, x, y, method=method)
        assert found.dtype == dtype
        assert float((found.double() - expected).norm() / expected.norm()) < 4 * torch.finfo(dtype).eps


def test_in_inference_mode():
    module, x, _ = networks.network("mlp")
    expected = empirical_ntk(module, x)
    with torch.inference_mode():
        close(empirical_ntk(module, x.clone()), expected)
        close(empirical_ntk_matvec(module, x.clone(), x, x[:, 0]), expected @ x[:, 0])


def ntk_parametrised(widths, weight_std, bias_std):
    """A ReLU network with weights N(0, 1), scaled by weight_std / sqrt(fan in), and likewise biases."""

    class Layer(nn.Module):
        def __init__(self, fan_in, fan_out, bias):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(fan_out, fan_in, dtype=torch.float64))
            self.shift = nn.Parameter(torch.randn(fan_out, dtype=torch.float64)) if bias else None
            self.factor = weight_std / math.sqrt(fan_in)

        def forward(self, x):
            y = nn.functional.linear(self.factor * x, self.weight)
            return y if self.shift is None else y + bias_std * self.shift

    layers = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        layers += [Layer(fan_in, fan_out, bias=i < len(widths) - 2), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_wide_networks_have_the_analytic_kernel():
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    expected = pykernels.NTK(2, "relu", weight_std=1.3, bias_std=0.4).double().gram(x, y, backend="reference")
    errors = []
    for width in (64, 1024):
        found = torch.stack([empirical_ntk(ntk_parametrised([3, width, width, 1], 1.3, 0.4), x, y) for _ in range(8)])
        errors.append(float((found - expected).norm(dim=(1, 2)).mean() / expected.norm()))
    assert errors[1] < 0.12  # 0.094 seen, by the width
    assert errors[1] < 0.5 * errors[0]  # the deviation falls as 1 / sqrt(width), by 4 here


def negative_then_random():
    """Random slopes matter for negative numbers only."""
    module = nn.Sequential(nn.Linear(5, 2), nn.RReLU())
    nn.init.constant_(module[0].bias, -1.0)
    return module


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"module": lambda x: x}, TypeError, "module must be an nn.Module, got function"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \(N, ...\), got \(\)"),
        (
            {"x": torch.zeros(3, 5).double()},
            ValueError,
            "x must be torch.float32 like the parameters, got torch.float64",
        ),
        (
            {"y": torch.zeros(3, 4)},
            ValueError,
            r"y must have samples like those of x, \(5,\) of torch.float32 on cpu, got \(4,\)",
        ),
        ({"y": torch.zeros(3, 5).double()}, ValueError, "y must have samples like those of x"),
        ({"x": torch.zeros(3, 5, device="meta")}, ValueError, "x must be on cpu like the parameters, got meta"),
        ({"trace_outputs": 1}, TypeError, "trace_outputs must be True or False, got 1"),
        ({"method": "fast"}, ValueError, "method must be one of 'auto', 'structured', 'jacobian', got 'fast'"),
        ({"max_memory": 0}, ValueError, "max_memory must be a number of bytes, at least 1, got 0"),
        ({"module": nn.GRU(5, 2)}, TypeError, "module must return a tensor, got tuple"),
        (
            {"module": nn.Flatten(0)},
            ValueError,
            r"module must return real numbers for each sample, shape \(1, ...\), got \(5,\)",
        ),
        (
            {"module": nn.BatchNorm1d(5)},
            ValueError,
            r"module normalises over the batch in BatchNorm1d, .* call its eval\(\)",
        ),
        (
            {"module": nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False)).eval()},
            ValueError,
            r"module normalises over the batch in 0 \(BatchNorm1d\)",
        ),
        (
            {"module": nn.Sequential(nn.Linear(5, 2), nn.Dropout())},
            ValueError,
            r"module drops out at random in 1 \(Dropout\)",
        ),
        ({"module": negative_then_random()}, ValueError, "module draws random numbers"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        empirical_ntk(**{"module": mlp(5, 3), "x": torch.zeros(3, 5), **arguments})


def test_samples_may_be_numbers_of_words():
    module = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2)).double()
    x, y = torch.randint(7, (3, 3)), torch.randint(7, (4, 3))
    expected = kernel(module, x, y, True)
    close(empirical_ntk(module, x, y), expected)
    v = torch.randn(4, dtype=torch.float64)
    close(empirical_ntk_matvec(module, x, y, v), expected.detach() @ v)


def test_errors_of_the_product():
    module, x = mlp(5, 3), torch.zeros(2, 5)
    for v, trace, message in (
        (torch.zeros(3), True, r"v must have shape \(2\) or \(2, p\), got \(3,\)"),
        (torch.zeros(2), False, r"v must have shape \(2, 3\) or \(2, 3, p\), got \(2,\)"),
        (torch.zeros(2).double(), True, "v must be torch.float32 on cpu like the outputs, got torch.float64 on cpu"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            empirical_ntk_matvec(module, x, x, v, trace_outputs=trace)
    with pytest.raises(TypeError, match=r"^v must be a tensor, got float"):
        empirical_ntk_matvec(module, x, x, 1.0)
    with pytest.raises(ValueError, match=r"^z must have samples like those of x"):
        empirical_ntk_matvec(module, x, x[:, :4], torch.zeros(2))
