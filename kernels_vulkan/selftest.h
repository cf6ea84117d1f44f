/* What each shader must compute: small problems with answers that the CPU knows, for kvlite.h (>>vulkan), which tests every
   variant on its driver before it is used. The text of this file stands in the generated kvlite_vulkan_kernels.h, since what
   was found right or wrong is remembered together with the hash of all that; to others than kvlite.h it says nothing. */
#ifdef KVLI_VULKAN_PIPELINES

/* Errors that are allowed, of the sum of magnitudes that a number is made of: above what float arithmetic in any order gives,
   below what a token or a code that is wrong does. */
static const double kvli_vt_tolerance = 1e-3;
/* Two KV heads of a sequence whose blocks stand as in a cache: the first exact, others packed, those of the step's rows in
   the scratch and, what is not sealed, in a block. All regions are in one buffer that the host sees. */
enum { KVLI_VT_HEADS = 2, KVLI_VT_CASES = 12, KVLI_VT_CODES = 5 };
enum {
    KVLI_VT_SCRATCH,
    KVLI_VT_SLAB,
    KVLI_VT_TABLES,
    KVLI_VT_LAYERS,
    KVLI_VT_TAINT,
    KVLI_VT_PARTIAL_O,
    KVLI_VT_PARTIAL_ML,
    KVLI_VT_A,
    KVLI_VT_B,
    KVLI_VT_REGIONS
};
/* (Write: store, of KVLI_VK_WRITES.) */
enum {
    KVLI_VT_STORE,
    KVLI_VT_WRITE,
    KVLI_VT_DECODE,
    KVLI_VT_PREFILL,
    KVLI_VT_MERGE,
    KVLI_VT_COPY,
    KVLI_VT_SORTS
};
static const char *const kvli_vk_names[KVLI_VT_SORTS] = {"store",   "store", "decode",
                                                         "prefill", "merge", "copy"};

typedef struct kvli_vk_case {
    kvli_vk_push push;
    uint32_t groups[3];
} kvli_vk_case;

typedef struct kvli_vk_test {
    uint32_t sort;
    const uint32_t *special;
    kvl_simd simd;
    kvli_side side[2][2]; /* K, V; packed, exact */
    bool two_class;
    kvli_vk_layer layer[2]; /* plain; with window, sinks, softcap, sink logits */
    float sinks[64];        /* [KVLI_VT_HEADS * gqa] */
    uint32_t T, dim, gqa, n_rows, position, first_own, n_blocks, random;
    size_t block[2], slot, out_bytes, row_stride;
    size_t at[KVLI_VT_REGIONS + 1]; /* regions */
    uint8_t *gpu, *cpu;             /* gpu: what the shader has; cpu: what the pages must be */
    float *rows[2];                 /* decoded tiles */
    double *state;                  /* of the rows of an item: m, l, q, sum, sum of magnitudes */
    kvli_vk_case cases[KVLI_VT_CASES];
    uint32_t n_cases;
    double worst; /* error so far, in what is allowed */
    char *why;    /* [96] */
} kvli_vk_test;

static float kvli_vt_uniform(kvli_vk_test *t) { /* in -1..1 */
    t->random = t->random * 1664525u + 1013904223u;
    return (float)(int32_t)t->random * (1.0f / 2147483648.0f);
}
static float kvli_vt_normal(kvli_vk_test *t) {
    float x = kvli_vt_uniform(t) + kvli_vt_uniform(t);
    return x + kvli_vt_uniform(t);
}
static bool kvli_vt_wrong(kvli_vk_test *t, const char *what, uint32_t where, double got, double want) {
    snprintf(t->why, 96, "%s %u: %.6g, not %.6g", what, where, got, want);
    return false;
}

/* ---- where things stand ---- */
static uint64_t kvli_vt_exact(const kvli_vk_test *t, uint32_t block) {
    return 1ull << 32 | (uint64_t)(block * t->block[KVLI_EXACT]) | KVLI_GPU_EXACT;
}
static uint64_t kvli_vt_packed(const kvli_vk_test *t, uint32_t block) {
    if (!t->two_class) return kvli_vt_exact(t, block);
    return 1ull << 32 | (uint64_t)(t->n_blocks * t->block[KVLI_EXACT] + block * t->block[KVLI_PACKED]);
}
static uint64_t kvli_vt_scratch(const kvli_vk_test *t, uint32_t slot) {
    return (256 + slot * t->slot) | KVLI_GPU_EXACT | KVLI_GPU_SCRATCH;
}
static uint8_t *kvli_vt_tile(const kvli_vk_test *t, uint8_t *base, uint64_t entry, uint32_t head,
                             uint32_t v) {
    const kvli_vk_layer *l = &t->layer[0];
    int e = (entry & KVLI_GPU_EXACT) != 0;
    size_t units = (entry & KVLI_GPU_SCRATCH ? 0 : l->offset[e]) + head * l->head_stride[e];
    if (v) units += l->v_offset[e];
    return base + t->at[entry >> 32 ? KVLI_VT_SLAB : KVLI_VT_SCRATCH] + ((uint32_t)entry & ~KVLI_GPU_FLAGS) +
           units * 16;
}
static void *kvli_vt_table(const kvli_vk_test *t, uint32_t bytes) {
    return t->gpu + t->at[KVLI_VT_TABLES] + bytes;
}
enum { KVLI_VT_LIST = 0, KVLI_VT_SPANS = 4096, KVLI_VT_ENTRIES = 8192, KVLI_VT_TABLE_BYTES = 16384 };

