// paged_attention and write_kv in CUDA C++: a warp some rows (heads of tokens of one sequence, of one key head) over
// keys, 32 positions at a time, in parts of 256. Where there are few rows each part has a warp of its own and a second
// launch puts them together, in order; the arithmetic is the same. Nothing is shared between warps but caches: what the
// sequences of a group have in common comes from the L2 cache.
//
// For new tokens it is bound by reading keys and values. Prompts are products, which Triton does on tensor cores: where
// it is there it goes first.
#include "common/paged_attention.h"

#include "cuda/launch.cuh"
#include "cuda/load.cuh"
#include "cuda/reduce.cuh"
#include "cuda/transform.cuh"

namespace rlhf_fast::cuda {
namespace {

constexpr int kAttentionThreads = 128, kAttentionWarps = kAttentionThreads / 32;
constexpr int kLanes = 32;

// A row's softmax so far: its largest score, the sum of weights, and the values weighted, dimension d in lane d % 32.
template <int kWide>
struct Softmax {
    float most, total, sums[kWide];
};

// Two parts of a softmax as one.
template <int kWide>
__device__ inline void merge(Softmax<kWide>& a, float most, float total, const float (&sums)[kWide]) {
    const float now = fmaxf(a.most, most), base = now == -INFINITY ? 0.0f : now;
    const float mine = exp_of(a.most - base), other = exp_of(most - base);
    a.most = now;
    a.total = a.total * mine + total * other;
#pragma unroll
    for (int w = 0; w < kWide; ++w) a.sums[w] = a.sums[w] * mine + sums[w] * other;
}

template <class T, int kWide>
__device__ inline void store_row(const PagedCache& c, const PagedQueries& q, int64_t token, int64_t head,
                                 Softmax<kWide> s) {
    float scale = 1.0f;
    if (q.sinks != nullptr) {
        const float sink = q.sinks[head], most = fmaxf(s.most, sink);
        scale = exp_of(s.most - most);
        s.total = s.total * scale + exp_of(sink - most);
    }
    T* const out = static_cast<T*>(q.out) + (token * q.heads + head) * c.dim;
#pragma unroll
    for (int w = 0; w < kWide; ++w) {
        const int64_t d = threadIdx.x % kLanes + w * kLanes;
        if (d < c.dim) out[d] = narrow<T>(__fdiv_rn(s.sums[w] * scale, s.total));
    }
}

// The last of 0 .. count - 1 for which it holds; it holds for the first, and for none after one for which it does not.
template <class Holds>
__device__ inline int64_t last_where(int64_t count, const Holds& holds) {
    int64_t low = 0, high = count;
    while (low + 1 < high) {
        const int64_t middle = (low + high) / 2;
        if (holds(middle)) low = middle;
        else high = middle;
    }
    return low;
}

template <class T, int kRows, int kWide>
__global__ void __launch_bounds__(kAttentionThreads, 2) forward_kernel(PagedCache c, PagedQueries q, int64_t tiles) {
    __shared__ float queries[kAttentionWarps][kRows][kWide * kLanes];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int64_t rep = q.heads / c.kv_heads, index = int64_t{blockIdx.x} * kAttentionWarps + warp;
    const int64_t tile = index % tiles, kv_head = index / tiles % c.kv_heads, split = index / tiles / c.kv_heads;
    // Rows are counted over tokens and their `rep` heads; sequence b has tiles from (its first row) / kRows + b on.
    const int64_t b = last_where(q.sequences, [&](int64_t i) { return q.cu_queries[i] * rep / kRows + i <= tile; });
    const int64_t begin = q.cu_queries[b] * rep, end = q.cu_queries[b + 1] * rep;
    const int64_t row = begin + (tile - (begin / kRows + b)) * kRows;
    const int rows = static_cast<int>(end - row < kRows ? end - row : kRows);
    if (rows <= 0 || split >= (q.parts != nullptr ? q.number_of_parts : 1)) return;

    const int before = q.contexts[b] - q.cu_queries[b + 1], window = static_cast<int>(q.window);
    int positions[kRows], firsts[kRows], least = INT32_MAX, last = 0;
    Softmax<kWide> all[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int64_t n = (row + r) / rep, head = kv_head * rep + (row + r) % rep;
        const bool real = r < rows;
        positions[r] = real ? before + static_cast<int>(n) : -1;
        firsts[r] = window > 0 && positions[r] >= window ? positions[r] - window + 1 : 0;
        if (real && firsts[r] < least) least = firsts[r];
        if (positions[r] > last) last = positions[r];
        const T* const from = static_cast<const T*>(q.query) + n * q.token_stride + head * q.head_stride;
#pragma unroll
        for (int w = 0; w < kWide; ++w) {
            const int64_t d = lane + w * kLanes;
            queries[warp][r][d] = real && d < c.dim ? widen(from[d]) * q.scale : 0.0f;
            all[r].sums[w] = 0.0f;
        }
        all[r].most = -INFINITY;
        all[r].total = 0.0f;
    }
    __syncwarp();

    const int32_t* const table = q.tables + b * q.table_stride;
    const int64_t size = c.width * c.block_size;
    const int block_size = static_cast<int>(c.block_size);
    int part = least / kPartOfKeys, last_part = last / kPartOfKeys;
    if (q.parts != nullptr) {
        if (split < part || split > last_part) return;
        part = last_part = static_cast<int>(split);
    }
    for (; part <= last_part; ++part) {
        Softmax<kWide> one[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            one[r].most = -INFINITY;
            one[r].total = 0.0f;
#pragma unroll
            for (int w = 0; w < kWide; ++w) one[r].sums[w] = 0.0f;
        }
        const int stop = last + 1 < (part + 1) * kPartOfKeys ? last + 1 : (part + 1) * kPartOfKeys;
        int start = part * kPartOfKeys;
        if (least > start) start = least / kLanes * kLanes;
        for (; start < stop; start += kLanes) {
            // Each lane scores the key of its position; what no row may see is not read, it may be anything.
            const int position = start + lane, at = position % block_size;
            const bool there = position < stop;
            const int64_t block = there ? table[position / block_size] : 0;
            const int64_t place = (block * c.kv_heads + kv_head) * size;
            const T* const key = static_cast<const T*>(c.keys) + place + at;
            float scores[kRows] = {};
            if (there) {
#pragma unroll 4
                for (int64_t d = 0; d < c.width; ++d) {
                    const float k = widen(key[d * c.block_size]);
#pragma unroll
                    for (int r = 0; r < kRows; ++r) scores[r] = fmaf(queries[warp][r][d], k, scores[r]);
                }
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                float s = scores[r];
                if (q.softcap > 0.0f) s = q.softcap * tanhf(__fdiv_rn(s, q.softcap));
                if (!there || position > positions[r] || position < firsts[r]) s = -INFINITY;
                const float now = fmaxf(one[r].most, reduce_warp(s, Max())), base = now == -INFINITY ? 0.0f : now;
                const float decay = exp_of(one[r].most - base);
                scores[r] = exp_of(s - base);
                one[r].most = now;
                one[r].total = one[r].total * decay + reduce_warp(scores[r], Sum());
#pragma unroll
                for (int w = 0; w < kWide; ++w) one[r].sums[w] *= decay;
            }
            const int64_t from = place + at * c.width;  // of this lane's value
            const int keys = stop - start < kLanes ? stop - start : kLanes;
#pragma unroll 4
            for (int k = 0; k < keys; ++k) {
                const T* const value = static_cast<const T*>(c.values) + __shfl_sync(kAllLanes, from, k);
                float v[kWide];
#pragma unroll
                for (int w = 0; w < kWide; ++w) {
                    const int64_t d = lane + w * kLanes;
                    v[w] = d < c.width ? widen(value[d]) : 0.0f;
                }
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    const float p = __shfl_sync(kAllLanes, scores[r], k);
#pragma unroll
                    for (int w = 0; w < kWide; ++w) one[r].sums[w] = fmaf(p, v[w], one[r].sums[w]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (q.parts == nullptr) {
                merge(all[r], one[r].most, one[r].total, one[r].sums);
                continue;
            }
            if (r >= rows) continue;
            const int64_t n = (row + r) / rep, head = kv_head * rep + (row + r) % rep;
            float* const to = q.parts + ((n * q.heads + head) * q.number_of_parts + part) * (c.width + 2);
#pragma unroll
            for (int w = 0; w < kWide; ++w)
                if (lane + w * kLanes < c.width) to[lane + w * kLanes] = one[r].sums[w];
            if (lane == 0) to[c.width] = one[r].most, to[c.width + 1] = one[r].total;
        }
    }
    if (q.parts != nullptr) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
        if (r < rows) store_row<T>(c, q, (row + r) / rep, kv_head * rep + (row + r) % rep, all[r]);
}

// The parts of one head of one token, in order: a warp.
template <class T, int kWide>
__global__ void __launch_bounds__(kAttentionThreads, 2) finish_kernel(PagedCache c, PagedQueries q) {
    const int lane = threadIdx.x % kLanes;
    const int64_t index = int64_t{blockIdx.x} * kAttentionWarps + threadIdx.x / kLanes;
    const int64_t n = index / q.heads, head = index % q.heads;
    if (n >= q.tokens) return;
    const int64_t b = last_where(q.sequences, [&](int64_t i) { return q.cu_queries[i] <= n; });
    const int64_t position = q.contexts[b] - q.cu_queries[b + 1] + n;
    int64_t part = q.window > 0 && position >= q.window ? (position - q.window + 1) / kPartOfKeys : 0;
    Softmax<kWide> all = {-INFINITY, 0.0f, {}};
    for (; part <= position / kPartOfKeys; ++part) {
        const float* const from = q.parts + (index * q.number_of_parts + part) * (c.width + 2);
        float sums[kWide];
#pragma unroll
        for (int w = 0; w < kWide; ++w) sums[w] = lane + w * kLanes < c.width ? from[lane + w * kLanes] : 0.0f;
        merge(all, from[c.width], from[c.width + 1], sums);
    }
    store_row<T>(c, q, n, head, all);
}

// A warp a head of a token: its key and value are written, or in place its query, turned if asked for; a lane has every
// 32nd pair of dimensions of the halves.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads) write_kernel(PagedCache c, NewTokens x, int64_t heads) {
    const int lane = threadIdx.x % kLanes, dim = static_cast<int>(c.dim), half = dim / 2;
    const int64_t index = int64_t{blockIdx.x} * kAttentionWarps + threadIdx.x / kLanes;
    const int64_t n = index / heads, head = index % heads;
    if (n >= x.count) return;
    const bool turns = x.cos != nullptr, is_query = head >= c.kv_heads;
    const T* const cos = turns ? static_cast<const T*>(x.cos) + n * dim : nullptr;
    const T* const sin = turns ? static_cast<const T*>(x.sin) + n * dim : nullptr;
    const T* from;
    T* to;
    int64_t stride = 1;  // of dimensions where they are written
    if (is_query) {
        to = static_cast<T*>(x.query) + n * x.query_token_stride + (head - c.kv_heads) * x.query_head_stride;
        from = to;
    } else {
        from = static_cast<const T*>(x.key) + n * x.key_token_stride + head * x.key_head_stride;
        const int64_t slot = x.slots[n], block = slot / c.block_size, at = slot % c.block_size;
        const int64_t place = (block * c.kv_heads + head) * c.width * c.block_size;
        to = static_cast<T*>(c.keys) + place + at;
        stride = c.block_size;
        const T* const value = static_cast<const T*>(x.value) + n * x.value_token_stride + head * x.value_head_stride;
        T* const values = static_cast<T*>(c.values) + place + at * c.width;
#pragma unroll 4
        for (int d = lane; d < dim; d += kLanes) values[d] = value[d];
    }
#pragma unroll 2
    for (int d = lane; d < half; d += kLanes) {
        const T a = from[d], b = from[d + half];
        T low = a, high = b;
        if (turns) {
            low = narrow<T>(widen(a) * widen(cos[d]) - widen(b) * widen(sin[d]));
            high = narrow<T>(widen(b) * widen(cos[d + half]) + widen(a) * widen(sin[d + half]));
        }
        to[d * stride] = low;
        to[(d + half) * stride] = high;
    }
    if (dim % 2 != 0 && lane == 0) to[(dim - 1) * stride] = from[dim - 1];  // of no pair, and then nothing is turned
}

template <int rows, int wide>
struct Sizes {
    static constexpr int kRows = rows, kWide = wide;
};

// Few rows where each sequence has a token only, as many as its heads; else as many as registers allow.
template <class Body>
void with_sizes(const PagedCache& c, const PagedQueries& q, const Body& body) {
    const bool few = q.tokens == q.sequences && q.heads / c.kv_heads <= 4;
    if (c.width > 128) return body(Sizes<4, 8>());
    if (c.width > 64) return few ? body(Sizes<4, 4>()) : body(Sizes<8, 4>());
    return few ? body(Sizes<4, 2>()) : body(Sizes<8, 2>());
}

unsigned blocks_of(int64_t warps) { return grid((warps + kAttentionWarps - 1) / kAttentionWarps); }

void forward(const PagedCache& c, const PagedQueries& q, const Run& run) {
    if (q.tokens == 0) return;
    const OnDevice guard(run);
    with_element(c.dtype, [&](auto element) {
        with_sizes(c, q, [&](auto sizes) {
            using T = decltype(element);
            constexpr int kRows = decltype(sizes)::kRows, kWide = decltype(sizes)::kWide;
            const int64_t tiles = q.tokens * (q.heads / c.kv_heads) / kRows + q.sequences;
            const int64_t splits = q.parts != nullptr ? q.number_of_parts : 1;
            RLHF_FAST_LAUNCH((forward_kernel<T, kRows, kWide>), blocks_of(tiles * c.kv_heads * splits),
                             kAttentionThreads, stream_of(run), c, q, tiles);
            if (q.parts == nullptr) return;
            check(cudaGetLastError(), "paged_attention: forward");
            RLHF_FAST_LAUNCH((finish_kernel<T, kWide>), blocks_of(q.tokens * q.heads), kAttentionThreads,
                             stream_of(run), c, q);
        });
    });
    check(cudaGetLastError(), "paged_attention: forward");
}

void write(const PagedCache& c, const NewTokens& x, const Run& run) {
    if (x.count == 0) return;
    const OnDevice guard(run);
    const int64_t heads = c.kv_heads + (x.query != nullptr ? x.heads : 0);
    with_element(c.dtype, [&](auto element) {
        RLHF_FAST_LAUNCH(write_kernel<decltype(element)>, blocks_of(x.count * heads), kAttentionThreads, stream_of(run),
                         c, x, heads);
    });
    check(cudaGetLastError(), "write_kv: forward");
}

}  // namespace

const PagedAttentionKernels paged_attention = {forward, write};

}  // namespace rlhf_fast::cuda
