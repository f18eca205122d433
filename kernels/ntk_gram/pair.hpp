// The layers of a network for pairs of points, in registers, and the derivatives of the last one. For kernel units.
//
// A pair carries e = sin(theta/2)^2, f = cos(theta/2)^2 and T = Theta / sqrt(q r); a layer of branches is
//
//   e' = sum of [c_x c_y e_phi(e) + (c_x - c_y)^2 / 4] + (s_x - s_y)^2 / 4
//   T' = 1 - 2 e' + T sum of c_x c_y d_phi(e),        d_phi = d e_phi / d e
//
// Functions of theta are those of h = min(e, f) = sin(theta/2)^2 <= 1/2, fitted to 1e-8 (float) and 2e-17 (double).
#pragma once

#include "common/arrays.hpp"
#include "common/math.hpp"
#include "ntk_gram/rows.hpp"

PK_ISA_BEGIN

// Vectors of pairs that go through the layers together: what hides the latency of their chains, and fits in the registers.
#if PK_VECTOR_BYTES == 64
constexpr int pair_vectors = 4;
#else
constexpr int pair_vectors = 2;
#endif

template <class T, int U>
struct Pairs {
    Vec<T> v[U];
    Vec<T>& operator[](int u) { return v[u]; }
    Vec<T> operator[](int u) const { return v[u]; }
};

#define PK_EACH_VECTOR _Pragma("GCC unroll 4") for (int u = 0; u < U; ++u)

template <class T>
PK_INLINE Vec<T> square_root(Vec<T> x) {
#if PK_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        x.v = _mm512_sqrt_ps(x.v);
    else
        x.v = _mm512_sqrt_pd(x.v);
#elif PK_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4)
        x.v = _mm256_sqrt_ps(x.v);
    else
        x.v = _mm256_sqrt_pd(x.v);
#else
    for (int i = 0; i < Vec<T>::lanes; ++i) x.v[i] = sqrt(x.v[i]);
#endif
    return x;
}

// 1 / sqrt(x) of a positive number. Error below 2 ulp.
template <class T>
PK_INLINE Vec<T> inverse_root(Vec<T> x) {
#if PK_VECTOR_BYTES == 64
    // Newton's steps from an estimate that is right to 2^-14 cost less than a root and a quotient.
    const Vec<T> half(T(0.5)), less = half * x;
    Vec<T> y;
    if constexpr (sizeof(T) == 4)
        y.v = _mm512_rsqrt14_ps(x.v);
    else
        y.v = _mm512_rsqrt14_pd(x.v);
    if constexpr (sizeof(T) == 8) y = y + y * (half - less * y * y);
    return y + y * (half - less * y * y);
#else
    return Vec<T>(T(1)) / square_root(x);
#endif
}

// asin(sqrt h) / sqrt h * 2 / pi, 0 <= h <= 1/2
PK_INLINE Vec<float> angle_polynomial(Vec<float> h) {
    constexpr double c[] = {0.07889059074639326,  -0.08653591558333587, 0.06837967391772018,
                            -0.00447203720575348, 0.02280060672813509,  0.02806953147442645,
                            0.04776404008758542,  0.10610296154815424,  0.63661977340082541};
    return polynomial(c, h);
}
PK_INLINE Vec<double> angle_polynomial(Vec<double> h) {
    constexpr double c[] = {
        0.5662208944260333246,   -2.0877865303673013099,    3.6663225637470685988,    -3.9665464904622907633,
        2.9559302419770829438,   -1.5861535479879888252,    0.64201895714719782208,   -0.18905172048286413828,
        0.050126589820404836803, -0.0016588768467767272528, 0.0083980307022234217279, 0.0087875072969563448589,
        0.011054447850039470548, 0.014242193055031809847,   0.01934175862706915692,   0.028420525309942301597,
        0.047746482930127878602, 0.10610329539458619151,    0.63661977236758135049};
    return polynomial(c, h);
}

