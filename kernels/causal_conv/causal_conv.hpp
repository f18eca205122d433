// Dilated causal 1-D convolution with bias, activation and residual, forward and backward.
//
//   z[b,o,t] = bias[o] + sum_{c,j} weight[o,c,K-1-j] x[b,c,t-j*dilation],  x is the state, or 0, before t = 0
//   h = act(z),  y = h + residual;  or  h = y = act(z + residual)
//
// Shapes: x (B, C, T), weight (O, C / groups, K) contiguous, bias (O), residual, h and y (B, O, T); output channels of a
// group see the input channels of that group. j counts taps backwards from the newest sample; tap j is dead for a stretch
// of time that ends at or before j*dilation, and is skipped there.
//
// Sequences need not be equally long: the b-th one is then a span of time in a padded sample, or in the one sample that
// they are packed into, whose batch strides are 0.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace pk {

enum class Activation : int { none, relu, leaky_relu, tanh, silu, gelu };

// A (batch, channel, time) view of somebody else's memory; strides in elements, any sign or zero.
template <class T>
struct View3 {
    T* data;
    std::int64_t batch_stride, channel_stride, time_stride;
};

// Channels are those of all groups; `length` is that of the longest sequence.
struct ConvShape {
    std::int64_t batch, in_channels, out_channels, length, kernel_size, dilation, groups;
};

// Where a sequence lies in time.
struct Span {
    std::int64_t begin, length;
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
    View3<const T> state;     // (B, C, (K-1)*dilation), time_stride 1, or data null
    const Span* spans;        // (B) or null: every sequence takes all `length` samples
    View3<T> y;               // time_stride 1, or data null with a pool: y then stays in cache
    T* saved;                 // strides of y, or null: h, or its argument where act' needs that
    Pool<T> pool;             // or null; with groups and spans of length 0 null
    Activation activation;
    T negative_slope;  // >= 0, of leaky_relu
    bool residual_before_activation;
    int threads;
};

template <class T>
struct CausalConvBackward {
    ConvShape shape;
    View3<const T> grad_y;
    View3<const T> saved;  // of the forward; ignored for Activation::none
    View3<const T> x;      // time_stride 1
    const T* weight;
    const Span* spans;      // (B) or null
    View3<const T> addend;  // (B, C, T), time_stride 1, added to grad_x, which it may be; or data null
    View3<T> grad_x;        // time_stride 1, or data null
    T* grad_weight;         // (O, C, K) contiguous or null
    T* grad_bias;           // (O) or null
    Activation activation;
    T negative_slope;
    int threads;
};

// Run on the active capability. Nothing is written outside of the spans. Throw std::bad_alloc when memory runs out.
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
    void depthwise_forward(const CausalConvForward<float>&);      \
    void depthwise_forward(const CausalConvForward<double>&);     \
    void depthwise_backward(const CausalConvBackward<float>&);    \
    void depthwise_backward(const CausalConvBackward<double>&);   \
    }
PK_FOR_EACH_ISA(PK_DECLARE)
#undef PK_DECLARE

}  // namespace pk
