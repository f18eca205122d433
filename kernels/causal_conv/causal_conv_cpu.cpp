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
// with vectors of time as the reduced index. Samples form groups that are reduced in registers, and groups form chunks,
// each with its own partial grad_weight; both depend on the problem's size alone, so results do not depend on the
// number of threads.
//
// Cost: 2 O C K B T flops forward (dead taps excepted) and twice that backward; forward reads x and writes y once.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "causal_conv/causal_conv.hpp"
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

constexpr Index chunk_terms = 64;         // products in one chain of additions
constexpr Index panel_bytes = 192 << 10;  // forward: input panel of a tile
constexpr Index group_bytes = 768 << 10;  // backward: panels of a group
constexpr Index group_columns = 1024;     // backward: columns reduced in registers
constexpr Index max_chunks = 32;          // backward: partial weight gradients
constexpr double parallel_flops = 200e3;  // below this, waking the other threads costs more than it saves
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

int worker_count(const ConvShape& s, int threads) {
    const double flops = 2.0 * static_cast<double>(s.batch) * static_cast<double>(s.length) *
                         static_cast<double>(s.in_channels) * static_cast<double>(s.out_channels) *
                         static_cast<double>(live_taps(s, s.length - 1));
    return flops < parallel_flops ? 1 : usable_threads(threads);
}

// grad * act'(z) from h = act(z); the sign of h is the sign of z because slopes are not negative.
template <class T>
PK_INLINE Vec<T> activate_backward(Vec<T> grad, Vec<T> h, Activation activation, Vec<T> slope) {
    const Vec<T> zero(T(0));
    switch (activation) {
        case Activation::relu: return select_le(h, zero, zero, grad);
        case Activation::leaky_relu: return select_le(h, zero, slope * grad, grad);
        case Activation::tanh: return grad * (Vec<T>(T(1)) - h * h);
        case Activation::none: break;
    }
    return grad;
}

template <class T>
PK_INLINE Vec<T> load_strided(const T* p, Index stride, int n) {
    if (stride == 1) return n == Vec<T>::lanes ? Vec<T>::load(p) : Vec<T>::load_first(p, n);
    T lane[Vec<T>::lanes] = {};
    for (int i = 0; i < n; ++i) lane[i] = p[i * stride];
    return Vec<T>::load(lane);
}

template <class T>
struct CopyRows {  // rows of x
    View3<const T> x;

    PK_INLINE void operator()(T* out, Index batch, Index row, Index time, Index count) const {
        const T* p = x.data + batch * x.batch_stride + row * x.channel_stride + time * x.time_stride;
        if (x.time_stride == 1)
            copy(out, p, count);
        else
            for (Index i = 0; i < count; ++i) out[i] = p[i * x.time_stride];
    }
};

template <class T>
struct DifferentiateRows {  // rows of dz = grad_y act'(z)
    View3<const T> grad_y, h;
    Activation activation;
    T negative_slope;

