// The trajectory of one block of samples after the other, and its adjoint; see mlp_odeint.hpp and plan.hpp.
#include "latent_ode/mlp_odeint_cpu.hpp"

#include "common/parallel.hpp"
#include "common/product.hpp"
#include "latent_ode/activation.hpp"

PK_ISA_BEGIN
namespace {

// Hands out memory from front to back; with no memory, counts it.
template <class T>
class Arena {
public:
    explicit Arena(T* base) : base_(base) {}
    T* take(Index elements) {
        T* at = base_ == nullptr ? nullptr : base_ + used_;
        used_ += aligned<T>(elements);
        return at;
    }
    Index used() const { return used_; }

private:
    T* base_;
    Index used_ = 0;
};

// out = y + sum_j factor[j] k[j]. The sum comes first, since it is small beside y: then y is rounded once.
template <class T>
void combine(T* out, const T* y, const T* factor, T* const* k, int terms, Index n) {
    constexpr int lanes = Vec<T>::lanes;
    if (terms == 0) {
        if (out != y) copy(out, y, n);
        return;
    }
    for (Index i = 0; i < n; i += lanes) {
        Vec<T> sum = Vec<T>(factor[0]) * Vec<T>::load(k[0] + i);
        for (int j = 1; j < terms; ++j) sum = sum + Vec<T>(factor[j]) * Vec<T>::load(k[j] + i);
        (Vec<T>::load(y + i) + sum).store(out + i);
    }
}

template <class T>
PK_INLINE T sum_of_lanes(Vec<T> v) {
    T lane[Vec<T>::lanes], sum = 0;
    v.store(lane);
    for (int i = 0; i < Vec<T>::lanes; ++i) sum += lane[i];
    return sum;
}

template <class T>
T dot(const T* a, const T* b, Index n) {
    Vec<T> sum(T(0));
    for (Index i = 0; i < n; i += Vec<T>::lanes) sum = sum + Vec<T>::load(a + i) * Vec<T>::load(b + i);
    return sum_of_lanes(sum);
}

template <class T>
bool all_finite(const T* p, Index n) {
    const Vec<T> zero(T(0));
    Vec<T> sum(T(0));
    for (Index i = 0; i < n; i += Vec<T>::lanes) sum = sum + zero * Vec<T>::load(p + i);
    return sum_of_lanes(sum) == T(0);
}

template <class T>
PK_INLINE bool finite(T x) {
    return x - x == T(0);
}

// Features filled up to whole vectors.
template <class T>
constexpr Index padded(Index features) {
    constexpr Index lanes = Vec<T>::lanes;
    return (features + lanes - 1) / lanes * lanes;
}

// One thread's memory and steps.
template <class T>
class Carrier {
public:
    Carrier(const MLPOdeint<T>& p, const MLPPlan& plan, const T* packed, Arena<T>& arena, bool backward)
        : p_(p),
          plan_(plan),
          packed_(packed),
          stages_(p.method.stages),
          state_(extent(p.dim)),
          direct_(p.input_map == InputMap::none && (!plan.rows || plan.inputs == p.dim)) {
        y_ = arena.take(state_);
        inner_ = arena.take(state_);
        control_ = arena.take(extent(p.control_dim));
        for (int i = 0; i < stages_; ++i) stage_[i] = arena.take(state_);
        record_ = arena.take(plan.record);
        norm_ = arena.take(plan.width);
        energy_ = arena.take(plan.width);
        sum_ = arena.take(plan.width);
        if (!backward) return;
        tape_ = arena.take(plan.whole_tape ? 0 : plan.segment * stages_ * plan.record);
        lambda_ = arena.take(state_);
        change_ = arena.take(state_);
        for (int i = 0; i < stages_; ++i) adjoint_[i] = arena.take(state_);
        grad_input_ = arena.take(plan.widest);
        grad_control_ = arena.take(extent(p.control_dim));
        deltas_ = arena.take(plan.chunk * plan.delta_record);
        transposed_ = arena.take(plan.chunk * plan.transposed_record);
    }

    // Memory for the sums over this thread's samples, which outlives the blocks.
    T* gradients = nullptr;
    double* grad_step = nullptr;  // of the size of each sub-step, and of its time
    double* grad_time = nullptr;
    Divergence divergence{-1, -1};

    void forward(const SampleBlock& block, T* tape) {
        begin(block);
        load(y_, p_.y0, p_.dim);
        store(p_.states, y_, p_.dim);
        run(0, plan_.steps, plan_.whole_tape ? tape : nullptr, plan_.whole_tape ? nullptr : tape, true);
    }

    void backward(const SampleBlock& block, const MLPOdeintGradients<T>& g, const T* tape) {
        begin(block);
        clear(lambda_, state_);
        for (Index segment = plan_.segments - 1; segment >= 0; --segment) {
            const Index first = segment * plan_.segment, last = min(first + plan_.segment, plan_.steps);
            const T* records = tape;
            if (!plan_.whole_tape) {
                copy(y_, tape + segment * state_, state_);
                run(first, last, tape_, nullptr, false);
                records = tape_;
            }
            for (Index n = last - 1; n >= first; --n)
                step_backward(n, g, records + (n - first) * stages_ * plan_.record);
            flush();
        }
        add(lambda_, g.grad_states, p_.dim);
        if (g.grad_y0 != nullptr) store(g.grad_y0, lambda_, p_.dim);
    }

private:
    // Elements of a block of this many features.
    Index extent(Index features) const {
        return plan_.rows ? plan_.width * padded<T>(features) : features * plan_.width;
    }

