/* store.comp, copy.comp and read.comp on lavapipe. Oracle of the bytes: kvl_tile_encode, which shares no code with the shaders,
   and tests/golden. All of the memory around is compared, too.

   usage: test_store [full]     full: every shape of every pair of formats */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "vk_run.h"
#include "../../kvlite.h"
#include "../common/golden.h"

enum {
    HEADS = 2,
    STORES = 4,
    BANKS = 4, /* 0: scratch, 1: exact blocks, 2 and 3: packed ones */
    MAX_TOKENS = 64,
    MAX_DIM = 256,
    MAX_TILE = MAX_TOKENS * MAX_DIM * 4,
    MAX_BLOCK = 1024 + HEADS * 2 * MAX_TILE,
    BANK_BYTES = STORES * MAX_BLOCK,
    INPUT_BYTES = (2 * MAX_TOKENS + 32) * HEADS * (MAX_DIM + 40) * 4 + 64,
    LAYERS = 3,
    LIST = 12 /* words before the stores in the tables */
};

static vkr run;
static vkr_bindings bound;
static uint8_t *before[BANKS], *after[BANKS]; /* the banks, and what they must become */
static bool full;

/* ---- random numbers ---- */
static uint64_t random_state = 1;
static uint32_t random32(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 32);
}
static uint32_t below(uint32_t n) { return random32() % n; }
static float uniform(void) { return (float)random32() * 0x1p-32f; }
static float power(int low, int high) { return ldexpf(1.0f, low + (int)below((uint32_t)(high - low + 1))); }

/* ---- rows; `kind` is what they are made to hit ---- */
typedef enum { NORMAL, MIDPOINTS, CONSTANTS, EXTREMES, BITS, TIES, SCALES, KINDS } row_kind;

static float any_bits(kvl_format exact) {
    for (;;) {
        uint32_t bits = random32();
        float x, limit = exact == KVL_F16 ? 65504.0f : 0x1p110f, least = exact == KVL_F16 ? 0x1p-26f : 0.0f;
        memcpy(&x, &bits, 4);
        if (isfinite(x) && fabsf(x) <= limit && fabsf(x) >= least) return x;
        if (exact == KVL_F16) return ldexpf((float)below(4096) - 2048.0f, (int)below(30) - 25);
    }
}

/* Steps of s, halves of steps, and the extremes that make s the scale: of symmetric codes, of e4m3, of unsigned ones, of
   e2m1. */
static float midpoint(uint32_t i, uint32_t group, float s, uint32_t levels) {
    static const float halves[] = {0, .25f, .5f, .75f, 1, 1.25f, 1.5f, 1.75f, 2, 2.5f, 3, 3.5f, 4, 5, 6};
    float sign = below(2) ? 1.0f : -1.0f;
    if (levels == 6) return sign * s * (i % group == 0 ? 6.0f : halves[below(15)]);
    if (levels == 448) {
        float step = power(-9, 5), m = (float)(8 + below(8)) + (below(4) ? 0.5f : 0.0f);
        return sign * s * (i % group == 0 ? 448.0f : step == 0x1p-9f ? step * (m - 8.0f) : step * m);
    }
    if (levels == 127)
        return sign * s * (i % group == 0 ? 127.0f : (float)below(127) + (below(4) ? 0.5f : 0.0f));
    if (i % group < 2) return i % group ? s * (float)levels : 0.0f;
    return s * ((float)below(levels) + (below(4) ? 0.5f : 0.0f));
}

/* Groups of 16 whose squared errors under the two scales of NVFP4 (peaks 6 and 4) are the same numbers in another order:
   which sum is the lesser depends on how each was rounded. */
static void make_ties(float *x, size_t n) {
    for (size_t g = 0; g < n; g += 16) {
        float s = power(-6, 3);
        x[g] = 6 * s;
        x[g + 15] = 0;
        for (size_t i = 1; i < 15; i += 2) {
            float d = uniform() / 8;
            x[g + i] = s * (0.5f + d);
            x[g + i + 1] = s * (0.75f - (x[g + i] / s - 0.5f));
        }
        for (size_t i = 14; i > 1; i--) {
            size_t j = g + 1 + below((uint32_t)i);
            float t = x[g + i];
            x[g + i] = x[j];
            x[j] = t;
        }
    }
}

