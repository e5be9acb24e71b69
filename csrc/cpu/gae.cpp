// gae on the CPU: sequence by sequence, sixteen tokens that count at a time, from the last one on. Inside such a block
// the recurrence is a scan in registers, so that only one multiplication and addition a block waits for the block
// before. Blocks are counted in tokens that count: where a sequence lies, how it is padded and what holes it has change
// no bit. Bound by memory, 16 bytes a token in float32.
#if !defined(SIMD_ISA)
#include "common/gae.h"

#include "common/parallel.h"

#define SIMD_FILE "cpu/gae.cpp"
#include "cpu/foreach_isa.h"
#endif

namespace rlhf_fast::SIMD_ISA {
namespace {

// A_i = d_i + rate A_{i + 1} over the sixteen tokens of a block, and over the blocks that follow it in the sequence.
struct Recurrence {
    f32x16 rate, rate_2, rate_4, rate_8, powers;  // powers: rate^16 to rate^1
    f32x16 following;                             // the first advantage of the block after this one, in all lanes

    SIMD_INLINE explicit Recurrence(float r) : following(set1(0.0f)) {
        float lanes[kLanes], power = 1.0f;
        for (int i = kLanes - 1; i >= 0; --i) lanes[i] = power *= r;
        rate = set1(lanes[kLanes - 1]), rate_2 = set1(lanes[kLanes - 2]);
        rate_4 = set1(lanes[kLanes - 4]), rate_8 = set1(lanes[kLanes - 8]);
        powers = load16(lanes);
    }
    SIMD_INLINE f32x16 advance(f32x16 d) {
        const f32x16 zero = set1(0.0f);
        f32x16 a = fma(rate, slide<1>(d, zero), d);
        a = fma(rate_2, slide<2>(a, zero), a);
        a = fma(rate_4, slide<4>(a, zero), a);
        a = fma(rate_8, slide<8>(a, zero), a);
        a = fma(powers, following, a);
        following = first_everywhere(a);
        return a;
    }
};

// One sequence's way from its last token to its first.
template <class T, bool kTwo>
struct Sequence {
    const GAEInputs& in;
    const GAE& out;
    Recurrence actor, critic;
    f32x16 gamma, next;  // next: what the block after this one adds to the last delta, gamma V, in all lanes
    int64_t counted = 0;
    double sums[kLanes] = {}, squares[kLanes] = {};  // lane by lane

    SIMD_INLINE Sequence(const GAEInputs& inputs, const GAE& outputs, int64_t b)
        : in(inputs),
          out(outputs),
          actor(in.gamma * in.lam),
          critic(kTwo ? in.gamma * in.critic_lam : 0.0f),
          gamma(set1(in.gamma)) {
        // After the last token that counts, the score comes on top.
        const float score = in.paid.scores != nullptr ? in.paid.scores[b] : 0.0f;
        next = set1(in.gamma * (in.bootstrap != nullptr ? in.bootstrap[b] : 0.0f) + score);
    }

    SIMD_INLINE static f32x16 at(const void* data, int64_t first) {
        return load16(static_cast<const T*>(data) + first);
    }
    // The n <= 16 tokens whose places are given, last one first, in the upper lanes; 0 in the others.
    SIMD_INLINE static f32x16 at(const void* data, const int64_t* places, int64_t n) {
        float lanes[kLanes] = {};
        for (int64_t i = 0; i < n; ++i) lanes[kLanes - 1 - i] = to_float(static_cast<const T*>(data)[places[i]]);
        return load16(lanes);
    }

    // A block's advantages and returns. where...: how its tokens are found.
    template <class... Where>
    SIMD_INLINE void block(f32x16& advantages, f32x16& returns, Where... where) {
        const TokenRewards& paid = in.paid;
        f32x16 reward = paid.rewards != nullptr ? at(paid.rewards, where...) : set1(0.0f);
        if (paid.logprobs != nullptr) {
            const f32x16 k1 = sub(at(paid.logprobs, where...), at(paid.ref_logprobs, where...));
            reward = fma(set1(-paid.kl_coef), k1, reward);
        }
        const f32x16 value = at(in.values, where...), decayed = mul(gamma, value);
        const f32x16 delta = add(sub(reward, value), slide<1>(decayed, next));
        next = first_everywhere(decayed);
        advantages = actor.advance(delta);
        returns = add(value, kTwo ? critic.advance(delta) : advantages);
    }

