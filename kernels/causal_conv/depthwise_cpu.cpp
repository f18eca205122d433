// Depthwise causal convolution on the CPU: every channel is filtered on its own, so that memory is the limit and each row
// is read and written once.
//
//     x row  [ ............ x(t - 2d) ..... x(t - d) ..... x(t) .. ]    K shifted vectors in registers' reach
//
// The first (K-1) d outputs of a row, whose taps reach before its start, come from a short copy [ state | x ]. Backward:
// time is cut into blocks; dz of a block and of the (K-1) d samples behind it goes into a buffer, from which grad_x, the
// K sums of grad_weight and grad_bias are taken. Channels are shared between threads, sequences are summed in order.
//
// Cost: 2 K B C T flops forward, 4 K backward; forward reads x (and the residual) and writes y, backward reads grad_y, x
// and what was saved, and writes grad_x.

#include <cstddef>
#include <cstdint>

#include "causal_conv/activation.hpp"
#include "causal_conv/causal_conv.hpp"
#include "causal_conv/spans.hpp"
#include "common/arrays.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"

PK_ISA_BEGIN
namespace {

constexpr Index chunk_terms = 64;          // products in one chain of additions
constexpr Index block_columns = 4096;      // backward: columns whose dz is kept
constexpr Index activation_columns = 512;  // values between convolution and activation
constexpr Index task_elements = 16384;     // of x, in one task
constexpr Index parallel_elements = 32768;

struct Shares {
    Index channels, tasks;  // channels in a task
    int workers;
};

Shares share_channels(const ConvShape& s, const Span* spans, int threads) {
    const Index total = total_length(s, spans);
    const int workers = total * s.in_channels < parallel_elements ? 1 : usable_threads(threads);
    const Index wanted = max(1, task_elements / max(1, total));
    const Index channels = max(1, min(wanted, divide_up(s.in_channels, 4 * workers)));
    return {channels, divide_up(s.in_channels, channels), workers};
}

// out[i] = bias + sum_j w[j] in[i - j * step] for i in [0, n); step may be negative.
template <class T, int columns>
PK_INLINE void filter_vectors(T* out, const T* in, const T* w, Index taps, Index step, Vec<T> bias, int last) {
    constexpr int lanes = Vec<T>::lanes;
    Vec<T> total[columns];
#pragma GCC unroll 8
    for (int v = 0; v < columns; ++v) total[v] = bias;
    for (Index j = 0; j < taps;) {
        Vec<T> sum[columns];
#pragma GCC unroll 8
        for (int v = 0; v < columns; ++v) sum[v] = Vec<T>(T(0));
        for (const Index end = min(taps, j + chunk_terms); j < end; ++j) {
            const Vec<T> wv(w[j]);
            const T* p = in - j * step;
#pragma GCC unroll 8
            for (int v = 0; v < columns - 1; ++v) sum[v] = sum[v] + wv * Vec<T>::load(p + v * lanes);
            const T* end_of_row = p + (columns - 1) * lanes;
            sum[columns - 1] = sum[columns - 1] +
                               wv * (last == lanes ? Vec<T>::load(end_of_row) : Vec<T>::load_first(end_of_row, last));
        }
#pragma GCC unroll 8
        for (int v = 0; v < columns; ++v) total[v] = total[v] + sum[v];
    }
#pragma GCC unroll 8
    for (int v = 0; v < columns - 1; ++v) total[v].store(out + v * lanes);
    if (last == lanes)
        total[columns - 1].store(out + (columns - 1) * lanes);
    else
        total[columns - 1].store_first(out + (columns - 1) * lanes, last);
}

template <class T>
void filter(T* out, const T* in, const T* w, Index taps, Index step, T bias, Index n) {
    constexpr int lanes = Vec<T>::lanes;
    const Vec<T> b(bias);
    Index i = 0;
    for (; i + 4 * lanes <= n; i += 4 * lanes) filter_vectors<T, 4>(out + i, in + i, w, taps, step, b, lanes);
    for (; i < n; i += lanes)
        filter_vectors<T, 1>(out + i, in + i, w, taps, step, b, static_cast<int>(min(lanes, n - i)));
}

// Weights of a channel, newest tap first.
template <class T>
PK_INLINE void reverse(T* out, const T* weight, Index taps, Index kernel_size) {
    for (Index j = 0; j < taps; ++j) out[j] = weight[kernel_size - 1 - j];
}

template <class T>
struct ForwardTask {
    const CausalConvForward<T>& p;
    Index channels;
    T* memory;  // per worker: weights of a channel, then [ state | x ]
    Index memory_stride;

    void finish(T* y, T* saved, const T* residual, Index n) const {
        finish_row(y, saved, residual, n, p.activation, p.negative_slope, p.residual_before_activation);
    }