/* Groups of 16 whose largest number puts NVFP4's scale, of peak 6 or 4, at what lies between two codes of e4m3, or one or two
   steps of f32 beside it: how 1 / global was rounded shows. */
static void make_scales(float *x, size_t n, float global) {
    for (size_t g = 0; g < n; g += 16) {
        float middle = ((float)(8 + below(8)) + 0.5f) * power(-6, 3);
        x[g] = middle * global * (below(2) ? 6.0f : 4.0f);
        for (uint32_t i = below(5); i > 0; i--) x[g] = nextafterf(x[g], below(2) ? 0.0f : 1e30f);
        for (size_t i = 1; i < 16; i++) x[g + i] = x[g] * uniform() * 0.9f;
    }
}

static void make_rows(row_kind kind, kvl_format exact, uint32_t tokens, uint32_t dim, float global,
                      float *x) {
    static const float extremes[] = {65504,     -65504,   0x1p-24f, -0x1p-24f, 0x1.ff8p-15f, 0x1p-14f,
                                     -65472.0f, 32768.0f, 0.0f,     -0.0f,     1.0f,         1.0009765625f};
    static const uint32_t levels[] = {6, 15, 127, 255, 448};
    bool by_channel = below(2), mixed_zeros = below(2);
    uint32_t level = levels[below(5)], one = below(12);
    float channel[MAX_DIM];
    for (uint32_t e = 0; e < dim; e++) channel[e] = power(-3, 3);
    for (uint32_t t = 0; t < tokens; t++) {
        float row = power(-12, 9), step = (float)(1 + below(4)) * power(-12, 3),
              constant = uniform() * power(-20, 14);
        uint32_t style = below(4), group = level == 6 ? 16 : by_channel ? tokens : dim;
        for (uint32_t e = 0; e < dim; e++) {
            float *v = &x[t * dim + e], s = by_channel ? channel[e] : step;
            if (kind == NORMAL)
                *v = (uniform() + uniform() + uniform() + uniform() - 2.0f) * row * channel[e];
            if (kind == MIDPOINTS) *v = midpoint(by_channel ? t : e, group, s, level);
            if (kind == CONSTANTS && style == 0) *v = mixed_zeros && below(2) ? -0.0f : 0.0f;
            if (kind == CONSTANTS && style == 1) *v = below(2) ? -0.0f : 0.0f;
            if (kind == CONSTANTS && style == 2) *v = constant;
            if (kind == CONSTANTS && style == 3) *v = e == one ? -constant : constant;
            if (kind == EXTREMES) *v = extremes[style ? below(12) : one];
            if (kind == BITS) *v = any_bits(exact);
        }
    }
    if (kind == TIES) make_ties(x, (size_t)tokens * dim);
    if (kind == SCALES) make_scales(x, (size_t)tokens * dim, global);
}

static void encode(kvl_format f, uint32_t tokens, uint32_t dim, float global, const float *rows,
                   uint8_t *tile) {
    assert_int_equal(kvl_tile_encode(f, tokens, dim, global, rows, tile), KVL_OK);
}

static void round_rows(kvl_format f, uint32_t tokens, uint32_t dim, float *rows) {
    static uint8_t tile[MAX_TILE];
    encode(f, tokens, dim, 0, rows, tile);
    assert_int_equal(kvl_tile_decode(f, tokens, dim, 0, tile, false, rows), KVL_OK);
}

static size_t number_bytes(kvl_format f) { return f == KVL_F32 ? 4 : 2; }

/* ---- one launch: a whole block; the end of a block and its seal; rows inside of one; one row into a scratch slot and no
   seal ---- */
typedef struct formats {
    const char *name;
    kvl_format k, v, exact;
} formats;

