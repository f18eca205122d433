// Windows of neighbouring pixels that lie side by side, as those of a smooth flow do: for kernel units.
//
// Lane i holds pixel i of a vector, and the column l of its window is at the address of lane 0's plus i, so that the taps of
// all lanes are one load, every lane has work, and no sum crosses lanes:
//
//     pixel 0  . . . .            out[i] = sum_r Y[r][i] sum_l X[l][i] image[top + r][left + l + i]
//     pixel 1    . . . .
//     pixel 2      . . . . .      a window that lies up to two pixels off its place has its weights moved along in X or Y
//
// The weights are polynomials on the whole range of the sub-pixel offset f. Those of the taps j and -j from the centre have the
// same even and opposite odd parts. The image must be finite: taps of other windows are read, with weight 0.
#pragma once

#include "gaussian_warp/weights.hpp"

PK_ISA_BEGIN

constexpr int most_side_by_side_taps = 5;  // larger windows are faster one by one
constexpr int most_spread = 2;             // pixels

// Of the weights of taps 0, 1, ... from the centre, from the highest power of f^2 down.
template <class T>
struct WeightPolynomials {
    static constexpr int degree = 10, halves = most_side_by_side_taps / 2 + 1;
    bool usable;
    T even[halves][6], odd[halves][5];
};

// `work` holds (degree + 2) vectors of `taps` doubles.
template <class T>
void build_polynomials(WeightPolynomials<T>& p, WarpForm form, WarpNormalize normalize, double variance, Index taps,
                       double* work) {
    constexpr int degree = WeightPolynomials<T>::degree, nodes = degree + 1, checks = 16;
    constexpr double allowed = 1e-8;
    p.usable = false;
    if (sizeof(T) != 4 || taps % 2 == 0 || taps > most_side_by_side_taps || form == WarpForm::linear || variance == 0)
        return;
    const Index wide = divide_up(taps, Vec<double>::lanes) * Vec<double>::lanes, centre = taps / 2;
    double node[nodes], value[nodes], power[nodes];
    for (int n = 0; n < nodes; ++n) {
        node[n] = 0.5 * __builtin_cos(3.14159265358979323846 * (n + 0.5) / nodes);
        computed_weights<double>(form, {normalize, 0, taps}, variance, node[n], taps, wide, wide, 1, work + n * wide);
    }
    double* const exact = work + nodes * wide;
    for (Index j = 0; j <= centre; ++j) {
        for (int n = 0; n < nodes; ++n) value[n] = work[n * wide + centre + j];
        interpolate(node, value, nodes, power);
        for (int i = 0; i < checks; ++i) {
            const double f = 0.5 * (i + 0.3) / checks;
            computed_weights<double>(form, {normalize, 0, taps}, variance, f, taps, wide, wide, 1, exact);
            double sum = 0;
            for (int n = degree; n >= 0; --n) sum = sum * f + power[n];
            const double error = sum - exact[centre + j];
            if (!(error <= allowed && error >= -allowed)) return;
        }
        for (int i = 0; i < 6; ++i) p.even[j][i] = static_cast<T>(power[degree - 2 * i]);
        for (int i = 0; i < 5; ++i) p.odd[j][i] = static_cast<T>(power[degree - 1 - 2 * i]);
    }
    p.usable = true;
}

template <class T, int n>
PK_INLINE Vec<T> horner(const T (&c)[n], Vec<T> x) {
    Vec<T> sum(c[0]);
#pragma GCC unroll 16
    for (int i = 1; i < n; ++i) sum = sum * x + Vec<T>(c[i]);
    return sum;
}

// Weights of all taps at f.
template <class T, int taps>
PK_INLINE void evaluate(const WeightPolynomials<T>& p, Vec<T> f, Vec<T>* weight) {
    constexpr int centre = taps / 2;
    const Vec<T> square = f * f;
#pragma GCC unroll 8
    for (int j = 0; j <= centre; ++j) {
        const Vec<T> even = horner(p.even[j], square), odd = f * horner(p.odd[j], square);
        weight[centre - j] = even - odd;
        weight[centre + j] = j == 0 ? even : even + odd;
    }
}

