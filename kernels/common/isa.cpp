#include "common/isa.hpp"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pk {
namespace {

#if defined(__x86_64__)
bool has_v3() {
    __builtin_cpu_init();
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    // Not every compiler's __builtin_cpu_supports knows these names.
    const bool f16c_movbe = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) && (ecx & bit_MOVBE);
    const bool lzcnt = __get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) && (ecx & bit_LZCNT);
    return f16c_movbe && lzcnt && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

bool has_v4() {
    return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
#endif

Isa best_isa() {
    Isa best = Isa::generic;
    for (int i = 0; i < isa_count; ++i)
        if (isa_supported(static_cast<Isa>(i))) best = static_cast<Isa>(i);
    return best;
}

std::atomic<Isa>& active() {
    static std::atomic<Isa> isa{best_isa()};
    return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
    static const char* const names[] = {
#define PK_NAME(name) #name,
        PK_FOR_EACH_ISA(PK_NAME)
#undef PK_NAME
    };
    return names[static_cast<int>(isa)];
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::x86_64_v3) return has_v3();
    if (isa == Isa::x86_64_v4) return has_v4();
#endif
    (void)isa;
    return true;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void set_active_isa(Isa isa) { active().store(isa, std::memory_order_relaxed); }

}  // namespace pk
