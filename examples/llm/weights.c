/* weights.c - see weights.h. The SIMD kernels are in weights_avx512.inc and weights_avx2.inc. */
#include "weights.h"
#include "error.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#define WEIGHTS_X86 1
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

#define INLINE static inline __attribute__((always_inline))
#define FLOAT_CHUNK 128 /* k per step in f32 mode: 16 rows of expanded weights stay in the L1 cache */

/* Where a kernel puts its results: t activation rows of n_rows (1 .. 16) outputs. */
typedef struct output {
    float *y;
    size_t stride;
    uint32_t n_rows;
    bool add;
} output;

/* One path's kernels. int8: a panel times the t rows of a tile. expand_*: packed weights to [k][16] floats.
 * multiply: n k of expanded weights times a tile of t rows. quantise: one row into blocks `step` apart. */
typedef struct kernels {
    void (*int8)(matrix_kind kind, const uint8_t *panel, const act_block *a, uint32_t t, uint32_t n_blocks,
                 const output *o);
    void (*expand_block)(matrix_kind kind, const uint8_t *p, float *out);
    void (*expand_f16)(const uint8_t *p, uint32_t n, float *out);
    void (*multiply)(const float *w, const float *x, uint32_t t, uint32_t n, const output *o);
    void (*quantise)(const float *x, uint32_t n_blocks, act_block *out, size_t step);
} kernels;

/* Bytes of a panel's block of 32 k without and with its scales. */
INLINE size_t weight_bytes(matrix_kind kind) { return kind == MATRIX_Q8 ? 512 : 256; }
INLINE size_t block_bytes(matrix_kind kind) { return weight_bytes(kind) + (kind == MATRIX_Q4_1 ? 64 : 32); }

/* What x is multiplied with before rounding. Blocks too small to scale become zero. */
INLINE float act_scale(float amax) { return amax > 1e-30f ? 127.0f / amax : 0.0f; }

/* A NaN or an infinity in the block must reach the outputs, so it becomes the scale. */
INLINE void act_block_finish(act_block *a, float amax, bool nan, int32_t sum) {
    const bool finite = !nan && amax <= FLT_MAX;
    if (!finite) sum = 0;
    a->d = finite ? amax / 127.0f : NAN;
    a->d_sum = a->d * (float)sum;
    a->neg8 = -8 * sum;
    a->neg128 = -128 * sum;
}

/* ---- half precision ---- */

static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff, bits;
    float f;
    if (exponent == 0) {
        f = (float)fraction * 0x1p-24f;
        return sign ? -f : f;
    }
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    memcpy(&f, &bits, 4);
    return f;
}

/* Round to nearest even; f is finite, not negative and below 65520. */
static uint16_t half_from_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (bits < 0x38800000u) return (uint16_t)lrintf(f * 0x1p24f); /* subnormal, or 2^-14 by rounding */
    bits += 0xfff + (bits >> 13 & 1);
    return (uint16_t)((bits - 0x38000000u) >> 13);
}

static uint16_t read_u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

static float read_half(const uint8_t *p) { return half_to_float(read_u16(p)); }

/* ---- scalar path ---- */

/* The block's weight of row r at k as an integer, without its offset. */
static int packed_weight(matrix_kind kind, const uint8_t *p, uint32_t r, uint32_t k) {
    if (kind == MATRIX_Q8) return p[64 * (k / 4) + 4 * r + k % 4] - 128;
    int byte = p[64 * (k / 8) + 4 * r + k % 4];
    return k % 8 < 4 ? byte & 15 : byte >> 4;
}

