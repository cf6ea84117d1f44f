/* The runner's thread pool, weight matrices and row operations: against double-precision references
 * written here from the formats' definitions, and bit for bit across paths, batches and threads. */
#include "llm/ops.h"
#include "llm/pool.h"
#include "llm/weights.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

static const uint32_t types[] = {GGUF_F32, GGUF_F16, GGUF_Q4_0, GGUF_Q4_1, GGUF_Q8_0};
static const weights_path paths[] = {WEIGHTS_SCALAR, WEIGHTS_AVX2, WEIGHTS_AVX512};
#define COUNT(a) (sizeof(a) / sizeof(a)[0])

/* ---- input ---- */

static uint32_t seed = 1;
static uint32_t random_u32(void) {
    seed ^= seed << 13, seed ^= seed >> 17, seed ^= seed << 5;
    return seed;
}
static double random_unit(void) { return random_u32() / 4294967296.0 * 2 - 1; }

static double half_value(uint16_t h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double v = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return h & 0x8000 ? -v : v;
}

/* A finite half of roughly this size. */
static uint16_t random_half(int exponent) {
    return (uint16_t)((random_u32() & 0x83ff) | (uint32_t)(exponent + 15) << 10);
}

static size_t type_block(uint32_t type) { return type == GGUF_F32 || type == GGUF_F16 ? 1 : 32; }
static size_t type_bytes(uint32_t type) {
    return type == GGUF_F32 ? 4 : type == GGUF_F16 ? 2 : type == GGUF_Q4_0 ? 18 : type == GGUF_Q4_1 ? 20 : 34;
}

static uint8_t *random_weights(uint32_t type, size_t n) {
    size_t n_blocks = n / type_block(type), bytes = type_bytes(type);
    uint8_t *data = malloc(n_blocks * bytes);
    for (size_t i = 0; i < n_blocks * bytes; i++) data[i] = (uint8_t)random_u32();
    for (size_t b = 0; b < n_blocks; b++) {
        uint8_t *p = data + b * bytes;
        float f = (float)random_unit();
        uint16_t h = random_half(-3), m = random_half(-1);
        if (type == GGUF_F32)
            memcpy(p, &f, 4);
        else
            memcpy(p, &h, 2);
        if (type == GGUF_Q4_1) memcpy(p + 2, &m, 2);
    }
    return data;
}

static float *random_rows(size_t n) {
    float *x = malloc(n * sizeof(float));
    for (size_t i = 0; i < n; i++) x[i] = (float)(random_unit() * (i % 7 == 0 ? 8 : 1));
    return x;
}

/* ---- reference ---- */

/* Element i of data, from ggml's definition of the type. */
static double weight_value(uint32_t type, const uint8_t *data, size_t i) {
    const uint8_t *p = data + i / type_block(type) * type_bytes(type);
    size_t in = i % 32;
    uint16_t d, m;
    float f;
    memcpy(&f, p, type == GGUF_F32 ? 4 : 2);
    memcpy(&d, p, 2);
    if (type == GGUF_F32) return f;
    if (type == GGUF_F16) return half_value(d);
    if (type == GGUF_Q8_0) return half_value(d) * (int8_t)p[2 + in];
    const uint8_t *nibbles = p + (type == GGUF_Q4_1 ? 4 : 2);
    int q = in < 16 ? nibbles[in] & 15 : nibbles[in - 16] >> 4;
    if (type == GGUF_Q4_0) return half_value(d) * (q - 8);
    memcpy(&m, p + 2, 2);
    return half_value(d) * q + half_value(m);
}

static double *weight_values(uint32_t type, const uint8_t *data, size_t n) {
    double *w = malloc(n * sizeof(double));
    for (size_t i = 0; i < n; i++) w[i] = weight_value(type, data, i);
    return w;
}

/* What int8 activations stand for: per 32, absmax / 127 times an integer. */
static void quantised_rows(const float *x, size_t n, double *out) {
    for (size_t b = 0; b < n; b += 32) {
        float amax = 0;
        for (size_t i = b; i < b + 32; i++) amax = fmaxf(amax, fabsf(x[i]));
        float d = amax / 127.0f, inv = amax > 0 ? 127.0f / amax : 0;
        for (size_t i = b; i < b + 32; i++) out[i] = (double)d * nearbyint((double)(x[i] * inv));
    }
}

/* The half nearest to a positive v, by search. */
static uint16_t nearest_half(double v) {
    uint32_t best = 0;
    for (uint32_t h = 0; h < 0x7c00; h++) {
        double now = fabs(half_value((uint16_t)h) - v), before = fabs(half_value((uint16_t)best) - v);
        if (now < before || (now == before && h % 2 == 0)) best = h;
    }
    return (uint16_t)best;
}

