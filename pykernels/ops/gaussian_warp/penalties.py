"""The public penalties of a motion field: arguments, choice of backend, derivatives."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from pykernels import _native, _triton
from pykernels.backends import YES, Answer, Check, Implementation, Operator, register, select
from pykernels.ops._check import compare
from pykernels.ops.gaussian_warp import penalties_op
from pykernels.ops.gaussian_warp import penalties_reference as reference
from pykernels.ops.gaussian_warp.penalties_reference import Options

_INDEXING = ("xy", "ij")
_REDUCTIONS = ("mean", "none")


def flow_penalties(
    flow: Tensor,
    *,
    divergence: float = 0.0,
    magnitude: float = 0.0,
    smoothness: float = 0.0,
    reduction: str = "mean",
    indexing: str = "xy",
    backend: str | None = None,
) -> Tensor:
    """Regularisers of a motion field, in one pass over it.

    ``mean over pixels of (divergence (div w)^2 + magnitude |w|^2 + smoothness |grad w|^2)``, where ``|grad w|^2`` is
    the sum of the squared differences of all components along all axes. A difference is that from a pixel to the next
    one; at the last pixel of an axis it is the one from the pixel before, and along an axis of one pixel it is zero:
    motions that are linear in space have their exact divergence at every pixel.

    Differences are per pixel and in the units of the flow. The published coefficients (smoothness 0.4, divergence 1,
    magnitude -0.003, whose sign pushes the motion up) are for flows normalized to [-1, 1] across the image with
    ``align_corners=True``, where one pixel is 2 / (S - 1), and for a magnitude that is a mean over both components as
    well, half of this one. For flows in pixels on S x S images multiply them by ``(2 / (S - 1))**2``, and the
    magnitude's by 1/2 too: for S = 64 they are 4.0e-4, 1.0e-3 and -1.5e-6.

    Args:
        flow: (B, R, *S) with R = len(S) of one to three axes, of a floating dtype; for several steps at once pass
            ``flows.flatten(0, 1)``.
        divergence, magnitude, smoothness: coefficients, numbers of either sign. What has the coefficient 0 is left out.
        reduction: ``"mean"`` over the batch, or ``"none"``: the penalty of each sample.
        indexing: whether channel 0 of the flow is along the last axis (``"xy"``) or along the first (``"ij"``), as in
            :func:`pykernels.gaussian_warp`.
        backend: a name in :data:`pykernels.backends.BACKENDS`, or None to choose automatically.

    Returns:
        A tensor (), or (B,) with ``reduction="none"``, of the flow's dtype, but float32 at least. NaN of a flow with
        NaN, and the mean over an empty batch.

    Derivatives of any order; forward mode and ``torch.func`` transforms run the reference. Deterministic, whatever the
    number of threads.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if an argument has the wrong shape or value.
        RuntimeError: if the backend asked for by name cannot run the call.

    The terms are those of de Bezenac, Pajot and Gallinari, "Deep learning for physical processes: incorporating prior
    scientific knowledge" (2018), with the divergence that its equation has: its program differences both components
    along one axis.
    """
    if not isinstance(flow, Tensor):
        raise TypeError(f"flow must be a tensor, got {type(flow).__name__}")
    if not flow.dtype.is_floating_point:
        raise TypeError(f"flow must have a floating dtype, got {flow.dtype}")
    if not 3 <= flow.dim() <= 5 or flow.shape[1] != flow.dim() - 2 or 0 in flow.shape[2:]:
        raise ValueError(
            "flow must have shape (B, R, *S), a displacement in each of its R = 1, 2 or 3 spatial axes of at least one "
            f"pixel, got {tuple(flow.shape)}"
        )
    coefficients: dict[str, object] = {"divergence": divergence, "magnitude": magnitude, "smoothness": smoothness}
    for name, coefficient in coefficients.items():
        if isinstance(coefficient, Tensor):
            raise TypeError(f"{name} must be a number, got a tensor; multiply the penalty of {name}=1.0 by it")
        if isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(coefficient).__name__}")
        if not -math.inf < coefficient < math.inf:
            raise ValueError(f"{name} must be finite, got {coefficient}")
    for name, value, known in (("reduction", reduction, _REDUCTIONS), ("indexing", indexing, _INDEXING)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    options = Options(float(divergence), float(magnitude), float(smoothness), indexing == "xy")
    dtype = torch.promote_types(flow.dtype, torch.float32)
    flow = flow if flow.dtype == dtype else flow.to(dtype)
    penalties: Tensor = select(_OPERATOR, backend, flow, options).run(flow, options)
    return penalties if reduction == "none" else penalties.mean()


def _run_cpu(flow: Tensor, options: Options) -> Tensor:
    return penalties_op.run(flow, options, "cpu")


def _run_triton(flow: Tensor, options: Options) -> Tensor:
    return penalties_op.run(flow, options, "triton")


def _cpu_can_run(flow: Tensor, options: Options) -> Answer:
    if _native.cpu_error is not None:
        return Answer(False, _native.cpu_error)
    if flow.device.type != "cpu":
        return Answer(False, f"the flow is on {flow.device}, not on the CPU")
    return YES


def _triton_can_run(flow: Tensor, options: Options) -> Answer:
    return _triton.can_run(flow)


def _check(backend: str) -> Check:
    flow = torch.randn((2, 2, 11, 13), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(backend: str, flow: Tensor) -> Tensor:
        return flow_penalties(flow, divergence=1.0, magnitude=-0.3, smoothness=0.4, reduction="none", backend=backend)

    return compare(partial(run, "reference"), partial(run, backend), (flow,), backend)


_OPERATOR = register(
    Operator(
        name="flow_penalties",
        implementations={
            "cpu": Implementation(_run_cpu, _cpu_can_run, _native.available),
            "triton": Implementation(_run_triton, _triton_can_run, _triton.available),
            "reference": Implementation(reference.penalties, lambda *args: YES, lambda: YES),
        },
        check=_check,
        path="one pass",
        cost=penalties_op.cost,
    )
)