    struct Step {
        Index interval, part, set;
        T size, time;
    };

    Step step(Index n) const {
        Step s;
        s.interval = n / p_.substeps;
        s.part = n - s.interval * p_.substeps;
        s.set = p_.networks[0].sets == 1 ? 0 : n % p_.networks[0].sets;
        const double begin = p_.t[s.interval], size = (p_.t[s.interval + 1] - begin) / static_cast<double>(p_.substeps);
        s.size = static_cast<T>(size);
        s.time = static_cast<T>(begin + static_cast<double>(s.part) * size);
        return s;
    }

    void begin(const SampleBlock& block) {
        block_ = block;
        active_ = plan_.rows ? block.count * padded<T>(p_.dim) : state_;
        reported_ = false;
    }

    Index sample(Index s) const {
        const Index at = block_.begin + s;
        return plan_.order == nullptr ? at : plan_.order[at];
    }
    Index set_of(int network, const Step& s) const { return network == 0 ? s.set : block_.group; }

    // Between (batch, features) and a block. What fills up a block in lanes repeats its last sample, so that it diverges only
    // with that.
    void load(T* out, const T* in, Index features) const {
        if (plan_.rows) {
            const Index row = padded<T>(features);
            for (Index s = 0; s < block_.count; ++s) {
                clear(out + s * row, row);
                copy(out + s * row, in + sample(s) * features, features);
            }
            return;
        }
        for (Index s = 0; s < plan_.width; ++s) {
            const T* from = in + sample(min(s, block_.count - 1)) * features;
            for (Index f = 0; f < features; ++f) out[f * plan_.width + s] = from[f];
        }
    }
    void store(T* out, const T* in, Index features) const {
        const Index sample_stride = plan_.rows ? padded<T>(features) : 1;
        const Index feature_stride = plan_.rows ? 1 : plan_.width;
        for (Index s = 0; s < block_.count; ++s) {
            T* to = out + sample(s) * features;
            for (Index f = 0; f < features; ++f) to[f] = in[s * sample_stride + f * feature_stride];
        }
    }
    void add(T* out, const T* in, Index features) const {
        const Index sample_stride = plan_.rows ? padded<T>(features) : 1;
        const Index feature_stride = plan_.rows ? 1 : plan_.width;
        for (Index s = 0; s < block_.count; ++s) {
            const T* from = in + sample(s) * features;
            for (Index f = 0; f < features; ++f) out[s * sample_stride + f * feature_stride] += from[f];
        }
    }

    // sum[s] = <a, b> of each sample, added up in the same order however a block lies: the bits must not depend on that.
    // It is 0 for samples that are not there.
    void dot_samples(T* sum, const T* a, const T* b) const {
        clear(sum, plan_.width);
        if (plan_.rows) {
            const Index row = padded<T>(p_.dim);
            for (Index s = 0; s < block_.count; ++s)
                for (Index f = 0; f < p_.dim; ++f) sum[s] += a[s * row + f] * b[s * row + f];
            return;
        }
        for (Index f = 0; f < p_.dim; ++f)
            for (Index s = 0; s < plan_.width; s += Vec<T>::lanes) {
                const Index at = f * plan_.width + s;
                (Vec<T>::load(sum + s) + Vec<T>::load(a + at) * Vec<T>::load(b + at)).store(sum + s);
            }
    }
    // out += scale[s] * v of each sample.
    void add_samples(T* out, const T* scale, const T* v) const {
        if (plan_.rows) {
            const Index row = padded<T>(p_.dim);
            for (Index s = 0; s < block_.count; ++s) add_scaled(out + s * row, scale[s], v + s * row, row);
            return;
        }
        for (Index f = 0; f < p_.dim; ++f)
            for (Index s = 0; s < plan_.width; s += Vec<T>::lanes) {
                const Index at = f * plan_.width + s;
                (Vec<T>::load(out + at) + Vec<T>::load(scale + s) * Vec<T>::load(v + at)).store(out + at);
            }
    }

    bool marked(Index interval, Index s) const {
        return p_.mask[interval * p_.batch + sample(min(s, block_.count - 1))] != 0;
    }

    // y = where(mask, injected, y)
    void reinject(Index interval) {
        if (p_.mask == nullptr) return;
        const Index sample_stride = plan_.rows ? padded<T>(p_.dim) : 1, feature_stride = plan_.rows ? 1 : plan_.width;
        for (Index s = 0; s < (plan_.rows ? block_.count : plan_.width); ++s) {
            if (!marked(interval, s)) continue;
            const T* from = p_.injected + (interval * p_.batch + sample(min(s, block_.count - 1))) * p_.dim;
            for (Index f = 0; f < p_.dim; ++f) y_[s * sample_stride + f * feature_stride] = from[f];
        }
    }

