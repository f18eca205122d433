// Dense dilated causal 1-D convolution with bias, activation and residual, forward and backward.
//
//   z[b,o,t] = bias[o] + sum_{c,j} weight[o,c,K-1-j] x[b,c,t-j*dilation],  x = 0 before t = 0
//   h = act(z),  y = h + residual
//
// Shapes: x (B, C, T), weight (O, C, K) contiguous, bias (O), residual, h and y (B, O, T). j counts taps backwards from
// the newest sample; tap j is dead for a stretch of time that ends at or before j*dilation, and is skipped there.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace pk {

enum class Activation : int { none, relu, leaky_relu, tanh };

// A (batch, channel, time) view of somebody else's memory; strides in elements, any sign or zero.
template <class T>
struct View3 {
    T* data;
    std::int64_t batch_stride, channel_stride, time_stride;
};

struct ConvShape {
    std::int64_t batch, in_channels, out_channels, length, kernel_size, dilation;
};

// The maximum of y over time, the first time it is reached (NaN wins), and h there; (B, O) each, h or all null.
template <class T>
struct Pool {
    T* value;
    std::int64_t* time;
    T* h;
};

template <class T>
struct CausalConvForward {
    ConvShape shape;
    View3<const T> x;
    const T* weight;
    const T* bias;            // (O) or null
    View3<const T> residual;  // time_stride 1, or data null
    T* y;                     // (B, O, T) contiguous, or null with a pool: y then stays in cache
    T* h;                     // (B, O, T) contiguous or null: act(z), where the backward cannot take it from y
    Pool<T> pool;             // or null
    Activation activation;
    T negative_slope;  // >= 0, of leaky_relu
    int threads;
};

template <class T>
struct CausalConvBackward {
    ConvShape shape;
    View3<const T> grad_y;
    View3<const T> h;  // ignored for Activation::none
    View3<const T> x;  // time_stride 1
    const T* weight;
    View3<const T> addend;  // (B, C, T), time_stride 1, added to grad_x, which it may be; or data null
    T* grad_x;              // (B, C, T) contiguous or null
    T* grad_weight;         // (O, C, K) contiguous or null
    T* grad_bias;           // (O) or null
    Activation activation;
    T negative_slope;
    int threads;
};

// Run on the active capability. Throw std::bad_alloc when scratch memory runs out.
void causal_conv_forward(const CausalConvForward<float>&);
void causal_conv_forward(const CausalConvForward<double>&);
void causal_conv_backward(const CausalConvBackward<float>&);
void causal_conv_backward(const CausalConvBackward<double>&);

#define PK_DECLARE(isa)                                           \
    namespace isa {                                               \
    void causal_conv_forward(const CausalConvForward<float>&);    \
    void causal_conv_forward(const CausalConvForward<double>&);   \
    void causal_conv_backward(const CausalConvBackward<float>&);  \
    void causal_conv_backward(const CausalConvBackward<double>&); \
    }
PK_FOR_EACH_ISA(PK_DECLARE)
#undef PK_DECLARE

}  // namespace pk
