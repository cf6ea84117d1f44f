/* ceiling.h - what attention on a CPU cannot beat: reading the keys and values once, and converting each F16 number
 * and multiplying-adding it for every query head that shares it. Measured with the threads that the attention gets. */
#ifndef CEILING_H
#define CEILING_H

#include "bench.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define CEILING_X86 1
#define CEILING_AVX2 __attribute__((target("avx2,fma,f16c")))
#define CEILING_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#else
#define CEILING_X86 0
#endif
#define CEILING_INLINE static inline __attribute__((always_inline))
#define CEILING_UNROLL _Pragma("GCC unroll 16")

enum { CEILING_MAX_SLICES = 64 };

typedef struct ceiling {
    const uint8_t *at;
    size_t bytes;     /* of all slices */
    uint32_t gqa;     /* query heads a KV head: 1, 4 or 8; 0 reads only */
    uint32_t repeats; /* of the whole, in one loop of the pool */
    kvl_simd simd;    /* AUTO: the widest there is */
    pool *threads;
    float q[128], sink[CEILING_MAX_SLICES];
} ceiling;

#if CEILING_X86
static CEILING_AVX512 float ceiling_read512(const uint8_t *p, size_t n) {
    __m512 a[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (size_t i = 0; i + 256 <= n; i += 256) {
        CEILING_UNROLL for (int k = 0; k < 4; k++) a[k] =
            _mm512_add_ps(a[k], _mm512_loadu_ps((const float *)(const void *)(p + i + 64 * k)));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a[0], a[1]), _mm512_add_ps(a[2], a[3])));
}

static CEILING_AVX2 float ceiling_read256(const uint8_t *p, size_t n) {
    __m256 a[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (size_t i = 0; i + 128 <= n; i += 128) {
        CEILING_UNROLL for (int k = 0; k < 4; k++) a[k] =
            _mm256_add_ps(a[k], _mm256_loadu_ps((const float *)(const void *)(p + i + 32 * k)));
    }
    a[0] = _mm256_add_ps(_mm256_add_ps(a[0], a[1]), _mm256_add_ps(a[2], a[3]));
    return _mm256_cvtss_f32(a[0]);
}

/* Every 16 (or 8) numbers are converted once and used by G query heads, as attention must at the least. */
CEILING_INLINE CEILING_AVX512 float ceiling_convert512(const int G, const uint8_t *p, size_t n,
                                                       const float *q) {
    __m512 a[16];
    CEILING_UNROLL for (int i = 0; i < 16; i++) a[i] = _mm512_setzero_ps();
    for (size_t i = 0; i + 128 <= n; i += 128) {
        CEILING_UNROLL for (int k = 0; k < 4; k++) {
            __m512 v = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(p + i + 32 * k)));
            CEILING_UNROLL for (int g = 0; g < G; g++) a[(k * G + g) % 16] =
                _mm512_fmadd_ps(_mm512_loadu_ps(q + 16 * g), v, a[(k * G + g) % 16]);
        }
    }
    CEILING_UNROLL for (int i = 1; i < 16; i++) a[0] = _mm512_add_ps(a[0], a[i]);
    return _mm512_reduce_add_ps(a[0]);
}

CEILING_INLINE CEILING_AVX2 float ceiling_convert256(const int G, const uint8_t *p, size_t n,
                                                     const float *q) {
    __m256 a[8];
    CEILING_UNROLL for (int i = 0; i < 8; i++) a[i] = _mm256_setzero_ps();
    for (size_t i = 0; i + 128 <= n; i += 128) {
        CEILING_UNROLL for (int k = 0; k < 8; k++) {
            __m256 v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p + i + 16 * k)));
            CEILING_UNROLL for (int g = 0; g < G; g++) a[(k * G + g) % 8] =
                _mm256_fmadd_ps(_mm256_loadu_ps(q + 8 * g), v, a[(k * G + g) % 8]);
        }
    }
    CEILING_UNROLL for (int i = 1; i < 8; i++) a[0] = _mm256_add_ps(a[0], a[i]);
    return _mm256_cvtss_f32(a[0]);
}

