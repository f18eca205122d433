// CPU capabilities: the same kernel source is compiled once per capability, each copy in its own namespace, and the
// best one that the machine runs is chosen at run time.
//
// A kernel unit is compiled with -DPK_ISA=<name> plus the flags of that capability, and keeps everything it defines
// inside PK_ISA_BEGIN/PK_ISA_END: an inline function shared between units would be merged by the linker, and the copy
// it keeps may use instructions that the machine lacks.
#pragma once

// name, level: `generic` is plain C++ and exists everywhere, the others are the x86-64 levels of the System V ABI.
#if defined(__x86_64__)
#define PK_FOR_EACH_ISA(X) X(generic) X(x86_64) X(x86_64_v3) X(x86_64_v4)
#define PK_FOR_EACH_ISA_WITH(X, ...) \
    X(generic, __VA_ARGS__) X(x86_64, __VA_ARGS__) X(x86_64_v3, __VA_ARGS__) X(x86_64_v4, __VA_ARGS__)
#else
#define PK_FOR_EACH_ISA(X) X(generic)
#define PK_FOR_EACH_ISA_WITH(X, ...) X(generic, __VA_ARGS__)
#endif

#ifdef PK_ISA
#define PK_ISA_BEGIN \
    namespace pk {   \
    namespace PK_ISA {
#define PK_ISA_END \
    }              \
    }
#endif

namespace pk {

enum class Isa : int {
#define PK_ENUMERATOR(name) name,
    PK_FOR_EACH_ISA(PK_ENUMERATOR)
#undef PK_ENUMERATOR
};

constexpr int isa_count =
#define PK_COUNT(name) +1
    PK_FOR_EACH_ISA(PK_COUNT);
#undef PK_COUNT

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // by this processor and operating system
Isa active_isa();             // the best supported one until set_active_isa
void set_active_isa(Isa isa);

}  // namespace pk