/* Float weights in int8 mode: per 32, f16(absmax / 127) times an integer. */
static void quantised_weights(double *w, size_t n) {
    for (size_t b = 0; b < n; b += 32) {
        double amax = 0;
        for (size_t i = b; i < b + 32; i++) amax = fmax(amax, fabs(w[i]));
        float d = (float)half_value(nearest_half((float)amax / 127.0f)), inv = d > 0 ? 1 / d : 0;
        for (size_t i = b; i < b + 32; i++)
            w[i] = (double)d * fmaxf(-127, fminf(127, nearbyintf((float)w[i] * inv)));
    }
}

/* ---- products ---- */

static void store_rows(acts *a, const float *x, uint32_t n_rows, uint32_t n_cols) {
    acts_begin(a, n_rows, n_cols);
    for (uint32_t r = 0; r < n_rows; r++) acts_store(a, r, x + (size_t)r * n_cols);
}

static void product(pool *p, weights_mode mode, weights_path path, const matrix *w, const float *x,
                    uint32_t n_rows, float *y, bool add) {
    acts a;
    assert_true(acts_create(&a, mode, path, n_rows, w->n_cols));
    store_rows(&a, x, n_rows, w->n_cols);
    matmul(p, &a, &(matmul_job){w, y, w->n_rows, add}, 1);
    acts_free(&a);
}

static void check_product(uint32_t type, weights_mode mode, weights_path path, uint32_t n_out,
                          uint32_t n_cols) {
    enum { ROWS = 11 };
    pool *p = pool_create(2);
    uint8_t *data = random_weights(type, (size_t)n_out * n_cols);
    float *x = random_rows((size_t)ROWS * n_cols), *y = malloc(sizeof(float) * ROWS * n_out);
    double *w = weight_values(type, data, (size_t)n_out * n_cols),
           *xd = malloc(sizeof(double) * ROWS * n_cols);
    for (size_t i = 0; i < (size_t)ROWS * n_cols; i++) xd[i] = x[i];
    if (mode == WEIGHTS_INT8) {
        for (uint32_t r = 0; r < ROWS; r++)
            quantised_rows(x + (size_t)r * n_cols, n_cols, xd + (size_t)r * n_cols);
        if (type == GGUF_F32 || type == GGUF_F16) quantised_weights(w, (size_t)n_out * n_cols);
    }
    matrix m;
    char err[LLM_ERR_LEN];
    assert_true(matrix_pack(p, &m, type, data, n_out, n_cols, mode, err, sizeof err));
    for (int add = 0; add < 2; add++) {
        for (uint32_t i = 0; i < ROWS * n_out; i++) y[i] = 3.0f;
        product(p, mode, path, &m, x, ROWS, y, add);
        for (uint32_t r = 0; r < ROWS; r++) {
            for (uint32_t o = 0; o < n_out; o++) {
                double want = add ? 3 : 0, size = want;
                for (uint32_t k = 0; k < n_cols; k++) {
                    double term = w[(size_t)o * n_cols + k] * xd[(size_t)r * n_cols + k];
                    want += term;
                    size += fabs(term);
                }
                if (!(fabs(y[r * n_out + o] - want) <= 2e-6 * size)) {
                    fail_msg("%s %s %s %ux%u: y[%u][%u] = %g, want %g", gguf_type_name(type),
                             mode == WEIGHTS_F32 ? "f32" : "int8", weights_path_name(path), n_out, n_cols, r,
                             o, (double)y[r * n_out + o], want);
                }
            }
        }
    }
    matrix_free(&m);
    free(data), free(x), free(y), free(w), free(xd);
    pool_destroy(p);
}

static void test_every_type_and_path(void **state) {
    (void)state;
    const uint32_t shapes[][2] = {{16, 32}, {1, 64}, {37, 96}, {24, 160}, {50, 288}};
    for (size_t t = 0; t < COUNT(types); t++) {
        for (size_t p = 0; p < COUNT(paths); p++) {
            if (!weights_path_available(paths[p])) continue;
            for (size_t s = 0; s < COUNT(shapes); s++) {
                check_product(types[t], WEIGHTS_INT8, paths[p], shapes[s][0], shapes[s][1]);
                check_product(types[t], WEIGHTS_F32, paths[p], shapes[s][0], shapes[s][1]);
            }
        }
    }
}