typedef struct store_case {
    formats f;
    uint32_t tokens, dim;
    kvl_format dtype;
    row_kind kind;
    uint32_t misaligned, n_rows; /* elements; rows of k and v */
    kvli_vk_layer layer;
    kvli_gpu_store stores[STORES];
    kvli_vk_tensor in[2];
} store_case;

static kvl_format format_of(const store_case *t, bool packed, int side) {
    return !packed ? t->f.exact : side ? t->f.v : t->f.k;
}

static void plan_layer(store_case *t) {
    static const float globals[] = {1.0f / 16, 0.02f, 1.0f, 3.7f, 0x1p-8f, 1.7e-5f};
    for (int c = 0; c < 2; c++) {
        size_t k = kvl_tile_bytes(format_of(t, c == 0, 0), t->tokens, t->dim);
        size_t v = kvl_tile_bytes(format_of(t, c == 0, 1), t->tokens, t->dim);
        t->layer.offset[c] = 8 * (1 + below(4));
        t->layer.v_offset[c] = (uint32_t)k / 16;
        t->layer.head_stride[c] = (uint32_t)(k + v) / 16;
    }
    t->layer.k_global = globals[below(6)];
    t->layer.v_global = globals[below(6)];
}

static void plan_stores(store_case *t) {
    uint32_t inside = 1 + below(t->tokens - 2);
    uint32_t at[STORES] = {0, inside, 2, t->tokens - 1}, n[STORES] = {t->tokens, t->tokens - inside, 3, 1};
    for (uint32_t i = 0; i < STORES; i++) {
        uint64_t offset = (uint64_t)i * MAX_BLOCK + 128 * below(4);
        uint64_t exact = i % 2 ? KVLI_GPU_EXACT | KVLI_GPU_SCRATCH : (uint64_t)1 << 32 | KVLI_GPU_EXACT;
        t->stores[i].exact = exact | offset;
        t->stores[i].sealed =
            i < 2 ? (uint64_t)(2 + i) << 32 | (i ? 0 : offset) : 0; /* one at the start of a bank */
        t->stores[i].span = STORES - 1 - i;
        t->stores[i].row = t->n_rows;
        t->stores[i].n_rows = n[i];
        t->stores[i].at = at[i];
        t->n_rows += n[i] + below(3);
    }
}

/* Where a tile stands in a bank. */
static uint8_t *tile_of(const store_case *t, uint8_t *const *banks, uint64_t entry, bool packed,
                        uint32_t head, int side) {
    uint32_t c = packed ? 0 : 1;
    size_t units = (uint32_t)entry / 128 * 8 + (entry & KVLI_GPU_SCRATCH ? 0 : t->layer.offset[c]) +
                   head * t->layer.head_stride[c] + (side ? t->layer.v_offset[c] : 0);
    return banks[entry >> 32] + units * 16;
}

static void plan_tensor(store_case *t, int side, bool wide) {
    kvli_vk_tensor *in = &t->in[side];
    in->offset = 8 + t->misaligned;
    in->head_stride = t->dim + (wide ? 16 : 0);
    in->row_stride = HEADS * in->head_stride + (wide ? 8 : 0) + (t->misaligned > 1 ? 1 : 0);
    in->dtype = t->dtype - KVL_F32;
    memset((side ? bound.b : bound.a).map, 0xff, INPUT_BYTES);
}

static uint8_t *input_row(const store_case *t, int side, uint32_t row, uint32_t head) {
    const kvli_vk_tensor *in = &t->in[side];
    return (side ? bound.b : bound.a).map +
           (in->offset + row * in->row_stride + head * in->head_stride) * number_bytes(t->dtype);
}

