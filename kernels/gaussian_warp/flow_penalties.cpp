#include "gaussian_warp/flow_penalties.hpp"

#include "common/dispatch.hpp"

namespace pk {

template <class T>
void flow_penalties(const FlowPenalties<T>& p, T* values, int threads) {
    PK_CALL_ACTIVE(flow_penalties, (p, values, threads));
}
template <class T>
void flow_penalties_backward(const FlowPenalties<T>& p, const T* grads, T* grad_flow, int threads) {
    PK_CALL_ACTIVE(flow_penalties_backward, (p, grads, grad_flow, threads));
}

template void flow_penalties(const FlowPenalties<float>&, float*, int);
template void flow_penalties(const FlowPenalties<double>&, double*, int);
template void flow_penalties_backward(const FlowPenalties<float>&, const float*, float*, int);
template void flow_penalties_backward(const FlowPenalties<double>&, const double*, double*, int);

}  // namespace pk