    // n tokens more, in the upper lanes.
    SIMD_INLINE void add_up(f32x16 advantages, int64_t n) {
        if (out.sums == nullptr) return;
        float lanes[kLanes];
        store16(lanes, advantages);
        for (int64_t i = 0; i < kLanes; ++i) {
            const double a = i >= kLanes - n ? lanes[i] : 0.0f;
            sums[i] += a;
            squares[i] += a * a;
        }
        counted += n;
    }

    SIMD_INLINE void walk(int64_t begin, int64_t end) {
        constexpr uint64_t kAllCount = 0x0101010101010101u;
        f32x16 advantages, returns;
        for (int64_t stop = end; stop > begin;) {  // tokens from `stop` on are done
            const int64_t first = stop - kLanes;
            uint64_t flags[2] = {kAllCount, kAllCount};
            if (in.mask != nullptr && first >= begin) std::memcpy(flags, in.mask + first, sizeof flags);
            if (first >= begin && (flags[0] & flags[1]) == kAllCount) {
                block(advantages, returns, first);
                store16(out.advantages + first, advantages);
                store16(out.returns + first, returns);
                add_up(advantages, kLanes);
                stop = first;
            } else if (first >= begin && (flags[0] | flags[1]) == 0) {
                store16(out.advantages + first, set1(0.0f));
                store16(out.returns + first, set1(0.0f));
                stop = first;
            } else {
                stop = scattered(begin, stop);
            }
        }
    }

    // The block of the last sixteen tokens before `stop` that count, or those that there are, and zeros in between.
    // Returns where it begins.
    int64_t scattered(int64_t begin, int64_t stop) {
        int64_t places[kLanes], n = 0, i = stop;
        while (i > begin && n < kLanes) {
            --i;
            if (in.mask == nullptr || in.mask[i]) {
                places[n++] = i;
            } else {
                out.advantages[i] = out.returns[i] = 0.0f;
            }
        }
        if (n == 0) return i;
        f32x16 advantages, returns;
        block(advantages, returns, static_cast<const int64_t*>(places), n);
        float lanes[2][kLanes];
        store16(lanes[0], advantages), store16(lanes[1], returns);
        for (int64_t j = 0; j < n; ++j) {
            out.advantages[places[j]] = lanes[0][kLanes - 1 - j];
            out.returns[places[j]] = lanes[1][kLanes - 1 - j];
        }
        add_up(advantages, n);
        return i;
    }
};

template <class T, bool kTwo>
void sequences(const GAEInputs& in, const GAE& out, int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
        Sequence<T, kTwo> sequence(in, out, b);
        sequence.walk(in.sequences.begin(b), in.sequences.begin(b + 1));
        if (out.sums == nullptr) continue;
        double* const to = out.sums + 3 * b;
        to[0] = static_cast<double>(sequence.counted), to[1] = to[2] = 0.0;
        for (int i = 0; i < kLanes; ++i) to[1] += sequence.sums[i], to[2] += sequence.squares[i];
    }
}

void forward(const GAEInputs& in, const GAE& out, int64_t from, int64_t to) {
    with_element(in.dtype, [&](auto element) {
        using T = typename decltype(element)::type;
        if (in.critic_lam == in.lam) {
            sequences<T, false>(in, out, from, to);
        } else {
            sequences<T, true>(in, out, from, to);
        }
    });
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA

#if SIMD_LAST_PASS

namespace rlhf_fast::cpu {
namespace {

void forward(const GAEInputs& in, const GAE& out, const Run& run) {
    const auto kernel = SIMD_CHOOSE(forward);
    const int64_t count = in.sequences.count;
    if (count == 0) return;
    const int64_t tokens = in.sequences.begin(count) - in.sequences.begin(0);
    // A token costs as much as some eight logits of a row.
    parallel_rows(count, 8 * (tokens / count), run.threads,
                  [&](int64_t from, int64_t to) { kernel(in, out, from, to); });
}

}  // namespace

const GAEKernels gae = {forward};

}  // namespace rlhf_fast::cpu

#endif  // SIMD_LAST_PASS