/* What the CPU makes of one tile: its rows in the input, in the exact tile before and after, and sealed. */
static void expect_tile(store_case *t, uint32_t store, uint32_t head, int side) {
    static float rows[MAX_TOKENS * MAX_DIM];
    static uint8_t numbers[MAX_TILE], tile[MAX_TILE];
    const kvli_gpu_store *s = &t->stores[store];
    kvl_format exact = t->f.exact, narrow = t->dtype == KVL_F16 ? (kvl_format)KVL_F16 : exact;
    size_t in_row = t->dim * number_bytes(t->dtype), row = t->dim * number_bytes(exact),
           n = (size_t)t->tokens * t->dim;
    uint8_t *old = tile_of(t, before, s->exact, false, head, side),
            *new = tile_of(t, after, s->exact, false, head, side);
    float global = side ? t->layer.v_global : t->layer.k_global;
    make_rows(t->kind, narrow, t->tokens, t->dim, global, rows);
    round_rows(t->dtype, t->tokens, t->dim, rows);
    for (size_t i = 0; i < n && narrow == KVL_F16;
         i++) /* bfloat16 near the largest half would round beyond it */
        if (fabsf(rows[i]) > 65504.0f) rows[i] = copysignf(65024.0f, rows[i]);
    encode(t->dtype, t->tokens, t->dim, 0, rows, numbers);
    encode(exact, t->tokens, t->dim, 0, rows, tile);
    for (uint32_t r = 0; r < s->n_rows; r++)
        memcpy(input_row(t, side, s->row + r, head), numbers + (s->at + r) * in_row, in_row);
    if (s->sealed) memcpy(old, tile, s->at * row); /* rows of earlier steps */
    memcpy(new, old, s->at * row);
    memcpy(new + s->at *row, tile + s->at * row, s->n_rows * row);
    if (!s->sealed) return;
    round_rows(exact, t->tokens, t->dim, rows);
    encode(format_of(t, true, side), t->tokens, t->dim, global, rows,
           tile_of(t, after, s->sealed, true, head, side));
}

static void fill_banks(uint8_t byte) {
    for (int b = 0; b < BANKS; b++) {
        memset(before[b], byte, BANK_BYTES);
        memset(after[b], byte, BANK_BYTES);
    }
}

static void compare_banks(const char *what, const store_case *t) {
    for (int b = 0; b < BANKS; b++) {
        const uint8_t *got = bound.pages[b].map;
        size_t i = 0;
        if (memcmp(got, after[b], BANK_BYTES) == 0) continue;
        while (got[i] == after[b][i]) i++;
        if (!t) fail_msg("%s: bank %d, byte %zu: %02x, not %02x", what, b, i, got[i], after[b][i]);
        fail_msg(
            "%s %s, kind %d, %u tokens of %u, dtype %u + %u: bank %d, block %zu, byte %zu: %02x, not %02x",
            what, t->f.name, (int)t->kind, t->tokens, t->dim, t->dtype, t->misaligned, b, i / MAX_BLOCK,
            i % MAX_BLOCK, got[i], after[b][i]);
    }
}

static kvli_vk_push push_of(const store_case *t) {
    kvli_vk_push push;
    memset(&push, 0, sizeof push);
    push.a = t->in[0];
    push.b = t->in[1];
    push.layer = 1;
    push.list = LIST;
    push.n = STORES;
    push.n_kv_heads = HEADS;
    return push;
}

/* What stores blocks: one pipeline, or one that writes rows and one that seals. */
typedef struct storer {
    vkr_pipeline p[2];
    uint32_t n;
} storer;

/* Dispatches the stores, at once or in two turns. */
static void launch(const store_case *t, storer *by) {
    kvli_vk_push push = push_of(t);
    for (int b = 0; b < BANKS; b++) memcpy(bound.pages[b].map, before[b], BANK_BYTES);
    memset(bound.layers.map, 0xff, bound.layers.bytes);
    memcpy(bound.layers.map + sizeof t->layer, &t->layer, sizeof t->layer);
    memcpy(bound.tables.map + LIST * 4, t->stores, sizeof t->stores);
    memset(bound.taint.map, 0, STORES * 4);
    for (uint32_t i = 0; i < by->n; i++) {
        push.first = 0;
        if (below(2)) {
            vkr_dispatch(&run, &by->p[i], &bound, &push, STORES + 1, HEADS, 2); /* more than there are */
            continue;
        }
        vkr_dispatch(&run, &by->p[i], &bound, &push, 1, HEADS, 2);
        push.first = 1;
        vkr_dispatch(&run, &by->p[i], &bound, &push, STORES - 1, HEADS, 2);
    }
}

