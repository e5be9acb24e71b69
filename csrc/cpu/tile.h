// Walking along a row of logits in tiles that stay in the L1 cache. Included by kernel files below math.h, once per
// instruction set, so there is no include guard.

namespace rlhf_fast::SIMD_ISA {
namespace {

constexpr int64_t kTile = 4096;    // columns
constexpr float kLeast = -104.0f;  // exp of it is 0, and 0 times it is no nan

// n <= kTile elements from p, stride apart, as a contiguous run: p itself, or a copy in buffer (kTile).
template <class T>
SIMD_INLINE const T* contiguous(const T* p, int64_t n, int64_t stride, T* buffer) {
    if (stride == 1) return p;
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i * stride];
    return buffer;
}

struct Range {
    float least, largest;
};

// Of n elements, nan left out; inf and -inf for none.
template <class T>
inline Range range_of(const T* x, int64_t n) {
    f32x16 low = set1(INFINITY), high[2] = {set1(-INFINITY), set1(-INFINITY)};
    const auto take = [&](int part, f32x16 v) SIMD_INLINE_LAMBDA {
        low = min(v, low);
        high[part] = max(v, high[part]);
    };
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        take(0, load16(x + i));
        take(1, load16(x + i + kLanes));
    }
    if (i + kLanes <= n) {
        take(0, load16(x + i));
        i += kLanes;
    }
    if (i < n) {
        low = min(load_first(x + i, n - i, INFINITY), low);
        high[1] = max(load_first(x + i, n - i, -INFINITY), high[1]);
    }
    return {-reduce_max(sub(set1(0.0f), low)), reduce_max(max(high[0], high[1]))};
}

template <class T>
inline bool has_nan(const T* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        if (to_float(x[i]) != to_float(x[i])) return true;
    return false;
}

// body(part, vector) for each 16 of n elements, `part` alternating between 0 and 1, so that sums have two chains to run
// on. z is applied, and the lanes past the end are -inf. `ahead`, where the next tile begins, is fetched meanwhile.
template <class T, class Z, class Body>
SIMD_INLINE void for_each_z(const T* x, int64_t n, const Z& z, const T* ahead, const Body& body) {
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        __builtin_prefetch(ahead + i);
        if (sizeof(T) == 4) __builtin_prefetch(ahead + i + kLanes);
        body(0, z.z(load16(x + i)));
        body(1, z.z(load16(x + i + kLanes)));
    }
    if (i + kLanes <= n) {
        body(0, z.z(load16(x + i)));
        i += kLanes;
    }
    if (i < n) body(1, keep_first(z.z(load_first(x + i, n - i, 0.0f)), n - i, -INFINITY));
}

}  // namespace
}  // namespace rlhf_fast::SIMD_ISA
