/* What kvl_attend does with tensors and steps that are wrong, and with numbers that are not finite: a named error and
   nothing changed, and NaN that stays where it came from. */
#define KVL_IMPLEMENTATION
#include "../../kvlite.h"

#include <ctype.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

enum { LAYERS = 2, Q_HEADS = 4, KV_HEADS = 2, DIM = 32, TOKENS = 100, T = 32, PLENTY = 16 << 20 };

typedef struct rows {
    float q[TOKENS][Q_HEADS][DIM], k[TOKENS][KV_HEADS][DIM], v[TOKENS][KV_HEADS][DIM],
        out[LAYERS][TOKENS][Q_HEADS][DIM];
} rows;

static kvl_simd simd_path;

static kvl_cache *make_cache(const char *preset, kvl_format exact, uint64_t bytes) {
    static const kvl_layer layers[LAYERS] = {{0}, {.window = 40, .sink_tokens = 2}};
    kvl_cache_desc d = {.device_bytes = bytes, .max_seq_tokens = 512, .poison = true};
    kvl_cache *cache = NULL;
    char why[256] = "";
    d.context_desc = (kvl_context_desc){.backend = KVL_BACKEND_CPU, .simd = simd_path};
    d.context_desc.error = why;
    d.context_desc.error_size = sizeof why;
    d.geometry =
        (kvl_geometry){.n_layers = LAYERS, .n_q_heads = Q_HEADS, .n_kv_heads = KV_HEADS, .k_dim = DIM};
    d.geometry.preset = preset;
    d.geometry.exact_format = exact;
    d.geometry.segment_tokens = 64;
    d.geometry.layers = layers;
    if (kvl_cache_create(&d, &cache) != KVL_OK) fail_msg("create: %s", why);
    return cache;
}

static void make_rows(rows *r, uint32_t seed) {
    uint32_t x = seed * 2654435761u + 12345, i;
    float *all = &r->q[0][0][0];
    memset(r, 0, sizeof *r);
    for (i = 0; i < sizeof(r->q) / 4 + sizeof(r->k) / 4 + sizeof(r->v) / 4; i++) {
        x = x * 1664525u + 1013904223u;
        all[i] = (float)(int32_t)x * 0x1p-30f;
    }
}

static kvl_seq open_seq(kvl_cache *cache, const int32_t *tokens, uint32_t n, uint32_t *matched) {
    kvl_seq_desc d = {.tokens = tokens, .n_tokens = n};
    kvl_reuse reuse;
    kvl_seq seq;
    assert_int_equal(kvl_seq_open(cache, &d, &seq, &reuse), KVL_OK);
    if (matched) *matched = reuse.matched;
    return seq;
}

static void number_tokens(int32_t *tokens, int32_t first) {
    for (int32_t i = 0; i < TOKENS; i++) tokens[i] = first + i;
}

/* Both layers of rows [first, first + n) of one or two sequences; returns the step, still open. */
static const kvl_step *run_rows(kvl_cache *cache, uint32_t count, const kvl_seq *seq, rows *const *r,
                                const int32_t *const *tokens, uint32_t first, uint32_t n) {
    static float q[2 * TOKENS][Q_HEADS][DIM], k[2 * TOKENS][KV_HEADS][DIM], v[2 * TOKENS][KV_HEADS][DIM],
        out[2 * TOKENS][Q_HEADS][DIM];
    kvl_tensor tq = {.data = q}, tk = {.data = k}, tv = {.data = v}, to = {.data = out};
    kvl_span spans[2];
    const kvl_step *step;
    for (uint32_t i = 0; i < count; i++) {
        spans[i] = (kvl_span){seq[i], tokens[i] + first, n, 1, NULL};
        memcpy(q[i * n], r[i]->q[first], sizeof q[0] * n);
        memcpy(k[i * n], r[i]->k[first], sizeof k[0] * n);
        memcpy(v[i * n], r[i]->v[first], sizeof v[0] * n);
    }
    assert_int_equal(kvl_step_begin(cache, spans, count, &step), KVL_OK);
    for (uint32_t l = 0; l < LAYERS; l++) {
        memset(out, 0xff, sizeof out);
        assert_int_equal(kvl_attend(cache, step, l, &tq, &tk, &tv, &to), KVL_OK);
        for (uint32_t i = 0; i < count; i++) memcpy(r[i]->out[l][first], out[i * n], sizeof out[0] * n);
    }
    return step;
}