static uint32_t taint_of(uint32_t span) {
    uint32_t word;
    memcpy(&word, bound.taint.map + span * 4, 4);
    return word;
}

static void run_store(storer *by, const formats *f, uint32_t tokens, uint32_t dim, row_kind kind) {
    store_case t;
    memset(&t, 0, sizeof t);
    t.f = *f;
    t.tokens = tokens;
    t.dim = dim;
    t.kind = kind;
    t.dtype = kind == SCALES && f->exact == KVL_F32 ? (kvl_format)KVL_F32 : (kvl_format)(KVL_F32 + below(3));
    t.misaligned = below(3);
    plan_layer(&t);
    plan_stores(&t);
    plan_tensor(&t, 0, below(2));
    plan_tensor(&t, 1, below(2));
    fill_banks(0xa5);
    for (uint32_t i = 0; i < STORES; i++)
        for (uint32_t h = 0; h < 2 * HEADS; h++) expect_tile(&t, i, h / 2, h % 2);
    launch(&t, by);
    compare_banks("store", &t);
    for (uint32_t i = 0; i < STORES; i++) assert_int_equal(taint_of(i), 0);
}

static vkr_pipeline make_pipeline(const char *shader, uint32_t variant, uint32_t workgroup, uint32_t parts,
                                  const formats *f, uint32_t tokens, uint32_t dim) {
    const uint32_t rotated = KVL_ROTATED;
    uint32_t spec[KVLI_VK_SPECIALISATIONS] = {0};
    spec[KVLI_VK_WORKGROUP] = workgroup;
    spec[KVLI_VK_BANKS] = BANKS;
    spec[KVLI_VK_K_FORMAT] = f->k & ~rotated;
    spec[KVLI_VK_V_FORMAT] = f->v & ~rotated;
    spec[KVLI_VK_EXACT_FORMAT] = f->exact;
    spec[KVLI_VK_ROTATED] = (f->k & rotated ? 1 : 0) | (f->v & rotated ? 2 : 0);
    spec[KVLI_VK_DIM] = dim;
    spec[KVLI_VK_BLOCK_TOKENS] = tokens;
    spec[KVLI_VK_ROWS] = spec[KVLI_VK_LANES] = 1;
    spec[KVLI_VK_PARTS] = parts;
    return vkr_pipeline_make(&run, shader, variant, spec);
}

static storer make_storer(bool split, uint32_t variant, uint32_t workgroup, const formats *f, uint32_t tokens,
                          uint32_t dim) {
    storer s;
    memset(&s, 0, sizeof s);
    s.n = split ? 2 : 1;
    s.p[0] = make_pipeline("store", variant, split ? workgroup / 8 : workgroup, split ? KVLI_VK_WRITES : 0, f,
                           tokens, dim);
    if (split) s.p[1] = make_pipeline("store", variant, workgroup, KVLI_VK_SEALS, f, tokens, dim);
    return s;
}

static void free_storer(storer *s) {
    for (uint32_t i = 0; i < s->n; i++) vkr_pipeline_free(&run, &s->p[i]);
}

static bool is_channel(kvl_format f) { return f == KVL_INT8_CHANNEL || f == KVL_INT4_CHANNEL; }

/* Each dim with one block size, workgroup and variant, in turn; all of them in the full test. */
static void run_shapes(const formats *f) {
    static const uint32_t dims[] = {64, 80, 96, 112, 128, 192, 240, 256}, tokens[] = {32, 64, 16},
                          groups[] = {128, 32, 64};
    static uint32_t turn;
    uint32_t n_tokens = is_channel(f->k) ? 2 : 3;
    for (uint32_t d = 0; d < 8; d++) {
        for (uint32_t i = 0; i < (full ? 18 : 1); i++, turn++) {
            uint32_t T = tokens[turn % n_tokens], group = groups[turn / 3 % 3];
            storer by;
            if (!full && (d + turn / 8) % 2) continue;
            by = make_storer(turn / 2 % 2, turn % 2 ? KVLI_VK_STORAGE16 : 0, group, f, T, dims[d]);
            for (int kind = 0; kind < KINDS; kind++) run_store(&by, f, T, dims[d], (row_kind)kind);
            free_storer(&by);
        }
    }
}