/* Numbers of any type, as q, out and inputs have them. */
static size_t kvli_vt_size(uint32_t dtype) { return dtype == KVLI_GPU_DTYPE_F32 ? 4 : 2; }
static void kvli_vt_put(void *at, size_t i, uint32_t dtype, float x) {
    uint8_t *p = (uint8_t *)at + i * kvli_vt_size(dtype);
    if (dtype == KVLI_GPU_DTYPE_F32) memcpy(p, &x, 4);
    if (dtype == KVLI_GPU_DTYPE_F16) kvli_put16(p, kvli_f32_to_f16(x));
    if (dtype == KVLI_GPU_DTYPE_BF16) kvli_put16(p, kvli_f32_to_bf16(x));
}
static float kvli_vt_get(const void *at, size_t i, uint32_t dtype) {
    const uint8_t *p = (const uint8_t *)at + i * kvli_vt_size(dtype);
    float x;
    if (dtype == KVLI_GPU_DTYPE_F16) return kvli_f16_to_f32(kvli_get16(p));
    if (dtype == KVLI_GPU_DTYPE_BF16) return kvli_bf16_to_f32(kvli_get16(p));
    memcpy(&x, p, 4);
    return x;
}

/* Shapes, and the size of each region; the buffers are not there yet. */
static void kvli_vt_shape(kvli_vk_test *t) {
    const uint32_t *s = t->special;
    const uint32_t formats[2][2] = {{s[KVLI_VK_K_FORMAT], s[KVLI_VK_EXACT_FORMAT]},
                                    {s[KVLI_VK_V_FORMAT], s[KVLI_VK_EXACT_FORMAT]}};
    bool attends = t->sort == KVLI_VT_DECODE || t->sort == KVLI_VT_PREFILL,
         uses_dim = t->sort != KVLI_VT_COPY;
    t->dim = uses_dim ? s[KVLI_VK_DIM] : 64;
    t->T = attends || t->sort <= KVLI_VT_WRITE ? s[KVLI_VK_BLOCK_TOKENS] : 32;
    t->gqa = attends && s[KVLI_VK_ROWS] % 2 ? 1 : 2;
    t->n_rows = attends ? s[KVLI_VK_ROWS] / t->gqa : 2;
    uint32_t before = 5 + kvli_div_up(t->n_rows, t->T);
    t->position = before * t->T - t->n_rows / 2 + (t->n_rows == 1 ? 3 : 0);
    t->first_own = t->position / t->T;
    t->n_blocks = t->sort <= KVLI_VT_WRITE ? 9 : (t->position + t->n_rows - 1) / t->T + 1;
    for (uint32_t v = 0; v < 2; v++)
        for (uint32_t e = 0; e < 2; e++) {
            kvli_side *side = &t->side[v][e];
            side->format = uses_dim && t->sort != KVLI_VT_MERGE ? formats[v][e] : (uint32_t)KVL_F16;
            side->rotated = e == KVLI_PACKED && (s[KVLI_VK_ROTATED] >> v & 1);
            side->global = v ? 0.125f : 1.0f / 16;
            side->tokens = t->T;
            side->dim = t->dim;
            side->tile_bytes = kvli_tile_size(side->format, t->T, t->dim);
        }
    t->two_class = t->side[0][KVLI_PACKED].format != t->side[0][KVLI_EXACT].format;
    kvli_vk_layer *l = &t->layer[0];
    for (uint32_t e = 0; e < 2; e++) {
        size_t stride = t->side[0][e].tile_bytes + t->side[1][e].tile_bytes;
        l->offset[e] = e || !t->two_class ? 8 : 16; /* 128 and 256 bytes */
        l->v_offset[e] = (uint32_t)(t->side[0][e].tile_bytes / 16);
        l->head_stride[e] = (uint32_t)(stride / 16);
        t->block[e] = l->offset[e] * 16 + KVLI_VT_HEADS * stride;
    }
    t->slot = t->block[KVLI_EXACT];
    l->scale = 2.0f / sqrtf((float)t->dim);
    l->sink_logits = KVLI_GPU_NONE;
    l->k_global = t->side[0][0].global;
    l->v_global = t->side[1][0].global;
    t->layer[1] = *l;
    t->layer[1].window = 2 * t->T + 3;
    t->layer[1].sink_tokens = 5;
    t->layer[1].softcap = 3;
    t->layer[1].sink_logits = sizeof t->layer / 4;
    t->row_stride = KVLI_VT_HEADS * t->gqa * t->dim + 2;
    t->out_bytes = (t->n_rows * t->row_stride * 4 + 255) & ~(size_t)255;
    const size_t stored = 2 * (size_t)t->T * (KVLI_VT_HEADS * t->dim + 2) * 8,
                 parts = 64 * KVLI_VT_HEADS * (size_t)kvli_max_u32(4, t->n_rows * t->gqa / 8);
    const size_t bytes[KVLI_VT_REGIONS] = {256 + t->n_blocks * t->slot,
                                           t->n_blocks * (t->block[0] + t->block[1]) +
                                               KVLI_VT_CODES * t->block[0],
                                           KVLI_VT_TABLE_BYTES,
                                           sizeof t->layer + sizeof t->sinks,
                                           256,
                                           parts * t->dim * 4,
                                           parts * 8,
                                           2 * t->out_bytes + stored,
                                           KVLI_VT_CASES * t->out_bytes + stored};
    for (uint32_t i = 0; i < KVLI_VT_REGIONS; i++) t->at[i + 1] = (t->at[i] + bytes[i] + 255) & ~(size_t)255;
}

