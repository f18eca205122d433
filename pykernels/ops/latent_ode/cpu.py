"""Trajectories on the C++ kernels of ``kernels/latent_ode``; the functions that op.py asks of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels import _native
from pykernels.ops._memory import plain
from pykernels.ops.latent_ode.op import empty_gradients
from pykernels.ops.latent_ode.reference import ACTIVATIONS, INPUT_MAPS, Options, Tensors, check_finite, diverged
from pykernels.ops.latent_ode.tableaux import TABLEAUX

_ENERGY = {"none": 0, "plain": 1, "time": 2}


class _Names(NamedTuple):
    """Functions of the compiled module for a dtype."""

    tape: str
    forward: str
    backward: str


_KERNELS = {
    torch.float32: _Names("mlp_odeint_tape_float", "mlp_odeint_forward_float", "mlp_odeint_backward_float"),
    torch.float64: _Names("mlp_odeint_tape_double", "mlp_odeint_forward_double", "mlp_odeint_backward_double"),
}


@cache
def _method(name: str) -> Any:
    assert _native.cpu is not None
    tableau = TABLEAUX[name]
    return _native.cpu.RungeKutta(list(tableau.c), [list(row) for row in tableau.a], list(tableau.b))


def _dense(t: Tensor) -> Tensor:
    return t if t.is_contiguous() and not t.is_neg() else plain(t).contiguous()


def _pointer(t: Tensor | None) -> int:
    """The address of a dense tensor that may be missing or empty: 0 then."""
    return 0 if t is None or t.numel() == 0 else t.data_ptr()


def _arguments(
    tensors: Tensors,
    options: Options,
    threads: int,
    results: Sequence[Tensor | None] = (None, None, None),
    gradients: Sequence[Tensor | None] = (),
) -> tuple[tuple[Any, ...], list[Tensor | None]]:
    """Method, sizes, slope, networks and arrays for the kernels, and the tensors behind them, to be kept alive."""
    tensors = tensors._replace(t=tensors.t.double())
    optional = [None if t is None else _dense(t) for t in (*tensors[:6], *tensors[10:])]
    y0, t, slopes, control, correction_slopes, injected, group, mask = optional
    kept, weights, biases = _layers(tensors.weights, tensors.biases, optional)
    grads = list(map(_pointer, gradients))
    at, n = 6, len(weights)
    networks = [
        (
            _widths(tensors.weights),
            1 if tensors.weights[0].dim() == 2 else tensors.weights[0].shape[0],
            weights,
            biases,
            _pointer(slopes),
            grads[at : at + n],
            grads[at + n : at + 2 * n],
            grads[2] if grads else 0,
        )
    ]
    if group is not None:
        kept, weights, biases = _layers(tensors.correction_weights, tensors.correction_biases, kept)
        at, n = at + 2 * n, len(weights)
        networks.append(
            (
                _widths(tensors.correction_weights),
                tensors.correction_weights[0].shape[0],
                weights,
                biases,
                _pointer(correction_slopes),
                grads[at : at + n],
                grads[at + n :],
                grads[4] if grads else 0,
            )
        )
    batch, dim = tensors.y0.shape
    sizes = (
        batch,
        dim,
        0 if control is None else control.shape[2],
        tensors.t.shape[0],
        options.substeps,
        ACTIVATIONS[options.activation],
        options.time_input,
        INPUT_MAPS[options.input_map],
        _ENERGY[options.energy],
        options.validate,
        options.max_memory,
        threads,
    )
    arrays = tuple(map(_pointer, (y0, t, control, mask, injected, group, *results)))
    return (_method(options.method), sizes, options.slope, networks, arrays), kept


def _layers(
    weights: list[Tensor], biases: list[Tensor], kept: list[Tensor | None]
) -> tuple[list[Tensor | None], list[int], list[int]]:
    """``kept`` with the dense tensors, and their addresses."""
    dense_weights, dense_biases = list(map(_dense, weights)), list(map(_dense, biases))
    addresses = [w.data_ptr() for w in dense_weights], [b.data_ptr() for b in dense_biases]
    return [*kept, *dense_weights, *dense_biases], *addresses


def _widths(weights: list[Tensor]) -> list[int]:
    return [weights[0].shape[-1], *[w.shape[-2] for w in weights]]


def forward(
    tensors: Tensors, options: Options, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
    """See op.py."""
    assert _native.cpu is not None
    y0, times = tensors.y0, tensors.t.shape[0]
    batch, dim = y0.shape
    states = y0.new_empty((times, batch, dim))
    norms = y0.new_empty((times - 1, batch)) if options.norms else None
    energy = y0.new_empty((times - 1, batch)) if options.energy != "none" else None
    arguments, _kept = _arguments(tensors, options, torch.get_num_threads(), (states, norms, energy))
    kernels = _KERNELS[y0.dtype]
    tape, tape_address = [], 0
    if save:
        memory = y0.new_empty(getattr(_native.cpu, kernels.tape)(*arguments))
        tape, tape_address = [memory], memory.data_ptr()
    step, sample = getattr(_native.cpu, kernels.forward)(*arguments, tape_address)
    if step >= 0:
        interval, part = divmod(step, options.substeps)
        where = f"after sub-step {part + 1} of {options.substeps} of the interval from t[{interval}]"
        raise FloatingPointError(diverged(where, sample))
    if times == 1 and options.validate:  # the kernels look at what they computed
        check_finite(states)
    return states, norms, energy, tape


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
) -> list[Tensor | None]:
    """See op.py."""
    assert _native.cpu is not None
    (tape,) = saved
    if tape.dtype != states.dtype or not tape.is_contiguous():
        raise ValueError("saved must be what the forward on the CPU returned")
    grads = [None if g is None else _dense(g) for g in (grad_states, grad_norms, grad_energy)]
    gradients = empty_gradients(tensors, needed)
    y0, grad_t, _, control, _, injected = gradients[:6]
    t = None if grad_t is None else torch.zeros_like(grad_t, dtype=torch.float64)
    if injected is not None:
        injected.zero_()  # only those that were injected have a gradient
    if states.shape[0] == 1 or states.shape[1] == 0:  # nothing is integrated
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    arguments, _kept = _arguments(tensors, options, 1, gradients=gradients)  # as many threads as the tape says
    _native_backward = getattr(_native.cpu, _KERNELS[states.dtype].backward)
    addresses = list(map(_pointer, (*grads, y0, t, control, injected)))
    _native_backward(*arguments, tape.data_ptr(), tape.numel(), addresses)
    if grad_t is not None and t is not None:
        grad_t.copy_(t)
    return gradients
