// Calls a kernel of the active capability: PK_CALL_ACTIVE(name, (arguments)) runs pk::<capability>::name(arguments).
#pragma once

#include "common/isa.hpp"

#define PK_CALL_CASE(isa, name, arguments) \
    case Isa::isa: isa::name arguments; break;
#define PK_CALL_ACTIVE(name, arguments)                                               \
    do {                                                                              \
        switch (active_isa()) { PK_FOR_EACH_ISA_WITH(PK_CALL_CASE, name, arguments) } \
    } while (false)
