// The CPU's side of kernels_cuda/port.cuh: CUDA's names and the kvl_ wrappers, for kernels compiled as C++.
#ifndef CUDA_CPU_DEVICE_H
#define CUDA_CPU_DEVICE_H
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__F16C__)
#include <immintrin.h>
#endif
#include "cuda_cpu.h"

#ifndef KVL_CPU_ARCH
#define KVL_CPU_ARCH 800
#endif
#define KVL_ARCH KVL_CPU_ARCH

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define KVL_D static inline
#define KVL_MEMBER inline
#define KVL_UNROLL
#define KVL_ROLLED
#define KVL_INLINE static inline __attribute__((always_inline))

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace cuda_cpu {

// Where in the source a wrapper was called, as the default of its last parameter.
struct Site {
    const char *file;
    unsigned line;
    static constexpr Site here(const char *f = __builtin_FILE(), unsigned l = __builtin_LINE()) {
        return {f, l};
    }
};
#define KVL_SITE cuda_cpu::Site site = cuda_cpu::Site::here()

enum Op { SYNCWARP, SHFL, VOTE, MMA_F16, MMA_BF16, MOVMATRIX, LDMATRIX, LDMATRIX_TRANS };

// 32 lanes, and what they hand each other. A collective is computed for all lanes by the last that arrives, so that
// a lane finds its own result when it goes on, and one buffer is enough.
struct Warp {
    uint32_t alive, runnable;           // bits by lane; what is alive and not runnable waits:
    uint32_t at_collective, at_barrier; // for lanes of its warp; in __syncthreads
    uint32_t at_mbarrier;
    uint32_t rotation, descending; // the order in which lanes run
    unsigned index;
    struct Fiber *fibers; // of its lanes
    uint64_t gathering;   // the meeting that lanes came to last, and those who wait for it
    uint32_t gathered;
    uint64_t meeting[32]; // of lanes at a collective: operation, line and mask, equal where they meet
    // in: a lane's value and the lane it reads; or predicates; out: results
    uint64_t value[32], result[32];
    uint8_t source[32];
    // fragments: register r of lane l is [r][l][2], which makes [r] an 8 x 8 matrix, row by row
    alignas(64) uint16_t a[4][32][2];
    alignas(64) uint16_t b[2][32][2];
    alignas(64) float c[2][32][2];
    const void *row[32]; // ldmatrix
};

struct AsyncCopy {
    void *dst;
    const void *src; // null: zeros
    uint32_t group;
};

struct Context { // a stack, and where it stopped
    void *sp;
    void *stack;
    size_t stack_bytes;
    void *fake_stack; // AddressSanitizer's
};

struct Fiber {
    Context context;
    Warp *warp;
    unsigned lane;
    dim3 thread;
    const char *doing; // for reports: what it waits for
    Site site;
    std::vector<AsyncCopy> copies; // not waited for yet, in order, from first_copy on
    size_t first_copy;
    uint32_t groups;    // committed
    uint64_t *mbarrier; // waited for, and the parity
    uint32_t parity;
    bool unfenced; // has initialised an mbarrier since its last fence
};

struct BulkCopy {
    void *dst;
    const void *src;
    uint32_t bytes;
    uint64_t *mbarrier;
};

struct Block {
    dim3 index, grid, threads;
    unsigned char *shared = nullptr; // dynamic shared memory, in an arena with guards around
    size_t shared_bytes = 0;
    unsigned char *arena = nullptr;
    size_t arena_bytes = 0;
};

inline thread_local Fiber *fiber = nullptr; // that runs on this OS thread
inline thread_local Block *block = nullptr;

// In cuda_cpu.cpp.
void meet(Op op, uint32_t mask, Site site);
void sync_threads(Site site);
void mbarrier_init(uint64_t *bar, uint32_t count, Site site);
void mbarrier_expect(uint64_t *bar, uint32_t bytes, Site site);
void mbarrier_wait(uint64_t *bar, uint32_t parity, Site site);
void bulk_copy(void *dst, const void *src, uint32_t bytes, uint64_t *bar, Site site);
void async_copy16(void *dst, const void *src, bool valid, Site site);
void async_wait(uint32_t groups_left);
[[noreturn]] void bad_access(const void *p, unsigned bytes, const char *what, Site site);
[[noreturn]] void needs_arch(const char *what, unsigned arch, Site site);

struct Register {
    explicit Register(const Kernel &kernel);
};

// Every vector access: aligned, and not beyond the block's shared memory.
KVL_INLINE void check_access(const void *p, unsigned bytes, const char *what, Site site) {
    uintptr_t at = (uintptr_t)p, in_arena = at - (uintptr_t)block->arena,
              in_shared = at - (uintptr_t)block->shared;
    bool out = in_arena < block->arena_bytes &&
               (in_shared > block->shared_bytes || in_shared + bytes > block->shared_bytes);
    if (__builtin_expect((at & (bytes - 1)) != 0 || out, 0)) bad_access(p, bytes, what, site);
}
KVL_INLINE bool is_shared(const void *p) {
    return (uintptr_t)p - (uintptr_t)block->arena < block->arena_bytes;
}

} // namespace cuda_cpu

