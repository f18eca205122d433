// pykernels._cpu: the CPU kernels for Python. Tensors arrive as addresses, sizes and strides in elements, so that the module
// needs neither torch nor numpy to build or to load. Callers are pykernels/ops/*/op.py, which own the memory and have
// checked the arguments; what is checked again here is what keeps every access inside the memory described.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "causal_conv/causal_conv.hpp"
#include "causal_conv/pooled.hpp"
#include "causal_conv/stream.hpp"
#include "causal_conv/weight_norm.hpp"
#include "combine.hpp"
#include "common/isa.hpp"
#include "common/parallel.hpp"
#include "flow_penalties.hpp"
#include "gaussian_warp.hpp"
#include "latent_ode.hpp"
#include "ntk_gram.hpp"

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
    if (code < 0 || code > static_cast<int>(pk::Activation::gelu))
        throw std::invalid_argument("unknown activation code");
    return static_cast<pk::Activation>(code);
}

// x and weight as Python sees them: x (B, C, T), or (1, C, total) with `sequences` packed one after the other.
pk::ConvShape conv_shape(const Strides& x_shape, const Strides& weight_shape, std::int64_t dilation,
                         std::int64_t groups) {
    const auto [batch, in_channels, length] = x_shape;
    const auto [out_channels, weight_channels, kernel_size] = weight_shape;
    if (batch < 0 || in_channels < 1 || length < 0 || out_channels < 0 || kernel_size < 1 || dilation < 1 ||
        groups < 1 || weight_channels * groups != in_channels || out_channels % groups != 0)
        throw std::invalid_argument("inconsistent shapes; call pykernels.causal_conv1d, which says what is wrong");
    return {batch, in_channels, out_channels, length, kernel_size, dilation, groups};
}

// Where sequences lie: addresses of int32 offsets or of int64 lengths, or 0, and how many sequences there are.
using Sequences = std::tuple<std::uintptr_t, std::uintptr_t, std::int64_t>;

// Sequences of unequal lengths. Wrong offsets and lengths are clamped, so that spans lie side by side inside the series.
class Spans {
public:
    Spans(pk::ConvShape& shape, const Sequences& sequences) {
        const auto [offsets_address, lengths_address, count] = sequences;
        if (offsets_address == 0 && lengths_address == 0) return;
        if (count < 0 || shape.batch != (offsets_address != 0 ? 1 : count) || (count == 0 && shape.length > 0))
            throw std::invalid_argument("packed sequences need one series, lengths one for each series");
        const std::int64_t end = shape.length;
        const auto inside = [end](std::int64_t low, std::int64_t at) { return std::min(std::max(low, at), end); };
        spans_.reserve(static_cast<std::size_t>(count));
        std::int64_t longest = 0, begin = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            std::int64_t length = 0;
            if (offsets_address != 0) {
                const std::int32_t* offsets = pointer<const std::int32_t>(offsets_address);
                length = (i + 1 == count ? end : inside(begin, offsets[i + 1])) - begin;
            } else {
                length = inside(0, pointer<const std::int64_t>(lengths_address)[i]);
            }
            spans_.push_back({begin, length});
            longest = std::max(longest, length);
            if (offsets_address != 0) begin += length;
        }
        packed_ = offsets_address != 0;
        series_length_ = end;
        shape.batch = count;
        shape.length = longest;
    }
    const pk::Span* data() const { return spans_.empty() ? nullptr : spans_.data(); }

    // A (B, C, T) view with sequences in place of samples.
    template <class T>
    pk::View3<T> of(std::uintptr_t address, const Strides& strides) const {
        return {pointer<T>(address), packed_ ? 0 : std::get<0>(strides), std::get<1>(strides), std::get<2>(strides)};
    }
    template <class T>
    pk::View3<T> of(std::uintptr_t address, std::int64_t channels, std::int64_t length) const {
        return of<T>(address, Strides{channels * length, length, 1});
    }

    // Zeroes what lies behind the sequences of a padded batch.
    template <class T>
    void clear_padding(T* data, std::int64_t channels) const {
        if (packed_ || data == nullptr) return;
        for (std::size_t i = 0; i < spans_.size(); ++i)
            for (std::int64_t c = 0; c < channels; ++c) {
                T* row = data + (static_cast<std::int64_t>(i) * channels + c) * series_length_;
                std::fill(row + spans_[i].length, row + series_length_, T(0));
            }
    }

private:
    std::vector<pk::Span> spans_;
    bool packed_ = false;
    std::int64_t series_length_ = 0;
};

