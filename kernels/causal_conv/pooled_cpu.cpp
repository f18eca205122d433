// Per sample, the columns of x that the maxima have seen are gathered into rows, so that the products run over channels:
//
//     seen  row i  [ x(., t_i) ]   C     t_1 < t_2 < ... the times time[b,o] - j*dilation, each once
//     grad  row i  [ grad_x(., t_i) ]
//
// and the rows of grad are scattered into the zeroed grad_x. Samples form chunks, each with its own partial grad_weight;
// their number depends on the batch alone.

#include <cstddef>
#include <cstdint>

#include "causal_conv/pooled.hpp"
#include "causal_conv/spans.hpp"
#include "common/arrays.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"

PK_ISA_BEGIN
namespace {

constexpr Index max_chunks = 4;  // of samples: each needs a partial grad_weight, which costs as much as the products
constexpr Index parallel_elements = 20000;

template <class T>
struct BackwardAt {
    const CausalConvBackwardAt<T>& p;
    Index taps;     // that can see data
    Index chunks;   // of samples
    Index most;     // columns that one sample's maxima can have seen
    const T* rows;  // weight as [out channel][tap][in channel]
    T* partial;     // per chunk, grad_weight in the same order
    T* buffers;     // per worker: seen and grad
    Index* times;   // per worker: row of each time (length), then the time of each row (most)

    Index partial_size() const { return p.shape.out_channels * taps * p.shape.in_channels; }

    void chunk(Index index, int worker) const {
        const ConvShape& s = p.shape;
        T* grad_weight = partial == nullptr ? nullptr : partial + index * partial_size();
        if (grad_weight != nullptr) clear(grad_weight, partial_size());
        T* seen = buffers + worker * 2 * most * s.in_channels;
        T* grad = seen + most * s.in_channels;
        Index* row_of = times + worker * (s.length + most);
        Index* time_of = row_of + s.length;
        for (Index b = index * s.batch / chunks; b < (index + 1) * s.batch / chunks; ++b) {
            const Index* time = p.time + b * s.out_channels;
            const T* dz = p.dz + b * s.out_channels;
            const Index begin = begin_of(p.spans, b);
            const Index length = length_of(s, p.spans, b);
            for (Index t = 0; t < length; ++t) row_of[t] = 0;
            for (Index o = 0; o < s.out_channels; ++o)
                for (Index j = 0, t = time[o]; j < taps && t >= 0; ++j, t -= s.dilation) row_of[t] = 1;
            Index count = 0;
            for (Index t = 0; t < length; ++t) {
                if (row_of[t] == 0) continue;
                row_of[t] = count;
                time_of[count++] = t;
            }
            if (grad_weight != nullptr) {
                for (Index c = 0; c < s.in_channels; ++c) {
                    const T* x = p.x.data + b * p.x.batch_stride + c * p.x.channel_stride + begin * p.x.time_stride;
                    for (Index i = 0; i < count; ++i) seen[i * s.in_channels + c] = x[time_of[i] * p.x.time_stride];
                }
            }
            clear(grad, count * s.in_channels);
            for (Index o = 0; o < s.out_channels; ++o) {
                for (Index j = 0, t = time[o]; j < taps && t >= 0; ++j, t -= s.dilation) {
                    const Index weight_row = (o * taps + j) * s.in_channels, row = row_of[t] * s.in_channels;
                    if (grad_weight != nullptr) add_scaled(grad_weight + weight_row, dz[o], seen + row, s.in_channels);
                    if (p.grad_x.data != nullptr) add_scaled(grad + row, dz[o], rows + weight_row, s.in_channels);
                }
            }
            if (p.grad_x.data == nullptr) continue;
            for (Index c = 0; c < s.in_channels; ++c) {
                T* out = p.grad_x.data + b * p.grad_x.batch_stride + c * p.grad_x.channel_stride + begin;
                clear(out, length);
                for (Index i = 0; i < count; ++i) out[time_of[i]] = grad[i * s.in_channels + c];
            }
        }
    }

    // Sums the partial gradients of one output channel, in the order of the chunks.
    void finish(Index o) const {
        const ConvShape& s = p.shape;
        T* total = partial + o * taps * s.in_channels;
        for (Index k = 1; k < chunks; ++k) add_scaled(total, T(1), total + k * partial_size(), taps * s.in_channels);
        for (Index c = 0; c < s.in_channels; ++c)
            for (Index j = 0; j < s.kernel_size; ++j)
                p.grad_weight[(o * s.in_channels + c) * s.kernel_size + (s.kernel_size - 1 - j)] =
                    j < taps ? total[j * s.in_channels + c] : T(0);
    }

    static void run_chunk(const void* self, Index i, int worker) {
        static_cast<const BackwardAt*>(self)->chunk(i, worker);
    }
    static void run_finish(const void* self, Index o, int) { static_cast<const BackwardAt*>(self)->finish(o); }
};

template <class T>
void backward_at(const CausalConvBackwardAt<T>& p) {
    const ConvShape& s = p.shape;
    const Index taps = s.length == 0 ? 0 : min(s.kernel_size, (s.length - 1) / s.dilation + 1);
    const Index weights = s.out_channels * s.in_channels;
    if (s.batch == 0 || taps == 0) {
        if (p.grad_weight != nullptr) clear(p.grad_weight, weights * s.kernel_size);
        return;
    }
    const int workers = s.batch * weights * taps < parallel_elements ? 1 : usable_threads(p.threads);
    const Index chunks = min(s.batch, max_chunks), most = min(s.length, s.out_channels * taps);
    const Index row_size = p.grad_x.data == nullptr ? 0 : aligned<T>(weights * taps);
    const Index partial_size = p.grad_weight == nullptr ? 0 : aligned<T>(chunks * weights * taps);
    const Index buffer_size = aligned<T>(workers * 2 * most * s.in_channels);
    const Scratch scratch(static_cast<std::size_t>(row_size + partial_size + buffer_size) * sizeof(T) +
                          static_cast<std::size_t>(workers * (s.length + most)) * sizeof(Index));
    T* rows = static_cast<T*>(scratch.data());
    for (Index o = 0; row_size > 0 && o < s.out_channels; ++o)
        for (Index j = 0; j < taps; ++j)
            for (Index c = 0; c < s.in_channels; ++c)
                rows[(o * taps + j) * s.in_channels + c] =
                    p.weight[(o * s.in_channels + c) * s.kernel_size + (s.kernel_size - 1 - j)];
    T* partial = rows + row_size;
    T* buffers = partial + partial_size;
    const BackwardAt<T> task{p,       taps,
                             chunks,  most,
                             rows,    p.grad_weight == nullptr ? nullptr : partial,
                             buffers, reinterpret_cast<Index*>(buffers + buffer_size)};
    parallel_tasks(chunks, workers, BackwardAt<T>::run_chunk, &task);
    if (p.grad_weight != nullptr) parallel_tasks(s.out_channels, workers, BackwardAt<T>::run_finish, &task);
}

}  // namespace

void causal_conv_backward_at(const CausalConvBackwardAt<float>& p) { backward_at(p); }
void causal_conv_backward_at(const CausalConvBackwardAt<double>& p) { backward_at(p); }

PK_ISA_END
