/* What every backend must compute, as one table-driven suite: a covering selection of geometries, formats, tensor
   types and batch mixes (each value of each dimension meets each value of every other at least once), run through
   the public API and compared with a double-precision reference. A backend's test program gives it conf_backend
   entries and CONF_TESTS. */
#ifndef KVL_TESTS_CONFORMANCE_H
#define KVL_TESTS_CONFORMANCE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#include <cmocka.h>

#include "../common/attn_ref.h"

typedef struct conf_backend {
    const char *name;
    kvl_backend_kind kind;
    kvl_simd simd;
    uint32_t n_threads;
    bool presets_only; /* the presets' format pairs instead of every pair */
    bool full;         /* the cross product of formats and shapes too: hours */
    double tolerance;  /* `single` of ref_allowed; 0 = 1e-6 */

    /* For a GPU. It takes k_dim == v_dim of some sizes and blocks of 16 tokens or more, and formats of layers that are
       exact in the same format. */
    bool gpu;
    bool
        spoils_step; /* a number that is not finite spoils all rows of its sequence in that step: 0 * NaN in an MMA */
    double f16_rounding, bf16_rounding; /* `tensor` of ref_allowed where the exact format is that */
    uint32_t first, every;              /* only some of the table's cases; 0 = all */
    double work; /* of a case, in pairs of numbers; 0 = 6e7. Long contexts shrink with it */
    void (*describe)(kvl_cache_desc *desc);
    kvl_result (*attend)(kvl_cache *cache, const kvl_step *step, uint32_t layer, kvl_tensor *qkvo[4],
                         const size_t bytes[4]);             /* instead of kvl_attend; bytes from .data on */
    void (*download)(void *to, uint64_t from, size_t bytes); /* what stands in the backend's memory */
} conf_backend;

/* Under a sanitizer every fourth case of the table: its time is the tests' limit. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { CONF_EVERY = 4 };
#else
enum { CONF_EVERY = 1 };
#endif

/* ---- the table ---- */
enum {
    F_K,
    F_V,
    F_K_DIM,
    F_V_DIM,
    F_GQA,
    F_KV_HEADS,
    F_WINDOW,
    F_SINK_TOKENS,
    F_SOFTCAP,
    F_SINK_LOGITS,
    F_BLOCK,
    F_EXACT,
    F_SINK_BLOCKS,
    F_SEGMENT,
    F_LAYERS,
    F_DTYPE,
    F_STRIDED,
    F_MIX,
    F_NAN,
    F_COUNT
};
enum { CONF_T = 0xfffe };                              /* stands for block_tokens below */
enum { MIX_FRESH, MIX_DECODE, MIX_CHUNKS, MIX_BATCH }; /* how the rows of sequences fall into steps */
enum { LAYERS_ONE, LAYERS_TWO, LAYERS_WINDOWS, LAYERS_FORMATS };

static const uint32_t conf_k[] = {KVL_F32,
                                  KVL_F16,
                                  KVL_BF16,
                                  KVL_INT8,
                                  KVL_INT8 | KVL_ROTATED,
                                  KVL_INT8_CHANNEL,
                                  KVL_FP8_E4M3,
                                  KVL_FP8_E4M3 | KVL_ROTATED,
                                  KVL_NVFP4,
                                  KVL_NVFP4 | KVL_ROTATED,
                                  KVL_INT4,
                                  KVL_INT4 | KVL_ROTATED,
                                  KVL_INT4_CHANNEL};
static const uint32_t conf_v[] = {KVL_F32,
                                  KVL_F16,
                                  KVL_BF16,
                                  KVL_INT8,
                                  KVL_INT8 | KVL_ROTATED,
                                  KVL_FP8_E4M3,
                                  KVL_FP8_E4M3 | KVL_ROTATED,
                                  KVL_NVFP4,
                                  KVL_NVFP4 | KVL_ROTATED,
                                  KVL_INT4,
                                  KVL_INT4 | KVL_ROTATED};
static const uint32_t conf_dim[] = {16, 64, 80, 96, 112, 128, 192, 256};
static const uint32_t conf_gqa[] = {1, 2, 3, 4, 7, 8, 16};
static const uint32_t conf_heads[] = {1, 2, 3};
static const uint32_t conf_window[] = {0, 1, 5, CONF_T, 100, 5000};
static const uint32_t conf_sink_tokens[] = {0, 1, 3, CONF_T, 70};
static const uint32_t conf_softcap[] = {0, 2, 30};
static const uint32_t conf_flag[] = {0, 1};
static const uint32_t conf_block[] = {8, 16, 32, 64};
static const uint32_t conf_exact[] = {KVL_F16, KVL_BF16, KVL_F32};
static const uint32_t conf_sink_blocks[] = {0, 2, 3, KVL_NONE};
static const uint32_t conf_segment[] = {64, 128, 0};
static const uint32_t conf_layers[] = {LAYERS_ONE, LAYERS_TWO, LAYERS_WINDOWS, LAYERS_FORMATS};
static const uint32_t conf_dtype[] = {0, 1, 2, 3}; /* F32, F16, BF16, and 3: q, k, v and out all different */
static const uint32_t conf_mix[] = {MIX_FRESH, MIX_DECODE, MIX_CHUNKS, MIX_BATCH};

typedef struct conf_factor {
    const char *name;
    const uint32_t *values;
    uint32_t n;
} conf_factor;
#define CONF_FACTOR(name, values) \
    { name, values, sizeof(values) / sizeof((values)[0]) }
static const conf_factor conf_factors[F_COUNT] = {
    CONF_FACTOR("k", conf_k),
    CONF_FACTOR("v", conf_v),
    CONF_FACTOR("k_dim", conf_dim),
    CONF_FACTOR("v_dim", conf_dim),
    CONF_FACTOR("gqa", conf_gqa),
    CONF_FACTOR("kv_heads", conf_heads),
    CONF_FACTOR("window", conf_window),
    CONF_FACTOR("sink_tokens", conf_sink_tokens),
    CONF_FACTOR("softcap", conf_softcap),
    CONF_FACTOR("sink_logits", conf_flag),
    CONF_FACTOR("block", conf_block),
    CONF_FACTOR("exact", conf_exact),
    CONF_FACTOR("sink_blocks", conf_sink_blocks),
    CONF_FACTOR("segment", conf_segment),
    CONF_FACTOR("layers", conf_layers),
    CONF_FACTOR("dtype", conf_dtype),
    CONF_FACTOR("strided", conf_flag),
    CONF_FACTOR("mix", conf_mix),
    CONF_FACTOR("nan", conf_flag),
};
enum { CONF_MAX_LEVELS = 16, CONF_MAX_CASES = 1024 };