/* fmaf and not a * b + c: the SIMD paths fuse, and their bits are the same. */
static void scalar_int8(matrix_kind kind, const uint8_t *panel, const act_block *a, uint32_t t,
                        uint32_t n_blocks, const output *o) {
    float acc[ACTS_TILE][WEIGHTS_PANEL] = {{0}};
    for (uint32_t b = 0; b < n_blocks; b++, panel += block_bytes(kind), a += t) {
        const uint8_t *scales = panel + weight_bytes(kind);
        for (uint32_t r = 0; r < o->n_rows; r++) {
            int w[WEIGHTS_BLOCK];
            for (uint32_t k = 0; k < WEIGHTS_BLOCK; k++) w[k] = packed_weight(kind, panel, r, k);
            float d = read_half(scales + 2 * r);
            float m = kind == MATRIX_Q4_1 ? read_half(scales + 32 + 2 * r) : 0;
            for (uint32_t i = 0; i < t; i++) {
                int32_t s = kind == MATRIX_Q4_0 ? a[i].neg8 : 0;
                for (uint32_t k = 0; k < WEIGHTS_BLOCK; k++) s += w[k] * a[i].q[k];
                acc[i][r] = fmaf((float)s, d * a[i].d, acc[i][r]);
                if (kind == MATRIX_Q4_1) acc[i][r] = fmaf(m, a[i].d_sum, acc[i][r]);
            }
        }
    }
    for (uint32_t i = 0; i < t; i++) {
        float *y = o->y + i * o->stride;
        for (uint32_t r = 0; r < o->n_rows; r++) y[r] = o->add ? y[r] + acc[i][r] : acc[i][r];
    }
}

static void scalar_expand_block(matrix_kind kind, const uint8_t *p, float *out) {
    const uint8_t *scales = p + weight_bytes(kind);
    for (uint32_t r = 0; r < WEIGHTS_PANEL; r++) {
        float d = read_half(scales + 2 * r);
        float m = kind == MATRIX_Q4_1 ? read_half(scales + 32 + 2 * r) : 0;
        int zero = kind == MATRIX_Q4_0 ? 8 : 0;
        for (uint32_t k = 0; k < WEIGHTS_BLOCK; k++)
            out[16 * k + r] = (float)(packed_weight(kind, p, r, k) - zero) * d + m;
    }
}

static void scalar_expand_f16(const uint8_t *p, uint32_t n, float *out) {
    for (uint32_t i = 0; i < 16 * n; i++) out[i] = read_half(p + 2 * i);
}

static void scalar_multiply(const float *w, const float *x, uint32_t t, uint32_t n, const output *o) {
    for (uint32_t i = 0; i < t; i++) {
        float even[WEIGHTS_PANEL] = {0}, odd[WEIGHTS_PANEL] = {0};
        for (uint32_t k = 0; k < n; k += 2) {
            for (uint32_t r = 0; r < WEIGHTS_PANEL; r++) even[r] += w[16 * k + r] * x[k * t + i];
            for (uint32_t r = 0; r < WEIGHTS_PANEL; r++) odd[r] += w[16 * k + 16 + r] * x[(k + 1) * t + i];
        }
        float *y = o->y + i * o->stride;
        for (uint32_t r = 0; r < o->n_rows; r++) y[r] = o->add ? y[r] + (even[r] + odd[r]) : even[r] + odd[r];
    }
}

static void scalar_quantise(const float *x, uint32_t n_blocks, act_block *out, size_t step) {
    for (uint32_t b = 0; b < n_blocks; b++, x += WEIGHTS_BLOCK, out += step) {
        float amax = 0;
        bool nan = false;
        for (uint32_t k = 0; k < WEIGHTS_BLOCK; k++) {
            if (fabsf(x[k]) > amax) amax = fabsf(x[k]);
            nan |= x[k] != x[k];
        }
        const float inv = act_scale(amax);
        int32_t sum = 0;
        for (uint32_t k = 0; k < WEIGHTS_BLOCK; k++) {
            float q = x[k] * inv;
            out->q[k] = q == q ? (int8_t)lrintf(q) : 0;
            sum += out->q[k];
        }
        act_block_finish(out, amax, nan, sum);
    }
}

#if WEIGHTS_X86
#include "weights_avx512.inc"
#include "weights_avx2.inc"
#endif

/* ---- paths ---- */

bool weights_path_available(weights_path path) {
#if WEIGHTS_X86
    unsigned eax, ebx, ecx, edx;
    bool f16c =
        __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C); /* clang's builtin does not know it */
    bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (path == WEIGHTS_AVX2) return avx2;
    if (path == WEIGHTS_AVX512) {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    }
#endif
    return path == WEIGHTS_AUTO || path == WEIGHTS_SCALAR;
}

