#include <cstdint>

#include "causal_conv/weight_norm.hpp"
#include "common/arrays.hpp"
#include "common/math.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"

PK_ISA_BEGIN
namespace {

// <a, b> over n elements.
template <class T>
T dot(const T* a, const T* b, Index n) {
    constexpr int lanes = Vec<T>::lanes;
    Vec<T> total(T(0));
    Index i = 0;
    for (; i + lanes <= n; i += lanes) total = total + Vec<T>::load(a + i) * Vec<T>::load(b + i);
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        total = total + Vec<T>::load_first(a + i, rest) * Vec<T>::load_first(b + i, rest);
    }
    T folded[folded_lanes<T>], sum = T(0);
    store_folded(folded, total);
    for (T lane : folded) sum += lane;
    return sum;
}

// out = alpha a + beta b over n elements.
template <class T>
void combine(T* out, T alpha, const T* a, T beta, const T* b, Index n) {
    constexpr int lanes = Vec<T>::lanes;
    const Vec<T> va(alpha), vb(beta);
    Index i = 0;
    for (; i + lanes <= n; i += lanes) (va * Vec<T>::load(a + i) + vb * Vec<T>::load(b + i)).store(out + i);
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        (va * Vec<T>::load_first(a + i, rest) + vb * Vec<T>::load_first(b + i, rest)).store_first(out + i, rest);
    }
}

template <class T>
void run_forward(const void* weights, Index index, int) {
    const WeightNormForward<T>& p = static_cast<const WeightNormForward<T>*>(weights)[index];
    for (Index row = 0; row < p.rows; ++row) {
        const T* v = p.v + row * p.columns;
        combine(p.w + row * p.columns, p.g[row] / sqrt(dot(v, v, p.columns)), v, T(0), v, p.columns);
    }
}

template <class T>
void run_backward(const void* weights, Index index, int) {
    const WeightNormBackward<T>& p = static_cast<const WeightNormBackward<T>*>(weights)[index];
    for (Index row = 0; row < p.rows; ++row) {
        const T *v = p.v + row * p.columns, *grad_w = p.grad_w + row * p.columns;
        const T square = dot(v, v, p.columns), projection = dot(grad_w, v, p.columns);
        const T norm = sqrt(square), scale = p.g[row] / norm;
        p.grad_g[row] = projection / norm;
        combine(p.grad_v + row * p.columns, scale, grad_w, -scale * (projection / square), v, p.columns);
    }
}

}  // namespace

void weight_norm_forward(const WeightNormForward<float>* weights, Index count, int threads) {
    parallel_tasks(count, threads, run_forward<float>, weights);
}
void weight_norm_forward(const WeightNormForward<double>* weights, Index count, int threads) {
    parallel_tasks(count, threads, run_forward<double>, weights);
}
void weight_norm_backward(const WeightNormBackward<float>* weights, Index count, int threads) {
    parallel_tasks(count, threads, run_backward<float>, weights);
}
void weight_norm_backward(const WeightNormBackward<double>* weights, Index count, int threads) {
    parallel_tasks(count, threads, run_backward<double>, weights);
}

PK_ISA_END