/* Extreme bytes: every nibble and byte at its ends against activations at theirs. */
static void test_integer_extremes(void **state) {
    (void)state;
    enum { OUT = 16, COLS = 64, ROWS = 4 };
    pool *pool1 = pool_create(1);
    for (size_t t = 2; t < COUNT(types); t++) {
        for (int fill = 0; fill < 3; fill++) {
            uint8_t *data = random_weights(types[t], OUT * COLS);
            float x[ROWS * COLS], y[ROWS * OUT];
            size_t bytes = type_bytes(types[t]), head = types[t] == GGUF_Q4_1 ? 4 : 2;
            const uint8_t fills[] = {0x00, 0xff, 0x80};
            for (size_t b = 0; b < OUT * COLS / 32; b++)
                memset(data + b * bytes + head, fills[fill], bytes - head);
            for (int i = 0; i < ROWS * COLS; i++) x[i] = i / COLS % 2 ? -127.0f : 127.0f;
            double *w = weight_values(types[t], data, OUT * COLS);
            matrix m;
            char err[LLM_ERR_LEN];
            assert_true(matrix_pack(pool1, &m, types[t], data, OUT, COLS, WEIGHTS_INT8, err, sizeof err));
            for (size_t p = 0; p < COUNT(paths); p++) {
                if (!weights_path_available(paths[p])) continue;
                product(pool1, WEIGHTS_INT8, paths[p], &m, x, ROWS, y, false);
                for (int i = 0; i < ROWS * OUT; i++) {
                    double want = 0, size = 0;
                    for (int k = 0; k < COLS; k++) {
                        double term = w[i % OUT * COLS + k] * x[i / OUT * COLS + k];
                        want += term, size += fabs(term);
                    }
                    assert_true(fabs(y[i] - want) <= 1e-6 * size);
                }
            }
            matrix_free(&m);
            free(data), free(w);
        }
    }
    pool_destroy(pool1);
}

/* Every batch size to 17, every thread count to 3: each row has the bits it has alone; in int8, on every
 * path. */
static void test_rows_are_independent(void **state) {
    (void)state;
    enum { OUT = 41, COLS = 288, MOST = 17 };
    pool *pools[3] = {pool_create(1), pool_create(2), pool_create(3)};
    float *x = random_rows(MOST * COLS), alone[MOST * OUT], y[MOST * OUT];
    for (size_t t = 0; t < COUNT(types); t++) {
        for (int mode = 0; mode < 2; mode++) {
            uint8_t *data = random_weights(types[t], OUT * COLS);
            matrix m;
            char err[LLM_ERR_LEN];
            assert_true(
                matrix_pack(pools[0], &m, types[t], data, OUT, COLS, (weights_mode)mode, err, sizeof err));
            for (size_t p = 0; p < COUNT(paths); p++) {
                if (!weights_path_available(paths[p])) continue;
                if (p == 0 || mode == WEIGHTS_F32) {
                    for (uint32_t r = 0; r < MOST; r++) {
                        product(pools[0], (weights_mode)mode, paths[p], &m, x + r * COLS, 1, alone + r * OUT,
                                false);
                    }
                }
                for (uint32_t n = 1; n <= MOST; n++) {
                    memset(y, 0xff, sizeof y);
                    product(pools[n % 3], (weights_mode)mode, paths[p], &m, x, n, y, false);
                    assert_memory_equal(y, alone, n * OUT * sizeof(float));
                }
            }
            matrix_free(&m);
            free(data);
        }
    }
    free(x);
    for (int i = 0; i < 3; i++) pool_destroy(pools[i]);
}

/* Several matrices in one call, with rows of y longer than a matrix needs: what lies between is not
 * touched. */
static void test_jobs_and_strides(void **state) {
    (void)state;
    enum { COLS = 64, ROWS = 9, STRIDE = 80 };
    const uint32_t outs[3] = {48, 5, 17};
    pool *p = pool_create(2);
    float *x = random_rows(ROWS * COLS), wide[3][ROWS * STRIDE], tight[ROWS * STRIDE];
    matrix m[3];
    acts a;
    matmul_job jobs[3];
    char err[LLM_ERR_LEN];
    assert_true(acts_create(&a, WEIGHTS_INT8, WEIGHTS_AUTO, ROWS, COLS));
    for (int j = 0; j < 3; j++) {
        uint8_t *data = random_weights(types[2 + j], outs[j] * COLS);
        assert_true(matrix_pack(p, &m[j], types[2 + j], data, outs[j], COLS, WEIGHTS_INT8, err, sizeof err));
        for (int i = 0; i < ROWS * STRIDE; i++) wide[j][i] = -99;
        jobs[j] = (matmul_job){&m[j], wide[j], STRIDE, false};
        free(data);
    }
    store_rows(&a, x, ROWS, COLS);
    matmul(p, &a, jobs, 3);
    for (int j = 0; j < 3; j++) {
        product(p, WEIGHTS_INT8, WEIGHTS_AUTO, &m[j], x, ROWS, tight, false);
        for (uint32_t i = 0; i < ROWS * STRIDE; i++) {
            bool inside = i % STRIDE < outs[j];
            float want = inside ? tight[i / STRIDE * outs[j] + i % STRIDE] : -99.0f;
            assert_true(wide[j][i] == want);
        }
        matrix_free(&m[j]);
    }
    acts_free(&a);
    free(x);
    pool_destroy(p);
}

