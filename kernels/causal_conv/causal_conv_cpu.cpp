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
// Backward, per tile: dz = grad_y act'(z) goes into a panel that reaches right instead of left. grad_x is the same product
// with W_j^T; grad_weight[o,c,j] = sum_t dz[o,t] x[c,t-j*d] is a product of rows of the two panels with vectors of
// time as the reduced index. Tiles form groups that are reduced in registers and groups form chunks, each with
// its own partial grad_weight; both depend on the problem's size alone, so results do not depend on the thread count.
//
// Cost: 2 O C K B T flops forward (dead taps excepted) and twice that backward; forward reads x and writes y once.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "causal_conv/causal_conv.hpp"
#include "common/math.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"

PK_ISA_BEGIN
namespace {

using Index = std::int64_t;

// Register tiles: accumulators, plus one operand each way, fill the 32 or 16 vector registers.
#if PK_VECTOR_BYTES == 64
constexpr int conv_rows = 8, conv_columns = 3, dot_rows = 4, dot_columns = 6;
#else
constexpr int conv_rows = 4, conv_columns = 3, dot_rows = 4, dot_columns = 3;
#endif

constexpr Index panel_bytes = 192 << 10;        // forward: input panel of a tile
constexpr Index group_bytes = 512 << 10;        // backward: panels of a group
constexpr Index group_columns = 1024;           // backward: columns reduced in registers
constexpr Index max_chunks = 32;                // backward: partial weight gradients
constexpr double parallel_flops = 200e3;        // below this, waking the other threads costs more than it saves
constexpr Index tile_vectors = 4 * conv_columns;

PK_INLINE Index min(Index a, Index b) { return a < b ? a : b; }
PK_INLINE Index max(Index a, Index b) { return a > b ? a : b; }
PK_INLINE Index divide_up(Index a, Index b) { return (a + b - 1) / b; }
template <class T>
PK_INLINE Index round_up_to_vector(Index n) {
    return divide_up(n, Vec<T>::lanes) * Vec<T>::lanes;
}
template <class T>
PK_INLINE Index aligned(Index elements) {
    constexpr Index line = 64 / sizeof(T);
    return divide_up(elements, line) * line;
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

// ---- Activations -----------------------------------------------------------------------------------------------------

template <class T>
PK_INLINE Vec<T> activate(Vec<T> z, Activation activation, Vec<T> slope) {
    const Vec<T> zero(T(0));
    switch (activation) {
        case Activation::relu: return select_le(z, zero, zero, z);
        case Activation::leaky_relu: return select_le(z, zero, slope * z, z);
        case Activation::tanh: return tanh(z);
        case Activation::none: break;
    }
    return z;
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

// ---- Panels ----------------------------------------------------------------------------------------------------------

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
            std::memcpy(out, p, static_cast<std::size_t>(count) * sizeof(T));
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
            if (begin > 0) std::memset(out, 0, static_cast<std::size_t>(begin) * sizeof(T));
            if (end > begin) copy_row(out + begin, batch, row, time + begin, end - begin);
            if (end < window_columns)
                std::memset(out + end, 0, static_cast<std::size_t>(window_columns - end) * sizeof(T));
        }
    }
    return reach == Reach::left ? Panel<T>{data, width, (live - 1) * step, -step, live}
                                : Panel<T>{data, width, 0, step, live};
}

// ---- Product of weights and a panel ----------------------------------------------------------------------------------

// Weights as the product reads them: for each block of rows (8, 8, ..., then what is left as 4, 2, 1), [tap][inner][row].
template <class T>
void pack_weights(T* packed, const T* weight, Index rows, Index row_stride, Index inner, Index inner_stride,
                  Index kernel_size, Index taps) {
    int block = conv_rows;
    for (Index row = 0; row < rows; row += block) {
        while (block > rows - row) block /= 2;
        for (Index j = 0; j < taps; ++j) {
            const T* w = weight + row * row_stride + (kernel_size - 1 - j);
            for (Index i = 0; i < inner; ++i, packed += block)
                for (int m = 0; m < block; ++m) packed[m] = w[m * row_stride + i * inner_stride];
        }
    }
}

