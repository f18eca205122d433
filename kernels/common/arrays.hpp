// Loops over short contiguous runs, where a call of a library function would cost more than the work. For kernel units.
#pragma once

#include <cstdint>

#include "common/simd.hpp"

PK_ISA_BEGIN

using Index = std::int64_t;

PK_INLINE Index min(Index a, Index b) { return a < b ? a : b; }
PK_INLINE Index max(Index a, Index b) { return a > b ? a : b; }
PK_INLINE Index divide_up(Index a, Index b) { return (a + b - 1) / b; }

// Elements rounded up to whole cache lines.
template <class T>
PK_INLINE Index aligned(Index elements) {
    constexpr Index line = 64 / sizeof(T);
    return divide_up(elements, line) * line;
}

template <class T>
PK_INLINE void copy(T* out, const T* p, Index n) {
    constexpr int lanes = Vec<T>::lanes;
    Index i = 0;
    for (; i + lanes <= n; i += lanes) Vec<T>::load(p + i).store(out + i);
    if (i < n) Vec<T>::load_first(p + i, static_cast<int>(n - i)).store_first(out + i, static_cast<int>(n - i));
}

template <class T>
PK_INLINE void clear(T* out, Index n) {
    constexpr int lanes = Vec<T>::lanes;
    const Vec<T> zero(T(0));
    Index i = 0;
    for (; i + lanes <= n; i += lanes) zero.store(out + i);
    if (i < n) zero.store_first(out + i, static_cast<int>(n - i));
}

// out += scale * p.
template <class T>
PK_INLINE void add_scaled(T* out, T scale, const T* p, Index n) {
    constexpr int lanes = Vec<T>::lanes;
    const Vec<T> s(scale);
    Index i = 0;
    for (; i + lanes <= n; i += lanes) (Vec<T>::load(out + i) + s * Vec<T>::load(p + i)).store(out + i);
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        (Vec<T>::load_first(out + i, rest) + s * Vec<T>::load_first(p + i, rest)).store_first(out + i, rest);
    }
}

// The first n lanes, `stride` elements apart; the others are zero.
template <class T>
PK_INLINE Vec<T> load_strided(const T* p, Index stride, int n) {
    if (stride == 1) return n == Vec<T>::lanes ? Vec<T>::load(p) : Vec<T>::load_first(p, n);
    T lane[Vec<T>::lanes] = {};
    for (int i = 0; i < n; ++i) lane[i] = p[i * stride];
    return Vec<T>::load(lane);
}

PK_ISA_END
