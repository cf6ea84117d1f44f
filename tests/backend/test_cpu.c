/* The CPU backend against the double-precision reference, on each SIMD path. `test_cpu full` runs the cross product
   of formats and shapes too (hours). */
#define KVL_IMPLEMENTATION
#include "../../kvlite.h"

#include "conformance.h"
#include "sealed.h"

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
    conf_backend every = {.name = "every pair", .kind = KVL_BACKEND_CPU, .simd = KVL_SIMD_SCALAR},
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
    conf_backend scalar = {
        .name = "cpu scalar", .kind = KVL_BACKEND_CPU, .simd = KVL_SIMD_SCALAR, .n_threads = 1, .full = full};
    conf_backend avx2 = {
        .name = "cpu avx2", .kind = KVL_BACKEND_CPU, .simd = KVL_SIMD_AVX2, .n_threads = 1, .full = full};
    conf_backend avx512 = {
        .name = "cpu avx512", .kind = KVL_BACKEND_CPU, .simd = KVL_SIMD_AVX512, .n_threads = 1, .full = full};
    conf_backend threads = {.name = "cpu, best path, 2 threads", .kind = KVL_BACKEND_CPU, .n_threads = 2};
    threads.presets_only = true;
    threads.full = full;
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