typedef struct conf_case {
    uint8_t level[F_COUNT];
    const char *preset; /* names the formats; null = level[F_K], level[F_V], level[F_EXACT] */
    uint64_t seed;
    uint32_t long_tokens; /* one long sequence of so many tokens; 0 = by the mix */
} conf_case;

static uint32_t conf_value(const conf_case *c, int factor) {
    uint32_t v = conf_factors[factor].values[c->level[factor]];
    return v == CONF_T ? conf_block[c->level[F_BLOCK]] : v;
}

static uint64_t conf_mix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
static uint32_t conf_min(uint32_t a, uint32_t b) { return a < b ? a : b; }
static uint32_t conf_random(uint64_t *state, uint32_t n) {
    return (uint32_t)(conf_mix64((*state)++) >> 33) % n;
}

static void conf_describe(const conf_case *c, char *text, size_t size) {
    size_t used = 0;
    int f;
    used += (size_t)snprintf(text, size, "preset=%s", c->preset ? c->preset : "-");
    for (f = 0; f < F_COUNT && used < size; f++) {
        if (f == F_K || f == F_V || f == F_EXACT) {
            used += (size_t)snprintf(text + used, size - used, " %s=%s", conf_factors[f].name,
                                     kvl_format_name(conf_value(c, f)));
        } else {
            used += (size_t)snprintf(text + used, size - used, " %s=%d", conf_factors[f].name,
                                     (int)conf_value(c, f));
        }
    }
}

static bool conf_is_channel(uint32_t format) {
    return format == KVL_INT8_CHANNEL || format == KVL_INT4_CHANNEL;
}

static bool conf_gpu_takes(int f, uint32_t value) {
    if (f == F_BLOCK) return value >= 16;
    return (f != F_K_DIM && f != F_V_DIM) || (value != 16 && value != 112);
}

static const char *conf_preset_of(uint32_t k, uint32_t v) {
    uint32_t i;
    for (i = 0; i < REF_PRESETS; i++) {
        if (ref_presets[i].k == k && ref_presets[i].v == v) return ref_presets[i].name;
    }
    return NULL;
}

/* Do these two values exist together? */
static bool conf_pair_possible(const conf_backend *b, int f, uint32_t i, int g, uint32_t j) {
    uint32_t x = conf_factors[f].values[i], y = conf_factors[g].values[j], p;
    bool k_is_preset = false, v_is_preset = false;
    if (f > g) return conf_pair_possible(b, g, j, f, i);
    if (f == F_K && g == F_BLOCK && conf_is_channel(x) && y < 32) return false;
    if (f == F_WINDOW && g == F_SINK_TOKENS && x == 0 && y != 0) return false;
    if (b->gpu && (!conf_gpu_takes(f, x) || !conf_gpu_takes(g, y))) return false;
    if (b->gpu && f == F_K_DIM && g == F_V_DIM && x != y) return false;
    if (!b->presets_only) return true;
    if ((f == F_EXACT && i != 0) || (g == F_EXACT && j != 0)) return false; /* the preset's own */
    if (f == F_K && g == F_V) return conf_preset_of(x, y) != NULL;
    for (p = 0; p < REF_PRESETS; p++) {
        if (ref_presets[p].k == x) k_is_preset = true;
        if (ref_presets[p].v == x) v_is_preset = true;
    }
    return f == F_K ? k_is_preset : f == F_V ? v_is_preset : true;
}

typedef struct conf_cover {
    const conf_backend *backend;
    bool seen[F_COUNT][F_COUNT][CONF_MAX_LEVELS][CONF_MAX_LEVELS];
    uint64_t rng;
    conf_case cases[CONF_MAX_CASES];
    uint32_t n_cases;
} conf_cover;

static bool conf_case_possible(const conf_backend *b, const conf_case *c) {
    int f, g;
    for (f = 0; f < F_COUNT; f++) {
        for (g = f + 1; g < F_COUNT; g++) {
            if (!conf_pair_possible(b, f, c->level[f], g, c->level[g])) return false;
        }
    }
    return true;
}

static uint32_t conf_new_pairs(conf_cover *cover, const conf_case *c, bool mark) {
    uint32_t n = 0;
    int f, g;
    for (f = 0; f < F_COUNT; f++) {
        for (g = f + 1; g < F_COUNT; g++) {
            bool *seen = &cover->seen[f][g][c->level[f]][c->level[g]];
            n += !*seen;
            if (mark) *seen = true;
        }
    }
    return n;
}

/* Adds the best of some random cases in which factors f and g have the given levels. */
static bool conf_add_case(conf_cover *cover, int f, uint32_t i, int g, uint32_t j) {
    conf_case best = {0};
    uint32_t found = 0, tries, most = 0;
    for (tries = 0; tries < 4000 && found < 24; tries++) {
        conf_case c = {0};
        uint32_t n;
        int h;
        for (h = 0; h < F_COUNT; h++) {
            c.level[h] = (uint8_t)(h == f ? i : h == g ? j : conf_random(&cover->rng, conf_factors[h].n));
        }
        if (cover->backend->presets_only) { /* random pairs of formats would hardly ever be a preset's */
            const ref_preset *p = &ref_presets[conf_random(&cover->rng, REF_PRESETS)];
            c.level[F_EXACT] = 0;
            for (h = 0; f != F_K && h < (int)conf_factors[F_K].n; h++) {
                if (conf_k[h] == p->k) c.level[F_K] = (uint8_t)h;
            }
            for (h = 0; f != F_V && g != F_V && h < (int)conf_factors[F_V].n; h++) {
                if (conf_v[h] == p->v) c.level[F_V] = (uint8_t)h;
            }
        }
        if (cover->backend->gpu && f != F_V_DIM && g != F_V_DIM) c.level[F_V_DIM] = c.level[F_K_DIM];
        if (cover->backend->gpu && (f == F_V_DIM || g == F_V_DIM)) c.level[F_K_DIM] = c.level[F_V_DIM];
        if (!conf_case_possible(cover->backend, &c)) continue;
        n = conf_new_pairs(cover, &c, false);
        if (!found || n > most) {
            most = n;
            best = c;
        }
        found++;
    }
    if (!found || cover->n_cases == CONF_MAX_CASES) return false;
    if (cover->backend->presets_only)
        best.preset = conf_preset_of(conf_value(&best, F_K), conf_value(&best, F_V));
    best.seed = 1000 + cover->n_cases;
    conf_new_pairs(cover, &best, true);
    cover->cases[cover->n_cases++] = best;
    return true;
}