/* n elements of the list from `first` on. */
static kvli_vk_push *kvli_vt_case(kvli_vk_test *t, uint32_t layer, uint32_t first, uint32_t n,
                                  uint32_t list_words) {
    kvli_vk_case *c = &t->cases[t->n_cases++];
    memset(c, 0, sizeof *c);
    c->push.layer = layer;
    c->push.list = KVLI_VT_LIST / 4 + first * list_words;
    c->push.n = n;
    c->push.spans = KVLI_VT_SPANS / 4;
    c->push.entries = KVLI_VT_ENTRIES / 4;
    c->push.n_q_heads = KVLI_VT_HEADS * t->gqa;
    c->push.n_kv_heads = KVLI_VT_HEADS;
    c->push.gqa = t->gqa;
    c->groups[0] = n;
    c->groups[1] = KVLI_VT_HEADS;
    c->groups[2] = 1;
    return &c->push;
}
static kvli_vk_tensor kvli_vt_tensor(const kvli_vk_test *t, size_t byte, uint32_t dtype) {
    kvli_vk_tensor out = {(uint32_t)(byte / kvli_vt_size(dtype)), (uint32_t)t->row_stride, t->dim, dtype};
    return out;
}

/* ---- store: the bytes that the CPU writes ---- */
/* Rows of all sorts: zeros of both signs, one number, very small and large ones, ties, an outlier. */
static float kvli_vt_input(kvli_vk_test *t, uint32_t row, uint32_t e) {
    float x = kvli_vt_normal(t);
    switch (row % 8) {
    case 0: return e % 3 ? 0.0f : -0.0f;
    case 1: return 1.5f;
    case 2: return x * 1e-6f;
    case 3: return x * 20000.0f;
    case 4: return (float)((int32_t)(x * 64) * 2 + 1) * 0.5f;
    case 5: return e == 17 ? 1000.0f : x;
    case 6: return (float)(int32_t)(x * 8) * 5.9604644775390625e-8f;
    default: return x;
    }
}

/* Of each type: a block that is sealed out of the scratch, one sealed whose first rows are there, and two rows with NaN and
   infinity of another sequence. */
static void kvli_vt_store(kvli_vk_test *t) {
    kvli_gpu_store *list = (kvli_gpu_store *)kvli_vt_table(t, KVLI_VT_LIST);
    uint32_t T = t->T, n = 2 * T - 1;
    size_t stride = KVLI_VT_HEADS * t->dim + 2, bytes = n * stride * 4;
    bool seals = t->two_class && t->sort == KVLI_VT_STORE;
    for (uint32_t d = 0; d < 3; d++) {
        const kvli_gpu_store of[3] = {
            {kvli_vt_scratch(t, d), kvli_vt_packed(t, 3 * d), 2 * d, 0, T, 0},
            {kvli_vt_exact(t, 3 * d + 1), kvli_vt_packed(t, 3 * d + 1), 2 * d, T, T - 3, 3},
            {kvli_vt_exact(t, 3 * d + 2), 0, 2 * d + 1, 2 * T - 3, 2, 1}};
        kvli_vk_push *push = kvli_vt_case(t, 0, 3 * d, 3, sizeof *of / 4);
        t->cases[d].groups[2] = 2;
        memcpy(list + 3 * d, of, sizeof of);
        for (uint32_t v = 0; v < 2; v++) {
            size_t at = (size_t)(d ? bytes + (d - 1) * bytes / 2 : 0);
            uint8_t *to = t->gpu + t->at[v ? KVLI_VT_B : KVLI_VT_A] + at;
            kvli_vk_tensor tensor = {(uint32_t)(at / kvli_vt_size(d)), (uint32_t)stride, t->dim, d};
            *(v ? &push->b : &push->a) = tensor;
            for (uint32_t i = 0; i < n * stride; i++)
                kvli_vt_put(to, i, d,
                            kvli_vt_input(t, (uint32_t)(i / stride), (uint32_t)(i % stride % t->dim)));
            kvli_vt_put(to, (2 * T - 3) * stride + t->dim + 5, d, NAN);
            kvli_vt_put(to, (2 * T - 2) * stride + 5, d, -INFINITY);
            for (uint32_t i = 0; i < 3; i++)
                for (uint32_t h = 0; h < KVLI_VT_HEADS; h++) {
                    const kvli_side *exact = &t->side[v][KVLI_EXACT];
                    const uint8_t *from = to + (of[i].row * stride + h * t->dim) * kvli_vt_size(d);
                    uint8_t *tile = kvli_vt_tile(t, t->cpu, of[i].exact, h, v);
                    for (uint32_t k = 0; k < 3 * t->dim && of[i].at == 3; k++)
                        kvli_vt_put(tile, k, exact->format - KVL_F32, kvli_vt_normal(t));
                    memcpy(kvli_vt_tile(t, t->gpu, of[i].exact, h, v), tile, exact->tile_bytes);
                    kvli_write_rows(exact->format, t->dim, from, (kvl_dtype)d, stride, of[i].n_rows, tile,
                                    of[i].at, t->simd);
                    if (of[i].sealed && seals)
                        kvli_seal_tile(&t->side[v][KVLI_PACKED], exact->format, tile,
                                       kvli_vt_tile(t, t->cpu, of[i].sealed, h, v), t->simd);
                }
        }
        for (uint32_t i = 0; i < 3 && !seals; i++) list[3 * d + i].sealed = 0;
    }
}