static void test_nan_stays_in_its_row(void **state) {
    (void)state;
    enum { OUT = 20, COLS = 64, ROWS = 3 };
    pool *p = pool_create(1);
    uint8_t *data = random_weights(GGUF_Q4_0, OUT * COLS);
    char err[LLM_ERR_LEN];
    for (int mode = 0; mode < 2; mode++) {
        matrix m;
        assert_true(matrix_pack(p, &m, GGUF_Q4_0, data, OUT, COLS, (weights_mode)mode, err, sizeof err));
        for (size_t i = 0; i < COUNT(paths); i++) {
            if (!weights_path_available(paths[i])) continue;
            float *x = random_rows(ROWS * COLS), clean[ROWS * OUT], y[ROWS * OUT];
            product(p, (weights_mode)mode, paths[i], &m, x, ROWS, clean, false);
            for (int bad = 0; bad < 2; bad++) {
                x[COLS + 40] = bad ? INFINITY : NAN;
                product(p, (weights_mode)mode, paths[i], &m, x, ROWS, y, false);
                for (int o = 0; o < OUT; o++) {
                    assert_true(y[o] == clean[o] && y[2 * OUT + o] == clean[2 * OUT + o]);
                    assert_true(!isfinite(y[OUT + o]));
                }
            }
            free(x);
        }
        matrix_free(&m);
    }
    free(data);
    pool_destroy(p);
}

static void test_decode_row(void **state) {
    (void)state;
    enum { N = 64 };
    for (size_t t = 0; t < COUNT(types); t++) {
        uint8_t *data = random_weights(types[t], N);
        float out[N + 1] = {0};
        out[N] = 7;
        weights_decode_row(types[t], data, N, out);
        for (size_t i = 0; i < N; i++) {
            double want = weight_value(types[t], data, i);
            assert_true(fabs(out[i] - want) <= 1e-7 * (fabs(want) + 1));
        }
        assert_true(out[N] == 7);
        free(data);
    }
    for (uint32_t h = 0; h < 0x10000; h += 32) { /* every half */
        uint16_t in[32];
        float out[32];
        for (uint32_t i = 0; i < 32; i++) in[i] = (uint16_t)(h + i);
        weights_decode_row(GGUF_F16, in, 32, out);
        for (uint32_t i = 0; i < 32; i++) {
            if ((in[i] & 0x7c00) == 0x7c00)
                assert_true(in[i] & 0x3ff ? isnan(out[i]) : isinf(out[i]));
            else
                assert_true(out[i] == half_value(in[i]));
        }
    }
}

static void test_pack_refuses(void **state) {
    (void)state;
    pool *p = pool_create(1);
    matrix m;
    float data[64] = {0};
    char err[LLM_ERR_LEN];
    assert_false(matrix_pack(p, &m, 12, data, 2, 32, WEIGHTS_INT8, err, sizeof err)); /* Q4_K */
    assert_non_null(strstr(err, "Q4_K"));
    assert_false(matrix_pack(p, &m, GGUF_F32, data, 1, 33, WEIGHTS_INT8, err, sizeof err));
    assert_non_null(strstr(err, "multiple of 32"));
    assert_false(matrix_pack(p, &m, GGUF_F32, data, 0, 32, WEIGHTS_INT8, err, sizeof err));
    assert_false(matrix_pack(p, &m, GGUF_F32, data, 1, 0, WEIGHTS_F32, err, sizeof err));
    assert_false(matrix_pack(p, &m, GGUF_F32, data, 1, 1ull << 32, WEIGHTS_F32, NULL, 0));
    acts a;
    assert_false(acts_create(&a, WEIGHTS_INT8, WEIGHTS_AUTO, 1, 33));
    assert_false(acts_create(&a, WEIGHTS_INT8, WEIGHTS_AUTO, 0, 32));
    pool_destroy(p);
}

/* ---- row operations ---- */