weights_path weights_path_resolve(weights_path path) {
    if (path != WEIGHTS_AUTO) return path;
    if (weights_path_available(WEIGHTS_AVX512)) return WEIGHTS_AVX512;
    return weights_path_available(WEIGHTS_AVX2) ? WEIGHTS_AVX2 : WEIGHTS_SCALAR;
}

const char *weights_path_name(weights_path path) {
    static const char *const names[] = {"auto", "scalar", "avx2", "avx512"};
    return (unsigned)path < 4 ? names[path] : "unknown";
}

static const kernels *path_kernels(weights_path path) {
    static const kernels scalar = {scalar_int8, scalar_expand_block, scalar_expand_f16, scalar_multiply,
                                   scalar_quantise};
#if WEIGHTS_X86
    static const kernels avx512 = {avx512_int8, avx512_expand_block, avx512_expand_f16, avx512_float,
                                   avx512_quantise};
    static const kernels avx2 = {avx2_int8, avx2_expand_block, avx2_expand_f16, avx2_float, avx2_quantise};
    if (path == WEIGHTS_AVX512) return &avx512;
    if (path == WEIGHTS_AVX2) return &avx2;
#endif
    (void)path;
    return &scalar;
}

/* ---- packing ---- */

void weights_decode_row(uint32_t gguf_type, const void *row, uint32_t n, float *out) {
    const uint8_t *p = (const uint8_t *)row;
    if (gguf_type == GGUF_F32) memcpy(out, row, (size_t)n * 4);
    if (gguf_type == GGUF_F16) {
        for (uint32_t i = 0; i < n; i++) out[i] = read_half(p + 2 * i);
    }
    for (uint32_t b = 0; b < n / WEIGHTS_BLOCK; b++, out += WEIGHTS_BLOCK) {
        if (gguf_type == GGUF_Q8_0) {
            float d = read_half(p);
            for (int i = 0; i < WEIGHTS_BLOCK; i++) out[i] = (float)(int8_t)p[2 + i] * d;
            p += 34;
        } else if (gguf_type == GGUF_Q4_0 || gguf_type == GGUF_Q4_1) {
            bool has_min = gguf_type == GGUF_Q4_1;
            float d = read_half(p), m = has_min ? read_half(p + 2) : -8 * d;
            p += has_min ? 4 : 2;
            for (int i = 0; i < 16; i++) {
                out[i] = (float)(p[i] & 15) * d + m;
                out[i + 16] = (float)(p[i] >> 4) * d + m;
            }
            p += 16;
        }
    }
}

static size_t gguf_row_bytes(uint32_t type, uint64_t n_cols) {
    size_t blocks = (size_t)n_cols / WEIGHTS_BLOCK;
    switch (type) {
    case GGUF_F32: return (size_t)n_cols * 4;
    case GGUF_F16: return (size_t)n_cols * 2;
    case GGUF_Q4_0: return blocks * 18;
    case GGUF_Q4_1: return blocks * 20;
    default: return blocks * 34;
    }
}

static size_t panel_bytes(matrix_kind kind, uint64_t n_cols) {
    if (kind == MATRIX_F32) return (size_t)n_cols * WEIGHTS_PANEL * 4;
    if (kind == MATRIX_F16) return (size_t)n_cols * WEIGHTS_PANEL * 2;
    return (size_t)n_cols / WEIGHTS_BLOCK * block_bytes(kind);
}

/* One Q4 block of row r: a nibble pair in the file is k and k + 16, in the panel k and k + 4. */
static void pack_q4(matrix_kind kind, const uint8_t *in, uint32_t r, uint8_t *block) {
    const uint8_t *nibbles = in + (kind == MATRIX_Q4_1 ? 4 : 2);
    memcpy(block + 256 + 2 * r, in, 2);
    if (kind == MATRIX_Q4_1) memcpy(block + 256 + 32 + 2 * r, in + 2, 2);
    for (int k = 0; k < WEIGHTS_BLOCK; k++) {
        int q = k < 16 ? nibbles[k] & 15 : nibbles[k - 16] >> 4;
        block[64 * (k / 8) + 4 * r + k % 4] |= (uint8_t)(k % 8 < 4 ? q : q << 4);
    }
}

