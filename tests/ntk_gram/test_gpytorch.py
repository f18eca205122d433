"""The kernel of infinitely wide networks in GPyTorch."""

import warnings

import pytest
import torch

pytest.importorskip("gpytorch")
import gpytorch
from gpytorch.constraints import Interval
from gpytorch.kernels import ScaleKernel
from gpytorch.priors import LogNormalPrior

import pykernels
from pykernels.gpytorch import NTKKernel

#: Scales begin in float32, and go through the inverse of softplus and back.
FLOAT32 = {"rtol": 1e-7, "atol": 1e-7}
STDS = {"weight_std": [1.2, 0.9, 1.4], "bias_std": [0.4, 0.7]}


def points(*shape):
    return torch.randn(*shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def gram(x, y, kind="nngp", **options):
    return pykernels.NTK(2, **(STDS | options)).gram(x, y, kind=kind)


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_kernel_is_that_of_the_network(kind: str):
    kernel = NTKKernel(2, kind=kind, **STDS).double()
    x, y = points(5), points(2, 4)[0]
    torch.testing.assert_close(kernel(x).to_dense(), gram(x, x, kind), **FLOAT32)
    torch.testing.assert_close(kernel(x, y).to_dense(), gram(x, y, kind), **FLOAT32)
    torch.testing.assert_close(kernel(x, diag=True), kernel(x).to_dense().diagonal(), rtol=0, atol=1e-14)
    torch.testing.assert_close(kernel(x[:4], y, diag=True), kernel(x[:4], y).to_dense().diagonal(), rtol=0, atol=1e-14)
    assert kernel(x.float()).to_dense().dtype == torch.float32


def test_scales_of_the_output_and_without_biases():
    x = points(5)
    kernel = NTKKernel(2, "erf", weight_std=1.0, bias_std=0.0, output_bias=True).double()
    expected = pykernels.NTK(2, "erf").gram(x, kind="nngp")
    torch.testing.assert_close(kernel(x).to_dense(), expected, **FLOAT32)
    assert [name for name, _ in kernel.named_parameters()] == ["raw_weight_std"]
    assert kernel.bias_std.tolist() == [0, 0, 0]
    biased = NTKKernel(2, "erf", weight_std=1.0, bias_std=0.5, output_bias=True).double()
    expected = pykernels.NTK(2, "erf", 1.0, 0.5, True).gram(x, kind="nngp")
    torch.testing.assert_close(biased(x).to_dense(), expected, **FLOAT32)
    linear = NTKKernel(0, weight_std=1.0, bias_std=[]).double()
    torch.testing.assert_close(linear(x).to_dense(), x @ x.T / 3, **FLOAT32)


def test_scales_can_be_set_and_constrained():
    kernel = NTKKernel(2, weight_std_constraint=Interval(0.1, 3.0), bias_std_prior=LogNormalPrior(0.0, 1.0), **STDS)
    torch.testing.assert_close(kernel.weight_std, torch.tensor(STDS["weight_std"]), rtol=4e-7, atol=0)
    torch.testing.assert_close(kernel.bias_std, torch.tensor(STDS["bias_std"]), rtol=4e-7, atol=0)
    kernel.weight_std = 1.5
    kernel.bias_std = [0.2, 0.3]
    torch.testing.assert_close(kernel.weight_std, torch.full((3,), 1.5), rtol=4e-7, atol=0)
    torch.testing.assert_close(kernel.bias_std, torch.tensor([0.2, 0.3]), rtol=4e-7, atol=0)
    kernel.sample_from_prior("bias_std_prior")
    assert (kernel.bias_std > 0).all()
    again = NTKKernel(2, weight_std_constraint=Interval(0.1, 3.0), bias_std_prior=LogNormalPrior(0.0, 1.0))
    again.load_state_dict(kernel.state_dict())
    assert torch.equal(again.bias_std, kernel.bias_std)


def test_batches_of_points():
    kernel = NTKKernel(2, **STDS).double()
    x, y = points(4, 2, 5), points(2, 6)
    expected = torch.stack([torch.stack([kernel(x[i, j], y[j]).to_dense() for j in range(2)]) for i in range(4)])
    torch.testing.assert_close(kernel(x, y).to_dense(), expected, rtol=0, atol=1e-14)
    own = expected[..., :5].diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(kernel(x, y[:, :5], diag=True), own, rtol=0, atol=1e-14)


def test_batches_of_scales():
    kernel = NTKKernel(2, batch_shape=torch.Size([2]), **STDS).double()
    kernel.weight_std = torch.tensor([[1.0, 1.1, 1.2], [0.5, 0.6, 0.7]])
    x, y = points(5), points(2, 4)
    found, diagonal = kernel(x, y).to_dense(), kernel(x, diag=True)
    for i, std in enumerate(([1.0, 1.1, 1.2], [0.5, 0.6, 0.7])):
        torch.testing.assert_close(found[i], gram(x, y[i], weight_std=std), **FLOAT32)
        torch.testing.assert_close(diagonal[i], gram(x, x, weight_std=std).diagonal(), **FLOAT32)
        torch.testing.assert_close(kernel[i](x, y[i]).to_dense(), found[i], rtol=0, atol=1e-14)
    assert kernel(points(3, 1, 5)).to_dense().shape == (3, 2, 5, 5)


def test_dimensions_by_themselves():
    x = points(5)
    kernel = NTKKernel(2, active_dims=[1], **STDS).double()
    expected = gram(x[:, 1:2], x[:, 1:2])
    torch.testing.assert_close(kernel(x).to_dense(), expected, **FLOAT32)
    for shape in (torch.Size(), torch.Size([2])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # GPyTorch's own
            additive = NTKKernel(2, batch_shape=shape, **STDS).double()(x, last_dim_is_batch=True).to_dense()
        assert additive.shape == (*shape, 3, 5, 5)
        torch.testing.assert_close(additive[..., 1, :, :], expected.expand(*shape, 5, 5), **FLOAT32)


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_gradients(kind: str):
    x, y = points(4), points(2, 3)[1]
    kernel = NTKKernel(2, "erf", kind=kind, **STDS).double()
    raw = [p.detach().clone().requires_grad_() for p in kernel.parameters()]

    def values(x, y, *raw):
        dense = torch.func.functional_call(
            _Dense(kernel),
            {f"kernel.{name}": p for (name, _), p in zip(kernel.named_parameters(), raw, strict=True)},
            (x, y),
        )
        return dense

    torch.autograd.gradcheck(values, (x.requires_grad_(), y.requires_grad_(), *raw))


class _Dense(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def forward(self, x, y):
        return torch.cat(
            [self.kernel.forward(x, y), self.kernel.forward(x, x), self.kernel.forward(x, x, diag=True)[:, None]], 1
        )


class Process(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood):
        super().__init__(x, y, likelihood)
        self.mean = gpytorch.means.ConstantMean()
        self.kernel = ScaleKernel(NTKKernel(1, "erf"))

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


def test_gaussian_process_is_fitted():
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]
    y = torch.sin(2.5 * x[:, 0])
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model = Process(x, y + 0.05 * torch.randn(40, dtype=torch.float64), likelihood).double()
    likelihood.double()
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scales = model.kernel.base_kernel.weight_std.detach().clone()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = -objective(model(x), model.train_targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert ((model.kernel.base_kernel.weight_std - scales).abs() > 0.05).all()
    model.eval()
    likelihood.eval()
    new = torch.linspace(-1.9, 1.9, 50, dtype=torch.float64)[:, None]
    with torch.no_grad():
        prediction = likelihood(model(new))
    truth = torch.sin(2.5 * new[:, 0])
    assert (prediction.mean - truth).square().mean().sqrt() < 0.05
    assert 0.02 < float(likelihood.noise.detach().sqrt()) < 0.15
    assert (prediction.variance > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "both"}, "kind must be 'ntk' or 'nngp', got 'both'"),
        ({"weight_std": 0.0}, r"weight_std must be positive to be learned, got \[0.0, 0.0, 0.0\]"),
        ({"bias_std": [0.0, 1.0]}, r"bias_std must be positive to be learned, got \[0.0, 1.0\]"),
        ({"weight_std": -1.0}, "weight_std must be at least 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        NTKKernel(2, **options)
    with pytest.raises(ValueError, match=r"^bias_std is 0 and no hyperparameter; begin with a positive one$"):
        NTKKernel(2, bias_std=0.0).bias_std = 1.0
    with pytest.raises(ValueError, match=r"^weight_std must be one number or have shape \(3,\), got \(2,\)$"):
        NTKKernel(2).weight_std = [1.0, 1.0]
