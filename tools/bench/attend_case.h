/* attend_case.h - one layer's keys and values for a benchmark of attention: made-up rows that every contender stores in
 * its own layout, a kvlite cache that holds them, and what attention over them must give.
 *
 * Contexts are laid down as blocks through the public API, as a caller with kernels of its own would write them:
 * computing them would take hours. */
#ifndef ATTEND_CASE_H
#define ATTEND_CASE_H

#include "bench.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

enum {
    CASE_KV_HEADS = 8,
    CASE_T = 32,        /* tokens of a block */
    CASE_VARIANTS = 61, /* tiles of distinct rows; a context repeats them, each head in its own order */
    CASE_MAX_DIM = 128,
    CASE_MAX_GQA = 8,
    CASE_STEP = 64 /* rows of a step while a context is laid down */
};

/* Of a result, relative: 4-bit formats stay under half of it, a misread layout is far above. */
#define CASE_MOST_ERROR 0.3

/* Keys and values of all contexts of one head dim. */
typedef struct case_rows {
    uint32_t dim;
    float tile[2][CASE_VARIANTS][CASE_T * CASE_MAX_DIM]; /* keys, values: [token][dim] */
} case_rows;

static void case_rows_make(case_rows *r, uint32_t dim) {
    r->dim = dim;
    for (int kv = 0; kv < 2; kv++)
        for (int v = 0; v < CASE_VARIANTS; v++)
            for (uint32_t i = 0; i < CASE_T * dim; i++) r->tile[kv][v][i] = bench_noise();
}

static uint32_t case_variant(uint32_t block, uint32_t head) {
    return (block * 7 + head * 13) % CASE_VARIANTS;
}

/* Row `token` of a head: kv 0 its key, 1 its value. */
static const float *case_row(const case_rows *r, int kv, uint32_t head, uint32_t token) {
    return &r->tile[kv][case_variant(token / CASE_T, head)][token % CASE_T * r->dim];
}

/* New rows [n][heads][dim] at positions first.. of every KV head. */
static void case_new_rows(const case_rows *r, int kv, uint32_t first, uint32_t n, float *out) {
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t h = 0; h < CASE_KV_HEADS; h++)
            memcpy(out + ((size_t)i * CASE_KV_HEADS + h) * r->dim, case_row(r, kv, h, first + i),
                   r->dim * sizeof(float));
}

/* Queries [n][heads][dim], large enough that some tokens get far more weight than others. */
static void case_queries(uint32_t n_floats, float *q) {
    for (uint32_t i = 0; i < n_floats; i++) q[i] = 4 * bench_noise();
}

/* Attention of one query [dim] over the first n_tokens of a head in double precision. */
static void case_reference(const case_rows *r, uint32_t head, uint32_t n_tokens, const float *q,
                           double *out) {
    double sum = 0, scale = 1 / sqrt((double)r->dim);
    uint32_t n_blocks = (n_tokens + CASE_T - 1) / CASE_T;
    memset(out, 0, r->dim * sizeof *out);
    for (uint32_t b = 0; b < n_blocks && b < CASE_VARIANTS; b++) /* blocks b, b + VARIANTS, ... are equal */
        for (uint32_t t = 0; t < CASE_T; t++) {
            uint32_t token = b * CASE_T + t, period = CASE_VARIANTS * CASE_T;
            if (token >= n_tokens) break;
            const float *k = case_row(r, 0, head, token), *v = case_row(r, 1, head, token);
            double s = 0;
            for (uint32_t d = 0; d < r->dim; d++) s += (double)q[d] * k[d];
            double w = exp(s * scale) * ((n_tokens - token - 1) / period + 1);
            for (uint32_t d = 0; d < r->dim; d++) out[d] += w * v[d];
            sum += w;
        }
    for (uint32_t d = 0; d < r->dim; d++) out[d] /= sum;
}

/* Largest over a few rows of the root mean square of out - reference, relative to the reference's. q, out:
 * [n_rows][heads][dim]; row i stands at position first + i. One query head of each KV head is looked at. */
