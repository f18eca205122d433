// Activations and their derivatives on vectors. For kernel units.
#pragma once

#include "causal_conv/causal_conv.hpp"
#include "common/arrays.hpp"
#include "common/math.hpp"
#include "common/simd.hpp"

PK_ISA_BEGIN

// Whether act' follows from the argument of the activation only, and not from its value.
PK_INLINE bool needs_argument(Activation a) { return a == Activation::silu || a == Activation::gelu; }

template <class T>
PK_INLINE Vec<T> silu(Vec<T> z) {
    return z * sigmoid(z);
}

// Phi(z), the normal distribution function; gelu(z) = z Phi(z).
template <class T>
PK_INLINE Vec<T> normal_cdf(Vec<T> z) {
    return Vec<T>(T(0.5)) + Vec<T>(T(0.5)) * erf(z * Vec<T>(T(0.70710678118654752440)));
}

// tanh, silu and gelu. Not inlined: as often as a register tile is finished, they may not take its registers from the
// loops before them. `count` is a multiple of the lanes.
template <class T>
__attribute__((noinline)) void activate_in_place(T* values, Index count, Activation activation) {
    for (Index i = 0; i < count; i += Vec<T>::lanes) {
        const Vec<T> z = Vec<T>::load(values + i);
        const Vec<T> y = activation == Activation::tanh   ? tanh(z)
                         : activation == Activation::silu ? silu(z)
                                                          : z * normal_cdf(z);
        y.store(values + i);
    }
}

// grad * act'(z) from h = act(z), whose sign is that of z because slopes are not negative; for silu and gelu from z.
template <class T>
PK_INLINE Vec<T> activate_backward(Vec<T> grad, Vec<T> saved, Activation activation, Vec<T> slope) {
    const Vec<T> zero(T(0)), one(T(1));
    switch (activation) {
        case Activation::relu: return select_le(saved, zero, zero, grad);
        case Activation::leaky_relu: return select_le(saved, zero, slope * grad, grad);
        case Activation::tanh: return grad * (one - saved * saved);
        case Activation::silu: {
            const Vec<T> s = sigmoid(saved);
            return grad * (s + saved * s * (one - s));
        }
        case Activation::gelu: {
            const Vec<T> density = exp(saved * saved * Vec<T>(T(-0.5))) * Vec<T>(T(0.39894228040143267794));
            return grad * (normal_cdf(saved) + saved * density);
        }
        case Activation::none: break;
    }
    return grad;
}

// y = act(z) + residual, or act(z + residual), in place of z: n channels or samples side by side. Residual and saved, as in
// CausalConvForward, or null.
template <class T>
void finish_row(T* y, T* saved, const T* residual, Index n, Activation activation, T negative_slope,
                bool residual_before_activation) {
    constexpr int lanes = Vec<T>::lanes;
    const bool relu = activation == Activation::relu, argument = needs_argument(activation);
    if (residual != nullptr && residual_before_activation) add_scaled(y, T(1), residual, n);
    if (saved != nullptr && argument) copy(saved, y, n);
    if (relu || activation == Activation::leaky_relu) {
        const Vec<T> zero(T(0)), slope(negative_slope);
        for (Index i = 0; i < n; i += lanes) {
            const int count = static_cast<int>(min(lanes, n - i));
            const Vec<T> z = Vec<T>::load_first(y + i, count);
            select_le(z, zero, relu ? zero : slope * z, z).store_first(y + i, count);
        }
    } else if (activation != Activation::none) {
        const Index whole = n / lanes * lanes;
        activate_in_place(y, whole, activation);
        if (whole < n) {
            T rest[lanes] = {};
            copy(rest, y + whole, n - whole);
            activate_in_place(rest, lanes, activation);
            copy(y + whole, rest, n - whole);
        }
    }
    if (saved != nullptr && !argument) copy(saved, y, n);
    if (residual != nullptr && !residual_before_activation) add_scaled(y, T(1), residual, n);
}

PK_ISA_END