static void feed(kvl_cache *cache, kvl_seq seq, rows *r, const int32_t *tokens, uint32_t first, uint32_t n) {
    const kvl_step *step = run_rows(cache, 1, &seq, &r, &tokens, first, n);
    assert_int_equal(kvl_step_end(cache, step), KVL_OK);
}

/* ---- arguments ---- */

/* Is `word` in text, not as a part of a longer word? */
static bool has_word(const char *text, const char *word) {
    size_t n = strlen(word);
    for (const char *at = strstr(text, word); at; at = strstr(at + 1, word)) {
        if ((at == text || !isalnum((unsigned char)at[-1])) && !isalnum((unsigned char)at[n])) return true;
    }
    return false;
}

static void expect(kvl_cache *cache, kvl_result got, kvl_result want, const char *named) {
    if (got != want)
        fail_msg("%s instead of %s: %s", kvl_result_name(got), kvl_result_name(want), kvl_last_error(cache));
    if (!has_word(kvl_last_error(cache), named))
        fail_msg("\"%s\" does not name %s", kvl_last_error(cache), named);
}

static void test_wrong_arguments(void **state) {
    kvl_cache *cache = make_cache("int8", 0, PLENTY);
    static rows r, want;
    static int32_t tokens[TOKENS];
    kvl_seq seq;
    kvl_span span;
    kvl_tensor q = {.data = r.q}, k = {.data = r.k}, v = {.data = r.v}, out = {.data = r.out[0]}, none = {0},
               bad;
    const kvl_step *step;
    kvl_step copy;
    (void)state;
    number_tokens(tokens, 5);
    make_rows(&want, 1);
    seq = open_seq(cache, tokens, TOKENS, NULL);
    feed(cache, seq, &want, tokens, 0, TOKENS);
    assert_int_equal(kvl_seq_close(cache, seq), KVL_OK);
    kvl_cache_destroy(cache);

    cache = make_cache("int8", 0, PLENTY);
    make_rows(&r, 1);
    seq = open_seq(cache, tokens, TOKENS, NULL);
    span = (kvl_span){seq, tokens, TOKENS, 1, NULL};
    assert_int_equal(kvl_step_begin(cache, &span, 1, &step), KVL_OK);
    assert_int_equal(kvl_attend(NULL, step, 0, &q, &k, &v, &out), KVL_INVALID_ARG);
    assert_true(kvl_attend(cache, NULL, 0, &q, &k, &v, &out) < 0);
    copy = *step;
    expect(cache, kvl_attend(cache, &copy, 0, &q, &k, &v, &out), KVL_MISMATCH, "step");
    expect(cache, kvl_attend(cache, step, LAYERS, &q, &k, &v, &out), KVL_INVALID_ARG, "layer");
    expect(cache, kvl_attend(cache, step, KVL_NONE, &q, &k, &v, &out), KVL_INVALID_ARG, "layer");
    expect(cache, kvl_attend(cache, step, 0, NULL, &k, &v, &out), KVL_INVALID_ARG, "q");
    expect(cache, kvl_attend(cache, step, 0, &q, NULL, &v, &out), KVL_INVALID_ARG, "k");
    expect(cache, kvl_attend(cache, step, 0, &q, &k, NULL, &out), KVL_INVALID_ARG, "v");
    expect(cache, kvl_attend(cache, step, 0, &q, &k, &v, NULL), KVL_INVALID_ARG, "out");
    expect(cache, kvl_attend(cache, step, 0, &none, &k, &v, &out), KVL_INVALID_ARG, "q");
    expect(cache, kvl_attend(cache, step, 0, &q, &none, &v, &out), KVL_INVALID_ARG, "k");
    expect(cache, kvl_attend(cache, step, 0, &q, &k, &none, &out), KVL_INVALID_ARG, "v");
    expect(cache, kvl_attend(cache, step, 0, &q, &k, &v, &none), KVL_INVALID_ARG, "out");
    bad = k;
    bad.dtype = (kvl_dtype)77;
    expect(cache, kvl_attend(cache, step, 0, &q, &bad, &v, &out), KVL_INVALID_ARG, "k");
    bad = out;
    bad.dtype = (kvl_dtype)-1;
    expect(cache, kvl_attend(cache, step, 0, &q, &k, &v, &bad), KVL_INVALID_ARG, "out");
    expect(cache, kvl_step_end(cache, step), KVL_MISMATCH, "layers"); /* nothing has run */
    assert_int_equal(kvl_validate(cache), KVL_OK);

    /* and nothing has changed: the step still runs, and gives what it would have given */
    assert_int_equal(kvl_attend(cache, step, 1, &q, &k, &v, &out), KVL_OK);
    expect(cache, kvl_attend(cache, step, 1, &q, &k, &v, &out), KVL_MISMATCH, "layer"); /* twice */
    assert_memory_equal(r.out[0], want.out[1], sizeof want.out[1]);
    expect(cache, kvl_step_end(cache, step), KVL_MISMATCH, "layers"); /* layer 0 is missing */
    assert_int_equal(kvl_attend(cache, step, 0, &q, &k, &v, &out), KVL_OK);
    assert_memory_equal(r.out[0], want.out[0], sizeof want.out[0]);
    assert_int_equal(kvl_step_end(cache, step), KVL_OK);
    assert_true(kvl_attend(cache, step, 0, &q, &k, &v, &out) < 0); /* the step is over */
    assert_true(kvl_step_end(cache, step) < 0);
    assert_true(kvl_step_abort(cache, step) < 0);
    assert_int_equal(kvl_validate(cache), KVL_OK);
    kvl_cache_destroy(cache);
}

