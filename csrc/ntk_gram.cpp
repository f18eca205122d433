// Kernels of infinitely wide networks for Python; called by pykernels/ops/ntk_gram/cpu.py, which has checked the arguments.

#include "ntk_gram.hpp"

#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "arguments.hpp"
#include "common/parallel.hpp"
#include "ntk_gram/ntk_gram.hpp"

namespace py = pybind11;

namespace {

using Integers = std::vector<std::int64_t>;
using Numbers = std::vector<double>;

// batch, N, M (-1: y is x), features, kind, precision, threads
using Sizes = std::array<std::int64_t, 7>;
// addresses of x and y, and their strides of batch and points
using Points = std::array<std::int64_t, 6>;

// A network whose arrays live here.
struct Architecture {
    Integers counts;
    std::vector<pk::NtkBranch> branches;
    Numbers offsets, weight_std, bias_std;

    Architecture(const Integers& counts_, const Integers& codes, const Numbers& constants, const Numbers& offsets_,
                 const Numbers& weight_std_, const Numbers& bias_std_)
        : counts(counts_), offsets(offsets_), weight_std(weight_std_), bias_std(bias_std_) {
        const auto total = static_cast<std::size_t>(std::accumulate(counts.begin(), counts.end(), std::int64_t{0}));
        for (const std::int64_t count : counts)
            if (count < 1) throw std::invalid_argument("a layer without branches; call pykernels.ntk_gram instead");
        if (codes.size() != total || constants.size() != 3 * total || offsets.size() != counts.size() ||
            weight_std.size() != counts.size() + 1 || bias_std.size() != counts.size() + 1)
            throw std::invalid_argument("inconsistent network; call pykernels.ntk_gram, which says what is wrong");
        for (std::size_t i = 0; i < total; ++i)
            branches.push_back({enumerator(codes[i], pk::NtkActivation::rbf), constants[3 * i], constants[3 * i + 1],
                                constants[3 * i + 2]});
    }
    pk::NtkNetwork view() const {
        return {static_cast<int>(counts.size()),
                counts.data(),
                branches.data(),
                offsets.data(),
                weight_std.data(),
                bias_std.data()};
    }
};

template <class T>
pk::NtkProblem<T> problem(const Architecture& network, const Sizes& sizes, const Points& points) {
    const auto [batch, n, m, features, kind, precision, threads] = sizes;
    if (batch < 0 || n < 0 || m < -1 || features < 0 || kind < 0 || kind > 2)
        throw std::invalid_argument("inconsistent sizes; call pykernels.ntk_gram, which says what is wrong");
    return {network.view(),
            batch,
            features,
            {pointer<const T>(static_cast<Address>(points[0])), n, points[2], points[3]},
            {pointer<const T>(static_cast<Address>(points[1])), m, points[4], points[5]},
            m == -1,
            enumerator(precision, pk::NtkPrecision::bf16),
            kind != 1,
            kind != 0,
            static_cast<int>(threads)};
}

template <class T>
void gram(const Architecture& network, const Sizes& sizes, const Points& points, Address result) {
    const pk::NtkProblem<T> p = problem<T>(network, sizes, points);
    const py::gil_scoped_release release;
    const std::int64_t kinds = (p.nngp ? 1 : 0) + (p.ntk ? 1 : 0);
    const std::int64_t elements = kinds * p.batch * p.x.n * (p.symmetric ? p.x.n : p.y.n);
    pk::expect_writes(pointer<T>(result), static_cast<std::size_t>(elements) * sizeof(T));
    pk::ntk_gram(p, pointer<T>(result));
}

template <class T>
void matvec(const Architecture& network, const Sizes& sizes, const Points& points, Address v, std::int64_t columns,
            Address product) {
    const pk::NtkProblem<T> p = problem<T>(network, sizes, points);
    const py::gil_scoped_release release;
    pk::ntk_matvec(p, pointer<const T>(v), columns, pointer<T>(product));
}

// left, right, dense; values, gradients, rows
using Arrays = std::array<Address, 6>;

template <class T>
void witness(const Architecture& network, const Sizes& sizes, const Points& points, std::int64_t columns,
             const std::array<std::int64_t, 3>& dense_stride, const Arrays& arrays) {
    const pk::NtkProblem<T> p = problem<T>(network, sizes, points);
    const auto [left, right, dense, values, gradients, rows] = arrays;
    if ((right == 0) == (dense == 0) || columns < 0)
        throw std::invalid_argument("inconsistent weights; call pykernels.ntk_witness, which says what is wrong");
    const py::gil_scoped_release release;
    const pk::NtkWeights<T> weights{pointer<const T>(left),
                                    pointer<const T>(right),
                                    columns,
                                    pointer<const T>(dense),
                                    {dense_stride[0], dense_stride[1], dense_stride[2]}};
    pk::ntk_witness(p, weights, {pointer<T>(values), pointer<T>(gradients), pointer<T>(rows)});
}

}  // namespace

void bind_ntk_gram(py::module_& m) {
    py::class_<Architecture>(m, "NtkNetwork")
        .def(py::init<const Integers&, const Integers&, const Numbers&, const Numbers&, const Numbers&,
                      const Numbers&>());
    m.def("ntk_gram_float", &gram<float>);
    m.def("ntk_gram_double", &gram<double>);
    m.def("ntk_matvec_float", &matvec<float>);
    m.def("ntk_matvec_double", &matvec<double>);
    m.def("ntk_witness_float", &witness<float>);
    m.def("ntk_witness_double", &witness<double>);
}
