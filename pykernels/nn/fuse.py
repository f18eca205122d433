"""From a user's own vector field to an :class:`MLPField` with the same parameters.

``torch.fx`` writes down the operations of the field's forward, which are then read from the result back to the state:

    Linear <- activation <- ... <- Linear <- map(y)   or   Linear <- cat([map(y), time])

Whatever is not of this form is refused by name. What the operations do not tell is found out beside: hooks before
tracing, side effects by comparing the modules before and after, and all else by comparing values and gradients of both
fields for random parameters.
"""

from __future__ import annotations

import inspect
import math
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pykernels._errors import FusionError
from pykernels.nn.mlp_field import (
    DEFAULT_SLOPES,
    KNOWN_ACTIVATIONS,
    Activation,
    MLPField,
    Sin,
    Swish,
    activation_of,
    describe,
    is_identity,
    refuse_altered,
)

#: Operations by what they are called here; a method or module that does the same has the same name.
_FUNCTIONS: dict[Any, str] = {
    F.linear: "linear",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu_: "relu",
    F.leaky_relu: "leaky_relu",
    torch.tanh: "tanh",
    F.softplus: "softplus",
    F.silu: "silu",
    F.elu: "elu",
    torch.sin: "sin",
    torch.cos: "cos",
    torch.sigmoid: "sigmoid",
    torch.special.expit: "sigmoid",
    operator.mul: "mul",
    torch.mul: "mul",
    torch.multiply: "mul",
    operator.pow: "pow",
    torch.pow: "pow",
    torch.square: "square",
    torch.cat: "cat",
    torch.concat: "cat",
    torch.concatenate: "cat",
}
_METHODS = {name: name for name in ("relu", "tanh", "sin", "cos", "sigmoid", "mul", "pow", "square")} | {
    "relu_": "relu",
    "tanh_": "tanh",
    "sin_": "sin",
}
_MODULES: dict[type[nn.Module], str] = {Sin: "sin", nn.Tanh: "tanh"}
_IN_PLACE = ("relu_", "tanh_", "sin_")

#: Operations that bring the time, a scalar, to the shape of the state. The comparison tells if they keep its value.
_SHAPING_FUNCTIONS = {
    getattr,
    operator.getitem,
    operator.add,
    operator.sub,
    operator.mul,
    torch.add,
    torch.mul,
    torch.ones,
    torch.zeros,
    torch.full,
    torch.ones_like,
    torch.zeros_like,
    torch.full_like,
    torch.unsqueeze,
    torch.reshape,
    torch.broadcast_to,
}
_SHAPING_METHODS = {
    *("add", "sub", "mul", "float", "double", "to", "type_as"),
    *("dim", "size", "expand", "expand_as", "broadcast_to", "repeat", "reshape", "unsqueeze", "view", "view_as"),
    *("new_full", "new_ones", "new_zeros"),
}

#: Relative differences that float64 rounding explains; nn.Softplus jumps by 2e-9.
_TOLERANCE = 1e-7


def fuse(func: Callable[..., Any], example: Tensor | None = None) -> MLPField:
    """The :class:`pykernels.nn.MLPField` that computes what a vector field does, with its parameters.

    ``field = fuse(func)`` runs in one call where ``func`` runs in thousands: ``odeint(field, y0, t, method="rk4")``.
    The parameters are the same objects: training the fused field trains ``func``, and an optimizer of either sees both.
    Replacing a parameter of ``func`` by another object does not reach the fused field.

    Args:
        func: a module, or a function of modules, called as ``func(t, y)``, or ``func(y)``: linear layers
            (:class:`torch.nn.Linear`, or ``F.linear`` with parameters) with one of these activations between them,
            always the same, as modules or functions: relu, leaky_relu, tanh, softplus, silu or ``x * sigmoid(s * x)``
            with a number or parameter s, elu, sin. It may apply a square, cube, sin, cos or tanh to the state where
            that enters the network, and append the time behind the state.
        example: a state that ``func`` accepts, if that is neither (batch, D) nor (D,).

    Returns:
        the field, after its values and gradients have been compared with those of ``func`` for random parameters,
        states and times.

    Raises:
        pykernels.FusionError: if ``func`` computes something else, naming the module or operation: other layers, hooks,
            parametrizations, dropout, a change of its attributes or buffers, branches on values or on ``training``.
        TypeError: if ``func`` is not callable.

    ``forward`` of ``func`` is traced by :mod:`torch.fx`, that is called with placeholders. A side effect on anything
    but the modules' own attributes, such as writing a file, cannot be seen, and happens while tracing instead of later.
    """
    if isinstance(func, MLPField) and _is_plain_field(func) and "forward" not in vars(func):
        return func
    if not callable(func):
        raise TypeError(f"func must be a module or a function, got {type(func).__name__}")
    if example is not None and (not isinstance(example, Tensor) or example.dim() == 0):
        raise TypeError(f"example must be a tensor of at least one dimension, got {example!r}")
    try:
        root, field = _read(func, example)
        _compare(root, field, example)
    except FusionError as error:
        raise FusionError(f"{_name(func)} cannot be fused: {error}") from error.__cause__
    return field


