// Trajectories of dy/dt = MLP(...) by explicit Runge-Kutta steps, and their exact discrete adjoint, in one call each.
//
// Each thread carries its own samples through all steps:
//
//      samples                       a block of samples; its states and activations stay in the cache
//   +----------+     step 0             step 1                     step N-1
//   | block 0  |  [stages x layers]  [stages x layers]   ...   [stages x layers]      thread 0
//   | block 1  |  [stages x layers]  [stages x layers]   ...   [stages x layers]      thread 1
//   +----------+
//
// A block lies in memory in one of two ways. Many samples: lanes, element (feature f, sample s) at f * width + s, so that the
// vectors run along the samples and nothing is padded but the samples. Where the samples would not fill their vectors: rows,
// (f, s) at s * padded(features) + f, where the vectors run along the features. pykernels/ops/latent_ode/README.md derives the
// adjoint.
//
// Cost: 2 * stages * steps * samples * sum(in * out) flops forward, twice that again backward.
#pragma once

#include <cstdint>

namespace pk {

enum class FieldActivation : int { relu, leaky_relu, tanh, softplus, silu, elu, sin };
enum class InputMap : int { none, square, cube, sin, cos, tanh };
enum class Energy : int { none, plain, time };

constexpr int most_stages = 4;

// y + h sum_i b[i] k[i], k[i] = f(t + c[i] h, y + h sum_{j<i} a[i][j] k[j]).
struct RungeKutta {
    int stages;
    double a[most_stages][most_stages], b[most_stages], c[most_stages];
};

// Linear layers with activations between them: `sets` networks of the same sizes.
template <class T>
struct Network {
    std::int64_t layers, sets;
    const std::int64_t* width;  // layers + 1: the inputs of each layer, and the outputs of the last
    const T* const* weight;     // of each layer: (sets, out, in)
    const T* const* bias;       // (sets, out)
    const T* slope;             // of silu: (sets, layers - 1), or null
    T* const* grad_weight;      // these, or null where not wanted
    T* const* grad_bias;
    T* grad_slope;
};

template <class T>
struct MLPOdeint {
    std::int64_t batch, dim, control_dim, times, substeps;
    RungeKutta method;
    FieldActivation activation;
    T slope;
    bool time_input;
    InputMap input_map;
    Energy energy_kind;
    bool check_finite;
    // The shared one, whose set n mod sets serves sub-step n, and perhaps the corrections of groups.
    const Network<T>* networks;
    int n_networks;
    const T* y0;                // (batch, dim)
    const double* t;            // (times)
    const T* control;           // (times - 1, batch, control_dim), or null
    const std::uint8_t* mask;   // (times, batch), or null
    const T* injected;          // (times, batch, dim)
    const std::int64_t* group;  // (batch) below the sets of the correction, or null
    T* states;                  // (times, batch, dim)
    T* norms;                   // (times - 1, batch), or null
    T* energy;                  // (times - 1, batch), or null
    std::int64_t max_memory;    // bytes for the tape
    int threads;
};

template <class T>
struct MLPOdeintGradients {
    const T* grad_states;  // (times, batch, dim)
    const T* grad_norms;   // (times - 1, batch), or null
    const T* grad_energy;  // (times - 1, batch), or null
    T* grad_y0;            // these, or null where not wanted
    double* grad_t;
    T* grad_control;
    T* grad_injected;
};

// Where a state is first not finite: after which sub-step, from 0, and in which sample; step -1 if nowhere.
struct Divergence {
    std::int64_t step, sample;
};

// Elements of the tape that a forward with these arguments fills for its backward.
std::int64_t mlp_odeint_tape(const MLPOdeint<float>& p);
std::int64_t mlp_odeint_tape(const MLPOdeint<double>& p);

// `tape` may be null. The first divergence is found if check_finite.
Divergence mlp_odeint_forward(const MLPOdeint<float>& p, float* tape);
Divergence mlp_odeint_forward(const MLPOdeint<double>& p, double* tape);

void mlp_odeint_backward(const MLPOdeint<float>& p, const MLPOdeintGradients<float>& g, const float* tape);
void mlp_odeint_backward(const MLPOdeint<double>& p, const MLPOdeintGradients<double>& g, const double* tape);

}  // namespace pk
