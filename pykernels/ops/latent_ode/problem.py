"""Arguments of the solvers, checked and brought into one form: a field of one state tensor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels._errors import users_line
from pykernels.ops.latent_ode import grids
from pykernels.ops.latent_ode.solver import Callback, Field, Options
from pykernels.ops.latent_ode.tableaux import TABLEAUX, Tableau

State = Tensor | tuple[Tensor, ...]
VectorField = Callable[..., Any]

#: Options of torchdiffeq's other methods, which scripts that try several methods leave in place.
_OTHER_OPTIONS = frozenset(
    {"dtype", "dfactor", "first_step", "ifactor", "implicit", "jump_t", "max_iters", "max_num_steps"}
    | {"max_order", "max_step", "min_step", "safety", "solver", "step_t"}
)


class Problem(NamedTuple):
    """An initial value problem in one state tensor."""

    field: Field
    y0: Tensor
    t: Tensor
    shapes: list[torch.Size] | None  # of a tuple's members


def state_problem(func: VectorField, y0: State, t: Tensor) -> Problem:
    """The problem of a user's field and state.

    Raises:
        TypeError, ValueError: naming what cannot be used.
    """
    if not callable(func):
        raise TypeError(f"func must be a callable func(t, y), got {type(func).__name__}")
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor of times, got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(f"t must be of a floating-point dtype, got {t.dtype}")
    if t.dim() != 1 or len(t) == 0:
        raise ValueError(f"t must be one-dimensional and hold at least one time, got shape {tuple(t.shape)}")
    grids.check_times(t)
    if isinstance(y0, Tensor):
        _check_state(y0, "y0")
        return Problem(_checked(func, y0.shape, y0.is_complex()), y0, t, None)
    if not isinstance(y0, tuple) or not y0:
        raise TypeError(f"y0 must be a tensor or a tuple of tensors, got {type(y0).__name__}")
    for i, member in enumerate(y0):
        _check_state(member, f"y0[{i}]")
    shapes = [member.shape for member in y0]
    flat = torch.cat([member.reshape(-1) for member in y0])
    return Problem(_flattened(func, shapes, flat.is_complex()), flat, t, shapes)


def members(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """The members of a tuple that lie one behind the other in the last dimension of ``flat``."""
    parts = flat.split([shape.numel() for shape in shapes], -1)
    return tuple(part.reshape(part.shape[:-1] + shape) for part, shape in zip(parts, shapes, strict=True))


def _check_state(y: object, name: str) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(y).__name__}")
    if not (y.is_floating_point() or y.is_complex()):
        raise TypeError(f"{name} must be of a floating-point or complex dtype, got {y.dtype}")


def _check_derivative(value: object, shape: torch.Size, is_complex: bool, where: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"func must return a tensor{where}, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(
            f"func must return the shape of the state{where}: the state has {tuple(shape)}, "
            f"func returned {tuple(value.shape)}"
        )
    if value.is_complex() and not is_complex:
        raise ValueError(f"func returned {value.dtype} for a real state{where}; make y0 complex")


def _checked(func: VectorField, shape: torch.Size, is_complex: bool) -> Field:
    """``func``, whose first result is looked at."""
    checked = False

    def field(t: Tensor, y: Tensor) -> Tensor:
        nonlocal checked
        derivative: Tensor = func(t, y)
        if not checked:
            _check_derivative(derivative, shape, is_complex, "")
            checked = True
        return derivative

    return field


def _flattened(func: VectorField, shapes: list[torch.Size], is_complex: bool) -> Field:
    checked = False

    def field(t: Tensor, y: Tensor) -> Tensor:
        nonlocal checked
        derivatives = func(t, members(y, shapes))
        if not checked:
            if not isinstance(derivatives, (tuple, list)) or len(derivatives) != len(shapes):
                got = f"{len(derivatives)}" if isinstance(derivatives, (tuple, list)) else type(derivatives).__name__
                raise TypeError(
                    f"func must return a tuple of {len(shapes)} tensors, as many as the state has, got {got}"
                )
            for i, (derivative, shape) in enumerate(zip(derivatives, shapes, strict=True)):
                _check_derivative(derivative, shape, is_complex, f" at position {i}")
            checked = True
        return torch.cat([derivative.reshape(-1) for derivative in derivatives])

    return field


def fixed_step(method: object, event_fn: object = None) -> Tableau:
    """The method of this name.

    Raises:
        ValueError: if there is none, or events are asked for.
    """
    names = ", ".join(map(repr, TABLEAUX))
    if event_fn is not None:
        raise ValueError(f"event_fn is not supported: the methods ({names}) take fixed steps to the times t")
    if method is None:
        raise ValueError(f"method must be given, one of {names}: there is no adaptive method to be the default")
    if not isinstance(method, str) or method not in TABLEAUX:
        raise ValueError(f"method must be one of {names}, got {method!r}; adaptive and Adams methods are not supported")
    return TABLEAUX[method]


def read_options(options: Any, checkpoint_every: int | None = None, name: str = "options") -> Options:
    """Checked options.

    Raises:
        TypeError, ValueError: naming the option.
    """
    given = {} if options is None else options
    if not hasattr(given, "items"):
        raise TypeError(f"{name} must be a dict, got {type(given).__name__}")
    given = {key: value for key, value in given.items() if key != "norm"}  # only adaptive steps have one
    unknown = [key for key in given if key not in Options._fields and key not in _OTHER_OPTIONS]
    if unknown:
        raise ValueError(
            f"{name} has unknown {', '.join(map(repr, unknown))}; fixed-step methods take "
            f"{', '.join(map(repr, Options._fields))}"
        )
    unused = {key: value for key, value in given.items() if key in _OTHER_OPTIONS}
    if unused and not torch.compiler.is_compiling():
        warnings.warn(f"fixed-step methods make no use of {unused} in {name}", UserWarning, users_line())
    if checkpoint_every is not None:
        if given.get("checkpoint_every") not in (None, checkpoint_every):
            raise ValueError(f"checkpoint_every={checkpoint_every} contradicts {name}, {given['checkpoint_every']}")
        given["checkpoint_every"] = checkpoint_every
    result = Options(**{key: value for key, value in given.items() if key in Options._fields})
    if result.step_size is not None and result.grid_constructor is not None:
        raise ValueError(f"{name} may have only one of 'step_size' and 'grid_constructor'")
    if result.interp not in ("linear", "cubic"):
        raise ValueError(f"interp must be 'linear' or 'cubic', got {result.interp!r}")
    size: Any = result.step_size
    if size is not None and not isinstance(size, (Real, Tensor)):
        raise TypeError(f"step_size must be a number or a tensor, got {type(size).__name__}")
    if isinstance(size, Real) and not 0 < size < math.inf:  # type: ignore[operator]
        raise ValueError(f"step_size must be positive and finite, got {size}")
    every = result.checkpoint_every
    if every is not None and (not isinstance(every, int) or every < 1):
        raise ValueError(f"checkpoint_every must be a number of steps, at least 1, got {every!r}")
    return result


def callback_of(func: VectorField, shapes: list[torch.Size] | None, suffix: str = "") -> Callback | None:
    """The method ``callback_step`` of a field, for states in one tensor; warns of callbacks of adaptive steps."""
    unsupported = [f"callback_{kind}_step{suffix}" for kind in ("accept", "reject")]
    unsupported = [name for name in unsupported if hasattr(func, name)]
    if unsupported and not torch.compiler.is_compiling():
        warnings.warn(f"fixed-step methods do not call {' and '.join(unsupported)}", UserWarning, users_line())
    callback = getattr(func, f"callback_step{suffix}", None)
    return callback if shapes is None else in_members(callback, shapes)


def in_members(callback: Callable[..., object] | None, shapes: list[torch.Size]) -> Callback | None:
    """A callback for states in one tensor, from one for tuples."""
    if callback is None:
        return None
    return lambda t, y, dt: callback(t, members(y, shapes), dt)
