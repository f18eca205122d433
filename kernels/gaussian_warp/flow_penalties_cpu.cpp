#include <cstdint>

#include "common/arrays.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"
#include "gaussian_warp/flow_penalties.hpp"

PK_ISA_BEGIN
namespace {

constexpr Index piece = 1024;               // longest piece of a row: what belongs to it stays in the cache
constexpr Index chunk = 8192;               // pixels of a task, about
constexpr Index smallest_parallel = 65536;  // starting workers costs more than what is smaller

// The pieces of the rows of a sample, and how many of them make a task.
struct Pieces {
    Index per_row, per_task, tasks;
};

PK_INLINE Pieces pieces_of(const Index* size) {
    const Index per_row = divide_up(size[2], piece), all = size[0] * size[1] * per_row;
    const Index per_task = max(1, chunk / min(size[2], piece));
    return {per_row, per_task, divide_up(all, per_task)};
}

// Columns [begin, end) of a row.
struct Row {
    Index index[2], begin, end;
};

// The first pixel of the pair that the difference at pixel i is of.
PK_INLINE Index pair_at(Index i, Index n) { return min(i, n - 2); }

// out = a - b, or out += a - b.
template <bool add, class T>
PK_INLINE void subtract(T* __restrict out, const T* a, const T* b, Index n) {
    for (Index j = 0; j < n; ++j) {
        if constexpr (add)
            out[j] += a[j] - b[j];
        else
            out[j] = a[j] - b[j];
    }
}

// One motion field of the batch.
template <class T>
class Sample {
public:
    Sample(const FlowPenalties<T>& p, Index b)
        : p_(p),
          stride_{p.size[1] * p.size[2], p.size[2]},
          component_(p.size[0] * stride_[0]),
          flow_(p.flow + b * p.ranks * component_) {}

    PK_INLINE Index offset(const Row& row, Index channel) const {
        return channel * component_ + row.index[0] * stride_[0] + row.index[1] * stride_[1] + row.begin;
    }
    PK_INLINE const T* at(const Row& row, Index channel) const { return flow_ + offset(row, channel); }

    // out = D f, or out += D f, along an axis of more than one pixel, for a component f.
    template <bool add>
    PK_INLINE void differences(T* __restrict out, const Row& row, int axis, Index channel) const {
        const T* f = at(row, channel);
        const Index n = row.end - row.begin;
        if (axis < 2) {
            const T* low = f + (pair_at(row.index[axis], p_.size[axis]) - row.index[axis]) * stride_[axis];
            const T* high = low + stride_[axis];
            subtract<add>(out, high, low, n);
        } else {
            const Index pairs = min(n, p_.size[2] - 1 - row.begin);
            subtract<add>(out, f + 1, f, pairs);
            if (pairs < n) subtract<add>(out + pairs, f + pairs, f + pairs - 1, 1);
        }
    }