static void pack_q8(const int8_t *q, uint16_t d, uint32_t r, uint8_t *block) {
    block[512 + 2 * r] = (uint8_t)d;
    block[512 + 2 * r + 1] = (uint8_t)(d >> 8);
    for (int k = 0; k < WEIGHTS_BLOCK; k++) block[64 * (k / 4) + 4 * r + k % 4] = (uint8_t)(q[k] + 128);
}

/* F32 or F16 weights in int8 mode: f16 scale absmax / 127, then q = round(w / scale), within +-127. What
 * f16 cannot hold, and NaN, becomes an infinite scale. */
static void quantise_weights(const float *w, int8_t q[WEIGHTS_BLOCK], uint16_t *scale) {
    float amax = 0;
    bool nan = false;
    for (int k = 0; k < WEIGHTS_BLOCK; k++) {
        amax = fmaxf(amax, fabsf(w[k]));
        nan |= w[k] != w[k];
    }
    *scale = !nan && amax / 127 < 65504 ? half_from_float(amax / 127) : 0x7c00;
    float d = half_to_float(*scale), inv = d > 0 ? 1 / d : 0;
    for (int k = 0; k < WEIGHTS_BLOCK; k++) q[k] = (int8_t)lrintf(fminf(fmaxf(w[k] * inv, -127), 127));
}

static void pack_row(const matrix *w, uint32_t type, const uint8_t *row, uint32_t r, uint8_t *panel) {
    uint32_t step = w->kind == MATRIX_F32 ? 4 : 2;
    if (w->kind == MATRIX_F32 || w->kind == MATRIX_F16) {
        for (size_t k = 0; k < w->n_cols; k++)
            memcpy(panel + (k * WEIGHTS_PANEL + r) * step, row + k * step, step);
        return;
    }
    size_t in_bytes = gguf_row_bytes(type, WEIGHTS_BLOCK);
    for (uint32_t b = 0; b < w->n_cols / WEIGHTS_BLOCK; b++, row += in_bytes, panel += block_bytes(w->kind)) {
        if (w->kind != MATRIX_Q8) {
            pack_q4(w->kind, row, r, panel);
        } else if (type == GGUF_Q8_0) {
            pack_q8((const int8_t *)row + 2, read_u16(row), r, panel);
        } else {
            float values[WEIGHTS_BLOCK] = {0};
            int8_t q[WEIGHTS_BLOCK];
            uint16_t d;
            weights_decode_row(type, row, WEIGHTS_BLOCK, values);
            quantise_weights(values, q, &d);
            pack_q8(q, d, r, panel);
        }
    }
}

typedef struct pack_run {
    const matrix *w;
    uint32_t type;
    const uint8_t *rows;
    size_t row_bytes;
} pack_run;

static void pack_panel(void *ctx, uint32_t i) {
    const pack_run *run = (const pack_run *)ctx;
    const matrix *w = run->w;
    uint8_t *panel = w->data + i * w->panel_bytes;
    const uint32_t first = i * WEIGHTS_PANEL;
    memset(panel, 0, w->panel_bytes);
    for (uint32_t r = 0; r < WEIGHTS_PANEL && first + r < w->n_rows; r++) {
        pack_row(w, run->type, run->rows + (first + r) * run->row_bytes, r, panel);
    }
}

