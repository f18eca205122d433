// Divides the samples into blocks, lays out the memory, and calls the kernels of the active capability.
#include "latent_ode/mlp_odeint.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/dispatch.hpp"
#include "common/parallel.hpp"
#include "latent_ode/mlp_odeint_cpu.hpp"
#include "latent_ode/plan.hpp"

namespace pk {
namespace {

using Index = std::int64_t;

// Evaluations times samples whose weight gradients are added at once: enough that sums are loaded and stored rarely.
constexpr Index chunk_samples = 128;
// Samples of a block that lies in rows, at most.
constexpr Index most_rows = 64;
// Products with at most so many rows of results split their sums, see common/product.hpp.
constexpr Index split_rows = 32;

Index divide_up(Index a, Index b) { return (a + b - 1) / b; }

// Whether act' needs the argument z, and does not follow from h = act(z).
bool argument_needed(FieldActivation a) {
    return a == FieldActivation::softplus || a == FieldActivation::silu || a == FieldActivation::sin;
}

template <class T>
class Planner {
public:
    explicit Planner(const MLPOdeint<T>& p) {
        int of_float = 0, of_double = 0, bytes = 0;
        PK_CALL_ACTIVE(mlp_odeint_lanes, (&of_float, &of_double));
        plan.lanes = sizeof(T) == 4 ? of_float : of_double;
        bytes = plan.lanes * static_cast<int>(sizeof(T));
        divide(p, bytes == 64 ? 4 : 2);
        lay_out(p);
        choose_segment(p);
        plan.whole_tape = plan.segment >= plan.steps;
        plan.segments = divide_up(plan.steps, plan.segment);
        plan.tape_block = plan.whole_tape ? plan.steps * p.method.stages * plan.record : plan.segments * extent(p.dim);
    }
    Planner(const Planner&) = delete;
    Planner& operator=(const Planner&) = delete;

    MLPPlan plan{};

private:
    // Blocks as wide as a tile where there are samples enough, so that each weight that is loaded serves many of them.
    void divide(const MLPOdeint<T>& p, Index tile_vectors) {
        const Index threads = std::max<Index>(1, usable_threads(p.threads));
        std::vector<Index> counts{p.batch};
        if (p.group != nullptr) {
            counts.assign(static_cast<std::size_t>(p.networks[1].sets), 0);
            for (Index s = 0; s < p.batch; ++s) ++counts[static_cast<std::size_t>(p.group[s])];
            std::vector<Index> next(counts.size(), 0);
            for (std::size_t g = 1; g < counts.size(); ++g) next[g] = next[g - 1] + counts[g - 1];
            order_.resize(static_cast<std::size_t>(p.batch));
            for (Index s = 0; s < p.batch; ++s)
                order_[static_cast<std::size_t>(next[static_cast<std::size_t>(p.group[s])]++)] = s;
            plan.order = order_.data();
        }
        const Index largest = *std::max_element(counts.begin(), counts.end());
        // A thread's samples in the largest group; several groups share the threads anyway.
        const Index share = p.group == nullptr ? divide_up(p.batch, threads) : largest;
        const Index in_lanes = divide_up(share, plan.lanes) * plan.lanes;
        plan.rows = 5 * in_lanes >= 6 * share;  // lanes would compute a fifth or more for nothing
        if (plan.rows) {
            plan.width = std::max<Index>(1, divide_up(share, divide_up(std::max<Index>(1, share), most_rows)));
        } else {
            const Index per_thread = divide_up(divide_up(largest, plan.lanes), p.group == nullptr ? threads : 1);
            plan.vectors = static_cast<int>(divide_up(per_thread, divide_up(per_thread, tile_vectors)));
            plan.width = plan.vectors * plan.lanes;
        }
        Index begin = 0;
        for (std::size_t g = 0; g < counts.size(); ++g)
            for (Index left = counts[g]; left > 0;) {
                const Index count = std::min(left, plan.width);
                blocks_.push_back({begin, count, static_cast<Index>(g)});
                begin += count;
                left -= count;
            }
        plan.blocks = blocks_.data();
        plan.n_blocks = static_cast<Index>(blocks_.size());
        plan.tasks = static_cast<int>(std::max<Index>(1, std::min(threads, plan.n_blocks)));
    }

    void lay_out(const MLPOdeint<T>& p) {
        plan.inputs = p.dim + p.control_dim + (p.time_input ? 1 : 0);
        plan.steps = (p.times - 1) * p.substeps;
        plan.widest = extent(std::max(p.dim, plan.inputs));
        plan.record = aligned(extent(plan.inputs));
        plan.delta_record = aligned(extent(p.dim));
        const bool argument = argument_needed(p.activation);
        layers_.resize(static_cast<std::size_t>(p.n_networks));
        for (int n = 0; n < p.n_networks; ++n) {
            const Network<T>& net = p.networks[n];
            std::vector<LayerPlan>& layers = layers_[static_cast<std::size_t>(n)];
            NetworkPlan here{};
            Index input_at = 0;
            for (Index l = 0; l < net.layers; ++l) {
                LayerPlan layer{};
                layer.in = net.width[l];
                layer.out = net.width[l + 1];
                layer.split_forward = layer.out <= split_rows;
                layer.split_backward = layer.in <= split_rows;
                layer.input_at = input_at;
                layer.argument_at = -1;
                const Index output = extent(layer.out);
                plan.widest = std::max(plan.widest, output);
                if (l < net.layers - 1) {
                    input_at = layer.output_at = take(plan.record, output);
                    if (argument) layer.argument_at = take(plan.record, output);
                    layer.delta_at = take(plan.delta_record, output);
                }
                layer.transposed_at = take(plan.transposed_record, plan.rows ? 0 : plan.width * padded(layer.in));
                layer.bias_at = take(here.packed_set, padded(layer.out));
                layer.forward_at = take(here.packed_set, weights(layer.in, layer.out));
                layer.backward_at = take(here.packed_set, weights(layer.out, layer.in));
                layer.grad_weight_at = take(here.grad_set, layer.out * padded(layer.in));
                layer.grad_bias_at = take(here.grad_set, plan.rows ? padded(layer.out) : layer.out * plan.lanes);
                layers.push_back(layer);
            }
            here.grad_slope_at = take(here.grad_set, net.layers);
            here.layers = net.layers;
            here.sets = net.sets;
            here.packed_at = take(plan.packed, here.packed_set * net.sets);
            here.grad_at = take(plan.gradients, here.grad_set * net.sets);
            networks_.push_back(here);
        }
        for (std::size_t n = 0; n < networks_.size(); ++n) networks_[n].layer = layers_[n].data();
        plan.networks = networks_.data();
        plan.n_networks = p.n_networks;
        plan.stage_at = take(plan.record, extent(p.dim));
        plan.state_at = p.input_map == InputMap::none ? 0 : take(plan.record, extent(p.dim));
        plan.chunk = std::max<Index>(1, chunk_samples / plan.width);
    }

