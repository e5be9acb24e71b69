// paged_attention on the CPU: online softmax, block by block of keys in the order of their positions. What happens to a
// row (one head of one token) depends on nothing but that row: not on its batch, on the chunks that its prompt came in,
// or on which sequences share its first blocks. Those are read once for all rows of a group.
#if !defined(SIMD_ISA)
#include "common/paged_attention.h"

#include <vector>

#include "common/parallel.h"

namespace rlhf_fast::cpu {
namespace {

// Some rows of one key head of one group. Row r is head r % rep of token r / rep, tokens counted over the group.
struct Task {
    int64_t group, kv_head, begin, end;
};

constexpr int64_t kMostRows = 48;

}  // namespace
}  // namespace rlhf_fast::cpu

#define SIMD_FILE "cpu/paged_attention.cpp"
#include "cpu/foreach_isa.h"
#endif

#include "cpu/math.h"

namespace rlhf_fast::SIMD_ISA {
namespace {

#if defined(SIMD_AVX512)
constexpr int kTileRows = 4;
constexpr int kTileKeys = 2;    // vectors of keys
constexpr int kTileValues = 4;  // vectors of a value
#else
constexpr int kTileRows = 2;
constexpr int kTileKeys = 2;
constexpr int kTileValues = 2;
#endif

using cpu::kMostRows;

struct Rows {
    float query[kMostRows][kMostDim];  // scaled
    float sum[kMostRows][kMostDim];    // of values, weighted
    float weights[kMostRows][kLanes];  // of those, summed in sixteen lanes
    float largest[kMostRows];
    int64_t first[kMostRows], last[kMostRows];  // positions that it sees
};

// out[r][0 .. 16 K) = query[r] . key for R rows and 16 K keys.
template <int R, int K, class T>
SIMD_INLINE void scores(const Rows& rows, int64_t row, const T* keys, int64_t dim, int64_t block_size,
                        float (*out)[kMostKeys], int64_t at) {
    f32x16 sums[R][K];
    for (int r = 0; r < R; ++r)
        for (int k = 0; k < K; ++k) sums[r][k] = set1(0.0f);
    for (int64_t d = 0; d < dim; ++d) {
        f32x16 key[K];
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) key[k] = load16(keys + d * block_size + at + k * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const f32x16 q = set1(rows.query[row + r][d]);
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) sums[r][k] = fma(q, key[k], sums[r][k]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int k = 0; k < K; ++k) store16(out[r] + at + k * kLanes, sums[r][k]);
}

// A row's scores become weights; its sums so far are scaled to the new largest score.
SIMD_INLINE void weigh(Rows& rows, int64_t row, int64_t dim, int64_t start, int64_t keys, float softcap, float* s) {
    const int64_t first = rows.first[row] - start, last = rows.last[row] - start;
    f32x16 high = set1(-INFINITY);
    for (int64_t i = 0; i < keys; i += kLanes) {
        f32x16 x = load16(s + i);
        if (softcap > 0.0f) x = mul(set1(softcap), tanh(div(x, set1(softcap))));
        if (i < first || i + kLanes - 1 > last) {
            float lanes[kLanes];
            store16(lanes, x);
            for (int64_t j = 0; j < kLanes; ++j)
                if (i + j < first || i + j > last) lanes[j] = -INFINITY;
            x = load16(lanes);
        }
        store16(s + i, x);
        high = max(high, x);
    }
    const float before = rows.largest[row], most = reduce_max(high), now = most > before ? most : before;
    if (now == -INFINITY) {
        for (int64_t i = 0; i < keys; i += kLanes) store16(s + i, set1(0.0f));
        return;
    }
    f32x16 total = load16(rows.weights[row]);
    if (now > before) {
        rows.largest[row] = now;
        const f32x16 scale = exp(set1(before - now));
        total = mul(total, scale);
        for (int64_t d = 0; d < dim; d += kLanes) store16(rows.sum[row] + d, mul(load16(rows.sum[row] + d), scale));
    }
    for (int64_t i = 0; i < keys; i += kLanes) {
        const f32x16 p = exp(sub(load16(s + i), set1(now)));
        store16(s + i, p);
        total = add(total, p);
    }
    store16(rows.weights[row], total);
}

// sum[r] += weights[r] . values, for R rows and V vectors of the dimensions.
template <int R, int V, class T>
SIMD_INLINE void weighted(Rows& rows, int64_t row, const T* values, int64_t dim, int64_t keys,
                          const float (*weights)[kMostKeys], int64_t d) {
    f32x16 sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = load16(rows.sum[row + r] + d + v * kLanes);
    for (int64_t key = 0; key < keys; ++key) {
        f32x16 value[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) value[v] = load16(values + key * dim + d + v * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const f32x16 p = set1(weights[r][key]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[r][v] = fma(p, value[v], sums[r][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store16(rows.sum[row + r] + d + v * kLanes, sums[r][v]);
}

template <int R, class T>
inline void tile(Rows& rows, int64_t row, const T* keys, const T* values, const PagedCache& c, int64_t start,
                 float softcap) {
    int64_t last = rows.last[row];
    for (int r = 1; r < R; ++r) last = rows.last[row + r] > last ? rows.last[row + r] : last;
    int64_t seen = last - start + 1;
    if (seen <= 0) return;
    if (seen > c.block_size) seen = c.block_size;
    const int64_t vectors = (seen + kLanes - 1) / kLanes;
    float s[R][kMostKeys];
    int64_t k = 0;
    for (; k + kTileKeys <= vectors; k += kTileKeys)
        scores<R, kTileKeys>(rows, row, keys, c.width, c.block_size, s, k * kLanes);
    for (; k < vectors; ++k) scores<R, 1>(rows, row, keys, c.width, c.block_size, s, k * kLanes);
    for (int r = 0; r < R; ++r) weigh(rows, row + r, c.width, start, vectors * kLanes, softcap, s[r]);
    int64_t d = 0;
    for (; d + kTileValues * kLanes <= c.width; d += kTileValues * kLanes)
        weighted<R, kTileValues>(rows, row, values, c.width, seen, s, d);
    for (; d < c.width; d += kLanes) weighted<R, 1>(rows, row, values, c.width, seen, s, d);
}

// Rows begin .. end over blocks first .. last of a table.
template <class T>
inline void blocks(Rows& rows, int64_t begin, int64_t end, const PagedCache& c, int64_t kv_head, const int32_t* table,
                   int64_t first, int64_t last, float softcap) {
    const int64_t size = c.width * c.block_size;
    for (int64_t block = first; block < last; ++block) {
        const int64_t offset = (table[block] * c.kv_heads + kv_head) * size, start = block * c.block_size;
        const T *keys = static_cast<const T*>(c.keys) + offset, *values = static_cast<const T*>(c.values) + offset;
        int64_t row = begin;
        for (; row + kTileRows <= end; row += kTileRows) tile<kTileRows>(rows, row, keys, values, c, start, softcap);
        switch (end - row) {
            case 1: tile<1>(rows, row, keys, values, c, start, softcap); break;
#if defined(SIMD_AVX512)
            case 2: tile<2>(rows, row, keys, values, c, start, softcap); break;
            case 3: tile<3>(rows, row, keys, values, c, start, softcap); break;
#endif
        }
    }
}

template <class T>
inline void task(const PagedCache& c, const PagedQueries& q, const cpu::Task& t, Rows& rows) {
    const int64_t rep = q.heads / c.kv_heads, from = q.groups[t.group];
    const int64_t tokens = q.cu_queries[from], count = t.end - t.begin, shared = q.shared[t.group];
    int64_t sequences[kMostRows], b = from;
    for (int64_t r = 0; r < count; ++r) {
        const int64_t token = tokens + (t.begin + r) / rep, head = t.kv_head * rep + (t.begin + r) % rep;
        while (token >= q.cu_queries[b + 1]) ++b;
        sequences[r] = b;
        rows.last[r] = q.contexts[b] - q.cu_queries[b + 1] + token;
        rows.first[r] = q.window > 0 && rows.last[r] >= q.window ? rows.last[r] - q.window + 1 : 0;
        const T* const query = static_cast<const T*>(q.query) + token * q.token_stride + head * q.head_stride;
        for (int64_t d = 0; d < c.width; d += kLanes) {
            const f32x16 x = d + kLanes <= c.dim ? load16(query + d) : load_first(query + d, c.dim - d, 0.0f);
            store16(rows.query[r] + d, mul(x, set1(q.scale)));
            store16(rows.sum[r] + d, set1(0.0f));
        }
        store16(rows.weights[r], set1(0.0f));
        rows.largest[r] = -INFINITY;
    }
    const auto first_block = [&](int64_t begin, int64_t end) {
        int64_t first = rows.first[begin];
        for (int64_t r = begin + 1; r < end; ++r) first = rows.first[r] < first ? rows.first[r] : first;
        return first / c.block_size;
    };
    blocks<T>(rows, 0, count, c, t.kv_head, q.tables + from * q.table_stride, first_block(0, count), shared, q.softcap);
    for (int64_t begin = 0; begin < count;) {
        int64_t end = begin + 1;
        while (end < count && sequences[end] == sequences[begin]) ++end;
        int64_t first = first_block(begin, end), last = rows.last[end - 1] / c.block_size + 1;
        if (first < shared) first = shared;
        blocks<T>(rows, begin, end, c, t.kv_head, q.tables + sequences[begin] * q.table_stride, first, last, q.softcap);
        begin = end;
    }
    for (int64_t r = 0; r < count; ++r) {
        const int64_t token = tokens + (t.begin + r) / rep, head = t.kv_head * rep + (t.begin + r) % rep;
        float total = reduce_add(load16(rows.weights[r])), scale = 1.0f;
        if (q.sinks != nullptr) {
            const float sink = q.sinks[head], most = sink > rows.largest[r] ? sink : rows.largest[r];
            scale = first_lane(exp(set1(rows.largest[r] - most)));
            total = total * scale + first_lane(exp(set1(sink - most)));
        }
        T* const out = static_cast<T*>(q.out) + (token * q.heads + head) * c.dim;
        for (int64_t d = 0; d < c.dim; d += kLanes) {
            const f32x16 y = div(mul(load16(rows.sum[r] + d), set1(scale)), set1(total));
            if (d + kLanes <= c.dim) store16(out + d, y);
            else store_first(out + d, c.dim - d, y);
        }
    }
}

void forward(const PagedCache& c, const PagedQueries& q, const cpu::Task* tasks, int64_t begin, int64_t end) {
    Rows rows;
    with_element(c.dtype, [&](auto element) {
        for (int64_t i = begin; i < end; ++i) task<typename decltype(element)::type>(c, q, tasks[i], rows);
    });
}

// x (dim) rotated: x * cos + rotate_half(x) * sin. In one pass, so out may be x.
template <class T>
SIMD_INLINE void rotate(const T* x, const T* cos, const T* sin, int64_t dim, T* out) {
    const int64_t half = dim / 2;
    int64_t d = 0;
    for (; d + kLanes <= half; d += kLanes) {
        const f32x16 a = load16(x + d), b = load16(x + d + half);
        store16(out + d, sub(mul(a, load16(cos + d)), mul(b, load16(sin + d))));
        store16(out + d + half, add(mul(b, load16(cos + d + half)), mul(a, load16(sin + d + half))));
    }
    for (; d < half; ++d) {
        const float a = to_float(x[d]), b = to_float(x[d + half]);
        const float low = a * to_float(cos[d]) - b * to_float(sin[d]);
        const float high = b * to_float(cos[d + half]) + a * to_float(sin[d + half]);
        out[d] = from_float<T>(low), out[d + half] = from_float<T>(high);
    }
}

template <class T>
inline void write(const PagedCache& c, const NewTokens& x, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
        const T* const cos = x.cos == nullptr ? nullptr : static_cast<const T*>(x.cos) + n * c.dim;
        const T* const sin = x.cos == nullptr ? nullptr : static_cast<const T*>(x.sin) + n * c.dim;
        for (int64_t h = 0; cos != nullptr && x.query != nullptr && h < x.heads; ++h) {
            T* const query = static_cast<T*>(x.query) + n * x.query_token_stride + h * x.query_head_stride;
            rotate(query, cos, sin, c.dim, query);
        }
        const int64_t block = x.slots[n] / c.block_size, at = x.slots[n] % c.block_size;
        for (int64_t h = 0; h < c.kv_heads; ++h) {
            const T* key = static_cast<const T*>(x.key) + n * x.key_token_stride + h * x.key_head_stride;
            const T* const value = static_cast<const T*>(x.value) + n * x.value_token_stride + h * x.value_head_stride;
            T rotated[kMostDim];
            if (cos != nullptr) {
                rotate(key, cos, sin, c.dim, rotated);
                key = rotated;
            }
            const int64_t offset = (block * c.kv_heads + h) * c.width * c.block_size;
            T* const keys = static_cast<T*>(c.keys) + offset + at;
            for (int64_t d = 0; d < c.dim; ++d) keys[d * c.block_size] = key[d];
            std::memcpy(static_cast<T*>(c.values) + offset + at * c.width, value, c.dim * sizeof(T));
        }
    }
}

void write_tokens(const PagedCache& c, const NewTokens& x, int64_t begin, int64_t end) {
    with_element(c.dtype, [&](auto element) { write<typename decltype(element)::type>(c, x, begin, end); });
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA

#if SIMD_LAST_PASS

namespace rlhf_fast::cpu {
namespace {

void forward(const PagedCache& c, const PagedQueries& q, const Run& run) {
    const auto kernel = SIMD_CHOOSE(forward);
    const int64_t rep = q.heads / c.kv_heads, chunk = rep < kMostRows ? kMostRows / rep * rep : kMostRows;
    std::vector<Task> tasks;
    int64_t work = 0;
    for (int64_t g = 0; g < q.count; ++g) {
        const int64_t rows = (q.cu_queries[q.groups[g + 1]] - q.cu_queries[q.groups[g]]) * rep;
        for (int64_t b = q.groups[g]; b < q.groups[g + 1]; ++b)
            work += int64_t{q.contexts[b]} * (q.cu_queries[b + 1] - q.cu_queries[b]) * q.heads * c.dim;
        for (int64_t h = 0; h < c.kv_heads; ++h)
            for (int64_t row = 0; row < rows; row += chunk) tasks.push_back({g, h, row, std::min(row + chunk, rows)});
    }
    const int64_t count = static_cast<int64_t>(tasks.size());
    parallel_rows(count, count > 0 ? work / count : 1, run.threads,
                  [&](int64_t begin, int64_t end) { kernel(c, q, tasks.data(), begin, end); });
}

void write(const PagedCache& c, const NewTokens& x, const Run& run) {
    const auto kernel = SIMD_CHOOSE(write_tokens);
    parallel_rows(x.count, 8 * (x.heads + c.kv_heads) * c.dim, run.threads,
                  [&](int64_t begin, int64_t end) { kernel(c, x, begin, end); });
}

}  // namespace

const PagedAttentionKernels paged_attention = {forward, write};

}  // namespace rlhf_fast::cpu

#endif  // SIMD_LAST_PASS
