// Kernels of infinitely wide networks between two sets of points: Gram matrices, their products with vectors, and sums of
// kernels with their gradients. The mathematics is in pykernels/ops/ntk_gram/README.md, that of a pair in pair.hpp.
//
// Points are first written as unit vectors u = (w_0 x / sqrt n, b_0) / |.|, a coefficient for each feature and the bias, and
// as the numbers that the layers need of each point (rows.hpp). Columns lie in panels as wide as a register tile:
//
//        a panel of columns            u_y: [panel][feature][column]   their numbers: [panel][number][column]
//      +--------------------+
//    r |  rho = u_x . u_y   |   a register tile of inner products -> L1; then, a few vectors of columns at a time,
//    o |                    |   e = (1 - rho) / 2 -> all layers in registers -> stored, or multiplied by weights and
//    w |                    |   added up. Where u_x and u_y nearly coincide, or are nearly opposite, e or 1 - e comes
//    s |                    |   from their difference or sum; of few features it always does, without the tile.
//      +--------------------+
//
// A symmetric Gram matrix is computed in tiles on and above its diagonal, each stored twice. Sums over columns are added up
// in T for a strip of panels (512 floats or 256 doubles in registers of 64 bytes), and then in double, in the order of the
// columns: neither the number of threads nor the division into tasks changes a bit.
//
// Cost per pair: 2 (d + 1) flops of the inner product and, for each layer of relu, about 50 (float) or 65 (double), and 30
// more with derivatives; the points are read and the result is written once.
#pragma once

#include <cstdint>

#include "common/isa.hpp"
#include "ntk_gram/rows.hpp"

namespace pk {

enum class NtkPrecision { full, tf32, bf16 };  // of the unit vectors, in float

template <class T>
struct NtkPoints {
    const T* x;  // (B, n, d), features contiguous
    std::int64_t n, batch_stride, stride;
};

template <class T>
struct NtkProblem {
    NtkNetwork network;
    std::int64_t batch, features;
    NtkPoints<T> x, y;
    bool symmetric;  // y is x once more, and not given
    NtkPrecision precision;
    bool nngp, ntk;
    int threads;
};

// gram: (kinds, B, N, M), NNGP first.
// matvec: product (B, N, p) from v (B, M, p), both contiguous; of one kind.
template <class T>
struct NtkWeights {
    const T* left;   // (B, N, p) contiguous, or null: ones
    const T* right;  // (B, M, p) contiguous, or null: dense
    std::int64_t p;
    const T* dense;  // (B, N, M)
    std::int64_t dense_stride[3];
};

// Of s_i = sum_j W_ij k(x_i, y_j); null where not wanted.
template <class T>
struct NtkSums {
    T* values;     // (B, N): s
    T* gradients;  // (B, N, d + 1): with respect to (w_0 x_i / sqrt n, b_0)
    T* rows;       // (B, N, P): with respect to the primary numbers of x_i
};

// Throw std::bad_alloc.
void ntk_gram(const NtkProblem<float>& p, float* gram);
void ntk_gram(const NtkProblem<double>& p, double* gram);
void ntk_matvec(const NtkProblem<float>& p, const float* v, std::int64_t columns, float* product);
void ntk_matvec(const NtkProblem<double>& p, const double* v, std::int64_t columns, double* product);
void ntk_witness(const NtkProblem<float>& p, const NtkWeights<float>& w, const NtkSums<float>& sums);
void ntk_witness(const NtkProblem<double>& p, const NtkWeights<double>& w, const NtkSums<double>& sums);

#define PK_DECLARE(isa)                                                                             \
    namespace isa {                                                                                 \
    void ntk_gram(const NtkProblem<float>&, float*);                                                \
    void ntk_gram(const NtkProblem<double>&, double*);                                              \
    void ntk_matvec(const NtkProblem<float>&, const float*, std::int64_t, float*);                  \
    void ntk_matvec(const NtkProblem<double>&, const double*, std::int64_t, double*);               \
    void ntk_witness(const NtkProblem<float>&, const NtkWeights<float>&, const NtkSums<float>&);    \
    void ntk_witness(const NtkProblem<double>&, const NtkWeights<double>&, const NtkSums<double>&); \
    }
PK_FOR_EACH_ISA(PK_DECLARE)
#undef PK_DECLARE

}  // namespace pk