template <class T>
void forward(pk::ConvShape shape, const Sequences& sequences, std::uintptr_t x, const Strides& x_strides,
             std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t residual, const Strides& residual_strides,
             std::uintptr_t state, const Strides& state_strides, std::uintptr_t y, std::uintptr_t saved,
             const Addresses& pool, pk::Activation activation, double negative_slope, bool residual_before_activation,
             int threads) {
    const py::gil_scoped_release release;
    const auto [pool_value, pool_time, pool_h] = pool;
    const std::int64_t length = shape.length, x_samples = shape.batch * length;
    const Spans spans(shape, sequences);
    if (pool_value != 0)
        for (std::int64_t i = 0; i < shape.batch; ++i)
            if ((spans.data() == nullptr ? length : spans.data()[i].length) == 0)
                throw std::invalid_argument("the maximum over time needs at least one sample");
    const pk::CausalConvForward<T> p{shape,
                                     spans.of<const T>(x, x_strides),
                                     pointer<const T>(weight),
                                     pointer<const T>(bias),
                                     spans.of<const T>(residual, residual_strides),
                                     view<const T>(state, state_strides),
                                     spans.data(),
                                     spans.of<T>(y, shape.out_channels, length),
                                     pointer<T>(saved),
                                     {pointer<T>(pool_value), pointer<std::int64_t>(pool_time), pointer<T>(pool_h)},
                                     activation,
                                     static_cast<T>(negative_slope),
                                     residual_before_activation,
                                     threads};
    const auto bytes = static_cast<std::size_t>(x_samples * shape.out_channels) * sizeof(T);
    if (y != 0) pk::expect_writes(pointer<T>(y), bytes);
    if (saved != 0) pk::expect_writes(pointer<T>(saved), bytes);
    pk::causal_conv_forward(p);
    spans.clear_padding(pointer<T>(y), shape.out_channels);
    spans.clear_padding(pointer<T>(saved), shape.out_channels);
}

void causal_conv1d_forward(bool is_double, const Strides& x_shape, const Strides& weight_shape, std::int64_t dilation,
                           std::int64_t groups, const Sequences& sequences, std::uintptr_t x, const Strides& x_strides,
                           std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t residual,
                           const Strides& residual_strides, std::uintptr_t state, const Strides& state_strides,
                           std::uintptr_t y, std::uintptr_t saved, const Addresses& pool, int activation,
                           double negative_slope, bool residual_before_activation, int threads) {
    const auto [pool_value, pool_time, pool_h] = pool;
    const pk::ConvShape shape = conv_shape(x_shape, weight_shape, dilation, groups);
    if (pool_value != 0 && (pool_time == 0 || shape.length == 0 || groups != 1))
        throw std::invalid_argument("a pool needs values, times, at least one sample and one group");
    if (pool_value == 0 && y == 0 && shape.batch > 0 && shape.length > 0)  // an empty tensor has no address
        throw std::invalid_argument("there is nowhere to write the output to");
    if ((residual != 0 && std::get<2>(residual_strides) != 1) || (state != 0 && std::get<2>(state_strides) != 1))
        throw std::invalid_argument("the time stride of the residual and of the state must be 1");
    (is_double ? forward<double> : forward<float>)(shape, sequences, x, x_strides, weight, bias, residual,
                                                   residual_strides, state, state_strides, y, saved, pool,
                                                   activation_from(activation), negative_slope,
                                                   residual_before_activation, threads);
}

template <class T>
void backward(pk::ConvShape shape, const Sequences& sequences, std::uintptr_t grad_y, const Strides& grad_y_strides,
              std::uintptr_t saved, const Strides& saved_strides, std::uintptr_t x, const Strides& x_strides,
              std::uintptr_t weight, std::uintptr_t addend, const Strides& addend_strides, std::uintptr_t grad_x,
              std::uintptr_t grad_weight, std::uintptr_t grad_bias, pk::Activation activation, double negative_slope,
              int threads) {
    const py::gil_scoped_release release;
    const std::int64_t length = shape.length;
    if (grad_x != 0)
        pk::expect_writes(pointer<T>(grad_x),
                          static_cast<std::size_t>(shape.batch * shape.in_channels * length) * sizeof(T));
    const Spans spans(shape, sequences);
    const pk::CausalConvBackward<T> p{shape,
                                      spans.of<const T>(grad_y, grad_y_strides),
                                      spans.of<const T>(saved, saved_strides),
                                      spans.of<const T>(x, x_strides),
                                      pointer<const T>(weight),
                                      spans.data(),
                                      spans.of<const T>(addend, addend_strides),
                                      spans.of<T>(grad_x, shape.in_channels, length),
                                      pointer<T>(grad_weight),
                                      pointer<T>(grad_bias),
                                      activation,
                                      static_cast<T>(negative_slope),
                                      threads};
    pk::causal_conv_backward(p);
    spans.clear_padding(pointer<T>(grad_x), shape.in_channels);
}

