// Penalties of motion fields for Python; called by pykernels/ops/gaussian_warp/penalties_cpu.py, which has checked the
// arguments.

#include "flow_penalties.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "arguments.hpp"
#include "common/parallel.hpp"
#include "gaussian_warp/flow_penalties.hpp"

namespace py = pybind11;

namespace {

using Coefficients = std::array<double, 3>;  // of divergence, magnitude, smoothness

template <class T>
pk::FlowPenalties<T> problem(std::int64_t batch, const std::vector<std::int64_t>& sizes, Address flow, bool xy,
                             const Coefficients& coefficients) {
    const int ranks = static_cast<int>(sizes.size());
    if (batch < 0 || ranks < 1 || ranks > 3 || *std::min_element(sizes.begin(), sizes.end()) < 1)
        throw std::invalid_argument("inconsistent sizes; call pykernels.flow_penalties, which says what is wrong");
    pk::FlowPenalties<T> p{reinterpret_cast<const T*>(flow),
                           batch,
                           ranks,
                           {1, 1, 1},
                           {-1, -1, -1},
                           coefficients[0],
                           coefficients[1],
                           coefficients[2]};
    for (int i = 0; i < ranks; ++i) {
        p.size[3 - ranks + i] = sizes[static_cast<std::size_t>(i)];
        p.channel[3 - ranks + i] = xy ? ranks - 1 - i : i;
    }
    return p;
}

template <class T>
void forward(std::int64_t batch, const std::vector<std::int64_t>& sizes, Address flow, bool xy,
             const Coefficients& coefficients, Address values, int threads) {
    const pk::FlowPenalties<T> p = problem<T>(batch, sizes, flow, xy, coefficients);
    const py::gil_scoped_release release;
    pk::flow_penalties(p, reinterpret_cast<T*>(values), threads);
}

template <class T>
void backward(std::int64_t batch, const std::vector<std::int64_t>& sizes, Address flow, bool xy,
              const Coefficients& coefficients, Address grads, Address grad_flow, int threads) {
    const pk::FlowPenalties<T> p = problem<T>(batch, sizes, flow, xy, coefficients);
    const py::gil_scoped_release release;
    T* const result = reinterpret_cast<T*>(grad_flow);
    const std::int64_t elements = batch * p.ranks * p.size[0] * p.size[1] * p.size[2];
    pk::expect_writes(result, static_cast<std::size_t>(elements) * sizeof(T));
    pk::flow_penalties_backward(p, reinterpret_cast<const T*>(grads), result, threads);
}

}  // namespace

void bind_flow_penalties(py::module_& m) {
    m.def("flow_penalties_float", &forward<float>);
    m.def("flow_penalties_double", &forward<double>);
    m.def("flow_penalties_backward_float", &backward<float>);
    m.def("flow_penalties_backward_double", &backward<double>);
}