    PK_INLINE void operator()(T* out, Index batch, Index row, Index time, Index count) const {
        const View3<const T>& g = grad_y;
        const T* gp = g.data + batch * g.batch_stride + row * g.channel_stride + time * g.time_stride;
        const bool linear = activation == Activation::none;
        const T* hp = linear ? gp : h.data + batch * h.batch_stride + row * h.channel_stride + time * h.time_stride;
        const Index h_stride = linear ? g.time_stride : h.time_stride;
        const Vec<T> slope(negative_slope);
        for (Index i = 0; i < count; i += Vec<T>::lanes) {
            const int n = static_cast<int>(min(Vec<T>::lanes, count - i));
            const Vec<T> dz = activate_backward(load_strided(gp + i * g.time_stride, g.time_stride, n),
                                                load_strided(hp + i * h_stride, h_stride, n), activation, slope);
            if (n == Vec<T>::lanes)
                dz.store(out + i);
            else
                dz.store_first(out + i, n);
        }
    }
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

// Columns [t0, t0 + n) of one sample, for every live tap; n is padded to whole vectors with what follows, or zeros.
template <class T, class Rows>
Panel<T> fill_panel(T* data, const ConvShape& s, Reach reach, Index live, Index rows, Index batch, Index t0, Index n,
                    const Rows& copy_row) {
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
            const Index end = max(begin, min(window_columns, s.length - time));
            if (begin > 0) clear(out, begin);
            if (end > begin) copy_row(out + begin, batch, row, time + begin, end - begin);
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

// Not inlined: as often as a register tile is finished, tanh may not take its registers from the loops before it.
template <class T>
__attribute__((noinline)) void tanh_in_place(T* values, Index count) {
    for (Index i = 0; i < count; i += Vec<T>::lanes) tanh(Vec<T>::load(values + i)).store(values + i);
}

template <class T, int rows, int columns>
PK_INLINE void activate_tile(Vec<T> (&acc)[rows][columns], Activation activation, Vec<T> slope) {
    if (activation == Activation::none) return;
    if (activation == Activation::tanh) {
        alignas(64) T values[rows * columns * Vec<T>::lanes];
        std::memcpy(values, acc, sizeof values);
        tanh_in_place(values, rows * columns * Vec<T>::lanes);
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
    Index batch, t0;
    T *y, *h;  // of the tile, h or null
    Index row_stride;

    template <int rows, int columns>
    PK_INLINE void operator()(Vec<T> (&acc)[rows][columns], Index row, Index column, int last) const {
        activate_tile(acc, p.activation, Vec<T>(p.negative_slope));
        const Index offset = row * row_stride + column;
        if (h != nullptr)
            for (int m = 0; m < rows; ++m) store_row(h + offset + m * row_stride, acc[m], last);
        add_tile(acc, p.residual, batch, row, t0 + column, last);
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) store_row(y + offset + m * row_stride, acc[m], last);
    }
};

template <class T>
struct WriteGradX {
    const CausalConvBackward<T>& p;
    Index batch, t0;

    template <int rows, int columns>
    PK_INLINE void operator()(Vec<T> (&acc)[rows][columns], Index row, Index column, int last) const {
        add_tile(acc, p.addend, batch, row, t0 + column, last);
        T* out = p.grad_x + (batch * p.shape.in_channels + row) * p.shape.length + t0 + column;
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) store_row(out + m * p.shape.length, acc[m], last);
    }
};

// How the time axis is cut: `per_sample` tiles of `columns`, the last one shorter.
struct Tiling {
    Index columns, per_sample;
};

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
    Tiling tiling;
    Index taps;
    const T* packed;
    T* panels;  // one per worker
    Index panel_stride;
    T* rows;  // per worker, with a pool: y and h of a tile
    Index rows_stride;
    Pool<T> tiles;  // the pool of every tile, (B, tile, O)

    void operator()(Index tile, int worker) const {
        const ConvShape& s = p.shape;
        const Index batch = tile / tiling.per_sample, t0 = tile % tiling.per_sample * tiling.columns;
        const Index n = min(tiling.columns, s.length - t0);
        const Panel<T> panel = fill_panel(panels + worker * panel_stride, s, Reach::left, live_taps(s, t0 + n - 1),
                                          s.in_channels, batch, t0, n, CopyRows<T>{p.x});
        if (p.y != nullptr) {
            const Index offset = batch * s.out_channels * s.length + t0;
            multiply(panel, n, {p, batch, t0, p.y + offset, p.h == nullptr ? nullptr : p.h + offset, s.length});
            return;
        }
        T* y = rows + worker * rows_stride;
        T* h = tiles.h == nullptr ? nullptr : y + s.out_channels * tiling.columns;
        multiply(panel, n, {p, batch, t0, y, h, tiling.columns});
        for (Index o = 0; o < s.out_channels; ++o) {
            const Index best = find_maximum(y + o * tiling.columns, n), out = tile * s.out_channels + o;
            tiles.value[out] = y[o * tiling.columns + best];
            tiles.time[out] = t0 + best;
            if (h != nullptr) tiles.h[out] = h[o * tiling.columns + best];
        }
    }

    void multiply(const Panel<T>& panel, Index n, const WriteForward<T>& write) const {
        multiply_panel(packed, taps, p.bias, panel, p.shape.out_channels, p.shape.in_channels, n, write);
    }

    // The pool of a sample from those of its tiles.
    void merge_tiles(Index batch) const {
        for (Index o = 0; o < p.shape.out_channels; ++o) {
            const Index stride = p.shape.out_channels, first = batch * tiling.per_sample * stride + o;
            Index best = first;
            for (Index i = first + stride; i < first + tiling.per_sample * stride; i += stride) {
                const T value = tiles.value[best];
                if (value == value && !(tiles.value[i] <= value)) best = i;
            }
            const Index out = batch * stride + o;
            p.pool.value[out] = tiles.value[best];
            p.pool.time[out] = tiles.time[best];
            if (p.pool.h != nullptr) p.pool.h[out] = tiles.h[best];
        }
    }

