// paged_attention and write_kv, as every backend offers them: causal attention of packed tokens over keys and values
// that lie in blocks, and the writing of those.
//
// Keys of a block are kept with the positions last, (blocks, kv heads, width, block size), so that sixteen scores are
// one vector or one tile; values with the dimensions last, (blocks, kv heads, block size, width). The width is the
// dimension of a head rounded up to a multiple of 16; what lies beyond the dimension is zero.
#pragma once

#include "common/dtypes.h"
#include "common/run.h"

namespace rlhf_fast {

struct PagedCache {
    void* keys;
    void* values;
    DType dtype;
    int64_t kv_heads, dim, width, block_size;  // block_size: a multiple of 16, at most kMostKeys
};

constexpr int64_t kMostKeys = 128;
constexpr int64_t kMostDim = 256;
constexpr int kPartOfKeys = 256;

// Sequence b has queries cu_queries[b] .. cu_queries[b + 1], the last ones of contexts[b] positions. Consecutive
// sequences form groups (groups[g] .. groups[g + 1]) whose first shared[g] blocks are the same and end before their
// queries: a kernel may read those once for all of them, and the results have the same bits.
struct PagedQueries {
    const void* query;  // (N, heads, dim), dim contiguous
    int64_t token_stride, head_stride, heads;
    const int32_t* tables;  // (B, table_stride)
    int64_t table_stride;
    const int32_t* cu_queries;  // (B + 1,)
    const int32_t* contexts;    // (B,)
    const int32_t* groups;      // (G + 1,)
    const int32_t* shared;      // (G,)
    int64_t count;              // G
    float scale, softcap;       // softcap: 0 for none
    int64_t window;             // keys that a query sees, itself included; 0 for all
    const float* sinks;         // (heads,): one more logit beside the scores, or null
    void* out;                  // (N, heads, dim), contiguous
    int64_t tokens, sequences;  // N, B
    // On a GPU, for warps side by side over the keys: (N, heads, number_of_parts, width + 2), or null.
    float* parts;
    int64_t number_of_parts;  // enough for the longest context, each of kPartOfKeys positions
};

// Token n goes to position slots[n] % block_size of block slots[n] / block_size. With cos and sin (N, dim), the halves
// of the keys' and, in place, the queries' dimensions are rotated first.
struct NewTokens {
    const void *key, *value;  // (N, kv heads, dim), dim contiguous
    int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
    const int64_t* slots;
    int64_t count;          // N
    const void *cos, *sin;  // (N, dim), contiguous, or null
    void* query;            // (N, heads, dim), dim contiguous, or null
    int64_t query_token_stride, query_head_stride, heads;
};

struct PagedAttentionKernels {
    void (*forward)(const PagedCache&, const PagedQueries&, const Run&);
    void (*write)(const PagedCache&, const NewTokens&, const Run&);
};

namespace cpu {
extern const PagedAttentionKernels paged_attention;
}
namespace cuda {
extern const PagedAttentionKernels paged_attention;
}

}  // namespace rlhf_fast
