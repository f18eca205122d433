"""Kernels of infinitely wide networks for GPUs, in Triton; ``reference.py`` has the equations.

One kernel makes unit vectors and *row parameters* of the points, in float64, once. The others compute tiles of pairs:

                 columns: points y                 half angles   from inner products of unit vectors, ``tl.dot`` over d;
               +-----+-----+-----+                               from differences in few dimensions, and for those of a
        rows:  |     | tile|     |   of each tile                tile's pairs that are nearly equal or opposite
      points x +-----+-----+-----+                 layers        elementwise, in registers

The Gram matrix is written once; of a symmetric one the tiles of the lower triangle are computed, and written twice.
Products with a matrix and the witness go along a row of tiles and keep its sums: no tile is ever written. The witness
goes back through the layers of a tile by hand, from what it knew before each of them. With few rows of tiles, each is
split among several programs, whose sums are added at the end, in order: the same bits every time.

Row parameters lie column by column, (B, R, N): first those that pairs need (:class:`BranchLayout` says which), then,
for the witness, derivatives with respect to the logarithm of the point's variance, log q_0.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pykernels.ops._triton_math import arc_of, asin, excess_of, expm1_of_negative
from pykernels.ops.ntk_gram import activations, reference
from pykernels.ops.ntk_gram.activations import Branch, Options
from pykernels.ops.ntk_gram.op import gram_shape, witness_shapes
from pykernels.ops.ntk_gram.reference import Problem

#: Vectors of at most this many numbers are subtracted from each other without a look at their inner products.
FEW = 8
#: Programs that are enough for a GPU: rows of tiles are split to reach them.
ENOUGH_PROGRAMS = 512
#: Columns of a matrix that one program multiplies with, and components of the gradient that it computes.
MOST_COLUMNS, MOST_COMPONENTS = 64, 256
#: Offsets and sizes from here on are computed with 64 bits.
INT32_LIMIT = 2**30
ACCUMULATOR = {torch.float64: tl.float64, torch.float32: tl.float32}
#: Arguments whose values no kernel is compiled anew for.
UNSPECIALIZED = ("n", "m", "d", "tiles", "blocks", "splits", "columns", "factors", "parts")

NEAR = tl.constexpr(reference.NEAR)
LEAST_VARIANCE = tl.constexpr(reference.LEAST_VARIANCE)
IDENTITY = tl.constexpr(activations.IDENTITY)
LEAKY_RELU = tl.constexpr(activations.LEAKY_RELU)
ERF = tl.constexpr(activations.ERF)
GELU = tl.constexpr(activations.GELU)
SIN = tl.constexpr(activations.SIN)
RBF = tl.constexpr(activations.RBF)
PI = tl.constexpr(3.141592653589793)


class BranchLayout(NamedTuple):
    """A branch as the kernels are compiled for it.

    ``shape`` is the part of the identity in a piecewise linear function, cos(2 phase) of a sine.

    ``column`` is its first one, c. Then come, q being the variance before it and n its norm without amplitude, of erf
    (r, h, n) with r^2 = z / (1 + z) and h = 1 / (2 + 2z), z = 2 b^2 q; of gelu (q, n); of sin (g, n) with
    g^2 = b^2 q / 2; of rbf g with g^2 = gamma q. ``derivative`` is the column of dc / d log q_0; then comes, unless c
    is all, d log n / d log q. ``parameter`` is its first one among those of :func:`reference.primary`.
    """

    code: int
    shape: float
    column: int
    derivative: int
    parameter: int


class LayerLayout(NamedTuple):
    """``s`` is its column, ``derivative`` of d log q / d log q_0 before the layer and of ds / d log q_0 behind that."""

    stable: bool
    branches: tuple[BranchLayout, ...]
    s: int
    derivative: int
    parameter: int


class Run(NamedTuple):
    """Layers of the same kind, one after the other, whose columns lie ``stride`` apart."""

    layer: LayerLayout
    times: int
    stride: int


class Layout(NamedTuple):
    """``columns`` end with the scale; ``all`` of them with d log scale / d log q_0 and scale / sqrt(q_0)."""

    layers: tuple[LayerLayout, ...]
    runs: tuple[Run, ...]
    columns: int
    all: int


_WIDTH = {activations.ERF: 4, activations.GELU: 3, activations.SIN: 3, activations.RBF: 2}


@lru_cache(maxsize=256)
def _described(layers: tuple[tuple[Branch, ...], ...]) -> Layout:
    columns = sum(_WIDTH.get(branch.code, 1) for layer in layers for branch in layer) + len(layers) + 1
    found: list[LayerLayout] = []
    runs: list[Run] = []
    column, derivative, parameter = 0, columns, 0
    for i, layer in enumerate(layers):
        stable = reference.keeps_small_angles(layers, i) and any(
            b.code in (activations.ERF, activations.GELU, activations.SIN) for b in layer
        )
        of_layer, derivative = derivative, derivative + 2
        branches = []
        for branch in layer:
            slope = branch.constants[1]
            shape = branch.constants[2] if branch.code == activations.SIN else 2 * slope / (1 + slope * slope)
            code = activations.LEAKY_RELU if branch.code == activations.RELU else branch.code
            shape = shape if code in (activations.LEAKY_RELU, activations.SIN) else 0.0
            branches.append(BranchLayout(code, shape, column, derivative, parameter))
            column += _WIDTH.get(branch.code, 1)
            derivative += 1 if branch.homogeneous else 2
            parameter += 1 if branch.homogeneous else 2
        found.append(LayerLayout(stable, tuple(branches), column, of_layer, parameter))
        column, parameter = column + 1, parameter + 1
        if i > 0 and layers[i - 1] == layer and found[i - 1].stable == stable:
            runs[-1] = Run(runs[-1].layer, runs[-1].times + 1, column - found[i - 1].s - 1)
        else:
            runs.append(Run(found[i], 1, 0))
    return Layout(tuple(found), tuple(runs), columns, derivative + 2)


def described(options: Options) -> Layout:
    return _described(tuple(tuple(layer) for layer in options.layers()))


@triton.jit
def gelu_kernels(q, r, c, apart):
    """Of z Phi(z), K and its derivatives by c, by c twice, by q, and by q and c; ``apart`` is q r - c^2."""
    qq, rr = 1.0 + q, 1.0 + r
    rest = 1.0 + q + r + apart
    j = 0.15915494309189535 / tl.sqrt(rest)
    inverse = 1.0 / tl.sqrt(qq * rr)
    i = 0.25 + asin(c * inverse, rest * inverse * inverse) * 0.15915494309189535
    sizes = apart + c * c / qq + c * c / rr
    p = 1.0 / qq + 1.0 / rr + 1.0 / rest
    ratio = rr / rest
    by_c = i + j * c * p
    by_c_twice = j * (1.0 + p + c * c / rest * (p + 2.0 / rest))
    by_q = j * (r - c * c / (qq * qq) - c * c / (2.0 * qq) - 0.5 * ratio * sizes)
    by_q_and_c = -j * c * (0.5 / qq + 0.5 * ratio * p + 1.0 / (qq * qq) + ratio / rest)
    return c * i + j * sizes, by_c, by_c_twice, by_q, by_q_and_c


@triton.jit
def size_of(q, CODE: tl.constexpr, CONSTANTS: tl.constexpr):
    """sqrt(E[phi(z)^2]), z ~ N(0, q), without the amplitude, d log of it / d log q, and what pairs know q by."""
    if CODE <= LEAKY_RELU:
        norm = tl.sqrt(q) * ((1.0 + CONSTANTS[1] * CONSTANTS[1]) * 0.5) ** 0.5
        return norm, 0.5 + 0.0 * q, q, q
    elif CODE == RBF:
        return 1.0 + 0.0 * q, 0.0 * q, tl.sqrt(CONSTANTS[1] * q), q
    else:
        if CODE == ERF:
            z = 2.0 * CONSTANTS[1] * CONSTANTS[1] * q
            rest = 1.0 / (1.0 + z)
            inside = z * rest
            square = asin(inside, rest * (1.0 + inside)) * (2.0 / PI)
            change = inside * tl.sqrt(rest / (1.0 + inside)) * (2.0 / PI)
            first, second = tl.sqrt(inside), 0.5 * rest
        elif CODE == SIN:
            z = 2.0 * CONSTANTS[1] * CONSTANTS[1] * q
            square = (1.0 - CONSTANTS[2]) * 0.5 - CONSTANTS[2] * 0.5 * expm1_of_negative(-z)
            change = CONSTANTS[2] * 0.5 * z * tl.exp(-z)
            first, second = tl.sqrt(0.25 * z), q
        else:
            square, by_c, _, by_q, _ = gelu_kernels(q, q, q, 0.0 * q)
            change = q * (by_c + 2.0 * by_q)
            first, second = q, q
        least = square < LEAST_VARIANCE
        square = tl.where(least, LEAST_VARIANCE, square)
        return tl.sqrt(square), tl.where(least, 0.0, change / (2.0 * square)), first, second


@triton.jit
def augmented(points, weight_std, bias_std, at, stride_d, d, first, BLOCK_D: tl.constexpr):
    """Components from ``first`` on of (w_0 x / sqrt(d), b_0), and zeros behind: (rows, BLOCK_D) in float64."""
    k = first + tl.arange(0, BLOCK_D)[None, :]
    x = tl.load(points + at + k * stride_d, mask=(k < d) & (at >= 0), other=0.0).to(tl.float64)
    size = tl.where(d > 0, d, 1).to(tl.float64)
    x = x * (tl.load(weight_std) / tl.sqrt(size))
    return tl.where(k == d, tl.maximum(tl.abs(tl.load(bias_std)), LEAST_VARIANCE**0.5), x)


@triton.jit
def rounded(x, TO: tl.constexpr, ACC: tl.constexpr):
    """To the nearest number with the bits that ``TO`` keeps, ties to even."""
    x = x.to(ACC)
    if TO > 0:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + (1 << (TO - 1)) - 1 + ((bits >> TO) & 1)) >> TO << TO
        x = bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def store_branch(
    target,
    n,
    exists,
    q,
    weight,
    change,
    next_change,
    BRANCH: tl.constexpr,
    CONSTANTS: tl.constexpr,
    DERIVATIVES: tl.constexpr,
    ACC: tl.constexpr,
):
    """The columns of a branch; ``weight`` is that of a layer whose outputs have the variance 1."""
    CODE: tl.constexpr = BRANCH[0]
    norm, log_change, first, second = size_of(q, CODE, CONSTANTS)
    c = weight * norm * tl.abs(CONSTANTS[0] + 0.0 * q)
    target += BRANCH[2] * n
    tl.store(target, c.to(ACC), mask=exists)
    if CODE > LEAKY_RELU:
        tl.store(target + n, first.to(ACC), mask=exists)
        if CODE == ERF:
            tl.store(target + 2 * n, second.to(ACC), mask=exists)
            tl.store(target + 3 * n, norm.to(ACC), mask=exists)
        elif CODE != RBF:
            tl.store(target + 2 * n, norm.to(ACC), mask=exists)
    if DERIVATIVES:
        target += (BRANCH[3] - BRANCH[2]) * n
        tl.store(target, (c * (log_change * change - 0.5 * next_change)).to(ACC), mask=exists)
        if CODE > LEAKY_RELU:
            tl.store(target + n, log_change.to(ACC), mask=exists)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def ntk_gram_rows(
    points,  # (B, N, d) of any strides
    weight_std,  # (L + 1,)
    bias_std,  # (L + 1,)
    unit,  # (B, N, KP)
    rows,  # (B, R, N)
    stride_b,
    stride_n,
    stride_d,
    n,
    d,
    blocks,
    LAYERS: tl.constexpr,
    CONSTANTS: tl.constexpr,  # of each branch of each layer
    OFFSETS: tl.constexpr,  # of each layer
    SCALE: tl.constexpr,
    ALL: tl.constexpr,
    DERIVATIVES: tl.constexpr,
    ROUND: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Unit vectors of the points, and their row parameters."""
    program = tl.program_id(0).to(INDEX)
    b = program // blocks
    i = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = i < n
    at = (b * stride_b + tl.where(exists, i, 0) * stride_n)[:, None]

    largest = tl.zeros((BLOCK_N,), tl.float64)
    for first in range(0, KP, BLOCK_D):
        a = augmented(points, weight_std, bias_std, at, stride_d, d, first, BLOCK_D)
        largest = tl.maximum(largest, tl.max(tl.abs(a), 1))
    largest = tl.minimum(largest, 1e150)  # against overflow
    total = tl.zeros((BLOCK_N,), tl.float64)
    for first in range(0, KP, BLOCK_D):
        a = augmented(points, weight_std, bias_std, at, stride_d, d, first, BLOCK_D) / largest[:, None]
        total += tl.sum(a * a, 1)
    q = total * largest * largest
    length = tl.sqrt(q)
    for first in range(0, KP, BLOCK_D):
        a = augmented(points, weight_std, bias_std, at, stride_d, d, first, BLOCK_D) / length[:, None]
        k = first + tl.arange(0, BLOCK_D)[None, :]
        place = unit + (b * n + i[:, None]) * KP + k
        tl.store(place, rounded(a, ROUND, ACC), mask=exists[:, None] & (k < KP))

    target = rows + b * ALL * n + i
    change = 1.0 + 0.0 * q  # d log q / d log q_0
    for layer in tl.static_range(len(LAYERS)):
        weight = tl.load(weight_std + 1 + layer)
        bias = tl.load(bias_std + 1 + layer)
        following = bias * bias + weight * weight * OFFSETS[layer] + 0.0 * q
        next_change = 0.0 * q
        for j in tl.static_range(len(LAYERS[layer][1])):
            norm, log_change, _, _ = size_of(q, LAYERS[layer][1][j][0], CONSTANTS[layer][j])
            part = weight * norm * CONSTANTS[layer][j][0]
            following += part * part
            next_change += part * part * 2.0 * log_change
        floored = following < LEAST_VARIANCE
        following = tl.where(floored, LEAST_VARIANCE, following)
        next_change = tl.where(floored, 0.0, change * next_change / following)
        root = tl.sqrt(following)
        for j in tl.static_range(len(LAYERS[layer][1])):
            store_branch(
                target,
                n,
                exists,
                q,
                weight / root,
                change,
                next_change,
                LAYERS[layer][1][j],
                CONSTANTS[layer][j],
                DERIVATIVES,
                ACC,
            )
        s = tl.sqrt(bias * bias + weight * weight * OFFSETS[layer]) / root
        tl.store(target + LAYERS[layer][2] * n, s.to(ACC), mask=exists)
        if DERIVATIVES:
            tl.store(target + LAYERS[layer][3] * n, change.to(ACC), mask=exists)
            tl.store(target + (LAYERS[layer][3] + 1) * n, (-0.5 * s * next_change).to(ACC), mask=exists)
        q = following
        change = next_change
    tl.store(target + SCALE * n, tl.sqrt(q).to(ACC), mask=exists)
    if DERIVATIVES:
        tl.store(target + (ALL - 2) * n, (0.5 * change).to(ACC), mask=exists)
        tl.store(target + (ALL - 1) * n, (tl.sqrt(q) / length).to(ACC), mask=exists)