// Of h = sin(theta/2)^2 > 0 and t = 1/2 - h: theta / pi, the bend (sin theta - theta cos theta) / (2 pi), and 2 / sin theta.
// As theta / pi = s (2 / pi + h R), s = sin(theta) / 2, the bend is s h (2 / pi - t R), where nothing cancels.
template <class T>
struct Angle {
    Vec<T> angle, bend, inverse;
};
PK_INLINE Angle<float> angle_of(Vec<float> h, Vec<float> t) {
    constexpr double c[] = {3.6685750774014736,  -5.3696595773424283, 4.1972269101631828,
                            -1.3819052560630805, 0.61398551411417389, 0.20576197852430055,
                            0.29514536444754445, 0.33937504971272719, 0.42441518722421824};
    const Vec<float> square = h - h * h, inverse = inverse_root(square), sine = square * inverse;
    const Vec<float> rest = polynomial(c, h), first(0.636619772367581343f);
    return {sine * (first + h * rest), sine * h * (first - t * rest), inverse};
}
// R is a quotient of polynomials, whose division and root are one: 1 / (D s).
PK_INLINE Angle<double> angle_of(Vec<double> h, Vec<double> t) {
    constexpr double above[] = {0.079892612313209497684, 1.0500069857186073145, 3.8203446380348481183,
                                5.4960193501378158037,   3.3564800364748319314, 0.7267604552648373013};
    constexpr double below[] = {0.12741920012557763836,
                                1.9046242619326877299,
                                8.397057636583941526,
                                15.791546238714029895,
                                14.273399830227496848,
                                6.122289928108512329,
                                1.0};
    const Vec<double> divisor = polynomial(below, t), square = h - h * h, first(0.636619772367581343076);
    const Vec<double> both = inverse_root(square * divisor * divisor), inverse = both * divisor,
                      sine = square * inverse;
    const Vec<double> rest = polynomial(above, t) * (both * sine);
    return {sine * (first + h * rest), sine * h * (first - t * rest), inverse};
}

// asin(x) / pi, from `complement` = 1 - x^2 where that is the smaller one.
template <class T>
PK_INLINE Vec<T> arcsine(Vec<T> x, Vec<T> complement) {
    const Vec<T> half(T(0.5)), square = x * x, rest = least(complement, half);
    const Vec<T> near = half * x * angle_polynomial(least(square, half));
    const Vec<T> far = half - half * square_root(rest) * angle_polynomial(rest);
    return select_le(square, half, near, copysign(far, x));
}
template <class T>
PK_INLINE Vec<T> arcsine(Vec<T> x) {
    const Vec<T> one(T(1));
    return arcsine(x, one - least(x * x, one));
}

// One branch of a layer as the pairs need it.
template <class T>
struct Branch {
    NtkActivation activation;
    T part;      // of the identity in a piecewise linear function: 2 s / (1 + s^2)
    T b, even;   // frequency squared, or gamma; cos(2 phase)
    int number;  // where its numbers begin
    int primary;
    bool keeps_f;  // its f is to be trusted when small
};

enum class Simple { no, relu, erf };

template <class T>
struct Layer {
    const Branch<T>* branches;
    int count, s, primary_s;  // branches; where the numbers of the bias are
    bool folded;              // e <= 1/2 comes in
    bool stable;              // a later layer is not smooth, or many are left: small e have to be right
    bool keeps_f;             // some branch does
    bool rounded;             // e may leave [0, 1] by rounding
    Simple simple;            // with one branch, that stays in registers
};

template <class T>
struct Network {
    const Layer<T>* layers;
    int depth, numbers, primaries, branches;
    bool ntk;
};

// The numbers of a row and of vectors of columns, (number, column) with `stride` columns.
template <class T>
struct Numbers {
    const T* row;
    const T* columns;
    Index stride;
    PK_INLINE Vec<T> x(int i) const { return Vec<T>(row[i]); }
    PK_INLINE Vec<T> y(int i, int u) const { return Vec<T>::load(columns + i * stride + u * Vec<T>::lanes); }
};

// What a branch makes of e and f, and the derivatives of that: of d_phi by e, and of both by log q at constant e.
template <class T, int U>
struct Made {
    Pairs<T, U> e, f, d, d_e, e_q, d_q;
};

// max(z, 0) + s min(z, 0) as `part` of the identity and 1 - part of relu.
template <class T, int U, bool derivatives, bool folded, bool relu>
PK_INLINE void piecewise_linear(const Branch<T>& branch, const Pairs<T, U>& e, const Pairs<T, U>& f, Made<T, U>& made) {
    const Vec<T> zero(T(0)), one(T(1)), half(T(0.5)), inverse_pi(T(0.318309886183790671538)), least_h(T(1e-36));
    const Vec<T> part(branch.part), rest(T(1) - branch.part);
    PK_EACH_VECTOR {
        const Vec<T> h = greatest(least_h, folded ? least(e[u], half) : least(e[u], f[u])), t = half - h;
        const auto [angle, bend, inverse] = angle_of(h, t);
        const Vec<T> bent = h - bend;
        if constexpr (derivatives) {
            // Nearer than the rounding of their unit vectors points count as coincident, or opposite, and the derivative,
            // which is infinite, as zero.
            const Vec<T> coincident(sizeof(T) == 4 ? T(1e-14) : T(1e-30));
            made.d_e[u] = select_le(h, coincident, zero, (zero - inverse_pi) * inverse);
        }
        if constexpr (folded && relu) {
            made.e[u] = bent;
            made.d[u] = one - angle;
        } else if constexpr (relu) {
            made.e[u] = select_le(e[u], f[u], bent, half - h + bent);
            made.d[u] = select_le(e[u], f[u], one - angle, angle);
        } else {
            made.e[u] = rest * bent + select_le(e[u], f[u], part * h, half * (one + part) - h);
            made.d[u] = part + rest * select_le(e[u], f[u], one - angle, angle);
            if constexpr (derivatives) made.d_e[u] = rest * made.d_e[u];
        }
    }
}

