/* The CPU backend against the double-precision reference, on each SIMD path. `test_cpu full` runs the cross product
   of formats and shapes too (hours). */
#define KVL_IMPLEMENTATION
#include "../../kvlite.h"

#include "conformance.h"

/* Two keys of 16 numbers, by hand: q·k = 16·0.25·{2, 1} = {8, 4}, scale 1/4, so logits 2 and 1. */
static void test_reference_by_hand(void **state) {
    kvl_geometry geo = {0};
    ref_geometry g;
    ref_kv kv;
    float q[16], k[2][16], v[2][16];
    double out[16], p = 1 / (1 + exp(-1.0));
    (void)state;
    geo.n_layers = geo.n_q_heads = geo.n_kv_heads = 1;
    geo.k_dim = 16;
    geo.block_tokens = 8;
    geo.preset = "f32";
    for (int e = 0; e < 16; e++) {
        q[e] = 0.25f;
        k[0][e] = 2;
        k[1][e] = 1;
        v[0][e] = (float)e;
        v[1][e] = 1;
    }
    g = ref_geometry_make(&geo);
    ref_kv_init(&kv, &g, 8);
    ref_kv_append(&kv, &g, 0, k[0], v[0]);
    ref_kv_append(&kv, &g, 0, k[1], v[1]);
    ref_attend(&g, 0, &kv, 1, 0, q, out);
    for (int e = 0; e < 16; e++) assert_true(fabs(out[e] - (p * e + (1 - p))) < 1e-12);
    ref_attend(&g, 0, &kv, 0, 0, q, out); /* the first position sees itself alone */
    for (int e = 0; e < 16; e++) assert_true(out[e] == e);
    g.layers[0].window = 1;
    ref_attend(&g, 0, &kv, 1, 0, q, out);
    for (int e = 0; e < 16; e++) assert_true(out[e] == 1);
    g.layers[0].sink_tokens = 1;
    g.layers[0].softcap = 0.5;
    p = 1 / (1 + exp(0.5 * (tanh(2.0) - tanh(4.0))));
    ref_attend(&g, 0, &kv, 1, 0, q, out);
    for (int e = 0; e < 16; e++) assert_true(fabs(out[e] - (p * e + (1 - p))) < 1e-12);
    g.layers[0].sink_tokens = 0; /* one visible key of logit 1 and a sink of logit 1: half of v */
    g.layers[0].softcap = 0;
    g.layers[0].sink_logits = (const float[]){1};
    ref_attend(&g, 0, &kv, 1, 0, q, out);
    for (int e = 0; e < 16; e++) assert_true(fabs(out[e] - 0.5) < 1e-12);
    ref_kv_free(&kv);
}

