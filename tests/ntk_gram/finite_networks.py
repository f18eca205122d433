"""Networks whose tangent kernels are tested, and the kernels by their definition."""

from itertools import pairwise

import torch
from torch import nn

import pykernels


class Residual(nn.Module):
    """Normalisations, a residual branch, changes in place, a layer used twice, parameters of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(4)
        self.branch = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.group_norm = nn.GroupNorm(2, 4)
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.layer_norm = nn.LayerNorm(4)
        self.scale, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1, 4))
        self.twice = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        for norm in (self.batch_norm, self.group_norm, self.layer_norm):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.batch_norm.running_mean.normal_()
        self.eval()

    def forward(self, x):
        h = torch.relu_(self.batch_norm(self.conv(x)))
        h = h + self.gain * self.group_norm(self.branch(h))
        h = self.layer_norm(h.mean((2, 3))) * self.scale + self.shift
        return self.twice(torch.tanh(self.twice(h)))


class Tokens(nn.Module):
    """A linear map at each position, and attention made of them."""

    def __init__(self):
        super().__init__()
        self.queries, self.values = nn.Linear(3, 6), nn.Linear(3, 2)

    def forward(self, x):
        q = self.queries(x)
        return torch.softmax(q @ q.transpose(1, 2), -1) @ self.values(x)


class Product(nn.Module):
    """A parameter used in a way that only Jacobians know."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        return self.last(torch.sin(x @ self.weight))


def mlp(*widths, bias=True, activation=nn.Tanh):
    layers = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def _frozen(network, *names):
    for name in names:
        network.get_parameter(name).requires_grad_(False)
    return network


#: Networks that need no Jacobian, and the shape of a sample.
STRUCTURED = {
    "mlp": (lambda: mlp(5, 16, 8, 3), (5,)),
    "no biases": (lambda: mlp(5, 7, 2, bias=False, activation=nn.ReLU), (5,)),
    "one output": (lambda: mlp(4, 9, 1, activation=nn.GELU), (4,)),
    "narrow": (lambda: mlp(1, 2, 1), (1,)),
    "no output dimension": (lambda: nn.Sequential(mlp(4, 9, 1), nn.Flatten(0)), (4,)),
    "frozen": (lambda: _frozen(mlp(5, 6, 6, 2), "0.weight", "2.bias", "4.weight"), (5,)),
    "all frozen": (lambda: _frozen(mlp(2, 2), "0.weight", "0.bias"), (2,)),
    "nested": (lambda: nn.Sequential(nn.Flatten(), nn.Sequential(mlp(6, 5, 4), nn.ReLU(True)), mlp(4, 2)), (2, 3)),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular"),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(6, 3),
        ),
        (2, 5, 5),
    ),
    "many channels": (
        lambda: nn.Sequential(nn.Conv2d(9, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 2, bias=False), nn.Flatten()),
        (9, 4, 4),
    ),
    "series": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding="same", dilation=2), nn.Tanh(), nn.Conv1d(4, 3, 2)),
        (2, 6),
    ),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2, padding=(1, 0, 1)), nn.Tanh(), nn.Flatten(), nn.LazyLinear(1)),
        (1, 2, 3, 2),
    ),
    "causal": (
        lambda: nn.Sequential(
            pykernels.nn.CausalConv1d(2, 4, 3, dilation=2, activation="relu"),
            pykernels.nn.CausalConv1d(4, 3, 2),
            nn.Flatten(),
            nn.Linear(24, 2),
        ),
        (2, 8),
    ),
    "residual": (Residual, (2, 4, 4)),
    "tokens": (Tokens, (4, 3)),
}


def normalised():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 2))


def rows():
    """A network that mixes samples and positions into one dimension."""
    return nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 4), nn.Tanh(), nn.Unflatten(0, (-1, 2)), nn.Flatten())


class Last(nn.Module):
    """What another module gives at the last position, and a linear map."""

    def __init__(self, module, width):
        super().__init__()
        self.module, self.last = module, nn.Linear(width, 2)

    def forward(self, x):
        h = self.module(*[x] * (3 if isinstance(self.module, nn.MultiheadAttention) else 1))
        h = h[0] if isinstance(h, tuple) else h
        return self.last(h[:, -1])


#: Networks that need Jacobians.
OTHERS = {
    "product": (Product, (5,)),
    "weight norm": (normalised, (3,)),
    "rows": (rows, (2, 3)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.Flatten()), (2, 3)),
    "lstm": (lambda: Last(nn.LSTM(3, 4, batch_first=True), 4), (3, 3)),
    "gru": (lambda: Last(nn.GRU(3, 4, batch_first=True), 4), (3, 3)),
    "attention": (lambda: Last(nn.MultiheadAttention(4, 2, batch_first=True), 4), (3, 4)),
    "transformer": (lambda: Last(nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True), 4), (3, 4)),
    "own backend": (lambda: pykernels.nn.CausalConv1d(2, 2, 2, backend="cpu"), (2, 4)),
}


def network(name, n=3, m=4, dtype=torch.float64):
    """The network, x (n, *S) and y (m, *S)."""
    make, shape = {**STRUCTURED, **OTHERS}[name]
    torch.manual_seed(len(name))
    module = make()
    x, y = torch.randn(n, *shape), torch.randn(m, *shape)
    module(x[:1])  # lazy layers
    return module.to(dtype), x.to(dtype), y.to(dtype)


def jacobian(module, x):
    """Gradients of each output of each sample, (N, O, numbers of all trainable parameters), one by one."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    samples = []
    for sample in x:
        outputs = module(sample[None]).flatten()
        samples.append(
            torch.stack(
                [
                    torch.cat(
                        [
                            g.flatten()
                            for g in torch.autograd.grad(
                                o, parameters, retain_graph=True, create_graph=True, materialize_grads=True
                            )
                        ]
                    )
                    for o in outputs
                ]
            )
            if parameters
            else outputs.new_zeros(len(outputs), 0)
        )
    return torch.stack(samples)


def kernel(module, x, y, trace):
    """Theta by its definition, (N, M) or (N, M, O, O)."""
    theta = torch.einsum("nop,mqp->nmoq", jacobian(module, x), jacobian(module, y))
    return theta.diagonal(dim1=2, dim2=3).mean(-1) if trace else theta
