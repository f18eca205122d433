// Stage combinations for Python; called by pykernels/ops/latent_ode/combine.py, which has checked the arguments.

#include "combine.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "arguments.hpp"
#include "common/parallel.hpp"
#include "latent_ode/combine.hpp"

namespace py = pybind11;

namespace {

void check(const Addresses& arrays, const std::vector<double>& coefficients, std::int64_t n) {
    if (arrays.empty() || arrays.size() != coefficients.size() || n < 0)
        throw std::invalid_argument("a combination needs as many coefficients as stages, at least one");
}

template <class T>
void combine_of(std::int64_t n, std::uintptr_t y, const Addresses& k, const std::vector<double>& coefficients,
                std::uintptr_t out, int threads) {
    const std::vector<const T*> stages = pointers<const T>(k);
    const std::vector<T> c(coefficients.begin(), coefficients.end());
    T* result = reinterpret_cast<T*>(out);
    const py::gil_scoped_release release;
    pk::expect_writes(result, static_cast<std::size_t>(n) * sizeof(T));
    pk::combine(pk::Combine<T>{reinterpret_cast<const T*>(y), stages.data(), c.data(), result,
                               static_cast<std::int64_t>(c.size()), n},
                threads);
}

template <class T>
void combine_backward_of(std::int64_t n, std::uintptr_t grad, const std::vector<double>& coefficients,
                         const Addresses& grad_k, int threads) {
    const std::vector<T*> results = pointers<T>(grad_k);
    const std::vector<T> c(coefficients.begin(), coefficients.end());
    const py::gil_scoped_release release;
    for (T* result : results) pk::expect_writes(result, static_cast<std::size_t>(n) * sizeof(T));
    pk::combine_backward(pk::CombineBackward<T>{reinterpret_cast<const T*>(grad), c.data(), results.data(),
                                                static_cast<std::int64_t>(c.size()), n},
                         threads);
}

void combine(bool is_double, std::int64_t n, std::uintptr_t y, const Addresses& k,
             const std::vector<double>& coefficients, std::uintptr_t out, int threads) {
    check(k, coefficients, n);
    (is_double ? combine_of<double> : combine_of<float>)(n, y, k, coefficients, out, threads);
}

void combine_backward(bool is_double, std::int64_t n, std::uintptr_t grad, const std::vector<double>& coefficients,
                      const Addresses& grad_k, int threads) {
    check(grad_k, coefficients, n);
    (is_double ? combine_backward_of<double> : combine_backward_of<float>)(n, grad, coefficients, grad_k, threads);
}

}  // namespace

void bind_combine(py::module_& m) {
    m.def("ode_combine", &combine);
    m.def("ode_combine_backward", &combine_backward);
}