/* Every possible pair of values is in some case afterwards. */
static bool conf_cover_make(conf_cover *cover, const conf_backend *backend) {
    uint32_t i, j;
    int f, g;
    memset(cover, 0, sizeof *cover);
    cover->backend = backend;
    cover->rng = 20240229;
    for (f = 0; f < F_COUNT; f++) {
        for (g = f + 1; g < F_COUNT; g++) {
            for (i = 0; i < conf_factors[f].n; i++) {
                for (j = 0; j < conf_factors[g].n; j++) {
                    if (cover->seen[f][g][i][j] || !conf_pair_possible(backend, f, i, g, j)) continue;
                    if (!conf_add_case(cover, f, i, g, j)) return false;
                }
            }
        }
    }
    return true;
}

/* ---- a case's geometry ---- */
typedef struct conf_geometry {
    kvl_geometry geo;
    kvl_layer layers[REF_MAX_LAYERS];
    float sink_logits[64];
} conf_geometry;

/* A preset for one layer. Those of a GPU are exact in the geometry's format. */
static const ref_preset *conf_layer_preset(const conf_backend *b, const conf_case *c, uint64_t *rng) {
    const ref_preset *p, *whole = NULL;
    uint32_t i;
    for (i = 0; c->preset && i < REF_PRESETS; i++) {
        if (!strcmp(ref_presets[i].name, c->preset)) whole = &ref_presets[i];
    }
    do {
        p = &ref_presets[conf_random(rng, conf_value(c, F_BLOCK) >= 32 ? REF_PRESETS : 4)];
    } while (b->gpu && p->exact != whole->exact);
    return p;
}

static void conf_geometry_make(conf_geometry *g, const conf_case *c, const conf_backend *b) {
    uint64_t rng = c->seed;
    uint32_t i, kind = conf_value(c, F_LAYERS);
    kvl_layer *l = g->layers;
    memset(g, 0, sizeof *g);
    g->geo.n_kv_heads = conf_value(c, F_KV_HEADS);
    g->geo.n_q_heads = g->geo.n_kv_heads * conf_value(c, F_GQA);
    g->geo.k_dim = conf_value(c, F_K_DIM);
    g->geo.v_dim = conf_value(c, F_V_DIM);
    g->geo.block_tokens = conf_value(c, F_BLOCK);
    g->geo.sink_blocks = conf_value(c, F_SINK_BLOCKS);
    g->geo.segment_tokens = conf_value(c, F_SEGMENT);
    g->geo.preset = c->preset;
    if (!c->preset) {
        g->geo.k_format = conf_value(c, F_K);
        g->geo.v_format = conf_value(c, F_V);
        g->geo.exact_format = conf_value(c, F_EXACT);
    }
    g->geo.n_layers = kind == LAYERS_ONE ? 1 : kind == LAYERS_TWO ? 2 : 3;
    g->geo.layers = l;
    for (i = 0; i < 64; i++)
        g->sink_logits[i] = i % 7 == 6 ? 40 : i % 7 == 5 ? -90 : (float)conf_random(&rng, 8) - 3;
    for (i = 0; i < g->geo.n_layers; i++) {
        l[i].window = conf_value(c, F_WINDOW);
        l[i].sink_tokens = conf_value(c, F_SINK_TOKENS);
        l[i].softcap = (float)conf_value(c, F_SOFTCAP);
        l[i].sink_logits = conf_value(c, F_SINK_LOGITS) ? g->sink_logits : NULL;
    }
    if (kind == LAYERS_WINDOWS) { /* three groups, but for windows that happen to be equal */
        l[1].window = 37;
        l[1].sink_tokens = 4;
        l[1].softcap = 10;
        l[2].window = l[2].sink_tokens = 0;
        l[2].sink_logits = l[2].sink_logits ? NULL : g->sink_logits;
    }
    if (kind == LAYERS_FORMATS) {
        bool channel_fits = g->geo.block_tokens >= 32;
        const ref_preset *p = conf_layer_preset(b, c, &rng);
        l[1].k_format = p->k;
        l[1].v_format = p->v;
        l[1].scale = 0.11f;
        if (!b->presets_only) {
            l[2].k_format = conf_k[conf_random(&rng, conf_factors[F_K].n)];
            l[2].v_format = conf_v[conf_random(&rng, conf_factors[F_V].n)];
            if (!channel_fits && conf_is_channel(l[2].k_format)) l[2].k_format = KVL_NVFP4;
        }
        l[2].k_global = 0.125f;
        l[2].v_global = 0.03125f;
    }
}

/* ---- tensors ---- */
typedef struct conf_tensor {
    uint8_t *bytes, *before;
    size_t n_bytes, size, row, head;
    kvl_tensor t;
} conf_tensor;

static size_t conf_dtype_size(kvl_dtype d) { return d == KVL_DTYPE_F32 ? 4 : 2; }

/* All bytes 0xff: NaN in every type, so that what is read beyond the rows, or not written, shows. */
static void conf_tensor_make(conf_tensor *t, kvl_dtype dtype, bool strided, uint32_t rows, uint32_t heads,
                             uint32_t dim) {
    t->size = conf_dtype_size(dtype);
    t->head = strided ? dim + 5 : dim;
    t->row = t->head * heads + (strided ? 3 : 0);
    t->n_bytes = (t->row * rows + 1) * t->size;
    t->bytes = (uint8_t *)malloc(t->n_bytes);
    t->before = NULL;
    memset(t->bytes, 0xff, t->n_bytes);
    t->t.data = t->bytes + (strided ? t->size : 0); /* not aligned to more than an element */
    t->t.dtype = dtype;
    t->t.memory = KVL_MEMORY_HOST;
    t->t.row_stride = strided ? t->row : 0;
    t->t.head_stride = strided ? t->head : 0;
}
static void conf_tensor_free(conf_tensor *t) { free(t->bytes); }

static double conf_dtype_round(kvl_dtype d, double x) {
    return ref_round(d == KVL_DTYPE_F16 ? KVL_F16 : d == KVL_DTYPE_BF16 ? KVL_BF16 : KVL_F32, x);
}

static void conf_tensor_set(conf_tensor *t, uint32_t row, uint32_t head, uint32_t dim, const float *values) {
    uint8_t *p = (uint8_t *)t->t.data + (row * t->row + head * t->head) * t->size;
    uint32_t e;
    for (e = 0; e < dim; e++, p += t->size) {
        uint16_t h = t->t.dtype == KVL_DTYPE_F16 ? ref_f16_bits(values[e]) : ref_bf16_bits(values[e]);
        if (t->t.dtype == KVL_DTYPE_F32)
            memcpy(p, &values[e], 4);
        else
            memcpy(p, &h, 2);
    }
}
static double conf_tensor_get(const conf_tensor *t, uint32_t row, uint32_t head, uint32_t e) {
    const uint8_t *p = (const uint8_t *)t->t.data + (row * t->row + head * t->head + e) * t->size;
    float f;
    uint16_t h;
    if (t->t.dtype == KVL_DTYPE_F32) {
        memcpy(&f, p, 4);
        return f;
    }
    memcpy(&h, p, 2);
    return t->t.dtype == KVL_DTYPE_F16 ? ref_f16_value(h) : ref_bf16_value(h);
}

