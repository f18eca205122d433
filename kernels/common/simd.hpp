// Vec<T>: as many lanes of float or double as one register of this capability holds, with the few operations that the
// kernels need. Included by kernel units only (see isa.hpp).
//
// gcc and clang vector types give one source for every register width; the `generic` capability uses plain arrays.
// Products and sums are written apart and contract to FMA where the capability has it.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/isa.hpp"

#if defined(PK_PLAIN)
#define PK_VECTOR_BYTES 16
#elif defined(__AVX512F__)
#define PK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PK_VECTOR_BYTES 32
#else
#define PK_VECTOR_BYTES 16
#endif

#if PK_VECTOR_BYTES > 16
// gcc 12 takes the deliberately undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define PK_INLINE inline __attribute__((always_inline))

PK_ISA_BEGIN

template <class T>
struct Format;
template <>
struct Format<float> {
    using Int = std::int32_t;
    using Unsigned = std::uint32_t;
    static constexpr int mantissa_bits = 23, exponent_bias = 127;
    static constexpr float round_magic =
        12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
};
template <>
struct Format<double> {
    using Int = std::int64_t;
    using Unsigned = std::uint64_t;
    static constexpr int mantissa_bits = 52, exponent_bias = 1023;
    static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
};

template <class T>
struct Vec {
    using Scalar = T;
    using Int = typename Format<T>::Int;
    static constexpr int lanes = PK_VECTOR_BYTES / static_cast<int>(sizeof(T));
#ifdef PK_PLAIN
    template <class U>
    struct Lanes {
        U lane[lanes];
        U& operator[](int i) { return lane[i]; }
        U operator[](int i) const { return lane[i]; }
    };
    using Storage = Lanes<T>;
    using IntStorage = Lanes<Int>;
#else
    typedef T Storage __attribute__((vector_size(PK_VECTOR_BYTES)));
    typedef Int IntStorage __attribute__((vector_size(PK_VECTOR_BYTES)));
#endif
    Storage v;

    PK_INLINE Vec() = default;
    PK_INLINE Vec(T value) {
#ifdef PK_PLAIN
        for (int i = 0; i < lanes; ++i) v[i] = value;
#else
        v = value - Storage{};
#endif
    }
    static PK_INLINE Vec load(const T* p) {
        Vec r;
        std::memcpy(&r.v, p, sizeof r.v);
        return r;
    }
    PK_INLINE void store(T* p) const { std::memcpy(p, &v, sizeof v); }

    // Lanes [low, high); the others read as zero, and their memory is not touched.
    static PK_INLINE Vec load_range(const T* p, int low, int high) {
#if defined(__AVX512F__) && !defined(PK_PLAIN)
        const unsigned mask = ((1u << high) - 1u) & ~((1u << low) - 1u);
        Vec r;
        if constexpr (sizeof(T) == 4)
            r.v = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
        else
            r.v = _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
        return r;
#else
        T lane[lanes] = {};
        for (int i = low; i < high; ++i) lane[i] = p[i];
        return load(lane);
#endif
    }
    // The first n lanes, 0 < n <= lanes; the others read as zero and are not written.
    static PK_INLINE Vec load_first(const T* p, int n) { return load_range(p, 0, n); }
    PK_INLINE void store_first(T* p, int n) const {
#if defined(__AVX512F__) && !defined(PK_PLAIN)
        if constexpr (sizeof(T) == 4)
            _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), v);
        else
            _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1u), v);
#else
        T lane[lanes];
        store(lane);
        for (int i = 0; i < n; ++i) p[i] = lane[i];
#endif
    }
};

#ifdef PK_PLAIN
#define PK_LANEWISE(op)                                                    \
    template <class T>                                                     \
    PK_INLINE Vec<T> operator op(Vec<T> a, Vec<T> b) {                     \
        for (int i = 0; i < Vec<T>::lanes; ++i) a.v[i] = a.v[i] op b.v[i]; \
        return a;                                                          \
    }
#else
#define PK_LANEWISE(op)                                \
    template <class T>                                 \
    PK_INLINE Vec<T> operator op(Vec<T> a, Vec<T> b) { \
        a.v = a.v op b.v;                              \
        return a;                                      \
    }
#endif
PK_LANEWISE(+)
PK_LANEWISE(-)
PK_LANEWISE(*)
PK_LANEWISE(/)
#undef PK_LANEWISE

