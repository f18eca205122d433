// Backward of a causal convolution whose output goes through the maximum over time (Pool in causal_conv.hpp).
//
// The gradient of a maximum is zero but at one time per sample and channel. Where the dense backward multiplies whole
// series, this one touches B * O * K columns: cost 4 B O C K flops, whatever the length, and zeros for the rest of grad_x.
#pragma once

#include <cstdint>

#include "causal_conv/causal_conv.hpp"

namespace pk {

// Gradients of a causal convolution without activation or groups, whose output gradient is dz[b,o] at time[b,o] and zero elsewhere.
template <class T>
struct CausalConvBackwardAt {
    ConvShape shape;
    const T* dz;               // (B, O)
    const std::int64_t* time;  // (B, O), inside the sequence
    View3<const T> x;
    const T* weight;    // (O, C, K)
    const Span* spans;  // (B) or null; times count from the start of a span
    View3<T> grad_x;    // time_stride 1, or data null
    T* grad_weight;     // (O, C, K) or null
    int threads;
};

void causal_conv_backward_at(const CausalConvBackwardAt<float>&);
void causal_conv_backward_at(const CausalConvBackwardAt<double>&);

#define PK_DECLARE(isa)                                                \
    namespace isa {                                                    \
    void causal_conv_backward_at(const CausalConvBackwardAt<float>&);  \
    void causal_conv_backward_at(const CausalConvBackwardAt<double>&); \
    }
PK_FOR_EACH_ISA(PK_DECLARE)
#undef PK_DECLARE

}  // namespace pk
