// Causal convolution on the CPU: a batch-reduce GEMM over taps, without im2col (the design of Chaudhary et al. 2021,
// arXiv 2104.08002), compiled once per capability.
//
// Time is cut into tiles. A tile's input rows are copied once into a panel that stays in cache; every tap reads the same
// panel at its own shift, and what lies outside the series is zero in it, so that the inner loops have no edges:
//
//     dilation <= tile:  row c  [ x(t0 - 2d) ........... x(t0) ........ x(t0+n) ]   taps are overlapping windows
//                               '--- tap 2 ---'     '------- tap 0 -----'
//     dilation >  tile:  row c  [ x(t0-2d..) | x(t0-d..) | x(t0..) ]                one window per live tap
//
// Forward, per tile: y(rows o, columns t) = sum over live taps j of W_j (O x C) panel_j (C x n). Register tile: `conv_rows`
// rows of weights (broadcast) times `conv_columns` vectors of time; bias, activation and residual are applied as it is
// written.
//
// Backward: dz = grad_y act'(z) goes into a panel that reaches right instead of left, and grad_x is the same product with
// W_j^T. grad_weight[o,c,j] = sum_t dz[o,t] x[c,t-j*d] is a product of rows of a dz panel with rows of x, read in place,
// with vectors of time as the reduced index. Pieces of sequences form batches that are reduced in registers, and those form
// chunks, each with its own partial grad_weight; both depend on the problem's sizes alone, so results do not depend on
// the number of threads.
//
// Groups of channels are problems of their own, one after the other or side by side; a group of one input and one output
// channel goes to depthwise_cpu.cpp.
//
// Cost: 2 O C K B T flops forward (dead taps excepted) and twice that backward; forward reads x and writes y once.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "causal_conv/activation.hpp"
#include "causal_conv/causal_conv.hpp"
#include "causal_conv/spans.hpp"
#include "common/arrays.hpp"
#include "common/math.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"

PK_ISA_BEGIN
namespace {

// Register tiles: accumulators, plus one operand each way, fill the 32 or 16 vector registers.
#if PK_VECTOR_BYTES == 64
constexpr int conv_rows = 8, conv_columns = 3, dot_rows = 5, dot_columns = 5;
#else
constexpr int conv_rows = 4, conv_columns = 3, dot_rows = 4, dot_columns = 3;
#endif

constexpr Index chunk_terms = 64;          // products in one chain of additions
constexpr Index panel_bytes = 192 << 10;   // forward: input panel of a tile
constexpr Index bundle_bytes = 768 << 10;  // backward: dz and x of a bundle
constexpr Index bundle_columns = 1024;     // backward: columns reduced in registers
constexpr Index max_chunks = 32;           // backward: partial weight gradients
constexpr double parallel_flops = 200e3;   // below this, waking the other threads costs more than it saves
template <class T>
constexpr Index tile_columns = 24 * Vec<T>::lanes;  // longest tile of the products

template <class T>
PK_INLINE Index round_up_to_vector(Index n) {
    return divide_up(n, Vec<T>::lanes) * Vec<T>::lanes;
}

// Taps that see data in a stretch of time, when `reach` samples lie between its far end and the data's end.
PK_INLINE Index live_taps(const ConvShape& s, Index reach) {
    return reach < 0 ? 0 : min(s.kernel_size, reach / s.dilation + 1);
}

int worker_count(const ConvShape& s, const Span* spans, Index taps, int threads) {
    const double flops = 2.0 * static_cast<double>(total_length(s, spans)) * static_cast<double>(s.in_channels) *
                         static_cast<double>(s.out_channels) / static_cast<double>(s.groups) *
                         static_cast<double>(taps);
    return flops < parallel_flops ? 1 : usable_threads(threads);
}

// Rows of x, and of the state that lies before them.
template <class T>
struct CopyRows {
    const CausalConvForward<T>& p;
    Index begin;  // of the sequence

    PK_INLINE void operator()(T* out, Index sequence, Index row, Index time, Index count) const {
        const View3<const T>& x = p.x;
        const T* from = x.data + sequence * x.batch_stride + row * x.channel_stride + (begin + time) * x.time_stride;
        if (x.time_stride == 1)
            copy(out, from, count);
        else
            for (Index i = 0; i < count; ++i) out[i] = from[i * x.time_stride];
    }
    // Before the first sample: `time` counts from it, and is negative.
    PK_INLINE void before(T* out, Index sequence, Index row, Index time, Index count) const {
        const View3<const T>& state = p.state;
        if (state.data == nullptr) return clear(out, count);
        const Index size = (p.shape.kernel_size - 1) * p.shape.dilation;
        copy(out, state.data + sequence * state.batch_stride + row * state.channel_stride + size + time, count);
    }
};

// Rows of dz = grad_y act'(z).
template <class T>
struct DifferentiateRows {
    const CausalConvBackward<T>& p;
    Index begin;