static void test_wrong_cache(void **state) {
    kvl_cache *a = make_cache("int8", 0, PLENTY), *b = make_cache("int8", 0, PLENTY);
    static rows r;
    static int32_t tokens[TOKENS];
    kvl_tensor q = {.data = r.q}, k = {.data = r.k}, v = {.data = r.v}, out = {.data = r.out[0]};
    kvl_span sa, sb;
    const kvl_step *step_a, *step_b;
    (void)state;
    make_rows(&r, 2);
    number_tokens(tokens, 0);
    sa = (kvl_span){open_seq(a, tokens, TOKENS, NULL), tokens, TOKENS, 1, NULL};
    sb = (kvl_span){open_seq(b, tokens, TOKENS, NULL), tokens, TOKENS, 1, NULL};
    assert_int_equal(kvl_step_begin(a, &sa, 1, &step_a), KVL_OK);
    expect(b, kvl_attend(b, step_a, 0, &q, &k, &v, &out), KVL_MISMATCH, "step"); /* none is open there */
    assert_int_equal(kvl_step_begin(b, &sb, 1, &step_b), KVL_OK);
    expect(b, kvl_attend(b, step_a, 0, &q, &k, &v, &out), KVL_MISMATCH, "step");
    expect(b, kvl_step_end(b, step_a), KVL_MISMATCH, "step");
    assert_int_equal(kvl_step_abort(a, step_a), KVL_OK);
    assert_int_equal(kvl_step_abort(b, step_b), KVL_OK);
    kvl_cache_destroy(a);
    kvl_cache_destroy(b);
}

/* ---- numbers that are not finite ---- */
static const char *const presets[] = {"f32", "f16",   "bf16",     "int8", "int8+",
                                      "fp8", "nvfp4", "balanced", "int4"};
static const float not_finite[] = {NAN, INFINITY, -INFINITY};