    PK_INLINE void divergence(T* out, const Row& row) const {
        clear(out, row.end - row.begin);
        for (int axis = 0; axis < 3; ++axis)
            if (p_.size[axis] > 1) differences<true>(out, row, axis, p_.channel[axis]);
    }

private:
    const FlowPenalties<T>& p_;
    const Index stride_[2], component_;
    const T* const flow_;
};

template <class T>
PK_INLINE Row row_of(const FlowPenalties<T>& p, const Pieces& pieces, Index number) {
    const Index row = number / pieces.per_row, begin = number % pieces.per_row * piece;
    return {{row / p.size[1], row % p.size[1]}, begin, min(p.size[2], begin + piece)};
}

// Pixel i of a component is at f + i. Its difference along axis a is f[i + low[a] + step[a]] - f[i + low[a]].
struct Steps {
    Index low[3], step[3];
};

template <class T>
PK_INLINE Steps steps_of(const FlowPenalties<T>& p, const Row& row) {
    const Index stride[2] = {p.size[1] * p.size[2], p.size[2]};
    Steps steps = {{0, 0, 0}, {0, 0, 1}};
    for (int axis = 0; axis < 2; ++axis) {
        if (p.size[axis] == 1) continue;
        steps.low[axis] = (pair_at(row.index[axis], p.size[axis]) - row.index[axis]) * stride[axis];
        steps.step[axis] = stride[axis];
    }
    return steps;
}

// The three terms, of one pixel or of as many as a vector holds.
template <class V>
struct Terms {
    V divergence, magnitude, smoothness;
};

template <int ranks, bool xy, class V, class T, class Load>
PK_INLINE Terms<V> terms_at(const T* f, Index component, const Steps& steps, Load load) {
    V divergence(0), magnitude(0), smoothness(0);
#pragma GCC unroll 3
    for (int channel = 0; channel < ranks; ++channel) {
        const T* w = f + channel * component;
        const V value = load(w);
        magnitude = magnitude + value * value;
#pragma GCC unroll 3
        for (int axis = 3 - ranks; axis < 3; ++axis) {
            const V d = load(w + steps.low[axis] + steps.step[axis]) - load(w + steps.low[axis]);
            smoothness = smoothness + d * d;
            if (channel == (xy ? 2 - axis : axis - (3 - ranks))) divergence = divergence + d;
        }
    }
    return {divergence * divergence, magnitude, smoothness};
}

// Lanes are added to the sums in double before they have grown so long that their rounding counts.
template <class T>
class Sums {
public:
    PK_INLINE void add(const Terms<Vec<T>>& t) {
        lanes_.divergence = lanes_.divergence + t.divergence;
        lanes_.magnitude = lanes_.magnitude + t.magnitude;
        lanes_.smoothness = lanes_.smoothness + t.smoothness;
        if (++added_ == 64) flush();
    }
    PK_INLINE void add(const Terms<double>& t) {
        divergence_ += t.divergence;
        magnitude_ += t.magnitude;
        smoothness_ += t.smoothness;
    }
    PK_INLINE double weighted(const FlowPenalties<T>& p) {
        flush();
        double sum = 0;
        if (p.divergence != 0) sum += p.divergence * divergence_;
        if (p.magnitude != 0) sum += p.magnitude * magnitude_;
        if (p.smoothness != 0) sum += p.smoothness * smoothness_;
        return sum;
    }

private:
    PK_INLINE void flush() {
        divergence_ += total(lanes_.divergence);
        magnitude_ += total(lanes_.magnitude);
        smoothness_ += total(lanes_.smoothness);
        lanes_ = {Vec<T>(T(0)), Vec<T>(T(0)), Vec<T>(T(0))};
        added_ = 0;
    }
    static PK_INLINE double total(Vec<T> x) {
        T lane[Vec<T>::lanes];
        x.store(lane);
        double sum = 0;
        for (int i = 0; i < Vec<T>::lanes; ++i) sum += static_cast<double>(lane[i]);
        return sum;
    }