    static void run(const void* task, Index tile, int worker) {
        (*static_cast<const ForwardTask*>(task))(tile, worker);
    }
};

template <class T>
void forward(const CausalConvForward<T>& p) {
    const ConvShape& s = p.shape;
    if (s.batch == 0 || s.length == 0 || s.out_channels == 0) return;
    const int workers = worker_count(s, p.threads);
    const Index taps = live_taps(s, s.length - 1);
    const Index column_bytes = s.in_channels * windows(s, taps) * static_cast<Index>(sizeof(T));
    const Tiling tiling = cut_time<T>(s, column_bytes, panel_bytes, tile_columns<T>, 8 * workers);
    const Index panel_stride = aligned<T>(s.in_channels * panel_width<T>(s, taps, tiling.columns));
    const Index weights = aligned<T>(s.out_channels * s.in_channels * taps);
    const bool pools = p.pool.value != nullptr, pools_h = p.pool.h != nullptr;
    const Index rows_stride = pools ? aligned<T>((pools_h ? 2 : 1) * s.out_channels * tiling.columns) : 0;
    const Index pooled = pools ? aligned<T>(s.batch * tiling.per_sample * s.out_channels) : 0;
    const Scratch scratch(static_cast<std::size_t>(weights + workers * (panel_stride + rows_stride) + 2 * pooled) *
                              sizeof(T) +
                          static_cast<std::size_t>(pooled) * sizeof(Index));
    T* packed = static_cast<T*>(scratch.data());
    pack_weights(packed, p.weight, s.out_channels, s.in_channels * s.kernel_size, s.in_channels, s.kernel_size,
                 s.kernel_size, taps);
    T* panels = packed + weights;
    T* rows = panels + workers * panel_stride;
    T* values = rows + workers * rows_stride;
    const Pool<T> tiles{values, reinterpret_cast<Index*>(values + 2 * pooled), pools_h ? values + pooled : nullptr};
    const ForwardTask<T> task{p, tiling, taps, packed, panels, panel_stride, rows, rows_stride, tiles};
    parallel_tasks(s.batch * tiling.per_sample, workers, ForwardTask<T>::run, &task);
    for (Index batch = 0; pools && batch < s.batch; ++batch) task.merge_tiles(batch);
}

