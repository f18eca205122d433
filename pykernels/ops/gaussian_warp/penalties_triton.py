"""Penalties of motion fields for GPUs, in Triton; README.md has the equations.

A program takes a block of consecutive pixels of one sample, and reads their neighbours past the cache. It writes one
number, and a fixed tree adds the blocks of a sample in float64: no atomics, the same bits every time. The gradient is
gathered: a pixel computes the divergences of its neighbours again.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pykernels.ops.gaussian_warp.penalties_reference import Options

#: Pixels of a program.
BLOCK = 1024
#: Sizes from here on are indexed with 64 bits.
INT32_LIMIT = 2**31


@triton.jit
def pixels_of(program, blocks, size_0, size_1, size_2, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """The sample of a program, how many pixels it has, the program's, which of these exist, and their coordinates."""
    program = program.to(INDEX)
    sample = program // blocks
    pixels = (sample * 0 + size_0) * size_1 * size_2
    pixel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    row = pixel // size_2
    return sample, pixels, pixel, pixel < pixels, row // size_1, row % size_1, pixel % size_2


@triton.jit
def number(high, low, ACC: tl.constexpr):
    """A coefficient, which comes in two numbers of float32."""
    return tl.full((1,), high, ACC) + tl.full((1,), low, ACC)


@triton.jit
def difference(component, pixel, i, size, stride, mask):
    """From pixel i to the next one along an axis; the last one's is that of the one before."""
    low = component + pixel + (tl.minimum(i, size - 2) - i) * stride
    mask = mask & (size > 1)
    return tl.load(low + stride, mask=mask, other=0.0) - tl.load(low, mask=mask, other=0.0)


@triton.jit
def channel_of(axis: tl.constexpr, RANKS: tl.constexpr, XY: tl.constexpr):
    """Of the component along an axis, of three."""
    return 2 - axis if XY else axis - (3 - RANKS)


@triton.jit
def divergence_at(
    flow, pixel, i_0, i_1, i_2, size_0, size_1, size_2, mask, pixels, RANKS: tl.constexpr, XY: tl.constexpr
):
    total = difference(flow + channel_of(2, RANKS, XY) * pixels, pixel, i_2, size_2, 1, mask)
    if RANKS > 1:
        total += difference(flow + channel_of(1, RANKS, XY) * pixels, pixel, i_1, size_1, size_2, mask)
    if RANKS > 2:
        total += difference(flow + channel_of(0, RANKS, XY) * pixels, pixel, i_0, size_0, size_1 * size_2, mask)
    return total