static CEILING_AVX512 float ceiling_run512(uint32_t gqa, const uint8_t *p, size_t n, const float *q) {
    return gqa == 0   ? ceiling_read512(p, n)
           : gqa == 1 ? ceiling_convert512(1, p, n, q)
           : gqa == 4 ? ceiling_convert512(4, p, n, q)
                      : ceiling_convert512(8, p, n, q);
}
static CEILING_AVX2 float ceiling_run256(uint32_t gqa, const uint8_t *p, size_t n, const float *q) {
    return gqa == 0   ? ceiling_read256(p, n)
           : gqa == 1 ? ceiling_convert256(1, p, n, q)
           : gqa == 4 ? ceiling_convert256(4, p, n, q)
                      : ceiling_convert256(8, p, n, q);
}
#endif

static float ceiling_read_plain(const uint8_t *p, size_t n) {
    uint64_t a[4] = {0, 0, 0, 0}, x[4];
    for (size_t i = 0; i + 32 <= n; i += 32) {
        memcpy(x, p + i, 32);
        for (int k = 0; k < 4; k++) a[k] += x[k];
    }
    return (float)(a[0] + a[1] + a[2] + a[3]);
}

/* The conversion takes normal numbers alone: the least that scalar code can do. */
static float ceiling_convert_plain(uint32_t gqa, const uint8_t *p, size_t n, const float *q) {
    float a[8] = {0};
    for (size_t i = 0; i + 2 <= n; i += 2) {
        uint16_t h;
        memcpy(&h, p + i, 2);
        uint32_t bits = (uint32_t)(h & 0x8000) << 16 | (((uint32_t)(h & 0x7fff) << 13) + 0x38000000);
        float v;
        memcpy(&v, &bits, 4);
        for (uint32_t g = 0; g < gqa; g++) a[g] += q[g] * v;
    }
    return a[0] + a[gqa - 1];
}

static kvl_simd ceiling_simd(kvl_simd asked) {
#if CEILING_X86
    if (asked != KVL_SIMD_AUTO) return asked;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return KVL_SIMD_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return KVL_SIMD_AVX2;
#endif
    (void)asked;
    return KVL_SIMD_SCALAR;
}

static void ceiling_slice(void *arg, uint32_t i) {
    ceiling *c = arg;
    size_t n = c->bytes / pool_threads(c->threads);
    const uint8_t *p = c->at + i * n;
    float sum = 0;
    for (uint32_t r = 0; r < c->repeats; r++) {
#if CEILING_X86
        if (c->simd == KVL_SIMD_AVX512) {
            sum += ceiling_run512(c->gqa, p, n, c->q);
            continue;
        }
        if (c->simd == KVL_SIMD_AVX2) {
            sum += ceiling_run256(c->gqa, p, n, c->q);
            continue;
        }
#endif
        sum += c->gqa ? ceiling_convert_plain(c->gqa, p, n, c->q) : ceiling_read_plain(p, n);
    }
    c->sink[i % CEILING_MAX_SLICES] = sum;
}

static double ceiling_run(void *arg) {
    ceiling *c = arg;
    double start = runtime_now();
    pool_run(c->threads, pool_threads(c->threads), ceiling_slice, c);
    return runtime_now() - start;
}

/* GB/s of all threads together, the best of `seconds`. gqa 0 reads only. */
static double ceiling_rate(pool *threads, kvl_simd simd, const void *at, size_t bytes, uint32_t gqa,
                           double seconds) {
    ceiling c = {.at = at, .bytes = bytes, .gqa = gqa, .simd = ceiling_simd(simd), .threads = threads};
    c.repeats =
        bytes < (32u << 20) ? (uint32_t)((32u << 20) / bytes) : 1; /* long against the waking of threads */
    for (int i = 0; i < 128; i++) c.q[i] = bench_noise();
    return (double)bytes * c.repeats / bench_best(ceiling_run, &c, seconds) * 1e-9;
}

#endif /* CEILING_H */
