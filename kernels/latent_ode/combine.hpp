// Stage combinations of Runge-Kutta methods in one pass over memory, and their gradient.
//
//   forward    out = y + (c_0 k_0 + c_1 k_1 + ...)       the sum first, rounded once at the size of y
//   backward   grad_k_j = c_j grad_out, for all j         (that of y is grad_out itself)
//
// Arrays are contiguous, n elements each. With m stages the forward moves m + 2 arrays, the backward m + 1; a chain of
// operations on tensors moves 3 m and 2 m.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace pk {

template <class T>
struct Combine {
    const T* y;
    const T* const* k;  // `terms` arrays
    const T* c;         // (terms)
    T* out;
    std::int64_t terms, n;
};

template <class T>
struct CombineBackward {
    const T* grad;
    const T* c;        // (terms)
    T* const* grad_k;  // `terms` arrays
    std::int64_t terms, n;
};

void combine(const Combine<float>& p, int threads);
void combine(const Combine<double>& p, int threads);
void combine_backward(const CombineBackward<float>& p, int threads);
void combine_backward(const CombineBackward<double>& p, int threads);

#define PK_DECLARE(isa)                                                 \
    namespace isa {                                                     \
    void combine(const Combine<float>&, int threads);                   \
    void combine(const Combine<double>&, int threads);                  \
    void combine_backward(const CombineBackward<float>&, int threads);  \
    void combine_backward(const CombineBackward<double>&, int threads); \
    }
PK_FOR_EACH_ISA(PK_DECLARE)
#undef PK_DECLARE

}  // namespace pk
