// Compiles one source file once for every instruction set, without compiler flags and without templates over sets.
//
// A kernel file includes this before anything else of its own. Its text is then compiled in a target region for each
// set that is chosen at run time, and last, by the compiler going on with the file, for what the platform's ABI
// guarantees (NEON on aarch64, SSE2 on x86-64):
//
//     #if !defined(SIMD_ISA)  // the first time through; the inclusions below come back here with it defined
//     #include <...>          // standard headers, so that none of them is read inside a region
//     #define SIMD_FILE "cpu/op.cpp"
//     #include "cpu/foreach_isa.h"
//     #endif
//     namespace rlhf_fast::SIMD_ISA { namespace { ... kernels on f32x16 ... } }
//     #if SIMD_LAST_PASS
//     ... SIMD_CHOOSE(kernel)(arguments) ...
//     #endif
//
// Inside a region stand raw pointers, sizes and our own vector type: no standard containers or algorithms (the linker
// could keep their AVX-512 copy for everybody), no threads, exceptions or checks.
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
// GCC 12 warns of its own _mm512_undefined_ps(), a variable that initialises itself.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/dtypes.h"
#include "cpu/isa.h"

#define SIMD_LAST_PASS 0

#if defined(__x86_64__)

#define SIMD_ISA avx512
#define SIMD_AVX512 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include "cpu/simd.h"
#include SIMD_FILE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SIMD_AVX512
#undef SIMD_ISA

#define SIMD_ISA avx2
#define SIMD_AVX2 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "cpu/simd.h"
#include SIMD_FILE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SIMD_AVX2
#undef SIMD_ISA

#endif  // __x86_64__

#undef SIMD_LAST_PASS
#define SIMD_LAST_PASS 1
#if defined(__aarch64__)
#define SIMD_ISA neon
#define SIMD_NEON 1
#else
#define SIMD_ISA baseline
#endif
#include "cpu/simd.h"

// The kernel of that name for the instruction set in use.
#if defined(__x86_64__)
#define SIMD_CHOOSE(kernel) \
    (isa() == Isa::avx512 ? &avx512::kernel : isa() == Isa::avx2 ? &avx2::kernel : &baseline::kernel)
#else
#define SIMD_CHOOSE(kernel) (&SIMD_ISA::kernel)
#endif
