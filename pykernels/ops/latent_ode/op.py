"""Operators ``pykernels::mlp_odeint*``: schemas, shapes for tracing, and the choice of the kernels that run them.

Private: :func:`pykernels.mlp_odeint` checks the arguments and adds the derivatives. A backend's kernels are a module
with these functions of the tensors and options of :mod:`reference`:

``forward(tensors, options, save) -> (states, norms, energy, saved)``
    states (T, B, D), norms and energy (T-1, B), or None or empty where not asked for, all contiguous. ``saved`` is a
    list of tensors, empty unless ``save``: what the backward needs beside the states, of any form, about
    ``options.max_memory`` bytes at most.
``backward(grad_states, grad_norms, grad_energy, states, saved, tensors, options, needed) -> list[Tensor | None]``
    gradients of the differentiable tensors in the order of :func:`differentiable`, one after the other; None, or empty
    (0,), for one that is not needed. grad_norms and grad_energy are None where nothing depends on them.
``saved_fake(tensors, options) -> list[Tensor]``
    empty tensors like ``saved``, for tracing.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pykernels.ops._op import implement, library
from pykernels.ops.latent_ode import cost
from pykernels.ops.latent_ode.reference import Options, Tensors

_INPUTS = (
    "Tensor y0, Tensor t, Tensor? slopes, Tensor? control, Tensor? correction_slopes, Tensor? injected, "
    "Tensor[] weights, Tensor[] biases, Tensor[] correction_weights, Tensor[] correction_biases, "
    "Tensor? group, Tensor? mask, "
    "int substeps, str method, str activation, float slope, bool time_input, str input_map, bool norms, str energy, "
    "int max_memory, bool validate, str backend"
)
library.define(f"mlp_odeint({_INPUTS}) -> (Tensor, Tensor, Tensor)")
library.define(f"mlp_odeint_saving({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor[])")
library.define(
    "mlp_odeint_backward(Tensor grad_states, Tensor? grad_norms, Tensor? grad_energy, Tensor states, Tensor[] saved, "
    f"{_INPUTS}, bool[] needed) -> Tensor[]"
)

forward_op = torch.ops.pykernels.mlp_odeint.default
saving_op = torch.ops.pykernels.mlp_odeint_saving.default
backward_op = torch.ops.pykernels.mlp_odeint_backward.default

#: How many of a problem's arguments are tensors, or lists of tensors.
N_TENSORS = len(Tensors._fields)

_kernels: dict[str, Any] = {}


def kernels(backend: str) -> Any:
    """The module with the kernels of a backend; imported when it is first used, since it may need another package."""
    module = _kernels.get(backend)
    if module is None:
        module = _kernels[backend] = import_module(f"pykernels.ops.latent_ode.{backend}")
    return module


def differentiable(tensors: Tensors) -> list[Tensor | None]:
    """What has a gradient, in the order of the gradients.

    y0, t, slopes, control, correction_slopes, injected, then weights, biases, correction weights, correction biases.
    """
    return [
        *tensors[:6],
        *tensors.weights,
        *tensors.biases,
        *tensors.correction_weights,
        *tensors.correction_biases,
    ]


def problem(args: Sequence[Any]) -> tuple[Tensors, Options]:
    """The arguments of ``pykernels::mlp_odeint`` but the backend."""
    return Tensors(*args[:N_TENSORS]), Options(*args[N_TENSORS:])


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _saving(*args, save=False)[:3]


def _saving(*args: Any, save: bool = True) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    tensors, options = problem(args[:-1])
    _check_shapes(tensors)
    states, norms, energy, saved = kernels(args[-1]).forward(tensors, options, save)
    nothing = states.new_empty(0)
    return states, nothing if norms is None else norms, nothing.clone() if energy is None else energy, saved


def _backward(
    grad_states: Tensor,
    grad_norms: Tensor | None,
    grad_energy: Tensor | None,
    states: Tensor,
    saved: list[Tensor],
    *args: Any,
) -> list[Tensor]:
    *args_, backend, needed = args
    tensors, options = problem(args_)
    _check_shapes(tensors)
    times, batch = tensors.t.shape[0], tensors.y0.shape[0]
    for t in (states, grad_states):
        _check(t, (times, *tensors.y0.shape), tensors.y0.dtype)
    for grad in (grad_norms, grad_energy):
        if grad is not None and grad.numel() > 0:
            _check(grad, (times - 1, batch), states.dtype)
    gradients: list[Tensor | None] = kernels(backend).backward(
        grad_states, grad_norms, grad_energy, states, saved, tensors, options, needed
    )
    return [states.new_empty(0) if g is None else g for g in gradients]


def _check(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if t.shape != shape or t.dtype != dtype:
        raise ValueError(
            f"a tensor of shape {tuple(t.shape)} and dtype {t.dtype} must be {shape} and {dtype}; "
            "call pykernels.mlp_odeint rather than the raw operator"
        )


def _check_shapes(tensors: Tensors) -> None:
    """Raise unless the tensors fit together: the public function has checked more, but need not have been called."""
    (batch, dim), times, dtype = tensors.y0.shape, tensors.t.shape[0], tensors.y0.dtype
    _check(tensors.t, (times,), tensors.t.dtype)
    features = tensors.weights[0].shape[-1]
    if tensors.control is not None:
        _check(tensors.control, (times - 1, batch, tensors.control.shape[2]), dtype)
    if tensors.injected is not None and tensors.mask is not None:
        _check(tensors.injected, (times, batch, dim), dtype)
        _check(tensors.mask, (times, batch), torch.bool)
    if (tensors.group is None) != (len(tensors.correction_weights) == 0):
        raise ValueError("a group goes with a correction")
    if tensors.group is not None:
        _check(tensors.group, (batch,), torch.int64)
    for weights, biases, slopes in (
        (tensors.weights, tensors.biases, tensors.slopes),
        (tensors.correction_weights, tensors.correction_biases, tensors.correction_slopes),
    ):
        inputs = features
        if weights and weights[0].dim() not in ((2, 3) if weights is tensors.weights else (3,)):
            raise ValueError(f"weights of shape {tuple(weights[0].shape)}; call pykernels.mlp_odeint instead")
        for w, b in zip(weights, biases, strict=True):
            sets = weights[0].shape[:-2]
            _check(w, (*sets, w.shape[-2], inputs), dtype)
            _check(b, (*sets, w.shape[-2]), dtype)
            inputs = w.shape[-2]
        if weights and inputs != dim:
            raise ValueError(f"the networks have {inputs} outputs for {dim} dimensions")
        if slopes is not None:
            _check(slopes, (*(weights[0].shape[:-2] or (1,)), len(weights) - 1), dtype)


def empty_results(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for states, norms and energy; what is not asked for is empty."""
    y0, times = tensors.y0, tensors.t.shape[0]
    batch = y0.shape[0]
    return (
        y0.new_empty((times, *y0.shape)),
        y0.new_empty((times - 1, batch) if options.norms else (0,)),
        y0.new_empty((times - 1, batch) if options.energy != "none" else (0,)),
    )


def empty_gradients(tensors: Tensors, needed: Sequence[bool]) -> list[Tensor | None]:
    """Memory for the gradients that are needed."""
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need and t is not None else None
        for t, need in zip(differentiable(tensors), needed, strict=True)
    ]


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(*problem(args[:-1]))


def _saving_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    tensors, options = problem(args[:-1])
    return *empty_results(tensors, options), kernels(args[-1]).saved_fake(tensors, options)


def _backward_fake(
    grad_states: Tensor, grad_norms: Any, grad_energy: Any, states: Tensor, saved: Any, *args: Any
) -> list[Tensor]:
    *args_, _, needed = args
    gradients = empty_gradients(problem(args_)[0], needed)
    return [states.new_empty(0) if g is None else g for g in gradients]


implement(forward_op, _forward, _forward_fake, devices=("CPU", "CUDA"), cost=cost.forward)
implement(saving_op, _saving, _saving_fake, devices=("CPU", "CUDA"), cost=cost.forward)
implement(backward_op, _backward, _backward_fake, devices=("CPU", "CUDA"), cost=cost.backward)
