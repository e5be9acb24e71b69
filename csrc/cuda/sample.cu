// sample in CUDA C++: a block a row, which stays in the L2 cache for its sweeps.
//
// Probabilities become whole numbers, shares of a power of two, whose sums are exact in any order: so atomics give the
// same bits every time, and a row the same token in any batch. What top_k and top_p keep is found by counting and
// weighing the probabilities by the leading bits of their float32 form, three sweeps in all.
#include "common/sample.h"

#include "cuda/launch.cuh"
#include "cuda/load.cuh"
#include "cuda/reduce.cuh"
#include "cuda/transform.cuh"

namespace rlhf_fast::cuda {
namespace {

constexpr int kSegment = 8192;
constexpr int kBuckets = 1 << 11;
constexpr uint32_t kBitsOfOne = 0x3f800000;
template <class T>
constexpr int kLoads = kSegment / kThreads / kVector<T>;

using Mass = unsigned long long;
using Count = unsigned long long;

struct Scratch {
    Mass masses[kBuckets];
    unsigned counts[kBuckets];
    Mass warps[2][kWarps];
    float floats[2][kWarps];
    double doubles[kWarps];
    // What one thread has found for all.
    Mass mass;
    Count count;
    int64_t token;
    int bucket, thread, least;
};

// Tokens with weights above `bits`, and the first `equals` of those with exactly these bits.
struct Cut {
    uint32_t bits;
    Count equals;
};

template <class T>
struct Row {
    const T* logits;
    int64_t columns;
    float top, scale, unit;  // unit: the mass of the likeliest
    bool greedy;

    __device__ float exponent(float x) const { return (x - top) * scale; }
    // Of a token, 1 for the likeliest; of greedy sampling, 0 for all others.
    __device__ float weight(float x) const {
        if (greedy) return x == top ? 1.0f : 0.0f;
        return exp_of(exponent(x));
    }
    __device__ Mass mass(float weight) const { return static_cast<Mass>(weight * unit); }