    // Sub-steps [first, last) from the state y. Records go to `tape`, states at the beginning of segments to `kept`, both may be
    // null; results are written if `results`.
    void run(Index first, Index last, T* tape, T* kept, bool results) {
        for (Index n = first; n < last; ++n) {
            const Step s = step(n);
            if (kept != nullptr && n % plan_.segment == 0) copy(kept + n / plan_.segment * state_, y_, state_);
            if (s.part == 0 || n == first) {
                if (s.part == 0) reinject(s.interval);
                if (p_.control != nullptr)
                    load(control_, p_.control + s.interval * p_.batch * p_.control_dim, p_.control_dim);
            }
            if (s.part == 0 && results) {
                if (p_.norms != nullptr) clear(norm_, plan_.width);
                if (p_.energy != nullptr) clear(energy_, plan_.width);
            }
            T* k[most_stages];
            T factor[most_stages];
            T* used[most_stages];
            for (int i = 0; i < stages_; ++i) {
                T* record = tape == nullptr ? record_ : tape + ((n - first) * stages_ + i) * plan_.record;
                k[i] = tape == nullptr ? stage_[i] : record + plan_.stage_at;
                const int terms = select(factor, used, p_.method.a[i], i, s.size, k);
                evaluate(record, k[i], factor, used, terms, s, s.time + static_cast<T>(p_.method.c[i]) * s.size);
            }
            const int terms = select(factor, used, p_.method.b, stages_, s.size, k);
            if (results && p_.norms != nullptr) {
                clear(inner_, active_);
                combine(inner_, inner_, factor, used, terms, active_);
                dot_samples(sum_, inner_, inner_);
                for (Index i = 0; i < plan_.width; ++i) norm_[i] += sqrt(sum_[i]);
            }
            if (results && p_.energy != nullptr)
                for (int i = 0; i < stages_; ++i) {
                    if (p_.method.b[i] == 0) continue;
                    dot_samples(sum_, k[i], k[i]);
                    add_scaled(energy_, energy_weight(i, s.size), sum_, plan_.width);
                }
            combine(y_, y_, factor, used, terms, active_);
            if (p_.check_finite && results && !reported_ && !all_finite(y_, active_)) report(n);
            if (results && s.part == p_.substeps - 1) {
                store(p_.states + (s.interval + 1) * p_.batch * p_.dim, y_, p_.dim);
                if (p_.norms != nullptr) store(p_.norms + s.interval * p_.batch, norm_);
                if (p_.energy != nullptr) store(p_.energy + s.interval * p_.batch, energy_);
            }
        }
    }

    void store(T* out, const T* per_sample) const {
        for (Index s = 0; s < block_.count; ++s) out[sample(s)] = per_sample[s];
    }
    T energy_weight(int i, T size) const {
        const T b = static_cast<T>(p_.method.b[i]);
        return p_.energy_kind == Energy::time ? b * (size < 0 ? -size : size) : b;
    }

    // The terms of h sum_j coefficient[j] k[j] that are not zero.
    static int select(T* factor, T** used, const double* coefficient, int count, T size, T* const* k) {
        int terms = 0;
        for (int j = 0; j < count; ++j)
            if (coefficient[j] != 0) {
                factor[terms] = size * static_cast<T>(coefficient[j]);
                used[terms++] = k[j];
            }
        return terms;
    }

    void report(Index n) {
        reported_ = true;
        const Index sample_stride = plan_.rows ? padded<T>(p_.dim) : 1, feature_stride = plan_.rows ? 1 : plan_.width;
        Index worst = -1;
        for (Index s = 0; s < block_.count; ++s)
            for (Index f = 0; f < p_.dim; ++f)
                if (!finite(y_[s * sample_stride + f * feature_stride]) && (worst < 0 || sample(s) < worst))
                    worst = sample(s);
        if (worst < 0) return;
        if (divergence.step < 0 || n < divergence.step || (n == divergence.step && worst < divergence.sample))
            divergence = {n, worst};
    }

    // k = field(time, y + sum_j factor[j] used[j])
    void evaluate(T* record, T* k, const T* factor, T* const* used, int terms, const Step& s, T time) {
        T* state = direct_ ? record : p_.input_map == InputMap::none ? inner_ : record + plan_.state_at;
        combine(state, y_, factor, used, terms, active_);
        if (!direct_) {
            const T* mapped = state;
            if (p_.input_map != InputMap::none) {
                map_input(inner_, state, state_, p_.input_map);
                mapped = inner_;
            }
            place(record, mapped, 0, p_.dim);
        }
        if (p_.control != nullptr) place(record, control_, p_.dim, p_.control_dim);
        if (p_.time_input) {
            const Index f = plan_.inputs - 1;
            if (plan_.rows)
                for (Index i = 0; i < block_.count; ++i) record[i * padded<T>(plan_.inputs) + f] = time;
            else
                for (Index i = 0; i < plan_.width; ++i) record[f * plan_.width + i] = time;
        }
        for (int network = 0; network < plan_.n_networks; ++network) {
            const NetworkPlan& net = plan_.networks[network];
            const T* packed = packed_ + net.packed_at + set_of(network, s) * net.packed_set;
            for (Index l = 0; l < net.layers; ++l) {
                const LayerPlan& layer = net.layer[l];
                const bool last = l == net.layers - 1;
                apply(layer, packed, record + layer.input_at, last ? k : record + layer.output_at,
                      layer.argument_at < 0 ? nullptr : record + layer.argument_at, last, network > 0 && last,
                      slope(network, s, l));
            }
        }
    }

    T slope(int network, const Step& s, Index layer) const {
        const Network<T>& net = p_.networks[network];
        if (net.slope == nullptr || layer == net.layers - 1) return p_.slope;
        return net.slope[set_of(network, s) * (net.layers - 1) + layer];
    }

