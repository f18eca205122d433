// Small products of matrices from register tiles, C (+)= A B: the vectors run along the columns of B and C, whose rows are
// contiguous, and the elements of A are broadcast.
//
//            columns (lanes)
//          +----------------+
//    rows  |  MR x NV tile  |   C[i][j] = sum over k of A[i][k] B[k][j]
//          +----------------+
//
// Per step of k a tile loads NV vectors and MR scalars for MR * NV fused multiply-adds. For kernel units.
#pragma once

#include "common/arrays.hpp"
#include "common/simd.hpp"

PK_ISA_BEGIN

#if PK_VECTOR_BYTES == 64
constexpr int tile_vectors = 4;
#else
constexpr int tile_vectors = 2;
#endif

// Sums over k are one chain of fused multiply-adds, or four for `split` products: those with few rows of results, whose few
// chains would wait for themselves. The order of a sum must not depend on the tile, so that it does not depend on how
// samples are divided into blocks.
constexpr int chains(bool split) { return split ? 4 : 1; }

// Rows of the largest tile for this many vectors of columns: what the registers hold.
constexpr int tile_rows(int vectors, bool split) {
#if PK_VECTOR_BYTES == 64
    if (split) return vectors == 1 ? 4 : vectors == 2 ? 2 : 1;
    return vectors == 1 ? 16 : vectors == 2 ? 12 : vectors == 3 ? 8 : 6;
#else
    if (split) return vectors == 1 ? 2 : 1;
    return vectors == 1 ? 8 : 6;
#endif
}

// The height of the next tile where `left` rows are left and the largest has `most`.
constexpr int next_rows(Index left, int most) {
    if (left >= most) return most;
    int rows = 8;
    while (rows > left || rows >= most) rows /= 2;
    return rows;
}