    PK_INLINE void operator()(T* out, Index sequence, Index row, Index time, Index count) const {
        const View3<const T>&g = p.grad_y, &saved = p.activation == Activation::none ? p.grad_y : p.saved;
        time += begin;
        const T* gp = g.data + sequence * g.batch_stride + row * g.channel_stride + time * g.time_stride;
        const T* sp =
            saved.data + sequence * saved.batch_stride + row * saved.channel_stride + time * saved.time_stride;
        const Vec<T> slope(p.negative_slope);
        for (Index i = 0; i < count; i += Vec<T>::lanes) {
            const int n = static_cast<int>(min(Vec<T>::lanes, count - i));
            const Vec<T> dz =
                activate_backward(load_strided(gp + i * g.time_stride, g.time_stride, n),
                                  load_strided(sp + i * saved.time_stride, saved.time_stride, n), p.activation, slope);
            if (n == Vec<T>::lanes)
                dz.store(out + i);
            else
                dz.store_first(out + i, n);
        }
    }
    PK_INLINE void before(T* out, Index, Index, Index, Index count) const { clear(out, count); }
};

enum class Reach { left, right };  // where the taps of a panel lie: the past (x) or the future (dz)

template <class T>
struct Panel {
    T* data;         // (rows, width), columns as in the picture above
    Index width;     // columns of a row
    Index tap0;      // column where tap 0 starts
    Index tap_step;  // columns from tap j to tap j + 1
    Index live;      // taps that see data
};

template <class T>
PK_INLINE Index panel_width(const ConvShape& s, Index live, Index columns) {
    return live == 0 ? 0 : (live - 1) * min(s.dilation, columns) + columns;
}

// A stretch [t0, t0 + n) of time of one sequence.
struct Piece {
    Index sequence, t0, n;
};

// A piece for every live tap; n is padded to whole vectors with what follows, or zeros.
template <class T, class Rows>
Panel<T> fill_panel(T* data, const ConvShape& s, Reach reach, Index live, Index rows, const Piece& piece, Index length,
                    const Rows& copy_row) {
    const Index t0 = piece.t0, n = piece.n;
    const Index columns = round_up_to_vector<T>(n);
    const Index step = min(s.dilation, columns);
    const Index width = panel_width<T>(s, live, columns);
    const bool overlapping = s.dilation <= columns;
    const Index windows = overlapping ? 1 : live;
    const Index window_columns = overlapping ? width : columns;
    // A window starts `first` samples from t0 and the next one a dilation further on.
    const Index first = reach == Reach::left ? -(live - 1) * s.dilation : 0;
    for (Index row = 0; row < rows; ++row) {
        for (Index window = 0; window < windows; ++window) {
            T* out = data + row * width + window * columns;
            const Index time = t0 + first + window * s.dilation;
            const Index begin = min(max(0, -time), window_columns);
            const Index end = max(begin, min(window_columns, length - time));
            if (begin > 0) copy_row.before(out, piece.sequence, row, time, begin);
            if (end > begin) copy_row(out + begin, piece.sequence, row, time + begin, end - begin);
            if (end < window_columns) clear(out + end, window_columns - end);
        }
    }
    return reach == Reach::left ? Panel<T>{data, width, (live - 1) * step, -step, live}
                                : Panel<T>{data, width, 0, step, live};
}

// Weights as the product reads them: for each block of rows (8, 8, ..., then what is left as 4, 2, 1), [tap][inner][row].
template <class T, int block>
T* pack_rows(T* packed, const T* weight, Index row_stride, Index inner, Index inner_stride, Index taps) {
    for (Index j = 0; j < taps; ++j)
        for (Index i = 0; i < inner; ++i, packed += block)
#pragma GCC unroll 8
            for (int m = 0; m < block; ++m) packed[m] = weight[m * row_stride + i * inner_stride - j];
    return packed;
}

template <class T>
void pack_weights(T* packed, const T* weight, Index rows, Index row_stride, Index inner, Index inner_stride,
                  Index kernel_size, Index taps) {
    int block = conv_rows;
    for (Index row = 0; row < rows; row += block) {
        while (block > rows - row) block /= 2;
        const T* newest = weight + row * row_stride + (kernel_size - 1);
        switch (block) {
            case 8: packed = pack_rows<T, conv_rows>(packed, newest, row_stride, inner, inner_stride, taps); break;
            case 4: packed = pack_rows<T, 4>(packed, newest, row_stride, inner, inner_stride, taps); break;
            case 2: packed = pack_rows<T, 2>(packed, newest, row_stride, inner, inner_stride, taps); break;
            default: packed = pack_rows<T, 1>(packed, newest, row_stride, inner, inner_stride, taps);
        }
    }
}

// acc[m] = bias[m] + sum_{j, i} w[j][i][m] panel[i][tap j + column], for `columns` vectors from `column` on.
//
// At most `chunk_terms` products are added up one after the other, then the chunk's sum is added to the total: with all of
// them in one chain the rounding error would exceed that of plain PyTorch several times.
template <class T, int rows, int columns>
PK_INLINE void multiply(Vec<T> (&acc)[rows][columns], const T* w, const T* bias, const Panel<T>& panel, Index inner,
                        Index column) {
    constexpr int lanes = Vec<T>::lanes;
    const Vec<T> zero(T(0));
    Vec<T> total[rows][columns];
    Index terms = 0;
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < columns; ++v) {
            total[m][v] = Vec<T>(bias == nullptr ? T(0) : bias[m]);
            acc[m][v] = zero;
        }
    for (Index j = 0; j < panel.live; ++j) {
        const T* x = panel.data + panel.tap0 + j * panel.tap_step + column;
        for (Index i = 0; i < inner;) {
            const Index end = min(inner, i + chunk_terms);
            if (terms + end - i > chunk_terms) {
#pragma GCC unroll 8
                for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
                    for (int v = 0; v < columns; ++v) {
                        total[m][v] = total[m][v] + acc[m][v];
                        acc[m][v] = zero;
                    }
                terms = 0;
            }
            terms += end - i;
            for (; i < end; ++i, x += panel.width, w += rows) {
                Vec<T> xv[columns];
#pragma GCC unroll 8
                for (int v = 0; v < columns; ++v) xv[v] = Vec<T>::load(x + v * lanes);
#pragma GCC unroll 8
                for (int m = 0; m < rows; ++m) {
                    const Vec<T> wv(w[m]);
#pragma GCC unroll 8
                    for (int v = 0; v < columns; ++v) acc[m][v] = acc[m][v] + wv * xv[v];
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < columns; ++v) acc[m][v] = total[m][v] + acc[m][v];
}

template <class T, int rows, int columns, class Write>
PK_INLINE void multiply_and_write(const T* w, const T* bias, const Panel<T>& panel, Index inner, Index row,
                                  Index column, Index n, const Write& write) {
    Vec<T> acc[rows][columns];
    multiply<T, rows, columns>(acc, w, bias, panel, inner, column);
    constexpr Index all = columns * Vec<T>::lanes;
    // The lanes of the last vector that lie inside the tile.
    const int last = static_cast<int>(n - column >= all ? Vec<T>::lanes : n - column - (all - Vec<T>::lanes));
    write(acc, row, column, last);
}

// Multiplies `rows` rows of weights, the rows from `row` on of the result, with all n columns of the panel.
template <class T, int rows, class Write>
void multiply_rows(const T* w, const T* bias, const Panel<T>& panel, Index inner, Index row, Index n,
                   const Write& write) {
    constexpr int lanes = Vec<T>::lanes;
    for (Index column = 0; column < n;) {
        const Index vectors = divide_up(n - column, lanes);
        if (vectors >= 3 && vectors != 4) {  // four left are better taken as 2 + 2 than as 3 + 1
            multiply_and_write<T, rows, 3>(w, bias, panel, inner, row, column, n, write);
            column += 3 * lanes;
        } else if (vectors >= 2) {
            multiply_and_write<T, rows, 2>(w, bias, panel, inner, row, column, n, write);
            column += 2 * lanes;
        } else {
            multiply_and_write<T, rows, 1>(w, bias, panel, inner, row, column, n, write);
            column += lanes;
        }
    }
}

// All rows. `packed` holds `taps` taps per row block, of which the panel's live ones come first.
template <class T, class Write>
void multiply_panel(const T* packed, Index taps, const T* bias, const Panel<T>& panel, Index rows, Index inner, Index n,
                    const Write& write) {
    int block = conv_rows;
    for (Index row = 0; row < rows; row += block) {
        while (block > rows - row) block /= 2;
        const T* w = packed + row * taps * inner;
        const T* b = bias == nullptr ? nullptr : bias + row;
        switch (block) {
            case 8: multiply_rows<T, conv_rows>(w, b, panel, inner, row, n, write); break;
            case 4: multiply_rows<T, 4>(w, b, panel, inner, row, n, write); break;
            case 2: multiply_rows<T, 2>(w, b, panel, inner, row, n, write); break;
            default: multiply_rows<T, 1>(w, b, panel, inner, row, n, write);
        }
    }
}

// Stores a row of register tile; `last` lanes of the last vector lie inside the tile.
template <class T, int columns>
PK_INLINE void store_row(T* out, const Vec<T> (&value)[columns], int last) {
    constexpr int lanes = Vec<T>::lanes;
#pragma GCC unroll 8
    for (int v = 0; v < columns - 1; ++v) value[v].store(out + v * lanes);
    if (last == lanes)
        value[columns - 1].store(out + (columns - 1) * lanes);
    else
        value[columns - 1].store_first(out + (columns - 1) * lanes, last);
}

template <class T, int rows, int columns>
PK_INLINE void activate_tile(Vec<T> (&acc)[rows][columns], Activation activation, Vec<T> slope) {
    if (activation == Activation::none) return;
    if (activation != Activation::relu && activation != Activation::leaky_relu) {
        alignas(64) T values[rows * columns * Vec<T>::lanes];
        std::memcpy(values, acc, sizeof values);
        activate_in_place(values, rows * columns * Vec<T>::lanes, activation);
        std::memcpy(acc, values, sizeof values);
        return;
    }
    const bool relu = activation == Activation::relu;
    const Vec<T> zero(T(0));
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < columns; ++v)
            acc[m][v] = select_le(acc[m][v], zero, relu ? zero : slope * acc[m][v], acc[m][v]);
}

// acc += the same rows and columns of `view`, unless that is null.
template <class T, int rows, int columns>
PK_INLINE void add_tile(Vec<T> (&acc)[rows][columns], const View3<const T>& view, Index batch, Index row, Index time,
                        int last) {
    constexpr int lanes = Vec<T>::lanes;
    if (view.data == nullptr) return;
    const T* p = view.data + batch * view.batch_stride + row * view.channel_stride + time;
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m, p += view.channel_stride) {
#pragma GCC unroll 8
        for (int v = 0; v < columns - 1; ++v) acc[m][v] = acc[m][v] + Vec<T>::load(p + v * lanes);
        const T* end = p + (columns - 1) * lanes;
        acc[m][columns - 1] = acc[m][columns - 1] + (last == lanes ? Vec<T>::load(end) : Vec<T>::load_first(end, last));
    }
}

template <class T>
struct WriteForward {
    const CausalConvForward<T>& p;
    Index sequence, time;  // of the tile's first column in y and the residual
    T *y, *saved;          // of the tile, saved or null
    Index row_stride;