// Pairs whose e_phi is below this have it from their distance.
constexpr double near_by_distance = 0.05;

// e_phi from the kernel, or of near pairs of like norms, where it would cancel, from the distance K(x, x) + K(y, y) -
// 2 K(x, y). `norms` is the inverse product of the two, `apart` their difference.
template <class T>
PK_INLINE Vec<T> nearer(Vec<T> from_kernel, Vec<T> distance, Vec<T> norms, Vec<T> apart) {
    const Vec<T> unlike = norms * apart * apart;
    const Vec<T> from_distance = Vec<T>(T(0.25)) * (norms * distance - unlike);
    const Vec<T> if_near = select_le(unlike, Vec<T>(T(1)), from_distance, from_kernel);
    return select_le(Vec<T>(static_cast<T>(near_by_distance)), from_kernel, from_kernel, if_near);
}

// What error_function has of near pairs from their distance: of low, the smaller of e and f.
template <class T, int U>
__attribute__((noinline)) void error_function_near(int at, const Numbers<T>& n, const Pairs<T, U>& low,
                                                   Pairs<T, U>& made_low) {
    using N = NtkNumbers;
    const Vec<T> one(T(1)), half(T(0.5)), quarter(T(0.25)), four(T(4)), tiny(T(1e-30));
    const Vec<T> bx = n.x(at + N::q), lx = n.x(at + N::root);
    PK_EACH_VECTOR {
        const Vec<T> by = n.y(at + N::q, u), ly = n.y(at + N::root, u), difference = lx - ly;
        const Vec<T> apart = quarter * difference * difference + lx * ly * low[u];
        const Vec<T> h = quarter * (bx + by) + apart;  // sin(eta / 2)^2 of eta = pi/2 - asin(X)
        const Vec<T> hx = half * bx, hy = half * by, other = one - h;
        // (hy - hx) / 2; of small variances from the lengths
        const Vec<T> own = quarter * select_le(bx + by, one, by - bx, difference * (lx + ly));
        // eta_xy - eta_xx + eta_xy - eta_yy, each the arcsine of a difference
        const Vec<T> scale_x = square_root(h * (one - hx)) + square_root(hx * other);
        const Vec<T> scale_y = square_root(h * (one - hy)) + square_root(hy * other);
        const Vec<T> distance = four * (arcsine((own + apart) / greatest(scale_x, tiny)) +
                                        arcsine((apart - own) / greatest(scale_y, tiny)));
        const Vec<T> norms = n.x(at + N::inverse) * n.y(at + N::inverse, u);
        made_low[u] = nearer(made_low[u], distance, norms, n.x(at + N::norm) - n.y(at + N::norm, u));
    }
}

