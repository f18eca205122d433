// Elementary functions of a Vec, with error bounds that the tests check in units in the last place (ulp).
//
// erf: W. J. Cody, "Rational Chebyshev approximations for the error function", Mathematics of Computation 23 (1969).
#pragma once

#include "common/simd.hpp"

PK_ISA_BEGIN

// Not those of <cmath>, which are functions shared by all units (see isa.hpp).
PK_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
PK_INLINE double sqrt(double x) { return __builtin_sqrt(x); }

// ln 2 in two parts: n * ln2_high is exact for the n that occur here.
template <class T>
struct Ln2;
template <>
struct Ln2<float> {
    static constexpr float inverse = 1.44269504088896341f, high = 0.693145751953125f, low = 1.42860682030941723e-6f;
    static constexpr float tanh_is_one = 10.0f;
    static constexpr float exp_is_zero = -104.0f, exp_is_infinite = 89.0f, expm1_is_minus_one = -20.0f;
    static constexpr int taylor_degree = 8;  // relative truncation error of expm1 on |r| <= ln2/2: 6e-10
};
template <>
struct Ln2<double> {
    static constexpr double inverse = 1.44269504088896340736, high = 0.693147180369123816490,
                            low = 1.90821492927058770002e-10;
    static constexpr double tanh_is_one = 20.0;
    static constexpr double exp_is_zero = -746.0, exp_is_infinite = 710.0, expm1_is_minus_one = -40.0;
    static constexpr int taylor_degree = 13;  // 1.2e-17
};

template <class T, int n>
constexpr T inverse_factorial() {
    double factorial = 1;
    for (int i = 2; i <= n; ++i) factorial *= i;
    return static_cast<T>(1 / factorial);
}

// sum_{n=first}^{degree} r^(n-first) / n!
template <int first, int degree, class T>
PK_INLINE Vec<T> taylor_exp(Vec<T> r) {
    const Vec<T> coefficient(inverse_factorial<T, first>());
    if constexpr (first == degree)
        return coefficient;
    else
        return taylor_exp<first + 1, degree>(r) * r + coefficient;
}

// tanh x = e / (e + 2) with e = exp(2|x|) - 1, which keeps its relative accuracy as x goes to 0.
// exp(t) - 1 = 2^n p(r) + (2^n - 1), t = n ln2 + r, p the Taylor polynomial of expm1. Error below 3 ulp; NaN stays NaN.
template <class T>
PK_INLINE Vec<T> tanh(Vec<T> x) {
    using L = Ln2<T>;
    const Vec<T> magnitude = copysign(x, Vec<T>(T(1)));
    const Vec<T> saturation(L::tanh_is_one);
    const Vec<T> t = select_le(saturation, magnitude, saturation, magnitude) * Vec<T>(T(2));
    const auto [n, power] = round_and_exp2(t * Vec<T>(L::inverse));
    const Vec<T> r = (t - n * Vec<T>(L::high)) - n * Vec<T>(L::low);
    const Vec<T> p = r + r * r * taylor_exp<2, L::taylor_degree>(r);
    const Vec<T> e = power * p + (power - Vec<T>(T(1)));
    return copysign(e / (e + Vec<T>(T(2))), x);
}

// Relative error below 3 ulp; NaN stays NaN.
template <class T>
PK_INLINE Vec<T> expm1(Vec<T> x) {
    using L = Ln2<T>;
    const Vec<T> low(L::expm1_is_minus_one), high(L::exp_is_infinite), one(T(1));
    x = select_le(x, low, low, x);
    const Vec<T> bounded = select_le(high, x, high, x);
    // One power less, so that it does not overflow before the result does.
    const auto [n, power] = round_and_exp2(bounded * Vec<T>(L::inverse) - one);
    const Vec<T> m = n + one;
    const Vec<T> r = (bounded - m * Vec<T>(L::high)) - m * Vec<T>(L::low);
    const Vec<T> p = r + r * r * taylor_exp<2, L::taylor_degree>(r);
    return (power * p + (power - Vec<T>(T(0.5)))) * Vec<T>(T(2));
}

// exp x = 2^n (1 + p(r)), x = n ln2 + r; 2^n in two factors, so that results below the normal numbers and infinity come out
// right. Error below 2 ulp of a normal result; NaN stays NaN.
template <class T>
PK_INLINE Vec<T> exp(Vec<T> x) {
    using L = Ln2<T>;
    const Vec<T> low(L::exp_is_zero), high(L::exp_is_infinite);
    x = select_le(x, low, low, x);
    x = select_le(high, x, high, x);
    const Vec<T> n = round_and_exp2(x * Vec<T>(L::inverse)).n;
    const Vec<T> r = (x - n * Vec<T>(L::high)) - n * Vec<T>(L::low);
    const Vec<T> value = Vec<T>(T(1)) + (r + r * r * taylor_exp<2, L::taylor_degree>(r));
    const auto half = round_and_exp2(n * Vec<T>(T(0.5)));
    return value * half.power * round_and_exp2(n - half.n).power;
}