    template <int rows, int columns>
    PK_INLINE void operator()(Vec<T> (&acc)[rows][columns], Index row, Index column, int last) const {
        const Index offset = row * row_stride + column;
        const auto store = [&](T* out) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int m = 0; m < rows; ++m) store_row(out + offset + m * row_stride, acc[m], last);
        };
        const bool argument = needs_argument(p.activation);
        if (p.residual_before_activation) add_tile(acc, p.residual, sequence, row, time + column, last);
        if (saved != nullptr && argument) store(saved);
        activate_tile(acc, p.activation, Vec<T>(p.negative_slope));
        if (saved != nullptr && !argument) store(saved);
        if (!p.residual_before_activation) add_tile(acc, p.residual, sequence, row, time + column, last);
        store(y);
    }
};

template <class T>
struct WriteGradX {
    const CausalConvBackward<T>& p;
    Index sequence, time;

    template <int rows, int columns>
    PK_INLINE void operator()(Vec<T> (&acc)[rows][columns], Index row, Index column, int last) const {
        add_tile(acc, p.addend, sequence, row, time + column, last);
        const View3<T>& out = p.grad_x;
        T* first = out.data + sequence * out.batch_stride + row * out.channel_stride + time + column;
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) store_row(first + m * out.channel_stride, acc[m], last);
    }
};

// How the time axis is cut: at most `per_sequence` tiles of `columns`, the last one shorter.
struct Tiling {
    Index columns, per_sequence;
};

// The tiles of all sequences, sequence by sequence. Without spans they follow from their number.
struct Tiles {
    Tiling tiling;
    Index length, count;
    const Piece* table;  // with spans
    const Index* first;  // (B + 1), with spans: where each sequence's tiles start

    PK_INLINE Piece operator[](Index k) const {
        if (table != nullptr) return table[k];
        const Index t0 = k % tiling.per_sequence * tiling.columns;
        return {k / tiling.per_sequence, t0, min(tiling.columns, length - t0)};
    }
    PK_INLINE Index first_of(Index sequence) const {
        return first == nullptr ? sequence * tiling.per_sequence : first[sequence];
    }
};