    // Copies features of a block into those of a network's input, from feature `at` on.
    void place(T* input, const T* block, Index at, Index features) const {
        if (!plan_.rows) return copy(input + at * plan_.width, block, features * plan_.width);
        for (Index s = 0; s < block_.count; ++s)
            copy(input + s * padded<T>(plan_.inputs) + at, block + s * padded<T>(features), features);
    }

    // out = act(W in + b), or out += W in + b
    void apply(const LayerPlan& layer, const T* packed, const T* in, T* out, T* argument, bool last, bool accumulate,
               T slope) {
        const FieldActivation activation = p_.activation;
        if (plan_.rows) {
            const StridedProduct<T> product{
                block_.count,        layer.in, in, padded<T>(layer.in), 1, 0, packed + layer.forward_at, 0, 0, 1, out,
                padded<T>(layer.out)};
            const Start<T> start{nullptr, packed + layer.bias_at, accumulate};
            const Index vectors = padded<T>(layer.out) / Vec<T>::lanes;
            if (layer.split_forward)
                strided_product<T, true>(product, vectors, start);
            else
                strided_product<T, false>(product, vectors, start);
            if (!last) activate(out, argument, block_.count * padded<T>(layer.out), activation, slope);
            return;
        }
        const PanelProduct<T> product{
            packed + layer.forward_at, layer.out, layer.in, in, out, {packed + layer.bias_at, nullptr, accumulate}};
        const auto finish = [=](T* c, Index count) {
            if (!last) activate(c, argument == nullptr ? nullptr : argument + (c - out), count, activation, slope);
        };
        if (layer.split_forward)
            panel_product<T, true>(product, plan_.vectors, finish);
        else
            panel_product<T, false>(product, plan_.vectors, finish);
    }

    // out (+)= W^T delta
    void apply_transposed(const LayerPlan& layer, const T* packed, const T* delta, T* out, bool accumulate) {
        const Start<T> start{nullptr, nullptr, accumulate};
        if (plan_.rows) {
            const StridedProduct<T> product{block_.count,
                                            layer.out,
                                            delta,
                                            padded<T>(layer.out),
                                            1,
                                            0,
                                            packed + layer.backward_at,
                                            0,
                                            0,
                                            1,
                                            out,
                                            padded<T>(layer.in)};
            const Index vectors = padded<T>(layer.in) / Vec<T>::lanes;
            if (layer.split_backward)
                strided_product<T, true>(product, vectors, start);
            else
                strided_product<T, false>(product, vectors, start);
            return;
        }
        const PanelProduct<T> product{packed + layer.backward_at, layer.in, layer.out, delta, out, start};
        const auto finish = [](T*, Index) {};
        if (layer.split_backward)
            panel_product<T, true>(product, plan_.vectors, finish);
        else
            panel_product<T, false>(product, plan_.vectors, finish);
    }

    // The adjoint of sub-step n, whose records are given: lambda of its end becomes lambda of its beginning.
    void step_backward(Index n, const MLPOdeintGradients<T>& g, const T* records) {
        const Step s = step(n);
        const Index samples = s.interval * p_.batch;
        set_ = s.set;
        if (s.part == p_.substeps - 1) {
            add(lambda_, g.grad_states + (samples + p_.batch) * p_.dim, p_.dim);
            if (p_.control_dim > 0) clear(grad_control_, extent(p_.control_dim));
        }
        T* k[most_stages];
        for (int i = 0; i < stages_; ++i) k[i] = const_cast<T*>(records) + i * plan_.record + plan_.stage_at;
        const T* mu = with_norm(g, k, s, samples);
        if (g.grad_energy != nullptr) {
            clear(energy_, plan_.width);
            for (Index i = 0; i < block_.count; ++i) energy_[i] = g.grad_energy[samples + sample(i)];
        }
        double grad_step_here = 0, grad_time_here = 0;
        for (int i = stages_ - 1; i >= 0; --i) {
            const T* record = records + i * plan_.record;
            T* delta = deltas_ + (plan_.chunk - 1 - pending_) * plan_.delta_record;
            // kbar_i = h (b_i mu + sum_{j>i} a_ji Ybar_j), and what the energy adds
            T factor[most_stages];
            T* used[most_stages];
            int terms = 0;
            for (int j = i + 1; j < stages_; ++j)
                if (p_.method.a[j][i] != 0) {
                    factor[terms] = s.size * static_cast<T>(p_.method.a[j][i]);
                    used[terms++] = adjoint_[j];
                }
            scale(delta, s.size * static_cast<T>(p_.method.b[i]), mu, active_);
            combine(delta, delta, factor, used, terms, active_);
            if (g.grad_energy != nullptr && p_.method.b[i] != 0) {
                scale(sum_, 2 * energy_weight(i, s.size), energy_, plan_.width);
                add_samples(delta, sum_, k[i]);
                if (p_.energy_kind == Energy::time && grad_step != nullptr) {
                    dot_samples(sum_, k[i], k[i]);
                    const T sign = s.size < 0 ? T(-1) : s.size > 0 ? T(1) : T(0);
                    for (Index j = 0; j < block_.count; ++j)
                        grad_step_here += sign * static_cast<T>(p_.method.b[i]) * energy_[j] * sum_[j];
                }
            }
            field_backward(record, delta, s);
            const T time = take_input_gradient(adjoint_[i], record);
            if (grad_step != nullptr) {
                grad_step_here += static_cast<T>(p_.method.b[i]) * dot(mu, k[i], active_);
                for (int j = 0; j < i; ++j)
                    if (p_.method.a[i][j] != 0)
                        grad_step_here += static_cast<T>(p_.method.a[i][j]) * dot(adjoint_[i], k[j], active_);
                grad_step_here += static_cast<T>(p_.method.c[i]) * time;
                grad_time_here += time;
            }
            newest_ = record;
            if (++pending_ == plan_.chunk) flush();
        }
        constexpr T ones[most_stages] = {1, 1, 1, 1};
        combine(lambda_, lambda_, ones, adjoint_, stages_, active_);
        if (grad_step != nullptr) {
            grad_step[n] += grad_step_here;
            grad_time[n] += grad_time_here;
        }
        if (p_.networks[0].sets > 1) flush();  // the next sub-step has other weights
        if (s.part == 0) begin_interval(g, s, samples);
    }

