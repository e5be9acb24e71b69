// Where the sequences of a batch lie.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace rlhf_fast {

// Packed, sequence b at [cu_seqlens[b], cu_seqlens[b + 1]), or padded, at [b length, (b + 1) length).
struct Sequences {
    const void* cu_seqlens;  // null: padded
    bool is_int64;
    int64_t count, length;

    RLHF_FAST_HOST_DEVICE int64_t begin(int64_t b) const {
        if (cu_seqlens == nullptr) return b * length;
        return is_int64 ? static_cast<const int64_t*>(cu_seqlens)[b] : static_cast<const int32_t*>(cu_seqlens)[b];
    }
};

}  // namespace rlhf_fast
