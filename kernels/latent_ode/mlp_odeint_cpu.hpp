// What each CPU capability provides for mlp_odeint.cpp.
#pragma once

#include "common/isa.hpp"
#include "latent_ode/mlp_odeint.hpp"
#include "latent_ode/plan.hpp"

// Lanes of a vector; elements of scratch memory; a forward, which writes one divergence for each task; a backward.
#define PK_DECLARE_TYPE(T)                                                                                           \
    void mlp_odeint_memory(const MLPOdeint<T>& p, const MLPPlan& plan, bool backward, std::int64_t* elements);       \
    void mlp_odeint_forward(const MLPOdeint<T>& p, const MLPPlan& plan, T* memory, T* tape, Divergence* divergence); \
    void mlp_odeint_backward(const MLPOdeint<T>& p, const MLPPlan& plan, const MLPOdeintGradients<T>& g, T* memory,  \
                             const T* tape);
#define PK_DECLARE(isa)                                   \
    namespace isa {                                       \
    void mlp_odeint_lanes(int* of_float, int* of_double); \
    PK_DECLARE_TYPE(float)                                \
    PK_DECLARE_TYPE(double)                               \
    }

namespace pk {
PK_FOR_EACH_ISA(PK_DECLARE)
}  // namespace pk

#undef PK_DECLARE
#undef PK_DECLARE_TYPE
