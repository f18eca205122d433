"""Gaussian warping for GPUs, in Triton; README.md has the equations.

A program computes the pixels of one block, for all channels. Axes are called z, y and x, the last one x. Per pixel and
axis it finds a window (:func:`window_of`), and from that the weights of CHUNK taps at a time (:func:`taps_of`), which
lie in registers while the taps of a patch are added up:

            x taps        Narrow windows are one patch, whose weights are made before the loop over channels. Others are
          +--+--+--+      gone through patch by patch, up to the widest window of the block, and their weights are made
    y     |  |  |  |      again for every patch and channel: 2 CHUNK of them for CHUNK^2 taps. Windows of three axes are
    taps  +--+--+--+      a stack of patches.
          |  |  |  |
          +--+--+--+

The image's gradient is a scattered sum in whatever order, and yet deterministic: contributions are added as integers,
for which order does not matter. They are scaled by a power of two, such that no sum can overflow if all output pixels
fall onto one: with L = log2(pixels) a contribution is cut off at 2^(L - 61) of the largest one of its channel. That is
finer than float32 for any image; in float64 a second integer holds the rest. Sorting the pixels by where they read, and
adding in order, would need several passes over all of them for the sort alone, and windows that reach over tiles. What
is not finite is added as floating numbers: such a sum is NaN or infinite in any order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pykernels.ops._triton_math import error_functions
from pykernels.ops.gaussian_warp.op import empty_frames, empty_gradients
from pykernels.ops.gaussian_warp.reference import FARTHEST, Options, Tensors, mass_beyond, most_radius
from pykernels.ops.gaussian_warp.window import largest_variances, radius

#: Pixels of a program.
BLOCK = 128
#: Windows of at most this many taps per axis are narrow: their weights are kept in registers. Patches of wider ones are
#: at most as wide, and VARYING_CHUNK taps where widths vary.
NARROW, VARYING_CHUNK = 6, 5
#: Offsets and sizes from here on are computed with 64 bits.
INT32_LIMIT = 2**29
#: Arguments whose values no kernel is compiled anew for.
UNSPECIALIZED = (
    "value",
    "scale_x",
    "scale_y",
    "scale_z",
    "first",
    "last",
    "most",
    "limit_count",
    "search_steps",
    "log_pixels",
    "second_bits",
    "blocks",
    "channels",
)
FARTHEST_PIXEL = tl.constexpr(FARTHEST)
#: Patches of at most this many taps are unrolled.
UNROLLED = tl.constexpr(9)
ACCUMULATOR = {torch.float64: tl.float64, torch.float32: tl.float32}


@triton.jit
def number(bits, ACC: tl.constexpr):
    """The float64 that has these bits: an argument that is a float would be passed as a float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def displacement(flow, channel, pixels, n, exists, scale, ACC: tl.constexpr):
    return -number(scale, ACC) * tl.load(flow + channel * pixels + n, mask=exists, other=0.0)


@triton.jit
def variance_of(variance, value, n, exists, SHARED: tl.constexpr, ACC: tl.constexpr):
    if variance is None:
        v = number(value, ACC)
    elif SHARED:
        v = tl.load(variance)
    else:
        v = tl.load(variance + n, mask=exists, other=0.0)
    return tl.where(exists, v, 0.0)


@triton.jit
def nearest_offset(rest):
    """Of the pixel nearest to a centre: an even window's second may be."""
    return tl.where(rest >= 0.5, 1, 0)


@triton.jit
def radius_of(v, limits, limit_count, search_steps, INDEX: tl.constexpr):
    """The radius 1 + (how many limits v exceeds), 0 for variance 0."""
    low = (v * 0.0).to(INDEX)
    high = low + limit_count
    for _ in range(search_steps):
        middle = (low + high) // 2
        open = low < high
        beyond = open & (v > tl.load(limits + middle, mask=open, other=0.0))
        low = tl.where(beyond, middle + 1, low)
        high = tl.where(beyond, high, tl.where(open, middle, high))
    return tl.where(v > 0, 1 + low, 0)


@triton.jit
def edge_of(z):
    """What the mass between two edges of cells is made of."""
    erf, erfc, power = error_functions(tl.abs(z))
    return z, erf, erfc, power


@triton.jit
def mass(low, high):
    """``(erf(high) - erf(low)) / 2``, without cancellation in the tails."""
    tail = tl.where(
        (tl.abs(low[0]) < 0.5) | (tl.abs(high[0]) < 0.5), tl.abs(high[1] - low[1]), tl.abs(low[2] - high[2])
    )
    return 0.5 * tl.where((low[0] > 0) == (high[0] > 0), tail, high[1] + low[1])


@triton.jit
def mass_by_position(low, high, s):
    """The derivative of the mass by the position of the centre."""
    return (low[3] - high[3]) * (s * 0.5641895835477563)


@triton.jit
def mass_by_variance(low, high, v):
    return (low[0] * low[3] - high[0] * high[3]) * 0.28209479177387814 / v


@triton.jit
def weight_of(offset, rest, nearest, gauss, FORM: tl.constexpr, NORMALIZE: tl.constexpr):
    """The weight of a tap, for the forms that are not integrals, and its derivatives.

    They are by the position of the centre and by the variance. Where weights will be divided by their sum the nearest
    tap has weight 1, so that small variances do not underflow, and derivatives are of weight / weight of the nearest.
    """
    v, s, _ = gauss
    d = offset - rest
    if FORM == "linear":
        return 1.0 + (1 - 2 * offset) * d, (2 * offset - 1) + d * 0.0, d * 0.0
    elif NORMALIZE == "none":
        w = tl.exp(-(d * d) / (2.0 * v)) * s * 0.5641895835477563
        return w, w * d / v, tl.where(w > 0, w * (d * d / v - 1.0) / (2.0 * v), 0.0)
    else:
        exponent = tl.minimum((nearest - d) * (nearest + d) / (2.0 * v), 0.0)
        w = tl.exp(exponent)
        return w, w * ((d - nearest) / v), tl.where(w > 0, -w * (exponent / v), 0.0)