/* Are bytes alike? NaNs are of an exact tile (format), whatever is in them. */
static bool kvli_vt_same(kvli_vk_test *t, const char *what, uint64_t entry, uint32_t h, uint32_t v) {
    const kvli_side *side = &t->side[v][(entry & KVLI_GPU_EXACT) != 0];
    const uint8_t *got = kvli_vt_tile(t, t->gpu, entry, h, v), *want = kvli_vt_tile(t, t->cpu, entry, h, v);
    size_t n = kvli_row_bytes(side->format, t->dim) * t->T + kvli_scale_bytes(side->format, t->T, t->dim);
    if (memcmp(got, want, n) == 0) return true;
    if (entry & KVLI_GPU_EXACT) {
        uint32_t dtype = side->format - KVL_F32, i;
        size_t size = kvli_vt_size(dtype);
        for (i = 0; i < t->T * t->dim; i++) {
            float a = kvli_vt_get(got, i, dtype), b = kvli_vt_get(want, i, dtype);
            if (memcmp(got + i * size, want + i * size, size) && !(a != a && b != b)) break;
        }
        return i == t->T * t->dim ||
               kvli_vt_wrong(t, what, i, kvli_vt_get(got, i, dtype), kvli_vt_get(want, i, dtype));
    }
    size_t i = 0;
    while (got[i] == want[i]) i++;
    return kvli_vt_wrong(t, what, (uint32_t)i, got[i], want[i]);
}

static bool kvli_vt_store_check(kvli_vk_test *t) {
    const kvli_gpu_store *list = (const kvli_gpu_store *)kvli_vt_table(t, KVLI_VT_LIST);
    const uint32_t *taint = (const uint32_t *)(const void *)(t->gpu + t->at[KVLI_VT_TAINT]);
    for (uint32_t i = 0; i < 9; i++)
        for (uint32_t h = 0; h < KVLI_VT_HEADS; h++)
            for (uint32_t v = 0; v < 2; v++)
                if (!kvli_vt_same(t, v ? "number of an exact V tile" : "number of an exact K tile",
                                  list[i].exact, h, v) ||
                    (list[i].sealed &&
                     !kvli_vt_same(t, v ? "byte of a sealed V tile" : "byte of a sealed K tile",
                                   list[i].sealed, h, v)))
                    return false;
    for (uint32_t s = 0; s < 6; s++)
        if ((taint[s] != 0) != s % 2) return kvli_vt_wrong(t, "taint of span", s, taint[s], s % 2);
    return true;
}

/* ---- decode and prefill ---- */
/* Tiles of fp8 in which every code stands and matters. Of the first four blocks all V rows are alike: what is attended to in
   one is that row. In the last, K rows of token t are the codes of exponent t % 16 under a scale that makes them about 1. */
static void kvli_vt_codes(kvli_vk_test *t, uint32_t block, uint32_t h) {
    uint64_t entry = kvli_vt_packed(t, t->n_blocks + block);
    uint8_t *k = kvli_vt_tile(t, t->cpu, entry, h, 0), *v = kvli_vt_tile(t, t->cpu, entry, h, 1);
    for (uint32_t i = 0; i < t->T * t->dim; i++) {
        uint32_t token = i / t->dim, e = i % t->dim, of_v = (block * t->dim + e + h * 64) % 256;
        uint32_t of_k = (token % 16) << 3 | (e & 7) | (e & 8) << 4;
        if (block == KVLI_VT_CODES - 1) of_v = (uint32_t)(kvli_vt_uniform(t) * 100) & 0xbf;
        k[i] = (uint8_t)((of_k & 127) == 127 ? of_k - 1 : of_k); /* (127: NaN) */
        v[i] = (uint8_t)((of_v & 127) == 127 ? of_v - 1 : of_v);
    }
    for (uint32_t token = 0; token < t->T; token++) {
        int32_t exponent = token % 16 ? 7 - (int32_t)(token % 16) : 7;
        kvli_put16(k + t->T * t->dim + 2 * token, (uint16_t)((15 + exponent) << 10));
        kvli_put16(v + t->T * t->dim + 2 * token, 0x3c00);
    }
}

