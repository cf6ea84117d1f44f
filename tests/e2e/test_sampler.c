/* The sampler: what it draws has the distribution that a plain double-precision computation gives, for all settings. */
#include "llm/error.h"
#include "llm/sampler.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static uint32_t random_u32(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

/* Roughly normal, of this deviation: like logits, a few stand out. */
static void random_logits(uint64_t *seed, float *logits, size_t n, double deviation) {
    for (size_t i = 0; i < n; i++) {
        double sum = 0;
        for (int k = 0; k < 12; k++) sum += random_u32(seed) / 2147483648.0;
        logits[i] = (float)((sum - 6) * deviation);
    }
}

/* ---- the reference: sort everything, in double precision -------------------------------------------------- */

typedef struct ranked {
    double p;
    float logit;
    int id;
} ranked;

static int compare_ranked(const void *pa, const void *pb) {
    const ranked *a = pa, *b = pb;
    if (a->logit != b->logit) return a->logit > b->logit ? -1 : 1;
    return a->id - b->id;
}

/* p[i] becomes the probability of token i. */
static void reference(const sampler_desc *d, const float *logits, size_t n, double *p) {
    ranked *r = malloc(n * sizeof *r);
    assert_non_null(r);
    for (size_t i = 0; i < n; i++) r[i] = (ranked){0, isnan(logits[i]) ? -INFINITY : logits[i], (int)i};
    qsort(r, n, sizeof *r, compare_ranked);
    size_t keep = d->top_k && (size_t)d->top_k < n ? (size_t)d->top_k : n;
    double total = 0, sum = 0;
    for (size_t i = 0; i < keep; i++) {
        r[i].p = exp(((double)r[i].logit - r[0].logit) / d->temperature);
        total += r[i].p;
    }
    if (d->top_p > 0 && d->top_p < 1)
        for (size_t i = 0; i < keep; i++)
            if ((sum += r[i].p) >= d->top_p * total) keep = i + 1;
    while (keep > 1 && r[keep - 1].p < d->min_p) keep--;
    total = 0;
    for (size_t i = 0; i < keep; i++) total += r[i].p;
    memset(p, 0, n * sizeof *p);
    for (size_t i = 0; i < keep; i++) p[r[i].id] = r[i].p / total;
    free(r);
}

/* ---- tests ------------------------------------------------------------------------------------------------ */

static sampler make(sampler_desc d) {
    sampler s;
    char err[LLM_ERR_LEN] = "";
    if (!sampler_init(&s, &d, err, sizeof err)) fail_msg("%s", err);
    return s;
}

/* Draws many times and compares: only tokens that may be drawn are, and chi-square is not implausible. */
static void check_distribution(sampler_desc d, const float *logits, size_t n) {
    enum { DRAWS = 40000 };
    double p[64], chi2 = 0;
    int count[64] = {0}, cells = 0;
    assert_true(n <= 64);
    reference(&d, logits, n, p);
    sampler s = make(d);
    for (int i = 0; i < DRAWS; i++) {
        int32_t id = sampler_sample(&s, logits, n);
        assert_true(id >= 0 && (size_t)id < n);
        if (p[id] == 0)
            fail_msg("drew %d: T %g k %d p %g m %g", id, d.temperature, d.top_k, d.top_p, d.min_p);
        count[id]++;
    }
    for (size_t i = 0; i < n; i++) {
        double expected = p[i] * DRAWS;
        if (expected < 5) continue;
        chi2 += (count[i] - expected) * (count[i] - expected) / expected;
        cells++;
    }
    /* mean cells - 1, deviation sqrt(2 cells): six deviations */
    double limit = cells + 6 * sqrt(2.0 * cells);
    if (chi2 > limit)
        fail_msg("chi2 %.1f > %.1f: T %g k %d p %g m %g", chi2, limit, d.temperature, d.top_k, d.top_p,
                 d.min_p);
    sampler_free(&s);
}

static void test_distribution(void **state) {
    (void)state;
    static const float temperatures[] = {0.3f, 1.0f, 2.5f}, top_ps[] = {0, 0.5f, 0.95f}, min_ps[] = {0, 0.1f};
    static const int top_ks[] = {0, 1, 7, 100};
    uint64_t seed = 5;
    for (int t = 0; t < 3; t++)
        for (int k = 0; k < 4; k++)
            for (int p = 0; p < 3; p++)
                for (int m = 0; m < 2; m++) {
                    float logits[50];
                    random_logits(&seed, logits, 50, 2);
                    logits[3] = NAN, logits[9] = -INFINITY;
                    check_distribution((sampler_desc){.temperature = temperatures[t],
                                                      .top_k = top_ks[k],
                                                      .top_p = top_ps[p],
                                                      .min_p = min_ps[m],
                                                      .seed = random_u32(&seed)},
                                       logits, 50);
                }
}

