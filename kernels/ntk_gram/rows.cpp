#include "ntk_gram/rows.hpp"

#include <cmath>

namespace pk {

namespace {

constexpr double pi = 3.14159265358979323846;

bool homogeneous(const NtkBranch& branch) { return branch.activation <= NtkActivation::leaky_relu; }

// From `complement` = 1 - x^2 where that is the smaller one; 0 <= x <= 1.
double arcsine(double x, double complement) {
    return x * x <= 0.5 ? std::asin(x) : pi / 2 - std::asin(std::sqrt(complement));
}

struct Norm {
    double value, slope;  // sqrt(E[phi(z)^2]) / |amplitude|, z ~ N(0, q), and d log value / d log q
};

Norm norm_of(const NtkBranch& branch, double q) {
    const double b = branch.parameter * branch.parameter;
    double square = 1, derivative = 0;  // of the square with respect to log q
    switch (branch.activation) {
        case NtkActivation::identity:
        case NtkActivation::relu:
        case NtkActivation::leaky_relu: return {std::sqrt((1 + b) / 2 * q), 0.5};
        case NtkActivation::erf: {
            const double z = 2 * b * q, ratio = z / (1 + z);
            square = 2 / pi * arcsine(ratio, (1 + 2 * z) / ((1 + z) * (1 + z)));
            // sqrt(1 - ratio^2) = sqrt(1 + 2 z) / (1 + z)
            derivative = 2 / pi * ratio / std::sqrt(1 + 2 * z);
            break;
        }
        case NtkActivation::sin: {
            square = (1 - branch.even) / 2 - branch.even / 2 * std::expm1(-2 * b * q);
            derivative = branch.even * b * q * std::exp(-2 * b * q);
            break;
        }
        case NtkActivation::gelu: {
            const double whole = 1 + q, rest = 1 + 2 * q, j = 1 / (2 * pi * std::sqrt(rest));
            const double i = 0.25 + arcsine(q / whole, rest / (whole * whole)) / (2 * pi), bracket = 2 * q * q / whole;
            const double kernel_q =
                -q * q * j / (2 * whole) - j * whole / (2 * rest) * bracket + j * (q - q * q / (whole * whole));
            const double kernel_c = i + j * q * (2 / whole + 1 / rest);
            square = q * i + j * bracket;
            derivative = q * (2 * kernel_q + kernel_c);
            break;
        }
        case NtkActivation::rbf: break;
    }
    if (square < ntk_least_variance) return {std::sqrt(ntk_least_variance), 0};
    return {std::sqrt(square), derivative / (2 * square)};
}

void fill(const NtkBranch& branch, double q, const Norm& norm, double* numbers) {
    using N = NtkNumbers;
    const double b = branch.parameter * branch.parameter;
    numbers[N::norm] = norm.value;
    numbers[N::inverse] = 1 / norm.value;
    numbers[N::slope] = -norm.slope;
    if (branch.activation == NtkActivation::erf) {
        const double bias = 1 / (1 + 2 * b * q);
        numbers[N::q] = bias;
        numbers[N::root] = std::sqrt(2 * b * q * bias);
        numbers[N::g] = std::sqrt(q * bias) * std::sqrt(4 * b / pi) / norm.value;
        numbers[N::h] = 0;
        return;
    }
    numbers[N::q] = q;
    numbers[N::root] = std::sqrt(q);
    numbers[N::g] = std::sqrt(q) / norm.value;
    numbers[N::h] = branch.activation == NtkActivation::sin    ? std::exp(-b * q)
                    : branch.activation == NtkActivation::gelu ? 1 / (1 + q)
                                                               : 0;
}

}  // namespace

int ntk_numbers_of(const NtkBranch& branch) { return homogeneous(branch) ? 1 : NtkNumbers::count; }
int ntk_primaries_of(const NtkBranch& branch) { return homogeneous(branch) ? 1 : 2; }

int ntk_numbers(const NtkNetwork& network) {
    int count = 1;
    const NtkBranch* branch = network.branches;
    for (int l = 0; l < network.depth; ++l, ++count)
        for (std::int64_t i = 0; i < network.counts[l]; ++i) count += ntk_numbers_of(*branch++);
    return count;
}

int ntk_primaries(const NtkNetwork& network) {
    int count = 1;
    const NtkBranch* branch = network.branches;
    for (int l = 0; l < network.depth; ++l, ++count)
        for (std::int64_t i = 0; i < network.counts[l]; ++i) count += ntk_primaries_of(*branch++);
    return count;
}

void ntk_row(const NtkNetwork& network, double variance, double* numbers, double* derivatives) {
    double q = variance, of_q = 1;  // d log q / d log q_0
    const NtkBranch* branches = network.branches;
    for (int l = 0; l < network.depth; ++l) {
        const double weight = network.weight_std[l + 1], bias = network.bias_std[l + 1], offset = network.offsets[l];
        const double constant = offset > 0 ? std::sqrt(bias * bias + weight * weight * offset) : bias;
        const std::int64_t count = network.counts[l];
        double following = constant * constant, change = 0;
        // The norms and their slopes wait where c and its derivatives will be.
        double *number = numbers, *derivative = derivatives;
        for (std::int64_t i = 0; i < count; ++i) {
            const NtkBranch& branch = branches[i];
            const Norm norm = norm_of(branch, q);
            const double part = weight * branch.amplitude * norm.value;
            following += part * part;
            change += 2 * part * part * norm.slope * of_q;
            number[NtkNumbers::c] = norm.value;
            if (!homogeneous(branch)) fill(branch, q, norm, number);
            number += ntk_numbers_of(branch);
            if (derivatives == nullptr) continue;
            *derivative = norm.slope;
            derivative += ntk_primaries_of(branch);
        }
        if (following < ntk_least_variance) {
            following = ntk_least_variance;
            change = 0;
        }
        change /= following;
        const double inverse = 1 / std::sqrt(following);
        for (std::int64_t i = 0; i < count; ++i) {
            const NtkBranch& branch = branches[i];
            const double c = weight * std::fabs(branch.amplitude) * numbers[NtkNumbers::c] * inverse;
            numbers[NtkNumbers::c] = c;
            numbers += ntk_numbers_of(branch);
            if (derivatives == nullptr) continue;
            *derivatives = c * (*derivatives * of_q - change / 2);
            ++derivatives;
            if (!homogeneous(branch)) *derivatives++ = of_q;
        }
        const double s = constant * inverse;
        *numbers++ = s;
        if (derivatives != nullptr) *derivatives++ = -s * change / 2;
        branches += count;
        q = following;
        of_q = change;
    }
    // Not a number for a point that is not finite: what bounded activations make of its variance is.
    *numbers = std::isfinite(variance) ? std::sqrt(q) : std::nan("");
    if (derivatives != nullptr) *derivatives = of_q / 2;
}

}  // namespace pk