static bool same_rows(const rows *a, const rows *b, uint32_t first, uint32_t n) {
    for (uint32_t l = 0; l < LAYERS; l++) {
        if (memcmp(a->out[l][first], b->out[l][first], sizeof a->out[0][0] * n) != 0) return false;
    }
    return true;
}

/* A row of q spoils itself and nothing else: not its chunk, not its neighbour, not what comes after. */
static void test_query_nan(void **state) {
    static rows good, other, bad, beside;
    static int32_t tokens[TOKENS], others[TOKENS];
    (void)state;
    number_tokens(tokens, 0);
    number_tokens(others, 1000);
    for (uint32_t i = 0; i < 9; i++) {
        kvl_cache *cache = make_cache(presets[i], 0, PLENTY);
        kvl_seq seqs[2] = {open_seq(cache, tokens, TOKENS, NULL), open_seq(cache, others, TOKENS, NULL)};
        const kvl_step *step;
        make_rows(&good, 3);
        make_rows(&other, 4);
        feed(cache, seqs[0], &good, tokens, 0, TOKENS);
        feed(cache, seqs[1], &other, others, 0, TOKENS);
        kvl_cache_destroy(cache);

        cache = make_cache(presets[i], 0, PLENTY);
        make_rows(&bad, 3);
        make_rows(&beside, 4);
        bad.q[50][1][7] = not_finite[i % 3];
        seqs[0] = open_seq(cache, tokens, TOKENS, NULL);
        seqs[1] = open_seq(cache, others, TOKENS, NULL);
        step = run_rows(cache, 2, seqs, (rows *[]){&bad, &beside}, (const int32_t *[]){tokens, others}, 0,
                        TOKENS);
        assert_int_equal(kvl_step_end(cache, step), KVL_OK);
        assert_true(same_rows(&good, &bad, 0, 50));
        assert_true(same_rows(&good, &bad, 51, TOKENS - 51));
        assert_true(same_rows(&other, &beside, 0, TOKENS));
        for (uint32_t h = 0; h < Q_HEADS; h++) { /* the other heads of that row are whole too */
            if (h != 1) assert_memory_equal(good.out[0][50][h], bad.out[0][50][h], sizeof bad.out[0][50][h]);
        }
        assert_false(kvl_seq_tainted(cache, seqs[0]) || kvl_seq_tainted(cache, seqs[1]));
        kvl_cache_destroy(cache);
    }
}

/* A row of k or v: rows before it, in the same chunk too, and other sequences are untouched; the sequence says so, its
   blocks with that row are never found again. */
