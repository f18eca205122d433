#include "causal_conv/causal_conv.hpp"

#include "causal_conv/pooled.hpp"
#include "causal_conv/stream.hpp"
#include "causal_conv/weight_norm.hpp"
#include "common/dispatch.hpp"

namespace pk {

void causal_conv_forward(const CausalConvForward<float>& p) { PK_CALL_ACTIVE(causal_conv_forward, (p)); }
void causal_conv_forward(const CausalConvForward<double>& p) { PK_CALL_ACTIVE(causal_conv_forward, (p)); }
void causal_conv_backward(const CausalConvBackward<float>& p) { PK_CALL_ACTIVE(causal_conv_backward, (p)); }
void causal_conv_backward(const CausalConvBackward<double>& p) { PK_CALL_ACTIVE(causal_conv_backward, (p)); }

void weight_norm_forward(const WeightNormForward<float>* weights, std::int64_t count, int threads) {
    PK_CALL_ACTIVE(weight_norm_forward, (weights, count, threads));
}
void weight_norm_forward(const WeightNormForward<double>* weights, std::int64_t count, int threads) {
    PK_CALL_ACTIVE(weight_norm_forward, (weights, count, threads));
}
void weight_norm_backward(const WeightNormBackward<float>* weights, std::int64_t count, int threads) {
    PK_CALL_ACTIVE(weight_norm_backward, (weights, count, threads));
}
void weight_norm_backward(const WeightNormBackward<double>* weights, std::int64_t count, int threads) {
    PK_CALL_ACTIVE(weight_norm_backward, (weights, count, threads));
}

void causal_conv_backward_at(const CausalConvBackwardAt<float>& p) { PK_CALL_ACTIVE(causal_conv_backward_at, (p)); }
void causal_conv_backward_at(const CausalConvBackwardAt<double>& p) { PK_CALL_ACTIVE(causal_conv_backward_at, (p)); }

void causal_conv_step(const Step<float>& p) { PK_CALL_ACTIVE(causal_conv_step, (p)); }
void causal_conv_step(const Step<double>& p) { PK_CALL_ACTIVE(causal_conv_step, (p)); }
void causal_conv_stream(const Stream<float>& p) { PK_CALL_ACTIVE(causal_conv_stream, (p)); }
void causal_conv_stream(const Stream<double>& p) { PK_CALL_ACTIVE(causal_conv_stream, (p)); }

}  // namespace pk