// One tile summed over `segments` runs of `depth` steps. A[i][k] is a[i * a_row + k * a_step], or with Packed a[k * MR + i].
template <class T, int MR, int NV, bool Packed, bool split>
PK_INLINE void tile_sum(Vec<T> (&sum)[MR][NV], const T* a, Index a_row, Index a_step, const T* b, Index b_row,
                        Index depth, Index segments, Index a_segment, Index b_segment) {
    constexpr int lanes = Vec<T>::lanes, ways = chains(split);
    Vec<T> part[ways][MR][NV];
#pragma GCC unroll 16
    for (int w = 0; w < ways; ++w)
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
            for (int j = 0; j < NV; ++j) part[w][i][j] = Vec<T>(T(0));
    for (Index s = 0; s < segments; ++s) {
        const T* as = a + s * a_segment;
        const T* bs = b + s * b_segment;
        Index k = 0;
        for (; k + ways <= depth; k += ways) {
#pragma GCC unroll 16
            for (int w = 0; w < ways; ++w) {
                Vec<T> v[NV];
#pragma GCC unroll 16
                for (int j = 0; j < NV; ++j) v[j] = Vec<T>::load(bs + (k + w) * b_row + j * lanes);
#pragma GCC unroll 16
                for (int i = 0; i < MR; ++i) {
                    const Vec<T> factor(Packed ? as[(k + w) * MR + i] : as[i * a_row + (k + w) * a_step]);
#pragma GCC unroll 16
                    for (int j = 0; j < NV; ++j) part[w][i][j] = part[w][i][j] + factor * v[j];
                }
            }
        }
        for (; k < depth; ++k) {
            Vec<T> v[NV];
#pragma GCC unroll 16
            for (int j = 0; j < NV; ++j) v[j] = Vec<T>::load(bs + k * b_row + j * lanes);
#pragma GCC unroll 16
            for (int i = 0; i < MR; ++i) {
                const Vec<T> factor(Packed ? as[k * MR + i] : as[i * a_row + k * a_step]);
#pragma GCC unroll 16
                for (int j = 0; j < NV; ++j) part[0][i][j] = part[0][i][j] + factor * v[j];
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < NV; ++j) {
            if constexpr (split)
                sum[i][j] = (part[0][i][j] + part[1][i][j]) + (part[2][i][j] + part[3][i][j]);
            else
                sum[i][j] = part[0][i][j];
        }
}

// Where a product starts from: from zero, from a value for each row or each column, or from what C holds.
template <class T>
struct Start {
    const T* per_row;
    const T* per_column;
    bool add;
};

template <class T, int MR, int NV>
PK_INLINE void tile_store(const Vec<T> (&sum)[MR][NV], T* c, Index c_row, const Start<T>& start) {
    constexpr int lanes = Vec<T>::lanes;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < NV; ++j) {
            T* at = c + i * c_row + j * lanes;
            Vec<T> value = sum[i][j];
            if (start.per_row != nullptr) value = value + Vec<T>(start.per_row[i]);
            if (start.per_column != nullptr) value = value + Vec<T>::load(start.per_column + j * lanes);
            if (start.add) value = value + Vec<T>::load(at);
            value.store(at);
        }
}

// A packed for tiles over `vectors` vectors: panels of tile_rows rows, then what next_rows says, each [k][row].
template <class T>
void pack_panels(T* packed, const T* a, Index rows, Index depth, Index a_row, Index a_step, int vectors, bool split) {
    for (Index i = 0; i < rows;) {
        const int height = next_rows(rows - i, tile_rows(vectors, split));
        for (Index k = 0; k < depth; ++k)
            for (int r = 0; r < height; ++r) packed[k * height + r] = a[(i + r) * a_row + k * a_step];
        packed += height * depth;
        i += height;
    }
}

template <class T>
struct PanelProduct {
    const T* packed;
    Index rows, depth;
    const T* b;
    T* c;
    Start<T> start;
};

template <class T, int NV, bool split, int MR, class Finish>
PK_INLINE void panel(PanelProduct<T>& p, const Finish& finish) {
    constexpr Index width = NV * Vec<T>::lanes;
    Vec<T> sum[MR][NV];
    tile_sum<T, MR, NV, true, split>(sum, p.packed, 0, 0, p.b, width, p.depth, 1, 0, 0);
    tile_store<T, MR, NV>(sum, p.c, width, p.start);
    finish(p.c, MR * width);
    p.packed += MR * p.depth;
    p.c += MR * width;
    p.rows -= MR;
    if (p.start.per_row != nullptr) p.start.per_row += MR;
}

template <class T, int NV, bool split, class Finish>
void panels(PanelProduct<T> p, const Finish& finish) {
    constexpr int most = tile_rows(NV, split);
    while (p.rows >= most) panel<T, NV, split, most>(p, finish);
    if constexpr (most > 8)
        if (p.rows >= 8) panel<T, NV, split, 8>(p, finish);
    if constexpr (most > 4)
        if (p.rows >= 4) panel<T, NV, split, 4>(p, finish);
    if constexpr (most > 2)
        if (p.rows >= 2) panel<T, NV, split, 2>(p, finish);
    if constexpr (most > 1)
        if (p.rows >= 1) panel<T, NV, split, 1>(p, finish);
}

// C = A B (rows x vectors * lanes) for A packed by pack_panels; rows of B and C lie one after the other. finish(c, count) is
// called for every run of finished elements while they are in the cache.
template <class T, bool split, class Finish>
void panel_product(const PanelProduct<T>& p, int vectors, const Finish& finish) {
    switch (vectors) {
        case 1: return panels<T, 1, split>(p, finish);
        case 2: return panels<T, 2, split>(p, finish);
#if PK_VECTOR_BYTES == 64
        case 3: return panels<T, 3, split>(p, finish);
        case 4: return panels<T, 4, split>(p, finish);
#endif
        default: break;
    }
}

// A product with A where it lies, summed over several segments. b_row 0: B lies in panels of tile_vectors vectors, the last
// one perhaps narrower, each with its rows one after the other.
template <class T>
struct StridedProduct {
    Index rows, depth;
    const T* a;
    Index a_row, a_step, a_segment;
    const T* b;
    Index b_row, b_segment;
    Index segments;
    T* c;
    Index c_row;
};

template <class T, int MR, int NV, bool split>
void strided_tile(const StridedProduct<T>& p, Index row, Index column, const Start<T>& start) {
    Vec<T> sum[MR][NV];
    const bool panels = p.b_row == 0;
    tile_sum<T, MR, NV, false, split>(sum, p.a + row * p.a_row, p.a_row, p.a_step,
                                      p.b + (panels ? column * p.depth : column), panels ? NV * Vec<T>::lanes : p.b_row,
                                      p.depth, p.segments, p.a_segment, p.b_segment);
    const Start<T> here{start.per_row == nullptr ? nullptr : start.per_row + row,
                        start.per_column == nullptr ? nullptr : start.per_column + column, start.add};
    tile_store<T, MR, NV>(sum, p.c + row * p.c_row + column, p.c_row, here);
}

// The tile of `height` rows, at most `most`.
template <class T, int most, int NV, bool split>
PK_INLINE void strided_tile_of(int height, const StridedProduct<T>& p, Index row, Index column, const Start<T>& start) {
    if (height == most)
        strided_tile<T, most, NV, split>(p, row, column, start);
    else if constexpr (most > 1)
        strided_tile_of<T, most - 1, NV, split>(height, p, row, column, start);
}

// Rows are divided evenly: a last tile of one row would load as much as a full one.
template <class T, int NV, bool split>
void strided_rows(const StridedProduct<T>& p, Index column, const Start<T>& start) {
    constexpr int most = tile_rows(NV, split) > 8 ? 8 : tile_rows(NV, split);
    if (p.rows <= most) {  // without divisions
        if (p.rows > 0) strided_tile_of<T, most, NV, split>(static_cast<int>(p.rows), p, 0, column, start);
        return;
    }
    const Index tiles = divide_up(p.rows, most), larger = p.rows % tiles;
    const int height = static_cast<int>(p.rows / tiles);
    Index row = 0;
    for (Index i = 0; i < tiles; ++i) {
        const int here = height + (i < larger ? 1 : 0);
        strided_tile_of<T, most, NV, split>(here, p, row, column, start);
        row += here;
    }
}

// C (rows x vectors * lanes) from `start` plus the product.
template <class T, bool split>
void strided_product(const StridedProduct<T>& p, Index vectors, const Start<T>& start) {
    constexpr int lanes = Vec<T>::lanes;
    Index v = 0;
    for (; v + tile_vectors <= vectors; v += tile_vectors) strided_rows<T, tile_vectors, split>(p, v * lanes, start);
#if PK_VECTOR_BYTES == 64
    if (vectors - v == 3) strided_rows<T, 3, split>(p, v * lanes, start);
    if (vectors - v == 2) strided_rows<T, 2, split>(p, v * lanes, start);
#endif
    if (vectors - v == 1) strided_rows<T, 1, split>(p, v * lanes, start);
}

// out[j][i] = in[i][j] for rows x columns elements. Columns are read, and rows and columns written, up to whole vectors; what
// is written behind them has no meaning.
#ifdef PK_PLAIN
template <class T>
void transpose(T* out, Index out_row, const T* in, Index in_row, Index rows, Index columns) {
    for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < columns; ++j) out[j * out_row + i] = in[i * in_row + j];
}
#else
template <int... I>
struct Lanes {};
template <int n, int... I>
struct CountTo : CountTo<n - 1, n - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
    using Type = Lanes<I...>;
};

