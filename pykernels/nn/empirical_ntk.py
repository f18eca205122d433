"""The tangent kernel of a network as it is: inner products of its outputs' gradients with respect to the parameters.

    Theta[n, m, o, q] = sum over parameters w of  d f_o(x_n)/dw  d f_q(y_m)/dw

Where every trainable parameter belongs to linear maps and convolutions, no Jacobian is needed. The gradient of a linear
map's weight is a sum over the positions t at which it is applied (pixels, time steps; one for a plain layer) of outer
products of what goes in, A (N, T, I), and the sensitivity of the outputs to what comes out, B (N, O, T, J):

    Theta = sum over layers and t, s of  (A(x_n)_t . A(y_m)_s + 1)  (B(x_n)_ot . B(y_m)_qs),   + 1 for the bias.

These are products of two small Gram matrices: N M (I + J) operations for one position and output where Jacobians ask
for N M I J. With many positions the gradient of a sample's weight, summed over them, is the smaller object; the cheaper
form is chosen layer by layer. One forward and one backward pass give A and B: a torch function mode writes down which
operations meet a trainable parameter. Nothing is assumed about the rest of the network, and what was written down is
compared with autograd on two samples before it is used.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pykernels.backends import backend

#: Bytes for what lies between the network and the result.
DEFAULT_MAX_MEMORY = 1 << 30
_Function = TypeVar("_Function", bound=Callable[..., Tensor])
_METHODS = ("auto", "structured", "jacobian")
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_NORMALISATIONS = (F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.instance_norm)
_SUMS = ("add", "__add__", "__radd__")
_PRODUCTS = ("mul", "__mul__", "__rmul__")
#: Operations of a matrix product that take as long as one elementwise operation on a block.
_ELEMENTWISE = 8


def _outside_inference_mode(function: _Function) -> _Function:
    """The function for tensors of inference mode as well, which autograd refuses."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            copies = [t.clone() if isinstance(t, Tensor) and t.is_inference() else t for t in (*args, *kwargs.values())]
            return function(*copies[: len(args)], **dict(zip(kwargs, copies[len(args) :], strict=True)))

    return cast(_Function, wrapped)