def fusable(func: Callable[..., Any]) -> bool:
    """Whether :func:`fuse` is likely to succeed. Takes milliseconds, does not raise, leaves ``func`` as it was."""
    if not isinstance(func, nn.Module) or next(func.parameters(), None) is None:
        return False
    try:
        _read(func)
    except Exception:
        return False
    return True


def _name(func: Callable[..., Any]) -> str:
    return type(func).__name__ if isinstance(func, nn.Module) else getattr(func, "__qualname__", type(func).__name__)


class _Root(nn.Module):
    """``func`` as a part of a module, called as ``func(t, y)`` whatever its arguments are."""

    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__()
        self.func = func
        self.timeless = _takes_state_only(func)
        self.asked_for_shape = False  # in any trace
        if inspect.ismethod(func) and isinstance(func.__self__, nn.Module):
            self.owner = func.__self__

    def forward(self, t: Tensor, y: Tensor) -> Any:
        return self.func(y) if self.timeless else self.func(t, y)


def _takes_state_only(func: Callable[..., Any]) -> bool:
    signature = inspect.signature(func.forward if isinstance(func, nn.Module) else func)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in signature.parameters.values() if p.kind in kinds and p.default is p.empty]
    return len(required) == 1


class _Input(fx.Proxy):
    """The time or the state: its values are not known, its shape, dtype and device are those of ``like``."""

    def __init__(self, node: fx.Node, tracer: _Tracer, like: Tensor) -> None:
        super().__init__(node, tracer)
        self.of, self.like = tracer, like

    @property
    def shape(self) -> torch.Size:
        self.of.asked_for_shape = True
        return self.like.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]


