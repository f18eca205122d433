// Causal convolutions one sample at a time: a ring buffer holds the past of each, and a step computes one column.
//
//   y[b,o] = act(bias[o] + sum_{j,c} weight[o,c,K-1-j] x[b,c,t-j*dilation] + ...) as in causal_conv.hpp, at one t
//
// The sums have the order of the kernels for whole series, so that the results have the same bits. Cost: 2 O C K flops per
// sample and step, and one pass over the weights for up to four samples.
#pragma once

#include <cstdint>

#include "causal_conv/causal_conv.hpp"
#include "common/isa.hpp"

namespace pk {

// Weights as [group][tap j][in channel][out channel], the last one padded with zeros to whole multiples of `stream_lanes`; for a
// depthwise convolution as [tap j][channel].
constexpr std::int64_t stream_lanes = 16;

template <class T>
struct StepConv {
    std::int64_t in_channels, out_channels, kernel_size, dilation, groups;
    const T* packed;
    const T* bias;  // (O) or null
    Activation activation;
    T negative_slope;
    bool residual_before_activation;
    T* ring;  // (B, (K-1) dilation, C): time t lies in row t mod (K-1) dilation; null if that is 0
};

// One step of one convolution: time t, samples x (B, C), residual and y (B, O), all with a channel stride of 1.
template <class T>
struct Step {
    StepConv<T> conv;
    std::int64_t batch, time;
    const T* x;
    std::int64_t x_stride;
    const T* residual;  // or null
    std::int64_t residual_stride;
    T* y;
    std::int64_t y_stride;
    int threads;
};

// A layer of a network. `input`, `residual` (or -1) and `output` number columns of channels; column 0 is the sample.
template <class T>
struct StreamLayer {
    StepConv<T> conv;
    int input, residual, output;
};

// `steps` steps of a network from time `time` on, whose last column goes through a running maximum over time and, after the
// last step, through the layer `head`.
template <class T>
struct Stream {
    const StreamLayer<T>* layers;
    int layer_count, column_count;
    std::int64_t widest;  // channels of a column at most
    StreamLayer<T> head;
    std::int64_t batch, time, steps;
    const T* x;  // (B, C, steps), any strides
    std::int64_t x_batch_stride, x_channel_stride, x_time_stride;
    T* maximum;   // (B, channels of the last column), minus infinity at time 0
    T* features;  // (B, channels of the head)
    int threads;
};

void causal_conv_step(const Step<float>&);
void causal_conv_step(const Step<double>&);
void causal_conv_stream(const Stream<float>&);
void causal_conv_stream(const Stream<double>&);

#define PK_DECLARE(isa)                             \
    namespace isa {                                 \
    void causal_conv_step(const Step<float>&);      \
    void causal_conv_step(const Step<double>&);     \
    void causal_conv_stream(const Stream<float>&);  \
    void causal_conv_stream(const Stream<double>&); \
    }
PK_FOR_EACH_ISA(PK_DECLARE)
#undef PK_DECLARE

}  // namespace pk
