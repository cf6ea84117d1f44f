/* Attention in double precision, as a test oracle: rows are rounded and sealed by this file's own reading of the
   format specification (never by the library's encoders), and each query sees what its position alone decides:
   its own block and the sink blocks exact, every other block as sealed. */
#ifndef KVL_TESTS_ATTN_REF_H
#define KVL_TESTS_ATTN_REF_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../../kvlite.h"

/* ---- number formats ---- */

/* x on the grid of a binary float of `digits` significand bits and least normal exponent emin, ties to even. */
static double ref_on_grid(double x, int digits, int emin) {
    int e;
    double ulp;
    if (x == 0 || !isfinite(x)) return x;
    e = ilogb(x);
    if (e < emin) e = emin;
    ulp = ldexp(1, e - digits + 1);
    return nearbyint(x / ulp) * ulp;
}

static double ref_clamp(double x, double limit) { return x > limit ? limit : x < -limit ? -limit : x; }
static double ref_f16(double x) {
    double r = ref_on_grid(x, 11, -14);
    return fabs(r) > 65504 ? copysign(INFINITY, x) : r;
}
static double ref_bf16(double x) { return (double)(float)ref_on_grid(x, 8, -126); }
static double ref_e4m3(double x) { return ref_clamp(ref_on_grid(x, 4, -6), 448); }
static double ref_e2m1(double x) { return ref_clamp(ref_on_grid(x, 2, 0), 6); }

static double ref_round(kvl_format f, double x) {
    return f == KVL_F16 ? ref_f16(x) : f == KVL_BF16 ? ref_bf16(x) : (double)(float)x;
}