@triton.jit
def flow_penalties_forward(
    flow,  # (B, R, size_0, size_1, size_2)
    sums,  # (B, blocks)
    blocks,
    size_0,
    size_1,
    size_2,
    divergence,
    divergence_low,
    magnitude,
    magnitude_low,
    smoothness,
    smoothness_low,
    RANKS: tl.constexpr,
    XY: tl.constexpr,
    HAS_DIVERGENCE: tl.constexpr,
    HAS_MAGNITUDE: tl.constexpr,
    HAS_SMOOTHNESS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    sample, pixels, pixel, exists, i_0, i_1, i_2 = pixels_of(
        tl.program_id(0), blocks, size_0, size_1, size_2, BLOCK, INDEX
    )
    flow += sample * RANKS * pixels
    total = tl.zeros((BLOCK,), ACC)
    if HAS_DIVERGENCE:
        d = divergence_at(flow, pixel, i_0, i_1, i_2, size_0, size_1, size_2, exists, pixels, RANKS, XY)
        total += number(divergence, divergence_low, ACC) * d * d
    for channel in tl.static_range(RANKS):
        component = flow + channel * pixels
        if HAS_MAGNITUDE:
            w = tl.load(component + pixel, mask=exists, other=0.0)
            total += number(magnitude, magnitude_low, ACC) * w * w
        if HAS_SMOOTHNESS:
            d = difference(component, pixel, i_2, size_2, 1, exists)
            squares = d * d
            if RANKS > 1:
                d = difference(component, pixel, i_1, size_1, size_2, exists)
                squares += d * d
            if RANKS > 2:
                d = difference(component, pixel, i_0, size_0, size_1 * size_2, exists)
                squares += d * d
            total += number(smoothness, smoothness_low, ACC) * squares
    tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit
def second_difference(component, w, pixel, i, size, stride, mask):
    """(D^T D w)(i); the pair of the last two pixels counts twice."""
    before = tl.load(component + pixel - stride, mask=mask & (i > 0), other=0.0)
    after = tl.load(component + pixel + stride, mask=mask & (i < size - 1), other=0.0)
    down = tl.where(i > 0, w - before, 0.0)
    up = tl.where(i < size - 1, w - after, 0.0)
    return tl.where(i == size - 1, 2.0 * down, down) + tl.where(i == size - 2, 2.0 * up, up)


@triton.jit
def transposed_divergence(
    flow,
    here,
    pixel,
    i_0,
    i_1,
    i_2,
    size_0,
    size_1,
    size_2,
    mask,
    pixels,
    AXIS: tl.constexpr,
    RANKS: tl.constexpr,
    XY: tl.constexpr,
):
    """(D^T div)(i) along an axis, where the divergence is ``here``."""
    if AXIS == 0:
        i, size, stride = i_0, size_0, size_1 * size_2
    elif AXIS == 1:
        i, size, stride = i_1, size_1, size_2
    else:
        i, size, stride = i_2, size_2, 1
    before = mask & (i > 0)
    after = mask & (i == size - 2)
    total = tl.where(i < size - 1, -here, tl.where(size > 1, here, 0.0))
    total += divergence_at(
        flow,
        pixel - stride,
        i_0 - (AXIS == 0),
        i_1 - (AXIS == 1),
        i_2 - (AXIS == 2),
        size_0,
        size_1,
        size_2,
        before,
        pixels,
        RANKS,
        XY,
    )
    return total - divergence_at(
        flow,
        pixel + stride,
        i_0 + (AXIS == 0),
        i_1 + (AXIS == 1),
        i_2 + (AXIS == 2),
        size_0,
        size_1,
        size_2,
        after,
        pixels,
        RANKS,
        XY,
    )


@triton.jit
def flow_penalties_backward(
    grads,  # (B,)
    flow,  # (B, R, size_0, size_1, size_2)
    grad_flow,  # as flow
    blocks,
    size_0,
    size_1,
    size_2,
    divergence,
    divergence_low,
    magnitude,
    magnitude_low,
    smoothness,
    smoothness_low,
    RANKS: tl.constexpr,
    XY: tl.constexpr,
    HAS_DIVERGENCE: tl.constexpr,
    HAS_MAGNITUDE: tl.constexpr,
    HAS_SMOOTHNESS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The coefficients hold 2 / pixels."""
    sample, pixels, pixel, exists, i_0, i_1, i_2 = pixels_of(
        tl.program_id(0), blocks, size_0, size_1, size_2, BLOCK, INDEX
    )
    flow += sample * RANKS * pixels
    grad_flow += sample * RANKS * pixels
    scale = tl.load(grads + sample).to(ACC)
    if HAS_DIVERGENCE:
        here = divergence_at(flow, pixel, i_0, i_1, i_2, size_0, size_1, size_2, exists, pixels, RANKS, XY)
    for axis in tl.static_range(3 - RANKS, 3):
        component = channel_of(axis, RANKS, XY) * pixels
        w = tl.load(flow + component + pixel, mask=exists, other=0.0)
        total = tl.zeros((BLOCK,), ACC)
        if HAS_MAGNITUDE:
            total += number(magnitude, magnitude_low, ACC) * w
        if HAS_SMOOTHNESS:
            f = flow + component
            squares = second_difference(f, w, pixel, i_2, size_2, 1, exists)
            if RANKS > 1:
                squares += second_difference(f, w, pixel, i_1, size_1, size_2, exists)
            if RANKS > 2:
                squares += second_difference(f, w, pixel, i_0, size_0, size_1 * size_2, exists)
            total += number(smoothness, smoothness_low, ACC) * squares
        if HAS_DIVERGENCE:
            total += number(divergence, divergence_low, ACC) * transposed_divergence(
                flow, here, pixel, i_0, i_1, i_2, size_0, size_1, size_2, exists, pixels, axis, RANKS, XY
            )
        tl.store(grad_flow + component + pixel, scale * total, mask=exists)


#: Whether Triton interprets the kernels on the CPU: TRITON_INTERPRET=1 when this module was imported.
INTERPRETED = not isinstance(flow_penalties_forward, triton.JITFunction)


def launch(device: torch.device, kernel: Any, programs: int, **arguments: Any) -> None:
    """Run ``programs`` programs of a kernel. Everything on the device goes through here."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**arguments)


def forward(flow: Tensor, options: Options) -> Tensor:
    flow = flow.contiguous()
    blocks = triton.cdiv(flow[0, 0].numel(), BLOCK) if len(flow) else 0
    sums = flow.new_empty((len(flow), blocks))
    if len(flow):
        launch(
            flow.device,
            flow_penalties_forward,
            sums.numel(),
            flow=flow,
            sums=sums,
            **_arguments(flow, options, blocks, 1.0),
        )
    return (sums.sum(1, dtype=torch.float64) / math.prod(flow.shape[2:])).to(flow.dtype)


def backward(grads: Tensor, flow: Tensor, options: Options) -> Tensor:
    grads, flow = grads.contiguous(), flow.contiguous()
    gradient = torch.empty_like(flow)
    if len(flow):
        pixels = math.prod(flow.shape[2:])
        blocks = triton.cdiv(pixels, BLOCK)
        launch(
            flow.device,
            flow_penalties_backward,
            len(flow) * blocks,
            grads=grads,
            flow=flow,
            grad_flow=gradient,
            **_arguments(flow, options, blocks, 2 / pixels),
        )
    return gradient


def _arguments(flow: Tensor, options: Options, blocks: int, scale: float) -> dict[str, Any]:
    size_0, size_1, size_2 = (1, 1, *flow.shape[2:])[-3:]
    numbers = {}
    for name in ("divergence", "magnitude", "smoothness"):
        value = scale * getattr(options, name)
        numbers[name] = float(np.float32(value))
        numbers[f"{name}_low"] = value - numbers[name]
    return {
        "blocks": blocks,
        "size_0": size_0,
        "size_1": size_1,
        "size_2": size_2,
        **numbers,
        "RANKS": flow.dim() - 2,
        "XY": options.xy,
        "HAS_DIVERGENCE": options.divergence != 0,
        "HAS_MAGNITUDE": options.magnitude != 0,
        "HAS_SMOOTHNESS": options.smoothness != 0,
        "BLOCK": BLOCK,
        "ACC": tl.float64 if flow.dtype == torch.float64 else tl.float32,
        "INDEX": tl.int64 if flow.numel() + BLOCK >= INT32_LIMIT else tl.int32,
    }