@triton.jit
def window_of(
    displacement,
    position,
    size,
    stride,
    valid,
    low,
    high,
    gauss,
    first,
    last,
    FORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PADDING: tl.constexpr,
    ODD: tl.constexpr,
    INDEX: tl.constexpr,
):
    """A pixel's window on one axis, whose taps have offsets low to high.

    The pixel at offset 0, how far beyond it the centre is, the offsets whose taps are read and those whose weights
    count, the distance of the nearest of these, one over the sum of weights, the derivatives of the sum, and the axis'
    size and stride.
    """
    v, s, positive = gauss
    d = tl.where(valid, displacement, 0.0)
    d = tl.minimum(tl.maximum(d, -FARTHEST_PIXEL), FARTHEST_PIXEL)
    # The whole pixels of a displacement and the rest are told apart before the position is added, which is larger.
    half = 0.5 if ODD else 0.0
    if d.dtype == tl.float32:  # from 2^22 on the sum would lose the half
        half = tl.where(tl.abs(d) < 4194304.0, half, 0.0)
    whole = tl.floor(d + half)
    rest = d - whole
    pixel = position.to(INDEX) + whole.to(INDEX)
    inside_low = tl.maximum(low, -pixel)
    inside_high = tl.minimum(high, size - 1 - pixel)
    read_low, read_high = low, high
    if PADDING == "zeros":
        read_low, read_high = inside_low, inside_high
    if NORMALIZE == "inside":
        low, high = inside_low, inside_high
    nearest = tl.minimum(tl.maximum(0, low), high).to(rest.dtype) - rest
    other = tl.minimum(tl.maximum(1, low), high).to(rest.dtype) - rest
    nearest = tl.where(tl.abs(other) < tl.abs(nearest), other, nearest)

    inverse = 1.0 + 0.0 * rest
    by_position = 0.0 * rest
    by_variance = 0.0 * rest
    if NORMALIZE != "none":
        if FORM == "integrated":  # the mass of the cells is that of the interval which they fill
            some = low <= high
            start = edge_of((low.to(rest.dtype) - 0.5 - rest) * s)
            end = edge_of((high.to(rest.dtype) + 0.5 - rest) * s)
            total = tl.where(some, mass(start, end), 0.0)
            by_position = tl.where(some, mass_by_position(start, end, s), 0.0)
            by_variance = tl.where(some, mass_by_variance(start, end, v), 0.0)
        else:
            total = 0.0 * rest
            for offset in range(first, last + 1):
                w, p, q = weight_of(offset, rest, nearest, gauss, FORM, NORMALIZE)
                counted = (offset >= low) & (offset <= high)
                total += tl.where(counted, w, 0.0)
                by_position += tl.where(counted, p, 0.0)
                by_variance += tl.where(counted, q, 0.0)
        at = nearest_offset(rest)
        total = tl.where(positive, total, tl.where((low <= at) & (high >= at), 1.0, 0.0))
        inverse = 1.0 / tl.where(total > 0, total, 1.0)
    return pixel, rest, read_low, read_high, low, high, nearest, inverse, by_position, by_variance, size, stride


@triton.jit
def index_of(pixel, size, PADDING: tl.constexpr):
    """The pixel inside the image that stands for each."""
    if PADDING == "periodic":
        pixel = pixel % size
        return tl.where(pixel < 0, pixel + size, pixel)
    elif PADDING == "reflection":
        pixel = pixel % (2 * size)
        pixel = tl.where(pixel < 0, pixel + 2 * size, pixel)
        return tl.where(pixel < size, pixel, 2 * size - 1 - pixel)
    else:
        return tl.minimum(tl.maximum(pixel, 0), size - 1)


@triton.jit
def tap_of(
    window,
    offset,
    gauss,
    FORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PADDING: tl.constexpr,
    FLOW: tl.constexpr,
    VARIANCE: tl.constexpr,
):
    """Of one tap: weight, derivatives by the position of the centre and by the variance, place, or -1 if not read."""
    start, end = (0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)
    if FORM == "integrated":
        start = edge_of((offset - 0.5 - window[1]) * gauss[1])
        end = edge_of((offset + 0.5 - window[1]) * gauss[1])
    return tap_between(window, offset, start, end, gauss, FORM, NORMALIZE, PADDING, FLOW, VARIANCE)


@triton.jit
def tap_between(
    window,
    offset,
    start,
    end,
    gauss,
    FORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PADDING: tl.constexpr,
    FLOW: tl.constexpr,
    VARIANCE: tl.constexpr,
):
    """:func:`tap_of` from the edges of its cell, for the form that is an integral."""
    pixel, rest, read_low, read_high, low, high, nearest, inverse, by_position, by_variance, size, stride = window
    v, s, positive = gauss
    p, q = 0.0 * rest, 0.0 * rest
    if FORM == "integrated":
        w = mass(start, end)
        if FLOW:
            p = mass_by_position(start, end, s)
        if VARIANCE:
            q = mass_by_variance(start, end, v)
    else:
        w, p, q = weight_of(offset, rest, nearest, gauss, FORM, NORMALIZE)
    if FORM != "linear":
        counted = (offset >= low) & (offset <= high)
        # At variance 0 every form is the nearest pixel.
        w = tl.where(counted, tl.where(positive, w, tl.where(offset == nearest_offset(rest), 1.0, 0.0)), 0.0) * inverse
        p = tl.where(counted & positive, (p - w * by_position) * inverse, 0.0)
        q = tl.where(counted & positive, (q - w * by_variance) * inverse, 0.0)
    read = (offset >= read_low) & (offset <= read_high)
    place = tl.where(read, index_of(pixel + offset, size, PADDING) * stride, -1)
    return w, p, q, place


