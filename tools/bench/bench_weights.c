/* bench_weights.c - speed of the matrix products of a SmolLM2-135M-shaped model with random weights.
 *
 *     bench_weights [threads [int8|f32 [auto|scalar|avx2|avx512]]]
 *
 * Per batch size: milliseconds for one pass over all products of 30 layers (with the output matrix on 8 rows
 * at most, as in decode or at the end of a prefill chunk), the rate, and the tokens per second that this
 * alone would allow. One row is decode, whose bound is reading the weights: it is also given as a ratio to
 * the memory's read bandwidth, which the last-level cache can lift above 1.
 */
#include "llm/weights.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { WIDTH = 576, KV = 192, FFN = 1536, VOCAB = 49152, LAYERS = 30, MAX_ROWS = 512 };

typedef struct layer {
    matrix q, k, v, o, gate, up, down;
} layer;

typedef struct bench {
    pool *p;
    layer layers[LAYERS];
    matrix out;
    acts a;
    float *x, *y[3], *logits;
} bench;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Random weights of a quantised type; scales are f16 between 2^-9 and 2^-7. */
static void random_matrix(pool *p, matrix *w, uint32_t type, uint32_t n_rows, uint32_t n_cols,
                          weights_mode mode) {
    char err[LLM_ERR_LEN];
    uint32_t block, bytes;
    gguf_type_block(type, &block, &bytes);
    size_t n_blocks = (size_t)n_rows * n_cols / block;
    uint8_t *data = (uint8_t *)calloc(n_blocks, bytes);
    if (!data) exit(1);
    static uint32_t seed = 1;
    for (size_t i = 0; i < n_blocks * bytes; i++)
        data[i] = (uint8_t)((seed = seed * 1664525 + 1013904223) >> 24);
    for (size_t b = 0; b < n_blocks; b++) {
        data[b * bytes + 1] = 0x1c | (data[b * bytes + 1] & 3);
        if (type == GGUF_Q4_1) data[b * bytes + 3] = 0x9c;
    }
    if (!matrix_pack(p, w, type, data, n_rows, n_cols, mode, err, sizeof err)) {
        fprintf(stderr, "bench_weights: %s\n", err);
        exit(1);
    }
    free(data);
}

static void store_all(bench *b, const float *x, uint32_t n_rows, uint32_t n_cols) {
    acts_begin(&b->a, n_rows, n_cols);
    for (uint32_t r = 0; r < n_rows; r++) acts_store(&b->a, r, x + (size_t)r * n_cols);
}

static void pass(bench *b, uint32_t n) {
    for (int l = 0; l < LAYERS; l++) {
        layer *w = &b->layers[l];
        store_all(b, b->x, n, WIDTH);
        matmul_job qkv[3] = {
            {&w->q, b->y[0], WIDTH, false}, {&w->k, b->y[1], KV, false}, {&w->v, b->y[2], KV, false}};
        matmul(b->p, &b->a, qkv, 3);
        store_all(b, b->y[0], n, WIDTH);
        matmul(b->p, &b->a, &(matmul_job){&w->o, b->y[1], WIDTH, false}, 1);
        store_all(b, b->x, n, WIDTH);
        matmul_job ffn[2] = {{&w->gate, b->y[0], FFN, false}, {&w->up, b->y[1], FFN, false}};
        matmul(b->p, &b->a, ffn, 2);
        store_all(b, b->y[0], n, FFN);
        matmul(b->p, &b->a, &(matmul_job){&w->down, b->y[1], WIDTH, false}, 1);
    }
    uint32_t n_out = n < 8 ? n : 8;
    store_all(b, b->x, n_out, WIDTH);
    matmul(b->p, &b->a, &(matmul_job){&b->out, b->logits, VOCAB, false}, 1);
}

/* Memory read by all threads at once, in bytes per second: what a decode step cannot beat. */
enum { READ_TASKS = 64, READ_WORDS = 1 << 19 }; /* 256 MiB */

static void read_task(void *ctx, uint32_t task) {
    uint64_t *words = (uint64_t *)ctx + (size_t)task * READ_WORDS, sum[8] = {0};
    for (size_t i = 0; i < READ_WORDS; i += 8) {
        for (int j = 0; j < 8; j++) sum[j] += words[i + j];
    }
    for (int j = 1; j < 8; j++) sum[0] += sum[j];
    words[0] = sum[0]; /* or the sums would be left out */
}

