/* bench_core: what the bookkeeping costs, beside what the same run measures for a hash-map lookup, a malloc and a memcpy.
   Null backend: no attention. Each figure is a median over many repetitions. */
#define KVL_IMPLEMENTATION
#include "../../kvlite.h"
#include <stdio.h>

enum { REPEATS = 400, RUNNING = 256, MAP_SIZE = 1 << 14 };

static uint64_t samples[REPEATS];

static int by_value(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}
static double quantile(double q) {
    qsort(samples, REPEATS, sizeof *samples, by_value);
    return (double)samples[(size_t)(q * (REPEATS - 1))];
}

static kvl_cache *make_cache(uint64_t bytes) {
    static char error[256];
    kvl_cache_desc d;
    kvl_cache *c = NULL;
    memset(&d, 0, sizeof d);
    d.geometry.n_layers = 30; /* SmolLM2-135M */
    d.geometry.n_q_heads = 9;
    d.geometry.n_kv_heads = 3;
    d.geometry.k_dim = 64;
    d.device_bytes = bytes;
    d.context_desc.backend = KVL_BACKEND_NULL;
    d.error = error;
    d.error_size = sizeof error;
    if (kvl_cache_create(&d, &c) != KVL_OK) {
        fprintf(stderr, "bench_core: %s\n", error);
        exit(1);
    }
    return c;
}

static void run_layers(kvl_cache *c, const kvl_step *step) {
    kvl_tensor t;
    memset(&t, 0, sizeof t);
    for (uint32_t l = 0; l < 30; l++) kvl_attend(c, step, l, &t, &t, &t, &t);
}

static void bench_plan(void) {
    static int32_t prompt[1024], next[RUNNING * 2];
    kvl_cache *c = make_cache(16ull << 30);
    kvl_sched *s;
    const kvl_step *step;
    kvl_stats stats;
    uint64_t commit[REPEATS];
    kvl_sched_create(c, NULL, &s);
    for (int i = 0; i < RUNNING; i++) {
        kvl_request r;
        kvl_req h;
        memset(&r, 0, sizeof r);
        for (int j = 0; j < 1024; j++) prompt[j] = i * 31 + j;
        r.tokens = prompt;
        r.n_tokens = 512 + (uint32_t)i;
        r.max_new_tokens = 2000;
        kvl_sched_submit(s, &r, &h);
    }
    do {
        if (kvl_sched_plan(s, &step) != KVL_OK) exit(1);
        run_layers(c, step);
        kvl_sched_commit(s, step, next);
        kvl_get_stats(c, &stats);
    } while (stats.running < RUNNING || step->n_logits < RUNNING);
    for (int i = 0; i < REPEATS; i++) {
        uint64_t t0 = kvli_clock_now();
        kvl_sched_plan(s, &step);
        uint64_t t1 = kvli_clock_now();
        run_layers(c, step);
        uint64_t t2 = kvli_clock_now();
        kvl_sched_commit(s, step, next);
        commit[i] = kvli_clock_now() - t2;
        samples[i] = t1 - t0;
    }
    printf("plan, 256 decoding            p50 %8.2f us  p99 %8.2f us   (target 10)\n", quantile(0.5) / 1e3,
           quantile(0.99) / 1e3);
    memcpy(samples, commit, sizeof samples);
    printf("commit, 256 decoding          p50 %8.2f us  p99 %8.2f us\n", quantile(0.5) / 1e3,
           quantile(0.99) / 1e3);
    kvl_sched_destroy(s);
    kvl_cache_destroy(c);
}

static void bench_alloc(void) {
    kvl_cache *c = make_cache(4ull << 30);
    static uint32_t held[256];
    static void *mallocs[256];
    for (int i = 0; i < REPEATS; i++) {
        uint64_t t0 = kvli_clock_now();
        for (int j = 0; j < 256; j++) held[j] = kvli_block_alloc(c, 0);
        for (int j = 0; j < 256; j++) kvli_unref(c, held[j]);
        samples[i] = kvli_clock_now() - t0;
    }
    double block = quantile(0.5) / 256;
    for (int i = 0; i < REPEATS; i++) {
        uint64_t t0 = kvli_clock_now();
        for (int j = 0; j < 256; j++) mallocs[j] = malloc(512);
        for (int j = 0; j < 256; j++) free(mallocs[j]);
        samples[i] = kvli_clock_now() - t0;
    }
    double heap = quantile(0.5) / 256;
    printf("block alloc + free            p50 %8.1f ns                 (target 50; malloc + free %.1f ns, "
           "ratio %.2f)\n",
           block, heap, block / heap);
    kvl_cache_destroy(c);
}