    // Elements of a block of this many features.
    Index extent(Index features) const { return plan.rows ? plan.width * padded(features) : features * plan.width; }
    Index padded(Index features) const { return divide_up(features, plan.lanes) * plan.lanes; }

    // Of a matrix with `depth` rows and `columns` columns: rows are padded, panels are not.
    Index weights(Index depth, Index columns) const { return plan.rows ? depth * padded(columns) : depth * columns; }

    static Index aligned(Index elements) {
        constexpr Index line = 64 / sizeof(T);
        return divide_up(elements, line) * line;
    }
    static Index take(Index& size, Index elements) {
        const Index at = size;
        size += aligned(elements);
        return at;
    }

    // All records if they fit; or else states every `segment` sub-steps, and the records of one segment for each thread.
    void choose_segment(const MLPOdeint<T>& p) {
        const double step = static_cast<double>(p.method.stages * plan.record) * sizeof(T);
        const double state = static_cast<double>(extent(p.dim)) * sizeof(T), most = static_cast<double>(p.max_memory);
        plan.segment = std::max<Index>(1, plan.steps);
        if (step * static_cast<double>(plan.steps * plan.n_blocks) <= most) return;
        const double states = state * static_cast<double>(plan.n_blocks), records = step * plan.tasks;
        // states * steps / segment + records * segment is least here
        const double best = std::sqrt(states * static_cast<double>(plan.steps) / records);
        plan.segment = std::min(plan.steps - 1, std::max<Index>(1, static_cast<Index>(best)));
        plan.segment = std::max<Index>(1, plan.segment);
    }

    std::vector<SampleBlock> blocks_;
    std::vector<Index> order_;
    std::vector<std::vector<LayerPlan>> layers_;
    std::vector<NetworkPlan> networks_;
};

template <class T>
Index scratch_elements(const MLPOdeint<T>& p, const MLPPlan& plan, bool backward) {
    Index elements = 0;
    PK_CALL_ACTIVE(mlp_odeint_memory, (p, plan, backward, &elements));
    return elements;
}

template <class T>
Index tape_of(const MLPOdeint<T>& p) {
    const Planner<T> planner(p);
    return planner.plan.n_blocks * planner.plan.tape_block;
}

template <class T>
Divergence forward(const MLPOdeint<T>& p, T* tape) {
    const Planner<T> planner(p);
    const MLPPlan& plan = planner.plan;
    const Scratch scratch(static_cast<std::size_t>(scratch_elements(p, plan, false)) * sizeof(T));
    std::vector<Divergence> found(static_cast<std::size_t>(plan.tasks));
    T* memory = static_cast<T*>(scratch.data());
    PK_CALL_ACTIVE(mlp_odeint_forward, (p, plan, memory, tape, found.data()));
    Divergence first{-1, -1};
    for (const Divergence& d : found)
        if (d.step >= 0 && (first.step < 0 || d.step < first.step || (d.step == first.step && d.sample < first.sample)))
            first = d;
    return first;
}

template <class T>
void backward(const MLPOdeint<T>& p, const MLPOdeintGradients<T>& g, const T* tape) {
    const Planner<T> planner(p);
    const MLPPlan& plan = planner.plan;
    const Scratch scratch(static_cast<std::size_t>(scratch_elements(p, plan, true)) * sizeof(T));
    T* memory = static_cast<T*>(scratch.data());
    PK_CALL_ACTIVE(mlp_odeint_backward, (p, plan, g, memory, tape));
}

}  // namespace

std::int64_t mlp_odeint_tape(const MLPOdeint<float>& p) { return tape_of(p); }
std::int64_t mlp_odeint_tape(const MLPOdeint<double>& p) { return tape_of(p); }
Divergence mlp_odeint_forward(const MLPOdeint<float>& p, float* tape) { return forward(p, tape); }
Divergence mlp_odeint_forward(const MLPOdeint<double>& p, double* tape) { return forward(p, tape); }
void mlp_odeint_backward(const MLPOdeint<float>& p, const MLPOdeintGradients<float>& g, const float* tape) {
    backward(p, g, tape);
}
void mlp_odeint_backward(const MLPOdeint<double>& p, const MLPOdeintGradients<double>& g, const double* tape) {
    backward(p, g, tape);
}

}  // namespace pk