    // What the reverse pass does at the beginning of an interval.
    void begin_interval(const MLPOdeintGradients<T>& g, const Step& s, Index samples) {
        if (g.grad_control != nullptr) store(g.grad_control + samples * p_.control_dim, grad_control_, p_.control_dim);
        if (p_.mask == nullptr) return;
        const Index sample_stride = plan_.rows ? padded<T>(p_.dim) : 1, feature_stride = plan_.rows ? 1 : plan_.width;
        for (Index i = 0; i < block_.count; ++i) {
            if (!marked(s.interval, i)) continue;
            for (Index f = 0; f < p_.dim; ++f) {
                T& value = lambda_[i * sample_stride + f * feature_stride];
                if (g.grad_injected != nullptr) g.grad_injected[(samples + sample(i)) * p_.dim + f] = value;
                value = 0;
            }
        }
    }

    // The gradient of h sum_i b_i k_i: lambda, and with norms lambda + grad_norm d / |d|.
    const T* with_norm(const MLPOdeintGradients<T>& g, T* const* k, const Step& s, Index samples) {
        if (g.grad_norms == nullptr) return lambda_;
        T factor[most_stages];
        T* used[most_stages];
        const int terms = select(factor, used, p_.method.b, stages_, s.size, k);
        clear(inner_, active_);
        combine(inner_, inner_, factor, used, terms, active_);
        dot_samples(sum_, inner_, inner_);
        clear(norm_, plan_.width);
        for (Index i = 0; i < block_.count; ++i)
            norm_[i] = sum_[i] == 0 ? T(0) : g.grad_norms[samples + sample(i)] / sqrt(sum_[i]);
        copy(change_, lambda_, active_);
        add_samples(change_, norm_, inner_);
        return change_;
    }

    static void scale(T* out, T factor, const T* in, Index n) {
        const Vec<T> f(factor);
        for (Index i = 0; i < n; i += Vec<T>::lanes) (f * Vec<T>::load(in + i)).store(out + i);
    }

    // From the gradient of k, at the front of a delta record, to those of all layers and of the input.
    void field_backward(const T* record, T* delta, const Step& s) {
        for (int network = 0; network < plan_.n_networks; ++network) {
            const NetworkPlan& net = plan_.networks[network];
            const Index set = set_of(network, s);
            const T* packed = packed_ + net.packed_at + set * net.packed_set;
            for (Index l = net.layers - 1; l >= 0; --l) {
                const LayerPlan& layer = net.layer[l];
                if (gradients != nullptr && !plan_.rows) {
                    T* out = transposed_ + (plan_.chunk - 1 - pending_) * plan_.transposed_record + layer.transposed_at;
                    transpose(out, padded<T>(layer.in), record + layer.input_at, plan_.width, layer.in, plan_.width);
                }
                if (l == 0) {
                    apply_transposed(layer, packed, delta + layer.delta_at, grad_input_, network > 0);
                    break;
                }
                const LayerPlan& below = net.layer[l - 1];
                T* grad = delta + below.delta_at;
                apply_transposed(layer, packed, delta + layer.delta_at, grad, false);
                const T* saved = record + (below.argument_at < 0 ? below.output_at : below.argument_at);
                const Index n = plan_.rows ? block_.count * padded<T>(below.out) : extent(below.out);
                const T grad_slope = activate_backward(grad, saved, n, p_.activation, slope(network, s, l - 1));
                if (gradients != nullptr && p_.networks[network].slope != nullptr)
                    gradients[net.grad_at + set * net.grad_set + net.grad_slope_at + l - 1] += grad_slope;
            }
        }
    }

    // Splits the gradient of the networks' input: that of the state to `adjoint`, that of the control is added up. Returns that
    // of the time.
    T take_input_gradient(T* adjoint, const T* record) {
        T time = 0;
        if (!plan_.rows) {
            copy(adjoint, grad_input_, state_);
            if (p_.control_dim > 0) add_scaled(grad_control_, T(1), grad_input_ + state_, extent(p_.control_dim));
            if (p_.time_input)
                for (Index i = 0; i < block_.count; ++i) time += grad_input_[(plan_.inputs - 1) * plan_.width + i];
        } else {
            const Index row = padded<T>(plan_.inputs), state_row = padded<T>(p_.dim),
                        control_row = padded<T>(p_.control_dim);
            for (Index i = 0; i < block_.count; ++i) {
                const T* from = grad_input_ + i * row;
                clear(adjoint + i * state_row, state_row);
                copy(adjoint + i * state_row, from, p_.dim);
                add_scaled(grad_control_ + i * control_row, T(1), from + p_.dim, p_.control_dim);
                if (p_.time_input) time += from[plan_.inputs - 1];
            }
        }
        if (p_.input_map != InputMap::none) map_input_backward(adjoint, record + plan_.state_at, active_, p_.input_map);
        return time;
    }