/* Rows whose sealed values are known without an encoder. */
static void test_reference_seals_by_hand(void **state) {
    ref_side int8 = ref_side_make(KVL_INT8, 0), int4 = ref_side_make(KVL_INT4, 0),
             nvfp4 = ref_side_make(KVL_NVFP4, 0);
    ref_side channel = ref_side_make(KVL_INT4_CHANNEL, 0), rotated = ref_side_make(KVL_INT8 | KVL_ROTATED, 0);
    float row[16] = {127, -127, 63.5f, 0.5f, 1.5f, -0.5f, 2.5f, 100, 3.2f}, block[32 * 16];
    double out[32 * 16];
    (void)state;
    ref_seal_tile(&int8, 1, 16, row, out); /* scale f16(127 * f32(1/127)) = 1, ties to even */
    assert_true(out[0] == 127 && out[1] == -127 && out[2] == 64 && out[3] == 0 && out[4] == 2 && out[5] == 0);
    assert_true(out[6] == 2 && out[7] == 100 && out[8] == 3);
    for (int e = 0; e < 16; e++) row[e] = (float)(e * 2 - 5);
    ref_seal_tile(&int4, 1, 16, row, out); /* 16 levels 2 apart: nothing is lost */
    for (int e = 0; e < 16; e++) assert_true(out[e] == row[e]);
    for (int t = 0; t < 32; t++) {
        for (int e = 0; e < 16; e++) block[t * 16 + e] = (float)(t % 16 * (e + 1) + e);
    }
    ref_seal_tile(&channel, 32, 16, block, out);
    for (int i = 0; i < 32 * 16; i++) assert_true(out[i] == block[i]);
    for (int e = 0; e < 16; e++)
        row[e] = (const float[]){0, .5f, 1, 1.5f, 2, 3, 4, 6}[e % 8] * (e < 8 ? 1 : -1);
    ref_seal_tile(&nvfp4, 1, 16, row, out); /* scale e4m3(16) / 16 = 1 */
    for (int e = 0; e < 16; e++) assert_true(out[e] == row[e]);
    for (int e = 0; e < 16; e++)
        row[e] = (e & 3) == 3 ? -8 : 8; /* rotates to 8 at four places: ±16 · 1/4 … */
    ref_seal_tile(&rotated, 1, 16, row, out);
    for (int e = 0; e < 16; e++) assert_true(fabs(out[e] - row[e]) < 8 / 254.0 * 4);
    assert_true(ref_hadamard_size(80) == 16 && ref_hadamard_size(96) == 32 && ref_hadamard_size(256) == 128);
    assert_true(ref_f16(65519.9) == 65504 && isinf(ref_f16(65520)) && ref_f16(1 + 0x1p-11) == 1 &&
                ref_e4m3(500) == 448);
    assert_true(ref_e2m1(5) == 4 && ref_e2m1(2.5) == 2 && ref_e2m1(0.25) == 0 && ref_e2m1(0.75) == 1);
    for (uint32_t h = 0; h < 0x7c00; h++) assert_true(ref_f16_bits(ref_f16_value((uint16_t)h)) == h);
}

/* The table itself: what it promises is in it. */
static void test_table_covers(void **state) {
    conf_backend every = {"every pair", KVL_BACKEND_CPU, KVL_SIMD_SCALAR, 0, false, false, 0},
                 presets = every;
    conf_cover *cover = malloc(sizeof *cover);
    uint32_t i, pairs = 0;
    (void)state;
    assert_true(conf_cover_make(cover, &every));
    for (i = 0; i < 13 * 11; i++) pairs += cover->seen[F_K][F_V][i / 11][i % 11];
    assert_int_equal(pairs, 13 * 11);
    printf("%u cases for every format pair", cover->n_cases);
    presets.presets_only = true;
    assert_true(conf_cover_make(cover, &presets));
    for (i = 0; i < cover->n_cases; i++) assert_non_null(cover->cases[i].preset);
    printf(", %u for the presets\n", cover->n_cases);
    free(cover);
}

/* Bytes of a tile without its padding. */
static size_t tile_payload(kvl_format f, uint32_t tokens, uint32_t dim) {
    size_t n = (size_t)tokens * dim;
    switch (f & 0xff) {
    case KVL_F32: return n * 4;
    case KVL_F16:
    case KVL_BF16: return n * 2;
    case KVL_INT8:
    case KVL_FP8_E4M3: return n + tokens * 2;
    case KVL_INT8_CHANNEL: return n + dim * 4;
    case KVL_NVFP4: return n / 2 + n / 16;
    case KVL_INT4: return n / 2 + (size_t)tokens * ((dim + 63) / 64) * 4;
    default: return n / 2 + dim * 4;
    }
}

/* The rows of one head and block, rounded to the exact format, as kvl_tile_encode takes them. */
static void exact_rows(float *rows, char what, kvl_format exact, uint32_t block, uint32_t layer,
                       uint32_t head, uint32_t tokens, uint32_t dim) {
    for (uint32_t t = 0; t < tokens; t++) {
        conf_row(rows + (size_t)t * dim, what, block * tokens + t, layer, head, dim);
        for (uint32_t e = 0; e < dim; e++)
            rows[(size_t)t * dim + e] = (float)ref_round(exact, rows[(size_t)t * dim + e]);
    }
}