static void test_presets(void **state) {
    uint32_t n;
    const kvl_preset *presets = kvl_presets(&n);
    (void)state;
    random_state = 12345;
    for (uint32_t i = 0; i < n; i++) {
        formats f = {presets[i].name, presets[i].k, presets[i].v, presets[i].exact};
        run_shapes(&f);
    }
}

static void test_other_pairs(void **state) {
    const kvl_format rotated = KVL_ROTATED;
    const formats others[] = {
        {"int8+rot / fp8+rot of f32", KVL_INT8 | rotated, KVL_FP8_E4M3 | rotated, KVL_F32},
        {"nvfp4 / int4 of bf16", KVL_NVFP4, KVL_INT4, KVL_BF16},
        {"nvfp4+rot / nvfp4 of f32", KVL_NVFP4 | rotated, KVL_NVFP4, KVL_F32},
        {"int4_channel / int8 of f32", KVL_INT4_CHANNEL, KVL_INT8, KVL_F32},
        {"int8_channel / f16 of bf16", KVL_INT8_CHANNEL, KVL_F16, KVL_BF16},
        {"f16 / int4+rot of f16", KVL_F16, KVL_INT4 | rotated, KVL_F16},
    };
    (void)state;
    random_state = 999;
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) run_shapes(&others[i]);
}

/* The tiles whose hashes stand in tests/golden, through the shader. */
static void run_golden(storer *by, const formats *f, int side, const golden_hash *g) {
    static float rows[MAX_TOKENS * MAX_DIM];
    kvl_format format = side ? f->v : f->k;
    store_case t;
    uint8_t *maps[BANKS];
    memset(&t, 0, sizeof t);
    t.f = *f;
    t.tokens = g->tokens;
    t.dim = g->dim;
    t.dtype = KVL_F32;
    plan_layer(&t);
    t.layer.k_global = t.layer.v_global = g->global > 0 ? g->global : 1.0f / 16;
    plan_stores(&t);
    plan_tensor(&t, 0, false);
    plan_tensor(&t, 1, false);
    golden_rows(g->pattern, format & ~(kvl_format)KVL_ROTATED, g->tokens, g->dim, rows);
    for (uint32_t r = 0; r < g->tokens; r++) memcpy(input_row(&t, side, r, 1), rows + r * g->dim, g->dim * 4);
    fill_banks(0xa5);
    launch(&t, by);
    for (int b = 0; b < BANKS; b++) maps[b] = bound.pages[b].map;
    if (golden_fnv(tile_of(&t, maps, t.stores[0].sealed, true, 1, side), g->bytes) != g->hash)
        fail_msg("%s, pattern %u, %u tokens of %u: not the golden tile", g->format, g->pattern, g->tokens,
                 g->dim);
}

static void test_golden(void **state) {
    const kvl_format rotated = KVL_ROTATED;
    const formats pairs[] = {
        {"", KVL_INT8, KVL_INT8 | rotated, KVL_F32},
        {"", KVL_INT8_CHANNEL, KVL_FP8_E4M3, KVL_F32},
        {"", KVL_NVFP4, KVL_NVFP4 | rotated, KVL_F32},
        {"", KVL_INT4_CHANNEL, KVL_INT4, KVL_F32},
        {"", KVL_INT4 | rotated, KVL_FP8_E4M3 | rotated, KVL_F32},
        {"", KVL_BF16, KVL_F16, KVL_F32},
    };
    uint32_t checked = 0;
    (void)state;
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
        for (uint32_t dim = 80; dim <= 128; dim += 48) {
            storer by = make_storer(false, 0, KVLI_VK_STORE_WORKGROUP, &pairs[i], 32, dim);
            for (size_t j = 0; j < sizeof golden_hashes / sizeof golden_hashes[0]; j++) {
                const golden_hash *g = &golden_hashes[j];
                for (int side = 0; side < 2 && g->tokens == 32 && g->dim == dim; side++) {
                    if (kvl_format_from_name(g->format) != (side ? pairs[i].v : pairs[i].k)) continue;
                    run_golden(&by, &pairs[i], side, g);
                    checked++;
                }
            }
            free_storer(&by);
        }
    }
    print_message("%u golden tiles\n", checked);
    assert_true(checked > 100);
}