// Bytes of the tables of `Tiles`, 0 without spans.
Index table_bytes(const ConvShape& s, const Span* spans, const Tiling& tiling) {
    if (spans == nullptr) return 0;
    Index pieces = 0;
    for (Index i = 0; i < s.batch; ++i) pieces += divide_up(spans[i].length, tiling.columns);
    return pieces * static_cast<Index>(sizeof(Piece)) + (s.batch + 1) * static_cast<Index>(sizeof(Index));
}

Tiles fill_tables(const ConvShape& s, const Span* spans, const Tiling& tiling, void* memory) {
    if (spans == nullptr) return {tiling, s.length, s.batch * tiling.per_sequence, nullptr, nullptr};
    Index* first = static_cast<Index*>(memory);
    Piece* table = reinterpret_cast<Piece*>(first + s.batch + 1);
    Index count = 0;
    for (Index i = 0; i < s.batch; ++i) {
        first[i] = count;
        for (Index t0 = 0; t0 < spans[i].length; t0 += tiling.columns)
            table[count++] = {i, t0, min(tiling.columns, spans[i].length - t0)};
    }
    first[s.batch] = count;
    return {tiling, s.length, count, table, first};
}

// Tiles whose panels, of `column_bytes` per column, take `budget` at most, no longer than `longest`, and so many that there
// are `wanted` of them; but none shorter than a few vectors.
template <class T>
Tiling cut_time(const ConvShape& s, Index column_bytes, Index budget, Index longest, Index wanted) {
    constexpr Index shortest = conv_columns * Vec<T>::lanes;
    const Index fits = max(shortest, min(longest, budget / max(1, column_bytes)));
    const Index tiles = max(divide_up(s.length, fits), min(divide_up(wanted, s.batch), divide_up(s.length, shortest)));
    const Index columns = round_up_to_vector<T>(divide_up(s.length, tiles));
    return {columns, divide_up(s.length, columns)};
}

// Panel columns per column of a tile: taps further apart than a tile have windows of their own.
PK_INLINE Index windows(const ConvShape& s, Index taps) { return s.dilation < 64 ? 1 : taps; }

// The first column of the maximum of row[0], ..., row[n - 1], or of a NaN.
template <class T>
Index find_maximum(const T* row, Index n) {
    constexpr int lanes = Vec<T>::lanes;
    Vec<T> best(row[0]), is_number(T(1));
    const auto take = [&](Vec<T> v) {
        best = select_le(v, best, best, v);
        is_number = select_le(v, v, is_number, Vec<T>(T(0)));
    };
    Index i = 0;
    for (; i + lanes <= n; i += lanes) take(Vec<T>::load(row + i));
    for (; i < n; ++i) take(Vec<T>(row[i]));
    T lane[lanes], numbers[lanes];
    best.store(lane);
    is_number.store(numbers);
    T value = lane[0];
    bool all_numbers = true;
    for (int i = 0; i < lanes; ++i) {
        value = lane[i] > value ? lane[i] : value;
        all_numbers = all_numbers && numbers[i] > T(0);
    }
    Index column = 0;
    if (all_numbers)
        while (row[column] < value) ++column;
    else
        while (row[column] == row[column]) ++column;
    return column;
}

template <class T>
struct ForwardTask {
    const CausalConvForward<T>& p;
    Tiles tiles;
    Index taps;
    const T* packed;
    T* panels;  // one per worker
    Index panel_stride;
    T* rows;  // per worker, with a pool: y and h of a tile
    Index rows_stride;
    Pool<T> pools;  // the pool of every tile, (tile, O)

    void operator()(Index tile, int worker) const {
        const ConvShape& s = p.shape;
        const Piece piece = tiles[tile];
        const Index begin = begin_of(p.spans, piece.sequence), time = begin + piece.t0;
        const Index live = p.state.data != nullptr ? taps : live_taps(s, piece.t0 + piece.n - 1);
        const Panel<T> panel = fill_panel(panels + worker * panel_stride, s, Reach::left, live, s.in_channels, piece,
                                          length_of(s, p.spans, piece.sequence), CopyRows<T>{p, begin});
        if (p.y.data != nullptr) {
            const Index offset = piece.sequence * p.y.batch_stride + time;
            T* saved = p.saved == nullptr ? nullptr : p.saved + offset;
            multiply(panel, piece.n, {p, piece.sequence, time, p.y.data + offset, saved, p.y.channel_stride});
            return;
        }
        const Index columns = tiles.tiling.columns;
        T* y = rows + worker * rows_stride;
        T* h = pools.h == nullptr ? nullptr : y + s.out_channels * columns;
        multiply(panel, piece.n, {p, piece.sequence, time, y, h, columns});
        for (Index o = 0; o < s.out_channels; ++o) {
            const Index best = find_maximum(y + o * columns, piece.n), out = tile * s.out_channels + o;
            pools.value[out] = y[o * columns + best];
            pools.time[out] = piece.t0 + best;
            if (h != nullptr) pools.h[out] = h[o * columns + best];
        }
    }

    void multiply(const Panel<T>& panel, Index n, const WriteForward<T>& write) const {
        multiply_panel(packed, taps, p.bias, panel, p.shape.out_channels, p.shape.in_channels, n, write);
    }

    // The pool of a sequence from those of its tiles.
    void merge_tiles(Index sequence) const {
        const Index stride = p.shape.out_channels;
        for (Index o = 0; o < stride; ++o) {
            const Index first = tiles.first_of(sequence) * stride + o;
            Index best = first;
            for (Index i = first + stride; i < tiles.first_of(sequence + 1) * stride; i += stride) {
                const T value = pools.value[best];
                if (value == value && !(pools.value[i] <= value)) best = i;
            }
            const Index out = sequence * stride + o;
            p.pool.value[out] = pools.value[best];
            p.pool.time[out] = pools.time[best];
            if (p.pool.h != nullptr) p.pool.h[out] = pools.h[best];
        }
    }

    static void run(const void* task, Index tile, int worker) {
        (*static_cast<const ForwardTask*>(task))(tile, worker);
    }
};

