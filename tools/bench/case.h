/* case.h - a cache on a GPU whose sequences hold a context, ready for steps of new rows with tensors on the device. What is of one
 * backend stands in cuda_case.h and vulkan_case.h, which include this after their case_device, case_buffer and
 * CASE_PROGRAM, and define the functions declared below.
 *
 * The context is not computed: its blocks are copies of a few encoded ones, written where the cache's layout says. Small
 * contexts get many layers, and a step runs all of them, so that what it reads is larger than the GPU's own cache. */
#ifndef CASE_H
#define CASE_H

#include "kvlite.h"

#include "bench_rows.h"

enum {
    CASE_T = 32,
    CASE_DIM = 128,
    CASE_KV_HEADS = 8,
    CASE_BATCH = 256,
    CASE_VARIANTS = 4,
    CASE_LAYERS = 64
};

typedef struct case_shape {
    const char *preset;
    uint32_t batch, context, gqa; /* sequences; tokens that each holds; query heads a KV head */
    uint32_t rows;                /* new ones of each sequence, 1 = decode */
    uint32_t dim;                 /* 0: CASE_DIM */
} case_shape;

typedef struct case_cache {
    const case_device *g;
    case_shape shape;
    kvl_cache *cache;
    kvl_seq seqs[CASE_BATCH];
    uint32_t n_layers;
    case_buffer q, k, v, out;
    uint64_t bytes; /* of KV with its scales that a decode step reads in each layer */
} case_cache;

/* The next cache that is opened takes tensors in host memory too. */
static bool case_host_tensors;

/* ---- of a backend ---- */
static case_buffer case_alloc(const case_device *g, size_t bytes);
static case_buffer case_uploaded(const case_device *g, const void *from, size_t bytes);
static void case_free(const case_device *g, case_buffer b);
static void case_sync(const case_device *g);
static uint64_t case_room(const case_device *g); /* bytes free on the device */
/* Bytes from `at` of a buffer on into the block at this address of the step's. */
static void case_put(const case_cache *c, uint64_t block, case_buffer from, uint64_t at, size_t bytes);
static kvl_tensor case_rows(case_buffer b); /* in F16 */
/* What `which` sequences get in a step, alone or with others; [n][rows][heads][dim] in F16. */
static void case_answer(case_cache *c, const uint32_t *which, uint32_t n, uint16_t *out);

static void case_must(const case_cache *c, kvl_result r, const char *call) {
    if (r == KVL_OK) return;
    fprintf(stderr, CASE_PROGRAM ": %s: %s: %s\n", call, kvl_result_name(r), kvl_last_error(c->cache));
    exit(1);
}

static uint32_t case_dim(const case_shape *s) { return s->dim ? s->dim : CASE_DIM; }

static kvl_geometry case_geometry(const case_shape *s, uint32_t n_layers) {
    return (kvl_geometry){.n_layers = n_layers,
                          .n_q_heads = CASE_KV_HEADS * s->gqa,
                          .n_kv_heads = CASE_KV_HEADS,
                          .k_dim = case_dim(s),
                          .block_tokens = CASE_T,
                          .preset = s->preset};
}

/* Where tiles stand, without a device. */
static void case_layouts(const case_shape *s, uint32_t n_layers, kvl_block_layout layouts[2]) {
    case_cache c = {0};
    kvl_cache_desc d = {.context_desc = {.backend = KVL_BACKEND_NULL},
                        .geometry = case_geometry(s, n_layers),
                        .device_bytes = 4ull << 30};
    case_must(&c, kvl_cache_create(&d, &c.cache), "kvl_cache_create");
    for (int exact = 0; exact < 2; exact++)
        case_must(&c, kvl_cache_layout(c.cache, 0, exact, &layouts[exact]), "kvl_cache_layout");
    kvl_cache_destroy(c.cache);
}

/* Bytes of all blocks that the shape takes. */
static uint64_t case_block_bytes(const case_shape *s, uint32_t n_layers) {
    kvl_block_layout l[2];
    case_layouts(s, n_layers, l);
    uint64_t blocks = (s->context + s->rows) / CASE_T + 1;
    if (l[0].block_bytes == l[1].block_bytes) return s->batch * (blocks + 1) * l[1].block_bytes;
    return s->batch * (blocks * l[0].block_bytes + 3 * l[1].block_bytes); /* the first, the open, the next */
}

/* ---- the context ---- */

