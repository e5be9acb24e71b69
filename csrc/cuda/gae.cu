// gae in CUDA C++: a block a sequence, from its last tile of tokens to its first. Each thread holds a vector of tokens;
// what a run of tokens does to the recurrence is an affine function, and functions compose, so a tile takes one scan
// over its threads. Tiles are counted from the sequence's start: where a sequence lies and what is beside it change no
// bit, nor does padding behind it. Bound by memory, 16 bytes a token in float32.
#include "common/gae.h"

#include "cuda/launch.cuh"
#include "cuda/load.cuh"
#include "cuda/reduce.cuh"

namespace rlhf_fast::cuda {
namespace {

// The recurrence between two tokens: the advantages of the later ones, and what the next adds to its delta,
// gamma V_next (and the score, after the last token that counts).
struct State {
    float advantage, critic_advantage, next;
};

// What a run of tokens does to it: advantage -> decay * advantage + weight * next + constant, next -> next. A run in
// which no token counts does nothing, `any` is false then and the rest is undefined.
struct Chain {
    float decay, weight, constant;
};
struct Steps {
    Chain actor, critic;
    float next;
    bool any;
};

__device__ inline Chain then(const Chain& first, float next, const Chain& second) {
    return {second.decay * first.decay, second.decay * first.weight,
            fmaf(second.decay, first.constant, fmaf(second.weight, next, second.constant))};
}

// `first` (of later tokens), then `second` (of earlier ones).
__device__ inline Steps then(const Steps& first, const Steps& second) {
    if (!first.any) return second;
    if (!second.any) return first;
    return {then(first.actor, first.next, second.actor), then(first.critic, first.next, second.critic), second.next,
            true};
}

__device__ inline State after(const Steps& steps, const State& s) {
    if (!steps.any) return s;
    const auto apply = [&](const Chain& c, float advantage) {
        return fmaf(c.decay, advantage, fmaf(c.weight, s.next, c.constant));
    };
    return {apply(steps.actor, s.advantage), apply(steps.critic, s.critic_advantage), steps.next};
}

__device__ inline Chain shift_down(const Chain& c, int apart) {
    return {__shfl_down_sync(kAllLanes, c.decay, apart), __shfl_down_sync(kAllLanes, c.weight, apart),
            __shfl_down_sync(kAllLanes, c.constant, apart)};
}

// Those of the lane that is `apart` higher; of lanes beyond the warp's end, steps that do nothing.
__device__ inline Steps shift_down(const Steps& s, int apart) {
    const Steps other = {shift_down(s.actor, apart), shift_down(s.critic, apart),
                         __shfl_down_sync(kAllLanes, s.next, apart),
                         __shfl_down_sync(kAllLanes, static_cast<int>(s.any), apart) != 0};
    return {other.actor, other.critic, other.next, other.any && static_cast<int>(threadIdx.x % 32) + apart < 32};
}

// r - V of a thread's tokens, and V.
template <class T>
__device__ inline void load_tokens(const GAEInputs& in, int64_t begin, int64_t token, int64_t length,
                                   float (&rest)[kVector<T>], float (&values)[kVector<T>]) {
    const auto read = [&](const void* data, float (&to)[kVector<T>]) {
        const T* const row = static_cast<const T*>(data) + begin;
        load(row, token, length, 1, aligned16(row), to);
    };
    float rewards[kVector<T>] = {};
    if (in.paid.rewards != nullptr) read(in.paid.rewards, rewards);
    if (in.paid.logprobs != nullptr) {
        float logprobs[kVector<T>], ref_logprobs[kVector<T>];
        read(in.paid.logprobs, logprobs);
        read(in.paid.ref_logprobs, ref_logprobs);
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j)
            rewards[j] = fmaf(-in.paid.kl_coef, logprobs[j] - ref_logprobs[j], rewards[j]);
    }
    read(in.values, values);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) rest[j] = rewards[j] - values[j];
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(GAEInputs in, GAE out) {
    constexpr int kTile = kThreads * kVector<T>;
    __shared__ Steps of_warps[kWarps];
    __shared__ State carried;
    __shared__ double scratch[3][kWarps];
    const int64_t b = blockIdx.x, begin = in.sequences.begin(b), length = in.sequences.begin(b + 1) - begin;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float decay = in.gamma * in.lam, critic_decay = in.gamma * in.critic_lam;
    State state = {0.0f, 0.0f, in.gamma * (in.bootstrap != nullptr ? in.bootstrap[b] : 0.0f)};
    if (in.paid.scores != nullptr) state.next += in.paid.scores[b];
    double counted = 0.0, sum = 0.0, squares = 0.0;

    for (int64_t tile = (length - 1) / kTile * kTile; tile >= 0 && length > 0; tile -= kTile) {
        const int64_t token = tile + threadIdx.x * kVector<T>;
        float rest[kVector<T>], values[kVector<T>];
        bool counts[kVector<T>];
        load_tokens<T>(in, begin, token, length, rest, values);
        Steps mine = {};
#pragma unroll
        for (int j = kVector<T> - 1; j >= 0; --j) {
            counts[j] = token + j < length && (in.mask == nullptr || in.mask[begin + token + j]);
            if (counts[j])
                mine = then(mine, {{decay, 1.0f, rest[j]}, {critic_decay, 1.0f, rest[j]}, in.gamma * values[j], true});
        }
        Steps above = mine;  // of this lane and all above it in the warp
#pragma unroll
        for (int apart = 1; apart < 32; apart *= 2) above = then(shift_down(above, apart), above);
        if (lane == 0) of_warps[warp] = above;
        __syncthreads();
        State s = state;
        for (int w = kWarps - 1; w > warp; --w) s = after(of_warps[w], s);
        s = after(shift_down(above, 1), s);

        float advantages[kVector<T>], returns[kVector<T>];
#pragma unroll
        for (int j = kVector<T> - 1; j >= 0; --j) {
            const float delta = rest[j] + s.next;
            const float advantage = fmaf(decay, s.advantage, delta);
            const float critic_advantage = fmaf(critic_decay, s.critic_advantage, delta);
            advantages[j] = counts[j] ? advantage : 0.0f;
            returns[j] = counts[j] ? values[j] + critic_advantage : 0.0f;
            if (counts[j]) {
                s = {advantage, critic_advantage, in.gamma * values[j]};
                counted += 1.0;
                sum += advantage;
                squares += static_cast<double>(advantage) * advantage;
            }
        }
        if (threadIdx.x == 0) carried = s;
        store_floats<T>(out.advantages + begin, token, length, advantages);
        store_floats<T>(out.returns + begin, token, length, returns);
        __syncthreads();
        state = carried;
    }
    if (out.sums == nullptr) return;
    counted = reduce_block(counted, Sum(), scratch[0]);
    sum = reduce_block(sum, Sum(), scratch[1]);
    squares = reduce_block(squares, Sum(), scratch[2]);
    if (threadIdx.x == 0) {
        out.sums[3 * b] = counted;
        out.sums[3 * b + 1] = sum;
        out.sums[3 * b + 2] = squares;
    }
}

void forward(const GAEInputs& in, const GAE& out, const Run& run) {
    const OnDevice guard(run);
    with_element(in.dtype, [&](auto element) {
        using T = decltype(element);
        RLHF_FAST_LAUNCH(forward_kernel<T>, grid(in.sequences.count), kThreads, stream_of(run), in, out);
    });
    check(cudaGetLastError(), "gae: forward");
}

}  // namespace

const GAEKernels gae = {forward};

}  // namespace rlhf_fast::cuda
