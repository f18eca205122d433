// How a trajectory is divided into blocks of samples, and where everything lies: mlp_odeint.cpp makes it, the kernel units
// follow it. Offsets and sizes in elements.
#pragma once

#include <cstdint>

namespace pk {

struct SampleBlock {
    std::int64_t begin, count;  // in the order of the plan
    std::int64_t group;
};

struct LayerPlan {
    std::int64_t in, out;
    // In a record: its input, and act of its output; the last one's output is not there.
    std::int64_t input_at, output_at;
    std::int64_t argument_at;    // in a record: the output before the activation, or -1 where not needed
    std::int64_t delta_at;       // in a delta record: the gradient of the output before the activation
    std::int64_t transposed_at;  // in a transposed record: the input, a row for each sample
    std::int64_t forward_at, bias_at, backward_at;  // in the packed weights of a set
    std::int64_t grad_weight_at, grad_bias_at;      // in the gradients of a set
    bool split_forward, split_backward;             // whether sums are split, see common/product.hpp
};

struct NetworkPlan {
    const LayerPlan* layer;
    std::int64_t layers, sets;
    std::int64_t packed_at, packed_set;  // all sets, and of one set
    std::int64_t grad_at, grad_set, grad_slope_at;
};

// One evaluation of the field is a record: the input of the networks, their hidden layers, and the stage k.
struct MLPPlan {
    bool rows;           // how blocks lie, see mlp_odeint.hpp
    std::int64_t width;  // samples in memory for each block
    int lanes, vectors;  // vectors across the width where blocks lie in lanes
    const SampleBlock* blocks;
    std::int64_t n_blocks;
    const std::int64_t* order;  // of the samples, or null for their own
    int tasks;
    const NetworkPlan* networks;
    int n_networks;
    std::int64_t inputs;                      // of the networks: dim + control_dim + time
    std::int64_t steps, segment, segments;    // all sub-steps, those that the tape holds at once, and how often that is
    bool whole_tape;                          // the tape holds all records; or else the states that begin the segments
    std::int64_t tape_block;                  // elements of the tape for each block
    std::int64_t record, stage_at, state_at;  // of a record: size, the stage k, and the state before the input map
    std::int64_t delta_record, transposed_record, chunk;  // chunk: evaluations whose weight gradients are added at once
    std::int64_t packed, gradients;                       // sizes, all networks and sets
    std::int64_t widest;                                  // of all layers, in elements of a block
};

}  // namespace pk