static double case_error(const case_rows *r, uint32_t gqa, uint32_t first, uint32_t n_rows, const float *q,
                         const float *out) {
    double want[CASE_MAX_DIM], worst = 0;
    uint32_t looked[3] = {0, n_rows / 2, n_rows - 1};
    for (int i = 0; i < 3; i++) {
        double error = 0, norm = 0;
        for (uint32_t h = 0; h < CASE_KV_HEADS; h++) {
            size_t at = ((size_t)looked[i] * CASE_KV_HEADS * gqa + h * gqa + h % gqa) * r->dim;
            case_reference(r, h, first + looked[i] + 1, q + at, want);
            for (uint32_t d = 0; d < r->dim; d++) {
                double e = (double)out[at + d] - want[d];
                error += e * e;
                norm += want[d] * want[d];
            }
        }
        if (!(sqrt(error / norm) <= worst)) worst = sqrt(error / norm); /* NaN too */
    }
    return worst;
}

/* ---- kvlite ---- */
typedef struct case_cache {
    const case_rows *rows;
    kvl_cache *cache;
    kvl_seq seq;
    const kvl_step *step; /* open: the rows to be attended */
    uint32_t gqa, n_context, n_new;
    size_t bytes;     /* of the blocks that hold context and new rows */
    float *k, *v, *q; /* of the new rows; q is borrowed */
    float *out;       /* [n_new][heads][dim] */
} case_cache;

typedef struct case_tiles {
    size_t size[2]; /* K, V */
    uint8_t *at[2]; /* CASE_VARIANTS of them */
} case_tiles;

