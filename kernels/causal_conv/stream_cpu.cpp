// One column per layer and sample. Output channels lie along vectors, and up to four samples share each vector of weights:
//
//     y(samples b, channels o) += x_j(b, c) * w[j][c](o)    for taps j from the newest on, channels c
//
// Samples do not see each other, so that threads take some each through all layers without waiting for one another.

#include <cstddef>
#include <cstdint>

#include "causal_conv/activation.hpp"
#include "causal_conv/stream.hpp"
#include "common/arrays.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"

PK_ISA_BEGIN
namespace {

constexpr Index chunk_terms = 64;  // products in one chain of additions, as in causal_conv_cpu.cpp
constexpr Index together = 4;      // samples that share a vector of weights
constexpr double parallel_flops = 200e3;

template <class T>
PK_INLINE Index past_of(const StepConv<T>& conv) {
    return (conv.kernel_size - 1) * conv.dilation;
}

// Where tap j finds its column: the sample itself, or a row of the ring.
template <class T>
PK_INLINE const T* column_of(const StepConv<T>& conv, const T* x, Index sample, Index time, Index j) {
    if (j == 0) return x;
    const Index past = past_of(conv);
    const Index row = (time + past - j * conv.dilation) % past;
    return conv.ring + (sample * past + row) * conv.in_channels;
}

template <int n>
struct Count {
    static constexpr int value = n;
};

// `vectors` vectors of output channels of `samples` samples. x and y lie `x_stride` and `y_stride` apart.
template <class T, int samples, int vectors>
PK_INLINE void multiply(const StepConv<T>& conv, const T* w, Index w_stride, const T* bias, int last, const T* x,
                        Index x_stride, Index first_sample, Index time, Index channels, Index first_channel, T* y,
                        Index y_stride) {
    constexpr int lanes = Vec<T>::lanes;
    const Vec<T> zero(T(0));
    Vec<T> total[samples][vectors], sum[samples][vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
        const Vec<T> start = bias == nullptr    ? zero
                             : v + 1 == vectors ? Vec<T>::load_first(bias + v * lanes, last)
                                                : Vec<T>::load(bias + v * lanes);
#pragma GCC unroll 8
        for (int b = 0; b < samples; ++b) {
            total[b][v] = start;
            sum[b][v] = zero;
        }
    }
    Index terms = 0;
    for (Index j = 0; j < conv.kernel_size; ++j) {
        const T* columns[samples];
#pragma GCC unroll 8
        for (int b = 0; b < samples; ++b)
            columns[b] = column_of(conv, x + b * x_stride, first_sample + b, time, j) + first_channel;
        for (Index c = 0; c < channels;) {
            const Index end = min(channels, c + chunk_terms);
            if (terms + end - c > chunk_terms) {
#pragma GCC unroll 8
                for (int b = 0; b < samples; ++b)
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; ++v) {
                        total[b][v] = total[b][v] + sum[b][v];
                        sum[b][v] = zero;
                    }
                terms = 0;
            }
            terms += end - c;
            for (; c < end; ++c, w += w_stride) {
#pragma GCC unroll 8
                for (int b = 0; b < samples; ++b) {
                    const Vec<T> xv(columns[b][c]);
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; ++v) sum[b][v] = sum[b][v] + Vec<T>::load(w + v * lanes) * xv;
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int b = 0; b < samples; ++b)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
            const Vec<T> z = total[b][v] + sum[b][v];
            T* out = y + b * y_stride + v * lanes;
            if (v + 1 < vectors || last == lanes)
                z.store(out);
            else
                z.store_first(out, last);
        }
}

template <class T, int samples>
void multiply_dense(const StepConv<T>& conv, const T* x, Index x_stride, Index first_sample, Index time, T* y,
                    Index y_stride) {
    constexpr int lanes = Vec<T>::lanes;
    const Index channels = conv.in_channels / conv.groups, outputs = conv.out_channels / conv.groups;
    const Index w_stride = divide_up(outputs, stream_lanes) * stream_lanes;
    for (Index g = 0; g < conv.groups; ++g) {
        const T* w = conv.packed + g * conv.kernel_size * channels * w_stride;
        for (Index o = 0; o < outputs;) {
            const Index left = outputs - o, at = g * outputs + o;
            const T* bias = conv.bias == nullptr ? nullptr : conv.bias + at;
            const auto run = [&](auto count) __attribute__((always_inline)) {
                constexpr int vectors = decltype(count)::value;
                const int last = static_cast<int>(min(lanes, left - (vectors - 1) * lanes));
                multiply<T, samples, vectors>(conv, w + o, w_stride, bias, last, x, x_stride, first_sample, time,
                                              channels, g * channels, y + at, y_stride);
                o += vectors * lanes;
            };
            if (left > 2 * lanes)
                run(Count<3>{});
            else if (left > lanes)
                run(Count<2>{});
            else
                run(Count<1>{});
        }
    }
}

template <class T>
void multiply_depthwise(const StepConv<T>& conv, const T* x, Index sample, Index time, T* y) {
    constexpr int lanes = Vec<T>::lanes;
    for (Index c = 0; c < conv.in_channels; c += lanes) {
        const int n = static_cast<int>(min(lanes, conv.in_channels - c));
        Vec<T> total = conv.bias == nullptr ? Vec<T>(T(0)) : Vec<T>::load_first(conv.bias + c, n);
        for (Index j = 0; j < conv.kernel_size;) {
            Vec<T> sum(T(0));
            for (const Index end = min(conv.kernel_size, j + chunk_terms); j < end; ++j)
                sum = sum + Vec<T>::load_first(conv.packed + j * conv.in_channels + c, n) *
                                Vec<T>::load_first(column_of(conv, x, sample, time, j) + c, n);
            total = total + sum;
        }
        total.store_first(y + c, n);
    }
}

// One convolution for `count` samples from `first` on; x, residual and y start at the first one.
template <class T>
void step(const StepConv<T>& conv, Index first, Index count, Index time, const T* x, Index x_stride, const T* residual,
          Index residual_stride, T* y, Index y_stride) {
    const bool depthwise = conv.groups > 1 && conv.groups == conv.in_channels && conv.groups == conv.out_channels;
    const Index past = past_of(conv);
    for (Index b = 0; b < count;) {
        if (!depthwise && count - b >= together) {
            multiply_dense<T, together>(conv, x + b * x_stride, x_stride, first + b, time, y + b * y_stride, y_stride);
            b += together;
            continue;
        }
        if (depthwise)
            multiply_depthwise(conv, x + b * x_stride, first + b, time, y + b * y_stride);
        else
            multiply_dense<T, 1>(conv, x + b * x_stride, x_stride, first + b, time, y + b * y_stride, y_stride);
        ++b;
    }
    for (Index b = 0; b < count; ++b) {
        finish_row<T>(y + b * y_stride, nullptr, residual == nullptr ? nullptr : residual + b * residual_stride,
                      conv.out_channels, conv.activation, conv.negative_slope, conv.residual_before_activation);
        if (past > 0)
            copy(conv.ring + ((first + b) * past + time % past) * conv.in_channels, x + b * x_stride, conv.in_channels);
    }
}

template <class T>
double flops_of(const StepConv<T>& conv) {
    return 2.0 * static_cast<double>(conv.out_channels) * static_cast<double>(conv.in_channels / conv.groups) *
           static_cast<double>(conv.kernel_size);
}

template <class T>
struct StepTask {
    const Step<T>& p;