@_outside_inference_mode
def empirical_ntk(
    module: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    trace_outputs: bool = True,
    method: str = "auto",
    create_graph: bool = False,
    max_memory: int = DEFAULT_MAX_MEMORY,
) -> Tensor:
    """The neural tangent kernel of a network of finite width, at its parameters of now.

    ``Theta[n, m, o, q] = sum_w df_o(x_n)/dw df_q(y_m)/dw`` over all parameters that require a gradient. Frozen ones do
    not count. Nothing of the module changes: no ``.grad``, buffer or mode.

    Args:
        module: any network that treats the samples of a batch one by one.
        x: samples, shape (N, *S).
        y: samples, shape (M, *S); None for those of x.
        trace_outputs: whether to return the mean over outputs of the kernels ``Theta[n, m, o, o]``, as neural-tangents
            does for ``trace_axes``, or else all of Theta.
        method: ``"structured"`` needs no Jacobian, and is for networks whose trainable parameters all belong to linear
            maps and convolutions (``F.linear``, ``F.conv1d``, ``F.conv2d``, ``F.conv3d``, and the layers made of them,
            :class:`pykernels.nn.CausalConv1d` too); ``"jacobian"`` forms the Jacobians of a few samples and outputs at
            a time by :mod:`torch.func`; ``"auto"`` takes the first where it can.
        create_graph: whether the result can be differentiated with respect to the parameters. With respect to x and y
            it always can.
        max_memory: bytes for what lies between the network and the result, which sets how many samples are treated at a
            time. What one sample and output need is used in any case.

    Returns:
        shape (N, M), or (N, M, O, O) where the output of one sample has O numbers, whatever their shape; the dtype of
        the outputs.

    Raises:
        TypeError: if an argument has the wrong type, or ``module`` returns no tensor.
        ValueError: if shapes, dtypes or devices do not fit; if ``module`` normalises over the batch, draws random
            numbers, or cannot be treated by the method asked for, saying why.

    Source: Jacot, Gabriel and Hongler, "Neural tangent kernel", NeurIPS 2018; for the structured form Novak,
    Sohl-Dickstein and Schoenholz, "Fast finite width neural tangent kernel", ICML 2022.
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    samples = _check(module, {"x": x} if y is None else {"x": x, "y": y}, trace_outputs, max_memory)
    x, y = samples[0], samples[-1]
    network = _Network(module, create_graph)
    keep_graph = torch.is_grad_enabled() and (create_graph or x.requires_grad or y.requires_grad)
    # The reference of this package's layers consists of operations that the structured form knows.
    with backend("reference"), torch.set_grad_enabled(keep_graph):
        example = network.example(*samples)
        if method != "jacobian":
            try:
                structure = _Structure(network, x, y, trace_outputs, keep_graph)
                return _Pieces(structure, example, trace_outputs, max_memory).kernel(x, y)
            except _UnstructuredError as reason:
                if method == "structured":
                    raise ValueError(f"method='structured' cannot treat module: {reason}") from None
        return _Pieces(_Jacobians(network, keep_graph), example, trace_outputs, max_memory).kernel(x, y)


@_outside_inference_mode
def empirical_ntk_matvec(
    module: nn.Module,
    x: Tensor,
    z: Tensor,
    v: Tensor,
    *,
    trace_outputs: bool = True,
    create_graph: bool = False,
    max_memory: int = DEFAULT_MAX_MEMORY,
) -> Tensor:
    """The product Theta(x, z) v of :func:`empirical_ntk` with vectors, without the matrix and without Jacobians.

    One backward pass on z and one forward-mode pass on x for each column of v, and each output where only the trace is
    asked for.

    Args:
        module, trace_outputs, create_graph, max_memory: as for :func:`empirical_ntk`.
        x: samples, shape (N, *S).
        z: samples, shape (M, *S).
        v: shape (M,) or (M, p); with ``trace_outputs=False`` (M, O) or (M, O, p), O numbers in the output of a sample.

    Returns:
        the shape of v, with N in place of M. Differentiable with respect to x, z and v, and to the parameters with
        ``create_graph``.

    Raises:
        TypeError, ValueError: as :func:`empirical_ntk`.
    """
    x, z = _check(module, {"x": x, "z": z}, trace_outputs, max_memory)
    network = _Network(module, create_graph)
    example = network.example(x, z)
    outputs = example.shape[1]
    if not isinstance(v, Tensor):
        raise TypeError(f"v must be a tensor, got {type(v).__name__}")
    expected = (len(z),) if trace_outputs else (len(z), outputs)
    if v.shape[: len(expected)] != expected or v.dim() > len(expected) + 1:
        shape = ", ".join(map(str, expected))
        raise ValueError(f"v must have shape ({shape}) or ({shape}, p), got {tuple(v.shape)}")
    if v.dtype != example.dtype or v.device != example.device:
        raise ValueError(f"v must be {example.dtype} on {example.device} like the outputs, got {v.dtype} on {v.device}")
    columns = (v if v.dim() > len(expected) else v[..., None]).movedim(-1, 0)  # (p, M) or (p, M, O)
    keep_graph = torch.is_grad_enabled() and (create_graph or any(t.requires_grad for t in (x, z, v)))
    # Of the kernels of attention only the plain one has forward mode.
    with torch.set_grad_enabled(keep_graph), sdpa_kernel(SDPBackend.MATH):
        multiply = _VectorProduct(network, keep_graph, max_memory)
        if trace_outputs:
            result = torch.zeros(columns.shape[0], len(x), dtype=v.dtype, device=v.device)
            for output in range(outputs):
                cotangents = F.pad(columns[..., None], (output, outputs - 1 - output))
                result = result + multiply(x, z, cotangents)[..., output]
            result = result / outputs
        else:
            result = multiply(x, z, columns)
    return result.movedim(0, -1).reshape(len(x), *v.shape[1:])


class _Network:
    """A module as a function of its trainable parameters, which leaves the module as it is."""

    def __init__(self, module: nn.Module, create_graph: bool) -> None:
        self.module = module
        self.numbers, self.outputs, self.dtype = 0, 0, torch.float32  # example() finds them
        self.parameters: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {name: b.detach().clone() for name, b in module.named_buffers()}
        for name, p in module.named_parameters():
            if not p.requires_grad:
                self.constants[name] = p.detach()
            else:
                self.parameters[name] = p if create_graph else p.detach().requires_grad_()

    def __call__(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """The outputs (N, O) of samples (N, *S)."""
        y = torch.func.functional_call(self.module, ({**parameters, **self.constants},), (x,))
        if not isinstance(y, Tensor):
            raise TypeError(f"module must return a tensor, got {type(y).__name__}")
        if y.dim() == 0 or y.shape[0] != x.shape[0] or not y.is_floating_point():
            raise ValueError(
                f"module must return real numbers for each sample, shape ({x.shape[0]}, ...), "
                f"got {tuple(y.shape)} of {y.dtype}"
            )
        return y.reshape(y.shape[0], math.prod(y.shape[1:]))

    def example(self, *samples: Tensor) -> Tensor:
        """The outputs (1, O) of one sample; ``numbers`` becomes what autograd keeps of it.

        Raises:
            ValueError: if they are random.
        """
        generators = [torch.default_generator]
        if samples[0].is_cuda:
            generators.append(torch.cuda.default_generators[samples[0].get_device()])
        states = [generator.get_state() for generator in generators]
        own = {p.data_ptr() for p in (*self.parameters.values(), *self.constants.values())}
        kept: list[int] = []

        def count(t: Tensor) -> Tensor:
            kept.append(0 if t.data_ptr() in own else t.numel())
            return t

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            y = self(self.parameters, _some_samples(1, samples)).detach()
        if not all(torch.equal(g.get_state(), state) for g, state in zip(generators, states, strict=True)):
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            raise ValueError("module draws random numbers; call its eval() first, if that ends it")
        self.numbers, self.outputs, self.dtype = sum(kept), y.shape[1], y.dtype
        return y

    def pulled_back(self, x: Tensor, cotangents: Tensor, keep_graph: bool) -> list[Tensor]:
        """Gradients of the outputs of a batch along cotangents (D, N, O), for each parameter (D, ...).

        One by one, for operations that :mod:`torch.func` cannot transform, such as recurrent layers.
        """
        parameters = list(self.parameters.values())
        with torch.enable_grad():
            y = self(self.parameters, x)
        if not (y.requires_grad and parameters):
            return [p.new_zeros(len(cotangents), *p.shape) for p in parameters]
        options: dict[str, Any] = {"retain_graph": True, "create_graph": keep_graph, "materialize_grads": True}
        found = [torch.autograd.grad(y, parameters, c, **options) for c in cotangents]
        return [torch.stack(of_parameter) for of_parameter in zip(*found, strict=True)]


class _VectorProduct(NamedTuple):
    """Products of the kernel with vectors."""

    network: _Network
    keep_graph: bool
    max_memory: int

    def __call__(self, x: Tensor, z: Tensor, cotangents: Tensor) -> Tensor:
        """Theta(x, z) times each of the vectors ``cotangents`` (D, M, O), shape (D, N, O)."""
        parameters = self.network.parameters
        if not parameters:
            return cotangents.new_zeros(cotangents.shape[0], len(x), cotangents.shape[2])
        numbers = self.max_memory // cotangents.element_size()
        step = max(1, min(len(cotangents), numbers // (4 * sum(p.numel() for p in parameters.values()))))
        samples = max(1, numbers // max(1, 2 * (1 + step) * self.network.numbers))
        found = []
        for some in cotangents.split(step):
            directions = [p.new_zeros(len(some), *p.shape) for p in parameters.values()]
            for piece, c in zip(z.split(samples), some.split(samples, 1), strict=True):
                directions = [d + g for d, g in zip(directions, self._gradients(piece, c), strict=True)]
            found.append(torch.cat([self._derivatives(piece, directions) for piece in x.split(samples)], 1))
        return torch.cat(found)

    def _gradients(self, z: Tensor, cotangents: Tensor) -> list[Tensor]:
        """Along cotangents (D, M, O), for each parameter (D, ...)."""
        try:
            pullback = torch.func.vjp(lambda p: self.network(p, z), self.network.parameters)[1]
            return list(torch.func.vmap(pullback)(cotangents)[0].values())
        except RuntimeError:
            return self.network.pulled_back(z, cotangents, self.keep_graph)

    def _derivatives(self, x: Tensor, directions: list[Tensor]) -> Tensor:
        """Of the outputs along directions of the parameters (D, ...), shape (D, N, O)."""
        network, parameters = self.network, self.network.parameters
        tangents = dict(zip(parameters, directions, strict=True))

        def along(tangent: dict[str, Tensor]) -> Tensor:
            derivative: Tensor = torch.func.jvp(lambda p: network(p, x), (parameters,), (tangent,))[1]
            return derivative

        found: Tensor
        try:
            found = torch.func.vmap(along)(tangents)
            return found
        except RuntimeError:  # there is an operation without forward mode
            pass
        try:  # the transpose of the transposed Jacobian
            y, pullback, *_ = torch.func.vjp(lambda p: network(p, x), parameters)
            transpose = torch.func.vjp(lambda cotangent: pullback(cotangent)[0], torch.zeros_like(y))[1]
            (found,) = torch.func.vmap(transpose)(tangents)
            return found
        except RuntimeError:
            rows = _Jacobians(network, self.keep_graph).one_by_one(x, slice(None))
            parts = [torch.einsum("nof,df->dno", r, d.flatten(1)) for r, d in zip(rows, directions, strict=True)]
            return torch.stack(parts).sum(0)


class _Convolution(NamedTuple):
    """The geometry of a convolution, with the arguments of ``F.conv1d`` and its like behind the bias."""

    kernel: tuple[int, ...]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    def patches(self, x: Tensor) -> Tensor:
        """What each output sees of x (N, C, *S): shape (N, groups, positions, C / groups * taps)."""
        dims = len(self.kernel)
        dilations = _for_each(self.dilation, dims)
        reaches = [d * (k - 1) for k, d in zip(self.kernel, dilations, strict=True)]
        if self.padding == "same":
            pads = [(reach // 2, reach - reach // 2) for reach in reaches]
        else:
            pads = [(p, p) for p in _for_each(0 if self.padding == "valid" else self.padding, dims)]
        x = F.pad(x, [p for pair in reversed(pads) for p in pair])
        for dim, (reach, s, d) in enumerate(zip(reaches, _for_each(self.stride, dims), dilations, strict=True), 2):
            x = x.unfold(dim, reach + 1, s)[..., ::d]
        x = x.unflatten(1, (self.groups, -1)).movedim(2, 2 + dims)  # (N, groups, *outputs, C / groups, *kernel)
        return x.flatten(2 + dims).flatten(2, 1 + dims)


class _Product(NamedTuple):
    """One use of a weight by a linear map or, if ``convolution`` has its geometry, by a convolution."""

    input: Tensor
    output: Tensor
    version: int
    convolution: _Convolution | None

    def matrix(self, keep_graph: bool) -> Tensor:
        """The input as what the weight is multiplied with, shape (N, groups, T, I)."""
        a = self.input if keep_graph else self.input.detach()
        if self.convolution is None:
            return a.reshape(a.shape[0], 1, math.prod(a.shape[1:-1]), a.shape[-1])
        return self.convolution.patches(a)

    def sensitivity(self, b: Tensor, keep_graph: bool) -> Tensor:
        """Gradients with respect to the output, (O, N, ...), as (N, O, groups, T, J)."""
        if self.convolution is None:
            return b.reshape(*b.shape[:2], 1, math.prod(b.shape[2:-1]), b.shape[-1]).transpose(0, 1)
        groups, positions = self.convolution.groups, math.prod(b.shape[3:])
        return b.reshape(*b.shape[:2], groups, b.shape[2] // groups, positions).permute(1, 0, 2, 4, 3)


class _Elementwise(NamedTuple):
    """One sum with a parameter, or product if there is an ``input``; ``shape`` is how the parameter broadcasts."""

    input: Tensor | None
    output: Tensor
    version: int
    shape: tuple[int, ...]

    def matrix(self, keep_graph: bool) -> Tensor:
        """There is none, as for a bias: shape (N, 1, 1, 0)."""
        return self.output.new_zeros(self.output.shape[0], 1, 1, 0)

    def sensitivity(self, b: Tensor, keep_graph: bool) -> Tensor:
        """Gradients with respect to the parameter, shape (N, O, 1, 1, numbers)."""
        if self.input is not None:
            b = b * (self.input if keep_graph else self.input.detach())
        shape = (1,) * (self.output.dim() - len(self.shape)) + self.shape
        broadcast = [dim + 1 for dim in range(1, len(shape)) if shape[dim] == 1]
        b = b.sum(broadcast) if broadcast else b
        return b.reshape(*b.shape[:2], 1, 1, math.prod(self.shape)).transpose(0, 1)


#: Names of the weight and of the bias or scale of a layer, None for one that it has not or that is not trainable.
_Key: TypeAlias = tuple[str | None, str | None]
_Uses: TypeAlias = dict[_Key, list[_Product | _Elementwise]]


class _Record(TorchFunctionMode):
    """Writes down where trainable parameters are used while it is active.

    Raises:
        _UnstructuredError: where that is none of the operations that are known.
    """

    def __init__(self, parameters: dict[str, Tensor], samples: int) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in parameters.items()}
        self.samples = samples
        self.uses: _Uses = {}
        self.views: list[Tensor] = []  # whose ids are among the names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        met = [t for t in _tensors_in((args, kwargs)) if id(t) in self.names]
        if not met:
            return func(*args, **kwargs)
        if func is F.linear or func in _CONVOLUTIONS:
            return self._linear(func, *args, **kwargs)
        if func in _NORMALISATIONS:
            return self._normalise(func, inspect.signature(func).bind(*args, **kwargs))
        operation, parameter = getattr(func, "__name__", str(func)), met[0]
        name = self.names[id(parameter)]
        if operation in _SUMS + _PRODUCTS and len(met) == 1 and len(args) == 2 and not kwargs:
            other = args[1] if args[0] is parameter else args[0]
            return self._elementwise(other, parameter, name, operation in _PRODUCTS)
        result = func(*args, **kwargs)
        found = list(_tensors_in(result))
        if not any(t.requires_grad for t in found):  # a shape, or a value that no gradient goes through
            return result
        if len(found) == 1 and _same_numbers(found[0], parameter):
            self.names[id(found[0])] = name
            self.views.append(found[0])
            return result
        raise _UnstructuredError(f"{name} is used by {operation}, which is no linear map, convolution, sum or product")

    def _linear(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kw: Any
    ) -> Tensor:
        convolution = None if func is F.linear else _Convolution(tuple(weight.shape[2:]), *args, **kw)
        key = self.names.get(id(weight)), self.names.get(id(bias))
        if id(input) in self.names or input.dim() < (2 if convolution is None else len(convolution.kernel) + 2):
            raise _UnstructuredError(
                f"{key[0] or key[1]} is applied to shape {tuple(input.shape)}, no batch of samples"
            )
        result = func(input, weight, bias, *args, **kw)
        return self._write_down(key, _Product(input, result, input._version, convolution))

    def _elementwise(self, other: Any, parameter: Tensor, name: str | None, multiply: bool) -> Any:
        result = other * parameter if multiply else other + parameter
        if name is None:
            return result
        shape = tuple(parameter.shape)
        if not isinstance(other, Tensor) or (len(shape) >= result.dim() and shape[0] != 1):
            raise _UnstructuredError(f"{name} is combined with something else than a batch of samples")
        return self._write_down((None, name), _Elementwise(other if multiply else None, result, other._version, shape))

    def _normalise(self, func: Any, call: inspect.BoundArguments) -> Any:
        """The function without its scale and shift, which are then applied one after the other."""
        factors = [(call.arguments.pop(name, None), name == "weight") for name in ("weight", "bias")]
        result = func(**call.arguments)
        for parameter, multiply in factors:
            if parameter is not None:
                by_channel = func not in (F.layer_norm, F.rms_norm)
                shape = (-1, *[1] * (result.dim() - 2)) if by_channel else parameter.shape
                result = self._elementwise(result, parameter.reshape(shape), self.names.get(id(parameter)), multiply)
        return result

    def _write_down(self, key: _Key, use: _Product | _Elementwise) -> Tensor:
        if use.output.dim() == 0 or use.output.shape[0] != self.samples:
            raise _UnstructuredError(f"{key[0] or key[1]} gives shape {tuple(use.output.shape)}, no batch of samples")
        self.uses.setdefault(key, []).append(use)
        return use.output.clone()  # which the network may change in place


class _UnstructuredError(Exception):
    """Why a network cannot be treated without Jacobians."""


class _Rows(NamedTuple):
    """Gradients of outputs with respect to a parameter, (N, O, numbers)."""

    gradient: Tensor

    def add_products(self, block: Tensor, other: Any, max_memory: int) -> None:
        """Add to ``block``, (N, M) or (N, O, M, O), the kernel of this parameter."""
        mine, theirs = (g.flatten(1) if block.dim() == 2 else g.flatten(0, 1) for g in (self.gradient, other.gradient))
        block.view(mine.shape[0], theirs.shape[0]).addmm_(mine, theirs.T)


class _Factors(NamedTuple):
    """Factors of the gradients with respect to a weight, and to the bias beside it where that counts.

    Args:
        a: what goes in, (N, groups, T, I).
        b: sensitivities of the outputs to what comes out, (N, O, groups, T, J).
        bias: whether the bias counts.
    """

    a: Tensor
    b: Tensor
    bias: bool

    def add_products(self, block: Tensor, other: Any, max_memory: int) -> None:
        """Add to ``block``, (N, M) or (N, O, M, O), the kernel of this layer."""
        trace = block.dim() == 2
        m, their_outputs, groups, positions = other.b.shape[:4]
        outputs = self.b.shape[1]
        pairs = m * positions**2 * (2 if trace else 1 + outputs * their_outputs)
        step = max(1, max_memory // (pairs * block.element_size()))
        for start in range(0, len(self.a), step):
            rows = block[start : start + step]
            mine = slice(start, start + len(rows))
            for group in range(groups):
                a = self.a[mine, group].flatten(0, 1) @ other.a[:, group].flatten(0, 1).T
                if self.bias:
                    a.add_(1)
                b = _by_position(self.b[mine, :, group], trace) @ _by_position(other.b[:, :, group], trace).T
                if positions == 1:
                    rows.addcmul_(a if trace else a[:, None, :, None], b.view(rows.shape))
                elif trace:
                    shape = (len(rows), positions, m, positions)
                    rows.add_((a.view(shape) * b.view(shape)).sum((1, 3)))
                else:
                    a = a.view(len(rows), 1, positions, m, 1, positions)
                    rows.add_((a * b.view(len(rows), outputs, positions, m, their_outputs, positions)).sum((2, 5)))


_Features: TypeAlias = _Rows | _Factors


def _by_position(b: Tensor, trace: bool) -> Tensor:
    """Sensitivities (N, O, T, J) as a matrix: (N T, O J) if outputs are summed over, else (N O T, J)."""
    return b.transpose(1, 2).flatten(2).flatten(0, 1) if trace else b.flatten(0, 2)


def _gradient(a: Tensor, b: Tensor) -> Tensor:
    """Gradients (N, O, J..., I) of a weight, as rows of numbers, from its factors."""
    outputs, units = b.shape[1], b.shape[-1]
    g = b.permute(0, 2, 1, 4, 3).flatten(2, 3) @ a  # (N, groups, O J, I)
    return g.reshape(*g.shape[:2], outputs, units, -1).transpose(1, 2).flatten(2)


class _Jacobians:
    """Gradients of the outputs of any network, by :mod:`torch.func` where that can transform it."""

    def __init__(self, network: _Network, keep_graph: bool) -> None:
        self.network, self.keep_graph = network, keep_graph
        self.numbers = network.numbers
        self.numbers_per_output = network.numbers + 2 * sum(p.numel() for p in network.parameters.values())

    def features(self, x: Tensor, outputs: slice) -> list[_Features]:
        """The gradients with respect to each parameter, for samples (N, *S)."""

        def gradients(sample: Tensor) -> dict[str, Tensor]:
            y, pullback, *_ = torch.func.vjp(lambda p: self.network(p, sample[None])[0], self.network.parameters)
            cotangents = torch.eye(len(y), dtype=y.dtype, device=y.device)[outputs]
            found: dict[str, Tensor] = torch.func.vmap(pullback)(cotangents)[0]
            return found

        try:
            found = list(torch.func.vmap(gradients)(x).values())
        except RuntimeError:
            found = self.one_by_one(x, outputs)
        return [_Rows(g.reshape(*g.shape[:2], g[0, 0].numel())) for g in found]

    def one_by_one(self, x: Tensor, outputs: slice) -> list[Tensor]:
        """The same without :mod:`torch.func`, shapes (N, O, numbers)."""
        samples = []
        for sample in x:
            eye = torch.eye(self.network.outputs, dtype=self.network.dtype, device=x.device)[outputs, None]
            samples.append(self.network.pulled_back(sample[None], eye, self.keep_graph))
        return [torch.stack(of_parameter).flatten(2) for of_parameter in zip(*samples, strict=True)]


class _Structure:
    """The layers of a network, and the form in which the gradients of each are used.

    Attributes:
        numbers: what the features of a sample consist of, beside
        numbers_per_output: for each output.
    """

    def __init__(self, network: _Network, x: Tensor, y: Tensor, trace: bool, keep_graph: bool) -> None:
        """Looks at two samples.

        Raises:
            _UnstructuredError: if a trainable parameter does not belong to linear maps or convolutions alone.
        """
        self.network, self.keep_graph = network, keep_graph
        out, uses = self._record(_some_samples(2, (x, y)))
        numbers, outputs = len(x) + len(y), out.shape[1]
        self.by_rows: dict[_Key, bool] = {}
        self.numbers, self.numbers_per_output = network.numbers, network.numbers + outputs
        direction = torch.linspace(1, 2, outputs, dtype=out.dtype, device=out.device)
        expected = self._gradients(out, torch.stack([direction, torch.zeros_like(direction)]))
        found: dict[str, Tensor] = {}
        for (weight, bias), a, b in self._layers(out, uses, direction.expand(1, *out.shape)):
            if weight in found or bias in found:
                raise _UnstructuredError(f"{weight or bias} is used both with and without what else its layer has")
            if weight is not None:
                found[weight] = _gradient(a, b)[0]
            if bias is not None:
                found[bias] = b.sum(3)[0].flatten()
            groups, positions, fan_in = a.shape[1:]
            fan_out, pairs = b.shape[-1], outputs if trace else outputs**2
            by_rows = fan_in * fan_out * (pairs + outputs * positions * numbers / max(1, len(x) * len(y)))
            by_factors = positions**2 * (fan_in + pairs * fan_out + _ELEMENTWISE * (1 if trace else pairs))
            self.by_rows[weight, bias] = by_rows < by_factors
            self.numbers += groups * positions * fan_in
            self.numbers_per_output += groups * (2 * positions * fan_out + (by_rows < by_factors) * fan_in * fan_out)
        self._compare(found, expected, out)

    def features(self, x: Tensor, outputs: slice) -> list[_Features]:
        """What the kernel of these samples and outputs is made of, layer by layer."""
        out, uses = self._record(x)
        eye = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)[outputs]
        found: list[_Features] = []
        for (weight, bias), a, b in self._layers(out, uses, eye[:, None].expand(-1, *out.shape)):
            if weight is not None and not self.by_rows[weight, bias]:
                found.append(_Factors(a, b, bias is not None))
                continue
            if weight is not None:
                found.append(_Rows(_gradient(a, b)))
            if bias is not None:
                found.append(_Rows(b.sum(3).flatten(2)))
        return found

    def _record(self, x: Tensor) -> tuple[Tensor, _Uses]:
        record = _Record(self.network.parameters, len(x))
        with torch.enable_grad(), record:
            out = self.network(self.network.parameters, x)
        for (weight, bias), uses in record.uses.items():
            if any(use.input is not None and use.input._version != use.version for use in uses):
                raise _UnstructuredError(f"what {weight or bias} is applied to is changed in place afterwards")
        return out, record.uses

    def _layers(self, out: Tensor, uses: _Uses, cotangents: Tensor) -> Iterator[tuple[_Key, Tensor, Tensor]]:
        """Each layer's names and factors of its gradients, for outputs (N, O) and cotangents (D, N, O)."""
        ends = [use.output for of_layer in uses.values() for use in of_layer]
        found: list[Tensor | None] = [None] * len(ends)
        if out.requires_grad and ends:
            options: dict[str, Any] = {"create_graph": self.keep_graph, "allow_unused": True, "retain_graph": True}
            if len(cotangents) == 1:
                found = [
                    None if b is None else b[None] for b in torch.autograd.grad(out, ends, cotangents[0], **options)
                ]
            else:
                try:
                    found = list(torch.autograd.grad(out, ends, cotangents, is_grads_batched=True, **options))
                except RuntimeError as error:
                    raise _UnstructuredError(f"gradients of several outputs at a time failed: {error}") from None
        sensitivities = iter(found)
        for key, of_layer in uses.items():
            matrices, parts = [], []
            for use in of_layer:
                b = next(sensitivities)
                b = use.output.new_zeros(len(cotangents), *use.output.shape) if b is None else b
                parts.append(use.sensitivity(b, self.keep_graph))
                matrices.append(use.matrix(self.keep_graph))
            if len({matrix.shape[1] for matrix in matrices}) > 1:
                raise _UnstructuredError(f"{key[0]} is used with different numbers of groups")
            yield key, _joined(matrices, 2), _joined(parts, 3)

    def _gradients(self, out: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        """Gradients with respect to the parameters, by autograd, of those that have one."""
        parameters = self.network.parameters
        if not (out.requires_grad and parameters):
            return {}
        found = torch.autograd.grad(out, list(parameters.values()), cotangent, retain_graph=True, allow_unused=True)
        return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}

    @torch.no_grad()
    def _compare(self, found: dict[str, Tensor], expected: dict[str, Tensor], out: Tensor) -> None:
        """Compare gradients put together from factors with those of autograd.

        Raises:
            _UnstructuredError: if they differ, as where a parameter is used out of sight of the record, or what looks
                like a batch of samples is none.
        """
        eps = torch.finfo(out.dtype).eps
        scale = math.hypot(*(float(g.norm()) for g in expected.values()))
        for name, p in self.network.parameters.items():
            e, g = (t[name].reshape(p.shape) if name in t else torch.zeros_like(p) for t in (expected, found))
            if float((e - g).norm()) > 4 * eps**0.5 * float(e.norm()) + 100 * eps * scale:
                raise _UnstructuredError(
                    f"{name} has a gradient that is not made by linear maps and convolutions alone"
                )


