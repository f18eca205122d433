// pykernels._cpu: the CPU kernels for Python. Tensors arrive as addresses, sizes and strides in elements, so that the module
// needs neither torch nor numpy to build or to load. Callers are pykernels/ops/*/op.py, which own the memory and have
// checked the arguments; what is checked again here is what keeps every access inside the memory described.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "causal_conv/causal_conv.hpp"
#include "causal_conv/pooled.hpp"
#include "causal_conv/weight_norm.hpp"
#include "common/isa.hpp"
#include "common/parallel.hpp"

namespace py = pybind11;

namespace {

using Addresses = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>;  // values, times, h of a pool
using Strides = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

template <class T>
pk::View3<T> view(std::uintptr_t address, const Strides& strides) {
    return {reinterpret_cast<T*>(address), std::get<0>(strides), std::get<1>(strides), std::get<2>(strides)};
}

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

pk::Activation activation_from(int code) {
    if (code < 0 || code > static_cast<int>(pk::Activation::tanh))
        throw std::invalid_argument("unknown activation code");
    return static_cast<pk::Activation>(code);
}

pk::ConvShape conv_shape(const Strides& x_shape, const Strides& weight_shape, std::int64_t dilation) {
    const auto [batch, in_channels, length] = x_shape;
    const auto [out_channels, weight_channels, kernel_size] = weight_shape;
    if (batch < 0 || in_channels < 1 || length < 0 || out_channels < 0 || kernel_size < 1 || dilation < 1 ||
        weight_channels != in_channels)
        throw std::invalid_argument("inconsistent shapes; call pykernels.causal_conv1d, which says what is wrong");
    return {batch, in_channels, out_channels, length, kernel_size, dilation};
}

template <class T>
void forward(const pk::ConvShape& shape, std::uintptr_t x, const Strides& x_strides, std::uintptr_t weight,
             std::uintptr_t bias, std::uintptr_t residual, const Strides& residual_strides, std::uintptr_t y,
             std::uintptr_t h, const Addresses& pool, pk::Activation activation, double negative_slope, int threads) {
    const auto [pool_value, pool_time, pool_h] = pool;
    const pk::CausalConvForward<T> p{shape,
                                     view<const T>(x, x_strides),
                                     pointer<const T>(weight),
                                     pointer<const T>(bias),
                                     view<const T>(residual, residual_strides),
                                     pointer<T>(y),
                                     pointer<T>(h),
                                     {pointer<T>(pool_value), pointer<std::int64_t>(pool_time), pointer<T>(pool_h)},
                                     activation,
                                     static_cast<T>(negative_slope),
                                     threads};
    const py::gil_scoped_release release;
    pk::causal_conv_forward(p);
}

void causal_conv1d_forward(bool is_double, const Strides& x_shape, const Strides& weight_shape, std::int64_t dilation,
                           std::uintptr_t x, const Strides& x_strides, std::uintptr_t weight, std::uintptr_t bias,
                           std::uintptr_t residual, const Strides& residual_strides, std::uintptr_t y, std::uintptr_t h,
                           const Addresses& pool, int activation, double negative_slope, int threads) {
    const auto [pool_value, pool_time, pool_h] = pool;
    const auto [batch, in_channels, length] = x_shape;
    if (pool_value != 0 && (pool_time == 0 || length == 0))
        throw std::invalid_argument("a pool needs values, times and at least one sample");
    if (pool_value == 0 && y == 0 && batch > 0 && length > 0)  // an empty tensor has no address
        throw std::invalid_argument("there is nowhere to write the output to");
    if (residual != 0 && std::get<2>(residual_strides) != 1)
        throw std::invalid_argument("the residual's time stride must be 1");
    (is_double ? forward<double> : forward<float>)(conv_shape(x_shape, weight_shape, dilation), x, x_strides, weight,
                                                   bias, residual, residual_strides, y, h, pool,
                                                   activation_from(activation), negative_slope, threads);
}

template <class T>
void backward(const pk::ConvShape& shape, std::uintptr_t grad_y, const Strides& grad_y_strides, std::uintptr_t h,
              const Strides& h_strides, std::uintptr_t x, const Strides& x_strides, std::uintptr_t weight,
              std::uintptr_t addend, const Strides& addend_strides, std::uintptr_t grad_x, std::uintptr_t grad_weight,
              std::uintptr_t grad_bias, pk::Activation activation, double negative_slope, int threads) {
    const pk::CausalConvBackward<T> p{shape,
                                      view<const T>(grad_y, grad_y_strides),
                                      view<const T>(h, h_strides),
                                      view<const T>(x, x_strides),
                                      pointer<const T>(weight),
                                      view<const T>(addend, addend_strides),
                                      pointer<T>(grad_x),
                                      pointer<T>(grad_weight),
                                      pointer<T>(grad_bias),
                                      activation,
                                      static_cast<T>(negative_slope),
                                      threads};
    const py::gil_scoped_release release;
    pk::causal_conv_backward(p);
}

void causal_conv1d_backward(bool is_double, const Strides& x_shape, const Strides& weight_shape, std::int64_t dilation,
                            std::uintptr_t grad_y, const Strides& grad_y_strides, std::uintptr_t h,
                            const Strides& h_strides, std::uintptr_t x, const Strides& x_strides, std::uintptr_t weight,
                            std::uintptr_t addend, const Strides& addend_strides, std::uintptr_t grad_x,
                            std::uintptr_t grad_weight, std::uintptr_t grad_bias, int activation, double negative_slope,
                            int threads) {
    if (std::get<2>(x_strides) != 1 || (addend != 0 && std::get<2>(addend_strides) != 1))
        throw std::invalid_argument("the time stride of x and of the addend must be 1");
    (is_double ? backward<double> : backward<float>)(conv_shape(x_shape, weight_shape, dilation), grad_y,
                                                     grad_y_strides, h, h_strides, x, x_strides, weight, addend,
                                                     addend_strides, grad_x, grad_weight, grad_bias,
                                                     activation_from(activation), negative_slope, threads);
}

template <class T>
void backward_at(const pk::ConvShape& shape, std::uintptr_t dz, std::uintptr_t time, std::uintptr_t x,
                 const Strides& x_strides, std::uintptr_t weight, std::uintptr_t grad_x, std::uintptr_t grad_weight,
                 int threads) {
    const pk::CausalConvBackwardAt<T> p{shape,
                                        pointer<const T>(dz),
                                        pointer<const std::int64_t>(time),
                                        view<const T>(x, x_strides),
                                        pointer<const T>(weight),
                                        pointer<T>(grad_x),
                                        pointer<T>(grad_weight),
                                        threads};
    const py::gil_scoped_release release;
    pk::causal_conv_backward_at(p);
}

void causal_conv1d_backward_at(bool is_double, const Strides& x_shape, const Strides& weight_shape,
                               std::int64_t dilation, std::uintptr_t dz, std::uintptr_t time, std::uintptr_t x,
                               const Strides& x_strides, std::uintptr_t weight, std::uintptr_t grad_x,
                               std::uintptr_t grad_weight, int threads) {
    const pk::ConvShape shape = conv_shape(x_shape, weight_shape, dilation);
    const auto* times = pointer<const std::int64_t>(time);
    for (std::int64_t i = 0; i < shape.batch * shape.out_channels; ++i)
        if (times[i] < 0 || times[i] >= shape.length) throw std::invalid_argument("a time lies outside the series");
    (is_double ? backward_at<double> : backward_at<float>)(shape, dz, time, x, x_strides, weight, grad_x, grad_weight,
                                                           threads);
}

// Addresses and sizes of one weight, as the fields of WeightNormForward or WeightNormBackward.
using WeightNormForwardRecord = std::array<std::uintptr_t, 5>;
using WeightNormBackwardRecord = std::array<std::uintptr_t, 7>;

template <class T>
void weight_norm_forward_of(const std::vector<WeightNormForwardRecord>& records, int threads) {
    std::vector<pk::WeightNormForward<T>> weights;
    for (const auto& [v, g, w, rows, columns] : records)
        weights.push_back({pointer<const T>(v), pointer<const T>(g), pointer<T>(w), static_cast<std::int64_t>(rows),
                           static_cast<std::int64_t>(columns)});
    const py::gil_scoped_release release;
    pk::weight_norm_forward(weights.data(), static_cast<std::int64_t>(weights.size()), threads);
}

template <class T>
void weight_norm_backward_of(const std::vector<WeightNormBackwardRecord>& records, int threads) {
    std::vector<pk::WeightNormBackward<T>> weights;
    for (const auto& [v, g, grad_w, grad_v, grad_g, rows, columns] : records)
        weights.push_back({pointer<const T>(v), pointer<const T>(g), pointer<const T>(grad_w), pointer<T>(grad_v),
                           pointer<T>(grad_g), static_cast<std::int64_t>(rows), static_cast<std::int64_t>(columns)});
    const py::gil_scoped_release release;
    pk::weight_norm_backward(weights.data(), static_cast<std::int64_t>(weights.size()), threads);
}

void weight_norm_forward(bool is_double, const std::vector<WeightNormForwardRecord>& records, int threads) {
    (is_double ? weight_norm_forward_of<double> : weight_norm_forward_of<float>)(records, threads);
}

void weight_norm_backward(bool is_double, const std::vector<WeightNormBackwardRecord>& records, int threads) {
    (is_double ? weight_norm_backward_of<double> : weight_norm_backward_of<float>)(records, threads);
}

// "x86_64_v3" is the C++ name; Python and the environment variable write x86-64-v3.
std::string public_name(pk::Isa isa) {
    std::string name = pk::isa_name(isa);
    for (std::size_t at = name.find("_v"); at != std::string::npos; at = std::string::npos) name[at] = '-';
    if (name.rfind("x86_64", 0) == 0) name[3] = '-';
    return name;
}

py::list capabilities() {
    py::list names;
    for (int i = 0; i < pk::isa_count; ++i)
        if (pk::isa_supported(static_cast<pk::Isa>(i))) names.append(public_name(static_cast<pk::Isa>(i)));
    return names;
}

void set_capability(const std::string& name) {
    for (int i = 0; i < pk::isa_count; ++i) {
        const auto isa = static_cast<pk::Isa>(i);
        if (public_name(isa) == name && pk::isa_supported(isa)) return pk::set_active_isa(isa);
    }
    throw std::invalid_argument("CPU capability '" + name + "' is unknown or not supported by this machine");
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
    m.doc() = "CPU kernels of pykernels; private, see pykernels.ops.";
    m.def("capabilities", &capabilities, "Names of the CPU capabilities that this machine runs, from least to best.");
    m.def("capability", [] { return public_name(pk::active_isa()); }, "Name of the capability in use.");
    m.def("set_capability", &set_capability, py::arg("name"));
    m.def("has_openmp", &pk::has_openmp);
    m.def("causal_conv1d_forward", &causal_conv1d_forward);
    m.def("causal_conv1d_backward", &causal_conv1d_backward);
    m.def("causal_conv1d_backward_at", &causal_conv1d_backward_at);
    m.def("weight_norm_forward", &weight_norm_forward);
    m.def("weight_norm_backward", &weight_norm_backward);
}