    void operator()(Index task) const {
        const Index first = task * together, count = min(together, p.batch - first);
        const T* residual = p.residual == nullptr ? nullptr : p.residual + first * p.residual_stride;
        step(p.conv, first, count, p.time, p.x + first * p.x_stride, p.x_stride, residual, p.residual_stride,
             p.y + first * p.y_stride, p.y_stride);
    }
    static void run(const void* self, Index task, int) { (*static_cast<const StepTask*>(self))(task); }
};

template <class T>
void run_step(const Step<T>& p) {
    const double flops = flops_of(p.conv) * static_cast<double>(p.batch);
    const StepTask<T> task{p};
    parallel_tasks(divide_up(p.batch, together), flops < parallel_flops ? 1 : usable_threads(p.threads),
                   StepTask<T>::run, &task);
}

template <class T>
struct StreamTask {
    const Stream<T>& p;
    T* columns;  // per worker: (column, sample, channel)
    Index stride;

    void operator()(Index task, int worker) const {
        const Index first = task * together, count = min(together, p.batch - first);
        T* memory = columns + worker * stride;
        const auto column = [&](int i) { return memory + i * together * p.widest; };
        const Index channels = p.layers[0].conv.in_channels;
        const StepConv<T>& last = p.layers[p.layer_count - 1].conv;
        for (Index i = 0; i < p.steps; ++i) {
            for (Index b = 0; b < count; ++b) {
                const T* x = p.x + (first + b) * p.x_batch_stride + i * p.x_time_stride;
                for (Index c = 0; c < channels; ++c) column(0)[b * p.widest + c] = x[c * p.x_channel_stride];
            }
            for (int k = 0; k < p.layer_count; ++k) run_layer(p.layers[k], first, count, p.time + i, column);
            for (Index b = 0; b < count; ++b)
                take_maximum(p.maximum + (first + b) * last.out_channels,
                             column(p.layers[p.layer_count - 1].output) + b * p.widest, last.out_channels);
        }
        step<T>(p.head.conv, first, count, 0, p.maximum + first * last.out_channels, last.out_channels, nullptr, 0,
                p.features + first * p.head.conv.out_channels, p.head.conv.out_channels);
    }