template <class T>
PK_INLINE Vec<T> sigmoid(Vec<T> x) {
    const Vec<T> one(T(1));
    return one / (one + exp(Vec<T>(T(0)) - x));
}

// c[0] x^n + c[1] x^(n-1) + ... + c[n]
template <class T, int n>
PK_INLINE Vec<T> polynomial(const double (&c)[n], Vec<T> x) {
    Vec<T> sum(static_cast<T>(c[0]));
#pragma GCC unroll 16
    for (int i = 1; i < n; ++i) sum = sum * x + Vec<T>(static_cast<T>(c[i]));
    return sum;
}

// tanh for float with fewer operations: exp(t) - 1 from a minimax polynomial of degree 6 (relative error 2e-8), and ln 2 in
// one part, whose error counts for less the larger n is. Error below 3 ulp, 0.4 ulp root mean square and no bias, which
// would add up over the steps of a trajectory. NaN stays NaN.
PK_INLINE Vec<float> tanh_fast(Vec<float> x) {
    using L = Ln2<float>;
    constexpr double coefficients[] = {1.3946426823e-3, 8.3665714023e-3, 4.1666282466e-2, 0.16666543123, 0.5};
    const Vec<float> magnitude = least(Vec<float>(L::tanh_is_one), copysign(x, Vec<float>(1.0f)));
    const Vec<float> t = magnitude + magnitude;
    const auto [n, power] = round_and_exp2(t * Vec<float>(L::inverse));
    const Vec<float> r = t - n * Vec<float>(0.693147180559945309f);
    const Vec<float> p = r + r * r * polynomial(coefficients, r);
    const Vec<float> e = power * p + (power - Vec<float>(1.0f));
    return copysign(e / (e + Vec<float>(2.0f)), x);
}
PK_INLINE Vec<double> tanh_fast(Vec<double> x) { return tanh(x); }

// erf x for |x| <= 0.46875, and erfc(x) exp(x^2) from there to 4 and, with larger errors, to 6: Cody's rational functions.
template <class T>
PK_INLINE Vec<T> erf_near(Vec<T> x) {
    constexpr double above[] = {1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2,
                                3.77485237685302021e2, 3.20937758913846947e3};
    constexpr double below[] = {1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3,
                                2.84423683343917062e3};
    const Vec<T> square = x * x;
    return x * polynomial(above, square) / polynomial(below, square);
}
template <class T>
PK_INLINE Vec<T> scaled_erfc(Vec<T> x) {
    constexpr double above[] = {2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0,
                                6.61191906371416295e1,  2.98635138197400131e2,  8.81952221241769090e2,
                                1.71204761263407058e3,  2.05107837782607147e3,  1.23033935479799725e3};
    constexpr double below[] = {1.0,
                                1.57449261107098347e1,
                                1.17693950891312499e2,
                                5.37181101862009858e2,
                                1.62138957456669019e3,
                                3.29079923573345963e3,
                                4.36261909014324716e3,
                                3.43936767414372164e3,
                                1.23033935480374942e3};
    return polynomial(above, x) / polynomial(below, x);
}

// Absolute error below 2 eps; NaN stays NaN.
template <class T>
PK_INLINE Vec<T> erf(Vec<T> x) {
    const Vec<T> magnitude = copysign(x, Vec<T>(T(1))), limit(T(6));
    const Vec<T> a = select_le(limit, magnitude, limit, magnitude);
    const Vec<T> outer = copysign(Vec<T>(T(1)) - exp(Vec<T>(T(0)) - a * a) * scaled_erfc(a), x);
    return select_le(magnitude, Vec<T>(T(0.46875)), erf_near(x), outer);
}

// erfc x for x >= 0. Error relative to the result below 4 eps (1 + x^2), as long as that is a normal number; NaN stays NaN.
template <class T>
PK_INLINE Vec<T> erfc_of_positive(Vec<T> x) {
    constexpr double above[] = {1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1,
                                1.25781726111229246e-1, 1.60837851487422766e-2, 6.58749161529837803e-4};
    constexpr double below[] = {1.0,
                                2.56852019228982242e0,
                                1.87295284992346725e0,
                                5.27905102951428412e-1,
                                6.05183413124413191e-2,
                                2.33520497626869185e-3};
    const Vec<T> one(T(1)), four(T(4));
    const Vec<T> a = select_le(x, four, x, four), b = select_le(x, four, four, x);  // the ranges of the two formulas
    const Vec<T> inverse = one / b, square = inverse * inverse;
    const Vec<T> far =
        (Vec<T>(T(0.564189583547756286948)) - square * polynomial(above, square) / polynomial(below, square)) * inverse;
    const Vec<T> outer = exp(Vec<T>(T(0)) - x * x) * select_le(x, four, scaled_erfc(a), far);
    return select_le(x, Vec<T>(T(0.46875)), one - erf_near(x), outer);
}

