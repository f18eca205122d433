#include "causal_conv/causal_conv.hpp"

namespace pk {

#define PK_DISPATCH(function, parameters)                              \
    void function(const parameters& p) {                               \
        using Kernel = void (*)(const parameters&);                    \
        static constexpr Kernel kernels[] = {PK_FOR_EACH_ISA(PK_ENTRY)}; \
        kernels[static_cast<int>(active_isa())](p);                    \
    }
#define PK_ENTRY(isa) isa::causal_conv_forward,
PK_DISPATCH(causal_conv_forward, CausalConvForward<float>)
PK_DISPATCH(causal_conv_forward, CausalConvForward<double>)
#undef PK_ENTRY
#define PK_ENTRY(isa) isa::causal_conv_backward,
PK_DISPATCH(causal_conv_backward, CausalConvBackward<float>)
PK_DISPATCH(causal_conv_backward, CausalConvBackward<double>)
#undef PK_ENTRY
#undef PK_DISPATCH

}  // namespace pk
