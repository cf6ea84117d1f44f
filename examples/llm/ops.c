/* ops.c - see ops.h. */
#include "ops.h"

#include <math.h>
#include <string.h>

#if defined(__x86_64__)
#define OPS_X86 1
#include <immintrin.h>
#endif

/* 16 lanes that every compiler maps to the vectors it has; the order of additions is the same on all of
 * them. */
typedef float lanes16 __attribute__((vector_size(64), aligned(4), may_alias));

void ops_rmsnorm(const float *x, const float *w, uint32_t n, float eps, float *out) {
    lanes16 squares = {0};
    for (uint32_t i = 0; i < n; i += 16) {
        const lanes16 v = *(const lanes16 *)(x + i);
        squares += v * v;
    }
    float sum = 0;
    for (uint32_t j = 0; j < 16; j++) sum += squares[j];
    const float scale = 1.0f / sqrtf(sum / (float)n + eps);
    for (uint32_t i = 0; i < n; i += 16) {
        *(lanes16 *)(out + i) = *(const lanes16 *)(x + i) * scale * *(const lanes16 *)(w + i);
    }
}

void ops_rope_angles(uint32_t position, double base, uint32_t n_dims, float *angles) {
    for (uint32_t i = 0; i < n_dims / 2; i++) {
        double angle = position * pow(base, -2.0 * i / n_dims);
        angles[2 * i] = (float)cos(angle);
        angles[2 * i + 1] = (float)sin(angle);
    }
}

void ops_rope(float *x, uint32_t n_heads, uint32_t head_dim, uint32_t n_dims, const float *angles) {
    for (uint32_t h = 0; h < n_heads; h++, x += head_dim) {
        for (uint32_t i = 0; i < n_dims; i += 2) {
            float a = x[i], b = x[i + 1], c = angles[i], s = angles[i + 1];
            x[i] = a * c - b * s;
            x[i + 1] = a * s + b * c;
        }
    }
}

static void scalar_silu_mul(float *gate, const float *up, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

#if OPS_X86
/* exp(x) = 2^n * p(r): n = round(x log2 e), r = x - n ln 2 in two steps, p the degree-6 Taylor polynomial
 * with |r| <= ln 2 / 2 (relative error below 2e-7). x is clamped to [-87, 88], where 2^n is a normal
 * number. */
#define EXP_MIN -87.0f
#define EXP_MAX 88.0f
#define LOG2E 1.44269504f
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
static const float exp_coefficients[7] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};

__attribute__((target("avx512f"))) static void avx512_silu_mul(float *gate, const float *up, uint32_t n) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (uint32_t i = 0; i < n; i += 16) {
        const __m512 g = _mm512_loadu_ps(gate + i);
        /* The bound first: min and max return their second operand for a NaN. */
        __m512 x = _mm512_min_ps(_mm512_set1_ps(EXP_MAX), _mm512_sub_ps(_mm512_setzero_ps(), g));
        x = _mm512_max_ps(_mm512_set1_ps(EXP_MIN), x);
        const __m512 e =
            _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(LOG2E)), 8); /* nearest even, quiet */
        __m512 r = _mm512_fnmadd_ps(e, _mm512_set1_ps(LN2_HIGH), x);
        r = _mm512_fnmadd_ps(e, _mm512_set1_ps(LN2_LOW), r);
        __m512 p = _mm512_set1_ps(exp_coefficients[0]);
        for (int c = 1; c < 7; c++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(exp_coefficients[c]));
        p = _mm512_scalef_ps(p, e);
        _mm512_storeu_ps(gate + i,
                         _mm512_mul_ps(_mm512_div_ps(g, _mm512_add_ps(one, p)), _mm512_loadu_ps(up + i)));
    }
}

__attribute__((target("avx2,fma"))) static void avx2_silu_mul(float *gate, const float *up, uint32_t n) {
    const __m256 one = _mm256_set1_ps(1.0f);
    for (uint32_t i = 0; i < n; i += 8) {
        const __m256 g = _mm256_loadu_ps(gate + i);
        __m256 x = _mm256_min_ps(_mm256_set1_ps(EXP_MAX), _mm256_sub_ps(_mm256_setzero_ps(), g));
        x = _mm256_max_ps(_mm256_set1_ps(EXP_MIN), x);
        const __m256 e = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(LOG2E)), 8);
        __m256 r = _mm256_fnmadd_ps(e, _mm256_set1_ps(LN2_HIGH), x);
        r = _mm256_fnmadd_ps(e, _mm256_set1_ps(LN2_LOW), r);
        __m256 p = _mm256_set1_ps(exp_coefficients[0]);
        for (int c = 1; c < 7; c++) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(exp_coefficients[c]));
        const __m256i bits =
            _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(e), _mm256_set1_epi32(127)), 23);
        p = _mm256_mul_ps(p, _mm256_castsi256_ps(bits));
        _mm256_storeu_ps(gate + i,
                         _mm256_mul_ps(_mm256_div_ps(g, _mm256_add_ps(one, p)), _mm256_loadu_ps(up + i)));
    }
}
#endif

void ops_silu_mul(weights_path path, float *gate, const float *up, uint32_t n) {
#if OPS_X86
    if (path == WEIGHTS_AVX512) {
        avx512_silu_mul(gate, up, n);
        return;
    }
    if (path == WEIGHTS_AVX2) {
        avx2_silu_mul(gate, up, n);
        return;
    }
#endif
    (void)path;
    scalar_silu_mul(gate, up, n);
}