static void spoil(const char *preset, uint32_t at, bool in_v, float value, uint32_t chunk) {
    static rows good, other, bad, beside;
    static int32_t tokens[TOKENS], others[TOKENS];
    kvl_cache *cache = make_cache(preset, 0, PLENTY);
    kvl_seq seqs[2] = {open_seq(cache, tokens, TOKENS, NULL), open_seq(cache, others, TOKENS, NULL)}, again;
    const kvl_step *step;
    uint32_t matched, first;
    number_tokens(tokens, 0);
    number_tokens(others, 1000);
    make_rows(&good, 5);
    make_rows(&other, 6);
    feed(cache, seqs[0], &good, tokens, 0, TOKENS);
    feed(cache, seqs[1], &other, others, 0, TOKENS);
    kvl_cache_destroy(cache);

    cache = make_cache(preset, 0, PLENTY);
    make_rows(&bad, 5);
    make_rows(&beside, 6);
    if (in_v)
        bad.v[at][1][3] = value;
    else
        bad.k[at][0][9] = value;
    seqs[0] = open_seq(cache, tokens, TOKENS, NULL);
    seqs[1] = open_seq(cache, others, TOKENS, NULL);
    for (first = 0; first < TOKENS; first += chunk) {
        uint32_t n = TOKENS - first < chunk ? TOKENS - first : chunk;
        assert_int_equal(kvl_seq_tainted(cache, seqs[0]), first > at);
        step = run_rows(cache, 2, seqs, (rows *[]){&bad, &beside}, (const int32_t *[]){tokens, others}, first,
                        n);
        if (first <= at && at < first + n) { /* an aborted step leaves no taint behind */
            assert_int_equal(kvl_step_abort(cache, step), KVL_OK);
            assert_false(kvl_seq_tainted(cache, seqs[0]));
            step = run_rows(cache, 2, seqs, (rows *[]){&bad, &beside}, (const int32_t *[]){tokens, others},
                            first, n);
        }
        assert_int_equal(kvl_step_end(cache, step), KVL_OK);
        assert_int_equal(kvl_validate(cache), KVL_OK);
    }
    if (!same_rows(&good, &bad, 0, at)) fail_msg("%s: rows before position %u changed", preset, at);
    if (!same_rows(&other, &beside, 0, TOKENS)) fail_msg("%s: another sequence changed", preset);
    assert_true(kvl_seq_tainted(cache, seqs[0]));
    assert_false(kvl_seq_tainted(cache, seqs[1]));
    assert_int_equal(kvl_seq_fork(cache, seqs[0], &again, NULL), KVL_OK);
    assert_true(kvl_seq_tainted(cache, again));
    assert_int_equal(kvl_seq_close(cache, again), KVL_OK);
    assert_int_equal(kvl_seq_close(cache, seqs[0]), KVL_OK);
    assert_int_equal(kvl_seq_close(cache, seqs[1]), KVL_OK);
    seqs[0] = open_seq(cache, tokens, TOKENS, &matched);
    if (matched > at) fail_msg("%s: %u tokens reused though position %u is not finite", preset, matched, at);
    assert_false(kvl_seq_tainted(cache, seqs[0]));
    make_rows(&bad, 5);
    feed(cache, seqs[0], &bad, tokens, matched, TOKENS - matched);
    if (!same_rows(&good, &bad, matched, TOKENS - matched)) fail_msg("%s: recomputed rows differ", preset);
    open_seq(cache, others, TOKENS, &matched);
    assert_true(matched > 0);
    kvl_cache_destroy(cache);
}

static void test_key_and_value_nan(void **state) {
    static const uint32_t at[] = {0, 1, 31, 40, 63, 64, 95, 99}, chunk[] = {TOKENS, 50, 33, 1};
    (void)state;
    for (uint32_t i = 0; i < 9; i++) {
        for (uint32_t j = 0; j < 8; j++) {
            spoil(presets[i], at[j], j % 2 != 0, not_finite[(i + j) % 3], chunk[(i + j) % 4]);
            spoil(presets[i], at[j], j % 2 == 0, not_finite[(i + j + 1) % 3], chunk[(i + j + 1) % 4]);
        }
    }
}

/* What the exact format cannot hold is not finite; what it can is nothing special. */
static void test_overflow_of_the_exact_format(void **state) {
    static const struct {
        const char *preset;
        kvl_format exact;
        float value;
        bool taints;
    } table[] = {{"f16", 0, 65504, false},  {"f16", 0, 65519, false},        {"f16", 0, 65520, true},
                 {"int8", 0, -1e6f, true},  {"int8", KVL_F32, -1e6f, false}, {"f32", 0, 1e30f, false},
                 {"bf16", 0, 1e30f, false}, {"bf16", 0, 3.4e38f, true}};
    static rows r;
    static int32_t tokens[TOKENS];
    (void)state;
    number_tokens(tokens, 0);
    for (uint32_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        kvl_cache *cache = make_cache(table[i].preset, table[i].exact, PLENTY);
        kvl_seq seq = open_seq(cache, tokens, TOKENS, NULL);
        make_rows(&r, 7);
        r.v[70][1][3] = table[i].value;
        feed(cache, seq, &r, tokens, 0, TOKENS);
        if (kvl_seq_tainted(cache, seq) != table[i].taints) {
            fail_msg("%s: %g taints: %d", table[i].preset, (double)table[i].value, !table[i].taints);
        }
        kvl_cache_destroy(cache);
    }
}