// What a group of samples contributes to grad_weight at one tile [t0, t0 + n) of time. dz lies in a panel, sample after
// sample and padded with zeros to whole vectors; x is read where it is, from the first sample that tap j sees:
//
//     dz  row o  [ sample 0: n columns, 0.. | sample 1 | ... ]  dz_stride
template <class T>
struct Group {
    const T* dz;
    Index dz_stride, dz_columns;  // of a row, and of a sample in it
    View3<const T> x;             // starts at the group's first sample
    Index samples, t0, n, live;   // live taps
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

// partial[j][c0 + b][o0 + a] += sum over the group of dz[o0 + a][t] x[c0 + b][t - j*dilation].
template <class T, int rows, int columns>
void reduce_block(T* partial, const ConvShape& s, const Group<T>& group, Index o0, Index c0, Index j) {
    constexpr int lanes = Vec<T>::lanes;
    const Index shift = j * s.dilation;
    const Index begin = max(0, shift - group.t0);  // of the tile, the first column that tap j sees data at
    const Index first_whole = divide_up(begin, lanes) * lanes, end_whole = group.n / lanes * lanes;
    const Index dz_stride = group.dz_stride, x_stride = group.x.channel_stride;
    const T* dz = group.dz + o0 * dz_stride;
    const T* x = group.x.data + c0 * x_stride + (group.t0 - shift);
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
    const auto partly = [&](Index i) __attribute__((always_inline)) {
        const int low = static_cast<int>(max(0, begin - i)), high = static_cast<int>(min(lanes, group.n - i));
        accumulate(i, [=](const T* p) { return Vec<T>::load_range(p, low, high); });
    };
    for (Index sample = 0; sample < group.samples; ++sample, dz += group.dz_columns, x += group.x.batch_stride) {
        if (begin < first_whole) partly(first_whole - lanes);
        for (Index i = first_whole; i < end_whole; i += lanes)
            accumulate(i, [](const T* p) { return Vec<T>::load(p); });
        if (end_whole < group.n && first_whole <= end_whole) partly(end_whole);
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
void reduce_columns(T* partial, const ConvShape& s, const Group<T>& group, Index c0, Index j) {
    for (Index o0 = 0; o0 < s.out_channels;) {
        const Index left = s.out_channels - o0;
        if (left >= dot_rows) {
            reduce_block<T, dot_rows, columns>(partial, s, group, o0, c0, j);
            o0 += dot_rows;
        } else if (left >= 2) {
            reduce_block<T, 2, columns>(partial, s, group, o0, c0, j);
            o0 += 2;
        } else {
            reduce_block<T, 1, columns>(partial, s, group, o0, c0, j);
            o0 += 1;
        }
    }
}

template <class T>
void reduce_weights(T* partial, const ConvShape& s, const Group<T>& group) {
    for (Index j = 0; j < group.live; ++j) {
        for (Index c0 = 0; c0 < s.in_channels;) {
            const Index left = s.in_channels - c0;
            if (left >= dot_columns) {
                reduce_columns<T, dot_columns>(partial, s, group, c0, j);
                c0 += dot_columns;
            } else if (left >= 2) {
                reduce_columns<T, 2>(partial, s, group, c0, j);
                c0 += 2;
            } else {
                reduce_columns<T, 1>(partial, s, group, c0, j);
                c0 += 1;
            }
        }
    }
}

template <class T>
void reduce_bias(T* grad_bias, const ConvShape& s, const Group<T>& group) {
    for (Index o = 0; o < s.out_channels; ++o) {
        Vec<T> total(T(0));
        const Index columns = group.samples * group.dz_columns;
        for (Index i = 0; i < columns;) {
            Vec<T> sum(T(0));
            for (const Index end = min(columns, i + chunk_terms * Vec<T>::lanes); i < end; i += Vec<T>::lanes)
                sum = sum + Vec<T>::load(group.dz + o * group.dz_stride + i);
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
    DifferentiateRows<T> dz_rows;
    T* memory = nullptr;  // per worker: panels of a group, or of one tile of grad_x
    Index memory_stride = 0;

    Tiling group_tiling{};
    Index batch_parts = 0, chunks = 0;
    Index group_stride = 0;  // columns of a row
    T* partial = nullptr;    // per chunk: grad_weight as [tap][in channel][out channel], then grad_bias
    Index partial_stride = 0, weights = 0;

    Tiling grad_x_tiling{};
    Index grad_x_tiles = 0;
    Index taps = 0;
    const T* packed = nullptr;  // W^T

    void reduce(Index chunk, int worker) const {
        const ConvShape& s = p.shape;
        T* out = partial + chunk * partial_stride;
        clear(out, partial_stride);
        const Index groups = batch_parts * group_tiling.per_sample;
        for (Index k = chunk * groups / chunks; k < (chunk + 1) * groups / chunks; ++k) {
            const Index part = k / group_tiling.per_sample, t0 = k % group_tiling.per_sample * group_tiling.columns;
            const Group<T> group = fill_group(memory + worker * memory_stride, part * s.batch / batch_parts,
                                              (part + 1) * s.batch / batch_parts, t0);
            if (p.grad_weight != nullptr) reduce_weights(out, s, group);
            if (p.grad_bias != nullptr) reduce_bias(out + weights, s, group);
        }
    }

    Group<T> fill_group(T* dz, Index first, Index last, Index t0) const {
        const ConvShape& s = p.shape;
        const Index n = min(group_tiling.columns, s.length - t0), columns = round_up_to_vector<T>(n);
        for (Index batch = first; batch < last; ++batch) {
            for (Index o = 0; o < s.out_channels; ++o) {
                T* out = dz + o * group_stride + (batch - first) * columns;
                dz_rows(out, batch, o, t0, n);
                clear(out + n, columns - n);
            }
        }
        View3<const T> x = p.x;
        x.data += first * x.batch_stride;
        return {dz, group_stride, columns, x, last - first, t0, n, live_taps(s, t0 + n - 1)};
    }

    void propagate(Index tile, int worker) const {
        const ConvShape& s = p.shape;
        const Index batch = tile / grad_x_tiling.per_sample;
        const Index t0 = tile % grad_x_tiling.per_sample * grad_x_tiling.columns;
        const Index n = min(grad_x_tiling.columns, s.length - t0);
        const Panel<T> panel = fill_panel(memory + worker * memory_stride, s, Reach::right,
                                          live_taps(s, s.length - 1 - t0), s.out_channels, batch, t0, n, dz_rows);
        multiply_panel<T>(packed, taps, nullptr, panel, s.in_channels, s.out_channels, n, WriteGradX<T>{p, batch, t0});
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

    // A chunk and its share of the tiles of grad_x, which find grad_y and h still in cache.
    void reduce_and_propagate(Index chunk, int worker) const {
        reduce(chunk, worker);
        for (Index tile = chunk * grad_x_tiles / chunks; tile < (chunk + 1) * grad_x_tiles / chunks; ++tile)
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

template <class T>
void backward(const CausalConvBackward<T>& p) {
    const ConvShape& s = p.shape;
    if (s.batch == 0 || s.length == 0 || s.out_channels == 0) {
        if (p.grad_weight != nullptr) clear(p.grad_weight, s.out_channels * s.in_channels * s.kernel_size);
        if (p.grad_bias != nullptr) clear(p.grad_bias, s.out_channels);
        return;
    }
    const int workers = worker_count(s, p.threads);
    const Index taps = live_taps(s, s.length - 1);
    constexpr Index size = sizeof(T);
    const Index weights = p.grad_weight == nullptr ? 0 : s.out_channels * s.in_channels * taps;
    BackwardTask<T> task{p, {p.grad_y, p.h, p.activation, p.negative_slope}};
    task.taps = taps;
    task.weights = weights;
    task.partial_stride = weights + (p.grad_bias == nullptr ? 0 : s.out_channels);

    Index group_elements = 0, grad_x_elements = 0, packed = 0;
    if (task.partial_stride > 0) {
        const Index column_bytes = (s.out_channels + s.in_channels) * size;  // dz in its panel, x where it is
        task.group_tiling = cut_time<T>(s, column_bytes, group_bytes, group_columns, 2);
        const Index columns = task.group_tiling.columns;
        const Index per_group = max(1, min(group_columns, group_bytes / column_bytes) / columns);
        task.batch_parts = divide_up(s.batch, per_group);
        // An even number of groups gives two workers equal shares.
        if (task.group_tiling.per_sample == 1 && task.batch_parts % 2 == 1 && task.batch_parts < s.batch)
            ++task.batch_parts;
        task.chunks = min(task.batch_parts * task.group_tiling.per_sample, max_chunks);
        // A stride of a power of two would put all rows into the same few sets of the cache.
        task.group_stride = divide_up(s.batch, task.batch_parts) * columns + Vec<T>::lanes;
        group_elements = aligned<T>(s.out_channels * task.group_stride);
    }
    if (p.grad_x != nullptr) {
        task.grad_x_tiling =
            cut_time<T>(s, s.out_channels * windows(s, taps) * size, panel_bytes, tile_columns<T>, 8 * workers);
        grad_x_elements = aligned<T>(s.out_channels * panel_width<T>(s, taps, task.grad_x_tiling.columns));
        packed = aligned<T>(s.out_channels * s.in_channels * taps);
    }
    task.memory_stride = max(group_elements, grad_x_elements);
    const Scratch scratch(
        static_cast<std::size_t>(packed + workers * task.memory_stride + task.chunks * task.partial_stride) *
        sizeof(T));
    T* memory = static_cast<T*>(scratch.data());
    if (p.grad_x != nullptr)
        pack_weights(memory, p.weight, s.in_channels, s.kernel_size, s.out_channels, s.in_channels * s.kernel_size,
                     s.kernel_size, taps);
    task.packed = memory;
    task.memory = memory + packed;
    task.partial = task.memory + workers * task.memory_stride;
    task.grad_x_tiles = p.grad_x == nullptr ? 0 : s.batch * task.grad_x_tiling.per_sample;
    if (task.chunks >= workers) {
        parallel_tasks(task.chunks, workers, BackwardTask<T>::run_both, &task);
    } else {
        parallel_tasks(task.chunks, workers, BackwardTask<T>::run_reduce, &task);
        parallel_tasks(task.grad_x_tiles, workers, BackwardTask<T>::run_propagate, &task);
    }
    parallel_tasks(task.chunks == 0 ? 0 : divide_up(s.out_channels, Vec<T>::lanes), workers,
                   BackwardTask<T>::run_finish, &task);
}

}  // namespace

void causal_conv_forward(const CausalConvForward<float>& p) { forward(p); }
void causal_conv_forward(const CausalConvForward<double>& p) { forward(p); }
void causal_conv_backward(const CausalConvBackward<float>& p) { backward(p); }
void causal_conv_backward(const CausalConvBackward<double>& p) { backward(p); }

PK_ISA_END