    template <class Column>
    void run_layer(const StreamLayer<T>& layer, Index first, Index count, Index time, const Column& column) const {
        step<T>(layer.conv, first, count, time, column(layer.input), p.widest,
                layer.residual < 0 ? nullptr : column(layer.residual), p.widest, column(layer.output), p.widest);
    }

    // NaN wins and stays.
    static void take_maximum(T* maximum, const T* y, Index n) {
        constexpr int lanes = Vec<T>::lanes;
        for (Index i = 0; i < n; i += lanes) {
            const int count = static_cast<int>(min(lanes, n - i));
            const Vec<T> old = Vec<T>::load_first(maximum + i, count), value = Vec<T>::load_first(y + i, count);
            const Vec<T> larger = select_le(value, old, old, value);
            select_le(old, old, larger, old).store_first(maximum + i, count);
        }
    }

    static void run(const void* self, Index task, int worker) { (*static_cast<const StreamTask*>(self))(task, worker); }
};

template <class T>
void run_stream(const Stream<T>& p) {
    double flops = flops_of(p.head.conv);
    for (int k = 0; k < p.layer_count; ++k) flops += flops_of(p.layers[k].conv) * static_cast<double>(p.steps);
    const bool parallel = p.batch > together && flops * static_cast<double>(p.batch) > parallel_flops;
    const int workers = parallel ? usable_threads(p.threads) : 1;
    const Index stride = aligned<T>(p.column_count * together * p.widest);
    const Scratch scratch(static_cast<std::size_t>(workers * stride) * sizeof(T));
    const StreamTask<T> task{p, static_cast<T*>(scratch.data()), stride};
    parallel_tasks(divide_up(p.batch, together), workers, StreamTask<T>::run, &task);
}

}  // namespace

void causal_conv_step(const Step<float>& p) { run_step(p); }
void causal_conv_step(const Step<double>& p) { run_step(p); }
void causal_conv_stream(const Stream<float>& p) { run_stream(p); }
void causal_conv_stream(const Stream<double>& p) { run_stream(p); }

PK_ISA_END