bool matrix_pack(pool *p, matrix *w, uint32_t gguf_type, const void *data, uint64_t n_rows, uint64_t n_cols,
                 weights_mode mode, char *err, size_t err_len) {
    memset(w, 0, sizeof *w);
    switch (gguf_type) {
    case GGUF_Q4_0: w->kind = MATRIX_Q4_0; break;
    case GGUF_Q4_1: w->kind = MATRIX_Q4_1; break;
    case GGUF_Q8_0: w->kind = MATRIX_Q8; break;
    case GGUF_F16: w->kind = mode == WEIGHTS_F32 ? MATRIX_F16 : MATRIX_Q8; break;
    case GGUF_F32: w->kind = mode == WEIGHTS_F32 ? MATRIX_F32 : MATRIX_Q8; break;
    default: return llm_fail(err, err_len, "weight type %s is not supported", gguf_type_name(gguf_type));
    }
    if (n_rows == 0 || n_cols == 0 || n_rows > INT32_MAX || n_cols > INT32_MAX ||
        n_cols % WEIGHTS_BLOCK != 0) {
        return llm_fail(err, err_len, "%llu x %llu weights: the row length must be a multiple of %d",
                        (unsigned long long)n_rows, (unsigned long long)n_cols, WEIGHTS_BLOCK);
    }
    w->n_rows = (uint32_t)n_rows;
    w->n_cols = (uint32_t)n_cols;
    w->panel_bytes = panel_bytes(w->kind, n_cols);
    size_t n_panels = ((size_t)n_rows + WEIGHTS_PANEL - 1) / WEIGHTS_PANEL;
    if (n_panels > (SIZE_MAX - 64) / w->panel_bytes) return llm_fail(err, err_len, "weights too large");
    size_t bytes = (n_panels * w->panel_bytes + 63) / 64 * 64;
    w->data = (uint8_t *)aligned_alloc(64, bytes);
    if (!w->data) return llm_fail(err, err_len, "no memory for %zu bytes of weights", bytes);
    pack_run run = {w, gguf_type, (const uint8_t *)data, gguf_row_bytes(gguf_type, n_cols)};
    pool_run(p, (uint32_t)n_panels, pack_panel, &run);
    return true;
}

void matrix_free(matrix *w) {
    free(w->data);
    memset(w, 0, sizeof *w);
}

size_t matrix_bytes(const matrix *w) {
    return ((size_t)w->n_rows + WEIGHTS_PANEL - 1) / WEIGHTS_PANEL * w->panel_bytes;
}

/* ---- activations ---- */

bool acts_create(acts *a, weights_mode mode, weights_path path, uint32_t max_rows, uint32_t max_cols) {
    memset(a, 0, sizeof *a);
    a->mode = mode;
    a->path = weights_path_resolve(path);
    a->max_rows = max_rows;
    a->max_cols = max_cols;
    size_t per_row =
        mode == WEIGHTS_INT8 ? max_cols / WEIGHTS_BLOCK * sizeof(act_block) : (size_t)max_cols * 4;
    if (max_cols % WEIGHTS_BLOCK != 0 || per_row == 0 || max_rows == 0) return false;
    if (!weights_path_available(a->path) || max_rows > (SIZE_MAX - 64) / per_row) return false;
    a->data = aligned_alloc(64, (max_rows * per_row + 63) / 64 * 64);
    return a->data != NULL;
}

void acts_free(acts *a) {
    free(a->data);
    memset(a, 0, sizeof *a);
}

void acts_begin(acts *a, uint32_t n_rows, uint32_t n_cols) {
    a->n_rows = n_rows;
    a->n_cols = n_cols;
}

/* The tile that starts at this row, and how many rows it has. */
static uint32_t tile_rows(const acts *a, uint32_t first) {
    return a->n_rows - first < ACTS_TILE ? a->n_rows - first : ACTS_TILE;
}

void acts_store(acts *a, uint32_t row, const float *x) {
    uint32_t first = row / ACTS_TILE * ACTS_TILE, t = tile_rows(a, first),
             n_blocks = a->n_cols / WEIGHTS_BLOCK;
    if (a->mode == WEIGHTS_INT8) {
        act_block *out = (act_block *)a->data + (size_t)first * n_blocks + (row - first);
        path_kernels(a->path)->quantise(x, n_blocks, out, t);
        return;
    }
    float *out = (float *)a->data + (size_t)first * a->n_cols + (row - first);
    for (uint32_t k = 0; k < a->n_cols; k++) out[(size_t)k * t] = x[k];
}

/* ---- products ---- */

static void panel_int8(const kernels *k, const matrix *w, const uint8_t *panel, const acts *a, output o) {
    uint32_t n_blocks = a->n_cols / WEIGHTS_BLOCK;
    const act_block *tile = (const act_block *)a->data;
    for (uint32_t row = 0; row < a->n_rows; row += ACTS_TILE) {
        uint32_t t = tile_rows(a, row);
        k->int8(w->kind, panel, tile, t, n_blocks, &o);
        tile += (size_t)t * n_blocks;
        o.y += t * o.stride;
    }
}

