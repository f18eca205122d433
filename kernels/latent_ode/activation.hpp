// Activations of vector fields and their derivatives on blocks of elements. For kernel units.
#pragma once

#include "common/arrays.hpp"
#include "common/math.hpp"
#include "common/simd.hpp"
#include "latent_ode/mlp_odeint.hpp"

PK_ISA_BEGIN

// h = act(z) in place of z, which is copied to `saved` if that is not null; n is a multiple of the lanes.
template <class T>
__attribute__((noinline)) void activate(T* h, T* saved, Index n, FieldActivation activation, T slope) {
    constexpr int lanes = Vec<T>::lanes;
    const Vec<T> zero(T(0)), s(slope);
    const auto each = [&](auto&& function) __attribute__((always_inline)) {
        for (Index i = 0; i < n; i += lanes) {
            const Vec<T> z = Vec<T>::load(h + i);
            if (saved != nullptr) z.store(saved + i);
            function(z).store(h + i);
        }
    };
    switch (activation) {
        case FieldActivation::relu: return each([&](Vec<T> z) { return greatest(zero, z); });
        case FieldActivation::leaky_relu: return each([&](Vec<T> z) { return select_le(z, zero, s * z, z); });
        case FieldActivation::tanh: return each([&](Vec<T> z) { return tanh_fast(z); });
        case FieldActivation::softplus: return each([&](Vec<T> z) { return softplus(z); });
        case FieldActivation::silu: return each([&](Vec<T> z) { return z * sigmoid(s * z); });
        case FieldActivation::elu: return each([&](Vec<T> z) { return select_le(z, zero, s * expm1(z), z); });
        case FieldActivation::sin: return each([&](Vec<T> z) { return sin(z); });
    }
}

// grad *= act'(z), from h = act(z), or from z where h does not tell it: softplus, silu, sin. For silu, the sum of
// grad * d act / d slope comes back.
template <class T>
__attribute__((noinline)) T activate_backward(T* grad, const T* saved, Index n, FieldActivation activation, T slope) {
    constexpr int lanes = Vec<T>::lanes;
    const Vec<T> zero(T(0)), one(T(1)), s(slope);
    const auto each = [&](auto&& function) __attribute__((always_inline)) {
        for (Index i = 0; i < n; i += lanes) function(Vec<T>::load(grad + i), Vec<T>::load(saved + i)).store(grad + i);
    };
    switch (activation) {
        case FieldActivation::relu: each([&](Vec<T> g, Vec<T> h) { return select_le(h, zero, zero, g); }); break;
        case FieldActivation::leaky_relu: each([&](Vec<T> g, Vec<T> h) { return select_le(h, zero, s * g, g); }); break;
        case FieldActivation::tanh: each([&](Vec<T> g, Vec<T> h) { return g * (one - h * h); }); break;
        case FieldActivation::softplus: each([&](Vec<T> g, Vec<T> z) { return g * sigmoid(z); }); break;
        case FieldActivation::silu: {
            Vec<T> total(T(0));
            constexpr Index run = 32 * lanes;  // summed by itself, for accuracy
            for (Index begin = 0; begin < n; begin += run) {
                Vec<T> part(T(0));
                for (Index i = begin; i < min(n, begin + run); i += lanes) {
                    const Vec<T> g = Vec<T>::load(grad + i), z = Vec<T>::load(saved + i);
                    const Vec<T> p = sigmoid(s * z), spread = z * p * (one - p);
                    part = part + g * z * spread;
                    (g * (p + s * spread)).store(grad + i);
                }
                total = total + part;
            }
            T lane[lanes], sum = 0;
            total.store(lane);
            for (int i = 0; i < lanes; ++i) sum += lane[i];
            return sum;
        }
        case FieldActivation::elu: each([&](Vec<T> g, Vec<T> h) { return select_le(h, zero, g * (h + s), g); }); break;
        case FieldActivation::sin: each([&](Vec<T> g, Vec<T> z) { return g * cos(z); }); break;
    }
    return 0;
}

template <class T>
void map_input(T* out, const T* y, Index n, InputMap map) {
    for (Index i = 0; i < n; i += Vec<T>::lanes) {
        const Vec<T> v = Vec<T>::load(y + i);
        const Vec<T> mapped = map == InputMap::square ? v * v
                              : map == InputMap::cube ? v * v * v
                              : map == InputMap::sin  ? sin(v)
                              : map == InputMap::cos  ? cos(v)
                              : map == InputMap::tanh ? tanh_fast(v)
                                                      : v;
        mapped.store(out + i);
    }
}

// grad *= map'(y).
template <class T>
void map_input_backward(T* grad, const T* y, Index n, InputMap map) {
    const Vec<T> zero(T(0)), one(T(1));
    for (Index i = 0; i < n; i += Vec<T>::lanes) {
        const Vec<T> v = Vec<T>::load(y + i), h = tanh_fast(v);
        const Vec<T> slope = map == InputMap::square ? Vec<T>(T(2)) * v
                             : map == InputMap::cube ? Vec<T>(T(3)) * v * v
                             : map == InputMap::sin  ? cos(v)
                             : map == InputMap::cos  ? zero - sin(v)
                             : map == InputMap::tanh ? one - h * h
                                                     : one;
        (Vec<T>::load(grad + i) * slope).store(grad + i);
    }
}

PK_ISA_END
