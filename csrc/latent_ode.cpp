// Trajectories of MLP fields for Python; see cpu_module.cpp for how tensors arrive.

#include "latent_ode.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "common/isa.hpp"
#include "common/parallel.hpp"
#include "latent_ode/mlp_odeint.hpp"

namespace py = pybind11;

namespace {

// Widths of the layers, sets, weights, biases, slopes, and where the gradients of these three go (0: nowhere).
using NetworkRecord =
    std::tuple<std::vector<std::int64_t>, std::int64_t, Addresses, Addresses, Address, Addresses, Addresses, Address>;
// batch, dim, control_dim, times, substeps, activation, time_input, input_map, energy, check_finite, max_memory, threads
using Sizes = std::array<std::int64_t, 12>;
// y0, t, control, mask, injected, group, states, norms, energy
using Arrays = std::array<Address, 9>;
// grad_states, grad_norms, grad_energy, and the gradients of y0, t, control, injected
using GradientArrays = std::array<Address, 7>;

// Elements in front of the tape: the number of threads and the capability that it was written with, on which its layout
// depends.
constexpr std::int64_t header = 16;

pk::RungeKutta runge_kutta(const std::vector<double>& c, const std::vector<std::vector<double>>& a,
                           const std::vector<double>& b) {
    pk::RungeKutta method{};
    if (b.empty() || b.size() > pk::most_stages || c.size() != b.size() || a.size() != b.size())
        throw std::invalid_argument("a method must have 1 to 4 stages");
    method.stages = static_cast<int>(b.size());
    for (std::size_t i = 0; i < b.size(); ++i) {
        method.b[i] = b[i];
        method.c[i] = c[i];
        if (a[i].size() != i) throw std::invalid_argument("row i of a must have i entries");
        for (std::size_t j = 0; j < i; ++j) method.a[i][j] = a[i][j];
    }
    return method;
}

// Keeps the arrays that MLPOdeint points to.
template <class T>
class Problem {
public:
    Problem(const pk::RungeKutta& method, const Sizes& sizes, double slope, const std::vector<NetworkRecord>& networks,
            const Arrays& arrays)
        : records_(networks) {
        const auto [batch, dim, control_dim, times, substeps, activation, time_input, input_map, energy, check_finite,
                    max_memory, threads] = sizes;
        if (batch < 0 || dim < 1 || control_dim < 0 || times < 1 || substeps < 1 || networks.empty() ||
            networks.size() > 2)
            throw std::invalid_argument("inconsistent sizes; call pykernels.mlp_odeint, which says what is wrong");
        parts_.resize(records_.size());
        for (std::size_t n = 0; n < records_.size(); ++n) {
            const auto& [width, sets, weights, biases, slopes, grad_weights, grad_biases, grad_slope] = records_[n];
            const std::size_t layers = weights.size();
            if (layers < 1 || width.size() != layers + 1 || biases.size() != layers || sets < 1 ||
                width.back() != dim || width.front() != dim + control_dim + (time_input != 0 ? 1 : 0) ||
                (!grad_weights.empty() && (grad_weights.size() != layers || grad_biases.size() != layers)))
                throw std::invalid_argument("inconsistent layers; call pykernels.mlp_odeint, which says what is wrong");
            Parts& parts = parts_[n];
            parts.weights = pointers<const T>(weights);
            parts.biases = pointers<const T>(biases);
            parts.grad_weights = pointers<T>(grad_weights);
            parts.grad_biases = pointers<T>(grad_biases);
            networks_.push_back({static_cast<std::int64_t>(layers), sets, width.data(), parts.weights.data(),
                                 parts.biases.data(), pointer<const T>(slopes), parts.grad_weights.data(),
                                 parts.grad_biases.data(), pointer<T>(grad_slope)});
        }
        const auto [y0, t, control, mask, injected, group, states, norms, energies] = arrays;
        const bool grouped = group != 0 || (batch == 0 && networks_.size() == 2);  // of no samples, at no address
        if (grouped != (networks_.size() == 2) || (mask != 0) != (injected != 0) || (control != 0 && control_dim == 0))
            throw std::invalid_argument("a group needs two networks, a mask injected states");
        p_ = {batch,
              dim,
              control_dim,
              times,
              substeps,
              method,
              enumerator(activation, pk::FieldActivation::sin),
              static_cast<T>(slope),
              time_input != 0,
              enumerator(input_map, pk::InputMap::tanh),
              enumerator(energy, pk::Energy::time),
              check_finite != 0,
              networks_.data(),
              static_cast<int>(networks_.size()),
              pointer<const T>(y0),
              pointer<const double>(t),
              pointer<const T>(control),
              pointer<const std::uint8_t>(mask),
              pointer<const T>(injected),
              pointer<const std::int64_t>(group),
              pointer<T>(states),
              pointer<T>(norms),
              pointer<T>(energies),
              max_memory,
              static_cast<int>(threads)};
        for (std::int64_t s = 0; group != 0 && s < batch; ++s)
            if (p_.group[s] < 0 || p_.group[s] >= networks_[1].sets)
                throw std::invalid_argument("a group is out of range");
    }
    Problem(const Problem&) = delete;
    Problem& operator=(const Problem&) = delete;
    const pk::MLPOdeint<T>& get() const { return p_; }

private:
    struct Parts {
        std::vector<const T*> weights, biases;
        std::vector<T*> grad_weights, grad_biases;
    };
    const std::vector<NetworkRecord>& records_;
    std::vector<Parts> parts_;
    std::vector<pk::Network<T>> networks_;
    pk::MLPOdeint<T> p_{};
};

template <class T>
std::int64_t tape(const pk::RungeKutta& method, const Sizes& sizes, double slope,
                  const std::vector<NetworkRecord>& networks, const Arrays& arrays) {
    return header + pk::mlp_odeint_tape(Problem<T>(method, sizes, slope, networks, arrays).get());
}

template <class T>
std::pair<std::int64_t, std::int64_t> forward(const pk::RungeKutta& method, const Sizes& sizes, double slope,
                                              const std::vector<NetworkRecord>& networks, const Arrays& arrays,
                                              Address tape) {
    const Problem<T> problem(method, sizes, slope, networks, arrays);
    const py::gil_scoped_release release;
    const pk::MLPOdeint<T>& p = problem.get();
    pk::expect_writes(p.states, static_cast<std::size_t>(p.times * p.batch * p.dim) * sizeof(T));
    T* const begin = pointer<T>(tape);
    if (begin != nullptr) {
        std::fill_n(begin, header, T(0));
        begin[0] = static_cast<T>(pk::usable_threads(p.threads));
        begin[1] = static_cast<T>(pk::active_isa());
    }
    const pk::Divergence divergence = pk::mlp_odeint_forward(p, begin == nullptr ? nullptr : begin + header);
    return {divergence.step, divergence.sample};
}

template <class T>
void backward(const pk::RungeKutta& method, const Sizes& sizes, double slope,
              const std::vector<NetworkRecord>& networks, const Arrays& arrays, Address tape,
              std::int64_t tape_elements, const GradientArrays& gradients) {
    const T* const begin = pointer<const T>(tape);
    Sizes as_then = sizes;  // with the forward's number of threads
    as_then[11] = tape_elements < header || !(begin[0] >= 1 && begin[0] <= 1024) ? 0 : static_cast<int>(begin[0]);
    const Problem<T> problem(method, as_then, slope, networks, arrays);
    const py::gil_scoped_release release;
    const pk::MLPOdeint<T>& p = problem.get();
    if (p.threads == 0 || begin[1] != static_cast<T>(pk::active_isa()) || p.threads != pk::usable_threads(p.threads) ||
        tape_elements != header + pk::mlp_odeint_tape(p))
        throw std::invalid_argument("saved is not of this forward, or of another CPU capability or process");
    const auto [states, norms, energy, y0, t, control, injected] = gradients;
    pk::mlp_odeint_backward(p,
                            {pointer<const T>(states), pointer<const T>(norms), pointer<const T>(energy),
                             pointer<T>(y0), pointer<double>(t), pointer<T>(control), pointer<T>(injected)},
                            begin + header);
}

}  // namespace

void bind_latent_ode(py::module_& m) {
    py::class_<pk::RungeKutta>(m, "RungeKutta").def(py::init(&runge_kutta));
    m.def("mlp_odeint_tape_float", &tape<float>);
    m.def("mlp_odeint_tape_double", &tape<double>);
    m.def("mlp_odeint_forward_float", &forward<float>);
    m.def("mlp_odeint_forward_double", &forward<double>);
    m.def("mlp_odeint_backward_float", &backward<float>);
    m.def("mlp_odeint_backward_double", &backward<double>);
}