/* Whole blocks of made-up numbers on the device: CASE_VARIANTS of them, one after another. */
static case_buffer case_blocks(const case_cache *c, bool exact) {
    const kvl_preset *p = kvl_preset_find(c->shape.preset);
    const kvl_format formats[2] = {exact ? p->exact : p->k, exact ? p->exact : p->v};
    kvl_block_layout l;
    case_must(c, kvl_cache_layout(c->cache, 0, exact, &l), "kvl_cache_layout");
    uint8_t *image = malloc(CASE_VARIANTS * l.block_bytes);
    const uint32_t dim = case_dim(&c->shape);
    float rows[CASE_T * 256];
    if (!image) case_must(c, KVL_OUT_OF_HOST_MEMORY, "case_blocks");
    for (uint32_t i = 0; i < CASE_VARIANTS; i++) {
        uint8_t *first = image + i * l.block_bytes; /* layer 0's tiles; the others have the same */
        size_t bytes = CASE_KV_HEADS * l.head_stride;
        for (uint32_t tile = 0; tile < 2 * CASE_KV_HEADS; tile++) {
            for (size_t e = 0; e < CASE_T * dim; e++) rows[e] = bench_noise();
            case_must(c,
                      kvl_tile_encode(formats[tile % 2], CASE_T, dim, 0, rows,
                                      first + tile / 2 * l.head_stride + tile % 2 * l.v_offset),
                      "kvl_tile_encode");
        }
        for (size_t at = bytes; at + bytes <= l.block_bytes; at += bytes) memcpy(first + at, first, bytes);
    }
    case_buffer there = case_uploaded(c->g, image, CASE_VARIANTS * l.block_bytes);
    free(image);
    return there;
}

static const kvl_step *case_begin(case_cache *c, const uint32_t *which, uint32_t n_seqs, uint32_t n_rows) {
    static const int32_t tokens[1 << 14];
    kvl_span spans[CASE_BATCH];
    const kvl_step *step;
    for (uint32_t i = 0; i < n_seqs; i++)
        spans[i] = (kvl_span){.seq = c->seqs[which ? which[i] : i], .tokens = tokens, .n_tokens = n_rows};
    case_must(c, kvl_step_begin(c->cache, spans, n_seqs, &step), "kvl_step_begin");
    return step;
}

static void case_fill(case_cache *c, uint32_t step_rows) {
    case_buffer from[2] = {case_blocks(c, false), case_blocks(c, true)};
    kvl_block_layout l[2];
    for (int exact = 0; exact < 2; exact++) kvl_cache_layout(c->cache, 0, exact, &l[exact]);
    for (uint32_t s = 0; s < c->shape.batch; s++) {
        for (uint32_t at = 0; at < c->shape.context; at += step_rows) {
            uint32_t left = c->shape.context - at, n = 0;
            const kvl_step *step = case_begin(c, &s, 1, left < step_rows ? left : step_rows);
            const kvl_span_blocks *b = &step->blocks[0];
            for (uint32_t i = b->first_own; i < b->first_own + b->n_own; i++) {
                bool exact = (b->table[i] & KVL_ENTRY_EXACT) != 0;
                case_put(c, step->block_address[b->table[i] & KVL_ENTRY_ID], from[exact],
                         (i + s) % CASE_VARIANTS * l[exact].block_bytes, l[exact].block_bytes);
            }
            while (n < c->n_layers)
                case_must(c, kvl_step_layer_done(c->cache, step, n++, NULL), "kvl_step_layer_done");
            case_must(c, kvl_step_end(c->cache, step), "kvl_step_end");
        }
    }
    case_sync(c->g);
    for (int i = 0; i < 2; i++) case_free(c->g, from[i]);
}

/* Bytes of a tile, its scales with it, without what pads it. */
static uint64_t case_tile_bytes(kvl_format f, uint32_t dim) {
    const kvl_format base = f & ~(kvl_format)KVL_ROTATED;
    return CASE_T * kvli_row_bytes(base, dim) + kvli_scale_bytes(base, CASE_T, dim);
}

/* Bytes of one layer's KV that the step's sequences hold: whole tiles, of the open block its rows. */
static uint64_t case_kv_bytes(const case_cache *c, const kvl_step *step) {
    const kvl_preset *p = kvl_preset_find(c->shape.preset);
    const uint32_t dim = case_dim(&c->shape);
    uint64_t packed = case_tile_bytes(p->k, dim) + case_tile_bytes(p->v, dim), sum = 0,
             exact = 2 * case_tile_bytes(p->exact, dim);
    for (uint32_t s = 0; s < step->n_spans; s++) {
        const kvl_span_blocks *b = &step->blocks[s];
        for (uint32_t i = 0; i < b->first_own; i++) sum += b->table[i] & KVL_ENTRY_EXACT ? exact : packed;
        sum += exact * (step->spans[s].position % CASE_T + 1) / CASE_T;
    }
    return sum * CASE_KV_HEADS;
}

/* ---- opening and closing ---- */

static case_buffer case_tensor(const case_device *g, size_t n) { /* f16 in -1..1 */
    uint16_t *x = malloc(n * 2);
    for (size_t i = 0; x && i < n; i++) { /* sign, exponents of 2^-1 to 2^-8, any fraction */
        uint32_t r = (uint32_t)(int32_t)(bench_noise() * 2147483520.0f);
        x[i] = (uint16_t)((r & 0x83ff) | (7 + (r >> 10 & 7)) << 10);
    }
    case_buffer there = case_uploaded(g, x, n * 2);
    free(x);
    return there;
}

static void case_close(case_cache *c) {
    kvl_cache_destroy(c->cache);
    const case_buffer all[] = {c->q, c->k, c->v, c->out};
    for (int i = 0; i < 4; i++) case_free(c->g, all[i]);
    *c = (case_cache){0};
}

