// Penalties of a motion field w, and their gradient, each in one pass over memory.
//
//   forward    value = mean over pixels of (a (div w)^2 + b |w|^2 + c |grad w|^2)
//   backward   grad_w = grad_value 2 / pixels (a div^T div + b + c grad^T grad) w
//
// A difference along an axis of n pixels is (D f)(i) = f(k + 1) - f(k) with k = min(i, n - 2), and 0 where n is 1. Its
// transpose, where pixel n - 1 shares the difference of pixel n - 2:
//
//   (D^T f)(i) = f(i - 1) - f(i)              0 <= i < n - 2, without f(-1)
//   (D^T f)(n - 2) = f(n - 3) - f(n - 2) - f(n - 1)
//   (D^T f)(n - 1) = f(n - 2) + f(n - 1)
//
// A task is a chunk of a sample, whose size depends on the image alone: pieces of rows. The forward has the differences of a
// vector of pixels in registers; the backward goes through a piece once for each term, in the first-level cache. Sums are
// kept in double for each chunk and added in order, so that the bits depend on no number of threads. Moves R arrays of
// pixels forward, 2 R backward, and makes 3 R + 3 operations for each number forward and 6 R + 2 backward.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace pk {

// One to three axes are the last ones of three, the first ones being of one pixel.
template <class T>
struct FlowPenalties {
    const T* flow;  // (batch, ranks, size[0], size[1], size[2])
    std::int64_t batch, ranks, size[3];
    int channel[3];  // of the component along each axis; -1 for those that are not there
    double divergence, magnitude, smoothness;
};

template <class T>
void flow_penalties(const FlowPenalties<T>& p, T* values, int threads);  // (batch)
template <class T>
void flow_penalties_backward(const FlowPenalties<T>& p, const T* grads, T* grad_flow, int threads);  // (batch), as flow

#define PK_DECLARE(isa)                                                                              \
    namespace isa {                                                                                  \
    void flow_penalties(const FlowPenalties<float>&, float*, int threads);                           \
    void flow_penalties(const FlowPenalties<double>&, double*, int threads);                         \
    void flow_penalties_backward(const FlowPenalties<float>&, const float*, float*, int threads);    \
    void flow_penalties_backward(const FlowPenalties<double>&, const double*, double*, int threads); \
    }
PK_FOR_EACH_ISA(PK_DECLARE)
#undef PK_DECLARE

}  // namespace pk