static uint16_t ref_f16_bits(double x) {
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    double a = fabs(ref_f16(x));
    int e;
    if (isnan(x)) return 0x7e00;
    if (isinf(a)) return (uint16_t)(sign | 0x7c00);
    if (a < ldexp(1, -14)) return (uint16_t)(sign | (uint16_t)ldexp(a, 24));
    e = ilogb(a);
    return (uint16_t)(sign | ((unsigned)(e + 15) << 10) | (unsigned)((ldexp(a, -e) - 1) * 1024));
}
static double ref_f16_value(uint16_t h) {
    unsigned e = (h >> 10) & 31, m = h & 1023;
    double a = e == 31 ? (m ? NAN : INFINITY) : e ? ldexp(1024 + m, (int)e - 25) : ldexp(m, -24);
    return h & 0x8000 ? -a : a;
}
static uint16_t ref_bf16_bits(double x) {
    float f = (float)ref_bf16(x);
    uint32_t u;
    memcpy(&u, &f, 4);
    return isnan(x) ? 0x7fc0 : (uint16_t)(u >> 16);
}
static double ref_bf16_value(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* ---- sealing: what one tile's rows decode to ---- */
typedef struct ref_side {
    kvl_format format;
    bool rotated;
    float global; /* NVFP4 */
} ref_side;

static ref_side ref_side_make(kvl_format f, float global) {
    ref_side s = {f & 0xff, (f & KVL_ROTATED) != 0, global != 0 ? global : 1.0f / 16};
    return s;
}

static uint32_t ref_hadamard_size(uint32_t dim) {
    uint32_t n = 1;
    while (n < 128 && dim % (2 * n) == 0) n *= 2;
    return n;
}

/* The encoder's rotation: single precision, butterflies at strides 1, 2, 4 …, then one multiply. */
static void ref_rotate_f32(float *x, uint32_t dim) {
    uint32_t n = ref_hadamard_size(dim), stride, i;
    float norm = (float)(1 / sqrt((double)n));
    for (stride = 1; stride < n; stride *= 2) {
        for (i = 0; i < dim; i++) {
            if (!(i & stride)) {
                float a = x[i], b = x[i + stride];
                x[i] = a + b;
                x[i + stride] = a - b;
            }
        }
    }
    for (i = 0; i < dim; i++) x[i] *= norm;
}

/* The same matrix, which is its own inverse, in double precision. */
static void ref_rotate_f64(double *x, uint32_t dim) {
    uint32_t n = ref_hadamard_size(dim), stride, i;
    for (stride = 1; stride < n; stride *= 2) {
        for (i = 0; i < dim; i++) {
            if (!(i & stride)) {
                double a = x[i], b = x[i + stride];
                x[i] = a + b;
                x[i + stride] = a - b;
            }
        }
    }
    for (i = 0; i < dim; i++) x[i] /= sqrt((double)n);
}

static float ref_scale_f16(float s) {
    float r = (float)ref_f16(s);
    return r == 0 ? 1 : r;
}

/* The encoders below divide in double precision where the specification compares with midpoints: a quotient of a
   24-bit and an 11-bit number is never rounded onto a midpoint, so the nearest code is the same. */
static void ref_seal_symmetric(kvl_format f, const float *x, uint32_t n, double *out) {
    float amax = 0, s;
    uint32_t i;
    for (i = 0; i < n; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
    s = ref_scale_f16(amax * (f == KVL_INT8 ? 1 / 127.0f : 1 / 448.0f));
    for (i = 0; i < n; i++) {
        double c = (double)x[i] / s;
        out[i] = s * (f == KVL_INT8 ? ref_clamp(nearbyint(c), 127) : ref_e4m3(c));
    }
}

/* n numbers `step` apart that share a scale and a zero; codes 0..levels. */
static void ref_seal_min_max(float levels, const float *x, uint32_t n, uint32_t step, double *out) {
    float lo = x[0], hi = x[0], z, s;
    uint32_t i;
    for (i = 1; i < n; i++) {
        if (x[i * step] < lo) lo = x[i * step];
        if (x[i * step] > hi) hi = x[i * step];
    }
    z = (float)ref_f16(lo);
    s = ref_scale_f16((hi - lo) * (1 / levels));
    for (i = 0; i < n; i++) {
        float above = x[i * step] - z;
        double c = nearbyint((double)above / s);
        out[i * step] = (c < 0 ? 0 : c > levels ? levels : c) * (double)s + z;
    }
}

static void ref_seal_nvfp4(float global, const float *x, double *out) {
    float amax = 0, best = 0;
    int peak;
    uint32_t i;
    for (i = 0; i < 16; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
    for (peak = 6; peak >= 4; peak -= 2) {
        float s = (float)ref_e4m3(amax * (1 / (float)peak) * (1 / global)), error = 0;
        double y[16];
        s = (s == 0 ? 1 / 512.0f : s) * global;
        for (i = 0; i < 16; i++) {
            float d, d2; /* squares through double and back: no contraction to a fused multiply-add */
            y[i] = ref_e2m1((double)x[i] / s) * s;
            d = x[i] - (float)y[i];
            d2 = (float)((double)d * d);
            error += d2;
        }
        if (peak == 6 || error < best) {
            best = error;
            memcpy(out, y, sizeof y);
        }
    }
}

/* rows [tokens][dim], already rounded to the exact format -> what the sealed tile stands for, rotation undone. */
static void ref_seal_tile(const ref_side *side, uint32_t tokens, uint32_t dim, const float *rows,
                          double *out) {
    float *x = (float *)malloc(sizeof(float) * tokens * dim);
    uint32_t t, e;
    memcpy(x, rows, sizeof(float) * tokens * dim);
    if (side->format == KVL_INT8_CHANNEL || side->format == KVL_INT4_CHANNEL) {
        float levels = side->format == KVL_INT8_CHANNEL ? 255.0f : 15.0f;
        for (e = 0; e < dim; e++) ref_seal_min_max(levels, x + e, tokens, dim, out + e);
    }
    for (t = 0; t < tokens; t++) {
        float *r = x + (size_t)t * dim;
        double *o = out + (size_t)t * dim;
        if (side->rotated) ref_rotate_f32(r, dim);
        switch (side->format) {
        case KVL_INT8:
        case KVL_FP8_E4M3: ref_seal_symmetric(side->format, r, dim, o); break;
        case KVL_NVFP4:
            for (e = 0; e < dim; e += 16) ref_seal_nvfp4(side->global, r + e, o + e);
            break;
        case KVL_INT4:
            for (e = 0; e < dim; e += 64) ref_seal_min_max(15, r + e, dim - e < 64 ? dim - e : 64, 1, o + e);
            break;
        case KVL_INT8_CHANNEL:
        case KVL_INT4_CHANNEL: break;
        default:
            for (e = 0; e < dim; e++) o[e] = ref_round(side->format, r[e]);
        }
        if (side->rotated) ref_rotate_f64(o, dim);
    }
    free(x);
}

/* ---- geometry ---- */
enum { REF_MAX_LAYERS = 8 };

typedef struct ref_layer {
    ref_side k, v;
    uint32_t window, sink_tokens;
    const float *sink_logits;
    double softcap, scale;
} ref_layer;

typedef struct ref_geometry {
    uint32_t n_layers, n_q_heads, n_kv_heads, k_dim, v_dim, block_tokens, sink_blocks;
    kvl_format exact;
    ref_layer layers[REF_MAX_LAYERS];
} ref_geometry;

typedef struct ref_preset {
    const char *name;
    kvl_format k, v, exact;
} ref_preset;
static const ref_preset ref_presets[] = {
    {"f32", KVL_F32, KVL_F32, KVL_F32},
    {"f16", KVL_F16, KVL_F16, KVL_F16},
    {"bf16", KVL_BF16, KVL_BF16, KVL_BF16},
    {"int8", KVL_INT8, KVL_INT8, KVL_F16},
    {"int8+", KVL_INT8_CHANNEL, KVL_INT8, KVL_F16},
    {"fp8", KVL_FP8_E4M3, KVL_FP8_E4M3, KVL_F16},
    {"nvfp4", KVL_NVFP4 | KVL_ROTATED, KVL_NVFP4, KVL_F16},
    {"balanced", KVL_INT8, KVL_INT4 | KVL_ROTATED, KVL_F16},
    {"int4", KVL_INT4_CHANNEL, KVL_INT4 | KVL_ROTATED, KVL_F16},
};
enum { REF_PRESETS = sizeof ref_presets / sizeof ref_presets[0] };

/* The geometry with its zeros resolved. sink_logits point into g. */
static ref_geometry ref_geometry_make(const kvl_geometry *g) {
    ref_geometry r = {0};
    const ref_preset *p = &ref_presets[3];
    uint32_t i, l;
    for (i = 0; g->preset && i < REF_PRESETS; i++) {
        if (!strcmp(ref_presets[i].name, g->preset)) p = &ref_presets[i];
    }
    r.n_layers = g->n_layers;
    r.n_q_heads = g->n_q_heads;
    r.n_kv_heads = g->n_kv_heads ? g->n_kv_heads : g->n_q_heads;
    r.k_dim = g->k_dim;
    r.v_dim = g->v_dim ? g->v_dim : g->k_dim;
    r.block_tokens = g->block_tokens ? g->block_tokens : 32;
    r.sink_blocks = g->sink_blocks == KVL_NONE ? 0 : g->sink_blocks ? g->sink_blocks : 1;
    r.exact = g->exact_format ? g->exact_format : p->exact;
    for (l = 0; l < g->n_layers; l++) {
        static const kvl_layer plain;
        const kvl_layer *in = g->layers ? &g->layers[l] : &plain;
        ref_layer *out = &r.layers[l];
        kvl_format k = in->k_format ? in->k_format : g->k_format ? g->k_format : p->k;
        kvl_format v = in->v_format ? in->v_format : g->v_format ? g->v_format : p->v;
        out->k = ref_side_make(k, in->k_global);
        out->v = ref_side_make(v, in->v_global);
        out->window = in->window;
        out->sink_tokens = in->sink_tokens;
        out->sink_logits = in->sink_logits;
        out->softcap = in->softcap;
        out->scale = in->scale != 0 ? in->scale : g->scale != 0 ? g->scale : 1 / sqrt((double)g->k_dim);
    }
    return r;
}

/* ---- one layer of one sequence ---- */
typedef struct ref_kv {
    uint32_t n, capacity;
    float *k, *v;                /* [n][heads][dim] rounded to the exact format */
    double *k_sealed, *v_sealed; /* the same rows as their block decodes, where the block is full */
} ref_kv;

static void ref_kv_init(ref_kv *kv, const ref_geometry *g, uint32_t capacity) {
    size_t rows = (size_t)capacity * g->n_kv_heads;
    kv->n = 0;
    kv->capacity = capacity;
    kv->k = (float *)malloc(rows * g->k_dim * sizeof(float));
    kv->v = (float *)malloc(rows * g->v_dim * sizeof(float));
    kv->k_sealed = (double *)malloc(rows * g->k_dim * sizeof(double));
    kv->v_sealed = (double *)malloc(rows * g->v_dim * sizeof(double));
}

static void ref_kv_free(ref_kv *kv) {
    free(kv->k);
    free(kv->v);
    free(kv->k_sealed);
    free(kv->v_sealed);
    memset(kv, 0, sizeof *kv);
}

static void ref_seal_block(const ref_side *side, uint32_t first, uint32_t tokens, uint32_t heads,
                           uint32_t dim, const float *rows, double *sealed) {
    float *tile = (float *)malloc(sizeof(float) * tokens * dim);
    double *out = (double *)malloc(sizeof(double) * tokens * dim);
    uint32_t h, t;
    for (h = 0; h < heads; h++) {
        for (t = 0; t < tokens; t++) {
            memcpy(tile + (size_t)t * dim, rows + ((size_t)(first + t) * heads + h) * dim,
                   sizeof(float) * dim);
        }
        ref_seal_tile(side, tokens, dim, tile, out);
        for (t = 0; t < tokens; t++) {
            memcpy(sealed + ((size_t)(first + t) * heads + h) * dim, out + (size_t)t * dim,
                   sizeof(double) * dim);
        }
    }
    free(tile);
    free(out);
}

/* Appends one row, k [heads][k_dim] and v [heads][v_dim]. */
static void ref_kv_append(ref_kv *kv, const ref_geometry *g, uint32_t layer, const float *k, const float *v) {
    size_t kn = (size_t)g->n_kv_heads * g->k_dim, vn = (size_t)g->n_kv_heads * g->v_dim, i;
    for (i = 0; i < kn; i++) kv->k[kv->n * kn + i] = (float)ref_round(g->exact, k[i]);
    for (i = 0; i < vn; i++) kv->v[kv->n * vn + i] = (float)ref_round(g->exact, v[i]);
    kv->n++;
    if (kv->n % g->block_tokens == 0) {
        uint32_t first = kv->n - g->block_tokens;
        const ref_layer *l = &g->layers[layer];
        if (first / g->block_tokens < g->sink_blocks) return;
        ref_seal_block(&l->k, first, g->block_tokens, g->n_kv_heads, g->k_dim, kv->k, kv->k_sealed);
        ref_seal_block(&l->v, first, g->block_tokens, g->n_kv_heads, g->v_dim, kv->v, kv->v_sealed);
    }
}

static bool ref_visible(const ref_layer *l, uint32_t query, uint32_t key) {
    return key <= query && (l->window == 0 || query - key < l->window || key < l->sink_tokens);
}

/* How large the numbers are that a computation rounds: the largest sum of p|v|, the largest |q||k| as a logit. */
typedef struct ref_sizes {
    double widest, logit, softcap;
} ref_sizes;

/* How far a correct computation may be off. `single` is a small multiple of single precision's rounding: sums and
   exponentials lose some of it, a score as much as |q||k| is large, and a softcap is as exact as its size. `tensor` is
   the rounding of what tensor cores take, 2^-11 for f16 and 2^-8 for bf16, 0 where there are none: p and v are rounded
   once each, and once more where v is made from codes; q and k move a score by |q||k| times it. */
static double ref_allowed(const ref_sizes *s, double single, double tensor) {
    return s->widest * (single * (16 + s->logit + s->softcap) + tensor * (3 + s->logit));
}

/* What one query head at position pos gives. */
static ref_sizes ref_attend(const ref_geometry *g, uint32_t layer, const ref_kv *kv, uint32_t pos,
                            uint32_t q_head, const float *q, double *out) {
    const ref_layer *l = &g->layers[layer];
    uint32_t head = q_head / (g->n_q_heads / g->n_kv_heads), heads = g->n_kv_heads, j, e, T = g->block_tokens;
    uint32_t kd = g->k_dim, vd = g->v_dim;
    double *p = (double *)malloc(sizeof(double) * (pos + 1)), *mass = (double *)calloc(vd, sizeof(double));
    double top = l->sink_logits ? l->sink_logits[q_head] : -INFINITY, sum, q2 = 0, k2max = 0, widest = 0;
    for (e = 0; e < kd; e++) q2 += (double)q[e] * q[e];
    for (j = 0; j <= pos; j++) {
        bool exact = j / T == pos / T || j / T < g->sink_blocks;
        size_t row = ((size_t)j * heads + head) * kd;
        double dot[4] = {0, 0, 0, 0}, k2 = 0;
        if (!ref_visible(l, pos, j)) continue;
        for (e = 0; e < kd; e++) {
            double k = exact ? kv->k[row + e] : kv->k_sealed[row + e];
            dot[e & 3] += q[e] * k;
            k2 += k * k;
        }
        if (k2 > k2max) k2max = k2;
        p[j] = (dot[0] + dot[1] + dot[2] + dot[3]) * l->scale;
        if (l->softcap > 0) p[j] = l->softcap * tanh(p[j] / l->softcap);
        if (p[j] > top) top = p[j];
    }
    sum = l->sink_logits ? exp(l->sink_logits[q_head] - top) : 0;
    memset(out, 0, sizeof(double) * vd);
    for (j = 0; j <= pos; j++) {
        bool exact = j / T == pos / T || j / T < g->sink_blocks;
        size_t row = ((size_t)j * heads + head) * vd;
        double w;
        if (!ref_visible(l, pos, j)) continue;
        w = exp(p[j] - top);
        sum += w;
        for (e = 0; e < vd; e++) {
            double v = exact ? kv->v[row + e] : kv->v_sealed[row + e];
            out[e] += w * v;
            mass[e] += w * fabs(v);
        }
    }
    for (e = 0; e < vd; e++) {
        out[e] /= sum;
        if (mass[e] / sum > widest) widest = mass[e] / sum;
    }
    free(p);
    free(mass);
    return (ref_sizes){widest, l->scale * sqrt(q2 * k2max), l->softcap};
}

#endif
