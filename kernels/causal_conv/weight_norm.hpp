// Weight normalisation of many weights in one call: w = g v / ||v||, the norm over each output channel, and its gradient.
//
//   grad_g = <grad_w, v> / ||v||,   grad_v = g / ||v|| (grad_w - v <grad_w, v> / ||v||^2)
//
// Cost: one pass over v and w forward, two over v and grad_w backward.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace pk {

template <class T>
struct WeightNormForward {
    const T *v, *g;  // (rows, columns) and (rows), contiguous
    T* w;            // (rows, columns)
    std::int64_t rows, columns;
};

template <class T>
struct WeightNormBackward {
    const T *v, *g, *grad_w;
    T *grad_v, *grad_g;
    std::int64_t rows, columns;
};

void weight_norm_forward(const WeightNormForward<float>* weights, std::int64_t count, int threads);
void weight_norm_forward(const WeightNormForward<double>* weights, std::int64_t count, int threads);
void weight_norm_backward(const WeightNormBackward<float>* weights, std::int64_t count, int threads);
void weight_norm_backward(const WeightNormBackward<double>* weights, std::int64_t count, int threads);

#define PK_DECLARE(isa)                                                                            \
    namespace isa {                                                                                \
    void weight_norm_forward(const WeightNormForward<float>*, std::int64_t count, int threads);    \
    void weight_norm_forward(const WeightNormForward<double>*, std::int64_t count, int threads);   \
    void weight_norm_backward(const WeightNormBackward<float>*, std::int64_t count, int threads);  \
    void weight_norm_backward(const WeightNormBackward<double>*, std::int64_t count, int threads); \
    }
PK_FOR_EACH_ISA(PK_DECLARE)
#undef PK_DECLARE

}  // namespace pk