// One group of channels.
template <class T>
void forward_dense(const CausalConvForward<T>& p) {
    const ConvShape& s = p.shape;
    if (s.batch == 0 || s.length == 0 || s.out_channels == 0) return;
    const Index taps = p.state.data != nullptr ? s.kernel_size : live_taps(s, s.length - 1);
    const int workers = worker_count(s, p.spans, taps, p.threads);
    const Index column_bytes = s.in_channels * windows(s, taps) * static_cast<Index>(sizeof(T));
    const Tiling tiling = cut_time<T>(s, column_bytes, panel_bytes, tile_columns<T>, 8 * workers);
    const Index panel_stride = aligned<T>(s.in_channels * panel_width<T>(s, taps, tiling.columns));
    const Index weights = aligned<T>(s.out_channels * s.in_channels * taps);
    const bool pools = p.pool.value != nullptr, pools_h = p.pool.h != nullptr;
    const Index rows_stride = pools ? aligned<T>((pools_h ? 2 : 1) * s.out_channels * tiling.columns) : 0;
    const Index most_tiles = s.batch * tiling.per_sequence;
    const Index pooled = pools ? aligned<T>(most_tiles * s.out_channels) : 0;
    const std::size_t values_end =
        static_cast<std::size_t>(weights + workers * (panel_stride + rows_stride) + 2 * pooled) * sizeof(T);
    const std::size_t times_end = values_end + static_cast<std::size_t>(pooled) * sizeof(Index);
    const Scratch scratch(times_end + static_cast<std::size_t>(table_bytes(s, p.spans, tiling)));
    T* packed = static_cast<T*>(scratch.data());
    char* bytes = static_cast<char*>(scratch.data());
    pack_weights(packed, p.weight, s.out_channels, s.in_channels * s.kernel_size, s.in_channels, s.kernel_size,
                 s.kernel_size, taps);
    T* panels = packed + weights;
    T* rows = panels + workers * panel_stride;
    T* values = rows + workers * rows_stride;
    const Tiles tiles = fill_tables(s, p.spans, tiling, bytes + times_end);
    const Pool<T> tile_pools{values, reinterpret_cast<Index*>(bytes + values_end), pools_h ? values + pooled : nullptr};
    const ForwardTask<T> task{p, tiles, taps, packed, panels, panel_stride, rows, rows_stride, tile_pools};
    parallel_tasks(tiles.count, workers, ForwardTask<T>::run, &task);
    for (Index sequence = 0; pools && sequence < s.batch; ++sequence) task.merge_tiles(sequence);
}

// Pieces of sequences that are reduced in registers together. Their dz lies in a panel, piece after piece and padded with
// zeros to whole vectors; x is read where it is, from the first sample that a tap sees:
//
//     dz  row o  [ piece 0: n columns, 0.. | piece 1 | ... ]  dz_stride
template <class T>
struct Bundle {
    const T* dz;
    Index dz_stride, dz_columns;  // of a row; taken by pieces
    const Piece* pieces;
    Index count, live;  // pieces, and taps that one of them sees data at
};

// out[b * out_stride + a] += the sum of the lanes folded in folded[a][b]. Not inlined, so that the lanes are read back from
// memory: moving them between registers keeps the one shuffle port busy for longer.
template <class T, int rows, int columns>
__attribute__((noinline)) void add_folded(T* out, Index out_stride, const T (&folded)[rows][columns][folded_lanes<T>]) {
#pragma GCC unroll 8
    for (int b = 0; b < columns; ++b)
#pragma GCC unroll 8
        for (int a = 0; a < rows; ++a) {
            const T* lane = folded[a][b];
            T sum = lane[0] + lane[1];
            if constexpr (folded_lanes<T> == 4) sum += lane[2] + lane[3];
            out[b * out_stride + a] += sum;
        }
}

// partial[j][c0 + b][o0 + a] += sum over the bundle of dz[o0 + a][t] x[c0 + b][t - j*dilation].
template <class T, int rows, int columns>
void reduce_block(T* partial, const CausalConvBackward<T>& p, const Bundle<T>& bundle, Index o0, Index c0, Index j) {
    constexpr int lanes = Vec<T>::lanes;
    const ConvShape& s = p.shape;
    const Index shift = j * s.dilation, dz_stride = bundle.dz_stride, x_stride = p.x.channel_stride;
    const T* dz = bundle.dz + o0 * dz_stride;
    const T* x = nullptr;
    Vec<T> acc[rows][columns];
#pragma GCC unroll 8
    for (int a = 0; a < rows; ++a)
#pragma GCC unroll 8
        for (int b = 0; b < columns; ++b) acc[a][b] = Vec<T>(T(0));
    // dz is read by whole aligned vectors, and x is zero in the lanes that do not count.
    const auto accumulate = [&](Index i, auto load) __attribute__((always_inline)) {
        Vec<T> xv[columns];
#pragma GCC unroll 8
        for (int b = 0; b < columns; ++b) xv[b] = load(x + b * x_stride + i);
#pragma GCC unroll 8
        for (int a = 0; a < rows; ++a) {
            const Vec<T> d = Vec<T>::load(dz + a * dz_stride + i);
#pragma GCC unroll 8
            for (int b = 0; b < columns; ++b) acc[a][b] = acc[a][b] + d * xv[b];
        }
    };
    for (Index k = 0; k < bundle.count; ++k) {
        const Piece& piece = bundle.pieces[k];
        const Index begin = max(0, shift - piece.t0);  // the first column that tap j sees data at
        const Index first_whole = divide_up(begin, lanes) * lanes, end_whole = piece.n / lanes * lanes;
        const auto partly = [&](Index i) __attribute__((always_inline)) {
            const int low = static_cast<int>(max(0, begin - i)), high = static_cast<int>(min(lanes, piece.n - i));
            accumulate(i, [=](const T* from) { return Vec<T>::load_range(from, low, high); });
        };
        if (begin < piece.n) {
            x = p.x.data + piece.sequence * p.x.batch_stride + c0 * x_stride +
                (begin_of(p.spans, piece.sequence) + piece.t0 - shift);
            if (begin < first_whole) partly(first_whole - lanes);
            for (Index i = first_whole; i < end_whole; i += lanes)
                accumulate(i, [](const T* from) { return Vec<T>::load(from); });
            if (end_whole < piece.n && first_whole <= end_whole) partly(end_whole);
        }
        dz += divide_up(piece.n, lanes) * lanes;
    }
    T folded[rows][columns][folded_lanes<T>];
#pragma GCC unroll 8
    for (int a = 0; a < rows; ++a)
#pragma GCC unroll 8
        for (int b = 0; b < columns; ++b) store_folded(folded[a][b], acc[a][b]);
    add_folded<T, rows, columns>(partial + (j * s.in_channels + c0) * s.out_channels + o0, s.out_channels, folded);
}