/* Is everything between the rows and heads as conf_tensor_make left it? */
static bool conf_tensor_gaps_untouched(const conf_tensor *t, uint32_t rows, uint32_t heads, uint32_t dim) {
    size_t i, n = t->n_bytes / t->size, first = (size_t)((uint8_t *)t->t.data - t->bytes) / t->size;
    for (i = 0; i < n; i++) {
        size_t at = i - first, in_row = at % t->row, b;
        if (i >= first && at / t->row < rows && in_row / t->head < heads && in_row % t->head < dim) continue;
        for (b = 0; b < t->size; b++) {
            if (t->bytes[i * t->size + b] != 0xff) return false;
        }
    }
    return true;
}

/* ---- rows ---- */
static float conf_normal(uint64_t x) {
    x = conf_mix64(x);
    return ((float)(x & 0xffff) + (float)(x >> 16 & 0xffff) + (float)(x >> 32 & 0xffff) + (float)(x >> 48)) *
               (1.732f / 65536) -
           3.464f;
}

/* A query, key or value of one head, made from the seed alone. Keys have a few channels that are large, biased or
   constant; some rows are zero, constant, tiny or large: large queries saturate softmax and softcap. */
static void conf_row(float *out, char what, uint64_t seed, uint32_t layer, uint32_t head, uint32_t dim) {
    uint64_t base = conf_mix64(seed * 131 + (uint64_t)what + layer * 977u + head * 7919u);
    uint32_t e, odd = (uint32_t)(base >> 40) % 64;
    float size = odd == 1 ? 1e-6f : odd == 2 ? 3e-4f : odd == 3 && what != 'k' ? 60 : 1;
    for (e = 0; e < dim; e++) {
        float x = conf_normal(base + e * 0x9e3779b9u);
        if (what == 'k') {
            uint32_t kind = (uint32_t)(conf_mix64(layer * 31 + head * 1009u + e * 65537u) >> 20) % 32;
            if (kind == 0)
                x = 2.5f;
            else if (kind < 3)
                x *= 6;
            else if (kind < 5)
                x += 4;
        }
        out[e] = odd == 0 ? 0 : odd == 4 ? 0.75f : x * size;
    }
}

/* ---- running a case ---- */
enum { CONF_MAX_STREAMS = 8, CONF_MAX_TOKENS = 4096 };

typedef struct conf_stream {
    bool open;
    kvl_seq seq;
    uint32_t length, target;
    uint32_t nan_at;    /* first position whose k or v is not finite; KVL_NONE = never */
    uint64_t *row_seed; /* [CONF_MAX_TOKENS] what the rows of a position are made from */
    int32_t *tokens;    /* [CONF_MAX_TOKENS] of the same seeds: equal tokens, equal KV */
    ref_kv kv[REF_MAX_LAYERS];
} conf_stream;

typedef struct conf_run {
    const conf_case *c;
    const conf_backend *backend;
    conf_geometry g;
    ref_geometry ref;
    kvl_cache *cache;
    conf_stream streams[CONF_MAX_STREAMS];
    uint32_t n_opened;
    uint64_t rng;
    kvl_dtype q_dtype, kv_dtype, out_dtype;
    double tolerance, worst;
    uint64_t checked;
    char error[600];
} conf_run;

static bool conf_fail(conf_run *r, const char *format, ...) {
    va_list args;
    if (r->error[0]) return false;
    va_start(args, format);
    vsnprintf(r->error, sizeof r->error, format, args);
    va_end(args);
    return false;
}
static bool conf_ok(conf_run *r, const char *what, kvl_result got, kvl_result want) {
    if (got == want) return true;
    return conf_fail(r, "%s gave %s, wanted %s: %s", what, kvl_result_name(got), kvl_result_name(want),
                     kvl_last_error(r->cache));
}

/* New seeds for the positions from `first` on. */
static void conf_stream_seed(conf_stream *s, uint32_t first, uint64_t seed) {
    uint32_t i;
    for (i = first; i < s->target; i++) {
        s->row_seed[i] = conf_mix64(seed * 8191 + i);
        s->tokens[i] = (int32_t)(s->row_seed[i] & 0x7fffffff);
    }
}

static conf_stream *conf_free_stream(conf_run *r) {
    uint32_t i, l;
    for (i = 0; i < CONF_MAX_STREAMS; i++) {
        conf_stream *s = &r->streams[i];
        if (s->open) continue;
        if (!s->row_seed) {
            s->row_seed = (uint64_t *)malloc(sizeof(uint64_t) * CONF_MAX_TOKENS);
            s->tokens = (int32_t *)malloc(sizeof(int32_t) * CONF_MAX_TOKENS);
            for (l = 0; l < r->ref.n_layers; l++) {
                ref_kv_init(&s->kv[l], &r->ref, r->c->long_tokens ? r->c->long_tokens : 512);
            }
        }
        return s;
    }
    return NULL;
}

static bool conf_open(conf_run *r, uint32_t target, bool with_nan) {
    conf_stream *s = conf_free_stream(r);
    kvl_seq_desc d = {0};
    kvl_reuse reuse;
    uint32_t l;
    s->target = target;
    s->length = 0;
    s->nan_at = with_nan ? conf_random(&r->rng, target) : KVL_NONE;
    conf_stream_seed(s, 0, r->c->seed * 64 + r->n_opened++);
    for (l = 0; l < r->ref.n_layers; l++) s->kv[l].n = 0;
    d.tokens = s->tokens;
    d.n_tokens = target;
    if (!conf_ok(r, "seq_open", kvl_seq_open(r->cache, &d, &s->seq, &reuse), KVL_OK)) return false;
    s->open = true;
    if (reuse.matched) return conf_fail(r, "opening new tokens matched %u", reuse.matched);
    return true;
}

/* Closes a stream and opens another on its first tokens. */
static bool conf_reopen(conf_run *r, conf_stream *s) {
    kvl_seq_desc d = {0};
    kvl_reuse reuse;
    uint32_t l, shared = 1 + conf_random(&r->rng, s->length);
    s->open = false;
    if (!conf_ok(r, "seq_close", kvl_seq_close(r->cache, s->seq), KVL_OK)) return false;
    s->target = conf_min(shared + 30, r->streams[0].kv[0].capacity);
    conf_stream_seed(s, shared, r->c->seed * 64 + r->n_opened++);
    d.tokens = s->tokens;
    d.n_tokens = s->target;
    if (!conf_ok(r, "seq_open", kvl_seq_open(r->cache, &d, &s->seq, &reuse), KVL_OK)) return false;
    s->open = true;
    if (reuse.matched > shared)
        return conf_fail(r, "matched %u tokens where %u are shared", reuse.matched, shared);
    s->length = reuse.matched;
    for (l = 0; l < r->ref.n_layers; l++) s->kv[l].n = reuse.matched;
    return true;
}