static void test_rmsnorm(void **state) {
    (void)state;
    enum { N = 576 };
    float *x = random_rows(N), *w = random_rows(N), out[N];
    double squares = 0;
    for (int i = 0; i < N; i++) squares += (double)x[i] * x[i];
    ops_rmsnorm(x, w, N, 1e-5f, out);
    for (int i = 0; i < N; i++) {
        double want = x[i] / sqrt(squares / N + 1e-5f) * w[i];
        assert_true(fabs(out[i] - want) <= 1e-6 * fabs(want));
    }
    ops_rmsnorm(x, w, N, 1e-5f, x); /* in place */
    assert_memory_equal(x, out, sizeof out);
    memset(x, 0, N * sizeof(float));
    ops_rmsnorm(x, w, N, 1e-5f, out);
    assert_true(out[0] == 0);
    free(x), free(w);
}

static void test_rope(void **state) {
    (void)state;
    enum { HEADS = 3, DIM = 64, ROT = 48 };
    float *x = random_rows(HEADS * DIM), y[HEADS * DIM], angles[ROT];
    const uint32_t positions[] = {0, 1, 777, 131071};
    for (size_t p = 0; p < COUNT(positions); p++) {
        memcpy(y, x, sizeof y);
        ops_rope_angles(positions[p], 100000.0, ROT, angles);
        ops_rope(y, HEADS, DIM, ROT, angles);
        for (int i = 0; i < HEADS * DIM; i += 2) {
            int in = i % DIM;
            double angle = in < ROT ? positions[p] * pow(100000.0, -(double)in / ROT) : 0;
            assert_true(fabs(y[i] - (x[i] * cos(angle) - x[i + 1] * sin(angle))) < 2e-6);
            assert_true(fabs(y[i + 1] - (x[i] * sin(angle) + x[i + 1] * cos(angle))) < 2e-6);
        }
    }
    free(x);
}

static void test_silu(void **state) {
    (void)state;
    enum { N = 4096 };
    float gate[N], up[N], out[N];
    for (size_t p = 0; p < COUNT(paths); p++) {
        if (!weights_path_available(paths[p])) continue;
        for (int i = 0; i < N; i++) {
            gate[i] = (float)(random_unit() * (i % 3 ? 5 : 120));
            up[i] = (float)random_unit();
        }
        gate[0] = 0, gate[1] = 1e6f, gate[2] = -1e6f, gate[3] = NAN, gate[4] = 88.5f, gate[5] = -88.5f;
        memcpy(out, gate, sizeof out);
        ops_silu_mul(paths[p], out, up, N);
        for (int i = 0; i < N; i++) {
            double want = (double)gate[i] / (1 + exp(-(double)gate[i])) * up[i];
            if (i == 3)
                assert_true(isnan(out[i]));
            else
                assert_true(fabs(out[i] - want) <= 1e-6 * fabs(want) + 1e-30);
        }
    }
}

/* ---- pool ---- */

typedef struct tally {
    atomic_uint hits[1000];
    unsigned plain[1000]; /* written by tasks, read after the loop: a race is the pool's */
} tally;

static void tally_task(void *ctx, uint32_t task) {
    tally *t = (tally *)ctx;
    atomic_fetch_add(&t->hits[task], 1);
    t->plain[task]++;
}

static void test_pool(void **state) {
    (void)state;
    for (uint32_t n_threads = 1; n_threads <= 4; n_threads++) {
        pool *p = pool_create(n_threads);
        assert_non_null(p);
        assert_int_equal(pool_threads(p), n_threads);
        tally t;
        memset(&t, 0, sizeof t);
        unsigned loops[1000] = {0};
        for (int loop = 0; loop < 3000; loop++) {
            uint32_t n = loop % 100 == 99 ? 1000 : (uint32_t)(loop % 9);
            pool_parallel_for(p, n, tally_task, &t);
            for (uint32_t i = 0; i < n; i++) loops[i]++;
            if (loop % 500 == 0)
                nanosleep(&(struct timespec){0, 1000000}, NULL); /* let the workers fall asleep */
        }
        for (int i = 0; i < 1000; i++) {
            assert_int_equal(atomic_load(&t.hits[i]), loops[i]);
            assert_int_equal(t.plain[i], loops[i]);
        }
        pool_destroy(p);
    }
    pool_destroy(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_type_and_path),
        cmocka_unit_test(test_integer_extremes),
        cmocka_unit_test(test_rows_are_independent),
        cmocka_unit_test(test_jobs_and_strides),
        cmocka_unit_test(test_nan_stays_in_its_row),
        cmocka_unit_test(test_decode_row),
        cmocka_unit_test(test_pack_refuses),
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_silu),
        cmocka_unit_test(test_pool),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
