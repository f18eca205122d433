// Gaussian warping for Python; called by pykernels/ops/gaussian_warp/cpu.py, which has checked the arguments.

#include "gaussian_warp.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>

#include "arguments.hpp"
#include "common/parallel.hpp"
#include "gaussian_warp/gaussian_warp.hpp"

namespace py = pybind11;

namespace {

template <std::size_t n>
using Numbers = std::array<std::int64_t, n>;

// Coordinates and displacements are 32-bit numbers in the kernels, and their sums must be too.
constexpr std::int64_t largest_size = 1 << 28, most_taps = 1 << 20;

// batch, channels, steps, size z, y, x, ranks, form, normalize, padding, support, radii, threads
using Sizes = Numbers<13>;
// image (4), flow (2), flow axes (3), variance (2)
using Strides = Numbers<11>;
// largest variances, image, flow, variance, frames
using Arrays = std::array<Address, 5>;

template <class T>
pk::GaussianWarp<T> problem(const Sizes& sizes, const Strides& strides, const Arrays& arrays, double value,
                            const std::array<double, 3>& scale, bool varies) {
    const auto [batch, channels, steps, z, y, x, ranks, form, normalize, padding, support, radii, threads] = sizes;
    const auto [largest, image, flow, variance, frames] = arrays;
    const bool linear = form == static_cast<std::int64_t>(pk::WarpForm::linear);
    if (batch < 0 || channels < 0 || steps < 0 || ranks < 1 || ranks > 3 || (ranks < 3 && z != 1) ||
        (ranks < 2 && y != 1) || std::min({z, y, x}) < 1 || std::max({z, y, x}) > largest_size || support < 0 ||
        support > most_taps || radii < 0 || radii > most_taps / 2 || (radii > 0 && largest == 0) ||
        (linear && support != 2) || (varies && variance == 0) || !(value >= 0))
        throw std::invalid_argument("inconsistent sizes; call pykernels.gaussian_warp, which says what is wrong");
    return {batch,
            channels,
            steps,
            {z, y, x},
            static_cast<int>(ranks),
            enumerator(form, pk::WarpForm::linear),
            enumerator(normalize, pk::WarpNormalize::inside),
            enumerator(padding, pk::WarpPadding::periodic),
            support,
            pointer<const double>(largest),
            radii,
            value,
            {scale[0], scale[1], scale[2]},
            pointer<const T>(image),
            {strides[0], strides[1], strides[2], strides[3]},
            pointer<const T>(flow),
            {strides[4], strides[5]},
            {strides[6], strides[7], strides[8]},
            pointer<const T>(variance),
            {strides[9], strides[10]},
            varies,
            pointer<T>(frames),
            static_cast<int>(threads)};
}

template <class T>
void forward(const Sizes& sizes, const Strides& strides, const Arrays& arrays, double value,
             const std::array<double, 3>& scale, bool varies) {
    const pk::GaussianWarp<T> p = problem<T>(sizes, strides, arrays, value, scale, varies);
    const py::gil_scoped_release release;
    const std::int64_t elements = p.batch * p.steps * p.channels * p.size[0] * p.size[1] * p.size[2];
    pk::expect_writes(p.frames, static_cast<std::size_t>(elements) * sizeof(T));
    pk::gaussian_warp_forward(p);
}

// gradients: of the frames, image, flow, variance
template <class T>
void backward(const Sizes& sizes, const Strides& strides, const Arrays& arrays, double value,
              const std::array<double, 3>& scale, bool varies, const std::array<Address, 4>& gradients) {
    const pk::GaussianWarp<T> p = problem<T>(sizes, strides, arrays, value, scale, varies);
    const auto [grads, image, flow, variance] = gradients;
    if (p.steps > 1 && image == 0) throw std::invalid_argument("several steps need the gradient of the image");
    const py::gil_scoped_release release;
    pk::gaussian_warp_backward(p, {pointer<const T>(grads), pointer<T>(image), pointer<T>(flow), pointer<T>(variance)});
}

}  // namespace

void bind_gaussian_warp(py::module_& m) {
    m.def("gaussian_warp_forward_float", &forward<float>);
    m.def("gaussian_warp_forward_double", &forward<double>);
    m.def("gaussian_warp_backward_float", &backward<float>);
    m.def("gaussian_warp_backward_double", &backward<double>);
}