// The weights moved on by shift = 0, 1, ..., spread taps, lane by lane.
template <class T, int taps, int spread>
PK_INLINE void move_along(const Vec<T>* weight, Vec<T> shift, Vec<T>* moved) {
    const Vec<T> zero(T(0));
#pragma GCC unroll 16
    for (int l = 0; l < taps + spread; ++l) {
        Vec<T> at[3];
#pragma GCC unroll 3
        for (int s = 0; s <= spread; ++s) at[s] = l - s >= 0 && l - s < taps ? weight[l - s] : zero;
        if constexpr (spread == 0) moved[l] = at[0];
        if constexpr (spread == 1) moved[l] = select_le(shift, Vec<T>(T(0.5)), at[0], at[1]);
        if constexpr (spread == 2)
            moved[l] = select_le(shift, Vec<T>(T(0.5)), at[0], select_le(shift, Vec<T>(T(1.5)), at[1], at[2]));
    }
}

// Where the windows of a vector of pixels lie.
template <class T>
struct SideBySide {
    Index left, top;  // in the padded image: the window of pixel i is at left + i + shift_x[i], top + shift_y[i]
    Index spread_x, spread_y;  // the largest shifts
    const T *f_x, *f_y;        // of each pixel, as are the shifts
    const T *shift_x, *shift_y;
};

// Sums over the windows; hands that of each channel to take(channel, sum).
template <class T, int taps, int spread, class Take>
PK_INLINE void side_by_side_sums(const WeightPolynomials<T>& p, const SideBySide<T>& s, const T* padded, Index channels,
                                 Index channel_stride, Index row, const Take& take) {
    const Vec<T> zero(T(0));
    Vec<T> weight[taps], x[taps + spread], y[taps + most_spread];
    evaluate<T, taps>(p, Vec<T>::load(s.f_y), weight);
    move_along<T, taps, most_spread>(weight, Vec<T>::load(s.shift_y), y);
    evaluate<T, taps>(p, Vec<T>::load(s.f_x), weight);
    move_along<T, taps, spread>(weight, Vec<T>::load(s.shift_x), x);
    for (Index c = 0; c < channels; ++c) {
        const T* at = padded + c * channel_stride + s.top * row + s.left;
        Vec<T> sum = zero;
        for (Index r = 0; r < taps + s.spread_y; ++r, at += row) {
            Vec<T> along = zero;
#pragma GCC unroll 8
            for (int l = 0; l < taps + spread; ++l) along = along + x[l] * Vec<T>::load(at + l);
            sum = sum + y[r] * along;
        }
        take(c, sum);
    }
}

template <class T, int taps, class Take>
PK_INLINE void side_by_side_vector(const WeightPolynomials<T>& p, const SideBySide<T>& s, const T* padded,
                                   Index channels, Index channel_stride, Index row, const Take& take) {
    if (s.spread_x == 0)
        side_by_side_sums<T, taps, 0>(p, s, padded, channels, channel_stride, row, take);
    else if (s.spread_x == 1)
        side_by_side_sums<T, taps, 1>(p, s, padded, channels, channel_stride, row, take);
    else
        side_by_side_sums<T, taps, 2>(p, s, padded, channels, channel_stride, row, take);
}

template <class T>
PK_INLINE bool all_finite(const T* x, Index n) {
    constexpr int lanes = Vec<T>::lanes;
    const Vec<T> zero(T(0));
    Vec<T> sum = zero;
    Index i = 0;
    for (; i + lanes <= n; i += lanes) sum = sum + zero * Vec<T>::load(x + i);
    if (i < n) sum = sum + zero * Vec<T>::load_first(x + i, static_cast<int>(n - i));
    return sum_lanes(sum) == 0;
}

PK_ISA_END