// K = 2/pi asin(X), X = l_x l_y (f - e), l^2 = 1 - b: an angle of vectors that have a part sqrt(b) each of its own. An odd
// function of X: computed for the smaller of e and f.
template <class T, int U, bool derivatives>
PK_INLINE void error_function(int at, bool stable, const Numbers<T>& n, const Pairs<T, U>& e, const Pairs<T, U>& f,
                              Made<T, U>& made) {
    using N = NtkNumbers;
    const Vec<T> one(T(1)), half(T(0.5)), quarter(T(0.25)), two(T(2)), four(T(4)), zero(T(0));
    const Vec<T> bx = n.x(at + N::q), lx = n.x(at + N::root);
    Pairs<T, U> low, made_low;
    PK_EACH_VECTOR {
        low[u] = least(e[u], f[u]);
        const Vec<T> high = greatest(f[u], e[u]);
        const Vec<T> by = n.y(at + N::q, u), lengths = lx * n.y(at + N::root, u), x = lengths * (high - low[u]);
        const Vec<T> complement = bx + by - bx * by + four * lengths * lengths * low[u] * high;  // 1 - X^2
        const Vec<T> inverse = inverse_root(complement), square = x * x;
        // asin(X) / pi, from the complement where that is the smaller one
        const Vec<T> smaller = select_le(square, half, x, complement * inverse);
        const Vec<T> angle = half * smaller * angle_polynomial(least(complement, square));
        const Vec<T> norms = n.x(at + N::inverse) * n.y(at + N::inverse, u);
        made_low[u] = half - norms * select_le(square, half, angle, half - angle);
        made.d[u] = n.x(at + N::g) * n.y(at + N::g, u) * inverse;
        if constexpr (derivatives) {
            const Vec<T> sign = select_le(e[u], f[u], one, zero - one);
            made.d_e[u] = sign * made.d[u] * (inverse * inverse) * (zero - two) * lengths * x;
        }
    }
    if (stable) {
        Vec<T> smallest = one;
        PK_EACH_VECTOR smallest = least(made_low[u], smallest);  // NaN is left out
        if (any_greater(Vec<T>(static_cast<T>(near_by_distance)), smallest))
            error_function_near<T, U>(at, n, low, made_low);
    }
    PK_EACH_VECTOR {
        made.e[u] = select_le(e[u], f[u], made_low[u], one - made_low[u]);
        made.f[u] = select_le(e[u], f[u], one - made_low[u], made_low[u]);
        if constexpr (derivatives) {
            const Vec<T> by = n.y(at + N::q, u), ly = n.y(at + N::root, u), high = greatest(f[u], e[u]);
            const Vec<T> lengths = lx * ly, difference = lx - ly, tangent = high - low[u];
            const Vec<T> complement = bx + by - bx * by + four * lengths * lengths * low[u] * high;
            const Vec<T> norms = n.x(at + N::inverse) * n.y(at + N::inverse, u);
            const Vec<T> apart_in_norm = n.x(at + N::norm) - n.y(at + N::norm, u);
            const Vec<T> slope = n.x(at + N::slope), norm = n.x(at + N::norm);
            const Vec<T> sign = select_le(e[u], f[u], one, zero - one);
            // By log q: 2 eta_xy - eta_xx, as a difference of squares since it is small for near pairs.
            const Vec<T> other = ly * tangent, root = square_root(complement), own_root = square_root(bx * (two - bx));
            const Vec<T> eta_q =
                (difference + two * ly * low[u]) * (lx + other) / ((lx * root + other * own_root) * (root * own_root));
            const Vec<T> distance_q = Vec<T>(T(0.636619772367581343076)) * bx * lx * eta_q;
            made.e_q[u] =
                sign * (slope * made_low[u] + quarter * norms * (distance_q + two * slope * norm * apart_in_norm));
            const Vec<T> b_q = zero - bx * (one - bx);
            const Vec<T> complement_q = b_q * (one - by) - four * low[u] * high * b_q * ly * ly;
            made.d_q[u] = made.d[u] * (half * bx + slope - half * complement_q / complement);
        }
    }
}

// K = (U - even V) / 2, U = exp(-b D / 2), V = exp(-b S / 2), D = q + r - 2c, S = q + r + 2c. Odd and even functions of c are
// computed for the smaller of e and f.
template <class T, int U, bool derivatives>
PK_INLINE void sine(const Branch<T>& branch, const Numbers<T>& n, const Pairs<T, U>& e, const Pairs<T, U>& f,
                    Made<T, U>& made) {
    using N = NtkNumbers;
    const int at = branch.number;
    const Vec<T> half(T(0.5)), quarter(T(0.25)), one(T(1)), two(T(2)), four(T(4)), zero(T(0));
    const Vec<T> even(branch.even), b(branch.b), half_b(branch.b / 2);
    const bool is_even = branch.even == T(-1), is_odd = branch.even == T(1);
    PK_EACH_VECTOR {
        const Vec<T> side = is_even || is_odd ? select_le(e[u], f[u], one, zero - one) : one;
        const Vec<T> low = is_even || is_odd ? least(e[u], f[u]) : e[u];
        const Vec<T> high = is_even || is_odd ? greatest(f[u], e[u]) : f[u];
        const Vec<T> rx = n.x(at + N::root), ry = n.y(at + N::root, u), roots = rx * ry, apart = (rx - ry) * (rx - ry);
        const Vec<T> norms = n.x(at + N::inverse) * n.y(at + N::inverse, u);
        const Vec<T> apart_in_norm = n.x(at + N::norm) - n.y(at + N::norm, u);
        const Vec<T> px = n.x(at + N::h), py = n.y(at + N::h, u);
        const Vec<T> lost = expm1(zero - half_b * (apart + four * roots * low)), upper = lost + one;
        const Vec<T> lower = exp(zero - half_b * (apart + four * roots * high));
        const Vec<T> distance = zero - lost - half * even * ((px - py) * (px - py) + two * lower * lost);
        const Vec<T> kernel =
            is_odd ? zero - upper * expm1(zero - two * b * roots * (high - low)) : upper - even * lower;
        const Vec<T> made_low = nearer(half - quarter * norms * kernel, distance, norms, apart_in_norm);
        const Vec<T> other = is_odd ? one - made_low : made_low;
        made.e[u] = select_le(zero, side, made_low, other);
        made.f[u] = select_le(zero, side, other, made_low);
        const Vec<T> g = n.x(at + N::g) * n.y(at + N::g, u), of_even = is_odd ? one : side;
        made.d[u] = of_even * half_b * (upper + even * lower) * g;
        if constexpr (derivatives) {
            const Vec<T> q = n.x(at + N::q), slope = n.x(at + N::slope), norm = n.x(at + N::norm);
            const Vec<T> of_odd = is_odd ? side : one;
            // Half of b times the derivatives of D and S by log q; D's is small for near pairs.
            const Vec<T> less = half_b * (rx * (rx - ry) + two * roots * low);
            const Vec<T> more = half_b * (q + roots * (high - low));
            const Vec<T> upper_q = zero - less * upper, lower_q = zero - more * lower;
            const Vec<T> lost_q = lower_q * lost + lower * upper_q - b * q * px * (px - py);
            made.d_e[u] = zero - of_odd * b * b * roots * (upper - even * lower) * g;
            made.e_q[u] = of_odd * (slope * made_low +
                                    quarter * norms * (two * slope * norm * apart_in_norm - upper_q - even * lost_q));
            made.d_q[u] = of_even * half_b * (upper_q + even * lower_q) * g + (half + slope) * made.d[u];
        }
    }
}