// out[m][column] += sum_{j, i} w[j][i][m] panel[i][tap j + column], for `columns` vectors from `column` on.
template <class T, int rows, int columns>
PK_INLINE void multiply(T (&out)[conv_rows][conv_columns * Vec<T>::lanes], const T* w, const T* bias,
                        const Panel<T>& panel, Index inner, Index column) {
    constexpr int lanes = Vec<T>::lanes;
    Vec<T> acc[rows][columns];
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 3
        for (int v = 0; v < columns; ++v) acc[m][v] = Vec<T>(bias == nullptr ? T(0) : bias[m]);
    for (Index j = 0; j < panel.live; ++j) {
        const T* x = panel.data + panel.tap0 + j * panel.tap_step + column;
        for (Index i = 0; i < inner; ++i, x += panel.width, w += rows) {
            Vec<T> xv[columns];
#pragma GCC unroll 3
            for (int v = 0; v < columns; ++v) xv[v] = Vec<T>::load(x + v * lanes);
#pragma GCC unroll 8
            for (int m = 0; m < rows; ++m) {
                const Vec<T> wv(w[m]);
#pragma GCC unroll 3
                for (int v = 0; v < columns; ++v) acc[m][v] = acc[m][v] + wv * xv[v];
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 3
        for (int v = 0; v < columns; ++v) acc[m][v].store(out[m] + v * lanes);
}

// Multiplies `rows` rows of weights from `row` on with all n columns of the panel.
template <class T, int rows, class Write>
void multiply_rows(const T* w, const T* bias, const Panel<T>& panel, Index inner, Index row, Index n,
                   const Write& write) {
    constexpr int lanes = Vec<T>::lanes;
    alignas(64) T out[conv_rows][conv_columns * lanes];
    for (Index column = 0; column < n;) {
        const Index vectors = divide_up(n - column, lanes);
        // Four left are better taken as 2 + 2 than as 3 + 1.
        const int take = vectors == 4 ? 2 : static_cast<int>(min(vectors, conv_columns));
        if (take == 3)
            multiply<T, rows, 3>(out, w, bias, panel, inner, column);
        else if (take == 2)
            multiply<T, rows, 2>(out, w, bias, panel, inner, column);
        else
            multiply<T, rows, 1>(out, w, bias, panel, inner, column);
        const Index count = min(take * lanes, n - column);
        for (int m = 0; m < rows; ++m) write(row + m, column, out[m], count);
        column += count;
    }
}

// All rows. `packed` holds `taps` taps per row block, of which the panel's live ones come first.
template <class T, class Write>
void multiply_panel(const T* packed, Index taps, const T* bias, const Panel<T>& panel, Index rows, Index inner,
                    Index n, const Write& write) {
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

template <class T>
struct WriteForward {
    const CausalConvForward<T>& p;
    Index batch, t0;

    // Not inlined: it stands after every register tile, and the row it reads is in the first cache level.
    __attribute__((noinline)) void operator()(Index row, Index column, const T* z, Index count) const {
        constexpr int lanes = Vec<T>::lanes;
        const Index offset = (batch * p.shape.out_channels + row) * p.shape.length + t0 + column;
        const View3<const T>& r = p.residual;
        const T* residual =
            r.data == nullptr ? nullptr : r.data + batch * r.batch_stride + row * r.channel_stride + t0 + column;
        const Vec<T> slope(p.negative_slope);
        for (Index i = 0; i < count; i += lanes) {
            const int n = static_cast<int>(min(lanes, count - i));
            Vec<T> y = activate(Vec<T>::load(z + i), p.activation, slope);
            if (n == lanes) {
                if (p.h != nullptr) y.store(p.h + offset + i);
                if (residual != nullptr) y = y + Vec<T>::load(residual + i);
                y.store(p.y + offset + i);
            } else {
                if (p.h != nullptr) y.store_first(p.h + offset + i, n);
                if (residual != nullptr) y = y + Vec<T>::load_first(residual + i, n);
                y.store_first(p.y + offset + i, n);
            }
        }
    }
};

template <class T>
struct WriteGradX {
    const CausalConvBackward<T>& p;
    Index batch, t0;

    PK_INLINE void operator()(Index row, Index column, const T* value, Index count) const {
        T* out = p.grad_x + (batch * p.shape.in_channels + row) * p.shape.length + t0 + column;
        std::memcpy(out, value, static_cast<std::size_t>(count) * sizeof(T));
    }
};

// ---- Forward ---------------------------------------------------------------------------------------------------------

// Columns of a tile: as many as keep `bytes_per_column` * columns within `budget`, in whole register tiles where one fits,
// and few enough that every worker gets several tiles.
template <class T>
Index tile_columns(const ConvShape& s, Index bytes_per_column, Index budget, Index wanted_tiles) {
    const Index quantum = conv_columns * Vec<T>::lanes;
    Index columns = max(1, min(budget / max(1, bytes_per_column) / quantum, tile_vectors)) * quantum;
    const Index tiles_per_sample = divide_up(wanted_tiles, s.batch);
    columns = min(columns, max(quantum, divide_up(divide_up(s.length, tiles_per_sample), quantum) * quantum));
    return min(columns, round_up_to_vector<T>(s.length));
}

template <class T>
struct ForwardContext {
    const CausalConvForward<T>& p;
    Index columns, tiles, taps;
    const T* packed;
    T* panels;
    Index panel_stride;

    static void run(const void* context, Index task, int worker) {
        const ForwardContext& c = *static_cast<const ForwardContext*>(context);
        const ConvShape& s = c.p.shape;
        const Index batch = task / c.tiles, t0 = task % c.tiles * c.columns;
        const Index n = min(c.columns, s.length - t0);
        const Index live = live_taps(s, t0 + n - 1);
        const Panel<T> panel = fill_panel(c.panels + worker * c.panel_stride, s, Reach::left, live, s.in_channels, batch,
                                          t0, n, CopyRows<T>{c.p.x});
        multiply_panel(c.packed, c.taps, c.p.bias, panel, s.out_channels, s.in_channels, n,
                       WriteForward<T>{c.p, batch, t0});
    }
};

template <class T>
void forward(const CausalConvForward<T>& p) {
    const ConvShape& s = p.shape;
    if (s.batch == 0 || s.length == 0 || s.out_channels == 0) return;
    const int workers = worker_count(s, p.threads);
    const Index taps = live_taps(s, s.length - 1);
    const Index row_bytes = s.in_channels * static_cast<Index>(sizeof(T));
    // Bytes of a panel per column of the tile: taps that lie apart have columns of their own.
    const Index columns = tile_columns<T>(s, row_bytes * (s.dilation < 64 ? 1 : taps), panel_bytes, 2 * workers);
    const Index tiles = divide_up(s.length, columns);
    const Index panel_stride = aligned<T>(s.in_channels * panel_width<T>(s, taps, columns));
    const Index weights = aligned<T>(s.out_channels * s.in_channels * taps);
    const Scratch scratch(static_cast<std::size_t>(weights + workers * panel_stride) * sizeof(T));
    T* packed = static_cast<T*>(scratch.data());
    pack_weights(packed, p.weight, s.out_channels, s.in_channels * s.kernel_size, s.in_channels, s.kernel_size,
                 s.kernel_size, taps);
    const ForwardContext<T> context{p, columns, tiles, taps, packed, packed + weights, panel_stride};
    parallel_tasks(s.batch * tiles, workers, ForwardContext<T>::run, &context);
}

// ---- Backward --------------------------------------------------------------------------------------------------------

template <class T>
struct TilePanels {
    Panel<T> dz, x;
    Index columns;  // whole vectors
};

// grad_weight[o0 + a][c0 + b][tap j] += sum over the group's columns of dz[o0 + a] x[c0 + b].
template <class T, int rows, int columns>
void reduce_block(T* grad_weight, const ConvShape& s, const TilePanels<T>* tiles, Index tile_count, Index o0, Index c0,
                  Index j) {
    constexpr int lanes = Vec<T>::lanes;
    Vec<T> acc[rows][columns];
#pragma GCC unroll 4
    for (int a = 0; a < rows; ++a)
#pragma GCC unroll 6
        for (int b = 0; b < columns; ++b) acc[a][b] = Vec<T>(T(0));
    for (Index t = 0; t < tile_count; ++t) {
        const TilePanels<T>& tile = tiles[t];
        if (j >= tile.x.live) continue;
        const Index dz_stride = tile.dz.width, x_stride = tile.x.width;
        const T* dz = tile.dz.data + o0 * dz_stride;
        const T* x = tile.x.data + c0 * x_stride + tile.x.tap0 + j * tile.x.tap_step;
        for (Index i = 0; i < tile.columns; i += lanes) {
            Vec<T> xv[columns];
#pragma GCC unroll 6
            for (int b = 0; b < columns; ++b) xv[b] = Vec<T>::load(x + b * x_stride + i);
#pragma GCC unroll 4
            for (int a = 0; a < rows; ++a) {
                const Vec<T> d = Vec<T>::load(dz + a * dz_stride + i);
#pragma GCC unroll 6
                for (int b = 0; b < columns; ++b) acc[a][b] = acc[a][b] + d * xv[b];
            }
        }
    }
    T* out = grad_weight + (o0 * s.in_channels + c0) * s.kernel_size + (s.kernel_size - 1 - j);
#pragma GCC unroll 4
    for (int a = 0; a < rows; ++a)
#pragma GCC unroll 6
        for (int b = 0; b < columns; ++b) out[(a * s.in_channels + b) * s.kernel_size] += acc[a][b].sum();
}

template <class T, int rows>
void reduce_rows(T* grad_weight, const ConvShape& s, const TilePanels<T>* tiles, Index tile_count, Index o0,
                 Index live) {
    int block = dot_columns;
    for (Index c0 = 0; c0 < s.in_channels; c0 += block) {
        const Index left = s.in_channels - c0;
        block = left >= dot_columns ? dot_columns : left >= 4 && dot_columns > 4 ? 4 : left >= 2 ? 2 : 1;
        for (Index j = 0; j < live; ++j) {
            if (block == dot_columns)
                reduce_block<T, rows, dot_columns>(grad_weight, s, tiles, tile_count, o0, c0, j);
            else if (block == 4)
                reduce_block<T, rows, 4>(grad_weight, s, tiles, tile_count, o0, c0, j);
            else if (block == 2)
                reduce_block<T, rows, 2>(grad_weight, s, tiles, tile_count, o0, c0, j);
            else
                reduce_block<T, rows, 1>(grad_weight, s, tiles, tile_count, o0, c0, j);
        }
    }
}

template <class T>
void reduce_group(T* grad_weight, T* grad_bias, const ConvShape& s, const TilePanels<T>* tiles, Index tile_count) {
    Index live = 0;
    for (Index t = 0; t < tile_count; ++t) live = max(live, tiles[t].x.live);
    int block = dot_rows;
    for (Index o0 = 0; grad_weight != nullptr && o0 < s.out_channels; o0 += block) {
        while (block > s.out_channels - o0) block /= 2;
        switch (block) {
            case 4: reduce_rows<T, dot_rows>(grad_weight, s, tiles, tile_count, o0, live); break;
            case 2: reduce_rows<T, 2>(grad_weight, s, tiles, tile_count, o0, live); break;
            default: reduce_rows<T, 1>(grad_weight, s, tiles, tile_count, o0, live);
        }
    }
    for (Index o = 0; grad_bias != nullptr && o < s.out_channels; ++o) {
        Vec<T> total(T(0));
        for (Index t = 0; t < tile_count; ++t)
            for (Index i = 0; i < tiles[t].columns; i += Vec<T>::lanes)
                total = total + Vec<T>::load(tiles[t].dz.data + o * tiles[t].dz.width + i);
        grad_bias[o] += total.sum();
    }
}

template <class T>
struct BackwardContext {
    const CausalConvBackward<T>& p;
    Index columns, tiles, groups, chunks, max_group_tiles, taps;
    const T* packed;                             // W^T, or null without grad_x
    T* panels;                                   // per worker: the panels of a group
    Index panels_stride, dz_stride, x_stride;    // per worker; per tile
    TilePanels<T>* tile_panels;                  // per worker: max_group_tiles
    T* partial;                                  // per chunk: grad_weight then grad_bias
    Index partial_stride;

    Index group_begin(Index group) const { return group * (p.shape.batch * tiles) / groups; }

    void run_group(Index group, int worker, T* grad_weight, T* grad_bias) const {
        const ConvShape& s = p.shape;
        T* memory = panels + worker * panels_stride;
        TilePanels<T>* tile = tile_panels + worker * max_group_tiles;
        const Index begin = group_begin(group), end = group_begin(group + 1);
        const bool needs_x = p.grad_weight != nullptr;
        for (Index k = begin; k < end; ++k, ++tile, memory += dz_stride + x_stride) {
            const Index batch = k / tiles, t0 = k % tiles * columns;
            const Index n = min(columns, s.length - t0);
            const Index future = p.grad_x == nullptr ? 1 : live_taps(s, s.length - 1 - t0);
            tile->columns = round_up_to_vector<T>(n);
            tile->dz = fill_panel(memory, s, Reach::right, future, s.out_channels, batch, t0, n,
                                  DifferentiateRows<T>{p.grad_y, p.h, p.activation, p.negative_slope});
            tile->x = fill_panel(memory + dz_stride, s, Reach::left, needs_x ? live_taps(s, t0 + n - 1) : 0,
                                 needs_x ? s.in_channels : 0, batch, t0, n, CopyRows<T>{p.x});
            if (p.grad_x != nullptr)
                multiply_panel<T>(packed, taps, nullptr, tile->dz, s.in_channels, s.out_channels, n,
                                  WriteGradX<T>{p, batch, t0});
        }
        reduce_group(grad_weight, grad_bias, s, tile_panels + worker * max_group_tiles, end - begin);
    }

    static void run_chunk(const void* context, Index chunk, int worker) {
        const BackwardContext& c = *static_cast<const BackwardContext*>(context);
        T* partial = c.partial + chunk * c.partial_stride;
        if (c.partial_stride > 0) std::memset(partial, 0, static_cast<std::size_t>(c.partial_stride) * sizeof(T));
        T* grad_weight = c.p.grad_weight == nullptr ? nullptr : partial;
        const ConvShape& s = c.p.shape;
        const Index weights = grad_weight == nullptr ? 0 : s.out_channels * s.in_channels * s.kernel_size;
        T* grad_bias = c.p.grad_bias == nullptr ? nullptr : partial + weights;
        for (Index g = chunk * c.groups / c.chunks; g < (chunk + 1) * c.groups / c.chunks; ++g)
            c.run_group(g, worker, grad_weight, grad_bias);
    }
};

// out = sum of the partials, in the order of the chunks.
template <class T>
void sum_partials(T* out, const T* partial, Index stride, Index chunks, Index count) {
    std::memcpy(out, partial, static_cast<std::size_t>(count) * sizeof(T));
    for (Index chunk = 1; chunk < chunks; ++chunk)
        for (Index i = 0; i < count; ++i) out[i] += partial[chunk * stride + i];
}

template <class T>
void backward(const CausalConvBackward<T>& p) {
    const ConvShape& s = p.shape;
    const Index weights = p.grad_weight == nullptr ? 0 : s.out_channels * s.in_channels * s.kernel_size;
    const Index biases = p.grad_bias == nullptr ? 0 : s.out_channels;
    if (s.batch == 0 || s.length == 0 || s.out_channels == 0) {
        if (weights > 0) std::memset(p.grad_weight, 0, static_cast<std::size_t>(weights) * sizeof(T));
        if (biases > 0) std::memset(p.grad_bias, 0, static_cast<std::size_t>(biases) * sizeof(T));
        return;
    }
    const int workers = worker_count(s, p.threads);
    const Index taps = live_taps(s, s.length - 1);
    const Index row_bytes = (s.in_channels + s.out_channels) * static_cast<Index>(sizeof(T));
    BackwardContext<T> c{p, 0, 0, 0, 0, 0, taps, nullptr, nullptr, 0, 0, 0, nullptr, nullptr, 0};
    c.columns = tile_columns<T>(s, row_bytes * (s.dilation < 64 ? 1 : taps), group_bytes, 8);
    c.tiles = divide_up(s.length, c.columns);
    const Index width = panel_width<T>(s, taps, c.columns);
    c.dz_stride = aligned<T>(s.out_channels * (p.grad_x == nullptr ? c.columns : width));
    c.x_stride = p.grad_weight == nullptr ? 0 : aligned<T>(s.in_channels * width);
    const Index total = s.batch * c.tiles;
    const Index tile_bytes = (c.dz_stride + c.x_stride) * static_cast<Index>(sizeof(T));
    const Index per_group = max(1, min(group_bytes / max(1, tile_bytes), group_columns / c.columns));
    // An even number of groups keeps two workers, or any power of two of them, equally busy.
    c.groups = min(total, divide_up(divide_up(total, per_group), 4) * 4);
    c.max_group_tiles = divide_up(total, c.groups);
    c.chunks = min(c.groups, max_chunks);
    c.panels_stride = c.max_group_tiles * (c.dz_stride + c.x_stride);
    c.partial_stride = weights + biases;
    const Index packed = p.grad_x == nullptr ? 0 : aligned<T>(s.out_channels * s.in_channels * taps);
    const std::size_t elements =
        static_cast<std::size_t>(packed + workers * c.panels_stride + aligned<T>(c.chunks * c.partial_stride));
    const std::size_t lists = static_cast<std::size_t>(workers * c.max_group_tiles) * sizeof(TilePanels<T>);
    const Scratch scratch(elements * sizeof(T) + lists);
    T* memory = static_cast<T*>(scratch.data());
    if (p.grad_x != nullptr) {
        pack_weights(memory, p.weight, s.in_channels, s.kernel_size, s.out_channels, s.in_channels * s.kernel_size,
                     s.kernel_size, taps);
        c.packed = memory;
    }
    c.panels = memory + packed;
    c.partial = c.panels + workers * c.panels_stride;
    c.tile_panels = reinterpret_cast<TilePanels<T>*>(memory + elements);
    parallel_tasks(c.chunks, workers, BackwardContext<T>::run_chunk, &c);
    if (weights > 0) sum_partials(p.grad_weight, c.partial, c.partial_stride, c.chunks, weights);
    if (biases > 0) sum_partials(p.grad_bias, c.partial + weights, c.partial_stride, c.chunks, biases);
}

}  // namespace

void causal_conv_forward(const CausalConvForward<float>& p) { forward(p); }
void causal_conv_forward(const CausalConvForward<double>& p) { forward(p); }
void causal_conv_backward(const CausalConvBackward<float>& p) { backward(p); }
void causal_conv_backward(const CausalConvBackward<double>& p) { backward(p); }

PK_ISA_END