void causal_conv1d_backward(bool is_double, const Strides& x_shape, const Strides& weight_shape, std::int64_t dilation,
                            std::int64_t groups, const Sequences& sequences, std::uintptr_t grad_y,
                            const Strides& grad_y_strides, std::uintptr_t saved, const Strides& saved_strides,
                            std::uintptr_t x, const Strides& x_strides, std::uintptr_t weight, std::uintptr_t addend,
                            const Strides& addend_strides, std::uintptr_t grad_x, std::uintptr_t grad_weight,
                            std::uintptr_t grad_bias, int activation, double negative_slope, int threads) {
    if (std::get<2>(x_strides) != 1 || (addend != 0 && std::get<2>(addend_strides) != 1))
        throw std::invalid_argument("the time stride of x and of the addend must be 1");
    (is_double ? backward<double> : backward<float>)(conv_shape(x_shape, weight_shape, dilation, groups), sequences,
                                                     grad_y, grad_y_strides, saved, saved_strides, x, x_strides, weight,
                                                     addend, addend_strides, grad_x, grad_weight, grad_bias,
                                                     activation_from(activation), negative_slope, threads);
}

template <class T>
void backward_at(pk::ConvShape shape, const Sequences& sequences, std::uintptr_t dz, std::uintptr_t time,
                 std::uintptr_t x, const Strides& x_strides, std::uintptr_t weight, std::uintptr_t grad_x,
                 std::uintptr_t grad_weight, int threads) {
    const std::int64_t length = shape.length;
    const Spans spans(shape, sequences);
    const auto* times = pointer<const std::int64_t>(time);
    for (std::int64_t i = 0; i < shape.batch * shape.out_channels; ++i) {
        const std::int64_t end = spans.data() == nullptr ? length : spans.data()[i / shape.out_channels].length;
        if (times[i] < 0 || times[i] >= end) throw std::invalid_argument("a time lies outside the series");
    }
    const pk::CausalConvBackwardAt<T> p{shape,
                                        pointer<const T>(dz),
                                        times,
                                        spans.of<const T>(x, x_strides),
                                        pointer<const T>(weight),
                                        spans.data(),
                                        spans.of<T>(grad_x, shape.in_channels, length),
                                        pointer<T>(grad_weight),
                                        threads};
    const py::gil_scoped_release release;
    pk::causal_conv_backward_at(p);
    spans.clear_padding(pointer<T>(grad_x), shape.in_channels);
}

void causal_conv1d_backward_at(bool is_double, const Strides& x_shape, const Strides& weight_shape,
                               std::int64_t dilation, const Sequences& sequences, std::uintptr_t dz,
                               std::uintptr_t time, std::uintptr_t x, const Strides& x_strides, std::uintptr_t weight,
                               std::uintptr_t grad_x, std::uintptr_t grad_weight, int threads) {
    (is_double ? backward_at<double> : backward_at<float>)(conv_shape(x_shape, weight_shape, dilation, 1), sequences,
                                                           dz, time, x, x_strides, weight, grad_x, grad_weight,
                                                           threads);
}

// (in channels, out channels, kernel size, dilation, groups), and addresses of packed weights, bias and ring.
using ConvSizes = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
using StepRecord = std::tuple<ConvSizes, Addresses, int, double, bool>;

template <class T>
pk::StepConv<T> step_conv(const StepRecord& record) {
    const auto& [sizes, addresses, activation, negative_slope, residual_before_activation] = record;
    const auto [in_channels, out_channels, kernel_size, dilation, groups] = sizes;
    const auto [packed, bias, ring] = addresses;
    if (in_channels < 1 || out_channels < 1 || kernel_size < 1 || dilation < 1 || groups < 1 ||
        in_channels % groups != 0 || out_channels % groups != 0 || packed == 0 || (kernel_size > 1 && ring == 0))
        throw std::invalid_argument("inconsistent sizes; call pykernels.causal_conv1d_step, which says what is wrong");
    return {in_channels,
            out_channels,
            kernel_size,
            dilation,
            groups,
            pointer<const T>(packed),
            pointer<const T>(bias),
            activation_from(activation),
            static_cast<T>(negative_slope),
            residual_before_activation,
            pointer<T>(ring)};
}