// K = exp(-b D)
template <class T, int U, bool derivatives>
PK_INLINE void radial(const Branch<T>& branch, const Numbers<T>& n, const Pairs<T, U>& e, Made<T, U>& made) {
    using N = NtkNumbers;
    const int at = branch.number;
    const Vec<T> half(T(0.5)), one(T(1)), two(T(2)), four(T(4)), zero(T(0)), b(branch.b);
    PK_EACH_VECTOR {
        const Vec<T> rx = n.x(at + N::root), ry = n.y(at + N::root, u), roots = rx * ry;
        const Vec<T> lost = expm1(zero - b * ((rx - ry) * (rx - ry) + four * roots * e[u]));
        made.e[u] = zero - half * lost;
        made.d[u] = two * b * (lost + one) * roots;
        if constexpr (derivatives) {
            const Vec<T> distance_q = rx * (rx - ry) + two * roots * e[u];
            made.d_e[u] = zero - four * b * roots * made.d[u];
            made.e_q[u] = half * b * (lost + one) * distance_q;
            made.d_q[u] = made.d[u] * (half - b * distance_q);
        }
    }
}

// (asin(x) - asin(y)) / pi of positive numbers, from x - y and the complements 1 - x^2 and 1 - y^2.
template <class T>
PK_INLINE Vec<T> arcsine_difference(Vec<T> difference, Vec<T> x, Vec<T> x_complement, Vec<T> y, Vec<T> y_complement) {
    const Vec<T> scale = x * square_root(y_complement) + y * square_root(x_complement);
    return arcsine(difference * (x + y) / greatest(scale, Vec<T>(T(1e-30))));
}

// K(x, x) + K(y, y) - 2 K(x, y) of near pairs: of the points turned into one direction, K' = a b g(a, b) with a = sqrt q
// and b = sqrt r, and of the turn, both as differences; reference.py has the steps.
template <class T>
PK_INLINE Vec<T> gelu_distance(Vec<T> a, Vec<T> b, Vec<T> ia, Vec<T> ib, Vec<T> e) {
    const Vec<T> half(T(0.5)), one(T(1)), two(T(2)), four(T(4));
    const Vec<T> roots = a * b, step = a - b, both = ia * ib, root = square_root(both), total = ia + ib;
    const Vec<T> c = roots * (one - two * e), sines = four * roots * roots * e * (one - e), lost = two * roots * e;
    const Vec<T> aligned = one + a * a + b * b, rest = aligned + sines;
    const Vec<T> length = square_root(aligned), width = square_root(rest);
    // All over pi, and for each point once: g(a, a) - g(a, b).
    const Vec<T> pi_inverse(T(0.318309886183790671538));
    const Vec<T> turn = arcsine_difference(lost * root, roots * root, aligned * both, c * root, rest * both);
    const Vec<T> i = half + arcsine(roots * root, aligned * both);
    const Vec<T> turned =
        lost * i + c * turn +
        pi_inverse * sines * ((total - one) / length + (sines + c * c * total) / ((width + length) * width * length));
    const Vec<T> ra = a * square_root(ia), rb = b * square_root(ib), reach = ra - rb;
    const auto less = [&](Vec<T> own, Vec<T> inverse, Vec<T> r, Vec<T> nearer_by, Vec<T> by) {
        const Vec<T> alone = one + two * own * own, tall = square_root(alone);
        const Vec<T> angle =
            arcsine_difference(r * nearer_by, r * r, alone * inverse * inverse, ra * rb, aligned * both);
        const Vec<T> linear = own * by * (inverse + (one - roots) * both) / length;
        return angle +
               pi_inverse * (linear - two * own * own * inverse * by * (a + b) / (tall * length * (tall + length)));
    };
    const Vec<T> zero(T(0));
    const Vec<T> in_norm = step * step * (i + pi_inverse * roots * total / length) +
                           a * a * less(a, ia, ra, reach, step) + b * b * less(b, ib, rb, zero - reach, zero - step);
    return half * in_norm + turned;
}