/* A vocabulary of real size: nothing outside the reference's set is drawn, and what is likely enough is. */
static void test_large_vocabulary(void **state) {
    (void)state;
    enum { N = 49152 };
    static float logits[N];
    static double p[N];
    static bool seen[N];
    static const sampler_desc descs[] = {
        {.temperature = 1, .top_k = 40, .seed = 1},
        {.temperature = 0.8f, .top_p = 0.9f, .seed = 2},
        {.temperature = 0.7f, .top_k = 20, .top_p = 0.8f, .seed = 3},
        {.temperature = 1, .min_p = 0.05f, .seed = 4},
        {.temperature = 1, .top_p = 0.999999f, .seed = 5},
        {.temperature = 1, .top_k = N - 1, .seed = 6},
    };
    uint64_t seed = 3;
    random_logits(&seed, logits, N, 3);
    for (size_t i = 0; i < 30; i++) logits[random_u32(&seed) % N] = 14 + (float)i / 30;
    for (size_t c = 0; c < sizeof descs / sizeof descs[0]; c++) {
        reference(&descs[c], logits, N, p);
        sampler s = make(descs[c]);
        memset(seen, 0, sizeof seen);
        for (int i = 0; i < 500; i++) {
            int32_t id = sampler_sample(&s, logits, N);
            if (id < 0 || p[id] == 0) fail_msg("settings %zu drew %d", c, (int)id);
            seen[id] = true;
        }
        for (int i = 0; i < N; i++)
            if (p[i] * 500 > 20 && !seen[i]) fail_msg("settings %zu never drew %d", c, i);
        sampler_free(&s);
    }
}

static void test_greedy(void **state) {
    (void)state;
    float logits[] = {NAN, -3, 2, INFINITY, 2, -INFINITY};
    sampler s = make((sampler_desc){.top_k = 1, .top_p = 0.5f});
    logits[3] = 1;
    for (int i = 0; i < 3; i++)
        assert_int_equal(sampler_sample(&s, logits, 6), 2); /* of equals, the lower id */
    logits[4] = 2.0000002f;
    assert_int_equal(sampler_sample(&s, logits, 6), 4);
    assert_int_equal(sampler_argmax(logits, 3), 2);
    sampler_free(&s);
}

static void test_bad_logits(void **state) {
    (void)state;
    float all_nan[] = {NAN, NAN, NAN}, all_low[] = {-INFINITY, NAN, -INFINITY}, one[] = {NAN, -1e30f, NAN};
    float infinite[] = {5, INFINITY, NAN};
    static const sampler_desc descs[] = {
        {0}, {.temperature = 1}, {.temperature = 1, .top_k = 2}, {.temperature = 1, .top_p = 0.5f}};
    for (size_t i = 0; i < sizeof descs / sizeof descs[0]; i++) {
        sampler s = make(descs[i]);
        assert_int_equal(sampler_sample(&s, all_nan, 3), -1);
        assert_int_equal(sampler_sample(&s, all_low, 3), -1);
        assert_int_equal(sampler_sample(&s, NULL, 0), -1);
        assert_int_equal(sampler_sample(&s, one, 3), 1);
        assert_int_equal(sampler_sample(&s, infinite, 3), 1);
        sampler_free(&s);
    }
}

/* Temperatures at the ends of the range neither fail nor leave it. */
static void test_extreme_temperatures(void **state) {
    (void)state;
    float logits[] = {-1e38f, 3e38f, 1, 2.9e38f};
    sampler cold = make((sampler_desc){.temperature = 1e-45f}),
            hot = make((sampler_desc){.temperature = 3e38f});
    bool seen[4] = {false};
    for (int i = 0; i < 200; i++) {
        assert_int_equal(sampler_sample(&cold, logits, 4), 1);
        int32_t id = sampler_sample(&hot, logits, 4);
        assert_true(id >= 0 && id < 4);
        seen[id] = true;
    }
    assert_true(seen[0] && seen[1] && seen[2] && seen[3]);
    sampler_free(&cold);
    sampler_free(&hot);
}

/* The published outputs of SplitMix64 for seed 1234567, as thousandths. */
static void test_seed(void **state) {
    (void)state;
    static const int expected[] = {350, 173, 532, 249, 889};
    float logits[1000] = {0};
    sampler s = make((sampler_desc){.temperature = 1, .seed = 1234567});
    for (int i = 0; i < 5; i++) assert_int_equal(sampler_sample(&s, logits, 1000), expected[i]);
    sampler_free(&s);
    sampler a = make((sampler_desc){.temperature = 1, .top_k = 900, .seed = 8});
    sampler b = make((sampler_desc){.temperature = 1, .top_k = 900, .seed = 8});
    sampler c = make((sampler_desc){.temperature = 1, .top_k = 900, .seed = 9});
    int differ = 0;
    for (int i = 0; i < 50; i++) {
        int32_t id = sampler_sample(&a, logits, 1000);
        assert_int_equal(id, sampler_sample(&b, logits, 1000));
        assert_true(id < 900); /* of equals, top-k keeps the lower ids */
        differ += id != sampler_sample(&c, logits, 1000);
    }
    assert_true(differ > 40);
    sampler_free(&a);
    sampler_free(&b);
    sampler_free(&c);
}

static void test_bad_settings(void **state) {
    (void)state;
    static const struct {
        sampler_desc d;
        const char *field;
    } cases[] = {
        {{.temperature = -1}, "temperature -1"},
        {{.temperature = NAN}, "temperature"},
        {{.temperature = INFINITY}, "temperature"},
        {{.top_p = 1.5f}, "top_p 1.5"},
        {{.top_p = NAN}, "top_p"},
        {{.min_p = -0.1f}, "min_p -0.1"},
        {{.min_p = NAN}, "min_p"},
        {{.top_k = -1}, "top_k -1"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        sampler s;
        char err[LLM_ERR_LEN] = "";
        assert_false(sampler_init(&s, &cases[i].d, err, sizeof err));
        if (!strstr(err, cases[i].field)) fail_msg("'%s' lacks '%s'", err, cases[i].field);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_distribution), cmocka_unit_test(test_large_vocabulary),
        cmocka_unit_test(test_greedy),       cmocka_unit_test(test_bad_logits),
        cmocka_unit_test(test_seed),         cmocka_unit_test(test_extreme_temperatures),
        cmocka_unit_test(test_bad_settings),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