/* Another stream with the same rows up to where the fork got. */
static bool conf_fork(conf_run *r, conf_stream *from) {
    conf_stream *s = conf_free_stream(r);
    uint32_t l, length = KVL_NONE;
    if (!s) return true;
    if (!conf_ok(r, "seq_fork", kvl_seq_fork(r->cache, from->seq, &s->seq, &length), KVL_OK)) return false;
    s->open = true;
    if (length > from->length) return conf_fail(r, "a fork of %u tokens has %u", from->length, length);
    s->length = length;
    s->target = conf_min(length + 1 + conf_random(&r->rng, 40), from->kv[0].capacity);
    s->nan_at = KVL_NONE;
    memcpy(s->row_seed, from->row_seed, sizeof(uint64_t) * length);
    memcpy(s->tokens, from->tokens, sizeof(int32_t) * length);
    conf_stream_seed(s, length, r->c->seed * 64 + r->n_opened++);
    for (l = 0; l < r->ref.n_layers; l++) {
        size_t rows = (size_t)length * r->ref.n_kv_heads;
        s->kv[l].n = length;
        memcpy(s->kv[l].k, from->kv[l].k, rows * r->ref.k_dim * sizeof(float));
        memcpy(s->kv[l].v, from->kv[l].v, rows * r->ref.v_dim * sizeof(float));
        memcpy(s->kv[l].k_sealed, from->kv[l].k_sealed, rows * r->ref.k_dim * sizeof(double));
        memcpy(s->kv[l].v_sealed, from->kv[l].v_sealed, rows * r->ref.v_dim * sizeof(double));
    }
    return true;
}

static bool conf_trim(conf_run *r, conf_stream *s) {
    uint32_t l, n = conf_random(&r->rng, s->length + 1), reached = KVL_NONE;
    if (!conf_ok(r, "seq_trim", kvl_seq_trim(r->cache, s->seq, n, &reached), KVL_OK)) return false;
    if (reached > n) return conf_fail(r, "trim of %u tokens to %u reached %u", s->length, n, reached);
    s->length = reached;
    for (l = 0; l < r->ref.n_layers; l++) s->kv[l].n = reached;
    if (conf_random(&r->rng, 2)) conf_stream_seed(s, reached, r->c->seed * 64 + r->n_opened++);
    return true;
}

/* How many rows of this stream the next step takes. */
static uint32_t conf_chunk(conf_run *r, const conf_stream *s) {
    static const uint32_t sizes[] = {1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 50, 63, 64, 65, 100, 128, 200};
    uint32_t rest = s->target - s->length, mix = conf_value(r->c, F_MIX);
    if (mix == MIX_FRESH) return rest;
    if (mix == MIX_DECODE) return s->length ? 1 : conf_min(rest, 1 + conf_random(&r->rng, rest));
    if (mix == MIX_CHUNKS) return conf_min(rest, sizes[conf_random(&r->rng, 17)]);
    switch (conf_random(&r->rng, 8)) {
    case 0: return 0;
    case 1: return rest;
    case 2:
    case 3:
    case 4: return conf_min(rest, sizes[conf_random(&r->rng, 14)]);
    default: return 1;
    }
}

typedef struct conf_plan { /* one step */
    kvl_span spans[CONF_MAX_STREAMS];
    conf_stream *streams[CONF_MAX_STREAMS];
    uint32_t n_spans, n_rows;
    const kvl_step *step;
} conf_plan;

static void conf_plan_make(conf_run *r, conf_plan *p) {
    uint32_t i, first = conf_random(&r->rng, CONF_MAX_STREAMS);
    memset(p, 0, sizeof *p);
    for (i = 0; i < CONF_MAX_STREAMS; i++) {
        conf_stream *s = &r->streams[(first + i) % CONF_MAX_STREAMS];
        uint32_t n = s->open && s->length < s->target ? conf_chunk(r, s) : 0;
        if (!n || p->n_rows + n > 512) continue;
        p->spans[p->n_spans].seq = s->seq;
        p->spans[p->n_spans].tokens = s->tokens + s->length;
        p->spans[p->n_spans].n_tokens = n;
        p->spans[p->n_spans].n_logits = 1;
        p->spans[p->n_spans].user = s;
        p->streams[p->n_spans++] = s;
        p->n_rows += n;
    }
}

static bool conf_check_step(conf_run *r, const conf_plan *p) {
    const kvl_step *step = p->step;
    uint32_t i, j, row = 0;
    if (step->n_spans != p->n_spans || step->n_tokens != p->n_rows)
        return conf_fail(r, "the step's counts are wrong");
    for (i = 0; i < p->n_spans; i++) {
        const conf_stream *s = p->streams[i];
        if (step->spans[i].user != s || step->spans[i].first_row != row ||
            step->spans[i].position != s->length || step->spans[i].n_rows != p->spans[i].n_tokens) {
            return conf_fail(r, "span %u of the step is wrong", i);
        }
        for (j = 0; j < step->spans[i].n_rows; j++, row++) {
            if (step->positions[row] != s->length + j || step->tokens[row] != s->tokens[s->length + j] ||
                step->row_span[row] != i) {
                return conf_fail(r, "row %u of the step is wrong", row);
            }
        }
    }
    return true;
}

/* Compares one row's output of one layer. */
static bool conf_check_row(conf_run *r, uint32_t layer, const conf_stream *s, uint32_t pos, const float *q,
                           const conf_tensor *out, uint32_t row) {
    static const double half_ulp[] = {0x1p-24, 0x1p-11, 0x1p-8};
    double want[256], tensor = r->ref.exact == KVL_F16    ? r->backend->f16_rounding
                               : r->ref.exact == KVL_BF16 ? r->backend->bf16_rounding
                                                          : 0;
    uint32_t h, e;
    for (h = 0; h < r->ref.n_q_heads; h++) {
        ref_sizes sizes =
            ref_attend(&r->ref, layer, &s->kv[layer], pos, h, q + (size_t)h * r->ref.k_dim, want);
        double allowed = ref_allowed(&sizes, r->tolerance, tensor);
        for (e = 0; e < r->ref.v_dim; e++) {
            double got = conf_tensor_get(out, row, h, e), error = fabs(got - want[e]);
            double rounding = fabs(want[e]) * half_ulp[r->out_dtype] + 0x1p-24;
            if (!(error <= allowed + rounding)) {
                return conf_fail(r,
                                 "layer %u position %u head %u element %u: %.9g, reference %.9g, off by %.3g "
                                 "where %.3g is allowed",
                                 layer, pos, h, e, got, want[e], error, allowed + rounding);
            }
            if (allowed > 0 && (error - rounding) / allowed > r->worst)
                r->worst = (error - rounding) / allowed;
            r->checked++;
        }
    }
    return true;
}