// z Phi(z), with Dl = (1 + q)(1 + r) - c^2, J = 1 / (2 pi sqrt Dl), I = 1/4 + asin(c / sqrt((1 + q)(1 + r))) / (2 pi):
// K = c I + J B, B = q r - c^2 + c^2 / (1 + q) + c^2 / (1 + r), and K' = I + J c G, G = 1/(1 + q) + 1/(1 + r) + 1/Dl.
template <class T, int U, bool derivatives>
PK_INLINE void gaussian_error_unit(const Branch<T>& branch, bool stable, const Numbers<T>& n, const Pairs<T, U>& e,
                                   const Pairs<T, U>& f, Made<T, U>& made) {
    using N = NtkNumbers;
    const int at = branch.number;
    const Vec<T> half(T(0.5)), quarter(T(0.25)), one(T(1)), two(T(2)), four(T(4)), zero(T(0));
    const Vec<T> inverse_turn(T(0.159154943091895335769));
    PK_EACH_VECTOR {
        const Vec<T> q = n.x(at + N::q), r = n.y(at + N::q, u), iq = n.x(at + N::h), ir = n.y(at + N::h, u);
        const Vec<T> roots = n.x(at + N::root) * n.y(at + N::root, u), c = roots * (f[u] - e[u]), square = c * c;
        const Vec<T> sines = four * roots * roots * e[u] * f[u];  // q r - c^2
        const Vec<T> rest = one + q + r + sines, inverse = one / rest;
        const Vec<T> j = inverse_turn * square_root(inverse);
        const Vec<T> i = quarter + half * arcsine(c * square_root(iq * ir), rest * iq * ir);
        const Vec<T> bracket = sines + square * (iq + ir), sum = iq + ir + inverse;
        const Vec<T> kernel = c * i + j * bracket, first = i + j * c * sum;
        const Vec<T> norms = n.x(at + N::inverse) * n.y(at + N::inverse, u), g = n.x(at + N::g) * n.y(at + N::g, u);
        made.e[u] = half - half * kernel * norms;
        if (stable) {
            const Vec<T> apart_in_norm = n.x(at + N::norm) - n.y(at + N::norm, u);
            const Vec<T> distance = gelu_distance(n.x(at + N::root), n.y(at + N::root, u), iq, ir, e[u]);
            made.e[u] = nearer(made.e[u], distance, norms, apart_in_norm);
        }
        made.d[u] = first * g;
        if constexpr (derivatives) {
            const Vec<T> slope = n.x(at + N::slope);
            const Vec<T> second =
                j * (one + square * inverse * sum + iq + ir + inverse + two * square * inverse * inverse);
            const Vec<T> j_q = zero - half * j * (one + r) * inverse;
            const Vec<T> kernel_q = q * (zero - half * square * iq * j + j_q * bracket + j * (r - square * iq * iq));
            const Vec<T> first_q =
                q * (zero - half * c * iq * j + j_q * c * sum - j * c * (iq * iq + (one + r) * inverse * inverse));
            made.d_e[u] = zero - two * roots * second * g;
            made.e_q[u] = zero - half * norms * (kernel_q + half * c * first + slope * kernel);
            made.d_q[u] = g * (first_q + half * c * second) + (half + slope) * made.d[u];
        }
    }
}

template <class T, int U, bool derivatives>
PK_INLINE void make(const Branch<T>& branch, const Layer<T>& layer, const Numbers<T>& n, const Pairs<T, U>& e,
                    const Pairs<T, U>& f, Made<T, U>& made) {
    switch (branch.activation) {
        case NtkActivation::identity:
            PK_EACH_VECTOR {
                made.e[u] = e[u];
                made.f[u] = f[u];
                made.d[u] = Vec<T>(T(1));
                if constexpr (derivatives) made.d_e[u] = Vec<T>(T(0));
            }
            break;
        case NtkActivation::relu:
            if (layer.folded)
                piecewise_linear<T, U, derivatives, true, true>(branch, e, f, made);
            else
                piecewise_linear<T, U, derivatives, false, true>(branch, e, f, made);
            break;
        case NtkActivation::leaky_relu: piecewise_linear<T, U, derivatives, false, false>(branch, e, f, made); break;
        case NtkActivation::erf: error_function<T, U, derivatives>(branch.number, layer.stable, n, e, f, made); break;
        case NtkActivation::gelu: gaussian_error_unit<T, U, derivatives>(branch, layer.stable, n, e, f, made); break;
        case NtkActivation::sin: sine<T, U, derivatives>(branch, n, e, f, made); break;
        case NtkActivation::rbf: radial<T, U, derivatives>(branch, n, e, made); break;
    }
}