#define threadIdx (cuda_cpu::fiber->thread)
#define blockIdx (cuda_cpu::block->index)
#define blockDim (cuda_cpu::block->threads)
#define gridDim (cuda_cpu::block->grid)

#define KVL_KERNEL(name, threads, min_blocks_per_sm, Args)                                                 \
    static void name##_body(const Args &a);                                                                \
    static void name##_run(const void *args) { name##_body(*(const Args *)args); }                         \
    static const cuda_cpu::Register name##_register({#name, threads, KVL_ARCH, sizeof(Args), name##_run}); \
    static void name##_body([[maybe_unused]] const Args &a)

#define KVL_DYN_SMEM(T, name) T *name = (T *)cuda_cpu::block->shared

// ---- threads of a block and lanes of a warp ----

static inline void __syncthreads(KVL_SITE) { cuda_cpu::sync_threads(site); }
static inline void __syncwarp(unsigned mask = ~0u, KVL_SITE) {
    cuda_cpu::meet(cuda_cpu::SYNCWARP, mask, site);
}

namespace cuda_cpu {
template <class T> KVL_INLINE T shuffle(unsigned mask, T value, unsigned source, Site site) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    Warp &w = *fiber->warp;
    unsigned lane = fiber->lane;
    memcpy(&w.value[lane], &value, sizeof(T));
    w.source[lane] = (uint8_t)source;
    meet(SHFL, mask, site);
    memcpy(&value, &w.result[lane], sizeof(T));
    return value;
}
KVL_INLINE unsigned vote(unsigned mask, bool predicate, Site site) {
    Warp &w = *fiber->warp;
    unsigned lane = fiber->lane;
    w.value[lane] = predicate;
    meet(VOTE, mask, site);
    return (unsigned)w.result[lane];
}
} // namespace cuda_cpu

// width: lanes shuffle within groups of so many
template <class T> static inline T __shfl_sync(unsigned mask, T v, int source, int width = 32, KVL_SITE) {
    unsigned lane = cuda_cpu::fiber->lane, first = lane & ~(unsigned)(width - 1);
    return cuda_cpu::shuffle(mask, v, first + ((unsigned)source & (unsigned)(width - 1)), site);
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, KVL_SITE) {
    unsigned lane = cuda_cpu::fiber->lane, source = lane ^ (unsigned)x,
             end = (lane | (unsigned)(width - 1)) + 1;
    return cuda_cpu::shuffle(mask, v, source < end ? source : lane, site);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32, KVL_SITE) {
    unsigned lane = cuda_cpu::fiber->lane, end = (lane | (unsigned)(width - 1)) + 1;
    return cuda_cpu::shuffle(mask, v, lane + d < end ? lane + d : lane, site);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32, KVL_SITE) {
    unsigned lane = cuda_cpu::fiber->lane, first = lane & ~(unsigned)(width - 1);
    return cuda_cpu::shuffle(mask, v, lane >= first + d ? lane - d : lane, site);
}
static inline unsigned __ballot_sync(unsigned mask, int p, KVL_SITE) {
    return cuda_cpu::vote(mask, p != 0, site);
}
static inline int __any_sync(unsigned mask, int p, KVL_SITE) {
    return cuda_cpu::vote(mask, p != 0, site) != 0;
}
static inline int __all_sync(unsigned mask, int p, KVL_SITE) {
    return cuda_cpu::vote(mask, p == 0, site) == 0;
}

