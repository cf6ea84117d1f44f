/* bench.h - what the benchmarks share: medians with their spread, made-up numbers, pauses, and how busy the machine was
 * with other programs. */
#ifndef BENCH_H
#define BENCH_H

#include "llm/runtime.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { BENCH_MAX_ROUNDS = 32 };

/* One figure for each round. */
typedef struct rounds {
    double at[BENCH_MAX_ROUNDS];
    uint32_t n;
} rounds;

typedef struct spread {
    double median, least, most;
} spread;

static inline int bench_by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static inline void rounds_add(rounds *r, double value) {
    if (r->n < BENCH_MAX_ROUNDS) r->at[r->n++] = value;
}

static inline spread rounds_spread(const rounds *r) {
    if (!r->n) return (spread){0};
    rounds s = *r;
    qsort(s.at, s.n, sizeof s.at[0], bench_by_value);
    return (spread){(s.at[(s.n - 1) / 2] + s.at[s.n / 2]) / 2, s.at[0], s.at[s.n - 1]};
}

/* a / b, round by round: what the two did at nearly the same time. */
static inline spread rounds_ratio(const rounds *a, const rounds *b) {
    rounds r = {.n = 0};
    for (uint32_t i = 0; i < a->n && i < b->n; i++) rounds_add(&r, a->at[i] / b->at[i]);
    return rounds_spread(&r);
}

/* Uniform in -1..1, the same numbers in every run. */
static inline float bench_noise(void) {
    static uint32_t x = 2463534242u;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return (float)(int32_t)x * (1.0f / 2147483648.0f);
}

/* Longer than the threads of a pool or of OpenMP spin after their last work. */
static inline void bench_settle(void) { nanosleep(&(struct timespec){.tv_nsec = 8000000}, NULL); }

/* Seconds that run(arg) says it took: the least of as many as fit into `slice` seconds, and of at least five unless
 * they are long, so that the caches are as warm as the data allows and a neighbour's burst does not count. */
static inline double bench_best(double (*run)(void *arg), void *arg, double slice) {
    double best = 1e30, spent = 0;
    for (uint32_t i = 0; i < 1000 && (spent < slice || (i < 5 && spent < 0.2)); i++) {
        double s = run(arg);
        if (s < best) best = s;
        spent += s;
    }
    return best;
}

/* ---- who else used the processors ---- */
typedef struct bench_load {
    double all, own, start_s; /* seconds of processor time, of the machine and of this process */
} bench_load;

static inline bench_load bench_load_now(void) {
    bench_load l = {.own = (double)clock() / CLOCKS_PER_SEC, .start_s = runtime_now()};
    unsigned long long t[8] = {0}; /* user, nice, system, idle, iowait, irq, softirq, steal */
    FILE *f = fopen("/proc/stat", "r");
    if (!f) return l;
    if (fscanf(f, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", &t[0], &t[1], &t[2], &t[3], &t[4], &t[5],
               &t[6], &t[7]) == 8)
        l.all = (double)(t[0] + t[1] + t[2] + t[5] + t[6] + t[7]) / (double)sysconf(_SC_CLK_TCK);
    fclose(f);
    return l;
}

/* The share of all processors that other programs took since `before`, 0..1; 0 where the system does not tell. Says so
 * on stderr where it is large: a peer whose threads wait for each other spinning, as OpenMP's do, suffers more from it
 * than kvlite, so that ratios come out too high. */
static inline double bench_others(const bench_load *before) {
    bench_load now = bench_load_now();
    double room = (now.start_s - before->start_s) * (double)sysconf(_SC_NPROCESSORS_ONLN);
    double others = (now.all - before->all) - (now.own - before->own), share = others > 0 ? others / room : 0;
    if (share > 0.05)
        fprintf(stderr, "WARNING: other programs took %.0f%% of the processors; measure on an idle machine\n",
                100 * share);
    return share;
}

/* Where the readable table goes: to stderr if the JSON goes to stdout. */
static inline FILE *bench_table(const char *json) { return json && strcmp(json, "-") == 0 ? stderr : stdout; }

#endif /* BENCH_H */