// Where the forward pass leaves what the backward pass needs: T before each layer, and for each branch e_phi, d_phi and
// their derivatives.
template <class T, int U>
struct Kept {
    Vec<T>* data;
    static constexpr int per_layer = U, per_branch = 5 * U;
    static Index vectors(const Network<T>& network) {
        return static_cast<Index>(network.depth) * per_layer + static_cast<Index>(network.branches) * per_branch;
    }
};

// What goes from layer to layer.
template <class T, int U>
struct State {
    Pairs<T, U> e, f, tangent;
};

// A layer of any branches. Not inline: the registers are for the layers that stay in them.
template <class T, int U, bool derivatives>
__attribute__((noinline)) void general_layer(const Layer<T>& layer, const Numbers<T>& n, State<T, U>& state,
                                             Vec<T>* kept) {
    const Vec<T> one(T(1)), half(T(0.5)), quarter(T(0.25)), zero(T(0));
    Pairs<T, U> next, other = {}, slope;
    PK_EACH_VECTOR {
        const Vec<T> sx = n.x(layer.s), sy = n.y(layer.s, u), difference = sx - sy;
        next[u] = quarter * difference * difference;
        if (layer.keeps_f) other[u] = quarter * (sx + sy) * (sx + sy);
        slope[u] = zero;
    }
    for (int i = 0; i < layer.count; ++i) {
        const Branch<T>& branch = layer.branches[i];
        Made<T, U> made = {};
        make<T, U, derivatives>(branch, layer, n, state.e, state.f, made);
        PK_EACH_VECTOR {
            const Vec<T> cx = n.x(branch.number), cy = n.y(branch.number, u), both = cx * cy, difference = cx - cy;
            const Vec<T> apart = quarter * difference * difference;
            next[u] = next[u] + (both * made.e[u] + apart);
            if (layer.keeps_f) other[u] = other[u] + (both * (branch.keeps_f ? made.f[u] : one - made.e[u]) + apart);
            slope[u] = slope[u] + both * made.d[u];
            if constexpr (derivatives) {
                *kept++ = made.e[u];
                *kept++ = made.d[u];
                *kept++ = made.d_e[u];
                *kept++ = made.e_q[u];
                *kept++ = made.d_q[u];
            }
        }
    }
    PK_EACH_VECTOR {
        Vec<T> e = next[u], f = one - next[u];
        if (layer.keeps_f) {
            // Where they differ by rounding, the smaller one is right.
            const Vec<T> trusted = other[u];
            e = select_le(half, trusted, e, one - trusted);
            f = select_le(half, trusted, f, trusted);
        }
        if (layer.rounded) {
            e = least(greatest(zero, e), one);
            f = least(greatest(zero, f), one);
        }
        state.e[u] = e;
        state.f[u] = f;
        state.tangent[u] = (f - e) + state.tangent[u] * slope[u];
    }
}

// The same for one branch of relu, or of erf where no small f is needed later.
template <class T, int U, bool derivatives, Simple simple, bool folded>
PK_INLINE void simple_layer(const Layer<T>& layer, const Numbers<T>& n, State<T, U>& state, Vec<T>* kept) {
    constexpr bool is_erf = simple == Simple::erf;
    const Vec<T> zero(T(0)), one(T(1)), quarter(T(0.25)), two(T(2));
    const Branch<T>& branch = layer.branches[0];
    Made<T, U> made;
    if constexpr (is_erf)
        error_function<T, U, derivatives>(branch.number, false, n, state.e, state.f, made);
    else
        piecewise_linear<T, U, derivatives, folded, true>(branch, state.e, state.f, made);
    PK_EACH_VECTOR {
        const Vec<T> cx = n.x(branch.number), cy = n.y(branch.number, u), both = cx * cy, apart = cx - cy;
        const Vec<T> bias_apart = n.x(layer.s) - n.y(layer.s, u);
        const Vec<T> next = both * made.e[u] + quarter * (apart * apart + bias_apart * bias_apart);
        const Vec<T> e = is_erf ? least(greatest(zero, next), one) : next;
        state.e[u] = e;
        state.f[u] = one - e;
        state.tangent[u] = (one - two * e) + state.tangent[u] * (both * made.d[u]);
        if constexpr (derivatives) {
            kept[5 * u] = made.e[u];
            kept[5 * u + 1] = made.d[u];
            kept[5 * u + 2] = made.d_e[u];
        }
        if constexpr (derivatives && is_erf) {
            kept[5 * u + 3] = made.e_q[u];
            kept[5 * u + 4] = made.d_q[u];
        }
    }
}