static void kvli_vt_blocks(kvli_vk_test *t) {
    float *rows = t->rows[0];
    uint32_t end = t->position + t->n_rows;
    for (uint32_t j = 0; j < t->n_blocks; j++)
        for (uint32_t i = 0; i < 2 * KVLI_VT_HEADS; i++) {
            uint32_t h = i / 2, v = i % 2;
            const kvli_side *exact = &t->side[v][KVLI_EXACT], *packed = &t->side[v][KVLI_PACKED];
            uint8_t *tile = kvli_vt_tile(t, t->cpu, kvli_vt_exact(t, j), h, v);
            for (uint32_t k = 0; k < t->T * t->dim; k++) rows[k] = kvli_vt_normal(t);
            kvli_write_rows(exact->format, t->dim, rows, KVL_DTYPE_F32, t->dim, t->T, tile, 0, t->simd);
            if (t->two_class)
                kvli_seal_tile(packed, exact->format, tile,
                               kvli_vt_tile(t, t->cpu, kvli_vt_packed(t, j), h, v), t->simd);
            if (j + 1 == t->n_blocks) { /* rows that were never written */
                size_t written = (end - j * t->T) * kvli_row_bytes(exact->format, t->dim);
                memset(tile + written, 0xff, exact->tile_bytes - written);
            } else if (j >= t->first_own) {
                uint64_t slot = kvli_vt_scratch(t, j - t->first_own);
                memcpy(kvli_vt_tile(t, t->cpu, slot, h, v), tile, exact->tile_bytes);
            }
        }
    for (uint32_t i = 0; i < KVLI_VT_CODES && t->side[0][0].format == KVL_FP8_E4M3; i++)
        for (uint32_t h = 0; h < KVLI_VT_HEADS; h++) kvli_vt_codes(t, i, h);
}

static void kvli_vt_attend(kvli_vk_test *t) {
    const kvli_gpu_span spans[2] = {
        {0, t->n_rows, t->position, 0, t->first_own, t->n_blocks},
        {0, t->n_rows, t->position, 2 * t->n_blocks, t->n_blocks, 2 * t->n_blocks}};
    uint64_t *entries = (uint64_t *)kvli_vt_table(t, KVLI_VT_ENTRIES);
    kvli_gpu_item *list = (kvli_gpu_item *)kvli_vt_table(t, KVLI_VT_LIST);
    uint32_t rows = t->n_rows * t->gqa, few = kvli_min_u32(rows, 4), last = t->n_blocks - 1, f = t->first_own;
    uint32_t from = rows > t->gqa ? t->gqa : 0;
    kvli_vt_blocks(t);
    memcpy(t->gpu, t->cpu, t->at[KVLI_VT_TABLES]);
    memcpy(kvli_vt_table(t, KVLI_VT_SPANS), spans, sizeof spans);
    for (uint32_t j = 0; j < t->n_blocks; j++) {
        entries[j] = j ? kvli_vt_packed(t, j) : kvli_vt_exact(t, 0);
        if (j >= f) entries[t->n_blocks + j - f] = j < last ? kvli_vt_scratch(t, j - f) : kvli_vt_exact(t, j);
    }
    for (uint32_t i = 0; i < KVLI_VT_CODES; i++)
        entries[2 * t->n_blocks + i] = kvli_vt_packed(t, t->n_blocks + i);
    const kvli_gpu_item items[4] = {{0, 0, rows, 0, last, f, last + 1, KVLI_GPU_NONE},
                                    {0, from, rows - from, 0, last, f, last + 1, KVLI_GPU_NONE},
                                    {0, 0, few, 0, 2, f, f, 0},
                                    {0, 0, few, 2, last, f, last + 1, few}};
    memcpy(list, items, sizeof items);
    kvli_vt_case(t, 0, 0, 1, sizeof *items / 4);
    kvli_vt_case(t, 1, 1, 1, sizeof *items / 4);
    kvli_vt_case(t, 1, 2, 2, sizeof *items / 4);
    for (uint32_t i = 0; i < KVLI_VT_CODES && t->side[0][0].format == KVL_FP8_E4M3; i++) {
        const kvli_gpu_item one = {1, 0, few, i, i + 1, t->n_blocks, t->n_blocks, KVLI_GPU_NONE};
        list[4 + i] = one;
        kvli_vt_case(t, 0, 4 + i, 1, sizeof one / 4);
    }
    size_t n = t->n_rows * t->row_stride;
    uint8_t *q = t->gpu + t->at[KVLI_VT_A]; /* f32, then the same as f16 and bf16 */
    for (uint32_t i = 0; i < n; i++) {
        float x = kvli_vt_normal(t);
        kvli_vt_put(q, i, KVLI_GPU_DTYPE_F32, x);
        kvli_vt_put(q + t->out_bytes, i, KVLI_GPU_DTYPE_F16, x);
        kvli_vt_put(q + t->out_bytes, n + i, KVLI_GPU_DTYPE_BF16, x);
    }
    for (uint32_t i = 0; i < t->n_cases; i++) {
        uint32_t in = i < 3 ? i : 0, out = i < 3 ? i : i % 2 ? 0 : 2;
        t->cases[i].push.a = kvli_vt_tensor(t, in ? t->out_bytes + (in == 2 ? 2 * n : 0) : 0, in);
        t->cases[i].push.b = kvli_vt_tensor(t, i * t->out_bytes, out);
    }
}