    void operator()(Index task, int worker) const {
        const ConvShape& s = p.shape;
        T* w = memory + worker * memory_stride;
        T* buffer = w + aligned<T>(s.kernel_size);
        const Index reach = (s.kernel_size - 1) * s.dilation;
        const bool plain = p.activation == Activation::none && p.residual.data == nullptr && p.saved == nullptr;
        for (Index c = task * channels; c < min(s.in_channels, (task + 1) * channels); ++c) {
            reverse(w, p.weight + c * s.kernel_size, s.kernel_size, s.kernel_size);
            const T bias = p.bias == nullptr ? T(0) : p.bias[c];
            for (Index b = 0; b < s.batch; ++b) {
                const Index begin = begin_of(p.spans, b);
                const Index length = length_of(s, p.spans, b);
                const T* x = p.x.data + b * p.x.batch_stride + c * p.x.channel_stride + begin;
                const Index offset = b * p.y.batch_stride + c * p.y.channel_stride + begin;
                T* y = p.y.data + offset;
                T* saved = p.saved == nullptr ? nullptr : p.saved + offset;
                const T* residual = p.residual.data == nullptr ? nullptr
                                                               : p.residual.data + b * p.residual.batch_stride +
                                                                     c * p.residual.channel_stride + begin;
                // Outputs that see the time before the start. Without a state, taps that see nothing else are left out.
                const Index early = min(length, reach);
                const Index live = p.state.data != nullptr || early == 0
                                       ? s.kernel_size
                                       : min(s.kernel_size, (early - 1) / s.dilation + 1);
                const Index past = (live - 1) * s.dilation;
                if (early > 0) {
                    if (p.state.data == nullptr)
                        clear(buffer, past);
                    else
                        copy(buffer, p.state.data + b * p.state.batch_stride + c * p.state.channel_stride, past);
                    copy(buffer + past, x, early);
                    filter(y, buffer + past, w, live, s.dilation, bias, early);
                    if (!plain) finish(y, saved, residual, early);
                }
                for (Index t = early; t < length;) {
                    const Index n = plain ? length - t : min(activation_columns, length - t);
                    filter(y + t, x + t, w, s.kernel_size, s.dilation, bias, n);
                    if (!plain)
                        finish(y + t, saved == nullptr ? nullptr : saved + t,
                               residual == nullptr ? nullptr : residual + t, n);
                    t += n;
                }
            }
        }
    }

    static void run(const void* task, Index i, int worker) { (*static_cast<const ForwardTask*>(task))(i, worker); }
};

template <class T>
void forward(const CausalConvForward<T>& p) {
    const ConvShape& s = p.shape;
    if (s.batch == 0 || s.length == 0) return;
    const Shares shares = share_channels(s, p.spans, p.threads);
    const Index early = min(s.length, (s.kernel_size - 1) * s.dilation);
    const Index past = p.state.data != nullptr ? (s.kernel_size - 1) * s.dilation : early;
    const Index stride = aligned<T>(s.kernel_size) + aligned<T>(past + early + Vec<T>::lanes);
    const Scratch scratch(static_cast<std::size_t>(shares.workers * stride) * sizeof(T));
    const ForwardTask<T> task{p, shares.channels, static_cast<T*>(scratch.data()), stride};
    parallel_tasks(shares.tasks, shares.workers, ForwardTask<T>::run, &task);
}

// sum_i a[i] b[i], or of a alone if b is null.
template <class T>
T dot(const T* a, const T* b, Index n) {
    constexpr int lanes = Vec<T>::lanes;
    Vec<T> total(T(0));
    Index i = 0;
    while (i + lanes <= n) {
        Vec<T> sum[4] = {Vec<T>(T(0)), Vec<T>(T(0)), Vec<T>(T(0)), Vec<T>(T(0))};
        const auto term = [&](Index at) {
            return b == nullptr ? Vec<T>::load(a + at) : Vec<T>::load(a + at) * Vec<T>::load(b + at);
        };
        const Index end = min(n, i + 4 * chunk_terms * lanes);
        for (; i + 4 * lanes <= end; i += 4 * lanes)
#pragma GCC unroll 8
            for (int v = 0; v < 4; ++v) sum[v] = sum[v] + term(i + v * lanes);
        for (; i + lanes <= end; i += lanes) sum[0] = sum[0] + term(i);
        total = total + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        const Vec<T> last = Vec<T>::load_first(a + i, rest);
        total = total + (b == nullptr ? last : last * Vec<T>::load_first(b + i, rest));
    }
    T folded[folded_lanes<T>];
    store_folded(folded, total);
    T sum = folded[0] + folded[1];
    if constexpr (folded_lanes<T> == 4) sum += folded[2] + folded[3];
    return sum;
}

template <class T>
struct BackwardTask {
    const CausalConvBackward<T>& p;
    Index channels;
    T* memory;  // per worker: weights of a channel, sums of its taps, dz
    Index memory_stride;