// From e and f of pairs to those of the last layer, and T.
template <class T, int U, bool derivatives>
PK_INLINE void layers_forward(const Network<T>& network, const Numbers<T>& n, State<T, U>& state, Vec<T>* kept) {
    PK_EACH_VECTOR state.tangent[u] = state.f[u] - state.e[u];
    for (int l = 0; l < network.depth; ++l) {
        const Layer<T>& layer = network.layers[l];
        if constexpr (derivatives) {
            PK_EACH_VECTOR kept[u] = state.tangent[u];
            kept += Kept<T, U>::per_layer;
        }
        if (layer.simple == Simple::erf) {
            simple_layer<T, U, derivatives, Simple::erf, false>(layer, n, state, kept);
        } else if (layer.simple == Simple::no) {
            State<T, U> copy = state;  // whose address may be known
            general_layer<T, U, derivatives>(layer, n, copy, kept);
            state = copy;
        } else if (layer.folded) {
            simple_layer<T, U, derivatives, Simple::relu, true>(layer, n, state, kept);
        } else {
            simple_layer<T, U, derivatives, Simple::relu, false>(layer, n, state, kept);
        }
        if constexpr (derivatives) kept += layer.count * Kept<T, U>::per_branch;
    }
}

// A branch of the layer below, which gets the derivatives of e', `of_e`, and of the layer's slope, `through`: adds to those of
// e, `next`, and to the slope.
template <class T, int U, bool first>
PK_INLINE void branch_backward(const Branch<T>& branch, const Numbers<T>& n, const Vec<T>* made,
                               const Pairs<T, U>& of_e, const Pairs<T, U>& through, Pairs<T, U>& next,
                               Pairs<T, U>& slope, Vec<T>* sums) {
    const Vec<T> half(T(0.5));
    Vec<T> of_c = sums[branch.primary];
    PK_EACH_VECTOR {
        const Vec<T> e_phi = made[5 * u], d_phi = made[5 * u + 1], d_e = made[5 * u + 2];
        const Vec<T> cx = n.x(branch.number), cy = n.y(branch.number, u), both = cx * cy, own = both * d_phi;
        of_c = of_c + (cy * (of_e[u] * e_phi + through[u] * d_phi) + half * of_e[u] * (cx - cy));
        const Vec<T> of_both = of_e[u] * own + through[u] * (both * d_e);
        next[u] = first ? of_both : next[u] + of_both;
        slope[u] = first ? own : slope[u] + own;
    }
    sums[branch.primary] = of_c;
    if (branch.activation <= NtkActivation::leaky_relu) return;
    Vec<T> of_q = sums[branch.primary + 1];
    PK_EACH_VECTOR {
        const Vec<T> both = n.x(branch.number) * n.y(branch.number, u);
        of_q = of_q + both * (of_e[u] * made[5 * u + 3] + through[u] * made[5 * u + 4]);
    }
    sums[branch.primary + 1] = of_q;
}

// The other way: from the derivative of the result by the cosine (`of_cosine`) and by T to that by e, and the sums over pairs
// of those by the row's primary numbers, added to `sums` (each a vector).
template <class T, int U>
PK_INLINE void layers_backward(const Network<T>& network, const Numbers<T>& n, const Vec<T>* kept, Pairs<T, U>& of_e,
                               Pairs<T, U>& of_tangent, Vec<T>* sums) {
    const Vec<T> half(T(0.5)), two(T(2)), zero(T(0));
    kept += Kept<T, U>::vectors(network);
    for (int l = network.depth - 1; l >= 0; --l) {
        const Layer<T>& layer = network.layers[l];
        kept -= layer.count * Kept<T, U>::per_branch;
        const Vec<T>* const before = kept - Kept<T, U>::per_layer;
        Pairs<T, U> through, next, slope;
        Vec<T> of_s = sums[layer.primary_s];
        PK_EACH_VECTOR {
            of_e[u] = of_e[u] - two * of_tangent[u];
            through[u] = of_tangent[u] * before[u];
            of_s = of_s + half * of_e[u] * (n.x(layer.s) - n.y(layer.s, u));
        }
        sums[layer.primary_s] = of_s;
        branch_backward<T, U, true>(layer.branches[0], n, kept, of_e, through, next, slope, sums);
        for (int i = 1; i < layer.count; ++i)
            branch_backward<T, U, false>(layer.branches[i], n, kept + i * Kept<T, U>::per_branch, of_e, through, next,
                                         slope, sums);
        PK_EACH_VECTOR {
            of_e[u] = next[u];
            of_tangent[u] = of_tangent[u] * slope[u];
        }
        kept = before;
    }
    PK_EACH_VECTOR of_e[u] = of_e[u] - two * of_tangent[u];
}

PK_ISA_END