// log(1 + exp x) = max(x, 0) + log1p(u), u = exp(-|x|), log1p u = 2 atanh(u / (2 + u)). Error below 4 ulp; NaN stays NaN.
template <class T>
PK_INLINE Vec<T> softplus(Vec<T> x) {
    constexpr int terms = sizeof(T) == 4 ? 8 : 17;  // of atanh s = s + s^3/3 + ..., s <= 1/3
    const Vec<T> zero(T(0)), u = exp(zero - copysign(x, Vec<T>(T(1))));
    const Vec<T> s = u / (u + Vec<T>(T(2))), square = s * s;
    Vec<T> sum(T(1) / T(2 * terms - 1));
#pragma GCC unroll 32
    for (int i = terms - 2; i >= 0; --i) sum = sum * square + Vec<T>(T(1) / T(2 * i + 1));
    return select_le(x, zero, zero, x) + Vec<T>(T(2)) * s * sum;
}

// pi in three parts: n times the first two is exact up to |x| = sin_limit.
template <class T>
struct Pi;
template <>
struct Pi<float> {
    static constexpr float inverse = 0.318309886183790672f, high = 3.140625f, middle = 9.67502593994140625e-4f,
                           low = 1.50995799097837551e-7f;
    static constexpr float sin_limit = 12000.0f;
    static constexpr int terms = 7;  // of the series of sin on |r| <= pi/2
};
template <>
struct Pi<double> {
    static constexpr double inverse = 0.318309886183790671538, high = 3.14159265346825122833,
                            middle = 1.21542010180289428156e-10, low = -5.01655761266833226942e-20;
    static constexpr double sin_limit = 1e6;
    static constexpr int terms = 12;
};

PK_INLINE float sin_of_large(float x) { return __builtin_sinf(x); }
PK_INLINE double sin_of_large(double x) { return __builtin_sin(x); }
PK_INLINE float cos_of_large(float x) { return __builtin_cosf(x); }
PK_INLINE double cos_of_large(double x) { return __builtin_cos(x); }

// The argument is r + (n - shift) pi, |r| <= pi/2: (-1)^n sin r is sin x for shift 0, and cos x for shift 1/2.
template <class T>
PK_INLINE Vec<T> sin_shifted(Vec<T> x, T shift) {
    using P = Pi<T>;
    const Vec<T> magic(Format<T>::round_magic);
    const Vec<T> n = (x * Vec<T>(P::inverse) + Vec<T>(shift) + magic) - magic, turns = n - Vec<T>(shift);
    const Vec<T> r = ((x - turns * Vec<T>(P::high)) - turns * Vec<T>(P::middle)) - turns * Vec<T>(P::low);
    const Vec<T> odd = n - Vec<T>(T(2)) * ((n * Vec<T>(T(0.5)) + magic) - magic);  // 0 or +-1
    const Vec<T> square = r * r;
    T coefficient[P::terms];  // of r^(2i+1)
    double factorial = 1;
#pragma GCC unroll 16
    for (int i = 0; i < P::terms; ++i) {
        coefficient[i] = static_cast<T>((i % 2 == 0 ? 1 : -1) / factorial);
        factorial *= (2 * i + 2) * (2 * i + 3);
    }
    Vec<T> sum(coefficient[P::terms - 1]);
#pragma GCC unroll 16
    for (int i = P::terms - 2; i > 0; --i) sum = sum * square + Vec<T>(coefficient[i]);
    const Vec<T> sine = r + r * square * sum;
    return sine * (Vec<T>(T(1)) - Vec<T>(T(2)) * odd * odd);
}

// Lanes that are too large for the reduction above, or not finite, one by one: what the others get does not depend on them.
template <class T, bool cosine>
PK_INLINE Vec<T> sin_or_cos(Vec<T> x) {
    T large[Vec<T>::lanes], lane[Vec<T>::lanes];
    const Vec<T> zero(T(0)), one(T(1)), result = sin_shifted(x, cosine ? T(0.5) : T(0));
    select_le(copysign(x, one), Vec<T>(Pi<T>::sin_limit), zero, one).store(large);
    T any = 0;
    for (int i = 0; i < Vec<T>::lanes; ++i) any += large[i];
    if (any == 0) return result;
    T argument[Vec<T>::lanes];
    x.store(argument);
    result.store(lane);
    for (int i = 0; i < Vec<T>::lanes; ++i)
        if (large[i] != 0) lane[i] = cosine ? cos_of_large(argument[i]) : sin_of_large(argument[i]);
    return Vec<T>::load(lane);
}

// Absolute error below 2 eps; NaN and infinity give NaN.
template <class T>
PK_INLINE Vec<T> sin(Vec<T> x) {
    return sin_or_cos<T, false>(x);
}
template <class T>
PK_INLINE Vec<T> cos(Vec<T> x) {
    return sin_or_cos<T, true>(x);
}

PK_ISA_END