    // Adds the weight gradients of the pending evaluations, whose records lie one after the other from the newest one on.
    void flush() {
        if (pending_ == 0) return;
        const Index at = plan_.chunk - pending_, count = pending_;
        pending_ = 0;
        if (gradients == nullptr) return;
        for (int network = 0; network < plan_.n_networks; ++network) {
            const NetworkPlan& net = plan_.networks[network];
            const Index set = network == 0 ? set_ : block_.group;
            T* sums = gradients + net.grad_at + set * net.grad_set;
            for (Index l = 0; l < net.layers; ++l) {
                const LayerPlan& layer = net.layer[l];
                const T* delta = deltas_ + at * plan_.delta_record + layer.delta_at;
                const Index in = padded<T>(layer.in), out = padded<T>(layer.out);
                const T* inputs = plan_.rows ? newest_ + layer.input_at
                                             : transposed_ + at * plan_.transposed_record + layer.transposed_at;
                const StridedProduct<T> product{layer.out,
                                                block_.count,
                                                delta,
                                                plan_.rows ? 1 : plan_.width,
                                                plan_.rows ? out : 1,
                                                plan_.delta_record,
                                                inputs,
                                                in,
                                                plan_.rows ? plan_.record : plan_.transposed_record,
                                                count,
                                                sums + layer.grad_weight_at,
                                                in};
                strided_product<T, false>(product, in / Vec<T>::lanes, {nullptr, nullptr, true});
                add_bias_gradient(sums + layer.grad_bias_at, delta, layer.out, count);
            }
        }
    }

    // Rows: a sum for each output. Lanes: a vector for each output. Those of the pending evaluations come first, since one chain
    // of sums over all of them would be less accurate.
    void add_bias_gradient(T* sums, const T* delta, Index outputs, Index count) const {
        constexpr int lanes = Vec<T>::lanes;
        if (plan_.rows) {
            for (Index f = 0; f < padded<T>(outputs); f += lanes) {
                Vec<T> sum(T(0));
                for (Index e = 0; e < count; ++e)
                    for (Index s = 0; s < block_.count; ++s)
                        sum = sum + Vec<T>::load(delta + e * plan_.delta_record + s * padded<T>(outputs) + f);
                (Vec<T>::load(sums + f) + sum).store(sums + f);
            }
            return;
        }
        for (Index f = 0; f < outputs; ++f) {
            Vec<T> sum(T(0));
            for (Index e = 0; e < count; ++e)
                for (Index s = 0; s < plan_.width; s += lanes)
                    sum = sum + Vec<T>::load(delta + e * plan_.delta_record + f * plan_.width + s);
            (Vec<T>::load(sums + f * lanes) + sum).store(sums + f * lanes);
        }
    }

