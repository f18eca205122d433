#include "latent_ode/combine.hpp"

#include "common/dispatch.hpp"

namespace pk {

void combine(const Combine<float>& p, int threads) { PK_CALL_ACTIVE(combine, (p, threads)); }
void combine(const Combine<double>& p, int threads) { PK_CALL_ACTIVE(combine, (p, threads)); }
void combine_backward(const CombineBackward<float>& p, int threads) { PK_CALL_ACTIVE(combine_backward, (p, threads)); }
void combine_backward(const CombineBackward<double>& p, int threads) { PK_CALL_ACTIVE(combine_backward, (p, threads)); }

}  // namespace pk
