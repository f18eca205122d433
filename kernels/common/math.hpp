// Elementary functions of a Vec, with error bounds that the tests check in units in the last place (ulp).
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
    static constexpr int taylor_degree = 8;  // relative truncation error of expm1 on |r| <= ln2/2: 6e-10
};
template <>
struct Ln2<double> {
    static constexpr double inverse = 1.44269504088896340736, high = 0.693147180369123816490,
                            low = 1.90821492927058770002e-10;
    static constexpr double tanh_is_one = 20.0;
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

PK_ISA_END