    void fill_dz(T* out, Index b, Index c, Index time, Index count) const {
        constexpr int lanes = Vec<T>::lanes;
        const View3<const T>&g = p.grad_y, &saved = p.activation == Activation::none ? p.grad_y : p.saved;
        const T* gp = g.data + b * g.batch_stride + c * g.channel_stride + time * g.time_stride;
        const T* sp = saved.data + b * saved.batch_stride + c * saved.channel_stride + time * saved.time_stride;
        const Vec<T> slope(p.negative_slope);
        for (Index i = 0; i < count; i += lanes) {
            const int n = static_cast<int>(min(lanes, count - i));
            activate_backward(load_strided(gp + i * g.time_stride, g.time_stride, n),
                              load_strided(sp + i * saved.time_stride, saved.time_stride, n), p.activation, slope)
                .store_first(out + i, n);
        }
    }

    void operator()(Index task, int worker) const {
        const ConvShape& s = p.shape;
        const Index taps = s.kernel_size;
        T* w = memory + worker * memory_stride;
        T* sums = w + aligned<T>(taps);
        T* dz = sums + aligned<T>(taps);
        for (Index c = task * channels; c < min(s.in_channels, (task + 1) * channels); ++c) {
            reverse(w, p.weight + c * taps, taps, taps);
            clear(sums, taps);
            T bias_sum(0);
            for (Index b = 0; b < s.batch; ++b) {
                const Index begin = begin_of(p.spans, b);
                const Index length = length_of(s, p.spans, b);
                const T* x = p.x.data + b * p.x.batch_stride + c * p.x.channel_stride + begin;
                for (Index t0 = 0; t0 < length; t0 += block_columns) {
                    const Index n = min(block_columns, length - t0);
                    const Index live = min(taps, (length - 1 - t0) / s.dilation + 1);  // of grad_x
                    const Index reach = p.grad_x.data == nullptr ? n : n + (live - 1) * s.dilation;
                    const Index known = min(reach, length - t0);
                    fill_dz(dz, b, c, begin + t0, known);
                    clear(dz + known, reach - known);
                    if (p.grad_x.data != nullptr) {
                        T* out = p.grad_x.data + b * p.grad_x.batch_stride + c * p.grad_x.channel_stride + begin + t0;
                        filter(out, dz, w, live, -s.dilation, T(0), n);
                        if (p.addend.data != nullptr)
                            add_scaled(
                                out, T(1),
                                p.addend.data + b * p.addend.batch_stride + c * p.addend.channel_stride + begin + t0,
                                n);
                    }
                    for (Index j = 0; p.grad_weight != nullptr && j < taps; ++j) {
                        const Index skipped = max(0, j * s.dilation - t0);  // columns before the first that tap j sees
                        if (skipped >= n) break;
                        sums[j] += dot(dz + skipped, x + t0 + skipped - j * s.dilation, n - skipped);
                    }
                    if (p.grad_bias != nullptr) bias_sum += dot<T>(dz, nullptr, n);
                }
            }
            if (p.grad_weight != nullptr) reverse(p.grad_weight + c * taps, sums, taps, taps);
            if (p.grad_bias != nullptr) p.grad_bias[c] = bias_sum;
        }
    }

    static void run(const void* task, Index i, int worker) { (*static_cast<const BackwardTask*>(task))(i, worker); }
};

template <class T>
void backward(const CausalConvBackward<T>& p) {
    const ConvShape& s = p.shape;
    const Shares shares = share_channels(s, p.spans, p.threads);
    const Index reach = min(s.length, block_columns) + min(max(s.length - 1, 0), (s.kernel_size - 1) * s.dilation);
    const Index stride = 2 * aligned<T>(s.kernel_size) + aligned<T>(reach + Vec<T>::lanes);
    const Scratch scratch(static_cast<std::size_t>(shares.workers * stride) * sizeof(T));
    const BackwardTask<T> task{p, shares.channels, static_cast<T*>(scratch.data()), stride};
    parallel_tasks(shares.tasks, shares.workers, BackwardTask<T>::run, &task);
}

}  // namespace

void depthwise_forward(const CausalConvForward<float>& p) { forward(p); }
void depthwise_forward(const CausalConvForward<double>& p) { forward(p); }
void depthwise_backward(const CausalConvBackward<float>& p) { backward(p); }
void depthwise_backward(const CausalConvBackward<double>& p) { backward(p); }

PK_ISA_END