    // body(x) for this thread's part of every segment; -inf past the end.
    template <class Body>
    __device__ void sweep(const Body& body) const {
        for (int64_t begin = 0; begin < columns; begin += kSegment) {
            float x[kLoads<T>][kVector<T>];
            load_segment(logits, begin, columns, 1, x);
#pragma unroll
            for (int i = 0; i < kLoads<T>; ++i) {
#pragma unroll
                for (int j = 0; j < kVector<T>; ++j) body(x[i][j]);
            }
        }
    }
};

// x of all threads before this one, and of all threads.
struct Before {
    Mass before, total;
};
__device__ inline Before scan_block(Mass x, Mass* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Mass sum = x;
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) {
        const Mass other = __shfl_up_sync(kAllLanes, sum, apart);
        if (lane >= apart) sum += other;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    Before out = {sum - x, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) out.before += scratch[w];
        out.total += scratch[w];
    }
    return out;
}

// Where the likeliest reach a count of `most` or a mass of `enough`: a token is kept while fewer than `most` and less
// than `enough` rank before it. Only those that `within` keeps count.
template <class T>
__device__ Cut cut(const Row<T>& row, const Cut& within, Count most, Mass enough, Scratch& s) {
    uint32_t prefix = 0, mask = 0;
    int shift = 32;
    Count before = 0;
    Mass mass = 0;
    for (int level = 0; level < 3; ++level) {
        const int bits = level < 2 ? 11 : 10, buckets = 1 << bits, mine = buckets / kThreads;
        shift -= bits;
        for (int b = threadIdx.x; b < buckets; b += kThreads) s.masses[b] = 0, s.counts[b] = 0;
        if (threadIdx.x == 0) s.thread = kThreads, s.least = 0;
        __syncthreads();
        row.sweep([&](float x) {
            const float w = row.weight(x);
            const uint32_t of = bits_of(w);
            if (of <= within.bits || (of & mask) != prefix) return;
            atomicAdd(&s.counts[(of >> shift) & (buckets - 1)], 1u);
            atomicAdd(&s.masses[(of >> shift) & (buckets - 1)], row.mass(w));
        });
        if (threadIdx.x == 0 && (within.bits & mask) == prefix) {  // the equals at its edge, in one
            const int b = (within.bits >> shift) & (buckets - 1);
            atomicAdd(&s.counts[b], static_cast<unsigned>(within.equals));
            atomicAdd(&s.masses[b], within.equals * row.mass(float_of(within.bits)));
        }
        __syncthreads();
        // Each thread has some buckets, the first thread the likeliest.
        Count count = 0;
        Mass weighs = 0;
        for (int k = 0; k < mine; ++k) {
            const int b = buckets - 1 - (threadIdx.x * mine + k);
            count += s.counts[b];
            weighs += s.masses[b];
        }
        const Count counted = before + scan_block(count, s.warps[0]).before;
        const Mass weighed = mass + scan_block(weighs, s.warps[1]).before;
        if (counted + count >= most || weighed + weighs >= enough) atomicMin(&s.thread, static_cast<int>(threadIdx.x));
        if (count > 0) atomicMax(&s.least, static_cast<int>(threadIdx.x));
        __syncthreads();
        const int there = s.thread < kThreads ? s.thread : s.least;
        if (static_cast<int>(threadIdx.x) == there) {
            int last = mine - 1;  // the least likely bucket of this thread's that holds anything
            while (last > 0 && s.counts[buckets - 1 - (there * mine + last)] == 0) --last;
            Count c = counted;
            Mass m = weighed;
            int k = 0;
            for (; k < last; ++k) {
                const int b = buckets - 1 - (there * mine + k);
                if (c + s.counts[b] >= most || m + s.masses[b] >= enough) break;
                c += s.counts[b];
                m += s.masses[b];
            }
            s.bucket = buckets - 1 - (there * mine + k);
            s.count = c;
            s.mass = m;
        }
        __syncthreads();
        before = s.count;
        mass = s.mass;
        prefix |= static_cast<uint32_t>(s.bucket) << shift;
        mask |= static_cast<uint32_t>(buckets - 1) << shift;
    }
    // All in the bucket weigh the same.
    const Mass one = row.mass(float_of(prefix));
    Count equals = s.counts[s.bucket];
    if (most - before < equals) equals = most - before;
    if (one > 0 && enough > mass && (enough - mass - 1) / one + 1 < equals) equals = (enough - mass - 1) / one + 1;
    __syncthreads();
    return {prefix, equals > 0 ? equals : 1};
}

// What those that are kept weigh; `equals` becomes what there is of them.
template <class T>
__device__ Mass weigh(const Row<T>& row, Cut& kept, Scratch& s) {
    Mass mass = 0;
    Count equals = 0;
    row.sweep([&](float x) {
        const float w = row.weight(x);
        if (bits_of(w) > kept.bits) mass += row.mass(w);
        equals += bits_of(w) == kept.bits;
    });
    mass = scan_block(mass, s.warps[0]).total;
    equals = scan_block(equals, s.warps[1]).total;
    if (equals < kept.equals) kept.equals = equals;
    return mass + kept.equals * row.mass(float_of(kept.bits));
}

// The token at which the cumulative mass of those that are kept exceeds `target`, which is less than all of it.
template <class T>
__device__ int64_t find(const Row<T>& row, const Cut& kept, Mass target, Scratch& s) {
    const Mass one = row.mass(float_of(kept.bits));
    Mass sum = 0;
    Count equals = kept.equals;  // that are still to come
    const bool wide = aligned16(row.logits);
    for (int64_t begin = 0; begin < row.columns; begin += kThreads * kVector<T>) {
        float x[kVector<T>];
        load(row.logits, column_of<T>(begin, 0), row.columns, 1, wide, x);
        Count own = 0;
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
            x[j] = row.weight(x[j]);
            own += bits_of(x[j]) == kept.bits;
        }
        const Before ranks = scan_block(own, s.warps[0]);
        Count rank = ranks.before;
        Mass weighs[kVector<T>], all = 0;  // up to each
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
            if (bits_of(x[j]) > kept.bits) all += row.mass(x[j]);
            if (bits_of(x[j]) == kept.bits && rank++ < equals) all += one;
            weighs[j] = all;
        }
        const Before masses = scan_block(all, s.warps[1]);
        if (sum + masses.total > target) {
            const Mass before = sum + masses.before;
            if (before <= target && before + all > target) {
                int found = 0;
#pragma unroll
                for (int j = 0; j < kVector<T>; ++j) found += before + weighs[j] <= target;
                s.token = column_of<T>(begin, 0) + found;
            }
            __syncthreads();
            return s.token;
        }
        sum += masses.total;
        equals -= ranks.total < equals ? ranks.total : equals;
    }
    return -1;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(SampleInputs in, Samples out, float unit) {
    __shared__ Scratch s;
    const int64_t r = blockIdx.x;
    const float temperature = in.temperature[r];
    Row<T> row = {static_cast<const T*>(in.logits) + r * in.row_stride,
                  in.columns,
                  0.0f,
                  temperature == 0.0f ? 1.0f : 1.0f / fmaxf(temperature, 0x1p-126f),
                  unit,
                  false};
    float top = -INFINITY, broken = 0.0f;
    row.sweep([&](float x) {
        top = fmaxf(top, x);
        if (!(x < INFINITY)) broken = 1.0f;
    });
    row.top = top = reduce_block(top, Max(), s.floats[0]);
    if (reduce_block(broken, Max(), s.floats[1]) > 0.0f || top == -INFINITY) {
        if (threadIdx.x == 0) {
            out.tokens[r] = -1;
            out.logprobs[r] = out.kept[r] = out.entropy[r] = NAN;
        }
        return;
    }

    double total = 0.0, moment = 0.0;
    row.sweep([&](float x) {
        const float y = row.exponent(x), e = exp_of(y);
        total += static_cast<double>(row.mass(e));
        moment += static_cast<double>(e * fmaxf(y, -1e4f));  // 0 and not nan for a banned token
    });
    total = reduce_block(total, Sum(), s.doubles) / static_cast<double>(unit);
    __syncthreads();
    moment = reduce_block(moment, Sum(), s.doubles);

    const Count all = static_cast<Count>(in.columns), none = ~Count{0};
    Cut kept = {0, all};
    row.greedy = temperature == 0.0f;
    if (row.greedy) {
        kept = {kBitsOfOne, 1};
    } else {
        if (in.top_k[r] > 0 && in.top_k[r] < in.columns)
            kept = cut(row, kept, static_cast<Count>(in.top_k[r]), none, s);
        if (in.top_p[r] < 1.0f) {
            const double enough = static_cast<double>(in.top_p[r]) * static_cast<double>(weigh(row, kept, s));
            kept = cut(row, kept, none, static_cast<Mass>(ceil(enough)), s);
        }
        const uint32_t least = bits_of(in.min_p[r]);
        if (in.min_p[r] > 0.0f && least > kept.bits) kept = {least, all};
    }
    const Mass mass = weigh(row, kept, s);
    Mass target = static_cast<Mass>(in.uniform[r] * static_cast<double>(mass));
    if (target >= mass) target = mass - 1;
    const int64_t token = find(row, kept, row.greedy ? 0 : target, s);
    if (threadIdx.x == 0) {
        const double log_sum = log(total);
        out.tokens[r] = token;
        out.logprobs[r] = static_cast<float>(static_cast<double>(row.exponent(widen(row.logits[token]))) - log_sum);
        out.kept[r] = static_cast<float>(static_cast<double>(mass) / static_cast<double>(unit) / total);
        out.entropy[r] = static_cast<float>(log_sum - moment / total);
    }
}

void forward(const SampleInputs& in, const Samples& out, const Run& run) {
    if (in.rows == 0) return;
    const OnDevice guard(run);
    int bits = 62;  // as fine as sums of all columns allow
    for (int64_t columns = in.columns; columns > 1; columns = (columns + 1) / 2) --bits;
    const float unit = std::ldexp(1.0f, bits);
    with_element(in.dtype, [&](auto element) {
        RLHF_FAST_LAUNCH(forward_kernel<decltype(element)>, grid(in.rows), kThreads, stream_of(run), in, out, unit);
    });
    check(cudaGetLastError(), "sample: forward");
}

}  // namespace

const SampleKernels sample = {forward};

}  // namespace rlhf_fast::cuda
