"""The vector field of a Neural ODE as a layer, whose whole trajectories run in one call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pykernels._errors import FusionError
from pykernels.ops.latent_ode.mlp import trajectory
from pykernels.ops.latent_ode.reference import ACTIVATIONS, INPUT_MAPS, activate, map_input

#: Slopes that the activations have by default; the other activations have none.
DEFAULT_SLOPES = {"leaky_relu": 0.01, "elu": 1.0, "silu": 1.0}

#: What :meth:`MLPField.from_sequential` and :func:`pykernels.fuse` take as activations.
KNOWN_ACTIVATIONS = "ReLU, LeakyReLU, Tanh, Softplus(beta=1), SiLU, ELU, pykernels.nn.Sin, pykernels.nn.Swish"

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


class Sin(nn.Module):
    """``sin(x)``, of any shape."""

    def forward(self, input: Tensor) -> Tensor:
        return input.sin()


class Swish(nn.Module):
    """``x * sigmoid(slope * x)`` with a learned slope, a parameter of shape ().

    Args:
        slope: the initial slope.

    Shape:
        any, the same for input and output.

    Source: Ramachandran, Zoph and Le, "Searching for activation functions", arXiv 1710.05941 (2017).
    """

    def __init__(
        self, slope: float = 1.0, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((), slope, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        return activate(input, "silu", 0.0, self.slope)


class Activation(NamedTuple):
    """A key of ``ACTIVATIONS``, with its slope: a number, a parameter of silu, or None where there is none."""

    name: str
    slope: float | nn.Parameter | None = None

    def __str__(self) -> str:
        if self.slope is None:
            return self.name
        return f"{self.name}(slope={self.slope if isinstance(self.slope, float) else 'learned'})"


class MLPField(nn.Module):
    """A multilayer perceptron as the vector field of an ODE.

    ``dy/dt = W_L act(... act(W_1 [map(y), z, t] + b_1) ...) + b_L``, with a control z and the time t where asked for.

    Called as ``field(t, y)`` it is a plain module for any solver. :meth:`trajectory`, and :func:`pykernels.odeint` for
    fixed-step methods, run whole trajectories in one call forward and one backward.

    Args:
        dims: widths (D, hidden, ..., D), the first being that of the state.
        activation: between the layers: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"``, ``"silu"``, ``"elu"``
            or ``"sin"``.
        slope: of leaky_relu below zero (0.01 by default); alpha of elu (1); the slope s of silu,
            ``z * sigmoid(s * z)`` (1), there also ``"learned"``: a parameter for each hidden layer, starting at 1.
        time_input: whether the time is the last input of the network.
        input_map: applied to the state where it enters the network: ``"none"``, ``"square"``, ``"cube"``, ``"sin"``,
            ``"cos"`` or ``"tanh"``.
        control_dim: size C of an input z, held constant over each interval of a trajectory.
        bias: whether the layers have biases.
        device, dtype: of the parameters.

    Shape:
        ``forward(t, y)``, or ``forward(t, y, z)`` with control: t (), y (..., D), z (..., C), output (..., D).

    Raises:
        ValueError: if an argument is out of range, naming what is accepted.

    The layers start as :class:`torch.nn.Linear` does. Softplus is ``log(1 + exp(z))`` throughout;
    :class:`torch.nn.Softplus` turns linear at 20, a jump of 2e-9.

    Source: R. T. Q. Chen, Rubanova, Bettencourt and Duvenaud, "Neural ordinary differential equations", NeurIPS 2018.
    """

    def __init__(
        self,
        dims: Sequence[int],
        activation: str,
        *,
        slope: float | str | None = None,
        time_input: bool = False,
        input_map: str = "none",
        control_dim: int = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        given: list[Any] = list(dims)
        if len(given) < 2 or given[0] != given[-1] or any(not isinstance(d, Integral) or d < 1 for d in given):
            raise ValueError(
                f"dims must be (D, hidden widths ..., D), D being the width of the state, got {tuple(given)}"
            )
        dims = [int(d) for d in given]
        if isinstance(slope, str) and (slope, activation) != ("learned", "silu"):
            raise ValueError(f"slope must be a number, or 'learned' for silu, got {slope!r} with {activation!r}")
        _check_inputs(input_map, control_dim)
        widths = [dims[0] + control_dim + bool(time_input), *dims[1:]]
        layers = [nn.Linear(i, o, bias=bias, device=device, dtype=dtype) for i, o in pairwise(widths)]
        slopes: list[float | nn.Parameter | None]
        if isinstance(slope, str):
            slopes = [nn.Parameter(torch.ones((), device=device, dtype=dtype)) for _ in dims[1:-1]]
        else:
            slopes = [slope]
        super().__init__()
        self._assemble(layers, [Activation(activation, s) for s in slopes], bool(time_input), input_map, control_dim)

    def _assemble(
        self,
        layers: Sequence[nn.Linear],
        activations: Sequence[Activation],
        time_input: bool,
        input_map: str,
        control_dim: int,
    ) -> None:
        """Set all attributes. ``activations`` are alike, one for each hidden layer if their slopes are learned."""
        name, slope = activations[0] if activations else Activation("relu")
        if name not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {name!r}")
        self.layers = nn.ModuleList(layers)
        self.slopes: nn.ParameterList | None = None
        self.slope: float | None = None
        if isinstance(slope, nn.Parameter):
            self.slopes = nn.ParameterList([a.slope for a in activations])
        elif slope is not None and name not in DEFAULT_SLOPES:
            raise ValueError(f"slope is for leaky_relu, elu and silu, got one with activation {name!r}")
        elif slope is not None and name != "silu" and not 0 <= slope < math.inf:
            raise ValueError(f"slope must be at least 0 and finite, got {slope}")
        else:
            self.slope = DEFAULT_SLOPES.get(name) if slope is None else float(slope)
        self.activation = name
        self.time_input = time_input
        self.input_map = input_map
        self.control_dim = control_dim
        self.dims = (layers[-1].out_features, *(layer.out_features for layer in layers))

    @classmethod
    def from_sequential(
        cls, network: nn.Sequential, *, time_input: bool = False, input_map: str = "none", control_dim: int = 0
    ) -> MLPField:
        """The field of a network, of which it shares the layers: training one trains the other.

        Args:
            network: :class:`torch.nn.Linear` layers with one of these activations between them, always the same: ReLU,
                LeakyReLU, Tanh, Softplus (beta=1), SiLU, ELU, :class:`Sin` or :class:`Swish`. May be nested, and
                contain Identity.
            time_input, input_map, control_dim: see :class:`MLPField`; the first layer has D + C inputs, and one more
                for the time.

        Raises:
            TypeError: if network is not an nn.Sequential.
            pykernels.FusionError: if there is something else in it, or hooks or parametrizations, naming it.
        """
        if not isinstance(network, nn.Sequential):
            raise TypeError(f"network must be an nn.Sequential, got {type(network).__name__}; see also pykernels.fuse")
        layers: list[nn.Linear] = []
        activations: list[Activation] = []
        for path, module in _flattened(network, ""):
            refuse_altered(module, path)
            if type(module) is nn.Linear:
                if len(layers) > len(activations):
                    raise FusionError(
                        f"there is no activation in front of {path} (Linear); {KNOWN_ACTIVATIONS} are known"
                    )
                layers.append(module)
            else:
                if len(activations) == len(layers):
                    raise FusionError(f"{describe(module, path)} must come between two Linear layers")
                activations.append(activation_of(module, path))
        if not layers or len(activations) == len(layers):
            last = "Linear, but there is none" if not layers else "Linear, the last layer has no activation"
            raise FusionError(f"the network must end with a {last}")
        return cls.from_layers(layers, activations, time_input=time_input, input_map=input_map, control_dim=control_dim)

    @classmethod
    def from_layers(
        cls,
        layers: Sequence[nn.Linear],
        activations: Sequence[Activation],
        *,
        time_input: bool = False,
        input_map: str = "none",
        control_dim: int = 0,
    ) -> MLPField:
        """The field made of these layers and the activations between them.

        Raises:
            FusionError: if they do not fit.
        """
        kinds = dict.fromkeys(map(str, activations))
        if len(kinds) > 1:
            raise FusionError(f"all activations must be the same, got {' and '.join(kinds)}")
        for number, (before, after) in enumerate(pairwise(layers), 1):
            if before.out_features != after.in_features:
                raise FusionError(
                    f"Linear number {number} has {before.out_features} outputs, the next one {after.in_features} inputs"
                )
        _check_inputs(input_map, control_dim)
        dim, inputs = layers[-1].out_features, layers[0].in_features
        if inputs != dim + control_dim + bool(time_input):
            raise FusionError(
                f"the first layer must have {dim} inputs, as many as the last one has outputs, "
                f"{'and one for the time' if time_input else 'and one more with time_input=True'}"
                f"{f', and {control_dim} of the control' if control_dim else ''}; it has {inputs}"
            )
        field = cls.__new__(cls)
        nn.Module.__init__(field)
        field._assemble(layers, activations, bool(time_input), input_map, control_dim)
        return field

    def forward(self, t: Tensor | float, y: Tensor, z: Tensor | None = None) -> Tensor:
        if y.dim() == 0 or y.shape[-1] != self.dims[0]:
            raise ValueError(f"y must have shape (..., {self.dims[0]}), got {tuple(y.shape)}")
        parts = [map_input(y, self.input_map)]
        if (z is None) != (self.control_dim == 0):
            raise ValueError(
                f"z must {'not ' * (z is not None)}be given to a field with control_dim={self.control_dim}"
            )
        if z is not None:
            parts.append(z.expand(*y.shape[:-1], self.control_dim))
        if self.time_input:
            parts.append(torch.as_tensor(t, device=y.device, dtype=y.dtype).expand(*y.shape[:-1], 1))
        a = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            a = layer(a)
            if i < last:
                a = activate(a, self.activation, self.slope or 0.0, self._beta(i, a))
        return a

    def _beta(self, layer: int, like: Tensor) -> Tensor | None:
        """The slope of silu behind this layer; None if it is 1, or for another activation."""
        if self.slopes is not None:
            slope: Tensor = self.slopes[layer]
            return slope
        if self.activation != "silu" or self.slope is None or self.slope == 1:
            return None
        return like.new_full((), self.slope)

    def trajectory(
        self,
        y0: Tensor,
        t: Tensor,
        *,
        method: str = "rk4",
        substeps: int = 1,
        control: Tensor | None = None,
        group: Tensor | None = None,
        correction: Sequence[Any] | None = None,
        reinject: Sequence[Tensor] | None = None,
        reverse: bool = False,
        return_residual_norms: bool = False,
        return_energy: bool | str = False,
        max_memory: int | None = None,
        validate: bool | None = None,
        backend: str | None = None,
    ) -> Any:
        """The states (T, ..., D) at the times t (T,) from y0 (..., D), by :func:`pykernels.mlp_odeint`.

        ``control`` has shape (T-1, ..., C), ``group`` (...), ``reinject`` (T, ...) and (T, ..., D), norms and energy
        (T-1, ...); all other arguments, and the errors, are as there. Weights under a parametrization are computed once
        for the whole trajectory. Computes in the dtype of y0, which is that of the parameters, also under autocast.

        Raises:
            RuntimeError: if a layer has hooks or a forward of its own, which the trajectory would not call.
        """
        if (obstacle := self._obstacle()) is not None:
            raise RuntimeError(f"{obstacle}, which a trajectory in one call goes around; use pykernels.odeint")
        if not isinstance(y0, Tensor):
            raise TypeError(f"y0 must be a tensor, got {type(y0).__name__}")
        if y0.dim() == 0 or y0.shape[-1] != self.dims[0]:
            raise ValueError(f"y0 must have shape (..., {self.dims[0]}), got {tuple(y0.shape)}")
        if (control is None) != (self.control_dim == 0):
            raise ValueError(
                f"control must {'not ' * (control is not None)}be given to a field with control_dim={self.control_dim}"
            )
        if isinstance(control, Tensor) and (control.dim() != y0.dim() + 1 or control.shape[-1] != self.control_dim):
            raise ValueError(f"control must have shape (T-1, ..., {self.control_dim}), got {tuple(control.shape)}")
        lead = y0.shape[:-1]
        plain = len(lead) == 1
        if not plain:
            batch, dim = math.prod(lead), self.dims[0]
            y0 = y0.reshape(batch, dim)
            control = None if control is None else _flat(control, "control", lead, 1)
            group = group if group is None else _flat(group, "group", lead, 0)
            if isinstance(reinject, (tuple, list)) and len(reinject) == 2:
                mask, states = reinject
                reinject = (
                    _flat(mask, "the mask of reinject", lead, 1),
                    _flat(states, "the states of reinject", lead, 1),
                )
        layers = self._linear_layers()
        slope: float | Tensor | None = self.slope
        if self.slopes is not None:
            slope = torch.cat([s.reshape(1) for s in self.slopes])
        result = trajectory(
            y0,
            t,
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            activation=self.activation,
            method=method,
            substeps=substeps,
            slope=slope,
            time_input=self.time_input,
            input_map=self.input_map,
            control=control,
            group=group,
            correction=correction,
            reinject=reinject,
            reverse=reverse,
            return_residual_norms=return_residual_norms,
            return_energy=return_energy,
            max_memory=max_memory,
            validate=validate,
            backend=backend,
        )
        if plain:
            return result
        if isinstance(result, Tensor):
            return result.reshape(result.shape[0], *lead, dim)
        return tuple(r.reshape(r.shape[0], *lead, *r.shape[2:]) for r in result)

    def _fused_odeint(self, y0: Tensor, t: Tensor, method: str, options: Mapping[str, Any]) -> Any:
        """The states of :func:`pykernels.odeint`, or NotImplemented if they would not be those of :meth:`forward`."""
        own = type(self).forward is MLPField.forward and "forward" not in vars(self)
        if not own or self.control_dim or hook_of(self) is not None or self._obstacle() is not None:
            return NotImplemented
        if y0.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(y0.device.type):
            return NotImplemented
        if y0.dim() == 0 or y0.shape[-1] != self.dims[0]:
            return NotImplemented
        for layer in self.layers:
            parameters = layer._parameters
            if "weight" not in parameters or "bias" not in parameters:  # parametrized: may change at each call
                return NotImplemented
            if any(p is not None and (p.dtype != y0.dtype or p.device != y0.device) for p in parameters.values()):
                return NotImplemented
        # The trajectory bounds its memory by itself, whatever checkpoint_every asks for.
        return self.trajectory(y0, t.to(y0.device), method=method, substeps=options["substeps"])

    def _obstacle(self) -> str | None:
        """Why the layers have to be called themselves."""
        for i, layer in enumerate(self.layers):
            if (hook := hook_of(layer)) is not None:
                return f"layers.{i} has a {hook}"
            if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
                return f"layers.{i} ({type(layer).__name__}) has a forward of its own"
        return None

    def _linear_layers(self) -> list[nn.Linear]:
        return list(self.layers)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        text = f"{self.dims}, {self.activation!r}"
        if self.slopes is not None:
            text += ", slope='learned'"
        elif self.slope != DEFAULT_SLOPES.get(self.activation):
            text += f", slope={self.slope}"
        if self.time_input:
            text += ", time_input=True"
        if self.input_map != "none":
            text += f", input_map={self.input_map!r}"
        if self.control_dim:
            text += f", control_dim={self.control_dim}"
        return text


def _check_inputs(input_map: str, control_dim: int) -> None:
    if input_map not in INPUT_MAPS:
        raise ValueError(f"input_map must be one of {', '.join(map(repr, INPUT_MAPS))}, got {input_map!r}")
    if type(control_dim) is not int or control_dim < 0:
        raise ValueError(f"control_dim must be an int of at least 0, got {control_dim!r}")


def _flat(value: Any, name: str, lead: torch.Size, at: int) -> Any:
    """``value`` with the dimensions ``lead``, from ``at`` on, made one."""
    if not isinstance(value, Tensor) or value.shape[at : at + len(lead)] != lead:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must have dimensions {tuple(lead)} from {at} on, as y0 has, got {got}")
    return value.reshape(*value.shape[:at], math.prod(lead), *value.shape[at + len(lead) :])


def hook_of(module: nn.Module) -> str | None:
    """What kind of hook a module has that a call runs, if any."""
    return next((kind for attribute, kind in _HOOKS.items() if getattr(module, attribute)), None)


def describe(module: nn.Module, path: str) -> str:
    """A module for a message."""
    return f"{path} ({type(module).__name__})" if path else type(module).__name__


def refuse_altered(module: nn.Module, path: str) -> None:
    """Raise if a call of ``module`` does more than its class says.

    Raises:
        FusionError: naming the hook, parametrization or patch.
    """
    if (hook := hook_of(module)) is not None:
        raise FusionError(f"{describe(module, path)} has a {hook}, which a fused trajectory would not call")
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        raise FusionError(
            f"{describe(module, path)} has a parametrization of {names}; fuse first and put it on the field's layers, "
            "where trajectory() computes it once"
        )
    if "forward" in vars(module):
        raise FusionError(
            f"{describe(module, path)} has its forward replaced, for example by torch.compile; fuse before"
        )


_ACTIVATION_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh", Sin: "sin"}


def activation_of(module: nn.Module, path: str) -> Activation:
    """What a module computes that is no Linear layer.

    Raises:
        FusionError: if that is no known activation.
    """
    kind = type(module)
    if kind in _ACTIVATION_MODULES:
        return Activation(_ACTIVATION_MODULES[kind])
    if kind is nn.SiLU:
        return Activation("silu", 1.0)
    if isinstance(module, nn.Softplus) and kind is nn.Softplus and module.beta == 1 and module.threshold >= 20:
        return Activation("softplus")
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        return Activation("leaky_relu", float(module.negative_slope))
    if isinstance(module, nn.ELU) and kind is nn.ELU:
        return Activation("elu", float(module.alpha))
    if isinstance(module, Swish) and kind is Swish:
        return Activation("silu", module.slope)
    if isinstance(module, nn.Dropout):
        raise FusionError(f"{describe(module, path)} has p={module.p}: a trajectory in one call drops nothing out")
    raise FusionError(f"{describe(module, path)} is none of the known activations: {KNOWN_ACTIVATIONS}")


def _flattened(network: nn.Sequential, prefix: str) -> list[tuple[str, nn.Module]]:
    """The modules that compute something, with their paths."""
    refuse_altered(network, prefix)
    if type(network).forward is not nn.Sequential.forward:
        raise FusionError(f"{describe(network, prefix)} has a forward of its own; see pykernels.fuse")
    modules: list[tuple[str, nn.Module]] = []
    for name, module in network._modules.items():  # unlike named_children, it repeats a module that is there twice
        assert module is not None
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(module, nn.Sequential):
            modules += _flattened(module, path)
        elif not is_identity(module):
            modules.append((path, module))
        else:
            refuse_altered(module, path)
    return modules


def is_identity(module: nn.Module) -> bool:
    """Whether a module returns its input, in training too."""
    return type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)