/* Blocks that NaN rows stood in serve others afterwards, and leave nothing in them. */
static void test_reused_blocks_are_clean(void **state) {
    static rows good, bad, again;
    static int32_t tokens[TOKENS], others[TOKENS];
    (void)state;
    number_tokens(tokens, 0);
    for (uint32_t i = 0; i < 9; i++) {
        kvl_cache *cache = make_cache(presets[i], 0, PLENTY);
        kvl_seq seq = open_seq(cache, tokens, TOKENS, NULL);
        make_rows(&good, 8);
        feed(cache, seq, &good, tokens, 0, TOKENS);
        kvl_cache_destroy(cache);
        cache = make_cache(presets[i], 0, 2 << 20);
        for (int32_t round = 0; round < 60; round++) {
            number_tokens(others, 1000 * (round + 1));
            make_rows(&bad, 9);
            for (uint32_t t = 0; t < TOKENS; t++)
                bad.k[t][t % 2][t % DIM] = bad.v[t][t % 2][(t + 5) % DIM] = NAN;
            seq = open_seq(cache, others, TOKENS, NULL);
            feed(cache, seq, &bad, others, 0, TOKENS - (uint32_t)round % 40);
            assert_int_equal(kvl_seq_close(cache, seq), KVL_OK);
            if (round % 10 != 9) continue;
            make_rows(&again, 8);
            seq = open_seq(cache, tokens, 0, NULL);
            for (uint32_t t = 0; t < TOKENS; t += 25) feed(cache, seq, &again, tokens, t, 25);
            assert_true(same_rows(&good, &again, 0, TOKENS));
            assert_false(kvl_seq_tainted(cache, seq));
            assert_int_equal(kvl_seq_close(cache, seq), KVL_OK);
        }
        kvl_cache_destroy(cache);
    }
}

static int use_path(void **state) {
    simd_path = *(const kvl_simd *)*state;
    return 0;
}

static void skip_if_missing(void **state) {
    kvl_context_desc d = {.backend = KVL_BACKEND_CPU, .simd = *(const kvl_simd *)*state};
    kvl_context *ctx = NULL;
    char why[256] = "";
    kvl_result r;
    d.error = why;
    d.error_size = sizeof why;
    r = kvl_context_create(&d, &ctx);
    kvl_context_destroy(ctx);
    if (r != KVL_OK) {
        printf("SKIP %s\n", why);
        skip();
    }
}

#define ON_PATH(test)                          \
    static void test##_on_path(void **state) { \
        skip_if_missing(state);                \
        test(state);                           \
    }
ON_PATH(test_wrong_arguments)
ON_PATH(test_wrong_cache)
ON_PATH(test_query_nan)
ON_PATH(test_key_and_value_nan)
ON_PATH(test_overflow_of_the_exact_format)
ON_PATH(test_reused_blocks_are_clean)

#define TESTS(label, p)                                                                                     \
    {label ": wrong arguments", test_wrong_arguments_on_path, use_path, NULL, p},                           \
        {label ": wrong cache", test_wrong_cache_on_path, use_path, NULL, p},                               \
        {label ": NaN in q", test_query_nan_on_path, use_path, NULL, p},                                    \
        {label ": NaN in k and v", test_key_and_value_nan_on_path, use_path, NULL, p},                      \
        {label ": overflow of the exact format", test_overflow_of_the_exact_format_on_path, use_path, NULL, \
         p},                                                                                                \
    {                                                                                                       \
        label ": reused blocks are clean", test_reused_blocks_are_clean_on_path, use_path, NULL, p          \
    }

int main(int argc, char **argv) {
    static kvl_simd scalar = KVL_SIMD_SCALAR, avx2 = KVL_SIMD_AVX2, avx512 = KVL_SIMD_AVX512;
    const struct CMUnitTest tests[] = {TESTS("scalar", &scalar), TESTS("avx2", &avx2),
                                       TESTS("avx512", &avx512)};
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests_name("bad tensors", tests, NULL, NULL);
}
