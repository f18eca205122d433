// See gaussian_warp.hpp for what is computed and how it is tiled.

#include <cstdint>

#include "common/arrays.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"
#include "gaussian_warp/gaussian_warp.hpp"
#include "gaussian_warp/side_by_side.hpp"
#include "gaussian_warp/weights.hpp"

PK_ISA_BEGIN
namespace {

constexpr Index block = 32;                // pixels whose weights are held at once; a multiple of all lanes
constexpr Index rows_of_a_task = 8;        // where a sample is shared by several threads
constexpr Index smallest_parallel = 4096;  // pixels; starting workers costs more than what is smaller
constexpr double farthest = 1 << 30;       // displacements are cut off here

template <class T>
struct Plan {
    const GaussianWarp<T>* p;
    const GaussianWarpGradients<T>* g;  // null in the forward
    Index taps, width;                  // of the widest window, and rounded up to whole vectors
    Index low[3], extent[3];            // of the padded image: pixels in front, and in all
    Index row, plane, volume;           // strides of the padded image, and its elements
    Index rows, pixels;                 // of the image
    int kinds;                          // of weights: see computed_weights
    int jets;  // of products of outer weights: the value, its derivatives, that by the variance
    bool by_variance, scatter;
    bool tabulated;
    Index stride;          // of weights: there are zeros in front of all
    Index axis, jet_size;  // all weights of an axis, and of a pixel
    Index table_size, outer_size, work_size;
    int parts;  // copies of the image gradient
};

// What a worker needs.
template <class T>
struct Worker {
    WeightTable<T> table;
    WeightPolynomials<T> polynomials;
    double built_for;  // the variance in the table, -1 for none
    T* jets;           // (block, axis, kind, stride)
    T* outer;          // (block, jet, taps^2) in three dimensions
    double* work;
};

PK_INLINE Index first_axis(int ranks) { return 3 - ranks; }

template <class T>
PK_INLINE Index radius_of(const GaussianWarp<T>& p, T variance) {
    if (!(variance > 0)) return 0;
    Index radius = 1;
    while (radius < p.radii && variance > static_cast<T>(p.largest[radius - 1])) ++radius;
    return p.radii == 0 ? 0 : radius;
}

template <class T>
PK_INLINE Index taps_of(const GaussianWarp<T>& p, T variance) {
    return p.support > 0 ? p.support : 2 * radius_of(p, variance) + 1;
}

template <class T>
T variance_of(const GaussianWarp<T>& p, Index sample, Index step) {
    return p.variance == nullptr ? static_cast<T>(p.value)
                                 : p.variance[sample * p.variance_stride[0] + step * p.variance_stride[1]];
}

// The widest window of the call.
template <class T>
Index most_taps(const GaussianWarp<T>& p) {
    if (p.support > 0) return p.support;
    if (p.variance == nullptr) return taps_of(p, static_cast<T>(p.value));
    T largest = 0;
    const Index pixels = p.varies ? p.size[0] * p.size[1] * p.size[2] : 1;
    for (Index s = 0; s < (p.variance_stride[0] == 0 ? 1 : p.batch); ++s)
        for (Index t = 0; t < (p.variance_stride[1] == 0 ? 1 : p.steps); ++t) {
            const T* const v = p.variance + s * p.variance_stride[0] + t * p.variance_stride[1];
            for (Index i = 0; i < pixels; ++i) largest = v[i] > largest ? v[i] : largest;
        }
    return taps_of(p, largest);
}

template <class T>
Index most_table_pieces(const GaussianWarp<T>& p) {
    if (p.varies) return 0;
    Index most = 0;
    for (Index s = 0; s < (p.variance_stride[0] == 0 ? 1 : p.batch); ++s)
        for (Index t = 0; t < (p.variance_stride[1] == 0 ? 1 : p.steps); ++t) {
            const T v = variance_of(p, s, t);
            most = max(most, table_pieces(p.form, v, taps_of(p, v)));
        }
    return most;
}

template <class T>
Plan<T> make_plan(const GaussianWarp<T>& p, const GaussianWarpGradients<T>* g) {
    constexpr int lanes = Vec<T>::lanes;
    Plan<T> plan{};
    plan.p = &p;
    plan.g = g;
    plan.taps = most_taps(p);
    plan.width = divide_up(plan.taps, lanes) * lanes;
    plan.volume = 1;
    for (Index a = 0; a < 3; ++a) {
        const bool used = a >= first_axis(p.ranks);
        const Index behind = a == 2 ? plan.width : plan.taps;
        plan.low[a] = !used || p.padding == WarpPadding::periodic ? 0
                      : p.padding == WarpPadding::reflection      ? p.size[a]
                                                                  : plan.taps;
        plan.extent[a] = used ? plan.low[a] + p.size[a] + behind : 1;
    }
    plan.row = aligned<T>(plan.extent[2]);
    plan.plane = plan.extent[1] * plan.row;
    plan.volume = plan.extent[0] * plan.plane;
    plan.rows = p.size[0] * p.size[1];
    plan.pixels = plan.rows * p.size[2];
    plan.by_variance = g != nullptr && g->variance != nullptr;
    plan.scatter = g != nullptr && g->image != nullptr;
    const bool gathers = g != nullptr && (g->flow != nullptr || plan.by_variance);
    plan.kinds = plan.by_variance ? 3 : gathers ? 2 : 1;
    plan.jets = !gathers ? (g == nullptr ? 1 : 0) : p.ranks + (plan.by_variance && p.ranks > 1 ? 1 : 0);
    const Index pieces = most_table_pieces(p);
    plan.tabulated = pieces > 0;
    plan.table_size = aligned<T>(table_elements<T>(pieces, plan.width, table_kinds<T>(plan.kinds)));
    plan.stride = plan.width + lanes;
    plan.axis = plan.kinds * plan.stride;
    plan.jet_size = p.ranks * plan.axis;
    plan.outer_size = p.ranks == 3 ? max(plan.jets, 1) * plan.taps * plan.taps : 0;
    plan.work_size = (WeightPolynomials<T>::degree + 2) * 3 * (plan.taps + Vec<double>::lanes + 1);
    return plan;
}

template <class T>
Index worker_bytes(const Plan<T>& plan) {
    const Index elements = plan.table_size + aligned<T>(block * plan.jet_size) + aligned<T>(block * plan.outer_size);
    return aligned<char>(sizeof(Worker<T>)) + elements * static_cast<Index>(sizeof(T)) +
           aligned<double>(plan.work_size) * 8;
}

// A worker at the beginning of its memory.
template <class T>
void make_worker(const Plan<T>& plan, char* memory) {
    Worker<T>& w = *reinterpret_cast<Worker<T>*>(memory);
    T* at = reinterpret_cast<T*>(memory + aligned<char>(sizeof(Worker<T>)));
    w.table = {0, 0, plan.width, table_kinds<T>(plan.kinds), at};
    w.built_for = -1;
    at += plan.table_size;
    clear(at, block * plan.jet_size);
    w.jets = at + Vec<T>::lanes;
    at += aligned<T>(block * plan.jet_size);
    w.outer = at;
    at += aligned<T>(block * plan.outer_size);
    w.work = reinterpret_cast<double*>(at);
}

template <class T>
void prepare_table(const Plan<T>& plan, Worker<T>& w, Index sample, Index step) {
    const GaussianWarp<T>& p = *plan.p;
    if (!plan.tabulated) return;
    const T as_stored = variance_of(p, sample, step);
    const double variance = p.variance == nullptr ? p.value : static_cast<double>(as_stored);
    if (!(variance >= 0) || w.built_for == variance) return;
    w.table.taps = taps_of(p, as_stored);
    w.table.pieces = table_pieces(p.form, variance, w.table.taps);
    w.built_for = variance;
    if (w.table.pieces > 0) build_table(w.table, p.form, p.normalize, variance, w.work);
    build_polynomials(w.polynomials, p.form, p.normalize, variance, w.table.taps, w.work);
}

// The pixel of an axis of this size that stands for pixel i, which may lie outside; -1 for zero.
PK_INLINE Index source_pixel(Index i, Index size, WarpPadding padding) {
    if (0 <= i && i < size) return i;
    if (padding == WarpPadding::zeros) return -1;
    if (padding == WarpPadding::border) return i < 0 ? 0 : size - 1;
    const Index period = padding == WarpPadding::periodic ? size : 2 * size;
    const Index rest = i % period, folded = rest < 0 ? rest + period : rest;
    return folded < size ? folded : period - 1 - folded;
}

// Strided images: sources and targets.
template <class T>
struct Image {
    T* data;
    Index channel, plane, row;
};

template <class T>
Image<const T> source_image(const GaussianWarp<T>& p, Index sample, Index step, Index pixels) {
    if (step == 0)
        return {p.image + sample * p.image_stride[0], p.image_stride[1], p.image_stride[2], p.image_stride[3]};
    const T* const frame = p.frames + (sample * p.steps + step - 1) * p.channels * pixels;
    return {frame, pixels, p.size[1] * p.size[2], p.size[2]};
}

// Row `at` of all padded planes of a channel.
template <class T>
void pad_row(const Plan<T>& plan, Image<const T> image, Index channel, Index at, T* padded) {
    const GaussianWarp<T>& p = *plan.p;
    const Index z = source_pixel(at / plan.extent[1] - plan.low[0], p.size[0], p.padding);
    const Index y = source_pixel(at % plan.extent[1] - plan.low[1], p.size[1], p.padding);
    T* const out = padded + channel * plan.volume + at * plan.row;
    if (z < 0 || y < 0) return clear(out, plan.extent[2]);
    const T* const in = image.data + channel * image.channel + z * image.plane + y * image.row;
    const Index low = plan.low[2], size = p.size[2], behind = plan.extent[2] - low - size;
    copy(out + low, in, size);
    if (p.padding == WarpPadding::zeros) {
        clear(out, low);
        clear(out + low + size, behind);
        return;
    }
    for (Index i = 0; i < low; ++i) out[i] = in[source_pixel(i - low, size, p.padding)];
    for (Index i = 0; i < behind; ++i) out[low + size + i] = in[source_pixel(size + i, size, p.padding)];
}

// Adds a row of the padded gradient to the row of the image that it stands for.
template <class T>
void fold_row(const Plan<T>& plan, const T* in, T* out) {
    const GaussianWarp<T>& p = *plan.p;
    const Index low = plan.low[2], size = p.size[2], behind = plan.extent[2] - low - size;
    add_scaled(out, T(1), in + low, size);
    if (p.padding == WarpPadding::zeros) return;
    for (Index i = 0; i < low; ++i) out[source_pixel(i - low, size, p.padding)] += in[i];
    for (Index i = 0; i < behind; ++i) out[source_pixel(size + i, size, p.padding)] += in[low + size + i];
}

// Calls body(i) for the pixels of a padded axis that stand for `pixel`.
template <class T, class Body>
PK_INLINE void for_each_copy(const Plan<T>& plan, int axis, Index pixel, const Body& body) {
    const Index low = plan.low[axis], size = plan.p->size[axis];
    body(low + pixel);
    if (plan.p->padding == WarpPadding::zeros) return;
    for (Index i = 0; i < plan.extent[axis]; i = i + 1 == low ? low + size : i + 1)
        if ((i < low || i >= low + size) && source_pixel(i - low, size, plan.p->padding) == pixel) body(i);
}

// The gradient of row (z, y) of a channel from the padded one, of which there are `parts`, `part_stride` apart.
template <class T>
void fold(const Plan<T>& plan, const T* padded, Index part_stride, Index channel, Index z, Index y, T* out) {
    clear(out, plan.p->size[2]);
    for_each_copy(plan, 0, z, [&](Index i) {
        for_each_copy(plan, 1, y, [&](Index j) {
            const T* const row = padded + channel * plan.volume + i * plan.plane + j * plan.row;
            for (int part = 0; part < plan.parts; ++part) fold_row(plan, row + part * part_stride, out);
        });
    });
}

// Windows of a block of pixels of one row.
template <class T>
struct Windows {
    Index n;
    T shared_marker;
    T marker[block];  // 0, or NaN where the flow or the variance is
    T variance[block];
    std::int32_t taps[block];
    std::int32_t at[3][block];     // where the window starts in a padded channel, on each axis
    std::int32_t first[3][block];  // the first tap's pixel on each axis
    std::int32_t piece[3][block];  // of the table, and where in it; without one, f
    T rest[3][block];
    T offset[3][block];  // f
    T shift[2][block];   // on x and y, of windows side by side
};

// Where a window starts in a padded channel.
template <class T>
PK_INLINE Index window_base(const Plan<T>& plan, const Windows<T>& w, Index i) {
    const bool deep = plan.p->ranks == 3, high = plan.p->ranks > 1;
    return (deep ? w.at[0][i] * plan.plane : 0) + (high ? w.at[1][i] * plan.row : 0) + w.at[2][i];
}

// Where the windows lie on an axis on which pixel i has coordinate `position + i * advance`.
template <class T>
PK_INLINE void locate(const Plan<T>& plan, const WeightTable<T>* table, Index axis, Index position, Index advance,
                      const T* flow, Windows<T>& w) {
    constexpr int lanes = Vec<T>::lanes;
    const GaussianWarp<T>& p = *plan.p;
    const bool odd = plan.taps % 2 == 1;  // then all windows are
    const Vec<T> scale(static_cast<T>(-p.scale[axis])), far(static_cast<T>(farthest)), zero(T(0));
    const Vec<T> exact(sizeof(T) == 4 ? T(1 << 22) : T(1 << 30));  // from here on a half is lost in the sum
    const Vec<T> half(odd ? T(0.5) : T(0)), nan(static_cast<T>(__builtin_nan("")));
    const Index pieces = table == nullptr ? 1 : table->pieces;
    const Vec<T> length(static_cast<T>(pieces)), last(static_cast<T>(pieces - 1)), middle(T(0.5));
    std::int32_t* const first = w.first[axis];
    for (Index i = 0; i < w.n; i += lanes) {
        const Vec<T> given = Vec<T>::load_first(flow + i, static_cast<int>(min(w.n - i, Index(lanes))));
        (Vec<T>::load(w.marker + i) + select_le(given, given, zero, nan)).store(w.marker + i);
        const Vec<T> t = greatest(least(given * scale, far), zero - far);
        const Vec<T> whole = floor(t + select_le(exact, copysign(t, far), zero, half));
        const Vec<T> rest = t - whole;
        store_integers(first + i, whole);
        rest.store(w.offset[axis] + i);
        if (table == nullptr) {
            rest.store(w.rest[axis] + i);
            continue;
        }
        const Vec<T> at = (rest + half) * length, piece = least(floor(at), last);
        store_integers(w.piece[axis] + i, piece);
        (at - piece - middle).store(w.rest[axis] + i);
    }
    const std::int32_t start = static_cast<std::int32_t>(position), stride = static_cast<std::int32_t>(advance);
    for (std::int32_t i = 0; i < w.n; ++i) first[i] += start + i * stride - (w.taps[i] - 1) / 2;
    const std::int32_t size = static_cast<std::int32_t>(p.size[axis]);
    const std::int32_t low = static_cast<std::int32_t>(plan.low[axis]);
    if (p.padding == WarpPadding::zeros || p.padding == WarpPadding::border) {
        for (Index i = 0; i < w.n; ++i) {
            const std::int32_t least = -w.taps[i];
            const std::int32_t at = first[i] < least ? least : first[i] > size ? size : first[i];
            w.at[axis][i] = at + low;
        }
        return;
    }
    const std::int32_t period = p.padding == WarpPadding::periodic ? size : 2 * size;
    const std::int32_t begin = p.padding == WarpPadding::periodic ? 0 : -size;
    for (Index i = 0; i < w.n; ++i) {
        std::int32_t at = first[i] - begin;
        at += at < 0 ? period : 0;
        at -= at >= period ? period : 0;
        if (at < 0 || at >= period) {
            at %= period;
            at += at < 0 ? period : 0;
        }
        w.at[axis][i] = at + begin + low;
    }
}

template <class T, int kinds>
PK_INLINE void weigh_by_table(const Plan<T>& plan, const WeightTable<T>& table, Index axis, const Windows<T>& w,
                              T* jets) {
    constexpr int lanes = Vec<T>::lanes;
    const T* const rest = w.rest[axis];
    const std::int32_t* const piece = w.piece[axis];
    T* const end = jets + w.n * plan.jet_size;
    Index i = 0;
    if (table.width == lanes)
        for (; jets < end; jets += plan.jet_size, ++i)
            tabulated_weights<T, kinds, lanes>(table, piece[i], rest[i], 2 * lanes, jets);
    else
        for (; jets < end; jets += plan.jet_size, ++i)
            tabulated_weights<T, kinds, 0>(table, piece[i], rest[i], plan.stride, jets);
}

template <class T>
PK_INLINE void weigh(const Plan<T>& plan, const WeightTable<T>* table, int kinds, Index axis, const Windows<T>& w,
                     T* jets) {
    const GaussianWarp<T>& p = *plan.p;
    if (table != nullptr && kinds == 1) weigh_by_table<T, 1>(plan, *table, axis, w, jets);
    if (table != nullptr && kinds == 2) weigh_by_table<T, 2>(plan, *table, axis, w, jets);
    if (table != nullptr && kinds == 3) weigh_by_table<T, 3>(plan, *table, axis, w, jets);
    const bool inside = p.normalize == WarpNormalize::inside && p.padding == WarpPadding::zeros;
    if (table != nullptr && !inside) return;
    const Index size = p.size[axis];
    for (Index i = 0; i < w.n; ++i) {
        T* const jet = jets + i * plan.jet_size;
        const Index taps = w.taps[i], first = w.first[axis][i];
        const Index low = inside ? max(Index(0), min(taps, -first)) : 0;
        const Index high = inside ? max(low, min(taps, size - first)) : taps;
        if (table == nullptr)
            computed_weights<T>(p.form, {p.normalize, low, high}, w.variance[i], w.rest[axis][i], taps, plan.width,
                                plan.stride, kinds, jet);
        else if (high - low < taps)
            renormalize(jet, low, high, taps, plan.stride, kinds);
    }
}

// Products of the weights on z and y, in three dimensions.
template <class T>
void multiply_outer(const Plan<T>& plan, const Windows<T>& w, const T* jets, T* outer) {
    const Index stride = plan.stride, entries = plan.taps * plan.taps, axis = plan.axis;
    for (Index i = 0; i < w.n; ++i) {
        const Index taps = w.taps[i];
        const T* const z = jets + i * plan.jet_size;
        const T* const y = z + axis;
        T* const out = outer + i * plan.outer_size;
        for (Index a = 0; a < taps; ++a)
            for (Index b = 0; b < taps; ++b) {
                T* const at = out + a * taps + b;
                at[0] = z[a] * y[b];
                if (plan.jets > 1) {
                    at[entries] = z[stride + a] * y[b];
                    at[2 * entries] = z[a] * y[stride + b];
                }
                if (plan.jets > 3) at[3 * entries] = z[2 * stride + a] * y[b] + z[a] * y[2 * stride + b];
            }
    }
}

// What the windows of a warp have in common, where the variance does not vary.
template <class T>
void share(const GaussianWarp<T>& p, Index sample, Index step, Windows<T>& w) {
    if (p.varies) return;
    const T v = variance_of(p, sample, step), used = v >= 0 ? v : T(0);
    const std::int32_t taps = static_cast<std::int32_t>(taps_of(p, used));
    w.shared_marker = v >= 0 ? T(0) : static_cast<T>(__builtin_nan(""));
    for (Index i = 0; i < block; ++i) {
        w.variance[i] = used;
        w.taps[i] = taps;
    }
}

// The windows of pixels [x, x + w.n) of row (z, y).
template <class T>
PK_INLINE void locate_block(const Plan<T>& plan, const Worker<T>& worker, Index sample, Index step, Index z, Index y,
                            Index x, Windows<T>& w) {
    const GaussianWarp<T>& p = *plan.p;
    const Index at = (z * p.size[1] + y) * p.size[2] + x;
    const T* const flow = p.flow + sample * p.flow_stride[0] + step * p.flow_stride[1] + at;
    const WeightTable<T>* const table = plan.tabulated && worker.table.pieces > 0 ? &worker.table : nullptr;
    const T nan = static_cast<T>(__builtin_nan(""));
    if (p.varies) {
        const T* const v = p.variance + sample * p.variance_stride[0] + step * p.variance_stride[1] + at;
        for (Index i = 0; i < w.n; ++i) {
            w.marker[i] = v[i] >= 0 ? T(0) : nan;
            w.variance[i] = v[i] >= 0 ? v[i] : T(0);
            w.taps[i] = static_cast<std::int32_t>(taps_of(p, w.variance[i]));
        }
    } else {
        for (Index i = 0; i < block; ++i) w.marker[i] = w.shared_marker;
    }
    for (Index a = first_axis(p.ranks); a < 3; ++a) {
        locate(plan, table, a, a == 2 ? x : a == 1 ? y : z, a == 2 ? 1 : 0, flow + p.flow_axis[a], w);
    }
}

// Their weights.
template <class T>
void weigh_block(const Plan<T>& plan, const Worker<T>& worker, int kinds, const Windows<T>& w) {
    const WeightTable<T>* const table = plan.tabulated && worker.table.pieces > 0 ? &worker.table : nullptr;
    const Index outermost = first_axis(plan.p->ranks);
    for (Index a = outermost; a < 3; ++a) weigh(plan, table, kinds, a, w, worker.jets + (a - outermost) * plan.axis);
    if (plan.p->ranks == 3) multiply_outer(plan, w, worker.jets, worker.outer);
}

// Whether the windows of all vectors of a block lie side by side, and where: s holds one entry for each vector.
template <class T>
PK_INLINE bool side_by_side(const Plan<T>& plan, const Worker<T>& worker, bool finite, Windows<T>& w,
                            SideBySide<T>* s) {
    constexpr std::int32_t lanes = Vec<T>::lanes;
    const GaussianWarp<T>& p = *plan.p;
    if (!finite || p.ranks != 2 || p.varies || w.n < block) return false;
    for (std::int32_t v = 0; v < block; v += lanes) {
        std::int32_t start[2], spread[2];
        for (int a = 0; a < 2; ++a) {
            const std::int32_t* const at = w.at[2 - a] + v;
            const std::int32_t step = a == 0 ? 1 : 0;
            std::int32_t least = at[0], most = at[0];
            for (std::int32_t i = 1; i < lanes; ++i) {
                const std::int32_t relative = at[i] - i * step;
                least = relative < least ? relative : least;
                most = relative > most ? relative : most;
            }
            start[a] = least;
            spread[a] = most - least;
            if (spread[a] > most_spread) return false;
            if (p.normalize == WarpNormalize::inside && p.padding == WarpPadding::zeros) {
                const std::int32_t* const first = w.first[2 - a] + v;
                for (std::int32_t i = 0; i < lanes; ++i)
                    if (first[i] < 0 || first[i] + worker.table.taps > p.size[2 - a]) return false;
            }
            for (std::int32_t i = 0; i < lanes; ++i) w.shift[a][v + i] = static_cast<T>(at[i] - i * step - least);
        }
        s[v / lanes] = {start[0],        start[1],        spread[0],      spread[1],
                        w.offset[2] + v, w.offset[1] + v, w.shift[0] + v, w.shift[1] + v};
    }
    return true;
}

// x in lanes [low, high), 0 in the others, whatever they hold.
template <class T>
PK_INLINE Vec<T> keep_range(Vec<T> x, Index low, Index high) {
#if PK_VECTOR_BYTES == 64
    const unsigned mask = ((1u << high) - 1u) & ~((1u << low) - 1u);
    if constexpr (sizeof(T) == 4)
        x.v = _mm512_maskz_mov_ps(static_cast<__mmask16>(mask), x.v);
    else
        x.v = _mm512_maskz_mov_pd(static_cast<__mmask8>(mask), x.v);
    return x;
#else
    return select_between(count_from(T(0)), low, high, x, Vec<T>(T(0)));
#endif
}

template <class T>
PK_INLINE Vec<T> keep_first(Vec<T> x, Index n) {
    return keep_range(x, 0, min(n, Index(Vec<T>::lanes)));
}

// Sums of folded vectors, one for each pixel.
template <class T>
PK_INLINE void add_folded(const T* folded, Index n, T* out) {
    constexpr int parts = folded_lanes<T>;
    for (Index i = 0; i < n; ++i) {
        T sum = folded[i * parts];
        for (int k = 1; k < parts; ++k) sum += folded[i * parts + k];
        out[i] += sum;
    }
}

// Where the outer weights of a pixel are: jet k from `weights + k * stride` on.
template <class T>
struct Outer {
    const T* weights;
    Index stride;
    Index rows_z, rows_y;
};

template <class T>
PK_INLINE Outer<T> outer_weights(const Plan<T>& plan, const Worker<T>& worker, Index i, Index taps, const T* one) {
    if (plan.p->ranks == 1) return {one, 0, 1, 1};
    if (plan.p->ranks == 2) return {worker.jets + i * plan.jet_size, plan.stride, 1, taps};
    return {worker.outer + i * plan.outer_size, plan.taps * plan.taps, taps, taps};
}

// Partial sums of one window, to be added up over the lanes. `fixed`: rows of the window where they are known.
template <class T, int fixed>
PK_INLINE Vec<T> window_sum(const Plan<T>& plan, const T* padded, const Outer<T>& outer, const T* inner, Index taps) {
    constexpr int lanes = Vec<T>::lanes;
    Vec<T> sum(T(0));
    for (Index j = 0; j < taps; j += lanes) {
        Vec<T> column(T(0));
        if constexpr (fixed > 0) {
#pragma GCC unroll 16
            for (int r = 0; r < fixed; ++r)
                column = column + Vec<T>(outer.weights[r]) * Vec<T>::load(padded + j + r * plan.row);
        } else {
            const T* weight = outer.weights;
            for (Index a = 0; a < outer.rows_z; ++a)
                for (Index b = 0; b < outer.rows_y; ++b)
                    column = column + Vec<T>(*weight++) * Vec<T>::load(padded + j + a * plan.plane + b * plan.row);
        }
        sum = sum + keep_first(column, taps - j) * Vec<T>::load(inner + j);
    }
    return sum;
}

// Pixels [i, end) of a block whose windows lie in the same rows and, side by side, in one vector: those of a smooth flow. Their
// rows are read once, and the weights shifted to where each window is.
template <class T, int taps>
PK_INLINE Index group_end(const Windows<T>& w, Index i) {
    const std::int32_t x = w.at[2][i], y = w.at[1][i];
    Index end = i + 1;
    while (end < w.n && w.at[1][end] == y && w.at[2][end] >= x && w.at[2][end] - x <= Vec<T>::lanes - taps) ++end;
    return end;
}

template <class T, int taps>
void warp_groups(const Plan<T>& plan, const Worker<T>& worker, const Windows<T>& w, const T* padded, T* folded) {
    for (Index i = 0; i < w.n;) {
        const Index end = group_end<T, taps>(w, i), left = w.at[2][i], first = w.at[1][i] * plan.row + left;
        Vec<T> rows[taps];
#pragma GCC unroll 16
        for (int r = 0; r < taps; ++r) {
            rows[r] = Vec<T>::load(padded + first + r * plan.row);
            keep_in_register(rows[r]);
        }
        for (; i < end; ++i) {
            const Index shift = w.at[2][i] - left;
            const T* const outer = worker.jets + i * plan.jet_size;
            Vec<T> column = Vec<T>(outer[0]) * rows[0];
#pragma GCC unroll 16
            for (int r = 1; r < taps; ++r) column = column + Vec<T>(outer[r]) * rows[r];
            store_folded(folded + i * folded_lanes<T>,
                         keep_range(column, shift, shift + taps) * Vec<T>::load(outer + plan.axis - shift));
        }
    }
}

template <class T, int fixed>
void warp_block(const Plan<T>& plan, const Worker<T>& worker, const Windows<T>& w, const T* padded, T* out) {
    constexpr int parts = folded_lanes<T>;
    const Index inner = (plan.p->ranks - 1) * plan.axis;
    const T one = 1;
    T folded[block * parts];
    constexpr bool grouped = fixed > 0 && fixed < Vec<T>::lanes;
    if constexpr (grouped) warp_groups<T, fixed>(plan, worker, w, padded, folded);
    for (Index i = grouped ? w.n : 0; i < w.n; ++i) {
        const Index taps = fixed > 0 ? fixed : w.taps[i];
        const Outer<T> outer = outer_weights(plan, worker, i, taps, &one);
        const T* const weights = worker.jets + i * plan.jet_size + inner;
        store_folded(folded + i * parts,
                     window_sum<T, fixed>(plan, padded + window_base(plan, w, i), outer, weights, taps));
    }
    T sum[block] = {};
    add_folded(folded, w.n, sum);
    for (Index i = 0; i < w.n; ++i) out[i] = sum[i] + w.marker[i];
}

// Calls run with the number of taps as a type, 0 where there are no kernels for it.
template <int n>
struct Taps {
    static constexpr int value = n;
};
template <class Run>
PK_INLINE void with_taps(Index taps, const Run& run) {
    switch (taps) {
        case 3: return run(Taps<3>{});
        case 5: return run(Taps<5>{});
        case 7: return run(Taps<7>{});
        case 9: return run(Taps<9>{});
        default: return run(Taps<0>{});
    }
}

// Rows [begin, end) of a warp; `padded` holds its channels, all finite or not.
template <class T>
void warp_rows(const Plan<T>& plan, Worker<T>& worker, Index sample, Index step, Index begin, Index end,
               const T* padded, bool finite) {
    const GaussianWarp<T>& p = *plan.p;
    T* const frame = p.frames + (sample * p.steps + step) * p.channels * plan.pixels;
    const Index fixed = p.ranks == 2 && !p.varies && worker.table.pieces > 0 ? worker.table.taps : 0;
    Windows<T> w;
    SideBySide<T> s[block / Vec<T>::lanes];
    share(p, sample, step, w);
    for (Index r = begin; r < end; ++r)
        for (Index x = 0; x < p.size[2]; x += block) {
            w.n = min(block, p.size[2] - x);
            T* const out = frame + r * p.size[2] + x;
            locate_block(plan, worker, sample, step, r / p.size[1], r % p.size[1], x, w);
            const bool neighbours = side_by_side(plan, worker, finite, w, s);
            if (!neighbours) weigh_block(plan, worker, 1, w);
            with_taps(fixed, [&](auto taps) {
                constexpr int known = decltype(taps)::value;
                if constexpr (known > 0 && known <= most_side_by_side_taps) {
                    if (neighbours) {
                        for (Index i = 0; i < block; i += Vec<T>::lanes)
                            side_by_side_vector<T, known>(
                                worker.polynomials, s[i / Vec<T>::lanes], padded, p.channels, plan.volume, plan.row,
                                [&](Index c, Vec<T> sum) {
                                    (sum + Vec<T>::load(w.marker + i)).store(out + c * plan.pixels + i);
                                });
                        return;
                    }
                }
                for (Index c = 0; c < p.channels; ++c)
                    warp_block<T, known>(plan, worker, w, padded + c * plan.volume, out + c * plan.pixels);
            });
        }
}

// Sums over pixels and channels of a block: derivative by x, by the outer axes, by the variance.
template <class T>
struct Slopes {
    T by[4][block];
};

// One window: its slopes, folded, to folded[k]; what it gives to the image's gradient is added to `scattered`.
template <class T, int jets, bool by_variance, bool scatter, int fixed>
PK_INLINE void window_backward(const Plan<T>& plan, const T* padded, T* scattered, const Outer<T>& outer,
                               const T* inner, Index taps, T grad, T* const* folded) {
    constexpr int lanes = Vec<T>::lanes;
    const Vec<T> zero(T(0)), g(grad);
    Vec<T> slope[4] = {zero, zero, zero, zero};
    for (Index j = 0; j < taps; j += lanes) {
        Vec<T> column[4] = {zero, zero, zero, zero};
        const Vec<T> weight = Vec<T>::load(inner + j), given = keep_first(weight * g, taps - j);
        const auto row = [&](Index at, Index r) __attribute__((always_inline)) {
            if constexpr (jets > 0) {
                const Vec<T> pixels = Vec<T>::load(padded + j + at);
#pragma GCC unroll 4
                for (int k = 0; k < jets; ++k)
                    column[k] = column[k] + Vec<T>(outer.weights[k * outer.stride + r]) * pixels;
            }
            if constexpr (scatter) {
                T* const target = scattered + j + at;
                (Vec<T>::load(target) + Vec<T>(outer.weights[r]) * given).store(target);
            }
        };
        if constexpr (fixed > 0) {
#pragma GCC unroll 16
            for (int r = 0; r < fixed; ++r) row(r * plan.row, r);
        } else {
            Index r = 0;
            for (Index a = 0; a < outer.rows_z; ++a)
                for (Index b = 0; b < outer.rows_y; ++b) row(a * plan.plane + b * plan.row, r++);
        }
        if constexpr (jets > 0) {
            slope[0] = slope[0] + keep_first(column[0], taps - j) * Vec<T>::load(inner + plan.stride + j);
#pragma GCC unroll 4
            for (int k = 1; k < jets; ++k) slope[k] = slope[k] + keep_first(column[k], taps - j) * weight;
            if constexpr (by_variance) {  // after the axes, with one jet of its own if there are outer axes
                constexpr int k = jets == 1 ? 1 : jets - 1;
                slope[k] = slope[k] + keep_first(column[0], taps - j) * Vec<T>::load(inner + 2 * plan.stride + j);
            }
        }
    }
    if constexpr (jets > 0) {
        constexpr int slopes = jets == 1 && by_variance ? 2 : jets;
#pragma GCC unroll 4
        for (int k = 0; k < slopes; ++k) store_folded(folded[k], slope[k] * g);
    }
}

// As warp_groups: the slopes and the image's gradient of groups of windows.
template <class T, int jets, bool by_variance, bool scatter, int taps>
void groups_backward(const Plan<T>& plan, const Worker<T>& worker, const Windows<T>& w, const T* padded, T* scattered,
                     const T* grads, T (*folded)[block * folded_lanes<T>]) {
    const Vec<T> zero(T(0));
    for (Index i = 0; i < w.n;) {
        const Index end = group_end<T, taps>(w, i), left = w.at[2][i], first = w.at[1][i] * plan.row + left;
        Vec<T> rows[taps], given[taps];
#pragma GCC unroll 16
        for (int r = 0; r < taps; ++r) {
            if constexpr (jets > 0) {
                rows[r] = Vec<T>::load(padded + first + r * plan.row);
                keep_in_register(rows[r]);
            }
            given[r] = zero;
        }
        for (; i < end; ++i) {
            const Index shift = w.at[2][i] - left;
            const T* const outer = worker.jets + i * plan.jet_size;
            const T* const inner = outer + plan.axis - shift;
            const Vec<T> weight = Vec<T>::load(inner) * Vec<T>(grads[i]);
            const Vec<T> spread = keep_range(weight, shift, shift + taps);
            Vec<T> column[3] = {zero, zero, zero};
#pragma GCC unroll 16
            for (int r = 0; r < taps; ++r) {
#pragma GCC unroll 3
                for (int k = 0; k < jets; ++k) column[k] = column[k] + Vec<T>(outer[k * plan.stride + r]) * rows[r];
                if constexpr (scatter) given[r] = given[r] + Vec<T>(outer[r]) * spread;
            }
            if constexpr (jets > 0) {
                const Vec<T> sum = keep_range(column[0], shift, shift + taps), g(grads[i]);
                const Index at = i * folded_lanes<T>;
                store_folded(folded[0] + at, sum * (Vec<T>::load(inner + plan.stride) * g));
                store_folded(folded[1] + at, keep_range(column[1], shift, shift + taps) * weight);
                if constexpr (by_variance)
                    store_folded(folded[2] + at, keep_range(column[2], shift, shift + taps) * weight +
                                                     sum * (Vec<T>::load(inner + 2 * plan.stride) * g));
            }
        }
        if constexpr (scatter) {
#pragma GCC unroll 16
            for (int r = 0; r < taps; ++r) {
                // Only now: a load waits for the stores of the group before, which it overlaps.
                T* const target = scattered + first + r * plan.row;
                (Vec<T>::load(target) + given[r]).store(target);
            }
        }
    }
}

template <class T, int jets, bool by_variance, bool scatter, int fixed>
void warp_block_backward(const Plan<T>& plan, const Worker<T>& worker, const Windows<T>& w, const T* padded,
                         T* scattered, const T* grads, Slopes<T>& slopes) {
    constexpr int parts = folded_lanes<T>, count = jets == 1 && by_variance ? 2 : jets;
    const Index inner = (plan.p->ranks - 1) * plan.axis;
    const T one = 1;
    T folded[4][block * parts];
    constexpr bool grouped = fixed > 0 && fixed < Vec<T>::lanes;
    if constexpr (grouped)
        groups_backward<T, jets, by_variance, scatter, fixed>(plan, worker, w, padded, scattered, grads, folded);
    for (Index i = grouped ? w.n : 0; i < w.n; ++i) {
        const Index taps = fixed > 0 ? fixed : w.taps[i];
        const Outer<T> outer = outer_weights(plan, worker, i, taps, &one);
        const Index base = window_base(plan, w, i);
        T* const to[4] = {folded[0] + i * parts, folded[1] + i * parts, folded[2] + i * parts, folded[3] + i * parts};
        window_backward<T, jets, by_variance, scatter, fixed>(plan, padded + base, scatter ? scattered + base : nullptr,
                                                              outer, worker.jets + i * plan.jet_size + inner, taps,
                                                              grads[i], to);
    }
    for (int k = 0; k < count; ++k) add_folded(folded[k], w.n, slopes.by[k]);
}

template <class T, int jets, bool by_variance, bool scatter>
void choose_taps(const Plan<T>& plan, const Worker<T>& worker, const Windows<T>& w, Index fixed, const T* padded,
                 T* scattered, const T* grads, Slopes<T>& slopes) {
    if constexpr (jets == 2 || (jets == 3 && by_variance) || jets == 0) {
        switch (fixed) {
            case 3:
                return warp_block_backward<T, jets, by_variance, scatter, 3>(plan, worker, w, padded, scattered, grads,
                                                                             slopes);
            case 9:
                return warp_block_backward<T, jets, by_variance, scatter, 9>(plan, worker, w, padded, scattered, grads,
                                                                             slopes);
            default: break;
        }
    }
    warp_block_backward<T, jets, by_variance, scatter, 0>(plan, worker, w, padded, scattered, grads, slopes);
}

template <class T, bool scatter>
void choose_jets(const Plan<T>& plan, const Worker<T>& worker, const Windows<T>& w, Index fixed, const T* padded,
                 T* scattered, const T* grads, Slopes<T>& slopes) {
#define PK_CASE(jets, by_variance) \
    return choose_taps<T, jets, by_variance, scatter>(plan, worker, w, fixed, padded, scattered, grads, slopes)
    if (plan.by_variance) {
        switch (plan.jets) {
            case 1: PK_CASE(1, true);
            case 3: PK_CASE(3, true);
            default: PK_CASE(4, true);
        }
    }
    switch (plan.jets) {
        case 1: PK_CASE(1, false);
        case 2: PK_CASE(2, false);
        case 3: PK_CASE(3, false);
        default:
            if constexpr (scatter) PK_CASE(0, false);
    }
#undef PK_CASE
}

// Rows [begin, end) of the gradient of a warp. `carried` is what the step after it adds to the gradient of its result, or
// null; `row_sums` takes the sums of the variance's gradient over each row.
template <class T>
void warp_rows_backward(const Plan<T>& plan, Worker<T>& worker, Index sample, Index step, Index begin, Index end,
                        const T* padded, T* scattered, const T* carried, double* row_sums) {
    const GaussianWarp<T>& p = *plan.p;
    const GaussianWarpGradients<T>& g = *plan.g;
    const Index frame = sample * p.steps + step, slopes_count = p.ranks + (plan.by_variance ? 1 : 0);
    const Index fixed = p.ranks == 2 && !p.varies && worker.table.pieces > 0 ? worker.table.taps : 0;
    Windows<T> w;
    share(p, sample, step, w);
    for (Index r = begin; r < end; ++r) {
        double row_sum = 0;
        for (Index x = 0; x < p.size[2]; x += block) {
            const Index at = r * p.size[2] + x;
            w.n = min(block, p.size[2] - x);
            locate_block(plan, worker, sample, step, r / p.size[1], r % p.size[1], x, w);
            weigh_block(plan, worker, plan.kinds, w);
            Slopes<T> slopes;
            for (Index k = 0; k < slopes_count; ++k)
                for (Index i = 0; i < block; ++i) slopes.by[k][i] = 0;
            for (Index c = 0; c < p.channels; ++c) {
                T grads[block];
                const T* const given = g.grads + (frame * p.channels + c) * plan.pixels + at;
                const T* const added = carried == nullptr ? nullptr : carried + c * plan.pixels + at;
                for (Index i = 0; i < w.n; ++i) grads[i] = w.marker[i] == 0 ? given[i] : T(0);
                if (added != nullptr)
                    for (Index i = 0; i < w.n; ++i) grads[i] += w.marker[i] == 0 ? added[i] : T(0);
                const T* const channel = padded + c * plan.volume;
                if (plan.scatter)
                    choose_jets<T, true>(plan, worker, w, fixed, channel, scattered + c * plan.volume, grads, slopes);
                else
                    choose_jets<T, false>(plan, worker, w, fixed, channel, nullptr, grads, slopes);
            }
            for (Index k = 0; k < slopes_count; ++k)
                for (Index i = 0; i < w.n; ++i) slopes.by[k][i] = w.marker[i] == 0 ? slopes.by[k][i] : T(0);
            const T far = static_cast<T>(farthest);
            if (g.flow != nullptr)
                for (Index a = first_axis(p.ranks); a < 3; ++a) {
                    // Slope 0 is that of x, the others those of the outer axes in their order.
                    const Index k = a == 2 ? 0 : a - first_axis(p.ranks) + 1;
                    const T scale = static_cast<T>(-p.scale[a]);
                    const Index channel = p.flow_axis[a] / plan.pixels;
                    T* const out = g.flow + (frame * p.ranks + channel) * plan.pixels + at;
                    const T* const flow =
                        p.flow + sample * p.flow_stride[0] + step * p.flow_stride[1] + p.flow_axis[a] + at;
                    for (Index i = 0; i < w.n; ++i) {
                        const T t = flow[i] * scale;
                        out[i] = t > far || t < -far ? T(0) : scale * slopes.by[k][i];
                    }
                }
            if (plan.by_variance) {
                const T* const slope = slopes.by[p.ranks];
                if (p.varies)
                    copy(g.variance + frame * plan.pixels + at, slope, w.n);
                else
                    for (Index i = 0; i < w.n; ++i) row_sum += static_cast<double>(slope[i]);
            }
        }
        if (row_sums != nullptr) row_sums[r] = row_sum;
    }
}

template <class T>
void store_variance(const Plan<T>& plan, Index sample, Index step, const double* row_sums) {
    if (!plan.by_variance || plan.p->varies) return;
    double sum = 0;
    for (Index r = 0; r < plan.rows; ++r) sum += row_sums[r];
    plan.g->variance[sample * plan.p->steps + step] = static_cast<T>(sum);
}

// Memory of a call: workers, each followed by its padded channels where samples are tasks; else padded channels behind them.
template <class T>
struct Memory {
    const Plan<T>* plan;
    char* workers;
    Index worker_stride;  // bytes
    T* padded;
    Index padded_stride;  // elements from one worker to the next; 0 if they share
    double* row_sums;
    Index row_sums_stride;
    Index sample, step;  // at hand, where they share
    const T* carried;
    bool finite;
    Index rows_each;  // of a task, where they share
};

template <class T>
Worker<T>& worker_at(const Memory<T>& m, int index) {
    return *reinterpret_cast<Worker<T>*>(m.workers + index * m.worker_stride);
}

template <class T>
T* image_gradient(const Plan<T>& plan, Index sample) {
    return plan.g->image + sample * plan.p->channels * plan.pixels;
}

// All steps of one sample.
template <class T>
void run_sample(const void* context, Index sample, int worker_index) {
    const Memory<T>& m = *static_cast<const Memory<T>*>(context);
    const Plan<T>& plan = *m.plan;
    const GaussianWarp<T>& p = *plan.p;
    Worker<T>& worker = worker_at(m, worker_index);
    T* const padded = m.padded + worker_index * m.padded_stride;
    const Index padded_rows = plan.extent[0] * plan.extent[1];
    const auto pad = [&](Index step) {
        const Image<const T> image = source_image(p, sample, step, plan.pixels);
        for (Index c = 0; c < p.channels; ++c)
            for (Index r = 0; r < padded_rows; ++r) pad_row(plan, image, c, r, padded);
        prepare_table(plan, worker, sample, step);
    };
    if (plan.g == nullptr) {
        for (Index step = 0; step < p.steps; ++step) {
            pad(step);
            const bool finite = worker.polynomials.usable && all_finite(padded, p.channels * plan.volume);
            warp_rows(plan, worker, sample, step, 0, plan.rows, padded, finite);
        }
        return;
    }
    T* const scattered = padded + p.channels * plan.volume;
    double* const row_sums = m.row_sums + worker_index * m.row_sums_stride;
    for (Index step = p.steps - 1; step >= 0; --step) {
        pad(step);
        if (plan.scatter) clear(scattered, p.channels * plan.volume);
        const T* const carried = plan.scatter && step + 1 < p.steps ? image_gradient(plan, sample) : nullptr;
        warp_rows_backward(plan, worker, sample, step, 0, plan.rows, padded, scattered, carried, row_sums);
        store_variance(plan, sample, step, row_sums);
        if (!plan.scatter) continue;
        T* const out = image_gradient(plan, sample);
        for (Index c = 0; c < p.channels; ++c)
            for (Index r = 0; r < plan.rows; ++r)
                fold(plan, scattered, 0, c, r / p.size[1], r % p.size[1], out + c * plan.pixels + r * p.size[2]);
    }
}

template <class T>
void run_pad(const void* context, Index task, int) {
    const Memory<T>& m = *static_cast<const Memory<T>*>(context);
    const Plan<T>& plan = *m.plan;
    const Index rows = plan.extent[0] * plan.extent[1], tasks = divide_up(rows, rows_of_a_task);
    const Image<const T> image = source_image(*plan.p, m.sample, m.step, plan.pixels);
    const Index begin = task % tasks * rows_of_a_task;
    for (Index r = begin; r < min(rows, begin + rows_of_a_task); ++r) pad_row(plan, image, task / tasks, r, m.padded);
}

template <class T>
void run_rows(const void* context, Index task, int worker_index) {
    const Memory<T>& m = *static_cast<const Memory<T>*>(context);
    const Plan<T>& plan = *m.plan;
    Worker<T> worker = worker_at(m, worker_index);
    worker.table = worker_at(m, 0).table;
    worker.polynomials = worker_at(m, 0).polynomials;
    const Index begin = task * m.rows_each, end = min(plan.rows, begin + m.rows_each);
    if (plan.g == nullptr) return warp_rows(plan, worker, m.sample, m.step, begin, end, m.padded, m.finite);
    const Index copy = plan.p->channels * plan.volume;
    T* const scattered = m.padded + (1 + task) * copy;
    if (plan.scatter) clear(scattered, copy);
    warp_rows_backward(plan, worker, m.sample, m.step, begin, end, m.padded, scattered, m.carried, m.row_sums);
}

template <class T>
void run_fold(const void* context, Index task, int) {
    const Memory<T>& m = *static_cast<const Memory<T>*>(context);
    const Plan<T>& plan = *m.plan;
    const GaussianWarp<T>& p = *plan.p;
    const Index copy = p.channels * plan.volume, tasks = divide_up(plan.rows, rows_of_a_task), c = task / tasks;
    const Index begin = task % tasks * rows_of_a_task;
    T* const out = image_gradient(plan, m.sample) + c * plan.pixels;
    for (Index r = begin; r < min(plan.rows, begin + rows_of_a_task); ++r)
        fold(plan, m.padded + copy, copy, c, r / p.size[1], r % p.size[1], out + r * p.size[2]);
}

template <class T>
void run(const GaussianWarp<T>& p, const GaussianWarpGradients<T>* g) {
    if (p.batch == 0 || p.steps == 0) return;
    Plan<T> plan = make_plan(p, g);
    const int threads = usable_threads(plan.pixels * p.batch * p.channels < smallest_parallel ? 1 : p.threads);
    const bool by_sample = threads == 1 || p.batch % threads == 0 || p.batch >= 8 * threads;
    plan.parts = by_sample || !plan.scatter ? 1 : threads;
    const Index copies = by_sample ? (g == nullptr ? 1 : 2) : 1 + (plan.scatter ? plan.parts : 0);
    const Index channels = p.channels * plan.volume * copies;
    const Index size = static_cast<Index>(sizeof(T));
    Memory<T> m{};
    m.plan = &plan;
    m.worker_stride = worker_bytes(plan);
    const Index padded_bytes = aligned<T>(channels) * size * (by_sample ? threads : 1);
    const Index sums = aligned<double>(plan.rows);
    const Index sums_bytes = plan.by_variance ? sums * 8 * (by_sample ? threads : 1) : 0;
    const Scratch scratch(static_cast<std::size_t>(m.worker_stride * threads + padded_bytes + sums_bytes));
    m.workers = static_cast<char*>(scratch.data());
    m.padded = reinterpret_cast<T*>(m.workers + m.worker_stride * threads);
    for (int i = 0; i < threads; ++i) make_worker(plan, m.workers + i * m.worker_stride);
    m.row_sums = sums_bytes > 0 ? reinterpret_cast<double*>(reinterpret_cast<char*>(m.padded) + padded_bytes) : nullptr;
    if (by_sample) {
        m.padded_stride = aligned<T>(channels);
        m.row_sums_stride = plan.by_variance ? sums : 0;
        parallel_tasks(p.batch, threads, run_sample<T>, &m);
        return;
    }
    const Index row_tasks = divide_up(plan.rows, rows_of_a_task);
    const Index padded_tasks = p.channels * divide_up(plan.extent[0] * plan.extent[1], rows_of_a_task);
    m.rows_each = plan.scatter ? divide_up(plan.rows, plan.parts) : rows_of_a_task;
    for (m.sample = 0; m.sample < p.batch; ++m.sample)
        for (Index i = 0; i < p.steps; ++i) {
            m.step = g == nullptr ? i : p.steps - 1 - i;
            prepare_table(plan, worker_at(m, 0), m.sample, m.step);
            parallel_tasks(padded_tasks, threads, run_pad<T>, &m);
            m.finite =
                g == nullptr && worker_at(m, 0).polynomials.usable && all_finite(m.padded, p.channels * plan.volume);
            m.carried = plan.scatter && i > 0 ? image_gradient(plan, m.sample) : nullptr;
            if (plan.scatter) plan.parts = static_cast<int>(divide_up(plan.rows, m.rows_each));
            parallel_tasks(divide_up(plan.rows, m.rows_each), threads, run_rows<T>, &m);
            if (g == nullptr) continue;
            if (plan.by_variance) store_variance(plan, m.sample, m.step, m.row_sums);
            if (plan.scatter) parallel_tasks(p.channels * row_tasks, threads, run_fold<T>, &m);
        }
}

}  // namespace

void gaussian_warp_forward(const GaussianWarp<float>& p) { run<float>(p, nullptr); }
void gaussian_warp_forward(const GaussianWarp<double>& p) { run<double>(p, nullptr); }
void gaussian_warp_backward(const GaussianWarp<float>& p, const GaussianWarpGradients<float>& g) { run(p, &g); }
void gaussian_warp_backward(const GaussianWarp<double>& p, const GaussianWarpGradients<double>& g) { run(p, &g); }

PK_ISA_END
