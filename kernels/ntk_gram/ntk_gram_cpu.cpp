// See ntk_gram.hpp and pair.hpp.
#include <cstddef>

#include "common/parallel.hpp"
#include "common/product.hpp"
#include "ntk_gram/ntk_gram.hpp"
#include "ntk_gram/pair.hpp"

PK_ISA_BEGIN

namespace {

// Pairs whose e or f is smaller have it from the difference or the sum of their vectors.
constexpr double near_pairs = 0.02;
// With so few features and the bias, all of them do.
constexpr Index direct_features = 8;
// With more layers left than this, smooth ones have near pairs from their distance: slopes above 1 would amplify rounding.
constexpr int steady_layers = 3;
// Products of more features than this are added up in parts, for the sake of their rounding.
constexpr Index product_depth = 96;
constexpr Index smallest_parallel = 4096;  // pairs
constexpr Index large_result = 4 << 20;    // bytes
constexpr Index strip_panels = 8;
constexpr Index most_vectors_by_rows = 4;  // columns of v that are multiplied as they lie

// Whether pairs have e from differences alone. Not where a lower precision of the inner products is asked for.
template <class T>
bool takes_differences(const NtkProblem<T>& p) {
    return p.features + 1 <= direct_features && (sizeof(T) == 8 || p.precision == NtkPrecision::full);
}

static_assert(tile_vectors % pair_vectors == 0);
template <class T>
constexpr Index panel_width = tile_vectors * Vec<T>::lanes;
template <class T>
constexpr Index strip_width = strip_panels * panel_width<T>;

// Memory that is divided up: first counted, then handed out.
class Arena {
public:
    explicit Arena(void* data) : data_(static_cast<char*>(data)) {}
    template <class U>
    U* take(Index count) {
        char* const here = data_ == nullptr ? nullptr : data_ + used_;
        used_ += (static_cast<std::size_t>(count) * sizeof(U) + 63) / 64 * 64;
        return reinterpret_cast<U*>(here);
    }
    std::size_t used() const { return used_; }

private:
    char* data_;
    std::size_t used_ = 0;
};

// One set of points as the kernels take them, padded to whole panels: with zero vectors that have the last point's numbers.
template <class T>
struct Side {
    const NtkPoints<T>* points;
    Index n, panels, features, padded;  // points, panels of them; features and bias, and in whole vectors
    T* unit;                            // (B, panels * width, padded)
    T* numbers;                         // (B, panels * width, numbers)
    double* variance;                   // (B, n)
    T* unit_panels;                     // (B, panels, padded, width); null where only rows are needed
    T* number_panels;                   // (B, panels, numbers, width)
    int count;                          // of numbers

