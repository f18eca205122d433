"""Trajectories on the C++ kernels of ``kernels/latent_ode``; the functions that op.py asks of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pykernels import _native
from pykernels.ops._memory import IS_DOUBLE, address, plain
from pykernels.ops.latent_ode.op import differentiable, empty_gradients, empty_results
from pykernels.ops.latent_ode.reference import ACTIVATIONS, INPUT_MAPS, Options, Tensors, diverged
from pykernels.ops.latent_ode.tableaux import TABLEAUX

_ENERGY = {"none": 0, "plain": 1, "time": 2}
#: Elements before the tape: the number of threads that it was written with.
_HEADER = 16


@cache
def _method(name: str) -> Any:
    assert _native.cpu is not None
    tableau = TABLEAUX[name]
    return _native.cpu.RungeKutta(list(tableau.c), [list(row) for row in tableau.a], list(tableau.b))


def _dense(t: Tensor) -> Tensor:
    return plain(t).contiguous()


def _dense_tensors(tensors: Tensors) -> Tensors:
    return Tensors(
        *(None if t is None else t if isinstance(t, list) else _dense(t) for t in tensors[:6]),
        *([_dense(t) for t in group] for group in tensors[6:10]),
        *(None if t is None else t.contiguous() for t in tensors[10:]),
    )


def _arguments(
    tensors: Tensors, options: Options, threads: int, results: Sequence[Tensor], gradients: Sequence[Tensor] = ()
) -> tuple[Any, ...]:
    """Method, sizes, slope, networks and arrays for the kernels; the tensors are dense."""
    y0, t, slopes, control, correction_slopes, injected, weights, biases, c_weights, c_biases, group, mask = tensors
    (batch, dim), times, dtype = y0.shape, t.shape[0], y0.dtype
    control_dim = 0 if control is None else control.shape[2]
    sizes = (
        batch,
        dim,
        control_dim,
        times,
        options.substeps,
        ACTIVATIONS[options.activation],
        int(options.time_input),
        INPUT_MAPS[options.input_map],
        _ENERGY[options.energy],
        int(options.validate),
        options.max_memory,
        threads,
    )
    grads = [g.data_ptr() if g.numel() > 0 else 0 for g in gradients]
    at, n = 6, len(weights)
    grad_weights, grad_biases = grads[at : at + n], grads[at + n : at + 2 * n]
    networks = [_network(weights, biases, slopes, dtype, grad_weights, grad_biases, grads[2] if grads else 0)]
    if group is not None:
        at, n = at + 2 * n, len(c_weights)
        grad_weights, grad_biases = grads[at : at + n], grads[at + n :]
        networks.append(
            _network(c_weights, c_biases, correction_slopes, dtype, grad_weights, grad_biases, grads[4] if grads else 0)
        )
    arrays = (
        address(y0, (batch, dim), dtype, "y0"),
        address(t, (times,), dtype, "t"),
        0
        if control_dim == 0 or control is None
        else address(control, (times - 1, batch, control_dim), dtype, "control"),
        0 if mask is None else address(mask, (times, batch), torch.bool, "mask"),
        0 if injected is None else address(injected, (times, batch, dim), dtype, "injected"),
        0 if group is None else address(group, (batch,), torch.int64, "group"),
        *(0 if r.numel() == 0 else r.data_ptr() for r in results),
    )
    return _method(options.method), sizes, options.slope, networks, arrays


def _network(
    weights: list[Tensor],
    biases: list[Tensor],
    slopes: Tensor | None,
    dtype: torch.dtype,
    grad_weights: list[int],
    grad_biases: list[int],
    grad_slope: int,
) -> tuple[Any, ...]:
    sets, _, inputs = weights[0].shape
    widths = [inputs, *(w.shape[1] for w in weights)]
    return (
        widths,
        sets,
        [address(w, (sets, o, i), dtype, "weights") for w, i, o in zip(weights, widths[:-1], widths[1:], strict=True)],
        [address(b, (sets, o), dtype, "biases") for b, o in zip(biases, widths[1:], strict=True)],
        0 if slopes is None else address(slopes, (sets, len(weights) - 1), dtype, "slopes"),
        grad_weights,
        grad_biases,
        grad_slope,
    )


def _kernel(name: str, dtype: torch.dtype) -> Any:
    return getattr(_native.cpu, f"mlp_odeint_{name}_{'double' if IS_DOUBLE[dtype] else 'float'}")


def forward(tensors: Tensors, options: Options, save: bool) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """See op.py."""
    tensors = _dense_tensors(tensors)
    results = empty_results(tensors, options)
    threads = torch.get_num_threads()
    arguments = _arguments(tensors, options, threads, results)
    dtype = tensors.y0.dtype
    tape, tape_address = [], 0
    if save:
        elements = _kernel("tape", dtype)(*arguments)
        memory = tensors.y0.new_empty(_HEADER + elements)
        memory[0] = threads
        tape, tape_address = [memory], memory.data_ptr() + _HEADER * memory.element_size()
    step, sample = _kernel("forward", dtype)(*arguments, tape_address)
    if step >= 0:
        interval, part = divmod(step, options.substeps)
        where = f"after sub-step {part + 1} of {options.substeps} of the interval from t[{interval}]"
        raise FloatingPointError(diverged(where, sample))
    return *results, tape


def saved_fake(tensors: Tensors, options: Options) -> list[Tensor]:
    """See op.py. The size of the tape is not known while tracing."""
    return [tensors.y0.new_empty(torch.library.get_ctx().new_dynamic_size())]


def backward(
    grad_states: Tensor,
    grad_norms: Tensor | None,
    grad_energy: Tensor | None,
    states: Tensor,
    saved: list[Tensor],
    tensors: Tensors,
    options: Options,
    needed: Sequence[bool],
) -> list[Tensor]:
    """See op.py."""
    tensors = _dense_tensors(tensors)
    dtype, (tape,) = tensors.y0.dtype, saved
    results = empty_results(tensors, options)
    grads: list[Tensor | None] = [
        None if g is None or g.numel() == 0 else _dense(g) for g in (grad_states, grad_norms, grad_energy)
    ]
    gradients = empty_gradients(tensors, needed)
    for index in (5,):  # only some of the injected states have a gradient
        gradients[index].zero_()
    if tape.dtype != dtype or not tape.is_contiguous() or tape.numel() < _HEADER:
        raise ValueError("saved must be what the forward on the CPU returned")
    arguments = _arguments(tensors, options, int(tape[0]), results, gradients)
    shapes = (results[0].shape, results[1].shape, results[2].shape)
    arrays = [
        0 if g is None else address(g, tuple(shape), dtype, name)
        for g, shape, name in zip(grads, shapes, ("grad_states", "grad_norms", "grad_energy"), strict=True)
    ]
    arrays += [0 if gradients[i].numel() == 0 else gradients[i].data_ptr() for i in (0, 1, 3, 5)]
    tape_address = tape.data_ptr() + _HEADER * tape.element_size()
    _kernel("backward", dtype)(*arguments, tape_address, tape.numel() - _HEADER, arrays)
    _zero_unused(gradients, tensors)
    return gradients


def _zero_unused(gradients: list[Tensor], tensors: Tensors) -> None:
    """Zeroes what the kernels do not reach where there is nothing to integrate."""
    if tensors.t.shape[0] == 1 or tensors.y0.shape[0] == 0:
        for gradient in gradients[1:] if tensors.y0.shape[0] > 0 else gradients:
            gradient.zero_()
    assert len(gradients) == len(differentiable(tensors))