static double read_bandwidth(pool *p) {
    const size_t bytes = (size_t)READ_TASKS * READ_WORDS * 8;
    uint64_t *words = (uint64_t *)malloc(bytes);
    if (!words) exit(1);
    memset(words, 1, bytes);
    double best = 1e9;
    for (int i = 0; i < 4; i++) {
        double t = now();
        pool_run(p, READ_TASKS, read_task, words);
        t = now() - t;
        if (t < best) best = t;
    }
    free(words);
    return (double)bytes / best;
}

static size_t weight_bytes(const bench *b) {
    size_t bytes = matrix_bytes(&b->out);
    for (int i = 0; i < LAYERS; i++) {
        const layer *l = &b->layers[i];
        bytes += matrix_bytes(&l->q) + matrix_bytes(&l->k) + matrix_bytes(&l->v) + matrix_bytes(&l->o) +
                 matrix_bytes(&l->gate) + matrix_bytes(&l->up) + matrix_bytes(&l->down);
    }
    return bytes;
}

static void measure(bench *b, uint32_t n, double bandwidth) {
    double best = 1e9, total = 0;
    for (int i = 0; i < 50 && (i < 3 || total < 1.0); i++) {
        double t = now();
        pass(b, n);
        t = now() - t;
        total += t;
        if (t < best) best = t;
    }
    double body = (double)LAYERS * (2.0 * WIDTH * WIDTH + 2.0 * WIDTH * KV + 3.0 * WIDTH * FFN) * n;
    double macs = body + (double)VOCAB * WIDTH * (n < 8 ? n : 8);
    printf("%4u rows  %8.2f ms  %7.1f GFLOP/s  %7.1f tok/s", n, best * 1e3, 2 * macs / best * 1e-9, n / best);
    if (n == 1) printf("  weights at %.2f of read bandwidth", (double)weight_bytes(b) / best / bandwidth);
    putchar('\n');
}

int main(int argc, char **argv) {
    uint32_t n_threads = argc > 1 ? (uint32_t)atoi(argv[1]) : 0;
    weights_mode mode = argc > 2 && strcmp(argv[2], "f32") == 0 ? WEIGHTS_F32 : WEIGHTS_INT8;
    weights_path path = WEIGHTS_AUTO;
    for (int i = 0; i < 4; i++) {
        if (argc > 3 && strcmp(argv[3], weights_path_name((weights_path)i)) == 0) path = (weights_path)i;
    }
    static bench b;
    b.p = pool_create(n_threads);
    if (!b.p || !acts_create(&b.a, mode, path, MAX_ROWS, FFN)) return 1;
    for (int l = 0; l < LAYERS; l++) {
        layer *w = &b.layers[l];
        random_matrix(b.p, &w->q, GGUF_Q4_1, WIDTH, WIDTH, mode);
        random_matrix(b.p, &w->k, GGUF_Q4_1, KV, WIDTH, mode);
        random_matrix(b.p, &w->v, GGUF_Q4_1, KV, WIDTH, mode);
        random_matrix(b.p, &w->o, GGUF_Q4_1, WIDTH, WIDTH, mode);
        random_matrix(b.p, &w->gate, GGUF_Q4_1, FFN, WIDTH, mode);
        random_matrix(b.p, &w->up, GGUF_Q4_1, FFN, WIDTH, mode);
        random_matrix(b.p, &w->down, GGUF_Q4_1, WIDTH, FFN, mode);
    }
    random_matrix(b.p, &b.out, GGUF_Q8_0, VOCAB, WIDTH, mode);
    b.x = (float *)malloc(sizeof(float) * MAX_ROWS * WIDTH);
    for (int i = 0; i < MAX_ROWS * WIDTH; i++) b.x[i] = (float)(i % 251) / 125.0f - 1;
    for (int i = 0; i < 3; i++) b.y[i] = (float *)malloc(sizeof(float) * MAX_ROWS * FFN);
    b.logits = (float *)malloc(sizeof(float) * 8 * VOCAB);
    const double bandwidth = read_bandwidth(b.p);
    printf("%u threads, %s, %s; %.0f MB of weights; memory reads %.1f GB/s\n", pool_threads(b.p),
           mode == WEIGHTS_F32 ? "f32" : "int8", weights_path_name(b.a.path), (double)weight_bytes(&b) * 1e-6,
           bandwidth * 1e-9);
    const uint32_t sizes[] = {1, 2, 4, 8, 64, 512};
    for (int i = 0; i < 6; i++) measure(&b, sizes[i], bandwidth);
    return 0;
}