    const MLPOdeint<T>& p_;
    const MLPPlan& plan_;
    const T* packed_;
    const int stages_;
    const Index state_;  // elements of a block of states
    const bool direct_;  // the state is the front of a network input as it is
    Index active_ = 0;   // of them, those of samples that are there, or repeated
    SampleBlock block_{};
    bool reported_ = false;
    T *y_, *inner_, *control_, *stage_[most_stages], *record_, *norm_, *energy_, *sum_;
    T *tape_ = nullptr, *lambda_ = nullptr, *change_ = nullptr, *adjoint_[most_stages] = {}, *grad_input_ = nullptr,
      *grad_control_ = nullptr, *deltas_ = nullptr, *transposed_ = nullptr;
    Index pending_ = 0, set_ = 0;  // evaluations whose weight gradients are not added yet, and their set
    const T* newest_ = nullptr;
};

// matrix[k][j] of depth x columns, in panels as strided_product reads them; zero where there is no column. With `transposed`
// it lies as [j][k].
template <class T>
void pack_columns(T* packed, const T* matrix, Index depth, Index columns, bool transposed) {
    constexpr Index lanes = Vec<T>::lanes;
    const Index whole_depth = depth / lanes * lanes;
    for (Index from = 0; from < columns; from += tile_vectors * lanes) {
        const Index vectors = min(tile_vectors, divide_up(columns - from, lanes)), width = vectors * lanes;
        for (Index j = from; j < from + width; j += lanes) {
            T* out = packed + j - from;
            const int valid = static_cast<int>(min(lanes, columns - j));
            Index k = 0;
            if (transposed && valid == lanes) {
                transpose(out, width, matrix + j * depth, depth, lanes, whole_depth);
                k = whole_depth;
            }
            for (; k < depth; ++k) {
                const T* in = matrix + (transposed ? j * depth + k : k * columns + j);
                load_strided(in, transposed ? depth : 1, valid).store(out + k * width);
            }
        }
        packed += depth * width;
    }
}

template <class T>
struct Packing {
    const MLPOdeint<T>* p;
    const MLPPlan* plan;
    T* packed;
    bool forward, backward;
};

template <class T>
void pack_layer(const Packing<T>& context, int network, Index set, Index l) {
    const MLPPlan& plan = *context.plan;
    const NetworkPlan& net = plan.networks[network];
    const LayerPlan& layer = net.layer[l];
    const Network<T>& source = context.p->networks[network];
    const T* weight = source.weight[l] + set * layer.out * layer.in;
    const T* bias = source.bias[l] + set * layer.out;
    T* packed = context.packed + net.packed_at + set * net.packed_set;
    const Index out = padded<T>(layer.out);
    if (context.forward) {
        clear(packed + layer.bias_at, out);
        copy(packed + layer.bias_at, bias, layer.out);
        if (plan.rows)
            pack_columns(packed + layer.forward_at, weight, layer.in, layer.out, true);
        else
            pack_panels(packed + layer.forward_at, weight, layer.out, layer.in, layer.in, 1, plan.vectors,
                        layer.split_forward);
    }
    if (!context.backward) return;
    if (!plan.rows)
        return pack_panels(packed + layer.backward_at, weight, layer.in, layer.out, 1, layer.in, plan.vectors,
                           layer.split_backward);
    pack_columns(packed + layer.backward_at, weight, layer.out, layer.in, false);
}

// The layer of a network and set that a task is about.
struct Item {
    int network;
    Index set, layer;
};
Item item_of(const MLPPlan& plan, Index task) {
    for (int network = 0;; ++network) {
        const NetworkPlan& net = plan.networks[network];
        if (task < net.sets * net.layers) return {network, task / net.layers, task % net.layers};
        task -= net.sets * net.layers;
    }
}
Index items(const MLPPlan& plan) {
    Index count = 0;
    for (int network = 0; network < plan.n_networks; ++network)
        count += plan.networks[network].sets * plan.networks[network].layers;
    return count;
}

template <class T>
void pack(const MLPOdeint<T>& p, const MLPPlan& plan, T* packed, bool forward, bool backward) {
    const Packing<T> context{&p, &plan, packed, forward, backward};
    const auto body = [](const void* c, Index task, int) {
        const auto& packing = *static_cast<const Packing<T>*>(c);
        const Item item = item_of(*packing.plan, task);
        pack_layer(packing, item.network, item.set, item.layer);
    };
    parallel_tasks(items(plan), plan.packed < (1 << 16) ? 1 : p.threads, body, &context);
}

template <class T>
struct Run {
    const MLPOdeint<T>* p;
    const MLPPlan* plan;
    const MLPOdeintGradients<T>* g;
    const T* packed;
    T* memory;
    Index workspace;  // elements for each task
    T* tape;
    bool weights, times;  // whether their gradients are wanted
    Divergence* divergence;
};

// Memory of a task: its carrier's, and behind that, for a backward, its sums.
template <class T>
Index workspace(const MLPOdeint<T>& p, const MLPPlan& plan, bool backward) {
    Arena<T> arena(nullptr);
    const Carrier<T> carrier(p, plan, nullptr, arena, backward);
    return arena.used() +
           (backward ? aligned<T>(plan.gradients) + 2 * aligned<double>(plan.steps) * 8 / Index(sizeof(T)) : 0);
}

template <class T>
struct Sums {
    T* gradients;
    double *step, *time;
};
template <class T>
Sums<T> sums_of(const Run<T>& run, Index task) {
    T* end = run.memory + (task + 1) * run.workspace;
    double* time = reinterpret_cast<double*>(end) - aligned<double>(run.plan->steps);
    double* step = time - aligned<double>(run.plan->steps);
    return {reinterpret_cast<T*>(step) - aligned<T>(run.plan->gradients), step, time};
}

template <class T>
void run_task(const Run<T>& run, Index task, bool backward) {
    const MLPPlan& plan = *run.plan;
    Arena<T> arena(run.memory + task * run.workspace);
    Carrier<T> carrier(*run.p, plan, run.packed, arena, backward);
    if (backward) {
        const Sums<T> sums = sums_of(run, task);
        if (run.weights) {
            clear(sums.gradients, plan.gradients);
            carrier.gradients = sums.gradients;
        }
        if (run.times) {
            clear(sums.step, plan.steps);
            clear(sums.time, plan.steps);
            carrier.grad_step = sums.step;
            carrier.grad_time = sums.time;
        }
    }
    const Index tape_block = plan.tape_block;
    for (Index b = plan.n_blocks * task / plan.tasks; b < plan.n_blocks * (task + 1) / plan.tasks; ++b) {
        T* tape = run.tape == nullptr ? nullptr : run.tape + b * tape_block;
        if (backward)
            carrier.backward(plan.blocks[b], *run.g, tape);
        else
            carrier.forward(plan.blocks[b], tape);
    }
    if (!backward) run.divergence[task] = carrier.divergence;
}

template <class T>
void forward(const MLPOdeint<T>& p, const MLPPlan& plan, T* memory, T* tape, Divergence* divergence) {
    pack(p, plan, memory, true, false);
    const Run<T> run{&p,   &plan, nullptr, memory,    memory + aligned<T>(plan.packed), workspace(p, plan, false),
                     tape, false, false,   divergence};
    const auto body = [](const void* c, Index task, int) { run_task(*static_cast<const Run<T>*>(c), task, false); };
    parallel_tasks(plan.tasks, p.threads, body, &run);
}

// The sums of all tasks, in their order, to where the gradients of a layer go.
template <class T>
void reduce_layer(const Run<T>& run, const Item& item) {
    const MLPPlan& plan = *run.plan;
    const NetworkPlan& net = plan.networks[item.network];
    const LayerPlan& layer = net.layer[item.layer];
    const Network<T>& to = run.p->networks[item.network];
    const Index offset = net.grad_at + item.set * net.grad_set, row = padded<T>(layer.in);
    constexpr int lanes = Vec<T>::lanes;
    T* weight = to.grad_weight[item.layer];
    T* bias = to.grad_bias[item.layer];
    for (Index task = 0; task < plan.tasks; ++task) {
        const T* sums = sums_of(run, task).gradients + offset;
        if (weight != nullptr)
            for (Index o = 0; o < layer.out; ++o) {
                T* out = weight + (item.set * layer.out + o) * layer.in;
                const T* in = sums + layer.grad_weight_at + o * row;
                if (task == 0)
                    copy(out, in, layer.in);
                else
                    add_scaled(out, T(1), in, layer.in);
            }
        if (bias != nullptr)
            for (Index o = 0; o < layer.out; ++o) {
                const T* in = sums + layer.grad_bias_at + (plan.rows ? o : o * lanes);
                T& out = bias[item.set * layer.out + o];
                out = (task == 0 ? T(0) : out) + (plan.rows ? *in : sum_of_lanes(Vec<T>::load(in)));
            }
        if (to.grad_slope != nullptr && item.layer < net.layers - 1) {
            T& out = to.grad_slope[item.set * (net.layers - 1) + item.layer];
            out = (task == 0 ? T(0) : out) + sums[net.grad_slope_at + item.layer];
        }
    }
}

// t[i] + j h is the time of sub-step j of interval i, h = (t[i+1] - t[i]) / substeps.
template <class T>
void reduce_times(const Run<T>& run) {
    const MLPOdeint<T>& p = *run.p;
    const double parts = static_cast<double>(p.substeps);
    clear(run.g->grad_t, p.times);
    double left = 0;
    for (Index i = 0; i < p.times; ++i) {  // of t[i]: from the interval before it, and from that after it
        double grad = left;
        left = 0;
        for (Index j = 0; i + 1 < p.times && j < p.substeps; ++j) {
            double size = 0, time = 0;
            for (Index task = 0; task < run.plan->tasks; ++task) {
                const Sums<T> sums = sums_of(run, task);
                size += sums.step[i * p.substeps + j];
                time += sums.time[i * p.substeps + j];
            }
            const double slope = (size + static_cast<double>(j) * time) / parts;
            grad += time - slope;
            left += slope;
        }
        run.g->grad_t[i] = grad;
    }
}

template <class T>
void backward(const MLPOdeint<T>& p, const MLPPlan& plan, const MLPOdeintGradients<T>& g, T* memory, const T* tape) {
    pack(p, plan, memory, !plan.whole_tape, true);
    bool weights = false;
    for (int network = 0; network < plan.n_networks; ++network) {
        const Network<T>& net = p.networks[network];
        weights = weights || net.grad_slope != nullptr;
        for (Index l = 0; l < net.layers; ++l)
            weights = weights || net.grad_weight[l] != nullptr || net.grad_bias[l] != nullptr;
    }
    const Run<T> run{&p,
                     &plan,
                     &g,
                     memory,
                     memory + aligned<T>(plan.packed),
                     workspace(p, plan, true),
                     const_cast<T*>(tape),
                     weights,
                     g.grad_t != nullptr,
                     nullptr};
    const auto body = [](const void* c, Index task, int) { run_task(*static_cast<const Run<T>*>(c), task, true); };
    parallel_tasks(plan.tasks, p.threads, body, &run);
    if (run.times) reduce_times(run);
    if (!weights) return;
    const auto reduce = [](const void* c, Index task, int) {
        const auto& all = *static_cast<const Run<T>*>(c);
        reduce_layer(all, item_of(*all.plan, task));
    };
    parallel_tasks(items(plan), plan.gradients < (1 << 16) ? 1 : p.threads, reduce, &run);
}

template <class T>
Index memory_of(const MLPOdeint<T>& p, const MLPPlan& plan, bool backward) {
    return aligned<T>(plan.packed) + plan.tasks * workspace(p, plan, backward);
}

}  // namespace

void mlp_odeint_lanes(int* of_float, int* of_double) {
    *of_float = Vec<float>::lanes;
    *of_double = Vec<double>::lanes;
}

#define PK_DEFINE(T)                                                                                                  \
    void mlp_odeint_memory(const MLPOdeint<T>& p, const MLPPlan& plan, bool backward, Index* elements) {              \
        *elements = memory_of(p, plan, backward);                                                                     \
    }                                                                                                                 \
    void mlp_odeint_forward(const MLPOdeint<T>& p, const MLPPlan& plan, T* memory, T* tape, Divergence* divergence) { \
        forward(p, plan, memory, tape, divergence);                                                                   \
    }                                                                                                                 \
    void mlp_odeint_backward(const MLPOdeint<T>& p, const MLPPlan& plan, const MLPOdeintGradients<T>& g, T* memory,   \
                             const T* tape) {                                                                         \
        backward(p, plan, g, memory, tape);                                                                           \
    }
PK_DEFINE(float)
PK_DEFINE(double)
#undef PK_DEFINE

PK_ISA_END