/* A number that is not finite after rounding taints its span and no other; it is stored as it is. */
static void run_taint(storer *by, kvl_format exact, uint32_t dim) {
    const float bad[] = {INFINITY, -INFINITY, NAN, 65520.0f, -1e30f, 3.4e38f};
    static float one[16 * MAX_DIM], back[16 * MAX_DIM];
    static uint8_t tile[MAX_TILE];
    uint32_t store = below(STORES), head = below(HEADS), e = below(dim), row;
    int side = (int)below(2);
    store_case t;
    uint8_t *maps[BANKS];
    memset(&t, 0, sizeof t);
    t.f = (formats){"taint", KVL_INT8, KVL_INT8, exact};
    t.tokens = 16;
    t.dim = dim;
    t.dtype = (kvl_format)(KVL_F32 + below(3));
    t.misaligned = below(2);
    plan_layer(&t);
    plan_stores(&t);
    for (uint32_t i = 0; i < 16 * dim; i++) one[i] = 1.0f;
    encode(t.dtype, 16, dim, 0, one, tile);
    for (int s = 0; s < 2; s++) {
        plan_tensor(&t, s, false);
        for (uint32_t r = 0; r < t.n_rows; r++)
            for (uint32_t h = 0; h < HEADS; h++)
                memcpy(input_row(&t, s, r, h), tile, dim * number_bytes(t.dtype));
    }
    one[e] = bad[below(6)];
    encode(t.dtype, 16, dim, 0, one, tile);
    row = below(t.stores[store].n_rows);
    memcpy(input_row(&t, side, t.stores[store].row + row, head), tile, dim * number_bytes(t.dtype));
    fill_banks(0);
    launch(&t, by);
    round_rows(t.dtype, 16, dim, one);
    round_rows(exact, 16, dim, one);
    for (uint32_t s = 0; s < STORES; s++)
        assert_int_equal(taint_of(s), s == t.stores[store].span && !isfinite(one[e]));
    for (int b = 0; b < BANKS; b++) maps[b] = bound.pages[b].map;
    memcpy(tile, tile_of(&t, maps, t.stores[store].exact, false, head, side), 16 * dim * number_bytes(exact));
    assert_int_equal(kvl_tile_decode(exact, 16, dim, 0, tile, false, back), KVL_OK);
    row = (t.stores[store].at + row) * dim + e;
    assert_true(isnan(one[e]) ? isnan(back[row]) : back[row] == one[e]);
}

static void test_taint(void **state) {
    const kvl_format exacts[] = {KVL_F32, KVL_F16, KVL_BF16};
    (void)state;
    random_state = 77;
    for (uint32_t i = 0; i < 6; i++) {
        formats f = {"taint", KVL_INT8, KVL_INT8, exacts[i % 3]};
        uint32_t dim = i % 2 ? 64 : 80;
        storer by = make_storer(i % 2, i < 3 ? 0 : KVLI_VK_STORAGE16, KVLI_VK_STORE_WORKGROUP, &f, 16, dim);
        for (uint32_t n = 0; n < 30; n++) run_taint(&by, f.exact, dim);
        free_storer(&by);
    }
}

/* ---- copies and the reading of benchmarks ---- */
static const formats none = {"", KVL_F16, KVL_F16, KVL_F16};

static void fill_random(void) {
    for (int b = 0; b < BANKS; b++) {
        for (uint32_t i = 0; i < BANK_BYTES; i += 4) {
            uint32_t word = random32();
            memcpy(before[b] + i, &word, 4);
        }
        memcpy(after[b], before[b], BANK_BYTES);
    }
}