/* Is this row worth the reference's time? The edges of chunks and blocks, and some of the rest. */
static bool conf_sampled(const conf_run *r, const conf_stream *s, uint32_t pos, uint32_t last) {
    uint32_t T = r->ref.block_tokens;
    if (pos >= s->nan_at || (r->backend->spoils_step && last >= s->nan_at)) return false;
    if (r->c->long_tokens) return pos == last || conf_mix64(s->row_seed[pos]) % 97 == 0;
    return pos == last || pos % T == 0 || pos % T == T - 1 || conf_mix64(s->row_seed[pos]) % 6 == 0;
}

/* Fills q, k and v of one layer and keeps what the reference needs: q as floats, k and v appended to it. */
static void conf_fill(conf_run *r, const conf_plan *p, uint32_t layer, conf_tensor *q, conf_tensor *k,
                      conf_tensor *v, float *q_rows) {
    uint32_t kd = r->ref.k_dim, vd = r->ref.v_dim, heads = r->ref.n_kv_heads, i, j, h, e, row = 0;
    float *kr = (float *)malloc(sizeof(float) * heads * kd),
          *vr = (float *)malloc(sizeof(float) * heads * vd);
    for (i = 0; i < p->n_spans; i++) {
        conf_stream *s = p->streams[i];
        s->kv[layer].n = s->length;
        for (j = 0; j < p->spans[i].n_tokens; j++, row++) {
            uint32_t pos = s->length + j;
            uint64_t seed = s->row_seed[pos];
            for (h = 0; h < r->ref.n_q_heads; h++) {
                float *x = q_rows + ((size_t)row * r->ref.n_q_heads + h) * kd;
                conf_row(x, 'q', seed, layer, h, kd);
                for (e = 0; e < kd; e++) x[e] = (float)conf_dtype_round(r->q_dtype, x[e]);
                conf_tensor_set(q, row, h, kd, x);
            }
            for (h = 0; h < heads; h++) {
                float *x = kr + (size_t)h * kd, *y = vr + (size_t)h * vd;
                conf_row(x, 'k', seed, layer, h, kd);
                conf_row(y, 'v', seed, layer, h, vd);
                for (e = 0; e < kd; e++) x[e] = (float)conf_dtype_round(r->kv_dtype, x[e]);
                for (e = 0; e < vd; e++) y[e] = (float)conf_dtype_round(r->kv_dtype, y[e]);
                if (pos >= s->nan_at && h == heads - 1 && (pos == s->nan_at || seed % 3 == 0)) {
                    if (seed & 4)
                        x[seed % kd] = seed & 8 ? NAN : INFINITY;
                    else
                        y[seed % vd] = seed & 8 ? NAN : -INFINITY;
                }
                conf_tensor_set(k, row, h, kd, x);
                conf_tensor_set(v, row, h, vd, y);
            }
            ref_kv_append(&s->kv[layer], &r->ref, layer, kr, vr);
        }
    }
    free(kr);
    free(vr);
}

static kvl_result conf_attend(conf_run *r, const kvl_step *step, uint32_t layer, conf_tensor *q,
                              conf_tensor *k, conf_tensor *v, conf_tensor *out) {
    conf_tensor *all[4] = {q, k, v, out};
    kvl_tensor *tensors[4];
    size_t bytes[4], i;
    if (!r->backend->attend) return kvl_attend(r->cache, step, layer, &q->t, &k->t, &v->t, &out->t);
    for (i = 0; i < 4; i++) {
        tensors[i] = &all[i]->t;
        bytes[i] = all[i]->n_bytes - (size_t)((uint8_t *)all[i]->t.data - all[i]->bytes);
    }
    return r->backend->attend(r->cache, step, layer, tensors, bytes);
}

static bool conf_layer(conf_run *r, const conf_plan *p, uint32_t layer) {
    bool strided = conf_value(r->c, F_STRIDED) != 0, ok;
    uint32_t nq = r->ref.n_q_heads, nkv = r->ref.n_kv_heads, kd = r->ref.k_dim, vd = r->ref.v_dim, i, j,
             row = 0;
    float *q_rows = (float *)malloc(sizeof(float) * p->n_rows * nq * kd);
    conf_tensor q, k, v, out;
    conf_tensor_make(&q, r->q_dtype, strided, p->n_rows, nq, kd);
    conf_tensor_make(&k, r->kv_dtype, strided, p->n_rows, nkv, kd);
    conf_tensor_make(&v, r->kv_dtype, strided, p->n_rows, nkv, vd);
    conf_tensor_make(&out, r->out_dtype, strided, p->n_rows, nq, vd);
    conf_fill(r, p, layer, &q, &k, &v, q_rows);
    ok = conf_ok(r, "attend", conf_attend(r, p->step, layer, &q, &k, &v, &out), KVL_OK);
    for (i = 0; ok && i < p->n_spans; i++) {
        const conf_stream *s = p->streams[i];
        uint32_t n = p->spans[i].n_tokens;
        for (j = 0; ok && j < n; j++, row++) {
            if (!conf_sampled(r, s, s->length + j, s->length + n - 1)) continue;
            ok = conf_check_row(r, layer, s, s->length + j, q_rows + (size_t)row * nq * kd, &out, row);
            if (!ok) {
                size_t used = strlen(r->error);
                snprintf(r->error + used, sizeof r->error - used,
                         " (rows %u..%u of the sequence, span %u of %u)", s->length, s->length + n - 1, i,
                         p->n_spans);
            }
        }
    }
    if (ok && !conf_tensor_gaps_untouched(&out, p->n_rows, nq, vd)) {
        ok = conf_fail(r, "attend wrote between the rows of out");
    }
    conf_tensor_free(&q);
    conf_tensor_free(&k);
    conf_tensor_free(&v);
    conf_tensor_free(&out);
    free(q_rows);
    return ok;
}

static bool conf_check_streams(conf_run *r) {
    uint32_t i, length = KVL_NONE;
    for (i = 0; i < CONF_MAX_STREAMS; i++) {
        const conf_stream *s = &r->streams[i];
        if (!s->open) continue;
        if (!conf_ok(r, "seq_length", kvl_seq_length(r->cache, s->seq, &length), KVL_OK)) return false;
        if (length != s->length)
            return conf_fail(r, "stream %u has %u tokens, should have %u", i, length, s->length);
        if (kvl_seq_tainted(r->cache, s->seq) != (s->length > s->nan_at)) {
            return conf_fail(r, "stream %u of %u tokens with %s: taint is wrong", i, s->length,
                             s->nan_at == KVL_NONE ? "finite rows" : "a row that is not finite");
        }
    }
    return true;
}