// Of each pair of blocks of `width` lanes, the first of a and the first of b, or the second of both.
template <class T, int width, bool second, int... I>
PK_INLINE Vec<T> pick(Vec<T> a, Vec<T> b, Lanes<I...>) {
    constexpr int lanes = Vec<T>::lanes;
    Vec<T> r;
    if constexpr (second)
        r.v = __builtin_shufflevector(a.v, b.v, ((I & width) ? lanes + I : I + width)...);
    else
        r.v = __builtin_shufflevector(a.v, b.v, ((I & width) ? lanes + I - width : I)...);
    return r;
}

template <class T, int width>
PK_INLINE void swap_blocks(Vec<T>* v) {
    constexpr int lanes = Vec<T>::lanes;
    using All = typename CountTo<lanes>::Type;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
        if ((i & width) == 0) {
            const Vec<T> a = v[i], b = v[i + width];
            v[i] = pick<T, width, false>(a, b, All{});
            v[i + width] = pick<T, width, true>(a, b, All{});
        }
    if constexpr (2 * width < lanes) swap_blocks<T, 2 * width>(v);
}

template <class T>
void transpose(T* out, Index out_row, const T* in, Index in_row, Index rows, Index columns) {
    constexpr int lanes = Vec<T>::lanes;
    for (Index i = 0; i < rows; i += lanes) {
        const int height = static_cast<int>(min(lanes, rows - i));
        for (Index j = 0; j < columns; j += lanes) {
            Vec<T> v[lanes];
#pragma GCC unroll 16
            for (int r = 0; r < lanes; ++r) v[r] = Vec<T>::load(in + (i + (r < height ? r : 0)) * in_row + j);
            swap_blocks<T, 1>(v);
#pragma GCC unroll 16
            for (int r = 0; r < lanes; ++r) v[r].store(out + (j + r) * out_row + i);
        }
    }
}
#endif

PK_ISA_END