// ---- bits and plain arithmetic; compiled with -ffp-contract=off, or __fmul_rn would not be one ----

static inline unsigned __float_as_uint(float f) {
    unsigned u;
    memcpy(&u, &f, 4);
    return u;
}
static inline float __uint_as_float(unsigned u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline int __float_as_int(float f) { return (int)__float_as_uint(f); }
static inline float __int_as_float(int i) { return __uint_as_float((unsigned)i); }

static inline unsigned cuda_cpu_permuted_byte(uint64_t v, unsigned s) {
    unsigned byte = (unsigned)(v >> (8 * (s & 7))) & 255;
    return s & 8 ? (byte & 128 ? 255u : 0u) : byte;
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    uint64_t v = (uint64_t)b << 32 | a;
    return cuda_cpu_permuted_byte(v, s) | cuda_cpu_permuted_byte(v, s >> 4) << 8 |
           cuda_cpu_permuted_byte(v, s >> 8) << 16 | cuda_cpu_permuted_byte(v, s >> 12) << 24;
}
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline unsigned __brev(unsigned v) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i);
    return r;
}

static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline float __fsqrt_rn(float a) { return std::sqrt(a); }
static inline int __float2int_rn(float a) { return (int)std::nearbyint(a); }

static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
static inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

static inline unsigned atomicAdd(unsigned *p, unsigned v) {
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
static inline int atomicAdd(int *p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
static inline unsigned atomicOr(unsigned *p, unsigned v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
static inline unsigned atomicMax(unsigned *p, unsigned v) {
    unsigned old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (old < v && !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
static inline float atomicAdd(float *p, float v) { // the order of such sums is the caller's business
    unsigned *u = (unsigned *)(void *)p, old = __atomic_load_n(u, __ATOMIC_RELAXED), sum;
    do sum = __float_as_uint(__uint_as_float(old) + v);
    while (!__atomic_compare_exchange_n(u, &old, sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return __uint_as_float(old);
}

// ---- half and bfloat16: every operation rounds once, to nearest even ----

static inline float kvl_h2f(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    unsigned sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * (float)mantissa;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}
static inline uint16_t kvl_f2h(float f) {
    if (f != f) return 0x7fff; // as cvt.rn.f16.f32 gives it
#if defined(__F16C__)
    return (uint16_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(f), 0));
#else
    unsigned u = __float_as_uint(f), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u >= 0x477ff000) return (uint16_t)(sign | 0x7c00); // 65520 and above
    if (u < 0x38800000) // subnormal: let the sum with 0.5, whose ulp is 2^-24, round
        return (uint16_t)(sign | (__float_as_uint(__uint_as_float(u) + 0.5f) - 0x3f000000));
    u += 0xc8000fff + (u >> 13 & 1);
    return (uint16_t)(sign | u >> 13);
#endif
}
static inline uint16_t kvl_f2bf(float f) {
    unsigned u = __float_as_uint(f);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline float kvl_bf2f(uint16_t b) { return __uint_as_float((unsigned)b << 16); }

static inline uint32_t kvl_f22bf2(float low, float high) {
    return kvl_f2bf(low) | (uint32_t)kvl_f2bf(high) << 16;
}

// Pairs. A product of halves is exact in float; a sum rounded to float and then to half is as if rounded once
// (24 >= 2·11 + 2). a·b + c is not: on its way through float it is rounded to odd, which keeps what was cut off visible.
#if defined(__F16C__)
KVL_INLINE __m128 cuda_cpu_floats(uint32_t pair) { return _mm_cvtph_ps(_mm_cvtsi32_si128((int)pair)); }
KVL_INLINE uint32_t cuda_cpu_pair(__m128 f) {
    __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(f, f));
    nan = _mm_packs_epi32(nan, nan);
    return (uint32_t)_mm_cvtsi128_si32(
        _mm_or_si128(_mm_andnot_si128(nan, _mm_cvtps_ph(f, 0)), _mm_srli_epi16(nan, 1)));
}
static inline uint32_t kvl_f22h2(float low, float high) { return cuda_cpu_pair(_mm_set_ps(0, 0, high, low)); }
static inline uint32_t kvl_hmul2(uint32_t a, uint32_t b) {
    return cuda_cpu_pair(_mm_mul_ps(cuda_cpu_floats(a), cuda_cpu_floats(b)));
}
static inline uint32_t kvl_hadd2(uint32_t a, uint32_t b) {
    return cuda_cpu_pair(_mm_add_ps(cuda_cpu_floats(a), cuda_cpu_floats(b)));
}
static inline uint32_t kvl_hfma2(uint32_t a, uint32_t b, uint32_t c) {
    __m128 product = _mm_mul_ps(cuda_cpu_floats(a), cuda_cpu_floats(b)), addend = cuda_cpu_floats(c);
    __m128 sum = _mm_add_ps(product, addend), of_addend = _mm_sub_ps(sum, product);
    __m128 rest = _mm_add_ps(_mm_sub_ps(product, _mm_sub_ps(sum, of_addend)), _mm_sub_ps(addend, of_addend));
    __m128i bits = _mm_castps_si128(sum), one = _mm_set1_epi32(1);
    __m128i even = _mm_cmpeq_epi32(_mm_and_si128(bits, one), _mm_setzero_si128());
    __m128i inexact = _mm_castps_si128(_mm_cmp_ps(rest, _mm_setzero_ps(), _CMP_NEQ_OQ));
    __m128i outwards =
        _mm_or_si128(_mm_srai_epi32(_mm_castps_si128(_mm_xor_ps(sum, rest)), 31), one); // 1 or -1
    bits = _mm_add_epi32(bits, _mm_and_si128(outwards, _mm_and_si128(even, inexact)));
    return cuda_cpu_pair(_mm_castsi128_ps(bits));
}
#else
static inline uint32_t kvl_f22h2(float low, float high) {
    return kvl_f2h(low) | (uint32_t)kvl_f2h(high) << 16;
}
static inline uint32_t kvl_hmul2(uint32_t a, uint32_t b) {
    return kvl_f22h2(kvl_h2f((uint16_t)a) * kvl_h2f((uint16_t)b),
                     kvl_h2f((uint16_t)(a >> 16)) * kvl_h2f((uint16_t)(b >> 16)));
}
static inline uint32_t kvl_hadd2(uint32_t a, uint32_t b) {
    return kvl_f22h2(kvl_h2f((uint16_t)a) + kvl_h2f((uint16_t)b),
                     kvl_h2f((uint16_t)(a >> 16)) + kvl_h2f((uint16_t)(b >> 16)));
}
static inline uint16_t cuda_cpu_hfma(uint16_t a, uint16_t b, uint16_t c) {
    double sum = (double)(kvl_h2f(a) * kvl_h2f(b)) + kvl_h2f(c); // exact wherever that can decide a tie
    float f = (float)sum;
    if ((double)f != sum && f == f) {
        unsigned u = __float_as_uint(f);
        if (std::fabs((double)f) > std::fabs(sum)) u--;
        f = __uint_as_float(u | 1);
    }
    return kvl_f2h(f);
}
static inline uint32_t kvl_hfma2(uint32_t a, uint32_t b, uint32_t c) {
    return cuda_cpu_hfma((uint16_t)a, (uint16_t)b, (uint16_t)c) |
           (uint32_t)cuda_cpu_hfma((uint16_t)(a >> 16), (uint16_t)(b >> 16), (uint16_t)(c >> 16)) << 16;
}
#endif
static inline uint32_t kvl_hsub2(uint32_t a, uint32_t b) { return kvl_hadd2(a, b ^ 0x80008000u); }

static inline float kvl_exp2(float x) {
    float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}
static inline uint32_t kvl_opaque(uint32_t x) { return x; }
static inline float kvl_rcp(float x) { return 1 / x; }
static inline uint32_t kvl_and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
static inline float kvl_divide(float x, float y) { return x / y; }
static inline float kvl_tanh(float x) { return std::tanh(x); }

// cvt.rn.f16x2.e4m3x2 of sm_89 and later; port.cuh has the bit trick for the others
static inline uint16_t cuda_cpu_e4m3(unsigned code) {
    unsigned sign = (code & 0x80) << 8, magnitude = code & 0x7f;
    if (magnitude == 0x7f) return 0x7fff;
    float value = magnitude < 8 ? (float)magnitude * 0x1p-9f
                                : std::ldexp((float)(8 + (magnitude & 7)), (int)(magnitude >> 3) - 10);
    return (uint16_t)(sign | kvl_f2h(value));
}
static inline uint32_t kvl_cvt_e4m3x2(uint32_t lo16) {
    return cuda_cpu_e4m3(lo16 & 255) | (uint32_t)cuda_cpu_e4m3(lo16 >> 8 & 255) << 16;
}

// ---- tensor cores ----

namespace cuda_cpu {
KVL_INLINE void mma(Op op, float c[4], const uint32_t a[4], const uint32_t b[2], Site site) {
    Warp &w = *fiber->warp;
    unsigned lane = fiber->lane;
    for (int i = 0; i < 4; i++) memcpy(w.a[i][lane], &a[i], 4);
    for (int i = 0; i < 2; i++) memcpy(w.b[i][lane], &b[i], 4);
    for (int i = 0; i < 2; i++) memcpy(w.c[i][lane], &c[2 * i], 8);
    meet(op, ~0u, site);
    for (int i = 0; i < 2; i++) memcpy(&c[2 * i], w.c[i][lane], 8);
}
KVL_INLINE void ldmatrix(Op op, uint32_t r[4], const void *p, Site site) {
    Warp &w = *fiber->warp;
    unsigned lane = fiber->lane;
    check_access(p, 16, "ldmatrix", site);
    if (__builtin_expect(!is_shared(p), 0)) bad_access(p, 16, "ldmatrix outside of shared memory", site);
    w.row[lane] = p;
    meet(op, ~0u, site);
    for (int i = 0; i < 4; i++) memcpy(&r[i], w.a[i][lane], 4);
}
} // namespace cuda_cpu

static inline void kvl_mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2], KVL_SITE) {
    cuda_cpu::mma(cuda_cpu::MMA_F16, c, a, b, site);
}
static inline void kvl_mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2], KVL_SITE) {
    if (KVL_ARCH < 800) cuda_cpu::needs_arch("kvl_mma_bf16", 800, site);
    cuda_cpu::mma(cuda_cpu::MMA_BF16, c, a, b, site);
}
static inline uint32_t kvl_movm(uint32_t v, KVL_SITE) {
    cuda_cpu::Warp &w = *cuda_cpu::fiber->warp;
    unsigned lane = cuda_cpu::fiber->lane;
    memcpy(w.a[0][lane], &v, 4);
    cuda_cpu::meet(cuda_cpu::MOVMATRIX, ~0u, site);
    memcpy(&v, w.a[1][lane], 4);
    return v;
}
static inline void kvl_ldmatrix_x4(uint32_t r[4], const void *p, KVL_SITE) {
    cuda_cpu::ldmatrix(cuda_cpu::LDMATRIX, r, p, site);
}
static inline void kvl_ldmatrix_x4_trans(uint32_t r[4], const void *p, KVL_SITE) {
    cuda_cpu::ldmatrix(cuda_cpu::LDMATRIX_TRANS, r, p, site);
}

// ---- memory ----

namespace cuda_cpu {
template <class T> KVL_INLINE T load(const void *p, Site site) {
    T v;
    check_access(p, sizeof(T), "load", site);
    memcpy(&v, p, sizeof(T));
    return v;
}
template <class T> KVL_INLINE void store(void *p, const T &v, Site site) {
    check_access(p, sizeof(T), "store", site);
    memcpy(p, &v, sizeof(T));
}
} // namespace cuda_cpu

static inline uint4 kvl_ld16(const void *p, KVL_SITE) { return cuda_cpu::load<uint4>(p, site); }
static inline uint2 kvl_ld8(const void *p, KVL_SITE) { return cuda_cpu::load<uint2>(p, site); }
static inline uint32_t kvl_ld4(const void *p, KVL_SITE) { return cuda_cpu::load<uint32_t>(p, site); }
static inline uint16_t kvl_ld2(const void *p, KVL_SITE) { return cuda_cpu::load<uint16_t>(p, site); }
static inline uint4 kvl_ldg16(const void *p, KVL_SITE) {
    if (cuda_cpu::is_shared(p)) cuda_cpu::bad_access(p, 16, "kvl_ldg16 from shared memory", site);
    return cuda_cpu::load<uint4>(p, site);
}
static inline void kvl_st16(void *p, uint4 v, KVL_SITE) { cuda_cpu::store(p, v, site); }
static inline void kvl_st8(void *p, uint2 v, KVL_SITE) { cuda_cpu::store(p, v, site); }
static inline void kvl_st4(void *p, uint32_t v, KVL_SITE) { cuda_cpu::store(p, v, site); }
static inline void kvl_st2(void *p, uint16_t v, KVL_SITE) { cuda_cpu::store(p, v, site); }
template <class T> static inline T __ldg(const T *p, KVL_SITE) { return cuda_cpu::load<T>(p, site); }

static inline void kvl_cp_async16(void *dst, const void *src, bool valid, KVL_SITE) {
    cuda_cpu::async_copy16(dst, src, valid, site);
    if (KVL_ARCH < 800) { // plain loads and stores
        cuda_cpu::fiber->groups++;
        cuda_cpu::async_wait(0);
    }
}
static inline void kvl_cp_commit() { cuda_cpu::fiber->groups++; }
template <int N> static inline void kvl_cp_wait() { cuda_cpu::async_wait(N); }

static inline void kvl_mbar_init(uint64_t *bar, uint32_t count, KVL_SITE) {
    if (KVL_ARCH < 900) cuda_cpu::needs_arch("kvl_mbar_init", 900, site);
    cuda_cpu::mbarrier_init(bar, count, site);
}
static inline void kvl_mbar_fence() { cuda_cpu::fiber->unfenced = false; }
static inline void kvl_bulk_fence() {}
static inline void kvl_mbar_expect(uint64_t *bar, uint32_t bytes, KVL_SITE) {
    cuda_cpu::mbarrier_expect(bar, bytes, site);
}
static inline void kvl_bulk_copy(void *dst, const void *src, uint32_t bytes, uint64_t *bar, KVL_SITE) {
    cuda_cpu::bulk_copy(dst, src, bytes, bar, site);
}
static inline void kvl_mbar_wait(uint64_t *bar, uint32_t parity, KVL_SITE) {
    cuda_cpu::mbarrier_wait(bar, parity, site);
}
#endif