/* n k of a panel from k0 on as [n][16] floats. */
static const float *expand(const kernels *k, const matrix *w, const uint8_t *panel, uint32_t k0, uint32_t n,
                           float *out) {
    if (w->kind == MATRIX_F32) return (const float *)panel + (size_t)k0 * WEIGHTS_PANEL;
    if (w->kind == MATRIX_F16) {
        k->expand_f16(panel + (size_t)k0 * WEIGHTS_PANEL * 2, n, out);
        return out;
    }
    panel += k0 / WEIGHTS_BLOCK * block_bytes(w->kind);
    for (uint32_t i = 0; i < n; i += WEIGHTS_BLOCK, panel += block_bytes(w->kind)) {
        k->expand_block(w->kind, panel, out + (size_t)i * WEIGHTS_PANEL);
    }
    return out;
}

/* Chunk after chunk of k, each summed on its own and then added to y: the order is the same for any batch. */
static void panel_float(const kernels *k, const matrix *w, const uint8_t *panel, const acts *a, output o) {
    _Alignas(64) float buffer[FLOAT_CHUNK * WEIGHTS_PANEL];
    for (uint32_t k0 = 0; k0 < a->n_cols; k0 += FLOAT_CHUNK) {
        uint32_t n = a->n_cols - k0 < FLOAT_CHUNK ? a->n_cols - k0 : FLOAT_CHUNK;
        const float *values = expand(k, w, panel, k0, n, buffer);
        output part = o;
        part.add = o.add || k0 > 0;
        for (uint32_t row = 0; row < a->n_rows; row += ACTS_TILE) {
            uint32_t t = tile_rows(a, row);
            const float *x = (const float *)a->data + (size_t)row * a->n_cols + (size_t)k0 * t;
            k->multiply(values, x, t, n, &part);
            part.y += t * part.stride;
        }
    }
}

typedef struct matmul_run {
    const acts *a;
    const matmul_job *jobs;
    uint32_t n_jobs, n_panels, n_tasks;
    uint32_t first_panel[MATMUL_MAX_JOBS + 1];
} matmul_run;

static void matmul_task(void *ctx, uint32_t task) {
    const matmul_run *run = (const matmul_run *)ctx;
    const kernels *k = path_kernels(run->a->path);
    uint32_t begin = (uint32_t)((uint64_t)run->n_panels * task / run->n_tasks);
    uint32_t end = (uint32_t)((uint64_t)run->n_panels * (task + 1) / run->n_tasks);
    for (uint32_t p = begin, j = 0; p < end; p++) {
        while (p >= run->first_panel[j + 1]) j++;
        const matmul_job *job = &run->jobs[j];
        uint32_t local = p - run->first_panel[j], row = local * WEIGHTS_PANEL, left = job->w->n_rows - row;
        const uint8_t *panel = job->w->data + local * job->w->panel_bytes;
        output o = {job->y + row, job->stride, left < WEIGHTS_PANEL ? left : WEIGHTS_PANEL, job->add};
        if (run->a->mode == WEIGHTS_INT8)
            panel_int8(k, job->w, panel, run->a, o);
        else
            panel_float(k, job->w, panel, run->a, o);
    }
}

void matmul(pool *p, const acts *a, const matmul_job *jobs, uint32_t n_jobs) {
    matmul_run run = {a, jobs, n_jobs, 0, 0, {0}};
    for (uint32_t j = 0; j < n_jobs; j++) {
        run.first_panel[j] = run.n_panels;
        run.n_panels += (jobs[j].w->n_rows + WEIGHTS_PANEL - 1) / WEIGHTS_PANEL;
        run.first_panel[j + 1] = run.n_panels;
    }
    /* Several tasks per thread, since threads are never equally fast; more where a task is long. */
    run.n_tasks = pool_threads(p) * (a->n_rows > ACTS_TILE ? 16 : 4);
    if (run.n_tasks > run.n_panels) run.n_tasks = run.n_panels;
    pool_run(p, run.n_tasks, matmul_task, &run);
}