static void case_die(const char *what, const char *why) {
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static void *case_alloc(size_t n) {
    void *p = aligned_alloc(4096, (n + 4095) & ~(size_t)4095);
    if (!p) case_die("no memory", "for the data of this context");
    madvise(p, n, MADV_HUGEPAGE); /* kvlite asks for them too */
    return p;
}

/* Every variant as a tile, by way of the exact format, as kvlite rounds it. */
static case_tiles case_encode(const case_rows *r, kvl_format exact, kvl_format k, kvl_format v) {
    case_tiles t;
    float *rounded = case_alloc(CASE_T * CASE_MAX_DIM * sizeof(float));
    uint8_t *tile = case_alloc(kvl_tile_bytes(exact, CASE_T, r->dim));
    for (int kv = 0; kv < 2; kv++) {
        kvl_format f = kv ? v : k;
        t.size[kv] = kvl_tile_bytes(f, CASE_T, r->dim);
        t.at[kv] = case_alloc(t.size[kv] * CASE_VARIANTS);
        for (int i = 0; i < CASE_VARIANTS; i++)
            if (kvl_tile_encode(exact, CASE_T, r->dim, 0, r->tile[kv][i], tile) != KVL_OK ||
                kvl_tile_decode(exact, CASE_T, r->dim, 0, tile, false, rounded) != KVL_OK ||
                kvl_tile_encode(f, CASE_T, r->dim, 0, rounded, t.at[kv] + t.size[kv] * i) != KVL_OK)
                case_die("kvl_tile_encode", kvl_format_name(f));
    }
    free(rounded);
    free(tile);
    return t;
}

static void case_check(const case_cache *c, kvl_result r, const char *call) {
    if (r != KVL_OK) case_die(call, c->cache ? kvl_last_error(c->cache) : kvl_result_name(r));
}

static void case_step(case_cache *c, uint32_t n_rows) {
    static const int32_t tokens[1024];
    kvl_span span = {.seq = c->seq, .tokens = tokens, .n_tokens = n_rows};
    case_check(c, kvl_step_begin(c->cache, &span, 1, &c->step), "kvl_step_begin");
}

/* Writes the blocks of the open step. */
static void case_write(case_cache *c, const case_tiles tiles[2], const kvl_block_layout layout[2]) {
    const kvl_span_blocks *b = &c->step->blocks[0];
    for (uint32_t i = 0; i < b->n_own; i++) {
        uint32_t block = b->first_own + i, entry = b->table[block];
        int exact = (entry & KVL_ENTRY_EXACT) != 0;
        const kvl_block_layout *L = &layout[exact];
        const case_tiles *t = &tiles[exact];
        uint8_t *at = (uint8_t *)(uintptr_t)c->step->block_address[entry & KVL_ENTRY_ID] + L->layer_offset;
        for (uint32_t h = 0; h < CASE_KV_HEADS; h++) {
            uint32_t v = case_variant(block, h);
            memcpy(at + h * L->head_stride, t->at[0] + v * t->size[0], t->size[0]);
            memcpy(at + h * L->head_stride + L->v_offset, t->at[1] + v * t->size[1], t->size[1]);
        }
    }
}

static void case_lay_down(case_cache *c, const kvl_preset *p) {
    case_tiles tiles[2] = {case_encode(c->rows, p->exact, p->k, p->v),
                           case_encode(c->rows, p->exact, p->exact, p->exact)};
    kvl_block_layout layout[2];
    for (int exact = 0; exact < 2; exact++)
        case_check(c, kvl_cache_layout(c->cache, 0, exact, &layout[exact]), "kvl_cache_layout");
    for (uint32_t at = 0; at < c->n_context; at += CASE_STEP) {
        case_step(c, c->n_context - at < CASE_STEP ? c->n_context - at : CASE_STEP);
        case_write(c, tiles, layout);
        case_check(c, kvl_step_layer_done(c->cache, c->step, 0, NULL), "kvl_step_layer_done");
        case_check(c, kvl_step_end(c->cache, c->step), "kvl_step_end");
    }
    for (int i = 0; i < 4; i++) free(tiles[i / 2].at[i % 2]);
}

/* A cache with n_context tokens, and a step of n_new rows to come after them. q [n_new][heads][dim] must outlive
 * it. */
static void case_open(case_cache *c, kvl_context *ctx, const case_rows *rows, const kvl_preset *p,
                      uint32_t gqa, uint32_t n_context, uint32_t n_new, float *q) {
    char error[256] = "";
    uint32_t n = n_context + n_new, heads = CASE_KV_HEADS * gqa;
    size_t f32 = (size_t)(n + 4 * CASE_T) * CASE_KV_HEADS * rows->dim * 2 * sizeof(float);
    kvl_cache_desc d = {.context = ctx,
                        .geometry = {.n_layers = 1,
                                     .n_q_heads = heads,
                                     .n_kv_heads = CASE_KV_HEADS,
                                     .k_dim = rows->dim,
                                     .block_tokens = CASE_T,
                                     .preset = p->name},
                        .device_bytes = f32 + f32 / 8 + (64u << 20),
                        .max_sequences = 1,
                        .max_seq_tokens = n,
                        .max_step_tokens = n_new > CASE_STEP ? n_new : CASE_STEP,
                        .no_prefix_cache = true,
                        .error = error,
                        .error_size = sizeof error};
    *c = (case_cache){.rows = rows, .gqa = gqa, .n_context = n_context, .n_new = n_new, .q = q};
    if (kvl_cache_create(&d, &c->cache) != KVL_OK) case_die("kvl_cache_create", error);
    case_check(c, kvl_seq_open(c->cache, &(kvl_seq_desc){.no_match = true}, &c->seq, NULL), "kvl_seq_open");
    case_lay_down(c, p);
    size_t row = (size_t)CASE_KV_HEADS * rows->dim * sizeof(float);
    c->k = case_alloc(row * n_new);
    c->v = case_alloc(row * n_new);
    c->out = case_alloc(row * gqa * n_new);
    case_new_rows(rows, 0, n_context, n_new, c->k);
    case_new_rows(rows, 1, n_context, n_new, c->v);
    case_step(c, n_new);
    kvl_stats stats;
    kvl_get_stats(c->cache, &stats);
    c->bytes = stats.bytes_used;
    kvl_step_abort(c->cache, c->step);
}

static void case_close(case_cache *c) {
    kvl_cache_destroy(c->cache);
    free(c->k);
    free(c->v);
    free(c->out);
}

/* Appends the new rows and attends; seconds of that alone, without the bookkeeping of the step. */
static double case_attend(void *arg) {
    case_cache *c = arg;
    kvl_tensor q = {.data = c->q}, k = {.data = c->k}, v = {.data = c->v}, out = {.data = c->out};
    case_step(c, c->n_new);
    double start = runtime_now();
    case_check(c, kvl_attend(c->cache, c->step, 0, &q, &k, &v, &out), "kvl_attend");
    double s = runtime_now() - start;
    case_check(c, kvl_step_abort(c->cache, c->step), "kvl_step_abort");
    return s;
}

#endif /* ATTEND_CASE_H */