class _Pieces(NamedTuple):
    """A kernel computed piece by piece."""

    source: _Jacobians | _Structure
    example: Tensor
    trace: bool
    max_memory: int

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """Theta, (N, M) or (N, M, O, O). Half of it is computed where y is x."""
        step, their_step, output_step = self._steps()
        outputs = self.example.shape[1]
        theta = self.example.new_zeros((len(x), len(y)) if self.trace else (len(x), outputs, len(y), outputs))
        for i, o in product(_slices(0, len(x), step), _slices(0, outputs, output_step)):
            mine = self.source.features(x[i], o)
            for q in [o] if self.trace else _slices(0, outputs, output_step):
                if x is y:
                    theirs = mine if q == o else self.source.features(x[i], q)
                    self._add(theta, (i, o, i, q), mine, theirs)
                for j in _slices(i.stop if x is y else 0, len(y), their_step):
                    self._add(theta, (i, o, j, q), mine, self.source.features(y[j], q))
        if x is y:
            for i in _slices(0, len(x), step):
                before = slice(0, i.start)
                if self.trace:
                    theta[i, before] = theta[before, i].T
                else:
                    theta[i, :, before] = theta[before, :, i].permute(2, 3, 0, 1)
        return theta.div_(max(1, outputs)) if self.trace else theta.transpose(1, 2).contiguous()

    def _add(self, theta: Tensor, at: tuple[slice, ...], mine: list[_Features], theirs: list[_Features]) -> None:
        part = theta[at[::2] if self.trace else at]
        block = theta if part.shape == theta.shape else torch.zeros_like(part)
        for feature, other in zip(mine, theirs, strict=True):
            feature.add_products(block, other, self.max_memory // 4)
        if block is not theta:
            part.add_(block)

    def _steps(self) -> tuple[int, int, int]:
        """Samples of x, of y, and outputs to treat at a time.

        Those of y are computed again for each piece of x, whose pieces are larger therefore.
        """
        numbers = self.max_memory // self.example.element_size()
        outputs, shared, each = self.example.shape[1], self.source.numbers, max(1, self.source.numbers_per_output)
        output_step = max(1, min(outputs, (numbers // 4 - shared) // each))
        most = math.isqrt(numbers // (1 if self.trace else output_step**2))
        step, their_step = (max(1, min(most, n // (shared + output_step * each))) for n in (numbers // 2, numbers // 8))
        return step, their_step, output_step


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


def _check(module: Any, samples: dict[str, Any], trace_outputs: Any, max_memory: Any) -> list[Tensor]:
    """The samples, fit to be recorded by autograd."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if type(trace_outputs) is not bool:
        raise TypeError(f"trace_outputs must be True or False, got {trace_outputs!r}")
    if type(max_memory) is not int or max_memory < 1:
        raise ValueError(f"max_memory must be a number of bytes, at least 1, got {max_memory!r}")
    for name, m in module.named_modules():
        where = f"{name} ({type(m).__name__})" if name else type(m).__name__
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None):
            raise ValueError(
                f"module normalises over the batch in {where}, which makes a kernel of two samples meaningless; "
                "call its eval() first, with running statistics"
            )
        if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0:
            raise ValueError(f"module drops out at random in {where}; call its eval() first")
    parameters = list(module.parameters())
    first = ""
    for name, t in samples.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dim() == 0:
            raise ValueError(f"{name} must have shape ({'N' if name == 'x' else 'M'}, ...), got ()")
        kind = f"{tuple(t.shape[1:])} of {t.dtype} on {t.device}"
        first = first or kind
        if kind != first:
            raise ValueError(f"{name} must have samples like those of x, {first}, got {kind}")
        if parameters and all(t.device != p.device for p in parameters):
            raise ValueError(f"{name} must be on {parameters[0].device} like the parameters, got {t.device}")
        if parameters and t.is_floating_point() and all(t.dtype != p.dtype for p in parameters):
            raise ValueError(f"{name} must be {parameters[0].dtype} like the parameters, got {t.dtype}")
    return list(samples.values())


def _some_samples(count: int, samples: tuple[Tensor, ...]) -> Tensor:
    """As many samples from these, repeated if there are fewer, zeros if there are none."""
    pool = torch.cat([t[:count].detach() for t in samples])
    if len(pool) == 0:
        pool = samples[0].new_zeros(1, *samples[0].shape[1:])
    return pool[torch.arange(count, device=pool.device) % len(pool)]


def _for_each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _tensors_in(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors_in(value)
    elif isinstance(values, dict):
        yield from _tensors_in(list(values.values()))


def _same_numbers(t: Tensor, other: Tensor) -> bool:
    """Whether the one has all numbers of the other, in the same order and memory."""
    same = t.data_ptr() == other.data_ptr() and t.numel() == other.numel() and t.dtype == other.dtype
    return same and t.is_contiguous() and other.is_contiguous()