    Index capacity() const { return panels * panel_width<T>; }
    const T* row(Index b, Index i) const { return unit + (b * capacity() + i) * padded; }
    const T* row_numbers(Index b, Index i) const { return numbers + (b * capacity() + i) * count; }
    const T* panel(Index b, Index j) const { return unit_panels + (b * panels + j) * padded * panel_width<T>; }
    const T* panel_numbers(Index b, Index j) const { return number_panels + (b * panels + j) * count * panel_width<T>; }
};

template <class T>
Side<T> side_of(const NtkProblem<T>& p, const NtkPoints<T>& points, bool columns, int count, Arena& arena) {
    Side<T> side{};
    side.points = &points;
    side.n = points.n;
    side.panels = divide_up(points.n, panel_width<T>);
    side.features = p.features + 1;
    side.padded = divide_up(side.features, Vec<T>::lanes) * Vec<T>::lanes;
    side.count = count;
    const Index all = p.batch * side.capacity();
    side.unit = arena.take<T>(all * side.padded);
    side.numbers = arena.take<T>(all * count);
    side.variance = arena.take<double>(p.batch * points.n);
    if (columns) {
        side.unit_panels = arena.take<T>(all * side.padded);
        side.number_panels = arena.take<T>(all * count);
    }
    return side;
}

// The network with its constants in T, and where its numbers lie.
template <class T>
Network<T> network_of(const NtkProblem<T>& p, Arena& arena, bool fill) {
    const NtkNetwork& given = p.network;
    int total = 0;
    for (int l = 0; l < given.depth; ++l) total += static_cast<int>(given.counts[l]);
    auto* const layers = arena.take<Layer<T>>(given.depth);
    auto* const branches = arena.take<Branch<T>>(total);
    if (!fill) return {layers, given.depth, ntk_numbers(given), ntk_primaries(given), total, p.ntk};
    int number = 0, primary = 0, first = 0;
    bool folded = false;
    for (int l = 0; l < given.depth; ++l) {
        const int count = static_cast<int>(given.counts[l]);
        bool all_relu = true, stable = given.depth - l > steady_layers, keeps_f = false, rounded = false;
        for (int i = first + count; i < total; ++i)
            stable = stable || given.branches[i].activation == NtkActivation::relu ||
                     given.branches[i].activation == NtkActivation::leaky_relu;
        for (int i = first; i < first + count; ++i) {
            const NtkBranch& from = given.branches[i];
            const double s = from.parameter;
            const bool keeps = from.activation == NtkActivation::identity ||
                               (stable && (from.activation == NtkActivation::erf ||
                                           (from.activation == NtkActivation::sin && from.even == 1)));
            const double b = from.activation == NtkActivation::rbf ? s : s * s;
            branches[i] = {from.activation,
                           static_cast<T>(2 * s / (1 + s * s)),
                           static_cast<T>(b),
                           static_cast<T>(from.even),
                           number,
                           primary,
                           keeps};
            number += ntk_numbers_of(from);
            primary += ntk_primaries_of(from);
            all_relu = all_relu && from.activation == NtkActivation::relu;
            keeps_f = keeps_f || keeps;
            rounded = rounded || from.activation > NtkActivation::leaky_relu;
        }
        Simple simple = Simple::no;
        if (count == 1 && all_relu) simple = Simple::relu;
        if (count == 1 && !stable && given.branches[first].activation == NtkActivation::erf) simple = Simple::erf;
        layers[l] = {branches + first, count, number++, primary++, folded, stable, keeps_f, rounded, simple};
        folded = all_relu;
        first += count;
    }
    return {layers, given.depth, number + 1, primary + 1, total, p.ntk};
}

template <class T>
T rounded(T value, NtkPrecision) {
    return value;
}
PK_INLINE float rounded(float value, NtkPrecision precision) {
    if (precision == NtkPrecision::full) return value;
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const int cut = precision == NtkPrecision::bf16 ? 16 : 13;
    if (value == value) bits += (1u << (cut - 1)) - 1 + ((bits >> cut) & 1);  // to nearest, ties to even
    bits &= ~((1u << cut) - 1);
    __builtin_memcpy(&value, &bits, sizeof bits);
    return value;
}

// C_0(x, x), without overflow on the way.
template <class T>
double variance_of(const T* x, Index features, double weight, double bias) {
    double parts[8] = {bias * bias};
    Index k = 0;
    for (; k + 8 <= features; k += 8)
        for (int i = 0; i < 8; ++i) {
            const double value = weight * static_cast<double>(x[k + i]);
            parts[i] += value * value;
        }
    for (; k < features; ++k) parts[k % 8] += weight * static_cast<double>(x[k]) * (weight * static_cast<double>(x[k]));
    double sum = 0;
    for (const double part : parts) sum += part;
    if (sum < 1e300 && sum > 1e-280) return sum;
    double largest = bias;
    for (k = 0; k < features; ++k) {
        const double value = __builtin_fabs(weight * static_cast<double>(x[k]));
        if (!(value <= largest)) largest = value;
    }
    if (!(largest < 1e308)) return largest * largest;
    sum = bias / largest * (bias / largest);
    for (k = 0; k < features; ++k) {
        const double value = weight * static_cast<double>(x[k]) / largest;
        sum += value * value;
    }
    return sum * largest * largest;
}

template <class T>
struct Prepare {
    const NtkProblem<T>* p;
    const Side<T>* side;
    double* worker_numbers;  // (workers, numbers)
    double weight, bias;     // w_0 / sqrt n, b_0
};

// A panel of points.
template <class T>
void prepare(const void* context, std::int64_t task, int worker) {
    const auto& c = *static_cast<const Prepare<T>*>(context);
    const Side<T>& side = *c.side;
    constexpr Index width = panel_width<T>;
    const Index b = task / side.panels, j = task % side.panels, d = c.p->features;
    double* const numbers = c.worker_numbers + worker * side.count;
    T* const units = side.unit + (b * side.capacity() + j * width) * side.padded;
    T* const rows = side.numbers + (b * side.capacity() + j * width) * side.count;
    for (Index r = 0; r < width; ++r) {
        T* const unit = units + r * side.padded;
        T* const row = rows + r * side.count;
        const Index i = j * width + r;
        if (i >= side.n) {
            clear(unit, side.padded);
            copy(row, row - side.count, side.count);
            continue;
        }
        const T* const x = side.points->x + b * side.points->batch_stride + i * side.points->stride;
        const double variance = variance_of(x, d, c.weight, c.bias);
        side.variance[b * side.n + i] = variance;
        const double root = sqrt(variance);
        for (Index k = 0; k < d; ++k)
            unit[k] = rounded(static_cast<T>(c.weight * static_cast<double>(x[k]) / root), c.p->precision);
        unit[d] = rounded(static_cast<T>(c.bias / root), c.p->precision);
        for (Index k = d + 1; k < side.padded; ++k) unit[k] = 0;
        ntk_row(c.p->network, variance, numbers, nullptr);
        for (int k = 0; k < side.count; ++k) row[k] = static_cast<T>(numbers[k]);
    }
    if (side.unit_panels == nullptr) return;
    transpose(side.unit_panels + (b * side.panels + j) * side.padded * width, width, units, side.padded, width,
              side.padded);
    T* const panel = side.number_panels + (b * side.panels + j) * side.count * width;
    for (Index r = 0; r < width; ++r)
        for (int k = 0; k < side.count; ++k) panel[k * width + r] = rows[r * side.count + k];
}

template <class T>
void prepare(const NtkProblem<T>& p, const Side<T>& side, double* worker_numbers, int threads) {
    const double root = sqrt(static_cast<double>(max(p.features, 1))), least = sqrt(ntk_least_variance);
    const double bias = __builtin_fabs(p.network.bias_std[0]);
    const Prepare<T> context{&p, &side, worker_numbers, p.network.weight_std[0] / root, bias > least ? bias : least};
    parallel_tasks(p.batch * side.panels, threads, prepare<T>, &context);
}

// sum of (x -+ y)^2 / 4 over the features, for vectors of columns.
template <class T, int U, bool plus>
PK_INLINE void squares(const T* x, const T* y, Index features, Pairs<T, U>& sum) {
    constexpr int lanes = Vec<T>::lanes;
    PK_EACH_VECTOR sum[u] = Vec<T>(T(0));
    for (Index k = 0; k < features; ++k) {
        const Vec<T> xk(x[k]);
        PK_EACH_VECTOR {
            const Vec<T> yk = Vec<T>::load(y + k * panel_width<T> + u * lanes), value = plus ? xk + yk : xk - yk;
            sum[u] = sum[u] + value * value;
        }
    }
    PK_EACH_VECTOR sum[u] = sum[u] * Vec<T>(T(0.25));
}

// e, and f, where they are small.
template <class T, int U, bool plus>
__attribute__((noinline)) void correct(const T* x, const T* y, Index features, Pairs<T, U>& small, Pairs<T, U>& large) {
    const Vec<T> one(T(1)), bound(static_cast<T>(near_pairs));
    Pairs<T, U> sum;
    squares<T, U, plus>(x, y, features, sum);
    PK_EACH_VECTOR {
        large[u] = select_le(bound, small[u], large[u], one - sum[u]);
        small[u] = select_le(bound, small[u], small[u], sum[u]);
    }
}

// e and f of a row and vectors of columns: from their inner products `rho`, or directly where there are none.
template <class T, int U>
PK_INLINE void half_angles(const T* rho, const T* x, const T* y, Index features, Pairs<T, U>& e, Pairs<T, U>& f) {
    constexpr int lanes = Vec<T>::lanes;
    const Vec<T> one(T(1)), half(T(0.5)), far(static_cast<T>(1 - near_pairs));
    if (rho == nullptr) {
        squares<T, U, false>(x, y, features, e);
        PK_EACH_VECTOR f[u] = one - e[u];
    } else {
        PK_EACH_VECTOR {
            const Vec<T> product = Vec<T>::load(rho + u * lanes);
            e[u] = half - half * product;
            f[u] = half + half * product;
        }
        Vec<T> most(T(0));
        PK_EACH_VECTOR most = greatest(f[u], most);  // NaN is left out
        if (any_greater(most, far)) correct<T, U, false>(x, y, features, e, f);
    }
    Vec<T> most(T(0));
    PK_EACH_VECTOR most = greatest(e[u], most);
    if (any_greater(most, far)) correct<T, U, true>(x, y, features, f, e);
}

// rho (rows, width) of rows from i on and a panel.
template <class T>
void inner_products(const Side<T>& x, const Side<T>& y, Index b, Index i, Index rows, Index panel, T* rho,
                    Index rho_row) {
    constexpr Index width = panel_width<T>;
    for (Index k = 0; k < x.features; k += product_depth) {
        const StridedProduct<T> product{rows,
                                        min(product_depth, x.features - k),
                                        x.row(b, i) + k,
                                        x.padded,
                                        1,
                                        0,
                                        y.panel(b, panel) + k * width,
                                        width,
                                        0,
                                        1,
                                        rho,
                                        rho_row};
        strided_product<T, false>(product, tile_vectors, {nullptr, nullptr, k > 0});
    }
}

// A tile into rows of memory. Large results are written around the caches, which would first read what is overwritten.
template <class T>
void write_tile(T* out, Index out_row, const T* tile, Index rows, Index columns, bool around) {
    constexpr Index width = panel_width<T>;
#if PK_VECTOR_BYTES == 64
    if (around && columns == width && reinterpret_cast<std::uintptr_t>(out) % 64 == 0 &&
        out_row * sizeof(T) % 64 == 0) {
        for (Index r = 0; r < rows; ++r)
            for (Index c = 0; c < width; c += Vec<T>::lanes)
                _mm512_stream_si512(reinterpret_cast<__m512i*>(out + r * out_row + c),
                                    _mm512_load_si512(tile + r * width + c));
        return;
    }
#endif
    (void)around;
    for (Index r = 0; r < rows; ++r) copy(out + r * out_row, tile + r * width, columns);
}

template <class T>
struct Gram {
    const NtkProblem<T>* p;
    Network<T> network;
    Side<T> x, y;
    bool symmetric, around;
    T* gram;
};

// A tile of both kernels into `tiles`, one after the other.
template <class T>
void gram_tile(const Gram<T>& g, Index b, Index block, Index panel, Index rows, T* tiles) {
    constexpr int lanes = Vec<T>::lanes, U = pair_vectors;
    constexpr Index width = panel_width<T>;
    alignas(64) T rho[width * width];
    const bool direct = takes_differences(*g.p);
    const Index first = block * width;
    if (!direct) inner_products(g.x, g.y, b, first, rows, panel, rho, width);
    const T* const columns = g.y.panel_numbers(b, panel);
    const int scale = g.network.numbers - 1;
    for (Index r = 0; r < rows; ++r) {
        const T* const row = g.x.row_numbers(b, first + r);
        for (int v = 0; v < tile_vectors; v += U) {
            const Numbers<T> numbers{row, columns + v * lanes, width};
            State<T, U> pairs;
            half_angles<T, U>(direct ? nullptr : rho + r * width + v * lanes, g.x.row(b, first + r),
                              g.y.panel(b, panel) + v * lanes, g.x.features, pairs.e, pairs.f);
            layers_forward<T, U, false>(g.network, numbers, pairs, nullptr);
            PK_EACH_VECTOR {
                const Vec<T> both = numbers.x(scale) * numbers.y(scale, u);
                T* out = tiles + r * width + (v + u) * lanes;
                if (g.p->nngp) {
                    (both * (pairs.f[u] - pairs.e[u])).store(out);
                    out += width * width;
                }
                if (g.p->ntk) (both * pairs.tangent[u]).store(out);
            }
        }
    }
}

template <class T>
void run_gram(const void* context, std::int64_t task, int) {
    const auto& g = *static_cast<const Gram<T>*>(context);
    constexpr Index width = panel_width<T>;
    Index block, panel;
    const Index blocks = g.x.panels, tasks = g.symmetric ? blocks * (blocks + 1) / 2 : blocks * g.y.panels;
    const Index b = task / tasks, number = task % tasks;
    if (g.symmetric) {
        // The block-th row of tiles has blocks - block of them, from the diagonal on.
        block = 0;
        Index left = number;
        while (left >= blocks - block) left -= blocks - block++;
        panel = block + left;
    } else {
        block = number / g.y.panels;
        panel = number % g.y.panels;
    }
    const Index rows = min(width, g.x.n - block * width), columns = min(width, g.y.n - panel * width);
    alignas(64) T tiles[2 * width * width];
    gram_tile(g, b, block, panel, rows, tiles);
    const Index kinds = (g.p->nngp ? 1 : 0) + (g.p->ntk ? 1 : 0);
    for (Index kind = 0; kind < kinds; ++kind) {
        T* const out = g.gram + (kind * g.p->batch + b) * g.x.n * g.y.n;
        T* const tile = tiles + kind * width * width;
        if (g.symmetric && block == panel)  // in every bit
            for (Index r = 0; r < rows; ++r)
                for (Index c = 0; c < r; ++c) tile[r * width + c] = tile[c * width + r];
        write_tile(out + block * width * g.y.n + panel * width, g.y.n, tile, rows, columns, g.around);
        if (!g.symmetric || block == panel) continue;
        alignas(64) T turned[width * width];
        transpose(turned, width, tile, width, width, width);
        write_tile(out + panel * width * g.y.n + block * width, g.y.n, turned, columns, rows, g.around);
    }
#if PK_VECTOR_BYTES == 64
    if (g.around) _mm_sfence();
#endif
}

// Both sides, the network, and whatever else is asked for from the same memory.
template <class T>
struct Setting {
    Network<T> network;
    Side<T> x, y;
    double* worker_numbers;
};

template <class T>
Setting<T> setting_of(const NtkProblem<T>& p, bool symmetric, int workers, Arena& arena, bool fill) {
    Setting<T> s{};
    s.network = network_of(p, arena, fill);
    s.x = side_of(p, p.x, symmetric, s.network.numbers, arena);
    s.y = symmetric ? s.x : side_of(p, p.y, true, s.network.numbers, arena);
    s.worker_numbers = arena.take<double>(static_cast<Index>(workers) * s.network.numbers);
    return s;
}

template <class T>
void prepare_sides(const NtkProblem<T>& p, const Setting<T>& s, bool symmetric, int threads) {
    prepare(p, s.x, s.worker_numbers, threads);
    if (!symmetric) prepare(p, s.y, s.worker_numbers, threads);
}

template <class T>
int threads_for(const NtkProblem<T>& p, Index columns) {
    return p.batch * p.x.n * columns < smallest_parallel ? 1 : p.threads;
}

template <class T>
void gram(const NtkProblem<T>& p, T* result) {
    const bool symmetric = p.symmetric;
    if (p.batch * p.x.n * (symmetric ? p.x.n : p.y.n) == 0) return;
    const int threads = threads_for(p, symmetric ? p.x.n : p.y.n), workers = usable_threads(threads);
    Arena sizes(nullptr);
    setting_of(p, symmetric, workers, sizes, false);
    const Scratch scratch(sizes.used());
    Arena arena(scratch.data());
    const Setting<T> s = setting_of(p, symmetric, workers, arena, true);
    prepare_sides(p, s, symmetric, threads);
    const Index elements = p.batch * p.x.n * s.y.n * (p.nngp && p.ntk ? 2 : 1);
    const bool around = elements * static_cast<Index>(sizeof(T)) >= large_result;
    const Gram<T> context{&p, s.network, s.x, s.y, symmetric, around, result};
    const Index tiles = symmetric ? s.x.panels * (s.x.panels + 1) / 2 : s.x.panels * s.y.panels;
    parallel_tasks(p.batch * tiles, threads, run_gram<T>, &context);
}

// Rows that one task sums up: enough for the products of many features.
constexpr Index rows_of(Index features) { return features <= 64 ? 16 : 48; }

template <class T>
PK_INLINE double sum_of_lanes(Vec<T> x) {
    T lane[Vec<T>::lanes];
    x.store(lane);
    double parts[2] = {};  // no lane is left out: all capabilities have an even number of them
    for (int i = 0; i < Vec<T>::lanes; i += 2) {
        parts[0] += static_cast<double>(lane[i]);
        parts[1] += static_cast<double>(lane[i + 1]);
    }
    return parts[0] + parts[1];
}

template <class T>
struct MatvecMemory {  // of a worker
    T* strip;          // (rows, strip): inner products, then the kernel without the rows' scale
    T* part;           // (rows, padded columns of v)
    double* sums;      // (rows, padded columns of v)
};

template <class T>
struct Matvec {
    const NtkProblem<T>* p;
    Network<T> network;
    Side<T> x, y;
    Index columns, padded, rows;  // of v, in whole vectors; rows of a task
    bool by_rows;
    const T* v;  // by rows (B, columns, capacity), else (B, capacity, padded)
    T* product;
    const MatvecMemory<T>* memory;
};

template <class T>
void run_matvec(const void* context, std::int64_t task, int worker) {
    const auto& m = *static_cast<const Matvec<T>*>(context);
    constexpr int lanes = Vec<T>::lanes, U = pair_vectors;
    constexpr Index width = panel_width<T>, strip = strip_width<T>;
    const MatvecMemory<T>& memory = m.memory[worker];
    const Index blocks = divide_up(m.x.n, m.rows), b = task / blocks, first = task % blocks * m.rows;
    const Index rows = min(m.rows, m.x.n - first), features = m.x.features;
    const int scale = m.network.numbers - 1;
    const bool direct = takes_differences(*m.p);
    for (Index i = 0; i < rows * m.padded; ++i) memory.sums[i] = 0;
    for (Index start = 0; start < m.y.panels; start += strip_panels) {
        const Index panels = min(strip_panels, m.y.panels - start);
        for (Index j = 0; j < panels; ++j) {
            T* const tile = memory.strip + j * width;
            if (!direct) inner_products(m.x, m.y, b, first, rows, start + j, tile, strip);
            const T* const columns = m.y.panel_numbers(b, start + j);
            for (Index r = 0; r < rows; ++r) {
                const T* const row = m.x.row_numbers(b, first + r);
                for (int v = 0; v < tile_vectors; v += U) {
                    const Numbers<T> numbers{row, columns + v * lanes, width};
                    T* const at = tile + r * strip + v * lanes;
                    State<T, U> pairs;
                    half_angles<T, U>(direct ? nullptr : at, m.x.row(b, first + r), m.y.panel(b, start + j) + v * lanes,
                                      features, pairs.e, pairs.f);
                    layers_forward<T, U, false>(m.network, numbers, pairs, nullptr);
                    PK_EACH_VECTOR {
                        const Vec<T> value = m.network.ntk ? pairs.tangent[u] : pairs.f[u] - pairs.e[u];
                        (numbers.y(scale, u) * value).store(at + u * lanes);
                    }
                }
            }
        }
        if (m.by_rows) {
            for (Index r = 0; r < rows; ++r)
                for (Index c = 0; c < m.columns; ++c) {
                    const T* const k = memory.strip + r * strip;
                    const T* const v = m.v + (b * m.columns + c) * m.y.capacity() + start * width;
                    Vec<T> sum(T(0));
                    for (Index i = 0; i < panels * width; i += lanes)
                        sum = sum + Vec<T>::load(k + i) * Vec<T>::load(v + i);
                    memory.sums[r * m.padded + c] += sum_of_lanes(sum);
                }
        } else {
            const StridedProduct<T> product{rows,
                                            panels * width,
                                            memory.strip,
                                            strip,
                                            1,
                                            0,
                                            m.v + (b * m.y.capacity() + start * width) * m.padded,
                                            m.padded,
                                            0,
                                            1,
                                            memory.part,
                                            m.padded};
            strided_product<T, false>(product, m.padded / lanes, {nullptr, nullptr, false});
            for (Index i = 0; i < rows * m.padded; ++i) memory.sums[i] += static_cast<double>(memory.part[i]);
        }
    }
    for (Index r = 0; r < rows; ++r) {
        const double own = static_cast<double>(m.x.row_numbers(b, first + r)[scale]);
        T* const out = m.product + (b * m.x.n + first + r) * m.columns;
        for (Index c = 0; c < m.columns; ++c) out[c] = static_cast<T>(own * memory.sums[r * m.padded + c]);
    }
}

template <class T>
void matvec(const NtkProblem<T>& p, const T* v, Index columns, T* result) {
    const bool symmetric = p.symmetric;
    const Index m = symmetric ? p.x.n : p.y.n;
    if (p.batch * p.x.n * columns == 0) return;
    if (m == 0) return clear(result, p.batch * p.x.n * columns);
    const int threads = threads_for(p, m), workers = usable_threads(threads);
    const bool by_rows = columns <= most_vectors_by_rows;
    const Index padded = by_rows ? columns : divide_up(columns, Vec<T>::lanes) * Vec<T>::lanes;
    const Index rows = rows_of(p.features + 1), capacity = divide_up(m, panel_width<T>) * panel_width<T>;
    T* values = nullptr;
    MatvecMemory<T>* memory = nullptr;
    const auto divide = [&](Arena& arena, bool fill) {
        const Setting<T> s = setting_of(p, symmetric, workers, arena, fill);
        values = arena.take<T>(p.batch * capacity * padded);
        memory = arena.take<MatvecMemory<T>>(workers);
        for (int w = 0; w < workers; ++w) {
            const MatvecMemory<T> mine{arena.take<T>(rows * strip_width<T>), arena.take<T>(rows * padded),
                                       arena.take<double>(rows * padded)};
            if (fill) memory[w] = mine;
        }
        return s;
    };
    Arena sizes(nullptr);
    divide(sizes, false);
    const Scratch scratch(sizes.used());
    Arena arena(scratch.data());
    const Setting<T> s = divide(arena, true);
    prepare_sides(p, s, symmetric, threads);
    clear(values, p.batch * capacity * padded);
    for (Index b = 0; b < p.batch; ++b)
        for (Index j = 0; j < m; ++j)
            for (Index c = 0; c < columns; ++c)
                values[by_rows ? (b * columns + c) * capacity + j : (b * capacity + j) * padded + c] =
                    v[(b * m + j) * columns + c];
    const Matvec<T> context{&p, s.network, s.x, s.y, columns, padded, rows, by_rows, values, result, memory};
    parallel_tasks(p.batch * divide_up(p.x.n, rows), threads, run_matvec<T>, &context);
}

template <class T>
struct WitnessMemory {  // of a worker
    T* rho;             // (rows, strip)
    T* weights;         // (rows, strip)
    T* along;           // (rows, strip): how much of u_y the gradient takes
    T* part;            // (rows, padded features): of a strip
    T* close;           // the same, of near pairs
    Vec<T>* kept;       // what the layers keep
    Vec<T>* sums;       // (primaries + 1 + features): of a row and a strip
    double* totals;     // (rows, primaries + 1 + padded features)
    double* numbers;    // (numbers + primaries)
};

// The sums of a row: those by its primary numbers, of which the last is the sum itself, then the multiple of u_x in the
// gradient, then the rest of the gradient.
template <class T>
struct Witness {
    const NtkProblem<T>* p;
    Network<T> network;
    Side<T> x, y;
    const NtkWeights<T>* w;
    const NtkSums<T>* result;
    Index rows;
    const T* right;  // (B, panels, p, width)
    const WitnessMemory<T>* memory;
};

// W of some rows and a strip; zero beyond the columns.
template <class T>
void weights_of(const Witness<T>& s, Index b, Index first, Index rows, Index start, Index panels, T* weights) {
    constexpr int lanes = Vec<T>::lanes;
    constexpr Index width = panel_width<T>, strip = strip_width<T>;
    const NtkWeights<T>& w = *s.w;
    for (Index j = 0; j < panels; ++j) {
        T* const tile = weights + j * width;
        const T* const right = s.right + (b * s.y.panels + start + j) * w.p * width;
        if (w.dense == nullptr && w.left != nullptr) {
            const StridedProduct<T> product{
                rows, w.p, w.left + (b * s.x.n + first) * w.p, w.p, 1, 0, right, width, 0, 1, tile, strip};
            strided_product<T, false>(product, tile_vectors, {nullptr, nullptr, false});
            continue;
        }
        for (Index r = 0; r < rows; ++r)
            for (Index v = 0; v < tile_vectors; ++v) {
                const Index column = (start + j) * width + v * lanes;
                const int n = static_cast<int>(max(0, min(lanes, s.y.n - column)));
                const Index* stride = w.dense_stride;
                if (w.dense == nullptr)
                    Vec<T>::load(right + v * lanes).store(tile + r * strip + v * lanes);
                else if (n == 0)
                    Vec<T>(T(0)).store(tile + r * strip + v * lanes);
                else
                    load_strided(w.dense + b * stride[0] + (first + r) * stride[1] + column * stride[2], stride[2], n)
                        .store(tile + r * strip + v * lanes);
            }
    }
}

// The share of near pairs in the gradient: multiples of their differences, or sums.
template <class T>
__attribute__((noinline)) void add_near(const Witness<T>& s, const WitnessMemory<T>& memory, Index b, Index r,
                                        const T* x, Index column, Vec<T> is_near, Vec<T> along, Vec<T> sign) {
    constexpr int lanes = Vec<T>::lanes;
    T near[lanes], amount[lanes], signs[lanes];
    is_near.store(near);
    along.store(amount);
    sign.store(signs);
    T* const out = memory.close + r * s.x.padded;
    for (int lane = 0; lane < lanes; ++lane) {
        if (near[lane] == 0 || amount[lane] == 0 || column + lane >= s.y.n) continue;
        const T* const other = s.y.row(b, column + lane);
        const Vec<T> a(amount[lane]), g(signs[lane]);
        for (Index k = 0; k < s.x.padded; k += lanes)
            (Vec<T>::load(out + k) + a * (g * Vec<T>::load(x + k) - Vec<T>::load(other + k))).store(out + k);
    }
}

// A row and a strip. `direct`: the gradient is summed up here; else what it takes of u_y is left in `along`, for a product,
// but for near pairs, whose difference is taken first.
template <class T, bool direct>
void witness_row(const Witness<T>& s, const WitnessMemory<T>& memory, Index b, Index i, Index start, Index panels,
                 Index r) {
    constexpr int lanes = Vec<T>::lanes, U = pair_vectors;
    constexpr Index width = panel_width<T>, strip = strip_width<T>;
    const Vec<T> half(T(0.5)), one(T(1)), two(T(2)), zero(T(0)), bound(static_cast<T>(near_pairs));
    const Index features = s.x.features;
    const int primaries = s.network.primaries, scale = s.network.numbers - 1;
    const T* const x = s.x.row(b, i);
    Vec<T>* const sums = memory.sums;
    for (Index k = 0; k < primaries + 1 + (direct ? features : 0); ++k) sums[k] = zero;
    for (Index j = 0; j < panels; ++j) {
        const T* const columns = s.y.panel_numbers(b, start + j);
        for (int v = 0; v < tile_vectors; v += U) {
            const Numbers<T> numbers{s.x.row_numbers(b, i), columns + v * lanes, width};
            const Index at = r * strip + j * width + v * lanes;
            const T* const y = s.y.panel(b, start + j) + v * lanes;
            Pairs<T, U> e, f, of_e, of_tangent;
            half_angles<T, U>(direct ? nullptr : memory.rho + at, x, y, features, e, f);
            State<T, U> pairs{e, f, {}};
            layers_forward<T, U, true>(s.network, numbers, pairs, memory.kept);
            PK_EACH_VECTOR {
                const Vec<T> weight = Vec<T>::load(memory.weights + at + u * lanes) * numbers.y(scale, u);
                const Vec<T> value = s.network.ntk ? pairs.tangent[u] : pairs.f[u] - pairs.e[u];
                sums[primaries - 1] = sums[primaries - 1] + weight * value;
                of_e[u] = s.network.ntk ? zero : zero - two * weight;
                of_tangent[u] = s.network.ntk ? weight : zero;
            }
            layers_backward<T, U>(s.network, numbers, memory.kept, of_e, of_tangent, sums);
            // Half of d/de times u_x - u_y and -e u_x, or the like with u_x + u_y and f: the smaller ones.
            Pairs<T, U> along, sign;
            Vec<T> of_unit = sums[primaries];
            PK_EACH_VECTOR {
                const Vec<T> small = select_le(e[u], f[u], zero - e[u], f[u]);
                along[u] = half * of_e[u];
                sign[u] = select_le(e[u], f[u], one, zero - one);
                const Vec<T> own = of_e[u] * small;
                of_unit = of_unit + (direct ? own : select_le(bound, least(e[u], f[u]), along[u] * (f[u] - e[u]), own));
            }
            sums[primaries] = of_unit;
            if constexpr (direct) {
                for (Index k = 0; k < features; ++k) {
                    const Vec<T> xk(x[k]);
                    Vec<T> sum = sums[primaries + 1 + k];
                    PK_EACH_VECTOR sum = sum + along[u] * (sign[u] * xk - Vec<T>::load(y + k * width + u * lanes));
                    sums[primaries + 1 + k] = sum;
                }
            } else {
                PK_EACH_VECTOR {
                    const Vec<T> smallest = least(e[u], f[u]), is_near = select_le(bound, smallest, zero, one);
                    select_le(bound, smallest, along[u], zero).store(memory.along + at + u * lanes);
                    if (any_greater(is_near, half))
                        add_near(s, memory, b, r, x, (start + j) * width + (v + u) * lanes, is_near, along[u], sign[u]);
                }
            }
        }
    }
    double* const totals = memory.totals + r * (primaries + 1 + s.x.padded);
    for (Index k = 0; k < primaries + 1 + (direct ? features : 0); ++k) totals[k] += sum_of_lanes(sums[k]);
}

template <class T>
void finish_row(const Witness<T>& s, const WitnessMemory<T>& memory, Index b, Index i, Index r) {
    const int primaries = s.network.primaries;
    const double* const totals = memory.totals + r * (primaries + 1 + s.x.padded);
    double* const derivatives = memory.numbers + s.network.numbers;
    const double variance = s.x.variance[b * s.x.n + i];
    ntk_row(s.p->network, variance, memory.numbers, derivatives);
    const double scale = memory.numbers[s.network.numbers - 1];
    const Index row = b * s.x.n + i;
    if (s.result->values != nullptr) s.result->values[row] = static_cast<T>(scale * totals[primaries - 1]);
    if (s.result->rows != nullptr)
        for (int k = 0; k < primaries; ++k) s.result->rows[row * primaries + k] = static_cast<T>(scale * totals[k]);
    if (s.result->gradients == nullptr) return;
    double radial = 0;
    for (int k = 0; k < primaries; ++k) radial += totals[k] * derivatives[k];
    const double of_unit = totals[primaries] + 2 * radial, ratio = scale / sqrt(variance);
    const T* const unit = s.x.row(b, i);
    T* const out = s.result->gradients + row * s.x.features;
    for (Index k = 0; k < s.x.features; ++k)
        out[k] = static_cast<T>(ratio * (totals[primaries + 1 + k] + of_unit * static_cast<double>(unit[k])));
}

template <class T>
void run_witness(const void* context, std::int64_t task, int worker) {
    const auto& s = *static_cast<const Witness<T>*>(context);
    constexpr Index width = panel_width<T>, strip = strip_width<T>;
    const WitnessMemory<T>& memory = s.memory[worker];
    const Index blocks = divide_up(s.x.n, s.rows), b = task / blocks, first = task % blocks * s.rows;
    const Index rows = min(s.rows, s.x.n - first), padded = s.x.padded;
    const Index total = s.network.primaries + 1 + padded;
    const bool direct = takes_differences(*s.p);
    for (Index i = 0; i < rows * total; ++i) memory.totals[i] = 0;
    for (Index start = 0; start < s.y.panels; start += strip_panels) {
        const Index panels = min(strip_panels, s.y.panels - start);
        weights_of(s, b, first, rows, start, panels, memory.weights);
        if (direct) {
            for (Index r = 0; r < rows; ++r) witness_row<T, true>(s, memory, b, first + r, start, panels, r);
            continue;
        }
        for (Index j = 0; j < panels; ++j)
            inner_products(s.x, s.y, b, first, rows, start + j, memory.rho + j * width, strip);
        clear(memory.close, rows * padded);
        for (Index r = 0; r < rows; ++r) witness_row<T, false>(s, memory, b, first + r, start, panels, r);
        const StridedProduct<T> product{
            rows, panels * width, memory.along, strip, 1, 0, s.y.row(b, start * width), padded, 0,
            1,    memory.part,    padded};
        strided_product<T, false>(product, padded / Vec<T>::lanes, {nullptr, nullptr, false});
        for (Index r = 0; r < rows; ++r) {
            double* const totals = memory.totals + r * total + s.network.primaries + 1;
            for (Index k = 0; k < padded; ++k)
                totals[k] += static_cast<double>(memory.close[r * padded + k]) -
                             static_cast<double>(memory.part[r * padded + k]);
        }
    }
    for (Index r = 0; r < rows; ++r) finish_row(s, memory, b, first + r, r);
}

template <class T>
void witness(const NtkProblem<T>& p, const NtkWeights<T>& w, const NtkSums<T>& result) {
    const bool symmetric = p.symmetric;
    const Index m = symmetric ? p.x.n : p.y.n;
    if (p.batch * p.x.n == 0) return;
    const int threads = threads_for(p, m), workers = usable_threads(threads);
    const Index rows = rows_of(p.features + 1), panels = divide_up(m, panel_width<T>), strip = strip_width<T>;
    T* right = nullptr;
    WitnessMemory<T>* memory = nullptr;
    const auto divide = [&](Arena& arena, bool fill) {
        const Setting<T> s = setting_of(p, symmetric, workers, arena, fill);
        right = arena.take<T>(w.right == nullptr ? 0 : p.batch * panels * w.p * panel_width<T>);
        memory = arena.take<WitnessMemory<T>>(workers);
        const Index padded = s.x.padded, primaries = s.network.primaries;
        for (int i = 0; i < workers; ++i) {
            const WitnessMemory<T> mine{arena.take<T>(rows * strip),
                                        arena.take<T>(rows * strip),
                                        arena.take<T>(rows * strip),
                                        arena.take<T>(rows * padded),
                                        arena.take<T>(rows * padded),
                                        arena.take<Vec<T>>(Kept<T, pair_vectors>::vectors(s.network)),
                                        arena.take<Vec<T>>(primaries + 1 + s.x.features),
                                        arena.take<double>(rows * (primaries + 1 + padded)),
                                        arena.take<double>(s.network.numbers + primaries)};
            if (fill) memory[i] = mine;
        }
        return s;
    };
    Arena sizes(nullptr);
    divide(sizes, false);
    const Scratch scratch(sizes.used());
    Arena arena(scratch.data());
    const Setting<T> s = divide(arena, true);
    prepare_sides(p, s, symmetric, threads);
    if (w.right != nullptr) {
        constexpr Index width = panel_width<T>;
        clear(right, p.batch * panels * w.p * width);
        for (Index b = 0; b < p.batch; ++b)
            for (Index j = 0; j < m; ++j)
                for (Index c = 0; c < w.p; ++c)
                    right[((b * panels + j / width) * w.p + c) * width + j % width] = w.right[(b * m + j) * w.p + c];
    }
    const Witness<T> context{&p, s.network, s.x, s.y, &w, &result, rows, right, memory};
    parallel_tasks(p.batch * divide_up(p.x.n, rows), threads, run_witness<T>, &context);
}

}  // namespace

void ntk_gram(const NtkProblem<float>& p, float* result) { gram(p, result); }
void ntk_gram(const NtkProblem<double>& p, double* result) { gram(p, result); }
void ntk_matvec(const NtkProblem<float>& p, const float* v, std::int64_t columns, float* product) {
    matvec(p, v, columns, product);
}
void ntk_matvec(const NtkProblem<double>& p, const double* v, std::int64_t columns, double* product) {
    matvec(p, v, columns, product);
}
void ntk_witness(const NtkProblem<float>& p, const NtkWeights<float>& w, const NtkSums<float>& sums) {
    witness(p, w, sums);
}
void ntk_witness(const NtkProblem<double>& p, const NtkWeights<double>& w, const NtkSums<double>& sums) {
    witness(p, w, sums);
}

PK_ISA_END
