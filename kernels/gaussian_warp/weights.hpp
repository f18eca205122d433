// Weights of the taps on one axis, and their derivatives. For kernel units.
//
// A centre lies f from the nearest pixel (odd K, -1/2 <= f < 1/2) or from the pixel before it (even K, 0 <= f < 1), and tap j
// at the distance d = j - (K - 1) / 2 - f from it. A jet is the weights of all taps, their derivatives by f, and those by the
// variance, each in `width` lanes, of which those beyond K are 0, and `stride` apart.
#pragma once

#include "common/arrays.hpp"
#include "common/math.hpp"
#include "common/simd.hpp"
#include "gaussian_warp/gaussian_warp.hpp"

PK_ISA_BEGIN

// Lane i holds first + i.
template <class T>
PK_INLINE Vec<T> count_from(T first) {
    T lane[Vec<T>::lanes];
    for (int i = 0; i < Vec<T>::lanes; ++i) lane[i] = first + static_cast<T>(i);
    return Vec<T>::load(lane);
}

// yes where low <= x < high, lane by lane, for integers x.
template <class T>
PK_INLINE Vec<T> select_between(Vec<T> x, Index low, Index high, Vec<T> yes, Vec<T> no) {
    const Vec<T> below = select_le(x, Vec<T>(static_cast<T>(high) - T(0.5)), yes, no);
    return select_le(Vec<T>(static_cast<T>(low) - T(0.5)), x, below, no);
}

template <class T>
PK_INLINE T sum_lanes(Vec<T> x) {
    T part[folded_lanes<T>], sum = 0;
    store_folded(part, x);
    for (int i = 0; i < folded_lanes<T>; ++i) sum += part[i];
    return sum;
}

// x moved down by a lane, where `last` takes the last one's place; that becomes the first lane of x.
template <class T>
PK_INLINE Vec<T> next_lane(Vec<T> x, T& last) {
    T lane[Vec<T>::lanes + 1];
    x.store(lane);
    lane[Vec<T>::lanes] = last;
    last = lane[0];
    return Vec<T>::load(lane + 1);
}

// erfc(|x|) / 2.
template <class T>
PK_INLINE Vec<T> gaussian_tail(Vec<T> x) {
    return erfc_of_positive(copysign(x, Vec<T>(T(1)))) * Vec<T>(T(0.5));
}

// (erf(high) - erf(low)) / 2 for low < high from their tails, without cancellation where these are small.
template <class T>
PK_INLINE Vec<T> gaussian_mass(Vec<T> low, Vec<T> high, Vec<T> tail_of_low, Vec<T> tail_of_high) {
    const Vec<T> zero(T(0));
    const Vec<T> around = (Vec<T>(T(1)) - tail_of_low) - tail_of_high;
    const Vec<T> above = select_le(low, zero, around, tail_of_low - tail_of_high);
    return select_le(zero, high, above, tail_of_high - tail_of_low);
}

// What normalisation divides by, and what it does not count.
struct Counted {
    WarpNormalize normalize;
    Index low, high;  // taps of the window that count, others have no weight
};

// Square root of the smallest normal number: the inverse square of a smaller variance would overflow, and the result is the
// nearest pixel long before.
template <class T>
constexpr T negligible_variance = sizeof(T) == 4 ? T(0x1p-63) : T(0x1p-511);