template <class T>
void step(const StepRecord& record, std::int64_t batch, std::int64_t time, std::uintptr_t x, std::int64_t x_stride,
          std::uintptr_t residual, std::int64_t residual_stride, std::uintptr_t y, int threads) {
    const pk::StepConv<T> conv = step_conv<T>(record);
    const pk::Step<T> p{conv,
                        batch,
                        time,
                        pointer<const T>(x),
                        x_stride,
                        pointer<const T>(residual),
                        residual_stride,
                        pointer<T>(y),
                        conv.out_channels,
                        threads};
    const py::gil_scoped_release release;
    pk::causal_conv_step(p);
}

void causal_conv1d_step(bool is_double, const StepRecord& record, std::int64_t batch, std::int64_t time,
                        std::uintptr_t x, std::int64_t x_stride, std::uintptr_t residual, std::int64_t residual_stride,
                        std::uintptr_t y, int threads) {
    (is_double ? step<double> : step<float>)(record, batch, time, x, x_stride, residual, residual_stride, y, threads);
}

// A network that advances sample by sample. The memory behind the addresses belongs to the caller.
template <class T>
class Stream {
public:
    using Record = std::tuple<StepRecord, int, int, int>;  // convolution, columns read, added and written

    Stream(const std::vector<Record>& layers, const StepRecord& head, std::int64_t batch)
        : head_{step_conv<T>(head), 0, -1, 0}, batch_(batch) {
        std::vector<std::int64_t> width(1, 0);  // of the columns, 0 where nothing was written yet
        for (const auto& [record, input, residual, output] : layers) {
            const pk::StreamLayer<T> layer{step_conv<T>(record), input, residual, output};
            if (layers_.empty()) width[0] = layer.conv.in_channels;
            const auto holds = [&](int column, std::int64_t channels) {
                return column >= 0 && column < static_cast<int>(width.size()) &&
                       width[static_cast<std::size_t>(column)] == channels;
            };
            if (!holds(input, layer.conv.in_channels) ||
                (residual != -1 && !holds(residual, layer.conv.out_channels)) || output < 0 || output == input ||
                output == residual || output > 1 << 20)
                throw std::invalid_argument("the layers of the stream do not fit together");
            if (output >= static_cast<int>(width.size())) width.resize(static_cast<std::size_t>(output) + 1, 0);
            width[static_cast<std::size_t>(output)] = layer.conv.out_channels;
            widest_ = std::max({widest_, layer.conv.in_channels, layer.conv.out_channels});
            layers_.push_back(layer);
        }
        if (layers_.empty() || batch < 1 || head_.conv.kernel_size != 1 ||
            head_.conv.in_channels != layers_.back().conv.out_channels)
            throw std::invalid_argument("a stream needs layers, a head of width 1 that fits, and at least one sample");
        columns_ = static_cast<int>(width.size());
    }

    void run(std::int64_t time, std::int64_t steps, std::uintptr_t x, const Strides& strides, std::uintptr_t maximum,
             std::uintptr_t features, int threads) const {
        const auto [batch_stride, channel_stride, time_stride] = strides;
        const pk::Stream<T> p{layers_.data(),
                              static_cast<int>(layers_.size()),
                              columns_,
                              widest_,
                              head_,
                              batch_,
                              time,
                              steps,
                              pointer<const T>(x),
                              batch_stride,
                              channel_stride,
                              time_stride,
                              pointer<T>(maximum),
                              pointer<T>(features),
                              threads};
        const py::gil_scoped_release release;
        pk::causal_conv_stream(p);
    }

private:
    std::vector<pk::StreamLayer<T>> layers_;
    pk::StreamLayer<T> head_;
    std::int64_t batch_, widest_ = 0;
    int columns_ = 0;
};

template <class T>
void define_stream(py::module_& m, const char* name) {
    py::class_<Stream<T>>(m, name)
        .def(py::init<const std::vector<typename Stream<T>::Record>&, const StepRecord&, std::int64_t>())
        .def("run", &Stream<T>::run);
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
    m.def("causal_conv1d_step", &causal_conv1d_step);
    define_stream<float>(m, "StreamFloat");
    define_stream<double>(m, "StreamDouble");
    m.def("weight_norm_forward", &weight_norm_forward);
    m.def("weight_norm_backward", &weight_norm_backward);
    bind_combine(m);
    bind_flow_penalties(m);
    bind_gaussian_warp(m);
    bind_latent_ode(m);
    bind_ntk_gram(m);
}