class _Tracer(fx.Tracer):
    """Records what the modules of torch.nn are called with, and traces through all others.

    While it is at work, fx diverts the module calls of all threads; those of other threads are let through.

    Args:
        state: what the state is like.
    """

    proxy_buffer_attributes = True

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.likes = {"t": state.new_empty(()), "y": state}
        self.asked_for_shape = False
        self.thread = threading.get_ident()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Input(node, self, self.likes[node.name]) if node.op == "placeholder" else super().proxy(node)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, nn.Parameter) and all(a is not p for p in self.root.parameters()):  # of a function's closure
            self.root.register_parameter(f"parameter{len(self.root._parameters)}", a)
        return super().create_arg(a)

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:  # of a function's closure
            name = f"module{len(self.root._modules)}"
            self.root.add_module(name, mod)
            assert self.submodule_paths is not None
            self.submodule_paths |= {m: f"{name}.{path}".rstrip(".") for path, m in mod.named_modules()}
            return name

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (Sin, Swish)) or _is_plain_field(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        refuse_altered(m, _user_path(self.path_of_module(m)))
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _is_plain_field(module: object) -> bool:
    return isinstance(module, MLPField) and type(module).forward is MLPField.forward


def _user_path(path: str) -> str:
    """The path of a module below the user's."""
    head, _, rest = path.partition(".")
    return rest if head in ("func", "owner") else path


class _Network(NamedTuple):
    """What was read from a graph."""

    layers: list[tuple[nn.Parameter, nn.Parameter | None]]
    modules: list[nn.Linear | None]
    activations: list[Activation]
    time_input: bool
    input_map: str

    def identity(self) -> tuple[Any, ...]:
        """What tells two networks apart; parameters do not compare."""
        slopes = [a.slope if isinstance(a.slope, float) else id(a.slope) for a in self.activations]
        names = [a.name for a in self.activations]
        return [tuple(map(id, pair)) for pair in self.layers], names, slopes, self.time_input, self.input_map


def _read(func: Callable[..., Any], example: Tensor | None = None) -> tuple[_Root, MLPField]:
    """The field of ``func``, and ``func`` with all modules that it uses; not compared yet.

    Raises:
        FusionError: if there is no such field.
    """
    for kind in ("forward", "backward"):
        if any(getattr(nn.modules.module, f"_global_{kind}_{hooks}") for hooks in ("hooks", "pre_hooks")):
            raise FusionError(f"there are global {kind} hooks, which a fused trajectory would not call")
    root = _Root(func)
    network = _read_for_width(root, example)
    layers = [
        _linear(weight, bias) if module is None else module
        for (weight, bias), module in zip(network.layers, network.modules, strict=True)
    ]
    return root, MLPField.from_layers(
        layers, network.activations, time_input=network.time_input, input_map=network.input_map
    )


def _read_for_width(root: _Root, example: Tensor | None) -> _Network:
    """The network, for states of the width that it has, which only its last layer tells."""
    if not isinstance(root.func, nn.Module):
        _trace(root, torch.empty(5, 1) if example is None else example)  # finds the modules of a closure
    own = next(root.parameters(), torch.empty(0))
    shape = (5, 1) if example is None else tuple(example.shape)
    widths = [p.shape[0] for p in root.parameters() if p.dim() > 0]
    failure: FusionError | None = None
    for width in dict.fromkeys([*widths[::-1], shape[-1]] if example is None else shape[-1:]):
        state = torch.empty(*shape[:-1], width, dtype=own.dtype, device=own.device)
        try:
            network, in_evaluation = (_read_in_mode(root, state, training) for training in (True, False))
        except FusionError as error:
            failure = failure or error
            if root.asked_for_shape:
                continue
            raise
        if network.identity() != in_evaluation.identity():
            raise FusionError("its forward depends on whether it is in training mode")
        if not root.asked_for_shape or network.layers[-1][0].shape[0] == width:
            return network
    raise failure or FusionError("its result has not the shape of the state; give an example of one")


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    return layer


def _read_in_mode(root: _Root, state: Tensor, training: bool) -> _Network:
    modes = {m: m.training for m in root.modules()}
    try:
        for m in modes:
            m.training = training
        return _Reader(root, _trace(root, state)).network()
    finally:
        for m, mode in modes.items():
            m.training = mode


def _trace(root: _Root, state: Tensor) -> fx.Graph:
    tracer = _Tracer(state)
    rng = torch.get_rng_state()
    try:
        with _unchanged(root):
            graph = tracer.trace(root)
    except FusionError:
        raise
    except fx.proxy.TraceError as error:
        raise FusionError(f"its forward depends on values of its arguments: {error}") from error
    except Exception as error:
        raise FusionError(f"tracing its forward failed with {type(error).__name__}: {error}") from error
    finally:
        root.asked_for_shape |= tracer.asked_for_shape
        drawn = not torch.equal(torch.get_rng_state(), rng)
        torch.set_rng_state(rng)
    if drawn:
        raise FusionError("its forward draws random numbers")
    return graph


@contextmanager
def _unchanged(root: nn.Module) -> Iterator[None]:
    """Undo and report what happens inside to the attributes of the modules.

    Raises:
        FusionError: naming the attribute.
    """
    modules = {name: module for name, module in root.named_modules() if module is not root}
    before = {name: dict(vars(module)) for name, module in modules.items()}
    contents = {
        (name, key): (_content(value), _identities(value)) for name, old in before.items() for key, value in old.items()
    }
    changed = []
    try:
        yield
    finally:
        for name, module in modules.items():
            now, old = vars(module), before[name]
            for key in [*old, *(now.keys() - old.keys())]:
                path = f"{_user_path(name)}.{key}".lstrip(".")
                if key not in old:
                    changed.append(path)
                    del now[key]
                    continue
                if key not in now or now[key] is not old[key]:
                    changed.append(path)
                    now[key] = old[key]
                value, (content, identities) = now[key], contents[name, key]
                if isinstance(value, (list, dict, set)) and _identities(value) != identities:
                    changed += _changed_members(path, value, dict(content)) if key in _MEMBERS else [path]
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(content)
    if changed:
        raise FusionError(f"its forward changes {', '.join(changed)}, which a fused trajectory would not do")


def _changed_members(path: str, now: Any, before: dict[str, Any]) -> list[str]:
    """Paths of the buffers, parameters or modules that are not those of before."""
    prefix = path.rpartition(".")[0]
    names = [name for name in {**before, **now} if now.get(name) is not before.get(name)]
    return [f"{prefix}.{name}".lstrip(".") for name in names]


def _content(value: Any) -> list[Any]:
    """What a container holds, (key, value) of dictionaries; nothing for anything else."""
    if isinstance(value, dict):
        return list(value.items())
    return list(value) if isinstance(value, (list, set)) else []


def _identities(value: Any) -> list[Any]:
    """What tells whether a container holds the same objects; they may be tensors, which do not compare."""
    if isinstance(value, dict):
        return [(key, id(member)) for key, member in value.items()]
    return list(map(id, _content(value)))


#: Where a module keeps what is not an attribute in the ordinary way.
_MEMBERS = ("_buffers", "_parameters", "_modules")


class _Reader:
    """Reads a network from the graph of its operations."""

    def __init__(self, root: _Root, graph: fx.Graph) -> None:
        self.root = root
        self.graph = graph
        self.t, self.y = (node for node in graph.nodes if node.op == "placeholder")
        self.read: set[fx.Node] = set()

    def network(self) -> _Network:
        """Raises FusionError if it is no MLP."""
        output = next(node for node in self.graph.nodes if node.op == "output")
        node = output.args[0]
        if not isinstance(node, fx.Node):
            raise FusionError(f"its forward returns a {type(node).__name__}, not a tensor")
        if (field := self._field(node)) is not None:
            self._refuse_others(output)
            return field
        layers: list[tuple[nn.Parameter, nn.Parameter | None]] = []
        modules: list[nn.Linear | None] = []
        activations: list[Activation] = []
        while True:
            node = self._skip_identities(node)
            layer = self._linear(node)
            if layer is None:
                where = "the last operation" if not layers else "in front of an activation"
                raise FusionError(f"{self._describe(node)} is no Linear layer, as must be {where}")
            weight, bias, module, node = layer
            layers.insert(0, (weight, bias))
            modules.insert(0, module)
            node = self._skip_identities(node)
            entry = self._entry(node)
            if entry is not None:
                break
            activation, node = self._activation(node)
            activations.insert(0, activation)
        self._refuse_others(output)
        return _Network(layers, modules, activations, *entry)

    def _field(self, node: fx.Node) -> _Network | None:
        """What is read from a field that is called with the time and the state."""
        module = self._module(node) if node.op == "call_module" else None
        if not isinstance(module, MLPField) or (node.args, node.kwargs) != ((self.t, self.y), {}):
            return None
        layers: list[Any] = list(module.layers)
        for i, layer in enumerate(layers):
            refuse_altered(layer, f"{_user_path(str(node.target))}.layers.{i}")
        if any(type(layer) is not nn.Linear for layer in layers):
            return None
        self.read.add(node)
        slopes = [module.slope] * (len(layers) - 1) if module.slopes is None else list(module.slopes)
        return _Network(
            [(layer.weight, layer.bias) for layer in layers],
            layers,
            [Activation(module.activation, slope) for slope in slopes],
            module.time_input,
            module.input_map,
        )

    def _skip_identities(self, node: fx.Node) -> fx.Node:
        while node.op == "call_module" and is_identity(self._module(node)):
            self.read.add(node)
            node = self._argument(node, 0, "input")
        return node

    def _linear(self, node: fx.Node) -> tuple[nn.Parameter, nn.Parameter | None, nn.Linear | None, fx.Node] | None:
        """Weight, bias, the module if there is one, and the input; None if the node is no Linear layer."""
        found = self._module(node) if node.op == "call_module" else None
        module = found if isinstance(found, nn.Linear) and type(found) is nn.Linear else None
        weight: Any
        bias: Any
        if module is not None:
            weight, bias = module.weight, module.bias
        elif self._operation(node) == "linear":
            weight = self._parameter(node, self._argument(node, 1, "weight"))
            given = self._argument(node, 2, "bias", None)
            bias = None if given is None else self._parameter(node, given)
        else:
            return None
        self.read.add(node)
        return weight, bias, module, self._tensor(node, self._argument(node, 0, "input"))

    def _entry(self, node: fx.Node) -> tuple[bool, str] | None:
        """Whether the time is there, and the map of the state; None if the node is not what enters a network."""
        if self._operation(node) != "cat":
            mapped = self._map(node)
            return None if mapped is None else (False, mapped)
        parts = self._argument(node, 0, "tensors")
        if not isinstance(parts, (list, tuple)):
            raise FusionError(f"{self._describe(node)} must be of a list")
        self.read.add(node)
        mapped = self._map(parts[0])
        if mapped is None and len(parts) == 2 and self._is_time(parts[0]) and self._map(parts[1]) is not None:
            raise FusionError(f"{self._describe(node)} has the time in front; an MLPField has it behind the state")
        if mapped is None or len(parts) != 2 or not self._is_time(parts[1]):
            raise FusionError(
                f"{self._describe(node)} must be of the state and the time, as in cat([y, t.expand(...)], -1)"
            )
        return True, mapped

    def _map(self, node: Any) -> str | None:
        """The key of ``INPUT_MAPS`` for what is computed of the state alone; None if there is none."""
        node = self._skip_identities(node)
        if (power := self._power(node)) is not None:
            return {1: "none", 2: "square", 3: "cube"}.get(power)
        name = _MODULES.get(type(self._module(node))) if node.op == "call_module" else self._operation(node)
        if name in ("sin", "cos", "tanh") and self._argument(node, 0, "input") is self.y and not self._in_place(node):
            self.read.add(node)
            return name
        return None

    def _power(self, node: Any) -> int | None:
        """The power of the state that a node is."""
        if node is self.y:
            return 1
        if not isinstance(node, fx.Node):
            return None
        power = None
        match self._operation(node):
            case "square":
                power = self._power(self._argument(node, 0, "input"))
                power = None if power is None else 2 * power
            case "pow":
                power, exponent = self._power(self._argument(node, 0, "input")), self._argument(node, 1, "exponent")
                whole = isinstance(exponent, (int, float)) and exponent in (1, 2, 3)
                power = int(power * exponent) if power is not None and whole else None
            case "mul":
                powers = [self._power(self._argument(node, i, name)) for i, name in enumerate(("input", "other"))]
                power = None if None in powers else sum(p for p in powers if p is not None)
        if power is not None:
            self.read.add(node)
        return power

    def _is_time(self, node: Any) -> bool:
        """Whether a node is made of the time and shapes only."""
        if not isinstance(node, fx.Node):
            return False
        seen, todo = set(), [node]
        while todo:
            n = todo.pop()
            if n in seen or n is self.y:
                continue
            seen.add(n)
            if n is not self.t and not self._is_shaping(n):
                return False
            todo += n.all_input_nodes
        if self.t not in seen:
            return False
        self.read |= seen
        return True

    def _is_shaping(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return not isinstance(operator.attrgetter(str(node.target))(self.root), nn.Parameter)
        if node.op == "call_method":
            return node.target in _SHAPING_METHODS
        return node.op == "call_function" and node.target in _SHAPING_FUNCTIONS

    def _activation(self, node: fx.Node) -> tuple[Activation, fx.Node]:
        """The activation and its input."""
        if self._linear(node) is not None:
            raise FusionError(f"there is no activation behind {self._describe(node)}")
        self.read.add(node)
        if node.op == "call_module":
            activation = activation_of(self._module(node), _user_path(str(node.target)))
            return activation, self._tensor(node, self._argument(node, 0, "input"))
        name = self._operation(node)
        if name == "mul":
            return self._swish(node)
        x = self._argument(node, 0, "input")
        if name in ("relu", "tanh", "sin"):
            return Activation(name), self._tensor(node, x)
        if name == "silu":
            return Activation(name, 1.0), self._tensor(node, x)
        if name in ("leaky_relu", "elu"):
            slope = self._argument(node, 1, "negative_slope" if name == "leaky_relu" else "alpha", DEFAULT_SLOPES[name])
            if isinstance(slope, (int, float)):
                return Activation(name, float(slope)), self._tensor(node, x)
        if (
            name == "softplus"
            and self._argument(node, 1, "beta", 1) == 1
            and self._argument(node, 2, "threshold", 20) >= 20
        ):
            return Activation(name), self._tensor(node, x)
        raise FusionError(f"{self._describe(node)} is none of the known activations: {KNOWN_ACTIVATIONS}")

    def _swish(self, node: fx.Node) -> tuple[Activation, fx.Node]:
        """``x * sigmoid(slope * x)`` in any order."""
        factors = [self._argument(node, i, name) for i, name in enumerate(("input", "other"))]
        for x, gate in (factors, factors[::-1]):
            if not isinstance(x, fx.Node) or not isinstance(gate, fx.Node) or self._operation(gate) != "sigmoid":
                continue
            inner = self._argument(gate, 0, "input")
            if inner is x:
                self.read.add(gate)
                return Activation("silu", 1.0), x
            if not isinstance(inner, fx.Node) or self._operation(inner) != "mul":
                continue
            inputs = [self._argument(inner, i, name) for i, name in enumerate(("input", "other"))]
            for slope, other in (inputs, inputs[::-1]):
                if other is not x:
                    continue
                number = float(slope) if isinstance(slope, (int, float)) else None
                self.read |= {gate, inner}
                return Activation("silu", self._slope(inner, slope) if number is None else number), x
        raise FusionError(f"{self._describe(node)} is no x * sigmoid(slope * x)")

    def _slope(self, node: fx.Node, value: Any) -> nn.Parameter:
        slope = self._parameter(node, value)
        if slope.numel() != 1 or slope.dim() > 1:
            raise FusionError(f"the slope of x * sigmoid(slope * x) must be one number, got shape {tuple(slope.shape)}")
        return slope

    def _refuse_others(self, output: fx.Node) -> None:
        """Raise if there is an operation that has not been read and is more than a question about shapes."""
        for node in self.graph.nodes:
            if node in self.read or node is output or node.op in ("placeholder", "get_attr"):
                continue
            if node.op == "call_method" and str(node.target).endswith("_"):
                raise FusionError(f"its forward changes a tensor in place by {self._describe(node)}")
            if not self._is_shaping(node):
                raise FusionError(f"its forward computes {self._describe(node)}, on which the result does not depend")

    def _parameter(self, node: fx.Node, value: Any) -> nn.Parameter:
        if isinstance(value, fx.Node) and value.op == "get_attr":
            found = operator.attrgetter(str(value.target))(self.root)
            if isinstance(found, nn.Parameter):
                return found
        shown = self._describe(value) if isinstance(value, fx.Node) else repr(value)
        raise FusionError(f"{self._describe(node)} has {shown} where a parameter must be")

    def _tensor(self, node: fx.Node, value: Any) -> fx.Node:
        if not isinstance(value, fx.Node):
            raise FusionError(f"{self._describe(node)} is applied to {type(value).__name__}, not to a tensor")
        return value

    def _module(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def _operation(self, node: fx.Node) -> str | None:
        """What a function or method computes, if that is known here."""
        if node.op == "call_function":
            return _FUNCTIONS.get(node.target)
        return _METHODS.get(str(node.target)) if node.op == "call_method" else None

    def _in_place(self, node: fx.Node) -> bool:
        return node.op == "call_method" and node.target in _IN_PLACE

    @staticmethod
    def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
        return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)

    def _describe(self, node: Any) -> str:
        """A node for a message."""
        if not isinstance(node, fx.Node):
            return repr(node)
        match node.op:
            case "call_module":
                return describe(self._module(node), _user_path(str(node.target)))
            case "call_method":
                return f".{node.target}()"
            case "call_function":
                return f"{getattr(node.target, '__name__', node.target)}()"
            case "get_attr" if "_tensor_constant" in str(node.target):
                return "a constant tensor"
            case "get_attr":
                return _user_path(str(node.target))
        return "the time" if node is self.t else "the state"


def _compare(root: _Root, field: MLPField, example: Tensor | None) -> None:
    """Raise if the field's values or gradients are not those of ``func``.

    In float64 for random parameters, so that no zero among them hides a difference; and as they are now in their own
    dtype, where casts inside show.

    Raises:
        FusionError: saying what differs.
    """
    own = next(iter(field.parameters()))
    if own.is_meta:
        raise FusionError("its parameters are on the meta device: give them values first")
    shared = {id(p) for p in field.parameters()}
    names = [_user_path(name) for name, p in root.named_parameters() if id(p) in shared]
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(own.device)

    with torch.inference_mode(False), torch.enable_grad():
        shape = _accepted_shape(root, field.dims[0], example, own)
        for _ in range(3):
            t, y, grad = random(), random(*shape), random(*shape)
            values = {
                id(p): (random(*p.shape) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 1)).requires_grad_()
                for p in root.parameters()
            }
            with _replaced(values, root, field):
                wanted = [value for key, value in values.items() if key in shared]
                expected, found = (_derivatives(module, t, y, grad, wanted) for module in (root, field))
            for name in ("value", "gradient of t", "gradient of y", *(f"gradient of {name}" for name in names)):
                if _difference(found.pop(0), expected.pop(0)) > _TOLERANCE:
                    raise FusionError(f"the {name} is not that of an MLPField with the same layers")
    with torch.no_grad():
        t, y = t.to(own.dtype), y.to(own.dtype)
        if _difference(field(t, y), root(t, y)) > max(_TOLERANCE, 1e3 * torch.finfo(own.dtype).eps):
            raise FusionError(f"the value is not that of an MLPField with the same layers in {own.dtype}")


def _accepted_shape(root: _Root, dim: int, example: Tensor | None, like: Tensor) -> tuple[int, ...]:
    """The shape of a state that ``func`` takes and returns."""
    shapes = [(5, dim), (dim,)] if example is None else [tuple(example.shape)]
    reasons = []
    for shape in shapes:
        try:
            result = root(like.new_zeros(()), like.new_zeros(shape))
        except Exception as error:
            reasons.append(f"a state of shape {shape} raises {type(error).__name__}: {error}")
            continue
        if result.shape == shape:
            return shape
        reasons.append(f"a state of shape {shape} gives a derivative of shape {tuple(result.shape)}")
    raise FusionError(f"{'; '.join(reasons)}; give an example of a state")


@contextmanager
def _replaced(values: dict[int, Tensor], *modules: nn.Module) -> Iterator[None]:
    """Other values in place of the parameters with these ids.

    Not by functional_call, which leaves a module that is there under two names with the other values.
    """
    before = {m: dict(m._parameters) for module in modules for m in module.modules()}
    try:
        for m, parameters in before.items():
            m._parameters |= {name: values[id(p)] for name, p in parameters.items() if p is not None}  # type: ignore[misc]
        yield
    finally:
        for m, parameters in before.items():
            m._parameters |= parameters


def _derivatives(module: nn.Module, t: Tensor, y: Tensor, grad: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The value, and its gradients for t, y and these parameters."""
    wanted = [t.clone().requires_grad_(), y.clone().requires_grad_(), *parameters]
    result = module(*wanted[:2])
    if not result.requires_grad:
        return [result, *map(torch.zeros_like, wanted)]
    grads = torch.autograd.grad(result, wanted, grad, allow_unused=True, materialize_grads=True)
    return [result.detach(), *grads]


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value; infinite for NaN."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float(((found - expected).abs().max() / scale).nan_to_num(math.inf))