@triton.jit
def parameter(side, COLUMN: tl.constexpr):
    """Of the points of a side of the tile: where their first ones are, and how far apart columns lie."""
    return tl.load(side[0] + COLUMN * side[1])


@triton.jit
def sides_of(rows_x, rows_y, i, j, n, m, ALL_X: tl.constexpr, ALL_Y: tl.constexpr, b):
    return (rows_x + b * ALL_X * n + i[:, None], n), (rows_y + b * ALL_Y * m + j[None, :], m)


@triton.jit
def half_angles(
    ux,
    uy,
    i,
    j,
    d,
    K_FEW: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """e and f of the tile of points i and j: sin^2 and cos^2 of half of the angle."""
    BLOCK_N: tl.constexpr = i.shape[0]
    BLOCK_M: tl.constexpr = j.shape[0]
    if K_FEW > 0:
        e = tl.zeros((BLOCK_N, BLOCK_M), ACC)
        f = tl.zeros((BLOCK_N, BLOCK_M), ACC)
        for k in tl.static_range(K_FEW):
            x = tl.load(ux + i * KP + k).to(ACC)[:, None]
            y = tl.load(uy + j * KP + k).to(ACC)[None, :]
            e += (x - y) * (x - y)
            f += (x + y) * (x + y)
        e, f = 0.25 * e, 0.25 * f
        return tl.where(e <= f, e, 1.0 - f), tl.where(e <= f, 1.0 - e, f)
    else:
        k = tl.arange(0, BLOCK_D)
        cosine = tl.zeros((BLOCK_N, BLOCK_M), ACC)
        for first in range(0, KP, BLOCK_D):
            x = tl.load(ux + i[:, None] * KP + first + k[None, :]).to(OPERAND)
            y = tl.load(uy + j[None, :] * KP + first + k[:, None]).to(OPERAND)
            cosine = tl.dot(x, y, cosine, input_precision=PRECISION, out_dtype=ACC)
        e = 0.5 - 0.5 * cosine
        f = 1.0 - e
        if tl.min(tl.minimum(e, f)) < NEAR:
            sign = tl.where(e <= f, 1.0, -1.0).to(ACC)
            total = tl.zeros((BLOCK_N, BLOCK_M), ACC)
            for component in range(d + 1):
                x = tl.load(ux + i * KP + component).to(ACC)[:, None]
                y = tl.load(uy + j * KP + component).to(ACC)[None, :]
                total += (x - sign * y) * (x - sign * y)
            total = 0.25 * total
            e, f = (
                tl.where(e < NEAR, total, tl.where(f < NEAR, 1.0 - total, e)),
                tl.where(f < NEAR, total, tl.where(e < NEAR, 1.0 - total, f)),
            )
        return e, f


@triton.jit
def are_apart(h):
    """Closer than the rounding of unit vectors is coincident, where the infinite derivative is taken for 0."""
    return h > (1e-30 if h.dtype == tl.float64 else 1e-14)


@triton.jit
def piecewise_linear(e, f, PART: tl.constexpr):
    """max(z, 0) + slope min(z, 0), a mixture of the identity and of relu: e_phi and d_phi.

    For relu e_phi = e - (sin theta - theta cos theta) / (2 pi); at pi - theta it differs by (e - f) / 2.
    """
    small = e <= f
    h = tl.where(small, e, f)
    root = tl.sqrt(tl.where(are_apart(h), h, 0.0))
    relu = h - root * h * excess_of(h) * (1.0 / PI)
    turn = root * arc_of(h) * (2.0 / PI)  # theta / pi
    e_phi = tl.where(small, PART * h, (1.0 + PART) * 0.5 - h) + (1.0 - PART) * relu
    return e_phi, PART + (1.0 - PART) * tl.where(small, 1.0 - turn, turn)


@triton.jit
def from_distance(distance, kernel, nx, ny):
    """e_phi from E[(phi(f(x)) - phi(f(y)))^2] where that is small, else from E[phi(f(x)) phi(f(y))]."""
    norms = nx * ny
    return tl.where(distance < norms, (distance - (nx - ny) * (nx - ny)) / (4.0 * norms), 0.5 - kernel / (2.0 * norms))


@triton.jit
def angle_between(difference, h, own):
    """The difference of two angles, h and own being sin^2 of their halves and ``difference`` that of these."""
    scale = tl.sqrt(h * (1.0 - own)) + tl.sqrt(own * (1.0 - h))
    x = difference / tl.where(scale < 1e-30, 1e-30, scale)
    x = tl.where(x > 1.0, 1.0, tl.where(x < -1.0, -1.0, x))
    return 2.0 * asin(x, (1.0 - x) * (1.0 + x))


@triton.jit
def erf_pair(e, f, x, y, COLUMN: tl.constexpr, STABLE: tl.constexpr):
    """K = 2/pi asin(X), X = r_x r_y cos(theta): an angle once more, that of vectors with a part 1."""
    rx, ry = parameter(x, COLUMN + 1), parameter(y, COLUMN + 1)
    hx, hy = parameter(x, COLUMN + 2), parameter(y, COLUMN + 2)
    nx, ny = parameter(x, COLUMN + 3), parameter(y, COLUMN + 3)
    lengths = rx * ry
    complement = 2.0 * (hx + hy - 2.0 * hx * hy) + 4.0 * lengths * lengths * e * f  # 1 - X^2
    d_phi = lengths * (2.0 / PI) / (tl.sqrt(complement) * nx * ny)
    kernel = asin(lengths * (f - e), complement) * (2.0 / PI)
    if STABLE:
        # The angles pi/2 - asin(X) of the pair and of each with itself, as differences.
        apart = (rx - ry) * (rx - ry) * 0.25 + lengths * e
        h = (hx + hy) * 0.5 + apart
        distance = angle_between((hy - hx) * 0.5 + apart, h, hx) + angle_between((hx - hy) * 0.5 + apart, h, hy)
        return from_distance(distance * (2.0 / PI), kernel, nx, ny), d_phi
    else:
        return 0.5 - kernel / (2.0 * nx * ny), d_phi


@triton.jit
def sin_pair(e, f, x, y, COLUMN: tl.constexpr, EVEN: tl.constexpr):
    """K = (U - EVEN V) / 2, U = exp(-D), V = exp(-S), D and S = b^2 / 2 E[(f(x) -+ f(y))^2]."""
    gx, gy = parameter(x, COLUMN + 1), parameter(y, COLUMN + 1)
    nx, ny = parameter(x, COLUMN + 2), parameter(y, COLUMN + 2)
    sign = 1.0
    if EVEN == -1:  # the cosine does not know the sign of its argument
        sign = tl.where(e <= f, 1.0, -1.0).to(e.dtype)
        e, f = tl.where(e <= f, e, f), tl.where(e <= f, f, e)
    square, product, cosine = (gx - gy) * (gx - gy), gx * gy, f - e
    apart = square + 4.0 * product * e
    u, v = tl.exp(-apart), tl.exp(-square - 4.0 * product * f)
    difference = -expm1_of_negative(-4.0 * product * tl.abs(cosine))
    kernel = 0.5 * (tl.where(cosine < 0, -v, u) * difference + (1.0 - EVEN) * v)
    distance = -expm1_of_negative(-apart)
    px, py = tl.exp(-2.0 * gx * gx), tl.exp(-2.0 * gy * gy)
    distance += (0.5 * EVEN) * (2.0 * v * distance - (px - py) * (px - py))
    return from_distance(distance, kernel, nx, ny), sign * product * (u + EVEN * v) / (nx * ny)


@triton.jit
def gelu_distance(e, f, q, r):
    """E[(phi(f(x)) - phi(f(y)))^2] of z Phi(z), from differences alone.

    K = c / 4 + (c asin(X) + M / sqrt(R)) / (2 pi), X = c / sqrt((1 + q) (1 + r)), R = (1 + q) (1 + r) - c^2,
    M = q r - c^2 + c^2 / (1 + q) + c^2 / (1 + r).
    """
    qq, rr = 1.0 + q, 1.0 + r
    root = tl.sqrt(q) * tl.sqrt(r)
    c = root * (f - e)
    apart = (tl.sqrt(q) - tl.sqrt(r)) * (tl.sqrt(q) - tl.sqrt(r)) + 4.0 * root * e  # q + r - 2 c
    product = 4.0 * root * root * e * f  # q r - c^2
    rest = 1.0 + q + r + product
    # The angles pi/2 - asin(X), as for erf.
    lx, ly, hx, hy = tl.sqrt(q / qq), tl.sqrt(r / rr), 0.5 / qq, 0.5 / rr
    between = (lx - ly) * (lx - ly) * 0.25 + lx * ly * e
    h = (hx + hy) * 0.5 + between
    arcs = q * angle_between((hy - hx) * 0.5 + between, h, hx) + r * angle_between((hx - hy) * 0.5 + between, h, hy)
    arcs += apart * asin(lx * ly * (f - e), rest / (qq * rr))
    sq, sr, sc = tl.sqrt(1.0 + 2.0 * q), tl.sqrt(1.0 + 2.0 * r), tl.sqrt(rest)
    of_q = (q - r + apart) * 0.5 * ((q + c) / qq) + (c / sc) * (c / (sq + sc)) * ((r - q + product) / qq)
    of_r = (r - q + apart) * 0.5 * ((r + c) / rr) + (c / sc) * (c / (sr + sc)) * ((q - r + product) / rr)
    return 0.25 * apart + (arcs + 2.0 * (of_q / sq + of_r / sr - product / sc)) * 0.15915494309189535


@triton.jit
def pair(e, f, x, y, BRANCH: tl.constexpr, STABLE: tl.constexpr):
    """e_phi and d_phi = d e_phi / d e, and f_phi where it keeps its digits, else 1 - e_phi."""
    CODE: tl.constexpr = BRANCH[0]
    COLUMN: tl.constexpr = BRANCH[2]
    if CODE == IDENTITY:
        return e, 1.0 + 0.0 * e, f
    elif CODE == LEAKY_RELU:
        e_phi, d_phi = piecewise_linear(e, f, BRANCH[1])
        return e_phi, d_phi, 1.0 - e_phi
    elif CODE == ERF:
        e_phi, d_phi = erf_pair(e, f, x, y, COLUMN, STABLE)
        if STABLE:
            return e_phi, d_phi, erf_pair(f, e, x, y, COLUMN, STABLE)[0]
        else:
            return e_phi, d_phi, 1.0 - e_phi
    elif CODE == SIN:
        e_phi, d_phi = sin_pair(e, f, x, y, COLUMN, BRANCH[1])
        if STABLE and BRANCH[1] == 1:
            return e_phi, d_phi, sin_pair(f, e, x, y, COLUMN, BRANCH[1])[0]
        else:
            return e_phi, d_phi, 1.0 - e_phi
    elif CODE == RBF:
        gx, gy = parameter(x, COLUMN + 1), parameter(y, COLUMN + 1)
        apart = (gx - gy) * (gx - gy) + 4.0 * gx * gy * e
        e_phi = -0.5 * expm1_of_negative(-apart)
        return e_phi, 2.0 * gx * gy * tl.exp(-apart), 1.0 - e_phi
    else:
        q, r = parameter(x, COLUMN + 1), parameter(y, COLUMN + 1)
        nx, ny = parameter(x, COLUMN + 2), parameter(y, COLUMN + 2)
        root = tl.sqrt(q) * tl.sqrt(r)
        kernel, by_c, _, _, _ = gelu_kernels(q, r, root * (f - e), 4.0 * q * r * e * f)
        if STABLE:  # noqa: SIM108  (a conditional expression would compile both)
            e_phi = from_distance(gelu_distance(e, f, q, r), kernel, nx, ny)
        else:
            e_phi = 0.5 - kernel / (2.0 * nx * ny)
        return e_phi, by_c * root / (nx * ny), 1.0 - e_phi


@triton.jit
def pair_derivatives(e, f, e_phi, d_phi, x, y, BRANCH: tl.constexpr):
    """d d_phi / d e, and, where c is not all that is known of x, d e_phi and d d_phi / d log q at constant e."""
    CODE: tl.constexpr = BRANCH[0]
    COLUMN: tl.constexpr = BRANCH[2]
    DERIVATIVE: tl.constexpr = BRANCH[3]
    nothing = 0.0 * e
    if CODE == IDENTITY:
        return nothing, nothing, nothing
    elif CODE == LEAKY_RELU:
        h = tl.where(e <= f, e, f)
        apart = are_apart(h)
        sine = tl.sqrt(tl.where(apart, h * (1.0 - h), 1.0))
        return tl.where(apart, (BRANCH[1] - 1.0) / (PI * sine), 0.0), nothing, nothing
    elif CODE == ERF:
        rx, ry = parameter(x, COLUMN + 1), parameter(y, COLUMN + 1)
        hx, hy = parameter(x, COLUMN + 2), parameter(y, COLUMN + 2)
        change = parameter(x, DERIVATIVE + 1)
        lengths, cosine = rx * ry, f - e
        complement = 2.0 * (hx + hy - 2.0 * hx * hy) + 4.0 * lengths * lengths * e * f
        by_size = 0.5 * (change * (1.0 - 2.0 * e_phi) - hx * cosine * d_phi)
        return d_phi * (-2.0) * lengths * lengths * cosine / complement, by_size, d_phi * (hx / complement - change)
    elif CODE == SIN:
        EVEN: tl.constexpr = BRANCH[1]
        gx, gy = parameter(x, COLUMN + 1), parameter(y, COLUMN + 1)
        norms = parameter(x, COLUMN + 2) * parameter(y, COLUMN + 2)
        change = parameter(x, DERIVATIVE + 1)
        square, product = (gx - gy) * (gx - gy), gx * gy
        u = tl.exp(-square - 4.0 * product * e) * gx * (gx - gy + 2.0 * gy * e) / norms
        v = tl.exp(-square - 4.0 * product * f) * gx * (gx - gy + 2.0 * gy * f) / norms
        by_size = 0.25 * (u - EVEN * v) + 0.5 * change * (1.0 - 2.0 * e_phi)
        slope_by_size = d_phi * (0.5 - change) - product * (u + EVEN * v)
        return -8.0 * product * product * (1.0 - 2.0 * e_phi), by_size, slope_by_size
    elif CODE == RBF:
        gx, gy = parameter(x, COLUMN + 1), parameter(y, COLUMN + 1)
        distance_change = gx * (gx - gy + 2.0 * gy * e)
        by_size = 0.5 * (1.0 - 2.0 * e_phi) * distance_change
        return -4.0 * gx * gy * d_phi, by_size, d_phi * (0.5 - distance_change)
    else:
        q, r = parameter(x, COLUMN + 1), parameter(y, COLUMN + 1)
        norms = parameter(x, COLUMN + 2) * parameter(y, COLUMN + 2)
        change = parameter(x, DERIVATIVE + 1)
        root = tl.sqrt(q) * tl.sqrt(r)
        c = root * (f - e)
        _, by_c, by_c_twice, by_q, by_q_and_c = gelu_kernels(q, r, c, 4.0 * q * r * e * f)
        by_size = 0.5 * (change * (1.0 - 2.0 * e_phi) - (q * by_q + 0.5 * c * by_c) / norms)
        slope_by_size = (q * by_q_and_c + 0.5 * c * by_c_twice) * root / norms + d_phi * (0.5 - change)
        return -2.0 * q * r * by_c_twice / norms, by_size, slope_by_size


@triton.jit
def through_layer(e, f, tangent, x, y, LAYER: tl.constexpr):
    """e, f and T = Theta / sqrt(q r) behind a layer."""
    sx, sy = parameter(x, LAYER[2]), parameter(y, LAYER[2])
    next_e = (sx - sy) * (sx - sy) * 0.25 + 0.0 * e
    next_f = (sx + sy) * (sx + sy) * 0.25 + 0.0 * e
    slope = 0.0 * e
    for j in tl.static_range(len(LAYER[1])):
        e_phi, d_phi, f_phi = pair(e, f, x, y, LAYER[1][j], LAYER[0])
        cx, cy = parameter(x, LAYER[1][j][2]), parameter(y, LAYER[1][j][2])
        apart = (cx - cy) * (cx - cy) * 0.25
        next_e += cx * cy * e_phi + apart
        next_f += cx * cy * f_phi + apart
        slope += cx * cy * d_phi
    # Where they differ by rounding, the smaller one is right.
    small = next_e <= next_f
    e = tl.where(small, next_e, 1.0 - next_f)
    f = tl.where(small, 1.0 - next_e, next_f)
    return e, f, f - e + tangent * slope


@triton.jit
def through_layers(e, f, x, y, RUNS: tl.constexpr):
    """Cosines and T behind all layers. Unrolled, many of them would take too many registers."""
    tangent = f - e
    for run in tl.static_range(len(RUNS)):
        if RUNS[run][1] == 1:
            e, f, tangent = through_layer(e, f, tangent, x, y, RUNS[run][0])
        else:
            for layer in range(RUNS[run][1]):
                next_x = (x[0] + layer * RUNS[run][2] * x[1], x[1])
                next_y = (y[0] + layer * RUNS[run][2] * y[1], y[1])
                e, f, tangent = through_layer(e, f, tangent, next_x, next_y, RUNS[run][0])
    return f - e, tangent


@triton.jit
def tile_of_triangle(program, tiles):
    """Row and column of the n-th tile on or below the diagonal: two halves of a rectangle, one turned around."""
    even = 1 - tiles % 2
    width = (tiles + 1) // 2
    row, column = program // width - even, program % width
    turned = row < column
    return tl.where(turned, tiles - 1 - even - row, row), tl.where(turned, tiles - even - column, column)


@triton.jit
def store_tile(gram, value, i, j, n, m, SYMMETRIC: tl.constexpr):
    exists = (i[:, None] < n) & (j[None, :] < m)
    if SYMMETRIC:
        exists = exists & (i[:, None] >= j[None, :])
        tl.store(gram + j[:, None] * m + i[None, :], tl.trans(value), mask=tl.trans(exists))
    tl.store(gram + i[:, None] * m + j[None, :], value, mask=exists)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def ntk_gram_tiles(
    ux,  # (B, N, KP)
    uy,  # (B, M, KP)
    rows_x,  # (B, R, N)
    rows_y,  # (B, R, M)
    gram,  # (K, B, N, M)
    n,
    m,
    d,
    tiles,  # of a batch
    columns,  # of them, in a row of tiles
    parts,  # numbers of one kernel
    RUNS: tl.constexpr,
    SCALE: tl.constexpr,
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    K_FEW: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """A tile of the Gram matrix, and where it is symmetric, its mirror image."""
    program = tl.program_id(0).to(INDEX)
    b = program // tiles
    if SYMMETRIC:
        row, column = tile_of_triangle(program % tiles, columns)
    else:
        row, column = (program % tiles) // columns, program % columns
    i, j = row * BLOCK_N + tl.arange(0, BLOCK_N), column * BLOCK_M + tl.arange(0, BLOCK_M)
    # Beyond the end, the last point stands for those that do not exist.
    inside_i, inside_j = tl.minimum(i, n - 1), tl.minimum(j, m - 1)
    of_x, of_y = ux + b * n * KP, uy + b * m * KP
    e, f = half_angles(of_x, of_y, inside_i, inside_j, d, K_FEW, KP, BLOCK_D, OPERAND, PRECISION, ACC)
    x, y = sides_of(rows_x, rows_y, inside_i, inside_j, n, m, SCALE + 1, SCALE + 1, b)
    cosine, tangent = through_layers(e, f, x, y, RUNS)
    scale = parameter(x, SCALE) * parameter(y, SCALE)
    target = gram + b * n * m
    if KIND != 1:
        store_tile(target, scale * cosine, i, j, n, m, SYMMETRIC)
    if KIND == 2:
        target += parts
    if KIND != 0:
        store_tile(target, scale * tangent, i, j, n, m, SYMMETRIC)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def ntk_gram_product(
    ux,  # (B, N, KP)
    uy,  # (B, M, KP)
    rows_x,  # (B, R, N)
    rows_y,  # (B, R, M)
    v,  # (B, M, P)
    found,  # (splits, B, N, P)
    n,
    m,
    d,
    blocks,  # rows of tiles of a batch
    columns,  # P
    factors,  # blocks of columns
    splits,
    RUNS: tl.constexpr,
    SCALE: tl.constexpr,
    KIND: tl.constexpr,
    K_FEW: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """BLOCK_N rows and BLOCK_P columns of the kernel times v, over one of ``splits`` parts of the sum."""
    program = tl.program_id(0).to(INDEX)
    split, program = program % splits, program // splits
    factor, program = program % factors, program // factors
    b = program // blocks
    batches = tl.num_programs(0) // (splits * factors * blocks)
    i = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_i = tl.minimum(i, n - 1)
    of_x, of_y = ux + b * n * KP, uy + b * m * KP
    p = factor * BLOCK_P + tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_N, BLOCK_P), ACC)
    tiles = tl.cdiv(m, BLOCK_M)
    for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
        j = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside_j = tl.minimum(j, m - 1)
        e, f = half_angles(of_x, of_y, inside_i, inside_j, d, K_FEW, KP, BLOCK_D, OPERAND, PRECISION, ACC)
        x, y = sides_of(rows_x, rows_y, inside_i, inside_j, n, m, SCALE + 1, SCALE + 1, b)
        cosine, tangent = through_layers(e, f, x, y, RUNS)
        kernel = parameter(y, SCALE) * (tangent if KIND == 1 else cosine)
        if BLOCK_P < 16:
            for q in tl.static_range(BLOCK_P):
                column = factor * BLOCK_P + q
                at = v + (b * m + j) * columns + column
                values = tl.load(at, mask=(j < m) & (column < columns), other=0.0)
                sums = tl.sum(kernel * values[None, :], 1)
                total += tl.where(p[None, :] == column, sums[:, None], 0.0)
        else:
            at = v + (b * m + j[:, None]) * columns + p[None, :]
            values = tl.load(at, mask=(j[:, None] < m) & (p[None, :] < columns), other=0.0)
            total = tl.dot(kernel, values, total, input_precision="ieee", out_dtype=ACC)
    scale = tl.load(rows_x + (b * (SCALE + 1) + SCALE) * n + inside_i)
    target = found + ((split * batches + b) * n + i[:, None]) * columns + p[None, :]
    tl.store(target, total * scale[:, None], mask=(i[:, None] < n) & (p[None, :] < columns))


@triton.jit
def weights_of(left, right, dense, b, i, j, n, m, columns, strides, ACC: tl.constexpr):
    """W_ij of a tile, 0 beyond the last row and column."""
    exists_i, exists_j = (i < n)[:, None], (j < m)[None, :]
    if dense is not None:
        at = dense + b * strides[0] + i[:, None] * strides[1] + j[None, :] * strides[2]
        return tl.load(at, mask=exists_i & exists_j, other=0.0)
    else:
        total = tl.zeros((i.shape[0], j.shape[0]), ACC)
        for p in range(columns):
            weight = tl.load(right + (b * m + j[None, :]) * columns + p, mask=exists_j, other=0.0)
            if left is not None:
                weight = weight * tl.load(left + (b * n + i[:, None]) * columns + p, mask=exists_i, other=0.0)
            total += weight
        return total


@triton.jit
def component_of(near_bar, sign, of_x, of_y, i, j, component, k, KP: tl.constexpr, ACC: tl.constexpr):
    """A component of the gradient that comes from near pairs, among zeros."""
    x = tl.load(of_x + i * KP + component).to(ACC)[:, None]
    y = tl.load(of_y + j * KP + component).to(ACC)[None, :]
    return tl.where(k[None, :] == component, tl.sum(near_bar * (sign * x - y), 1)[:, None], 0.0)


@triton.jit
def collect(bar, by_size, sums, exists, scale, ROWS: tl.constexpr):
    """Add the sums of a parameter's derivatives to those of earlier tiles; the derivatives times ``by_size``."""
    if ROWS:
        before = tl.load(sums, mask=exists, other=0.0)
        tl.store(sums, before + scale * tl.sum(bar, 1), mask=exists)
        tl.debug_barrier()  # another thread may read them for the next tile
    return bar * by_size


@triton.jit
def back_through_layer(
    e, f, tangent, e_bar, t_bar, x, y, sums, exists, scale, LAYER: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr
):
    """From derivatives by e and T behind a layer to those before it, and one by log q_0."""
    change = parameter(x, LAYER[3])
    if KIND == 1:
        e_bar -= 2.0 * t_bar
    sx, sy = parameter(x, LAYER[2]), parameter(y, LAYER[2])
    by_size = collect(0.5 * e_bar * (sx - sy), parameter(x, LAYER[3] + 1), sums + LAYER[4], exists, scale, ROWS)
    before = 0.0 * e
    slope = 0.0 * e
    for j in tl.static_range(len(LAYER[1])):
        e_phi, d_phi, _ = pair(e, f, x, y, LAYER[1][j], LAYER[0])
        d_by_e, e_by_size, d_by_size = pair_derivatives(e, f, e_phi, d_phi, x, y, LAYER[1][j])
        cx, cy = parameter(x, LAYER[1][j][2]), parameter(y, LAYER[1][j][2])
        of_c = e_bar * (cy * e_phi + 0.5 * (cx - cy))
        of_size = e_bar * e_by_size
        before += cx * cy * e_bar * d_phi
        if KIND == 1:
            of_slope = t_bar * tangent
            of_c += cy * of_slope * d_phi
            of_size += of_slope * d_by_size
            before += cx * cy * of_slope * d_by_e
            slope += cx * cy * d_phi
        target = sums + LAYER[1][j][4]
        by_size += collect(of_c, parameter(x, LAYER[1][j][3]), target, exists, scale, ROWS)
        if LAYER[1][j][0] > LEAKY_RELU:
            by_size += collect(cx * cy * of_size, change, target + 1, exists, scale, ROWS)
    return before, t_bar * slope, by_size


@triton.jit(do_not_specialize=UNSPECIALIZED)
def ntk_gram_witness(
    ux,  # (B, N, KP)
    uy,  # (B, M, KP)
    rows_x,  # (B, ALL, N)
    rows_y,  # (B, R, M)
    left,  # (B, N, P) or None
    right,  # (B, M, P) or None
    dense,  # (B, N, M) of any strides, or None
    values,  # (splits, B, N)
    gradients,  # (splits, B, N, d + 1)
    sums,  # (splits, B, N, PARAMETERS), or None
    dense_stride_b,
    dense_stride_n,
    dense_stride_m,
    n,
    m,
    d,
    blocks,  # rows of tiles of a batch
    columns,  # P
    parts,  # blocks of components of the gradient
    splits,
    LAYERS: tl.constexpr,
    SCALE: tl.constexpr,
    ALL: tl.constexpr,
    PARAMETERS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    K_FEW: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """sum_j W_ij k(x_i, y_j) of BLOCK_N points, its gradient by BLOCK_K components, and those of row parameters.

    Over one of ``splits`` parts of the sum. Programs of further components leave out what the first ones write.
    """
    program = tl.program_id(0).to(INDEX)
    split, program = program % splits, program // splits
    part, program = program % parts, program // parts
    b = program // blocks
    batches = tl.num_programs(0) // (splits * parts * blocks)
    i = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = i < n
    inside_i = tl.minimum(i, n - 1)
    of_x, of_y = ux + b * n * KP, uy + b * m * KP
    at = (split * batches + b) * n + i
    k = part * BLOCK_K + tl.arange(0, BLOCK_K)
    scale = tl.load(rows_x + (b * ALL + SCALE) * n + inside_i)
    half_log = tl.load(rows_x + (b * ALL + ALL - 2) * n + inside_i)  # d log scale / d log q_0
    value = tl.zeros((BLOCK_N,), ACC)
    along = tl.zeros((BLOCK_N,), ACC)  # the gradient's part along x
    vector = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    tiles = tl.cdiv(m, BLOCK_M)
    for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
        j = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside_j = tl.minimum(j, m - 1)
        e, f = half_angles(of_x, of_y, inside_i, inside_j, d, K_FEW, KP, BLOCK_D, OPERAND, PRECISION, ACC)
        x, y = sides_of(rows_x, rows_y, inside_i, inside_j, n, m, ALL, SCALE + 1, b)
        strides = (dense_stride_b, dense_stride_n, dense_stride_m)
        weights = weights_of(left, right, dense, b, i, j, n, m, columns, strides, ACC) * parameter(y, SCALE)

        first_e, first_f = e, f
        tangent = f - e
        for layer in tl.static_range(len(LAYERS)):
            if layer == 0:
                es, fs, tangents = (e,), (f,), (tangent,)
            else:
                es, fs = es + (e,), fs + (f,)  # type: ignore[assignment]  # noqa: RUF005
                tangents = tangents + (tangent,)  # type: ignore[assignment]  # noqa: RUF005
            e, f, tangent = through_layer(e, f, tangent, x, y, LAYERS[layer])

        if KIND == 1:
            e_bar, t_bar = 0.0 * e, weights
            products = weights * tangent
        else:
            e_bar, t_bar = -2.0 * weights, 0.0 * e
            products = weights * (f - e)
        of_value = tl.sum(products, 1)
        value += of_value
        by_size = 0.0 * e
        for back in tl.static_range(len(LAYERS)):
            e_bar, t_bar, more = back_through_layer(
                es[len(LAYERS) - 1 - back],
                fs[len(LAYERS) - 1 - back],
                tangents[len(LAYERS) - 1 - back],
                e_bar,
                t_bar,
                x,
                y,
                sums + at * PARAMETERS if ROWS else at,
                exists & (part == 0),
                scale,
                LAYERS[len(LAYERS) - 1 - back],
                KIND,
                ROWS,
            )
            by_size += more
        if KIND == 1:
            e_bar -= 2.0 * t_bar

        # Of e = |u_x - u_y|^2 / 4, f = |u_x + u_y|^2 / 4, or both from the inner product: the same, but for digits.
        sign = tl.where(first_e <= first_f, 1.0, -1.0).to(ACC)
        near = tl.where(first_e <= first_f, first_e, first_f) < NEAR
        if K_FEW > 0:
            near = near | (first_e == first_e)
        along_near = tl.where(first_e <= first_f, -first_e, first_f)
        coefficient = tl.where(near, along_near, 0.5 * (first_f - first_e))
        along += tl.sum(e_bar * coefficient + 2.0 * by_size, 1) + 2.0 * half_log * of_value
        near_bar = tl.where(near, 0.5 * e_bar, 0.0)
        if K_FEW > 0:
            for component in tl.static_range(K_FEW):
                vector += component_of(near_bar, sign, of_x, of_y, inside_i, inside_j, component, k, KP, ACC)
        else:
            u = tl.load(of_y + inside_j[:, None] * KP + k[None, :], mask=k[None, :] < KP, other=0.0).to(ACC)
            far_bar = tl.where(near, 0.0, -0.5 * e_bar)
            vector = tl.dot(far_bar, u, vector, input_precision=PRECISION, out_dtype=ACC)
            if tl.min(tl.minimum(first_e, first_f)) < NEAR:
                for component in range(part * BLOCK_K, tl.minimum((part + 1) * BLOCK_K, d + 1)):
                    vector += component_of(near_bar, sign, of_x, of_y, inside_i, inside_j, component, k, KP, ACC)

    u = tl.load(of_x + inside_i[:, None] * KP + k[None, :], mask=k[None, :] < KP, other=0.0).to(ACC)
    factor = tl.load(rows_x + (b * ALL + ALL - 1) * n + inside_i)  # scale / sqrt(q_0)
    gradient = factor[:, None] * (vector + along[:, None] * u)
    tl.store(gradients + at[:, None] * (d + 1) + k[None, :], gradient, mask=exists[:, None] & (k <= d)[None, :])
    value *= scale
    tl.store(values + at, value, mask=exists & (part == 0))
    if ROWS:
        tl.store(sums + at * PARAMETERS + PARAMETERS - 1, value, mask=exists & (part == 0))


#: Whether Triton interprets the kernels on the CPU: TRITON_INTERPRET=1 when this module was imported.
INTERPRETED = not isinstance(ntk_gram_tiles, triton.JITFunction)


def launch(device: torch.device, kernel: Any, programs: int, **arguments: Any) -> None:
    """Run ``programs`` programs of a kernel. Everything on the device goes through here."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**arguments)


@lru_cache(maxsize=256)
def _scales_on(device: torch.device, scales: tuple[float, ...]) -> Tensor:
    return torch.tensor(scales, dtype=torch.float64).to(device)


def scales_on(device: torch.device, scales: Tensor) -> Tensor:
    """Kept, if they are numbers on the host, so that captured graphs copy nothing to the device."""
    if scales.device == device:
        return scales.contiguous()
    return _scales_on(device, tuple(scales.tolist()))


class Plan:
    """What the kernels are told about one call."""

    def __init__(self, problem: Problem, options: Options) -> None:
        self.problem, self.options, self.layout = problem, options, described(options)
        self.device, self.dtype = problem.x.device, problem.x.dtype
        self.batch, self.n, self.d = problem.x.shape
        self.m = self.n if problem.y is None else problem.y.shape[1]
        single = self.dtype == torch.float32
        low, tf32 = single and options.precision == "bf16", single and options.precision == "tf32"
        self.round = 16 if low else 13 if tf32 else 0
        # Differences of rounded vectors are off by their lengths: good for near pairs only.
        few = self.d + 1 <= FEW and self.round == 0
        self.block_d = 16 if self.d < 64 else 32
        self.kp = triton.next_power_of_2(self.d + 1) if few else triton.cdiv(self.d + 1, self.block_d) * self.block_d
        self.storage = torch.bfloat16 if low else self.dtype
        self.acc = ACCUMULATOR[self.dtype]
        # Triton's interpreter cannot multiply in bfloat16.
        self.operand = tl.bfloat16 if low and not INTERPRETED else self.acc
        self.choices = {
            "n": self.n,
            "m": self.m,
            "d": self.d,
            "SCALE": self.layout.columns - 1,
            "K_FEW": self.d + 1 if few else 0,
            "KP": self.kp,
            "BLOCK_D": self.block_d,
            "OPERAND": self.operand,
            "PRECISION": "tf32" if tf32 else "ieee",
            "ACC": self.acc,
        }

    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile, and warps, such that what a thread has of a tile fits its registers."""
        pairs = self.batch * self.n * self.m
        simple = all(code <= activations.LEAKY_RELU for code in self.options.codes)
        if self.dtype == torch.float64:
            return 32, 8
        return (64, 8) if simple and pairs >= ENOUGH_PROGRAMS * 64 * 64 else (32, 4)

    def index(self, *tensors: Tensor | None) -> tl.dtype:
        """The type that holds every offset in these."""
        spans = [sum((s - 1) * t for s, t in zip(a.shape, a.stride(), strict=True)) for a in tensors if a is not None]
        return tl.int32 if max(spans) < INT32_LIMIT else tl.int64

    def side(self, points: Tensor, derivatives: bool) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, N, KP) and row parameters (B, R, N)."""
        points = points.resolve_neg()
        batch, n, d = points.shape
        columns = self.layout.all if derivatives else self.layout.columns
        unit = torch.empty((batch, n, self.kp), dtype=self.storage, device=self.device)
        rows = torch.empty((batch, columns, n), dtype=self.dtype, device=self.device)
        blocks = triton.cdiv(n, 32)
        launch(
            self.device,
            ntk_gram_rows,
            batch * blocks,
            points=points,
            weight_std=scales_on(self.device, self.problem.weight_std),
            bias_std=scales_on(self.device, self.problem.bias_std),
            unit=unit,
            rows=rows,
            stride_b=points.stride(0),
            stride_n=points.stride(1),
            stride_d=points.stride(2),
            n=n,
            d=d,
            blocks=blocks,
            LAYERS=self.layout.layers,
            CONSTANTS=tuple(tuple(branch.constants for branch in layer) for layer in self.options.layers()),
            OFFSETS=tuple(self.options.offsets),
            SCALE=self.layout.columns - 1,
            ALL=columns,
            DERIVATIVES=derivatives,
            ROUND=self.round,
            KP=self.kp,
            BLOCK_N=32,
            BLOCK_D=min(self.kp, 32),
            ACC=self.acc,
            INDEX=self.index(points, unit, rows),
        )
        return unit, rows

    def sides(self, derivatives: bool = False) -> dict[str, Tensor]:
        """What the kernels know of both sides. Derivatives belong to x alone."""
        x = y = self.side(self.problem.x, derivatives)
        if self.problem.y is not None or derivatives:
            y = self.side(self.problem.x if self.problem.y is None else self.problem.y, False)
        return {"ux": x[0], "uy": y[0], "rows_x": x[1], "rows_y": y[1]}


def gram(problem: Problem, options: Options) -> Tensor:
    """(K, B, N, M); see ``op.py``."""
    found = problem.x.new_empty(gram_shape(problem, options))
    if found.numel() == 0:
        return found
    plan = Plan(problem, options)
    sides = plan.sides()
    block, warps = plan.tile()
    rows, columns = triton.cdiv(plan.n, block), triton.cdiv(plan.m, block)
    symmetric = problem.y is None
    tiles = rows * (rows + 1) // 2 if symmetric else rows * columns
    launch(
        plan.device,
        ntk_gram_tiles,
        plan.batch * tiles,
        gram=found,
        tiles=tiles,
        columns=columns,
        parts=found[0].numel(),
        RUNS=plan.layout.runs,
        KIND=options.kind,
        SYMMETRIC=symmetric,
        BLOCK_N=block,
        BLOCK_M=block,
        INDEX=plan.index(found, *sides.values()),
        num_warps=warps,
        **sides,
        **plan.choices,
    )
    return found


def split_into(programs: int, tiles: int) -> int:
    """Into how many parts a sum over tiles is split, where there are so many programs without."""
    return max(1, min(ENOUGH_PROGRAMS // programs, tiles))


def matvec(problem: Problem, v: Tensor, options: Options) -> Tensor:
    """(B, N, p); see ``op.py``."""
    plan = Plan(problem, options)
    columns = v.shape[-1]
    shape = (plan.batch, plan.n, columns)
    if 0 in (*shape, plan.m):
        return problem.x.new_zeros(shape)
    sides = plan.sides()
    v = v.resolve_neg().contiguous()
    block_p = min(triton.next_power_of_2(columns), MOST_COLUMNS)
    block_p = block_p if block_p <= 4 else max(16, block_p)
    block, warps = plan.tile()
    blocks, factors = triton.cdiv(plan.n, block), triton.cdiv(columns, block_p)
    splits = split_into(plan.batch * blocks * factors, triton.cdiv(plan.m, block))
    found = problem.x.new_empty((splits, *shape))
    launch(
        plan.device,
        ntk_gram_product,
        plan.batch * blocks * factors * splits,
        v=v,
        found=found,
        blocks=blocks,
        columns=columns,
        factors=factors,
        splits=splits,
        RUNS=plan.layout.runs,
        KIND=options.kind,
        BLOCK_N=block,
        BLOCK_M=block,
        BLOCK_P=block_p,
        INDEX=plan.index(found, v, *sides.values()),
        num_warps=warps,
        **sides,
        **plan.choices,
    )
    return found[0] if splits == 1 else found.sum(0)


def witness(
    problem: Problem, left: Tensor | None, right: Tensor | None, dense: Tensor | None, options: Options, rows: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, N), (B, N, d + 1) and (B, N, P); see ``op.py``."""
    plan = Plan(problem, options)
    shapes = witness_shapes(problem, options)
    new = problem.x.new_zeros
    if plan.batch * plan.n * plan.m == 0:
        return new(shapes[0]), new(shapes[1]), new(shapes[2]) if rows else None
    sides = plan.sides(derivatives=True)
    wide = plan.dtype == torch.float64
    block_n, block_m = 16 if wide else 32, 32
    most = MOST_COMPONENTS // 2 if wide else MOST_COMPONENTS
    block_k = min(triton.next_power_of_2(plan.kp), most)
    blocks, parts = triton.cdiv(plan.n, block_n), triton.cdiv(plan.d + 1, block_k)
    splits = split_into(plan.batch * blocks * parts, triton.cdiv(plan.m, block_m))
    values, gradients = (problem.x.new_empty((splits, *shape)) for shape in shapes[:2])
    sums = new((splits, *shapes[2])) if rows else None
    left, right = (None if t is None else t.resolve_neg().contiguous() for t in (left, right))
    dense = None if dense is None else dense.resolve_neg()
    strides = (0, 0, 0) if dense is None else dense.stride()
    launch(
        plan.device,
        ntk_gram_witness,
        plan.batch * blocks * parts * splits,
        left=left,
        right=right,
        dense=dense,
        values=values,
        gradients=gradients,
        sums=sums,
        dense_stride_b=strides[0],
        dense_stride_n=strides[1],
        dense_stride_m=strides[2],
        blocks=blocks,
        columns=1 if right is None else right.shape[-1],
        parts=parts,
        splits=splits,
        LAYERS=plan.layout.layers,
        ALL=plan.layout.all,
        PARAMETERS=shapes[2][-1],
        KIND=options.kind,
        ROWS=rows,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        INDEX=plan.index(gradients, left, right, dense, sums, *sides.values()),
        num_warps=8,
        **sides,
        **plan.choices,
    )
    if splits == 1:
        return values[0], gradients[0], None if sums is None else sums[0]
    return values.sum(0), gradients.sum(0), None if sums is None else sums.sum(0)
