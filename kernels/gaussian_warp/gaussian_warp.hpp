// Images read around displaced positions with separable kernels: Gaussian warping, and linear interpolation.
//
//   frames_t[x] = sum_p  w_z(p_z) w_y(p_y) w_x(p_x) image_t[p],   image_0 = image, image_t = frames_{t-1}
//
// over the window of K taps per axis around c = x - scale * flow_t[x]; see pykernels/ops/gaussian_warp/README.md.
//
// Tiling. An image is copied once into a buffer with a halo that holds what the padding mode puts there, so that no window
// needs a border case: where it lies further out, its start is clamped or wrapped. A row of taps is then one vector load:
//
//        window of a pixel            w_x in lanes
//      |. . . . . . . . .| row 0   *  w_y[0]       acc += w_y[j] * row_j,   j < K
//      |. . . . . . . . .| row 1   *  w_y[1]       out  = sum over lanes of acc * w_x
//
// Where the variance is one number, the weights of all taps are polynomials of the sub-pixel offset, piece by piece, from a
// table that is built once: a few multiply-adds give the weights of one axis, normalised. Else they are computed. Windows of
// neighbours that lie in the same rows share what is read of them (warp_groups), small ones as side_by_side.hpp says.
//
// Cost per pixel and channel: 2 K^R flops forward, 2 (2 + R) K^R with the gradients of flow and image; image, flow and frames
// are read or written once.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace pk {

enum class WarpForm { integrated, density, linear };
enum class WarpNormalize { none, window, inside };
enum class WarpPadding { zeros, border, reflection, periodic };

// Axes are z, y, x from 0; those in front of the `ranks` that there are have size 1. Strides are in elements.
template <class T>
struct GaussianWarp {
    std::int64_t batch, channels, steps;
    std::int64_t size[3];
    int ranks;
    WarpForm form;
    WarpNormalize normalize;
    WarpPadding padding;
    std::int64_t support;   // taps per axis, or 0: 2 r + 1, r as `largest` says
    const double* largest;  // (radii) largest variance for which each radius from 1 on is enough, increasing
    std::int64_t radii;
    double value;     // the variance, where `variance` is null
    double scale[3];  // pixels per unit of the flow
    const T* image;   // (B, C, z, y, x), x contiguous
    std::int64_t image_stride[4];
    const T* flow;                              // (B, T, axis) and contiguous (z, y, x)
    std::int64_t flow_stride[2], flow_axis[3];  // batch and step; where each axis' channel starts
    const T* variance;                          // (B, T), and contiguous (z, y, x) if it varies
    std::int64_t variance_stride[2];
    bool varies;
    T* frames;  // (B, T, C, z, y, x)
    int threads;
};

// Contiguous; null where not needed.
template <class T>
struct GaussianWarpGradients {
    const T* grads;  // of the frames
    T* image;        // (B, C, z, y, x)
    T* flow;         // (B, T, R, z, y, x), channels where GaussianWarp has them
    T* variance;     // (B, T, z, y, x) if it varies, else (B, T)
};

// Throw std::bad_alloc.
void gaussian_warp_forward(const GaussianWarp<float>& p);
void gaussian_warp_forward(const GaussianWarp<double>& p);
void gaussian_warp_backward(const GaussianWarp<float>& p, const GaussianWarpGradients<float>& g);
void gaussian_warp_backward(const GaussianWarp<double>& p, const GaussianWarpGradients<double>& g);

#define PK_DECLARE(isa)                                                                             \
    namespace isa {                                                                                 \
    void gaussian_warp_forward(const GaussianWarp<float>&);                                         \
    void gaussian_warp_forward(const GaussianWarp<double>&);                                        \
    void gaussian_warp_backward(const GaussianWarp<float>&, const GaussianWarpGradients<float>&);   \
    void gaussian_warp_backward(const GaussianWarp<double>&, const GaussianWarpGradients<double>&); \
    }
PK_FOR_EACH_ISA(PK_DECLARE)
#undef PK_DECLARE

}  // namespace pk