static bool tile_is(const void *tile, kvl_format f, uint32_t tokens, uint32_t dim, const float *rows) {
    static uint8_t want[64 * 256 * 4 + 4096];
    assert_true(kvl_tile_bytes(f, tokens, dim) >= tile_payload(f, tokens, dim));
    assert_true(kvl_tile_bytes(f, tokens, dim) <= tile_payload(f, tokens, dim) + 127);
    assert_int_equal(kvl_tile_encode(f, tokens, dim, 0, rows, want), KVL_OK);
    return memcmp(tile, want, tile_payload(f, tokens, dim)) == 0;
}

enum { SEAL_HEADS = 2, SEAL_LAYERS = 2, SEAL_BLOCKS = 4 };

/* Fills SEAL_BLOCKS blocks and one row of a sequence, and compares the tiles that the block table points to. */
static void seal_and_compare(const conf_backend *b, kvl_format k, kvl_format v, kvl_format exact, uint32_t T,
                             uint32_t dim, uint32_t chunk) {
    static float q[65 * 256 * SEAL_HEADS], kr[65 * 256 * SEAL_HEADS], vr[65 * 256 * SEAL_HEADS],
        out[65 * 256 * SEAL_HEADS], rows[64 * 256];
    kvl_tensor tq = {.data = q}, tk = {.data = kr}, tv = {.data = vr}, to = {.data = out};
    kvl_cache_desc d = {.device_bytes = 24u << 20, .max_seq_tokens = 512, .poison = true};
    kvl_seq_desc open = {.no_match = true};
    int32_t tokens[65] = {0};
    kvl_cache *cache;
    kvl_seq seq;
    const kvl_step *step = NULL;
    uint32_t length = 0, total = SEAL_BLOCKS * T + 1;
    d.context_desc = (kvl_context_desc){.backend = b->kind, .simd = b->simd, .n_threads = b->n_threads};
    d.geometry = (kvl_geometry){
        .n_layers = SEAL_LAYERS, .n_q_heads = SEAL_HEADS, .n_kv_heads = SEAL_HEADS, .k_dim = dim};
    d.geometry.block_tokens = T;
    d.geometry.k_format = k;
    d.geometry.v_format = v;
    d.geometry.exact_format = exact;
    assert_int_equal(kvl_cache_create(&d, &cache), KVL_OK);
    assert_int_equal(kvl_seq_open(cache, &open, &seq, NULL), KVL_OK);
    while (length < total) {
        uint32_t n = conf_min(chunk, total - length > 1 ? total - 1 - length : 1);
        kvl_span span = {seq, tokens, n, 1, NULL};
        assert_int_equal(kvl_step_begin(cache, &span, 1, &step), KVL_OK);
        for (uint32_t l = 0; l < SEAL_LAYERS; l++) {
            for (uint32_t i = 0; i < n * SEAL_HEADS; i++) {
                conf_row(q + i * dim, 'q', length + i / SEAL_HEADS, l, i % SEAL_HEADS, dim);
                conf_row(kr + i * dim, 'k', length + i / SEAL_HEADS, l, i % SEAL_HEADS, dim);
                conf_row(vr + i * dim, 'v', length + i / SEAL_HEADS, l, i % SEAL_HEADS, dim);
            }
            assert_int_equal(kvl_attend(cache, step, l, &tq, &tk, &tv, &to), KVL_OK);
        }
        length += n;
        if (length < total) assert_int_equal(kvl_step_end(cache, step), KVL_OK);
    }
    for (uint32_t j = 0; j < SEAL_BLOCKS; j++) { /* the last step is open: its tables are there */
        uint32_t entry = step->blocks[0].table[j];
        bool is_exact = (entry & KVL_ENTRY_EXACT) != 0;
        const uint8_t *block = (const uint8_t *)(uintptr_t)step->block_address[entry & KVL_ENTRY_ID];
        if (k != exact || v != exact) assert_int_equal(is_exact, j == 0); /* sink_blocks is 1 */
        for (uint32_t l = 0; l < SEAL_LAYERS; l++) {
            kvl_block_layout at;
            assert_int_equal(kvl_cache_layout(cache, l, is_exact, &at), KVL_OK);
            if (!is_exact) assert_true(at.k_format == k && at.v_format == v);
            for (uint32_t h = 0; h < SEAL_HEADS; h++) {
                const uint8_t *tile = block + at.layer_offset + h * at.head_stride;
                exact_rows(rows, 'k', exact, j, l, h, T, dim);
                if (!tile_is(tile, at.k_format, T, dim, rows)) {
                    fail_msg("%s: keys %s, T %u, dim %u, block %u, layer %u, head %u: other bytes", b->name,
                             kvl_format_name(at.k_format), T, dim, j, l, h);
                }
                exact_rows(rows, 'v', exact, j, l, h, T, dim);
                if (!tile_is(tile + at.v_offset, at.v_format, T, dim, rows)) {
                    fail_msg("%s: values %s, T %u, dim %u, block %u, layer %u, head %u: other bytes", b->name,
                             kvl_format_name(at.v_format), T, dim, j, l, h);
                }
            }
        }
    }
    assert_int_equal(kvl_step_abort(cache, step), KVL_OK);
    kvl_cache_destroy(cache);
}