// All rows of dz against channels [c0, c0 + columns) of x at tap j, which stay in the first cache level.
template <class T, int columns>
void reduce_columns(T* partial, const CausalConvBackward<T>& p, const Bundle<T>& bundle, Index c0, Index j) {
    for (Index o0 = 0; o0 < p.shape.out_channels;) {
        const Index left = p.shape.out_channels - o0;
        if (left >= dot_rows) {
            reduce_block<T, dot_rows, columns>(partial, p, bundle, o0, c0, j);
            o0 += dot_rows;
        } else if (left >= 2) {
            reduce_block<T, 2, columns>(partial, p, bundle, o0, c0, j);
            o0 += 2;
        } else {
            reduce_block<T, 1, columns>(partial, p, bundle, o0, c0, j);
            o0 += 1;
        }
    }
}

template <class T>
void reduce_weights(T* partial, const CausalConvBackward<T>& p, const Bundle<T>& bundle) {
    for (Index j = 0; j < bundle.live; ++j) {
        for (Index c0 = 0; c0 < p.shape.in_channels;) {
            const Index left = p.shape.in_channels - c0;
            if (left >= dot_columns) {
                reduce_columns<T, dot_columns>(partial, p, bundle, c0, j);
                c0 += dot_columns;
            } else if (left >= 2) {
                reduce_columns<T, 2>(partial, p, bundle, c0, j);
                c0 += 2;
            } else {
                reduce_columns<T, 1>(partial, p, bundle, c0, j);
                c0 += 1;
            }
        }
    }
}

template <class T>
void reduce_bias(T* grad_bias, const ConvShape& s, const Bundle<T>& bundle) {
    for (Index o = 0; o < s.out_channels; ++o) {
        Vec<T> total(T(0));
        for (Index i = 0; i < bundle.dz_columns;) {
            Vec<T> sum(T(0));
            for (const Index end = min(bundle.dz_columns, i + chunk_terms * Vec<T>::lanes); i < end; i += Vec<T>::lanes)
                sum = sum + Vec<T>::load(bundle.dz + o * bundle.dz_stride + i);
            total = total + sum;
        }
        T folded[1][1][folded_lanes<T>];
        store_folded(folded[0][0], total);
        add_folded<T, 1, 1>(grad_bias + o, 0, folded);
    }
}

// The backward: chunks for grad_weight and grad_bias, tiles for grad_x.
template <class T>
struct BackwardTask {
    const CausalConvBackward<T>& p;
    T* memory = nullptr;  // per worker: dz of a bundle, or the panel of one tile of grad_x
    Index memory_stride = 0;

    Index chunks = 0, bundles = 0;
    const Piece* pieces = nullptr;  // bundle by bundle
    const Index* first = nullptr;   // (bundles + 1): where each bundle's pieces start
    Index bundle_stride = 0;        // columns of a row
    T* partial = nullptr;           // per chunk: grad_weight as [tap][in channel][out channel], then grad_bias
    Index partial_stride = 0, weights = 0;

    Tiles tiles{};
    Index taps = 0;
    const T* packed = nullptr;  // W^T

    void reduce(Index chunk, int worker) const {
        T* out = partial + chunk * partial_stride;
        clear(out, partial_stride);
        for (Index k = chunk * bundles / chunks; k < (chunk + 1) * bundles / chunks; ++k) {
            const Bundle<T> bundle =
                fill_bundle(memory + worker * memory_stride, pieces + first[k], first[k + 1] - first[k]);
            if (p.grad_weight != nullptr) reduce_weights(out, p, bundle);
            if (p.grad_bias != nullptr) reduce_bias(out + weights, p.shape, bundle);
        }
    }

    Bundle<T> fill_bundle(T* dz, const Piece* own, Index count) const {
        const ConvShape& s = p.shape;
        Index column = 0, live = 0;
        for (Index i = 0; i < count; ++i) {
            const Piece& piece = own[i];
            const Index columns = round_up_to_vector<T>(piece.n);
            const DifferentiateRows<T> rows{p, begin_of(p.spans, piece.sequence)};
            for (Index o = 0; o < s.out_channels; ++o) {
                T* out = dz + o * bundle_stride + column;
                rows(out, piece.sequence, o, piece.t0, piece.n);
                clear(out + piece.n, columns - piece.n);
            }
            column += columns;
            live = max(live, live_taps(s, piece.t0 + piece.n - 1));
        }
        return {dz, bundle_stride, column, own, count, live};
    }

    void propagate(Index tile, int worker) const {
        const ConvShape& s = p.shape;
        const Piece piece = tiles[tile];
        const Index begin = begin_of(p.spans, piece.sequence), length = length_of(s, p.spans, piece.sequence);
        const Panel<T> panel =
            fill_panel(memory + worker * memory_stride, s, Reach::right, live_taps(s, length - 1 - piece.t0),
                       s.out_channels, piece, length, DifferentiateRows<T>{p, begin});
        multiply_panel<T>(packed, taps, nullptr, panel, s.in_channels, s.out_channels, piece.n,
                          WriteGradX<T>{p, piece.sequence, begin + piece.t0});
    }