/* A plain open-addressing map from 64-bit keys, larger than the L1 cache, each lookup waiting for the one before it: what any prefix
   lookup needs at least once a block. */
static double map_lookup_ns(void) {
    static uint64_t keys[MAP_SIZE * 2];
    volatile uint64_t sink = 0;
    for (uint64_t i = 0; i < MAP_SIZE; i++) {
        uint64_t k = (i + 1) * 0x9E3779B97F4A7C15ull, at = k >> 49;
        while (keys[at]) at = (at + 1) % (MAP_SIZE * 2);
        keys[at] = k;
    }
    for (int i = 0; i < REPEATS; i++) {
        uint64_t t0 = kvli_clock_now(), found = 0;
        for (uint64_t j = 0; j < 1024; j++) {
            uint64_t k = ((found + j * 7919 + (uint64_t)i * 131) % MAP_SIZE + 1) * 0x9E3779B97F4A7C15ull,
                     at = k >> 49;
            while (keys[at] != k) at = (at + 1) % (MAP_SIZE * 2);
            found += at;
        }
        sink = sink + found;
        samples[i] = kvli_clock_now() - t0;
    }
    return quantile(0.5) / 1024;
}

static void bench_prefix(void) {
    enum { N = 8192, SEQS = 24 };
    kvl_cache *c = make_cache(16ull << 30);
    static int32_t tokens[N];
    const kvl_step *step;
    uint64_t fork[REPEATS], match[REPEATS];
    for (int s = 0; s < SEQS; s++) { /* 24 conversations of 8,192 tokens in the tree */
        kvl_seq_desc d;
        kvl_seq h;
        memset(&d, 0, sizeof d);
        if (kvl_seq_open(c, &d, &h, NULL) != KVL_OK) exit(1);
        for (int i = 0; i < N; i++) tokens[i] = i * 17 + s;
        for (int i = 0; i < N; i += 512) {
            kvl_span span;
            memset(&span, 0, sizeof span);
            span.seq = h;
            span.tokens = tokens + i;
            span.n_tokens = 512;
            if (kvl_step_begin(c, &span, 1, &step) != KVL_OK) exit(1);
            run_layers(c, step);
            kvl_step_end(c, step);
        }
        kvl_seq_close(c, h);
    }
    for (int i = 0; i < REPEATS; i++) {
        kvl_seq_desc d;
        kvl_seq h, f;
        kvl_reuse reuse;
        memset(&d, 0, sizeof d);
        for (int j = 0; j < N; j++) tokens[j] = j * 17 + i % SEQS;
        d.tokens = tokens;
        d.n_tokens = N;
        uint64_t t0 = kvli_clock_now();
        kvli_match m = kvli_match_find(c, &d);
        uint64_t t1 = kvli_clock_now();
        if (m.length < N - 32) exit(1);
        match[i] = t1 - t0;
        kvl_seq_open(c, &d, &h, &reuse);
        uint64_t t2 = kvli_clock_now();
        samples[i] = t2 - t1;
        kvl_seq_fork(c, h, &f, NULL);
        fork[i] = kvli_clock_now() - t2;
        kvl_seq_close(c, f);
        kvl_seq_close(c, h);
    }
    double open = quantile(0.5) / N, map = map_lookup_ns();
    memcpy(samples, match, sizeof samples);
    double per_token = quantile(0.5) / N;
    printf("prefix match                  p50 %8.2f ns a token         (target 5; %.1f ns a block, hash-map "
           "lookup %.1f ns, ratio %.2f)\n",
           per_token, per_token * 32, map, per_token * 32 / map);
    printf("open on 8,192 cached tokens   p50 %8.2f ns a token\n", open);
    memcpy(samples, fork, sizeof samples);
    printf("fork of 8,192 tokens          p50 %8.2f us  p99 %8.2f us\n", quantile(0.5) / 1e3,
           quantile(0.99) / 1e3);
    kvl_cache_destroy(c);
}

int main(void) {
    bench_plan();
    bench_alloc();
    bench_prefix();
    return 0;
}
