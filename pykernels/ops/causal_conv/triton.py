"""Causal convolution for GPUs, in Triton; README.md has the equations and the tiling.

One row of the result is one channel, one column one sample of time, and a program computes a tile of both:

              columns: time, or the packed sequences one after the other
            +-------+-------+-------+
      rows  |       | tile  |       |   tile[row, t] = sum over r of weight[row, r] source[r, t -+ shift(r)]
            +-------+-------+-------+

where r runs over the pairs (channel, tap) of the row's group, taps fastest, as they lie in the weight. With enough rows
and pairs the sum is a product of matrices (``tl.dot``) whose second factor is gathered from x through masks: no padded
copy, no unfolded copy. Otherwise (depthwise, few channels) it is accumulated pair by pair.

Tiles of packed sequences may hold several of them: every column looks up its own sequence in ``cu_seqlens``. Offsets
and lengths are clamped as they are read, so that wrong ones cannot reach outside a tensor.

The gradient of the weight is a sum over all columns. A fixed number of runs of tiles, which depends on the sizes alone,
makes partial sums that a last kernel adds in order: no atomics, the same bits every time.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pykernels.ops._triton_math import sigmoid, tanh
from pykernels.ops.causal_conv.op import empty_gradients
from pykernels.ops.causal_conv.reference import Options

#: Programs that are enough for a GPU: tiles are made smaller, and sums over time split, to reach them.
ENOUGH_PROGRAMS = 512
#: Sizes from here on are indexed with 64 bits.
INT32_LIMIT = 2**31
ACCUMULATOR = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
}
OPERAND = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):
    """act(z). NaN stays NaN: comparisons choose z itself when they fail."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z <= 0, z * NEGATIVE_SLOPE, z)
    elif ACTIVATION == "tanh":
        return tanh(z)
    elif ACTIVATION == "silu":
        return z * sigmoid(z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    else:
        return z


@triton.jit
def derive(g, saved, ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):
    """g act'(z), where saved is act(z) for relu, leaky_relu and tanh, and z for silu and gelu."""
    if ACTIVATION == "relu":
        return tl.where(saved <= 0, 0.0, g)
    elif ACTIVATION == "leaky_relu":
        return tl.where(saved > 0, g, g * NEGATIVE_SLOPE)
    elif ACTIVATION == "tanh":
        return g * (1.0 - saved * saved)
    elif ACTIVATION == "silu":
        s = sigmoid(saved)
        return g * s * (1.0 + saved * (1.0 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(saved * 0.7071067811865476))
        return g * (cdf + saved * tl.exp(-0.5 * saved * saved) * 0.3989422804014327)
    else:
        return g


@triton.jit
def rows_of(block, per_group, channels, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """Rows (BLOCK, 1) of a block, which of them exist, and their group: one for all with DOT, else (BLOCK, 1)."""
    lane = tl.arange(0, BLOCK)[:, None]
    if DOT:
        blocks = tl.cdiv(per_group, BLOCK)
        group = block // blocks
        local = (block % blocks) * BLOCK + lane
        return group * per_group + local, local < per_group, group
    else:
        row = block * BLOCK + lane
        return row, row < channels, row // per_group


@triton.jit
def bounds(sequence, cu_seqlens, lengths, length, INDEX: tl.constexpr):
    """Where a sequence starts and ends on the time axis."""
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + sequence).to(INDEX)
        end = tl.load(cu_seqlens + sequence + 1).to(INDEX)
        start = tl.minimum(tl.maximum(start, 0), length)
        return start, tl.minimum(tl.maximum(end, start), length)
    elif lengths is not None:
        end = tl.load(lengths + sequence)
        return sequence * 0, tl.minimum(tl.maximum(end, 0), length).to(INDEX)
    else:
        return sequence * 0, sequence * 0 + length


@triton.jit
def sequence_at(b, t, cu_seqlens, lengths, length, sequences, search_steps, INDEX: tl.constexpr):
    """The sequence of the columns t (1, BLOCK) with its start, never after t, and its end."""
    if cu_seqlens is not None:
        low = t * 0  # the last sequence that starts at or before t
        high = low + (sequences - 1)
        for _ in range(search_steps):
            middle = (low + high + 1) // 2
            right = tl.load(cu_seqlens + middle) <= t
            low = tl.where(right, middle, low)
            high = tl.where(right, high, middle - 1)
        start, end = bounds(low, cu_seqlens, lengths, length, INDEX)
        return low, tl.minimum(start, t), end
    else:
        start, end = bounds(b, cu_seqlens, lengths, length, INDEX)
        return b, start, end


@triton.jit
def load_x(x, state, b, sequence, channel, position, start, mask, stride_b, stride_c, stride_t, channels, reach):
    """x at a position on the time axis, the state's sample where that lies before the start, 0 where there is none."""
    inside = mask & (position >= start)
    value = tl.load(x + b * stride_b + channel * stride_c + position * stride_t, mask=inside, other=0.0)
    if state is not None:
        past = reach + position - start
        earlier = tl.load(state + (sequence * channels + channel) * reach + past, mask=mask & (past < reach), other=0.0)
        value = tl.where(inside, value, earlier)
    return value


@triton.jit
def load_dz(
    grad_y,
    saved,
    b,
    channel,
    t,
    mask,
    stride_b,
    stride_c,
    stride_t,
    channels,
    length,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """grad_y act'(z), 0 outside the mask."""
    g = tl.load(grad_y + b * stride_b + channel * stride_c + t * stride_t, mask=mask, other=0.0).to(ACC)
    if ACTIVATION != "none":
        s = tl.load(saved + (b * channels + channel) * length + t, mask=mask, other=0.0).to(ACC)
        g = derive(g, s, ACTIVATION, NEGATIVE_SLOPE)
    return g


@triton.jit
def causal_conv1d_forward(
    x,  # (B, C, T)
    weight,  # (O, C / groups, K)
    bias,  # (O,) or None
    residual,  # (B, O, T) or None
    state,  # (sequences, C, reach) or None
    cu_seqlens,  # (sequences + 1,) or None
    lengths,  # (B,) or None
    y,  # (B, O, T)
    saved,  # (B, O, T) or None
    x_stride_b,
    x_stride_c,
    x_stride_t,
    residual_stride_b,
    residual_stride_c,
    residual_stride_t,
    in_channels,
    out_channels,
    in_per_group,
    out_per_group,
    length,
    sequences,
    search_steps,
    dilation,
    reach,
    tiles,
    row_blocks,
    KERNEL_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    RESIDUAL_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DOT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    program = tl.program_id(0).to(INDEX)
    row, exists, group = rows_of(program % row_blocks, out_per_group, out_channels, ROWS, DOT)
    tile = program // row_blocks
    b = tile // tiles
    t = (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sequence, start, end = sequence_at(b, t, cu_seqlens, lengths, length, sequences, search_steps, INDEX)
    valid = t < end
    pairs = in_per_group * KERNEL_SIZE

    z = tl.zeros((ROWS, COLUMNS), ACC)
    if DOT:
        for first in range(0, pairs, DEPTH):
            r = first + tl.arange(0, DEPTH)
            w = tl.load(weight + row * pairs + r[None, :], mask=exists & (r < pairs)[None, :], other=0.0)
            r = r[:, None].to(INDEX)
            channel = group * in_per_group + r // KERNEL_SIZE
            position = t - (KERNEL_SIZE - 1 - r % KERNEL_SIZE) * dilation
            value = load_x(
                x,
                state,
                b,
                sequence,
                channel,
                position,
                start,
                valid & (r < pairs),
                x_stride_b,
                x_stride_c,
                x_stride_t,
                in_channels,
                reach,
            )
            z = tl.dot(w.to(OPERAND), value.to(OPERAND), z, input_precision=PRECISION, out_dtype=ACC)
    else:
        for r in range(pairs):
            w = tl.load(weight + row * pairs + r, mask=exists, other=0.0).to(ACC)
            channel = group * in_per_group + r // KERNEL_SIZE
            position = t - (KERNEL_SIZE - 1 - r % KERNEL_SIZE) * dilation
            value = load_x(
                x,
                state,
                b,
                sequence,
                channel,
                position,
                start,
                valid & exists,
                x_stride_b,
                x_stride_c,
                x_stride_t,
                in_channels,
                reach,
            )
            z += w * value.to(ACC)

    if bias is not None:
        z += tl.load(bias + row, mask=exists, other=0.0).to(ACC)
    if residual is not None:
        at = residual + b * residual_stride_b + row * residual_stride_c + t * residual_stride_t
        added = tl.load(at, mask=exists & valid, other=0.0).to(ACC)
        if RESIDUAL_FIRST:
            z += added
    h = activate(z, ACTIVATION, NEGATIVE_SLOPE)
    at = (b * out_channels + row) * length + t
    written = exists & (t < length)
    if saved is not None:
        if ACTIVATION == "silu" or ACTIVATION == "gelu":
            tl.store(saved + at, tl.where(valid, z, 0.0), mask=written)
        else:
            tl.store(saved + at, tl.where(valid, h, 0.0), mask=written)
    if residual is not None and not RESIDUAL_FIRST:
        h += added
    tl.store(y + at, tl.where(valid, h, 0.0), mask=written)


@triton.jit
def causal_conv1d_backward_input(
    grad_y,  # (B, O, T)
    saved,  # (B, O, T) or None
    weight,  # (O, C / groups, K)
    cu_seqlens,  # (sequences + 1,) or None
    lengths,  # (B,) or None
    grad,  # of x, (B, C, T), or with OF_STATE of the state, (sequences, C, reach): contiguous
    grad_stride_b,
    grad_stride_c,
    grad_stride_t,
    in_channels,
    out_channels,
    in_per_group,
    out_per_group,
    length,
    sequences,
    search_steps,
    dilation,
    reach,
    tiles,
    row_blocks,
    KERNEL_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    OF_STATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DOT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """grad[row, t] = sum over (o, k) of the row's group of weight[o, row, k] dz[o, t + (K-1-k) dilation]."""
    program = tl.program_id(0).to(INDEX)
    row, exists, group = rows_of(program % row_blocks, in_per_group, in_channels, ROWS, DOT)
    local = row - group * in_per_group
    tile = program // row_blocks
    outer = tile // tiles
    column = (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if OF_STATE:  # the samples before the start, one sequence after the other
        span = reach
        start, end = bounds(outer, cu_seqlens, lengths, length, INDEX)
        t = start - reach + column
        b = outer
        if cu_seqlens is not None:
            b = outer * 0
    else:
        span = length
        b = outer
        t = column
        _, start, end = sequence_at(b, t, cu_seqlens, lengths, length, sequences, search_steps, INDEX)
    inside = column < span
    pairs = out_per_group * KERNEL_SIZE

    total = tl.zeros((ROWS, COLUMNS), ACC)
    if DOT:
        for first in range(0, pairs, DEPTH):
            r = first + tl.arange(0, DEPTH)
            o = group * out_per_group + r // KERNEL_SIZE
            at = (o * in_per_group)[None, :] * KERNEL_SIZE + (r % KERNEL_SIZE)[None, :] + local * KERNEL_SIZE
            w = tl.load(weight + at, mask=exists & (r < pairs)[None, :], other=0.0)
            r = r[:, None].to(INDEX)
            source = t + (KERNEL_SIZE - 1 - r % KERNEL_SIZE) * dilation
            dz = load_dz(
                grad_y,
                saved,
                b,
                group * out_per_group + r // KERNEL_SIZE,
                source,
                inside & (r < pairs) & (source >= start) & (source < end),
                grad_stride_b,
                grad_stride_c,
                grad_stride_t,
                out_channels,
                length,
                ACTIVATION,
                NEGATIVE_SLOPE,
                ACC,
            )
            total = tl.dot(w.to(OPERAND), dz.to(OPERAND), total, input_precision=PRECISION, out_dtype=ACC)
    else:
        for r in range(pairs):
            o = group * out_per_group + r // KERNEL_SIZE
            at = (o * in_per_group + local) * KERNEL_SIZE + r % KERNEL_SIZE
            w = tl.load(weight + at, mask=exists, other=0.0).to(ACC)
            source = t + (KERNEL_SIZE - 1 - r % KERNEL_SIZE) * dilation
            dz = load_dz(
                grad_y,
                saved,
                b,
                o,
                source,
                inside & exists & (source >= start) & (source < end),
                grad_stride_b,
                grad_stride_c,
                grad_stride_t,
                out_channels,
                length,
                ACTIVATION,
                NEGATIVE_SLOPE,
                ACC,
            )
            total += w * dz
    tl.store(grad + (outer * in_channels + row) * span + column, total, mask=exists & inside)


@triton.jit
def causal_conv1d_backward_weight(
    grad_y,  # (B, O, T)
    saved,  # (B, O, T) or None
    x,  # (B, C, T)
    state,  # (sequences, C, reach) or None
    cu_seqlens,  # (sequences + 1,) or None
    lengths,  # (B,) or None
    weight_sums,  # (runs, O, C / groups * K) or None
    bias_sums,  # (runs, O) or None
    grad_stride_b,
    grad_stride_c,
    grad_stride_t,
    x_stride_b,
    x_stride_c,
    x_stride_t,
    in_channels,
    out_channels,
    in_per_group,
    out_per_group,
    length,
    sequences,
    search_steps,
    dilation,
    reach,
    tiles,
    all_tiles,
    tiles_per_run,
    row_blocks,
    pair_blocks,
    KERNEL_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Sums over a run of tiles: of dz[o, t] x[c, t - (K-1-k) dilation] for pairs (c, k), and of dz[o, t]."""
    program = tl.program_id(0).to(INDEX)
    pair_block = program % pair_blocks
    program = program // pair_blocks
    row, exists, group = rows_of(program % row_blocks, out_per_group, out_channels, ROWS, DOT)
    run = program // row_blocks
    pairs = in_per_group * KERNEL_SIZE
    r = pair_block * PAIRS + tl.arange(0, PAIRS)[:, None]
    channel = group * in_per_group + r // KERNEL_SIZE
    shift = (KERNEL_SIZE - 1 - r % KERNEL_SIZE) * dilation

    # Without DOT there is one row, and lanes of time are added up at the end.
    sums = tl.zeros((ROWS, PAIRS), ACC) if DOT else tl.zeros((PAIRS, COLUMNS), ACC)
    dz_sums = tl.zeros((ROWS, COLUMNS), ACC)
    first_tile = run * tiles_per_run
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_run, all_tiles)):
        b = tile // tiles
        t = (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        sequence, start, end = sequence_at(b, t, cu_seqlens, lengths, length, sequences, search_steps, INDEX)
        valid = t < end
        dz = load_dz(
            grad_y,
            saved,
            b,
            row,
            t,
            exists & valid,
            grad_stride_b,
            grad_stride_c,
            grad_stride_t,
            out_channels,
            length,
            ACTIVATION,
            NEGATIVE_SLOPE,
            ACC,
        )
        if bias_sums is not None:
            dz_sums += dz
        if weight_sums is not None:
            value = load_x(
                x,
                state,
                b,
                sequence,
                channel,
                t - shift,
                start,
                valid & (r < pairs),
                x_stride_b,
                x_stride_c,
                x_stride_t,
                in_channels,
                reach,
            )
            if DOT:
                value = tl.trans(value.to(OPERAND))
                sums = tl.dot(dz.to(OPERAND), value, sums, input_precision=PRECISION, out_dtype=ACC)
            else:
                sums += dz * value.to(ACC)
    if weight_sums is not None:
        if DOT:
            r = tl.trans(r)
        else:
            sums = tl.sum(sums, axis=1)[:, None]
        at = (run * out_channels + row) * pairs + r
        tl.store(weight_sums + at, sums, mask=exists & (r < pairs))
    if bias_sums is not None:
        at = run * out_channels + row
        tl.store(bias_sums + at, tl.sum(dz_sums, axis=1)[:, None], mask=exists & (pair_block == 0))


@triton.jit
def add_in_order(
    sums,  # (runs, size)
    total,  # (size,)
    runs,
    size,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    result = tl.zeros((BLOCK,), ACC)
    for _ in range(runs):
        result += tl.load(sums + i, mask=i < size, other=0.0)
        sums += size
    tl.store(total + i, result, mask=i < size)


#: Whether Triton interprets the kernels on the CPU: TRITON_INTERPRET=1 when this module was imported.
INTERPRETED = not isinstance(causal_conv1d_forward, triton.JITFunction)


def launch(device: torch.device, kernel: Any, programs: int, **arguments: Any) -> None:
    """Run ``programs`` programs of a kernel. Everything on the device goes through here."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**arguments)


class Blocks(NamedTuple):
    """Shape of a tile: rows, columns, and how many (channel, tap) pairs go into one ``tl.dot``, 0 for none."""

    rows: int
    columns: int
    depth: int

    def arguments(self) -> dict[str, Any]:
        dot = self.depth > 0
        # A dense tile keeps its accumulators, and the addresses of the tiles on their way, in registers.
        return {"ROWS": self.rows, "COLUMNS": self.columns, "DOT": dot, "num_warps": 8 if dot else 4}


def takes_dot(per_group: int, pairs: int) -> bool:
    """``tl.dot`` takes at least 16 of everything; with less than a quarter of that most of its work is padding."""
    return per_group >= 4 and pairs >= 16


def power_between(low: int, n: int, high: int) -> int:
    """The power of two that holds n, but at least ``low`` and at most ``high``."""
    return min(max(int(triton.next_power_of_2(n)), low), high)


def choose_blocks(source: Tensor, rows: int, per_group: int, pairs: int, outer: int, span: int, widest: int) -> Blocks:
    """The tile for a result of ``outer`` times ``rows`` times ``span``, by sizes and strides alone."""
    if not takes_dot(per_group, pairs):
        channels_last = source.stride(1) == 1 and source.stride(2) != 1
        columns = power_between(32, span, 32 if channels_last else 1024)
        return Blocks(power_between(1, rows, 1024 // columns), columns, 0)
    size = source.element_size()
    blocks = Blocks(power_between(16, per_group, min(64, 256 // size)), power_between(16, span, widest), 128 // size)
    while blocks.columns > 32:
        if outer * row_blocks(blocks, rows, per_group) * triton.cdiv(span, blocks.columns) >= ENOUGH_PROGRAMS:
            break
        blocks = blocks._replace(columns=blocks.columns // 2)
    return blocks


def row_blocks(blocks: Blocks, rows: int, per_group: int) -> int:
    """With ``tl.dot`` no block spans two groups."""
    if blocks.depth:
        return rows // per_group * int(triton.cdiv(per_group, blocks.rows))
    return int(triton.cdiv(rows, blocks.rows))


def allows_tf32() -> bool:
    """Whether the user lets products of float32 matrices round their factors; PyTorch's default is no."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # since PyTorch 2.9, where the older flag may raise
    return bool(matmul.allow_tf32 if precision is None else precision == "tf32")


def expect(t: Tensor, shape: tuple[int, ...], like: Tensor, name: str) -> None:
    """Raise unless ``t`` is what a kernel is about to read."""
    if t.shape != shape or t.dtype != like.dtype or t.device != like.device:
        raise ValueError(
            f"{name} must have shape {shape}, {like.dtype} on {like.device}, got {tuple(t.shape)}, {t.dtype} on "
            f"{t.device}; call pykernels.causal_conv1d rather than the raw operator"
        )


class Problem:
    """What the kernels are told about one call."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        lengths: Tensor | None,
        options: Options,
    ) -> None:
        self.options = options
        self.batch, self.in_channels, self.length = x.shape
        self.out_channels, self.in_per_group, self.taps = weight.shape
        self.out_per_group = self.out_channels // options.groups
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.reach = 0 if initial_state is None else (self.taps - 1) * options.dilation
        self.result = (self.batch, self.out_channels, self.length)
        expect(weight, (self.out_channels, self.in_channels // options.groups, self.taps), x, "weight")
        if initial_state is not None:
            expect(initial_state, (self.sequences, self.in_channels, self.reach), x, "initial_state")
        if lengths is not None:
            expect(lengths, (self.batch,), lengths, "lengths")
        # Taps that lie wholly before a start without a state are dead. Without them no shift exceeds the length.
        live = self.taps if self.reach else max(1, min(self.taps, (self.length - 1) // options.dilation + 1))
        self.dead = self.taps - live
        self.x = x.resolve_neg()
        self.weight = weight[:, :, self.dead :].resolve_neg().contiguous()
        self.state = initial_state.resolve_neg().contiguous() if initial_state is not None and self.reach else None
        self.sizes = {
            "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
            "lengths": None if lengths is None else lengths.contiguous(),
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "in_per_group": self.in_per_group,
            "out_per_group": self.out_per_group,
            "length": self.length,
            "sequences": self.sequences,
            "search_steps": max(0, self.sequences - 1).bit_length(),
            "dilation": options.dilation if live > 1 else 1,
            "reach": self.reach,
        }
        self.constants = {
            "KERNEL_SIZE": live,
            "ACTIVATION": options.activation,
            "NEGATIVE_SLOPE": options.negative_slope if options.activation == "leaky_relu" else 0.0,
            "OPERAND": ACCUMULATOR[x.dtype] if INTERPRETED else OPERAND[x.dtype],
            "PRECISION": "tf32" if x.dtype == torch.float32 and allows_tf32() else "ieee",
            "ACC": ACCUMULATOR[x.dtype],
        }

    def empty(self) -> bool:
        return self.batch == 0 or self.length == 0 or self.sequences == 0

    def index(self, *tensors: Tensor | None) -> tl.dtype:
        """The type that holds every offset into the tensors, and any position plus a shift."""
        largest = max(
            sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors if t is not None
        )
        return tl.int32 if max(largest, 2 * self.length + self.reach) < INT32_LIMIT - 2**20 else tl.int64


def strides(name: str, t: Tensor | None) -> dict[str, int]:
    b, c, time = (0, 0, 0) if t is None else t.stride()
    return {f"{name}_stride_b": b, f"{name}_stride_c": c, f"{name}_stride_t": time}


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    options: Options,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """y (B, O, T) and, with ``save``, what the backward needs beside it; see ``op.py``."""
    p = Problem(x, weight, initial_state, cu_seqlens, lengths, options)
    y = x.new_empty(p.result)
    if bias is not None:
        expect(bias, p.result[1:2], x, "bias")
    if residual is not None:
        expect(residual, p.result, x, "residual")
    saved = torch.empty_like(y) if save else None
    if p.empty():
        return y.zero_(), None if saved is None else saved.zero_()
    bias = None if bias is None else bias.resolve_neg().contiguous()
    residual = None if residual is None else residual.resolve_neg()
    pairs = p.in_per_group * p.weight.shape[2]
    widest = min(128, 512 // x.element_size())
    blocks = choose_blocks(p.x, p.out_channels, p.out_per_group, pairs, p.batch, p.length, widest)
    tiles = triton.cdiv(p.length, blocks.columns)
    blocks_of_rows = row_blocks(blocks, p.out_channels, p.out_per_group)
    launch(
        x.device,
        causal_conv1d_forward,
        p.batch * tiles * blocks_of_rows,
        x=p.x,
        weight=p.weight,
        bias=bias,
        residual=residual,
        state=p.state,
        y=y,
        saved=saved,
        **strides("x", p.x),
        **strides("residual", residual),
        **p.sizes,
        tiles=tiles,
        row_blocks=blocks_of_rows,
        **p.constants,
        RESIDUAL_FIRST=options.residual_before_activation,
        **blocks.arguments(),
        DEPTH=blocks.depth,
        INDEX=p.index(p.x, p.weight, residual, p.state, y),
    )
    return y, saved


def backward(
    grad_y: Tensor,
    saved: Tensor | None,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    options: Options,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and initial_state, empty (0,) where not needed; see ``op.py``."""
    p = Problem(x, weight, initial_state, cu_seqlens, lengths, options)
    expect(grad_y, p.result, x, "grad_y")
    if saved is not None:
        expect(saved, p.result, x, "saved")
    grad_y = grad_y.resolve_neg()
    saved = None if saved is None else saved.resolve_neg().contiguous()
    gradients = empty_gradients(x, weight, initial_state, need_x, need_weight, need_bias, need_state)
    if p.empty():
        for grad in gradients:
            grad.zero_()
        return gradients
    grad_x, grad_weight, grad_bias, grad_state = gradients
    if need_x:
        _gradient_of_samples(p, grad_y, saved, grad_x, of_state=False)
    if grad_state.numel():
        _gradient_of_samples(p, grad_y, saved, grad_state, of_state=True)
    if need_weight or need_bias:
        _gradients_of_parameters(
            p, grad_y, saved, grad_weight if need_weight else None, grad_bias if need_bias else None
        )
    return gradients


def _gradient_of_samples(p: Problem, grad_y: Tensor, saved: Tensor | None, grad: Tensor, of_state: bool) -> None:
    """Write the gradient of x or of the state into ``grad``."""
    outer, _, span = grad.shape
    pairs = p.out_per_group * p.weight.shape[2]
    widest = 256 // grad.element_size()  # less than forward: addresses in saved take registers, too
    blocks = choose_blocks(grad_y, p.in_channels, p.in_per_group, pairs, outer, span, widest)
    tiles = triton.cdiv(span, blocks.columns)
    blocks_of_rows = row_blocks(blocks, p.in_channels, p.in_per_group)
    launch(
        grad.device,
        causal_conv1d_backward_input,
        outer * tiles * blocks_of_rows,
        grad_y=grad_y,
        saved=saved,
        weight=p.weight,
        grad=grad,
        **strides("grad", grad_y),
        **p.sizes,
        tiles=tiles,
        row_blocks=blocks_of_rows,
        **p.constants,
        OF_STATE=of_state,
        **blocks.arguments(),
        DEPTH=blocks.depth,
        INDEX=p.index(grad_y, saved, p.weight, grad),
    )


def _gradients_of_parameters(
    p: Problem, grad_y: Tensor, saved: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None
) -> None:
    """Write the gradients of weight and bias into what is given for them."""
    weight = p.weight
    pairs = p.in_per_group * weight.shape[2]
    if takes_dot(p.out_per_group, pairs):
        size = weight.element_size()
        highest = min(64, 256 // size)
        pair_block = power_between(16, pairs, highest)
        rows = power_between(16, p.out_per_group, highest)
        blocks = Blocks(rows, power_between(16, p.length, 128 // size), pair_block)
    else:
        pair_block = power_between(1, pairs, 32)
        blocks = Blocks(1, power_between(32, p.length, 2048 // pair_block), 0)
    tiles = triton.cdiv(p.length, blocks.columns)
    blocks_of_rows = row_blocks(blocks, p.out_channels, p.out_per_group)
    pair_blocks = 1 if grad_weight is None else triton.cdiv(pairs, pair_block)
    all_tiles = p.batch * tiles
    tiles_per_run = triton.cdiv(all_tiles, max(1, ENOUGH_PROGRAMS // (blocks_of_rows * pair_blocks)))
    runs = triton.cdiv(all_tiles, tiles_per_run)
    sum_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32

    def sums(shape: tuple[int, ...], grad: Tensor | None) -> Tensor | None:
        """Where the runs put their sums: into the gradient itself if there is one run."""
        if grad is None or (runs == 1 and grad.shape == shape):
            return grad
        return torch.empty((runs, *shape), dtype=sum_dtype, device=weight.device)

    weight_sums = sums(weight.shape, grad_weight)
    bias_sums = sums(weight.shape[:1], grad_bias)
    index = p.index(grad_y, saved, p.x, p.state, weight_sums, bias_sums)
    launch(
        weight.device,
        causal_conv1d_backward_weight,
        runs * blocks_of_rows * pair_blocks,
        grad_y=grad_y,
        saved=saved,
        x=p.x,
        state=p.state,
        weight_sums=weight_sums,
        bias_sums=bias_sums,
        **strides("grad", grad_y),
        **strides("x", p.x),
        **p.sizes,
        tiles=tiles,
        all_tiles=all_tiles,
        tiles_per_run=tiles_per_run,
        row_blocks=blocks_of_rows,
        pair_blocks=pair_blocks,
        **p.constants,
        **blocks.arguments(),
        PAIRS=pair_block,
        INDEX=index,
    )
    if grad_weight is not None and weight_sums is not None and weight_sums is not grad_weight:
        live = torch.empty_like(weight) if p.dead else grad_weight
        _add_in_order(weight_sums, live, index)
        if p.dead:
            grad_weight[:, :, : p.dead] = 0
            grad_weight[:, :, p.dead :] = live
    if grad_bias is not None and bias_sums is not None and bias_sums is not grad_bias:
        _add_in_order(bias_sums, grad_bias, index)


def _add_in_order(sums: Tensor, total: Tensor, index: tl.dtype) -> None:
    launch(
        total.device,
        add_in_order,
        triton.cdiv(total.numel(), 128),
        sums=sums,
        total=total,
        runs=sums.shape[0],
        size=total.numel(),
        BLOCK=128,
        ACC=ACCUMULATOR[sums.dtype],
        INDEX=index,
    )