    Terms<Vec<T>> lanes_ = {Vec<T>(T(0)), Vec<T>(T(0)), Vec<T>(T(0))};
    double divergence_ = 0, magnitude_ = 0, smoothness_ = 0;
    int added_ = 0;
};

template <class T>
struct Forward {
    const FlowPenalties<T>& p;
    Pieces pieces;
    double* sums;  // (batch, tasks of a sample)
};

template <class T, int ranks, bool xy>
void run_forward(const void* parameters, Index task, int) {
    constexpr int lanes = Vec<T>::lanes;
    const Forward<T>& f = *static_cast<const Forward<T>*>(parameters);
    const FlowPenalties<T>& p = f.p;
    const Sample<T> sample(p, task / f.pieces.tasks);
    const Index component = p.size[0] * p.size[1] * p.size[2];
    const Index first = task % f.pieces.tasks * f.pieces.per_task;
    const Index last = min(p.size[0] * p.size[1] * f.pieces.per_row, first + f.pieces.per_task);
    Sums<T> sums;
    for (Index number = first; number < last; ++number) {
        const Row row = row_of(p, f.pieces, number);
        Steps steps = steps_of(p, row);
        const T* w = sample.at(row, 0);
        const bool ends = row.end == p.size[2];
        const Index n = row.end - row.begin - (ends ? 1 : 0);  // pixels that have one to their right
        Index j = 0;
        for (; j + lanes <= n; j += lanes)
            sums.add(
                terms_at<ranks, xy, Vec<T>>(w + j, component, steps, [](const T* at) { return Vec<T>::load(at); }));
        if (j < n) {
            const int rest = static_cast<int>(n - j);
            sums.add(terms_at<ranks, xy, Vec<T>>(w + j, component, steps,
                                                 [rest](const T* at) { return Vec<T>::load_first(at, rest); }));
        }
        if (!ends) continue;
        steps.low[2] = p.size[2] > 1 ? -1 : 0;
        steps.step[2] = p.size[2] > 1 ? 1 : 0;
        sums.add(
            terms_at<ranks, xy, double>(w + n, component, steps, [](const T* at) { return static_cast<double>(*at); }));
    }
    f.sums[task] = sums.weighted(p);
}

// What (D^T f)(i) takes f(i - 1), f(i) and f(i + 1) times, along an axis of n > 1 pixels.
struct Transpose {
    int before, at, after;
};
PK_INLINE Transpose transpose_at(Index i, Index n) { return {i > 0, i < n - 1 ? -1 : 1, -(i == n - 2)}; }

// How often pair (i - 1, i) counts in D^T D: the last one twice, what is beyond the border not at all.
PK_INLINE int pair_before(Index i, Index n) { return i == 0 ? 0 : (i == n - 1 ? 2 : 1); }

// Calls edge(i) for the columns of a piece whose neighbours differ from those of the others, [begin, end) of the row.
struct Columns {
    Index begin, end;
};
template <class Edge>
PK_INLINE Columns without_edges(const Row& row, Index n, Edge edge) {
    if (row.begin == 0) edge(Index(0));
    for (Index i = max(max(row.begin, 1), n - 2); i < row.end; ++i) edge(i);
    return {max(row.begin, 1), min(row.end, n - 2)};
}

template <class T>
struct Backward {
    const FlowPenalties<T>& p;
    Pieces pieces;
    const T* grads;
    T* grad_flow;
};

template <class T>
PK_INLINE void add_scaled_difference(T* __restrict out, T scale, const T* a, const T* b, Index n) {
    for (Index j = 0; j < n; ++j) out[j] += scale * (a[j] - b[j]);
}

// out += scale D^T D f along an axis, for the component f at the same pixels.
template <class T>
PK_INLINE void add_smoothness(T* __restrict out, const T* f, T scale, Index n, Index stride, const Row& row, int axis) {
    if (axis < 2) {
        const Index i = row.index[axis], count = row.end - row.begin;
        if (i > 0) add_scaled_difference(out, pair_before(i, n) * scale, f, f - stride, count);
        if (i < n - 1) add_scaled_difference(out, pair_before(i + 1, n) * scale, f, f + stride, count);
        return;
    }
    out -= row.begin;
    f -= row.begin;
    const Columns inner = without_edges(row, n, [&](Index i) {
        if (i > 0) out[i] += pair_before(i, n) * scale * (f[i] - f[i - 1]);
        if (i < n - 1) out[i] += pair_before(i + 1, n) * scale * (f[i] - f[i + 1]);
    });
    for (Index i = inner.begin; i < inner.end; ++i) out[i] += scale * ((f[i] - f[i - 1]) + (f[i] - f[i + 1]));
}

template <class T>
void run_backward(const void* parameters, Index task, int) {
    const Backward<T>& b = *static_cast<const Backward<T>*>(parameters);
    const FlowPenalties<T>& p = b.p;
    const Index number_of_sample = task / b.pieces.tasks;
    const Sample<T> sample(p, number_of_sample);
    const Index pixels = p.size[0] * p.size[1] * p.size[2];
    const double scale = 2 * static_cast<double>(b.grads[number_of_sample]) / static_cast<double>(pixels);
    const T of_divergence = static_cast<T>(scale * p.divergence), of_magnitude = static_cast<T>(scale * p.magnitude),
            of_smoothness = static_cast<T>(scale * p.smoothness);
    const Index strides[3] = {p.size[1] * p.size[2], p.size[2], 1};
    const Index first = task % b.pieces.tasks * b.pieces.per_task;
    const Index last = min(p.size[0] * p.size[1] * b.pieces.per_row, first + b.pieces.per_task);
    alignas(64) T here[piece + 2], there[piece];  // divergences of the row and its two neighbours, and of another row
    for (Index number = first; number < last; ++number) {
        const Row row = row_of(p, b.pieces, number);
        const Index n = row.end - row.begin;
        const Row wide = {{row.index[0], row.index[1]}, max(row.begin - 1, 0), min(row.end + 1, p.size[2])};
        if (p.divergence != 0) sample.divergence(here, wide);
        const T* const at = here - wide.begin;  // by column
        for (Index channel = 0; channel < p.ranks; ++channel) {
            const T* f = sample.at(row, channel);
            T* out = b.grad_flow + (f - p.flow);
            clear(out, n);
            if (p.magnitude != 0) add_scaled(out, of_magnitude, f, n);
            for (int axis = 0; axis < 3; ++axis) {
                const Index size = p.size[axis];
                if (size == 1) continue;
                if (p.smoothness != 0) add_smoothness(out, f, of_smoothness, size, strides[axis], row, axis);
                if (p.divergence == 0 || p.channel[axis] != channel) continue;
                if (axis < 2) {
                    const Transpose times = transpose_at(row.index[axis], size);
                    add_scaled(out, times.at * of_divergence, at + row.begin, n);
                    Row other = row;
                    if (times.before != 0) {
                        other.index[axis] = row.index[axis] - 1;
                        sample.divergence(there, other);
                        add_scaled(out, times.before * of_divergence, there, n);
                    }
                    if (times.after != 0) {
                        other.index[axis] = row.index[axis] + 1;
                        sample.divergence(there, other);
                        add_scaled(out, times.after * of_divergence, there, n);
                    }
                } else {
                    T* const columns = out - row.begin;
                    const Columns inner = without_edges(row, size, [&](Index i) {
                        const Transpose times = transpose_at(i, size);
                        columns[i] += times.at * of_divergence * at[i];
                        if (times.before != 0) columns[i] += times.before * of_divergence * at[i - 1];
                        if (times.after != 0) columns[i] += times.after * of_divergence * at[i + 1];
                    });
                    if (inner.begin < inner.end)
                        add_scaled_difference(columns + inner.begin, of_divergence, at + inner.begin - 1,
                                              at + inner.begin, inner.end - inner.begin);
                }
            }
        }
    }
}

template <class T>
void forward(const FlowPenalties<T>& p, T* values, int threads) {
    const Index pixels = p.size[0] * p.size[1] * p.size[2];
    const Pieces pieces = pieces_of(p.size);
    const Scratch scratch(static_cast<std::size_t>(p.batch * pieces.tasks) * sizeof(double));
    double* const sums = static_cast<double*>(scratch.data());
    const Forward<T> f{p, pieces, sums};
    const bool xy = p.channel[2] == 0;
    const TaskBody body = p.ranks == 1   ? run_forward<T, 1, true>
                          : p.ranks == 2 ? (xy ? run_forward<T, 2, true> : run_forward<T, 2, false>)
                                         : (xy ? run_forward<T, 3, true> : run_forward<T, 3, false>);
    parallel_tasks(p.batch * pieces.tasks, p.batch * p.ranks * pixels < smallest_parallel ? 1 : threads, body, &f);
    for (Index b = 0; b < p.batch; ++b) {
        double sum = 0;
        for (Index t = 0; t < pieces.tasks; ++t) sum += sums[b * pieces.tasks + t];
        values[b] = static_cast<T>(sum / static_cast<double>(pixels));
    }
}

template <class T>
void backward(const FlowPenalties<T>& p, const T* grads, T* grad_flow, int threads) {
    const Pieces pieces = pieces_of(p.size);
    const Backward<T> b{p, pieces, grads, grad_flow};
    const Index elements = p.batch * p.ranks * p.size[0] * p.size[1] * p.size[2];
    parallel_tasks(p.batch * pieces.tasks, elements < smallest_parallel ? 1 : threads, run_backward<T>, &b);
}

}  // namespace

void flow_penalties(const FlowPenalties<float>& p, float* values, int threads) { forward(p, values, threads); }
void flow_penalties(const FlowPenalties<double>& p, double* values, int threads) { forward(p, values, threads); }
void flow_penalties_backward(const FlowPenalties<float>& p, const float* grads, float* grad_flow, int threads) {
    backward(p, grads, grad_flow, threads);
}
void flow_penalties_backward(const FlowPenalties<double>& p, const double* grads, double* grad_flow, int threads) {
    backward(p, grads, grad_flow, threads);
}

PK_ISA_END
