// Where sequences lie in time, with spans or without. For kernel units.
#pragma once

#include "causal_conv/causal_conv.hpp"
#include "common/arrays.hpp"

PK_ISA_BEGIN

PK_INLINE Index begin_of(const Span* spans, Index sequence) { return spans == nullptr ? 0 : spans[sequence].begin; }
PK_INLINE Index length_of(const ConvShape& s, const Span* spans, Index sequence) {
    return spans == nullptr ? s.length : spans[sequence].length;
}
PK_INLINE Index total_length(const ConvShape& s, const Span* spans) {
    if (spans == nullptr) return s.batch * s.length;
    Index total = 0;
    for (Index i = 0; i < s.batch; ++i) total += spans[i].length;
    return total;
}

PK_ISA_END