/* One step, which is aborted after some of its layers if abort_it. */
static bool conf_step(conf_run *r, bool abort_it) {
    conf_plan p;
    uint32_t i, first = conf_random(&r->rng, r->ref.n_layers), layers = r->ref.n_layers;
    conf_plan_make(r, &p);
    if (!p.n_spans) return true;
    if (!conf_ok(r, "step_begin", kvl_step_begin(r->cache, p.spans, p.n_spans, &p.step), KVL_OK))
        return false;
    if (!conf_check_step(r, &p)) return false;
    if (abort_it) layers = conf_random(&r->rng, layers + 1);
    for (i = 0; i < layers; i++) { /* in any order */
        if (!conf_layer(r, &p, (first + i) % r->ref.n_layers)) return false;
    }
    if (abort_it) {
        if (!conf_ok(r, "step_abort", kvl_step_abort(r->cache, p.step), KVL_OK)) return false;
    } else {
        if (!conf_ok(r, "step_end", kvl_step_end(r->cache, p.step), KVL_OK)) return false;
        for (i = 0; i < p.n_spans; i++) p.streams[i]->length += p.spans[i].n_tokens;
    }
    return conf_check_streams(r);
}

/* Forks, trims and reopens now and then. */
static bool conf_event(conf_run *r) {
    conf_stream *s = &r->streams[conf_random(&r->rng, CONF_MAX_STREAMS)];
    if (!s->open || s->nan_at != KVL_NONE || !s->length) return true;
    switch (conf_random(&r->rng, 6)) {
    case 0: return conf_fork(r, s);
    case 1: return conf_trim(r, s);
    case 2: return r->n_opened > 12 || conf_reopen(r, s);
    default: return true;
    }
}

static uint32_t conf_unfinished(const conf_run *r) {
    uint32_t i, n = 0;
    for (i = 0; i < CONF_MAX_STREAMS; i++)
        n += r->streams[i].open && r->streams[i].length < r->streams[i].target;
    return n;
}

/* Tokens of a stream by its mix, fewer where a token costs much. */
static uint32_t conf_target(conf_run *r) {
    static const uint32_t most[] = {230, 110, 420, 120};
    double per_pair = (double)r->ref.n_layers * r->ref.n_q_heads * (r->ref.k_dim + r->ref.v_dim);
    uint32_t mix = conf_value(r->c, F_MIX), n = most[mix], streams = mix == MIX_BATCH ? 6 : 1;
    uint32_t affordable =
        (uint32_t)sqrt(2 * (r->backend->work > 0 ? r->backend->work : 6e7) / per_pair / streams);
    if (affordable < 90) affordable = 90;
    n = conf_min(n, affordable);
    return n - conf_random(&r->rng, n / 4);
}

static bool conf_streams_run(conf_run *r) {
    bool batch = conf_value(r->c, F_MIX) == MIX_BATCH && !r->c->long_tokens,
         with_nan = conf_value(r->c, F_NAN) != 0;
    uint32_t i, steps = 0;
    for (i = 0; i < (batch ? 5u : 1u); i++) {
        uint32_t target = r->c->long_tokens ? r->c->long_tokens : conf_target(r);
        if (!conf_open(r, batch && i < 2 ? target / 3 + 1 : target, false)) return false;
    }
    if (with_nan && !conf_open(r, conf_target(r) / 2 + 1, true)) return false;
    while (conf_unfinished(r) && steps < 4000) {
        if (!conf_step(r, conf_random(&r->rng, 12) == 0)) return false;
        if (batch && !conf_event(r)) return false;
        if (steps++ % 8 == 0 && !conf_ok(r, "validate", kvl_validate(r->cache), KVL_OK)) return false;
    }
    if (conf_unfinished(r)) return conf_fail(r, "not finished after %u steps", steps);
    return conf_ok(r, "validate", kvl_validate(r->cache), KVL_OK);
}

static kvl_cache_desc conf_cache_desc(const conf_backend *b, const ref_geometry *g, uint32_t long_tokens) {
    uint64_t token_bytes = (uint64_t)g->n_layers * g->n_kv_heads * (g->k_dim + g->v_dim) * 4;
    kvl_cache_desc d = {0};
    d.context_desc.backend = b->kind;
    d.context_desc.simd = b->simd;
    d.context_desc.n_threads = b->n_threads;
    d.max_sequences = CONF_MAX_STREAMS;
    d.max_seq_tokens = long_tokens ? CONF_MAX_TOKENS : 1024;
    d.device_bytes =
        (16u << 20) + token_bytes * (long_tokens + 2048); /* little, for it is all filled with NaN */
    if (b->gpu) d.device_bytes += 64u << 20;              /* its workspace */
    d.poison = true;
    if (b->describe) b->describe(&d);
    return d;
}

/* Returns whether the case passed; the reason why not goes to stderr. */
static bool conf_run_case(const conf_backend *b, const conf_case *c, double *worst, uint64_t *checked) {
    conf_run *r = (conf_run *)calloc(1, sizeof *r);
    kvl_cache_desc d;
    uint32_t i, l, dtype = conf_value(c, F_DTYPE);
    char why[256] = "", what[600];
    bool ok;
    r->c = c;
    r->backend = b;
    r->rng = c->seed;
    r->tolerance = b->tolerance > 0 ? b->tolerance : 1e-6;
    r->q_dtype = dtype < 3 ? (kvl_dtype)dtype : KVL_DTYPE_F32;
    r->kv_dtype = dtype < 3 ? (kvl_dtype)dtype : KVL_DTYPE_F16;
    r->out_dtype = dtype < 3 ? (kvl_dtype)dtype : KVL_DTYPE_BF16;
    conf_geometry_make(&r->g, c, b);
    r->ref = ref_geometry_make(&r->g.geo);
    d = conf_cache_desc(b, &r->ref, c->long_tokens);
    d.geometry = r->g.geo;
    d.error = why;
    d.error_size = sizeof why;
    ok = kvl_cache_create(&d, &r->cache) == KVL_OK;
    if (!ok) conf_fail(r, "create: %s", why);
    ok = ok && conf_streams_run(r);
    for (i = 0; i < CONF_MAX_STREAMS; i++) {
        free(r->streams[i].row_seed);
        free(r->streams[i].tokens);
        for (l = 0; l < REF_MAX_LAYERS; l++) ref_kv_free(&r->streams[i].kv[l]);
    }
    kvl_cache_destroy(r->cache);
    conf_describe(c, what, sizeof what);
    if (!ok)
        fprintf(stderr, "%s, case %llu: %s\n    %s\n", b->name, (unsigned long long)c->seed, r->error, what);
    if (r->worst > *worst) *worst = r->worst;
    *checked += r->checked;
    free(r);
    return ok;
}