/* False: the device does not hold it, err says why. `extra`: bytes for what is not blocks. */
static bool case_open(case_cache *c, const case_device *g, kvl_context *ctx, const case_shape *s,
                      uint32_t n_layers, uint64_t extra, char *err, size_t n) {
    uint32_t rows = s->batch * s->rows, step_rows = 2048;
    kvl_cache_desc d = {.context = ctx,
                        .geometry = case_geometry(s, n_layers),
                        .device_bytes = case_block_bytes(s, n_layers) + extra,
                        .max_sequences = s->batch,
                        .max_seq_tokens = s->context + s->rows,
                        .max_step_tokens = rows > step_rows ? rows : step_rows,
                        .no_prefix_cache = true,
                        .device_tensors = !case_host_tensors,
                        .error = err,
                        .error_size = n};
    *c = (case_cache){.g = g, .shape = *s, .n_layers = n_layers};
    size_t heads = (size_t)rows * CASE_KV_HEADS * case_dim(s);
    if (d.device_bytes + heads * s->gqa * 4 > case_room(g))
        return llm_fail(err, n, "%.1f GB do not fit into the device's memory", (double)d.device_bytes * 1e-9);
    if (kvl_cache_create(&d, &c->cache) != KVL_OK) return false;
    for (uint32_t i = 0; i < s->batch; i++)
        case_must(c, kvl_seq_open(c->cache, &(kvl_seq_desc){.no_match = true}, &c->seqs[i], NULL),
                  "kvl_seq_open");
    case_fill(c, step_rows);
    c->q = case_tensor(g, heads * s->gqa);
    c->k = case_tensor(g, heads);
    c->v = case_tensor(g, heads);
    c->out = case_alloc(g, heads * s->gqa * 2);
    const kvl_step *step = case_begin(c, NULL, s->batch, s->rows);
    c->bytes = case_kv_bytes(c, step);
    kvl_step_abort(c->cache, step);
    return true;
}

/* ---- steps ---- */

static void case_attend(const case_cache *c, const kvl_step *step, uint32_t layer) {
    kvl_tensor q = case_rows(c->q), k = case_rows(c->k), v = case_rows(c->v), out = case_rows(c->out);
    case_must(c, kvl_attend(c->cache, step, layer, &q, &k, &v, &out), "kvl_attend");
}

/* ---- what both benchmarks list and print ---- */

static const char *const case_presets[] = {"f16",   "int8",  "fp8",      "int4",
                                           "nvfp4", "int8+", "balanced", "bf16"};
enum { CASE_PRESETS = sizeof case_presets / sizeof *case_presets };

typedef struct case_list {
    case_shape at[640];
    uint32_t n;
} case_list;

/* Where its preset is one of those asked for (null: all). */
static void case_list_add(case_list *l, const char *asked, case_shape shape) {
    if (in_list(asked, shape.preset) && l->n < sizeof l->at / sizeof *l->at) l->at[l->n++] = shape;
}

/* Bytes in so many seconds; ceiling: GB/s, 0 where it was not measured. */
static void case_row_rate(bench_out *out, double bytes, double s, double ceiling) {
    row_number(out, "us", s * 1e6);
    row_number(out, "gb_s", bytes / s * 1e-9);
    if (ceiling > 0) row_number(out, "share", bytes / s * 1e-9 / ceiling);
}

static void case_add_same(bench_out *out, const case_shape *s, const char *what, bool equal) {
    row_begin(out, "same");
    row_text(out, "preset", s->preset);
    row_text(out, "what", what);
    row_number(out, "rows", s->rows);
    row_bool(out, "equal", equal);
    row_end(out);
    if (!equal) fprintf(out->table, "NOT THE SAME: %s, %u rows: %s\n", s->preset, s->rows, what);
}

/* A second time, and the first sequence without the others, bit for bit. (Its new rows are the first in both.) */
static void case_measure_same(bench_out *out, const case_device *g, kvl_context *ctx, const case_shape *s,
                              uint64_t extra) {
    char err[LLM_ERR_LEN] = "";
    case_cache c;
    if (!case_open(&c, g, ctx, s, 1, extra, err, sizeof err)) {
        leave_out(out, s->preset, err);
        case_close(&c);
        return;
    }
    size_t one = (size_t)s->rows * CASE_KV_HEADS * s->gqa * CASE_DIM, all = one * s->batch;
    uint16_t *x = malloc(all * 2), *y = malloc(all * 2);
    const uint32_t first = 0;
    bool finite = true, some = false;
    case_answer(&c, NULL, s->batch, x);
    case_answer(&c, NULL, s->batch, y);
    for (size_t i = 0; i < all; i++) {
        finite = finite && (x[i] & 0x7c00) != 0x7c00;
        some = some || x[i] & 0x7fff;
    }
    case_add_same(out, s, "finite, not all zero", finite && some);
    case_add_same(out, s, "a second time", memcmp(x, y, all * 2) == 0);
    case_answer(&c, &first, 1, y);
    case_add_same(out, s, "without the others", memcmp(x, y, one * 2) == 0);
    free(x);
    free(y);
    case_close(&c);
}

#endif /* CASE_H */