// The jet of the first `kinds` of: weights, derivative by f, by the variance.
template <class T>
PK_INLINE void computed_weights(WarpForm form, Counted counted, T variance, T f, Index taps, Index width, Index stride,
                                int kinds, T* jet) {
    constexpr int lanes = Vec<T>::lanes;
    const Vec<T> zero(T(0)), one(T(1));
    const T first = -static_cast<T>((taps - 1) / 2);
    const Index low = max(Index(0), counted.low), high = min(taps, counted.high);
    const bool nearest = form != WarpForm::linear && variance <= negligible_variance<T>;
    const Index nearest_tap = (taps - 1) / 2 + (taps % 2 == 0 && f >= T(0.5) ? 1 : 0);
    const T scale = T(1) / __builtin_sqrt(T(2) * variance), inverse = T(1) / variance;
    constexpr T inverse_sqrt_pi = static_cast<T>(0.564189583547756286948);
    // Of a density, relative to the tap that is nearest and counts, so that small variances do not underflow.
    T closest = 0;
    const bool normalized = counted.normalize != WarpNormalize::none;
    if (normalized && form == WarpForm::density) {
        T best = static_cast<T>(low) + first - f;
        for (Index j = low + 1; j < high; ++j) {
            const T d = static_cast<T>(j) + first - f;
            if (d * d < best * best) best = d;
        }
        closest = best;
    }
    Vec<T> sum = zero, sum_f = zero, sum_v = zero;
    // The upper edge of a tap is the lower one of the next: from the last to the first, their values are passed on.
    T next_tail = 0, next_density = 0;
    if (form == WarpForm::integrated && taps == width) {
        const Vec<T> edge((static_cast<T>(taps) + first - f - T(0.5)) * scale);
        next_lane(gaussian_tail(edge), next_tail);
        next_lane(exp(zero - edge * edge) * Vec<T>(inverse_sqrt_pi), next_density);
    }
    for (Index j = width - lanes; j >= 0; j -= lanes) {
        const Vec<T> tap = count_from(static_cast<T>(j)), d = tap + Vec<T>(first) - Vec<T>(f);
        Vec<T> w, by_f, by_v;
        if (nearest) {
            w = select_between(tap, nearest_tap, nearest_tap + 1, one, zero);
            by_f = by_v = zero;
        } else if (form == WarpForm::linear) {
            w = one - copysign(d, one);
            by_f = select_le(d, zero, Vec<T>(T(-1)), one);
            by_v = zero;
        } else if (form == WarpForm::integrated) {
            const Vec<T> a = (d - Vec<T>(T(0.5))) * Vec<T>(scale), b = (d + Vec<T>(T(0.5))) * Vec<T>(scale);
            const Vec<T> tail_of_a = gaussian_tail(a);
            w = gaussian_mass(a, b, tail_of_a, next_lane(tail_of_a, next_tail));
            if (kinds > 1) {
                const Vec<T> at_a = exp(zero - a * a) * Vec<T>(inverse_sqrt_pi);
                const Vec<T> at_b = next_lane(at_a, next_density);
                by_f = (at_a - at_b) * Vec<T>(scale);
                by_v = (a * at_a - b * at_b) * Vec<T>(T(0.5) * inverse);
            }
        } else {
            // As a product, which is 0 at that tap however it is rounded.
            const Vec<T> squares = (d - Vec<T>(closest)) * (d + Vec<T>(closest));
            w = exp((zero - squares) * Vec<T>(T(0.5) * inverse));
            if (!normalized) w = w * Vec<T>(scale * inverse_sqrt_pi);
            by_f = w * d * Vec<T>(inverse);
            const Vec<T> by_exponent = squares * Vec<T>(inverse);
            by_v = w * (by_exponent - Vec<T>(normalized ? T(0) : T(1))) * Vec<T>(T(0.5) * inverse);
        }
        w = select_between(tap, low, high, w, zero);
        w.store(jet + j);
        sum = sum + w;
        if (kinds > 1) {
            by_f = select_between(tap, low, high, by_f, zero);
            by_f.store(jet + stride + j);
            sum_f = sum_f + by_f;
        }
        if (kinds > 2) {
            by_v = select_between(tap, low, high, by_v, zero);
            by_v.store(jet + 2 * stride + j);
            sum_v = sum_v + by_v;
        }
    }
    if (!normalized) return;
    const T found = sum_lanes(sum);
    const Vec<T> total(found > 0 ? found : T(1));
    const Vec<T> slope_f(kinds > 1 ? sum_lanes(sum_f) : T(0)), slope_v(kinds > 2 ? sum_lanes(sum_v) : T(0));
    for (Index j = 0; j < width; j += lanes) {
        const Vec<T> w = Vec<T>::load(jet + j) / total;
        w.store(jet + j);
        if (kinds > 1) ((Vec<T>::load(jet + stride + j) - w * slope_f) / total).store(jet + stride + j);
        if (kinds > 2) ((Vec<T>::load(jet + 2 * stride + j) - w * slope_v) / total).store(jet + 2 * stride + j);
    }
}