static void test_copy(void **state) {
    (void)state;
    random_state = 5;
    fill_random();
    for (uint32_t round = 0; round < 40; round++) {
        enum { N = 5, ROOM = 48 * 1024 };
        vkr_pipeline p = make_pipeline("copy", 0, round % 2 ? 64 : 128, 0, &none, 16, 64);
        kvli_gpu_copy copies[N];
        kvli_vk_push push;
        memset(&push, 0, sizeof push);
        push.list = LIST;
        push.first = below(2);
        push.n = 1 + below(N);
        for (int b = 0; b < BANKS; b++) {
            memcpy(after[b], before[b], BANK_BYTES);
            memcpy(bound.pages[b].map, before[b], BANK_BYTES);
        }
        for (uint32_t i = 0; i < N; i++) { /* sources in the first half of the banks, copies in the second */
            uint32_t bytes = 16 * below(round % 2 ? 40 : ROOM / 16 - 8),
                     from = (N - 1 - i) * ROOM + 16 * below(8);
            uint32_t to = BANK_BYTES / 2 + i * ROOM + 16 * below(8), from_bank = below(BANKS),
                     to_bank = below(BANKS);
            copies[i].dst = (uint64_t)to_bank << 32 | to;
            copies[i].src = (uint64_t)from_bank << 32 | from;
            copies[i].bytes = bytes;
            if (i >= push.first && i < push.n) memcpy(after[to_bank] + to, before[from_bank] + from, bytes);
        }
        memcpy(bound.tables.map + LIST * 4, copies, sizeof copies);
        vkr_dispatch(&run, &p, &bound, &push, N, 1 + below(4), 1);
        compare_banks("copy", NULL);
        vkr_pipeline_free(&run, &p);
    }
}

static void test_read(void **state) {
    vkr_pipeline p = make_pipeline("read", 0, 128, 0, &none, 16, 64);
    (void)state;
    random_state = 8;
    fill_random();
    for (int b = 0; b < BANKS; b++) memcpy(bound.pages[b].map, before[b], BANK_BYTES);
    for (uint32_t round = 0; round < 20; round++) {
        uint32_t start = 16 * below(1000), bytes = 16 * (round ? 1 + below(40000) : 1), want = 0;
        kvli_vk_push push;
        memset(&push, 0, sizeof push);
        push.first = below(BANKS);
        push.list = start / 16;
        push.n = bytes / 16;
        for (uint32_t i = 0; i < bytes; i += 4) {
            uint32_t word;
            memcpy(&word, before[push.first] + start + i, 4);
            want += word;
        }
        memset(bound.taint.map, 0, 8);
        vkr_dispatch(&run, &p, &bound, &push, 1 + below(5), 1, 1);
        assert_int_equal(taint_of(0), want);
        assert_int_equal(taint_of(1), 0);
    }
    vkr_pipeline_free(&run, &p);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_presets), cmocka_unit_test(test_other_pairs), cmocka_unit_test(test_golden),
        cmocka_unit_test(test_taint),   cmocka_unit_test(test_copy),        cmocka_unit_test(test_read),
    };
    int failed;
    full = argc > 1 && strcmp(argv[1], "full") == 0;
    if (!vkr_open(&run, 256, false)) return 77;
    for (int b = 0; b < BANKS; b++) {
        bound.pages[b] = vkr_buffer_make(&run, BANK_BYTES, NULL);
        before[b] = (uint8_t *)malloc(BANK_BYTES);
        after[b] = (uint8_t *)malloc(BANK_BYTES);
        assert_true(before[b] && after[b]);
    }
    bound.tables = vkr_buffer_make(&run, 4096, NULL);
    bound.layers = vkr_buffer_make(&run, LAYERS * sizeof(kvli_vk_layer), NULL);
    bound.taint = vkr_buffer_make(&run, STORES * 4, NULL);
    bound.a = vkr_buffer_make(&run, INPUT_BYTES, NULL);
    bound.b = vkr_buffer_make(&run, INPUT_BYTES, NULL);
    failed = cmocka_run_group_tests(tests, NULL, NULL);
    vkr_close(&run);
    for (int b = 0; b < BANKS; b++) {
        free(before[b]);
        free(after[b]);
    }
    return failed;
}