    // Sums the partial gradients of one vector of output channels, in the order of the chunks, into the layout of weight.
    void finish(Index block) const {
        const ConvShape& s = p.shape;
        const Index o0 = block * Vec<T>::lanes;
        const int n = static_cast<int>(min(Vec<T>::lanes, s.out_channels - o0));
        const auto sum = [&](Index offset) {
            Vec<T> total(T(0));
            for (Index chunk = 0; chunk < chunks; ++chunk)
                total = total + Vec<T>::load_first(partial + chunk * partial_stride + offset + o0, n);
            return total;
        };
        alignas(64) T lane[Vec<T>::lanes];
        for (Index c = 0; p.grad_weight != nullptr && c < s.in_channels; ++c) {
            for (Index j = 0; j < s.kernel_size; ++j) {
                (j < taps ? sum((j * s.in_channels + c) * s.out_channels) : Vec<T>(T(0))).store(lane);
                T* out = p.grad_weight + (o0 * s.in_channels + c) * s.kernel_size + (s.kernel_size - 1 - j);
                for (int a = 0; a < n; ++a) out[a * s.in_channels * s.kernel_size] = lane[a];
            }
        }
        if (p.grad_bias != nullptr) sum(weights).store_first(p.grad_bias + o0, n);
    }

    // A chunk and its share of the tiles of grad_x, which find grad_y and what was saved still in cache.
    void reduce_and_propagate(Index chunk, int worker) const {
        reduce(chunk, worker);
        for (Index tile = chunk * tiles.count / chunks; tile < (chunk + 1) * tiles.count / chunks; ++tile)
            propagate(tile, worker);
    }

    static void run_both(const void* task, Index chunk, int worker) {
        static_cast<const BackwardTask*>(task)->reduce_and_propagate(chunk, worker);
    }
    static void run_reduce(const void* task, Index chunk, int worker) {
        static_cast<const BackwardTask*>(task)->reduce(chunk, worker);
    }
    static void run_finish(const void* task, Index block, int) {
        static_cast<const BackwardTask*>(task)->finish(block);
    }
    static void run_propagate(const void* task, Index tile, int worker) {
        static_cast<const BackwardTask*>(task)->propagate(tile, worker);
    }
};

// How sequences are cut into pieces and pieces gathered into bundles.
struct Bundling {
    Tiling tiling;
    Index parts;    // without spans: a bundle holds the same piece of batch / parts sequences
    Index columns;  // most columns of a bundle
    Index most;     // bundles and pieces at most
};

template <class T>
Bundling plan_bundles(const ConvShape& s, const Span* spans) {
    const Index column_bytes =
        (s.out_channels + s.in_channels) * static_cast<Index>(sizeof(T));  // dz in its panel, x in place
    const Tiling tiling = cut_time<T>(s, column_bytes, bundle_bytes, bundle_columns, 2);
    const Index per_bundle = max(1, min(bundle_columns, bundle_bytes / column_bytes) / tiling.columns);
    if (spans != nullptr) return {tiling, 0, per_bundle * tiling.columns, s.batch * tiling.per_sequence};
    Index parts = divide_up(s.batch, per_bundle);
    // An even number of bundles gives two workers equal shares.
    if (tiling.per_sequence == 1 && parts % 2 == 1 && parts < s.batch) ++parts;
    return {tiling, parts, divide_up(s.batch, parts) * tiling.columns, s.batch * tiling.per_sequence};
}

// Fills the tables of BackwardTask, and returns the number of bundles.
template <class T>
Index fill_bundles(const ConvShape& s, const Span* spans, const Bundling& plan, Piece* pieces, Index* first) {
    const Index columns = plan.tiling.columns;
    Index bundles = 0, count = 0;
    first[0] = 0;
    if (spans == nullptr) {
        for (Index part = 0; part < plan.parts; ++part) {
            for (Index t0 = 0; t0 < s.length; t0 += columns) {
                for (Index i = part * s.batch / plan.parts; i < (part + 1) * s.batch / plan.parts; ++i)
                    pieces[count++] = {i, t0, min(columns, s.length - t0)};
                first[++bundles] = count;
            }
        }
        return bundles;
    }
    Index used = 0;
    for (Index i = 0; i < s.batch; ++i) {
        for (Index t0 = 0; t0 < spans[i].length; t0 += columns) {
            const Index n = min(columns, spans[i].length - t0);
            if (used + round_up_to_vector<T>(n) > plan.columns) {
                first[++bundles] = count;
                used = 0;
            }
            used += round_up_to_vector<T>(n);
            pieces[count++] = {i, t0, n};
        }
    }
    if (used > 0) first[++bundles] = count;
    return bundles;
}

// One group of channels.
template <class T>
void backward_dense(const CausalConvBackward<T>& p) {
    const ConvShape& s = p.shape;
    if (s.batch == 0 || s.length == 0 || s.out_channels == 0) {
        if (p.grad_weight != nullptr) clear(p.grad_weight, s.out_channels * s.in_channels * s.kernel_size);
        if (p.grad_bias != nullptr) clear(p.grad_bias, s.out_channels);
        return;
    }
    const Index taps = live_taps(s, s.length - 1);
    const int workers = worker_count(s, p.spans, taps, p.threads);
    constexpr Index size = sizeof(T);
    const Index weights = p.grad_weight == nullptr ? 0 : s.out_channels * s.in_channels * taps;
    BackwardTask<T> task{p};
    task.taps = taps;
    task.weights = weights;
    task.partial_stride = weights + (p.grad_bias == nullptr ? 0 : s.out_channels);

    const bool reduces = task.partial_stride > 0;
    const Bundling plan = reduces ? plan_bundles<T>(s, p.spans) : Bundling{};
    Index bundle_elements = 0, tile_elements = 0, packed = 0;
    if (reduces) {
        // A stride of a power of two would put all rows into the same few sets of the cache.
        task.bundle_stride = plan.columns + Vec<T>::lanes;
        bundle_elements = aligned<T>(s.out_channels * task.bundle_stride);
    }
    Tiling tiling{};
    if (p.grad_x.data != nullptr) {
        tiling = cut_time<T>(s, s.out_channels * windows(s, taps) * size, panel_bytes, tile_columns<T>, 8 * workers);
        tile_elements = aligned<T>(s.out_channels * panel_width<T>(s, taps, tiling.columns));
        packed = aligned<T>(s.out_channels * s.in_channels * taps);
    }
    task.memory_stride = max(bundle_elements, tile_elements);
    const Index most_chunks = min(plan.most, max_chunks);
    const auto align_to_line = [](Index bytes) { return divide_up(bytes, 64) * 64; };
    const Index values_end =
        align_to_line((packed + workers * task.memory_stride + most_chunks * task.partial_stride) * size);
    const Index pieces_end = values_end + plan.most * static_cast<Index>(sizeof(Piece));
    const Index firsts_end = pieces_end + (plan.most + 1) * static_cast<Index>(sizeof(Index));
    const Index end = firsts_end + (p.grad_x.data == nullptr ? 0 : table_bytes(s, p.spans, tiling));
    const Scratch scratch(static_cast<std::size_t>(end));
    T* memory = static_cast<T*>(scratch.data());
    char* bytes = static_cast<char*>(scratch.data());
    if (p.grad_x.data != nullptr) {
        pack_weights(memory, p.weight, s.in_channels, s.kernel_size, s.out_channels, s.in_channels * s.kernel_size,
                     s.kernel_size, taps);
        task.tiles = fill_tables(s, p.spans, tiling, bytes + firsts_end);
    }
    if (reduces) {
        Piece* pieces = reinterpret_cast<Piece*>(bytes + values_end);
        Index* first = reinterpret_cast<Index*>(bytes + pieces_end);
        task.bundles = fill_bundles<T>(s, p.spans, plan, pieces, first);
        task.chunks = min(task.bundles, max_chunks);
        task.pieces = pieces;
        task.first = first;
    }
    task.packed = memory;
    task.memory = memory + packed;
    task.partial = task.memory + workers * task.memory_stride;
    if (task.chunks >= workers) {
        parallel_tasks(task.chunks, workers, BackwardTask<T>::run_both, &task);
    } else {
        parallel_tasks(task.chunks, workers, BackwardTask<T>::run_reduce, &task);
        parallel_tasks(task.tiles.count, workers, BackwardTask<T>::run_propagate, &task);
    }
    parallel_tasks(reduces ? divide_up(s.out_channels, Vec<T>::lanes) : 0, workers, BackwardTask<T>::run_finish, &task);
}