// Jets as polynomials of f on `pieces` equal intervals of its range: (piece, kind, coefficient, lane), in the variable
// u = (f - middle of the piece) / its length, from the highest power to the constant. In float the derivative by f is that of
// the polynomial; in double it has one of its own, since differences of rounded weights have lost digits.
template <class T>
struct WeightTable {
    static constexpr int degree = sizeof(T) == 4 ? 4 : 8;
    static constexpr bool own_slope = sizeof(T) == 8;
    Index pieces, taps, width;
    int kinds;  // of polynomials
    T* coefficients;
};

// Polynomials for a jet of so many kinds.
template <class T>
PK_INLINE int table_kinds(int kinds) {
    return WeightTable<T>::own_slope || kinds == 1 ? kinds : kinds - 1;
}

// A polynomial of a Gaussian on an interval of length h is off by its slope times h / 2, (d h / 2 v)^(n+1) / (2^n (n+1)!)
// relative at the outermost tap: with this many pieces 8e-9 in float and 1e-16 in double, and in float 1e-6 for the derivative,
// which is that of the smallest weight. 0: it would be too many.
constexpr Index most_pieces = 256;
PK_INLINE Index table_pieces(WarpForm form, double variance, Index taps) {
    if (form == WarpForm::linear) return 1;
    if (variance == 0) return taps % 2 == 0 ? 2 : 1;  // the nearest pixel
    for (Index pieces = 8; pieces <= most_pieces; pieces *= 2)
        if (static_cast<double>(taps + 1) <= 0.44 * variance * static_cast<double>(pieces)) return pieces;
    return 0;
}

template <class T>
PK_INLINE Index table_elements(Index pieces, Index width, int kinds) {
    return pieces * kinds * (WeightTable<T>::degree + 1) * width;
}

// The coefficients of the polynomial through `count` points, from the constant up. Overwrites the values.
PK_INLINE void interpolate(const double* node, double* value, int count, double* power) {
    for (int order = 1; order < count; ++order)
        for (int n = count - 1; n >= order; --n) value[n] = (value[n] - value[n - 1]) / (node[n] - node[n - order]);
    // Newton's form, expanded.
    for (int n = 0; n < count; ++n) power[n] = 0;
    power[0] = value[count - 1];
    for (int n = count - 2; n >= 0; --n) {
        for (int i = count - 1 - n; i > 0; --i) power[i] = power[i - 1] - node[n] * power[i];
        power[0] = value[n] - node[n] * power[0];
    }
}

