// What a kernel of an infinitely wide network depends on of a point, but for its direction: functions of its variance q_0 =
// C_0(x, x) alone, computed in double, once for each point.
#pragma once

#include <cstdint>

namespace pk {

// The first three scale with their argument.
enum class NtkActivation { identity, relu, leaky_relu, erf, gelu, sin, rbf };

struct NtkBranch {
    NtkActivation activation;
    double amplitude, parameter, even;  // slope, frequency or gamma; cos(2 phase) of sin
};

struct NtkNetwork {
    int depth;
    const std::int64_t* counts;                     // of branches in each hidden layer
    const NtkBranch* branches;                      // of all layers
    const double *offsets, *weight_std, *bias_std;  // (depth), (depth + 1), (depth + 1)
};

// In the order of the layers: of each branch c, the length of its part of the unit vector, and where it is not homogeneous
// the numbers below; s, that of the bias. Then the scale, sqrt(C_L(x, x)).
//
//   norm     sqrt(E[phi(z)^2]) / |amplitude|, z ~ N(0, q); inverse, 1 / norm; slope, d log inverse / d log q
//   q, root  q and sqrt q; of erf, 1 / (1 + 2 b^2 q) and sqrt(2 b^2 q / (1 + 2 b^2 q))
//   g        what d_phi has of each point; h: exp(-b^2 q) of sin, 1 / (1 + q) of gelu
struct NtkNumbers {
    enum : int { c, q, root, norm, inverse, slope, g, h, count };
};
int ntk_numbers_of(const NtkBranch& branch);
int ntk_numbers(const NtkNetwork& network);
// The primary numbers, those that derivatives are taken of: of each branch c and, where it is not homogeneous, log q; s; then
// log scale.
int ntk_primaries_of(const NtkBranch& branch);
int ntk_primaries(const NtkNetwork& network);

// Variances below this are taken for it; so is no bias of the first layer, which gives zero vectors a direction, that of the
// bias, and gradients.
constexpr double ntk_least_variance = 1e-36;

// numbers (ntk_numbers) and derivatives (ntk_primaries, or null) of the primary ones with respect to log q_0.
void ntk_row(const NtkNetwork& network, double variance, double* numbers, double* derivatives);

}  // namespace pk