@triton.jit
def taps_of(
    window,
    first,
    gauss,
    FORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PADDING: tl.constexpr,
    FLOW: tl.constexpr,
    VARIANCE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """:func:`tap_of` for the offsets from ``first`` on: a tuple of weights, tuples of the derivatives and of places."""
    rest = window[1]
    s = gauss[1]
    start = (rest, rest, rest, rest)
    end = start
    if FORM == "integrated":
        start = edge_of((first - 0.5 - rest) * s)
    for i in tl.static_range(CHUNK):
        if FORM == "integrated":
            end = edge_of((first + (i + 0.5) - rest) * s)
        w, p, q, place = tap_between(window, first + i, start, end, gauss, FORM, NORMALIZE, PADDING, FLOW, VARIANCE)
        if i == 0:
            weights, positions, variances, places = (w,), (p,), (q,), (place,)
        else:
            weights, positions = weights + (w,), positions + (p,)  # type: ignore[assignment]  # noqa: RUF005
            variances, places = variances + (q,), places + (place,)  # type: ignore[assignment]  # noqa: RUF005
        start = end
    return weights, positions, variances, places


@triton.jit
def row_sums(
    plane,
    target,
    place,
    factor,
    infinite,
    xs,
    X: tl.constexpr,
    FLOW: tl.constexpr,
    VARIANCE: tl.constexpr,
    IMAGE: tl.constexpr,
):
    """Sums of the image over a row of taps: with their weights, and with the two derivatives.

    ``place`` is that of the row, or -1. ``plane`` is None if no sums are asked for. With IMAGE, ``factor`` times the
    weights goes to the image's gradient, and ``infinite`` times the weights as floating numbers.
    """
    total = 0.0 * factor
    by_position = total
    by_variance = total
    for i in tl.static_range(X):
        w = xs[0][i]
        read = (place | xs[3][i]) >= 0
        at = place + xs[3][i]
        if plane is not None:
            pixel = tl.load(plane + at, mask=read, other=0.0)
            total += w * pixel
            if FLOW:
                by_position += xs[1][i] * pixel
            if VARIANCE:
                by_variance += xs[2][i] * pixel
        if IMAGE:
            sums, second, poison, second_scale = target
            part = factor * w
            whole = part.to(tl.int64)
            tl.atomic_add(sums + at, whole, mask=read, sem="relaxed")
            if second is not None:
                rest = ((part - whole.to(part.dtype)) * second_scale).to(tl.int64)
                tl.atomic_add(second + at, rest, mask=read, sem="relaxed")
            tl.atomic_add(poison + at, infinite * w, mask=read & (infinite != 0), sem="relaxed")
    return total, by_position, by_variance


@triton.jit
def pick(values, j, N: tl.constexpr):
    """values[j] for a j that the compiler does not know."""
    found = values[0]
    for i in tl.static_range(1, N):
        found = tl.where(j == i, values[i], found)
    return found


@triton.jit
def patch_sums(
    plane,
    target,
    above,
    factor,
    infinite,
    ys,
    xs,
    rows,
    Y: tl.constexpr,
    X: tl.constexpr,
    FLOW: tl.constexpr,
    VARIANCE: tl.constexpr,
    IMAGE: tl.constexpr,
):
    """Sums of the image over the first rows of a patch: with its weights, their derivatives on y and x, by variance.

    ``above`` is the place of the patch's plane, or -1. Small patches are unrolled, so that all of their loads are on
    the way together; it would take too many registers for others.
    """
    total = 0.0 * factor
    by_y = total
    by_x = total
    by_variance = total
    if Y * X <= UNROLLED:
        for j in tl.static_range(Y):
            w = ys[0][j]
            place = tl.where((above | ys[3][j]) >= 0, above + ys[3][j], -1)
            found = row_sums(plane, target, place, factor * w, infinite * w, xs, X, FLOW, VARIANCE, IMAGE)
            total += w * found[0]
            by_y += ys[1][j] * found[0]
            by_x += w * found[1]
            by_variance += ys[2][j] * found[0] + w * found[2]
    else:
        for j in range(rows):
            w = pick(ys[0], j, Y)
            below = pick(ys[3], j, Y)
            place = tl.where((above | below) >= 0, above + below, -1)
            found = row_sums(plane, target, place, factor * w, infinite * w, xs, X, FLOW, VARIANCE, IMAGE)
            total += w * found[0]
            if FLOW:
                by_y += pick(ys[1], j, Y) * found[0]
                by_x += w * found[1]
            if VARIANCE:
                by_variance += pick(ys[2], j, Y) * found[0] + w * found[2]
    return total, by_y, by_x, by_variance


@triton.jit
def plane_sums(
    plane,
    target,
    above,
    factor,
    infinite,
    window_y,
    window_x,
    ys,
    xs,
    first,
    last,
    gauss,
    RANKS: tl.constexpr,
    FORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PADDING: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_PATCH: tl.constexpr,
    FLOW: tl.constexpr,
    VARIANCE: tl.constexpr,
    IMAGE: tl.constexpr,
):
    """:func:`patch_sums` over the patches of a plane; ``xs`` and ``ys`` are the taps if there is one patch."""
    ROWS: tl.constexpr = CHUNK if RANKS > 1 else 1
    if ONE_PATCH:
        rows = last - first + 1
        total, by_y, by_x, by_variance = patch_sums(
            plane, target, above, factor, infinite, ys, xs, rows, ROWS, CHUNK, FLOW, VARIANCE, IMAGE
        )
    else:
        total = 0.0 * factor
        by_y = total
        by_x = total
        by_variance = total
        for left in range(first, last + 1, CHUNK):
            own_xs = taps_of(window_x, left, gauss, FORM, NORMALIZE, PADDING, FLOW, VARIANCE, CHUNK)
            if RANKS == 1:
                found = patch_sums(
                    plane, target, above, factor, infinite, ys, own_xs, 1, 1, CHUNK, FLOW, VARIANCE, IMAGE
                )
                total += found[0]
                by_x += found[2]
                by_variance += found[3]
            else:
                for top in range(first, last + 1, CHUNK):
                    own_ys = taps_of(window_y, top, gauss, FORM, NORMALIZE, PADDING, FLOW, VARIANCE, CHUNK)
                    rows = tl.minimum(last + 1 - top, CHUNK)
                    found = patch_sums(
                        plane,
                        target,
                        above,
                        factor,
                        infinite,
                        own_ys,
                        own_xs,
                        rows,
                        CHUNK,
                        CHUNK,
                        FLOW,
                        VARIANCE,
                        IMAGE,
                    )
                    total += found[0]
                    by_y += found[1]
                    by_x += found[2]
                    by_variance += found[3]
    return total, by_y, by_x, by_variance


@triton.jit
def pixels_of(
    flow,
    variance,
    limits,
    n,
    exists,
    pixels,
    value,
    scale_x,
    scale_y,
    scale_z,
    first,
    last,
    most,
    limit_count,
    search_steps,
    RANKS: tl.constexpr,
    XY: tl.constexpr,
    SHARED: tl.constexpr,
    ONE_PATCH: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """What is valid of the pixels n; displacements; the Gaussian; the offsets of windows, and those of the widest."""
    dx = displacement(flow, 0 if XY else RANKS - 1, pixels, n, exists, scale_x, ACC)
    dy = dx
    dz = dx
    if RANKS > 1:
        dy = displacement(flow, 1 if XY else RANKS - 2, pixels, n, exists, scale_y, ACC)
    if RANKS > 2:
        dz = displacement(flow, 2 if XY else 0, pixels, n, exists, scale_z, ACC)
    v = variance_of(variance, value, n, exists, SHARED, ACC)
    valid = exists & (dx == dx) & (dy == dy) & (dz == dz) & (v >= 0)  # neither NaN nor negative
    # Below, the inverse square of a variance would overflow; the result is the nearest pixel long before.
    negligible = 1.0842021724855044e-19 if v.dtype == tl.float32 else 1.4916681462400413e-154
    positive = valid & (v > negligible)
    v = tl.where(positive, v, 1.0)
    gauss = (v, 1.0 / tl.sqrt(2.0 * v), positive)
    high = n * 0 + last
    low = n * 0 + first
    if limits is not None:
        high = tl.minimum(radius_of(tl.where(positive, v, 0.0), limits, limit_count, search_steps, INDEX), most)
        low = -high
        if not ONE_PATCH:
            last = tl.max(high, axis=0)
            first = -last
    # Pixels that are not valid have no window.
    return valid, dx, dy, dz, gauss, tl.where(valid, low, 1), tl.where(valid, high, 0), first, last


@triton.jit
def no_taps(window):
    """What :func:`taps_of` would return for an axis of one pixel."""
    zero = 0.0 * window[1]
    return (1.0 + zero,), (zero,), (zero,), (window[0] * 0,)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gaussian_warp_forward(
    image,  # (B, C, *S) with strides of batch and channels
    flow,  # (B, R, *S) with a stride of the batch, as the next
    variance,  # (B, *S) or, if SHARED, (B,), or None
    limits,  # (limit_count,), the largest variance for each radius, or None if all windows are equally wide
    frames,  # (B, C, *S) with a stride of the batch
    image_stride_b,
    image_stride_c,
    flow_stride_b,
    variance_stride_b,
    frames_stride_b,
    channels,
    width,
    height,
    pixels,
    blocks,
    value,
    scale_x,
    scale_y,
    scale_z,
    first,
    last,
    most,
    limit_count,
    search_steps,
    RANKS: tl.constexpr,
    FORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PADDING: tl.constexpr,
    XY: tl.constexpr,
    SHARED: tl.constexpr,
    ODD: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    program = tl.program_id(0).to(INDEX)
    b = program // blocks
    n = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    exists = n < pixels
    flow += b * flow_stride_b
    if variance is not None:
        variance += b * variance_stride_b
    valid, dx, dy, dz, gauss, low, high, first, last = pixels_of(
        flow,
        variance,
        limits,
        n,
        exists,
        pixels,
        value,
        scale_x,
        scale_y,
        scale_z,
        first,
        last,
        most,
        limit_count,
        search_steps,
        RANKS,
        XY,
        SHARED,
        ONE_PATCH,
        ACC,
        INDEX,
    )
    x, y, z = n % width, n // width % height, n // (width * height)
    depth = pixels // (width * height)
    window_x = window_of(dx, x, width, 1, valid, low, high, gauss, first, last, FORM, NORMALIZE, PADDING, ODD, INDEX)
    window_y = window_x
    window_z = window_x
    xs = no_taps(window_x)
    ys = xs
    if RANKS > 1:
        window_y = window_of(
            dy, y, height, width, valid, low, high, gauss, first, last, FORM, NORMALIZE, PADDING, ODD, INDEX
        )
    if RANKS > 2:
        window_z = window_of(
            dz, z, depth, width * height, valid, low, high, gauss, first, last, FORM, NORMALIZE, PADDING, ODD, INDEX
        )
    if ONE_PATCH:
        xs = taps_of(window_x, first, gauss, FORM, NORMALIZE, PADDING, False, False, CHUNK)
        if RANKS > 1:
            ys = taps_of(window_y, first, gauss, FORM, NORMALIZE, PADDING, False, False, CHUNK)
    nothing = 0.0 * window_x[1]
    for c in range(channels):
        plane = image + b * image_stride_b + c * image_stride_c
        if RANKS > 2:
            result = nothing
            for offset in range(first, last + 1):
                w, _, _, above = tap_of(window_z, offset, gauss, FORM, NORMALIZE, PADDING, False, False)
                sums = plane_sums(
                    plane,
                    None,
                    above,
                    nothing,
                    nothing,
                    window_y,
                    window_x,
                    ys,
                    xs,
                    first,
                    last,
                    gauss,
                    RANKS,
                    FORM,
                    NORMALIZE,
                    PADDING,
                    CHUNK,
                    ONE_PATCH,
                    False,
                    False,
                    False,
                )
                result += w * sums[0]
        else:
            sums = plane_sums(
                plane,
                None,
                n * 0,
                nothing,
                nothing,
                window_y,
                window_x,
                ys,
                xs,
                first,
                last,
                gauss,
                RANKS,
                FORM,
                NORMALIZE,
                PADDING,
                CHUNK,
                ONE_PATCH,
                False,
                False,
                False,
            )
            result = sums[0]
        tl.store(frames + b * frames_stride_b + c * pixels + n, tl.where(valid, result, float("nan")), mask=exists)


@triton.jit
def exponent_of(x):
    """The exponent e of a positive number, x < 2^(e + 1); that of the smallest normal number if x is less."""
    if x.dtype == tl.float64:
        return ((x.to(tl.int64, bitcast=True) >> 52) & 2047).to(tl.int32) - 1023
    else:
        return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def power_of_two(e, ACC: tl.constexpr):
    """2^e for the exponents of normal numbers."""
    if ACC == tl.float64:  # noqa: SIM300
        return ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def shifted(x, e, ACC: tl.constexpr):
    """x 2^e, in two steps, since 2^e may be beyond the range of numbers where the result is not."""
    half = e >> 1
    return x * power_of_two(half, ACC) * power_of_two(e - half, ACC)


@triton.jit
def shift_of(largest, log_pixels):
    """The exponent of the integers' scale: 2^log_pixels contributions of at most ``largest`` stay below 2^62."""
    return 61 - log_pixels - exponent_of(largest)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gaussian_warp_largest(
    grads,
    flow,
    variance,
    limits,
    largest,  # (B, C, blocks)
    grads_stride_b,
    grads_stride_c,
    flow_stride_b,
    variance_stride_b,
    channels,
    width,
    height,
    pixels,
    blocks,
    value,
    scale_x,
    scale_y,
    scale_z,
    first,
    last,
    most,
    limit_count,
    search_steps,
    RANKS: tl.constexpr,
    FORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PADDING: tl.constexpr,
    XY: tl.constexpr,
    SHARED: tl.constexpr,
    ODD: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Of every block: the most that a pixel gives to the gradient of the image, to all of its taps together."""
    program = tl.program_id(0).to(INDEX)
    b = program // blocks
    n = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    exists = n < pixels
    flow += b * flow_stride_b
    if variance is not None:
        variance += b * variance_stride_b
    valid, _, _, _, gauss, _, _, first, last = pixels_of(
        flow,
        variance,
        limits,
        n,
        exists,
        pixels,
        value,
        scale_x,
        scale_y,
        scale_z,
        first,
        last,
        most,
        limit_count,
        search_steps,
        RANKS,
        XY,
        SHARED,
        ONE_PATCH,
        ACC,
        INDEX,
    )
    bound = tl.where(valid, 1.0, 0.0).to(ACC)
    for _ in tl.static_range(RANKS):
        if FORM == "density" and NORMALIZE == "none":  # a sum of densities is at most the integral and the highest
            bound *= 1.0 + 0.5641895835477563 * gauss[1]
        elif FORM == "linear":
            bound *= tl.maximum(1, (last - first) * (last - first) * (last - first)).to(ACC)
        else:
            bound *= 1.0 + 1e-6  # what rounding may add
    for c in range(channels):
        g = tl.load(grads + b * grads_stride_b + c * grads_stride_c + n, mask=exists, other=0.0)
        size = tl.where(tl.abs(g) < float("inf"), tl.abs(g) * bound, 0.0)
        tl.store(largest + (b * channels + c) * blocks + program % blocks, tl.max(size, axis=0))


@triton.jit
def store_by_flow(grad_flow, channel, pixels, n, exists, moves, displacement, by_position, scale, ACC: tl.constexpr):
    """Displacements that were cut off pass no gradient on."""
    moves &= tl.abs(displacement) <= FARTHEST_PIXEL
    tl.store(grad_flow + channel * pixels + n, tl.where(moves, -number(scale, ACC) * by_position, 0.0), mask=exists)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gaussian_warp_backward(
    grads,  # (B, C, *S) with strides of batch and channels
    image,
    flow,
    variance,
    limits,
    largest,  # (B, C)
    sums,  # (B, C, *S), integers
    second,  # (B, C, *S), integers, or None in float32
    poison,  # (B, C, *S), floating numbers
    grad_flow,  # (B, R, *S) with a stride of the batch, or None
    grad_variance,  # (B, *S) or, if SHARED, (B, blocks), or None
    grads_stride_b,
    grads_stride_c,
    image_stride_b,
    image_stride_c,
    flow_stride_b,
    variance_stride_b,
    grad_flow_stride_b,
    grad_variance_stride_b,
    log_pixels,
    second_bits,
    channels,
    width,
    height,
    pixels,
    blocks,
    value,
    scale_x,
    scale_y,
    scale_z,
    first,
    last,
    most,
    limit_count,
    search_steps,
    RANKS: tl.constexpr,
    FORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PADDING: tl.constexpr,
    XY: tl.constexpr,
    SHARED: tl.constexpr,
    ODD: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    IMAGE: tl.constexpr,
    FLOW: tl.constexpr,
    VARIANCE: tl.constexpr,
    ADD: tl.constexpr,
):
    """With ADD the gradient of the variance is added to what is there."""
    program = tl.program_id(0).to(INDEX)
    b = program // blocks
    n = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    exists = n < pixels
    flow += b * flow_stride_b
    if variance is not None:
        variance += b * variance_stride_b
    valid, dx, dy, dz, gauss, low, high, first, last = pixels_of(
        flow,
        variance,
        limits,
        n,
        exists,
        pixels,
        value,
        scale_x,
        scale_y,
        scale_z,
        first,
        last,
        most,
        limit_count,
        search_steps,
        RANKS,
        XY,
        SHARED,
        ONE_PATCH,
        ACC,
        INDEX,
    )
    x, y, z = n % width, n // width % height, n // (width * height)
    depth = pixels // (width * height)
    window_x = window_of(dx, x, width, 1, valid, low, high, gauss, first, last, FORM, NORMALIZE, PADDING, ODD, INDEX)
    window_y = window_x
    window_z = window_x
    xs = no_taps(window_x)
    ys = xs
    if RANKS > 1:
        window_y = window_of(
            dy, y, height, width, valid, low, high, gauss, first, last, FORM, NORMALIZE, PADDING, ODD, INDEX
        )
    if RANKS > 2:
        window_z = window_of(
            dz, z, depth, width * height, valid, low, high, gauss, first, last, FORM, NORMALIZE, PADDING, ODD, INDEX
        )
    if ONE_PATCH:
        xs = taps_of(window_x, first, gauss, FORM, NORMALIZE, PADDING, FLOW, VARIANCE, CHUNK)
        if RANKS > 1:
            ys = taps_of(window_y, first, gauss, FORM, NORMALIZE, PADDING, FLOW, VARIANCE, CHUNK)
    nothing = 0.0 * window_x[1]
    by_x = nothing
    by_y = nothing
    by_z = nothing
    by_variance = nothing
    for c in range(channels):
        plane = None
        if FLOW or VARIANCE:
            plane = image + b * image_stride_b + c * image_stride_c
        g = tl.load(grads + b * grads_stride_b + c * grads_stride_c + n, mask=valid, other=0.0)
        factor = nothing
        infinite = nothing
        target = None
        if IMAGE:
            at = (b * channels + c) * pixels
            finite = tl.abs(g) < float("inf")
            factor = shifted(tl.where(finite, g, 0.0), shift_of(tl.load(largest + b * channels + c), log_pixels), ACC)
            infinite = tl.where(finite, 0.0, g)
            if second is None:
                target = (sums + at, None, poison + at, 1.0)
            else:
                target = (sums + at, second + at, poison + at, power_of_two(second_bits, ACC))
        if RANKS > 2:
            for offset in range(first, last + 1):
                w, p, q, above = tap_of(window_z, offset, gauss, FORM, NORMALIZE, PADDING, FLOW, VARIANCE)
                found = plane_sums(
                    plane,
                    target,
                    above,
                    factor * w,
                    infinite * w,
                    window_y,
                    window_x,
                    ys,
                    xs,
                    first,
                    last,
                    gauss,
                    RANKS,
                    FORM,
                    NORMALIZE,
                    PADDING,
                    CHUNK,
                    ONE_PATCH,
                    FLOW,
                    VARIANCE,
                    IMAGE,
                )
                if FLOW:
                    by_z += g * p * found[0]
                    by_y += g * w * found[1]
                    by_x += g * w * found[2]
                if VARIANCE:
                    by_variance += g * (q * found[0] + w * found[3])
        else:
            found = plane_sums(
                plane,
                target,
                n * 0,
                factor,
                infinite,
                window_y,
                window_x,
                ys,
                xs,
                first,
                last,
                gauss,
                RANKS,
                FORM,
                NORMALIZE,
                PADDING,
                CHUNK,
                ONE_PATCH,
                FLOW,
                VARIANCE,
                IMAGE,
            )
            if FLOW:
                by_y += g * found[1]
                by_x += g * found[2]
            if VARIANCE:
                by_variance += g * found[3]
    positive = gauss[2]
    if FLOW:
        moves = valid if FORM == "linear" else positive  # the nearest pixel alone has no derivative
        grad_flow += b * grad_flow_stride_b
        store_by_flow(grad_flow, 0 if XY else RANKS - 1, pixels, n, exists, moves, dx, by_x, scale_x, ACC)
        if RANKS > 1:
            store_by_flow(grad_flow, 1 if XY else RANKS - 2, pixels, n, exists, moves, dy, by_y, scale_y, ACC)
        if RANKS > 2:
            store_by_flow(grad_flow, 2 if XY else 0, pixels, n, exists, moves, dz, by_z, scale_z, ACC)
    if VARIANCE:
        at = grad_variance + b * grad_variance_stride_b
        by_variance = tl.where(positive, by_variance, 0.0)
        if SHARED:
            at += program % blocks
            total = tl.sum(by_variance, axis=0)
            tl.store(at, total + tl.load(at) if ADD else total)
        else:
            if ADD:
                by_variance += tl.load(at + n, mask=exists, other=0.0)
            tl.store(at + n, by_variance, mask=exists)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gaussian_warp_finish(
    sums,
    second,
    poison,
    largest,
    grads,  # (B, C, *S) with strides of batch and channels, to be added, or None
    gradient,  # (B, C, *S)
    grads_stride_b,
    grads_stride_c,
    log_pixels,
    second_bits,
    channels,
    pixels,
    blocks,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The gradient of the image from the integers, plus that which the image has as an earlier frame."""
    program = tl.program_id(0).to(INDEX)
    plane = program // blocks
    n = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    exists = n < pixels
    at = plane * pixels + n
    found = tl.load(sums + at, mask=exists, other=0).to(tl.float64)
    if second is not None:
        rest = tl.load(second + at, mask=exists, other=0).to(tl.float64)
        found += rest * power_of_two(-second_bits, tl.float64)
    result = shifted(found, -shift_of(tl.load(largest + plane), log_pixels), tl.float64).to(ACC)
    result += tl.load(poison + at, mask=exists, other=0.0)
    if grads is not None:
        b, c = plane // channels, plane % channels
        result += tl.load(grads + b * grads_stride_b + c * grads_stride_c + n, mask=exists, other=0.0)
    tl.store(gradient + at, result, mask=exists)


#: Whether Triton interprets the kernels on the CPU: TRITON_INTERPRET=1 when this module was imported.
INTERPRETED = not isinstance(gaussian_warp_forward, triton.JITFunction)


def launch(device: torch.device, kernel: Any, programs: int, **arguments: Any) -> None:
    """Run ``programs`` programs of a kernel. Everything on the device goes through here."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**arguments)


def bits(value: float) -> int:
    """Of a float64."""
    found: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return found


@lru_cache(maxsize=64)
def limits_on(device: torch.device, dtype: torch.dtype, mass: float, most: int) -> Tensor:
    """The largest variance for every radius but the last; kept, so that captured graphs copy nothing to the device."""
    return torch.tensor(largest_variances(mass, most)[:-1], dtype=torch.float64).to(device, dtype)


def dense(t: Tensor, ranks: int) -> Tensor:
    """With the last ``ranks`` dimensions contiguous."""
    t = t.resolve_neg()
    expected = 1
    for n, stride in zip(reversed(t.shape[-ranks:]), reversed(t.stride()[-ranks:]), strict=True):
        if n > 1 and stride != expected:
            return t.contiguous()
        expected *= n
    return t


class Problem:
    """What the kernels are told about one call."""

    def __init__(self, tensors: Tensors, options: Options) -> None:
        image, flow, variance = tensors
        self.tensors, self.options = tensors, options
        self.device, self.dtype = image.device, image.dtype
        self.batch, self.channels, *self.sizes = image.shape
        self.steps, self.ranks = flow.shape[1:3]
        self.pixels = math.prod(self.sizes)
        self.blocks = int(triton.cdiv(self.pixels, BLOCK))
        self.image = dense(image, self.ranks)
        self.flow = dense(flow, self.ranks + 1)
        self.shared = variance is not None and math.prod(variance.shape[3:]) == 1
        self.variance = None if variance is None else dense(variance, self.ranks)
        most = most_radius(options)
        mass = mass_beyond(options, self.ranks)
        varying = variance is not None and options.support == 0 and most > 1
        self.limits = limits_on(self.device, self.dtype, mass, most) if varying else None
        if options.support > 0:
            taps = options.support
        else:
            taps = 2 * (most if variance is not None else radius(options.value, mass, most)) + 1
        self.log_pixels = (self.pixels - 1).bit_length()
        # Below 2^62 even if all taps of all pixels fall onto one.
        self.second_bits = max(0, 62 - self.log_pixels - self.ranks * (taps - 1).bit_length())
        # All taps of other paddings are inside.
        normalize = "none" if options.form == "linear" else options.normalize
        if normalize == "inside" and options.padding_mode != "zeros":
            normalize = "window"
        one_patch = taps <= NARROW
        even_chunk = int(triton.cdiv(taps, triton.cdiv(taps, NARROW)))
        limit_count = 0 if self.limits is None else len(self.limits)
        self.choices = {
            "limits": self.limits,
            "width": self.sizes[-1],
            "height": self.sizes[-2] if self.ranks > 1 else 1,
            "pixels": self.pixels,
            "blocks": self.blocks,
            "channels": self.channels,
            "value": bits(options.value),
            "first": -((taps - 1) // 2),
            "last": taps // 2,
            "most": most,
            "limit_count": limit_count,
            "search_steps": limit_count.bit_length(),
            "RANKS": self.ranks,
            "FORM": options.form,
            "NORMALIZE": normalize,
            "PADDING": options.padding_mode,
            "XY": options.xy,
            "SHARED": self.shared,
            "ODD": taps % 2 == 1,
            "CHUNK": VARYING_CHUNK if self.limits is not None and not one_patch else even_chunk,
            "ONE_PATCH": one_patch,
            "BLOCK": BLOCK,
            "ACC": ACCUMULATOR[self.dtype],
        }
        for name, scale in zip("xyz", (*reversed(options.scale), 1.0, 1.0), strict=False):
            self.choices[f"scale_{name}"] = bits(scale)

    def at(self, step: int) -> dict[str, Any]:
        """The flow and the variance of a step."""
        of_variance, stride = None, 0
        if self.variance is not None:
            of_variance = self.variance[:, step if self.variance.shape[1] > 1 else 0]
            stride = of_variance.stride(0) if of_variance.shape[0] > 1 else 0
        flow = self.flow[:, step]
        return {
            "flow": flow,
            "flow_stride_b": flow.stride(0),
            "variance": of_variance,
            "variance_stride_b": stride,
            **self.choices,
        }

    def index(self, *tensors: Tensor | None) -> tl.dtype:
        """The type that holds every offset into the tensors, and any position plus a displacement."""
        largest = max(
            sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True))
            for t in (self.image, self.flow, self.variance, *tensors)
            if t is not None
        )
        return tl.int32 if largest < INT32_LIMIT else tl.int64


def planes(name: str, t: Tensor) -> dict[str, Any]:
    """A tensor (B, C, *S) and its strides."""
    return {name: t, f"{name}_stride_b": t.stride(0), f"{name}_stride_c": t.stride(1)}


def forward(tensors: Tensors, options: Options) -> Tensor:
    """The images (B, T, C, *S) after each warp; see ``op.py``."""
    frames = empty_frames(tensors)
    if frames.numel() == 0:
        return frames
    p = Problem(tensors, options)
    index = p.index(frames)
    for step in range(p.steps):
        launch(
            p.device,
            gaussian_warp_forward,
            p.batch * p.blocks,
            **planes("image", p.image if step == 0 else frames[:, step - 1]),
            frames=frames[:, step],
            frames_stride_b=frames.stride(0),
            **p.at(step),
            INDEX=index,
        )
    return frames


def backward(
    grads: Tensor, frames: Tensor | None, tensors: Tensors, options: Options, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of image, flow and variance; see ``op.py``."""
    gradients = empty_gradients(tensors, needed)
    if grads.numel() == 0:
        return [None if g is None else g.zero_() for g in gradients]
    p = Problem(tensors, options)
    of_image, of_flow, of_variance = gradients
    grads = dense(grads, p.ranks)
    frames = None if frames is None else dense(frames, p.ranks)
    variances = None
    if of_variance is not None:
        # For every sample, and pixel or block; steps that share a variance are added up here, the others at the end.
        variances = grads.new_empty((of_variance.shape[1], p.batch, p.blocks if p.shared else p.pixels))
    sums = None
    if of_image is not None or p.steps > 1:
        sums = Sums(p)
    index = p.index(grads, frames, of_flow, variances, None if sums is None else sums.integers)
    upstream = grads[:, -1]
    for step in reversed(range(p.steps)):
        to_image = sums if step > 0 or of_image is not None else None
        at = p.at(step)
        of_step = None if variances is None else variances[step if len(variances) > 1 else 0]
        largest = None if to_image is None else to_image.start(upstream, at, index)
        launch(
            p.device,
            gaussian_warp_backward,
            p.batch * p.blocks,
            **planes("grads", upstream),
            **planes("image", p.image if frames is None or step == 0 else frames[:, step - 1]),
            **at,
            largest=largest,
            sums=None if to_image is None else to_image.integers[0],
            second=to_image.integers[1] if to_image is not None and to_image.words == 2 else None,
            poison=None if to_image is None else to_image.poison,
            grad_flow=None if of_flow is None else of_flow[:, step],
            grad_flow_stride_b=0 if of_flow is None else of_flow.stride(0),
            grad_variance=of_step,
            grad_variance_stride_b=0 if of_step is None else of_step.stride(0),
            log_pixels=p.log_pixels,
            second_bits=p.second_bits,
            IMAGE=to_image is not None,
            FLOW=of_flow is not None,
            VARIANCE=of_variance is not None,
            ADD=of_variance is not None and of_variance.shape[1] == 1 and step < p.steps - 1,
            INDEX=index,
        )
        if to_image is not None and largest is not None:
            before = grads[:, step - 1] if step > 0 else None
            upstream = to_image.finish(largest, before, of_image if step == 0 else None, index)
    if of_variance is not None and variances is not None:
        found = variances.sum(2, keepdim=True) if p.shared else variances
        if of_variance.shape[0] == 1:
            found = found.sum(1, keepdim=True)
        of_variance.copy_(found.transpose(0, 1).reshape(of_variance.shape))
    return gradients


class Sums:
    """The image's gradient in the making."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.words = 2 if p.dtype == torch.float64 else 1
        self.integers = torch.empty((self.words, *p.image.shape), dtype=torch.int64, device=p.device)
        self.poison = torch.empty_like(p.image, memory_format=torch.contiguous_format)

    def start(self, upstream: Tensor, at: dict[str, Any], index: tl.dtype) -> Tensor:
        """Empty sums; the largest contribution to each plane."""
        p = self.p
        self.integers.zero_()
        self.poison.zero_()
        largest = self.poison.new_empty((p.batch, p.channels, p.blocks))
        launch(
            p.device,
            gaussian_warp_largest,
            p.batch * p.blocks,
            **planes("grads", upstream),
            **at,
            largest=largest,
            INDEX=index,
        )
        return largest.amax(2)

    def finish(self, largest: Tensor, grads: Tensor | None, gradient: Tensor | None, index: tl.dtype) -> Tensor:
        """The gradient, and ``grads`` added to it."""
        p = self.p
        if gradient is None:
            gradient = torch.empty_like(self.poison)
        launch(
            p.device,
            gaussian_warp_finish,
            p.batch * p.channels * p.blocks,
            sums=self.integers[0],
            second=self.integers[1] if self.words == 2 else None,
            poison=self.poison,
            largest=largest,
            grads=grads,
            gradient=gradient,
            grads_stride_b=0 if grads is None else grads.stride(0),
            grads_stride_c=0 if grads is None else grads.stride(1),
            log_pixels=p.log_pixels,
            second_bits=p.second_bits,
            channels=p.channels,
            pixels=p.pixels,
            blocks=p.blocks,
            BLOCK=BLOCK,
            ACC=ACCUMULATOR[p.dtype],
            INDEX=index,
        )
        return gradient