/* ---- the tests ---- */

/* Says loudly what is not here. */
static void conf_skip_if_missing(const conf_backend *b) {
    kvl_context_desc d = {0};
    kvl_context *ctx = NULL;
    char why[256] = "";
    kvl_result r;
    d.backend = b->kind;
    d.simd = b->simd;
    d.error = why;
    d.error_size = sizeof why;
    r = kvl_context_create(&d, &ctx);
    kvl_context_destroy(ctx);
    if (r == KVL_UNSUPPORTED || r == KVL_NO_BACKEND) {
        printf("SKIP %s: %s\n", b->name, why);
        skip();
    }
    if (r != KVL_OK) fail_msg("%s: %s: %s", b->name, kvl_result_name(r), why);
}

static void conf_run_cases(const conf_backend *b, const conf_case *cases, uint32_t n) {
    uint32_t i, failed = 0, ran = 0, every = CONF_EVERY * (b->every ? b->every : 1);
    uint64_t checked = 0;
    double worst = 0;
    for (i = n > b->first ? b->first : 0; i < n && failed < 8; i += every, ran++)
        failed += !conf_run_case(b, &cases[i], &worst, &checked);
    printf("%s: %u cases, %llu numbers compared, worst error %.2g of what is allowed\n", b->name, ran,
           (unsigned long long)checked, worst);
    assert_true(checked > 0);
    assert_int_equal(failed, 0);
}

/* Formats x dims x GQA x windows x block sizes, all the rest at random. */
static uint32_t conf_cross_product(conf_cover *cover, uint64_t index, uint64_t *total) {
    static const int axes[] = {F_K, F_V, F_K_DIM, F_GQA, F_WINDOW, F_BLOCK};
    conf_case c = {0};
    uint64_t rest = index;
    uint32_t i, tries;
    int f;
    *total = 1;
    for (i = 0; i < 6; i++) *total *= conf_factors[axes[i]].n;
    c.seed = 100000 + index;
    for (tries = 0; tries < 200; tries++) {
        for (f = 0; f < F_COUNT; f++) c.level[f] = (uint8_t)conf_random(&cover->rng, conf_factors[f].n);
        for (i = 0, rest = index; i < 6; i++) {
            c.level[axes[i]] = (uint8_t)(rest % conf_factors[axes[i]].n);
            rest /= conf_factors[axes[i]].n;
        }
        if (cover->backend->presets_only) c.level[F_EXACT] = 0;
        if (!conf_case_possible(cover->backend, &c)) continue;
        if (cover->backend->presets_only) c.preset = conf_preset_of(conf_value(&c, F_K), conf_value(&c, F_V));
        cover->cases[0] = c;
        return 1;
    }
    return 0;
}

static void conf_test_table(void **state) {
    const conf_backend *b = (const conf_backend *)*state;
    conf_cover *cover = (conf_cover *)malloc(sizeof *cover);
    conf_skip_if_missing(b);
    assert_true(conf_cover_make(cover, b));
    conf_run_cases(b, cover->cases, cover->n_cases);
    if (b->full) {
        uint64_t i, total = 1, checked = 0;
        uint32_t failed = 0;
        double worst = 0;
        for (i = 0; i < total; i++) {
            if (conf_cross_product(cover, i, &total))
                failed += !conf_run_case(b, &cover->cases[0], &worst, &checked);
        }
        assert_int_equal(failed, 0);
    }
    free(cover);
}

static uint32_t conf_level(int factor, uint32_t value) {
    uint32_t i;
    for (i = 0; i < conf_factors[factor].n; i++) {
        if (conf_factors[factor].values[i] == value) return i;
    }
    fail_msg("no value %u of %s", value, conf_factors[factor].name);
    return 0;
}

static void conf_test_long(void **state) {
    static const struct {
        const char *preset;
        uint32_t tokens, k_dim, v_dim, gqa, window, block, segment, layers, mix;
    } rows[] = {
        {"f16", 3000, 64, 64, 3, 0, 32, 0, LAYERS_ONE, MIX_CHUNKS},
        {"int8", 2100, 128, 128, 8, 0, 32, 0, LAYERS_ONE, MIX_CHUNKS},
        {"int4", 3000, 64, 64, 4, 0, 64, 0, LAYERS_ONE, MIX_CHUNKS},
        {"nvfp4", 1500, 128, 64, 4, 100, 16, 64, LAYERS_WINDOWS, MIX_CHUNKS},
        {"balanced", 1100, 192, 128, 2, 0, 32, 0, LAYERS_ONE, MIX_CHUNKS},
        {"f32", 1300, 16, 16, 1, 5000, 8, 128, LAYERS_ONE, MIX_CHUNKS},
    };
    const conf_backend *b = (const conf_backend *)*state;
    conf_case cases[sizeof rows / sizeof rows[0]] = {{{0}, NULL, 0, 0}};
    uint32_t i, n = 0;
    double share = sqrt(b->work > 0 ? b->work / 6e7 : 1);
    conf_skip_if_missing(b);
    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        conf_case *c = &cases[n];
        if (b->gpu && (!conf_gpu_takes(F_K_DIM, rows[i].k_dim) || !conf_gpu_takes(F_BLOCK, rows[i].block)))
            continue;
        n++;
        c->preset = rows[i].preset;
        c->seed = 500 + i;
        c->long_tokens = (uint32_t)(rows[i].tokens * share);
        c->level[F_K_DIM] = (uint8_t)conf_level(F_K_DIM, rows[i].k_dim);
        c->level[F_V_DIM] = (uint8_t)conf_level(F_V_DIM, b->gpu ? rows[i].k_dim : rows[i].v_dim);
        c->level[F_GQA] = (uint8_t)conf_level(F_GQA, rows[i].gqa);
        c->level[F_WINDOW] = (uint8_t)conf_level(F_WINDOW, rows[i].window);
        c->level[F_BLOCK] = (uint8_t)conf_level(F_BLOCK, rows[i].block);
        c->level[F_SEGMENT] = (uint8_t)conf_level(F_SEGMENT, rows[i].segment);
        c->level[F_LAYERS] = (uint8_t)conf_level(F_LAYERS, rows[i].layers);
        c->level[F_MIX] = (uint8_t)conf_level(F_MIX, rows[i].mix);
    }
    conf_run_cases(b, cases, n);
}

#define CONF_TESTS(label, backend)                                                        \
    {label ": every pair of settings", conf_test_table, NULL, NULL, (void *)(backend)}, { \
        label ": long contexts", conf_test_long, NULL, NULL, (void *)(backend)            \
    }

#endif