// Fills `table` by interpolation at Chebyshev nodes, computed in double. `work` holds (degree + 2) * 3 * (width + 8) doubles.
template <class T>
void build_table(WeightTable<T>& table, WarpForm form, WarpNormalize normalize, double variance, double* work) {
    constexpr int degree = WeightTable<T>::degree, nodes = degree + 1;
    const Index taps = table.taps, wide = divide_up(taps, Vec<double>::lanes) * Vec<double>::lanes;
    const int computed = WeightTable<T>::own_slope || table.kinds == 1 ? table.kinds : table.kinds + 1;
    const double origin = taps % 2 == 1 ? -0.5 : 0.0;
    double node[nodes];
    for (int n = 0; n < nodes; ++n) node[n] = 0.5 * __builtin_cos(3.14159265358979323846 * (n + 0.5) / nodes);
    const Index jet = 3 * wide;
    double* const differences = work + nodes * jet;
    for (Index piece = 0; piece < table.pieces; ++piece) {
        for (int n = 0; n < nodes; ++n) {
            const double f = origin + (static_cast<double>(piece) + 0.5 + node[n]) / static_cast<double>(table.pieces);
            computed_weights<double>(form, {normalize, 0, taps}, variance, f, taps, wide, wide, computed,
                                     work + n * jet);
        }
        for (int kind = 0; kind < table.kinds; ++kind) {
            const int which = kind > 0 && !WeightTable<T>::own_slope ? kind + 1 : kind;
            T* const out = table.coefficients + (piece * table.kinds + kind) * nodes * table.width;
            clear(out, nodes * table.width);
            for (Index j = 0; j < taps; ++j) {
                for (int n = 0; n < nodes; ++n) differences[n] = work[n * jet + which * wide + j];
                double power[nodes];
                interpolate(node, differences, nodes, power);
                for (int n = 0; n < nodes; ++n) out[(degree - n) * table.width + j] = static_cast<T>(power[n]);
            }
        }
    }
}

// The polynomial whose coefficients are `each` elements apart, at u.
template <class T>
PK_INLINE Vec<T> polynomial_at(const T* c, Index each, Vec<T> u) {
    Vec<T> sum = Vec<T>::load(c);
#pragma GCC unroll 16
    for (int n = 1; n <= WeightTable<T>::degree; ++n) sum = sum * u + Vec<T>::load(c + n * each);
    return sum;
}

// The jet at u in a piece. `fixed`: the width, where it is known.
template <class T, int kinds, int fixed>
PK_INLINE void tabulated_weights(const WeightTable<T>& table, Index piece, T u, Index stride, T* jet) {
    constexpr int degree = WeightTable<T>::degree, lanes = Vec<T>::lanes;
    const Index width = fixed > 0 ? fixed : table.width, each = (degree + 1) * width;
    const T* const c = table.coefficients + piece * table_kinds<T>(kinds) * each;
    const Vec<T> at(u);
    for (Index j = 0; j < width; j += lanes) {
        const T* const p = c + j;
        if constexpr (kinds > 1 && WeightTable<T>::own_slope) {
            polynomial_at(p, width, at).store(jet + j);
            polynomial_at(p + each, width, at).store(jet + stride + j);
        } else if constexpr (kinds > 1) {
            Vec<T> w = Vec<T>::load(p), slope = w;
            w = w * at + Vec<T>::load(p + width);
#pragma GCC unroll 16
            for (int n = 2; n <= degree; ++n) {
                slope = slope * at + w;
                w = w * at + Vec<T>::load(p + n * width);
            }
            w.store(jet + j);
            (slope * Vec<T>(static_cast<T>(table.pieces))).store(jet + stride + j);
        } else {
            polynomial_at(p, width, at).store(jet + j);
        }
        if constexpr (kinds > 2)
            polynomial_at(p + (table_kinds<T>(kinds) - 1) * each, width, at).store(jet + 2 * stride + j);
    }
}

// Normalises a jet again over the taps that count alone.
template <class T>
PK_INLINE void renormalize(T* jet, Index low, Index high, Index taps, Index stride, int kinds) {
    T total = 0;
    for (Index j = 0; j < taps; ++j) {
        const bool counts = low <= j && j < high;
        for (int kind = 0; kind < kinds; ++kind)
            if (!counts) jet[kind * stride + j] = 0;
        total += jet[j];
    }
    if (!(total > 0)) total = 1;
    for (Index j = low; j < high; ++j) jet[j] /= total;
    for (int kind = 1; kind < kinds; ++kind) {
        T* const slope = jet + kind * stride;
        T sum = 0;
        for (Index j = low; j < high; ++j) sum += slope[j];
        for (Index j = low; j < high; ++j) slope[j] = (slope[j] - jet[j] * sum) / total;
    }
}

PK_ISA_END