/* One row's state (m, l, q, sum, magnitudes) takes a block's tokens in. */
static void kvli_vt_row(const kvli_vk_test *t, const kvli_vk_layer *l, double *row, uint32_t x,
                        uint32_t block, bool own) {
    double *q = row + 2, *sum = q + t->dim, *magnitude = sum + t->dim;
    for (uint32_t i = 0; i < t->T; i++) {
        uint32_t token = block * t->T + i;
        const float *k = t->rows[0] + (size_t)i * t->dim, *v = t->rows[1] + (size_t)i * t->dim;
        double s = 0, p, keep;
        if (own && token > x) break;
        if (l->window && token + l->window <= x && token >= l->sink_tokens) continue;
        for (uint32_t e = 0; e < t->dim; e++) s += q[e] * k[e];
        s *= l->scale;
        if (l->softcap > 0) s = l->softcap * tanh(s / l->softcap);
        s *= 1.4426950408889634;
        keep = s > row[0] ? exp2(row[0] - s) : 1;
        if (s > row[0]) row[0] = s;
        p = exp2(s - row[0]);
        row[1] = row[1] * keep + p;
        for (uint32_t e = 0; e < t->dim; e++) {
            sum[e] = sum[e] * keep + p * v[e];
            magnitude[e] = magnitude[e] * keep + p * fabs((double)v[e]);
        }
    }
}

static bool kvli_vt_close(kvli_vk_test *t, uint32_t e, double got, double want, double bound) {
    double error = fabs(got - want) / (bound + 1e-30);
    if (!(error <= t->worst)) t->worst = error;
    return error <= 1 || kvli_vt_wrong(t, "number of a row", e, got, want);
}

/* What the shader gave for a row against its state. */
static bool kvli_vt_row_check(kvli_vk_test *t, const kvli_vk_push *push, const double *row, uint32_t head,
                              uint32_t tensor_row, uint32_t partial) {
    const double *sum = row + 2 + t->dim, *magnitude = sum + t->dim;
    const float *o = (const float *)(const void *)(t->gpu + t->at[KVLI_VT_PARTIAL_O]) +
                     (size_t)partial * t->dim,
                *ml = (const float *)(const void *)(t->gpu + t->at[KVLI_VT_PARTIAL_ML]) + 2 * (size_t)partial;
    double l = row[1], most = 0,
           rounding = push->b.dtype == KVLI_GPU_DTYPE_F32   ? 0
                      : push->b.dtype == KVLI_GPU_DTYPE_F16 ? 1.0 / 1024
                                                            : 1.0 / 128;
    bool rotated = t->side[1][KVLI_PACKED].rotated;
    if (partial != KVLI_GPU_NONE && l == 0)
        return ml[1] == 0 || kvli_vt_wrong(t, "sum of a row", head, ml[1], 0);
    if (partial != KVLI_GPU_NONE &&
        !kvli_vt_close(t, t->dim, ml[0] + log2((double)ml[1]), row[0] + log2(l), 8 * kvli_vt_tolerance))
        return false;
    if (partial == KVLI_GPU_NONE && push->layer) l += exp2(t->sinks[head] * 1.4426950408889634 - row[0]);
    for (uint32_t e = 0; e < t->dim; e++) most = magnitude[e] > most ? magnitude[e] : most;
    for (uint32_t e = 0; e < t->dim; e++) {
        size_t i = push->b.offset + tensor_row * t->row_stride + head * t->dim + e;
        double got = partial != KVLI_GPU_NONE ? o[e] / (double)ml[1]
                                              : kvli_vt_get(t->gpu + t->at[KVLI_VT_B], i, push->b.dtype);
        double bound = (rotated ? most : magnitude[e]) / l *
                       (kvli_vt_tolerance + (partial == KVLI_GPU_NONE ? rounding : 0));
        if (!kvli_vt_close(t, e, got, sum[e] / l, bound)) return false;
    }
    return true;
}