// The part of the problem that is one group's.
ConvShape shape_of_group(ConvShape s) {
    s.in_channels /= s.groups;
    s.out_channels /= s.groups;
    s.groups = 1;
    return s;
}

template <class V>
PK_INLINE V skip_channels(V view, Index channels) {
    if (view.data != nullptr) view.data += channels * view.channel_stride;
    return view;
}

template <class T>
PK_INLINE T* skip(T* p, Index elements) {
    return p == nullptr ? p : p + elements;
}

template <class T>
CausalConvForward<T> group_of(CausalConvForward<T> p, Index group) {
    p.shape = shape_of_group(p.shape);
    const ConvShape& s = p.shape;
    p.x = skip_channels(p.x, group * s.in_channels);
    p.state = skip_channels(p.state, group * s.in_channels);
    p.residual = skip_channels(p.residual, group * s.out_channels);
    p.saved = skip(p.saved, group * s.out_channels * p.y.channel_stride);
    p.y = skip_channels(p.y, group * s.out_channels);
    p.weight += group * s.out_channels * s.in_channels * s.kernel_size;
    p.bias = skip(p.bias, group * s.out_channels);
    return p;
}

template <class T>
CausalConvBackward<T> group_of(CausalConvBackward<T> p, Index group) {
    p.shape = shape_of_group(p.shape);
    const ConvShape& s = p.shape;
    const Index weights = group * s.out_channels * s.in_channels * s.kernel_size;
    p.x = skip_channels(p.x, group * s.in_channels);
    p.addend = skip_channels(p.addend, group * s.in_channels);
    p.grad_x = skip_channels(p.grad_x, group * s.in_channels);
    p.grad_y = skip_channels(p.grad_y, group * s.out_channels);
    p.saved = skip_channels(p.saved, group * s.out_channels);
    p.weight += weights;
    p.grad_weight = skip(p.grad_weight, weights);
    p.grad_bias = skip(p.grad_bias, group * s.out_channels);
    return p;
}

void run_dense(const CausalConvForward<float>& p) { forward_dense(p); }
void run_dense(const CausalConvForward<double>& p) { forward_dense(p); }
void run_dense(const CausalConvBackward<float>& p) { backward_dense(p); }
void run_dense(const CausalConvBackward<double>& p) { backward_dense(p); }

// Groups side by side, each on one thread, or one after the other where there are fewer than threads.
template <class Problem>
struct GroupTask {
    const Problem& p;
    bool* failed;

    void operator()(Index group) const {
        Problem part = group_of(p, group);
        part.threads = 1;
        try {
            run_dense(part);
        } catch (...) {                                        // only scratch memory can run out
            __atomic_store_n(failed, true, __ATOMIC_RELAXED);  // std::atomic is code that units would share
        }
    }
    static void run(const void* task, Index group, int) { (*static_cast<const GroupTask*>(task))(group); }
};

template <class Problem>
void run_groups(const Problem& p) {
    const ConvShape& s = p.shape;
    if (s.groups == 1) return run_dense(p);
    const int workers = worker_count(s, p.spans, s.kernel_size, p.threads);
    if (s.groups < workers) {
        for (Index group = 0; group < s.groups; ++group) run_dense(group_of(p, group));
        return;
    }
    bool failed = false;
    const GroupTask<Problem> task{p, &failed};
    parallel_tasks(s.groups, workers, GroupTask<Problem>::run, &task);
    if (failed) throw_out_of_memory();
}

bool is_depthwise(const ConvShape& s) {
    return s.groups > 1 && s.groups == s.in_channels && s.groups == s.out_channels;
}

}  // namespace

void causal_conv_forward(const CausalConvForward<float>& p) {
    is_depthwise(p.shape) ? depthwise_forward(p) : run_groups(p);
}
void causal_conv_forward(const CausalConvForward<double>& p) {
    is_depthwise(p.shape) ? depthwise_forward(p) : run_groups(p);
}
void causal_conv_backward(const CausalConvBackward<float>& p) {
    is_depthwise(p.shape) ? depthwise_backward(p) : run_groups(p);
}
void causal_conv_backward(const CausalConvBackward<double>& p) {
    is_depthwise(p.shape) ? depthwise_backward(p) : run_groups(p);
}

PK_ISA_END