// Adds the halves of x until sixteen bytes are left, and stores those: the first part of the sum of all lanes.
template <class T>
constexpr int folded_lanes = 16 / static_cast<int>(sizeof(T));

PK_INLINE void store_folded(float* p, Vec<float> x) {
#if PK_VECTOR_BYTES == 64
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif PK_VECTOR_BYTES == 32
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1)));
#else
    x.store(p);
#endif
}
PK_INLINE void store_folded(double* p, Vec<double> x) {
#if PK_VECTOR_BYTES == 64
    const __m256d half = _mm256_add_pd(_mm512_castpd512_pd256(x.v), _mm512_extractf64x4_pd(x.v, 1));
    _mm_storeu_pd(p, _mm_add_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1)));
#elif PK_VECTOR_BYTES == 32
    _mm_storeu_pd(p, _mm_add_pd(_mm256_castpd256_pd128(x.v), _mm256_extractf128_pd(x.v, 1)));
#else
    x.store(p);
#endif
}

// x <= bound ? yes : no, lane by lane; NaN takes `no`.
template <class T>
PK_INLINE Vec<T> select_le(Vec<T> x, Vec<T> bound, Vec<T> yes, Vec<T> no) {
#ifdef PK_PLAIN
    for (int i = 0; i < Vec<T>::lanes; ++i) no.v[i] = x.v[i] <= bound.v[i] ? yes.v[i] : no.v[i];
#else
    no.v = x.v <= bound.v ? yes.v : no.v;
#endif
    return no;
}

// Whether x > bound in some lane; NaN is not.
template <class T>
PK_INLINE bool any_greater(Vec<T> x, Vec<T> bound) {
#if defined(PK_PLAIN) || PK_VECTOR_BYTES == 16
    bool any = false;
    for (int i = 0; i < Vec<T>::lanes; ++i) any = any || x.v[i] > bound.v[i];
    return any;
#elif PK_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return _mm512_cmp_ps_mask(x.v, bound.v, _CMP_GT_OQ) != 0;
    else
        return _mm512_cmp_pd_mask(x.v, bound.v, _CMP_GT_OQ) != 0;
#else
    if constexpr (sizeof(T) == 4)
        return _mm256_movemask_ps(_mm256_cmp_ps(x.v, bound.v, _CMP_GT_OQ)) != 0;
    else
        return _mm256_movemask_pd(_mm256_cmp_pd(x.v, bound.v, _CMP_GT_OQ)) != 0;
#endif
}

// The smaller or larger of a and b, and b where one of them is NaN.
#if defined(PK_PLAIN) || PK_VECTOR_BYTES == 16
template <class T>
PK_INLINE Vec<T> least(Vec<T> a, Vec<T> b) {
    return select_le(b, a, b, select_le(a, b, a, b));
}
template <class T>
PK_INLINE Vec<T> greatest(Vec<T> a, Vec<T> b) {
    return select_le(a, b, b, select_le(b, a, a, b));
}
#elif PK_VECTOR_BYTES == 64
PK_INLINE Vec<float> least(Vec<float> a, Vec<float> b) { return a.v = _mm512_min_ps(a.v, b.v), a; }
PK_INLINE Vec<double> least(Vec<double> a, Vec<double> b) { return a.v = _mm512_min_pd(a.v, b.v), a; }
PK_INLINE Vec<float> greatest(Vec<float> a, Vec<float> b) { return a.v = _mm512_max_ps(a.v, b.v), a; }
PK_INLINE Vec<double> greatest(Vec<double> a, Vec<double> b) { return a.v = _mm512_max_pd(a.v, b.v), a; }
#else
PK_INLINE Vec<float> least(Vec<float> a, Vec<float> b) { return a.v = _mm256_min_ps(a.v, b.v), a; }
PK_INLINE Vec<double> least(Vec<double> a, Vec<double> b) { return a.v = _mm256_min_pd(a.v, b.v), a; }
PK_INLINE Vec<float> greatest(Vec<float> a, Vec<float> b) { return a.v = _mm256_max_ps(a.v, b.v), a; }
PK_INLINE Vec<double> greatest(Vec<double> a, Vec<double> b) { return a.v = _mm256_max_pd(a.v, b.v), a; }
#endif

