// Backward of a causal convolution whose output goes through the maximum over time (Pool in causal_conv.hpp).
//
// The gradient of a maximum is zero but at one time per sample and channel. Where the dense backward multiplies whole
// series, this one touches B * O * K columns: cost 4 B O C K flops, whatever the length, and zeros for the rest of grad_x.
#pragma once

#include <cstdint>

#include "causal_conv/causal_conv.hpp"

namespace pk {

// Gradients of a causal convolution without activation, whose output gradient is dz[b,o] at time[b,o] and zero elsewhere.
template <class T>
struct CausalConvBackwardAt {
    ConvShape shape;
    const T* dz;               // (B, O)
    const std::int64_t* time;  // (B, O), in [0, length)
    View3<const T> x;
    const T* weight;  // (O, C, K)
    T* grad_x;        // (B, C, T) contiguous or null
    T* grad_weight;   // (O, C, K) or null
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
