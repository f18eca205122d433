"""Stacks of residual blocks of causal convolutions as one operator, with the maximum over time behind the last.

One boundary between Python and the kernels for the whole stack: in a training step on short series, the boundaries of
two dozen convolutions cost as much as the convolutions. The two gradients of a block's input are added as the second
one is written, and behind the maximum over time the backward visits only the times of the maxima.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels import _native, _triton
from pykernels.backends import YES, Answer, Check, Implementation, Operator, register, select
from pykernels.ops._autograd import apply, differentiable_gradients, recording, transforming
from pykernels.ops._check import compare
from pykernels.ops._memory import HALF, IS_DOUBLE, plain
from pykernels.ops._op import implement, library, reads_values
from pykernels.ops.causal_conv import conv, cost, reference
from pykernels.ops.causal_conv.autograd import composed
from pykernels.ops.causal_conv.autograd import run as run_conv
from pykernels.ops.causal_conv.cpu import NO_POOL, NO_SEQUENCES, NO_STRIDES, Sequences, rows
from pykernels.ops.causal_conv.op import ACTIVATIONS

_ACTIVATION = "leaky_relu"
_LEAKY, _NONE = ACTIVATIONS[_ACTIVATION], ACTIVATIONS["none"]
_FIELDS = 6  # of a BlockWeights
_PLACES = 4  # activations that a forward without a backward holds at a time
_TILE_BYTES = 5 << 19  # of those activations, per thread, that stay in cache

library.define(  # y, or with pool its maximum over time; if save, also what the backward needs
    "causal_conv_stack(Tensor x, Tensor?[] weights, Tensor? cu_seqlens, Tensor? lengths, int[] dilations, "
    "float negative_slope, bool pool, bool save) -> Tensor[]"
)
library.define(  # the gradients of x and of the weights that are needed
    "causal_conv_stack_backward(Tensor grad, Tensor x, Tensor?[] weights, Tensor? cu_seqlens, Tensor? lengths, "
    "Tensor[] saved, int[] dilations, float negative_slope, bool pool, bool[] needed) -> Tensor[]"
)
library.define("sequence_argmax(Tensor x, Tensor cu_seqlens) -> Tensor")
_forward_op = torch.ops.pykernels.causal_conv_stack.default
_backward_op = torch.ops.pykernels.causal_conv_stack_backward.default
_argmax_op = torch.ops.pykernels.sequence_argmax.default


class BlockWeights(NamedTuple):
    """Tensors of one block ``leaky_relu(conv2(leaky_relu(conv1(x)))) + skip(x)``, for C, H and O channels.

    Shapes: ``weight1`` (H, C, K), ``bias1`` (H,), ``weight2`` (O, H, K'), ``bias2`` (O,), ``skip_weight`` (O, C, 1),
    ``skip_bias`` (O,). Biases may be None; without ``skip_weight`` the skip is the identity and O must be C.
    """

    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    skip_weight: Tensor | None = None
    skip_bias: Tensor | None = None


def causal_conv_stack(
    x: Tensor,
    blocks: Sequence[BlockWeights],
    dilations: Sequence[int],
    *,
    negative_slope: float = 0.01,
    pool: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Residual blocks of dilated causal convolutions, one after the other.

    Block i computes ``leaky_relu(conv2(leaky_relu(conv1(x)))) + skip(x)``, both convolutions with ``dilations[i]``.

    Args:
        x: input, shape (B, C, T).
        blocks: the weights of each block.
        dilations: of each block, at least 1.
        negative_slope: of the leaky ReLU, at least 0.
        pool: return the maximum over time. Its gradient belongs to one time per sample and channel, the first that
            reaches the maximum, and the backward of the last block costs accordingly less.
        cu_seqlens, lengths: packed sequences, or series that end before T; the maximum is over the samples of each.
        backend, validate: see :func:`pykernels.causal_conv1d`, for dtypes, derivatives and errors too.

    Returns:
        The output of the last block, shape (B, O, T), or with ``pool`` its maximum, shape (B, O), or (N, O) of N packed
        sequences.

    Raises:
        TypeError, ValueError: as :func:`pykernels.causal_conv1d`; also for ``pool`` of empty series.

    Source: Franceschi, Dieuleveut and Jaggi, "Unsupervised scalable representation learning for multivariate time
    series", NeurIPS 2019.
    """
    if len(blocks) != len(dilations) or len(blocks) == 0:
        raise ValueError(
            f"blocks and dilations must be equally many, at least one, got {len(blocks)} and {len(dilations)}"
        )
    conv.check_input(x)
    channels = x.shape[1]
    for block, dilation in zip(blocks, dilations, strict=True):
        conv.check_options(dilation, _ACTIVATION, negative_slope)
        channels = _check_block(BlockWeights(*block), channels, x)
    shortest = x.shape[2]
    if cu_seqlens is not None:
        conv.check_offsets(cu_seqlens, x, validate)
        if lengths is not None:
            raise ValueError("lengths cannot be combined with cu_seqlens: packed sequences have no padding")
        if len(cu_seqlens) == 1:
            shortest = 1  # of no sequences, none is empty
        elif pool and reads_values(cu_seqlens, validate):
            shortest = int(cu_seqlens.diff().min())
    if lengths is not None:
        conv.check_lengths(lengths, x, validate)
        if pool and len(lengths) > 0 and reads_values(lengths, validate):
            shortest = int(lengths.min())
    if pool and shortest == 0:
        raise ValueError("x holds empty series: the maximum over time needs at least one sample")
    weights = [t for block in blocks for t in BlockWeights(*block)]
    implementation = select(_OPERATOR, backend, x)
    result: Tensor = implementation.run(x, weights, cu_seqlens, lengths, list(dilations), negative_slope, pool)
    return result


def causal_conv_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    skip_weight: Tensor | None = None,
    skip_bias: Tensor | None = None,
    *,
    dilation: int = 1,
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    """One block of :func:`causal_conv_stack`, with the tensors of :class:`BlockWeights` as arguments.

    Returns:
        y, shape (B, O, T).
    """
    block = BlockWeights(weight1, bias1, weight2, bias2, skip_weight, skip_bias)
    return causal_conv_stack(x, [block], [dilation], negative_slope=negative_slope, backend=backend)


def _check_block(block: BlockWeights, in_channels: int, x: Tensor) -> int:
    """The number of output channels of a block, or an error."""
    conv.check_weight(block.weight1, "weight1", in_channels, x)
    hidden = block.weight1.shape[0]
    conv.check_bias(block.bias1, "bias1", hidden, x)
    conv.check_weight(block.weight2, "weight2", hidden, x)
    out_channels = block.weight2.shape[0]
    conv.check_bias(block.bias2, "bias2", out_channels, x)
    skip = block.skip_weight
    if skip is None:
        if block.skip_bias is not None:
            raise ValueError("skip_bias needs a skip_weight")
        if in_channels != out_channels:
            raise ValueError(
                f"skip_weight is needed, since the block takes {in_channels} channels and weight2 gives {out_channels}"
            )
        return out_channels
    conv.check_weight(skip, "skip_weight", in_channels, x)
    if skip.shape[0] != out_channels or skip.shape[2] != 1:
        raise ValueError(f"skip_weight must have shape ({out_channels}, {in_channels}, 1), got {tuple(skip.shape)}")
    conv.check_bias(block.skip_bias, "skip_bias", out_channels, x)
    return out_channels


def _blocks_of(weights: Sequence[Tensor | None]) -> list[BlockWeights]:
    return [BlockWeights(*weights[i : i + _FIELDS]) for i in range(0, len(weights), _FIELDS)]  # type: ignore[arg-type]


def _run_reference(
    x: Tensor,
    weights: Sequence[Tensor | None],
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    dilations: list[int],
    negative_slope: float,
    pool: bool,
    one: Any = reference.causal_conv1d,
) -> Tensor:
    """The definition, with ``one`` as the single convolution, which takes the arguments of the operator."""
    for block, dilation in zip(_blocks_of(weights), dilations, strict=True):
        where = (None, cu_seqlens, lengths)
        options = (dilation, 1, _ACTIVATION, negative_slope, False)
        skip = x
        if block.skip_weight is not None:
            skip = one(x, block.skip_weight, block.skip_bias, None, *where, 1, 1, "none", negative_slope, False)
        x = one(x, block.weight1, block.bias1, None, *where, *options)
        x = one(x, block.weight2, block.bias2, skip, *where, *options)
    if not pool:
        return x
    if cu_seqlens is not None:
        return x[0].gather(1, _argmax_op(x.detach(), reference.clamped(cu_seqlens, x.shape[2])).T).T
    if lengths is not None:
        x = x.masked_fill(reference.padding(x, lengths), -float("inf"))
    return x.max(2).values


def _sequence_argmax(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Where in x (1, C, total) each sequence has its maximum, the first of equals, shape (N, C)."""
    ends = cu_seqlens.tolist()
    times = [x[0, :, begin:end].max(1).indices + begin for begin, end in pairwise(ends)]
    return torch.stack(times) if times else x.new_empty((0, x.shape[1]), dtype=torch.int64)


def _sequence_argmax_fake(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    return x.new_empty((cu_seqlens.shape[0] - 1, x.shape[1]), dtype=torch.int64)


def _sequence_argmax_vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, cu_seqlens: Tensor) -> Any:
    if in_dims[0] is None or in_dims[1] is not None:
        raise NotImplementedError("vmap over the offsets of packed sequences is not supported")
    x = x.movedim(in_dims[0], 0)  # (V, 1, C, total): V C channels side by side
    times = _argmax_op(x.flatten(0, 2)[None], cu_seqlens)
    return times.unflatten(1, (x.shape[0], -1)), 1


implement(_argmax_op, _sequence_argmax, _sequence_argmax_fake, devices=("CPU", "CUDA"))
torch.library.register_vmap(_argmax_op, _sequence_argmax_vmap, lib=library)


def _run_composed(x: Tensor, weights: Sequence[Tensor | None], *rest: Any, one: Any, backend: str = "cpu") -> Tensor:
    """The same convolution by convolution on the compiled kernels."""
    return partial(_run_reference, one=lambda *args: one(*args, backend))(x, weights, *rest)


def _run_triton(x: Tensor, weights: Sequence[Tensor | None], *rest: Any) -> Tensor:
    return _run_composed(x, weights, *rest, one=run_conv, backend="triton")


def _run_cpu(x: Tensor, weights: list[Tensor | None], *rest: Any) -> Tensor:
    if torch.compiler.is_compiling() or x.dtype in HALF:
        return _run_composed(x, weights, *rest, one=run_conv)
    if transforming(x, *weights):
        return _run_composed(x, weights, *rest, one=composed)
    if recording(x, *weights):
        y: Tensor = apply(CausalConvStack, *rest, x, *weights)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = _forward_op(x, weights, *rest, False)[0]
        return result


def _dense(weights: Sequence[Tensor | None], x: Tensor) -> list[Tensor | None]:
    """The weights as the kernels read them. Their shapes are checked where the kernels are called."""
    for t in weights:
        if t is not None and (t.dtype != x.dtype or not t.is_cpu):
            raise ValueError(f"weights must be {x.dtype} as x is, and on the CPU, got {t.dtype} on {t.device}")
    return [t if t is None or (t.is_contiguous() and not t.is_neg()) else plain(t).contiguous() for t in weights]


def _bias_address(bias: Tensor | None, channels: int) -> int:
    if bias is None:
        return 0
    if bias.numel() != channels:
        raise ValueError(f"a bias must have {channels} elements, got {bias.numel()}")
    return bias.data_ptr()


class _Arena:
    """Memory for many contiguous (B, C, T) tensors in one allocation.

    Tensors of this size that come and go one by one make the allocator return memory to the system and ask for it again
    in every training step, and on short series the page faults cost more than the convolutions.
    """

    def __init__(self, x: Tensor, memory: Tensor | int) -> None:
        self.batch, _, self.length = x.shape
        self.memory = x.new_empty(memory) if isinstance(memory, int) else memory
        self.used = 0

    @staticmethod
    def size(x: Tensor, channels: int) -> int:
        """Elements of one tensor, rounded up to whole cache lines."""
        return (x.shape[0] * channels * x.shape[2] + 15) // 16 * 16

    @staticmethod
    def saved_size(x: Tensor, blocks: list[BlockWeights], pool: bool) -> int:
        """Elements of what the forward saves: h1, h2 and y of every block, of the last one only what is no result."""
        widths = [w for b in blocks for w in (b.weight1.shape[0], b.weight2.shape[0], b.weight2.shape[0])]
        return sum(_Arena.size(x, width) for width in (widths[:-2] if pool else widths[:-1]))

    def at(self, offset: int, channels: int) -> Tensor:
        shape = (self.batch, channels, self.length)
        return self.memory.as_strided(shape, (channels * self.length, self.length, 1), offset)

    def take(self, channels: int) -> Tensor:
        """The next tensor; the backward takes them in the order of the forward."""
        t = self.at(self.used, channels)
        self.used += (t.numel() + 15) // 16 * 16
        return t


class _Past:
    """What the convolutions of a stack have seen, where a series is taken in stretches of time."""

    def __init__(self) -> None:
        self.states: dict[tuple[int, int], Tensor] = {}

    def arguments(self, key: tuple[int, int]) -> tuple[int, Any]:
        state = self.states.get(key)
        return (0, NO_STRIDES) if state is None else (state.data_ptr(), state.stride())

    def advance(self, key: tuple[int, int], x: Tensor, size: int) -> None:
        if size > 0:
            self.states[key] = reference.final_state(x, size, self.states.get(key), None, None)


def _forward_cpu(
    x: Tensor,
    weights: list[Tensor | None],
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    dilations: list[int],
    negative_slope: float,
    pool: bool,
    save: bool,
) -> list[Tensor]:
    blocks = _blocks_of(_dense(weights, x))
    options = (dilations, negative_slope, pool, save)
    batch, _, length = x.shape
    widest = max(block.weight1.shape[1] for block in blocks)
    tile = max(1, _TILE_BYTES * max(2, torch.get_num_threads()) // (_PLACES * widest * x.element_size()))
    if save or cu_seqlens is not None or lengths is not None or batch * length <= tile:
        return _forward_tile(x, blocks, cu_seqlens, lengths, *options, None)
    # Nothing is kept for a backward: a few samples, or a stretch of time of one, go through all blocks while their
    # activations are in cache, and memory does not grow with the series.
    samples, stretch = (tile // length, length) if length <= tile else (1, tile)
    rows_of_result = []
    for part in x.split(samples):
        past = _Past() if stretch < length else None
        tiles = [_forward_tile(piece, blocks, None, None, *options, past)[0] for piece in part.split(stretch, 2)]
        rows_of_result.append(reduce(torch.maximum, tiles) if pool else torch.cat(tiles, 2))
    return [torch.cat(rows_of_result)]


def _forward_tile(
    x: Tensor,
    blocks: list[BlockWeights],
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    dilations: list[int],
    negative_slope: float,
    pool: bool,
    save: bool,
    past: _Past | None,
) -> list[Tensor]:
    """The forward of what goes through all blocks at once, after ``past`` if that is given, which is advanced."""
    assert _native.cpu is not None
    run, is_double = _native.cpu.causal_conv1d_forward, IS_DOUBLE[x.dtype]
    last_arguments = (negative_slope, False, torch.get_num_threads())
    x, x_strides = rows(x)
    batch, channels, length = x.shape
    record, count = NO_SEQUENCES, batch
    if cu_seqlens is not None or lengths is not None:
        sequences = Sequences(cu_seqlens, lengths)
        record, count = sequences.record, sequences.count
    no_state = (0, NO_STRIDES)
    # What is not saved takes turns in four places: h1, the skip, and the outputs of this block and the one before.
    place = max(_Arena.size(x, max(b.weight1.shape[0], b.weight2.shape[0])) for b in blocks)
    temporary = _Arena(
        x, _PLACES * place if not save else place if any(b.skip_weight is not None for b in blocks) else 0
    )
    arena = _Arena(x, _Arena.saved_size(x, blocks, pool) if save else 0)
    pooled: list[Tensor] = []
    result = x
    for i, ((weight1, bias1, weight2, bias2, skip_weight, skip_bias), dilation) in enumerate(
        zip(blocks, dilations, strict=True)
    ):
        hidden, out = weight1.shape[0], weight2.shape[0]
        x_shape, hidden_shape = (batch, channels, length), (batch, hidden, length)
        x_address = x.data_ptr()
        skip, skip_strides = x, x_strides
        if skip_weight is not None:
            skip = temporary.at(0, out)
            skip_strides = (out * length, length, 1)
            shapes = (is_double, x_shape, skip_weight.shape, 1, 1, record, x_address, x_strides, skip_weight.data_ptr())
            skip_inputs = (_bias_address(skip_bias, out), 0, NO_STRIDES, *no_state)
            run(*shapes, *skip_inputs, skip.data_ptr(), 0, NO_POOL, _NONE, *last_arguments)
        if skip.shape[1] != out:
            raise ValueError(f"the skip gives {skip.shape[1]} channels, the block {out}")
        h1 = arena.take(hidden) if save else temporary.at(place, hidden)
        h1_address = h1.data_ptr()
        shapes = (is_double, x_shape, weight1.shape, dilation, 1, record, x_address, x_strides, weight1.data_ptr())
        state = no_state if past is None else past.arguments((i, 1))
        first_inputs = (_bias_address(bias1, hidden), 0, NO_STRIDES, *state)
        run(*shapes, *first_inputs, h1_address, 0, NO_POOL, _LEAKY, *last_arguments)
        shapes = (
            is_double,
            hidden_shape,
            weight2.shape,
            dilation,
            1,
            record,
            h1_address,
            (hidden * length, length, 1),
            weight2.data_ptr(),
        )
        state = no_state if past is None else past.arguments((i, 2))
        inputs = (_bias_address(bias2, out), skip.data_ptr(), skip_strides, *state)
        last = i == len(blocks) - 1
        if pool and last:
            result = x.new_empty((count, out))
            h2, time = x.new_empty((count, out)), x.new_empty((count, out), dtype=torch.int64)
            outputs = (0, 0, (result.data_ptr(), time.data_ptr(), h2.data_ptr()))
            pooled = [h2, time]
        else:
            h2_address = arena.take(out).data_ptr() if save else 0
            if last:
                result = x.new_empty((batch, out, length))
            else:
                result = arena.take(out) if save else temporary.at((2 + i % 2) * place, out)
            outputs = (result.data_ptr(), h2_address, NO_POOL)
        if result.numel() > 0:
            run(*shapes, *inputs, *outputs, _LEAKY, *last_arguments)
        if past is not None:
            past.advance((i, 1), x, (weight1.shape[2] - 1) * dilation)
            past.advance((i, 2), h1, (weight2.shape[2] - 1) * dilation)
        x, x_strides, channels = result, (out * length, length, 1), out
    return [result, arena.memory, *pooled] if save else [result]


def _backward_cpu(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor | None],
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    saved: list[Tensor],
    dilations: list[int],
    negative_slope: float,
    pool: bool,
    needed: list[bool],
) -> list[Tensor]:
    blocks = _blocks_of(_dense(weights, x))
    if saved[0].numel() != _Arena.saved_size(x, blocks, pool) or not saved[0].is_contiguous():
        raise ValueError(f"saved[0] must hold what the forward of these weights saved, got {tuple(saved[0].shape)}")
    arena = _Arena(x, saved[0])
    inputs, activated = [x], []
    for i, block in enumerate(blocks):
        h1 = arena.take(block.weight1.shape[0])
        pooled = pool and i == len(blocks) - 1
        activated.append((h1, saved[1] if pooled else arena.take(block.weight2.shape[0])))
        if i < len(blocks) - 1:
            inputs.append(arena.take(block.weight2.shape[0]))
    # Gradients of h1 in one place, of the blocks' inputs in turns in two others.
    place = max(_Arena.size(x, max(b.weight1.shape[:2])) for b in blocks)
    temporary = _Arena(x, 3 * place)
    launch = _Launch(x, cu_seqlens, lengths, negative_slope)
    gradients: list[Tensor] = []  # of the weights, from the last block to the first
    for i in reversed(range(len(blocks))):
        block, dilation, x_i = blocks[i], dilations[i], inputs[i]
        h1, h2 = activated[i]
        need = needed[1 + _FIELDS * i : 1 + _FIELDS * (i + 1)]
        need_x = any(needed[: 1 + _FIELDS * i])
        need_h1 = need_x or any(need[:2])
        grad_h1 = temporary.at(0, block.weight1.shape[0]) if need_h1 else None
        grad_x = None
        if need_x:
            grad_x = temporary.at((1 + i % 2) * place, x_i.shape[1]) if i > 0 else x.new_empty(x.shape)
        first = skip = (launch.empty, launch.empty)
        if pool and i == len(blocks) - 1:
            dz = torch.where(h2 <= 0, negative_slope * grad, grad)
            second = launch.backward_at(dz, saved[2], h1, block.weight2, dilation, grad_h1, *need[2:4])
            if block.skip_weight is not None:
                skip = launch.backward_at(grad, saved[2], x_i, block.skip_weight, 1, grad_x, *need[4:6])
            elif grad_x is not None:
                launch.scatter(grad_x, saved[2], grad)
            addend = grad_x
        else:
            second = launch.backward(grad, h2, h1, block.weight2, dilation, None, grad_h1, *need[2:4])
            addend = grad
            if block.skip_weight is not None:
                skip = launch.backward(grad, None, x_i, block.skip_weight, 1, None, grad_x, *need[4:6])
                addend = grad_x
        if grad_h1 is not None:
            addend = addend if need_x else None
            first = launch.backward(grad_h1, h1, x_i, block.weight1, dilation, addend, grad_x, *need[:2])
        gradients += [*reversed(skip), *reversed(second), *reversed(first)]
        if grad_x is None:
            gradients += [launch.empty] * (_FIELDS * i)
            grad = launch.empty
            break
        grad = grad_x
    return _select([grad, *reversed(gradients)], [x, *weights], needed)


def _select(values: Sequence[Any], arguments: Sequence[Tensor | None], needed: list[bool]) -> list[Any]:
    """The values that belong to a needed argument: an operator may return no tensor twice, not even an empty one."""
    return [v for v, t, need in zip(values, arguments, needed, strict=True) if need and t is not None]


class _Launch:
    """Calls of the backward kernels with what they have in common. Tensors (B, C, T) that are not x are contiguous."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, negative_slope: float) -> None:
        assert _native.cpu is not None
        self.cpu = _native.cpu
        self.batch, _, self.length = x.shape
        self.sequences: Sequences | None = None
        self.record, self.count = NO_SEQUENCES, self.batch
        if cu_seqlens is not None or lengths is not None:
            self.sequences = Sequences(cu_seqlens, lengths)
            self.record, self.count = self.sequences.record, self.sequences.count
        self.is_double, self.threads = IS_DOUBLE[x.dtype], torch.get_num_threads()
        self.negative_slope = negative_slope
        self.empty = x.new_empty(0)

    def scatter(self, out: Tensor, time: Tensor, values: Tensor) -> None:
        """``out`` (B, C, T) becomes zero but for ``values`` (N, C) at ``time`` (N, C) in their sequences."""
        if self.sequences is None or self.sequences.offsets is None:
            out.zero_().scatter_(2, time[..., None], values[..., None])
        else:
            begin = reference.clamped(self.sequences.offsets, self.length)[:-1, None]
            out.zero_()[0].scatter_(1, (time + begin).T, values.T)

    def _check(self, t: Tensor, channels: int, dims: int) -> Tensor:
        shape = (self.batch, channels, self.length) if dims == 3 else (self.count, channels)
        if t.shape != shape or t.dtype != self.empty.dtype or not t.is_cpu:
            raise ValueError(f"a saved tensor or gradient must have shape {shape}, got {tuple(t.shape)}, {t.dtype}")
        return t

    def backward(
        self,
        grad_y: Tensor,
        h: Tensor | None,
        x: Tensor,
        weight: Tensor,
        dilation: int,
        addend: Tensor | None,
        grad_x: Tensor | None,
        need_weight: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias, and that of x, plus ``addend``, into ``grad_x``, which may be the addend.

        ``h`` is None for a convolution without activation.
        """
        out_channels, channels, _ = weight.shape
        x, x_strides = rows(self._check(x, channels, 3))
        grad_y, grad_strides = rows(self._check(grad_y, out_channels, 3))
        h, h_strides = (grad_y, grad_strides) if h is None else rows(self._check(h, out_channels, 3))
        addend_address, addend_strides = 0, NO_STRIDES
        if addend is not None:
            addend, addend_strides = rows(self._check(addend, channels, 3))
            addend_address = addend.data_ptr()
        grad_weight = weight.new_empty(weight.shape) if need_weight else self.empty
        grad_bias = weight.new_empty((out_channels,)) if need_bias else self.empty
        self.cpu.causal_conv1d_backward(
            self.is_double,
            x.shape,
            weight.shape,
            dilation,
            1,
            self.record,
            grad_y.data_ptr(),
            grad_strides,
            h.data_ptr(),
            h_strides,
            x.data_ptr(),
            x_strides,
            weight.data_ptr(),
            addend_address,
            addend_strides,
            0 if grad_x is None else grad_x.data_ptr(),
            grad_weight.data_ptr() if need_weight else 0,
            grad_bias.data_ptr() if need_bias else 0,
            _LEAKY if h is not grad_y else _NONE,
            self.negative_slope,
            self.threads,
        )
        return grad_weight, grad_bias

    def backward_at(
        self,
        dz: Tensor,
        time: Tensor,
        x: Tensor,
        weight: Tensor,
        dilation: int,
        grad_x: Tensor | None,
        need_weight: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor]:
        """The same without activation, for an output gradient that is ``dz`` (B, O) at ``time`` and zero elsewhere."""
        out_channels, channels, _ = weight.shape
        x, x_strides = rows(self._check(x, channels, 3))
        dz = plain(self._check(dz, out_channels, 2)).contiguous()
        if time.shape != dz.shape or time.dtype != torch.int64 or not time.is_contiguous():
            raise ValueError(f"time must be int64 of shape {tuple(dz.shape)}, got {tuple(time.shape)}, {time.dtype}")
        grad_weight = weight.new_empty(weight.shape) if need_weight else self.empty
        if grad_x is not None or need_weight:
            self.cpu.causal_conv1d_backward_at(
                self.is_double,
                x.shape,
                weight.shape,
                dilation,
                self.record,
                dz.data_ptr(),
                time.data_ptr(),
                x.data_ptr(),
                x_strides,
                weight.data_ptr(),
                0 if grad_x is None else grad_x.data_ptr(),
                grad_weight.data_ptr() if need_weight else 0,
                self.threads,
            )
        return grad_weight, dz.sum(0) if need_bias else self.empty


def _forward_fake(
    x: Tensor,
    weights: list[Tensor | None],
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    dilations: list[int],
    negative_slope: float,
    pool: bool,
    save: bool,
) -> list[Tensor]:
    blocks = _blocks_of(weights)
    out = blocks[-1].weight2.shape[0]
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    result = x.new_empty((count, out) if pool else (x.shape[0], out, x.shape[2]))
    if not save:
        return [result]
    pooled = [torch.empty_like(result), torch.empty_like(result, dtype=torch.int64)] if pool else []
    return [result, x.new_empty(_Arena.saved_size(x, blocks, pool)), *pooled]


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor | None],
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    saved: list[Tensor],
    dilations: list[int],
    negative_slope: float,
    pool: bool,
    needed: list[bool],
) -> list[Tensor]:
    return [x.new_empty(t.shape) for t in _select([x, *weights], [x, *weights], needed) if t is not None]


implement(_forward_op, _forward_cpu, _forward_fake, cost=cost.stack_forward)
implement(_backward_op, _backward_cpu, _backward_fake, cost=cost.stack_backward)


class CausalConvStack(torch.autograd.Function):
    """Eager recording of a stack; what is transformed or compiled records its convolutions one by one."""

    @staticmethod
    def forward(
        ctx: Any,
        cu_seqlens: Tensor | None,
        lengths: Tensor | None,
        dilations: list[int],
        negative_slope: float,
        pool: bool,
        x: Tensor,
        *weights: Any,
    ) -> Any:
        y, *saved = _forward_op(x, weights, cu_seqlens, lengths, dilations, negative_slope, pool, True)
        ctx.options = (dilations, negative_slope, pool)
        ctx.save_for_backward(x, *weights, cu_seqlens, lengths, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = list(ctx.needs_input_grad[5:])
        count = len(needed)
        tensors, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count + 2 :]
        where = ctx.saved_tensors[count : count + 2]
        if torch.is_grad_enabled() or transforming(grad):

            def compute(x: Tensor, *weights: Any) -> Tensor:
                return _run_composed(x, weights, *where, *ctx.options, one=composed)

            gradients: Any = differentiable_gradients(compute, grad, tensors, needed)
        else:
            found = iter(_backward_op(grad, tensors[0], tensors[1:], *where, saved, *ctx.options, needed))
            gradients = (next(found) if need else None for need in needed)
        return (*(None,) * 5, *gradients)


def _can_run(x: Tensor, *rest: Any) -> Answer:
    return conv.cpu_can_run(x)


def _check(backend: str) -> Check:
    generator = torch.Generator().manual_seed(0)
    widths, dilations = (5, 40, 40, 16), [1, 8, 64]
    shapes: list[tuple[int, ...]] = [(4, 5, 70)]
    for c, o in pairwise(widths):
        shapes += [(o, c, 3), (o,), (o, o, 3), (o,)] + ([] if c == o else [(o, c, 1), (o,)])
    tensors = tuple(torch.randn(s, generator=generator, dtype=torch.float64) / 5 for s in shapes)

    def blocks(t: tuple[Tensor, ...]) -> list[BlockWeights]:
        return [BlockWeights(*t[1:7]), BlockWeights(*t[7:11]), BlockWeights(*t[11:17])]

    return compare(
        lambda *t: _run_reference(t[0], [w for b in blocks(t) for w in b], None, None, dilations, 0.01, True),
        lambda *t: causal_conv_stack(t[0], blocks(t), dilations, pool=True, backend=backend),
        tensors,
        backend,
    )


_OPERATOR = register(
    Operator(
        name="causal_conv_stack",
        implementations={
            "cpu": Implementation(_run_cpu, _can_run, _native.available),
            "triton": Implementation(_run_triton, _triton.can_run, _triton.available),
            "reference": Implementation(_run_reference, lambda *args: YES, lambda: YES),
        },
        check=_check,
        path="fused stack",
        cost=cost.stack_forward,
    )
)