// The largest integer that is at most x, for |x| <= 2^30; and such integers as 32-bit ones.
#if defined(PK_PLAIN) || PK_VECTOR_BYTES == 16
template <class T>
PK_INLINE Vec<T> floor(Vec<T> x) {
    for (int i = 0; i < Vec<T>::lanes; ++i) {
        const T whole = static_cast<T>(static_cast<std::int32_t>(x.v[i]));
        x.v[i] = whole > x.v[i] ? whole - T(1) : whole;
    }
    return x;
}
template <class T>
PK_INLINE void store_integers(std::int32_t* p, Vec<T> x) {
    for (int i = 0; i < Vec<T>::lanes; ++i) p[i] = static_cast<std::int32_t>(x.v[i]);
}
#elif PK_VECTOR_BYTES == 64
PK_INLINE Vec<float> floor(Vec<float> x) { return x.v = _mm512_floor_ps(x.v), x; }
PK_INLINE Vec<double> floor(Vec<double> x) { return x.v = _mm512_floor_pd(x.v), x; }
PK_INLINE void store_integers(std::int32_t* p, Vec<float> x) { _mm512_storeu_si512(p, _mm512_cvttps_epi32(x.v)); }
PK_INLINE void store_integers(std::int32_t* p, Vec<double> x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvttpd_epi32(x.v));
}
#else
PK_INLINE Vec<float> floor(Vec<float> x) { return x.v = _mm256_floor_ps(x.v), x; }
PK_INLINE Vec<double> floor(Vec<double> x) { return x.v = _mm256_floor_pd(x.v), x; }
PK_INLINE void store_integers(std::int32_t* p, Vec<float> x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvttps_epi32(x.v));
}
PK_INLINE void store_integers(std::int32_t* p, Vec<double> x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvttpd_epi32(x.v));
}
#endif

// Keeps x in a register, where the compiler would load it anew for each use.
template <class T>
PK_INLINE void keep_in_register(Vec<T>& x) {
#if PK_VECTOR_BYTES > 16
    asm("" : "+v"(x.v));
#else
    (void)x;
#endif
}

template <class T>
PK_INLINE typename Vec<T>::IntStorage to_bits(Vec<T> x) {
    typename Vec<T>::IntStorage bits;
    std::memcpy(&bits, &x.v, sizeof bits);
    return bits;
}

template <class T>
PK_INLINE Vec<T> from_bits(typename Vec<T>::IntStorage bits) {
    Vec<T> x;
    std::memcpy(&x.v, &bits, sizeof bits);
    return x;
}

template <class T>
PK_INLINE Vec<T> copysign(Vec<T> magnitude, Vec<T> sign) {
    using Int = typename Vec<T>::Int;
    constexpr Int value_mask = sizeof(T) == 4 ? static_cast<Int>(INT32_MAX) : static_cast<Int>(INT64_MAX);
    auto m = to_bits(magnitude);
    const auto s = to_bits(sign);
#ifdef PK_PLAIN
    for (int i = 0; i < Vec<T>::lanes; ++i) m[i] = (m[i] & value_mask) | (s[i] & ~value_mask);
#else
    m = (m & value_mask) | (s & ~value_mask);
#endif
    return from_bits<T>(m);
}

// n and 2^n for the integer n nearest to x, where 2^n is a normal number.
template <class T>
struct RoundedPower {
    Vec<T> n, power;
};
template <class T>
PK_INLINE RoundedPower<T> round_and_exp2(Vec<T> x) {
    using F = Format<T>;
    const Vec<T> magic(F::round_magic);
    const Vec<T> shifted = x + magic;
    auto bits = to_bits(shifted);
    const auto offset = to_bits(magic);
#ifdef PK_PLAIN
    using U = typename F::Unsigned;  // whose overflow, of NaN and large x, is defined
    for (int i = 0; i < Vec<T>::lanes; ++i) {
        const U exponent = static_cast<U>(bits[i]) - static_cast<U>(offset[i]) + static_cast<U>(F::exponent_bias);
        bits[i] = static_cast<typename F::Int>(exponent << F::mantissa_bits);
    }
#else
    bits = (bits - offset + F::exponent_bias) << F::mantissa_bits;
#endif
    return {shifted - magic, from_bits<T>(bits)};
}

PK_ISA_END