/* Every path writes the bytes that kvl_tile_encode gives, whether rows come one by one or in chunks. */
static void test_sealed_bytes(void **state) {
    static const uint32_t exact[] = {KVL_F16, KVL_BF16, KVL_F32}, chunk[] = {1, 64, 23};
    const conf_backend *b = *state;
    uint32_t n = 0;
    conf_skip_if_missing(b);
    for (uint32_t k = 0; k < conf_factors[F_K].n; k++) {
        for (uint32_t dim = 0; dim < conf_factors[F_K_DIM].n; dim++, n++) {
            uint32_t T = conf_is_channel(conf_k[k]) ? 32u << n % 2 : conf_block[(k + dim) % 4];
            seal_and_compare(b, conf_k[k], conf_v[(k + dim) % conf_factors[F_V].n], exact[n % 3], T,
                             conf_dim[dim], chunk[(n / 3) % 3]);
        }
    }
}

int main(int argc, char **argv) {
    bool full = argc > 1 && !strcmp(argv[1], "full");
    conf_backend scalar = {"cpu scalar", KVL_BACKEND_CPU, KVL_SIMD_SCALAR, 1, false, full, 0};
    conf_backend avx2 = {"cpu avx2", KVL_BACKEND_CPU, KVL_SIMD_AVX2, 1, false, full, 0};
    conf_backend avx512 = {"cpu avx512", KVL_BACKEND_CPU, KVL_SIMD_AVX512, 1, false, full, 0};
    conf_backend threads = {"cpu, best path, 2 threads", KVL_BACKEND_CPU, KVL_SIMD_AUTO, 2, true, full, 0};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference_by_hand),
        cmocka_unit_test(test_reference_seals_by_hand),
        cmocka_unit_test(test_table_covers),
        {"scalar: sealed bytes", test_sealed_bytes, NULL, NULL, &scalar},
        {"avx2: sealed bytes", test_sealed_bytes, NULL, NULL, &avx2},
        {"avx512: sealed bytes", test_sealed_bytes, NULL, NULL, &avx512},
        {"2 threads: sealed bytes", test_sealed_bytes, NULL, NULL, &threads},
        CONF_TESTS("scalar", &scalar),
        CONF_TESTS("avx2", &avx2),
        CONF_TESTS("avx512", &avx512),
        CONF_TESTS("2 threads", &threads),
    };
    if (argc > 1 && !full) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests_name("cpu", tests, NULL, NULL);
}
