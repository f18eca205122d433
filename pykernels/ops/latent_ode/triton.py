"""Trajectories of MLP fields for GPUs, in Triton; README.md has the equations.

A program carries its block of samples through all steps in one launch, the state and the stages in registers:

    samples    +--------------------------------+
    of one     | y_0 -> k_1 .. k_s -> y_1 -> .. |   k_i = network(a_i),   a_i = [map(Y_i) | z, t]
    program    +--------------------------------+

Networks of narrow layers keep activations in registers, too, and find their weights in the L1 cache. Those of wide
layers go tile by tile through a *row* of memory for each sample, with the inputs and outputs of all layers of one
evaluation:

    | map(Y) | z, t | h_1 | (z_1) | h_2 | (z_2) | .. | k | Y, if there is a map |

where pre-activations z are there if act' needs them. The same rows are what the backward needs; with ``save`` there is
one for each evaluation of each sample. The backward goes through the steps in reverse in one launch and writes rows of
adjoints:

    | of k | of the inputs, if wide | of slopes | of z_1 | of z_2 | .. |

The gradients of weights and biases are products and sums of both rows over all evaluations, by torch: at the rate of
large products, and in an order that depends on sizes alone. Rows that would exceed ``max_memory`` are computed again in
pieces: the forward then keeps the state at the start of each piece only.

Weights are packed with zeros up to sizes that tiles divide, so kernels mask nothing but samples and the state. With
corrections the samples are sorted by group, and the samples of a block are of one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pykernels.ops._triton_math import expm1_of_negative, sigmoid, softplus, tanh
from pykernels.ops.latent_ode import reference
from pykernels.ops.latent_ode.op import empty_gradients, empty_results
from pykernels.ops.latent_ode.reference import Options, Tensors, stacked
from pykernels.ops.latent_ode.tableaux import TABLEAUX

#: Programs that are enough for a GPU: blocks of samples grow beyond 16 only where that many remain.
ENOUGH_PROGRAMS = 256
#: Layers whose padded rows have at most these bytes are computed in registers.
NARROW = 256
#: Elements of a gradient of weights that blocks of samples may compute each on its own, before they are added up.
PARTIAL_SUMS = 1 << 22
#: Arguments whose values no kernel is compiled anew for.
UNSPECIALIZED = ("batch", "first", "last", "substeps", "parameter_sets", "piece", "sets", "repeats")
ACCUMULATOR = {torch.float64: tl.float64, torch.float32: tl.float32}


@triton.jit
def activate(z, beta, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """act(z). NaN stays NaN: comparisons choose z itself when they fail."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z <= 0, z * SLOPE, z)
    elif ACTIVATION == "tanh":
        return tanh(z)
    elif ACTIVATION == "softplus":
        return softplus(z)
    elif ACTIVATION == "silu":
        return z * sigmoid(beta * z)
    elif ACTIVATION == "elu":
        return tl.where(z > 0, z, SLOPE * expm1_of_negative(z))
    else:
        return tl.sin(z)