static bool kvli_vt_item_check(kvli_vk_test *t, const kvli_vk_push *push, const kvli_gpu_item *item,
                               uint32_t kv) {
    const kvli_gpu_span *span = (const kvli_gpu_span *)kvli_vt_table(t, KVLI_VT_SPANS) + item->span;
    const uint64_t *entries = (const uint64_t *)kvli_vt_table(t, KVLI_VT_ENTRIES);
    size_t size = 2 + 3 * (size_t)t->dim;
    uint32_t skip = item->n_rows > 8 ? 3 : 1; /* (every third row of many) */
    for (uint32_t r = 0; r < item->n_rows; r += skip) {
        double *row = t->state + r * size;
        uint32_t p = item->row + r, head = kv * t->gqa + p % t->gqa;
        memset(row, 0, size * sizeof *row);
        row[0] = -1e30;
        for (uint32_t e = 0; e < t->dim; e++)
            row[2 + e] =
                kvli_vt_get(t->gpu + t->at[KVLI_VT_A],
                            push->a.offset + p / t->gqa * t->row_stride + head * t->dim + e, push->a.dtype);
    }
    for (uint32_t own = 0; own < 2; own++)
        for (uint32_t b = own ? item->own_begin : item->begin; b < (own ? item->own_end : item->end); b++) {
            uint64_t entry = entries[own ? span->own + b - span->first_own : span->table + b];
            for (uint32_t v = 0; v < 2; v++) {
                const kvli_side *side = &t->side[v][(entry & KVLI_GPU_EXACT) != 0];
                kvli_decode_tile(side, kvli_vt_tile(t, t->cpu, entry, kv, v), t->rows[v]);
                if (side->rotated) kvli_hadamard(t->rows[v], t->dim, t->T, t->simd);
            }
            for (uint32_t r = 0; r < item->n_rows; r += skip) {
                uint32_t x = span->position + (item->row + r) / t->gqa;
                if (own ? b == x / t->T : b < x / t->T)
                    kvli_vt_row(t, &t->layer[push->layer], t->state + r * size, x, b, own != 0);
            }
        }
    for (uint32_t r = 0; r < item->n_rows; r += skip) {
        uint32_t p = item->row + r, partial = KVLI_GPU_NONE;
        if (item->partial != KVLI_GPU_NONE) partial = item->partial * KVLI_VT_HEADS + kv * item->n_rows + r;
        if (!kvli_vt_row_check(t, push, t->state + r * size, kv * t->gqa + p % t->gqa, p / t->gqa, partial))
            return false;
    }
    return true;
}

static bool kvli_vt_attend_check(kvli_vk_test *t) {
    const kvli_gpu_item *items = (const kvli_gpu_item *)kvli_vt_table(t, KVLI_VT_LIST);
    for (uint32_t i = 0; i < t->n_cases; i++) {
        const kvli_vk_push *push = &t->cases[i].push;
        for (uint32_t k = 0; k < push->n * KVLI_VT_HEADS; k++)
            if (!kvli_vt_item_check(t, push, items + push->list / 8 + k / 2, k % 2)) return false;
    }
    return true;
}

/* ---- merge: three parts and forty, one of them of nothing ---- */
static void kvli_vt_merge(kvli_vk_test *t) {
    const kvli_gpu_span span = {0, t->n_rows, t->position, 0, 0, 0};
    const kvli_gpu_merge merges[2] = {{0, 0, 3, 0, 3, {0, 0, 0}}, {0, 3, 1, 9, 40, {0, 0, 0}}};
    float *o = (float *)(void *)(t->gpu + t->at[KVLI_VT_PARTIAL_O]),
          *ml = (float *)(void *)(t->gpu + t->at[KVLI_VT_PARTIAL_ML]);
    memcpy(kvli_vt_table(t, KVLI_VT_LIST), merges, sizeof merges);
    memcpy(kvli_vt_table(t, KVLI_VT_SPANS), &span, sizeof span);
    for (uint32_t i = 0; i < 49 * KVLI_VT_HEADS; i++) {
        bool nothing = i < 6; /* the first part of the first merge */
        ml[2 * i] = nothing ? -1e31f : 6 * kvli_vt_uniform(t);
        ml[2 * i + 1] = nothing ? 0 : 1 + (float)fabs((double)kvli_vt_normal(t));
        for (uint32_t e = 0; e < t->dim; e++) o[(size_t)i * t->dim + e] = nothing ? 0 : kvli_vt_normal(t);
    }
    for (uint32_t d = 0; d < 3; d++)
        kvli_vt_case(t, d % 2, 0, 2, sizeof *merges / 4)->b = kvli_vt_tensor(t, d * t->out_bytes, d);
}

