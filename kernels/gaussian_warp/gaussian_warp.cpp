#include "gaussian_warp/gaussian_warp.hpp"

#include "common/dispatch.hpp"

namespace pk {

void gaussian_warp_forward(const GaussianWarp<float>& p) { PK_CALL_ACTIVE(gaussian_warp_forward, (p)); }
void gaussian_warp_forward(const GaussianWarp<double>& p) { PK_CALL_ACTIVE(gaussian_warp_forward, (p)); }
void gaussian_warp_backward(const GaussianWarp<float>& p, const GaussianWarpGradients<float>& g) {
    PK_CALL_ACTIVE(gaussian_warp_backward, (p, g));
}
void gaussian_warp_backward(const GaussianWarp<double>& p, const GaussianWarpGradients<double>& g) {
    PK_CALL_ACTIVE(gaussian_warp_backward, (p, g));
}

}  // namespace pk