@triton.jit
def derive(g, h, z, beta, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """g act'(z), where h = act(z); z is there for silu and sin only."""
    if ACTIVATION == "relu":
        return tl.where(h <= 0, 0.0, g)
    elif ACTIVATION == "leaky_relu":
        return tl.where(h > 0, g, g * SLOPE)
    elif ACTIVATION == "tanh":
        return g * (1.0 - h * h)
    elif ACTIVATION == "softplus":
        return -g * expm1_of_negative(-h)
    elif ACTIVATION == "silu":
        s = sigmoid(beta * z)
        return g * s * (1.0 + beta * z * (1.0 - s))
    elif ACTIVATION == "elu":
        return tl.where(h > 0, g, g * (h + SLOPE))
    else:
        return g * tl.cos(z)


@triton.jit
def map_state(y, MAP: tl.constexpr):
    if MAP == "square":
        return y * y
    elif MAP == "cube":
        return y * y * y
    elif MAP == "sin":
        return tl.sin(y)
    elif MAP == "cos":
        return tl.cos(y)
    elif MAP == "tanh":
        return tanh(y)
    else:
        return y


@triton.jit
def derive_map(g, y, MAP: tl.constexpr):
    """g map'(y)."""
    if MAP == "square":
        return g * 2.0 * y
    elif MAP == "cube":
        return g * 3.0 * y * y
    elif MAP == "sin":
        return g * tl.cos(y)
    elif MAP == "cos":
        return -g * tl.sin(y)
    elif MAP == "tanh":
        h = tanh(y)
        return g * (1.0 - h * h)
    else:
        return g


@triton.jit
def pick(i, VALUES: tl.constexpr, ACC: tl.constexpr):
    """VALUES[i] for an i that the compiler does not know."""
    value = tl.full((), VALUES[0], ACC)
    for n in tl.static_range(1, len(VALUES)):
        value = tl.where(i == n, tl.full((), VALUES[n], ACC), value)
    return value


@triton.jit
def combine(i, k0, k1, k2, k3, COEFFICIENTS: tl.constexpr, ACC: tl.constexpr):
    """sum_j COEFFICIENTS[j][i] k_j; there are at most four stages."""
    OF_K0: tl.constexpr = COEFFICIENTS[0]
    total = pick(i, OF_K0, ACC) * k0
    if len(COEFFICIENTS) > 1:
        OF_K1: tl.constexpr = COEFFICIENTS[1]
        total += pick(i, OF_K1, ACC) * k1
    if len(COEFFICIENTS) > 2:
        OF_K2: tl.constexpr = COEFFICIENTS[2]
        total += pick(i, OF_K2, ACC) * k2
    if len(COEFFICIENTS) > 3:
        OF_K3: tl.constexpr = COEFFICIENTS[3]
        total += pick(i, OF_K3, ACC) * k3
    return total


@triton.jit
def block_of(program, samples, batch, BLOCK: tl.constexpr):
    """The samples (BLOCK, 1) of a program, and which of them exist."""
    lane = program * BLOCK + tl.arange(0, BLOCK)[:, None].to(tl.int64)
    if samples is not None:
        sample = tl.load(samples + lane)
        exists = sample >= 0
        return tl.where(exists, sample, 0), exists
    else:
        return lane, lane < batch


@triton.jit
def row_of(n, program, programs, sets, repeats, stages, BLOCK: tl.constexpr, ROW: tl.constexpr):
    """Where the rows of a block start for sub-step n of a piece: by weight set, block, repetition of the set, stage."""
    return (((n % sets) * programs + program) * repeats + n // sets) * stages * (BLOCK * ROW)


@triton.jit
def load_extra(
    control,
    sample,
    exists,
    interval,
    batch,
    time,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    EP: tl.constexpr,
    ACC: tl.constexpr,
):
    """[z, t] (BLOCK, EP): the control of the interval, then the time, which is masked by zeros in the weights."""
    c = tl.arange(0, EP)[None, :]
    if control is not None:
        at = control + (interval * batch + sample) * C + c
        extra = tl.load(at, mask=exists & (c < C), other=0.0)
    else:
        extra = tl.zeros((BLOCK, EP), ACC)
    return tl.where(c == C, time, extra)


@triton.jit
def forward_layer_narrow(
    x,
    extra,
    rows,
    weights,
    biases,
    slopes,
    NET: tl.constexpr,
    LAYER: tl.constexpr,
    DP: tl.constexpr,
    EP: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The output of a layer whose input is in registers; of the first, x and extra side by side."""
    IN: tl.constexpr = NET[LAYER][0]
    OUT: tl.constexpr = NET[LAYER][1]
    W: tl.constexpr = NET[LAYER][2]
    B: tl.constexpr = NET[LAYER][3]
    Y: tl.constexpr = NET[LAYER][5]
    Z: tl.constexpr = NET[LAYER][6]
    STATE: tl.constexpr = DP if LAYER == 0 else IN
    n = tl.arange(0, OUT)[None, :]
    z = tl.load(biases + B + n) + tl.zeros((BLOCK, OUT), ACC)
    w = tl.load(weights + W + tl.arange(0, STATE)[:, None] * OUT + n)
    z = tl.dot(x, w, z, input_precision="ieee", out_dtype=ACC)
    if LAYER == 0 and EP > 0:
        w = tl.load(weights + W + (DP + tl.arange(0, EP)[:, None]) * OUT + n)
        z = tl.dot(extra, w, z, input_precision="ieee", out_dtype=ACC)
    at = tl.arange(0, BLOCK)[:, None] * ROW + n
    if len(NET) - 1 == LAYER:
        h = z
    else:
        beta = 0.0
        if ACTIVATION == "silu":
            beta = tl.load(slopes + LAYER)
        h = activate(z, beta, ACTIVATION, SLOPE)
        if rows is not None and Z >= 0:
            tl.store(rows + Z + at, z)
    if rows is not None:
        tl.store(rows + Y + at, h)
    return h


@triton.jit
def forward_layer_wide(
    rows,
    weights,
    biases,
    slopes,
    NET: tl.constexpr,
    LAYER: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """A layer from rows to rows, in tiles."""
    IN: tl.constexpr = NET[LAYER][0]
    OUT: tl.constexpr = NET[LAYER][1]
    W: tl.constexpr = NET[LAYER][2]
    B: tl.constexpr = NET[LAYER][3]
    X: tl.constexpr = NET[LAYER][4]
    Y: tl.constexpr = NET[LAYER][5]
    Z: tl.constexpr = NET[LAYER][6]
    DEPTH: tl.constexpr = NET[LAYER][11]
    COLUMNS: tl.constexpr = NET[LAYER][12]
    r = tl.arange(0, BLOCK)[:, None] * ROW
    k = tl.arange(0, DEPTH)
    beta = 0.0
    if ACTIVATION == "silu" and len(NET) - 1 > LAYER:
        beta = tl.load(slopes + LAYER)
    for first in range(0, OUT, COLUMNS):
        n = first + tl.arange(0, COLUMNS)[None, :]
        z = tl.load(biases + B + n) + tl.zeros((BLOCK, COLUMNS), ACC)
        for depth in range(0, IN, DEPTH):
            x = tl.load(rows + X + r + (depth + k)[None, :])
            w = tl.load(weights + W + (depth + k)[:, None] * OUT + n)
            z = tl.dot(x, w, z, input_precision="ieee", out_dtype=ACC)
        if len(NET) - 1 > LAYER:
            if Z >= 0:
                tl.store(rows + Z + r + n, z)
            z = activate(z, beta, ACTIVATION, SLOPE)
        tl.store(rows + Y + r + n, z)
    tl.debug_barrier()


@triton.jit
def evaluate(
    a,
    extra,
    rows,
    weights,
    biases,
    slopes,
    NET: tl.constexpr,
    NARROW: tl.constexpr,
    DP: tl.constexpr,
    EP: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """What a network makes of [a, extra], which the rows hold already."""
    if NARROW:
        x = a
        for layer in tl.static_range(len(NET)):
            x = forward_layer_narrow(
                x, extra, rows, weights, biases, slopes, NET, layer, DP, EP, ROW, BLOCK, ACTIVATION, SLOPE, ACC
            )
        return x
    else:
        for layer in tl.static_range(len(NET)):
            forward_layer_wide(rows, weights, biases, slopes, NET, layer, ROW, BLOCK, ACTIVATION, SLOPE, ACC)
        K: tl.constexpr = NET[len(NET) - 1][5]
        return tl.load(rows + K + tl.arange(0, BLOCK)[:, None] * ROW + tl.arange(0, DP)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def trajectory_forward(
    start,  # (B, D), the state before sub-step `first`
    starts,  # (N,), times of the sub-steps
    steps,  # (N,), their sizes
    control,  # (T-1, B, C) or None
    mask,  # (T, B) or None
    injected,  # (T, B, D) or None
    samples,  # (programs BLOCK,), the sample of each row or -1, or None
    groups,  # (programs,) or None
    weights,  # (P, WEIGHTS), packed, each layer (in, out)
    biases,  # (P, BIASES)
    slopes,  # (P, HIDDEN) or None
    correction_weights,  # (G, CORRECTION_WEIGHTS) or None
    correction_biases,  # (G, CORRECTION_BIASES) or None
    correction_slopes,  # (G, CORRECTION_HIDDEN) or None
    states,  # (T, B, D) or None
    norms,  # (T-1, B) or None
    energy,  # (T-1, B) or None
    checkpoints,  # (pieces, B, D) or None: the state before each piece of `piece` sub-steps
    rows,  # see row_of; or one for each stage's sample, used again and again, without KEEP; or None
    batch,
    first,
    last,
    substeps,
    parameter_sets,
    piece,
    sets,
    repeats,
    D: tl.constexpr,
    C: tl.constexpr,
    DP: tl.constexpr,
    EP: tl.constexpr,
    ROW: tl.constexpr,
    STATE_AT: tl.constexpr,
    NET: tl.constexpr,
    CORRECTION: tl.constexpr,
    SIZES: tl.constexpr,
    NODES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    SUM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    MAP: tl.constexpr,
    BY_TIME: tl.constexpr,
    KEEP: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    sample, exists = block_of(program, samples, batch, BLOCK)
    d = tl.arange(0, DP)[None, :]
    inside = exists & (d < D)
    at = sample * D + d
    r = tl.arange(0, BLOCK)[:, None]
    stages: tl.constexpr = len(NODES)
    if CORRECTION is not None:
        group = tl.load(groups + program)
        correction_weights += group * SIZES[3]
        correction_biases += group * SIZES[4]
        if correction_slopes is not None:
            correction_slopes += group * SIZES[5]

    y = tl.load(start + at, mask=inside, other=0.0)
    if states is not None:
        tl.store(states + at, y, mask=inside)
    norm = tl.zeros((BLOCK, 1), ACC)
    total_energy = tl.zeros((BLOCK, 1), ACC)
    for n in range(first, last):
        interval = (n // substeps).to(tl.int64)
        if checkpoints is not None:
            to = checkpoints + (n // piece).to(tl.int64) * batch * D + at
            tl.store(to, y, mask=inside & (n % piece == 0))
        if n % substeps == 0:
            norm = tl.zeros((BLOCK, 1), ACC)
            total_energy = tl.zeros((BLOCK, 1), ACC)
            if mask is not None:
                marked = tl.load(mask + interval * batch + sample, mask=exists, other=0) != 0
                y = tl.where(marked, tl.load(injected + interval * batch * D + at, mask=inside, other=0.0), y)
        t = tl.load(starts + n)
        h = tl.load(steps + n)
        which = (n % parameter_sets).to(tl.int64)
        base = rows
        if rows is not None:
            if KEEP:
                base = rows + row_of(n - first, program, programs, sets, repeats, stages, BLOCK, ROW)
            else:
                base = rows + program * (BLOCK * ROW)
        net_slopes = slopes
        if slopes is not None:
            net_slopes = slopes + which * SIZES[2]
        k0 = tl.zeros((BLOCK, DP), ACC)
        k1 = k0
        k2 = k0
        k3 = k0
        for i in range(stages):
            stage = y + h * combine(i, k0, k1, k2, k3, COLUMNS, ACC)
            a = map_state(stage, MAP)
            extra = a
            if EP > 0:
                time = t + pick(i, NODES, ACC) * h
                extra = load_extra(control, sample, exists, interval, batch, time, BLOCK, C, EP, ACC)
            if rows is not None:
                tl.store(base + r * ROW + d, a)
                if EP > 0:
                    tl.store(base + r * ROW + DP + tl.arange(0, EP)[None, :], extra)
                if MAP != "none":
                    tl.store(base + STATE_AT + r * ROW + d, stage)
                if not NARROW:
                    tl.debug_barrier()
            k = evaluate(
                a,
                extra,
                base,
                weights + which * SIZES[0],
                biases + which * SIZES[1],
                net_slopes,
                NET,
                NARROW,
                DP,
                EP,
                ROW,
                BLOCK,
                ACTIVATION,
                SLOPE,
                ACC,
            )
            if CORRECTION is not None:
                k += evaluate(
                    a,
                    extra,
                    base,
                    correction_weights,
                    correction_biases,
                    correction_slopes,
                    CORRECTION,
                    NARROW,
                    DP,
                    EP,
                    ROW,
                    BLOCK,
                    ACTIVATION,
                    SLOPE,
                    ACC,
                )
            k = tl.where(exists, k, 0.0)  # rows without a sample stay where they are, and finite
            k0 = tl.where(i == 0, k, k0)
            k1 = tl.where(i == 1, k, k1)
            k2 = tl.where(i == 2, k, k2)
            k3 = tl.where(i == 3, k, k3)
            if energy is not None:
                square = pick(i, WEIGHTS, ACC) * tl.sum(k * k, axis=1)[:, None]
                if BY_TIME:
                    square *= tl.abs(h)
                total_energy += square
            if rows is not None and KEEP:
                base += BLOCK * ROW
        change = h * combine(0, k0, k1, k2, k3, SUM, ACC)
        if norms is not None:
            norm += tl.sqrt(tl.sum(change * change, axis=1)[:, None])
        y += change
        if n % substeps == substeps - 1:
            if states is not None:
                tl.store(states + (interval + 1) * batch * D + at, y, mask=inside)
            if norms is not None:
                tl.store(norms + interval * batch + sample, norm, mask=exists)
            if energy is not None:
                tl.store(energy + interval * batch + sample, total_energy, mask=exists)


@triton.jit
def backward_layer_narrow(
    g,
    rows,
    adjoints,
    weights,
    slopes,
    NET: tl.constexpr,
    LAYER: tl.constexpr,
    ROW: tl.constexpr,
    ADJOINT_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """From the adjoint of what a layer puts out, before its activation, to that of the layer before."""
    IN: tl.constexpr = NET[LAYER][0]
    OUT: tl.constexpr = NET[LAYER][1]
    W: tl.constexpr = NET[LAYER][2]
    X: tl.constexpr = NET[LAYER][4]
    Z: tl.constexpr = NET[LAYER - 1][6]
    TO: tl.constexpr = NET[LAYER][8]
    SLOPE_AT: tl.constexpr = NET[LAYER][9]
    r = tl.arange(0, BLOCK)[:, None]
    n = tl.arange(0, IN)[None, :]
    w = tl.load(weights + W + tl.arange(0, OUT)[:, None] * IN + n)
    g = tl.dot(g, w, input_precision="ieee", out_dtype=ACC)
    h = tl.load(rows + X + r * ROW + n)
    z = h
    beta = 0.0
    if Z >= 0:
        z = tl.load(rows + Z + r * ROW + n)
    if ACTIVATION == "silu":
        beta = tl.load(slopes + LAYER - 1)
        if adjoints is not None:
            tl.store(adjoints + SLOPE_AT + r * ADJOINT_ROW, tl.sum(g * derive_slope(z, beta), axis=1)[:, None])
    g = derive(g, h, z, beta, ACTIVATION, SLOPE)
    if adjoints is not None:
        tl.store(adjoints + TO + r * ADJOINT_ROW + n, g)
    return g


@triton.jit
def derive_slope(z, beta):
    """The derivative of silu by its slope."""
    s = sigmoid(beta * z)
    return z * z * s * (1.0 - s)


@triton.jit
def backward_layer_wide(
    rows,
    adjoints,
    weights,
    slopes,
    NET: tl.constexpr,
    LAYER: tl.constexpr,
    ROW: tl.constexpr,
    ADJOINT_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The same from rows to rows, in tiles; of the first layer, to the adjoint of [a, extra]."""
    IN: tl.constexpr = NET[LAYER][0]
    OUT: tl.constexpr = NET[LAYER][1]
    W: tl.constexpr = NET[LAYER][2]
    X: tl.constexpr = NET[LAYER][4]
    Z: tl.constexpr = NET[LAYER - 1][6]
    FROM: tl.constexpr = NET[LAYER][7]
    TO: tl.constexpr = NET[LAYER][8]
    SLOPE_AT: tl.constexpr = NET[LAYER][9]
    DEPTH: tl.constexpr = NET[LAYER][12]
    COLUMNS: tl.constexpr = NET[LAYER][13]
    r = tl.arange(0, BLOCK)[:, None]
    k = tl.arange(0, DEPTH)
    beta = 0.0
    if ACTIVATION == "silu" and LAYER > 0:
        beta = tl.load(slopes + LAYER - 1)
    slope_sum = tl.zeros((BLOCK, 1), ACC)
    for first in range(0, IN, COLUMNS):
        n = first + tl.arange(0, COLUMNS)[None, :]
        g = tl.zeros((BLOCK, COLUMNS), ACC)
        for depth in range(0, OUT, DEPTH):
            above = tl.load(adjoints + FROM + r * ADJOINT_ROW + (depth + k)[None, :])
            w = tl.load(weights + W + (depth + k)[:, None] * IN + n)
            g = tl.dot(above, w, g, input_precision="ieee", out_dtype=ACC)
        if LAYER > 0:
            h = tl.load(rows + X + r * ROW + n)
            z = h
            if Z >= 0:
                z = tl.load(rows + Z + r * ROW + n)
            if ACTIVATION == "silu":
                slope_sum += tl.sum(g * derive_slope(z, beta), axis=1)[:, None]
            g = derive(g, h, z, beta, ACTIVATION, SLOPE)
        tl.store(adjoints + TO + r * ADJOINT_ROW + n, g)
    if ACTIVATION == "silu" and LAYER > 0:
        tl.store(adjoints + SLOPE_AT + r * ADJOINT_ROW, slope_sum)
    tl.debug_barrier()


@triton.jit
def pull_back(
    g,
    rows,
    adjoints,
    weights,
    slopes,
    NET: tl.constexpr,
    NARROW: tl.constexpr,
    DP: tl.constexpr,
    EP: tl.constexpr,
    ROW: tl.constexpr,
    ADJOINT_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The adjoints of a and extra (a again if there is none) from that of k, which the rows hold already."""
    LAST: tl.constexpr = len(NET) - 1
    d = tl.arange(0, DP)[None, :]
    if NARROW:
        for layer in tl.static_range(LAST):
            g = backward_layer_narrow(
                g,
                rows,
                adjoints,
                weights,
                slopes,
                NET,
                LAST - layer,
                ROW,
                ADJOINT_ROW,
                BLOCK,
                ACTIVATION,
                SLOPE,
                ACC,
            )
        IN: tl.constexpr = NET[0][0]
        OUT: tl.constexpr = NET[0][1]
        W: tl.constexpr = NET[0][2]
        at = weights + W + tl.arange(0, OUT)[:, None] * IN
        state = tl.dot(g, tl.load(at + d), input_precision="ieee", out_dtype=ACC)
        if EP > 0:
            w = tl.load(at + DP + tl.arange(0, EP)[None, :])
            return state, tl.dot(g, w, input_precision="ieee", out_dtype=ACC)
        else:
            return state, state
    else:
        for layer in tl.static_range(LAST + 1):
            backward_layer_wide(
                rows, adjoints, weights, slopes, NET, LAST - layer, ROW, ADJOINT_ROW, BLOCK, ACTIVATION, SLOPE, ACC
            )
        INPUT: tl.constexpr = NET[0][8]
        at = adjoints + INPUT + tl.arange(0, BLOCK)[:, None] * ADJOINT_ROW
        state = tl.load(at + d)
        if EP > 0:
            return state, tl.load(at + DP + tl.arange(0, EP)[None, :])
        else:
            return state, state


@triton.jit
def load_k(rows, at, NET: tl.constexpr, CORRECTION: tl.constexpr):
    """A stage from its rows: what the networks put out."""
    K: tl.constexpr = NET[len(NET) - 1][5]
    k = tl.load(rows + K + at)
    if CORRECTION is not None:
        K2: tl.constexpr = CORRECTION[len(CORRECTION) - 1][5]
        k += tl.load(rows + K2 + at)
    return k


@triton.jit(do_not_specialize=UNSPECIALIZED)
def trajectory_backward(
    adjoint,  # (B, D): of the state after sub-step last - 1 on entry, before sub-step `first` on return
    steps,  # (N,)
    grad_states,  # (T, B, D)
    grad_norms,  # (T-1, B) or None
    grad_energy,  # (T-1, B) or None
    mask,  # (T, B) or None
    samples,  # (programs BLOCK,) or None
    groups,  # (programs,) or None
    weights,  # (P, WEIGHTS), packed, each layer (out, in)
    slopes,  # (P, HIDDEN) or None
    correction_weights,  # (G, CORRECTION_WEIGHTS) or None
    correction_slopes,  # (G, CORRECTION_HIDDEN) or None
    grad_control,  # (T-1, B, C) or None: added to
    grad_injected,  # (T, B, D) or None: the last of T is not written
    time_sums,  # (N, programs, 2) or None: sums over the samples of the adjoints of a sub-step's start and size
    rows,  # of the forward
    adjoints,  # rows of the same number, or for one evaluation of each sample without KEEP, or None
    batch,
    first,
    last,
    substeps,
    parameter_sets,
    sets,
    repeats,
    D: tl.constexpr,
    C: tl.constexpr,
    DP: tl.constexpr,
    EP: tl.constexpr,
    ROW: tl.constexpr,
    STATE_AT: tl.constexpr,
    ADJOINT_ROW: tl.constexpr,
    NET: tl.constexpr,
    CORRECTION: tl.constexpr,
    SIZES: tl.constexpr,
    NODES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    MAP: tl.constexpr,
    BY_TIME: tl.constexpr,
    TIME_INPUT: tl.constexpr,
    KEEP: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    sample, exists = block_of(program, samples, batch, BLOCK)
    d = tl.arange(0, DP)[None, :]
    inside = exists & (d < D)
    at = sample * D + d
    r = tl.arange(0, BLOCK)[:, None]
    in_row = r * ROW + d
    stages: tl.constexpr = len(NODES)
    if CORRECTION is not None:
        group = tl.load(groups + program)
        correction_weights += group * SIZES[3]
        if correction_slopes is not None:
            correction_slopes += group * SIZES[5]

    state_bar = tl.load(adjoint + at, mask=inside, other=0.0)
    if EP > 0:
        c = tl.arange(0, EP)[None, :]
        control_bar = tl.zeros((BLOCK, EP), ACC)
    for back in range(first, last):
        n = last - 1 - (back - first)
        interval = (n // substeps).to(tl.int64)
        h = tl.load(steps + n)
        which = (n % parameter_sets).to(tl.int64)
        step_row = row_of(n - first, program, programs, sets, repeats, stages, BLOCK, 1)
        net_slopes = slopes
        if slopes is not None:
            net_slopes = slopes + which * SIZES[2]

        change_bar = state_bar
        if grad_norms is not None:
            change = tl.zeros((BLOCK, DP), ACC)
            for i in range(stages):
                change += pick(i, WEIGHTS, ACC) * load_k(rows + (step_row + i * BLOCK) * ROW, in_row, NET, CORRECTION)
            change = tl.where(exists, h * change, 0.0)
            length = tl.sqrt(tl.sum(change * change, axis=1)[:, None])
            norm_bar = tl.load(grad_norms + interval * batch + sample, mask=exists, other=0.0)
            change_bar += tl.where(length == 0, 0.0, norm_bar / tl.where(length == 0, 1.0, length) * change)
        if grad_energy is not None:
            energy_bar = tl.load(grad_energy + interval * batch + sample, mask=exists, other=0.0)
        step_bar = tl.zeros((BLOCK, 1), ACC)
        start_bar = tl.zeros((BLOCK, 1), ACC)
        g0 = tl.zeros((BLOCK, DP), ACC)
        g1 = g0
        g2 = g0
        g3 = g0
        for stage in range(stages):
            i = stages - 1 - stage
            base = rows + (step_row + i * BLOCK) * ROW
            scaled = pick(i, WEIGHTS, ACC) * change_bar + combine(i, g0, g1, g2, g3, COEFFICIENTS, ACC)
            k_bar = h * scaled
            if grad_energy is not None or time_sums is not None:
                k = tl.where(exists, load_k(base, in_row, NET, CORRECTION), 0.0)
                if grad_energy is not None:
                    squared_bar = pick(i, WEIGHTS, ACC) * energy_bar
                    if BY_TIME:
                        if time_sums is not None:
                            sign = tl.where(h < 0, -1.0, 1.0)
                            step_bar += sign * squared_bar * tl.sum(k * k, axis=1)[:, None]
                        squared_bar *= tl.abs(h)
                    k_bar += 2.0 * squared_bar * k
                if time_sums is not None:
                    step_bar += tl.sum(scaled * k, axis=1)[:, None]
            into = adjoints
            if adjoints is not None:
                if KEEP:
                    into = adjoints + (step_row + i * BLOCK) * ADJOINT_ROW
                else:
                    into = adjoints + program * (BLOCK * ADJOINT_ROW)
                tl.store(into + r * ADJOINT_ROW + d, k_bar)
                if not NARROW:
                    tl.debug_barrier()
            g, extra_bar = pull_back(
                k_bar,
                base,
                into,
                weights + which * SIZES[0],
                net_slopes,
                NET,
                NARROW,
                DP,
                EP,
                ROW,
                ADJOINT_ROW,
                BLOCK,
                ACTIVATION,
                SLOPE,
                ACC,
            )
            if CORRECTION is not None:
                g_too, extra_bar_too = pull_back(
                    k_bar,
                    base,
                    into,
                    correction_weights,
                    correction_slopes,
                    CORRECTION,
                    NARROW,
                    DP,
                    EP,
                    ROW,
                    ADJOINT_ROW,
                    BLOCK,
                    ACTIVATION,
                    SLOPE,
                    ACC,
                )
                g += g_too
                extra_bar += extra_bar_too
            if MAP != "none":
                g = derive_map(g, tl.load(base + STATE_AT + in_row), MAP)
            g = tl.where(exists, g, 0.0)
            g0 = tl.where(i == 0, g, g0)
            g1 = tl.where(i == 1, g, g1)
            g2 = tl.where(i == 2, g, g2)
            g3 = tl.where(i == 3, g, g3)
            state_bar += g
            if EP > 0:
                control_bar += extra_bar
                if TIME_INPUT:
                    time_bar = tl.sum(tl.where(c == C, extra_bar, 0.0), axis=1)[:, None]
                    start_bar += time_bar
                    step_bar += pick(i, NODES, ACC) * time_bar
        if time_sums is not None:
            sums = time_sums + (n.to(tl.int64) * programs + program) * 2
            tl.store(sums, tl.sum(tl.sum(tl.where(exists, start_bar, 0.0), axis=1), axis=0))
            tl.store(sums + 1, tl.sum(tl.sum(tl.where(exists, step_bar, 0.0), axis=1), axis=0))
        if EP > 0 and grad_control is not None:
            complete = (n % substeps == 0) | (n == first)
            there = exists & (c < C) & complete
            to = grad_control + (interval * batch + sample) * C + c
            tl.store(to, tl.load(to, mask=there, other=0.0) + control_bar, mask=there)
            control_bar = tl.where(complete, 0.0, control_bar)
        if n % substeps == 0:
            if mask is not None:
                marked = tl.load(mask + interval * batch + sample, mask=exists, other=0) != 0
                if grad_injected is not None:
                    tl.store(grad_injected + interval * batch * D + at, tl.where(marked, state_bar, 0.0), mask=inside)
                state_bar = tl.where(marked, 0.0, state_bar)
            state_bar += tl.load(grad_states + interval * batch * D + at, mask=inside, other=0.0)
    tl.store(adjoint + at, state_bar, mask=inside)


@triton.jit
def add_by_group(
    partial,  # (programs, size)
    bounds,  # (groups + 1,), where the programs of each group start
    total,  # (groups, size): added to
    size,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks = tl.cdiv(size, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    low = tl.load(bounds + group)
    high = tl.load(bounds + group + 1)
    result = tl.load(total + group * size + i, mask=i < size, other=0.0)
    for program in range(low, high):
        result += tl.load(partial + program * size + i, mask=i < size, other=0.0)
    tl.store(total + group * size + i, result, mask=i < size)


#: Whether Triton interprets the kernels on the CPU: TRITON_INTERPRET=1 when this module was imported.
INTERPRETED = not isinstance(trajectory_forward, triton.JITFunction)


def launch(device: torch.device, kernel: Any, programs: int, **arguments: Any) -> None:
    """Run ``programs`` programs of a kernel. All but torch's own functions goes through here."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**arguments)


def power_of_two(n: int) -> int:
    """The power of two from 16 that holds n."""
    return max(16, int(triton.next_power_of_2(n)))


def padded(width: int) -> int:
    """A hidden layer's width with zeros: a power of two from 16, then multiples of 64."""
    return power_of_two(width) if width <= 64 else -(-width // 64) * 64


def tile(size: int, largest: int) -> int:
    """The largest power of two that divides ``size``, up to ``largest``."""
    return min(size & -size, largest)


class Layer(NamedTuple):
    """What the kernels are told about a layer, all of it known when they are compiled; ``-1`` stands for nothing.

    Args:
        inputs, outputs: padded sizes.
        weight_at, bias_at: where it starts in the packed parameters.
        x_at, y_at, z_at: its input, output and pre-activation in a row.
        from_at, to_at: adjoints of its output before the activation and of its input before the activation of the layer
            before, in a row of adjoints.
        slope_at: that of the slope of the activation before it.
        width: outputs without padding.
        depth, columns: tiles of inputs and outputs.
        input_columns: tile of inputs in the backward, where it is a tile of results.
    """

    inputs: int
    outputs: int
    weight_at: int
    bias_at: int
    x_at: int
    y_at: int
    z_at: int
    from_at: int
    to_at: int
    slope_at: int
    width: int
    depth: int
    columns: int
    input_columns: int


class Cursor:
    """Hands out places in a row."""

    def __init__(self) -> None:
        self.at = 0

    def take(self, size: int) -> int:
        self.at += size
        return self.at - size


class Problem:
    """What the kernels are told about one call."""

    def __init__(self, tensors: Tensors, options: Options) -> None:
        self.tensors, self.options = tensors, options
        y0 = tensors.y0
        self.device, self.dtype = y0.device, y0.dtype
        self.batch, self.dim = (int(n) for n in y0.shape)
        self.intervals = int(tensors.t.shape[0]) - 1
        self.substeps = self.intervals * options.substeps
        self.controls = 0 if tensors.control is None else int(tensors.control.shape[2])
        self.extras = self.controls + options.time_input
        self.dp = power_of_two(self.dim)
        self.ep = power_of_two(self.extras) if self.extras else 0
        self.tableau = TABLEAUX[options.method]
        self.parameter_sets = int(tensors.weights[0].shape[0])
        self.groups = int(tensors.correction_weights[0].shape[0]) if tensors.group is not None else 0
        networks = [tensors.weights, tensors.correction_weights] if self.groups else [tensors.weights]
        widths = [padded(int(w.shape[1])) for weights in networks for w in weights[:-1]]
        self.narrow = max([self.dp, self.ep, *widths]) * self.dtype.itemsize <= NARROW
        self.block = self._block()
        self.programs = -(-self.batch // self.block)
        if self.groups:  # a group's last block may be partly filled
            filled = (self.batch + min(self.groups, self.batch) * (self.block - 1)) // self.block
            self.programs = min(self.batch, filled)
        self._lay_out(networks)

    def _block(self) -> int:
        """Samples in a block: the more, the fewer times weights are read; but all of the GPU should have some."""
        for block in (64, 32):
            if block * self.dp * self.dtype.itemsize <= 8192 and self.batch >= block * ENOUGH_PROGRAMS:
                return block
        return 16

    def _lay_out(self, networks: Sequence[Sequence[Tensor]]) -> None:
        """Places in rows, rows of adjoints, and packed parameters."""
        saves_z = self.options.activation in ("silu", "sin")
        row, adjoint = Cursor(), Cursor()
        row.take(self.dp + self.ep)
        adjoint.take(self.dp)
        self.networks: list[tuple[Layer, ...]] = []
        self.sizes: list[tuple[int, int, int]] = []  # of packed weights, biases and slopes
        for weights in networks:
            packed_weights, packed_biases = Cursor(), Cursor()
            layers: list[Layer] = []
            last = len(weights) - 1
            inputs, x_at = self.dp + self.ep, 0
            to_at = -1 if self.narrow else adjoint.take(inputs)
            slopes_at = adjoint.take(-(-last // 16) * 16) if self.options.activation == "silu" else -1
            for i, w in enumerate(weights):
                width = int(w.shape[1])
                outputs = self.dp if i == last else padded(width)
                y_at = row.take(outputs)
                z_at = row.take(outputs) if saves_z and i < last else -1
                from_at = 0 if i == last else adjoint.take(outputs)
                layers.append(
                    Layer(
                        inputs,
                        outputs,
                        packed_weights.take(inputs * outputs),
                        packed_biases.take(outputs),
                        x_at,
                        y_at,
                        z_at,
                        from_at,
                        to_at,
                        slopes_at + i - 1 if slopes_at >= 0 and i > 0 else -1,
                        width,
                        tile(inputs, 32),
                        tile(outputs, 64),
                        tile(inputs, 64),
                    )
                )
                inputs, x_at, to_at = outputs, y_at, from_at
            self.networks.append(tuple(layers))
            self.sizes.append((packed_weights.at, packed_biases.at, last))
        self.state_at = row.take(self.dp) if self.options.input_map != "none" else -1
        self.row, self.adjoint_row = row.at, adjoint.at

    def constants(self) -> dict[str, Any]:
        """What both kernels are compiled for."""
        options, tableau = self.options, self.tableau
        return {
            "D": self.dim,
            "C": self.controls,
            "DP": self.dp,
            "EP": self.ep,
            "ROW": self.row,
            "STATE_AT": self.state_at,
            "NET": tuple(map(tuple, self.networks[0])),
            "CORRECTION": tuple(map(tuple, self.networks[1])) if self.groups else None,
            "SIZES": sum(self.sizes, ()),
            "NODES": tableau.c,
            "WEIGHTS": tableau.b,
            "ACTIVATION": options.activation,
            "SLOPE": options.slope,
            "MAP": options.input_map,
            "BY_TIME": options.energy == "time",
            "NARROW": self.narrow,
            "BLOCK": self.block,
            "ACC": ACCUMULATOR[self.dtype],
            "num_warps": min(16, max(self.block // 4, self.block * self.dp // 1024)),
        }

    def piece(self) -> int:
        """Sub-steps whose rows are kept at a time: all, or what fits max_memory together with the rows of adjoints."""
        itemsize = self.dtype.itemsize * self.programs * self.block * self.tableau.stages
        rows, adjoints = self.row * itemsize, self.adjoint_row * itemsize
        if self.rows_shape(self.substeps)[0] * self.rows_shape(self.substeps)[2] * rows <= self.options.max_memory:
            return self.substeps
        piece = max(1, min(self.substeps, self.options.max_memory // (rows + adjoints)))
        return piece - piece % self.parameter_sets if piece > self.parameter_sets else piece

    def rows_shape(self, substeps: int) -> tuple[int, int, int, int]:
        """(weight sets, programs, sub-steps of each set, samples of all stages of a sub-step) of a piece."""
        sets = min(self.parameter_sets, substeps)
        return sets, self.programs, -(-substeps // sets), self.tableau.stages * self.block

    def new_rows(self, substeps: int, row: int) -> Tensor:
        """Rows of a piece, with zeros where its length leaves sub-steps of some sets out."""
        sets, programs, repeats, samples = self.rows_shape(substeps)
        make = torch.empty if sets * repeats == substeps else torch.zeros
        return make((sets, programs, repeats * samples, row), dtype=self.dtype, device=self.device)

    def saved_shape(self) -> tuple[int, ...]:
        """Of what the forward keeps: all rows, or the state before each piece."""
        if self.piece() == self.substeps:
            sets, programs, repeats, samples = self.rows_shape(self.substeps)
            return sets, programs, repeats * samples, self.row
        return triton.cdiv(self.substeps, self.piece()), self.batch, self.dim

    def scratch(self, row: int) -> Tensor:
        """A row for each sample of a block."""
        return torch.empty((self.programs, self.block, row), dtype=self.dtype, device=self.device)


class Prepared(NamedTuple):
    """A problem's tensors as the kernels take them."""

    common: dict[str, Any]
    starts: Tensor
    bounds: Tensor | None


def prepare(p: Problem, transposed: bool) -> Prepared:
    """Contiguous tensors, packed parameters, times of the sub-steps, samples by group."""
    tensors, options = p.tensors, p.options
    t = tensors.t.double()
    h = (t[1:] - t[:-1]) / options.substeps
    starts = t[:-1, None] + torch.arange(options.substeps, dtype=t.dtype, device=t.device) * h[:, None]
    samples = owners = bounds = None
    if tensors.group is not None:
        samples, owners, bounds = blocks_of_groups(p, tensors.group)
    silu = options.activation == "silu"
    common: dict[str, Any] = {
        "steps": h[:, None].expand(-1, options.substeps).reshape(-1).to(tensors.y0.dtype),
        "mask": contiguous(tensors.mask),
        "samples": samples,
        "groups": owners,
        "weights": pack_weights(p, tensors.weights, p.networks[0], transposed),
        "slopes": slopes_of(tensors.slopes, tensors.weights) if silu else None,
        "correction_weights": None,
        "correction_slopes": None,
        "batch": p.batch,
        "substeps": options.substeps,
        "parameter_sets": p.parameter_sets,
        **p.constants(),
    }
    if p.groups:
        common["correction_weights"] = pack_weights(p, tensors.correction_weights, p.networks[1], transposed)
        if silu:
            common["correction_slopes"] = slopes_of(tensors.correction_slopes, tensors.correction_weights)
    return Prepared(common, starts.reshape(-1).to(tensors.y0.dtype), bounds)


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.resolve_neg().contiguous()


def slopes_of(slopes: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
    """Slopes of silu (sets, hidden layers), 1 where there are none."""
    if slopes is None:
        return weights[0].new_ones((weights[0].shape[0], max(1, len(weights) - 1)))
    return slopes.resolve_neg().contiguous()


def pack_weights(p: Problem, weights: Sequence[Tensor], layers: Sequence[Layer], transposed: bool) -> Tensor:
    """All layers (sets, size), each (out, in) or ``transposed``, and zeros in between."""
    size = layers[-1].weight_at + layers[-1].inputs * layers[-1].outputs
    packed = weights[0].new_zeros((weights[0].shape[0], size))
    for i, (w, layer) in enumerate(zip(weights, layers, strict=True)):
        place = packed[:, layer.weight_at : layer.weight_at + layer.inputs * layer.outputs]
        if transposed:
            place = place.unflatten(1, (layer.inputs, layer.outputs)).mT
        else:
            place = place.unflatten(1, (layer.outputs, layer.inputs))
        place = place[:, : layer.width]
        if i == 0:
            place[:, :, : p.dim] = w[:, :, : p.dim]
            place[:, :, p.dp : p.dp + p.extras] = w[:, :, p.dim :]
        else:
            place[:, :, : w.shape[2]] = w
    return packed


def pack_biases(biases: Sequence[Tensor], layers: Sequence[Layer]) -> Tensor:
    packed = biases[0].new_zeros((biases[0].shape[0], layers[-1].bias_at + layers[-1].outputs))
    for b, layer in zip(biases, layers, strict=True):
        packed[:, layer.bias_at : layer.bias_at + layer.width] = b
    return packed


def blocks_of_groups(p: Problem, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of each block, sorted by group, -1 for none; each block's group; and each group's first block.

    Blocks that no group needs have no samples. All of it is found out on the device, which is not waited for.
    """
    group, order = group.clamp(0, p.groups - 1).sort(stable=True)
    edges = torch.searchsorted(group, torch.arange(p.groups + 1, device=p.device))
    bounds = ((edges[1:] - edges[:-1] + (p.block - 1)) // p.block).cumsum(0)
    program = torch.arange(p.programs, device=p.device)
    owner = torch.searchsorted(bounds, program, right=True).clamp(max=p.groups - 1)
    bounds = torch.nn.functional.pad(bounds, (1, 0))
    place = edges[owner] + (program - bounds[owner]) * p.block
    place = place[:, None] + torch.arange(p.block, device=p.device)
    exists = place < edges[owner + 1][:, None]
    samples = torch.where(exists, order[place.clamp(max=p.batch - 1)], -1)
    return samples.reshape(-1), owner, bounds


def forward(tensors: Tensors, options: Options, save: bool) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """States, norms, energy and what the backward needs; see ``op.py``."""
    tensors = stacked(tensors)
    states, norms, energy = empty_results(tensors, options)
    if states.numel() == 0 or states.shape[0] == 1:
        states.copy_(tensors.y0)
        return states, norms, energy, []
    p = Problem(tensors, options)
    whole = p.piece() == p.substeps
    rows = p.new_rows(p.substeps, p.row) if save and whole else None
    checkpoints = None
    if save and not whole:
        checkpoints = states.new_empty(p.saved_shape())
    start = tensors.y0.resolve_neg().contiguous()
    run_forward(
        p,
        prepare(p, transposed=True),
        start,
        0,
        p.substeps,
        rows,
        states=states,
        norms=norms if options.norms else None,
        energy=energy if options.energy != "none" else None,
        checkpoints=checkpoints,
    )
    if options.validate:
        reference.check_finite(states)
    return states, norms, energy, [t for t in (rows, checkpoints) if t is not None]


def run_forward(
    p: Problem,
    prepared: Prepared,
    start: Tensor,
    first: int,
    last: int,
    rows: Tensor | None,
    *,
    states: Tensor | None = None,
    norms: Tensor | None = None,
    energy: Tensor | None = None,
    checkpoints: Tensor | None = None,
) -> None:
    """Sub-steps first to last - 1 from the state ``start``; ``rows`` are those to keep."""
    tensors, tableau = p.tensors, p.tableau
    sets, _, repeats, _ = p.rows_shape(last - first)
    columns = tuple(tuple(row[j] if j < len(row) else 0.0 for row in tableau.a) for j in range(tableau.stages))
    launch(
        p.device,
        trajectory_forward,
        p.programs,
        **prepared.common,
        start=start,
        starts=prepared.starts,
        control=contiguous(tensors.control),
        injected=contiguous(tensors.injected),
        biases=pack_biases(tensors.biases, p.networks[0]),
        correction_biases=pack_biases(tensors.correction_biases, p.networks[1]) if p.groups else None,
        states=states,
        norms=norms,
        energy=energy,
        checkpoints=checkpoints,
        rows=rows if rows is not None or p.narrow else p.scratch(p.row),
        first=first,
        last=last,
        piece=p.piece(),
        sets=sets,
        repeats=repeats,
        COLUMNS=columns,
        SUM=tuple((b,) for b in tableau.b),
        KEEP=rows is not None,
    )


def saved_fake(tensors: Tensors, options: Options) -> list[Tensor]:
    """Empty tensors like what the forward saves."""
    if tensors.y0.numel() == 0 or tensors.t.shape[0] == 1:
        return []
    return [tensors.y0.new_empty(Problem(stacked(tensors), options).saved_shape())]


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
    """The gradients of :func:`pykernels.ops.latent_ode.op.differentiable`; see ``op.py``."""
    gradients = empty_gradients(tensors, needed)
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()  # nearly all are added to
    if states.numel() == 0 or states.shape[0] == 1:
        if gradients[0] is not None:
            gradients[0].copy_(grad_states.sum(0))
        return gradients
    p = Problem(stacked(tensors), options)
    if [t.shape for t in saved] != [p.saved_shape()]:
        raise ValueError(
            f"saved must be one tensor of shape {p.saved_shape()}, got {[tuple(t.shape) for t in saved]}; "
            "call pykernels.mlp_odeint rather than the raw operator"
        )
    grad_norms = grad_norms if options.norms else None
    grad_energy = grad_energy if options.energy != "none" else None
    Backward(p, tensors, gradients).run(grad_states, grad_norms, grad_energy, saved[0])
    return gradients


class Backward:
    """One backward: the gradients it writes, and the pieces of the trajectory they come from."""

    def __init__(self, p: Problem, tensors: Tensors, gradients: Sequence[Tensor | None]) -> None:
        self.p = p
        found = list(gradients)
        self.y0, self.t, self.slopes, self.control, self.correction_slopes, self.injected = found[:6]
        if tensors.weights[0].dim() == 2:
            shared = slice(6, 6 + 2 * len(tensors.weights))
            found[shared] = [None if g is None else g.unsqueeze(0) for g in found[shared]]
        parts, at = [], 6
        for count in map(len, tensors[6:10]):
            parts.append(found[at : at + count])
            at += count
        self.weights, self.biases, self.correction_weights, self.correction_biases = parts
        self.of_parameters = any(g is not None for g in (self.slopes, self.correction_slopes, *found[6:]))

    def run(self, grad_states: Tensor, grad_norms: Tensor | None, grad_energy: Tensor | None, saved: Tensor) -> None:
        p = self.p
        grad_states = grad_states.resolve_neg().contiguous()
        adjoint = grad_states[-1].clone() if self.y0 is None else self.y0.copy_(grad_states[-1])
        prepared = prepare(p, transposed=False)
        whole = p.piece() == p.substeps
        again = None if whole else prepare(p, transposed=True)
        time_sums = None
        if self.t is not None:
            time_sums = adjoint.new_empty((p.substeps, p.programs, 2))
        for first in reversed(range(0, p.substeps, p.piece())):
            last = min(first + p.piece(), p.substeps)
            if again is None:
                rows = saved
            else:
                rows = p.new_rows(last - first, p.row)
                run_forward(p, again, saved[first // p.piece()], first, last, rows)
            adjoints = None
            if self.of_parameters:
                adjoints = p.new_rows(last - first, p.adjoint_row)
            elif not p.narrow:
                adjoints = p.scratch(p.adjoint_row)
            sets, _, repeats, _ = p.rows_shape(last - first)
            tableau = p.tableau
            launch(
                p.device,
                trajectory_backward,
                p.programs,
                **prepared.common,
                adjoint=adjoint,
                grad_states=grad_states,
                grad_norms=contiguous(grad_norms),
                grad_energy=contiguous(grad_energy),
                grad_control=self.control,
                grad_injected=self.injected,
                time_sums=time_sums,
                rows=rows,
                adjoints=adjoints,
                first=first,
                last=last,
                sets=sets,
                repeats=repeats,
                ADJOINT_ROW=p.adjoint_row,
                COEFFICIENTS=tuple(row + (0.0,) * (tableau.stages - len(row)) for row in tableau.a),
                TIME_INPUT=p.options.time_input,
                KEEP=self.of_parameters,
            )
            if adjoints is not None and self.of_parameters:
                self._add_parameters(rows, adjoints, first, prepared.bounds)
        if self.t is not None and time_sums is not None:
            self._add_times(self.t, time_sums)

    def _add_times(self, grad: Tensor, sums: Tensor) -> None:
        """Sub-step j of interval i starts at t[i] + j h and has size h = (t[i+1] - t[i]) / substeps."""
        substeps = self.p.options.substeps
        start, size = sums.sum(1, dtype=torch.float64).unflatten(0, (-1, substeps)).unbind(2)
        j = torch.arange(substeps, dtype=torch.float64, device=grad.device)
        by_size = (size + j * start).sum(1) / substeps
        grad[:-1] += start.sum(1) - by_size
        grad[1:] += by_size

    def _add_parameters(self, rows: Tensor, adjoints: Tensor, first: int, bounds: Tensor | None) -> None:
        """Add what the rows of a piece that starts at this sub-step give for weights, biases and slopes."""
        p = self.p
        networks = [(self.weights, self.biases, self.slopes)]
        if p.groups:
            networks.append((self.correction_weights, self.correction_biases, self.correction_slopes))
        for which, (weights, biases, slopes) in enumerate(networks):
            by_group = bounds if which == 1 else None
            for i, (layer, weight, bias) in enumerate(zip(p.networks[which], weights, biases, strict=True)):
                z_bar = adjoints[..., layer.from_at : layer.from_at + layer.width]
                if weight is not None:
                    x = rows[..., layer.x_at : layer.x_at + (layer.inputs if i == 0 else weight.shape[2])]
                    product = self._product(z_bar, x, by_block=by_group is not None)
                    if i == 0:
                        product = torch.cat((product[..., : p.dim], product[..., p.dp : p.dp + p.extras]), -1)
                    self._add(weight, product, first, by_group)
                if bias is not None:
                    self._add(bias, z_bar.sum(2), first, by_group)
            if slopes is not None and slopes.numel():
                at = p.networks[which][1].slope_at
                self._add(slopes, adjoints[..., at : at + slopes.shape[1]].sum(2), first, by_group)

    def _product(self, z_bar: Tensor, x: Tensor, by_block: bool) -> Tensor:
        """(sets, programs or 1, out, in): the sum over rows of z_bar times x."""
        sets, programs, _, outputs = z_bar.shape
        if not by_block and sets * programs * outputs * x.shape[3] > PARTIAL_SUMS:
            programs = 1
            z_bar, x = z_bar.flatten(1, 2), x.flatten(1, 2)
        else:
            z_bar, x = z_bar.flatten(0, 1), x.flatten(0, 1)
        product: Tensor = torch.bmm(z_bar.mT, x).unflatten(0, (sets, programs))
        return product

    def _add(self, grad: Tensor, parts: Tensor, first: int, bounds: Tensor | None) -> None:
        """Add (sets, programs, ...) to a gradient, for the set of each sub-step or the group of each program."""
        p = self.p
        if bounds is None:
            parts = parts.sum(1)
            low = first % p.parameter_sets
            before_wrap = min(parts.shape[0], p.parameter_sets - low)
            grad[low : low + before_wrap] += parts[:before_wrap]
            if before_wrap < parts.shape[0]:
                grad[: parts.shape[0] - before_wrap] += parts[before_wrap:]
            return
        partial = parts.sum(0).contiguous()
        size = grad[0].numel()
        launch(
            p.device,
            add_by_group,
            p.groups * triton.cdiv(size, 128),
            partial=partial,
            bounds=bounds,
            total=grad,
            size=size,
            BLOCK=128,
            ACC=ACCUMULATOR[p.dtype],
        )