static bool kvli_vt_merge_check(kvli_vk_test *t) {
    const kvli_gpu_merge *merges = (const kvli_gpu_merge *)kvli_vt_table(t, KVLI_VT_LIST);
    const float *o = (const float *)(const void *)(t->gpu + t->at[KVLI_VT_PARTIAL_O]),
                *ml = (const float *)(const void *)(t->gpu + t->at[KVLI_VT_PARTIAL_ML]);
    for (uint32_t i = 0; i < 3 * 4 * KVLI_VT_HEADS; i++) {
        uint32_t d = i / 8, kv = i / 4 % 2, p = i % 4, m = p == 3, r = p - merges[m].row,
                 n = merges[m].n_rows;
        double *row = t->state, *sum = row + 2 + t->dim, *magnitude = sum + t->dim;
        memset(row, 0, (2 + 3 * (size_t)t->dim) * sizeof *row);
        row[0] = -1e30;
        for (uint32_t k = 0; k < merges[m].n_parts; k++)
            if (ml[2 * ((merges[m].partial + k * n) * KVLI_VT_HEADS + kv * n + r)] > row[0])
                row[0] = ml[2 * ((merges[m].partial + k * n) * KVLI_VT_HEADS + kv * n + r)];
        for (uint32_t k = 0; k < merges[m].n_parts; k++) {
            size_t at = (merges[m].partial + k * n) * KVLI_VT_HEADS + kv * n + r;
            double w = exp2(ml[2 * at] - row[0]);
            row[1] += w * ml[2 * at + 1];
            for (uint32_t e = 0; e < t->dim; e++) {
                sum[e] += w * o[at * t->dim + e];
                magnitude[e] += w * fabs((double)o[at * t->dim + e]);
            }
        }
        if (!kvli_vt_row_check(t, &t->cases[d].push, row, kv * t->gqa + p % t->gqa, p / t->gqa,
                               KVLI_GPU_NONE))
            return false;
    }
    return true;
}

/* ---- copy ---- */
static void kvli_vt_copy(kvli_vk_test *t) {
    const kvli_gpu_copy copies[2] = {{1ull << 32 | 128, 256, 4000}, {256 + 8192, 1ull << 32 | 8192, 16}};
    memcpy(kvli_vt_table(t, KVLI_VT_LIST), copies, sizeof copies);
    for (size_t i = 0; i < t->at[KVLI_VT_TABLES]; i++)
        t->gpu[i] = t->cpu[i] = (uint8_t)(t->random = t->random * 33 + 7);
    memcpy(t->cpu + t->at[KVLI_VT_SLAB] + 128, t->gpu + 256, 4000);
    memcpy(t->cpu + 256 + 8192, t->gpu + t->at[KVLI_VT_SLAB] + 8192, 16);
    kvli_vt_case(t, 0, 0, 2, sizeof *copies / 4);
}
static bool kvli_vt_copy_check(kvli_vk_test *t) {
    for (size_t i = 0; i < t->at[KVLI_VT_TABLES]; i++)
        if (t->gpu[i] != t->cpu[i]) return kvli_vt_wrong(t, "byte", (uint32_t)i, t->gpu[i], t->cpu[i]);
    return true;
}

/* ---- one test ---- */
static const struct {
    void (*make)(kvli_vk_test *t);
    bool (*check)(kvli_vk_test *t);
} kvli_vt_sorts[KVLI_VT_SORTS] = {
    {kvli_vt_store, kvli_vt_store_check},   {kvli_vt_store, kvli_vt_store_check},
    {kvli_vt_attend, kvli_vt_attend_check}, {kvli_vt_attend, kvli_vt_attend_check},
    {kvli_vt_merge, kvli_vt_merge_check},   {kvli_vt_copy, kvli_vt_copy_check}};

/* The problem, in t->gpu, of t->at[KVLI_VT_REGIONS] bytes, and memory of the CPU's. */
static void kvli_vt_make(kvli_vk_test *t, uint8_t *cpu) {
    size_t tile = (size_t)t->T * t->dim * sizeof(float);
    t->cpu = cpu;
    t->rows[0] = (float *)(void *)(cpu + t->at[KVLI_VT_TABLES]);
    t->rows[1] = (float *)(void *)(cpu + t->at[KVLI_VT_TABLES] + tile);
    t->state = (double *)(void *)(cpu + t->at[KVLI_VT_TABLES] + 2 * tile);
    t->random = 1;
    memset(t->gpu, 0xee, t->at[KVLI_VT_TABLES]);
    memset(t->cpu, 0xee, t->at[KVLI_VT_TABLES]);
    memset(t->gpu + t->at[KVLI_VT_TABLES], 0, t->at[KVLI_VT_REGIONS] - t->at[KVLI_VT_TABLES]);
    for (uint32_t i = 0; i < KVLI_VT_HEADS * t->gqa; i++) t->sinks[i] = 2 * kvli_vt_uniform(t);
    memcpy(t->gpu + t->at[KVLI_VT_LAYERS], t->layer, sizeof t->layer);
    memcpy(t->gpu + t->at[KVLI_VT_LAYERS] + sizeof t->layer, t->sinks, sizeof t->sinks);
    kvli_vt_sorts[t->sort].make(t);
}

static size_t kvli_vt_cpu_bytes(
    const kvli_vk_test *t) { /* pages, two tiles, states: of t->cpu, t->rows, t->state */
    size_t tile = (size_t)t->T * t->dim * sizeof(float);
    return t->at[KVLI_VT_TABLES] + 2 * tile +
           (t->n_rows * t->gqa + 1) * (2 + 3 * (size_t)t->dim) * sizeof(double);
}

#endif
