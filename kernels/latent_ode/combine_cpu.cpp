#include <cstdint>

#include "common/arrays.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"
#include "latent_ode/combine.hpp"

PK_ISA_BEGIN
namespace {

constexpr Index chunk = 16384;              // elements of a task
constexpr Index smallest_parallel = 65536;  // starting workers costs more than what is smaller

template <class T>
void run_combine(const void* parameters, Index task, int) {
    constexpr int lanes = Vec<T>::lanes;
    const Combine<T>& p = *static_cast<const Combine<T>*>(parameters);
    const Index end = min(p.n, (task + 1) * chunk);
    Index i = task * chunk;
    for (; i + lanes <= end; i += lanes) {
        Vec<T> sum = Vec<T>(p.c[0]) * Vec<T>::load(p.k[0] + i);
        for (Index j = 1; j < p.terms; ++j) sum = sum + Vec<T>(p.c[j]) * Vec<T>::load(p.k[j] + i);
        (Vec<T>::load(p.y + i) + sum).store(p.out + i);
    }
    if (i == end) return;
    const int rest = static_cast<int>(end - i);
    Vec<T> sum = Vec<T>(p.c[0]) * Vec<T>::load_first(p.k[0] + i, rest);
    for (Index j = 1; j < p.terms; ++j) sum = sum + Vec<T>(p.c[j]) * Vec<T>::load_first(p.k[j] + i, rest);
    (Vec<T>::load_first(p.y + i, rest) + sum).store_first(p.out + i, rest);
}

template <class T>
void run_combine_backward(const void* parameters, Index task, int) {
    constexpr int lanes = Vec<T>::lanes;
    const CombineBackward<T>& p = *static_cast<const CombineBackward<T>*>(parameters);
    const Index end = min(p.n, (task + 1) * chunk);
    Index i = task * chunk;
    for (; i + lanes <= end; i += lanes) {
        const Vec<T> grad = Vec<T>::load(p.grad + i);
        for (Index j = 0; j < p.terms; ++j) (Vec<T>(p.c[j]) * grad).store(p.grad_k[j] + i);
    }
    if (i == end) return;
    const int rest = static_cast<int>(end - i);
    const Vec<T> grad = Vec<T>::load_first(p.grad + i, rest);
    for (Index j = 0; j < p.terms; ++j) (Vec<T>(p.c[j]) * grad).store_first(p.grad_k[j] + i, rest);
}

template <class P>
void run(TaskBody body, const P& p, int threads) {
    parallel_tasks(divide_up(p.n, chunk), p.n < smallest_parallel ? 1 : threads, body, &p);
}

}  // namespace

void combine(const Combine<float>& p, int threads) { run(run_combine<float>, p, threads); }
void combine(const Combine<double>& p, int threads) { run(run_combine<double>, p, threads); }
void combine_backward(const CombineBackward<float>& p, int threads) { run(run_combine_backward<float>, p, threads); }
void combine_backward(const CombineBackward<double>& p, int threads) { run(run_combine_backward<double>, p, threads); }

PK_ISA_END
